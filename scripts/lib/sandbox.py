"""Runs programs that a model wrote, locked in, and says whether they pass HumanEval's tests.

    allow_code_execution()
    outcome(item, "    return x + 1")        # item: a line of HumanEval.jsonl; Outcome("pass", "")
    code_passes(item, "    return x + 1")    # True

Nothing runs before `allow_code_execution()`. Two fresh interpreters work for each program
(scripts/lib/sandbox_child.py), alike locked in, each with an empty environment and an empty folder: one runs
the program, the other the tests. What the tests call is asked of the first as plain data, and compared in the
second, which never holds an object of the program's nor any of its code. So an `__eq__` that says yes, a
subclass of int, a look at frames or at the checker's code, and what is written to any open file win nothing:
the expected values are not in the program's process. What still can be won without solving the problem: a
program may know HumanEval's inputs by heart and answer each as expected, and where tests take NaN or an error
for right, it may give these. What is no plain data (generators, objects of the program's own classes) is no
right answer; tests that pass functions or objects cannot be held here, and their outcome is "unchecked",
never "pass".

Each process has limits: of processor time (CPU_S; the wall clock allows WALL_S, so that a busy machine fails
nobody), memory, file size and processes. An audit hook ends it when it opens files elsewhere, a socket or a
process, sends a signal, or makes more than 64 files. Where Linux permits, it has process, network, mount and
user namespaces of its own, and its folder is a file system in memory of 64 MB; elsewhere 64 files of 1 MB are
what the hook and the limits leave it. Landlock keeps it from all files but Python's. This stops what models
write by mistake. It is no boundary against code that sets out to break it: audit hooks can be got around from
within the interpreter, and then, where there are no namespaces, a process owned by root may start others
without limit (until its time is up) and make as many files as it likes, and one without Landlock either may
reach the tests' process. Run it in a container or a virtual machine if that matters.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cli import InputError

CPU_S, WALL_S = 10, 60.0  # of one program with all its tests
MOST_SOURCES = 100  # ways to read a text that are tried
# RLIMIT_*, bytes
LIMITS = {"AS": 1 << 30, "FSIZE": 1 << 20, "NPROC": 0, "NOFILE": 64, "CORE": 0, "DISK": 64 << 20}
CHILD = (Path(__file__).parent / "sandbox_child.py").read_text(encoding="utf-8")
# where a plain completion has left the function
STOPS = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```")
GLUED_FENCE = re.compile(r"^(.*\S:)[ \t]*(```[ \t]*(?:python3?|py)[ \t]*)$", re.IGNORECASE | re.MULTILINE)
LINE_OF_CODE = re.compile(
    r"(?:def|class|async|import|from|if|elif|else|for|while|try|except|finally|with|return|raise|assert|global|pass)\b"
    r"|[#@)\]}\"']|[A-Za-z_][\w.]*(?:\[[^\]]*\])*(?:\s*,\s*[A-Za-z_][\w.]*)*\s*(?::[^=]*)?(?:[-+*/%&|^]|//|\*\*)?=(?!=)|[A-Za-z_][\w.]*\("
)


class Outcome(NamedTuple):
    """What became of a program. verdict: pass, fail, timeout, or unchecked where its tests cannot be held.
    reason: a line."""

    verdict: str
    reason: str


def clear_level(here: int) -> str | None:
    """Removes from an open folder what is no folder, and empty ones, until one is met that is not empty: its
    name."""
    with os.scandir(here) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=here)
                continue
            try:
                os.rmdir(entry.name, dir_fd=here)
            except OSError:
                os.chmod(entry.name, 0o700, dir_fd=here)
                return entry.name
    return clear_level(here) if any(os.scandir(here)) else None


def clear(path: str) -> None:
    """Empties a folder, however deep, with one folder open at a time and no long path."""
    below, here = [], os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:
            inner = clear_level(here)
            if inner is None and not below:
                return
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            outer, here = here, os.open(inner or "..", flags, dir_fd=here)
            os.close(outer)
            if inner is None:
                os.rmdir(below.pop(), dir_fd=here)
            else:
                below.append(inner)
    finally:
        os.close(here)


@contextmanager
def folder() -> Iterator[str]:
    """An empty folder that is gone afterwards, whatever was made in it."""
    path = tempfile.mkdtemp()
    try:
        yield path
    finally:
        with suppress(OSError):
            clear(path)
            os.rmdir(path)


class Process:
    """One of the two locked-in processes, with a session and a folder of its own. report: what it printed, in
    the end."""

    def __init__(self, role: str, channel: socket.socket, folder: str, job: list):
        limits = LIMITS | {"CPU": CPU_S}
        self.seconds: float | None = None  # of processor time, once it has ended
        with tempfile.TemporaryFile() as task:
            task.write(json.dumps([role, channel.fileno(), folder, limits, job]).encode())
            task.seek(0)
            self.child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", CHILD],
                cwd=folder,
                env={"TMPDIR": folder},
                stdin=task,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[channel.fileno()],
            )

    def ended(self) -> bool:
        """Whether it has ended, by itself; what it started is then ended too."""
        if self.seconds is None:
            pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
            if pid:
                self.note(status, usage)
        return self.seconds is not None

    def note(self, status: int, usage) -> None:
        self.child.returncode = os.waitstatus_to_exitcode(status)
        self.seconds = usage.ru_utime + usage.ru_stime
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def end(self, patience: float) -> bool:
        """Ends it and all that it started, after `patience` seconds. Returns whether its processor time was
        used up."""
        until = time.monotonic() + patience
        while not self.ended() and time.monotonic() < until:
            time.sleep(0.005)
        by_itself = self.seconds is not None
        if not by_itself:
            self.kill()
            self.note(*os.wait4(self.child.pid, 0)[1:])
        self.child.stdout.close()
        killed = self.child.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        # the kernel counts otherwise for its limit than here
        return by_itself and killed and self.seconds > CPU_S / 2


def read_report(answer: Process, tests: Process, deadline: float) -> list[str] | None:
    """What the tests' process says, [verdict, reason]; None when it ends without, or the time is up."""
    pipe, data = tests.child.stdout.fileno(), b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and len(data) < 1 << 16:
        if not poll.poll(1000 * min(left, 0.2)):
            answer.ended()  # what it left behind would keep the tests waiting
            continue
        chunk = os.read(pipe, 1 << 16)
        data += chunk
        if not chunk:
            break

    try:
        verdict, reason = json.loads(data)
    except ValueError:
        return None

    return [str(verdict), str(reason)]


