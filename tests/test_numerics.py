"""Numbers that are not finite stop a run with one sentence, wherever they come from, and leave the engine as good as new."""

import json
from contextlib import contextmanager

import pytest
import torch
from conftest import make_folder

from checkpoint import DEMO
from generate import Engine, NotFinite, Settings, main
from judge import JudgeHead
from quantize import load_model
from scripts.lib.result import Result

PROMPT = [5, 17, 40, 8]
RUNS = [
    ("plain", 0.0),
    ("standard", 0.0),
    ("standard", 1.0),
    ("judge", 0.0),
    ("kl", 0.0),
    ("ensemble", 1.0),
    ("plain", 0.7),
]


def engine_of(pair, verify: str, temperature: float = 0.0, **more) -> Engine:
    target, draft = pair
    head = JudgeHead(torch.zeros(64), torch.tensor(0.1), 0.5, "", {})
    return Engine(
        target, draft, head, Settings(verify, speculate_k=4, temperature=temperature, **more), [], 120
    )


@contextmanager
def spoiled(weight: torch.Tensor, place, value: float):
    """A weight of a shared model with another value for a while."""
    kept = weight[place].clone()
    with torch.no_grad():
        weight[place] = value
        try:
            yield
        finally:
            weight[place] = kept


@pytest.mark.parametrize(("verify", "temperature"), RUNS)
@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_weight_stops_every_way_of_decoding(pair, verify, temperature, role, value):
    """The sentence names the model; with the weight mended the same engine gives what it gave before."""
    if (role, verify) == ("draft", "plain"):
        return
    engine = engine_of(pair, verify, temperature)
    before = engine.generate(PROMPT, 30).tokens
    weight = pair[role == "draft"].layers[0].attention.wo.weight
    with (
        spoiled(weight, (3, 5), value),
        pytest.raises(NotFinite, match=f"The {role}'s logits are not finite"),
    ):
        engine.generate(PROMPT, 30)
    assert engine.generate(PROMPT, 30).tokens == before


def test_caches_that_were_made_in_inference_mode_are_cleared_too(tmp_path):
    make_folder(tmp_path)
    model = load_model(tmp_path)
    with torch.inference_mode():
        engine = Engine(model, None, None, Settings("plain"), [], 60)
    before = engine.generate(PROMPT, 10).tokens
    with spoiled(model.layers[0].attention.wo.weight, (3, 5), float("nan")), pytest.raises(NotFinite):
        engine.generate(PROMPT, 10)
    assert engine.generate(PROMPT, 10).tokens == before


def test_what_becomes_infinite_midway_stops_there(pair):
    """One token whose embedding is broken: the answer up to it is decoded, the number of tokens read is said."""
    target, _ = pair
    engine = engine_of(pair, "plain")
    tokens = engine.generate(PROMPT, 30).tokens
    at = next(
        i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i] and token not in PROMPT
    )
    result = Result(len(PROMPT))
    after = f"after {len(PROMPT) + at + 1} tokens"
    with (
        spoiled(target.tok_embeddings.weight, tokens[at], float("inf")),
        pytest.raises(NotFinite, match=after),
    ):
        list(engine.stream(PROMPT, 30, result))
    assert result.tokens == tokens[: at + 1]


def test_debug_numerics_says_where_it_begins(pair):
    target, _ = pair
    weights = {"the weight layers.1.feed_forward.w2.weight holds": (target.layers[1].feed_forward.w2.weight, float("nan")),
               "first the output of layers.1.feed_forward.w13 at position": (target.layers[1].feed_forward.w13.weight, 3e38)}  # fmt: skip
    for word, (weight, value) in weights.items():
        with spoiled(weight, 2, value), pytest.raises(NotFinite, match=word):
            engine_of(pair, "standard", debug_numerics=True).generate(PROMPT, 5)


@pytest.mark.parametrize(
    "verify", ["plain", pytest.param("standard", marks=pytest.mark.slow)]
)  # compiles for seconds
def test_compiled_steps_see_it_too(pair, verify):
    target, _ = pair
    engine = engine_of(pair, verify, compile=True)
    before = engine.generate(PROMPT, 20).tokens
    with spoiled(target.layers[2].feed_forward.w2.weight, (0, 0), float("nan")), pytest.raises(NotFinite):
        engine.generate(PROMPT, 20)
    assert engine.generate(PROMPT, 20).tokens == before


@pytest.fixture(scope="module")
def hot(tmp_path_factory):
    """A folder whose activations exceed fp16: gate and up of one layer are 3,000 times as large."""
    folder = tmp_path_factory.mktemp("hot")
    theirs = make_folder(folder, vocab_size=640)
    with torch.no_grad():
        for product in (theirs.model.layers[1].mlp.gate_proj, theirs.model.layers[1].mlp.up_proj):
            product.weight.mul_(3000)
    theirs.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((DEMO / "target" / "tokenizer.model").read_bytes())
    return folder


@pytest.mark.parametrize(
    "verify", [[], ["--draft_checkpoint_path", "{}"], ["--draft_checkpoint_path", "{}", "--temperature", "1"]]
)
def test_fp16_that_overflows_is_one_sentence_that_says_what_would_do(hot, capsys, verify):
    flags = ["--checkpoint_path", str(hot), "--device", "cpu", "--prompt", "Mia", "--max_new_tokens", "5",
             *(word.format(hot) for word in verify)]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--precision", "fp16", "--debug_numerics"])
    out, err = capsys.readouterr()
    assert (
        stop.value.code == 2
        and out == ""
        and "in float16" in err
        and "--precision bf16 and fp32 do not" in err
    )
    assert "layers.1.feed_forward" in err and sum("generate.py:" in line for line in err.splitlines()) == 1
    main([*flags, "--precision", "bf16", "--json"])
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5


def test_a_loaded_bad_weight_is_the_folders(pair, tmp_path, capsys):
    theirs = make_folder(tmp_path, vocab_size=640)
    with torch.no_grad():
        theirs.model.norm.weight[3] = float("nan")
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((DEMO / "target" / "tokenizer.model").read_bytes())
    assert load_model(tmp_path).norm.weight.isnan().sum() == 1
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "--checkpoint_path",
                str(tmp_path),
                "--device",
                "cpu",
                "--prompt",
                "Mia",
                "--max_new_tokens",
                "5",
            ]
        )
    assert stop.value.code == 2 and "weights may be damaged" in capsys.readouterr().err
