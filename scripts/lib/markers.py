"""Where in an answer a rule applies: between two texts, found by their bytes as tokens come."""

from typing import NamedTuple

import torch
from torch import Tensor

from cli import InputError
from tokenizer import Tokenizer


class Markers(NamedTuple):
    """Two texts as an automaton over tokens: table[state, token] is the next state; from `inside` on, the
    text stands between them. It reads bytes, so that it does not matter how the texts were cut into
    tokens."""

    table: Tensor  # (states, V) uint8
    inside: int

    def to(self, device: torch.device | str) -> "Markers":
        return Markers(self.table.to(device), self.inside)

    def walk(self, region: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """From state `region` (1,) over draft tokens (M,): which of them a rule may accept, bool (M,), and
        the states (M + 1,) before, between and after them. The token that completes either text is left to
        the standard test (unless it also begins the next stretch, as one that closes and opens at once)."""
        states = [region]
        for token in drafted.split(1):
            states.append(self.table[states[-1], token].long())
        states = torch.cat(states)
        inside = states >= self.inside
        return inside[:-1] & inside[1:], states

    def after(self, ids: list[int]) -> int:
        """The state after a prompt."""
        state, table = 0, self.table.cpu()
        for id in ids:
            state = int(table[state, id])
        return state


def make_markers(between: tuple[str, str] | None, tokenizer: Tokenizer, vocab_size: int) -> Markers | None:
    """The automaton for --relax_between BEGIN END. Raises InputError for texts that are empty or too long."""
    if between is None:
        return None
    begin, end = (text.encode() for text in between)
    if not begin or not end or len(begin + end) > 255:
        raise InputError(
            f"--relax_between {between[0]!r} {between[1]!r}: give two texts, together of at most 255 bytes."
        )
    dfa = byte_automaton(begin, end)
    known = min(vocab_size, tokenizer.vocab_size)
    pieces = [tokenizer.token_bytes(id) for id in range(known)] + [b""] * (vocab_size - known)
    table = torch.arange(len(dfa), dtype=torch.uint8)[:, None].repeat(1, vocab_size)
    for place in range(max(map(len, pieces))):
        some = [id for id, piece in enumerate(pieces) if len(piece) > place]
        bytes_here = torch.tensor([pieces[id][place] for id in some])
        table[:, some] = dfa[table[:, some].long(), bytes_here]
    return Markers(table, len(begin))


def byte_automaton(begin: bytes, end: bytes) -> Tensor:
    """Knuth-Morris-Pratt for two texts in turn, (states, 256) uint8: state k < len(begin) has seen k bytes of
    begin, state len(begin) + k has seen begin and then k bytes of end."""
    rows = []
    for text, base, done in ((begin, 0, len(begin)), (end, len(begin), 0)):
        for seen in range(len(text)):
            row = []
            for byte in range(256):
                tail = text[:seen] + bytes([byte])
                match = next(k for k in range(len(tail), -1, -1) if tail.endswith(text[:k]))
                row.append(done if match == len(text) else base + match)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.uint8)
