"""A process that grades: a verdict for each request.

    python -m megatron_tropd.tasks.grading_worker FD '{"name": "math", "pattern": "", "mib": 2048}'

Who started it limits its time. math-verify's own limit is an alarm signal, which works in a main
thread alone and does not interrupt a long operation of C, such as 9^9^9^9; so it is switched off.
"""

import collections
import logging
import re
import resource
from typing import Any

from megatron_tropd.base import workers
from megatron_tropd.base.parts import load_part


def main() -> None:
    """Answer until nobody asks any more."""
    channel, settings = workers.start()
    if ":" not in settings["name"]:  # one of the user's may import what takes more
        limit = settings["mib"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    workers.serve(channel, _prepared(settings))


def _prepared(settings: dict[str, Any]) -> workers.Answer:
    """What answers requests, with its imports done."""
    if ":" in settings["name"]:
        own = load_part("", settings["name"], attribute="", setting="grader.name")
        return lambda request: {"correct": own(request["response"], request["problem"])}
    if settings["name"] == "regex":
        pattern = re.compile(settings["pattern"])
        return lambda request: {"found": _last(pattern, request["response"])}
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401

    return lambda request: {"correct": same_mathematics(request["response"], request["answer"])}


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    last = collections.deque(pattern.finditer(text), maxlen=1)
    return (last[0][1] if pattern.groups else last[0][0]) if last else None


def same_mathematics(response: str, answer: str) -> bool | None:
    """Whether two formulas are the same by math-verify; None: it cannot read one of them."""
    from math_verify import verify

    one, other = _parsed(response), _parsed(answer)
    if one is None or other is None:
        return None
    return verify(other, one, timeout_seconds=None, raise_on_error=True)


def _parsed(text: str) -> list[Any] | None:
    """What math-verify reads in a formula: an expression, and its text."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        f"${text.strip().strip('$')}$",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return found if any(not isinstance(item, str) for item in found) else None


if __name__ == "__main__":
    main()
