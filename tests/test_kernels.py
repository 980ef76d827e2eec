"""Protects: products and attention of a few rows against float64, where they are used, and what a step may look at."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right

import kernels
from model import ModelArgs, Transformer, random_model
from rope import apply_rope, rope_table

kernels.use_cpu_kernels()
ARGS = ModelArgs(48, 2, 6, 2, 64, 101, 16, max_position=4096)


@pytest.mark.parametrize("dtype, noise", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("n, k", [(16, 32), (20, 48), (208, 160), (1024, 512), (48, 8192)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 31, 33, 48, 49, 64])
@torch.inference_mode()
def test_linear_against_float64(dtype, noise, n, k, rows):
    generator = torch.Generator().manual_seed(n + k + rows)
    x, w = (torch.randn(size, k, generator=generator).to(dtype) for size in (rows, n))
    if rows > kernels.most_rows(dtype, n, k):
        with pytest.raises(RuntimeError, match=f"{rows} rows of {n} x {k}"):
            kernels.cpu_kernels.linear(x, w)
        return
    y = kernels.cpu_kernels.linear(x[None], w)
    exact = x.double() @ w.double().T
    assert y.shape == (1, rows, n) and y.dtype == dtype
    assert (y[0].double() - exact).abs().max() <= noise * exact.abs().max()
    assert torch.equal(kernels.linear(x, w), y[0])  # what the model calls, and it gives the same each time


@pytest.mark.parametrize("home", ["a file", "read-only", "missing"])
def test_kernels_are_kept_elsewhere_where_the_cache_cannot_be_written(tmp_path, monkeypatch, capsys, home):
    """A HOME that cannot be written is not a missing compiler; another user's folder is not trusted."""
    place = tmp_path / "home"
    if home == "a file":
        place.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place) if home != "missing" else "/proc/no/such")
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    if home == "read-only":
        monkeypatch.setattr(kernels.os, "access", lambda *_: False)
    own = kernels.usable_cache()
    assert (
        own.parent == tmp_path
        and own.stat().st_mode & 0o777 == 0o700
        and "kernels are kept in" in capsys.readouterr().err
    )
    own.chmod(0o777)
    with pytest.raises(OSError, match="not this user's own"):
        kernels.usable_cache()


@torch.inference_mode()
def test_linear_takes_what_is_faster_and_leaves_the_rest():
    most = kernels.most_rows
    assert most(torch.float32, 8192, 2048) == 32 and most(torch.float32, 320, 192) == 2
    assert most(torch.bfloat16, 2048, 8192) in (4, 64)  # without and with AMX
    assert (
        most(torch.float16, 320, 192) == 0
        and most(torch.float32, 321, 192) == 0
        and most(torch.float32, 320, 7) == 0
    )
    x, w = torch.randn(3, 192), torch.randn(320, 192)
    assert torch.equal(kernels.linear(x, w), F.linear(x, w)) and kernels.linear(x[:0], w).shape == (0, 320)
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.randn(320, 192, requires_grad=True)
        assert kernels.linear(torch.randn(1, 192), w).requires_grad  # training goes through PyTorch


def test_the_largest_in_two_stages_is_the_lowest_of_equals():
    """As argmax has it, ties within a block, between blocks and in the last, short one; NaN wins, -inf fills a part up."""
    generator = torch.Generator().manual_seed(0)
    for width in (513, 768, 1000, 5_000):
        x = torch.randint(-3, 3, (40, width), generator=generator).float()
        x[1, width - 1], x[2] = 9, -float("inf")
        x[3, [7, 300, width - 1]] = 9
        x[4, [300, 301]] = 9
        value, index = kernels.largest_by_blocks(x)
        first = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(index, first) and torch.equal(value, x.amax(-1)), width
        x[5, 400] = float("nan")
        assert kernels.largest_by_blocks(x)[0][5].isnan() and kernels.largest(x)[0][5].isnan()


@pytest.mark.gpu
@torch.inference_mode()
def test_logits_and_the_largest_on_a_gpu_are_those_of_a_cpu():
    """fp32 sums of bf16 products where they are asked for, and the lowest of equals."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 256, generator=generator).bfloat16() for n in (5, 1000))
    y = kernels.linear(x.cuda(), w.cuda(), wide=True)
    assert y.dtype == torch.float32 and torch.allclose(y.cpu().double(), x.double() @ w.double().T, atol=1e-3)
    ties = torch.randint(0, 4, (21, 128256), generator=generator).float()
    value, index = kernels.largest(ties.cuda())
    assert torch.equal(value.cpu(), ties.amax(-1)) and torch.equal(index.cpu(), (ties == 3).int().argmax(-1))


@pytest.mark.parametrize("dtype, noise", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@torch.inference_mode()
def test_a_product_of_a_norm_is_the_product_of_the_norm(dtype, noise):
    """As a compiled step on a GPU takes it, one kernel of Inductor's; in float64, the norm first and then the product."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 1, 320, generator=generator) * 30, torch.randn(96, 320, generator=generator)
    gain = torch.rand(320, generator=generator)
    x, w, gain = (part.to(dtype) for part in (x, w, gain))
    for eps in (1e-5, 300.0):  # the second one counts beside the mean square
        normed = x.double() * torch.rsqrt(x.double().square().mean() + eps) * gain.double()
        exact = normed @ w.double().T
        y = kernels.linear_of_norm(x, gain, eps, w)
        assert y.shape == (1, 1, 96) and y.dtype == dtype
        assert (y.double() - exact).abs().max() <= noise * exact.abs().max(), eps


