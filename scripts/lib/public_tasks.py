"""The public benchmarks: how their files are read, as published, and in what words their questions are put.

    questions = read_task("gsm8k", Path("gsm8k/test.jsonl"), chat=False, shots=5)

| task | file | a base model reads (`shots` before it) | an instruct model is asked (--chat) | checker |
|---|---|---|---|---|
| gsm8k | test.jsonl | Question: ... Answer:, harness gsm8k (5) | harness gsm8k_cot_llama (0) | number |
| math500 | test.jsonl | Problem: ... Solution:, minerva_math (0) | step by step, \\boxed | math |
| arc | ARC-Challenge_test.json | as mmlu, with letters (25) | harness arc_challenge_chat (0) | choice |
| mmlu | a folder of CSV files | harness mmlu, header by subject (5) | the words of arc (0) | choice |
| humaneval | HumanEval.jsonl.gz | the function to complete (0) | harness humaneval_instruct | code |
| mt_bench | question.jsonl | USER: ... ASSISTANT:, both turns | both turns, as FastChat | none |
| spec_bench | question.jsonl | as mt_bench | all turns, as Spec-Bench | none |

The harness is EleutherAI's lm-evaluation-harness. All answers are generated: where the harness compares the
likelihood of the letters, ours must be said. The examples are the first ones of the training file beside the
data (train.jsonl, ..._train.json, mmlu's dev folder; math500 has none) or of `shots_data`. A base model's
answer ends where it begins another question (`stops`). MT-Bench is asked at one temperature for all
categories.
"""

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from cli import InputError
from files import parse_json, parse_object, read_bytes
from scripts.lib.sandbox import STOPS, check_allowed
from scripts.lib.scoring import Question, final_number

LETTERS = "ABCDEFGHIJ"
# characters of a file and of a line: a gzipped one can hold a thousand times its size
# characters of a file and of a line: a gzipped one can hold a thousand times its size
MOST_TEXT, MOST_LINE = 1 << 30, 1 << 26


class Item(NamedTuple):
    """A line of a file. answer: what the checker compares with; shown: the answer as an example gives it."""

    question: str
    answer: str
    shown: str
    choices: tuple[str, ...] = ()
    group: str = ""
    more_turns: tuple[str, ...] = ()
    content: object = None


class Task(NamedTuple):
    """How a benchmark is read and asked."""

    read: Callable[[Path], list[Item]]
    base: Callable[[Item], str]  # in the words for a base model, an example's answer follows it
    chat: Callable[[Item], str]
    checker: str
    stops: tuple[str, ...] = ()  # of a base model's answer
    shots: int = 0  # for a base model
    max_new_tokens: tuple[int, int] = (512, 1024)  # base, chat
    header: Callable[[Item], str] = lambda item: ""  # before the examples
    training: tuple[str, str] = ("test", "train")  # in the path of the data -> in that of its training part


def read_lines(path: Path, flag: str = "--data") -> Iterator[str]:
    """The lines of a text file, gzipped if its name ends in .gz. Raises InputError for what is no such file,
    or too large."""
    content, size = io.BytesIO(read_bytes(path, flag)), 0
    packed = Path(path).suffix == ".gz"
    try:
        text = io.TextIOWrapper(gzip.GzipFile(fileobj=content) if packed else content, encoding="utf-8-sig")
        while line := text.readline(MOST_LINE):
            size += len(line)
            if len(line) == MOST_LINE or size > MOST_TEXT:
                raise InputError(
                    f"{flag} {path} holds more than {MOST_TEXT:,} characters, or {MOST_LINE:,} in one line."
                )
            yield line
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} {path} cannot be read: {reason}.") from None


def json_lines(path: Path, flag: str = "--data") -> Iterator[tuple[str, dict]]:
    """(where, object) of each line that is not empty. Raises InputError naming the line."""
    for number, line in enumerate(read_lines(path, flag), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_object(line, where)


def text_of(item: dict, name: str, where: str) -> str:
    """A field that must be text and not empty."""
    value = item.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}: field {name!r} must be text that is not empty; docs/evaluation.md says which file "
            "it is from."
        )
    return value


def read_gsm8k(path: Path) -> list[Item]:
    items = []
    for where, line in json_lines(path):
        question, answer = text_of(line, "question", where), text_of(line, "answer", where)
        if "####" not in answer or final_number(answer) is None:
            raise InputError(f"{where}: the answer must end in #### and a number, as GSM8K's do.")
        items.append(Item(question, answer, answer, content=line))
    return items


def gsm8k_chat(item: Item) -> str:
    return (
        "Given the following problem, reason and give a final answer to the problem.\n"
        f"Problem: {item.question}\n"
        'Your response should end with "The final answer is [answer]" where [answer] '
        "is the response to the problem."
    )


