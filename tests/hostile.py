"""A campaign of hostile inputs: flags, files, streams, environments and signals that no script may answer with a traceback.

    python tests/hostile.py --count 3000 --seed 1 --log hostile.jsonl
    python tests/hostile.py --seed 1 --case 1234          # one of them again, with its output

Each case takes a command that works in a folder of tiny checkpoints and data, and spoils something: a flag's value, a file
that it reads, who runs it, its streams, its environment, or its time. The rule: exit code 0, 1 or 2, with 2 exactly one
sentence on standard error, never a traceback; nothing that existed is changed but what an output flag names, nothing that
is no regular file is replaced, and nothing new stays but outputs. tests/test_fuzz.py runs the same cases in one process.

One process imports everything, then forks for each case; a tenth, whose point is how a process begins, are processes of
their own. Everything lies in a temporary folder, devices (made there, as root) included; RLIMIT_FSIZE guards the disk.
"""

import argparse
import base64
import copy
import encodings.idna  # noqa: F401 what a case without rights could not load later
import importlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT_S = 60  # of one case
OUTPUTS = (
    "--out",
    "--cache",
    "--work",
    "--profile",
    "--answers",
    "--model_answers",
    "--results",
)  # flags that name outputs

PAIR = "--checkpoint_path target --draft_checkpoint_path draft --device cpu"
SHORT = "--max_new_tokens 4 --speculate_k 2"
JUDGED = f"{PAIR} --judge_path judge.safetensors {SHORT}"
DEMO = (
    "--checkpoint_path demo/target --draft_checkpoint_path demo/draft --judge_path demo/judge.safetensors --device cpu"
    " --max_new_tokens 80"
)
MINED = "--checkpoint_path demo/target --draft_checkpoint_path demo/draft --limit 4 --max_new_tokens 80"
CHAT = "--prompt hi --chat --max_new_tokens 4 --device cpu"
COMMANDS = {  # command lines that work in the folder of `make_world`; the first one is the one whose flags are spoiled
    "generate.py": [
        f"{JUDGED} --prompt hi", f"{DEMO} --calibration calibration.json --json --prompt hi",
        f"{PAIR} {SHORT} --prompt hi --verify kl", f"--checkpoint_path llama3 {CHAT}", f"--checkpoint_path tiktoken {CHAT}",
        "--checkpoint_path sharded --prompt hi --max_new_tokens 4", "--checkpoint_path packed --prompt hi --max_new_tokens 4",
        f"{JUDGED} --prompt - --profile out/profile.json",
    ],
    "judge.py": [
        "train --data answers.jsonl --checkpoint_path target --out out/judge.safetensors --speculate_k 2 --device cpu --l2 0.1",
        "train --data answers.jsonl mined.jsonl --guard texts.jsonl --checkpoint_path target --out out/judge.safetensors"
        " --cache cache --l2 0.1 --speculate_k 2",
        f"calibrate {DEMO} --max_harm 0.9 --limit 2 --confidence 0.5 --walk 0.9,0.5 --out out/judge.safetensors",
        f"calibrate {DEMO} --max_harm 0.9 --limit 2 --walk 0.9 --out out/j.safetensors --answers resume/answers.jsonl",
        f"calibrate {JUDGED} --max_false_accept 0.5 --data answers.jsonl --confidence 0.5 --out out/judge.safetensors",
    ],
    "quantize.py": ["--checkpoint_path target --out out/packed --mode int8"],
    "annotate.py": ["--data unmarked.jsonl --out out/marked.jsonl --checkpoint_path target"],
    "benchmark.py": [
        f"{JUDGED} --positions 8 --prefill 8 --prompt_tokens 4 --repeats 2 --out out/bench.json",
        "--preset 64x1 --verify standard --draft_preset 64x1 --positions 8 --prefill --prompt_tokens 4 --max_new_tokens 4"
        " --repeats 2",
    ],
    "build_judge_data.py": [
        "--checkpoint_path target --limit 2 --questions demo --max_new_tokens 4 --out out/data.jsonl --no-tuples --device cpu",
        "--checkpoint_path demo/target demo/draft --limit 3 --max_new_tokens 80 --no-tuples --annotate_demo --out resume/data.jsonl"
        " --questions demo",
    ],
    "convert_bin.py": ["--checkpoint_path pickled --out out/converted"],
    "convert_gguf.py": ["model.gguf --out out/converted"],
    "convert_meta_checkpoint.py": ["--checkpoint_dir meta --out out/converted"],
    "download.py": ["gsm8k/LICENSE --out out/data --source http://127.0.0.1:9", "--list"],
    "evaluate.py": [
        f"{JUDGED} --limit 2 --verify plain,standard,judge --out out/run.jsonl",
        f"{JUDGED} --limit 2 --verify plain,standard,judge --details --out resume/run.jsonl",
        f"{JUDGED} --limit 2 --verify plain,judge --merge 2 --out parts/run.jsonl",
        f"{JUDGED} --questions questions.jsonl --verify plain --json",
        f"{JUDGED} --task gsm8k --data gsm8k.jsonl --shots 1 --shots_data train.jsonl --verify plain --json",
        f"{JUDGED} --task math500 --data math.jsonl --shots 0 --verify plain", f"{JUDGED} --task arc --data arc_test.json --shots 0",
        f"{JUDGED} --task mmlu --data mmlu --shots 1 --verify plain", f"{JUDGED} --task mt_bench --data turns.jsonl --verify plain"
        " --model_answers out/answers", f"{JUDGED} --task humaneval --data humaneval.jsonl --allow_code_execution --verify plain",
    ],
    "experiments.py": [f"pareto {JUDGED} --limit 2 --work out/work --results out/results --judge_data answers.jsonl"
                       " --mined mined.jsonl"],
    "gpu_dry_run.py": ["--preset 64x2 --draft_preset 64x2 --steps"],
    "mine_important_tokens.py": [
        f"{PAIR} {SHORT} --limit 2 --questions demo --out out/mined.jsonl", f"{MINED} --out resume/mined.jsonl",
        f"{MINED} --merge 2 --out parts/mined.jsonl",
    ],
    "perplexity.py": ["--checkpoint_path target --text text.txt --mode none --window 16 --stride 8 --device cpu",
                      "--checkpoint_path packed --text demo --limit 1 --mode none --window 16"],
    "plan.py": ["--target 2048x16 --draft 512x4 --m_star 8", "--check --benchmarks reports"],
    "plot.py": ["resume/run.jsonl", "reports/pareto.json", "reports/latency_1b.json"],
    "report.py": ["resume/run.jsonl --out out/report.html"],
    "score_text.py": [f"{JUDGED} --data texts.jsonl --show 1", f"{JUDGED} --data texts.jsonl --json"],
    "train_demo.py": ["--out out/demo --work demo-work --stages judge --steps 1 --device cpu"],
}  # fmt: skip
SLOW = ("benchmark.py", "experiments.py")  # seconds each
NO_TRIAL = (
    "--compile",
    "--peers",
    "--attention",
    "--products",
    "--help",
    "--quantize_lm_head",
)  # minutes of work, or none
VALUES = (
    "", " ", "-1", "0", "1e999", "nan", "inf", "-inf", "1" + "0" * 400, "7" * 5000, "-" + "9" * 5000, "9223372036854775807",
    "99999999999999999999", "1.5", "true", "null", "\u0661\u0662", "\u00bd", "\uff11", "1_000", "0x10", "+0", "1e5", " 5 ", "\udcff",
    "\udc80x\udcfe", "n" * 300, "n" * 5000, "\u00e9" * 130, "../x", "..", ".", "/", "a\x1b[31mb", "a\nb", "\u202ex", "a,b", ",", ",,", "=",
    "judge=", "=1", "judge=nan", "kl=1e999", "topk=1.5", "kl=" + "9" * 400, "judge@0", "judge@99999999999999999999", "judge@auto",
    "plain,plain", "demo:nothing", "%s%n", "{}", "--", "-", "cuda:99", "cuda", "mps", "meta", "cpu:7", "xla", "int4/7", "int3", "0/0",
    "1/0", "-1/2", "5/2", "1/99999999999999999999", "NaNxNaN", "0x1", "32x0", "99999999999x99999999999", "file:///dev/zero",
    "ftp://[", "http://127.0.0.1:99999", "1" * 25,
)  # fmt: skip
ODD = ("odd/fifo", "odd/socket", "odd/folder", "odd/loop", "odd/to_fifo", "odd/null", "odd/full", "odd/zero", "odd/terabyte",
       "odd/dangling", "odd/binary", "odd/empty", "odd/\udcff.jsonl", "odd/unreadable", "odd/read_only", "odd/folder/no/such",
       "odd/empty/below", "odd/closed/x", "/proc/self/mem", "/proc/version", "target", "target/config.json", "/dev/tty", "odd/slash/",
       "answers.jsonl", "judge.safetensors", "resume/run.jsonl", "text.txt", "odd/" + "f" * 250)  # fmt: skip


