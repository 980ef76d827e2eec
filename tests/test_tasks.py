"""Protects: reading questions from one's own files and from the public ones, the words they are put in, their flags."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from conftest import DATA

from cli import InputError, Parser
from scripts import sandbox, tasks
from scripts.demo_task import is_held_out, write_answer
from scripts.public_tasks import TASKS, read_task
from scripts.scoring import CHECKERS, Question
from scripts.tasks import add_question_flags, load_questions, questions_of

needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the public files, see scripts/download.py")


@pytest.fixture(autouse=True)
def forgets(monkeypatch, tmp_path):
    """Each test starts without permission, and with folders for tested code that are its own."""
    monkeypatch.setattr(sandbox, "code_is_allowed", False)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    sandbox.outcome_of.cache_clear()


def write_lines(path: Path, *items) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


def test_answers_are_right_when_they_say_what_the_reference_says(tmp_path):
    path = write_lines(
        tmp_path / "q.jsonl", {"question": "6*3?", "answer": 18}, {"prompt": "A or B?", "reference": "(B)", "checker": "choice"}
    )
    number, choice = load_questions(str(path), "number")
    right, wrong = CHECKERS["number"].is_right, "It is 18, or 17"
    assert right(number, "18.00") and right(number, "$18 a day") and not right(number, wrong) and not right(number, "?")
    assert CHECKERS["number"].final_answer(number, wrong) == "17" and CHECKERS["number"].final_answer(number, "?") is None
    right = CHECKERS["choice"].is_right
    assert right(choice, "The answer is B.") and not right(choice, "The answer is A.") and not right(choice, "?")


def test_questions_are_read_with_all_spellings_of_their_fields(tmp_path):
    lines = [
        {"prompt": "p", "question": "q", "reference": "1", "answer": "2", "group": "g"}, "",
        {"question": "q", "answer": "it is\n#### 2", "subject": "s"}, {"prompt": "r", "canonical_solution": "3", "checker": "number"},
    ]  # fmt: skip
    path = write_lines(tmp_path / "q.jsonl", *lines)
    with gzip.open(tmp_path / "q.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    got = load_questions(str(path), "number")
    assert [(q.index, q.prompt, q.reference, q.checker, q.group) for q in got] == [
        (0, "p", "1", "number", "g"), (1, "q", "it is\n#### 2", "number", "s"), (2, "r", "3", "number", "")
    ]  # fmt: skip
    assert load_questions(str(tmp_path / "q.jsonl.gz"), "number") == got
    assert load_questions(str(path), "number", limit=2) == got[:2]
    ids = {q.id for q in [*got, Question(0, "p", "A", "choice")]}
    assert len(ids) == 4 and all(re.fullmatch("[0-9a-f]{16}", id) for id in ids)
    assert got[0].id == Question(7, "p", "9", "number").id  # by checker and prompt alone


@pytest.mark.parametrize("line, words", [
    ("{", "line 2 is not valid JSON"), ("[1]", "line 2 is no JSON object"), ({"reference": "1"}, "line 2 has no field 'prompt' or 'question'"),
    ({"prompt": "p"}, "line 2 has no field 'reference'"), ({"prompt": " ", "answer": "1"}, "line 2: field 'prompt'"),
    ({"prompt": ["p"], "answer": "1"}, "line 2: field 'prompt'"), ({"prompt": "p", "answer": True}, "line 2: field 'answer'"),
    ({"prompt": "p", "answer": "many"}, "line 2: the reference 'many' gives no number"), ({"prompt": "\ud800", "answer": "1"}, "line 2: field 'prompt' is not valid Unicode"),
    ({"prompt": "p", "answer": "1", "checker": "magic"}, "line 2: field 'checker' is 'magic'"), ({"prompt": "p", "answer": "1", "checker": "demo"}, "line 2: field 'checker'"),
    ({"prompt": "p", "answer": "1", "checker": ["number"]}, "line 2: field 'checker'"), ({"prompt": "p", "answer": "K", "checker": "choice"}, "line 2: the reference 'K' gives no letter"),
    ({"prompt": "p", "answer": "1", "checker": "code", "entry_point": "f"}, "line 2 has no field 'test'"), ({"prompt": "p", "checker": "code", "test": "t", "entry_point": "f("}, "line 2: field 'entry_point'"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line, words):
    sandbox.allow_code_execution()
    path = write_lines(tmp_path / "q.jsonl", {"prompt": "p", "answer": "1"}, line)
    with pytest.raises(InputError, match=r"q\.jsonl, " + re.escape(words)):
        load_questions(str(path), "number")
    assert load_questions(str(path), "number", limit=1)


def test_a_wrong_source_is_named(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", {"prompt": "p", "answer": "1"})
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    (tmp_path / "plain.gz").write_text("not gzipped")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    for source, checker, limit, words in (
        (path, None, None, "line 1: field 'checker' is None"), (path, "magic", None, "--checker magic"), (path, "number", 0, "--limit 0"),
        (tmp_path / "no.jsonl", "number", None, "no.jsonl cannot be read: No such file"), (tmp_path, "number", None, "cannot be read"),
        (tmp_path / "empty.jsonl", "number", None, "holds no questions"), (tmp_path / "latin.jsonl", "number", None, "latin.jsonl is not UTF-8"),
        (tmp_path / "plain.gz", "number", None, "plain.gz cannot be read"), (tmp_path / "cut.gz", "number", None, "cut.gz cannot be read"),
        ("demo:poem", None, None, "demo:poem"), ("demo", "number", None, "--checker demo"), (path, "demo", None, "field 'checker' is 'demo'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(words)):
            load_questions(str(source), checker, limit)


def test_demo_questions_are_right_at_every_step():
    story, other = load_questions("demo:story", None, limit=2)
    text = " First, {} so we have {}."  # no right step
    checker = CHECKERS[story.checker]
    answer = f"{text} The answer is {story.content.answer}."
    assert checker.final_answer(story, answer) == str(story.content.answer) and checker.final_answer(story, text) is None
    good = write_answer(story.content, "target", random.Random(0))
    assert checker.is_right(story, good) and not checker.is_right(story, answer) and not checker.is_right(other, good)
    assert story.reference == "" and {q.group for q in load_questions("demo:list", "demo", limit=5)} == {"list"}
    assert len(load_questions("demo", None)) == tasks.DEMO_LIMIT
    for held_out in (True, False):
        questions = load_questions("demo", None, limit=20, held_out=held_out)
        assert all(is_held_out(q.content) == held_out for q in questions)
    assert load_questions("demo", None, 5, seed=1) != load_questions("demo", None, 5, seed=2)


def test_flags_name_the_questions(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", {"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"})
    parser = Parser("")
    add_question_flags(parser.add_argument)
    assert questions_of(parser.parse_args(["--limit", "3"])) == load_questions("demo", None, 3)
    args = parser.parse_args(["--questions", str(path), "--checker", "number", "--limit", "1", "--allow_code_execution"])
    assert [q.prompt for q in questions_of(args)] == ["p"] and sandbox.code_is_allowed


def parsed(*argv):
    parser = Parser("")
    add_question_flags(parser.add_argument)
    parser.add_argument("--chat", action="store_true")
    return parser.parse_args(argv)


def test_a_wrong_task_is_one_sentence(tmp_path):
    write_lines(tmp_path / "q.jsonl", {"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "1"})
    write_lines(tmp_path / "mt.jsonl", {"question_id": 1, "turns": []})
    write_lines(tmp_path / "id.jsonl", {"question_id": "1", "turns": ["a"]})
    write_lines(tmp_path / "arc.json", [{"instruction": "x", "answer": "answer1"}])
    (tmp_path / "mmlu_test.csv").write_text("q,a,b,c,d,B\nq,a,b,c,d,E\n")
    (tmp_path / "empty").mkdir()
    gsm8k = ("--task", "gsm8k", "--data", str(tmp_path / "q.jsonl"))
    for argv, words in (
        (gsm8k, "line 2: the answer must end in ####"), (("--task", "gsm8k"), "goes with --data"), (("--data", "x"), "belong to a --task"),
        ((*gsm8k, "--checker", "number"), "without --questions and --checker"), ((*gsm8k, "--limit", "0"), "--limit 0"),
        (("--task", "mt_bench", "--data", str(tmp_path / "mt.jsonl")), "field 'turns'"), (("--task", "mt_bench", "--data", str(tmp_path / "id.jsonl")), "field 'question_id'"),
        (("--task", "arc", "--data", str(tmp_path / "arc.json")), "question 1 must have"), (("--task", "arc", "--data", str(tmp_path / "q.jsonl")), "one JSON array"),
        (("--task", "mmlu", "--data", str(tmp_path / "mmlu_test.csv")), "row 2 must be"), (("--task", "mmlu", "--data", str(tmp_path / "empty")), "no CSV files"),
        (("--task", "math500", "--data", str(tmp_path / "q.jsonl")), "field 'problem'"), (("--task", "humaneval", "--data", str(tmp_path / "q.jsonl")), "--allow_code_execution"),
        (("--task", "gsm8k", "--data", str(tmp_path / "no.jsonl")), "--data"), (("--task", "demo", "--questions", str(tmp_path / "q.jsonl")), "one of --task and --questions"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(words)):
            questions_of(parsed(*argv), scored=False)
    with pytest.raises(InputError, match="needs --chat here"):
        questions_of(parsed(*gsm8k), stops=False)
    with pytest.raises(InputError, match="no right and wrong"):
        questions_of(parsed("--task", "mt_bench", "--data", str(tmp_path / "mt.jsonl")))


def test_examples_come_from_beside(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", {"question": "q", "answer": "#### 1"})
    with pytest.raises(InputError, match=r"no .*train\.jsonl.*--shots_data"):
        read_task("gsm8k", path, chat=False)
    train = write_lines(tmp_path / "train.jsonl", *({"question": f"t{n}", "answer": f"a{n}\n#### {n}"} for n in range(3)))
    (question,) = read_task("gsm8k", path, chat=False, shots=2)
    assert question.prompt == "Question: t0\nAnswer: a0\n#### 0\n\nQuestion: t1\nAnswer: a1\n#### 1\n\nQuestion: q\nAnswer:"
    assert question.asked == "Question: q\nAnswer:" and question.stops == ("Question:",)
    assert read_task("gsm8k", train, chat=False, shots=1, shots_data=path)[0].prompt.startswith(
        "Question: q\nAnswer: #### 1\n\n"
    )
    with pytest.raises(InputError, match="--shots 5 is too many.*3 examples"):
        read_task("gsm8k", path, chat=False)
    assert read_task("gsm8k", path, chat=True)[0].stops == ()


def test_mmlu_is_read_in_both_forms_and_a_limit_takes_subjects_in_turn(tmp_path):
    for part in ("test", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"law_{part}.csv").write_text(
            'question,choice0,choice1,choice2,choice3,answer\n"a, b?",1,2,3,4,3\nc?,5,6,7,8,0\n'
        )
        (tmp_path / part / f"art_history_{part}.csv").write_text("d?,1,2,3,4,B\n")
    questions = read_task("mmlu", tmp_path, chat=False, shots=1, limit=2)
    assert [(q.group, q.reference) for q in questions] == [("art_history", "B"), ("law", "D")]
    assert questions[0].prompt == (
        "The following are multiple choice questions (with answers) about art history.\n\n"
        "d?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\nd?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert [q.reference for q in read_task("mmlu", tmp_path / "test", chat=False, shots=1)] == ["B", "D", "A"]
    assert [q.reference for q in read_task("mmlu", tmp_path / "test" / "law_test.csv", chat=False, shots=2)] == ["D", "A"]
    with pytest.raises(InputError, match="has 1 examples of art_history"):
        read_task("mmlu", tmp_path, chat=False, shots=2)


@needs_data
def test_the_public_files_are_read_whole():
    sandbox.code_is_allowed = True
    sizes = {"gsm8k/test.jsonl": 1319, "humaneval/HumanEval.jsonl.gz": 164, "arc/ARC-Challenge_test.json": 1172, "arc/ARC-Easy_test.json": 2376,
             "mmlu": 14042, "math500/test.jsonl": 500, "mt_bench/question.jsonl": 80, "spec_bench/question.jsonl": 480}  # fmt: skip
    for path, size in sizes.items():
        for chat in (False, True):
            questions = read_task(path.split("/")[0], DATA / path, chat)
            assert len(questions) == len({q.index for q in questions}) == size, path
            assert all(q.prompt.endswith(q.asked) for q in questions)


@needs_data
def test_prompts_are_those_of_the_harnesses():
    """Written out by hand from lm-evaluation-harness' templates and the files' first lines."""
    base = read_task("arc", DATA / "arc" / "ARC-Challenge_test.json", chat=False, shots=1)[0]
    assert base.asked == (
        "An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most likely effect of this "
        "increase in rotation?\nA. Planetary density will decrease.\nB. Planetary years will become longer.\nC. Planetary days will "
        "become shorter.\nD. Planetary gravity will become stronger.\nAnswer:"
    )
    assert base.reference == "C" and re.search(r"\nAnswer: [A-D]\n\nAn astronomer", base.prompt)
    chat = read_task("mmlu", DATA / "mmlu" / "test" / "abstract_algebra_test.csv", chat=True)[0]
    assert chat.prompt == (
        "Given the following question and four candidate answers (A, B, C and D), choose the best answer.\n"
        "Question: Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\n"
        'Your response should end with "The best answer is [the_answer_letter]" where the [the_answer_letter] is one of A, B, C or D.'
    )
    robe = read_task("gsm8k", DATA / "gsm8k" / "test.jsonl", chat=True)[1]
    assert robe.prompt == (
        "Given the following problem, reason and give a final answer to the problem.\nProblem: A robe takes 2 bolts of blue fiber and "
        "half that much white fiber.  How many bolts in total does it take?\n"
        'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.'
    )
    first = next(q for q in read_task("math500", DATA / "math500" / "test.jsonl", chat=False) if q.index == 1)
    assert first.prompt.startswith("Problem:\nDefine\n\\[p =") and first.prompt.endswith(
        "in terms of $p$ and $q.$\n\nSolution:"
    )
    three = [
        q
        for q in read_task("arc", DATA / "arc" / "ARC-Challenge_test.json", chat=True)
        if len(re.findall(r"\n[A-E]\. ", q.prompt)) != 4
    ]
    assert len(three) == 7 and any(
        "three candidate answers (A, B and C)" in q.prompt and "one of A, B or C." in q.prompt for q in three
    )


@needs_data
def test_conversations_keep_all_turns():
    questions = read_task("mt_bench", DATA / "mt_bench" / "question.jsonl", chat=True)
    assert all(len(q.more_turns) == 1 and q.checker == "none" for q in questions)
    base = next(
        q for q in read_task("mt_bench", DATA / "mt_bench" / "question.jsonl", chat=False) if q.content["question_id"] == 81
    )
    assert base.prompt.startswith("USER: Compose an engaging") and base.prompt.endswith("\nASSISTANT:")
    assert base.more_turns == ("\nUSER: Rewrite your previous response. Start every sentence with the letter A.\nASSISTANT:",)
    spec = read_task("spec_bench", DATA / "spec_bench" / "question.jsonl", chat=True, limit=13)
    assert len({q.group for q in spec}) == 13  # a limit takes the categories in turn


@needs_data
def test_all_keys_of_arc_and_mmlu_are_right():
    for task, path in (("arc", "arc/ARC-Challenge_test.json"), ("arc", "arc/ARC-Easy_test.json"), ("mmlu", "mmlu")):
        for chat in (False, True):
            questions = read_task(task, DATA / path, chat, shots=0)
            for text in ("The best answer is {}", " {}", "**{}**", "({})"):
                assert all(CHECKERS["choice"].is_right(q, text.format(q.reference)) for q in questions)
            assert not any(
                CHECKERS["choice"].is_right(q, "The best answer is " + "BCDEA"["ABCDE".index(q.reference)]) for q in questions
            )
    assert TASKS["mmlu"].shots == 5 and TASKS["arc"].shots == 25
