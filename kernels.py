"""The products and the attention of a few rows: where decoding spends its time, and what libraries are
slowest at.

`linear` multiplies up to 64 rows with a weight matrix: on a CPU by kernels.cpp, which is built on first use,
elsewhere and for more rows by PyTorch. `attend` is attention of a few rows over a KV cache on a GPU, by a
Triton kernel that reads from the device how far the text goes, so that one captured graph serves every
position. `few_rows` multiplies up to 64 rows with quantised weights there; on a CPU kernels.cpp does. What a
step launches of all this: docs/latency.md, "Without a GPU".
"""

import functools
import gc
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

SOURCE = Path(__file__).resolve().with_name("kernels.cpp")
FLAGS = (
    "-O3 -std=c++20 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fassociative-math "
    "-fno-signed-zeros -fopenmp "
    "-shared -fPIC"
)
PDL = False  # set by `use_pdl`
BLOCK = 256  # of a vocabulary, that one program takes the largest of
LEAST = 64  # positions that a program of attention reads, where there are so many
MOST_ROWS = 64  # a step of decoding has at most so many rows; more are a prefill
cpu_kernels = None  # torch.ops.judge_fast once kernels.cpp is built; None: PyTorch's products
why_not = ""  # what kept it from being built


def linear(x: Tensor, weight: Tensor, wide: bool = False, norm: torch.nn.Module | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), both of one type -> (..., N).

    wide: in fp32, where tensor cores give their sums so, instead of rounded to that type. norm: an RMSNorm
    that is applied to x first.
    """
    if norm is not None:
        if x.device.type == "cuda" and x.numel() == x.shape[-1] and torch.compiler.is_compiling():
            return linear_of_norm(x, norm.weight, norm.eps, weight)
        x = norm(x)
    ours = cpu_kernels is not None and x.device.type == "cpu" and not torch.is_grad_enabled()
    ours = ours and x.dtype == weight.dtype and weight.is_contiguous()
    if ours and 0 < x.numel() // x.shape[-1] <= most_rows(weight.dtype, *weight.shape):
        return cpu_kernels.linear(x, weight)
    wide &= x.device.type == "cuda" and x.dtype != torch.float32 and not torch.is_grad_enabled()
    if wide and x.numel() > x.shape[-1]:  # Inductor's own product of one row gives them anyway
        y = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)
        return y.view(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


def linear_of_norm(x: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
    """`linear` of RMSNorm(x), of one row, written so that Inductor makes one kernel of it: each weight row
    sums the squares of x as well, so that nothing has to be known of x before the weights are read."""
    wide = x.reshape(1, -1).float()
    squares = wide.square().expand(weight.shape).mean(-1)
    sums = (weight.float() * (wide * gain.float())).sum(-1)
    return (sums * torch.rsqrt(squares + eps)).to(x.dtype).view(*x.shape[:-1], -1)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row (..., V), NaN if there is one, and its index, the lowest of equals."""
    if x.device.type == "cuda" and x.shape[-1] > 2 * BLOCK:  # a vocabulary: one program a row were too few
        return largest_by_blocks(x)
    index = x.argmax(-1)
    return x.gather(-1, index[..., None]).squeeze(-1), index


def largest_by_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """`largest` in two stages, of which the first runs side by side."""
    peaks, within = F.pad(x, (0, -x.shape[-1] % BLOCK), value=-math.inf).unflatten(-1, (-1, BLOCK)).max(-1)
    block = peaks.argmax(-1, keepdim=True)
    index = block * BLOCK + within.gather(-1, block)
    return peaks.gather(-1, block).squeeze(-1), index.squeeze(-1)


@torch.compiler.assume_constant_result
def most_rows(dtype: torch.dtype, n: int, k: int) -> int:
    """The most rows for which kernels.cpp beats PyTorch on a weight of that type and shape."""
    return cpu_kernels.most_rows(dtype, n, k)


