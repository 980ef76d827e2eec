"""What a pair of models needs and gives on given GPUs, before they are rented: memory a rank, seconds a round, tokens/s.

    python scripts/plan.py                                     # the papers' two configurations, and a 405B on 16 GPUs
    python scripts/plan.py --target Llama-3.1-70B --draft Llama-3.1-8B --mode int8 --gpus 4 --gpu h200 --m_star 12
    python scripts/plan.py --check                             # held against every measured round in benchmarks/

A step takes the bytes that a rank reads (as scripts/benchmark.py counts them: every weight once, the cache so far) over
the memory's bandwidth, plus, for each collective, its latency and its bytes over the link: an all-reduce of n bytes moves
2 (1 - 1/N) n a rank, an all-gather (N - 1) n. Nothing else is counted: no arithmetic, no launches, no host. So this is a
bound from below on a round; --check says how far the measured ones are from it.

Acceptance: a draft token passes with probability a, if those before it did, the same at every place. A round of M then
accepts a (1 - a^M) / (1 - a) tokens; --m_star says how many at --speculate_k (m*, without the target's own token), which
gives a, and a the m* of every other M. The best M has the most tokens a second.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import tp
from files import read_json
from generate import capacity_for
from model import DTYPES, ModelArgs
from quantize import MODES, Scheme, check_scheme, read_scheme, scheme_named, scheme_of, weight_bytes
from scripts import benchmark

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PART = re.compile(
    r"(?:(?P<mode>\S+): )?(?P<what>plain step|draft loop, M =|verify|round, M =) ?(?P<number>\d*)(?: rows)? at (?P<at>\d+)"
)
LONGEST = 64  # draft tokens a round that are tried
GRAPHS = 1.5e9  # bytes of CUDA context, captured graphs and work space; assumed


@dataclass(frozen=True)
class Gpu:
    """memory in bytes, bandwidth and link (one way, to all others together) in bytes a second, latency of a collective in s."""

    memory: float
    bandwidth: float
    link: float
    latency: float = 10e-6


GPUS = {  # data sheets; the latency is assumed (NCCL inside a machine; --all_reduce symmetric is about half)
    "a100": Gpu(80e9, 2.04e12, 300e9),
    "h100": Gpu(80e9, 3.35e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 450e9),
    "b200": Gpu(180e9, 7.7e12, 900e9),
}


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

    def seconds(self, gpu: Gpu, position: int, rows: int, logit_rows: int, gather: bool = False) -> float:
        """Of one forward of `rows` rows."""
        found, n = self.read(position, rows) / gpu.bandwidth, self.world
        if n > 1:
            sent = tp.traffic(self.args, rows, n, self.dtype.itemsize, logit_rows, gather)
            moved = 2 * (1 - 1 / n) * sent["reduced_bytes"] + (n - 1) * sent["gathered_bytes"]
            found += (sent["all_reduces"] + sent["gathers"]) * gpu.latency + moved / gpu.link
        return found


@dataclass(frozen=True)
class Plan:
    """A pair on some GPUs. draft None: plain decoding."""

    target: Role
    draft: Role | None
    gpu: Gpu
    gather: bool = False  # the rule needs probabilities

    def round(self, m: int, position: int) -> float:
        """Seconds of a round of m draft tokens: m draft steps, the first of two rows, and a verification of m + 1 rows."""
        drafting = 0.0
        if self.draft is not None and m > 0:
            first, other = (self.draft.seconds(self.gpu, position, rows, 1, self.gather) for rows in (2, 1))
            drafting = first + (m - 1) * other
        return drafting + self.target.seconds(self.gpu, position, m + 1, m + 1, self.gather)

    def memory(self, length: int, m: int) -> dict[str, float]:
        """Bytes a rank, by what they are for."""
        roles = [role for role in (self.target, self.draft) if role is not None]
        capacity = capacity_for(length, m)
        return {"weights": sum(role.weights() for role in roles),
                "caches": sum(role.local.cache_bytes(capacity, role.dtype) for role in roles), "graphs": GRAPHS}  # fmt: skip


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


def make_role(name: str, mode: str, world: int, group_size: int = 32) -> Role:
    """A preset or folder on `world` ranks; mode: bf16, fp32, fp16 or one of quantize.MODES (a quantised folder has its own)."""
    folder = Path(name)
    args = ModelArgs.from_folder(folder) if folder.is_dir() else benchmark.shape_of(name)
    scheme = Scheme(mode, group_size if mode == "int4" else 32) if mode in MODES else None
    if folder.is_dir() and (written := read_scheme(folder)):
        scheme = written[0]
    if scheme is not None:
        check_scheme(scheme)
        tp.Shard(0, world).check_columns(args, scheme.group_size if scheme.mode == "int4" else 32)
    return Role(args, tp.Shard(0, world).local(args), DTYPES.get(mode, torch.bfloat16), scheme, world)


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that a command line asks for."""
    gpu = GPUS[args.gpu]
    scale = {"memory": 1e9, "bandwidth": 1e9, "link": 1e9, "latency": 1e-6}
    given = {name: getattr(args, name) * unit for name, unit in scale.items() if getattr(args, name) is not None}
    for name, value in given.items():
        if not 0 < value < float("inf"):
            raise InputError(f"--{name} {getattr(args, name):g} must be a positive number.")
    target, draft = make_role(args.target, args.mode, args.gpus), None
    if args.draft:
        draft = make_role(args.draft, args.draft_mode or args.mode, 1)
        where = args.draft_tp or tp.place_draft(draft.args, draft.weights(), args.gpus, "cuda")
        draft = make_role(args.draft, args.draft_mode or args.mode, args.gpus) if where == "shard" else draft
        if draft.args.vocab_size != target.args.vocab_size:
            raise InputError(f"{args.draft} and {args.target} do not share a vocabulary.")
    return Plan(target, draft, replace(gpu, **given), args.gather)


