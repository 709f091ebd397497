"""Distillation in a script on Megatron's own training loop (examples/megatron_lm).

    parser gets add_arguments, pretrain gets distilling(forward_step), inside distillation()

The teacher's pass goes through Megatron's pipeline schedule, which cannot be entered from within a
``forward_step``: while the first stage would send the teacher's activations, the next already waits
for the student's. The one place where every stage of a pipeline stands at the same point, knows the
data iterator and has sent nothing yet is the call of the schedule, for training and evaluation
alike. So while :func:`distillation` is entered, the loop gets a schedule that first draws the
global batch, has the teacher score it, and then runs the student's schedule on the scored
micro-batches. Everything else of the loop is Megatron's.

T = loss tokens of a micro-batch, B = rows, S = sequence length, v = vocabulary shard, H = hidden.
"""

import math
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import PRESETS, preset
from megatron_tropd.integrations import options, startup
from megatron_tropd.integrations.global_batch import (
    BatchShare,
    broadcast_items,
    draw,
    own_share,
    whole_batch,
    whole_step,
)
from megatron_tropd.integrations.loop_student import Distilled, LoopStudent
from megatron_tropd.integrations.loss_report import LossReport
from megatron_tropd.integrations.printed_log import PrintedLog
from megatron_tropd.losses import Method
from megatron_tropd.teacher import TeacherSource

ForwardStep = Callable[..., tuple[Tensor, Callable[..., Any]]]
"""Megatron's ``forward_step_func``."""
Rollouts = Callable[[torch.nn.Module, int], Sequence[Mapping[str, Tensor]]]
"""(this stage's student, unwrapped; iteration, 0-based) -> the global batch, one item per sample
(``data.recorded.training_item``), the same list on every rank. Called on all ranks, between
steps; with --overlap-param-gather the student's weights are not complete then."""
_parser: ArgumentParser | None = None
"""The one that got the ``--tropd-*`` arguments last: the script's own options are in it."""


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the ``--tropd-*`` group: pass this as Megatron's ``extra_args_provider``.

    Returns:
        The same parser. Without any of the arguments a script trains as if it had not been called.
    """
    global _parser
    _parser = parser
    group = parser.add_argument_group("tropd", "distillation from a frozen teacher")
    add = group.add_argument
    add(
        "--tropd-teacher-load",
        metavar="FOLDER",
        action=_WithPerTokenLoss,
        help="the teacher: HF folder, Megatron checkpoint (torch_dist), or a TOML file that says "
        "where one or several teachers are (docs/megatron_lm.md); turns distillation on, and with "
        "it --calculate-per-token-loss",
    )
    add(
        "--tropd-teacher-hf-config",
        metavar="FOLDER",
        help="HF folder of the teacher's architecture, for a Megatron checkpoint without one",
    )
    add(
        "--tropd-teacher-cache",
        metavar="FOLDER",
        help="the teacher's scores of --tropd-trajectories (tropd score); no teacher is loaded",
    )
    add(
        "--tropd-teacher-address",
        metavar="URL",
        nargs="+",
        help="where `vllm serve` has the teacher (http://host:port); no teacher is loaded",
    )
    add(
        "--tropd-teacher-offload",
        choices=("host", "host_by_layer"),
        help="keep the teacher's layers in the host's memory while it does not score, as "
        "teacher.offload of a config (docs/planning.md)",
    )
    add(
        "--tropd-trajectories",
        metavar="FILE",
        help="recorded trajectories (`tropd rollouts`) to train on in place of --data-path",
    )
    add(
        "--tropd-accept-options",
        metavar="OPTION",
        nargs="+",
        help="options that megatron_tropd does not know and that change neither batch nor loss",
    )
    add("--tropd-method", help=f"the loss: {', '.join(PRESETS)}, ... (docs/losses.md)")
    _add_loss_settings(group)
    add(
        "--tropd-metrics",
        action="store_true",
        help="also log total variation, both divergences and both entropies",
    )
    return parser


def _add_loss_settings(group: Any) -> None:
    add = group.add_argument
    add("--tropd-top-k", type=int, help="support of the forward KL; 0: the whole vocabulary")
    add("--tropd-tau", type=float, help="floor of the log-ratio, in nats")
    add("--tropd-jsd-beta", type=float, help="weight of the teacher in the mixture of jsd")
    add("--tropd-importance", help="correction of stale samples: truncated, band or ppo")
    add(
        "--tropd-set",
        metavar="KEY=VALUE",
        nargs="+",
        help="settings of the method, as in [loss] of a config: top_k=8 importance=ppo",
    )
    add("--tropd-beta", type=float, help="weight of teacher-written tokens (default 0.001)")


class _WithPerTokenLoss(Action):
    """Stores the value; Megatron's schedules then divide by the tokens of the global batch."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.calculate_per_token_loss = True
        _expect_distillation()


