"""Protects: what the compiled steps launch on a GPU, and its machine code, within budgets; and the tool that counts it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from conftest import ROOT

import kernels
from cli import InputError
from scripts import gpu_dry_run
from scripts.lib import no_gpu

pytest.importorskip("triton")
from scripts.lib import machine_code

LAYER = {  # mode of an 8B -> step -> the most kernels a layer; the draft is a 1B
    "none": {"plain": 5, "draft_next": 5, "verify": 9},
    "int8": {"verify": 10},
    "int4": {"verify": 10},
    "fp8": {"verify": 10},
}
FIRST_STEP = 9  # kernels a layer of a round's first draft step
PROGRAMS = {"plain": 128, "draft_next": 128, "verify": 128}  # the fewest that the vocabulary's argmax runs in
PRODUCTS = {  # mode -> rows -> the most instructions of its main loop at 64 x 128
    "int8": {1: 280, 21: 375},
    "fp8": {1: 280, 21: 380},
    "int4": {1: 300, 21: 300},
}


def dry_run(tmp_path, *flags: str) -> dict:
    """The figures of one run on a capability."""
    out = tmp_path / "figures.json"
    gpu_dry_run.main([*flags, "--out", str(out)])
    return json.loads(out.read_text())["reports"][0]


def printed_by(program: str) -> list[str]:
    """The lines of a program in a process of its own, where Triton compiles instead of interpreting."""
    command, environment = (
        [sys.executable, "-W", "ignore", "-c", program],
        os.environ | {"TRITON_INTERPRET": "0"},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_layers(report: dict, mode: str) -> None:
    """A kernel more costs 2.5 us a layer. If it cannot be helped: docs/changing.md, "A GPU kernel"."""
    for name, most in LAYER[mode].items():
        step = report["steps"][name]
        too_many = f'{name}: {step["layer"]["kernels"]} kernels a layer, at most {most}; see docs/changing.md, "A GPU kernel"'
        assert step["layer"]["kernels"] <= most, too_many
        assert not step["graph_breaks"] + step["host_syncs"] + step["cache_copies"], name
        assert step["bytes_needed"] < step["bytes_moved"] < 1.5 * step["bytes_needed"], name


@pytest.mark.slow
def test_steps_of_a_bf16_pair_stay_within_their_launches(tmp_path, capsys):
    """The counts of a layer are differences of lowerings, so that nothing outside of layers is in them."""
    report = dry_run(tmp_path, "--steps", *LAYER["none"])
    check_layers(report, "none")
    for name, fewest in PROGRAMS.items():
        assert report["steps"][name]["least_programs_of_the_vocabulary"] >= fewest, name
    plain, verify = report["steps"]["plain"], report["steps"]["verify"]
    assert verify["layer"]["cublas"] == 4 == verify["layer"]["products"] == plain["layer"]["products"]
    assert verify["cublas"] == 4 * 32 + 1 and plain["kernels"] == sum(
        plain[kind] for kind in gpu_dry_run.KINDS
    )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["reports"][0]["steps"]["plain"]["kernels"] == plain["kernels"]


def test_a_quantised_verification_stays_within_its_launches(tmp_path):
    check_layers(dry_run(tmp_path, "--steps", "verify", "--mode", "int8"), "int8")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4", "fp8"])
def test_other_modes_stay_within_their_launches(tmp_path, mode):
    rule = {"int4": ("--verify", "kl"), "fp8": ("--verify", "judge")}[mode]
    report = dry_run(tmp_path, "--steps", "verify", "draft_first", "--mode", mode, *rule)
    check_layers(report, mode)
    assert report["steps"]["draft_first"]["layer"]["kernels"] <= FIRST_STEP


@pytest.mark.slow
@pytest.mark.parametrize("mode", PRODUCTS)
def test_products_spill_nothing_and_load_wide(tmp_path, mode):
    """By every one of kernels.TILINGS, of 1 to 64 rows; a 4096-wide model has the 8B's products."""
    shapes = "--preset", "4096x2", "--draft_preset", "64x2"
    report = dry_run(tmp_path, "--steps", "--mode", mode, "--rows", "1", "21", "64", *shapes)
    found = [row for row in report["by_rows"] if row["tiling"] and row["head_dim"] == 64]
    assert len({row["tiling"] for row in found}) == len(kernels.TILINGS) and {
        row["rows"] for row in found
    } == {1, 21, 64}
    for row in found:
        assert row["unit"] != "fma" and row["fits"], row
        assert not row["spills"] and not row["stack"], row
        assert row["loop_loads"] and not row["loop_loads"].get("16"), row
    for rows, most in PRODUCTS[mode].items():
        some = [row for row in found if row["rows"] == rows and "block_n=64, block_k=128, " in row["tiling"]]
        assert some and all(0 < row["loop_instructions"] <= most for row in some), rows


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_spills_nothing(tmp_path, precision):
    """Of heads of 128 (the 8B) and of 64 (the 1B), of 1 to 64 rows."""
    rows = "1", "2", "21", "64"
    report = dry_run(tmp_path, "--steps", "--rows", *rows, "--precision", precision)
    assert {row["head_dim"] for row in report["by_rows"]} == {64, 128}
    for row in report["by_rows"]:
        assert not row["spills"] and not row["stack"] and row["fits"], row


