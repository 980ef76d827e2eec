"""Protects: which tokens of a given text pass, how rounds are counted, and what is refused."""

import io
import json
import sys

import pytest
import torch
from conftest import ROOT

from cli import InputError
from generate import Engine, Settings
from quantize import load_model
from scripts import score_text
from scripts.lib import acceptance
from scripts.lib.acceptance import rounds_of
from scripts.lib.terminal import DEMO_PROMPT
from scripts.score_text import read_texts
from tokenizer import decode, load_tokenizer

DEMO = ROOT / "checkpoints" / "demo"


@pytest.mark.parametrize(
    "letters, m, expected",
    [("aaat", 4, (3, 1)), ("aaaa", 4, (4, 1)), ("aaaaa", 4, (4, 1)), ("aaaaaa", 4, (5, 2)), ("tt", 4, (0, 2)), ("ratra", 2, (4, 2)),
     ("taaat", 9, (3, 2))],
)  # fmt: skip
def test_rounds_are_counted_as_the_engine_would(letters, m, expected):
    assert rounds_of(list(letters), m) == expected


def test_the_targets_own_answer_passes_and_the_drafts_wording_needs_the_judge(tmp_path, capsys):
    """The target's greedy answer passes the standard test whole; the judge's answer passes where the engine said so."""
    tokenizer, target = load_tokenizer(DEMO / "target"), load_model(DEMO / "target", dtype=torch.float32)
    prompt = tokenizer.prompt(DEMO_PROMPT)
    draft, head = load_model(DEMO / "draft", dtype=torch.float32), None
    from judge import load_judge

    head = load_judge(DEMO / "judge.safetensors", target)
    texts = []
    for settings in (Settings("plain"), Settings("judge")):
        result = Engine(target, draft, head, settings, tokenizer.stop_ids, 300).generate(prompt, 150)
        texts.append({"prompt": DEMO_PROMPT, "response": decode(tokenizer, result.tokens[:-1])})
    rule_alone = result.accepted_by_rule
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    rows = []
    for limit in ("1", "2"):
        score_text.main(["--data", str(tmp_path / "t.jsonl"), "--limit", limit, "--json", "--device", "cpu"])
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert rows[0][0]["passed"] == rows[0][1]["passed"] == 1.0 and rows[0][0]["by_rule"] == 0
    both = {row["rule"]: row for row in rows[1]}
    assert both["judge"]["passed"] == 1.0 and both["standard"]["passed"] < 0.95
    assert round(both["judge"]["by_rule"] * both["judge"]["tokens"]) == rule_alone


def test_show_marks_each_token(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"question": DEMO_PROMPT, "answer": " First, Mia gains 99 apples"})
    )
    score_text.main(["--data", str(tmp_path / "t.jsonl"), "--show", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert (
        "standard:  First, Mia gains <9><9>< apples>" in out
        and "judge:  First, Mia gains <9><9>{ apples}" in out
    )


def test_broken_files_are_named(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    for content, word in (('{"prompt": "a"}', "line 1 must be an object"), ('{"prompt": "a", "response": 3}', "must be text"),
                          ("{", "line 1"), ("", "no texts"), ("[]", "line 1"), ('{"prompt": "a", "response": ""}', "not empty"),
                          ('{"prompt": null, "response": "a"}', "line 1 must be an object"), ("1" * 5000, "5000 digits"), ("[" * 10**5, "too deeply"),
                          ('{"prompt": "\\ud800", "response": "a"}', "surrogate"), ('{"prompt": ["a"], "response": {}}', "must be text")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(InputError, match=word):
            read_texts(path, None)
    with pytest.raises(SystemExit) as stop:
        score_text.main(["--data", str(path), "--verify", "plain"])
    assert stop.value.code == 2 and "the text is the draft" in capsys.readouterr().err


@pytest.mark.parametrize("more, words", [
    (["--data", "/dev/zero"], "is a device"), (["--data", "n" * 300], "File name too long"), (["--limit", "0"], "must be a whole number"),
    (["--show", "-1"], "must be a whole number"), (["--limit", "9" * 500], "must be a whole number"), (["--speculate_k", "0"], "--speculate_k 0"),
    (["--verify", "judge@" + "9" * 5000], "at most 1024"), (["--verify", "window"], "looks ahead"), (["--min_prob", "2"], "must be a number from 0 to 1"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, capsys, more, words):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    with pytest.raises(SystemExit) as stop:
        score_text.main(["--data", str(tmp_path / "t.jsonl"), "--device", "cpu", *more])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1 and len(err) < 1200


def test_logits_that_are_not_finite_are_one_sentence(tmp_path, capsys, monkeypatch):
    real = acceptance.load_pair

    def broken(*args, **more):
        models = real(*args, **more)
        models[0].norm.weight.data[3] = float("nan")
        return models

    monkeypatch.setattr(acceptance, "load_pair", broken)
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": DEMO_PROMPT, "response": " First"}))
    with pytest.raises(SystemExit) as stop:
        score_text.main(["--data", str(tmp_path / "t.jsonl"), "--device", "cpu"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "logits of text 1 are not finite" in captured.err and captured.out == ""


def test_a_terminal_without_the_texts_characters_shows_the_rest(tmp_path, capsys, monkeypatch):
    """Standard output in ASCII, closed, and on a full disk."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "Zo\u00eb", "response": "\u4f60 ok \U0001f642"}))
    command = ["--data", str(tmp_path / "t.jsonl"), "--show", "1", "--device", "cpu"]
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    score_text.main(command)
    ascii_only.flush()
    assert b"standard: <?>" in ascii_only.buffer.getvalue()
    for stream, said in ((None, "standard output is closed"), (open("/dev/full", "w"), "No space left")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            score_text.main(command)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1