def describe(args: argparse.Namespace) -> tuple[list[str], dict]:
    """A plan as text, and as figures."""
    plan, k, at = make_plan(args), args.speculate_k, args.position
    memory, plain = plan.memory(args.cache_length, k), plan.target.seconds(plan.gpu, at, 1, 1)
    total = sum(memory.values())
    fits = f"{'fits' if total <= plan.gpu.memory else 'DOES NOT FIT'} into {plan.gpu.memory / 1e9:.0f}"
    pair = f"{args.target} ({args.mode})" + (f" with {args.draft} ({args.draft_mode or args.mode})" if args.draft else "")
    lines = [
        f"{pair} on {args.gpus} {args.gpu.upper()}",
        f"  memory a rank: {memory['weights'] / 1e9:.1f} GB of weights + {memory['caches'] / 1e9:.2f} GB of caches for "
        f"{args.cache_length} tokens + {memory['graphs'] / 1e9:.1f} GB = {total / 1e9:.1f} GB, which {fits}",
        f"  plain: {plain * 1e3:.2f} ms a token, {1 / plain:.0f} tokens/s",
    ]  # fmt: skip
    figures = {"memory": memory, "fits": total <= plan.gpu.memory, "plain_seconds": plain}
    if plan.draft is not None:
        m_star, a = args.m_star, acceptance(args.m_star, k)
        seconds, best = plan.round(k, at), best_m(plan, a, at)
        speed, best_speed = (m_star + 1) / seconds, (accepted(a, best) + 1) / plan.round(best, at)
        where = "sharded" if plan.draft.world > 1 else "whole on every rank"
        lines += [
            f"  draft {where}: a round of M = {k} takes {seconds * 1e3:.2f} ms",
            f"  at m* {m_star:g}: {speed:.0f} tokens/s, {speed * plain:.1f} times plain",
            f"  best M where a = {a:.3f} of draft tokens pass: {best}, m* {accepted(a, best):.1f}, {best_speed:.0f} tokens/s",
        ]
        figures |= {"round_seconds": seconds, "tokens_per_second": speed, "acceptance": a, "best_speculate_k": best,
                    "best_tokens_per_second": best_speed}  # fmt: skip
    return lines, figures


BETWEEN_MACHINES = ["--link", "50", "--latency", "30"]  # 400 Gb/s a GPU; the latency is assumed
DEFAULTS = [  # the papers' two configurations (Judge Decoding, arXiv 2501.19309), and what needs two machines
    ["--target", "Llama-3.1-70B", "--draft", "Llama-3.1-8B", "--mode", "int8", "--gpus", "2"],
    ["--target", "Llama-3.1-405B", "--draft", "Llama-3.1-8B", "--mode", "int8", "--gpus", "8"],
    ["--target", "Llama-3.1-405B", "--draft", "Llama-3.1-8B", "--mode", "bf16", "--gpus", "16", *BETWEEN_MACHINES],
]


