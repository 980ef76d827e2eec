"""Protects: mining on a pair whose important tokens are known, the cache it keeps, resuming, shards and their merge."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_generate import Scripted, V, one_hot

from files import Lines
from generate import Engine, NotFinite, Settings
from quantize import load_model
from scripts import mine_important_tokens as mining
from scripts.lib.answers import encode_items, read_answers
from scripts.lib.features import RowReader
from scripts.lib.scoring import CHECKERS, Checker, Question
from scripts.mine_important_tokens import draft_choices, mine, training_lines
from tokenizer import load_tokenizer

DEMO = ROOT / "checkpoints" / "demo"
STOP = 7


class Digits:
    """Token t is the digit t; 7 ends the text."""

    prefix, vocab_size, stop_ids = [0], V, [STOP]

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        return str(id).encode()


def toy(table: dict[str, int], otherwise: int):
    """A model that says table[text so far], found by its longest listed ending, else `otherwise`; text is all digits read."""
    seen = {}

    def next_token(n: int, t: int):
        for place in [place for place in seen if place >= n]:
            del seen[place]
        seen[n] = str(t)
        text = "".join(seen[place] for place in sorted(seen))
        ending = next((text[-k:] for k in range(len(text), 0, -1) if text[-k:] in table), None)
        return one_hot(table[ending] if ending else otherwise)

    return Scripted(next_token)


@pytest.fixture
def first_digit(monkeypatch):
    """The final answer of a text is its last digit."""
    checker = Checker(lambda question, text: text[-1:] or None, lambda question, text: True)
    monkeypatch.setitem(CHECKERS, "last", checker)
    return Question(0, "", "", "last")


def test_mining_finds_exactly_the_tokens_that_change_the_answer(first_digit):
    """The target writes 1 2 3 4 and stops. After 1 5 it writes 3 4 all the same (5 for 2 is unimportant); after 3 6 it
    ends with 6 (6 for 4 is important). The draft says 5 after 1, and 6 after 3."""
    target = toy({"01": 2, "012": 3, "15": 3, "123": 4, "153": 4, "4": STOP, "6": STOP, "0": 1}, STOP)
    draft = toy({"0": 1, "1": 5, "5": 3, "2": 3, "3": 6, "4": STOP, "6": STOP}, STOP)
    for k in (1, 3, 6):
        engine = Engine(target, draft, None, Settings("standard", speculate_k=k), [STOP], 24)
        found = mine(engine, [0], first_digit, Digits(), 12)
        assert found == {"tokens": [1, 5, 3, 4, STOP], "unimportant": [1], "important": [[3, 6]]}, k
    lines = training_lines(found | {"prompt_tokens": [0], "question": "q", "source": "s"})
    assert [(line["tokens"], line["labels"]) for line in lines] == [
        ([1, 5, 3, 6], [-100, -100, -100, 0]), ([1, 5, 3, 4, STOP], [-100, 1, -100, -100, -100])]  # fmt: skip


def test_a_trial_at_the_last_allowed_token_is_no_trial(first_digit):
    """The draft differs at the very last token of --max_new_tokens: nothing can follow it, so it counts as important."""
    target = toy({"0": 1, "01": 2, "012": 3, "0123": STOP}, 4)
    draft = toy({"0": 1, "1": 2, "2": 3, "3": 5}, 5)
    engine = Engine(target, draft, None, Settings("standard", speculate_k=2), [STOP], 5)
    assert mine(engine, [0], first_digit, Digits(), 4) == {
        "tokens": [1, 2, 3, STOP],
        "unimportant": [],
        "important": [[3, 5]],
    }


def test_an_answer_that_cannot_be_compared_is_skipped(first_digit):
    endless = toy({"0": 1}, 1)
    engine = Engine(endless, endless, None, Settings("standard", speculate_k=2), [STOP], 24)
    assert mine(engine, [0], first_digit, Digits(), 6) == {"skipped": "cut off"}
    silent = toy({}, STOP)
    engine = Engine(silent, silent, None, Settings("standard", speculate_k=2), [STOP], 24)
    assert mine(engine, [0], Question(0, "", "", "number"), Digits(), 6) in (
        {"skipped": "no final answer"},
        {"skipped": "cut off"},
    )


@torch.inference_mode()
@pytest.mark.parametrize("start, known", [(70, 0), (70, 69), (75, 100), (99, 64), (99, 98), (1, 0)])
def test_draft_choices_are_the_drafts_own(pair, start, known):
    target, draft = pair
    ids = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = Engine(target, draft, None, Settings("standard"), [96], 150)
    engine.prefill(ids)
    if known < 100:  # what lies beyond `known` in the cache is of another text
        engine.prefill([*ids[:known], *[3] * (100 - known)], keep=known)
    expected = draft(torch.tensor([ids]))[1][0].argmax(-1)[start - 1 : 99].tolist()
    assert draft_choices(engine, ids, start, known) == expected


@torch.inference_mode()
@pytest.mark.parametrize("keep", [0, 1, 63, 64, 65, 90])
def test_a_kept_cache_gives_the_output_of_a_fresh_one(pair, keep):
    target, draft = pair
    one = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    other = (
        one[:keep] + torch.randint(0, 97, (100 - keep,), generator=torch.Generator().manual_seed(2)).tolist()
    )
    engine = Engine(target, draft, None, Settings("standard", speculate_k=4), [96], 160)
    fresh = engine.generate(other, 30).tokens
    engine.generate(one, 30)
    assert engine.generate(other, 30, keep=keep).tokens == fresh


FEW = ["--limit", "3", "--device", "cpu", "--seed", "5"]


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """Three questions of the demo, mined by the command as it is typed: the folder of its `whole`."""
    folder = tmp_path_factory.mktemp("mined")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "mine_important_tokens.py"),
        *FEW,
        "--out",
        str(folder / "whole"),
    ]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return folder


def contents(path) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.slow
def test_a_killed_or_sharded_run_gives_the_same_training_data(mined, tmp_path, monkeypatch, capsys):
    """Whole; cut in the middle of a line and resumed; dealt to two processes as torchrun does, one of them killed once,
    and merged."""

    def run(out: str, *more: str) -> None:
        mining.main([*FEW, "--out", str(tmp_path / out), *more])

    def refused(out: str, *more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(out, *more)
        assert stop.value.code == 2
        return capsys.readouterr().err

    whole = (mined / "whole").read_bytes()
    lines = (mined / "whole.part0of1").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 and whole
    (tmp_path / "cut.part0of1").write_bytes(b"".join(lines[:3]) + lines[3][:100])
    run("cut")
    assert (tmp_path / "cut").read_bytes() == whole
    assert contents(tmp_path / "cut.part0of1") == contents(mined / "whole.part0of1")
    (tmp_path / "two.part0of2").write_bytes(b"".join(lines[:2]) + lines[3][:100])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        run("two")
        assert not (tmp_path / "two").exists()
        if rank == 0:
            with monkeypatch.context() as alone:
                alone.delenv("RANK")
                alone.delenv("WORLD_SIZE")
                assert "two.part1of2" in refused("two", "--merge", "2") and not (tmp_path / "two").exists()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    run("two", "--merge", "2")
    assert (tmp_path / "two").read_bytes() == whole
    header, *records = contents(mined / "whole.part0of1")
    for rank in (0, 1):
        assert contents(tmp_path / f"two.part{rank}of2") == [header, *records[rank::2]]
    assert "lack 1 questions" in refused("two", "--merge", "2", "--limit", "4")
    assert "max_new_tokens" in refused("cut", "--max_new_tokens", "90")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "cut").read_bytes() == whole


def test_mined_labels_are_of_the_drafts_tokens(mined):
    """On the demo pair: each labelled token is the draft's own choice after the tokens before it, and not the target's;
    and the file is what judge.py train reads."""
    answers, tokenizer = read_answers(mined / "whole"), load_tokenizer(DEMO / "target")
    target, draft = (load_model(DEMO / role, dtype=torch.float32) for role in ("target", "draft"))
    encoded = encode_items(tokenizer, answers, False, target.args.vocab_size)
    readers, labelled = [RowReader(model, 17, 300) for model in (target, draft)], 0
    for answer in encoded:
        both, base = answer.prompt + answer.ids, len(answer.prompt) - 1
        said = [
            r.model.output(r.model.norm(r.read(both, base, base, len(both) - 1))).argmax(-1).tolist()
            for r in readers
        ]
        for place, mark in enumerate(answer.item["labels"]):
            if mark >= 0:
                assert said[1][place] == answer.ids[place] != said[0][place]
                labelled += 1
    assert labelled > 20 and {mark for answer in answers for mark in answer["labels"]} == {1, 0, -100}


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mining, "load_pair", lambda *args: pytest.fail("loaded all the same"))
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "b.part0of1")
    for more, word in (
        (["--out", "/no/such/file"], "cannot be written"), (["--checker", "number"], "demo"),
        (["--questions", str(tmp_path / "no.jsonl"), "--checker", "number"], "no.jsonl"), (["--device", "tpu"], "tpu"),
        (["--merge", "0"], "--merge 0"), (["--merge", "3"], "part0of3"), (["--out", str(ROOT / "LICENSE")], "not from mining"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0"), (["--max_new_tokens", "9" * 5000], "--max_new_tokens"), (["--speculate_k", "0"], "--speculate_k"),
        (["--max_new_tokens", "600"], "do not fit the model's context of 512"), (["--speculate_k", "1e3"], "--speculate_k"), (["--limit", "0"], "--limit"),
        (["--out", "/dev/null"], "it is a device"), (["--out", str(tmp_path / "pipe")], "it is a pipe"), (["--out", str(tmp_path / "b")], "it is a pipe"),
        (["--out", str(DEMO / "target" / "config.json")], "one of the inputs"), (["--out", str(tmp_path / ("x" * 247))], "too long"), (["--chat"], "--chat"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            mining.main(["--out", str(tmp_path / "out"), "--device", "cpu", *more])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1, err
    for rank, size in (
        ("3", "1"),
        ("x", "2"),
        ("-1", "2"),
        ("0", "0"),
        ("1" * 5000, "2"),
        ("", ""),
        ("٣", "9"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(SystemExit) as stop:
            mining.main(["--out", str(tmp_path / "out"), "--device", "cpu"])
        assert stop.value.code == 2 and "not those of a torchrun process" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.part0of1", "pipe"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The command line without models: `mined` says what mining a question gives, by its number."""
    pair = [type("Model", (), {"fingerprint": name}) for name in ("t", "d")]
    monkeypatch.setattr(mining, "load_pair", lambda *args: (*pair, None))
    engine = type("Engine", (), {"__init__": lambda self, *args: None, "warm_up": lambda self: 0.0})
    monkeypatch.setattr(mining, "Engine", engine)
    made = []

    def mined(engine, prompt, question, tokenizer, max_new_tokens):
        made.append(question.index)
        if question.index == 2:
            raise NotFinite("the logits are not finite")
        return {"tokens": [5, 6, 7], "unimportant": [1], "important": [[2, 9]]}

    monkeypatch.setattr(mining, "mine", mined)
    return made


