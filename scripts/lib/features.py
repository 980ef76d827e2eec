"""The hidden states that a judge reads: computed as the engine computes them, and kept on disk in shards."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from checkpoint import read_safetensors
from cli import InputError, Progress
from files import write_file
from model import PAGE, PREFILL_ROWS, Transformer, whole_pages
from scripts.lib.answers import Encoded


class RowReader:
    """Reads sequences through a model as the engine does: the same passes of the same rows over the same part
    of the cache.

    The prompt in padded passes of PREFILL_ROWS; then `rows` = M + 1 a pass, as the target verifies; with
    `drafts`, as the draft proposes: two rows, then single ones. Low-precision products differ between row
    counts, so that only the same ones give the same bits. What a sequence shares with the one before it is
    not read again, unless its states are asked for.
    """

    def __init__(self, model: Transformer, rows: int, length: int, drafts: bool = False):
        self.model, self.rows, self.drafts, self.ids, self.base = model, rows, drafts, [], 0
        model.setup_caches(whole_pages(length + rows))

    def passes(self, base: int, end: int) -> Iterator[tuple[bool, range, int]]:
        """(whether of the prompt, its positions, how much of the cache is looked at) of each pass, up to
        position `end`."""
        most, cpu = PREFILL_ROWS[self.model.device.type], self.model.device.type == "cpu"
        for at in range(0, base, most):
            stop = min(at + most, whole_pages(base))
            yield True, range(at, stop), stop
        for at in range(base, end + self.drafts, self.rows):
            seen = whole_pages(at + self.rows) if cpu else self.model.cache_length
            if not self.drafts:
                yield False, range(at, at + self.rows), seen
                continue
            # Two rows: the last draft token of the round before is read here first.
            yield False, range(at - 1, at + 1), seen
            for place in range(at + 1, min(at + self.rows - 1, end)):
                yield False, range(place, place + 1), seen

    @torch.inference_mode()
    def read(self, ids: list[int], base: int, begin: int, end: int) -> Tensor:
        """Pre-norm hidden states (end - begin, dim) of positions begin to end; base: the last token of the
        prompt."""
        differ = (i for i, (a, b) in enumerate(zip(ids, self.ids)) if a != b)
        same = next(differ, min(len(ids), len(self.ids)))
        known = min(same, begin) if base == self.base else 0
        tokens = torch.zeros(whole_pages(len(ids) + self.rows), dtype=torch.long)
        tokens[: len(ids)] = torch.tensor(ids)
        tokens = tokens.to(self.model.device)
        prompt = tokens.clone()
        prompt[base + 1 :] = 0  # what the engine pads with

        parts, first = [], None
        for prefill, places, seen in self.passes(base, end):
            if (min(places.stop, base) if prefill else places.stop) <= known:
                continue
            pos = torch.arange(places.start, places.stop, device=tokens.device).clamp(min=0)
            rows = (prompt if prefill else tokens)[pos][None]
            hidden, _ = self.model(rows, pos, seen, n_logits=0, prefill=prefill)
            if not prefill:
                fresh = max(places.start, base)  # the draft's first pass begins in the prompt
                first = fresh if first is None else first
                parts.append(hidden[0, fresh - places.start :])

        self.ids, self.base = ids, base
        found = torch.cat(parts)[begin - first : end - first]
        if not found.isfinite().all():
            self.model.clear_caches()  # a NaN there outlives every mask
            self.ids = []
        return found


def labelled_places(answer: Encoded) -> Tensor:
    """The places (n,) of an answer's tokens that have a label: all of a text, only some of mined tokens."""
    places = torch.arange(len(answer.ids))
    if answer.spans is None and not answer.item.get("guard"):
        places = places[torch.tensor(answer.item["labels"]) >= 0]
    return places


def read_features(readers: list[RowReader], answer: Encoded) -> tuple[Tensor, Tensor]:
    """Features (n, dims) of an answer's labelled tokens and their places (n,) in it.

    The first reader is the target's, own rows; a second the draft's, in the rows that proposed the tokens.
    """
    places = labelled_places(answer)
    if not len(places):
        return torch.zeros(0, sum(r.model.args.dim for r in readers), dtype=readers[0].model.dtype), places

    base, both = len(answer.prompt) - 1, answer.prompt + answer.ids
    begin, end = base + 1 + int(places[0]), len(both)
    parts = [reader.read(both, base, begin - row, end - row).cpu() for row, reader in enumerate(readers)]
    return torch.cat(parts, dim=1)[places - places[0]], places


class Shard(NamedTuple):
    """A file of `features` (n, dims), with whose they are."""

    file: Path
    after: int  # the first answer that comes after it
    answer: Tensor  # (n,) int32, numbers of the answers
    place: Tensor  # (n,) int32, places of the tokens in them


class Shards:
    """All features of some answers, N rows, with `answer` (N,) and `place` (N,) that say whose they are.

    Iterating gives fp32 tensors (n, dims) in order. Up to HOLD bytes they stay in memory; beyond, one file at
    a time.
    """

    HOLD = 4 << 30

    def __init__(self, shards: list[Shard], dims: int):
        self.files = [shard.file for shard in shards]
        self.answer, self.place = (torch.cat([s[column] for s in shards]).long() for column in (2, 3))
        self.held = (
            [self.load(file) for file in self.files] if 4 * dims * len(self.answer) <= self.HOLD else None
        )

    @staticmethod
    def load(file: Path) -> Tensor:
        return read_safetensors(file)[1]["features"].float()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.held) if self.held is not None else (self.load(file) for file in self.files)

    def labels(self, answers: list[Encoded], policy: str) -> Tensor:
        """1 right, 0 wrong, -100 ignored, of each row, (N,)."""
        labels = [torch.tensor(answer.labels(policy), dtype=torch.long) for answer in answers]
        starts = torch.tensor([0, *map(len, labels)]).cumsum(0)
        return torch.cat(labels)[starts[self.answer] + self.place]


