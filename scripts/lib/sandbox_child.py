"""What runs in the two processes by which scripts/lib/sandbox.py checks a program: the answer's, and its
tests'.

Started by `python -c` with this very text, one role a process, both locked in alike before they run anything.
They speak JSON lines over a socket: the tests' process sends the name of a function and its arguments, the
answer's process what the call gave, or raised, and the arguments afterwards. What crosses is plain data,
built again on the other side from exact builtin types: no object of the answer's, and none of its code, ever
comes to where the comparing is done.
"""

import builtins
import json
import os
import signal
import sys
from contextlib import suppress

MOST = 16 << 20  # bytes of a message
TOO_LONG = f"more than {MOST >> 20} MB"
ENDED = "its process ended before it answered"
MOST_FILES = 64  # files and folders that a program may make where no file system of its own bounds them


class Unspeakable(Exception):
    """A value that is no plain data."""


class Broken(BaseException):
    """The answer's process does not answer as it should; no `except Exception` in the tests may take that for
    an error."""


def main() -> None:
    """Reads what to do from standard input, locks itself in, and does it."""
    role, channel, folder, limits, job = json.load(sys.stdin)
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    if role == "answer":
        os.close(report)
    enter_namespaces(folder, limits["DISK"])
    lock_files(folder)
    set_limits(limits)
    if role == "answer":
        forbid_events(folder, lambda event: send(channel, {"ended": f"it was ended at {event}"}))
        serve(channel, *job)
    else:
        forbid_events(
            folder,
            lambda event: os.write(report, json.dumps(["fail", f"the tests were ended at {event}"]).encode()),
        )
        os.write(report, json.dumps(run_tests(channel, *job)).encode())
    os._exit(0)


# The answer's process


