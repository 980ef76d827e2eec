"""Answers to train a judge on: several models answer the same questions, and a checker says which answers are
right.

    python scripts/build_judge_data.py --questions gsm8k/train.jsonl --checker number --limit 500 --chat \\
        --checkpoint_path LLAMA-8B LLAMA-70B --temperature 0,0.8 --samples 2 --out answers.jsonl

The recipe of Judge Decoding (arXiv 2501.19309): per question one right and one wrong answer, from different
models where there is a choice; a person then marks the wrong spans (scripts/annotate.py). A line of --out is
what train_judge.py reads: `{"prompt", "response", "reference", "right", "errors", "source", "question"}`. A
right answer has no errors, []; a wrong one has null, which judge.py refuses until somebody has put [start,
end] there.

An answer that --max_new_tokens cut off, that gives no final answer, or whose logits are not finite, is
dropped. Every answer, dropped or not, goes to OUT.all as it is made, in a fixed order; a killed run resumes
from there and ends with the same files. --out is written once, at the end, and never over anything else:
annotations put into it are safe. Demo questions are training problems, never the held-out ones;
--annotate_demo marks their wrong words and digits by the grammar, also the steps that a right answer takes
back.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, note, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import read_config
from files import Lines, check_not_input, check_writable, digest, read_bytes, write_file
from generate import Engine, NotFinite, Settings
from model import pick_device, run_dtype
from quantize import load_model
from scripts.lib.demo_task import annotated
from scripts.lib.fields import check_fields, is_count, is_text, is_verdict
from scripts.lib.flags import add_flags
from scripts.lib.pair import check_settings, files_in
from scripts.lib.result import Result
from scripts.lib.results import resume
from scripts.lib.scoring import CHECKERS, UNDECIDED, Question
from scripts.lib.tasks import add_question_flags, question_files, questions_of
from scripts.lib.terminal import answer_text
from scripts.lib.turns import prompt_ids
from tokenizer import Tokenizer, load_tokenizer


class Job(NamedTuple):
    """One answer to make. model: position in --checkpoint_path."""

    model: int
    temperature: float
    sample: int
    question: Question


class Source(NamedTuple):
    """A model that answers: its folder, its tokenizer, and the ids of each question's prompt by its id."""

    folder: Path
    tokenizer: Tokenizer
    prompts: dict[str, list[int]]


def read_temperatures(text: str) -> list[float]:
    """The numbers of "0,0.8"; InputError for what no engine can sample with, and for one named twice."""
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--temperature {shortened(text)} is not a list of numbers, as in 0,0.8.") from None
    for temperature in temperatures:
        check_settings(Settings("plain", temperature=temperature), False, False)
        if temperatures.count(temperature) > 1:
            raise InputError(f"--temperature names {temperature:g} twice; for more answers raise --samples.")
    return temperatures


def list_jobs(args: argparse.Namespace, questions: list[Question]) -> list[Job]:
    """All answers to make, in the order of OUT.all. Greedy ones are made once: another sample would be the
    same."""
    return [
        Job(model, temperature, sample, question)
        for model, temperature, sample in product(
            range(len(args.checkpoint_path)), args.temperature, range(args.samples)
        )
        if sample == 0 or temperature > 0
        for question in questions
    ]


def open_source(args: argparse.Namespace, folder: Path, questions: list[Question]) -> Source:
    """A folder's tokenizer and prompts. Raises InputError for one that leaves no room for an answer in the
    folder's context."""
    tokenizer, context = load_tokenizer(folder), read_config(folder).max_position
    prompts = prompt_ids(args, tokenizer, questions, context, f" and {folder}")
    return Source(folder, tokenizer, prompts)


def make_header(args: argparse.Namespace, questions: list[Question]) -> dict:
    """What OUT.all must agree on for a run to go on with it."""
    asked = json.dumps([(question.id, question.reference) for question in questions])
    return {"questions": hashlib.sha256(asked.encode()).hexdigest()[:16],
            "models": [digest(folder) for folder in args.checkpoint_path],
            "temperature": args.temperature, "samples": args.samples, "seed": args.seed, "chat": args.chat,
            "max_new_tokens": args.max_new_tokens, "precision": str(args.dtype), "compile": args.compile,
            "device": str(args.device), "torch": torch.__version__}  # fmt: skip


