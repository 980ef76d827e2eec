"""Protects: filters as transformers has them, exact speculative sampling under them, a folder's published settings."""

import argparse
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import generate
from cli import InputError
from generate import Buffers, Settings
from sampling import distribution, pick, residual
from scripts.lib.published import filters_of, take_sampling

V, M, N = 8, 2, 100_000
FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, None, None, None), (0.7, 3, None, None), (0.6, None, 0.9, None), (1.3, None, None, 0.1), (0.9, 6, 0.9, 0.2),
]  # fmt: skip


@pytest.mark.parametrize("rounded", [False, True])
def test_the_filters_are_those_of_transformers(rounded, monkeypatch):
    """On random logits, and on coarse ones, of which many are equal: the same tokens, the same probabilities.

    Which of equal tokens top_p keeps is open in transformers, whose sort is not stable; here it is made so.
    """
    monkeypatch.setattr(torch, "sort", lambda x, descending: x.sort(dim=-1, stable=True))
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3
    logits = (logits * 2).round() / 2 if rounded else logits
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 2.0), (None, 1, 20, 500), (None, 0.0, 0.5, 0.95, 1.0), (None, 0.0, 0.05, 1.0)
    ):
        warped = TemperatureLogitsWarper(temperature)(None, logits)
        for warper, value in (
            (TopKLogitsWarper, top_k),
            (TopPLogitsWarper, top_p),
            (MinPLogitsWarper, min_p),
        ):
            if value is not None:
                warped = warper(value)(None, warped)
        found = distribution(logits, temperature, top_k, top_p, min_p)
        assert torch.equal(found, warped.softmax(-1)), (temperature, top_k, top_p, min_p)


class Table:
    """A model whose logits after token t are row t of a table."""

    def __init__(self, table: torch.Tensor):
        self.table, self.args, self.speaks = table, SimpleNamespace(vocab_size=V), V
        self.local = self.args

    def __call__(self, tokens, pos, visible=None, n_logits=None):
        logits = self.table[tokens]
        return torch.zeros(*tokens.shape, 1), logits if n_logits is None else logits[:, -n_logits:]


def surprise(settings: Settings, n: int = N) -> float:
    """Chi-square, in standard deviations above its mean, of n pairs of tokens after token 0 against the
    target's own filtered distribution.

    All n sequences take two rounds of the engine's own steps at once, by vmap; they differ in their random numbers.
    """
    generator = torch.Generator().manual_seed(11)
    p, q = (torch.randn(V, V, generator=generator) for _ in range(2))
    target, draft, visible = Table(p), Table(q), torch.zeros(8)

    def two_rounds(tokens, pos, drafted, draft_logits, step, flawed, uniforms):
        for numbers in uniforms:
            b = Buffers(tokens, pos, drafted, draft_logits, torch.zeros(1, 1), step, flawed, numbers,
                        torch.tensor(0.0), torch.tensor([], dtype=torch.long), torch.zeros(1, dtype=torch.long))  # fmt: skip
            for i in range(M):
                generate.draft_step(draft, b, settings, visible, i == 0)
            generate.verify_step(target, None, b, settings, visible, None)
        return tokens[1:3]

    numbers = [torch.zeros(n, size, dtype=torch.long) for size in (8, 1, M)]
    state = [*numbers, torch.zeros(n, M, V), *(torch.zeros(n, 1, dtype=torch.long) for _ in range(2))]
    drawn = torch.vmap(two_rounds)(*state, torch.rand(n, 2, 2 * M + 1, generator=generator))
    seen = torch.bincount(drawn[:, 0] * V + drawn[:, 1], minlength=V * V).double()

    own = distribution(p, settings.temperature, settings.top_k, settings.top_p, settings.min_p).double()
    expected = (own[0][:, None] * own).flatten() * n
    if seen[expected == 0].sum() > 0:  # a token of probability 0 was drawn
        return torch.inf
    assert (expected > 0).sum() > 4 and expected[expected > 0].min() > 5
    seen, expected = seen[expected > 0], expected[expected > 0]
    degrees = len(seen) - 1
    return (((seen - expected) ** 2 / expected).sum().item() - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("filters", FILTERS)
def test_standard_has_the_targets_filtered_distribution(filters):
    assert surprise(Settings("standard", None, M, *filters)) < 4


def test_a_wrong_acceptance_or_residual_is_noticed(monkeypatch):
    """Also one that is off by a row: acceptance by the next token's probabilities."""
    wrong = {
        "residual": [lambda p, q, accepted: p[accepted]],
        "accept_sampled": [
            lambda d, p, q, u: torch.ones_like(d, dtype=torch.bool),
            lambda d, p, q, u: p.gather(-1, d[:, None])[:, 0] > u,
            lambda d, p, q, u: generate_accept(d, p.roll(1, 0), q, u),
        ],
    }
    generate_accept = generate.accept_sampled
    for name, function in [(name, each) for name, each in wrong.items() for each in each]:
        with monkeypatch.context() as patch:
            patch.setattr(generate, name, function)
            assert surprise(Settings("standard", None, M, *FILTERS[2]), 10_000) > 10, name


def test_the_residual_and_picking():
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert torch.allclose(residual(p, q, torch.tensor([0])), torch.tensor([[0.3, 0.0, 0.0]]))
    assert torch.allclose(
        residual(p, q, torch.tensor([1])), p[1:]
    )  # all accepted: the target's own distribution
    weights = torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0])
    assert [pick(weights, torch.tensor(u)).item() for u in (0.0, 0.24, 0.26, 0.99999994)] == [1, 1, 3, 3]


