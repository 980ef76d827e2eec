"""Protects: --stop is found across tokens and rounds, is not output, and nothing that belongs to one is shown too early."""

import itertools
import json
import random

import pytest

from generate import main
from scripts.lib.result import Result
from scripts.lib.stops import AnswerText, cut, pieces_of


class Texts:
    """A tokenizer of these pieces; token 0 is a stop token."""

    def __init__(self, *pieces: bytes):
        self.pieces, self.stop_ids = [b"", *pieces], [0]

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        return self.pieces[id]


def shown(parts: list[bytes], stops: tuple[str, ...]) -> list[str]:
    """What can be shown after each token, and at the end."""
    answer, texts = AnswerText(Texts(*parts), stops), []
    for token in range(1, len(parts) + 1):
        texts.append("".join(text for text, _ in answer.push(token, "a")))
    return [*texts, "".join(text for text, _ in answer.flush())]


def test_text_is_held_back_only_as_long_as_it_may_begin_a_stop_text():
    assert shown([b"one", b"\n", b"\n", b"two"], ("\n\n",)) == ["one", "", "", "", ""]
    assert shown([b"one", b"\n", b"two", b"\n"], ("\n\n",)) == ["one", "", "\ntwo", "", "\n"]
    assert shown([b"a", b"a", b"ab", b"!"], ("aab",)) == ["", "", "a", "", ""]
    assert shown([b"ST", b"S", b"TOP x"], ("STOP", "x")) == ["", "ST", "", ""]
    assert shown(["é".encode()[:1], "é".encode()[1:], b"."], ("é.",)) == ["", "", "", ""]
    assert shown([b"end", b"\xc3"], ("!",)) == ["end", "", "\ufffd"]
    assert shown([b"no stop"], ()) == ["no stop", ""]


def test_the_text_does_not_depend_on_where_tokens_end():
    """All texts of 7 letters a, b, c, cut into tokens at random, against the definition, end by end."""
    choose = random.Random(0)
    for letters in itertools.product("abc", repeat=7):
        text = "".join(letters)
        stops = tuple(choose.choice(["a", "ab", "ba", "abc", "bcb", "cabc", "bb", "cc"]) for _ in range(2))
        ends = [end for end in range(1, 8) if any(text[:end].endswith(stop) for stop in stops)]
        longest = max((len(s) for s in stops if text[: ends[0]].endswith(s)), default=0) if ends else 0
        expected = text[: ends[0] - longest] if ends else text
        borders = [0, *sorted(choose.sample(range(1, 7), 3)), 7]
        parts = [text[a:b].encode() for a, b in itertools.pairwise(borders)]
        assert "".join(shown(parts, stops)) == cut(text, stops) == expected, (text, stops, parts)


def test_each_piece_keeps_its_tokens_origin():
    result = Result(1, [1, 2, 3, 0], list("artb"))
    assert pieces_of(Texts(b"x.", b". y", b"z"), result, (". z",)) == [
        ("x", "a"),
        (".", "a"),
        (". y", "r"),
        ("z", "t"),
    ]
    assert pieces_of(Texts(b"x.", b". y", b"z"), result, (". y",)) == [("x", "a"), (".", "a")]


DEMO = ["--device", "cpu", "--prompt", "Mia has 47 apples. She buys 38. She multiplies it by 3. She sells 79. How many apples now?"]  # fmt: skip


@pytest.mark.parametrize("verify", ["plain", "judge"])
def test_a_stop_text_ends_the_demos_answer(capsys, verify):
    def answer(*more: str) -> str:
        main([*DEMO, "--verify", verify, *more])
        return capsys.readouterr().out

    whole = json.loads(answer("--json"))
    for stop in (whole["text"][10:17], whole["text"][40:43], "=", "no such text"):
        record = json.loads(answer("--json", "--stop", stop, "--stop", "neither this"))
        assert record["text"] == whole["text"].partition(stop)[0]
        assert record["tokens"] == whole["tokens"][: len(record["tokens"])]
        found = stop in whole["text"]
        assert record["stop_reason"] == ("text" if found else "stop") and record["stop"] == [
            stop,
            "neither this",
        ]
        assert (record["rounds"] < whole["rounds"]) == found
        assert answer("--stop", stop) == record["text"] + "\n"
