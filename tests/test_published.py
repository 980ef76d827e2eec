"""Protects: folders that others have quantised mean what they say, bit for bit, whole and under ranks; what is refused."""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_folder
from published_folders import COMPRESSED, KINDS, write_kind
from safetensors.torch import load_file, save_file

import generate
import kernels
import quantize
from checkpoint import DEMO, read_config, weight_plan
from cli import InputError
from generate import Engine, Settings
from published import layout_of
from quantize import (
    FORMATS,
    Mixed,
    PublishedScheme,
    QuantLinear,
    load_model,
    open_checkpoint,
    pad_rows,
    weight_bytes,
)
from scripts import plan
from tp import Shard

kernels.use_cpu_kernels()
SHAPE = {"hidden_size": 128, "intermediate_size": 256}
KEPT = (
    "layers.0.self_attn.k_proj",
    "layers.1.mlp",
    "layers.2.self_attn",
)  # a part of wqkv, and whole matrices
GROUPED = ("gptq", "awq", "W4A16", "W4A16 asymmetric")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind: a quantised folder, its twin, and the dequantised weights that the reference gives."""
    root, made = tmp_path_factory.mktemp("published"), {}
    make_folder(root / "source", dtype=torch.bfloat16, **SHAPE)

    def folder(kind: str):
        if kind not in made:
            places = root / kind, root / f"{kind} twin"
            made[kind] = (*places, write_kind(kind, root / "source", *places, kept=KEPT))
        return made[kind]

    return folder


def dense(module) -> torch.Tensor:
    """The fp32 weight that a layer stands for; only where no kernel has laid it out."""
    if isinstance(module, Mixed):
        return torch.cat([dense(product) for product in module.products])
    if isinstance(module, QuantLinear):
        assert module.kernel is None
        return FORMATS[module.mode].unpack(module.weight, module.scales)[: module.n_out, : module.n_in]
    return module.weight.float()


def layers(model) -> dict:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, QuantLinear, Mixed)) and ".products." not in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_references(folders, kind, monkeypatch):
    """Bit for bit, in fp32; and rounded to bf16 as the type of the published scales would round it."""
    monkeypatch.setattr(quantize, "kernel_for", lambda *_: None)
    folder, twin, reference = folders(kind)
    model, plain = load_model(folder, "cpu"), load_model(twin, "cpu")
    found = layers(model)
    for name, row in weight_plan(model.args).items():
        if name in reference:
            ours = dense(found[row.ours.removesuffix(".weight")])[row.first : row.first + row.shape[0]]
            assert torch.equal(ours, reference[name].float()), name
    packed = sum(isinstance(module, QuantLinear) for module in model.modules())
    assert packed == 9 and isinstance(model.layers[0].attention.wqkv, Mixed)
    for name, module in layers(plain).items():
        assert torch.equal(dense(found[name]), dense(module)), name


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_twins(folders, kind):
    """By the kernels, over a prompt of more rows than they take; and by rounds of a draft."""
    folder, twin, _ = folders(kind)
    prompt = [1, *(7 * i % 90 + 3 for i in range(66))]
    model, plain = (load_model(each, "cpu", torch.float32) for each in (folder, twin))
    expected = Engine(plain, None, None, Settings("plain"), [], 150).generate(prompt, 24).tokens
    assert len(set(expected)) > 10
    assert Engine(model, None, None, Settings("plain"), [], 150).generate(prompt, 24).tokens == expected
    engine = Engine(model, plain, None, Settings("standard", speculate_k=5), [], 150)
    assert engine.generate(prompt, 24).tokens == expected


@pytest.mark.parametrize("kind", ["W4A16", "W8A16"])
def test_logits_are_transformers_own(folders, kind):
    """Of the quantised folder, as transformers and compressed-tensors load it themselves."""
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import LlamaForCausalLM

    ids = torch.tensor([[1, *range(5, 60)]])
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        folder = folders(kind)[0]
        if kind == "W4A16":  # a whole folder without exceptions, whose list of these would be long
            folder = folder.with_name("all of it")
            write_kind(kind, folder.with_name("source"), folder, folder.with_name("all of it, twin"))
        else:
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"]["ignore"] = ["lm_head", r"re:.*layers\.0\.self_attn\.k_proj",
                                                       r"re:.*layers\.1\.mlp.*", r"re:.*layers\.2\.self_attn.*"]  # fmt: skip
            folder = shutil.copytree(folder, folder.with_name("with its exceptions"))
            (folder / "config.json").write_text(json.dumps(config))
        expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        found = load_model(folder, "cpu", torch.float32)(ids)[1]
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_ranks_part_is_the_same_part_of_the_twin(folders, kind, world, monkeypatch):
    """Rows and columns, in words and groups that are cut, and KV heads that ranks share."""
    monkeypatch.setattr(quantize, "kernel_for", lambda *_: None)
    folder, twin, _ = folders(kind)
    whole = load_model(folder, "cpu")
    for rank in range(world):
        model, plain = (load_model(each, "cpu", None, None, Shard(rank, world)) for each in (folder, twin))
        assert model.fingerprint == whole.fingerprint != plain.fingerprint
        for name, module in layers(plain).items():
            assert torch.equal(dense(layers(model)[name]), dense(module)), (rank, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq"])
def test_two_processes_say_what_one_says(tmp_path, kind):
    """The demo target in that kind, over gloo."""
    write_kind(kind, DEMO / "target", tmp_path / "q", tmp_path / "twin", group=32)
    shutil.copytree(DEMO / "draft", tmp_path / "draft")
    command = ["--checkpoint_path", str(tmp_path / "q"), "--draft_checkpoint_path", str(tmp_path / "draft"), "--verify", "standard",
               "--prompt", "3 + 4 =", "--max_new_tokens", "24", "--json"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "generate.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with contextlib.redirect_stdout(io.StringIO()) as out:
        generate.main(command)
    assert json.loads(done.stdout)["tokens"] == json.loads(out.getvalue())["tokens"]


def test_groups_of_other_sizes(tmp_path, monkeypatch):
    """96 columns: packed by 32; 256 of 128, and a scale a row (-1): by 128, filled up."""
    monkeypatch.setattr(quantize, "kernel_for", lambda *_: None)
    for group, shape, unit in ((96, (192, 192), 32), (64, (64, 128), 64), (256, (256, 256), 128)):
        make_folder(
            tmp_path / f"{group}",
            dtype=torch.bfloat16,
            hidden_size=shape[0],
            intermediate_size=shape[1],
            num_hidden_layers=1,
        )
        for kind in ("gptq", "awq"):
            folder, twin = tmp_path / f"{group} {kind}", tmp_path / f"{group} {kind} twin"
            write_kind(kind, tmp_path / f"{group}", folder, twin, group=group)
            source = open_checkpoint(folder)
            assert source.scheme == PublishedScheme(
                "int4", unit, wide=True, kept=frozenset(["lm_head.weight"]), kind=kind
            )
            model, plain = load_model(folder), load_model(twin)
            for name, module in layers(plain).items():
                assert torch.equal(dense(layers(model)[name]), dense(module)), (kind, name)
    rows = tmp_path / "256 gptq"  # all of 256 columns is a scale a row
    config = json.loads((rows / "config.json").read_text())
    config["quantization_config"]["group_size"] = -1
    (rows / "config.json").write_text(json.dumps(config))
    for name, module in layers(load_model(tmp_path / "256 gptq twin")).items():
        assert torch.equal(dense(layers(load_model(rows))[name]), dense(module)), name


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_products_of_what_only_others_write(mode):
    """Scales and offsets in fp32 that bf16 does not hold, and -128: few rows and many, against float64."""
    n, k, made = 35, 192, torch.Generator().manual_seed(0)
    if mode == "int4":
        q = torch.randint(0, 16, (n, k), generator=made, dtype=torch.uint8)
        scales = torch.rand(n, k // 64, 1, generator=made) + 0.1
        packed = (
            quantize.pack_int4(q),
            torch.cat([scales, -scales * torch.randint(1, 16, scales.shape, generator=made)], -1),
        )
        scheme = PublishedScheme("int4", 64, wide=True)
    else:
        q = torch.randint(-128, 128, (n, k), generator=made, dtype=torch.int8)
        q[:, ::5], q[3] = -128, 0
        packed, scheme = (q, torch.rand(n, generator=made) + 0.1), PublishedScheme("int8")
    exact = FORMATS[mode].unpack(*packed).double()
    if mode == "int8":
        assert torch.equal(exact.float(), q.float() * packed[1][:, None])
    layer = QuantLinear(*packed, n, k, scheme)
    for rows in (1, 2, 3, 7, 21, 32, 33, 70):
        for dtype, noise in ((torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)):
            x = torch.randn(1, rows, k, generator=made).to(dtype)
            size = (x.double().abs() @ exact.abs().T).clamp(min=1e-30)
            assert ((layer(x).double() - x.double() @ exact.T).abs() / size).max() < noise, (rows, dtype)
            if rows < 4 and kernels.triton is not None and dtype == torch.float32:  # in the interpreter
                y = kernels.few_rows(x, *map(pad_rows, packed), n, int(mode[3:]))
                assert ((y.double() - x.double() @ exact.T).abs() / size).max() < noise, rows


COMPRESSED_BASE = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
}


def grouped(form="pack-quantized", inputs=None, **weights) -> dict:
    settings = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 128,
        "symmetric": True,
    } | weights
    return COMPRESSED_BASE | {
        "format": form,
        "config_groups": {"group_0": {"weights": settings, "input_activations": inputs}},
    }


@pytest.mark.parametrize("found, words", [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not implemented; read are"),
    ({"quant_method": "exl2"}, "'exl2'"), ({"quant_method": "hqq"}, "'hqq'"), ({"quant_method": "mxfp4"}, "'mxfp4'"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"), ({}, None), ("gptq", "'gptq'"), ([1], "[1]"),
    ({"quant_method": {"a": 1}}, "{'a': 1}"), ({"bits": 4}, "None"),
    ({"quant_method": "gptq", "bits": 8}, "bits=8"), ({"quant_method": "gptq", "bits": 3}, "bits=3"), ({"quant_method": "gptq"}, "bits=None"), ({"quant_method": "awq"}, "bits=None"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "group_size=16"),
    ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "group_size='128'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 2**80}, "group_size="),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*q_proj": {}}}, "dynamic="),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv'"),
    ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "version='marlin'"),
    ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point=False"),
    (grouped() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (grouped() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (grouped() | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    (grouped() | {"config_groups": {}}, "config_groups={}"), (grouped() | {"config_groups": {"a": {"weights": 3}}}, "weights=3"),
    (grouped(actorder="group"), "act-order"), (grouped(num_bits=2), "num_bits=2"),
    (grouped(num_bits=8), "strategy='group'"), (grouped("marlin-24"), "marlin-24"), (grouped(group_size=48), "group_size=48"),
    (grouped("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16), "nvfp4"),
    (grouped("float-quantized", type="float", num_bits=8, strategy="block"), "'block'"),
    (grouped("int-quantized", num_bits=8, strategy="channel", inputs={"num_bits": 8, "dynamic": False}), "static"),
])  # fmt: skip
def test_what_is_not_read_is_refused_by_name(found, words):
    if words is None:  # no entry at all
        return
    with pytest.raises(InputError) as error:
        layout_of(found, "config.json")
    assert (
        words in str(error.value)
        and str(error.value).startswith("config.json")
        and "\n" not in str(error.value)
    )


def edited(folder, out, change):
    """A copy of a folder, its tensors changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


