"""Protects: every command of the documents runs on the demo pair, as written but small; every flag has help."""

import importlib
import json
import random
import re
import shlex
import shutil
from itertools import islice

import pytest
import torch
from conftest import DATA, ROOT

import generate
from checkpoint import DEMO
from cli import Parser
from model import ModelArgs

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
             "benchmarks/README.md", "checkpoints/demo/README.md"]  # fmt: skip
SCRIPTS = {path.name: path for folder in (ROOT / "scripts", ROOT) for path in sorted(folder.glob("*.py"))}
NAMES = "|".join(map(re.escape, SCRIPTS))
BEGINS = re.compile(rf"(\w+=\S+ )*(python|torchrun|pip|git|scripts/\S+\.sh) |(scripts/)?({NAMES}) --")
NEEDS = {  # what stands in a command that cannot run here -> what its document says of that
    "pip install": "requirements", "git apply": "test_documents.py", "int6": "test_documents.py",
    "--verify bild": "a rule", "NAME": "NAME", "--help": "--help", "gpu_check.sh": "GPU",
    "experiments.py quantised": "needs the judge's training data",
}  # fmt: skip
QUICK = {  # script -> the flags that make it quick, and that write nothing into this repository
    "generate.py": "--max_new_tokens 4 --device cpu",
    "evaluate.py": "--limit 1 --max_new_tokens 8 --device cpu",
    "build_judge_data.py": "--limit 4 --temperature 1 --device cpu",
    "mine_important_tokens.py": "--limit 1 --max_new_tokens 90 --device cpu",
    "train_judge.py": "--device cpu",
    "judge.py": "--limit 3 --max_harm 0.6 --confidence 0.6 --out copy/judge.safetensors --device cpu",
    "calibrate.py": "--limit 4 --max_harm 0.6 --confidence 0.6 --walk 0.9 --device cpu",
    "score_text.py": "--limit 1 --device cpu",
    "perplexity.py": "--limit 1 --window 64 --stride 64 --device cpu",
    "perplexity.py --checkpoint_path": "--window 64 --stride 64 --device cpu",
    "benchmark.py": "--max_new_tokens 17 --repeats 1 --prefill 9 --device cpu",
    "experiments.py": "--limit 1 --work work --results results --device cpu",
    "train_demo.py": "--stages tokenizer,target,draft --steps 1 --out pair --work work --device cpu",
    "train_demo.py --stages": "--out copy --work work --device cpu",
}  # fmt: skip
RAN: list[str] = []  # commands of all documents
ELSEWHERE = (
    "build_judge_data.py --checkpoint_path checkpoints/demo/target",
    "train_judge.py --data answers.jsonl",
    "calibrate.py --judge_path",
    "generate.py --judge_path",  # these in tests/test_calibrate.py, one after the other
    "benchmark.py --compile --peers",  # in tests/test_benchmark.py
)


def commands_of(text: str) -> list[tuple[str, str]]:
    """(command, comment) of a document's commands in their order: of blocks, indented lines and code spans."""
    found, text = [], re.sub(r"\\\n\s*", "", text)
    kinds = r"^```\w*\n(.*?)^```|^    (\S[^\n]*)|`([^`]+)`"
    for block, indented, span in re.findall(kinds, text, re.MULTILINE | re.DOTALL):
        for line in (block or indented).splitlines() or [" ".join(span.split())]:
            command, _, comment = line.partition(" #")
            if BEGINS.match(command.strip()):
                found.append((" ".join(command.split()), comment.strip()))
    return found


