"""Protects: each rule against a slow reference in float64 and against reading the wrong row; heads, labels, training."""

import json
import math
import os

import pytest
import torch
from conftest import ROOT, make_folder
from safetensors.torch import load, save

import judge as judge_module
from cli import InputError
from judge import LABEL_POLICIES, RULES, JudgeHead, check_threshold, load_judge, rule_mask
from quantize import load_model
from scripts import train_judge
from scripts.lib.answers import Encoded, encode_answer, encode_items, label_tokens, read_answers
from scripts.lib.features import RowReader, Shards, extract_features, read_features
from scripts.lib.guarantee import calibration_of
from scripts.lib.intervals import share_interval
from scripts.lib.training import (
    TrainSettings,
    balanced,
    careful_threshold,
    fit_head,
    measure_head,
    split_prompts,
)
from scripts.lib.training import (
    train_judge as fit_judge,
)
from tokenizer import load_tokenizer

DEMO = ROOT / "checkpoints" / "demo" / "target"

THRESHOLDS = {
    "standard": [0.0],
    "judge": [0.5, 0.9, 1.0],
    "kl": [0.1, 0.5, 2.0],
    "topk": [1, 2, 5],
    "typical": [0.01, 0.09, 0.5],
    "topn_delta": [0.0, 0.1, 0.6],
    "divergence": [0.05, 0.2, 0.4],
    "window": [0.3, 0.6, 0.9],
    "ensemble": [0.2, 0.5, 0.8],
}
NO_STOPS = torch.tensor([], dtype=torch.long)


def default_of(name: str) -> float:
    """The rule's default; where the judge's own threshold counts, one of 0.5."""
    return float(0.5 if RULES[name].default is None else RULES[name].default)


def slow(
    name: str,
    token: int,
    target: list[float],
    draft: list[float],
    score: float,
    following: list[bool],
    threshold: float,
) -> bool:
    """Each rule for one token, in plain Python from its definition. following: whether the next (at most 6) draft tokens
    are the target's own choices."""

    def softmax(logits):
        top = max(logits)
        exps = [math.exp(x - top) for x in logits]
        return [x / sum(exps) for x in exps]

    p, q = softmax(target), softmax(draft)
    if name == "standard":
        return target.index(max(target)) == token
    if name == "judge":
        return score > threshold
    if name == "kl":
        return max(p) <= 0.9 and sum(a * math.log(a / b) for a, b in zip(p, q)) < threshold
    if name == "topk":
        return token in sorted(range(len(p)), key=lambda i: -p[i])[: int(threshold)]
    if name == "topn_delta":
        return token in sorted(range(len(p)), key=lambda i: -p[i])[:10] and p[token] >= max(p) - threshold
    if name == "divergence":
        return (
            sum(a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)) for a, b in zip(p, q)) / 2
            <= threshold
        )
    if name == "ensemble":
        mixed = [threshold * a + (1 - threshold) * b for a, b in zip(p, q)]
        return mixed.index(max(mixed)) == token
    entropy = -sum(a * math.log(a) for a in p)
    if name == "window":
        top_three = -sum(a * math.log(a) for a in sorted(p)[-3:])
        return top_three >= threshold and len(following) == 6 and all(following[:5])
    return p[token] > min(threshold, math.sqrt(threshold) * math.exp(-entropy))


@pytest.mark.parametrize("name", RULES)
def test_rules_against_a_slow_reference(name):
    generator = torch.Generator().manual_seed(5)
    seen = set()
    for trial in range(60):
        sharp = [0.3, 1.0, 3.0][trial % 3]
        target, draft = (
            torch.randn(16, 23, generator=generator, dtype=torch.float64) * sharp for _ in range(2)
        )
        tokens = torch.where(torch.rand(16, generator=generator) < 0.8, target.argmax(-1), draft.argmax(-1))
        scores, match = torch.rand(16, generator=generator), (tokens == target.argmax(-1)).tolist()
        following = [match[i + 1 : i + 7] for i in range(16)]
        for threshold in THRESHOLDS[name]:
            found = RULES[name].accept(
                tokens, target.float(), draft.float(), scores, torch.tensor(float(threshold))
            )
            rows = zip(tokens.tolist(), target.tolist(), draft.tolist(), scores.tolist(), following)
            expected = [slow(name, *row, threshold) for row in rows]
            assert found.tolist() == expected
            seen |= set(expected)
    assert seen == {True, False}


