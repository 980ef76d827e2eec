"""Protects: the summary's arithmetic, resuming after a kill, refusing another run's file, the command line."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import DATA, ROOT

import model
from cli import InputError
from files import Lines
from scripts.evaluate import main, print_table, share_of
from scripts.lib import bench, turns
from scripts.lib.bench import parse_rules
from scripts.lib.ranks import own_device
from scripts.lib.results import by_key, check_parts, check_same_questions, merge, part, rank_and_size, resume
from scripts.lib.scoring import Question
from scripts.lib.summary import summarise
from scripts.lib.token_details import NotFinite


def test_rules_and_thresholds_are_parsed():
    assert parse_rules("plain,topk", "topk=2,topk=5") == [
        ("plain", None, None),
        ("topk", 2.0, None),
        ("topk", 5.0, None),
    ]
    assert parse_rules("judge", None) == [("judge", None, None)]
    assert parse_rules("kl@8,kl@auto", "kl=2") == [("kl", 2.0, 8), ("kl", 2.0, "auto")]
    for names, thresholds, word in (("magic", None, "magic"), ("judge", "kl=1", "kl"), ("judge", "judge", "rule=number"),
                                    ("judge@0", None, "whole number or auto"), ("judge@" + "9" * 5000, None, "at most 1024"),
                                    ("kl@\u0663", None, "whole number"), ("kl", "kl=" + "x" * 9, "rule=number")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            parse_rules(names, thresholds)


def record(
    rule: str, index: int, right: bool, tokens: int, seconds: float, accepted: int, rounds: int
) -> dict:
    return {"rule": rule, "index": index, "family": "story", "right": right, "answer_right": True, "tokens": [0] * tokens,
            "seconds_decode": seconds, "accepted": accepted, "accepted_by_rule": accepted // 2, "rounds": rounds,
            "drafted": rounds * 4 if rule != "plain" else 0}  # fmt: skip


def test_the_summary_counts_over_all_tokens_and_rounds():
    records = [record("plain", 0, True, 10, 1.0, 0, 10), record("plain", 1, False, 30, 1.0, 0, 30)]
    records += [record("judge", 0, True, 10, 0.5, 8, 2), record("judge", 1, True, 30, 0.5, 20, 8)]
    judge, plain = summarise(records, ["judge", "plain"])  # in any order
    assert (plain["accuracy"], plain["mean_accepted"], plain["tokens_per_second"], plain["ratio"]) == (
        0.5,
        None,
        20,
        1,
    )
    assert (judge["accuracy"], judge["mean_accepted"], judge["tokens_per_second"], judge["ratio"]) == (
        1.0,
        2.8,
        40,
        2,
    )
    assert judge["by_rule_share"] == 14 / 40 and judge["n"] == 2


def run(out, *more: str) -> list[str]:
    return [
        "--limit",
        "3",
        "--verify",
        "plain,standard,judge",
        "--device",
        "cpu",
        "--max_new_tokens",
        "40",
        "--out",
        str(out),
        "--json",
        *more,
    ]


def test_a_killed_run_resumes_to_the_same_file(tmp_path, capsys):
    timing = {"seconds_prefill", "seconds_decode", "tokens_per_second"}

    def contents(path):
        return [
            {k: v for k, v in json.loads(line).items() if k not in timing}
            for line in path.read_text().splitlines()
        ]

    main(run(tmp_path / "whole.jsonl"))
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["rule"] for row in rows] == ["plain", "standard", "judge"] and all(
        row["n"] == 3 for row in rows
    )
    whole = contents(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in (0, 1, 4, 9):
        cut = tmp_path / f"cut{kept}.jsonl"
        cut.write_text(
            "".join(lines[:kept]) + lines[min(kept, 8)][: len(lines[0]) // 2]
        )  # half a line, as a kill leaves it
        main(run(cut))
        capsys.readouterr()
        assert contents(cut) == whole
    with pytest.raises(SystemExit) as stop:
        main(run(tmp_path / "whole.jsonl", "--speculate_k", "4"))
    assert stop.value.code == 2 and "speculate_k" in capsys.readouterr().err
    assert contents(tmp_path / "whole.jsonl") == whole


def test_quantised_models_answer_and_say_so(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = [
        "--limit",
        "2",
        "--verify",
        "plain,standard",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--max_new_tokens",
        "20",
    ]
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


def test_a_run_goes_on_whoever_made_the_file(tmp_path):
    """How a run was made stands in the header, and is no setting; half a header of such a run is one."""
    path, settings = tmp_path / "r.jsonl", {"task": "demo", "limit": 3}
    whole = (
        json.dumps(settings | {"command": "evaluate.py --limit 3", "machine": "another", "commit": "abc"})
        + "\n"
    )
    for content in ("", whole, whole[:20], whole[:-30]):
        path.write_text(content)
        assert resume(Lines(path), settings) == []
    path.write_text(whole)
    with pytest.raises(InputError, match=r"other settings \(limit\)"):
        resume(Lines(path), settings | {"limit": 4})


def test_a_foreign_file_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    for content in (
        "my notes\n",
        "my notes",
        '{"my": "only copy, no newline"}',
        "[1]\n[2]\n",
        '{"task": "other"}\n',
    ):
        path.write_text(content)
        with pytest.raises(InputError, match="notes.txt"):
            resume(Lines(path), {"task": "demo"})
        assert path.read_text() == content


def test_mistakes_are_one_sentence(tmp_path, capsys):
    for more, word in (
        (["--limit", "0"], "--limit 0 must be"), (["--out", "/no/such/file"], "cannot be written"), (["--out", str(tmp_path)], "cannot be"),
        (["--verify", "plain,plain"], "plain twice"), (["--verify", "topk", "--threshold", "topk=inf"], "inf"),
        (["--verify", "hf", "--temperature", "1"], "greedy"), (["--device", "meta"], "meta"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["--device", "cpu", *more])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1


def refused(argv: list[str], capsys) -> str:
    """The one sentence with which main ends; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and captured.out == "", captured.err
    return captured.err


