"""Every option of Megatron's that changes the batch or the loss is honoured or refused by name."""

import argparse
import inspect
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import preset
from megatron_tropd.integrations import megatron_lm, options, startup
from megatron_tropd.integrations.loss_report import LossReport
from megatron_tropd.integrations.printed_log import PrintedLog
from tests.ranks import run_in_process


def _installed() -> set[str]:
    return set(options.megatron_defaults())


def test_every_option_of_the_installed_megatron_was_looked_at() -> None:
    """After a change of the version: read what the new options do, then write them down."""
    new = _installed() - options.reviewed()
    assert not new, f"nobody looked at {sorted(new)}: megatron_options.txt or options.REFUSED"


def test_no_option_is_listed_twice_or_gone() -> None:
    listed = options.classes()
    assert list(listed) == ["honoured", "harmless", "older", "modelopt"]
    names = [name for some in listed.values() for name in some]
    refused = {refusal.name for refusal in options.REFUSED} | options._SEEN_OTHERWISE
    assert len(names) == len(set(names)) and not refused & set(names)
    assert listed["honoured"] | listed["harmless"] <= _installed()
    assert not listed["older"] & _installed(), "move them"
    beside = {refusal.name for refusal in options.BESIDE_TRAJECTORIES}
    assert beside <= listed["honoured"]


@pytest.mark.parametrize("refusal", options.REFUSED, ids=lambda refusal: refusal.name)
def test_refused_options_are_named(refusal) -> None:
    options.check_refused(Namespace())
    options.check_refused(Namespace(**{refusal.name: refusal.off}))
    for value in (2, "x"):
        with pytest.raises(ConfigError) as error:
            options.check_refused(Namespace(**{refusal.name: value}))
        assert f"does not go with {refusal}" in str(error.value)


@pytest.mark.parametrize("refusal", options.BESIDE_TRAJECTORIES, ids=lambda refusal: refusal.name)
def test_trajectories_leave_no_room_for_text(refusal) -> None:
    options.check_refused(Namespace(**{refusal.name: ["x"]}))
    options.check_refused(Namespace(tropd_trajectories="x", **{refusal.name: []}))
    with pytest.raises(ConfigError, match=f"--tropd-trajectories does not go with {refusal}"):
        options.check_refused(Namespace(tropd_trajectories="x", **{refusal.name: ["x"]}))


def test_trajectories_are_read_by_megatrons_loaders() -> None:
    with pytest.raises(ConfigError, match="--dataloader-type external"):
        options.check_refused(Namespace(tropd_trajectories="x", dataloader_type="external"))


def test_new_options_are_refused_until_accepted() -> None:
    defaults = {"rotate_labels": [0], "seq_length": [None], "two_defaults": [None, 1]}
    check = partial(options.check_unknown, defaults=defaults)
    check(Namespace(rotate_labels=0, seq_length=8, two_defaults=1), accepted=[])
    args = Namespace(rotate_labels=3, seq_length=8, two_defaults=2)
    with pytest.raises(ConfigError, match="--rotate-labels --two-defaults: options that this"):
        check(args, accepted=[])
    with pytest.raises(ConfigError, match=r"^--two-defaults: options"):
        check(args, accepted=["--rotate-labels"])
    check(args, accepted=["rotate-labels", "two_defaults"])


def test_plugin_asks_for_unknown_options_and_names_the_scripts_own(monkeypatch, capsys) -> None:
    """The script's own options act in its forward_step, which is not run."""
    monkeypatch.setattr(
        options, "megatron_defaults", lambda: {"seq_length": [None], "rotate_labels": [0]}
    )
    parser = argparse.ArgumentParser()
    parser.add_argument("--own-loss-scale", type=float, default=1.0)
    parser.add_argument("--own-other", type=float, default=1.0)
    megatron_lm.add_arguments(parser)
    command = ["--tropd-teacher-load", "x", "--own-loss-scale", "2"]
    args = parser.parse_args(command)
    args.rank, args.rotate_labels = 0, 0
    megatron_lm._check_unknown_options(args)
    assert "tropd: --own-loss-scale: the script's own." in capsys.readouterr().out
    args.tropd_accept_options = ["own-loss-scale"]
    megatron_lm._check_unknown_options(args)
    assert not capsys.readouterr().out
    args.rotate_labels = 1
    with pytest.raises(ConfigError, match="--rotate-labels: options that"):
        megatron_lm._check_unknown_options(args)


