"""Protects: every command of a document that the demo pair can run does run, as written, on few problems; every flag has help."""

import importlib
import re
import shlex
import shutil

import pytest
import torch
from conftest import DATA, ROOT

import generate
from checkpoint import DEMO
from cli import Parser
from model import ModelArgs

DOCUMENTS = ("README.md", "benchmarks/README.md", "checkpoints/demo/README.md")
SCRIPTS = ("evaluate", "score_text", "perplexity", "train_demo", "experiments", "download")
OTHERS = re.compile(
    r"\.\.\.|Llama-|\bNAME\b|\btorchrun\b|download\.py|quantised"
)  # need weights, a network, or the judge's data
RUNS = {  # command -> what makes it quick
    "evaluate.py --task gsm8k --data data/gsm8k/test.jsonl --shots 0 --limit 3 --max_new_tokens 200": "--verify plain --device cpu",
    "perplexity.py --limit 300 --mode none int8 int4 int4/64 fp8": "--limit 1 --device cpu",
    "experiments.py judge_table --compile": "--limit 1 --work work --results results --device cpu",
    "train_demo.py": "--stages tokenizer,target,draft --steps 1 --out pair --work work --device cpu",
    "train_demo.py --stages judge": "--out copy --work work --device cpu",
}  # fmt: skip


def commands_of(text: str) -> set[str]:
    """The command lines of these scripts in code blocks and code spans, without `python scripts/` and comments."""
    text = re.sub(r"\\\n\s*", "", text.replace("```", "\n\n"))
    spans = re.findall(r"`([^`]+)`", text) + re.findall(
        r"^\s*(\S.*scripts/.*)$", re.sub(r"`[^`]+`", "", text), re.MULTILINE
    )
    found = set()
    for span in spans:
        line = re.sub(r"\s+#.*|\s+", lambda match: " " if "#" not in match[0] else "", span).strip()
        match = re.match(rf"(torchrun .*)?(python )?(scripts/)?(({'|'.join(SCRIPTS)})\.py.*)", line)
        if match and (match[1] or match[2] or " " in match[4]):  # else it is a file's name
            found.add((match[1] or "") + match[4])
    return found


def test_every_command_is_run_or_needs_what_is_not_here():
    found = set.union(*(commands_of((ROOT / name).read_text()) for name in DOCUMENTS))
    assert {command for command in found if not OTHERS.search(command)} == set(RUNS)
    assert len(found) >= len(RUNS) + 8  # else the documents are no longer read


@pytest.mark.parametrize("command", RUNS, ids=lambda command: command[:40])
def test_commands_run_as_they_are_written(command, tmp_path, monkeypatch, capsys):
    if "--data data/" in command and not DATA.exists():
        pytest.skip("needs the public files")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(DATA)
    shutil.copytree(DEMO, tmp_path / "copy")
    monkeypatch.setattr(generate, "compile_step", lambda step, *_: step)
    monkeypatch.setattr(torch, "compile", lambda step: step)
    script, *argv = shlex.split(f"{command} {RUNS[command]}")
    module = importlib.import_module(f"scripts.{script.removesuffix('.py')}")
    if script == "train_demo.py":
        shape = ModelArgs(32, 1, 2, 1, 48, module.VOCAB_SIZE, 16, 512, 1e-5, 10000.0, tie_embeddings=True)
        monkeypatch.setattr(module, "PRESETS", dict.fromkeys(module.PRESETS, shape))
        monkeypatch.setattr(module, "BATCH", 4)
        monkeypatch.setattr(
            module,
            "train_tokenizer",
            lambda path, seed: path.write_bytes((DEMO / "target" / "tokenizer.model").read_bytes()),
        )
        monkeypatch.setattr(module, "JUDGE_ANSWERS", (("draft", 1.0, 18), ("target", 1.0, 1)))
    module.main(argv)
    assert capsys.readouterr().out or (tmp_path / "pair" / "draft" / "config.json").exists()


MODULES = [path for folder in (ROOT, ROOT / "scripts") for path in sorted(folder.glob("*.py"))]
COMMANDS = [
    path for path in MODULES if "Parser(__doc__" in path.read_text() and path.name != "calibrate.py"
]  # it is judge.py's
NO_DEFAULT = {  # flags that stand for nothing unless given; every other flag's help names its default
    "--calibration", "--checker", "--data", "--draft", "--draft_mode", "--draft_preset", "--guard", "--max_false_accept",
    "--max_harm", "--merge", "--mode", "--model_answers", "--out", "--part", "--preset", "--profile", "--questions",
    "--relax_between", "--rows", "--steps", "--accept", "--modes", "--judge_path", "--draft_checkpoint_path",
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
