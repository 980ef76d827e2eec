"""MT-Bench's and Spec-Bench's answers as FastChat's `model_answer` files, one a rule, for gen_judgment.py."""

import hashlib
import json
import re
from pathlib import Path

from cli import InputError
from files import check_folder, check_not_input, check_writable, write_file


def model_name(rule: str) -> str:
    """A rule's label as the name of a file and of a model."""
    return re.sub(r"[^\w.@=-]", "_", rule)


def check_model_answers(folder: Path, labels: list[str], kept: list[Path]) -> None:
    """Raises InputError where the answer files of these rules could not be written, or would replace one of
    `kept`."""
    check_folder(folder, "--model_answers")
    for label in labels:
        path = folder / f"{model_name(label)}.jsonl"
        if folder.is_dir():
            check_writable(path, "--model_answers")
        check_not_input(path, kept, "--model_answers")


def model_answers(records: list[dict], content: dict) -> dict[str, str]:
    """FastChat's answer files: {file name: text}, one a rule, sorted by question_id. content: index -> line
    of question.jsonl.

    Spec-Bench's counts are in each choice: new_tokens, wall_time (s, prefill included), decoding_steps and
    accept_lengths (tokens of each round).
    """
    files: dict[str, list] = {}
    for record in records:
        line, model = content[record.get("item", record["index"])], model_name(record["rule"])
        turns = record["turns"]
        choice = {
            "index": 0,
            "turns": [turn["text"].strip() for turn in turns],
            "decoding_steps": [turn["rounds"] for turn in turns],
            "new_tokens": [turn["new_tokens"] for turn in turns],
            "wall_time": [turn["seconds"] for turn in turns],
            "accept_lengths": [n for turn in turns for n in turn["accept_lengths"]],
        }
        known = f"{model} {line['question_id']} {choice['turns']}"
        answer_id = hashlib.sha256(known.encode()).hexdigest()[:22]
        files.setdefault(model, []).append(
            {
                "question_id": line["question_id"],
                "category": line.get("category"),
                "answer_id": answer_id,
                "model_id": model,
                "choices": [choice],
                "tstamp": record["time"],
            }
        )

    return {
        f"{model}.jsonl": "".join(
            json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["question_id"])
        )
        for model, lines in files.items()
    }


def write_model_answers(folder: Path, records: list[dict], questions: list) -> None:
    """Writes one answer file a rule into `folder`, each by rename. Raises InputError for a record without its
    turns."""
    for record in records:
        if "turns" not in record or "time" not in record:
            raise InputError(
                f"The answer of {record['rule']} to question {record['index']} lacks 'turns' or 'time'."
            )
    content = {question.index: question.content for question in questions}
    for name, text in model_answers(records, content).items():
        write_file(folder / name, text.encode())
