"""Protects: a folder that contradicts itself is read as transformers reads it, or refused by name; damage has its true name."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import astuple

import pytest
import torch
from conftest import ROOT, make_folder
from safetensors.torch import load_file, save_file

from checkpoint import (
    args_of,
    checkpoint_files,
    fingerprint_of,
    open_safetensors,
    read_config,
    safetensors_header,
)
from cli import InputError
from quantize import Scheme, convert, load_model
from scripts import convert_bin

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
OLD = {"type" if key == "rope_type" else key: value for key, value in LLAMA31.items()}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three random models, which are copied and then spoilt: single file, shards of another seed, tied."""
    root = tmp_path_factory.mktemp("folders")
    make_folder(root / "one", seed=1)
    make_folder(root / "shards", seed=2, shard="40KB")
    make_folder(root / "tied", seed=3, tie_word_embeddings=True)
    make_folder(root / "biased", seed=4, attention_bias=True, mlp_bias=True)
    return root


def config(folder, **changes):
    """Changes config.json; ... removes a field."""
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not ...})
    )


def tensors(folder, change):
    """Rewrites model.safetensors."""
    path = folder / "model.safetensors"
    save_file(
        {name: x.clone() for name, x in change(load_file(path)).items()}, path, metadata={"format": "pt"}
    )


def weight_map(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def beside(folder):
    shutil.copy(folder.parent / "one" / "model.safetensors", folder)


def in_two_files(folder):
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(last) | {EMBED: torch.ones(97, 64)}, last, metadata={"format": "pt"})


def rope(**changes):
    return lambda folder: config(folder, **changes)


def without(*words):
    return lambda held: {name: x for name, x in held.items() if not any(word in name for word in words)}


