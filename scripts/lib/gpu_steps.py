"""Everything that needs a GPU, in named steps: the tests marked gpu, then speed on random weights.

    OUT=results scripts/gpu_check.sh                # the steps that are not done yet, in their order
    OUT=results scripts/gpu_check.sh pair rows      # these, done or not

A machine may be lent bare and in short calls. So no step starts that could outlast --budget seconds, and the
last line says which command goes on. A step is done when it has ended well, with this code and on this kind
of GPU; one that failed or was cut off runs again. OUT (default: benchmarks) gets gpu_check.json and
gpu_check.md, written anew after every step, and a log of each step in gpu_check/.
"""

from cli import InputError, Parser, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from files import check_folder, check_writable, lock, read_json, write_file

ROOT = Path(__file__).resolve().parents[2]
GRACE = 15  # seconds that a step has to end after its limit, before it is killed
TAIL = 40  # lines of a log that the report keeps


@dataclass(frozen=True)
class Step:
    """limit: seconds that it may take with cold caches. command: what Python runs. memory: bytes that the GPU
    must have."""

    limit: int
    command: str
    memory: float = 0


SMALL = "scripts/benchmark.py --compile --preset Llama-3.1-8B --draft_preset Llama-3.2-1B"
LARGE = "scripts/benchmark.py --compile --preset Llama-3.1-70B --mode int8 --draft_preset Llama-3.1-8B"
# The quick files first: what is cut off leaves their results. Workers: a fault of one leaves the others'.
TESTS = "tests/test_model.py tests/test_kernels.py tests/test_quantize.py tests/test_generate.py"
# M of 20 and 17 accepted a round are what Judge Decoding reports for 8B/70B; 17 and 33 rows are the usual
# verifications. The limits are guesses: with cold caches all kernels compile, most are tuned by measuring.
STEPS = {
    "tests": Step(450, f"-m pytest -v -o addopts= -n 4 --dist load -m gpu --tb short {TESTS}"),
    "pair": Step(420, f"{SMALL} --speculate_k 20 --accept 17 --prefill 2048 8192 --repeats 5"),
    "rows": Step(330, f"{SMALL} --speculate_k 16 --rows 33 --prefill 8192 --repeats 5"),
    "attention": Step(90, "scripts/benchmark.py --attention --preset Llama-3.1-8B --repeats 3"),
    "products": Step(330, "scripts/benchmark.py --products --preset Llama-3.1-8B --repeats 3"),
    "large": Step(
        480, f"{LARGE} --draft_mode int4 --speculate_k 20 --accept 17 --prefill 2048 --repeats 5", 100e9
    ),
    "demo": Step(180, "scripts/benchmark.py --compile --peers"),
}

FACTS = """
import json, subprocess, torch, triton
if torch.cuda.is_available():
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    card = torch.cuda.get_device_properties(0)
    versions = {"cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps({"gpu": card.name, "memory": card.total_memory, "driver": driver} | versions))
"""


def look_at_gpu() -> dict:
    """The GPU and what drives it, asked in a process of its own: this one must hold no GPU memory. Raises
    InputError where there is none."""
    said = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True)
    if said.returncode:
        reason = (said.stderr.strip().splitlines() or [f"exit code {said.returncode}"])[-1]
        raise InputError(f"PyTorch and Triton do not start here ({reason}).")
    if not said.stdout.strip():
        raise InputError("PyTorch sees no GPU here; run it on a machine with CUDA.")
    return json.loads(said.stdout)


def code_digest() -> str:
    """What tells this code from another, with or without git."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.cpp"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("tests/*.py")]
    content = b"".join(file.name.encode() + file.read_bytes() for file in sorted(files))
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Holds the output folder, made where it is missing, for this process alone. Raises InputError."""
    check_folder(out, "OUT")
    (out / "gpu_check").mkdir(parents=True, exist_ok=True)
    for name in ("gpu_check.json", "gpu_check.md"):
        check_writable(out / name)
    held = os.open(out / "gpu_check", os.O_RDONLY)
    try:
        lock(held, out / "gpu_check")
        yield
    finally:
        os.close(held)


