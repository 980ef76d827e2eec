"""What decoding gives: a round as the host reads it, and an answer with its figures."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, cat


class Report(NamedTuple):
    """All that the host needs of a round of M draft tokens (0 of a plain step): one tensor (2 M + 4,), int64.

    On the device the fields are tensors, on the host lists of numbers.
    """

    accepted: Tensor  # (1,) how many draft tokens were accepted
    tokens: Tensor  # (M + 1,) the tokens committed: the accepted ones, the target's own, padding
    by_rule: Tensor  # (M,) 1 where the rule alone let the draft token through
    score: Tensor  # (1,) the judge's scores of the accepted tokens and the first rejected: sum, in millionths
    flawed: Tensor  # (1,) whether logits were not finite: + 1 the target's, + 2 the draft's

    def pack(self) -> Tensor:
        return cat(self)

    @classmethod
    def unpack(cls, packed: list[int]) -> "Report":
        m = len(packed) // 2 - 2
        return cls(packed[:1], packed[1 : m + 2], packed[m + 2 : -2], packed[-2:-1], packed[-1:])


@dataclass
class Round:
    """What one round committed. by_rule[i]: draft token i passed by the rule alone; the last token is the
    target's. score: the sum of the judge's scores of the tokens that were looked at, which are `scored`."""

    tokens: list[int]
    accepted: int
    by_rule: list[bool]
    drafted: int = 0
    score: float = 0.0
    scored: int = 0
    flawed: int = 0

    @classmethod
    def of(cls, report: Report, drafted: int, has_judge: bool) -> "Round":
        accepted = report.accepted[0]
        scored = min(accepted + 1, drafted) if has_judge else 0
        by_rule = [bool(x) for x in report.by_rule[:accepted]]
        score = report.score[0] / 1e6
        return cls(report.tokens[: accepted + 1], accepted, by_rule, drafted, score, scored, report.flawed[0])

    @property
    def origin(self) -> list[str]:
        """One letter a token: a(ccepted), r(ule alone), last t(he target's own), or b(onus) if all passed."""
        letters = ["r" if by_rule else "a" for by_rule in self.by_rule]
        return [*letters, "b" if self.drafted == self.accepted > 0 else "t"]


@dataclass
class Result:
    """An answer. origin: one letter a token, as `Round.origin` gives them."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)
    stop_reason: str = "length"
    rounds: int = 0
    drafted: int = 0
    prefilled: int = 0  # prompt tokens that were read; the caches held those before, the last is a round's
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    score: float = 0.0
    scored: int = 0

    def add(self, got: Round, most: int, stop_ids: list[int]) -> list[tuple[int, str]]:
        """Adds a round, up to `most` tokens in all and the first stop token; returns its (token, origin)."""
        self.rounds += 1
        self.drafted += got.drafted
        self.score, self.scored = self.score + got.score, self.scored + got.scored
        fresh = list(zip(got.tokens, got.origin))[: most - len(self.tokens)]

        for at, (token, _) in enumerate(fresh):
            if token in stop_ids:
                fresh, self.stop_reason = fresh[: at + 1], "stop"
                break

        self.tokens += [token for token, _ in fresh]
        self.origin += [letter for _, letter in fresh]
        return fresh

    @property
    def mean_score(self) -> float | None:
        """The judge's mean score over the draft tokens that were looked at, None without a judge."""
        return self.score / self.scored if self.scored else None

    @property
    def accepted(self) -> int:
        return sum(letter in "ar" for letter in self.origin)

    @property
    def accepted_by_rule(self) -> int:
        return self.origin.count("r")

    @property
    def mean_accepted(self) -> float:
        """m*: draft tokens accepted a round, without the target's own token."""
        return self.accepted / self.rounds if self.rounds and self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds_decode if self.seconds_decode else 0.0