SAME = {  # case: the folder it is made from, what is done to it; then read as transformers reads it
    "single file beside an older index": ("shards", beside),
    "a folder of the single file's name beside an index": ("shards", lambda f: (f / "model.safetensors").mkdir()),
    "a dangling link of that name": ("shards", lambda f: (f / "model.safetensors").symlink_to("nowhere")),
    "the index lacks a tensor": ("shards", lambda f: weight_map(f, lambda m: m.pop("model.norm.weight"))),
    "the index names another file for a tensor": ("shards", lambda f: weight_map(f, lambda m: m.update({EMBED: m[HEAD], HEAD: m[EMBED]}))),
    "the index names a tensor that no file has": ("shards", lambda f: weight_map(f, lambda m: m.update(extra=m[HEAD]))),
    "names without model.": ("one", lambda f: tensors(f, lambda t: {n.removeprefix("model."): x for n, x in t.items()})),
    "some names without model.": ("one", lambda f: tensors(f, lambda t: {n.replace("model.layers.1", "layers.1"): x for n, x in t.items()})),
    "names with model. twice": ("one", lambda f: tensors(f, lambda t: {"model." + n: x for n, x in t.items()})),
    "tied, names without model.": ("tied", lambda f: tensors(f, lambda t: {n.removeprefix("model."): x for n, x in t.items()})),
    "tied, with only lm_head": ("tied", lambda f: tensors(f, lambda t: {HEAD if n == EMBED else n: x for n, x in t.items()})),
    "tied, with both alike": ("tied", lambda f: tensors(f, lambda t: t | {HEAD: t[EMBED]})),
    "tied, with both alike of two types": ("tied", lambda f: tensors(f, lambda t: {n: x.bfloat16() for n, x in t.items()} | {HEAD: t[EMBED].bfloat16().float()})),
    "no tie flag, both there": ("one", lambda f: config(f, tie_word_embeddings=...)),
    "head_dim null": ("one", lambda f: config(f, head_dim=None)),
    "KV heads null": ("one", lambda f: (config(f, num_key_value_heads=None), tensors(f, lambda t: {n: torch.cat([x, x.flip(0)]) if "k_proj" in n or "v_proj" in n else x for n, x in t.items()}))),
    "theta at the top and inside": ("one", rope(rope_theta=5000.0, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "theta at the top alone": ("one", rope(rope_theta=500.0, rope_parameters=...)),
    "theta at the top, parameters without": ("one", rope(rope_theta=500.0, rope_parameters={"rope_type": "default"})),
    "both spellings": ("one", rope(rope_scaling=LLAMA31, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "both spellings and theta": ("one", rope(rope_theta=500.0, rope_scaling=OLD, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "theta in rope_scaling": ("one", rope(rope_theta=5000.0, rope_scaling=LLAMA31 | {"rope_theta": 77.0}, rope_parameters=...)),
    "theta null at the top, given inside": ("one", rope(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "rope_scaling empty": ("one", rope(rope_scaling={}, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "type against rope_type": ("one", rope(rope_theta=500.0, rope_scaling=LLAMA31 | {"type": "linear"}, rope_parameters=...)),
    "no original context": ("one", rope(rope_theta=500.0, rope_scaling={k: v for k, v in OLD.items() if k[:4] != "orig"}, rope_parameters=...)),
    "original context at the top": ("one", rope(rope_theta=500.0, rope_scaling=OLD, original_max_position_embeddings=32, rope_parameters=...)),
    "biases": ("biased", lambda f: None),
    "biases of the attention": ("biased", lambda f: (config(f, mlp_bias=False), tensors(f, lambda t: {n: x for n, x in t.items() if "mlp" not in n or "bias" not in n}))),
    "biases of the MLP": ("biased", lambda f: (config(f, attention_bias=False), tensors(f, lambda t: {n: x for n, x in t.items() if "attn" not in n or "bias" not in n}))),
    "linear RoPE": ("one", rope(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})),
    "linear RoPE, older": ("one", rope(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.5}, rope_parameters=...)),
    "yarn": ("one", rope(rope_parameters=YARN)),
    "yarn, older": ("one", rope(rope_theta=500.0, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, rope_parameters=...)),
    "yarn, no original context": ("one", rope(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0})),
    "yarn, all of it": ("one", rope(rope_parameters=YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False})),
    "yarn, its amplitude": ("one", rope(rope_parameters=YARN | {"attention_factor": 1.7, "beta_fast": None, "mscale": None})),
    "fp64, finer than fp32": ("one", lambda f: tensors(f, lambda t: {n: x.double() * (1 + 2**-30) for n, x in t.items()})),
    "yarn, one mscale counts for nothing": ("one", rope(rope_parameters=YARN | {"mscale": 2.0, "mscale_all_dim": None})),
    "yarn, betas alike": ("one", rope(rope_parameters=YARN | {"truncate": False, "beta_fast": 2.0, "beta_slow": 2.0})),
    "config says bf16, tensors are fp32": ("one", lambda f: config(f, dtype="bfloat16", torch_dtype="float16")),
    "tensors of two types": ("one", lambda f: tensors(f, lambda t: {n: x.bfloat16() if n == EMBED else x for n, x in t.items()})),
    "inverse frequencies, as older folders hold": ("one", lambda f: tensors(f, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
@torch.inference_mode()
def test_read_as_transformers_reads_it(made, tmp_path, case):
    from transformers import LlamaForCausalLM

    base, spoil = SAME[case]
    folder = shutil.copytree(made / base, made / "case", dirs_exist_ok=False)
    try:
        spoil(folder)
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        model = load_model(folder, dtype=torch.float32)
        assert (model(IDS)[1] - theirs).abs().max() < 1e-4 * theirs.abs().max()
        assert model.fingerprint == fingerprint_of(folder, read_config(folder))
        assert sum(weight.numel() for weight in model.parameters()) == model.args.n_params
    finally:
        shutil.rmtree(folder)


def test_fp64_runs_in_fp32_where_no_type_is_asked_for(made, tmp_path):
    """And says the same as the fp32 that it was made from, quantised from either as well."""
    folder = shutil.copytree(made / "one", tmp_path / "wide")
    tensors(folder, lambda t: {n: x.double() for n, x in t.items()})
    for scheme in (None, Scheme("int8")):
        ours, theirs = load_model(folder, scheme=scheme), load_model(made / "one", scheme=scheme)
        assert ours.dtype == torch.float32 and ours.fingerprint == theirs.fingerprint
        with torch.inference_mode():
            assert torch.equal(ours(IDS)[1], theirs(IDS)[1])
    convert(folder, tmp_path / "int8", Scheme("int8"))
    ours = load_model(tmp_path / "int8")
    with torch.inference_mode():
        assert ours.dtype == torch.float32 and torch.equal(ours(IDS)[1], theirs(IDS)[1])


def link_loop(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def pickle(folder, shards=None, change=lambda tensors: tensors):
    """The weights as torch.save writes them, tied ones sharing their memory; shards: into so many files."""
    path = folder / "model.safetensors"
    held = load_file(path)
    if EMBED in held and HEAD not in held:
        held[HEAD] = held[EMBED]
    held, files = change(held), {}
    for number, name in enumerate(held):
        files.setdefault(f"pytorch_model-{number % shards}.bin" if shards else "pytorch_model.bin", {})[
            name
        ] = held[name]
    for file, content in files.items():
        torch.save(content, folder / file)
    if shards:
        index = {"weight_map": {name: file for file, content in files.items() for name in content}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    path.unlink()


REFUSED = {  # case: the folder it is made from, what is done to it, what the sentence says
    "tied, with both unlike": ("tied", lambda f: tensors(f, lambda t: t | {HEAD: t[EMBED] * 2}), "tie_word_embeddings, but lm_head.weight differs"),
    "tied, the head of another shape": ("tied", lambda f: tensors(f, lambda t: t | {HEAD: torch.ones(3, 3)}), "lm_head.weight differs"),
    "untied, without a head": ("one", lambda f: tensors(f, without(HEAD)), "no tensor lm_head.weight.*tie_word_embeddings must be true"),
    "no tie flag, without a head": ("tied", lambda f: config(f, tie_word_embeddings=...), "no tensor lm_head.weight"),
    "untied, without an embedding": ("one", lambda f: tensors(f, without("embed")), "no tensor model.embed_tokens.weight"),
    "a tensor under two names": ("one", lambda f: tensors(f, lambda t: t | {"norm.weight": torch.ones(64)}), "holds model.norm.weight twice"),
    "a tensor in two files": ("shards", in_two_files, "both hold model.embed_tokens.weight"),
    "biases that config.json does not call for": ("biased", lambda f: config(f, mlp_bias=False), "unexpected tensor .*mlp.*bias"),
    "biases that are missing": ("one", lambda f: config(f, attention_bias=True), "no tensor model.layers.0.self_attn.q_proj.bias"),
    "a bias of another shape": ("biased", lambda f: tensors(f, lambda t: t | {"model.layers.1.self_attn.k_proj.bias": torch.ones(3)}), r"k_proj.bias has shape \(3,\)"),
    "yarn without a factor": ("one", rope(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0}), "no field 'factor'"),
    "yarn with a base of 1": ("one", rope(rope_parameters=YARN | {"rope_theta": 1.0}), "must be above 1"),
    "dynamic RoPE": ("one", rope(rope_parameters=YARN | {"rope_type": "dynamic"}), "RoPE type 'dynamic' is not implemented; 'default', 'llama3', 'linear', 'yarn' are"),
    "a bias": ("one", lambda f: tensors(f, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "unexpected tensor .*q_proj.bias"),
    "head_dim against the tensors": ("one", lambda f: config(f, head_dim=32), r"q_proj.weight has shape \(64, 64\), but config.json calls for \(128, 64\)"),
    "heads that do not divide": ("one", lambda f: config(f, num_attention_heads=6, head_dim=16), "hidden_size=64 must be a multiple"),
    "model_type against architectures": ("one", lambda f: config(f, model_type="mistral"), "model_type='mistral'"),
    "weights in a file of another name": ("one", lambda f: config(f, transformers_weights="other.safetensors"), "transformers_weights='other"),
    "tie flag null": ("one", lambda f: config(f, tie_word_embeddings=None), "tie_word_embeddings=None must be true or false"),
    "theta null": ("one", lambda f: config(f, rope_theta=None, rope_parameters=...), "rope_theta=None"),
    "rope by kinds of layers": ("one", lambda f: config(f, rope_parameters={"full_attention": {"rope_theta": 5.0}}), "rope_parameters=.*plain values"),
    "high factor below low": ("one", lambda f: config(f, rope_scaling=LLAMA31 | {"high_freq_factor": 1.0}), "must be above low_freq_factor"),
    "more layers than tensors": ("one", lambda f: config(f, num_hidden_layers=5), "tensors of 3 layers, but its config.json calls for 5"),
    "fewer layers than tensors": ("one", lambda f: config(f, num_hidden_layers=2), "unexpected tensor model.layers.2"),
    "a million layers": ("one", lambda f: config(f, num_hidden_layers=10**6), "num_hidden_layers=1000000 must be .* at most 10000"),
    "ten thousand layers": ("one", lambda f: config(f, num_hidden_layers=10**4), "tensors of 3 layers, but"),
    "an index that names a missing file": ("shards", lambda f: weight_map(f, lambda m: m.update({EMBED: "gone"})), "gone is missing.*embed_tokens"),
    "a shard that is a folder": ("shards", lambda f: weight_map(f, lambda m: m.update({EMBED: "."})), "is missing, which model.safetensors.index.json"),
    "a loop of links": ("one", link_loop, "Too many levels of symbolic links"),
    "a name of 300 characters": ("shards", lambda f: weight_map(f, lambda m: m.update({EMBED: "n" * 300})), "File name too long"),
    "an index that is a list": ("shards", lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json is a JSON list"),
    "an index of numbers": ("shards", lambda f: weight_map(f, lambda m: m.update({EMBED: 3})), "no 'weight_map' from tensor names"),
    "an adapter beside the weights": ("one", lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "has an adapter .* merge it"),
    "pickled weights": ("one", lambda f: pickle(f), r"weights are pickled, .*: python scripts/convert_bin.py --checkpoint_path \S+case --out NEW"),
    "a config that is a folder": ("one", lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json is a folder"),
    "a config that is a pipe": ("one", lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "config.json is a pipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(made, case):
    base, spoil, sentence = REFUSED[case]
    folder = shutil.copytree(made / base, made / "case")
    try:
        spoil(folder)
        begin = time.process_time()
        with pytest.raises(InputError, match=sentence):
            load_model(folder)
        assert time.process_time() - begin < 5  # seen: 0.2 s; a million layers once took 25 s in silence
    finally:
        shutil.rmtree(folder)


HOSTILE = [
    0,
    -1,
    1,
    10**18,
    1e308,
    0.5,
    True,
    False,
    None,
    "",
    "64",
    [],
    [1],
    {},
    {"a": {}},
    [[[]]],
    "\x00",
    -0.0,
    2**63,
]
FIELDS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
          "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
          "tie_word_embeddings", "architectures", "model_type", "hidden_act", "attention_bias", "mlp_bias",
          "partial_rotary_factor", "quantization_config", "transformers_weights", "dtype", "eos_token_id"]  # fmt: skip


def test_every_field_with_hostile_values(made):
    """437 configurations: read, or refused in one sentence; no other exception, and no value that is no size."""
    good = json.loads((made / "one" / "config.json").read_text())
    refused = 0
    for field in FIELDS:
        for value in HOSTILE:
            try:
                args = args_of(good | {field: value})
            except InputError as error:
                refused += 1
                assert len(str(error)) < 400, error
                continue
            sizes = (
                args.dim,
                args.n_layer,
                args.n_head,
                args.n_kv_head,
                args.intermediate_size,
                args.vocab_size,
                args.head_dim,
            )
            assert all(type(size) is int and 0 < size <= 2**24 for size in sizes), (field, value)
    assert refused > 250
    for field in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_type",
    ):
        for value in HOSTILE:
            try:
                theta, scaling = (
                    (args := args_of(good | {"rope_scaling": LLAMA31 | {field: value}})).rope_theta,
                    args.rope_scaling,
                )
            except InputError:
                continue
            assert 0 < theta <= 1e30 and scaling and all(0 < x <= 2**40 for x in astuple(scaling)), (
                field,
                value,
            )


def test_numbers_and_nesting_beyond_all_bounds(made, tmp_path):
    folder = shutil.copytree(made / "one", tmp_path / "m")
    text = (folder / "config.json").read_text()
    for value in (
        "1" + "0" * 5000,
        "1e999",
        "-1e999",
        "NaN",
        "[" * 100_000 + "]" * 100_000,
        '"\\ud800"',
        '{"a":' * 2000 + "1" + "}" * 2000,
    ):
        (folder / "config.json").write_text(text.replace('"hidden_size": 64', f'"hidden_size": {value}'))
        with pytest.raises(InputError, match="config.json"):
            load_model(folder)


# Damaged safetensors files


def safetensors(header, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "empty": (b"", "truncated: it has 0 bytes"),
    "four bytes": (b"abcd", "truncated: it has 4 bytes"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "pointer that Git LFS"),
    "a pickle": (b"PK\x03\x04" + b"x" * 100, "not a safetensors file: its header would have"),
    "header beyond the file": (safetensors({"a": entry()}, length=10_000), "truncated: it has .* its header ends beyond"),
    "header no JSON": (safetensors(b"{'a': 1}"), "the header of .* is not valid JSON"),
    "header no UTF-8": (safetensors(b'{"\xff": 1}'), "the header of .* is not valid JSON"),
    "header a list": (safetensors([1]), "the header of .* is a JSON list"),
    "header nested": (safetensors(b"[" * 5000 + b"]" * 5000), "the header of .* is (nested too deeply|a JSON list)"),
    "entry a number": (safetensors({"a": 1}), "entry of tensor a is not of the form"),
    "entry without a type": (safetensors({"a": {"shape": [4], "data_offsets": [0, 16]}}), "tensor a is not of the form"),
    "negative size": (safetensors({"a": entry(shape=(-4,))}), "tensor a is not of the form"),
    "a size that is true": (safetensors({"a": entry(shape=(True, 4))}), "tensor a is not of the form"),
    "offsets backwards": (safetensors({"a": entry(16, 0)}), "tensor a is not of the form"),
    "three offsets": (safetensors({"a": entry() | {"data_offsets": [0, 8, 16]}}), "tensor a is not of the form"),
    "offsets beyond": (safetensors({"a": entry(0, 32, (8,))}), "truncated: its tensors have 32 bytes, of which 16 are there"),
    "offsets that overlap": (safetensors({"a": entry(), "b": entry(8, 24)}), "tensor b begins at byte 8 of the data, but the one before it ends at 16"),
    "a gap": (safetensors({"a": entry(0, 8, (2,)), "b": entry(12, 16, (1,))}), "tensor b begins at byte 12"),
    "bytes left over": (safetensors({"a": entry(0, 8, (2,))}), "has 8 bytes after its last tensor"),
    "a shape of another size": (safetensors({"a": entry(shape=(5,))}), r"tensor a, F32 of shape \[5\], has 16 bytes, but takes 20"),
    "a shape beyond all memory": (safetensors({"a": entry(shape=(2**62, 2**62))}), "tensor a, F32 of shape .* has 16 bytes"),
    "an unknown type": (safetensors({"a": entry(dtype="Q7")}), "not a safetensors file that can be read"),
    "a name twice": (safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'), "tensor a begins at byte 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_have_their_true_name(made, tmp_path, case):
    content, sentence = DAMAGED[case]
    shutil.copy(made / "one" / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        open_safetensors(tmp_path / "model.safetensors")
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    with pytest.raises(InputError):
        load_model(tmp_path)


def test_every_byte_of_a_header_turned(made, tmp_path):
    """300 variants of a header with one byte changed: the same tensors, or one sentence."""
    good = (made / "one" / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    shutil.copy(made / "one" / "config.json", tmp_path)
    file = tmp_path / "model.safetensors"
    for i in range(300):
        at = i * end // 300
        content = bytearray(good)
        content[at] ^= 1 << i % 8
        file.write_bytes(content)
        try:
            load_model(tmp_path)
        except InputError as error:
            assert str(tmp_path) in str(error)


def test_a_header_is_read_anew_when_the_file_changes(made, tmp_path):
    shutil.copy(made / "one" / "model.safetensors", tmp_path / "x.safetensors")
    assert len(safetensors_header(tmp_path / "x.safetensors")[1]) == 30
    (tmp_path / "x.safetensors").write_bytes(safetensors({"a": entry()}))
    assert list(safetensors_header(tmp_path / "x.safetensors")[1]) == ["a"]


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for path, sentence in ((tmp_path / "nowhere", "There is no checkpoint folder"), (tmp_path / "file", "is no folder"),
                           (tmp_path / "loop", "Too many levels"), (tmp_path / ("n" * 300), "File name too long"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            checkpoint_files(path)
        with pytest.raises(InputError):
            read_config(path)


@pytest.mark.parametrize("base, shards", [("one", None), ("one", 3), ("tied", None)])
def test_pickled_weights_convert_to_the_same_values(made, tmp_path, base, shards):
    folder = shutil.copytree(made / base, tmp_path / "old")
    (folder / "tokenizer.model").write_bytes(b"as it is")
    held = load_file(folder / "model.safetensors")
    pickle(folder, shards)
    convert_bin.convert(folder, tmp_path / "new")
    tensors = {name: file for name, file in checkpoint_files(tmp_path / "new").items()}
    for name, tensor in held.items():
        assert torch.equal(load_file(tensors[name])[name], tensor), name
    assert (
        set(tensors) - set(held) <= {HEAD} and len(set(tensors.values())) == 4
    )  # three layers, and the rest
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()
    assert fingerprint_of(tmp_path / "new", read_config(folder)) == fingerprint_of(
        made / base, read_config(folder)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle_has_run",)


BROKEN_BIN = {
    "code": (dict(change=lambda t: t | {"x": Evil()}), "cannot be read as a checkpoint of plain tensors"),
    "no tensor": (dict(change=lambda t: t | {"x": 3}), "x is no tensor"),
    "ids": (
        dict(change=lambda t: t | {HEAD: torch.ones(3, dtype=torch.int64)}),
        "is torch.int64, but weights are floating",
    ),
    "one too few": (dict(change=without(HEAD)), f"has no tensor {HEAD}"),
    "one too many": (dict(change=lambda t: t | {"x": torch.ones(2)}), "unexpected tensor x"),
}


@pytest.mark.parametrize("case", BROKEN_BIN)
def test_pickled_weights_that_are_broken_leave_nothing(made, tmp_path, monkeypatch, case):
    how, sentence = BROKEN_BIN[case]
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(made / "one", tmp_path / "old")
    pickle(folder, **how)
    with pytest.raises(InputError, match=sentence):
        convert_bin.convert(folder, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_may_not_be_read_is_not_called_truncated(made, tmp_path):
    """In a process of an ordinary user, for whom permissions count."""
    folder = shutil.copytree(made / "shards", tmp_path / "m")
    shard = sorted(folder.glob("*.safetensors"))[1]
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    shard.chmod(0)
    program = ("import os, sys; sys.path.insert(0, sys.argv[1]); import cli, quantize, encodings.utf_8_sig\n"
               "if os.geteuid() == 0: os.setuid(65534)\n"
               "try: quantize.load_model('.')\nexcept cli.InputError as error: print(error)")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], cwd=folder, capture_output=True, text=True
    )
    assert done.stdout == f"{shard.name} cannot be read: Permission denied.\n", done.stdout + done.stderr
