"""The judge head, the verification rules, their data, and training a head.

A judge is one linear layer on the target's last hidden state before the final norm, at the draft token's own position
(Judge Decoding, arXiv 2501.19309). A draft token passes when the standard test OR the rule accepts it.

    python judge.py train --data answers.jsonl --out judge.safetensors       # of the demo target, or --checkpoint_path
    python judge.py calibrate --verify judge --max_harm 0.02 --questions demo        # see scripts/calibrate.py

Training data are JSON lines, one answer each, in either form:

    {"prompt": "...", "response": "...", "errors": [[start, end], ...], "source": "..."}      characters of the response
    {"prompt_tokens": [...], "tokens": [...], "labels": [1 right, 0 wrong, -100 ignored, ...], "source": "..."}
"""

from cli import InputError, Parser, Progress, number, one_line, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import codecs
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from files import (
    check_folder,
    check_not_input,
    check_writable,
    parse_object,
    read_bytes,
    read_json,
    read_json_lines,
    write_file,
)
from model import DTYPES, PREFILL_ROWS, WINDOW, Transformer, pick_device, run_dtype
from quantize import load_model
from tokenizer import Tokenizer, load_tokenizer

FEATURES = {  # name -> what the head reads; the name stands in the file's header
    "target": "the target's pre-norm hidden state at the token's own position",
    "target+draft": "the same, then the draft's pre-norm hidden state in the row that proposed the token",
}
DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"
MOST_BYTES = 1 << 30  # of a judge or a shard of features
LABEL_POLICIES = ("span", "ignore_after", "from_error")


def no_prompts() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class JudgeHead:
    """score = sigmoid(weight . hidden + draft_weight . draft_hidden + bias), in fp32. `info`: the header, on its making."""

    weight: Tensor  # (dim,)
    bias: Tensor  # ()
    threshold: float
    fingerprint: str  # of the target it was trained on
    info: dict
    draft_weight: Tensor | None = None  # (dim of the draft,), for the feature target+draft
    trained_on: Tensor = field(default_factory=no_prompts)  # (n,) prompt_key of every training prompt

    @property
    def feature(self) -> str:
        return "target" if self.draft_weight is None else "target+draft"

    def score(self, hidden: Tensor, draft_hidden: Tensor | None = None) -> Tensor:
        """Probability that each token is right. hidden (..., dim): its own rows of the target's pre-norm states;
        draft_hidden (..., dim of the draft): the draft's states in the rows that proposed it."""
        z = hidden.float() @ self.weight + self.bias
        return torch.sigmoid(z if self.draft_weight is None else z + draft_hidden.float() @ self.draft_weight)

    def to(self, device: torch.device | str) -> "JudgeHead":
        draft_weight = None if self.draft_weight is None else self.draft_weight.to(device)
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device), draft_weight=draft_weight)

    def save(self, path: str | Path) -> None:
        """Writes `judge.safetensors`, beside and renamed. One entry in its header, since their order is not kept."""
        header = {
            "threshold": self.threshold,
            "feature": self.feature,
            "target_fingerprint": self.fingerprint,
            "info": self.info,
        }
        tensors = {"weight": self.weight.cpu(), "bias": self.bias.cpu(), "trained_on": self.trained_on}
        if self.draft_weight is not None:
            tensors["draft_weight"] = self.draft_weight.cpu()
        write_file(Path(path), save(tensors, metadata={"judge": json.dumps(header)}))


def load_judge(path: str | Path, target: Transformer, draft: Transformer | None = None) -> JudgeHead:
    """Loads a head for `target` (and, with the feature target+draft, for `draft`).

    Raises InputError when it is missing, broken, or made for another model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no judge file {path}; train one with judge.py or name another --judge_path.")
    metadata, tensors = read_safetensors(path)
    if "judge" not in metadata:
        raise InputError(f"{path} is not a judge file ({', '.join(sorted(tensors)) or 'nothing'} in it).")
    head = head_of(parse_object(metadata["judge"], f"{path}: its header"), tensors, str(path))
    if head.fingerprint != target.fingerprint or head.weight.shape != (target.args.dim,):
        raise InputError(
            f"{path} was made for the target {head.fingerprint} with {head.weight.numel()} features, "
            f"but this target is {target.fingerprint} with {target.args.dim}; train a judge for it."
        )
    made_with = head.info.get("draft_fingerprint")
    if head.draft_weight is not None and (draft is None or made_with != draft.fingerprint):
        found = draft.fingerprint if draft else "not given"
        raise InputError(f"{path} reads the draft {made_with}, too, but the draft here is {found}; train a judge for it.")
    if head.draft_weight is not None and head.draft_weight.shape != (draft.args.dim,):
        raise InputError(f"{path} is broken: 'draft_weight' has {head.draft_weight.numel()} values for {draft.args.dim}.")
    return head.to(target.device)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a small safetensors file, read whole. Raises InputError naming one that is broken."""
    content = read_bytes(path, most=MOST_BYTES)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file: {error}.") from None
    header = parse_object(content[8 : 8 + int.from_bytes(content[:8], "little")], f"{path}: its header")
    return header.get("__metadata__") or {}, tensors


def head_of(header: dict, tensors: dict[str, Tensor], where: str) -> JudgeHead:
    """The head in a judge's file. Raises InputError beginning with `where`, naming what no training has written."""
    if missing := next((name for name in ("threshold", "feature", "target_fingerprint", "info") if name not in header), None):
        raise InputError(f"{where} is not a judge file: its header lacks {missing!r}.")
    threshold, feature, info = header["threshold"], header["feature"], header["info"]
    if feature not in list(FEATURES):
        raise InputError(f"{where} reads the feature {brief(feature)}; this engine gives {' and '.join(FEATURES)}.")
    if not isinstance(header["target_fingerprint"], str):
        raise InputError(f"{where} is not a judge file: its 'target_fingerprint' is no text.")
    check_info(info, where)
    weights = {}
    for name, dims in (("weight", 1), ("bias", 0), *([("draft_weight", 1)] if feature == "target+draft" else [])):
        tensor = tensors.get(name)
        if tensor is None or not tensor.is_floating_point() or tensor.dim() not in (dims, 1) or not tensor.numel():
            found = "not there" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise InputError(f"{where} is not a judge file: {name!r} is {found}.")
        if not tensor.float().isfinite().all():
            raise InputError(f"{where} is broken: {name!r} holds values that are not finite; train it again.")
        weights[name] = tensor.float()
    if weights["bias"].numel() != 1:
        raise InputError(f"{where} is not a judge file: 'bias' has {weights['bias'].numel()} values, not one.")
    trained_on = tensors.get("trained_on", no_prompts())
    if trained_on.dtype != torch.long or trained_on.dim() != 1 or (trained_on < 0).any():
        raise InputError(f"{where} is broken: 'trained_on' must hold whole numbers of at least 0, a list of them.")
    if not is_number(threshold):
        raise InputError(f"{where} is not a judge file: its threshold is {brief(threshold)}.")
    check_threshold("judge", threshold, f"{where}: threshold")
    return JudgeHead(weights["weight"], weights["bias"].reshape(()), float(threshold), header["target_fingerprint"], info,
                     weights.get("draft_weight"), trained_on)  # fmt: skip


