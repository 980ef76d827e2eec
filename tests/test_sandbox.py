"""Protects: which programs pass HumanEval's tests, that none forges that, and that tested code is locked in."""

import ctypes
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import DATA, ROOT

from cli import InputError
from scripts.lib import sandbox
from scripts.lib.public_tasks import read_task
from scripts.lib.sandbox import code_passes, outcome
from scripts.lib.scoring import CHECKERS, Question
from scripts.lib.tasks import load_questions

HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"


@pytest.fixture(autouse=True)
def forgets(monkeypatch, tmp_path):
    """Each test starts without permission, with folders for tested code that are its own, and leaves no outcome that
    another interpreter gave."""
    real = sandbox.sys.executable
    monkeypatch.setattr(sandbox, "code_is_allowed", False)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    yield
    if sandbox.sys.executable != real:
        sandbox.outcome_of.cache_clear()


PROMPT = (
    'import math\n\n\ndef helper(x):\n    return x\n\n\ndef f(x: int) -> int:\n    """ One more than x. """\n'
)
ITEM = {
    "prompt": PROMPT,
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n",
}
CODE = Question(0, PROMPT, "", "code", "", ITEM)


def verdict(text: str, question: Question = CODE) -> str:
    sandbox.allow_code_execution()
    answer = CHECKERS["code"].final_answer(question, text)
    assert CHECKERS["code"].is_right(question, text) == (answer == "pass")
    assert CHECKERS["code"].is_right(question, text) is code_passes(question.content, text)
    return answer


def found_by(tests: str, answer: str, prompt: str = "") -> sandbox.Outcome:
    """The outcome of a program by tests of `candidate`, its f."""
    sandbox.allow_code_execution()
    check = "def check(candidate):\n" + "\n".join(f"    {line}" for line in tests.split("\n"))
    return outcome({"prompt": prompt, "test": check, "entry_point": "f"}, f"```python\n{answer}\n```")


def test_code_runs_only_when_allowed(tmp_path, monkeypatch):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ITEM) + "\n")
    monkeypatch.setattr(sandbox, "outcome_of", lambda *fields: pytest.fail("it was run"))
    for action in (lambda: load_questions(str(path), "code"), lambda: CHECKERS["code"].is_right(CODE, ""), lambda: CHECKERS["code"].final_answer(CODE, ""), lambda: outcome(ITEM, "")):  # fmt: skip
        with pytest.raises(InputError, match="--allow_code_execution"):
            action()


def test_a_machine_that_cannot_run_code_says_so(monkeypatch):
    sandbox.outcome_of.cache_clear()
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="cannot be done here"):
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
    [
        "",
        "    pass\n",
        "    return x\n",
        "    return x + 1 +\n",
        "No idea.",
        "```python\n```",
        "    raise ValueError\n",
        "\0",
    ],
)
def test_wrong_programs_fail(text):
    assert verdict(text) == "fail"


BODY = "    return x + 1\n"
WHOLE = 'def f(x: int) -> int:\n    """ One more than x. """\n' + BODY
EXAMPLE = (
    'def f(x):\n    """One more.\n\n    ```python\n    >>> f(1)\n    2\n    ```\n    """\n    return x + 1\n'
)


