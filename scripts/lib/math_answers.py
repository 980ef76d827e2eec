"""MATH's answers: which one a text gives, and whether two say the same in another notation.

    final_math("so $x = \\boxed{\\frac{1}{2}}$.")        -> "\\frac{1}{2}"
    same_math("\\dfrac12", "0.5")                        -> True

A text's answer is the last \\boxed{...}; without one what follows the last "answer is" or "answer:", to the
end of the formula, sentence or line; without that its last number. Two answers are the same when, after what
is only typography is taken away ($, \\left, \\dfrac, units, degrees, %, the commas of 1,234, "x =" in front),
they are the same text, or the same value: both are evaluated, as fractions as far as that goes, letters at
arbitrary points, so 2k+2 is 2(k+1) and \\frac{\\sqrt3}{3} is 1/\\sqrt{3}; 0.33 is not \\frac13, but
0.\\overline{3} is. Tuples, intervals and matrices are compared place by place; lists without brackets (also
with "and", "or"), {sets}, unions and the two values of a \\pm in any order; equations up to a factor;
inequalities as intervals. Words and numbers beside a number do not multiply it: 3 \\text{ and } 4 is a list,
and 1 2 is no product. A number in another base is only what is written alike, and so is what is too long or
too large to compute with: the time is bounded whatever the text.
"""

import cmath
import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

ANSWER_IS = re.compile(r"(?i:\banswer[*_\s]*(?:is\b|:)[*:\s]*)")
LAST_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?")
FUNCTIONS = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "log": cmath.log,
    "ln": cmath.log,
    "exp": cmath.exp,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
}
SIGNS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00a0\u2009\u202f", " "),
    **dict.fromkeys(("\u00b7", "\u00d7", "\\times"), "\\cdot "),
    **dict.fromkeys(("\u2026", "...", "\\dots"), "\\ldots"),
    **dict.fromkeys(("\\div", "\u00f7", "\u2044"), "/"),
    **dict.fromkeys(("\\lvert", "\\rvert", "\\vert"), "|"),
    **dict.fromkeys(("\u2205", "\\varnothing"), "\\emptyset "),
    **dict.fromkeys(("\u2264", "<="), "\\le "),
    **dict.fromkeys(("\u2265", ">="), "\\ge "),
    "\u2260": "\\ne ",
    "\\lt": "<",
    "\\gt": ">",
    "\u2208": "\\in ",
    "\u00b0": "",
    "\u03c0": "\\pi ",
    "\u03b8": "\\theta ",
    "\u221a": "\\sqrt ",
    "\u221e": "\\infty ",
    "\u222a": "\\cup ",
    "\u00b1": "\\pm ",
    "{,}": ",",
    "\\lbrace": "\\{",
    "\\rbrace": "\\}",
    "**": "^",
    **dict.fromkeys(("\\mathbb{R}", "\\mathbb R", "\u211d"), "(-\\infty,\\infty)"),
    "\u2213": "\\mp ",
    **{char: "^" + digit for char, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")},
    **{
        char: f"\\frac{above}{below}"
        for char, above, below in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")
    },
}
LETTERS = re.compile(
    "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|(?:var)?phi|chi|psi|omega"
    "|Delta|Gamma|Lambda|Omega|Phi|Pi|Psi|Sigma|Theta|Xi|ell|infty"
)
NAME = re.compile(
    r"((?:\\?[a-zA-Z]|\\[a-z]{2,}|\\angle\s*[A-Z]+|[A-Z]{2,3})(?:_\w)?(?:\^\{?-1\}?)?(?:\([a-zA-Z]\))?"
    r"|\([a-z](?:,\s*[a-z])+\))\s*(?:=|\\in(?![a-zA-Z]))\s*(?=\S)"
)
ARRAY = re.compile(r"\(?\s*\\begin\s*\{array\}\s*\{[^{}]*\}(.*?)\\end\s*\{array\}\s*\)?", re.DOTALL)
GROUPED = re.compile(r"[-+]?(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)|\d{1,2}(?:,\d{2})+,\d{3})(?:\.\d+)?")
TEXT = re.compile(
    r"\\(?:operatorname\*?|mathrm|mathbf|mathit|mathsf|text(?:bf|it|rm|sf|tt|sc|normal)|emph|[mh]box|rm|bf)(?![a-zA-Z])"
)
DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)\s*)[({]?\s*(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree)\s*[)}]?"
)
WORDS = re.compile(r"\\text\s*\{([^{}]*)\}")
BEGINS_VALUE = re.compile(r"[\w({\[|]|\\(?!cdot|cup|pm|le|ge|ne|in|text|end|\\|\})")
BEGINS_FACTOR = r"[a-zA-Z({]|\\(?!cdot|cup|rfloor|rceil)[a-zA-Z]"
RELATION = re.compile(r"(\\(?:le|ge|ne)(?![a-zA-Z])|[<>])")
# at which formulas are compared, with positive letters; one more with negative ones, where those are real
POINTS = 3
LONGEST = 2000  # characters; what is longer is compared as text
MOST_STEPS = 3000  # comparisons of parts, likewise
MOST_BITS = 4096  # of a power that is computed exactly
MOST_FACTORIAL = 500


