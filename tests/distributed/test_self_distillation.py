"""A student that is its own teacher: no divergence in the same context, transformers' in another.

Under every axis; an average goes through checkpoints to another layout.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config import LoraConfig, ParallelConfig, TeacherConfig, TrainConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.sequence import TokenSequence, Writer
from tests.distributed.test_training import recorded_trajectories
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

TRAIN = TrainConfig(steps=9, lr=1e-3, tokens_per_micro_batch=96)
LAYOUTS = {
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "cp2": ParallelConfig(context=2),
}
DECAY = 0.7
FROZEN = TeacherConfig(placement="self")
AVERAGE = replace(FROZEN, ema_decay=DECAY)
LORA = LoraConfig(rank=2, alpha=4.0)
NOTHING = 1e-5
"""Round-off: the teacher's rows are packed by themselves, so that products have other shapes."""
DIVERGENCES = ("k1", "reverse_kl", "forward_kl", "tv")


def _sequences() -> list[TokenSequence]:
    return recorded_trajectories(0)


def _routes(longer: bool) -> Routes:
    """Each prompt read as it is, or after other and more tokens."""
    contexts = {
        s.key.prompt: tuple(s.prompt_ids) if not longer else (*range(60, 77), *s.prompt_ids[1:])
        for s in _alike()
    }
    return Routes(("teacher",), dict.fromkeys(contexts, 0), contexts)


def _alike() -> list[TokenSequence]:
    """Sequences of prompts of their own, for these differ within a group of the recorded ones."""
    return [s.replace(key=s.key._replace(prompt=n, sample=0)) for n, s in enumerate(_sequences())]


def _largest(metrics: dict[str, Any]) -> float:
    return max(abs(metrics[name]) for name in DIVERGENCES)


def _step(parts: Any, routes: Routes | None = None, step: int = 0) -> dict[str, Any]:
    from megatron_tropd.distill.step import learn

    return learn(parts, _alike(), step).metrics


def expected_divergences(
    student: str, teacher: str, routes: Routes, vocab_size: int
) -> dict[str, float]:
    """Transformers' of the student's tokens, each model after its own prompt, in float64."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(m).double().eval() for m in (student, teacher)]
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in DIVERGENCES}
    for sequence in _alike():
        log_q, log_p = (
            _logprobs(model, s, vocab_size)
            for model, s in zip(models, (sequence, routes.as_read(sequence)), strict=True)
        )
        student_R = torch.tensor([w == Writer.STUDENT for w in sequence.writers])
        ids_R = torch.tensor(sequence.response_ids)
        q, p = log_q.exp(), log_p.exp()
        values = {
            "k1": (log_q - log_p).gather(1, ids_R[:, None])[:, 0],
            "reverse_kl": (q * (log_q - log_p)).sum(1),
            "forward_kl": (p * (log_p - log_q)).sum(1),
            "tv": (q - p).abs().sum(1) / 2,
        }
        for name, value in values.items():
            sums[name].append(value[student_R])
    return {name: float(torch.cat(parts).mean()) for name, parts in sums.items()}


@torch.no_grad()
def _logprobs(model: Any, sequence: TokenSequence, vocab_size: int) -> torch.Tensor:
    """[R, V] before each token of the response."""
    logits = model(torch.tensor(sequence.ids_N)[None]).logits[0, :, :vocab_size]
    return logits[sequence.prompt_length - 1 : -1].log_softmax(-1)


def in_contexts(student: str, teacher: str) -> None:
    """Every layout of two ranks in one spawn."""
    import torch.distributed as dist

    from megatron_tropd.mcore import parallel, platform

    dist.init_process_group(platform.distributed_backend())
    loss = preset("gkd_reverse_kl")
    for layout in LAYOUTS.values():
        ranks = parallel.initialize(layout, seed=1, pad_multiple=layout.row_shards)

        def build(layout=layout, ranks=ranks, **more: Any) -> Any:
            of = more.pop("teacher", "")
            return build_parts(student, of, layout, TRAIN, loss, ranks=ranks, **more)

        same, other = _routes(longer=False), _routes(longer=True)
        for source in (FROZEN, AVERAGE):
            for routes in (None, same):
                parts = build(source=source, routes=routes)
                assert _largest(_step(parts)) < NOTHING, (layout, source)
        assert _largest(_step(build(source=FROZEN, lora=LORA, routes=same))) < NOTHING, layout
        adapted = build(source=FROZEN, lora=LORA, routes=other)
        first, second = _step(adapted), _step(adapted, step=1)
        assert second["teacher_entropy"] == pytest.approx(first["teacher_entropy"], rel=1e-6)
        assert second["reverse_kl"] < first["reverse_kl"], "the base stays, the student moves"
        for name, parts in {
            student: build(source=AVERAGE, routes=other),
            teacher: build(teacher=teacher, routes=other),
        }.items():
            found = _step(parts)
            expected = expected_divergences(student, name, other, parts.vocab_size)
            for key in DIVERGENCES:
                assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (layout, key)
        leave_layout()


def test_divergences_are_those_of_the_two_contexts(tiny_model: Any) -> None:
    student = tiny_model("llama", tie_word_embeddings=True)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    run_with_env(2, in_contexts, str(student), str(teacher))


def _whole(parts: Any) -> dict[str, torch.Tensor]:
    """The student's weights as HF tensors, on every rank."""
    return {
        name: tensor.clone()
        for name, tensor in parts.student.model.exported(range(parts.layout.world_size))
        if tensor is not None
    }


