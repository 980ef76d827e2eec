"""A published folder written by a converter: beside its place, one file a layer, renamed when it is whole."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cli import InputError, Progress
from files import check_new_folder, lock, opened, write_file
from quantize import is_scrap, write_tensors

BESIDES = (  # what a published folder has beside its weights, where it has it
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
WEIGHTS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json")


def open_pickled(path: Path) -> dict[str, Tensor]:
    """A file of torch.save: tensors by name, memory-mapped, without running any pickled code."""
    with opened(path):
        pass  # else a pipe would be waited for, and a file that may not be read called broken
    try:
        shard = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} cannot be read as a checkpoint of plain tensors: {reason.rstrip('.')}."
        ) from None

    if not isinstance(shard, dict) or not all(isinstance(name, str) for name in shard):
        raise InputError(f"{path} holds no tensors by name.")
    for name, tensor in shard.items():
        if isinstance(tensor, Tensor) and not (tensor.layout == torch.strided and tensor.is_floating_point()):
            raise InputError(f"{path}: {name} is {tensor.dtype}, but weights are floating-point numbers.")

    return shard


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of a query or key matrix from (even, odd) pairs to first and second half of each
    head."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def beside(out: Path) -> Path:
    """Where a folder is written before it is whole."""
    return out.with_name(out.name + ".tmp")


def check_new(out: Path) -> None:
    """Raises InputError where --out cannot be made, before any work."""
    check_new_folder(out, "--out", beside(out))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, and is removed where that is not reached."""
    folder = beside(out)
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        lock(held, folder)
        clear(folder)
        try:
            yield folder
            os.replace(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(held)


def clear(folder: Path) -> None:
    """Removes what a killed run left; raises InputError where there is anything else."""
    for path in folder.iterdir():
        if not (path.name in BESIDES or WEIGHTS.fullmatch(path.name) or is_scrap(path.name)):
            raise InputError(
                f"{folder}, where the folder is written to first, holds {path.name}, which is not ours."
            )
    for path in folder.iterdir():
        path.unlink()


def write_weights(folder: Path, groups: Iterable[dict[str, Tensor]], count: int, source: Path) -> None:
    """One safetensors file for each of `count` groups of published tensors, and their index. Memory: a group
    at a time."""
    weight_map, total, progress = {}, 0, Progress(f"converting {source}", count)
    for number, tensors in enumerate(groups, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        write_tensors(folder / file, {name: tensor.contiguous() for name, tensor in tensors.items()})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        progress.step()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