FLAGS = ["--limit", "2", "--verify", "plain,judge", "--device", "cpu", "--max_new_tokens", "20"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> list[str]:
    """The lines of a whole run: a header and four answers."""
    out = tmp_path_factory.mktemp("finished") / "out.jsonl"
    main([*FLAGS, "--out", str(out)])
    return out.read_text().splitlines(keepends=True)


def edited(line: str, **changes) -> str:
    """A line with other fields; a field set to Ellipsis is removed."""
    return (
        json.dumps({name: value for name, value in (json.loads(line) | changes).items() if value is not ...})
        + "\n"
    )


EDITS = [  # of the second line, and what is said of it
    *(({name: ...}, f"line 2 has no field '{name}'") for name in ("rule", "index", "right", "tokens", "seconds_decode", "family", "text")),
    *(({"rounds": value}, "line 2: field 'rounds'") for value in (True, -1, 1.5, "1", [], None, 10**18 * 10)),
    *(({"seconds_decode": value}, "line 2: field 'seconds_decode'") for value in (float("nan"), float("inf"), -1.0, "1", True)),
    *(({"right": value}, "line 2: field 'right'") for value in (1, "yes", [])), *(({"index": value}, "line 2: field 'index'") for value in (True, -1, "a", "1.", 0.0, [0])),
    *(({"tokens": value}, "line 2: field 'tokens'") for value in ([], 3, ["a"], [True], [-1], None, [[1]])), ({"answer_right": None}, "line 2: field 'answer_right'"),
    *(({"rule": value}, "line 2: field 'rule'") for value in ("magic", "", None, ["plain"], "plain magic")), ({"accepted": 5}, "line 2: field 'accepted'"),
    ({"accepted": 3, "accepted_by_rule": 4, "drafted": 9}, "line 2: field 'accepted'"), ({"rounds": 0, "drafted": 4}, "line 2: field 'rounds'"), ({"item": 7}, "line 2: field 'index'"),
    ({"threshold": "low"}, "line 2: field 'threshold'"), ({"turns": [{"text": 1}]}, "line 2: field 'turns'"), ({"time": float("nan")}, "line 2: field 'time'"),
    ({"question": "Another?"}, "another question 0"), ({"index": 1}, "a second time"), ({"mean_score": "high"}, "line 2: field 'mean_score'"), ({"text": "\ud800"}, "surrogate"),
]  # fmt: skip


def test_edited_answers_are_named_by_line_and_field(finished, tmp_path, capsys):
    out, header = tmp_path / "out.jsonl", json.loads(finished[0])
    asked = [
        Question(record["index"], record["question"], "", "demo")
        for record in map(json.loads, finished[1::2])
    ]
    for changes, words in EDITS:
        before = finished[0] + edited(finished[1], **changes) + finished[3]  # plain's two answers
        out.write_text(before)
        with pytest.raises(InputError, match=re.escape(words)):
            lines = Lines(out)
            try:
                check_same_questions(out, by_key(out, resume(lines, header)), asked)
            finally:
                lines.close()
        part(tmp_path / "merged", 0, 1).write_text(before)
        with pytest.raises(InputError, match=re.escape(words)):
            merge(tmp_path / "merged", 1, ["plain"], asked)
        assert out.read_text() == before and not (tmp_path / "merged").exists()
    out.write_text(before)
    assert words in refused([*FLAGS, "--out", str(out)], capsys) and out.read_text() == before


def test_damaged_files_of_answers_are_left_as_they_are(finished, tmp_path, capsys):
    out, header = tmp_path / "out.jsonl", finished[0].encode()
    for content, words in (
        (header + b"\xff\n", "not a results file of this script (line 2"), (header + b"[" * 10**5 + b"\n", "line 2 is nested too deeply"),
        (header + b'{"index": ' + b"1" * 5000 + b"}\n", "a whole number of 5000 digits"), (header + b"[1]\n", "line 2 is a JSON list"), (b"[]\n", "line 1 is a JSON list"),
        (b"\0" * 99, "no header"), (b"{}\n", "other settings"), (header + b"\n\n" + b"{}\n", "line 4 has no field 'rule'"), (header.replace(b"{", b"[", 1), "not valid JSON"),
    ):  # fmt: skip
        out.write_bytes(content)
        assert words in refused([*FLAGS, "--out", str(out)], capsys), words
        assert out.read_bytes() == content


def test_what_cannot_be_an_output_is_refused_before_any_work(finished, tmp_path, capsys, monkeypatch):
    """Nothing is loaded, nothing is written, and a device, a pipe, a socket stay what they are."""
    monkeypatch.setattr(bench, "load_pair", lambda *_, **more: pytest.fail("models were loaded"))
    monkeypatch.setattr(bench, "load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded"))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "only").write_text("kept")
    (tmp_path / "only").chmod(0o444)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
    (tmp_path / "q.jsonl").write_text('{"prompt": "p", "answer": "1"}\n')
    (tmp_path / "link").symlink_to("q.jsonl")
    before = {path.name: (os.lstat(path).st_mode, os.lstat(path).st_ino) for path in tmp_path.iterdir()}
    for name, words in (("/dev/null", "it is a device"), ("/dev/full", "it is a device"), ("fifo", "it is a pipe"), ("socket", "it is a socket"), ("", "it is a folder"),
                        ("loop", "Too many levels"), ("only", "read-only"), ("n" * 300, "File name too long"), ("no/such", "there is no folder")):  # fmt: skip
        assert words in refused([*FLAGS, "--out", str(tmp_path / name)], capsys)
        assert words in refused(
            [*FLAGS, "--out", str(tmp_path / name), "--merge", "1"], capsys
        ) or os.path.lexists(tmp_path / name)
    for name in ("q.jsonl", "link"):
        flags = [*FLAGS, "--questions", str(tmp_path / "q.jsonl"), "--checker", "number"]
        assert "is one of the inputs" in refused([*flags, "--out", str(tmp_path / name)], capsys)
    mine = tmp_path / "o.jsonl.part0of2"
    mine.mkdir()
    assert "part0of2 cannot be written: it is a folder" in refused(
        [*FLAGS, "--out", str(tmp_path / "o.jsonl"), "--part", "0/2"], capsys
    )
    mine.rmdir()
    assert {
        path.name: (os.lstat(path).st_mode, os.lstat(path).st_ino) for path in tmp_path.iterdir()
    } == before


