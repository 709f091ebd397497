"""The prompts file, how its lines become token ids, and which prompts belong to a step."""

import datetime
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import DataConfig, PromptConfig
from megatron_tropd.data.rows import Row, Rows, open_rows, shaped
from megatron_tropd.data.templates import conversation, render
from megatron_tropd.data.types import Prompt
from megatron_tropd.losses.draws import Purpose, keyed_seed, keyed_uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
_FOR_TEMPLATE = ("tools", "continue_final_message")  # keys of a line that a template reads
_READ_BY_US = ("prompt", "messages", "chat_template_kwargs", *_FOR_TEMPLATE)
_MAX_NAMED = 100
_PROBE = "A text of 1 line."
_PLAIN = PromptConfig()
_AS_IT_IS = DataConfig()
_ENTRY = np.dtype(
    [(n, "i8") for n in ("number", "start", "size", "index")]
    + [(n, "i4") for n in ("tokens", "task")]
)


class Prompts(Sequence[Prompt]):
    """The prompts of a file, each read and tokenized when it is asked for."""

    def __init__(self, readers: Sequence["_Reader"], entries_N: NDArray[Any]) -> None:
        """Hold what places and lengths are known of.

        Args:
            readers: of each task, by number.
            entries_N: of :data:`_ENTRY`, ascending by index.
        """
        self._readers, self.entries_N = tuple(readers), entries_N

    def __len__(self) -> int:
        """How many there are."""
        return len(self.entries_N)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> "Prompts": ...

    def __getitem__(self, place: int | slice) -> "Prompt | Prompts":
        """Read one, or choose some."""
        if isinstance(place, slice):
            return Prompts(self._readers, self.entries_N[place])
        number, start, size, index, _, task = self.entries_N[place].item()
        prompt: Prompt = self._readers[task].prompt(index, Row(number, start, size, {}), task)
        return prompt

    def of(self, places: Sequence[int] | NDArray[Any]) -> "Prompts":
        """Choose some by their places, or by a mask."""
        return Prompts(self._readers, self.entries_N[places])


def joined(parts: Sequence[Prompts]) -> tuple[Prompts, list[int]]:
    """Put the prompts of several tasks one after the other.

    Returns:
        All, with indices of their own, and the first index of each task.
    """
    readers: list[_Reader] = []
    entries, firsts, first = [], [], 0
    for task, part in enumerate(parts):
        mine = part.entries_N.copy()
        mine["index"] += first
        mine["task"] = task
        firsts.append(first)
        first = int(mine["index"][-1]) + 1
        entries.append(mine)
        readers += part._readers
    return Prompts(readers, np.concatenate(entries)), firsts


def of_one_task(prompts: Prompts, task: int, first: int) -> Prompts:
    """Take the prompts of one task out of those of all, with the indices that its file gives them.

    Args:
        first: index of its first prompt among all.
    """
    mine = prompts.of(prompts.entries_N["task"] == task)
    mine.entries_N["index"] -= first
    return mine


