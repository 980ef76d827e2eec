"""Flags that several commands share, each declared once."""

import argparse
from pathlib import Path

import torch

from cli import Parser, number, shortened, whole
from model import DTYPES
from quantize import add_mode_flags

MOST_TOKENS = 10**8  # bound of flags that count tokens


def read_k(text: str) -> int | str:
    """--speculate_k: a whole number, or "auto"."""
    try:
        return text if text == "auto" else whole(1, 1024)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} must be a whole number from 1 to 1024, or auto"
        ) from None


def add_engine_flags(parser: Parser, max_new_tokens: int | None = 200) -> None:
    """The flags that say which models answer, and how (max_new_tokens: None where the task has a default of
    its own)."""
    whose = "" if max_new_tokens else " (default: the task's)"
    add = parser.add_argument
    add(
        "--checkpoint_path", type=Path, help="the target (default: the demo target, with its draft and judge)"
    )
    add("--draft_checkpoint_path", type=Path, help="the draft")
    add("--judge_path", type=Path, help="judge.safetensors of this target, for the rule judge")
    add("--chat", action="store_true", help="put questions into the checkpoint folder's chat format")
    add(
        "--min_prob",
        type=number(0, 1),
        default=0.0,
        help="no rule accepts a token that the target gives less than this",
    )
    add("--speculate_k", type=read_k, default=16, help="M, or auto")
    add(
        "--max_new_tokens",
        type=whole(1, MOST_TOKENS),
        default=max_new_tokens,
        help="tokens of an answer, at most" + whose,
    )
    add("--temperature", type=number(0, 1000), default=0.0, help="0 is greedy")
    add(
        "--top_k",
        type=whole(0, MOST_TOKENS),
        help="sample from the K most likely tokens; 0: from all (default: all)",
    )
    add("--compile", action="store_true", help="compile the step functions with torch.compile")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add_mode_flags(parser)
