"""Protects: the error of each mode, packing, products against float64, folders, resuming, what is refused."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import torch
from conftest import DEVICES, ROOT, Peak, make_folder
from safetensors import SafetensorError

import checkpoint
import kernels
import quantize
from checkpoint import DEMO
from cli import InputError
from generate import Engine, Settings
from model import ModelArgs, preset, random_model
from quantize import (
    FORMATS,
    QuantLinear,
    Scheme,
    convert,
    load_model,
    main,
    open_checkpoint,
    pack_int4,
    unpack_int4,
    weight_bytes,
)
from scripts.lib.pair import check_memory

kernels.use_cpu_kernels()
SCHEMES = [
    Scheme("int8"),
    Scheme("fp8"),
    Scheme("int4"),
    Scheme("int4", 64),
    Scheme("int4", 128, symmetric=True),
]
TEXT = [str(scheme) for scheme in SCHEMES]


def unpacked(packed: tuple, scheme: Scheme) -> torch.Tensor:
    return FORMATS[scheme.mode].unpack(*packed)


def quantize_model(model, scheme: Scheme):
    """A loaded model, quantised in place."""
    for name in quantize.grouped_plan(model.args):
        quantize.completer(model.args, scheme)(model, name)
    return model


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Weights with rows of very different sizes, a row of zeros, and an outlier."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1, n)[:, None]
    w[n // 2] = 0
    w[0, 0] = 50 * w[0].abs().max()
    return w


@pytest.mark.parametrize("n, k", [(16, 32), (7, 33), (48, 80), (33, 208), (64, 256)])
def test_error_within_the_bound(n, k):
    """Half a step: of int8 absmax / 127, of e4m3 a sixteenth of the value or half its smallest; int4: see below."""
    w = weights(n, k)
    largest = w.abs().amax(1, keepdim=True)
    error = (unpacked(quantize.quantize(w, Scheme("int8")), Scheme("int8"))[:, :k] - w).abs()
    assert (error <= largest / 127 / 2 * 1.001 + 1e-30).all()
    error = (unpacked(quantize.quantize(w, Scheme("fp8")), Scheme("fp8"))[:, :k] - w).abs()
    assert (error <= torch.maximum(w.abs() / 16, largest / 448 * 2**-10) * 1.001 + 1e-30).all()


@pytest.mark.parametrize("scheme", SCHEMES[2:], ids=TEXT[2:])
@pytest.mark.parametrize("n, k", [(16, 32), (7, 33), (48, 80), (64, 256)])
def test_int4_is_no_worse_than_rounding_and_better_when_searched(scheme, n, k):
    """The search begins at the full range, whose error is half a step; by its own weighted measure it ends below (a group alone may
    lose a little to the rounding of its offset)."""
    w = weights(n, k)
    packed, scales = quantize.quantize(w, scheme)
    padded = torch.nn.functional.pad(w, (0, -k % scheme.group_size))
    assert packed.shape == (n, padded.shape[1] // 2) and scales.shape == (
        n,
        padded.shape[1] // scheme.group_size,
        2,
    )
    groups = padded.unflatten(1, (-1, scheme.group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if scheme.symmetric:
        step = torch.maximum(-low / 8, high / 7).clamp(min=1e-30).bfloat16().float()
        naive = ((groups / step).round().clamp(-8, 7)) * step
    else:
        step = ((high - low) / 15).clamp(min=1e-30).bfloat16().float()
        offset = low.bfloat16().float()
        naive = ((groups - offset) / step).round().clamp(0, 15) * step + offset
    weight = groups.square() + 1e-12
    found = unpacked((packed, scales), scheme).unflatten(1, (-1, scheme.group_size))
    error, bound = ((weight * (x - groups).square()).sum(-1) for x in (found, naive))
    assert (error <= bound * (1.25 if n > 7 else 3) + 1e-12).all() and (
        n == 7 or error.sum() < 0.95 * bound.sum()
    )
    if scheme.symmetric:
        assert torch.equal(scales[..., 1], -8 * scales[..., 0])


def test_packing_of_int4_by_hand():
    q = torch.arange(64).view(2, 32) % 16
    q[1] = 15 - q[1]
    packed = pack_int4(q)
    by_16_bits = (
        packed.view(torch.int16).int() & 0xFFFF
    )  # columns i, 8 + i, 16 + i, 24 + i from the lowest bits on
    assert by_16_bits[0].tolist() == [i | 8 + i << 4 | i << 8 | 8 + i << 12 for i in range(8)]
    assert by_16_bits[1, 3].item() == (12 | 4 << 4 | 12 << 8 | 4 << 12) and packed.shape == (2, 16)
    assert torch.equal(unpack_int4(packed), q.to(torch.uint8))
    q = torch.randint(0, 16, (5, 160), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(q)), q.to(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=TEXT)
@pytest.mark.parametrize("n, k", [(16, 32), (97, 48), (80, 208), (33, 1100)])
@torch.inference_mode()
def test_products_on_a_cpu_against_float64(scheme, n, k):
    """Odd sizes, groups that do not divide, one to 64 rows, and a prefill's many."""
    packed = quantize.quantize(weights(n, k), scheme)
    layer, exact_w = QuantLinear(*packed, n, k, scheme), unpacked(packed, scheme)[:n, :k].double()
    terms = exact_w.abs()  # what rounding is measured by: q * scale and offset, which are summed apart, may be larger than their sum
    if scheme.mode == "int4":
        terms = unpacked((packed[0], packed[1].abs()), scheme)[:n, :k].double()
    for dtype, noise in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        for rows in (1, 2, 3, 4, 5, 6, 7, 16, 17, 20, 21, 31, 33, 49, 64, 65, 130):
            x = torch.randn(1, rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
            y, exact = layer(x), x.double() @ exact_w.T
            assert y.shape == (1, rows, n) and y.dtype == dtype
            size = (x.double().abs() @ terms.T).clamp(min=1e-30)
            assert ((y.double() - exact).abs() / size).max() < noise, rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=TEXT)
