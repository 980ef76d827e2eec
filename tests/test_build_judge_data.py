"""Protects: which answers become training data, and that a killed run ends with the same files without losing work."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import Child

from checkpoint import DEMO
from cli import InputError
from files import Lines, digest
from generate import NotFinite
from scripts import build_judge_data
from scripts.build_judge_data import choose, different, main, pick, read_temperatures
from scripts.lib import sandbox
from scripts.lib.answers import read_answers
from scripts.lib.demo_task import check, is_held_out
from scripts.lib.result import Result
from scripts.lib.tasks import load_questions
from tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO / "target")
FOLDERS = [str(DEMO / "target"), str(DEMO / "draft")]


def command(out: Path, *more: str) -> list[str]:
    return ["--checkpoint_path", *FOLDERS, "--device", "cpu", "--out", str(out), *more]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(question: str, model: int, right: bool, text: str, dropped: str | None = None) -> dict:
    return {"question": question, "model": model, "right": right, "response": text, "dropped": dropped}


def texts(records: list[dict]) -> list[str]:
    return [record["response"] for record in records]


def test_a_tuple_is_one_right_and_one_wrong_answer_of_different_models():
    records = [
        answer("both", 0, True, "right 0"), answer("both", 0, False, "wrong 0"), answer("both", 1, True, "right 1"),
        answer("only right", 0, True, "a"), answer("only wrong", 1, False, "b"), answer("dropped", 0, True, "c"),
        answer("dropped", 1, None, "d", "cut off"), answer("same model", 1, False, "wrong"), answer("same model", 1, True, "right"),
    ]  # fmt: skip
    assert texts(choose(records, 2, 1, 1)) == [
        "right 1",
        "wrong 0",
        "right",
        "wrong",
    ]  # only model 0 was wrong
    assert texts(choose(records[::-1], 2, 1, 1)) == ["right", "wrong", "right 1", "wrong 0"]


def test_more_answers_a_tuple_differ_and_take_turns():
    mine = [
        answer("q", model, True, text) for model, text in ((0, "a"), (0, "b"), (1, "a"), (1, "c"), (2, "d"))
    ]
    assert texts(pick(mine, 1, Counter(), 0, 3)) == ["a"]
    assert texts(pick(mine, 3, Counter(), 0, 3)) == ["a", "c", "d"]  # each model once before any twice
    assert texts(pick(mine, 9, Counter(), 0, 3)) == ["a", "c", "d", "b"]  # no text twice
    assert texts(pick(mine, 1, Counter(), 2, 3)) == ["d"] and texts(pick(mine, 1, Counter({0: 1}), 0, 3)) == [
        "a"
    ]
    assert pick(mine, 1, Counter({0: 1}), 0, 3)[0]["model"] == 1
    both = mine + [answer("q", 0, False, "w")]
    assert texts(choose(both, 3, 2, 5)) == ["a", "d", "w"]  # model 0 gave the wrong one
    more = [answer("q", 1, None, "x", "cut off"), answer("r", 0, True, "a")]
    assert texts(different(both + more)) == ["a", "b", "c", "d", "w", "a"]


def test_temperatures_are_parsed():
    assert read_temperatures("0,0.8") == [0, 0.8]
    for text, word in (
        ("", "list of numbers"),
        ("0,x", "0,x"),
        ("0,-1", "-1"),
        ("nan", "nan"),
        ("0.5,0,0.50", "0.5 twice"),
    ):
        with pytest.raises(InputError, match=word):
            read_temperatures(text)


@pytest.mark.slow
def test_answers_of_the_demo_pair_are_labelled(tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    main(command(out, "--limit", "5", "--temperature", "0,1", "--samples", "2", "--max_new_tokens", "150"))
    printed = capsys.readouterr().out
    problems = {q.id: q.content for q in load_questions("demo", None, 5, held_out=False)}
    assert not any(is_held_out(problem) for problem in problems.values())
    every, chosen = lines_of(tmp_path / "answers.jsonl.all")[1:], lines_of(out)
    assert len(every) == 5 * 2 * (1 + 2) and {r["source"] for r in every} == {
        f"{model}, temperature {temperature}" for model in ("target", "draft") for temperature in (0, 1)
    }  # fmt: skip
    assert len({r["response"] for r in every if r["source"] == "target, temperature 1"}) > 5  # samples differ
    for line in chosen:
        assert list(line) == ["prompt", "response", "reference", "right", "errors", "source", "question"]
        problem = problems[line["question"]]
        assert line["prompt"] == problem.question and line["right"] == check(problem, line["response"]).right
        assert line["errors"] == ([] if line["right"] else None)
    pairs = Counter((line["question"], line["right"]) for line in chosen)
    assert (
        chosen and set(pairs.values()) == {1} and len(pairs) == 2 * len({line["question"] for line in chosen})
    )
    tokens = sum(
        r["tokens"]
        for r in every
        if (r["question"], r["response"]) in {(c["question"], c["response"]) for c in chosen}
    )
    counts = f"{len(chosen) // 2} tuples, {len(chosen)} answers ({len(chosen) // 2} right, {len(chosen) // 2} wrong), {tokens} tokens"
    assert counts in printed and "from 5 questions, 30 answers, 0 dropped" in printed
    with pytest.raises(InputError, match="errors"):
        read_answers(out)  # somebody must mark the wrong answers first


class Writer:
    """Stands in for the engine: what it answers depends on prompt, model, temperature and seed only."""

    calls: list = []
    text = staticmethod(lambda prompt, model, temperature, seed: f"It is {seed % 3}.")
    stop_reason = staticmethod(lambda prompt, seed: "stop")

    def __init__(self, target, draft, head, settings, stop_ids, length):
        self.model, self.temperature, self.stop_ids, self.length = (
            target,
            settings.temperature,
            stop_ids,
            length,
        )
        assert (draft, head, settings.verify) == (None, None, "plain")

    def generate(self, prompt: list[int], max_new_tokens: int, seed: int = 0) -> Result:
        assert len(prompt) + max_new_tokens <= self.length
        Writer.calls.append((self.model, self.temperature, tuple(prompt), seed))
        tokens = TOKENIZER.encode(self.text(prompt, self.model, self.temperature, seed))
        return Result(len(prompt), [*tokens, self.stop_ids[0]], stop_reason=self.stop_reason(prompt, seed))


@pytest.fixture
def writer(monkeypatch):
    """Models load as their folder's name, and answer by Writer."""
    monkeypatch.setattr(build_judge_data, "load_model", lambda folder, device, dtype: Path(folder).name)
    monkeypatch.setattr(build_judge_data, "Engine", Writer)
    monkeypatch.setattr(Writer, "calls", [])
    return Writer


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {n}?", "answer": n % 3}) + "\n" for n in range(6))
    )
    return path