def blocks_of(text: str) -> list[list[str]]:
    """The contents of Markdown's code blocks; of each one up to every line that may end it, first that which
    should: a fence no deeper than its own. A docstring's example is deeper, as a rule."""
    lines, blocks, at = text.split("\n"), [], 0
    fences = [
        (i, found)
        for i, line in enumerate(lines)
        if (found := re.match(r"([ \t>]*)(`{3,}|~{3,})([^`]*)$", line))
    ]
    for place, (begin, opening) in enumerate(fences):
        if begin < at:
            continue
        rest = fences[place + 1 : place + 1 + MOST_SOURCES]
        ends = [(len(found[1]) > len(opening[1]), i) for i, found in rest
                if found[2].startswith(opening[2]) and not found[3].strip()]  # fmt: skip
        ends = [i for _, i in sorted(ends)]
        inside = [re.sub(r"^[ \t]*> ?", "", line) if ">" in opening[1] else line for line in lines]
        blocks.append(["\n".join(inside[begin + 1 : end]) for end in ends[:8] or [len(lines)]])
        at = ends[0] + 1 if ends else len(lines)

    return blocks[-MOST_SOURCES:]


def cut(code: str, after: int) -> str:
    """What comes before the first of STOPS."""
    return code[: min((end for stop in STOPS if (end := code.find(stop, after)) >= 0), default=len(code))]


def without_prose(code: str, stops: tuple[str, ...] = ()) -> str:
    """What comes before the first line, after the first, that begins with one of `stops`, or unindented as no
    code does."""
    for found in re.finditer(r"(?<=\n)(?!\s).+", code):
        if not LINE_OF_CODE.match(found[0]) or found[0].startswith(stops):
            return code[: found.start()]
    return code


def unfenced(text: str, defines: re.Pattern) -> Iterator[str]:
    """Code that stands in a text without a block: from each line that may begin it, to each that may end
    it."""
    first = defines.search(text)
    begins = [
        found.start() for found in re.finditer(r"^(?:import|from|def|class|async|@)\b", text, re.MULTILINE)
    ]
    for begin in [*[begin for begin in begins if begin < first.start()][:8], first.start()]:
        code = without_prose(text[begin:], ("if __name__", "print("))
        tops = [found.start() for found in re.finditer(r"^(?!\s)", code, re.MULTILINE)]
        for end in [len(code), *reversed(tops[-8:])]:
            if defines.search(code, 0, end):
                yield code[:end]


def defined(prompt: str, name: str, code: str) -> str:
    """A program of code that defines the function: it takes the place of the prompt's definition."""
    before = list(re.finditer(rf"^[ \t]*(?:async )?def {name}\b", prompt, re.MULTILINE))
    return prompt[: before[-1].start()] + "\n" + textwrap.dedent(code) if before else textwrap.dedent(code)