class TooMuch(Exception):
    """A comparison would take too long."""


def group_at(text: str, at: int) -> str | None:
    """What is in the braces that open at `at`, or the one character there; None where they do not close."""
    if text[at : at + 1] != "{":
        return text[at : at + 1]
    depth = 0
    for i in range(at, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[at + 1 : i]
    return None


def final_math(text: str) -> str | None:
    """The answer that a text gives, as written there, or None; the rule is on top."""
    if boxed := [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*", text)]:
        inside = group_at(text, boxed[-1])
        return inside.strip() or None if inside is not None else None
    if marks := list(ANSWER_IS.finditer(text)):
        rest = text[marks[-1].end() :].lstrip()
        formula = re.match(
            r"\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", rest, re.DOTALL
        )
        if formula:
            return next(filter(None, formula.groups())).strip()
        return re.split(r"\.(?:\s|$)|\n", rest)[0].strip(" *") or None

    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def separated(text: str) -> str:
    """With words between two values as what they are: "and" and "or" outside of \\text, others marked as
    \\between them."""

    def between(found: re.Match) -> str:
        word = found[1].strip(" ,;")
        before, after = text[: found.start()].rstrip(), text[found.end() :].lstrip()
        if before and after and word in ("and", "or", "and also"):
            return f" {word} "
        if not re.search(r"[\w})\]!|]$", before) or not BEGINS_VALUE.match(after):
            return found[0]
        return f"\\text{{{word}}}\\between " if word else " and "

    return WORDS.sub(between, text)


def joined(word: str, text: str) -> str:
    """A comma for "and" and "or", but a union for the "or" of inequalities."""
    return r" \cup " if "or" in word and RELATION.search(text) else ", "


@lru_cache(maxsize=1024)
def tidy(text: str) -> str:
    """An answer without what is only typography."""
    text = DEGREES.sub(r"\1(\2\\pi/180)", re.sub("\u221a(\\d+(?:\\.\\d+)?)", r"\\sqrt{\1}", text))
    text = re.sub(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}", text)
    text = re.sub(r"(?<=\d)(\.\d*)\((\d+)\)", r"\1\\overline{\2}", text)
    for sign, ours in SIGNS.items():
        text = text.replace(sign, ours)
    text = re.sub(r"\^(\d)\^(\d)", r"^{\1\2}", text)
    text = re.sub(r",\\!\s*", ",", text)
    text = re.sub(
        r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])|(?<!\\)\\[!,;: ]|~|\\q?quad",
        " ",
        text,
    )
    text = text.replace(";", ",")
    text = re.sub(
        r"\$|\\\$|\\%|%|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\(?:degree|circ)(?![a-zA-Z])|\\[()\[\]]", " ", text
    )
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"(?<![\\a-zA-Z])(sqrt|pi|infty|cup|theta)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"(?<![a-zA-Z])infinity(?![a-zA-Z])", r"\\infty ", text)
    text = re.sub(r"\\(le|ge|ne)(?:q|qslant)?(?![a-zA-Z])", r"\\\1 ", text)
    text = TEXT.sub(r"\\text", text)
    text = re.sub(r"\\\{\s*\\\}", r"\\emptyset ", text)
    text = ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    text = separated(text.strip().rstrip(".").strip())
    without = re.sub(
        r"\\text\s*\{[^{}]*\}\s*(?:\^\s*(?:\d|\{\d\}))?(?!\s*\\between)", " ", text
    ).strip()  # units
    text = without or WORDS.sub(r"\1", text).strip()
    text = text.replace("\\between", "")
    amount = re.fullmatch(
        r"(.*[\d}])\s*(?<![a-zA-Z\\])(?:[a-zA-Z]{2,}|[a-zA-Z]{2,}\s[a-zA-Z ]+)(?:\^\s*(?:\d|\{\d\}))?", text
    )
    if amount and "\\begin" not in text and not re.search(r"\\[a-zA-Z]*\s*[a-zA-Z]*$", text):
        text = amount[1]
    text = re.sub(r",?\s+(?:and|or)\s+(?:also\s+)?", lambda found: joined(found[0], text), text.strip())
    text = re.sub(r"_\{(\w+)\}", r"_\1", text.strip())
    if GROUPED.fullmatch(text):
        text = re.sub("[, ]", "", text)
    return text


