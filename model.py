"""Llama 3.1 for one sequence at the lowest latency: arguments, static KV cache, transformer.

Nothing here knows about drafts or judges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import kernels
from cli import InputError, first_line
from rope import LLAMA31_ROPE, LLAMA32_ROPE, Rope, apply_rope, rope_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAGE = 64  # on a CPU a step looks at the least multiple of this that holds what it may see
PREFILL_ROWS = {"cpu": 256, "cuda": 2048}  # that a pass over the prompt reads, a multiple of PAGE


def whole_pages(length: int) -> int:
    """The least multiple of PAGE that is not below `length`."""
    return -(-length // PAGE) * PAGE


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
        reason = first_line(error)
        raise InputError(f"--device {name} is not usable here ({reason}); cpu always is.") from None
    return device


def run_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """The type to run in: as asked for, else bf16 on a GPU and fp32 on a CPU."""
    return DTYPES[precision or ("bf16" if device.type == "cuda" else "fp32")]


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a Llama. Names follow gpt-fast; checkpoint.py reads them from `config.json`."""

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
    rope_scaling: Rope | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # of queries, keys, values and the attention's output
    mlp_bias: bool = False

    @property
    def n_params(self) -> int:
        """Number of weights; a tied LM head counts once."""
        attention = self.dim * self.head_dim * 2 * (self.n_head + self.n_kv_head)
        per_layer = attention + 3 * self.dim * self.intermediate_size + 2 * self.dim
        per_layer += self.attention_bias * (self.head_dim * (self.n_head + 2 * self.n_kv_head) + self.dim)
        per_layer += self.mlp_bias * (2 * self.intermediate_size + self.dim)
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layer * per_layer + embeddings + self.dim

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes of a KV cache for `length` positions."""
        return 2 * self.n_layer * self.n_kv_head * self.head_dim * length * dtype.itemsize

    def step_bytes(self, length: int, dtype: torch.dtype, rows: int = 1) -> int:
        """Bytes that a step of `rows` rows reads at position `length`: weights and the cache so far."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.dim
        weights = self.n_params - embedding + rows * self.dim  # of an embedding alone, the rows' own
        return weights * dtype.itemsize + self.cache_bytes(length, dtype)


SMALL, LARGE = {"rope_scaling": LLAMA32_ROPE, "tie_embeddings": True}, {"rope_scaling": LLAMA31_ROPE}
PRESETS = {  # published shapes, for benchmarks with random weights
    "Llama-3.2-1B": ModelArgs(2048, 16, 32, 8, 8192, 128256, 64, **SMALL),
    "Llama-3.2-3B": ModelArgs(3072, 28, 24, 8, 8192, 128256, 128, **SMALL),
    "Llama-3.1-8B": ModelArgs(4096, 32, 32, 8, 14336, 128256, 128, **LARGE),
    "Llama-3.1-70B": ModelArgs(8192, 80, 64, 8, 28672, 128256, 128, **LARGE),
    "Llama-3.1-405B": ModelArgs(16384, 126, 128, 8, 53248, 128256, 128, **LARGE),
}


