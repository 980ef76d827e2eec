"""Protects: what counts as a text's final answer, and which answers say the same."""

import itertools
import re

import pytest
from conftest import DATA

from scripts.lib.math_answers import final_math, same_math
from scripts.lib.public_tasks import read_task
from scripts.lib.scoring import CHECKERS, Question, final_letter, final_number

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
    ("12/4", "3"), ("2/6", "1/3"), ("The final answer is 5.", "5"), ("#### 1/2", "0.5"), ("1/0", "0"), ("8 and 10/3=3 1/3", "10/3"),
])  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == number


# (number, texts that give it)
SAME_NUMBERS = [
    ("3", ["**Answer:** Tom had 5 apples and ate 2, so 3 are left.", "**Answer**: Tom had 5 and ate 2. So 3 are left.\n\nThat took 9 minutes.", "## Answer\nTom had 5 apples and ate 2, leaving 3.",
           "Answer:\n\n3 apples\n\nas 5-2", "### Final Answer\n\n**3**\n", "**Final Answer**\n\nOf 5 apples 3 are left.", "The answer is that of 5 apples 3 are left.", "The answer is: after 2 of 5, 3 are left. I used 7 words."]),
    ("5", ["The answer is 2+3=5.", "The answer is 2 + 3 = 5 apples.", "Answer: 10/2 = 5", "#### 5", "The answer is 5, because 2+3=5 and 10/2=5.", "The answer is 5 (2+3=5, 4+1=5).", "The answer is x = 5", "\\boxed{2+3=5}",
           "\\boxed{x=5}", "The answer is $2 \\times 2.5 = 5$.", "The answer is 1+1=2, no: the answer is 2+3=5!", "answer = 5", "The answer to the 2nd question is 5.", "The answer should be 5.", "the answer is about 5", "**The answer is 5**",
           "The answer is \\(5\\) for 3 days", "The answer is $$5$$", "The answer is 5th", "the answer is 5kg", "\\boxed{\\text{Tom has 5 apples}}", "The answer is 5. I hope this answer is right.", "The answer is clear: 5.",
           "Answer: \"5\"", "The answer is (5)", "The answer is ５.", "The answer is 2 apples + 3 apples = 5 apples.", "The answer was 5 of 9.", "The answer is not 4. It is 5.", "The answer is 5 = 2+3.", "The answer is 5 = 15/(2+1)"]),
    ("-7", ["The answer is –7", "The answer is −7.", "The answer is ‒7", "The answer is ‐7", "The answer is -7", "The answer is (-7)", "The answer is –$7", "#### –7", "#### -7", "\\boxed{-7}", "\\boxed{−7}", "The answer is 3-10=-7", "x = –7", "The answer is negative 7", "7 - 14 = −7",
            "The answer is $-7$ degrees", "-7.00", "- 7 = x, that is: -7", "The answer is minus 7", "Answer: minus 7"]),
    ("6", ["The answer is 6 = 2*3", "The answer is 2*3 = 6 = 1+5", "The answer is 6 = 2 \\times 3.", "8 minus 6", "The answer is $6 = 18/3$"]),
    ("7", ["5–7", "pages 5–7", "10-7", "3 to 7", "The answer is 7 - that's it", "- 7", "* 7 apples", "The answer is 7–that is all"]),
    ("1234567", ["1,234,567", "1 234 567", "1\u202f234\u202f567", "1\u00a0234\u00a0567", "12,34,567", "1'234'567", "1.234.567", "1{,}234{,}567", "1\\,234\\,567", "1_234_567", "$1,234,567.00", "1,234,567 dollars", "The answer is 1 234 567.", "\\boxed{1\\,234\\,567}", "1.234567e6", "1.234567 \\times 10^6", "1234567."]),
    ("100000", ["1,00,000", "100,000", "10^5", "10^{5}", "1e5", "1E+5", "1 x 10^5", "100 000", "10⁵", "The answer is 1 × 10⁵ cells", "$100,000", "€100,000", "100,000 €"]),
    ("1234.5", ["1,234.50", "1.234,5", "1 234.5", "$1,234.50", "1234.500 kg", "US$1,234.5"]),
    ("12.5", ["12.5", "12.50", "12 1/2", "25/2", "12\\frac{1}{2}", "12\\frac12", "\\frac{25}{2}", "\\dfrac{25}{2}", "The answer is \\frac{25}{2}", "is 12 \\frac12", "= \\frac{25}{2}", "12½", "$12.50", "12.5%", "12.50 €", "£12.50", "012.5", "#### 12 1/2", "The answer is 12 1/2 cups", "\\boxed{12\\tfrac{1}{2}}", "1.25e1"]),
    ("-2.5", ["-2 1/2", "-\\frac{5}{2}", "-2\\frac12", "-$2.50", "\\frac{-5}{2}", "−2½"]),
    ("0.5", ["1/2", "½", "0.5", ".5", "0.50", "\\frac12", "\\tfrac{1}{2}", "5e-1", "5 × 10^-1", "5 \\times 10^{-1}", "2/4", "50/100"]),
    ("1/3", ["1/3", "\\frac13", "2/6", "⅓", "\\dfrac{1}{3} of it"]),
    ("0.333", ["0.333", ".333", "333/1000"]),
    ("25", ["The area is 25 m^2.", "25 cm²", "25 \\text{ m}^2", "The answer is 25 m^{2}", "x_1 = 25 m^3", "5^2", "5²", "25 \\mathrm{cm}^{3}"]),
    ("18", ["18 dollars", "$18", "18$", "\\$18", "18 %", "18\\%", "£18", "18.", "18.0", "18,", "(18)", "[18]", "**18**", "_18_ of them", "18!", "18?", "18:", "it's 18th", "18°", "R$18", "18\n", "so 18;", "#### $18", "#### 18 dollars"]),
    ("0", ["0", "-0", "0.0", "000", "0%", "$0", "0/5"]),
    (None, ["", "none", "The answer is eight", "x", "\\boxed{}", "CO2", "x_1", "A1", "####"]),
]  # fmt: skip


