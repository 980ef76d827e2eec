"""What a text gives as its final answer, and whether that is right: numbers, letters, LaTeX, programs, demo problems.

    CHECKERS[question.checker].is_right(question, "The answer is 18.")

The checkers, and what each takes for a text's final answer:

`number`  the first number after the last "####" (with nothing but a unit behind it), "answer is", "answer:" or
          "\\boxed{"; without such a mark, or a number after it, the last number of the text. 1,234 is one number;
          currency, % and units are ignored, 18, 18.0 and 18.00 are the same, and so are 1/2, \\frac{1}{2} and 0.5. Words are
          not read.
`math`    what scripts/math_answers.py says: the last \\boxed{...}, else what follows "answer is"; right when it means the same.
`choice`  the letter A to J after the last "answer is", "answer:", "option is" or "choice is", or in "\\boxed{"; without
          one the last bold letter (**B**, **B. Paris**); without one the last letter that stands alone ("A train" and
          "I think" begin with words).
`code`    "pass", "fail", "timeout" or, where the tests cannot be held here, "unchecked": runs HumanEval's tests on the program
          that the text gives for the prompt, see scripts/sandbox.py. Only "pass" is right.
`demo`    the number that the answer sentence gives; right is an answer with every step right.
`none`    nothing: the answer is for a judge elsewhere (MT-Bench), or only its speed counts (Spec-Bench).
"""

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.demo_task import answer_of, check
from scripts.math_answers import final_math, same_math
from scripts.sandbox import code_passes, outcome


@dataclass(frozen=True)
class Question:
    """One question. content: what its checker needs besides (the demo's Problem, or the line's whole JSON object)."""

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


# An optional sign (no minus between two numbers), then digits that no letter precedes.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?\$?(?P<digits>(?<![A-Za-z0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![A-Za-z0-9.])\.[0-9]+)(?:/(?P<below>[1-9][0-9]*)(?![0-9/]))?"
)
FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?[0-9]+)\}\s*\{([0-9]+)\}")
NUMBER_MARK = re.compile(
    r"####(?=[ \t*$-]*[0-9.](?:[0-9,.]*[0-9])?[ \t]*[%\w]*[.*]*[ \t]*$)|\\boxed\s*\{|(?i:\banswer[*_\s]*(?:is\b|:))",
    re.MULTILINE,
)
LETTER_AFTER_MARK = re.compile(
    r"(?:(?i:\banswer[*_\s]*(?:is\b|:)|\b(?:option|choice) is\b)|\\boxed(?=\s*\{))(?:\\[a-z]+\{|\W)*(?i:(?:option|choice)\W+)?"
    r"(?:([A-J])(?![\w'])|(?<=\()([a-j])(?=\)))"
)
BOLD_LETTER = re.compile(r"\*\*\(?([A-J])(?:[).:]+\s|[).:]*\*\*)")
LONE_LETTER = re.compile(r"(?<![\w'])(?:[B-HJ]|[AI](?! [a-z]))(?![\w'])")


def final_number(text: str) -> str | None:
    """The number that a text gives as its answer, in one spelling (18.00 is 18), or None; the rule is on top."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = FRACTION.sub(r"\1/\2", text)
    marks = list(NUMBER_MARK.finditer(text))
    found = NUMBER.search(text, marks[-1].end()) if marks else None
    numbers = [found] if found else list(NUMBER.finditer(text))
    return one_spelling(numbers[-1]) if numbers else None


def one_spelling(number: re.Match) -> str:
    """18.00 as 18, 1/2 as 0.5, 2/6 as 1/3."""
    value = Fraction(number["digits"].replace(",", "")) / int(number["below"] or 1)
    value = -value if number["sign"] else value
    places = next((n for n in range(len(number[0])) if (value * 10**n).denominator == 1), None)
    if not places:
        return str(value)  # whole, or with no end as a decimal
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}"


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
        lambda question, text: answer_in(text) is not None and answer_in(text) == answer_in(question.reference),
    )


def math_is_right(question: Question, text: str) -> bool:
    found = final_math(text)
    return found is not None and same_math(found, question.reference)


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