def task_numbers(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """List the number of each prompt's task; nothing is read for it."""
    if isinstance(prompts, Prompts):
        return prompts.entries_N["task"].astype(np.int64)
    return np.array([prompt.task for prompt in prompts], np.int64)


def num_tokens(prompts: Sequence[Prompt]) -> Sequence[int]:
    """Count the token ids of each; nothing is read for it."""
    if isinstance(prompts, Prompts):
        counts: list[int] = prompts.entries_N["tokens"].tolist()
        return counts
    return [len(prompt.token_ids) for prompt in prompts]


def indices_of(prompts: Sequence[Prompt]) -> Sequence[int]:
    """List the ``Prompt.index`` of each; nothing is read for it."""
    if isinstance(prompts, Prompts):
        indices: list[int] = prompts.entries_N["index"].tolist()
        return indices
    return [prompt.index for prompt in prompts]


def chosen(prompts: Sequence[Prompt], wanted: Callable[[int], bool]) -> Sequence[Prompt]:
    """Choose prompts by their ``Prompt.index``; nothing is read for it."""
    places = [place for place, index in enumerate(indices_of(prompts)) if wanted(index)]
    if isinstance(prompts, Prompts):
        return prompts.of(places)
    return [prompts[place] for place in places]


def find_prompt(prompts: Sequence[Prompt], index: int) -> Prompt | None:
    """Find the prompt of an index among those of a file, some of which may have been left out."""
    known = prompts.entries_N["index"] if isinstance(prompts, Prompts) else indices_of(prompts)
    place = bisect_left(known, index)
    return prompts[place] if place < len(known) and known[place] == index else None


@dataclass(frozen=True)
class _Reader:
    """How rows of a file become prompts."""

    path: str
    rows: Rows
    data: DataConfig
    settings: PromptConfig
    tokenizer: "PreTrainedTokenizerBase"
    leading: Sequence[int]

    def entries(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Read all rows: an :data:`_ENTRY` of each."""
        for index, row in enumerate(self.rows):
            prompt = self._made(index, row, row.fields)
            yield row.number, row.start, row.size, index, len(prompt.token_ids), 0

    def prompt(self, index: int, row: Row, task: int) -> Prompt:
        """Read one row again."""
        return self._made(index, row, self.rows.read(row.start, row.size), task)

    def _made(self, index: int, row: Row, found: dict[str, Any], task: int = 0) -> Prompt:
        where, settings = f"{self.path}, {self.rows.unit} {row.number}", self.settings
        fields = shaped(found, self.data, settings.prompt_template, where)
        text, ids = tokenize_line(fields, self.tokenizer, settings, where, self.leading)
        return Prompt(index, text, ids, fields, row.number, self.rows.unit, task)


def load_prompts(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    settings: PromptConfig = _PLAIN,
    *,
    data: DataConfig = _AS_IT_IS,
    max_prompt_tokens: int | None = None,
    filter_overlong: bool | None = False,
) -> Prompts:
    """Read and tokenize a prompts file once, all of it or an error; keep where each prompt is.

    Args:
        path: any of the forms in docs/prompts.md; other keys are kept in ``Prompt.fields``.
        settings: how lines become token ids; a run's ``config.rollout`` is one.
        data: what of the file is read, and under which names.
        max_prompt_tokens: most tokens a prompt may have (context minus the response).
        filter_overlong: leave longer prompts out, and say so on stderr; None: no setting does.

    Returns:
        Prompts in the order of the file; ``index`` counts the lines that hold one from 0, those
        left out included.

    Raises:
        InputError: the file is missing, empty or of another format, a line is broken, or a prompt
            is empty; with the line number. Prompts are too long: all of them are named.
    """
    rows = open_rows(path, data)
    reader = _Reader(str(path), rows, data, settings, tokenizer, leading_ids(tokenizer))
    prompts = Prompts([reader], np.fromiter(reader.entries(), _ENTRY))
    if not prompts:
        raise InputError(f"The prompts file {path} is empty: expected one JSON object per line.")
    if max_prompt_tokens is None:
        return prompts
    return _short_enough(prompts, path, rows.unit, max_prompt_tokens, filter_overlong)


def leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Find the ids that the tokenizer puts before a text, such as BOS.

    Raises:
        InputError: it changes the ids of the text itself when it adds special tokens.
    """
    # A text of more than one id, none of which is a special one.
    bare = tokenizer.encode(_PROBE, add_special_tokens=False)
    whole = tokenizer.encode(_PROBE)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    raise InputError(
        f"The tokenizer makes {bare} of {_PROBE!r}, and {whole} when it adds special tokens: "
        "expected the same ids with others before or after them. Correct its post_processor."
    )


def tokenize_line(
    fields: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    settings: PromptConfig,
    where: str,
    leading: Sequence[int],
) -> tuple[str, tuple[int, ...]]:
    """Make text and token ids of one line of a prompts file; nothing else does.

    A text that no template made gets the special tokens that the tokenizer puts before a text, once
    (it may bring them itself), and none of those that it puts after one.

    Returns:
        The text that the model sees, and its ids.

    Raises:
        InputError: the line is no prompt; says what to write instead.
    """
    line = PromptLine(fields, tokenizer, settings, where)
    messages = line.messages()
    text = str(fields["prompt"]) if messages is None else line.rendered(messages)
    _check_text(text, where)
    # Not verbose: transformers would warn of the first long text and of no other.
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if messages is None:  # a chat template writes BOS itself
        ids = ids if ids[: len(leading)] == list(leading) else [*leading, *ids]
    if not ids:
        raise InputError(f"{where}: the prompt has no tokens. Remove the line.")
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise InputError(
            f"{where}: the prompt begins with {tokenizer.bos_token} twice. Remove it from the line "
            "or, if the chat template writes it twice, from the template."
        )
    return text, tuple(ids)


def check_kwargs_are_read(prompts: Iterable[Prompt], settings: PromptConfig) -> None:
    """Refuse arguments of a chat template that no prompt goes through.

    Raises:
        ConfigError: there are some, and every prompt is plain text.
    """
    if settings.chat_template_kwargs and not any(is_templated(p.fields, settings) for p in prompts):
        raise ConfigError(
            "rollout.chat_template_kwargs is set, but every prompt is plain text, which no chat "
            "template reads. Set rollout.apply_chat_template = true, or remove it."
        )


def is_templated(fields: dict[str, Any], settings: PromptConfig) -> bool:
    """Whether the prompt of a line is made by the chat template."""
    return settings.apply_chat_template or not isinstance(fields.get("prompt"), str)


def check_same_texts(
    path: str | Path,
    prompts: Sequence[Prompt],
    student: "PreTrainedTokenizerBase",
    teacher: "PreTrainedTokenizerBase",
    settings: PromptConfig,
) -> None:
    """Refuse a pair whose tokenizers and chat templates make different texts of the same prompts.

    Templates may differ in what these prompts do not use.

    Raises:
        InputError: the teacher's template makes another text, or none, or its tokenizer begins a
            plain text otherwise; shows where they part.
    """
    _check_same_beginnings(prompts, student, teacher, settings, path)
    templates = (student.chat_template, teacher.chat_template)
    specials = (student.special_tokens_map, teacher.special_tokens_map)
    if templates[0] == templates[1] and specials[0] == specials[1]:
        return
    advice = "If the teacher knows the student's format, give both folders the same chat template."
    for prompt in prompts:
        if not is_templated(prompt.fields, settings):
            continue
        where = f"{path}, {prompt.place}"
        try:
            text, _ = tokenize_line(prompt.fields, teacher, settings, where, ())
        except InputError as error:
            raise InputError(
                f"The teacher's chat template makes no text where the student's does. {error} "
                f"{advice}"
            ) from None
        if text != prompt.text:
            raise InputError(
                f"{where}: the chat templates of student and teacher make different texts. "
                f"{_parting(prompt.text, text)} {advice}"
            )


def _check_same_beginnings(
    prompts: Sequence[Prompt],
    student: "PreTrainedTokenizerBase",
    teacher: "PreTrainedTokenizerBase",
    settings: PromptConfig,
    path: str | Path,
) -> None:
    """Refuse tokenizers of which one puts BOS, say, before a plain text and the other does not."""
    ids = {who: leading_ids(tok) for who, tok in (("student", student), ("teacher", teacher))}
    if ids["student"] == ids["teacher"]:
        return
    plain = next((p for p in prompts if not is_templated(p.fields, settings)), None)
    if plain:
        begins = [f"the {who}'s with {student.decode(found)!r}" for who, found in ids.items()]
        raise InputError(
            f"{path}, {plain.place}: the tokenizers begin a text differently, "
            f"{' and '.join(begins)}: one of the models would read prompts as it never did. Give "
            "both folders the same tokenizer files."
        )


def _parting(student: str, teacher: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b),
        min(len(student), len(teacher)),
    )
    shown = slice(max(0, same - 20), same + 40)
    return (
        f"From character {same} on: student {student[shown]!r}, teacher {teacher[shown]!r} (with "
        "20 characters before)."
    )


def prompts_of_step(n_prompts: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the prompts of one step: a keyed permutation per epoch, no state to save.

    The last ``n_prompts % per_step`` prompts of each permutation sit that epoch out, so no step
    sees a prompt twice.

    Raises:
        ConfigError: the file has fewer prompts than a step needs.
    """
    if per_step > n_prompts:
        raise ConfigError(
            f"rollout.prompts_per_step = {per_step} exceeds the {n_prompts} prompts of the file. "
            "Lower it or add prompts."
        )
    epoch, place = divmod(step, n_prompts // per_step)
    order = permutation(n_prompts, epoch, seed)[place * per_step : (place + 1) * per_step]
    chosen: list[int] = order.tolist()
    return chosen


@lru_cache(maxsize=16)
def permutation(n_prompts: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """Order the prompts of an epoch by keyed draws."""
    key = keyed_seed(seed, Purpose.PROMPT_ORDER)
    draws = keyed_uniform(key, epoch, 0, np.arange(n_prompts))
    return np.argsort(draws, kind="stable")


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompts file, and what makes a text of it."""

    fields: dict[str, Any]
    tokenizer: "PreTrainedTokenizerBase"
    settings: PromptConfig
    where: str

    def messages(self) -> list[dict[str, Any]] | None:
        """The messages that a template is to render; None for a text that stands for itself."""
        messages = self._conversation()
        if not self.settings.system_prompt:
            return messages
        if messages is None:
            raise InputError(
                f"{self.where}: rollout.system_prompt is read by a chat template, but the prompt "
                "is plain text. Set rollout.apply_chat_template = true, or write the words into "
                "rollout.prompt_template."
            )
        if messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.settings.system_prompt}, *messages]

    def _conversation(self) -> list[dict[str, Any]] | None:
        messages, prompt = self.fields.get("messages"), self.fields.get("prompt")
        if messages is not None and prompt is not None:
            raise InputError(
                f'{self.where}: found both "prompt" and "messages", which may differ. Keep the one '
                "that is meant."
            )
        if messages is None and not isinstance(prompt, str | list):
            found = f"keys {sorted(self.fields)}" if prompt is None else f"prompt {prompt!r:.60}"
            raise InputError(
                f'{self.where}: expected "prompt" (a string) or "messages" (a list), found '
                f"{found}. Write {_FORMS}."
            )
        if isinstance(prompt, str):
            return self._of_text(prompt)
        return conversation(prompt if messages is None else messages, self.where)

    def _of_text(self, prompt: str) -> list[dict[str, Any]] | None:
        if not prompt.strip():
            raise InputError(f"{self.where}: the prompt is empty. Remove the line.")
        if self.settings.apply_chat_template:
            return [{"role": "user", "content": prompt}]
        read_by_templates = (*_FOR_TEMPLATE, "chat_template_kwargs")
        if unread := [key for key in read_by_templates if self.fields.get(key)]:
            raise InputError(
                f"{self.where}: {', '.join(unread)} would be read by a chat template, but the "
                'prompt is plain text. Write "messages" instead of "prompt", set '
                "rollout.apply_chat_template = true, or remove the key."
            )
        return None

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        """The text that the template makes, and not of a text that was rendered before."""
        fields, settings = self.fields, self.settings
        own = fields.get("chat_template_kwargs") or {}
        if not isinstance(own, dict):
            raise InputError(
                f'{self.where}: "chat_template_kwargs" must be an object, found {own!r:.60}.'
            )
        beside = {key: fields[key] for key in _FOR_TEMPLATE if fields.get(key) is not None}
        date = settings.chat_template_date
        text = render(
            messages,
            self.tokenizer,
            {**settings.chat_template_kwargs, **own, **beside},
            date=datetime.date.fromisoformat(date) if date else datetime.date.today(),
            where=self.where,
            beside=[k for k, value in fields.items() if value is not None and k not in _READ_BY_US],
        )
        if isinstance(prompt := fields.get("prompt"), str):
            self._check_rendered_once(prompt, text)
        return text

    def _check_rendered_once(self, prompt: str, text: str) -> None:
        before = text.partition(prompt.strip())[0]
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        for token in filter(prompt.lstrip().startswith, filter(None, tokens)):
            if token in before or token == self.tokenizer.bos_token:
                raise InputError(
                    f"{self.where}: the prompt begins with {token}, which the chat template "
                    "writes. Remove it; or, if the text is rendered already, set "
                    "rollout.apply_chat_template = false."
                )


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: the prompt holds half a surrogate pair at character {error.start}, which "
            "is no text. Remove it."
        ) from None


