"""Recorded trajectories as a dataset for Megatron's own training loop: format, checks, items.

The first line of a file is a header, every other line one trajectory (tools/rollouts.py)::

    {"format": "tropd-rollouts-1", "tokenizer": "<fingerprint>", "settings": {...}}
    {"prompt_index": 0, "sample_index": 0, "prompt_ids": [1, 5], "response_ids": [7, 8, 2],
     "segments": [["teacher", 1], ["student", 2]], "rollout_logprobs": [null, -0.7, -0.1],
     "finish_reason": "stop", "weights": "<hash>", "seed": 1}

``segments`` says who wrote the response, first token first. ``loss_weights``, one number per
response token, is optional. Shape suffixes: P = prompt, R = response, S = sequence length.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import lines_with_offsets, parse_json_line
from megatron_tropd.data.types import Trajectory
from megatron_tropd.losses.draws import keyed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "tropd-rollouts-1"
_LOGPROB_SLACK = 1e-3  # how far above 0 rounding may carry a log-prob


@dataclass(frozen=True)
class Recorded:
    """One trajectory as training needs it."""

    prompt_P: NDArray[np.int64]
    """[P] prompt ids."""
    response_R: NDArray[np.int64]
    """[R] ids after the prompt, whoever wrote them."""
    teacher_R: NDArray[np.bool_]
    """[R] true where the teacher wrote the token."""
    logprobs_R: NDArray[np.float32]
    """[R] log-prob under the policy that sampled, in nats; 0 where the teacher wrote."""
    weights_R: NDArray[np.float32]
    """[R] factor of the token's loss, 0 to leave it out."""
    sample_id: int
    """Key of the trajectory for random draws, the same in every layout."""


def recorded(trajectory: Trajectory) -> Recorded:
    """A trajectory of the trainer as a recorded one; every token after the prompt weighs 1.

    Args:
        trajectory: of a rollout.

    Returns:
        The same tokens.
    """
    prefix, total = len(trajectory.prefix_ids), len(trajectory.prefix_ids + trajectory.response_ids)
    logprobs_R = np.zeros(total, np.float32)
    logprobs_R[prefix:] = trajectory.rollout_logprobs
    return Recorded(
        prompt_P=np.array(trajectory.prompt_ids, np.int64),
        response_R=np.array(trajectory.prefix_ids + trajectory.response_ids, np.int64),
        teacher_R=np.arange(total) < prefix,
        logprobs_R=logprobs_R,
        weights_R=np.ones(total, np.float32),
        sample_id=keyed_seed(trajectory.prompt_index, trajectory.sample_index),
    )


def training_item(trajectory: Recorded, seq_length: int) -> dict[str, Tensor]:
    """A trajectory as one padded row; N tokens make N - 1 positions, cut at ``seq_length``.

    Args:
        trajectory: what to learn from.
        seq_length: S.

    Returns:
        ``tokens``, ``labels`` (the next token), ``position_ids`` [S] int64; ``loss_weights`` [S]
        float32, 0 where the label is a prompt token or padding; ``teacher_written`` [S] bool and
        ``rollout_logprobs`` [S] float32 of the label; ``response_positions`` [S] int64 index of the
        label after the prompt, 0 elsewhere; ``sample_id`` [] int64. Ids are 0 in padding.
    """
    whole_N = np.concatenate([trajectory.prompt_P, trajectory.response_R])
    stop = min(len(whole_N) - 1, seq_length)
    # The label at s is token s + 1, so the response starts one position early.
    start = len(trajectory.prompt_P) - 1
    kept = max(stop - start, 0)
    item = {
        "tokens": _row(whole_N[:stop], 0, seq_length),
        "labels": _row(whole_N[1 : stop + 1], 0, seq_length),
        "loss_weights": _row(trajectory.weights_R[:kept], start, seq_length),
        "teacher_written": _row(trajectory.teacher_R[:kept], start, seq_length),
        "rollout_logprobs": _row(trajectory.logprobs_R[:kept], start, seq_length),
        "response_positions": _row(np.arange(kept), start, seq_length),
    }
    item["position_ids"] = torch.arange(seq_length)
    item["sample_id"] = torch.tensor(trajectory.sample_id)
    return item


def _row(values: NDArray[Any], start: int, length: int) -> Tensor:
    row = np.zeros(length, values.dtype)
    row[start : start + len(values)] = values
    return torch.from_numpy(row)


