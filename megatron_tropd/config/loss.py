"""What a run asks of its loss, and which loss a name means. Standard library only, like ``config``.

The methods themselves are files of ``losses/methods``; their settings are read without torch.
"""

import math
from abc import ABCMeta
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NamedTuple, Self

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.parts import load_part, part_names
from megatron_tropd.config.settings import Number, Settings, Share, nearest

_METHODS = "megatron_tropd.losses.methods"

Reward = Literal["trust", "trust_clip", "log_ratio", "mixture", "power"]
"""w_v: min(p,q) r | min(p,q) r + (q - min(p,q)) max(r, floor) | q r | q log((b p + (1-b) q) / q) |
q (p^a - q^a)."""
FloorRule = Literal["log(l)/(1-l)", "log(l/(1-l))"]


class Powers(NamedTuple):
    """A target: the distribution proportional to p^teacher p_ref^reference q^student, in which q
    has no gradient.
    """

    teacher: float = 1.0
    reference: float = 0.0
    student: float = 0.0


TEACHER = Powers()
"""The target of the losses that compare the student with the teacher itself."""


@dataclass(frozen=True)
class Needs:
    """What a method must be given: plain numbers and names, known before any tensor is."""

    top_k: int = 0
    """Size of the teacher's top-k; 0: none."""
    student_top_k: bool = False
    """Whether the top-k is the student's; needs the whole teacher."""
    sums: tuple[str, ...] = ()
    """Sums over the whole vocabulary that its value is made of (``losses.dense.SUMS``)."""
    reward: Reward | None = None
    """w of the gradient over the whole vocabulary, and of the sum "reward"."""
    reward_floor: float = 0.0
    """Floor of r in the reward trust_clip."""
    mix: float = 0.5
    """b of the reward mixture."""
    power: float = 1.0
    """a of the reward power."""
    teacher_gradient: bool = False
    """Whether the whole p takes part in the gradient."""
    sampled: bool = False
    """Whether student tokens must be samples of the student: their gradient is an estimate."""
    draws: bool = False
    """Whether ``LossTargets.uniforms_T`` is read."""
    rollout_logprobs: bool = False
    """Whether ``LossTargets.rollout_logprobs_T`` is read."""
    reference: bool = False
    """Whether log p_ref is read: that of the sampled token, or of all tokens by ``target``."""
    target: Powers = TEACHER
    """What sums, top-k and gradients compare the student with; k1, trust and the log-probs of the
    token stay the teacher's."""
    outcomes: bool = False
    """Whether ``LossTargets.rewards_T`` is how much better a sequence's outcome was than that of
    the prompt's other samples: graded, recorded rollouts have it."""
    golden: bool = False
    """Whether tokens of golden answers have a loss of their own (``LossTargets.is_golden_T``)."""
    outliers: bool = False
    """Whether the loss tells tokens outside of a trust region apart."""
    student_pass: bool = False
    """Whether rewards or choices of tokens depend on the whole batch (``Method.choose``)."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings, section="loss"):
    """The loss (docs/losses.md): ``method`` names it, and each method has settings of its own
    beside these five, which every method has. Without a [loss] table it is TrOPD as published.
    """

    entropy_share: Share | None = None
    """Train only this share of the student's tokens: those with the largest student entropy of the
    global batch. Needs a forward pass of the student before the step. None: train all."""
    mask_first_ids: tuple[Number, ...] = ()
    """Ids whose first occurrence in a response carries no loss (special-token masking)."""
    mask_truncated: bool = False
    """Responses cut off at max_new_tokens carry no loss."""
    merge_ids: tuple[Number, ...] = ()
    """Ids that are one event, such as <eos> and <end_of_turn> of two models that end differently:
    their probabilities are added up in both models before anything is compared (arXiv
    2609.20511). Needs the whole p. (): none."""
    denominator: Literal["joint", "separate"] = "joint"
    """joint: every term over all loss tokens; separate: each segment over its own count."""

    @classmethod
    def class_of(cls, table: dict[str, Any]) -> tuple[type[Settings], dict[str, Any]]:
        """The method that a table names, and its settings in the table or the preset."""
        if cls is not LossSettings:
            return cls, table
        if table and "method" not in table:
            raise ConfigError("loss.method is missing. Name a method (docs/losses.md).")
        settings = {key: value for key, value in table.items() if key != "method"}
        method, preset_values = _method(table.get("method", "tropd"))
        return method, preset_values | settings

    def _check_field(self, name: str, hint: Any) -> None:
        super()._check_field(name, hint)
        if name == "merge_ids" and self.merge_ids:
            distinct = len(set(self.merge_ids))
            if distinct < 2 or distinct < len(self.merge_ids):
                raise ConfigError(
                    "loss.merge_ids must name two or more ids, each once, found "
                    f"{list(self.merge_ids)}. Leave it out to merge none."
                )

    @classmethod
    def method_name(cls) -> str:
        """What ``[loss] method`` calls this class."""
        package, _, module = cls.__module__.rpartition(".")
        return module if package == _METHODS else f"{cls.__module__}:{cls.__qualname__}"

    @property
    def needs(self) -> Needs:
        """What the loss must be given; by itself a table of settings needs nothing."""
        return Needs()

    @property
    def needs_student_pass(self) -> bool:
        """Whether the student must be scored before the step."""
        return self.entropy_share is not None or self.needs.student_pass

    @property
    def trained_share(self) -> float | None:
        """Share of the student's tokens that :meth:`Method.choose` leaves; None: all."""
        return self.entropy_share

    def ends(self, stop_token_ids: Sequence[int]) -> tuple[int, ...]:
        """Ids that end a response: the given ones, and what is one event with one of them."""
        joined = set(self.merge_ids) if set(self.merge_ids) & set(stop_token_ids) else set()
        return tuple(sorted(joined.union(stop_token_ids)))

    def at_step(self, step: int) -> Self:
        """The loss of one step (0-based), for methods that change on the way."""
        return self


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tropd": ("tropd", {}),
    "tropd_expected": ("tropd", {"region": "expected"}),
    "tropd_exact": ("tropd_exact", {}),
    "tropd_exact_full": ("tropd_exact", {"top_k": 0}),
    "tropd_mask": ("tropd", {"outlier": "mask"}),
    "tropd_clip": ("tropd", {"outlier": "clip", "tau": -2.5}),
    "static_mask": ("static", {"outlier": "mask", "tau": -2.5}),
    "static_clip": ("static", {"outlier": "clip", "tau": -2.5}),
    "aopd": ("static", {"tau": 0.0}),
    "opd": ("opd", {}),
    "entropy_opd": ("opd", {"entropy_share": 0.2}),
    "reopold": ("reopold", {}),
    "eopd": ("eopd", {}),
    "local_support": ("local_support", {}),
    "trb": ("local_support", {"support": "student", "top_k": 16, "renormalise": False}),
    "proximal_teacher": ("opd", {"proximal_alpha": 0.1}),
    "top_d": ("top_d", {}),
    "iw_opd": ("iw_opd", {}),
    "opsa": ("opsa", {}),
    "veto_forward_kl": ("veto", {"divergence": "forward_kl"}),
    "veto_reverse_kl": ("veto", {"divergence": "reverse_kl"}),
    "power_opd": ("power_opd", {}),
    "power_opd_exact": ("power_opd_exact", {}),
    "gkd_forward_kl": ("gkd", {"divergence": "forward_kl"}),
    "gkd_reverse_kl": ("gkd", {"divergence": "reverse_kl"}),
    "gkd_jsd": ("gkd", {"divergence": "jsd"}),
    "exopd": ("exopd", {}),
    "exopd_exact": ("exopd", {"over": "vocabulary"}),
    "delta": ("delta", {}),
    "delta_exact": ("delta", {"over": "vocabulary"}),
    "stable_opd": ("stable_opd", {}),
    "stable_opd_exact": ("stable_opd", {"over": "vocabulary"}),
    "minillm_single_step": ("gkd", {"divergence": "reverse_kl", "teacher_tokens": "nll"}),
}
"""Published method -> its file in ``losses/methods`` and what differs from that file's defaults
(docs/losses.md has the sources)."""


