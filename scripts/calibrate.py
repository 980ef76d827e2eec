"""The loosest threshold of a rule whose harm is bounded with confidence, on questions like those that will be
asked.

    python scripts/calibrate.py --max_harm 0.02 --questions demo --limit 500 --seed 7 --compile
    python scripts/calibrate.py --verify kl --max_harm 0.02 --questions gsm8k.jsonl --checker number \\
        --out kl.json
    python scripts/calibrate.py --max_false_accept 0.05 --data annotated.jsonl

Judge decoding gives up speculative decoding's promise of the target's own output. This gives another one
back: "with 95% confidence, at most 2% of questions like these are answered wrong because of the rule". Harm
is a question that plain decoding answers right and the rule wrong. An answer that --max_new_tokens cut off,
or whose logits are not finite, could have come to be right or wrong, and counts as whichever makes a harm: so
the bound also holds where answers may be longer, and no failure makes it better. Thresholds are walked
from the strictest to the loosest, each is tested with the exact binomial (Clopper-Pearson) bound, and the
walk stops at the first that fails: testing in a fixed order needs no correction for the number of thresholds
(Learn then Test, arXiv 2110.01052), whereas picking the best one afterwards would void the bound.

--max_false_accept is the cheap form, without generating: of the prompts whose labelled answers (--data) hold
a mistake, the share in which the judge alone would let a wrong token through.

For the judge the result goes into its file (or a copy of it, --out), for other rules into --out (JSON), which
generate.py --calibration reads. If no threshold qualifies, that is said, nothing is written, and the exit
code is 1. Answers are kept in --answers, and a killed run resumes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, number, run_script, shortened  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
from dataclasses import replace
from pathlib import Path

from checkpoint import read_safetensors
from files import check_folder, check_not_input, check_writable, write_file
from judge import RULES, check_threshold, needs_judge, relaxed_rules
from model import pick_device
from scripts.lib.bench import Variant, settings_for
from scripts.lib.calibration import by_generating, by_labels, least_n
from scripts.lib.flags import add_engine_flags, add_flags
from scripts.lib.guarantee import read_calibration
from scripts.lib.pair import check_settings, files_in, name_models
from scripts.lib.published import take_sampling
from scripts.lib.tasks import add_question_flags, questions_of


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, prog="calibrate.py")
    add = parser.add_argument
    add("--verify", choices=relaxed_rules(), default="judge", help="the rule to calibrate")
    share = number(1e-6, 0.999999)
    add("--max_harm", type=share, help="largest share of questions answered wrong because of the rule")
    add("--max_false_accept", type=share, help="instead: of wrong answers with a wrong token let through")
    add("--confidence", type=share, default=0.95, help="with which the bound holds")
    add("--walk", help="thresholds with commas between, the strictest first (default: the rule's own)")
    add_flags(
        parser, "label_policy",
        out={"help": "a judge (default: --judge_path itself) or, for another rule, JSON"},
    )  # fmt: skip
    add("--answers", type=Path, help="where answers are kept, and resumed from (default: beside --out)")
    add_question_flags(parser)
    add_engine_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot run, before anything is loaded; fills in where things are kept."""
    args.device = pick_device(args.device)
    name_models(args)
    take_sampling(args)
    if (args.max_harm is None) == (args.max_false_accept is None):
        raise InputError(
            "Give one of --max_harm (on questions) and --max_false_accept (on labelled answers)."
        )
    judged = needs_judge(args.verify)
    if args.max_false_accept is not None and (not judged or args.data is None or args.speculate_k == "auto"):
        judges = " or ".join(filter(needs_judge, RULES))
        raise InputError(
            f"--max_false_accept is for --verify {judges}, with --data and a fixed --speculate_k."
        )
    if judged and not (args.judge_path and args.judge_path.is_file()):
        raise InputError(
            f"There is no judge file {args.judge_path}; train one with train_judge.py or name another "
            "--judge_path."
        )
    if args.max_harm is not None and args.speculate_k == "auto":
        raise InputError(
            "A bound needs a fixed --speculate_k: with auto the output depends on the machine's timing."
        )
    if args.out is None and not judged:
        raise InputError(f"--verify {args.verify} needs --out, a JSON file for generate.py --calibration.")
    check_outputs(args)
    check_settings(settings_for(args, Variant(args.verify)), True, True)


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError where --out or --answers cannot be written, or would replace something else."""
    args.out, judged = args.out or args.judge_path, needs_judge(args.verify)
    if judged and args.out.suffix != ".safetensors":
        raise InputError(
            f"--out {args.out} will be a judge's file with its calibration in it; name it *.safetensors."
        )
    check_writable(args.out, "--out")
    named = [args.data, args.shots_data, Path(args.questions) if args.questions else None]
    inputs = [*filter(None, named), *files_in([args.checkpoint_path, args.draft_checkpoint_path])]
    check_not_input(args.out, inputs)
    if args.out.exists() and not judged:
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


def walk_of(args: argparse.Namespace) -> list[float]:
    """The thresholds to walk, as given or the rule's own. Raises InputError when they are out of range or out
    of order."""
    rule = RULES[args.verify]
    if not rule.walk:
        raise InputError(f"--verify {args.verify} has no walk; give its entry in RULES one, strict to loose.")
    try:
        walk = [float(part) for part in args.walk.split(",")] if args.walk is not None else list(rule.walk)
    except ValueError:
        raise InputError(
            f"--walk {shortened(args.walk)} must be numbers with commas between, from the strictest to the "
            "loosest."
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


def calibrate(args: argparse.Namespace) -> bool:
    """Walks, prints what was found, and writes it; whether a threshold qualifies."""
    check_args(args)
    walk = walk_of(args)
    if args.max_harm is not None:
        result, head = by_generating(args, walk, questions_of(args))
        share, event = args.max_harm, "harmed"
    else:
        result, head = by_labels(args, walk)
        share, event = args.max_false_accept, "with a wrong token let through"

    what = f"at most {100 * share:.6g}% {event} with {100 * args.confidence:.6g}% confidence"
    if result["threshold"] is None:
        least = [least_n(harms, share, args.confidence) for harms in range(3)]
        print(
            f"No threshold of {args.verify} qualifies: {what}, on {result['n']} (without a single harm it "
            f"takes {least[0]}, with one {least[1]}, with two {least[2]}); nothing is written."
        )
        return False

    if head is not None:
        replace(head, threshold=result["threshold"], info=head.info | {"calibration": result}).save(args.out)
    else:
        write_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(
        f"{args.verify}: {what} up to {RULES[args.verify].knob} {result['threshold']:g} "
        f"({result['harms']} of {result['n']}, upper bound {result['bound']:.2%}); written to {args.out}"
    )
    return True


def main(argv: list[str] | None = None) -> None:
    args, qualifies = parse_args(argv), []
    run_script("calibrate.py", lambda: qualifies.append(calibrate(args)))
    if not any(qualifies):
        sys.exit(1)


if __name__ == "__main__":
    main()
