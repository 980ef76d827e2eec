"""Tensor parallel: one model over several GPUs or machines, one process (rank) for each, started by torchrun.

    torchrun --standalone --nproc_per_node 8 generate.py --checkpoint_path DIR --draft_checkpoint_path DIR2
    ... torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id 1 --rdzv_endpoint HOST:29500
    generate.py ...

Every rank runs the whole program on its slice of the weights. Fused QKV is cut by KV head (several ranks hold
the same one where there are fewer than ranks, and share its query heads), gate and up by rows, `wo` and `w2`
by columns, so that a layer needs two all-reduces; embedding and LM head are cut by vocabulary. Norms are
whole everywhere. What does not divide among the query heads of a KV head, or in the vocabulary, is filled up
with zeros.

Traffic of one forward of T rows of a model of L layers, in numbers of `itemsize` bytes: 2 L + 1 all-reduces
of T dim (attention, feed-forward; the embedding), and one all-gather for the logits, by every rank: of T
pairs (value, index) of 16 bytes where only the most likely token counts (`plain`, `standard` and `judge`,
greedy), of T ceil(vocabulary / ranks) fp32 logits where a rule or sampling needs probabilities. A round of M
draft tokens is a forward of M + 1 rows of the target and, of a draft that is sharded as well, one of 2 rows
(1 of them with logits) and M - 1 of one. For Llama-3.1-70B, M = 16 and 8 ranks in bf16: 161 all-reduces of
279 KB; gathering logits costs 1.1 MB a rank where pairs cost 272 bytes. `traffic` computes it, a test counts
it.

The hidden state is the same on every rank after each all-reduce, and with it judge scores, decisions and
tokens. Sampling draws from the same host generator everywhere.
"""

import argparse
import hashlib
import io
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import cli
from cli import InputError
from model import ModelArgs, Transformer