def exact_attention(q, k, v, pos):
    """float64: q (T, H, D), k and v (KV, length, D), pos (T,) -> (T, H, D)."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = torch.einsum("thd,hnd->htn", q.double(), k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.arange(k.shape[1]) > pos[:, None], -float("inf"))
    return torch.einsum("htn,hnd->thd", scores.softmax(-1), v)


def filled_cache(generator, n_kv, length, d, end, dtype):
    """K and V caches with what no step may see, positions from `end` on, made unmistakable."""
    k, v = (torch.randn(1, n_kv, length, d, generator=generator).to(dtype) for _ in range(2))
    k[:, :, end:] = 1e4
    v[:, :, end:] = 1e4
    return k, v


SHAPES = [(2, 3, 20, 700), (1, 1, 32, 400), (2, 4, 128, 900)]


def check_attend(device, n_kv, group, d, length, rows, lasts, dtype, noise):
    """The Triton kernel against float64, the last row at each of the positions `lasts`: what it returns, and the caches,
    where it writes its own rows and nothing else."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(rows)
    table = rope_table(replace(ARGS, head_dim=d), length, "cpu")
    for last in lasts:
        pos = torch.arange(last - rows + 1, last + 1)
        k, v = filled_cache(generator, n_kv, length, d, int(pos[0]), dtype)
        qkv = torch.randn(rows, (group + 2) * n_kv * d, generator=generator).to(dtype)
        moved = [x.to(device) for x in (qkv, table, pos, k, v)]
        y = kernels.attend(*moved).cpu().view(rows, n_kv * group, d)
        q, own_k, own_v = qkv.view(1, rows, -1, d).split([n_kv * group, n_kv, n_kv], dim=2)
        q, own_k = (apply_rope(x.double(), table[pos].double()).to(dtype) for x in (q, own_k))
        k[0, :, pos], v[0, :, pos] = own_k[0].transpose(0, 1), own_v[0].transpose(0, 1)
        exact = exact_attention(q[0], k[0], v[0], pos)
        assert (y.double() - exact).abs().max() < noise, (dtype, last)
        written = moved[3].cpu()[0, :, pos].double() - k[0, :, pos].double()
        assert written.abs().max() < noise and torch.equal(moved[4].cpu(), v), (dtype, last)
        elsewhere = torch.ones(length, dtype=torch.bool).index_fill(0, pos, False)
        assert torch.equal(moved[3].cpu()[:, :, elsewhere], k[:, :, elsewhere]), (dtype, last)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("n_kv, group, d, length", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 33, 65])
def test_attend_against_float64(device, n_kv, group, d, length, rows):
    """At the borders of its blocks and parts; in Triton's interpreter, where a program takes ms, on a CPU."""
    shape = n_kv, group, d, length, rows
    check_attend(device, *shape, (rows - 1, 64, 127, 128, length - 1), torch.float32, 1e-5)
    # the interpreter's bf16 is wrong
    other, noise = (torch.float16, 4e-3) if device == "cpu" else (torch.bfloat16, 3e-2)
    check_attend(device, *shape, (129,), other, noise)


