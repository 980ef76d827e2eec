"""The judge head, the verification rules, and training a head.

A judge is one linear layer on the target's last hidden state before the final norm, at the draft token's own position
(Judge Decoding, arXiv 2501.19309). A draft token passes when the standard test OR the rule accepts it.

Train one from answers in which wrong spans are marked, one JSON object a line,
{"prompt": "...", "response": "...", "errors": [[start, end], ...]}, where start and end count characters of the
response and no errors means a right answer:

    python judge.py --checkpoint_path checkpoints/demo/target --data answers.jsonl --out judge.safetensors
"""

import argparse
import codecs
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from model import (
    DTYPES,
    InputError,
    Parser,
    Progress,
    Transformer,
    check_writable,
    load_model,
    open_safetensors,
    pick_device,
    run_dtype,
    run_script,
    write_file,
)
from tokenizer import Tokenizer, load_tokenizer

FEATURE = "target pre-norm hidden state at the token's own position"
LABEL_POLICIES = ("ignore_after", "span", "from_error")


@dataclass(frozen=True)
class JudgeHead:
    """score = sigmoid(weight . hidden + bias), fp32. `info` is what the file's header says of its making."""

    weight: Tensor  # (dim,)
    bias: Tensor  # ()
    threshold: float
    fingerprint: str  # of the target it was trained on
    info: dict

    def score(self, hidden: Tensor) -> Tensor:
        """Probability that each token is right, from its own rows of pre-norm hidden states (..., dim)."""
        return torch.sigmoid(hidden.float() @ self.weight + self.bias)

    def to(self, device: torch.device | str) -> "JudgeHead":
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def save(self, path: str | Path) -> None:
        """Writes `judge.safetensors`, beside and renamed."""
        header = {"threshold": str(self.threshold), "feature": FEATURE, "dim": str(len(self.weight)),
                  "target_fingerprint": self.fingerprint, "info": json.dumps(self.info)}  # fmt: skip
        write_file(Path(path), save({"weight": self.weight.cpu(), "bias": self.bias.cpu()}, metadata=header))


def load_judge(path: str | Path, target: Transformer) -> JudgeHead:
    """Loads a head for `target`. Raises InputError when it is missing, broken, or made for another target."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no judge file {path}; train one with judge.py or name another --judge_path.")
    with open_safetensors(path) as handle:
        header, names = handle.metadata() or {}, set(handle.keys())
        try:
            weight, bias = handle.get_tensor("weight").float(), handle.get_tensor("bias").float().reshape(())
            threshold, info = float(header["threshold"]), json.loads(header["info"])
            found, feature = header["target_fingerprint"], header["feature"]
        except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{path} is not a judge file ({names or 'nothing'} in it): {error}.") from None
    if feature != FEATURE:
        raise InputError(f"{path} reads the feature {feature!r}; this engine gives {FEATURE!r}.")
    if found != target.fingerprint or weight.shape != (target.args.dim,):
        raise InputError(
            f"{path} was made for the target {found} with {weight.numel()} features, "
            f"but this target is {target.fingerprint} with {target.args.dim}; train a judge for it."
        )
    check_threshold("judge", threshold, f"{path}: threshold")
    return JudgeHead(weight, bias, threshold, found, info).to(target.device)


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
WINDOW = 6  # W of window, the paper's


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
    """The target is undecided, entropy / log V >= h, and its own choices are the next WINDOW draft tokens (FLy, arXiv
    2511.22972). A token with fewer than WINDOW draft tokens after it cannot be tested and does not pass."""
    log_p = target_logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1) / math.log(target_logits.shape[-1])
    match = F.pad((target_logits.argmax(-1) == draft_tokens).long(), (0, WINDOW))
    return (entropy >= threshold) & match[1:].unfold(0, WINDOW, 1).all(-1)


@dataclass(frozen=True)
class Rule:
    """A rule with what its threshold is called, its range, and the default."""

    accept: Callable[..., Tensor]
    knob: str
    low: float
    high: float
    default: float
    needs_draft_logits: bool = False


RULES = {
    "standard": Rule(standard, "none", 0, 0, 0),
    "judge": Rule(judge, "delta", 0.5, 1, 0.5),
    "kl": Rule(kl, "tau", 0, float("inf"), 0.5, needs_draft_logits=True),
    "topk": Rule(topk, "K", 1, float("inf"), 2),
    "typical": Rule(typical, "eps", 0, 1, 0.09),
    "topn_delta": Rule(topn_delta, "delta", 0, 1, 0.6),
    "divergence": Rule(divergence, "T", 0, 1, 0.4, needs_draft_logits=True),
    "window": Rule(window, "h", 0, 1, 0.3),
}


def check_threshold(name: str, threshold: float, what: str = "--threshold") -> float:
    """The threshold, or an InputError when it is outside the rule's range (or no whole number for topk)."""
    rule = RULES[name]
    if not rule.low <= threshold <= rule.high or (name == "topk" and not float(threshold).is_integer()):
        kind = "a whole number of at least 1" if name == "topk" else f"between {rule.low} and {rule.high}"
        raise InputError(f"{what} {threshold} is outside the range of --verify {name}: {rule.knob} must be {kind}.")
    return threshold


