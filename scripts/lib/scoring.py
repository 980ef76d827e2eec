"""What a text gives as its final answer, and whether that is right: numbers, letters, LaTeX, programs, demo
problems.

    CHECKERS[question.checker].is_right(question, "The answer is 18.")

The checkers, and what each takes for a text's final answer:

`number`  the number next to the last "####" (with nothing but a unit behind it), "answer is", "answer:",
          heading "Answer" or "\\boxed{"; of 2+3=5 that after the last "=", of 6=2*3 that before it; where
          words come first, the last number of that sentence, or of the paragraph under "Answer:". A mark
          without a number, and "answer is not", leave it to the mark before, and last to the last number of
          the text. 1,234, 1 234, 1,00,000, 1'234 and 1.234.567 are one number; currency, %, units and
          ordinals are ignored; 18, 18.0 and 18.00 are the same, and so are 1/2, \\frac12 and 0.5, 2 1/2 and
          2.5, 1.5e3, 1.5 x 10^3 and 1500. (-5), negative 5 and "is minus 5" are -5, (5) is 5. Exponents are
          no numbers of their own (25 m^2). Words are not read.
`math`    what scripts/lib/math_answers.py says: the last \\boxed{...}, else what follows "answer is"; right
          when it means the same.
`choice`  the letter A to J after the last "answer is", "answer:", "option is" or "choice is", or in
          "\\boxed{"; without one the last bold letter (**B**, **B. Paris**); without one the last letter that
          stands alone ("A train" and "I think" begin with words).
`code`    "pass", "fail", "timeout" or, where the tests cannot be held here, "unchecked": runs HumanEval's
          tests on the program that the text gives for the prompt, see scripts/lib/sandbox.py. Only "pass" is
          right.
`demo`    the number that the answer sentence gives; right is an answer with every step right.
`none`    nothing: the answer is for a judge elsewhere (MT-Bench), or only its speed counts (Spec-Bench).
"""

import hashlib
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from scripts.lib.demo_task import answer_of, check
from scripts.lib.math_answers import final_math, same_math
from scripts.lib.sandbox import code_passes, outcome


@dataclass(frozen=True)
class Question:
    """One question. content: what its checker needs besides (the demo's Problem, or the line's whole JSON
    object)."""

    index: int | str  # position in its source; "12.3" is sample 3 of question 12
    prompt: str
    reference: str  # as in the source; "" for the demo
    checker: str  # a name in CHECKERS
    group: str = ""  # the demo's family, MMLU's subject, or the line's "group", "subject" or "category"
    content: object = None
    asked: str = ""  # the prompt without the examples before it, where there are any
    stops: tuple[str, ...] = ()  # texts that end an answer: where a base model goes on to the next question
    more_turns: tuple[str, ...] = ()  # what is said after the first answer

    @property
    def id(self) -> str:
        """16 hex digits of checker and prompt, to split and to resume by question."""
        return hashlib.sha256(f"{self.checker}\n{self.prompt}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Checker:
    """final_answer: what two answers to a question are compared by, None when the text gives none."""

    final_answer: Callable[[Question, str], str | None]
    is_right: Callable[[Question, str], bool | None]  # None: there is no right and wrong


# An optional sign (no minus between two numbers), then digits that no letter precedes, with the fraction of a
# mixed number, a fraction's denominator, or an exponent.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-|(?i:\bnegative\s+|(?:(?<=\bis )|(?<=: ))minus\s+))?"
    r"[$€£¥₹]?(?P<digits>(?<![A-Za-z0-9^])(?<![\w)}]_)(?<![\^_]\{)(?<!\^-)(?<!\^\{-)"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![A-Za-z0-9.])\.[0-9]+)"
    r"(?:(?: (?P<above>[0-9]{1,6}))?/(?P<below>[1-9][0-9]*)(?![0-9/])"
    r"|[eE](?P<e>[+-]?[0-9]+)(?![\w.])|\s?(?:[x×*·]|\\times|\\cdot)\s?10\s?\^\{?(?P<ten>-?[0-9]+)\}?|\^\{?(?P<power>-?[0-9]+)\}?)?"
)
FRACTION = re.compile(
    r"(?:([0-9])\s?)?\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
)
NUMBER_MARK = re.compile(
    r"####(?=[ \t*$€£-]*(?:[0-9](?:[0-9,.]*[0-9])?|\.[0-9]+)(?: ?[0-9]*/[0-9]+)?[ \t]*[%€£\w]*[.*]*[ \t]*$)"
    r"|\\(?:boxed|fbox)\s*\{"
    r"|(?i:\banswer(?:\s+(?:to|for)\s[^.\n]{1,80}?)?[*_\s]*(?:\b(?:is|was|equals|would\sbe|should\sbe|must\sbe)\b(?!\s+not\b)|=))"
    r"|(?P<headed>(?i:\banswer[*_\s]*:|^[#*_ \t]*(?:(?:the|final)\s){0,2}answer[*_. \t]*$))",
    re.MULTILINE,
)
NEXT_TO = re.compile(
    r"(?i:[\s*_:~\"'`(\[{$€£¥₹≈]|\\[(\[,;! "
    r"]|\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{|[a-z]\s?=|US\$|USD|Rs\.?"
    r"|(?:about|around|exactly|only|just|roughly|approximately|therefore|thus|simply|now|then|equal to|a "
    r"total of)\b)*"
)
CLAUSE_END = re.compile(
    r"[,;:](?!\d)|(?<=[\w%.}])\s+\(|\b(?:because|since|as|so|for|from|or|and)\b|[.!?](?!\d)|\n"
)
# the number before is part of a calculation
OPERATOR = re.compile(r"\s?(?:[-+*/×·÷]|\\(?:times|cdot|div)\b)\s?[0-9(]")
SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
MOST_DIGITS = 1000  # beyond, numbers are compared as they are written
TYPOGRAPHY = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict(zip("０１２３４５６７８９．，", "0123456789.,")),
    **{char: "^" + plain for char, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")},
    "\u2044": "/",
    "\u2019": "'",
    **{
        char: f" {above}/{below}"
        for char, above, below in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")
    },
}
BETWEEN_GROUPS = re.compile(
    r"(?<=[0-9])(?:[\u00a0\u2007\u2009\u202f'_]|\\[,!;: ]|\{,\}|~)(?=[0-9]{3}(?![0-9]))"
)
SPACED_GROUPS = re.compile(r"(?<![\w.,/^])[0-9]{1,3}(?: [0-9]{3})+(?![0-9/])")
DOTTED_GROUPS = re.compile(
    r"(?<![\w.,])[0-9]{1,3}(?:\.[0-9]{3})+(?:,[0-9]{1,2}(?![0-9])|(?<=\.[0-9]{3}\.[0-9]{3})(?![.,]?[0-9]))"
)