Q = "model.layers.2.mlp.up_proj."


def test_broken_folders_are_named(folders, tmp_path):
    def reorder(tensors):
        tensors[Q + "g_idx"] = tensors[Q + "g_idx"].flip(0)

    cases = {
        "reorders the columns": ("gptq", reorder),
        "qzeros": ("gptq", lambda tensors: tensors.pop(Q + "qzeros")),
        "scales, which its quantised": ("gptq", lambda tensors: tensors.pop(Q + "scales")),
        "has shape": ("awq", lambda tensors: tensors.update({Q + "qweight": tensors[Q + "qweight"].t().contiguous()})),
        ".bias is not 0": ("gptq", lambda tensors: tensors[Q + "bias"].fill_(1)),
        "a NaN": ("gptq", lambda tensors: tensors[Q + "scales"].fill_(float("nan"))),
        "holds a NaN": ("fbgemm_fp8", lambda tensors: tensors[Q + "weight"].view(torch.uint8).fill_(255)),
        "must be bf16": ("fbgemm_fp8", lambda tensors: tensors.pop(Q + "weight_scale")),
        "unexpected tensor model.layers.0.self_attn.k_proj.k_scale":
            ("fbgemm_fp8", lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)})),
        "no tensor *.qweight": ("gptq", lambda tensors: [tensors.pop(name) for name in [*tensors] if "proj" in name and ".weight" not in name]),
    }  # fmt: skip
    for number, (words, (kind, change)) in enumerate(cases.items()):
        folder = folders(kind)[0]
        if words.startswith("no tensor"):
            folder = edited(folders(kind)[1], tmp_path / "plain", lambda tensors: None)
            shutil.copyfile(folders(kind)[0] / "config.json", folder / "config.json")
            change = lambda tensors: None  # noqa: E731
        with pytest.raises(InputError) as error:
            load_model(edited(folder, tmp_path / str(number), change))
        assert words in str(error.value), words


