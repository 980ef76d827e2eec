"""The bytes that a pair of models takes, by what they are for: before it is loaded, and before GPUs are
rented.

What this code allocates is counted. What CUDA takes for itself is assumed, until a GPU has been measured.
"""

import torch

from model import PREFILL_ROWS, ModelArgs
from quantize import Scheme, packing_bytes, slice_bytes, weight_bytes

CONTEXT = 0.5e9  # of a process on a GPU
LIBRARIES = 0.5e9  # code of cuBLAS, Triton and Inductor on the GPU, and cuBLAS's work space
COLLECTIVES = 0.5e9  # NCCL's buffers
NODE = 10e3  # of a launch in a captured graph
LAUNCHES = 10  # of a layer in a step, as gpus.KERNELS has them at most
PROGRAMS = 296  # two for each multiprocessor of the largest GPU: what attention is cut into


def activation_bytes(args: ModelArgs, rows: int, dtype: torch.dtype) -> int:
    """The most that a forward of so many rows holds at once beside caches and logits: in a norm, in RoPE or
    between the products of a feed-forward, whichever is largest."""
    b, q, kv = dtype.itemsize, args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    norm = args.dim * (3 * b + 8)  # x, it in fp32, its square, the results
    rope = 2 * args.dim * b + (q + 2 * kv) * b + 12 * q  # in fp32: q, halves and their products
    feed_forward = 2 * args.dim * b + 4 * args.intermediate_size * b  # gate and up, SiLU, the product
    return rows * max(norm, rope, feed_forward)


def attention_bytes(args: ModelArgs, rows: int, capacity: int, dtype: torch.dtype, device: str) -> int:
    """What attention makes: on a CPU a mask of all positions, on a GPU the parts before they are joined, in
    fp32 with their peaks and sums."""
    if device == "cpu":
        return rows * capacity * (1 + 2 * dtype.itemsize)
    blocks = -(
        -(args.n_head // args.n_kv_head * rows) // 128
    )  # of a KV head's rows, as kernels.attend has it
    parts = max(1, PROGRAMS // (args.n_kv_head * blocks))
    return 4 * parts * args.n_head * rows * (args.head_dim + 2) if rows <= 64 else 0


def memory_terms(
    models: list[ModelArgs],
    schemes: list[Scheme | None],
    dtype: torch.dtype,
    device: str,
    *,
    capacity: int,
    speculate_k: int,
    world: int = 1,
) -> dict[str, float]:
    """Bytes of a rank by what they are for. Their sum is the peak.

    models: the target and, where there is one, the draft, each this rank's part of it. device: cpu or cuda.
    capacity: positions of the caches. world: ranks.
    """
    pairs, m = list(zip(models, schemes)), speculate_k
    vocabulary = models[0].vocab_size * world  # gathered, if a rule or sampling needs probabilities

    def reading(args: ModelArgs, rows: int) -> int:
        attention = attention_bytes(args, rows, capacity, dtype, device)
        return activation_bytes(args, rows, dtype) + attention

    rows = min(PREFILL_ROWS[device], capacity or PREFILL_ROWS[device])
    prompts = max(reading(args, rows) + slice_bytes(args, dtype, scheme, rows) for args, scheme in pairs)
    logits = (m + 1) * vocabulary * (dtype.itemsize + 4)  # as the LM head gives them, and in fp32
    nodes = LAUNCHES * (models[0].n_layer + m * sum(args.n_layer for args in models[1:]))
    on_gpu = float(device == "cuda")
    terms = {
        "weights": sum(weight_bytes(args, dtype, scheme) for args, scheme in pairs),
        "caches": sum(args.cache_bytes(capacity, dtype) for args in models),
        "buffers": capacity * (8 + 4 * sum(args.head_dim for args in models)) + 4 * m * vocabulary,
        "prompts": prompts,
        "verification": reading(models[0], m + 1) + logits,
        "graphs": on_gpu * NODE * nodes,
        "libraries": on_gpu * LIBRARIES,
        "collectives": on_gpu * COLLECTIVES * (world > 1),
        "context": on_gpu * CONTEXT,
    }
    used = sum(terms.values()) - terms["weights"] - terms["context"]
    return terms | {"loading": max(0.0, loading_bytes(pairs, dtype, device) - used)}


def loading_bytes(pairs: list[tuple[ModelArgs, Scheme | None]], dtype: torch.dtype, device: str) -> int:
    """What loading one model after the other takes beyond the weights of all."""
    later, most = 0, 0
    for args, scheme in reversed(pairs):
        most = max(most, packing_bytes(args, dtype, scheme, device) - later)
        later += weight_bytes(args, dtype, scheme)
    return most


def in_words(terms: dict[str, float]) -> str:
    """The terms that a person would miss, and their sum."""
    shown = {name: size for name, size in terms.items() if size >= 5e7 or name in ("weights", "caches")}
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in shown.items())
    return f"{parts}: {sum(terms.values()) / 1e9:.1f} GB"
