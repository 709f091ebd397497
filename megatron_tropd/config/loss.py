"""Which loss, and every number it depends on. Standard library only, like ``config``.

The methods of docs/losses.md are values of this one class; ``presets`` names them.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.settings import (
    Amount,
    Between,
    Finite,
    Number,
    Range,
    Settings,
    Share,
    nearest,
)

Objective = Literal["policy_gradient", "forward_kl", "reverse_kl", "jsd", "local_support"]
Region = Literal["bernoulli", "expected", "exact", "threshold", "none"]
Outlier = Literal["forward_kl", "mask", "clip"]
Importance = Literal["none", "truncated", "band", "ppo"]
FloorRule = Literal["log(l)/(1-l)", "log(l/(1-l))"]

TopK = Annotated[int, Range(0, hint="0: everything.")]
JsdBeta = Annotated[float, Range(0, 1, "()", "Ask for forward_kl or reverse_kl by name.")]
_ORDER = "loss.importance_low <= 1 <= loss.importance_high must hold."
LowRho = Annotated[float, Range(0, 1, hint=_ORDER)]
HighRho = Annotated[float, Range(1, hint=_ORDER)]


@dataclass(frozen=True, kw_only=True)
class LossConfig(Settings, section="loss"):
    """Which loss (docs/losses.md). The defaults are TrOPD as published."""

    objective: Objective = "policy_gradient"
    """What a student token is trained by. policy_gradient: reward x log q of the sampled token
    (TrOPD, OPD, REOPOLD, TOP-D, ...). The others are divergences at every position: forward_kl,
    reverse_kl and jsd over the whole vocabulary, local_support the reverse KL renormalised on the
    teacher's top-k."""
    reward: Literal["log_ratio", "proximal"] = "log_ratio"
    """R of the policy gradient: log p/q, or log(a p/q + 1 - a) with a = proximal_alpha."""
    region: Region = "bernoulli"
    """Who decides that a token is trusted: the draw M ~ Bernoulli(m), m = min(p/q, 1); its mean
    (expected); its mean over all tokens in place of the sampled one (exact); the static test
    log p/q > tau, with floor >= (threshold); nobody (none: plain OPD)."""
    outlier: Outlier = "forward_kl"
    """What an untrusted token gets: forward KL, nothing, or the reward max(log p/q, tau)."""
    top_k: TopK = 64
    """Support of the forward KL and of local_support: the teacher's k most likely tokens.
    0: the whole vocabulary (forward KL only)."""
    tau: Finite | None = None
    """Floor of the log-ratio for region = threshold and outlier = clip. Unpublished: no default."""
    floor: Between | None = None
    """REOPOLD's l in (0, 1), from which tau follows by floor_rule. Instead of tau."""
    floor_rule: FloorRule = "log(l)/(1-l)"
    """How tau follows from floor; implementations disagree."""
    gradient: Literal["backprop", "score_function"] = "backprop"
    """score_function feeds forward KL and prefix terms as detached rewards of the sampled token,
    as the authors' code is said to do: for reproducing published numbers, not for training."""
    jsd_beta: JsdBeta = 0.5
    """Weight of the teacher in the mixture of jsd, strictly between 0 and 1."""
    proximal_alpha: Between = 0.1
    """Share of the teacher in the proximal teacher, in (0, 1)."""
    entropy_forward_kl: Amount | None = None
    """EOPD: add the forward KL on the top-k (teacher renormalised there) wherever the teacher's
    entropy exceeds this many nats. None: nowhere."""
    select: Literal["all", "student_entropy"] = "all"
    """Student tokens that are trained: all, or those with the largest student entropy of the
    global batch. Needs a forward pass of the student before the step."""
    select_share: Share = 0.2
    """Share that select = student_entropy keeps."""
    switch_step: Number | None = None
    """REOPOLD's second phase: from this step (0-based) on outliers are clipped instead of masked
    and select = student_entropy applies."""
    future: Literal["none", "mean"] = "none"
    """mean: add to each reward the mean reward of the later student tokens (TOP-D). Needs a
    forward pass of the student before the step."""
    group_normalise: bool = False
    """Standardise rewards over the student tokens of all samples of a prompt (TOP-D)."""
    importance: Importance = "none"
    """How rho = q(x) / (probability that sampled x) enters: not; min(rho, importance_high)
    (truncated); rho within [importance_low, importance_high] and no loss outside (band); PPO's
    clip to the same interval (ppo)."""
    importance_low: LowRho = 0.5
    """Lower end of the interval of rho (band, ppo)."""
    importance_high: HighRho = 2.0
    """Upper end of the interval of rho (truncated, band, ppo)."""
    teacher_tokens: Literal["nll", "same"] = "nll"
    """Loss of tokens the teacher wrote: -beta log q(x), or the objective's divergence (GKD)."""
    mask_first_ids: tuple[Number, ...] = ()
    """Ids whose first occurrence in a response carries no loss (special-token masking)."""
    mask_truncated: bool = False
    """Responses cut off at max_new_tokens carry no loss."""
    denominator: Literal["joint", "separate"] = "joint"
    """joint: every term over all loss tokens; separate: each segment over its own count."""

    def _check_together(self) -> None:
        self._check_tau()
        self._check_combination()

    def _check_tau(self) -> None:
        _require(
            self.tau is None or self.floor is None,
            "loss.tau and loss.floor both fix the floor of the log-ratio. Give one of them.",
        )
        _require(
            self.reward_floor is not None or not self.needs_tau,
            f"loss.region = {self.region!r} with loss.outlier = {self.outlier!r} needs loss.tau, "
            "a log-ratio in nats such as -2.5 (the paper does not publish its value), or "
            "loss.floor.",
        )

    def _check_combination(self) -> None:
        sampled = self.objective == "policy_gradient" and self.region != "exact"
        plain = sampled and self.region == "none"
        self._only(self.reward == "proximal", plain, "reward = 'proximal'", "region = 'none'")
        self._only(self.importance != "none", sampled, "importance", "a sampled token's loss")
        for name in ("future", "group_normalise"):
            on = getattr(self, name) not in ("none", False)
            self._only(on, plain, name, "policy_gradient with region = 'none'")
        self._only(
            self.gradient == "score_function" and self.region != "none",
            self.region in ("bernoulli", "threshold") and sampled,
            "gradient = 'score_function'",
            "region = 'bernoulli', 'threshold' or 'none'",
        )
        self._only(
            self.entropy_forward_kl is not None, plain, "entropy_forward_kl", "region = 'none'"
        )
        self._only(
            self.switch_step is not None,
            sampled and self.region == "threshold",
            "switch_step",
            "region = 'threshold'",
        )
        self._only(
            self.teacher_tokens == "same",
            self.objective != "policy_gradient",
            "teacher_tokens = 'same'",
            "a divergence as objective",
        )
        self._only(
            self.top_k == 0,
            self.objective != "local_support" and self.entropy_forward_kl is None,
            "top_k = 0",
            "the forward KL of outliers (the whole vocabulary of local_support is reverse_kl)",
        )

    def _only(self, asked: bool, possible: bool, what: str, where: str) -> None:
        _require(
            possible or not asked,
            f"loss.{what} goes with {where} only, found objective = {self.objective!r}, region = "
            f"{self.region!r}. Change one of them.",
        )

    @property
    def needs_tau(self) -> bool:
        """Whether the loss reads the floor of the log-ratio."""
        return self.objective == "policy_gradient" and (
            self.region == "threshold" or (self.region != "none" and self.outlier == "clip")
        )

    @property
    def reward_floor(self) -> float | None:
        """Floor of the log-ratio in nats: ``tau``, or what follows from ``floor``."""
        if self.floor is None:
            return self.tau
        if self.floor_rule == "log(l)/(1-l)":
            return math.log(self.floor) / (1 - self.floor)
        return math.log(self.floor / (1 - self.floor))

    @property
    def trusts_the_floor(self) -> bool:
        """Whether a log-ratio of exactly the floor is trusted.

        REOPOLD keeps R >= c, and its c comes from ``floor``; TrOPD's static test is log p/q > tau.
        """
        return self.floor is not None

    @property
    def uses_forward_kl(self) -> bool:
        """Whether a policy gradient's outliers get the forward KL."""
        return (
            self.objective == "policy_gradient"
            and self.region != "none"
            and self.outlier == "forward_kl"
        )

    @property
    def support(self) -> int:
        """Size of the teacher's top-k that the loss needs; 0: none."""
        wanted = (
            self.uses_forward_kl
            or self.objective == "local_support"
            or self.entropy_forward_kl is not None
        )
        return self.top_k if wanted else 0

    @property
    def needs_student_pass(self) -> bool:
        """Whether the student must be scored before the step (batch-wide selection or rewards)."""
        return (
            self.select != "all"
            or self.switch_step is not None
            or self.future != "none"
            or self.group_normalise
        )