def crafted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three draft tokens of which every rule accepts exactly the middle one, if it reads the right row."""
    target, draft = torch.full((3, 8), -9.0), torch.full((3, 8), -9.0)
    for row in (0, 2):
        target[row, 1], target[row, 2:5], draft[row, 5] = 9.0, -8.0, 9.0  # sure of token 1, the draft says 5
    target[1, 4], target[1, 5], draft[1, 4], draft[1, 5] = 3.0, 2.9, 2.9, 3.0  # undecided, so is the draft
    return torch.tensor([5, 5, 5]), target, draft, torch.tensor([0.1, 0.95, 0.2])


@pytest.mark.parametrize("name", ["judge", "kl", "topk", "typical", "topn_delta", "divergence"])
def test_a_rule_reads_its_own_row(name):
    tokens, target, draft, scores = crafted()
    threshold = torch.tensor(default_of(name))
    assert rule_mask(name, tokens, target, draft, scores, threshold, stop_ids=NO_STOPS).tolist() == [
        False,
        True,
        False,
    ]
    shifted = rule_mask(
        name, tokens, target.roll(1, 0), draft.roll(1, 0), scores.roll(1), threshold, stop_ids=NO_STOPS
    )
    assert shifted.tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["judge", "kl", "topk", "typical", "topn_delta", "divergence"])
def test_no_rule_accepts_a_stop_token(name):
    tokens, target, draft, scores = crafted()
    mask = rule_mask(
        name, tokens, target, draft, scores, torch.tensor(default_of(name)), stop_ids=torch.tensor([7, 5])
    )
    assert mask.tolist() == [False, False, False]


def test_window_looks_at_the_five_tokens_after():
    """M = 9: the draft misses the target's choice at row 1 and at row `second`; all rows are undecided."""
    target = torch.zeros(9, 8)
    target[:, 1] = 0.5
    for second, passes in ((None, True), (8, True), (7, True), (6, False), (2, False)):
        tokens = torch.ones(9, dtype=torch.long)
        tokens[1] = 2
        if second is not None:
            tokens[second] = 2
        mask = rule_mask("window", tokens, target, None, None, torch.tensor(0.3), stop_ids=torch.tensor([7]))
        assert mask[1].item() is passes and not mask[3:].any()  # the last six are never relaxed
        assert not rule_mask(
            "window", tokens, target, None, None, torch.tensor(0.3), stop_ids=torch.tensor([2])
        )[1]


@pytest.mark.parametrize("length", [1, 5, 6, 7])
def test_window_passes_nothing_of_a_draft_of_six(length):
    target = torch.zeros(length, 8)
    mask = RULES["window"].accept(
        torch.zeros(length, dtype=torch.long), target, None, None, torch.tensor(0.0)
    )
    assert mask.tolist() == [at < length - 6 for at in range(length)]
    assert RULES["window"].ahead == 6 and not any(
        rule.ahead for name, rule in RULES.items() if name != "window"
    )


@pytest.mark.parametrize(
    "p, entropy",
    [
        # -0.5 ln 0.5 - 0.3 ln 0.3 - 0.1 ln 0.1 = 0.3466 + 0.3612 + 0.2303; the other tokens do not count
        ([0.5, 0.3, 0.1, 0.05, 0.05], 0.9380),
        ([0.95, 0.02, 0.01, 0.01, 0.01], 0.1730),  # 0.0487 + 0.0782 + 0.0461: below 0.3, the target is sure
        ([1 / 3, 1 / 3, 1 / 3, 0, 0], 1.0986),  # ln 3, the most there is
        ([0.2, 0.2, 0.2, 0.2, 0.2], 0.9657),  # 3 x 0.2 ln 5: p is not made to sum to 1 again
        ([1.0, 0, 0, 0, 0], 0.0),  # 0 ln 0 is 0
    ],
)
def test_windows_gate_by_hand(p, entropy):
    target = torch.tensor([p] * 7).log()
    tokens = torch.tensor([1, *[0] * 6])
    for margin in (-1e-3, 1e-3):
        mask = RULES["window"].accept(tokens, target, None, None, torch.tensor(entropy + margin))
        assert mask.tolist() == [margin < 0, *[False] * 6]
    default = RULES["window"].accept(tokens, target, None, None, torch.tensor(RULES["window"].default))
    assert default[0].item() is (entropy >= 0.3)


def test_kl_is_exact_where_the_target_is_sure():
    target = torch.zeros(1, 3, 10)
    for peak, passes in ((3.9, True), (6.0, False)):  # top-1 probability 0.846 and 0.978
        target = torch.zeros(1, 10)
        target[0, 0] = peak
        mask = RULES["kl"].accept(torch.tensor([1]), target, target.clone(), None, torch.tensor(1.0))
        assert mask.item() is passes


@pytest.mark.parametrize(
    "name, bad",
    [
        ("judge", 0.4),
        ("judge", 1.1),
        ("kl", -0.1),
        ("topk", 0),
        ("topk", 2.5),
        ("typical", 1.5),
        ("window", 1.1),
        ("window", -0.1),
    ],
)
def test_thresholds_outside_the_range_are_refused(name, bad):
    with pytest.raises(InputError, match=rf"--threshold {bad} .* {name}"):
        check_threshold(name, bad)
    assert check_threshold(name, default_of(name)) == default_of(name)