def seed_of(args: argparse.Namespace, job: Job) -> int:
    """An answer's own seed, so that it does not depend on what was answered before."""
    return int(hashlib.sha256(f"{args.seed} {job.question.id} {job.sample}".encode()).hexdigest()[:15], 16)


def answers(args: argparse.Namespace, todo: list[Job], sources: list[Source]) -> Iterator[tuple[Job, Result]]:
    """(job, the engine's Result) for all of `todo`, with one model loaded at a time; it stopped with "not
    finite" where the logits were."""
    for at, its_jobs in groupby(todo, key=lambda job: job.model):
        folder, tokenizer, prompts = sources[at]
        model = load_model(folder, args.device, args.dtype)
        length = max(map(len, prompts.values())) + args.max_new_tokens
        for temperature, jobs in groupby(its_jobs, key=lambda job: job.temperature):
            settings = Settings("plain", temperature=temperature, compile=args.compile)
            engine = Engine(model, None, None, settings, tokenizer.stop_ids, length)
            if args.compile:
                note(f"{folder}: warmed up in {engine.warm_up():.1f} s")
            for job in jobs:
                prompt = prompts[job.question.id]
                try:
                    result = engine.generate(prompt, args.max_new_tokens, seed_of(args, job))
                except NotFinite:
                    result = Result(len(prompt), stop_reason="not finite")
                yield job, result
        del model, engine  # before the next is loaded
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


WHY_NOT = {"length": "cut off", "not finite": "not finite"}  # stop reason -> why the answer is dropped
DROPPED = ("cut off", "no answer", "not finite", *UNDECIDED)


def source_of(args: argparse.Namespace, job: Job) -> str:
    return f"{args.checkpoint_path[job.model].resolve().name}, temperature {job.temperature:g}"


def record(args: argparse.Namespace, job: Job, tokens: int, text: str, stop_reason: str) -> dict:
    """A line of OUT.all: the answer and what its checker says of it."""
    question, checker = job.question, CHECKERS[job.question.checker]
    dropped = WHY_NOT.get(stop_reason)
    if dropped is None:
        found = checker.final_answer(question, text) if text.strip() else None
        dropped = "no answer" if found is None else found if found in UNDECIDED else None
    return {"question": question.id, "model": job.model, "prompt": question.prompt, "response": text,
            "reference": question.reference, "right": None if dropped else checker.is_right(question, text),
            "dropped": dropped, "tokens": tokens, "source": source_of(args, job)}  # fmt: skip


def check_record(record: dict, where: str) -> dict:
    """A line of OUT.all. Raises InputError beginning with `where`, and naming the field, for what no run has
    written."""
    kinds = {
        "question": is_text,
        "model": is_count,
        "prompt": is_text,
        "response": is_text,
        "reference": is_text,
        "right": is_verdict,
        "dropped": lambda value: value in (None, *DROPPED),
        "tokens": is_count,
        "source": is_text,
    }
    return check_fields(record, kinds, where)


def answer_all(
    args: argparse.Namespace, todo: list[Job], sources: list[Source], lines: Lines, begin: list[dict]
) -> list[dict]:
    """Makes the answers that are still missing, writing each to OUT.all as it is done, the first one after
    `begin`."""
    records, progress = [], Progress("answers", len(todo))
    for job, result in answers(args, todo, sources):
        text = answer_text(sources[job.model].tokenizer, result.tokens)
        records.append(record(args, job, len(result.tokens), text, result.stop_reason))
        for line in (*(begin if len(records) == 1 else ()), records[-1]):
            lines.add(line)
        progress.step()
    return records


