"""Memory over many generations of the demo pair in one process, plain and by the judge in turn.

    python tests/memory.py --generations 10000

Prints the resident memory (MB) at every thousandth generation and its slope per 1,000 by least squares, without the first
tenth, in which caches fill. Exit code 1 where the slope is above --most MB. Some answers are made again at the end: they
must be the same.
"""

import argparse
import gc
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from checkpoint import DEMO
from generate import Engine, Settings
from scripts.lib.demo_task import problems
from scripts.lib.pair import load_pair
from tokenizer import load_tokenizer

KEPT = 20  # first answers, which are asked for once more


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def slope(points: list[tuple[int, float]]) -> float:
    """MB per 1,000 generations, by least squares."""
    n, mean_x, mean_y = (
        len(points),
        sum(x for x, _ in points) / len(points),
        sum(y for _, y in points) / len(points),
    )
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if n > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", type=int, default=10000, help="how many (default: 10000)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="tokens of each (default: 16)")
    parser.add_argument(
        "--every", type=int, default=1000, help="generations between two measurements (default: 1000)"
    )
    parser.add_argument(
        "--most", type=float, default=1.0, help="MB per 1,000 generations that are let pass (default: 1.0)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(DEMO / "target")
    target, draft, head = load_pair(
        DEMO / "target", DEMO / "draft", DEMO / "judge.safetensors", torch.device("cpu"), torch.float32
    )
    engines = [Engine(target, None, None, Settings("plain"), tokenizer.stop_ids, 256),
               Engine(target, draft, head, Settings("judge", head.threshold), tokenizer.stop_ids, 256)]  # fmt: skip
    prompts = [tokenizer.prompt(problem.question) for problem, _ in zip(problems(7, True), range(200))]
    points, first, began = [], [], time.monotonic()
    for number in range(args.generations):
        tokens = (
            engines[number % 2]
            .generate(prompts[number // 2 % len(prompts)], args.max_new_tokens, seed=number)
            .tokens
        )
        if number < KEPT:
            first.append(tokens)
        if (number + 1) % args.every == 0:
            gc.collect()
            points.append((number + 1, resident_mb()))
            print(
                f"{number + 1:6} generations  {points[-1][1]:8.1f} MB  {time.monotonic() - began:7.0f} s",
                flush=True,
            )
    for number, tokens in enumerate(first):
        if (
            engines[number % 2].generate(prompts[number // 2], args.max_new_tokens, seed=number).tokens
            != tokens
        ):
            sys.exit(f"Generation {number} gives another answer at the end than at the beginning.")
    found = slope([point for point in points if point[0] > args.generations / 10] or points)
    print(f"slope {found:+.3f} MB per 1,000 generations; {len(first)} answers given again alike")
    sys.exit(found > args.most)


if __name__ == "__main__":
    main()
