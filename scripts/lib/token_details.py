"""What target, draft and judge say of each token of a finished answer; `evaluate.py --details` keeps it for
report.py.

One more pass of each model over prompt and answer, outside all timing and without the caches. Mind the rows:
the target's probability and KL(target || draft) are of the row before a token, which predicts it; the judge
reads the token's own row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import tp
from generate import NotFinite
from judge import JudgeHead
from model import Transformer
from tokenizer import Decoder, Tokenizer

ROWS = 64  # of logits in memory at a time: a large vocabulary's are half a megabyte a row


class Details(NamedTuple):
    """Of an answer of n tokens. `score` is None without a judge."""

    p: Tensor  # (n,) the target's probability of the token, before temperature and top-k
    kl: Tensor  # (n,) KL(target || draft) where the token was predicted, in nats
    score: Tensor | None  # (n,) the judge's
    top: Tensor  # (n,) the target's own most likely token


@torch.inference_mode()
def token_details(
    target: Transformer, draft: Transformer, head: JudgeHead | None, prompt: list[int], tokens: list[int]
) -> Details:
    """Reads prompt and tokens (ids) through both models at once; no state of an engine is read or changed.

    Raises NotFinite where a figure would be NaN or infinite.
    """
    n, ids = len(tokens), torch.tensor([prompt + tokens], device=target.device)
    # (n + 1, dim)
    hidden, draft_hidden = (model(ids, n_logits=0)[0][0, -n - 1 :] for model in (target, draft))
    p, kl, top = [], [], []
    for at in range(0, n, ROWS):
        rows = slice(at, min(at + ROWS, n))
        log_p, log_q = (
            tp.whole(model.output(model.norm(states[rows])).float(), model.args.vocab_size).log_softmax(-1)
            for model, states in ((target, hidden), (draft, draft_hidden))
        )
        p.append(log_p.gather(-1, ids[0, -n:][rows, None]).squeeze(-1).exp())
        # rounding may leave it a little below 0
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
        top.append(log_p.argmax(-1))

    proposing = draft_hidden[:-1] if head is not None and head.draft_weight is not None else None
    score = head.score(hidden[1:], proposing) if head is not None else None
    found = Details(torch.cat(p), torch.cat(kl), score, torch.cat(top))
    if not tp.first(lambda: all(values is None or bool(values.isfinite().all()) for values in found)):
        raise NotFinite(
            "The details of an answer are not finite: the models' "
            "logits overflow; try --precision fp32 or bf16."
        )

    return found


def as_fields(details: Details, tokenizer: Tokenizer, tokens: list[int]) -> dict:
    """The fields of a result line: lists p, kl, score, and top, a text where it is not the token, else
    None."""

    def rounded(values: Tensor | None) -> list[float] | None:
        return None if values is None else [float(f"{x:.4g}") for x in values.tolist()]

    top = [None if own == token else tokenizer.token_bytes(own).decode(errors="replace")
           for own, token in zip(details.top.tolist(), tokens)]  # fmt: skip
    return {"p": rounded(details.p), "kl": rounded(details.kl), "score": rounded(details.score), "top": top}


def cuts(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """How many characters of `answer_text` each token completes; a stop token at the end none."""
    decoder, counts = Decoder(tokenizer), []
    stopped = bool(tokens) and tokens[-1] in tokenizer.stop_ids
    text = tokens[:-1] if stopped else tokens
    counts = [len(decoder.push(token)) for token in text]
    if counts:
        counts[-1] += len(decoder.flush())
    return counts + [0] * stopped
