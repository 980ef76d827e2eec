"""Protects: whole runs of evaluate.py: every public task with Llama 3's tokenizer, conversations, samples, kills, processes."""

import argparse
import copy
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA, ROOT, TEMPLATES, Child, make_folder

import tokenizer as tokenizers
from cli import InputError
from scripts import evaluate as script
from scripts.evaluate import main, share_of
from scripts.lib import summary
from scripts.lib.public_tasks import read_task
from scripts.lib.results import MADE, by_key, check_parts, merge, part
from scripts.lib.stops import cut
from scripts.lib.turns import said_ids, turn_ids
from tokenizer import load_tokenizer

LLAMA3 = DATA / "tokenizers" / "llama3" / "tokenizer.model"
needs_data = pytest.mark.skipif(not LLAMA3.exists(), reason="needs the public files, see scripts/download.py")
TIMING = {"seconds_prefill", "seconds_decode", "tokens_per_second", "time", "seconds"}
SOURCES = {
    "demo": None, "gsm8k": "gsm8k/test.jsonl", "humaneval": "humaneval/HumanEval.jsonl.gz", "arc": "arc/ARC-Challenge_test.json",
    "mmlu": "mmlu", "math500": "math500/test.jsonl", "mt_bench": "mt_bench/question.jsonl", "spec_bench": "spec_bench/question.jsonl",
}  # fmt: skip


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(value):
    """A record without what the clock decides."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in (*TIMING, *MADE)}
    return [timeless(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A random target and draft in published form, with Llama 3's own tokenizer file."""
    root = tmp_path_factory.mktemp("llamas")
    shape = {"vocab_size": 128256, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
             "max_position_embeddings": 16384, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}  # fmt: skip
    for seed, name in enumerate(("target", "draft"), 1):
        make_folder(root / name, seed=seed, num_hidden_layers=2 - (name == "draft"), **shape)
        (root / name / "original").mkdir()
        shutil.copy(LLAMA3, root / name / "original" / "tokenizer.model")
        (root / name / "chat_template.jinja").write_text(TEMPLATES["llama 3.1"])
    return root


read_once = functools.cache(tokenizers.read_model_file)


@pytest.fixture(autouse=True)
def reads_llama3_once(monkeypatch):
    """Its 128,000 lines take a second, and each run reads them several times."""

    def read(path: Path, legacy: bool):
        made = copy.copy(read_once(path, legacy))
        made.control_of_id, made.stop_ids = dict(made.control_of_id), list(made.stop_ids)
        return made

    monkeypatch.setattr(tokenizers, "read_model_file", read)


def command(llamas, task: str, out: Path, *more: str) -> list[str]:
    data = ["--data", str(DATA / SOURCES[task])] if SOURCES[task] else []
    return ["--task", task, *data, "--checkpoint_path", str(llamas / "target"), "--draft_checkpoint_path", str(llamas / "draft"),
            "--verify", "plain,standard,topk", "--threshold", "topk=5", "--speculate_k", "4", "--limit", "2", "--max_new_tokens", "6",
            "--device", "cpu", "--allow_code_execution", "--out", str(out), *more]  # fmt: skip


@needs_data
@pytest.mark.parametrize("chat", [False, True], ids=["base", "chat"])
def test_every_task_runs_on_published_folders(llamas, tmp_path, capsys, chat):
    for task in SOURCES:
        out = tmp_path / f"{task}.jsonl"
        few = ["--shots", "2"] if task in ("arc", "mmlu") else []
        main(command(llamas, task, out, *(["--chat"] if chat else few)))
        table = capsys.readouterr().out.splitlines()
        assert len(table) == 4 and [line.split()[:2] for line in table[1:]] == [
            ["plain", "2"],
            ["standard", "2"],
            ["topk=5", "2"],
        ]
        header, *records = lines_of(out)
        assert header["questions"] == task and header["chat"] == chat and len(records) == 6
        plain, standard = (
            [r["tokens"] for r in records if r["rule"] == rule] for rule in ("plain", "standard")
        )
        assert plain == standard  # the whole path, end to end: greedy `standard` is plain decoding
        for record in records:
            unscored = task in ("mt_bench", "spec_bench")
            assert (record["right"] is None) == unscored and ("turns" in record) == unscored
            assert sum(record["cuts"]) == len(record["text"]) and len(record["origin"]) == len(
                record["tokens"]
            )
    assert "right" not in table[0]  # nothing to say: no column


