"""``tropd evaluate``: the evaluation of a run outside of it, or of an HF folder."""

import argparse
import json
from pathlib import Path

from megatron_tropd.config.hub import model_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd evaluate``."""
    add = parser.add_argument
    add(
        "model",
        type=model_argument,
        help="run folder (its student, with its settings), HF folder, or hf://OWNER/NAME",
    )
    add("problems", nargs="?", help="file or data set; default: the run's held-out problems")
    add("--data", metavar="JSON", help='what of it is read: {"split": "test"} (docs/prompts.md)')
    add("--like", type=Path, metavar="RUN", help="use the settings of this run for an HF folder")
    add("--max-new-tokens", type=int, default=None, help="longest answer, not the run's")
    add("--num-problems", type=int, default=None, help="only the first ones, not the run's number")
    add(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether to wrap prompts in it, whatever the run does",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), default=None, help="not the run's")
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Measure a model and print the result."""
    from megatron_tropd.cli.measure import Overrides, evaluate, result_lines
    from megatron_tropd.data.arguments import data_of

    result = evaluate(
        arguments.model,
        arguments.problems,
        like=arguments.like,
        overrides=Overrides(
            max_new_tokens=arguments.max_new_tokens,
            num_problems=arguments.num_problems,
            apply_chat_template=arguments.chat_template,
            dtype=arguments.dtype,
            data=data_of(arguments.data) if arguments.data else None,
        ),
    )
    print(json.dumps(result) if arguments.json else "\n".join(result_lines(result)))
    return 0
