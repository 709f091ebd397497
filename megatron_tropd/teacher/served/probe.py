"""What is checked of a server before its scores are believed: who it is, and that they are raw."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.host_memory import available_bytes
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.teacher.served.server import Connection, Scored

TEXT = "17 + 25 = 42. So what is 30 + 12?"
LEAST_TOKENS = 16
SAME = 0.1
"""Mean difference of log-probs, nats, above which two scores are of different models: the limit of
``rollout.max_engine_gap`` in bfloat16, far above round-off."""
FEW = 8
"""Likeliest ids whose probabilities are looked at; vLLM gives 20 unless it is told otherwise."""
_ROUND_OFF = 0.01
UNUSUAL = {"temperature": 0.5, "top_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": 1.0}
"""Sampling parameters that change everything but raw log-probs."""


@dataclass(frozen=True)
class Probe:
    """A short sequence that every server scores, and what the right answers are."""

    name: str
    """Of the teacher: a server must call its model so, or end its path so."""
    strict: bool
    """Whether the user gave the name (``teacher.served_model``), and no end of a path counts."""
    text: str
    """With BOS and EOS in it."""
    text_ids: tuple[int, ...]
    """Of the run's tokenizer."""
    ids: tuple[int, ...]
    """The sequence: those of the text, and more if these are few."""
    longest: int
    """Tokens of the longest sequence of the run; 0: not known."""

    def check(self, asking: Connection) -> Scored:
        """Check all that can be seen from outside; what it says of the sequence.

        Raises:
            ServerError: it failed, or is no ``vllm serve``.
            InputError, ConfigError: it serves something else, or otherwise than it must.
        """
        server = asking.server
        server.model = self._find_model(asking)
        found = asking.tokenize(self.text)
        if found is not None and tuple(found) != self.text_ids:
            raise InputError(
                f"{server} has another tokenizer: expected {list(self.text_ids)} for "
                f"{self.text!r}, found {found}. Serve the folder that model.teacher names."
            )
        columns = asking.wanted.teacher_vocab
        if asking.refuses_id(columns - 1) or not asking.refuses_id(columns):
            raise InputError(
                f"{server} serves a model of another vocabulary than the {columns} columns in "
                "config.json of model.teacher. Serve that one."
            )
        scored, server.fingerprint = asking.score(self.ids, self.at)
        self._check_raw(asking, scored)
        return scored

    @property
    def at(self) -> range:
        """Tokens of the sequence that are compared."""
        return range(1, len(self.ids))

    def _find_model(self, asking: Connection) -> str:
        """The name of the teacher there."""
        models = asking.models()
        for model in models:
            known = {str(model["id"])}
            if not self.strict:
                known = {Path(str(model[key])).name for key in ("id", "root") if model.get(key)}
            if self.name in known:
                self._check_length(asking, model.get("max_model_len"))
                return str(model["id"])
        found = ", ".join(str(model["id"]) for model in models) or "nothing"
        what = "teacher.served_model" if self.strict else "the name of model.teacher's folder"
        raise InputError(
            f"{asking.server} serves {found}, expected {self.name} ({what}). Serve the teacher "
            "there; if it does, set teacher.served_model to its name there."
        )

    def _check_length(self, asking: Connection, most: int | None) -> None:
        # One token is generated: a server does not score alone.
        if most is not None and self.longest + 1 > most:
            raise ConfigError(
                f"{asking.server} takes sequences of {most} tokens, expected at least "
                f"{self.longest + 1} (the longest prompt, rollout.max_new_tokens and one more). "
                "Start it with a larger --max-model-len, or lower rollout.max_new_tokens."
            )

    def _check_raw(self, asking: Connection, scored: Scored) -> None:
        """Refuse what are no log-probs, or not those of the model alone."""
        few = replace(asking.wanted, top_k=FEW)
        of_few, _ = asking.score(self.ids, self.at, wanted=few)
        mass_M = np.exp(np.clip(of_few.logprobs_MK, None, 50)).sum(axis=1)
        if mass_M.max() > 1 + _ROUND_OFF or mass_M.min() < FEW / few.teacher_vocab - _ROUND_OFF:
            raise ConfigError(
                f"{asking.server} gives no log-probs: the probabilities of the {FEW} likeliest ids "
                f"sum to {mass_M.min():.3g} to {mass_M.max():.3g}, expected at most 1. Start it "
                "with --logprobs-mode raw_logprobs."
            )
        for sampling, what in ((UNUSUAL, "temperature and penalties"), ({}, "its defaults")):
            again, _ = asking.score(self.ids, self.at, sampling)
            if (gap := difference(again.sampled_M, scored.sampled_M)) > SAME:
                raise ConfigError(
                    f"{asking.server} gives log-probs that depend on sampling parameters ({what}: "
                    f"{gap:.3g} nats), expected raw ones. Serve the teacher with vLLM 0.32 or "
                    "later, --logprobs-mode raw_logprobs and no logits processors."
                )


def make_probe(
    tokenizer: PreTrainedTokenizerBase,
    folder: HFFolder | MegatronFolder,
    *,
    served_model: str | None,
    vocab_size: int,
    longest: int,
) -> Probe:
    """Make the probe of a run.

    Args:
        served_model: ``teacher.served_model``.
        vocab_size: columns that all models share.
        longest: tokens of the longest sequence; 0: not known.
    """
    marks = [tokenizer.bos_token, tokenizer.eos_token]
    text = TEXT + "".join(dict.fromkeys(mark for mark in marks if mark))
    text_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    more = max(0, LEAST_TOKENS - len(text_ids))
    ids = (*text_ids, *(index * vocab_size // max(more, 1) for index in range(more)))
    name = served_model or folder.path.resolve().name
    return Probe(name, served_model is not None, text, text_ids, ids, longest)


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean difference of log-probs, nats."""
    return float(np.abs(one - other).mean())


def check_same(
    server: str, found: NDArray[np.float32], expected: NDArray[np.float32], of: str
) -> float:
    """Refuse another model than before, by its scores; the difference.

    Raises:
        InputError: it is another.
    """
    gap = difference(found, expected)
    if gap > SAME:
        raise InputError(
            f"{server} is another model: its log-probs of a short sequence differ by {gap:.3g} "
            f"nats from {of}, expected at most {SAME:g}. Serve the teacher there."
        )
    return gap


@torch.no_grad()
def resident_score(
    folder: HFFolder | MegatronFolder, ids: Sequence[int], dtype: torch.dtype
) -> NDArray[np.float32] | str:
    """Score a sequence with the weights at hand, by transformers on the host.

    Returns:
        Log p of each token but the first; or why there is none.
    """
    from transformers import AutoModelForCausalLM  # slow to import

    if not isinstance(folder, HFFolder):
        return "model.teacher is a Megatron checkpoint"
    if not folder.names:
        return f"{folder.path} holds no weights"
    size = sum((folder.path / name).stat().st_size for name in folder.files)
    if 2 * size > (left := available_bytes()):
        return f"{size / 1e9:.0f} GB of weights, and {left / 1e9:.0f} GB of host memory are left"
    model = AutoModelForCausalLM.from_pretrained(
        str(folder.path), dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    ids_N = torch.tensor(ids)
    logp_NV = model.eval()(ids_N[None]).logits[0].float().log_softmax(-1)
    return logp_NV[:-1].gather(1, ids_N[1:, None])[:, 0].numpy()
