"""Weights as others quantise and publish them: what config.json says of them, and where the numbers lie.

fbgemm_fp8 (Meta's own FP8 folders), compressed-tensors (FP8, int8 and int4, as llm-compressor writes them),
GPTQ and AWQ of 4 bits. Each `Layout` gives the numbers of a matrix, or of a rank's part of it, as they are on
disk: quantize.py packs these, and nothing is dequantised on the way. What is not read is refused by name. A
folder may be quantised in part: what is, its files say.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from cli import InputError, shortened_value

READ = (
    "read are fbgemm_fp8, compressed-tensors (FP8, int8, int4), and gptq and awq of 4 bits; take such a "
    "folder, or the unquantised one with --mode"
)
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of 8 rows in a word: row i lies in the 4 bits of this number


class Numbers(NamedTuple):
    """A matrix (N, K), or a part of it: a weight is (q - zero) * scale of its row and group of columns."""

    q: Tensor  # (N, K): e4m3, int8, or uint8 of 0 to 15
    scales: Tensor  # (N, groups), of any float type
    zeros: Tensor | None = None  # (N, groups); None: all 0


class Span(NamedTuple):
    """A part of a matrix: first and one past the last row (n) and column (k)."""

    n: tuple[int, int]
    k: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How a folder keeps its quantised matrices.

    name: for people. mode: of quantize.FORMATS. group: columns that share a scale, None: all of a row.
    suffixes: of the tensors of a matrix, after its name without ".weight"; where the first is there, the
    matrix is quantised. numbers: (layout, tensors, name without ".weight", (N, K), span) -> its numbers.
    """

    name: str
    mode: str
    group: int | None
    suffixes: tuple[str, ...]
    numbers: Callable[["Layout", "Tensors", str, tuple[int, int], Span], Numbers]
    symmetric: bool = True
    bits: int = 4
    first_zero: int = 1  # gptq: what stands for a stored zero of 0

    @property
    def scales(self) -> str:
        """The suffix of the scales."""
        return next(suffix for suffix in self.suffixes if suffix in (".scales", ".weight_scale"))

    @property
    def unit(self) -> int:
        """Columns that share a scale once they are packed: 32, 64 or 128."""
        return 128 if self.group is None else next(unit for unit in (128, 64, 32) if self.group % unit == 0)

    def groups(self, k: int) -> int:
        return 1 if self.group is None else -(-k // self.group)

    def read(self, tensors: "Tensors", name: str, shape: tuple[int, int], part: tuple[slice, ...]) -> Numbers:
        """A matrix's numbers, or those of the part. Raises InputError for numbers that stand for none."""
        n, k = (span.indices(size)[:2] for span, size in zip((*part, slice(None), slice(None)), shape))
        found = self.numbers(self, tensors, name.removesuffix(".weight"), shape, Span(n, k))
        nan = (
            found.q.dtype == torch.float8_e4m3fn
            and found.q.numel()
            and (found.q.view(torch.uint8) & 127).amax() == 127
        )
        if nan or not found.scales.isfinite().all():
            raise InputError(
                f"{tensors.reader.folder}: {name} holds a NaN or an infinite number; mend the checkpoint."
            )
        return found


class Tensors(NamedTuple):
    """What layouts read from: a checkpoint.Reader, and where the numbers are unpacked."""

    reader: object
    device: torch.device

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, *spans: tuple[int, int]
    ) -> Tensor:
        """A tensor of that shape and type (None: floating), or a part of it."""
        part = tuple(slice(*span) for span in spans)
        while part and (part[-1].start, part[-1].stop) == (0, shape[len(part) - 1]):
            part = part[:-1]
        return self.reader.read(name, shape, dtype, part).to(self.device)


def covering(span: tuple[int, int], size: int) -> tuple[int, int]:
    """The whole words or groups of `size` that hold a span."""
    return span[0] // size, -(-span[1] // size)


