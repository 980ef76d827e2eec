"""Runs programs that a model wrote, locked in, and says whether they pass HumanEval's tests.

    allow_code_execution()
    code_passes(item, "    return x + 1")     # item: a line of HumanEval.jsonl

Nothing runs before `allow_code_execution()`. The program runs in a fresh interpreter with an empty environment, in an empty
folder, under limits of time, memory, file size and processes; an audit hook ends it when it opens files elsewhere, a socket
or a process, or sends a signal; where Linux permits, it has process, network and user namespaces of its own, and Landlock
keeps it from all files but Python's. This stops what models write by mistake. It is no boundary against code that sets out
to break it: audit hooks can be got around from within the interpreter, a process owned by root may start others without
limit (until its time is up), and the tests share their process with what they test, so that code which knows this file can
forge a pass. Run it in a container or a virtual machine if that matters.
"""

import inspect
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import InputError

TIMEOUT_S = 10.0
LIMITS = {"AS": 1 << 30, "CPU": 10, "FSIZE": 16 << 20, "NPROC": 0, "NOFILE": 64, "CORE": 0}  # RLIMIT_*, bytes and s
STOPS = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```")  # where a plain completion has left the function


def program_of(item: dict, text: str) -> str:
    """The program that tests a text: the prompt of `item`, a line of HumanEval, completed with it, the tests, their call.

    A text with Markdown code blocks is its first block that defines the function, or else its first; one that begins
    indented is a plain completion, whatever follows. Where the text defines the function itself, it takes the place of
    the prompt's; else it continues the prompt, indented if it is not. What is not in a block is cut at the first of STOPS.
    """
    name = item["entry_point"]
    definition = re.compile(rf"^[ \t]*(?:async )?def {name}\b", re.MULTILINE)
    indented = re.match(r"(?:[ \t]*\n)*(?:  |\t)", text)
    blocks = [] if indented else re.findall(r"```\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", text, re.DOTALL)
    code = next(filter(definition.search, blocks), blocks[0]) if blocks else text
    defined = definition.search(code)
    if not blocks:
        start = re.search(r"^(?:import|from|def|class|@)\b", code, re.MULTILINE) if defined else None
        begin = min(start.start(), defined.start()) if start else 0
        ends = [code.find(stop, defined.end() if defined else 0) for stop in STOPS]
        code = code[begin : min((end for end in ends if end >= 0), default=len(code))]
    if defined:
        before = list(definition.finditer(item["prompt"]))
        whole = item["prompt"][: before[-1].start()] + "\n" + textwrap.dedent(code) if before else code
    else:
        first = next((line for line in code.split("\n") if line.strip()), "")
        whole = item["prompt"] + (code if first[:1] in (" ", "\t") else textwrap.indent(code, "    "))
    return f"{whole}\n\n{item['test']}\n\ncheck({name})\n"


def run_answer() -> None:
    """Runs in the child, from this very source: reads what to run, locks itself in, runs it, and reports.

    Only a program that came to its end is reported, by a word that it was not told: exiting early is no pass.
    """
    import json
    import os
    import sys

    word, folder, limits, program = json.load(sys.stdin)
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    enter_namespaces()
    lock_files(folder)
    set_limits(limits)
    forbid_events(folder)
    exec(compile(program, "<answer>", "exec"), {"__name__": "answer"})
    os.write(report, word.encode())
    os._exit(0)


def enter_namespaces() -> None:
    """Where Linux permits: no network, no sight of other processes, and none that outlives this one."""
    import os
    import signal
    import sys

    try:
        import ctypes

        libc = ctypes.CDLL(None)
        user, others = 0x10000000, 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWUSER; NEWPID, NEWNET, NEWIPC
        if sys.platform != "linux" or (libc.unshare(user | others) and libc.unshare(others)):
            return
    except (ImportError, OSError, AttributeError):
        return
    first = os.fork()  # a namespace's first process takes all others with it when it dies
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: the parent's death is its own


