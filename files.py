"""Reading and writing files: the one way in and the one way out for every script.

In: regular files only, of a bounded size, with the true cause in one sentence where that fails. Out: beside
and renamed, or line by line under a lock. Nothing else opens a file of a user's.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cli import InputError

MOST_BYTES = 8 << 30  # of a file that is read whole
MOST_GROWTH = 64 << 20  # bytes that it may have more than its size says, as another process writes it
MOST_JSON = 512 << 20  # of one JSON object


# In


@contextlib.contextmanager
def opened(path: str | Path, what: str = "") -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, open for reading without a buffer, and its size in bytes. what: comes before the path
    in the sentence.

    Raises InputError for a file that is missing, unreadable or no regular file, and where reading it fails.
    """
    what = f"{what} {path}".lstrip()
    try:
        # a FIFO would wait for its writer
        with open(
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{what} is {kind_of_file(status.st_mode)}; name a regular file.")
            yield file, status.st_size
    except FileNotFoundError:
        raise InputError(f"There is no file {what}.") from None
    except IsADirectoryError:
        raise InputError(f"{what} is a folder; name a regular file.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def read_bytes(path: str | Path, what: str = "", most: int = MOST_BYTES) -> bytes:
    """A regular file's content. what: comes before the path in the sentence, as a flag's name.

    Raises InputError as `opened`, and for a file larger than `most` bytes.
    """
    with opened(path, what) as (file, size):
        what = f"{what} {path}".lstrip()
        if size > most:
            raise InputError(
                f"{what} has {size / 1e9:.1f} GB, more than the {most / 1e9:.1f} GB that are read."
            )
        content = bytearray()
        while chunk := file.read(1 << 24):
            content += chunk
            if len(content) > size + MOST_GROWTH:
                raise InputError(
                    f"{what} goes on far beyond its size of {size} bytes; name a regular file on a disk."
                )
        return bytes(content)


def checkpoint_folder(folder: str | Path, kind: str = "a Hugging Face snapshot folder") -> Path:
    """A folder to read a checkpoint from, of a kind that the sentence names.

    Raises InputError with the true cause where it cannot be read.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        raise InputError(f"There is no checkpoint folder {folder}; name {kind}.") from None
    except NotADirectoryError:
        raise InputError(f"{folder} is no folder; name {kind}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return Path(folder)


def is_file(path: Path) -> bool:
    """Whether there is a regular file, also behind links. Raises InputError where that cannot be told."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def kind_of_file(mode: int) -> str:
    """What something that is no regular file is called."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def read_text(path: str | Path, what: str = "", most: int = MOST_BYTES) -> str:
    """A UTF-8 file, without a byte-order mark. Raises InputError as `read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, what, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path}".lstrip() + f" is not UTF-8: {error}.") from None


def parse_json(text: str | bytes, where: str):
    """A JSON value of trusted size. Raises InputError beginning with `where` for what is no JSON, for numbers
    beyond 64 bits, nesting beyond Python's depth, and half of a surrogate pair (no file and no terminal could
    hold that)."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        long = (
            re.search(r"\d{19}", text) is not None
        )  # Python reads digits by a slower way only where it must
        value = json.loads(text, parse_int=bounded_int) if long else json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half of a surrogate pair, which is no text.") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from None
    return value


NO_LIMIT = str(int(1e30))  # model_max_length in most published tokenizer_config.json


def bounded_int(digits: str) -> int:
    """A whole number of JSON. Raises ValueError beyond 64 bits."""
    if digits == NO_LIMIT:
        return 2**63 - 1
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def parse_object(text: str | bytes, where: str) -> dict:
    """A JSON object. Raises InputError beginning with `where`."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise InputError(f"{where} is a JSON {type(value).__name__}, not an object.")
    return value


def read_json(path: str | Path, what: str = "") -> dict:
    """The JSON object in a file. Raises InputError naming the file when it is missing or holds anything
    else."""
    return parse_object(read_text(path, what, MOST_JSON), f"{what} {path}".lstrip())


def is_number(value, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number from low to high, and no bool."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def read_json_lines(path: str | Path, what: str = "") -> Iterator[tuple[str, dict]]:
    """(where, object) of each line of a file that is not empty. Raises InputError naming file and line."""
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_object(line, where)


# Out


def check_writable(path: Path, flag: str = "") -> Path:
    """The real path of a file that can be written; raises InputError for one that cannot, before any work is
    done for it.

    What exists must be a regular file with write permission, in a folder in which files can be made. A link
    is followed.
    """
    what = f"{flag} {path}".lstrip()
    try:
        real = Path(os.path.realpath(path))
        folder, status = real.parent, None
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
        if not folder.is_dir():
            raise InputError(f"{what} cannot be written: there is no folder {folder}.")
        if status is not None and not stat.S_ISREG(status.st_mode):
            kind = kind_of_file(status.st_mode)
            raise InputError(f"{what} cannot be written: it is {kind}; name a regular file, or a new one.")
        if status is not None and not (os.access(real, os.W_OK) and status.st_mode & 0o222):
            raise InputError(f"{what} cannot be written: it is read-only.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{what} cannot be written: nothing may be made in the folder {folder}.")
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(beside(real)).st_mode  # too long a name fails here
            if not stat.S_ISREG(mode):
                raise InputError(
                    f"{what} cannot be written: {beside(real)}, where that is done first, is no regular file."
                )
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    return real


def check_new_folder(out: Path, flag: str, beside: Path) -> None:
    """Raises InputError for a folder that cannot be made, or is there, before any work is done for it.
    beside: the folder that it is written to first, which may be there."""
    try:
        if os.path.lexists(out):
            kind = "a link to nowhere" if not os.path.exists(out) else kind_of_file(os.stat(out).st_mode)
            kind = "a file" if kind == "no regular file" else kind
            raise InputError(f"{flag} {out} exists already and is {kind}; name a new folder.")
        if os.path.lexists(beside) and (os.path.islink(beside) or not os.path.isdir(beside)):
            raise InputError(
                f"{flag} {out}: {beside}, where it is written to first, is no folder; remove it."
            )
        above = next(path for path in Path(os.path.abspath(out)).parents if os.path.lexists(path))
        if not above.is_dir():
            raise InputError(f"{flag} {out} cannot be made: {above} is no folder.")
        if not os.access(beside if beside.exists() else above, os.W_OK | os.X_OK):
            raise InputError(f"{flag} {out} cannot be made: nothing may be made in the folder {above}.")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{flag} {out} cannot be made: {getattr(error, 'strerror', None) or error}."
        ) from None


def check_not_input(out: Path, inputs: list[Path], flag: str = "--out") -> None:
    """Raises InputError where writing `out` would destroy one of the files that are read for it."""
    for path in inputs:
        if path.exists() and out.exists() and os.path.samefile(path, out):
            raise InputError(f"{flag} {out} is one of the inputs, which would be lost; name another file.")


def check_folder(path: Path, flag: str = "") -> None:
    """Raises InputError for a folder in which no files can be made; one that is missing is made later, with
    those above it."""
    what, here = f"{flag} {path}".lstrip(), Path(os.path.abspath(path))
    while True:
        try:
            status = os.stat(here)
            break
        except FileNotFoundError:
            if here.is_symlink():
                raise InputError(f"{what} cannot be written: {here} is a link to nothing.") from None
            here = here.parent
        except (OSError, ValueError) as error:
            raise InputError(
                f"{what} cannot be written: {getattr(error, 'strerror', None) or error}."
            ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(f"{what} cannot be written: {here} is no folder.")
    if not os.access(here, os.W_OK | os.X_OK):
        raise InputError(f"{what} cannot be written: nothing may be made in the folder {here}.")


def beside(path: Path) -> Path:
    """Where a file's new content is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


def lock(file, path: Path) -> None:
    """Keeps other processes off an open file for as long as it stays open. Raises InputError where one of
    them has it."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a file object or a descriptor, of a folder, too
    except BlockingIOError:
        raise InputError(
            f"{path} is being written by another process; wait for it, or name another file."
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path to write to in the place of `path`, and renames that at the end: a reader never sees
    half a file.

    The file keeps its permissions, a new one has those of the umask; links are followed. Raises InputError,
    and leaves what was there, where it is no regular file, in use by another process, or the disk is full.
    """
    with contextlib.ExitStack() as held:
        ours, mode = None, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            real = check_writable(path)
            fresh = beside(real)
            if real.exists():
                old = held.enter_context(open(real, "rb"))
                lock(old, path)
                mode = stat.S_IMODE(os.fstat(old.fileno()).st_mode)
            file = held.enter_context(claimed(fresh, path))
            ours = fresh
            mode = mode or stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield fresh
            os.chmod(fresh, mode)
            os.replace(fresh, real)
        except OSError as error:
            if ours is not None:
                ours.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written: {error.strerror or error}.") from None


@contextlib.contextmanager
def claimed(fresh: Path, path: Path):
    """An empty file at `fresh` that no other process writes; one that a killed process left is taken over."""
    while True:
        file = open(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "r+b")  # noqa: SIM115
        with file:
            lock(file, path)
            here = os.stat(fresh) if fresh.exists() else None
            if (
                here and here.st_ino == os.fstat(file.fileno()).st_ino
            ):  # else another process renamed it between our calls
                file.truncate(0)
                yield file
                return


def write_file(path: Path, content: bytes) -> None:
    """Writes beside, then renames. Raises InputError as `replacing`."""
    with replacing(Path(path)) as fresh:
        fresh.write_bytes(content)


class Lines:
    """A file of JSON lines that one process at a time extends. What a killed run left of a line is cut off.

    Opens and locks at once, before anything is read or cut; raises InputError where another process has it.
    `content` is what it held, whole lines only.
    """

    def __init__(self, path: Path):
        self.path = path
        made = not check_writable(path).exists()
        try:
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115 open and locked until `close` or the process's end
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from None
        self.close = weakref.finalize(
            self, let_go, self.file, Path(path), made
        )  # at the latest when the process ends
        lock(self.file, path)
        self.file.seek(0)
        content = self.file.read()
        self.content, self.rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]

    def objects(self) -> list[dict]:
        """The lines that were there. Raises InputError naming one that is no JSON object."""
        lines = enumerate(self.content.split(b"\n"), 1)
        return [parse_object(line, f"{self.path}, line {number}") for number, line in lines if line]

    def add(self, line: dict) -> None:
        """Appends one line, whole and at once; first cuts off what a killed run left of one."""
        content = (json.dumps(line) + "\n").encode()
        try:
            if self.rest:
                self.file.truncate(len(self.content))
                self.rest = b""
            while content:
                content = content[self.file.write(content) :]
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; what it holds is kept, and "
                f"the same command "
                "goes on from there."
            ) from None


def let_go(file, path: Path, made: bool) -> None:
    """Closes a file of lines; one that was made for it and that nothing was written to is removed."""
    with contextlib.suppress(OSError):
        if made and not os.fstat(file.fileno()).st_size:
            path.unlink()
    file.close()


def digest(path: Path, kinds: tuple[str, ...] = (".json", ".jinja", ".model", ".safetensors")) -> str:
    """What tells a checkpoint from another without reading it whole: names, sizes and ends of its files;
    "none" of none."""
    found, files = hashlib.sha256(), [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in files if file.suffix in kinds and file.is_file()]
    for each in files:
        with each.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 65536))
            found.update(repr((each.relative_to(path).as_posix(), size, file.read())).encode())
    return found.hexdigest()[:16] if files else "none"
