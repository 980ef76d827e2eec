"""The judge head, and the rules that verify draft tokens.

A judge is one linear layer on the target's last hidden state before the final norm, at the draft token's own
position (Judge Decoding, arXiv 2501.19309). A draft token passes when the standard test or the rule accepts
it.

    python judge.py train --data answers.jsonl --out judge.safetensors     # is scripts/train_judge.py
    python judge.py calibrate --max_harm 0.02 --questions demo             # is scripts/calibrate.py
"""

from cli import InputError, Parser, shortened_value  # isort: skip  (first: from here on Ctrl-C is silent)

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from checkpoint import read_safetensors
from files import is_number, parse_object, write_file
from model import Transformer

# What a head reads: the target's pre-norm hidden state at the token's own position; and the draft's, too, in
# the row that proposed the token.
FEATURES = ("target", "target+draft")
LABEL_POLICIES = ("span", "ignore_after", "from_error")  # what tokens after an error count as
DELTA = (0.5, 1.0)  # range of a head's threshold; below a half it would accept what it takes for wrong


def no_prompts() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class JudgeHead:
    """score = sigmoid(weight . hidden + draft_weight . draft_hidden + bias), in fp32."""

    weight: Tensor  # (dim,)
    bias: Tensor  # ()
    threshold: float
    fingerprint: str  # of the target it was trained on
    info: dict  # how it was made, and its calibration if it has one
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
        weight, bias = self.weight.to(device), self.bias.to(device)
        return replace(self, weight=weight, bias=bias, draft_weight=draft_weight)

    def save(self, path: str | Path) -> None:
        """Writes the judge's file. Its header has one entry: safetensors keeps no order of several."""
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
    """A head for `target` (and, with the feature target+draft, for `draft`). Raises InputError when it is
    missing, broken, or made for another model."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"There is no judge file {path}; train one with train_judge.py or name another --judge_path."
        )
    metadata, tensors = read_safetensors(path)
    if "judge" not in metadata:
        raise InputError(f"{path} is not a judge file ({', '.join(sorted(tensors)) or 'nothing'} in it).")
    header = parse_object(metadata["judge"], f"{path}: its header")
    if flaw := next(flaws(header, tensors), None):
        raise InputError(f"{path} {flaw}.")

    head = JudgeHead(
        tensors["weight"].float(),
        tensors["bias"].float().reshape(()),
        float(header["threshold"]),
        header["target_fingerprint"],
        header["info"],
        tensors["draft_weight"].float() if header["feature"] == "target+draft" else None,
        tensors.get("trained_on", no_prompts()),
    )
    check_fit(head, path, target, draft)
    return head.to(target.device)


def check_fit(head: JudgeHead, path: Path, target: Transformer, draft: Transformer | None) -> None:
    """Raises InputError for a head that was made for another target, or for another draft if it reads one."""
    if head.fingerprint != target.fingerprint or head.weight.shape != (target.args.dim,):
        raise InputError(
            f"{path} was made for the target {head.fingerprint} with {head.weight.numel()} features, "
            f"but this target is {target.fingerprint} with {target.args.dim}; train a judge for it."
        )
    if head.draft_weight is None:
        return
    made_with, found = head.info.get("draft_fingerprint"), draft.fingerprint if draft else "not given"
    if made_with != found:
        raise InputError(
            f"{path} reads the draft {made_with}, too, but the draft here is {found}; train a judge for it."
        )
    if head.draft_weight.shape != (draft.args.dim,):
        n = head.draft_weight.numel()
        raise InputError(f"{path} is broken: 'draft_weight' has {n} values for {draft.args.dim}.")


HEADER = {  # entry of a judge's file -> whether training writes this
    "threshold": lambda value: is_number(value, *DELTA),
    "feature": lambda value: value in list(FEATURES),
    "target_fingerprint": lambda value: isinstance(value, str),
    "info": lambda value: isinstance(value, dict),
}
INFO = {  # the same of its notes, each of which may be missing
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


def flaws(header: dict, tensors: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong with a judge's file. Only the first counts, since the checks after it rest on it."""
    for name, fits in HEADER.items():
        if name not in header:
            yield f"is not a judge file: its header lacks {name!r}"
        if not fits(header[name]):
            yield f"is not a judge file: its {name!r} cannot be {shortened_value(header[name])}"
    for name, fits in INFO.items():
        if name in header["info"] and not fits(header["info"][name]):
            yield f"is broken: {name!r} in its 'info' cannot be {shortened_value(header['info'][name])}"

    for name in ("weight", "bias", *(["draft_weight"] if header["feature"] == "target+draft" else [])):
        if name not in tensors:
            yield f"is not a judge file: it lacks {name!r}"
        x, n = tensors[name], tensors[name].numel()
        if not x.is_floating_point() or x.dim() > 1 or not n or (name == "bias" and n > 1):
            yield f"is not a judge file: {name!r} is {x.dtype} of shape {tuple(x.shape)}"
        if not x.float().isfinite().all():
            yield f"is broken: {name!r} holds values that are not finite; train it again"
    trained_on = tensors.get("trained_on", no_prompts())
    if trained_on.dtype != torch.long or trained_on.dim() != 1 or (trained_on < 0).any():
        yield "is broken: 'trained_on' must hold whole numbers of at least 0, a list of them"


