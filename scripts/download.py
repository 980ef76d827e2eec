"""Fetches the public data files that scripts/evaluate.py and the tests read, and verifies every byte.

    python scripts/download.py gsm8k mmlu          # or a file, gsm8k/test.jsonl; or all
    python scripts/download.py --list

scripts/download.tsv holds for each file its repository, commit, licence, size and sha256. A file goes to
NAME.part first, which a later run goes on with, and gets its name once its hash is right; one that is there
already is only verified. Most come from the benchmarks' own repositories. Three do not, and differ in form
from what the authors first published: arc (of LLM-Adapters: question and choices in one text, answers as
answer1), mmlu (a header row, answers 0 to 3; the authors' own files, without header and with letters, are
read as well) and math500 (each problem begins with "Return your final response within \\boxed{}.", which is
taken away when it is read).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import csv
import hashlib
import http.client
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from files import check_folder, check_writable, lock, read_bytes
from scripts.lib.flags import add_flags

TABLE = Path(__file__).with_suffix(".tsv")
SOURCE = "https://raw.githubusercontent.com"
TIMEOUT_S = 30
BLOCK = 1 << 18


class File(NamedTuple):
    """A row of download.tsv. file: its path below --out."""

    file: str
    repository: str
    path: str
    commit: str
    licence: str
    bytes: str
    sha256: str

    def url(self, source: str) -> str:
        return f"{source}/{self.repository}/{self.commit}/{urllib.parse.quote(self.path)}"


def read_table() -> list[File]:
    with open(TABLE, encoding="utf-8", newline="") as file:
        return [File(**row) for row in csv.DictReader(file, delimiter="\t")]


def is_below(file: File, name: str) -> bool:
    return file.file == name or file.file.startswith(name.rstrip("/") + "/")


def chosen(files: list[File], names: list[str]) -> list[File]:
    """The files whose path is a name or lies below it; InputError for a name that fits none."""
    for name in names:
        if name != "all" and not any(is_below(file, name) for file in files):
            known = ", ".join(dict.fromkeys(file.file.split("/")[0] for file in files))
            raise InputError(f"There is no file {name}; known are all, {known}, and what --list names.")
    return [file for file in files if any(name == "all" or is_below(file, name) for name in names)]


def digest_of(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def receive(file: File, out, url: str) -> None:
    """Appends what is missing of a file to `out`. Raises InputError when not all came."""
    size, have = int(file.bytes), out.seek(0, os.SEEK_END)
    if have >= size:
        return
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            have = have if answer.status == 206 else 0
            out.truncate(have)  # a server may not know of ranges, and begin anew
            while have <= size and (block := answer.read(BLOCK)):
                have += out.write(block)
            out.flush()
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} cannot be had: the server answers {error.code} {error.reason}.") from None
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ValueError,
    ) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{url} cannot be reached: {getattr(reason, 'strerror', None) or reason}; run it again to go on."
        ) from None

    if have < size:
        raise InputError(f"{url} broke off after {have} of {size} bytes; run it again to go on.")


def fetch(file: File, folder: Path, source: str) -> None:
    """Downloads one file, or verifies the one that is there. Raises InputError; what has come stays in
    NAME.part."""
    path = folder / file.file
    if os.path.lexists(path):
        if digest_of(path) != file.sha256:
            raise InputError(
                f"{path} is there, but is not the file in download.tsv (its sha256 differs); move it away."
            )
        return

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(check_writable(part), "a+b") as out:
            lock(out, part)
            try:
                receive(file, out, file.url(source))
            finally:
                if not out.tell():
                    part.unlink()  # nothing came
            if digest_of(part) != file.sha256:
                part.unlink()
                raise InputError(
                    f"{file.url(source)} gave another file than the one in "
                    "download.tsv (its sha256 differs); nothing is kept."
                )
            os.replace(part, path)
    except OSError as error:
        raise InputError(f"{part} cannot be written: {error.strerror or error}.") from None


def run(args: argparse.Namespace) -> None:
    files = read_table()
    if args.list:
        for file in files:
            print(f"{file.file}  {int(file.bytes):,} bytes  {file.licence}  {file.url(args.source)}")
        return
    if not args.names:
        raise InputError(
            "Name what to fetch, as in: python scripts/download.py gsm8k mmlu; --list shows all."
        )

    files = chosen(files, args.names)
    for file in files:
        check_folder((args.out / file.file).parent, "--out")
    for repository, licence in dict.fromkeys((file.repository, file.licence) for file in files):
        print(f"from {repository}: {licence}", file=sys.stderr)
    progress = Progress("files", len(files))
    for file in files:
        fetch(file, args.out, args.source)
        progress.step()

    print(f"{len(files)} files, {sum(int(file.bytes) for file in files):,} bytes, verified in {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help="folders or files of --list, or all")
    out = {
        "default": Path(os.environ.get("JUDGE_FAST_DATA", "data")),
        "help": "where they go (default: data)",
    }
    add_flags(parser, out=out)
    add("--list", action="store_true", help="print every file, its size, licence and address")
    add("--source", default=SOURCE, help="a mirror of raw.githubusercontent.com")
    args = parser.parse_args(argv)
    run_script("download.py", lambda: run(args))


if __name__ == "__main__":
    main()
