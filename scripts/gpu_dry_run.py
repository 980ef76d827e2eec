"""What the compiled steps would launch on a GPU, and how good their machine code is; no GPU is needed.

    python scripts/gpu_dry_run.py                                   # Llama 3.1 8B with the 1B as its draft
    python scripts/gpu_dry_run.py --mode int8 --verify judge --machine_code
    python scripts/gpu_dry_run.py --capability 8.0 9.0 10.0 --steps plain verify --out dry_run.json

Each step of generate.py (plain; a draft's first and later ones; the verification) is lowered by Inductor for
a GPU that is not there. The report counts what it would launch in a layer and in all, and the bytes that its
kernels move beside those that must be read. It names graph breaks, waits of the host and copies of a cache;
none of them may be, and with one the exit code is 1. --machine_code compiles every Triton kernel for that
GPU: registers, spills, which unit multiplies, how wide the loads are. So a change that adds a launch or a
spill is seen at once, on any machine. Prefill is not compiled, and not in here.

Milliseconds are predicted from assumed costs (`Costs`): they compare two versions of the code, and only
scripts/benchmark.py on a GPU says what is true. A table for people; the last line is JSON.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from files import check_writable, read_json, write_file
from judge import RULES
from kernels import MOST_ROWS
from quantize import scheme_named
from scripts.lib import no_gpu
from scripts.lib.flags import FIXED_K, add_flags
from scripts.lib.gpus import GPUS, Costs, measured_bandwidth

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("plain", "draft_first", "draft_next", "verify")
FLAWS = {"graph_breaks": "graph break", "host_syncs": "wait of the host", "cache_copies": "copy of a cache"}
KINDS = ("inductor", "own", "cublas", "aten")  # as lowering.py's Launch has them
CAPABILITIES = [".".join(map(str, capability)) for capability in no_gpu.CHIPS]


def mode(text: str) -> str:
    """A flag's `type`: none, bf16 (the same), or a mode of quantize.py with its group."""
    try:
        scheme = scheme_named("none" if text == "bf16" else text)
        return text if scheme is not None else "none"
    except InputError:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} must be none, bf16, int8, fp8, int4 or int4/GROUP"
        ) from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    shape = "a published shape, or DIMxLAYERS"
    add_flags(
        parser,
        preset={"default": "Llama-3.1-8B", "help": f"the target: {shape}"},
        draft_preset={"default": "Llama-3.2-1B", "help": f"the draft: {shape}"},
    )
    modes = "none or bf16: as they are; int8, fp8, int4, int4/128"
    add("--mode", type=mode, default="none", help=f"quantise the weights so; {modes}")
    add("--draft_mode", type=mode, default="none", help="quantise the draft's weights so")
    add_flags(parser, precision={"default": "bf16", "help": "run type"})
    add(
        "--verify",
        choices=list(RULES),
        default="standard",
        help="the rule; judge: with a head of random weights",
    )
    add_flags(parser, "temperature", "pdl", speculate_k=FIXED_K | {"default": 20})
    add("--steps", choices=STEPS, nargs="*", default=list(STEPS), help="which steps")
    add(
        "--layers",
        type=whole(2, 16),
        default=4,
        help="lower so many, and half of them; the rest is like the difference",
    )
    held = {
        "type": whole(64, 1 << 20),
        "default": 500,
        "help": "positions that the cache holds, all of them read",
    }
    add_flags(parser, "gpu", cache_length=held)
    add("--capability", choices=CAPABILITIES, nargs="+", help="compute capabilities (default: that of --gpu)")
    add("--machine_code", action="store_true", help="compile every Triton kernel, and read its machine code")
    many = "compile our own kernels for passes of so many rows, by every tiling"
    add("--rows", type=whole(1, MOST_ROWS), nargs="+", default=[], help=many)
    add("--measured", type=Path, help="a report by benchmark.py, for its bandwidth (default: assumed)")
    add_flags(parser, out={"help": "write the figures, with every launch and kernel, to this .json file"})
    args = parser.parse_args(argv)
    own = ".".join(map(str, GPUS[args.gpu].capability))
    args.capability = args.capability or [own]
    return args