def pick(records: list[dict], most: int, used: Counter, turn: int, models: int) -> list[dict]:
    """Up to `most` different answers, each from the model `used` least so far; ties go to the models by
    turns."""
    picked, rest = [], list(records)
    while rest and len(picked) < most:
        best = min(rest, key=lambda record: (used[record["model"]], (record["model"] - turn) % models))
        used[best["model"]] += 1
        picked.append(best)
        rest = [record for record in rest if record["response"] != best["response"]]
    return picked


def choose(records: list[dict], models: int, right: int, wrong: int) -> list[dict]:
    """The paper's tuples: of each question that has both, so many right and wrong answers, from different
    models if possible. The kind that fewer models gave has the first choice."""
    chosen, groups = [], {}
    for record in records:
        if not record["dropped"]:
            groups.setdefault(record["question"], []).append(record)
    for turn, group in enumerate(groups.values()):
        kinds = [([r for r in group if r["right"]], right), ([r for r in group if not r["right"]], wrong)]
        if all(of_kind for of_kind, _ in kinds):
            used, scarce_first = Counter(), sorted(kinds, key=lambda kind: len({r["model"] for r in kind[0]}))
            picked = [r for of_kind, most in scarce_first for r in pick(of_kind, most, used, turn, models)]
            chosen += sorted(picked, key=lambda record: not record["right"])
    return chosen


def different(records: list[dict]) -> list[dict]:
    """All usable answers, each text once a question."""
    first = {}
    for record in records:
        if not record["dropped"]:
            first.setdefault((record["question"], record["response"]), record)
    return list(first.values())


def line_of(record: dict, problems: dict) -> str:
    """An answer as judge.py reads it. problems: {question id: demo problem} where its grammar is to mark the
    errors."""
    errors = [] if record["right"] else None
    if problems:
        errors = annotated(problems[record["question"]], record["response"], record["source"])["errors"]
    fields = ("prompt", "response", "reference", "right")
    return json.dumps(
        {key: record[key] for key in fields}
        | {"errors": errors}
        | {k: record[k] for k in ("source", "question")}
    )


def write_chosen(out: Path, lines: list[str]) -> None:
    """Writes --out, but never over other content: that may be hours of annotation."""
    content = ("\n".join(lines) + "\n").encode()
    if out.exists() and read_bytes(out) != content:
        raise InputError(
            f"{out} holds other lines than were chosen now "
            "(annotated, perhaps); move it, or name another --out."
        )
    write_file(out, content)


