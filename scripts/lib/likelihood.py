"""Log-likelihood and perplexity of a text, by windows."""

import math
import random
from itertools import islice

import torch
import torch.nn.functional as F

from cli import Progress
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
    model: Transformer, bos: int, ids: list[int], spans: list[tuple[int, int, int]], progress: Progress
) -> float:
    """Sum of the natural logarithms of the probabilities of the tokens that count. spans: from `windows`."""
    total = 0.0
    for begin, end, first in spans:
        text = torch.tensor([bos, *ids[begin:end]], device=model.device)
        _, logits = model(text[None, :-1])
        chances = F.log_softmax(logits[0], -1).gather(-1, text[1:, None])[:, 0]
        total += chances[first - begin :].double().sum().item()
        progress.step()
    return total


def perplexity(
    model: Transformer,
    bos: int,
    pairs: list,
    *,
    window: int = 2048,
    stride: int = 512,
    what: str = "perplexity",
) -> float:
    """Of pairs of ids: what is only read, and what counts. Raises NotFinite where it is no number."""
    spans = [windows(len(given) + len(text), window, stride, len(given)) for given, text in pairs]
    progress = Progress(what, sum(map(len, spans)))
    total = sum(
        log_likelihood(model, bos, given + text, each, progress) for (given, text), each in zip(pairs, spans)
    )

    mean = -total / sum(len(text) for _, text in pairs)
    if not mean < MOST_NATS:  # NaN, too
        raise NotFinite(
            f"{what}: the model's logits are not finite, or far off; try --precision fp32 or bf16."
        )

    return math.exp(mean)
