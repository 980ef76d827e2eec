"""Protects: every command of gpu_check.sh, on a tiny model; what is done is not done again; a killed call goes on; limits hold."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Child

from cli import Parser
from scripts import benchmark
from scripts.lib import gpu_steps
from scripts.lib.benchmark_args import parse_args
from scripts.lib.gpu_steps import STEPS, Step, main

GPU = {"gpu": "Fake 9000", "memory": 80e9, "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
TINY = {"Llama-3.1-8B": "128x2", "Llama-3.2-1B": "128x1", "Llama-3.1-70B": "128x2", "--compile": "", "8192": "70",
        "2048": "70", "--repeats 5": "--repeats 1"}  # fmt: skip


def python(code: str) -> str:
    """A step's command that runs this code."""
    return f"-c {shlex.quote(code)}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three quick steps and a GPU that is none; returns the folder of results. Each step notes that it ran."""
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    quick = {
        "tests": Step(100, python(f"print('[gw0] PASSED a'); print('[gw1] FAILED b'); {note}('tests ')")),
        "pair": Step(200, python(f"{note}('pair ')")),
        "large": Step(200, python(f"{note}('large ')"), 100e9),
        "demo": Step(300, python(f"{note}('demo '); raise SystemExit({note!r} and 3)")),
    }
    monkeypatch.setattr(gpu_steps, "STEPS", quick)
    monkeypatch.setattr(gpu_steps, "look_at_gpu", lambda: dict(GPU))
    monkeypatch.setattr(gpu_steps, "code_digest", lambda: "code")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches"))
    return tmp_path / "out"


