"""Writes small quantised folders as others publish them, and beside each its twin: the same weights in fp32.

What is packed here is packed number by number, by the published description of each layout, or by the package
compressed-tensors; published.py is not used.

    python tests/published_folders.py       # perplexity and load times of each kind, as benchmarks/published.md
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from safetensors.torch import load_file, save_file

import kernels
import quantize
from checkpoint import DEMO

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rounded(w: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype):
    """w (N, K) -> q (N, K) of 0 .. 2^bits - 1, scales and zeros (N, groups): a weight is (q - zero) * scale."""
    most, groups = 2**bits - 1, w.float().unflatten(1, (-1, group))
    if symmetric:
        scales = (groups.abs().amax(-1) / (most / 2)).clamp(min=1e-5).to(dtype)
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / most).clamp(min=1e-5).to(dtype)
        zeros = (-low / scales.float()).round().clamp(1, most).long()  # GPTQ cannot say 0
    q = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return q.clamp(0, most).long().flatten(1), scales, zeros


def meant(q, scales, zeros) -> torch.Tensor:
    """fp32 (N, K)."""
    group = q.shape[1] // scales.shape[1]
    return ((q.unflatten(1, (-1, group)) - zeros[..., None]).float() * scales.float()[..., None]).flatten(1)


def into_words(numbers: torch.Tensor) -> torch.Tensor:
    """(A, 8 B) numbers of 4 bits -> (A, B) int32, the first in the lowest bits."""
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.long)
    for i in range(8):
        words |= numbers[:, i::8].long() << 4 * i
    return torch.where(words >= 2**31, words - 2**32, words).int()


def as_gptq(w: torch.Tensor, group: int = 32, symmetric: bool = False, **_):
    """qweight (K / 8, N), qzeros (groups, N / 8) of zero - 1, scales (groups, N), g_idx (K,); and a bias of zeros."""
    q, scales, zeros = rounded(w, 4, group, symmetric, torch.float16)
    tensors = {
        "qweight": into_words(q).t(), "qzeros": into_words((zeros - 1).t()), "scales": scales.t(),
        "g_idx": torch.arange(w.shape[1], dtype=torch.int32) // group, "bias": torch.zeros(len(w), dtype=torch.float16),
    }  # fmt: skip
    return tensors, meant(q, scales, zeros)


def as_awq(w: torch.Tensor, group: int = 32, **_):
    """qweight (K, N / 8) and qzeros (groups, N / 8): of 8 rows the word holds number AWQ_ORDER[i] in its bits 4 i."""
    q, scales, zeros = rounded(w, 4, group, False, torch.float16)
    packed = []
    for numbers in (q.t(), zeros.t()):
        inside = [8 * word + i for word in range(len(w) // 8) for i in AWQ_ORDER]
        packed.append(into_words(numbers[:, inside]))
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scales.t()}, meant(q, scales, zeros)


def as_fbgemm(w: torch.Tensor, **_):
    scales = (w.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-12)
    q = (w.float() / scales).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scales}, q.float() * scales


def compressed_scheme(weights: dict, inputs: dict | None = None):
    """A scheme of the package compressed-tensors."""
    package = pytest.importorskip(
        "compressed_tensors.quantization",
        reason="needs the package compressed-tensors: pip install -r requirements-dev.txt",
    )
    args = package.QuantizationArgs
    return package.QuantizationScheme(
        targets=["Linear"], weights=args(**weights), input_activations=args(**inputs) if inputs else None
    )


def as_compressed(w: torch.Tensor, scheme=None, form: str = "", **_):
    """By the package's own compressor, and back by its own: from scales in fp32, so that nothing is rounded."""
    from compressed_tensors.compressors import BaseCompressor

    args = scheme.weights
    bits, group = args.num_bits, args.group_size if args.strategy == "group" else w.shape[1]
    if args.type == "float":
        found = {"weight": w, "weight_scale": (w.float().abs().amax(1, keepdim=True) / 448).to(w.dtype)}
    else:
        _, scales, zeros = rounded(w, bits, group, args.symmetric, w.dtype)
        found = {"weight": w, "weight_scale": scales}
        if not args.symmetric:
            found["weight_zero_point"] = (zeros - 2 ** (bits - 1)).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(found, scheme)
    exact = packed | {"weight_scale": packed["weight_scale"].float()}
    return packed, compressor.decompress(exact, scheme)["weight"]


def compressed_config(scheme, form: str) -> dict:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, ignore=["lm_head"], quantization_status="compressed"
    )
    return {"quant_method": "compressed-tensors", **json.loads(config.model_dump_json()), "version": "0.20.0"}


DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
COMPRESSED = {  # the weights' settings, the activations', the format
    "FP8-dynamic": ({"num_bits": 8, "type": "float", "strategy": "channel"}, {**DYNAMIC, "type": "float"}, "float-quantized"),
    "W4A16": (INT4, None, "pack-quantized"),
    "W4A16 asymmetric": ({**INT4, "symmetric": False}, None, "pack-quantized"),
    "W8A16": ({"num_bits": 8, "type": "int", "strategy": "channel"}, None, "pack-quantized"),
    "W8A8-dynamic": ({"num_bits": 8, "type": "int", "strategy": "channel"}, {**DYNAMIC, "type": "int"}, "int-quantized"),
}  # fmt: skip
OTHERS = {
    "fbgemm_fp8": (as_fbgemm, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "gptq": (as_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "awq": (
        as_awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    ),
}
KINDS = (*OTHERS, *COMPRESSED)


def write_kind(
    kind: str, source: Path, out: Path, twin: Path, kept: tuple[str, ...] = (), group: int = 32
) -> dict:
    """A folder of that kind, and its twin, from an unquantised folder with model.safetensors -> the dequantised
    weights. kept: parts of names of matrices that stay as they are."""
    if kind in OTHERS:
        write, config = OTHERS[kind]
        config, more = config | ({"group_size": group} if "group_size" in config else {}), {"group": group}
    else:
        weights, inputs, form = COMPRESSED[kind]
        if "group_size" in weights:
            weights = weights | {"group_size": group}
        scheme = compressed_scheme(weights, inputs)
        write, config, more = as_compressed, compressed_config(scheme, form), {"scheme": scheme, "form": form}
    tensors, dense, dequantised = {}, {}, {}
    for name, w in load_file(source / "model.safetensors").items():
        if name.split(".")[-2] not in MATRICES or any(part in name for part in kept):
            tensors[name], dense[name] = w, w.float()
            continue
        packed, dequantised[name] = write(w, **more)
        tensors |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in packed.items()}
        dense[name] = dequantised[name].float()
    for folder, content, entry in ((out, tensors, {"quantization_config": config}), (twin, dense, {})):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
        save_file(
            {name: tensor.contiguous() for name, tensor in content.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        whole = json.loads((source / "config.json").read_text()) | entry
        (folder / "config.json").write_text(json.dumps(whole))
    return dequantised


def seconds_to_read(file: Path) -> float:
    """To read a file, which was read before, in 8 MiB at a time."""
    begin, content = time.perf_counter(), bytearray(1 << 23)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(content):
            pass
    return time.perf_counter() - begin


def measure_perplexity(root: Path) -> list[str]:
    """The demo target in each kind, and its twin; in fp32, on the demo's problems."""
    from scripts.lib.likelihood import perplexity, read_pairs
    from tokenizer import load_tokenizer

    tokenizer = load_tokenizer(DEMO / "target")
    pairs = [[tokenizer.encode(part) for part in pair] for pair in read_pairs("demo", 0, 60)]
    lines = ["| kind | perplexity | of its twin | unquantised |", "|---|---|---|---|"]

    def of(folder: Path) -> float:
        return perplexity(quantize.load_model(folder, "cpu", torch.float32), tokenizer.bos_id, pairs)

    plain = of(DEMO / "target")
    for kind in KINDS:
        write_kind(kind, DEMO / "target", root / kind, root / f"{kind} twin", group=64)
        found = [of(root / kind), of(root / f"{kind} twin"), plain]
        lines.append(f"| {kind} | " + " | ".join(f"{value:.6f}" for value in found) + " |")
    return lines


def measure_loading(root: Path) -> list[str]:
    """4 layers of a 1B in each kind: the median of 3 loads, and of 3 times reading the file."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 1024}  # fmt: skip
    make_folder(root / "large", dtype=torch.bfloat16, scale=1.0, **shape)
    lines = ["| kind | MB | loading, s | reading the file, s | times |", "|---|---|---|---|---|"]
    for kind in ("bf16", *KINDS):
        folder = root / "large" if kind == "bf16" else root / f"large {kind}"
        if kind != "bf16":
            write_kind(kind, root / "large", folder, root / "twin", group=128)
            shutil.rmtree(root / "twin")
        took = []
        for _ in range(3):
            begin = time.perf_counter()
            quantize.load_model(folder, "cpu", torch.float32 if kind != "bf16" else torch.bfloat16)
            took.append(time.perf_counter() - begin)
        file = folder / "model.safetensors"
        load, read = statistics.median(took), statistics.median(seconds_to_read(file) for _ in range(3))
        lines.append(
            f"| {kind} | {file.stat().st_size / 1e6:.0f} | {load:.2f} | {read:.2f} | {load / read:.1f} |"
        )
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kernels.use_cpu_kernels()
        print("\n".join([*measure_perplexity(Path(folder)), "", *measure_loading(Path(folder))]))
