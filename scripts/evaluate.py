"""Accuracy, accepted tokens and speed of several verification rules on the same questions, in one run.

    python scripts/evaluate.py --limit 500 --verify plain,standard,judge,kl,topk,typical --compile
    python scripts/evaluate.py --task gsm8k --data gsm8k/test.jsonl ... --verify topk --threshold topk=2,topk=3,topk=5
    torchrun --nproc_per_node 8 scripts/evaluate.py --task mmlu --data mmlu ... --out results.jsonl     # then once:
    python scripts/evaluate.py --task mmlu --data mmlu ... --out results.jsonl --merge 8

Every question is answered by every rule before the next question, so that all rules see the machine in the same state.
One JSON line an answer goes to --out and is flushed; a killed run resumes from there. What questions may be is in
scripts/tasks.py, how they are put in scripts/public_tasks.py, and how they are checked in scripts/scoring.py.
Of several processes (torchrun) each has its own engine, answers every so-many-th question and keeps its part beside --out.
An answer whose logits are not finite is recorded as failed (no text, not right) and the run goes on: the table counts it, a
line on standard error says how many there were, and the exit code is then 2.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, note, number, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import tp
from files import Lines, check_not_input, check_writable
from generate import (
    DEMO,
    Engine,
    NotFinite,
    Settings,
    capacity_for,
    check_settings,
    load_pair,
    read_k,
    settings_of,
)
from judge import RULES, JudgeHead
from model import DTYPES, ModelArgs, Transformer, pick_device, run_dtype
from quantize import Scheme, add_mode_flags, scheme_of
from scripts.intervals import interval, mcnemar, mean_interval, paired_interval, pass_at_k
from scripts.public_tasks import TASKS
from scripts.results import (
    MOST_PROCESSES,
    PEERS,
    by_key,
    check_model_answers,
    check_parts,
    check_same_questions,
    how_made,
    merge,
    part,
    rank_and_size,
    resume,
    write_model_answers,
)
from scripts.scoring import CHECKERS, Question
from scripts.tasks import add_question_flags, question_header, questions_of
from scripts.token_details import as_fields, token_details
from scripts.turns import answer_turns, cut, failed_turn, turn_ids
from tokenizer import load_tokenizer

SEEDS = 1_000_003  # between the samples of a question
MOST_TOKENS = 10_000_000  # of an answer, and of a vocabulary


class Variant(NamedTuple):
    """A rule with its threshold (None: its default) and its M (None: --speculate_k)."""

    name: str
    threshold: float | None = None
    k: int | str | None = None


def parse_rules(names: str, thresholds: str | None) -> list[Variant]:
    """Variants from "a,b,b@8" and "b=1,b=2"; InputError for what is unknown."""
    given: dict[str, list[float]] = {}
    for word in filter(None, (thresholds or "").split(",")):
        name, _, value = word.partition("=")
        try:
            given.setdefault(name, []).append(float(value))
        except ValueError:
            raise InputError(f"--threshold {word} is not of the form rule=number, as in topk=3.") from None
    rules, taken = [], set()
    for word in names.split(","):
        name, _, k = word.partition("@")
        if name not in ("plain", *RULES, *PEERS):
            raise InputError(f"--verify {name} is not a rule; known are {', '.join(('plain', *RULES, *PEERS))}.")
        m = read_m(word, k)
        rules += [Variant(name, value, m) for value in given.get(name, [None])]
        taken.add(name)
    given = {name: values for name, values in given.items() if name not in taken}
    if given:
        raise InputError(f"--threshold names {next(iter(given))}, which --verify does not.")
    labels = [label(rule) for rule in rules]
    if len(set(labels)) < len(labels):
        raise InputError(f"--verify or --threshold names {max(labels, key=labels.count)} twice.")
    return rules


def read_m(word: str, m: str) -> int | str | None:
    """M of a word such as "judge@8", None where it names none."""
    if m in ("", "auto"):
        return m or None
    try:
        return whole(1, 1024)(m)
    except argparse.ArgumentTypeError:
        raise InputError(f"--verify {word} must name M after the @, a whole number or auto, at most 1024.") from None


def label(rule: Variant) -> str:
    return rule.name + ("" if rule.threshold is None else f"={rule.threshold:g}") + (f"@{rule.k}" if rule.k else "")


class Bench:
    """The pair, one engine a rule, and a file of answers that is resumed: what answers questions by several rules.

    args: a command line with the flags of `add_engine_flags`; args.out may be None. largest_k: of the variants to come.
    All thresholds of a rule share one engine, and all engines the weights and caches.
    """

    def __init__(self, args: argparse.Namespace, questions: list[Question], needs_judge: bool, largest_k: int = 0):
        self.args, self.tokenizer, self.engines = args, load_tokenizer(args.checkpoint_path), {}
        self.parts = {question.index: turn_ids(args, self.tokenizer, question) for question in questions}
        self.prompts = {index: parts[0] for index, parts in self.parts.items()}
        needs = (sum(map(len, parts)) + len(parts) * args.max_new_tokens for parts in self.parts.values())
        self.length = max(needs, default=args.max_new_tokens + 1)
        check_context(args, self.parts, self.length)
        self.lines = Lines(args.out) if args.out and tp.is_first() else None  # locked before there is any work
        try:
            self.load(args, needs_judge, largest_k)
            records = tp.first(lambda: resume(self.lines, self.header)) if args.out else []
            self.begun = self.lines is not None and bool(self.lines.content)
            self.done = by_key(args.out, records)
            check_same_questions(args.out, self.done, questions)
            self.check_threshold()
        except BaseException:
            self.close()
            raise

    def load(self, args: argparse.Namespace, needs_judge: bool, largest_k: int) -> None:
        """Loads the models, with caches for the largest M: engines come one by one, and share them."""
        judge, dtype = args.judge_path if needs_judge else None, run_dtype(args.precision, args.device)
        capacity = capacity_for(self.length, max(largest_k, settings_for(args, Variant("standard")).speculate_k))
        self.models = load_pair(
            args.checkpoint_path, args.draft_checkpoint_path, judge, args.device, dtype, capacity, schemes_of(args),
            getattr(args, "draft_tp", None),
        )  # fmt: skip
        for model in self.models[:2]:
            if model is not None:
                model.setup_caches(capacity)
        self.header = make_header(args, *self.models)

    def check_threshold(self) -> None:
        """Raises InputError for answers of the judge at another threshold than its own of now."""
        head = self.models[2]
        mine = [r.get("threshold") for (rule, _), r in self.done.items() if head and rule.split("@")[0] == "judge"]
        if stale := [threshold for threshold in mine if threshold != head.threshold]:
            raise InputError(f"{self.args.out} holds answers at the judge's threshold {stale[0]}, which is now "
                             f"{head.threshold}; remove it.")  # fmt: skip

    def close(self) -> None:
        """Lets go of the file of answers; one that nothing was written to is removed."""
        if self.lines is not None:
            self.lines.close()
            self.lines = None

    def write(self, *records: dict) -> None:
        """Appends to the file of answers, which begins with the header."""
        if self.lines is not None:
            header = () if self.begun else (self.header | how_made(),)
            self.begun = True
            for line in (*header, *records):
                self.lines.add(line)

    def engine(self, rule: Variant):
        """The engine for a rule, set to its threshold; made and warmed up at first use."""
        key = rule.name, rule.k
        if key not in self.engines and rule.name in PEERS:
            self.engines[key] = peer(self.args, rule, self.tokenizer)
        elif key not in self.engines:
            engine = Engine(*self.models, settings_for(self.args, rule), self.tokenizer.stop_ids, self.length)
            note(f"{label(rule)}: warmed up in {engine.warm_up():.1f} s")
            self.engines[key] = engine
        if rule.name not in PEERS and rule.name != "plain":
            self.engines[key].set_threshold(rule.threshold)
        return self.engines[key]

    def answer(self, question: Question, rule: Variant) -> dict:
        """The record of one question by one rule: from the file, or decoded now and written to it."""
        if (label(rule), question.index) not in self.done:
            parts = self.parts[question.index]
            record = answer(self.engine(rule), rule, question, parts, self.args, self.tokenizer, self.details)
            self.done[label(rule), question.index] = record
            self.write(record)
        return self.done[label(rule), question.index]

    def details(self, prompt: list[int], tokens: list[int]) -> dict:
        """With --details, what the models say of each token of an answer."""
        if not getattr(self.args, "details", False):
            return {}
        return as_fields(token_details(*self.models, prompt, tokens), self.tokenizer, tokens)

    def answer_all(self, questions: list[Question], rules: list[Variant]) -> list[dict]:
        """The records of all questions by all rules, question by question."""
        todo = [(q, rule) for q in questions for rule in rules if (label(rule), q.index) not in self.done]
        for rule in dict.fromkeys(rule for _, rule in todo):
            self.engine(rule)  # warm-ups first: no answer waits for another rule's
        self.write()
        progress = Progress("answers", len(todo))
        for question, rule in todo:
            self.answer(question, rule)
            progress.step()
        return [self.done[label(rule), question.index] for question in questions for rule in rules]


def check_context(args: argparse.Namespace, parts: dict[int | str, list[list[int]]], needed: int) -> None:
    """Raises InputError where a prompt and its answers, `needed` tokens at most, do not fit the target's context."""
    context = ModelArgs.from_folder(args.checkpoint_path).max_position
    if needed > context:
        room = min((context - sum(map(len, each))) // len(each) for each in parts.values()) if parts else 0
        most = f"; with {room} the longest fits" if room > 0 else ""
        raise InputError(
            f"A prompt and --max_new_tokens {args.max_new_tokens} need {needed} tokens, but the context is {context}{most}."
        )


def settings_for(args: argparse.Namespace, rule: Variant) -> Settings:
    """The settings of the command line for one of its rules."""
    more = {"verify": rule.name, "threshold": rule.threshold, "speculate_k": rule.k or args.speculate_k}
    return settings_of(argparse.Namespace(**vars(args) | more))


def peer(args: argparse.Namespace, rule: Variant, tokenizer):
    """transformers on the same folders: (prompt, max_new_tokens) -> (tokens, seconds of prefill, seconds of decoding)."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(f"--verify {rule.name} needs the package transformers; pip install -r requirements-dev.txt.") from None
    disable_progress_bar()
    load = {"dtype": run_dtype(args.precision, args.device), "local_files_only": True}
    target = AutoModelForCausalLM.from_pretrained(args.checkpoint_path, **load).to(args.device).eval()
    more = {"do_sample": False, "eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.stop_ids[0]}
    if rule.name == "hf-assisted":
        draft = AutoModelForCausalLM.from_pretrained(args.draft_checkpoint_path, **load).to(args.device).eval()
        draft.generation_config.num_assistant_tokens = settings_for(args, rule).speculate_k
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        more["assistant_model"] = draft

    @torch.inference_mode()
    def run(prompt: list[int], max_new_tokens: int) -> tuple[list[int], float, float]:
        ids, seconds = torch.tensor([prompt], device=args.device), []
        for length in (1, max_new_tokens):  # the first token alone stands for the prefill, which our figures leave out
            started = time.monotonic()
            out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **more)
            seconds.append(time.monotonic() - started)
        return out[0, len(prompt) :].tolist(), seconds[0], max(seconds[1] - seconds[0], 1e-9)

    return run


def answer(
    engine, rule: Variant, question: Question, parts: list[list[int]], args: argparse.Namespace, tokenizer, more: Callable
) -> dict:
    """One question by one rule: the engine's JSON record with what the checker says. parts, more: see `answer_turns`."""
    item, _, sample = str(question.index).partition(".")
    seed = int(item) + SEEDS * int(sample or 0)
    try:
        record = answer_turns(engine, parts, question, args.max_new_tokens, seed, tokenizer, more)
        checker, text = CHECKERS[question.checker], cut(record["text"], question.stops)
        found, right = tp.first(lambda: (checker.final_answer(question, text), checker.is_right(question, text)))
    except NotFinite as error:
        record, found = failed_turn(engine, parts, question, str(error)), None
        right = None if question.checker == "none" else False
    reference = str(question.content.answer) if question.checker == "demo" else None
    return {"index": question.index, "rule": label(rule), "family": question.group, "right": right,
            "answer_right": right if reference is None or right is None else found == reference, "final_answer": found,
            "question": question.asked or question.prompt, **({"item": int(item)} if sample else {}), **record}  # fmt: skip


def summarise(records: list[dict], rules: list[str]) -> list[dict]:
    """One row a rule: n, accuracy with its interval, the same by family, m*, tokens/s, and what is different from plain.

    With several samples a question its accuracy is the share that is right, and pass@k is given. Accuracy is None where a
    checker knows no right and wrong. The difference to plain is on the questions that both answered.
    """
    rows, shares = [], {rule: shares_of(records, rule) for rule in rules}
    for rule in rules:
        mine = [record for record in records if record["rule"] == rule]
        rounds, drafted = sum(r["rounds"] for r in mine), sum(r["drafted"] for r in mine)
        tokens = sum(len(r["tokens"]) for r in mine)
        timed = tokens - len(mine) * (rule in PEERS)  # the peers' first token counts as prefill
        seconds, failed = sum(r["seconds_decode"] for r in mine), sum("failed" in r for r in mine)
        row = {"rule": rule, "n": len({r.get("item", r["index"]) for r in mine}), **accuracy_of(mine, shares[rule])}
        row |= {
            "mean_accepted": sum(r["accepted"] for r in mine) / rounds if drafted else None,
            "by_rule_share": sum(r["accepted_by_rule"] for r in mine) / tokens if tokens else 0.0,
            "tokens_per_second": timed / seconds if seconds else 0.0,
            **({"failed": failed} if failed else {}),
        }
        rows.append(row)
    plain = next((row for row in rows if row["rule"] == "plain"), None)
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / plain["tokens_per_second"] if plain and plain["tokens_per_second"] else None
        if plain and row is not plain:
            row |= difference(shares[row["rule"]], shares["plain"])
    return rows


def shares_of(records: list[dict], rule: str) -> dict[int, list[bool]]:
    """Item -> whether each of its samples is right; empty where there is no right and wrong."""
    found: dict[int, list[bool]] = {}
    for record in records:
        if record["rule"] == rule and record["right"] is not None:
            found.setdefault(record.get("item", record["index"]), []).append(record["right"])
    return found


def accuracy_of(records: list[dict], shares: dict[int, list[bool]]) -> dict:
    """Accuracy, its interval (Wilson's, or with several samples the normal one over items), by family, and pass@k."""
    if not shares:
        return {"accuracy": None, "interval": None, "by_family": {}, "answer_accuracy": None, "answer_interval": None}
    means = [sum(rights) / len(rights) for rights in shares.values()]
    samples = min(map(len, shares.values()))
    records = [record for record in records if record["right"] is not None]
    families = {f: [r["right"] for r in records if r["family"] == f] for f in sorted({r["family"] for r in records})}
    answers = [r["answer_right"] for r in records]
    return {
        "accuracy": sum(means) / len(means),
        "interval": interval(sum(means), len(means)) if samples == 1 else mean_interval(means),
        "by_family": {f: sum(x) / len(x) for f, x in families.items()},
        "answer_accuracy": sum(answers) / len(answers),
        "answer_interval": interval(sum(answers), len(answers)) if samples == 1 else None,
        **{f"pass@{k}": sum(pass_at_k(len(x), sum(x), k) for x in shares.values()) / len(shares)
           for k in (1, 10, 100) if 1 < samples >= k},
    }  # fmt: skip


def difference(shares: dict[int, list[bool]], base: dict[int, list[bool]]) -> dict:
    """Accuracy less that of `base` on the same items, with Newcombe's paired interval and McNemar's exact p.

    With several samples an item: the mean of the items' differences, with the normal interval.
    """
    both = [(shares[item], base[item]) for item in base if item in shares]
    if not both:
        return {}
    changes = [sum(a) / len(a) - sum(b) / len(b) for a, b in both]
    if any(len(rights) > 1 for pair in both for rights in pair):
        return {"difference": sum(changes) / len(changes), "difference_interval": list(mean_interval(changes))}
    won, lost, right = changes.count(1), changes.count(-1), sum(a[0] and b[0] for a, b in both)
    return {"difference": (won - lost) / len(both), "lost": lost, "won": won, "p_value": mcnemar(won, lost),
            "difference_interval": list(paired_interval(right, won, lost, len(both) - right - won - lost))}  # fmt: skip


def print_table(rows: list[dict]) -> None:
    """The rows for people; a column that says nothing is left out."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def span(values: list[float] | None, form: str = ".1f") -> str:
        return "-" if values is None else f"{100 * values[0]:{form}} to {100 * values[1]:{form}}"

    columns = {
        "rule": [row["rule"] for row in rows], "n": [str(row["n"]) for row in rows],
        "right": [share(row["accuracy"]) for row in rows], "95% interval": [span(row["interval"]) for row in rows],
        "- plain": ["-" if row.get("difference") is None else f"{100 * row['difference']:+.1f}" for row in rows],
        "95% interval ": [span(row.get("difference_interval"), "+.1f") for row in rows],
        "lost": [str(row.get("lost", "-")) for row in rows], "won": [str(row.get("won", "-")) for row in rows],
        "failed": [str(row.get("failed", "-")) for row in rows],
        "answer": [share(row["answer_accuracy"]) for row in rows],
        "95% interval  ": [span(row.get("answer_interval")) for row in rows],
        **{name: [share(row.get(name)) for row in rows] for name in ("pass@10", "pass@100")},
        "m*": ["-" if row["mean_accepted"] is None else f"{row['mean_accepted']:.2f}" for row in rows],
        "by rule": [share(row["by_rule_share"]) for row in rows],
        "tokens/s": [f"{row['tokens_per_second']:.1f}" for row in rows],
        "x plain": ["-" if row["ratio"] is None else f"{row['ratio']:.2f}" for row in rows],
    }  # fmt: skip
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
        rules = ", ".join(f"{n} of {rule}" for rule, n in Counter(record["rule"] for record in failed).items())
        raise InputError(f"{len(failed)} of {len(records)} answers failed ({rules}) and count as not right; the first, to "
                         f"question {failed[0]['index']}: {failed[0]['failed']}")  # fmt: skip


def evaluate(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Answers what is not yet in --out, rule by rule on each question, and returns the records and their summary rows.

    As one of several processes only its share, into its own part of --out, and rows of that; with --merge nothing is answered.
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
    if args.model_answers and (args.merge or size == 1) and tp.is_first():
        write_model_answers(args.model_answers, records, questions)
    return records, summarise(records, labels) if records else []


def answer_share(args: argparse.Namespace, rules: list[Variant], questions: list[Question], rank: int, size: int) -> list[dict]:
    """The records of every `size`-th question from `rank` on."""
    args.out, questions = own_out(args, rank, size), questions[rank::size]
    largest = max(settings_for(args, rule).speculate_k for rule in rules)
    with closing(Bench(args, questions, any(rule.name == "judge" for rule in rules), largest)) as bench:
        return bench.answer_all(questions, rules)


def own_out(args: argparse.Namespace, rank: int, size: int) -> Path | None:
    """Where this process writes: --out, or its part of it."""
    return part(args.out, rank, size) if size > 1 else args.out


def own_device(name: str) -> str:
    """--device of this process: of several with an engine each, the GPU of its number on its machine.

    Raises InputError where torchrun's LOCAL_RANK is no such number.
    """
    if tp.shard() or rank_and_size()[1] == 1 or not name.startswith("cuda"):
        return tp.own_device(name)
    given, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    try:
        return f"cuda:{whole(0, count - 1)(given)}"
    except argparse.ArgumentTypeError:
        raise InputError(f"LOCAL_RANK {shortened(given)} in the environment names none of the {count} GPUs of this machine; "
                         "start one process a GPU.") from None  # fmt: skip


def share_of(args: argparse.Namespace) -> tuple[int, int]:
    """Which of how many shares of the questions this run answers: --part, or with torchrun, unless its processes run one model
    together, this process's."""
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
    if args.max_new_tokens is None:
        args.max_new_tokens = TASKS[args.task].max_new_tokens[args.chat] if args.task in TASKS else 200
    if args.samples > 1 and not args.temperature:
        raise InputError(f"--samples {args.samples} needs a --temperature above 0: all would be the same.")
    if args.merge is not None and size > 1:
        raise InputError(f"--merge {args.merge}: give the number of processes that ran, and no torchrun.")
    if (args.merge or size > 1) and not args.out:
        raise InputError("Several processes need --out: each keeps its share beside it, and --merge joins them there.")
    if args.model_answers and (args.task not in TASKS or TASKS[args.task].checker != "none"):
        raise InputError("--model_answers is FastChat's form, for --task mt_bench and spec_bench.")
    if args.tp and not tp.shard():
        raise InputError("--tp is for several processes that run one model together; start them with torchrun.")
    tp.check_flags(args)
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
            raise InputError(f"--verify {rule.name} runs the folders as they are; leave --mode and --draft_mode out.")
    args.device = pick_device(own_device(args.device))
    tp.connect(args.device, args.all_reduce)


def check_outputs(args: argparse.Namespace, labels: list[str], rank: int, size: int) -> None:
    """Raises InputError where what is to be written cannot be, or would replace an input, before anything is loaded."""
    inputs = [Path(path) for path in (args.data, args.shots_data, args.questions, args.judge_path) if path]
    if args.merge and os.path.lexists(args.out):
        raise InputError(f"--out {args.out} is there already; name the --out of the run, or remove what was merged before.")
    if args.out and size > 1:
        check_parts(args.out, size)
    for path in filter(None, (args.out, own_out(args, rank, size))):
        check_writable(path, "--out")
        check_not_input(path, inputs)
    if args.model_answers:
        check_model_answers(args.model_answers, labels, [*inputs, *filter(None, [args.out])])


def make_header(args: argparse.Namespace, target: Transformer, draft: Transformer, head: JudgeHead | None) -> dict:
    """What a results file must agree on for a run to go on with it."""
    weights = [] if head is None else [w.tolist() for w in (head.weight, head.bias, head.draft_weight) if w is not None]
    judge = hashlib.sha256(repr(weights).encode()).hexdigest()[:16] if weights else None
    return {**question_header(args), "chat": args.chat, "samples": getattr(args, "samples", 1),
            "target": target.fingerprint, "draft": draft.fingerprint, "judge": judge, "speculate_k": args.speculate_k,
            "temperature": args.temperature, "top_k": args.top_k, "min_prob": args.min_prob,
            "max_new_tokens": args.max_new_tokens, "precision": str(target.dtype).removeprefix("torch."),
            "mode": target.quantization or None, "draft_mode": draft.quantization or None,
            "compile": args.compile, "device": args.device.type, "torch": torch.__version__,
            **({"details": True} if getattr(args, "details", False) else {})}  # fmt: skip


def report(args: argparse.Namespace) -> None:
    records, rows = evaluate(args)
    if args.json:
        print(json.dumps({"questions": args.questions or args.task or "demo", "rows": rows}))
    elif rows:
        print_table(rows)
    rank, size = share_of(args)
    if size > 1 and (rank == 0 or args.part):
        more = "without --part" if args.part else "without torchrun"
        print(f"When all {size} parts are done: the same command, {more}, with --merge {size}", file=sys.stderr)
    check_failed(records)


def add_engine_flags(parser: Parser, max_new_tokens: int | None = 200) -> None:
    """The flags that say which models answer, and how (max_new_tokens: None where the task has a default of its own)."""
    whose = "" if max_new_tokens else " (default: the task's)"
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="the target (default: the demo target, with its draft and judge)")
    add("--draft_checkpoint_path", type=Path, help="the draft")
    add("--judge_path", type=Path, help="judge.safetensors of this target, for the rule judge")
    add("--chat", action="store_true", help="put questions into the checkpoint folder's chat format")
    add("--min_prob", type=number(0, 1), default=0.0, help="no rule accepts a token that the target gives less than this")
    add("--speculate_k", type=read_k, default=16, help="M, or auto")
    add("--max_new_tokens", type=whole(1, MOST_TOKENS), default=max_new_tokens, help="tokens of an answer, at most" + whose)
    add("--temperature", type=number(0, 1000), default=0.0, help="0 is greedy")
    add("--top_k", type=whole(0, MOST_TOKENS), help="sample from the K most likely tokens; 0: from all (default: all)")
    add("--compile", action="store_true", help="compile the step functions with torch.compile")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add_mode_flags(parser)


