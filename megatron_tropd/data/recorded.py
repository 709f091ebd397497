"""Recorded trajectories as a dataset for Megatron's own training loop: checks and items.

The form of the files is that of :mod:`megatron_tropd.data.sequence_files`; their header names the
tokenizer's fingerprint and the settings, too (`tropd rollouts`). S = sequence length.
"""

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import lines_with_offsets, parse_json_line, read_json_lines
from megatron_tropd.data.batch import row_of
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.data.sequence_files import Reader, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGPROB_SLACK = 1e-3  # how far above 0 rounding may carry a log-prob


def training_item(sequence: TokenSequence, seq_length: int) -> dict[str, Tensor]:
    """Make a row of a micro-batch for a data loader, cut at ``seq_length``.

    Args:
        seq_length: S.

    Returns:
        ``tokens``, ``labels``, ``writers``, ``position_ids``, ``response_positions``, ``weights``,
        ``engine_logprobs`` and ``behaviour_logprobs`` [S], each a row of what
        :class:`~megatron_tropd.data.batch.MicroBatch` says of it; and ``sample_key`` [3] int64.
    """
    row = row_of(sequence, seq_length)
    item = {name: torch.from_numpy(column) for name, column in row.items()}
    return item | {"sample_key": torch.tensor(sequence.key)}


def read_recorded(
    path: str | Path, *, vocab_size: int, tokenizer: "PreTrainedTokenizerBase"
) -> list[TokenSequence]:
    """Read recorded trajectories whole, checking every line.

    Args:
        path: JSON lines of `tropd rollouts`, or a folder of such files, one for each round.
        tokenizer: the student's, which must be that of the files.

    Raises:
        InputError: as :class:`RecordedTrajectories`.
    """
    found: list[TokenSequence] = []
    headers: list[Mapping[str, Any]] = []
    for file in _files_of(path):
        read: Reader | None = None
        for number, record in read_json_lines(file, "file of recorded trajectories"):
            where = f"{file}, line {number}"
            if read is None:
                read = reader_of(record, where)
                _check_tokenizer(record, where, tokenizer)
                headers.append(record)
                continue
            found.append(read(record, where))
            _check_values(found[-1], vocab_size, where)
    if not found:
        raise InputError(f"{path} holds no trajectory. Write some with `tropd rollouts`.")
    _check_order(headers, Path(path))
    return found


def _files_of(path: str | Path) -> list[Path]:
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"The folder {path} holds no *.jsonl. Write some: `tropd rollouts`.")
    return files


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
            path: JSON lines of `tropd rollouts`; or a folder of such files (``*.jsonl``), one for
                each round, read one after another in the order of their names.
            seq_length: S, positions of an item; a trajectory of N tokens needs N - 1.
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
        self._files = _files_of(path)
        self._readers: list[Reader] = []
        self._file_of, self._offsets, self._lines = array("q"), array("q"), array("q")
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
        read = self._readers[self._file_of[index]]
        return training_item(self._read(read, parse_json_line(line, where), where), self.seq_length)

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
                self._readers.append(reader_of(value, where))
                _check_tokenizer(value, where, tokenizer)
                header = value
                continue
            read = self._readers[number_of_file]
            self._check_length(self._read(read, value, where), where)
            self._file_of.append(number_of_file)
            self._offsets.append(offset)
            self._lines.append(number)
        if len(self) == before:
            raise InputError(f"{path} holds no trajectory. Write some with `tropd rollouts`.")
        return header

    def _read(self, read: Reader, record: Mapping[str, Any], where: str) -> TokenSequence:
        sequence = read(record, where)
        _check_values(sequence, self._vocab_size, where)
        return sequence

    def _check_length(self, sequence: TokenSequence, where: str) -> None:
        prompt = sequence.prompt_length
        response = len(sequence) - prompt
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


def _check_tokenizer(
    header: Mapping[str, Any], where: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
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


def _check_values(sequence: TokenSequence, vocab_size: int, where: str) -> None:
    low, high = sequence.ids_N.min(), sequence.ids_N.max()
    if not 0 <= low <= high < vocab_size:
        raise InputError(
            f"{where}: ids must be in 0..{vocab_size - 1}, found {low}..{high}. The file belongs "
            "to another tokenizer or model."
        )
    student = sequence.writer_N == Writer.STUDENT
    logprobs_U = sequence.behaviour_logprobs_N[student]
    missing = ~np.isfinite(logprobs_U)
    if missing.any():
        raise InputError(
            f"{where}: log-probs must be finite where the student wrote the token, missing for "
            f"{missing.sum()} of {len(missing)}, the first at token "
            f"{np.flatnonzero(student)[missing.argmax()]}. Write the file with `tropd rollouts`."
        )
    if len(logprobs_U) and logprobs_U.max() > _LOGPROB_SLACK:
        raise InputError(
            f"{where}: log-probs are natural logarithms of probabilities, at most 0; found "
            f"{logprobs_U.max()}."
        )
