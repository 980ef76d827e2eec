"""Llama 3.1 for one sequence at the lowest latency: arguments, static KV cache, transformer, loading a folder.

A checkpoint is a Hugging Face snapshot folder of a `LlamaForCausalLM` as published (Llama 2, 3, 3.1, 3.2, 3.3):
`config.json` and `model.safetensors`, or an index with shards. It is read as it stands. RoPE uses the half-split
layout of those weights. Nothing here knows about drafts or judges.
"""

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import kernels
from cli import InputError, Progress, shortened_value
from files import checkpoint_folder, is_file, opened, parse_object, read_json

if TYPE_CHECKING:
    from tp import Shard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WINDOW = 64  # on a CPU a step looks at the least multiple of this that holds what it may see
PREFILL_ROWS = {"cpu": 256, "cuda": 2048}  # that a pass over the prompt reads, a multiple of WINDOW


def pick_device(name: str) -> torch.device:
    """The device, or an InputError when there is none of that name here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are built")
        torch.empty(0, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)  # set_device takes no other
            torch.cuda.set_device(device)  # graphs, events and Triton's kernels go to the current one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--device {name} is not usable here ({reason}); cpu always is.") from None
    return device


def run_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """The type to run in: as asked for, else bf16 on a GPU and fp32 on a CPU."""
    return DTYPES[precision or ("bf16" if device.type == "cuda" else "fp32")]


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a Llama. Names follow gpt-fast; `from_folder` reads them from Hugging Face's `config.json`."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    max_position: int = 131072  # the longest context that the model was made for, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: tuple[float, float, float, int] | None = None  # factor, low_freq, high_freq, original context
    tie_embeddings: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelArgs":
        """Reads `folder/config.json`. Raises InputError for whatever is missing or not implemented, by name."""
        path = Path(folder) / "config.json"
        return cls.from_hf_config(read_json(path), str(path))

    @classmethod
    def from_hf_config(cls, config: dict, where: str = "config.json") -> "ModelArgs":
        """Reads the fields of a Hugging Face Llama configuration, in the spelling of transformers 4 or 5."""
        refuse_unknown(config, where)
        dim, n_head = (read_field(config, name, int, where) for name in ("hidden_size", "num_attention_heads"))
        context = read_field(config, "max_position_embeddings", int, where, 2048)
        rope_theta, rope_scaling = read_rope(config, where, context)
        args = cls(
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
        )
        if args.n_head % args.n_kv_head or args.head_dim % 2:
            raise InputError(
                f"{where}: {args.n_head} heads over {args.n_kv_head} KV heads of size {args.head_dim} do not fit: "
                "heads must be a multiple of KV heads, and the head size even."
            )
        if dim % n_head:
            raise InputError(f"{where}: hidden_size={dim} must be a multiple of num_attention_heads={n_head}.")
        return args

    @property
    def n_params(self) -> int:
        """Number of weights; a tied LM head counts once."""
        attention = self.dim * self.head_dim * 2 * (self.n_head + self.n_kv_head)
        per_layer = attention + 3 * self.dim * self.intermediate_size + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layer * per_layer + embeddings + self.dim

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes of a KV cache for `length` positions."""
        return 2 * self.n_layer * self.n_kv_head * self.head_dim * length * dtype.itemsize

    def step_bytes(self, length: int, dtype: torch.dtype, rows: int = 1) -> int:
        """Bytes that a step of `rows` rows must read at position `length`: every weight once (of an embedding that is
        not the LM head, too, only the rows' own), and the cache so far."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.dim
        return (self.n_params - embedding + rows * self.dim) * dtype.itemsize + self.cache_bytes(length, dtype)


LLAMA31_ROPE = (8.0, 1.0, 4.0, 8192)
LLAMA32_ROPE = (32.0, 1.0, 4.0, 8192)
# Published shapes, for benchmarks with random weights: dim, layers, heads, KV heads, intermediate, head_dim, rope, tied
PRESETS = {
    "Llama-3.2-1B": (2048, 16, 32, 8, 8192, 64, LLAMA32_ROPE, True),
    "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128, LLAMA32_ROPE, True),
    "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128, LLAMA31_ROPE, False),
    "Llama-3.1-70B": (8192, 80, 64, 8, 28672, 128, LLAMA31_ROPE, False),
    "Llama-3.1-405B": (16384, 126, 128, 8, 53248, 128, LLAMA31_ROPE, False),
}


def preset(name: str) -> ModelArgs:
    """The arguments of a published Llama by name, for random weights. Raises InputError with the names known."""
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}; known are {', '.join(PRESETS)}.")
    dim, n_layer, n_head, n_kv_head, intermediate, head_dim, rope, tied = PRESETS[name]
    return ModelArgs(dim, n_layer, n_head, n_kv_head, intermediate, 128256, head_dim, rope_scaling=rope, tie_embeddings=tied)


MOST = {  # no Llama is larger, by far; what is would fill memory or take minutes before the first weight is missed
    "num_hidden_layers": 10_000, "n_layers": 10_000, "rms_norm_eps": 1.0, "norm_eps": 1.0, "rope_theta": 1e30, "factor": 1e9,
    "low_freq_factor": 1e9, "high_freq_factor": 1e9, "max_position_embeddings": 2**40,
    "original_max_position_embeddings": 2**40,
}  # fmt: skip


def read_field(config: dict, name: str, kind: type, where: str, default=None):
    """A field of a configuration: a positive int or float up to MOST (default 2^24), or a bool.

    Without a default it must be there; null is no value except where another field gives it (KV heads, head size).
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
        types, needed = ((int, float), "a positive number") if kind is float else (int, "a positive whole number")
        good = isinstance(value, types) and not isinstance(value, bool) and 0 < value <= most
        needed += f" of at most {most}"
    if not good:
        raise InputError(f"{where}: {name}={shortened_value(value)} must be {needed}.")
    return kind(value)