# The folder that commands run in


def make_world(root: Path) -> Path:
    """Makes the folder that `COMMANDS` work in, below `root`; returns it. Some of its files are made by the commands."""
    world = root / "a" / "world"
    world.mkdir(parents=True)
    make_models(world)
    make_data(world)
    for name in ("out", "resume", "parts", "reports", "demo-work"):
        (world / name).mkdir()
    for name in ("pareto", "latency_1b"):
        shutil.copy(ROOT / "benchmarks" / f"{name}.json", world / "reports")
    shutil.copy(world / "target" / "tokenizer.model", world / "demo-work")
    for script, command in (
        ("evaluate.py", f"{JUDGED} --limit 2 --verify plain,standard,judge --details --out resume/run.jsonl"),
        ("evaluate.py", f"{JUDGED} --limit 2 --verify plain,judge --part 0/2 --out parts/run.jsonl"),
        ("evaluate.py", f"{JUDGED} --limit 2 --verify plain,judge --part 1/2 --out parts/run.jsonl"),
        ("mine_important_tokens.py", f"{MINED} --out resume/mined.jsonl"),
        ("build_judge_data.py", COMMANDS["build_judge_data.py"][1]),
        ("judge.py", COMMANDS["judge.py"][1].replace("out/judge", "out/unused")),
        ("judge.py", f"calibrate {DEMO} --verify topk --max_harm 0.9 --confidence 0.5 --limit 3 --walk 1,2 --out calibration.json"),
        ("judge.py", COMMANDS["judge.py"][3]),
        ("quantize.py", "--checkpoint_path target --out packed --mode int8"),
    ):  # fmt: skip
        done = run_forked(world, Case(script, shlex.split(command)))
        if done.code not in (0, 1, 2):
            print(f"{script} {command}: {done.code}\n{done.err}", file=sys.stderr)
    for rank in range(2):  # parts of mining come by torchrun only
        made = world / "resume" / "mined.jsonl.part0of1"
        if made.exists():
            header, *lines = made.read_text().splitlines()
            (world / "parts" / f"mined.jsonl.part{rank}of2").write_text(
                "\n".join([header, *lines[rank::2], ""])
            )
    shutil.rmtree(world / "out")
    (world / "out").mkdir(mode=0o777)
    for path in world.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o644)
    make_odd(world / "odd")
    for path in (root, root / "a", world, world / "odd", world / "odd" / "folder"):
        path.chmod(0o777)
    return world


