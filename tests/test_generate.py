"""Protects: the round (rows, acceptance, stops, ends), exact greedy and sampled output, one graph, the command line."""

import io
import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, DEVICES, TEMPLATES, make_folder

import generate
import kernels
from generate import Engine, Settings, capacity_for, main
from judge import RULES, JudgeHead, rule_mask
from model import ModelArgs
from quantize import load_model
from scripts.lib import guarantee, pair, terminal
from scripts.lib.markers import Markers
from scripts.lib.result import Result
from tokenizer import decode, load_tokenizer

RELAXED = ["judge", "kl", "topk", "typical"]
V, DIM = 8, 4
ARGS = ModelArgs(DIM, 1, 1, 1, 4, V, 4, max_position=4096)


class Scripted:
    """A model whose logits after token t at position n are `table(n, t)`, and whose hidden state says which row it is.

    hidden[..., 0] is `score(n, t)`: a head with weight (1, 0, 0, 0) then scores exactly the row that it is given.
    """

    def __init__(self, table, score=lambda n, t: 0.0, device="cpu"):
        self.table, self.score, self.args, self.local, self.cache_length = table, score, ARGS, ARGS, 0
        self.speaks = V
        self.device, self.read, self.cache_epoch = torch.device(device), [], 0

    def setup_caches(self, length):
        self.cache_length = length

    def __call__(self, tokens, pos, visible=None, n_logits=None, prefill=False):
        assert pos.max() < (visible or self.cache_length) <= self.cache_length
        pairs = list(zip(pos.tolist(), tokens[0].tolist()))
        self.read.append(pairs)
        logits = torch.stack([torch.as_tensor(self.table(n, t)).float() for n, t in pairs])[None]
        hidden = torch.tensor([[[self.score(n, t), 0.0, 0.0, 0.0] for n, t in pairs]])
        return hidden, logits[:, len(pairs) - (len(pairs) if n_logits is None else n_logits) :]


HEAD = JudgeHead(torch.tensor([1.0, 0, 0, 0]), torch.tensor(0.0), 0.5, "", {})


def one_hot(token: int, height: float = 20.0) -> list[float]:
    return [height if i == token else 0.0 for i in range(V)]


def counting(step: int = 1):
    """Says t + step after t."""
    return lambda n, t: one_hot((t + step) % V)


def run(target, draft, verify="standard", prompt=(0, 1), new=12, stops=(), k=4, head=HEAD, **more) -> Result:
    engine = Engine(
        target, draft, head, Settings(verify, speculate_k=k, **more), list(stops), len(prompt) + new
    )
    return engine.generate(list(prompt), new)