def interval(text: str) -> tuple[str, str]:
    """The letter and the interval of an inequality; ("", text) of what is none of one letter between or
    beside bounds."""
    pieces = [piece.strip() for piece in RELATION.split(text)]
    begins, ends = (re.fullmatch(r"[a-zA-Z]|\\[a-z]+", piece) for piece in (pieces[0], pieces[-1]))
    if len(pieces) == 3 and ends and (not begins or pieces[2] < pieces[0]):
        pieces = [
            *pieces[2:],
            {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(pieces[1], pieces[1]),
            pieces[0],
        ]

    if len(pieces) == 5 and pieces[1] in (">", "\\ge") and pieces[3] in (">", "\\ge"):
        pieces = [
            pieces[4],
            "<" if pieces[3] == ">" else "\\le",
            pieces[2],
            "<" if pieces[1] == ">" else "\\le",
            pieces[0],
        ]

    letter = pieces[2] if len(pieces) == 5 else pieces[0]
    if len(pieces) not in (3, 5) or not re.fullmatch(r"[a-zA-Z]|\\[a-z]+", letter):
        return "", text
    if len(pieces) == 5:
        if not {pieces[1], pieces[3]} <= {"<", "\\le"}:
            return "", text
        return (
            letter,
            f"{'(' if pieces[1] == '<' else '['}{pieces[0]},{pieces[4]}{')' if pieces[3] == '<' else ']'}",
        )

    bound = pieces[2]
    below, above = f"(-\\infty,{bound}", f"{bound},\\infty)"
    return letter, {"<": below + ")", "\\le": below + "]", ">": "(" + above, "\\ge": "[" + above,
                    "\\ne": f"{below})\\cup ({above}"}[pieces[1]]  # fmt: skip


def split(text: str, separator: str) -> list[str]:
    """Parts between separators (a regular expression) that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(rf"\\?[(\[{{]|\\?[)\]}}]|{separator}", text):
        if found[0][-1] in "([{":
            depth += 1
        elif found[0][-1] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : found.start()].strip())
            start = found.end()
    return [*parts, text[start:].strip()]


def plus_minus(parts: list[str]) -> list[str]:
    r"""Each part with a \pm as two parts, of either sign."""
    mark = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
    signs = {"+": {"pm": "+", "mp": "-"}, "-": {"pm": "-", "mp": "+"}}
    return [mark.sub(lambda found, sign=sign: signs[sign][found[1]], part)
            for part in parts for sign in ("+-" if mark.search(part) else "+")]  # fmt: skip


def structure(text: str) -> tuple[str, list[str]]:
    """What a tidy text is made of: (kind, parts). Kind "" is a single value; brackets or "matrix" keep the
    order of parts."""
    if len(parts := split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return "union", parts
    if matrix := re.fullmatch(r"\\begin\s*\{([bpv]?matrix)\}(.*)\\end\s*\{\1\}", text, re.DOTALL):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return f"{'v' * (matrix[1] == 'vmatrix')}matrix {len(rows)}", [
            cell.strip() for row in rows for cell in row.split("&")
        ]
    if text.startswith("\\{") and text.endswith("\\}"):
        return "list", plus_minus(split(text[2:-2], ","))
    if len(parts := split(text, ",")) > 1 or len(plus_minus([text])) > 1:
        return "list", plus_minus(parts)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(parts := split(text[1:-1], ",")) > 1:
        return text[0] + text[-1], parts
    return "", [text]


def both(one: str, other: str) -> str:
    """What two half-lines, one from below and one from above, have in common; other intervals stay a list."""
    if one.startswith("(-\\infty"):
        one, other = other, one
    (_, lower), (_, upper) = structure(one), structure(other)
    if lower[1:] == ["\\infty"] and upper[:1] == ["-\\infty"]:
        return f"{one[0]}{lower[0]},{upper[1]}{other[-1]}"
    return f"{one}, {other}"


def squeezed(text: str) -> str:
    """For comparing as text: without space; a word or one letter in brackets, (C), without its case and
    those."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\\\\between", WORDS.sub(r"\1", text))
    text = re.sub(r"\s+|(?<=\\frac)\{(?=\w\}\{\w\})", "", text)
    text = re.sub(r"\^\{(\w)\}", r"^\1", text)
    word = re.fullmatch(r"\(?([a-zA-Z])\)?|([a-zA-Z]{2,})", text)
    return (word[1] or word[2]).lower() if word else text