def read_report(path: Path) -> dict:
    """The steps of an earlier call by name. Raises InputError for a file that is none of this script's."""
    if not path.exists():
        return {}
    steps, needed = read_json(path).get("steps"), {"exit_code", "machine", "gpu", "commit", "date"}
    if not isinstance(steps, dict) or not all(
        isinstance(entry, dict) and needed <= entry.keys() for entry in steps.values()
    ):
        raise InputError(f"{path} is no report of gpu_check.sh; remove it, or name another OUT.")
    return steps


def lines_of(entry: dict) -> list[str]:
    """What a person wants to see of a step: its table, and of one that failed, or has none, the end of its
    log."""
    table, log = entry.get("table", "").splitlines(), ["```", *entry.get("tail", []), "```"]
    return table if table and entry["exit_code"] == 0 else [*table, *log]


def write_report(out: Path, steps: dict) -> None:
    text = ["# What scripts/gpu_check.sh found", ""]
    for name, entry in steps.items():
        code, made = entry["exit_code"], entry["machine"]
        ended = "cut off" if code is None else f"exit code {code} after {entry['seconds']:.0f} s"
        on = ", ".join(f"{key} {made[key]}" for key in ("driver", "torch", "triton"))
        text += [
            f"## {name}: {ended}",
            "",
            f"{entry['gpu']}, {on}, commit {entry['commit']}, {entry['date']}",
        ]
        text += ["", *lines_of(entry), ""]
    write_file(out / "gpu_check.json", (json.dumps({"steps": steps}, indent=1) + "\n").encode())
    write_file(out / "gpu_check.md", "\n".join(text).encode())


