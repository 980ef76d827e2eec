"""Protects: our logits are those of transformers; every published form of folder loads; what is not built is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import DEVICES, ROOT, make_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint import args_of, checkpoint_files, read_config
from cli import InputError
from model import PRESETS, ModelArgs, Transformer, preset, random_model
from quantize import load_model
from rope import ROPES, Llama3Rope, rope_table
from scripts.convert_meta_checkpoint import NAMES, TOP, convert

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA32 = LLAMA31 | {"factor": 32.0}
SHAPES = {
    "gqa": {},
    "mha, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "explicit head_dim": {"head_dim": 32},
    "llama 2": {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama 3.1": {"rope_parameters": {"rope_theta": 500000.0, **LLAMA31}},
    "llama 3.2": {"rope_parameters": {"rope_theta": 500000.0, **LLAMA32}, "tie_word_embeddings": True},
}


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.cpu() - theirs).abs().max() / theirs.abs().max()).item()


def step_by_step(model: Transformer, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of all rows, read `sizes` rows at a time through the cache."""
    model.setup_caches(ids.shape[1])
    parts, start = [], 0
    for size in sizes:
        pos = torch.arange(start, start + size, device=ids.device)
        parts.append(model(ids[:, start : start + size], pos)[1])
        start += size
    assert start == ids.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(tmp_path, shape, device):
    theirs = make_folder(tmp_path, **SHAPES[shape])
    model = load_model(tmp_path, device)
    ids = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(3))
    expected = theirs(ids).logits
    ids = ids.to(device)
    assert error(model(ids)[1], expected) < 1e-4  # whole sequence, no cache
    assert error(step_by_step(model, ids, [50]), expected) < 1e-4  # prefill in one
    assert error(step_by_step(model, ids, [1] * 50), expected) < 1e-4  # one row at a time
    assert error(step_by_step(model, ids, [17, 1, 2, 13, 17]), expected) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_hidden_states_are_pre_norm(tmp_path, device):
    theirs = make_folder(tmp_path)
    caught = []
    theirs.model.norm.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    ids = torch.randint(0, 97, (1, 20))
    theirs(ids)
    model = load_model(tmp_path, device)
    hidden, logits = model(ids.to(device), n_logits=2)
    assert hidden.shape == (1, 20, 64) and logits.shape == (1, 2, 97)
    assert error(hidden, caught[0]) < 1e-4


@torch.inference_mode()
def test_llama31_scaling_beyond_position_8192(tmp_path):
    """A wrong scaling, or a table in bf16, shows only far out."""
    shape = {
        "max_position_embeddings": 16384,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
    }
    theirs = make_folder(tmp_path, **shape, **SHAPES["llama 3.1"])
    ids = torch.randint(0, 97, (1, 8400))
    expected = theirs(ids, logits_to_keep=100).logits
    model = load_model(tmp_path)
    model.setup_caches(8400)
    for start in range(0, 8400, 1200):
        logits = model(ids[:, start : start + 1200], torch.arange(start, start + 1200), start + 1200, 100)[1]
    assert error(logits, expected) < 1e-4
    # and the table itself, at the far end of the context
    inv_freq = theirs.model.rotary_emb.inv_freq
    table = rope_table(read_config(tmp_path), 131072, torch.device("cpu"))
    angles = torch.arange(131072).float()[131000:, None] * inv_freq
    assert torch.allclose(table[131000:, 0], angles.cos(), atol=1e-4)


@torch.inference_mode()
def test_window_hides_nothing_and_reads_nothing_past_it(pair):
    target, _ = pair
    target.setup_caches(512)
    ids = torch.randint(0, 97, (1, 30))
    wide = target(ids, torch.arange(30), 512)[1]
    for layer in target.layers:  # what lies past the window must not matter
        layer.attention.k_cache[:, :, 64:] = float("nan")
    assert torch.allclose(target(ids, torch.arange(30), 64)[1], wide, atol=1e-5)
    target.clear_caches()  # the next user shares them


def test_rope_is_read_in_both_spellings():
    base = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
            "intermediate_size": 64, "vocab_size": 10}  # fmt: skip
    old = args_of(base | {"rope_theta": 500000.0, "rope_scaling": LLAMA31})
    new = args_of(base | {"rope_parameters": {"rope_theta": 500000.0, **LLAMA31}})
    older = args_of(
        base
        | {
            "rope_theta": 500000.0,
            "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in LLAMA31.items()},
        }
    )
    assert (
        old == new == older
        and old.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
        and old.rope_theta == 500000.0
    )


