"""The judge head, the verification rules, their data, and training a head.

A judge is one linear layer on the target's last hidden state before the final norm, at the draft token's own
position (Judge Decoding, arXiv 2501.19309). A draft token passes when the standard test OR the rule accepts
it.

    python judge.py train --data answers.jsonl --out judge.safetensors       # of the demo target, or
    --checkpoint_path python judge.py calibrate --verify judge --max_harm 0.02 --questions demo        # see
    scripts/calibrate.py

Training data are JSON lines, one answer each, in either form:

    {"prompt": "...", "response": "...", "errors": [[start, end], ...], "source": "..."}      characters of
    the response {"prompt_tokens": [...], "tokens": [...], "labels": [1 right, 0 wrong, -100 ignored, ...],
    "source": "..."}
"""

from cli import InputError, Parser, shortened_value  # isort: skip  (first: from here on Ctrl-C is silent)

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from checkpoint import read_safetensors
from files import is_number, parse_object, write_file
from model import Transformer
from tokenizer import Tokenizer

FEATURES = {  # name -> what the head reads; the name stands in the file's header
    "target": "the target's pre-norm hidden state at the token's own position",
    "target+draft": "the same, then the draft's pre-norm hidden state in the row that proposed the token",
}

LABEL_POLICIES = ("span", "ignore_after", "from_error")  # what tokens after an error count as


def no_prompts() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class JudgeHead:
    """score = sigmoid(weight . hidden + draft_weight . draft_hidden + bias), in fp32. `info`: the header, on
    its making."""

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
        """Probability that each token is right. hidden (..., dim): its own rows of the target's pre-norm
        states; draft_hidden (..., dim of the draft): the draft's states in the rows that proposed it."""
        z = hidden.float() @ self.weight + self.bias
        return torch.sigmoid(z if self.draft_weight is None else z + draft_hidden.float() @ self.draft_weight)

    def to(self, device: torch.device | str) -> "JudgeHead":
        draft_weight = None if self.draft_weight is None else self.draft_weight.to(device)
        return replace(
            self, weight=self.weight.to(device), bias=self.bias.to(device), draft_weight=draft_weight
        )

    def save(self, path: str | Path) -> None:
        """Writes `judge.safetensors`, beside and renamed. One entry in its header, since their order is not
        kept."""
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
        raise InputError(
            f"There is no judge file {path}; train one with judge.py or name another --judge_path."
        )
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
        raise InputError(
            f"{path} reads the draft {made_with}, too, but the draft here is {found}; train a judge for it."
        )
    if head.draft_weight is not None and head.draft_weight.shape != (draft.args.dim,):
        raise InputError(
            f"{path} is broken: 'draft_weight' has {head.draft_weight.numel()} values for {draft.args.dim}."
        )
    return head.to(target.device)


def head_of(header: dict, tensors: dict[str, Tensor], where: str) -> JudgeHead:
    """The head in a judge's file. Raises InputError beginning with `where`, naming what no training has
    written."""
    if missing := next(
        (name for name in ("threshold", "feature", "target_fingerprint", "info") if name not in header), None
    ):
        raise InputError(f"{where} is not a judge file: its header lacks {missing!r}.")
    threshold, feature, info = header["threshold"], header["feature"], header["info"]
    if feature not in list(FEATURES):
        raise InputError(
            f"{where} reads the feature {shortened_value(feature)}; this engine gives "
            f"{' and '.join(FEATURES)}."
        )
    if not isinstance(header["target_fingerprint"], str):
        raise InputError(f"{where} is not a judge file: its 'target_fingerprint' is no text.")
    check_info(info, where)
    weights = {}
    for name, dims in (
        ("weight", 1),
        ("bias", 0),
        *([("draft_weight", 1)] if feature == "target+draft" else []),
    ):
        tensor = tensors.get(name)
        if (
            tensor is None
            or not tensor.is_floating_point()
            or tensor.dim() not in (dims, 1)
            or not tensor.numel()
        ):
            found = "not there" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise InputError(f"{where} is not a judge file: {name!r} is {found}.")
        if not tensor.float().isfinite().all():
            raise InputError(f"{where} is broken: {name!r} holds values that are not finite; train it again.")
        weights[name] = tensor.float()
    if weights["bias"].numel() != 1:
        raise InputError(
            f"{where} is not a judge file: 'bias' has {weights['bias'].numel()} values, not one."
        )
    trained_on = tensors.get("trained_on", no_prompts())
    if trained_on.dtype != torch.long or trained_on.dim() != 1 or (trained_on < 0).any():
        raise InputError(
            f"{where} is broken: 'trained_on' must hold whole numbers of at least 0, a list of them."
        )
    if not is_number(threshold):
        raise InputError(f"{where} is not a judge file: its threshold is {shortened_value(threshold)}.")
    check_threshold("judge", threshold, f"{where}: threshold")
    return JudgeHead(
        weights["weight"],
        weights["bias"].reshape(()),
        float(threshold),
        header["target_fingerprint"],
        info,
        weights.get("draft_weight"),
        trained_on,
    )


