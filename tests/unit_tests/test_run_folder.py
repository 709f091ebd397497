"""A run folder: made once, continued by the same settings only, never half-written."""

import dataclasses
import datetime
import errno
import json
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from megatron_tropd.base import exits
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.failures import Failure, read, report
from megatron_tropd.base.files import write_json
from megatron_tropd.cli.distill import is_rank
from megatron_tropd.cli.main import main
from megatron_tropd.config import (
    Config,
    MegatronConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_tropd.config.run_folder import RunFolder, hold, open_run, wait_until_open, with_date
from megatron_tropd.report.records import read_run
from megatron_tropd.rollout.engines.wire import served_settings


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(
        model=ModelConfig(student="s", teacher="t"),
        rollout=RolloutConfig(prompts="p", max_new_tokens=8, chat_template_date="2026-01-31"),
        train=TrainConfig(steps=4),
        run=RunConfig(dir=str(tmp_path / "run")),
    )


def _with(config: Config, **rollout: Any) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **rollout))


def test_the_folder_keeps_the_resolved_settings(config):
    folder = open_run(config)
    assert folder.read_config() == config
    assert json.loads(folder.config.read_text())["train"]["steps"] == 4
    assert folder.read_summary() is None


def test_the_same_settings_continue_and_an_old_failure_goes(config):
    folder = open_run(config)
    assert report(folder.failure, Failure(kind="engine", message="broken"))
    folder.heartbeats.mkdir()
    open_run(config)
    assert read(folder.failure) is None
    assert not folder.heartbeats.exists()


def test_other_settings_are_refused_by_name(config):
    open_run(config)
    other = dataclasses.replace(config, train=TrainConfig(steps=5))
    with pytest.raises(ConfigError, match=r"train.steps: was 4, now 5.*another run.dir"):
        open_run(other)


def test_layout_and_bookkeeping_may_change(config):
    open_run(config)
    other = dataclasses.replace(
        config,
        parallel=ParallelConfig(tensor=2, pipeline=2),
        run=dataclasses.replace(config.run, keep_checkpoints=5),
    )
    assert open_run(other).read_config() == other


def test_the_way_weights_take_to_servers_may_change_too(config):
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, placement="separate")
    )
    open_run(config)
    other = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, weight_transport="folder")
    )
    assert open_run(other).read_config() == other
    assert served_settings(other) == served_settings(config)


class _Tomorrow(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2031, 5, 6)


def test_the_date_is_that_of_the_first_start(config, monkeypatch):
    undated = _with(config, chat_template_date=None)
    first = open_run(undated).read_config()
    assert first.rollout.chat_template_date == datetime.date.today().isoformat()
    monkeypatch.setattr(datetime, "date", _Tomorrow)
    assert with_date(undated) == open_run(undated).read_config() == first
    assert wait_until_open(undated, seconds=0).read_config() == first
    assert served_settings(undated) == served_settings(first)
    with pytest.raises(ConfigError, match=r"chat_template_date: was '20.*, now '2026-01-31'"):
        open_run(config)
    elsewhere = dataclasses.replace(undated, run=RunConfig(dir=config.run.dir + "2"))
    assert with_date(elsewhere).rollout.chat_template_date == "2031-05-06"


def test_a_run_of_a_version_without_a_setting_had_its_default(config):
    folder = open_run(config)
    old = json.loads(folder.config.read_text())
    new = ("chat_template_kwargs", "chat_template_date", "filter_overlong_prompts", "top_p")
    for name in new:
        del old["rollout"][name]
    write_json(folder.config, old)
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: was \{\}, now \{'a': 1\}"):
        open_run(_with(config, chat_template_kwargs={"a": 1}))
    assert open_run(_with(config, chat_template_date=None)).read_config().rollout.top_p == 1


def test_a_run_of_0_1_continues_if_its_loss_is_the_same(config):
    """One table of 25 settings stood there; it is compared in today's form."""
    folder = open_run(config)
    old = json.loads(folder.config.read_text())
    old["loss"] = dict(objective="policy_gradient", region="bernoulli", top_k=64, tau=None)
    write_json(folder.config, old)
    assert folder.read_config() == config
    open_run(config)
    assert json.loads(folder.config.read_text())["loss"]["method"] == "tropd"
    old["loss"] |= dict(region="none")
    write_json(folder.config, old)
    with pytest.raises(ConfigError, match=r"loss\.method: was 'opd', now 'tropd'"):
        open_run(config)


def test_a_setting_that_a_method_got_later_had_its_default(config):
    folder = open_run(config)
    old = json.loads(folder.config.read_text())
    del old["loss"]["importance"]
    write_json(folder.config, old)
    open_run(config)


