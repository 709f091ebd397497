r"""Answers as values: what a mark says, and whether two of them say the same.

:func:`read_answer` turns a text into one of six kinds; :func:`compare` says True, False, or None:
the two may or may not be the same, and this module cannot tell (``x(x+1)`` and ``x^2+x``, a number
in other units, a letter and the text of its option). Nothing is guessed: a text that is not read as
a whole is compared as text.

Why not math-verify alone: docs/graders.md has the comparison. It knows no third verdict, no scales
and few words, and takes ``2x = 10`` for 10. ``grader.name = "math"`` asks it what stays open here.
"""

import ast
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any

_LONGEST_CONSTANT = 200  # characters; deeper nesting than that is no answer
_LONGEST_READ = 400  # characters; a longer text is compared as text
_MOST_BITS = 4096  # of an exact power
_EXACT_DIGITS = 4
"""Significant digits from which a rounded decimal stands for a fraction that has no end: 0.3333."""

LITERAL = (
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,400})(?![\d])(?:\.\d{1,400})?|\.\d{1,400})"
    r"(?:e[+-]?\d{1,3}(?!\w))?"
)
"""Pattern of a number in digits, without its sign."""
_PLAIN = re.compile(rf"[-+]? ?{LITERAL}")
_FREE_NUMBER = re.compile(
    rf"(?<![\w.,/^*+\\(\[=:-])([$€£¥₹]?[-+]?[$€£¥₹]?)({LITERAL})(?![\w/^*(:]|[.,]\d)"
)
_ANY_NUMBER = re.compile(rf"(?<![\w.]){LITERAL}")
_CURRENCY = re.compile(r"([-+]?)\s*(?:us)?([$€£¥₹])\s*")
_MIXED = re.compile(r"(?<![\d./^*)])(\d+) (\d+) ?/ ?(\d+)(?![\d./^])")
_CONSTANT = re.compile(r"(?:[\d.,+\-*/^() ]|\de[+-]?\d|sqrt|pi|inf)+")
_NAME = re.compile(
    r"(\\?[a-z](?:_?\(?\w\)?)?|[a-z]{3,}(?: [a-z]{2,})*) ?(?:=|:=|\bis\b|\bequals\b) ?"
)
_CHOICE = re.compile(
    r"(?:(?:option|choice) )?(?:\(([a-j])\)|([a-j])(?=[).:]|$))"
    # Another letter beside it, or a word against it, is no text of the option.
    r"(?:[).:]+|$| (?=[a-z\d]))(?! ?(?:(?:or|and)\b|is (?:wrong|incorrect|false|not)\b)"
    r"| ?\(?[a-j][).:]*(?: |$))(?: ?[^ ].*)?"
)
_SINGLE_CHOICE = re.compile(r"(?:(?:option|choice) )?([a-j])")
_YES_NO = re.compile(
    r"(yes|no|true|false)"
    # true, false, true are three answers; yes, no remainder is one.
    r"(?: ?(?:[,.;:!]|- )(?! ?(?:(?:or|and|but) )?(?:yes|no|true|false)(?: ?[^\w ]|$)).*)?"
)
_WORD = re.compile(r"[^\W\d_]+(?:['.-][^\W\d_]+)*")
_CODE = re.compile(r"[^\W\d_]+\d\w*")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_UNIT_SYMBOLS = _set(
    "m mm cm dm km in ft yd mi g kg mg lb lbs oz s ms h hr hrs min l ml dl cl gal pt qt kj cal "
    "kcal kw kwh pa kpa hz khz mhz ghz kb mb gb tb mph kph ° °c °f °k $ € £ ¥ ₹ ¢ usd eur gbp "
    "deg rad mol px sq cu pm am"
)
_UNIT_NAMES = {
    other: name
    for name, others in {
        **{"$": "dollar usd buck", "€": "euro eur", "£": "gbp", "¢": "cent", "°": "degree deg"},
        **{"h": "hr hour", "min": "minute", "s": "second sec", "sq": "square"},
        **{"m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre"},
        **{"km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "mi": "mile"},
        **{"g": "gram", "kg": "kilogram", "lb": "pound lb", "l": "liter litre"},
    }.items()
    for other in others.split()
}
_SCALES = {
    **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"dozen": 12, "lakh": 10**5, "crore": 10**7, "bn": 10**9},
}
_NUMBER_WORDS = _set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand million billion trillion dozen half halves third thirds quarter "
    "quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth "
    "ninths tenth tenths hundredth hundredths thousandth thousandths once twice thrice none nothing"
)
_CHANGES_A_NUMBER = _NUMBER_WORDS | _set(
    "not no never neither nor least most than over under above below between except plus minus "
    "times divided squared cubed cube root factorial power mod modulo remainder choose log ln exp "
    "sin cos tan sqrt negative if unless otherwise but wait either maybe through until infinity pi "
    "base cannot doubled tripled quadrupled halved tens score gross mil mn bil onward onwards "
    "upward upwards unsure"
)
"""Words beside a number that make it another number, or several, or none."""
_CHANGES_WHAT_FOLLOWS = re.compile(
    r"\b(?:(?:opposite|inverse|reciprocal|complement|squares?|cubes?|roots?|multiples?|factors|"
    r"divisors?|logarithm|doubles?|triples?|quadruple) of|divisible by|unequal to|double|doubling|"
    r"triple|tripling|quadruple|without|excluding|beyond|exceed|exceeds|exceeding) $"
)
_DENIES_WHAT_PRECEDES = re.compile(
    r"(?: ?[ai]\b(?! \w)"
    r"| (?:is|was|seems|looks) (?:wrong|incorrect|impossible|invalid|false|too)\b)"
)
"""The imaginary unit among them: 5 i, but 5 a day."""


