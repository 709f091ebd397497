"""A teacher whose weights lie on the host scores bit for bit as one that stays on the device.

Without CUDA both are the host's memory; the copies, their order and the modules' parameters are
the same code. One spawn of four ranks.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from loss_settings import config_of
from test_training import recorded_trajectories

from megatron_tropd.config import ParallelConfig, TeacherConfig, TrainConfig
from megatron_tropd.config.loss import preset
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

TRAIN = TrainConfig(steps=1, lr=1e-3, tokens_per_micro_batch=64)
LAYERS = 4
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", {"num_hidden_layers": LAYERS, "seed": 5}),
    "tied": ("llama", {"num_hidden_layers": LAYERS, "seed": 5, "tie_word_embeddings": True}),
    "wider": ("llama", {"num_hidden_layers": LAYERS, "seed": 5, "vocab_size": 640}),
    "mixture": ("qwen3_moe", {"num_hidden_layers": LAYERS, "seed": 5}),
}
_TP2_SP_PP2 = ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)
_PP2_DP2 = ParallelConfig(pipeline=2, data=2)
_TP2_DP2 = ParallelConfig(tensor=2, data=2)
_TP2_SP_EP2 = ParallelConfig(tensor=2, data=2, expert=2, sequence_parallel=True)
CASES: dict[str, tuple[ParallelConfig, str, str, bool]] = {
    "tp2_sp_pp2": (_TP2_SP_PP2, "plain", "float32", False),
    "tp2_sp_pp2_wider": (_TP2_SP_PP2, "wider", "bfloat16", False),
    "pp2_dp2_tied": (_PP2_DP2, "tied", "bfloat16", False),
    "tp2_dp2_tied": (_TP2_DP2, "tied", "float32", False),
    "tp2_dp2_reference": (_TP2_DP2, "plain", "float32", True),
    "tp2_sp_ep2": (_TP2_SP_EP2, "mixture", "float32", False),
}
"""Layout, teacher, type, whether there is a reference."""
KINDS = ("none", "host", "host_by_layer")


def _all_cases(student: str, teachers: dict[str, str], out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {case: _compare(case, student, teachers) for case in CASES}
    found["failing"] = _fail_and_go_on(student, teachers["plain"])
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(parts))


def _parts(layout, student: str, teacher: str, kind: Any, dtype="float32", reference=None, **more):
    loss = config_of(region="none", outlier="clip") if reference is None else preset("exopd")
    source = TeacherConfig(offload=kind, reference=reference)
    return build_parts(
        student, teacher, layout, TRAIN, loss, dtype=dtype, source=source, pad_multiple=2, **more
    )


def _compare(case: str, student: str, teachers: dict[str, str]) -> dict[str, Any]:
    """The step's numbers by where the teacher's weights are, and what lay on the device."""
    from megatron_tropd.distill.step import learn
    from megatron_tropd.mcore import parallel

    layout, teacher, dtype, referenced = CASES[case]
    ranks = parallel.initialize(layout, seed=1)
    reference = student if referenced else None
    found = {}
    for kind in KINDS:
        parts = _parts(layout, student, teachers[teacher], kind, dtype, reference, ranks=ranks)
        watch = [_Watch(scorer.chunks[0]) for scorer in parts.teacher.scorers]
        metrics = learn(parts, recorded_trajectories(0), 0).metrics
        numbers = {name: repr(value) for name, value in metrics.items()}
        found[kind] = numbers, [one.counts() for one in watch]
    leave_layout()
    return {kind: found[kind] for kind in KINDS}


class _Watch:
    """Where the parameters of a model's layers are, whenever one runs and afterwards."""

    def __init__(self, model) -> None:
        self.model, self.most = model, 0
        self.layers = list(model.decoder.layers)
        self.at_rest = [self._place(layer) for layer in self.layers]
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda *_: self._look())

    @staticmethod
    def _place(layer) -> list[int]:
        return [parameter.data_ptr() for parameter in layer.parameters()]

    def _away(self) -> int:
        """Layers that are somewhere else than at rest."""
        return sum(self._place(x) != y for x, y in zip(self.layers, self.at_rest, strict=True))

    def _look(self) -> None:
        self.most = max(self.most, self._away())

    def counts(self) -> list[int]:
        """Layers of this stage; most at a time that visit; those that are left."""
        return [len(self.layers), self.most, self._away()]


def _fail_and_go_on(student: str, teacher: str) -> list[str]:
    """A layer fails in the first of two steps."""
    from megatron_tropd.distill.step import micro_batches
    from megatron_tropd.mcore import parallel

    layout = ParallelConfig(data=4)
    ranks = parallel.initialize(layout, seed=1)
    after = []
    for kind in KINDS:
        parts = _parts(layout, student, teacher, kind, ranks=ranks)
        batches = micro_batches(parts, recorded_trajectories(0), 0)
        (scorer,) = parts.teacher.scorers
        hook = scorer.chunks[0].decoder.layers[2].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            parts.teacher.signals(batches)
        hook.remove()
        after.append(repr([s.hidden_TH.double().sum().item() for s in scorer.score(batches)]))
    leave_layout()
    return after


def _fail(*_: Any) -> None:
    raise RuntimeError("in the middle")


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model) -> list[dict[str, Any]]:
    """Of every rank."""
    out = tmp_path_factory.mktemp("host") / "found.json"
    student = tiny_model("llama", tie_word_embeddings=True)
    teachers = {name: str(tiny_model(kind, **more)) for name, (kind, more) in TEACHERS.items()}
    run_with_env(4, _all_cases, str(student), teachers, str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_number_changes(case: str, found) -> None:
    for rank in found:
        expected, _ = rank[case]["none"]
        assert rank[case]["host"][0] == rank[case]["host_by_layer"][0] == expected


@pytest.mark.parametrize("case", CASES)
def test_layers_visit_together_or_two_at_a_time(case: str, found) -> None:
    most = {"none": lambda n: 0, "host": lambda n: n, "host_by_layer": lambda n: min(n, 2)}
    for rank in found:
        for kind in KINDS:
            for layers, visited, left in rank[case][kind][1]:
                assert (visited, left) == (most[kind](layers), 0), kind


def test_a_failure_in_the_middle_leaves_the_teacher_as_it_was(found) -> None:
    for rank in found:
        none, host, by_layer = rank["failing"]
        assert none == host == by_layer and float(none.strip("[]").split(",")[0])