@pytest.mark.slow
def test_with_pdl_every_kernel_of_ours_waits(tmp_path, capfd):
    """One that did not would read what is not written yet. Inductor's are launched as ever, after all before them."""
    small = "--machine_code", "--preset", "256x2", "--draft_preset", "128x2", "--mode", "int4"
    for flags, waits in (("--pdl",), True), ((), False):
        found = dry_run(tmp_path, *flags, *small, "--steps", "plain", "draft_first", "verify")
        rows = [row for step in found["steps"].values() for row in step["machine_code"]]
        assert (
            {row["kernel"] for row in rows if row["waits"]} == {"attend_part", "attend_join", "product_part"}
            if waits
            else not any(row["waits"] for row in rows)
        )
        assert all(row["waits"] == waits for row in rows if row["kind"] == "own")
    with pytest.raises(SystemExit):
        gpu_dry_run.main(["--pdl", "--capability", "8.0"])
    assert "--pdl needs a GPU of compute capability 9.0 or more" in capfd.readouterr().err


ROOM = """
from scripts.lib import no_gpu
no_gpu.pretend((8, 9))  # of all that we know the least shared memory
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
import kernels
from scripts.lib import machine_code

def run(kernel, *args, grid, warmup, **keywords):
    made = machine_code.compile_only(kernel, grid, args, keywords)
    fits.append(made.metadata.shared <= machine_code.most_shared())

JITFunction.run = run
numbers = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device="cuda")
with FakeTensorMode(), torch.inference_mode():
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 2, 33):
            fits, caches = [], [numbers(1, 8, 640, 128, dtype=dtype) for _ in range(2)]
            pos = numbers(tokens, dtype=torch.long)
            kernels.attend._init_fn(numbers(tokens, 48 * 128, dtype=dtype), numbers(640, 2, 64), pos, *caches)
            print(all(fits), "attend", dtype, tokens)
        x, fits = numbers(64, 4096, dtype=dtype), []
        for tiling in kernels.TILINGS:
            if 128272 % tiling.block_n == 0:  # an LM head with a few tokens more than Llama's
                weight = numbers(128272, 4096, dtype=torch.int8), numbers(128272), 8
                kernels.product_parts._init_fn(x, *weight, kernels.TILINGS.index(tiling), 1)
        print(any(fits), "product", dtype)
"""


@pytest.mark.slow
def test_our_kernels_fit_a_gpu_of_little_shared_memory():
    """In fp32, too, and where a weight's rows leave few tilings to choose from."""
    lines = printed_by(ROOM)
    assert len(lines) == 8 and not any("False" in line for line in lines), lines


PAIRS = """
import re
from scripts.lib import no_gpu
no_gpu.pretend((9, 0))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
import kernels
from scripts.lib import machine_code

def run(kernel, *args, grid, warmup, **keywords):
    text = machine_code.compile_only(kernel, grid, args, keywords).asm["ttgir"]
    layouts = dict(re.findall("^(#\\w+) = (.*)$", text, re.M))
    line = next(line for line in text.splitlines() if "inline_asm" in line and "bf16x2" in line)
    print(layouts[re.search("xi16, (#\\w+)>", line)[1]])

JITFunction.run = run
with FakeTensorMode(), torch.inference_mode():
    for group, k, rows in ((32, 4096, 1), (32, 4000, 64), (128, 4096, 64), (128, 3968, 1)):
        weight = torch.empty(4096, k // 2, dtype=torch.uint8, device="cuda")
        scales = torch.empty(4096, k // group, 2, dtype=torch.bfloat16, device="cuda")
        x = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda")
        for tiling in range(len(kernels.TILINGS)):
            kernels.product_parts._init_fn(x, weight, scales, 4, tiling, 1)
"""


@pytest.mark.slow
def test_two_neighbours_of_a_row_become_bf16_at_once():
    """The inline PTX takes the first number's scale for both: whatever Triton makes of a block, they share a group."""
    layouts = printed_by(PAIRS)
    first = r"register = \[\[0, 1\]|sizePerThread = \[1, [248]\].* order = \[1, 0\]"
    assert len(layouts) == 4 * len(kernels.TILINGS) and all(re.search(first, one) for one in layouts), layouts


