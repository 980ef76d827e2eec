"""The loosest threshold of a rule whose harm is bounded with confidence, on questions like those that will be asked.

    python judge.py calibrate --verify judge --max_harm 0.02 --questions demo --limit 500 --seed 7 --compile
    python judge.py calibrate --verify kl --max_harm 0.02 --questions gsm8k.jsonl --checker number --out kl.json
    python judge.py calibrate --verify judge --max_false_accept 0.05 --data annotated.jsonl

Judge decoding gives up speculative decoding's promise of the target's own output. This gives another one back: "with 95%
confidence, at most 2% of questions like these are answered wrong because of the rule". Harm is a question that plain
decoding answers right and the rule wrong. Thresholds are walked from the strictest to the loosest, each is tested with
the exact binomial (Clopper-Pearson) bound, and the walk stops at the first that fails: testing in a fixed order needs no
correction for the number of thresholds (Learn then Test, arXiv 2110.01052), whereas picking the best one afterwards
would void the bound.

--max_false_accept is the cheap form, without generating: of the prompts whose labelled answers (--data) hold a mistake,
the share in which the judge alone would let a wrong token through.

For the judge the result goes into its file (or a copy of it, --out), for other rules into --out (JSON), which
generate.py --calibration reads. If no threshold qualifies, that is said, nothing is written, and the exit code is 1.
Answers are kept in --answers, and a killed run resumes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from files import check_writable, write_file
from generate import Result, check_settings, conditions, kind_of, live_statistics
from judge import (
    LABEL_POLICIES,
    RULES,
    JudgeHead,
    TrainSettings,
    check_threshold,
    encode_items,
    extract_features,
    load_judge,
    prompt_key,
    read_answers,
    read_calibration,
)
from model import pick_device, run_dtype
from quantize import load_model
from scripts.evaluate import Bench, Variant, add_engine_flags, name_models, schemes_of, settings_for
from scripts.scoring import Question
from scripts.tasks import add_question_flags, questions_of
from tokenizer import load_tokenizer


def upper_bound(harms: int, n: int, confidence: float) -> float:
    """Clopper-Pearson's upper bound of a share: the largest p for which at most `harms` of n is not too unlikely."""
    if harms >= n:
        return 1.0
    choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(harms + 1)]
    low, high = harms / n, 1.0
    for _ in range(60):  # bisection
        p = (low + high) / 2
        at_most = sum(math.exp(c + k * math.log(p) + (n - k) * math.log1p(-p)) for k, c in enumerate(choose)) if p < 1 else 0
        low, high = (p, high) if at_most > 1 - confidence else (low, p)
    return high


def most_harms(n: int, max_harm: float, confidence: float) -> int:
    """The largest number of harms of n whose upper bound is within max_harm; -1 when not even none is."""
    harms = -1
    while harms + 1 < n and upper_bound(harms + 1, n, confidence) <= max_harm:
        harms += 1
    return harms


def fixed_sequence(
    walk: list[float], harms_at: Callable[[float, int], int], n: int, max_harm: float, confidence: float
) -> list:
    """Tests thresholds in the order given until one fails; returns [(threshold, harms)] of those that passed.

    harms_at(threshold, limit) counts the harms among the n units, and may stop counting beyond limit. Source: fixed
    sequence testing in Learn then Test (arXiv 2110.01052, section 3.2): the chance that any that passed is in truth above
    max_harm is at most 1 - confidence.
    """
    limit, passed = most_harms(n, max_harm, confidence), []
    for threshold in walk:
        harms = harms_at(threshold, limit) if limit >= 0 else n
        if harms > limit:
            break
        passed.append((threshold, harms))
    return passed


def by_generating(args: argparse.Namespace, walk: list[float]) -> tuple[dict, JudgeHead | None]:
    """Calibrates on questions; what is to be written, and the judge if there is one."""
    questions = questions_of(args)
    bench = Bench(argparse.Namespace(**vars(args) | {"out": args.answers}), questions, args.verify == "judge")
    head = bench.models[2]
    questions = without_trained(questions, bench, head)

    def harms_at(threshold: float, limit: int) -> int:
        harms, progress = 0, Progress(f"{args.verify}={threshold:g}", len(questions))
        for question in questions:
            plain, ours = bench.answer(question, Variant("plain")), bench.answer(question, Variant(args.verify, threshold))
            harms += plain["right"] and not ours["right"]
            if harms > limit:  # fails already
                break
            progress.step()
        state = f"more than {limit}" if harms > limit else f"{harms}"
        print(f"{RULES[args.verify].knob} {threshold:g}: {state} of {len(questions)} harmed", file=sys.stderr)
        return harms

    passed = fixed_sequence(walk, harms_at, len(questions), args.max_harm, args.confidence)
    result = {"kind": "harm", "max_harm": args.max_harm, **figures(passed, len(questions), args.confidence)}
    result["data"] = hashlib.sha256("".join(question.id for question in questions).encode()).hexdigest()[:16]
    engine = bench.engine(Variant(args.verify, walk[0]))
    result["conditions"] = conditions(engine, args.chat, args.max_new_tokens, args.speculate_k)
    if passed:
        mine = [bench.answer(question, Variant(args.verify, passed[-1][0])) for question in questions]
        plain = [bench.answer(question, Variant("plain")) for question in questions]
        if not any(record["right"] for record in plain):
            raise InputError("Plain decoding has none of these questions right, so that no rule could harm one; "
                             "look at --checker and --max_new_tokens.")  # fmt: skip
        result |= {
            "live": live_ranges(mine),
            "mean_accepted": sum(r["accepted"] for r in mine) / sum(r["rounds"] for r in mine),
            "plain_right": sum(r["right"] for r in plain),
            "right": sum(r["right"] for r in mine),
        }
    return result, head