def refuse_unknown(config: dict, where: str) -> None:
    """Raises InputError naming the first setting of `config` that would change the arithmetic and is not built."""
    names = config.get("architectures") or config.get("model_type", "none")
    architecture = names[0] if isinstance(names, list) and names else names
    if architecture not in ("LlamaForCausalLM", "llama"):
        raise InputError(f"{where}: architecture {shortened_value(architecture)} is not implemented; LlamaForCausalLM is.")
    only = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "partial_rotary_factor": 1.0, "transformers_weights": "model.safetensors"}  # fmt: skip
    for field, value in only.items():
        absent = (value, None) if field in ("partial_rotary_factor", "transformers_weights") else (value,)
        if config.get(field, value) not in absent:
            raise InputError(f"{where}: {field}={shortened_value(config[field])} is not implemented; {value!r} is.")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise InputError(f"{where}: quantization method {shortened_value(method)} is not implemented; use unquantised weights.")


def read_rope(config: dict, where: str, context: int) -> tuple[float, tuple[float, float, float, int] | None]:
    """RoPE base and Llama-3.1 scaling from `rope_scaling` (transformers 4) or `rope_parameters` (5).

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
    if kind != "llama3":
        raise InputError(f"{where}: RoPE type {shortened_value(kind)} is not implemented; 'default' and 'llama3' are.")
    factor, low, high = (read_field(rope, name, float, where) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise InputError(f"{where}: high_freq_factor={high} must be above low_freq_factor={low}.")
    original = "original_max_position_embeddings"
    return theta, (factor, low, high, read_field(config if original in config else rope, original, int, where, context))


def rope_table(args: ModelArgs, length: int, device: torch.device) -> Tensor:
    """fp32 cos and sin, (length, 2, head_dim / 2). Scaling by wavelength as Llama 3.1 defines it.

    fp32 matters: in bf16 the angle of position 8193 differs from that of 8192 by less than a rounding step.
    """
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2, device=device).float() / args.head_dim)
    if args.rope_scaling is not None:
        factor, low, high, original = args.rope_scaling
        wavelength = 2 * math.pi / freqs
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 1: keep, 0: divide by factor
        freqs = (1 - smooth) * freqs / factor + smooth * freqs
    angles = torch.outer(torch.arange(length, device=device).float(), freqs)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x (B, T, H, D) by table (T, 2, D/2), in fp32; the halves of D are the pairs."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = table[:, None, 0], table[:, None, 1]  # (T, 1, D/2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Linear(nn.Linear):
    """A product without bias, by the fastest kernel for its rows."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.wqkv = Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim)
        self.wo = Linear(args.n_head * args.head_dim, args.dim)
        self.k_cache: Tensor | None = None  # (1, n_kv_head, length, head_dim), made by setup_caches
        self.v_cache: Tensor | None = None

    def forward(self, x: Tensor, rope: Tensor, pos: Tensor | None, mask: Tensor | None, window: int) -> Tensor:
        """x (B, T, dim), rope (T, 2, head_dim / 2), pos (T,) or None, mask and window as `see` gives -> (B, T, dim)."""
        a, (batch, rows, _) = self.args, x.shape
        qkv = self.wqkv(x).view(batch, rows, -1, a.head_dim)
        q, k, v = qkv.split([a.n_head, a.n_kv_head, a.n_kv_head], dim=2)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if pos is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            self.k_cache[:, :, pos] = k.transpose(1, 2)
            self.v_cache[:, :, pos] = v.transpose(1, 2)
            y = self.attend(q, pos, mask, window)
        return self.wo(y.reshape(batch, rows, -1))

    def attend(self, q: Tensor, pos: Tensor, mask: Tensor | None, window: int) -> Tensor:
        """q (1, T, n_head, head_dim) over the caches -> the same shape."""
        a, rows = self.args, q.shape[1]
        if mask is None:
            return kernels.attend(heads_as_rows(q, a.n_kv_head)[0], self.k_cache, self.v_cache, pos).view(q.shape)
        k, v = self.k_cache[:, :, :window], self.v_cache[:, :, :window]
        if not use_heads_as_rows(q):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads_as_rows(q, a.n_kv_head), k, v, attn_mask=mask)
        return y.view(1, a.n_kv_head, -1, rows, a.head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)