START = 50  # seconds within which all ranks must have met
PATIENCE = timedelta(
    seconds=300
)  # for a collective; a rank that dies is noticed at once, one that stands still by this
SMALL, MEDIUM = (
    256 * 1024,
    8 * 1024 * 1024,
)  # bytes up to which the symmetric all-reduce takes one shot, and two
MISSED = {
    "cpu": 2**20,
    "cuda": 32 * 2**20,
}  # bytes that could be read in the time of an all-reduce (see `place_draft`)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Shard:
    """Which part of every weight one rank holds."""

    rank: int
    world: int

    def local(self, args: ModelArgs) -> ModelArgs:
        """The shape of this rank's part, the same on every rank. Raises InputError naming what does not
        divide."""
        n, kv = self.world, args.n_kv_head
        if kv % n and n % kv:
            raise InputError(
                f"{n} ranks cannot share {kv} KV heads: one number must be a multiple of the other."
            )
        if n > args.n_head:
            raise InputError(f"{n} ranks cannot share {args.n_head} attention heads; start fewer.")
        if args.intermediate_size % n:
            raise InputError(
                f"{n} ranks cannot share an intermediate size of {args.intermediate_size}: it must be a "
                f"multiple."
            )
        heads = args.n_head // n if n <= kv else ceil_div(args.n_head // kv, n // kv)
        return replace(
            args,
            n_head=heads,
            n_kv_head=max(1, kv // n),
            intermediate_size=args.intermediate_size // n,
            vocab_size=ceil_div(args.vocab_size, n),
        )

    def heads(self, args: ModelArgs) -> tuple[int, int]:
        """First and one past the last query head. Ranks that share a KV head share its query heads."""
        local = self.local(args).n_head
        if self.world <= args.n_kv_head:
            return self.rank * local, self.rank * local + local
        sharing, group = self.world // args.n_kv_head, args.n_head // args.n_kv_head
        end = (self.rank // sharing + 1) * group
        start = end - group + self.rank % sharing * local
        return min(start, end), min(start + local, end)

    def kv_heads(self, args: ModelArgs) -> tuple[int, int]:
        start = self.rank * args.n_kv_head // self.world
        return start, start + max(1, args.n_kv_head // self.world)

    def vocabulary(self, args: ModelArgs) -> tuple[int, int]:
        """First and one past the last token; the last ranks may have fewer than the others, or none."""
        each = ceil_div(args.vocab_size, self.world)
        return min(self.rank * each, args.vocab_size), min(self.rank * each + each, args.vocab_size)

    def part(self, args: ModelArgs, row) -> tuple[slice, ...]:
        """The slices that this rank reads of a tensor of checkpoint.weight_plan; () for all of it."""
        if row.cut is None:
            return ()
        each = args.intermediate_size // self.world
        spans = {
            "heads": [head * args.head_dim for head in self.heads(args)],
            "kv_heads": [head * args.head_dim for head in self.kv_heads(args)],
            "intermediate": (self.rank * each, self.rank * each + each),
            "vocabulary": self.vocabulary(args),
        }
        span = slice(*spans[row.unit])
        return (slice(None), span) if row.cut == "columns" else (span,)

    def largest(self, rows: Tensor) -> Tensor:
        """The largest of every rank's value, element by element: scales of a row whose columns the ranks
        share."""
        return torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(rows, "max", GROUP)
        )


def traffic(
    args: ModelArgs, rows: int, world: int, itemsize: int, logit_rows: int, gather: bool
) -> dict[str, int]:
    """Collectives of one forward as the file's docstring has them: counts, and bytes that each rank puts
    in."""
    each = 4 * ceil_div(args.vocab_size, world) if gather else 16
    reduces = 2 * args.n_layer + 1
    return {
        "all_reduces": reduces,
        "reduced_bytes": reduces * rows * args.dim * itemsize,
        "gathers": int(logit_rows > 0 and world > 1),
        "gathered_bytes": logit_rows * each if world > 1 else 0,
    }


def place_draft(args: ModelArgs, step_bytes: int, world: int, device: str) -> str:
    """Whether to `shard` a draft or to `replicate` it, when the command line does not say.

    Replicated, a draft step reads step_bytes a rank and talks to nobody. Sharded, it reads step_bytes /
    world, and waits for 2 L + 1 all-reduces and one all-gather. So sharding pays when step_bytes (1 - 1 /
    world) exceeds 2 L + 2 times the bytes that a device could have read in the time of one collective. That
    is MISSED: some 10 us at 3.35 TB/s on a GPU, some 100 us at 10 GB/s on a CPU; assumed, not measured.
    Llama-3.1-8B in int8 (8.0 GB, 66 collectives, 2.2 GB) is sharded at any world size; Llama-3.2-1B in bf16
    (2.5 GB, 34 collectives, 1.1 GB), too; in int4 (1.0 GB) it is replicated. A draft that does not divide is
    replicated.
    """
    try:
        Shard(0, world).local(args)
    except InputError:
        return "replicate"
    return "shard" if step_bytes * (1 - 1 / world) > (2 * args.n_layer + 2) * MISSED[device] else "replicate"


# The collectives. Functional ones, so that they stay inside the compiled steps and the captured graphs.

GROUP = ""  # the name of the process group, set by `connect`
RANK = 0
SYMMETRIC: dict[
    torch.dtype, Tensor
] = {}  # buffers that all ranks of a machine see, with --all_reduce symmetric


def all_reduce(x: Tensor) -> Tensor:
    """The sum of every rank's x, the same bits on every rank."""
    if x.dtype in SYMMETRIC and x.nbytes <= MEDIUM:
        return symmetric_all_reduce(x)
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", GROUP))


def all_gather(x: Tensor) -> Tensor:
    """x (...) of every rank -> (world, ...)."""
    world = dist.get_world_size()
    whole = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], world, GROUP)
    return torch.ops._c10d_functional.wait_tensor(whole)