class RecordedTrajectories(Dataset[dict[str, Tensor]]):
    """Recorded trajectories, one per item, in the order of the file or files.

    A map-style dataset for ``torch.utils.data`` and for Megatron's ``single`` and ``cyclic``
    loaders, whose samplers choose the order. Every line is checked when the dataset is made; only
    the places of the lines are kept, so a file may be larger than memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seq_length: int,
        vocab_size: int,
        longer: Literal["refuse", "truncate"] = "refuse",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> None:
        """Read the file once, checking every line.

        Args:
            path: JSON lines of tools/rollouts.py; or a folder of such files (``*.jsonl``), one for
                each round, read one after another in the order of their names.
            seq_length: S, positions of an item; a trajectory of N tokens needs N - 1.
            vocab_size: ids must be below it.
            longer: what becomes of longer trajectories; "truncate" cuts their end.
            tokenizer: the student's; given, it must be the one of the file.

        Raises:
            InputError: a file is missing, empty, no recorded trajectories, of another tokenizer,
                or a line is broken, does not fit the vocabulary or the sequence length; with the
                line number. The rounds of a folder are not in order.
        """
        self.path, self.seq_length = Path(path), seq_length
        self._vocab_size = vocab_size
        self._longer = longer
        self.num_truncated = 0
        """Trajectories longer than ``seq_length``, with ``longer="truncate"``."""
        self._files = sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else [self.path]
        self._file_of, self._offsets, self._lines = array("q"), array("q"), array("q")
        if not self._files:
            raise InputError(f"The folder {path} holds no *.jsonl. Write some: tools/rollouts.py.")
        headers = [self._index(number, tokenizer) for number in range(len(self._files))]
        _check_order(headers, self.path)

    def __len__(self) -> int:
        """Trajectories in all files."""
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item ``index``, as :func:`training_item` makes it.

        Raises:
            IndexError: there is no such item.
            InputError: its file changed since the dataset was made.
        """
        path = self._files[self._file_of[index]]
        # Opened each time: handles cannot be shared between the loader's worker processes.
        with path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        where = f"{path}, line {self._lines[index]}"
        trajectory = _recorded(parse_json_line(line, where), self._vocab_size, where)
        return training_item(trajectory, self.seq_length)

    def _index(
        self, number_of_file: int, tokenizer: "PreTrainedTokenizerBase | None"
    ) -> dict[str, Any]:
        """Check one file and remember where its trajectories are; its header."""
        path, before = self._files[number_of_file], len(self)
        header: dict[str, Any] = {}
        for number, offset, line in lines_with_offsets(path, "file of recorded trajectories"):
            where = f"{path}, line {number}"
            value = parse_json_line(line, where)
            if not header:
                _check_header(value, where, tokenizer)
                header = value
                continue
            self._check_length(_recorded(value, self._vocab_size, where), where)
            self._file_of.append(number_of_file)
            self._offsets.append(offset)
            self._lines.append(number)
        if len(self) == before:
            raise InputError(f"{path} holds no trajectory. Write some with tools/rollouts.py.")
        return header

    def _check_length(self, trajectory: Recorded, where: str) -> None:
        prompt, response = len(trajectory.prompt_P), len(trajectory.response_R)
        if prompt + response - 1 <= self.seq_length:
            return
        if self._longer == "refuse":
            raise InputError(
                f"{where}: {prompt} prompt and {response} response tokens need a sequence length "
                f"of {prompt + response - 1}, found {self.seq_length}. Raise it, or cut longer "
                'trajectories (longer="truncate").'
            )
        if prompt > self.seq_length:
            raise InputError(
                f"{where}: the prompt has {prompt} tokens, so that within {self.seq_length} "
                "positions nothing of the response is left. Raise the sequence length."
            )
        self.num_truncated += 1