def test_plugin_has_the_trajectories_served_whatever_the_provider_knows(monkeypatch) -> None:
    import megatron.training

    recorded, seen = object(), []
    args = Namespace(tropd_teacher_load="x", tropd_trajectories="here")
    monkeypatch.setattr(megatron.training, "get_args", lambda: args)
    monkeypatch.setattr(megatron_lm, "recorded_trajectories", lambda args: recorded)
    monkeypatch.setattr(megatron_lm._Plugin, "check", lambda self, args: None)
    plugin = megatron_lm._Plugin(None, None)

    def text(num_samples: object) -> tuple[str, str, str]:
        return "text", "validation", "test"

    def build(provider) -> object:
        seen.append(provider)
        return provider([1, 1, 1])

    assert plugin.build_data(build, text) == (recorded, None, None)
    assert seen[0].is_distributed
    args.tropd_trajectories = None
    assert plugin.build_data(build, text) == ("text", "validation", "test")
    assert seen[1] is text


def test_plugin_refuses_trajectories_beside_samples_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(startup, "check_arguments", lambda args: None)
    plugin = megatron_lm._Plugin(None, lambda model, iteration: [])
    with pytest.raises(ConfigError, match="samples its data itself"):
        plugin.check(Namespace(tropd_teacher_load="x", tropd_trajectories="here"))


def test_a_teacher_without_distillation_is_refused(monkeypatch) -> None:
    """A script that took only add_arguments would train plainly."""
    import megatron.training
    from megatron.training import training

    schedule = training.get_forward_backward_func
    schedule = getattr(schedule, "unguarded", schedule)  # another test may have parsed a teacher
    monkeypatch.setattr(training, "get_forward_backward_func", schedule)
    parser = megatron_lm.add_arguments(argparse.ArgumentParser())
    plain = parser.parse_args([])
    assert training.get_forward_backward_func is schedule
    for _ in range(2):
        args = parser.parse_args(["--tropd-teacher-load", "x"])
    monkeypatch.setattr(megatron.training, "get_args", lambda: args)
    with pytest.raises(ConfigError, match="outside of megatron_lm"):
        training.get_forward_backward_func()
    plugin = megatron_lm._Plugin(training, None)
    assert plugin.replacements()["get_forward_backward_func"].args == (schedule,)
    monkeypatch.setattr(megatron.training, "get_args", lambda: plain)
    assert training.get_forward_backward_func(pp_size=1, vp_size=None) is schedule(1, None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"transformer_impl": "transformer_engine"}, "needs --transformer-impl local:"),
        ({"masked_softmax_fusion": True, "bf16": True}, "needs --no-masked-softmax-fusion:"),
        ({"window_size": (7, 0)}, "needs no --window-size:"),
    ],
)
def test_masks_are_refused_where_attention_does_not_read_them(settings, named) -> None:
    plain = {"transformer_impl": "local", "masked_softmax_fusion": True, "bf16": False}
    options.check_refused(Namespace(**plain, reset_attention_mask=True))
    options.check_refused(Namespace(**plain | settings))
    with pytest.raises(ConfigError, match=named):
        options.check_refused(Namespace(**plain | settings, reset_attention_mask=True))


def test_everything_that_is_replaced_is_asked_of_the_version() -> None:
    training = SimpleNamespace(**{name: print for name in startup.REPLACED})
    training.training_log = lambda loss_dict, total_loss_dict, skipped_iter: None
    plugin = megatron_lm._Plugin(training, None)
    assert set(plugin.replacements()) == set(startup.REPLACED)