def _short_enough(
    prompts: Prompts, path: str | Path, unit: str, most: int, filter_overlong: bool | None
) -> Prompts:
    entries_N = prompts.entries_N
    fits_N = entries_N["tokens"] <= most
    kept, long = prompts.of(fits_N), entries_N[~fits_N]
    if not len(long):
        return prompts
    named = ", ".join(
        f"{unit} {number} ({tokens} tokens)" for number, *_, tokens, _ in long[:_MAX_NAMED].tolist()
    )
    if len(long) > _MAX_NAMED:
        longest = long["tokens"].max()
        named += f" and {len(long) - _MAX_NAMED} more, of up to {longest} tokens"
    limit = f"at most {most} fit (context of the models minus the longest response)"
    if filter_overlong and kept:
        print(
            f"tropd: warning: {path}: {len(long)} of {len(prompts)} prompts are left out, {limit}: "
            f"{named}.",
            file=sys.stderr,
        )
        return kept
    advice = "Shorten or remove them, or allow fewer new tokens."
    if filter_overlong is not None:
        advice = (
            "Shorten or remove them, allow fewer new tokens, or leave them out "
            "(rollout.filter_overlong_prompts = true, or --filter-overlong-prompts of a tool)."
        )
    # The first line directly after the path, as in every other message.
    raise InputError(
        f"{path}, {named}: {len(long)} of {len(prompts)} prompts are too long, {limit}. {advice}"
    )