def preset(name: str) -> ModelArgs:
    """A published Llama by name. Raises InputError with the names known."""
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}; known are {', '.join(PRESETS)}.")
    return PRESETS[name]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Linear(nn.Linear):
    """A product by the fastest kernel for its rows; norm: of x, which it may fuse."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias=bias)
        self.wide = False  # as `kernels.linear` has it

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        y = kernels.linear(x, self.weight, self.wide, norm)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.wqkv = Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim, args.attention_bias)
        self.wo = Linear(args.n_head * args.head_dim, args.dim, args.attention_bias)
        self.k_cache = self.v_cache = None  # (1, n_kv_head, length, head_dim) each, made by setup_caches

    def forward(
        self, x: Tensor, norm: RMSNorm, rope: Tensor, pos: Tensor | None, mask: Tensor | None, visible: int
    ) -> Tensor:
        """x (B, T, dim) before `norm`, rope (T, 2, head_dim / 2), pos (T,) or None, mask by `see` -> as x."""
        a, qkv, (batch, rows, _) = self.args, self.wqkv(x, norm), x.shape
        if pos is not None and mask is None:  # a step on a GPU; rope is the whole table
            return self.wo(kernels.attend(qkv[0], rope, pos, self.k_cache, self.v_cache))
        q, k, v = qkv.view(batch, rows, -1, a.head_dim).split([a.n_head, a.n_kv_head, a.n_kv_head], dim=2)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if pos is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            self.k_cache[:, :, pos] = k.transpose(1, 2)
            self.v_cache[:, :, pos] = v.transpose(1, 2)
            y = self.attend(q, pos, mask, visible)
        return self.wo(y.reshape(batch, rows, -1))

    def attend(self, q: Tensor, pos: Tensor, mask: Tensor | None, visible: int) -> Tensor:
        """q (1, T, n_head, head_dim) over the caches -> the same shape."""
        a, rows = self.args, q.shape[1]
        k, v = self.k_cache[:, :, :visible], self.v_cache[:, :, :visible]
        if use_heads_as_rows(q):
            y = F.scaled_dot_product_attention(heads_as_rows(q, a.n_kv_head), k, v, attn_mask=mask)
            return y.view(1, a.n_kv_head, -1, rows, a.head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def causal_mask(pos: Tensor, visible: int, dtype: torch.dtype) -> Tensor:
    """(T, visible): 0 where row t, at position pos[t], may look, -inf elsewhere."""
    hidden = torch.arange(visible, device=pos.device) > pos[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=pos.device).masked_fill(hidden, -float("inf"))


def heads_as_rows(q: Tensor, n_kv_head: int) -> Tensor:
    """(1, T, n_head, D) -> (1, n_kv_head, group * T, D): row r is head r // T of its group, token r % T."""
    _, rows, _, d = q.shape
    return q.view(1, rows, n_kv_head, -1, d).permute(0, 2, 3, 1, 4).reshape(1, n_kv_head, -1, d)


def use_heads_as_rows(q: Tensor) -> bool:
    """Whether a KV head's query heads become further rows of q (1, T, ...), so that its cache is read once.

    Measured with PyTorch's attention on a CPU (benchmarks/attention_bf16.md, attention_fp32.md): it pays for
    single rows, and in fp32 for those of a verification.
    """
    rows = q.shape[1]
    return q.device.type == "cpu" and rows <= (kernels.MOST_ROWS if q.dtype == torch.float32 else 2)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.intermediate_size, args.mlp_bias)  # gate and up in one product
        self.w2 = Linear(args.intermediate_size, args.dim, args.mlp_bias)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = self.w13(x, norm).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, *where) -> Tensor:
        """x (B, T, dim), where: what `Attention.forward` takes beside it -> (B, T, dim)."""
        x = x + self.attention(x, self.attention_norm, *where)
        return x + self.feed_forward(x, self.ffn_norm)