def end_with_parent() -> None:
    """Has the system end a step when this script is killed: the next call must find the GPU free."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; timeout passes it on


def run_limited(command: list[str], limit: int, log: Path) -> int:
    """The exit code of a command under a time limit, 124 or 137 where that ended it; its output goes to the
    log."""
    timed = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(limit), *command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            timed, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=end_with_parent
        )
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code  # a shell's way to say which signal
        except BaseException:
            process.terminate()
            process.wait()
            raise


def found_in(folder: Path, name: str) -> dict:
    """What a step left behind: the end of its log; its figures and their table; of tests, how many passed."""
    log = (folder / f"{name}.log").read_text(errors="replace")
    found: dict = {"tail": [line[:300] for line in log.splitlines()[-TAIL:]]}
    verdicts = re.findall(r" (PASSED|FAILED|ERROR)\b", log)
    if verdicts:
        found["tests"] = {verdict.lower(): verdicts.count(verdict) for verdict in sorted(set(verdicts))}
    if (folder / f"{name}.json").exists():
        table = (folder / f"{name}.md").read_text()
        found |= {"figures": read_json(folder / f"{name}.json"), "table": table}
    return found


def run_step(name: str, out: Path, here: dict, steps: dict) -> dict:
    """Runs a step and enters it into the report, first as one that was cut off."""
    step, folder = STEPS[name], out / "gpu_check"
    command = [sys.executable, *shlex.split(step.command)]
    if "benchmark.py" in step.command:
        command += ["--out", str(folder / f"{name}.json")]
    for kind in ("json", "md"):
        (folder / f"{name}.{kind}").unlink(missing_ok=True)
    caches = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    entry = here | {
        "exit_code": None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": f"python {step.command}",
        "limit": step.limit,
        "caches": "warm" if caches.exists() else "cold",
    }
    steps[name] = entry
    write_report(out, steps)

    began = time.monotonic()
    entry["exit_code"] = run_limited(command, step.limit, folder / f"{name}.log")
    entry["seconds"] = time.monotonic() - began
    entry |= found_in(folder, name)
    write_report(out, steps)
    return entry


def is_done(entry: dict | None, here: dict) -> bool:
    """Whether a step has ended well, with this code on such a machine."""
    same = entry is not None and all(entry.get(key) == here[key] for key in ("code", "gpu", "machine"))
    return same and entry.get("exit_code") == 0


def to_do(args: argparse.Namespace, here: dict, steps: dict) -> list[str]:
    """The steps of this call, in order."""
    if args.steps:
        return list(dict.fromkeys(args.steps))
    fits = [name for name, step in STEPS.items() if step.memory <= here["memory"]]
    for name in STEPS.keys() - set(fits):
        print(f"{name} is left out: it needs {STEPS[name].memory / 1e9:.0f} GB, more than this GPU has.")
    return [name for name in fits if args.again or not is_done(steps.get(name), here)]


class Budget:
    """The seconds of this call."""

    def __init__(self, seconds: int):
        self.seconds, self.began = seconds, time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self.began

    def lacks(self, name: str) -> str:
        """Why a step must not start any more, "" where it may."""
        needed, left = STEPS[name].limit + GRACE, self.seconds - self.now()
        return f"{name} may take {needed} s, and this call has {left:.0f} s left" if needed > left else ""


def run_steps(names: list[str], out: Path, here: dict, steps: dict, budget: Budget) -> tuple[list[str], str]:
    """Runs what still fits -> the steps that failed, and the first that was not run ("": none)."""
    failed = []
    for name in names:
        if budget.lacks(name):
            return failed, name
        print(f"[{budget.now():.0f} s] {name}: python {STEPS[name].command}", flush=True)
        entry = run_step(name, out, here, steps)
        failed += [name] if entry["exit_code"] else []
        print("\n".join(lines_of(entry)))
        print(f"{name}: exit code {entry['exit_code']} after {entry['seconds']:.0f} s", flush=True)
    return failed, ""


def run(args: argparse.Namespace) -> None:
    """From a parsed command line to the report. Exit code 1 where a step of this call failed."""
    budget, out = Budget(args.budget), Path(os.environ.get("OUT") or ROOT / "benchmarks").absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "judge-fast"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))  # of all calls on a machine
    with claimed(out):
        found = look_at_gpu()
        from scripts.lib.results import commit  # loads PyTorch: mistakes are answered sooner without

        here = {"gpu": found.pop("gpu"), "memory": found.pop("memory"), "machine": found,
                "commit": commit(), "code": code_digest()}  # fmt: skip
        steps = read_report(out / "gpu_check.json")
        names = to_do(args, here, steps)
        told = ", ".join(f"{name} {STEPS[name].limit} s" for name in names) or "nothing"
        total = sum(STEPS[name].limit for name in names)
        print(f"{here['gpu']}, driver {found['driver']}, torch {found['torch']}, commit {here['commit']}")
        print(f"to do, at most: {told}; {total} s together, {args.budget} s in this call", flush=True)
        if names and budget.lacks(names[0]):
            raise InputError(f"{budget.lacks(names[0])}; give a larger --budget.")
        failed, stopped = run_steps(names, out, here, steps, budget)

    if stopped:
        rest = names[names.index(stopped) :] if args.steps or args.again else []
        command = " ".join([f"OUT={shlex.quote(str(out))}", "scripts/gpu_check.sh", *rest])
        print(f"[{budget.now():.0f} s] {budget.lacks(stopped)}; go on with: {command}")
    else:
        print(f"[{budget.now():.0f} s] done: {out / 'gpu_check.md'}")
    if failed:
        raise SystemExit(1)


def step_name(text: str) -> str:
    if text not in STEPS:
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be a step: {', '.join(STEPS)}")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="gpu_check.sh")
    add = parser.add_argument
    add(
        "steps",
        nargs="*",
        type=step_name,
        metavar="STEP",
        help=f"of {', '.join(STEPS)} (default: all not done)",
    )
    add("--budget", type=whole(1, 10**6), default=540, help="seconds that this call may take")
    add("--again", action="store_true", help="all steps, done or not")
    args = parser.parse_args(argv)
    run_script("gpu_check.sh", lambda: run(args))


if __name__ == "__main__":
    main()