def read_math(path: Path) -> list[Item]:
    items = []
    for where, line in json_lines(path):
        problem = text_of(line, "problem", where).removeprefix(
            "Return your final response within \\boxed{}. "
        )
        answer, solution = text_of(line, "answer", where), str(line.get("solution", ""))
        shown = f"{solution}\nFinal Answer: The final answer is ${answer}$. I hope it is correct."
        items.append(Item(problem, answer, shown, group=str(line.get("subject", "")), content=line))
    return items


def read_humaneval(path: Path) -> list[Item]:
    check_allowed()
    items = []
    for where, line in json_lines(path):
        for name in ("prompt", "test"):
            text_of(line, name, where)
        if not text_of(line, "entry_point", where).isidentifier():
            raise InputError(
                f"{where}: field 'entry_point' is {line['entry_point']!r}, which is no function's name."
            )
        solution = str(line.get("canonical_solution", ""))
        items.append(Item(line["prompt"], solution, solution, content=line))

    return items


def read_arc(path: Path) -> list[Item]:
    """ARC as LLM-Adapters publishes it: one JSON array; question and choices are in one text."""
    text = "".join(read_lines(path))
    lines = (
        parse_json(text, f"{path} is not ARC as LLM-Adapters publishes it, one JSON array of questions:")
        if text
        else None
    )
    if not isinstance(lines, list):
        raise InputError(f"{path} is not ARC as LLM-Adapters publishes it: one JSON array of questions.")
    items = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, question {number}"
        text = text_of(line if isinstance(line, dict) else {}, "instruction", where)
        found = re.fullmatch(
            r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: \S+",
            text,
            re.DOTALL,
        )
        choices = tuple(re.split(r" Answer\d: ", found[2])) if found else ()
        answer = re.fullmatch(r"answer([1-9])", str(line.get("answer")))
        if answer is None or not int(answer[1]) <= len(choices) <= len(LETTERS):
            raise InputError(f"{where} must have an instruction with Answer1: ..., and an answer as answer1.")
        letter = LETTERS[int(answer[1]) - 1]
        items.append(Item(found[1].strip(), letter, letter, choices, content=line))

    return items


def read_rows(file: Path) -> list[list[str]]:
    """The rows of a CSV file. Raises InputError naming the line where it is none."""
    reader = csv.reader(read_lines(file))
    try:
        return list(reader)
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num} is no CSV: {error}.") from None


def read_mmlu(path: Path) -> list[Item]:
    """A folder of ..._test.csv (or its parent), or one such file; with a header and numbers, or without and
    with letters."""
    folder = path / "test" if (path / "test").is_dir() else path
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else [path]
    if not files:
        raise InputError(f"--data {path} holds no CSV files; name MMLU's folder, or one of its files.")
    items = []
    for file in files:
        subject = re.sub(r"_(test|dev|val)$", "", file.stem)
        rows = read_rows(file)
        numbered = bool(rows) and rows[0][-1:] == ["answer"]
        for number, row in enumerate(rows[numbered:], 1 + numbered):
            letter = (
                LETTERS[int(row[5])]
                if len(row) == 6 and row[5] in ("0", "1", "2", "3")
                else (row or [""])[-1].strip()
            )
            if len(row) != 6 or letter not in list("ABCD"):
                raise InputError(
                    f"{file}, row {number} must be a question, four choices, and 0 to 3 or A to D."
                )
            items.append(Item(row[0].strip(), letter, letter, tuple(row[1:5]), subject, content=row))

    return items


def lettered(item: Item) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices))


def choice_base(item: Item) -> str:
    return f"{item.question}\n{lettered(item)}\nAnswer:"


def choice_chat(item: Item) -> str:
    letters = LETTERS[: len(item.choices)]
    named = ", ".join(letters[:-1]) + f" {{}} {letters[-1]}"
    how_many = {3: "three", 4: "four", 5: "five"}.get(len(letters), str(len(letters)))
    return (
        f"Given the following question and {how_many} candidate answers ({named.format('and')}), choose the "
        f"best answer.\n"
        f"Question: {item.question}\n{lettered(item)}\n"
        f'Your response should end with "The best answer is [the_answer_letter]" where the '
        f"[the_answer_letter] is one of "
        f"{named.format('or')}."
    )


def subject_header(item: Item) -> str:
    subject = item.group.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def read_turns(path: Path) -> list[Item]:
    """FastChat's and Spec-Bench's question.jsonl."""
    items = []
    for where, line in json_lines(path):
        turns = line.get("turns")
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise InputError(
                f"{where}: field 'turns' must be a list of texts, as in FastChat's question.jsonl."
            )
        if type(line.get("question_id")) is not int:
            raise InputError(
                f"{where}: field 'question_id' must be a whole number, as in FastChat's question.jsonl."
            )
        items.append(Item(turns[0], "", "", (), str(line.get("category", "")), tuple(turns[1:]), line))

    return items


