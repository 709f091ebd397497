"""A step whose sequences have several teachers is the sum of the steps of each alone.

Loss and gradients, under every axis; two teachers that are one give the numbers of that one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config import NamedTeacher, ParallelConfig, TeacherConfig, TrainConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.sequence import TokenSequence
from tests.distributed.test_training import recorded_trajectories
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

TRAIN = TrainConfig(steps=9999, lr=1e-30, tokens_per_micro_batch=96)
LAYOUTS = {
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "cp2": ParallelConfig(context=2),
}
METHODS: dict[str, dict[str, Any]] = {"tropd": {"top_k": 8}, "gkd_jsd": {}}
ONE_FOR_ALL = Routes(("a", "b"), dict.fromkeys(range(8), 0) | {1: 1})
"""Of eight sequences one has the second teacher: most ranks and micro-batches have none of it."""
HALVES = Routes(("a", "b"), {n: n % 2 for n in range(8)})


def _sequences() -> list[TokenSequence]:
    return [
        s.replace(key=s.key._replace(prompt=n, sample=0))
        for n, s in enumerate(recorded_trajectories(0))
    ]


def _pair(one: str, other: str, **second: Any) -> tuple[NamedTeacher, ...]:
    return NamedTeacher(name="a", model=one), NamedTeacher(name="b", model=other, **second)


def _gradient(parts: Any, sequences: Sequence[TokenSequence], loss: Any = None) -> dict[str, Any]:
    """Sums over loss tokens: the loss, the gradient of this rank's parameters, the count."""
    from megatron_tropd.data.packing import count_loss_tokens
    from megatron_tropd.distill.metrics import StepSums, groups_of
    from megatron_tropd.distill.step import forward_backward, micro_batches

    parts = replace(parts, loss=loss or parts.loss)
    parts.teacher.begin(0, sequences)
    batches = micro_batches(parts, sequences, 0)
    counts = count_loss_tokens(sequences, parts.loss)
    layout = parts.layout
    sums = StepSums.zeros(parts.device, groups_of(parts.routes, None, sequences))

    def record(values: Any, weights_T: Any, batch: Any) -> dict[str, Any]:
        if layout.tp_rank == 0:
            sums.add(values["loss"], values | {"selected": weights_T}, batch)
        return {}

    prompts = [s.key.prompt for s in sequences]
    forward_backward(parts, batches, counts, 0, record=record, prompts=prompts)
    metrics = sums.reduce().metrics()
    total = counts.total
    gradients = {
        n: p.main_grad.clone() * total for n, p in parts.student.chunks[0].named_parameters()
    }
    return {"loss": metrics["loss"] * total, "of": metrics, "gradients": gradients, "count": total}


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    largest = max(float(g.abs().max()) for g in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        difference = (found["gradients"][name] - gradient).abs().max()
        assert difference <= 1e-5 * largest, (name, float(difference), largest)


def _sum(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = parts[0]["gradients"]
    return {
        "loss": sum(part["loss"] for part in parts),
        "gradients": {n: sum(part["gradients"][n] for part in parts) for n in names},
    }


def _alone(parts: Any, numbers: Sequence[int], loss: Any) -> dict[str, Any]:
    """One teacher, for its own sequences; the others are there and carry no loss."""
    mine = [
        s if s.key.prompt in numbers else s.replace(weight_N=0 * s.weight_N) for s in _sequences()
    ]
    return _gradient(parts, mine, loss)


def compare(student: str, one: str, other: str) -> None:
    """Every layout of two ranks in one spawn."""
    import torch.distributed as dist

    from megatron_tropd.mcore import parallel, platform

    dist.init_process_group(platform.distributed_backend())
    for layout in LAYOUTS.values():
        ranks = parallel.initialize(layout, seed=1, pad_multiple=layout.row_shards)

        def build(teacher: Any, layout=layout, ranks=ranks, **more: Any) -> Any:
            return build_parts(student, teacher, layout, TRAIN, preset("opd"), ranks=ranks, **more)

        singles = {0: build(one), 1: build(other)}
        both = build(_pair(one, other), routes=HALVES)
        for routes in (HALVES, ONE_FOR_ALL):
            both.teacher._routes = routes
            both = replace(both, routes=routes)
            for method, settings in METHODS.items():
                loss = preset(method, **settings)
                mine = [[n for n in range(8) if routes.of_prompt[n] == t] for t in (0, 1)]
                expected = [_alone(singles[t], mine[t], loss) for t in (0, 1)]
                found = _gradient(both, _sequences(), loss)
                _same(found, _sum(expected))
                for number, name in enumerate(routes.names):
                    of, alone = found["of"], expected[number]["of"]
                    assert of[f"teacher/{name}/tokens"] == expected[number]["count"]
                    for key in ("k1", "reverse_kl", "teacher_entropy"):
                        assert of[f"teacher/{name}/{key}"] == pytest.approx(alone[key], rel=1e-4)
        twice = build(_pair(one, one), routes=HALVES)
        for method in ("entropy_opd", "gkd_reverse_kl"):
            loss = preset(method)
            plain = _gradient(singles[0], _sequences(), loss)
            _same(_gradient(twice, _sequences(), loss), plain)
        leave_layout()


def test_a_step_of_two_teachers_is_the_sum_of_their_parts(tiny_model: Any) -> None:
    student = tiny_model("llama", tie_word_embeddings=True)
    one = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    other = tiny_model("llama", num_hidden_layers=4, seed=9)
    run_with_env(2, compare, str(student), str(one), str(other))


def with_experts(student: str, one: str, other: str) -> None:
    """The second teacher's experts are shared by two replicas, of which one has no row of it."""
    layout = ParallelConfig(data=2, expert=2)
    from megatron_tropd.mcore import parallel

    ranks = parallel.initialize(layout, seed=1)
    settings: Any = (layout, TRAIN, preset("gkd_jsd"))
    single = build_parts(student, other, *settings, ranks=ranks)
    first = build_parts(student, one, *settings, ranks=ranks)
    both = build_parts(student, _pair(one, other), *settings, ranks=ranks, routes=ONE_FOR_ALL)
    rest = [n for n in range(8) if n != 1]
    expected = _sum([_alone(first, rest, None), _alone(single, [1], None)])
    _same(_gradient(both, _sequences()), expected)


def test_experts_are_run_as_often_on_every_rank_that_shares_them(tiny_model: Any) -> None:
    student = tiny_model("llama", tie_word_embeddings=True)
    one = tiny_model("qwen3", num_hidden_layers=4, seed=5)
    other = tiny_model("qwen3_moe", num_hidden_layers=4, seed=5)
    run_with_env(2, with_experts, str(student), str(one), str(other))


def with_cache(student: str, one: str, other: str, out: str) -> None:
    """The second teacher is cached; the first is resident, and reduced to its most likely ids."""
    from megatron_tropd.distill.score import Scorer
    from megatron_tropd.mcore import parallel
    from megatron_tropd.teacher.cached.digest import num_scored
    from megatron_tropd.teacher.cached.files import (
        CacheHeader,
        shard_path,
        write_header,
        write_shard,
    )

    layout = ParallelConfig(tensor=2)
    ranks = parallel.initialize(layout, seed=1)
    settings: Any = (layout, TRAIN, preset("tropd", top_k=8))
    singles = [build_parts(student, t, *settings, ranks=ranks) for t in (one, other)]
    mine = [s for s in _sequences() if HALVES.of_prompt[s.key.prompt] == 1]
    columns = Scorer(singles[1].teacher, ranks, 16, torch.float32, 96).score(mine)
    if columns is not None:
        names = ("t", None, "k", singles[1].vocab_size, "float32", 16, "float32", "r", len(mine))
        Path(out).mkdir(exist_ok=True)
        write_header(Path(out), CacheHeader(*names, num_scored(mine), 1))
        write_shard(shard_path(Path(out), 0), mine, columns)
    torch.distributed.barrier()
    pair = _pair(one, other, placement="cached", cache=out, cache_top_k=16)
    both = build_parts(
        student, pair, *settings, ranks=ranks, routes=HALVES, recorded="rollouts.jsonl"
    )
    expected = [_alone(singles[t], [n for n in range(8) if n % 2 == t], None) for t in (0, 1)]
    found = _gradient(both, _sequences())
    _same(found, _sum(expected))
    assert found["of"]["reverse_kl"] is None, "the cached teacher has no whole distribution"
    assert TeacherConfig().placement == "resident"


def test_one_teacher_may_be_resident_and_the_other_cached(tmp_path: Path, tiny_model: Any) -> None:
    student = tiny_model("llama", tie_word_embeddings=True)
    one = tiny_model("qwen3", num_hidden_layers=4, seed=5)
    other = tiny_model("llama", num_hidden_layers=4, seed=9)
    run_with_env(2, with_cache, str(student), str(one), str(other), str(tmp_path / "cache"))
