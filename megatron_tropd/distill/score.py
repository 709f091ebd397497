"""``tropd score`` on every rank: the teacher's signals of recorded rollouts, written as files.

Ranks, layout, packing and the teacher are those of a run with a resident teacher, or with a served
one. Each shard is packed by itself, so that a command that was stopped writes the same bytes as one
that was not.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.files import write_json
from megatron_tropd.base.progress import Progress, StopFlag
from megatron_tropd.config import Config
from megatron_tropd.config.run import TEACHER, reference_of
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.convert.checks import check_parallel
from megatron_tropd.convert.families import ModelShape, model_shape
from megatron_tropd.convert.hf_folder import HFFolder, read_config
from megatron_tropd.convert.megatron_folder import MegatronFolder, companions_of, open_model
from megatron_tropd.convert.sizes import row_flops
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.contexts import contexts_of
from megatron_tropd.data.dealing import Work
from megatron_tropd.data.packing import pack
from megatron_tropd.data.routes import Routes, scores
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.tokenizers import check_same_tokenizer, fingerprint
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill import startup
from megatron_tropd.distill.inputs import training_prompts
from megatron_tropd.distill.loop import stopping
from megatron_tropd.distill.recordings import load_recorded
from megatron_tropd.losses import ReferencedSignal
from megatron_tropd.mcore import models, platform
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.options_check import check_types
from megatron_tropd.teacher import TeacherSource, TeacherStart, load_teacher, signal_of
from megatron_tropd.teacher.cached.digest import (
    model_digest,
    num_scored,
    rollouts_digest,
    scored_tokens,
)
from megatron_tropd.teacher.cached.files import (
    CacheHeader,
    check_header,
    shard_path,
    shards_of,
    write_header,
    write_shard,
)
from megatron_tropd.teacher.cached.top_k import top_k_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 2**16
"""Scored tokens of a shard: some 30 MB, and so much work a killed command does again."""


@dataclass(frozen=True)
class ToScore:
    """What a command reads: the models that score, and what they score."""

    folders: dict[str, HFFolder | MegatronFolder]
    """"teacher"; "reference", if the loss reads it."""
    vocab_configs: list[dict[str, Any]]
    """config.json of all models of the run, the student's too: they share a vocabulary."""
    tokenizer: str
    """Fingerprint."""
    sequences: list[TokenSequence]

    @property
    def vocab_size(self) -> int:
        """Columns that are real in all models."""
        return min(model_shape(config).vocab for config in self.vocab_configs)


def load_to_score(config: Config) -> ToScore:
    """Read and check the teacher, the tokenizers, the prompts and the recorded rollouts.

    The student's weights are not read, and need not fit the layout.

    Raises:
        InputError: a file is missing or unusable.
        ConfigError: a setting does not fit the models or the texts.
    """
    (alone,) = config.by_teacher.values()
    student = companions_of(config.model.student)
    signal_of(alone)  # a served teacher has no reference
    folders = {TEACHER: open_model(alone.model.teacher, weights=alone.loads_teacher)}
    if alone.reference is not None:
        folders[reference_of(TEACHER)] = open_model(alone.reference)
    for who, folder in folders.items():
        if alone.loads_teacher:
            check_parallel(folder.config, alone.teacher_parallel, who=who)
        tokenizer = check_same_tokenizer(student, folder.companions, other=who)
    configs = [read_config(student), *(folder.config for folder in folders.values())]
    context = min(model_shape(each).context for each in configs)
    vocab_size = min(model_shape(each).vocab for each in configs)
    if alone.cached_top_k > vocab_size:
        raise ConfigError(
            f"teacher.cache_top_k = {alone.cached_top_k} exceeds the vocabulary of {vocab_size} "
            f"tokens. Set teacher.cache_top_k to at most {vocab_size}."
        )
    prompts = training_prompts(config.rollout, tokenizer, context)
    groups = load_recorded(config, prompts, tokenizer, vocab_size) or []
    mine = [p for p in prompts if all(scores(one, p) for one in config.teachers)]
    contexts = _contexts(config, alone, mine, tokenizer, context)
    routes = Routes((TEACHER,), {prompt.index: 0 for prompt in mine}, contexts)
    recorded = [s for group in groups for s in group if s.key.prompt in routes.of_prompt]
    sequences = [routes.as_read(sequence) for sequence in recorded]
    return ToScore(folders, configs, fingerprint(tokenizer), sequences)


