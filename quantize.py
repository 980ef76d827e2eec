"""Weight-only quantisation: int8, int4 and fp8 weights that are read in a quarter to a half of the time.

    python quantize.py --checkpoint_path DIR --mode int8 --out DIR2       # a folder that generate.py loads
    python generate.py --checkpoint_path DIR --mode int4                  # or quantised while it is loaded

Every row of a weight matrix (an output channel) is quantised by itself, so that fusing and sharding by rows
change nothing. int8 and fp8 (e4m3) have one scale a row; int4 a scale, and unless --symmetric an offset, a
group of 32, 64 or 128 columns. Activations stay as they are. A mode is an entry of FORMATS: how it packs and
unpacks, and which kernels multiply by it; without one, weights are unpacked slice by slice. Embedding, norms
and, unless --quantize_lm_head, the LM head are not quantised; nor is the judge.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
import kernels
import published
from checkpoint import Row, args_of, layer_plan, top_plan, weight_plan
from files import check_new_folder, lock, read_json, replacing, write_file
from hub import model_folder
from model import Linear, ModelArgs, Transformer, empty_model, materialise
from tp import Shard

PACKING = 2  # how the numbers lie in the files; a reader refuses any other
ROWS, COLUMNS = 16, 32  # packed weights are padded to multiples of these
SLICE = 1 << 22  # numbers unpacked at a time: a copy of a whole matrix in fp32 would be GB
# numbers packed at a time: on a CPU a search over them stays in the cache, on a GPU it launches 700 kernels
AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 22}
CLIPS = torch.linspace(1.0, 0.6, 9)  # what the search tries: shares of a group's range


@dataclass(frozen=True)
class Scheme:
    """How to quantise: a mode of FORMATS and its settings. dynamic: activations, too, token by token."""

    mode: str
    group_size: int = 32
    symmetric: bool = False
    lm_head: bool = False
    dynamic: bool = False
    wide = False  # int4: scales and offsets in fp32
    kept = frozenset()  # published names of what stays as it is all the same

    def __str__(self) -> str:
        group = f"/{self.group_size}" if "group_size" in FORMATS[self.mode].settings else ""
        words = {" symmetric": self.symmetric, " dynamic": self.dynamic, " with LM head": self.lm_head}
        return self.mode + group + "".join(word for word, said in words.items() if said)


@dataclass(frozen=True)
class PublishedScheme(Scheme):
    """How somebody else has quantised a folder (published.py)."""

    wide: bool = False
    kept: frozenset[str] = frozenset()
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {Scheme.__str__(self)}"


# a scheme's settings that concern some modes alone: their flags
FLAGS = {"group_size": "group_size", "symmetric": "symmetric", "dynamic": "dynamic_activations"}


def check_scheme(scheme: Scheme) -> None:
    """Raises InputError for what is not built."""
    if scheme.mode not in FORMATS:
        known = ", ".join(FORMATS)
        raise InputError(f"--mode {shortened(str(scheme.mode))} is not known; known are {known}.")
    if type(scheme.group_size) is not int or scheme.group_size not in (32, 64, 128):
        raise InputError(f"--group_size {shortened_value(scheme.group_size)} must be 32, 64 or 128.")
    if not all(type(flag) is bool for flag in (scheme.symmetric, scheme.lm_head, scheme.dynamic)):
        raise InputError("symmetric, lm_head and dynamic must be true or false.")
    for name, flag in FLAGS.items():
        given = getattr(scheme, name) != getattr(Scheme, name)
        if given and name not in FORMATS[scheme.mode].settings:
            modes = " and ".join(mode for mode, form in FORMATS.items() if name in form.settings)
            raise InputError(f"--{flag} concerns --mode {modes}, not {scheme.mode}.")


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


@dataclass(frozen=True)
class Kernel:
    """A product (x, weight, scales, n) -> y of packed weights that is faster than `default_product`."""

    product: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    prepare: Callable[[], None] = lambda: None  # builds it; raises InputError where it cannot be had
    lay_out: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda *packed: packed  # as it reads them
    most_rows: int = sys.maxsize  # of x, more go to the default: then `lay_out` must be the identity


Packed = tuple[torch.dtype, tuple[int, ...]]  # type and shape


@dataclass(frozen=True)
class Format:
    """How a mode packs weights (N, K), each row by itself; K is a multiple of unit(scheme).

    pack: fp32 (N, K), that it may overwrite, and the largest magnitude of each row (N,) -> packed weight and
    scales, (N, ...) each.
    unpack: what these stand for, fp32 (N, K). shapes: types and shapes of both, for N and K. unit: columns
    that are kept together. settings: fields of a scheme that concern the mode. kernels: by type of device,
    or "dynamic" for quantised activations. capability: what a GPU needs to have such numbers.
    """

    pack: Callable[[Tensor, Tensor, Scheme], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor], Tensor]
    shapes: Callable[[int, int, Scheme], tuple[Packed, Packed]]
    unit: Callable[[Scheme], int] = lambda scheme: COLUMNS
    settings: tuple[str, ...] = ()
    kernels: dict[str, Kernel] = field(default_factory=dict)
    capability: tuple[int, int] = (0, 0)


def format_by_rows(dtype: torch.dtype, largest: float, **more) -> Format:
    """One fp32 scale a row: a weight is q * scale, q of a type whose largest number is `largest`."""

    def pack(w: Tensor, peaks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        scales = (peaks / largest).clamp(min=1e-30)
        q = w.div_(scales[:, None])
        return (q if dtype.is_floating_point else q.round_()).to(dtype), scales

    def unpack(weight: Tensor, scales: Tensor) -> Tensor:
        return weight.float().mul_(scales[:, None])

    def shapes(n: int, k: int, scheme: Scheme) -> tuple[Packed, Packed]:
        return (dtype, (n, k)), (torch.float32, (n,))

    return Format(pack, unpack, shapes, **more)


def quantize_groups(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Groups (N, groups, size) -> q in 0..15, and scales (N, groups, 2) in bf16: scale and offset.

    For each of CLIPS the range is shrunk, and scale and offset fitted to the q that it gives by least
    squares; the best by the error weighted with the weight's own square (large weights matter more) is kept.
    """
    importance = w.square() + 1e-12
    low, high = w.amin(-1), w.amax(-1)
    best, q_best = torch.full_like(low, float("inf")), torch.zeros_like(w, dtype=torch.uint8)
    scale_best, offset_best = torch.zeros_like(low), torch.zeros_like(low)
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
        scale_best = torch.where(better, scale, scale_best)
        offset_best = torch.where(better, offset, offset_best)
    return q_best, torch.stack([scale_best, offset_best], -1).bfloat16()


