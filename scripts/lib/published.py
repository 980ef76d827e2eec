"""How a folder's publisher samples: its generation_config.json as defaults of the flags."""

import argparse
import sys
from pathlib import Path

import tp
from cli import InputError, shortened_value
from files import is_number, read_json
from hub import model_folder

READ = {  # name -> (whether a value is one, what it must be)
    "temperature": (lambda x: is_number(x, 1e-3, 1e3), "a number from 0.001 to 1000"),
    "top_k": (lambda x: type(x) is int and x >= 0, "a whole number of at least 0"),
    "top_p": (lambda x: is_number(x, 0, 1), "a number from 0 to 1"),
    "min_p": (lambda x: is_number(x, 0, 1), "a number from 0 to 1"),
}
OFF = {"top_k": 0, "top_p": 1, "min_p": 0}
OTHERS = {  # what else changes transformers' samples -> the value that changes nothing
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "typical_p": 1,
    "top_h": None, "epsilon_cutoff": 0, "eta_cutoff": 0, "num_beams": 1, "guidance_scale": 1,
    "penalty_alpha": 0, "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None, "sequence_bias": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}  # fmt: skip


def take_sampling(args: argparse.Namespace) -> None:
    """Fills in what --sample, or a --temperature, leaves open, from the target folder's
    generation_config.json.

    What is named neither there nor by a flag is off, temperature 1. Raises InputError for a value there that
    is none; a flag in its place makes that be ignored.
    """
    if not (args.sample or args.temperature):
        return
    path = model_folder(args.checkpoint_path) / "generation_config.json"
    found = read_json(path) if path.exists() else {}
    args.temperature = args.temperature or None  # 0 is no temperature to sample at
    for name, (fits, what) in READ.items():
        if getattr(args, name) is not None:
            continue
        value = found.get(name)
        if value is not None and not fits(value):
            raise InputError(
                f"{path}: {name}={shortened_value(value)} must be {what}; give --{name} in its place."
            )
        setattr(args, name, value)
    args.temperature = args.temperature or 1.0
    say_others(path, found)


def say_others(path: Path, found: dict) -> None:
    """One sentence about what the folder names beyond, which changes samples and is not built."""
    named = [name for name, off in OTHERS.items() if found.get(name) not in (None, off, [])]
    if named and tp.RANK == 0:
        values = ", ".join(f"{name} {shortened_value(found[name])}" for name in named)
        print(f"Note: {path} asks for {values}, too; that is not built and does not apply.", file=sys.stderr)


def filters_of(args: argparse.Namespace) -> tuple[int | None, float | None, float | None]:
    """top_k, top_p and min_p of a command line; None where that filter is off, or the command lacks it."""
    found = {name: getattr(args, name, None) for name in OFF}
    return tuple(None if found[name] == off else found[name] for name, off in OFF.items())
