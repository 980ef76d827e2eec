"""Figures from result files, written as PNG beside each; the names are printed.

    python scripts/plot.py results.jsonl                   # of scripts/evaluate.py
    python scripts/plot.py benchmarks/latency_1b.json      # of benchmark.py or experiments.py

Of evaluate.py's results: accuracy against m* (NAME.pareto.png; a line joins the thresholds of a rule), how
many draft tokens the rounds accepted (NAME.accepted.png), and tokens a round and a second against M
(NAME.m_sweep.png) where a rule ran with several M, as in --verify judge@8,judge@16,judge@auto. Of
benchmark.py's: the time of a round by part.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

from pathlib import Path

from files import check_not_input, check_writable, parse_object, read_text
from scripts.lib.figures import RUN_FIGURES, draw, drawing, save
from scripts.lib.runs import MOST_RULES, read_run


def outputs_of(file: Path) -> list[Path]:
    """The figures of a result file, beside it."""
    if not file.name:
        raise InputError(f"{file} is a folder; name a result file.")
    names = [f".{name}.png" for name in RUN_FIGURES] if file.suffix == ".jsonl" else [".png"]
    return [file.with_name(file.stem + name) for name in names]


def draw_run(file: Path) -> list[Path]:
    """Draws what a results file of scripts/evaluate.py has figures for; returns the files written."""
    header, records = read_run(file)
    rules, written = {record["rule"] for record in records}, []
    if len(rules) > MOST_RULES:
        raise InputError(f"{file} holds answers by {len(rules)} rules; a figure can tell {MOST_RULES} apart.")
    caption = ", ".join(
        f"{name} {header[name]}" for name in ("questions", "precision", "device", "torch") if header.get(name)
    )
    n = len({record["index"] for record in records})
    with drawing():
        for make, path in zip(RUN_FIGURES.values(), outputs_of(file)):
            if figure := make(records):
                save(figure, path, f"n = {n}, {caption}")
                written.append(path)

    if not written:
        raise InputError(
            f"{file} has nothing to draw: no rule in it accepts draft tokens, as plain does not."
        )

    return written


def draw_result(file: Path) -> list[Path]:
    """Draws a .json file of scripts/experiments.py or scripts/benchmark.py; returns the file written."""
    text, written = read_text(file), outputs_of(file)
    try:
        draw(parse_object(text, "it"), *written)
    except InputError as error:
        if "matplotlib" in str(error) or str(written[0]) in str(error):
            raise
        raise InputError(
            f"{file} is not a result of experiments.py, benchmark.py or evaluate.py: {error}"
        ) from None
    return written


def draw_files(files: list[Path]) -> None:
    """Draws the figures of each result file beside it, and prints their names."""
    for output in (output for file in files for output in outputs_of(file)):
        check_writable(output, "The figure")
        check_not_input(output, files, "The figure")
    for file in files:
        print(*(draw_run(file) if file.suffix == ".jsonl" else draw_result(file)), sep="\n")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files", type=Path, nargs="+", help="results: .json of experiments or a benchmark, .jsonl of a run"
    )
    args = parser.parse_args(argv)
    run_script("plot.py", lambda: draw_files(args.files))


if __name__ == "__main__":
    main()