def brief(value: object) -> str:
    """A value of a file as a sentence can show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-10:]}"


def is_number(value, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number from low to high, and no bool."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def check_info(info: object, where: str) -> None:
    """Raises InputError beginning with `where` for notes on a head's training that no training has written."""
    if not isinstance(info, dict):
        raise InputError(f"{where} is not a judge file: its 'info' is no object.")
    kinds = {
        "chat": lambda value: type(value) is bool, "rows": lambda value: type(value) is int and value > 0,
        "label_policy": lambda value: value in LABEL_POLICIES, "held_out": lambda value: isinstance(value, dict),
        "guard": lambda value: isinstance(value, dict), "l2": lambda value: is_number(value, 0),
        "draft_fingerprint": lambda value: isinstance(value, str), "dtype": lambda value: isinstance(value, str),
        "answers": lambda value: type(value) is int and value >= 0, "data": lambda value: isinstance(value, str),
    }  # fmt: skip
    if bad := next((name for name, fine in kinds.items() if name in info and not fine(info[name])), None):
        raise InputError(f"{where} is broken: {bad!r} in its 'info' cannot be {brief(info[bad])}.")
    if "calibration" in info:
        check_calibration(info["calibration"], where)


# A rule is (draft_tokens (M,), target_logits (M, V), draft_logits (M, V), scores (M,), threshold ()) -> bool (M,).
# target_logits[i] is the row BEFORE draft token i, which predicts it; scores[i] was read AT token i.


def standard(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold) -> Tensor:
    """The token is the target's own most likely one."""
    return target_logits.argmax(-1) == draft_tokens


def judge(draft_tokens, target_logits, draft_logits, scores: Tensor, threshold: Tensor) -> Tensor:
    """The head's score exceeds delta (arXiv 2501.19309)."""
    return scores > threshold


def kl(draft_tokens, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor) -> Tensor:
    """KL(target || draft) < tau, but only where the target is not sure: max p <= 0.9 (JuDi, arXiv 2601.04766)."""
    log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    p = log_p.exp()
    return (p.amax(-1) <= 0.9) & ((p * (log_p - log_q)).sum(-1) < threshold)