def test_the_table_of_numbers():
    wrong = [
        (text, number, final_number(text))
        for number, texts in SAME_NUMBERS
        for text in texts
        if final_number(text) != number
    ]
    assert not wrong
    assert sum(len(texts) for _, texts in SAME_NUMBERS) > 180


def test_numbers_of_any_length_are_compared():
    for size in (999, 1001, 4300, 5000, 100_000):
        for text in (
            "1" * size,
            "-" + "1" * size,
            "0." + "3" * size,
            "1/" + "3" * size,
            "1e" + "9" * size,
            "2^" + "9" * size,
            "1," * 3 + "111" * size,
            "1 1/" + "3" * size,
            f"{'1' * size}.{'5' * size}e5",
            "10^" + "9" * size,
            f"\\frac{{{'1' * size}}}{{7}}",
        ):
            assert final_number(text)
    long = "1" * 5000
    assert (
        final_number(long)
        == final_number(f"The answer is ${long}.00.")
        == final_number(f"#### 0{long}")
        == long
        != final_number(long + "1")
    )
    assert (
        final_number(f"-{long}") == f"-{long}"
        and final_number(f"0.{long}") == f"0.{long}"
        and final_number(f"{long}/3") == f"{long}/3"
    )
    assert (
        final_number("9^" + "9^" * 5000 + "9")
        and final_number("(" * 5000 + "7") == "7"
        and final_number("answer is " * 20_000 + "7") == "7"
    )
    assert final_number("1e-999999999") == "1e-999999999" and final_number("0^-1") == "0^-1"


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