def test_nothing_quantises_it_again(folders, tmp_path, capsys):
    folder = str(folders("gptq")[0])
    for action in (
        lambda: quantize.main(
            ["--checkpoint_path", folder, "--mode", "int8", "--out", str(tmp_path / "out")]
        ),
        lambda: generate.main(
            ["--checkpoint_path", folder, "--mode", "int8", "--prompt", "a", "--verify", "plain"]
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            action()
        said = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and ("gptq int4/32" in said or "tokenizer" in said), said
    with pytest.raises(InputError, match="holds gptq int4/32 weights already; leave --mode out"):
        load_model(folder, scheme=quantize.Scheme("int8"))
    assert not [*tmp_path.iterdir()]


def test_ranks_that_would_cut_a_group_are_refused(folders, tmp_path):
    source = folders("gptq")[0].with_name("source")
    write_kind("gptq", source, tmp_path / "q", tmp_path / "twin", group=64)
    with pytest.raises(InputError, match="4 ranks would cut quantised .*o_proj from column 0 to 32"):
        load_model(tmp_path / "q", shard=Shard(1, 4))
    load_model(tmp_path / "q", shard=Shard(1, 2))


def test_bytes_and_fingerprint(folders):
    """What plan.py and the check of memory count is what is there; and a weight that differs makes another model."""
    known = set()
    for kind in ("gptq", "W4A16", "fbgemm_fp8"):
        folder = folders(kind)[0]
        source = open_checkpoint(folder)
        model = load_model(folder, "cpu", torch.bfloat16)
        counted = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert weight_bytes(source.args, torch.bfloat16, source.scheme) == counted
        assert plan.make_role(str(folder), "int8", 1).scheme == source.scheme
        known.add(model.fingerprint)
        assert read_config(folder).dim == 128
    assert len(known) == 3


def test_a_fingerprint_knows_scales(folders, tmp_path):
    folder = folders("awq")[0]
    other = edited(folder, tmp_path / "other", lambda tensors: tensors[Q + "scales"].mul_(2))
    assert load_model(folder).fingerprint == load_model(folder).fingerprint != load_model(other).fingerprint


def test_kinds_that_the_package_writes_are_all_here():
    assert {"FP8-dynamic", "W8A16", "W4A16"} <= COMPRESSED.keys() and {*GROUPED} < {*KINDS}


@pytest.mark.parametrize("kind", ["gptq", "fbgemm_fp8"])
def test_ranks_with_fewer_heads_are_filled_up(tmp_path, kind, monkeypatch):
    """3 query heads of each KV head, on two ranks: 2 and 1."""
    monkeypatch.setattr(quantize, "kernel_for", lambda *_: None)
    make_folder(tmp_path / "source", dtype=torch.bfloat16, hidden_size=192, intermediate_size=256, num_attention_heads=6,
                num_hidden_layers=1)  # fmt: skip
    write_kind(kind, tmp_path / "source", tmp_path / "q", tmp_path / "twin", kept=("v_proj",))
    for rank in range(4):
        model, plain = (
            load_model(tmp_path / name, "cpu", None, None, Shard(rank, 4)) for name in ("q", "twin")
        )
        for name, module in layers(plain).items():
            assert torch.equal(dense(layers(model)[name]), dense(module)), (rank, name)
