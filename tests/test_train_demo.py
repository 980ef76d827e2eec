"""Protects: a training run that was killed resumes to the same weights; what it saves is a published folder."""

import pytest
import sentencepiece
import torch
from conftest import ROOT

from cli import InputError
from model import ModelArgs, load_model
from scripts import train_demo

TOKENIZER = ROOT / "checkpoints" / "demo" / "target" / "tokenizer.model"


def small(monkeypatch) -> sentencepiece.SentencePieceProcessor:
    monkeypatch.setattr(
        train_demo, "PRESETS", {"target": ModelArgs(32, 1, 2, 1, 48, 640, 16, 512, 1e-5, 10000.0, tie_embeddings=True)}
    )
    monkeypatch.setattr(train_demo, "BATCH", 4)
    monkeypatch.setattr(train_demo, "SAVE_EVERY", 2)
    monkeypatch.setattr(torch, "compile", lambda step: step)
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    sp = small(monkeypatch)
    whole = train_demo.train_model("target", sp, tmp_path / "whole.pt", 1, "cpu", 6)
    batch, killed = train_demo.batch, tmp_path / "killed.pt"

    def dies(sp, style, seed, step, late):
        if step == 5:
            raise KeyboardInterrupt
        return batch(sp, style, seed, step, late)

    monkeypatch.setattr(train_demo, "batch", dies)
    try:
        train_demo.train_model("target", sp, killed, 1, "cpu", 6)
    except KeyboardInterrupt:
        monkeypatch.setattr(train_demo, "batch", batch)
    assert torch.load(killed, weights_only=True)["step"] == 4
    again = train_demo.train_model("target", sp, killed, 1, "cpu", 6)
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other)
    try:
        train_demo.train_model("target", sp, killed, 2, "cpu", 6)
    except InputError as error:
        assert "another seed" in str(error)
    else:
        raise AssertionError("a state of another seed was resumed")


def test_a_saved_folder_is_what_was_trained(tmp_path, monkeypatch):
    sp = small(monkeypatch)
    model = train_demo.train_model("target", sp, tmp_path / "state.pt", 1, "cpu", 2)
    train_demo.save_folder(model, TOKENIZER, tmp_path / "folder")
    again = load_model(tmp_path / "folder", dtype=torch.float32)
    ids = torch.tensor([[1, 300, 400, 500]])
    assert torch.allclose(again(ids)[1], model(ids)[1], atol=2e-2)  # bf16 on disk
    assert sum(weight.numel() for weight in again.parameters()) == model.args.n_params


def test_a_trial_cannot_replace_the_shipped_pair(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_demo.py", "--steps", "2"])
    with pytest.raises(SystemExit) as stop:
        train_demo.main()
    assert stop.value.code == 2 and "name an --out" in capsys.readouterr().err