@needs_data
def test_a_second_turn_sees_the_first_answer(llamas):
    """The ids of a conversation are those of the chat format for all of it, as transformers' template has it."""
    tokenizer = load_tokenizer(llamas / "target")
    args = script.argparse.Namespace(chat=True)
    question = read_task("mt_bench", DATA / SOURCES["mt_bench"], chat=True)[0]
    said = tokenizer.encode("Aloha! A great trip.")
    first, second = turn_ids(args, tokenizer, question)
    turns = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": "Aloha! A great trip."},
             {"role": "user", "content": question.more_turns[0]}]  # fmt: skip
    assert first + said + second == tokenizer.encode_chat(turns)
    assert first == tokenizer.encode_chat(turns[:1])


def test_what_was_said_ends_before_the_stop():
    record = {"text": "one two\nUSER: x", "tokens": [1, 2, 3, 4, 5], "cuts": [3, 4, 6, 2, 0]}
    assert cut(record["text"], ("\nUSER:",)) == "one two" and said_ids(record, ("\nUSER:",)) == [1, 2]
    assert said_ids(record, ()) == [1, 2, 3, 4] and cut("abcabc", ("c", "b")) == "a"


@needs_data
def test_answer_files_are_as_fastchats_reader_wants_them(llamas, tmp_path, capsys):
    """What gen_judgment.py and show_result.py do with a folder of answers, written from the form of the published ones."""
    folder = tmp_path / "model_answer"
    main(command(llamas, "mt_bench", tmp_path / "out.jsonl", "--chat", "--model_answers", str(folder)))
    asked = {
        q.content["question_id"]: q for q in read_task("mt_bench", DATA / SOURCES["mt_bench"], True, limit=2)
    }
    published = lines_of(DATA / "mt_bench" / "reference_answer_gpt-4.jsonl")[0]
    found, tokenizer = {}, load_tokenizer(llamas / "target")
    for path in sorted(folder.glob("*.jsonl")):  # the model's name is the file's
        found[path.name[:-6]] = {answer["question_id"]: answer for answer in lines_of(path)}
    assert set(found) == {"plain", "standard", "topk=5"}
    records = {
        (r["rule"], asked_id): r
        for r in lines_of(tmp_path / "out.jsonl")[1:]
        for asked_id, q in asked.items()
        if q.index == r["index"]
    }
    for model, answers in found.items():
        assert list(answers) == sorted(asked)
        for question_id, answer in answers.items():
            assert set(published) <= set(answer) and answer["model_id"] == model
            for name, value in published.items():
                assert type(answer[name]) is type(value), name
            (choice,) = answer["choices"]
            assert (
                choice["index"] == 0
                and len(choice["turns"]) == 2
                and all(isinstance(turn, str) for turn in choice["turns"])
            )
            record = records[model, question_id]
            first, second = turn_ids(script.argparse.Namespace(chat=True), tokenizer, asked[question_id])
            said = record["tokens"][: choice["new_tokens"][0]]
            said = said[:-1] if said[-1] in tokenizer.stop_ids else said
            assert record["prompt_tokens"] == len(first) + len(said) + len(second)
            assert choice["new_tokens"] == [turn["new_tokens"] for turn in record["turns"]]
            assert sum(choice["new_tokens"]) == sum(choice["accept_lengths"]) == len(record["tokens"])
            assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"]) == record["rounds"]
    assert len({answer["answer_id"] for answers in found.values() for answer in answers.values()}) == 6


def demo(out: Path, *more: str) -> list[str]:
    return [
        "--limit",
        "4",
        "--verify",
        "plain,judge",
        "--device",
        "cpu",
        "--max_new_tokens",
        "30",
        "--out",
        str(out),
        *more,
    ]


def test_samples_give_pass_at_k(tmp_path, capsys):
    sampled = demo(
        tmp_path / "out.jsonl",
        "--samples",
        "10",
        "--temperature",
        "1.5",
        "--limit",
        "2",
        "--max_new_tokens",
        "60",
        "--json",
        "--verify",
        "plain",
    )
    main(sampled)
    rows = json.loads(capsys.readouterr().out)["rows"]
    records = [r for r in lines_of(tmp_path / "out.jsonl")[1:] if r["rule"] == "plain"]
    assert [r["index"] for r in records[:3]] == [0, "0.1", "0.2"] and [
        r.get("item", r["index"]) for r in records
    ] == [0] * 10 + [1] * 10
    assert len({tuple(r["tokens"]) for r in records[:10]}) > 1  # other seeds
    right = [sum(r["right"] for r in records[:10]), sum(r["right"] for r in records[10:])]
    assert rows[0]["n"] == 2 and rows[0]["accuracy"] == rows[0]["pass@1"] == sum(right) / 20
    assert rows[0]["pass@10"] == sum(n > 0 for n in right) / 2 and "pass@100" not in rows[0]
    with pytest.raises(SystemExit):
        main(demo(tmp_path / "x.jsonl", "--samples", "2"))
    assert "--samples 2" in capsys.readouterr().err