def namespace(folder, **given) -> argparse.Namespace:
    flags = {"sample": False, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    return argparse.Namespace(checkpoint_path=folder, **flags | given)


def taken(folder, published: dict, **given) -> tuple:
    (folder / "generation_config.json").write_text(json.dumps(published))
    args = namespace(folder, **given)
    take_sampling(args)
    return (args.temperature, *filters_of(args))


def test_a_folders_sampling_is_the_default_where_one_samples(tmp_path, capsys):
    llama = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}  # as Llama 3.1 is published
    assert taken(tmp_path, llama) == (0.0, None, None, None)  # greedy, if nothing is asked for
    assert taken(tmp_path, llama, top_k=5) == (0.0, 5, None, None)
    assert taken(tmp_path, llama, sample=True) == (0.6, None, 0.9, None)
    assert taken(tmp_path, llama, temperature=1.2) == (1.2, None, 0.9, None)
    assert taken(tmp_path, llama, sample=True, top_p=1.0) == (0.6, None, None, None)
    assert taken(tmp_path, llama | {"top_k": 50, "min_p": 0.1}, sample=True, top_k=0) == (0.6, None, 0.9, 0.1)
    assert taken(tmp_path, llama | {"top_k": 50}, sample=True, min_p=0.2, top_p=0.0) == (0.6, 50, 0.0, 0.2)
    assert taken(tmp_path, {}, sample=True) == (1.0, None, None, None)
    (tmp_path / "generation_config.json").unlink()
    args = namespace(tmp_path, sample=True)
    take_sampling(args)
    assert args.temperature == 1.0 and capsys.readouterr().err == ""


def test_what_else_a_folder_asks_for_is_said_in_one_sentence(tmp_path, capsys):
    published = {
        "temperature": 1.0,
        "repetition_penalty": 1.1,
        "typical_p": 0.5,
        "num_beams": 1,
        "eta_cutoff": 0.0,
    }
    taken(tmp_path, published)
    assert capsys.readouterr().err == ""
    taken(tmp_path, published, sample=True)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "repetition_penalty 1.1, typical_p 0.5," in said and "num_beams" not in said
    )


@pytest.mark.parametrize("name, value", [("temperature", 0), ("temperature", "hot"), ("top_k", 2.5), ("top_k", -1),
                                         ("top_p", 1.5), ("top_p", True), ("min_p", -0.1), ("min_p", [0.1])])  # fmt: skip
def test_a_damaged_setting_is_named_unless_a_flag_takes_its_place(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name}=.*give --{name}"):
        taken(tmp_path, {name: value}, sample=True)
    taken(tmp_path, {name: value}, sample=True, **{name: 1})
    taken(tmp_path, {name: value})
