"""Make the quickstart's pair of models, from nothing: problems, tokenizer, teacher, student.

Both are trained with Megatron-Core through ``megatron_tropd.mcore``, by cross entropy on the
working of freshly drawn problems. The teacher trains until it is good; the student, of another
family, stops early. Running it again in the same folder replaces what is there.

    python examples/arithmetic/make_pair.py --out examples/arithmetic
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import Problem, problems, with_slips
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.models.llama.tokenization_llama import LlamaTokenizer

from megatron_tropd.config import ParallelConfig, TrainConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import pack
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.export import save_hf
from megatron_tropd.mcore.models import build_model, padded_vocab_size
from megatron_tropd.mcore.parallel import initialize, shutdown
from megatron_tropd.mcore.schedule import cross_entropy
from megatron_tropd.mcore.student import Student
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.tasks.exact_match import Asking, grade_answers

NUM_PROMPTS, NUM_HELD_OUT = 4000, 1000
VOCAB_SIZE = 320
CONTEXT = 128
MAX_NEW_TOKENS = 64
"""The longest working has 59 tokens."""
BOS_ID, EOS_ID = 1, 2
BATCH = 32
"""Problems of one optimizer step."""
LOG_EVERY = LOSS_WINDOW = 25
TRAINING_SEED = 1
"""Of the stream of problems both models learn from; the files use seed 0."""
FAMILIES: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class Recipe:
    """One model of the pair and how it is trained."""

    family: str
    """Key of ``FAMILIES``."""
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    """Whether embedding and output layer are one matrix."""
    steps: int
    """Most optimizer steps, and the length of the learning-rate schedule."""
    lr: float
    """Peak learning rate, reached after ``warmup_steps`` and decayed by a cosine."""
    stop_loss: float = 0.0
    """Stop as soon as the mean loss of ``LOSS_WINDOW`` steps is below it."""
    slip_share: float = 0.0
    """In half of the problems: how many lines have a slip, which carries no loss."""
    warmup_steps: int = 50
    seed: int = 0
    """Of the first weights."""

    def hf_config(self) -> PretrainedConfig:
        """The model as transformers describes it."""
        return FAMILIES[self.family](
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=self.tied,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            dtype="float32",
        )


RECIPES = {
    "teacher": Recipe(
        "qwen3", 128, 384, 4, 4, 2, tied=False, steps=1500, lr=2.5e-3, slip_share=0.3
    ),
    "student": Recipe("llama", 64, 192, 4, 4, 2, tied=True, steps=1500, lr=3e-3, stop_loss=0.09),
}


def write_problems(out: Path) -> None:
    """Write the prompts to distil on and the problems to be graded on."""
    for split, number, name in (
        ("train", NUM_PROMPTS, "prompts.jsonl"),
        ("heldout", NUM_HELD_OUT, "heldout.jsonl"),
    ):
        lines = (problem.as_line() + "\n" for problem in problems(split, seed=0))
        (out / name).write_text("".join(islice(lines, number)))


def write_tokenizer(folder: Path) -> None:
    """Train a SentencePiece tokenizer, one piece a digit, and write it in three formats."""
    texts: list[str] = []
    for problem in islice(problems("train", TRAINING_SEED), 3000):
        texts += [problem.prompt, *problem.working.split("\n")]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            num_threads=1,
            minloglevel=2,
        )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, add_prefix_space=False, add_bos_token=False, **settings
    )
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_first_weights(folder: Path, recipe: Recipe) -> int:
    """Write an HF folder with random weights and the tokenizer; returns the parameter count."""
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.hf_config())
    model.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(folder)
    write_tokenizer(folder)
    return model.num_parameters()


def batches(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, tokens_per_micro_batch: int
) -> Iterator[list[MicroBatch]]:
    """Endless optimizer steps of new problems; the working but for its slips carries loss."""
    stream = problems("train", TRAINING_SEED)
    rng = random.Random(recipe.seed)
    for step in count():
        workings = [working_of(problem, recipe, rng) for problem in islice(stream, BATCH)]
        yield pack(
            [_sequence(*working, tokenizer, step, i) for i, working in enumerate(workings)],
            dp_rank=0,
            dp_size=1,
            tokens_per_micro_batch=tokens_per_micro_batch,
            seed=0,
            step=step,
        )


def working_of(
    problem: Problem, recipe: Recipe, rng: random.Random
) -> tuple[Problem, list[tuple[str, bool]]]:
    """The problem and its working in pieces; every other one has slips, if the recipe wants."""
    if recipe.slip_share and rng.random() < 0.5:
        return problem, with_slips(problem, rng, recipe.slip_share)
    return problem, [(problem.working, True)]


def _sequence(
    problem: Problem,
    pieces: list[tuple[str, bool]],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    index: int,
) -> TokenSequence:
    """Make the tokens of a working; slips carry no loss."""
    response: list[int] = []
    carries_loss: list[bool] = []
    for text, is_right in pieces:
        # Digits, signs and line ends are tokens of their own, so pieces can be encoded alone.
        ids = tokenizer.encode(text, add_special_tokens=False)
        response += ids
        carries_loss += [is_right] * len(ids)
    sequence = TokenSequence.of_runs(
        SampleKey(step, index, 0),
        (Writer.CONTEXT, tokenizer.encode(problem.prompt)),
        (Writer.STUDENT, [*response, EOS_ID]),
        logprobs=[0.0] * (len(response) + 1),
        version=0,
    )
    weight_N = sequence.weight_N.copy()
    weight_N[sequence.response] = [*carries_loss, True]
    return sequence.replace(weight_N=weight_N)


def train_rank(
    rank: int, first: Path, out: Path, recipe: Recipe, tensor_parallel: int, log: Path
) -> None:
    """One rank of the training: from the HF folder ``first`` to the HF folder ``out``.

    Args:
        rank: its number, from 0.
        first: architecture, first weights, tokenizer.
        out: where the trained model goes.
        recipe: how to train.
        tensor_parallel: number of ranks.
        log: JSON lines, one every ``LOG_EVERY`` steps; the ranks meet in its folder.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(tensor_parallel)}
    store = dist.FileStore(str(log.with_name("store")), tensor_parallel)
    backend = platform.distributed_backend()
    dist.init_process_group(backend, store=store, rank=rank, world_size=tensor_parallel)
    parallel = ParallelConfig(tensor=tensor_parallel)
    layout = initialize(parallel, recipe.seed)
    folder = HFFolder(first)
    train = TrainConfig(
        steps=recipe.steps,
        lr=recipe.lr,
        min_lr=recipe.lr * 0.03,
        lr_schedule="cosine",
        warmup_steps=min(recipe.warmup_steps, recipe.steps),
        adam_betas=(0.9, 0.98),
    )
    padded = padded_vocab_size(folder.config, tensor=tensor_parallel)
    model = build_model(
        folder,
        layout=layout,
        parallel=parallel,
        dtype=torch.float32,
        padded_vocab_size=padded,
    )
    student = Student(model, train=train, parallel=parallel, dtype=torch.float32)
    stream = batches(load_tokenizer(first), recipe, train.tokens_per_micro_batch)
    losses: deque[float] = deque(maxlen=LOSS_WINDOW)
    began = time.perf_counter()
    for step, micro_batches in enumerate(islice(stream, recipe.steps), start=1):
        losses.append(_mean_loss(student.forward_backward(micro_batches, cross_entropy)))
        student.update()
        loss = sum(losses) / len(losses)
        done = step == recipe.steps or (step > LOSS_WINDOW and loss < recipe.stop_loss)
        if rank == 0 and (done or step % LOG_EVERY == 0):
            _write_log(log, step=step, loss=loss, seconds=time.perf_counter() - began)
        if done:
            break
    save_hf(model, folder, out)
    shutdown()