@pytest.mark.parametrize("text", [
    f"```python\n{EXAMPLE}```\nDone.", EXAMPLE, f"Here is:\n\n{EXAMPLE}\nThat was it.", f"~~~python\n{EXAMPLE}~~~\n", f"````\n{EXAMPLE}````\n",
    "```python\n" + EXAMPLE.replace("    ```", "```") + "```\nDone.",  # the example's fences are as deep as the block's
    f"~~~\n{WHOLE}~~~", f"~~~ python\n{WHOLE}\n~~~~~\nprose", f"```python title=\"a.py\" {{1}}\n{WHOLE}```", f"```Python3\n{WHOLE}", f"``` \n{WHOLE}```  \nyes",
    f"1. First:\n\n   ```python\n{WHOLE.replace('def', '   def').replace('    ', '       ')}   ```\n   2. done", f"> ```python\n{WHOLE}> ```",
    f"Here is the function:\n\n{WHOLE}\nThis works because 1 is added.", f"{WHOLE}\nExplanation\n\nIt adds.", f"{WHOLE}\nNote: it adds, e.g. f(1) = 2.",
    f"from the statement we see:\nclass of problems: easy\n\n{WHOLE}\nif you call it, it adds.\nprint(f(1)) $", f"{WHOLE}\n\n# a test\nassert f(1) == 2\n\nOutput:\n2",
    "def f(x):\n    return g(x)\n\n# helps\ndef g(x):\n    return x + 1\n\nDone.", "def f(x):\n    return g(x)\n\n\ndef g(x):\n    return x + ONE\n\nONE = 1\n",
    f"```python\ndef f(x):\n    return x\n```\nWrong; better:\n```python\n{WHOLE}```\n", f"```python\n{WHOLE}```\nUse it:\n```python\nprint(f(1))\n```\n```\n2\n```",
    f"```bash\npip install x\n```\n```python\n{WHOLE}```", "```python\ndef g(x):\n    return x + 1\n```\nthen\n```python\ndef f(x):\n    return g(x)\n```",
    "```python\ndef f(x):\n    return x + 1\n```\nwrong:\n```python\ndef f(x:\n```", WHOLE.replace("\n", "\r\n"), f"```python\n{WHOLE}```".replace("\n", "\r\n"), BODY.replace("\n", "\r\n"),
    "\treturn x + 1\n", "```python\n\tif x:\n\t\treturn x + 1\n\treturn 1\n```", "def f(x):\n\treturn x + 1\n", "  return x + 1\n", "  if x:\n    return x + 1\n  return 1\n",
    "y = x\n    return y + 1\n", "f = lambda x: x + 1", "```\nf = lambda x: x + 1\n```", "   Sure, here:\n```python\n" + WHOLE + "```", f"   ```python\n{WHOLE}```", "\n\n" + PROMPT + BODY,
    f"```python\n{PROMPT}{BODY}```", "    # It's done:\n    return x + 1\n\nThis adds one.\n", f"```python\n{WHOLE}", f"text `f` and ```inline``` code\n```python\n{WHOLE}```",
    f"\ufeff{WHOLE}", WHOLE.replace("    ", "\u00a0" * 4), f"Here it is:```python\n{WHOLE}```", "> ```python\n> " + WHOLE.replace("\n", "\n> ") + "\n> ```",
    "```python\ndef f(x: int) -> int:\n    return helper(x) + 1\n```\n```text\nf(x) = x + 1\n```",
])  # fmt: skip
def test_code_is_found_in_an_answer(text):
    assert outcome_here(text) == ("pass", "")


def outcome_here(text: str) -> sandbox.Outcome:
    sandbox.allow_code_execution()
    return outcome(ITEM, text)


def test_the_last_block_that_defines_the_function_counts():
    right, wrong = f"```python\n{WHOLE}```\n", "```python\ndef f(x):\n    return x\n```\n"
    assert [verdict(text) for text in (right + wrong, wrong + right)] == ["fail", "pass"]


def test_text_without_end_is_read_in_bounded_time():
    for text in (
        "```\n" * 5_000,
        "~~~\ndef f(x):\n" * 2_500,
        "def f(x):\n" * 5_000,
        "import a\n" * 5_000 + "def f(x): $",
        "x, " * 20_000 + "\ndef f(x): $\n",
    ):
        programs = list(sandbox.programs_of(PROMPT, "f", text))
        assert len(programs) < 2000 and sum(map(len, programs)) < 200 * len(text)


