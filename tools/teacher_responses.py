"""Write a teacher's responses to a prompts file, for off-policy guidance.

    python tools/teacher_responses.py --teacher DIR --prompts FILE --out FILE --max-new-tokens 128

JSON lines. ``--run my.toml`` takes teacher, prompts and all settings from the run that the
responses are for, so that they fit. Interrupted, the same command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_tropd.base.failures import exit_code
from megatron_tropd.config.hub import model_argument
from megatron_tropd.config.run_defaults import parse_with_run
from megatron_tropd.data.arguments import add_prompt_options, read_prompts
from megatron_tropd.data.prompts import num_tokens
from megatron_tropd.data.samples import Sampling
from megatron_tropd.data.tokenizers import load_tokenizer, num_ids, stop_token_ids
from megatron_tropd.distill.engines import add_engine_options, tool_engine
from megatron_tropd.rollout.engines.engine import RolloutEngine, context_length
from megatron_tropd.tasks.sample_files import model_identity
from megatron_tropd.tasks.teacher_responses import write_responses


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The parsed values.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    return parse_with_run(
        parser,
        arguments,
        lambda config: {
            "teacher": None if config.teachers else config.model.teacher or config.model.student,
            "tensor_parallel": config.rollout.engine_tensor_parallel,
        },
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the file.

    Args:
        arguments: without the program's name; None: those of the process.

    Raises:
        InputError: a model, prompt or response file is missing or unusable.
        ConfigError: an option is out of its range.
    """
    options = parse_arguments(arguments)
    tokenizer = load_tokenizer(options.teacher)
    prompts, template = read_prompts(options, tokenizer, context_length(options.teacher))
    longest = max(num_tokens(prompts))
    engines: list[RolloutEngine] = []

    def start() -> RolloutEngine:
        engines.append(
            tool_engine(
                options,
                options.teacher,
                max_model_len=longest + options.max_new_tokens,
                vocab_size=num_ids(tokenizer),  # others would mean nothing to the student
            )
        )
        return engines[0]

    with tqdm(desc="responses", unit="response") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            added = write_responses(
                start,
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
        finally:
            for engine in engines:
                engine.close()
    print(f"{added} responses added to {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
