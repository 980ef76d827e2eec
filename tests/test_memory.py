"""Protects: what a pair takes is counted before it is loaded, term by term, and so that it is enough; fp8 where a GPU lacks it."""

import importlib

import pytest
import torch
from conftest import Peak

from cli import InputError, Parser
from model import ModelArgs, preset, random_model
from quantize import Scheme, completer, prepare
from scripts import benchmark
from scripts.lib import memory, pair
from scripts.lib.benchmark_args import parse_args, shape_of
from scripts.lib.memory import in_words, memory_terms

TARGET = ModelArgs(64, 2, 4, 2, 112, 96, 16)
DRAFT = ModelArgs(32, 1, 2, 1, 48, 96, 16)


def test_terms_of_a_tiny_pair_by_hand():
    """bf16, the target in int8, 128 positions, M = 4. A layer's columns of 112 are packed as 128."""
    terms = memory_terms(
        [TARGET, DRAFT], [Scheme("int8"), None], torch.bfloat16, "cuda", capacity=128, speculate_k=4
    )
    rows = 64 + 2 * 32 + 64 + 2 * 112 + 64  # of a target's layer: q, k and v, wo, w1 and w3, w2
    packed = 64 * (64 + 2 * 32) + 64 * 64 + 2 * 112 * 64 + 64 * 128 + 4 * rows
    target = 2 * (packed + 2 * 2 * 64) + 2 * (2 * 96 * 64 + 64)
    draft = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 48 * 32 + 2 * 32 + 2 * 96 * 32 + 32)
    assert terms["weights"] == target + draft
    assert terms["caches"] == 128 * 2 * (2 * 2 * 2 * 16 + 2 * 1 * 16)
    assert terms["buffers"] == 128 * 8 + 128 * 4 * (16 + 16) + 4 * 4 * 96  # tokens, cos and sin, draft logits
    rope, feed_forward = 2 * 64 * 2 + (64 + 2 * 32) * 2 + 12 * 64, 2 * 64 * 2 + 4 * 112 * 2
    assert rope == 1280 > feed_forward
    unpacked = 224 * (64 * 10 + 128 * 2)  # gate and up are the largest: all of their 224 rows fit a slice
    assert terms["prompts"] == 128 * 1280 + unpacked
    parts = 4 * 148 * 4 * 5 * (16 + 2)  # 296 programs for 2 KV heads, of 4 heads by 5 rows
    assert terms["verification"] == 5 * 1280 + parts + 5 * 96 * (2 + 4)
    assert terms["graphs"] == 10e3 * 10 * (2 + 4 * 1)
    assert (terms["libraries"], terms["context"], terms["collectives"]) == (0.5e9, 0.5e9, 0)
    assert terms["loading"] == 0  # less than what a prompt takes later
    ranks = memory_terms([TARGET], [None], torch.bfloat16, "cuda", capacity=128, speculate_k=4, world=2)
    assert ranks["collectives"] == 0.5e9 and ranks["buffers"] == 128 * (8 + 4 * 16) + 4 * 4 * 192


def test_loading_counts_where_it_is_the_most():
    """On a CPU nothing is assumed: quantising gate and up takes more than reading a prompt of a few rows does later."""
    terms = memory_terms([TARGET], [Scheme("int8")], torch.float32, "cpu", capacity=64, speculate_k=0)
    packing = 224 * 64 * (4 + 8) + 48 * 2**18
    assert sum(terms.values()) == terms["weights"] + packing
    assert (terms["graphs"], terms["libraries"], terms["context"]) == (0, 0, 0)
    both = memory_terms(
        [TARGET, DRAFT], [Scheme("int8"), None], torch.float32, "cpu", capacity=64, speculate_k=0
    )
    assert sum(both.values()) == terms["weights"] + packing  # the draft is not there yet


@pytest.mark.parametrize("scheme", [None, Scheme("int8"), Scheme("int4")], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 256])
@torch.inference_mode()
def test_a_forward_takes_what_is_counted(rows, scheme):
    """What operations hold at once, by counting it, is within the bound and above a third of it."""
    shape = ModelArgs(128, 2, 4, 2, 512, 96, 32)
    if scheme:
        prepare(torch.device("cpu"), scheme)
    model = random_model(shape, "cpu", torch.bfloat16, complete=scheme and completer(shape, scheme))
    model.setup_caches(512)
    with Peak() as peak:
        model(torch.zeros(1, rows, dtype=torch.long), torch.arange(rows), 512, n_logits=0)
    bound = memory.activation_bytes(shape, rows, torch.bfloat16)
    assert bound == rows * 2 * (2 * 128 + 4 * 512)  # here between gate, up and down
    bound += memory.attention_bytes(shape, rows, 512, torch.bfloat16, "cpu")
    assert bound / 3 < peak.peak < bound + 20_000, (peak.peak, bound)  # positions and rotations of the rows


