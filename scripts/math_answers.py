"""MATH's answers: which one a text gives, and whether two say the same in another notation.

    final_math("so $x = \\boxed{\\frac{1}{2}}$.")        -> "\\frac{1}{2}"
    same_math("\\dfrac12", "0.5")                        -> True

A text's answer is the last \\boxed{...}; without one what follows the last "answer is" or "answer:", to the end of the
formula, sentence or line; without that its last number. Two answers are the same when, after what is only typography is
taken away ($, \\left, \\dfrac, units, degrees, the commas of 1,234, "x =" in front), they are the same text, or the same
value: both are evaluated, letters at three arbitrary points, so 2k+2 is 2(k+1) and \\frac{\\sqrt3}{3} is 1/\\sqrt{3}; 0.33 is
not \\frac13. Tuples, intervals and matrices are compared place by place; lists without brackets, {sets}, unions and the two
values of a \\pm in any order; equations up to a factor.
"""

import cmath
import math
import re
from collections.abc import Callable

ANSWER_IS = re.compile(r"(?i:\banswer[*_\s]*(?:is\b|:)[*:\s]*)")
LAST_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?")
FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "log": cmath.log, "ln": cmath.log, "exp": cmath.exp,
             "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
             "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan}  # fmt: skip
SIGNS = {
    "\u2212": "-", "\u00b7": "\\cdot ", "\u00d7": "\\cdot ", "\\times": "\\cdot ", "\u03c0": "\\pi ",
    "\u221a": "\\sqrt ", "\u221e": "\\infty ", "\u222a": "\\cup ", "\u00b0": "", "\u00b1": "\\pm ", "{,}": ",",
    "\\lbrace": "\\{", "\\rbrace": "\\}", "\\div": "/", "**": "^",
}  # fmt: skip


def final_math(text: str) -> str | None:
    """The answer that a text gives, as written there, or None; the rule is on top."""
    if boxed := [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*", text)]:
        inside = group_at(text, boxed[-1])
        return inside.strip() or None if inside is not None else None
    if marks := list(ANSWER_IS.finditer(text)):
        rest = text[marks[-1].end() :].lstrip()
        formula = re.match(r"\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", rest, re.DOTALL)
        if formula:
            return next(filter(None, formula.groups())).strip()
        return re.split(r"\.(?:\s|$)|\n", rest)[0].strip(" *") or None
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


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


def same_math(a: str, b: str) -> bool:
    """Whether two answers say the same; what counts as that is on top."""
    return same(tidy(a), tidy(b))


def tidy(text: str) -> str:
    """An answer without what is only typography."""
    for sign, ours in SIGNS.items():
        text = text.replace(sign, ours)
    text = re.sub(r",\\!\s*", ",", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])|(?<!\\)\\[!,;: ]|~|\\q?quad", " ", text)
    text = re.sub(r"\$|\\\$|\\%|%|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\(?:degree|circ)(?![a-zA-Z])|\\[()\[\]]", " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"(?<![\\a-zA-Z])(sqrt|pi|infty|cup)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"\\(?:operatorname|mathrm|textbf|textit|mathbf|mbox|rm|bf)(?![a-zA-Z])", r"\\text", text)
    text = text.strip().rstrip(".").strip()
    without = re.sub(r"\\text\s*\{[^{}]*\}\s*(?:\^\s*(?:\d|\{\d\}))?", " ", text).strip()  # units
    text = without or re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    amount = re.fullmatch(r"(.*[\d}])\s*(?<![a-zA-Z\\])(?:[a-zA-Z]{2,}|[a-zA-Z]{2,}\s[a-zA-Z ]+)(?:\^\s*(?:\d|\{\d\}))?", text)
    if amount and "\\begin" not in text and not re.search(r"\\[a-zA-Z]*\s*[a-zA-Z]*$", text):
        text = amount[1]
    text = re.sub(r"\s+(?:and|or)\s+", ", ", text.strip())
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?\s*(?:=(?!.*=)|\\in(?![a-zA-Z]))\s*", "", text.strip())
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    return re.sub(r"_\{(\w)\}", r"_\1", text.strip())


def same(a: str, b: str) -> bool:
    """`same_math` of tidy texts, part by part."""
    (kind, parts), (other, others) = structure(a), structure(b)
    if kind != other:
        return False
    if kind == "":
        return squeezed(a) == squeezed(b) or same_value(a, b)
    if kind in ("list", "union"):  # in any order
        rest = list(others)
        for part in parts:
            found = next((i for i, each in enumerate(rest) if same(part, each)), None)
            if found is None:
                return False
            del rest[found]
        return not rest
    return len(parts) == len(others) and all(map(same, parts, others))


def squeezed(text: str) -> str:
    """For comparing as text: without space; a word or one letter in brackets, (C), without its case and those."""
    text = re.sub(r"\s+|(?<=\\frac)\{(?=\w\}\{\w\})", "", text)
    word = re.fullmatch(r"\(?([a-zA-Z])\)?|([a-zA-Z]{2,})", text)
    return (word[1] or word[2]).lower() if word else text