def command(out, *more: str) -> list[str]:
    return ["--limit", "4", "--device", "cpu", "--out", str(out), *more]


def test_a_question_whose_logits_overflow_is_skipped_and_counted(tmp_path, fake, capsys):
    mining.main(command(tmp_path / "out"))
    assert f"{tmp_path / 'out'}: 3 questions mined, 1 skipped (1 not finite)" in capsys.readouterr().out
    assert [record.get("skipped") for record in contents(tmp_path / "out.part0of1")[1:]] == [
        None,
        None,
        "not finite",
        None,
    ]
    assert len(read_answers(tmp_path / "out")) == 6


def test_a_run_cut_anywhere_ends_with_the_same_files(tmp_path, fake):
    mining.main(command(tmp_path / "whole"))
    lines = (tmp_path / "whole.part0of1").read_bytes().splitlines(keepends=True)
    for kept in range(6):
        for half in (b"", *([lines[kept][:9], lines[kept][:-1]] if kept < 5 else [])):
            (tmp_path / "cut.part0of1").write_bytes(b"".join(lines[:kept]) + half)
            fake.clear()
            mining.main(command(tmp_path / "cut"))
            assert fake == list(range(max(0, kept - 1), 4))
            assert contents(tmp_path / "cut.part0of1") == contents(tmp_path / "whole.part0of1")
            assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_parts_are_left_alone_where_they_are_of_others(tmp_path, fake, capsys):
    """In use, of other settings, of another number of processes, edited, or no part at all: one sentence, not a byte changed."""
    out, part = tmp_path / "out", tmp_path / "out.part0of1"
    mining.main(command(out))
    good, merged = part.read_bytes(), out.read_bytes()
    lines = [json.loads(line) for line in good.splitlines()]

    def fails(*more: str) -> str:
        before = part.read_bytes()
        with pytest.raises(SystemExit) as stop:
            mining.main(command(out, *more))
        err = capsys.readouterr().err.removeprefix("warmed up in 0.0 s\n")
        assert (
            stop.value.code == 2
            and err.count("\n") == 1
            and part.read_bytes() == before
            and out.read_bytes() == merged
        )
        return err

    part.write_bytes(good[:-9])
    first = Lines(part)
    capsys.readouterr()
    assert "being written by another process" in fails()
    first.close()
    part.write_bytes(good)
    assert "max_new_tokens" in fails("--max_new_tokens", "90")
    (tmp_path / "out.part0of3").write_text("")
    assert "of a run with 3 processes" in fails()
    (tmp_path / "out.part0of3").unlink()
    for change, field in (({"tokens": "x"}, "tokens"), ({"important": [[9, 1]]}, "important"), ({"unimportant": [True]}, "unimportant"),
                          ({"seconds": -1}, "seconds"), ({"prompt_tokens": None}, "prompt_tokens"), ({"question": 3}, "question"),
                          ({"important": [3]}, "important"), ({"skipped": 3}, "skipped")):  # fmt: skip
        part.write_text(
            "".join(json.dumps(line | (change if at == 2 else {})) + "\n" for at, line in enumerate(lines))
        )
        for more in ((), ("--merge", "1")):
            assert f"{part}, line 3: field {field!r}" in fails(*more)
    for content in (b"mine\n", b"mine", b"[]\n", b"{}\n", b'{"target": "other"}\n', b"\xff\n"):
        part.write_bytes(content)
        for more in ((), ("--merge", "1")):
            assert str(out) in fails(*more)
