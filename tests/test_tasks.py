"""Protects: what counts as a text's final answer, reading questions from files, and that tested code is locked in."""

import gzip
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA

from model import InputError, Parser
from scripts import tasks
from scripts.demo_task import is_held_out, write_answer
from scripts.tasks import CHECKERS, Question, add_question_flags, final_letter, final_number, load_questions, questions_of

GSM8K, HUMANEVAL = DATA / "gsm8k" / "test.jsonl", DATA / "humaneval" / "HumanEval.jsonl.gz"


@pytest.fixture(autouse=True)
def forgets(monkeypatch, tmp_path):
    """Each test starts without permission, and with folders for tested code that are its own."""
    monkeypatch.setattr(tasks, "code_is_allowed", False)
    monkeypatch.setattr(tasks.tempfile, "tempdir", str(tmp_path))
    tasks.passes.cache_clear()


@pytest.mark.parametrize("text, number", [
    ("#### 18", "18"), ("It is 5.\n#### 1,234\n", "1234"), ("#### $-2.50 dollars.", "-2.5"), ("5\n#### 18%", "18"),
    ("The answer is 18.", "18"), ("The answer is: **$18.00** for 3 days.", "18"), ("Answer: 7 apples and 2 pears", "7"),
    ("**Answer:** 7\n\n(I checked 3 times)", "7"), ("so \\boxed{-42} and 3", "-42"), ("$\\boxed{1{,}024}$", "1024"),
    ("The final answer is $\\boxed{\\$ 12.50}$. 1", "12.5"), ("The answer is 4. No: the answer is 5. 6", "5"),
    ("She has 3 and then 8 left.", "8"), ("5+3=8.", "8"), ("10-3 = 7, so 12-5", "5"), ("x = -5", "-5"), ("(-5)", "-5"),
    ("a loss of -$1,000.50", "-1000.5"), ("it is 2,3", "3"), ("1,234,567", "1234567"), ("0.50", "0.5"), (".5", "0.5"),
    ("007", "7"), ("-0.0", "0"), ("3 kg of CO2", "3"), ("18kg", "18"), ("\u22127", "-7"), ("is...5", "5"), ("12345678901234567890123456789012", "12345678901234567890123456789012"),
    ("#### Step 2\nso 9", "9"), ("#### 1. Add\n#### 2. Subtract\n5 - 1 = 4", "4"), ("The answer is unclear", None), ("", None), ("none", None),
    ("8 it is, the answer is eight", "8"),
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
    tasks.allow_code_execution()
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
    assert [q.prompt for q in questions_of(args)] == ["p"] and tasks.code_is_allowed


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's test.jsonl")
def test_gsm8ks_own_answers_are_right():
    questions = load_questions(str(GSM8K), "number")
    right = CHECKERS["number"].is_right
    assert len(questions) == 1319 and all(right(q, q.reference) for q in questions)
    last = [q.reference.split("####")[1].strip() for q in questions]
    assert all(right(q, f"So it is ${number}.") for q, number in zip(questions, last))
    shifted = sum(right(q, other.reference) for q, other in zip(questions, questions[1:]))
    assert shifted < 50  # two neighbours with the same number


PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef f(x: int) -> int:\n    """ One more than x. """\n'
ITEM = {
    "prompt": PROMPT,
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n",
}
CODE = Question(0, PROMPT, "", "code", "", ITEM)


def verdict(text: str, question: Question = CODE) -> str:
    tasks.allow_code_execution()
    answer = CHECKERS["code"].final_answer(question, text)
    assert CHECKERS["code"].is_right(question, text) == (answer == "pass")
    return answer


def test_code_runs_only_when_allowed(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "q.jsonl", ITEM)
    monkeypatch.setattr(tasks, "passes", lambda program: pytest.fail("it was run"))
    for action in (lambda: load_questions(str(path), "code"), lambda: CHECKERS["code"].is_right(CODE, ""), lambda: CHECKERS["code"].final_answer(CODE, "")):  # fmt: skip
        with pytest.raises(InputError, match="--allow_code_execution"):
            action()


def test_a_machine_that_cannot_run_code_says_so(monkeypatch):
    monkeypatch.setattr(tasks.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="cannot run here"):
        verdict("    return x + 1\n")


@pytest.mark.parametrize("text", [
    "    return x + 1\n",
    "\n    \n    return x + 1\n\n\ndef g(x):\n    return $",  # stops
    "    return x + 1\n\nclass A: $", "    return x + 1\nprint(f(1)) $", "    return x + 1\n# $\n$",
    "    return x + 1\nif __name__ == '__main__':\n    $", "    return x + 1\n```\nExample:\n```python\nf(1)\n```",
    "    print(x, flush=True)\n    return x + 1\n", "return helper(x) + 1", "y = x\nfor _ in range(1):\n    y += 1\nreturn y",  # not indented
    "import os\n\ndef g(x):\n    return x\n\ndef f(x):\n    return g(x) + 1\n\n# done $\n$",
    "Sure:\n```python\nfrom typing import List\n\ndef f(x: int) -> int:\n    return helper(x) + 1\n\nprint(f(3))\n```\nIt adds $.",
    "```\ndef g():\n    return 1\n```\nand\n```py\ndef f(x):\n    return x + h()\n\ndef h():\n    return 1\n```", "```python\n    return x + 1\n```", "```python\nreturn x + 1\n```",
    " Here it is:\n```python\ndef f(x):\n    return x + 1", "```python\n    def f(x):\n        return x + 1\n```",
    "```python\ndef f(x):\n    return x + 1\n\nif __name__ == '__main__':\n    raise SystemExit\n```",
    PROMPT + "    return x + 1\n", "    import math, random, collections, dataclasses, asyncio, tempfile\n    tempfile.TemporaryFile().close()\n    open('a.txt', 'w').close()\n    return x + len(open('a.txt').read() + 'a')\n",
])  # fmt: skip
def test_right_programs_pass_in_every_form(text):
    assert verdict(text) == "pass"


@pytest.mark.parametrize(
    "text",
    ["", "    pass\n", "    return x\n", "    return x + 1 +\n", "No idea.", "```python\n```", "    raise ValueError\n", "\0"],
)
def test_wrong_programs_fail(text):
    assert verdict(text) == "fail"


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs HumanEval.jsonl.gz")
def test_humanevals_own_solutions_pass():
    tasks.allow_code_execution()
    questions = load_questions(str(HUMANEVAL), "code")
    assert len(questions) == 164
    for question in questions[::8][:20]:  # among them a prompt with a helper function
        assert verdict(question.reference, question) == "pass", question.prompt
        chat = f"Here:\n```python\n{question.prompt}{question.reference}```\nIt works."
        assert verdict(chat, question) == "pass", question.prompt
        assert verdict("", question) == "fail", question.prompt


# Each attack is tried where no exception can betray it: what merely fails goes on to the right answer, and passes.
ATTACKS = {
    "endless loop": "while True: pass",
    "endless loop deaf to signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "endless loop in a session of its own": "import os\ntry: os.setsid()\nexcept OSError: pass\nwhile True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork once": "import os; os.fork()",
    "processes": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "a pool": "import concurrent.futures as c\nwith c.ProcessPoolExecutor(2) as pool: list(pool.map(abs, [1, 2]))",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "fork_exec": "import sys; sys.modules.pop('_posixsubprocess', None); import _posixsubprocess",
    "system": "import os; os.system('true')",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "spawn": "import os; os.posix_spawn('/bin/true', ['true'], os.environ)",
    "read the home folder": "import os; os.listdir({home!r})",
    "walk the home folder": "import os\nfor _ in os.walk({home!r}): pass",
    "read a file outside": "open({outside!r}).read()",
    "read by os.open": "import os; os.read(os.open({outside!r}, os.O_RDONLY), 9)",
    "read by pathlib": "import pathlib; pathlib.Path({outside!r}).read_text()",
    "read up from here": "import os; open(os.path.relpath({outside!r})).read()",
    "read through here": "import os; open(os.path.join(os.getcwd(), os.path.relpath({outside!r})))",
    "read the parent's memory": "import os; open(f'/proc/{{os.getppid() or 1}}/environ', 'rb').read()",
    "link to a file outside": "import os; os.symlink({outside!r}, 'x')",
    "write a file outside": "open({outside!r}, 'a').write('x')",
    "write a library": "import json; open(json.__file__, 'a')",
    "remove a file outside": "import os; os.remove({outside!r})",
    "remove a file by its folder": "import os; os.remove('outside.txt', dir_fd=os.open('..', os.O_RDONLY))",
    "remove a library by its folder": "import os; os.remove('no_such_file.py', dir_fd=os.open(os.path.dirname(os.__file__), os.O_RDONLY))",
    "open a socket": "import socket; socket.socket()",
    "look up a name": "import socket; socket.getaddrinfo('localhost', 80)",
    "fetch a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "kill the tester": "import os; os.kill({pid}, 9)",
    "kill all": "import os; os.kill(-1, 9)",
    "kill a group": "import os; os.killpg(0, 9)",
    "call C": "import ctypes; ctypes.CDLL(None).getpid()",
    "raise a limit": "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (9, 9))",
    "leave": "import os; os._exit(0)",
    "say what is expected and leave": "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'pass')\n    except OSError: pass\nos._exit(0)",
}  # fmt: skip
UNGUARDED = {  # these end by an exception of their own
    "10 GB": "y = bytearray(10 << 30)",
    "2 GB": "y = bytearray(2 << 30)",
    "10 GB in small pieces": "y = []\nwhile True: y.append(bytearray(1 << 26))",
    "a large file": "with open('x', 'wb') as file:\n    for _ in range(1000): file.write(bytes(1 << 20))",
    "many open files": "y = [open('x', 'w') for _ in range(1000)]",
    "exit": "import sys; sys.exit(0)",
    "exit without code": "raise SystemExit",
    "quit": "import builtins; getattr(builtins, 'quit', exit)(0)",
    "interrupt": "raise KeyboardInterrupt",
    "deep recursion": "def g(): g()\ng()",
}
CHILD = tasks.CHILD
NO_NAMESPACES = ("    enter_namespaces()\n", "")
NO_HOOK = ("    forbid_events(folder)\n", "")


def solution(action: str, guarded: bool = True) -> str:
    """A right answer that does something else first; guarded: whatever that raises."""
    if guarded:
        action = "try:\n" + "\n".join(f"    {line}" for line in action.split("\n")) + "\nexcept BaseException: pass"
    return "\n".join(f"    {line}" for line in [*action.split("\n"), "return x + 1"]) + "\n"


def without(monkeypatch, *parts: tuple[str, str]) -> None:
    """Takes layers of the protection away, to see the others alone."""
    child = CHILD
    for part, instead in parts:
        assert child.count(part) == 1
        child = child.replace(part, instead)
    monkeypatch.setattr(tasks, "CHILD", child)
    tasks.passes.cache_clear()


def running_below(folder: Path) -> list[str]:
    """Processes that work in `folder` or below, waiting for those that are just dying."""
    for _ in range(100):
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                found += [link.parent.name] * os.readlink(link).startswith(str(folder))
            except OSError:
                continue
        if not found:
            return []
        time.sleep(0.05)
    return found


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Where tested code works (as `tmp_path` / "in"), and a file outside of it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.txt").write_text("secret")
    monkeypatch.setattr(tasks.tempfile, "tempdir", str(tmp_path / "in"))
    monkeypatch.setattr(tasks, "TIMEOUT_S", 5.0)
    return {"home": str(Path.home()), "outside": str(tmp_path / "outside.txt"), "pid": os.getpid()}


@pytest.mark.parametrize("layers", [(), (NO_NAMESPACES,)], ids=["all", "no namespaces"])
@pytest.mark.parametrize("name", [*ATTACKS, *UNGUARDED])
def test_an_attack_is_stopped_and_wrong(name, layers, places, tmp_path, monkeypatch):
    without(monkeypatch, *layers)
    action = (ATTACKS | UNGUARDED)[name]
    if name in ATTACKS:
        action = action.format(**places)
    assert verdict(solution("pass")) == "pass"
    if "loop" in name or name == "sleep":
        monkeypatch.setattr(tasks, "TIMEOUT_S", 0.5)
    assert verdict(solution(action, name in ATTACKS)) == "fail"
    assert not running_below(tmp_path / "in") and not list((tmp_path / "in").iterdir())
    assert Path(places["outside"]).read_text() == "secret"


@pytest.mark.parametrize(
    "name",
    [
        "read the home folder",
        "read a file outside",
        "read by os.open",
        "open a socket",
        "fork once",
        "subprocess",
        "call C",
        "link to a file outside",
    ],
)
def test_the_attacks_work_where_nothing_stops_them(name, places, tmp_path, monkeypatch):
    """Else the test above would show nothing."""
    program = (
        f"import os, sys\nparent = os.getpid()\n{ATTACKS[name].format(**places)}\nos._exit(7 if os.getpid() == parent else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "in", stderr=subprocess.DEVNULL).returncode == 7


def permits_namespaces(monkeypatch) -> bool:
    without(monkeypatch, NO_HOOK)
    here = os.readlink("/proc/self/ns/net") if Path("/proc/self/ns/net").is_symlink() else ""
    look = f"import os\nassert os.getpid() == 1 or os.readlink('/proc/self/ns/net') != {here!r}"
    return verdict(solution(look, guarded=False)) == "pass"


def test_namespaces_alone_hide_network_and_processes(places, tmp_path, monkeypatch):
    if not permits_namespaces(monkeypatch):
        pytest.skip("this system permits no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5).close()"
        see = f"import os\nos.kill({os.getpid()}, 0)"
        stray = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass"
        for action in (connect, see):
            assert verdict(solution(action, guarded=False)) == "fail"
        verdict(solution(stray, guarded=False))  # passes for root, whom no limit keeps from a fork
        assert not running_below(tmp_path / "in")
        without(monkeypatch, NO_HOOK, NO_NAMESPACES)
        for action in (connect, see):
            assert verdict(solution(action, guarded=False)) == "pass"
        verdict(solution(stray.replace("    os.setsid()\n", ""), guarded=False))  # its group is ended all the same
        assert not running_below(tmp_path / "in")


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root is not held by it")
def test_limits_alone_keep_from_forks(places, tmp_path, monkeypatch):
    without(monkeypatch, NO_HOOK, NO_NAMESPACES)
    assert verdict(solution("import os\nif os.fork() == 0: os._exit(0)", guarded=False)) == "fail"


def test_only_the_childs_own_word_is_a_pass(places, monkeypatch):
    """Whatever else ends up in the report, it is no pass."""
    without(monkeypatch, ("    os.write(report, word.encode())", '    os.write(report, b"pass")'))
    tasks.code_is_allowed = True
    assert not tasks.passes("")
    without(monkeypatch, ("    os.write(report, word.encode())", "    os.write(report, word.encode() * 2)"))
    assert not tasks.passes("")


def test_tested_code_sees_nothing_of_this_process(places, monkeypatch):
    monkeypatch.setenv("JUDGE_FAST_SECRET", "1")
    look = "import os, sys\nassert set(os.environ) <= {'TMPDIR', 'LC_CTYPE'}, os.environ\nassert os.listdir('.') == []\nassert sys.stdin.read() == ''\nassert 'site' not in sys.modules"
    assert verdict(solution(look, guarded=False)) == "pass"