def asked(questions: Path, out: Path, *more: str) -> list[str]:
    return command(
        out,
        "--questions",
        str(questions),
        "--checker",
        "number",
        "--samples",
        "2",
        "--max_new_tokens",
        "20",
        *more,
    )


def test_every_answer_has_its_own_seed_and_order(questions, tmp_path, writer):
    main(asked(questions, tmp_path / "a.jsonl"))
    assert len(writer.calls) == len(set(writer.calls)) == 6 * 2 * (1 + 2)
    assert len({seed for *_, seed in writer.calls}) == 6 * 2  # by question and sample
    assert [call[:2] for call in writer.calls[::6]] == [
        (m, t) for m in ("target", "draft") for t in (0.0, 0.8, 0.8)
    ]
    prompts = [TOKENIZER.prompt(f"What is {n}?") for n in range(6)]
    assert [list(call[2]) for call in writer.calls[:6]] == prompts
    seeds = [seed for *_, seed in writer.calls]
    main(asked(questions, tmp_path / "b.jsonl", "--seed", "7"))
    assert set(seeds).isdisjoint(seed for *_, seed in writer.calls[len(seeds) :])


def test_chat_puts_the_question_into_the_chat_format(questions, tmp_path, writer, monkeypatch):
    def encode_chat(self, messages: list[dict]) -> list[int]:
        assert [message["role"] for message in messages] == ["user"]
        return [9, 9, *self.encode(messages[0]["content"])]

    monkeypatch.setattr(type(TOKENIZER), "encode_chat", encode_chat)
    main(asked(questions, tmp_path / "a.jsonl", "--chat", "--limit", "2", "--no-tuples"))
    assert {call[2] for call in writer.calls} == {
        (9, 9, *TOKENIZER.encode(f"What is {n}?")) for n in range(2)
    }


