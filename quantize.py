"""Weight-only quantisation: int8, int4 and fp8 weights that are read in a quarter to a half of the time.

    python quantize.py --checkpoint_path DIR --mode int8 --out DIR2       # DIR2 is a folder that generate.py
    loads python generate.py --checkpoint_path DIR --mode int4                  # or quantised while it is
    loaded

Every row of a weight matrix (an output channel) is quantised by itself, so that fusing and sharding by rows
change nothing. int8 and fp8 (e4m3) have one scale a row; int4 a scale, and unless --symmetric an offset, a
group of 32, 64 or 128 columns. Activations stay as they are; kernels.py says how the products are done.
Embedding, norms and, unless --quantize_lm_head, the LM head are not quantised; nor is the judge.
"""

from cli import InputError, Parser, Progress, run_script, shortened, shortened_value, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
import kernels
import model as plain
from checkpoint import read_config
from files import check_new_folder, lock, read_json, replacing, write_file
from model import ModelArgs, Transformer
from tp import Shard

MODES = ("int8", "int4", "fp8")
PACKING = 1  # how the numbers lie in the files; a reader refuses any other
ROWS, COLUMNS = 16, 32  # packed weights are padded to multiples of these
SLICE = (
    1 << 22
)  # numbers that are dequantised or quantised at a time: a copy of a whole matrix in fp32 would be GB
CLIPS = torch.linspace(1.0, 0.6, 9)  # what the search tries: shares of a group's range
TYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Scheme:
    """How to quantise. group_size and symmetric concern int4 alone; dynamic, activations too, token by token,
    fp8."""

    mode: str
    group_size: int = 32
    symmetric: bool = False
    lm_head: bool = False
    dynamic: bool = False

    def __str__(self) -> str:
        int4 = f"/{self.group_size}{' symmetric' if self.symmetric else ''}" if self.mode == "int4" else ""
        return (
            self.mode
            + int4
            + (" dynamic" if self.dynamic else "")
            + (" with LM head" if self.lm_head else "")
        )


def check_scheme(scheme: Scheme) -> None:
    """Raises InputError for what is not built."""
    if scheme.mode not in MODES:
        raise InputError(f"--mode {shortened(str(scheme.mode))} is not known; known are {', '.join(MODES)}.")
    if type(scheme.group_size) is not int or scheme.group_size not in (32, 64, 128):
        raise InputError(f"--group_size {shortened_value(scheme.group_size)} must be 32, 64 or 128.")
    if not all(type(flag) is bool for flag in (scheme.symmetric, scheme.lm_head, scheme.dynamic)):
        raise InputError("symmetric, lm_head and dynamic must be true or false.")
    if scheme.mode != "int4" and (scheme.symmetric or scheme.group_size != 32):
        raise InputError(f"--group_size and --symmetric concern --mode int4, not {scheme.mode}.")
    if scheme.dynamic and scheme.mode != "fp8":
        raise InputError(f"--dynamic_activations concerns --mode fp8, not {scheme.mode}.")


def scheme_named(name: str) -> Scheme | None:
    """None for "none"; a scheme for a mode, or for int4/GROUP."""
    if name == "none":
        return None
    mode, _, group = name.partition("/")
    if group and not group.isdecimal():
        raise InputError(f"--mode {name} is not of the form int4/GROUP.")
    scheme = Scheme(mode, int(group or 32))
    check_scheme(scheme)
    return scheme


