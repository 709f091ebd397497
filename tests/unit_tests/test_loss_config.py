"""The settings of each method, the presets, and the table of version 0.1."""

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
from loss_settings import FLAT, config_of

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.parts import part_names
from megatron_tropd.config.loss import PRESETS, preset
from megatron_tropd.config.loss_of_0_1 import new_form, refuse_old_form

METHODS = part_names("megatron_tropd.losses.methods")
SHARED = {"entropy_share", "merge_ids", "mask_first_ids", "mask_truncated", "denominator"}
SAMPLED = {"gradient", "importance", "importance_low", "importance_high"}
OWN = {
    "tropd": {"region", "outlier", "top_k", "tau"} | SAMPLED,
    "tropd_exact": {"outlier", "top_k", "tau"},
    "static": {"outlier", "top_k", "tau", "floor", "floor_rule"} | SAMPLED,
    "reopold": {"outlier", "top_k", "floor", "floor_rule", "switch_step"} | SAMPLED,
    "opd": {"proximal_alpha"} | SAMPLED,
    "eopd": {"entropy_forward_kl", "top_k"} | SAMPLED,
    "top_d": {"proximal_alpha", "future", "group_normalise"} | SAMPLED,
    "iw_opd": {"proximal_alpha", "gain"} | SAMPLED,
    "opsa": {"lowest_share", "advantage"} | SAMPLED,
    "veto": {"divergence", "student_power", "decay_steps", "teacher_tokens"},
    "power_opd": {"power"} | SAMPLED,
    "power_opd_exact": {"power"},
    "gkd": {"divergence", "jsd_beta", "teacher_tokens"},
    "local_support": {"top_k", "support", "renormalise", "teacher_tokens"},
    "exopd": {"over", "scale"} | SAMPLED,
    "delta": {"over"} | SAMPLED,
    "erpd": {"over", "region"} | SAMPLED,
    "erpd_teacher": {"scale"},
    "stable_opd": {"over", "reference_weight", "golden_weight"} | SAMPLED,
}
NEEDED = {
    "static": dict(tau=-2.5),
    "gkd": dict(divergence="jsd"),
    "veto": dict(divergence="forward_kl"),
}
"""What a method has no default for."""
OF_STAGES = {"erpd", "erpd_teacher"}
"""Methods without a preset: neither is a method of its own."""


