"""What commands under torchrun share: flags, comparisons, each rank's device, and where the draft goes."""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tp
from cli import InputError, shortened, whole
from files import digest
from model import ModelArgs
from quantize import Scheme, weight_bytes
from scripts.lib.results import rank_and_size

ROOT = Path(__file__).resolve().parents[2]
MISSED = {"cpu": 2**20, "cuda": 32 * 2**20}  # bytes read in the time of an all-reduce, for `place_draft`


def add_rank_flags(parser) -> None:
    """The flags that concern ranks."""
    add = parser.add_argument
    add("--draft_tp", choices=("shard", "replicate"),
        help="ranks share the draft, or run it all alike (default: by its size)")  # fmt: skip
    add("--all_reduce", choices=("nccl", "symmetric"), help="what sums small messages (default: nccl)")
    add("--check_ranks", action="store_true", help="compare tokens and positions of all ranks every round")


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags of ranks where there are none, or for ranks that were not started alike."""
    for flag in ("draft_tp", "all_reduce", "check_ranks"):
        if not tp.shard() and getattr(args, flag, None):
            raise InputError(f"--{flag} concerns several ranks; start them with torchrun, or leave it out.")
    if not tp.shard():
        return
    code = ROOT.glob("*.[pc]*")
    facts = {"torch": torch.__version__} | {file.name: digest(file, (".py", ".cpp")) for file in code}
    for name, value in vars(args).items():
        if isinstance(value, Path) and name != "profile":
            facts[f"content of --{name}"] = digest(value)
        elif not isinstance(value, Path):
            facts[f"--{name}"] = value
    agree(facts)


def agree(facts: dict) -> None:
    """Raises InputError, on every rank, naming the first of `facts` in which a rank differs from rank 0."""
    if not dist.is_initialized():
        return
    found = [{}] * dist.get_world_size()
    dist.all_gather_object(found, {name: str(value) for name, value in facts.items()})
    for rank, theirs in enumerate(found):
        for name in [*found[0], *theirs]:
            they, we = theirs.get(name, "none"), found[0].get(name, "none")
            if they != we:
                raise InputError(f"Rank {rank} has another {name} ({they}) than rank 0 ({we}).")


def check_round(pos: int, accepted: int, tokens: list[int]) -> None:
    """Raises InputError where the ranks' rounds differ (--check_ranks). pos: of the last token before it."""
    at = {f"token at position {pos + 1 + place}": token for place, token in enumerate(tokens)}
    agree(at | {"number of accepted tokens": accepted})


def own_device(name: str) -> str:
    """--device of this process: of several, the GPU of its number on its machine, whether they share a model
    (ranks) or not. Raises InputError where there is none of that number."""
    if not name.startswith("cuda") or not (tp.shard() or rank_and_size()[1] > 1):
        return name
    given, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", count)) if tp.shard() else count
    if tp.shard() and name != "cuda":
        raise InputError(f"--device {name}: each rank takes the GPU of its number; give --device cuda.")
    if needed > count:
        raise InputError(f"{needed} ranks need {needed} GPUs, but there are {count}; lower --nproc_per_node.")

    try:
        return f"cuda:{whole(0, count - 1)(given)}"
    except argparse.ArgumentTypeError:
        raise InputError(
            f"LOCAL_RANK {shortened(given)} in the environment names none of the {count} GPUs of this "
            "machine; start one process a GPU."
        ) from None


def place(
    shapes: list[ModelArgs],
    dtype: torch.dtype,
    schemes: list[Scheme | None],
    device: torch.device,
    draft_tp: str | None,
) -> list[tp.Shard | None]:
    """For target and draft: this rank's shard, or None for all of it. Says on standard error where the draft
    goes."""
    shard = tp.shard()
    if shard is None or len(shapes) < 2:
        return [shard] * len(shapes)
    draft, scheme = shapes[1], schemes[1]
    size = weight_bytes(draft, dtype, scheme)
    draft_tp = draft_tp or place_draft(draft, size, shard.world, device.type)
    print(f"draft: {'sharded' if draft_tp == 'shard' else 'the same on every rank'}", file=sys.stderr)
    return [shard, shard if draft_tp == "shard" else None]


def place_draft(args: ModelArgs, step_bytes: int, world: int, device: str) -> str:
    """Whether to `shard` a draft or to `replicate` it, when the command line does not say.

    Replicated, a draft step reads step_bytes a rank; sharded, step_bytes / world, and it waits for 2 L + 2
    collectives. So sharding pays when step_bytes (1 - 1 / world) exceeds 2 L + 2 times what a device reads in
    the time of one: MISSED, 10 us at 3.35 TB/s on a GPU, 100 us at 10 GB/s on a CPU; assumed, not measured.
    """
    try:
        tp.Shard(0, world).local(args)
    except InputError:
        return "replicate"
    pays = step_bytes * (1 - 1 / world) > (2 * args.n_layer + 2) * MISSED[device]
    return "shard" if pays else "replicate"
