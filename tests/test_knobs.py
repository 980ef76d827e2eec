"""Protects: ensemble against transformers, rules between markers, adaptive M, the judge's rows at run time, guarantees."""

import json
import math

import pytest
import torch
from conftest import DATA, ROOT, make_folder
from safetensors import safe_open
from test_generate import HEAD, Scripted, V, counting, one_hot, run

import generate
from cli import InputError
from generate import SIZES, Engine, Settings
from judge import JudgeHead, mixture
from quantize import load_model
from scripts.lib import answers, features, flags
from scripts.lib.features import RowReader
from scripts.lib.guarantee import Drift, describe_guarantee
from scripts.lib.intervals import upper_bound
from scripts.lib.markers import Markers, make_markers
from scripts.lib.pace import Pace
from scripts.lib.pair import check_settings
from scripts.lib.terminal import DEMO_PROMPT
from tokenizer import load_tokenizer

DEMO = ROOT / "checkpoints" / "demo"


def in_transformers(folder, prompt: list[int], new: int, k: int, weight: float, stop: int) -> list[int]:
    """The greedy output of transformers' assisted generation with `assistant_ensemble_weight`."""
    from transformers import AutoModelForCausalLM

    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder / x, dtype=torch.float32).eval()
        for x in ("target", "draft")
    )
    config = draft.generation_config
    (
        config.num_assistant_tokens,
        config.num_assistant_tokens_schedule,
        config.assistant_confidence_threshold,
    ) = (
        k,
        "constant",
        0.0,
    )
    ids = torch.tensor([prompt])
    out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new + k + 1, do_sample=False,
                          assistant_model=draft, assistant_ensemble_weight=weight, eos_token_id=stop, pad_token_id=stop)  # fmt: skip
    return out[0, len(prompt) :].tolist()[
        :new
    ]  # near its limit transformers shortens a round, which moves the bonus token


@pytest.mark.parametrize("weight", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("k", [3, 8])
def test_greedy_ensemble_is_that_of_transformers(tmp_path, weight, k):
    make_folder(tmp_path / "target", seed=1, scale=3.0)
    make_folder(tmp_path / "draft", seed=2, scale=3.0, num_hidden_layers=1)
    target, draft = load_model(tmp_path / "target"), load_model(tmp_path / "draft")
    differs = 0
    for seed in range(3):
        prompt = torch.randint(3, 97, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        settings = Settings("ensemble", weight, speculate_k=k)
        ours = Engine(target, draft, None, settings, [2], 80).generate(prompt, 60).tokens
        assert ours == in_transformers(tmp_path, prompt, 60, k, weight, stop=2)
        differs += ours != Engine(target, None, None, Settings("plain"), [2], 80).generate(prompt, 60).tokens
    assert differs or weight > 0.5, "the mixture never chose another token: the test shows nothing"


def test_greedy_ensemble_on_the_demo_pair_is_that_of_transformers():
    tokenizer = load_tokenizer(DEMO / "target")
    prompt = tokenizer.prompt(DEMO_PROMPT)
    target, draft = (
        load_model(DEMO / "target", dtype=torch.float32),
        load_model(DEMO / "draft", dtype=torch.float32),
    )
    engine = Engine(target, draft, None, Settings("ensemble", 0.4), tokenizer.stop_ids, 256)
    result = engine.generate(prompt, 120)
    assert result.tokens == in_transformers(DEMO, prompt, 120, 16, 0.4, tokenizer.stop_ids[0])
    assert result.accepted_by_rule > 0 and result.stop_reason == "stop"


@pytest.mark.parametrize("allowed", [True, False])
def test_sampled_ensemble_has_the_mixtures_distribution(allowed):
    """One drafted token and its own distribution, by chi-square against w p + (1 - w) q (or p, outside the markers)."""
    p_logits, q_logits, weight = (
        torch.tensor([2.0, 1, 0, 0, 1, 0, -1, 0]),
        torch.tensor([0.0, 1, 2, 0, 0, 1, 0, -1]),
        0.4,
    )
    target, draft = Scripted(lambda n, t: p_logits), Scripted(lambda n, t: q_logits)
    table = Markers(torch.zeros(2, V, dtype=torch.uint8) + int(allowed), 1)
    engine = Engine(target, draft, None, Settings("ensemble", weight, 1, temperature=1.0), [], 8, table)
    engine.buffers.region.fill_(int(allowed))
    count, n = torch.zeros(V), 8000
    engine.generator.manual_seed(3)
    for _ in range(n):
        engine.buffers.pos.fill_(1)
        engine.buffers.region.fill_(int(allowed))
        count[engine.round(256).tokens[0]] += 1
    p, q = p_logits.softmax(0), q_logits.softmax(0)
    expected = n * (mixture(p, q, torch.tensor(weight)) if allowed else p)
    assert ((count - expected) ** 2 / expected).sum() < 24.3  # chi-square of 7 degrees of freedom, p = 0.001


def test_the_floor_holds_within_a_mixture():
    """The target gives the draft's token 2% and another 10%: a mixture would say it, but not above the floor."""

    def logits(n, t):
        return torch.tensor([0.88, 0.1, 0.02, 0, 0, 0, 0, 0]).clamp(min=1e-9).log()

    target, draft = Scripted(logits), Scripted(lambda n, t: one_hot(2))
    assert run(target, draft, "ensemble", new=3, threshold=0.3).tokens[:2] == [2, 2]
    assert run(target, draft, "ensemble", new=3, threshold=0.3, min_prob=0.05).tokens == [0, 0, 0]
    mixed = mixture(torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8]), torch.tensor(0.5), min_prob=0.2)
    assert mixed.sum().item() == pytest.approx(1) and mixed[0] > mixed[1]