def test_a_method_has_its_own_settings_only():
    assert OWN.keys() == set(METHODS) == {method for method, _ in PRESETS.values()} | OF_STAGES
    for name, own in OWN.items():
        fields = {f.name for f in dataclasses.fields(preset(name, **NEEDED.get(name, {})))}
        assert fields == own | SHARED, name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_its_name_and_what_it_needs(name):
    loss = preset(name, **NEEDED.get(name, {}))
    assert loss.method_name() == name
    assert not loss.needs.draws or loss.needs.sampled
    assert not (loss.needs.rollout_logprobs and not loss.needs.sampled)
    if name != "opsa":  # which chooses in another way
        assert dataclasses.replace(loss, entropy_share=0.5).needs_student_pass


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tropd", dict(outlier="clip"), r"needs loss\.tau"),
        ("tropd_exact", dict(outlier="clip"), r"needs loss\.tau"),
        ("tropd", dict(tau=-1.0), r"loss\.tau is read with loss\.outlier = 'clip' only"),
        ("static", dict(), r"needs loss\.tau.*or loss\.floor"),
        ("static", dict(tau=-1.0, floor=0.2), r"one of the two"),
        (
            "tropd",
            dict(region="expected", gradient="score_function"),
            r"loss\.gradient = 'score_function' goes with loss\.region = 'bernoulli' only",
        ),
        ("gkd_forward_kl", dict(jsd_beta=0.2), r"jsd_beta is read with divergence = 'jsd' only"),
        ("eopd", dict(top_k=0), r"loss\.top_k must be at least 1"),
        ("local_support", dict(top_k=0), r"loss\.top_k must be at least 1"),
        ("tropd", dict(top_k=-1), r"loss\.top_k must be at least 0"),
        *(
            (name, {key: value}, rf"loss\.{key} must be strictly between 0 and 1")
            for name, key in (("gkd_jsd", "jsd_beta"), ("reopold", "floor"))
            for value in (0.0, 1.0, -0.5, 1.5, math.nan)
        ),
        ("gkd_jsd", dict(jsd_beta=0.0), "Ask for forward_kl or reverse_kl by name"),
        *(("opd", dict(entropy_share=v), r"loss\.entropy_share") for v in (0.0, 1.1, math.nan)),
        *(("opd", dict(proximal_alpha=v), r"loss\.proximal_alpha") for v in (0.0, 1.1, math.nan)),
        *(
            ("opd", {f"importance_{end}": value}, r"importance_low <= 1 <= loss\.importance_high")
            for end, value in (("low", -0.1), ("low", 1.1), ("high", 0.9), ("low", math.nan))
        ),
        ("opsa", dict(entropy_share=0.5), r"chooses tokens by loss\.lowest_share"),
        ("opsa", dict(advantage=0.1), r"loss\.advantage must be"),
        ("veto_forward_kl", dict(student_power=1.1), r"loss\.student_power must be"),
        ("tropt", {}, r"must be one of the methods tropd, .*found 'tropt'.*Did you mean 'tropd'"),
        ("math:pi", {}, r"subclass of megatron_tropd\.losses\.method\.Method, found 3\.14"),
        ("nowhere:Toy", {}, r"loss\.method = 'nowhere:Toy' cannot be imported"),
    ],
    ids=str,
)
def test_what_a_method_refuses(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        preset(name, **settings)


def test_numbers_at_the_end_of_their_range():
    preset("tropd", top_k=0)
    preset("opd", entropy_share=1.0, importance_low=0.0)
    preset("opd", proximal_alpha=1.0, importance_low=1.0, importance_high=1.0)


def test_the_floor_is_tau_or_follows_from_l():
    assert preset("tropd_clip", tau=-1.5).reward_floor == -1.5
    assert preset("reopold").reward_floor == math.log(0.2) / 0.8
    assert preset("static", floor=0.2).reward_floor == pytest.approx(-2.0118, abs=1e-4)
    other = preset("reopold", floor_rule="log(l/(1-l))")
    assert other.reward_floor == pytest.approx(-1.3863, abs=1e-4)


def test_presets_are_the_published_methods():
    """What distinguishes each from the others, in the words of its paper."""
    tropd = preset("tropd")
    assert (tropd.region, tropd.outlier, tropd.top_k) == ("bernoulli", "forward_kl", 64)
    assert preset("opd").needs.top_k == 0 and preset("opd").proximal_alpha == 1
    eopd = preset("eopd")
    assert (eopd.entropy_forward_kl, eopd.needs.top_k, eopd.importance) == (0.8, 16, "ppo")
    assert (eopd.importance_low, eopd.importance_high) == (0.8, 1.2)
    assert preset("local_support").needs.top_k == 32
    assert preset("entropy_opd").entropy_share == 0.2
    reopold = preset("reopold")
    assert (reopold.outlier, reopold.switch_step, reopold.entropy_share) == ("mask", 100, 0.2)
    top_d = preset("top_d")
    assert (top_d.proximal_alpha, top_d.future, top_d.group_normalise) == (0.1, "mean", True)
    assert (top_d.importance_low, top_d.importance_high) == (0.8, 1.2)
    assert preset("proximal_teacher").proximal_alpha == 0.1
    for name in ("gkd_forward_kl", "gkd_reverse_kl", "gkd_jsd"):
        assert preset(name).teacher_tokens == "same"
    assert preset("minillm_single_step").teacher_tokens == "nll"
    assert preset("tropd_exact_full").needs.top_k == 0
    assert len({preset(name) for name in PRESETS}) == len(PRESETS)
    students = [name for name in PRESETS if preset(name).needs_student_pass]
    assert students == ["entropy_opd", "reopold", "top_d", "iw_opd", "opsa"]


def test_a_preset_can_be_changed():
    assert preset("eopd", top_k=8, importance="none").needs.top_k == 8
    with pytest.raises(TypeError):
        preset("tropd", topk=8)


def test_merged_ids_end_a_response_if_one_of_them_does():
    loss = preset("opd", merge_ids=(5, 7))
    assert loss.ends((7, 9)) == (5, 7, 9) and loss.ends((9,)) == (9,)
    assert preset("opd").ends((9, 7)) == (7, 9)


def test_settings_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tropd").top_k = 3
    with pytest.raises(TypeError):
        type(preset("tropd"))("bernoulli")
    assert hash(preset("tropd")) == hash(preset("tropd"))


# ---- version 0.1 ----


@pytest.mark.parametrize("name", [name for name in FLAT if "method" not in FLAT[name]])
def test_a_preset_of_0_1_is_the_preset_of_today(name):
    assert config_of(**FLAT[name]) == preset(name)
    assert new_form(FLAT[name])["method"] == PRESETS[name][0]


def test_an_old_table_keeps_its_meaning():
    clip = {"outlier": "clip", "tau": -1.0}
    assert new_form(clip) == {"method": "tropd", **clip}
    floor = new_form({"region": "exact", "outlier": "clip", "floor": 0.2})
    assert floor["tau"] == math.log(0.2) / 0.8
    kept = {"mask_first_ids": [5], "mask_truncated": True, "denominator": "separate"}
    assert new_form({"region": "none", **kept}) == {"method": "opd", **kept}
    assert new_form({"top_k": 64, "mask_first_ids": []}) == {"method": "tropd"}
    chosen = new_form({"region": "none", "select": "student_entropy", "select_share": 0.5})
    assert chosen == {"method": "opd", "entropy_share": 0.5}
    eopd = new_form({"region": "none", "entropy_forward_kl": 0.8})
    assert preset(eopd.pop("method"), **eopd).importance == "none" and eopd["top_k"] == 64


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (dict(regoin="exact"), r"Unknown config key loss\.regoin, and loss\.method is missing"),
        (dict(region="threshold", tau=-1.0, switch_step=3), r"No method has loss\.switch_step"),
        (
            dict(region="none", entropy_forward_kl=1.0, future="mean"),
            r"No method has loss\.future = 'mean' beside entropy_forward_kl",
        ),
        (
            dict(objective="jsd", region="none", gradient="score_function"),
            r"No method has loss\.gradient = 'score_function' beside a divergence",
        ),
    ],
    ids=str,
)
def test_what_no_method_does_any_more(table, message):
    with pytest.raises(ConfigError, match=message):
        new_form(table)


def test_an_old_table_is_refused_with_its_new_form():
    with pytest.raises(ConfigError) as caught:
        refuse_old_form({"region": "exact", "top_k": 8, "mask_truncated": True})
    shown = '    [loss]\n    method = "tropd_exact"\n    top_k = 8\n    mask_truncated = true\n'
    assert shown in str(caught.value)
    for good in (None, {}, {"method": "opd"}):
        refuse_old_form(good)


def test_every_sum_of_a_method_is_known():
    from megatron_tropd.losses.dense import SUMS

    for region, outlier in itertools.product(("bernoulli", "exact"), ("forward_kl", "mask")):
        assert set(config_of(region=region, outlier=outlier, top_k=0).needs.sums) <= set(SUMS)
    assert all(set(preset(name).needs.sums) <= set(SUMS) for name in PRESETS)


def test_every_method_can_be_read_without_torch():
    code = (
        "import sys\n"
        "from megatron_tropd.config.loss import PRESETS, preset\n"
        "for name in PRESETS: preset(name).needs\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
