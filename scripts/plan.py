"""What a pair of models needs and gives on given GPUs, before they are rented: memory a rank, seconds a
round, tokens/s.

    python scripts/plan.py              # the papers' two configurations, and a 405B on 16 GPUs
    python scripts/plan.py --target Llama-3.1-70B --draft Llama-3.1-8B --mode int8 --gpus 4 --m_star 12
    python scripts/plan.py --pairs      # the papers' pairs, by how the draft is kept and where it runs
    python scripts/plan.py --check      # held against every measured round in benchmarks/

A step takes the bytes that a rank reads (as scripts/benchmark.py counts them: every weight once, the cache so
far) over the bandwidth of a copy, a gap for each kernel (counted by scripts/gpu_dry_run.py; its length is
assumed), and for each collective its latency and its bytes over the link: an all-reduce of n bytes moves
2 (1 - 1/N) n a rank, an all-gather (N - 1) n, a broadcast n. No arithmetic is counted, and no host. A CPU has
no gaps: what --check says there is how far a measured round is from its bytes.

Acceptance: a draft token passes with probability a, if those before it did, the same at every place. A round
of M then accepts a (1 - a^M) / (1 - a) tokens; --m_star says how many at --speculate_k (m*, without the
target's own token), which gives a, and a the m* of every other M. The best M has the most tokens a second.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, number, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import contextlib
import io
import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import tp
from checkpoint import read_config
from files import read_json
from generate import capacity_for
from hub import ID, model_folder
from model import DTYPES, ModelArgs
from quantize import FORMATS, Scheme, check_columns, check_scheme, open_checkpoint, scheme_of, weight_bytes
from scripts.lib import benchmark_args
from scripts.lib.benchmark_args import SCHEMA, is_preset, modes_of, shapes_of
from scripts.lib.flags import FIXED_K, add_flags
from scripts.lib.gpus import GPUS, Costs, Gpu, field_of, launches, measured_bandwidth, positive
from scripts.lib.memory import in_words, memory_terms
from scripts.lib.ranks import place_draft

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PART = re.compile(
    r"(?:(?P<mode>\S+): )?(?P<what>plain step|draft loop, M =|verify|round, M =) ?(?P<number>[0-9]*)(?: "
    r"rows)? at "
    r"(?P<at>[0-9]+)"
)
# as benchmark.py writes it
SCHEME = re.compile(r"(int8|fp8|int4)(?:/(32|64|128))?( symmetric)?( dynamic)?( with LM head)?")
MOST = 10**9  # tokens, positions and rows
LONGEST = 64  # draft tokens a round that are tried


def traffic(
    args: ModelArgs, rows: int, world: int, itemsize: int, logit_rows: int, *, gather: bool
) -> dict[str, int]:
    """Collectives of one forward of T rows through L layers: counts, and bytes that each rank puts in.

    2 L + 1 all-reduces (attention, feed-forward; the embedding) of T dim numbers of `itemsize` bytes; for
    logits an all-gather, of T pairs (value, index) of 16 bytes where only the most likely token counts, of T
    ceil(vocabulary / world) fp32 logits where a rule or sampling needs probabilities (gather).
    """
    each, reduces = 4 * -(-args.vocab_size // world) if gather else 16, 2 * args.n_layer + 1
    sent = logit_rows * each if world > 1 else 0
    return {"all_reduces": reduces, "reduced_bytes": reduces * rows * args.dim * itemsize,
            "gathers": int(sent > 0), "gathered_bytes": sent}  # fmt: skip


def decisions(m: int, *, replicated: bool, sampled: bool) -> list[int]:
    """Bytes of each broadcast in a round of m draft tokens, where rank 0 decides for all: int64 numbers.

    A replicated draft's tokens and whether its logits were finite, or, when sampling, each token of a shared
    one; and the verdict: how many are accepted, and the target's own token. Greedy `standard` needs no
    verdict, and greedy `plain` nothing at all.
    """
    return ([8 * (m + 1)] if replicated else [8] * m * sampled) + [8 * 2]


@dataclass(frozen=True)
class Device:
    """A GPU, and what a step costs on it."""

    gpu: Gpu
    costs: Costs


@dataclass(frozen=True)
class Role:
    """A model of the pair: its whole shape, this rank's part of it, and how its weights are kept."""

    args: ModelArgs
    local: ModelArgs
    dtype: torch.dtype
    scheme: Scheme | None
    world: int  # ranks that share it

    def weights(self) -> int:
        return weight_bytes(self.local, self.dtype, self.scheme)

    def read(self, position: int, rows: int) -> int:
        """Bytes that a rank reads for one forward, as scripts/benchmark.py counts them."""
        saved = weight_bytes(self.local, self.dtype, None) - self.weights()
        return self.local.step_bytes(position, self.dtype, rows) - saved

    def seconds(self, on: Device, step: str, position: int, rows: int, *, gather: bool = False) -> float:
        """Of one forward of `rows` rows. step: of gpus.KERNELS; a verification has logits of all rows."""
        counted = launches(step, self.scheme is not None, self.args.n_layer)
        found, n = on.costs.seconds(counted | {"bytes_moved": self.read(position, rows)}), self.world
        if n > 1:
            logit_rows = rows if step == "verify" else 1
            sent = traffic(self.args, rows, n, self.dtype.itemsize, logit_rows, gather=gather)
            moved = 2 * (1 - 1 / n) * sent["reduced_bytes"] + (n - 1) * sent["gathered_bytes"]
            found += (sent["all_reduces"] + sent["gathers"]) * on.gpu.latency + moved / on.gpu.link
        return found