def test_what_cannot_be_used_is_dropped_but_kept_in_mind(questions, tmp_path, writer, monkeypatch, capsys):
    kinds = {0: "It is 0.", 1: "I do not know.", 2: "", 3: "It is 3.", 4: "It is 1.", 5: "7 7 7"}

    def number(prompt: list[int]) -> int:
        return int(TOKENIZER.model.decode(prompt)[-2])

    monkeypatch.setattr(writer, "text", staticmethod(lambda prompt, *_: kinds[number(prompt)]))
    monkeypatch.setattr(
        writer, "stop_reason", staticmethod(lambda prompt, seed: "length" if number(prompt) == 5 else "stop")
    )
    main(asked(questions, tmp_path / "a.jsonl", "--temperature", "0", "--no-tuples"))
    every = lines_of(tmp_path / "a.jsonl.all")[1:]
    assert [r["dropped"] for r in every] == [None, "no answer", "no answer", None, None, "cut off"] * 2
    assert [r["right"] for r in every] == [True, None, None, False, True, None] * 2
    chosen = lines_of(tmp_path / "a.jsonl")
    assert [(c["response"], c["right"], c["errors"]) for c in chosen] == [(" It is 0.", True, []), (" It is 3.", False, None), (" It is 1.", True, [])]  # fmt: skip
    out = capsys.readouterr().out
    assert "3 answers (2 right, 1 wrong), " in out and "from 6 questions, 12 answers, 6 dropped." in out
    assert out.splitlines()[1].split()[-5:] == ["6", "2", "1", "1", "2"]
    with pytest.raises(SystemExit) as stop:  # the same answers give no tuple
        main(asked(questions, tmp_path / "b.jsonl", "--temperature", "0"))
    assert stop.value.code == 2 and "nothing to choose" in capsys.readouterr().err
    assert not (tmp_path / "b.jsonl").exists() and len(lines_of(tmp_path / "b.jsonl.all")) == 13


def test_a_killed_run_resumes_to_the_same_files(questions, tmp_path, writer, capsys):
    whole = tmp_path / "whole.jsonl"
    main(asked(questions, whole))
    printed = capsys.readouterr().out
    content, made = Path(f"{whole}.all").read_bytes(), len(writer.calls)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == made + 1 == 37
    for cut in [
        0,
        1,
        ends[0] - 1,
        *(end + extra for end in ends[:-1] for extra in (0, 1, 100)),
        ends[-1] - 1,
        ends[-1],
    ]:
        out = tmp_path / "cut.jsonl"
        out.unlink(missing_ok=True)
        Path(f"{out}.all").write_bytes(content[:cut])
        writer.calls.clear()
        main(asked(questions, out))
        assert Path(f"{out}.all").read_bytes() == content and out.read_bytes() == whole.read_bytes()
        assert len(writer.calls) == made - max(
            0, sum(end <= cut for end in ends) - 1
        )  # no answer is made twice
        assert capsys.readouterr().out == printed.replace("whole", "cut")


@pytest.mark.slow
def test_a_run_killed_for_real_resumes_to_the_same_files(tmp_path):
    more = ("--limit", "3", "--temperature", "0,1", "--max_new_tokens", "150")
    main(command(tmp_path / "whole.jsonl", *more))
    out, work = tmp_path / "cut.jsonl", tmp_path / "cut.jsonl.all"
    child = Child(main, command(out, *more))
    while child.poll() is None and not (work.exists() and work.read_bytes().count(b"\n") >= 4):
        time.sleep(0.02)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not out.exists()
    main(command(out, *more))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert lines_of(work)[1:] == lines_of(tmp_path / "whole.jsonl.all")[1:]


def fails(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


def test_nobodys_work_is_overwritten(questions, tmp_path, writer, capsys):
    out = tmp_path / "a.jsonl"
    out.write_text("mine\n")
    assert (
        "is not the output of this run" in fails(asked(questions, out), capsys)
        and out.read_text() == "mine\n"
    )
    out.unlink()
    main(asked(questions, out))
    first = out.read_bytes()
    main(asked(questions, out))  # the same again is no harm
    assert out.read_bytes() == first
    marked = first.replace(b'"errors": null', b'"errors": [[0, 1]]')
    assert marked != first
    out.write_bytes(marked)
    for more in ((), ("--no-tuples",)):
        assert "annotated" in fails(asked(questions, out, *more), capsys) and out.read_bytes() == marked
    made = Path(f"{out}.all").read_bytes()
    for more, word in ((("--seed", "3"), "seed"), (("--limit", "3"), "questions"), (("--samples", "1"), "samples"), (("--temperature", "1"), "temperature")):  # fmt: skip
        assert f"({word})" in fails(asked(questions, out, *more), capsys)
    assert Path(f"{out}.all").read_bytes() == made
    lines = made.splitlines(keepends=True)
    Path(f"{out}.all").write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert "order" in fails(asked(questions, out), capsys)


def test_checkpoints_are_told_apart_by_their_weights(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "original").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"w" * 100000)
        (tmp_path / name / "original" / "tokenizer.model").write_bytes(b"t")
        (tmp_path / name / "README.md").write_text(name)
    one, two = tmp_path / "one", tmp_path / "two"
    assert digest(one) == digest(two)
    (two / "model.safetensors").write_bytes(b"w" * 99999 + b"x")
    assert digest(one) != digest(two)
    (two / "model.safetensors").write_bytes(b"w" * 100001)
    assert digest(one) != digest(two)
    assert digest(DEMO / "target") != digest(DEMO / "draft")


