"""Sampling: a row of logits to probabilities, a draw, and what makes speculative sampling exact.

Target and draft are filtered by the same settings. Rejection sampling (arXiv 2211.17192) then gives exactly
the target's own filtered distribution. Nothing here waits for the device or has shapes that depend on data.
"""

import torch
from torch import Tensor

TINY = 1e-20


def distribution(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:  # fmt: skip
    """Probabilities to sample from, fp32 (..., V). None: that filter is off.

    Order and borders are those of transformers' LogitsWarpers: temperature; the top_k most likely, with all
    that equal the last of them; the most likely that together reach top_p; those with at least min_p times
    the largest probability. Each filter sees what the one before has left, renormalised.
    """
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -float("inf"))
    if top_p is not None:
        logits = logits.masked_fill(beyond_top_p(logits, top_p), -float("inf"))
    if min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -float("inf"))
    return logits.softmax(-1)


def beyond_top_p(logits: Tensor, top_p: float) -> Tensor:
    """What top_p drops, bool (..., V): the least likely, as long as they sum up to at most 1 - top_p. The
    most likely token stays."""
    ascending, order = logits.sort(dim=-1, stable=True)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[..., -1] = False
    return torch.zeros_like(dropped).scatter(-1, order, dropped)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Samples an index by weights (..., V), which need no sum of 1; uniform (...) in [0, 1)."""
    total = weights.double().cumsum(-1)
    return (total <= (uniform.double() * total[..., -1])[..., None]).sum(-1).clamp(max=weights.shape[-1] - 1)


def accept_sampled(drafted: Tensor, p: Tensor, q: Tensor, uniforms: Tensor) -> Tensor:
    """Rejection sampling's test, bool (M,): u < p(d) / q(d) (arXiv 2211.17192). p, q: (M, V)."""
    own_p, own_q = (probs.gather(-1, drafted[:, None]).squeeze(-1) for probs in (p, q))
    return uniforms * own_q < own_p


def residual(p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
    """Weights (1, V) of the target's own token: max(p - q, 0) at a rejection, p after full acceptance.

    p: (M + 1, V), q: (M, V), accepted: (1,). Where p equals q only rounding rejects; p stands in then.
    """
    rest = (p[accepted] - torch.cat([q, torch.zeros_like(q[:1])])[accepted]).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > TINY, rest, p[accepted])