def lower(args: argparse.Namespace, capability: str) -> dict:
    """The report of scripts/lib/lowering.py, from a process that believes in a GPU of that capability."""
    request = {name: value for name, value in vars(args).items() if name not in ("out", "measured", "gpu")}
    request["capability"] = [int(number) for number in capability.split(".")]
    command = [sys.executable, "-W", "ignore", "-m", "scripts.lib.lowering", json.dumps(request)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def costs_of(args: argparse.Namespace) -> Costs:
    """The assumed costs on --gpu, with the bandwidth of --measured if given."""
    if args.measured is None:
        return Costs(GPUS[args.gpu].copies)
    report, where = read_json(args.measured, "--measured"), f"--measured {args.measured}"
    if report.get("limit") != "copy":
        raise InputError(f"{where} was not measured on a GPU; name a report that benchmark.py wrote there.")
    return Costs(measured_bandwidth(report, where))


COLUMNS = (
    f"{'step':12}{'rows':>5}{'a layer':>9}{'kernels':>9}{'MB needed':>11}{'MB moved':>11}{'ms':>9}   of these"
)


def step_lines(name: str, step: dict) -> list[str]:
    """A step in the table, and what must not be in it."""
    flaws = [f"  {word.upper()}: {text}" for kind, word in FLAWS.items() for text in step[kind]]
    if step["graph_breaks"]:
        return [f"{name:12} does not compile as one graph", *flaws]
    megabytes = "".join(f"{step[count] / 1e6:11.1f}" for count in ("bytes_needed", "bytes_moved"))
    predicted = "-" if step["milliseconds"] is None else f"{step['milliseconds']:.2f}"
    kinds = ", ".join(f"{step[kind]} {kind}" for kind in KINDS if step[kind])
    counts = f"{step['rows']:5}{step['layer']['kernels']:9.1f}{step['kernels']:9}"
    return [f"{name:12}{counts}{megabytes}{predicted:>9}   {kinds}", *flaws]


def kernel_lines(report: dict) -> list[str]:
    """A row for each kernel of the machine code, once."""
    lines = [
        "kernel"
        + " " * 36
        + "registers  shared  stack spills  unit      loop  bits of its loads; others; how"
    ]
    found = [row for step in report["steps"].values() for row in step["machine_code"]] + report["by_rows"]
    for row in found:
        name = row["kernel"] if len(row["kernel"]) < 42 else f"{row['kernel'][:28]}...{row['kernel'][-10:]}"
        inside, others = (
            " ".join(f"{count}x{width}" for width, count in row[part].items()) or "none"
            for part in ("loop_loads", "other_loads")
        )
        room = "" if row["fits"] else "; MORE SHARED MEMORY THAN THERE IS"
        local = f"{row['registers']:9}{row['shared']:8}{row['stack']:7}{row['spills']:7}"
        loop = f"{row['unit']:9}{row['loop_instructions']:5}"
        lines.append(f"{name:42}{local}  {loop}  {inside}; {others}; {row['tiling'] or row['shapes']}{room}")
    return list(dict.fromkeys(lines))


def describe(args: argparse.Namespace, capability: str, costs: Costs) -> tuple[list[str], dict]:
    """A report as text, and as figures."""
    report = lower(args, capability)
    of_gpu = report["capability"] == list(GPUS[args.gpu].capability)
    for step in report["steps"].values():
        step["milliseconds"] = costs.seconds(step) * 1e3 if of_gpu else None
    models = f"{args.preset} ({args.mode}) with {args.draft_preset} ({args.draft_mode}), {args.precision}"
    lines = [f"{models}, {args.verify}; compute capability {capability}; {report['positions']} positions"]
    lines += [COLUMNS, *(line for name, step in report["steps"].items() for line in step_lines(name, step))]
    if of_gpu:
        source = "measured" if args.measured else "assumed"
        lines.append(f"ms: predicted for {args.gpu} at {costs.bandwidth / 1e9:.0f} GB/s ({source})")
    if args.machine_code or args.rows:
        lines += kernel_lines(report)
    return lines, report


def run(args: argparse.Namespace) -> None:
    """From a parsed command line to the report; the last line is JSON."""
    no_gpu.check_tools()
    costs = costs_of(args)
    if args.out is not None:
        check_writable(args.out, "--out")
    reports = []
    for capability in args.capability:
        lines, report = describe(args, capability, costs)
        reports.append(report)
        print("\n".join(lines), flush=True)
    figures = {"costs": asdict(costs), "reports": reports}
    if args.out is not None:
        write_file(args.out, json.dumps(figures, indent=1).encode())
    for report in reports:
        for step in report["steps"].values():
            del step["launches"], step["machine_code"]
        del report["by_rows"]
    print(json.dumps(figures))
    if any(step[kind] for report in reports for step in report["steps"].values() for kind in FLAWS):
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run_script("gpu_dry_run.py", lambda: run(args))


if __name__ == "__main__":
    main()
