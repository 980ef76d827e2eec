"""Perplexity of a checkpoint on a text, unquantised and with each kind of quantised weights, in one run.

    python scripts/perplexity.py --text book.txt --mode none int8 int4 fp8 --checkpoint_path Llama-3.1-8B
    python scripts/perplexity.py                                     # the demo target on demo problems, all modes

A window of --window tokens slides over the text by --stride; only the tokens that are new in it count, each with at least
window - stride tokens before it (but for the first window). Every window begins with begin-of-text. One JSON object on
the last line.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
import math
import random
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from files import read_text
from generate import DEMO, NotFinite
from model import DTYPES, ModelArgs, Transformer, pick_device, run_dtype
from quantize import MODES, load_model, scheme_named
from scripts.demo_task import problems, write_answer
from scripts.tasks import MOST
from tokenizer import load_tokenizer

MOST_NATS = 700  # a token, of which a perplexity can still be written as a number


def read_texts(name: str, seed: int, limit: int | None) -> list[tuple[str, str]]:
    """Pairs of what is only read and what counts: a file; or `limit` demo problems, never trained on, and right answers."""
    if name != "demo":
        return [("", read_text(name, "--text"))]
    rng = random.Random(seed)
    found = islice(problems(seed, held_out=True), limit or 300)
    return [(problem.question, write_answer(problem, "target", rng)) for problem in found]


def windows(n: int, window: int, stride: int, counted: int = 0) -> list[tuple[int, int, int]]:
    """(begin, end, first that counts) over n tokens: every token after the first `counted` counts once."""
    found = []
    for begin in range(0, n, stride):
        end = min(begin + window, n)
        if end > counted:
            found.append((begin, end, counted))
            counted = end
        if end == n:
            break
    return found


@torch.inference_mode()
def log_likelihood(
    model: Transformer, bos: int, given: int, ids: list[int], window: int, stride: int, progress: Progress | None = None
) -> float:
    """Sum of the natural logarithms of the probabilities of all tokens after the first `given`."""
    total = 0.0
    for begin, end, first in windows(len(ids), window, stride, given):
        text = torch.tensor([bos, *ids[begin:end]], device=model.device)
        _, logits = model(text[None, :-1])
        chances = F.log_softmax(logits[0], -1).gather(-1, text[1:, None])[:, 0]
        total += chances[first - begin :].double().sum().item()
        if progress is not None:
            progress.step()
    return total


def perplexity(
    model: Transformer, bos: int, texts: list[list[list[int]]], window: int = 2048, stride: int = 512, what: str = "perplexity"
) -> float:
    """Of pairs of ids: what is only read, and what counts. Raises NotFinite where it is no number."""
    steps = sum(len(windows(len(given) + len(text), window, stride, len(given))) for given, text in texts)
    total, progress = 0.0, Progress(what, steps)
    for given, text in texts:
        total += log_likelihood(model, bos, len(given), given + text, window, stride, progress)
    mean = -total / sum(len(text) for _, text in texts)
    if not mean < MOST_NATS:  # NaN, too
        raise NotFinite(f"{what}: the model's logits are not finite, or far off; try --precision fp32 or bf16.")
    return math.exp(mean)


def run(args: argparse.Namespace) -> None:
    """Measures mode after mode."""
    schemes = [scheme_named(name) for name in args.mode]
    context = ModelArgs.from_folder(args.checkpoint_path).max_position
    window = min(args.window, context)
    if args.limit is not None and args.text != "demo":
        raise InputError(f"--limit {args.limit} counts demo problems; a file is read whole.")
    if args.stride > window:
        raise InputError(f"--stride {args.stride} must be between 1 and the window of {window} tokens.")
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.checkpoint_path)
    texts = [[tokenizer.encode(part) for part in pair] for pair in read_texts(args.text, args.seed, args.limit)]
    n = sum(len(text) for _, text in texts)
    if n == 0:
        raise InputError(f"--text {args.text} holds no text.")
    rows = []
    for name, scheme in zip(args.mode, schemes):
        model = load_model(args.checkpoint_path, device, run_dtype(args.precision, device), scheme)
        found = perplexity(model, tokenizer.bos_id, texts, window, args.stride, name)
        rows.append({"mode": name, "perplexity": found, "bits_per_token": math.log2(found)})
        row = rows[-1]
        row["change"] = row["perplexity"] / rows[0]["perplexity"] - 1
        print(f"{name:10} perplexity {row['perplexity']:.4f} ({row['change']:+.2%}), {row['bits_per_token']:.4f} bits a token")
    print(json.dumps({"text": args.text, "tokens": n, "window": window, "stride": args.stride, "rows": rows}))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=DEMO / "target", help="a Hugging Face snapshot folder")
    add("--text", default="demo", help="a UTF-8 file, or demo: problems with right answers")
    add("--mode", nargs="+", default=["none", *MODES], help="none, int8, int4, int4/64, int4/128, fp8; compared with the first")
    add("--window", type=whole(1, MOST), default=2048, help="tokens that are read at once, at most the model's context")
    add("--stride", type=whole(1, MOST), default=512, help="tokens by which the window moves on")
    add("--limit", type=whole(1, MOST), help="demo: how many problems (default: 300)")
    add("--seed", type=whole(-(2**62), 2**62), default=0, help="demo: which problems")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    args = parser.parse_args(argv)
    run_script("perplexity.py", lambda: run(args))


if __name__ == "__main__":
    main()