def test_a_head_is_saved_and_loaded(tmp_path, pair):
    target, draft = pair
    head = JudgeHead(torch.randn(64), torch.tensor(0.3), 0.7, target.fingerprint, {"label_policy": "span"})
    head.save(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors", target)
    hidden = torch.randn(5, 64)
    assert torch.equal(again.score(hidden), head.score(hidden))
    assert torch.allclose(head.score(hidden), torch.sigmoid((hidden * head.weight).sum(-1) + 0.3))
    assert (again.threshold, again.info) == (0.7, {"label_policy": "span"})
    with pytest.raises(InputError) as caught:
        load_judge(tmp_path / "judge.safetensors", draft)
    assert target.fingerprint in str(caught.value) and draft.fingerprint in str(caught.value)


def test_the_fingerprint_is_of_the_weights_not_of_the_run(tmp_path):
    def of(folder: str, **more) -> str:
        return load_model(tmp_path / folder, **more).fingerprint

    make_folder(tmp_path / "a", dtype=torch.bfloat16)
    make_folder(tmp_path / "b", dtype=torch.bfloat16, shard="40KB")
    theirs = make_folder(tmp_path / "c", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "fp32")  # the same values, in another type on disk
    with torch.no_grad():
        theirs.model.layers[1].self_attn.q_proj.weight.mul_(1.5)  # what a merged adapter changes
    theirs.save_pretrained(tmp_path / "tuned")
    assert of("a") == of("a", dtype=torch.float32) == of("a", dtype=torch.float16) == of("b") == of("fp32")
    assert of("a") != of("tuned")


def test_broken_judge_files_are_named(tmp_path, pair):
    target, path = pair[0], tmp_path / "judge.safetensors"
    with pytest.raises(InputError, match="no judge file"):
        load_judge(path, target)
    header = {"threshold": 0.5, "feature": "target", "target_fingerprint": target.fingerprint, "info": {}}
    tensors = {"weight": torch.zeros(64), "bias": torch.zeros(())}

    def file(tensors: dict, header) -> bytes:
        return save(tensors, metadata={"judge": json.dumps(header)})

    contents = [
        b"",
        b"garbage" * 9,
        save(tensors),
        file({"weight": torch.zeros(64)}, header),
        file(tensors, [1]),
    ]
    contents += [file(tensors, {k: v for k, v in header.items() if k != missing}) for missing in header]
    contents += [file(tensors, header | change) for change in ({"threshold": "abc"}, {"threshold": "nan"}, {"threshold": 7},
                 {"threshold": None}, {"threshold": True}, {"threshold": math.nan}, {"threshold": "0.7"}, {"threshold": [0.7]},
                 {"threshold": 10**400}, {"feature": "post-norm"}, {"feature": "target+draft"}, {"feature": []},
                 {"feature": None}, {"target_fingerprint": 7}, {"target_fingerprint": None}, {"info": []}, {"info": "x"},
                 {"info": {"chat": "no"}}, {"info": {"chat": None}}, {"info": {"held_out": 3}}, {"info": {"calibration": 3}},
                 {"info": {"label_policy": "x"}}, {"info": {"rows": -1}}, {"info": {"l2": math.nan}})]  # fmt: skip
    contents += [file(tensors | change, header) for change in (
        {"bias": torch.zeros(2)}, {"bias": torch.tensor(math.nan)}, {"bias": torch.tensor(math.inf)}, {"bias": torch.tensor(1)},
        {"weight": torch.full((64,), math.nan)}, {"weight": torch.zeros(63)}, {"weight": torch.zeros(8, 8)},
        {"weight": torch.zeros(64, dtype=torch.long)}, {"weight": torch.zeros(64).index_fill(0, torch.tensor(9), -math.inf)},
        {"weight": torch.zeros(0)}, {"trained_on": torch.zeros(3)}, {"trained_on": torch.tensor(3)},
        {"trained_on": torch.tensor([5, -1])}, {"trained_on": torch.zeros(2, 2, dtype=torch.long)},
        {"trained_on": torch.tensor([True])},
    )]  # fmt: skip
    good = file(tensors, header)
    contents += [
        save(tensors, metadata={"judge": text})
        for text in ("", "{", "[" * 100_000, "1" * 5000, "\udc80".encode(errors="replace").decode())
    ]
    contents += [good[:n] for n in (4, 8, 60, len(good) - 1)] + [
        b"\xff" * 8 + good[8:],
        good.replace(b"__metadata__", b"__metadatb__"),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)) as caught:
            calibration_of(load_judge(path, target), path)
        assert "\n" not in str(caught.value)
    path.write_bytes(good)
    assert load_judge(path, target).threshold == 0.5
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="no judge file"):
        load_judge(path, target)


def test_a_heads_draft_weights_must_fit_the_draft(tmp_path, pair):
    target, draft = pair
    info = {"draft_fingerprint": draft.fingerprint}
    for weights, word in ((torch.zeros(63), "63 values for 64"), (torch.full((64,), math.nan), "not finite")):
        JudgeHead(torch.zeros(64), torch.tensor(0.0), 0.5, target.fingerprint, info, weights).save(
            tmp_path / "j"
        )
        with pytest.raises(InputError, match=word):
            load_judge(tmp_path / "j", target, draft)


def test_label_policies_on_a_hand_made_example():
    spans = [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]  # "ab", "c", "é", "de", "f"
    assert label_tokens(spans, [[3, 4]], "span") == [1, 1, 0, 1, 1]
    assert label_tokens(spans, [[3, 4]], "ignore_after") == [1, 1, 0, -100, -100]
    assert label_tokens(spans, [[3, 4]], "from_error") == [1, 1, 0, 0, 0]
    assert label_tokens(spans, [[5, 6]], "span") == [
        1,
        1,
        1,
        0,
        1,
    ]  # an error that cuts a token makes it wrong
    assert label_tokens(spans, [[3, 4], [5, 6]], "ignore_after") == [1, 1, 0, 0, -100]
    assert all(label_tokens(spans, [], policy) == [1] * 5 for policy in LABEL_POLICIES)


