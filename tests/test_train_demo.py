"""Protects: a training run that was killed resumes to the same weights; what it saves is a published folder."""

import io
import os
import subprocess
import sys

import pytest
import sentencepiece
import torch
from conftest import ROOT

from cli import InputError
from model import ModelArgs
from quantize import load_model
from scripts import train_demo

TOKENIZER = ROOT / "checkpoints" / "demo" / "target" / "tokenizer.model"


def small(monkeypatch) -> sentencepiece.SentencePieceProcessor:
    monkeypatch.setattr(
        train_demo,
        "PRESETS",
        {"target": ModelArgs(32, 1, 2, 1, 48, 640, 16, 512, 1e-5, 10000.0, tie_embeddings=True)},
    )
    monkeypatch.setattr(train_demo, "BATCH", 4)
    monkeypatch.setattr(train_demo, "SAVE_EVERY", 2)
    monkeypatch.setattr(torch, "compile", lambda step: step)
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    sp = small(monkeypatch)
    whole = train_demo.train_model("target", sp, tmp_path / "whole.pt", seed=1, device="cpu", steps=6)
    batch, killed = train_demo.batch, tmp_path / "killed.pt"

    def dies(sp, style, seed, step, late):
        if step == 5:
            raise KeyboardInterrupt
        return batch(sp, style, seed, step, late)

    monkeypatch.setattr(train_demo, "batch", dies)
    try:
        train_demo.train_model("target", sp, killed, seed=1, device="cpu", steps=6)
    except KeyboardInterrupt:
        monkeypatch.setattr(train_demo, "batch", batch)
    assert torch.load(killed, weights_only=True)["step"] == 4
    again = train_demo.train_model("target", sp, killed, seed=1, device="cpu", steps=6)
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other)
    try:
        train_demo.train_model("target", sp, killed, seed=2, device="cpu", steps=6)
    except InputError as error:
        assert "another seed" in str(error)
    else:
        raise AssertionError("a state of another seed was resumed")


def test_a_saved_folder_is_what_was_trained(tmp_path, monkeypatch):
    sp = small(monkeypatch)
    model = train_demo.train_model("target", sp, tmp_path / "state.pt", seed=1, device="cpu", steps=2)
    train_demo.save_folder(model, TOKENIZER, tmp_path / "folder")
    again = load_model(tmp_path / "folder", dtype=torch.float32)
    ids = torch.tensor([[1, 300, 400, 500]])
    assert torch.allclose(again(ids)[1], model(ids)[1], atol=2e-2)  # bf16 on disk
    assert sum(weight.numel() for weight in again.parameters()) == model.args.n_params


def test_a_trial_cannot_replace_the_shipped_pair(capsys, monkeypatch):
    assert "name an --out" in refused(["--steps", "2"], capsys)


def refused(argv: list[str], capsys) -> str:
    """The one sentence with which main ends; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_demo.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and len(err) < 1200
    return err


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_demo, "train_tokenizer", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "work").mkdir()
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "draft.pt")
    (tmp_path / "out" / "target" / "config.json").mkdir(parents=True)
    good = {"--out": str(tmp_path / "new"), "--work": str(tmp_path / "work")}
    for flag, name, words in (
        ("--out", "/dev/null", "Not a directory"), ("--work", "/dev/null", "is no folder"), ("--work", "file", "is no folder"), ("--out", "file/below", "Not a directory"),
        ("--work", "n" * 300, "File name too long"), ("--out", "n" * 300, "File name too long"), ("--work", "loop", "Too many levels"), ("--out", "loop/a", "Too many levels"),
        ("--work", "odd", "it is a pipe"), ("--out", "out", "it is a folder"),
    ):  # fmt: skip
        flags = good | {flag: str(tmp_path / name)}
        assert words in refused(
            [*(word for pair in flags.items() for word in pair), "--steps", "2", "--device", "cpu"], capsys
        ), (flag, name)
    for more, words in ((["--stages", "magic"], "magic is not a stage"), (["--stages", ""], "is not a stage"), (["--stages", "judge,"], "is not a stage"),
                        (["--seed", "9" * 500], "must be a whole number"), (["--steps", "0"], "must be a whole number"), (["--device", "cuda:99"], "not usable here")):  # fmt: skip
        assert words in refused(
            ["--out", str(tmp_path / "new"), "--work", str(tmp_path / "work"), *more], capsys
        )
    assert (
        not (tmp_path / "new").exists()
        and not list((tmp_path / "work").iterdir())
        and (tmp_path / "file").read_text() == "kept"
    )


def test_two_trainings_do_not_share_a_work_folder(tmp_path, capsys):
    hold = f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import files\nfiles.lock(os.open({str(tmp_path)!r}, os.O_RDONLY), '')\nprint('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        said = refused(
            ["--out", str(tmp_path / "out"), "--work", str(tmp_path), "--steps", "2", "--device", "cpu"],
            capsys,
        )
        holder.kill()
    assert "by another process" in said and not list(tmp_path.iterdir())


def test_damaged_states_and_tokenizers_are_one_sentence(tmp_path, monkeypatch, capsys):
    sp, state = small(monkeypatch), tmp_path / "target.pt"
    train_demo.train_model("target", sp, state, seed=1, device="cpu", steps=4)
    whole, saved = state.read_bytes(), torch.load(state, weights_only=True)

    def changed(**fields) -> bytes:
        buffer = io.BytesIO()
        torch.save(saved | fields, buffer)
        return buffer.getvalue()

    nan = saved["model"] | {name: weight * float("nan") for name, weight in saved["model"].items()}
    foreign = [{**saved["optimizers"][0], "state": {}}, saved["optimizers"][1]]
    for content in (b"", b"junk", whole[:-100], whole[: len(whole) // 2], whole[:2000] + bytes(200) + whole[2200:], changed(model={}), changed(model=nan),
                    changed(step=True), changed(step=5), changed(step=-1), changed(step="4"), changed(optimizers=[]), changed(optimizers=foreign), changed(optimizers=None)):  # fmt: skip
        state.write_bytes(content)
        with pytest.raises(InputError, match="is damaged") as caught:
            train_demo.train_model("target", sp, state, seed=1, device="cpu", steps=4)
        assert len(str(caught.value)) < 400 and state.read_bytes() == content
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(InputError, match="is a pipe"):
        train_demo.train_model("target", sp, state, seed=1, device="cpu", steps=4)
    for content, words in (
        (b"junk", "is no SentencePiece model"),
        (b"", "no SentencePiece model|no tokenizer of"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match=words):
            train_demo.load_pieces(tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match="run the stage tokenizer first"):
        train_demo.load_pieces(tmp_path / "none")


def test_the_judge_alone_needs_no_tokenizer_of_the_training(tmp_path, monkeypatch):
    """As docs/experiments.md has it: only the judge, from a pair that is there."""
    trained = []
    monkeypatch.setattr(train_demo, "train_demo_judge", lambda *args: trained.append(args))
    train_demo.main(["--stages", "judge", "--work", str(tmp_path / "work"), "--device", "cpu"])
    assert trained[0][:2] == (train_demo.DEMO, tmp_path / "work")
