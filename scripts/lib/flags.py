"""Flags that several commands share, each declared once, in FLAGS.

    add_flags(parser, "data", "limit", seed={"default": 7, "help": "of the shuffle"})

A command takes a flag by its name, and says in keywords what is otherwise there. Importing this loads no
PyTorch: what needs it is asked for when a flag is added.
"""

import argparse
from pathlib import Path

from cli import number, shortened, whole

MOST_TOKENS = 10**8  # bound of flags that count tokens
MOST_QUESTIONS = 10_000_000  # bound of flags that count questions, texts and answers
MOST_PROCESSES = 1_000_000


def read_k(text: str) -> int | str:
    """--speculate_k: a whole number, or "auto"."""
    try:
        return text if text == "auto" else whole(1, 1024)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} must be a whole number from 1 to 1024, or auto"
        ) from None


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def precisions() -> list[str]:
    from model import DTYPES

    return list(DTYPES)


def label_policies() -> list[str]:
    from judge import LABEL_POLICIES

    return list(LABEL_POLICIES)


def gpus() -> list[str]:
    from scripts.lib.gpus import GPUS

    return list(GPUS)


FIXED_K = {"type": whole(1, 1024), "help": "M, draft tokens a round"}  # speculate_k where nothing adapts it
FLAGS = {  # name -> keywords of `add_argument`; a default or choices may be a function, called when added
    "checkpoint_path": {
        "type": Path,
        "help": "the target, a Hugging Face snapshot folder (default: the demo pair)",
    },
    "draft_checkpoint_path": {"type": Path, "help": "the draft, with the same vocabulary"},
    "judge_path": {"type": Path, "help": "judge.safetensors, made by train_judge.py for this target"},
    "preset": {"help": "instead: a target of a published shape, or DIMxLAYERS, with random weights"},
    "draft_preset": {"help": "a draft, likewise"},
    "gpu": {"choices": gpus, "default": "h100", "help": "which GPU"},
    "device": {"default": best_device, "help": "where to run"},
    "precision": {"choices": precisions, "help": "run type (default: bf16 on a GPU, fp32 on a CPU)"},
    "compile": {"action": "store_true", "help": "compile the step functions with torch.compile"},
    "pdl": {
        "action": "store_true",
        "help": "our GPU kernels start early (Hopper and later; no GPU has run it)",
    },
    "chat": {"action": "store_true", "help": "put prompts into the checkpoint folder's chat format"},
    "system": {"help": "with --chat: a system message, before the first turn"},
    "max_new_tokens": {"type": whole(1, MOST_TOKENS), "default": 200, "help": "tokens of an answer, at most"},
    "temperature": {"type": number(0, 1000), "default": 0.0, "help": "0 is greedy"},
    "sample": {
        "action": "store_true",
        "help": "sample as the folder's generation_config.json says, at its temperature (else 1)",
    },
    "top_k": {
        "type": whole(0, MOST_TOKENS),
        "help": "sample from the K most likely tokens; 0: from all (default of these three: the folder's, or "
        "off)",
    },
    "top_p": {
        "type": number(0, 1),
        "help": "sample from the most likely tokens that together reach this probability; 1: off (default: "
        "the folder's)",
    },
    "min_p": {
        "type": number(0, 1),
        "help": "sample from tokens of at least this times the largest probability; 0: off (default: the "
        "folder's)",
    },
    "min_prob": {
        "type": number(0, 1),
        "default": 0.0,
        "help": "no rule accepts a token that the target gives less than this",
    },
    "speculate_k": {
        "type": read_k,
        "default": 16,
        "help": "M, draft tokens a round, or auto: chosen as it goes",
    },
    "cache_length": {
        "type": whole(1, MOST_TOKENS),
        "help": "tokens that the cache holds (default: what this run needs)",
    },
    "data": {"type": Path, "required": True},
    "limit": {"type": whole(1, MOST_QUESTIONS), "help": "only so many (default: all)"},
    "seed": {"type": whole(-(2**62), 2**62), "default": 2026, "help": "another seed, other demo problems"},
    "samples": {"type": whole(1, 10_000), "default": 1},
    "out": {"type": Path},
    "merge": {
        "type": whole(1, MOST_PROCESSES),
        "help": "merge the parts of so many processes into --out, and do nothing else",
    },
    "label_policy": {
        "choices": label_policies,
        "default": "span",
        "help": "what tokens after an error count as: right, ignored, or wrong",
    },
    "work": {"type": Path, "help": "where to resume from"},
    "profile": {"type": Path, "help": "write a Chrome trace of one round"},
    "json": {"action": "store_true", "help": "print one JSON object"},
}


def add_flags(parser, *names: str, **changed: dict) -> None:
    """Gives a parser, or a group of its flags, those of these names.

    changed: flag -> the keywords of `add_argument` in which this command's differs; the order is that given.
    """
    for name in (*names, *changed):
        keywords = FLAGS[name] | changed.get(name, {})
        made = {
            key: value()
            for key, value in keywords.items()
            if key in ("default", "choices") and callable(value)
        }
        parser.add_argument(f"--{name}", **keywords | made)


def add_model_flags(parser) -> None:
    """Which models: a target, its draft and its judge."""
    add_flags(parser, "checkpoint_path", "draft_checkpoint_path", "judge_path")


def add_decoding_flags(parser, **changed: dict) -> None:
    """How to decode; changed: as in `add_flags`."""
    names = "max_new_tokens", "sample", "temperature", "top_k", "top_p", "min_p", "min_prob", "speculate_k"
    add_flags(parser, **{name: changed.get(name, {}) for name in names})


def add_device_flags(parser) -> None:
    """Where the models run, and in which type."""
    add_flags(parser, "device", "precision")


def add_engine_flags(parser, max_new_tokens: int | None = 200) -> None:
    """All that says which models answer, and how.

    max_new_tokens: None where the task has a default of its own.
    """
    from quantize import add_mode_flags

    whose = {} if max_new_tokens else {"help": "tokens of an answer, at most (default: the task's)"}
    add_model_flags(parser)
    add_flags(parser, "chat")
    add_decoding_flags(parser, max_new_tokens={"default": max_new_tokens} | whose)
    add_flags(parser, "compile")
    add_device_flags(parser)
    add_mode_flags(parser)