def schemes_of(args: argparse.Namespace) -> tuple[Scheme | None, Scheme | None]:
    """How target and draft are to be quantised."""
    return scheme_of(args), scheme_of(args, "draft_")


def name_models(args: argparse.Namespace) -> None:
    """Fills in the demo pair and its judge where no target is named. Raises InputError for a target without a draft."""
    if args.checkpoint_path is None:
        args.checkpoint_path = DEMO / "target"
        args.draft_checkpoint_path = args.draft_checkpoint_path or DEMO / "draft"
        args.judge_path = args.judge_path or DEMO / "judge.safetensors"
    if args.draft_checkpoint_path is None:
        raise InputError("--checkpoint_path needs a draft beside it; name one with --draft_checkpoint_path.")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_question_flags(parser.add_argument)
    add_engine_flags(parser, max_new_tokens=None)
    add = parser.add_argument
    add("--verify", default="plain,standard,judge,kl,topk,typical", help="rules (judge@8: with M = 8), hf, hf-assisted")
    add("--threshold", help="rule=number, ...; several for one rule run it several times (default: each rule's own)")
    add("--out", type=Path, help="results, JSON lines; resumed when it exists")
    add("--details", action="store_true", help="keep probability, KL and score of each token, for report.py (not timed)")
    add("--samples", type=whole(1, 10_000), default=1, help="answers a question and rule, for pass@k; needs a --temperature")
    add("--model_answers", type=Path, help="of mt_bench and spec_bench: write FastChat's answer files, one a rule, here")
    add("--tp", action="store_true", help="torchrun's processes run one model together, not a share of the questions each")
    add("--part", metavar="I/N", help="answer every N-th question from the I-th on (0 to N - 1): one of N runs, for --merge N")
    tp.add_flags(parser)
    add("--merge", type=whole(1, MOST_PROCESSES), help="merge the parts of so many processes into --out, and answer nothing")
    add("--json", action="store_true", help="print the summary as one JSON object")
    args = parser.parse_args(argv)
    with tp.ranks("evaluate.py") if args.tp else nullcontext():
        run_script("evaluate.py", lambda: report(args))


if __name__ == "__main__":
    main()
