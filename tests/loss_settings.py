"""The losses as the reference names them: one flat table of keywords, that of version 0.1."""

from typing import Any

from megatron_tropd.config.loss import loss_defaults, preset
from megatron_tropd.config.loss_of_0_1 import new_form

_TOP_D: dict[str, Any] = dict(
    reward="proximal", region="none", importance="ppo", importance_low=0.8, importance_high=1.2
)

FLAT: dict[str, dict[str, Any]] = {
    "tropd": {},
    "tropd_expected": {"region": "expected"},
    "tropd_exact": {"region": "exact"},
    "tropd_exact_full": {"region": "exact", "top_k": 0},
    "tropd_mask": {"outlier": "mask"},
    "tropd_clip": {"outlier": "clip", "tau": -2.5},
    "static_mask": {"region": "threshold", "outlier": "mask", "tau": -2.5},
    "static_clip": {"region": "threshold", "outlier": "clip", "tau": -2.5},
    "opd": {"region": "none"},
    "entropy_opd": {"region": "none", "select": "student_entropy"},
    "reopold": {"region": "threshold", "outlier": "mask", "floor": 0.2, "switch_step": 100},
    "eopd": {
        "region": "none",
        "entropy_forward_kl": 0.8,
        "top_k": 16,
        "importance": "ppo",
        "importance_low": 0.8,
        "importance_high": 1.2,
    },
    "local_support": {"objective": "local_support", "top_k": 32},
    "trb": {"method": "trb", "top_k": 16},
    "proximal_teacher": {"region": "none", "reward": "proximal"},
    "top_d": {**_TOP_D, "future": "mean", "group_normalise": True},
    "aopd": {"region": "threshold", "tau": 0.0},
    "iw_opd": {"method": "iw_opd"},
    "opsa": {"method": "opsa"},
    "veto_forward_kl": {"method": "veto", "divergence": "forward_kl"},
    "veto_reverse_kl": {"method": "veto", "divergence": "reverse_kl"},
    "power_opd": {"method": "power_opd"},
    "power_opd_exact": {"method": "power_opd_exact"},
    "gkd_forward_kl": {"objective": "forward_kl", "teacher_tokens": "same"},
    "gkd_reverse_kl": {"objective": "reverse_kl", "teacher_tokens": "same"},
    "gkd_jsd": {"objective": "jsd", "teacher_tokens": "same"},
    "minillm_single_step": {"objective": "reverse_kl"},
}
"""Published method -> what differs from 0.1's defaults; ``method``: one that 0.1 did not have."""


def config_of(**flat: Any) -> Any:
    """The loss that flat keywords describe; a method without a top-k is not told of one."""
    form = dict(flat) if "method" in flat else new_form(flat)
    name = form.pop("method")
    if "method" in flat and "top_k" not in loss_defaults(name):
        form.pop("top_k", None)
    return preset(name, **form)