_TOP_D: dict[str, Any] = dict(
    reward="proximal", region="none", importance="ppo", importance_low=0.8, importance_high=1.2
)

PRESETS: dict[str, dict[str, Any]] = {
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
    "proximal_teacher": {"region": "none", "reward": "proximal"},
    "top_d": {**_TOP_D, "future": "mean", "group_normalise": True},
    "gkd_forward_kl": {"objective": "forward_kl", "teacher_tokens": "same"},
    "gkd_reverse_kl": {"objective": "reverse_kl", "teacher_tokens": "same"},
    "gkd_jsd": {"objective": "jsd", "teacher_tokens": "same"},
    "minillm_single_step": {"objective": "reverse_kl"},
}
"""Name of a method -> settings that differ from the defaults (docs/losses.md has the sources)."""


def preset(name: str, **changes: Any) -> LossConfig:
    """The loss of a published method.

    Args:
        name: a key of ``PRESETS``.
        changes: fields of :class:`LossConfig` to set on top.

    Returns:
        The config.

    Raises:
        ConfigError: there is no such preset, or the fields do not fit together.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"Expected one of the methods {', '.join(PRESETS)}, found {name!r}."
            f"{nearest(name, PRESETS)}"
        )
    return LossConfig(**{**PRESETS[name], **changes})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