def _mean_loss(reports: Sequence[dict[str, torch.Tensor]]) -> float:
    tokens = sum(float(report["tokens"]) for report in reports)
    return sum(float(report["loss"]) for report in reports) / tokens


def _write_log(log: Path, *, step: int, loss: float, seconds: float) -> None:
    line = {"step": step, "loss": round(loss, 4), "seconds": round(seconds)}
    print(f"step {step}  loss {loss:.4f}  {seconds:.0f} s", flush=True)
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def accuracy(folder: Path, problems_file: Path, scratch: Path) -> dict[str, Any]:
    """Greedy exact-match accuracy of an HF folder on a file of problems, with its interval."""
    tokenizer = load_tokenizer(folder)
    with RolloutEngine(folder, max_model_len=CONTEXT, log_file=scratch / "engine.log") as engine:
        problems = load_prompts(problems_file, tokenizer)
        asking = Asking(max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=(EOS_ID,))
        samples = engine.generate(asking.requests(problems), asking.sampling)
    result = grade_answers(problems, samples, tokenizer)
    interval = [round(result.ci_low, 4), round(result.ci_high, 4)]
    return {"accuracy": result.accuracy, "interval_95": interval, "problems": result.total}


def make(
    name: str, recipe: Recipe, out: Path, tensor_parallel: int, *, heldout: Path
) -> dict[str, Any]:
    """Train one model into ``out / name`` and say what it took and what it can do."""
    print(f"{name}: {recipe}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        parameters = write_first_weights(first, recipe)
        log = Path(scratch) / "log.jsonl"
        began = time.perf_counter()
        mp.spawn(
            train_rank,
            (first, out / name, recipe, tensor_parallel, log),
            nprocs=tensor_parallel,
        )
        seconds = round(time.perf_counter() - began)
        made = {"recipe": asdict(recipe), "parameters": parameters, "seconds": seconds}
        made |= {"tensor_parallel": tensor_parallel}
        made |= accuracy(out / name, heldout, Path(scratch))
        made["log"] = [json.loads(line) for line in log.read_text().splitlines()]
        made["steps"] = made["log"][-1]["step"]
    print(f"{name}: accuracy {made['accuracy']:.3f} after {seconds} s", flush=True)
    return made


def main() -> None:
    """Make everything and record it in pair.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks to train on")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train one model, keep the other")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out)
    record = args.out / "pair.json"
    pair = json.loads(record.read_text()) if args.only and record.exists() else {}
    for name, recipe in RECIPES.items():
        if args.only in (None, name):
            pair[name] = make(
                name, recipe, args.out, args.tensor_parallel, heldout=args.out / "heldout.jsonl"
            )
            pair[name]["versions"] = {p: version(p) for p in ("torch", "megatron-core")}
    record.write_text(json.dumps(pair, indent=2) + "\n")


if __name__ == "__main__":
    main()