def _averaged(parts: Any) -> dict[str, torch.Tensor]:
    with parts.student.average.in_place():
        return _whole(parts)


def _close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def _checkpoints(folder: str, parts: Any) -> Any:
    from megatron_tropd.mcore.checkpoint import Checkpoints

    return Checkpoints(
        Path(folder), keep=2, layout=parts.layout, distributed_optimizer=False, say=print
    )


def through_checkpoints(student: str, folder: str, layouts: Sequence[ParallelConfig]) -> None:
    """Two steps, a checkpoint, and a third in this layout and in another."""
    import torch.distributed as dist

    from megatron_tropd.mcore import platform

    dist.init_process_group(platform.distributed_backend())
    loss, expected, third = preset("gkd_reverse_kl"), {}, {}
    for number, layout in enumerate(layouts):
        # In the student's own context nothing would move.
        routes = _routes(longer=True)
        parts = build_parts(student, "", layout, TRAIN, loss, source=AVERAGE, routes=routes)
        checkpoints = _checkpoints(folder, parts)
        if number == 0:
            weights = [_whole(parts)]
            for step in range(2):
                _step(parts, step=step)
                weights.append(_whole(parts))
            # Its last update comes with the next step.
            expected = {
                name: DECAY * weights[0][name] + (1 - DECAY) * weights[1][name]
                for name in weights[0]
            }
            _close(_averaged(parts), expected)
            checkpoints.save(parts.student, step=2, extra={"step": 2, "seconds": 0.0})
            checkpoints.wait()
        else:
            assert checkpoints.load_newest(parts.student)["step"] == 2
            _close(_averaged(parts), expected)
        found = _step(parts, step=2)
        third = third or found
        for name in (*DIVERGENCES, "grad_norm"):
            assert found[name] == pytest.approx(third[name], rel=1e-4), name
        leave_layout()


def test_an_average_is_saved_and_resumes_in_another_layout(tmp_path: Path, tiny_model: Any) -> None:
    student = tiny_model("llama", tie_word_embeddings=True)
    layouts = [LAYOUTS["tp2_sp"], LAYOUTS["pp2"], LAYOUTS["dp2"]]
    layouts[0] = replace(layouts[0], sequence_parallel=False)
    run_with_env(2, through_checkpoints, str(student), str(tmp_path), layouts)