def use_cpu_kernels() -> None:
    """Builds kernels.cpp (seconds, once a machine and PyTorch) and puts it to use in this process.

    Where that fails, one line on stderr says so and products stay with PyTorch.
    """
    global cpu_kernels, why_not
    if cpu_kernels is not None:
        return
    try:
        torch.ops.load_library(build(SOURCE))
        torch.ops.judge_fast.linear_int4  # noqa: B018 is it the right library?
    except (OSError, RuntimeError, AttributeError, subprocess.CalledProcessError) as error:
        failed = isinstance(error, subprocess.CalledProcessError)
        reason = (error.stderr.strip() or "the compiler failed without a word") if failed else str(error)
        why_not = reason.splitlines()[0]
        print(f"kernels.cpp could not be built or loaded, products are PyTorch's: {why_not}", file=sys.stderr)
        return
    torch.library.register_fake(
        "judge_fast::linear", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0])
    )
    for name in ("linear_int8", "linear_fp8", "linear_int4"):
        torch.library.register_fake(
            f"judge_fast::{name}", lambda x, w, scales, n: x.new_empty(*x.shape[:-1], n)
        )
    cpu_kernels = torch.ops.judge_fast


def build(source: Path) -> Path:
    """The shared library of a C++ file, built for this processor and PyTorch unless that was done before."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    root = Path(torch.__file__).parent
    command = [get_cpp_compiler(), *FLAGS.split(), native_flag(), f"-I{root / 'include'}"]
    links = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256(
        f"{command}{torch.__version__}{processor()}".encode() + source.read_bytes()
    ).hexdigest()[:16]
    folder = usable_cache()
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            fresh = Path(beside) / library.name
            subprocess.run(
                [*command, str(source), *links, "-o", str(fresh)], check=True, capture_output=True, text=True
            )
            if not fresh.exists():
                raise OSError(f"{command[0]} wrote no library")
            os.replace(fresh, library)
    return library


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "judge-fast"


def usable_cache() -> Path:
    """`cache_folder`, made where it is missing; where it cannot be written, one of this user's own among
    temporary files."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "permission denied"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    own = Path(tempfile.gettempdir()) / f"judge-fast-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()  # a stranger may have made it: what lies there is loaded and run
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not own.is_dir() or own.is_symlink():
        raise OSError(f"{folder} cannot be written ({reason}), and {own} is not this user's own")
    print(f"{folder} cannot be written ({reason}): kernels are kept in {own}.", file=sys.stderr)
    return own