@dataclass(frozen=True)
class Plan:
    """A pair on some GPUs. draft None: plain decoding."""

    target: Role
    draft: Role | None
    on: Device
    gather: bool = False  # the rule needs probabilities

    def plain(self, position: int) -> float:
        """Seconds of a token of the target alone."""
        return self.target.seconds(self.on, "plain", position, 1)

    def draft_step(self, position: int) -> float:
        """Seconds of a draft step after the first."""
        return self.draft.seconds(self.on, "draft_next", position, 1, gather=self.gather)

    def drafting(self, m: int, position: int) -> float:
        """Seconds of m draft steps, the first of two rows."""
        first = self.draft.seconds(self.on, "draft_first", position, 2, gather=self.gather)
        return first + (m - 1) * self.draft_step(position)

    def verification(self, rows: int, position: int) -> float:
        return self.target.seconds(self.on, "verify", position, rows, gather=self.gather)

    def round(self, m: int, position: int) -> float:
        """Seconds of a round of m draft tokens: the draft loop, what rank 0 tells the others, and a
        verification of m + 1 rows."""
        deciding, gpu = 0.0, self.on.gpu
        if self.target.world > 1:
            sent = decisions(m, replicated=self.draft.world == 1, sampled=False)
            deciding = len(sent) * gpu.latency + sum(sent) / gpu.link
        return self.drafting(m, position) + deciding + self.verification(m + 1, position)

    def limit(self, m: int, position: int) -> float:
        """The share of a round that its bytes take at the memory's bandwidth: 1 is the physical limit."""
        small, large = self.draft.read(position, 1), self.target.read(position, m + 1)
        return (m * small + large) / self.on.costs.bandwidth / self.round(m, position)

    def memory(self, length: int, m: int) -> dict[str, float]:
        """Bytes a rank, by what they are for."""
        roles = [role for role in (self.target, self.draft) if role is not None]
        shapes, schemes = [role.local for role in roles], [role.scheme for role in roles]
        sizes = {"capacity": capacity_for(length, m), "speculate_k": m, "world": self.target.world}
        return memory_terms(shapes, schemes, self.target.dtype, "cuda", **sizes)


def accepted(a: float, m: int) -> float:
    """m*: the expected draft tokens accepted of m, each passing with probability a if those before it did."""
    return float(m) if a == 1 else a * (1 - a**m) / (1 - a)