def check_info(info: object, where: str) -> None:
    """Raises InputError beginning with `where` for notes on a head's training that no training has
    written."""
    if not isinstance(info, dict):
        raise InputError(f"{where} is not a judge file: its 'info' is no object.")
    kinds = {
        "chat": lambda value: type(value) is bool,
        "rows": lambda value: type(value) is int and value > 0,
        "label_policy": lambda value: value in LABEL_POLICIES,
        "held_out": lambda value: isinstance(value, dict),
        "guard": lambda value: isinstance(value, dict),
        "l2": lambda value: is_number(value, 0),
        "draft_fingerprint": lambda value: isinstance(value, str),
        "dtype": lambda value: isinstance(value, str),
        "answers": lambda value: type(value) is int and value >= 0,
        "data": lambda value: isinstance(value, str),
    }
    if bad := next((name for name, fine in kinds.items() if name in info and not fine(info[name])), None):
        raise InputError(f"{where} is broken: {bad!r} in its 'info' cannot be {shortened_value(info[bad])}.")


# A rule is (draft_tokens (M,), target_logits (M, V), draft_logits (M, V), scores (M,), threshold ()) -> bool
# (M,). target_logits[i] is the row BEFORE draft token i, which predicts it; scores[i] was read AT token i.


def standard(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold) -> Tensor:
    """The token is the target's own most likely one."""
    return target_logits.argmax(-1) == draft_tokens


def judge(draft_tokens, target_logits, draft_logits, scores: Tensor, threshold: Tensor) -> Tensor:
    """The head's score exceeds delta (arXiv 2501.19309)."""
    return scores > threshold


def kl(draft_tokens, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor) -> Tensor:
    """KL(target || draft) < tau, but only where the target is not sure: max p <= 0.9 (JuDi, arXiv
    2601.04766)."""
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


def topn_delta(
    draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor
) -> Tensor:
    """The token is among the target's TOPN most likely, and p(token) >= max p - delta (TensorRT-LLM's relaxed
    acceptance)."""
    p = target_logits.softmax(-1)
    own = p.gather(-1, draft_tokens[:, None])
    return ((p > own).sum(-1) < TOPN) & (own.squeeze(-1) >= p.amax(-1) - threshold)


def divergence(
    draft_tokens, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor
) -> Tensor:
    """Jensen-Shannon divergence of target and draft, in nats, is at most T (Fuzzy SD, arXiv 2502.20704)."""
    p, q = target_logits.softmax(-1), draft_logits.softmax(-1)
    middle = (p + q) / 2
    parts = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return parts.nan_to_num().sum(-1) / 2 <= threshold  # 0 / 0 where both underflow


