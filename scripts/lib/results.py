"""Results files of scripts/evaluate.py: a header, then one JSON line an answer. Resuming, sharing out,
merging.

Each process of `torchrun` keeps its share of the questions in OUT.partRANKofSIZE; `merge` joins the parts.
"""

import argparse
import glob
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cli import InputError, shortened, whole
from files import Lines, parse_object, read_bytes, write_file
from judge import RULES
from scripts.lib.fields import DECODED, is_count, is_counts, is_figure, is_seconds, is_text, is_verdict, maybe
from scripts.lib.flags import MOST_PROCESSES

PEERS = {"hf": "transformers generate", "hf-assisted": "transformers generate with assistant_model"}


def is_index(value) -> bool:
    """A question's number, or "12.3": sample 3 of question 12."""
    return is_count(value) or (is_text(value) and re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", value) is not None)


def is_rule(value) -> bool:
    return is_text(value) and re.split("[=@]", value)[0] in ("plain", *RULES, *PEERS)


TURN = {
    "text": is_text,
    "new_tokens": is_count,
    "rounds": is_count,
    "seconds": is_seconds,
    "accept_lengths": is_counts,
}


def is_turns(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and all(kind(turn.get(name)) for name, kind in TURN.items()) for turn in value
    )


ANSWER = {  # the fields that every answer has, and that are relied on
    "rule": is_rule,
    "index": is_index,
    "family": is_text,
    "question": is_text,
    "text": is_text,
    "right": is_verdict,
    "answer_right": is_verdict,
    **DECODED,
    "seconds_prefill": is_seconds,
    "seconds_decode": is_seconds,
}
MAYBE = {  # those that some have
    "item": is_count,
    "threshold": maybe(is_figure),
    "turns": is_turns,
    "time": is_seconds,
    "mean_score": maybe(is_figure),
    "failed": is_text,
}
CONSISTENT: dict[str, Callable[[dict], bool]] = {
    "answer_right": lambda r: (r["right"] is None) == (r["answer_right"] is None),
    "accepted": lambda r: r["accepted_by_rule"] <= r["accepted"] <= r["drafted"],
    "rounds": lambda r: r["rounds"] > 0 or not r["drafted"],
    "tokens": lambda r: "failed" in r or len(r["tokens"]) > 0,
    "index": lambda r: r.get("item", r["index"]) in (r["index"], int(str(r["index"]).partition(".")[0])),
}


def check_answer(record: dict, where: str) -> dict:
    """The record of an answer. Raises InputError beginning with `where`, and naming the field, for what no
    run has written."""
    missing = next((name for name in ANSWER if name not in record), None)
    if missing:
        raise InputError(
            f"{where} has no field {missing!r}, so it is no whole "
            "answer; remove the line, or name another --out."
        )

    fields = ANSWER | {name: kind for name, kind in MAYBE.items() if name in record}
    wrong = next((name for name, kind in fields.items() if not kind(record[name])), None)
    if wrong is None:
        wrong = next((name for name, holds in CONSISTENT.items() if not holds(record)), None)
    if wrong:
        found = shortened(json.dumps(record[wrong]))
        raise InputError(
            f"{where}: field {wrong!r} cannot be {found} in an "
            "answer; remove the line, or name another --out."
        )

    return record


MADE = ("command", "machine", "commit")  # of a header: how a run was made, which another run may do otherwise


def machine() -> str:
    """Processor or GPU, cores, torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores of {name}, torch {torch.__version__}"


def commit() -> str:
    """The commit that ran, with a + when the tree had changes."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/*.py", ":/checkpoints")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def how_made() -> dict:
    """What a header says beside the settings."""
    command = shlex.join(
        os.fsencode(word).decode(errors="replace") for word in (Path(sys.argv[0]).name, *sys.argv[1:])
    )
    return dict(zip(MADE, (command, machine(), commit())))


def unlike(header: dict, other: dict) -> list[str]:
    """The settings in which two headers differ."""
    return [key for key in header | other if key not in MADE and header.get(key) != other.get(key)]


def check_header(path: Path, lines: list[dict], rest: bytes, header: dict) -> None:
    """Raises InputError where a file's lines, and the half one after them, are not of a run with this
    header."""
    begin = json.dumps(header).encode().removesuffix(b"}")  # how a run was made follows
    if not lines and not (begin.startswith(rest) or rest.startswith(begin)):
        raise InputError(f"{path} is not a results file of this script (no header); name another --out.")
    if lines and (differ := unlike(header, lines[0])):
        raise InputError(
            f"{path} holds results of other settings ({', '.join(differ)}); name another --out or remove it."
        )