@pytest.mark.skipif(
    not (DATA / "mt_bench").exists(), reason="needs the public files, see scripts/download.py"
)
def test_answer_files_replace_no_input_and_need_a_folder(tmp_path, capsys):
    data = tmp_path / "plain.jsonl"
    data.write_bytes((DATA / "mt_bench" / "question.jsonl").read_bytes())
    flags = ["--task", "mt_bench", *FLAGS]
    for more, words in ((["--data", str(data), "--model_answers", str(tmp_path)], "is one of the inputs"),
                        (["--data", str(DATA / "mt_bench" / "question.jsonl"), "--model_answers", str(data)], "is no folder"),
                        (["--data", str(data), "--model_answers", "/dev/null"], "is no folder")):  # fmt: skip
        assert words in refused([*flags, *more], capsys)
    assert (
        data.read_bytes() == (DATA / "mt_bench" / "question.jsonl").read_bytes()
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize("more", [["--judge_path", "/no/judge"], ["--max_new_tokens", "600"], ["--verify", "plain,topk", "--threshold", "topk=1.5"],
                                  ["--verify", "hf", "--threshold", "hf=1"], ["--temperature", "0.0001"], ["--samples", "3"], ["--top_k", "-1"],
                                  ["--merge", "0"], ["--part", "2/2"], ["--part", "1/" + "9" * 5000], ["--max_new_tokens", "9" * 500], ["--min_prob", "nan"],
                                  ["--limit", "-1"], ["--shots", "1000000000"], ["--seed", "1" * 400], ["--device", "cuda:77"], ["--mode", "int4", "--group_size", "7"],
                                  ["--questions", "/dev/zero", "--checker", "number"], ["--checkpoint_path", "/no/folder", "--draft_checkpoint_path", "/no"]])  # fmt: skip
def test_a_refused_run_leaves_no_file_behind(tmp_path, capsys, more):
    refused([*FLAGS, "--out", str(tmp_path / "out.jsonl"), *more], capsys)
    assert not list(tmp_path.iterdir())


def test_answers_without_finite_logits_are_recorded_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    decode, out = turns.decode_turn, tmp_path / "out.jsonl"

    def fails(how, prompt, stops):
        if how.engine.settings.verify == "judge" and how.seed == 0:
            raise NotFinite("The logits are not finite.")
        return decode(how, prompt, stops)

    monkeypatch.setattr(turns, "decode_turn", fails)
    for _ in range(2):  # the second run finds all of it in the file
        with pytest.raises(SystemExit) as stop:
            main([*FLAGS, "--out", str(out), "--json", "--details"])
        captured = capsys.readouterr()
        assert stop.value.code == 2 and json.loads(captured.out)["rows"][1]["failed"] == 1
        assert (
            "evaluate.py: 1 of 4 answers failed (1 of judge) and count as not right; the first, to question 0: The logits"
            in captured.err
        )
        records = [json.loads(line) for line in out.read_text().splitlines()[1:]]
        (failed,) = (record for record in records if "failed" in record)
        assert (failed["rule"], failed["index"], failed["right"], failed["text"], failed["tokens"]) == (
            "judge",
            0,
            False,
            "",
            [],
        )
        assert (
            failed["rounds"] == failed["accepted"] == failed["seconds_decode"] == 0
            and failed["cuts"] == []
            and failed["origin"] == ""
        )
        assert sum("failed" not in record and len(record["tokens"]) > 0 for record in records) == 3


def test_a_run_in_which_every_answer_failed_has_a_table(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise NotFinite("The logits are not finite.")

    monkeypatch.setattr(turns, "decode_turn", fails)
    with pytest.raises(SystemExit) as stop:
        main(FLAGS)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "4 of 4 answers failed (2 of plain, 2 of judge)" in captured.err
    assert [line.split()[:3] for line in captured.out.splitlines()] == [
        ["rule", "n", "right"],
        ["plain", "2", "0.0%"],
        ["judge", "2", "0.0%"],
    ]


def test_every_share_of_the_table_has_its_interval_and_n(capsys):
    records = [record("plain", i, i > 0, 10, 1.0, 0, 10) for i in range(9)] + [
        record("judge", i, i > 3, 10, 1.0, 4, 2) for i in range(9)
    ]
    print_table(summarise(records, ["plain", "judge"]))
    head, _, judge = capsys.readouterr().out.splitlines()
    assert re.split("  +", head) == ["rule", "n", "right", "95% interval", "- plain", "95% interval", "lost", "won", "answer", "95% interval",
                                    "m*", "by rule", "tokens/s", "x plain"]  # fmt: skip
    assert re.split("  +", judge)[:10] == [
        "judge",
        "9",
        "55.6%",
        "26.7 to 81.1",
        "-33.3",
        "-63.3 to +7.1",
        "3",
        "0",
        "100.0%",
        "70.1 to 100.0",
    ]


def test_environments_that_are_no_torchruns_are_one_sentence(monkeypatch, tmp_path):
    for rank, size in (
        ("3", "1"),
        ("", "2"),
        ("1", ""),
        ("-1", "2"),
        ("x", "2"),
        ("\u0660", "\u0662"),
        ("9" * 5000, "9" * 5001),
        ("0", "1.0"),
        ("0", "0"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match="are not those of a torchrun process") as caught:
            rank_and_size()
        assert len(str(caught.value)) < 300
    for text in ("1/\u0663", "0/" + "1" * 5000, "/", "", "0/0", "1.0/2", "0/2/3"):
        with pytest.raises(InputError, match="not of the form I/N"):
            share_of(argparse.Namespace(tp=False, part=text))
    (tmp_path / ("[ab].part0of" + "9" * 200)).write_text("")
    (tmp_path / "a.part0of7").write_text("")  # of another name, though a pattern fits it
    with pytest.raises(InputError, match="part0of999"):
        check_parts(tmp_path / "[ab]", 2)


def on_gpus(monkeypatch, count: int) -> list:
    """As if there were GPUs: what is asked of them is recorded."""
    asked, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **more: real(*sizes, **{**more, "device": "cpu"}))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return asked


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    asked = on_gpus(monkeypatch, 4)
    assert own_device("cuda") == "cuda" and own_device("cuda:1") == "cuda:1" and own_device("cpu") == "cpu"
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for local, name in ((None, "cuda:0"), ("0", "cuda:0"), ("2", "cuda:2"), ("3", "cuda:3")):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local:
            monkeypatch.setenv("LOCAL_RANK", local)
        assert own_device("cuda") == name and own_device("cpu") == "cpu"
        device = model.pick_device(own_device("cuda"))
        assert (
            device == torch.device(name) and device.index is not None and asked.pop() == device and not asked
        )
    for local in ("4", "-1", "", "x", "\u0661", "9" * 5000, "1.0"):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(InputError, match="names none of the 4 GPUs") as caught:
            own_device("cuda")
        assert len(str(caught.value)) < 300


def test_pick_device_names_a_gpu_and_makes_it_current(monkeypatch):
    asked = on_gpus(monkeypatch, 2)
    for name, device in (("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        assert model.pick_device(name) == torch.device(device) and asked.pop() == torch.device(device)
    assert model.pick_device("cpu") == torch.device("cpu") and not asked


TAKES_THE_DEVICE = ("acceptance.py", "bench.py", "calibration.py", "peers.py")  # whose callers have picked it


def test_every_script_picks_its_device_by_pick_device():
    """No --device goes into torch.device by itself: the GPU would have no index, and not be the current one."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/lib/*.py")]:
        source = path.read_text()
        if path.name not in ("model.py", "tp.py"):
            assert not re.search(r"torch\.device\((args\.device|[\"']cuda)", source), path.name
        if re.search(r"args\.device\b", source) and path.name not in TAKES_THE_DEVICE:
            assert "pick_device" in source, path.name


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root and mount namespaces")
def test_a_full_disk_keeps_what_is_there_and_the_same_command_goes_on(tmp_path, finished):
    """First with room for the header and an answer, then after the disk was enlarged: one sentence, then a whole run's file."""
    room = (len("".join(finished[:3])) // 4096 + 1) * 4
    code = """if 1:
        import os, shutil, sys
        sys.path.insert(0, sys.argv[1])
        from scripts.evaluate import main
        small, kept, flags = sys.argv[2], sys.argv[3], sys.argv[4:]
        for name, more in (("first", "size=8m"), ("second", "")):
            try: main([*flags, "--out", small + "/out.jsonl", "--json"])
            except SystemExit as stop: print("code", stop.code, file=sys.stderr)
            shutil.copy(small + "/out.jsonl", kept + "/" + name)
            os.system(f"mount -o remount,{more} {small}" if more else "true")"""
    (tmp_path / "small").mkdir()
    script = f'mount -t tmpfs -o size={room}k none "$1" || exit 77; shift; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path / "small"), sys.executable, "-c", code, str(ROOT), str(tmp_path / "small"),
               str(tmp_path), *FLAGS, "--limit", "6"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    said = [line for line in done.stderr.splitlines() if line.startswith(("evaluate.py", "code"))]
    assert len(said) == 2 and "No space left" in said[0] and "goes on" in said[0] and said[1] == "code 2", (
        done.stderr
    )
    first, second = ((tmp_path / name).read_bytes() for name in ("first", "second"))
    whole = first[: first.rfind(b"\n") + 1]
    assert whole.count(b"\n") >= 2 and second.startswith(whole) and second.count(b"\n") == 1 + 2 * 6
