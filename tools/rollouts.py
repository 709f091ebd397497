"""Record samples of a student, for training that is driven from outside.

    python tools/rollouts.py --student DIR --prompts FILE --out FILE --max-new-tokens 128

JSON lines, read by megatron_tropd.data.recorded. The student is a Hugging Face folder; one trained
with Megatron is converted by tools/megatron_to_hf.py first. ``--run`` takes the student and all
settings from a run, where no option says otherwise. Interrupted, the same command goes on
where it stopped.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import exit_code
from megatron_tropd.config import Config, GuidanceConfig, RolloutConfig
from megatron_tropd.config.hub import model_argument
from megatron_tropd.config.run_defaults import parse_with_run
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.arguments import add_prompt_options, read_prompts
from megatron_tropd.data.prompts import num_tokens
from megatron_tropd.data.responses import load_responses
from megatron_tropd.data.samples import Sampling
from megatron_tropd.data.tokenizers import load_tokenizer, num_ids, stop_token_ids
from megatron_tropd.distill.engines import add_engine_options, tool_engine
from megatron_tropd.rollout.engines.engine import context_length
from megatron_tropd.tasks.recorded_rollouts import RolloutRound, write_rollouts
from megatron_tropd.tasks.sample_files import model_identity


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The parsed values.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--student", required=True, type=model_argument, help="HF folder of the student")
    add_prompt_options(parser)
    add("--out", required=True, type=Path, help="JSON lines to write or continue")
    add("--max-new-tokens", required=True, type=int, help="longest response, prefix included")
    add("--samples", type=int, default=4, help="samples per prompt (default 4)")
    add("--prompts-per-round", type=int, help="prompts of a round (default: all)")
    add("--round", type=int, default=0, help="0-based; other rounds draw others (default 0)")
    add("--rounds", type=int, help="rounds in all; teacher prefixes shorten over them")
    add("--temperature", type=float, default=1.0, help="default 1")
    add("--top-p", type=float, default=1.0, help="nucleus (default 1: off)")
    add("--seed", type=int, default=1234, help="keys the samples (default 1234)")
    add("--stop-token-ids", type=int, nargs="*", default=[], help="further ids that end one")
    add("--responses", type=Path, help="of tools/teacher_responses.py, to cut prefixes from")
    add("--prefixed-per-prompt", type=int, default=1, help="samples with a prefix (default 1)")
    add_engine_options(parser)
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue --out")
    return parse_with_run(
        parser,
        arguments,
        lambda config: {
            "student": _student_of(config),
            "samples": config.rollout.samples_per_prompt,
            "tensor_parallel": config.rollout.engine_tensor_parallel,
        },
    )


def _student_of(config: Config) -> str:
    """The run's trained student, or the one it starts from."""
    trained = RunFolder(Path(config.run.dir)).student
    return str(trained) if trained.is_dir() else config.model.student


def describe_round(options: argparse.Namespace, num_prompts: int) -> RolloutRound:
    """The round that the options ask for.

    Args:
        options: of :func:`parse_arguments`.
        num_prompts: in the prompts file.

    Returns:
        The round.

    Raises:
        ConfigError: an option is out of its range.
    """
    if options.responses and not options.rounds:
        raise ConfigError("--responses needs --rounds: teacher prefixes shorten over the rounds.")
    rollout = RolloutConfig(
        prompts=str(options.prompts),
        max_new_tokens=options.max_new_tokens,
        prompts_per_step=options.prompts_per_round or num_prompts,
        samples_per_prompt=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    return RolloutRound(
        rollout=rollout,
        guidance=GuidanceConfig(prefixed_per_prompt=options.prefixed_per_prompt),
        number=options.round,
        rounds=options.rounds or options.round + 1,
        seed=options.seed,
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the file.

    Args:
        arguments: without the program's name; None: those of the process.

    Raises:
        InputError: a model, prompts, responses or rollouts file is missing or unusable.
        ConfigError: an option is out of its range.
    """
    options = parse_arguments(arguments)
    tokenizer = load_tokenizer(options.student)
    prompts, template = read_prompts(options, tokenizer, context_length(options.student))
    which = describe_round(options, len(prompts))
    responses = None
    if options.responses:
        filtered = options.filter_overlong_prompts
        responses = load_responses(options.responses, prompts, tokenizer, filtered=filtered)
    longest = max(num_tokens(prompts)) + options.max_new_tokens
    with ExitStack() as exits, tqdm(desc="rollouts", unit="rollout") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        added = write_rollouts(
            lambda: exits.enter_context(
                # The ids of the tokenizer are what the loss knows.
                tool_engine(
                    options, options.student, max_model_len=longest, vocab_size=num_ids(tokenizer)
                )
            ),
            which.plan(prompts, responses),
            tokenizer,
            options.out,
            which=which,
            sampling=Sampling(
                temperature=options.temperature,
                top_p=options.top_p,
                stop_token_ids=stop_token_ids(options.student, options.stop_token_ids),
            ),
            weights=model_identity(options.student, whole=True),
            template=template,
            resume=options.resume,
            progress=progress,
        )
    print(f"{added} rollouts added to {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
