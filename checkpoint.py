"""A published folder: config.json to ModelArgs, safetensors to parameters, and the fingerprint of a model.

A checkpoint is a Hugging Face snapshot folder of a `LlamaForCausalLM` as published (Llama 2, 3, 3.1, 3.2,
3.3): `config.json` and `model.safetensors`, or an index with shards. It is read as it stands.
"""

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

import published
from cli import InputError, Progress, shortened_value
from files import is_file, opened, parse_object, read_bytes, read_json
from hub import model_folder
from model import DTYPES, ModelArgs, Transformer, empty_model, materialise
from rope import ROPES, Rope
from tp import Shard

DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"  # the pair that comes with the repository

# no Llama is larger, by far; what is would fill memory or take minutes before the first weight is missed
MOST = {
    "num_hidden_layers": 10_000,
    "n_layers": 10_000,
    "rms_norm_eps": 1.0,
    "norm_eps": 1.0,
    "rope_theta": 1e30,
    "factor": 1e9,
    "low_freq_factor": 1e9,
    "high_freq_factor": 1e9,
    "max_position_embeddings": 2**40,
    "original_max_position_embeddings": 2**40,
}


def read_field(config: dict, name: str, kind: type, where: str, default=None):
    """A field of a configuration: a positive int or float up to MOST (default 2^24), or a bool.

    Without a default it must be there; null is no value except where another field gives it (KV heads, head
    size).
    """
    value = config.get(name)
    if value is None and (name not in config or name in ("num_key_value_heads", "n_kv_heads", "head_dim")):
        if default is None:
            raise InputError(f"{where} has no field {name!r}, which every Llama configuration has.")
        return default
    most = MOST.get(name, 2**24)
    if kind is bool:
        good, needed = isinstance(value, bool), "true or false"
    else:
        types, needed = (
            ((int, float), "a positive number") if kind is float else (int, "a positive whole number")
        )
        good = isinstance(value, types) and not isinstance(value, bool) and 0 < value <= most
        needed += f" of at most {most}"
    if not good:
        raise InputError(f"{where}: {name}={shortened_value(value)} must be {needed}.")
    return kind(value)


def refuse_unknown(config: dict, where: str) -> None:
    """Raises InputError naming the first setting of `config` that would change the arithmetic and is not
    built."""
    names = config.get("architectures") or config.get("model_type", "none")
    architecture = names[0] if isinstance(names, list) and names else names
    if architecture not in ("LlamaForCausalLM", "llama"):
        raise InputError(
            f"{where}: architecture {shortened_value(architecture)} is not implemented; LlamaForCausalLM is."
        )
    only = {"model_type": "llama", "hidden_act": "silu",
            "partial_rotary_factor": 1.0, "transformers_weights": "model.safetensors"}  # fmt: skip
    for field, value in only.items():
        absent = (value, None) if field in ("partial_rotary_factor", "transformers_weights") else (value,)
        if config.get(field, value) not in absent:
            raise InputError(
                f"{where}: {field}={shortened_value(config[field])} is not implemented; {value!r} is."
            )
    if found := config.get("quantization_config"):
        published.layout_of(found, where)


