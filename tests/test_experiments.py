"""Protects: that every experiment has a figure and leaves its three files, the plot's refusals."""

import json
import os

import pytest
import torch
from conftest import ROOT

from scripts import experiments, plot
from scripts.experiments import EXPERIMENTS, fit_and_measure, read_variants
from scripts.lib.figures import FIGURES


def test_every_experiment_has_a_figure_and_a_line_in_the_docstring():
    assert set(FIGURES) == set(EXPERIMENTS)
    assert all(f"    {name} " in experiments.__doc__ for name in EXPERIMENTS)


@pytest.mark.parametrize(
    "name, limit",
    [
        ("judge_table", 3),
        ("self_correction", 3),
        ("other_text", 3),
        ("judge_table", 1),
        ("self_correction", 1),
    ],
)
def test_an_experiment_leaves_its_three_files(name, limit, tmp_path, capsys):
    flags = [
        name,
        "--limit",
        str(limit),
        "--device",
        "cpu",
        "--work",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path),
    ]
    experiments.main(flags)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (
        result["n"] == limit
        and all(row.get("n", 1) > 0 for row in result["rows"])
        and result["seed"] == 2026
        and result["finding"] in (tmp_path / f"{name}.md").read_text()
    )
    assert {"command", "machine", "commit", "rows", "title"} <= set(result) and name in result["command"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert result["rows"] and f"{name}: {result['finding']}" in capsys.readouterr().out


def refused(argv: list[str], capsys) -> str:
    """The one sentence with which main ends; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        experiments.main(argv)
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(("experiments.py:", "__main__.py:", "pytest:", "-c:"))
    ]
    assert stop.value.code == 2 and len(said) == 1 and len(said[0]) < 1200
    return said[0]


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "judge_table", lambda args: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "judge_table.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "judge_table.md").write_text("answers")
    good = {
        "--work": str(tmp_path / "new"),
        "--results": str(tmp_path / "new"),
        "--judge_data": str(tmp_path / "mine" / "judge_table.md"),
    }
    for flag, value, words in (
        ("--work", "/dev/null", "is no folder"), ("--results", "/dev/full", "is no folder"), ("--work", tmp_path / "file", "is no folder"), ("--results", "n" * 300, "File name too long"),
        ("--results", tmp_path / "odd", "it is a pipe"), ("--results", tmp_path / "mine", "is one of the inputs"), ("--limit", "0", "must be a whole number"),
        ("--limit", "9" * 500, "must be a whole number"), ("--max_harm", "nan", "must be a number"), ("--mined_seed", "x", "must be a whole number"), ("--device", "cuda:99", "not usable"),
    ):  # fmt: skip
        flags = good | {flag: str(value)}
        assert words in refused(["judge_table", *(word for pair in flags.items() for word in pair)], capsys)
    assert "give --compile" in refused(["rule_cost", "--work", str(tmp_path / "new")], capsys)
    assert not (tmp_path / "new").exists() and (tmp_path / "mine" / "judge_table.md").read_text() == "answers"


def test_too_few_answers_are_one_sentence(tmp_path, capsys):
    lines = [
        {
            "prompt": f"Mia has {n} apples.",
            "response": f"So Mia has {n + 1}.",
            "errors": [[11, 13]],
            "source": "",
        }
        for n in range(20, 24)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [
        "--work",
        str(tmp_path / "w"),
        "--results",
        str(tmp_path / "w"),
        "--judge_data",
        str(tmp_path / "a.jsonl"),
        "--mined",
        str(tmp_path / "a.jsonl"),
        "--device",
        "cpu",
    ]
    for name, words in (
        ("ablations", "are too few"),
        ("label_policies", "no wrong or no right"),
        ("autojudge", "annotated answers"),
        ("out_of_domain", "no wrong or no right"),
    ):
        assert words in refused([name, "--limit", "2", *flags], capsys), name
    assert "There is no" in refused(
        ["ablations", *flags[:4], "--judge_data", str(tmp_path / "none.jsonl")], capsys
    )
    assert not list((tmp_path / "w").glob("*.json"))


def test_the_judge_and_the_other_rules_are_calibrated_from_files_of_their_own(tmp_path, monkeypatch):
    """A file of answers names the judge that gave them, so that one with it and one without cannot share it."""
    calibrated = {}

    def by_generating(args, walk, questions):
        calibrated[args.verify] = args.answers
        return {"threshold": None, "n": 1}, None

    monkeypatch.setattr(experiments.calibration, "by_generating", by_generating)
    experiments.main(
        ["equal_risk", "--limit", "1", "--device", "cpu", "--work", str(tmp_path), "--results", str(tmp_path)]
    )
    result = json.loads((tmp_path / "equal_risk.json").read_text())
    assert "m* nowhere; none qualifies of judge, kl" in result["finding"]
    assert (
        calibrated["judge"] not in [path for rule, path in calibrated.items() if rule != "judge"]
        and len(set(calibrated.values())) == 2
    )


def test_every_committed_result_is_whole():
    """The repository shows JSON, Markdown and PNG of every experiment, with its figures in the text."""
    for name in EXPERIMENTS:
        result = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        assert result["finding"] in (ROOT / "benchmarks" / f"{name}.md").read_text()
        assert (ROOT / "benchmarks" / f"{name}.png").stat().st_size > 5000


def test_the_plot_refuses_what_it_does_not_know(tmp_path, capsys):
    for content, word in (
        ("{}", "no figure for None"),
        ("[", "not a result"),
        ('{"name": "pareto"}', "not a result"),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(SystemExit) as stop:
            plot.main([str(tmp_path / "a.json")])
        assert stop.value.code == 2 and word in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_the_auc_of_a_head_is_that_of_its_training(tmp_path):
    """The same held-out prompts, labels and features as `train_judge` measures by."""
    from checkpoint import DEMO
    from quantize import load_model
    from scripts.lib.training import TrainSettings, train_judge
    from tokenizer import load_tokenizer

    answers = [{"prompt": f"Mia has {n} apples. She buys {i}.", "response": f"So Mia has {n}+{i}={n + i + wrong}.",
                "errors": [[13, 15]] * wrong, "source": ""} for n in range(10, 30) for i in (7, 8) for wrong in (0, 1)]  # fmt: skip
    tokenizer, target = load_tokenizer(DEMO / "target"), load_model(DEMO / "target", "cpu", torch.float32)
    head = train_judge([target], tokenizer, answers, TrainSettings(), tmp_path)
    found = experiments.held_out_auc(head, target, tokenizer, answers, tmp_path)
    assert 0 < found < 1 and found == pytest.approx(head.info["held_out"]["auc"], abs=1e-6)


@torch.inference_mode()
def test_ablations_read_the_rows_and_layers_that_they_name(pair):
    from scripts.lib.answers import Encoded

    target, draft = pair
    ids = list(range(10, 40))
    answers = [Encoded([1, n, 3], ids, None, {"labels": [1] * 29 + [0]}) for n in (5, 6)]
    features, labels, number = read_variants(target, draft, answers)
    assert not any(layer._forward_hooks for layer in target.layers), "a hook stays behind"
    assert len(labels) == 60 and number.tolist() == [0] * 30 + [1] * 30 and labels.sum() == 58
    for n, answer in enumerate(answers):
        both = torch.tensor([answer.prompt + ids])
        own, mine = target(both)[0][0], number == n
        assert torch.allclose(features["own row, before the final norm"][mine], own[3:], atol=1e-4)
        assert torch.allclose(features["row before"][mine], own[2:-1], atol=1e-4)
        assert torch.allclose(
            features["own row, after the final norm"][mine], target.norm(own[3:]), atol=1e-4
        )
        assert torch.allclose(features["target+draft"][mine][:, 64:], draft(both)[0][0, 2:-1], atol=1e-4)


def test_measured_ablations_find_a_planted_label():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(2000, generator=generator) > 0.1).long()
    x = torch.randn(2000, 6, generator=generator)
    x[:, 2] += 3 * labels
    train = torch.arange(2000) < 1200
    found, nothing = (
        fit_and_measure(x, labels, train, ~train),
        fit_and_measure(x[:, 3:], labels, train, ~train),
    )
    assert found["auc"] > 0.96 and found["wrong_accepted_at_95"] < 0.2 and nothing["auc"] < 0.6
    assert found["wrong_tokens"] == int((labels[~train] == 0).sum())