def make_models(world: Path) -> None:
    """Tiny random Llamas: with the demo's tokenizer, with Llama 3's in both forms, in shards; a judge, Meta's files."""
    import torch
    from conftest import make_folder
    from test_model import write_meta

    from judge import JudgeHead
    from quantize import load_model

    shape = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    demo = ROOT / "checkpoints" / "demo" / "target"
    for name, more in (
        ("target", {"seed": 1}),
        ("draft", {"seed": 2, "num_hidden_layers": 1}),
        ("sharded", {"shard": "60KB"}),
    ):
        make_folder(world / name, **shape | more)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(demo / file, world / name)
    for file in demo.parent.rglob("*.*"):
        (world / "demo" / file.relative_to(demo.parent)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, world / "demo" / file.relative_to(demo.parent))
    theirs = make_folder(
        world / "llama3", **shape | {"vocab_size": 512, "bos_token_id": 256, "eos_token_id": 257}
    )
    shutil.copytree(world / "llama3", world / "tiktoken")
    from tokenizer import CONTROL, SPLIT, byte_alphabet

    vocab = {char: byte for byte, char in byte_alphabet().items()}
    parts = [{"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]  # fmt: skip
    added = [{"id": 256 + place, "content": name, "special": True} for name, place in CONTROL.items()]
    (world / "llama3" / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}}, indent=1))  # fmt: skip
    template = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    (world / "llama3" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "bos_token": "<|begin_of_text|>"})
    )
    (world / "tiktoken" / "tokenizer.model").write_text(
        "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))  # fmt: skip
    (world / "tiktoken" / "chat_template.jinja").write_text(template)
    write_meta(world / "meta", theirs.state_dict(), theirs.config, 1)
    from test_convert_gguf import write_gguf

    write_gguf(world / "model.gguf", theirs)
    shutil.copytree(world / "target", world / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(theirs.state_dict(), world / "pickled" / "pytorch_model.bin")
    target = load_model(world / "target")
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.1
    JudgeHead(weight, torch.tensor(0.3), 0.6, target.fingerprint, {"made": "for tests"}).save(
        world / "judge.safetensors"
    )


def make_data(world: Path) -> None:
    """One small file of each form that is read."""

    def lines(name: str, *objects: dict) -> None:
        (world / name).write_text("".join(json.dumps(each) + "\n" for each in objects))

    answers = [{"prompt": f"Tom has {n} apples.", "response": f" He has {n} left.", "errors": [[4, 7]] if n % 2 else []}
               for n in range(80)]  # fmt: skip
    lines("answers.jsonl", *answers)
    lines("unmarked.jsonl", *({**each, "errors": None, "right": False} for each in answers[:3]))
    lines(
        "mined.jsonl",
        *({"prompt_tokens": [1, 40 + n], "tokens": [50, 51], "labels": [1, n % 2]} for n in range(8)),
    )
    lines(
        "texts.jsonl",
        {"prompt": "Two?", "response": " Two and two."},
        {"prompt": "Three?", "response": " Three."},
    )
    lines(
        "questions.jsonl",
        *({"prompt": f"{n} and 1?", "reference": str(n + 1), "checker": "number"} for n in range(3)),
    )
    lines("gsm8k.jsonl", *({"question": f"{n} + 1?", "answer": f"It is #### {n + 1}"} for n in range(2)))
    lines("train.jsonl", {"question": "7 + 1?", "answer": "Eight.\n#### 8"})
    lines("math.jsonl", {"problem": "1+1?", "answer": "2", "solution": "Add.", "subject": "Algebra"})
    lines("turns.jsonl", {"question_id": 81, "category": "writing", "turns": ["Say.", "More."]})
    lines("humaneval.jsonl", {"task_id": "t/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n",
                              "test": "def check(f):\n    assert f(1) == 1\n"})  # fmt: skip
    text = "Please choose the correct answer to the question: Up? \n\nAnswer1: yes Answer2: no\n\nAnswer format: answer1/answer2"
    (world / "arc_test.json").write_text(json.dumps([{"instruction": text, "answer": "answer1"}]))
    for part in ("test", "dev"):
        (world / "mmlu" / part).mkdir(parents=True)
        (world / "mmlu" / part / f"law_{part}.csv").write_text("Who?,a,b,c,d,B\nWhat?,a,b,c,d,A\n")
    (world / "text.txt").write_text("Some text to read, again and again. " * 20)


def make_odd(folder: Path) -> None:
    """What is no regular file, or none that can be used. Devices are made as root; else they are missing names."""
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "fifo")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket")
    os.chdir(here)
    (folder / "folder").mkdir()
    (folder / "closed").mkdir(mode=0o500)
    for name, to in (("loop", "loop"), ("to_fifo", "fifo"), ("dangling", "nothing"), ("slash", "folder")):
        (folder / name).symlink_to(to)
    for name, minor in (("null", 3), ("zero", 5), ("full", 7)):
        with suppress(OSError):
            os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
            (folder / name).chmod(0o666)
    with suppress(OSError), open(folder / "terabyte", "wb") as file:
        file.truncate(1 << 40)
    for name, mode, content in (("binary", 0o644, bytes(range(256)) * 4), ("empty", 0o644, b""), ("unreadable", 0, b"{}\n"),
                                ("read_only", 0o444, b"{}\n"), ("\udcff.jsonl", 0o644, b'{"a": 1}\n')):  # fmt: skip
        with suppress(OSError):  # some file systems take no name that is not UTF-8
            (folder / name).write_bytes(content)
            (folder / name).chmod(mode)


class State(NamedTuple):
    """A path as it is now. content: of a regular file that is small."""

    mode: int
    ino: int
    size: int
    mtime: int
    content: bytes | None


def state_of(top: Path, known: dict[str, State] | None = None) -> dict[str, State]:
    """Everything below `top`; contents are read where stat differs from what is known."""
    found = {}
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            with suppress(OSError):
                now = os.lstat(path)
                regular = stat.S_ISREG(now.st_mode)
                key = (
                    now.st_mode,
                    now.st_ino,
                    now.st_size if regular else 0,
                    now.st_mtime_ns if regular else 0,
                )
                old = (known or {}).get(path)
                if old is None or old[:4] != key:
                    content = Path(path).read_bytes() if regular and now.st_size < 1 << 26 else None
                    old = State(*key, content)
                found[path] = old
    return found


def restore(top: Path, pristine: dict[str, State]) -> None:
    """Brings the folder back to how it was. What is no regular file and is gone stays gone: that was reported."""
    now = state_of(top, pristine)
    for path in sorted(set(now) - set(pristine), reverse=True):
        shutil.rmtree(path) if stat.S_ISDIR(now[path].mode) else os.unlink(path)
    for path, old in pristine.items():
        if path not in now and stat.S_ISDIR(old.mode):
            Path(path).mkdir()
        if stat.S_ISREG(old.mode) and now.get(path) != old and old.content is not None:
            with suppress(OSError):
                os.unlink(path) if not os.path.isdir(path) or os.path.islink(path) else shutil.rmtree(path)
            Path(path).write_bytes(old.content)
            os.chmod(path, stat.S_IMODE(old.mode))
            now = os.lstat(path)
            pristine[path] = State(now.st_mode, now.st_ino, now.st_size, now.st_mtime_ns, old.content)
            now = state_of(top, pristine)


# What is spoiled


class Case(NamedTuple):
    """One run. how: flag, file, ... files: {path in the world: new content, or the path of what a link points to}."""

    script: str
    argv: list[str]
    how: str = "plain"
    files: dict[str, bytes | str] = {}  # noqa: RUF012
    environ: dict[str, str] = {}  # noqa: RUF012
    stdin: bytes = b""
    unprivileged: bool = False
    streams: str = ""  # shell redirections: a process of its own
    kill_after: tuple[int, float] | None = None  # signal, seconds


def parsers_of(script: str) -> list[tuple[list[str], list[argparse.Action]]]:
    """(words before the flags, flags) of a script's parsers, taken from the parser itself."""
    import cli

    found = []

    def caught(parser, *_, **__):
        raise Caught(parser)

    for words in [["train"], ["calibrate"]] if script == "judge.py" else [[]]:
        before = [(cls, name, getattr(cls, name)) for cls in (argparse.ArgumentParser, cli.Parser)
                  for name in ("parse_args", "parse_known_args", "parse_intermixed_args") if name in vars(cls)]  # fmt: skip
        for cls, name, _ in before:
            setattr(cls, name, caught)
        try:
            call_main(script, words)
        except Caught as stop:
            actions = list(stop.args[0]._actions)
            for action in list(actions):
                if isinstance(action, argparse._SubParsersAction):
                    actions += action.choices.get(words[0], stop.args[0])._actions if words else []
            found.append((words, [action for action in actions if action.option_strings]))
        finally:
            for cls, name, method in before:
                setattr(cls, name, method)
    return found


class Caught(BaseException):
    """Carries a parser out of a script's main."""


def call_main(script: str, argv: list[str]) -> None:
    """Runs a script's main in this process."""
    folder = ROOT if (ROOT / script).exists() else ROOT / "scripts"
    module = importlib.import_module(script[:-3] if folder == ROOT else f"scripts.{script[:-3]}")
    sys.argv = [str(folder / script), *argv]
    module.main()


def scripts() -> list[str]:
    """All scripts, but those that judge.py runs."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    found = {path.name for path in files if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    return sorted(found - {"calibrate.py", "train_judge.py"})


def spoilt_flag(
    rng: random.Random, command: list[str], action: argparse.Action, trial: bool = False
) -> list[str]:
    """A command with hostile values of one flag. trial: flags without values may be given, too."""
    flag = rng.choice(action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if trial and flag not in NO_TRIAL and rng.random() < 0.7:
            return [*command, flag]
        return [*command, f"{flag}={rng.choice(VALUES)}"]
    count = {None: 1, "?": 1}.get(
        action.nargs, action.nargs if isinstance(action.nargs, int) else rng.randrange(1, 4)
    )
    values = [
        rng.choice(ODD if rng.random() < (0.7 if takes_path(action) else 0.05) else VALUES)
        for _ in range(count)
    ]
    command = without(command, action.option_strings)
    if count == 1:
        return [*command, f"{flag}={values[0]}"]
    return [*command, flag, *values]


def takes_path(action: argparse.Action) -> bool:
    return action.type is Path or action.option_strings[-1] in (
        "--questions",
        "--text",
        "--prompt",
        "--source",
    )


def without(command: list[str], flags: list[str]) -> list[str]:
    """A command without a flag and its values."""
    kept, at = [], 0
    while at < len(command):
        if command[at] in flags:
            at += 1
            while at < len(command) and not command[at].startswith("-"):
                at += 1
        else:
            kept.append(command[at])
            at += 1
    return kept


def inputs_of(world: Path, command: list[str]) -> list[str]:
    """Files below the world that a command names, or that lie in a folder or begin with a name that it names."""
    found = set()
    for word in command:
        path = world / word
        if word and not word.startswith(("-", "out", "/", "odd")) and path.parent.is_dir():
            for each in path.parent.glob(path.name + "*") if "." in word or path.is_dir() else ():
                if each == path or each.name.startswith(path.name + "."):
                    found |= (
                        {each} if each.is_file() else {below for below in each.rglob("*") if below.is_file()}
                    )
    return sorted(str(path.relative_to(world)) for path in found)


HOSTILE_JSON = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, float("inf"), float("nan"), -0.5, 1e-300, 1e300, "", " ", "x", "1", "7" * 5000,
    "\ud800", "\x00", "\x1b[31m", "n" * 70000, [], [[]], {}, {"a": {}}, [None], [True], [-1], [10**400], [0, 0], ["\udfff"], "llama", "nan",
    "../../x", "/etc/passwd",
)  # fmt: skip


def spoilt_value(rng: random.Random, value):
    """A JSON value with one thing in it changed, somewhere."""
    value = copy.deepcopy(value)
    at, steps = value, rng.randrange(1, 6)
    for step in range(steps):
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            return rng.choice(HOSTILE_JSON)
        key = rng.choice(keys)
        if step + 1 < steps and isinstance(at[key], (dict, list)) and at[key]:
            at = at[key]
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, list):
            at += at[:] * rng.randrange(1, 4)
        elif kind == 1:
            at["".join(rng.sample("abcxyz", 3))] = at.pop(key)
        elif kind == 2 and type(at[key]) in (int, float):
            at[key] = rng.choice(
                (-at[key], at[key] + 1, at[key] * 10**6, float(at[key]), str(at[key]), [at[key]], at[key] - 1)
            )
        else:
            at[key] = rng.choice(HOSTILE_JSON)
        break
    return value


def spoilt_text(rng: random.Random, content: bytes) -> bytes:
    """JSON or JSON lines, changed as a value or as bytes."""
    if rng.random() < 0.75:
        with suppress(ValueError, RecursionError):
            text = content.decode()
            if text.count("\n") and text.lstrip().startswith("{") and text.split("\n")[0].endswith("}"):
                lines = text.split("\n")
                number = rng.choice([n for n, line in enumerate(lines) if line.strip()])
                lines[number] = json.dumps(spoilt_value(rng, json.loads(lines[number])))
                return "\n".join(lines).encode("utf-8", "surrogatepass")
            return json.dumps(spoilt_value(rng, json.loads(text)), ensure_ascii=rng.random() < 0.8).encode(
                "utf-8", "surrogatepass"
            )
    return spoilt_bytes(rng, content)


def spoilt_bytes(rng: random.Random, content: bytes) -> bytes:
    """Any file, changed as bytes."""
    kind, middle = rng.randrange(11), rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:middle]
    if kind == 1:
        return (
            content[:middle]
            + rng.choice((b"\xff", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\x85"))
            + content[middle:]
        )
    if kind == 2:
        return (
            content[:middle]
            + rng.choice((b"[" * 100000, b'{"a":' * 3000, b"9" * 5000, b"(" * 5000))
            + content[middle:]
        )
    if kind == 3:
        return b"\xef\xbb\xbf" + content
    if kind == 4:
        return content.decode("latin-1").encode("utf-16")
    if kind == 5:
        return rng.choice(
            (
                b"",
                b"\n",
                b" ",
                b"{}",
                b"[]",
                b"null",
                b"1",
                b'""',
                b"\x00" * 100,
                b"{}\n{}\n",
                b"NaN",
                b"\x1f\x8b\x08",
            )
        )
    if kind == 6:
        return content + content
    if kind == 7 and content:
        spoilt = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            spoilt[rng.randrange(min(len(spoilt), 4096))] = rng.randrange(256)
        return bytes(spoilt)
    if kind == 8 and content:
        end = rng.randrange(middle, len(content) + 1)
        return content[:middle] + content[end:]
    if kind == 9:
        return content.replace(b"\n", rng.choice((b"", b"\r\n", b"\n\n", b"\r", b"\xe2\x80\xa8")))
    return (
        content[:middle] + rng.randbytes(rng.choice((1, 20, 2000))) + content[middle:]
        if middle
        else rng.randbytes(200)
    )


def spoilt_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with a changed header (also JSON texts within its metadata), data, or length."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return (
            struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)))
            + content[8:]
        )
    if kind == 1:
        return spoilt_bytes(rng, content)
    if kind == 2 and data:
        bad = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 1e38)))
        at = rng.randrange(max(1, len(data) - 4)) // 4 * 4
        return content[: 8 + length] + data[:at] + bad * rng.choice((1, 100)) + data[at + 4 :]
    texts = [name for name, text in (header.get("__metadata__") or {}).items() if text.startswith("{")]
    if texts and kind < 6:
        name = rng.choice(texts)
        header["__metadata__"][name] = json.dumps(spoilt_value(rng, json.loads(header["__metadata__"][name])))
    else:
        header = spoilt_value(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def spoilt_lines(rng: random.Random, content: bytes) -> bytes:
    """Lines of text (tiktoken's, CSV, a template), one of them changed."""
    if rng.random() < 0.4:
        return spoilt_bytes(rng, content)
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    words = lines[at].split(b" ")
    word = rng.randrange(len(words))
    words[word] = rng.choice(
        (
            b"",
            b"-1",
            b"0",
            b"1" * 5000,
            b"x",
            b"\xff",
            b"1.5",
            b'"',
            b",",
            b"====",
            b"QUJD",
            b"{% for x in y %}",
            b"{{",
        )
    )
    lines[at] = b" ".join(words)
    return b"\n".join(lines if rng.random() < 0.8 else lines[:at] + lines[at:] * 2)


def spoilt(rng: random.Random, name: str, content: bytes) -> bytes:
    """A file's content with something changed, by what kind of file it is."""
    if name.endswith(".safetensors"):
        return spoilt_safetensors(rng, content)
    if name.endswith((".json", ".jsonl", ".all", ".index")) or ".jsonl." in name:
        return spoilt_text(rng, content)
    if name.endswith((".csv", ".jinja", ".txt")) or name == "tiktoken/tokenizer.model":
        return spoilt_lines(rng, content)
    return spoilt_bytes(rng, content)


def spoilt_file(
    rng: random.Random, world: Path, script: str, command: list[str], special: float = 0.15
) -> Case:
    """A command one of whose inputs is damaged, missing, or something else than a regular file."""
    names = inputs_of(world, command)
    if not names:
        return Case(script, command)
    folders = sorted(
        {name.rpartition("/")[0] for name in names}
    )  # each folder alike, however many files it holds
    folder = rng.choice(folders)
    name = rng.choice([name for name in names if name.rpartition("/")[0] == folder])
    if rng.random() < special:
        odd = rng.choice([each for each in ODD if each.startswith("odd/")])
        return Case(script, command, f"{name} is {odd}", {name: odd})
    return Case(script, command, f"damaged {name}", {name: spoilt(rng, name, (world / name).read_bytes())})


GARBAGE = ("", "-1", "x", "1" * 5000, "1.5", "\u0661", "99999999999999999999", "3")
ENVIRONS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def spoilt_environ(rng: random.Random, script: str, command: list[str]) -> Case:
    """A command under a torchrun that is none, or with folders that cannot be written."""
    if rng.random() < 0.7:
        names = rng.sample(ENVIRONS, rng.randrange(1, len(ENVIRONS) + 1))
        environ = {name: rng.choice(GARBAGE) for name in names}
        if environ.get("WORLD_SIZE") == "3":
            environ["RANK"] = rng.choice(("-1", "x", "3", ""))  # else it waits for the others, rightly
        return Case(script, command, f"environment {environ}"[:300], environ=environ)
    environ = {
        rng.choice(("HOME", "TMPDIR", "XDG_CACHE_HOME")): rng.choice(
            ("/proc/1", "odd/closed", "odd/empty", "/nonexistent", "")
        )
    }
    return Case(script, command, f"environment {environ}", environ=environ, unprivileged=True)


STREAMS = (">&-", ">odd/full", "2>&-", "2>odd/full", "<&-", "<odd/binary", "<odd/folder", ">&- 2>&-", "<&- >&- 2>&-", "| head -c 1",
           ">odd/null <odd/null", "<odd/full")  # fmt: skip
LOCALES = (
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    {},
)


def make_case(rng: random.Random, world: Path, flags: dict) -> Case:
    """A case at random."""
    script = rng.choices(list(COMMANDS), [0.4 if name in SLOW else 1 for name in COMMANDS])[0]
    command = shlex.split(rng.choice(COMMANDS[script]))
    kind = rng.random()
    if kind < 0.45:
        groups = [actions for words, actions in flags[script] if not words or words == command[:1]]
        spoilt = command
        for action in rng.sample(groups[0], min(len(groups[0]), rng.choice((1, 1, 1, 2)))):
            spoilt = spoilt_flag(rng, spoilt, action, trial=True)
        if len(groups[0]) < 3 or rng.random() < 0.1:  # any word
            at = rng.randrange(len(command))
            spoilt = [*command[:at], rng.choice(VALUES + ODD), *command[at + 1 :]]
        return Case(
            script,
            spoilt,
            "flag",
            stdin=rng.choice((b"", b"hi\n", b"\xff\xfe\x00", b"\xef\xbb\xbfhi")),
            unprivileged=rng.random() < 0.15,
        )
    if kind < 0.82:
        return spoilt_file(rng, world, script, command)._replace(unprivileged=rng.random() < 0.1)
    if kind < 0.89:
        return spoilt_environ(rng, script, command)
    if kind < 0.945:
        where = rng.choice(STREAMS)
        return Case(script, command, f"streams {where}", streams=where, environ=rng.choice(LOCALES))
    number = rng.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    return Case(script, command, number.name, kill_after=(number, rng.uniform(0, 0.3)))


# Running


PYTHON = re.compile(r"NoneType|KeyError|IndexError|TypeError|object has no|not supported between|unsupported operand|list index|"
                    r"not enough memory|invalid literal|could not convert|<[\w.]+ object")  # fmt: skip


class Done(NamedTuple):
    """How a case ended. code: exit code, minus the signal's number, or "time" where it had to be ended."""

    code: int | str
    out: str
    err: str
    seconds: float


def run_case(world: Path, case: Case) -> Done:
    """Runs a case by fork, or as a process of its own where its point is how a process begins."""
    return run_process(world, case) if case.streams or case.kill_after else run_forked(world, case)


def run_forked(world: Path, case: Case) -> Done:
    """Runs a script's main in a child of this process, with its own streams, environment and user."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(case.stdin)
        given.seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        began, child = time.monotonic(), os.fork()
        if not child:
            code = 99
            try:
                os.setsid()
                for number, file in enumerate((given, out, err)):
                    os.dup2(file.fileno(), number)
                code = in_child(world, case)
            finally:
                os._exit(code)
        code = wait_for(child, began)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="backslashreplace"))
        return Done(code, *texts, time.monotonic() - began)


def wait_for(child: int, began: float) -> int | str:
    """A child's exit code; it and what it started are killed at the time limit."""
    pause = 0.002
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - began > LIMIT_S:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    return os.waitstatus_to_exitcode(ended[1])


def in_child(world: Path, case: Case) -> int:
    """A script's exit code, as `python script.py` would end. This process is then of no use for anything else."""
    set_limits()
    os.chdir(world)
    os.environ.update(case.environ)
    if case.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return call(case)


def set_limits() -> None:
    """What is read or written without end must not take the machine's memory or disk."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def call(case: Case) -> int:
    """Runs a script's main on the file descriptors 0, 1 and 2, as a fresh interpreter would; 99 is a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, code = (sys.stdin, sys.stdout, sys.stderr), 0
    sys.stdin, sys.stdout = (
        open(0, encoding="utf-8", closefd=False),  # noqa: SIM115
        open(1, "w", encoding="utf-8", closefd=False),  # noqa: SIM115
    )
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        call_main(case.script, case.argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    sys.stdin, sys.stdout, sys.stderr = before
    return code


class TooLong(BaseException):
    """A case did not end in time."""


def run_inside(world: Path, case: Case, limit_s: float = 120) -> Done:
    """Runs a script's main in this process, and puts back what it may change; for tests/test_fuzz.py."""

    def too_long(*_):
        raise TooLong(f"{case.script} did not end in {limit_s} s")

    kept, environ, here, texts = [os.dup(number) for number in range(3)], dict(os.environ), os.getcwd(), []
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(case.stdin)
        given.seek(0)
        before = signal.signal(signal.SIGALRM, too_long)
        began = time.monotonic()
        try:
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            os.chdir(world)
            os.environ.update(case.environ)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            code = call(case)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environ)
            for number, copied in enumerate(kept):
                os.dup2(copied, number)
                os.close(copied)
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="backslashreplace"))
    return Done(code, *texts, time.monotonic() - began)


