"""What Megatron's loop learns of each micro-batch's loss: values for its log; its own checks."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.losses import Method
from megatron_tropd.losses.trouble import trouble, words

if TYPE_CHECKING:
    from megatron_tropd.distill.metrics import RowGroups

Report = dict[str, Tensor]
"""Name in Megatron's log -> [2] float32: sum over this rank's tokens and their number."""
_LOSS = "distillation loss"
_SPIKY = 10
"""A loss this many times the largest so far is spiky, as in Megatron's pretrain_gpt.py."""
_METRICS = ("tv", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")


class LossReport:
    """Checks and reports the loss of each micro-batch of a step."""

    def __init__(
        self,
        args: Namespace,
        config: Method,
        iteration: int,
        groups: "Sequence[RowGroups]" = (),
    ) -> None:
        """Take what is wanted from Megatron's arguments.

        Args:
            iteration: 0-based.
            groups: of the global batch's rows, if there are several teachers.
        """
        self._groups = groups
        self._iteration = iteration
        self._check_finite = args.check_for_nan_in_loss_and_grad
        self._check_spiky = getattr(args, "check_for_spiky_loss", False)
        self._shown = {"tropd loss": "loss", "lm loss": "student_logprob", "k1": "k1"}
        if config.needs.outliers:
            self._shown["outlier"] = "outlier"
        if args.tropd_metrics:
            self._shown |= {name.replace("_", " "): name for name in _METRICS}

    def __call__(self, values: dict[str, Tensor], _: Tensor, batch: MicroBatch) -> Report:
        """Make the sums that Megatron divides for its log, TensorBoard and W&B.

        Returns:
            ``tropd loss``, ``lm loss`` (-log q of the label), ``k1`` (log q - log p), the share of
            outliers for trust-region losses, and the metrics that were asked for. Of each of
            several teachers its share of the tokens, and their ``k1``.
        """
        self._check(values["loss"].sum(), partial(self._first_trouble, values, batch))
        values = values | {"student_logprob": -values["student_logprob"]}
        report = {
            shown: torch.stack([values[name].sum(), values[name].new_full((), len(values[name]))])
            for shown, name in self._shown.items()
        }
        return report | self._of_teachers(values["k1"], batch)

    def _of_teachers(self, k1_T: Tensor, batch: MicroBatch) -> Report:
        report: Report = {}
        for groups in self._groups:
            group_T = upload(torch.tensor(groups.of_row), k1_T.device)[batch.loss_rows]
            for number, name in enumerate(groups.names):
                is_its_T = (group_T == number).to(k1_T.dtype)
                count = is_its_T.sum()
                report[f"{name} share"] = torch.stack([count, k1_T.new_full((), len(k1_T))])
                report[f"{name} k1"] = torch.stack([(k1_T * is_its_T).sum(), count])
        return report

    def _check(self, loss: Tensor, what: Callable[[], str]) -> None:
        """Have Megatron check the loss, as its own ``loss_func`` does.

        --check-for-nan-in-loss-and-grad and --check-for-spiky-loss.
        """
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        def no_number(result: Tensor, found: Callable[[Tensor], Tensor]) -> bool:
            bad = bool(found(result))  # Megatron asks the same of what this returns
            if bad:
                # Its message names a test that is run again, and must be the same each time.
                print(f"tropd: the loss is not finite in {what()}", flush=True)
            return bad

        machine = get_rerun_state_machine()
        checks: list[tuple[Callable[[Tensor], Any], str, bool]] = []
        if self._check_finite:
            for found, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                checks.append((partial(no_number, found=found), f"found {name}", True))
        if self._check_spiky:
            spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKY, context=_LOSS)
            checks.append((spiky, "found a spike", False))
        for rejects, found_what, fatal in checks:
            machine.validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"{found_what} in the {_LOSS}",
                tolerance=0.0,
                fatal=fatal,
            )

    def _first_trouble(self, values: dict[str, Tensor], batch: MicroBatch) -> str:
        """Say which token is the first whose loss is no number, and whose fault that is."""
        found_T = trouble(values)
        bad = found_T.nonzero()
        if not len(bad):
            return "every token's loss is finite, their sum is not"
        first = int(bad[0])
        row, place = divmod(int(batch.loss_at[first]), batch.tokens.shape[1])
        key, label = batch.keys[row], int(batch.labels[row, place])
        position = int(batch.position_ids[row, place])
        return (
            f"iteration {self._iteration + 1}, row {row} of the micro-batch (prompt {key.prompt}, "
            f"sample {key.sample}), position {position}, which predicts token {label}: "
            f"{words(int(found_T[first]))}"
        )
