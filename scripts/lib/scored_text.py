"""How much of a given text each rule would have let through."""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import torch

from cli import InputError, Progress
from generate import NotFinite, check_settings, threshold_of
from judge import RULES, rule_mask
from model import pick_device, run_dtype
from scripts.lib.answers import Encoded, encode_items
from scripts.lib.bench import Variant, label, parse_rules, settings_for
from scripts.lib.features import RowReader
from scripts.lib.pair import load_pair, name_models, schemes_of
from scripts.lib.public_tasks import json_lines
from scripts.lib.terminal import Paint
from tokenizer import Decoder, Tokenizer, load_tokenizer


def read_texts(path: Path, limit: int | None) -> list[dict]:
    """[{"prompt", "response", "errors": []}]. Raises InputError naming file, line and field."""
    items = []
    for where, item in islice(json_lines(path), limit):
        fields = (
            next((item[k] for k in keys if k in item), None)
            for keys in (("prompt", "question"), ("response", "answer"))
        )
        prompt, response = fields
        if prompt is None or response is None:
            raise InputError(f"{where} must be an object with prompt and response (or question and answer).")
        if not isinstance(prompt, str) or not isinstance(response, str) or not response:
            raise InputError(f"{where}: prompt and response must be text, and the response not empty.")
        items.append({"prompt": prompt, "response": response, "errors": []})
    if not items:
        raise InputError(f"{path} holds no texts; give JSON lines with prompt and response.")
    return items


@torch.inference_mode()
def passes(
    models: tuple, variants: list[Variant], texts: list[Encoded], args, stop_ids: list[int]
) -> list[list[list[str]]]:
    """For each text and variant one letter a token: a(ccepted by the standard test), r(ule alone), t
    (neither)."""
    target, draft, head = models
    length, k = (
        max(len(t.prompt) + len(t.ids) for t in texts),
        max(settings_for(args, v).speculate_k for v in variants),
    )
    readers = [RowReader(model, k + 1, length) for model in (target, draft) if model is not None]
    stops, out, progress = torch.tensor(stop_ids, device=target.device), [], Progress("texts", len(texts))
    for text in texts:
        both, base = text.prompt + text.ids, len(text.prompt) - 1
        hidden = [reader.read(both, base, base, len(both)) for reader in readers]
        logits = [r.model.output(r.model.norm(h[:-1])).float() for r, h in zip(readers, hidden)]
        if not all(x.isfinite().all() for x in logits):
            raise NotFinite(
                f"The logits of text {len(out) + 1} are not finite; try --precision fp32 or bf16."
            )
        scores = None
        if head is not None:
            scores = head.score(hidden[0][1:], hidden[1][:-1] if head.draft_weight is not None else None)
        tokens, letters = torch.tensor(text.ids, device=target.device), []
        standard = RULES["standard"].accept(tokens, logits[0], None, None, None)
        for variant in variants:
            threshold = torch.tensor(threshold_of(settings_for(args, variant), head) or 0.0)
            rule = rule_mask(
                variant.name, tokens, logits[0], logits[-1], scores, threshold, stops, args.min_prob
            )
            letters.append(
                ["a" if s else "r" if r else "t" for s, r in zip(standard.tolist(), rule.tolist())]
            )
        out.append(letters)
        progress.step()
    return out


def rounds_of(letters: list[str], m: int) -> tuple[int, int]:
    """(accepted tokens, rounds) when rounds of m tokens read on through a text; each also gives the token
    after it."""
    at = accepted = rounds = 0
    while at < len(letters):
        run = next(
            (i for i, letter in enumerate(letters[at : at + m]) if letter == "t"), len(letters[at : at + m])
        )
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


def score(args: argparse.Namespace) -> list[dict]:
    """Reads the texts through the models, prints what is asked for, and returns the rows."""
    variants = parse_rules(args.verify, args.threshold)
    name_models(args)
    if any(variant.name == "window" for variant in variants):
        raise InputError(
            "--verify window looks ahead within a round, and a text has no rounds; take another rule."
        )
    if any(variant.name not in RULES for variant in variants) or "auto" in (
        args.speculate_k,
        *(v.k for v in variants),
    ):
        raise InputError(f"--verify takes {', '.join(RULES)} here, and M is a number: the text is the draft.")
    for variant in variants:
        check_settings(settings_for(args, variant), True, args.judge_path is not None)
    args.device = pick_device(args.device)
    tokenizer, items = load_tokenizer(args.checkpoint_path), read_texts(args.data, args.limit)
    judge = args.judge_path if any(variant.name == "judge" for variant in variants) else None
    dtype = run_dtype(args.precision, args.device)
    models = load_pair(
        args.checkpoint_path, args.draft_checkpoint_path, judge, args.device, dtype, schemes=schemes_of(args)
    )
    texts = encode_items(tokenizer, items, args.chat, models[0].args.vocab_size)
    context = models[0].args.max_position
    if too_long := [n for n, text in enumerate(texts, 1) if len(text.prompt) + len(text.ids) > context]:
        raise InputError(f"{args.data}: text {too_long[0]} is longer than the context of {context} tokens.")
    letters = passes(models, variants, texts, args, tokenizer.stop_ids)
    rows, paint = (
        summarise(letters, variants, args.speculate_k),
        Paint(sys.stdout, marks=not sys.stdout.isatty()),
    )
    if args.json:
        print(json.dumps({"data": str(args.data), "speculate_k": args.speculate_k, "rows": rows}))
        return rows
    for text, marked in list(zip(texts, letters))[: args.show]:
        for variant, mine in zip(variants, marked):
            print(f"{label(variant)}: {show(tokenizer, text, mine, paint)}\n")
    print(paint.legend if args.show else "", end="\n" if args.show else "")
    print("rule            tokens  passed  by the rule alone     m*")
    for row in rows:
        print(
            f"{row['rule']:15} {row['tokens']:6} {row['passed']:7.1%} {row['by_rule']:18.1%} "
            f"{row['mean_accepted']:6.2f}"
        )
    return rows


def show(tokenizer: Tokenizer, text: Encoded, letters: list[str], paint: Paint) -> str:
    """A text with each token coloured (or marked) by what lets it through."""
    decoder = Decoder(tokenizer)
    return (
        "".join(paint.token(decoder.push(id), letter) for id, letter in zip(text.ids, letters))
        + decoder.flush()
    )