def lock_files(folder: str) -> None:
    """Where Linux has Landlock: the kernel itself lets nothing be read but Python and libraries, nor written but `folder`."""
    import os
    import struct
    import sys

    try:
        import ctypes

        libc = ctypes.CDLL(None)
        version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset, asked for its version
        if sys.platform != "linux" or version < 1:
            return
    except (ImportError, OSError, AttributeError):
        return
    all_rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    read_file, read_dir = 1 << 2, 1 << 3
    rules = libc.syscall(444, struct.pack("Q", all_rights), 8, 0)
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache")
    readable = dict.fromkeys((*sys.path, os.path.join(sys.base_prefix, "lib"), *libraries, "/dev/urandom"), read_file)
    for path, rights in (readable | {os.devnull: read_file | 1 << 1, folder: all_rights}).items():
        if os.path.exists(path):
            beneath = os.open(path, os.O_PATH)
            rights |= read_dir if os.path.isdir(path) else 0
            libc.syscall(445, rules, 1, struct.pack("<Qi", rights, beneath), 0)  # landlock_add_rule
            os.close(beneath)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.syscall(446, rules, 0)  # landlock_restrict_self
    os.close(rules)


def set_limits(limits: dict) -> None:
    """Sets soft and hard limits, those that the system has."""
    import resource
    from contextlib import suppress

    for name, value in limits.items():
        with suppress(AttributeError, ValueError, OSError):  # unknown here, or already lower
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def forbid_events(folder: str) -> None:
    """From here on ends the process at once, where no `except` can hold it, when it reaches out of `folder`."""
    import os
    import sys

    fork_exec = type(sys)("_posixsubprocess")  # asyncio and others import subprocess without using it
    fork_exec.fork_exec = None
    sys.modules["_posixsubprocess"] = fork_exec
    real, leave = os.path.realpath, os._exit
    ours = (real(folder), os.devnull)
    readable = (*ours, *map(real, sys.path))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    harmless = ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk")
    refused = ("os.", "socket.", "subprocess.", "ctypes.", "signal.", "resource.", "pty.", "sqlite3.", "syslog.")

    def within(path, folders: tuple) -> bool:
        path = real(os.fsdecode(path if path is not None else "."))
        return any(path == each or path.startswith(each + os.sep) for each in folders)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            good = type(args[0]) is int or within(args[0], ours if args[2] & writing else readable)
        elif event in ("os.listdir", "os.scandir"):
            good = type(args[0]) is int or within(args[0], readable)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            good = args[-1] == -1 and within(args[0], ours)  # -1: relative to no other folder
        elif event == "import":
            good = args[0] != "_posixsubprocess"
        else:
            good = event in harmless or not event.startswith(refused)
        if not good:
            leave(1)

    sys.addaudithook(hook)


CHILD = (
    "\n".join(map(inspect.getsource, (run_answer, enter_namespaces, lock_files, set_limits, forbid_events)))
    + "\nrun_answer()\n"
)
code_is_allowed = False


def allow_code_execution() -> None:
    """Lets `code_passes` run what a model wrote; what it is kept from is on top."""
    global code_is_allowed
    code_is_allowed = True


def check_allowed() -> None:
    """Raises InputError when code would be run that nobody has allowed."""
    if not code_is_allowed:
        raise InputError("Checking code runs programs that a model wrote; allow that with --allow_code_execution.")
    if os.name != "posix":
        raise InputError("Checking code needs Linux or another POSIX system, where it can limit what a program does.")
    if not passes(""):
        raise InputError("Checking code cannot be done here: even an empty program does not come to its end.")


@lru_cache(maxsize=4096)
def passes(program: str) -> bool:
    """Whether a program comes to its end in TIMEOUT_S seconds, locked in. Whatever it started is gone afterwards."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as report:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", CHILD], cwd=folder, env={"TMPDIR": folder}, stdin=subprocess.PIPE,
            stdout=report, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(json.dumps([word, folder, LIMITS, program]).encode(), TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        report.seek(0)
        return report.read(len(word) + 1) == word.encode()


def code_passes(item: dict, text: str) -> bool:
    """Whether a text passes the tests of `item`, a line of HumanEval. Raises InputError when that is not allowed."""
    check_allowed()
    return passes(program_of(item, text))
