"""Kills each long script at random moments, runs it again to its end, and holds what it wrote against an undisturbed run.

    python tests/kills.py --kills 10                  # all; or some: --scripts evaluate.py train_demo.py
    python tests/kills.py --kills 3 --seed 7

SIGKILL comes at moments spread over the time that the undisturbed run took; the same command then runs again until it ends,
and is killed once more in half of the trials. What counts is what the script leaves for others: lines less their timings,
tensors, files byte by byte. A table says how many kills landed before the end, and how many results were equal.
"""

import argparse
import functools
import hashlib
import http.server
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import hostile
from hostile import DEMO, JUDGED, MINED, ROOT

TIMINGS = (
    "seconds",
    "time",
    "tokens_per_second",
    "ratio",
    "wall_time",
    "prefill",
    "made",
    "ms",
)  # in the name of a field
DATA = Path(os.environ.get("JUDGE_FAST_DATA", ROOT.parent / "shared" / "data"))


def timeless(value):
    """A JSON value without what differs between two equal runs."""
    if isinstance(value, dict):
        return {
            name: timeless(each) for name, each in value.items() if not any(word in name for word in TIMINGS)
        }
    return [timeless(each) for each in value] if isinstance(value, list) else value


def lines(path: Path) -> list:
    return [timeless(json.loads(line)) for line in path.read_text().splitlines()]


def tensors(path: Path) -> list:
    """What a safetensors file holds, its header's JSON texts without timings."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        texts = [
            timeless(json.loads(text)) for text in (file.metadata() or {}).values() if text.startswith("{")
        ]
        return [texts, {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}]


def tree(folder: Path) -> dict:
    """Every file below a folder: its hash."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


class Long(NamedTuple):
    """A script's command; result: reads what it wrote into the folder `made`."""

    command: str
    result: Callable[[Path], object]


LONG = {
    "evaluate.py": Long(f"{DEMO} --limit 5 --verify plain,standard,judge --out made/run.jsonl", lambda made: lines(made / "run.jsonl")),
    "judge.py train": Long("train --data answers.jsonl --checkpoint_path demo/target --out made/judge.safetensors",
                           lambda made: tensors(made / "judge.safetensors")),
    "judge.py calibrate": Long(f"calibrate {DEMO} --max_harm 0.9 --limit 4 --confidence 0.5 --walk 0.9,0.5 --out made/judge.safetensors",
                               lambda made: tensors(made / "judge.safetensors")),
    "build_judge_data.py": Long("--checkpoint_path demo/target demo/draft --limit 4 --max_new_tokens 80 --no-tuples --out"
                                " made/data.jsonl --questions demo", lambda made: lines(made / "data.jsonl")),
    "mine_important_tokens.py": Long(f"{MINED} --out made/mined.jsonl", lambda made: lines(made / "mined.jsonl")),
    "train_demo.py": Long("--out made/demo --work made/work --stages draft --steps 3", lambda made: tree(made / "demo")),
    "quantize.py": Long("--checkpoint_path demo/target --out made/packed --mode int8", lambda made: tree(made / "packed")),
    "experiments.py": Long(f"pareto {JUDGED} --limit 2 --work made/work --results made/results",
                           lambda made: timeless(json.loads((made / "results" / "pareto.json").read_text()))),
    "download.py": Long("gsm8k math500 --out made/data --source SOURCE", lambda made: tree(made / "data")),
    "convert_meta_checkpoint.py": Long("--checkpoint_dir meta --out made/converted", lambda made: tree(made / "converted")),
}  # fmt: skip