class ByteTokenizer:
    """Every byte a token: characters of several bytes span tokens."""

    prefix, vocab_size, stop_ids = [96], 97, [0]

    def encode(self, text: str) -> list[int]:
        return [byte % 96 for byte in text.encode()]

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        return self.bytes[id]

    def __init__(self, text: str):
        self.bytes = {byte % 96: bytes([byte]) for byte in text.encode()}
        assert len(self.bytes) == len(set(text.encode())), "two bytes share an id"


def test_spans_are_mapped_through_multi_byte_characters():
    response = "aé🙂b"
    prompt_ids, ids, spans = encode_answer(ByteTokenizer("x" + response), "x", response)
    assert prompt_ids == [96, ord("x") % 96] and len(ids) == 1 + 2 + 4 + 1
    assert spans == [(0, 1), (1, 2), (1, 2), *[(2, 3)] * 4, (3, 4)]  # every part of a character covers it
    assert label_tokens(spans, [[2, 3]], "span") == [1, 1, 1, 0, 0, 0, 0, 1]


def test_a_response_that_is_read_on_its_own_keeps_its_characters():
    """SentencePiece puts a space before a text; where prompt and response share a token they are read apart."""
    tokenizer = load_tokenizer(DEMO)
    prompt_ids, ids, spans = encode_answer(tokenizer, "How many app", "les now?")
    assert prompt_ids[1:] == tokenizer.encode("How many app") and ids == tokenizer.encode("les now?")
    assert spans[-1] == (7, 8) and max(start for start, _ in spans) == 7
    together = encode_answer(tokenizer, "How many", " apples now?")
    assert together[1] == tokenizer.encode("How many apples now?")[len(tokenizer.encode("How many")) :]
    assert together[2][0] == (0, 7)


@pytest.mark.parametrize(
    "line, word",
    [
        ("{", "line 2 is not valid JSON"),
        ('{"prompt": "p", "errors": []}', "'response' must be a str"),
        (
            '{"prompt": "p", "response": "abc", "errors": [[2, 9]]}',
            r"\[2, 9\], not \[start, end\] within 0 and 3",
        ),
        ('{"prompt": "p", "response": "abc", "errors": "none"}', "'errors' must be a list"),
        ('["p"]', "is a JSON list, not an object"),
        ('{"prompt": "p", "response": "", "errors": []}', "'response' is empty"),
        ('{"prompt": "p", "response": "abc", "errors": [[false, true]]}', "within 0 and 3"),
        ('{"prompt": "p", "response": "abc", "errors": null}', "'errors' is null.*annotate"),
        (
            '{"prompt_tokens": [1], "tokens": [2, 3], "labels": [1]}',
            "'labels' must be one of 1, 0, -100 for each of the 2",
        ),
        ('{"prompt_tokens": [1], "tokens": [2, 3], "labels": [1, 2]}', "'labels' must be one of"),
        ('{"prompt_tokens": [], "tokens": [2], "labels": [1]}', "'prompt_tokens' must be a list"),
        ('{"prompt_tokens": [1], "tokens": [-2], "labels": [1]}', "ids of at least 0"),
        (
            '{"prompt_tokens": [1], "tokens": ["a"], "labels": [1]}',
            "'tokens' must be a list of whole numbers",
        ),
        (
            '{"prompt_tokens": [true], "tokens": [2], "labels": [1]}',
            "'prompt_tokens' must be a list of whole numbers",
        ),
        (
            '{"prompt_tokens": [1], "tokens": [2.0], "labels": [1]}',
            "'tokens' must be a list of whole numbers",
        ),
        (
            '{"prompt_tokens": [1], "tokens": [2], "labels": [true]}',
            "'labels' must be a list of whole numbers",
        ),
        (
            '{"prompt_tokens": [1], "tokens": [2], "labels": [NaN]}',
            "'labels' must be a list of whole numbers",
        ),
        ('{"prompt": "p", "response": "abc", "errors": [[0, NaN]]}', "within 0 and 3"),
        ('{"prompt": "p", "response": "abc", "errors": [[0, 1, 2]]}', "within 0 and 3"),
        ('{"prompt": "p", "response": "abc", "errors": [[0, 1]], "guard": "yes"}', "'guard' must be a bool"),
        (
            '{"prompt": "p", "response": "abc", "errors": [[0, ' + "1" * 5000 + "]]}",
            "whole number of 5000 digits",
        ),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "p", "response": "\\ud83d", "errors": []}', "half of a surrogate pair"),
    ],
)
def test_bad_answer_files_are_named_by_line_and_field(tmp_path, line, word):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "r", "errors": []}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=word) as caught:
        read_answers(path)
    assert f"{path}, line 2" in str(caught.value)


