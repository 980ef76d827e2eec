"""Rules over questions: every question is answered by every rule, one engine a rule."""

import argparse
import hashlib
from typing import NamedTuple

import torch

import tp
from checkpoint import read_config
from cli import InputError, Progress, note, whole
from files import Lines
from generate import Engine, NotFinite, Settings, capacity_for, settings_of
from judge import RULES, JudgeHead, needs_judge
from model import Transformer, run_dtype
from scripts.lib.pair import load_pair, schemes_of
from scripts.lib.peers import peer
from scripts.lib.published import filters_of
from scripts.lib.results import PEERS, by_key, check_same_questions, how_made, resume
from scripts.lib.scoring import CHECKERS, Question
from scripts.lib.stops import cut
from scripts.lib.tasks import question_header
from scripts.lib.token_details import as_fields, token_details
from scripts.lib.turns import Answering, answer_turns, failed_turn, turn_ids
from tokenizer import load_tokenizer

SEEDS = 1_000_003  # between the samples of a question


class Variant(NamedTuple):
    """A rule with its threshold (None: its default) and its M (None: --speculate_k)."""

    name: str
    threshold: float | None = None
    k: int | str | None = None


def label(rule: Variant) -> str:
    return (
        rule.name
        + ("" if rule.threshold is None else f"={rule.threshold:g}")
        + (f"@{rule.k}" if rule.k else "")
    )


def read_m(word: str, m: str) -> int | str | None:
    """M of a word such as "judge@8", None where it names none."""
    if m in ("", "auto"):
        return m or None
    try:
        return whole(1, 1024)(m)
    except argparse.ArgumentTypeError:
        raise InputError(
            f"--verify {word} must name M after the @, a whole number or auto, at most 1024."
        ) from None


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
            raise InputError(
                f"--verify {name} is not a rule; known are {', '.join(('plain', *RULES, *PEERS))}."
            )
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


def settings_for(args: argparse.Namespace, rule: Variant) -> Settings:
    """The settings of the command line for one of its rules."""
    more = {"verify": rule.name, "threshold": rule.threshold, "speculate_k": rule.k or args.speculate_k}
    return settings_of(argparse.Namespace(**vars(args) | more))