class Letters:
    """Tokens 0 to 7 are these texts: the markers are cut in ways of their own."""

    pieces = [b"a", b"<", b"t>", b"<t", b">b", b"</", b"t></t>", b""]
    vocab_size = 8

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        return self.pieces[id]


@pytest.mark.parametrize(
    "ids, inside",
    [
        ([0, 1, 2, 0, 5, 2, 0], [0, 0, 1, 1, 1, 0, 0]),  # a < t> a </ t> a
        ([3, 4, 0, 3, 0], [0, 1, 1, 1, 1]),  # <t >b a <t a: an opening text inside changes nothing
        ([1, 1, 2, 5, 5, 2], [0, 0, 1, 1, 1, 0]),  # < < t> </ </ t>: a false start is taken up again
        ([1, 6, 0], [0, 0, 0]),  # < t></t> a: opens and closes within one token
        ([2, 5, 2, 7], [0, 0, 0, 0]),  # a closing text outside changes nothing
    ],
)
def test_markers_are_found_however_the_text_is_cut(ids, inside):
    markers = make_markers(("<t>", "</t>"), Letters(), 9)
    states = [int(markers.after(ids[: i + 1]) >= markers.inside) for i in range(len(ids))]
    assert states == inside
    allowed, walked = markers.walk(torch.zeros(1, dtype=torch.long), torch.tensor(ids))
    assert (walked[1:] >= markers.inside).long().tolist() == inside
    assert allowed.long().tolist() == [int(a and b) for a, b in zip([0, *inside], inside)]


def test_a_rule_applies_only_between_the_markers():
    """Tokens: 6 opens, 7 closes. The target would count up; the draft counts by two, and the judge likes all of it."""
    markers = Markers(
        torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.uint8), 1
    )
    target, draft = Scripted(counting(1), score=lambda n, t: 9.0), Scripted(counting(2))
    engine = Engine(target, draft, HEAD, Settings("judge", speculate_k=3), [], 40, markers)

    def decode(prompt: list[int], new: int) -> tuple[list[int], str]:
        result = engine.generate(prompt, new)
        return result.tokens, "".join(result.origin)

    assert decode([0, 3], 2) == ([4, 5], "tt")  # outside: strict
    assert decode([6, 0], 4) == ([2, 4, 6, 7], "rrrb")  # the prompt opened: relaxed, until the target closes
    assert decode([6, 7, 0], 2) == ([1, 2], "tt")  # the prompt opened and closed
    assert decode([0, 6], 3) == ([0, 2, 4], "rrr")  # the prompt's last token opens
    assert decode([6, 1], 3) == (
        [3, 5, 6],
        "rrt",
    )  # the draft's closing token is not let through by the rule alone