def test_answer_files_may_hold_any_unicode_and_blank_lines(tmp_path):
    item = {"prompt": "p", "response": "a\u2028b\u0085c", "errors": []}
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + json.dumps(item, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    assert read_answers(tmp_path / "a.jsonl") == [item]
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no answers"):
        read_answers(tmp_path / "a.jsonl")


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 6, 17])
def test_rows_are_read_at_their_own_positions(pair, rows):
    """Own row: the hidden state after the token was read. The row before predicts it, and is another vector."""
    target, _ = pair
    prompt, ids = (
        torch.randint(0, 97, (70,), generator=torch.Generator().manual_seed(2)).tolist(),
        list(range(10, 40)),
    )
    reader = RowReader(target, rows, 100)
    found = reader.read(prompt + ids, 69, 70, 100)
    target.setup_caches(128)
    whole = target(torch.tensor([prompt + ids]), torch.arange(100), n_logits=0)[0][0]
    assert found.shape == (30, 64) and torch.allclose(found, whole[70:], atol=1e-5)
    assert not torch.allclose(found, whole[69:-1], atol=1e-2)


@torch.inference_mode()
def test_what_sequences_share_is_read_once_and_rightly(pair, monkeypatch):
    """Mined answers repeat a text up to their last token: the reader goes on from where they part."""
    target, _ = pair
    prompt, texts = (
        [1, 5, 9, 4],
        [list(range(10, 30)), [*range(10, 25), 77], [*range(10, 25), 77, 50, 60], list(range(30, 50))],
    )
    reader, read = RowReader(target, 4, 40), []
    forward = target.forward
    monkeypatch.setattr(
        target,
        "forward",
        lambda tokens, *args, **more: read.append(tokens.shape[1]) or forward(tokens, *args, **more),
    )
    for ids in texts:
        both = prompt + ids
        found = reader.read(both, 3, len(both) - 1, len(both))
        fresh = forward(torch.tensor([both]), None)[0][0, -1:]
        assert torch.allclose(found, fresh, atol=1e-4)
    # the prompt once; the second and third texts one pass of 4 rows each, the fourth from its beginning
    assert read == [64, *[4] * 6, 4, 4, *[4] * 6]


def mined(prompt: list[int], tokens: list[int], labels: list[int]) -> dict:
    return {"prompt_tokens": prompt, "tokens": tokens, "labels": labels}


def test_features_of_mined_answers_are_the_labelled_rows(pair):
    target, draft = pair
    answer = Encoded(
        [1, 2, 3],
        [10, 11, 12, 13, 14],
        None,
        mined([1, 2, 3], [10, 11, 12, 13, 14], [-100, 0, -100, 1, -100]),
    )
    features, places = read_features([RowReader(target, 5, 16), RowReader(draft, 5, 16)], answer)
    assert places.tolist() == [1, 3] and features.shape == (2, 128)
    both = torch.tensor([[1, 2, 3, 10, 11, 12, 13, 14]])
    with torch.inference_mode():
        own, before = (
            target(both)[0][0, [4, 6]],
            draft(both)[0][0, [3, 5]],
        )  # the draft's row that proposed the token
    assert torch.allclose(features, torch.cat([own, before], dim=1), atol=1e-4)
    assert not torch.allclose(features[:, 64:], draft(both)[0][0, [4, 6]], atol=1e-2)


def test_features_on_disk_survive_a_kill_at_any_shard(pair, tmp_path):
    target, _ = pair
    answers = [
        Encoded([1, i], list(range(10, 20 + i)), None, mined([1, i], list(range(10, 20 + i)), [1] * (10 + i)))
        for i in range(9)
    ]
    whole = extract_features([target], answers, 5, tmp_path / "a", shard_bytes=8000)
    assert len(whole.files) > 3 and len(whole.answer) == sum(len(a.ids) for a in answers)
    folder = next((tmp_path / "a").iterdir())
    for kept in range(len(whole.files)):
        again = tmp_path / f"cut{kept}" / folder.name
        again.mkdir(parents=True)
        for file in whole.files[:kept]:
            (again / file.name).write_bytes(file.read_bytes())
        (again / "00099.safetensors.tmp").write_bytes(b"half a shard")
        resumed = extract_features([target], answers, 5, tmp_path / f"cut{kept}", shard_bytes=8000)
        assert [f.read_bytes() for f in resumed.files] == [f.read_bytes() for f in whole.files]
    assert torch.equal(torch.cat(list(whole)), torch.cat(list(resumed)))


def test_a_damaged_cache_is_made_anew_from_where_it_is_damaged(pair, tmp_path, capsys):
    target, _ = pair
    answers = [
        Encoded([1, i], list(range(10, 20 + i)), None, mined([1, i], list(range(10, 20 + i)), [1] * (10 + i)))
        for i in range(9)
    ]
    whole = extract_features([target], answers, 5, tmp_path, shard_bytes=8000)
    contents = [file.read_bytes() for file in whole.files]
    features, file = torch.cat(list(whole)), whole.files[1]
    assert len(contents) == 4
    tensors, metadata = load(contents[1]), {"next": "6"}
    assert save(tensors, metadata) == contents[1]
    damaged = [
        b"",
        b"x",
        contents[1][:40],
        contents[1][:-1],
        b"\xff" * 8 + contents[1][8:],
        save(tensors),
        save({}, metadata),
    ]
    damaged += [
        save(tensors, {"next": text})
        for text in ("", "x", "-1", "0", "3", "5", "7", "10", "9" * 5000, "6.0", "٦")
    ]
    damaged += [save(tensors | change, metadata) for change in (
        {"features": tensors["features"][:-1]}, {"features": tensors["features"][:, :-1].contiguous()}, {"features": tensors["features"].half()},
        {"features": torch.full_like(tensors["features"], math.nan)}, {"features": torch.zeros(())}, {"answer": tensors["place"].clone()},
        {"answer": tensors["answer"].long()}, {"answer": torch.zeros((), dtype=torch.int32)}, {"place": tensors["place"] + 1},
        {"more": torch.zeros(1)},
    )]  # fmt: skip
    damaged += [contents[0], contents[2], None]  # another one in its place, or none
    for content in damaged:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        again = extract_features([target], answers, 5, tmp_path, shard_bytes=8000)
        err = capsys.readouterr().err
        assert (err.count("\n"), "made anew" in err, str(file) in err) == (
            (1, True, True) if content is not None else (0, False, False)
        )
        assert [f.read_bytes() for f in again.files] == contents and torch.equal(
            torch.cat(list(again)), features
        )
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match=f"{file} cannot be written: it is a pipe"):
        extract_features([target], answers, 5, tmp_path, shard_bytes=8000)
    capsys.readouterr()