@dataclass(frozen=True)
class ProportionalRope:
    partial_rotary_factor: float

    def scale(self, freqs: torch.Tensor, theta: float) -> torch.Tensor:
        return freqs * (torch.arange(len(freqs)) < int(self.partial_rotary_factor * len(freqs)))


@torch.inference_mode()
def test_a_rope_is_one_entry(tmp_path, monkeypatch):
    """What rope.ROPES might gain is read from config.json, and told apart by the fingerprint."""
    kind = {"rope_type": "proportional", "rope_theta": 500.0}
    theirs = make_folder(tmp_path / "a", rope_parameters=kind | {"partial_rotary_factor": 0.5})
    make_folder(tmp_path / "b", rope_parameters=kind | {"partial_rotary_factor": 0.25})
    monkeypatch.setitem(ROPES, "proportional", ProportionalRope)
    ids = torch.randint(0, 97, (1, 100))
    ours = load_model(tmp_path / "a")
    assert ours.args.rope_scaling == ProportionalRope(0.5) and error(ours(ids)[1], theirs(ids).logits) < 1e-4
    assert ours.fingerprint != load_model(tmp_path / "b").fingerprint


@pytest.mark.parametrize(
    "change, word",
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "'hqq'"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"vocab_size": None}, "no field 'vocab_size'"),
        ({"vocab_size": "97"}, "vocab_size='97'"),
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"rope_scaling": [8.0]}, r"rope_scaling=\[8.0\]"),
        ({"architectures": "GPT2LMHeadModel"}, "GPT2LMHeadModel"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, change, word):
    make_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    config |= change
    config = {k: v for k, v in config.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=word) as caught:
        load_model(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@torch.inference_mode()
def test_single_and_sharded_files_of_any_type(tmp_path, shard, dtype):
    theirs = make_folder(tmp_path, shard=shard, dtype=dtype)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    model = load_model(tmp_path)
    assert model.dtype == dtype  # what is on disk, unless another is asked for
    model = load_model(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 97, (1, 20))
    assert error(model(ids)[1], theirs(ids).logits) < 1e-4


def test_broken_folders_are_named(tmp_path):
    make_folder(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    good = load_file(file)

    def refused(tensors: dict, *words: str):
        save_file(tensors, file)
        with pytest.raises(InputError) as caught:
            load_model(tmp_path / "m")
        assert all(word in str(caught.value) for word in words), caught.value

    name = "model.layers.1.mlp.up_proj.weight"
    refused({k: v for k, v in good.items() if k != name}, name, "no tensor")
    refused(
        good | {"model.layers.9.mlp.up_proj.weight": good[name].clone()},
        "model.layers.9",
        str(file),
        "unexpected",
    )
    refused(good | {name: good[name].t().contiguous()}, name, "(64, 112)", "(112, 64)", str(file))
    refused(good | {name: good[name].int()}, name, "int32")
    save_file(good, file)
    content = file.read_bytes()
    for keep in (len(content) - 1000, 100, 4):
        file.write_bytes(content[:keep])
        with pytest.raises(InputError, match="truncated") as caught:
            load_model(tmp_path / "m")
        assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match="neither"):
        load_model(tmp_path / "m")
    with pytest.raises(InputError, match="no checkpoint folder|no file"):
        load_model(tmp_path / "nowhere")


def test_a_missing_shard_is_named(tmp_path):
    make_folder(tmp_path, shard="40KB")
    shard = sorted(set(checkpoint_files(tmp_path).values()))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load_model(tmp_path)


PUBLISHED_SIZES = {  # parameters as published on the model cards' files
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496, "Llama-3.1-405B": 405_853_388_800,
}  # fmt: skip


def test_presets_have_the_published_sizes():
    assert {name: preset(name).n_params for name in PRESETS} == PUBLISHED_SIZES
    with pytest.raises(InputError, match="Llama-3.1-8B"):
        preset("Llama-4")


def test_random_model_counts_its_weights():
    args = ModelArgs(64, 2, 4, 2, 112, 97, 16, tie_embeddings=True)
    model = random_model(args, "cpu", torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == args.n_params
    assert model.output.weight is model.tok_embeddings.weight and model.dtype == torch.bfloat16
    model.setup_caches(10)
    caches = [cache for layer in model.layers for cache in (layer.attention.k_cache, layer.attention.v_cache)]
    assert sum(cache.nbytes for cache in caches) == args.cache_bytes(10, torch.bfloat16)


def write_meta(folder, tensors: dict, config, shards: int):
    """Splits a Hugging Face state dict into Meta's shards: interleaved RoPE rows, matrices cut over the shards."""
    folder.mkdir()
    head_dim, parts = config.head_dim, [{} for _ in range(shards)]
    ours = {
        f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight"
        for i in range(config.num_hidden_layers)
        for a, b in NAMES.items()
    }
    ours |= {f"{a}.weight": f"{b}.weight" for a, b in TOP.items()}
    for meta, hf in ours.items():
        tensor = tensors[hf]
        if ".wq." in meta or ".wk." in meta:
            heads = tensor.shape[0] // head_dim
            tensor = tensor.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        dim = None if "norm" in meta else 1 if ".wo." in meta or ".w2." in meta else 0
        for rank in range(shards):
            if dim is None:
                parts[rank][meta] = tensor.clone()
            elif (".wk." in meta or ".wv." in meta) and shards > config.num_key_value_heads:
                repeats = shards // config.num_key_value_heads
                parts[rank][meta] = tensor.chunk(config.num_key_value_heads, 0)[rank // repeats].clone()
            else:
                parts[rank][meta] = tensor.chunk(shards, dim)[rank].clone()
    for rank, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "rope_theta": 500000.0,
              "vocab_size": config.vocab_size, "use_scaled_rope": True}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("shards", [1, 2, 4])
@torch.inference_mode()
def test_metas_own_files_convert(tmp_path, shards):
    theirs = make_folder(tmp_path / "hf", vocab_size=96, **SHAPES["llama 3.1"])
    write_meta(tmp_path / "meta", theirs.state_dict(), theirs.config, shards)
    convert(tmp_path / "meta", tmp_path / "out")
    ids = torch.randint(0, 96, (1, 30))
    assert error(load_model(tmp_path / "out")(ids)[1], theirs(ids).logits) < 1e-5
    assert not (tmp_path / "out.tmp").exists()


def test_a_broken_meta_folder_leaves_nothing(tmp_path):
    theirs = make_folder(tmp_path / "hf", vocab_size=96)
    write_meta(tmp_path / "meta", theirs.state_dict(), theirs.config, 2)
    part = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)
    torch.save(
        {k: v for k, v in part.items() if "layers.2.attention.wo" not in k},
        tmp_path / "meta" / "consolidated.01.pth",
    )
    with pytest.raises(InputError, match=r"consolidated.01.pth has no tensor layers.2.attention.wo"):
        convert(tmp_path / "meta", tmp_path / "out")
    (tmp_path / "meta" / "consolidated.00.pth").write_bytes(
        b"cos\nsystem\n(S'true'\ntR."
    )  # code, not tensors
    with pytest.raises(InputError, match="consolidated.00.pth cannot be read"):
        convert(tmp_path / "meta", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def broken(change):
    """A case whose params.json is changed; ... removes a field."""

    def spoil(folder):
        params = json.loads((folder / "params.json").read_text()) | change
        (folder / "params.json").write_text(
            json.dumps({key: value for key, value in params.items() if value is not ...})
        )

    return spoil


def shard(number: int, change):
    """A case one of whose shards is changed."""

    def spoil(folder):
        path = folder / f"consolidated.{number:02}.pth"
        torch.save(change(torch.load(path, weights_only=True)), path)

    return spoil


META_BROKEN = {
    "no layers": (broken({"n_layers": 0}), "n_layers=0"),
    "a million layers": (broken({"n_layers": 10**6}), "n_layers=1000000 must be"),
    "fewer layers than tensors": (broken({"n_layers": 2}), "unexpected tensor layers.2"),
    "more layers than tensors": (broken({"n_layers": 4}), "has no tensor layers.3"),
    "dim of a thousand digits": (lambda f: (f / "params.json").write_text('{"dim": 1' + "0" * 1000 + "}"), "params.json is not valid JSON"),
    "dim a text": (broken({"dim": "64"}), "dim='64'"),
    "dim that heads do not divide": (broken({"n_heads": 7}), "dim=64 must be a multiple of n_heads=7"),
    "KV heads a text": (broken({"n_kv_heads": "2"}), "n_kv_heads='2'"),
    "KV heads wrong": (broken({"n_kv_heads": 1}), "parts of layers.0.attention.wk.weight have shapes"),
    "vocabulary a text": (broken({"vocab_size": "96"}), "vocab_size='96'"),
    "vocabulary wrong": (broken({"vocab_size": 100}), "parts of .* have shapes"),
    "scaled rope a text": (broken({"use_scaled_rope": "yes"}), "use_scaled_rope true or false"),
    "params a list": (lambda f: (f / "params.json").write_text("[]"), "params.json is a JSON list"),
    "params missing": (lambda f: (f / "params.json").unlink(), "no file .*params.json"),
    "a shard missing": (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"), "consolidated.01.pth should be"),
    "a shard a list": (shard(1, lambda part: [1]), "consolidated.01.pth holds no tensors by name"),
    "a shard of whole numbers": (shard(0, lambda part: part | {"norm.weight": torch.ones(64).int()}), "norm.weight is torch.int32"),
    "shards of two types": (shard(1, lambda part: {name: x.bfloat16() for name, x in part.items()}), "which do not make"),
    "a scalar": (shard(0, lambda part: part | {"output.weight": torch.tensor(1.0)}), "no matrix output.weight"),
    "a vector for a matrix": (shard(1, lambda part: part | {"layers.1.attention.wo.weight": torch.ones(7)}), "layers.1.attention.wo.weight have shapes"),
    "a shard that is a folder": (lambda f: ((f / "consolidated.01.pth").unlink(), (f / "consolidated.01.pth").mkdir()), "is a folder"),
    "a shard that is a pipe": (lambda f: ((f / "consolidated.01.pth").unlink(), os.mkfifo(f / "consolidated.01.pth")), "is a pipe"),
    "an empty shard": (lambda f: (f / "consolidated.01.pth").write_bytes(b""), "cannot be read as a checkpoint"),
}  # fmt: skip


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    root = tmp_path_factory.mktemp("meta")
    theirs = make_folder(root / "hf", vocab_size=96)
    write_meta(root / "meta", theirs.state_dict(), theirs.config, 2)
    return root / "meta"


@pytest.mark.parametrize("case", META_BROKEN)
def test_broken_meta_folders_are_named(meta, tmp_path, case):
    spoil, sentence = META_BROKEN[case]
    source = shutil.copytree(meta, tmp_path / "meta")
    spoil(source)
    with pytest.raises(InputError, match=sentence):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_where_a_converted_folder_goes(meta, tmp_path, monkeypatch):
    """Nothing of a user's is overwritten or removed, permissions follow the umask, a full disk leaves nothing behind."""
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name, sentence in (
        ("dangling", "a link to nowhere"),
        ("file", "is a file"),
        ("pipe", "is a pipe"),
        ("n" * 300, "File name too long"),
    ):
        with pytest.raises(InputError, match=sentence):
            convert(meta, tmp_path / name)
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds thesis.txt, which is not ours"):
        convert(meta, tmp_path / "a")
    assert (tmp_path / "a.tmp" / "thesis.txt").read_text() == "mine"
    (tmp_path / "b.tmp").mkdir()  # what a killed run left
    (tmp_path / "b.tmp" / "model-00009-of-00009.safetensors.tmp").write_text("half")
    before = os.umask(0o022)
    convert(meta, tmp_path / "b")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "b").iterdir()} == {0o644}
    assert len(list((tmp_path / "b").iterdir())) == 6

    def full(*rest, **more):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("quantize.save_file", full)
    with pytest.raises(InputError, match="cannot be written: .*No space left"):
        convert(meta, tmp_path / "c")
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.tmp").exists()


MEASURE_LOADING = """
import sys, threading, time
import torch
from quantize import load_model

def anonymous() -> int:  # kB of memory that is not the page cache
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

load_model(sys.argv[3])  # imports what the first use imports
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done = True
thread.join()
print(peak - before, sum(w.nbytes for w in model.parameters()) // 1024, max(w.nbytes for w in model.parameters()) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_model_and_one_tensor(tmp_path, dtype):
    """Also when fused matrices are put together and the type changes on the way."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 4096}
    make_folder(tmp_path / "tiny")
    make_folder(tmp_path / "model", dtype=torch.bfloat16, **shape)
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path / "model"), dtype, str(tmp_path / "tiny")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    peak, model, largest = map(int, out.split())
    assert model * 0.9 < peak < model + largest + 8 * 1024  # seen: 0.5 MB above the model
