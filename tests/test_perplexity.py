"""Protects: every token counts once, in the right window; perplexity against transformers; the command line."""

import json
import math

import pytest
import torch
from conftest import make_folder

from checkpoint import DEMO
from quantize import scheme_named
from scripts.lib.likelihood import windows
from scripts.perplexity import main
from tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "n, window, stride, given", [(10, 4, 2, 0), (10, 4, 4, 0), (3, 8, 2, 0), (100, 16, 5, 7), (9, 4, 2, 8)]
)
def test_every_token_counts_once_with_enough_before_it(n, window, stride, given):
    found = windows(n, window, stride, given)
    counted = [i for _, end, first in found for i in range(first, end)]
    assert counted == list(range(given, n))
    for begin, end, first in found:
        assert end - begin <= window and begin <= first < end
        assert begin == 0 or first == given or first - begin >= window - stride


def test_windows_by_hand():
    assert windows(10, 4, 2) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert windows(10, 4, 2, 5) == [(2, 6, 5), (4, 8, 6), (6, 10, 8)]


@torch.inference_mode()
def test_perplexity_against_transformers(tmp_path, capsys):
    theirs = make_folder(tmp_path / "model", seed=5, vocab_size=640, max_position_embeddings=128)
    (tmp_path / "model" / "tokenizer.model").write_bytes((DEMO / "target" / "tokenizer.model").read_bytes())
    text = "Mia has 47 apples. She buys 38. We have 47+38=85 apples. " * 4
    (tmp_path / "text.txt").write_text(text)
    flags = [
        "--checkpoint_path",
        str(tmp_path / "model"),
        "--text",
        str(tmp_path / "text.txt"),
        "--device",
        "cpu",
    ]
    main([*flags, "--window", "32", "--stride", "8", "--mode", "none", "int8", "int4/64"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = load_tokenizer(tmp_path / "model")
    ids, total = tokenizer.encode(text), 0.0
    for begin, end, first in windows(len(ids), 32, 8):
        window = torch.tensor([[tokenizer.bos_id, *ids[begin:end]]])
        chances = theirs(window).logits[0].double().log_softmax(-1)
        total += sum(
            chances[i - begin, ids[i]].item() for i in range(first, end)
        )  # row r says what follows token r
    rows = report["rows"]
    assert report["tokens"] == len(ids) and rows[0]["perplexity"] == pytest.approx(
        math.exp(-total / len(ids)), rel=1e-4
    )
    assert rows[0]["bits_per_token"] == pytest.approx(math.log2(rows[0]["perplexity"]))
    assert 0 < abs(rows[1]["change"]) < abs(rows[2]["change"])


@pytest.mark.parametrize("flags, sentence", [
    (["--mode", "int3"], "--mode int3 is not known"), (["--mode", "int4/x"], "not of the form"), (["--mode", "int4/48"], "--group_size 48"),
    (["--text", "nowhere.txt"], "There is no file --text nowhere.txt"), (["--stride", "0"], "--stride 0 must be a whole number"),
    (["--text", "/dev/full"], "is a device"), (["--text", "x" * 300], "File name too long"), (["--stride", "9", "--window", "8"], "--stride 9 must be between"),
    (["--limit", "1" * 5000], "must be a whole number"), (["--text", "/dev/null", "--limit", "3"], "counts demo problems"), (["--seed", "x"], "must be a whole number"),
])  # fmt: skip
def test_mistakes(flags, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main([*flags, "--device", "cpu"])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_names_of_modes():
    assert (
        scheme_named("none") is None
        and scheme_named("int4/128").group_size == 128
        and scheme_named("fp8").mode == "fp8"
    )


def test_a_perplexity_that_is_no_number_is_one_sentence(tmp_path, capsys):
    weights = make_folder(tmp_path / "model", seed=5, vocab_size=640, max_position_embeddings=128)
    weights.model.norm.weight.data[3] = float("nan")
    weights.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes((DEMO / "target" / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit) as end:
        main(
            [
                "--checkpoint_path",
                str(tmp_path / "model"),
                "--mode",
                "none",
                "--limit",
                "1",
                "--device",
                "cpu",
                "--stride",
                "32",
            ]
        )
    captured = capsys.readouterr()
    assert (
        end.value.code == 2
        and captured.out == ""
        and captured.err.count("\n") == 1
        and "not finite" in captured.err
    )
