"""The walk over thresholds that finds the loosest one whose harm is bounded."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import read_safetensors
from cli import InputError, Parser, Progress, note, number, shortened
from files import check_folder, check_not_input, check_writable, write_file
from judge import LABEL_POLICIES, RULES, JudgeHead, check_threshold, load_judge
from model import pick_device, run_dtype
from quantize import load_model
from scripts.lib.answers import encode_items, prompt_key, read_answers
from scripts.lib.bench import Bench, Variant, settings_for
from scripts.lib.features import extract_features
from scripts.lib.flags import add_engine_flags
from scripts.lib.guarantee import MOST_SHOWN, conditions, kind_of, live_statistics, read_calibration
from scripts.lib.intervals import upper_bound
from scripts.lib.pair import check_settings, files_in, name_models, schemes_of
from scripts.lib.result import Result
from scripts.lib.scoring import Question
from scripts.lib.tasks import add_question_flags, questions_of
from scripts.lib.training import TrainSettings
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


def has_ended(question: Question, record: dict) -> bool:
    """Whether an answer came to its own end: neither cut off nor failed."""
    return record.get("stop_reason", "stop") == "stop" or any(
        stop in record["text"] for stop in question.stops
    )


def is_harmed(question: Question, plain: dict, ours: dict) -> bool:
    """Whether plain decoding is right and the rule wrong, or would be with the answers' missing ends at their
    worst."""
    may_be_right = plain["right"] or not has_ended(question, plain)
    return may_be_right and not (ours["right"] and has_ended(question, ours))


def by_generating(
    args: argparse.Namespace, walk: list[float], questions: list[Question]
) -> tuple[dict, JudgeHead | None]:
    """Calibrates on questions; what is to be written, and the judge if there is one."""
    bench = Bench(argparse.Namespace(**vars(args) | {"out": args.answers}), questions, args.verify == "judge")
    head = bench.models[2]
    questions, cut_off = without_trained(questions, bench, head), {}

    def harms_at(threshold: float, limit: int) -> int:
        harms, cut_off[threshold] = 0, 0
        progress = Progress(f"{args.verify}={threshold:g}", len(questions))
        for question in questions:
            plain, ours = (
                bench.answer(question, Variant("plain")),
                bench.answer(question, Variant(args.verify, threshold)),
            )
            if is_harmed(question, plain, ours):
                harms, cut_off[threshold] = (
                    harms + 1,
                    cut_off[threshold] + (not (plain["right"] and has_ended(question, ours))),
                )
            if harms > limit:  # fails already
                break
            progress.step()
        state = f"more than {limit}" if harms > limit else f"{harms}"
        ends = (
            f", {cut_off[threshold]} of them because an answer was cut off or failed"
            if cut_off[threshold]
            else ""
        )
        note(f"{RULES[args.verify].knob} {threshold:g}: {state} of {len(questions)} harmed{ends}")
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
        if not any(record["right"] for record in plain):
            raise InputError(
                "Plain decoding has none of these questions right, so that no rule could harm "
                "one; "
                "look at --checker and --max_new_tokens."
            )
        result |= {
            "cut_off": cut_off[passed[-1][0]],
            "live": live_ranges(mine),
            "mean_accepted": sum(r["accepted"] for r in mine) / max(1, sum(r["rounds"] for r in mine)),
            "plain_right": sum(r["right"] for r in plain),
            "right": sum(r["right"] for r in mine),
        }
    return result, head


def described(args: argparse.Namespace, prompts: list[str]) -> dict:
    """What says of which questions a bound holds: where they are from, and three of them, shortened."""
    name = Path(args.questions).name if args.questions else args.task or "demo"
    name += f", {args.data.name}" if args.data else ""
    lines = [
        " ".join(prompts[at].split()) for at in sorted({0, len(prompts) // 2, len(prompts) - 1}) if prompts
    ]
    short = [line if len(line) <= 100 else line[:60] + "..." + line[-37:] for line in lines]
    return {"questions": name[:MOST_SHOWN], "examples": short}


def without_trained(questions: list[Question], bench: Bench, head: JudgeHead | None) -> list[Question]:
    """The questions that the judge was not trained on: on the others it looks better than it is."""
    if head is None:
        return questions
    known = set(head.trained_on.tolist())
    kept = [question for question in questions if prompt_key(bench.prompts[question.index]) not in known]
    if len(kept) < len(questions):
        print(
            f"left out {len(questions) - len(kept)} questions that the judge was trained on", file=sys.stderr
        )
    if not kept:
        raise InputError("The judge was trained on all of these questions; calibrate it on others.")
    return kept


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


def live_ranges(records: list[dict]) -> dict[str, list[float]]:
    """Mean and standard deviation over the answers of each live statistic, which the engine watches."""
    columns: dict[str, list[float]] = {}
    for record in records:
        result = Result(0, tokens=record["tokens"], origin=["r"] * record["accepted_by_rule"])
        if record["mean_score"] is not None:
            result.score, result.scored = record["mean_score"], 1
        for name, value in live_statistics(result).items():
            columns.setdefault(name, []).append(value)
    return {
        name: [torch.tensor(x).mean().item(), torch.tensor(x).std().item()]
        for name, x in columns.items()
        if len(x) > 1
    }


def by_labels(args: argparse.Namespace, walk: list[float]) -> tuple[dict, JudgeHead]:
    """Calibrates the judge on labelled answers that hold a mistake; the unit is the prompt, with all its
    answers."""
    answers, tokenizer = read_answers(args.data), load_tokenizer(args.checkpoint_path)
    dtype = run_dtype(args.precision, args.device)
    folders = args.checkpoint_path, args.draft_checkpoint_path
    target, draft = (
        load_model(folder, args.device, dtype, scheme) for folder, scheme in zip(folders, schemes_of(args))
    )
    head = load_judge(args.judge_path, target, draft)
    known = set(head.trained_on.tolist())
    encoded = [
        a for a in encode_items(tokenizer, answers, args.chat, target.args.vocab_size) if a.key not in known
    ]
    encoded = [answer for answer in encoded if 0 in answer.labels(args.label_policy)]
    if not encoded:
        raise InputError(
            f"{args.data} has no answer with a wrong token, to a prompt that the judge was not trained on."
        )
    models = [target] if head.draft_weight is None else [target, draft]
    shards = extract_features(models, encoded, args.speculate_k + 1, args.answers)
    weight = head.weight if head.draft_weight is None else torch.cat([head.weight, head.draft_weight])
    scores = torch.cat([torch.sigmoid(x @ weight.cpu() + head.bias.cpu()) for x in shards])
    labels = [answer.labels(args.label_policy) for answer in encoded]
    wrong = torch.tensor(
        [labels[a][place] == 0 for a, place in zip(shards.answer.tolist(), shards.place.tolist())]
    )

    keys = torch.tensor([answer.key for answer in encoded])
    n = len(keys.unique())

    def harms_at(threshold: float, limit: int) -> int:
        harms = len(keys[shards.answer[wrong & (scores > threshold)]].unique())
        print(f"delta {threshold:g}: {harms} of {n} prompts with a wrong token let through", file=sys.stderr)
        return harms

    passed = fixed_sequence(walk, harms_at, n, args.max_false_accept, args.confidence)
    result = {
        "kind": "false_accept",
        "max_harm": args.max_false_accept,
        **figures(passed, n, args.confidence),
    }
    result["data"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    result |= described(
        args, list(dict.fromkeys(answer.item["prompt"] for answer in encoded if "prompt" in answer.item))
    )
    result["conditions"] = {"verify": "judge", "target": target.fingerprint, "chat": args.chat,
                            "dtype": kind_of(target)}  # fmt: skip
    if head.draft_weight is not None:
        result["conditions"]["draft"] = " ".join(filter(None, (draft.fingerprint, draft.quantization)))
    return result, head


def walk_of(args: argparse.Namespace) -> list[float]:
    """The thresholds to walk, as given or the rule's own. Raises InputError when they are out of range or out
    of order."""
    rule = RULES[args.verify]
    try:
        walk = [float(part) for part in args.walk.split(",")] if args.walk is not None else list(rule.walk)
    except ValueError:
        raise InputError(
            f"--walk {shortened(args.walk)} must be numbers with commas between, from the strictest to the "
            f"loosest."
        ) from None
    for threshold in walk:
        check_threshold(args.verify, threshold, "--walk")
    order = sorted(set(walk), reverse=rule.walk[0] > rule.walk[-1])
    if walk != order:
        raise InputError(
            f"--walk must go from the strictest {rule.knob} to the loosest, which is "
            f"{','.join(f'{t:g}' for t in order)}."
        )
    return walk


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot run, before anything is loaded; fills in where things are kept."""
    args.device = pick_device(args.device)
    name_models(args)
    if (args.max_harm is None) == (args.max_false_accept is None):
        raise InputError(
            "Give one of --max_harm (on questions) and --max_false_accept (on labelled answers)."
        )
    if args.max_false_accept is not None and (
        args.verify != "judge" or args.data is None or args.speculate_k == "auto"
    ):
        raise InputError("--max_false_accept is for --verify judge, with --data and a fixed --speculate_k.")
    if args.verify == "judge" and not (args.judge_path and args.judge_path.is_file()):
        raise InputError(
            f"There is no judge file {args.judge_path}; train one with judge.py train or name another "
            f"--judge_path."
        )
    if args.max_harm is not None and args.speculate_k == "auto":
        raise InputError(
            "A bound needs a fixed --speculate_k: with auto the output depends on the machine's timing."
        )
    if args.out is None and args.verify != "judge":
        raise InputError(f"--verify {args.verify} needs --out, a JSON file for generate.py --calibration.")
    check_outputs(args)
    check_settings(settings_for(args, Variant(args.verify)), True, True)


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError where --out or --answers cannot be written, or would replace something else."""
    args.out = args.out or args.judge_path
    if args.verify == "judge" and args.out.suffix != ".safetensors":
        raise InputError(
            f"--out {args.out} will be a judge's file with its calibration in it; name it *.safetensors."
        )
    check_writable(args.out, "--out")
    named = [args.data, args.shots_data, Path(args.questions) if args.questions else None]
    inputs = [*filter(None, named), *files_in([args.checkpoint_path, args.draft_checkpoint_path])]
    check_not_input(args.out, inputs)
    if args.out.exists() and args.verify != "judge":
        read_calibration(args.out)  # nothing else is overwritten
    elif args.out.exists() and "judge" not in read_safetensors(args.out)[0]:
        raise InputError(f"--out {args.out} is there already, and is not a judge's file; name another one.")
    kind = "features" if args.max_harm is None else "answers.jsonl"
    args.answers = args.answers or args.out.with_name(f"{args.out.name}.{kind}")
    if args.max_harm is None:
        check_folder(args.answers, "--answers")
    else:
        check_writable(args.answers, "--answers")
        check_not_input(args.answers, [*inputs, args.out, *filter(None, [args.judge_path])], "--answers")
    if args.answers.resolve() == args.out.resolve():
        raise InputError(f"--answers {args.answers} is --out itself; name another one.")


def calibrate(args: argparse.Namespace) -> dict:
    """Walks, prints what was found, writes it, and returns it."""
    check_args(args)
    walk, head = walk_of(args), None
    share = args.max_harm or args.max_false_accept
    questions = questions_of(args) if args.max_harm is not None else None
    if questions is not None and most_harms(len(questions), share, args.confidence) < 0:
        result = {
            "max_harm": share,
            **figures([], len(questions), args.confidence),
        }  # no need to load or decode anything
    else:
        result, head = by_labels(args, walk) if questions is None else by_generating(args, walk, questions)
    event = "harmed" if args.max_false_accept is None else "with a wrong token let through"
    what = f"at most {100 * share:.6g}% {event} with {100 * args.confidence:.6g}% confidence"
    if result["threshold"] is None:
        least = [least_n(harms, share, args.confidence) for harms in range(3)]
        print(
            f"No threshold of {args.verify} qualifies: {what}, on {result['n']} (without a single harm it "
            f"takes {least[0]}, "
            f"with one {least[1]}, with two {least[2]}); nothing is written."
        )
        return result
    knob = RULES[args.verify].knob
    if head is not None:
        replace(head, threshold=result["threshold"], info=head.info | {"calibration": result}).save(args.out)
    else:
        write_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(
        f"{args.verify}: {what} up to {knob} {result['threshold']:g} "
        f"({result['harms']} of {result['n']}, upper bound {result['bound']:.2%}); written to {args.out}"
    )
    return result


def parse_args(argv: list[str] | None, doc: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(doc, prog="judge.py calibrate")
    add = parser.add_argument
    add(
        "--verify",
        choices=[name for name in RULES if name != "standard"],
        default="judge",
        help="the rule to calibrate",
    )
    share = number(1e-6, 0.999999)
    add(
        "--max_harm",
        type=share,
        help="largest share of questions that may be answered wrong because of the rule",
    )
    add(
        "--max_false_accept",
        type=share,
        help="instead: largest share of wrong answers with a wrong token let through",
    )
    add("--confidence", type=share, default=0.95, help="with which the bound holds")
    add(
        "--walk",
        help="thresholds from the strictest to the loosest, with commas between (default: the rule's own)",
    )
    add(
        "--label_policy",
        choices=LABEL_POLICIES,
        default=TrainSettings.policy,
        help="which tokens of --data count as wrong",
    )
    add(
        "--out",
        type=Path,
        help="what to write: a judge (default: --judge_path itself) or, for another rule, JSON",
    )
    add("--answers", type=Path, help="where answers are kept, and resumed from (default: beside --out)")
    add_question_flags(parser)
    add_engine_flags(parser)
    return parser.parse_args(argv)