def test_markers_are_refused_where_they_mean_nothing(capsys):
    with pytest.raises(InputError, match="at most 255 bytes"):
        make_markers(("", "x"), Letters(), 8)
    with pytest.raises(InputError, match="standard has none"):
        check_settings(Settings("standard", relax_between=("a", "b")), True, True)


def test_pace_chooses_the_size_with_the_most_tokens_a_second():
    pace = Pace((2, 4, 8))
    pace.seconds = {(256, m): 1.0 + 0.1 * m for m in pace.sizes}

    def speed(rate: float, m: int) -> float:
        return sum(rate**i for i in range(m + 1)) / pace.seconds[256, m]

    for rate in (0.2, 0.6, 0.95):
        generator = torch.Generator().manual_seed(0)
        chosen = []
        for _ in range(400):
            m = pace.choose(256)
            passed = (torch.rand(m, generator=generator) < rate).long().cumprod(0).sum()
            pace.learn(m, int(passed))
            chosen.append(m)
        best = max(pace.sizes, key=lambda m: speed(rate, m))
        assert sum(speed(rate, m) for m in chosen[-200:]) > 0.97 * 200 * speed(rate, best), rate
        assert best == {0.2: 2, 0.6: 4, 0.95: 8}[rate]


def test_adaptive_output_is_plain_output(pair):
    target, draft = pair
    prompt = [5, 17, 40, 8]
    plain = Engine(target, None, None, Settings("plain"), [96], 200).generate(prompt, 150)
    engine = Engine(
        target, draft, None, Settings("standard", speculate_k=max(SIZES), adaptive=True), [96], 200
    )
    engine.pace.seconds = {
        (length, m): 1 + 0.01 * m for length in engine.pace.lengths(engine.capacity) for m in SIZES
    }
    engine.pace.choose = lambda needed, most, sizes=[*SIZES, *SIZES[::-1]]: sizes[len(seen) % len(sizes)]
    seen, learn = [], engine.pace.learn
    engine.pace.learn = lambda drafted, accepted: (seen.append(drafted), learn(drafted, accepted))
    result = engine.generate(prompt, 150)
    assert (
        result.tokens == plain.tokens and set(seen) >= set(SIZES) and result.drafted == sum(seen)
    )  # the last are cut


def test_adaptive_m_follows_the_draft():
    """A draft that is always right is given the largest M, one that is always wrong the smallest."""
    for step, size in ((1, max(SIZES)), (3, min(SIZES))):
        settings = Settings("standard", speculate_k=max(SIZES), adaptive=True)
        engine = Engine(Scripted(counting()), Scripted(counting(step)), None, settings, [], 900)
        engine.pace.seconds = {
            (length, m): 1 + 0.1 * m for length in engine.pace.lengths(engine.capacity) for m in SIZES
        }
        engine.generate([0, 1], 700 if step == 1 else 60)
        assert engine.pace.choose(256) == size


def test_auto_on_the_command_line(pair, tmp_path, capsys):
    assert flags.read_k("auto") == "auto" and flags.read_k("7") == 7
    with pytest.raises(SystemExit):
        generate.parse_args(["--speculate_k", "many"], "")
    assert "from 1 to 1024, or auto" in capsys.readouterr().err