@torch.library.custom_op("judge_fast::symmetric_all_reduce", mutates_args=())
def symmetric_all_reduce(x: Tensor) -> Tensor:
    """`all_reduce` over NVLink by reading the other ranks' memory: for small messages a launch and one (or
    two) exchanges."""
    part = SYMMETRIC[x.dtype][: x.numel()]
    part.copy_(x.reshape(-1))
    if x.nbytes <= SMALL:
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", GROUP).view(x.shape)
    return torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", GROUP).clone().view(x.shape)


@symmetric_all_reduce.register_fake
def symmetric_shape(x: Tensor) -> Tensor:
    """What `symmetric_all_reduce` returns, uninitialised."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Reduced(nn.Module):
    """A product whose columns the ranks share: each has a summand of the result."""

    def __init__(self, product: nn.Module):
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(self.product(x))


class VocabEmbedding(nn.Module):
    """An embedding of which this rank holds the tokens from `start` to `stop`."""

    def __init__(self, weight: Tensor, start: int, stop: int):
        super().__init__()
        self.weight, self.start, self.stop = weight, start, stop

    def forward(self, tokens: Tensor) -> Tensor:
        inside = (tokens >= self.start) & (tokens < self.stop)
        rows = F.embedding((tokens - self.start).clamp(0, len(self.weight) - 1), self.weight)
        return all_reduce(rows.masked_fill(~inside[..., None], 0))  # one summand is not 0: the sum is exact


class VocabHead(nn.Module):
    """An LM head of which this rank holds `count` tokens; what fills its part up can never be the most likely
    one."""

    def __init__(self, product: nn.Module, count: int):
        super().__init__()
        self.product, self.count = product, count

    def forward(self, x: Tensor) -> Tensor:
        logits = self.product(x)
        missing = logits.shape[-1] - self.count
        return F.pad(logits[..., : self.count], (0, missing), value=-float("inf")) if missing else logits


def whole(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits (T, vocab_size), from all ranks' parts of them; as they are where they are no parts."""
    if logits.shape[-1] == vocab_size:
        return logits
    return all_gather(logits).transpose(0, 1).flatten(1)[:, :vocab_size]