def _train(values: list[dict[str, float]], interval: int, skipped: set[int]) -> list[str]:
    """Lines of a log that averages, prints and forgets as Megatron's does."""
    lines: list[str] = []
    total: dict[str, object] = {}

    def training_log(loss_dict, total_loss_dict, iteration, skipped_iter):
        key = "advanced iterations"
        total_loss_dict[key] = total_loss_dict.get(key, 0) + 1 - skipped_iter
        if not skipped_iter:
            for name, value in loss_dict.items():
                total_loss_dict[name] = total_loss_dict.get(name, torch.zeros(1)) + value
        if iteration % interval:
            return
        line = f" iteration {iteration} |"
        for name in list(total_loss_dict):
            if name != key:
                average = total_loss_dict[name].item() / max(1, total_loss_dict[key])
                line += f" {name}: {average:.6E} |" if average >= 0.0 else ""
                total_loss_dict[name] = torch.zeros(1)
        total_loss_dict[key] = 0
        log.print_rank_last(line + " loss scale: 1.0 |")
        log.print_rank_last("memory")

    log = PrintedLog(training_log, lines.append)
    for number, losses in enumerate(values, start=1):
        tensors = {name: torch.tensor(value) for name, value in losses.items()}
        log.training_log(tensors, total, number, skipped_iter=int(number in skipped))
    log.print_rank_last(" iteration of somebody else")
    return lines


def test_values_below_zero_are_printed() -> None:
    losses = [{"lm loss": 2.0, "k1": k1} for k1 in (-1.0, -2.0, 0.5, 9.0, -4.0, float("nan"))]
    lines = _train(losses, 2, skipped={4})
    averages = ("-1.500000E+00", "5.000000E-01", "NAN")
    assert lines[:6:2] == [
        f" iteration {2 * n} | lm loss: 2.000000E+00 | k1: {k1} | loss scale: 1.0 |"
        for n, k1 in enumerate(averages, start=1)
    ]
    assert lines[1] == "memory" and lines[-1] == " iteration of somebody else"


def test_printed_log_fits_the_installed_megatron() -> None:
    from megatron.training import training

    parameters = inspect.signature(training.training_log).parameters
    assert {"loss_dict", "total_loss_dict", "skipped_iter"} <= set(parameters)
    source = inspect.getsource(training.training_log)
    assert "'advanced iterations'" in source and "loss scale:" in source
    assert "print_rank_last(log_string)" in source


class _Machine:
    """Megatron's rerun machine, as far as a loss meets it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool]] = []

    def is_unexpectedly_large(self, result, threshold, context) -> bool:
        return result.abs().item() > 100 * threshold

    def validate_result(self, result, rejection_func, message, tolerance, fatal) -> None:
        if rejection_func(result):
            self.found.append((message, fatal))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-5.0, []),
        (-5000.0, [("found a spike in the distillation loss", False)]),
        (float("nan"), [("found NaN in the distillation loss", True)]),
    ],
)
def test_spiky_losses_are_looked_for(value, expected, monkeypatch) -> None:
    from megatron.core import rerun_state_machine

    machine = _Machine()
    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", lambda: machine)
    for asked in (True, False):
        machine.found.clear()
        args = SimpleNamespace(
            check_for_nan_in_loss_and_grad=asked, check_for_spiky_loss=asked, tropd_metrics=False
        )
        LossReport(args, preset("opd"), iteration=0)._check(torch.tensor(value), lambda: "row 1")
        assert machine.found == (expected if asked else [])


def _helpers_with_makefile(folder: str) -> None:
    from megatron.core.datasets import utils

    from megatron_tropd.mcore import platform

    wheel, own = utils.__file__, utils.compile_helpers
    utils.__file__ = f"{folder}/utils.py"
    platform.prepare_training()
    kept = utils.compile_helpers is own
    platform._training_prepared, utils.__file__ = False, wheel
    platform.prepare_training()
    assert kept and (utils.compile_helpers is not own) is not Path(wheel, "../Makefile").exists()


def test_helpers_are_compiled_where_there_is_a_makefile(tmp_path: Path) -> None:
    (tmp_path / "Makefile").touch()
    assert run_in_process(_helpers_with_makefile, str(tmp_path)) == 0