@pytest.fixture(scope="module")
def low_precision(tmp_path_factory):
    """A pair in bf16, where products of other row counts round otherwise."""
    root = tmp_path_factory.mktemp("low")
    make_folder(root / "target", seed=1)
    make_folder(root / "draft", seed=2, num_hidden_layers=1)
    return load_model(root / "target", dtype=torch.bfloat16), load_model(root / "draft", dtype=torch.bfloat16)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_features_are_to_the_bit_what_the_engine_gives_the_head(low_precision, monkeypatch, length):
    """target+draft: what training reads equals what verification hands to the head, row by row, in bf16, behind prompts
    of no pass, of one and of several."""
    target, draft = low_precision
    head = JudgeHead(
        torch.zeros(64), torch.tensor(9.0), 0.5, target.fingerprint, {}, torch.zeros(64)
    )  # lets all pass
    given = []
    score = JudgeHead.score
    monkeypatch.setattr(
        JudgeHead, "score", lambda self, h, d: given.append((h.clone(), d.clone())) or score(self, h, d)
    )
    k, prompt = 5, torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    tokens = (
        Engine(target, draft, head, Settings("judge", speculate_k=k), [], 400)
        .generate(prompt, 3 * (k + 1))
        .tokens
    )
    readers = [RowReader(target, k + 1, 400), RowReader(draft, k + 1, 400, drafts=True)]
    mine = features.read_features(
        readers, answers.Encoded(prompt, tokens, [(0, 1)] * len(tokens), {"errors": []})
    )[0]
    assert len(given) == 3 and len(mine) == 18
    for number, (hidden, draft_hidden) in enumerate(given):
        rows = slice(number * (k + 1), number * (k + 1) + k)  # the sixth token of a round is the target's own
        assert torch.equal(mine[rows, :64], hidden) and torch.equal(mine[rows, 64:], draft_hidden), number
    assert not torch.allclose(given[0][1], mine[1 : k + 1, 64:], atol=1e-2), (
        "the draft's row after would do as well"
    )


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_features_are_read_in_the_engines_passes(low_precision, length):
    """The same tokens at the same places, padding included, over as much of the cache, in the same order."""
    k, seen = 5, []

    def record(model):
        def hook(module, args, kwargs):
            tokens, pos, visible, prefill = *args, kwargs.get("prefill", False)
            seen.append((model, tokens.tolist(), pos.tolist(), visible, prefill))

        return model.register_forward_pre_hook(hook, with_kwargs=True)

    target, draft = low_precision
    prompt = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    head = JudgeHead(torch.zeros(64), torch.tensor(9.0), 0.5, target.fingerprint, {})
    hooks = [record(model) for model in low_precision]
    tokens = (
        Engine(target, draft, head, Settings("judge", speculate_k=k), [], 400)
        .generate(prompt, 3 * (k + 1))
        .tokens
    )
    engine = {model: [call[1:] for call in seen if call[0] is model] for model in low_precision}
    seen.clear()
    for model in low_precision:
        RowReader(model, k + 1, 400, drafts=model is draft).read(
            prompt + tokens[:-2], length - 1, length - 1, length + 15
        )
    reader = {model: [call[1:] for call in seen if call[0] is model] for model in low_precision}
    for hook in hooks:
        hook.remove()
    assert len(engine[target]) == 3 + {1: 0, 2: 1, 65: 1, 300: 2}[length]
    assert [call[1:] for call in reader[target]] == [call[1:] for call in engine[target]]
    assert (
        reader[target][:-1] == engine[target][:-1]
    )  # in the last pass the engine reads what it drafted past the end
    assert (
        reader[draft] == engine[draft][: len(reader[draft])] and len(engine[draft]) - len(reader[draft]) <= 2
    )


def test_the_mean_score_is_of_the_tokens_that_were_looked_at():
    """Scores by position: accepted tokens and the first rejected one count, what lies past it does not."""
    target = Scripted(counting(1), score=lambda n, t: [0, 0, 2.0, 2.0, -3.0, 9.0][min(n, 5)])
    result = run(target, Scripted(counting(3)), "judge", new=3, k=4)
    assert result.tokens[:2] == [4, 7] and "".join(result.origin) == "rrt"
    expected = sum(1 / (1 + math.exp(-x)) for x in (2.0, 2.0, -3.0)) / 3
    assert result.scored == 3 and result.mean_score == pytest.approx(expected, abs=1e-5)


