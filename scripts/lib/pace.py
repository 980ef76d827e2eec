"""--speculate_k auto: how many tokens to draft in the next round."""

from collections.abc import Callable

import tp


class Pace:
    """Chooses each round's M for --speculate_k auto: the size with the most expected tokens a second.

    A draft token at place i passes with probability a_i, if those before it did. a_i is the share that passed
    of those reached at place i, in counts that halve every 35 rounds, drawn to the share over all places
    while they are few. A round of M then gives 1 + sum over i of a_1 ... a_i tokens, in the seconds measured
    for M during warm-up.
    """

    DECAY, PRIOR, STRENGTH = 0.98, 0.8, 4.0

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes = sizes
        self.seconds: dict[tuple[int, int], float] = {}  # of a round, by length and M
        self.reached, self.passed = ([0.0] * max(sizes) for _ in range(2))

    def learn(self, drafted: int, accepted: int) -> None:
        """Counts a finished round."""
        if len(self.sizes) == 1:
            return
        for counts, upto in ((self.reached, min(accepted + 1, drafted)), (self.passed, accepted)):
            counts[:] = [self.DECAY * count + (place < upto) for place, count in enumerate(counts)]

    @staticmethod
    def lengths(capacity: int) -> list[int]:
        """Where to measure: at 256 positions, its doubles, and all."""
        lengths = [min(256, capacity)]
        while lengths[-1] < capacity:
            lengths.append(min(2 * lengths[-1], capacity))
        return lengths

    def measure(self, capacity: int, time_round: Callable[[int, int], float], repeats: int = 9) -> None:
        """Takes the median of time_round(length, M) for each size; sizes take turns, as the machine's other
        work comes and goes."""
        for length in self.lengths(capacity):
            found = [[time_round(length, m) for m in self.sizes] for _ in range(repeats)]
            medians = [sorted(seconds)[repeats // 2] for seconds in zip(*found)]
            agreed = tp.first(medians.copy)  # all ranks must choose alike
            self.seconds |= {(length, m): seconds for m, seconds in zip(self.sizes, agreed)}

    def choose(self, needed: int, most: int = 1 << 30) -> int:
        """The M of the next round, which looks at up to `needed` positions, of which `most` draft tokens can
        be used."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        sizes = [m for m in self.sizes if m <= most] or self.sizes[:1]
        length = min((length for length, _ in self.seconds if length >= needed), default=max(self.seconds)[0])
        overall = (sum(self.passed) + self.STRENGTH * self.PRIOR) / (sum(self.reached) + self.STRENGTH)
        expected, chance, best = 1.0, 1.0, (0.0, 0)
        for place, (reached, passed) in enumerate(zip(self.reached, self.passed), 1):
            chance *= (passed + self.STRENGTH * overall) / (reached + self.STRENGTH)
            expected += chance
            if place in sizes:
                best = max(best, (expected / self.seconds[length, place], place))
        return best[1]