def test_full_acceptance_takes_all_and_a_bonus_token():
    draft = Scripted(counting())
    result = run(Scripted(counting()), draft, new=10)
    assert result.tokens == [2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert (result.rounds, result.accepted, result.drafted) == (2, 8, 8)
    assert "".join(result.origin) == "aaaabaaaab" and result.mean_accepted == 4
    # the draft reads the last accepted token in its two-row first step, whatever was accepted: no position is skipped
    assert {n for call in draft.read for n, _ in call} == set(range(64))


def test_zero_acceptance_takes_one_token_of_the_target_a_round():
    result = run(Scripted(counting(1)), Scripted(counting(2)), new=5)
    assert result.tokens == [2, 3, 4, 5, 6] and result.rounds == 5 and result.accepted == 0
    assert set(result.origin) == {"t"} and result.mean_accepted == 0


def test_partial_acceptance_takes_the_correction_from_the_first_rejected_row():
    # the draft counts, the target leaves the count after token 4: it says 7 there
    target = Scripted(lambda n, t: one_hot(7 if t == 4 else (t + 1) % V))
    result = run(target, Scripted(counting()), new=4, k=4)
    assert result.tokens == [2, 3, 4, 7] and "".join(result.origin) == "aaat" and result.rounds == 1


def test_the_draft_reads_every_committed_token_in_its_place():
    """After any number of accepted tokens, the draft's cache holds the true text: what it read last at each position."""
    target = Scripted(lambda n, t: one_hot((t + (2 if n % 5 == 0 else 1)) % V))
    draft = Scripted(counting())
    result = run(target, draft, new=30, k=3)
    text, cache = [0, 1, *result.tokens], {}
    for call in draft.read:
        cache.update(call)
    last = len(text) - 5  # what the last round drafted is not yet settled
    assert [cache[n] for n in range(last)] == text[:last]


def test_a_prompt_of_one_token():
    result = run(Scripted(counting()), Scripted(counting()), prompt=(5,), new=6)
    assert result.tokens == [6, 7, 0, 1, 2, 3]


def test_the_standard_test_reads_the_row_before():
    """The target says 3 after position 1, whatever it reads; rows after that are of another mind."""
    target = Scripted(lambda n, t: one_hot(3 if n == 1 else 6))
    draft = Scripted(lambda n, t: one_hot(3))
    result = run(target, draft, new=2, k=2)
    assert result.tokens == [3, 6] and "".join(result.origin) == "at"


def test_the_judge_reads_the_tokens_own_row():
    """Only the row of position 3 (the second draft token) is good; the head must accept that token and no other."""
    target = Scripted(lambda n, t: one_hot(0), score=lambda n, t: 9.0 if n == 3 else -9.0)
    draft = Scripted(lambda n, t: one_hot(0 if n == 1 else 5))
    result = run(target, draft, "judge", new=3, k=3)
    assert result.tokens == [0, 5, 0] and "".join(result.origin) == "art"
    early = Scripted(lambda n, t: one_hot(0), score=lambda n, t: 9.0 if n == 2 else -9.0)
    assert run(early, draft, "judge", new=3, k=3).tokens[:2] == [0, 0]  # a good row before it does not help


@pytest.mark.parametrize("verify", ["kl", "topk", "typical", "topn_delta", "divergence"])
def test_the_other_rules_read_the_row_before(verify):
    """After position 2 the target is undecided between 4 and 5; before and after it is sure of 0."""
    soft = [0, 0, 0, 0, 3.0, 2.9, 0, 0]
    target = Scripted(lambda n, t: soft if n == 2 else [8.0, 1, 2, 1, 0, 0, 0, 0])
    draft = Scripted(
        lambda n, t: [0, 0, 0, 0, 2.9, 3.0, 0, 0] if n == 2 else [9.0 if n == 1 else 0, 0, 0, 0, 0, 3, 0, 0]
    )
    result = run(target, draft, verify, new=3, k=3)
    assert result.tokens == [0, 5, 0] and "".join(result.origin) == "art"


def test_nothing_passes_that_neither_mask_passed():
    """With the judge shut and the standard test failing, every token is the target's, at every speculate_k."""
    for k in (1, 2, 7):
        shut = Scripted(counting(1), score=lambda n, t: -9.0)
        assert run(shut, Scripted(counting(3)), "judge", new=9, k=k).tokens == [2, 3, 4, 5, 6, 7, 0, 1, 2]


@pytest.mark.parametrize("verify", RELAXED)
def test_a_stop_token_passes_only_when_the_target_agrees(verify):
    soft = [0.0] * 6 + [0.1, 0.0]  # every rule accepts anything here, and the target would say 6
    target = Scripted(lambda n, t: soft, score=lambda n, t: 9.0)
    draft = Scripted(lambda n, t: one_hot(5, 0.3))
    knobs = {"threshold": {"judge": 0.5, "kl": 5.0, "topk": 8, "typical": 0.01}[verify]}
    assert run(target, draft, verify, new=4, **knobs).tokens == [5, 5, 5, 5]
    result = run(target, draft, verify, new=4, stops=[5], **knobs)
    assert result.tokens == [6, 6, 6, 6] and result.accepted == 0 and result.stop_reason == "length"
    # and the target's own stop ends the answer, also when it is the correction of a draft that went on
    target = Scripted(lambda n, t: one_hot(6 if n == 3 else 5), score=lambda n, t: -9.0)
    result = run(target, Scripted(lambda n, t: one_hot(5)), "judge", new=9, stops=[6])
    assert result.tokens == [5, 5, 6] and result.stop_reason == "stop" and result.origin[-1] == "t"


def test_output_ends_at_the_first_stop_token():
    for stop, expected in ((4, [2, 3, 4]), (6, [2, 3, 4, 5, 6]), (2, [2])):
        result = run(Scripted(counting()), Scripted(counting()), new=12, stops=[stop])
        assert result.tokens == expected and result.stop_reason == "stop"
        assert run(Scripted(counting()), None, "plain", new=12, stops=[stop]).tokens == expected


@pytest.mark.parametrize("new", range(1, 12))
def test_output_ends_at_max_new_tokens_and_nothing_is_written_past_the_buffer(new):
    prompt = list(range(8)) * 31 + [0, 1]  # 250 tokens: some ends are beyond the first page
    for draft in (Scripted(counting()), Scripted(counting(2)), None):
        result = run(
            Scripted(counting()), draft, "standard" if draft else "plain", prompt=prompt, new=new, k=5
        )
        assert result.tokens == [(2 + i) % V for i in range(new)] and result.stop_reason == "length"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 5, 16])
