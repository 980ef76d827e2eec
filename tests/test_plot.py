"""Protects: rounds read from `origin`, the numbers that figures show, which figures a result has, the refusals."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_report import RECORDS, record, write

from cli import InputError
from scripts import plot
from scripts.lib import figures
from scripts.lib.figures import (
    FIGURES,
    bars,
    new_figure,
    round_parts,
    run_accepted,
    run_m_sweep,
    run_pareto,
    shown,
)
from scripts.lib.runs import accepted_a_round


@pytest.mark.parametrize(
    "origin, expected",
    [
        ("", []),
        ("t", [0]),
        ("ttt", [0, 0, 0]),
        ("aaaab", [4]),
        ("raat", [3]),
        ("aatbrt", [2, 0, 1]),
        ("aatar", [2, 2]),
        ("a", [1]),
    ],
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
    assert (
        run_pareto([r | {"right": None} for r in RECORDS]) is None
        and run_accepted([r | {"origin": ""} for r in RECORDS]) is None
    )


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
    bars = [
        [(bar.get_x(), bar.get_width()) for bar in group]
        for group in axis.containers
        if hasattr(group[0], "get_width")
    ]
    loop, verify = ms["draft loop, M = 16 at 500"], ms["verify 17 rows at 500"]
    assert bars == [
        [(0, ms["plain step at 500"])],
        [(0, loop)],
        [(loop, verify)],
        [(0, ms["round, M = 16 at 500"])],
    ]
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


def refused(argv: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        plot.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


def committed(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def drawn(name: str):
    figure = FIGURES[name](committed(name))
    figure.canvas.draw() if hasattr(figure.canvas, "draw") else figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_has_a_legend_full_words_and_no_cut_number(name):
    figure = drawn(name)
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    assert legends and all(text.get_text() for legend in legends for text in legend.get_texts())
    words = [
        text.get_text() for axis in figure.axes for text in [axis.title, axis.xaxis.label, axis.yaxis.label]
    ]
    assert not {"m*", "tokens/s", "M"} & set(words)
    page = figure.bbox
    for axis in figure.axes:
        for text in [*axis.texts, *axis.get_xticklabels()]:
            box = text.get_window_extent()
            assert (
                not re.search(r"\de[+-]", text.get_text()) and box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1
            ), text.get_text()


def test_an_area_under_a_curve_ends_at_one():
    for axis in drawn("ablations").axes:
        assert axis.get_xlim()[1] == 1 and all(box.get_width() <= 1 for box in axis.patches)
    assert drawn("judge_table").axes[2].get_xlim()[1] == 100


def test_points_name_their_thresholds():
    """The judge's of pareto.json are 0.5 to 0.99: those apart alone, those that crowd as first and last; so in a run."""
    axis = next(axis for axis in drawn("pareto").axes if axis.get_title() == "judge")
    found = {text.get_text() for text in axis.texts}
    assert {"0.99", "0.98", "0.95"} <= found and any(" to 0.5" in text for text in found)
    assert {text.get_text() for text in run_pareto(RECORDS).axes[0].texts} == {"0.8"}
    assert {text.get_text() for text in drawn("autojudge").axes[0].texts} >= {"0.9", "0.8", "0.5"}


def test_numbers_as_people_write_them():
    assert [shown(x) for x in (1913.4, 123.4, 14.23, 5.03, 0.995, 0, -0.0, None, -12.34)] == [
        "1,913", "123", "14.2", "5.03", "0.995", "0", "0", "-", "-12.3"]  # fmt: skip
    _, (axis,) = new_figure()
    bars(axis, ["a"], [1913.4], "t", "l")
    assert [text.get_text() for text in axis.texts] == ["1,913"] and axis.texts[0].get_position()[
        0
    ] > 1  # beside the axis


def test_files_of_both_schemas_are_drawn():
    new = committed("latency_1b") | {"schema": 2}
    for row in new["rows"]:
        row |= {"ms_min": row.pop("ms_p10") - 1, "ms_max": row.pop("ms_p90") + 1, "n": 5}
    (axis,) = round_parts(new).axes
    assert (
        "least to most" in axis.get_xlabel()
        and "10% to 90%" in round_parts(committed("latency_1b")).axes[0].get_xlabel()
    )
    for row in new["rows"]:
        row |= {"ms_p25": row["ms"], "ms_p75": row["ms"], "n": 20}
    assert "25% to 75%" in round_parts(new).axes[0].get_xlabel()


ROW = {"part": "round, M = 4 at 20", "ms": 2.0, "ms_p10": 1.0, "ms_p90": 3.0}
SPEED = {"machine": "m", "commit": "c", "dtype": "float32", "rows": [ROW]}


