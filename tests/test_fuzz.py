"""Protects: no file and no flag, however damaged, makes a script end in a traceback, hang, or touch what is not its own.

The cases are those of tests/hostile.py, which runs thousands of them; here a fixed few hundred run in one process, a child
of pytest's, through each script's `main`. A failure prints the command, and where files were damaged their content.
"""

import os
import random
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import torch
from hostile import COMMANDS, Case, spoilt, spoilt_flag, try_case
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = 40  # damaged files a kind; a flag gets VALUES values
VALUES = 2
FILES = {  # kind: which command reads which files
    "config": [("generate.py", 0, ["target/config.json", "draft/config.json"]), ("generate.py", 3, ["llama3/config.json"])],
    "safetensors": [("generate.py", 0, ["target/model.safetensors", "draft/model.safetensors"]),
                    ("generate.py", 5, ["sharded/model.safetensors.index.json", "sharded/model-00001-of-*.safetensors"])],
    "tokenizer": [("generate.py", 3, ["llama3/tokenizer.json", "llama3/tokenizer_config.json", "llama3/generation_config.json"]),
                  ("generate.py", 4, ["tiktoken/tokenizer.model", "tiktoken/chat_template.jinja", "tiktoken/tokenizer_config.json"]),
                  ("generate.py", 0, ["target/tokenizer.model", "target/tokenizer_config.json"])],
    "lines": [("judge.py", 1, ["answers.jsonl", "mined.jsonl", "texts.jsonl"]), ("annotate.py", 0, ["unmarked.jsonl"]),
              ("evaluate.py", 3, ["questions.jsonl"]), ("evaluate.py", 4, ["gsm8k.jsonl", "train.jsonl"]),
              ("evaluate.py", 5, ["math.jsonl"]), ("evaluate.py", 6, ["arc_test.json"]), ("evaluate.py", 8, ["turns.jsonl"]),
              ("evaluate.py", 7, ["mmlu/test/law_test.csv", "mmlu/dev/law_dev.csv"]), ("score_text.py", 0, ["texts.jsonl"])],
    "results": [("report.py", 0, ["resume/run.jsonl"]), ("plot.py", 0, ["resume/run.jsonl"]), ("plot.py", 1, ["reports/pareto.json"]),
                ("plot.py", 2, ["reports/latency_1b.json"]), ("plan.py", 1, ["reports/latency_1b.json"]),
                ("evaluate.py", 1, ["resume/run.jsonl"]), ("evaluate.py", 2, ["parts/run.jsonl.part0of2"]),
                ("build_judge_data.py", 1, ["resume/data.jsonl.all"]), ("mine_important_tokens.py", 1, ["resume/mined.jsonl.part0of1"]),
                ("mine_important_tokens.py", 2, ["parts/mined.jsonl.part1of2"])],
    "judge": [("generate.py", 0, ["judge.safetensors"]), ("generate.py", 1, ["calibration.json"]), ("judge.py", 4, ["judge.safetensors"]),
              ("judge.py", 3, ["resume/answers.jsonl"]), ("judge.py", 1, ["cache/*/*.safetensors"])],
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared():
    """The world of tests/hostile.py, how it is, and every script's flags."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    root.chmod(0o755)
    environ = dict(os.environ)
    yield hostile.prepared(root)
    os.environ.clear()
    os.environ.update(environ)
    for path in root.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(root)


def isolated(cases: Callable[[Callable[[Case], None]], None], prepared) -> None:
    """Runs `cases`, which is given `check`, in a child process, so that what scripts leave in a process is no other test's.

    Fails with all that was wrong: each command, what it did, and where files were damaged their content.
    """
    failures = []
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        os.close(read_end)
        try:
            torch.set_num_threads(1)
            hostile.set_limits()
            cases(lambda case: failures.extend(check(prepared, case)))
            os.write(write_end, "\n\n".join(failures)[:60000].encode(errors="backslashreplace"))
        except BaseException:
            os.write(write_end, traceback.format_exc()[-8000:].encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert not said and status == 0, said or f"exit code {status}"


def check(prepared, case: Case) -> list[str]:
    """Runs one case; what was wrong, as one text, or nothing."""
    world, pristine, _ = prepared
    done, found = try_case(world, pristine, case, hostile.run_inside)
    shown = [
        f"{case.script} {shlex.join(case.argv)}"[:3000],
        case.how,
        *found,
        f"exit code {done.code}",
        done.err[-2500:],
    ]
    shown += [f"{name}: {content[:1500]!r}" for name, content in case.files.items()]
    return ["\n".join(shown)] if found else []


def test_every_script_has_commands():
    assert set(hostile.scripts()) == set(COMMANDS)


@pytest.mark.parametrize(
    "script",
    [pytest.param(each, marks=pytest.mark.slow) if each == "gpu_dry_run.py" else each for each in COMMANDS],
)  # whose seconds are those of a dry run
def test_flags(prepared, script):
    """Every flag that a script's own parser has, with values that are none."""

    def cases(check) -> None:
        for words, flags in prepared[2][script]:
            command = next(c for c in map(shlex.split, COMMANDS[script]) if c[: len(words)] == words)
            if script in hostile.SLOW:  # seconds a run: it may not begin
                command = [*hostile.without(command, ["--checkpoint_path"]), "--checkpoint_path", "missing"]
            for flag in flags:
                rng = random.Random(f"{script} {flag.dest}")
                for _ in range(VALUES):
                    check(Case(script, spoilt_flag(rng, command, flag), "flag"))

    isolated(cases, prepared)


@pytest.mark.parametrize("kind", list(FILES))
def test_files(prepared, kind):
    """Files of each kind, damaged as values and as bytes."""
    world = prepared[0]
    choices = [
        (script, shlex.split(COMMANDS[script][number]), path.relative_to(world).as_posix())
        for script, number, patterns in FILES[kind]
        for pattern in patterns
        for path in sorted(world.glob(pattern))[:1]
    ]

    def cases(check) -> None:
        @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.sampled_from(choices), st.randoms(use_true_random=True))
        def examples(choice, rng: random.Random) -> None:
            script, command, name = choice
            check(
                Case(
                    script, command, f"damaged {name}", {name: spoilt(rng, name, (world / name).read_bytes())}
                )
            )

        examples()

    isolated(cases, prepared)