def acceptance(m_star: float, m: int) -> float:
    """The a that gives m_star at m. Raises InputError where none does."""
    if not 0 <= m_star <= m:
        raise InputError(f"--m_star {m_star:g} must be between 0 and --speculate_k {m}: more is not drafted.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle, m) < m_star else (low, middle)
    return high


def best_m(plan: Plan, a: float, position: int) -> int:
    return max(range(1, LONGEST + 1), key=lambda m: (accepted(a, m) + 1) / plan.round(m, position))


def shape_of(name: str) -> tuple[ModelArgs, Path | None]:
    """The shape of a preset, of DIMxLAYERS or of a folder, with that folder."""
    if os.path.isdir(name) or ID.fullmatch(name):
        folder = model_folder(name, weights=False)
        return read_config(folder), folder
    if os.path.lexists(name) or "/" in name:
        raise InputError(
            f"{shortened(name)} is no folder; name a preset, DIMxLAYERS, or a folder with config.json."
        )
    return benchmark_args.shape_of(name), None


def make_role(name: str, mode: str, world: int, group_size: int = 32) -> Role:
    """A preset or folder on `world` ranks; mode: bf16, fp32, fp16 or one of quantize.FORMATS (a quantised
    folder has its own)."""
    args, folder = shape_of(name)
    scheme = None
    if mode in FORMATS:
        scheme = Scheme(mode, group_size if "group_size" in FORMATS[mode].settings else 32)
    if folder is not None:
        scheme = open_checkpoint(folder).scheme or scheme
    if scheme is not None:
        check_scheme(scheme)
        check_columns(args, world, scheme)
    return Role(args, tp.Shard(0, world).local(args), DTYPES.get(mode, torch.bfloat16), scheme, world)


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that a command line asks for."""
    scale = {"memory": 1e9, "bandwidth": 1e9, "link": 1e9, "latency": 1e-6}
    given = {
        name: getattr(args, name) * unit for name, unit in scale.items() if getattr(args, name) is not None
    }
    target, draft = make_role(args.target, args.mode, args.gpus), None
    if args.draft:
        draft = make_role(args.draft, args.draft_mode or args.mode, 1)
        if abs(draft.args.vocab_size - target.args.vocab_size) > 1024:  # more than padding
            raise InputError(f"{args.draft} and {args.target} do not share a vocabulary.")
        if draft.args.n_params > target.args.n_params:
            sizes = [f"{role.args.n_params / 1e9:.3g}" for role in (draft, target)]
            raise InputError(
                f"The draft {args.draft} is larger than the target {args.target} ({sizes[0]} "
                f"against {sizes[1]} billion weights); name the smaller one as --draft."
            )
        where = args.draft_tp or place_draft(draft.args, draft.weights(), args.gpus, "cuda")
        draft = make_role(args.draft, args.draft_mode or args.mode, args.gpus) if where == "shard" else draft

    gpu = replace(GPUS[args.gpu], **given)
    return Plan(
        target, draft, Device(gpu, Costs(gpu.bandwidth if args.bandwidth else gpu.copies)), args.gather
    )


def fit_lengths(args: argparse.Namespace, plan: Plan) -> tuple[int, int]:
    """Cache length and position, where the command line leaves them open as the models' context allows."""
    context = min(role.args.max_position for role in (plan.target, plan.draft) if role is not None)
    length = args.cache_length or min(8192, context)
    position = args.position or min(1000, length)
    if length > context:
        raise InputError(f"--cache_length {length} is longer than the models' context of {context} tokens.")
    if position > length:
        raise InputError(
            f"--position {position} lies beyond a cache of {length} tokens; give a longer --cache_length."
        )
    return length, position


def describe(args: argparse.Namespace) -> tuple[list[str], dict]:
    """A plan as text, and as figures."""
    plan, k = make_plan(args), args.speculate_k
    length, at = fit_lengths(args, plan)
    memory, plain = plan.memory(length, k), plan.plain(at)
    total = sum(memory.values())
    fits = f"{'fits' if total <= plan.on.gpu.memory else 'DOES NOT FIT'} into {plan.on.gpu.memory / 1e9:.0f}"
    reading = plan.target.read(at, 1) / plan.on.costs.bandwidth / plain
    pair = f"{args.target} ({args.mode})" + (
        f" with {args.draft} ({args.draft_mode or args.mode})" if args.draft else ""
    )
    lines = [
        f"{pair} on {args.gpus} {args.gpu.upper()}",
        f"  memory a rank, with caches for {length} tokens: {in_words(memory)}, which {fits}",
        f"  plain, at position {at}: {plain * 1e3:.2f} ms a token, {reading:.0%} of it reading, "
        f"{1 / plain:.0f} tokens/s",
    ]
    figures = {"memory": memory, "fits": total <= plan.on.gpu.memory, "plain_seconds": plain}
    if plan.draft is not None:
        found = round_figures(args, plan, at)
        where = "sharded" if plan.draft.world > 1 else "whole on every rank"
        lines += [
            f"  draft {where}: {found['draft_step_seconds'] * 1e3:.2f} ms a step; with a verification of "
            f"{found['verification_seconds'] * 1e3:.2f} ms a round of M = {k} takes "
            f"{found['round_seconds'] * 1e3:.2f} ms, {found['share_of_limit']:.0%} of it reading",
            f"  at m* {args.m_star:g}: {found['tokens_per_second']:.0f} tokens/s, "
            f"{found['tokens_per_second'] * plain:.1f} times plain",
            f"  best M where a = {found['acceptance']:.3f} of draft tokens pass: "
            f"{found['best_speculate_k']}, {found['best_tokens_per_second']:.0f} tokens/s",
        ]
        figures |= found
    return lines, figures


def round_figures(args: argparse.Namespace, plan: Plan, at: int) -> dict[str, float]:
    """What rounds of --speculate_k take and give at --m_star, and those of the best M."""
    k, a = args.speculate_k, acceptance(args.m_star, args.speculate_k)
    best = best_m(plan, a, at)
    return {
        "draft_step_seconds": plan.draft_step(at),
        "verification_seconds": plan.verification(k + 1, at),
        "round_seconds": plan.round(k, at),
        "share_of_limit": plan.limit(k, at),
        "tokens_per_second": (args.m_star + 1) / plan.round(k, at),
        "acceptance": a,
        "best_speculate_k": best,
        "best_tokens_per_second": (accepted(a, best) + 1) / plan.round(best, at),
    }


BETWEEN_MACHINES = ["--link", "50", "--latency", "30"]  # 400 Gb/s a GPU; the latency is assumed
DEFAULTS = [  # the papers' two configurations (Judge Decoding, arXiv 2501.19309), and what needs two machines
    ["--target", "Llama-3.1-70B", "--draft", "Llama-3.1-8B", "--mode", "int8", "--gpus", "2"],
    ["--target", "Llama-3.1-405B", "--draft", "Llama-3.1-8B", "--mode", "int8", "--gpus", "8"],
    [
        "--target",
        "Llama-3.1-405B",
        "--draft",
        "Llama-3.1-8B",
        "--mode",
        "bf16",
        "--gpus",
        "16",
        *BETWEEN_MACHINES,
    ],
]


# Pairs of the papers -> GPUs, how the target is kept, and tokens/s published on so many H100 (Judge Decoding,
# arXiv 2501.19309, abstract; how its weights were kept is not said)
PAIRS = {
    ("Llama-3.1-8B", "Llama-3.2-1B"): (1, "bf16", None),
    ("Llama-3.1-70B", "Llama-3.1-8B"): (2, "int8", 141),
    ("Llama-3.1-405B", "Llama-3.1-8B"): (8, "int8", 129),
}


def pair_lines(argv: list[str]) -> tuple[list[str], list[dict]]:
    """A row for each pair, type of its draft's weights and placement of its draft; then what is published."""
    head = f"{'target, draft':34} {'a draft step':>12} {'verification':>12} {'round':>9} {'reading':>7}"
    title = "Predicted, nothing measured: M 20, m* 17. Reading is the share of a round in which bytes move."
    lines, said, found = [title, f"{head} {'tokens/s':>8} {'memory':>7}"], [], []
    for (target, draft), (gpus, mode, published) in PAIRS.items():
        rows = []
        for draft_mode in ("bf16", "int8", "int4"):
            for place in ("replicate", "shard")[: min(2, gpus)]:
                flags = ["--target", target, "--draft", draft, "--mode", mode, "--draft_mode", draft_mode]
                flags += ["--gpus", str(gpus), "--draft_tp", place, "--speculate_k", "20", "--m_star", "17"]
                rows.append(pair_row(parse_args([*flags, *argv]), published))
        lines += [row.pop("line") for row in rows]
        found += rows
        if published:
            faster = [row for row in rows if row["tokens_per_second"] > published and row["fits"]]
            best = max(rows, key=lambda row: row["tokens_per_second"])
            place = {"replicate": "whole on every rank", "shard": "sharded"}[best["draft_tp"]]
            said.append(
                f"{target.split('-')[-1]}: {published} tokens/s are published on {gpus} H100; "
                f"{len(faster)} of {len(rows)} are expected to be faster, most a draft in "
                f"{best['draft_mode']}, {place}."
            )
    return [*lines, *said], found


def pair_row(args: argparse.Namespace, published: float | None) -> dict:
    """A row of the table of pairs: its line, and its figures. beats_from: the m* from which on it is faster
    than what was published."""
    plan = make_plan(args)
    length, at = fit_lengths(args, plan)
    figures, needed = round_figures(args, plan, at), sum(plan.memory(length, args.speculate_k).values())
    fits, sizes = needed <= plan.on.gpu.memory, (name.split("-")[-1] for name in (args.target, args.draft))
    names = [f"{size} {mode}" for size, mode in zip(sizes, (args.mode, args.draft_mode))]
    place = {"replicate": " whole", "shard": " sharded"}[args.draft_tp] if args.gpus > 1 else ""
    line = f"{', '.join(names)}{place}, {args.gpus} {args.gpu.upper()}".ljust(34)
    ms = [figures[f"{part}_seconds"] * 1e3 for part in ("draft_step", "verification", "round")]
    line += f" {ms[0]:9.2f} ms {ms[1]:9.2f} ms {ms[2]:6.2f} ms {figures['share_of_limit']:7.0%}"
    line += f" {figures['tokens_per_second']:8.0f} {needed / 1e9:4.0f} GB{'' if fits else ': TOO MUCH'}"
    if published:
        figures["beats_from"] = published * figures["round_seconds"] - 1
        line += f"; more than the published {published} from m* {figures['beats_from']:.1f} on"
    settings = {
        name: getattr(args, name) for name in ("target", "draft", "gpus", "mode", "draft_mode", "draft_tp")
    }
    return settings | figures | {"fits": fits, "line": line}


def scheme_written(text: str | None, where: str) -> Scheme | None:
    """The scheme that benchmark.py wrote as text."""
    if text is None:
        return None
    if not (found := SCHEME.fullmatch(text)):
        raise InputError(f"{where}: {shortened(text)} is no way to quantise that is known.")
    mode, group, symmetric, dynamic, lm_head = found.groups()
    scheme = Scheme(mode, int(group or 32), bool(symmetric), bool(lm_head), bool(dynamic))
    check_scheme(scheme)
    return scheme


def parsed_command(command: str, where: str) -> argparse.Namespace:
    """The arguments of benchmark.py in a report's command. Raises InputError naming the file for what is
    none."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return benchmark_args.parse_args(Parser(None), shlex.split(command)[2:])
    except (SystemExit, ValueError):
        reason = said.getvalue().strip() or "no command line"
        raise InputError(f"{where}: field 'command' is none of scripts/benchmark.py: {reason}") from None


def parts_of(report: dict, where: str) -> list[str]:
    """The names of a report's parts."""
    for row_number, row in enumerate(field_of(report, "rows", list, where), 1):
        if not isinstance(row, dict) or not isinstance(row.get("part"), str):
            raise InputError(f"{where}, row {row_number}: field 'part' is missing or no text.")
    return [row["part"] for row in report["rows"]]


def measured_models(report: dict, where: str) -> tuple[list, dict[str, Scheme | None]]:
    """(shape, scheme) of target and draft, None without one, and the schemes of --modes by name, of a report
    by benchmark.py. One of schema 1 says so in its command and its parts alone."""
    if report.get("schema", 1) == 1:
        args = parsed_command(field_of(report, "command", str, where), where)
        shapes, schemes = shapes_of(args), (scheme_of(args), scheme_of(args, "draft_"))
        args.modes = [
            found["mode"] for found in map(PART.match, parts_of(report, where)) if found and found["mode"]
        ]
        modes = modes_of(args) or {}
    elif report["schema"] == SCHEMA:
        names = field_of(report, "model", str, where), field_of(report, "draft_model", str | None, where)
        shapes = [
            name and shape_of(name if is_preset(name) else str(benchmark_args.ROOT / name))[0]
            for name in names
        ]
        schemes = [
            scheme_written(field_of(report, name, str | None, where), where)
            for name in ("mode", "draft_mode")
        ]
        modes = field_of(report, "modes", dict | None, where) or {}
    else:
        raise InputError(
            f"{where}: schema {shortened(str(report['schema']))} is not known, only 1 and {SCHEMA}."
        )

    found = {
        name: scheme_written(field_of(modes, name, str | None, f"{where}, modes"), where) for name in modes
    }
    return [shape and (shape, scheme) for shape, scheme in zip(shapes, schemes)], found


def predicted(plan: Plan, match: re.Match, modes: dict[str, Scheme | None], where: str) -> float:
    """Seconds of a part of a report."""
    what, count, at = match["what"], match["number"], match["at"]
    if len(count) > 9 or len(at) > 9 or (what != "plain step" and not int(count or 0)):
        raise InputError(
            f"{where}: {shortened(match[0])} is at no position, or of no number of rows, that can be."
        )

    if match["mode"]:
        if match["mode"] not in modes:
            raise InputError(
                f"{where}: mode {shortened(match['mode'])} is not among those that the report names."
            )
        plan = replace(plan, target=replace(plan.target, scheme=modes[match["mode"]]))

    if plan.draft is None and what != "plain step":
        raise InputError(f"{where}: {shortened(match[0])} needs a draft, and the report names none.")
    m, position = int(count or 0), int(at)
    if what == "plain step":
        return plan.plain(position)
    if what == "verify":
        return plan.verification(m, position)
    return plan.drafting(m, position) if what == "draft loop, M =" else plan.round(m, position)


def predictions(report: dict, where: str = "The report") -> list[tuple[str, float, float]]:
    """(part, predicted ms, measured ms) of each step and round in a report by scripts/benchmark.py, from the
    models, types and M that it names and the bandwidth that it measured. It ran on one device. Raises
    InputError naming what is wrong."""
    try:
        models, modes = measured_models(report, where)
    except InputError as error:
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None

    dtype = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}.get(
        field_of(report, "dtype", str, where)
    )
    if dtype is None:
        raise InputError(f"{where}: field 'dtype' must be a type such as float32.")
    bandwidth = measured_bandwidth(report, where)
    on_gpu = report["limit"] == "copy"  # a CPU launches nothing
    costs = Costs(bandwidth) if on_gpu else Costs(bandwidth, product_gap=0, kernel_gap=0)
    roles = [model and Role(model[0], model[0], dtype, model[1], 1) for model in models]
    plan, found = Plan(*roles, Device(Gpu(0, bandwidth, 1), costs)), []
    for row_number, part in enumerate(parts_of(report, where), 1):
        if match := PART.match(part):
            here = f"{where}, row {row_number}"
            seconds = predicted(plan, match, modes, here)
            found.append((part, seconds * 1e3, positive(report["rows"][row_number - 1], "ms", here)))

    return found


