"""Reads the machine code (SASS) of Triton kernels compiled for a GPU that need not be there.

What is looked for: registers and shared memory, numbers spilled to local memory, which unit multiplies, how
wide loads are, and how many instructions the main loop has. It is read with the cuobjdump that Triton brings.
"""

import re
import subprocess
import tempfile
from collections import Counter

import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from triton.runtime.jit import JITFunction, MockTensor

from scripts.lib.no_gpu import cuobjdump

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*?)\s*;")
UNITS = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync"}  # in PTX, best first
LOADS = ("LDG", "LDGSTS")  # from global memory into registers, and past them into shared memory
BULK = ("UTMALDG", "UBLKCP")
SPILLS = ("LDL", "STL")
MULTIPLY = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "HMMA", "QMMA", "IMMA")
WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}  # a modifier -> bits; else 32
LAUNCH = JITFunction.run  # before anything stands in for it


class Placeholder(MockTensor):
    """A tensor without memory, at an address as even as its place in its storage allows."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.dtype, tensor.shape)
        self.address = tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:
        return self.address


def compile_only(kernel: JITFunction, grid: tuple, args: tuple, keywords: dict):
    """A launch of kernel[grid](*args, **keywords) that ends when it is compiled; what Triton compiled."""
    args = [Placeholder(x) if isinstance(x, Tensor) else x for x in args]
    keywords = {name: Placeholder(x) if isinstance(x, Tensor) else x for name, x in keywords.items()}
    return LAUNCH(kernel, *args, grid=grid, warmup=True, **keywords)


def of_inductor(sources: dict[str, str]) -> list[dict]:
    """`describe` of each Triton kernel that Inductor wrote, by its first configuration: a GPU tunes them."""
    rows = []
    for name, source in sources.items():
        with torch._inductor.config.patch(use_static_cuda_launcher=False):
            tuner = getattr(PyCodeCache.load(source), name)
            made = tuner._precompile_config(tuner.configs[0]).kernel
        shapes = " ".join(f"{axis}{size}" for axis, size in tuner.size_hints.items())
        row = {"kernel": name, "kind": "inductor", "programs": 0, "shapes": shapes}
        rows.append(row | {"tiling": str(tuner.configs[0].kwargs)} | describe(made))
    return rows


def dump(cubin: bytes, flag: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), flag, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def describe(made) -> dict:
    """The figures of a kernel that Triton compiled; stack and spills are bytes and instructions of local
    memory."""
    usage = dict(re.findall(r"(REG|STACK):(\d+)", dump(made.asm["cubin"], "--dump-resource-usage")))
    rows = instructions(dump(made.asm["cubin"], "-sass"))
    begin, end = main_loop(rows)
    loop, rest = rows[begin:end], rows[:begin] + rows[end:]
    return {
        "registers": int(usage["REG"]), "shared": made.metadata.shared,
        "fits": made.metadata.shared <= most_shared(), "stack": int(usage["STACK"]),
        "spills": sum(row[1] in SPILLS for row in rows), "warps": made.metadata.num_warps,
        "stages": made.metadata.num_stages,
        "unit": next((unit for words, unit in UNITS.items() if words in made.asm["ptx"]), "fma"),
        "waits": "griddepcontrol.wait" in made.asm["ptx"],  # for the kernel before it, with --pdl
        "instructions": len(rows), "loop_instructions": len(loop), "loop_loads": loads(loop),
        "other_loads": loads(rest),
    }  # fmt: skip


def most_shared() -> int:
    """Bytes of shared memory that a program may have."""
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


Row = tuple[int, str, str, str]  # address, operation, modifiers, operands


def instructions(sass: str) -> list[Row]:
    found = map(INSTRUCTION.match, sass.splitlines())
    return [(int(match[1], 16), *match.groups()[1:]) for match in found if match]


def main_loop(rows: list[Row]) -> tuple[int, int]:
    """Begin and end of the longest innermost loop that loads or multiplies; (0, 0) without one."""
    place, loops = {row[0]: i for i, row in enumerate(rows)}, []
    for end, (address, operation, _, operands) in enumerate(rows):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation == "BRA" else None
        if target and int(target[1], 16) < address and int(target[1], 16) in place:
            loops.append((place[int(target[1], 16)], end + 1))
    works = {*LOADS, *BULK, *MULTIPLY}
    loops = [loop for loop in loops if any(row[1] in works for row in rows[slice(*loop)])]
    inner = [
        (begin, end) for begin, end in loops
        if not any(begin <= other[0] and other[1] <= end for other in loops if other != (begin, end))
    ]  # fmt: skip
    return max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))


def loads(rows: list[Row]) -> dict[str, int]:
    """Loads from global memory by their width in bits, those into shared memory with an "s"; bulk copies."""
    found: Counter[str] = Counter()
    for _, operation, modifiers, _ in rows:
        if operation in LOADS:
            width = next((bits for word in modifiers.split(".") if (bits := WIDTHS.get(word))), 32)
            found[f"{width}{'s' * (operation == 'LDGSTS')}"] += 1
        elif operation in BULK:
            found["bulk"] += 1
    return dict(found)