def run_process(world: Path, case: Case) -> Done:
    """Runs a script by itself, through a shell where its streams are redirected."""
    folder = ROOT if (ROOT / case.script).exists() else ROOT / "scripts"
    command = [sys.executable, str(folder / case.script), *case.argv]
    if case.streams:
        pipe = f'"$@" {case.streams}'
        command = ["bash", "-c", f"set -o pipefail; {pipe}" if "|" in pipe else pipe, "sh", *command]
    environ = os.environ | case.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with subprocess.Popen(command, cwd=world, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
                          start_new_session=True) as child:  # fmt: skip
        if case.kill_after:
            with suppress(subprocess.TimeoutExpired):
                child.wait(case.kill_after[1])
            child.send_signal(case.kill_after[0])
        try:
            out, err = child.communicate(case.stdin, timeout=LIMIT_S)
            code = child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            (out, err), code = child.communicate(), "time"
    return Done(
        code, *(text.decode(errors="backslashreplace") for text in (out, err)), time.monotonic() - began
    )


def apply(world: Path, case: Case) -> None:
    """Puts a case's spoilt files in their places."""
    for name, content in case.files.items():
        path = world / name
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
            path.chmod(0o644)
        else:
            path.symlink_to(world / content)


# What is held against a run


def complaints(
    world: Path, case: Case, done: Done, before: dict[str, State], after: dict[str, State]
) -> list[str]:
    """What a run did that none may do."""
    found = list(said_badly(case, done))
    outputs = outputs_of(world, case)
    for path in sorted(set(before) | set(after)):
        old, new = before.get(path), after.get(path)
        if old == new or (old and new and stat.S_ISDIR(old.mode) and stat.S_ISDIR(new.mode)):
            continue
        name = os.path.relpath(path, world)
        allowed = any(
            path == out or path.startswith((f"{out}.", f"{out}/")) or out.startswith(f"{path}/")
            for out in outputs
        )
        allowed |= (
            name.startswith("out/")
            or (case.script == "plot.py" and name.endswith(".png"))
            or (name.endswith(".md") and allowed)
        )
        if old is not None and new is None:
            found.append(f"removed {name}")
        elif old is not None and not stat.S_ISREG(old.mode):
            found.append(f"replaced {name}, no regular file")
        elif old is None and not allowed:
            found.append(f"left {name}")
        elif old is not None and not allowed:
            found.append(f"changed {name}")
        elif (
            old is not None
            and done.code != 0
            and not (new.content or b"").startswith((old.content or b"").rpartition(b"\n")[0])
        ):
            found.append(f"changed {name}, though it failed")
        elif new is not None and done.code == 2 and name.endswith(".tmp") and old is None:
            found.append(f"left {name}")
    return found