def test_states_that_are_not_finite_stop_a_training(pair, tmp_path, monkeypatch):
    target, _ = pair
    monkeypatch.setattr(
        RowReader, "read", lambda self, ids, base, begin, end: torch.full((end - begin, 64), math.inf)
    )
    with pytest.raises(InputError, match="answer 1 are not finite.*--precision"):
        extract_features([target], [Encoded([1], [2], None, mined([1], [2], [1]))], 5, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_shards_on_disk_train_to_the_same_bits_as_shards_in_memory(pair, tmp_path, monkeypatch):
    target, _ = pair
    answers = [
        Encoded([1, i], list(range(10, 40)), None, mined([1, i], list(range(10, 40)), [1] * 30))
        for i in range(9)
    ]
    held = extract_features([target], answers, 5, tmp_path, shard_bytes=20000)
    monkeypatch.setattr(Shards, "HOLD", 0)
    lazy = extract_features([target], answers, 5, tmp_path, shard_bytes=20000)
    assert held.held is not None and lazy.held is None and len(lazy.files) > 2
    labels = (torch.arange(270) % 7 > 0).long()
    one, other = (
        fit_head(shards, labels, balanced(labels, labels >= 0), [0.1])[0] for shards in (held, lazy)
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_planted_direction_is_learned():
    """Two features carry the label; the fit finds them, weighs rare wrong tokens up, and folds the scaling in."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, generator=generator) > 0.03).long()
    features = torch.randn(4000, 16, generator=generator) * torch.logspace(-2, 2, 16) + 5
    features[:, 3] += (labels - 0.5) * 4 * 10 ** (-2 + 4 * 3 / 15)
    weight, bias = fit_head(list(features.split(900)), labels, balanced(labels, labels >= 0), [1e-3])[0]
    scores = torch.sigmoid(features @ weight + bias)
    figures = measure_head(scores, labels, [0.5])
    assert figures["auc"] > 0.95
    assert figures["at"][0]["recall"] > 0.9 and figures["at"][0]["false_accept"] < 0.1


def test_the_fit_is_the_minimum_that_scikit_learn_finds():
    """The same loss in an independent solver: C = 1 / (2 l2 sum of weights)."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(600, 5, generator=generator) * torch.tensor([1.0, 9, 0.1, 2, 1]) + 3
    y = (x[:, 1] - 3 + 4 * torch.randn(600, generator=generator) > -6).long()
    used = torch.rand(600, generator=generator) < 0.8
    weights = balanced(y, used)
    weight, bias = fit_head([x[:200], x[200:]], y, weights, [0.01])[0]
    mean, std = x[used].double().mean(0), x[used].double().std(0, unbiased=False)
    theirs = linear_model.LogisticRegression(C=1 / (2 * 0.01), tol=1e-10, max_iter=5000)
    theirs.fit(
        ((x - mean) / std)[used].numpy(),
        y[used].numpy(),
        sample_weight=(weights / weights.sum())[used].numpy(),
    )
    expected = torch.tensor(theirs.coef_[0]) / std
    assert torch.allclose(weight.double(), expected, rtol=5e-3, atol=1e-5)
    assert bias.item() == pytest.approx(theirs.intercept_[0] - (expected * mean).sum().item(), abs=5e-3)


def test_measured_figures_are_exact():
    scores, labels = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.1]), torch.tensor([1, 1, 1, 0, 0])
    figures = measure_head(scores, labels, [0.5])
    assert figures["auc"] == pytest.approx(5 / 6)  # of six pairs, only (0.3, 0.6) is out of order
    assert figures["at"] == [{"threshold": 0.5, "recall": 2 / 3, "precision": 2 / 3, "false_accept": 0.5}]
    assert [(row["tokens"], row["right"]) for row in figures["reliability"]] == [
        (1, 0.0),
        (1, 1.0),
        (1, 0.0),
        (1, 1.0),
        (1, 1.0),
    ]
    tied = measure_head(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1, 0, 1]), [])
    assert tied["auc"] == 0.5


TEXT = "abcdefghij"


def letters() -> ByteTokenizer:
    return ByteTokenizer(TEXT + "0123456789p")


