"""Calibration: the walk over a rule's thresholds to the loosest whose harm is bounded with confidence.

Harm is counted on questions, which plain decoding and the rule answer, or on labelled answers, which the
judge alone reads. scripts/calibrate.py is the command, and says what the bound means.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cli import InputError, Progress, note
from judge import RULES, JudgeHead, load_judge, needs_judge
from model import run_dtype
from quantize import load_model
from scripts.lib.answers import encode_items, prompt_key, read_answers
from scripts.lib.bench import Bench, Variant
from scripts.lib.features import extract_features
from scripts.lib.guarantee import MOST_SHOWN, conditions, kind_of, live_statistics
from scripts.lib.intervals import upper_bound
from scripts.lib.pair import schemes_of
from scripts.lib.result import Result
from scripts.lib.scoring import Question
from tokenizer import load_tokenizer


def most_harms(n: int, max_harm: float, confidence: float) -> int:
    """The largest number of harms of n whose upper bound is within max_harm; -1 when not even none is."""
    fits, fails = -1, n
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if upper_bound(middle, n, confidence) <= max_harm else (fits, middle)
    return fits


def least_n(harms: int, max_harm: float, confidence: float) -> int:
    """The fewest units of which so many may be harmed."""
    low = n = harms + 1  # of which all harmed, so that the bound is 1
    while upper_bound(harms, n, confidence) > max_harm:
        low, n = n, 2 * n
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (low, middle) if upper_bound(harms, middle, confidence) <= max_harm else (middle, n)
    return n


def fixed_sequence(
    walk: list[float], harms_at: Callable[[float, int], int], n: int, max_harm: float, confidence: float
) -> list:
    """Tests thresholds in the order given until one fails; returns [(threshold, harms)] of those that passed.

    harms_at(threshold, limit) counts the harms among the n units, and may stop counting beyond limit. Source:
    fixed sequence testing in Learn then Test (arXiv 2110.01052, section 3.2): the chance that any that passed
    is in truth above max_harm is at most 1 - confidence.
    """
    limit, passed = most_harms(n, max_harm, confidence), []
    for threshold in walk:
        harms = harms_at(threshold, limit) if limit >= 0 else n
        if harms > limit:
            break
        passed.append((threshold, harms))
    return passed


def figures(passed: list[tuple[float, int]], n: int, confidence: float) -> dict:
    """What a walk found: the loosest threshold that passed, all that passed, and the bound at the loosest."""
    threshold, harms = passed[-1] if passed else (None, None)
    return {
        "threshold": threshold,
        "passed": [t for t, _ in passed],
        "harms": harms,
        "n": n,
        "confidence": confidence,
        "bound": upper_bound(harms, n, confidence) if passed else None,
    }


def has_ended(question: Question, record: dict) -> bool:
    """Whether an answer came to its own end: neither cut off nor failed."""
    stopped = record.get("stop_reason", "stop") == "stop"
    return stopped or any(stop in record["text"] for stop in question.stops)


def is_harmed(question: Question, plain: dict, ours: dict) -> bool:
    """Whether plain decoding is right and the rule wrong, or would be with the answers' missing ends at their
    worst."""
    may_be_right = plain["right"] or not has_ended(question, plain)
    return may_be_right and not (ours["right"] and has_ended(question, ours))


def count_harms(bench: Bench, questions: list[Question], rule: Variant, limit: int) -> tuple[int, int]:
    """(questions harmed, those of them that an answer cut off or failed makes so). Stops beyond `limit`."""
    harms = cut_off = 0
    progress = Progress(f"{rule.name}={rule.threshold:g}", len(questions))
    for question in questions:
        plain, ours = bench.answer(question, Variant("plain")), bench.answer(question, rule)
        if is_harmed(question, plain, ours):
            harms += 1
            cut_off += not (plain["right"] and has_ended(question, ours))
        if harms > limit:  # fails already
            break
        progress.step()

    state = f"more than {limit}" if harms > limit else f"{harms}"
    ends = f", {cut_off} of them because an answer was cut off or failed" if cut_off else ""
    note(f"{RULES[rule.name].knob} {rule.threshold:g}: {state} of {len(questions)} harmed{ends}")
    return harms, cut_off


def by_generating(
    args: argparse.Namespace, walk: list[float], questions: list[Question]
) -> tuple[dict, JudgeHead | None]:
    """Calibrates args.verify on questions: what is to be written, and the judge if there is one.

    args: a command line with the flags of `add_engine_flags` and `add_question_flags`, and verify, max_harm,
    confidence, answers (the file that keeps them).
    """
    if most_harms(len(questions), args.max_harm, args.confidence) < 0:  # no need to load or decode anything
        return {"max_harm": args.max_harm, **figures([], len(questions), args.confidence)}, None
    bench_args = argparse.Namespace(**vars(args) | {"out": args.answers})
    bench = Bench(bench_args, questions, needs_judge(args.verify))
    head, cut_off = bench.models[2], {}
    questions = without_trained(questions, bench, head)

    def harms_at(threshold: float, limit: int) -> int:
        rule = Variant(args.verify, threshold)
        harms, cut_off[threshold] = count_harms(bench, questions, rule, limit)
        return harms

    passed = fixed_sequence(walk, harms_at, len(questions), args.max_harm, args.confidence)
    result = {"kind": "harm", "max_harm": args.max_harm, **figures(passed, len(questions), args.confidence)}
    result["data"] = hashlib.sha256("".join(question.id for question in questions).encode()).hexdigest()[:16]
    result |= described(args, [question.asked or question.prompt for question in questions])
    engine = bench.engine(Variant(args.verify, walk[0]))
    result["conditions"] = conditions(engine, args.chat, args.max_new_tokens, args.speculate_k)
    if passed:
        mine = [bench.answer(question, Variant(args.verify, passed[-1][0])) for question in questions]
        plain = [bench.answer(question, Variant("plain")) for question in questions]
        result |= {"cut_off": cut_off[passed[-1][0]], **totals(mine, plain)}
    return result, head


def totals(mine: list[dict], plain: list[dict]) -> dict:
    """What the records of the rule say in sum, beside those of plain decoding. Raises InputError where those
    are all wrong."""
    if not any(record["right"] for record in plain):
        raise InputError(
            "Plain decoding has none of these questions right, so that no rule could harm one; "
            "look at --checker and --max_new_tokens."
        )
    return {
        "live": live_ranges(mine),
        "mean_accepted": sum(r["accepted"] for r in mine) / max(1, sum(r["rounds"] for r in mine)),
        "plain_right": sum(r["right"] for r in plain),
        "right": sum(r["right"] for r in mine),
    }


def live_ranges(records: list[dict]) -> dict[str, list[float]]:
    """Mean and standard deviation over the answers of each live statistic, which the engine watches."""
    columns: dict[str, list[float]] = {}
    for record in records:
        result = Result(0, tokens=record["tokens"], origin=["r"] * record["accepted_by_rule"])
        if record["mean_score"] is not None:
            result.score, result.scored = record["mean_score"], 1
        for name, value in live_statistics(result).items():
            columns.setdefault(name, []).append(value)
    tensors = {name: torch.tensor(values) for name, values in columns.items() if len(values) > 1}
    return {name: [x.mean().item(), x.std().item()] for name, x in tensors.items()}


def without_trained(questions: list[Question], bench: Bench, head: JudgeHead | None) -> list[Question]:
    """The questions that the judge was not trained on: on the others it looks better than it is."""
    if head is None:
        return questions
    known = set(head.trained_on.tolist())
    kept = [question for question in questions if prompt_key(bench.prompts[question.index]) not in known]
    if len(kept) < len(questions):
        left_out = len(questions) - len(kept)
        print(f"left out {left_out} questions that the judge was trained on", file=sys.stderr)
    if not kept:
        raise InputError("The judge was trained on all of these questions; calibrate it on others.")
    return kept


def by_labels(args: argparse.Namespace, walk: list[float]) -> tuple[dict, JudgeHead]:
    """Calibrates the judge on labelled answers that hold a mistake; the unit is the prompt, with all its
    answers. args: as of `by_generating`, with data, label_policy and max_false_accept."""
    answers, tokenizer = read_answers(args.data), load_tokenizer(args.checkpoint_path)
    dtype = run_dtype(args.precision, args.device)
    folders = zip((args.checkpoint_path, args.draft_checkpoint_path), schemes_of(args))
    target, draft = (load_model(folder, args.device, dtype, scheme) for folder, scheme in folders)
    head = load_judge(args.judge_path, target, draft)
    known = set(head.trained_on.tolist())
    encoded = encode_items(tokenizer, answers, args.chat, target.args.vocab_size)
    encoded = [a for a in encoded if a.key not in known and 0 in a.labels(args.label_policy)]
    if not encoded:
        raise InputError(
            f"{args.data} has no answer with a wrong token, to a prompt that the judge was not trained on."
        )

    models = [target] if head.draft_weight is None else [target, draft]
    shards = extract_features(models, encoded, args.speculate_k + 1, args.answers)
    weight = head.weight if head.draft_weight is None else torch.cat([head.weight, head.draft_weight])
    scores = torch.cat([torch.sigmoid(x @ weight.cpu() + head.bias.cpu()) for x in shards])
    wrong = shards.labels(encoded, args.label_policy) == 0
    keys = torch.tensor([answer.key for answer in encoded])
    n = len(keys.unique())

    def harms_at(threshold: float, limit: int) -> int:
        harms = len(keys[shards.answer[wrong & (scores > threshold)]].unique())
        knob = RULES[args.verify].knob
        print(f"{knob} {threshold:g}: {harms} of {n} prompts with a wrong token let through", file=sys.stderr)
        return harms

    share = args.max_false_accept
    passed = fixed_sequence(walk, harms_at, n, share, args.confidence)
    result = {"kind": "false_accept", "max_harm": share, **figures(passed, n, args.confidence)}
    result["data"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    prompts = dict.fromkeys(answer.item["prompt"] for answer in encoded if "prompt" in answer.item)
    result |= described(args, list(prompts))
    result["conditions"] = {
        "verify": args.verify,
        "target": target.fingerprint,
        "chat": args.chat,
        "dtype": kind_of(target),
    }
    if head.draft_weight is not None:
        result["conditions"]["draft"] = " ".join(filter(None, (draft.fingerprint, draft.quantization)))
    return result, head


def described(args: argparse.Namespace, prompts: list[str]) -> dict:
    """What says of which questions a bound holds: where they are from, and three of them, shortened."""
    name = Path(args.questions).name if args.questions else args.task or "demo"
    name += f", {args.data.name}" if args.data else ""
    chosen = sorted({0, len(prompts) // 2, len(prompts) - 1}) if prompts else []
    lines = [" ".join(prompts[at].split()) for at in chosen]
    short = [line if len(line) <= 100 else line[:60] + "..." + line[-37:] for line in lines]
    return {"questions": name[:MOST_SHOWN], "examples": short}
