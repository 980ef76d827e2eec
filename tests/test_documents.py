"""Protects: the README is short and true to the files, links lead somewhere, diffs do what they say."""

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import groupby

import pytest
import torch
from conftest import ROOT, make_folder

import generate
import judge
from checkpoint import DEMO

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md",
             DEMO / "README.md"]  # fmt: skip
DIFFS = {
    "rule": "judge.py",
    "variant": "rope.py",
    "format": "quantize.py",
}  # name -> the one file that it changes
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_holds_two_install_commands():
    assert len(README.split()) <= 1400
    commands = re.findall(r"^    (pip install -r .* && .*)$", README, re.MULTILINE)  # as .ci/run reads them
    assert [command.split(" && ")[1] for command in commands] == ["python generate.py", "pytest"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            found = (path.parent / file) if file else path
            assert found.exists(), f"{path.name}: {link}"
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{path.name}: {link}"
    for name in re.findall(r"`((?:scripts|tests|benchmarks|docs|checkpoints)/[\w./]*\w)`", text):
        made = name.startswith("checkpoints/demo-training") or "NAME" in name
        assert made or (ROOT / name).exists(), f"{path.name} names {name}"


def test_every_page_begins_with_its_command_and_is_in_the_readme():
    for path in (ROOT / "docs").glob("*.md"):
        title, fence, command = [line for line in path.read_text().splitlines() if line][:3]
        assert title.startswith("# ") and fence == "```", path.name
        assert command.startswith(("python ", "torchrun ", "git ")), path.name
        assert f"(docs/{path.name})" in README, path.name


def files_of_the_tree() -> set[str]:
    """What the README's tree names at the top and in scripts/, and docs/changing.md in scripts/lib/."""
    shared = (ROOT / "docs" / "changing.md").read_text().partition("## What the commands share\n\n```\n")[2]
    blocks, folders, found = [README.partition("## Files\n\n```\n")[2], shared], [], set()
    for line in "".join(block.partition("```")[0] for block in blocks).splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name] if name.endswith("/") else []
        if not name.endswith("/"):
            found.add("".join(folders) + name)
    return found


def test_the_file_tree_names_each_file_and_no_other():
    here = [
        path for folder in (ROOT, ROOT / "scripts", ROOT / "scripts" / "lib") for path in folder.iterdir()
    ]
    code = {
        str(path.relative_to(ROOT))
        for path in here
        if path.suffix in (".py", ".cpp", ".sh", ".tsv", ".html", ".js")
    }
    assert files_of_the_tree() == {name for name in code if not name.endswith("__init__.py")}


def test_the_picture_shows_the_real_answer(capsys):
    """docs/answer.svg holds the coloured answer of the README's first command, token by token."""
    generate.main(["--device", "cpu", "--marks"])
    out, err = capsys.readouterr()
    spans = ET.parse(ROOT / "docs" / "answer.svg").getroot().findall(".//*[@id='answer']//{*}tspan")
    marks = {"a": "{}", "r": "{{{}}}", "t": "<{}>"}
    runs = groupby(spans, key=lambda span: span.get("class"))
    assert "".join(
        marks[kind].format("".join(span.text for span in run)) for kind, run in runs
    ) == out.rstrip("\n")
    shown = " ".join("".join(ET.parse(ROOT / "docs" / "answer.svg").getroot().itertext()).split())
    assert re.search(r"question: .*\?", err)[0] in shown and re.search(r"m\* \S+ \(.*?\)", err)[0] in shown


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_is_short_applies_and_is_the_one_on_the_page(name, tmp_path):
    diff = (ROOT / "docs" / "diffs" / f"{name}.diff").read_text()
    assert f"```diff\n{diff}```" in (ROOT / "docs" / "changing.md").read_text()
    assert len(diff.splitlines()) < 30 and re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == [DIFFS[name]]
    shutil.copy(ROOT / DIFFS[name], tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=tmp_path, check=True)
    assert (tmp_path / DIFFS[name]).read_text() != (ROOT / DIFFS[name]).read_text()
    assert all(len(line) <= 111 for line in diff.splitlines())  # of 110 after the sign


CHECK = """
import sys, torch, generate
from quantize import Scheme, load_model
folder, expected = sys.argv[1], torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
variant = load_model(folder, dtype=torch.float32)
with torch.inference_mode():
    error = (variant(expected["ids"])[1] - expected["logits"]).abs().max() / expected["logits"].abs().max()
    print("variant", error.item())
errors = []
for mode in ("int4", "int6", "int8"):
    model = load_model(folder, dtype=torch.float32, scheme=Scheme(mode))
    with torch.inference_mode():
        errors.append((model(expected["ids"])[1] - expected["logits"]).abs().mean().item())
print("format", errors[0] > errors[1] > errors[2])
generate.main(["--verify", "bild", "--device", "cpu", "--marks", "--max_new_tokens", "40"])
"""


def test_the_diffs_and_the_rule_of_the_readme_do_what_they_say(tmp_path, capsys, monkeypatch):
    """In a copy with all three: proportional RoPE gives transformers' logits, int6 lies between int4 and int8, and
    the rule lets through what the README's lines let through here."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "kernels.cpp"]:
        shutil.copy(path, copy)
    (copy / "checkpoints").symlink_to(ROOT / "checkpoints")
    for name in DIFFS:
        subprocess.run(["git", "apply", ROOT / "docs" / "diffs" / f"{name}.diff"], cwd=copy, check=True)
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    model = make_folder(tmp_path / "variant", rope_parameters=rope)
    ids = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "variant" / "expected.pt")
    run = [sys.executable, "-c", CHECK, str(tmp_path / "variant")]
    found = subprocess.run(run, cwd=copy, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    variant, form, answer = found.stdout.splitlines()
    assert float(variant.split()[1]) < 1e-4 and form == "format True" and "{" in answer

    lines = README.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in lines.splitlines() if line]) <= 5
    monkeypatch.setitem(judge.RULES, "bild", None)
    exec(lines, dict(vars(judge)))
    generate.main(
        ["--verify", "bild", "--threshold", "3", "--device", "cpu", "--marks", "--max_new_tokens", "40"]
    )
    assert capsys.readouterr().out.strip() == answer.strip()
