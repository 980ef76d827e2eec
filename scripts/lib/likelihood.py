"""Log-likelihood and perplexity of a text, by windows."""

import math
import random
from itertools import islice

import torch
import torch.nn.functional as F

from cli import InputError, Progress
from files import read_text
from generate import NotFinite
from model import Transformer
from scripts.lib.demo_task import problems, write_answer

MOST_NATS = 700  # a token, of which a perplexity can still be written as a number


def read_pairs(name: str, seed: int, limit: int | None) -> list[tuple[str, str]]:
    """Pairs of what is only read and what counts: a file; or `limit` demo problems, never trained on, and
    right answers."""
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
    model: Transformer,
    prefix: list[int],
    ids: list[int],
    spans: list[tuple[int, int, int]],
    progress: Progress,
) -> tuple[float, int]:
    """Sum of the natural logarithms of the probabilities of the tokens that count, and their number. spans:
    from `windows`. Without a prefix nothing predicts the first token of all, which then does not count."""
    total, n = 0.0, 0
    for begin, end, first in spans:
        text = torch.tensor([*prefix, *ids[begin:end]], device=model.device)
        _, logits = model(text[None, :-1])
        chances = F.log_softmax(logits[0], -1).gather(-1, text[1:, None])[:, 0]
        counted = chances[max(0, first - begin + len(prefix) - 1) :]
        total += counted.double().sum().item()
        n += len(counted)
        progress.step()
    return total, n


def perplexity(
    model: Transformer,
    prefix: list[int],
    pairs: list,
    *,
    window: int = 2048,
    stride: int = 512,
    what: str = "perplexity",
) -> float:
    """Of pairs of ids: what is only read, and what counts. prefix: what begins a text, before each window.

    Raises NotFinite where it is no number.
    """
    spans = [windows(len(given) + len(text), window, stride, len(given)) for given, text in pairs]
    progress = Progress(what, sum(map(len, spans)))
    found = [
        log_likelihood(model, prefix, given + text, each, progress)
        for (given, text), each in zip(pairs, spans)
    ]
    total, n = map(sum, zip(*found))
    if not n:
        raise InputError(
            f"{what}: a single token, which nothing predicts, has no perplexity; give more text."
        )

    mean = -total / n
    if not mean < MOST_NATS:  # NaN, too
        raise NotFinite(
            f"{what}: the model's logits are not finite, or far off; try --precision fp32 or bf16."
        )

    return math.exp(mean)