@dataclass(frozen=True)
class Number:
    """A number, perhaps with a unit."""

    value: Fraction | float
    """Exact, or a float if it is irrational or infinite."""
    places: int | None = None
    """Digits after the point of a decimal; None if it is written without one."""
    digits: int = 0
    """Significant digits of a decimal."""
    percent: bool = False
    unit: str = ""
    """In one spelling; empty: none was written."""
    grouped: bool = False
    """Whether it was written with separators, so that it may also be a list (1,200)."""


@dataclass(frozen=True)
class Listing:
    """Several answers: a tuple, an interval, a set, or a plain enumeration."""

    brackets: str
    """"()", "[)", ...; "{}" for a set; empty for an enumeration."""
    items: tuple["Answer", ...]
    comma: Fraction | None = None
    """The value if the list may as well be one number with a decimal comma (3,5)."""


@dataclass(frozen=True)
class Named:
    """``x = 5``."""

    name: str
    value: "Answer"


@dataclass(frozen=True)
class Choice:
    """The letter of an option."""

    letter: str


@dataclass(frozen=True)
class Words:
    """Words that are an answer by themselves: Paris, yes, no solution, CO2."""

    text: str


@dataclass(frozen=True)
class Other:
    """Anything else: an expression, a sentence, a matrix. Equal only to the same text."""

    text: str


Answer = Number | Listing | Named | Choice | Words | Other


def same_text(one: str, other: str) -> bool:
    """Whether two answers are the same text, but for LaTeX's layout, markup, case and spaces."""
    return one.strip() == other.strip() or _key(normalise(one)) == _key(normalise(other)) != ""


def read_answer(text: str) -> Answer:
    """What a mark says.

    Returns:
        The most definite kind that the whole text is.
    """
    text = normalise(text)
    return _read(text) if len(text) <= _LONGEST_READ else Other(_key(text))


def compare(one: Answer, other: Answer) -> bool | None:
    """Whether two answers say the same.

    Returns:
        True, False, or None if this cannot be told.
    """
    if one == other:
        return True
    if isinstance(one, Named) or isinstance(other, Named):
        return _compare_named(one, other)
    for kinds, rule in _RULES:
        if isinstance(one, kinds[0]) and isinstance(other, kinds[1]):
            return rule(one, other)
        if isinstance(other, kinds[0]) and isinstance(one, kinds[1]):
            return rule(other, one)
    return None


# ---------------------------------------------------------------- text

_SUPERSCRIPTS = str.maketrans({"²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "ⁿ": "^n", "º": "°"})
_LETTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00d7\u22c5\u00b7\u2217", "*"),
        **dict.fromkeys("\u00f7\u2044\u2215", "/"),
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("\u2018\u2019`\u00b4", "'"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u3000", " "),
        **{
            "√": "sqrt ",
            "π": "pi",
            "∞": "inf",
            "\uff0c": ",",
            "\u3002": ".",
            "\u3001": ",",
            "\uff1b": ";",
        },
        **{"\u200b": "", "\ufeff": "", "\u2060": ""},
    }
)


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), made) for pattern, made in rules]