def test_greedy_standard_is_plain(pair, k, device):
    target, draft = (model.to(device) for model in pair)
    for seed in range(3):
        prompt = torch.randint(
            0, 97, (5 + 40 * seed,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        plain = Engine(target, None, None, Settings("plain", speculate_k=k), [96], 160).generate(prompt, 60)
        fast = Engine(target, draft, None, Settings("standard", speculate_k=k), [96], 160).generate(
            prompt, 60
        )
        assert_same_up_to_ties(target, prompt, plain.tokens, fast.tokens)
        same = Engine(target, target, None, Settings("standard", speculate_k=k), [96], 160).generate(
            prompt, 60
        )
        assert same.mean_accepted > 0.9 * min(k, 60 / same.rounds)  # its own draft is right nearly always
    for model in pair:
        model.to("cpu")


@torch.inference_mode()
def assert_same_up_to_ties(
    target, prompt: list[int], one: list[int], other: list[int], noise: float = 1e-3
) -> None:
    """Equal, or differing first where the target's two best logits are closer than rounding (a proven tie)."""
    if one == other:
        return
    at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    ids = torch.tensor([prompt + one[:at]], device=target.device)
    best = target(ids)[1][0, -1].topk(2).values
    assert best[0] - best[1] < noise * best[0].abs(), f"token {at} differs, and it is no tie: {best.tolist()}"


COMPILED = [
    ("judge", 0),
    *[
        pytest.param(verify, 0, marks=pytest.mark.slow)
        for verify in ("kl", "topk", "typical", "topn_delta", "divergence")
    ],
    *[
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("window", 0),
            ("ensemble", 0),
            ("ensemble", 0.8),
            ("standard", 0),
            ("standard", 0.8),
            ("plain", 0),
        )
    ],
]


def compiles_alone(verify: str) -> None:
    """A rule's function in one graph accepts what it accepts in eager code, some tokens and not all."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 40, 97, generator=generator)
    logits[1] = logits[0] + torch.linspace(0, 2, 40)[:, None] * logits[1]  # the draft's: ever less like the target's
    drafted = torch.multinomial(logits[0].softmax(-1), 1, generator=generator)[:, 0]
    knob = torch.tensor({"topk": 5.0, "typical": 0.3}.get(verify, RULES[verify].default))
    more = {"stop_ids": torch.tensor([96]), "min_prob": 0.001}
    args = (verify, drafted, *logits, torch.zeros(40), knob)
    expected = rule_mask(*args, **more)
    assert torch.equal(torch.compile(rule_mask, fullgraph=True)(*args, **more), expected)
    assert 0 < expected.sum() < 40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("verify, temperature", COMPILED)
def test_compiled_is_eager_without_recompiling(pair, device, verify, temperature):
    """For every rule: the same tokens, for any prompt length, output length and cache, and no compilation after warm-up."""
    if device == "cpu" and verify in ("topk", "typical", "topn_delta", "divergence"):
        compiles_alone(verify)  # all else of these rounds is that of the others
        return
    target, draft = (model.to(device) for model in pair)
    head = JudgeHead(
        torch.randn(64, generator=torch.Generator().manual_seed(4)) * 0.2, torch.tensor(0.0), 0.5, "", {}
    ).to(device)
    settings = {
        "threshold": {"kl": 3.0, "topk": 5, "typical": 0.05}.get(verify),
        "speculate_k": 5,
        "temperature": temperature,
        "top_k": 20 if temperature else None,
        "top_p": 0.9 if temperature else None,
        "min_p": 0.01 if temperature else None,
        "min_prob": 0.001 if verify == "topn_delta" else 0.0,
    }
    eager = Engine(target, draft, head, Settings(verify, **settings), [96], 300)
    fast = Engine(target, draft, head, Settings(verify, **settings, compile=True), [96], 300)
    fast.warm_up()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, new in ((1, 40), (3, 7), (70, 33), (240, 60)):
            prompt = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
            expected, found = eager.generate(prompt, new, seed=7), fast.generate(prompt, new, seed=7)
            assert found.tokens == expected.tokens and found.origin == expected.origin
    for model in pair:
        model.to("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_markers_adaptive_m_and_draft_features(pair, device, monkeypatch):
    """As above, with a head that reads the draft, too, a rule that applies between markers, and M that changes."""
    monkeypatch.setattr(generate, "SIZES", (2, 5))
    target, draft = (model.to(device) for model in pair)
    weights = (torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 0.2 for seed in (4, 5))
    head = JudgeHead(next(weights), torch.tensor(0.0), 0.5, "", {}, next(weights)).to(device)
    table = torch.zeros(2, 97, dtype=torch.uint8)
    table[0, ::3], table[1, :], table[1, ::5] = 1, 1, 0
    settings = {"speculate_k": 5, "adaptive": True}
    outputs = []
    for compiled in (False, True):
        engine = Engine(
            target, draft, head, Settings("judge", **settings, compile=compiled), [96], 300, Markers(table, 1)
        )
        engine.warm_up()
        seen = []
        engine.pace.choose = lambda needed, most, seen=seen: (seen.append(0), (2, 5, 5)[len(seen) % 3])[1]
        with torch._dynamo.config.patch(error_on_recompile=True):
            prompts = [
                torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist()
                for n in (1, 70, 240)
            ]
            results = [engine.generate(prompt, 40) for prompt in prompts]
        outputs.append([(r.tokens, r.origin, r.drafted) for r in results])
        assert {letter for r in results for letter in r.origin} == set("artb")
    assert outputs[0] == outputs[1]
    for model in pair:
        model.to("cpu")


def exact_chain(p: list[torch.Tensor], first: int, steps: int) -> dict[tuple[int, ...], float]:
    """Exact probability of every sequence of `steps` tokens of a Markov chain with rows p."""
    chain = {(): 1.0}
    for _ in range(steps):
        chain = {
            s + (t,): w * float(p[(s or (first,))[-1]][t])
            for s, w in chain.items()
            for t in range(V)
            if p[(s or (first,))[-1]][t] > 0
        }
    return chain


def chi_square_surprise(counts: dict, exact: dict[tuple, float], n: int) -> float:
    """Chi-square in standard deviations above its mean; cells that expect fewer than 5 are put together."""
    small = [cell for cell, w in exact.items() if w * n < 5]
    cells = [(counts.get(cell, 0), w * n) for cell, w in exact.items() if w * n >= 5]
    if small:
        cells.append((sum(counts.get(cell, 0) for cell in small), sum(exact[cell] for cell in small) * n))
    assert set(counts) <= set(exact), "a token of probability 0 was drawn"
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells if expected > 0)
    degrees = len(cells) - 1
    return (statistic - degrees) / (2 * degrees) ** 0.5


def sampled_counts(k: int, temperature: float, top_k: int | None, n: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(11)
    p, q = (torch.randn(V, V, generator=generator) * 1.5 for _ in range(2))
    target, draft = Scripted(lambda n, t: p[t]), Scripted(lambda n, t: q[t])
    engine = Engine(target, draft, None, Settings("standard", None, k, temperature, top_k), [], 8)
    engine.prefill([0])
    counts: dict[tuple, int] = {}
    engine.generator.manual_seed(12)
    for _ in range(n):
        engine.buffers.pos.zero_()  # the same place again; nothing is to be rolled back
        tokens = list(engine.round(256).tokens)
        while len(tokens) < 2:
            tokens += engine.round(256).tokens
        counts[tuple(tokens[:2])] = counts.get(tuple(tokens[:2]), 0) + 1
    rows = [generate.distribution(p[t], temperature, top_k) for t in range(V)]
    return counts, exact_chain(rows, 0, 2)


def test_standard_sampling_has_the_targets_distribution():
    """Round by round; test_sampling.py draws far more at once, from the steps alone."""
    counts, exact = sampled_counts(2, 1.0, None, 1000)
    assert chi_square_surprise(counts, exact, 1000) < 4


def test_samples_are_reproducible_and_differ_by_seed(pair):
    engine = Engine(*pair, None, Settings("standard", speculate_k=4, temperature=1.0), [96], 60)
    one, again, other = (engine.generate([1, 2, 3], 40, seed=seed).tokens for seed in (1, 1, 2))
    assert one == again != other


def test_sampling_a_rule_is_asked_before_the_standard_test():
    """With a judge that accepts all, every draft token passes, whatever the target's probability."""
    target = Scripted(lambda n, t: one_hot(1), score=lambda n, t: 9.0)
    result = run(target, Scripted(counting(3)), "judge", new=8, temperature=1.0)
    assert result.accepted_by_rule == result.accepted == 7


@pytest.mark.parametrize("min_prob, passes", [(0.1, True), (0.2, False)])
def test_a_floor_stops_a_rule_but_not_the_standard_test(min_prob, passes):
    """The draft says 5, to which the target gives 0.13; the judge would take it. Where they agree the floor is idle."""
    soft = [0.3, 0, 0, 0, 0, 0.1, 0, 0]
    target = Scripted(lambda n, t: one_hot(2, 0.2) if n == 1 else soft, score=lambda n, t: 9.0)
    result = run(
        target, Scripted(lambda n, t: one_hot(2 if n == 1 else 5)), "judge", new=2, min_prob=min_prob
    )
    assert result.tokens == ([2, 5] if passes else [2, 0]) and result.origin[0] == "a"


def test_a_step_looks_at_what_it_needs_and_no_more(pair):
    assert (
        capacity_for(222, 16) == 256 and capacity_for(223, 16) == 320 and capacity_for(131072, 16) == 131136
    )
    engine = Engine(*pair, None, Settings("standard"), [96], 400)
    assert [len(engine.visible(needed)) for needed in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 192]
    assert len(engine.visible(engine.capacity)) == engine.capacity


@pytest.mark.parametrize(
    "verify, temperature", [("plain", 0), ("standard", 0), ("judge", 0), ("standard", 0.8), ("topk", 0.8)]
)
def test_a_round_launched_before_the_last_one_is_read_changes_nothing(pair, verify, temperature):
    """With stops and ends anywhere in the overlapped round; and the answer after it is not touched by a round thrown away."""
    head = JudgeHead(
        torch.randn(64, generator=torch.Generator().manual_seed(4)) * 0.2, torch.tensor(0.0), 0.5, "", {}
    )
    draft = None if verify == "plain" else pair[1]
    settings = Settings(verify, speculate_k=5, temperature=temperature)
    outputs = []
    for overlap in (False, True):
        engine = Engine(pair[0], draft, head, settings, [], 140)
        engine.overlap = overlap
        free = engine.generate([5, 17, 40], 40, seed=3).tokens
        found = []
        for stop in {free[0], free[7], free[8], free[20], free[39]}:
            engine.stop_ids = [stop]  # the host's part of stopping
            found.append(engine.generate([5, 17, 40], 40, seed=3))
        engine.stop_ids = []
        found += [engine.generate([9, 3, 60], new, seed=new) for new in (1, 2, 6, 7, 23, 137)]
        if (
            draft is not None
        ):  # its own draft is right nearly always: rounds are long, and cross what a step looks at
            engine = Engine(pair[0], pair[0], head, settings, [], 300)
            engine.overlap = overlap
            found += [engine.generate([5, 17, 40] * n, 130) for n in (17, 19, 21)]
        outputs.append([(r.tokens, r.origin, r.rounds, r.stop_reason) for r in found])
        assert {r.stop_reason for r in found} == {"stop", "length"}
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("impose", [0, 1, 4, 9])
def test_imposed_acceptance(pair, impose):
    """For benchmarks: every round accepts so many tokens, whatever they are."""
    engine = Engine(*pair, None, Settings("standard", speculate_k=4, impose=impose), [], 200)
    result = engine.generate([5, 17, 40], 60)
    accepted = min(impose, 4)
    assert result.rounds == -(-60 // (accepted + 1)) and result.accepted == 60 - 60 // (accepted + 1)


def test_overlap_throws_away_one_round_at_most(pair):
    engine = Engine(*pair, None, Settings("standard", speculate_k=5), [], 200)
    engine.overlap, launched, launch = True, [], engine.launch
    engine.launch = lambda *rest: (launched.append(rest), launch(*rest))[1]
    result = engine.generate([5, 17, 40], 50)
    assert result.rounds <= len(launched) <= result.rounds + 1
    launched.clear()
    engine.stop_ids = [result.tokens[0]]
    assert engine.generate([5, 17, 40], 50).rounds == 1 and len(launched) == 2
    launched.clear()
    assert (
        engine.generate([5, 17, 40], 1).rounds == 1 and len(launched) == 1
    )  # one token is sure: nothing to gain


def test_the_cache_may_be_longer_than_the_text(pair):
    """The same tokens: a step looks at what the text needs, whatever is allocated."""
    prompt = torch.randint(0, 96, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    answers = [
        Engine(*pair, None, Settings("standard"), [96], length).generate(prompt, 80)
        for length in (150, 151, 400)
    ]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens and len(answers[0].tokens) == 80


def test_an_engine_whose_caches_were_taken_says_so(pair):
    first = Engine(*pair, None, Settings("standard"), [96], 60)
    Engine(*pair, None, Settings("standard"), [96], 600)
    with pytest.raises(RuntimeError, match="made this model's caches longer"):
        first.generate([1, 2], 5)
    fresh = Engine(*pair, None, Settings("standard"), [96], 60)  # shares the longer ones
    assert (
        fresh.generate([1, 2], 5).tokens
        == Engine(*pair, None, Settings("standard"), [96], 600).generate([1, 2], 5).tokens
    )


@pytest.mark.gpu
@torch.inference_mode()
def test_nothing_but_the_report_waits_for_the_gpu(pair):
    target, draft = (model.to("cuda") for model in pair)
    head = JudgeHead(torch.zeros(64), torch.tensor(0.0), 0.5, "", {}).to("cuda")
    for verify, temperature in [
        ("standard", 0.0),
        ("judge", 0.0),
        ("kl", 0.0),
        ("topk", 0.0),
        ("typical", 0.0),
        ("ensemble", 0.0),
        ("standard", 1.0),
    ]:
        table = torch.ones(2, 97, dtype=torch.uint8)
        settings = Settings(verify, speculate_k=4, temperature=temperature)
        engine = Engine(target, draft, head, settings, [96], 200, Markers(table, 1))
        engine.generate([1, 2, 3], 10)
        torch.cuda.set_sync_debug_mode("error")
        try:
            slot = engine.launch(20)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 1 <= len(engine.collect(slot).tokens) <= 5
    for model in pair:
        model.to("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_does_not_grow_on_the_gpu(pair, compiled):
    """Over 1,000 rounds, each of which accepts one draft token."""
    target, draft = (model.to("cuda") for model in pair)
    engine = Engine(
        target, draft, None, Settings("standard", speculate_k=4, impose=1, compile=compiled), [], 250
    )
    engine.warm_up()
    engine.generate([1, 2, 3], 200)
    before, rounds = torch.cuda.memory_allocated(), 0
    while rounds < 1000:
        rounds += engine.generate([1, 2, rounds % 90], 200).rounds
    assert torch.cuda.memory_allocated() <= before
    for model in pair:
        model.to("cpu")


# The command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random target, draft and judge with the demo's tokenizer, as published folders."""
    root = tmp_path_factory.mktemp("folders")
    shape = {"vocab_size": 640, "max_position_embeddings": 256}
    make_folder(root / "target", seed=1, **shape)
    make_folder(root / "draft", seed=2, num_hidden_layers=1, **shape)
    for name in ("target", "draft"):
        (root / name / "tokenizer.model").write_bytes((pair.DEMO / "target" / "tokenizer.model").read_bytes())
    target = load_model(root / "target")
    JudgeHead(torch.zeros(64), torch.tensor(0.1), 0.5, target.fingerprint, {}).save(
        root / "judge.safetensors"
    )
    return root


def command(folders, *more: str, prompt: str | None = "Hello") -> list[str]:
    flags = ["--checkpoint_path", folders / "target", "--draft_checkpoint_path", folders / "draft"]
    flags += ["--judge_path", folders / "judge.safetensors", "--device", "cpu", "--max_new_tokens", "20"]
    return [str(flag) for flag in flags] + (["--prompt", prompt] if prompt else []) + list(more)


def test_json_is_one_object_a_sample(folders, capsys):
    main(command(folders, "--json", "--num_samples", "2", "--temperature", "1", "--speculate_k", "3"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        record = json.loads(line)
        assert set(record) == {
            "prompt_tokens", "tokens", "origin", "text", "stop_reason", "rounds", "drafted", "accepted", "accepted_by_rule", "mean_accepted",
            "seconds_prefill", "seconds_decode", "tokens_per_second", "verify", "threshold", "speculate_k", "min_prob", "device", "dtype", "relax_between",
            "mean_score", "temperature", "top_k", "top_p", "min_p", "stop",
        }  # fmt: skip
        assert (record["verify"], record["threshold"], record["speculate_k"]) == ("judge", 0.5, 3)
        assert (record["device"], record["dtype"]) == ("cpu", "float32")
        assert (
            3 * (record["rounds"] - 1) < record["drafted"] <= 3 * record["rounds"]
        )  # of the last only what can be used
        assert record["mean_accepted"] == record["accepted"] / record["rounds"]
        assert 0 < len(record["tokens"]) <= 20 and record["seconds_decode"] > 0
        assert len(record["origin"]) == len(record["tokens"]) and set(record["origin"]) <= set("artb")


def test_piped_output_is_the_answer_alone(folders, capsys):
    """No marks, no colours, no figures on standard output; those are on standard error, and marks come when asked for."""
    main(command(folders, "--json"))
    text = json.loads(capsys.readouterr().out)["text"]
    main(command(folders))
    out, err = capsys.readouterr()
    assert out == text + "\n" and "tokens/s" in err and "m*" in err and "by the rule alone}" not in err
    main(command(folders, "--marks"))
    out, err = capsys.readouterr()
    assert "\033" not in out and "<" in out and "{let through by the rule alone}" in err
    main(
        command(folders, "--marks", "--verify", "plain")
    )  # all tokens are the target's own: nothing to tell apart
    assert capsys.readouterr().out.count("<") <= text.count("<") + 1


def test_colours_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    paint = terminal.Paint(Terminal())
    assert [paint.token("x", letter)[:5] for letter in "artb"] == [
        "\033[32m",
        "\033[33m",
        "\033[31m",
        "\033[31m",
    ]
    assert (
        terminal.Paint(Terminal(), drafted=False).token("x", "t") == "x"
    )  # without a draft there is nothing to tell
    assert terminal.Paint(io.StringIO()).token("x", "r") == "x"  # piped
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.Paint(Terminal()).token("x", "r") == "{x}"


def test_prompts_from_standard_input_and_synthetic_ones(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tom has 5 apples.\n"))  # as echo writes it
    main(command(folders, "--json", prompt="-"))
    piped = json.loads(capsys.readouterr().out)
    main(command(folders, "--json", prompt="Tom has 5 apples."))
    assert json.loads(capsys.readouterr().out)["tokens"] == piped["tokens"]
    main(command(folders, "--json", prompt="77"))
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 77


def test_interactive_streams_until_end_of_input(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tom has 5 apples.\n\nMia has 7.\n"))
    main(command(folders, "--interactive", prompt=None))
    assert capsys.readouterr().err.count("tokens/s") == 2


def test_a_system_message_is_the_chats_first(folders, capsys, monkeypatch):
    """In a single answer and in a conversation, which begins anew with it."""
    asked = []

    def encode_chat(self, messages):
        asked.append([(message["role"], message["content"]) for message in messages])
        return [1, *self.encode(messages[-1]["content"])]

    monkeypatch.setattr("tokenizer.SentencePieceTokenizer.encode_chat", encode_chat)
    monkeypatch.setattr("tokenizer.SentencePieceTokenizer.check_chat", lambda self: None, raising=False)
    main(command(folders, "--chat", "--system", "Be brief."))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    main(command(folders, "--interactive", "--chat", "--system", "", prompt=None))
    assert asked == [[("system", "Be brief."), ("user", "Hello")], [("system", ""), ("user", "Hi")]]


@pytest.mark.parametrize("chat", [False, True])
def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(folders, capsys, monkeypatch, chat):
    """Ctrl-C in the second round of the first answer: the conversation goes on with what was shown; one at the prompt ends."""
    said, asked, encoded, stream = iter(["Tom has 5 apples.", "Mia has 7."]), [], [], Engine.stream

    def ask(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise KeyboardInterrupt from None

    def interrupted(self, prompt, most, keep):
        for count, token in enumerate(stream(self, prompt, most, keep=keep)):
            if count == 3 and not asked:
                asked.append(list(self.result.tokens))
                raise KeyboardInterrupt
            yield token

    def encode_chat(self, messages):
        encoded.append([dict(message) for message in messages])
        return [1, *self.encode(messages[-1]["content"])]

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("scripts.lib.conversation.Conversation.goes_on", lambda self, messages: False)
    monkeypatch.setattr(Engine, "stream", interrupted)
    monkeypatch.setattr("tokenizer.SentencePieceTokenizer.encode_chat", encode_chat)
    monkeypatch.setattr("tokenizer.SentencePieceTokenizer.check_chat", lambda self: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        main(command(folders, "--interactive", *(["--chat"] if chat else []), prompt=None))
    out, err = capsys.readouterr()
    assert stop.value.code == 130 and err.count("tokens/s") == 2 and "Traceback" not in err
    if chat:
        answer = encoded[1][1]
        assert answer["role"] == "assistant" and out.startswith(answer["content"]) and len(encoded[1]) == 3
        assert answer["content"] == decode(load_tokenizer(folders / "target"), asked[0][:3])


@pytest.mark.parametrize(
    ("stdin", "word"),
    [(None, "closed"), (b"\xff\xfe", "UTF-8"), (b"", "nothing"), (b"\xef\xbb\xbf\n", "nothing")],
)
def test_standard_input_that_holds_no_prompt_is_said(folders, capsys, monkeypatch, stdin, word):
    for flags in (command(folders, prompt="-"), command(folders, "--interactive", prompt=None))[
        : 1 if word == "nothing" else 2
    ]:
        monkeypatch.setattr(
            sys, "stdin", stdin if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        )
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code == 2 and word in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text(folders, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffTom has 5 apples.\r\n".encode()), encoding="utf-8")
    )
    main(command(folders, "--json", prompt="-"))
    marked = json.loads(capsys.readouterr().out)["tokens"]
    main(command(folders, "--json", prompt="Tom has 5 apples."))
    assert json.loads(capsys.readouterr().out)["tokens"] == marked


def test_no_more_is_drafted_than_an_answer_can_use(folders, pair, capsys):
    """A round drafts at most what is still to come (and what a rule looks at beyond), and the text is what it would be."""
    target, draft = pair
    for verify, ahead in (("standard", 0), ("kl", 0), ("window", RULES["window"].ahead)):
        threshold = 0.0 if verify == "window" else None
        settings = Settings(verify, threshold, speculate_k=16)
        whole = Engine(target, draft, None, settings, [], 90)
        rounds, whole.size_of_round = [], lambda needed, left: (16, 16)
        expected = whole.generate([5, 17, 40], 64)
        for most in (1, 2, 4, 7, 20):
            engine, steps = Engine(target, draft, None, settings, [], 90), []
            step = engine.draft_step
            engine.draft_step = lambda *args, step=step, steps=steps: (steps.append(args[-1]), step(*args))
            rounds, launch = [], engine.launch
            engine.launch = lambda *args, launch=launch, rounds=rounds, steps=steps: (
                rounds.append(len(steps)),
                launch(*args),
            )[1]
            got = engine.generate([5, 17, 40], most)
            assert got.tokens == expected.tokens[:most] and got.origin == expected.origin[:most], (
                verify,
                most,
            )
            made = [b - a for a, b in zip(rounds, [*rounds[1:], len(steps)])]
            assert made[0] == min(16, most + ahead) and sum(made) == got.drafted
    main(command(folders, "--speculate_k", "1024", "--max_new_tokens", "4", "--json"))
    record = json.loads(capsys.readouterr().out)
    assert record["speculate_k"] == 4 and record["drafted"] <= 4 * record["rounds"]


def test_a_draft_of_too_short_a_context_is_named_before_loading(folders, tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "short", num_hidden_layers=1, vocab_size=640, max_position_embeddings=32)
    shutil.copy(pair.DEMO / "target" / "tokenizer.model", tmp_path / "short")
    monkeypatch.setattr(pair, "load_model", lambda *args: pytest.fail("loaded all the same"))
    with pytest.raises(SystemExit) as stop:
        main(command(folders, "--draft_checkpoint_path", str(tmp_path / "short"), prompt="20"))
    assert stop.value.code == 2 and "do not fit the draft's context of 32" in capsys.readouterr().err


def test_top_k_0_is_off(folders, capsys):
    texts = []
    for more in (["--top_k", "0"], []):
        main(command(folders, "--temperature", "1", "--json", *more))
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_a_greedy_runs_guarantee_does_not_ask_for_top_k():
    """It samples nothing, so that --top_k is no difference."""
    target, of = SimpleNamespace(fingerprint="t", quantization=None, dtype=torch.float32), {}
    for temperature, top_k in itertools.product((0.0, 1.0), (None, 5)):
        settings = Settings("topk", 2, 2, temperature, top_k, top_p=top_k and 0.9)
        of[temperature, top_k] = guarantee.conditions(
            SimpleNamespace(settings=settings, target=target, draft=target), False, 8
        )
    assert of[0.0, 5] == of[0.0, None] and of[1.0, 5] != of[1.0, None]


@pytest.mark.parametrize("verify", ["plain", pytest.param("standard", marks=pytest.mark.slow)])
def test_the_shortest_cache_compiles(folders, capsys, verify):
    """64 positions: there is only one length to look at, which no graph may take for a variable one."""
    main(
        command(
            folders, "--compile", "--verify", verify, "--max_new_tokens", "3", "--speculate_k", "2", "--json"
        )
    )
    compiled = json.loads(capsys.readouterr().out)["tokens"]
    main(command(folders, "--verify", verify, "--max_new_tokens", "3", "--speculate_k", "2", "--json"))
    assert json.loads(capsys.readouterr().out)["tokens"] == compiled


def test_a_profile_is_written(folders, tmp_path):
    main(command(folders, "--profile", str(tmp_path / "trace.json")))
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def mistakes(folders, tmp_path) -> dict[str, tuple[list[str], str]]:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"x" * 50)
    other = tmp_path / "other"
    make_folder(other, vocab_size=97)
    judge = str(folders / "judge.safetensors")
    base = command(folders)
    return {
        "missing folder": (["--checkpoint_path", "/no/such", "--prompt", "x"], "/no/such"),
        "missing draft": ([*base, "--draft_checkpoint_path", "/no/draft"], "/no/draft"),
        "vocabularies": ([*base, "--draft_checkpoint_path", str(other)], "share a vocabulary"),
        "long prompt": (command(folders, prompt="250"), "target's context of 256"),
        "small cache": (command(folders, "--cache_length", "21", prompt="30"), "the cache of 21"),
        "missing judge": ([*base, "--judge_path", "/no/judge"], "/no/judge"),
        "broken judge": ([*base, "--judge_path", str(broken)], "broken.safetensors"),
        "judge of another target": ([*base, "--checkpoint_path", str(folders / "draft"), "--judge_path", judge], "made for the target"),
        "no draft given": (["--checkpoint_path", str(folders / "target"), "--verify", "judge", "--prompt", "x"], "needs a draft"),
        "no judge given": (["--checkpoint_path", str(folders / "target"), "--draft_checkpoint_path", str(folders / "draft"),
                            "--verify", "judge", "--prompt", "x"], "needs a judge"),
        "threshold": ([*base, "--threshold", "1.5"], "--threshold 1.5"),
        "threshold of standard": ([*base, "--verify", "standard", "--threshold", "1"], "no threshold"),
        "whole K": ([*base, "--verify", "topk", "--threshold", "2.5"], "whole number"),
        "speculate_k": ([*base, "--speculate_k", "0"], "--speculate_k 0"),
        "device": ([*base, "--device", "tpu9"], "tpu9"),
        "cuda": ([*base, "--device", "cuda:77"], "cuda:77"),
        "temperature": ([*base, "--temperature", "-1"], "--temperature -1"),
        "top_k": ([*base, "--top_k", "-1"], "--top_k -1"),
        "top_p": ([*base, "--top_p", "1.5"], "--top_p 1.5"),
        "min_p": ([*base, "--min_p", "-0.1"], "--min_p -0.1"),
        "empty stop": ([*base, "--stop", ""], "--stop ''"),
        "many digits": ([*base, "--max_new_tokens", "9" * 5000], "--max_new_tokens 999"),
        "many digits of M": ([*base, "--speculate_k", "9" * 5000], "from 1 to 1024"),
        "trace on a device": ([*base, "--profile", "/dev/null"], "--profile /dev/null cannot be written: it is a device"),
        "no new tokens": ([*base, "--max_new_tokens", "0"], "--max_new_tokens 0"),
        "no prompt": (command(folders, prompt=None), "no prompt"),
        "system without chat": ([*base, "--system", "Be brief."], "--system is a message of a chat; give --chat"),
        "chat without a format": ([*base, "--chat"], "chat format"),
        "temperature nan": ([*base, "--temperature", "nan"], "--temperature nan"),
        "tiny temperature": ([*base, "--temperature", "1e-40"], "--temperature 1e-40"),
        "infinite K": ([*base, "--verify", "topk", "--threshold", "inf"], "whole number"),
        "no samples": ([*base, "--num_samples", "0"], "--num_samples 0"),
        "no cache": ([*base, "--cache_length", "0"], "--cache_length 0"),
        "no place for the trace": ([*base, "--profile", "/no/such/trace"], "--profile /no/such/trace"),
        "json in conversation": (command(folders, "--interactive", "--json", prompt=None), "--interactive goes without"),
        "endless synthetic prompt": (command(folders, prompt="9" * 30), "too long"),
        "meta device": ([*base, "--device", "meta"], "meta"),
        "broken Unicode": (command(folders, prompt="x\ud83d"), "not valid Unicode"),
        "empty prompt": (command(folders, prompt="0"), "prompt is empty"),
        "floor": ([*base, "--min_prob", "1.5"], "--min_prob 1.5"),
        "unknown rule": ([*base, "--verify", "magic"], "magic"),
        "unknown flag": ([*base, "--speculate"], "--speculate"),
    }  # fmt: skip


def test_every_mistake_is_one_sentence_and_exit_code_2(folders, tmp_path, capsys):
    for name, (argv, word) in mistakes(folders, tmp_path).items():
        with pytest.raises(SystemExit) as stop:
            main(argv)
        streams = capsys.readouterr()
        assert stop.value.code == 2, name
        assert word in streams.err and streams.err.count("\n") == 1, (name, streams.err)
        assert streams.out == "", name


def test_a_missing_compiler_is_said(folders, capsys, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(SystemExit) as stop:
        main(command(folders, "--compile"))
    assert stop.value.code == 2 and "needs a C++ compiler" in capsys.readouterr().err


def test_a_judge_trained_in_the_chat_format_is_noted(folders, tmp_path, capsys):
    target = load_model(folders / "target")
    JudgeHead(torch.zeros(64), torch.tensor(0.1), 0.5, target.fingerprint, {"chat": True}).save(
        tmp_path / "judge.safetensors"
    )
    main([*command(folders), "--judge_path", str(tmp_path / "judge.safetensors")])
    assert "was trained in the chat format" in capsys.readouterr().err


def test_too_little_memory_is_said_before_loading(folders, capsys, monkeypatch):
    monkeypatch.setattr(pair, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(pair, "load_model", lambda *args: pytest.fail("loaded all the same"))
    with pytest.raises(SystemExit) as stop:
        main(command(folders))
    assert stop.value.code == 2 and "Not enough memory on cpu" in capsys.readouterr().err


# A published folder, whole


@pytest.mark.skipif(not (DATA / "tokenizers").exists(), reason=f"needs the public tokenizers in {DATA}")
@pytest.mark.parametrize("verify", ["plain", "standard"])
def test_a_folder_as_llama31_is_published_gives_what_transformers_gives(tmp_path, capsys, verify):
    """The real tokenizer where Meta puts it, its vocabulary, shards, scaled RoPE, a list of stop tokens, chat format."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    shape = {"vocab_size": 128256, "hidden_size": 32, "intermediate_size": 48, "rope_parameters": rope, "max_position_embeddings": 131072,
             "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}  # fmt: skip
    theirs = make_folder(tmp_path / "target", shard="6MB", dtype=torch.bfloat16, scale=6.0, **shape)
    make_folder(tmp_path / "draft", num_hidden_layers=1, dtype=torch.bfloat16, **shape)
    for role in ("target", "draft"):
        (tmp_path / role / "original").mkdir()
        shutil.copy(DATA / "tokenizers" / "llama3" / "tokenizer.model", tmp_path / role / "original")
        (tmp_path / role / "chat_template.jinja").write_text(TEMPLATES["llama 3.1"])
    flags = ["--draft_checkpoint_path", str(tmp_path / "draft")] if verify != "plain" else []
    main(["--checkpoint_path", str(tmp_path / "target"), *flags, "--verify", verify, "--chat", "--prompt", "Why is the sky blue?",
          "--max_new_tokens", "24", "--speculate_k", "4", "--device", "cpu", "--json"])  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(tmp_path / "target")
    assert tokenizer.stop_ids == [128001, 128008, 128009]
    prompt = torch.tensor([tokenizer.encode_chat([{"role": "user", "content": "Why is the sky blue?"}])])
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[
        0, prompt.shape[1] :
    ].tolist()
    assert record["prompt_tokens"] == prompt.shape[1] and record["tokens"] == expected


def test_the_warm_up_reads_as_few_rows_as_a_prefill_may_end_with(pair):
    """What is tuned by the number of rows (products of 64 on a GPU) is tuned there, and not by a prompt later."""
    target, draft = pair
    engine, seen = Engine(target, draft, None, Settings("standard", speculate_k=3), [], 300), []
    hooks = [model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((module, args[0].shape[1])), with_kwargs=True)
             for model in (target, draft)]  # fmt: skip
    engine.warm_up()
    warmed = set(seen)
    for length in (2, 65, 66, 130, 290):
        seen.clear()
        engine.prefill([1] * length)
        assert {(module, rows) for module, rows in seen if rows <= kernels.MOST_ROWS} <= warmed
    assert {(target, 64), (draft, 64)} <= warmed
    for hook in hooks:
        hook.remove()


def make(folder, size: int):
    make_folder(folder, vocab_size=size, seed=1, num_hidden_layers=1)
    return folder


@pytest.mark.parametrize("sizes", [(100, 97), (97, 104)])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.3}, {"compile": True}])
def test_vocabularies_that_differ_in_padding(tmp_path, sizes, how):
    """Target and draft of 97 tokens and some that no text has: the target's own answers, and no token beyond its rows.

    The draft's rows of padding are the largest of all, so that it would say little else.
    """
    if how.get("compile") and sizes[0] == 97:
        pytest.skip("one compilation is enough")
    target, draft = (load_model(make(tmp_path / str(size), size)) for size in sizes)
    with torch.no_grad():
        for name in ("tok_embeddings", "output"):
            getattr(draft, name).weight[:97] = getattr(target, name).weight[:97]
        draft.output.weight[97:] *= 50
    prompt, answers = [5, 6, 7], []
    for verify in ("plain", "standard"):
        engine = Engine(target, draft, None, Settings(verify, speculate_k=4, **how), [], 128)
        answers.append([engine.generate(prompt, 40, seed).tokens for seed in range(3)])
        assert all(token < sizes[0] for answer in answers[-1] for token in answer)
    assert engine.result.drafted > 40 and draft.speaks == sizes[0]
    if not how.get("temperature"):
        assert answers[0] == answers[1]
    q = draft(torch.tensor([prompt]))[1][0].softmax(-1)
    assert q.shape[-1] == sizes[0] and (sizes[0] == 97 or not q[:, 97:].any())


def test_a_pair_of_different_padding_is_one_of_the_same_tokenizer(folders, tmp_path, capsys):
    tokens = load_tokenizer(folders / "target").vocab_size
    for size in (tokens, tokens + 24, tokens + 64):
        draft = make(tmp_path / str(size), size)
        shutil.copy(folders / "target" / "tokenizer.model", draft)
        main(command(folders, "--verify", "standard", "--json", "--draft_checkpoint_path", str(draft)))
        plain = json.loads(capsys.readouterr().out)["tokens"]
        main(command(folders, "--verify", "plain", "--json"))
        assert json.loads(capsys.readouterr().out)["tokens"] == plain