CALIBRATED = {"kind": "harm", "conditions": {"verify": "kl", "speculate_k": 16}, "threshold": 1.0, "passed": [0.5, 1.0],
              "max_harm": 0.02, "confidence": 0.95, "bound": upper_bound(2, 400, 0.95), "harms": 2, "n": 400, "data": "ab",
              "live": {"by_rule": [0.10, 0.05]}}  # fmt: skip


def test_a_guarantee_covers_only_what_was_calibrated():
    same = {"verify": "kl", "speculate_k": 16}
    covered, text = describe_guarantee(CALIBRATED, same, 1.0)
    assert covered and "95% confidence, at most 2% of" in text
    sure = CALIBRATED | {"confidence": 0.999, "max_harm": 0.0002}
    assert (
        "99.9% confidence, at most 0.02% of" in describe_guarantee(sure, same, 1.0)[1]
    )  # nothing is rounded up
    limited = CALIBRATED | {"conditions": same | {"max_new_tokens": 200}}
    for counted, expected in (({}, [False, True, False]), ({"cut_off": 0}, [False, True, True])):
        runs = [
            same | {"max_new_tokens": n} for n in (199, 200, 900)
        ]  # cut off at 200, who knows what 900 would bring
        assert [describe_guarantee(limited | counted, run_, 1.0)[0] for run_ in runs] == expected
    assert describe_guarantee(CALIBRATED, same, 0.5)[0]  # a stricter threshold that passed on the way
    for run_, threshold, word in (
        (same, 2.0, "threshold 1.0"),
        (same | {"speculate_k": 8}, 1.0, "speculate_k 16"),
    ):
        covered, text = describe_guarantee(CALIBRATED, run_, threshold)
        assert not covered and word in text and text.startswith("No guarantee")


def test_what_a_calibration_does_not_say_is_no_agreement():
    """Every condition that a run has must stand there and be equal; and every one that stands there, a run must have."""
    run_ = {
        "verify": "kl",
        "target": "t",
        "draft": None,
        "speculate_k": 16,
        "temperature": 0.0,
        "chat": False,
    }
    assert describe_guarantee(CALIBRATED | {"conditions": dict(run_)}, run_, 1.0)[0]
    for name in run_:
        less = {key: value for key, value in run_.items() if key != name}
        covered, text = describe_guarantee(CALIBRATED | {"conditions": less}, run_, 1.0)
        assert not covered and f"does not say with which {name}" in text
        assert not describe_guarantee(CALIBRATED | {"conditions": dict(run_)}, less, 1.0)[0]
    assert not describe_guarantee(CALIBRATED | {"conditions": {"verify": "kl"}}, run_, 1.0)[0]
    for change in (
        {"chat": 0},
        {"chat": None},
        {"speculate_k": "16"},
        {"speculate_k": 17},
        {"temperature": [0.0]},
    ):
        assert not describe_guarantee(CALIBRATED | {"conditions": run_ | change}, run_, 1.0)[0], change
    longer = run_ | {"max_new_tokens": 200}
    for value in (True, "100", None, float("nan"), [1], -1, 0, 1.5):
        calibration = CALIBRATED | {"cut_off": 0, "conditions": longer | {"max_new_tokens": value}}
        assert not describe_guarantee(calibration, longer, 1.0)[0], value
    alone = CALIBRATED | {
        "kind": "false_accept",
        "conditions": {"verify": "kl", "target": "t", "chat": False, "dtype": "float32"},
    }
    assert describe_guarantee(alone, run_ | {"dtype": "float32"}, 1.0)[
        0
    ]  # of given answers: whatever M, draft and temperature
    assert not describe_guarantee(alone, run_ | {"dtype": "float32", "chat": True}, 1.0)[0]
    reads_draft = alone | {"conditions": alone["conditions"] | {"draft": "d"}}
    assert not describe_guarantee(reads_draft, run_ | {"dtype": "float32"}, 1.0)[0]
    assert describe_guarantee(reads_draft, run_ | {"dtype": "float32", "draft": "d"}, 1.0)[0]
    assert not describe_guarantee(alone | {"conditions": {"verify": "kl"}}, run_ | {"dtype": "float32"}, 1.0)[
        0
    ]