def outputs_of(world: Path, case: Case) -> list[str]:
    """The real paths that a command line names as outputs; where a part of one is a link, what it leads to."""
    found = []
    for at, word in enumerate(case.argv):
        flag, equals, value = word.partition("=")
        if flag in OUTPUTS:
            value = value if equals else (case.argv[at + 1] if at + 1 < len(case.argv) else "")
            with suppress(OSError, ValueError):
                found += [os.path.join(world, value), os.path.realpath(world / value)]
                found.append(os.path.splitext(os.path.realpath(world / value))[0])
                parts = [name for name in case.files if name.startswith(f"{value}.")]
                found += [os.path.realpath(world / name) for name in parts]
    return [each for each in found if each.rstrip("/") not in (str(world), str(world.parent), "/")]


def said_badly(case: Case, done: Done) -> Iterator[str]:
    """Complaints about exit code and output."""
    if "Traceback" in done.err or "Traceback" in done.out or done.code == 99:
        if not (case.kill_after and before_first_instruction(case, done)):
            yield "traceback"
        return
    if case.kill_after:
        number, quiet = case.kill_after[0], not done.err.strip()
        if number == signal.SIGINT and done.code == 130 and not quiet:
            yield "spoke when interrupted"
        elif done.code not in (0, 1, 2, 130, -number):
            yield f"exit code {done.code} after {number.name}"
        return
    if done.code == "time":
        yield f"did not end in {LIMIT_S} s"
    elif done.code not in (0, 1, 2, *((141,) if "|" in case.streams else ())):
        yield f"exit code {done.code}"
    elif done.code == 2 and "2>" not in case.streams:
        *notices, last = [line for line in done.err.split("\n") if line.strip()] or [""]
        name = (
            r"(judge|train_judge|calibrate)\.py" if case.script == "judge.py" else re.escape(case.script)
        )  # it forwards
        sentence = rf"{name}[ \w]*: ."
        if not re.match(sentence, last) or not last.endswith("."):
            yield "no sentence that begins with the script's name and ends in a full stop"
        elif any(re.match(sentence, line) for line in notices):
            yield "more than one sentence"
        elif PYTHON.search(last):
            yield "Python's words, or not the cause"