def answers_to(prompts: range) -> list[dict]:
    """Two answers a prompt, one of them wrong at its eighth character."""
    return [
        {"prompt": f"p{i}", "response": TEXT, "errors": [[7, 8]] if kind else []}
        for i in prompts
        for kind in (0, 1)
    ]


def test_training_splits_by_prompt_and_needs_both_kinds(pair, tmp_path):
    target, _ = pair
    head = fit_judge([target], letters(), answers_to(range(10)), TrainSettings(rows=5), tmp_path)
    assert head.fingerprint == target.fingerprint and head.info["label_policy"] == TrainSettings.policy
    held = head.info["held_out"]
    assert held["wrong_tokens"] == 2 and held["right_tokens"] == 2 * (
        10 + 9
    )  # two whole prompts, both answers of each
    assert len(head.trained_on) == 8
    assert dict(head.info["l2_tried"])[head.info["l2"]] >= max(auc for _, auc in head.info["l2_tried"]) - 1e-5
    with pytest.raises(InputError, match="no wrong or no right"):
        fit_judge(
            [target],
            letters(),
            [a for a in answers_to(range(10)) if not a["errors"]],
            TrainSettings(rows=5),
            tmp_path,
        )


def test_the_careful_threshold_by_hand():
    """59 wrong tokens, none accepted, bound 4.95% of them: 1 - 0.05^(1/59); 58 cannot, and 93 may hold one."""
    for wrong, accepted, expected in ((59, 0, 0.7), (58, 0, 0.99), (93, 1, 0.7), (92, 1, 0.8), (10, 0, 0.99)):
        scores = torch.tensor([0.95] * 40 + [0.6] * (wrong - accepted) + [0.72] * accepted)
        labels = torch.tensor([1] * 40 + [0] * wrong)
        assert careful_threshold(scores, labels) == expected, (wrong, accepted)
    assert (
        careful_threshold(torch.tensor([0.9999] * 70), torch.zeros(70)) == 0.99
    )  # none of the grid qualifies