def quantize(
    weight: Tensor, scheme: Scheme, whole_row: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """weight (N, K), any float type -> packed weight and scales, K padded with zeros to what the packing
    needs.

    int8, fp8: weight (N, K'), scales (N,) fp32, and a weight is q * scale. int4: weight (N, K' / 2) uint8,
    scales (N, K' / group, 2) bf16, and a weight is q * scales[..., 0] + scales[..., 1]; when symmetric the
    latter is -8 times the former. whole_row: where these are some columns of a weight, gives the largest of
    all columns from the largest of these (N,), so that their scales are those of the whole rows.
    """
    unit, columns = unit_of(scheme), weight.shape[1] + -weight.shape[1] % unit_of(scheme)
    parts = list(weight.split(slice_rows(columns)))
    peaks = torch.cat([part.float().abs().amax(1) for part in parts])
    if not peaks.isfinite().all():
        raise InputError(
            "A weight that is to be quantised holds a NaN or an infinite number; mend the checkpoint."
        )

    def wide(part: Tensor) -> Tensor:
        return torch.nn.functional.pad(part.float(), (0, columns - weight.shape[1]))

    if scheme.mode == "int4":
        some = max(1, (1 << 18) // columns)  # rows whose search stays in the cache
        found = [
            quantize_groups(wide(rows).unflatten(1, (-1, unit)), scheme.symmetric)
            for rows in weight.split(some)
        ]
        packed, scales = zip(*((pack_int4(q.flatten(1)), scales) for q, scales in found))
        return torch.cat(packed), torch.cat(scales)
    largest = 127.0 if scheme.mode == "int8" else 448.0
    scales = ((whole_row(peaks) if whole_row is not None else peaks) / largest).clamp(min=1e-30)
    packed = torch.empty(len(weight), columns, dtype=TYPES[scheme.mode], device=weight.device)
    for part, into, scale in zip(parts, packed.split(slice_rows(columns)), scales.split(slice_rows(columns))):
        q = wide(part).div_(scale[:, None])
        into.copy_(q.round_() if scheme.mode == "int8" else q)
    return packed, scales


def slice_rows(columns: int) -> int:
    """Rows of a matrix that are worked on at a time."""
    return max(ROWS, SLICE // max(1, columns) // ROWS * ROWS)


def unit_of(scheme: Scheme) -> int:
    """Columns that packing and scales keep together."""
    return scheme.group_size if scheme.mode == "int4" else COLUMNS


def quantize_groups(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Groups (N, groups, size) -> q in 0..15, and scales (N, groups, 2) in bf16: scale and offset.

    For each of CLIPS the range is shrunk, and scale and offset fitted to the q that it gives by least
    squares; the best by the error weighted with the weight's own square (large weights matter more) is kept.
    """
    importance = w.square() + 1e-12
    low, high = w.amin(-1), w.amax(-1)
    best = torch.full_like(low, float("inf"))
    q_best, scale_best, offset_best = (
        torch.zeros_like(w, dtype=torch.uint8),
        torch.zeros_like(low),
        torch.zeros_like(low),
    )
    for clip in CLIPS.tolist():
        if symmetric:
            scale = clip * torch.maximum(-low / 8, high / 7)
            offset = -8 * scale
        else:
            middle, scale = (low + high) / 2, clip * (high - low) / 15
            offset = middle - 7.5 * scale
        for _ in range(2):
            q = to_levels(w, scale, offset)
            scale, offset = fit(w, q, importance, scale, offset, symmetric)
        scale = scale.bfloat16().float()
        offset = -8 * scale if symmetric else offset.bfloat16().float()
        q = to_levels(w, scale, offset)
        error = (importance * (q * scale[..., None] + offset[..., None] - w).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        q_best = torch.where(better[..., None], q.to(torch.uint8), q_best)
        scale_best, offset_best = (
            torch.where(better, scale, scale_best),
            torch.where(better, offset, offset_best),
        )
    return q_best, torch.stack([scale_best, offset_best], -1).bfloat16()


def to_levels(w: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The nearest of the 16 levels, as floats."""
    return ((w - offset[..., None]) / scale[..., None].clamp(min=1e-30)).round().clamp(0, 15)


def fit(
    w: Tensor, q: Tensor, importance: Tensor, scale: Tensor, offset: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset (N, groups) that minimise the weighted error of given levels; kept where that is
    undetermined."""
    if symmetric:
        levels = q - 8
        below = (importance * levels.square()).sum(-1)
        fitted = torch.where(below > 0, (importance * levels * w).sum(-1) / below.clamp(min=1e-30), scale)
        return fitted, -8 * fitted
    total = importance.sum(-1)
    q_mean, w_mean = (importance * q).sum(-1) / total, (importance * w).sum(-1) / total
    spread = (importance * (q - q_mean[..., None]).square()).sum(-1)
    along = (importance * (q - q_mean[..., None]) * (w - w_mean[..., None])).sum(-1)
    determined = spread > 1e-6 * total
    fitted = torch.where(determined, along / spread.clamp(min=1e-30), scale)
    return fitted, torch.where(determined, w_mean - fitted * q_mean, offset)


def pack_int4(q: Tensor) -> Tensor:
    """q (N, K) of 0..15 -> (N, K / 2): of each 32 columns the first 16 in the lower halves of 16 bytes, the
    rest above."""
    low, high = q.to(torch.uint8).unflatten(1, (-1, 2, 16)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    parts = packed.unflatten(1, (-1, 16))
    return torch.stack([parts & 15, parts >> 4], 2).flatten(1)


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """What packed weights (as `quantize` gives) stand for, fp32 (N, K')."""
    if weight.dtype != torch.uint8:
        return weight.float().mul_(scales[:, None])
    q = unpack_int4(weight).float().unflatten(1, (scales.shape[1], -1))
    return q.mul_(scales[..., :1].float()).add_(scales[..., 1:].float()).flatten(1)


def product_in_slices(x: Tensor, weight: Tensor, scales: Tensor, n: int) -> Tensor:
    """x (..., k) of any type times packed weights (N, K'), in x's type -> (..., n). Dequantises SLICE numbers
    at a time."""
    y, k = x.new_empty(*x.shape[:-1], n), x.shape[-1]
    some = slice_rows(weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1))
    for begin in range(0, n, some):
        end = min(n, begin + some)
        part = dequantize(weight[begin:end], scales[begin:end])[:, :k].to(x.dtype)
        y[..., begin:end] = nn.functional.linear(x, part)
    return y


@torch.library.custom_op("judge_fast::many_rows", mutates_args=())
def many_rows(x: Tensor, weight: Tensor, scales: Tensor, n: int) -> Tensor:
    """`product_in_slices`, as one operation of a compiled step."""
    return product_in_slices(x, weight, scales, n)


@many_rows.register_fake
def many_rows_shape(x: Tensor, weight: Tensor, scales: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def to_tiles(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Packed weights, rows padded, as kernels.cpp reads them: of 16 rows at a time all columns, in lines of
    64 bytes.

    int8, fp8: a line holds 4 columns, four times the first two of 4 rows and the other two of these rows; a
    byte is a sign and 7 bits of magnitude. int4: a line holds 8 columns, of each row 32 bits, columns 2p and
    2p + 1 in bits 4p and 4p + 16; scales and offsets lie by blocks of 16 rows, too.
    """
    if weight.dtype == torch.uint8:
        q = (
            unpack_int4(weight).view(len(weight) // 16, 16, -1, 4, 2).transpose(1, 2)
        )  # block, line, row, p, half
        low, high = (
            q[..., 0:4:2, :] | q[..., 1:4:2, :] << 4,
            scales.unflatten(0, (-1, 16)).transpose(1, 2).contiguous(),
        )
        return low.transpose(-1, -2).reshape(weight.shape), high.view(scales.shape)
    byte = weight.view(torch.uint8)
    if weight.dtype == torch.int8:
        byte = torch.where(weight < 0, 128 - weight.to(torch.int16), weight).to(torch.uint8)
    lines = byte.view(len(weight) // 16, 4, 4, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return lines.reshape(weight.shape).view(weight.dtype), scales


class QuantLinear(nn.Module):
    """A linear layer of packed weights, on a CPU in tiles; n_out and n_in are the sizes that the packing has
    padded."""

    def __init__(self, weight: Tensor, scales: Tensor, n_out: int, n_in: int, dynamic: bool = False):
        super().__init__()
        self.n_out, self.n_in, self.dynamic = n_out, n_in, dynamic
        weight, scales = pad_rows(weight), pad_rows(scales)
        if weight.device.type == "cpu" and not dynamic:
            weight, scales = to_tiles(weight, scales)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_in), fp32 or bf16 -> (..., n_out). On a CPU kernels.cpp takes any number of rows."""
        if x.numel() == 0:  # the LM head in a prefill
            return x.new_empty(*x.shape[:-1], self.n_out)
        if self.dynamic:
            return kernels.scaled_product(x, self.weight, self.scales, self.n_out)
        if x.device.type == "cpu":
            return kernels.cpu_kernels.linear_quantized(x, self.weight, self.scales, self.n_out)
        if x.numel() // self.n_in <= kernels.MOST_ROWS:
            return kernels.few_rows(x, self.weight, self.scales, self.n_out)
        return many_rows(x, self.weight, self.scales, self.n_out)


def pad_rows(x: Tensor) -> Tensor:
    """x with rows of zeros up to a multiple of ROWS, contiguous."""
    missing = -x.shape[0] % ROWS
    return (
        torch.cat([x, torch.zeros(missing, *x.shape[1:], dtype=x.dtype, device=x.device)])
        if missing
        else x.contiguous()
    )


def is_quantized(parameter: str, scheme: Scheme) -> bool:
    """Whether a parameter of ours, by name, is to be quantised."""
    name = parameter.split(".")[-2]
    return name in ("wqkv", "wo", "w13", "w2") or (name == "output" and scheme.lm_head)


def quantize_module(model: Transformer, parameter: str, scheme: Scheme, shard: Shard | None = None) -> None:
    """Replaces one linear layer by its quantised form and lets its weight go."""
    owner, _, name = parameter.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(owner)
    weight = getattr(parent, name).weight
    whole_row = shard.largest if shard is not None and name in ("wo", "w2") else None
    setattr(parent, name, QuantLinear(*quantize(weight, scheme, whole_row), *weight.shape, scheme.dynamic))


def quantize_model(model: Transformer, scheme: Scheme) -> Transformer:
    """Quantises a loaded model in place, layer by layer, and returns it."""
    check_scheme(scheme)
    check_lm_head(model.args, scheme)
    prepare(model.device, scheme)
    for name in grouped_plan(model.args):
        completer(scheme)(model, name)
    return model


def prepare(device: torch.device, scheme: Scheme) -> None:
    """Builds what products of packed weights need; raises InputError where that cannot be had."""
    check_device(device, scheme)
    if scheme.dynamic:
        return
    if device.type == "cpu":
        kernels.use_cpu_kernels()
        if kernels.cpu_kernels is None:
            raise InputError(
                f"Quantised weights on a CPU need kernels.cpp, which could not be built: {kernels.why_not}."
            )
    elif kernels.triton is None:
        raise InputError("Quantised weights on a GPU need the package triton; pip install triton.")


def check_device(device: torch.device, scheme: Scheme | None) -> None:
    """Raises InputError for a scheme whose numbers a GPU does not have: fp8 begins with compute capability
    8.9."""
    if scheme is None or scheme.mode != "fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        found = ".".join(map(str, capability))
        raise InputError(
            f"--mode fp8 needs a GPU of compute capability 8.9 or more; {device} has {found}: use int8 or "
            f"int4."
        )


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, scheme: Scheme | None = None,
    shard: Shard | None = None,
) -> Transformer:  # fmt: skip
    """Loads a published folder, quantised on the way if there is a scheme, or a folder that `convert` wrote.

    dtype: of activations, caches and what is not quantised. shard: loads only that part, whose packed weights
    and scales are the slices of the whole's. Raises InputError as `checkpoint.load_published` does, and when
    folder, scheme and shard do not fit.
    """
    folder, device = Path(folder), torch.device(device)
    written = read_scheme(folder)
    if (written or scheme) and device.type == "cpu" and dtype == torch.float16:
        raise InputError(
            "Quantised weights on a CPU run in fp32 or bf16, not in fp16; choose another --precision."
        )
    if shard is not None and (written or scheme):
        shard.check_columns(read_config(folder), unit_of(written[0] if written else scheme))
    if written is not None:
        if scheme not in (None, written[0]):
            raise InputError(f"{folder} holds {written[0]} weights already; leave --mode out.")
        prepare(device, written[0])
        return load_quantized(folder, device, dtype, *written, shard)
    if scheme is None:
        return checkpoint.load_published(folder, device, dtype, shard=shard)
    check_scheme(scheme)
    check_lm_head(read_config(folder), scheme)
    prepare(device, scheme)

    return checkpoint.load_published(folder, device, dtype, completer(scheme, shard), shard)


def completer(scheme: Scheme, shard: Shard | None = None) -> Callable[[Transformer, str], None]:
    """What quantises a model's layers one by one, as soon as each is filled (`complete` of
    checkpoint.load_published)."""

    def complete(model: Transformer, parameter: str) -> None:
        model.quantization = str(scheme)
        if is_quantized(parameter, scheme):
            quantize_module(model, parameter, scheme, shard)

    return complete


def check_lm_head(args: ModelArgs, scheme: Scheme) -> None:
    if scheme.lm_head and args.tie_embeddings:
        raise InputError(
            "--quantize_lm_head: this LM head is the embedding, which stays as it is; leave the flag out."
        )


def read_scheme(folder: Path) -> tuple[Scheme, str] | None:
    """Scheme and the unquantised model's fingerprint of a folder that `convert` wrote; None for any other."""
    path = folder / "config.json"
    found = read_json(path).get("judge_fast")
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("packing") != PACKING:
        packing = shortened_value(found.get("packing") if isinstance(found, dict) else found)
        raise InputError(
            f"{path}: weights packed as {packing} cannot be read, only as {PACKING}; quantise them again."
        )
    try:
        scheme, fingerprint = Scheme(**found["scheme"]), found["fingerprint"]
        check_scheme(scheme)
        if not (isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{16}", fingerprint)):
            raise InputError("its fingerprint is none.")
        return scheme, fingerprint
    except (KeyError, TypeError, InputError) as error:
        reason = shortened_value(str(error))
        raise InputError(
            f"{path}: the entry judge_fast is not one that quantize.py writes ({reason})."
        ) from None


def grouped_plan(args: ModelArgs) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our parameters -> the published tensors that they are made of, from top to bottom, with their
    shapes."""
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, (ours, _, shape) in checkpoint.weight_plan(args).items():
        groups.setdefault(ours, []).append((name, shape))
    return groups


def packed_shapes(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of what stands for a weight (N, K) in a quantised file, by the suffix of its name."""
    n, k = shape
    unit = unit_of(scheme)
    padded = -(-k // unit) * unit
    if scheme.mode != "int4":
        return {"": (TYPES[scheme.mode], (n, padded)), "_scale": (torch.float32, (n,))}
    return {"": (torch.uint8, (n, padded // 2)), "_scale": (torch.bfloat16, (n, padded // unit, 2))}


def packed_part(
    part: tuple[slice, ...], shape: tuple[int, ...], scheme: Scheme
) -> dict[str, tuple[slice, ...]]:
    """What a part of a weight (N, K) is of its packed weight and of its scales: columns of int8 and fp8 need
    all scales."""
    if len(part) < 2:
        return {"": part, "_scale": part}
    unit, (rows, columns) = unit_of(scheme), part
    start, stop = columns.start, min(-(-columns.stop // unit) * unit, -(-shape[1] // unit) * unit)
    if scheme.mode != "int4":
        return {"": (rows, slice(start, stop)), "_scale": ()}
    return {"": (rows, slice(start // 2, stop // 2)), "_scale": (rows, slice(start // unit, stop // unit))}


def load_quantized(
    folder: Path, device: torch.device, dtype: torch.dtype | None, scheme: Scheme, fingerprint: str,
    shard: Shard | None = None,
) -> Transformer:  # fmt: skip
    """Loads a folder that `convert` wrote."""
    args, files = read_config(folder), checkpoint.checkpoint_files(folder)
    check_lm_head(args, scheme)
    checkpoint.check_layers(files, args, folder)
    local = shard.local(args) if shard else args
    model, groups, handles = plain.empty_model(args, local), grouped_plan(args), {}
    progress, places = Progress(f"loading {folder}", len(groups)), checkpoint.weight_plan(local)

    def read(name: str, kind: torch.dtype | None, shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """The part of one tensor, whose type (None: any of DTYPES) and whole shape are checked; counts its
        bytes."""
        file = files.get(name)
        if file is None:
            raise InputError(f"{folder} has no tensor {name}, which its config.json calls for.")
        if file not in handles:
            handles[file] = checkpoint.open_safetensors(file)
        tensor = checkpoint.read_tensor(handles[file], name, shape, file, kind, part)
        model.bytes_read += tensor.nbytes
        return tensor

    for ours, tensors in groups.items():
        found: dict[str, list[Tensor]] = {}
        for name, shape in tensors:
            part, (_, row, here) = shard.part(args, name) if shard else (), places[name]
            if not is_quantized(ours, scheme):
                tensor = read(name, None, shape, part)
                dtype = dtype or tensor.dtype
                checkpoint.fill(plain.materialise(model, ours, dtype, device)[row : row + here[0]], tensor)
                continue
            slices, sizes = packed_part(part, shape, scheme), packed_shapes(here, scheme)
            for suffix, (kind, size) in packed_shapes(shape, scheme).items():
                tensor = read(name + suffix, kind, size, slices[suffix])
                if tensor.shape != sizes[suffix][1]:
                    whole = torch.empty(sizes[suffix][1], dtype=kind)
                    checkpoint.fill(whole, tensor)
                    tensor = whole
                found.setdefault(suffix, []).append(tensor)
        if found:
            weight, scales = (torch.cat(parts).to(device) for parts in found.values())
            owner, _, leaf = ours.removesuffix(".weight").rpartition(".")
            n, k = sum(places[name][2][0] for name, _ in tensors), places[tensors[0][0]][2][1]
            setattr(model.get_submodule(owner), leaf, QuantLinear(weight, scales, n, k, scheme.dynamic))
        progress.step()
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.fingerprint, model.quantization = fingerprint, str(scheme)
    return model.eval()


def convert(source: Path, out: Path, scheme: Scheme) -> None:
    """Writes a quantised copy of a folder, one layer a file; a killed run goes on where it stopped.

    All is written to `out`.partial, which is renamed at the end; meanwhile no other process writes there.
    Memory: the largest layer. Raises InputError, before any work, for an `out` that is there, save where a
    run was killed when it had only to tidy up.
    """
    check_scheme(scheme)
    args = read_config(source)
    check_lm_head(args, scheme)
    if read_scheme(source) is not None:
        raise InputError(f"{source} is quantised already; name the published folder.")
    work = out.with_name(out.name + ".partial")
    if is_complete(out, work, source, scheme):
        print(f"{out} is complete: {scheme}; an earlier run had written all of it.", file=sys.stderr)
        return
    check_new_folder(out, "--out", beside=work)
    files = checkpoint.find_weights(source, args)
    entry = {"scheme": asdict(scheme), "packing": PACKING, "fingerprint": checkpoint.fingerprint_of(source)}
    with start_or_resume(work, entry, out):
        index = write_shards(source, work, args, files, scheme)
        finish(source, work, index, entry)
        try:
            os.replace(work, out)  # what is missing before it is made again, after it nothing is
            (out / SETTINGS).unlink()
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}.") from None
    read = {file for file, _ in files.values()}, set(checkpoint.checkpoint_files(out).values())
    sizes = [sum(file.stat().st_size for file in found) for found in read]
    print(f"{out}: {scheme}, {sizes[1] / 1e9:.3f} GB of weights, of {sizes[0] / 1e9:.3f} GB", file=sys.stderr)


SETTINGS = "settings.json"  # what an unfinished run is doing


def is_complete(out: Path, work: Path, source: Path, scheme: Scheme) -> bool:
    """Whether a run was killed between the folder's new name and the end: removes what it would have. Raises
    InputError where the folder is complete and nothing is left to do."""
    if not os.path.isfile(out / "config.json"):
        return False
    entry = {"scheme": asdict(scheme), "packing": PACKING}
    try:
        found = read_json(out / "config.json").get("judge_fast")
        same = isinstance(found, dict) and {name: found.get(name) for name in entry} == entry
        if not same or found.get("fingerprint") != checkpoint.fingerprint_of(source):
            return False
        checkpoint.checkpoint_files(out)
    except InputError:
        return False
    if not (out / SETTINGS).is_file():
        raise InputError(
            f"--out {out} exists already, and is complete: the {scheme} weights of this very model."
        )
    (out / SETTINGS).unlink()
    return True


@contextlib.contextmanager
def start_or_resume(work: Path, entry: dict, out: Path) -> Iterator[None]:
    """Holds the folder of an unfinished run with the same settings, or a new one, for this process alone."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        held = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{work} cannot be written: {error.strerror}.") from None
    try:
        lock(held, work)
        if (
            out.exists() or not work.exists()
        ):  # another process has finished it between our first look and the lock
            raise InputError(f"--out {out} exists already; name a new folder.")
        ours = [path.name for path in work.iterdir() if path.name != SETTINGS and not is_scrap(path.name)]
        if ours and (not (work / SETTINGS).is_file() or read_json(work / SETTINGS) != entry):
            raise InputError(f"{work} is left of a run with other settings or another model; remove it.")
        for path in work.iterdir():
            if is_scrap(path.name):
                path.unlink()
        write_file(work / SETTINGS, json.dumps(entry).encode())
        yield
    except OSError as error:
        raise InputError(f"{work} cannot be written: {error.strerror}.") from None
    finally:
        os.close(held)


def is_scrap(name: str) -> bool:
    """Whether a file is what a killed run left of one that it was writing, by us or by safetensors."""
    return name.endswith(".tmp") or name.startswith(".tmp")


def write_shards(source: Path, work: Path, args: ModelArgs, files: dict, scheme: Scheme) -> dict[str, str]:
    """One file a layer and one for the rest, those that are there already left as they are -> tensor name to
    file."""
    shards: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, (ours, _, shape) in checkpoint.weight_plan(args).items():
        layer = ours.split(".")[1] if ours.startswith("layers.") else "other"
        shards.setdefault(layer, []).append((ours, name, shape))
    progress, index = Progress(f"quantising {source}", len(shards)), {}
    for number, tensors in enumerate(shards.values(), 1):
        file = work / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not file.exists():
            write_shard(file, tensors, files, scheme)
        index |= dict.fromkeys(checkpoint.safetensors_header(file)[1], file.name)
        progress.step()
    return index


def write_shard(
    file: Path, tensors: list[tuple[str, str, tuple[int, ...]]], files: dict, scheme: Scheme
) -> None:
    """One file of quantised and unquantised tensors, written beside and renamed."""
    content = {}
    for ours, name, shape in tensors:
        path, stored = files[name]
        tensor = checkpoint.read_tensor(checkpoint.open_safetensors(path), stored, shape, path)
        if is_quantized(ours, scheme):
            content |= dict(zip((name, name + "_scale"), quantize(tensor, scheme)))
        else:
            content[name] = tensor
    write_tensors(file, content)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file with the permissions of the umask, written beside and renamed. Raises InputError on
    a full disk."""
    with replacing(file) as fresh:
        try:
            save_file(tensors, fresh, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{error}; free some space, then the same command goes on") from None


def finish(source: Path, work: Path, index: dict[str, str], entry: dict) -> None:
    """Index, configuration, and what else the published folder has beside its weights."""
    for file in [*source.iterdir(), source / "original" / "tokenizer.model"]:
        weights = file.name.startswith("model.safetensors") or file.suffix in (".safetensors", ".bin", ".pth")
        if file.is_file() and not weights and file.name not in ("config.json", SETTINGS):
            place = work / file.relative_to(source)
            try:
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
            except OSError as error:
                raise InputError(f"{place} cannot be written: {error.strerror}.") from None
    write_file(work / "model.safetensors.index.json", json.dumps({"weight_map": index}, indent=1).encode())
    config = read_json(source / "config.json") | {"judge_fast": entry}
    write_file(work / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def memory_line(name: str, model: Transformer) -> str:
    """Bytes of a model's weights by kind and of its caches, in words."""
    kinds: dict[str, int] = {}
    for _, tensor in {
        tensor.data_ptr(): (key, tensor) for key, tensor in model.state_dict().items()
    }.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
    weights = ", ".join(
        f"{size / 1e6:,.1f} MB {kind}" for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
    )
    return f"{name}: weights {weights}; caches {model.local.cache_bytes(model.cache_length, model.dtype) / 1e6:,.1f} MB"


def weight_bytes(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """Bytes of a model's weights, those that are not quantised in `dtype`."""
    total = 0
    for ours, tensors in grouped_plan(args).items():
        for _, shape in tensors:
            if scheme is not None and is_quantized(ours, scheme):
                total += sum(
                    kind.itemsize * math.prod(size) for kind, size in packed_shapes(shape, scheme).values()
                )
            else:
                total += math.prod(shape) * dtype.itemsize
    return total


def temporary_bytes(
    args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None, device: torch.device, rows: int = 2048
) -> int:
    """The most bytes that loading and reading a prompt, `rows` at a time, take beside the weights as
    `weight_bytes` counts them: a layer before it is quantised, and what is dequantised at a time."""
    if scheme is None:
        return 0
    largest = most_of_slice = 0
    for ours, tensors in grouped_plan(args).items():
        if is_quantized(ours, scheme):
            n, k = sum(shape[0] for _, shape in tensors), tensors[0][1][1]
            k += -k % unit_of(scheme)
            largest = max(largest, n * k)
            most_of_slice = max(
                most_of_slice, min(n + -n % ROWS, slice_rows(k)) * (k * 10 + rows * dtype.itemsize)
            )
    packing = 8 if device.type == "cpu" else 2  # copies while a matrix is put into tiles, or padded
    return largest * (dtype.itemsize + packing) + most_of_slice


def add_mode_flags(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The flags that name a scheme."""
    add = parser.add_argument
    add("--mode", choices=MODES, required=required, help="quantise the weights so")
    if not required:
        add("--draft_mode", choices=MODES, help="quantise the draft's weights so")
    add(
        "--group_size",
        type=whole(1, 1024),
        default=32,
        help="int4: columns that share a scale: 32, 64 or 128",
    )
    add("--symmetric", action="store_true", help="int4: scales without offsets")
    add("--quantize_lm_head", action="store_true", help="the LM head, too")
    add("--dynamic_activations", action="store_true", help="fp8: quantise activations, too, token by token")


def scheme_of(args: argparse.Namespace, whose: str = "") -> Scheme | None:
    """The scheme of a command line with `add_mode_flags`, None without --mode (whose: "draft_", without
    --draft_mode)."""
    mode = getattr(args, whose + "mode", None)
    if not mode:
        given = [
            flag for flag in ("symmetric", "quantize_lm_head", "dynamic_activations") if getattr(args, flag)
        ]
        given += ["group_size"] * (args.group_size != 32)
        if given and not any(getattr(args, name, None) for name in ("mode", "draft_mode", "modes")):
            raise InputError(
                f"--{given[0]} says how to quantise; give --mode or --draft_mode, or leave it out."
            )
        return None
    flags = {
        "int4": {"group_size": args.group_size, "symmetric": args.symmetric},
        "fp8": {"dynamic": args.dynamic_activations},
    }
    for name in flags:
        if mode != name and name in (
            args.mode,
            getattr(args, "draft_mode", None),
        ):  # the flags are the other model's
            flags[name] = {}
    scheme = Scheme(mode, **flags["int4"], **flags["fp8"], lm_head=args.quantize_lm_head)
    check_scheme(scheme)
    return scheme


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a published folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    add_mode_flags(parser, required=True)
    args = parser.parse_args(argv)
    run_script("quantize.py", lambda: convert(args.checkpoint_path, args.out, scheme_of(args)))


if __name__ == "__main__":
    main()
