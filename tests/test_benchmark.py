"""Protects: byte counts, the peers' equality and their imposed acceptance, the report of benchmark.py."""

import json
import re

import pytest
import torch
from conftest import ROOT

from checkpoint import DEMO
from cli import Parser
from model import ModelArgs, preset, random_model
from rope import Llama3Rope
from scripts import benchmark
from scripts.benchmark import Part, as_table, attention_ways, main, summarise
from scripts.lib.benchmark_args import parse_args, shape_of
from scripts.lib.peers import SAID, Peers, twin

SMALL = ["--preset", "64x2", "--draft_preset", "64x1", "--verify", "standard", "--speculate_k", "4", "--positions", "20",
         "--prefill", "70", "--max_new_tokens", "24", "--repeats", "2", "--device", "cpu"]  # fmt: skip


def test_bytes_of_a_step_by_hand():
    """Llama-3.2-1B: 1,235,814,400 weights with the tied LM head counted once, 32,768 numbers of cache a position... in bf16."""
    one_layer = 2048 * 2048 + 2 * 512 * 2048 + 2048 * 2048 + 3 * 8192 * 2048 + 2 * 2048
    weights = 16 * one_layer + 128256 * 2048 + 2048
    assert weights == 1_235_814_400
    cache = 500 * 16 * 8 * 64 * 2 * 2  # positions, layers, KV heads, their size, keys and values, bytes
    assert preset("Llama-3.2-1B").step_bytes(500, torch.bfloat16) == (weights + 2048) * 2 + cache
    assert preset("Llama-3.2-1B").step_bytes(500, torch.bfloat16, 17) == (weights + 17 * 2048) * 2 + cache
    untied = preset("Llama-3.1-8B")  # 8,030,261,248 weights; of the embedding only the row's own is read
    assert untied.step_bytes(0, torch.bfloat16) == (8_030_261_248 - 128256 * 4096 + 4096) * 2
    model = random_model(ModelArgs(48, 2, 6, 2, 64, 101, 8), "cpu", torch.float32)
    read = sum(w.nbytes for name, w in model.named_parameters() if name != "tok_embeddings.weight") + 48 * 4
    assert model.args.step_bytes(10, torch.float32) == read + 10 * 2 * 2 * 8 * 2 * 4


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_the_twin_says_what_the_model_says(tied):
    args = ModelArgs(48, 2, 6, 2, 64, 101, 8, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64), tie_embeddings=tied)
    model = random_model(args, "cpu", torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(10)
    ids = torch.randint(0, 101, (1, 150), generator=torch.Generator().manual_seed(0))
    theirs = twin(model)
    assert (model(ids)[1] - theirs(ids).logits).abs().max() < 1e-3
    assert (
        theirs.model.layers[1].mlp.up_proj.weight.data_ptr()
        == model.layers[1].feed_forward.w13.weight[64:].data_ptr()
    )


@pytest.mark.parametrize("accept", [0, 2, 5])
def test_imposed_acceptance_of_the_peer(accept):
    """It takes as many rounds as the acceptance says, and is over when the figures are taken."""
    target, draft = (
        random_model(ModelArgs(48, n, 6, 2, 64, 101, 8), "cpu", torch.float32, seed=n) for n in (2, 1)
    )
    peers = Peers(target, draft, [5, 6, 7], 36, k=5, accept=accept)
    plain, rounds, forward = peers.generate(peers.target, 36), [], peers.target.forward
    peers.target.forward = lambda *rest, **named: (rounds.append(1), forward(*rest, **named))[1]
    with peers.impose():
        assisted = peers.generate(peers.target, 36, assistant_model=peers.draft)
    assert (assisted[0, 3:] == SAID).all() and assisted.shape == plain.shape
    assert abs(len(rounds) - 36 / (accept + 1)) <= 1
    peers.target.forward = forward
    assert torch.equal(peers.generate(peers.target, 36, assistant_model=peers.draft), plain)


def test_shapes():
    assert shape_of("Llama-3.1-8B") == preset("Llama-3.1-8B")
    wide = shape_of("2048x16")
    assert (wide.n_head, wide.n_kv_head, wide.intermediate_size, wide.vocab_size, wide.n_layer) == (
        32,
        8,
        8192,
        32000,
        16,
    )


def test_the_report(tmp_path, capsys):
    files = ["--out", str(tmp_path / "b.json"), "--profile", str(tmp_path / "trace.json")]
    main([*SMALL, "--rows", "9", "--accept", "3", "--peers", *files])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "b.json").read_text())
    names = [row["part"] for row in report["rows"]]
    expected = {"schema": 2, "model": "64x2", "draft_model": "64x1", "rule": "standard", "threshold": 0.0, "speculate_k": 4,
                "mode": None, "draft_mode": None, "compile": False, "precision": "float32", "device": "cpu",
                "torch": torch.__version__, "imposed_acceptance": 3, "modes": None}  # fmt: skip
    assert report | expected == report and report["commit"] and report["date"] and report["machine"]
    at = {row["part"]: row["positions"] for row in report["rows"]}
    assert (
        at["plain step at 20"] == [20, 20]
        and at["verify 9 rows at 20"] == [20, 28]
        and at["generate, plain"] == [64, 87]
    )
    for row in report["rows"]:
        assert len(row["samples_ms"]) == row["n"] == 2 and row["ms"] == pytest.approx(
            sum(row["samples_ms"]) / 2
        )
        assert [row["ms_min"], row["ms_max"]] == sorted(row["samples_ms"]) and "ms_p25" not in row
    assert names == ["plain step at 20", "draft loop, M = 4 at 20", "verify 5 rows at 20", "verify 9 rows at 20", "round, M = 4 at 20",
                     "prefill of 70 tokens", "generate, plain", "generate, standard", "transformers generate",
                     "transformers generate, assisted"]  # fmt: skip
    plain = report["rows"][0]
    assert plain["bytes"] == shape_of("64x2").step_bytes(20, torch.float32) and plain["n"] == 2
    assert plain["gb_per_s"] == pytest.approx(plain["bytes"] / plain["ms"] / 1e6)
    assert plain["share_of_limit"] == pytest.approx(plain["gb_per_s"] / report["read_gb_per_s"])
    assert report["rows"][1]["bytes"] == 4 * shape_of("64x1").step_bytes(20, torch.float32)
    assert report["tokens_a_round"] == 4 and 0 <= report["host_overhead"] < 1
    noted = {row["part"] for row in report["rows"] if row.get("note") == "imposed acceptance of 3"}
    assert noted == {"generate, standard", "transformers generate, assisted"}
    table = (tmp_path / "b.md").read_text()
    assert table.count("\n| ") == len(names) + 1 and "imposed acceptance of 3" in table
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def part_of(milliseconds: list[float]) -> dict:
    return summarise(Part("x", lambda: 0.0, (5, 9), 1e6, seconds=[ms / 1e3 for ms in milliseconds]), 1e9)


