"""What every command line has in common: a user's mistake, the parser, progress, how a script begins and
ends.

Scripts import this file first: from then on Ctrl-C ends them silently with exit code 130, though the large
modules are still loading. Nothing here loads PyTorch.
"""

import _signal  # what signal.py is made of: loading that takes some milliseconds, and Ctrl-C may come in them
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "/")) in (
    HERE,
    f"{HERE}/scripts",
):
    _signal.signal(
        _signal.SIGINT, lambda *_: os._exit(130)
    )  # one of our scripts is the program, and has not begun yet

import argparse
import errno
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

LONGEST = 1000  # characters of a sentence about a mistake


class InputError(ValueError):
    """A user's mistake. Its text is one sentence: what, where, and what would be right. Scripts print it,
    exit 2."""


def one_line(text: str) -> str:
    """A sentence as a terminal can show it: control characters escaped, a very long one cut in its middle."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default to its help, where there is one and the help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, said = action.default, "default" in (action.help or "")
        if said or default is None or default is False or default == [] or default is argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{action.help or ''} (default: {shown.replace('%', '%%')})".strip()

    def add_argument(self, action: argparse.Action) -> None:
        action.help = action.help or self._get_help_string(
            action
        )  # argparse shows no default without a help text
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is answered in one sentence."""

    def __init__(self, description: str | None, **more):
        super().__init__(description=description, formatter_class=HelpFormatter, **more)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]):
        if (
            action.option_strings and arg_strings and set(arg_strings) == {"--"}
        ):  # argparse would make an empty list of it
            raise argparse.ArgumentError(action, "expected a value, not --")
        if action.type in (None, str):  # a file's name may be any bytes, a text may not
            for text in arg_strings:
                if not text.isascii() and text != text.encode(errors="replace").decode():
                    raise argparse.ArgumentError(action, f"{shortened(text)} is not valid Unicode")
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        message = re.sub(
            r"^argument (\S+): (?=.* must be )", r"\1 ", message
        )  # as in "--seed 1.5 must be a whole number"
        print(one_line(f"{self.prog}: {message}; see --help."), file=sys.stderr)
        sys.exit(2)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A flag's `type`: a whole number from low to high."""

    def read(text: str) -> int:
        digits = text.strip().removeprefix("-").removeprefix("+")
        number = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{shortened(text)} must be a whole number from {low} to {high}")
        return number

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """A flag's `type`: a number from low to high."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shortened(text)} must be a number from {low:g} to {high:g}")
        return value

    return read


def first_line(error: Exception) -> str:
    """What a library says of its error, as the end of a sentence of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def shortened(text: str) -> str:
    """What a user typed, without the middle of what is very long, and quoted unless it is a plain word."""
    text = text if len(text) <= 60 else f"{text[:30]}...{text[-10:]}"
    return text if re.fullmatch(r"[\x21-\x7e]+", text) else repr(text)


def shortened_value(value) -> str:
    """A value from a file, as Python writes it, without the end of what is very long."""
    text = (
        repr(value)
        if not isinstance(value, int) or value.bit_length() < 1000
        else "a number of hundreds of digits"
    )
    return text if len(text) <= 100 else text[:97] + "..."


class Progress:
    """A line `what: done/total` on stderr, once a second after the first 2 s."""

    line_is_open = False  # an error then begins on a line of its own

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.due = time.monotonic() + 2

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        finished = self.done == self.total
        if time.monotonic() > self.due or (finished and Progress.line_is_open):
            print(
                f"\r{self.what}: {self.done}/{self.total}",
                end="\n" if finished else "",
                file=sys.stderr,
                flush=True,
            )
            self.due, Progress.line_is_open = time.monotonic() + 1, not finished


def note(text: str) -> None:
    """A line on stderr, its own also while a Progress is half way."""
    print("\n" * Progress.line_is_open + text, file=sys.stderr)
    Progress.line_is_open = False


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def run_script(name: str, action: Callable[[], None]) -> None:
    """Runs a script's body. A user's mistake is one sentence on stderr and exit code 2, and so is what the
    system refuses (a full disk, a file that cannot be read, memory); a reader of our output that has left is
    no error; Ctrl-C is 130."""
    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if alone else None
    try:
        open_streams()
        action()
        flush(sys.stdout)
    except InputError as error:
        fail(name, str(error))
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        abandon(sys.stdout)
        sys.exit(1)
    except OSError as error:
        fail(name, system_error(error))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
            raise
        fail(
            name,
            "there is not enough memory for this; use a smaller model, --mode, or a shorter --cache_length.",
        )
    except KeyboardInterrupt:
        print("\n" * Progress.line_is_open, end="", file=sys.stderr)
        sys.exit(130)
    finally:
        if alone:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def open_streams() -> None:
    """Standard output must be open, or the next file that is opened would get its number, and what libraries
    print; closed standard error is replaced by nothing, and a character that a terminal lacks by a question
    mark."""
    if sys.stdout is None:
        raise InputError("standard output is closed; send it to a file or to /dev/null.")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 it stays open
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def flush(stream) -> None:
    """Writes out what is buffered, so that a full disk is noticed here and not while Python ends."""
    if hasattr(stream, "flush"):
        stream.flush()


def abandon(stream) -> None:
    """Sends the rest of a stream nowhere: Python would complain at its end of what it cannot write."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(name: str, sentence: str) -> None:
    """One sentence on stderr, exit code 2."""
    try:
        flush(sys.stdout)  # what was printed before comes first
    except (OSError, ValueError):
        abandon(sys.stdout)
    print(
        ("\n" if Progress.line_is_open else "") + one_line(f"{name}: {sentence}"), file=sys.stderr, flush=True
    )
    Progress.line_is_open = False
    sys.exit(2)


def system_error(error: OSError) -> str:
    """What the operating system refused, as a sentence."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else error.filename
        return f"{name} cannot be used: {reason}."
    where = (
        "a file or standard output"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        else "the system"
    )
    return f"{where} refused to go on: {reason}."