def test_options_of_megatron_that_change_no_number_may_change(config):
    def given(**tables: dict[str, Any]) -> Config:
        return dataclasses.replace(config, megatron=MegatronConfig(**tables))

    full = {"recompute_granularity": "full", "recompute_method": "block"}
    folder = open_run(given(model=full | {"moe_router_dtype": "fp64"}))
    other = given(model={"moe_router_dtype": "fp64"}, ddp={"overlap_grad_reduce": True})
    assert open_run(other).read_config() == other
    with pytest.raises(ConfigError, match=r"megatron\.model\.moe_router_dtype: was 'fp64', now N"):
        open_run(given())
    with pytest.raises(ConfigError, match=r"megatron\.teacher\.moe_router_dtype: was None, now 'f"):
        open_run(given(model=other.megatron.model, teacher=other.megatron.model))
    old = json.loads(folder.config.read_text())
    del old["megatron"]
    write_json(folder.config, old)
    assert open_run(given(model=full)).read_config().megatron.model == full


def test_the_kind_of_optimizer_may_not(config):
    open_run(config)
    other = dataclasses.replace(config, parallel=ParallelConfig(distributed_optimizer=True))
    with pytest.raises(ConfigError, match=r"parallel.distributed_optimizer"):
        open_run(other)


def test_two_commands_do_not_share_a_folder(tmp_path):
    root = tmp_path / "run"
    with hold(root), pytest.raises(ConfigError, match="Another command is running"), hold(root):
        pass
    with hold(root):
        pass


@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_the_same_run_cannot_be_started_twice(tmp_path, tiny_llama, launcher, monkeypatch, capsys):
    """Nothing of the run that goes on is touched."""
    toml, root = tmp_path / "run.toml", tmp_path / "run"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    toml.write_text(f"""
        model = {{ student = "{tiny_llama}", teacher = "{tiny_llama}" }}
        rollout = {{ prompts = "prompts.jsonl", max_new_tokens = 8, prompts_per_step = 1 }}
        train = {{ steps = 1 }}
        run = {{ dir = "{root}" }}
    """)
    if launcher == "torchrun":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    with hold(root):
        assert main(["distill", str(toml)]) == exits.CONFIG
    assert "Another command is running" in capsys.readouterr().err
    assert [p.name for p in root.iterdir()] == [".lock"]


def test_a_job_that_starts_again_waits_for_the_lock_of_its_earlier_attempt(tmp_path):
    root = tmp_path / "run"
    first = ExitStack()
    first.enter_context(hold(root))
    Timer(0.3, first.close).start()
    with hold(root, patience=10):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold(tmp_path / "run"):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_the_folder_that_another_process_opens_is_waited_for(config):
    with pytest.raises(ConfigError, match="file system that all nodes share"):
        wait_until_open(config, seconds=0)
    folder = open_run(config)
    assert wait_until_open(config, seconds=0) == folder
    other = dataclasses.replace(config, train=TrainConfig(steps=5))
    with pytest.raises(ConfigError, match="the same settings"):
        wait_until_open(other, seconds=0)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        RunFolder(tmp_path).read_config()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model": ', "cannot be read as the settings of a run"),
        ("\x00" * 40, "cannot be read as the settings of a run"),
        ('{"model_type": "llama", "architectures": ["Llama"]}', "holds no settings of a"),
        ('{"model": 1, "rollout": 2, "run": 3}', "holds no settings of a run"),
        ("[]", "holds no settings of a run"),
    ],
    ids=["cut", "zeros", "model", "numbers", "list"],
)
def test_a_config_that_is_no_run_s_is_named(config, content: str, said: str, capsys):
    folder = RunFolder(Path(config.run.dir))
    folder.root.mkdir()
    folder.config.write_text(content)
    for command in (lambda: open_run(config), folder.read_config, lambda: read_run(folder.root)):
        with pytest.raises(ConfigError, match=f"{folder.config} {said}"):
            command()
    with_date(_with(config, chat_template_date=None))
    assert main(["report", str(folder.root)]) == exits.CONFIG
    assert sorted(folder.root.iterdir()) == [folder.config]


def test_a_dry_run_says_that_the_folder_holds_another_run(config, tmp_path, capsys):
    open_run(config)
    toml = tmp_path / "other.toml"
    toml.write_text(
        '[model]\nstudent="s"\nteacher="t"\n[rollout]\nprompts="p"\nmax_new_tokens=9\n[train]\n'
        f'steps=4\n[run]\ndir="{config.run.dir}"\n'
    )
    assert main(["distill", str(toml), "--dry-run"]) == exits.CONFIG
    assert "rollout.max_new_tokens: was 8, now 9" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_ranks_are_known_by_their_environment():
    assert is_rank({"RANK": "0", "WORLD_SIZE": "2"})
    assert not is_rank({"RANK": "0"}) and not is_rank({})