INDENTED = re.compile("^( +)", re.MULTILINE)
SOLUTIONS = {  # (prompt, body, name) -> text
    "completion": lambda p, b, n: b, "completion, then more": lambda p, b, n: b + "\n\ndef other(x):\n    return $", "completion, then prose": lambda p, b, n: b + "\n```\nIt works.\n",
    "fenced": lambda p, b, n: f"Here:\n```python\n{p}{b}```\nIt works.", "tildes": lambda p, b, n: f"~~~python\n{p}{b}~~~\nIt works.", "unclosed": lambda p, b, n: f"Here:\n```python\n{p}{b}",
    "info": lambda p, b, n: f"```python title='x.py'\n{p}{b}```", "unfenced": lambda p, b, n: f"Here is the code:\n\n{p}{b}\nThis is linear.\nIt works.", "repeated": lambda p, b, n: p + b,
    "signature": lambda p, b, n: p[p.rindex(f"def {n}") :] + b, "fenced signature": lambda p, b, n: f"```\n{p[p.rindex(f'def {n}') :]}{b}```", "fenced body": lambda p, b, n: f"```python\n{b}```",
    "dedented body": lambda p, b, n: "```python\n" + "\n".join(line[4:] for line in b.split("\n")) + "\n```", "crlf": lambda p, b, n: f"```python\n{p}{b}```\n".replace("\n", "\r\n"),
    "tabs": lambda p, b, n: "```python\n" + INDENTED.sub(lambda found: "\t" * (len(found[0]) // 2) + " " * (len(found[0]) % 2), p + b) + "```",
    "first wrong": lambda p, b, n: f"```python\n{p}    pass\n```\nNo:\n```python\n{p}{b}```", "used": lambda p, b, n: f"```python\n{p}{b}```\nas in\n```python\nprint({n})\n```",
    "example in a docstring": lambda p, b, n: f"```python\ndef aside():\n    \'\'\'\n    ```\n    1\n    ```\n    \'\'\'\n{p}{b}```\nDone.",
    "in a list": lambda p, b, n: "1. So:\n\n   ```python\n" + "".join("   " + line + "\n" for line in (p + b).split("\n")) + "   ```\n",
}  # fmt: skip


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs HumanEval.jsonl.gz")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_humanevals_own_solutions_pass_and_empty_bodies_fail(every):
    sandbox.allow_code_execution()
    questions = read_task("humaneval", HUMANEVAL, chat=False)[::every]
    with ThreadPoolExecutor() as pool:  # each is two processes of its own
        found = list(pool.map(outcome, [q.content for q in questions], [q.reference for q in questions]))
        empty = list(pool.map(outcome, [q.content for q in questions], [""] * len(questions)))
    assert {o.verdict for o in found} == {"pass"} and len(found) == -(-164 // every)
    assert {o.verdict for o in empty} == {"fail"}


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs HumanEval.jsonl.gz")
@pytest.mark.parametrize("every", [40, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", SOLUTIONS)
def test_humanevals_solutions_pass_in_every_form(form, every):
    """Those with helper functions, and every so manieth of the others, other ones for each form; JUDGE_FAST_ALL=1 takes
    all 164."""
    sandbox.allow_code_execution()
    questions = read_task("humaneval", HUMANEVAL, chat=False)
    if not os.environ.get("JUDGE_FAST_ALL"):
        first = list(SOLUTIONS).index(form) % every
        questions = [questions[at] for at in sorted({32, 38, 135, *range(first, 164, every)})]
    items = [q.content for q in questions]
    texts = [
        SOLUTIONS[form](item["prompt"], q.reference, item["entry_point"]) for q, item in zip(questions, items)
    ]
    with ThreadPoolExecutor() as pool:
        found = dict(zip([q.content["task_id"] for q in questions], pool.map(outcome, items, texts)))
    assert len(found) >= 164 // every and not {name: o for name, o in found.items() if o.verdict != "pass"}


# Each attack is tried where no exception can betray it: what merely fails goes on to the right answer, and passes.
ATTACKS = {
    "endless loop": "while True: pass",
    "endless loop deaf to signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "endless loop in a session of its own": "import os\ntry: os.setsid()\nexcept OSError: pass\nwhile True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork once": "import os; os.fork()",
    "processes": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
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
    "leave with another code": "import os; os._exit(7)",
    "kill itself": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "kill by the signal module": "import os, signal; signal.pthread_kill(__import__('threading').main_thread().ident, 9)",
    "trace the tester": "import ctypes; ctypes.CDLL(None).ptrace(16, {pid}, 0, 0)",
    "write the tester's memory": "open('/proc/{pid}/mem', 'r+b').write(b'x')",
    "write its own memory": "open('/proc/self/mem', 'r+b').seek(0)",
    "read its own descriptors": "import os; os.listdir('/proc/self/fd')",
    "open a folder as a place to begin from": "import os; os.open(os.path.dirname(os.__file__), os.O_RDONLY)",
    "open from a library's folder": "import os; os.open('os.py', os.O_WRONLY, dir_fd=os.open(os.path.dirname(os.__file__), os.O_RDONLY | os.O_DIRECTORY))",
    "call C by a cast": "import ctypes; ctypes.string_at(id(1), 8)",
    "many files": "for n in range(1000): open(f'{{n}}', 'w').close()",
    "600 MB of files": "for n in range(600):\n    with open(f'{{n}}', 'wb') as file:\n        for _ in range(16): file.write(bytes(1 << 16))",
    "1,050 folders one in another": "import os\npath = '.'\nfor n in range(1050):\n    path += '/d'\n    os.mkdir(path)",
    "change the folder": "import os; os.chdir('/')",
    "rename": "import os; open('a', 'w').close(); os.rename('a', {outside!r})",
    "truncate": "import os; os.truncate({outside!r}, 0)",
    "change modes": "import os; os.chmod({outside!r}, 0)",
    "say what is expected and leave": "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'pass')\n    except OSError: pass\nos._exit(0)",
}  # fmt: skip
UNGUARDED = {  # these end by an exception of their own
    "10 GB": "y = bytearray(10 << 30)",
    "2 GB": "y = bytearray(2 << 30)",
    "10 GB in small pieces": "y = []\nwhile True: y.append(bytearray(1 << 26))",
    "a large file": "with open('x', 'wb') as file:\n    for _ in range(1000): file.write(bytes(1 << 20))",
    "replace what assert raises": "import builtins; builtins.AssertionError = None; raise ValueError",
    "end at exit": "import atexit, os, sys; atexit.register(os._exit, 0); sys.exit(0)",
    "end in a thread": "import os, threading; threading.Thread(target=os._exit, args=(0,)).start(); threading.Event().wait(2); raise ValueError",
    "many open files": "y = [open('x', 'w') for _ in range(1000)]",
    "exit": "import sys; sys.exit(0)",
    "exit without code": "raise SystemExit",
    "a pool": "import concurrent.futures as c\nwith c.ProcessPoolExecutor(2) as pool: list(pool.map(abs, [1, 2]))",
    "quit": "import builtins; getattr(builtins, 'quit', exit)(0)",
    "interrupt": "raise KeyboardInterrupt",
    "deep recursion": "def g(): g()\ng()",
}
CHILD, RUN = sandbox.CHILD, sandbox.outcome_of.__wrapped__
OUTCOMES = {}  # a changed child: its `outcome_of`
NO_NAMESPACES = ('    enter_namespaces(folder, limits["DISK"])\n', "")
NO_HOOK = ("    sys.addaudithook(hook)\n", "")
NO_LANDLOCK = ("    lock_files(folder)\n", "")


def solution(action: str, guarded: bool = True) -> str:
    """A right answer that does something else first; guarded: whatever that raises."""
    if guarded:
        action = (
            "try:\n"
            + "\n".join(f"    {line}" for line in action.split("\n"))
            + "\nexcept BaseException: pass"
        )
    return "\n".join(f"    {line}" for line in [*action.split("\n"), "return x + 1"]) + "\n"


def without(monkeypatch, *parts: tuple[str, str]) -> None:
    """Takes layers of the protection away, to see the others alone."""
    child = CHILD
    for part, instead in parts:
        assert child.count(part) == 1
        child = child.replace(part, instead)
    monkeypatch.setattr(sandbox, "CHILD", child)
    # outcomes of its own, kept: whether code can be run at all is then asked once, not once a test
    monkeypatch.setattr(sandbox, "outcome_of", OUTCOMES.setdefault(child, lru_cache()(RUN)))


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
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path / "in"))
    monkeypatch.setattr(sandbox, "CPU_S", 3)
    monkeypatch.setattr(sandbox, "WALL_S", 8.0)
    return {"home": str(Path.home()), "outside": str(tmp_path / "outside.txt"), "pid": os.getpid()}


@pytest.mark.parametrize("layers", [(), (NO_NAMESPACES,)], ids=["all", "no namespaces"])
def test_what_does_no_harm_passes(layers, places, monkeypatch):
    """Else the next test would show nothing."""
    without(monkeypatch, *layers)
    assert verdict(solution("pass")) == "pass"


@pytest.mark.parametrize("layers", [(), (NO_NAMESPACES,)], ids=["all", "no namespaces"])
@pytest.mark.parametrize("name", [*ATTACKS, *UNGUARDED])
def test_an_attack_is_stopped_and_wrong(name, layers, places, tmp_path, monkeypatch):
    without(monkeypatch, *layers)
    action = (ATTACKS | UNGUARDED)[name]
    if name in ATTACKS:
        action = action.format(**places)
    loops = "loop" in name or name == "sleep"
    if loops:
        monkeypatch.setattr(sandbox, "CPU_S", 1)
        monkeypatch.setattr(sandbox, "WALL_S", 2.0 if name == "sleep" else 8.0)
    assert verdict(solution(action, name in ATTACKS)) == ("timeout" if loops else "fail")
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
    program = f"import os, sys\nparent = os.getpid()\n{ATTACKS[name].format(**places)}\nos._exit(7 if os.getpid() == parent else 0)"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path / "in", stderr=subprocess.DEVNULL
        ).returncode
        == 7
    )


def permits_namespaces(monkeypatch) -> bool:
    without(monkeypatch, NO_HOOK, NO_LANDLOCK)
    here = os.readlink("/proc/self/ns/net") if Path("/proc/self/ns/net").is_symlink() else ""
    look = f"import os\nassert os.getpid() == 1 or os.readlink('/proc/self/ns/net') != {here!r}"
    return verdict(solution(look, guarded=False)) == "pass"


def test_namespaces_alone_hide_network_and_processes(places, tmp_path, monkeypatch):
    if not permits_namespaces(monkeypatch):
        pytest.skip("this system permits no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = (
            f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5).close()"
        )
        see = f"import os\nos.kill({os.getpid()}, 0)"
        stray = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass"
        for action in (connect, see):
            assert verdict(solution(action, guarded=False)) == "fail"
        verdict(solution(stray, guarded=False))  # passes for root, whom no limit keeps from a fork
        assert not running_below(tmp_path / "in")
        without(monkeypatch, NO_HOOK, NO_NAMESPACES)
        for action in (connect, see):
            assert verdict(solution(action, guarded=False)) == "pass"
        verdict(
            solution(stray.replace("    os.setsid()\n", ""), guarded=False)
        )  # its group is ended all the same
        assert not running_below(tmp_path / "in")


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root is not held by it")
def test_limits_alone_keep_from_forks(places, tmp_path, monkeypatch):
    without(monkeypatch, NO_HOOK, NO_NAMESPACES)
    assert verdict(solution("import os\nif os.fork() == 0: os._exit(0)", guarded=False)) == "fail"