def check(folder: Path) -> tuple[list[str], dict]:
    """Holds predictions against every measured step and round in a folder of reports."""
    lines, all_errors = [f"{'measured by':22} {'part':34} {'predicted':>9} {'measured':>9}  error"], []
    for path in sorted(folder.glob("*.json")):
        report = read_json(path)
        if "rows" not in report or "limit" not in report:
            continue
        for part, expected, measured in predictions(report, str(path)):
            all_errors.append(expected / measured - 1)
            lines.append(
                f"{path.stem:22} {part:34} {expected:6.2f} ms {measured:6.2f} ms  {all_errors[-1]:+.0%}"
            )

    if not all_errors:
        raise InputError(f"{folder} holds no report by scripts/benchmark.py to hold predictions against.")
    middle = sorted(all_errors)[len(all_errors) // 2]
    lines.append(
        f"error of {len(all_errors)} predictions: median {middle:+.0%}, from {min(all_errors):+.0%} "
        f"to {max(all_errors):+.0%} (all on one device; collectives and GPUs are unmeasured)"
    )
    return lines, {
        "n": len(all_errors),
        "median_error": middle,
        "lowest": min(all_errors),
        "highest": max(all_errors),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add, size = parser.add_argument, number(1e-3, 1e9)
    add("--target", help="a preset, DIMxLAYERS, or a folder (default: three plans)")
    add("--draft", help="the same for the draft; without one: plain decoding")
    add("--mode", choices=[*DTYPES, *FORMATS], default="bf16", help="how weights are kept")
    add("--draft_mode", choices=[*DTYPES, *FORMATS], help="how the draft's are (default: as --mode)")
    add("--draft_tp", choices=("shard", "replicate"), help="default: by its size")
    add("--gpus", type=whole(1, 4096), default=1, help="ranks, one a GPU")
    add_flags(parser, "gpu")
    add("--memory", type=size, help="GB of a GPU (default: its data sheet's)")
    add("--bandwidth", type=size, help="GB/s that its kernels reach (default: 90%% of its data sheet's)")
    add(
        "--link",
        type=size,
        help="GB/s to the other GPUs, one way (default: its data sheet's; beyond 8 GPUs 50)",
    )
    add("--latency", type=size, help="us of a collective (default: 10; beyond 8 GPUs 30)")
    add("--gather", action="store_true", help="the rule needs probabilities (all but standard and judge)")
    add(
        "--m_star",
        type=number(0, 1024),
        default=12.0,
        help="m*, draft tokens accepted a round of --speculate_k",
    )
    add_flags(parser, speculate_k=FIXED_K)
    add("--position", type=whole(1, MOST), help="tokens in the cache (default: 1000, or as many as it holds)")
    held = "tokens that the cache holds (default: 8192, or the context)"
    add_flags(parser, cache_length={"type": whole(1, MOST), "help": held})
    add("--pairs", action="store_true", help="a table of the papers' pairs by type and place of the draft")
    add("--check", action="store_true", help="hold predictions against every report in --benchmarks")
    add("--benchmarks", type=Path, default=BENCHMARKS, help="a folder of benchmark.py's reports")
    args = parser.parse_args(argv)
    if args.draft and not args.target:
        parser.error("--draft needs a target beside it; name one with --target")
    return args


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """From a parsed command line to the report; the last line is JSON."""
    if args.check:
        lines, figures = check(args.benchmarks)
    elif args.pairs:
        if args.target or args.draft_mode or args.draft_tp or (args.mode, args.gpus) != ("bf16", 1):
            raise InputError(
                "--pairs names models, types and GPUs itself; leave --target, --draft, --mode, --draft_mode, "
                "--draft_tp and --gpus out."
            )
        lines, figures = pair_lines(argv)
    elif args.target is not None:
        if args.gpus > 8 and args.link is None and args.latency is None:
            print(
                f"More than 8 GPUs are taken for several machines: {' '.join(BETWEEN_MACHINES)}.",
                file=sys.stderr,
            )
            args = parse_args([*argv, *BETWEEN_MACHINES])
        lines, figures = describe(args)
    else:
        found = [describe(parse_args([*each, *argv])) for each in DEFAULTS]
        lines, figures = [line for part, _ in found for line in part], [figures for _, figures in found]

    print("\n".join(lines))
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    run_script("plan.py", lambda: run(args, argv))


if __name__ == "__main__":
    main()
