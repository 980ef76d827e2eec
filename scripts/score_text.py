"""How much of a given text would pass verification: human text, or a stronger model's answers, as if it were
the draft.

    python scripts/score_text.py --data answers.jsonl --verify standard,judge --show 3
    python scripts/score_text.py --data gpt.jsonl --checkpoint_path BIG --judge_path JUDGE --chat \\
        --verify judge

JSON lines with `prompt` and `response` (or `question` and `answer`); other fields are left alone. Judge
Decoding (arXiv 2501.19309) found that standard verification accepts about two tokens a round of even GPT-4o's
or a person's text: it asks whether the target would have said this. The text is read once; a token passes on
its own row's score or the row before's logits, as in the engine. m* is what rounds of M tokens would accept,
the token after a rejection being given.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
from itertools import islice
from pathlib import Path

from judge import RULES
from model import pick_device
from scripts.lib.acceptance import Letters, score_texts, summarise
from scripts.lib.answers import Encoded
from scripts.lib.bench import Variant, label, parse_rules, settings_for
from scripts.lib.flags import MOST_QUESTIONS, add_engine_flags, add_flags
from scripts.lib.pair import check_settings, name_models
from scripts.lib.public_tasks import json_lines
from scripts.lib.published import take_sampling
from scripts.lib.terminal import Paint
from tokenizer import Decoder, Tokenizer, load_tokenizer


def read_texts(path: Path, limit: int | None) -> list[dict]:
    """[{"prompt", "response", "errors": []}]. Raises InputError naming file, line and field."""
    items = []
    for where, item in islice(json_lines(path), limit):
        prompt, response = (
            next((item[name] for name in names if name in item), None)
            for names in (("prompt", "question"), ("response", "answer"))
        )
        if prompt is None or response is None:
            raise InputError(f"{where} must be an object with prompt and response (or question and answer).")
        if not isinstance(prompt, str) or not isinstance(response, str) or not response:
            raise InputError(f"{where}: prompt and response must be text, and the response not empty.")
        items.append({"prompt": prompt, "response": response, "errors": []})

    if not items:
        raise InputError(f"{path} holds no texts; give JSON lines with prompt and response.")
    return items


def check_args(args: argparse.Namespace) -> list[Variant]:
    """The rules to score by. Raises InputError for what cannot run, before anything is loaded."""
    variants = parse_rules(args.verify, args.threshold)
    name_models(args)
    take_sampling(args)
    if ahead := [variant.name for variant in variants if variant.name in RULES and RULES[variant.name].ahead]:
        raise InputError(
            f"--verify {ahead[0]} looks ahead within a round, and a text has no rounds; take another rule."
        )

    sizes = (args.speculate_k, *(variant.k for variant in variants))
    if any(variant.name not in RULES for variant in variants) or "auto" in sizes:
        raise InputError(f"--verify takes {', '.join(RULES)} here, and M is a number: the text is the draft.")

    for variant in variants:
        check_settings(settings_for(args, variant), True, args.judge_path is not None)
    args.device = pick_device(args.device)
    return variants


def coloured(tokenizer: Tokenizer, text: Encoded, letters: Letters, paint: Paint) -> str:
    """A text with each token coloured (or marked) by what lets it through."""
    decoder = Decoder(tokenizer)
    painted = (paint.token(decoder.push(token), letter) for token, letter in zip(text.ids, letters))
    return "".join(painted) + decoder.flush()


def print_table(rows: list[dict]) -> None:
    print("rule            tokens  passed  by the rule alone     m*")
    for row in rows:
        print(
            f"{row['rule']:15} {row['tokens']:6} {row['passed']:7.1%} "
            f"{row['by_rule']:18.1%} {row['mean_accepted']:6.2f}"
        )


def run(args: argparse.Namespace) -> None:
    """From a parsed command line to the table, or its JSON."""
    variants = check_args(args)
    tokenizer, items = load_tokenizer(args.checkpoint_path), read_texts(args.data, args.limit)
    texts, letters = score_texts(args, variants, tokenizer, items, str(args.data))
    rows = summarise(letters, variants, args.speculate_k)
    if args.json:
        print(json.dumps({"data": str(args.data), "speculate_k": args.speculate_k, "rows": rows}))
        return

    paint = Paint(sys.stdout, marks=not sys.stdout.isatty())
    for text, marked in list(zip(texts, letters))[: args.show]:
        for variant, mine in zip(variants, marked):
            print(f"{label(variant)}: {coloured(tokenizer, text, mine, paint)}\n")

    if args.show:
        print(paint.legend)
    print_table(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add_flags(
        parser,
        data={"help": "JSON lines with prompt and response"},
        limit={"help": "only so many texts (default: all)"},
    )
    add("--verify", default="standard,judge", help="rules; judge@8 with M = 8")
    add("--threshold", help="rule=number, ... (default: each rule's own)")
    add("--show", type=whole(0, MOST_QUESTIONS), default=0, help="print so many texts in colours")
    add_flags(parser, "json")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    run_script("score_text.py", lambda: run(args))


if __name__ == "__main__":
    main()
