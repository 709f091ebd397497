"""Settings check themselves: every field of every dataclass of settings, wherever it comes from."""

import ast
import dataclasses
import importlib
import math
import typing
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import preset
from megatron_tropd.config.settings import (
    Amount,
    Anything,
    Between,
    Count,
    Finite,
    Positive,
    Range,
    Settings,
    Share,
    check_value,
    hints_of,
)

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_tropd"
RECORDS = {"Failure", "Family", "LossParts", "Mixture", "PlannedRun", "Recompute", "Session"}
RECORDS |= {"StepParts", "Verdict"}
"""Made by the program alone, although their fields are given by name as those of settings are."""


def _classes(before: dict[str, bool]) -> dict[str, bool]:
    """module.Class of every dataclass that looks like settings -> whether it checks itself.

    Read from the source: keyword-only, called so, or with a field that is a choice of names.
    """
    found = dict(before)
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or node.name in RECORDS:
                continue
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            chosen = any("Literal[" in ast.unparse(part.annotation) for part in fields)
            named = node.name.endswith(("Config", "Settings"))
            bases = [ast.unparse(base) for base in node.bases]
            known = {name.rpartition(".")[2] for name, checked in found.items() if checked}
            if {"Settings", *known} & set(bases):
                found[f"{module}.{node.name}"] = True
            elif "frozen=True" in decorators and ("kw_only" in decorators or chosen or named):
                found[f"{module}.{node.name}"] = False
    return found


CLASSES: dict[str, bool] = {}
while (found := _classes(CLASSES)) != CLASSES:  # a class may stand before the one it is made of
    CLASSES = found


def _class(name: str) -> type:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


CHECKED = [name for name, checked in CLASSES.items() if checked]


def test_every_dataclass_of_settings_checks_itself():
    names = {name.rpartition(".")[2] for name in CLASSES}
    assert {"Config", "LossSettings", "TrainConfig", "Site", "Container", "Hardware"} <= names
    assert [name for name, checked in CLASSES.items() if not checked] == [
        "megatron_tropd.config.settings.Range"
    ]


def _parts(hint: Any) -> list[Any]:
    """An annotation taken apart: the types that its values are made of, ranges left on."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union, tuple, dict):
        return [p for a in args if a not in (type(None), Ellipsis, Any) for p in _parts(a)]
    return [hint]


@pytest.mark.parametrize("name", CHECKED, ids=lambda name: name.rpartition(".")[2])
def test_every_field_is_checked(name: str):
    """A number says its range; what is outside, no number, or no choice is refused by name."""
    cls = _class(name)
    assert issubclass(cls, Settings) and dataclasses.is_dataclass(cls)
    for field, hint in hints_of(cls).items():
        for part in _parts(hint):
            assert part not in (int, float), f"{name}.{field}: say where the number may lie"
            for wrong in _wrong(part):
                with pytest.raises(ConfigError, match=r"x\.y must be .*, found"):
                    check_value(part, wrong, "x.y")
        with pytest.raises(ConfigError, match=rf"{field}.* must be"):
            _check_alone(cls, field, object())


def _check_alone(cls: Any, field: str, value: object) -> None:
    """A check of one field of an instance without the others."""
    concrete: Any = type(cls.__name__, (cls,), {})
    concrete.__abstractmethods__ = frozenset()  # of what several settings share
    made = object.__new__(concrete)
    object.__setattr__(made, "name", "mine")  # Hardware's messages name it
    object.__setattr__(made, field, value)
    made._check_field(field, hints_of(cls)[field])


def _wrong(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        first = typing.get_args(hint)[0]
        return [None, "", f"{first}?", str(first).upper() + "X", 7]
    if typing.get_origin(hint) is not Annotated:
        return [object()]
    base, *ranges = typing.get_args(hint)
    wrong = [None, "1", True, math.nan, math.inf, -math.inf]
    wrong += [0.5] if base is int else []
    for given in ranges:
        wrong += [base(given.least) - 1] if given.least > -math.inf else []
        wrong += [base(given.most) + 1] if given.most < math.inf else []
        wrong += [given.least] if given.ends[0] == "(" else []
        wrong += [given.most] if given.ends[1] == ")" else []
    return wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(region="Exact"),
            r"loss\.region must be one of .*'Exact'\. Did you mean 'expected'",
        ),
        (dict(outlier="fkl"), r"loss\.outlier must .* found 'fkl'\. Did you mean 'forward_kl'\?"),
        (dict(gradient="score-function"), r"Did you mean 'score_function'\?"),
        (dict(importance=None), r"loss\.importance must be one of .* found None"),
        (dict(tau=math.nan), r"loss\.tau must be a number and finite, found nan"),
        (dict(tau="-2"), r"loss\.tau must be float, found '-2' \(str\)"),
        (dict(top_k=8.0), r"loss\.top_k must be int, found 8\.0"),
        (dict(importance_high=math.inf), r"importance_high must be at least 1 and finite"),
        (dict(mask_first_ids=[1]), r"mask_first_ids must be a tuple, found \[1\] \(list\)"),
        (dict(mask_first_ids=(-1,)), r"mask_first_ids must be at least 0, found -1"),
        (dict(mask_truncated=1), r"mask_truncated must be bool, found 1"),
    ],
    ids=str,
)
def test_a_loss_made_in_python_is_checked_as_one_of_a_file(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        preset("tropd", **settings)
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(preset("tropd"), **{name: value})


@pytest.mark.parametrize(
    ("hint", "good", "words"),
    [
        (Count, [1, 10**9], "at least 1"),
        (Anything, [-5, 0], "a number"),
        (Finite, [-1.5, 3], "a number"),
        (Amount, [0.0, 0, 2.5], "at least 0"),
        (Positive, [1e-30], "above 0"),
        (Share, [1.0, 0.1], "in (0, 1]"),
        (Between, [0.5], "strictly between 0 and 1"),
        (Annotated[float, Range(2, 3, "[)")], [2, 2.9], "in [2, 3)"),
    ],
    ids=str,
)
def test_ranges(hint: Any, good: list, words: str):
    for value in good:
        check_value(hint, value, "x")
    assert str(typing.get_args(hint)[1]) == words


@pytest.mark.parametrize("hint", [Anything, Count, Finite, float])
def test_a_number_too_large_for_a_float_is_refused(hint: Any):
    """TOML has whole numbers of any length."""
    with pytest.raises(ConfigError, match=r"^x must be .* and finite, found 1000"):
        check_value(hint, 10**400, "x")


def test_a_class_cannot_leave_the_checks_out():
    with pytest.raises(TypeError, match="write _check_together"):

        class Other(Settings):
            def __post_init__(self) -> None:
                pass