def plain(text: str) -> str:
    """A text in ASCII's signs, without the separators of thousands that are no commas, and with \\frac12 as
    1/2."""
    for char, ours in TYPOGRAPHY.items():
        text = text.replace(char, ours)
    raised = re.compile(r"\^-?[0-9](?:\^[0-9])+")  # a superscript of several signs, each changed alone
    text = raised.sub(lambda found: f"^{{{found[0].replace('^', '')}}}", text.replace("⁻^", "^-"))
    text = BETWEEN_GROUPS.sub("", text.replace("{,}", ",").replace("\\$", "$").replace("\\!", ""))
    text = SPACED_GROUPS.sub(lambda found: found[0].replace(" ", ""), text)
    text = DOTTED_GROUPS.sub(lambda found: found[0].replace(".", "").replace(",", "."), text)
    mixed = FRACTION.sub(
        lambda found: f"{found[1] or ''}\0{found[2] or found[3]}/{found[4] or found[5]}", text
    )
    return re.sub(r"(?<=[0-9])\0", " ", mixed).replace("\0", "")


LETTER_AFTER_MARK = re.compile(
    r"(?:(?i:\banswer[*_\s]*(?:is\b|:)|\b(?:option|choice) is\b)|\\boxed(?=\s*\{))(?:\\[a-z]+\{|\W){0,60}"
    r"(?i:(?:option|choice)\W+)?(?:([A-J])(?![\w'])|(?<=\()([a-j])(?=\)))"
)
BOLD_LETTER = re.compile(r"\*\*\(?([A-J])(?:[).:]+\s|[).:]*\*\*)")
LONE_LETTER = re.compile(r"(?<![\w'])(?:[B-HJ]|[AI](?! [a-z]))(?![\w'])")


def closing(text: str, at: int) -> int:
    """Where the braces that opened before `at` close."""
    depth = 1
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, at):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    return len(text)