_LATEX = _rules(
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])\.?", ""),
    (r"\\!|\\[()\[\]]", ""),
    (r"\\[,;: ]|\\q?quad(?![a-zA-Z])|(?<!\\)~", " "),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|\\degrees?(?![a-zA-Z])", "°"),
    (r"\\(?:cdot|times|ast)(?![a-zA-Z])", "*"),
    (r"\\div(?![a-zA-Z])", "/"),
    (r"\\pm(?![a-zA-Z])", "±"),
    (r"\\infty(?![a-zA-Z])", "inf"),
    (r"\\pi(?![a-zA-Z])", "pi"),
    (r"\\leq?(?:slant)?(?![a-zA-Z])", "≤"),
    (r"\\geq?(?:slant)?(?![a-zA-Z])", "≥"),
    (r"\\neq?(?![a-zA-Z])", "≠"),
    (r"\\(?:lbrace|\{)", "⦃"),
    (r"\\(?:rbrace|\})", "⦄"),
    (r"(?<!\\)\\([%#&_])", r"\1"),
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"),
    (r"\*\*|(?<!\w)__|__(?!\w)", ""),
    (r"(?i)(?<![\w/])(?:negative|minus) (?=[\d$.])", "-"),
)
_INNERMOST = _rules(
    (
        r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|"
        r"mathbb|mathcal|mbox|hbox|fbox|boxed|emph|operatorname|boldsymbol)\*?\s*\{([^{}]*)\}",
        r" \1 ",
    ),
    (r"\\frac\s*([\d])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}"),
    # A whole number before a fraction of numbers is a mixed number, as in print.
    (
        r"(?<![\d.^*/)])(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}",
        r"(\1+\2/\3)",
    ),
    (r"\\frac\s*\{\s*([\w.]*)\s*\}\s*\{\s*([\d.]+|\w)\s*\}", r"(\1/\2)"),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt\s*([\d])", r"sqrt(\1)"),
    (r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)"),
    # x^{2y} is not x^{2}y, nor 10^{2}5 10^{25}.
    (r"\^\s*\{\s*(-?[\d.]+|\w)\s*\}(?![\d.])", r"^\1"),
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
)


def normalise(text: str) -> str:
    """One spelling of a text: LaTeX's commands, Unicode's variants and markup are taken away.

    Returns:
        The text in lower case with single spaces; braces of LaTeX have become parentheses.
    """
    text = "".join(map(_fraction_sign, _trimmed(text).translate(_SUPERSCRIPTS)))
    text = unicodedata.normalize("NFKC", text).translate(_LETTERS)
    if text.count("$") - text.count("\\$") >= 2:
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = reduce(lambda t, rule: rule[0].sub(rule[1], t), _LATEX, text.replace("\\$", "$"))
    text = _braces(text).casefold()
    text = re.sub(r"^\s*([-+±]) +(?=[\d.$(])", r"\1", text)
    text = _unquoted(" ".join(text.split()).replace(" ^", "^"))
    if text[:1] == text[-1:] in ("*", "_"):
        text = text.strip("*_ ")
    return _unquoted(_trimmed(text))


def _unquoted(text: str) -> str:
    """The text without the quotes around it; a lone one at the end is a prime: x'."""
    quoted = text.strip(' "')
    bare = quoted.lstrip("' \"")
    return bare.rstrip("' \"") if bare != quoted else quoted


def _trimmed(text: str) -> str:
    """The text without the punctuation and spaces around it, but for a point that begins it."""
    return text.lstrip(":;,= \t\n").rstrip(".,;:? \t\n")


def _fraction_sign(letter: str) -> str:
    """``½`` as `` 1/2``: one glyph, which must not join the digit before it."""
    if not unicodedata.decomposition(letter).startswith("<fraction>"):
        return letter
    return " " + unicodedata.normalize("NFKC", letter)


def _braces(text: str) -> str:
    """Fractions, roots and powers from the inside out; what braces are left are parentheses."""
    if re.fullmatch(r"\s*\{[^{}\\]*[,;][^{}\\]*\}\s*", text):  # a set without its backslashes
        text = text.replace("{", "⦃").replace("}", "⦄")
    for _ in range(20):
        before = text
        for pattern, made in _INNERMOST:
            text = pattern.sub(made, text)
        if text == before:
            break
    return text.replace("{", "(").replace("}", ")")