# Each line: answers that say the same, all of them each other.
SAME_MATH = [
    ["3 \\text{ and } 4", "3, 4", "4,3", "3 and 4", "3 \\text{ or } 4", "3\\text{, }4", "4 \\textrm{ and } 3".replace("textrm", "text"), "\\{3,4\\}", "x=3, x=4", "x=3 \\text{ or } x=4", "x = 4 or x = 3", "x \\in \\{3,4\\}", "3, \\text{ and } 4"],
    ["x=1, x=2", "1,2", "x=2,x=1", "2,1", "x = 1 \\text{ and } x = 2", "\\{1,2\\}", "\\frac{3 \\pm 1}{2}"],
    ["2 \\le x < 5", "[2,5)", "5 > x \\ge 2", "2 \\leq x<5", "2 \\leqslant x < 5", "x \\in [2,5)", "2≤x<5", "x \\ge 2 \\text{ and } x < 5", "\\left[2,5\\right)", "2 <= x < 5", "[2, 10/2)"],
    ["x > 3", "(3,\\infty)", "3 < x", "x \\in (3, \\infty)", "(3,+\\infty)", "(3, infinity)", "3<x<\\infty"],
    ["x \\le -1", "(-\\infty,-1]", "-1 \\ge x", "(−∞,−1]"],
    ["x < -1 \\text{ or } x > 3", "(-\\infty,-1) \\cup (3,\\infty)", "(3,\\infty)\\cup(-\\infty,-1)", "x > 3 or x < -1", "(-∞,-1)∪(3,∞)"],
    ["x \\ne 2", "(-\\infty,2) \\cup (2,\\infty)", "x ≠ 2", "x \\neq 2"],
    ["0.\\overline{3}", "\\frac13", "1/3", "0.\\bar{3}", ".\\overline{3}", "0.3\\overline{3}", "0.\\overline{33}", "⅓", "\\frac{2}{6}", "3^{-1}"],
    ["0.1\\overline{6}", "\\frac16", "\\frac{1}{6}"], ["1.\\overline{27}", "\\frac{14}{11}"], ["0.\\overline{9}", "1", "1.0", "1.00"],
    ["\\emptyset", "\\varnothing", "\\{\\}", "\\{ \\}", "∅"], ["(-\\infty,\\infty)", "\\mathbb{R}", "ℝ", "x \\in \\mathbb{R}", "(-\\infty, +\\infty)"], ["x < y", "y > x"],
    ["0.\\overline{142857}", "\\frac17", "0.\\dot{1}4285\\dot{7}", "0.(142857)"], ["0.1(6)", "\\frac16", "0.1\\overline{6}"], ["2 \\textrm{ and } 5", "2\\textsf{ or }5", "2; 5", "5;2", "2 \\hbox{ and } 5"],
    ["1 \\pm \\sqrt2", "1 \\mp \\sqrt2", "1 ∓ √2"], ["\\lfloor 3.7 \\rfloor", "3", "\\lceil 2.1 \\rceil", "\\left\\lfloor\\pi\\right\\rfloor", "\\lfloor 1.5 \\rfloor + 2"], ["\\lfloor -0.5 \\rfloor", "-1"],
    ["\\sin 30^\\circ", "\\frac12", "\\cos(60°)", "\\sin \\frac{\\pi}{6}", "\\frac12 \\tan 45^{\\circ}"], ["\\sqrt{x^2}", "|x|", "|-x|"], ["\\sqrt{x}\\sqrt{y}", "\\sqrt{xy}"], ["x\\sqrt{x}", "x^{3/2}", "\\sqrt{x^3}"],
    ["5!", "120", "5 \\cdot 4!", "\\frac{6!}{6}", "5 \\cdot 4 \\cdot 3 \\cdot 2", "5 × 24", "\\binom{10}{3}", "8!!\\cdot\\frac{5}{16}"],
    ["y=2x+1", "2x-y+1=0", "y - 2x = 1", "2x + 1 = y", "4x - 2y + 2 = 0", "2x-y=-1"],
    ["y = 2x+3", "2x+3", "3+2x", "f(x) = 2x + 3", "y=3+2x"],
    ["x^2+y^2=4", "x^2 + y^2 - 4 = 0", "2x^2+2y^2=8", "4=y^2+x^2"],
    ["(x+1)^2", "x^2+2x+1", "(1+x)(x+1)", "(1+x)^{2}", "x² + 2x + 1"], ["x^3-1", "(x-1)(x^2+x+1)"], ["\\frac{1}{x-1}", "-\\frac{1}{1-x}", "1/(x-1)", "(x-1)^{-1}"],
    ["(1,2)", "\\left(1,2\\right)", "(1, 2)", "(1, \\frac{4}{2})", "(x,y)=(1,2)", "(1.0,2)"], ["\\{1,2,3\\}", "\\{3,2,1\\}", "1,2,3", "3, 1 and 2"],
    ["\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\left(\\begin{array}{cc} 1 & 2 \\\\ 3 & 4 \\end{array}\\right)", "\\begin{pmatrix} 1 & \\sqrt{4} \\\\ 3 & 4 \\\\ \\end{pmatrix}"],
    ["90^\\circ", "90°", "90", "90 degrees", "90^{\\circ}", "90 \\text{ degrees}", "\\angle ABC = 90^\\circ"], ["50\\%", "50%", "50", "50 \\text{ percent}"],
    ["5 \\text{ cm}", "5", "5\\text{cm}", "5 cm", "5\\,\\text{cm}", "5 \\mathrm{~cm}", "5 \\text{ cm}^2", "5 square units", "5.0 \\text{ m}^{2}"],
    ["1\\frac{1}{2}", "\\frac32", "1.5", "1 1/2", "3/2", "1\\frac12", "1½", "\\frac{3}{2}", "1.50", "\\tfrac32"], ["-2\\frac13", "-\\frac73", "-2 1/3", "-7/3"],
    ["\\pm 3", "3, -3", "-3,3", "x = \\pm 3", "±3", "\\pm\\sqrt{9}", "3 \\text{ and } -3"], ["1 \\pm \\sqrt2", "1+\\sqrt{2}, 1-\\sqrt{2}", "1-\\sqrt2 \\text{ or } 1+\\sqrt2"],
    ["1010_2", "1010_{2}", "1010_{ 2 }".replace(" ", "")], ["3+4i", "4i+3", "3 + 4 i", "4i + 3.0"], ["i", "\\sqrt{-1}", "-i^3"], ["\\infty", "+\\infty", "∞", "infinity"], ["-\\infty", "−∞"],
    ["10,000", "10000", "10\\,000", "10{,}000", "10 000", "1 \\times 10^4", "10^4", "10,\\!000", "10^{4}"], ["1,00,000", "100000"], ["2^{100}", "1267650600228229401496703205376", "4^{50}"], ["12345678901234567890", "12345678901234567890.0"],
    ["\\sqrt{12}", "2\\sqrt3", "\\sqrt{4 \\cdot 3}", "2 \\cdot \\sqrt{3}", "√12", "12^{1/2}", "\\frac{6}{\\sqrt{3}}"], ["\\sqrt[3]{-8}", "-2"], ["\\frac{\\pi}{4}", "\\pi/4", "π/4", "\\frac14\\pi", "0.25\\pi", "\\arctan 1", "\\frac{1}{4} \\cdot \\pi"],
    ["\\sin^2 x", "1-\\cos^2 x", "(\\sin x)^2"], ["\\log_2 8", "3", "\\log_{2} 8", "|{-3}|", "|-3|", "\\left|-3\\right|"], ["e^{x+1}", "e \\cdot e^x"], ["x_1+x_2", "x_2 + x_{1}"], ["\\text{even}", "even", "Even", "\\textbf{even}"], ["\\text{(B)}", "B", "(B)", "\\text{B}", "(b)"],
    ["\\frac{a+b}{2}", "\\frac12(a+b)", "0.5(a+b)", "(a+b)/2"], ["\\$5.00", "5", "$5", "\\$5"], ["0", "-0", "0.0", "\\frac{0}{5}"], ["3 \\text{ hours } 20 \\text{ minutes}", "3 hours 20 minutes", "3\\text{ hours }20\\text{ minutes}"],
    ["[0,1] \\cup [2,3]", "[2,3] \\cup [0,1]", "[0,1]∪[2,3]"], ["9^{9^{9^9}}", "9^{9^{9^{9}}}"], ["9" * 5000, "9" * 5000 + " "], ["3:2", "3 : 2"], ["(-1,0), (2,3)", "(2,3), (-1,0)", "\\{(2,3),(-1,0)\\}"],
]  # fmt: skip
OTHER_MATH = [  # answers of which no two say the same
    ["3 \\text{ and } 4", "12", "7", "34", "3", "(3,4)", "3 \\text{ and } 5"], ["1 2", "12", "2", "1,2", "(1,2)", "[1,2]", "(2,1)", "(1,2]", "1 2 3", "1.2"], ["3 4", "12", "7"], ["x=1, x=2", "3", "x=1, y=2", "x=1, x=3", "1"],
    ["x=5", "y=5", "5x", "x=-5", "2x=5"], ["|x|", "x", "-x"], ["\\sqrt{x^2}", "x", "-x"], ["x^3", "|x|^3", "|x^2|x^2"], ["0.(3)", "0", "3", "0.3"], ["\\lfloor 3.7 \\rfloor", "4", "3.7", "37"], ["\\mathbb{R}", "0", "(0,\\infty)", "\\mathbb{Z}"], ["x < y", "x > y", "x \\le y"], ["2; 5", "2.5", "10", "(2,5)"],
    ["\\sin 30^\\circ", "\\sin 30", "-\\frac12"], ["1 \\mp 2", "3", "-1"], ["0.333", "\\frac13", "0.33", "0.3333333333", "0.\\overline{33}1", "0.\\overline{34}", "0.3"], ["2 \\le x < 5", "[2,5]", "(2,5)", "(2,5]", "2 \\le x < 6", "2 < x \\text{ or } x < 5", "2,5", "x \\ge 2", "2"],
    ["x > 3", "x \\ge 3", "x < 3", "x > -3", "x = 3", "x \\ne 3"], ["x < -1 \\text{ or } x > 3", "-1 < x < 3", "x < -1", "x > 3"], ["\\emptyset", "0", "\\{0\\}", "\\{\\emptyset\\}", "(0,0)"], ["5!", "5", "24", "121", "!5", "5!!", "-5!"],
    ["y=2x+1", "y=2x-1", "2x+y+1=0", "y=-2x+1", "2y=2x+1", "x=2y+1"], ["(1,2)", "(1,2,3)", "(1)(2)", "(1,3)", "\\{1,2\\}", "[1,2)"], ["\\{1,2\\}", "\\{1,2,3\\}", "\\{1\\}", "\\{1,3\\}", "3", "\\{-1,-2\\}"],
    ["\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", "\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}", "\\begin{pmatrix} 1 & 2 & 3 & 4 \\end{pmatrix}", "-2", "(1,2,3,4)"],
    ["1\\frac{1}{2}", "\\frac{1}{2}", "\\frac{11}{2}", "-1\\frac12", "2"], ["\\pm 3", "3", "-3", "0", "\\pm 2", "9"], ["1010_2", "1010", "1010_3", "10", "1011_2"], ["3+4i", "3-4i", "4+3i", "7i", "5", "7"], ["\\infty", "-\\infty", "8", "0", "\\infty^2"],
    ["10,000", "1000", "10,001", "10.000", "10,0000"], ["12345678901234567890", "12345678901234567891", "12345678901234567889", "1234567890123456789"], ["2^{100}", "2^{101}", "2^{99}", "200", "1267650600228229401496703205377"],
    ["\\sqrt{12}", "12", "3.464", "3.4641016", "\\sqrt{13}", "6", "-\\sqrt{12}"], ["\\frac{\\pi}{4}", "0.785", "\\frac{4}{\\pi}", "\\pi", "45"], ["(x+1)^2", "x^2+1", "x^2+2x", "(x-1)^2", "x+1"], ["\\frac12", "\\frac21", "12", "\\frac{1}{3}", "0.51", "\\frac{-1}{2}"],
    ["9^{9^{9^9}}", "9^{9^{9^8}}", "9", "\\infty"], ["\\frac{1}{0}", "\\infty", "0", "1", "\\frac{2}{0}"], ["9" * 5000, "9" * 4999 + "8", "9" * 4999, "-" + "9" * 5000], ["NaN", "0", "1"], ["3:2", "2:3", "1.5", "32"], ["\\text{even}", "\\text{odd}", "\\text{even number}", "e"],
    ["\\text{(A)}", "\\text{(B)}", "\\text{AB}", "(C)"], ["3 \\text{ hours } 20 \\text{ minutes}", "60", "3 \\text{ hours } 21 \\text{ minutes}", "3", "23"], ["[0,1] \\cup [2,3]", "[0,3]", "[0,1]", "[0,1] \\cup [2,4]", "[0,1], [2,3]", "(0,1) \\cup (2,3)"], ["", "0", "1"], ["e^x", "e^{-x}", "ex", "e", "x^e"],
    ["x_1+x_2", "x_1+x_3", "2x", "x_1"], ["\\sin x", "\\cos x", "\\sin^2 x", "\\sin 2x", "x"], ["1,2,2", "1,2", "1,1,2", "2,2,2"], ["(-1,0), (2,3)", "(-1,2), (0,3)", "(0,-1), (3,2)", "-1,0,2,3"], ["100_{10}", "10", "1"], ["2^3", "6", "23", "3^2", "2_3"], ["1000", "1e3", "100", "1000000"],
]  # fmt: skip


