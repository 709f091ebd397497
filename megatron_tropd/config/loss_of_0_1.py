"""The [loss] table of version 0.1, one table of 25 settings for every method, in today's form."""

import json
from typing import Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import floor_of, loss_defaults

DEFAULTS: dict[str, Any] = dict(
    objective="policy_gradient",
    reward="log_ratio",
    region="bernoulli",
    outlier="forward_kl",
    top_k=64,
    tau=None,
    floor=None,
    floor_rule="log(l)/(1-l)",
    gradient="backprop",
    jsd_beta=0.5,
    proximal_alpha=0.1,
    entropy_forward_kl=None,
    select="all",
    select_share=0.2,
    switch_step=None,
    future="none",
    group_normalise=False,
    importance="none",
    importance_low=0.5,
    importance_high=2.0,
    teacher_tokens="nll",
    mask_first_ids=(),
    mask_truncated=False,
    denominator="joint",
)
_SHARED = ("mask_first_ids", "mask_truncated", "denominator")
_SAMPLED = ("gradient", "importance", "importance_low", "importance_high")


def refuse_old_form(table: Any) -> None:
    """Raise ConfigError, with the table in today's form, if it is one of version 0.1."""
    if not isinstance(table, dict) or not table or "method" in table:
        return
    new = new_form(table)
    shown = "\n".join(f"    {name} = {json.dumps(value)}" for name, value in new.items())
    raise ConfigError(
        "[loss] has the form of version 0.1: today it names a method and has settings of that "
        f"method alone (docs/losses.md). Write the same loss as\n\n    [loss]\n{shown}\n"
    )


def new_form(table: dict[str, Any]) -> dict[str, Any]:
    """Say in today's settings what a table of version 0.1 says.

    Args:
        table: settings as TOML or JSON has them; what is missing has 0.1's default.

    Returns:
        ``method`` and the settings that differ from its defaults.

    Raises:
        ConfigError: a key is unknown, or no method does all that the table asks for.
    """
    if unknown := sorted(table.keys() - DEFAULTS.keys()):
        raise ConfigError(
            f"Unknown config key loss.{unknown[0]}, and loss.method is missing. Name a method and "
            "give its settings (docs/losses.md)."
        )
    old = DEFAULTS | table
    method, settings = _form_of(old)
    if old["select"] == "student_entropy" or method == "reopold":
        settings["entropy_share"] = old["select_share"]
    settings |= {name: old[name] for name in _SHARED}
    defaults = loss_defaults(method)
    changed = {
        key: value
        for key, value in settings.items()
        if value is not None and not _same(value, defaults.get(key))
    }
    return {"method": method, **changed}


def _same(value: Any, other: Any) -> bool:
    return value == other or (value in ([], ()) and other == ())


def _form_of(old: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(method, its settings)."""

    def take(*names: str) -> dict[str, Any]:
        return {name: old[name] for name in names}

    sampled = take(*_SAMPLED)
    clip = {"tau": _floor(old)} if old["outlier"] == "clip" else {}
    if old["objective"] != "policy_gradient":
        _no(old, "gradient", "score_function", "a divergence")
        if old["objective"] == "local_support":
            return "local_support", take("top_k", "teacher_tokens")
        jsd = take("jsd_beta") if old["objective"] == "jsd" else {}
        return "gkd", {"divergence": old["objective"]} | jsd | take("teacher_tokens")
    if old["region"] == "exact":
        return "tropd_exact", take("outlier", "top_k") | clip
    if old["region"] == "threshold":
        if old["switch_step"] is None:
            floor = take("floor_rule") if old["floor"] else {}
            return "static", take("outlier", "top_k", "tau", "floor") | floor | sampled
        if old["floor"] is None:
            raise ConfigError(
                "No method has loss.switch_step with loss.tau: REOPOLD's floor is loss.floor. "
                "Write a method of your own (docs/losses.md)."
            )
        names = ("outlier", "top_k", "floor", "floor_rule", "switch_step")
        return "reopold", take(*names) | sampled
    if old["region"] != "none":
        return "tropd", take("region", "outlier", "top_k") | clip | sampled
    if old["entropy_forward_kl"] is not None:
        for name, value in (("reward", "proximal"), ("future", "mean"), ("group_normalise", True)):
            _no(old, name, value, "entropy_forward_kl")
        return "eopd", take("entropy_forward_kl", "top_k") | sampled
    share = {"proximal_alpha": old["proximal_alpha"] if old["reward"] == "proximal" else 1.0}
    if old["future"] != "none" or old["group_normalise"]:
        return "top_d", share | take("future", "group_normalise") | sampled
    return "opd", share | sampled


def _floor(old: dict[str, Any]) -> float | None:
    return old["tau"] if old["floor"] is None else floor_of(old["floor"], old["floor_rule"])


def _no(old: dict[str, Any], name: str, value: Any, beside: str) -> None:
    if old[name] == value:
        raise ConfigError(
            f"No method has loss.{name} = {value!r} beside {beside} any more. Leave it out, or "
            "write a method of your own (docs/losses.md)."
        )