def test_differences_to_plain_are_paired():
    def records(rule, rights):
        return [{"rule": rule, "index": i, "family": "f", "right": right, "answer_right": right, "tokens": [0], "accepted": 0,
                 "accepted_by_rule": 0, "drafted": 0, "rounds": 1, "seconds_decode": 1.0} for i, right in enumerate(rights)]  # fmt: skip

    both = records("plain", [True] * 32 + [False] * 18) + records(
        "kl", [True] * 20 + [False] * 12 + [True] * 2 + [False] * 16
    )
    plain, kl = summary.summarise(both, ["plain", "kl"])
    assert (kl["lost"], kl["won"], kl["difference"]) == (12, 2, -0.2) and "difference" not in plain
    assert kl["p_value"] == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    low, high = kl["difference_interval"]
    assert low < -0.2 < high < 0
    none = [record | {"right": None} for record in both]
    assert summary.summarise(none, ["plain", "kl"])[1]["accuracy"] is None


def answers_in(path: Path) -> int:
    """Whole lines but the header."""
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    """At random moments after random numbers of answers. JUDGE_FAST_ITEMS=200 JUDGE_FAST_KILLS=10 make it the long check."""
    items, kills = (
        int(os.environ.get(f"JUDGE_FAST_{name}", default))
        for name, default in (("ITEMS", "4"), ("KILLS", "2"))
    )
    argv = ["--limit", str(items), "--verify", "plain,standard,judge", "--device", "cpu", "--max_new_tokens", "60"]  # fmt: skip
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    began = time.monotonic()
    assert Child(main, [*argv, "--out", str(whole)]).wait() == 0
    an_answer, chance = (time.monotonic() - began) / (3 * items), random.Random(7)
    for least in sorted(chance.sample(range(3 * items - 3), kills)):
        child = Child(main, [*argv, "--out", str(killed)])
        while child.poll() is None and answers_in(killed) < least:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, an_answer))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert Child(main, [*argv, "--out", str(killed)]).wait() == 0
    found, expected = (timeless(lines_of(path)) for path in (killed, whole))
    assert len(expected) == 1 + 3 * items and found == expected


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A run of two processes at once, with the ranks that torchrun gives, and the undisturbed one of a single process."""
    folder = tmp_path_factory.mktemp("parts")
    main(demo(folder / "single.jsonl"))
    ranks = [Child(main, demo(folder / "out.jsonl"), WORLD_SIZE="2", RANK=str(rank)) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    return folder


def copies(parts: Path, folder: Path) -> Path:
    for rank in range(2):
        shutil.copy(part(parts / "out.jsonl", rank, 2), part(folder / "out.jsonl", rank, 2))
    return folder / "out.jsonl"


def test_processes_share_the_items_and_merge_to_one_run(parts, tmp_path, capsys):
    out = copies(parts, tmp_path)
    shares = [{r["index"] for r in lines_of(part(out, rank, 2))[1:]} for rank in range(2)]
    assert shares == [{0, 2}, {1, 3}]
    capsys.readouterr()
    main(demo(out, "--merge", "2"))
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["plain", "4"]
    assert timeless(lines_of(out)) == timeless(lines_of(parts / "single.jsonl"))
    before = out.read_bytes()
    main(demo(out))  # a merged file is an ordinary one: nothing is left to do
    assert out.read_bytes() == before


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_that_run_one_model_give_its_answers(parts, tmp_path, ranks):
    """Two parts, one of so many ranks with --tp, resumed after half a line, and one of one process, merge to the run of one."""
    out = tmp_path / "out.jsonl"
    expected = lines_of(parts / "single.jsonl")
    header, first = (json.dumps(line) for line in expected[:2])
    part(out, 1, 2).write_text(f"{header}\n{first.replace(': 0', ': 1', 1)[:40]}")
    if ranks == 1:
        main(demo(out, "--part", "1/2"))
    else:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        script = [str(ROOT / "scripts" / "evaluate.py"), "--tp", "--check_ranks", *demo(out, "--part", "1/2")]
        subprocess.run(
            [*torchrun, *script],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=200,
        )
    main(demo(out, "--part", "0/2"))
    main(demo(out, "--merge", "2"))
    found = lines_of(out)
    for record in [*found, *expected]:
        record.pop("mean_score", None)  # differs in the eighth place: sums of two ranks
    assert timeless(found) == timeless(expected)


def test_whose_share_it_is(monkeypatch):
    """Of torchrun's processes each has its own, unless they run one model: then all have the same, whole or by --part."""

    def share(tp: bool, part: str | None) -> tuple[int, int]:
        return share_of(argparse.Namespace(tp=tp, part=part))

    assert share(False, None) == (0, 1) and share(False, "2/3") == (2, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert share(False, None) == (1, 2) and share(True, None) == (0, 1) and share(True, "2/3") == (2, 3)
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(InputError, match="not of the form I/N"):
            share(True, wrong)


def test_a_killed_process_goes_on_with_its_part(parts, tmp_path, monkeypatch, capsys):
    out = copies(parts, tmp_path)
    mine, other = part(out, 1, 2), part(out, 0, 2)
    lines, before = mine.read_text().splitlines(keepends=True), other.read_bytes()
    mine.write_text("".join(lines[:3]) + lines[3][:50])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    main(demo(out))
    assert timeless(lines_of(mine)) == timeless([json.loads(line) for line in lines])
    assert (
        mine.read_text().startswith("".join(lines[:3])) and other.read_bytes() == before
    )  # nothing was made again
    monkeypatch.setenv("WORLD_SIZE", "9")  # more processes than questions
    monkeypatch.setenv("RANK", "8")
    main(demo(tmp_path / "many.jsonl"))
    assert len(lines_of(part(tmp_path / "many.jsonl", 8, 9))) == 1


def refused(argv: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


def test_a_merge_names_what_is_twice_or_missing(parts, tmp_path, capsys, monkeypatch):
    out = copies(parts, tmp_path)
    first, second = (part(out, rank, 2) for rank in range(2))
    good, header = second.read_text(), second.read_text().splitlines()[0]
    lines = good.splitlines(keepends=True)
    for content, words in (
        (good + lines[1], "the answer of plain to question 1 a second time"), (good + first.read_text().splitlines(keepends=True)[2], "the answer of judge to question 0 a second time"),
        ("".join(lines[:-1]), "lack 1 answers, first that of judge to question 3"), ("".join(lines[:-1]) + lines[-1][:40], "first that of judge to question 3"),
        ("", "had not begun"), (good.replace('"min_prob": 0.0', '"min_prob": 0.5', 1), "(min_prob)"), ("{broken\n", "not a results file"),
    ):  # fmt: skip
        second.write_text(content)
        assert words in refused(demo(out, "--merge", "2"), capsys), words
        assert not out.exists()
    second.write_text(good)
    assert "--limit" in refused([*demo(out, "--merge", "2"), "--limit", "3"], capsys)
    assert "another question 0" in refused([*demo(out, "--merge", "2"), "--seed", "5"], capsys)
    assert "There is no" in refused(demo(out, "--merge", "3"), capsys)
    second.unlink()
    assert "part1of2" in refused(demo(out, "--merge", "2"), capsys)
    second.write_text(header + "\n" + good.split("\n", 1)[1])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert "part0of2 is of a run with 2 processes" in refused(demo(out), capsys)
    assert "no torchrun" in refused(demo(out, "--merge", "2"), capsys)
    assert "--part under torchrun needs --tp" in refused(demo(out, "--part", "0/2"), capsys)
    monkeypatch.setenv("RANK", "4")
    assert "RANK 4" in refused(demo(out), capsys)


def test_a_file_with_an_answer_twice_or_to_another_question_is_refused(parts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    text = (parts / "single.jsonl").read_text()
    out.write_text(text + text.splitlines(keepends=True)[1])
    assert "the answer of plain to question 0 a second time" in refused(demo(out), capsys)
    lines = lines_of(parts / "single.jsonl")
    lines[1]["question"] = "Another one?"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "another question 0" in refused(demo(out), capsys)
    with pytest.raises(InputError, match="part0of3"):
        (tmp_path / "x.jsonl.part0of3").write_text("")
        check_parts(tmp_path / "x.jsonl", 2)
    assert by_key(out, [{"rule": "a", "index": 1}]) == {("a", 1): {"rule": "a", "index": 1}}
    with pytest.raises(InputError, match="There is no"):
        merge(tmp_path / "none.jsonl", 1, ["plain"], [])


def test_a_second_run_on_one_file_is_refused_and_the_first_loses_nothing(tmp_path, capsys):
    """The first is a process of its own, in the midst of its work, with half a line as if it were just writing one."""
    out = tmp_path / "out.jsonl"
    argv = [
        "--limit",
        "500",
        "--verify",
        "plain,judge",
        "--device",
        "cpu",
        "--max_new_tokens",
        "60",
        "--out",
        str(out),
    ]
    first = Child(main, argv)
    try:
        while answers_in(out) < 3:
            assert first.poll() is None
            time.sleep(0.1)
        first.send(signal.SIGSTOP)
        with out.open("ab") as file:
            file.write(b'{"half": ')
        before = out.read_bytes()
        assert "being written by another process" in refused(argv, capsys)
        assert "being written by another process" in refused([*argv, "--speculate_k", "4"], capsys)
        assert out.read_bytes() == before
    finally:
        first.send(signal.SIGKILL)
        first.wait()