@pytest.mark.parametrize("n, k", [(97, 48), (128, 208), (33, 1100)])
def test_products_on_a_gpu_against_float64(scheme, n, k, device):
    """The Triton kernel, in Triton's interpreter where there is no GPU (fp16 there: its bf16 products are wrong)."""
    pytest.importorskip("triton")
    packed = [quantize.pad_rows(part) for part in quantize.quantize(weights(n, k), scheme)]
    exact_w = unpacked(packed, scheme)[:n, :k].double()
    bits = 4 if scheme.mode == "int4" else 8
    fp32, fp16, bf16 = (torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 1.5e-2)
    cases = [(1, *fp32), (17, *fp32), (33, *fp16), (64, *fp32)]
    if device == "cuda":  # tensor cores make fp32 of three products; int4 in bf16 is a way of its own
        cases = [(rows, dtype, 4 * noise) for rows, dtype, noise in cases] + [
            (rows, *bf16) for rows in (1, 21, 64)
        ]
    for rows, dtype, noise in cases:
        x = torch.randn(1, rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = kernels.few_rows(*(part.to(device) for part in (x, *packed)), n, bits).cpu()
        size = (x.double().abs() @ exact_w.abs().T).clamp(min=1e-30)
        assert (
            y.shape == (1, rows, n) and ((y.double() - x.double() @ exact_w.T).abs() / size).max() < noise
        ), rows


@pytest.mark.parametrize(
    "scheme", [Scheme("int8"), Scheme("fp8"), Scheme("int4"), Scheme("int4", 128)], ids=str
)
def test_every_number_of_rows_gives_its_product(scheme):
    """1 to 64 rows in the interpreter, fp32 and fp16, of a weight that no block divides."""
    pytest.importorskip("triton")
    n, k = 17, 144
    packed = [quantize.pad_rows(part) for part in quantize.quantize(weights(n, k), scheme)]
    exact_w = unpacked(packed, scheme)[:n, :k].double()
    for rows in range(1, 65):
        dtype, noise = ((torch.float32, 1e-6), (torch.float16, 4e-3))[rows % 2]
        x = torch.randn(1, rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = kernels.few_rows(x, *packed, n, 4 if scheme.mode == "int4" else 8)
        size = (x.double().abs() @ exact_w.abs().T).clamp(min=1e-30)
        assert y.shape == (1, rows, n) and y.dtype == dtype
        assert ((y.double() - x.double() @ exact_w.T).abs() / size).max() < noise, rows


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4")], ids=["int8", "int4"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_tiling_gives_the_same_product(scheme, device):
    """All that the tuner may choose, with parts of the columns that do not divide."""
    pytest.importorskip("triton")
    n, k = 128, 1100
    packed = [quantize.pad_rows(part) for part in quantize.quantize(weights(n, k), scheme)]
    x = torch.randn(1, 17, k, generator=torch.Generator().manual_seed(0))
    exact, size = (
        y.double() @ w.double().T
        for y, w in ((x, unpacked(packed, scheme)[:n, :k]), (x.abs(), unpacked(packed, scheme)[:n, :k].abs()))
    )
    moved = [part.to(device) for part in (x, *packed)]
    assert len(set(kernels.TILINGS)) == len(kernels.TILINGS)
    for tiling in range(len(kernels.TILINGS)):
        y = (
            kernels.product_parts(*moved, 4 if scheme.mode == "int4" else 8, tiling, 2)
            .cpu()
            .sum(0)[:, :n][None]
        )
        assert ((y.double() - exact).abs() / size.clamp(min=1e-30)).max() < 1e-6, tiling


def bf16_of(word):
    """The two bf16 numbers in 32 bits, the lower first, as float64."""
    halves = torch.stack([word & 0xFFFF, word >> 16], -1).int()
    return torch.where(halves > 32767, halves - 65536, halves).to(torch.int16).view(torch.bfloat16).double()


def run_ptx(text, inputs):
    """What the few kinds of lines of INT4_TO_BF16 do, on int64 tensors that hold 32 bits -> its outputs $0 to $3."""
    found = {f"${number}": value for number, value in inputs.items()}
    for line in re.findall(r"(?:mov|shr|lop3|fma)[^;]*;", text):
        operation, *names = re.split(r"[ ,]+", line.rstrip(";"))
        a = [found[name] if name in found else torch.tensor(int(name, 0)) for name in names[1:]]
        if operation == "fma.rn.bf16x2":
            exact = bf16_of(a[0]) * bf16_of(a[1]) + bf16_of(a[2])
            bits = exact.bfloat16().view(torch.int16).long() & 0xFFFF
            found[names[0]] = bits[..., 0] | bits[..., 1] << 16
        else:
            assert operation in ("mov.b32", "shr.b32", "lop3.b32") and (
                operation != "lop3.b32" or names[4] == "0xEA"
            )
            moved, kept = operation == "mov.b32", operation == "lop3.b32"
            found[names[0]] = a[0] if moved else a[0] & a[1] | a[2] if kept else a[0] >> a[1]
    return [found[f"${number}"] for number in range(4)]


def test_int4_becomes_bf16_as_unpacking_has_it():
    """The inline PTX, line by line: columns, levels, and one rounding of level * scale + offset. No GPU runs it here."""
    pytest.importorskip("triton")
    scheme = Scheme("int4", 32)
    packed, scales = quantize.quantize(weights(64, 256), scheme)
    words = packed.view(torch.int32).long() & 0xFFFFFFFF  # of two times 16 bits
    pairs = (scales.view(torch.int32).long() & 0xFFFFFFFF)[..., 0].repeat_interleave(
        4, 1
    )  # 4 words of 8 columns a group
    scale, offset = (half | half << 16 for half in (pairs & 0xFFFF, pairs >> 16))
    quarters = run_ptx(kernels.INT4_TO_BF16.value, {4: words, 5: scale, 7: offset})
    # of 32 columns quarter q holds 8 q to 8 q + 7, two a word
    ours = torch.stack([bf16_of(quarter).unflatten(1, (-1, 4)) for quarter in quarters], 2).reshape(64, 256)
    exact = unpacked((packed, scales), scheme).double()
    assert ((ours - exact).abs() <= exact.abs() * 2**-8).all() and torch.equal(
        ours, exact.bfloat16().double()
    )


def test_parts_cover_every_column(monkeypatch):
    """Whatever the shape, the GPU and the tiling: at most 8 parts, whole blocks, none beyond the columns' end but the last's."""
    for device_parts in (1, 3, 20, 500):
        monkeypatch.setattr(kernels, "parts_for", lambda device, programs, wanted=2, n=device_parts: n)
        for k in (32, 1120, 4096, 14336):
            number, parts = kernels.cut_for(
                torch.int8, (128, k), (128,), 5, torch.float32, torch.device("cpu"), 8
            )
            block = kernels.TILINGS[number].block_k
            each = -(-k // parts // block) * block  # as product_parts has it
            assert 1 <= parts <= min(8, device_parts) and (parts - 1) * each < k <= parts * each, (
                device_parts,
                k,
            )


@torch.inference_mode()
def test_a_product_is_cut_while_its_step_is_compiled(monkeypatch):
    """And never again, so that nothing is tuned once a step has run."""
    pytest.importorskip("triton")
    packed = [quantize.pad_rows(part) for part in quantize.quantize(weights(64, 128), Scheme("int8"))]
    x, asked, real = torch.randn(1, 2, 128), [], kernels.cut_for

    @torch.compiler.assume_constant_result
    def counted(*shape):
        asked.append(torch.zeros(3).sum().item())  # it may make and use tensors, as tuning does
        return real(*shape)

    monkeypatch.setattr(kernels, "cut_for", counted)
    step = torch.compile(
        lambda x: kernels.few_rows(x, *packed, 64, 8) * 2, fullgraph=True, backend="aot_eager"
    )
    found = [step(x) for _ in range(3)]
    assert len(asked) == 1 and torch.equal(found[0], kernels.few_rows(x, *packed, 64, 8) * 2)


def test_the_fastest_tiling_is_chosen_once_and_kept(monkeypatch, tmp_path, capsys):
    """With a clock of ours: the choice is the fastest that fits, another process finds it, and a damaged file is measured anew."""
    pytest.importorskip("triton")
    asked, cuda = [], torch.device("cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(kernels, "milliseconds", lambda action: (action(), 1.0 + abs(len(asked) - 3))[1])

    def action(tiling):
        asked.append(tiling)
        if len(asked) == 2:
            raise kernels.triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    candidates = list(kernels.TILINGS[:5])
    assert kernels.tune(candidates, action) == candidates[2] and asked == candidates
    monkeypatch.setattr(kernels, "tilings", {"ours": candidates[2]})
    kernels.write_tilings(cuda)
    monkeypatch.setattr(kernels, "tilings", {"theirs": candidates[4]})
    kernels.write_tilings(cuda)
    assert kernels.read_tilings(cuda) == {"ours": candidates[2], "theirs": candidates[4]}
    assert [file.name for file in (tmp_path / "judge-fast").iterdir()] == [kernels.tilings_file(cuda).name]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert kernels.read_tilings(cuda) == {}
    kernels.tilings_file(cuda).write_text('{"ours": [1')
    assert kernels.read_tilings(cuda) == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    kernels.write_tilings(cuda)
    assert "tuned anew next time" in capsys.readouterr().err


@pytest.mark.parametrize("n, k", [(16, 32), (97, 48), (33, 1100)])
@torch.inference_mode()
def test_products_of_fp8_with_fp8(n, k):
    """Against float64 products of what both sides are rounded to; one scale a row of x: a large row leaves the others alone."""
    scheme = Scheme("fp8", dynamic=True)
    packed = quantize.quantize(weights(n, k), scheme)
    layer, exact_w = QuantLinear(*packed, n, k, scheme), unpacked(packed, scheme)[:n, :k].double()
    for rows in (1, 17, 130):
        x = torch.randn(1, rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
        x[0, 0] *= 1000
        scale = x.double().abs().amax(-1, keepdim=True) / 448
        rounded = (x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale
        y, exact, size = layer(x), rounded @ exact_w.T, rounded.abs() @ exact_w.abs().T
        assert y.shape == (1, rows, n) and y.dtype == x.dtype
        assert (
            (y.double() - exact).abs() / size.clamp(min=1e-30)
        ).max() < 2e-2  # a quotient may round to the neighbour
        assert ((y.double() - exact).norm() / exact.norm()) < 4e-3


def test_fp8_takes_every_value_there_is():
    """All 254 finite bytes of e4m3, the tiny ones below its normal range, too."""
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = every[every.float().isfinite()]
    w = torch.zeros(16, 256).to(torch.float8_e4m3fn)
    w[:, : len(finite)] = finite
    for rows in (16, 256):  # by the kernel of few rows, and by that of a prefill
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.eye(256, dtype=dtype)
            y = torch.cat(
                [
                    kernels.cpu_kernels.linear_fp8(part, *quantize.tiles_of_bytes(w, torch.ones(16)), 16)
                    for part in x.split(rows)
                ]
            )
            assert torch.equal(y[: len(finite), 3].float(), finite.float())


def test_tiles_by_hand():
    """Where single weights of 32 rows and 32 (int4: 64) columns come to lie."""
    q = torch.zeros(32, 32, dtype=torch.int8)
    q[21, 6], q[21, 7], q[3, 1] = (
        -5,
        127,
        9,
    )  # row 21: block 1, row 5 of it, second of the second four; columns 6, 7: line 1, second half
    tiles, scales = quantize.tiles_of_int8(q, torch.ones(32))
    flat = tiles.view(torch.uint8).flatten().tolist()
    assert {i: value for i, value in enumerate(flat) if value} == {
        512 + 64 + 16 + 8 + 2: 128 + 5, 512 + 64 + 16 + 8 + 3: 127, 6 + 1: 9}  # fmt: skip
    q = torch.zeros(32, 64, dtype=torch.uint8)
    q[21, 10], q[21, 15], q[3, 0] = (
        5,
        15,
        9,
    )  # columns 10 and 15: line 1, p = 1 in the lower, p = 3 in the upper half of 32 bits
    pairs = torch.arange(128).view(32, 2, 2).bfloat16()
    tiles, scales = quantize.tiles_of_groups(pack_int4(q), pairs)
    words = tiles.view(torch.int32).flatten()
    assert {i: value & 0xFFFFFFFF for i, value in enumerate(words.tolist()) if value} == {
        8 * 16 + 16 + 5: 5 << 4 | 15 << 28, 3: 9}  # fmt: skip
    assert torch.equal(scales.view(2, 2, 16, 2)[1, 1, 5], pairs[21, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with odd sizes in published form: groups that do not divide, a vocabulary of 97."""
    path = tmp_path_factory.mktemp("quantize") / "model"
    make_folder(
        path, seed=3, hidden_size=80, intermediate_size=112, num_attention_heads=4, head_dim=20, scale=2.0
    )
    return path


@pytest.mark.parametrize(
    "scheme",
    [*SCHEMES, Scheme("int8", lm_head=True), Scheme("fp8", dynamic=True)],
    ids=[*TEXT, "int8 with LM head", "fp8 dynamic"],
)
@torch.inference_mode()
def test_a_written_folder_is_what_quantising_while_loading_gives(folder, tmp_path, scheme):
    convert(folder, tmp_path / "out", scheme)
    assert open_checkpoint(tmp_path / "out").scheme == scheme and not (tmp_path / "out.partial").exists()
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    models = [load_model(tmp_path / "out", "cpu"), load_model(folder, "cpu", None, scheme)]
    models.append(quantize_model(load_model(folder), scheme))
    outputs = [model(ids)[1] for model in models]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    unquantised = load_model(folder)
    assert {model.quantization for model in models} == {str(scheme)} and models[
        0
    ].fingerprint == unquantised.fingerprint
    reference = unquantised(ids)[1]
    assert 0 < (outputs[0] - reference).norm() / reference.norm() < (0.4 if scheme.mode == "int4" else 0.1)
    stored = {id(x): x.nbytes for x in models[0].state_dict().values()}
    assert sum(stored.values()) >= weight_bytes(models[0].args, torch.float32, scheme)


def test_what_is_quantised(folder):
    model = load_model(folder, "cpu", None, Scheme("int4"))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["layers.2.attention.wqkv"] == kinds["layers.0.feed_forward.w2"] == "QuantLinear"
    assert kinds["output"] == "Linear" and kinds["tok_embeddings"] == "Embedding"
    assert not any(
        isinstance(weight, torch.nn.Parameter) and weight.shape[0] == 224 for weight in model.parameters()
    )


@pytest.mark.parametrize("scheme, compiled", [
    *[(scheme, False) for scheme in (Scheme("int8"), Scheme("int4"), Scheme("fp8", lm_head=True))],
    *[pytest.param(scheme, True, marks=pytest.mark.slow) for scheme in (Scheme("int8"), Scheme("int4"), Scheme("fp8", lm_head=True))],
], ids=str)  # fmt: skip
def test_decoding_with_quantised_weights(folder, scheme, compiled):
    """Standard is plain, compiled is eager, through the whole engine; a prefill asks the LM head for no row."""
    model = load_model(folder, "cpu", torch.float32, scheme)
    prompt = torch.randint(0, 96, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    plainly = Engine(model, None, None, Settings("plain"), [], 150).generate(prompt, 40).tokens
    engine = Engine(model, model, None, Settings("standard", speculate_k=5, compile=compiled), [], 150)
    result = engine.generate(prompt, 40)
    assert result.tokens == plainly and result.mean_accepted > 4


def pack_int6(w: torch.Tensor, peaks: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (peaks / 31).clamp(min=1e-30)
    a, b, c, d = ((w / scales[:, None]).round() + 32).to(torch.uint8).unflatten(1, (-1, 4)).unbind(2)
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], 2).flatten(1), scales


def unpack_int6(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    x, y, z = weight.unflatten(1, (-1, 3)).unbind(2)
    q = torch.stack([x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2], 2).flatten(1)
    return (q.float() - 32) * scales[:, None]


def pack_int8_groups(
    w: torch.Tensor, peaks: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = w.unflatten(1, (-1, scheme.group_size))
    scales = (groups.abs().amax(2) / 127).clamp(min=1e-30)
    return (groups / scales[..., None]).round().to(torch.int8).flatten(1), scales


NEW = {  # what FORMATS might gain, none of it with a kernel
    "int6": quantize.Format(
        pack_int6,
        unpack_int6,
        lambda n, k, scheme: ((torch.uint8, (n, k * 3 // 4)), (torch.float32, (n,))),
    ),
    "e5m2": quantize.format_by_rows(torch.float8_e5m2, 57344.0),
    "int8 in groups": quantize.Format(
        pack_int8_groups,
        lambda weight, scales: (
            weight.float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]
        ).flatten(1),
        lambda n, k, scheme: ((torch.int8, (n, k)), (torch.float32, (n, k // scheme.group_size))),
        lambda scheme: scheme.group_size,
        ("group_size",),
    ),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) if mode == "int6" else mode for mode in NEW]
)  # which it compiles
def test_a_format_is_one_entry(mode, folder, tmp_path, monkeypatch):
    """Without a kernel it is written, loaded, cut among ranks, and decoded with, also compiled."""
    monkeypatch.setitem(FORMATS, mode, NEW[mode])
    main(["--checkpoint_path", str(folder), "--out", str(tmp_path / "out"), "--mode", mode])
    written, meanwhile = load_model(tmp_path / "out"), load_model(folder, scheme=Scheme(mode))
    assert all(map(torch.equal, written.state_dict().values(), meanwhile.state_dict().values()))
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = load_model(folder)(ids)[1], written(ids)[1]
    assert 0 < (found - expected).norm() / expected.norm() < 0.15
    packed = quantize.quantize(weights(48, 256), Scheme(mode))
    slices = quantize.packed_part((slice(None), slice(64, 192)), (48, 256), Scheme(mode))
    part = [x[slices[suffix]] if slices[suffix] else x for suffix, x in zip(("", "_scale"), packed)]
    assert torch.equal(unpacked(part, Scheme(mode)), unpacked(packed, Scheme(mode))[:, 64:192])
    prompt = ids[0].tolist()
    plainly = Engine(written, None, None, Settings("plain"), [], 150).generate(prompt, 20).tokens
    for compiled in (False, mode == "int6"):
        engine = Engine(
            written, written, None, Settings("standard", speculate_k=5, compile=compiled), [], 150
        )
        assert engine.generate(prompt, 20).tokens == plainly


def test_a_killed_run_resumes(folder, tmp_path, monkeypatch):
    """Finished files are kept, and the folder appears under its name only when it is whole."""
    written, write = [], quantize.write_shard

    def dies(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, *rest)

    monkeypatch.setattr(quantize, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", Scheme("int8"))
    assert not (tmp_path / "out").exists() and len(written) == 2
    with pytest.raises(InputError, match="left of a run with other settings"):
        convert(folder, tmp_path / "out", Scheme("fp8"))
    again = []
    monkeypatch.setattr(
        quantize, "write_shard", lambda file, *rest: (again.append(file.name), write(file, *rest))
    )
    convert(folder, tmp_path / "out", Scheme("int8"))
    assert len(again) == 2 and not set(again) & set(written)  # 3 layers and the rest
    convert(folder, tmp_path / "whole", Scheme("int8"))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_a_run_killed_at_its_ends_resumes(folder, tmp_path, monkeypatch):
    """Before the settings are written, and between the last file and the new name."""
    (tmp_path / "out.partial").mkdir()
    rename = quantize.os.replace

    def dies(source, target):
        if str(target).endswith("out"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(quantize.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", Scheme("int8"))
    monkeypatch.setattr(quantize.os, "replace", rename)
    monkeypatch.setattr(quantize, "write_shard", lambda *rest: pytest.fail("all shards were there"))
    convert(folder, tmp_path / "out", Scheme("int8"))
    assert (
        load_model(tmp_path / "out", "cpu").quantization == "int8"
        and not (tmp_path / "out" / "settings.json").exists()
    )


def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    (folder / "notes.txt").write_text("copied")
    monkeypatch.setattr(quantize.shutil, "copyfile", full)
    with pytest.raises(InputError, match="notes.txt cannot be written: No space"):
        convert(folder, tmp_path / "out", Scheme("int8"))
    (folder / "notes.txt").unlink()


def test_killed_between_the_new_name_and_the_end(folder, tmp_path, monkeypatch, capsys):
    """The folder is whole then: the next run says so, and so does every one after it."""
    unlink = quantize.Path.unlink

    def dies(path, *rest, **more):
        if path.name == "settings.json":
            raise KeyboardInterrupt
        unlink(path, *rest, **more)

    monkeypatch.setattr(quantize.Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", Scheme("int8"))
    monkeypatch.undo()
    assert (tmp_path / "out" / "settings.json").exists()
    with pytest.raises(InputError, match="exists already and is a folder"):
        convert(folder, tmp_path / "out", Scheme("fp8"))
    monkeypatch.setattr(quantize, "write_shard", lambda *rest: pytest.fail("all shards were there"))
    convert(folder, tmp_path / "out", Scheme("int8"))
    assert (
        "out is complete: int8" in capsys.readouterr().err
        and not (tmp_path / "out" / "settings.json").exists()
    )
    with pytest.raises(
        InputError, match="exists already, and is complete: the int8 weights of this very model"
    ):
        convert(folder, tmp_path / "out", Scheme("int8"))


@pytest.mark.parametrize(
    "left", [[], ["settings.json.tmp"], ["settings.tmp", ".tmpAbC123"], ["settings.json"]], ids=str
)
def test_killed_in_its_first_write(folder, tmp_path, left):
    """Nothing was done yet, so nothing is in the way; what was half written is not carried into the folder."""
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_bytes(b'{"sch')
    convert(folder, tmp_path / "out", Scheme("int8"))
    whole = {path.name for path in folder.iterdir()} - {"model.safetensors"}
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == whole | {"model.safetensors.index.json"} | {
        f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)
    }


def test_what_a_killed_write_left_is_not_kept(folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="left of a run with other settings"):
        convert(folder, tmp_path / "out", Scheme("int8"))
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_permissions_follow_the_umask(folder, tmp_path):
    before = os.umask(0o022)
    try:
        convert(folder, tmp_path / "a", Scheme("int8"))
        os.umask(0o027)
        convert(folder, tmp_path / "b", Scheme("int8"))
    finally:
        os.umask(before)
    for name, file_mode, folder_mode in (("a", 0o644, 0o755), ("b", 0o640, 0o750)):
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / name).iterdir()} == {file_mode}
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == folder_mode


def out_cases(tmp_path) -> dict:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.partial").write_text("x")
    (tmp_path / "linked.partial").symlink_to(tmp_path / "empty")
    return {"file": "is a file", "dangling": "a link to nowhere", "loop": "a link to nowhere", "fifo": "is a pipe",
            "empty": "is a folder", "/dev/null": "is a device", "taken": "is no folder; remove it", "linked": "is no folder; remove it",
            "file/below": "file is no folder", "n" * 300: "File name too long"}  # fmt: skip


def test_where_nothing_can_be_written_is_said_before_any_work(folder, tmp_path, monkeypatch):
    for name in ("fingerprint_of", "find_weights"):
        monkeypatch.setattr(checkpoint, name, lambda *rest: pytest.fail("work was done"))
    for name, sentence in out_cases(tmp_path).items():
        with pytest.raises(InputError, match=sentence):
            convert(folder, tmp_path / name, Scheme("int8"))
    monkeypatch.setattr(os, "access", lambda *rest: False)  # as in a folder on a read-only disk
    with pytest.raises(InputError, match="nothing may be made in the folder"):
        convert(folder, tmp_path / "new", Scheme("int8"))
    monkeypatch.undo()
    assert (
        (tmp_path / "fifo").is_fifo()
        and (tmp_path / "file").read_text() == "x"
        and not (tmp_path / "nowhere").exists()
    )


def test_a_second_process_on_the_same_out_is_refused(folder, tmp_path, monkeypatch):
    """The lock is on the open folder, so that a second opening in this process is as one in another."""
    write, refused = quantize.write_shard, []

    def meanwhile(file, *rest):
        with pytest.raises(InputError, match="out.partial is being written by another process"):
            convert(folder, tmp_path / "out", Scheme("int8"))
        refused.append(file)
        write(file, *rest)

    monkeypatch.setattr(quantize, "write_shard", meanwhile)
    convert(folder, tmp_path / "out", Scheme("int8"))
    assert len(refused) == 4
    assert load_model(tmp_path / "out", "cpu").quantization == "int8"


def test_a_full_disk_while_a_shard_is_written(folder, tmp_path, monkeypatch):
    """One sentence, nothing half written, and the same command goes on."""
    calls, save = [], quantize.save_file

    def full(content, path, **more):
        calls.append(path)
        if len(calls) == 3:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(content, path, **more)

    monkeypatch.setattr(quantize, "save_file", full)
    with pytest.raises(
        InputError,
        match="model-00003-of-00004.safetensors cannot be written: .*No space.*the same command goes on",
    ):
        convert(folder, tmp_path / "out", Scheme("int8"))
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == [
        "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors", "settings.json"]  # fmt: skip
    convert(folder, tmp_path / "out", Scheme("int8"))
    assert len(calls) == 5 and load_model(tmp_path / "out", "cpu").quantization == "int8"


def test_a_tokenizer_in_metas_place_goes_along(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "m")
    (source / "original").mkdir()
    (source / "original" / "tokenizer.model").write_bytes(b"x")
    (source / "chat_template.jinja").write_text("y")
    convert(source, tmp_path / "out", Scheme("int8"))
    assert (tmp_path / "out" / "original" / "tokenizer.model").read_bytes() == b"x" and (
        tmp_path / "out" / "chat_template.jinja"
    ).exists()


def test_a_folder_in_another_spelling_is_quantised_alike(folder, tmp_path):
    """Names without model., and a single file beside an older index."""
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("model."): x.clone() for name, x in tensors.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone"}}')
    convert(source, tmp_path / "a", Scheme("int8"))
    convert(folder, tmp_path / "b", Scheme("int8"))
    for file in (tmp_path / "b").glob("model*"):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()


def test_fp8_on_an_older_gpu_is_refused(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda", 0)
    for scheme in (Scheme("fp8"), Scheme("fp8", dynamic=True)):
        with pytest.raises(
            InputError, match="compute capability 8.9 or more; cuda:0 has 8.0: use int8 or int4"
        ):
            quantize.check_device(gpu, scheme)
        with pytest.raises(InputError, match="compute capability 8.9"):
            load_model(folder, gpu, None, scheme)
    for scheme in (None, Scheme("int8"), Scheme("int4")):
        quantize.check_device(gpu, scheme)
    quantize.check_device(torch.device("cpu"), Scheme("fp8"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    quantize.check_device(gpu, Scheme("fp8"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=TEXT)
@torch.inference_mode()
def test_a_prefill_makes_no_copy_of_a_whole_weight(scheme, monkeypatch):
    """Its peak, beside the result, is a slice's: a hundredth of the 4 bytes a number that it once was; the numbers are the same."""
    monkeypatch.setattr(quantize, "SLICE", 1 << 14)
    n, k = 3000, 640
    weight, scales = quantize.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), scheme)
    x = torch.randn(1, 70, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = torch.nn.functional.linear(x, unpacked((weight, scales), scheme)[:, :k].bfloat16())
    with Peak() as peak:
        y = quantize.product_in_slices(x, weight, scales, n, scheme.mode)
    assert torch.equal(y, expected) or (y - expected).abs().max() <= 2**-7 * expected.abs().max()
    args = ModelArgs(k, 1, 1, 1, n, 100, 64)
    slices = quantize.slice_bytes(args, torch.bfloat16, scheme, 70)
    assert y.nbytes < peak.peak < y.nbytes + slices < y.nbytes + n * k
    assert torch.equal(quantize.default_product(x, weight, scales, n, scheme.mode), y)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("fp8"), Scheme("int4")], ids=str)
def test_quantising_takes_what_packing_bytes_says(scheme):
    """The unquantised layer, and what it takes to put it into its packed form, on a CPU."""
    args = ModelArgs(512, 1, 4, 2, 4096, 50, 128)
    with Peak() as peak:
        weight = torch.randn(2 * 4096, 512, dtype=torch.bfloat16)
        layer = QuantLinear(*quantize.quantize(weight, scheme), *weight.shape, scheme)
    kept = sum(buffer.nbytes for buffer in layer.buffers())
    bound = quantize.packing_bytes(args, torch.bfloat16, scheme, "cpu")
    assert peak.peak - kept < bound < 40 * weight.numel(), (peak.peak, kept, bound)
    assert quantize.packing_bytes(args, torch.bfloat16, None, "cuda") == 0
    assert quantize.slice_bytes(args, torch.bfloat16, None, 2048) == 0


def test_what_is_refused(folder, tmp_path, capsys):
    convert(folder, tmp_path / "int8", Scheme("int8"))
    config = json.loads((tmp_path / "int8" / "config.json").read_text())

    def refused(match: str, action) -> None:
        with pytest.raises(InputError, match=match):
            action()

    refused("exists already", lambda: convert(folder, tmp_path / "int8", Scheme("int8")))
    refused("quantised already", lambda: convert(tmp_path / "int8", tmp_path / "b", Scheme("int8")))
    refused("holds int8 weights already", lambda: load_model(tmp_path / "int8", "cpu", None, Scheme("fp8")))
    load_model(tmp_path / "int8", "cpu", None, Scheme("int8"))
    for entry, match in (({"packing": "marlin"}, "packed as 'marlin' cannot be read"), ({"packing": 1}, "packed as 1 cannot be read, only as 2"), ({"scheme": {"mode": "int3"}}, "not one that"),
                         ({"scheme": 3}, "not one that")):  # fmt: skip
        broken = shutil.copytree(tmp_path / "int8", tmp_path / "broken", dirs_exist_ok=True)
        (broken / "config.json").write_text(json.dumps(config | {"judge_fast": config["judge_fast"] | entry}))
        refused(match, lambda: load_model(tmp_path / "broken", "cpu"))
    (broken / "config.json").write_text(
        json.dumps(config | {"judge_fast": config["judge_fast"] | {"scheme": {"mode": "fp8"}}})
    )
    refused(
        "is torch.int8, but its config.json calls for torch.float8_e4m3fn",
        lambda: load_model(tmp_path / "broken", "cpu"),
    )
    make_folder(tmp_path / "tied", tie_word_embeddings=True)
    refused(
        "this LM head is the embedding",
        lambda: convert(tmp_path / "tied", tmp_path / "c", Scheme("int8", lm_head=True)),
    )
    refused("NaN", lambda: quantize.quantize(torch.tensor([[1.0, float("nan")]]), Scheme("int4")))
    refused(
        "NaN or an infinite", lambda: quantize.quantize(torch.tensor([[1.0, float("inf")]]), Scheme("fp8"))
    )
    refused("not in fp16", lambda: load_model(folder, "cpu", torch.float16, Scheme("int8")))
    refused("not in fp16", lambda: load_model(tmp_path / "int8", "cpu", torch.float16))
    refused("--group_size 48", lambda: convert(folder, tmp_path / "c", Scheme("int4", 48)))
    refused("concerns --mode fp8", lambda: convert(folder, tmp_path / "c", Scheme("int8", dynamic=True)))
    refused("concerns --mode int4", lambda: convert(folder, tmp_path / "c", Scheme("int8", symmetric=True)))
    with pytest.raises(SystemExit) as end:
        main(["--checkpoint_path", str(tmp_path / "nowhere"), "--mode", "int8", "--out", str(tmp_path / "c")])
    assert end.value.code == 2 and "nowhere" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_bytes_by_hand():
    """Llama-3.1-8B in int4 with groups of 32: 4 bits and 4 bytes a group; embedding and LM head in bf16."""
    args = preset("Llama-3.1-8B")
    linear = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    other = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert weight_bytes(args, torch.bfloat16, Scheme("int4")) == linear // 2 + linear // 32 * 4 + other
    rows = 32 * (6144 + 4096 + 2 * 14336 + 4096)
    assert weight_bytes(args, torch.bfloat16, Scheme("int8")) == linear + 4 * rows + other
    assert weight_bytes(args, torch.bfloat16, None) == 2 * args.n_params
    free = weight_bytes(args, torch.bfloat16, Scheme("int8"))
    with pytest.raises(InputError, match="Not enough memory"):
        check_memory([args] * 9, 0, torch.bfloat16, torch.device("cpu"), [Scheme("int8")] * 9)
    assert free < 10e9


@pytest.mark.slow
def test_the_demo_in_int8_says_what_it_says_unquantised():
    """Greedy, in fp32, up to near-ties: where the texts part, the unquantised target's two best are close."""
    unquantised, int8 = (
        load_model(DEMO / "target", "cpu", torch.float32, scheme) for scheme in (None, Scheme("int8"))
    )
    from tokenizer import load_tokenizer

    tokenizer, same = load_tokenizer(DEMO / "target"), 0
    for i in range(8):
        text = f"Mia has {41 + i} apples. She buys {30 + 3 * i}. She multiplies it by 3. She sells {50 + i}. How many apples now?"
        prompt = tokenizer.prompt(text)
        one, other = (
            Engine(model, None, None, Settings("plain"), tokenizer.stop_ids, 200).generate(prompt, 120).tokens
            for model in (unquantised, int8)
        )
        if one == other:
            same += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
        with torch.inference_mode():
            best = unquantised(torch.tensor([prompt + one[:at]]))[1][0, -1].topk(2).values
        assert best[0] - best[1] < 0.5, f"token {at} differs, and is no near-tie: {best.tolist()}"
    assert same >= 4


def test_random_models_are_quantised_layer_by_layer():
    args = ModelArgs(64, 2, 4, 2, 96, 101, 16)
    scheme = Scheme("int4")
    at_once = random_model(args, "cpu", torch.float32, complete=quantize.completer(args, scheme))
    after = quantize_model(random_model(args, "cpu", torch.float32), scheme)
    assert all(torch.equal(a, b) for a, b in zip(at_once.state_dict().values(), after.state_dict().values()))


def test_the_command_line(capsys, tmp_path):
    """--mode and --draft_mode on the demo pair: another kind of weights, said at the start; the bound does not cover it."""
    from generate import main as generate_main

    flags = ["--device", "cpu", "--prompt", "Mia has 47 apples. She buys 38. How many apples now?"]
    generate_main([*flags, "--mode", "int8", "--draft_mode", "int4", "--json"])
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["dtype"] == "float32 int8" and "47+38=85" in record["text"]
    assert "target: weights" in err and "MB int8" in err and "draft: weights" in err and "MB uint8" in err
    assert "No guarantee" in err and "this run has a2b01e457b88867e int4" in err
    convert(DEMO / "target", tmp_path / "int8", Scheme("int8"))
    generate_main([*flags, "--checkpoint_path", str(tmp_path / "int8"), "--draft_checkpoint_path", str(DEMO / "draft"),
                   "--draft_mode", "int4", "--judge_path", str(DEMO / "judge.safetensors"), "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["tokens"] == record["tokens"]
    generate_main([*flags, "--draft_mode", "int8", "--json"])  # nor does the bound cover another draft
    assert "No guarantee" in capsys.readouterr().err
    for more, sentence in ((["--mode", "int8", "--symmetric"], "concerns --mode int4"), (["--group_size", "64"], "says how to quantise"),
                           (["--dynamic_activations"], "says how to quantise")):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            generate_main([*flags, *more])
        assert end.value.code == 2 and sentence in capsys.readouterr().err


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import quantize

def counted(call):
    def inner(*args, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **more)
    return inner

for name in ("replace", "unlink", "chmod", "mkdir", "open"):
    setattr(os, name, counted(getattr(os, name)))
quantize.save_file = counted(quantize.save_file)
for left in [*range(2, 60, 7), 1000]:
    if not (child := os.fork()):
        quantize.convert(quantize.Path(sys.argv[2]), quantize.Path(sys.argv[3]), quantize.Scheme("int8"))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_killed_at_any_moment(folder, tmp_path):
    """SIGKILL after ever more of a run, each on what the one before it left: the end is that of one undisturbed run."""
    convert(folder, tmp_path / "whole", Scheme("int8"))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    command = [sys.executable, "-c", KILLED, str(ROOT), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    codes = list(map(int, done.stdout.split()))
    assert codes.count(-signal.SIGKILL) >= 3 and set(codes) <= {0, -signal.SIGKILL, 1}, done.stderr
    assert "Traceback" not in done.stderr or "exists already, and is complete" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
