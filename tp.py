"""Tensor parallel: one model over several GPUs or machines, one process (rank) for each, started by torchrun.

    torchrun --standalone --nproc_per_node 8 generate.py --checkpoint_path DIR ...

Every rank runs the whole program on its slice of the weights. Fused QKV is cut by KV head (where there are
fewer than ranks, several hold the same one and share its query heads), gate and up by rows, `wo` and `w2` by
columns, so that a layer needs two all-reduces; embedding and LM head are cut by vocabulary, norms not at all.
What does not divide is filled up with zeros. After each all-reduce all ranks hold the same hidden state.
"""

import argparse
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import cli
import kernels
from cli import InputError
from model import ModelArgs, Transformer

START = 50  # seconds within which all ranks must have met
PATIENCE = timedelta(seconds=300)  # for a rank that stands still; one that dies is noticed at once
SMALL, MEDIUM = 256 * 1024, 8 * 1024 * 1024  # bytes that a symmetric all-reduce takes in one shot, and in two
COLLECTIVE = ("gloo", "NCCL", "onitoredBarrier")  # words of an error that says that another rank is gone


@dataclass(frozen=True)
class Shard:
    """Which part of every weight one rank holds."""

    rank: int
    world: int

    def local(self, args: ModelArgs) -> ModelArgs:
        """The shape of a rank's part, the same on all. Raises InputError naming what does not divide."""
        n, heads, kv, wide = self.world, args.n_head, args.n_kv_head, args.intermediate_size
        if kv % n and n % kv:
            raise InputError(f"{n} ranks cannot share {kv} KV heads: one must be a multiple of the other.")
        if n > heads:
            raise InputError(f"{n} ranks cannot share {heads} attention heads; start fewer.")
        if wide % n:
            raise InputError(f"{n} ranks cannot share an intermediate size of {wide}: it must be a multiple.")
        heads = heads // n if n <= kv else -(-heads // kv // (n // kv))
        return replace(args, n_head=heads, n_kv_head=max(1, kv // n), intermediate_size=wide // n,
                       vocab_size=-(-args.vocab_size // n))  # fmt: skip

    def heads(self, args: ModelArgs) -> tuple[int, int]:
        """First and one past the last query head. Ranks that share a KV head share its query heads."""
        group, sharing = args.n_head // args.n_kv_head, max(1, self.world // args.n_kv_head)
        first, end = (head * group for head in self.kv_heads(args))
        local = self.local(args).n_head
        start = first + self.rank % sharing * local
        return min(start, end), min(start + local, end)

    def kv_heads(self, args: ModelArgs) -> tuple[int, int]:
        start = self.rank * args.n_kv_head // self.world
        return start, start + max(1, args.n_kv_head // self.world)

    def vocabulary(self, args: ModelArgs) -> tuple[int, int]:
        """First and one past the last token; the last ranks may have fewer than the others, or none."""
        each = self.local(args).vocab_size
        return min(self.rank * each, args.vocab_size), min(self.rank * each + each, args.vocab_size)

    def part(self, args: ModelArgs, row) -> tuple[slice, ...]:
        """The slices that this rank reads of a tensor of checkpoint.weight_plan; () for all of it."""
        if row.cut is None:
            return ()
        wide = args.head_dim if row.unit in ("heads", "kv_heads") else 1
        span = (wide * end for end in getattr(self, row.unit)(args))
        return (slice(None), slice(*span)) if row.cut == "columns" else (slice(*span),)

    def intermediate(self, args: ModelArgs) -> tuple[int, int]:
        each = args.intermediate_size // self.world
        return self.rank * each, self.rank * each + each

    def largest(self, rows: Tensor) -> Tensor:
        """The largest of every rank's value, one by one: scales of a row whose columns the ranks share."""
        return ops.wait_tensor(ops.all_reduce(rows, "max", GROUP))


# The collectives. Functional ones, so that they stay inside the compiled steps and the captured graphs.
#
# Each rank tunes its kernels by time, so that its norms and products may round unlike another's. The residual
# stream is the same on all: nothing is added to it but all-reduced sums. So are gathered logits and their
# argmax. What a rank sums up from these (a score, a probability, a sample) is not, nor is a draft that each
# rank runs by itself. There rank 0 decides, by `broadcast`: ranks that go on from other tokens part for good.

GROUP = ""  # the name of their process group, set by `connect`
RANK = 0
SYMMETRIC: dict[torch.dtype, Tensor] = {}  # buffers that all ranks see, with --all_reduce symmetric
ops = torch.ops._c10d_functional


def all_reduce(x: Tensor) -> Tensor:
    """The sum of every rank's x, the same bits on every rank."""
    if x.dtype in SYMMETRIC and x.nbytes <= MEDIUM:
        return symmetric_all_reduce(x)
    return ops.wait_tensor(ops.all_reduce(x, "sum", GROUP))


def all_gather(x: Tensor) -> Tensor:
    """x (...) of every rank -> (world, ...)."""
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous()[None], dist.get_world_size(), GROUP))


def broadcast(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Rank 0's vectors (of one type), in one message; without ranks these here, and no operation."""
    if not GROUP:
        return vectors
    theirs = ops.wait_tensor(ops.broadcast(torch.cat(vectors), 0, GROUP))
    return theirs.split([len(vector) for vector in vectors])


def divided(model: Transformer) -> bool:
    """Whether this rank holds only a part of the model."""
    return model.local.vocab_size < model.args.vocab_size


@torch.library.custom_op("judge_fast::symmetric_all_reduce", mutates_args=())
def symmetric_all_reduce(x: Tensor) -> Tensor:
    """`all_reduce` over NVLink by reading the other ranks' memory: a launch and one (or two) exchanges.

    In one shot every rank adds in the order of ranks; in two each number is added up by one rank.
    """
    part = SYMMETRIC[x.dtype][: x.numel()].copy_(x.reshape(-1))
    if x.nbytes <= SMALL:
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", GROUP).view(x.shape)
    return torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", GROUP).clone().view(x.shape)


symmetric_all_reduce.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))


class VocabEmbedding(nn.Module):
    """An embedding of which this rank holds the tokens from `start` to `stop`."""

    def __init__(self, weight: Tensor, start: int, stop: int):
        super().__init__()
        self.weight, self.start, self.stop = weight, start, stop

    def forward(self, tokens: Tensor) -> Tensor:
        inside = (tokens >= self.start) & (tokens < self.stop)
        rows = F.embedding((tokens - self.start).clamp(0, len(self.weight) - 1), self.weight)
        return all_reduce(rows.masked_fill(~inside[..., None], 0))  # one summand is not 0: the sum is exact


def join(model: Transformer, shard: Shard) -> Transformer:
    """Puts the collectives into a model of which this rank holds a part."""
    model.tok_embeddings = VocabEmbedding(model.tok_embeddings.weight, *shard.vocabulary(model.args))
    for layer in model.layers:
        for product in (layer.attention.wo, layer.feed_forward.w2):  # the ranks share its columns
            product.bias = None if shard.rank else product.bias  # added once
            product.register_forward_hook(lambda product, inputs, summand: all_reduce(summand))
    return model


def whole(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits (T, vocab_size), from all ranks' parts of them; as they are where they are no parts."""
    if logits.shape[-1] == vocab_size:
        return logits
    return all_gather(logits).transpose(0, 1).flatten(1)[:, :vocab_size]


def most_likely(logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The argmax (T,), the lowest of equals, and its logit (T,) (NaN if any of the row is), from whole logits
    (T, vocab_size) or this rank's part of them."""
    if logits.shape[-1] == vocab_size:
        return kernels.largest(logits)[::-1]
    tokens = torch.arange(logits.shape[-1], device=logits.device) + RANK * logits.shape[-1]
    value, index = kernels.largest(logits.masked_fill(tokens >= vocab_size, -float("inf")))  # filled up
    pairs = all_gather(torch.stack([value.double(), tokens[index].double()], -1))  # fp64 holds both
    best = pairs[..., 0].argmax(0, keepdim=True)
    peak, index = pairs.gather(0, best[..., None].expand(1, -1, 2))[0].unbind(-1)
    return index.long(), peak


# What ranks tell one another beside that, by gloo and torchrun's store

HOST: dist.ProcessGroup | None = None  # waits for rank 0 as long as rank 0 waits for a person
STORE: dist.Store | None = None


@contextmanager
def ranks(name: str):
    """Around a script's body: under torchrun the ranks meet, only rank 0 prints, and all end together.

    Whatever ends one rank ends all, with one sentence from rank 0 and exit code 2. torchrun notices a dead
    rank; where ranks were started by hand, the next collective does. Without torchrun this does nothing.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield
        return
    cli.run_script(name, lambda: meet(*check_environment()))
    signal.signal(signal.SIGTERM, lambda *_: end(name))  # from torchrun, when a rank has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but in the body; torchrun passes Ctrl-C on again
    try:
        yield
        dist.monitored_barrier(timeout=PATIENCE)  # nobody goes before all have done
    except SystemExit as stop:
        if not stop.code:
            raise
        said = sys.stderr.getvalue().splitlines() if RANK and stop.code == 2 else []
        end(name, said[-1] if said else "", stop.code)
    except KeyboardInterrupt:  # the second one
        end(name, "", 130)
    except Exception as error:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in COLLECTIVE):
            end(name)
        traceback.print_exc()
        get_error_handler().record_exception(error)  # torchrun prints it
        end(name, f"{name}: On rank {RANK} {type(error).__name__}: {cli.first_line(error)}.")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.destroy_process_group()


def check_environment() -> tuple[int, int]:
    """Rank and world size as torchrun sets them. Raises InputError naming a variable that is wrong."""
    if not os.environ.get("MASTER_ADDR"):
        raise InputError("MASTER_ADDR is not in a rank's environment; start ranks by torchrun.")
    os.environ.setdefault("LOCAL_RANK", "0")  # ranks that were started by hand may lack it
    found = {}
    for name, low in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("MASTER_PORT", 0)):
        try:
            found[name] = cli.whole(low, 65535)(os.environ.get(name, ""))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{name}={error} in a rank's environment; start ranks by torchrun.") from None
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise InputError("RANK={RANK} must be below WORLD_SIZE={WORLD_SIZE}; see torchrun.".format(**found))
    return found["RANK"], found["WORLD_SIZE"]


def meet(rank: int, world: int) -> None:
    """Connects the ranks and silences all but rank 0. Raises InputError where they cannot meet."""
    global HOST, STORE, RANK
    if rank:
        aloud = os.fdopen(os.dup(2), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print from C++
        sys.stdout, sys.stderr, sys.__stderr__ = open(os.devnull, "w"), io.StringIO(), aloud  # noqa: SIM115
    signal.alarm(2 * START)  # ends a rank whose call a stranger takes
    try:
        STORE = next(dist.rendezvous("env://", timeout=timedelta(seconds=START)))[0]
        dist.init_process_group("gloo", store=STORE, rank=rank, world_size=world, timeout=PATIENCE)
        HOST, RANK = dist.new_group(backend="gloo", timeout=timedelta(days=30)), rank
    except RuntimeError as error:
        where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        raise InputError(f"The ranks cannot meet at {where}: {cli.first_line(error)}.") from None
    finally:
        signal.alarm(0)
    # Two ranks that compile the same at once would read half a file
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/rank{os.environ['LOCAL_RANK']}"


def end(name: str, mistake: str | None = None, code: int = 2) -> None:
    """Ends this rank, and lets no other wait for it. One says why: rank 0, unless that is gone or hangs.

    mistake: this rank's own, which rank 0 has printed by now; None where another rank has ended.
    """
    global HOST
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends it while this waits for the others
        signal.signal(number, signal.SIG_IGN)
    HOST, left = None, [f"left/{rank}" for rank in range(dist.get_world_size())]
    why = mistake or (f"{name}: Rank 0 died." if RANK == 1 else "")
    with suppress(RuntimeError):  # where the store is gone, with rank 0
        if RANK == 0 and mistake is not None:
            STORE.set("said", "already")
        STORE.set(left[RANK], mistake or "")
        if not torch.cuda.is_initialized():  # NCCL would wait for the others
            dist.destroy_process_group()
        deadline = time.monotonic() + (4 if RANK else 2)
        while not STORE.check(["said"] if RANK else left) and time.monotonic() < deadline:
            time.sleep(0.02)
        said = {key: STORE.get(key).decode() for key in left if STORE.check([key])}
        dead = ", ".join(key.removeprefix("left/") for key in left if key not in said)
        what = f"Rank {dead} died, or does not answer." if dead else "The ranks were told to end."
        speaks = STORE.compare_set("said", "", str(RANK)) == str(RANK).encode()
        why = next(filter(None, said.values()), f"{name}: {what}") if speaks else ""
    if why:
        print("\n" * cli.Progress.line_is_open + why, file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    time.sleep(0 if RANK else 0.2)  # for the others to hear it, where the store is this rank's
    os._exit(code)


def shard() -> Shard | None:
    """This rank's shard, None without torchrun."""
    return Shard(RANK, dist.get_world_size()) if dist.is_initialized() else None


def first(action: Callable):
    """What `action` returns on rank 0, on every rank; only rank 0 runs it."""
    found = [action() if RANK == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, group=HOST)
    return found[0]


def connect(device: torch.device, way: str | None) -> None:
    """Makes the collectives' group, gloo's or NCCL's; way: --all_reduce. Raises InputError if it has none."""
    global GROUP
    if not dist.is_initialized() or GROUP:
        return
    if way is not None and device.type == "cpu":
        raise InputError(f"--all_reduce {way} needs GPUs; on a CPU it is gloo's, leave the flag out.")
    backend, bound = ("gloo", {}) if device.type == "cpu" else ("nccl", {"device_id": device})
    try:
        GROUP = dist.new_group(backend=backend, timeout=PATIENCE, **bound).group_name
        if way == "symmetric":
            import torch.distributed._symmetric_memory as symmetric

            for dtype in (torch.bfloat16, torch.float32):
                SYMMETRIC[dtype] = symmetric.empty(MEDIUM // dtype.itemsize, dtype=dtype, device=device)
                symmetric.rendezvous(SYMMETRIC[dtype], GROUP)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"--all_reduce {way or 'nccl'} fails here: {cli.first_line(error)}.") from None
    print(f"{dist.get_world_size()} ranks by {backend}; all-reduce: {way or backend}", file=sys.stderr)