def rule_mask(
    name: str, draft_tokens: Tensor, target_logits, draft_logits, scores, threshold, stop_ids: Tensor, min_prob: float = 0.0
) -> Tensor:
    """What the rule alone accepts, bool (M,). A stop token never passes on the rule alone, nor does a token that the
    target gives less than min_prob."""
    accepted = RULES[name].accept(draft_tokens, target_logits, draft_logits, scores, threshold)
    accepted = accepted & ~torch.isin(draft_tokens, stop_ids)
    if min_prob > 0:
        accepted = accepted & (target_logits.softmax(-1).gather(-1, draft_tokens[:, None]).squeeze(-1) >= min_prob)
    return accepted


def read_answers(path: str | Path) -> list[dict]:
    """Annotated answers from JSON lines. Raises InputError naming file, line and field of whatever is wrong."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}.") from None
    answers = [read_answer(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not answers:
        raise InputError(f"{path} holds no answers; give JSON lines with prompt, response and errors.")
    return answers


def read_answer(line: str, where: str) -> dict:
    """One annotated answer. Raises InputError beginning with `where`."""
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from None
    for field, kind in (("prompt", str), ("response", str), ("errors", list)):
        if not isinstance(item, dict) or not isinstance(item.get(field), kind):
            raise InputError(f"{where}: field {field!r} must be a {kind.__name__}.")
    length = len(item["response"])
    if not length:
        raise InputError(f"{where}: field 'response' is empty.")
    for span in item["errors"]:
        whole = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        if not whole or not 0 <= span[0] < span[1] <= length:
            raise InputError(f"{where}: 'errors' has {span}, not [start, end] within 0 and {length}.")
    return item


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

    A character whose bytes are spread over tokens is covered by each of them. chat: in Llama 3.1's chat format.
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


@torch.inference_mode()
def hidden_states(target: Transformer, prompt_ids: list[int], ids: list[int], rows: int) -> Tensor:
    """Pre-norm hidden states (len(ids), dim) in fp32 of `ids` after the prompt, read `rows` at a time.

    The same row count as verification (speculate_k + 1) gives the same bits: low-precision matrix products differ
    between row counts. The target's caches must hold both, rounded up to whole chunks.
    """
    device, both, out = target.device, prompt_ids + ids, []
    first = len(prompt_ids)
    tokens = torch.zeros(first + len(ids) + rows, dtype=torch.long, device=device)
    tokens[: len(both)] = torch.tensor(both, device=device)
    for start in (0, *range(first, len(both), rows)):
        width = rows if start else first
        pos = torch.arange(start, start + width, device=device)
        hidden, _ = target(tokens[None, start : start + width], pos, window=start + width, n_logits=0)
        if start:
            out.append(hidden[0].float())
    return torch.cat(out)[: len(ids)]


def collect_features(
    target: Transformer, tokenizer: Tokenizer, answers: list[dict], policy: str, rows: int, chat: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, dim), labels (N,) and answer number (N,) of all labelled tokens of `answers`."""
    encoded = [encode_answer(tokenizer, item["prompt"], item["response"], chat) for item in answers]
    longest = max(len(prompt_ids) + len(ids) for prompt_ids, ids, _ in encoded)
    if longest > target.args.max_position:
        raise InputError(f"An answer has {longest} tokens with its prompt; the context is {target.args.max_position}.")
    target.setup_caches(longest + rows)
    parts, progress = [], Progress("reading answers", len(answers))
    for number, (item, (prompt_ids, ids, spans)) in enumerate(zip(answers, encoded)):
        labels = torch.tensor(label_tokens(spans, item["errors"], policy))
        kept = labels >= 0
        features = hidden_states(target, prompt_ids, ids, rows).cpu()
        parts.append((features[kept], labels[kept], torch.full((int(kept.sum()),), number)))
        progress.step()
    return tuple(torch.cat(column) for column in zip(*parts))