def without_trained(questions: list[Question], bench: Bench, head: JudgeHead | None) -> list[Question]:
    """The questions that the judge was not trained on: on the others it looks better than it is."""
    if head is None:
        return questions
    known = set(head.trained_on.tolist())
    kept = [question for question in questions if prompt_key(bench.prompts[question.index]) not in known]
    if len(kept) < len(questions):
        print(f"left out {len(questions) - len(kept)} questions that the judge was trained on", file=sys.stderr)
    if not kept:
        raise InputError("The judge was trained on all of these questions; calibrate it on others.")
    return kept


def figures(passed: list[tuple[float, int]], n: int, confidence: float) -> dict:
    """What a walk found: the loosest threshold that passed, all that passed, and the bound at the loosest."""
    threshold, harms = passed[-1] if passed else (None, None)
    return {"threshold": threshold, "passed": [t for t, _ in passed], "harms": harms, "n": n, "confidence": confidence,
            "bound": upper_bound(harms, n, confidence) if passed else None}  # fmt: skip


def live_ranges(records: list[dict]) -> dict[str, list[float]]:
    """Mean and standard deviation over the answers of each live statistic, which the engine watches."""
    columns: dict[str, list[float]] = {}
    for record in records:
        result = Result(0, tokens=record["tokens"], origin=["r"] * record["accepted_by_rule"])
        if record["mean_score"] is not None:
            result.score, result.scored = record["mean_score"], 1
        for name, value in live_statistics(result).items():
            columns.setdefault(name, []).append(value)
    return {name: [torch.tensor(x).mean().item(), torch.tensor(x).std().item()] for name, x in columns.items() if len(x) > 1}


