"""run.deterministic: what it sets, where it goes, and what it refuses by name."""

import os

import pytest
import torch

from megatron_tropd.base import deterministic
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import Config, config_from_dict
from megatron_tropd.rollout.engines.process import engine_environment

SET = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "VLLM_BATCH_INVARIANT": "1",
}


def config(deterministic: bool = True, **megatron: dict[str, object]) -> Config:
    return config_from_dict(
        {
            "model": {"student": "s", "teacher": "t"},
            "rollout": {
                "prompts": "p", "max_new_tokens": 4, "prompts_per_step": 1, "samples_per_prompt": 1
            },
            "train": {"steps": 1},
            "run": {"dir": "r", "deterministic": deterministic},
            "megatron": megatron,
        }
    )  # fmt: skip


def test_what_cudas_libraries_read_is_set_only_if_asked_for():
    environment: dict[str, str] = {"NCCL_ALGO": " "}
    deterministic.set_environment(False, environment)
    assert environment == {"NCCL_ALGO": " "}
    deterministic.set_environment(True, environment)
    assert environment == SET


def test_megatrons_own_mode_accepts_what_is_set_and_refuses_what_we_refuse():
    determinism = pytest.importorskip("megatron.training.determinism")
    environment: dict[str, str] = {}
    deterministic.set_environment(True, environment)
    before = dict(environment)
    determinism.apply_determinism_env(environment)
    assert environment == before
    assert set(deterministic.ENVIRONMENT["NCCL_ALGO"]) == determinism.ACCEPTED_NCCL_ALGO_TOKENS
    for name, accepted in determinism.ACCEPTED_ENV_VAR_VALUES.items():
        assert set(deterministic.ENVIRONMENT[name]) == accepted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_ALGO", "Ring,Tree"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("VLLM_BATCH_INVARIANT", "0"),
    ],
)
def test_other_values_in_the_environment_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"run\.deterministic needs {name} = .*{value}.*Unset"):
        deterministic.set_environment(True, {name: value})
    deterministic.set_environment(False, {name: value})
    for right in deterministic.ENVIRONMENT[name]:
        deterministic.set_environment(True, {name: right})


@pytest.mark.parametrize("table", ["model", "teacher"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_token_dispatcher_type", "flex"),
        ("moe_enable_deepep", True),
        ("deterministic_mode", False),
    ],
)
def test_options_under_which_runs_differ_are_refused_by_name(table, option, value):
    options = {table: {option: value}}
    assert getattr(config(False, **options).megatron, table) == {option: value}
    with pytest.raises(ConfigError, match=rf"needs megatron\.{table}\.{option} = "):
        config(True, **options)


def test_engines_inherit_it_and_those_on_a_cpu_take_no_kernels_for_gpus():
    environment: dict[str, str] = {}
    deterministic.set_environment(True, environment)
    on_gpu = engine_environment(environment, threads=1, cuda_devices="0")
    on_cpu = engine_environment(environment, threads=1, cuda_devices=None)
    assert on_gpu.items() >= SET.items()
    assert SET.items() - on_cpu.items() == {("VLLM_BATCH_INVARIANT", "1")}


def test_the_installed_vllm_reads_the_switch(monkeypatch):
    envs = pytest.importorskip("vllm.envs")
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
        assert envs.environment_variables["VLLM_BATCH_INVARIANT"]() is expected


def test_torch_and_megatron_take_the_mode(monkeypatch):
    from megatron_tropd.mcore import platform

    try:
        platform.be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_rank_sets_it_before_it_trains(tmp_path, monkeypatch):
    """Under torchrun nobody else has."""
    from megatron_tropd.config.run_folder import RunFolder
    from megatron_tropd.distill import loop as train
    from megatron_tropd.launch import rank as worker

    for name in SET:
        monkeypatch.setenv(name, "")
    found: dict[str, str] = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(worker, "_redirect_output", lambda _: None)
    monkeypatch.setattr(worker, "StopFlag", lambda: type("Stop", (), {"signal": None})())
    monkeypatch.setattr(RunFolder, "read_config", lambda _: config())
    monkeypatch.setattr(train, "train", lambda *_, **__: found.update(os.environ))
    assert worker.run_rank(RunFolder(tmp_path)) == 0
    assert found.items() >= SET.items()
