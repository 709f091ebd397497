"""Sampling from between two models, by vLLM's speculative decoding with a target of our own.

vLLM serves the teacher; the student is its draft model. The student drafts g tokens, one pass of
the teacher scores them, and what vLLM would compare with the teacher's distribution is compared
with mu (behaviour.py). That is exact: every token of a response is drawn
from mu of its prefix. So that this also holds for the first one and for the one behind a block,

- vLLM is given the prompt without its last token, and is made to "sample" that one: the
  student drafts what follows, as anywhere else;
- there is no bonus token: behind g kept drafts the next block begins.

Every draw is keyed by the request's seed and the token's place in the response. The same place has
the same draws whatever was batched, and wherever blocks begin.

This runs in the engine's process, with vLLM's V1 runner on a CPU.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tropd.data.samples import Blend, BlendTrace, Sample, SampleRequest, Sampling
from megatron_tropd.losses.draws import Purpose, keyed_noise
from megatron_tropd.rollout.engines.behaviour import accepted, blend, residual, share_stops

_INDEX = "tropd_request"
"""In a request's ``extra_args``: its place in the call."""


class Written(NamedTuple):
    """One token of a response."""

    log_mu: float
    log_q: float
    """Of the student, at temperature 1 over the whole vocabulary."""
    kl: float
    b: float
    number: int
    """Of the teacher's pass over this response."""


@dataclass
class _Row:
    """A request under way."""

    seed: int
    last_of_prompt: int
    begun: bool = False
    passes: int = 0
    written: list[Written] = field(default_factory=list)