def native_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def processor() -> str:
    """What this processor can do: a library built for another must not be loaded."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


if triton is not None:
    # Of 16 bits twice, four levels each become 128 + level in bf16, level, and level * scale + offset,
    # which is rounded once; $5 and $7: scale and offset twice
    INT4_TO_BF16 = tl.constexpr("""{
        .reg .b32 a, b, c, d, one, less;
        mov.b32 one, 0x3F803F80; mov.b32 less, 0xC300C300;
        shr.b32 b, $4, 4; shr.b32 c, $4, 8; shr.b32 d, $4, 12;
        lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA; lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA; lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 a, a, one, less; fma.rn.bf16x2 b, b, one, less;
        fma.rn.bf16x2 c, c, one, less; fma.rn.bf16x2 d, d, one, less;
        fma.rn.bf16x2 $0, a, $5, $7; fma.rn.bf16x2 $1, b, $5, $7;
        fma.rn.bf16x2 $2, c, $5, $7; fma.rn.bf16x2 $3, d, $5, $7;
    }""")

    @triton.jit
    def rotated(x, table, lines, at, dims, inside, D: tl.constexpr):
        """Numbers at x + lines + dims, in fp32, turned by the angles of positions `at` of a `rope_table`."""
        other = (dims + D // 2) % D
        angle = table + at[:, None] * D + (dims % (D // 2))[None, :]
        own = tl.load(x + lines[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        across = tl.load(x + lines[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(angle, mask=inside, other=0.0)
        sin = tl.load(angle + D // 2, mask=inside, other=0.0)
        return own * cos + tl.where(dims < D // 2, -across, across) * sin

    @triton.jit
    def joined(
        out, part, peak, total, place, used, where, dims,
        ROWS: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Joins `used` parts of a row, the first one at `place`, and writes it to out + where."""
        best, sums = -float("inf"), 0.0
        y = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, used, BLOCK_P):
            numbers = first + tl.arange(0, BLOCK_P)
            there, at = numbers < used, place + numbers * ROWS
            # what other programs have just written is not in this multiprocessor's own cache
            peaks = tl.load(peak + at, mask=there, other=-float("inf"), cache_modifier=".cg")
            totals = tl.load(total + at, mask=there, other=0.0, cache_modifier=".cg")
            mask = there[:, None] & (dims[None, :] < D)
            parts = tl.load(
                part + at[:, None] * D + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg"
            )
            higher = tl.maximum(best, tl.max(peaks, 0))
            weight, shrink = tl.exp(peaks - higher), tl.exp(best - higher)
            y = y * shrink + tl.sum(parts * weight[:, None], 0)
            sums, best = sums * shrink + tl.sum(totals * weight, 0), higher
        tl.store(out + where + dims, (y / sums).to(out.dtype.element_ty), mask=dims < D)

    @triton.jit
    def attend_part(
        qkv, table, pos, k, v, out, part, peak, total, arrived, scale, cache_length,
        ROWS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr,
        JOIN: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        """Attention of the rows of one KV head over one part of the positions, before normalising.

        T tokens of `group` query heads are ROWS rows. There are at most PARTS parts, each of at least LEAST
        positions. Of each row, part gets the weighted sum of values, peak the largest score, total the sum of
        weights. The program whose part holds a row's position writes that row's key and value first. JOIN:
        the last program of a head, by the count in `arrived`, joins the parts.
        """
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        head, number, n_kv = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        at = tl.load(pos + rows % T)  # row r stands for query head r // T of the group and token r % T
        length = tl.load(pos + T - 1) + 1
        each = tl.maximum(tl.cdiv(length, PARTS), LEAST)
        begin = number * each
        end = tl.minimum(begin + each, length)
        group: tl.constexpr = ROWS // T
        width = (group + 2) * n_kv * D  # of a row of qkv: query heads, keys, values
        if begin < length:
            base = head.to(tl.int64) * cache_length * D
            if end > tl.load(pos):
                for first in range(0, T, BLOCK_T):
                    fresh = first + tl.arange(0, BLOCK_T)
                    own = tl.load(pos + fresh, mask=fresh < T, other=-1)
                    mine = ((own >= begin) & (own < end))[:, None] & (dims[None, :] < D)
                    lines, to = (
                        fresh * width + (group * n_kv + head) * D,
                        base + own[:, None] * D + dims[None, :],
                    )
                    key = rotated(qkv, table, lines, own, dims, mine, D)
                    value = tl.load(qkv + lines[:, None] + n_kv * D + dims[None, :], mask=mine, other=0.0)
                    tl.store(k + to, key.to(k.dtype.element_ty), mask=mine)
                    tl.store(v + to, value, mask=mine)
                tl.debug_barrier()  # the loop below reads them
            inside = (rows[:, None] < ROWS) & (dims[None, :] < D)
            lines = (rows % T) * width + (head * group + rows // T) * D
            query = rotated(qkv, table, lines, at, dims, inside, D).to(qkv.dtype.element_ty)
            best = tl.full([BLOCK_M], -float("inf"), tl.float32)
            sums = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(begin, end, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                seen = (cols[:, None] < end) & (dims[None, :] < D)
                offsets = base + cols[:, None] * D + dims[None, :]
                keys = tl.load(k + offsets, mask=seen, other=0.0)
                score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
                score = tl.where((cols[None, :] <= at[:, None]) & (cols[None, :] < end), score, -float("inf"))
                higher = tl.maximum(best, tl.max(score, 1))
                finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row may see nothing of this part
                weight, shrink = tl.exp(score - finite[:, None]), tl.exp(best - finite)
                values = tl.load(v + offsets, mask=seen, other=0.0)
                acc = acc * shrink[:, None] + tl.dot(
                    weight.to(values.dtype), values, input_precision=PRECISION
                )
                sums, best = sums * shrink + tl.sum(weight, 1), higher
            place = (head * PARTS + number) * ROWS + rows
            tl.store(peak + place, best, mask=rows < ROWS)
            tl.store(total + place, sums, mask=rows < ROWS)
            tl.store(part + place[:, None] * D + dims[None, :], acc, mask=inside)
            if JOIN:
                tl.debug_barrier()
                used = tl.cdiv(length, each)
                if tl.atomic_add(arrived + head, 1, sem="acq_rel") == used - 1:
                    tl.store(arrived + head, 0)  # for the next launch
                    for row in tl.static_range(ROWS):
                        where = (
                            (row % T) * n_kv * group + head * group + row // T
                        ) * D  # out is (T, heads, D)
                        joined(out, part, peak, total, head * PARTS * ROWS + row, used, where, dims,
                               ROWS, D, 16, BLOCK_D)  # fmt: skip

    @triton.jit
    def attend_join(
        out, pos, part, peak, total,
        ROWS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr,
        PDL: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Joins the parts of one row of one KV head."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        head, row, group = tl.program_id(0), tl.program_id(1), ROWS // T
        length = tl.load(pos + T - 1) + 1
        used = tl.cdiv(length, tl.maximum(tl.cdiv(length, PARTS), LEAST))
        where = ((row % T) * (tl.num_programs(0) * group) + head * group + row // T) * D
        joined(out, part, peak, total, head * PARTS * ROWS + row, used, where, tl.arange(0, BLOCK_D),
               ROWS, D, 32, BLOCK_D)  # fmt: skip

    @triton.jit
    def product_part(
        x, w, scales, part, N, K, T, each,
        GROUP: tl.constexpr, WIDE: tl.constexpr, X_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """x (T, X_K) times BLOCK_N quantised weight rows, over one part of the columns, each `each` wide:
        fp32 (T, N). GROUP: columns that share a scale and an offset, 16 bits each in one number of `scales`
        or, WIDE, two of fp32, and weights of 4 bits; 0: weights of a byte and a scale a row. EVEN: every
        block is whole."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        rows, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        number = tl.program_id(1)
        begin, end = number * each, tl.minimum(number * each + each, K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        line = n.to(tl.int64)[:, None]
        limit = tl.minimum(end, X_K)  # x may be narrower than the packed columns
        for start in range(begin, end, BLOCK_K):
            if GROUP:  # 16 bits hold columns 32 b + i, + 8, + 16 and + 24
                i = tl.arange(0, BLOCK_K // 4)
                low = start + i // 8 * 32 + i % 8
                packed = tl.load(
                    w + line * (K // 4) + start // 4 + i[None, :], mask=(low[None, :] < end) | EVEN, other=0
                )
                groups: tl.constexpr = BLOCK_K // GROUP
                group = start // GROUP + tl.arange(0, groups)
                inside = (group[None, :] * GROUP < end) | EVEN
                at = line * (K // GROUP) + group[None, :]
                pair = tl.load(scales + at * (2 if WIDE else 1), mask=inside, other=0)
                offset = tl.load(scales + at * 2 + 1, mask=inside, other=0) if WIDE else pair
                quarters = levels_of(
                    packed, pair, offset, WIDE, x.dtype.element_ty, BLOCK_N, groups, BLOCK_K // 4
                )
                for quarter in tl.static_range(4):
                    cols = low + 8 * quarter
                    seen = (rows[:, None] < T) & ((cols[None, :] < limit) | EVEN)
                    xs = tl.load(x + rows[:, None] * X_K + cols[None, :], mask=seen, other=0.0)
                    acc = tl.dot(xs, tl.trans(quarters[quarter]), acc, input_precision=PRECISION)
            else:
                cols = start + tl.arange(0, BLOCK_K)
                seen = (rows[:, None] < T) & ((cols[None, :] < limit) | EVEN)
                xs = tl.load(x + rows[:, None] * X_K + cols[None, :], mask=seen, other=0.0)
                ws = tl.load(w + line * K + cols[None, :], mask=(cols[None, :] < end) | EVEN, other=0.0)
                acc = tl.dot(xs, tl.trans(ws.to(tl.float32).to(xs.dtype)), acc, input_precision=PRECISION)
        if not GROUP:
            acc *= tl.load(scales + n)[None, :]
        tl.store(part + (number * T + rows[:, None]) * N + n[None, :], acc, mask=rows[:, None] < T)

    @triton.jit
    def levels_of(
        packed, pair, other, WIDE: tl.constexpr,
        dtype: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """The four columns of 16 bits each (N, WIDTH), scaled, from pairs of scale and offset (N, GROUPS),
        or, WIDE, from scales and the `other`, offsets.

        No integer is converted: 128 in bf16 and 2^23 in fp32 count ones in their last bits.
        """
        if dtype == tl.bfloat16 and not WIDE:
            scale = spread((pair & 0xFFFF) | (pair << 16), N, GROUPS, WIDTH)
            offset = spread((pair & -65536) | ((pair >> 16) & 0xFFFF), N, GROUPS, WIDTH)
            a, b, c, d = tl.inline_asm_elementwise(
                INT4_TO_BF16, "=r,=r,=r,=r,r,r,r,r,r", [packed, scale, offset],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            if WIDE:
                scale, offset = spread(pair, N, GROUPS, WIDTH), spread(other, N, GROUPS, WIDTH)
            else:
                scale = spread(pair << 16, N, GROUPS, WIDTH).to(tl.float32, bitcast=True)
                offset = spread(pair & -65536, N, GROUPS, WIDTH).to(tl.float32, bitcast=True)
            wide = packed.to(tl.int32)
            a = ((wide & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) * scale + offset
            b = ((wide >> 4 & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) * scale + offset
            c = ((wide >> 8 & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) * scale + offset
            d = ((wide >> 12 & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) * scale + offset
        return a.to(dtype), b.to(dtype), c.to(dtype), d.to(dtype)

    @triton.jit
    def spread(x, N: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
        """(N, GROUPS) -> (N, WIDTH), each number beside all of its group."""
        return tl.reshape(tl.broadcast_to(x[:, :, None], [N, GROUPS, WIDTH // GROUPS]), [N, WIDTH])


class Tiling(NamedTuple):
    """How `few_rows` cuts a product: sizes of a block, warps and loads in flight of a program, programs a
    multiprocessor."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int


TILINGS = (  # what the tuner tries; the first one serves where nothing is tuned
    Tiling(64, 128, 4, 4, 2), Tiling(32, 128, 2, 4, 4), Tiling(16, 256, 1, 4, 8), Tiling(32, 256, 4, 3, 4),
    Tiling(64, 128, 4, 3, 4), Tiling(64, 256, 4, 3, 2), Tiling(128, 128, 4, 3, 2), Tiling(128, 128, 8, 3, 2),
    Tiling(16, 128, 1, 3, 8),  # the least: it fits any weight and any GPU
)  # fmt: skip
tilings: dict[str, Tiling] = {}  # the choices of this process, by shape


def few_rows(x: Tensor, weight: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """x (..., k) of up to MOST_ROWS rows times a quantised weight -> (..., n), on a GPU.

    bits: 8, a number a byte and a scale a row, or 4, as quantize.py packs groups, scales in bf16 or fp32.
    Weights are dequantised in registers, so that 33 rows read as little as one. The columns are cut into
    parts that run side by side where the weight has too few rows to fill the GPU; a compiled step sums the
    parts, in fp32, within the kernel that uses the sums.
    """
    rows = x.numel() // x.shape[-1]
    shapes, wide = (tuple(weight.shape), tuple(scales.shape)), scales.dtype == torch.float32
    cut = cut_for(weight.dtype, *shapes, rows, x.dtype, x.device, bits, wide)
    parts = product_parts(x, weight, scales, bits, *cut)
    total = functools.reduce(torch.add, parts.unbind(0))  # unlike sum(0), fused with what uses it
    return total[:, :n].to(x.dtype).view(*x.shape[:-1], n)


@torch.compiler.assume_constant_result
def cut_for(
    dtype: torch.dtype, shape: tuple, scales: tuple, rows: int, x_dtype: torch.dtype, device, bits: int,
    wide: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """How to cut the product of so many rows with a weight: a number of TILINGS, and the parts of the
    columns.

    Called while a step is compiled, and never again. On a GPU it then measures TILINGS for that shape, on
    numbers of its own, unless this or an earlier process has, on the same kind of GPU.
    """
    fitting, k = [tiling for tiling in TILINGS if shape[0] % tiling.block_n == 0], shape[1] * 8 // bits

    def cut(tiling: Tiling) -> tuple[int, int]:
        programs = parts_for(device, shape[0] // tiling.block_n, tiling.programs)
        each = -(-k // min(8, programs) // tiling.block_k) * tiling.block_k  # sums of many are not fused
        return TILINGS.index(tiling), -(-k // each)

    @functools.cache
    def operands() -> list[Tensor]:
        scale = torch.float32 if wide else torch.bfloat16
        kinds = ((rows, k), x_dtype), (shape, dtype), (scales, scale)
        return [torch.zeros(size, dtype=kind, device=device) for size, kind in kinds]

    if device.type != "cuda":
        return cut(fitting[0])
    wider = " of fp32" if bits == 4 and wide else ""
    key = f"{dtype} {shape} in {scales}{wider}, up to {power_of_2(rows)} rows of {x_dtype}"
    if key not in tilings:
        tilings.update(read_tilings(device))
    if tilings.get(key) not in fitting:
        tilings[key] = tune(fitting, lambda tiling: product_parts(*operands(), bits, *cut(tiling)))
        write_tilings(device)
    return cut(tilings[key])


@torch.library.custom_op("judge_fast::product_parts", mutates_args=())
def product_parts(x: Tensor, weight: Tensor, scales: Tensor, bits: int, tiling: int, parts: int) -> Tensor:
    """x (..., k) times each of so many parts of a quantised weight's columns -> fp32 (parts, rows, N)."""
    rows, tiling = x.numel() // x.shape[-1], TILINGS[tiling]
    n, k = weight.shape[0], weight.shape[1] * 8 // bits
    out = product_shape(x, weight, scales, bits, tiling, parts)
    group = k // scales.shape[1] if bits == 4 else 0
    wide = bits == 4 and scales.dtype == torch.float32
    if bits == 4:  # as numbers of 16 bits, and pairs of scale and offset in bf16 as one of 32
        weight, scales = weight.view(torch.int16), scales if wide else scales.view(torch.int32)
    product_part[(n // tiling.block_n, parts)](
        x.contiguous(), weight, scales, out, n, k, rows, -(-k // parts // tiling.block_k) * tiling.block_k,
        GROUP=group, WIDE=wide, X_K=x.shape[-1], EVEN=k == x.shape[-1] and k % tiling.block_k == 0,
        PRECISION=precision_of(x.dtype), **overlapping(),
        BLOCK_M=power_of_2(rows), BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out


@product_parts.register_fake
def product_shape(x: Tensor, weight: Tensor, scales: Tensor, bits: int, tiling: int, parts: int) -> Tensor:
    """What `product_parts` returns, uninitialised."""
    return x.new_empty(parts, x.numel() // x.shape[-1], weight.shape[0], dtype=torch.float32)


def precision_of(dtype: torch.dtype) -> str:
    """How tensor cores multiply numbers of that type."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def overlapping() -> dict:
    """What tells every launch whether it may overlap the one before it."""
    return {"PDL": PDL, "launch_pdl": True} if PDL else {"PDL": PDL}


def tune(candidates: list[Tiling], action: Callable[[Tiling], Tensor]) -> Tiling:
    """The fastest one, by the median of cold-cache runs; those that the GPU has no room for drop out."""
    seconds = {}
    for tiling in candidates:
        try:
            seconds[tiling] = milliseconds(lambda tiling=tiling: action(tiling))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(seconds, key=seconds.get)


def milliseconds(action: Callable[[], Tensor]) -> float:
    return triton.testing.do_bench(action, warmup=5, rep=20, return_mode="median")


def tilings_file(device: torch.device) -> Path:
    """Where the choices for this GPU, Triton and source are kept."""
    kind = f"{torch.cuda.get_device_name(device)} {triton.__version__}".encode()
    return (
        cache_folder()
        / f"few_rows-{hashlib.sha256(kind + Path(__file__).read_bytes()).hexdigest()[:16]}.json"
    )


def read_tilings(device: torch.device) -> dict[str, Tiling]:
    """What earlier processes chose; nothing where the file is missing or damaged: then it is measured
    again."""
    try:
        return {key: Tiling(*found) for key, found in json.loads(tilings_file(device).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_tilings(device: torch.device) -> None:
    """Keeps the choices, beside those of other processes. Where that fails, the next process measures
    again."""
    path = tilings_file(device)
    try:
        path.parent.mkdir(
            parents=True, exist_ok=True, mode=0o700
        )  # no other folder will do: the next process looks here
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as beside:
            json.dump(read_tilings(device) | tilings, beside)
        os.replace(beside.name, path)
    except OSError as error:
        print(
            f"{path} cannot be written ({error.strerror}): products are tuned anew next time.",
            file=sys.stderr,
        )


def scaled_product(x: Tensor, weight: Tensor, scales: Tensor, n: int) -> Tensor:
    """x (..., k) in bf16 or fp32, quantised to e4m3 with one scale a row, times fp8 weights (N, K), scales
    (N,) -> (..., n).

    Any number of rows, by PyTorch's product of fp8 with fp8, whose output is bf16.
    """
    rows = F.pad(x.reshape(-1, x.shape[-1]), (0, weight.shape[1] - x.shape[-1]))
    x_scales = (rows.abs().amax(1, keepdim=True).float() / 448).clamp(min=1e-30)
    narrow = (rows.float() / x_scales).to(torch.float8_e4m3fn)
    y = torch._scaled_mm(narrow, weight.t(), scale_a=x_scales, scale_b=scales[None], out_dtype=torch.bfloat16)
    return y[:, :n].to(x.dtype).view(*x.shape[:-1], n)


@torch.library.custom_op(
    "judge_fast::attend", mutates_args=("k_cache", "v_cache"), tags=(torch.Tag.flexible_layout,)
)
def attend(qkv: Tensor, rope: Tensor, pos: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Attention of T rows over the part of a KV cache that they may see, into which it writes their own keys
    and values; traffic follows pos, not the cache's length.

    qkv: (T, (heads + 2 n_kv_head) * D), queries, keys and values, not yet rotated. rope: a `rope_table`, fp32
    (length, 2, D / 2). pos: (T,) ascending positions; row t sees positions up to pos[t]. k_cache, v_cache:
    (1, n_kv_head, length, D). -> (1, T, heads * D). The positions are cut into parts that run side by side
    (flash decoding); softmax and sums are fp32. Of up to 8 rows a KV head (tokens times its query heads) the
    last program of a head joins its parts, of more a second launch, which spreads the joining over the GPU.
    """
    n_kv, d, t = k_cache.shape[1], k_cache.shape[3], len(pos)
    rows = (qkv.shape[1] // d - 2 * n_kv) // n_kv * t
    # of rows and positions in a block: more would not fit an L40S's shared memory, with heads of 128
    most, block_n = (128, 64) if qkv.itemsize == 2 else (16, 32)
    blocks = -(-rows // most)
    block_m, join = power_of_2(-(-rows // blocks)), rows <= 8
    wanted = 1 if block_m == 128 else 2  # as many programs as a multiprocessor has registers for
    parts = parts_for(qkv.device, n_kv * blocks, wanted)
    out = attend_shape(qkv, rope, pos, k_cache, v_cache)
    part = torch.empty(n_kv, parts, rows, d, dtype=torch.float32, device=qkv.device)
    peak, total = (torch.empty(n_kv, parts, rows, dtype=torch.float32, device=qkv.device) for _ in range(2))
    sizes = {"ROWS": rows, "T": t, "D": d, "PARTS": parts, "LEAST": LEAST, "BLOCK_D": power_of_2(d)}
    attend_part[(n_kv, parts, blocks)](
        qkv.contiguous(), rope, pos, k_cache, v_cache, out, part, peak, total, arrivals(qkv.device),
        d**-0.5, k_cache.shape[2], **sizes, **overlapping(), PRECISION=precision_of(qkv.dtype), JOIN=join,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_T=16, num_warps=8 if block_m == 128 else 4,
    )  # fmt: skip
    if not join:
        attend_join[(n_kv, rows)](out, pos, part, peak, total, **sizes, **overlapping())
    return out


@attend.register_fake
def attend_shape(qkv: Tensor, rope: Tensor, pos: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """What `attend` returns, uninitialised."""
    t, n_kv, d = len(pos), k_cache.shape[1], k_cache.shape[3]
    return qkv.new_empty(1, t, qkv.numel() // t - 2 * n_kv * d)


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """How many parts of each KV head are done; `attend` leaves zeros."""
    return torch.zeros(1024, dtype=torch.int32, device=device)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n, and 16, the least size of a block."""
    return max(16, 1 << (n - 1).bit_length())


def parts_for(device: torch.device, programs: int, wanted: int = 2) -> int:
    """Parts to cut the work of so many programs into: enough for `wanted` programs a multiprocessor."""
    n = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, wanted * n // programs)


@dataclass
class Graph:
    """A captured CUDA graph, and its output, which each replay writes anew."""

    graph: torch.cuda.CUDAGraph
    output: Tensor | None


def capture(action, pool) -> Graph:
    """Captures what `action` launches; it must have run before, so that nothing is left to compile or to
    tune.

    pool: memory that graphs share which never run at the same time (torch.cuda.graph_pool_handle()).
    """
    gc.collect()  # an old engine's graphs must not be let go in the midst of a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = action()
    return Graph(graph, output)


def use_pdl(wanted: bool, device: torch.device) -> None:
    """--pdl: from here on a kernel of ours may start while the one before it ends (programmatic dependent
    launch); it waits before it reads what that one writes. Raises InputError where a GPU has none of that.

    Inductor's kernels are launched as ever: of those that its own option (triton.enable_pdl) makes, some do
    not wait, and what follows such a one could overtake what went before it.
    """
    global PDL
    if wanted and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0)):
        raise InputError(f"--pdl needs a GPU of compute capability 9.0 or more; {device} is none.")
    PDL = wanted


def check_compiler() -> None:
    """Raises InputError when torch.compile would find no C++ compiler for its CPU code."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        raise InputError(
            "--compile on a CPU needs a C++ compiler such as g++; install one, or name it in CXX."
        ) from None


def compile_step(step, device: str, cpp_wrapper: bool = True):
    """Compiles a step function for one engine, as one graph that serves every length of `visible`.

    A model, its settings and its buffers never change within an engine, so that only `first` is guarded:
    checking the rest would cost more than a small draft's step. The copied code object keeps engines apart,
    since dynamo caches by code object. cpp_wrapper: off where a step holds collectives, which the C++ wrapper
    around CPU kernels cannot call.
    """
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)

    def keep(guards: list) -> list[bool]:
        return [guard.name in ("first", "L['first']") for guard in guards]

    # On a CPU the wrapper around the kernels counts, on a GPU it is captured and gone
    options = {"cpp_wrapper": cpp_wrapper} if device == "cpu" else {"coordinate_descent_tuning": True}
    return torch.compile(own, fullgraph=True, options={"guard_filter_fn": keep, **options})