def test_only_the_tests_own_word_is_a_pass(places, monkeypatch):
    """Whatever else ends up in the report, it is no pass."""
    word = "json.dumps(run_tests(channel, *job)).encode()"
    for other in (
        'b"pass"',
        f"2 * {word}",
        "b''",
        "'[\"pass\"]'.encode()",
        "'\"pass\"'.encode()",
        "b'1' * (1 << 20)",
        "b'\\xff'",
    ):
        without(monkeypatch, (word, other))
        assert sandbox.outcome_of(PROMPT, ITEM["test"], "f", BODY).verdict == "fail", other


def test_tested_code_sees_nothing_of_this_process(places, monkeypatch):
    monkeypatch.setenv("JUDGE_FAST_SECRET", "1")
    look = "import os, sys\nassert set(os.environ) <= {'TMPDIR', 'LC_CTYPE'}, os.environ\nassert os.listdir('.') == []\nassert sys.stdin.read() == ''\nassert 'site' not in sys.modules"
    assert verdict(solution(look, guarded=False)) == "pass"


def test_landlock_alone_hides_files(places, tmp_path, monkeypatch):
    secret, write = (
        f"assert open({places['outside']!r}).read()",
        f"open({places['outside']!r}, 'a').write('x')",
    )
    home = f"import os\nassert os.listdir({places['home']!r})"
    without(monkeypatch, NO_HOOK, NO_NAMESPACES, NO_LANDLOCK)
    assert [verdict(solution(action, guarded=False)) for action in (secret, home)] == ["pass", "pass"]
    without(monkeypatch, NO_HOOK, NO_NAMESPACES)
    if sys.platform != "linux" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("this kernel has no Landlock")
    assert [verdict(solution(action, guarded=False)) for action in (secret, home, write)] == ["fail"] * 3
    assert Path(places["outside"]).read_text() == "secret"
    good = "import ssl, hashlib, decimal, os\nos.makedirs('a', exist_ok=True)\nopen('a/b', 'w').write('x')\nos.rename('a/b', 'c')"
    assert verdict(solution(good, guarded=False)) == "pass"


