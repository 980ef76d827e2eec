"""The loosest threshold of a rule whose harm is bounded with confidence, on questions like those that will be
asked.

    python judge.py calibrate --verify judge --max_harm 0.02 --questions demo --limit 500 --seed 7 --compile
    python judge.py calibrate --verify kl --max_harm 0.02 --questions gsm8k.jsonl --checker number --out
    kl.json python judge.py calibrate --verify judge --max_false_accept 0.05 --data annotated.jsonl

Judge decoding gives up speculative decoding's promise of the target's own output. This gives another one
back: "with 95% confidence, at most 2% of questions like these are answered wrong because of the rule". Harm
is a question that plain decoding answers right and the rule wrong. An answer that --max_new_tokens cut off,
or whose logits are not finite, could have come to be right or wrong, and counts as whichever makes a harm: so
the bound also holds where more tokens may be put out, and no failure makes it better. Thresholds are walked
from the strictest to the loosest, each is tested with the exact binomial (Clopper-Pearson) bound, and the
walk stops at the first that fails: testing in a fixed order needs no correction for the number of thresholds
(Learn then Test, arXiv 2110.01052), whereas picking the best one afterwards would void the bound.

--max_false_accept is the cheap form, without generating: of the prompts whose labelled answers (--data) hold
a mistake, the share in which the judge alone would let a wrong token through.

For the judge the result goes into its file (or a copy of it, --out), for other rules into --out (JSON), which
generate.py --calibration reads. If no threshold qualifies, that is said, nothing is written, and the exit
code is 1. Answers are kept in --answers, and a killed run resumes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import run_script  # isort: skip  (first: from here on Ctrl-C is silent)


from scripts.lib.calibration import calibrate, parse_args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__)
    result = {}
    run_script("judge.py calibrate", lambda: result.update(calibrate(args)))
    if result["threshold"] is None:
        sys.exit(1)


if __name__ == "__main__":
    main()
