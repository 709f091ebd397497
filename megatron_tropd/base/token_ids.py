"""Token ids in a model's JSON files, in every form that they are found in."""

from typing import Any

from megatron_tropd.base.errors import InputError


def parse_token_ids(value: Any, where: str) -> tuple[int | str, ...]:
    """The ids that a JSON value names: 2, [2, 13], [[2], [13]], "2", "</s>", null.

    Returns:
        Ids, and texts of tokens whose ids the tokenizer knows, in their order.

    Raises:
        InputError: it is something else.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, list):
        return tuple(token for part in value for token in parse_token_ids(part, where))
    if isinstance(value, str):
        return (int(value) if value.isascii() and value.isdecimal() else value,)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return (value,)
    raise InputError(
        f"{where} must be a token id, a list of them, or null, found {value!r}. Correct the file."
    )