@pytest.mark.parametrize(
    "odd",
    [
        "odd/fifo",
        "odd/socket",
        "odd/folder",
        "odd/loop",
        "odd/full",
        "odd/zero",
        "odd/dangling",
        "odd/terabyte",
    ],
)
def test_inputs_that_are_no_regular_file(prepared, odd):
    """One file of every command at a time, in the place of which lies something else."""
    world = prepared[0]

    def cases(check) -> None:
        rng = random.Random(odd)
        for script, commands in COMMANDS.items():
            command = shlex.split(rng.choice(commands))
            if script not in hostile.SLOW and (names := hostile.inputs_of(world, command)):
                name = rng.choice(names)
                check(Case(script, command, f"{name} is {odd}", {name: odd}))

    isolated(cases, prepared)


def test_the_check_itself_sees_what_it_should(prepared):
    """A script that prints a traceback, one that says nothing, one that changes an input: each is a complaint."""
    world, pristine, _ = prepared
    case = Case("plan.py", ["--check"])
    for code, said, expected in ((1, "Traceback (most recent call last)", ["traceback"]), (2, "", ["no sentence"]), (0, "", []),
                                 (2, "plan.py: a sentence.\n", []), (2, "plan.py: 'NoneType' object.\n", ["Python's words"]), (99, "", ["traceback"])):  # fmt: skip
        found = try_case(
            world, pristine, case, lambda *_, code=code, said=said: hostile.Done(code, "", said, 0.0)
        )[1]
        assert [each[: len(first)] for each, first in zip(found, expected, strict=True)] == expected

    def damage(*_):
        (world / "text.txt").write_text("lost")
        (world / "more.txt").write_text("left")
        os.mkfifo(world / "odd" / "other")
        os.replace(world / "odd" / "other", world / "odd" / "fifo")  # in its place another one
        return hostile.Done(0, "", "", 0.0)

    found = try_case(world, pristine, case, damage)[1]
    assert {"changed text.txt", "left more.txt"} <= set(
        found
    ) and "replaced odd/fifo, no regular file" in found
    assert (world / "text.txt").read_text() != "lost" and not (world / "more.txt").exists()