@pytest.mark.parametrize("group", SAME_MATH, ids=lambda group: group[0][:20])
def test_the_table_of_answers_that_say_the_same(group):
    assert [pair for pair in itertools.permutations(group, 2) if not same_math(*pair)] == []


@pytest.mark.parametrize("group", OTHER_MATH, ids=lambda group: group[0][:20])
def test_the_table_of_answers_that_do_not(group):
    assert [pair for pair in itertools.permutations(group, 2) if same_math(*pair)] == []
    assert all(same_math(each, each) for each in group)


def test_the_tables_are_large():
    same, other = (
        sum(len(group) * (len(group) - 1) // 2 for group in table) for table in (SAME_MATH, OTHER_MATH)
    )
    assert same > 300 and other > 300


HOSTILE = [
    "(" * 900 + "1" + ")" * 900, "{" * 900 + "1" + "}" * 900, "\\sqrt{" * 300 + "2" + "}" * 300, "(" * 300 + "1,2" + ")" * 300, "\\{" * 60 + "1,2" + "\\},3" * 60, "(" * 5000, "[" * 20_000, "{" * 5000, "|" * 900,
    "9^9^9^9", "9^{9^{9^9}}", "9^{99999999}", "(9^{99})^{99}", "10^{10^{10}}", "9^" * 5000 + "9", "x^" * 900 + "x", "e^{e^{e^{e^{e}}}}", "i^{i^{i^i}}", "0^{-1}", "0^0", "1/0", "\\frac{0}{0}", "\\log 0", "NaN", "inf", "1e999999999",
    "500!" * 400, "99999999!", "5" + "!" * 900, "((300!)!)!", "\\binom{500}{250}" * 100, "9" * 5000, "0." + "9" * 5000, "0.\\overline{" + "3" * 1500 + "}", "\\frac{" + "1" * 5000 + "}{3}", "1/" * 5000, "1 1/" * 3000, "=1" * 5000,
    "1," * 900, "1," * 5000, "x," * 900 + "y", "\\pm 1" * 20, "\\pm" * 20 + "1", "1 \\pm 2, " * 300, "\\text{" * 600, "\\text{a}" * 280, "3\\text{ and }" * 140, "x and " * 300, "x<" * 500, "2 \\le x" * 200, "\\cup" * 400, "(1,2)\\cup" * 200,
    "-" * 5000 + "1", "\\frac" * 3000, "\\boxed{" * 3000, "answer is " * 5000, "**Answer**\n" * 3000, "#### " * 4000, "answer:" * 20_000, "1,234," * 20_000, "1 234 " * 20_000, "1.234." * 20_000, "^" * 20_000, "a" * 2000, "a b " * 500,
    "the answer is 5 = " + "1 + " * 5000, " " * 50_000, ".\n" * 9999, "\0", "\ud800", "\u0661\u0662", "²" * 500, "½" * 500, "$" * 2000, "\\begin{pmatrix}" * 100, "\\begin{pmatrix}" + "1&" * 500 + "\\end{pmatrix}", "1_2" * 300,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{ascii(text[:12])} of {len(text)}")
def test_hostile_text_ends(text):
    """Each of these would take minutes, gigabytes or the whole stack if it were taken at its word."""
    for read in (final_number, final_letter, final_math):
        read(text)
    assert same_math(text, text + " ") or text.startswith("\\text{\\text")
    for other in ("7654321", text[::-1] + "7", text + "7"):
        assert not same_math(text, other) and not same_math(other, text)


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
        for form in (
            "\\boxed{{{}}}",
            "\\boxed{{${}$.}}",
            "Final Answer: The final answer is ${}$. I hope it is correct.",
        ):
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
    assert (
        CHECKERS["none"].is_right(question, "x") is None
        and CHECKERS["none"].final_answer(question, "x") is None
    )
