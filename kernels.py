"""The products and the attention of a few rows: where decoding spends its time, and what libraries are
slowest at.

`linear` multiplies up to 64 rows with a weight matrix: on a CPU by kernels.cpp, which is built on first use,
elsewhere and for more rows by PyTorch. `attend` is attention of a few rows over a KV cache on a GPU, by a
Triton kernel that reads from the device how far the text goes, so that one captured graph serves every
position. `few_rows` multiplies up to 64 rows with quantised weights there; on a CPU kernels.cpp does.
"""

import gc
import hashlib
import json
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
MOST_ROWS = 64  # a step of decoding has at most so many rows; more are a prefill
cpu_kernels = None  # torch.ops.judge_fast once kernels.cpp is built; None: PyTorch's products
why_not = ""  # what kept it from being built


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), both of one type -> (..., N)."""
    ours = cpu_kernels is not None and x.device.type == "cpu" and not torch.is_grad_enabled()
    ours = ours and x.dtype == weight.dtype and weight.is_contiguous()
    if ours and 0 < x.numel() // x.shape[-1] <= most_rows(weight.dtype, *weight.shape):
        return cpu_kernels.linear(x, weight)
    return F.linear(x, weight)


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

    @triton.jit
    def attend_part(
        q, k, v, pos, part, peak, total, scale, cache_length,
        ROWS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Attention of the rows of one KV head over one part of the positions, before normalising."""
        head, number = tl.program_id(0), tl.program_id(1)
        rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        at = tl.load(pos + rows % T)  # row r stands for query head r // T of the group and token r % T
        length = tl.load(pos + T - 1) + 1
        each = tl.maximum(tl.cdiv(length, PARTS), LEAST)
        begin = number * each
        end = tl.minimum(begin + each, length)
        if begin < length:
            inside = (rows[:, None] < ROWS) & (dims[None, :] < D)
            query = tl.load(q + (head * ROWS + rows[:, None]) * D + dims[None, :], mask=inside, other=0.0)
            best = tl.full([BLOCK_M], -float("inf"), tl.float32)
            sums = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            base = head.to(tl.int64) * cache_length * D
            for start in range(begin, end, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                seen = (cols[:, None] < end) & (dims[None, :] < D)
                offsets = base + cols[:, None] * D + dims[None, :]
                keys = tl.load(k + offsets, mask=seen, other=0.0)
                score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
                score = tl.where((cols[None, :] <= at[:, None]) & (cols[None, :] < end), score, -float("inf"))
                higher = tl.maximum(best, tl.max(score, 1))
                finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row may see nothing of this part
                weight, shrink = tl.exp(score - finite[:, None]), tl.exp(best - finite)
                values = tl.load(v + offsets, mask=seen, other=0.0)
                acc = acc * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
                sums, best = sums * shrink + tl.sum(weight, 1), higher
            place = (head * PARTS + number) * ROWS + rows
            tl.store(peak + place, best, mask=rows < ROWS)
            tl.store(total + place, sums, mask=rows < ROWS)
            tl.store(part + place[:, None] * D + dims[None, :], acc, mask=inside)

    @triton.jit
    def attend_join(
        out, pos, part, peak, total,
        ROWS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Joins the parts of one row of one KV head."""
        head, row = tl.program_id(0), tl.program_id(1)
        numbers, dims = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
        length = tl.load(pos + T - 1) + 1
        each = tl.maximum(tl.cdiv(length, PARTS), LEAST)
        used = numbers * each < length
        place = (head * PARTS + numbers) * ROWS + row
        best = tl.load(peak + place, mask=used, other=-float("inf"))
        weight = tl.exp(best - tl.max(best, 0))
        sums = tl.load(total + place, mask=used, other=0.0)
        mask = used[:, None] & (dims[None, :] < D)
        parts = tl.load(part + place[:, None] * D + dims[None, :], mask=mask, other=0.0)
        y = tl.sum(parts * weight[:, None], 0) / tl.sum(sums * weight, 0)
        group = ROWS // T
        where = (
            (row % T) * (tl.num_programs(0) * group) + head * group + row // T
        ) * D  # out is (T, heads, D)
        tl.store(out + where + dims, y.to(out.dtype.element_ty), mask=dims < D)

    @triton.jit
    def product_part(
        x, w, scales, part, N, K, T, each,
        INT4: tl.constexpr, GROUP: tl.constexpr, X_K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """x (T, X_K) times BLOCK_N quantised weight rows, over one part of the columns, each `each` wide:
        fp32 (T, N)."""
        rows, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        number = tl.program_id(1)
        begin, end = number * each, tl.minimum(number * each + each, K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        line = n.to(tl.int64)[:, None]
        for start in range(begin, end, BLOCK_K):
            if INT4:  # a byte holds columns 32 b + i and 32 b + 16 + i
                byte = tl.arange(0, BLOCK_K // 2)
                low = start + byte // 16 * 32 + byte % 16
                packed = tl.load(
                    w + line * (K // 2) + start // 2 + byte[None, :], mask=low[None, :] < end, other=0
                )
                pair = scales + (line * (K // GROUP) + low[None, :] // GROUP) * 2
                scale = tl.load(pair, mask=low[None, :] < end, other=0.0).to(tl.float32)
                offset = tl.load(pair + 1, mask=low[None, :] < end, other=0.0).to(tl.float32)
                for half in tl.static_range(2):
                    cols = low + 16 * half
                    seen = (rows[:, None] < T) & (cols[None, :] < X_K) & (cols[None, :] < end)
                    xs = tl.load(x + rows[:, None] * X_K + cols[None, :], mask=seen, other=0.0)
                    ws = ((packed >> (4 * half)) & 15).to(tl.float32) * scale + offset
                    acc += tl.dot(xs, tl.trans(ws.to(xs.dtype)), input_precision="ieee")
            else:
                cols = start + tl.arange(0, BLOCK_K)
                seen = (rows[:, None] < T) & (cols[None, :] < X_K) & (cols[None, :] < end)
                xs = tl.load(x + rows[:, None] * X_K + cols[None, :], mask=seen, other=0.0)
                ws = tl.load(w + line * K + cols[None, :], mask=cols[None, :] < end, other=0.0)
                acc += tl.dot(xs, tl.trans(ws.to(tl.float32).to(xs.dtype)), input_precision="ieee")
        if not INT4:
            acc *= tl.load(scales + n)[None, :]
        tl.store(part + (number * T + rows[:, None]) * N + n[None, :], acc, mask=rows[:, None] < T)


class Tiling(NamedTuple):
    """How `few_rows` cuts a product: sizes of a block, warps and loads in flight of a program, programs a
    multiprocessor."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int


TILINGS = (  # what the tuner tries; the first one serves where nothing is tuned
    Tiling(64, 128, 4, 4, 2), Tiling(32, 128, 4, 4, 4), Tiling(16, 256, 4, 4, 4), Tiling(32, 256, 4, 3, 4),
    Tiling(64, 128, 4, 3, 4), Tiling(64, 256, 8, 3, 2), Tiling(128, 128, 8, 3, 2), Tiling(16, 512, 4, 2, 4),
)  # fmt: skip
tilings: dict[str, Tiling] = {}  # the choices of this process, by shape


@torch.library.custom_op("judge_fast::few_rows", mutates_args=())
def few_rows(x: Tensor, weight: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """x (..., k) of up to MOST_ROWS rows times a quantised weight -> (..., n), on a GPU.

    bits: 8, a number a byte and a scale a row, or 4, as quantize.py packs groups.
    Weights are dequantised in registers, so that 33 rows read as little as one. The columns are cut into
    parts that run side by side where the weight has too few rows to fill the GPU; the parts are summed in
    fp32. The first product of a shape measures TILINGS, unless an earlier process has, on the same kind of
    GPU.
    """
    block_m = power_of_2(x.numel() // x.shape[-1])
    fitting = [tiling for tiling in TILINGS if weight.shape[0] % tiling.block_n == 0]
    if x.device.type != "cuda":
        return product(x, weight, scales, n, bits, fitting[0])
    key = f"{weight.dtype} {tuple(weight.shape)} in {tuple(scales.shape)}, up to {block_m} rows of {x.dtype}"
    if key not in tilings:
        tilings.update(read_tilings(x.device))
    if tilings.get(key) not in fitting:
        tilings[key] = tune(fitting, lambda tiling: product(x, weight, scales, n, bits, tiling))
        write_tilings(x.device)
    return product(x, weight, scales, n, bits, tilings[key])


def product(x: Tensor, weight: Tensor, scales: Tensor, n: int, bits: int, tiling: Tiling) -> Tensor:
    """`few_rows` by one tiling, whose block_n divides the rows of the weight."""
    rows = x.numel() // x.shape[-1]
    n_padded, k = weight.shape[0], weight.shape[1] * 8 // bits
    blocks = n_padded // tiling.block_n
    n_parts = parts_for(x.device, blocks, tiling.programs)
    each = -(-k // n_parts // tiling.block_k) * tiling.block_k
    n_parts = -(-k // each)
    part = torch.empty(n_parts, rows, n_padded, dtype=torch.float32, device=x.device)
    product_part[(blocks, n_parts)](
        x.contiguous(),
        weight,
        scales,
        part,
        n_padded,
        k,
        rows,
        each,
        INT4=bits == 4,
        GROUP=k // scales.shape[1] if bits == 4 else 1,
        X_K=x.shape[-1],
        BLOCK_M=power_of_2(rows),
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return part.sum(0)[:, :n].to(x.dtype).view(*x.shape[:-1], n)


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


@few_rows.register_fake
def few_rows_shape(x: Tensor, weight: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """What `few_rows` returns, uninitialised."""
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("judge_fast::attend", mutates_args=())
def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> Tensor:
    """Attention of T rows over the part of a KV cache that they may see; traffic follows pos, not the cache's
    length.

    q: (n_kv_head, group * T, D), row r being query head r // T of its group and token r % T. k_cache,
    v_cache: (1, n_kv_head, length, D). pos: (T,) ascending positions; row t sees positions up to pos[t]. ->
    (1, T, heads * D). The positions are cut into parts that run side by side (flash decoding); softmax and
    sums are fp32.
    """
    n_kv, rows, d = q.shape
    blocks = -(-rows // 128)
    block_m, block_d = power_of_2(-(-rows // blocks)), power_of_2(d)
    parts = parts_for(q.device, n_kv * blocks)
    out = attend_shape(q, k_cache, v_cache, pos)
    part = torch.empty(n_kv, parts, rows, d, dtype=torch.float32, device=q.device)
    peak, total = (torch.empty(n_kv, parts, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    sizes = {"ROWS": rows, "T": len(pos), "D": d, "PARTS": parts, "LEAST": 64, "BLOCK_D": block_d}
    block_n = 64 if q.itemsize == 2 else 32  # a few blocks in flight fill the shared memory
    attend_part[(n_kv, parts, blocks)](
        q,
        k_cache,
        v_cache,
        pos,
        part,
        peak,
        total,
        d**-0.5,
        k_cache.shape[2],
        **sizes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8 if block_m == 128 else 4,
    )
    attend_join[(n_kv, rows)](out, pos, part, peak, total, **sizes, BLOCK_P=power_of_2(parts))
    return out


@attend.register_fake
def attend_shape(q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> Tensor:
    """What `attend` returns, uninitialised."""
    return q.new_empty(1, len(pos), q.numel() // len(pos))


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n, and 16, the least size of a block."""
    return max(16, 1 << (n - 1).bit_length())


def parts_for(device: torch.device, programs: int, wanted: int = 2) -> int:
    """Parts to cut the work of so many programs into: enough for `wanted` programs a multiprocessor."""
    n = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(64, wanted * n // programs))


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
