"""Protects: plan.py's bytes, seconds and acceptance by hand, and that its predictions are held against what was measured."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantize
from cli import InputError
from model import preset
from scripts import plan
from scripts.lib.gpus import KERNELS, Costs, Gpu, launches
from scripts.plan import Device, Plan, Role, acceptance, accepted, best_m, main, make_role


def whole(name: str, dtype=torch.bfloat16) -> Role:
    return Role(preset(name), preset(name), dtype, None, 1)


def on(bandwidth: float, product_gap: float = 0, kernel_gap: float = 0, **more) -> Device:
    """A GPU on which kernels end without a gap, unless one is given."""
    return Device(Gpu(80e9, bandwidth, **{"link": 1e11} | more), Costs(bandwidth, product_gap, kernel_gap))


def test_one_gpu_by_hand():
    """A bf16 8B reads its 7,504,924,672 weights but the embedding, and a row of that, and 131,072 bytes of cache a position."""
    read = (8_030_261_248 - 128256 * 4096 + 4096) * 2 + 1000 * 131_072
    assert whole("Llama-3.1-8B").read(1000, 1) == read
    assert whole("Llama-3.1-8B").seconds(on(2e12), "plain", 1000, 1) == pytest.approx(read / 2e12)
    pair = Plan(whole("Llama-3.1-8B"), whole("Llama-3.2-1B"), on(2e12))
    small = whole("Llama-3.2-1B").read(1000, 1)
    expected = (
        read + 4 * 4096 * 2 + 4 * small + 2048 * 2
    )  # five rows of the target; the draft's first step has two
    assert pair.round(4, 1000) == pytest.approx(expected / 2e12)
    assert pair.limit(4, 1000) == pytest.approx(1)


def test_gaps_between_kernels_by_hand():
    """4 products a layer and the LM head; a 1B of 16 layers has 5 kernels a layer in a draft step, 8 in its first, an 8B
    of 32 layers 9 in a verification, and 10 when it is quantised; 4, 5 and 12 stand outside of layers."""
    free, slow = on(2e12), on(2e12, 3e-6, 2e-6)
    pair, dear = (Plan(whole("Llama-3.1-8B"), whole("Llama-3.2-1B"), each) for each in (free, slow))
    step, first = 65 * 3e-6 + (84 - 65) * 2e-6, 65 * 3e-6 + (133 - 65) * 2e-6
    verification = 129 * 3e-6 + (300 - 129) * 2e-6
    assert dear.draft_step(100) - pair.draft_step(100) == pytest.approx(step)
    assert dear.drafting(5, 100) - pair.drafting(5, 100) == pytest.approx(4 * step + first)
    assert dear.round(5, 100) - pair.round(5, 100) == pytest.approx(4 * step + first + verification)
    assert dear.plain(100) - pair.plain(100) == pytest.approx(129 * 3e-6 + (165 - 129) * 2e-6)
    int8 = [replace(each, target=make_role("Llama-3.1-8B", "int8", 1)) for each in (pair, dear)]
    gaps = 129 * 3e-6 + (332 - 129) * 2e-6
    assert int8[1].verification(21, 9) - int8[0].verification(21, 9) == pytest.approx(gaps)
    assert dear.limit(5, 100) == pytest.approx(pair.round(5, 100) / dear.round(5, 100), rel=1e-4)


COUNTS = {  # pairs whose steps are lowered: as they are, and quantised, in shapes of another size
    "none": ["--preset", "Llama-3.1-8B", "--draft_preset", "Llama-3.2-1B"],
    "int8": [
        "--preset",
        "Llama-3.1-70B",
        "--draft_preset",
        "Llama-3.1-8B",
        "--mode",
        "int8",
        "--draft_mode",
        "int4",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", COUNTS)
def test_the_kernels_are_those_of_a_dry_run(mode):
    """Where a step launches something else on purpose, count anew in KERNELS (docs/changing.md, "A GPU kernel")."""
    pytest.importorskip("triton")
    script = Path(plan.__file__).with_name("gpu_dry_run.py")
    found = subprocess.run(
        [sys.executable, script, *COUNTS[mode], "--verify", "judge"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    steps = json.loads(found.stdout.splitlines()[-1])["reports"][0]["steps"]
    layers = {"none": (32, 16), "int8": (80, 32)}[mode]
    assert set(steps) == set(KERNELS)
    for name, step in steps.items():
        counted = launches(name, mode != "none", layers[name.startswith("draft")])
        assert step["products"] == counted["products"], name
        # how Inductor splits the last norm depends on the width
        assert abs(step["kernels"] - counted["kernels"]) <= 1, name


@pytest.mark.slow
def test_the_papers_pairs(capsys):
    """Six ways to keep and place a draft on several GPUs, three on one; what was published is a matter of m*."""
    main(["--pairs"])
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])
    assert len(rows) == 3 + 6 + 6 and out.count("H100 ") == 15
    for row in rows:
        whole_round = 20 * row["draft_step_seconds"] + row["verification_seconds"]
        assert whole_round < row["round_seconds"] < whole_round * 1.1 and 0 < row["share_of_limit"] < 1
        assert row["tokens_per_second"] == pytest.approx(18 / row["round_seconds"])
    published = {"Llama-3.1-70B": 141, "Llama-3.1-405B": 129}
    assert "8B bf16, 1B int8, 1 H100 " in out and "70B int8, 8B int4 sharded, 2 H100 " in out
    assert "70B: 141 tokens/s are published on 2 H100; 6 of 6 are expected to be faster" in out
    for row in rows[3:]:
        tie = (row["beats_from"] + 1) / row["round_seconds"]
        assert tie == pytest.approx(published[row["target"]])
    sharded = next(row for row in rows if row["gpus"] == 8 and row["draft_tp"] == "shard")
    whole_draft = next(row for row in rows if row["gpus"] == 8 and row["draft_tp"] == "replicate")
    assert sharded["draft_step_seconds"] < whole_draft["draft_step_seconds"]
    main(["--pairs", "--gpu", "h200", "--m_star", "10"])
    faster = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert faster[0]["tokens_per_second"] == pytest.approx(11 / faster[0]["round_seconds"])
    assert faster[0]["draft_step_seconds"] < rows[0]["draft_step_seconds"]


def test_a_rank_of_sixteen_by_hand():
    """405B in bf16: a rank holds 8 heads and a whole KV head, 3,328 of 53,248 columns and 8,016 tokens of both ends."""
    role = make_role("Llama-3.1-405B", "bf16", 16)
    attention = 16384 * 128 * (8 + 1 + 1 + 8)
    weights = 126 * (attention + 3 * 16384 * 3328 + 2 * 16384) + 2 * 8016 * 16384 + 16384
    assert role.weights() == 2 * weights
    reduced = 253 * 17 * 16384 * 2  # bytes: two a layer and the embedding, 17 rows
    link = (2 * 15 / 16 * reduced + 15 * 17 * 16) / 5e10
    found = role.seconds(on(3e12, link=5e10, latency=30e-6), "verify", 1000, 17)
    assert found == pytest.approx(role.read(1000, 17) / 3e12 + 254 * 30e-6 + link)


def test_acceptance():
    assert accepted(0.5, 3) == 0.5 + 0.25 + 0.125 and accepted(1.0, 7) == 7
    assert accepted(acceptance(12, 16), 16) == pytest.approx(12)
    with pytest.raises(InputError, match="--m_star 17"):
        acceptance(17, 16)


def test_the_best_m_is_the_fastest():
    """A draft that costs nothing should propose without end, one as slow as the target hardly anything."""
    gpu = on(2e12)
    equal = Plan(whole("Llama-3.2-1B"), whole("Llama-3.2-1B"), gpu)
    cheap = Plan(whole("Llama-3.1-405B"), whole("Llama-3.2-1B"), gpu)
    assert best_m(equal, 0.4, 1000) == 1 and best_m(cheap, 0.99, 1000) == plan.LONGEST
    found = best_m(Plan(whole("Llama-3.1-8B"), whole("Llama-3.2-1B"), gpu), 0.8, 1000)
    costs = {m: (0.8 * (1 - 0.8**m) / 0.2 + 1) / (15.2 + 2.5 * m) for m in range(1, 30)}  # GB, roughly
    assert abs(found - max(costs, key=costs.get)) <= 1


def test_the_papers_configurations(capsys):
    main([])
    out = capsys.readouterr().out
    heads = [line for line in out.splitlines() if " on " in line and "H100" in line]
    assert heads == ["Llama-3.1-70B (int8) with Llama-3.1-8B (int8) on 2 H100", "Llama-3.1-405B (int8) with Llama-3.1-8B (int8) on 8 H100",
                     "Llama-3.1-405B (bf16) with Llama-3.1-8B (bf16) on 16 H100"]  # fmt: skip
    figures = json.loads(out.splitlines()[-1])
    assert [one["fits"] for one in figures] == [True] * 3
    assert figures[0]["memory"]["weights"] == pytest.approx(
        (70.55e9 + 8.03e9) / 2, rel=0.06
    )  # int8, embeddings in bf16
    main(["--target", "Llama-3.1-70B", "--gpus", "1"])
    assert "DOES NOT FIT into 80" in capsys.readouterr().out


def test_predictions_are_held_against_measurements(tmp_path, capsys):
    """A report of a model that took twice its bytes' time: every error is -50%."""
    target, draft = plan.benchmark_args.shape_of("128x2"), plan.benchmark_args.shape_of("64x1")
    big, small = (shape.step_bytes(20, torch.float32) for shape in (target, draft))
    rows = [("plain step at 20", big), ("draft loop, M = 4 at 20", 4 * small + 64 * 4), ("verify 5 rows at 20", big + 4 * 128 * 4),
            ("round, M = 4 at 20", big + 4 * 128 * 4 + 4 * small + 64 * 4), ("generate, plain", 1)]  # fmt: skip
    report = {"command": "python scripts/benchmark.py --preset 128x2 --draft_preset 64x1 --verify standard --speculate_k 4",
              "limit": "read", "read_gb_per_s": 10.0, "dtype": "float32",
              "rows": [{"part": part, "ms": 2 * size / 10e9 * 1e3, "bytes": 0} for part, size in rows]}  # fmt: skip
    (tmp_path / "latency_x.json").write_text(json.dumps(report))
    (tmp_path / "other.json").write_text("{}")
    main(["--check", "--benchmarks", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        found["n"] == 4 and found["lowest"] == pytest.approx(-0.5) and found["highest"] == pytest.approx(-0.5)
    )
    main(["--check"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] >= 16
    saved = quantize.weight_bytes(target, torch.float32, None) - quantize.weight_bytes(
        target, torch.float32, quantize.Scheme("int8")
    )
    report["rows"] = [
        {"part": f"int8: {part}", "ms": (size - saved) / 10e9 * 1e3}
        for part, size in (rows[0], rows[2], rows[3])
    ]
    (tmp_path / "latency_x.json").write_text(json.dumps(report))  # a target in another mode: its own bytes
    main(["--check", "--benchmarks", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        found["n"] == 3
        and found["lowest"] == pytest.approx(0, abs=1e-9)
        and found["highest"] == pytest.approx(0, abs=1e-9)
    )


def test_more_than_a_machine_holds_is_linked_more_slowly(capsys):
    main(["--target", "Llama-3.1-405B", "--gpus", "16"])
    slow, said = capsys.readouterr()
    assert "several machines: --link 50 --latency 30" in said
    main(["--target", "Llama-3.1-405B", "--gpus", "16", "--link", "50", "--latency", "30"])
    assert capsys.readouterr() == (slow, "")


@pytest.mark.parametrize("argv, word", [
    (["--target", "Llama-9"], "Llama-9"), (["--target", "Llama-3.1-8B", "--gpus", "3"], "3 ranks cannot share"),
    (["--target", "Llama-3.1-8B", "--bandwidth", "0"], "--bandwidth 0"), (["--gpus", "0"], "--gpus 0"),
    (["--target", "Llama-3.1-8B", "--draft", "64x2"], "do not share a vocabulary"),
    (["--target", "Llama-3.2-1B", "--draft", "Llama-3.1-8B"], "larger than the target"),
    (["--target", "Llama-3.1-8B", "--gpu", "h999"], "invalid choice: 'h999'"),
    (["--target", "Llama-3.1-8B", "--position", "9" * 500], "--position"),
    (["--target", "Llama-3.1-8B", "--position", "9000"], "beyond a cache of 8192"),
    (["--target", "Llama-3.1-8B", "--cache_length", "200000"], "context of 131072"),
    (["--target", "Llama-3.1-8B", "--m_star", "nan"], "--m_star"),
    (["--target", "Llama-3.1-8B", "--bandwidth", "-3"], "--bandwidth"),
    (["--target", "Llama-3.1-8B", "--memory", "inf"], "--memory"),
    (["--target", "9" * 5000 + "x2"], "DIM must be"), (["--target", "a" * 5000], "no preset"),
    (["--target", "no/such"], "is no folder"), (["--target", __file__], "is no folder"), (["--target", "a\0b"], "no preset"),
    (["--pairs", "--target", "Llama-3.1-8B"], "--pairs names models"), (["--pairs", "--gpus", "2"], "--pairs names models"),
    (["--check", "--benchmarks", "/no/such"], "/no/such"), (["--draft", "Llama-3.1-8B"], "--draft needs a target"),
])  # fmt: skip
def test_mistakes_are_one_sentence(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and word in err and err.count("\n") == 1


REPORT = {"command": "python scripts/benchmark.py --preset 128x2 --draft_preset 64x1 --verify standard --speculate_k 4",
          "limit": "read", "read_gb_per_s": 10.0, "dtype": "float32",
          "rows": [{"part": "plain step at 20", "ms": 1.0}, {"part": "draft loop, M = 4 at 20", "ms": 1.0},
                   {"part": "verify 5 rows at 20", "ms": 1.0}, {"part": "round, M = 4 at 20", "ms": 1.0}]}  # fmt: skip
NEW = REPORT | {
    "schema": 2,
    "model": "128x2",
    "draft_model": "64x1",
    "mode": None,
    "draft_mode": None,
    "modes": None,
}


def test_both_schemas_say_the_same(tmp_path):
    """Schema 2 by its fields alone; with modes, and with a folder of the repository named from its root on."""
    assert (
        plan.predictions(REPORT) == plan.predictions(NEW | {"command": "lost"})
        and len(plan.predictions(NEW)) == 4
    )
    old = REPORT | {"command": REPORT["command"] + " --mode int4 --group_size 64"}
    assert plan.predictions(old) == plan.predictions(NEW | {"mode": "int4/64"}) != plan.predictions(NEW)
    several = [{"part": "int8: plain step at 20", "ms": 1.0}]
    old = REPORT | {"rows": several, "command": REPORT["command"] + " --modes none int8 --quantize_lm_head"}
    new = NEW | {"rows": several, "modes": {"none": None, "int8": "int8 with LM head"}}
    assert (
        plan.predictions(old)
        == plan.predictions(new)
        != plan.predictions(NEW | {"rows": several, "modes": {"int8": "int8"}})
    )
    assert plan.predictions(
        NEW | {"model": "checkpoints/demo/target", "draft_model": "checkpoints/demo/draft"}
    )


@pytest.mark.parametrize("change, words", [
    ({"command": 3}, "field 'command'"), ({"command": "python 'x"}, "field 'command'"), ({"command": "python x --rows 1"}, "--rows"),
    ({"command": "python x --help"}, "field 'command'"), ({"command": "python x --preset 1x1"}, "DIM must"),
    ({"limit": "write"}, "'limit'"), ({"limit": ["read"]}, "'limit'"), ({"dtype": "nn"}, "'dtype'"), ({"dtype": None}, "'dtype'"),
    ({"read_gb_per_s": -1.0}, "'read_gb_per_s' is -1"), ({"read_gb_per_s": float("nan")}, "'read_gb_per_s'"),
    ({"read_gb_per_s": float("inf")}, "'read_gb_per_s'"), ({"read_gb_per_s": True}, "'read_gb_per_s'"),
    ({"read_gb_per_s": "3"}, "'read_gb_per_s'"), ({"read_gb_per_s": 0}, "'read_gb_per_s'"),
    ({"rows": {}}, "'rows'"), ({"rows": [3]}, "row 1: field 'part'"), ({"rows": [{"ms": 1}]}, "row 1: field 'part'"),
    ({"rows": [{"part": "plain step at 20", "ms": 0}]}, "row 1: field 'ms'"), ({"rows": [{"part": "plain step at 20"}]}, "row 1: field 'ms'"),
    ({"rows": [{"part": "plain step at 20", "ms": [1]}]}, "row 1: field 'ms'"), ({"rows": [{"part": "verify 0 rows at 20", "ms": 1}]}, "row 1"),
    ({"rows": [{"part": f"plain step at {'9' * 5000}", "ms": 1}]}, "row 1"), ({"rows": [{"part": "x: plain step at 2", "ms": 1}]}, "is not known"),
    ({"rows": [{"part": f"int4/{'9' * 5000}: plain step at 2", "ms": 1}]}, "--mode"),
    ({"schema": 3}, "schema"), ({"schema": [2]}, "schema"), ({"schema": 2}, "field 'model'"),
    (NEW | {"model": "no/such"}, "no/such"), (NEW | {"mode": "int9"}, "int9"), (NEW | {"modes": [1]}, "'modes'"),
    (NEW | {"modes": {"a": 3}}, "'a'"), (NEW | {"draft_model": None}, "needs a draft"), (NEW | {"draft_model": 4}, "'draft_model'"),
])  # fmt: skip
def test_damaged_reports_are_one_sentence(change, words, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(REPORT | change))
    with pytest.raises(SystemExit) as stop:
        main(["--check", "--benchmarks", str(tmp_path)])
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2 and err.count("\n") == 1 and str(tmp_path / "a.json") in err and words in err
    ), err


@pytest.mark.parametrize(
    "content",
    ['{"rows": ' + "[" * 100000, '{"rows": 1' + "0" * 5000 + "}", '{"a": "\\ud800"}', "\udcff", "[]", ""],
)
def test_what_is_no_json_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "a.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        main(["--check", "--benchmarks", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "a.json" in err


def test_lengths_fit_the_context_of_a_folder(tmp_path, capsys):
    """The demo pair's context is 512; a damaged config is named."""
    from checkpoint import DEMO

    main(["--target", str(DEMO / "target"), "--draft", str(DEMO / "draft")])
    assert "caches for 512 tokens" in (said := capsys.readouterr().out) and "at position 512" in said
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main(["--target", str(tmp_path)])
    assert stop.value.code == 2 and str(tmp_path / "config.json") in capsys.readouterr().err


def test_standard_output_full_is_one_sentence():
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, plan.__file__, "--target", "Llama-3.2-1B"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "No space left" in found.stderr