# The verdict


ONE_AND_FIVE = "assert candidate(1) == 2\nassert candidate(5) == 6"
FORGERIES = {
    "an __eq__ that says yes": "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = lambda self, other: False\n    __hash__ = None\ndef f(x): return Yes()",
    "a subclass of int": "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(0)",
    "one that says it is int": "class Yes:\n    __class__ = int\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
    "a subclass of float": "class Yes(float):\n    def __eq__(self, other): return True\ndef f(x): return Yes(0)",
    "in a list": "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return [Yes()]",
    "a metaclass": "class Meta(type):\n    def __eq__(self, other): return True\n    __hash__ = type.__hash__\nclass Yes(metaclass=Meta): pass\ndef f(x): return Yes",
    "a mock": "from unittest.mock import ANY\ndef f(x): return ANY",
    "NaN": "def f(x): return float('nan')",
    "frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for key, value in [*frame.f_locals.items(), *frame.f_globals.items()]:\n            if ''.join(['assert ', 'cand']) in str(value): return x + 1\n        frame = frame.f_back\n    return 0",
    "all objects": "import gc\ndef f(x):\n    for each in gc.get_objects():\n        if type(each) in (dict, list, tuple) and ''.join(['assert ', 'cand']) in str(each)[:100000]: return x + 1\n    return 0",
    "the checker's code": "import sys\nmain = sys.modules['__main__']\nmain.run_tests = lambda *_: ['pass', '']\nmain.encode = lambda *_, **__: True\nmain.said = lambda *_: {'value': True, 'verdict': 'pass'}\ndef f(x): return 0",
    "the checker's code object": "import sys\nmain = sys.modules['__main__']\nmain.run_tests.__code__ = (lambda *_: ['pass', '']).__code__\nmain.merged.__code__ = (lambda *_: None).__code__\ndef f(x): return 0",
    "json": "import json\njson.dumps = lambda *_, **__: '[\"pass\", \"\"]'\ndef f(x): return 0",
    "builtins": "import builtins\nbuiltins.type = lambda x: int\nbuiltins.isinstance = lambda *_: True\nbuiltins.all = builtins.any = lambda *_: True\ndef f(x): return 0",
    "no assertions": "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\ndef f(x): return 0",
    "tracing": "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda frame, event, arg: None)\ndef f(x): return 0",
    "every open file": "import os\ndef f(x):\n    for n in range(64):\n        try: os.write(n, b'[\"pass\", \"\"]')\n        except OSError: pass\n    return 0",
    "every open file, and away": "import os\nfor n in range(64):\n    try: os.write(n, b'[\"pass\", \"\"]\\n')\n    except OSError: pass\nos._exit(0)",
    "at its end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "a check of its own": "def check(candidate): pass\ndef f(x): return 0",
    "an exception for the tests": "def f(x): raise AssertionError",
    "another prompt": "def helper(x): return x\nimport os\nos.environ['VERDICT'] = 'pass'\ndef f(x): return 0",
}  # fmt: skip


