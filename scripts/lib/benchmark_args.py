"""The command line of benchmark.py and the models that it names; plan.py reads both again from a report."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from checkpoint import DEMO, read_config
from cli import InputError, Parser, shortened, whole
from judge import RULES
from model import PRESETS, ModelArgs, preset
from quantize import add_mode_flags, scheme_named
from scripts.lib.flags import FIXED_K, add_device_flags, add_flags, add_model_flags

ROOT = Path(__file__).resolve().parents[2]
DIMENSIONS = re.compile("([0-9]+)x([0-9]+)")
MOST = 2**40  # of any number on the command line; what fits is checked against models and memory
# of the JSON; 1 (without the field) had no settings as fields, and ms_p10 and ms_p90 for the extremes
SCHEMA = 2


def shape_of(name: str) -> ModelArgs:
    """A preset's arguments; DIMxLAYERS: heads of 64, a quarter as many KV heads, 4 DIM in between, 32,000
    tokens."""
    if not (found := DIMENSIONS.fullmatch(name)):
        return preset(name if len(name) <= 60 else shortened(name))
    dim, layers = (int(digits) if len(digits) < 7 else MOST for digits in found.groups())
    if not 64 <= dim <= 2**16 or dim % 64 or not 1 <= layers <= 1024:
        raise InputError(
            f"--preset {shortened(name)}: DIM must be a multiple of 64, up to 65536, and LAYERS 1 to 1024."
        )
    heads = dim // 64
    kv = heads // 4 if heads % 4 == 0 else heads
    return ModelArgs(dim, layers, heads, kv, 4 * dim, 32000, 64)


def is_preset(name: str) -> bool:
    """Whether a name is one that `shape_of` reads, and not a folder's."""
    return name in PRESETS or DIMENSIONS.fullmatch(name) is not None


def has_draft(args: argparse.Namespace) -> bool:
    return bool(args.draft_checkpoint_path or args.draft_preset)


def shapes_of(args: argparse.Namespace) -> tuple[ModelArgs, ModelArgs | None]:
    """Target and draft, from folders or presets."""
    target = read_config(args.checkpoint_path) if args.checkpoint_path else shape_of(args.preset)
    if not has_draft(args):
        return target, None
    folder = args.draft_checkpoint_path
    return target, read_config(folder) if folder else shape_of(args.draft_preset)


def modes_of(args: argparse.Namespace) -> dict[str, str | None] | None:
    """Each of --modes -> how it quantises the target. Raises InputError for an unknown one."""
    if not args.modes:
        return None
    schemes = {name: scheme_named(name if len(name) < 20 else shortened(name)) for name in args.modes}
    return {
        name: scheme and str(replace(scheme, lm_head=args.quantize_lm_head))
        for name, scheme in schemes.items()
    }


def printable(text: str) -> str:
    """An argument that is no UTF-8 with question marks for what is not."""
    return text.encode(errors="replace").decode()


def model_name(folder: Path | None, name: str | None) -> str | None:
    """A preset's name or a folder, one of this repository from its root on, so that it is found on other
    machines."""
    if folder is not None and folder.resolve().is_relative_to(ROOT):
        folder = folder.resolve().relative_to(ROOT)
    return printable(str(folder)) if folder is not None else name


def add_round_flags(parser: Parser) -> None:
    """The flags of rounds: by which rule, how long, where."""
    add, many = parser.add_argument, whole(1, MOST)
    add(
        "--verify",
        choices=list(RULES),
        help="the rule of the rounds (default: judge; standard for folders without one)",
    )
    add_flags(parser, speculate_k=FIXED_K)
    add(
        "--rows",
        type=whole(2, 1025),
        nargs="*",
        default=[],
        help="verify so many rows, one of them the last known token's, too, beside M + 1",
    )
    add("--accept", type=whole(0, 1024), help="impose how many draft tokens each round accepts")
    add(
        "--positions",
        type=many,
        nargs="+",
        help="where to measure steps and rounds (default: 500, "
        "or where the last round ends with the context)",
    )
    held = "positions that the cache holds (default: what the run needs); with several, the plain step is "
    add_flags(parser, cache_length={"type": many, "nargs": "+", "help": held + "measured with each"})


def add_measure_flags(parser: Parser) -> None:
    """The flags of what is measured beside rounds, and how often."""
    add, many = parser.add_argument, whole(1, MOST)
    add(
        "--modes",
        nargs="+",
        help="measure the target in each of these, taking turns: none, int8, fp8, int4, int4/128",
    )
    add("--prefill", type=many, nargs="*", help="prompt lengths to read (default: 512, or the context)")
    add(
        "--prompt_tokens",
        type=many,
        help="prompt of the whole generations (default: 64, or an eighth of the context)",
    )
    length = "tokens of the whole generations (default: 200, or to the context's end)"
    add_flags(parser, max_new_tokens={"type": many, "default": None, "help": length})
    add("--repeats", type=whole(1, 10**6), default=9, help="times to measure each part")
    add(
        "--attention",
        action="store_true",
        help="measure ways to attend, at 512, 4k and 32k positions, and nothing else",
    )
    add(
        "--products",
        action="store_true",
        help="measure a layer's products, unquantised and quantised, and nothing else",
    )
    add("--peers", action="store_true", help="run transformers on the same weights, taking turns")


def parse_args(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The command line. Without a target it names the demo pair and its judge."""
    add_model_flags(parser)
    add_flags(parser, "preset", "draft_preset")
    add_round_flags(parser)
    add_mode_flags(parser)
    add_measure_flags(parser)
    add_flags(parser, "compile")
    add_device_flags(parser)
    out = "write the figures to this .json file, and the table beside it as .md"
    add_flags(parser, out={"help": out}, profile={})

    args = parser.parse_args(argv)
    if args.checkpoint_path is None and args.preset is None:
        args.checkpoint_path = DEMO / "target"
        if not args.draft_checkpoint_path and not args.draft_preset:
            args.draft_checkpoint_path = DEMO / "draft"
        args.judge_path = args.judge_path or DEMO / "judge.safetensors"

    if args.verify is None:
        args.verify = "judge" if args.judge_path or args.preset else "standard"
    return args