def topk(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """The token is among the target's K most likely (the weak baseline of arXiv 2501.19309)."""
    own = target_logits.gather(-1, draft_tokens[:, None])
    return (target_logits > own).sum(-1) < threshold


def typical(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """p(token) > min(eps, alpha exp(-entropy)) with alpha = sqrt(eps) (Medusa, arXiv 2401.10774)."""
    log_p = target_logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    own = log_p.gather(-1, draft_tokens[:, None]).squeeze(-1).exp()
    return own > torch.minimum(threshold, threshold.sqrt() * (-entropy).exp())


TOPN = 10  # N of topn_delta, as TensorRT-LLM sets it for reasoning models
AGREED = 6  # W of window: the token itself and the next five


def topn_delta(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """The token is among the target's TOPN most likely, and p(token) >= max p - delta (TensorRT-LLM's relaxed acceptance)."""
    p = target_logits.softmax(-1)
    own = p.gather(-1, draft_tokens[:, None])
    return ((p > own).sum(-1) < TOPN) & (own.squeeze(-1) >= p.amax(-1) - threshold)


def divergence(draft_tokens, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor) -> Tensor:
    """Jensen-Shannon divergence of target and draft, in nats, is at most T (Fuzzy SD, arXiv 2502.20704)."""
    p, q = target_logits.softmax(-1), draft_logits.softmax(-1)
    middle = (p + q) / 2
    parts = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return parts.nan_to_num().sum(-1) / 2 <= threshold  # 0 / 0 where both underflow


def window(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """The target is undecided, H3 >= h, and its own choices are the next AGREED - 1 draft tokens (FLy, arXiv 2511.22972).

    H3: -sum of p ln p, in nats, over the target's 3 most likely tokens, p from the whole softmax. The last AGREED tokens
    of a draft never pass. This is the authors' code (github.com/AMD-AGI/FLy, fly/models/FLy.py); vLLM (pull requests
    50808, 53987) asks for one more agreeing token, and for a p of the token above 0.
    """
    p = target_logits.softmax(-1).topk(min(3, target_logits.shape[-1])).values
    agrees = F.pad((target_logits.argmax(-1) == draft_tokens).long(), (0, AGREED))
    place = torch.arange(len(draft_tokens), device=draft_tokens.device)
    undecided = -torch.special.xlogy(p, p).sum(-1) >= threshold
    return undecided & agrees[1:].unfold(0, AGREED - 1, 1)[: len(place)].all(-1) & (place < len(place) - AGREED)


def ensemble(draft_tokens: Tensor, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor) -> Tensor:
    """The token is the most likely one of the mixture w p + (1 - w) q (DIVERSE, arXiv 2604.07622; `transformers` has it
    as `assistant_ensemble_weight`). Its correction and its sampling are the mixture's, too: see `mixture`."""
    return mixture(target_logits.softmax(-1), draft_logits.softmax(-1), threshold).argmax(-1) == draft_tokens


def mixture(p: Tensor, q: Tensor, weight: Tensor, min_prob: float = 0.0) -> Tensor:
    """w p + (1 - w) q, (M, V), which `ensemble` verifies against; q counts only where p reaches min_prob."""
    if min_prob > 0:
        q = q.where(p >= min_prob, 0)
    mixed = weight * p + (1 - weight) * q
    return mixed / mixed.sum(-1, keepdim=True) if min_prob > 0 else mixed


@dataclass(frozen=True)
class Rule:
    """A rule with what its threshold is called, its range, the default, and a walk from strict to loose for calibration.

    ahead: so many draft tokens after a token decide with it; with fewer of them drafted it does not pass.
    """

    accept: Callable[..., Tensor]
    knob: str
    low: float
    high: float
    default: float
    walk: tuple[float, ...] = ()
    needs_draft_logits: bool = False
    ahead: int = 0  # draft tokens after its own that the rule looks at


INF = float("inf")
RULES = {
    "standard": Rule(standard, "none", 0, 0, 0),
    "judge": Rule(judge, "delta", 0.5, 1, 0.5, (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "kl": Rule(kl, "tau", 0, INF, 0.5, (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 6, 8), needs_draft_logits=True),
    "topk": Rule(topk, "K", 1, INF, 2, (1, 2, 3, 4, 5, 6, 8, 12, 16)),
    "typical": Rule(typical, "eps", 0, 1, 0.09, (0.6, 0.4, 0.3, 0.2, 0.13, 0.09, 0.06, 0.04, 0.02, 0.01, 0.005)),
    "topn_delta": Rule(topn_delta, "delta", 0, 1, 0.6, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    "divergence": Rule(divergence, "T", 0, 1, 0.4, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), needs_draft_logits=True),
    "window": Rule(window, "h", 0, math.log(3), 0.3, (1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0), ahead=AGREED),
    "ensemble": Rule(ensemble, "w", 0, 1, 0.5, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2), needs_draft_logits=True),
}


def check_threshold(name: str, threshold: float, what: str = "--threshold") -> float:
    """The threshold, or an InputError when it is outside the rule's range (or no whole number for topk)."""
    rule, fits = RULES[name], name != "topk" or float(threshold).is_integer()
    if not rule.low <= threshold <= rule.high or not math.isfinite(threshold) or not fits:
        kind = "a whole number of at least 1" if name == "topk" else f"between {rule.low:g} and {rule.high:g}"
        raise InputError(f"{what} {threshold} is outside the range of --verify {name}: {rule.knob} must be {kind}.")
    return threshold


def rule_mask(
    name: str, draft_tokens: Tensor, target_logits, draft_logits, scores, threshold, stop_ids: Tensor, min_prob: float = 0.0
) -> Tensor:
    """What the rule alone accepts, bool (M,). A stop token never passes on the rule alone, nor does a token that the
    target gives less than min_prob.

    `ensemble` is the exception for stop tokens: it decodes the mixture, whose own correction would be that very token.
    """
    accepted = RULES[name].accept(draft_tokens, target_logits, draft_logits, scores, threshold)
    if name != "ensemble":
        accepted = accepted & ~torch.isin(draft_tokens, stop_ids)
    if min_prob > 0:
        accepted = accepted & (target_logits.softmax(-1).gather(-1, draft_tokens[:, None]).squeeze(-1) >= min_prob)
    return accepted


class Markers(NamedTuple):
    """Two texts as an automaton over tokens: table[state, token] is the next state; from `inside` on, the text stands
    between them. It reads bytes, so that it does not matter how the texts were cut into tokens."""

    table: Tensor  # (states, V) uint8
    inside: int

    def to(self, device: torch.device | str) -> "Markers":
        return Markers(self.table.to(device), self.inside)

    def walk(self, region: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """From state `region` (1,) over draft tokens (M,): which of them a rule may accept, bool (M,), and the states
        (M + 1,) before, between and after them. The token that completes either text is left to the standard test (unless
        it also begins the next stretch, as one that closes and opens at once)."""
        states = [region]
        for token in drafted.split(1):
            states.append(self.table[states[-1], token].long())
        states = torch.cat(states)
        inside = states >= self.inside
        return inside[:-1] & inside[1:], states

    def after(self, ids: list[int]) -> int:
        """The state after a prompt."""
        state, table = 0, self.table.cpu()
        for id in ids:
            state = int(table[state, id])
        return state


def make_markers(between: tuple[str, str] | None, tokenizer: Tokenizer, vocab_size: int) -> Markers | None:
    """The automaton for --relax_between BEGIN END. Raises InputError for texts that are empty or too long."""
    if between is None:
        return None
    begin, end = (text.encode() for text in between)
    if not begin or not end or len(begin + end) > 255:
        raise InputError(f"--relax_between {between[0]!r} {between[1]!r}: give two texts, together of at most 255 bytes.")
    dfa = byte_automaton(begin, end)
    known = min(vocab_size, tokenizer.vocab_size)
    pieces = [tokenizer.token_bytes(id) for id in range(known)] + [b""] * (vocab_size - known)
    table = torch.arange(len(dfa), dtype=torch.uint8)[:, None].repeat(1, vocab_size)
    for place in range(max(map(len, pieces))):
        some = [id for id, piece in enumerate(pieces) if len(piece) > place]
        bytes_here = torch.tensor([pieces[id][place] for id in some])
        table[:, some] = dfa[table[:, some].long(), bytes_here]
    return Markers(table, len(begin))


def byte_automaton(begin: bytes, end: bytes) -> Tensor:
    """Knuth-Morris-Pratt for two texts in turn, (states, 256) uint8: state k < len(begin) has seen k bytes of begin,
    state len(begin) + k has seen begin and then k bytes of end."""
    rows = []
    for text, base, done in ((begin, 0, len(begin)), (end, len(begin), 0)):
        for seen in range(len(text)):
            row = []
            for byte in range(256):
                tail = text[:seen] + bytes([byte])
                match = next(k for k in range(len(tail), -1, -1) if tail.endswith(text[:k]))
                row.append(done if match == len(text) else base + match)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.uint8)


WATCHED = {"by_rule": "the share of tokens that the rule alone let through", "mean_score": "the judge's mean score"}
CALIBRATION = ("kind", "conditions", "threshold", "passed", "max_harm", "confidence", "bound", "harms", "n", "data")
DEPENDS_ON = {  # what a bound was found under, where that is not all that a run may differ in
    "false_accept": ("verify", "target", "chat", "dtype"),  # of given answers: no M, no sampling, a draft only if read
}
MOST_UNITS = 10**7  # questions that a calibration is made of
MOST_SHOWN = 200  # characters of a description or an example


def read_calibration(path: Path) -> dict:
    """What `judge.py calibrate` wrote for a rule. Raises InputError when it is missing or of another kind."""
    if not path.is_file():
        raise InputError(f"There is no calibration {path}; judge.py calibrate writes one.")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is a judge's file, which holds its calibration itself; name it with --judge_path.")
    calibration = read_json(path)
    check_calibration(calibration, str(path))
    return calibration


def check_calibration(calibration: object, where: str) -> None:
    """Raises InputError beginning with `where` for what `judge.py calibrate` did not write."""
    if not isinstance(calibration, dict):
        raise InputError(f"{where} is no calibration by judge.py calibrate: it is no object.")
    if missing := [name for name in CALIBRATION if name not in calibration]:
        raise InputError(f"{where} is no calibration by judge.py calibrate: it lacks {missing[0]!r}.")
    c, live = calibration, calibration.get("live") or {}
    rule = RULES.get(str(c["conditions"].get("verify"))) if isinstance(c["conditions"], dict) else None

    def count(value) -> bool:
        return type(value) is int and 0 <= value < 2**53

    def text(value) -> bool:
        return isinstance(value, str) and len(value) <= MOST_SHOWN

    def threshold(value) -> bool:
        return rule is not None and is_number(value, rule.low, rule.high)

    good = {
        "kind": c["kind"] in ("harm", "false_accept"),
        "conditions": rule is not None and rule.knob != "none",
        "threshold": threshold(c["threshold"]),
        "passed": isinstance(c["passed"], list) and all(map(threshold, c["passed"])) and c["threshold"] in c["passed"],
        "max_harm": is_number(c["max_harm"], 0, 1), "confidence": is_number(c["confidence"], 0, 1),
        "n": count(c["n"]) and 0 < c["n"] <= MOST_UNITS,
        "harms": count(c["harms"]) and count(c["n"]) and c["harms"] <= c["n"],
        "bound": is_number(c["bound"], 0, 1),
        "data": text(c["data"]),
        "questions": text(c.get("questions", "")),
        "examples": isinstance(c.get("examples", []), list) and all(map(text, c.get("examples", []))),
        "cut_off": count(c.get("cut_off", 0)),
        "live": isinstance(live, dict) and all(name in WATCHED and isinstance(pair, list) and len(pair) == 2
                                               and all(is_number(x) for x in pair) and pair[1] >= 0
                                               for name, pair in live.items()),
    }  # fmt: skip
    if all(good.values()):
        bound = upper_bound(c["harms"], c["n"], c["confidence"])
        good["bound"] = math.isclose(c["bound"], bound, rel_tol=1e-4, abs_tol=1e-9) and c["bound"] <= c["max_harm"]
        good["cut_off"] = c.get("cut_off", 0) <= c["harms"]
    if bad := [name for name, fine in good.items() if not fine]:
        raise InputError(f"{where} is no calibration by judge.py calibrate: {bad[0]!r} cannot be {brief(c.get(bad[0]))}.")


def describe_guarantee(calibration: dict | None, run: dict, threshold: float) -> tuple[bool, str]:
    """Whether a calibrated bound covers a run under these conditions, and one sentence that says it, or why not.

    All that a run may differ in must stand in the calibration, and be equal. A run may put out more tokens, where
    questions that were cut off have counted as harmed.
    """
    if calibration is None:
        what = "this judge" if run.get("verify") == "judge" else f"--verify {run.get('verify')}"
        return False, f"No guarantee: {what} has no calibration; judge.py calibrate finds how much harm it does at most."
    c, missing = calibration, object()
    known = dict.fromkeys([*DEPENDS_ON.get(c["kind"], run), *c["conditions"]])
    for name in known:
        found, value = run.get(name, missing), c["conditions"].get(name, missing)
        if value is missing:
            return False, one_line(f"No guarantee: the calibration does not say with which {name} it was made.")
        longer = name == "max_new_tokens" and "cut_off" in c and type(value) is type(found) is int and found > value > 0
        if not longer and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            has = "none" if found is missing else found
            return False, one_line(f"No guarantee: calibrated with {name} {value}, but this run has {has}.")
    if threshold not in c["passed"]:
        return False, f"No guarantee: calibrated for threshold {c['threshold']}, but this run has {threshold}."
    event = "questions like these are answered wrong because of the rule"
    if c["kind"] == "false_accept":
        event = "prompts whose answers hold a mistake, like these, have a wrong token that the judge alone lets through"
    percent = {name: f"{100 * c[name]:.6g}%" for name in ("confidence", "max_harm")}
    these = c.get("questions", "") + "".join(f", {shortened(example)}" for example in c.get("examples", []))
    these = f"these: {these}; {c['n']}" if these else f"{c['n']}"
    return True, one_line(f"Guarantee: with {percent['confidence']} confidence, at most {percent['max_harm']} of {event} "
                          f"({these} calibrated on, data {c['data']}). Whether a single prompt is like them is not "
                          "checked.")  # fmt: skip


def upper_bound(harms: int, n: int, confidence: float) -> float:
    """Clopper-Pearson's upper bound of a share: the largest p for which at most `harms` of n is not too unlikely."""
    if harms >= n:
        return 1.0
    few = 2 * harms < n  # else the other tail has fewer terms
    k = torch.arange(harms + 1, dtype=torch.double) if few else torch.arange(harms + 1, n + 1, dtype=torch.double)
    total = torch.tensor(float(n), dtype=torch.double)
    choose = (total + 1).lgamma() - (k + 1).lgamma() - (total - k + 1).lgamma()
    low, high = harms / n, 1.0
    for _ in range(60):  # bisection
        p = (low + high) / 2
        tail = (choose + k * math.log(p) + (total - k) * math.log1p(-p)).exp().sum().item() if p < 1 else float(not few)
        at_most = tail if few else 1 - tail
        low, high = (p, high) if at_most > 1 - confidence else (low, p)
    return high


def share_interval(k: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95% interval of a share k of n; of nothing it is 0 to 1."""
    return (1 - upper_bound(n - k, n, 0.975), upper_bound(k, n, 0.975)) if n else (0.0, 1.0)


class Drift:
    """Watches answers for text unlike the calibration's: warns once when the mean of a live statistic is off.

    The calibration keeps mean and standard deviation over its n answers of each statistic; after k answers the mean is
    off when it is LIMIT standard errors away, sd sqrt(1 / n + 1 / k).
    """

    LIMIT = 4.0

    def __init__(self, calibration: dict | None):
        self.live = (calibration or {}).get("live") or {}
        self.n = (calibration or {}).get("n", 0)
        self.sums, self.counts = dict.fromkeys(self.live, 0.0), dict.fromkeys(self.live, 0)

    def add(self, statistics: dict[str, float]) -> str | None:
        """Takes one answer's statistics; the warning, at most once."""
        for name, (mean, sd) in self.live.items():
            if name not in statistics:
                continue
            self.sums[name], self.counts[name] = self.sums[name] + statistics[name], self.counts[name] + 1
            count, found = self.counts[name], self.sums[name] / self.counts[name]
            if abs(found - mean) > self.LIMIT * max(sd, 1e-3) * math.sqrt(1 / self.n + 1 / count):
                self.live = {}
                return (f"Warning: {WATCHED[name]} is {found:.3f} ({count} answers so far), but was {mean:.3f} on the "
                        "calibration questions: this text is unlike them, and the guarantee may not hold.")  # fmt: skip
        return None


def read_answers(path: str | Path, labelled: bool = True) -> list[dict]:
    """Answers from JSON lines. Raises InputError naming file, line and field of whatever is wrong.

    labelled False: the marks may be missing.
    """
    answers = [read_answer(item, where, labelled) for where, item in read_json_lines(path)]
    if not answers:
        raise InputError(f"{path} holds no answers; give JSON lines with prompt, response and errors.")
    return answers


def read_answer(item: dict, where: str, labelled: bool = True) -> dict:
    """One labelled answer, of either form. Raises InputError beginning with `where`."""
    if type(item.get("guard", False)) is not bool:
        raise InputError(f"{where}: field 'guard' must be a bool.")
    if "tokens" in item:
        check_mined(item, where)
        return item
    if not labelled:
        item["errors"] = item.get("errors") or []
    if "errors" in item and item["errors"] is None:
        raise InputError(f"{where}: field 'errors' is null, so nobody has marked this answer; run scripts/annotate.py first.")
    for field_name, kind in (("prompt", str), ("response", str), ("errors", list)):
        if not isinstance(item.get(field_name), kind):
            raise InputError(f"{where}: field {field_name!r} must be a {kind.__name__}.")
    length = len(item["response"])
    if not length:
        raise InputError(f"{where}: field 'response' is empty.")
    if bad := [span for span in item["errors"] if not is_span(span, length)]:
        raise InputError(f"{where}: 'errors' has {brief(bad[0])}, not [start, end] within 0 and {length}.")
    return item


def is_span(span: object, length: float) -> bool:
    """Whether this is [start, end] with 0 <= start < end <= length."""
    return (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
            and 0 <= span[0] < span[1] <= length)  # fmt: skip


def check_mined(item: dict, where: str) -> None:
    """Raises InputError beginning with `where` for a broken answer in tokens."""
    for field_name in ("prompt_tokens", "tokens", "labels"):
        value = item.get(field_name)
        if not isinstance(value, list) or not value or not all(type(n) is int for n in value):
            raise InputError(f"{where}: field {field_name!r} must be a list of whole numbers, not empty.")
    if min(item["prompt_tokens"] + item["tokens"]) < 0:
        raise InputError(f"{where}: 'prompt_tokens' and 'tokens' must be token ids of at least 0.")
    if len(item["labels"]) != len(item["tokens"]) or not set(item["labels"]) <= {1, 0, -100}:
        raise InputError(f"{where}: 'labels' must be one of 1, 0, -100 for each of the {len(item['tokens'])} tokens.")


def label_tokens(spans: list[tuple[int, int]], errors: list[list[int]], policy: str) -> list[int]:
    """1 right, 0 wrong, -100 ignored, for response tokens that cover the characters `spans`.

    A token is wrong when it covers any character of an error, or a part of one. After the first error: `span` counts the
    rest as right, `ignore_after` skips it, `from_error` counts it as wrong.
    """
    labels = []
    for start, end in spans:
        wrong = any(start < b and end > a for a, b in errors)
        after = any(start >= b for _, b in errors)
        if wrong or (after and policy == "from_error"):
            labels.append(0)
        else:
            labels.append(-100 if after and policy == "ignore_after" else 1)
    return labels


def encode_answer(
    tokenizer: Tokenizer, prompt: str, response: str, chat: bool = False
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Prompt ids, response ids, and the characters [start, end) of the response that each of its tokens covers.

    A character whose bytes are spread over tokens is covered by each of them. chat: in the folder's chat format.
    """
    if chat:
        prompt_ids, rest = tokenizer.encode_chat([{"role": "user", "content": prompt}]), tokenizer.encode(response)
    else:
        plain, both = tokenizer.encode(prompt), tokenizer.encode(prompt + response)
        if both[: len(plain)] != plain:  # a token spans the border: read them apart
            both = plain + tokenizer.encode(response)
        prompt_ids, rest = [tokenizer.bos_id, *plain], both[len(plain) :]
    spans, done, utf8 = [], 0, codecs.getincrementaldecoder("utf-8")("replace")
    for id in rest:
        start = done
        done += len(utf8.decode(tokenizer.token_bytes(id)))
        spans.append((start, done + bool(utf8.getstate()[0])))
    extra = done - len(response)  # SentencePiece's space before a text that is read on its own
    return prompt_ids, rest, [(start - extra, end - extra) for start, end in spans]


@dataclass(frozen=True)
class Encoded:
    """An answer as token ids. spans: the characters of each token, or None when labels came with the tokens."""

    prompt: list[int]
    ids: list[int]
    spans: list[tuple[int, int]] | None
    item: dict

    @property
    def key(self) -> int:
        """What the split goes by: the prompt's tokens; a guarded text stands for itself."""
        return prompt_key(self.prompt + self.ids if self.item.get("guard") else self.prompt)

    def labels(self, policy: str) -> list[int]:
        """1 right, 0 wrong, -100 ignored, a token each."""
        if self.item.get("guard"):
            return [0] * len(self.ids)
        return self.item["labels"] if self.spans is None else label_tokens(self.spans, self.item["errors"], policy)


def prompt_key(ids: list[int]) -> int:
    """63 bits that tell prompts apart."""
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:8], "big") >> 1


def encode_items(tokenizer: Tokenizer, answers: list[dict], chat: bool, vocab_size: int) -> list[Encoded]:
    """Answers of either form as tokens. Raises InputError for ids that the model does not have."""
    encoded = []
    for place, item in enumerate(answers, 1):
        if "tokens" in item:
            encoded.append(Encoded(item["prompt_tokens"], item["tokens"], None, item))
        else:
            encoded.append(Encoded(*encode_answer(tokenizer, item["prompt"], item["response"], chat), item))
        if max(encoded[-1].prompt + encoded[-1].ids) >= vocab_size:
            raise InputError(f"Answer {place} has a token id of {vocab_size} or more, which the model lacks.")
    return encoded


class RowReader:
    """Reads sequences through a model as the engine does: the same passes of the same rows over the same part of the cache.

    The prompt in padded passes of PREFILL_ROWS; then `rows` = M + 1 a pass, as the target verifies; with `drafts`, as the
    draft proposes: two rows, then single ones. Low-precision products differ between row counts, so that only the same
    ones give the same bits. What a sequence shares with the one before it is not read again, unless its states are asked
    for.
    """

    def __init__(self, model: Transformer, rows: int, length: int, drafts: bool = False):
        self.model, self.rows, self.drafts, self.ids, self.base = model, rows, drafts, [], 0
        model.setup_caches(whole_windows(length + rows))

    def passes(self, base: int, end: int) -> Iterator[tuple[bool, range, int]]:
        """(whether of the prompt, its positions, how much of the cache is looked at) of each pass, up to position `end`."""
        most, cpu = PREFILL_ROWS[self.model.device.type], self.model.device.type == "cpu"
        for at in range(0, base, most):
            stop = min(at + most, whole_windows(base))
            yield True, range(at, stop), stop
        for at in range(base, end + self.drafts, self.rows):
            seen = whole_windows(at + self.rows) if cpu else self.model.cache_length
            if not self.drafts:
                yield False, range(at, at + self.rows), seen
                continue
            yield False, range(at - 1, at + 1), seen  # the last draft token of the round before is read here first
            for place in range(at + 1, min(at + self.rows - 1, end)):
                yield False, range(place, place + 1), seen

    @torch.inference_mode()
    def read(self, ids: list[int], base: int, begin: int, end: int) -> Tensor:
        """Pre-norm hidden states (end - begin, dim) of positions begin to end; base: the last token of the prompt."""
        same = next((i for i, (a, b) in enumerate(zip(ids, self.ids)) if a != b), min(len(ids), len(self.ids)))
        known = min(same, begin) if base == self.base else 0
        tokens = torch.zeros(whole_windows(len(ids) + self.rows), dtype=torch.long)
        tokens[: len(ids)] = torch.tensor(ids)
        tokens = tokens.to(self.model.device)
        prompt = tokens.clone()
        prompt[base + 1 :] = 0  # what the engine pads with
        parts, first = [], None
        for prefill, places, seen in self.passes(base, end):
            if (min(places.stop, base) if prefill else places.stop) <= known:
                continue
            pos = torch.arange(places.start, places.stop, device=tokens.device).clamp(min=0)
            hidden, _ = self.model((prompt if prefill else tokens)[pos][None], pos, seen, n_logits=0, prefill=prefill)
            if not prefill:
                fresh = max(places.start, base)  # the draft's first pass begins in the prompt
                first = fresh if first is None else first
                parts.append(hidden[0, fresh - places.start :])
        self.ids, self.base = ids, base
        found = torch.cat(parts)[begin - first : end - first]
        if not found.isfinite().all():
            self.model.clear_caches()  # a NaN there outlives every mask
            self.ids = []
        return found


def whole_windows(length: int) -> int:
    """The least multiple of WINDOW that is not below `length`."""
    return -(-length // WINDOW) * WINDOW


def labelled_places(answer: Encoded) -> Tensor:
    """The places (n,) of an answer's tokens that have a label: all of a text, only some of mined tokens."""
    places = torch.arange(len(answer.ids))
    if answer.spans is None and not answer.item.get("guard"):
        places = places[torch.tensor(answer.item["labels"]) >= 0]
    return places


def read_features(readers: list[RowReader], answer: Encoded) -> tuple[Tensor, Tensor]:
    """Features (n, dims) of an answer's labelled tokens and their places (n,) in it.

    The first reader is the target's, own rows; a second the draft's, in the rows that proposed the tokens.
    """
    places = labelled_places(answer)
    if not len(places):
        return torch.zeros(0, sum(r.model.args.dim for r in readers), dtype=readers[0].model.dtype), places
    base, both = len(answer.prompt) - 1, answer.prompt + answer.ids
    begin = base + 1 + int(places[0])
    parts = [reader.read(both, base, begin - row, len(both) - row).cpu() for row, reader in enumerate(readers)]
    return torch.cat(parts, dim=1)[places - places[0]], places


class Shards:
    """Features on disk: `features` (n, dims) a file, with `answer` (n,) and `place` (n,) that say whose they are.

    Iterating gives fp32 tensors (n, dims) in order. Up to HOLD bytes they stay in memory; beyond, one file at a time.
    """

    HOLD = 4 << 30

    def __init__(self, files: list[Path], answer: list[Tensor], place: list[Tensor], dims: int):
        self.files, self.answer, self.place = files, torch.cat(answer).long(), torch.cat(place).long()
        self.held = [self.load(file) for file in files] if 4 * dims * len(self.answer) <= self.HOLD else None

    @staticmethod
    def load(file: Path) -> Tensor:
        return read_safetensors(file)[1]["features"].float()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.held) if self.held is not None else (self.load(file) for file in self.files)


SHARD_BYTES = 64 << 20


def read_shard(file: Path, first: int, answers: list[Encoded], dims: int, dtype: torch.dtype) -> tuple[int, Tensor, Tensor]:
    """(the first answer that comes after it, answer (n,), place (n,)) of a shard that begins with answer `first`.

    Raises InputError for one that `extract_features` has not written so.
    """
    metadata, tensors = read_safetensors(file)
    if set(tensors) != {"features", "answer", "place"}:
        raise InputError(f"{file} is no shard of features.")
    features, answer, place = (tensors[name] for name in ("features", "answer", "place"))
    after, n = str(metadata.get("next")), len(answer) if answer.dim() else -1
    fits = (
        features.shape == (n, dims) and features.dtype == dtype and answer.shape == place.shape == (n,)
        and answer.dtype == place.dtype == torch.int32
        and after.isascii() and after.isdecimal() and len(after) < 10 and first < int(after) <= len(answers)
    )  # fmt: skip
    expected = [labelled_places(answers[at]) for at in range(first, int(after))] if fits else []
    if not fits or not torch.equal(place, torch.cat(expected).int()) or not torch.equal(
        answer, torch.cat([torch.full((len(places),), first + at) for at, places in enumerate(expected)]).int()
    ):  # fmt: skip
        raise InputError(f"{file} is of other answers or another model.")
    if not features.isfinite().all():
        raise InputError(f"{file} holds values that are not finite.")
    return int(after), answer, place


def extract_features(
    models: list[Transformer], answers: list[Encoded], rows: int, cache: Path, shard_bytes: int = SHARD_BYTES
) -> Shards:
    """Features of all answers as shards under `cache`, in the models' type; a run that was killed goes on where it stopped.

    A shard that is damaged or missing is made anew, with those after it, which a line on stderr says. Memory: one shard
    and one answer. Raises InputError when an answer does not fit the context, or the states are not finite.
    """
    longest, context = max(len(a.prompt) + len(a.ids) for a in answers), min(m.args.max_position for m in models)
    if longest > context:
        raise InputError(f"An answer has {longest} tokens with its prompt; the context is {context}.")
    what = [[a.prompt, a.ids, a.item["labels"] if a.spans is None and not a.item.get("guard") else None] for a in answers]
    made_by = [[m.fingerprint, f"{m.dtype} {m.quantization}".strip(), m.device.type] for m in models]
    passes = [rows, *PREFILL_ROWS.items(), WINDOW]
    folder = cache / hashlib.sha256(json.dumps([what, made_by, passes, shard_bytes]).encode()).hexdigest()[:16]
    dims, first, files, columns = sum(m.args.dim for m in models), 0, [], ([], [])
    while first < len(answers) and (file := folder / f"{len(files):05d}.safetensors").exists():
        try:
            first, *own = read_shard(file, first, answers, dims, models[0].dtype)
        except InputError as error:
            print(f"{str(error).removesuffix('.')}; it is made anew.", file=sys.stderr)
            break
        files.append(file)
        for column, part in zip(columns, own):
            column.append(part)
    readers, part, size = [RowReader(model, rows, longest, at > 0) for at, model in enumerate(models)], [], 0
    progress = Progress("reading answers", len(answers) - first)
    for at in range(first, len(answers)):
        features, places = read_features(readers, answers[at])
        if not features.isfinite().all():
            raise InputError(f"The states of answer {at + 1} are not finite; give another --precision (bf16, fp32), or look at "
                             "the weights.")  # fmt: skip
        part.append((features, torch.full((len(places),), at, dtype=torch.int32), places.int()))
        size += features.nbytes
        if size >= shard_bytes or at + 1 == len(answers):
            features, *own = (torch.cat(column) for column in zip(*part))
            files.append(folder / f"{len(files):05d}.safetensors")
            kept = dict(zip(("features", "answer", "place"), (features, *own)))
            write_file(files[-1], save(kept, metadata={"next": str(at + 1)}))
            for column, fresh in zip(columns, own):
                column.append(fresh)
            part, size = [], 0
        progress.step()
    return Shards(files, *columns, dims)


def with_columns(shards: Iterable[Tensor], *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Shards (n, dims) with the matching part of each column (N,)."""
    at = 0
    for x in shards:
        yield x, *(column[at : at + len(x)] for column in columns)
        at += len(x)


def moments(shards: Iterable[Tensor], used: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dims,) in fp64 over the rows where `used` (N,) holds."""
    total, squares = 0, 0
    for x, u in with_columns(shards, used):
        for rows in x[u].split(4096):
            total, squares = total + rows.double().sum(0), squares + rows.double().square().sum(0)
    mean = total / used.sum()
    return mean, (squares / used.sum() - mean.square()).clamp(min=0).sqrt() + 1e-6


def fit_head(shards: Iterable[Tensor], labels: Tensor, weights: Tensor, l2: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Weighted logistic regression: one (weight (dims,), bias ()) for each penalty in `l2`; give them from strong to weak.

    shards: fp32 (n, dims), N rows in all, read several times; labels (N,) 1 or 0; weights (N,) fp64, 0 leaves a row out.
    Features are standardised for the fit; the scaling is folded into the result. Memory: shards held in memory are held
    once more, standardised; of shards on disk it takes one at a time.
    """
    mean, std = moments(shards, weights > 0)

    def standardised() -> Iterator[Tensor]:
        return ((x - mean.float()) / std.float() for x in shards)

    held = list(standardised()) if getattr(shards, "held", shards) is not None else None
    labels, weights = labels.double(), weights / weights.sum()
    w, heads = torch.zeros(len(mean) + 1, dtype=torch.double), []
    for strength in l2:  # each begins where the last ended
        minimise(w, strength, lambda: with_columns(held or standardised(), labels, weights))
        weight = w[:-1] / std
        heads.append((weight.float(), (w[-1] - weight @ mean).float()))
    return heads


def minimise(w: Tensor, strength: float, batches: Callable[[], Iterator[tuple[Tensor, ...]]]) -> None:
    """Minimises, in place over w (dims + 1,) fp64, the weighted logistic loss plus strength |w|^2 (without the bias)."""

    def loss_of() -> Tensor:
        """The loss at w, with its gradient in w.grad."""
        loss, grad = strength * w[:-1].square().sum(), 2 * strength * w
        grad[-1] = 0
        for x, y, weight in batches():
            z = (x @ w[:-1].float()).double() + w[-1]
            pull = weight * (z.sigmoid() - y)
            loss = loss + (weight * (F.softplus(z) - y * z)).sum()
            grad += torch.cat([(pull.float() @ x).double(), pull.sum()[None]])
        w.grad = grad
        return loss

    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10)
    optimizer.step(loss_of)


def balanced(labels: Tensor, used: Tensor, guard: Tensor | None = None, guard_weight: float = 0.0) -> Tensor:
    """Weights (N,) fp64: right tokens weigh 1/2 in sum, wrong ones 1/2, guarded ones guard_weight / 2; unused ones 0."""
    guard = torch.zeros_like(used) if guard is None else guard
    weights = torch.zeros(len(labels), dtype=torch.double)
    for part, share in ((labels == 1, 1), ((labels == 0) & ~guard, 1), (guard, guard_weight)):
        part = part & used
        weights[part] = share / 2 / max(1, int(part.sum()))
    return weights


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """AUC: the share of (right, wrong) pairs in which the right token scores higher; ties count half."""
    right, wrong = scores[labels == 1].double(), scores[labels == 0].double().sort().values
    below, upto = (torch.searchsorted(wrong, right, right=side).double() for side in (False, True))
    return ((below + upto) / 2).mean().item() / len(wrong)


def measure_head(scores: Tensor, labels: Tensor, thresholds: list[float]) -> dict:
    """AUC; for each threshold the share of right tokens accepted (recall), of accepted tokens that are right (precision),
    and of wrong tokens accepted (false_accept); and the reliability curve: in ten bins of the score, the mean score
    against the share that is right."""
    right, wrong = scores[labels == 1], scores[labels == 0]
    rows = []
    for threshold in thresholds:
        passed, failed = (right > threshold).sum().item(), (wrong > threshold).sum().item()
        precision = passed / (passed + failed) if passed + failed else None
        rows.append({"threshold": threshold, "recall": passed / len(right), "precision": precision,
                     "false_accept": failed / len(wrong)})  # fmt: skip
    bins, curve = (scores * 10).long().clamp(max=9), []
    for tenth in range(10):
        inside = bins == tenth
        if inside.any():
            curve.append({"tokens": int(inside.sum()), "score": scores[inside].double().mean().item(),
                          "right": labels[inside].double().mean().item()})  # fmt: skip
    return {"right_tokens": len(right), "wrong_tokens": len(wrong), "auc": area_under_curve(scores, labels), "at": rows,
            "reliability": curve}  # fmt: skip


def split_prompts(keys: Tensor, seed: int, held_out: float = 0.2, validation: float = 0.16) -> tuple[Tensor, Tensor]:
    """Which answers are held out and which validate, bool (answers,) each. All answers of a prompt fall on one side."""
    prompts = keys.unique()
    order = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed % 2**63))]
    first, second = int(len(order) * held_out), int(len(order) * (held_out + validation))
    return torch.isin(keys, order[:first]), torch.isin(keys, order[first:second])


@dataclass
class TrainSettings:
    """How to train a head. l2 None: the best of L2_GRID by AUC on prompts that are set aside for it; threshold None: the
    careful one."""

    policy: str = "span"
    rows: int = 17  # speculate_k + 1
    threshold: float | None = None
    held_out: float = 0.2
    l2: float | None = None
    guard_weight: float = 1.0
    seed: int = 0
    chat: bool = False


GRID = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99]  # thresholds that are measured
CAREFUL = 0.05  # where nobody gives a threshold: at most so many wrong tokens accepted, with 95% confidence
L2_GRID = [1.0, 0.3, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4]


def train_judge(
    models: list[Transformer], tokenizer: Tokenizer, answers: list[dict], settings: TrainSettings, cache: Path
) -> JudgeHead:
    """Trains a head on `answers`, measured on a held-out share of the prompts.

    models: the target, or target and draft for the feature target+draft. Answers with "guard": true must not pass: all
    their tokens are wrong. cache: where features are kept. Raises InputError when a part of the split lacks right or
    wrong tokens. The same answers, settings and models give the same bits on one machine.
    """
    s, target = settings, models[0]
    encoded = encode_items(tokenizer, answers, s.chat, min(model.args.vocab_size for model in models))
    shards = extract_features(models, encoded, s.rows, cache)
    all_labels = [torch.tensor(answer.labels(s.policy), dtype=torch.long) for answer in encoded]
    starts = torch.tensor([0, *map(len, all_labels)]).cumsum(0)
    labels = torch.cat(all_labels)[starts[shards.answer] + shards.place]
    guard = torch.tensor([bool(answer.item.get("guard")) for answer in encoded])[shards.answer]
    keys = torch.tensor([answer.key for answer in encoded])
    test, validation = (side[shards.answer] for side in split_prompts(keys, s.seed, s.held_out))
    real = (labels >= 0) & ~guard
    for side, name in ((real & ~test & ~validation, "training"), (real & validation, "validation"), (real & test, "held-out")):
        if not 0 < labels[side].sum() < side.sum():
            raise InputError(f"The {name} answers hold no wrong or no right tokens; give more answers of both kinds.")
    tried, l2 = choose_l2(shards, labels, guard, real & ~test & ~validation, real & validation, s)
    used = (labels >= 0) & ~test
    weight, bias = fit_head(shards, labels, balanced(labels, used, guard, s.guard_weight), [l2])[0]
    if not (weight.isfinite().all() and bias.isfinite()):
        raise InputError(f"The fit with --l2 {l2:g} has no finite end; give a larger one.")
    scores = torch.cat([torch.sigmoid(x @ weight + bias) for x in shards])
    threshold = careful_threshold(scores[real & test], labels[real & test]) if s.threshold is None else s.threshold
    info = {"label_policy": s.policy, "rows": s.rows, "seed": s.seed, "answers": len(answers), "chat": s.chat,
            "dtype": str(target.dtype), "training_tokens": int((used & real).sum()), "l2": l2, "l2_tried": tried,
            "data": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
            "held_out": measure_head(scores[real & test], labels[real & test], sorted({*GRID, threshold}))}  # fmt: skip
    if len(models) > 1:
        info["draft_fingerprint"] = models[1].fingerprint
    if guard.any():
        info["guard"] = {"weight": s.guard_weight, **guard_figures(scores, guard, test, threshold)}
    dim = target.args.dim
    trained_on = keys[~split_prompts(keys, s.seed, s.held_out)[0]].unique()
    draft_weight = weight[dim:] if len(models) > 1 else None
    return JudgeHead(weight[:dim].clone(), bias, threshold, target.fingerprint, info, draft_weight, trained_on)


def careful_threshold(scores: Tensor, labels: Tensor) -> float:
    """The lowest of GRID whose upper 95% bound of wrong tokens accepted is at most CAREFUL; else the highest."""
    wrong = scores[labels == 0]
    bounds = ((t, upper_bound(int((wrong > t).sum()), len(wrong), 0.95)) for t in GRID)
    return next((t for t, bound in bounds if bound <= CAREFUL), GRID[-1])


def choose_l2(shards, labels, guard, training, validation, s: TrainSettings) -> tuple[list, float]:
    """([[l2, validation AUC], ...], the best l2; the stronger of equals)."""
    if s.l2 is not None:
        return [], s.l2
    heads = fit_head(shards, labels, balanced(labels, training | (guard & training), guard, s.guard_weight), L2_GRID)
    tried = []
    for l2, (weight, bias) in zip(L2_GRID, heads):
        scores = torch.cat([(x @ weight + bias)[v] for x, v in with_columns(shards, validation)])
        tried.append([l2, area_under_curve(scores, labels[validation])])
    return tried, max(tried, key=lambda pair: (round(pair[1], 5), pair[0]))[0]


def guard_figures(scores: Tensor, guard: Tensor, test: Tensor, threshold: float) -> dict:
    """How many guarded tokens still pass at `threshold`, of the training and of the held-out texts."""
    figures = {}
    for name, side in (("training", guard & ~test), ("held_out", guard & test)):
        figures[name] = {"tokens": int(side.sum()), "passed": int((scores[side] > threshold).sum())}
    return figures


def print_figures(head: JudgeHead) -> None:
    """The held-out figures of a head, as tables: each share with its count and 95% interval (Clopper-Pearson)."""
    figures = head.info["held_out"]
    right, wrong = figures["right_tokens"], figures["wrong_tokens"]
    print(f"held out: {right} right and {wrong} wrong tokens, AUC {figures['auc']:.4f}, L2 {head.info['l2']:g}")
    print("Shares with their 95% intervals, as if tokens were independent; those of one answer are not.")
    print(f"threshold  {'right tokens accepted':35}{'precision':35}wrong tokens accepted")
    for row in figures["at"]:
        mark = "*" if row["threshold"] == head.threshold else " "
        passed, failed = round(row["recall"] * right), round(row["false_accept"] * wrong)
        shares = (show_share(k, n) for k, n in ((passed, right), (passed, passed + failed), (failed, wrong)))
        print(f"{row['threshold']:8.3f}{mark}  " + "".join(f"{share:35}" for share in shares).rstrip())
    print("mean score  share right   (scores of a loss in which wrong tokens weigh as much as right ones)")
    for row in figures["reliability"]:
        print(f"{row['score']:10.3f}  {show_share(round(row['right'] * row['tokens']), row['tokens'])}")
    for name, part in head.info.get("guard", {}).items():
        if name != "weight":
            print(f"guarded texts, {name.replace('_', ' ')}: {part['passed']} of {part['tokens']} tokens still pass")
    if upper_bound(0, wrong, 0.95) > CAREFUL:
        print(f"Only {wrong} wrong tokens are held out: were none of them accepted, a judge could still accept "
              f"{upper_bound(0, wrong, 0.95):.0%}, and the AUC rests on them alone; give more answers with errors.",
              file=sys.stderr)  # fmt: skip


def show_share(k: int, n: int) -> str:
    """0.9870, 34890/35350 (0.986-0.988)"""
    if not n:
        return "-"
    low, high = share_interval(k, n)
    return f"{k / n:.4f}, {k}/{n} ({low:.3f}-{high:.3f})"


def add_train_flags(add: Callable) -> None:
    """The flags of `judge.py train`."""
    add("--checkpoint_path", type=Path, help="the target's folder (default: the demo target, with its draft)")
    add("--draft_checkpoint_path", type=Path, help="the draft's folder, for --features target+draft")
    add("--data", type=Path, required=True, nargs="+", help="labelled answers, JSON lines")
    add("--guard", type=Path, nargs="+", default=[], help="JSON lines with prompt and response that must never pass")
    add("--guard_weight", type=number(0, 1e6), default=1.0, help="of all guarded tokens together; all wrong tokens weigh 1")
    add("--out", type=Path, required=True, help="the judge file to write")
    add("--cache", type=Path, help="folder that keeps features for the next training (default: OUT.features)")
    add("--features", choices=FEATURES, default="target", help="what the head reads")
    add("--chat", action="store_true", help="put prompts into the checkpoint folder's chat format, as generate.py --chat does")
    add(
        "--label_policy",
        choices=LABEL_POLICIES,
        default=TrainSettings.policy,
        help="tokens after an error: right, ignored, or wrong",
    )
    add("--threshold", type=number(RULES["judge"].low, RULES["judge"].high),
        help=f"delta that the engine uses unless told otherwise (default: the lowest of {', '.join(map(str, GRID))} that "
             f"accepts at most {CAREFUL:.0%}% of the held-out wrong tokens with 95%% confidence, else the last)")  # fmt: skip
    add("--l2", type=number(0, 1e6), help="strength of the penalty (default: the best of several by AUC on other prompts)")
    add("--speculate_k", type=whole(1, 1024), default=16, help="M: features are read M + 1 rows at a time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--precision", choices=DTYPES, help="run type, the same as for generate.py (default: bf16 on a GPU, fp32 on a CPU)")
    add("--seed", type=whole(-(2**62), 2**62), default=0, help="of the split into training and held-out prompts")


def check_train_args(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot run, before anything is loaded; fills in the demo pair and the cache."""
    both = args.features == "target+draft"
    if args.checkpoint_path is None:
        args.checkpoint_path = DEMO / "target"
        args.draft_checkpoint_path = args.draft_checkpoint_path or (DEMO / "draft" if both else None)
    if both != bool(args.draft_checkpoint_path):
        raise InputError("--features target+draft and --draft_checkpoint_path go together; give both or neither.")
    check_writable(args.out, "--out")
    args.cache = args.cache or args.out.with_name(args.out.name + ".features")
    args.folders = [args.checkpoint_path, *([args.draft_checkpoint_path] if both else [])]
    check_not_input(args.out, [*args.data, *args.guard, *files_in(args.folders)])
    check_folder(args.cache, "--cache")
    if args.cache.resolve() == args.out.resolve():
        raise InputError(f"--cache {args.cache} is --out itself; name another folder.")


def files_in(folders: list[Path]) -> list[Path]:
    """The files of checkpoint folders, which no output may replace."""
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def train(args: argparse.Namespace) -> None:
    """Checks the command line, trains, writes the head and prints its figures."""
    check_train_args(args)
    device = pick_device(args.device)
    answers = [item for path in args.data for item in read_answers(path)]
    answers += [item | {"guard": True} for path in args.guard for item in read_answers(path, labelled=False)]
    tokenizer = load_tokenizer(args.checkpoint_path)
    models = [load_model(folder, device, run_dtype(args.precision, device)) for folder in args.folders]
    settings = TrainSettings(args.label_policy, args.speculate_k + 1, args.threshold, l2=args.l2,
                             guard_weight=args.guard_weight, seed=args.seed, chat=args.chat)  # fmt: skip
    head = train_judge(models, tokenizer, answers, settings, args.cache)
    head.save(args.out)
    print_figures(head)
    chosen = "the careful choice, see --help" if args.threshold is None else "as given"
    print(f"{args.out}: a judge with threshold {head.threshold:g} ({chosen}), on {len(answers)} answers; it has no calibration "
          f"yet: judge.py calibrate --judge_path {args.out} finds how much harm it does at most.")  # fmt: skip


COMMANDS = ("train", "calibrate")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if at := next((at for at, word in enumerate(argv) if word in COMMANDS), 0):
        argv = [argv.pop(at), *argv]  # flags may come before the command
    if argv[:1] == ["calibrate"]:
        from scripts import calibrate  # it runs the engine, which builds on this file

        calibrate.main(argv[1:])
        return
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, help="train has the flags below; see calibrate --help")
    add_train_flags(parser.add_argument)
    args = parser.parse_args(argv)
    run_script("judge.py", lambda: train(args))


if __name__ == "__main__":
    main()