def before_first_instruction(case: Case, done: Done) -> bool:
    """Whether a traceback is of the interpreter's own start: no frame beyond our `from cli import` and cli.py's beginning."""
    for name, line in re.findall(r'File "([^"]+)", line (\d+)', done.err):
        limit = 13 if name.endswith("/cli.py") else 30
        if name.startswith(str(ROOT)) and int(line) > limit:
            return False
    return "KeyboardInterrupt" in done.err and "run_script" not in done.err


# The campaign


def try_case(
    world: Path, pristine: dict[str, State], case: Case, run: Callable[[Path, Case], Done] = run_case
) -> tuple[Done, list[str]]:
    """Runs a case in the world, says what was wrong, and cleans up."""
    apply(world, case)
    before = state_of(world.parent.parent, pristine)
    done = run(world, case)
    found = complaints(world, case, done, before, state_of(world.parent.parent, before))
    restore(world.parent.parent, pristine)
    return done, found


def entry(number: int, case: Case, done: Done, found: list[str]) -> dict:
    """A line of the log; a failure's has its input and output."""
    line = {
        "case": number,
        "script": case.script,
        "how": case.how,
        "code": done.code,
        "seconds": round(done.seconds, 3),
        "failed": found,
    }
    if found:
        files = {name: content if isinstance(content, str) else base64.b64encode(content[:30000]).decode()
                 for name, content in case.files.items()}  # fmt: skip
        line |= {"argv": case.argv, "files": files, "environ": case.environ, "stdin": case.stdin.decode("latin-1"),
                 "unprivileged": case.unprivileged, "out": done.out[-1000:], "err": done.err[-3000:]}  # fmt: skip
    return line