def _check_header(
    header: Mapping[str, Any], where: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    if header.get("format") != FORMAT:
        raise InputError(
            f"{where}: expected a header with format {FORMAT!r}, found {header.get('format')!r}. "
            "Write the file with tools/rollouts.py."
        )
    if tokenizer is None:
        return
    from megatron_tropd.data.tokenizers import fingerprint

    if header.get("tokenizer") != fingerprint(tokenizer):
        raise InputError(
            f"{where}: expected the tokenizer {fingerprint(tokenizer)}, found "
            f"{header.get('tokenizer')}. Write the file with this student."
        )


def _check_order(headers: Sequence[Mapping[str, Any]], path: Path) -> None:
    rounds = [(header.get("settings") or {}).get("round") for header in headers]
    known = [number for number in rounds if number is not None]
    if known != sorted(set(known)):
        raise InputError(
            f"The files in {path} are, by name, of the rounds {known}; expected each round once, "
            "in order. Name them with leading zeros, such as round-007.jsonl."
        )


def _recorded(value: Mapping[str, Any], vocab_size: int, where: str) -> Recorded:
    prompt_P = _ids(value, "prompt_ids", vocab_size, where)
    response_R = _ids(value, "response_ids", vocab_size, where)
    teacher_R = _teacher_written(value.get("segments"), len(response_R), where)
    prompt, sample = value.get("prompt_index"), value.get("sample_index")
    if type(prompt) is not int or type(sample) is not int:
        raise InputError(
            f"{where}: prompt_index and sample_index must be integers, found {prompt!r} and "
            f"{sample!r}."
        )
    return Recorded(
        prompt_P=prompt_P,
        response_R=response_R,
        teacher_R=teacher_R,
        logprobs_R=_logprobs(value, teacher_R, where),
        weights_R=_weights(value, len(response_R), where),
        sample_id=keyed_seed(prompt, sample),
    )


def _ids(value: Mapping[str, Any], name: str, vocab_size: int, where: str) -> NDArray[np.int64]:
    ids = value.get(name)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise InputError(f"{where}: {name} must be a list of ids, not empty, found {ids!r:.60}.")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InputError(
            f"{where}: {name} must be in 0..{vocab_size - 1}, found {min(ids)}..{max(ids)}. The "
            "file belongs to another tokenizer or model."
        )
    return np.array(ids, np.int64)


def _teacher_written(segments: Any, length: int, where: str) -> NDArray[np.bool_]:
    try:
        teacher_R = np.repeat(
            [{"teacher": True, "student": False}[writer] for writer, _ in segments],
            [count for _, count in segments],
        )
    except (TypeError, ValueError, KeyError):
        raise InputError(
            f'{where}: segments must be a list like [["teacher", 3], ["student", 9]], found '
            f"{segments!r:.60}."
        ) from None
    if len(teacher_R) != length:
        raise InputError(
            f"{where}: segments cover {len(teacher_R)} tokens, the response has {length}."
        )
    return teacher_R


def _logprobs(
    value: Mapping[str, Any], teacher_R: NDArray[np.bool_], where: str
) -> NDArray[np.float32]:
    logprobs_R = _numbers(value.get("rollout_logprobs"), len(teacher_R), "rollout_logprobs", where)
    missing = ~teacher_R & ~np.isfinite(logprobs_R)
    if missing.any():
        raise InputError(
            f"{where}: rollout_logprobs must be finite where the student wrote the token, "
            f"missing for {missing.sum()} of {(~teacher_R).sum()}, the first at "
            f"{missing.argmax()}. Write the file with tools/rollouts.py."
        )
    logprobs_R[teacher_R] = 0.0
    if logprobs_R.max() > _LOGPROB_SLACK:
        raise InputError(
            f"{where}: rollout_logprobs are natural logarithms of probabilities, at most 0; found "
            f"{logprobs_R.max()}."
        )
    return logprobs_R


def _weights(value: Mapping[str, Any], length: int, where: str) -> NDArray[np.float32]:
    if "loss_weights" not in value:
        return np.ones(length, np.float32)
    weights_R = _numbers(value["loss_weights"], length, "loss_weights", where)
    if not (np.isfinite(weights_R) & (weights_R >= 0)).all():
        raise InputError(f"{where}: loss_weights must be finite and at least 0.")
    return weights_R


def _numbers(values: Any, length: int, name: str, where: str) -> NDArray[np.float32]:
    """[R] float32, nan for null."""
    good = isinstance(values, list) and all(
        value is None or type(value) in (int, float) for value in values
    )
    if not good:
        raise InputError(f"{where}: {name} must be a list of numbers, found {values!r:.60}.")
    if len(values) != length:
        raise InputError(
            f"{where}: expected one of {name} per response token, found {len(values)} for "
            f"{length} tokens."
        )
    return np.array(values, np.float32)