def predictions(report: dict) -> list[tuple[str, float, float]]:
    """(part, predicted ms, measured ms) of each step and round in a report by scripts/benchmark.py, from the models, types
    and M that its command names and the bandwidth that it measured. It ran on one device."""
    args = benchmark.parse_args(shlex.split(report["command"])[2:])
    gpu, dtype, roles = Gpu(0, report[f"{report['limit']}_gb_per_s"] * 1e9, 1), getattr(torch, report["dtype"]), []
    for shape, whose in zip(benchmark.shapes_of(args), ("", "draft_")):
        roles.append(Role(shape, shape, dtype, scheme_of(args, whose), 1) if shape is not None else None)
    plan, found = Plan(*roles, gpu), []
    for row in report["rows"]:
        if not (match := PART.match(row["part"])):
            continue
        what, number, at = match["what"], int(match["number"] or 0), int(match["at"])
        if match["mode"]:
            scheme = scheme_named(match["mode"])
            plan = replace(plan, target=replace(plan.target, scheme=scheme and replace(scheme, lm_head=args.quantize_lm_head)))
        seconds = {
            "plain step": lambda plan=plan, at=at: plan.round(0, at),
            "draft loop, M =": lambda plan=plan, at=at, m=number: (
                plan.round(m, at) - plan.target.seconds(gpu, at, m + 1, m + 1)
            ),
            "verify": lambda plan=plan, at=at, rows=number: plan.target.seconds(gpu, at, rows, rows),
            "round, M =": lambda plan=plan, at=at, m=number: plan.round(m, at),
        }[what]()
        found.append((row["part"], seconds * 1e3, row["ms"]))
    return found


def check(folder: Path) -> tuple[list[str], dict]:
    """Holds predictions against every measured step and round in a folder of reports."""
    lines, all_errors = [f"{'measured by':22} {'part':34} {'predicted':>9} {'measured':>9}  error"], []
    for path in sorted(folder.glob("*.json")):
        report = read_json(path)
        if "rows" not in report or "limit" not in report:
            continue
        for part, predicted, measured in predictions(report):
            all_errors.append(predicted / measured - 1)
            lines.append(f"{path.stem:22} {part:34} {predicted:6.2f} ms {measured:6.2f} ms  {all_errors[-1]:+.0%}")
    if not all_errors:
        raise InputError(f"{folder} holds no report by scripts/benchmark.py to hold predictions against.")
    middle = sorted(all_errors)[len(all_errors) // 2]
    lines.append(
        f"error of {len(all_errors)} predictions: median {middle:+.0%}, from {min(all_errors):+.0%} to {max(all_errors):+.0%} "
        "(all on one device; collectives and GPUs are unmeasured)"
    )
    return lines, {"n": len(all_errors), "median_error": middle, "lowest": min(all_errors), "highest": max(all_errors)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--target", help="a preset, DIMxLAYERS, or a folder (default: three plans)")
    add("--draft", help="the same for the draft; without one: plain decoding")
    add("--mode", choices=[*DTYPES, *MODES], default="bf16", help="how weights are kept")
    add("--draft_mode", choices=[*DTYPES, *MODES], help="how the draft's are (default: as --mode)")
    add("--draft_tp", choices=("shard", "replicate"), help="default: by tp.place_draft")
    add("--gpus", type=int, default=1, help="ranks, one a GPU")
    add("--gpu", choices=GPUS, default="h100")
    add("--memory", type=float, help="GB of a GPU (default: its data sheet's, as below)")
    add("--bandwidth", type=float, help="GB/s of its memory")
    add("--link", type=float, help="GB/s to the other GPUs, one way (default: its data sheet's; beyond 8 GPUs 50)")
    add("--latency", type=float, help="us of a collective (default: 10; beyond 8 GPUs 30)")
    add("--gather", action="store_true", help="the rule needs probabilities (all but standard and judge)")
    add("--m_star", type=float, default=12.0, help="m*, draft tokens accepted a round of --speculate_k")
    add("--speculate_k", type=int, default=16, help="M")
    add("--position", type=int, default=1000, help="tokens in the cache")
    add("--cache_length", type=int, default=8192, help="tokens that the cache holds")
    add("--check", action="store_true", help="hold predictions against every report in --benchmarks")
    add("--benchmarks", type=Path, default=BENCHMARKS)
    args = parser.parse_args(argv)
    if args.draft and not args.target:
        parser.error("--draft needs a target beside it; name one with --target")
    for name in ("gpus", "speculate_k", "position", "cache_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least 1")
    return args


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """From a parsed command line to the report; the last line is JSON."""
    if args.check:
        lines, figures = check(args.benchmarks)
    elif args.target is not None:
        if args.gpus > 8 and args.link is None and args.latency is None:
            print(f"More than 8 GPUs are taken for several machines: {' '.join(BETWEEN_MACHINES)}.", file=sys.stderr)
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