def prepared(root: Path) -> tuple[Path, dict[str, State], dict]:
    """The world, how it is, and every script's flags, with everything imported that a script needs."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "JUDGE_FAST_DATA": "data",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    import unicodedata  # noqa: F401

    import matplotlib.pyplot  # noqa: F401
    import torch

    for name in ("unicode_escape", "utf-16", "latin-1", "ascii", "cp1252"):
        "".encode(name)
    torch.set_num_threads(1)
    for script in COMMANDS:
        importlib.import_module(script[:-3] if (ROOT / script).exists() else f"scripts.{script[:-3]}")
    world = make_world(root)
    return world, state_of(root), {script: parsers_of(script) for script in COMMANDS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="cases (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the cases (default: 1)")
    parser.add_argument("--log", type=Path, help="write every case and how it ended to this file, JSON lines")
    parser.add_argument("--case", type=int, help="run this one only, and print what it said")
    parser.add_argument("--script", help="cases of this script only")
    args = parser.parse_args()
    if missing := set(scripts()) - set(COMMANDS):
        sys.exit(f"COMMANDS lacks {', '.join(sorted(missing))}.")
    tried, failed, seconds, began = Counter(), Counter(), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        os.chmod(root, 0o755)
        world, pristine, flags = prepared(Path(root))
        log = open(args.log or os.devnull, "w")  # noqa: SIM115 until the end
        for number in range(args.count) if args.case is None else [args.case]:
            case = make_case(random.Random(f"{args.seed} {number}"), world, flags)
            if args.script and case.script != args.script:
                continue
            done, found = try_case(world, pristine, case)
            line = entry(number, case, done, found)
            print(json.dumps(line), file=log, flush=True)
            if args.case is not None:
                print(shlex.join([case.script, *case.argv]), case.how, *done, *found, sep="\n")
            tried[case.script] += 1
            failed[case.script] += bool(found)
            seconds[case.script] += done.seconds
    print("script                        tried  survived  failed  seconds")
    for script in sorted(tried):
        print(
            f"{script:28} {tried[script]:6} {tried[script] - failed[script]:9} {failed[script]:7} {seconds[script]:8.0f}"
        )
    total, bad = tried.total(), failed.total()
    print(f"{'all':28} {total:6} {total - bad:9} {bad:7} {time.monotonic() - began:8.0f}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