@pytest.mark.parametrize("name, change, words", [
    ("latency", {"rows": []}, "no figure"), ("latency", {"rows": [3, ROW]}, "row 1"), ("latency", {"machine": 3}, "'machine'"),
    ("latency", {"rows": [ROW | {"ms": 0}]}, "row 1: field 'ms'"), ("latency", {"rows": [ROW | {"ms": float("nan")}]}, "'ms'"),
    ("latency", {"rows": [ROW | {"ms": 10**18}]}, "'ms'"), ("latency", {"rows": [ROW | {"ms": True}]}, "'ms'"),
    ("latency", {"rows": [ROW | {"ms_p10": "1"}]}, "'ms_p10'"), ("latency", {"rows": [ROW | {"ms_p90": [1]}]}, "'ms_p90'"),
    ("latency", {"rows": [ROW | {"part": 1}]}, "'part'"), ("latency", {"rows": [ROW | {"part": "x"}]}, "no rounds"),
    ("latency", {"rows": [ROW] * 1001}, "1 to 1000 rows"), ("latency", {"name": ["pareto"]}, "no figure for"),
    ("latency", {"name": "x" * 10**5}, "no figure for"), ("ablations", {"title": None}, "'title'"), ("ablations", {"n": "many"}, "'n'"),
    ("ablations", {"rows": {}}, "'rows'"), ("ablations", {"rows": []}, "'rows'"), ("ablations", {"rows": [[]]}, "row 1"),
])  # fmt: skip
def test_damaged_results_are_one_sentence(name, change, words, tmp_path, capsys):
    result = (SPEED if name == "latency" else committed(name)) | change
    (tmp_path / "a.json").write_text(json.dumps(result))
    err = refused([str(tmp_path / "a.json")], capsys)
    assert str(tmp_path / "a.json") in err and words in err, err
    assert not list(tmp_path.glob("*.png*"))


@pytest.mark.parametrize("name", list(FIGURES))
def test_no_field_of_a_row_may_be_anything(name, tmp_path, capsys):
    """Each field that a figure reads, spoilt in each way: one sentence with file, row and field."""
    for field, good in figures.ROW_FIELDS[name].items():
        for value in ([], {}, True, float("nan"), float("inf"), 10**18, "text", None):
            result = committed(name)
            result["rows"][-1][field] = value
            (tmp_path / "a.json").write_text(json.dumps(result))
            if good(value):
                continue
            err = refused([str(tmp_path / "a.json")], capsys)
            assert f"row {len(result['rows'])}: field {field!r}" in err and "a.json" in err


def test_what_is_read_and_written_is_regular(tmp_path, capsys):
    """Devices, pipes, folders, loops and long names are named; no device or pipe is replaced by a figure, and no input."""
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder.json").mkdir()
    for path in (
        "/dev/full",
        "/dev/zero",
        tmp_path / "fifo.json",
        tmp_path / "loop.jsonl",
        tmp_path / "folder.json",
        "/",
        "n" * 300,
    ):
        assert str(path)[:50] in refused([str(path)], capsys) or path == "/dev/zero"
    good = json.dumps(committed("rule_cost"))
    for make in (
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/dev/null"),
    ):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(good)
        make(path.with_suffix(".png"))
        before = os.lstat(path.with_suffix(".png"))
        assert "cannot be written" in refused([str(path)], capsys)
        assert os.lstat(path.with_suffix(".png")).st_ino == before.st_ino
    (tmp_path / "a.png").write_text(good)
    assert (
        "would be lost" in refused([str(tmp_path / "a.png")], capsys)
        and (tmp_path / "a.png").read_text() == good
    )


def test_names_in_results_are_no_formulas(tmp_path, capsys):
    result = committed("rule_cost")
    result["rows"][0]["rule"], result["machine"] = "$\\frac{1$ \u65e5\n\t" + "x" * 500, "$^$"
    (tmp_path / "a.json").write_text(json.dumps(result))
    plot.main([str(tmp_path / "a.json")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and not capsys.readouterr().err


def test_the_commands_of_the_documents(tmp_path, monkeypatch, capsys):
    """Those of docs/evaluation.md and of the docstring, on copies: figures go beside the files."""
    texts = [(ROOT / "docs" / "evaluation.md").read_text(), plot.__doc__]
    commands = [
        line.split()
        for text in texts
        for line in re.findall(r"^ *python scripts/plot.py ([^#\n]*)", text, re.M)
    ]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    write(tmp_path / "results.jsonl")
    for name in ("latency_1b", "pareto"):
        (tmp_path / "benchmarks" / f"{name}.json").write_text(
            (ROOT / "benchmarks" / f"{name}.json").read_text()
        )
    for command in commands:
        plot.main(command)
        assert all((tmp_path / name).exists() for name in capsys.readouterr().out.split())


def test_standard_output_full_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SPEED))
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, plot.__file__, str(tmp_path / "a.json")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert found.returncode == 2 and found.stderr.count("\n") == 1