def test_training_says_with_what_certainty_and_what_it_wrote(pair, tmp_path, capsys, monkeypatch):
    """10 prompts, 2 wrong held-out tokens: the threshold is the strictest, and the figures are called too few."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers_to(range(10))))
    monkeypatch.setattr(train_judge, "load_model", lambda folder, device, dtype: pair[0])
    monkeypatch.setattr(train_judge, "load_tokenizer", lambda folder: letters())
    out = tmp_path / "judge.safetensors"
    judge_module.main(["train", "--data", str(path), "--out", str(out), "--device", "cpu"])
    printed, err = capsys.readouterr()
    assert load_judge(out, pair[0]).threshold == 0.99 and "   0.990*" in printed
    assert (
        f"{out}: a judge with threshold 0.99 (the careful choice" in printed and "no calibration" in printed
    )
    assert (
        "38 right and 2 wrong tokens" in printed
        and "Only 2 wrong tokens are held out" in err
        and "78%" in err
    )
    held = load_judge(out, pair[0]).info["held_out"]
    at_half = held["at"][0]
    low, high = share_interval(round(at_half["recall"] * 38), 38)
    assert f"{at_half['recall']:.4f}, {round(at_half['recall'] * 38)}/38 ({low:.3f}-{high:.3f})" in printed
    judge_module.main(
        ["train", "--data", str(path), "--out", str(out), "--device", "cpu", "--threshold", "0.6"]
    )
    assert load_judge(out, pair[0]).threshold == 0.6 and "(as given)" in capsys.readouterr().out


def test_intervals_of_shares_are_clopper_and_pearsons():
    """By hand from their paper of 1934: 1 of 20 is 0.0013 to 0.2487; and the ends."""
    assert share_interval(1, 20) == pytest.approx((0.0013, 0.2487), abs=1e-4)
    assert share_interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1)) and share_interval(10, 10)[1] == 1
    assert share_interval(0, 0) == (0, 1)
    low, high = share_interval(34890, 35350)
    assert low < 34890 / 35350 < high and high - low < 0.003


def test_a_split_that_leaks_a_question_turns_red():
    """All answers of a prompt, of either form, fall on one side; and no side is empty."""
    tokenizer, answers = letters(), answers_to(range(10)) * 3
    answers += [mined([96, *tokenizer.encode(f"p{i}")], [5, 6], [1, 0]) for i in range(10)]
    keys = torch.tensor([answer.key for answer in encode_items(tokenizer, answers, False, 97)])
    prompts = [
        item["prompt"] if "prompt" in item else "p" + str((item["prompt_tokens"][-1] - ord("0")) % 96)
        for item in answers
    ]
    assert len(set(prompts)) == 10
    for seed in range(20):
        test, validation = split_prompts(keys, seed)
        sides = {}
        for prompt, t, v in zip(prompts, test.tolist(), validation.tolist()):
            sides.setdefault(prompt, set()).add((t, v))
        assert all(len(found) == 1 for found in sides.values()), "a prompt is on two sides"
        assert (
            test.any()
            and validation.any()
            and not (test & validation).any()
            and not (test | validation).all()
        )


def test_held_out_answers_teach_nothing(pair, tmp_path):
    """Other marks on the held-out answers change the figures, and not one bit of the head; on the others they do."""
    target, _ = pair
    settings, answers = TrainSettings(rows=5, seed=3), answers_to(range(10))
    keys = torch.tensor([answer.key for answer in encode_items(letters(), answers, False, 97)])
    held_out = split_prompts(keys, settings.seed, settings.held_out)[0].tolist()
    heads = []
    for side in (None, True, False):
        changed = [
            item | {"errors": [[2, 6]]} if test == side else item for item, test in zip(answers, held_out)
        ]
        heads.append(fit_judge([target], letters(), changed, settings, tmp_path))
    first, other_test, other_training = heads
    assert torch.equal(first.weight, other_test.weight) and torch.equal(first.bias, other_test.bias)
    assert first.info["held_out"] != other_test.info["held_out"]
    assert not torch.allclose(first.weight, other_training.weight)


def test_the_same_seed_trains_the_same_bits_from_a_fresh_or_a_kept_cache(pair, tmp_path):
    target, draft = pair
    settings = TrainSettings(rows=5, seed=3)
    path = tmp_path / "judge.safetensors"
    for models, feature in (([target], "target"), ([target, draft], "target+draft")):
        contents = set()
        for cache in ("one", "one", "two"):
            fit_judge(models, letters(), answers_to(range(10)), settings, tmp_path / cache).save(path)
            contents.add(path.read_bytes())
        assert len(contents) == 1
        assert load_judge(path, target, draft).feature == feature
    with pytest.raises(InputError, match="reads the draft"):
        load_judge(path, target)


def test_guarded_texts_are_pushed_out_by_their_weight(pair, tmp_path):
    """The guarded text looks like right text: without weight it passes, with much weight it does not."""
    target, _ = pair
    guard = [{"prompt": f"p{i}", "response": "jihg", "errors": [], "guard": True} for i in range(10)]
    passed = []
    for weight in (0.0, 50.0):
        settings = TrainSettings(rows=5, guard_weight=weight, l2=1e-3)
        info = fit_judge([target], letters(), answers_to(range(10)) + guard, settings, tmp_path).info["guard"]
        assert (
            info["training"]["tokens"] + info["held_out"]["tokens"] == 40 and info["held_out"]["tokens"] > 0
        )
        passed.append(info["training"]["passed"] + info["held_out"]["passed"])
    assert passed[0] > 2 * passed[1]


def test_command_line_reports_a_mistake_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_judge, "load_model", lambda *args: pytest.fail("loaded all the same"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "response": "r", "errors": []}))
    os.mkfifo(tmp_path / "pipe")
    base = [
        "train",
        "--checkpoint_path",
        str(DEMO),
        "--data",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "judge.safetensors"),
    ]
    for more, word in (
        (["--data", str(tmp_path / "no.jsonl")], "no.jsonl"), (["--out", str(tmp_path)], "cannot be written"),
        (["--out", "/no/such/judge"], "cannot be written"), (["--threshold", "2"], "from 0.5 to 1"),
        (["--speculate_k", "0"], "--speculate_k 0"), (["--device", "tpu9"], "tpu9"), (["--magic"], "--magic"),
        (["--features", "target+draft"], "--draft_checkpoint_path"), (["--l2", "-1"], "--l2 -1"),
        (["--out", str(tmp_path / "a.jsonl")], "one of the inputs"), (["--cache", str(tmp_path / "a.jsonl")], "is no folder"),
        (["--l2", "nan"], "--l2 nan"), (["--speculate_k", "99999"], "from 1 to 1024"), (["--guard", "/no"], "/no"),
        (["--speculate_k", "9" * 5000], "whole number"), (["--seed", "1" * 400], "whole number"), (["--guard_weight", "inf"], "from 0"),
        (["--out", "/dev/null"], "it is a device"), (["--out", str(tmp_path / "pipe")], "it is a pipe"),
        (["--data", str(tmp_path / "pipe")], "is a pipe"), (["--data", "/dev/zero"], "is a device"), (["--guard", str(tmp_path)], "is a folder"),
        (["--out", str(DEMO / "model.safetensors")], "one of the inputs"), (["--out", str(tmp_path / ("x" * 300))], "too long"),
        (["--cache", str(tmp_path / "judge.safetensors")], "is --out itself"), (["--cache", "/dev/null/a"], "--cache"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            judge_module.main(base + more)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_flags_may_come_before_the_command(tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(train_judge, "train", ran.append)
    for argv in (["--data", "a", "b", "train", "--out", "c"], ["--out", "c", "--data", "a", "b", "train"],
                 ["train", "--out", "c", "--data", "a", "b"]):  # fmt: skip
        judge_module.main(argv)
        assert (list(map(str, ran[-1].data)), str(ran[-1].out)) == (["a", "b"], "c")
    judge_module.main(["train", "--data", "train", "--out", "c"])  # a file of that name
    assert list(map(str, ran[-1].data)) == ["train"]
    for argv in (["--max_harm", "2", "calibrate"], ["calibrate", "--help"]):
        with pytest.raises(SystemExit):
            judge_module.main(argv)
        out, err = capsys.readouterr()
        assert (out + err).startswith(("calibrate.py: ", "usage: calibrate.py ")), out + err
