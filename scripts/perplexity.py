"""Perplexity of a checkpoint on a text, unquantised and with each kind of quantised weights, in one run.

    python scripts/perplexity.py --text book.txt --mode none int8 int4 fp8 --checkpoint_path Llama-3.1-8B
    python scripts/perplexity.py                                     # the demo target on demo problems, all
    modes

A window of --window tokens slides over the text by --stride; only the tokens that are new in it count, each
with at least window - stride tokens before it (but for the first window). Every window begins with
begin-of-text. One JSON object on the last line.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
import math
from pathlib import Path

import torch

from checkpoint import DEMO
from model import DTYPES, pick_device, run_dtype
from quantize import FORMATS, load_model, open_checkpoint, scheme_named
from scripts.lib.likelihood import perplexity, read_texts
from scripts.lib.tasks import MOST
from tokenizer import load_tokenizer


def run(args: argparse.Namespace) -> None:
    """Measures mode after mode."""
    schemes = [scheme_named(name) for name in args.mode]
    source = open_checkpoint(args.checkpoint_path)
    context = source.args.max_position
    window = min(args.window, context)
    if args.limit is not None and args.text != "demo":
        raise InputError(f"--limit {args.limit} counts demo problems; a file is read whole.")
    if args.stride > window:
        raise InputError(f"--stride {args.stride} must be between 1 and the window of {window} tokens.")
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.checkpoint_path)
    texts = [
        [tokenizer.encode(part) for part in pair] for pair in read_texts(args.text, args.seed, args.limit)
    ]
    n = sum(len(text) for _, text in texts)
    if n == 0:
        raise InputError(f"--text {args.text} holds no text.")
    rows = []
    for name, scheme in zip(args.mode, schemes):
        model = load_model(source, device, run_dtype(args.precision, device), scheme)
        found = perplexity(model, tokenizer.bos_id, texts, window, args.stride, name)
        rows.append({"mode": name, "perplexity": found, "bits_per_token": math.log2(found)})
        row = rows[-1]
        row["change"] = row["perplexity"] / rows[0]["perplexity"] - 1
        print(
            f"{name:10} perplexity {row['perplexity']:.4f} ({row['change']:+.2%}), "
            f"{row['bits_per_token']:.4f} bits a token"
        )
    print(json.dumps({"text": args.text, "tokens": n, "window": window, "stride": args.stride, "rows": rows}))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=DEMO / "target", help="a Hugging Face snapshot folder")
    add("--text", default="demo", help="a UTF-8 file, or demo: problems with right answers")
    add(
        "--mode",
        nargs="+",
        default=["none", *FORMATS],
        help="none, int8, int4, int4/64, int4/128, fp8; compared with the first",
    )
    add(
        "--window",
        type=whole(1, MOST),
        default=2048,
        help="tokens that are read at once, at most the model's context",
    )
    add("--stride", type=whole(1, MOST), default=512, help="tokens by which the window moves on")
    add("--limit", type=whole(1, MOST), help="demo: how many problems (default: 300)")
    add("--seed", type=whole(-(2**62), 2**62), default=0, help="demo: which problems")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    args = parser.parse_args(argv)
    run_script("perplexity.py", lambda: run(args))


if __name__ == "__main__":
    main()
