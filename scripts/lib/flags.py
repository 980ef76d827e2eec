"""Flags that several commands share, each declared once."""

import argparse
from pathlib import Path

import torch

import tp
from cli import Parser, number, shortened, whole
from judge import RULES
from model import DTYPES
from quantize import add_mode_flags
from scripts.lib.pair import name_demo
from scripts.lib.terminal import DEMO_PROMPT

MOST_TOKENS = 10**8  # bound of flags that count tokens


def read_k(text: str) -> int | str:
    """--speculate_k: a whole number, or "auto"."""
    try:
        return text if text == "auto" else whole(1, 1024)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} must be a whole number from 1 to 1024, or auto"
        ) from None


def add_model_flags(parser) -> None:
    """Which models, and where and how they run."""
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="the target, a Hugging Face folder (default: the demo target)")
    add("--draft_checkpoint_path", type=Path, help="the draft, of the same vocabulary (default: the demo's)")
    add("--judge_path", type=Path, help="judge.safetensors of this target (default: the demo's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add("--compile", action="store_true", help="compile the step functions with torch.compile")


def add_decoding_flags(parser, max_new_tokens: int | None = 200) -> None:
    """How answers are decoded (max_new_tokens: None where the task has a default of its own)."""
    whose, tokens = "" if max_new_tokens else " (default: the task's)", whole(1, MOST_TOKENS)
    add = parser.add_argument
    add("--chat", action="store_true", help="put prompts into the checkpoint folder's chat format")
    add("--max_new_tokens", type=tokens, default=max_new_tokens, help=f"tokens of an answer, at most{whose}")
    add("--temperature", type=number(0, 1000), default=0.0, help="0 is greedy")
    add("--top_k", type=whole(0, MOST_TOKENS), help="sample from the K most likely tokens; 0: from all")
    add(
        "--min_prob",
        type=number(0, 1),
        default=0.0,
        help="no rule accepts a token that the target gives less",
    )
    add("--speculate_k", type=read_k, default=16, help="M, draft tokens a round, or auto: chosen as it goes")


def add_engine_flags(parser, max_new_tokens: int | None = 200) -> None:
    """All flags that say which models answer, and how."""
    add_model_flags(parser)
    add_decoding_flags(parser, max_new_tokens)
    add_mode_flags(parser)


def parse_generate_args(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """The command line of generate.py. Without a target it names the demo pair, its judge and a demo problem."""
    parser = Parser(doc)
    add_model_flags(parser.add_argument_group("models"))
    add_mode_flags(parser.add_argument_group("quantised weights"))

    group = parser.add_argument_group("what to say")
    add = group.add_argument
    add("--prompt", help="text, a number N for a synthetic prompt of N tokens, or - for standard input")
    add("--interactive", action="store_true", help="ask for prompts, stream answers; Ctrl-C stops one")
    add("--num_samples", type=whole(1, MOST_TOKENS), default=1, help="answers to the prompt")
    add("--cache_length", type=whole(1, MOST_TOKENS), help="that the cache holds (default: what is needed)")
    add("--seed", type=whole(-(2**63), 2**63 - 1), default=0, help="of sampling")
    add_decoding_flags(group)

    add = parser.add_argument_group("verification").add_argument
    add("--verify", choices=["plain", *RULES], help="default: judge if there is one, else standard")
    add("--threshold", type=float, help="the rule's knob (default: the judge's own, or the rule's)")
    add("--relax_between", nargs=2, metavar=("BEGIN", "END"), help="the rule applies only between these")
    add("--calibration", type=Path, help="a file by calibrate.py: its rule, its threshold, its guarantee")

    add = parser.add_argument_group("output").add_argument
    add("--profile", type=Path, help="write a Chrome trace of the last sample to this file")
    add("--json", action="store_true", help="print one JSON object a sample, and nothing else")
    add("--marks", action="store_true", help="show who accepted each token by brackets, also in a pipe")
    add("--debug_numerics", action="store_true", help="where logits are not finite, say where that begins")
    tp.add_flags(parser.add_argument_group("several GPUs"))

    args = parser.parse_args(argv)
    args.compare = args.checkpoint_path is None and args.prompt is None and not args.interactive  # the demo
    if args.compare:
        args.prompt = DEMO_PROMPT
    name_demo(args)
    if args.verify is None and not args.calibration:
        args.verify = "judge" if args.judge_path else "standard"
        if not args.draft_checkpoint_path:
            args.verify = "plain"
    return args