def check_context(args: argparse.Namespace, parts: dict[int | str, list[list[int]]], needed: int) -> None:
    """Raises InputError where a prompt and its answers, `needed` tokens at most, do not fit the target's
    context."""
    context = read_config(args.checkpoint_path).max_position
    if needed > context:
        room = min((context - sum(map(len, each))) // len(each) for each in parts.values()) if parts else 0
        most = f"; with {room} the longest fits" if room > 0 else ""
        raise InputError(
            f"A prompt and --max_new_tokens {args.max_new_tokens} need "
            f"{needed} tokens, but the context is {context}{most}."
        )


def make_header(
    args: argparse.Namespace, target: Transformer, draft: Transformer, head: JudgeHead | None
) -> dict:
    """What a results file must agree on for a run to go on with it."""
    weights = (
        []
        if head is None
        else [w.tolist() for w in (head.weight, head.bias, head.draft_weight) if w is not None]
    )
    judge = hashlib.sha256(repr(weights).encode()).hexdigest()[:16] if weights else None
    return {
        **question_header(args),
        "chat": args.chat,
        "samples": getattr(args, "samples", 1),
        "target": target.fingerprint,
        "draft": draft.fingerprint,
        "judge": judge,
        "speculate_k": args.speculate_k,
        "temperature": args.temperature,
        **dict(zip(("top_k", "top_p", "min_p"), filters_of(args))),
        "min_prob": args.min_prob,
        "max_new_tokens": args.max_new_tokens,
        "precision": str(target.dtype).removeprefix("torch."),
        "mode": target.quantization or None,
        "draft_mode": draft.quantization or None,
        "compile": args.compile,
        "device": args.device.type,
        "torch": torch.__version__,
        **({"details": True} if getattr(args, "details", False) else {}),
    }


class Bench:
    """The pair, one engine a rule, and a file of answers that is resumed: what answers questions by several
    rules.

    args: a command line with the flags of `add_engine_flags`; args.out may be None. largest_k: of the
    variants to come. All thresholds of a rule share one engine, and all engines the weights and caches.
    """

    def __init__(
        self, args: argparse.Namespace, questions: list[Question], with_judge: bool, largest_k: int = 0
    ):
        self.args, self.tokenizer, self.engines = args, load_tokenizer(args.checkpoint_path), {}
        self.parts = {question.index: turn_ids(args, self.tokenizer, question) for question in questions}
        self.prompts = {index: parts[0] for index, parts in self.parts.items()}
        needs = (sum(map(len, parts)) + len(parts) * args.max_new_tokens for parts in self.parts.values())
        self.length = max(needs, default=args.max_new_tokens + 1)
        check_context(args, self.parts, self.length)
        # locked before there is any work
        self.lines = Lines(args.out) if args.out and tp.RANK == 0 else None
        try:
            self.load(args, with_judge, largest_k)
            records = tp.first(lambda: resume(self.lines, self.header)) if args.out else []
            self.begun = self.lines is not None and bool(self.lines.content)
            self.done = by_key(args.out, records)
            check_same_questions(args.out, self.done, questions)
            self.check_threshold()
        except BaseException:
            self.close()
            raise

    def load(self, args: argparse.Namespace, with_judge: bool, largest_k: int) -> None:
        """Loads the models, with caches for the largest M: engines come one by one, and share them."""
        judge, dtype = args.judge_path if with_judge else None, run_dtype(args.precision, args.device)
        m = max(largest_k, settings_for(args, Variant("plain")).speculate_k)
        capacity = capacity_for(self.length, m)
        self.models = load_pair(
            args.checkpoint_path,
            args.draft_checkpoint_path,
            judge,
            args.device,
            dtype,
            capacity=capacity,
            speculate_k=m,
            schemes=schemes_of(args),
            draft_tp=getattr(args, "draft_tp", None),
        )
        for model in self.models[:2]:
            if model is not None:
                model.setup_caches(capacity)

        self.header = make_header(args, *self.models)

    def check_threshold(self) -> None:
        """Raises InputError for answers of the judge at another threshold than its own of now."""
        head = self.models[2]
        mine = [
            r.get("threshold")
            for (rule, _), r in self.done.items()
            if head and needs_judge(rule.split("@")[0])
        ]
        if stale := [threshold for threshold in mine if threshold != head.threshold]:
            raise InputError(
                f"{self.args.out} holds answers at the judge's threshold "
                f"{stale[0]}, which is now {head.threshold}; remove it."
            )

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
            k = settings_for(self.args, rule).speculate_k
            self.engines[key] = peer(self.args, self.tokenizer, k if rule.name == "hf-assisted" else None)
        elif key not in self.engines:
            engine = Engine(*self.models, settings_for(self.args, rule), self.tokenizer.stop_ids, self.length)
            note(f"{label(rule)}: warmed up in {engine.warm_up():.1f} s")
            self.engines[key] = engine
        if rule.name not in PEERS and rule.name != "plain":
            self.engines[key].set_threshold(rule.threshold)
        return self.engines[key]

    def answer(self, question: Question, rule: Variant) -> dict:
        """The record of one question by one rule: from the file, or decoded now and written to it."""
        key = label(rule), question.index
        if key not in self.done:
            self.done[key] = self.decode(question, rule)
            self.write(self.done[key])
        return self.done[key]

    def decode(self, question: Question, rule: Variant) -> dict:
        """The engine's JSON record of one question by one rule, with what the checker says."""
        item, _, sample = str(question.index).partition(".")
        seed = int(item) + SEEDS * int(sample or 0)
        how = Answering(self.engine(rule), self.tokenizer, self.args.max_new_tokens, seed)
        parts = self.parts[question.index]
        try:
            record = answer_turns(how, parts, question, self.details)
            checker, text = CHECKERS[question.checker], cut(record["text"], question.stops)
            found, right = tp.first(
                lambda: (checker.final_answer(question, text), checker.is_right(question, text))
            )
        except NotFinite as error:
            record, found = failed_turn(how.engine, parts, question, str(error)), None
            right = None if question.checker == "none" else False

        reference = str(question.content.answer) if question.checker == "demo" else None
        return {
            "index": question.index,
            "rule": label(rule),
            "family": question.group,
            "right": right,
            "answer_right": right if reference is None or right is None else found == reference,
            "final_answer": found,
            "question": question.asked or question.prompt,
            **({"item": int(item)} if sample else {}),
            **record,
        }

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
