"""Protects: which tokens of a given text pass, how rounds are counted, and what is refused."""

import json

import pytest
import torch
from conftest import ROOT

import generate
from generate import Engine, Settings
from model import load_model
from scripts import score_text
from scripts.score_text import read_texts, rounds_of
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
    prompt = [tokenizer.bos_id, *tokenizer.encode(generate.DEMO_PROMPT)]
    draft, head = load_model(DEMO / "draft", dtype=torch.float32), None
    from judge import load_judge

    head = load_judge(DEMO / "judge.safetensors", target)
    texts = []
    for settings in (Settings("plain"), Settings("judge")):
        result = Engine(target, draft, head, settings, tokenizer.stop_ids, 300).generate(prompt, 150)
        texts.append({"prompt": generate.DEMO_PROMPT, "response": decode(tokenizer, result.tokens[:-1])})
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
    (tmp_path / "t.jsonl").write_text(json.dumps({"question": generate.DEMO_PROMPT, "answer": " First, Mia gains 99 apples"}))
    score_text.main(["--data", str(tmp_path / "t.jsonl"), "--show", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "standard:  First, Mia gains <9><9>< apples>" in out and "judge:  First, Mia gains <9><9>{ apples}" in out


def test_broken_files_are_named(tmp_path, capsys):
    from cli import InputError

    path = tmp_path / "t.jsonl"
    for content, word in (('{"prompt": "a"}', "line 1 must be an object"), ('{"prompt": "a", "response": 3}', "must be text"),
                          ("{", "line 1"), ("", "no texts"), ("[]", "line 1"), ('{"prompt": "a", "response": ""}', "not empty")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(InputError, match=word):
            read_texts(path, None)
    with pytest.raises(SystemExit) as stop:
        score_text.main(["--data", str(path), "--verify", "plain"])
    assert stop.value.code == 2 and "the text is the draft" in capsys.readouterr().err