def most_likely(logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The argmax (T,) over the vocabulary, the lowest of equals, and its logit (T,) (NaN if any of the row
    is), from whole logits (T, vocab_size) or this rank's part."""
    if logits.shape[-1] == vocab_size:
        index = logits.argmax(-1)
        return index, logits.gather(-1, index[:, None]).squeeze(-1)
    value, index = logits.max(-1)
    pairs = all_gather(
        torch.stack([value.double(), (index + RANK * logits.shape[-1]).double()], -1)
    )  # fp64 holds both
    best = pairs[..., 0].argmax(0, keepdim=True)
    peak, index = pairs.gather(0, best[..., None].expand(1, -1, 2))[0].unbind(-1)
    return index.long(), peak


def join(model: Transformer, shard: Shard) -> Transformer:
    """Puts the collectives into a model of which this rank holds a part."""
    start, stop = shard.vocabulary(model.args)
    for layer in model.layers:
        layer.attention.wo = Reduced(layer.attention.wo)
        layer.feed_forward.w2 = Reduced(layer.feed_forward.w2)
    model.tok_embeddings = VocabEmbedding(model.tok_embeddings.weight, start, stop)
    model.output = VocabHead(model.output, stop - start)
    return model


# What ranks tell one another beside that: that they are there, that they run alike, and why they end.


class Link:
    """Lines of JSON over TCP between rank 0 and each other rank.

    The kernel closes a connection when a process dies, however it dies, and the other side sees that at once,
    whatever its main thread is waiting for. So rank 0 says in one sentence what happened, and no rank
    outlives another.
    """

    def __init__(self, name: str, rank: int, world: int, store: dist.Store):
        self.name, self.rank, self.world = name, rank, world
        self.sockets: dict[int, socket.socket] = {}
        self.inbox = {peer: queue.Queue() for peer in range(world)}
        self.gone: set[int] = set()  # ranks that took their leave
        self.everybody_left, self.ending, self.over = threading.Event(), threading.Event(), threading.Lock()
        if world == 1:
            self.everybody_left.set()
        self.accept(store) if rank == 0 else self.call(store)
        for peer, connection in self.sockets.items():
            threading.Thread(target=self.listen, args=(peer, connection), daemon=True).start()

    def accept(self, store: dist.Store) -> None:
        """Rank 0 tells the store where it is, and waits for all others. Raises InputError naming those that
        do not come."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=self.world)
        word, deadline = secrets.token_hex(16), time.monotonic() + START
        store.set("judge_fast/link", json.dumps([own_addresses(), server.getsockname()[1], word]))
        while len(self.sockets) < self.world - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                said, peer = connection.recv(64).decode().split()
            except TimeoutError:
                missing = [str(rank) for rank in range(1, self.world) if rank not in self.sockets]
                if time.monotonic() > deadline:
                    raise InputError(
                        f"Rank {', '.join(missing)} of {self.world} did not come within {START} s."
                    ) from None
                continue
            except (OSError, ValueError):
                continue
            if said == word:
                connection.settimeout(None)
                self.sockets[int(peer)] = connection
        server.close()

    def call(self, store: dist.Store) -> None:
        """Another rank reaches rank 0 by the first of its addresses that answers. Raises InputError when none
        does."""
        addresses, port, word = json.loads(store.get("judge_fast/link"))
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=10)
                connection.sendall(f"{word} {self.rank}".ljust(64).encode())
                connection.settimeout(None)
                self.sockets[0] = connection
                return
            except OSError as error:
                reason = error.strerror or error
        raise InputError(f"Rank {self.rank} cannot reach rank 0 at {addresses}, port {port}: {reason}.")

    def listen(self, peer: int, connection: socket.socket) -> None:
        """A thread's work: takes what `peer` says until it takes its leave."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # a machine that vanishes is noticed within half a minute
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with suppress(OSError, ValueError):
            for line in connection.makefile():
                said = json.loads(line)
                if "value" in said:
                    self.inbox[peer].put(said["value"])
                elif "error" in said:
                    self.end(said["error"])
                else:
                    self.gone.add(peer)
                    if len(self.gone) == len(self.sockets):
                        self.everybody_left.set()
        if peer not in self.gone:
            self.end(f"Rank {peer} died.")

    def send(self, peer: int, what: dict) -> None:
        with suppress(OSError):  # it died, which `listen` says
            self.sockets[peer].sendall((json.dumps(what) + "\n").encode())

    def end(self, sentence: str) -> None:
        """Ends this rank, and with it the others, whatever its main thread is doing."""
        self.ending.set()
        time.sleep(1 if self.rank == 0 else 0)  # if rank 0 makes the same mistake it says so itself
        self.over.acquire()  # once, and never again
        if self.rank == 0 or (self.rank == 1 and sentence == "Rank 0 died."):
            print(
                f"\n{self.name}: {sentence}",
                file=sys.stderr if self.rank == 0 else sys.__stderr__,
                flush=True,
            )
        self.stop()

    def stop(self) -> None:
        for peer in self.sockets:
            self.send(peer, {"error": ""} if self.rank == 0 else {"leaving": True})
        sys.stdout.flush()
        os._exit(2)

    def leave(self) -> None:
        """A good end: nobody goes before everybody has done."""
        if self.rank == 0 and not self.everybody_left.wait(PATIENCE.seconds):
            self.end("The other ranks did not end.")
        for peer in self.sockets:
            self.send(peer, {"leaving": True})
        if self.rank > 0:
            self.everybody_left.wait(PATIENCE.seconds)

    def receive(self, peer: int, seconds: float | None):
        try:
            return self.inbox[peer].get(timeout=seconds)
        except queue.Empty:
            raise InputError(f"Rank {peer} said nothing for {seconds:.0f} s.") from None


def own_addresses() -> list[str]:
    """Where the other ranks may reach this process: by the name that torchrun gives, or from where it reaches
    that."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    found = [master]
    for family, kind, _, _, address in socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))


class LastLine(io.TextIOBase):
    """Stands for standard error of ranks other than 0: keeps the last line, for rank 0 to print if this rank
    ends by it."""

    text = ""

    def write(self, text: str) -> int:
        lines = [line for line in text.splitlines() if line.strip()]
        self.text = lines[-1] if lines else self.text
        return len(text)


LINK: Link | None = None  # to the other ranks; None without torchrun
STORE: dist.Store | None = None


@contextmanager
def ranks(name: str):
    """Around a script's body: under torchrun the ranks meet, only rank 0 prints, and all end together; else
    nothing.

    Whatever ends one rank ends all, with exit code 2 and one sentence from rank 0.
    """
    global LINK, STORE
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield
        return
    try:
        rank, world = check_environment()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)  # every rank says it: they have not met
        sys.exit(2)
    if rank > 0:
        aloud = os.fdopen(os.dup(2), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print from C++
        sys.stdout, sys.stderr, sys.__stderr__ = open(os.devnull, "w"), LastLine(), aloud  # noqa: SIM115 it stays open
    signal.signal(signal.SIGTERM, lambda *_: ended_by_torchrun(name, rank))
    try:
        STORE = meet()
        LINK = Link(name, rank, world, STORE)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        yield
    except SystemExit as stop:
        if stop.code:
            give_up(stop.code)
        raise
    except Exception as error:
        lost(error)
    LINK.leave()
    if GROUP:
        dist.destroy_process_group()


def check_environment() -> tuple[int, int]:
    """Rank and world size as torchrun sets them. Raises InputError naming the variable that is missing or no
    such number."""
    found = {}
    for name, low, high in (
        ("WORLD_SIZE", 1, 2**16),
        ("RANK", 0, 2**16),
        ("LOCAL_RANK", 0, 2**16),
        ("MASTER_PORT", 0, 65535),
    ):
        if name not in os.environ and name == "LOCAL_RANK":
            continue  # ranks that were started by hand may lack it
        try:
            found[name] = cli.whole(low, high)(os.environ.get(name, ""))
        except argparse.ArgumentTypeError as error:
            raise InputError(
                f"{name}={error} in the environment of a rank; start ranks by torchrun, or unset it."
            ) from None
    if not os.environ.get("MASTER_ADDR"):
        raise InputError(
            "MASTER_ADDR is not in the environment of a rank; start ranks by torchrun, or unset RANK."
        )
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise InputError(
            f"RANK={found['RANK']} must be below WORLD_SIZE={found['WORLD_SIZE']}; start ranks by torchrun."
        )
    return found["RANK"], found["WORLD_SIZE"]


def meet() -> dist.Store:
    """The store that torchrun (or rank 0, if ranks were started by hand) keeps. Raises InputError where there
    is none."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    late = threading.Timer(
        START + 5, too_late, [where]
    )  # a stranger on the port may take the call and say nothing
    late.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START)))
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise InputError(
                f"The ranks cannot meet at {where}: the port is in use; choose another MASTER_PORT."
            ) from None
        raise InputError(f"The ranks cannot meet at {where}: {first_line(error)}.") from None
    finally:
        late.cancel()
    return store


