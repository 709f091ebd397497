"""``tropd responses``: a teacher's responses to a prompts file, for off-policy guidance.

JSON lines. ``--run my.toml`` takes teacher, prompts and all settings from the run that the
responses are for, so that they fit. Interrupted, the same command goes on where it stopped.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from megatron_tropd.config.hub import model_argument
from megatron_tropd.config.run_defaults import RunParser, add_engine_options, add_prompt_options


def add_arguments(parser: RunParser) -> None:
    """Give ``parser`` the arguments of ``tropd responses``."""
    add = parser.add_argument
    add("--teacher", required=True, type=model_argument, help="HF folder of the teacher")
    add_prompt_options(parser)
    add("--out", required=True, type=Path, help="JSON lines to write or continue")
    add("--max-new-tokens", required=True, type=int, help="longest response")
    add("--samples", type=int, default=1, help="responses per prompt (default 1)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    add("--top-p", type=float, default=1.0, help="nucleus (default 1: off)")
    add("--seed", type=int, default=1234, help="keys the samples (default 1234)")
    add("--stop-token-ids", type=int, nargs="*", default=[], help="further ids that end one")
    add_engine_options(parser)
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue --out")
    parser.take_from_run(
        lambda config: {
            "teacher": None if config.teachers else config.model.teacher or config.model.student,
            "tensor_parallel": config.rollout.engine_tensor_parallel,
        }
    )


def run(options: argparse.Namespace) -> int:
    """Write the file.

    Raises:
        InputError: a model, prompt or response file is missing or unusable.
        ConfigError: an option is out of its range.
    """
    from megatron_tropd.cli.bars import counted
    from megatron_tropd.data.arguments import read_prompts
    from megatron_tropd.data.prompts import num_tokens
    from megatron_tropd.data.samples import Sampling
    from megatron_tropd.data.tokenizers import load_tokenizer, num_ids, stop_token_ids
    from megatron_tropd.distill.engines import tool_engine
    from megatron_tropd.rollout.engines.engine import context_length
    from megatron_tropd.tasks.sample_files import model_identity
    from megatron_tropd.tasks.teacher_responses import write_responses

    tokenizer = load_tokenizer(options.teacher)
    prompts, template = read_prompts(options, tokenizer, context_length(options.teacher))
    longest = max(num_tokens(prompts)) + options.max_new_tokens
    with ExitStack() as exits, counted("responses", "response") as progress:
        added = write_responses(
            lambda: exits.enter_context(
                # Ids beyond those of the tokenizer would mean nothing to the student.
                tool_engine(
                    options, options.teacher, max_model_len=longest, vocab_size=num_ids(tokenizer)
                )
            ),
            prompts,
            tokenizer,
            options.out,
            sampling=Sampling(
                temperature=options.temperature,
                top_p=options.top_p,
                stop_token_ids=stop_token_ids(options.teacher, options.stop_token_ids),
            ),
            max_new_tokens=options.max_new_tokens,
            samples=options.samples,
            seed=options.seed,
            teacher=model_identity(options.teacher),
            template=template,
            resume=options.resume,
            progress=progress,
        )
    print(f"{added} responses added to {options.out}")
    return 0