def to_levels(w: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The nearest of the 16 levels, as floats."""
    return ((w - offset[..., None]) / scale[..., None].clamp(min=1e-30)).round().clamp(0, 15)


def fit(
    w: Tensor, q: Tensor, importance: Tensor, scale: Tensor, offset: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset (N, groups) of least weighted error for given levels; kept where undetermined."""
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
    """q (N, K) of 0..15 -> (N, K / 2): of 32 columns i, 8 + i, 16 + i and 24 + i in the 16 bits number i,
    the first in the lowest."""
    a, b, c, d = q.to(torch.uint8).unflatten(1, (-1, 4, 8)).unbind(2)
    return torch.stack([a | b << 4, c | d << 4], -1).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    low, high = packed.unflatten(1, (-1, 8, 2)).unbind(-1)
    return torch.stack([low & 15, low >> 4, high & 15, high >> 4], 2).flatten(1)


def pack_groups(w: Tensor, peaks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """int4: (N, K / 2) uint8, and a scale and an offset a group, (N, K / group, 2) bf16.

    A weight is q * scales[..., 0] + scales[..., 1]; when symmetric the latter is -8 times the former. Scales
    that others have published may need fp32.
    """
    q, scales = quantize_groups(w.unflatten(1, (-1, scheme.group_size)), scheme.symmetric)
    return pack_int4(q.flatten(1)), scales


def unpack_groups(weight: Tensor, scales: Tensor) -> Tensor:
    q = unpack_int4(weight).float().unflatten(1, (scales.shape[1], -1))
    return q.mul_(scales[..., :1].float()).add_(scales[..., 1:].float()).flatten(1)


def shapes_of_groups(n: int, k: int, scheme: Scheme) -> tuple[Packed, Packed]:
    kind = torch.float32 if scheme.wide else torch.bfloat16
    return (torch.uint8, (n, k // 2)), (kind, (n, k // scheme.group_size, 2))


def tiles_of_bytes(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Packed weights, rows padded, as kernels.cpp reads them: blocks of 16 rows, in lines of 64 bytes.

    A line holds 4 columns, four times the first two of 4 rows and the other two of these rows; a byte is a
    sign and 7 bits of magnitude, as fp8 has it.
    """
    lines = weight.view(torch.int16).view(len(weight) // 16, 4, 4, -1, 2).permute(0, 3, 1, 4, 2).contiguous()
    return lines.view(weight.dtype).view(weight.shape), scales


def tiles_of_int8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`tiles_of_bytes` of numbers that have no sign bit yet."""
    magnitude = weight.abs().view(torch.uint8) & 127  # of -128 none is left: it is a sign without a magnitude
    signed = magnitude | weight.view(torch.uint8) & 128
    kind = torch.uint8 if weight.numel() and weight.amin() == -128 else torch.int8  # it takes a little longer
    return tiles_of_bytes(signed.view(kind), scales)


def tiles_of_groups(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """int4: of 16 rows a line holds 8 columns, of each row 32 bits, columns 2p and 2p + 1 in bits 4p and
    4p + 16; scales and offsets lie by blocks of 16 rows, too."""
    two = (
        unpack_int4(weight).view(torch.int16).view(len(weight) // 16, 16, -1, 4).int()
    )  # columns, a byte each
    p = (two & 15 | (two & 0xF00) << 8).unbind(-1)
    lines = (p[0] | p[1] << 4 | p[2] << 8 | p[3] << 12).transpose(1, 2).contiguous()
    pairs = scales.unflatten(0, (-1, 16)).transpose(1, 2)
    if scales.dtype == torch.float32:  # 16 scales, then 16 offsets
        pairs = pairs.transpose(2, 3)
    pairs = pairs.contiguous()
    return lines.view(torch.uint8).view(weight.shape), pairs.view(scales.shape)


def need_cpp() -> None:
    kernels.use_cpu_kernels()
    if kernels.cpu_kernels is None:
        why = kernels.why_not
        raise InputError(f"Quantised weights on a CPU need kernels.cpp, which could not be built: {why}.")


def need_triton() -> None:
    if kernels.triton is None:
        raise InputError("Quantised weights on a GPU need the package triton; pip install triton.")


def own_kernels(mode: str, bits: int, tiles: Callable) -> dict[str, Kernel]:
    """Those of kernels.cpp, for any number of rows in tiles, and of Triton, for the rows of a step."""
    return {
        "cpu": Kernel(
            lambda *packed: getattr(kernels.cpu_kernels, f"linear_{mode}")(*packed), need_cpp, tiles
        ),
        "cuda": Kernel(
            lambda *packed: kernels.few_rows(*packed, bits), need_triton, most_rows=kernels.MOST_ROWS
        ),
    }


FORMATS = {
    "int8": format_by_rows(torch.int8, 127.0, kernels=own_kernels("int8", 8, tiles_of_int8)),
    "int4": Format(
        pack_groups, unpack_groups, shapes_of_groups, lambda scheme: scheme.group_size,
        settings=("group_size", "symmetric"), kernels=own_kernels("int4", 4, tiles_of_groups),
    ),
    "fp8": format_by_rows(
        torch.float8_e4m3fn, 448.0, settings=("dynamic",), capability=(8, 9),
        kernels=own_kernels("fp8", 8, tiles_of_bytes) | {"dynamic": Kernel(kernels.scaled_product)},
    ),
}  # fmt: skip


def kernel_for(scheme: Scheme, device: torch.device) -> Kernel | None:
    """What multiplies by a scheme's weights there; None: `default_product`."""
    return FORMATS[scheme.mode].kernels.get("dynamic" if scheme.dynamic else device.type)


def padded(k: int, scheme: Scheme) -> int:
    """K columns, and what they lack of a whole number of units."""
    return k + -k % FORMATS[scheme.mode].unit(scheme)


def packed_shapes(shape: tuple[int, ...], scheme: Scheme) -> dict[str, Packed]:
    """Type and shape of what stands for a weight (N, K) in a file, by the suffix of its name."""
    n, k = shape
    return dict(zip(("", "_scale"), FORMATS[scheme.mode].shapes(n, padded(k, scheme), scheme)))


def quantize(
    weight: Tensor, scheme: Scheme, whole_row: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """weight (N, K), any float type -> packed weight and scales as `packed_shapes` has them.

    whole_row: where these are some columns of a weight, gives the largest of all columns from the largest of
    these (N,), so that their scales are those of the whole rows.
    """
    form, (n, k) = FORMATS[scheme.mode], weight.shape
    rows = max(1, AT_A_TIME[weight.device.type] // padded(k, scheme))
    peaks = torch.cat([part.float().abs().amax(1) for part in weight.split(rows)])
    if not peaks.isfinite().all():
        raise InputError(
            "A weight that is to be quantised holds a NaN or an infinite number; mend the checkpoint."
        )
    if whole_row is not None:
        peaks = whole_row(peaks)
    kinds = packed_shapes(weight.shape, scheme).values()
    packed, scales = (torch.empty(size, dtype=dtype, device=weight.device) for dtype, size in kinds)
    for at in range(0, n, rows):
        some = slice(at, at + rows)
        wide = F.pad(weight[some].float(), (0, padded(k, scheme) - k))  # a copy in any case
        packed[some], scales[some] = form.pack(wide, peaks[some], scheme)
    return packed, scales


def slice_rows(columns: int) -> int:
    """Rows of a matrix that are unpacked at a time."""
    return max(ROWS, SLICE // max(1, columns) // ROWS * ROWS)


def product_in_slices(x: Tensor, weight: Tensor, scales: Tensor, n: int, mode: str) -> Tensor:
    """x (..., k) times packed weights (N, ...), unpacked slice by slice -> (..., n), of x's type."""
    y, k = x.new_empty(*x.shape[:-1], n), x.shape[-1]
    rows, unpack = slice_rows(k), FORMATS[mode].unpack
    for begin in range(0, n, rows):
        end = min(n, begin + rows)
        y[..., begin:end] = F.linear(x, unpack(weight[begin:end], scales[begin:end])[:, :k].to(x.dtype))
    return y


@torch.library.custom_op("judge_fast::default_product", mutates_args=())
def default_product(x: Tensor, weight: Tensor, scales: Tensor, n: int, mode: str) -> Tensor:
    """`product_in_slices`, as one operation of a compiled step."""
    return product_in_slices(x, weight, scales, n, mode)


@default_product.register_fake
def default_shape(x: Tensor, weight: Tensor, scales: Tensor, n: int, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


class QuantLinear(nn.Module):
    """A linear layer of packed weights, laid out for a kernel if its format has one for their device.

    n_out and n_in are the sizes without the padding of packing.
    """

    def __init__(self, weight: Tensor, scales: Tensor, n_out: int, n_in: int, scheme: Scheme):
        super().__init__()
        self.n_out, self.n_in, self.mode = n_out, n_in, scheme.mode
        self.bias: nn.Parameter | None = None  # never quantised
        self.kernel = kernel_for(scheme, weight.device)
        packed = pad_rows(weight), pad_rows(scales)
        weight, scales = self.kernel.lay_out(*packed) if self.kernel is not None else packed
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """x (..., n_in), fp32 or bf16, to which `norm` is applied first -> (..., n_out)."""
        x = x if norm is None else norm(x)
        if x.numel() == 0:  # the LM head in a prefill
            return x.new_empty(*x.shape[:-1], self.n_out)
        if self.kernel is not None and x.numel() // self.n_in <= self.kernel.most_rows:
            y = self.kernel.product(x, self.weight, self.scales, self.n_out)
        else:
            y = default_product(x, self.weight, self.scales, self.n_out, self.mode)
        return y if self.bias is None else y + self.bias


def pad_rows(x: Tensor) -> Tensor:
    """x with rows of zeros up to a multiple of ROWS, contiguous."""
    missing = -x.shape[0] % ROWS
    if not missing:
        return x.contiguous()
    return torch.cat([x, torch.zeros(missing, *x.shape[1:], dtype=x.dtype, device=x.device)])


def is_quantized(row: Row, scheme: Scheme, name: str = "") -> bool:
    """name: the published one; it may be left out where quantize.py quantises, since that keeps none."""
    return (row.quantized == "always" or (row.quantized == "with LM head" and scheme.lm_head)) and (
        name not in scheme.kept
    )


def completer(
    args: ModelArgs, scheme: Scheme, shard: Shard | None = None
) -> Callable[[Transformer, str], None]:
    """What quantises a model's layers, each as soon as it is filled: `complete` of load_published."""
    rows = {row.ours: row for row in weight_plan(args).values()}

    def complete(model: Transformer, parameter: str) -> None:
        model.quantization = str(scheme)
        row = rows[parameter]
        if is_quantized(row, scheme):
            weight = model.get_parameter(parameter)
            whole_row = shard.largest if shard is not None and row.cut == "columns" else None
            replace_linear(model, parameter, quantize(weight, scheme, whole_row), weight.shape, scheme)

    return complete


def replace_linear(
    model: Transformer, parameter: str, packed: tuple[Tensor, Tensor], shape: tuple[int, int], scheme: Scheme
) -> None:
    """Puts a quantised layer in the place of the one that has this weight, and lets the weight go."""
    put_in_place(model, parameter, QuantLinear(*packed, *shape, scheme))


def put_in_place(model: Transformer, parameter: str, product: nn.Module) -> None:
    """Puts a product in the place of the linear layer that has this weight, whose bias it takes over."""
    name = parameter.removesuffix(".weight")
    product.bias = model.get_submodule(name).bias
    model.set_submodule(name, product)


def prepare(device: torch.device, scheme: Scheme) -> None:
    """Builds what products of packed weights need; raises InputError where that cannot be had."""
    check_device(device, scheme)
    kernel = kernel_for(scheme, device)
    if kernel is not None:
        kernel.prepare()


def check_device(device: torch.device, scheme: Scheme | None) -> None:
    """Raises InputError for a scheme whose numbers a GPU does not have."""
    if scheme is None or device.type != "cuda":
        return
    found, needed = torch.cuda.get_device_capability(device), FORMATS[scheme.mode].capability
    if found < needed:
        found, needed = (".".join(map(str, version)) for version in (found, needed))
        raise InputError(
            f"--mode {scheme.mode} needs a GPU of compute capability {needed} or more; {device} has {found}: "
            f"use int8 or int4."
        )


def check_lm_head(args: ModelArgs, scheme: Scheme) -> None:
    if scheme.lm_head and args.tie_embeddings:
        raise InputError(
            "--quantize_lm_head: this LM head is the embedding, which stays as it is; leave the flag out."
        )


def check_columns(args: ModelArgs, world: int, scheme: Scheme) -> None:
    """Raises InputError where ranks would cut columns that packing and scales keep together."""
    unit = FORMATS[scheme.mode].unit(scheme)
    cut = {name: row for name, row in layer_plan(args, 0).items() if row.cut == "columns"}
    for name, row in cut.items():
        for rank in range(world):
            span, size = Shard(rank, world).part(args, row)[1], row.shape[1]
            if span.start % unit or (span.stop % unit and span.stop != size):
                raise InputError(
                    f"{world} ranks would cut quantised {name.removesuffix('.weight')} from column "
                    f"{span.start} to {span.stop} of {size}, but its packing and scales need multiples of "
                    f"{unit}; start fewer ranks, or quantise otherwise."
                )


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config.json has been read: shape, and how it is packed where it is quantised."""

    folder: Path
    args: ModelArgs
    scheme: Scheme | None = None
    fingerprint: str = ""  # of the unquantised model, where `convert` wrote the folder
    layout: published.Layout | None = None  # where others did


def open_checkpoint(folder: str | Path | Checkpoint) -> Checkpoint:
    """Reads config.json; what is open already stays as it is. Raises InputError for what cannot be read."""
    if isinstance(folder, Checkpoint):
        return folder
    folder = model_folder(folder)
    path = folder / "config.json"
    config = read_json(path)
    args, found = args_of(config, str(path)), config.get("judge_fast")
    if foreign := config.get("quantization_config"):
        layout = published.layout_of(foreign, str(path))
        return Checkpoint(folder, args, published_scheme(folder, args, layout), layout=layout)
    return Checkpoint(folder, args, *(read_entry(found, path) if found is not None else ()))


def published_scheme(folder: Path, args: ModelArgs, layout: published.Layout) -> PublishedScheme:
    """What a folder's files say of its weights: which are quantised, and whether bf16 holds their scales.

    Raises InputError as `checkpoint.find_weights` does, and where none is quantised.
    """
    files, sign = checkpoint.find_weights(folder, args, layout.suffixes), layout.suffixes[0]
    may = [name for name, row in weight_plan(args).items() if row.quantized != "never"]
    there = [name for name in may if name.removesuffix(".weight") + sign in files]
    if not there:
        raise InputError(
            f"{folder}: config.json says quantization_config of {layout.name}, but no tensor *{sign} "
            f"is there; remove that entry, or download the folder again."
        )
    places = [name.removesuffix(".weight") + layout.scales for name in there]
    if lost := next((place for place in places if place not in files), None):
        raise InputError(f"{folder} has no tensor {lost}, which its quantised weights need.")
    scales = {checkpoint.Stored(*files[place]).dtype for place in places}
    wide = layout.mode == "int4" and not (layout.symmetric and scales == {torch.bfloat16})
    group = layout.unit if layout.mode == "int4" else Scheme.group_size
    kept = frozenset(may) - {*there}
    return PublishedScheme(
        layout.mode, group, lm_head=checkpoint.LM_HEAD in there, wide=wide, kept=kept, kind=layout.name
    )


def read_entry(found, path: Path) -> tuple[Scheme, str]:
    """Scheme and the unquantised model's fingerprint from what `convert` adds to a configuration."""
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


def load_model(
    folder: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    scheme: Scheme | None = None, shard: Shard | None = None,
) -> Transformer:  # fmt: skip
    """Loads a published folder, quantised on the way if there is a scheme, or one that is quantised already.

    dtype: of activations, caches and what is not quantised. shard: loads only that part, whose packed weights
    and scales are the slices of the whole's. Raises InputError as `checkpoint.load_published` does, and when
    folder, scheme and shard do not fit.
    """
    source, device = open_checkpoint(folder), torch.device(device)
    if source.scheme is not None and scheme not in (None, source.scheme):
        raise InputError(f"{source.folder} holds {source.scheme} weights already; leave --mode out.")
    scheme = source.scheme or scheme
    if scheme is None:
        return checkpoint.load_published(source.folder, source.args, device, dtype, shard=shard)
    check_scheme(scheme)
    check_lm_head(source.args, scheme)
    if device.type == "cpu" and dtype == torch.float16:
        raise InputError(
            "Quantised weights on a CPU run in fp32 or bf16, not in fp16; choose another --precision."
        )
    if shard is not None:
        check_columns(source.args, shard.world, scheme)
    prepare(device, scheme)
    if source.scheme is not None:
        return load_packed(source, device, dtype, shard)
    complete = completer(source.args, scheme, shard)
    return checkpoint.load_published(source.folder, source.args, device, dtype, complete, shard)


def grouped_plan(args: ModelArgs) -> dict[str, dict[str, Row]]:
    """Our parameters -> the published tensors that they are made of, from top to bottom."""
    groups: dict[str, dict[str, Row]] = {}
    for name, row in weight_plan(args).items():
        groups.setdefault(row.ours, {})[name] = row
    return groups


def packed_part(
    part: tuple[slice, ...], shape: tuple[int, ...], scheme: Scheme
) -> dict[str, tuple[slice, ...]]:
    """What a part of a weight (N, K) is of its packed weight and scales: columns need all scales of rows."""
    if len(part) < 2:
        return {"": part, "_scale": part}
    (rows, columns), k = part, padded(shape[1], scheme)
    stop = min(padded(columns.stop, scheme), k)
    return {
        suffix: (rows, slice(columns.start * size[1] // k, stop * size[1] // k)) if len(size) > 1 else ()
        for suffix, (_, size) in packed_shapes(shape, scheme).items()
    }


def filled_up(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """x with zeros after its last rows and columns, up to a size."""
    if x.shape == size:
        return x
    whole = torch.zeros(size, dtype=x.dtype, device=x.device)
    whole[tuple(slice(length) for length in x.shape)] = x
    return whole


def load_packed(
    source: Checkpoint, device: torch.device, dtype: torch.dtype | None, shard: Shard | None
) -> Transformer:
    """Loads a folder that is quantised already, by `convert` or by others."""
    folder, args, scheme, layout = source.folder, source.args, source.scheme, source.layout
    local, groups = shard.local(args) if shard else args, grouped_plan(args)
    reader, read = checkpoint.Reader(folder, files_of(source)), read_ours if layout is None else read_theirs
    model, places = empty_model(args, local), weight_plan(local)
    progress = Progress(f"loading {folder}", len(groups))

    for ours, tensors in groups.items():
        parts: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        for name, row in tensors.items():
            part = shard.part(args, row) if shard else ()
            if is_quantized(row, scheme, name):
                sizes = packed_shapes(places[name].shape, scheme).values()
                found = read(source, reader, name, row, part, device)
                parts[name] = tuple(filled_up(each, size) for each, (_, size) in zip(found, sizes))
            else:
                parts[name] = reader.read(name, row.shape, part=part)
                dtype = dtype or checkpoint.run_as(parts[name].dtype)
        put(
            model, ours, {name: (places[name], found) for name, found in parts.items()}, scheme, dtype, device
        )
        progress.step()

    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.fingerprint = source.fingerprint or published_fingerprint(source, reader)
    model.quantization, model.bytes_read = str(scheme), reader.bytes_read
    return model.eval()


def files_of(source: Checkpoint) -> dict[str, tuple[Path, str]]:
    """Tensor name -> its file, and its name there, of a folder that is quantised already."""
    if source.layout is not None:
        return checkpoint.find_weights(source.folder, source.args, source.layout.suffixes)
    files = checkpoint.checkpoint_files(source.folder)
    checkpoint.check_layers(files, source.args, source.folder)
    return {name: (file, name) for name, file in files.items()}


def read_ours(
    source: Checkpoint,
    reader: checkpoint.Reader,
    name: str,
    row: Row,
    part: tuple[slice, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Packed weight and scales of a matrix, or of the part, as `convert` wrote them."""
    slices = packed_part(part, row.shape, source.scheme)
    return tuple(
        reader.read(name + suffix, size, kind, slices[suffix]).to(device)
        for suffix, (kind, size) in packed_shapes(row.shape, source.scheme).items()
    )


def read_theirs(
    source: Checkpoint,
    reader: checkpoint.Reader,
    name: str,
    row: Row,
    part: tuple[slice, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Packed weight and scales of a matrix, or of the part, from numbers that others have published."""
    scheme, tensors = source.scheme, published.Tensors(reader, device)
    q, scales, zeros = source.layout.read(tensors, name, row.shape, part)
    missing, scales = padded(q.shape[1], scheme) - q.shape[1], scales.float()
    q = F.pad(q.view(torch.uint8), (0, missing)).view(q.dtype) if missing else q
    if zeros is None:
        return q, scales.flatten()
    kind = torch.float32 if scheme.wide else torch.bfloat16
    return pack_int4(q), torch.stack([scales, -zeros.float() * scales], -1).to(kind)


def put(
    model: Transformer, ours: str, parts: dict, scheme: Scheme, dtype: torch.dtype, device: torch.device
) -> None:
    """Fills our parameter from its parts, each with its place: a tensor, or packed weight and scales.

    Where only some parts of a fused matrix are quantised, each stays a product of its own.
    """
    packed = [isinstance(found, tuple) for _, found in parts.values()]
    if not any(packed):
        for place, tensor in parts.values():
            checkpoint.fill(materialise(model, ours, dtype, device), place, tensor)
        return
    if all(packed):
        rows, columns = (
            sum(place.shape[0] for place, _ in parts.values()),
            next(iter(parts.values()))[0].shape[1],
        )
        weight, scales = (torch.cat(each) for each in zip(*(found for _, found in parts.values())))
        replace_linear(model, ours, (weight, scales), (rows, columns), scheme)
        return
    products = []
    for place, found in parts.values():
        if isinstance(found, tuple):
            products.append(QuantLinear(*found, *place.shape, scheme))
        else:
            with torch.device("meta"):
                products.append(Linear(*place.shape[::-1]))
            weight = filled_up(found, place.shape).to(device, dtype)
            products[-1].weight = nn.Parameter(weight, requires_grad=False)
    put_in_place(model, ours, Mixed(products))


class Mixed(nn.Module):
    """A fused matrix of which only some parts are quantised: products side by side."""

    def __init__(self, products: list[nn.Module]):
        super().__init__()
        self.products = nn.ModuleList(products)
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        y = torch.cat([product(x) for product in self.products], -1)
        return y if self.bias is None else y + self.bias


def published_fingerprint(source: Checkpoint, reader: checkpoint.Reader) -> str:
    """Of a folder that others have quantised: from all tensors of its matrices, as they lie on disk."""
    digest = checkpoint.new_digest(source.args)
    for name in weight_plan(source.args):
        stem = name.removesuffix(".weight")
        for other in (name, *(stem + suffix for suffix in source.layout.suffixes)):
            if other in reader.files:
                stored = reader.stored(other)
                digest.update(checkpoint.sample_of(None, tuple(stored.shape), stored))
                reader.bytes_read += checkpoint.SAMPLES * stored.dtype.itemsize
    return digest.hexdigest()[:16]


def convert(folder: Path, out: Path, scheme: Scheme) -> None:
    """Writes a quantised copy of a published folder, one layer a file; a killed run goes on where it stopped.

    All is written to `out`.partial, which is renamed at the end; meanwhile no other process writes there.
    Memory: the largest layer. Raises InputError, before any work, for an `out` that is there, save where a
    run was killed when it had only to tidy up.
    """
    check_scheme(scheme)
    source = open_checkpoint(folder)
    folder = source.folder
    check_lm_head(source.args, scheme)
    if source.scheme is not None:
        raise InputError(f"{folder} is quantised already ({source.scheme}); name the unquantised folder.")
    work = out.with_name(out.name + ".partial")
    if is_complete(out, source, scheme):
        print(f"{out} is complete: {scheme}; an earlier run had written all of it.", file=sys.stderr)
        return
    check_new_folder(out, "--out", beside=work)
    files = checkpoint.find_weights(folder, source.args)
    fingerprint = checkpoint.fingerprint_of(folder, source.args)
    entry = {"scheme": asdict(scheme), "packing": PACKING, "fingerprint": fingerprint}
    with start_or_resume(work, entry, out):
        index = write_shards(source, work, files, scheme)
        finish(folder, work, index, entry)
        try:
            os.replace(work, out)  # what is missing before it is made again, after it nothing is
            (out / SETTINGS).unlink()
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}.") from None
    read = {file for file, _ in files.values()}, set(checkpoint.checkpoint_files(out).values())
    sizes = [sum(file.stat().st_size for file in found) for found in read]
    print(f"{out}: {scheme}, {sizes[1] / 1e9:.3f} GB of weights, of {sizes[0] / 1e9:.3f} GB", file=sys.stderr)


SETTINGS = "settings.json"  # what an unfinished run is doing


def is_complete(out: Path, source: Checkpoint, scheme: Scheme) -> bool:
    """Whether a run was killed between the folder's new name and the end: removes what it would have.

    Raises InputError where the folder is complete and nothing is left to do.
    """
    if not os.path.isfile(out / "config.json"):
        return False
    entry = {"scheme": asdict(scheme), "packing": PACKING}
    try:
        found = read_json(out / "config.json").get("judge_fast")
        same = isinstance(found, dict) and {name: found.get(name) for name in entry} == entry
        if not same or found.get("fingerprint") != checkpoint.fingerprint_of(source.folder, source.args):
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
        if out.exists() or not work.exists():  # another process has finished it before we had the lock
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


def write_shards(source: Checkpoint, work: Path, files: dict, scheme: Scheme) -> dict[str, str]:
    """One file a layer and one for the rest, unless they are there already -> tensor name to file."""
    args = source.args
    shards = [top_plan(args), *(layer_plan(args, i) for i in range(args.n_layer))]
    progress, index = Progress(f"quantising {source.folder}", len(shards)), {}
    for number, rows in enumerate(shards, 1):
        file = work / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not file.exists():
            write_shard(file, rows, checkpoint.Reader(source.folder, files), scheme)
        index |= dict.fromkeys(checkpoint.safetensors_header(file)[1], file.name)
        progress.step()
    return index


def write_shard(file: Path, rows: dict[str, Row], reader: checkpoint.Reader, scheme: Scheme) -> None:
    """One file of quantised and unquantised tensors, written beside and renamed."""
    content = {}
    for name, row in rows.items():
        tensor = reader.read(name, row.shape)
        if is_quantized(row, scheme):
            content |= dict(zip((name, name + "_scale"), quantize(tensor, scheme)))
        else:
            content[name] = tensor
    write_tensors(file, content)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, written beside and renamed. Raises InputError on a full disk."""
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
    for tensor in {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
    largest_first = sorted(kinds.items(), key=lambda item: -item[1])
    weights = ", ".join(f"{size / 1e6:,.1f} MB {kind}" for kind, size in largest_first)
    caches = model.local.cache_bytes(model.cache_length, model.dtype)
    return f"{name}: weights {weights}; caches {caches / 1e6:,.1f} MB"


def weight_bytes(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """Bytes of a model's weights, those that are not quantised in `dtype`."""
    total = 0
    for name, row in weight_plan(args).items():
        quantized = scheme is not None and is_quantized(row, scheme, name)
        kinds = packed_shapes(row.shape, scheme).values() if quantized else [(dtype, row.shape)]
        total += sum(kind.itemsize * math.prod(size) for kind, size in kinds)
    return total


def packed_matrices(args: ModelArgs, scheme: Scheme | None) -> list[tuple[int, int]]:
    """(N, K) of a model's quantised matrices, K padded."""
    parts = [
        [row for name, row in tensors.items() if scheme is not None and is_quantized(row, scheme, name)]
        for tensors in grouped_plan(args).values()
    ]
    return [(sum(row.shape[0] for row in rows), padded(rows[0].shape[1], scheme)) for rows in parts if rows]


def packing_bytes(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None, device: str) -> int:
    """The most that quantising while loading takes beside `weight_bytes`: a layer before it is quantised,
    copies while it is put into tiles or padded, and the numbers that are packed at a time."""
    sizes = [n * k for n, k in packed_matrices(args, scheme)]
    copies = 8 if device == "cpu" else 2
    return max(sizes) * (dtype.itemsize + copies) + 48 * AT_A_TIME[device] if sizes else 0


def slice_bytes(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None, rows: int) -> int:
    """The most that `product_in_slices` of so many rows takes beside its result: a slice unpacked, in fp32
    and in `dtype`, and its product."""
    sizes = [(min(n + -n % ROWS, slice_rows(k)), k) for n, k in packed_matrices(args, scheme)]
    return max((some * (k * 10 + rows * dtype.itemsize) for some, k in sizes), default=0)


def add_mode_flags(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The flags that name a scheme."""
    add = parser.add_argument
    add("--mode", choices=tuple(FORMATS), required=required, help="quantise the weights so")
    if not required:
        add("--draft_mode", choices=tuple(FORMATS), help="quantise the draft's weights so")
    columns = "int4: columns that share a scale: 32, 64 or 128"
    add("--group_size", type=whole(1, 1024), default=32, help=columns)
    add("--symmetric", action="store_true", help="int4: scales without offsets")
    add("--quantize_lm_head", action="store_true", help="the LM head, too")
    add("--dynamic_activations", action="store_true", help="fp8: quantise activations, too, token by token")


def scheme_of(args: argparse.Namespace, whose: str = "") -> Scheme | None:
    """The scheme of a command line with `add_mode_flags`, None where it names no mode.

    whose: "draft_" for that of --draft_mode. A setting that concerns only the other model's mode is left out.
    """
    mode = getattr(args, whose + "mode", None)
    settings = {name: getattr(args, flag) for name, flag in FLAGS.items()}
    if not mode:
        given = [FLAGS[name] for name, value in settings.items() if value != getattr(Scheme, name)]
        given += ["quantize_lm_head"] * args.quantize_lm_head
        if given and not any(getattr(args, name, None) for name in ("mode", "draft_mode", "modes")):
            raise InputError(
                f"--{given[0]} says how to quantise; give --mode or --draft_mode, or leave it out."
            )
        return None
    modes = {args.mode, getattr(args, "draft_mode", None)} - {mode, None}
    others = {name for other in modes for name in FORMATS[other].settings} - {*FORMATS[mode].settings}
    kept = {name: value for name, value in settings.items() if name not in others}
    scheme = Scheme(mode, **kept, lm_head=args.quantize_lm_head)
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