def with_columns(shards: Iterable[Tensor], *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Shards (n, dims) with the matching part of each column (N,)."""
    at = 0
    for x in shards:
        yield x, *(column[at : at + len(x)] for column in columns)
        at += len(x)


SHARD_BYTES = 64 << 20


def extract_features(
    models: list[Transformer], answers: list[Encoded], rows: int, cache: Path, shard_bytes: int = SHARD_BYTES
) -> Shards:
    """Features of all answers as shards under `cache`, in the models' type; a run that was killed goes on
    where it stopped.

    A shard that is damaged or missing is made anew, with those after it, which a line on stderr says. Raises
    InputError when an answer does not fit the context, or the states are not finite.
    """
    longest = max(len(a.prompt) + len(a.ids) for a in answers)
    context = min(m.args.max_position for m in models)
    if longest > context:
        raise InputError(f"An answer has {longest} tokens with its prompt; the context is {context}.")

    what = [
        [a.prompt, a.ids, a.item["labels"] if a.spans is None and not a.item.get("guard") else None]
        for a in answers
    ]
    made_by = [[m.fingerprint, f"{m.dtype} {m.quantization}".strip(), m.device.type] for m in models]
    passes = [rows, *PREFILL_ROWS.items(), PAGE]
    asked = json.dumps([what, made_by, passes, shard_bytes])
    folder = cache / hashlib.sha256(asked.encode()).hexdigest()[:16]

    dims = sum(m.args.dim for m in models)
    shards = known_shards(folder, answers, dims, models[0].dtype)
    readers = [RowReader(model, rows, longest, drafts=at > 0) for at, model in enumerate(models)]
    add_shards(shards, readers, answers, folder, shard_bytes)
    return Shards(shards, dims)


def known_shards(folder: Path, answers: list[Encoded], dims: int, dtype: torch.dtype) -> list[Shard]:
    """The shards of these answers that are there, up to the first that is missing or damaged."""
    shards: list[Shard] = []
    while not shards or shards[-1].after < len(answers):
        file = shard_file(folder, len(shards))
        if not file.exists():
            break
        try:
            shards.append(read_shard(file, shards[-1].after if shards else 0, answers, dims, dtype))
        except InputError as error:
            print(f"{str(error).removesuffix('.')}; it is made anew.", file=sys.stderr)
            break
    return shards


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def read_shard(file: Path, first: int, answers: list[Encoded], dims: int, dtype: torch.dtype) -> Shard:
    """The shard that begins with answer `first`. Raises InputError for one that was not written so."""
    metadata, tensors = read_safetensors(file)
    if set(tensors) != {"features", "answer", "place"}:
        raise InputError(f"{file} is no shard of features.")
    features, answer, place = (tensors[name] for name in ("features", "answer", "place"))

    after = metadata.get("next", "")
    fits = after.isascii() and after.isdecimal() and len(after) < 10 and first < int(after) <= len(answers)
    if fits:
        expected = rows_of(answers, range(first, int(after)))
        fits = features.shape == (len(expected[0]), dims) and features.dtype == dtype
        fits = fits and all(
            mine.dtype == torch.int32 and torch.equal(mine, other)
            for mine, other in zip((answer, place), expected)
        )
    if not fits:
        raise InputError(f"{file} is of other answers or another model.")
    if not features.isfinite().all():
        raise InputError(f"{file} holds values that are not finite.")
    return Shard(file, int(after), answer, place)


def rows_of(answers: list[Encoded], numbers: range) -> tuple[Tensor, Tensor]:
    """(answer (n,), place (n,)) int32 of the rows that these answers have."""
    places = [labelled_places(answers[at]) for at in numbers]
    answer = [torch.full((len(own),), at) for at, own in zip(numbers, places)]
    return torch.cat(answer).int(), torch.cat(places).int()


def add_shards(
    shards: list[Shard], readers: list[RowReader], answers: list[Encoded], folder: Path, shard_bytes: int
) -> None:
    """Reads the answers that are in no shard yet, and adds theirs. Memory: one shard and one answer."""
    first = begin = shards[-1].after if shards else 0
    parts, size = [], 0
    progress = Progress("reading answers", len(answers) - first)
    for at in range(first, len(answers)):
        part, _ = read_features(readers, answers[at])
        if not part.isfinite().all():
            raise InputError(
                f"The states of answer {at + 1} are not finite; give another --precision (bf16, fp32), "
                "or look at the weights."
            )
        parts.append(part)
        size += part.nbytes
        if size >= shard_bytes or at + 1 == len(answers):
            answer, place = rows_of(answers, range(begin, at + 1))
            shard = Shard(shard_file(folder, len(shards)), at + 1, answer, place)
            tensors = {"features": torch.cat(parts), "answer": answer, "place": place}
            write_file(shard.file, save(tensors, metadata={"next": str(at + 1)}))
            shards.append(shard)
            begin, parts, size = at + 1, [], 0
        progress.step()