@pytest.mark.parametrize(
    "shape, rows, lasts",
    [
        *[(SHAPES[1], rows, [rows - 1, 64, 127, 128, 399]) for rows in (1, 2, 17, 33, 65)],
        *[(SHAPES[0], rows, [rows - 1, 64, 127, 128, 699]) for rows in (1, 17)],
        (SHAPES[0], 43, [42, 699]),  # 129 rows a head: one more than a block takes
        (SHAPES[2], 2, [1, 64, 127, 128, 899]),
        (SHAPES[2], 33, [899]),
    ],
)
def test_attend_in_the_interpreter(shape, rows, lasts):
    """What the test above does, where a CPU is quick: few rows, or few positions."""
    check_attend("cpu", *shape, rows, lasts, torch.float32, 1e-5)
    if rows * shape[1] <= 33:
        check_attend("cpu", *shape, rows, [129], torch.float16, 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rows, joined_at_once", [(1, True), (5, False)])
def test_attend_at_the_end_of_the_longest_context(rows, joined_at_once):
    """The last positions of 131,072, in parts of thousands; of few rows the last program joins them."""
    group = 2
    assert (rows * group <= 8) == joined_at_once
    check_attend("cpu", 1, group, 16, 131072, rows, [131071], torch.float16, 4e-3)


def test_attend_leaves_its_counters_at_zero():
    """A count that is left over would join too early, or never, in the next layer."""
    pytest.importorskip("triton")
    for last in (0, 63, 64, 399):
        check_attend("cpu", 2, 3, 20, 700, 1, [last], torch.float32, 1e-5)
        assert not kernels.arrivals(torch.device("cpu")).any()


def test_attend_of_the_first_draft_step_at_position_0():
    """Both rows are position 0 then: one visible position."""
    pytest.importorskip("triton")
    k, v = filled_cache(torch.Generator().manual_seed(0), 1, 64, 16, 0, torch.float32)
    qkv = torch.randn(1, 48).expand(2, 48)  # the same token twice
    y = kernels.attend(qkv, rope_table(ARGS, 64, "cpu"), torch.zeros(2, dtype=torch.long), k, v)
    assert torch.allclose(y.view(2, 16), qkv[:, 32:]) and torch.equal(v[0, 0, :1], qkv[:1, 32:])
    assert (v[0, 0, 1:] == 1e4).all() and (k[0, 0, 1:] == 1e4).all()


@pytest.mark.parametrize("dtype, noise", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [1, 2, 17, 33])
@torch.inference_mode()
def test_attention_over_a_window_against_float64(rows, dtype, noise):
    """What a CPU does, at odd positions and around the borders of the visible that is looked at."""
    model = random_model(ARGS, "cpu", dtype)
    model.setup_caches(512)
    layer, generator = model.layers[0].attention, torch.Generator().manual_seed(rows)
    for last, visible in ((63, 64), (64, 128), (101, 128), (101, 512), (127, 128), (511, 512)):
        pos = torch.arange(last - rows + 1, last + 1)
        layer.k_cache, layer.v_cache = filled_cache(generator, 2, 512, 16, last + 1, dtype)
        q = torch.randn(1, rows, 6, 16, generator=generator).to(dtype)
        y = layer.attend(q, pos, model.see(q, pos, visible), visible)
        exact = exact_attention(q[0], layer.k_cache[0], layer.v_cache[0], pos)
        assert (y[0].double() - exact).abs().max() < noise, (last, visible)


@torch.inference_mode()
def test_a_prefill_longer_than_a_step_reads_the_same():
    """Chunks of any size give what one pass gives, and no step needs a square mask."""
    model = random_model(ARGS, "cpu", torch.float32)
    model.setup_caches(512)
    ids = torch.randint(0, 101, (1, 300), generator=torch.Generator().manual_seed(1))
    whole, _ = model(ids)
    for size in (1, 64, 100, 300):
        parts = [
            model(ids[:, at : at + size], torch.arange(at, min(at + size, 300)), min(at + size, 300))[0]
            for at in range(0, 300, size)
        ]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


def test_on_a_gpu_nothing_of_the_size_of_rows_times_window_is_made():
    """Decoding there needs no mask, a prefill only a diagonal."""
    model = Transformer.__new__(Transformer)
    x = type("OnGpu", (), {"device": torch.device("cuda"), "shape": (1, 17, 6, 16)})()
    for rows in (1, 17, 65, 2048):
        assert Transformer.see(model, x, torch.arange(rows), 32768) is None
    diagonal = Transformer.see(model, x, torch.arange(2048), 32768, prefill=True)
    assert isinstance(diagonal, CausalBias) and (diagonal.seq_len_q, diagonal.seq_len_kv) == (2048, 32768)


@torch.inference_mode()
def test_the_diagonal_of_a_prefill_is_its_mask(monkeypatch):
    """What a GPU's prefill passes to PyTorch means the same as the mask that a CPU's adds."""
    model = random_model(ARGS, "cpu", torch.float32)
    model.setup_caches(512)
    ids = torch.randint(0, 101, (1, 300), generator=torch.Generator().manual_seed(1))
    model(ids[:, :170], torch.arange(170), 170)
    added, _ = model(ids[:, 170:], torch.arange(170, 300), 300)
    monkeypatch.setattr(
        Transformer, "see", lambda self, x, pos, visible, prefill: causal_lower_right(len(pos), visible)
    )
    diagonal, _ = model(ids[:, 170:], torch.arange(170, 300), 300)
    assert (added - diagonal).abs().max() < 1e-4
