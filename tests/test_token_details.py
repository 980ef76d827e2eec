"""Protects: which row each figure of a token is read from, what a result line keeps, how text is cut into tokens."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_folder

from judge import JudgeHead
from quantize import load_model
from scripts import evaluate
from scripts.lib import token_details
from scripts.lib.runs import accepted_a_round
from scripts.lib.terminal import answer_text
from scripts.lib.token_details import cuts
from tokenizer import load_tokenizer

PROMPT, TOKENS = [1, 17, 42, 8], [5, 77, 23, 23, 60, 2]


def prenorm(reference, ids: list[int]) -> torch.Tensor:
    """The last layer's output before the final norm, (n, dim), of transformers' model."""
    seen = []
    hook = reference.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    reference(torch.tensor([ids]))
    hook.remove()
    return seen[0]


@torch.inference_mode()
def test_every_figure_is_of_its_row(tmp_path, monkeypatch):
    """Against transformers, token by token: p, KL and top of what follows the tokens before it, the score of it itself."""
    references = [
        make_folder(tmp_path / "target", seed=1),
        make_folder(tmp_path / "draft", seed=2, num_hidden_layers=1),
    ]
    target, draft = load_model(tmp_path / "target"), load_model(tmp_path / "draft")
    generator = torch.Generator().manual_seed(0)
    weight, draft_weight = (torch.randn(64, generator=generator) / 20 for _ in range(2))
    bias = torch.tensor(0.3)
    own, both = (JudgeHead(weight, bias, 0.5, "", {}, w) for w in (None, draft_weight))
    monkeypatch.setattr(token_details, "ROWS", 4)  # so that the answer takes two passes of the LM head
    target.setup_caches(64)
    generation = target.cache_epoch
    found = token_details.token_details(target, draft, own, PROMPT, TOKENS)
    with_draft = token_details.token_details(target, draft, both, PROMPT, TOKENS)
    assert target.cache_epoch == generation, "an engine's caches were replaced"
    for at, token in enumerate(TOKENS):
        before = PROMPT + TOKENS[:at]
        log_p, log_q = (
            reference(torch.tensor([before])).logits[0, -1].log_softmax(-1) for reference in references
        )
        assert found.p[at].item() == pytest.approx(log_p[token].exp().item(), rel=1e-3, abs=1e-6)
        assert found.kl[at].item() == pytest.approx(
            F.kl_div(log_q, log_p, reduction="sum", log_target=True).item(), rel=1e-3
        )
        assert found.top[at] == log_p.argmax()
        z = prenorm(references[0], [*before, token])[-1] @ weight + bias
        assert found.score[at].item() == pytest.approx(z.sigmoid().item(), abs=1e-4)
        z = z + prenorm(references[1], before)[-1] @ draft_weight  # the draft's row that proposed the token
        assert with_draft.score[at].item() == pytest.approx(z.sigmoid().item(), abs=1e-4)
    assert token_details.token_details(target, draft, None, PROMPT, TOKENS).score is None


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("run") / "results.jsonl"
    flags = ["--limit", "4", "--verify", "plain,standard,judge", "--device", "cpu", "--details"]
    evaluate.main([*flags, "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_details_agree_with_what_the_engine_decided(lines):
    """Greedy: accepted tokens and the target's own are its most likely ones; the rule's are others, with a score above delta."""
    letters = ""
    for record in lines[1:]:
        for token in zip(
            record["origin"], record["p"], record["score"], record["top"], record["kl"], strict=True
        ):
            letter, p, score, top, kl = token
            assert (top is None) == (letter != "r"), token
            assert letter != "r" or score >= record["threshold"]
            assert 0 <= p <= 1 and kl >= 0 and (top is None or p <= 0.5)
        letters += record["origin"]
        assert len(record["origin"]) == len(record["tokens"]) and sum(record["cuts"]) == len(record["text"])
        assert sum(map(record["origin"].count, "ar")) == record["accepted"]
        assert record["origin"].count("r") == record["accepted_by_rule"]
        assert len(accepted_a_round(record["origin"])) == record["rounds"]
    assert min(map(letters.count, "artb")) > 5, "too few of a kind for this test to say anything"


def test_a_run_with_details_goes_on_with_details_only(tmp_path, capsys):
    flags = ["--limit", "1", "--verify", "plain", "--device", "cpu", "--out", str(tmp_path / "r.jsonl")]
    evaluate.main([*flags, "--details"])
    for first, more in ((["--details"], []), ([], ["--details"])):
        (tmp_path / "r.jsonl").unlink()
        evaluate.main([*flags, *first])
        assert ("p" in json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])) == bool(first)
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*flags, *more])
        assert stop.value.code == 2 and "other settings (details)" in capsys.readouterr().err


def test_text_is_cut_where_tokens_complete_it():
    tokenizer = load_tokenizer(ROOT / "checkpoints" / "demo" / "target")
    stop = tokenizer.stop_ids[0]
    ids = tokenizer.encode("é 7")  # é is no piece of the demo's vocabulary: a space, then its two bytes
    bytes_of = [tokenizer.token_bytes(id) for id in ids]
    assert b"\xc3" in bytes_of and b"\xa9" in bytes_of
    at = bytes_of.index(b"\xc3")
    counts = cuts(tokenizer, [*ids, stop])
    assert counts[at : at + 2] == [0, 1] and counts[-1] == 0 and len(counts) == len(ids) + 1
    assert sum(cuts(tokenizer, ids[: at + 1])) == len(
        answer_text(tokenizer, ids[: at + 1])
    )  # half a character
    assert cuts(tokenizer, [stop]) == [0] and cuts(tokenizer, []) == []