class Slow(http.server.BaseHTTPRequestHandler):
    """Serves the data folder as raw.githubusercontent.com would, with ranges, a block at a time."""

    def __init__(self, files: dict[str, Path], *more):
        self.files = files
        super().__init__(*more)

    def do_GET(self) -> None:
        path = self.files.get(self.path)
        if path is None:
            return self.send_error(404)
        content, begin = path.read_bytes(), 0
        if given := self.headers.get("Range"):
            begin = int(given.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        for at in range(begin, len(content), 1 << 18):
            self.wfile.write(content[at : min(at + (1 << 18), len(content))])
            time.sleep(0.03)
        return None

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the reader was killed
            super().handle()


@contextmanager
def served():
    """The address of a server of the data folder on 127.0.0.1."""
    from scripts.download import read_table

    files = {file.url(""): DATA / file.file for file in read_table()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, files))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def run(world: Path, script: str, command: str, kill_after: float | None = None) -> tuple[int, str, float]:
    """(exit code, standard error, seconds) of a script in a child of this process, killed after so many seconds."""
    with tempfile.TemporaryFile() as said:
        began, child = time.monotonic(), os.fork()
        if not child:
            code = 99
            try:
                os.setsid()
                for number, to in (
                    (0, os.open(os.devnull, os.O_RDONLY)),
                    (1, said.fileno()),
                    (2, said.fileno()),
                ):
                    os.dup2(to, number)
                os.chdir(world)
                code = hostile.call(hostile.Case(script, shlex.split(command)))
            finally:
                os._exit(code)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if kill_after is not None and time.monotonic() - began >= kill_after:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                break
            time.sleep(0.001)
        said.seek(0)
        return (
            os.waitstatus_to_exitcode(status),
            said.read().decode(errors="replace"),
            time.monotonic() - began,
        )


def fresh(world: Path, name: str) -> Path:
    """An empty folder `made`, with what the script needs there."""
    made = world / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    if name == "train_demo.py":
        (made / "work").mkdir()
        shutil.copy(world / "demo" / "target" / "tokenizer.model", made / "work")
    return made


def trial(world: Path, name: str, command: str, moments: list[float]) -> tuple[int, int, str]:
    """(kills that landed, exit code of the last run, what it said): killed at each moment in turn, then run to its end."""
    script, landed = name.split()[0], 0
    for moment in moments:
        code, _, _ = run(world, script, command, moment)
        landed += code == -signal.SIGKILL
        if code != -signal.SIGKILL:
            break
    code, said, _ = run(world, script, command)
    return landed, code, said


def complete_already(name: str, code: int, said: str) -> bool:
    """Whether a run that came after a complete one refused, as those that write a folder do, rather than writing it again."""
    return (
        code == 2
        and name in ("quantize.py", "convert_meta_checkpoint.py")
        and ("complete" in said or "exists" in said)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="trials a script (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument(
        "--scripts",
        nargs="+",
        choices=list(LONG),
        default=list(LONG),
        metavar="NAME",
        help=f"of {', '.join(LONG)} (default: all)",
    )
    args = parser.parse_args()
    bad = 0
    print("script                     seconds  kills that landed  of trials  equal", flush=True)
    with tempfile.TemporaryDirectory(prefix="kills-") as root, served() as source:
        world, _, _ = hostile.prepared(Path(root))
        for name in args.scripts:
            long, rng = LONG[name], random.Random(f"{args.seed} {name}")
            command = long.command.replace("SOURCE", source)
            made = fresh(world, name)
            run(world, name.split()[0], command)  # compiles and caches what it needs
            made = fresh(world, name)
            code, said, seconds = run(world, name.split()[0], command)
            if code:
                print(f"{name}: the undisturbed run ends with {code}: {said.strip()[-300:]}", flush=True)
                bad += 1
                continue
            expected, landed, equal = long.result(made), 0, 0
            for number in range(args.kills):
                fresh(world, name)
                moments = [seconds * (number + rng.random()) / args.kills] + [seconds * rng.random()] * (
                    number % 2
                )
                hits, code, said = trial(world, name, command, moments)
                landed += hits
                same = (code == 0 or complete_already(name, code, said)) and long.result(made) == expected
                equal += same
                if not same:
                    print(
                        f"  {name}, killed after {moments} s: exit code {code}, {said.strip()[-500:]}",
                        flush=True,
                    )
            print(f"{name:26} {seconds:7.2f} {landed:18} {args.kills:10} {equal:6}", flush=True)
            bad += equal < args.kills
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