def too_late(where: str) -> None:
    """Ends this rank, which nobody answers."""
    if os.environ["RANK"] == "0":
        print(f"The ranks cannot meet at {where}: nobody answers there.", file=sys.stderr, flush=True)
    os._exit(2)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def ended_by_torchrun(name: str, rank: int) -> None:
    """torchrun ends the ranks when one of them died; the link knows which, unless the ranks have not met
    yet."""
    time.sleep(5)  # `Link.end` is quicker
    if rank == 0:
        print(
            f"\n{name}: torchrun ended the ranks: one of them died, or it was told to.",
            file=sys.stderr,
            flush=True,
        )
    os._exit(2)


def give_up(code: int | str) -> None:
    """This rank's script has ended with a mistake: rank 0 has said it, another rank has it said by rank 0."""
    LINK.over.acquire(timeout=20)
    if LINK.rank == 0:
        for peer in LINK.sockets:
            LINK.send(peer, {"error": ""})
    else:
        LINK.send(0, {"error": sys.stderr.text.removeprefix(f"{LINK.name}: ")})
        LINK.ending.wait(10)
        os._exit(2)


def lost(error: Exception) -> None:
    """A collective fails where a rank has died: the link then knows more. Else it is a mistake in the
    program."""
    if LINK.ending.wait(5):
        time.sleep(5)  # it ends this process meanwhile
    text = f"{type(error).__name__}: {first_line(error)}"
    if LINK.rank == 0:
        collective = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("gloo", "NCCL", "Timed out")
        )
        text = f"The ranks lost one another: {first_line(error)}." if collective else traceback.format_exc()
        print(f"{LINK.name}: {text}", file=sys.stderr)
    else:
        print(f"On rank {LINK.rank} {text}.", file=sys.stderr)
    give_up(2)
    sys.exit(2)