def print_summary(args: argparse.Namespace, questions: int, records: list[dict], chosen: list[dict]) -> None:
    """What each source gave, what was chosen, and why the rest was not."""
    kinds = ("right", "wrong", "cut off", "no answer")
    kinds += tuple(
        kind for kind in DROPPED if kind not in kinds and any(record["dropped"] == kind for record in records)
    )
    print(f"{'source':35} answers" + "".join(f"{kind:>{max(8, len(kind) + 2)}}" for kind in kinds))
    for source in dict.fromkeys(record["source"] for record in records):
        mine = [record for record in records if record["source"] == source]
        count = Counter(r["dropped"] or ("right" if r["right"] else "wrong") for r in mine)
        print(
            f"{source:35} {len(mine):7}" + "".join(f"{count[kind]:{max(8, len(kind) + 2)}}" for kind in kinds)
        )

    right, dropped = sum(r["right"] for r in chosen), sum(r["dropped"] is not None for r in records)
    tuples = f"{len({r['question'] for r in chosen})} tuples, " if args.tuples else ""
    print(
        f"{args.out}: {tuples}{len(chosen)} answers ({right} right, "
        f"{len(chosen) - right} wrong), {sum(r['tokens'] for r in chosen)} tokens; "
        f"from {questions} questions, {len(records)} answers, {dropped} dropped."
    )
    texts = len(different(records))
    others = {
        f"{len(records) - dropped - texts} with the text of another": len(records) - dropped - texts,
        f"{texts - len(chosen)} beside a pair or without one (--no-tuples keeps them)": texts - len(chosen),
    }
    if said := [what for what, count in ({f"{dropped} dropped": dropped} | others).items() if count]:
        print(f"Not written there, but in {args.work}: {', '.join(said)}.")


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for a command line that cannot run, before anything is loaded, and completes it."""
    args.temperature = read_temperatures(args.temperature)
    args.device = pick_device(args.device)
    args.dtype = run_dtype(args.precision, args.device)
    inputs = [*question_files(args), *files_in(args.checkpoint_path)]
    check_writable(args.out, "--out")
    args.work = args.out.with_name(args.out.name + ".all")
    for path in (args.out, args.work):
        check_writable(path, "--out")
        check_not_input(path, inputs)

    named = args.questions or args.task or "demo"
    if args.annotate_demo and named.partition(":")[0] != "demo":
        raise InputError(f"--annotate_demo knows the demo's problems only, not {named}.")


def all_records(
    args: argparse.Namespace, jobs: list[Job], sources: list[Source], lines: Lines, header: dict
) -> list:
    """The records of OUT.all, those that it lacks made now. Raises InputError where it, or --out, is of
    another run."""
    records = resume(lines, header, check_record)
    if [record["question"] for record in records] != [job.question.id for job in jobs[: len(records)]]:
        raise InputError(f"{args.work} is not in this run's order; remove it, or name another --out.")
    if len(records) < len(jobs) and args.out.exists():
        raise InputError(
            f"{args.out} exists, but is not the output of this run; move it, or name another --out."
        )
    begin = [] if lines.content else [header]
    return records + answer_all(args, jobs[len(records) :], sources, lines, begin)


def build(args: argparse.Namespace) -> None:
    """From a parsed command line to --out and the summary."""
    check_args(args)
    questions = questions_of(args, held_out=False, stops=False)
    sources = [open_source(args, folder, questions) for folder in args.checkpoint_path]
    folders = [folder.resolve() for folder in args.checkpoint_path]
    if len(set(folders)) < len(folders):
        raise InputError(
            f"--checkpoint_path names {max(folders, key=folders.count)} "
            "twice; for more answers raise --samples."
        )

    header, jobs = make_header(args, questions), list_jobs(args, questions)
    with closing(Lines(args.work)) as lines:
        records = all_records(args, jobs, sources, lines, header)
        models = len(args.checkpoint_path)
        chosen = choose(records, models, args.right, args.wrong) if args.tuples else different(records)
        if not chosen:
            raise InputError(
                "There is nothing to choose: no question has both a right and a "
                "wrong answer; ask more questions, add a weaker checkpoint or a "
                f"higher --temperature, or see {args.work} for what was dropped."
            )
        demo = {question.id: question.content for question in questions} if args.annotate_demo else {}
        write_chosen(args.out, [line_of(record, demo) for record in chosen])

    print_summary(args, len(questions), records, chosen)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add, several = parser.add_argument, whole(1, 10_000)
    add_flags(
        parser,
        checkpoint_path={
            "nargs": "+",
            "required": True,
            "help": "the models' folders; they are loaded in turn",
        },
    )
    add_question_flags(parser)
    add_flags(
        parser,
        temperature={"type": str, "default": "0,0.8", "help": "each model answers at each of these"},
        samples={"help": "answers a question at each temperature above 0"},
        max_new_tokens={
            "type": whole(1, 10_000_000),
            "default": 400,
            "help": "after which an answer is cut off, and dropped",
        },
        chat={"help": "put questions into the folder's chat format, as train_judge.py --chat will"},
    )
    add(
        "--tuples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep right and wrong pairs, not all answers",
    )
    add("--right", type=several, default=1, help="right answers in a tuple, at most")
    add("--wrong", type=several, default=1, help="wrong answers in a tuple, at most")
    add(
        "--annotate_demo",
        action="store_true",
        help="mark errors by the demo's grammar instead of leaving that open",
    )
    add_flags(
        parser,
        "compile",
        "device",
        "precision",
        out={"required": True, "help": "the chosen answers, JSON lines; OUT.all beside it holds all of them"},
    )
    args = parser.parse_args(argv)
    run_script("build_judge_data.py", lambda: build(args))


if __name__ == "__main__":
    main()