def test_a_guarantee_says_of_which_questions_and_that_none_is_checked():
    run_ = {"verify": "kl", "speculate_k": 16}
    told = {"questions": "gsm8k, train.jsonl", "examples": ["How many\x1b[2J apples?", "x" * 100]}
    text = describe_guarantee(CALIBRATED | told, run_, 1.0)[1]
    assert (
        "these: gsm8k, train.jsonl, 'How many" in text
        and "400 calibrated on, data ab" in text
        and text.isprintable()
    )
    assert text.endswith("Whether a single prompt is like them is not checked.")
    assert (
        "(400 calibrated on, data ab)" in describe_guarantee(CALIBRATED, run_, 1.0)[1]
    )  # an older one has no description
    assert describe_guarantee(None, {"verify": "judge"}, 0.5) == (
        False, "No guarantee: this judge has no calibration; calibrate.py finds how much harm it does at most.")  # fmt: skip
    assert "--verify topk has no calibration" in describe_guarantee(None, {"verify": "topk"}, 2.0)[1]


def test_drift_warns_once_and_only_of_other_text():
    generator = torch.Generator().manual_seed(1)
    same, other = Drift(CALIBRATED), Drift(CALIBRATED)
    like = [0.10 + 0.05 * float(torch.randn((), generator=generator)) for _ in range(300)]
    assert not any(same.add({"by_rule": x}) for x in like)
    warnings = [other.add({"by_rule": x + 0.08}) for x in like]
    assert sum(w is not None for w in warnings) == 1 and "unlike" in next(w for w in warnings if w)
    assert Drift(None).add({"by_rule": 1.0}) is None
    both = Drift(CALIBRATED | {"live": {"by_rule": [0.1, 0.05], "mean_score": [0.9, 0.01]}})
    assert both.add({"by_rule": 0.1}) is None  # a run without a judge has no scores
    assert "mean score is 0.100 (1 answers" in both.add({"by_rule": 0.1, "mean_score": 0.1})
    slight, far = (
        Drift(CALIBRATED),
        Drift(CALIBRATED),
    )  # three standard deviations off: within reason once, not ten times
    found = [slight.add({"by_rule": 0.25}) for _ in range(10)]
    assert found[0] is None and any(found) and far.add({"by_rule": 0.31}) is not None


