"""Which settings of the loss go together, and what the published methods are."""

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import PRESETS, LossConfig, preset

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "local_support")
REGIONS = ("bernoulli", "expected", "exact", "threshold", "none")
SAMPLED = ("bernoulli", "expected", "threshold", "none")
# tau serves the regions and outliers that need one, and disturbs no other.
FLOOR = dict(tau=-2.5)


def _allowed(**settings):
    try:
        LossConfig(**FLOOR | settings)
    except ConfigError:
        return False
    return True


# Option -> the (objective, region) pairs it goes with.
RULES = {
    "reward": (dict(reward="proximal"), {("policy_gradient", "none")}),
    "future": (dict(future="mean"), {("policy_gradient", "none")}),
    "group_normalise": (dict(group_normalise=True), {("policy_gradient", "none")}),
    "entropy_forward_kl": (dict(entropy_forward_kl=0.8), {("policy_gradient", "none")}),
    "switch_step": (dict(switch_step=5), {("policy_gradient", "threshold")}),
    **{
        f"importance {name}": (
            dict(importance=name),
            {("policy_gradient", region) for region in SAMPLED},
        )
        for name in ("truncated", "band", "ppo")
    },
    "gradient": (
        dict(gradient="score_function"),
        # With region = "none" only teacher tokens are left to it, and every loss has those.
        {("policy_gradient", region) for region in ("bernoulli", "threshold", "none")}
        | {(objective, "none") for objective in DIVERGENCES},
    ),
    "teacher_tokens": (
        dict(teacher_tokens="same"),
        {(objective, region) for objective in DIVERGENCES for region in REGIONS},
    ),
    "top_k": (
        dict(top_k=0),
        {
            (objective, region)
            for objective in ("policy_gradient", "forward_kl", "reverse_kl", "jsd")
            for region in REGIONS
        },
    ),
    "nothing": (
        dict(),
        {("policy_gradient", region) for region in REGIONS}
        | {(objective, region) for objective in DIVERGENCES for region in REGIONS},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_an_option_goes_with(rule):
    option, allowed = RULES[rule]
    for pair in itertools.product(("policy_gradient", *DIVERGENCES), REGIONS):
        objective, region = pair
        found = _allowed(**option, objective=objective, region=region)
        assert found == (pair in allowed), (rule, pair)


def test_a_refusal_names_the_setting_and_what_was_found():
    with pytest.raises(ConfigError) as caught:
        LossConfig(reward="proximal", region="exact")
    for part in ("loss.reward = 'proximal'", "region = 'none'", "'policy_gradient'", "'exact'"):
        assert part in str(caught.value)


def test_entropy_forward_kl_needs_a_top_k():
    with pytest.raises(ConfigError, match="top_k = 0"):
        LossConfig(region="none", entropy_forward_kl=0.8, top_k=0)


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(region=region, outlier="clip") for region in ("bernoulli", "expected", "exact")),
        *(dict(region="threshold", outlier=outlier) for outlier in ("forward_kl", "mask", "clip")),
    ],
    ids=str,
)
def test_what_needs_a_floor(settings):
    with pytest.raises(ConfigError, match=r"needs loss\.tau.*or loss\.floor"):
        LossConfig(**settings)
    assert LossConfig(**settings, tau=-2.5).reward_floor == -2.5
    assert LossConfig(**settings, floor=0.2).reward_floor == math.log(0.2) / 0.8


@pytest.mark.parametrize(
    "settings",
    [
        dict(region="none", outlier="clip"),
        dict(objective="jsd", outlier="clip"),
        dict(objective="jsd", region="threshold"),
        dict(outlier="mask"),
    ],
    ids=str,
)
def test_what_needs_no_floor(settings):
    assert LossConfig(**settings).reward_floor is None