@lru_cache(maxsize=1024)
def named(text: str) -> tuple[str, str]:
    r"""("x", "5") of x = 5 and x = 2+3 = 5; ("x", "1, 2") of x = 1, x = 2; ("x", "[2,5)") of 2 \le x < 5;
    else ("", text)."""
    if len(parts := split(text, r"\\cup(?![a-zA-Z])")) > 1 or len(parts := split(text, ",")) > 1:
        pairs = [named(part) for part in parts]
        names, inner = {name for name, _ in pairs}, [each for _, each in pairs]
        if len(names) > 1 or names == {""}:
            found = NAME.match(text)
            return (
                (squeezed(found[1]), text[found.end() :])
                if found and "=" not in text[found.end() :]
                else ("", text)
            )
        if RELATION.search(text) and "\\cup" not in text:
            inner = [both(*inner)] if len(inner) == 2 else [text]
        return names.pop(), (r"\cup " if "\\cup" in text else ", ").join(inner)
    if RELATION.search(text):
        return interval(text)
    if found := NAME.match(text):
        return squeezed(found[1]), text[found.end() :].split("=")[-1].strip()
    return "", text if re.search(r"[a-zA-Z]", text) else text.split("=")[-1].strip()  # 5 of 2+3 = 5


def without_these(parts: list[str], common: Counter) -> list[str]:
    """The parts less those that are counted there, as often as they are."""
    kept = []
    for part in parts:
        if common[squeezed(part)]:
            common[squeezed(part)] -= 1
        else:
            kept.append(part)
    return kept


Value = Fraction | complex


def equal(x: Value, y: Value) -> bool:
    """Exactly for fractions, else to nine digits."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y))


def whole(digits: str) -> Fraction:
    """A number of digits. Raises ValueError for one that is too long to compute with."""
    if len(digits) > MOST_BITS // 4:
        raise ValueError("too many digits")
    return Fraction(int(digits))


def bounded(value: Value) -> Value:
    """The same. Raises ValueError for a fraction too long to compute with."""
    if (
        isinstance(value, Fraction)
        and max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * MOST_BITS
    ):
        raise ValueError("too long a fraction")
    return value


def float_of(value: Value) -> complex:
    return float(value) if isinstance(value, Fraction) else value


def raised(value: Value, exponent: Value) -> Value:
    """A power: exact where that is whole and not too large. Raises ArithmeticError for what is too large
    altogether."""
    if isinstance(value, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if abs(exponent) * bits <= MOST_BITS:
            return value ** int(exponent)

    if (
        isinstance(value, Fraction)
        and isinstance(exponent, Fraction)
        and exponent == Fraction(1, 2)
        and value >= 0
    ):
        above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if above**2 == value.numerator and below**2 == value.denominator:
            return Fraction(above, below)

    return float_of(value) ** float_of(exponent)


def rounded(value: Value, how: Callable) -> Fraction:
    """Floor or ceiling. Raises ValueError for what is no real number."""
    if isinstance(value, complex):
        raise ValueError("no real number")
    return Fraction(how(value))


def factorial(value: Value, step: int) -> Fraction:
    """value! or, with step 2, value!!. Raises ValueError for what has none, or too large a one."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MOST_FACTORIAL:
        raise ValueError("no factorial")
    return Fraction(math.prod(range(int(value), 0, -step)))


