"""Protects: reading questions from one's own files and from the public ones, the words they are put in, their flags."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
from conftest import DATA

from cli import InputError, Parser
from scripts.lib import sandbox, tasks
from scripts.lib.demo_task import is_held_out, write_answer
from scripts.lib.public_tasks import TASKS, read_task, training_path
from scripts.lib.scoring import CHECKERS, Question
from scripts.lib.tasks import add_question_flags, load_questions, questions_of

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
        tmp_path / "q.jsonl",
        {"question": "6*3?", "answer": 18},
        {"prompt": "A or B?", "reference": "(B)", "checker": "choice"},
    )
    number, choice = load_questions(str(path), "number")
    right, wrong = CHECKERS["number"].is_right, "It is 18, or 17"
    assert (
        right(number, "18.00")
        and right(number, "$18 a day")
        and not right(number, wrong)
        and not right(number, "?")
    )
    assert (
        CHECKERS["number"].final_answer(number, wrong) == "17"
        and CHECKERS["number"].final_answer(number, "?") is None
    )
    right = CHECKERS["choice"].is_right
    assert (
        right(choice, "The answer is B.") and not right(choice, "The answer is A.") and not right(choice, "?")
    )


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
    ("{", "line 2 is not valid JSON"), ("[1]", "line 2 is a JSON list, not an object"), ({"reference": "1"}, "line 2 has no field 'prompt' or 'question'"),
    ({"prompt": "p"}, "line 2 has no field 'reference'"), ({"prompt": " ", "answer": "1"}, "line 2: field 'prompt'"),
    ({"prompt": ["p"], "answer": "1"}, "line 2: field 'prompt'"), ({"prompt": "p", "answer": True}, "line 2: field 'answer'"),
    ({"prompt": "p", "answer": "many"}, "line 2: the reference 'many' gives no number"), ({"prompt": "\ud800", "answer": "1"}, "line 2 holds half of a surrogate pair"),
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
        (path, None, None, "line 1: field 'checker' is None"), (path, "magic", None, "--checker magic"),
        (tmp_path / "no.jsonl", "number", None, "There is no file --questions"), (tmp_path, "number", None, "is a folder"),
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
    assert (
        checker.final_answer(story, answer) == str(story.content.answer)
        and checker.final_answer(story, text) is None
    )
    good = write_answer(story.content, "target", random.Random(0))
    assert (
        checker.is_right(story, good)
        and not checker.is_right(story, answer)
        and not checker.is_right(other, good)
    )
    assert story.reference == "" and {q.group for q in load_questions("demo:list", "demo", limit=5)} == {
        "list"
    }
    assert len(load_questions("demo", None)) == tasks.DEMO_LIMIT
    for held_out in (True, False):
        questions = load_questions("demo", None, limit=20, held_out=held_out)
        assert all(is_held_out(q.content) == held_out for q in questions)
    assert load_questions("demo", None, 5, seed=1) != load_questions("demo", None, 5, seed=2)


def test_flags_name_the_questions(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", {"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"})
    parser = Parser("")
    add_question_flags(parser)
    assert questions_of(parser.parse_args(["--limit", "3"])) == load_questions("demo", None, 3)
    args = parser.parse_args(
        ["--questions", str(path), "--checker", "number", "--limit", "1", "--allow_code_execution"]
    )
    assert [q.prompt for q in questions_of(args)] == ["p"] and sandbox.code_is_allowed


def parsed(*argv):
    parser = Parser("")
    add_question_flags(parser)
    parser.add_argument("--chat", action="store_true")
    return parser.parse_args(argv)


@pytest.mark.parametrize("flag", ["--limit", "--shots", "--seed"])
@pytest.mark.parametrize("text", ["0", "-1", "1e3", "9" * 400, "1" * 5000, "\u0663", "", "nan"])
def test_hostile_numbers_are_refused(flag, text, capsys):
    if text in {"--limit": (), "--shots": ("0",), "--seed": ("0", "-1")}[flag]:
        assert getattr(parsed(flag, text), flag[2:]) == int(text)
        return
    with pytest.raises(SystemExit) as stop:
        parsed(flag, text)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and f"{flag} " in err
        and "must be" in err
        and err.count("\n") == 1
        and len(err) < 300
    )


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
        ((*gsm8k, "--checker", "number"), "without --questions and --checker"),
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
    train = write_lines(
        tmp_path / "train.jsonl", *({"question": f"t{n}", "answer": f"a{n}\n#### {n}"} for n in range(3))
    )
    (question,) = read_task("gsm8k", path, chat=False, shots=2)
    assert (
        question.prompt
        == "Question: t0\nAnswer: a0\n#### 0\n\nQuestion: t1\nAnswer: a1\n#### 1\n\nQuestion: q\nAnswer:"
    )
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
    assert [
        q.reference for q in read_task("mmlu", tmp_path / "test" / "law_test.csv", chat=False, shots=2)
    ] == ["D", "A"]
    with pytest.raises(InputError, match="has 1 examples of art_history"):
        read_task("mmlu", tmp_path, chat=False, shots=2)


ROW = "q?,a,b,c,d,B\n"
HOSTILE = {  # file name -> (content, words)
    "loop.jsonl": (None, "cannot be read: Too many levels"), "n" * 300: (None, "cannot be read: File name too long"),
    "fifo.jsonl": ("fifo", "is a pipe"), "folder.jsonl": ("folder", "is a folder"), "latin.jsonl": (b"\xff\n", "is not UTF-8"),
    "digits.jsonl": (b'{"question": ' + b"1" * 5000 + b"}", "line 1 is not valid JSON: a whole number of 5000 digits"),
    "deep.jsonl": (b"[" * 10**5, "line 1 is nested too deeply"), "half.jsonl": (rb'{"question": "\ud800", "answer": "#### 1"}', "half of a surrogate pair"),
    "bomb.jsonl.gz": (gzip.compress(b"x" * (1 << 27)), "characters"), "cut.jsonl.gz": (gzip.compress(b"{}" * 99)[:-9], "cannot be read"),
    "no.jsonl.gz": (b"{}", "cannot be read: Not a gzipped file"), "end.jsonl.gz": (gzip.compress(b"{}")[:-8] + b"\0" * 8, "cannot be read: CRC"),
    "m_test.csv": (ROW.encode() + b"q" * 200000 + b",a,b,c,d,B\n", "is no CSV: field larger"), "nul_test.csv": (b"\0,a,b,c,d,E\n", "row 1 must be"),
    "head_test.csv": (b"question,c0,c1,c2,c3,answer\n", "holds no questions"), "short_test.csv": (b"q\n", "row 1 must be"),
    "deep.json": (b"[" * 10**5, "nested too deeply"), "digits.json": (b"[" + b"1" * 5000 + b"]", "5000 digits"),
    "many.json": (json.dumps([{"instruction": "Please choose the correct answer to the question: q\n\n" + " ".join(f"Answer{n % 10}: c" for n in range(1, 13))
                               + "\n\nAnswer format: a/b", "answer": "answer1"}]).encode(), "question 1 must have"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: name[:20])
def test_damaged_data_is_one_sentence_with_its_cause(name, tmp_path):
    path, (content, words) = tmp_path / name, HOSTILE[name]
    if content in ("fifo", "folder"):
        (os.mkfifo if content == "fifo" else os.mkdir)(path)
    elif content is not None:
        path.write_bytes(content)
    elif len(name) < 255:
        path.symlink_to(name)
    task = "mmlu" if name.endswith("csv") else "arc" if name.endswith(".json") else "gsm8k"
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_task(task, path, chat=True)
    assert len(str(caught.value)) < 1000
    if task == "gsm8k":
        with pytest.raises(InputError, match=re.escape(words)):
            load_questions(str(path), "number")


def test_data_in_the_working_folder(tmp_path, monkeypatch):
    """Names without a folder before them, and folders that are the working folder, its parent, or the root."""
    (tmp_path / "m_test.csv").write_text(ROW)
    (tmp_path / "m_dev.csv").write_text("e?,a,b,c,d,A\n")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    (question,) = read_task("mmlu", Path("m_test.csv"), chat=False, shots=0)
    assert question.prompt.endswith("q?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    assert "e?\nA. a" in read_task("mmlu", Path("m_test.csv"), chat=False, shots=1)[0].prompt
    (tmp_path / "m_dev.csv").unlink()
    with pytest.raises(InputError, match="needs examples"):
        read_task("mmlu", Path("m_test.csv"), chat=False, shots=1)
    for folder in (".", "in/..", str(tmp_path)):
        assert len(read_task("mmlu", Path(folder), chat=True)) == 1
        with pytest.raises(InputError, match="needs examples"):
            read_task("mmlu", Path(folder), chat=False)
    monkeypatch.chdir(tmp_path / "in")
    assert len(read_task("mmlu", Path(".."), chat=False, shots=0)) == 1
    with pytest.raises(InputError, match="needs examples"):
        read_task("mmlu", Path(".."), chat=False)
    assert (
        training_path(TASKS["mmlu"], Path("/")) == Path("/dev")
        and training_path(TASKS["gsm8k"], Path("/test.jsonl")).is_absolute()
    )
    with pytest.raises(InputError, match="--shots_data x names examples"):
        read_task("mmlu", Path(".."), chat=True, shots_data=Path("x"))


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
        q
        for q in read_task("mt_bench", DATA / "mt_bench" / "question.jsonl", chat=False)
        if q.content["question_id"] == 81
    )
    assert base.prompt.startswith("USER: Compose an engaging") and base.prompt.endswith("\nASSISTANT:")
    assert base.more_turns == (
        "\nUSER: Rewrite your previous response. Start every sentence with the letter A.\nASSISTANT:",
    )
    spec = read_task("spec_bench", DATA / "spec_bench" / "question.jsonl", chat=True, limit=13)
    assert len({q.group for q in spec}) == 13  # a limit takes the categories in turn


@needs_data
def test_all_keys_of_arc_and_mmlu_are_right():
    for task, path in (
        ("arc", "arc/ARC-Challenge_test.json"),
        ("arc", "arc/ARC-Easy_test.json"),
        ("mmlu", "mmlu"),
    ):
        for chat in (False, True):
            questions = read_task(task, DATA / path, chat, shots=0)
            for text in ("The best answer is {}", " {}", "**{}**", "({})"):
                assert all(CHECKERS["choice"].is_right(q, text.format(q.reference)) for q in questions)
            assert not any(
                CHECKERS["choice"].is_right(q, "The best answer is " + "BCDEA"["ABCDE".index(q.reference)])
                for q in questions
            )
    assert TASKS["mmlu"].shots == 5 and TASKS["arc"].shots == 25
