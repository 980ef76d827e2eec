"""How much of a given text would pass verification: human text, or a stronger model's answers, as if it were
the draft.

    python scripts/score_text.py --data answers.jsonl --verify standard,judge --show 3 python
    scripts/score_text.py --data gpt.jsonl --checkpoint_path BIG --judge_path judge.safetensors --chat
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
from cli import Parser, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

from pathlib import Path

from scripts.lib.flags import add_engine_flags
from scripts.lib.scored_text import score
from scripts.lib.tasks import MOST


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines with prompt and response")
    add("--limit", type=whole(1, MOST), help="only so many texts (default: all)")
    add("--verify", default="standard,judge", help="rules; judge@8 with M = 8")
    add("--threshold", help="rule=number, ... (default: each rule's own)")
    add("--show", type=whole(0, MOST), default=0, help="print so many texts in colours")
    add("--json", action="store_true", help="print one JSON object")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    run_script("score_text.py", lambda: score(args))


if __name__ == "__main__":
    main()
