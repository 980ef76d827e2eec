"""How much of a given text each rule lets through, as if it were the draft. The text is read once."""

import argparse

import torch
from torch import Tensor

from cli import InputError, Progress
from generate import NotFinite
from judge import JudgeHead, needs_judge, rule_mask, standard
from model import run_dtype
from scripts.lib.answers import Encoded, encode_items
from scripts.lib.bench import Variant, label, settings_for
from scripts.lib.features import RowReader
from scripts.lib.pair import load_pair, schemes_of
from tokenizer import Tokenizer

Letters = list[str]  # one a token: a(ccepted by the standard test), r(ule alone), t (neither)


def read_text(
    readers: list[RowReader], head: JudgeHead | None, text: Encoded
) -> tuple[list[Tensor], Tensor | None]:
    """Each model's logits (n, V) before the n tokens of a text, and the judge's scores (n,) of them."""
    both, base = text.prompt + text.ids, len(text.prompt) - 1
    hidden = [reader.read(both, base, base, len(both)) for reader in readers]
    logits = [r.model.output(r.model.norm(h[:-1])).float() for r, h in zip(readers, hidden)]
    if head is None:
        return logits, None
    return logits, head.score(hidden[0][1:], hidden[1][:-1] if head.draft_weight is not None else None)


@torch.inference_mode()
def letters_of(
    models: tuple, variants: list[Variant], texts: list[Encoded], args, stop_ids: list[int]
) -> list[list[Letters]]:
    """For each text and variant its letters. models: target, draft, judge or None."""
    target, draft, head = models
    length = max(len(text.prompt) + len(text.ids) for text in texts)
    settings = [settings_for(args, variant) for variant in variants]
    rows = max(s.speculate_k for s in settings) + 1
    readers = [RowReader(model, rows, length) for model in (target, draft) if model is not None]
    stops, found, progress = torch.tensor(stop_ids, device=target.device), [], Progress("texts", len(texts))

    for number, text in enumerate(texts, 1):
        logits, scores = read_text(readers, head, text)
        if not all(x.isfinite().all() for x in logits):
            raise NotFinite(f"The logits of text {number} are not finite; try --precision fp32 or bf16.")

        tokens = torch.tensor(text.ids, device=target.device)
        by_standard = standard(tokens, logits[0], None, None, None).tolist()
        letters = []
        for s in settings:
            threshold = torch.tensor(s.resolved(head).threshold or 0.0)
            rule = rule_mask(
                s.verify,
                tokens,
                logits[0],
                logits[-1],
                scores,
                threshold,
                stop_ids=stops,
                min_prob=s.min_prob,
            )
            letters.append(
                ["a" if own else "r" if mine else "t" for own, mine in zip(by_standard, rule.tolist())]
            )
        found.append(letters)
        progress.step()

    return found


def score_texts(
    args: argparse.Namespace, variants: list[Variant], tokenizer: Tokenizer, items: list[dict], where: str
) -> tuple[list[Encoded], list[list[Letters]]]:
    """Reads items (prompt, response, errors) through the models: the texts' ids, and for each text and
    variant its letters. Raises InputError for a text beyond the context, NotFinite for logits that are
    not."""
    judge = args.judge_path if any(needs_judge(variant.name) for variant in variants) else None
    dtype = run_dtype(args.precision, args.device)
    models = load_pair(
        args.checkpoint_path, args.draft_checkpoint_path, judge, args.device, dtype, schemes=schemes_of(args)
    )

    texts = encode_items(tokenizer, items, args.chat, models[0].args.vocab_size)
    context = models[0].args.max_position
    if too_long := [n for n, text in enumerate(texts, 1) if len(text.prompt) + len(text.ids) > context]:
        raise InputError(f"{where}: text {too_long[0]} is longer than the context of {context} tokens.")

    return texts, letters_of(models, variants, texts, args, tokenizer.stop_ids)


def rounds_of(letters: list[str], m: int) -> tuple[int, int]:
    """(accepted tokens, rounds) when rounds of m tokens read on through a text; each also gives the token
    after it."""
    at = accepted = rounds = 0
    while at < len(letters):
        drafted = letters[at : at + m]
        run = drafted.index("t") if "t" in drafted else len(drafted)
        accepted, rounds, at = accepted + run, rounds + 1, at + run + 1
    return accepted, rounds


def summarise(letters: list[list[list[str]]], variants: list[Variant], m: int) -> list[dict]:
    """One row a variant: tokens, the share that passes, the share that only the rule lets through, m*."""
    rows = []
    for number, variant in enumerate(variants):
        mine = [text[number] for text in letters]
        tokens = sum(map(len, mine))
        counted = [rounds_of(text, variant.k or m) for text in mine]
        rows.append({
            "rule": label(variant), "texts": len(mine), "tokens": tokens,
            "passed": sum(letter != "t" for text in mine for letter in text) / tokens,
            "by_rule": sum(letter == "r" for text in mine for letter in text) / tokens,
            "mean_accepted": sum(a for a, _ in counted) / sum(r for _, r in counted),
        })  # fmt: skip

    return rows