def number_after(text: str, mark: re.Match) -> re.Match | None:
    """The number that a mark gives: next to it, after the "=" that follows there, or the last of what it is
    said in."""
    begin, end = mark.end(), len(text)
    if mark[0].endswith("{"):
        begin, end = mark.end(), closing(text, mark.end())
    elif mark["headed"] is not None:
        begin = NEXT_TO.match(text, begin).end()
        blank = re.compile(r"\n\s*\n").search(text, begin)
        end = blank.start() if blank else end
    elif sentence := SENTENCE_END.search(text, NEXT_TO.match(text, begin).end()):
        end = sentence.start()

    if not (first := NUMBER.match(text, NEXT_TO.match(text, begin, end).end(), end)):
        last = deque(NUMBER.finditer(text, begin, end), maxlen=1)
        return last[0] if last else None

    clause = CLAUSE_END.search(text, first.end(), end)
    equals = re.compile("[=≈]").finditer(text, first.end(), clause.start() if clause else end)
    values = [
        first,
        *filter(None, (NUMBER.search(text, sign.end(), end) for sign in deque(equals, maxlen=20))),
    ]
    return next(
        (value for value in reversed(values) if not OPERATOR.match(text, value.end(), end)), values[-1]
    )


def as_written(digits: str, below: str, exponent: str, power: str) -> str:
    """Without zeros that say nothing."""
    whole, _, places = digits.partition(".")
    text = (whole.lstrip("0") or "0") + ("." + places.rstrip("0")).rstrip(".")
    for mark, value in (("/", below.lstrip("0")), ("e", exponent), ("^", power)):
        text += mark + value if value not in ("0", "1") else ""
    return text


def decimal(value: Fraction) -> str:
    """A number with an end as a decimal as that, others as a fraction."""
    below, twos, fives = value.denominator, 0, 0
    while below % 2 == 0:
        below, twos = below // 2, twos + 1
    while below % 5 == 0:
        below, fives = below // 5, fives + 1
    places = max(twos, fives)
    if below > 1 or not places:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}"


def one_spelling(number: re.Match) -> str:
    """18.00 as 18, 1/2 as 0.5, 2/6 as 1/3, 1.5e3 as 1500; what is too long to compute with stays as
    written."""
    sign, digits = "-" if number["sign"] else "", number["digits"].replace(",", "")
    below = number["below"] or "1"
    exponent = number["e"] or number["ten"] or "0"
    power = number["power"] or "1"
    if max(len(digits), len(below)) > MOST_DIGITS or max(len(exponent), len(power)) > 4:
        return sign + as_written(digits, below, exponent, power)
    value, size = Fraction(digits), max(abs(int(exponent)), abs(int(power)) * len(digits))
    if size > MOST_DIGITS or not value and int(power) < 0:
        return sign + as_written(digits, below, exponent, power)
    value = value ** int(power) * Fraction(10) ** int(exponent)
    value = value + Fraction(int(number["above"]), int(below)) if number["above"] else value / int(below)
    return decimal(-value if sign else value)


def final_number(text: str) -> str | None:
    """The number that a text gives as its answer, in one spelling (18.00 is 18), or None; the rule is on
    top."""
    text = plain(text)
    for mark in list(NUMBER_MARK.finditer(text))[:-20:-1]:
        if found := number_after(text, mark):
            return one_spelling(found)
    last = deque(NUMBER.finditer(text), maxlen=1)
    return one_spelling(last[0]) if last else None


def final_letter(text: str) -> str | None:
    """The letter A to J that a text gives as its answer, or None; the rule is on top."""
    if marked := LETTER_AFTER_MARK.findall(text):
        return "".join(marked[-1]).upper()
    letters = BOLD_LETTER.findall(text) or LONE_LETTER.findall(text)
    return letters[-1] if letters else None


def demo_answer(question: Question, text: str) -> str | None:
    answer = answer_of(text)
    return None if answer is None else str(answer)


def compared_by(answer_in: Callable[[str], str | None]) -> Checker:
    """A text is right when its final answer is the reference's."""
    return Checker(
        lambda question, text: answer_in(text),
        lambda question, text: (
            answer_in(text) is not None and answer_in(text) == answer_in(question.reference)
        ),
    )


def math_is_right(question: Question, text: str) -> bool:
    found = final_math(text)
    return found is not None and same_math(found, question.reference)


# of the checker `code`: not right, but a program that no test has found wrong
UNDECIDED = ("timeout", "unchecked")
CHECKERS = {
    "number": compared_by(final_number),
    "math": Checker(lambda question, text: final_math(text), math_is_right),
    "choice": compared_by(final_letter),
    "code": Checker(
        lambda question, text: outcome(question.content, text).verdict,
        lambda question, text: code_passes(question.content, text),
    ),
    "demo": Checker(demo_answer, lambda question, text: check(question.content, text).right),
    "none": Checker(lambda question, text: None, lambda question, text: None),
}