@pytest.mark.parametrize("layers", [(), (NO_HOOK,)], ids=["all", "no hook"])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_is_not_forged(name, layers, places, monkeypatch):
    without(monkeypatch, *layers)
    assert found_by(ONE_AND_FIVE, FORGERIES[name]).verdict == "fail"


def test_what_can_still_be_forged(places):
    """As the docstring says: inputs known by heart; NaN and errors where the tests take them for right."""
    assert found_by(ONE_AND_FIVE, "def f(x): return {1: 2, 5: 6}[x]").verdict == "pass"
    assert (
        found_by("assert not abs(candidate(1) - 2) > 1e-6", "def f(x): return float('nan')").verdict == "pass"
    )
    assert (
        found_by("try: candidate(1)\nexcept Exception: pass", "def f(x): raise ValueError").verdict == "pass"
    )


NESTED = "    y = []\n    for _ in range(100_000): y = [y]\n"
SENT = {  # what a call writes itself, with the channel as n -> a word of the reason
    "5\\n": "no answer", "[]\\n": "no answer", "{}\\n": "no answer", "null\\n": "no answer", "nonsense\\n": "no answer", "\\xff\\n": "no answer", '{"value": 2}\\n': "no answer",
    '{"value": {"int": "zz"}, "arguments": 1}\\n': "no answer", '{"value": {"a": 1, "b": 2}, "arguments": [[1], {}]}\\n': "no answer", '{"raised": 5, "text": "", "arguments": [[1], {}]}\\n': "no answer",
    '{"value": {"dict": [[[], 1]]}, "arguments": [[1], {}]}\\n': "no answer", '{"value": {"set": [[]]}, "arguments": [[1], {}]}\\n': "no answer", '{"argument": 7, "arguments": [[1], {}]}\\n': "no answer",
    '{"value": {"eval": "1"}, "arguments": [[1], {}]}\\n': "no answer", '{"value": {"Decimal": "x"}, "arguments": [[1], {}]}\\n': "no answer", '{"ended": [1]}\\n': "[1]", '{"raised": ["SystemExit"], "text": "x", "arguments": [{"tuple": [1]}, {"dict": []}]}\\n': "Exception",
    '{"value": 2, "arguments": [{"tuple": [1]}, {"dict": []}]}\\n{"value": 2}\\n': "more than one answer",
}  # fmt: skip


@pytest.mark.parametrize("sent", SENT)
def test_what_is_no_answer_fails_with_the_reason(sent, places):
    write = f"import os, time\ndef f(x):\n    for n in range(3, 64):\n        try: os.write(n, b'{sent}')\n        except OSError: continue\n    time.sleep(60)"
    found = found_by(ONE_AND_FIVE, write)
    assert found.verdict == "fail" and SENT[sent] in found.reason


@pytest.mark.parametrize("body, reason", [
    ("    return 'x' * (1 << 30)", "MemoryError"), ("    return 'x' * (1 << 25)", "more than 16 MB"), ("    return [10**9] * (1 << 21)", "more than 16 MB"), ("    return 10 ** 100_000", "AssertionError"),
    ("    return (1 << (1 << 26))", "more than 16 MB"), (NESTED + "    return y", "RecursionError"), ("    import sys; sys.setrecursionlimit(10**6)\n" + NESTED + "    return y", ""),
    ("    y = []; y.append(y); return y", "RecursionError"), ("    return float('nan')", "AssertionError"), ("    yield x + 1", "type generator"), ("    return object()", "type object"),
    ("    return type('T', (int,), {})(x + 1)", "type T"), ("    return print", "builtin_function"), ("    return '\\ud800'", "AssertionError"), ("    import os\n    os.closerange(3, 64)\n    return x + 1", "ended"),
    ("    import os\n    for n in range(3, 64):\n        try:\n            while True: os.write(n, bytes(1 << 20))\n        except OSError: pass", "more than 16 MB"),
    ("    return [[]] * (1 << 19)", "AssertionError"), ("    raise SystemExit", "ended"), ("    raise KeyError(x)", "KeyError"), ("    raise type('Own', (ValueError,), {})('so')", "ValueError: Own: so"),
    ("    return (lambda: (_ for _ in ()).throw(StopIteration))()", ""), ("    x.append(1)", "AttributeError"), ("    return y", "NameError"), ("    return x + 1\nf = 5", "not callable"), ("    return x + 1\ndel f", "defines no f"),
    ("    return x + 1\nraise ValueError('top')", "ValueError: top"), ("    return x +", "SyntaxError"), ("    return f(x)", "RecursionError"), ("    open('/etc/passwd')", "ended at open"),
])  # fmt: skip
def test_an_answer_beyond_all_bounds_fails_with_the_reason(body, reason, places):
    found = found_by(ONE_AND_FIVE, "def f(x):\n" + body)
    assert found.verdict == "fail" and reason in found.reason, found


