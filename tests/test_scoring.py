"""Protects: what counts as a text's final answer, and which answers say the same."""

import itertools
import re

import pytest
from conftest import DATA

from scripts.math_answers import final_math, same_math
from scripts.public_tasks import read_task
from scripts.scoring import CHECKERS, Question, final_letter, final_number

GSM8K, MATH = DATA / "gsm8k" / "test.jsonl", DATA / "math500" / "test.jsonl"


@pytest.mark.parametrize("text, number", [
    ("#### 18", "18"), ("It is 5.\n#### 1,234\n", "1234"), ("#### $-2.50 dollars.", "-2.5"), ("5\n#### 18%", "18"),
    ("The answer is 18.", "18"), ("The answer is: **$18.00** for 3 days.", "18"), ("Answer: 7 apples and 2 pears", "7"),
    ("**Answer:** 7\n\n(I checked 3 times)", "7"), ("so \\boxed{-42} and 3", "-42"), ("$\\boxed{1{,}024}$", "1024"),
    ("The final answer is $\\boxed{\\$ 12.50}$. 1", "12.5"), ("The answer is 4. No: the answer is 5. 6", "5"),
    ("She has 3 and then 8 left.", "8"), ("5+3=8.", "8"), ("10-3 = 7, so 12-5", "5"), ("x = -5", "-5"), ("(-5)", "-5"),
    ("a loss of -$1,000.50", "-1000.5"), ("it is 2,3", "3"), ("1,234,567", "1234567"), ("0.50", "0.5"), (".5", "0.5"),
    ("007", "7"), ("-0.0", "0"), ("3 kg of CO2", "3"), ("18kg", "18"), ("\u22127", "-7"), ("is...5", "5"), ("12345678901234567890123456789012", "12345678901234567890123456789012"),
    ("#### Step 2\nso 9", "9"), ("#### 1. Add\n#### 2. Subtract\n5 - 1 = 4", "4"), ("The answer is unclear", None), ("", None), ("none", None),
    ("8 it is, the answer is eight", "8"), ("The answer is 1/2 cup", "0.5"), ("$\\boxed{\\frac{3}{4}}$", "0.75"), ("\\dfrac{-1}{3}", "-1/3"),
    ("12/4", "3"), ("2/6", "1/3"), ("The final answer is 5.", "5"), ("#### 1/2", "0.5"), ("1/0", "0"), ("8 and 10/3=3 1/3", "1/3"),
])  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("text, letter", [
    ("The answer is (B).", "B"), ("Answer: C", "C"), ("**Answer:** D", "D"), ("the answer is **B**, not A", "B"),
    ("The correct answer is option C because A and B fail", "C"), ("the correct option is B. A is wrong", "B"), ("$\\boxed{\\text{D}}$ C", "D"), ("answer is (b)", "B"),
    ("A is wrong. **B** is right, C is wrong", "B"), ("**B. Paris** and not A", "B"), ("**(C)**", "C"), ("B", "B"), (" (E)", "E"),
    ("J)", "J"), ("B, I think", "B"), ("A train", None), ("I'm sure", None), ("A", "A"), ("the answer is A because C", "A"),
    ("Answer: B. No, the answer is C", "C"), ("K", None), ("BC", None), ("", None), ("a b c", None),
])  # fmt: skip
def test_the_final_letter(text, letter):
    assert final_letter(text) == letter


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's test.jsonl")
def test_gsm8ks_own_answers_are_right():
    questions = read_task("gsm8k", GSM8K, chat=True)
    right = CHECKERS["number"].is_right
    assert len(questions) == 1319 and all(right(q, q.reference) for q in questions)
    last = [q.reference.split("####")[1].strip() for q in questions]
    for form in (
        "So it is ${}.",
        "The final answer is {}",
        "The final answer is ${}.00.",
        "\\boxed{{{}}} 7",
        "12 = 7 + 5\n#### {}",
        "it is **{}** apples",
    ):
        assert all(right(q, form.format(number)) for q, number in zip(questions, last)), form
    assert not any(right(q, f"The final answer is {number}1") for q, number in zip(questions, last))
    shifted = sum(right(q, other.reference) for q, other in zip(questions, questions[1:]))
    assert shifted < 50  # two neighbours with the same number


@pytest.mark.parametrize("text, answer", [
    ("so $x = \\boxed{\\frac{1}{2}}$, not 3", "\\frac{1}{2}"), ("\\boxed{1} or rather \\boxed{\\text{(C)}}", "\\text{(C)}"), ("\\boxed 5.", "5"),
    ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"), ("Final Answer: The final answer is $(3, \\frac{\\pi}{2})$. I hope it is correct.", "(3, \\frac{\\pi}{2})"),
    ("**Answer:** 42\nmore", "42"), ("The answer is 3.14. Yes", "3.14"), ("He has 3 and -4.5.", "-4.5"), ("1,234 in all", "1,234"), ("3/4 of it", "3/4"),
    ("x = .5", ".5"), ("none", None), ("\\boxed{never closed", None), ("", None), ("the answer is \\(x+1\\) here", "x+1"), ("\\boxed{}", None),
])  # fmt: skip
def test_the_final_formula(text, answer):
    assert final_math(text) == answer