def window(draft_tokens: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """The target is undecided, H3 >= h, and its own choices are the next AGREED - 1 draft tokens (FLy, arXiv
    2511.22972).

    H3: -sum of p ln p, in nats, over the target's 3 most likely tokens, p from the whole softmax. The last
    AGREED tokens of a draft never pass. This is the authors' code (github.com/AMD-AGI/FLy,
    fly/models/FLy.py); vLLM (pull requests 50808, 53987) asks for one more agreeing token, and for a p of the
    token above 0.
    """
    p = target_logits.softmax(-1).topk(min(3, target_logits.shape[-1])).values
    agrees = F.pad((target_logits.argmax(-1) == draft_tokens).long(), (0, AGREED))
    place = torch.arange(len(draft_tokens), device=draft_tokens.device)
    undecided = -torch.special.xlogy(p, p).sum(-1) >= threshold
    return (
        undecided & agrees[1:].unfold(0, AGREED - 1, 1)[: len(place)].all(-1) & (place < len(place) - AGREED)
    )


def ensemble(
    draft_tokens: Tensor, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor
) -> Tensor:
    """The token is the most likely one of the mixture w p + (1 - w) q (DIVERSE, arXiv 2604.07622;
    `transformers` has it as `assistant_ensemble_weight`). Its correction and its sampling are the mixture's,
    too: see `mixture`."""
    return mixture(target_logits.softmax(-1), draft_logits.softmax(-1), threshold).argmax(-1) == draft_tokens


def mixture(p: Tensor, q: Tensor, weight: Tensor, min_prob: float = 0.0) -> Tensor:
    """w p + (1 - w) q, (M, V), which `ensemble` verifies against; q counts only where p reaches min_prob."""
    if min_prob > 0:
        q = q.where(p >= min_prob, 0)
    mixed = weight * p + (1 - weight) * q
    return mixed / mixed.sum(-1, keepdim=True) if min_prob > 0 else mixed


@dataclass(frozen=True)
class Rule:
    """A rule with what its threshold is called, its range, the default, and a walk from strict to loose for
    calibration.

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
    "kl": Rule(
        kl, "tau", 0, INF, 0.5, (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 6, 8), needs_draft_logits=True
    ),
    "topk": Rule(topk, "K", 1, INF, 2, (1, 2, 3, 4, 5, 6, 8, 12, 16)),
    "typical": Rule(
        typical, "eps", 0, 1, 0.09, (0.6, 0.4, 0.3, 0.2, 0.13, 0.09, 0.06, 0.04, 0.02, 0.01, 0.005)
    ),
    "topn_delta": Rule(
        topn_delta, "delta", 0, 1, 0.6, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    ),
    "divergence": Rule(
        divergence, "T", 0, 1, 0.4, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), needs_draft_logits=True
    ),
    "window": Rule(
        window, "h", 0, math.log(3), 0.3, (1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0), ahead=AGREED
    ),
    "ensemble": Rule(
        ensemble, "w", 0, 1, 0.5, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2), needs_draft_logits=True
    ),
}


def check_threshold(name: str, threshold: float, what: str = "--threshold") -> float:
    """The threshold, or an InputError when it is outside the rule's range (or no whole number for topk)."""
    rule, fits = RULES[name], name != "topk" or float(threshold).is_integer()
    if not rule.low <= threshold <= rule.high or not math.isfinite(threshold) or not fits:
        kind = "a whole number of at least 1" if name == "topk" else f"between {rule.low:g} and {rule.high:g}"
        raise InputError(
            f"{what} {threshold} is outside the range of --verify {name}: {rule.knob} must be {kind}."
        )
    return threshold


def rule_mask(
    name: str,
    draft_tokens: Tensor,
    target_logits,
    draft_logits,
    scores,
    threshold,
    stop_ids: Tensor,
    min_prob: float = 0.0,
) -> Tensor:
    """What the rule alone accepts, bool (M,). A stop token never passes on the rule alone, nor does a token
    that the target gives less than min_prob.

    `ensemble` is the exception for stop tokens: it decodes the mixture, whose own correction would be that
    very token.
    """
    accepted = RULES[name].accept(draft_tokens, target_logits, draft_logits, scores, threshold)
    if name != "ensemble":
        accepted = accepted & ~torch.isin(draft_tokens, stop_ids)
    if min_prob > 0:
        accepted = accepted & (
            target_logits.softmax(-1).gather(-1, draft_tokens[:, None]).squeeze(-1) >= min_prob
        )
    return accepted


class Markers(NamedTuple):
    """Two texts as an automaton over tokens: table[state, token] is the next state; from `inside` on, the
    text stands between them. It reads bytes, so that it does not matter how the texts were cut into
    tokens."""

    table: Tensor  # (states, V) uint8
    inside: int

    def to(self, device: torch.device | str) -> "Markers":
        return Markers(self.table.to(device), self.inside)

    def walk(self, region: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """From state `region` (1,) over draft tokens (M,): which of them a rule may accept, bool (M,), and
        the states (M + 1,) before, between and after them. The token that completes either text is left to
        the standard test (unless it also begins the next stretch, as one that closes and opens at once)."""
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
        raise InputError(
            f"--relax_between {between[0]!r} {between[1]!r}: give two texts, together of at most 255 bytes."
        )
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
    """Knuth-Morris-Pratt for two texts in turn, (states, 256) uint8: state k < len(begin) has seen k bytes of
    begin, state len(begin) + k has seen begin and then k bytes of end."""
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


COMMANDS = {"train": "scripts.train_judge", "calibrate": "scripts.calibrate"}


def main(argv: list[str] | None = None) -> None:
    """Forwards to the scripts that train and calibrate; they import this file."""
    argv = sys.argv[1:] if argv is None else list(argv)
    at = next(
        (at for at, word in enumerate(argv) if word in COMMANDS), None
    )  # flags may come before the command
    if at is None:
        parser = Parser(__doc__)
        parser.add_argument(
            "command", choices=COMMANDS, help="each has flags of its own; see train --help, calibrate --help"
        )
        parser.parse_args(argv[:1])
        return
    importlib.import_module(COMMANDS[argv.pop(at)]).main(argv)


if __name__ == "__main__":
    main()