def test_the_command_line_announces_and_refuses_calibrations(tmp_path, capsys):
    path = tmp_path / "kl.json"
    with safe_open(DEMO / "judge.safetensors", "pt") as handle:
        shipped = json.loads(handle.metadata()["judge"])["info"]["calibration"]["conditions"]
    path.write_text(json.dumps(CALIBRATED | {"conditions": shipped | {"verify": "kl", "max_new_tokens": 8}}))
    command = ["--prompt", "Mia has 47 apples.", "--max_new_tokens", "8", "--verify"]
    generate.main([*command, "kl", "--calibration", str(path), "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["threshold"] == 1.0 and "Guarantee: with 95%" in err
    generate.main([*command, "kl", "--calibration", str(path), "--speculate_k", "3"])
    assert "No guarantee: calibrated with speculate_k 16, but this run has 3." in capsys.readouterr().err
    generate.main([*command[:-1], "--calibration", str(path), "--json"])  # it names the rule, too
    assert json.loads(capsys.readouterr().out)["verify"] == "kl"
    with pytest.raises(SystemExit):
        generate.main([*command, "topk", "--calibration", str(path)])
    assert "is of --verify kl, not of topk" in capsys.readouterr().err
    for change, word in (
        ({"kind": "zzz"}, "'kind' cannot be 'zzz'"), ({"conditions": []}, "'conditions'"), ({"conditions": {}}, "'conditions'"),
        ({"threshold": "16"}, "'threshold'"), ({"passed": None}, "'passed'"), ({"n": 0}, "'n' cannot be 0"), ({"n": "x"}, "'n'"),
        ({"live": []}, "Guarantee"), ({"live": {"odd": [1, 2]}}, "'live'"), ({"live": {"by_rule": [1]}}, "'live'"),
        ({"confidence": "high"}, "'confidence'"), ({"max_harm": None}, "'max_harm'"), ({"passed": [0.1]}, "'passed'"),
        ({"threshold": -1, "passed": [-1]}, "'threshold'"), ({"threshold": True, "passed": [True]}, "'threshold'"),
        ({"threshold": math.inf, "passed": [math.inf]}, "'threshold'"), ({"threshold": math.nan}, "'threshold'"),
        ({"passed": [1.0, None]}, "'passed'"), ({"passed": {}}, "'passed'"), ({"max_harm": math.nan}, "'max_harm'"),
        ({"max_harm": 10**300}, "not valid JSON"), ({"n": 4.5}, "'n'"), ({"n": True}, "'n'"), ({"harms": -1}, "'harms'"),
        ({"harms": 401}, "'harms'"), ({"harms": None}, "'harms'"), ({"bound": "x"}, "'bound'"), ({"bound": 0.5}, "'bound'"),
        ({"bound": 0.001}, "'bound'"), ({"data": 7}, "'data'"), ({"data": "x" * 500}, "'data'"), ({"questions": 3}, "'questions'"),
        ({"examples": "x"}, "'examples'"), ({"examples": [1]}, "'examples'"), ({"cut_off": -1}, "'cut_off'"), ({"kind": []}, "'kind'"),
        ({"conditions": {"verify": "standard"}}, "'conditions'"), ({"conditions": {"verify": ["kl"]}}, "'conditions'"),
        ({"live": {"by_rule": [0.1, math.nan]}}, "'live'"), ({"live": {"by_rule": [0.1, -1]}}, "'live'"), ({"live": [1]}, "'live'"),
        ({"confidence": 0.99}, "'bound'"), ({"harms": 1}, "'bound'"), ({"n": 800}, "'bound'"), ({"n": 10**12}, "'n'"),  # no longer one
        ({"cut_off": 3}, "'cut_off'"), ({"confidence": 1.5}, "'confidence'"), ({"conditions": {"verify": "nope"}}, "'conditions'"),
    ):  # fmt: skip
        path.write_text(json.dumps(CALIBRATED | change))
        if word == "Guarantee":
            continue
        with pytest.raises(SystemExit) as stop:
            generate.main([*command, "kl", "--calibration", str(path)])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and word in err and err.count("\n") == 1 and not out, (change, err)
    path.write_text("{}")
    for name, word in ((path, "lacks 'kind'"), (tmp_path / "no.json", "There is no calibration"),
                       (DEMO / "judge.safetensors", "name it with --judge_path")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            generate.main([*command, "kl", "--calibration", str(name)])
        assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "tokenizers").is_dir(), reason="needs the public tokenizers")
def test_markers_on_the_real_llama_3_tokenizer():
    folders = [path.parent for path in (DATA / "tokenizers").rglob("tokenizer.model")]
    for folder in folders:
        from tokenizer import read_model_file

        tokenizer = read_model_file(folder / "tokenizer.model", True)
        markers = make_markers(("<think>", "</think>"), tokenizer, tokenizer.vocab_size + 3)
        for text, inside in (
            ("So<think>\nhmm", 1),
            ("<think>a</think>", 0),
            ("<think>\n\n</thin", 1),
            ("x <thi nk>", 0),
        ):
            assert (markers.after(tokenizer.encode(text)) >= markers.inside) == bool(inside), (folder, text)