def _key(text: str) -> str:
    """The text without the spaces that separate nothing, and without parentheses around it all."""
    # 1, 200 are two numbers and 1,200 may be one.
    text = re.sub(r"(?<=\d), (?=\d{3}(?!\d))", ",\N{NO-BREAK SPACE}", text)
    text = re.sub(r"(?<![\w.]) | (?![\w.])", "", text)
    while (inner := _unwrapped(text, "()")) is not None and "," not in inner:
        text = inner
    return text


def _unwrapped(text: str, brackets: str) -> str | None:
    """What stands between the brackets if they enclose the whole text, else None."""
    if len(text) < 2 or text[0] != brackets[0] or text[-1] != brackets[1]:
        return None
    depth = 0
    for letter in text[1:-1]:
        depth += (letter in "([⦃") - (letter in ")]⦄")
        if depth < 0:
            return None
    return None if depth else text[1:-1].strip()


# ---------------------------------------------------------------- reading


def _read(text: str, *, inside: bool = False) -> Answer:
    """``inside``: it is an item of a list, so no list itself unless it has brackets."""
    if found := _YES_NO.fullmatch(text):
        return Words({"true": "yes", "false": "no"}.get(found[1], found[1]))
    if found := _SINGLE_CHOICE.fullmatch(text) or (None if inside else _CHOICE.fullmatch(text)):
        return Choice(next(group for group in found.groups() if group))
    number = _number(text)
    if number is not None:
        return number
    listing = _listing(text, inside=inside)
    if listing is not None:
        return listing
    if (found := _NAME.match(text)) and (rest := text[found.end() :]) and "=" not in rest:
        return Named(found[1].strip("\\ "), _read(rest, inside=True))
    before, equals, after = text.rpartition("=")
    if equals and all(_equals(part, after) for part in before.split("=")):
        return _read(after.strip(), inside=True)
    if (inner := _unwrapped(text, "()")) is not None:
        return _read(inner, inside=True)
    return _words(text) or _number_in_a_sentence(text) or Other(_key(text))


def _equals(constant: str, result: str) -> bool:
    """Whether a constant may be what follows its equals sign."""
    value = _constant(constant.strip())
    if value is None:
        return False
    return compare(Number(value), _read(result.strip(), inside=True)) is not False


def _number(text: str) -> Number | None:
    """A number by itself: with a sign, a currency, a percent sign, a scale or a unit."""
    body, percent = re.subn(r" ?(?:%|\bper ?cent\b)$", "", text)
    unit = ""
    if found := _CURRENCY.match(body):
        body, unit = found[1] + body[found.end() :], found[2]
    plain = _literal(body)
    if plain is None and (value := _constant(body)) is not None:
        plain = Number(value)
    if plain is None and not percent:
        plain, suffix = _with_suffix(body)
        if unit and suffix not in ("", unit):
            return None
        unit = suffix or unit
    if plain is None:
        return None
    return replace(plain, percent=bool(percent), unit=unit)


def _with_suffix(text: str) -> tuple[Number | None, str]:
    """A number and the unit after it; a scale (5 million) is multiplied in."""
    found = re.search(r"(?<![a-z])(?!sqrt|pi\b|inf\b|e[+-]?\d)[^\W\d_]|[°€£¥₹¢$]", text)
    if not found:
        return None, ""
    body, suffix = text[: found.start()], text[found.start() :]
    scale, _, rest = suffix.partition(" ")
    factor = _SCALES.get(scale.removesuffix("s"), 1)
    if factor != 1:
        suffix = rest
    unit = _unit(suffix, attached=bool(body) and not body.endswith((" ", "-")))
    plain = _literal(body.strip(" -"[: 1 + body.rstrip().endswith("-")]))
    if plain is None and (value := _constant(body.strip())) is not None:
        plain = Number(value)
    if plain is None or unit is None:
        return None, ""
    if factor != 1:
        plain = Number(plain.value * factor, grouped=plain.grouped)
    return plain, unit


def _unit(text: str, *, attached: bool) -> str | None:
    """One spelling of a unit; None if the text is none."""
    names = []
    for place, token in enumerate(re.split(r"[ /*]+", text) if text else []):
        found = re.fullmatch(r"([^\W\d_]+|°[cfk]?|[€£¥₹¢$])\.?(\^?-?\d)?", token)
        if not found:
            return None
        name = found[1]
        # 5x and 5m may be products of a variable, 5 m and 5 cm are not.
        known = name in _UNIT_SYMBOLS and not (attached and place == 0 and name in "mgshl")
        if not known and ((attached and not place) or not _is_unit_word(name, first=not place)):
            return None
        names.append(_unit_name(name, known) + (found[2] or "").removeprefix("^"))
    return " ".join(names)