class Transformer(nn.Module):
    """A Llama. Without caches it reads whole sequences (training), after `setup_caches` it decodes one.

    local: the shape of the weights held here, where they are a part of the model (tp.py); default: all of it.
    """

    def __init__(self, args: ModelArgs, local: ModelArgs | None = None):
        super().__init__()
        self.args, self.local = args, local or args
        self.tok_embeddings = nn.Embedding(self.local.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(self.local) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, self.local.vocab_size)
        self.output.wide = True
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.fingerprint = ""  # of the weights on disk, set by load_model: tells checkpoints apart
        self.quantization = ""  # how they are quantised, set by quantize.py
        self.bytes_read = 0  # from disk, while loading
        self.speaks = (
            args.vocab_size
        )  # tokens that logits are of: a draft's are fitted to its target's (pair.py)
        self.rope: Tensor | None = None  # (length, 2, head_dim / 2) fp32
        self.cache_length = self.cache_epoch = 0  # epoch: graphs captured over an older cache must not run

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    def setup_caches(self, length: int) -> None:
        """Allocates KV caches and the RoPE table for `length` positions, unless there are longer ones."""
        cache, kind = self.layers[0].attention.k_cache, (self.dtype, self.device)
        if cache is not None and cache.shape[2] >= length and (cache.dtype, cache.device) == kind:
            return
        self.cache_length, self.cache_epoch = length, self.cache_epoch + 1
        self.rope = rope_table(self.args, length, self.device)
        shape = (1, self.local.n_kv_head, length, self.local.head_dim)
        for layer in self.layers:
            layer.attention.k_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
            layer.attention.v_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()  # they may have been made in it, and are then changed only in it
    def clear_caches(self) -> None:
        for layer in self.layers:
            layer.attention.k_cache.zero_()
            layer.attention.v_cache.zero_()

    def forward(
        self, tokens: Tensor, pos: Tensor | None = None, visible: int | None = None,
        n_logits: int | None = None, prefill: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Reads tokens, returns (hidden, logits).

        tokens: (B, T) ids. pos: (T,) their ascending positions in the cache (B = 1), or None to read whole
        sequences without one. visible: cache positions below it are seen (at least max(pos) + 1; default:
        all). prefill: the rows are many, and the last of the visible. hidden: (B, T, dim), the last layer's
        output before the final norm. logits: (B, n_logits, vocab) in fp32, for the last n_logits rows
        (default all; 0 skips the LM head); of a part of a model only its part of the vocabulary.
        """
        visible = self.cache_length if visible is None else visible
        own = self.args.vocab_size
        x = self.tok_embeddings(tokens if self.speaks == own else tokens.clamp(max=own - 1))
        if pos is None:
            rope, mask = rope_table(self.args, tokens.shape[1], tokens.device), None
        else:
            mask = self.see(x, pos, visible, prefill)
            rope = self.rope if mask is None else self.rope[pos]
        for layer in self.layers:
            x = layer(x, rope, pos, mask, visible)
        rows = x if n_logits is None else x[:, x.shape[1] - n_logits :]
        logits = self.output(rows, self.norm).float()
        return x, logits if self.speaks == own else fitted(logits, self.speaks)

    def see(self, x: Tensor, pos: Tensor, visible: int, prefill: bool = False) -> Tensor | None:
        """0 or -inf, added to attention scores: (T, visible), or (group * T, visible) for `heads_as_rows`.

        On a GPU nothing of that size is made: the decoding kernel needs none, and a prefill has a diagonal.
        """
        if x.device.type == "cuda":
            return causal_lower_right(len(pos), visible) if prefill else None
        mask = causal_mask(pos, visible, x.dtype)
        return mask.repeat(self.local.n_head // self.local.n_kv_head, 1) if use_heads_as_rows(x) else mask


def fitted(logits: Tensor, size: int) -> Tensor:
    """Logits (..., V) of `size` tokens: cut, or filled up with what has no chance in fp32 (no infinity, so
    that a divergence from another model's stays a number)."""
    missing = size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :size]
    least = logits.amax(-1, keepdim=True) - 120
    return torch.cat([logits, least.expand(*logits.shape[:-1], missing)], -1)


def random_model(
    args: ModelArgs, device: str | torch.device, dtype: torch.dtype, seed: int = 0,
    complete: Callable[[Transformer, str], None] | None = None,
) -> Transformer:  # fmt: skip
    """A model with random weights, made layer by layer: memory never holds more than the model.

    complete: called with the model and each parameter's name once that is filled; it may replace it.
    """
    model = empty_model(args)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name in [name for name, _ in model.named_parameters()]:
        fresh = materialise(model, name, dtype, device)
        norm = fresh.dim() == 1 and not name.endswith("bias")
        fresh.fill_(1.0) if norm else fresh.normal_(0, 0.02, generator=generator)
        if complete is not None:
            complete(model, name)
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def empty_model(args: ModelArgs, local: ModelArgs | None = None) -> Transformer:
    """The module tree without memory, on the meta device."""
    with torch.device("meta"):
        return Transformer(args, local)


def materialise(model: Transformer, name: str, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """The parameter `name`, allocated on first use."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, leaf)
    if weight.is_meta:
        weight = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device), requires_grad=False)
        setattr(module, leaf, weight)
    return weight


def first_not_finite(model: Transformer, ids: list[int]) -> str:
    """A clause: the weights, or the first module's output as `ids` are read, that are not finite."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.float().isfinite().all():
            return f"the weight {name} holds NaN or infinity"
    found = []

    def look(name: str, _: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        numbers = output[0] if isinstance(output, tuple) else output
        if not found and not numbers.isfinite().all():
            row = int((~numbers.isfinite()).flatten(2).any(-1)[0].nonzero()[0])
            largest = inputs[0].abs().amax().item() if inputs[0].is_floating_point() else 0
            found.append(f"first the output of {name} at position {row} (its input reaches {largest:.3g})")

    handles = [x.register_forward_hook(partial(look, name)) for name, x in model.named_modules() if name]
    try:
        with torch.inference_mode():
            model(torch.tensor([ids], device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "a pass over the whole text in eager code does not show it"