def shard() -> Shard | None:
    """This rank's shard, None without torchrun."""
    return Shard(LINK.rank, LINK.world) if LINK is not None else None


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return LINK is None or LINK.rank == 0


def first(action: Callable):
    """What `action` returns on rank 0 (something that JSON holds), on every rank; only rank 0 runs it."""
    if LINK is None:
        return action()
    if LINK.rank > 0:
        return LINK.receive(0, None)  # it may be waiting for a person
    value = action()
    for peer in LINK.sockets:
        LINK.send(peer, {"value": value})
    return value


def compare(mine, describe: Callable) -> None:
    """Rank 0 compares every rank's value with its own; raises InputError with describe(rank, theirs) where
    one differs."""
    if LINK is None:
        return
    mine = json.loads(json.dumps(mine, default=str))
    if LINK.rank > 0:
        LINK.send(0, {"value": mine})
        return
    for peer in sorted(LINK.sockets):
        theirs = LINK.receive(peer, PATIENCE.seconds)
        if theirs != mine:
            raise InputError(describe(peer, theirs))


def agree(facts: dict) -> None:
    """Raises InputError, on rank 0, naming the first of `facts` in which another rank differs."""

    def describe(peer: int, theirs: dict) -> str:
        mine = json.loads(json.dumps(facts, default=str))
        name = next(name for name in [*mine, *theirs] if mine.get(name) != theirs.get(name))
        they, we = theirs.get(name, "none"), mine.get(name, "none")
        return f"Rank {peer} has another {name} ({they}) than rank 0 ({we}); start all ranks alike."

    compare(facts, describe)


def check_round(pos: int, accepted: int, tokens: list[int]) -> None:
    """Raises InputError, on rank 0, naming the first rank and position where the ranks' rounds differ
    (--check_ranks).

    pos: of the last token before the round. The other ranks send a line and go on, so that it costs rank 0 a
    wait of about the time that a line takes, and the others nothing.
    """

    def describe(peer: int, theirs: list) -> str:
        their_pos, their_accepted, their_tokens = theirs
        for at, (token, other) in enumerate(zip(tokens, their_tokens)):
            if token != other:
                return f"Rank {peer} differs from rank 0 at position {pos + 1 + at}: token {other} there, rank 0 has {token}."
        return (
            f"Rank {peer} differs from rank 0 at position {pos + 1}: it stands at {their_pos + 1} and "
            f"accepted "
            f"{their_accepted} tokens, rank 0 {accepted}."
        )

    compare([pos, accepted, tokens], describe)