def needs(command: str, comment: str, text: str) -> bool:
    """Whether a command needs what is not here, as its comment says, or the words around it."""
    said = [words for name, words in NEEDS.items() if name in command]
    assert all(words in " ".join(text.split()) for words in said), command
    return bool(said) or "needs" in comment or command.startswith("torchrun")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the commands name: the demo pair stands in for Llama's, its problems for GSM8K's."""
    from scripts.lib.demo_task import problems, write_answer_with_errors

    for copy in ("checkpoints/demo", "copy"):
        shutil.copytree(DEMO, tmp_path / copy)
    (tmp_path / "checkpoints" / "demo-training").mkdir()
    shutil.copy(DEMO / "judge.safetensors", tmp_path)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    for name, role in (("Llama-3.1-70B-Instruct", "target"), ("Llama-3.1-8B-Instruct", "draft")):
        folder = shutil.copytree(DEMO / role, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
        template = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{% endfor %}"
        (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "book.txt").write_text("Mia has 47 apples. She buys 38. " * 20)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    for name, seed in (("train", 5), ("test", 6)):
        asked = sorted(
            islice(problems(seed, held_out=False, family="story"), 30), key=lambda problem: len(problem.steps)
        )
        lines = [json.dumps({"question": p.question, "answer": f"#### {p.answer}"}) + "\n" for p in asked]
        (tmp_path / "data" / "gsm8k" / f"{name}.jsonl").write_text("".join(lines))
    for name in ("humaneval", "mmlu"):
        if (DATA / name).exists():
            (tmp_path / "data" / name).symlink_to(DATA / name)
    labelled, rng = [], random.Random(0)
    for problem in islice(problems(7, held_out=False), 32):
        text, errors = write_answer_with_errors(problem, "target", rng, 0.4)
        labelled.append(json.dumps({"prompt": problem.question, "response": text, "errors": errors}) + "\n")
    for name in ("annotated.jsonl", "texts.jsonl"):  # a person marked the first, and wrote the second
        (tmp_path / name).write_text("".join(labelled))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "compile_step", lambda step, *_: step)
    monkeypatch.setattr(torch, "compile", lambda step: step)
    return tmp_path


def shrink_training(monkeypatch) -> None:
    """train_demo.py on a model of one narrow layer, with the shipped tokenizer and a few answers."""
    module = importlib.import_module("scripts.train_demo")
    shape = ModelArgs(32, 1, 2, 1, 48, module.VOCAB_SIZE, 16, 512, 1e-5, 10000.0, tie_embeddings=True)
    pieces = (DEMO / "target" / "tokenizer.model").read_bytes()
    monkeypatch.setattr(module, "PRESETS", dict.fromkeys(module.PRESETS, shape))
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "train_tokenizer", lambda path, seed: path.write_bytes(pieces))
    monkeypatch.setattr(module, "JUDGE_ANSWERS", (("draft", 1.0, 18), ("target", 1.0, 1)))


LONG = ("docs/judges.md", "docs/several_gpus.md", "benchmarks/README.md")


@pytest.mark.parametrize(
    "document", [pytest.param(each, marks=[pytest.mark.slow] * (each in LONG)) for each in DOCUMENTS]
)
def test_every_command_runs_or_says_what_it_needs(document, workplace, monkeypatch, capsys):
    text, judge = (ROOT / document).read_text(), (DEMO / "judge.safetensors").read_bytes()
    for command, comment in commands_of(text):
        line = re.sub(r"(python )|(scripts/)", "", command) + " "
        ran = any(one.startswith(line) for one in RAN)  # the same, or shortened
        if ran or needs(command, comment, text) or line.startswith(ELSEWHERE):
            continue
        words = shlex.split(command.partition("python ")[2] or command)  # without OMP_NUM_THREADS=1
        name, argv = words[0].rpartition("/")[2], words[1:]
        assert SCRIPTS[name] in (ROOT / words[0], ROOT / "scripts" / words[0]), f"{document}: {command}"
        if any(word.startswith("data/") and not (workplace / word).exists() for word in argv):
            continue  # public files that are not here
        if name == "train_demo.py":
            shrink_training(monkeypatch)
        module = importlib.import_module(".".join(SCRIPTS[name].relative_to(ROOT).with_suffix("").parts))
        more = QUICK.get(" ".join([name, *argv[:1]]), QUICK.get(name, ""))
        module.main([*argv, *more.split()])
        assert "".join(capsys.readouterr()), f"{document}: {command} says nothing"
        RAN.append(line)
    assert (DEMO / "judge.safetensors").read_bytes() == judge  # nothing writes over what ships


def test_the_documents_are_read():
    """Else a document without a command that is found would pass."""
    found = [commands_of((ROOT / document).read_text()) for document in DOCUMENTS]
    assert all(found) and sum(map(len, found)) > 70


MODULES = [path for folder in (ROOT, ROOT / "scripts") for path in sorted(folder.glob("*.py"))]
COMMANDS = [
    path for path in MODULES if "Parser(__doc__" in path.read_text() and path.name != "calibrate.py"
]  # it is judge.py's
NO_DEFAULT = {  # flags that stand for nothing unless given; every other flag's help names its default
    "--calibration", "--checker", "--data", "--draft", "--draft_mode", "--draft_preset", "--guard",
    "--max_false_accept", "--max_harm", "--merge", "--mode", "--model_answers", "--out", "--part", "--preset",
    "--profile", "--questions", "--relax_between", "--rows", "--steps", "--accept", "--modes", "--judge_path", "--draft_checkpoint_path",
}  # fmt: skip


def parsers_of(path, monkeypatch) -> list[Parser]:
    """The parsers that a script builds for --help."""
    built, format_help = [], Parser.format_help
    monkeypatch.setattr(Parser, "format_help", lambda parser: built.append(parser) or format_help(parser))
    module = importlib.import_module(path.stem if path.parent == ROOT else f"scripts.{path.stem}")
    calls = [["--help"], ["calibrate", "--help"]] if path.name == "judge.py" else [["--help"]]
    for argv in calls:
        with pytest.raises(SystemExit) as stop:
            module.main(argv)
        assert stop.value.code == 0
    return built


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_says_what_each_flag_does_and_its_default(path, monkeypatch, capsys):
    built = parsers_of(path, monkeypatch)
    assert built and "usage:" in capsys.readouterr().out
    for parser in built:
        for action in parser._actions:
            words = action.help or ""
            assert words.partition("(default")[0].strip(), f"{path.name}: {action.dest} has no help"
            valued = action.option_strings and action.nargs != 0 and not action.required
            shown = "default" in words or action.default not in (None, [])
            assert not valued or shown or NO_DEFAULT & set(action.option_strings), (
                f"{path.name}: {action.dest} hides its default"
            )