def test_the_demos_grammar_marks_errors(tmp_path):
    out = tmp_path / "a.jsonl"
    more = (
        "--limit",
        "12",
        "--temperature",
        "1",
        "--annotate_demo",
        "--no-tuples",
        "--questions",
        "demo:list",
    )
    main(["--checkpoint_path", FOLDERS[1], "--device", "cpu", "--out", str(out), *more])
    answers = read_answers(out)  # ready to train on
    problems = {q.id: q.content for q in load_questions("demo:list", None, 12, held_out=False)}
    assert {a["right"] for a in answers} == {True, False}
    for item in answers:
        verdict = check(problems[item["question"]], item["response"])
        if item["right"]:
            assert len(item["errors"]) == len(verdict.taken_back)
        elif verdict.first_error < len(item["response"]):
            assert item["errors"][-1][0] == verdict.first_error


def test_mistakes_are_one_sentence(questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sandbox, "code_is_allowed", False)
    out, folder = tmp_path / "a.jsonl", FOLDERS[0]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "b.jsonl.all")
    config = (DEMO / "target" / "config.json").read_bytes()
    for argv, word in (
        (command(out, "--samples", "0"), "--samples 0"), (command(out, "--right", "0"), "--right 0"), (command(out, "--max_new_tokens", "0"), "--max_new_tokens 0"),
        (command(out, "--samples", "9" * 30), "--samples"), (command(out, "--wrong", "1e9"), "--wrong"), (command(out, "--max_new_tokens", "1" * 5000), "--max_new_tokens"),
        (command(out, "--temperature", "1e999"), "inf"), (command(out, "--temperature", "," * 9000), "not a list of numbers"), (command(Path("/dev/null")), "it is a device"),
        (command(tmp_path / "pipe"), "it is a pipe"), (command(tmp_path / ("x" * 252)), "too long"), (command(questions, "--questions", str(questions), "--checker", "number"), "one of the inputs"),
        (command(DEMO / "target" / "config.json"), "one of the inputs"), (command(out, "--task", "gsm8k", "--data", str(questions), "--annotate_demo"), "not gsm8k"),

        (command(out, "--temperature", "warm"), "warm"), (command(out, "--limit", "0"), "--limit 0"), (command(out, "--chat"), "--chat"),
        (command(out, "--max_new_tokens", "500"), "Question 0 and"), (command(out, "--device", "meta"), "meta"), (command(tmp_path), "cannot be written"),
        (["--checkpoint_path", folder, f"{folder}/../target", "--out", str(out)], "twice"), (["--checkpoint_path", str(tmp_path / "no"), "--out", str(out)], "no checkpoint folder"),
        (["--checkpoint_path", str(tmp_path / "loop"), "--out", str(out)], "loop"), (["--checkpoint_path", "\0", "--out", str(out)], "null byte"),
        (command(out, "--questions", str(questions)), "line 1: field 'checker'"), (command(out, "--questions", str(questions), "--annotate_demo"), "--annotate_demo"),
        (command(out, "--questions", str(questions), "--checker", "code"), "--allow_code_execution"),
    ):  # fmt: skip
        assert word in fails(argv, capsys), word
    assert "it is a pipe" in fails(command(tmp_path / "b.jsonl"), capsys)
    assert not list(tmp_path.glob("a.jsonl*")) and (DEMO / "target" / "config.json").read_bytes() == config


def test_annotate_demo_is_of_the_demo_by_default(tmp_path, writer, monkeypatch):
    """Without --questions: the demo's own (the README's line of benchmarks/)."""
    monkeypatch.setattr(writer, "text", staticmethod(lambda *_: "So the result is 3."))
    out = tmp_path / "a.jsonl"
    main(["--seed", "77", "--limit", "3", "--checkpoint_path", FOLDERS[1], "--temperature", "1", "--annotate_demo",
          "--no-tuples", "--device", "cpu", "--max_new_tokens", "100", "--out", str(out)])  # fmt: skip
    assert len(lines_of(out)) == 3 and all(isinstance(line["errors"], list) for line in lines_of(out))


