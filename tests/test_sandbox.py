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
from pathlib import Path

import pytest
from conftest import DATA

from cli import InputError
from scripts import sandbox
from scripts.public_tasks import read_task
from scripts.sandbox import code_passes, outcome
from scripts.scoring import CHECKERS, Question
from scripts.tasks import load_questions

HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"


@pytest.fixture(autouse=True)
def forgets(monkeypatch, tmp_path):
    """Each test starts without permission, and with folders for tested code that are its own."""
    monkeypatch.setattr(sandbox, "code_is_allowed", False)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    sandbox.outcome_of.cache_clear()


PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef f(x: int) -> int:\n    """ One more than x. """\n'
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
    ["", "    pass\n", "    return x\n", "    return x + 1 +\n", "No idea.", "```python\n```", "    raise ValueError\n", "\0"],
)
def test_wrong_programs_fail(text):
    assert verdict(text) == "fail"


BODY = "    return x + 1\n"
WHOLE = 'def f(x: int) -> int:\n    """ One more than x. """\n' + BODY
EXAMPLE = 'def f(x):\n    """One more.\n\n    ```python\n    >>> f(1)\n    2\n    ```\n    """\n    return x + 1\n'


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
    for text in ("```\n" * 20_000, "~~~\ndef f(x):\n" * 5_000, "def f(x):\n" * 20_000, "import a\n" * 20_000 + "def f(x): $", "x, " * 50_000 + "\ndef f(x): $\n"):
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
def test_all_of_humanevals_own_solutions_pass_and_empty_bodies_fail():
    sandbox.allow_code_execution()
    questions = read_task("humaneval", HUMANEVAL, chat=False)
    with ThreadPoolExecutor() as pool:  # each is two processes of its own
        found = list(pool.map(outcome, [q.content for q in questions], [q.reference for q in questions]))
        empty = list(pool.map(outcome, [q.content for q in questions], [""] * len(questions)))
    assert {o.verdict for o in found} == {"pass"} and len(found) == 164
    assert {o.verdict for o in empty} == {"fail"}


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs HumanEval.jsonl.gz")
@pytest.mark.parametrize("form", SOLUTIONS)
def test_humanevals_solutions_pass_in_every_form(form):
    """22 problems, those with helper functions among them; JUDGE_FAST_ALL=1 takes all 164."""
    sandbox.allow_code_execution()
    questions = read_task("humaneval", HUMANEVAL, chat=False)
    if not os.environ.get("JUDGE_FAST_ALL"):
        questions = [questions[at] for at in sorted({32, 38, 50, *range(0, 164, 9)})]
    items = [q.content for q in questions]
    texts = [SOLUTIONS[form](item["prompt"], q.reference, item["entry_point"]) for q, item in zip(questions, items)]
    with ThreadPoolExecutor() as pool:
        found = dict(zip([q.content["task_id"] for q in questions], pool.map(outcome, items, texts)))
    assert len(found) >= 20 and not {name: o for name, o in found.items() if o.verdict != "pass"}


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
    "a pool": "import concurrent.futures as c\nwith c.ProcessPoolExecutor(2) as pool: list(pool.map(abs, [1, 2]))",
    "quit": "import builtins; getattr(builtins, 'quit', exit)(0)",
    "interrupt": "raise KeyboardInterrupt",
    "deep recursion": "def g(): g()\ng()",
}
CHILD = sandbox.CHILD
NO_NAMESPACES = ("    enter_namespaces()\n", "")
NO_HOOK = ("    forbid_events(folder)\n", "")
NO_LANDLOCK = ("    lock_files(folder)\n", "")


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
    monkeypatch.setattr(sandbox, "CHILD", child)
    sandbox.outcome_of.cache_clear()


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
    monkeypatch.setattr(sandbox, "TIMEOUT_S", 5.0)
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
        monkeypatch.setattr(sandbox, "TIMEOUT_S", 0.5)
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
    sandbox.code_is_allowed = True
    assert not sandbox.passes("")
    without(monkeypatch, ("    os.write(report, word.encode())", "    os.write(report, word.encode() * 2)"))
    assert not sandbox.passes("")


def test_tested_code_sees_nothing_of_this_process(places, monkeypatch):
    monkeypatch.setenv("JUDGE_FAST_SECRET", "1")
    look = "import os, sys\nassert set(os.environ) <= {'TMPDIR', 'LC_CTYPE'}, os.environ\nassert os.listdir('.') == []\nassert sys.stdin.read() == ''\nassert 'site' not in sys.modules"
    assert verdict(solution(look, guarded=False)) == "pass"


def test_landlock_alone_hides_files(places, tmp_path, monkeypatch):
    secret, write = f"assert open({places['outside']!r}).read()", f"open({places['outside']!r}, 'a').write('x')"
    home = f"import os\nassert os.listdir({places['home']!r})"
    without(monkeypatch, NO_HOOK, NO_NAMESPACES, NO_LANDLOCK)
    assert [verdict(solution(action, guarded=False)) for action in (secret, home)] == ["pass", "pass"]
    without(monkeypatch, NO_HOOK, NO_NAMESPACES)
    if sys.platform != "linux" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("this kernel has no Landlock")
    assert [verdict(solution(action, guarded=False)) for action in (secret, home, write)] == ["fail"] * 3
    assert Path(places["outside"]).read_text() == "secret"
    good = (
        "import ssl, hashlib, decimal, os\nos.makedirs('a', exist_ok=True)\nopen('a/b', 'w').write('x')\nos.rename('a/b', 'c')"
    )
    assert verdict(solution(good, guarded=False)) == "pass"