def serve(channel: int, sources: list[str]) -> None:
    """Runs the first of these programs that compiles, then calls its functions as asked, until the asking
    ends."""
    namespace: dict = {"__name__": "answer"}
    try:
        exec(first_that_compiles(sources), namespace)
    except Exception as error:
        send(channel, {"ended": described(error)})
        return
    rest = bytearray()
    while (line := receive(channel, rest)) is not None:
        name, arguments = json.loads(line)
        arguments, named = decode(arguments)
        try:
            if name not in namespace:
                raise NameError(f"the answer defines no {name}")
            value = namespace[name](*arguments, **named)
        except Exception as error:
            reply = {
                "raised": [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"],
                "text": described(error),
            }
        else:
            reply = said(value, arguments)
        try:
            send(channel, {**reply, "arguments": encode((arguments, named), dict_like=True)})
        except (Unspeakable, RecursionError, ValueError) as error:
            send(channel, {"unspeakable": f"it gave or changed {described(error)}"})


def first_that_compiles(sources: list[str]):
    """The code of the first program without a syntax error. Raises that of the first program where all have
    one."""
    first = None
    for source in sources:
        try:
            return compile(source, "<answer>", "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
            first = first or error
    raise first or SyntaxError("no program")


def said(value, arguments: tuple) -> dict:
    """The reply that gives a value, or says which argument it is."""
    for at, each in enumerate(arguments):
        if each is value and type(value) in (list, dict, set, bytearray):
            return {"argument": at}
    try:
        return {"value": encode(value, dict_like=True)}
    except (Unspeakable, RecursionError) as error:
        return {"unspeakable": f"it returned {described(error)}"}


def described(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}"[:300] if not isinstance(error, Unspeakable) else str(error)


# The tests' process


def run_tests(channel: int, prompt: str, tests: str, name: str) -> list[str]:
    """[verdict, reason] of HumanEval's tests on the functions of the answer's process.

    The prompt is trusted, and its helper functions (poly, encode_cyclic) are run here. Names that the tests
    use and nothing here defines are taken for further functions of the answer's.
    """
    calls = Calls(channel)
    namespace: dict = {"__name__": "tests"}
    try:
        define_helpers(prompt, namespace)
        code = compile(tests, "<tests>", "exec")
        for used in {name, *names_in(code)} - {*namespace, *dir(builtins)} | {name}:
            namespace[used] = calls.function(used)
        exec(code, namespace)
        namespace["check"](namespace[name])
    except Broken:
        pass
    except Exception as error:
        calls.fault = calls.fault or ("fail", f"the tests say {described(error)}")
    return list(calls.fault or ("pass", ""))


def define_helpers(prompt: str, namespace: dict) -> None:
    """Runs a prompt that is a program, but for a last function without a body; others define nothing."""
    for body in ("", "\n    pass\n", "\n\tpass\n"):
        try:
            code = compile(prompt + body, "<prompt>", "exec")
        except (SyntaxError, ValueError):
            continue
        with suppress(Exception):
            exec(code, namespace)
        return


def names_in(code) -> set:
    """All names in a code object and those inside it."""
    inner = [names_in(each) for each in code.co_consts if hasattr(each, "co_names")]
    return set(code.co_names).union(*inner)


class Calls:
    """Calls into the answer's process. fault: verdict and reason, once a call could not be made or was not
    answered."""

    def __init__(self, channel: int):
        self.channel, self.rest, self.fault = channel, bytearray(), ()

    def function(self, name: str):
        """A function that is called there."""

        def candidate(*arguments, **named):
            if not self.fault:
                try:
                    send(self.channel, [name, encode((arguments, named))])
                except (Unspeakable, RecursionError, ValueError) as error:
                    self.fault = (
                        "unchecked",
                        f"the tests pass {described(error)}, which cannot leave their process",
                    )
                except OSError:
                    pass  # its end is noticed when its answer is read
            return self.reply(arguments, named)

        candidate.__name__ = candidate.__qualname__ = name
        return candidate

    def reply(self, arguments: tuple, named: dict):
        """What a call gave; what it changed in its arguments is changed here. Raises what it raised, or
        Broken."""
        try:
            reply = self.read()
            merged((arguments, named), decode(reply["arguments"]))
            if "raised" not in reply:
                return arguments[reply["argument"]] if "argument" in reply else decode(reply["value"])
            error = builtin_error(reply["raised"], str(reply["text"])[:300])
        except Exception as wrong:
            self.fault = "fail", f"what it sent is no answer ({described(wrong)})"
            raise Broken from None
        raise error

    def read(self) -> dict:
        """The next message. Raises Broken where it is none, or says that there will be no answer."""
        if not self.fault:
            line = receive(self.channel, self.rest)
            reply = {} if line is None else json.loads(line)
            if line is None:
                self.fault = "fail", ENDED
            elif self.rest:
                self.fault = "fail", "it sent more than one answer"
            elif "ended" in reply or "unspeakable" in reply:
                self.fault = (
                    "fail",
                    str(reply.get("ended") or f"{reply['unspeakable']}, which is no plain data")[:300],
                )
        if self.fault:
            raise Broken
        return reply


def builtin_error(names: list, text: str) -> Exception:
    """An exception of the first of these kinds that is builtin and can be made from a text."""
    for name in names:
        error = getattr(builtins, str(name), None)
        if isinstance(error, type) and issubclass(error, Exception):
            with suppress(TypeError):
                return error(text)
    return Exception(text)


def merged(old, new):
    """`old` changed in place to what `new` says, wherever both are the same kind of container; else `new`."""
    if type(old) is not type(new):
        return new
    if type(old) is tuple and len(old) == len(new):
        inner = tuple(map(merged, old, new))
        return old if all(a is b for a, b in zip(old, inner)) else inner
    if type(old) is list:
        old[:] = [merged(a, b) for a, b in zip(old, new)] + new[len(old) :]
    elif type(old) is dict:
        fresh = {key: merged(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(fresh)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif type(old) is bytearray:
        old[:] = new
    else:
        return new
    return old


# Plain data: what crosses


def encode(value, dict_like: bool = False):
    """A value as JSON: exact builtin types only, those that JSON lacks as {kind: ...}. Raises Unspeakable for
    others.

    dict_like: take collections' Counter, defaultdict and OrderedDict for the dicts that they equal.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind in (list, tuple, set, frozenset, dict) and 3 * len(value) > MOST:  # 3 bytes an entry, at least
        raise ValueError(TOO_LONG)  # before seconds are spent on writing it
    if kind is int:
        return value if value.bit_length() <= 64 else {"int": hex(value)}
    if kind is list:
        return [encode(each, dict_like) for each in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(each, dict_like) for each in value]}
    if kind is dict or dict_like and kind.__module__ == "collections" and issubclass(kind, dict):
        return {"dict": [[encode(key, dict_like), encode(each, dict_like)] for key, each in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    if (kind.__module__, kind.__name__) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return {kind.__name__: str(value)}
    raise Unspeakable(f"a value of type {kind.__name__}"[:300])


def decode(value):
    """The value of such JSON. Raises ValueError, TypeError, LookupError or RecursionError for what `encode`
    does not write."""
    if type(value) is list:
        return [decode(each) for each in value]
    if type(value) is not dict:
        return value
    ((kind, content),) = value.items()
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind in ("tuple", "set", "frozenset"):
        return getattr(builtins, kind)([decode(each) for each in content])
    if kind == "dict":
        return {decode(key): decode(each) for key, each in content}
    if kind in ("complex", "range"):
        return getattr(builtins, kind)(*[decode(each) for each in content])
    module = {"Decimal": "decimal", "Fraction": "fractions"}[kind]
    return getattr(__import__(module), kind)(content)


def send(channel: int, message) -> None:
    """Writes a message. Raises ValueError for one that is too long."""
    data = json.dumps(message).encode() + b"\n"
    if len(data) > MOST:
        raise ValueError(TOO_LONG)
    while data:
        data = data[os.write(channel, data) :]


def receive(channel: int, rest: bytearray) -> bytes | None:
    """The next message, None at the end; rest: what was read beyond it. Raises ValueError for one that is too
    long."""
    start = 0
    while (end := rest.find(b"\n", start)) < 0:
        start = len(rest)
        chunk = os.read(channel, 1 << 16)
        if not chunk:
            return None
        rest += chunk
        if len(rest) > MOST:
            raise ValueError(TOO_LONG)
    line = bytes(rest[:end])
    del rest[: end + 1]
    return line


# How both are locked in


def enter_namespaces(folder: str, disk: int) -> None:
    """Where Linux permits: no network, no sight of other processes, none that outlives this one, and `folder`
    as a file system in memory, of `disk` bytes, that is gone with the last of them."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        # CLONE_NEWUSER; PID, NET, IPC, NS
        user, others = 0x10000000, 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000
        ids = {
            "setgroups": "deny",
            "uid_map": f"{os.getuid()} {os.getuid()} 1",
            "gid_map": f"{os.getgid()} {os.getgid()} 1",
        }
        if sys.platform != "linux":
            return
        if not libc.unshare(user | others):
            for name, content in ids.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(content)
        elif libc.unshare(others):
            return
        # MS_PRIVATE, MS_REC: what is mounted here stays here
        libc.mount(None, b"/", None, 0x40000 | 0x4000, None)
        options = f"size={disk},nr_inodes=1000,mode=700".encode()
        # MS_NOSUID, MS_NODEV, MS_NOEXEC
        if not libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 2 | 4 | 8, options):
            os.chdir(folder)
    except (ImportError, OSError, AttributeError):
        return
    first = os.fork()  # a namespace's first process takes all others with it when it dies
    if first:
        status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: the parent's death is its own


def lock_files(folder: str) -> None:
    """Where Linux has Landlock: the kernel itself lets nothing be read but Python and libraries, nor written
    but `folder`."""
    import struct

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
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
    libraries += ("/usr/share/zoneinfo", "/etc/ld.so.cache")
    readable = dict.fromkeys(
        (*sys.path, os.path.join(sys.base_prefix, "lib"), *libraries, "/dev/urandom"), read_file
    )
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

    for name, value in limits.items():
        with suppress(AttributeError, ValueError, OSError):  # unknown here, or already lower
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def forbid_events(folder: str, tell) -> None:
    """From here on ends the process at once, where no `except` can hold it, when it reaches out of `folder`,
    or makes more than MOST_FILES files and folders in it; tell: is given the event before."""
    fork_exec = type(sys)("_posixsubprocess")  # asyncio and others import subprocess without using it
    fork_exec.fork_exec = None
    sys.modules["_posixsubprocess"] = fork_exec
    real, is_folder, leave = os.path.realpath, os.path.isdir, os._exit
    ours = (real(folder), os.devnull)
    readable, made = (*ours, *map(real, sys.path)), set()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    nameless = getattr(os, "O_TMPFILE", 0)
    harmless = ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk")
    refused = ("os.", "socket.", "subprocess.", "ctypes.", "signal.")
    refused += ("resource.", "pty.", "sqlite3.", "syslog.")

    def within(path, folders: tuple) -> bool:
        path = real(os.fsdecode(path if path is not None else "."))
        return any(path == each or path.startswith(each + os.sep) for each in folders)

    def few(path) -> bool:
        made.add(real(os.fsdecode(path)))
        return len(made) <= MOST_FILES

    def may_open(path, mode: str | None, flags: int) -> bool:
        if type(path) is int or nameless and flags & nameless == nameless:
            return type(path) is int or within(path, ours)
        # by os.open: paths could begin there, which this hook does not see
        if mode is None and is_folder(path):
            return False
        return within(path, ours) and few(path) if flags & writing else within(path, readable)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            good = may_open(*args)
        elif event in ("os.listdir", "os.scandir"):
            good = type(args[0]) is int or within(args[0], readable)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            # -1: of no other folder
            good = args[-1] == -1 and within(args[0], ours) and (event != "os.mkdir" or few(args[0]))
        elif event == "import":
            good = args[0] != "_posixsubprocess"
        else:
            good = event in harmless or not event.startswith(refused)
        if not good:
            try:
                tell(event)
            finally:
                leave(1)

    sys.addaudithook(hook)


if "__file__" in globals() and __name__ == "__main__":  # not by -c
    sys.stderr.write("sandbox_child.py: scripts/lib/sandbox.py starts it; it does nothing by hand.\n")
    sys.exit(2)
if __name__ == "__main__":
    main()
