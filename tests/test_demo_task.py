"""Protects: the grammar's answers are right, wrong ones are found at the right character, no problem is trained on twice."""

import random
import re
from itertools import islice

import pytest
from conftest import ROOT

from scripts.lib.demo_task import (
    FAMILIES,
    WAIT,
    Problem,
    Step,
    annotated,
    answer_of,
    check,
    is_held_out,
    make_problem,
    problems,
    write_answer,
    write_answer_with_errors,
)
from scripts.train_demo import training_row
from tokenizer import decode, load_tokenizer

STORY = Problem(
    "story",
    "Mia has 47 apples. She buys 38. How many apples now?",
    "Mia",
    "apples",
    (Step("+", 47, 38, 85),),
    85,
)
LIST = Problem(
    "list",
    "The list is [7,3,9]. Sort it. What is the largest?",
    "",
    "largest",
    (Step("sort", (7, 3, 9), 0, (3, 7, 9)),),
    9,
)


@pytest.mark.parametrize(
    "problem, text, right, at",
    [
        (STORY, " First, Mia gains 38 apples, so we have 47+38=85 apples. The answer is 85.", True, None),
        (STORY, " To start, she gets 38 of them, and there are 47+38=85. So the result is 85.", True, None),
        (STORY, " First, Mia gains 38 apples, so we have 47+38=86 apples. The answer is 85.", False, "6 apples. The"),
        (STORY, " First, Mia gains 38 apples, so we have 74+38=85 apples. The answer is 85.", False, "74+"),
        (STORY, " First, Mia drops 38 apples, so we have 47-38=9 apples. The answer is 9.", False, "drops"),
        (STORY, " The answer is 85.", False, "he answer"),  # " T" could still become " To start,"
        (STORY, " First, Mia gains 38 apples, so we have 47+38=85 apples.", False, ""),
        (STORY, " First, Mia gains 38 apples, so we have 47+38=85 apples. The answer is 85. Next,", False, " Next,"),
        (STORY, " First, Mia gains 38 apples, so we have 47+38=9" + WAIT, False, ""),
        (STORY, f" First, Mia gains 83{WAIT} First, Mia gains 38 apples, so we have 47+38=85. The answer is 85.", True, None),
        (LIST, " First, sort it, so the list is [3,7,9] now. Answer: 9.", True, None),
        (LIST, " First, sort it, so the list is [3,9,7]. Answer: 9.", False, "9,7]"),
        (LIST, " First, sort it, so the list is [3,7]. Answer: 9.", False, "]. Answer"),
    ],
)  # fmt: skip
def test_checking_by_hand(problem, text, right, at):
    verdict = check(problem, text)
    assert verdict.right is right
    if at is None:
        assert verdict.first_error is None
    else:
        assert text[verdict.first_error :].startswith(at) and (at or verdict.first_error == len(text))


def test_final_answers_are_read():
    assert [
        answer_of(text) for text in (" The answer is 85.", " So the result is 7.", " Answer: 12.", " 85")
    ] == [
        85,
        7,
        12,
        None,
    ]


def test_answers_of_any_length_are_read():
    for digits in ("1" * 5000, "٣"):
        text = f" The answer is {digits}."
        assert (
            answer_of(text) is None and not check(STORY, text).right and not check(STORY, text).answer_right
        )
    assert answer_of(" The answer is 85." * 20_000) == 85 and not check(STORY, WAIT * 20_000).right


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_grammar_writes_is_right_and_its_errors_are_where_it_says(family):
    rng = random.Random(3)
    for _ in range(400):
        problem = make_problem(rng, family)
        for style in ("target", "draft"):
            assert check(problem, write_answer(problem, style, rng)).right
        text, spans = write_answer_with_errors(problem, "target", rng, 0.4)
        assert check(problem, text).right  # every error is taken back
        assert text.count(WAIT) == len(spans)
        if spans:
            start, end = spans[0]
            assert check(problem, text[:end]).first_error == start
            assert text[end:].startswith(WAIT)


def test_the_arithmetic_is_pythons():
    for problem in islice(problems(5, held_out=False, family="story"), 200):
        total = int(re.search(r"has (\d+)", problem.question)[1])
        for word, number in re.findall(
            r"(buys|finds|wins|sells|loses|eats|multiplies it by) (\d+)", problem.question
        ):
            n = int(number)
            total = (
                total + n
                if word in ("buys", "finds", "wins")
                else total - n
                if word != "multiplies it by"
                else total * n
            )
        assert total == problem.answer > 0


def test_styles_prefer_different_words():
    rng = random.Random(0)
    answers = {
        style: [write_answer(STORY, style, rng).split()[0] for _ in range(300)]
        for style in ("target", "draft")
    }
    assert answers["target"].count("First,") > 200 and answers["draft"].count("To") > 200


def test_held_out_problems_are_never_trained_on():
    held = {problem.question for problem in islice(problems(1, held_out=True), 300)}
    trained = {problem.question for problem in islice(problems(1, held_out=False), 3000)}
    assert not held & trained and len(held) == 300
    assert all(is_held_out(problem) for problem in islice(problems(9, held_out=True), 20))
    assert [p.question for p in islice(problems(4, True), 5)] == [
        p.question for p in islice(problems(4, True), 5)
    ]


def test_training_rows_skip_the_question_and_the_wrong_tokens():
    import sentencepiece

    folder = ROOT / "checkpoints" / "demo" / "target"
    sp, tokenizer = (
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")),
        load_tokenizer(folder),
    )
    rng, noticed = random.Random(1), 0
    for problem in islice(problems(2, held_out=False), 200):
        ids, mask = training_row(sp, problem, "target", rng)
        assert ids[0] == sp.bos_id() and ids[-1] == sp.eos_id() and len(ids) == len(mask) and mask[-1] == 1
        question = len(tokenizer.encode(problem.question)) + 1
        assert not any(mask[:question]) and mask[question]
        answer = decode(tokenizer, ids[question:-1])
        assert check(problem, answer).right
        masked = [i for i in range(question, len(ids)) if not mask[i]]
        noticed += answer.count(WAIT)
        assert bool(masked) == (WAIT in answer)
        if masked:
            assert check(problem, decode(tokenizer, ids[question : masked[0]])).first_error == len(
                decode(tokenizer, ids[question : masked[0]])
            )
    assert noticed > 50


def test_answers_are_annotated_at_the_first_wrong_word_or_digit():
    text = " First, Mia gains 38 apples, so we have 47+38=86 apples. The answer is 86."
    item = annotated(STORY, text, "test")
    assert [text[a:b] for a, b in item["errors"]] == ["6"] and item["prompt"] == STORY.question
    text = " First, Mia drops 38 apples"
    assert [text[a:b] for a, b in annotated(STORY, text, "test")["errors"]] == ["drops"]
    assert annotated(STORY, " First, Mia gains", "test")["errors"] == []
    text = f" First, Mia gains 83{WAIT} First, Mia gains 38 apples, so we have 47+38=84"
    assert [text[a:b] for a, b in annotated(STORY, text, "test")["errors"]] == ["8", "4"]
