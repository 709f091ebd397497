"""How much gradient noise each step of exactness removes, on a real pair and real samples.

    python benchmarks/gradient_noise.py [--student DIR --teacher DIR --prompts FILE]

Batches of trajectories are sampled from the student by transformers, and the gradient of every
loss with respect to all the student's parameters is taken for each of them. Two kinds of noise:

- *draws*: the trajectories stay, and at every position the token and the draw of the mask are drawn
  again. This is what a closed form removes; an exact loss has none.
- *batches*: new trajectories. Part of it nothing removes: other prefixes have other gradients.

Both as trace of the covariance over the squared norm of the mean gradient, so 1 means as much
noise as signal at this batch size. The result goes to
``benchmarks/results/gradient-noise-<hardware>.json``.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from step import ARITHMETIC, REPOSITORY, commit, describe_hardware, our_packages, shown_path
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_tropd.losses import (
    HiddenStatesSignal,
    LossTargets,
    Method,
    preset,
    tropd_loss_from_hidden,
)

METHODS = {
    "OPD": preset("opd"),
    "reverse KL (OPD, exact)": preset("gkd_reverse_kl"),
    "TrOPD, bernoulli": preset("tropd"),
    "TrOPD, expected": preset("tropd_expected"),
    "TrOPD, exact": preset("tropd_exact"),
    "TrOPD, exact, whole vocabulary": preset("tropd_exact_full"),
}


class Batch:
    """Trajectories of one batch: what the student and the teacher see, and who wrote what."""

    def __init__(self, ids_BS: Tensor, attention_BS: Tensor, is_response_BS: Tensor) -> None:
        """[B, S] each; the response starts after the (left-padded) prompt."""
        self.ids, self.attention, self.is_response = ids_BS, attention_BS, is_response_BS

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """[T, H] last hidden states at the positions that predict a response token."""
        positions = (self.attention.cumsum(-1) - 1).clamp(min=0)
        hidden_BSH = model.base_model(
            input_ids=self.ids, attention_mask=self.attention, position_ids=positions
        ).last_hidden_state
        return hidden_BSH[:, :-1][self.is_response[:, 1:]]

    @property
    def targets(self) -> Tensor:
        """[T] the response tokens."""
        return self.ids[:, 1:][self.is_response[:, 1:]]


def sample_batch(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], samples: int, length: int
) -> Batch:
    """Sample from the student at temperature 1 over the whole vocabulary."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    width = inputs.input_ids.shape[1]
    with torch.no_grad():
        ids_BS = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            num_return_sequences=samples,
            pad_token_id=tokenizer.eos_token_id,
        )
    written_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    ended_BR = (ids_BS[:, width:] == tokenizer.eos_token_id).cumsum(-1)
    # The first stop token belongs to the response, what follows is padding.
    written_BS[:, width:] = (ended_BR - (ids_BS[:, width:] == tokenizer.eos_token_id).int()) == 0
    prompt_mask = inputs.attention_mask.repeat_interleave(samples, dim=0)
    attention_BS = torch.cat([prompt_mask, written_BS[:, width:].long()], dim=-1)
    return Batch(ids_BS, attention_BS, written_BS)


def gradient(
    student: PreTrainedModel,
    teacher_hidden_TH: Tensor,
    teacher: PreTrainedModel,
    batch: Batch,
    config: Method,
    redraw: torch.Generator | None,
) -> Tensor:
    """Flat gradient of the mean loss; ``redraw`` draws tokens and masks anew at every position."""
    student.zero_grad()
    hidden_TH = batch.hidden(student)
    weight = student.get_output_embeddings().weight
    ids_T, uniforms_T = batch.targets, torch.rand(len(batch.targets))
    if redraw is not None:
        q_TV = (hidden_TH.detach() @ weight.detach().t()).softmax(dim=-1)
        ids_T = torch.multinomial(q_TV, 1, generator=redraw).squeeze(-1)
        uniforms_T = torch.rand(len(ids_T), generator=redraw)
    vocab_size = weight.shape[0]
    output = tropd_loss_from_hidden(
        hidden_TH,
        weight,
        LossTargets(ids_T, torch.zeros_like(ids_T, dtype=torch.bool), uniforms_T),
        HiddenStatesSignal(teacher_hidden_TH, teacher.get_output_embeddings().weight, vocab_size),
        config=config,
        vocab_size=vocab_size,
        group=None,
        metrics=False,
    )
    (output.loss / len(ids_T)).backward()
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return torch.cat(grads).double()


def noise(gradients: list[Tensor]) -> dict[str, float]:
    """Trace of the covariance over the squared norm of the mean, without its bias."""
    stack = torch.stack(gradients)
    trace = float(stack.var(dim=0).sum())
    squared = max(float(stack.mean(dim=0).square().sum()) - trace / len(stack), 1e-30)
    return {"trace": trace, "mean_norm": squared**0.5, "noise_to_signal": trace / squared}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per method."""
    torch.manual_seed(options.seed)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (options.student, options.teacher)
    )
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    tokenizer.pad_token = tokenizer.eos_token
    lines = options.prompts.read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    gradients: dict[str, dict[str, list[Tensor]]] = {
        name: {"draws": [], "batches": []} for name in METHODS
    }
    tokens = []
    for number in range(options.batches):
        begin = number * options.prompts_per_batch
        batch = sample_batch(
            student,
            tokenizer,
            prompts[begin : begin + options.prompts_per_batch],
            options.samples_per_prompt,
            options.max_new_tokens,
        )
        tokens.append(len(batch.targets))
        with torch.no_grad():
            teacher_hidden_TH = batch.hidden(teacher)
        make = partial(gradient, student, teacher_hidden_TH, teacher, batch)
        for name, config in METHODS.items():
            gradients[name]["batches"].append(make(config, None))
            if number == 0:
                draws = torch.Generator().manual_seed(options.seed)
                gradients[name]["draws"] = [make(config, draws) for _ in range(options.draws)]
    return [
        {"method": name, "tokens": statistics.mean(tokens)}
        | {kind: noise(values) for kind, values in kinds.items()}
        for name, kinds in gradients.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| method | noise/signal, draws | noise/signal, batches |", "|---|---|---|"]
    for row in rows:
        cells = [f"{row[kind]['noise_to_signal']:.3g}" for kind in ("draws", "batches")]
        lines.append(f"| {row['method']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--student", type=Path, default=ARITHMETIC / "student", help="HF folder")
    add("--teacher", type=Path, default=ARITHMETIC / "teacher", help="HF folder")
    add("--prompts", type=Path, default=ARITHMETIC / "prompts.jsonl", help='lines with "prompt"')
    add("--batches", type=int, default=32, help="batches of trajectories (default 32)")
    add("--draws", type=int, default=64, help="draws at fixed trajectories (default 64)")
    add("--prompts-per-batch", type=int, default=16)
    add("--samples-per-prompt", type=int, default=4)
    add("--max-new-tokens", type=int, default=64)
    add("--seed", type=int, default=1234)
    add("--output", type=Path, help="JSON to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    options = parse_arguments(arguments)
    rows = measure(options)
    slug, hardware = describe_hardware()
    output = options.output or REPOSITORY / f"benchmarks/results/gradient-noise-{slug}.json"
    given = {
        name: shown_path(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "output"
    }
    result = {
        "command": "python benchmarks/gradient_noise.py",
        "options": [f"{name}={value}" for name, value in given.items()],
        "commit": commit(),
        "hardware": hardware,
        "versions": {name: version(name) for name in our_packages()},
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