class BlendedSampler:
    """Takes the place of vLLM's samplers in one model runner."""

    def __init__(self, runner: Any) -> None:
        """Replace the samplers.

        Args:
            runner: vLLM's V1 model runner, with a draft model.
        """
        self._runner = runner
        self._rule = Blend("blended")
        self._rows: list[_Row] = []
        self._ahead = 0
        """Drafts made since the last tokens were settled."""
        runner.sampler.forward = self.begin_responses
        runner.rejection_sampler.forward = self.settle
        runner.drafter._sample_draft_tokens = self.draft

    def start(self, rule: Blend, requests: Sequence[tuple[int, int]]) -> None:
        """Expect requests, each given by its seed and the last token of its prompt."""
        self._rule = rule
        self._rows = [_Row(seed, last) for seed, last in requests]

    def finish(self) -> list[list[Written]]:
        """What was written for each request; tokens behind the end of a response included."""
        rows, self._rows = self._rows, []
        return [row.written for row in rows]

    def begin_responses(self, logits: Tensor, *_: Any, **__: Any) -> Any:
        """The "samples" of a pass without drafts: the last tokens of prompts."""
        self._ahead = 0
        ids = torch.tensor([[_begin(row)] for row in self._batch()], dtype=torch.int32)
        return _output(ids.to(logits.device))

    def draft(self, hidden_BH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Draft one token a row from the student.

        Args:
            hidden_BH: [B, H] the student's last hidden states.

        Returns:
            [B] int64 ids, and [B, V] log q in place of vLLM's probabilities.
        """
        log_q_BV = self._runner.drafter.model.compute_logits(hidden_BH).double().log_softmax(-1)
        rows = self._batch()
        assert len(rows) == len(log_q_BV), f"{len(rows)} requests, {len(log_q_BV)} rows of drafts"
        places = [(row.seed, len(row.written) + self._ahead) for row in rows]
        self._ahead += 1
        return _draw(share_stops(log_q_BV, self._rule.stops), Purpose.DRAFT, places), log_q_BV

    def settle(
        self, metadata: Any, log_q_NV: Tensor | None, logits: Tensor, *_: Any, **__: Any
    ) -> Any:
        """Keep or replace drafts, as vLLM's ``RejectionSampler.forward`` does for another target.

        Args:
            metadata: vLLM's ``SpecDecodeMetadata``; N = drafts of all requests, in order.
            log_q_NV: [N, V] from :meth:`draft`.
            logits: of the teacher, also behind the last draft of each request.
        """
        self._ahead = 0
        rows, counts = self._batch(), metadata.num_draft_tokens
        if not sum(counts):
            return self.begin_responses(logits)
        assert log_q_NV is not None, "vLLM lost the distributions of the drafts"
        log_p_NV = logits[metadata.target_logits_indices].double().log_softmax(-1)
        places = [
            (row.seed, len(row.written) + offset)
            for row, count in zip(rows, counts, strict=True)
            for offset in range(count)
        ]
        drafts = _Drafts(metadata.draft_token_ids.long(), log_q_NV, places)
        written = _written(self._rule, drafts, log_p_NV, counts)
        ids = torch.full((len(rows), metadata.max_spec_len + 1), -1, dtype=torch.int32)
        for line, row, count, tokens in zip(ids, rows, counts, written, strict=True):
            if not count:
                line[0] = _begin(row)
            row.passes += bool(count)
            for place, (token, (log_mu, log_q, kl, b)) in enumerate(tokens):
                line[place] = token
                row.written.append(Written(log_mu, log_q, kl, b, row.passes))
        return _output(ids.to(logits.device))

    def _batch(self) -> list[_Row]:
        """The rows of the pass under way, in its order."""
        runner = self._runner
        params = [runner.requests[name].sampling_params for name in runner.input_batch.req_ids]
        return [self._rows[param.extra_args[_INDEX]] for param in params]


def blended_generate(
    llm: Any, requests: Sequence[SampleRequest], sampling: Sampling
) -> list[Sample]:
    """Continue every request from between the two models of an engine.

    Args:
        llm: with a :class:`BlendedSampler` in its worker (``tropd_blend``).
        requests: prompts of at least two tokens.
        sampling: with a ``blend``.

    Returns:
        One sample per request, in order.
    """
    starts = [(request.seed, request.token_ids[-1]) for request in requests]
    llm.collective_rpc("tropd_start_blending", args=(sampling.blend, starts))
    prompts = [{"prompt_token_ids": list(request.token_ids[:-1])} for request in requests]
    params = [_sampling_params(i, request, sampling) for i, request in enumerate(requests)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    (written,) = llm.collective_rpc("tropd_finish_blending")
    stops = frozenset(sampling.stop_token_ids)
    return [
        _sample(output.outputs[0], tokens, stops)
        for output, tokens in zip(outputs, written, strict=True)
    ]


def _sampling_params(index: int, request: SampleRequest, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # The last token of the prompt is the first that vLLM "samples". If that one would end the
    # response, the end is cut off afterwards (_sample).
    last, stops = request.token_ids[-1], list(sampling.stop_token_ids)
    return SamplingParams(
        temperature=1.0,
        max_tokens=request.max_new_tokens + 1,
        stop_token_ids=[] if last in stops else stops,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={_INDEX: index},
    )


def _sample(completion: Any, written: Sequence[Written], stops: Collection[int]) -> Sample:
    token_ids = tuple(completion.token_ids[1:])
    end = next((place for place, token in enumerate(token_ids) if token in stops), None)
    if end is not None:
        token_ids = token_ids[: end + 1]
    tokens = written[: len(token_ids)]
    return Sample(
        token_ids=token_ids,
        logprobs=tuple(token.log_q for token in tokens),
        finish_reason="length" if end is None else "stop",
        blend=BlendTrace(
            logprobs=tuple(token.log_mu for token in tokens),
            kl=tuple(token.kl for token in tokens),
            b=tuple(token.b for token in tokens),
            passes=tuple(token.number for token in tokens),
        ),
    )


class _Drafts(NamedTuple):
    """N drafts of several requests, those of a request one after the other."""

    ids_N: Tensor
    log_q_NV: Tensor
    places: list[tuple[int, int]]
    """[N] seed of the request, and place in the response."""


def _written(
    rule: Blend, drafts: _Drafts, log_p_NV: Tensor, counts: Sequence[int]
) -> list[list[tuple[int, list[float]]]]:
    """What becomes of each request's drafts: ids with log mu, log q, KL and b.

    Drafts up to the first that is rejected, which is replaced; those behind it are forgotten.
    """
    shared_NV = share_stops(drafts.log_q_NV, rule.stops)
    found = blend(rule, share_stops(log_p_NV, rule.stops), shared_NV)
    uniforms_N = _noise(Purpose.ACCEPTANCE, drafts.places, 1, log_p_NV.device)[:, 0]
    kept = accepted(found.log_mu_NV, shared_NV, drafts.ids_N, uniforms_N).tolist()
    used, rejected = _used(kept, counts)
    ids_N = drafts.ids_N.clone()
    if rejected:
        left = residual(found.log_mu_NV[rejected], shared_NV[rejected])
        ids_N[rejected] = _draw(left, Purpose.REPLACEMENT, [drafts.places[n] for n in rejected])
    log_mu_N = found.log_mu_NV.gather(-1, ids_N.unsqueeze(-1))[:, 0]
    log_q_N = drafts.log_q_NV.gather(-1, ids_N.unsqueeze(-1))[:, 0]
    values = torch.stack([log_mu_N, log_q_N, found.kl_N, found.b_N], dim=-1).tolist()
    ids = ids_N.tolist()
    return [[(ids[n], values[n]) for n in rows] for rows in used]


def _used(kept: Sequence[bool], counts: Sequence[int]) -> tuple[list[range], list[int]]:
    """The rows that each request uses, and all rows that are replaced."""
    used, rejected, start = [], [], 0
    for count in counts:
        first = next((n for n in range(start, start + count) if not kept[n]), None)
        used.append(range(start, start + count if first is None else first + 1))
        rejected += [] if first is None else [first]
        start += count
    return used, rejected


def _begin(row: _Row) -> int:
    """The last token of the prompt; the response begins behind it."""
    if row.begun:
        raise RuntimeError(
            "vLLM asked for a token without drafts in the midst of a response. Its KV cache was "
            "too small, or the response came too near to max_model_len."
        )
    row.begun = True
    return row.last_of_prompt


def _noise(
    purpose: Purpose, places: Sequence[tuple[int, int]], size: int, device: torch.device
) -> Tensor:
    return keyed_noise([(purpose, *place) for place in places], size, device)


def _draw(logprobs_NV: Tensor, purpose: Purpose, places: Sequence[tuple[int, int]]) -> Tensor:
    """[N] int64 drawn from distributions that need no normalising, by keyed Gumbel noise."""
    uniforms_NV = _noise(purpose, places, logprobs_NV.shape[-1], logprobs_NV.device)
    return (logprobs_NV - uniforms_NV.log().neg().log()).argmax(dim=-1)


def _output(ids: Tensor) -> Any:
    from vllm.v1.outputs import SamplerOutput

    return SamplerOutput(sampled_token_ids=ids, logprobs_tensors=None)
