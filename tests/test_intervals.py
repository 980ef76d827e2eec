"""Protects: intervals and tests of shares against published values, exhaustive coverage, and pass@k."""

import itertools
import math

import pytest

from scripts.lib.intervals import interval, mcnemar, mean_interval, paired_interval, pass_at_k


def test_intervals_are_wilsons():
    low, high = interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert interval(0, 50)[0] == pytest.approx(0, abs=1e-9) and interval(50, 50)[1] == pytest.approx(
        1, abs=1e-9
    )


def test_paired_intervals_are_newcombes():
    # Without correlation the method is Newcombe's for independent shares, whose paper gives 0.1705 to 0.8090 for 9/10 - 3/10.
    assert [round(x, 4) for x in paired_interval(3, 6, 0, 1)] == [0.1705, 0.8090]
    # By hand for (20, 12, 2, 16): p 0.64 and 0.44, Wilson (0.50141, 0.75861) and (0.31160, 0.57694), phi (296 - 25) / 555.12
    phi = (20 * 16 - 12 * 2 - 25) / math.sqrt(32 * 18 * 22 * 28)
    below, above = (0.64 - 0.50141, 0.57694 - 0.44), (0.75861 - 0.64, 0.44 - 0.31160)
    reach = [math.sqrt(a * a - 2 * phi * a * b + b * b) for a, b in (below, above)]
    low, high = paired_interval(20, 12, 2, 16)
    assert low == pytest.approx(0.2 - reach[0], abs=5e-5) and high == pytest.approx(0.2 + reach[1], abs=5e-5)
    assert paired_interval(20, 2, 12, 16) == pytest.approx((-high, -low))  # the sides change places
    assert paired_interval(100, 0, 0, 0)[0] == pytest.approx(-paired_interval(100, 0, 0, 0)[1])


def test_paired_intervals_cover():
    """All outcomes of 30 items with chances 0.6, 0.15, 0.05, 0.2, weighed: close to 95% of them hold the true 0.1."""
    chances, n, covered = (0.6, 0.15, 0.05, 0.2), 30, 0.0
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        if (d := n - a - b - c) >= 0:
            counts = (a, b, c, d)
            ways = math.factorial(n) // math.prod(map(math.factorial, counts))
            low, high = paired_interval(*counts)
            covered += (low <= 0.1 <= high) * ways * math.prod(p**k for p, k in zip(chances, counts))
    assert 0.93 < covered < 0.98


def test_mcnemars_p_is_the_binomials():
    # Two-sided: 2 * (1 + 8) / 2^8 = 0.0703; of 6 and 2: 2 * (1 + 8 + 28) / 2^8 = 0.2891; equal splits and none: 1
    assert mcnemar(7, 1) == mcnemar(1, 7) == pytest.approx(18 / 256)
    assert mcnemar(6, 2) == pytest.approx(74 / 256) and mcnemar(3, 3) == mcnemar(0, 0) == 1


def test_a_means_interval_is_its_standard_error():
    low, high = mean_interval([0.0, 1.0, 1.0, 1.0])  # mean 0.75, variance 0.25, standard error 0.25
    assert (low + high) / 2 == pytest.approx(0.75) and (high - low) / 2 == pytest.approx(1.959964 * 0.25)
    assert mean_interval([0.5]) == (0.5, 0.5)


def test_pass_at_k_counts_all_choices():
    for n, right in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if right <= n:
                choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    assert (
        pass_at_k(200, 200, 100) == 1
        and pass_at_k(200, 0, 1) == 0
        and pass_at_k(200, 30, 1) == pytest.approx(0.15)
    )