def completed(prompt: str, code: str) -> Iterator[str]:
    """Programs of a prompt and code that continues it, as it is or indented anew."""
    first = next((line for line in code.split("\n") if line.strip()), "")
    spaces = re.sub(r"^[ \t]+", lambda found: found[0].expandtabs(4), code, flags=re.MULTILINE)
    if first[:1] in (" ", "\t"):
        yield prompt + code
    yield prompt + textwrap.indent(textwrap.dedent(spaces), "    ")
    yield prompt + "    " + spaces.lstrip()


def programs_of(prompt: str, name: str, text: str) -> Iterator[str]:
    """The programs that a text can be read as, best first; the first without a syntax error is run.

    Of Markdown code blocks (``` or ~~~) the last that defines the function counts, after the definitions of
    those before it; without one the first that continues the prompt. A text that begins indented is a plain
    completion, if that is a program; so is a text without blocks that does not define the function, cut at
    the first of STOPS. Where a text defines the function without a block, it begins at its first line of code
    and ends before what is none. What defines the function takes the place of the prompt's; what does not
    continues the prompt, indented if it is not.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    text = re.sub(
        r"^[ \t\u00a0]*\u00a0", lambda found: found[0].replace("\u00a0", " "), text, flags=re.MULTILINE
    )
    text = GLUED_FENCE.sub(r"\1\n\2", text)
    defines = re.compile(rf"^[ \t]*(?:(?:async )?def {name}\b|{name}[ \t]*(?::[^=\n]*)?=(?!=))", re.MULTILINE)
    blocks = blocks_of(text)
    indented = re.match(rf"(?:[ \t]*\n)*(?:  |\t)[ \t]*(?!```|~~~|def {name}\b)\S", text)
    if indented:
        yield from completed(prompt, without_prose(cut(text, 0)))
        yield from completed(prompt, cut(text, 0))

    for at in reversed(range(len(blocks))):
        if any(map(defines.search, blocks[at])):
            before = [block for block in (blocks[i][0] for i in range(at)) if not defines.search(block)]
            for code in blocks[at]:
                if before:
                    yield defined(
                        prompt, name, "\n".join([*map(textwrap.dedent, before), textwrap.dedent(code)])
                    )
                yield defined(prompt, name, code)

    for block in blocks:
        yield from completed(prompt, block[0])
    if defines.search(text):
        for code in unfenced(text, defines):
            yield defined(prompt, name, code)
    elif not indented and not blocks:
        yield from completed(prompt, cut(text, 0))


@lru_cache(maxsize=1024)
def outcome_of(prompt: str, tests: str, name: str, text: str) -> Outcome:
    """The outcome of a text, by the fields of its item. Whatever was started for it is gone afterwards."""
    ours, theirs = socket.socketpair()
    deadline, started = time.monotonic() + WALL_S, []
    with folder() as one, folder() as other:
        try:
            with ours, theirs:
                started.append(
                    Process(
                        "answer", theirs, one, [list(islice(programs_of(prompt, name, text), MOST_SOURCES))]
                    )
                )
                started.append(Process("tests", ours, other, [prompt, tests, name]))
            report = read_report(*started, deadline)
        finally:
            spent = [process.end(1.0 if time.monotonic() < deadline else 0.0) for process in started]

    if report is not None and report[0] in ("pass", "unchecked"):
        return Outcome(*report)
    if any(spent):
        return Outcome("timeout", f"it used more than {CPU_S} s of processor time")
    if time.monotonic() >= deadline:
        return Outcome("timeout", f"it took more than {WALL_S:g} s")
    return (
        Outcome(*report)
        if report is not None
        else Outcome("fail", "the tests ended before they said anything")
    )


code_is_allowed = False


def allow_code_execution() -> None:
    """Lets `outcome` run what a model wrote; what it is kept from is on top."""
    global code_is_allowed
    code_is_allowed = True


def check_allowed() -> None:
    """Raises InputError when code would be run that nobody has allowed."""
    if not code_is_allowed:
        raise InputError(
            "Checking code runs programs that a model wrote; allow that with --allow_code_execution."
        )
    if os.name != "posix":
        raise InputError(
            "Checking code needs Linux or another POSIX system, where it can limit what a program does."
        )

    found = outcome_of(
        "def f():\n", "def check(candidate):\n    assert candidate() == (1, 'a')", "f", "    return 1, 'a'"
    )
    if found.verdict != "pass":
        raise InputError(
            f"Checking code cannot be done here: a program without fault does not pass ({found.reason})."
        )


def outcome(item: dict, text: str) -> Outcome:
    """What becomes of a text by the tests of `item`, a line of HumanEval. Raises InputError when that is not
    allowed."""
    check_allowed()
    return outcome_of(item["prompt"], item["test"], item["entry_point"], text)


def code_passes(item: dict, text: str) -> bool:
    """Whether a text passes the tests of `item`, a line of HumanEval. Raises InputError when that is not
    allowed."""
    return outcome(item, text).verdict == "pass"