def test_what_is_not_written_is_said(questions, tmp_path, writer, monkeypatch, capsys):
    """6 questions, 2 models, greedy: all say the same of a question; of two the logits overflow with one model."""

    def generate(self, prompt, max_new_tokens, seed=0):
        if self.model == "draft" and TOKENIZER.model.decode(prompt)[-2] in "45":
            raise NotFinite("the logits are not finite")
        return Writer.generate(self, prompt, max_new_tokens, seed)

    broken = type("Broken", (Writer,), {"generate": generate})
    monkeypatch.setattr(build_judge_data, "Engine", broken)
    monkeypatch.setattr(writer, "text", staticmethod(lambda *_: "It is 0."))
    out = tmp_path / "a.jsonl"
    main(asked(questions, out, "--temperature", "0", "--no-tuples"))
    printed = capsys.readouterr().out
    assert [r["dropped"] for r in lines_of(tmp_path / "a.jsonl.all")[1:]] == [None] * 10 + ["not finite"] * 2
    assert "6 answers (2 right, 4 wrong)" in printed and "12 answers, 2 dropped." in printed
    assert f"Not written there, but in {out}.all: 2 dropped, 4 with the text of another." in printed
    assert printed.splitlines()[0].endswith("not finite") and printed.splitlines()[2].split()[-1] == "2"
    monkeypatch.setattr(writer, "text", staticmethod(lambda p, m, t, seed: f"It is {seed % 3}."))
    main(asked(questions, tmp_path / "b.jsonl", "--samples", "6"))
    assert "beside a pair or without one" in capsys.readouterr().out


def test_a_second_process_is_refused_and_harms_nothing(questions, tmp_path, writer, capsys):
    out = tmp_path / "a.jsonl"
    main(asked(questions, out))
    content, work = out.read_bytes(), Path(f"{out}.all")
    half = work.read_bytes()[:-5]
    out.unlink()
    work.write_bytes(half)
    first = Lines(work)
    assert "being written by another process" in fails(asked(questions, out), capsys)
    assert work.read_bytes() == half and not out.exists()
    first.close()
    main(asked(questions, out))
    assert out.read_bytes() == content


@pytest.mark.parametrize("change", [{"tokens": -1}, {"tokens": True}, {"tokens": None}, {"right": "yes"}, {"dropped": "so"},
                                    {"response": 3}, {"model": 1.5}, {"source": None}, {"question": []}])  # fmt: skip
def test_an_edited_line_is_named(questions, tmp_path, writer, capsys, change):
    out = tmp_path / "a.jsonl"
    main(asked(questions, out))
    lines = lines_of(Path(f"{out}.all"))
    out.unlink()
    lines[2] |= change
    content = "".join(json.dumps(line) + "\n" for line in lines)
    Path(f"{out}.all").write_text(content)
    err = fails(asked(questions, out), capsys)
    assert (
        f"{out}.all, line 3: field {next(iter(change))!r}" in err
        and Path(f"{out}.all").read_text() == content
    )


def test_a_full_disk_keeps_what_was_made(questions, tmp_path, writer, capsys, monkeypatch):
    """The disk is full at any write, of an answer or of --out: one sentence, and the same command goes on from there."""
    whole = tmp_path / "whole.jsonl"
    main(asked(questions, whole))
    made, out = Path(f"{whole}.all").read_bytes(), tmp_path / "cut.jsonl"
    for room in (0, 3, 20, 36):
        add, lines = Lines.add, []

        def full(self, line, room=room, lines=lines, add=add):
            lines.append(line)
            if len(lines) > room:
                os.write(self.file.fileno(), b'{"quest')
                raise InputError(
                    f"{self.path} cannot be written: No space left on device; what it holds is kept."
                )
            add(self, line)

        monkeypatch.setattr(Lines, "add", full)
        assert "No space left" in fails(asked(questions, out), capsys) and not out.exists()
        monkeypatch.setattr(Lines, "add", add)
        main(asked(questions, out))
        assert Path(f"{out}.all").read_bytes() == made and out.read_bytes() == whole.read_bytes()
        for path in tmp_path.glob("cut*"):
            path.unlink()