_NOT_ENTERED = (
    "--tropd-teacher-load was given, but pretrain runs outside of megatron_lm.distillation(). Call "
    "it inside: with distillation(): pretrain(...)."
)


def _expect_distillation() -> None:
    """Have Megatron's loop refuse to start with a teacher unless :func:`distillation` is entered.

    A script that only parses the options would train plainly. Where Megatron's loop is not
    imported, as in a parser by itself, there is nothing to do.
    """
    training = sys.modules.get("megatron.training.training")
    original = getattr(training, "get_forward_backward_func", None)
    if original is None or isinstance(original, partial) or hasattr(original, "unguarded"):
        return

    @wraps(original)
    def refuse_or_get(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if getattr(get_args(), "tropd_teacher_load", None) is not None:
            raise ConfigError(_NOT_ENTERED)
        return original(*args, **kwargs)

    refuse_or_get.unguarded = original  # type: ignore[attr-defined]
    vars(training)["get_forward_backward_func"] = refuse_or_get


@contextmanager
def distillation(rollouts: Rollouts | None = None) -> Iterator[None]:
    """While entered, ``megatron.training.pretrain`` distils if ``--tropd-teacher-load`` was given.

    Without that argument nothing is changed. Enter it after Megatron has parsed its arguments
    where ``pretrain`` does not parse them itself: then they are checked here, before models are
    built.

    Args:
        rollouts: makes the training data of every step; Megatron's training data is then not read.

    Raises:
        ConfigError: unsupported version or arguments, or ones that do not fit the teacher.
        InputError: the teacher's folder cannot be used.
    """
    startup.check_version()
    from megatron.training import global_vars, training

    plugin = _Plugin(training, rollouts)
    if global_vars._GLOBAL_ARGS is not None:
        plugin.check(global_vars.get_args())
    replaced = plugin.replacements()
    originals = {name: getattr(training, name) for name in replaced}
    vars(training).update(replaced)
    try:
        yield
    finally:
        vars(training).update(originals)


def distilling(forward_step: ForwardStep) -> ForwardStep:
    """A ``forward_step_func`` for ``pretrain``.

    Args:
        forward_step: the script's own, used where no teacher was asked for.

    Returns:
        The function; while distilling it runs the student without its output layer and returns
        the hidden states and the loss function of ``distill.step``.
    """

    def step(data_iterator: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data_iterator, Distilled):
            return data_iterator.forward_step(model)
        from megatron.training import get_args

        if getattr(get_args(), "tropd_teacher_load", None) is not None:
            raise ConfigError(_NOT_ENTERED)
        return forward_step(data_iterator, model, *args, **kwargs)

    return step


class _Plugin:
    """What Megatron's loop gets in place of its own functions while distilling."""

    def __init__(self, training: Any, rollouts: Rollouts | None) -> None:
        """Replace nothing yet; ``training`` is ``megatron.training.training``."""
        self._training = training
        self._rollouts = rollouts
        self._checked: startup.Teachers | None = None
        self._config: Method = preset("tropd")
        self._teacher: TeacherSource | None = None
        self._layout: Any = None
        self._fresh: tuple[int, Sequence[Mapping[str, Tensor]]] | None = None
        self._recorded: Any = None

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """Name in ``megatron.training.training`` -> function, the same without a teacher."""
        training = self._training
        log = PrintedLog(training.training_log, training.print_rank_last)
        schedule = training.get_forward_backward_func
        return {
            "get_forward_backward_func": partial(
                self.get_forward_backward_func, getattr(schedule, "unguarded", schedule)
            ),
            "build_train_valid_test_data_iterators": partial(
                self.build_data, training.build_train_valid_test_data_iterators
            ),
            "training_log": partial(_if_distilling, log.training_log, training.training_log),
            "print_rank_last": log.print_rank_last,
        }

    def check(self, args: Namespace) -> None:
        """Check arguments and the teacher's folder, once."""
        if not hasattr(args, "tropd_teacher_load"):
            raise ConfigError(
                "Expected the --tropd-* arguments in Megatron's parser, found none. Give Megatron "
                "megatron_lm.add_arguments as extra_args_provider, and options on the command "
                "line, not in --yaml-cfg."
            )
        if args.tropd_teacher_load is None:
            startup.check_lone_arguments(args)
            return
        if self._checked is None:
            startup.check_arguments(args)
            if self._rollouts is not None:
                if args.tropd_trajectories is not None:
                    raise ConfigError(
                        "--tropd-trajectories was given to a script that samples its data itself "
                        "(distillation(rollouts)). Drop it."
                    )
                options.check_beside_rollouts(args)
            _check_unknown_options(args)
            self._config = startup.loss_config(args)
            self._checked = startup.teachers(args, _vocab_size())

    def build_data(self, original: Callable[..., Any], provider: Callable[..., Any]) -> Any:
        """Megatron's iterators of the script's datasets, or of ``--tropd-trajectories``."""
        from megatron.training import get_args

        args = get_args()
        self.check(args)
        if args.tropd_trajectories is None:
            return original(provider)

        def recorded_only(num_samples: Any) -> tuple[Any, None, None]:
            # Asked for once for each chunk of an interleaved pipeline.
            if self._recorded is None:
                self._recorded = recorded_trajectories(args)
            return self._recorded, None, None

        recorded_only.is_distributed = True  # type: ignore[attr-defined]
        return original(recorded_only)

    def get_forward_backward_func(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        """Megatron's schedule, preceded by the teacher's pass where there is a teacher."""
        from megatron.training import get_args

        schedule = original(*args, **kwargs)
        settings = get_args()
        self.check(settings)
        if settings.tropd_teacher_load is None:
            return schedule
        if self._teacher is None:
            from megatron_tropd.mcore.layout import current_layout

            assert self._checked is not None
            self._layout = current_layout(pad_multiple=self._checked.config.pad_multiple)
            self._teacher = _build_teacher(self._checked, settings, self._layout)
        return partial(self._distilled_schedule, schedule)

    def _distilled_schedule(
        self, schedule: Callable[..., Any], *, data_iterator: Any, model: Any, **settings: Any
    ) -> Any:
        from megatron.training import get_args

        from megatron_tropd.distill.metrics import RowGroups, groups_of
        from megatron_tropd.distill.step import forward_backward
        from megatron_tropd.distill.step_parts import LossParts

        args = get_args()
        assert self._teacher is not None and self._checked is not None
        share, layout = self._share(args, settings), self._layout
        student = LoopStudent(schedule, model, settings)
        if self._rollouts is None or settings.get("forward_only", False):
            several = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            iterator = next((one for one in several if one is not None), None)
            batches = draw(iterator, share)
        else:
            items = self._fresh_items(student.module, args.curr_iteration)
            batches = broadcast_items(own_share(items, share), share)
        routes = self._checked.routes
        groups: list[RowGroups] = []
        if self._checked.deals_rows:
            sequences = whole_step(batches, layout)
            self._checked.check_prompts(sequences)
            self._teacher.begin(share.step, sequences)
            groups = groups_of(routes, None, sequences)
        parts = LossParts(
            student=student,
            teacher=self._teacher,
            loss=self._config,
            beta=0.001 if args.tropd_beta is None else args.tropd_beta,
            vocab_size=_vocab_size(),
            layout=layout,
            routes=routes,
            tokens_per_micro_batch=math.prod(share.shape),
            metrics=args.tropd_metrics,
        )
        loss = self._config.at_step(share.step)
        counts, prompts = whole_batch(batches, loss, layout.dp_group, share.device)
        batches = [layout.local(batch).to(share.device) for batch in batches]
        record = LossReport(args, self._config, share.step, groups)
        return forward_backward(parts, batches, counts, share.step, record=record, prompts=prompts)

    def _share(self, args: Namespace, settings: Mapping[str, Any]) -> BatchShare:
        from megatron_tropd.mcore import platform

        return BatchShare(
            count=settings["num_microbatches"],
            shape=(settings["micro_batch_size"], settings["seq_length"]),
            # Only training counts them; --skip-train evaluates at the one that was loaded.
            step=getattr(args, "curr_iteration", args.iteration),
            seed=args.seed,
            masked=bool(getattr(args, "reset_attention_mask", False)),
            must_be_sampled=self._config.needs.sampled,
            group=self._layout.tp_group,
            device=platform.device(),
            dp_rank=self._layout.dp_rank,
            dp_size=self._layout.dp_size,
        )

    def _fresh_items(
        self, model: torch.nn.Module, iteration: int
    ) -> Sequence[Mapping[str, Tensor]]:
        """The items of an iteration; a repeated one (Megatron's reruns) gets the same again."""
        assert self._rollouts is not None
        if self._fresh is None or self._fresh[0] != iteration:
            self._fresh = iteration, self._rollouts(model, iteration)
        return self._fresh[1]


def recorded_trajectories(args: Namespace) -> Any:
    """The dataset of ``--tropd-trajectories``, which stands in place of the script's datasets.

    Returns:
        A map-style dataset of :data:`~megatron_tropd.integrations.global_batch.TRAJECTORY` items.

    Raises:
        InputError: the file does not fit the sequence length, vocabulary or tokenizer.
    """
    from megatron_tropd.data.recorded import RecordedTrajectories

    dataset = RecordedTrajectories(
        args.tropd_trajectories,
        seq_length=args.seq_length,
        vocab_size=_vocab_size(),
        tokenizer=startup.student_tokenizer(args),
    )
    if args.rank == 0:
        print(
            f"tropd: training on the {len(dataset)} trajectories of {args.tropd_trajectories}; "
            "nothing to validate on",
            flush=True,
        )
    return dataset


def _build_teacher(checked: startup.Teachers, args: Namespace, layout: Any) -> TeacherSource:
    """Make the source that a run of ``tropd distill`` has of the same settings; collective."""
    from megatron_tropd.distill.pair import build_teacher
    from megatron_tropd.mcore import platform

    # Megatron's random states belong to the student.
    with torch.random.fork_rng([torch.cuda.current_device()] if platform.has_cuda() else []):
        return build_teacher(
            checked.config,
            checked.folders,
            layout,
            checked.routes,
            dtype=args.params_dtype,
            padded_vocab_size=args.padded_vocab_size,
            vocab_size=_vocab_size(),
            longest=checked.longest,
        )


def _if_distilling(
    ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    from megatron.training import get_args

    function = theirs if get_args().tropd_teacher_load is None else ours
    return function(*args, **kwargs)


def _check_unknown_options(args: Namespace) -> None:
    """Refuse options of Megatron's that nobody has looked at; name those of the script."""
    defaults = options.megatron_defaults()
    options.check_unknown(args, defaults, args.tropd_accept_options or [])
    if _parser is None or args.rank != 0:
        return
    accepted = options.named(args.tropd_accept_options or [])
    if own := options.of_the_script(args, _parser, defaults.keys() | accepted):
        print(
            f"tropd: {' '.join(own)}: the script's own. While distilling, its forward_step and "
            "loss are not run; what the options do there is not done.",
            flush=True,
        )


def _vocab_size() -> int:
    """Ids of the student's tokenizer; the rows above them are padding in both models."""
    from megatron.training import get_tokenizer

    return int(get_tokenizer().vocab_size)
