"""A student of another kind is one class: trained and saved in part, merged for engines.

It stands for adapters, and nothing of the package is changed for it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from test_checkpoint import _checkpoints, _saved, _some_steps
from test_training import TRAIN

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.hf_folder import HFFolder
from tests.ranks import leave_layout, run_with_env

LAYOUTS = tuple(
    ParallelConfig(distributed_optimizer=True, **{axis: 2}) for axis in ("tensor", "data")
)
TRAINED = "layernorm.weight"


class Merged(Mapping):
    """Parameters as engines want them, each made when it is asked for."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = dict(module.named_parameters())
        self.made: list[str] = []

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __getitem__(self, name: str) -> torch.Tensor:
        self.made.append(name)
        return self._parameters[name] * (2 if name.endswith(TRAINED) else 1)


def _learner(folder: str, layout: ParallelConfig):
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.dense import DenseModel
    from megatron_tropd.mcore.student import Student
    from megatron_tropd.mcore.weights import export_weights

    class OnlyNorms(DenseModel):
        def trainable(self):
            named = super().trainable().items()
            return {name: parameter for name, parameter in named if name.endswith(TRAINED)}

        def state(self, metadata):
            return {n: part for n, part in super().state(metadata).items() if n.endswith(TRAINED)}

        def restore(self, state):
            missing = self.module.load_state_dict(state, strict=False)
            assert not missing.unexpected_keys

        def exported(self, receivers=(0,), **_):
            self.merged = Merged(self.module)
            width = self.module.vocab_size
            return export_weights(
                self.merged, source.config, self.layout,
                receivers=receivers, padded_vocab_size=width, bucket_bytes=1,
                dtype=torch.float32,  # else the first one is made to be asked for its own
            )  # fmt: skip

    ranks, source = parallel.initialize(layout, seed=1), HFFolder(Path(folder))
    built = models.build_model(
        source, layout=ranks, parallel=layout, dtype=torch.float32,
        padded_vocab_size=models.padded_vocab_size(source.config, tensor=layout.tensor),
    )  # fmt: skip
    model = OnlyNorms(built.chunks, source.config, ranks)
    return Student(model, train=TRAIN, parallel=layout, dtype=torch.float32), ranks


def _train_a_part(folder: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for number, layout in enumerate(LAYOUTS):
        learner, ranks = _learner(folder, layout)
        before = {n: p.detach().clone() for n, p in learner.module.named_parameters()}
        _some_steps(learner, ranks, 0, 2)
        changed = {n for n, p in learner.module.named_parameters() if not torch.equal(p, before[n])}
        assert changed == learner.model.trainable().keys() and changed
        with_gradient = {n for n, p in learner.module.named_parameters() if hasattr(p, "main_grad")}
        assert with_gradient == changed
        _check_saved(learner, ranks, layout, Path(out, str(number)))
        expected = _some_steps(learner, ranks, 2, 4)
        _check_exported(learner, ranks, HFFolder(Path(folder)))
        leave_layout()
        for reader in LAYOUTS:
            again, ranks = _learner(folder, reader)
            _checkpoints(Path(out, str(number)), ranks, reader).load(again, 2)
            found = _some_steps(again, ranks, 2, 4)
            assert found == (expected if reader == layout else pytest.approx(expected, rel=1e-4))
            leave_layout()


def _check_saved(learner, ranks, layout: ParallelConfig, folder: Path) -> None:
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    _saved(_checkpoints(folder, ranks, layout), learner, 2)
    weights = [n for n in load_sharded_metadata(str(folder / "step_000002")) if "weight" in n]
    assert weights and all("norm" in name for name in weights), weights


def _check_exported(learner, ranks, source: HFFolder) -> None:
    tensors = {name: t for name, t in learner.model.exported() if t is not None}
    assert sorted(learner.model.merged.made) == sorted(set(learner.model.merged.made))
    if ranks.is_main:
        assert tensors.keys() == source.names
        frozen = {name for name in source.names if "norm" not in name}
        assert all(torch.equal(tensors[name], source.read(name)) for name in frozen)
        name, ours = "model.norm.weight", learner.module.decoder.final_layernorm.weight
        assert torch.equal(tensors[name], 2 * ours)


def test_a_student_that_is_trained_in_part_needs_no_change_elsewhere(tmp_path, tiny_model) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    run_with_env(2, _train_a_part, str(model), str(tmp_path))
