"""Protects: that every experiment has a figure and leaves its three files, the plot's refusals."""

import json

import pytest
import torch
from conftest import ROOT

from scripts import experiments, plot
from scripts.experiments import EXPERIMENTS, fit_and_measure, read_variants
from scripts.plot import FIGURES


def test_every_experiment_has_a_figure_and_a_line_in_the_docstring():
    assert set(FIGURES) == set(EXPERIMENTS)
    assert all(f"    {name} " in experiments.__doc__ for name in EXPERIMENTS)


@pytest.mark.parametrize("name", ["judge_table", "self_correction", "other_text"])
def test_an_experiment_leaves_its_three_files(name, tmp_path, capsys):
    flags = [name, "--limit", "3", "--device", "cpu", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    experiments.main(flags)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["n"] == 3 and result["seed"] == 2026 and result["finding"] in (tmp_path / f"{name}.md").read_text()
    assert {"command", "machine", "commit", "rows", "title"} <= set(result) and name in result["command"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert result["rows"] and f"{name}: {result['finding']}" in capsys.readouterr().out


def test_every_committed_result_is_whole():
    """The repository shows JSON, Markdown and PNG of every experiment, with its figures in the text."""
    for name in EXPERIMENTS:
        result = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        assert result["finding"] in (ROOT / "benchmarks" / f"{name}.md").read_text()
        assert (ROOT / "benchmarks" / f"{name}.png").stat().st_size > 5000


def test_the_plot_refuses_what_it_does_not_know(tmp_path, capsys):
    for content, word in (("{}", "no figure for None"), ("[", "not a result"), ('{"name": "pareto"}', "not a result")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(SystemExit) as stop:
            plot.main([str(tmp_path / "a.json")])
        assert stop.value.code == 2 and word in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_the_auc_of_a_head_is_that_of_its_training(tmp_path):
    """The same held-out prompts, labels and features as `train_judge` measures by."""
    from generate import DEMO
    from judge import TrainSettings, train_judge
    from model import load_model
    from tokenizer import load_tokenizer

    answers = [{"prompt": f"Mia has {n} apples. She buys {i}.", "response": f"So Mia has {n}+{i}={n + i + wrong}.",
                "errors": [[13, 15]] * wrong, "source": ""} for n in range(10, 30) for i in (7, 8) for wrong in (0, 1)]  # fmt: skip
    tokenizer, target = load_tokenizer(DEMO / "target"), load_model(DEMO / "target", "cpu", torch.float32)
    head = train_judge([target], tokenizer, answers, TrainSettings(), tmp_path)
    found = experiments.held_out_auc(head, target, tokenizer, answers, tmp_path)
    assert 0 < found < 1 and found == pytest.approx(head.info["held_out"]["auc"], abs=1e-6)


@torch.inference_mode()
def test_ablations_read_the_rows_and_layers_that_they_name(pair):
    from judge import Encoded

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
        assert torch.allclose(features["own row, after the final norm"][mine], target.norm(own[3:]), atol=1e-4)
        assert torch.allclose(features["target+draft"][mine][:, 64:], draft(both)[0][0, 2:-1], atol=1e-4)


def test_measured_ablations_find_a_planted_label():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(2000, generator=generator) > 0.1).long()
    x = torch.randn(2000, 6, generator=generator)
    x[:, 2] += 3 * labels
    train = torch.arange(2000) < 1200
    found, nothing = fit_and_measure(x, labels, train, ~train), fit_and_measure(x[:, 3:], labels, train, ~train)
    assert found["auc"] > 0.96 and found["wrong_accepted_at_95"] < 0.2 and nothing["auc"] < 0.6
    assert found["wrong_tokens"] == int((labels[~train] == 0).sum())