@pytest.mark.parametrize("value", [
    "None", "True", "0", "-5", "2 ** 63", "-(2 ** 70)", "10 ** 4000", "0.1", "-0.0", "1e308", "float('inf')", "1 + 2j", "'\\ud800\\x00\\U0001f600'", "b'\\xff'", "bytearray(b'a')", "(1, (2,), [3])",
    "{1, 2}", "frozenset([1])", "{(1, 2): [3], None: {4: 5}}", "[]", "()", "set()", "{}", "range(3, 0, -1)", "[[1.5, None], {'a': (True, False)}]",
    "__import__('decimal').Decimal('1.10')", "__import__('fractions').Fraction(1, 3)",
])  # fmt: skip
def test_plain_values_cross_as_they_are(value, places):
    tests = f"x = {value}\ny = candidate(x)\nassert repr(y) == repr(x) and type(y) is type(x)\nassert candidate(1) != x or x == 1\nassert candidate(x=x) == x"
    assert found_by(
        tests,
        f"def f(x):\n    assert x == 1 or type(x) is type({value}) and repr(x) == repr({value})\n    return x",
    ) == ("pass", "")
    assert found_by(f"assert candidate(0) == {value}", f"def f(x): return {value}") == ("pass", "")


@pytest.mark.parametrize("tests, answer", [
    ("x = [3, 1, 2]\nassert candidate(x) is None and x == [1, 2, 3]", "def f(x): x.sort()"), ("x = [3, 1]\ncandidate(x)\nassert x == [3, 1]", "def f(x): return sorted(x)"),
    ("x = [1]\nassert candidate(x) is x and x == [1, 2]", "def f(x):\n    x.append(2)\n    return x"), ("x = [1]\nassert candidate(x) is not x", "def f(x): return list(x)"),
    ("row = [0, 0]\nx = [row, [1]]\ncandidate(x)\nassert row == [7, 0] and x[0] is row and x == [[7, 0], [1], 9]", "def f(x):\n    x[0][0] = 7\n    x.append(9)"),
    ("x = {'a': [1], 'b': 2}\ninner = x['a']\ncandidate(x)\nassert x == {'a': [1, 5], 'c': 3} and inner == [1, 5]", "def f(x):\n    x['a'].append(5)\n    del x['b']\n    x['c'] = 3"),
    ("x, y = {1, 2}, bytearray(b'ab')\ncandidate(x, y=y)\nassert x == {2} and y == b'b'", "def f(x, y):\n    x.discard(1)\n    del y[0]"), ("x = ([1], 2)\ncandidate(x)\nassert x == ([1, 3], 2)", "def f(x): x[0].append(3)"),
    ("try:\n    candidate(0)\nexcept ZeroDivisionError as error:\n    assert 'by zero' in str(error)\nelse:\n    assert False", "def f(x): return 1 / x"),
    ("try:\n    candidate(0)\nexcept LookupError:\n    return\nassert False", "class Own(KeyError): pass\ndef f(x): raise Own"), ("assert candidate() == 1 and candidate() == 2", "n = 0\ndef f():\n    global n\n    n += 1\n    return n"),
    ("assert candidate('aab') == {'a': 2, 'b': 1}", "from collections import Counter\ndef f(x): return Counter(x)"), ("assert candidate() == {}", "from collections import defaultdict\ndef f(): return defaultdict(list)"),
    ("assert g(2) == 4 and candidate(2) == 3", "def f(x): return x + 1\ndef g(x): return 2 * x"), ("assert candidate.__name__ == 'f' and callable(candidate)", "def f(): pass"),
    ("def g(): return 5\nassert candidate(g()) == 6", "def f(x): return x + 1"), ("assert candidate(10 ** 5000) == 10 ** 5000 + 1", "def f(x): return x + 1"), ("x = list(range(100000))\nassert candidate(x) == x", "def f(x): return x"),
])  # fmt: skip
def test_arguments_results_and_errors_are_as_in_one_process(tests, answer, places):
    assert found_by(tests, answer) == ("pass", "")


def test_what_cannot_cross_is_said_and_not_right(places):
    for passed in (
        "lambda x: x",
        "print",
        "open",
        "object()",
        "[len]",
        "iter([1])",
        "type('T', (), {})()",
        "[0] * (1 << 23)",
    ):
        found = found_by(
            f"try: assert candidate({passed}) is None\nexcept BaseException: pass", "def f(x): pass"
        )
        assert found.verdict == "unchecked" and "cannot leave their process" in found.reason, passed
    question = Question(
        0,
        "",
        "",
        "code",
        "",
        {"prompt": "", "entry_point": "f", "test": "def check(c): assert c(len) is None"},
    )
    assert verdict("```\ndef f(x): pass\n```", question) == "unchecked"
    found = found_by("x = []\ncandidate(x)", "def f(x): x.append(lambda: 1)")
    assert found.verdict == "fail" and "changed a value of type function" in found.reason