FAULTS = """
import json
from scripts.lib import no_gpu
no_gpu.pretend((9, 0))
import torch
import generate
from scripts.lib import lowering

@torch.library.custom_op("judge_fast::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    return x + x.sum().item()

@waits.register_fake
def shape(x):
    return torch.empty_like(x)

def breaks(model, b):
    torch._dynamo.graph_break()

def reads(model, b):
    b.pos.add_(b.pos.item())

def waits_inside(model, b):
    b.pos.add_(torch.ops.judge_fast.waits(b.pos))

def sends(model, b):
    b.pos.add_(b.pos.cpu().to("cuda"))

def copies(model, b):
    layer = model.layers[0].attention
    layer.k_cache = layer.k_cache.clone()

def nothing(model, b):
    pass

def step(model, b, s, visible):
    FAULT(model, b)
    return REAL(model, b, s, visible)

REAL, generate.plain_step = generate.plain_step, step
request = dict(preset="64x2", draft_preset="64x2", mode="none", draft_mode="none", precision="bf16", rows=[],
               verify="standard", temperature=0.0, speculate_k=4, steps=["plain"], layers=2, cache_length=64,
               capability=[9, 0], machine_code=False, pdl=False)
for FAULT in (nothing, breaks, reads, waits_inside, sends, copies):
    found = lowering.report(request)["steps"]["plain"]
    kinds = ("graph_breaks", "host_syncs", "cache_copies")
    print(json.dumps([FAULT.__name__, [kind for kind in kinds if found[kind]]]))
"""


@pytest.mark.slow
def test_what_must_not_be_is_found():
    assert dict(map(json.loads, printed_by(FAULTS))) == {
        "nothing": [],
        "breaks": ["graph_breaks"],
        "reads": ["host_syncs"],
        "waits_inside": ["host_syncs"],
        "sends": ["host_syncs"],
        "copies": ["cache_copies"],
    }


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;           /* 0x0000000402047981 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ; /* 0x00 */
        /*0030*/                   LDG.E.64 R6, desc[UR4][R2.64] ;            /* 0x00 */
        /*0040*/              @!P0 STL [R1], R4 ;                             /* 0x00 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;      /* 0x00 */
        /*0060*/               @P0 BRA 0x20 ;                                 /* 0x00 */
        /*0070*/               @P1 BRA 0x10 ;                                 /* 0x00 */
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;               /* 0x00 */
        /*0090*/                   BRA 0x90;                                  /* 0x00 */
"""


def test_machine_code_is_read():
    """The inner of two loops that load; widths; a spill under a predicate; the endless branch at the end is no loop."""
    rows = machine_code.instructions(SASS)
    begin, end = machine_code.main_loop(rows)
    assert len(rows) == 10 and (begin, end) == (2, 7)
    assert machine_code.loads(rows[begin:end]) == {"128s": 1, "64": 1}
    assert machine_code.loads(rows[:begin]) == {"16": 1}
    assert sum(row[1] in machine_code.SPILLS for row in rows) == 1


def stopped(capsys, *flags: str) -> str:
    """What a run says that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        gpu_dry_run.main(list(flags))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"limit": "copy", "copy_gb_per_s": 0}))
    assert "'copy_gb_per_s' is 0, and must be a positive" in stopped(capsys, "--measured", str(report))
    assert "int7 must be none, bf16," in stopped(capsys, "--mode", "int7")
    # monkeypatch would take the option away for good where it means to put it back
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "none"))}):
        assert "needs a C++ compiler" in stopped(capsys)
    with monkeypatch.context() as patched:
        patched.setattr(no_gpu, "cuobjdump", lambda: tmp_path / "cuobjdump")
        assert "needs cuobjdump" in stopped(capsys)
    monkeypatch.setattr(kernels, "triton", None)
    assert "needs the package triton" in stopped(capsys)


def test_a_measured_bandwidth_takes_the_place_of_the_assumed(tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"limit": "copy", "copy_gb_per_s": 4000, "read_gb_per_s": 1}))
    step = {"bytes_moved": 4 * 10**9, "kernels": 100, "products": 40}
    costs = gpu_dry_run.costs_of(gpu_dry_run.parse_args(["--measured", str(report)]))
    assert costs.seconds(step) == pytest.approx(1e-3 + 40 * 3e-6 + 60 * 2.5e-6)
    report.write_text(json.dumps({"limit": "read", "copy_gb_per_s": 4000, "read_gb_per_s": 1}))
    with pytest.raises(InputError, match="was not measured on a GPU"):
        gpu_dry_run.costs_of(gpu_dry_run.parse_args(["--measured", str(report)]))
    assumed = gpu_dry_run.costs_of(gpu_dry_run.parse_args(["--gpu", "h200"]))
    assert assumed.bandwidth == pytest.approx(0.9 * 4.8e12)
