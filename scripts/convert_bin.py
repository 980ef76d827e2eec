"""Turns a folder's pickled weights (pytorch_model.bin) into safetensors, running no pickled code.

    python scripts/convert_bin.py --checkpoint_path OLD --out NEW

OLD is a Hugging Face folder as published before safetensors; its other files are copied. The tensors keep
their names and types. Files are memory-mapped, and one is written a layer, so that memory holds one layer.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import re
import shutil
from pathlib import Path

from torch import Tensor

from checkpoint import find_weights, read_config
from files import is_file, read_json
from hub import model_folder
from scripts.lib.converting import BESIDES, check_new, new_folder, open_pickled, write_weights
from scripts.lib.flags import add_flags


def pickled_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: pytorch_model.bin, or those that its index names."""
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if is_file(single):
        return [single]
    if not index.exists():
        raise InputError(f"{folder} has neither pytorch_model.bin nor pytorch_model.bin.index.json.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no 'weight_map' from tensor names to files.")
    return [folder / file for file in sorted(set(weight_map.values()))]


def read_all(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors by name, memory-mapped. Raises InputError for one that is there twice."""
    tensors: dict[str, Tensor] = {}
    for path in pickled_files(folder):
        found = open_pickled(path)
        for name in found:
            if not isinstance(found[name], Tensor):
                raise InputError(f"{path}: {name} is no tensor.")
            if name in tensors:
                raise InputError(f"{path}: {name} is in another file, too; one of them must go.")
        tensors |= found
    return tensors


def by_layer(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each layer together, and the rest. Cloned when written: tied ones share their memory."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer = re.match(r"(?:model\.)*layers\.\d+\.", name)
        groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    return list(groups.values())


def convert(source: Path, out: Path) -> None:
    """Writes `out` from `source`. Raises InputError, with nothing left behind, for whatever is missing or
    broken."""
    check_new(out)
    source = model_folder(source)
    args, groups = read_config(source), by_layer(read_all(source))
    with new_folder(out) as folder:
        cloned = ({name: tensor.clone() for name, tensor in group.items()} for group in groups)
        write_weights(folder, cloned, len(groups), source)
        for name in BESIDES:
            if is_file(source / name):
                shutil.copyfile(source / name, folder / name)
        find_weights(folder, args)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_flags(
        parser,
        checkpoint_path={"required": True, "help": "the folder with pytorch_model.bin"},
        out={"required": True, "help": "the folder to write"},
    )
    args = parser.parse_args(argv)
    run_script("convert_bin.py", lambda: convert(args.checkpoint_path, args.out))


if __name__ == "__main__":
    main()