def preset(name: str, **changes: Any) -> Any:
    """The loss of a method.

    Args:
        name: a key of ``PRESETS``, a file of ``losses/methods``, or "package.module:attribute".
        changes: settings of that method to set on top.

    Returns:
        The settings, an instance of the method's class.

    Raises:
        ConfigError: there is no such method, or the settings do not fit together.
    """
    method, values = _method(name)
    return method(**{**values, **changes})


def loss_name(loss: LossSettings) -> str:
    """The preset that a loss is, else its method."""
    return next((name for name in PRESETS if preset(name) == loss), loss.method_name())


def loss_defaults(name: str) -> dict[str, Any]:
    """Setting of a method -> its default; those without one are missing."""
    method, values = _method(name)
    given = {f.name: f.default for f in fields(method) if f.default is not MISSING}
    return {**given, **values}


def floor_of(share: float, rule: FloorRule) -> float:
    """REOPOLD's floor of the log-ratio, in nats, from l in (0, 1); implementations disagree."""
    if rule == "log(l)/(1-l)":
        return math.log(share) / (1 - share)
    return math.log(share / (1 - share))


def _method(name: object) -> tuple[type[LossSettings], dict[str, Any]]:
    known = [*PRESETS, *(part for part in part_names(_METHODS) if part not in PRESETS)]
    if not isinstance(name, str) or (":" not in name and name not in known):
        raise ConfigError(
            f"loss.method must be one of the methods {', '.join(known)}, or "
            f'"package.module:attribute" of your own, found {name!r}.{nearest(name, known)}'
        )
    module, values = PRESETS.get(name, (name, {}))
    found = load_part(_METHODS, module, attribute="METHOD", setting="loss.method")
    if not (isinstance(found, type) and issubclass(found, LossSettings)):
        raise ConfigError(
            f"loss.method = {name!r} must be a subclass of megatron_tropd.losses.method.Method, "
            f"found {found!r}. See docs/losses.md."
        )
    if isinstance(found, ABCMeta) and found.__abstractmethods__:
        missing = " and ".join(sorted(found.__abstractmethods__))
        raise ConfigError(
            f"loss.method = {name!r} must define {missing}, which every method does. See "
            "docs/extending.md."
        )
    return found, values
