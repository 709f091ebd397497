"""Make everything the stories example needs from an HF folder and a list of stories.

    python make_stories.py --model MODEL --stories STORIES.json --out data

MODEL is any HF folder of a supported family, STORIES a JSON list of strings. The folder ``--out``
then holds ``teacher`` (a link to MODEL), ``student`` (MODEL without the layers of ``--drop``),
``prompts.jsonl`` and ``heldout.jsonl`` (the first tokens of the stories, no text in both) and
``responses.jsonl`` (what the teacher writes after the training prompts, for its prefixes).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.tokenizers import load_tokenizer


def first_tokens(
    stories: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> list[str]:
    """Text of the first tokens of each story, repetitions left out.

    Args:
        stories: whole stories.
        tokenizer: the models'.
        num_tokens: tokens of a prompt; shorter stories and those whose beginning the vocabulary
            cannot spell are left out.

    Returns:
        Different texts in the order of their first story.
    """
    texts = {}
    for story in stories:
        ids = tokenizer.encode(
            story, add_special_tokens=False, truncation=True, max_length=num_tokens
        )
        if len(ids) == num_tokens and tokenizer.unk_token_id not in ids:
            texts[tokenizer.decode(ids)] = None
    return list(texts)


def read_stories(path: Path) -> list[str]:
    """A JSON list of strings.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        stories = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"Expected a JSON list of strings in {path}, found {error}.") from None
    if not isinstance(stories, list) or not all(isinstance(story, str) for story in stories):
        raise InputError(f"Expected a JSON list of strings in {path}, found something else.")
    return stories


def write_prompts(path: Path, texts: Iterable[str]) -> None:
    """One {"prompt"} object per line."""
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def tropd(*words: str | Path) -> None:
    """Run ``tropd`` with this Python; if it fails, so does this program."""
    command = [sys.executable, "-m", "megatron_tropd.cli", *map(str, words)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="HF folder of the teacher")
    parser.add_argument("--stories", type=Path, required=True, help="JSON list of strings")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--drop", default="3", help="layers the student lacks, from 0: 3 or 3,5")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--heldout", type=int, default=128, help="prompts kept for evaluation")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a teacher response")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out

    texts = first_tokens(
        read_stories(arguments.stories), load_tokenizer(arguments.model), arguments.prompt_tokens
    )
    if len(texts) <= arguments.heldout:
        raise InputError(
            f"{arguments.stories} gives {len(texts)} different prompts, no more than the "
            f"{arguments.heldout} held-out ones. Add stories or lower --heldout."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out / "heldout.jsonl", texts[: arguments.heldout])
    write_prompts(out / "prompts.jsonl", texts[arguments.heldout :])
    (out / "teacher").unlink(missing_ok=True)
    (out / "teacher").symlink_to(arguments.model.resolve(), target_is_directory=True)
    if not (out / "student").is_dir():
        tropd(
            "drop-layers",
            *("--model", arguments.model, "--out", out / "student", "--drop", arguments.drop),
        )
    tropd(
        "responses",
        *("--teacher", arguments.model, "--prompts", out / "prompts.jsonl"),
        *("--out", out / "responses.jsonl", "--max-new-tokens", str(arguments.max_new_tokens)),
    )
    print(f"{out}: {len(texts) - arguments.heldout} prompts, {arguments.heldout} held out")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
