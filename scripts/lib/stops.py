"""Texts that end an answer, found while it is decoded."""

from collections.abc import Sequence

from scripts.lib.result import Result
from tokenizer import Decoder, Tokenizer


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop text begins that is whole first, of two that end together the longer; None without one.

    Whatever comes later in the text changes nothing of it, so that streaming finds the same.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to its first stop text."""
    return text[: first_stop(text, stops)]


class AnswerText:
    """An answer's text in pieces, as its tokens come, up to the first of `stops`.

    A piece is (text, the token's origin). What may be the beginning of a stop text is held back until it is
    none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder, self.held, self.found = Decoder(tokenizer), [], False
        self.letter = ""  # the last token's origin

    def push(self, token: int, letter: str) -> list[tuple[str, str]]:
        """What can be shown now. A stop token has no text; `found` is set by a stop text, which has none
        either."""
        if token in self.tokenizer.stop_ids or self.found:
            return []
        self.letter = letter
        self.held.append((self.decoder.push(token), letter))
        text = "".join(text for text, _ in self.held)
        at = first_stop(text, self.stops)
        self.found = at is not None
        return self.take(at if self.found else len(text) - self.unsure(text))

    def unsure(self, text: str) -> int:
        """How many characters at the end of a text begin a stop text."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)

    def take(self, count: int) -> list[tuple[str, str]]:
        """The first `count` characters of what is held back, in pieces; the rest stays, or goes after a stop
        text."""
        taken, rest = [], []
        for text, letter in self.held:
            taken.append((text[:count], letter))
            rest.append((text[count:], letter))
            count = max(0, count - len(text))
        self.held = [] if self.found else [piece for piece in rest if piece[0]]
        return [piece for piece in taken if piece[0]]

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back when the answer has ended otherwise, with half a character as U+FFFD."""
        if self.found:
            return []
        self.held.append((self.decoder.flush(), self.letter))
        return self.take(sum(len(text) for text, _ in self.held))


def pieces_of(tokenizer: Tokenizer, result: Result, stops: Sequence[str] = ()) -> list[tuple[str, str]]:
    """All pieces of a whole answer."""
    answer = AnswerText(tokenizer, stops)
    pieces = [piece for pair in zip(result.tokens, result.origin) for piece in answer.push(*pair)]
    return pieces + answer.flush()


def decode_until(
    engine, tokenizer: Tokenizer, prompt: list[int], most: int, seed: int, stops: Sequence[str]
) -> Result:
    """An answer, which ends with the round in which a stop text is whole."""
    if not stops:
        return engine.generate(prompt, most, seed)
    engine.generator.manual_seed(seed % 2**63)
    result, answer = Result(len(prompt)), AnswerText(tokenizer, stops)
    for token, letter in engine.stream(prompt, most, result):
        answer.push(token, letter)
        if answer.found:
            result.stop_reason = "text"
            break
    return result