def _contexts(
    config: Config,
    alone: Config,
    prompts: list[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
) -> dict[int, tuple[int, ...]]:
    """What the teacher reads in the place of its prompts, if it reads something else."""
    rollout, template = config.rollout, alone.teacher.context
    if template is None:
        return {}
    room = context - rollout.max_new_tokens
    return contexts_of(rollout.prompts, prompts, template, tokenizer, rollout, max_tokens=room)


def header_of(config: Config, found: ToScore, shards: int) -> CacheHeader:
    """Say whose signals the files will hold, and of what."""
    (alone,) = config.by_teacher.values()
    digests = {who: model_digest(folder) for who, folder in found.folders.items()}
    return CacheHeader(
        teacher=digests["teacher"],
        reference=digests.get("reference"),
        tokenizer=found.tokenizer,
        vocab_size=found.vocab_size,
        model_dtype=str(models.resolve_dtype(config.model.dtype)).removeprefix("torch."),
        top_k=alone.cached_top_k,
        dtype=alone.teacher.cache_dtype,
        rollouts=rollouts_digest(found.sequences),
        sequences=len(found.sequences),
        tokens=num_scored(found.sequences),
        shards=shards,
    )


def score(folder: RunFolder, *, console: IO[str], stop: StopFlag, progress: Progress) -> None:
    """Write the shards that are missing, until all are there or ``stop``.

    Args:
        folder: of this command's own files; its config names the cache.
        progress: tells the watchdog where this rank is.

    Raises:
        ConfigError, InputError: it cannot start.
        TrainingError: a file cannot be written.
    """
    config, began = folder.read_config(), time.monotonic()
    (alone,) = config.by_teacher.values()
    out = Path(str(alone.teacher.cache))
    with ExitStack() as exits:
        layout = startup.join_ranks(config)
        exits.push(startup.leave_ranks)
        check_types(config.megatron)
        found = load_to_score(config)
        shards = shards_of(found.sequences, SHARD_TOKENS)
        header = header_of(config, found, len(shards))
        check_header(out, header)
        dist.barrier()
        if layout.is_main:
            write_header(out, header)
        bar = exits.enter_context(_bar(header.tokens, console, layout))
        scorer = _scorer(config, found, layout)
        for number, there in enumerate(_there(out, len(shards))):
            sequences = [found.sequences[row] for row in shards[number]]
            progress.enter(f"shard {number}")
            if not there:
                if stopping(stop):
                    return
                columns = scorer.score(sequences)
                if columns is not None:
                    write_shard(shard_path(out, number), sequences, columns)
            progress.step += 1
            bar.update(num_scored(sequences))
        dist.barrier()
        if layout.is_main:
            write_json(folder.summary, _summary(out, header, time.monotonic() - began))
        dist.barrier()


def _bar(tokens: int, console: IO[str], layout: Layout) -> Any:
    hidden = not layout.is_main
    return tqdm(
        total=tokens, desc="score", unit="token", unit_scale=True, file=console, disable=hidden
    )


def _there(out: Path, shards: int) -> list[bool]:
    """Which shards are complete: the same on every rank, for rank 0 looks."""
    told = [[shard_path(out, number).exists() for number in range(shards)]]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _summary(out: Path, header: CacheHeader, seconds: float) -> dict[str, Any]:
    size = sum(shard_path(out, n).stat().st_size for n in range(header.shards))
    return {
        "sequences": header.sequences,
        "tokens": header.tokens,
        "shards": header.shards,
        "bytes": size,
        "top_k": header.top_k,
        "dtype": header.dtype,
        "seconds": round(seconds, 1),
    }


@dataclass(frozen=True)
class Scorer:
    """A teacher on this rank, and what is kept of what it says."""

    teacher: TeacherSource
    layout: Layout
    top_k: int
    dtype: torch.dtype
    """Of the top-k log-probs."""
    tokens_per_micro_batch: int
    work: Work = float
    """Of a row of some padded length."""

    def score(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor] | None:
        """Score some sequences; collective.

        Returns:
            Name of a column -> a row for each scored token, in order, on the one rank that is to
            write them; None elsewhere.
        """
        layout = self.layout
        weighed = self._weighed(sequences)
        self.teacher.begin(0, weighed)
        batches = [layout.local(b).to(platform.device()) for b in self._packed(weighed)]
        signals = self.teacher.signals(batches)
        if not layout.is_last_stage:
            return None
        scored = [self._columns(*each) for each in zip(batches, signals, strict=True)]
        if layout.tp_rank:
            return None  # the same as on the first
        parts = _gathered(scored, layout)
        if parts is None:
            return None
        columns = _in_order(parts, len(sequences))
        return columns | {"topk_logprobs": columns["topk_logprobs"].to(self.dtype)}

    def _weighed(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Make every written token a loss token, whatever a loss will make of it."""
        weighed = [s.replace(weight_N=scored_tokens(s).astype(np.float32)) for s in sequences]
        # Every replica needs as many rows, perhaps a multiple: the last sequence again, dropped
        # afterwards.
        multiple = self.layout.dp_size * self.layout.batch_multiple
        return weighed + weighed[-1:] * (-len(weighed) % multiple)

    def _packed(self, weighed: Sequence[TokenSequence]) -> list[MicroBatch]:
        layout = self.layout
        return pack(
            weighed,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            pad_multiple=layout.pad_multiple,
            rounded_to=layout.row_multiple,
            work=self.work,
            batch_multiple=layout.batch_multiple,
            seed=0,
            step=0,
        )

    def _columns(self, batch: MicroBatch, signal: Any) -> dict[str, Tensor]:
        """What is kept of a micro-batch, and which sequence and position each row is of."""
        ids_T, group = batch.of_loss_tokens(batch.labels), self.layout.tp_group
        reference = {}
        if isinstance(signal, ReferencedSignal):
            said = top_k_of(signal.reference, ids_T, 1, group=group)
            reference = {"reference_logprobs": said["sampled_logprobs"]}
            signal = signal.teacher
        columns = {
            **top_k_of(signal, ids_T, self.top_k, group=group),
            **reference,
            "row": batch.loss_rows,
            "position": batch.of_loss_tokens(batch.response_positions),
        }
        return {name: column.cpu() for name, column in columns.items()}


def _scorer(config: Config, found: ToScore, layout: Layout) -> Scorer:
    """Build the teacher, and its reference, as a run with a resident one does; collective."""
    (alone,) = config.by_teacher.values()
    start = TeacherStart(
        alone,
        found.folders[TEACHER],
        layout,
        models.resolve_dtype(config.model.dtype),
        models.padded_vocab_size(*found.vocab_configs, tensor=layout.tp_size),
        found.vocab_size,
        found.folders.get(reference_of(TEACHER)),
        longest=max(map(len, found.sequences), default=0),
        run_dir=Path(config.run.dir),
    )
    return Scorer(
        load_teacher(alone.teacher.placement)(start),
        layout,
        alone.cached_top_k,
        getattr(torch, alone.teacher.cache_dtype),
        config.train.tokens_per_micro_batch,
        partial(_row_work, [model_shape(folder.config) for folder in found.folders.values()]),
    )


def _row_work(shapes: Sequence[ModelShape], length: int) -> float:
    """Work of a row: a pass of each model."""
    return sum(row_flops(shape, length) for shape in shapes)


def _gathered(scored: list[dict[str, Tensor]], layout: Layout) -> list[dict[str, Tensor]] | None:
    """The micro-batches of all replicas on the first of them; None elsewhere."""
    group = layout.loss_group
    if group.size() == 1:
        return scored
    first = dist.get_global_rank(group, 0)
    parts: list[Any] | None = [None] * group.size() if layout.rank == first else None
    dist.gather_object(scored, parts, dst=first, group=group)
    return None if parts is None else [batch for part in parts for batch in part]


def _in_order(parts: list[dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """The columns of the first ``rows`` sequences, by sequence and position."""
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    row, position = columns.pop("row").numpy(), columns.pop("position").numpy()
    order = np.lexsort((position, row))
    order = torch.from_numpy(order[row[order] < rows])
    return {name: column[order] for name, column in columns.items()}