def test_tests_that_leave_or_fail_are_no_pass(places):
    for tests in (
        "import os; os._exit(0)",
        "raise SystemExit",
        "import sys; sys.exit(0)",
        "open('/etc/passwd')",
        "assert False",
        "1 / 0",
        "while True: pass",
        "candidate(",
    ):
        assert found_by(tests, "def f(): pass").verdict == ("timeout" if "while" in tests else "fail"), tests


def test_the_prompts_helpers_are_the_tests_own(places):
    prompt = "def g(x):\n    return 2 * x\n\n\ndef f(x):\n    '''half of it'''\n"
    assert found_by("assert candidate(g(4)) == 4", "def g(x): return 0\ndef f(x): return x // 2", prompt) == (
        "pass",
        "",
    )
    assert (
        found_by("assert g(candidate(4)) == 4", "def g(x): return x\ndef f(x): return x", prompt).verdict
        == "fail"
    )
    for text in (
        "Write f.",
        "boom",
        "def f(x):\n",
        "def f(x):",
        "def f(x):\n\t",
        "import no_such_module\ndef f(x):\n",
    ):
        assert found_by("assert candidate(1) == 1", "def f(x): return x", text).verdict == (
            "fail" if "import" in text else "pass"
        ), text


def test_time_is_processor_time(places, monkeypatch):
    """Waiting is not using: a program that is kept waiting for longer than CPU_S passes; one that computes for so long does not."""
    monkeypatch.setattr(sandbox, "CPU_S", 1)
    assert found_by(ONE_AND_FIVE, "import time\ntime.sleep(1.5)\ndef f(x): return x + 1") == ("pass", "")
    assert found_by(ONE_AND_FIVE, "def f(x):\n    while True: pass") == (
        "timeout",
        "it used more than 1 s of processor time",
    )
    assert found_by(ONE_AND_FIVE, "while True: pass\ndef f(x): return x").verdict == "timeout"
    monkeypatch.setattr(sandbox, "WALL_S", 1.5)
    assert found_by(ONE_AND_FIVE, "import time\ntime.sleep(9)\ndef f(x): return x") == (
        "timeout",
        "it took more than 1.5 s",
    )


def test_a_right_program_passes_on_a_busy_machine(places):
    """Eight programs at once and as many that only burn time."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        with ThreadPoolExecutor(8) as pool:
            work = "def f(x):\n    for n in range(10 ** 6): pass\n    return x + {}"
            found = list(pool.map(lambda n: found_by(ONE_AND_FIVE, work.format(f"1 + 0 * {n}")), range(8)))
    finally:
        for each in burners:
            each.kill()
            each.wait()
    assert set(found) == {("pass", "")}


def test_the_disk_is_bounded_where_a_program_gets_around_the_hook(places, monkeypatch):
    """By a file system of its own, of 64 MB."""
    if not permits_namespaces(monkeypatch):
        pytest.skip("this system permits no namespaces")
    without(monkeypatch, NO_HOOK)
    fill = "n = 0\ntry:\n    while n < 200:\n        with open(str(n), 'wb') as file: file.write(bytes(1 << 20))\n        n += 1\nexcept OSError: pass\ndef f(x): return n"
    assert found_by("assert 50 <= candidate(0) <= 64", fill) == ("pass", "")
    nodes = "import os\nn = 0\ntry:\n    while n < 5000:\n        os.mkdir(str(n))\n        n += 1\nexcept OSError: pass\ndef f(x): return n"
    assert found_by("assert 500 <= candidate(0) <= 1000", nodes) == ("pass", "")


def test_folders_of_any_depth_are_cleared_away(places, tmp_path, monkeypatch):
    """Where they are on the disk: without namespaces, and past the hook."""
    without(monkeypatch, NO_HOOK, NO_NAMESPACES)
    deep = "import os\nfor n in range(1100):\n    os.mkdir('d')\n    open('.hidden', 'w').close()\n    os.symlink('/', 'link')\n    os.chmod('d', 0o700)\n    os.chdir('d')\nos.chmod('.', 0)\ndef f(x): return x + 1"
    assert found_by(ONE_AND_FIVE, deep) == ("pass", "")
    assert not list((tmp_path / "in").iterdir())


def test_the_child_by_hand_says_who_starts_it():
    path = ROOT / "scripts" / "lib" / "sandbox_child.py"
    done = subprocess.run(
        [sys.executable, str(path), "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and not done.stdout
        and done.stderr.count("\n") == 1
        and "sandbox.py starts it" in done.stderr
    )
