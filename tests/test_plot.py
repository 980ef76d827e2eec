"""Protects: rounds read from `origin`, the numbers that figures show, which figures a result has, the refusals."""

import json
import sys

import pytest
from conftest import ROOT
from test_report import RECORDS, record, write

from cli import InputError
from scripts import plot
from scripts.plot import accepted_a_round, round_parts, run_accepted, run_m_sweep, run_pareto


@pytest.mark.parametrize(
    "origin, expected",
    [("", []), ("t", [0]), ("ttt", [0, 0, 0]), ("aaaab", [4]), ("raat", [3]), ("aatbrt", [2, 0, 1]), ("aatar", [2, 2]), ("a", [1])],
)
def test_a_round_ends_with_the_targets_own_token_or_the_answer(origin, expected):
    assert accepted_a_round(origin) == expected


def lines_of(axis) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_figures_of_a_run_by_hand():
    """Rounds of the judge's answers accept 5, 2, 1 and 2; plain drafts nothing and stands in no histogram."""
    (axis,) = run_accepted(RECORDS).axes
    assert lines_of(axis) == {"judge: m* 2.50, 4 rounds": ([0, 1, 2, 3, 4, 5], [0, 25, 50, 0, 0, 25])}
    (axis,) = run_pareto(RECORDS).axes
    ((_, (plain, _)), *_) = [(label, y) for label, (_, y) in lines_of(axis).items() if label == "plain"]
    assert plain == 75
    ((points, *_),) = axis.containers
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([2.5], [50])
    assert run_m_sweep(RECORDS) is None
    plain_only = [r for r in RECORDS if r["rule"] == "plain"]
    assert run_accepted(plain_only) is None and run_pareto(plain_only) is None
    assert run_pareto([r | {"right": None} for r in RECORDS]) is None and run_accepted([r | {"origin": ""} for r in RECORDS]) is None


def test_the_m_sweep_of_a_run():
    """judge@2: 3 accepted in 2 rounds, 5 tokens; judge@4: 3 in 1 round, 4 tokens; each in 1 s."""
    words = list("abcde")
    records = [record("judge@4", 0, True, words[:4], "aaab"), record("judge@2", 0, True, words, "aabat") | {"speculate_k": 2},
               record("kl@8", 0, True, words, "aabat"), record("judge@auto", 0, True, words[:3], "aat") | {"speculate_k": "auto"}]  # fmt: skip
    tokens, speed = run_m_sweep(records).axes
    assert lines_of(tokens)["judge"] == ([2, 4], [2.5, 4]) and lines_of(tokens)["judge, auto"][1] == [3, 3]
    assert lines_of(speed)["judge"] == ([2, 4], [5, 4]) and "kl" not in lines_of(speed)


def test_a_round_by_part():
    result = json.loads((ROOT / "benchmarks" / "latency_1b.json").read_text())
    ms = {row["part"]: row["ms"] for row in result["rows"]}
    (axis,) = round_parts(result).axes
    bars = [[(bar.get_x(), bar.get_width()) for bar in group] for group in axis.containers if hasattr(group[0], "get_width")]
    loop, verify = ms["draft loop, M = 16 at 500"], ms["verify 17 rows at 500"]
    assert bars == [[(0, ms["plain step at 500"])], [(0, loop)], [(loop, verify)], [(0, ms["round, M = 16 at 500"])]]
    with pytest.raises(InputError, match="no rounds"):
        round_parts({"rows": [row for row in result["rows"] if "round" not in row["part"]]})


def test_files_are_written_beside_and_named(tmp_path, capsys):
    run, latency = write(tmp_path / "run.jsonl"), tmp_path / "latency_1b.json"
    latency.write_text((ROOT / "benchmarks" / "latency_1b.json").read_text())
    plot.main([str(run), str(latency)])
    names = ["run.pareto.png", "run.accepted.png", "latency_1b.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert len(list(tmp_path.iterdir())) == 5


def test_refusals_are_one_sentence(tmp_path, capsys, monkeypatch):
    plain = write(tmp_path / "plain.jsonl", [r for r in RECORDS if r["rule"] == "plain"])
    (tmp_path / "broken.jsonl").write_text("{}\n")
    (tmp_path / "list.json").write_text("[1]")
    run = write(tmp_path / "run.jsonl")
    for path, word in ((plain, "nothing to draw"), (tmp_path / "broken.jsonl", "no header"), (tmp_path / "list.json", "not a result"),
                       (tmp_path / "none.json", "There is no file"), (run, "matplotlib; pip install")):  # fmt: skip
        if path == run:
            monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit) as stop:
            plot.main([str(path)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(SystemExit) as stop:
        plot.main(["--help"])
    assert stop.value.code == 0 and all(word in capsys.readouterr().out for word in ("pareto.png",))