def test_floor_is_tau_or_follows_from_l():
    assert LossConfig(tau=-1.5).reward_floor == -1.5
    assert LossConfig(floor=0.2).reward_floor == pytest.approx(-2.0118, abs=1e-4)
    other = LossConfig(floor=0.2, floor_rule="log(l/(1-l))")
    assert other.reward_floor == pytest.approx(-1.3863, abs=1e-4)
    with pytest.raises(ConfigError, match=r"loss\.tau and loss\.floor both"):
        LossConfig(tau=-1.0, floor=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(top_k=-1), r"loss\.top_k must be at least 0"),
        *(
            (dict([(name, value)]), rf"loss\.{name} must be strictly between 0 and 1")
            for name in ("jsd_beta", "proximal_alpha", "floor")
            for value in (0.0, 1.0, -0.5, 1.5, math.nan)
        ),
        (dict(jsd_beta=0.0), "Ask for forward_kl or reverse_kl by name"),
        *((dict(select_share=value), r"loss\.select_share") for value in (0.0, 1.1, math.nan)),
        *(
            (dict([(f"importance_{name}", value)]), r"importance_low <= 1 <= loss\.importance_high")
            for name, value in (("low", -0.1), ("low", 1.1), ("high", 0.9), ("low", math.nan))
        ),
    ],
    ids=str,
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=0),
        dict(select_share=1.0),
        dict(importance_low=1.0, importance_high=1.0),
        dict(importance_low=0.0),
    ],
    ids=str,
)
def test_numbers_at_the_end_of_their_range(settings):
    LossConfig(**settings)


def test_support_is_what_the_loss_needs_of_the_top_k():
    for region, outlier in itertools.product(REGIONS, ("forward_kl", "mask", "clip")):
        config = LossConfig(region=region, outlier=outlier, top_k=8, **FLOOR)
        uses = region != "none" and outlier == "forward_kl"
        assert config.uses_forward_kl == uses and config.support == (8 if uses else 0)
    for objective in DIVERGENCES:
        config = LossConfig(objective=objective, top_k=8)
        assert not config.uses_forward_kl
        assert config.support == (8 if objective == "local_support" else 0)
    assert LossConfig(region="none", entropy_forward_kl=0.8, top_k=8).support == 8
    assert LossConfig(top_k=0).support == 0


def test_student_pass_is_needed_for_what_looks_at_the_whole_batch():
    assert not LossConfig().needs_student_pass
    for settings in (
        dict(select="student_entropy"),
        dict(region="threshold", switch_step=0),
        dict(region="none", future="mean"),
        dict(region="none", group_normalise=True),
    ):
        assert LossConfig(**FLOOR | settings).needs_student_pass, settings
    assert [name for name in PRESETS if preset(name).needs_student_pass] == [
        "entropy_opd",
        "reopold",
        "top_d",
    ]


def test_presets_are_the_published_methods():
    """What distinguishes each from the others, in the words of its paper."""
    assert preset("tropd") == LossConfig()
    assert (LossConfig().region, LossConfig().outlier, LossConfig().top_k) == (
        "bernoulli",
        "forward_kl",
        64,
    )
    assert preset("opd").region == "none" and preset("opd").support == 0
    eopd = preset("eopd")
    assert (eopd.entropy_forward_kl, eopd.support, eopd.importance) == (0.8, 16, "ppo")
    assert (eopd.importance_low, eopd.importance_high) == (0.8, 1.2)
    assert preset("local_support").support == 32
    assert preset("entropy_opd").select_share == 0.2
    reopold = preset("reopold")
    assert reopold.reward_floor == math.log(0.2) / 0.8 and reopold.outlier == "mask"
    top_d = preset("top_d")
    assert (top_d.reward, top_d.future, top_d.group_normalise) == ("proximal", "mean", True)
    assert (top_d.importance_low, top_d.importance_high) == (0.8, 1.2)
    assert preset("proximal_teacher").proximal_alpha == 0.1
    for name in ("gkd_forward_kl", "gkd_reverse_kl", "gkd_jsd"):
        assert preset(name).teacher_tokens == "same"
    assert preset("minillm_single_step").teacher_tokens == "nll"
    assert preset("tropd_exact_full").support == 0
    configs = [preset(name) for name in PRESETS]
    assert len(set(configs)) == len(configs)
    # REOPOLD's second phase is the same config with the outliers clipped.
    assert preset("reopold", outlier="clip").reward_floor == reopold.reward_floor


def test_a_preset_can_be_changed():
    assert preset("eopd", top_k=8, importance="none").support == 8
    with pytest.raises(ConfigError, match=r"Expected one of the methods tropd,.*found 'tropt'"):
        preset("tropt")
    with pytest.raises(ConfigError, match="teacher_tokens"):
        preset("tropd", teacher_tokens="same")
    with pytest.raises(TypeError):
        preset("tropd", topk=8)


def test_a_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossConfig().top_k = 3
    with pytest.raises(TypeError):
        LossConfig("policy_gradient")
    assert hash(LossConfig()) == hash(LossConfig())


def test_it_can_be_read_without_torch():
    code = (
        "import sys; import megatron_tropd.config.loss; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
