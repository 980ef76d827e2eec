"""Rules over questions: every question is answered by every rule, one engine a rule; and the rows that sum
that up."""

import argparse
import hashlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import tp
from checkpoint import read_config
from cli import InputError, Progress, note, whole
from files import Lines
from generate import Engine, NotFinite, Settings, capacity_for, settings_of
from judge import RULES, JudgeHead, needs_judge
from model import Transformer, run_dtype
from scripts.lib.intervals import interval, mcnemar, mean_interval, paired_interval, pass_at_k
from scripts.lib.pair import load_pair, schemes_of
from scripts.lib.results import PEERS, by_key, check_same_questions, how_made, resume
from scripts.lib.scoring import CHECKERS, Question
from scripts.lib.tasks import question_header
from scripts.lib.token_details import as_fields, token_details
from scripts.lib.turns import answer_turns, cut, failed_turn, turn_ids
from tokenizer import load_tokenizer

SEEDS = 1_000_003  # between the samples of a question


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


def label(rule: Variant) -> str:
    return (
        rule.name
        + ("" if rule.threshold is None else f"={rule.threshold:g}")
        + (f"@{rule.k}" if rule.k else "")
    )


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
        capacity = capacity_for(self.length, max(largest_k, settings_for(args, Variant("plain")).speculate_k))
        self.models = load_pair(
            args.checkpoint_path,
            args.draft_checkpoint_path,
            judge,
            args.device,
            dtype,
            capacity,
            schemes_of(args),
            getattr(args, "draft_tp", None),
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


def settings_for(args: argparse.Namespace, rule: Variant) -> Settings:
    """The settings of the command line for one of its rules."""
    more = {"verify": rule.name, "threshold": rule.threshold, "speculate_k": rule.k or args.speculate_k}
    return settings_of(argparse.Namespace(**vars(args) | more))


def peer(args: argparse.Namespace, rule: Variant, tokenizer):
    """transformers on the same folders: (prompt, max_new_tokens) -> (tokens, seconds of prefill, seconds of
    decoding)."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(
            f"--verify {rule.name} needs the package transformers; pip install -r requirements-dev.txt."
        ) from None
    disable_progress_bar()
    load = {"dtype": run_dtype(args.precision, args.device), "local_files_only": True}
    target = AutoModelForCausalLM.from_pretrained(args.checkpoint_path, **load).to(args.device).eval()
    more = {"do_sample": False, "eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.stop_ids[0]}
    if rule.name == "hf-assisted":
        draft = (
            AutoModelForCausalLM.from_pretrained(args.draft_checkpoint_path, **load).to(args.device).eval()
        )
        draft.generation_config.num_assistant_tokens = settings_for(args, rule).speculate_k
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        more["assistant_model"] = draft

    @torch.inference_mode()
    def run(prompt: list[int], max_new_tokens: int) -> tuple[list[int], float, float]:
        ids, seconds = torch.tensor([prompt], device=args.device), []
        # the first token alone stands for the prefill, which our figures leave out
        for length in (1, max_new_tokens):
            started = time.monotonic()
            out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **more)
            seconds.append(time.monotonic() - started)
        return out[0, len(prompt) :].tolist(), seconds[0], max(seconds[1] - seconds[0], 1e-9)

    return run


def answer(
    engine,
    rule: Variant,
    question: Question,
    parts: list[list[int]],
    args: argparse.Namespace,
    tokenizer,
    more: Callable,
) -> dict:
    """One question by one rule: the engine's JSON record with what the checker says. parts, more: see
    `answer_turns`."""
    item, _, sample = str(question.index).partition(".")
    seed = int(item) + SEEDS * int(sample or 0)
    try:
        record = answer_turns(engine, parts, question, args.max_new_tokens, seed, tokenizer, more)
        checker, text = CHECKERS[question.checker], cut(record["text"], question.stops)
        found, right = tp.first(
            lambda: (checker.final_answer(question, text), checker.is_right(question, text))
        )
    except NotFinite as error:
        record, found = failed_turn(engine, parts, question, str(error)), None
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


def summarise(records: list[dict], rules: list[str]) -> list[dict]:
    """One row a rule: n, accuracy with its interval, the same by family, m*, tokens/s, and what is different
    from plain.

    With several samples a question its accuracy is the share that is right, and pass@k is given. Accuracy is
    None where a checker knows no right and wrong. The difference to plain is on the questions that both
    answered.
    """
    rows, shares = [], {rule: shares_of(records, rule) for rule in rules}
    for rule in rules:
        mine = [record for record in records if record["rule"] == rule]
        rounds, drafted = sum(r["rounds"] for r in mine), sum(r["drafted"] for r in mine)
        tokens = sum(len(r["tokens"]) for r in mine)
        timed = tokens - len(mine) * (rule in PEERS)  # the peers' first token counts as prefill
        seconds, failed = sum(r["seconds_decode"] for r in mine), sum("failed" in r for r in mine)
        row = {
            "rule": rule,
            "n": len({r.get("item", r["index"]) for r in mine}),
            **accuracy_of(mine, shares[rule]),
        }
        row |= {
            "mean_accepted": sum(r["accepted"] for r in mine) / rounds if drafted else None,
            "by_rule_share": sum(r["accepted_by_rule"] for r in mine) / tokens if tokens else 0.0,
            "tokens_per_second": timed / seconds if seconds else 0.0,
            **({"failed": failed} if failed else {}),
        }
        rows.append(row)
    plain = next((row for row in rows if row["rule"] == "plain"), None)
    for row in rows:
        row["ratio"] = (
            row["tokens_per_second"] / plain["tokens_per_second"]
            if plain and plain["tokens_per_second"]
            else None
        )
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
    """Accuracy, its interval (Wilson's, or with several samples the normal one over items), by family, and
    pass@k."""
    if not shares:
        return {
            "accuracy": None,
            "interval": None,
            "by_family": {},
            "answer_accuracy": None,
            "answer_interval": None,
        }
    means = [sum(rights) / len(rights) for rights in shares.values()]
    samples = min(map(len, shares.values()))
    records = [record for record in records if record["right"] is not None]
    families = {
        f: [r["right"] for r in records if r["family"] == f] for f in sorted({r["family"] for r in records})
    }
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
        return {
            "difference": sum(changes) / len(changes),
            "difference_interval": list(mean_interval(changes)),
        }
    won, lost, right = changes.count(1), changes.count(-1), sum(a[0] and b[0] for a, b in both)
    return {
        "difference": (won - lost) / len(both),
        "lost": lost,
        "won": won,
        "p_value": mcnemar(won, lost),
        "difference_interval": list(paired_interval(right, won, lost, len(both) - right - won - lost)),
    }


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
        "top_k": args.top_k,
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