def read_rope(config: dict, where: str, context: int) -> tuple[float, Rope | None]:
    """RoPE base and scaling (of rope.ROPES), from `rope_scaling` (transformers 4) or `rope_parameters` (5).

    Where a folder has both, `rope_scaling` counts, and of `rope_parameters` nothing, as in transformers.
    """
    for name in ("rope_parameters", "rope_scaling"):
        found = config.get(name) or {}
        if not isinstance(found, dict) or any(isinstance(value, (dict, list)) for value in found.values()):
            raise InputError(f"{where}: {name}={shortened_value(found)} must be an object of plain values.")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = read_field(rope if "rope_theta" in rope else config, "rope_theta", float, where, 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPES:
        known = ", ".join(map(repr, ("default", *ROPES)))
        raise InputError(f"{where}: RoPE type {shortened_value(kind)} is not implemented; {known} are.")
    original = "original_max_position_embeddings"  # may stand at the top, or be left out
    rope = {original: context} | rope | {name: config[name] for name in (original,) if name in config}
    values = []
    for field in fields(ROPES[kind]):
        default = None if field.default is MISSING else field.default
        absent = default is not None and rope.get(field.name) is None  # null is a word for that
        values.append(default if absent else read_field(rope, field.name, field.type, where))
    if kind == "yarn" and theta <= 1:
        raise InputError(f"{where}: rope_theta={theta} must be above 1 where RoPE is scaled by yarn.")
    try:
        return theta, ROPES[kind](*values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def read_config(folder: str | Path) -> ModelArgs:
    """Reads `folder/config.json`. Raises InputError for whatever is missing or not implemented, by name."""
    path = model_folder(folder) / "config.json"
    return args_of(read_json(path), str(path))


def args_of(config: dict, where: str = "config.json") -> ModelArgs:
    """Reads the fields of a Hugging Face Llama configuration, in the spelling of transformers 4 or 5."""
    refuse_unknown(config, where)
    dim, n_head = (read_field(config, name, int, where) for name in ("hidden_size", "num_attention_heads"))
    context = read_field(config, "max_position_embeddings", int, where, 2048)
    rope_theta, rope_scaling = read_rope(config, where, context)
    args = ModelArgs(
        dim=dim,
        n_layer=read_field(config, "num_hidden_layers", int, where),
        n_head=n_head,
        n_kv_head=read_field(config, "num_key_value_heads", int, where, n_head),
        intermediate_size=read_field(config, "intermediate_size", int, where),
        vocab_size=read_field(config, "vocab_size", int, where),
        head_dim=read_field(config, "head_dim", int, where, max(1, dim // n_head)),
        max_position=context,
        norm_eps=read_field(config, "rms_norm_eps", float, where, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=read_field(config, "tie_word_embeddings", bool, where, False),
        attention_bias=read_field(config, "attention_bias", bool, where, False),
        mlp_bias=read_field(config, "mlp_bias", bool, where, False),
    )
    if args.n_head % args.n_kv_head or args.head_dim % 2:
        raise InputError(
            f"{where}: {args.n_head} heads over {args.n_kv_head} KV heads of size {args.head_dim} do not "
            f"fit: "
            "heads must be a multiple of KV heads, and the head size even."
        )
    if dim % n_head:
        raise InputError(f"{where}: hidden_size={dim} must be a multiple of num_attention_heads={n_head}.")
    return args


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """Maps every tensor name of a snapshot folder to its file. Raises InputError naming what is missing or
    broken.

    As in transformers a model.safetensors comes before an index, and an index names files: their own headers
    say what is in them.
    """
    folder = model_folder(folder)
    if os.path.lexists(folder / "adapter_config.json"):
        raise InputError(
            f"{folder} has an adapter (adapter_config.json), which is not implemented; merge it into the "
            f"weights."
        )
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if is_file(single):
        return dict.fromkeys(safetensors_header(single)[1], single)
    if not index.exists():
        raise InputError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json{pickled(folder)}."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no 'weight_map' from tensor names to files.")
    files: dict[str, Path] = {}
    for file in sorted(set(weight_map.values())):
        if not is_file(folder / file):
            name = next(name for name, other in weight_map.items() if other == file)
            raise InputError(f"{folder / file} is missing, which {index.name} names for {name}.")
        for name in safetensors_header(folder / file)[1]:
            if name in files:
                raise InputError(f"{folder / file} and {files[name]} both hold {name}; one of them must go.")
            files[name] = folder / file
    return files


def pickled(folder: Path) -> str:
    """What a sentence adds for a folder whose weights are pickled."""
    if not any(folder.glob("pytorch_model*.bin*")):
        return ""
    return (
        f"; its weights are pickled, which is never read here: "
        f"python scripts/convert_bin.py --checkpoint_path {folder} --out NEW writes a folder that is"
    )


def open_safetensors(path: Path):
    """Opens a safetensors file for reading by tensor. Raises InputError naming what is wrong with the
    file."""
    safetensors_header(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file that can be read: {error}.") from None


class Row(NamedTuple):
    """Where a published tensor goes, and how it is cut among ranks and quantised."""

    ours: str  # our parameter
    first: int  # its first row in that
    shape: tuple[int, ...]  # as published
    cut: Literal["rows", "columns"] | None = None  # None: every rank has all of it
    unit: Literal["heads", "kv_heads", "intermediate", "vocabulary"] | None = None  # of which a rank has some
    quantized: Literal["never", "always", "with LM head"] = "never"


def weight_plan(args: ModelArgs) -> dict[str, Row]:
    """Hugging Face tensor name -> what becomes of it, from top to bottom."""
    plan = top_plan(args)
    for i in range(args.n_layer):
        plan |= layer_plan(args, i)
    return plan


def top_plan(args: ModelArgs) -> dict[str, Row]:
    """`weight_plan` of what is in no layer."""
    shape = (args.vocab_size, args.dim)
    plan = {
        "model.embed_tokens.weight": Row("tok_embeddings.weight", 0, shape, "rows", "vocabulary"),
        "model.norm.weight": Row("norm.weight", 0, (args.dim,)),
    }
    if not args.tie_embeddings:
        plan["lm_head.weight"] = Row("output.weight", 0, shape, "rows", "vocabulary", "with LM head")
    return plan


def layer_plan(args: ModelArgs, i: int) -> dict[str, Row]:
    """`weight_plan` of layer i."""
    q, kv = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    dim, ffn = args.dim, args.intermediate_size
    theirs, ours = f"model.layers.{i}.", f"layers.{i}."
    parts = {  # matrix -> our parameter, first row, shape, cut among ranks
        "self_attn.q_proj": ("attention.wqkv", 0, (q, dim), "rows", "heads"),
        "self_attn.k_proj": ("attention.wqkv", q, (kv, dim), "rows", "kv_heads"),
        "self_attn.v_proj": ("attention.wqkv", q + kv, (kv, dim), "rows", "kv_heads"),
        "self_attn.o_proj": ("attention.wo", 0, (dim, q), "columns", "heads"),
        "mlp.gate_proj": ("feed_forward.w13", 0, (ffn, dim), "rows", "intermediate"),
        "mlp.up_proj": ("feed_forward.w13", ffn, (ffn, dim), "rows", "intermediate"),
        "mlp.down_proj": ("feed_forward.w2", 0, (dim, ffn), "columns", "intermediate"),
    }
    plan = {f"{theirs}{name}.weight": Row(f"{ours}{mine}.weight", *where, "always")
            for name, (mine, *where) in parts.items()}  # fmt: skip
    for name, (mine, first, shape, cut, unit) in parts.items():
        if args.attention_bias if name.startswith("self_attn") else args.mlp_bias:
            split = (cut, unit) if cut == "rows" else ()  # a sum over columns gets its bias once: tp.join
            plan[f"{theirs}{name}.bias"] = Row(f"{ours}{mine}.bias", first, shape[:1], *split)
    for name, mine in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")):
        plan[f"{theirs}{name}.weight"] = Row(f"{ours}{mine}.weight", 0, (dim,))
    return plan


def load_published(
    folder: Path, args: ModelArgs, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    complete: Callable[[Transformer, str], None] | None = None, shard: Shard | None = None,
) -> Transformer:  # fmt: skip
    """Loads a published snapshot folder, of shape `args` and any float type, straight into fused weights.

    dtype None keeps the type on disk (that of the embedding, where a folder mixes types; fp32 for fp64).
    complete: called with the model and each of its parameters' names as soon as that is filled, and may
    replace it. shard: reads that part of every tensor, and no more of it than the values that the fingerprint
    samples. Peak memory is the model (or the part) plus its largest tensor. Raises InputError naming tensor
    and file for whatever is missing, unexpected, misshapen or truncated.
    """
    files = find_weights(folder, args)
    local, plan = shard.local(args) if shard else args, weight_plan(args)
    places = weight_plan(local)
    model, reader = empty_model(args, local), Reader(folder, files)
    progress = Progress(f"loading {folder}", len(plan))
    digest, following = new_digest(args), [*(row.ours for row in list(plan.values())[1:]), None]
    for (name, row), after in zip(plan.items(), following):
        part = shard.part(args, row) if shard else ()
        tensor = reader.read(name, row.shape, part=part)
        dtype = dtype or run_as(tensor.dtype)
        digest.update(sample_of(tensor, row.shape, Stored(*files[name]) if part else None))
        reader.bytes_read += SAMPLES * tensor.itemsize if part else 0
        fill(materialise(model, row.ours, dtype, device), places[name], tensor)
        if complete is not None and after != row.ours:
            complete(model, row.ours)
        progress.step()
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.fingerprint, model.bytes_read = digest.hexdigest()[:16], reader.bytes_read
    return model.eval()


def run_as(dtype: torch.dtype) -> torch.dtype:
    """The type that weights stored in this one run in where none is asked for."""
    return torch.float32 if dtype == torch.float64 else dtype


EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_weights(
    folder: str | Path, args: ModelArgs, suffixes: tuple[str, ...] = ()
) -> dict[str, tuple[Path, str]]:
    """Published tensor name -> (its file, its name there), of all of `weight_plan`.

    As in transformers a name may lack the prefix "model.", or have it once too often, and a tied model may
    hold the LM head instead of the embedding. suffixes: of tensors that may lie beside a quantised weight, or
    in its place (published.Layout). Raises InputError for a tensor that is missing, unexpected or
    there under two names, and for a tied model whose LM head holds other values than its embedding.
    """
    files = checkpoint_files(folder)
    check_layers(files, args, folder)
    plan, found = weight_plan(args), {}
    stems = [name.removesuffix(".weight") for name, row in plan.items() if row.quantized != "never"]
    known = plan.keys() | {stem + suffix for stem in stems for suffix in suffixes}
    for name, file in files.items():
        spellings = (name.removeprefix("model."), "model." + name)
        real = next((other for other in spellings if other in known or other == LM_HEAD), name)
        if real in found:
            raise InputError(f"{folder} holds {real} twice: as {found[real][1]} and as {name}.")
        found[real] = file, name
    if args.tie_embeddings and LM_HEAD in found:
        head = found.pop(LM_HEAD)
        if EMBEDDING in found:
            check_tied(*(Stored(*place) for place in (found[EMBEDDING], head)), folder)
        found.setdefault(EMBEDDING, head)
    for name in plan:
        if name not in found and name.removesuffix(".weight") + "".join(suffixes[:1]) not in found:
            untied = name == LM_HEAD and "; if the embedding is the LM head, tie_word_embeddings must be true"
            raise InputError(f"{folder} has no tensor {name}, which its config.json calls for{untied or ''}.")
    for name, (file, stored) in found.items():
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(
                f"{file} has an unexpected tensor {stored}, which its config.json does not call for."
            )
    return found


def check_layers(files: dict[str, Path], args: ModelArgs, folder: str | Path) -> None:
    """Raises InputError at once where config.json calls for more layers than the folder has."""
    numbers = [match[1] for name in files if (match := re.match(r"(?:model\.)*layers\.(\d{1,9})\.", name))]
    n_layer = max(map(int, numbers), default=-1) + 1
    if n_layer < args.n_layer:
        raise InputError(
            f"{folder} has tensors of {n_layer} layers, but its config.json calls for {args.n_layer}."
        )


def check_tied(embedding: "Stored", head: "Stored", folder: str | Path) -> None:
    """Raises InputError where a tied model holds both, with different values: which of them was meant, no one
    can say."""
    rows = max(1, (1 << 22) // max(1, *embedding.shape))  # some MB at a time
    same = embedding.shape == head.shape and all(
        torch.equal(*(stored.part((slice(at, at + rows),)).float() for stored in (embedding, head)))
        for at in range(0, embedding.shape[0], rows)
    )
    if not same:
        raise InputError(
            f"{folder}: config.json says tie_word_embeddings, but {LM_HEAD} differs from "
            f"{EMBEDDING}; "
            "set it to false, or remove the tensor that is not meant."
        )


def new_digest(args: ModelArgs):
    """What a fingerprint begins with: the settings that no weight shows."""
    return hashlib.sha256(repr((args.rope_theta, args.rope_scaling, args.norm_eps)).encode())


def fingerprint_of(folder: str | Path, args: ModelArgs) -> str:
    """The fingerprint that `load_model` gives, without loading."""
    digest, reader = new_digest(args), Reader(folder, find_weights(folder, args))
    for name, row in weight_plan(args).items():
        digest.update(sample_of(reader.read(name, row.shape), row.shape))
    return digest.hexdigest()[:16]


SAMPLES = 64


def sample_of(tensor: Tensor, shape: tuple[int, ...], stored: "Stored | None" = None) -> bytes:
    """Shape and evenly spaced values of a tensor as it lies on disk, the same for every float type that holds
    them.

    stored: where to read them, and nothing else, if `tensor` is only a part.
    """
    flat = torch.linspace(0, math.prod(shape) - 1, SAMPLES, dtype=torch.double).long()
    values = tensor.reshape(-1)[flat] if stored is None else stored.read([(at, 1) for at in flat.tolist()])
    return repr((tuple(shape), values.float().tolist())).encode()


STORED = {  # the types of safetensors
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Stored:
    """A tensor in a safetensors file, of which parts are read by themselves.

    safetensors maps files into memory, where the system reads ahead and around: for a rank's slices, the
    whole file.
    """

    def __init__(self, file: Path, name: str):
        begin, header = safetensors_header(file)
        self.file, entry = file, header[name]
        if entry["dtype"] not in STORED:
            raise InputError(
                f"{file}: tensor {name} is {entry['dtype']}, but must be one of {', '.join(STORED)}."
            )
        self.dtype, self.shape = STORED[entry["dtype"]], entry["shape"]
        self.begin = begin + entry["data_offsets"][0]

    def read(self, spans: list[tuple[int, int]]) -> Tensor:
        """The values of spans (first, count) one after the other, (total,)."""
        size = self.dtype.itemsize
        content, at = bytearray(size * sum(count for _, count in spans)), 0
        view = memoryview(content)
        with opened(self.file) as (file, _):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # read nothing ahead
            for first, count in spans:
                file.seek(self.begin + first * size)
                end = at + count * size
                while at < end:
                    if not (got := file.readinto(view[at:end])):
                        raise InputError(f"{self.file} is truncated.")
                    at += got
        return torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)

    def part(self, part: tuple[slice, ...]) -> Tensor:
        """Some rows, or some columns of some rows."""
        rows, columns = [
            range(*span.indices(size)) for span, size in zip((*part, slice(None)), (*self.shape[:2], 1))
        ][:2]
        inner = math.prod(self.shape[2:])
        width = math.prod(self.shape[1:])  # of a whole row
        if len(part) == 1:
            spans = [(rows.start * width, len(rows) * width)]
            return self.read(spans).view(len(rows), *self.shape[1:])
        spans = [(row * width + columns.start * inner, len(columns) * inner) for row in rows]
        return self.read(spans).view(len(rows), len(columns), *self.shape[2:])


MOST_HEADER = 100_000_000  # bytes, as the format's own readers have it


def safetensors_header(file: Path) -> tuple[int, dict]:
    """Where a file's data begin, and its tensors by name: {"dtype", "shape", "data_offsets"}.

    Raises InputError with the true cause where the file cannot be read, is cut off, or its header does not
    fit it.
    """
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        status = None  # reading it says why
    return read_header(file, status and (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=1024)
def read_header(file: Path, identity: tuple | None) -> tuple[int, dict]:
    """`safetensors_header`, read once as long as the file stays the same."""
    with opened(file) as (stream, size):
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise InputError(
                f"{file} is the pointer that Git LFS keeps in its place; download the file itself."
            )
        if size >= 8 and length > MOST_HEADER:
            raise InputError(f"{file} is not a safetensors file: its header would have {length} bytes.")
        if size < 8 or 8 + length > size:
            raise InputError(f"{file} is truncated: it has {size} bytes, and its header ends beyond them.")
        content = stream.read(length)
    header = parse_object(content, f"the header of {file}")
    header.pop("__metadata__", None)
    check_entries(header, size - 8 - length, file)
    return 8 + length, header


def check_entries(header: dict, size: int, file: Path) -> None:
    """Raises InputError for the first entry that does not lie where the one before it ends, or is not of its
    shape's size."""
    for name, entry in header.items():
        if not is_entry(entry):
            raise InputError(
                f"{file}: the header's entry of tensor {name} is not of the form dtype, shape, data_offsets."
            )
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != end:
            raise InputError(
                f"{file}: tensor {name} begins at byte {begin} of the data, but the one before it ends at "
                f"{end}."
            )
        kind, shape = entry["dtype"], entry["shape"]
        needed = math.prod(shape) * STORED[kind].itemsize if kind in STORED else stop - begin
        if stop - begin != needed:
            raise InputError(
                f"{file}: tensor {name}, {kind} of shape {shape}, has {stop - begin} bytes, but takes "
                f"{needed}."
            )
        end = stop
    if end > size:
        raise InputError(f"{file} is truncated: its tensors have {end} bytes, of which {size} are there.")
    if end < size:
        raise InputError(f"{file} has {size - end} bytes after its last tensor; it is damaged.")


def is_entry(entry) -> bool:
    """Whether a header's entry has a type, a shape of up to 8 sizes, and two offsets in order."""
    if not (isinstance(entry, dict) and isinstance(entry.get("dtype"), str)):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    whole = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in (shape, offsets))
    return whole and len(shape) <= 8 and len(offsets) == 2 and offsets[0] <= offsets[1]


def fill(parameter: Tensor, place: Row, tensor: Tensor) -> None:
    """Copies a tensor to its place in a parameter. Of a place that is larger, the rest becomes 0."""
    rows = parameter[place.first : place.first + place.shape[0]]
    if rows.shape != tensor.shape:
        rows.zero_()
    rows[tuple(slice(size) for size in tensor.shape)].copy_(tensor)


class Reader:
    """Reads tensors of a folder by their published name: files has the file of each, and its name there."""

    def __init__(self, folder: str | Path, files: dict[str, tuple[Path, str]]):
        self.folder, self.files, self.handles, self.bytes_read = folder, files, {}, 0

    def stored(self, name: str) -> Stored:
        return Stored(*self.files[name])

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        part: tuple[slice, ...] = (),
    ) -> Tensor:
        """One tensor, or the part of it, its whole shape and its type checked (None: any of DTYPES)."""
        if name not in self.files:
            raise InputError(f"{self.folder} has no tensor {name}, which its config.json calls for.")
        file, stored = self.files[name]
        if file not in self.handles:
            self.handles[file] = open_safetensors(file)
        try:
            found = tuple(self.handles[file].get_slice(stored).get_shape())
            if found == shape:
                tensor = Stored(file, stored).part(part) if part else self.handles[file].get_tensor(stored)
        except SafetensorError as error:
            raise InputError(f"{file} has no readable tensor {stored}: {error}.") from None
        where = f"{file}: tensor {stored}"
        if found != shape:
            raise InputError(f"{where} has shape {found}, but config.json calls for {shape}.")
        if dtype is not None and tensor.dtype != dtype:
            raise InputError(f"{where} is {tensor.dtype}, but its config.json calls for {dtype}.")
        if dtype is None and tensor.dtype not in (*DTYPES.values(), torch.float64):
            raise InputError(f"{where} is {tensor.dtype}, but weights must be bf16, fp16, fp32 or fp64.")
        self.bytes_read += tensor.nbytes
        return tensor


MOST_SMALL = 1 << 30  # bytes of a file that is read whole: a judge, or a shard of features


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a small safetensors file, read whole. Raises InputError naming one that is
    broken."""
    content = read_bytes(path, most=MOST_SMALL)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file: {error}.") from None
    header = parse_object(content[8 : 8 + int.from_bytes(content[:8], "little")], f"{path}: its header")
    return header.get("__metadata__") or {}, tensors