def test_extremes_quartiles_and_noise_by_hand():
    """9 repeats have a least and a most; 21 repeats, 0 to 20 ms, have quartiles at 5 and 15; 3 from 8 to 12 spread over 40%."""
    row = part_of([3, 1, 2, 2, 2, 2, 2, 2, 2])
    assert (row["ms_min"], row["ms"], row["ms_max"], row["noisy"]) == pytest.approx(
        (1, 2, 3, True)
    ) and "ms_p25" not in row
    row = part_of([90, *range(1, 21)])
    assert (row["ms_p25"], row["ms_p75"], row["ms_max"]) == pytest.approx((6, 16, 90)) and row[
        "spread"
    ] == pytest.approx(10 / 11)
    assert part_of([10] * 18 + [1, 99])["noisy"] is False  # two jumps of twenty are no noise of the rest
    loud, calm = part_of([8, 10, 12]), part_of([9.5, 10, 10.5])
    assert (loud["noisy"], calm["noisy"]) == (True, False) and loud["spread"] == pytest.approx(0.4)
    table = as_table([loud, calm])
    assert (
        "| least to most |" in table
        and "8.000 to 12.000" in table
        and "5 to 9" in table
        and table.count("noisy |") == 1
    )
    assert "1 of 2 parts spread over more than 25% of their median" in table
    assert "no part spreads over more than 25%" in as_table([calm]) and "25% to 75%" in as_table(
        [part_of([1.0] * 20)]
    )
    assert part_of([1, 9])["noisy"] is None and "not known" in as_table([part_of([1, 9])])


