"""A teacher behind a real `vllm serve`: losses are the resident teacher's, under every layout."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.config import ParallelConfig, TeacherConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.losses import TopKSignal
from megatron_tropd.losses.signals import methods_for
from tests.distributed.test_cached_teacher import LAYOUTS, TRAIN, numbers
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts
from tests.vllm_serve import NAME, PAIR, vllm_serve

pytestmark = pytest.mark.slow

TOP_K = 16
TOLERANCE = 1e-5
"""Largest difference of a loss or a gradient norm, in parts of it: two engines round otherwise."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the arithmetic teacher."""
    log = tmp_path_factory.mktemp("vllm") / "serve.log"
    with vllm_serve(PAIR / "teacher", log) as (found, _):
        yield found


def compare(address: str, record: str) -> None:
    """Every layout of two ranks in one spawn."""
    import torch.distributed as dist

    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.mcore import platform
    from megatron_tropd.teacher.served import ServedTeacher, meet_servers

    dist.init_process_group(platform.distributed_backend())
    worst = 0.0
    for layout, sizes in (LAYOUTS | {"cp2": ParallelConfig(context=2)}).items():
        parts = build_parts(PAIR / "student", PAIR / "teacher", sizes, TRAIN, preset("opd"))
        servers = meet_servers(
            TeacherConfig(placement="served", address=(address,), served_model=NAME),
            HFFolder(PAIR / "teacher"),
            parts.layout,
            top_k=TOP_K,
            vocab_size=parts.vocab_size,
            longest=100,
            dtype=torch.float32,
            minutes=5.0,
            record=Path(record),
        )
        served = replace(parts, teacher=ServedTeacher(servers, parts.layout, top_k=TOP_K))
        methods = methods_for(TopKSignal) if layout == "tp2" else ["tropd", "entropy_opd"]
        for method in methods:
            resident, asked = numbers(parts, method, 0), numbers(served, method, 0)
            assert resident.keys() == asked.keys() and resident["grad_norm"] > 0
            for name, value in resident.items():
                assert asked[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE / 10), (
                    layout,
                    method,
                    name,
                )
                worst = max(worst, abs(asked[name] - value) / max(abs(value), 0.1))
        leave_layout()
    print(f"served and resident: {worst:.1e}")


def test_losses_and_gradients_are_those_of_the_resident_teacher(address: str, tmp_path: Path):
    record = tmp_path / "served_teacher.json"
    run_with_env(2, compare, address, str(record))
    assert record.exists()
