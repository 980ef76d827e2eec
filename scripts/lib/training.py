"""Training a judge: the fit of one linear layer to features, its threshold, and its figures on held-out
prompts.

Everything here is deterministic: the same answers, settings and models give the same bits on one machine.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import InputError
from judge import JudgeHead
from model import Transformer
from scripts.lib.answers import encode_items
from scripts.lib.features import Shards, extract_features, with_columns
from scripts.lib.intervals import share_interval, upper_bound
from tokenizer import Tokenizer


@dataclass
class TrainSettings:
    """How to train a head."""

    policy: str = "span"
    rows: int = 17  # speculate_k + 1
    threshold: float | None = None  # None: the careful one
    held_out: float = 0.2
    l2: float | None = None  # None: the best of L2_GRID
    guard_weight: float = 1.0
    seed: int = 0
    chat: bool = False


def moments(shards: Iterable[Tensor], used: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dims,) in fp64 over the rows where `used` (N,) holds."""
    total, squares = 0, 0
    for x, u in with_columns(shards, used):
        for rows in x[u].split(4096):
            total, squares = total + rows.double().sum(0), squares + rows.double().square().sum(0)
    mean = total / used.sum()
    return mean, (squares / used.sum() - mean.square()).clamp(min=0).sqrt() + 1e-6


