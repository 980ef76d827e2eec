"""Protects what ships: the demo pair loads anywhere, decodes as it says, and the judge is worth having."""

import re
from itertools import islice

import pytest
import torch
from test_generate import assert_same_up_to_ties

from checkpoint import DEMO
from generate import Engine, Settings, main
from quantize import load_model
from scripts.lib import terminal
from scripts.lib.demo_task import check, problems
from scripts.lib.pair import load_pair
from scripts.lib.terminal import DEMO_PROMPT, answer_text
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def demo():
    models = load_pair(
        DEMO / "target", DEMO / "draft", DEMO / "judge.safetensors", torch.device("cpu"), torch.float32
    )
    return *models, load_tokenizer(DEMO / "target")


def test_the_first_command_of_the_readme(capsys, monkeypatch):
    main(["--device", "cpu", "--marks"])
    out, err = capsys.readouterr()
    assert (
        "{" in out
        and "tokens/s" in err
        and " times as fast (median of " in err
        and f"question: {DEMO_PROMPT}\n" in err
    )
    passes, tokens, plainly = map(
        int, re.search(r"judge: (\d+) passes of the target for (\d+) tokens, plain: (\d+)", err).groups()
    )
    assert passes < tokens / 5 and plainly > 5 * passes
    monkeypatch.setattr(terminal, "COMPARED", 1)
    main(["--device", "cpu"])
    text = capsys.readouterr().out
    problem_answer = (47 + 38) * 3 - 79
    assert text == re.sub(r"[{}<>]", "", out) and text.endswith(f"{problem_answer}.\n")


@pytest.mark.slow
def test_held_out_problems(demo):
    target, draft, head, tokenizer = demo
    engines = {
        verify: Engine(target, draft, head, Settings(verify), tokenizer.stop_ids, 320)
        for verify in ("plain", "standard", "judge")
    }
    right, results = dict.fromkeys(engines, 0), {verify: [] for verify in engines}
    for problem in islice(problems(2026, held_out=True), 12):
        prompt = tokenizer.prompt(problem.question)
        for verify, engine in engines.items():
            result = engine.generate(prompt, 200)
            results[verify].append(result)
            right[verify] += check(problem, answer_text(tokenizer, result.tokens)).right
        assert_same_up_to_ties(target, prompt, results["plain"][-1].tokens, results["standard"][-1].tokens)
    m_star = {
        verify: sum(r.accepted for r in done) / sum(r.rounds for r in done)
        for verify, done in results.items()
    }
    assert right["plain"] >= 11 and right["judge"] >= right["plain"] - 1
    assert m_star["judge"] > 1.7 * m_star["standard"] > 5
    assert (
        sum(r.accepted_by_rule for r in results["judge"]) > 60
        and sum(r.accepted_by_rule for r in results["standard"]) == 0
    )


@pytest.mark.parametrize("role", ["target", "draft"])
@torch.inference_mode()
def test_transformers_loads_the_folders_and_agrees(role, demo):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(DEMO / role, dtype=torch.float32).eval()
    ours = load_model(DEMO / role, dtype=torch.float32)
    tokenizer = demo[3]
    ids = torch.tensor([tokenizer.prompt(DEMO_PROMPT + " First, Mia gains 38")])
    expected = theirs(ids).logits
    assert (ours(ids)[1] - expected).abs().max() < 1e-4 * expected.abs().max()
    sizes = {"target": (3e6, 8e6), "draft": (0, 0.6e6)}[role]
    assert sizes[0] <= ours.args.n_params <= sizes[1]
    assert role == "draft" or ours.args.n_kv_head < ours.args.n_head


def test_it_is_small_and_says_how_it_was_made(demo):
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 20e6
    info = demo[2].info
    assert info["label_policy"] and info["held_out"]["auc"] > 0.95 and info["training_tokens"] > 10000
    assert "train_demo.py" in (DEMO / "README.md").read_text()