def code_digest() -> str:
    """Of this program: ranks on two machines must run the same."""
    files = sorted(
        path for path in Path(__file__).resolve().parent.iterdir() if path.suffix in (".py", ".cpp")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def file_facts(flag: str, path: Path | None) -> dict[str, str | int]:
    """What two ranks' copies of a file or folder are compared by before anything is loaded: contents of small
    files, sizes of large ones (their contents by fingerprint, once loaded)."""
    if path is None or not path.exists():
        return {}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    files = [file for file in files if file.suffix in (".json", ".model", ".safetensors")]
    facts = {}
    for file in files:
        weights = file.suffix == ".safetensors" and path.is_dir()
        same = (
            f"{file.stat().st_size} bytes" if weights else hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        )
        facts[f"{file.name} of {flag}"] = same
    return facts


def own_device(name: str) -> str:
    """The device of this rank: of --device cuda the one with its number on its machine. Raises InputError if
    there is none."""
    if LINK is None or not name.startswith("cuda"):
        return name
    here, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name != "cuda":
        raise InputError(f"--device {name}: each rank takes the GPU of its number; give --device cuda.")
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", here + 1))
    if needed > count:
        raise InputError(
            f"{needed} ranks on this machine need {needed} GPUs, but there are {count}; lower "
            f"--nproc_per_node."
        )
    return f"cuda:{here}"


def connect(device: torch.device, way: str | None) -> None:
    """Makes the process group: gloo on a CPU, NCCL on GPUs; way: what sums small messages. Rank 0 says
    which."""
    global GROUP, RANK
    if LINK is None or GROUP:
        return
    if way is not None and device.type == "cpu":
        raise InputError(f"--all_reduce {way} needs GPUs; on a CPU it is gloo's, leave the flag out.")
    backend = "gloo" if device.type == "cpu" else "nccl"
    bound = {"device_id": device} if device.type == "cuda" else {}
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("judge_fast", STORE),
            rank=LINK.rank,
            world_size=LINK.world,
            timeout=PATIENCE,
            **bound,
        )
    except RuntimeError as error:
        raise InputError(f"{backend} cannot connect the ranks: {first_line(error)}.") from None
    GROUP, RANK = dist.group.WORLD.group_name, LINK.rank
    if way == "symmetric":
        open_symmetric(device)
    print(f"{LINK.world} ranks by {backend}; all-reduce: {way or backend}", file=sys.stderr)


def own_compile_cache() -> None:
    """Gives torch.compile a cache for each rank of a machine: two that compile the same at once would read
    half a file."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    here, folder = f"rank{os.environ['LOCAL_RANK']}", Path(cache_dir())
    if LINK is not None and folder.name != here:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / here)


def open_symmetric(device: torch.device) -> None:
    """Makes the buffers of --all_reduce symmetric. Raises InputError where the GPUs cannot reach one
    another's memory."""
    try:
        import torch.distributed._symmetric_memory as symmetric

        for dtype in (torch.bfloat16, torch.float32):
            buffer = symmetric.empty(MEDIUM // dtype.itemsize, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, GROUP)
            SYMMETRIC[dtype] = buffer
    except (ImportError, RuntimeError) as error:
        SYMMETRIC.clear()
        reason = first_line(error)
        raise InputError(
            f"--all_reduce symmetric cannot be had here ({reason}); --all_reduce nccl always can."
        ) from None


def add_flags(parser) -> None:
    """The flags that concern ranks."""
    add = parser.add_argument
    add(
        "--draft_tp",
        choices=("shard", "replicate"),
        help="ranks share the draft, or run it all alike (default: by its size)",
    )
    add(
        "--all_reduce",
        choices=("nccl", "symmetric"),
        help="what sums small messages over GPUs (default: nccl)",
    )
    add("--check_ranks", action="store_true", help="compare tokens and positions of all ranks every round")


def check_flags(args) -> None:
    """Raises InputError for flags that concern ranks where there are none, or ranks that were not started
    alike."""
    if LINK is None:
        for flag in ("draft_tp", "all_reduce", "check_ranks"):
            if getattr(args, flag, None):
                raise InputError(
                    f"--{flag} concerns several ranks; start them with torchrun, or leave the flag out."
                )
        return
    flags = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    agree(
        {f"--{name}": value for name, value in flags.items()}
        | {"torch": torch.__version__, "code": code_digest()}
    )
    facts = {}
    for name, value in vars(args).items():
        if isinstance(value, Path) and name != "profile":
            facts |= file_facts(f"--{name}", value)
    agree(facts)
