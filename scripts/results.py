"""Results files of scripts/evaluate.py: a header, then one JSON line an answer. Resuming, sharing out, merging, exporting.

Each process of `torchrun` keeps its share of the questions in OUT.partRANKofSIZE; `merge` joins the parts. MT-Bench's and
Spec-Bench's answers are exported as FastChat's `model_answer` files, one a rule, which gen_judgment.py reads.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import InputError
from files import write_file


def parse_lines(path: Path, text: bytes) -> list[dict]:
    try:
        lines = [json.loads(line) for line in text.split(b"\n") if line]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no object")
    except ValueError as error:
        raise InputError(f"{path} is not a results file of this script ({error}); name another --out.") from None
    return lines


def read_results(path: Path, header: dict) -> list[dict]:
    """The answers of an earlier run with the same settings; InputError when the file is of other settings or foreign."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a killed run may leave half a line
    if not whole and not json.dumps(header).encode().startswith(text):
        raise InputError(f"{path} is not a results file of this script (no header); name another --out.")
    lines = parse_lines(path, whole)
    if lines and lines[0] != header:
        differ = [key for key in header | lines[0] if lines[0].get(key) != header.get(key)]
        raise InputError(f"{path} holds results of other settings ({', '.join(differ)}); name another --out or remove it.")
    if text != whole:
        os.truncate(path, len(whole))
    return lines[1:]


def by_key(path: Path, records: list[dict], known: dict | None = None) -> dict[tuple, dict]:
    """Records by (rule, index), beside those known. Raises InputError naming an answer that is there twice."""
    found = dict(known or {})
    for record in records:
        key = record.get("rule"), record.get("index")
        if key in found:
            raise InputError(f"{path} holds the answer of {key[0]} to question {key[1]} a second time; remove one of the two.")
        found[key] = record
    return found


def check_same_questions(path: Path, records: dict[tuple, dict], questions: list) -> None:
    """Raises InputError when an answer in the file is to another question than the one of its index now."""
    asked = {question.index: question.asked or question.prompt for question in questions}
    for (_, index), record in records.items():
        if index in asked and record.get("question") != asked[index]:
            raise InputError(f"{path} holds an answer to another question {index} than is asked now; name another --out.")


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says, (0, 1) without it."""
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK {rank} and WORLD_SIZE {size} in the environment are not those of a torchrun process.")
    return int(rank), int(size)


def part(out: Path, rank: int, size: int) -> Path:
    """Where process `rank` of `size` keeps its share."""
    return out.with_name(f"{out.name}.part{rank}of{size}")


def check_parts(out: Path, size: int) -> None:
    """Raises InputError naming a part that another number of processes left: its answers would be made again."""
    for path in sorted(out.parent.glob(f"{out.name}.part*of*")):
        found = re.fullmatch(r"part\d+of(\d+)", path.name.removeprefix(f"{out.name}."))
        if found and int(found[1]) != size:
            raise InputError(f"{path} is of a run with {found[1]} processes, and this one has {size}; go on with {found[1]}, "
                             "or remove it.")  # fmt: skip


def merge(out: Path, size: int, labels: list[str], questions: list) -> list[dict]:
    """Writes OUT from the parts of `size` processes, in the order of the questions, and returns the records.

    Raises InputError naming a part that is missing or unlike the first, an answer that is there twice, and one that is missing.
    """
    found, header = {}, None
    for rank in range(size):
        path = part(out, rank, size)
        if not path.is_file():
            raise InputError(f"There is no {path}; run all {size} processes to their end before --merge {size}.")
        first, *records = parse_lines(path, path.read_bytes().rpartition(b"\n")[0]) or [{}]
        if "target" not in first:
            raise InputError(f"{path} is not a part of a run, or its run had not begun.")
        header = header or first
        if first != header:
            differ = [key for key in header | first if first.get(key) != header.get(key)]
            raise InputError(f"{path} is of other settings than {part(out, 0, size)} ({', '.join(differ)}).")
        found = by_key(path, records, found)
    check_same_questions(out, found, questions)
    keys = [(label, question.index) for question in questions for label in labels]
    if missing := [key for key in keys if key not in found]:
        raise InputError(
            f"The parts of {out} lack {len(missing)} answers, first that of {missing[0][0]} to question {missing[0][1]}; "
            "run all processes to their end, and give --verify, --threshold and --limit as for them."
        )
    if extra := [key for key in found if key not in set(keys)]:
        raise InputError(
            f"The parts of {out} hold {len(extra)} answers more, first that of {extra[0][0]} to question {extra[0][1]}; "
            "give --verify, --threshold and --limit as for them."
        )
    lines = [header, *(found[key] for key in keys)]
    write_file(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines[1:]


def model_answers(records: list[dict], content: dict) -> dict[str, str]:
    """FastChat's answer files: {file name: text}, one a rule, sorted by question_id. content: index -> line of question.jsonl.

    Spec-Bench's counts are in each choice: new_tokens, wall_time (s, prefill included), decoding_steps and accept_lengths
    (tokens that each round put out).
    """
    files: dict[str, list] = {}
    for record in records:
        line, model = content[record.get("item", record["index"])], re.sub(r"[^\w.@=-]", "_", record["rule"])
        turns = record["turns"]
        choice = {"index": 0, "turns": [turn["text"].strip() for turn in turns],
                  "decoding_steps": [turn["rounds"] for turn in turns], "new_tokens": [turn["new_tokens"] for turn in turns],
                  "wall_time": [turn["seconds"] for turn in turns],
                  "accept_lengths": [n for turn in turns for n in turn["accept_lengths"]]}  # fmt: skip
        known = f"{model} {line['question_id']} {choice['turns']}"
        answer_id = hashlib.sha256(known.encode()).hexdigest()[:22]
        files.setdefault(model, []).append({
            "question_id": line["question_id"], "category": line.get("category"), "answer_id": answer_id, "model_id": model,
            "choices": [choice], "tstamp": record["time"],
        })  # fmt: skip
    return {
        f"{model}.jsonl": "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["question_id"]))
        for model, lines in files.items()
    }


def write_model_answers(folder: Path, records: list[dict], questions: list) -> None:
    """Writes one answer file a rule into `folder`, each by rename."""
    content = {question.index: question.content for question in questions}
    for name, text in model_answers(records, content).items():
        write_file(folder / name, text.encode())