def test_the_cut_last_round_is_left_out(capsys, monkeypatch):
    """3 of 4 accepted by imposition: 26 tokens are 6 rounds of 4 and 2 tokens of a seventh. An argument may be no UTF-8."""
    monkeypatch.setattr(benchmark, "bandwidth", lambda device: (1e10, 1e10))
    main([*SMALL, "--accept", "3", "--max_new_tokens", "26", "--prefill", "5"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert (report["tokens_a_round"], report["rounds"], report["rounds_cut"]) == (4, 6, 1)
    assert "tokens a round: 4.00 in 6 rounds, without the last" in out
    assert benchmark.printable("a\udcff").encode() == b"a?"


def test_default_positions_fit_the_context():
    """The demo's context is 512, and 17 rows, or those of --rows, must fit behind the position."""
    for flags, position in (([], 495), (["--rows", "33"], 479), (["--preset", "64x1"], 500)):
        args = parse_args(Parser(None), [*flags, "--device", "cpu"])
        benchmark.check_args(args)
        assert args.positions == [position] and args.prefill == [512] and args.max_new_tokens == 200


COMMANDS = {  # of docs/latency.md, benchmarks/README.md and the scripts' docstrings: what of each can run here, None: its flags alone
    "--compile --peers --accept 14": ["--peers", "--accept", "14", "--max_new_tokens", "20"],
    "--compile --peers": None,
    "--compile --preset Llama-3.1-8B --draft_preset Llama-3.2-1B --speculate_k 20 --accept 17": None,
    "--preset Llama-3.1-8B --draft_preset Llama-3.2-1B --accept 17 --speculate_k 20": None,
    "--checkpoint_path DIR --draft_checkpoint_path DIR2 --out benchmarks/mine.json": None,
}  # fmt: skip


def test_every_command_of_the_documents(capsys, monkeypatch, tmp_path):
    texts = [
        (ROOT / name).read_text()
        for name in ("docs/latency.md", "benchmarks/README.md", "scripts/benchmark.py")
    ]
    lines = [
        line
        for text in texts
        for line in re.findall(r"^ *python scripts/benchmark.py +(-[^#\n]*)", text, re.M)
    ]
    assert {line.strip() for line in lines} == COMMANDS.keys()
    monkeypatch.setattr(benchmark, "bandwidth", lambda device: (1e10, 1e10))
    for line, short in COMMANDS.items():
        monkeypatch.chdir(ROOT)
        words = line.replace("DIR2", str(DEMO / "draft")).replace("DIR", str(DEMO / "target")).split()
        benchmark.check_args(parse_args(Parser(None), [*words, "--device", "cpu"]))
        monkeypatch.chdir(tmp_path)
        if short:
            main([*short, "--repeats", "1", "--prefill", "9", "--device", "cpu"])
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_a_round"] == 15


def test_several_modes_in_one_run(capsys):
    """Each mode has every part, and reads the bytes of its own weights."""
    from quantize import Scheme, weight_bytes

    main([*SMALL, "--repeats", "1", "--modes", "none", "int8", "int4/128"])
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    shape, read = shape_of("64x2"), {}
    for mode, scheme in (("none", None), ("int8", Scheme("int8")), ("int4/128", Scheme("int4", 128))):
        assert {f"{mode}: verify 5 rows at 20", f"{mode}: generate, standard"} <= rows.keys()
        read[mode] = rows[f"{mode}: plain step at 20"]["bytes"]
        assert read["none"] - read[mode] == weight_bytes(shape, torch.float32, None) - weight_bytes(
            shape, torch.float32, scheme
        )
    assert len(rows) == 3 * 7 and read["int4/128"] < read["int8"] < read["none"]


def test_a_loaded_folder_is_held_against_cat(capsys):
    main(
        [
            "--speculate_k",
            "2",
            "--positions",
            "9",
            "--prefill",
            "--max_new_tokens",
            "8",
            "--repeats",
            "1",
            "--device",
            "cpu",
        ]
    )
    startup = json.loads(capsys.readouterr().out.splitlines()[-1])["startup"]
    assert (
        startup["target"]["bytes"] > 9e6
        and startup["target"]["load_seconds"] > 0
        and startup["target"]["cat_seconds"] > 0
    )


def test_attention_ways_agree():
    model = ModelArgs(96, 1, 6, 2, 64, 101, 16)
    caches = [torch.randn(1, 2, 64, 16) for _ in range(2)]
    q, pos = torch.randn(1, 5, 6, 16), torch.arange(40, 45)
    hidden = torch.arange(45) > pos[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -float("inf"))
    ways = attention_ways(q, caches, pos, mask, 45, torch.empty(0))  # angles: of attend alone, on a GPU
    by_head = ways["SDPA"]()
    by_row = ways["SDPA, heads as rows"]().view(1, 2, 3, 5, 16).flatten(1, 2)
    assert model.n_head == by_head.shape[1] and torch.allclose(by_head, by_row, atol=1e-5)


@pytest.mark.parametrize("flags, sentence", [
    (["--preset", "Llama-4"], "There is no preset"),
    (["--preset", "65x2"], "must be a multiple of 64"),
    (["--preset", "64x2", "--checkpoint_path", "x"], "both name a model"),
    (["--accept", "17"], "--accept 17 must be between 0 and --speculate_k 16"),
    (["--rows", "1"], "--rows 1 must be"),
    (["--rows", "2000"], "--rows 2000 must be"),
    (["--checkpoint_path", "nowhere"], "nowhere"),
    (["--positions", "600"], "reach 600 tokens, but the context is 512"),
    (["--cache_length", "9"], "--cache_length 9 is too short"),
    (["--cache_length", "4000", "99"], "--cache_length 99 is too short"),
    (["--preset", "64x1", "--accept", "3"], "concern rounds with a draft"),
    (["--draft_preset", "64x1", "--verify", "standard"], "different vocabularies"),
    (["--preset", "64x1", "--draft_preset", "64x1", "--judge_path", "x"], "random weights have no judge"),
    (["--peers", "--max_new_tokens", "1"], "at least 2 tokens"),
    (["--attention", "--profile", "t.json"], "measure nothing else"),
    (["--draft_checkpoint_path", "nowhere"], "nowhere"),
    (["--preset", "64x1", "--cache_length", "1000000000000"], "Not enough memory"),
    (["--positions", "0"], "--positions 0 must be"),
    (["--positions", "500"], "17 rows from there on reach 517 tokens, but the context is 512"),
    (["--preset", "9" * 5000 + "x2"], "DIM must be a multiple"),
    (["--preset", "64x" + "9" * 5000], "LAYERS 1 to 1024"),
    (["--preset", "64x2000"], "LAYERS 1 to 1024"),
    (["--preset", "a" * 5000], "There is no preset"),
    (["--modes", "int4/" + "9" * 5000], "is not"),
    (["--modes", "int8", "int8"], "twice"),
    (["--repeats", "0"], "--repeats 0 must be"),
    (["--max_new_tokens", "9" * 5000], "--max_new_tokens"),
    (["--accept", "-1"], "--accept"),
    (["--out", "/dev/null.json/x.json"], "cannot be written"),
    (["--out", "b.json", "--profile", "b.md"], "a file that --out writes"),
    (["--judge_path", str(DEMO / "judge.safetensors"), "--profile", str(DEMO / "judge.safetensors")], "one of the inputs"),
    (["--profile", str(DEMO / "target" / "config.json")], "one of the inputs"),
    (["--out", "x.txt"], "must end in .json"),
    (["--modes", "int3"], "--mode int3 is not known"),
    (["--modes", "int4/x"], "not of the form int4/GROUP"),
    (["--modes", "int8", "--mode", "int8"], "leave --mode"),
    (["--modes", "int8", "--peers"], "unquantised weights"),
    (["--preset", "64x2", "--draft_preset", "Llama-3.2-1B"], "different vocabularies"),
])  # fmt: skip
def test_mistakes(flags, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*flags, "--device", "cpu"])
    assert end.value.code == 2 and sentence in capsys.readouterr().err and not list(tmp_path.iterdir())
