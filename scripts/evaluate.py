"""Accuracy, accepted tokens and speed of several verification rules on the same questions, in one run.

    python scripts/evaluate.py --limit 500 --verify plain,standard,judge,kl,topk,typical --compile
    python scripts/evaluate.py --task gsm8k --data gsm8k/test.jsonl --verify topk --threshold topk=2,topk=3

    torchrun --nproc_per_node 8 scripts/evaluate.py --task mmlu --data mmlu --out results.jsonl
    python scripts/evaluate.py --task mmlu --data mmlu --out results.jsonl --merge 8        # then, once

Every question is answered by every rule before the next question, so that all rules see the machine in the
same state. One JSON line an answer goes to --out and is flushed; a killed run resumes from there. What
questions may be is in scripts/lib/tasks.py, how they are put in scripts/lib/public_tasks.py, and how they are
checked in scripts/lib/scoring.py. Of several processes (torchrun) each has its own engine, answers every
so-many-th question and keeps its part beside --out. An answer whose logits are not finite is recorded as
failed (no text, not right) and the run goes on: the table counts it, a line on standard error says how many
there were, and the exit code is then 2.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import tp
from files import check_not_input, check_writable
from judge import needs_judge
from model import pick_device
from scripts.lib.bench import Bench, Variant, label, parse_rules, settings_for
from scripts.lib.fastchat import check_model_answers, write_model_answers
from scripts.lib.flags import MOST_PROCESSES, add_engine_flags, add_flags
from scripts.lib.pair import check_settings, name_models, schemes_of
from scripts.lib.public_tasks import TASKS
from scripts.lib.published import take_sampling
from scripts.lib.ranks import add_rank_flags, check_flags, own_device
from scripts.lib.results import PEERS, check_parts, merge, part, rank_and_size
from scripts.lib.scoring import Question
from scripts.lib.summary import summarise
from scripts.lib.tasks import add_question_flags, question_files, questions_of


def print_table(rows: list[dict]) -> None:
    """The rows for people; a column that says nothing is left out."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def span(values: list[float] | None, form: str = ".1f") -> str:
        return "-" if values is None else f"{100 * values[0]:{form}} to {100 * values[1]:{form}}"

    columns = {
        "rule": [row["rule"] for row in rows],
        "n": [str(row["n"]) for row in rows],
        "right": [share(row["accuracy"]) for row in rows],
        "95% interval": [span(row["interval"]) for row in rows],
        "- plain": [
            "-" if row.get("difference") is None else f"{100 * row['difference']:+.1f}" for row in rows
        ],
        "95% interval ": [span(row.get("difference_interval"), "+.1f") for row in rows],
        "lost": [str(row.get("lost", "-")) for row in rows],
        "won": [str(row.get("won", "-")) for row in rows],
        "failed": [str(row.get("failed", "-")) for row in rows],
        "answer": [share(row["answer_accuracy"]) for row in rows],
        "95% interval  ": [span(row.get("answer_interval")) for row in rows],
        **{name: [share(row.get(name)) for row in rows] for name in ("pass@10", "pass@100")},
        "m*": ["-" if row["mean_accepted"] is None else f"{row['mean_accepted']:.2f}" for row in rows],
        "by rule": [share(row["by_rule_share"]) for row in rows],
        "tokens/s": [f"{row['tokens_per_second']:.1f}" for row in rows],
        "x plain": ["-" if row["ratio"] is None else f"{row['ratio']:.2f}" for row in rows],
    }
    if columns["answer"] == columns["right"]:
        del columns["answer"], columns["95% interval  "]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    for line in (list(columns), *zip(*columns.values())):
        first, *others = zip(line, widths)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))


def check_failed(records: list[dict]) -> None:
    """Raises InputError that says how many answers failed, of which rules, and why the first one did."""
    if failed := [record for record in records if "failed" in record]:
        rules = ", ".join(
            f"{n} of {rule}" for rule, n in Counter(record["rule"] for record in failed).items()
        )
        raise InputError(
            f"{len(failed)} of {len(records)} answers failed ({rules}) and count as not "
            f"right; the first, to question {failed[0]['index']}: {failed[0]['failed']}"
        )


def own_out(args: argparse.Namespace, rank: int, size: int) -> Path | None:
    """Where this process writes: --out, or its part of it."""
    return part(args.out, rank, size) if size > 1 else args.out


def answer_share(
    args: argparse.Namespace, rules: list[Variant], questions: list[Question], rank: int, size: int
) -> list[dict]:
    """The records of every `size`-th question from `rank` on."""
    args.out, questions = own_out(args, rank, size), questions[rank::size]
    largest = max(settings_for(args, rule).speculate_k for rule in rules)
    with closing(Bench(args, questions, any(needs_judge(rule.name) for rule in rules), largest)) as bench:
        return bench.answer_all(questions, rules)


def share_of(args: argparse.Namespace) -> tuple[int, int]:
    """Which of how many shares of the questions this run answers: --part, or with torchrun, unless its
    processes run one model together, this process's."""
    if args.part is None:
        return (0, 1) if args.tp else rank_and_size()
    index, _, size = args.part.partition("/")
    try:
        size = whole(1, MOST_PROCESSES)(size)
        index = whole(0, size - 1)(index)
    except argparse.ArgumentTypeError:
        raise InputError(f"--part {args.part} is not of the form I/N, as in 0/4, with I below N.") from None
    if rank_and_size()[1] > 1 and not args.tp:
        raise InputError("--part under torchrun needs --tp: without it torchrun's processes are the parts.")
    return index, size