def chosen(n: Value, k: Value) -> Fraction:
    """n over k. Raises ValueError as `factorial`."""
    return factorial(n, 1) / factorial(k, 1) / factorial(n - k, 1)


class Formula:
    """A parser by recursive descent that evaluates as it reads, exactly where it can."""

    def __init__(self, text: str, point: int):
        self.text, self.point, self.at = text.strip(), point, 0
        self.negative = point == POINTS

    def peek(self, pattern: str) -> re.Match | None:
        """What matches here, after space."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return re.compile(pattern).match(self.text, self.at)

    def take(self, pattern: str) -> re.Match | None:
        if found := self.peek(pattern):
            self.at = found.end()
        return found

    def need(self, pattern: str) -> re.Match:
        if found := self.take(pattern):
            return found
        raise ValueError(f"no {pattern} at {self.at} of {self.text}")

    def sum(self) -> Value:
        value = self.product()
        while sign := self.take(r"[+-]"):
            value = bounded(value + self.product() * (1 if sign[0] == "+" else -1))
        self.peek("")
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.take(r"\*|\\cdot(?![a-zA-Z])"):
                value = bounded(value * self.signed())
            elif self.take("/"):
                value = bounded(value / self.signed())
            elif self.peek(BEGINS_FACTOR) or self.peek(r"[\d.]") and not self.after_number():
                value = bounded(value * self.power())
            else:
                return value

    def after_number(self) -> bool:
        """Whether a digit stands before this place: two numbers beside each other are no product."""
        return self.text[: self.at].rstrip()[-1:].isdigit()

    def signed(self) -> Value:
        if sign := self.take(r"[+-]"):
            return self.signed() * (1 if sign[0] == "+" else -1)
        return self.power()

    def power(self) -> Value:
        value = self.atom()
        while marks := self.take(r"!{1,2}(?![!=])"):
            value = factorial(value, len(marks[0]))
        if self.take(r"\^"):
            number = self.take(r"-?\d+")
            return raised(value, whole(number[0]) if number else self.argument())
        return value

    def argument(self) -> Value:
        """Of a command: a group, or one digit, letter or command."""
        digit = self.take(r"\d")
        return Fraction(digit[0]) if digit else self.atom()

    def group(self, opening: str, closing: str) -> Value:
        self.need(opening)
        value = self.sum()
        self.need(closing)
        return value

    def atom(self) -> Value:
        if self.peek(r"\.?\d|\.\\(?:overline|bar|dot)"):
            return self.number()
        for opening, closing in ((r"\(", r"\)"), (r"\{", r"\}")):
            if self.peek(opening):
                return self.group(opening, closing)
        if self.peek(r"\|"):
            return abs(self.group(r"\|", r"\|"))
        if command := self.take(r"\\([a-zA-Z]+)"):
            return self.command(command[1])
        return self.letter(self.need(r"[a-zA-Z]")[0])

    def number(self) -> Value:
        """Digits, with a period that repeats or a fraction behind them where they have one."""
        digits = self.take(r"(\d*)(?:\.(\d*))?")
        if self.peek("_"):
            raise ValueError("a number in another base")
        value = whole(digits[1] + (digits[2] or "") or "0") / 10 ** len(digits[2] or "")
        if digits[2] is not None and (period := self.take(r"\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")):
            period = period[1] or period[2]
            if self.peek(r"\d"):
                raise ValueError("digits behind a period")
            return value + whole(period) / (10 ** len(digits[2]) * (10 ** len(period) - 1))
        if digits[2] is None and self.peek(r"\\frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d)"):
            return value + self.atom()  # a mixed number
        if digits[2] is None and (part := self.take(r"(?<=\s)(\d+)\s*/\s*(\d+)(?!\d)")):
            return value + whole(part[1]) / whole(part[2])
        return value

    def command(self, name: str) -> Value:
        if name == "frac":
            return self.argument() / self.argument()
        if name == "sqrt":
            return self.root()
        if name in ("binom", "dbinom", "tbinom"):
            return chosen(self.argument(), self.argument())
        if name in ("lfloor", "lceil"):
            return rounded(self.group("", rf"\\r{name[1:]}"), math.floor if name == "lfloor" else math.ceil)
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name == "pi":
            return math.pi
        if not LETTERS.fullmatch(name):
            raise ValueError(f"\\{name} is no value")
        return self.letter("\\" + name)

    def root(self) -> Value:
        """Of a number, real where there is a real one."""
        degree = self.group(r"\[", r"\]") if self.peek(r"\[") else Fraction(2)
        value = self.argument()
        if isinstance(value, Fraction) and value < 0 and degree in (3, 5, 7, 9):
            return -raised(-value, 1 / degree)
        return raised(value, 1 / degree)

    def function(self, of: Callable) -> Value:
        base = self.argument() if self.take("_") else None
        number = self.take(r"\^\s*(?:\{(\d)\}|(\d))")
        value = of(self.product() if not self.peek(r"[({]") else self.atom())
        value = value if base is None or of is not cmath.log else value / cmath.log(base)
        return value ** int(number[1] or number[2]) if number else value

    def letter(self, name: str) -> Value:
        """i and e, or an arbitrary value for a name, with its index."""
        if index := self.take(r"_(\w)"):
            name += index[0]
        if name in "ie":
            return 1j if name == "i" else math.e
        seed = sum(ord(char) * 31**i for i, char in enumerate(name)) * 7919 + self.point * 104729
        return Fraction(5003 + seed % 10007, -10007 if self.negative else 10007)


@lru_cache(maxsize=1024)
def evaluate(text: str, point: int) -> Value | None:
    """The value of a formula, with its letters at an arbitrary point; None for what is no formula, or not
    finite there."""
    try:
        parser = Formula(text, point)
        value = parser.sum()
        finite = isinstance(value, Fraction) or cmath.isfinite(value)
        return value if finite and parser.at == len(parser.text) else None
    except (ValueError, ArithmeticError, RecursionError):
        return None


def same_value(a: str, b: str) -> bool:
    """Whether two texts have the same value wherever their letters point; of two equations, up to one
    factor."""
    sides = [text.split("=") for text in (a, b)]
    if not all(len(side) == len(sides[0]) <= 2 for side in sides):
        return False
    values = [
        [evaluate("-".join(f"({part})" for part in side), point) for side in sides]
        for point in range(POINTS + 1)
    ]
    if any(x is None for pair in values[:POINTS] for x in pair):
        return False
    if any(x is None or isinstance(x, complex) and x.imag for x in values[POINTS]):
        del values[POINTS]
    try:
        if len(sides[0]) == 1:
            return all(equal(x, y) for x, y in values)
        ratios = [x / y if y else None for x, y in values]
        return None not in ratios and ratios[0] != 0 and all(equal(ratio, ratios[0]) for ratio in ratios)
    except ArithmeticError:  # a fraction beyond what floats hold, beside one
        return False


def same(a: str, b: str, left: list[int]) -> bool:
    """`same_math` of tidy texts, part by part. left: [steps that it may take]. Raises TooMuch."""
    left[0] -= 1
    if left[0] < 0:
        raise TooMuch
    (kind, parts), (other, others) = structure(a), structure(b)
    if kind != other:
        return False
    if kind == "":
        return squeezed(a) == squeezed(b) or same_value(a, b)
    if len(parts) != len(others):
        return False
    if kind not in ("list", "union"):
        return all(same(part, each, left) for part, each in zip(parts, others))
    common = Counter(map(squeezed, parts)) & Counter(map(squeezed, others))
    rest = without_these(others, Counter(common))
    for part in without_these(parts, Counter(common)):  # in any order
        found = next((i for i, each in enumerate(rest) if same(part, each, left)), None)
        if found is None:
            return False
        del rest[found]

    return True


def same_math(a: str, b: str) -> bool:
    """Whether two answers say the same; what counts as that is on top."""
    if max(len(a), len(b)) > LONGEST:
        return a.split() == b.split()
    try:
        a, b = tidy(a), tidy(b)
        left = [MOST_STEPS]
        if same(a, b, left):
            return True
        (name, inner), (other, others) = named(a), named(b)
        alike = not (name and other) or name == other or max(len(name), len(other)) > 2
        return alike and (inner, others) != (a, b) and same(inner, others, left)
    except (TooMuch, RecursionError):
        return squeezed(a) == squeezed(b)
