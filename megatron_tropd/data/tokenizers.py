"""Tokenizers of HF folders: loading, identity, and the ids that end a response.

Distillation compares two models token id by token id, so "the same tokenizer" is checked here
and never assumed. Padded embedding tables may differ in size; meanings may not.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.text_files import lfs_pointer, read_json_object
from megatron_tropd.base.token_ids import parse_token_ids

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_MAX_NAMED = 5  # differing ids spelled out in an error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer of an HF folder, from its files alone: no download, no remote code.

    Args:
        folder: HF folder with tokenizer.json or a SentencePiece tokenizer.model.

    Raises:
        InputError: the folder is missing, holds no tokenizer, or its files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"Expected an HF model folder at {folder}, found none. Check the path.")
    if not any((folder / name).is_file() for name in _FILES):
        raise InputError(
            f"{folder} holds no tokenizer: expected one of {', '.join(_FILES)}. "
            "Copy the tokenizer files of the model into it."
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **_readable_config(folder)
        )
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        for name in _FILES:
            _check_readable(folder / name)
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"The tokenizer in {folder} cannot be read ({type(error).__name__}: {reason}). "
            "Copy the tokenizer files of the model again."
        ) from error


def _check_readable(path: Path) -> None:
    """Refuse a file of a tokenizer that is not what its name says, by its own fault."""
    if path.suffix == ".json" and path.is_file():
        read_json_object(path)
    if pointer := lfs_pointer(path):
        raise InputError(pointer)


def _readable_config(folder: Path) -> dict[str, PreTrainedConfig]:
    """The folder's config for transformers, which refuses some forms of ``eos_token_id``.

    Empty if transformers can read config.json itself, or there is none: no class of tokenizers
    takes its EOS from there.
    """
    path = folder / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    eos = config.pop("eos_token_id", None)
    plain = eos if isinstance(eos, list) else [eos]
    if "model_type" not in config or all(token is None or type(token) is int for token in plain):
        return {}
    return {"config": AutoConfig.for_model(**config)}


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: more than there are tokens if some ids have none."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what the ids mean: every id with its token, and the BOS and EOS ids.

    Returns:
        16 hexadecimal digits; equal for a student and a teacher that may be distilled.
    """
    meaning = [sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))]
    meaning.append([tokenizer.bos_token_id, tokenizer.eos_token_id])
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]


def check_same_tokenizer(
    student_folder: str | Path, teacher_folder: str | Path, *, other: str = "teacher"
) -> PreTrainedTokenizerBase:
    """Refuse a pair whose token ids mean different things.

    Args:
        other: how messages call the teacher.

    Returns:
        The student's tokenizer, which is the one used from here on.

    Raises:
        InputError: a tokenizer cannot be read, or ids, BOS or EOS differ; the first differing ids
            are named. Chat templates are compared by the texts they make
            (:func:`megatron_tropd.data.prompts.check_same_texts`).
    """
    student, teacher = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    where = f"student {student_folder}, {other} {teacher_folder}"
    differing = _differing_ids(student.get_vocab(), teacher.get_vocab(), other)
    if differing:
        more = f" and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
        raise InputError(
            f"Student and {other} must share one tokenizer, but {len(differing)} ids differ: "
            f"{'; '.join(differing[:_MAX_NAMED])}{more} ({where}). "
            "Choose a pair trained with the same tokenizer."
        )
    for name in ("bos_token_id", "eos_token_id"):
        mine, theirs = getattr(student, name), getattr(teacher, name)
        if mine != theirs:
            raise InputError(
                f"Student and {other} must agree on {name}, found {_spell(student, mine)} and "
                f"{_spell(teacher, theirs)} ({where}). If that is only a setting, edit "
                "tokenizer_config.json of one of them."
            )
    return student


def stop_token_ids(folder: str | Path, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end a response: every EOS that the folder names, and extra.

    They stand in three places: the tokenizer, generation_config.json and config.json. Readers look
    into different ones, so that a model ends its responses with any of them.

    Args:
        extra: further ids (``rollout.stop_token_ids``).

    Raises:
        ConfigError: an extra id is not in the vocabulary.
        InputError: there is no id that ends a response, or a file is broken or names an id that
            the tokenizer does not have.
    """
    tokenizer = load_tokenizer(folder)
    extra = tuple(extra)
    for token_id in extra:
        if not 0 <= token_id < len(tokenizer):
            raise ConfigError(
                f"rollout.stop_token_ids must be ids in 0..{len(tokenizer) - 1}, found {token_id}."
            )
    ids = {*extra, *_eos_ids(folder)}
    if not ids:
        raise InputError(
            f"Nothing ends a response: the tokenizer in {folder} has no EOS token, and neither "
            "generation_config.json nor config.json has eos_token_id. Add it to "
            "generation_config.json, or name ids as stop token ids."
        )
    return tuple(sorted(ids))


def shared_stops(student: str | Path, teacher: str | Path) -> tuple[int, ...]:
    """Every EOS that two models' folders name, one of the student's first; none if they agree.

    Args:
        teacher: HF folder; one that names no EOS agrees.
    """
    mine, theirs = _eos_ids(student), _eos_ids(teacher)
    if not mine or not theirs or mine == theirs:
        return ()
    own = load_tokenizer(student).eos_token_id
    first = own if own in mine else min(mine)
    return (first, *sorted((mine | theirs) - {first}))


def _differing_ids(student: dict[str, int], teacher: dict[str, int], other: str) -> list[str]:
    mine = {token_id: token for token, token_id in student.items()}
    theirs = {token_id: token for token, token_id in teacher.items()}
    return [
        f"id {i}: student {mine.get(i, 'nothing')!r}, {other} {theirs.get(i, 'nothing')!r}"
        for i in sorted(mine.keys() | theirs.keys())
        if mine.get(i) != theirs.get(i)
    ]


def _spell(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    return "none" if token_id is None else f"{token_id} {tokenizer.decode([token_id])!r}"


def _eos_ids(folder: str | Path) -> set[int]:
    """Every EOS of a folder, whichever of its files names it."""
    tokenizer = load_tokenizer(folder)
    ids = set[int]()
    for name in ("generation_config.json", "config.json"):
        ids |= _eos_in(Path(folder) / name, tokenizer)
    return ids if tokenizer.eos_token_id is None else ids | {tokenizer.eos_token_id}


def _eos_in(path: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids under ``eos_token_id`` of a JSON file, which need not exist."""
    if not path.is_file():
        return set()
    settings = read_json_object(path)
    where, vocabulary = f"{path}: eos_token_id", tokenizer.get_vocab()
    tokens = parse_token_ids(settings.get("eos_token_id"), where)
    ids = {vocabulary.get(t, -1) if isinstance(t, str) else t for t in tokens}
    if not ids <= set(vocabulary.values()):
        raise InputError(
            f"{where} is {settings['eos_token_id']!r}, but the tokenizer beside it has the ids "
            f"0..{len(tokenizer) - 1} and no other. Correct one of the two."
        )
    return ids