def _is_unit_word(name: str, *, first: bool) -> bool:
    if len(name) < 3:
        return not first and name in ("of", "a", "an", "to")
    return name not in _CHANGES_A_NUMBER and len(name) <= 30


def _unit_name(name: str, known: bool) -> str:
    singular = name if known or len(name) < 3 else name.removesuffix("s")
    return _UNIT_NAMES.get(name) or _UNIT_NAMES.get(singular) or singular


def _literal(text: str) -> Number | None:
    """A number written in digits."""
    if not _PLAIN.fullmatch(text):
        return None
    digits = text.replace(",", "").replace(" ", "")
    mantissa, _, _ = digits.partition("e")
    _, point, after = mantissa.partition(".")
    if not point or "e" in digits:
        return Number(Fraction(digits), grouped="," in text or " " in text.strip("+- "))
    significant = len(mantissa.replace(".", "").strip("+-").lstrip("0"))
    return Number(Fraction(digits), len(after), significant, grouped="," in text)


def _constant(text: str) -> Fraction | float | None:
    """The value of an expression of numbers, pi and square roots; None if it is not one."""
    if not text or len(text) > _LONGEST_CONSTANT or not _CONSTANT.fullmatch(text):
        return None
    if re.fullmatch(r"\d+(?: ?- ?\d+)+|\d+(?:/\d+){2,}", text) or ("(" in text and "," in text):
        return None  # a range, a date, a pair
    text = _MIXED.sub(_mixed, text)
    text = re.sub(LITERAL, lambda found: re.sub("[, ]", "", found[0]), text)
    if re.search(r"[\d.] +[\d.]|,|/ ?[\d.]+ ?(?=\(|sqrt|pi)|\) ?[\d.]|\*\*|//", text):
        return None  # not one number, or 1/2x, which is read in two ways
    text = re.sub(r"sqrt ?(\d+(?:\.\d+)?)", r"sqrt(\1)", text)
    text = re.sub(r"(?<=[\d)]) ?(?=\(|sqrt|pi|inf)|(?<=pi) ?(?=\(|sqrt)", "*", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text).replace("^", "**").strip()
    if re.search(r"\.(?!\d)|\d(?:[a-df-z]|e(?![+-]?\d))", text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _mixed(found: re.Match[str]) -> str:
    proper = int(found[2]) < int(found[3])
    return f"({found[1]}+{found[2]}/{found[3]})" if proper else found[0]


def _value(node: ast.expr) -> Fraction | float:
    """The value of a parsed constant; ValueError if it holds anything else."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(repr(number))
        case ast.Name(id="pi" | "inf" as name):
            return {"pi": math.pi, "inf": math.inf}[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument]):
            return _power(_value(argument), Fraction(1, 2))
        case ast.BinOp(left=left, op=operation, right=right):
            return _apply(operation, _value(left), _value(right))
    raise ValueError("no constant")


def _apply(operation: ast.operator, a: Fraction | float, b: Fraction | float) -> Fraction | float:
    match operation:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div():
            return a / b
        case ast.Pow():
            return _power(a, b)
    raise ValueError("no operation of a constant")


def _power(base: Fraction | float, exponent: Fraction | float) -> Fraction | float:
    """Exact if the result is a fraction."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent.numerator) > _MOST_BITS:
                raise ValueError("too large")
            return base**exponent.numerator
        if exponent == Fraction(1, 2) and base >= 0:
            roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if roots[0] ** 2 == base.numerator and roots[1] ** 2 == base.denominator:
                return Fraction(*roots)
    result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ValueError("no real number")
    return result


def _listing(text: str, *, inside: bool) -> Listing | Other | None:
    """Several answers; None if the text is one."""
    for opening, closing in (("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), ("⦃", "⦄")):
        inner = _unwrapped(text, opening + closing)
        if inner is None:
            continue
        if re.search(r"\d,\d{3}(?!\d)", inner):
            return Other(_key(text))  # (1,200): a number or a pair
        parts = _parts(inner, r"[,;]")
        if len(parts) == 1 and opening == "(":
            return None
        brackets = "{}" if opening == "⦃" else opening + closing
        return Listing(brackets, tuple(_read(part, inside=True) for part in parts))
    if inside:
        return None
    parts = _parts(text, r"[,;]| (?:and|or|&) |(?<=[,;]) ?(?:and|or) ")
    if len(parts) == 1:
        return None
    comma = re.fullmatch(r"([-+]?\d+(?:\.\d{3})*),(\d+)", text)
    return Listing(
        "",
        tuple(_read(part, inside=True) for part in parts),
        Fraction(f"{comma[1].replace('.', '')}.{comma[2]}") if comma else None,
    )


def _parts(text: str, separator: str) -> list[str]:
    """The text cut at separators outside brackets; those within a number do not count."""
    parts, depth, start, place = [], 0, 0, 0
    pattern = re.compile(separator)
    while place < len(text):
        if number := _ANY_NUMBER.match(text, place):
            place = number.end()
            continue
        depth += (text[place] in "([⦃") - (text[place] in ")]⦄")
        found = pattern.match(text, place) if depth == 0 else None
        if found:
            parts.append(text[start:place].strip())
            start = found.end()
        place = found.end() if found else place + 1
    parts.append(text[start:].strip())
    return [re.sub(r"^(?:and|or) ", "", part) for part in parts if part]


def _words(text: str) -> Words | None:
    """Words alone, or one code such as CO2."""
    if _CODE.fullmatch(text):
        return Words(text)
    tokens = text.split()
    if not tokens or not all(_WORD.fullmatch(token.strip(".,!?'\"")) for token in tokens):
        return None
    # One or two letters may be a variable or a product; letters of other scripts are words.
    if len(text) < 3 and text.isascii():
        return None
    if any(len(token) == 1 and token.isascii() and token not in "ai" for token in tokens):
        return None
    return Words(" ".join(token.strip(".,!?'\"") for token in tokens))


def _number_in_a_sentence(text: str) -> Number | None:
    """The number of a sentence that holds one, stands free in it and is not changed by a word."""
    found = list(_FREE_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    number = found[0]
    before, after = text[: number.start()], text[number.end() :]
    if _CHANGES_WHAT_FOLLOWS.search(before) or _DENIES_WHAT_PRECEDES.match(after):
        return None
    percent = re.match(r" ?(?:%|per ?cent\b)", after)
    rest = before + " " + (after[percent.end() :] if percent else after)
    if not all(_is_harmless(token) for token in rest.replace(",", " ").replace(";", " ").split()):
        return None
    plain = _literal(number[1].strip("$€£¥₹") + number[2])
    return plain and replace(plain, percent=bool(percent))


def _is_harmless(token: str) -> bool:
    """Whether a word beside a number leaves it what it is."""
    word = token.strip(".!?'\"")
    if len(word) == 1 and word.isascii():
        return word in "ai"
    changes = word in _CHANGES_A_NUMBER or word.endswith("n't")
    return not changes and _WORD.fullmatch(word) is not None


# ---------------------------------------------------------------- comparing


def _compare_named(one: Answer, other: Answer) -> bool | None:
    values = [a.value if isinstance(a, Named) else a for a in (one, other)]
    verdict = compare(*values)
    if isinstance(one, Named) and isinstance(other, Named) and one.name != other.name:
        return None if verdict else verdict
    return verdict


def _compare_numbers(one: Number, other: Number) -> bool | None:
    equal = _equal_values(one, other)
    if one.percent != other.percent:
        part, whole = (one, other) if one.percent else (other, one)
        return equal or part.value / 100 == whole.value
    if one.unit and other.unit and one.unit != other.unit:
        return None  # 1 m and 100 cm, 5 m and 5 meters of rope
    return equal


def _equal_values(one: Number, other: Number) -> bool | None:
    """Exactly equal, or one a decimal that rounds the other, which has no end as a decimal."""
    if one.value == other.value:
        return True
    exact = isinstance(one.value, Fraction) and isinstance(other.value, Fraction)
    if exact and (one.places is None) == (other.places is None):
        return False
    try:
        return _nearly_equal(one, other, exact=exact)
    except OverflowError:  # a float beside a number that no float holds
        return False


def _nearly_equal(one: Number, other: Number, *, exact: bool) -> bool | None:
    if (one.places is None) == (other.places is None):
        return math.isclose(one.value, other.value, rel_tol=1e-12)
    decimal, whole = (one, other) if one.places is not None else (other, one)
    if isinstance(whole.value, Fraction) and _ends(whole.value):
        return False
    gap: Fraction | float = abs(decimal.value - whole.value) * 10 ** (decimal.places or 0)
    rounded = gap <= Fraction(1, 2)
    cut = gap < 1 and abs(float(decimal.value)) < abs(float(whole.value))
    if not (rounded or cut):
        return False
    # pi is not 3.1416, and 0.33 or 0.666 is said for a third and two thirds or in error.
    return True if exact and rounded and decimal.digits >= _EXACT_DIGITS else None


def _ends(value: Fraction) -> bool:
    """Whether a fraction is a finite decimal."""
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _compare_listings(one: Listing, other: Listing) -> bool | None:
    if len(one.items) != len(other.items):
        vague = any(isinstance(item, Other) for item in (*one.items, *other.items))
        return None if vague else False
    in_order = _all([compare(a, b) for a, b in zip(one.items, other.items, strict=True)])
    kinds = {one.brackets, other.brackets}
    if kinds <= {"", "{}"}:
        anyhow = _as_sets(one.items, other.items)
        return anyhow if "{}" in kinds or in_order or not anyhow else None
    if len(kinds) == 1:
        return in_order
    if "" in kinds or "{}" in kinds:  # a pair, and two answers
        return None if _as_sets(one.items, other.items) is not False else False
    return False


def _as_sets(one: Sequence[Answer], other: Sequence[Answer]) -> bool | None:
    """Whether the items are the same in some order."""
    if len(one) > 50:
        return None
    left, doubtful = list(other), False
    for item in one:
        verdicts = [compare(item, candidate) for candidate in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            doubtful = True
        else:
            return False
    return None if doubtful else True


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _compare_listing_and_number(listing: Listing, number: Number) -> bool | None:
    items = listing.items
    doubtful = number.grouped or len(items) == 1 or listing.comma == number.value
    if not listing.brackets:  # 2 hours and 30 minutes, 5 and a half, 5 and 1/2: one number
        doubtful |= any(_is_part(item) for item in items)
        values = [item.value for item in items if isinstance(item, Number)]
        doubtful |= len(values) == len(items) and sum(values) == number.value
    return None if doubtful or any(isinstance(item, Other) for item in items) else False


def _is_part(item: Answer) -> bool:
    """Whether something may be a part of one number with the others."""
    if isinstance(item, Words):
        return bool(_NUMBER_WORDS & set(item.text.split()))
    return isinstance(item, Number) and bool(item.unit)


def _compare_words(one: Words, other: Words) -> bool | None:
    longer, shorter = sorted((one.text, other.text), key=len, reverse=True)
    return None if f" {shorter} " in f" {longer} " else False


def _compare_words_and_number(words: Words, _: Number) -> bool | None:
    spelled = _NUMBER_WORDS & set(re.split(r"[ -]", words.text))
    return None if spelled else False


def _compare_listing_and_words(listing: Listing, words: Words | Choice) -> bool | None:
    verdicts = [compare(item, words) for item in listing.items]
    return False if all(verdict is False for verdict in verdicts) else None


def _compare_text_and_number(text: Other, number: Number) -> bool | None:
    """A sentence that does not hold the number is not it; an expression may be."""
    words = re.findall(r"[^\W\d_]{2,}", text.text)
    if len(words) < 3 or _NUMBER_WORDS & set(words) or re.search(r"[\\^=_]|sqrt", text.text):
        return None
    found = [_literal(literal) for literal in _ANY_NUMBER.findall(text.text)]
    near = any(n is not None and _equal_values(n, number) is not False for n in found)
    return None if near else False


_RULES: tuple[tuple[tuple[type, type], Callable[[Any, Any], bool | None]], ...] = (
    ((Number, Number), _compare_numbers),
    ((Listing, Listing), _compare_listings),
    ((Listing, Number), _compare_listing_and_number),
    ((Listing, Words), _compare_listing_and_words),
    ((Listing, Choice), _compare_listing_and_words),
    ((Words, Words), _compare_words),
    ((Words, Number), _compare_words_and_number),
    ((Other, Number), _compare_text_and_number),
    ((Choice, Choice), lambda one, other: one == other),
)
"""For two kinds, in either order. Any other pair cannot be judged: a letter and the text of its
option, an expression and what it may simplify to."""