def call(*argv: str) -> int:
    try:
        main(list(argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def ran(place) -> list[str]:
    """The steps that ran since it was last asked."""
    note = place.parent / "ran"
    names = note.read_text().split() if note.exists() else []
    note.unlink(missing_ok=True)
    return names


def report(place) -> dict:
    return json.loads((place / "gpu_check.json").read_text())["steps"]


def test_a_call_goes_on_where_the_last_one_ended(place, capsys):
    """What fits the budget runs; what is done stays; what failed, or is named, runs again."""
    assert call("--budget", "310") == 0 and ran(place) == ["tests", "pair"]
    out = capsys.readouterr().out
    assert "to do, at most: tests 100 s, pair 200 s, demo 300 s; 600 s together, 310 s in this call" in out
    assert (
        "large is left out: it needs 100 GB" in out
        and f"go on with: OUT={place} scripts/gpu_check.sh\n" in out
    )
    assert call() == 1 and ran(place) == ["demo"]
    assert call() == 1 and ran(place) == ["demo"]
    assert report(place)["demo"]["exit_code"] == 3 and report(place)["tests"]["tests"] == {
        "failed": 1,
        "passed": 1,
    }
    assert call("pair") == 0 and ran(place) == ["pair"]
    assert call("large") == 0 and ran(place) == ["large"]
    capsys.readouterr()
    assert call("--again", "--budget", "310") == 0 and ran(place) == ["tests", "pair"]
    assert "scripts/gpu_check.sh demo\n" in capsys.readouterr().out
    text = (place / "gpu_check.md").read_text()
    assert "## demo: exit code 3" in text and "Fake 9000, driver 1, torch 2.11, triton 3.6, commit " in text
    assert not list(place.glob("*.tmp"))


@pytest.mark.parametrize("what", ["gpu", "torch", "code"])
def test_other_code_or_another_machine_is_not_done(place, monkeypatch, what):
    assert call("tests") == 0 and ran(place) == ["tests"]
    assert call("--budget", "150") == 2 and ran(place) == []  # pair would be next
    if what == "code":
        monkeypatch.setattr(gpu_steps, "code_digest", lambda: "other")
    else:
        monkeypatch.setattr(gpu_steps, "look_at_gpu", lambda: GPU | {what: "other"})
    assert call("--budget", "150") == 0 and ran(place) == ["tests"]


def test_a_step_that_hangs_is_ended_and_the_rest_goes_on(place, monkeypatch, capsys):
    """By an interrupt, after which it may say what it has, or, where it takes none, killed. Nothing is left of it."""
    say = "import signal, subprocess, sys, time; child = subprocess.Popen(['sleep', '99']); print(child.pid, flush=True)"
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    steps = {
        "polite": Step(1, python(f"{say}\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('so far')")),
        "deaf": Step(1, python(f"{say}; {deaf}; time.sleep(99)")),
        "last": Step(9, python("print('after')")),
    }
    monkeypatch.setattr(gpu_steps, "STEPS", steps)
    monkeypatch.setattr(gpu_steps, "GRACE", 1)
    assert call() == 1
    found = report(place)
    assert [found[name]["exit_code"] for name in steps] == [124, 137, 0]
    assert found["polite"]["tail"][-1] == "so far" and found["last"]["tail"] == ["after"]
    assert "so far" in capsys.readouterr().out
    for name in ("polite", "deaf"):
        assert gone(int(found[name]["tail"][0]))


def test_what_a_failed_benchmark_has_measured_is_kept(place, monkeypatch):
    """benchmark.py writes after every turn: the report holds that, and the words that it ended with."""
    folder = repr(str(place / "gpu_check" / "pair"))
    code = f"name = {folder}; open(name + '.json', 'w').write('{{\"ms\": 3}}'); open(name + '.md', 'w').write('| 3 ms |')"
    step = Step(9, python(f"{code}; raise SystemExit('a fault')"))
    monkeypatch.setattr(gpu_steps, "STEPS", {"pair": step})
    assert call() == 1
    entry, text = report(place)["pair"], (place / "gpu_check.md").read_text()
    assert entry["figures"] == {"ms": 3} and entry["exit_code"] == 1
    assert text.index("exit code 1") < text.index("| 3 ms |") < text.index("a fault")


def gone(pid: int) -> bool:
    """Whether a process has ended, or ends now."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] in "ZX"  # noqa: SIM115
    except FileNotFoundError:
        return True


def test_a_killed_call_takes_its_step_along_and_the_next_one_goes_on(place, monkeypatch):
    log = place / "gpu_check" / "pair.log"
    slow = Step(99, python("import os, time; print(os.getpid(), flush=True); time.sleep(99)"))
    monkeypatch.setitem(gpu_steps.STEPS, "pair", slow)
    child, until = Child(main, []), time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    assert call() == 2  # two at a time are refused
    child.send(9)
    assert child.wait() == -9 and report(place)["pair"]["exit_code"] is None
    assert "## pair: cut off" in (place / "gpu_check.md").read_text()
    while not (ended := gone(int(log.read_text()))) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended and ran(place) == ["tests"]
    monkeypatch.setitem(gpu_steps.STEPS, "pair", Step(9, python("print('whole')")))
    assert call("--budget", "200") == 0 and ran(place) == [] and report(place)["pair"]["tail"] == ["whole"]


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "odd" / "gpu_check.json").mkdir(parents=True)
    for arguments, more, words in (
        (["small"], {}, "STEP small must be a step: tests, pair, rows"), (["--budget", "0"], {}, "--budget 0"),
        ([], {"OUT": str(tmp_path / "file")}, "is no folder"), ([], {"OUT": "/proc/x"}, "/proc/x"),
        ([], {"OUT": str(tmp_path / "odd")}, "it is a folder"), ([], {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}, "sees no GPU"),
    ):  # fmt: skip
        environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"} | more
        command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert found.returncode == 2 and words in found.stderr, found.stderr
        assert found.stderr.startswith("gpu_check.sh: ") and (found.stderr.count("\n"), found.stdout) == (
            1,
            "",
        )


def test_what_cannot_be_gone_on_with_is_one_sentence(place, capsys):
    assert call("--budget", "50") == 2 and "tests may take 115 s" in capsys.readouterr().err
    place.mkdir(exist_ok=True)
    for steps in ("3", '{"pair": 3}', '{"demo": {"exit_code": 0}}'):
        (place / "gpu_check.json").write_text(f'{{"steps": {steps}}}')
        assert call() == 2 and "is no report of gpu_check.sh" in capsys.readouterr().err and ran(place) == []


def test_the_digest_is_of_files_of_code_alone(tmp_path, monkeypatch):
    """Not of folders that a test run leaves, as .pytest_cache."""
    digest = gpu_steps.code_digest()
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    (tmp_path / ".pytest_cache").mkdir()
    assert digest != gpu_steps.code_digest() == gpu_steps.code_digest()
    found = {gpu_steps.code_digest()}
    for name in ("kernels.py", "kernels.cpp", "scripts/lib/a.py", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        found.add(gpu_steps.code_digest())
    assert len(found) == 5


def test_all_steps_fit_calls_of_ten_minutes_and_a_machine_of_forty_five():
    """With 20 s before the first step, and 30 s between two calls. The tests come first: they answer in the first call."""
    assert list(STEPS) == ["tests", "pair", "rows", "attention", "products", "large", "demo"]
    limits, calls = [step.limit + gpu_steps.GRACE for step in STEPS.values()], [0]
    assert max(limits) + 20 <= 540
    for limit in limits:
        calls = [*calls, limit] if calls[-1] + limit + 20 > 540 else [*calls[:-1], calls[-1] + limit]
    assert sum(calls) + (20 + 30) * len(calls) <= 45 * 60
    text = (ROOT / "docs" / "latency.md").read_text()
    told = {name: int(seconds) for name, seconds in re.findall(r"^\| `(\w+)` \|.*\| (\d+) s \|$", text, re.M)}
    assert (
        told == {name: step.limit for name, step in STEPS.items()} and "together they are 38 minutes" in text
    )
    assert round(sum(step.limit for step in STEPS.values()) / 60) == 38


BENCHMARKS = [name for name, step in STEPS.items() if "benchmark.py" in step.command]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_runs_on_a_tiny_model(name, tmp_path, capsys, monkeypatch):
    """The flags as they stand are read and checked; the same flags with small shapes run on a CPU."""
    words = STEPS[name].command.split()[1:]
    benchmark.check_args(
        parse_args(Parser(None), [*words, "--device", "cpu", "--out", str(tmp_path / "x.json")])
    )
    line = " ".join(words)
    for long, short in TINY.items():
        line = line.replace(long, short)
    monkeypatch.setattr(benchmark, "bandwidth", lambda device: (1e10, 1e10))
    small = ["--device", "cpu", "--out", str(tmp_path / "x.json"), "--max_new_tokens", "24", "--repeats", "1"]
    if "--attention" in line:
        parts = benchmark.attention_parts
        monkeypatch.setattr(benchmark, "attention_parts", lambda *rest: parts(*rest)[:2])
    benchmark.main([*line.split(), *small])
    assert json.loads((tmp_path / "x.json").read_text())["rows"] and (tmp_path / "x.md").exists()


@pytest.mark.slow
def test_each_benchmark_runs_on_a_gpu_that_is_not_there():
    """What only a GPU has: captured graphs, Triton's attention, parts timed back to back. The demo's files are real, and left out."""
    pytest.importorskip("triton")
    commands = []
    for name in BENCHMARKS:
        line = " ".join(STEPS[name].command.split()[1:])
        for long in ("Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.1-70B"):
            line = line.replace(long, TINY[long])
        if name != "demo":
            commands.append([*line.split(), "--device", "cuda", "--max_new_tokens", "24", "--repeats", "1"])
    command = [sys.executable, "-W", "ignore", "tests/fake_gpu.py", json.dumps(commands)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"schema"')]
    parts = [{row["part"] for row in report["rows"]} for report in reports]
    assert [(report["device"], report["limit"]) for report in reports] == [("cuda:0", "copy")] * 5
    assert {
        "draft loop, M = 20 at 500",
        "verify 21 rows at 500",
        "prefill of 8192 tokens",
        "generate, judge",
    } <= parts[0]
    assert {"verify 17 rows at 500", "verify 33 rows at 500"} <= parts[
        1
    ] and "attention by attend, 33 rows at 32768" in parts[2]
    assert any("PyTorch's int4/128" in part for part in parts[3]) and reports[4]["mode"] == "int8"


def test_the_tests_step_finds_every_test_that_needs_a_gpu():
    words = STEPS["tests"].command.split()
    named = {word for word in words if word.endswith(".py")}
    marked = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"mark\.gpu|\bDEVICES\b", path.read_text()) and path.name != "test_gpu_check.py"
    }
    assert named == marked
    command = [sys.executable, *words, "--collect-only", "-q", "-n", "0"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and int(re.search(r"(\d+)/\d+ tests collected", found.stdout)[1]) >= 58