def user(item: Item) -> str:
    return f"USER: {item.question}\nASSISTANT:"


TURNS = Task(read_turns, user, lambda item: item.question, "none", ("\nUSER:",), max_new_tokens=(1024, 1024))
CHOICE = Task(
    read_arc, choice_base, choice_chat, "choice", ("\n",), 25, (16, 256), training=("_test", "_train")
)
TASKS = {
    "gsm8k": Task(
        read_gsm8k,
        lambda item: f"Question: {item.question}\nAnswer:",
        gsm8k_chat,
        "number",
        ("Question:",),
        5,
    ),
    "humaneval": Task(
        read_humaneval,
        lambda item: item.question,
        lambda item: (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\n"
            f"{item.question}\n"
            "```"
        ),
        "code",
        STOPS,
    ),
    "arc": CHOICE,
    "mmlu": CHOICE._replace(read=read_mmlu, shots=5, header=subject_header, training=("test", "dev")),
    "math500": Task(
        read_math,
        lambda item: f"Problem:\n{item.question}\n\nSolution:",
        lambda item: (
            f"{item.question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        ),
        "math",
        ("Problem:",),
        max_new_tokens=(1024, 2048),
    ),
    "mt_bench": TURNS,
    "spec_bench": TURNS,
}


def question_of(task: Task, chat: bool, index: int, item: Item, examples: list[Item]) -> Question:
    """An item in its task's words, after its examples."""
    words = task.chat if chat else task.base
    before = "" if chat else task.header(item)
    for example in examples:
        before += words(example) + ("\n\n" if chat else " ") + example.shown.strip() + "\n\n"
    return Question(
        index,
        before + words(item),
        item.answer,
        task.checker,
        item.group,
        item.content,
        asked=words(item),
        stops=() if chat else task.stops,
        more_turns=tuple(turn if chat else f"\nUSER: {turn}\nASSISTANT:" for turn in item.more_turns),
    )


def in_turn(numbered: list[tuple[int, Item]]) -> list[tuple[int, Item]]:
    """The first of each group, then the second of each, ...: what a limit leaves is then a sample of all."""
    groups: dict[str, list] = {}
    for pair in numbered:
        groups.setdefault(pair[1].group, []).append(pair)
    return [pair for row in zip_longest(*groups.values()) for pair in row if pair is not None]


def training_path(task: Task, path: Path) -> Path:
    """Where the examples for the data at `path` are: beside it, under the name of its training part."""
    old, new = task.training
    path = Path(os.path.abspath(path))
    if (path / old).is_dir() or not path.name:
        return path / new
    renamed = path.with_name(path.name.replace(old, new))
    folder = path.parent.with_name(new) if path.parent.name else path.parent / new
    return renamed if renamed.exists() else folder / renamed.name


def read_examples(task: Task, source: Path, shots: int, groups: set[str]) -> dict[str, list[Item]]:
    """For each group its first `shots` examples: its own where the header names it, else the first of all."""
    if not source.exists():
        raise InputError(
            f"--shots {shots} needs examples: there is no {source}; "
            "name a file with --shots_data, or --shots 0."
        )

    items, found = task.read(source), {}
    for group in groups:
        own = [item for item in items if not task.header(item) or item.group == group][:shots]
        if len(own) < shots:
            raise InputError(
                f"--shots {shots} is too many: {source} has {len(own)} examples{group and ' of ' + group}."
            )
        found[group] = own

    return found


def read_task(
    name: str,
    path: Path,
    chat: bool,
    *,
    shots: int | None = None,
    shots_data: Path | None = None,
    limit: int | None = None,
) -> list[Question]:
    """The questions of a task. limit: so many, the groups (subjects, categories) in turn.

    shots: examples before each question; default: those of the table on top for a base model, none with chat.
    Raises InputError naming file, line and field of whatever is wrong.
    """
    task = TASKS[name]
    shots = (0 if chat else task.shots) if shots is None else shots
    if shots and task.checker in ("none", "code"):
        raise InputError(f"--shots {shots} does not go with --task {name}; leave it out.")
    if shots_data and not shots:
        raise InputError(
            f"--shots_data {shots_data} names examples, but none are "
            "put before a question; give --shots, or leave it out."
        )

    items = task.read(path)
    if not items:
        raise InputError(f"--data {path} holds no questions.")

    numbered = in_turn(list(enumerate(items)))[:limit]
    groups = {item.group for _, item in numbered}
    examples = read_examples(task, shots_data or training_path(task, path), shots, groups) if shots else {}
    return [question_of(task, chat, index, item, examples.get(item.group, [])) for index, item in numbered]