def parse_lines(path: Path, text: bytes) -> list[tuple[str, dict]]:
    """(where, object) of each whole line. Raises InputError naming one that is no JSON object."""
    lines = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line]
    try:
        return [(f"{path}, line {number}", parse_object(line, f"line {number}")) for number, line in lines]
    except InputError as error:
        raise InputError(
            f"{path} is not a results file of this script ({str(error)[:-1]}); name another --out."
        ) from None


def resume(lines: Lines, header: dict, check: Callable[[dict, str], dict] = check_answer) -> list[dict]:
    """The answers of an earlier run with the same settings, in a file that this process has locked; nothing
    is written.

    check: raises InputError for a record that no run could have written. Raises InputError, too, when the
    file is of other settings or foreign.
    """
    found = parse_lines(lines.path, lines.content)
    check_header(lines.path, [line for _, line in found[:1]], lines.rest, header)
    return [check(record, where) for where, record in found[1:]]


def by_key(path: Path, records: list[dict], known: dict | None = None) -> dict[tuple, dict]:
    """Records by (rule, index), beside those known. Raises InputError naming an answer that is there
    twice."""
    found = dict(known or {})
    for record in records:
        key = record.get("rule"), record.get("index")
        if key in found:
            raise InputError(
                f"{path} holds the answer of {key[0]} to question "
                f"{key[1]} a second time; remove one of the two."
            )
        found[key] = record
    return found


def check_same_questions(path: Path, records: dict[tuple, dict], questions: list) -> None:
    """Raises InputError when an answer in the file is to another question than the one of its index now."""
    asked = {question.index: question.asked or question.prompt for question in questions}
    for (_, index), record in records.items():
        if index in asked and record.get("question") != asked[index]:
            raise InputError(
                f"{path} holds an answer to another question {index} than is asked now; name another --out."
            )


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says, (0, 1) without it."""
    given = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    try:
        rank, size = (whole(low, MOST_PROCESSES)(text) for low, text in zip((0, 1), given))
    except argparse.ArgumentTypeError:
        rank, size = 0, 0
    if rank >= size:
        rank, size = (shortened(text).strip("'") for text in given)
        raise InputError(
            f"RANK {rank} and WORLD_SIZE {size} in the environment are not those of a torchrun process."
        )
    return rank, size


def part(out: Path, rank: int, size: int) -> Path:
    """Where process `rank` of `size` keeps its share."""
    return out.with_name(f"{out.name}.part{rank}of{size}")


def check_parts(out: Path, size: int) -> None:
    """Raises InputError naming a part that another number of processes left: its answers would be made
    again."""
    for path in sorted(out.parent.glob(f"{glob.escape(out.name)}.part*of*")):
        found = re.fullmatch(r"part[0-9]+of([0-9]+)", path.name.removeprefix(f"{out.name}."))
        if found and found[1] != str(size):
            raise InputError(
                f"{path} is of a run with {found[1]} processes, and this "
                f"one has {size}; go on with {found[1]}, or remove it."
            )


def read_part(out: Path, rank: int, size: int, what: str) -> tuple[dict, list[tuple[str, dict]]]:
    """The header of a part, and (where, record) of its lines. Raises InputError where it is missing, or no
    part of `what`."""
    path = part(out, rank, size)
    if not path.is_file():
        raise InputError(f"There is no {path}; run all {size} processes to their end before --merge {size}.")
    (_, header), *records = parse_lines(path, read_bytes(path).rpartition(b"\n")[0]) or [("", {})]
    if "target" not in header:
        raise InputError(f"{path} is not a part of {what}, or its run had not begun.")
    return header, records


def merge(out: Path, size: int, labels: list[str], questions: list) -> list[dict]:
    """Writes OUT from the parts of `size` processes, in the order of the questions, and returns the records.

    Raises InputError naming a part that is missing or unlike the first, an answer that is there twice, and
    one that is missing.
    """
    found, header = {}, None
    for rank in range(size):
        path, (first, records) = part(out, rank, size), read_part(out, rank, size, "a run")
        header = header or first
        if differ := unlike(header, first):
            raise InputError(f"{path} is of other settings than {part(out, 0, size)} ({', '.join(differ)}).")
        found = by_key(path, [check_answer(record, where) for where, record in records], found)

    check_same_questions(out, found, questions)
    keys = [(label, question.index) for question in questions for label in labels]
    if missing := [key for key in keys if key not in found]:
        raise InputError(
            f"The parts of {out} lack {len(missing)} answers, first that of "
            f"{missing[0][0]} to question {missing[0][1]}; run all processes to "
            "their end, and give --verify, --threshold and --limit as for them."
        )
    if extra := [key for key in found if key not in set(keys)]:
        raise InputError(
            f"The parts of {out} hold {len(extra)} answers more, first that of {extra[0][0]} "
            f"to question {extra[0][1]}; give --verify, --threshold and --limit as for them."
        )

    lines = [header, *(found[key] for key in keys)]
    write_file(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines[1:]
