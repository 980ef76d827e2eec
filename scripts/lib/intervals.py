"""Intervals of shares and of differences on the same items, and pass@k. Pure arithmetic; sources at each
function."""

import math

import torch

from cli import InputError

Z = 1.959964  # of the normal distribution, two-sided 95%


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; of nothing it is 0 to 1. Raises InputError for what is no share."""
    if not 0 <= right <= n:
        raise InputError(f"{right} of {n} is no share.")
    if n == 0:
        return 0.0, 1.0
    z, share = Z, right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def paired_interval(both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    """Newcombe's 95% interval of the difference (won - lost) / n of two shares on the same n items.

    won, lost: right only with the one, only with the other. Source: R. G. Newcombe, Statistics in Medicine 17
    (1998), 2635-2650, method 10: Wilson's intervals of both shares, joined by their correlation.
    """
    n = both + won + lost + neither
    if n == 0:
        return -1.0, 1.0
    p1, p2 = (both + won) / n, (both + lost) / n
    (low1, high1), (low2, high2) = interval(both + won, n), interval(both + lost, n)
    product = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    excess = both * neither - won * lost
    if excess > 0:
        excess = max(excess - n / 2, 0)  # a continuity correction towards none
    phi = excess / math.sqrt(product) if product else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = p1 - p2
    return difference - reach(p1 - low1, high2 - p2), difference + reach(high1 - p1, p2 - low2)


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact two-sided p: how likely so uneven a split of the items that differ is, if neither side
    is better."""
    n, fewer = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of a mean over items, by the normal distribution: for items that are no plain right or
    wrong."""
    if not values:
        raise InputError("There is no mean of nothing.")
    n, mean = len(values), sum(values) / len(values)
    spread = Z * math.sqrt(sum((x - mean) ** 2 for x in values) / max(n - 1, 1) / n)
    return mean - spread, mean + spread


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased from n >= k samples: 1 - C(n - right, k) / C(n, k).

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), section 2.1.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise InputError(f"{right} right of {n} samples say nothing about {k} samples.")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def upper_bound(harms: int, n: int, confidence: float) -> float:
    """Clopper-Pearson's upper bound of a share: the largest p for which at most `harms` of n is not too
    unlikely."""
    if harms >= n:
        return 1.0
    few = 2 * harms < n  # else the other tail has fewer terms
    first, last = (0, harms) if few else (harms + 1, n)
    k = torch.arange(first, last + 1, dtype=torch.double)
    total = torch.tensor(float(n), dtype=torch.double)
    choose = (total + 1).lgamma() - (k + 1).lgamma() - (total - k + 1).lgamma()

    low, high = harms / n, 1.0
    for _ in range(60):  # bisection
        p, tail = (low + high) / 2, float(not few)
        if p < 1:
            tail = (choose + k * math.log(p) + (total - k) * math.log1p(-p)).exp().sum().item()
        at_most = tail if few else 1 - tail
        low, high = (p, high) if at_most > 1 - confidence else (low, p)
    return high


def share_interval(k: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95% interval of a share k of n; of nothing it is 0 to 1."""
    return (1 - upper_bound(n - k, n, 0.975), upper_bound(k, n, 0.975)) if n else (0.0, 1.0)
