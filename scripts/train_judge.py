"""Trains a judge on labelled answers, and measures it on held-out prompts.

    python scripts/train_judge.py --data answers.jsonl --out judge.safetensors     # of the demo target
    python scripts/train_judge.py --checkpoint_path LLAMA --data marked.jsonl --out judge.safetensors --chat

Training data are JSON lines, one answer each, as text or as token ids:

    {"prompt": "...", "response": "...", "errors": [[start, end], ...], "source": "..."}
    {"prompt_tokens": [...], "tokens": [...], "labels": [...], "source": "..."}

An error is given by the characters of the response that are wrong; a label is 1 (right), 0 (wrong) or -100
(ignored). The same answers, flags and models give the same bits on one machine.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, number, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
from pathlib import Path

from checkpoint import DEMO
from files import check_folder, check_not_input, check_writable
from judge import DELTA, FEATURES
from model import pick_device, run_dtype
from quantize import load_model
from scripts.lib.answers import read_answers
from scripts.lib.flags import add_flags
from scripts.lib.pair import files_in
from scripts.lib.training import CAREFUL, GRID, TrainSettings, print_figures, train_judge
from tokenizer import load_tokenizer

CHOICE = (
    f"the lowest of {', '.join(map(str, GRID))} that accepts at most {CAREFUL:.0%}% of the held-out wrong "
    "tokens with 95%% confidence, else the last"
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, prog="train_judge.py")
    add, strength = parser.add_argument, number(0, 1e6)
    add_flags(
        parser, "checkpoint_path", "chat", "label_policy", "device", "precision",
        draft_checkpoint_path={"help": "the draft's folder, for --features target+draft"},
        data={"nargs": "+", "help": "labelled answers, JSON lines"},
        out={"required": True, "help": "the judge file to write"},
        speculate_k={"type": whole(1, 1024), "help": "M: features are read M + 1 rows at a time"},
        seed={"default": TrainSettings.seed, "help": "of the split into training and held-out prompts"},
    )  # fmt: skip
    add("--guard", type=Path, nargs="+", default=[], help="texts that must never pass, JSON lines as well")
    add("--guard_weight", type=strength, default=TrainSettings.guard_weight,
        help="of all guarded tokens together; all wrong tokens weigh 1")  # fmt: skip
    add("--cache", type=Path, help="folder that keeps features for the next training (default: OUT.features)")
    add("--features", choices=FEATURES, default="target", help="what the head reads")
    add("--threshold", type=number(*DELTA), help=f"delta, unless a run names another (default: {CHOICE})")
    add("--l2", type=strength, help="penalty (default: the best of several by AUC on other prompts)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot run, before anything is loaded; fills in the demo pair and the
    cache."""
    both = args.features == "target+draft"
    if args.checkpoint_path is None:
        args.checkpoint_path = DEMO / "target"
        args.draft_checkpoint_path = args.draft_checkpoint_path or (DEMO / "draft" if both else None)
    if both != bool(args.draft_checkpoint_path):
        raise InputError(
            "--features target+draft and --draft_checkpoint_path go together; give both or neither."
        )
    args.folders = [args.checkpoint_path, *([args.draft_checkpoint_path] if both else [])]

    check_writable(args.out, "--out")
    check_not_input(args.out, [*args.data, *args.guard, *files_in(args.folders)])
    args.cache = args.cache or args.out.with_name(args.out.name + ".features")
    check_folder(args.cache, "--cache")
    if args.cache.resolve() == args.out.resolve():
        raise InputError(f"--cache {args.cache} is --out itself; name another folder.")


def train(args: argparse.Namespace) -> None:
    """Checks the command line, trains, writes the head and prints its figures."""
    check_args(args)
    device = pick_device(args.device)
    answers = [item for path in args.data for item in read_answers(path)]
    answers += [item | {"guard": True} for path in args.guard for item in read_answers(path, labelled=False)]

    tokenizer = load_tokenizer(args.checkpoint_path)
    models = [load_model(folder, device, run_dtype(args.precision, device)) for folder in args.folders]
    settings = TrainSettings(
        args.label_policy,
        args.speculate_k + 1,
        args.threshold,
        l2=args.l2,
        guard_weight=args.guard_weight,
        seed=args.seed,
        chat=args.chat,
    )
    head = train_judge(models, tokenizer, answers, settings, args.cache)
    head.save(args.out)

    print_figures(head)
    chosen = "the careful choice, see --help" if args.threshold is None else "as given"
    print(
        f"{args.out}: a judge with threshold {head.threshold:g} ({chosen}), on {len(answers)} answers; "
        f"it has no calibration yet: calibrate.py --judge_path {args.out} finds how much harm it does at "
        "most."
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run_script("train_judge.py", lambda: train(args))


if __name__ == "__main__":
    main()