def by_labels(args: argparse.Namespace, walk: list[float]) -> tuple[dict, JudgeHead]:
    """Calibrates the judge on labelled answers that hold a mistake; the unit is the prompt, with all its answers."""
    answers, tokenizer = read_answers(args.data), load_tokenizer(args.checkpoint_path)
    dtype = run_dtype(args.precision, args.device)
    folders = args.checkpoint_path, args.draft_checkpoint_path
    target, draft = (load_model(folder, args.device, dtype, scheme) for folder, scheme in zip(folders, schemes_of(args)))
    head = load_judge(args.judge_path, target, draft)
    known = set(head.trained_on.tolist())
    encoded = [a for a in encode_items(tokenizer, answers, args.chat, target.args.vocab_size) if a.key not in known]
    encoded = [answer for answer in encoded if 0 in answer.labels(args.label_policy)]
    if not encoded:
        raise InputError(f"{args.data} has no answer with a wrong token, to a prompt that the judge was not trained on.")
    models = [target] if head.draft_weight is None else [target, draft]
    shards = extract_features(models, encoded, args.speculate_k + 1, args.answers)
    weight = head.weight if head.draft_weight is None else torch.cat([head.weight, head.draft_weight])
    scores = torch.cat([torch.sigmoid(x @ weight.cpu() + head.bias.cpu()) for x in shards])
    labels = [answer.labels(args.label_policy) for answer in encoded]
    wrong = torch.tensor([labels[a][place] == 0 for a, place in zip(shards.answer.tolist(), shards.place.tolist())])

    keys = torch.tensor([answer.key for answer in encoded])
    n = len(keys.unique())

    def harms_at(threshold: float, limit: int) -> int:
        harms = len(keys[shards.answer[wrong & (scores > threshold)]].unique())
        print(f"delta {threshold:g}: {harms} of {n} prompts with a wrong token let through", file=sys.stderr)
        return harms

    passed = fixed_sequence(walk, harms_at, n, args.max_false_accept, args.confidence)
    result = {"kind": "false_accept", "max_harm": args.max_false_accept, **figures(passed, n, args.confidence)}
    result["data"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    result["conditions"] = {"verify": "judge", "target": target.fingerprint, "chat": args.chat,
                            "dtype": kind_of(target)}  # fmt: skip
    return result, head


def walk_of(args: argparse.Namespace) -> list[float]:
    """The thresholds to walk, as given or the rule's own. Raises InputError when they are out of range or out of order."""
    rule = RULES[args.verify]
    try:
        walk = [float(part) for part in args.walk.split(",")] if args.walk else list(rule.walk)
    except ValueError:
        raise InputError(
            f"--walk {args.walk} must be numbers with commas between, from the strictest to the loosest."
        ) from None
    for threshold in walk:
        check_threshold(args.verify, threshold, "--walk")
    order = sorted(set(walk), reverse=rule.walk[0] > rule.walk[-1])
    if walk != order:
        raise InputError(
            f"--walk must go from the strictest {rule.knob} to the loosest, which is {','.join(f'{t:g}' for t in order)}."
        )
    return walk


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot run, before anything is loaded; fills in where things are kept."""
    args.device = pick_device(args.device)
    name_models(args)
    if (args.max_harm is None) == (args.max_false_accept is None):
        raise InputError("Give one of --max_harm (on questions) and --max_false_accept (on labelled answers).")
    share = args.max_harm if args.max_false_accept is None else args.max_false_accept
    for name, value in (("--max_harm or --max_false_accept", share), ("--confidence", args.confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} {value} must be between 0 and 1.")
    if args.max_false_accept is not None and (args.verify != "judge" or args.data is None or args.speculate_k == "auto"):
        raise InputError("--max_false_accept is for --verify judge, with --data and a fixed --speculate_k.")
    if args.verify == "judge" and not (args.judge_path and args.judge_path.is_file()):
        raise InputError(
            f"There is no judge file {args.judge_path}; train one with judge.py train or name another --judge_path."
        )
    if args.max_harm is not None and args.speculate_k == "auto":
        raise InputError("A bound needs a fixed --speculate_k: with auto the output depends on the machine's timing.")
    if args.verify != "judge" and args.out is not None and args.out.exists():
        read_calibration(args.out)  # nothing else is overwritten
    if args.out is None and args.verify != "judge":
        raise InputError(f"--verify {args.verify} needs --out, a JSON file for generate.py --calibration.")
    args.out = args.out or args.judge_path
    if args.verify == "judge" and args.out.suffix != ".safetensors":
        raise InputError(f"--out {args.out} will be a judge's file with its calibration in it; name it *.safetensors.")
    check_writable(args.out, "--out")
    args.answers = args.answers or args.out.with_name(
        f"{args.out.name}.{'features' if args.max_harm is None else 'answers.jsonl'}"
    )
    if args.max_harm is not None:
        check_writable(args.answers, "--answers")
    check_settings(settings_for(args, Variant(args.verify)), True, True)


def calibrate(args: argparse.Namespace) -> dict:
    """Walks, prints what was found, writes it, and returns it."""
    check_args(args)
    walk = walk_of(args)
    result, head = by_labels(args, walk) if args.max_harm is None else by_generating(args, walk)
    event = "harmed" if args.max_false_accept is None else "with a wrong token let through"
    what = f"at most {100 * result['max_harm']:.6g}% {event} with {100 * args.confidence:.6g}% confidence"
    if result["threshold"] is None:
        least = math.ceil(math.log(1 - args.confidence) / math.log1p(-result["max_harm"]))
        print(f"No threshold of {args.verify} qualifies: {what}, on {result['n']} (without a single harm it takes {least}); "
              "nothing is written.")  # fmt: skip
        return result
    knob = RULES[args.verify].knob
    print(f"{args.verify}: {what} up to {knob} {result['threshold']:g} "
          f"({result['harms']} of {result['n']}, upper bound {result['bound']:.2%})")  # fmt: skip
    if head is not None:
        replace(head, threshold=result["threshold"], info=head.info | {"calibration": result}).save(args.out)
    else:
        write_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--verify", choices=[name for name in RULES if name != "standard"], default="judge", help="the rule to calibrate")
    add("--max_harm", type=float, help="largest share of questions that may be answered wrong because of the rule")
    add("--max_false_accept", type=float, help="instead: largest share of wrong answers with a wrong token let through")
    add("--confidence", type=float, default=0.95)
    add("--walk", help="thresholds from the strictest to the loosest, with commas between (default: the rule's own)")
    add("--label_policy", choices=LABEL_POLICIES, default=TrainSettings.policy, help="which tokens of --data count as wrong")
    add("--out", type=Path, help="what to write: a judge (default: --judge_path itself) or, for another rule, JSON")
    add("--answers", type=Path, help="where answers are kept, and resumed from (default: beside --out)")
    add_question_flags(add)
    add_engine_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    result = {}
    run_script("judge.py calibrate", lambda: result.update(calibrate(args)))
    if result["threshold"] is None:
        sys.exit(1)


if __name__ == "__main__":
    main()