# A rule is (drafted (M,), target_logits (M, V), draft_logits (M, V), scores (M,), threshold ()) -> bool
# (M,). target_logits[i] is the row BEFORE draft token i, which predicts it; scores[i] was read AT token i.


def standard(drafted: Tensor, target_logits: Tensor, draft_logits, scores, threshold) -> Tensor:
    """The token is the target's own most likely one."""
    return target_logits.argmax(-1) == drafted


def judge(drafted, target_logits, draft_logits, scores: Tensor, threshold: Tensor) -> Tensor:
    """The head's score exceeds delta (arXiv 2501.19309)."""
    return scores > threshold


def kl(drafted, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor) -> Tensor:
    """KL(target || draft) < tau where the target is not sure, max p <= 0.9 (JuDi, arXiv 2601.04766)."""
    log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    p = log_p.exp()
    return (p.amax(-1) <= 0.9) & ((p * (log_p - log_q)).sum(-1) < threshold)


def topk(drafted: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """The token is among the target's K most likely (the weak baseline of arXiv 2501.19309)."""
    own = target_logits.gather(-1, drafted[:, None])
    return (target_logits > own).sum(-1) < threshold


def typical(drafted: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """p(token) > min(eps, alpha exp(-entropy)) with alpha = sqrt(eps) (Medusa, arXiv 2401.10774)."""
    log_p = target_logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    own = log_p.gather(-1, drafted[:, None]).squeeze(-1).exp()
    return own > torch.minimum(threshold, threshold.sqrt() * (-entropy).exp())


TOPN = 10  # N of topn_delta, as TensorRT-LLM sets it for reasoning models
AGREED = 6  # W of window: the token itself and the next five


def topn_delta(drafted: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """One of the target's TOPN most likely, with p(token) >= max p - delta (TensorRT-LLM's relaxed rule)."""
    p = target_logits.softmax(-1)
    own = p.gather(-1, drafted[:, None])
    return ((p > own).sum(-1) < TOPN) & (own.squeeze(-1) >= p.amax(-1) - threshold)


def divergence(drafted, target_logits: Tensor, draft_logits: Tensor, scores, threshold: Tensor) -> Tensor:
    """Jensen-Shannon divergence of target and draft, in nats, is at most T (Fuzzy SD, arXiv 2502.20704)."""
    p, q = target_logits.softmax(-1), draft_logits.softmax(-1)
    middle = (p + q) / 2
    parts = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return parts.nan_to_num().sum(-1) / 2 <= threshold  # 0 / 0 where both underflow


def window(drafted: Tensor, target_logits: Tensor, draft_logits, scores, threshold: Tensor) -> Tensor:
    """The target is undecided (H3 >= h) and chooses the next AGREED - 1 draft tokens (FLy, arXiv 2511.22972).

    H3: -sum of p ln p, in nats, over the target's 3 most likely tokens, p from the whole softmax. The last
    AGREED tokens of a draft never pass. This is the authors' code (github.com/AMD-AGI/FLy,
    fly/models/FLy.py); vLLM (pull requests 50808, 53987) asks for one more agreeing token, and for a p of the
    token above 0.
    """
    p = target_logits.softmax(-1).topk(min(3, target_logits.shape[-1])).values
    agrees = F.pad((target_logits.argmax(-1) == drafted).long(), (0, AGREED))
    place = torch.arange(len(drafted), device=drafted.device)
    undecided = -torch.special.xlogy(p, p).sum(-1) >= threshold
    agreed = agrees[1:].unfold(0, AGREED - 1, 1)[: len(place)].all(-1)
    return undecided & agreed & (place < len(place) - AGREED)


def ensemble(drafted: Tensor, target_logits: Tensor, draft_logits: Tensor, scores, threshold) -> Tensor:
    """The token is the most likely one of the mixture w p + (1 - w) q (DIVERSE, arXiv 2604.07622;
    `transformers` has it as `assistant_ensemble_weight`). Its correction and its sampling are the mixture's,
    too: see `mixture`."""
    return mixture(target_logits.softmax(-1), draft_logits.softmax(-1), threshold).argmax(-1) == drafted


def mixture(p: Tensor, q: Tensor, weight: Tensor, min_prob: float = 0.0) -> Tensor:
    """w p + (1 - w) q, (M, V), which `ensemble` verifies against; q counts only where p reaches min_prob."""
    if min_prob > 0:
        q = q.where(p >= min_prob, 0)
    mixed = weight * p + (1 - weight) * q
    return mixed / mixed.sum(-1, keepdim=True) if min_prob > 0 else mixed


@dataclass(frozen=True)
class Rule:
    """One entry of RULES: a rule, its knob, and all that the engine asks of it; it branches on no rule's name."""

    accept: Callable[..., Tensor]
    knob: str | None = None  # what the threshold is called; without one a rule is never asked
    low: float = 0.0
    high: float = 0.0
    default: float | None = None  # None: the judge's own threshold counts
    reads: tuple[str, ...] = ()  # beyond the standard test: the "target"'s or "draft"'s logits, the "scores"
    whole: bool = False  # the threshold is a whole number
    mixes: bool = False  # it decodes the mixture of target and draft
    ahead: int = 0  # draft tokens after its own that it looks at; with fewer drafted, a token does not pass
    walk: tuple[float, ...] = ()  # thresholds from strict to loose, for calibration


INF, TARGET, BOTH = math.inf, ("target",), ("target", "draft")
RULES = {
    "standard": Rule(standard),
    "judge": Rule(judge, "delta", *DELTA, None, reads=("scores",),
                  walk=(0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "kl": Rule(kl, "tau", 0, INF, 0.5, reads=BOTH,
               walk=(0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 6, 8)),
    "topk": Rule(topk, "K", 1, INF, 2, reads=TARGET, whole=True, walk=(1, 2, 3, 4, 5, 6, 8, 12, 16)),
    "typical": Rule(typical, "eps", 0, 1, 0.09, reads=TARGET,
                    walk=(0.6, 0.4, 0.3, 0.2, 0.13, 0.09, 0.06, 0.04, 0.02, 0.01, 0.005)),
    "topn_delta": Rule(topn_delta, "delta", 0, 1, 0.6, reads=TARGET,
                       walk=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    "divergence": Rule(divergence, "T", 0, 1, 0.4, reads=BOTH, walk=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
    "window": Rule(window, "h", 0, math.log(3), 0.3, reads=TARGET, ahead=AGREED,
                   walk=(1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0)),
    "ensemble": Rule(ensemble, "w", 0, 1, 0.5, reads=BOTH, mixes=True,
                     walk=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)),
}  # fmt: skip
PLAIN = Rule(standard)  # where there is no draft, nothing is asked


def relaxed_rules() -> list[str]:
    """The rules that accept more than the standard test."""
    return [name for name, rule in RULES.items() if rule.knob]


def needs_judge(verify: str) -> bool:
    """Whether --verify reads a judge's scores. Plain decoding has no rule."""
    return verify in RULES and "scores" in RULES[verify].reads


def check_threshold(name: str, threshold: float, what: str = "--threshold") -> float:
    """The threshold, or an InputError when it is outside the rule's range, or not whole where it must be."""
    rule, low, high = RULES[name], RULES[name].low, RULES[name].high
    if not low <= threshold <= high or not math.isfinite(threshold) or (rule.whole and threshold % 1):
        kind = f"a whole number of at least {low:g}" if rule.whole else f"between {low:g} and {high:g}"
        raise InputError(
            f"{what} {threshold} is outside the range of --verify {name}: {rule.knob} must be {kind}."
        )
    return threshold


def rule_mask(
    name: str, drafted: Tensor, target_logits, draft_logits, scores, threshold, *, stop_ids, min_prob=0.0
) -> Tensor:
    """What the rule alone accepts, bool (M,). A stop token never passes on the rule alone, nor does a token
    that the target gives less than min_prob.

    A rule that mixes is the exception for stop tokens: its own correction would be that very token.
    """
    rule = RULES[name]
    accepted = rule.accept(drafted, target_logits, draft_logits, scores, threshold)
    if not rule.mixes:
        accepted = accepted & ~torch.isin(drafted, stop_ids)
    if min_prob > 0:
        accepted = accepted & (target_logits.softmax(-1).gather(-1, drafted[:, None]).squeeze(-1) >= min_prob)
    return accepted


COMMANDS = {"train": "scripts.train_judge", "calibrate": "scripts.calibrate"}


def main(argv: list[str] | None = None) -> None:
    """Forwards to the command that is named anywhere among the flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if word in COMMANDS), None)
    if command is None:  # --help, or a mistake: both end here
        parser = Parser(__doc__)
        parser.add_argument("command", choices=COMMANDS, help="train --help and calibrate --help say more")
        parser.parse_args(argv[:1])

    argv.remove(command)
    importlib.import_module(COMMANDS[command]).main(argv)  # imported late: they import this file


if __name__ == "__main__":
    main()