def fit_head(features: Tensor, labels: Tensor, l2: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weighted logistic regression: (weight (dim,), bias ()). Wrong tokens weigh as much as right ones in sum.

    Features are standardised for the fit; the scaling is folded into the result.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, y = ((features - mean) / std).double(), labels.double()
    share = y.mean()
    sample_weight = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    w = torch.zeros(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")

    def loss_of() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y, weight=sample_weight)
        loss = loss + l2 * w[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_of)
    w = w.detach()
    weight = w[:-1] / std
    return weight.float(), (w[-1] - weight @ mean.double()).float()


def measure_head(scores: Tensor, labels: Tensor, thresholds: list[float]) -> dict:
    """AUC, and for each threshold the share of right tokens accepted (recall), of accepted tokens that are right
    (precision), and of wrong tokens accepted (false_accept)."""
    right, wrong = scores[labels == 1], scores[labels == 0]
    order = torch.cat([right, wrong]).argsort().argsort().double() + 1
    auc = (order[: len(right)].sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(wrong))
    rows = []
    for threshold in thresholds:
        passed, failed = (right > threshold).sum().item(), (wrong > threshold).sum().item()
        rows.append({
            "threshold": threshold, "recall": passed / len(right), "precision": passed / max(1, passed + failed),
            "false_accept": failed / len(wrong),
        })  # fmt: skip
    return {"right_tokens": len(right), "wrong_tokens": len(wrong), "auc": auc.item(), "at": rows}


def train_judge(
    target: Transformer, tokenizer: Tokenizer, answers: list[dict], policy: str = "ignore_after", rows: int = 17,
    threshold: float = 0.5, held_out: float = 0.2, seed: int = 0, chat: bool = False,
) -> JudgeHead:  # fmt: skip
    """Trains a head on `answers`, measured on a held-out share of the prompts (split by prompt, never by token).

    Raises InputError when either side of the split lacks right or wrong tokens.
    """
    features, labels, number = collect_features(target, tokenizer, answers, policy, rows, chat)
    prompts = sorted({item["prompt"] for item in answers})
    picked = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed % 2**63))[: int(len(prompts) * held_out)]
    chosen = {prompts[i] for i in picked.tolist()}
    is_test = torch.tensor([item["prompt"] in chosen for item in answers])[number]
    for side, name in ((labels[~is_test], "training"), (labels[is_test], "held-out")):
        if not 0 < side.sum() < len(side):
            raise InputError(f"The {name} answers hold no wrong or no right tokens; give more answers of both kinds.")
    weight, bias = fit_head(features[~is_test], labels[~is_test])
    head = JudgeHead(weight, bias, threshold, target.fingerprint, {})
    thresholds = sorted({0.5, 0.7, 0.8, 0.9, 0.95, 0.99, threshold})
    figures = measure_head(head.score(features[is_test]), labels[is_test], thresholds)
    info = {"label_policy": policy, "rows": rows, "seed": seed, "answers": len(answers), "chat": chat,
            "dtype": str(target.dtype), "training_tokens": int((~is_test).sum()), "held_out": figures}  # fmt: skip
    return replace(head, info=info)


def print_figures(head: JudgeHead) -> None:
    """The held-out figures of a head, as a table."""
    figures = head.info["held_out"]
    print(f"held out: {figures['right_tokens']} right and {figures['wrong_tokens']} wrong tokens, AUC {figures['auc']:.4f}")
    print("threshold  right tokens accepted  precision  wrong tokens accepted")
    for row in figures["at"]:
        mark = "*" if row["threshold"] == head.threshold else " "
        print(f"{row['threshold']:8.3f}{mark} {row['recall']:22.4f} {row['precision']:10.4f} {row['false_accept']:22.4f}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line of training."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="the target's folder")
    add("--data", type=Path, required=True, help="annotated answers, JSON lines")
    add("--out", type=Path, required=True, help="the judge file to write")
    add("--chat", action="store_true", help="put prompts into Llama 3.1's chat format, as generate.py --chat does")
    add("--label_policy", choices=LABEL_POLICIES, default="ignore_after", help="tokens after an error")
    add("--threshold", type=float, default=0.5, help="delta that the engine uses unless told otherwise")
    add("--speculate_k", type=int, default=16, help="M: features are read M + 1 rows at a time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=DTYPES, help="run type, the same as for generate.py (default: bf16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Checks the command line, trains, writes the head and prints its figures."""
    check_threshold("judge", args.threshold)
    check_writable(args.out, "--out")
    if args.speculate_k < 1:
        raise InputError(f"--speculate_k {args.speculate_k} is too small: a round drafts at least 1 token.")
    answers = read_answers(args.data)
    tokenizer, device = load_tokenizer(args.checkpoint_path), pick_device(args.device)
    target = load_model(args.checkpoint_path, device, run_dtype(args.precision, device))
    rows, policy = args.speculate_k + 1, args.label_policy
    head = train_judge(target, tokenizer, answers, policy, rows, args.threshold, seed=args.seed, chat=args.chat)
    head.save(args.out)
    print_figures(head)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run_script("judge.py", lambda: train(args))


if __name__ == "__main__":
    main()