def causal_mask(pos: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """(T, window): 0 where row t, at position pos[t], may look, -inf elsewhere."""
    hidden = torch.arange(window, device=pos.device) > pos[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=pos.device).masked_fill(hidden, -float("inf"))


def heads_as_rows(q: Tensor, n_kv_head: int) -> Tensor:
    """(1, T, n_head, D) -> (1, n_kv_head, group * T, D), row r being query head r // T of its group and token r % T."""
    _, rows, _, d = q.shape
    return q.view(1, rows, n_kv_head, -1, d).permute(0, 2, 3, 1, 4).reshape(1, n_kv_head, -1, d)


def use_heads_as_rows(q: Tensor) -> bool:
    """Whether the query heads of one KV head become further rows of q (1, T, ...), so that its cache is read once.

    Measured with PyTorch's attention on a CPU (benchmarks/attention_bf16.md, attention_fp32.md): it pays for single rows,
    and in fp32 for those of a verification.
    """
    rows = q.shape[1]
    return q.device.type == "cpu" and rows <= (kernels.MOST_ROWS if q.dtype == torch.float32 else 2)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.intermediate_size)  # gate and up in one product
        self.w2 = Linear(args.intermediate_size, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, pos: Tensor | None, mask: Tensor | None, window: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, pos, mask, window)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Llama. Without caches it reads whole sequences (training); after `setup_caches` it decodes one sequence.

    local: the shape of the weights held here, where they are a part of the model (tp.py); default: all of it.
    """

    def __init__(self, args: ModelArgs, local: ModelArgs | None = None):
        super().__init__()
        self.args, self.local = args, local or args
        self.tok_embeddings = nn.Embedding(self.local.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(self.local) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, self.local.vocab_size)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.fingerprint = ""  # of the weights on disk, set by load_model: tells checkpoints apart
        self.quantization = ""  # how they are quantised, set by quantize.py
        self.bytes_read = 0  # from disk, while loading
        self.rope: Tensor | None = None  # (length, 2, head_dim / 2) fp32
        self.cache_length = 0
        self.generation = 0  # counts allocations of the caches: graphs captured over older ones must not run

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    def setup_caches(self, length: int) -> None:
        """Allocates KV caches and the RoPE table for `length` positions; keeps longer ones that fit the weights."""
        cache = self.layers[0].attention.k_cache
        if cache is not None and cache.shape[2] >= length and (cache.dtype, cache.device) == (self.dtype, self.device):
            return
        self.cache_length, self.generation = length, self.generation + 1
        self.rope = rope_table(self.args, length, self.device)
        shape = (1, self.local.n_kv_head, length, self.local.head_dim)
        for layer in self.layers:
            layer.attention.k_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
            layer.attention.v_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()  # they may have been made in it, and are then changed only in it
    def clear_caches(self) -> None:
        """Zeroes the KV caches."""
        for layer in self.layers:
            layer.attention.k_cache.zero_()
            layer.attention.v_cache.zero_()

    def forward(
        self, tokens: Tensor, pos: Tensor | None = None, window: int | None = None, n_logits: int | None = None,
        prefill: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Reads tokens, returns (hidden, logits).

        tokens: (B, T) ids. pos: (T,) their ascending positions in the cache (B = 1), or None to read whole sequences
        without a cache. window: the step sees cache positions below it (at least max(pos) + 1; default: all).
        prefill: the rows are many, and the last of the window (on a GPU other kernels serve them).
        hidden: (B, T, dim), the last layer's output before the final norm. logits: (B, n_logits, vocab) in fp32,
        for the last n_logits rows (default all; 0 skips the LM head); of a part of a model only its part of the vocabulary.
        """
        window = self.cache_length if window is None else window
        x = self.tok_embeddings(tokens)
        if pos is None:
            rope, mask = rope_table(self.args, tokens.shape[1], tokens.device), None
        else:
            rope, mask = self.rope[pos], self.see(x, pos, window, prefill)
        for layer in self.layers:
            x = layer(x, rope, pos, mask, window)
        rows = x if n_logits is None else x[:, x.shape[1] - n_logits :]
        return x, self.output(self.norm(rows)).float()

    def see(self, x: Tensor, pos: Tensor, window: int, prefill: bool = False) -> Tensor | None:
        """What is added to attention scores, 0 or -inf: (T, window), or (group * T, window) for rows by `heads_as_rows`.

        On a GPU nothing of that size is made: the decoding kernel needs none (None), and a prefill has a diagonal.
        """
        if x.device.type == "cuda":
            return causal_lower_right(len(pos), window) if prefill else None
        mask = causal_mask(pos, window, x.dtype)
        return mask.repeat(self.local.n_head // self.local.n_kv_head, 1) if use_heads_as_rows(x) else mask


def random_model(
    args: ModelArgs, device: str | torch.device, dtype: torch.dtype, seed: int = 0,
    complete: Callable[["Transformer", str], None] | None = None,
) -> Transformer:  # fmt: skip
    """A model with random weights, made on `device` layer by layer, so that memory never holds more than the model.

    complete: as in `load_model`.
    """
    model = empty_model(args)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name in [name for name, _ in model.named_parameters()]:
        fresh = materialise(model, name, dtype, device)
        if fresh.dim() > 1:
            fresh.normal_(0, 0.02, generator=generator)
        else:
            fresh.fill_(1.0)
        if complete is not None:
            complete(model, name)
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def empty_model(args: ModelArgs, local: ModelArgs | None = None) -> Transformer:
    """The module tree without memory, on the meta device."""
    with torch.device("meta"):
        return Transformer(args, local)


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """Maps every tensor name of a snapshot folder to its file. Raises InputError naming what is missing or broken.

    As in transformers a model.safetensors comes before an index, and an index names files: their own headers say what
    is in them.
    """
    folder = checkpoint_folder(folder)
    if os.path.lexists(folder / "adapter_config.json"):
        raise InputError(f"{folder} has an adapter (adapter_config.json), which is not implemented; merge it into the weights.")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if is_file(single):
        return dict.fromkeys(safetensors_header(single)[1], single)
    if not index.exists():
        raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
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


def open_safetensors(path: Path):
    """Opens a safetensors file for reading by tensor. Raises InputError naming what is wrong with the file."""
    safetensors_header(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file that can be read: {error}.") from None


def weight_plan(args: ModelArgs) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Hugging Face tensor name -> (our parameter, first row in it, shape of the published tensor)."""
    q, kv, ffn, dim = args.n_head * args.head_dim, args.n_kv_head * args.head_dim, args.intermediate_size, args.dim
    plan = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", 0, (args.vocab_size, dim)),
        "model.norm.weight": ("norm.weight", 0, (dim,)),
    }
    if not args.tie_embeddings:
        plan["lm_head.weight"] = ("output.weight", 0, (args.vocab_size, dim))
    for i in range(args.n_layer):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        plan |= {
            theirs + "self_attn.q_proj.weight": (ours + "attention.wqkv.weight", 0, (q, dim)),
            theirs + "self_attn.k_proj.weight": (ours + "attention.wqkv.weight", q, (kv, dim)),
            theirs + "self_attn.v_proj.weight": (ours + "attention.wqkv.weight", q + kv, (kv, dim)),
            theirs + "self_attn.o_proj.weight": (ours + "attention.wo.weight", 0, (dim, q)),
            theirs + "mlp.gate_proj.weight": (ours + "feed_forward.w13.weight", 0, (ffn, dim)),
            theirs + "mlp.up_proj.weight": (ours + "feed_forward.w13.weight", ffn, (ffn, dim)),
            theirs + "mlp.down_proj.weight": (ours + "feed_forward.w2.weight", 0, (dim, ffn)),
            theirs + "input_layernorm.weight": (ours + "attention_norm.weight", 0, (dim,)),
            theirs + "post_attention_layernorm.weight": (ours + "ffn_norm.weight", 0, (dim,)),
        }
    return plan


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    complete: Callable[[Transformer, str], None] | None = None, shard: "Shard | None" = None,
) -> Transformer:  # fmt: skip
    """Loads a published snapshot folder (any float type on disk) straight into fused weights.

    dtype None keeps the type on disk (that of the embedding, where a folder mixes types). complete: called with the model
    and each of its parameters' names as soon as that is filled, and may replace it. shard: reads that part of every
    tensor, and no more of it than the values that the fingerprint samples. Peak memory is the model (or the part)
    plus its largest tensor. Raises InputError naming tensor and file for whatever is missing, unexpected, misshapen or
    truncated.
    """
    folder = Path(folder)
    args = ModelArgs.from_folder(folder)
    files = find_weights(folder, args)
    local, plan = shard.local(args) if shard else args, weight_plan(args)
    places = weight_plan(local)
    model, handles, progress = empty_model(args, local), {}, Progress(f"loading {folder}", len(plan))
    digest, following = new_digest(args), [*(ours for ours, _, _ in list(plan.values())[1:]), None]
    for (name, (ours, _, shape)), after in zip(plan.items(), following):
        file, stored = files[name]
        if file not in handles:
            handles[file] = open_safetensors(file)
        part = shard.part(args, name) if shard else ()
        tensor = read_tensor(handles[file], stored, shape, file, part=part)
        dtype = dtype or tensor.dtype
        digest.update(sample_of(tensor, shape, Stored(file, stored) if part else None))
        model.bytes_read += tensor.nbytes + (SAMPLES * tensor.itemsize if part else 0)
        _, row, local_shape = places[name]
        fill(materialise(model, ours, dtype, device)[row : row + local_shape[0]], tensor)
        if complete is not None and after != ours:
            complete(model, ours)
        progress.step()
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.fingerprint = digest.hexdigest()[:16]
    return model.eval()


EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_weights(folder: str | Path, args: ModelArgs) -> dict[str, tuple[Path, str]]:
    """Published tensor name -> (its file, its name there), of all of `weight_plan`.

    As in transformers a name may lack the prefix "model.", or have it once too often, and a tied model may hold the LM
    head instead of the embedding. Raises InputError for a tensor that is missing, unexpected or there under two names,
    and for a tied model whose LM head holds other values than its embedding.
    """
    files = checkpoint_files(folder)
    check_layers(files, args, folder)
    plan, found = weight_plan(args), {}
    for name, file in files.items():
        spellings = (name.removeprefix("model."), "model." + name)
        real = next((other for other in spellings if other in plan or other == LM_HEAD), name)
        if real in found:
            raise InputError(f"{folder} holds {real} twice: as {found[real][1]} and as {name}.")
        found[real] = file, name
    if args.tie_embeddings and LM_HEAD in found:
        head = found.pop(LM_HEAD)
        if EMBEDDING in found:
            check_tied(*(Stored(*place) for place in (found[EMBEDDING], head)), folder)
        found.setdefault(EMBEDDING, head)
    for name in plan:
        if name not in found:
            untied = name == LM_HEAD and "; if the embedding is the LM head, tie_word_embeddings must be true"
            raise InputError(f"{folder} has no tensor {name}, which its config.json calls for{untied or ''}.")
    for name, (file, stored) in found.items():
        if name not in plan and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{file} has an unexpected tensor {stored}, which its config.json does not call for.")
    return found


def check_layers(files: dict[str, Path], args: ModelArgs, folder: str | Path) -> None:
    """Raises InputError at once where config.json calls for more layers than the folder has."""
    numbers = [match[1] for name in files if (match := re.match(r"(?:model\.)*layers\.(\d{1,9})\.", name))]
    n_layer = max(map(int, numbers), default=-1) + 1
    if n_layer < args.n_layer:
        raise InputError(f"{folder} has tensors of {n_layer} layers, but its config.json calls for {args.n_layer}.")


def check_tied(embedding: "Stored", head: "Stored", folder: str | Path) -> None:
    """Raises InputError where a tied model holds both, with different values: which of them was meant, no one can say."""
    rows = max(1, (1 << 22) // max(1, *embedding.shape))  # some MB at a time
    same = embedding.shape == head.shape and all(
        torch.equal(*(stored.part((slice(at, at + rows),)).float() for stored in (embedding, head)))
        for at in range(0, embedding.shape[0], rows)
    )
    if not same:
        raise InputError(f"{folder}: config.json says tie_word_embeddings, but {LM_HEAD} differs from {EMBEDDING}; "
                         "set it to false, or remove the tensor that is not meant.")  # fmt: skip


def new_digest(args: ModelArgs):
    """What a fingerprint begins with: the settings that no weight shows."""
    return hashlib.sha256(repr((args.rope_theta, args.rope_scaling, args.norm_eps)).encode())


def fingerprint_of(folder: str | Path) -> str:
    """The fingerprint that `load_model` gives, without loading."""
    args, handles = ModelArgs.from_folder(folder), {}
    digest, files = new_digest(args), find_weights(folder, args)
    for name, (_, _, shape) in weight_plan(args).items():
        file, stored = files[name]
        if file not in handles:
            handles[file] = open_safetensors(file)
        digest.update(sample_of(read_tensor(handles[file], stored, shape, file), shape))
    return digest.hexdigest()[:16]


SAMPLES = 64


def sample_of(tensor: Tensor, shape: tuple[int, ...], stored: "Stored | None" = None) -> bytes:
    """Shape and evenly spaced values of a tensor as it lies on disk, the same for every float type that holds them.

    stored: where to read them, and nothing else, if `tensor` is only a part.
    """
    flat = torch.linspace(0, math.prod(shape) - 1, SAMPLES, dtype=torch.double).long()
    values = tensor.reshape(-1)[flat] if stored is None else stored.read([(at, 1) for at in flat.tolist()])
    return repr((tuple(shape), values.float().tolist())).encode()


STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8,
          "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip


class Stored:
    """A tensor in a safetensors file, of which parts are read by themselves.

    safetensors maps files into memory, where the system reads ahead and around: for a rank's slices, the whole file.
    """

    def __init__(self, file: Path, name: str):
        begin, header = safetensors_header(file)
        self.file, entry = file, header[name]
        if entry["dtype"] not in STORED:
            raise InputError(f"{file}: tensor {name} is {entry['dtype']}, but must be one of {', '.join(STORED)}.")
        self.dtype, self.shape, self.begin = STORED[entry["dtype"]], entry["shape"], begin + entry["data_offsets"][0]

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
        rows, columns = [range(*span.indices(size)) for span, size in zip((*part, slice(None)), (*self.shape[:2], 1))][:2]
        inner = math.prod(self.shape[2:])
        width = math.prod(self.shape[1:])  # of a whole row
        if len(part) == 1:
            spans = [(rows.start * width, len(rows) * width)]
            return self.read(spans).view(len(rows), *self.shape[1:])
        spans = [(row * width + columns.start * inner, len(columns) * inner) for row in rows]
        return self.read(spans).view(len(rows), len(columns), *self.shape[2:])


MOST_HEADER = 100_000_000  # bytes, as the format's own readers have it
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
              "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip


def safetensors_header(file: Path) -> tuple[int, dict]:
    """Where a file's data begin, and its tensors by name: {"dtype", "shape", "data_offsets"}.

    Raises InputError with the true cause where the file cannot be read, is cut off, or its header does not fit it.
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
            raise InputError(f"{file} is the pointer that Git LFS keeps in its place; download the file itself.")
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
    """Raises InputError for the first entry that does not lie where the one before it ends, or is not of its shape's size."""
    for name, entry in header.items():
        if not is_entry(entry):
            raise InputError(f"{file}: the header's entry of tensor {name} is not of the form dtype, shape, data_offsets.")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != end:
            raise InputError(f"{file}: tensor {name} begins at byte {begin} of the data, but the one before it ends at {end}.")
        needed = math.prod(entry["shape"]) * ITEM_BYTES.get(entry["dtype"], 0)
        if entry["dtype"] in ITEM_BYTES and stop - begin != needed:
            raise InputError(f"{file}: tensor {name}, {entry['dtype']} of shape {entry['shape']}, has {stop - begin} bytes, "
                             f"but takes {needed}.")  # fmt: skip
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


def fill(place: Tensor, tensor: Tensor) -> None:
    """Copies a tensor into a place of its size, or of a larger one, whose rest becomes 0."""
    if place.shape != tensor.shape:
        place.zero_()
    place[tuple(slice(size) for size in tensor.shape)].copy_(tensor)


def read_tensor(
    handle, name: str, shape: tuple[int, ...], file: Path, dtype: torch.dtype | None = None, part: tuple[slice, ...] = ()
) -> Tensor:
    """One tensor of a safetensors file, checked against its expected shape, and type (None: any of DTYPES).

    part: what to read of it (default all).
    """
    try:
        lazy = handle.get_slice(name)
        found = tuple(lazy.get_shape())
        if found == shape:
            tensor = Stored(file, name).part(part) if part else handle.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{file} has no readable tensor {name}: {error}.") from None
    if found != shape:
        raise InputError(f"{file}: tensor {name} has shape {found}, but config.json calls for {shape}.")
    if dtype is not None and tensor.dtype != dtype:
        raise InputError(f"{file}: tensor {name} is {tensor.dtype}, but its config.json calls for {dtype}.")
    if dtype is None and tensor.dtype not in DTYPES.values():
        raise InputError(f"{file}: tensor {name} is {tensor.dtype}, but weights must be bf16, fp16 or fp32.")
    return tensor


def materialise(model: Transformer, name: str, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """The parameter `name`, allocated on first use."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, leaf)
    if weight.is_meta:
        weight = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device), requires_grad=False)
        setattr(module, leaf, weight)
    return weight
