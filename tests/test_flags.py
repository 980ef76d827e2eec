"""Protects: a flag that several commands share is declared once, and declaring costs no PyTorch."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cli import Parser
from scripts.lib.flags import FLAGS, add_flags


def test_no_command_declares_a_shared_flag_again():
    for path in [ROOT / "generate.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/lib/*.py")]:
        declared = set(re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', path.read_text()))
        assert not declared & set(FLAGS), path.name


def test_importing_loads_no_pytorch():
    code = "import sys; import scripts.lib.flags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_command_says_what_is_otherwise_there(capsys):
    parser = Parser("")
    add_flags(
        parser, "device", "limit", seed={"default": 7, "help": "of the shuffle"}, out={"required": True}
    )
    args = parser.parse_args(["--out", "x"])
    assert args.device in ("cuda", "cpu") and args.limit is None and args.seed == 7 and args.out.name == "x"
    for flags, words in (
        ([], "required: --out"),
        (["--out", "x", "--limit", "0"], "--limit 0 must be a whole"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err