def with_samples(questions: list[Question], samples: int) -> list[Question]:
    """Each question `samples` times; the further ones have the index "12.1", "12.2", ..."""
    return [replace(q, index=f"{q.index}.{n}") if n else q for q in questions for n in range(samples)]


def check_args(args: argparse.Namespace, rules: list[Variant], size: int) -> None:
    """Raises InputError for what cannot run, before anything is loaded; fills in what the task decides."""
    name_models(args)
    take_sampling(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = TASKS[args.task].max_new_tokens[args.chat] if args.task in TASKS else 200
    if args.samples > 1 and not args.temperature:
        raise InputError(f"--samples {args.samples} needs a --temperature above 0: all would be the same.")
    if args.merge is not None and size > 1:
        raise InputError(f"--merge {args.merge}: give the number of processes that ran, and no torchrun.")
    if (args.merge or size > 1) and not args.out:
        raise InputError(
            "Several processes need --out: each keeps its share beside it, and --merge joins them there."
        )
    if args.model_answers and (args.task not in TASKS or TASKS[args.task].checker != "none"):
        raise InputError("--model_answers is FastChat's form, for --task mt_bench and spec_bench.")
    if args.tp and not tp.shard():
        raise InputError(
            "--tp is for several processes that run one model together; start them with torchrun."
        )
    check_flags(args)
    for rule in rules:
        if rule.name not in PEERS:
            check_settings(settings_for(args, rule), True, args.judge_path is not None)
        elif rule.threshold is not None:
            raise InputError(f"--verify {rule.name} has no threshold; leave --threshold out.")
        elif settings_for(args, rule).adaptive:
            raise InputError(f"--verify {rule.name} needs a number for --speculate_k.")
        elif args.temperature:
            raise InputError(f"--verify {rule.name} is greedy; leave --temperature out.")
        elif args.tp:
            raise InputError(f"--verify {rule.name} runs in one process; leave --tp out.")
        elif any(schemes_of(args)):
            raise InputError(
                f"--verify {rule.name} runs the folders as they are; leave --mode and --draft_mode out."
            )

    args.device = pick_device(own_device(args.device))
    tp.connect(args.device, args.all_reduce)


def check_outputs(args: argparse.Namespace, labels: list[str], rank: int, size: int) -> None:
    """Raises InputError where what is to be written cannot be, or would replace an input, before anything is
    loaded."""
    inputs = [*question_files(args), *filter(None, [args.judge_path])]
    if args.merge and os.path.lexists(args.out):
        raise InputError(
            f"--out {args.out} is there already; name the --out of the run, or remove what was merged before."
        )

    if args.out and size > 1:
        check_parts(args.out, size)
    for path in filter(None, (args.out, own_out(args, rank, size))):
        check_writable(path, "--out")
        check_not_input(path, inputs)

    if args.model_answers:
        check_model_answers(args.model_answers, labels, [*inputs, *filter(None, [args.out])])


def evaluate(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Answers what is not yet in --out, rule by rule on each question, and returns the records and their
    summary rows.

    As one of several processes only its share, into its own part of --out, and rows of that; with --merge
    nothing is answered.
    """
    rules = parse_rules(args.verify, args.threshold)
    labels = [label(rule) for rule in rules]
    rank, size = share_of(args)
    check_args(args, rules, size)
    check_outputs(args, labels, rank, size)
    questions = with_samples(questions_of(args, scored=False), args.samples)
    if args.merge:
        records = merge(args.out, args.merge, labels, questions)
    else:
        records = answer_share(args, rules, questions, rank, size)

    if args.model_answers and (args.merge or size == 1) and tp.RANK == 0:
        write_model_answers(args.model_answers, records, questions)
    return records, summarise(records, labels) if records else []


def report(args: argparse.Namespace) -> None:
    records, rows = evaluate(args)
    if args.json:
        print(json.dumps({"questions": args.questions or args.task or "demo", "rows": rows}))
    elif rows:
        print_table(rows)

    rank, size = share_of(args)
    if size > 1 and (rank == 0 or args.part):
        more = "without --part" if args.part else "without torchrun"
        print(
            f"When all {size} parts are done: the same command, {more}, with --merge {size}", file=sys.stderr
        )

    check_failed(records)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add_question_flags(parser)
    add_engine_flags(parser, max_new_tokens=None)
    add(
        "--verify",
        default="plain,standard,judge,kl,topk,typical",
        help="rules (judge@8: with M = 8), hf, hf-assisted",
    )
    add(
        "--threshold",
        help="rule=number, ...; several for one rule run it several times (default: each rule's own)",
    )
    add_flags(parser, out={"help": "results, JSON lines; resumed when it exists"})
    add(
        "--details",
        action="store_true",
        help="keep probability, KL and score of each token, for report.py (not timed)",
    )
    add_flags(parser, samples={"help": "answers a question and rule, for pass@k; needs a --temperature"})
    add(
        "--model_answers",
        type=Path,
        help="of mt_bench and spec_bench: write FastChat's answer files, one a rule, here",
    )
    add(
        "--tp",
        action="store_true",
        help="torchrun's processes run one model together, not a share of the questions each",
    )
    add(
        "--part",
        metavar="I/N",
        help="answer every N-th question from the I-th on (0 to N - 1): one of N runs, for --merge N",
    )
    add_rank_flags(parser)
    add_flags(parser, "merge", "json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tp.ranks("evaluate.py") if args.tp else nullcontext():
        run_script("evaluate.py", lambda: report(args))


if __name__ == "__main__":
    main()