def nibbles(words: Tensor) -> Tensor:
    """(..., n) words of 32 bits -> (..., 8 n) numbers of 0 to 15, from the lowest bits on."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)


def within(x: Tensor, span: tuple[int, int], size: int) -> Tensor:
    """Of the numbers in whole words, along the last dimension, those of the span."""
    first = span[0] % size
    return x[..., first : first + span[1] - span[0]]


def by_unit(layout: Layout, x: Tensor, k: tuple[int, int]) -> Tensor:
    """(N, groups that hold the columns k) -> (N, units): the scale of each unit that is packed by itself."""
    if layout.group is None:
        return x.expand(-1, -(-(k[1] - k[0]) // layout.unit))
    units = torch.arange(*k, layout.unit, device=x.device)
    return x[:, units // layout.group - k[0] // layout.group]


def groups_of(layout: Layout, k: tuple[int, int]) -> tuple[int, int]:
    return (0, 1) if layout.group is None else covering(k, layout.group)


# ---- A number a byte, a scale a row


def whole_numbers(layout: Layout, tensors: Tensors, name: str, shape: tuple[int, int], at: Span) -> Numbers:
    """fbgemm_fp8, and compressed-tensors' float-quantized and int-quantized: (N, K), and (N, 1) scales or one
    for all."""
    kind = torch.float8_e4m3fn if layout.mode == "fp8" else torch.int8
    return Numbers(
        tensors.take(name + ".weight", shape, kind, at.n, at.k), row_scales(tensors, name, shape, at)
    )


def row_scales(tensors: Tensors, name: str, shape: tuple[int, int], at: Span) -> Tensor:
    """One scale a row (N, 1), also where a file has one for the whole matrix."""
    place, rows = name + ".weight_scale", at.n[1] - at.n[0]
    stored = tuple(tensors.reader.stored(place).shape)
    if stored in ((), (1,)):
        return tensors.take(place, stored, None).reshape(1, 1).expand(rows, 1)
    wanted = stored if stored == shape[:1] else (shape[0], 1)
    return tensors.take(place, wanted, None, at.n).reshape(rows, 1)


# ---- Words of 32 bits


def compressed(layout: Layout, tensors: Tensors, name: str, shape: tuple[int, int], at: Span) -> Numbers:
    """compressed-tensors' pack-quantized: words along K, zeros along N; int8 and int4 are moved up by 128 and
    8."""
    (n, k), per = shape, 32 // layout.bits
    check_order(layout, tensors, name, ".weight_g_idx", k)
    words = tensors.take(name + ".weight_packed", (n, -(-k // per)), torch.int32, at.n, covering(at.k, per))
    if layout.bits == 8:
        q = within(words.view(torch.uint8) ^ 128, at.k, per).view(torch.int8)
        return Numbers(q, row_scales(tensors, name, shape, at))
    groups, some = layout.groups(k), groups_of(layout, at.k)
    scales = tensors.take(name + ".weight_scale", (n, groups), None, at.n, some)
    zeros = torch.full_like(scales, 8)
    if not layout.symmetric:
        packed = tensors.take(
            name + ".weight_zero_point", (-(-n // 8), groups), torch.int32, covering(at.n, 8), some
        )
        zeros = within(nibbles(packed.t()), at.n, 8).t()
    return Numbers(within(nibbles(words), at.k, 8), *(by_unit(layout, x, at.k) for x in (scales, zeros)))


def gptq(layout: Layout, tensors: Tensors, name: str, shape: tuple[int, int], at: Span) -> Numbers:
    """Words along K (K / 8, N), zeros along N (groups, N / 8), scales (groups, N)."""
    n, k = shape
    check_order(layout, tensors, name, ".g_idx", k)
    check_bias(tensors, name, n)
    words = tensors.take(name + ".qweight", (-(-k // 8), n), torch.int32, covering(at.k, 8), at.n)
    scales, zeros = scales_and_zeros(layout, tensors, name, shape, at)
    zeros = within(zeros, at.n, 8).t() + layout.first_zero
    return Numbers(within(nibbles(words.t()), at.k, 8), *(by_unit(layout, x, at.k) for x in (scales, zeros)))


def awq(layout: Layout, tensors: Tensors, name: str, shape: tuple[int, int], at: Span) -> Numbers:
    """Words along N (K, N / 8), as are the zeros, 8 rows in the order of AWQ_PLACES; scales (groups, N)."""
    n, k = shape
    words = tensors.take(name + ".qweight", (k, -(-n // 8)), torch.int32, at.k, covering(at.n, 8))
    scales, zeros = scales_and_zeros(layout, tensors, name, shape, at)
    q, zeros = (within(in_turn(x), at.n, 8).t() for x in (nibbles(words), zeros))
    return Numbers(q, *(by_unit(layout, x, at.k) for x in (scales, zeros)))


def in_turn(x: Tensor) -> Tensor:
    """AWQ's order in each word -> the rows' own."""
    return x.unflatten(-1, (-1, 8))[..., list(AWQ_PLACES)].flatten(-2)


def scales_and_zeros(
    layout: Layout, tensors: Tensors, name: str, shape: tuple[int, int], at: Span
) -> tuple[Tensor, Tensor]:
    """(N, groups) scales, and (groups, 8 words) zeros as they are stored, of GPTQ and AWQ."""
    (n, k), some = shape, groups_of(layout, at.k)
    scales = tensors.take(name + ".scales", (layout.groups(k), n), None, some, at.n).t()
    words = (layout.groups(k), -(-n // 8))
    return scales, nibbles(tensors.take(name + ".qzeros", words, torch.int32, some, covering(at.n, 8)))


def check_order(layout: Layout, tensors: Tensors, name: str, suffix: str, k: int) -> None:
    """Raises InputError where columns lie in groups otherwise than one after the other (act-order)."""
    if name + suffix not in tensors.reader.files:
        return
    found = tensors.take(name + suffix, (k,), torch.int32)
    if not torch.equal(found.long(), torch.arange(k, device=found.device) // (layout.group or k)):
        raise InputError(
            f"{tensors.reader.folder}: {name}{suffix} reorders the columns (act-order, desc_act), which "
            f"is not read; take a folder that was quantised without, or the unquantised one with --mode int4."
        )


def check_bias(tensors: Tensors, name: str, n: int) -> None:
    """Raises InputError for a bias that is not 0: older versions of AutoGPTQ write zeros for every matrix."""
    if name + ".bias" in tensors.reader.files and tensors.take(name + ".bias", (n,), None).any():
        raise InputError(
            f"{tensors.reader.folder}: {name}.bias is not 0; biases of quantised weights are not read."
        )


# ---- config.json

FBGEMM = Layout("fbgemm_fp8", "fp8", None, (".weight_scale", ".input_scale_ub"), whole_numbers)
BYTES = (".weight_scale", ".input_scale", ".weight_zero_point")
PACKED = (".weight_scale", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
GPTQ = Layout("gptq", "int4", None, (".qweight", ".qzeros", ".scales", ".g_idx", ".bias"), gptq, False)
AWQ = Layout("awq", "int4", None, (".qweight", ".qzeros", ".scales"), awq, False)


def layout_of(found, where: str) -> Layout:
    """What `quantization_config` says. Raises InputError, by name, for what is not read."""
    method = found.get("quant_method") if isinstance(found, dict) else found
    readers = {
        "fbgemm_fp8": lambda *_: FBGEMM,
        "compressed-tensors": read_compressed,
        "gptq": read_gptq,
        "awq": read_awq,
    }
    if not isinstance(found, dict) or not isinstance(method, str) or method not in readers:
        refuse(where, f"quantization method {shortened_value(method)}")
    return readers[method](found, where)


def refuse(where: str, what: str, instead: str = READ) -> NoReturn:
    raise InputError(f"{where}: {what} is not implemented; {instead}.")


def need(settings: dict, where: str, wanted: dict[str, tuple]) -> None:
    """Refuses the first setting that has none of the values wanted, of which the first is the default."""
    for name, values in wanted.items():
        if (value := settings.get(name, values[0])) not in values:
            refuse(where, f"{name}={shortened_value(value)}")


def read_group(value, where: str) -> int | None:
    """Columns that share a scale; None for -1 and null, all of a row."""
    if value in (None, -1):
        return None
    if type(value) is not int or not 0 < value < 2**24 or value % 32:
        refuse(where, f"group_size={shortened_value(value)}", "it must be a multiple of 32, or -1")
    return value


def read_gptq(found: dict, where: str) -> Layout:
    where = f"{where}: gptq"
    need({"bits": None} | found, where, {
        "bits": (4,), "checkpoint_format": ("gptq", "gptq_v2", None), "is_marlin_format": (False, None),
        "dynamic": (None, {}), "pack_dtype": ("int32",), "format": ("gptq", "gptq_v2", None),
    })  # fmt: skip
    first = 0 if "gptq_v2" in (found.get("checkpoint_format"), found.get("format")) else 1
    return replace(GPTQ, group=read_group(found.get("group_size", 128), where), first_zero=first)


def read_awq(found: dict, where: str) -> Layout:
    where = f"{where}: awq"
    lower = {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}
    need({"bits": found.get("w_bit")} | lower, where, {
        "bits": (4,), "version": ("gemm",), "format": ("gemm", None), "zero_point": (True,),
    })  # fmt: skip
    return replace(AWQ, group=read_group(found.get("group_size", found.get("q_group_size", 128)), where))


def read_compressed(found: dict, where: str) -> Layout:
    """The one kind of weights that all groups of a compressed-tensors configuration have."""
    where = f"{where}: compressed-tensors"
    sparse = found.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        refuse(where, f"sparsity_config={shortened_value(sparse)}")
    for name in ("kv_cache_scheme", "transform_config"):
        if found.get(name):
            refuse(where, f"{name}={shortened_value(found[name])}")
    need(found, where, {"quantization_status": ("compressed", "frozen")})
    groups = found.get("config_groups")
    if (
        not isinstance(groups, dict)
        or not groups
        or not all(isinstance(each, dict) for each in groups.values())
    ):
        raise InputError(f"{where}: config_groups={shortened_value(groups)} must name groups of modules.")
    layouts = [
        compressed_layout(group, group.get("format") or found.get("format"), where)
        for group in groups.values()
    ]
    if any(layout != layouts[0] for layout in layouts):
        refuse(where, "a mixture of several kinds of weights in one folder")
    return layouts[0]


def compressed_layout(group: dict, form, where: str) -> Layout:
    """One group of a compressed-tensors configuration."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        raise InputError(f"{where}: weights={shortened_value(weights)} must be an object of settings.")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    symmetric = weights.get("symmetric", True)
    said = {"format": form, "type": kind, "num_bits": bits, "strategy": strategy, "symmetric": symmetric}
    if weights.get("actorder") in ("group", True):
        refuse(where, "actorder=group (act-order)")
    if group.get("output_activations"):
        refuse(where, "output_activations")
    by_rows = strategy in ("channel", "tensor") and symmetric is True
    if (form, kind, bits) in (("float-quantized", "float", 8), ("naive-quantized", "float", 8)) and by_rows:
        return Layout("compressed-tensors", "fp8", None, BYTES, whole_numbers)
    if (form, kind, bits) == ("int-quantized", "int", 8) and by_rows:
        if inputs and not inputs.get("dynamic"):
            refuse(where, "W8A8 with static scales of activations")
        return Layout("compressed-tensors", "int8", None, BYTES, whole_numbers)
    if (form, kind, bits) == ("pack-quantized", "int", 8) and by_rows:
        return Layout("compressed-tensors", "int8", None, PACKED, compressed, bits=8)
    if (form, kind, bits) == ("pack-quantized", "int", 4) and strategy in ("group", "channel"):
        size = read_group(weights.get("group_size"), where) if strategy == "group" else None
        return Layout("compressed-tensors", "int4", size, PACKED, compressed, symmetric is True)
    return refuse(where, ", ".join(f"{name}={shortened_value(value)}" for name, value in said.items()))
