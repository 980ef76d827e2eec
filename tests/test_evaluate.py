"""Protects: the summary's arithmetic, resuming after a kill, refusing another run's file, the command line."""

import json

import pytest

from cli import InputError
from scripts.evaluate import main, parse_rules, summarise
from scripts.results import read_results


def test_rules_and_thresholds_are_parsed():
    assert parse_rules("plain,topk", "topk=2,topk=5") == [("plain", None, None), ("topk", 2.0, None), ("topk", 5.0, None)]
    assert parse_rules("judge", None) == [("judge", None, None)]
    assert parse_rules("kl@8,kl@auto", "kl=2") == [("kl", 2.0, 8), ("kl", 2.0, "auto")]
    for names, thresholds, word in (("magic", None, "magic"), ("judge", "kl=1", "kl"), ("judge", "judge", "rule=number"),
                                    ("judge@0", None, "whole number or auto")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            parse_rules(names, thresholds)


def record(rule: str, index: int, right: bool, tokens: int, seconds: float, accepted: int, rounds: int) -> dict:
    return {"rule": rule, "index": index, "family": "story", "right": right, "answer_right": True, "tokens": [0] * tokens,
            "seconds_decode": seconds, "accepted": accepted, "accepted_by_rule": accepted // 2, "rounds": rounds,
            "drafted": rounds * 4 if rule != "plain" else 0}  # fmt: skip


def test_the_summary_counts_over_all_tokens_and_rounds():
    records = [record("plain", 0, True, 10, 1.0, 0, 10), record("plain", 1, False, 30, 1.0, 0, 30)]
    records += [record("judge", 0, True, 10, 0.5, 8, 2), record("judge", 1, True, 30, 0.5, 20, 8)]
    judge, plain = summarise(records, ["judge", "plain"])  # in any order
    assert (plain["accuracy"], plain["mean_accepted"], plain["tokens_per_second"], plain["ratio"]) == (0.5, None, 20, 1)
    assert (judge["accuracy"], judge["mean_accepted"], judge["tokens_per_second"], judge["ratio"]) == (1.0, 2.8, 40, 2)
    assert judge["by_rule_share"] == 14 / 40 and judge["n"] == 2


def run(out, *more: str) -> list[str]:
    return ["--limit", "3", "--verify", "plain,standard,judge", "--device", "cpu", "--out", str(out), "--json", *more]


def test_a_killed_run_resumes_to_the_same_file(tmp_path, capsys):
    timing = {"seconds_prefill", "seconds_decode", "tokens_per_second"}

    def contents(path):
        return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in path.read_text().splitlines()]

    main(run(tmp_path / "whole.jsonl"))
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["rule"] for row in rows] == ["plain", "standard", "judge"] and all(row["n"] == 3 for row in rows)
    whole = contents(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in (0, 1, 4, 9):
        cut = tmp_path / f"cut{kept}.jsonl"
        cut.write_text("".join(lines[:kept]) + lines[min(kept, 8)][: len(lines[0]) // 2])  # half a line, as a kill leaves it
        main(run(cut))
        capsys.readouterr()
        assert contents(cut) == whole
    with pytest.raises(SystemExit) as stop:
        main(run(tmp_path / "whole.jsonl", "--speculate_k", "4"))
    assert stop.value.code == 2 and "speculate_k" in capsys.readouterr().err
    assert contents(tmp_path / "whole.jsonl") == whole


def test_quantised_models_answer_and_say_so(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["--limit", "2", "--verify", "plain,standard", "--device", "cpu", "--out", str(out), "--max_new_tokens", "20"]
    main([*command, "--mode", "int4", "--group_size", "64", "--draft_mode", "int8"])
    header, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert (header["mode"], header["draft_mode"]) == ("int4/64", "int8")
    assert {record["dtype"] for record in records} == {"float32 int4/64"}
    for other in ([], ["--mode", "int4", "--draft_mode", "int8"], ["--mode", "int4", "--group_size", "64"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *other])
        assert stop.value.code == 2 and "mode" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--verify", "hf", "--mode", "int8", "--device", "cpu"])
    assert stop.value.code == 2 and "--verify hf runs the folders as they are" in capsys.readouterr().err


def test_a_foreign_file_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    for content in ("my notes\n", "my notes", '{"my": "only copy, no newline"}', "[1]\n[2]\n", '{"task": "other"}\n'):
        path.write_text(content)
        with pytest.raises(InputError, match="notes.txt"):
            read_results(path, {"task": "demo"})
        assert path.read_text() == content


def test_mistakes_are_one_sentence(tmp_path, capsys):
    for more, word in (
        (["--limit", "0"], "--limit 0"), (["--out", "/no/such/file"], "cannot be written"), (["--out", str(tmp_path)], "cannot be"),
        (["--verify", "plain,plain"], "plain twice"), (["--verify", "topk", "--threshold", "topk=inf"], "inf"),
        (["--verify", "hf", "--temperature", "1"], "greedy"), (["--device", "meta"], "meta"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["--device", "cpu", *more])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1