@pytest.mark.parametrize("one, other", [
    ("\\frac{14}{3}", "\\dfrac{14}3"), ("\\frac43", "4/3"), ("\\frac9{19}", "9/19"), ("\\frac 59", "\\frac{5}{9}"), ("\\frac{3}{2}", "1.5"), ("\\frac{3}{2}", "1\\frac{1}{2}"),
    ("137 \\frac{1}{2}", "137.5"), (".35625", "0.35625"), ("10,\\!080", "10080"), ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("58,500", "58500"), ("\\$32,\\!348", "32348"),
    ("\\$18.90", "18.9"), ("90^\\circ", "90"), ("120^{\\circ}", "120°"), ("90^\\circ", "90 degrees"), ("50\\%", "50"), ("5.4 \\text{ cents}", "5.4"), ("864 \\mbox{ inches}^2", "864"),
    ("15\\mbox{ cm}^2", "15 cm^2"), ("36", "36 square units"), ("\\frac{270}7\\text{ degrees}", "270/7"), ("\\text{Evelyn}", "Evelyn"), ("\\text{(C)}", "C"), ("\\text{east}", "East"),
    ("x=5", "5"), ("x \\in [-2,7]", "[-2, 7]"), ("y = 2x + 3", "2x+3"), ("5x - 7y + 11z + 4 = 0", "-10x+14y-22z-8=0"), ("6 - 5i", "-5i + 6"), ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("2k+2", "2(k+1)"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt3}"), ("11\\sqrt2", "11 \\sqrt{2}"), ("2\\sqrt{113}", "sqrt(452)"), ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
    ("\\frac{20000}{\\pi}", "20000/π"), ("-\\frac{\\pi}{6}", "\\frac{-\\pi}{6}"), ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"), ("\\{1\\pm\\sqrt{5},-2\\}", "-2, 1+\\sqrt5, 1-\\sqrt5"),
    ("1,-2", "-2, 1"), ("3, 5, 7", "7, 5 and 3"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"), ("(-\\infty, 0]", "\\left(-\\infty,0\\right]"),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}", "\\begin{bmatrix}-\\frac13\\\\\\frac23\\\\\\frac53\\end{bmatrix}"), ("4210_{5}", "4210_5"), ("x^{10}", "x^10"), ("\\sqrt[3]{8}", "2"),
])  # fmt: skip
def test_answers_in_another_notation_are_the_same(one, other):
    if "bmatrix" in other:
        other = other.replace("bmatrix", "pmatrix")
    assert same_math(one, other) and same_math(other, one)


@pytest.mark.parametrize("one, other", [
    ("\\frac13", "0.33"), ("5", "-5"), ("6-5i", "6+5i"), ("(1,2)", "(2,1)"), ("(1,2]", "(1,2)"), ("3,5", "3,5,7"), ("3,3", "3,5"), ("52_8", "52"), ("\\text{even}", "\\text{odd}"), ("\\text{(C)}", "B"),
    ("2k+2", "2k+1"), ("x^2", "x^3"), ("\\sqrt{3}", "3"), ("1 \\pm 2", "3"), ("5x-7y=0", "5x-7y=1"), ("(2,\\infty)", "(2,3)"), ("1000", "1e3"), ("12", "12 or 13"), ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"), ("", "0"), ("(((((", "1"), ("9^{9^{9^9}}", "1"), ("\\frac{0}{0}", "0"), ("a", "b"), ("10080", "10,081"),
])  # fmt: skip
def test_other_answers_are_not(one, other):
    assert not same_math(one, other) and not same_math(other, one)


def test_hostile_text_ends():
    for text in ("(" * 5000, "-" * 5000 + "1", "\\frac" * 3000, "\\boxed{" * 3000, "x^" * 2000, "{" * 5000, "1," * 5000):
        final_math(text)
        assert not same_math(text, "1")


NOTATIONS = {
    "as it is": lambda a: a, "dfrac": lambda a: a.replace("\\frac", "\\dfrac"),
    "slashes": lambda a: re.sub(r"(?<![\d\s])\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", a), "without spaces": lambda a: re.sub(r"(?<![a-z]) | (?![a-zA-Z])", "", a),
    "signs": lambda a: a.replace("^\\circ", "°").replace("\\pi", "π").replace("\\cup", "∪").replace("-", "\u2212").replace("\\infty", "∞"),
    "left and right": lambda a: re.sub(r"(?<![a-z]|\\)([(\[])(.*)([)\]])$", r"\\left\1\2\\right\3", a), "explicit products": lambda a: re.sub(r"([0-9]) ?\\sqrt", r"\1 \\cdot \\sqrt", a),
}  # fmt: skip


@pytest.mark.skipif(not MATH.exists(), reason="needs MATH-500's test.jsonl")
def test_math500s_own_answers_are_right_in_every_notation():
    questions = read_task("math500", MATH, chat=False)
    right = CHECKERS["math"].is_right
    assert len(questions) == 500
    for name, change in NOTATIONS.items():
        for form in ("\\boxed{{{}}}", "\\boxed{{${}$.}}", "Final Answer: The final answer is ${}$. I hope it is correct."):
            wrong = [q.reference for q in questions if not right(q, form.format(change(q.reference)))]
            assert not wrong, (name, form)
    assert all(right(q, q.content["solution"]) for q in questions)  # the box in the published solution
    answers = sorted({q.reference for q in questions})
    same = {frozenset(pair) for pair in itertools.combinations(answers, 2) if same_math(*pair)}
    assert same == {frozenset(pair) for pair in (
        ("-2,1", "1,-2"), ("10,\\!080", "10080"), ("120", "120^\\circ"), ("15", "15\\mbox{ cm}^2"), ("2 \\sqrt{5}", "2\\sqrt{5}"), ("30", "30^\\circ"), ("36", "36^\\circ"),
        ("36", "\\$36"), ("36^\\circ", "\\$36"), ("5", "x=5"), ("90", "90^\\circ"), ("\\frac14", "\\frac{1}{4}"),
    )}  # fmt: skip


def test_a_checker_without_right_and_wrong_says_none():
    question = Question(0, "p", "", "none")
    assert CHECKERS["none"].is_right(question, "x") is None and CHECKERS["none"].final_answer(question, "x") is None