def refusal(monkeypatch, free: float, capacity: int = 2368) -> str:
    """What loading an int4 8B beside an int8 70B on a GPU with so much free memory is answered, "" where it may."""
    monkeypatch.setattr(pair, "free_memory", lambda device: free)
    shapes, schemes = [preset("Llama-3.1-70B"), preset("Llama-3.1-8B")], [Scheme("int8"), Scheme("int4")]
    try:
        pair.check_memory(shapes, capacity, torch.bfloat16, torch.device("cuda", 0), schemes, 20)
    except InputError as error:
        return str(error)
    return ""


def test_a_70b_beside_an_8b_needs_more_than_80_gb(monkeypatch):
    said = refusal(monkeypatch, 80e9)
    assert (
        said.startswith("Not enough memory on cuda:0: weights 79.1, caches 1.1, prompts 0.6, ")
        and said.count(".\n") == 0
    )
    assert "GB together, but 80.0 GB are free; use a smaller --precision" in said and "context" not in said
    assert refusal(monkeypatch, 141e9, capacity=131072) == ""
    assert refusal(monkeypatch, 141e9, capacity=10**6) != ""
    terms = memory_terms(
        [preset("Llama-3.1-8B")], [None], torch.bfloat16, "cuda", capacity=8192, speculate_k=16
    )
    assert in_words(terms).startswith("weights 16.1, caches 1.1, ") and in_words(terms).endswith(" GB")


LOADING = {  # commands that take --mode and load models -> what they need beside it
    "generate": ["--mode", "fp8"],
    "generate draft": ["--draft_mode", "fp8"],
    "scripts.evaluate": ["--mode", "fp8", "--limit", "1"],
    "scripts.score_text": ["--mode", "fp8", "--data", "texts.jsonl"],
    "scripts.experiments": ["judge_table", "--mode", "fp8", "--limit", "1"],
    "scripts.calibrate": ["--mode", "fp8", "--limit", "4", "--max_harm", "0.6", "--confidence", "0.6"],
    "scripts.perplexity": ["--mode", "fp8", "--limit", "1"],
    "scripts.benchmark": ["--mode", "fp8"],
    "scripts.benchmark preset": ["--preset", "64x1", "--mode", "fp8"],
    "scripts.benchmark modes": ["--modes", "int8", "fp8"],
}


@pytest.mark.parametrize("name", LOADING)
def test_fp8_where_a_gpu_lacks_it_is_one_sentence(name, monkeypatch, capsys, tmp_path):
    """Before anything is put on the GPU: here none is, so that any other answer would be another error."""
    module, gpu = importlib.import_module(name.split()[0]), torch.device("cuda", 0)
    monkeypatch.setattr(module, "pick_device", lambda device: gpu)
    monkeypatch.setattr(pair, "free_memory", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    if "benchmark" in name:
        monkeypatch.setattr(module, "bandwidth", lambda device: (1e10, 1e10))
    (tmp_path / "texts.jsonl").write_text('{"prompt": "Mia has 4 apples.", "response": "So 4."}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main([*LOADING[name], "--device", "cuda"])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([line for line in said if line]) == 1, said
    assert (
        "--mode fp8 needs a GPU of compute capability 8.9 or more; cuda:0 has 8.0: use int8 or int4"
        in said[-1]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_products_leave_out_what_a_gpu_lacks(monkeypatch, capsys):
    def check(device, scheme):
        if scheme.mode == "fp8":
            raise InputError("no fp8.")

    monkeypatch.setattr(benchmark, "check_device", check)
    args = parse_args(Parser(None), ["--preset", "128x1", "--products", "--device", "cpu"])
    args.device = torch.device("cpu")
    names = [part.name for part in benchmark.product_parts(args, shape_of("128x1"), torch.bfloat16)]
    assert any("int8" in name for name in names) and not any("fp8" in name for name in names)
    assert capsys.readouterr().err == "fp8 is left out: no fp8.\nfp8 dynamic is left out: no fp8.\n"
