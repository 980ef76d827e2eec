"""Protects: shards are the whole, several ranks say what one process says and never part, traffic and reading, and that
all ranks end.

The ranks run this file: `main` at the end takes what a launch shall do, so that one start serves many cases.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_folder
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import generate
import kernels
import model
import quantize
import tp
from checkpoint import DEMO, read_config, weight_plan
from cli import InputError
from judge import JudgeHead
from model import ModelArgs, preset
from quantize import load_model
from scripts.lib.ranks import own_device, place_draft
from scripts.lib.terminal import DEMO_PROMPT
from scripts.plan import decisions, traffic
from tp import Shard

WIDE = {"vocab_size": 640, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "num_hidden_layers": 2}  # fmt: skip
SHAPES = {
    "gqa": WIDE,
    "tied, one KV head, uneven vocabulary": WIDE
    | {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 643},
    "three heads a KV head": WIDE | {"num_attention_heads": 6, "num_key_value_heads": 2},
}
SCHEMES = {"int8": quantize.Scheme("int8"), "fp8": quantize.Scheme("fp8", lm_head=True), "int4": quantize.Scheme("int4"),
           "int4/64": quantize.Scheme("int4", 64, symmetric=True)}  # fmt: skip
WORLDS = {
    (False, 8): (2, 4, 8),
    (True, 8): (2, 4),
    (False, 6): (1, 2, 4),
    (True, 6): (1,),
}  # by groups of 64, and heads


def weights(loaded: model.Transformer) -> dict[str, torch.Tensor]:
    """Weights and scales by name, dequantised where they are packed, without the rows that packing adds."""
    found = {}
    for name, module in loaded.named_modules():
        if isinstance(module, quantize.QuantLinear):
            unpacked = quantize.FORMATS[module.mode].unpack(module.weight, module.scales)
            found[name] = unpacked[: module.n_out, : module.n_in]
        elif hasattr(module, "weight"):
            found[name] = module.weight
    return found


def gathered(parts: list[model.Transformer], args: ModelArgs) -> dict[str, torch.Tensor]:
    """The whole weights of a model, from the parts of all ranks; fails where what fills a part up is not 0."""
    world, whole = len(parts), {}
    shards = [Shard(rank, world) for rank in range(world)]
    repeats = max(1, world // args.n_kv_head)  # ranks that hold the same KV head
    for name in weights(parts[0]):
        found, kind = [weights(part)[name] for part in parts], name.split(".")[-1]
        heads = [(end - start) * args.head_dim for start, end in (shard.heads(args) for shard in shards)]
        if kind == "wqkv":
            sizes = [
                n * args.head_dim
                for n in (parts[0].local.n_head, parts[0].local.n_kv_head, parts[0].local.n_kv_head)
            ]
            q, k, v = zip(*(part.split(sizes) for part in found))
            assert all(not rows[n:].any() for rows, n in zip(q, heads))
            assert all(
                torch.equal(x[rank], x[rank // repeats * repeats]) for x in (k, v) for rank in range(world)
            )
            q = [rows[:n] for rows, n in zip(q, heads)]
            whole[name] = torch.cat([*q, *k[::repeats], *v[::repeats]])
        elif kind == "wo":
            assert all(not columns[:, n:].any() for columns, n in zip(found, heads))
            whole[name] = torch.cat([columns[:, :n] for columns, n in zip(found, heads)], 1)
        elif kind == "w13":
            gate, up = zip(*(part.chunk(2) for part in found))
            whole[name] = torch.cat([*gate, *up])
        elif kind == "w2":
            whole[name] = torch.cat(found, 1)
        elif kind in ("tok_embeddings", "output"):
            rows = torch.cat(found)
            assert not rows[args.vocab_size :].any()
            whole[name] = rows[: args.vocab_size]
        else:
            assert all(torch.equal(part, found[0]) for part in found)
            whole[name] = found[0]
    return whole


def load_parts(folder: Path, world: int, scheme, monkeypatch) -> list[model.Transformer]:
    """All ranks' parts, one after the other. What ranks tell one another while quantising is heard in a first reading."""
    if scheme is None:
        return [quantize.load_model(folder, "cpu", None, None, Shard(rank, world)) for rank in range(world)]
    peaks: list[list[torch.Tensor]] = [[] for _ in range(world)]
    monkeypatch.setattr(Shard, "largest", lambda self, rows: (peaks[self.rank].append(rows), rows)[1])
    for rank in range(world):
        quantize.load_model(folder, "cpu", None, scheme, Shard(rank, world))
    turns = {rank: iter([torch.stack(each).amax(0) for each in zip(*peaks)]) for rank in range(world)}
    monkeypatch.setattr(Shard, "largest", lambda self, rows: next(turns[self.rank]))
    return [quantize.load_model(folder, "cpu", None, scheme, Shard(rank, world)) for rank in range(world)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shards_are_the_whole(tmp_path, shape, monkeypatch):
    """For every layer, on disk and in every mode, quantised while loading and before; and each knows the model by its name."""
    monkeypatch.setattr(quantize, "kernel_for", lambda *_: None)  # the packing of folders is compared
    make_folder(tmp_path / "model", dtype=torch.bfloat16, **SHAPES[shape])
    args = read_config(tmp_path / "model")
    for name, scheme in [("none", None), *SCHEMES.items()]:
        if scheme is not None and scheme.lm_head and args.tie_embeddings:
            continue
        expected = quantize.load_model(tmp_path / "model", "cpu", None, scheme)
        ways = [(tmp_path / "model", scheme)]
        if scheme is not None:
            quantize.convert(tmp_path / "model", tmp_path / name.replace("/", "-"), scheme)
            ways.append((tmp_path / name.replace("/", "-"), None))
        for world in WORLDS[name == "int4/64", args.n_head]:
            for folder, given in ways:
                parts = load_parts(folder, world, given, monkeypatch)
                assert {part.fingerprint for part in parts} == {expected.fingerprint}
                for weight, found in gathered(parts, args).items():
                    assert torch.equal(found, weights(expected)[weight]), (name, world, folder, weight)


def test_reading_is_divided_among_the_ranks(tmp_path):
    """Each reads an N-th, the norms, and the 64 values of each tensor that tell the model."""
    make_folder(tmp_path, **WIDE)
    whole = load_model(tmp_path)
    size = sum(weight.nbytes for weight in whole.parameters())
    assert whole.bytes_read == size
    for world in (2, 4):
        parts = [load_model(tmp_path, shard=Shard(rank, world)) for rank in range(world)]
        norms, samples = 5 * 96 * 4, (len(weight_plan(whole.args)) - 5) * 64 * 4
        assert {part.bytes_read for part in parts} == {(size - norms) // world + norms + samples}
        assert parts[0].bytes_read == sum(weight.nbytes for weight in parts[0].parameters()) + samples


def test_seventeen_billion_rows_by_hand():
    """16 ranks of Llama-3.1-405B: 8 query heads and one KV head each, two ranks to a KV head."""
    args = preset("Llama-3.1-405B")
    shard, plan = Shard(5, 16), weight_plan(args)
    assert shard.heads(args) == (40, 48) and shard.kv_heads(args) == (2, 3)
    assert shard.part(args, plan["model.layers.0.self_attn.q_proj.weight"]) == (slice(5120, 6144),)
    assert shard.part(args, plan["model.layers.0.self_attn.v_proj.weight"]) == (slice(256, 384),)
    assert shard.part(args, plan["model.layers.0.self_attn.o_proj.weight"]) == (
        slice(None),
        slice(5120, 6144),
    )
    assert shard.part(args, plan["model.layers.0.mlp.up_proj.weight"]) == (slice(16640, 19968),)
    assert shard.part(args, plan["model.layers.0.mlp.down_proj.weight"]) == (slice(None), slice(16640, 19968))
    assert shard.part(args, plan["lm_head.weight"]) == (slice(40080, 48096),)
    assert shard.part(args, plan["model.norm.weight"]) == ()
    local = shard.local(args)
    assert (local.n_head, local.n_kv_head, local.intermediate_size, local.vocab_size, local.dim) == (
        8,
        1,
        3328,
        8016,
        16384,
    )


@pytest.mark.parametrize("world, change, words", [
    (3, {}, "3 ranks cannot share 4 KV heads"),
    (16, {}, "16 ranks cannot share 8 attention heads"),
    (2, {"intermediate_size": 255}, "2 ranks cannot share an intermediate size of 255"),
])  # fmt: skip
def test_what_does_not_divide_is_refused_by_name(tmp_path, world, change, words):
    make_folder(tmp_path, **(WIDE | change))
    with pytest.raises(InputError, match=words):
        load_model(tmp_path, shard=Shard(0, world))


def test_columns_are_not_cut_inside_a_group(tmp_path):
    make_folder(tmp_path, **WIDE)
    for scheme, world, words in ((quantize.Scheme("int4", 128), 4, "o_proj from column 0 to 64 of 256"),
                                 (quantize.Scheme("int4", 64), 8, "multiples of 64")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            quantize.load_model(tmp_path, "cpu", None, scheme, Shard(0, world))


def test_where_a_draft_goes():
    """By hand: 8.03 GB in int8 are worth 66 collectives on two GPUs; the demo's draft of 0.8 MB is worth none anywhere."""
    big, small = preset("Llama-3.1-8B"), preset("Llama-3.2-1B")
    assert 8_030_000_000 / 2 > 66 * 32 * 2**20 and place_draft(big, 8_030_000_000, 2, "cuda") == "shard"
    assert (
        1_000_000_000 * 7 / 8 < 34 * 32 * 2**20
        and place_draft(small, 1_000_000_000, 8, "cuda") == "replicate"
    )
    assert place_draft(read_config(DEMO / "draft"), 800_000, 2, "cpu") == "replicate"
    assert place_draft(big, 8_030_000_000, 3, "cuda") == "replicate"  # what does not divide


def test_a_rank_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(tp, "shard", lambda: Shard(1, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_device("cuda") == "cuda:1" and own_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device cuda:0"):
        own_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 GPUs, but there are 2"):
        own_device("cuda")


@pytest.mark.parametrize("flag", [["--draft_tp", "shard"], ["--check_ranks"], ["--all_reduce", "nccl"]])
def test_flags_of_ranks_need_ranks(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--device", "cpu", *flag])
    assert stop.value.code == 2 and f"{flag[0]} concerns several ranks" in capsys.readouterr().err


@pytest.mark.parametrize("change, word", [
    ({"RANK": "3"}, "RANK=3 must be below WORLD_SIZE=2"), ({"RANK": "x"}, "RANK=x must be"), ({"RANK": "-1"}, "RANK=-1"),
    ({"RANK": "9" * 500}, "RANK=9999"), ({"RANK": "\u0661"}, "RANK="), ({"RANK": None}, "RANK=''"), ({"RANK": ""}, "RANK=''"),
    ({"WORLD_SIZE": None}, "WORLD_SIZE=''"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"), ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0"),
    ({"MASTER_PORT": None}, "MASTER_PORT=''"), ({"MASTER_PORT": "99999999"}, "MASTER_PORT=99999999"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR is not"), ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"), ({"LOCAL_RANK": "y"}, "LOCAL_RANK=y"),
])  # fmt: skip
def test_garbage_in_a_ranks_environment_is_named_by_every_rank(monkeypatch, capsys, change, word):
    base = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name, value in (base | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        generate.main(["--device", "cpu"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and word in err and err.count("\n") == 1 and "torchrun" in err


# What follows starts ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random targets (GQA in bf16 and the same in int8; tied) with drafts and judges, and the demo's tokenizer."""
    root = tmp_path_factory.mktemp("ranks")
    biases = {"attention_bias": True, "mlp_bias": True}
    shapes = {"gqa": SHAPES["gqa"] | biases, "tied": SHAPES["tied, one KV head, uneven vocabulary"]}
    for number, (name, shape) in enumerate(shapes.items()):
        shape = shape | {"max_position_embeddings": 4096}
        for role, change in (("target", {}), ("draft", {"num_hidden_layers": 1})):
            make_folder(
                root / name / role,
                seed=10 * number + len(change),
                dtype=torch.bfloat16,
                scale=9.0,
                **(shape | change),
            )
            (root / name / role / "tokenizer.model").write_bytes(
                (DEMO / "target" / "tokenizer.model").read_bytes()
            )
    quantize.convert(root / "gqa" / "target", root / "int8" / "target", quantize.Scheme("int8"))
    quantize.convert(root / "gqa" / "draft", root / "int8" / "draft", quantize.Scheme("int4"))
    for name in ("gqa", "tied", "int8"):
        target = quantize.load_model(root / name / "target", "cpu")
        weight = torch.randn(96, generator=torch.Generator().manual_seed(4)) * 0.05
        JudgeHead(weight, torch.tensor(0.0), 0.5, target.fingerprint, {}).save(
            root / name / "judge.safetensors"
        )
    return root


def flags(folders: Path, name: str, verify: str, *more: str) -> list[str]:
    """A command line of generate.py that prints JSON."""
    folder = DEMO if name == "demo" else folders / name
    prompt = DEMO_PROMPT if name == "demo" else "40"
    found = ["--checkpoint_path", folder / "target", "--draft_checkpoint_path", folder / "draft", "--verify", verify, "--json",
             "--judge_path", folder / "judge.safetensors", "--prompt", prompt, "--speculate_k", "5", "--device", "cpu",
             "--max_new_tokens", "24"]  # fmt: skip
    return [str(flag) for flag in found] + list(more)


def torchrun(todo: list, ranks: int, *more: str) -> subprocess.Popen:
    """Starts torchrun on this file."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(more or ["--standalone"]),
        "--nproc_per_node",
        str(ranks),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, __file__, json.dumps(todo)], cwd=ROOT, env=env, text=True, **pipes)


def results(process: subprocess.Popen) -> list:
    """What the ranks printed, one JSON value for each thing that they did."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


class Ranks:
    """Ranks that were forked from a process that has imported all, which is quicker than torchrun; in their environment
    they find what another launcher gives them."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, folder: Path, world: int, *todo: dict, port: int = 0, **others: dict):
        """todo: what all do; others: what rank_1 (say) does instead."""
        folder.mkdir()
        self.files, self.processes = [folder / f"{rank}" for rank in range(world)], []
        env = {
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port or free_port(),
        }
        for rank in range(world):
            own = {key: str(value) for key, value in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            what = [others[f"rank_{rank}"]] if f"rank_{rank}" in others else list(todo)
            self.processes.append(
                self.context.Process(target=be_rank, args=(own, what, str(self.files[rank])))
            )
            self.processes[-1].start()

    def wait(self, seconds: int = 60) -> tuple[list[int | None], list[str]]:
        """Exit codes (None: still there after that time), and what each wrote to standard error."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes, [file.with_suffix(".err").read_text() for file in self.files]

    def results(self) -> list:
        codes, errors = self.wait(400)  # several compile at once
        assert codes == [0] * len(codes), errors
        assert not any(file.with_suffix(".out").read_text() for file in self.files[1:])
        return [json.loads(line) for line in self.files[0].with_suffix(".out").read_text().splitlines()]


def be_rank(environment: dict[str, str], todo: list[dict], files: str) -> None:
    """What a forked process does."""
    os.environ.update(environment)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(files + suffix, os.O_CREAT | os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    sys.argv = ["generate.py"]  # argparse names it
    main(todo)
    sys.stdout.flush()


@pytest.fixture(scope="module", autouse=True)
def prepared():
    """The process that ranks are forked from."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    Ranks.context.set_forkserver_preload([Path(__file__).stem])
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@functools.cache
def alone(*command: str) -> dict:
    """What one process says."""
    own = [
        flag
        for flag in command
        if flag not in ("--check_ranks", "--draft_tp", "shard", "replicate", "--compile")
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        generate.main(own)
    return json.loads(out.getvalue())


SAME = ("tokens", "rounds", "accepted", "accepted_by_rule", "text", "stop_reason")


def assert_same(commands: list[list[str]], found: list[dict]) -> None:
    """That ranks said what one process says: with the same rounds, not only the same tokens."""
    for command, ours in zip(commands, found, strict=True):
        assert {key: ours[key] for key in SAME} == {key: alone(*command)[key] for key in SAME}, command
        assert len(set(ours["tokens"])) > 5  # it is no text that any mistake would give, too


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world, every", [(2, 1), (4, 3), pytest.param(4, 1, marks=SLOW)])
def test_ranks_say_what_one_process_says(folders, tmp_path, world, every):
    """Greedy, for drafts and disk formats of every kind; every: of the cases, each pair and each rule among them."""
    commands = [
        flags(
            folders, name, verify, "--check_ranks", "--draft_tp", draft, "--max_new_tokens", str(48 // world)
        )
        for name, draft in (("demo", "shard"), ("gqa", "replicate"), ("tied", "shard"), ("int8", "replicate"))
        for verify in ("plain", "standard", "judge", "kl")
    ][::every]
    assert_same(commands, Ranks(tmp_path / "r", world, *({"run": command} for command in commands)).results())


def test_torchrun_and_a_rank_that_dies_under_it(folders):
    """Rules that gather, sampling, quantising while loading; then one rank is killed, and torchrun ends the other."""
    commands = [
        flags(folders, "gqa", "kl", "--threshold", "4", "--draft_tp", "shard", "--check_ranks"),
        flags(folders, "tied", "ensemble", "--check_ranks"),
        flags(
            folders,
            "gqa",
            "standard",
            "--temperature",
            "0.9",
            "--top_k",
            "20",
            "--top_p",
            "0.9",
            "--check_ranks",
        ),
        flags(
            folders,
            "gqa",
            "standard",
            "--mode",
            "int8",
            "--draft_mode",
            "int4",
            "--check_ranks",
            "--draft_tp",
            "shard",
        ),
        flags(folders, "gqa", "judge", "--min_prob", "0.01", "--check_ranks"),
        flags(folders, "tied", "judge", "--speculate_k", "auto", "--check_ranks"),
    ]
    process = torchrun(
        [
            *({"run": command} for command in commands),
            {"die 1": flags(folders, "gqa", "standard", "--max_new_tokens", "3000")},
        ],
        2,
    )
    out, err = process.communicate(timeout=400)
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found.pop()["tokens"]) == 24  # there M depends on the timing, which rank 0 decides
    assert_same(commands[:-1], found)
    assert (
        process.returncode != 0 and err.count("generate.py: ") == err.count("generate.py: Rank 1 died") == 1
    ), err


@SLOW  # compiles for a minute
@pytest.mark.parametrize("name, verify", [("tied", "kl"), ("gqa", "judge")])
def test_compiled_ranks_say_what_one_process_says(folders, tmp_path, name, verify):
    command = flags(folders, name, verify, "--compile", "--check_ranks", "--draft_tp", "shard")
    assert_same([command], Ranks(tmp_path / "r", 2, {"run": command}).results())


PARTING = {  # name -> flags, and what one says without broadcasts; "": it agrees without, by what all gather
    "plain": (("gqa", "plain"), ""),
    "plain, sampled": (("gqa", "plain", "--temperature", "0.8"), "Rank 1 has another token"),
    "standard, shared draft": (("gqa", "standard", "--draft_tp", "shard"), ""),
    "standard, own drafts": (("demo", "standard", "--draft_tp", "replicate"), "Rank 1 has another"),
    "standard, shared draft, sampled": (("gqa", "standard", "--draft_tp", "shard", "--temperature", "0.8"), "Rank 1 has another"),
    "standard, own drafts, sampled": (("gqa", "standard", "--draft_tp", "replicate", "--temperature", "0.8"), "Rank 1 has another"),
    "judge, shared draft": (("gqa", "judge", "--draft_tp", "shard"), "Rank 1 has another"),
    "judge, own drafts": (("gqa", "judge", "--draft_tp", "replicate"), "Rank 1 has another"),
    "kl, shared draft": (("tied", "kl", "--draft_tp", "shard", "--threshold", "4"), "Rank 1 has another"),
    "kl, own drafts": (("tied", "kl", "--draft_tp", "replicate", "--threshold", "4"), "Rank 1 has another"),
    "ensemble, shared draft": (("gqa", "ensemble", "--draft_tp", "shard"), "Rank 1 has another"),
    "markers": (("demo", "kl", "--draft_tp", "shard", "--threshold", "0.2", "--relax_between", " ", "="), "Rank 1 has another"),
    "the fastest M": (("gqa", "judge", "--draft_tp", "replicate", "--speculate_k", "auto"), "mismatch"),
}  # fmt: skip


def parting(folders: Path, name: str) -> list[str]:
    return flags(folders, *PARTING[name][0], "--check_ranks", "--max_new_tokens", "48")


@pytest.mark.slow
def test_ranks_never_part_though_one_rounds_otherwise(folders, tmp_path):
    """On one rank every product, norm, score and probability is off by up to 15%; all commit the same to the end."""
    first, *others = (parting(folders, name) for name in PARTING)
    found = Ranks(tmp_path / "r", 2, {"round 1": first}, *({"run": each} for each in others)).results()
    assert all(len(ours["tokens"]) == 48 or ours["stop_reason"] == "stop" for ours in found)
    assert len(found) == len(PARTING)


@pytest.mark.parametrize("name", [name for name, (_, said) in PARTING.items() if said])
def test_without_rank_0s_word_they_would_part(folders, tmp_path, name):
    """The same, but the other rank goes by what it finds itself: what the test above protects can happen."""
    codes, errors = Ranks(tmp_path / "r", 2, {"patience": 20}, {"ignore 1": parting(folders, name)}).wait()
    assert all(codes) and PARTING[name][1] in "".join(errors), (codes, errors)


@pytest.mark.parametrize("name, more", [
    pytest.param("kl, shared draft", ("--temperature", "0.8"), marks=SLOW),
    pytest.param("standard, own drafts, sampled", (), marks=SLOW),
    ("plain, sampled", ()),
])  # fmt: skip
def test_compiled_ranks_never_part(folders, tmp_path, name, more):
    """One of whose graphs rounds otherwise: the collectives stay inside."""
    command = [*parting(folders, name), *more, "--compile"]
    assert len(Ranks(tmp_path / "r", 2, {"round 1": command}).results()[0]["tokens"]) == 48


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_nodes_on_two_addresses_say_what_one_process_says(folders, tmp_path):
    """A rendezvous over loopback addresses of its own for each "node"; and one rank alone, to the bit."""
    command = flags(folders, "gqa", "judge", "--check_ranks")
    port = free_port()
    nodes = []
    for address in ("127.0.0.2", "127.0.0.3"):
        more = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_id", "7", "--rdzv_endpoint", f"127.0.0.2:{port}",
                "--local_addr", address, "--max_restarts", "0"]  # fmt: skip
        nodes.append(torchrun([{"run": command}], 1, *more))
    single = Ranks(tmp_path / "r", 1, {"run": command})
    outputs = [results(node) for node in nodes]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone.cache_clear()
    expected = alone(*command)
    torch.set_num_threads(threads)
    (ours,) = sum(outputs, [])  # rank 0 alone prints
    (one,) = single.results()
    assert {key: ours[key] for key in SAME} == {key: expected[key] for key in SAME}
    assert {key: one[key] for key in (*SAME, "mean_score")} == {
        key: expected[key] for key in (*SAME, "mean_score")
    }


def test_traffic_ties_and_memory(folders, tmp_path):
    """Counted by PyTorch's dispatcher, against plan.traffic; ties against torch.argmax; memory by the system's counters."""
    todo = [{"count": [str(folders / "gqa" / "target"), verify]} for verify in ("judge", "kl")]
    todo.append({"decisions": str(folders / "gqa" / "target")})
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 4096, "head_dim": 64,
             "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
    make_folder(folders / "big", **shape)
    for world in (2, 4):
        done = Ranks(
            tmp_path / str(world), world, *todo, {"ties": 0}, {"memory": str(folders / "big")}
        ).results()
        pairs, logits, decided, ties, memory = done
        assert pairs == {
            "all_reduces": 2 * 2 + 1,
            "reduced_bytes": 5 * 6 * 96 * 4,
            "gathers": 1,
            "gathered_bytes": 6 * 16,
        }
        assert logits == pairs | {"gathered_bytes": 6 * 640 // world * 4}
        assert decided == [[16], [8] * 5 + [16], [48, 16], [48, 16], [], [], [8]]
        assert ties == [0, 5, 17, 322, 0, 639]
        for peak, counted, fetched, size in memory:
            assert size / world * 0.95 < counted < size / world * 1.02
            assert counted * 0.99 < fetched < counted * 1.05 + 2**20
            assert peak < size / world * 1.1 + 16 * 2**20, (peak, size)


# Ranks that are in trouble; started by hand, so that every one's exit code is seen


def in_trouble(folders: Path, other: Path) -> dict[str, tuple[int, dict, str]]:
    """Name -> number of ranks, what they do (rank_n: what that one does instead), what is said."""
    command = flags(folders, "gqa", "standard", "--max_new_tokens", "3000")
    sampled = flags(folders, "gqa", "standard", "--temperature", "1", "--check_ranks")
    swapped = [str(other) if flag.endswith("/gqa/draft") else flag for flag in command]
    mixed, demo_judge = {"all": {"run": command}}, str(DEMO / "judge.safetensors")
    damaged = [str(other.parent / "nan") if flag.endswith("/gqa/target") else flag for flag in command]
    return {
        "not finite": (2, {"all": {"run": [*damaged, "--verify", "plain"]}}, "The target's logits are not finite"),
        "killed in mid-generation": (2, mixed | {"rank_1": {"die": command}}, "Rank 1 died"),
        "one of three killed": (4, mixed | {"rank_3": {"die": command}}, "Rank 3 died"),
        "rank 0 killed": (2, mixed | {"rank_0": {"die": command}}, "Rank 0 died"),
        "ranks that parted": (2, {"all": {"run": sampled}, "rank_1": {"other_seed": sampled}}, "Rank 1 has another token at position "),
        "sizes": (3, {"all": {"run": flags(folders, "gqa", "standard")}}, "3 ranks cannot share 4 KV heads"),
        "another flag": (2, mixed | {"rank_1": {"run": [*command, "--seed", "3"]}}, "Rank 1 has another --seed (3) than rank 0 (0)"),
        "other files": (2, mixed | {"rank_1": {"run": swapped}}, "Rank 1 has another weights of the draft ("),
        "another judge": (2, mixed | {"rank_1": {"run": [*command, "--judge_path", demo_judge]}}, "Rank 1 has another content of --judge_path ("),
        "one finds nothing": (2, mixed | {"rank_1": {"run": [*command, "--draft_checkpoint_path", "/no"]}}, "--draft_checkpoint_path (none)"),
        "unknown flag on one": (2, mixed | {"rank_1": {"run": [*command, "--unknown"]}}, "--unknown"),
        "a mistake of all": (2, {"all": {"run": [*command, "--all_reduce", "symmetric"]}}, "--all_reduce symmetric needs GPUs"),
        "a defect on one": (2, mixed | {"rank_1": {"fail": command}}, "On rank 1 ZeroDivisionError: the defect"),
    }  # fmt: skip


def test_all_ranks_end_with_one_sentence(folders, tmp_path):
    """Whatever happens to one: exit code 2 on every rank, within the time, and one line from rank 0 (rank 1 where it died)."""
    shutil.copytree(folders / "gqa" / "draft", tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = weights.read_bytes()
    begin, end = 8 + int.from_bytes(content[:8], "little"), len(content) - 100_000
    weights.write_bytes(
        content[:begin] + content[begin + 2 : end] + content[begin : begin + 2] + content[end:]
    )
    shape = WIDE | {"num_hidden_layers": 1, "max_position_embeddings": 4096}
    theirs = make_folder(tmp_path / "nan", dtype=torch.bfloat16, **shape)
    with torch.no_grad():
        theirs.lm_head.weight[500, 3] = float("nan")  # of the second rank's part
    theirs.save_pretrained(tmp_path / "nan")
    (tmp_path / "nan" / "tokenizer.model").write_bytes(
        (folders / "gqa" / "draft" / "tokenizer.model").read_bytes()
    )
    for number, (name, (world, todo, sentence)) in enumerate(in_trouble(folders, tmp_path / "other").items()):
        todo = dict(todo)
        codes, errors = Ranks(tmp_path / str(number), world, todo.pop("all"), **todo).wait()
        died = next((int(key[5:]) for key, what in todo.items() if "die" in what), None)
        assert codes == [-signal.SIGKILL if rank == died else 2 for rank in range(world)], (
            name,
            codes,
            errors,
        )
        speaker = 1 if died == 0 else 0
        said = [line for line in errors[speaker].splitlines() if line.startswith("generate.py: ")]
        assert len(said) == 1 and sentence in said[0] and "Traceback" not in errors[speaker], (name, errors)
        assert not any(text for rank, text in enumerate(errors) if rank not in (0, speaker)), (name, errors)


def test_a_port_in_use_and_ranks_that_never_come(folders, tmp_path):
    todo = {"start_seconds": 2}, {"run": flags(folders, "gqa", "plain")}
    with socket.create_server(("0.0.0.0", 0)) as taken:
        codes, errors = Ranks(tmp_path / "a", 2, *todo, port=taken.getsockname()[1]).wait()
    assert codes == [2, -signal.SIGALRM] and "EADDRINUSE" in errors[0] and not errors[1], errors
    codes, errors = Ranks(tmp_path / "b", 1, {"start_seconds": 2, "world": 2}, todo[1]).wait()
    assert codes == [2] and "The ranks cannot meet at" in errors[0] and "1/2 clients joined" in errors[0], (
        errors
    )


def test_a_person_may_think_for_as_long_as_it_takes(tmp_path):
    """`first` waits without an end, unlike the collectives."""
    assert Ranks(tmp_path / "r", 2, {"patience": 1}, {"think": 4}).results() == [4]


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_all(folders, tmp_path):
    todo = {"patience": 3}, {"stall": flags(folders, "gqa", "standard", "--max_new_tokens", "3000")}
    codes, errors = Ranks(tmp_path / "r", 2, *todo).wait()
    assert codes == [2, 2] and errors[0].splitlines()[-1].startswith(
        "generate.py: Rank 1 died, or does not answer"
    ), errors


# What a rank does


class Count(TorchDispatchMode):
    """Counts collectives, and the bytes that they take in."""

    def __init__(self):
        super().__init__()
        self.found = {"all_reduces": 0, "reduced_bytes": 0, "gathers": 0, "gathered_bytes": 0}
        self.decided = []  # bytes of each broadcast

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for word, calls, size in (
            ("all_reduce", "all_reduces", "reduced_bytes"),
            ("all_gather", "gathers", "gathered_bytes"),
        ):
            if func.namespace == "_c10d_functional" and word in str(func):
                self.found[calls] += 1
                self.found[size] += args[0].nbytes
        if func.namespace == "_c10d_functional" and "broadcast" in str(func):
            self.decided.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def count(folder: str, verify: str) -> dict:
    """The collectives of one verification of 6 rows."""
    tp.connect(torch.device("cpu"), None)
    target = tp.join(quantize.load_model(folder, "cpu", torch.float32, None, tp.shard()), tp.shard())
    head = JudgeHead(torch.zeros(96), torch.tensor(0.0), 0.5, "", {})
    engine = generate.Engine(target, target, head, generate.Settings(verify, speculate_k=5), [], 40)
    engine.prefill([1, 2, 3])
    with Count() as counted:
        engine.steps(engine.visible(20), 5)[1]()
    gather = engine.settings.needs_probabilities
    assert counted.found == traffic(target.args, 6, dist.get_world_size(), 4, 6, gather=gather), counted.found
    return counted.found


@torch.inference_mode()
def count_decisions(folder: str) -> list[list[int]]:
    """Bytes of each broadcast of a round of 5 draft tokens, by rule, placement of the draft and temperature."""
    whole = quantize.load_model(folder, "cpu", torch.float32)
    part = tp.join(quantize.load_model(folder, "cpu", torch.float32, None, tp.shard()), tp.shard())
    found = []
    for verify, draft, temperature in (("kl", part, 0.0), ("kl", part, 0.8), ("kl", whole, 0.0), ("kl", whole, 0.8),
                                       ("standard", part, 0.0), ("plain", None, 0.0), ("plain", None, 0.8)):  # fmt: skip
        settings = generate.Settings(verify, speculate_k=5, temperature=temperature)
        engine = generate.Engine(part, draft, None, settings, [], 40)
        engine.prefill([1, 2, 3])
        with Count() as counted:
            engine.round(20)
        found.append(counted.decided)
        if verify == "kl":
            expected = decisions(5, replicated=draft is whole, sampled=temperature > 0)
            assert counted.decided == expected, (draft is whole, temperature)
    return found


def ties() -> list[int]:
    """The most likely of 640 tokens in rows with equal ones, which the ranks share."""
    rows = torch.zeros(6, 640)
    for row, places in enumerate([(), (5, 6), (17, 600), (322, 323), (0, 639), (639,)]):
        rows[row, list(places)] = 1.0
    rows -= 3
    part = rows.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    assert torch.equal(tp.whole(part, 640), rows)
    found, peaks = tp.most_likely(part, 640)
    assert torch.equal(found, rows.argmax(-1)) and torch.equal(peaks.float(), rows.amax(-1))
    return found.tolist()


def memory(folder: str) -> list[tuple[int, int, int]]:
    """Of every rank: growth of its own memory while loading, at the most; bytes read; bytes of the model."""

    def own() -> int:
        return next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").open()
            if line.startswith("RssAnon")
        )

    def fetched() -> int:  # by system calls; what is mapped into memory does not count, and must not be much
        return next(int(line.split()[1]) for line in Path("/proc/self/io").open() if line.startswith("rchar"))

    before, peak, done, start = own(), [0], threading.Event(), fetched()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    loaded = quantize.load_model(folder, "cpu", None, None, tp.shard())
    read = fetched() - start
    done.set()
    thread.join()
    found = [None] * dist.get_world_size()
    size = 4 * loaded.args.n_params
    dist.all_gather_object(found, (peak[0], loaded.bytes_read, read, size))
    return found


def disturb(what: str) -> None:
    """Makes this rank one that goes wrong."""
    collect, plainly, rounds = generate.Engine.collect, generate.Engine.generate, []

    def counted(engine, slot):
        rounds.append(slot)
        if len(rounds) == 5:
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "fail":
                raise ZeroDivisionError("the defect")
            if tp.RANK == 1:
                time.sleep(15)
        return collect(engine, slot)

    if what in ("round", "ignore"):
        round_otherwise()
        if what == "ignore":
            ignore_rank_0()
    elif what == "other_seed":
        ignore_rank_0()
        generate.Engine.generate = lambda self, prompt, new, seed=0, keep=0: plainly(
            self, prompt, new, seed + 1, keep
        )
    else:
        generate.Engine.collect = counted


def round_otherwise() -> None:
    """Makes this rank's kernels round unlike another's, far more than any do, and its clock go wrong."""

    def off(x):
        numbers = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x * (1 + 0.15 * torch.cos(1e3 * x)) if numbers else x

    def after(owner, name: str) -> None:
        exact = getattr(owner, name)
        setattr(owner, name, lambda *args, **more: off(exact(*args, **more)))

    for owner, name in ((kernels, "linear"), (model.RMSNorm, "forward"), (JudgeHead, "score"),
                        (generate, "distribution"), (generate, "mixture")):  # fmt: skip
        after(owner, name)
    mask, timed = generate.rule_mask, generate.Engine.timed_round
    generate.rule_mask = lambda name, *args, **more: mask(name, *map(off, args), **more)
    generate.Engine.timed_round = lambda engine, length, m: timed(engine, length, m) / m**2


def ignore_rank_0() -> None:
    """Makes this rank go by what it finds itself, though it takes part in all that is sent."""
    broadcast, first = tp.broadcast, tp.first
    tp.broadcast = lambda *vectors: (broadcast(*vectors), vectors)[1]
    tp.first = lambda action: (first(action), action())[1]


def main(todo: list[dict]) -> None:
    if "start_seconds" in todo[0]:
        tp.START, os.environ["WORLD_SIZE"] = (
            todo[0]["start_seconds"],
            str(todo[0].get("world", os.environ["WORLD_SIZE"])),
        )
        del todo[0]
    if "patience" in todo[0]:
        tp.PATIENCE = timedelta(seconds=todo.pop(0)["patience"])
    with tp.ranks("generate.py"):
        for each in todo:
            ((what, given),) = each.items()
            what, _, whose = what.partition(" ")  # "die 1": what rank 1 does, where the others run
            if what == "decisions":
                print(json.dumps(count_decisions(given)))
            elif what == "count":
                print(json.dumps(count(*given)))
            elif what == "ties":
                print(json.dumps(ties()))
            elif what == "think":
                print(tp.first(lambda given=given: time.sleep(given) or given))
            elif what == "memory":
                print(json.dumps(memory(given)))
            else:
                if what != "run" and whose in ("", str(tp.RANK)):
                    disturb(what)
                cli.run_script("generate.py", lambda given=given: generate.run(generate.parse_args(given)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