def fit_head(
    shards: Iterable[Tensor], labels: Tensor, weights: Tensor, l2: list[float]
) -> list[tuple[Tensor, Tensor]]:
    """Weighted logistic regression: one (weight (dims,), bias ()) for each penalty in `l2`; give them from
    strong to weak.

    shards: fp32 (n, dims), N rows in all, read several times; labels (N,) 1 or 0; weights (N,) fp64, 0 leaves
    a row out. Features are standardised for the fit; the scaling is folded into the result. Memory: shards
    held in memory are held once more, standardised; of shards on disk it takes one at a time.
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
    """Minimises, in place over w (dims + 1,) fp64, the weighted logistic loss plus strength |w|^2 (without
    the bias)."""

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
    """Weights (N,) fp64: right tokens weigh 1/2 in sum, wrong ones 1/2, guarded ones guard_weight / 2; unused
    ones 0."""
    guard = torch.zeros_like(used) if guard is None else guard
    weights = torch.zeros(len(labels), dtype=torch.double)
    for part, share in ((labels == 1, 1), ((labels == 0) & ~guard, 1), (guard, guard_weight)):
        part = part & used
        weights[part] = share / 2 / max(1, int(part.sum()))
    return weights


def split_prompts(
    keys: Tensor, seed: int, held_out: float = 0.2, validation: float = 0.16
) -> tuple[Tensor, Tensor]:
    """Which answers are held out and which validate, bool (answers,) each. All answers of a prompt fall on
    one side."""
    prompts = keys.unique()
    order = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed % 2**63))]
    first, second = int(len(order) * held_out), int(len(order) * (held_out + validation))
    return torch.isin(keys, order[:first]), torch.isin(keys, order[first:second])


@dataclass
class Rows:
    """The tokens of all answers, N of them, in the order of their features."""

    labels: Tensor  # (N,) 1 right, 0 wrong, -100 ignored
    guard: Tensor  # (N,) bool: must not pass, whatever they say
    test: Tensor  # (N,) bool: of a held-out prompt
    validation: Tensor  # (N,) bool: of a prompt that chooses the penalty

    def __post_init__(self):
        real = (self.labels >= 0) & ~self.guard
        self.held_out, self.validating = real & self.test, real & self.validation
        self.training = real & ~self.test & ~self.validation

    def check(self) -> None:
        """Raises InputError when a part of the split lacks right or wrong tokens."""
        parts = {"training": self.training, "validation": self.validating, "held-out": self.held_out}
        for name, side in parts.items():
            if not 0 < self.labels[side].sum() < side.sum():
                raise InputError(
                    f"The {name} answers hold no wrong or no right tokens; give more answers of both kinds."
                )


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """AUC: the share of (right, wrong) pairs in which the right token scores higher; ties count half."""
    right, wrong = scores[labels == 1].double(), scores[labels == 0].double().sort().values
    below, upto = (torch.searchsorted(wrong, right, right=side).double() for side in (False, True))
    return ((below + upto) / 2).mean().item() / len(wrong)


def measure_head(scores: Tensor, labels: Tensor, thresholds: list[float]) -> dict:
    """AUC; for each threshold the share of right tokens accepted (recall), of accepted tokens that are right
    (precision), and of wrong tokens accepted (false_accept); and the reliability curve: in ten bins of the
    score, the mean score against the share that is right."""
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

    return {
        "right_tokens": len(right),
        "wrong_tokens": len(wrong),
        "auc": area_under_curve(scores, labels),
        "at": rows,
        "reliability": curve,
    }


L2_GRID = [1.0, 0.3, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4]


def choose_l2(shards: Shards, rows: Rows) -> tuple[list, float]:
    """([[l2, validation AUC], ...], the best l2 of L2_GRID; the stronger of equals)."""
    heads = fit_head(shards, rows.labels, balanced(rows.labels, rows.training), L2_GRID)
    tried = []
    for l2, (weight, bias) in zip(L2_GRID, heads):
        scores = torch.cat([(x @ weight + bias)[v] for x, v in with_columns(shards, rows.validating)])
        tried.append([l2, area_under_curve(scores, rows.labels[rows.validating])])
    return tried, max(tried, key=lambda pair: (round(pair[1], 5), pair[0]))[0]


GRID = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99]  # thresholds that are measured
CAREFUL = 0.05  # where nobody gives a threshold: at most so many wrong tokens accepted, with 95% confidence


def careful_threshold(scores: Tensor, labels: Tensor) -> float:
    """The lowest of GRID whose upper 95% bound of wrong tokens accepted is at most CAREFUL; else the
    highest."""
    wrong = scores[labels == 0]
    bounds = ((t, upper_bound(int((wrong > t).sum()), len(wrong), 0.95)) for t in GRID)
    return next((t for t, bound in bounds if bound <= CAREFUL), GRID[-1])


def guard_figures(scores: Tensor, rows: Rows, threshold: float) -> dict:
    """How many guarded tokens still pass at `threshold`, of the training and of the held-out texts."""
    figures = {}
    for name, side in (("training", rows.guard & ~rows.test), ("held_out", rows.guard & rows.test)):
        figures[name] = {"tokens": int(side.sum()), "passed": int((scores[side] > threshold).sum())}
    return figures


def train_judge(
    models: list[Transformer], tokenizer: Tokenizer, answers: list[dict], settings: TrainSettings, cache: Path
) -> JudgeHead:
    """Trains a head on `answers`, measured on a held-out share of the prompts.

    models: the target, or target and draft for the feature target+draft. Answers with "guard": true must not
    pass: all their tokens are wrong. cache: where features are kept. Raises InputError when a part of the
    split lacks right or wrong tokens.
    """
    s, target = settings, models[0]
    encoded = encode_items(tokenizer, answers, s.chat, min(model.args.vocab_size for model in models))
    shards = extract_features(models, encoded, s.rows, cache)
    keys = torch.tensor([answer.key for answer in encoded])
    held_out, validation = split_prompts(keys, s.seed, s.held_out)
    guard = torch.tensor([bool(answer.item.get("guard")) for answer in encoded])
    rows = Rows(shards.labels(encoded, s.policy), *(x[shards.answer] for x in (guard, held_out, validation)))
    rows.check()

    tried, l2 = choose_l2(shards, rows) if s.l2 is None else ([], s.l2)
    used = (rows.labels >= 0) & ~rows.test
    weights = balanced(rows.labels, used, rows.guard, s.guard_weight)
    weight, bias = fit_head(shards, rows.labels, weights, [l2])[0]
    if not (weight.isfinite().all() and bias.isfinite()):
        raise InputError(f"The fit with --l2 {l2:g} has no finite end; give a larger one.")

    scores = torch.cat([torch.sigmoid(x @ weight + bias) for x in shards])
    measured = scores[rows.held_out], rows.labels[rows.held_out]
    threshold = careful_threshold(*measured) if s.threshold is None else s.threshold
    info = {
        "label_policy": s.policy,
        "rows": s.rows,
        "seed": s.seed,
        "answers": len(answers),
        "chat": s.chat,
        "dtype": str(target.dtype),
        "training_tokens": int((rows.training | rows.validating).sum()),
        "l2": l2,
        "l2_tried": tried,
        "data": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
        "held_out": measure_head(*measured, sorted({*GRID, threshold})),
    }
    if len(models) > 1:
        info["draft_fingerprint"] = models[1].fingerprint
    if guard.any():
        info["guard"] = {"weight": s.guard_weight, **guard_figures(scores, rows, threshold)}

    weight, draft_weight = weight[: target.args.dim].clone(), weight[target.args.dim :]
    draft_weight = draft_weight if len(models) > 1 else None
    trained_on = keys[~held_out].unique()
    return JudgeHead(weight, bias, threshold, target.fingerprint, info, draft_weight, trained_on)


def print_figures(head: JudgeHead) -> None:
    """The held-out figures of a head, as tables: each share with its count and 95% interval
    (Clopper-Pearson)."""
    figures, l2 = head.info["held_out"], head.info["l2"]
    right, wrong = figures["right_tokens"], figures["wrong_tokens"]
    print(f"held out: {right} right and {wrong} wrong tokens, AUC {figures['auc']:.4f}, L2 {l2:g}")
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
            what = f"guarded texts, {name.replace('_', ' ')}"
            print(f"{what}: {part['passed']} of {part['tokens']} tokens still pass")
    if (least := upper_bound(0, wrong, 0.95)) > CAREFUL:
        print(
            f"Only {wrong} wrong tokens are held out: were none of them accepted, a judge could still accept "
            f"{least:.0%}, and the AUC rests on them alone; give more answers with errors.",
            file=sys.stderr,
        )


def show_share(k: int, n: int) -> str:
    """0.9870, 34890/35350 (0.986-0.988)"""
    if not n:
        return "-"
    low, high = share_interval(k, n)
    return f"{k / n:.4f}, {k}/{n} ({low:.3f}-{high:.3f})"
