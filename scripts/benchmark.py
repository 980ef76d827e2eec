"""Speed, and how far it is from the physical limit: the bytes that a step must read over the measured
bandwidth.

    python scripts/benchmark.py --compile --peers                   # the demo pair, beside transformers
    python scripts/benchmark.py --preset Llama-3.1-8B --draft_preset Llama-3.2-1B --accept 17 --speculate_k 20
    python scripts/benchmark.py --checkpoint_path DIR --draft_checkpoint_path DIR2 --out benchmarks/mine.json

Presets have random weights: of a published shape, or of DIMxLAYERS. All parts take turns, so that they see
the machine in the same state; a step is timed right after one that is not, as in decoding, where the step
before has left in the caches what they hold. `--accept N` imposes how many draft tokens every round accepts,
so that the speed at a known m* can be measured without the weights that reach it; such figures are marked
"imposed". A table for people; the last line is JSON.

The table gives median, least and most of the repeats, from 20 repeats on the quartiles in place of the
extremes. A part is marked noisy where these lie further apart than a quarter of the median. The JSON holds
every single time.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, note, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import copy
import json
import re
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from checkpoint import checkpoint_files, layer_plan
from files import check_not_input, check_writable, write_file
from generate import Engine, Settings, capacity_for
from hub import model_folder
from judge import JudgeHead, load_judge, needs_judge
from kernels import capture
from model import (
    ModelArgs,
    Transformer,
    causal_mask,
    heads_as_rows,
    pick_device,
    random_model,
    run_dtype,
)
from quantize import (
    QuantLinear,
    Scheme,
    check_device,
    completer,
    load_model,
    prepare,
    quantize,
    scheme_named,
    scheme_of,
    weight_bytes,
)
from rope import rope_table
from scripts.lib.benchmark_args import (
    SCHEMA,
    has_draft,
    model_name,
    modes_of,
    parse_args,
    printable,
    shape_of,
    shapes_of,
)
from scripts.lib.pace import Pace
from scripts.lib.pair import check_memory, check_pair
from scripts.lib.peers import Peers, timed
from scripts.lib.results import commit, machine
from scripts.lib.runs import range_of

BACK_TO_BACK = 10  # calls that are timed as one on a GPU
COPIES = 6  # of weights or caches that take turns when a kernel is timed alone
QUARTILES_FROM = 20  # repeats; quartiles of fewer would be single samples, or lie between two
NOISY = 0.25  # of the median: a part whose times spread further is marked


@dataclass
class Part:
    """Something that is timed: the bytes that it must read, for a prefill its floating-point operations
    instead."""

    name: str
    action: Callable[[], float]  # runs it once and returns the seconds
    at: tuple[int, int] | None = None  # positions of the first and the last token that it reads or makes
    bytes: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    note: str = ""


def bandwidth(device: torch.device, dtype_bytes: int = 4) -> tuple[float, float]:
    """Bytes a second of (reading, copying) 1 GiB (4 GiB on a GPU), best of 5; a copy counts reads and writes.

    On a CPU a read is a sum or, where that is faster, a product with one row: what PyTorch's sum reaches is
    not the limit.
    """
    size = (2**32 if device.type == "cuda" else 2**30) // dtype_bytes
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    reads = [lambda: source.sum()]
    if device.type == "cpu":
        kernels.use_cpu_kernels()
        row, weight = torch.ones(1, 2**12), source.view(-1, 2**12)
        reads.append(torch.inference_mode()(lambda: kernels.linear(row, weight)))

    read = min(timed(action, device) for _ in range(5) for action in reads)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    if device.type == "cuda":
        del source, target
        torch.cuda.empty_cache()

    return size * dtype_bytes / read, 2 * size * dtype_bytes / copy


def imposed(args: argparse.Namespace) -> str:
    return "" if args.accept is None else f"imposed acceptance of {args.accept}"


def synthetic(n: int, vocab_size: int) -> list[int]:
    """A prompt of n random ids."""
    return torch.randint(3, vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()


def needed_length(args: argparse.Namespace) -> int:
    """Tokens that the run's engines hold: on a GPU steps are repeated back to back, and go on from their
    position."""
    ahead = BACK_TO_BACK * (max([args.speculate_k, *args.rows]) + 1)
    return max([*args.positions, *args.prefill, args.prompt_tokens]) + max(args.max_new_tokens, ahead)


def repeated(action: Callable, times: int, device: torch.device) -> Callable[[], float]:
    """An action that runs several times back to back, after once that does not count, and returns the seconds
    of one."""

    def run() -> float:
        action()
        return timed(lambda: [action() for _ in range(times)], device) / times

    return run


class Workbench:
    """The models and engines of one benchmark, and its parts."""

    def __init__(self, args: argparse.Namespace, schemes: tuple[Scheme | None, Scheme | None]):
        self.args, self.device, self.dtype = args, args.device, run_dtype(args.precision, args.device)
        self.startup: dict = {}
        self.length = max([needed_length(args), *(args.cache_length or [])[:1]])
        self.schemes = schemes
        m = max([args.speculate_k, *args.rows])
        capacity = capacity_for(self.length, m)
        shapes = [shape for shape in shapes_of(args) if shape is not None]
        check_memory(shapes, capacity, self.dtype, self.device, list(self.schemes), m)
        self.target = self.model(args.checkpoint_path, args.preset, self.schemes[0])
        self.draft = (
            self.model(args.draft_checkpoint_path, args.draft_preset, self.schemes[1])
            if has_draft(args)
            else None
        )
        for model in (self.target, self.draft):
            if model is not None:
                model.setup_caches(capacity)

        self.head = self.judge()
        self.plain = self.engine(
            Settings("plain", speculate_k=args.speculate_k, compile=args.compile), "plain"
        )
        settings = Settings(args.verify, None, args.speculate_k, compile=args.compile, impose=args.accept)
        self.fast = self.engine(settings, args.verify) if self.draft is not None else None
        self.others = {length: self.plain_with(length) for length in (args.cache_length or [])[1:]}

    def model(self, folder: Path | None, name: str | None, scheme: Scheme | None) -> Transformer:
        """Loads a folder, or makes a preset with random weights; notes how long it took."""
        if folder is None:
            if scheme is not None:
                prepare(self.device, scheme)
            args = shape_of(name)
            complete = completer(args, scheme) if scheme is not None else None
            return random_model(args, self.device, self.dtype, complete=complete)
        files = sorted(set(checkpoint_files(folder).values()))
        size = sum(file.stat().st_size for file in files)
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "check": False}
        cat = timed(lambda: subprocess.run(["cat", *files], **quiet), self.device)
        loaded: list[Transformer] = []
        seconds = timed(
            lambda: loaded.append(load_model(folder, self.device, self.dtype, scheme)), self.device
        )
        self.startup[folder.name] = {"bytes": size, "load_seconds": seconds, "cat_seconds": cat}
        return loaded[0]

    def plain_with(self, length: int) -> Engine:
        """A plain engine on the target's very weights with a cache of another length."""
        shared = [*self.target.parameters(), *self.target.buffers()]
        caches = [
            cache
            for layer in self.target.layers
            for cache in (layer.attention.k_cache, layer.attention.v_cache)
        ]
        target = copy.deepcopy(
            self.target, {id(x): x for x in shared} | {id(cache): None for cache in caches}
        )
        settings = Settings("plain", speculate_k=self.args.speculate_k, compile=self.args.compile)
        engine = Engine(target, None, None, settings, [], length)
        engine.warm_up()
        return engine

    def judge(self) -> JudgeHead | None:
        """The judge of the command line, or, for random weights, a head of the right size that is computed
        all the same."""
        if not needs_judge(self.args.verify):
            return None
        if self.args.judge_path is not None:
            return load_judge(self.args.judge_path, self.target, self.draft)
        zeros = torch.zeros(self.target.args.dim)
        return JudgeHead(zeros, torch.tensor(0.0), 0.5, "", {}).to(self.device)

    def engine(self, settings: Settings, what: str) -> Engine:
        """An engine without stop tokens, warmed up."""
        sizes = {settings.speculate_k}
        if settings.verify != "plain":
            sizes |= {rows - 1 for rows in self.args.rows}
        engine = Engine(
            self.target, self.draft, self.head, replace(settings, speculate_k=max(sizes)), [], self.length
        )
        if len(sizes) > 1:
            engine.use_sizes(tuple(sorted(sizes)))
        seconds = engine.warm_up()
        engine.pace = Pace((settings.speculate_k,))  # rounds of that M alone
        self.startup[f"warm-up {what}"] = {"seconds": seconds}
        print(
            f"{what}: {'compiled and ' if settings.compile else ''}warmed up in {seconds:.1f} s",
            file=sys.stderr,
        )
        return engine

    def step(self, engine: Engine, m: int, which: int, position: int) -> Callable[[], None]:
        """One launch of an engine's round: its plain step, draft loop (0) or verification (1), at
        `position`."""
        visible = engine.visible(min(position + m + 1, engine.capacity))

        @torch.inference_mode()
        def run() -> None:
            engine.buffers.pos.fill_(position)
            if engine.graphs:
                engine.graphs[m][which].graph.replay()
            else:
                engine.steps(visible, m)[which]()

        return run

    def parts(self) -> list[Part]:
        """What is measured: steps and rounds at every position, prompts, whole generations."""
        parts = [part for position in self.args.positions for part in self.parts_at(position)]
        return parts + [self.prefill_part(length) for length in self.args.prefill] + self.generations()

    def parts_at(self, position: int) -> list[Part]:
        """Plain step, draft loop, verification for every M, and round, at one position."""
        k, at, target = self.args.speculate_k, f" at {position}", self.target.args
        times = BACK_TO_BACK if self.device.type == "cuda" else 1

        def part(name: str, action: Callable, size: float, rows: int = 1, **more) -> Part:
            run = repeated(action, times, self.device)
            return Part(name, run, (position, position + rows - 1), size, **more)

        read = self.read_bytes(target, 0, position)
        parts = [part(f"plain step{at}", self.step(self.plain, k, 0, position), read, tokens=1)]
        for length, engine in self.others.items():
            name = f"plain step{at}, with a cache of {length}"
            parts.append(part(name, self.step(engine, k, 0, position), read, tokens=1))

        if self.fast is None:
            return parts

        small = self.read_bytes(self.draft.args, 1, position)
        parts.append(part(f"draft loop, M = {k}{at}", self.step(self.fast, k, 0, position), small * k, k))
        for m in self.fast.sizes:
            rows = self.read_bytes(target, 0, position, m + 1)
            parts.append(part(f"verify {m + 1} rows{at}", self.step(self.fast, m, 1, position), rows, m + 1))

        whole = part(f"round, M = {k}{at}", lambda: self.whole_round(position), read + small * k, k + 1)
        return [*parts, whole]

    def read_bytes(self, shape: ModelArgs, which: int, position: int, rows: int = 1) -> int:
        """Bytes that a step reads, of the target (0) or the draft (1), with its weights as they are
        quantised."""
        saved = weight_bytes(shape, self.dtype, None) - weight_bytes(shape, self.dtype, self.schemes[which])
        return shape.step_bytes(position, self.dtype, rows) - saved

    @torch.inference_mode()
    def whole_round(self, position: int) -> None:
        self.fast.buffers.pos.fill_(position)
        self.fast.round(position + self.args.speculate_k + 1, self.args.speculate_k)

    def prefill_part(self, length: int) -> Part:
        """The target reads a prompt of `length` tokens; its operations: two a weight and token, and
        attention's."""
        a = self.target.args
        prompt = synthetic(length + 1, a.vocab_size)
        matrices = a.n_params - a.vocab_size * a.dim * (1 if a.tie_embeddings else 2)
        flops = 2 * matrices * length + 2 * a.n_layer * a.n_head * a.head_dim * length**2
        return Part(
            f"prefill of {length} tokens",
            lambda: timed(lambda: self.plain.prefill(prompt), self.device),
            (0, length - 1),
            flops=flops,
            tokens=length,
        )

    def generations(self) -> list[Part]:
        """Whole generations from a short prompt, ours and, with --peers, transformers'."""
        a = self.args
        prompt = synthetic(a.prompt_tokens, self.target.args.vocab_size)
        parts = [
            Part("generate, plain", lambda: self.plain.generate(prompt, a.max_new_tokens).seconds_decode)
        ]
        if self.fast is not None:
            self.overheads: list[float] = []
            parts.append(Part(f"generate, {a.verify}", lambda: self.generate_fast(prompt), note=imposed(a)))

        if a.peers:
            peers = Peers(self.target, self.draft, prompt, a.max_new_tokens, k=a.speculate_k, accept=a.accept)
            parts.append(Part("transformers generate", peers.plain))
            if a.compile:
                parts.append(Part("transformers generate, static cache, compiled", peers.static))
            if self.draft is not None:
                parts.append(Part("transformers generate, assisted", peers.assisted, note=imposed(a)))

        for part in parts:
            part.tokens, part.at = a.max_new_tokens, (a.prompt_tokens, a.prompt_tokens + a.max_new_tokens - 1)
        return parts

    def generate_fast(self, prompt: list[int]) -> float:
        """One speculative generation; on a CPU also the share of its time that no step accounts for."""
        inside, engine, steps = 0.0, self.fast, self.fast.steps

        def clocked(step: Callable) -> Callable:
            def run():
                nonlocal inside
                began = time.perf_counter()
                out = step()
                inside += time.perf_counter() - began
                return out

            return run

        engine.steps = lambda *sizes: [clocked(step) for step in steps(*sizes)]
        try:
            result = engine.generate(prompt, self.args.max_new_tokens)
        finally:
            del engine.steps

        self.result = result
        if self.device.type == "cpu":
            self.overheads.append(1 - inside / result.seconds_decode)
        return result.seconds_decode

    def round_figures(self, rows: list[dict]) -> dict:
        """Of the speculative generations: the share of a round's time that no step accounts for, and tokens a
        round, in how many rounds. The last round counts unless the generation's end cuts it."""
        if self.fast is None:
            return {}
        a, result = self.args, self.result
        if self.device.type == "cpu":
            overhead = sorted(self.overheads)[len(self.overheads) // 2]
        else:
            ms = {row["part"]: row["ms"] for row in rows}
            at, k = f" at {a.positions[0]}", a.speculate_k
            steps = ms[f"draft loop, M = {k}{at}"] + ms[f"verify {k + 1} rows{at}"]
            overhead = 1 - steps / (ms[f"generate, {a.verify}"] / result.rounds)

        whole_ones = re.findall("[ar]*[tb]", "".join(result.origin))
        mean = statistics.mean(map(len, whole_ones)) if whole_ones else None
        return {"host_overhead": overhead, "tokens_a_round": mean, "rounds": len(whole_ones),
                "rounds_cut": result.rounds - len(whole_ones)}  # fmt: skip

    def trace(self, path: Path) -> None:
        """Writes a Chrome trace of one round, or of a plain step where there is no draft, packed for .gz."""
        engine = self.fast or self.plain
        engine.buffers.pos.fill_(self.args.positions[0])
        with torch.profiler.profile() as trace:
            engine.round(self.args.positions[0] + self.args.speculate_k + 1, self.args.speculate_k)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / ("trace.json.gz" if path.suffix == ".gz" else "trace.json")
            trace.export_chrome_trace(str(made))
            write_file(path, made.read_bytes())


def workbenches(args: argparse.Namespace) -> tuple[Workbench, list[Part]]:
    """The first workbench and all parts: of the command line's own modes, or for each of --modes the target
    so."""
    draft = scheme_of(args, "draft_")
    if not args.modes:
        bench = Workbench(args, (scheme_of(args), draft))
        return bench, bench.parts()

    benches = []
    for name in args.modes:
        scheme = scheme_named(name)
        benches.append(
            Workbench(args, (replace(scheme, lm_head=args.quantize_lm_head) if scheme else None, draft))
        )

    parts = [bench.parts() for bench in benches]
    for name, some in zip(args.modes, parts):
        for part in some:
            part.name = f"{name}: {part.name}"

    return benches[0], [part for some in zip(*parts) for part in some]


def attention_ways(
    q: Tensor, caches: list[Tensor], pos: Tensor, mask: Tensor, length: int, rope: Tensor
) -> dict[str, Callable]:
    """The candidates by name, each a call without arguments. `attend` also rotates, and writes the cache."""
    n_kv = caches[0].shape[1]
    k, v = (cache[:, :, :length] for cache in caches)
    by_head, by_row = q.transpose(1, 2), heads_as_rows(q, n_kv)
    masks = mask, mask.repeat(q.shape[2] // n_kv, 1)
    ways = {
        "SDPA": lambda: F.scaled_dot_product_attention(by_head, k, v, attn_mask=masks[0], enable_gqa=True),
        "SDPA, heads as rows": lambda: F.scaled_dot_product_attention(by_row, k, v, attn_mask=masks[1]),
    }
    if q.device.type == "cuda":
        qkv = torch.cat([q[0], *(cache[0, :, pos].transpose(0, 1) for cache in caches)], dim=1).flatten(1)
        ways["attend"] = lambda: kernels.attend(qkv, rope, pos, *caches)
    return ways


def in_turn(actions: list[Callable], device: torch.device) -> Callable[[], float]:
    """Seconds of one of several like calls that take turns, so that none finds its data in a cache; on a GPU
    as a graph."""

    @torch.inference_mode()
    def all_of_them() -> None:
        for action in actions:
            action()

    if device.type == "cuda":
        all_of_them()  # compiles
        torch.cuda.synchronize()
        with torch.inference_mode():
            captured = capture(all_of_them, torch.cuda.graph_pool_handle())
        return lambda: timed(lambda: [captured.graph.replay() for _ in range(5)], device) / 5 / len(actions)
    return lambda: timed(all_of_them, device) / len(actions)


def attention_parts(args: argparse.Namespace, model: ModelArgs, dtype: torch.dtype) -> list[Part]:
    """Ways to attend over one layer's cache, for rows of decoding and verification, at 512, 4k and 32k
    positions."""
    parts, device = [], args.device
    shape = (1, model.n_kv_head, 32768, model.head_dim)
    caches = [[torch.randn(shape, device=device).to(dtype) for _ in range(2)] for _ in range(COPIES)]
    rope = rope_table(model, shape[2], device)
    for length in (512, 4096, 32768):
        for rows in (1, 2, 17, 33):
            q = torch.randn(1, rows, model.n_head, model.head_dim, device=device).to(dtype)
            pos = torch.arange(length - rows, length, device=device)
            mask = causal_mask(pos, length, dtype)
            ways = [attention_ways(q, cache, pos, mask, length, rope) for cache in caches]
            for name in ways[0]:
                action = in_turn([way[name] for way in ways], device)
                size = 2 * model.n_kv_head * length * model.head_dim * dtype.itemsize
                parts.append(Part(f"attention by {name}, {rows} rows at {length}", action, bytes=size))

    return parts


class LibraryInt4:
    """PyTorch's own product with int4 weights in groups of 128, for comparison; weight (N, K) in bf16 or
    fp32."""

    GROUP = 128

    def __init__(self, weight: Tensor):
        groups = weight.float().unflatten(1, (-1, self.GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        step = ((high - low) / 15).clamp(min=1e-30)
        q = ((groups - low[..., None]) / step[..., None]).round().clamp(0, 15).to(torch.int32).flatten(1)
        # (groups, N, 2)
        self.scales = torch.stack([step, low + 8 * step], -1).transpose(0, 1).contiguous().to(weight.dtype)
        if weight.device.type == "cpu":
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
            self.product = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            self.weight = torch.ops.aten._convert_weight_to_int4pack(
                (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8
            )
            self.product = torch.ops.aten._weight_int4pack_mm

    def __call__(self, x: Tensor) -> Tensor:
        """x (1, T, K) -> (T, N)."""
        return self.product(x[0], self.weight, self.GROUP, self.scales)


def linear_shape(model: ModelArgs, name: str) -> tuple[int, int]:
    """(N, K) of a layer's product by our name."""
    found = [row.shape for row in layer_plan(model, 0).values() if row.ours.endswith(f".{name}.weight")]
    return sum(shape[0] for shape in found), found[0][1]


def is_usable(scheme: Scheme, device: torch.device) -> bool:
    """Whether a device has the numbers of a scheme; says so where it has not."""
    try:
        check_device(device, scheme)
    except InputError as error:
        note(f"{scheme} is left out: {error}")
        return False
    return True


def product_parts(args: argparse.Namespace, model: ModelArgs, dtype: torch.dtype) -> list[Part]:
    """The products of one layer by rows: PyTorch's, ours, and ours with quantised weights (bytes: of the
    weights alone)."""
    parts, device = [], args.device
    kernels.use_cpu_kernels()
    schemes = [
        Scheme("int8"),
        Scheme("fp8"),
        Scheme("fp8", dynamic=True),
        Scheme("int4"),
        Scheme("int4", 128),
    ]
    schemes = [scheme for scheme in schemes if is_usable(scheme, device)]
    for name in ("wqkv", "wo", "w13", "w2"):
        shape = linear_shape(model, name)
        weights = [torch.randn(shape, device=device).mul_(0.02).to(dtype) for _ in range(COPIES)]
        packed = {}
        for scheme in schemes:
            first = QuantLinear(*quantize(weights[0], scheme), *shape, scheme)
            packed[str(scheme)] = [first, *(copy.deepcopy(first) for _ in range(COPIES - 1))]
        packed["PyTorch's int4/128"] = [LibraryInt4(weights[0]) for _ in range(COPIES)]
        for rows in (1, 2, 17, 33):
            x = torch.randn(1, rows, shape[1], device=device).to(dtype)
            what = f"{name} {shape[0]} x {shape[1]}, {rows} rows"
            library = in_turn([lambda w=w, x=x: F.linear(x, w) for w in weights], device)
            ours = in_turn([lambda w=w, x=x: kernels.linear(x, w) for w in weights], device)
            parts.append(Part(f"{what}: PyTorch", library, bytes=weights[0].nbytes))
            if device.type == "cpu":
                parts.append(Part(f"{what}: kernels.cpp", ours, bytes=weights[0].nbytes))
            for mode, layers in packed.items():
                action = in_turn([lambda layer=layer, x=x: layer(x) for layer in layers], device)
                size = layers[0].weight.nbytes + layers[0].scales.nbytes
                parts.append(Part(f"{what}: {mode}", action, bytes=size))

    return parts


def measure(parts: list[Part], repeats: int) -> Iterator[None]:
    """Times all parts in turn, `repeats` times after one round that does not count; yields after each that
    does."""
    progress = Progress("measuring", len(parts) * (repeats + 1))
    for turn in range(repeats + 1):
        for part in parts:
            seconds = part.action()
            if turn:
                part.seconds.append(seconds)
            progress.step()
        if turn:
            yield


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError where a file that is to be written cannot be, is an input, or is named twice."""
    if args.out is not None and args.out.suffix != ".json":
        raise InputError(f"--out {args.out} must end in .json; the table goes beside it as .md.")
    outputs = [
        (args.out, "--out"),
        (args.out and args.out.with_suffix(".md"), "--out, its table"),
        (args.profile, "--profile"),
    ]
    named = (args.checkpoint_path, args.draft_checkpoint_path)
    folders = [model_folder(folder) for folder in named if folder is not None]
    inputs = [
        file for folder in folders for file in [folder / "config.json", *checkpoint_files(folder).values()]
    ]
    real: list[Path] = []
    for path, flag in outputs:
        if path is not None:
            real.append(check_writable(path, flag))
            check_not_input(path, [*set(inputs), *filter(None, [args.judge_path])], flag)

    if len(set(real)) < len(real):
        raise InputError(f"--profile {args.profile} names a file that --out writes; name another one.")


def rows_ahead(args: argparse.Namespace) -> int:
    """Rows that a step or a verification reads from its position on."""
    return max([args.speculate_k + 1, *args.rows]) if has_draft(args) else 1


def fit_lengths(args: argparse.Namespace) -> int:
    """Fills in positions and lengths that the command line leaves open, so that they fit the models' context;
    returns it."""
    context = min(shape.max_position for shape in shapes_of(args) if shape is not None)
    args.positions = list(dict.fromkeys(args.positions or [max(1, min(500, context - rows_ahead(args)))]))
    args.prefill = list(dict.fromkeys([min(512, context)] if args.prefill is None else args.prefill))
    args.prompt_tokens = args.prompt_tokens or max(1, min(64, context // 8))
    args.max_new_tokens = args.max_new_tokens or max(1, min(200, context - args.prompt_tokens))
    return context


def check_lengths(args: argparse.Namespace) -> None:
    """Raises InputError where positions, prompts or caches do not fit the models, or the models one
    another."""
    context, (target, draft) = fit_lengths(args), shapes_of(args)
    longest = max([*args.positions, *args.prefill, args.prompt_tokens + args.max_new_tokens])
    if longest > context:
        raise InputError(
            f"--positions, --prefill and generations reach {longest} tokens, but the context is {context}."
        )
    if (reached := max(args.positions) + rows_ahead(args)) > context:
        raise InputError(
            f"--positions {max(args.positions)}: {rows_ahead(args)} rows from "
            f"there on reach {reached} tokens, but the context is {context}."
        )

    for length in args.cache_length or []:
        if length < needed_length(args):
            raise InputError(
                f"--cache_length {length} is too short for this run, which needs {needed_length(args)}."
            )

    if args.checkpoint_path and args.draft_checkpoint_path:
        check_pair(target, draft, (args.checkpoint_path, args.draft_checkpoint_path))
    elif draft is not None and target.vocab_size != draft.vocab_size:
        raise InputError(
            "Draft and target have different vocabularies, of "
            f"{draft.vocab_size} and {target.vocab_size} tokens."
        )


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for a command line that cannot run."""
    for ours, theirs in (("checkpoint_path", "preset"), ("draft_checkpoint_path", "draft_preset")):
        if getattr(args, ours) and getattr(args, theirs):
            raise InputError(f"--{ours} and --{theirs} both name a model; give one of them.")

    modes_of(args)
    if len(set(args.modes or [])) < len(args.modes or []):
        raise InputError("--modes names a mode twice.")
    if not has_draft(args) and (args.accept is not None or args.rows or args.judge_path):
        raise InputError(
            "--accept, --rows and --judge_path concern rounds with a draft; name one with --draft_preset."
        )
    if args.accept is not None and args.accept > args.speculate_k:
        raise InputError(f"--accept {args.accept} must be between 0 and --speculate_k {args.speculate_k}.")
    if args.judge_path and args.preset:
        raise InputError(
            "--judge_path: random weights have no judge; leave it out, and one of zeros is computed."
        )
    if needs_judge(args.verify) and args.draft_checkpoint_path and not args.judge_path:
        raise InputError(
            f"--verify {args.verify} needs a judge; name one with --judge_path, or another rule."
        )
    if args.modes and (args.mode or args.attention or args.products):
        raise InputError(
            "--modes names how the target is quantised; leave --mode, --attention and --products out."
        )
    if args.peers and (args.max_new_tokens == 1 or args.mode or args.draft_mode or args.modes):
        raise InputError(
            "--peers runs transformers on unquantised weights for at "
            "least 2 tokens; mind --mode, --modes, --max_new_tokens."
        )
    if (args.attention or args.products) and (args.profile or args.peers):
        raise InputError("--attention and --products measure nothing else; leave --profile and --peers out.")
    check_lengths(args)
    check_outputs(args)


def summarise(part: Part, limit: float) -> dict:
    """A part as figures; limit: bytes a second that the machine reaches. Quartiles need QUARTILES_FROM
    repeats."""
    n, median = len(part.seconds), statistics.median(part.seconds)
    row = {"part": part.name, "positions": part.at, "ms": 1e3 * median, "ms_min": 1e3 * min(part.seconds),
           "ms_max": 1e3 * max(part.seconds), "n": n}  # fmt: skip
    if n >= QUARTILES_FROM:
        low, _, high = statistics.quantiles(part.seconds, n=4, method="inclusive")
        row |= {"ms_p25": 1e3 * low, "ms_p75": 1e3 * high}

    row["spread"] = (range_of(row)[1] - range_of(row)[0]) / row["ms"] if n > 2 else None
    row |= {
        "noisy": None if n < 3 else row["spread"] > NOISY,
        "samples_ms": [1e3 * second for second in part.seconds],
    }
    if part.bytes:
        row |= {
            "bytes": part.bytes,
            "gb_per_s": part.bytes / median / 1e9,
            "share_of_limit": part.bytes / median / limit,
        }

    if part.flops:
        row |= {"flops": part.flops, "tflops": part.flops / median / 1e12}
    if part.tokens:
        row["tokens_per_second"] = part.tokens / median
    return row | ({"note": part.note} if part.note else {})


def settings_of(args: argparse.Namespace, bench: Workbench | None) -> dict:
    """What was measured, as fields. Rule, threshold, M and imposed acceptance are those of the rounds, None
    without any."""
    drafts = bench is not None and bench.fast is not None
    schemes = (scheme_of(args), scheme_of(args, "draft_"))
    dtype = str(run_dtype(args.precision, args.device)).removeprefix("torch.")
    return {
        "model": model_name(args.checkpoint_path, args.preset),
        "draft_model": model_name(args.draft_checkpoint_path, args.draft_preset),
        "rule": args.verify if drafts else None,
        "threshold": (bench.fast.settings.threshold or 0.0) if drafts else None,
        "speculate_k": args.speculate_k if drafts else None,
        "imposed_acceptance": args.accept,
        "mode": schemes[0] and str(schemes[0]),
        "draft_mode": schemes[1] and str(schemes[1]),
        "modes": modes_of(args),
        "compile": args.compile,
        "precision": dtype,
        "dtype": dtype,
        "device": str(args.device),
        "torch": torch.__version__,
        "prompt_tokens": args.prompt_tokens,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
    }


def make_report(
    args, argv: list[str], parts: list[Part], bench: Workbench | None, speeds: tuple[float, float]
) -> dict:
    """All that was measured so far. speeds: bytes a second of reading and of copying."""
    limit = "copy" if args.device.type == "cuda" else "read"
    read, copied = speeds
    report = {
        "schema": SCHEMA,
        "command": printable(f"python scripts/benchmark.py {shlex.join(argv)}".rstrip()),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(),
        "commit": commit(),
        **settings_of(args, bench),
        "read_gb_per_s": read / 1e9,
        "copy_gb_per_s": copied / 1e9,
        "limit": limit,
        "rows": [summarise(part, copied if limit == "copy" else read) for part in parts],
    }
    if bench is None:
        return report
    # with several modes there are several of each
    figures = {} if args.modes else bench.round_figures(report["rows"])
    return report | {"startup": bench.startup} | figures


def noise(rows: list[dict]) -> str:
    """A sentence on how far the times can be trusted."""
    n, noisy = rows[0]["n"], sum(bool(row["noisy"]) for row in rows)
    if n < 3:
        return f"How noisy these times are is not known: {n} of at least 3 repeats."
    between = "their quartiles" if n >= QUARTILES_FROM else "least and most"
    if not noisy:
        return f"Between {between} no part spreads over more than {NOISY:.0%} of its median."
    return (
        f"Noisy: between {between} {noisy} of {len(rows)} parts spread over more than {NOISY:.0%} of "
        "their median. Measure them again on an idle machine before anything is built on a difference."
    )


def as_table(rows: list[dict]) -> str:
    """A Markdown table."""
    n = rows[0]["n"]
    between = "25% to 75%" if n >= QUARTILES_FROM else "least to most"
    lines = [
        f"| part | at positions | ms (median of {n}) | {between} | GB | GB/s | share of limit | tokens/s | |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        low, high = range_of(row)
        first, last = row["positions"] or ("", "")
        cells = [row["part"], f"{first}" if first == last else f"{first} to {last}", f"{row['ms']:.3f}",
                 f"{low:.3f} to {high:.3f}"]  # fmt: skip
        cells += (
            [f"{row['bytes'] / 1e9:.3f}", f"{row['gb_per_s']:.1f}", f"{row['share_of_limit']:.0%}"]
            if "bytes" in row
            else [""] * 3
        )
        cells += [f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else ""]
        speed = f"{row['tflops']:.2f} TFLOP/s" if "tflops" in row else ""
        cells += [", ".join(filter(None, (row.get("note"), speed, "noisy" if row["noisy"] else "")))]
        lines.append("| " + " | ".join(cells) + " |")

    return "\n".join([*lines, "", noise(rows)])


def as_text(report: dict) -> str:
    """The report as Markdown."""
    made = f"{report['date']}; {report['machine']}; commit {report['commit']}; {report['dtype']}"
    lines = [f"`{report['command']}`; {made}.", ""]
    lines.append(
        f"Bandwidth measured: read {report['read_gb_per_s']:.1f} GB/s, copy "
        f"{report['copy_gb_per_s']:.1f} GB/s (reads and writes); the limit is {report['limit']}."
    )
    lines += ["", as_table(report["rows"]), ""]
    for name, found in report.get("startup", {}).items():
        if "seconds" in found:
            lines.append(f"- {name}: {found['seconds']:.1f} s")
        else:
            speed, cat = (found["bytes"] / found[key] / 1e9 for key in ("load_seconds", "cat_seconds"))
            lines.append(
                f"- loading {name}: {found['bytes'] / 1e9:.3f} GB at {speed:.2f} GB/s (`cat` {cat:.2f} GB/s)"
            )

    if report.get("host_overhead") is not None:
        lines.append(f"- host overhead: {report['host_overhead']:.2%}")
    if report.get("tokens_a_round") is not None:
        cut = ", without the last, which the generation's end cuts (its time is in the tokens/s)" * bool(
            report["rounds_cut"]
        )
        lines.append(f"- tokens a round: {report['tokens_a_round']:.2f} in {report['rounds']} rounds{cut}")

    return "\n".join(lines)


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """From a parsed command line to the report."""
    args.device = pick_device(args.device)
    kernels.use_pdl(args.pdl, args.device)
    check_args(args)
    for scheme in [*map(scheme_named, args.modes or []), scheme_of(args), scheme_of(args, "draft_")]:
        check_device(args.device, scheme)
    speeds = bandwidth(args.device)
    bench, dtype = None, run_dtype(args.precision, args.device)
    if args.attention or args.products:
        parts = (attention_parts if args.attention else product_parts)(args, shapes_of(args)[0], dtype)
    else:
        bench, parts = workbenches(args)

    for _ in measure(parts, args.repeats):
        report = make_report(args, argv, parts, bench, speeds)
        if args.out is not None:  # after every turn: a run that is stopped leaves what it has
            write_file(args.out.with_suffix(".md"), (as_text(report) + "\n").encode())
            write_file(args.out, (json.dumps(report, indent=1) + "\n").encode())

    if args.profile is not None:
        bench.trace(args.profile)
    print(as_text(report))
    print(json.dumps(report))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(Parser(__doc__), argv)
    run_script("benchmark.py", lambda: run(args, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
