"""Perplexity of a checkpoint on a text, unquantised and with each kind of quantised weights, in one run.

    python scripts/perplexity.py --text book.txt --mode none int8 int4 fp8 --checkpoint_path Llama-3.1-8B
    python scripts/perplexity.py            # the demo target on demo problems, all modes

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

from checkpoint import DEMO
from model import pick_device, run_dtype
from quantize import FORMATS, check_device, load_model, open_checkpoint, scheme_named
from scripts.lib.flags import MOST_QUESTIONS, add_device_flags, add_flags
from scripts.lib.likelihood import perplexity, read_pairs
from tokenizer import load_tokenizer


def run(args: argparse.Namespace) -> None:
    """Measures mode after mode."""
    schemes = [scheme_named(name) for name in args.mode]
    source = open_checkpoint(args.checkpoint_path)
    window = min(args.window, source.args.max_position)
    if args.limit is not None and args.text != "demo":
        raise InputError(f"--limit {args.limit} counts demo problems; a file is read whole.")
    if args.stride > window:
        raise InputError(f"--stride {args.stride} must be between 1 and the window of {window} tokens.")

    device, tokenizer = pick_device(args.device), load_tokenizer(args.checkpoint_path)
    for scheme in schemes:
        check_device(device, scheme)
    pairs = [
        [tokenizer.encode(part) for part in pair] for pair in read_pairs(args.text, args.seed, args.limit)
    ]
    n = sum(len(text) for _, text in pairs)
    if n == 0:
        raise InputError(f"--text {args.text} holds no text.")

    rows = []
    for name, scheme in zip(args.mode, schemes):
        model = load_model(source, device, run_dtype(args.precision, device), scheme)
        found = perplexity(model, tokenizer.prefix, pairs, window=window, stride=args.stride, what=name)
        change = found / (rows[0]["perplexity"] if rows else found) - 1
        rows.append({"mode": name, "perplexity": found, "bits_per_token": math.log2(found), "change": change})
        print(f"{name:10} perplexity {found:.4f} ({change:+.2%}), {math.log2(found):.4f} bits a token")

    print(json.dumps({"text": args.text, "tokens": n, "window": window, "stride": args.stride, "rows": rows}))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add, many = parser.add_argument, whole(1, MOST_QUESTIONS)
    add_flags(parser, checkpoint_path={"default": DEMO / "target", "help": "a Hugging Face snapshot folder"})
    add("--text", default="demo", help="a UTF-8 file, or demo: problems with right answers")
    add(
        "--mode",
        nargs="+",
        default=["none", *FORMATS],
        help="none, int8, int4, int4/64, int4/128, fp8; compared with the first",
    )
    add("--window", type=many, default=2048, help="tokens that are read at once, at most the model's context")
    add("--stride", type=many, default=512, help="tokens by which the window moves on")
    add_flags(
        parser,
        limit={"help": "demo: how many problems (default: 300)"},
        seed={"default": 0, "help": "demo: which problems"},
    )
    add_device_flags(parser)
    args = parser.parse_args(argv)
    run_script("perplexity.py", lambda: run(args))


if __name__ == "__main__":
    main()