def structure(text: str) -> tuple[str, list[str]]:
    """What a tidy text is made of: (kind, parts). Kind "" is a single value; brackets or "matrix" keep the order of parts."""
    if len(parts := split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return "union", parts
    if matrix := re.fullmatch(r"\\begin\s*\{([bpv]?matrix)\}(.*)\\end\s*\{\1\}", text, re.DOTALL):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return f"matrix {len(rows)}", [cell.strip() for row in rows for cell in row.split("&")]
    if text.startswith("\\{") and text.endswith("\\}"):
        return "list", plus_minus(split(text[2:-2], ","))
    if len(parts := split(text, ",")) > 1 or len(plus_minus([text])) > 1:
        return "list", plus_minus(parts)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(parts := split(text[1:-1], ",")) > 1:
        return text[0] + text[-1], parts
    return "", [text]


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
    mark = re.compile(r"\\pm(?![a-zA-Z])")
    return [mark.sub(sign, part) for part in parts for sign in ("+-" if mark.search(part) else "+")]


def same_value(a: str, b: str) -> bool:
    """Whether two texts have the same value wherever their letters point; of two equations, up to one factor."""
    sides = [text.split("=") for text in (a, b)]
    if not all(len(side) == len(sides[0]) <= 2 for side in sides):
        return False
    values = [[evaluate("-".join(f"({part})" for part in side), point) for side in sides] for point in range(3)]
    if any(x is None or not cmath.isfinite(x) for pair in values for x in pair):
        return False
    if len(sides[0]) == 1:
        return all(abs(x - y) <= 1e-9 * max(abs(x), abs(y)) for x, y in values)
    ratios = [x / y if y else None for x, y in values]
    return None not in ratios and all(abs(ratio - ratios[0]) <= 1e-9 * abs(ratios[0]) for ratio in ratios)


def evaluate(text: str, point: int) -> complex | None:
    """The value of a formula, with its letters at one of three arbitrary points; None for what is no formula."""
    try:
        parser = Formula(text, point)
        value = parser.sum()
        return value if parser.at == len(parser.text) else None
    except (ValueError, ArithmeticError, RecursionError):
        return None


class Formula:
    """A parser by recursive descent that evaluates as it reads."""

    def __init__(self, text: str, point: int):
        self.text, self.point, self.at = text.strip(), point, 0

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

    def sum(self) -> complex:
        value = self.product()
        while sign := self.take(r"[+-]"):
            value += self.product() * (1 if sign[0] == "+" else -1)
        self.peek("")
        return value

    def product(self) -> complex:
        value = self.signed()
        while True:
            if self.take(r"\*|\\cdot(?![a-zA-Z])"):
                value *= self.signed()
            elif self.take("/"):
                value /= self.signed()
            elif self.peek(r"[\da-zA-Z.({]|\\(?!cdot|cup|pm|\})[a-zA-Z]"):
                value *= self.power()
            else:
                return value

    def signed(self) -> complex:
        if sign := self.take(r"[+-]"):
            return self.signed() * (1 if sign[0] == "+" else -1)
        return self.power()

    def power(self) -> complex:
        value = self.atom()
        if self.take(r"\^"):
            number = self.take(r"-?\d+")
            exponent = float(number[0]) if number else self.argument()
            value **= exponent
        return value

    def argument(self) -> complex:
        """Of a command: a group, or one digit, letter or command."""
        digit = self.take(r"\d")
        return float(digit[0]) if digit else self.atom()

    def group(self, opening: str, closing: str) -> complex:
        self.need(opening)
        value = self.sum()
        self.need(closing)
        return value

    def atom(self) -> complex:
        if number := self.take(r"\d+(?:\.\d+)?|\.\d+"):
            if self.peek("_"):
                raise ValueError("a number in another base")
            if "." not in number[0] and self.peek(r"\\frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d)"):
                return float(number[0]) + self.atom()  # a mixed number
            return float(number[0])
        if self.peek(r"\("):
            return self.group(r"\(", r"\)")
        if self.peek(r"\{"):
            return self.group(r"\{", r"\}")
        if command := self.take(r"\\([a-zA-Z]+)"):
            return self.command(command[1])
        return self.letter(self.need(r"[a-zA-Z](?!_)")[0])

    def command(self, name: str) -> complex:
        if name == "frac":
            return self.argument() / self.argument()
        if name == "sqrt":
            root = self.group(r"\[", r"\]") if self.peek(r"\[") else 2
            return self.argument() ** (1 / root)
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        return math.pi if name == "pi" else self.letter("\\" + name)

    def function(self, of: Callable) -> complex:
        number = self.take(r"\^\s*(?:\{(\d)\}|(\d))")
        value = of(self.product() if not self.peek(r"[({]") else self.atom())
        return value ** int(number[1] or number[2]) if number else value

    def letter(self, name: str) -> complex:
        """i and e, or an arbitrary value for a name."""
        if name in "ie":
            return 1j if name == "i" else math.e
        seed = sum(ord(char) * 31**i for i, char in enumerate(name)) * 7919 + self.point * 104729
        return 0.5 + seed % 10007 / 10007
