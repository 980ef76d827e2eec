"""Figures from result files, written as PNG beside each; the names are printed.

    python scripts/plot.py results.jsonl                                        # of scripts/evaluate.py
    python scripts/plot.py benchmarks/latency_1b.json benchmarks/pareto.json    # of benchmark.py, of experiments.py

Of evaluate.py's results: accuracy against m* (NAME.pareto.png; a line joins the thresholds of a rule), how many draft
tokens the rounds accepted (NAME.accepted.png), and tokens a round and a second against M (NAME.m_sweep.png) where a rule
ran with several M, as in --verify judge@8,judge@16,judge@auto. Of benchmark.py's: the time of a round by part.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
import math
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path

from scripts.evaluate import summarise

FIELDS = {"rule": str, "index": (int, str), "family": str, "right": (bool, type(None)), "answer_right": (bool, type(None)),
          "question": str, "text": str, "tokens": list, "rounds": int, "drafted": int, "accepted": int,
          "accepted_by_rule": int, "seconds_decode": (int, float)}  # fmt: skip
PER_TOKEN = ("origin", "cuts", "p", "kl", "score", "top")  # in result lines, one entry a token; may be missing


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """The header and the answers of a results file of scripts/evaluate.py. A last line that was cut off is left out, with
    a note. Raises InputError naming file, line and field of whatever else is wrong."""
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}.") from None
    if rest and lines:
        print(f"{path}: the last line is cut off and left out; the same evaluate.py command goes on there.", file=sys.stderr)
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not valid JSON: {error}.") from None
    if not parsed or not isinstance(parsed[0], dict) or "target" not in parsed[0] or "rule" in parsed[0]:
        raise InputError(f"{path} is not a results file of scripts/evaluate.py: its first line is no header of a run.")
    seen = set()
    for number, record in enumerate(parsed[1:], 2):
        check_record(record, f"{path}, line {number}")
        if (record["rule"], record["index"]) in seen:
            raise InputError(f"{path}, line {number}: item {record['index']} was answered by {record['rule']} before.")
        seen.add((record["rule"], record["index"]))
    if not seen:
        raise InputError(f"{path} holds no answers yet; run scripts/evaluate.py with this --out.")
    return parsed[0], parsed[1:]


def check_record(record, where: str) -> None:
    """Raises InputError beginning with `where` for what scripts/evaluate.py did not write."""
    for name, kind in FIELDS.items():
        if not isinstance(record, dict) or name not in record or not isinstance(record[name], kind):
            raise InputError(f"{where}: field {name!r} is missing or of another type than scripts/evaluate.py writes.")
    n = len(record["tokens"])
    for name in PER_TOKEN:
        value = record.get(name)
        kind = str if name == "origin" else list
        if value is not None and (not isinstance(value, kind) or len(value) != n):
            raise InputError(f"{where}: field {name!r} must hold one entry for each of the {n} tokens.")
        good = (lambda x: x is None or isinstance(x, str)) if name == "top" else is_number
        if kind is list and not all(map(good, value or [])):
            raise InputError(f"{where}: field {name!r} holds what is no {'text' if name == 'top' else 'number'}.")
    if set(record.get("origin") or "") - set("artb"):
        raise InputError(f"{where}: field 'origin' must be of the letters a, r, t and b.")
    cuts = record.get("cuts")
    if cuts is not None and (not all(type(c) is int and c >= 0 for c in cuts) or sum(cuts) != len(record["text"])):
        raise InputError(f"{where}: field 'cuts' must be whole numbers that add up to the {len(record['text'])} characters.")
    try:
        ends = turn_ends(record)
    except (TypeError, KeyError):
        ends = []
    if ends[-1:] != [n]:
        raise InputError(f"{where}: field 'turns' must name new_tokens that add up to the {n} tokens.")


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def accepted_a_round(origin: str) -> list[int]:
    """How many draft tokens each round accepted: a round ends with the target's own token, t or b, or with the answer."""
    return [len(run) - 1 if run[-1] in "tb" else len(run) for run in re.findall("[ar]*[tb]|[ar]+$", origin)]


def new_figure(columns: int = 1):
    """A figure of `columns` axes side by side, without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("Figures need the package matplotlib; pip install -r requirements-dev.txt.") from None
    figure = Figure(figsize=(6.4 * columns, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def bars(axis, names: list[str], values: list[float], title: str, errors=None) -> None:
    """Horizontal bars with their values written beside them."""
    axis.barh(range(len(names)), values, xerr=errors, color="tab:blue", alpha=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    for i, value in enumerate(values):
        axis.text(value, i, f" {value:.3g}", va="center", fontsize=8)
    axis.set_title(title, fontsize=10)


def spread(rows: list[dict]) -> list[list[float]]:
    """95% intervals of the accuracies as matplotlib wants them, in percent."""
    return [[100 * abs(r["accuracy"] - r["interval"][side]) for r in rows] for side in (0, 1)]


def judge_table(result: dict):
    figure, axes = new_figure(3)
    rows = [row for row in result["rows"] if row["family"] == "both"]
    names = [row["rule"] for row in rows]
    bars(axes[0], names, [row["mean_accepted"] or 0 for row in rows], "m*, accepted tokens a round")
    bars(axes[1], names, [row["tokens_per_second"] for row in rows], "tokens/s")
    bars(axes[2], names, [100 * row["accuracy"] for row in rows], "right at every step, %", spread(rows))
    return figure


def m_sweep(result: dict):
    figure, axes = new_figure(2)
    for name in dict.fromkeys(row["name"] for row in result["rows"] if row["name"] != "plain"):
        rows = sorted((r for r in result["rows"] if r["name"] == name and r["k"] != "auto"), key=lambda row: row["k"])
        auto = [row for row in result["rows"] if row["name"] == name and row["k"] == "auto"]
        for axis, key in zip(axes, ("tokens_a_round", "tokens_per_second")):
            (line,) = axis.plot([row["k"] for row in rows], [row[key] for row in rows], marker="o", label=name)
            for row in auto:
                axis.axhline(row[key], color=line.get_color(), linestyle=":", label=f"{name}, auto")
    for axis, title in zip(axes, ("tokens a round", "tokens/s")):
        axis.set(xlabel="M, draft tokens a round", title=title, ylim=(0, None))
        axis.legend()
    return figure


def pareto(result: dict):
    figure, (axis,) = new_figure()
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name and row.get("accuracy") is not None]
        if name == "plain":
            axis.axhline(100 * rows[0]["accuracy"], color="grey", linestyle=":", label="plain")
            continue
        x, y = [row["mean_accepted"] for row in rows], [100 * row["accuracy"] for row in rows]
        axis.errorbar(x, y, yerr=spread(rows), marker="o", markersize=4, capsize=2, alpha=0.8, label=name)
    axis.set(xlabel="m*, accepted tokens a round", ylabel=result.get("measure", "right at every step, %"))
    axis.set_title(result["title"])
    axis.legend(fontsize=8)
    return figure


def equal_risk(result: dict):
    figure, axes = new_figure(2)
    rows = [row for row in result["rows"] if row.get("accuracy") is not None and row["name"] != "plain"]
    names = [row["rule"] for row in rows]
    bars(axes[0], names, [row["mean_accepted"] for row in rows], "m* at the same calibrated risk")
    bars(axes[1], names, [row["tokens_per_second"] for row in rows], "tokens/s")
    return figure


def other_text(result: dict):
    figure, (axis,) = new_figure()
    names = [f"{row['writer']}: {row['rule']}" for row in result["rows"]]
    bars(axis, names, [row["mean_accepted"] for row in result["rows"]], result["title"] + ": m*")
    return figure


def out_of_domain(result: dict):
    figure, axes = new_figure(2)
    rows = result["rows"]
    names = [f"{row['kind']} ({row['trained_on']}) on {row['tested_on']}" for row in rows]
    bars(axes[0], names, [-100 * row["difference"] for row in rows], "points lost to plain")
    bars(axes[1], names, [row["mean_accepted"] for row in rows], "m*")
    return figure


def self_correction(result: dict):
    figure, axes = new_figure(2)
    names = [f"{row['stopped']} ({row['n']})" for row in result["rows"]]
    bars(axes[0], names, [100 * row["at_once"] for row in result["rows"]], "taken back at once, %")
    bars(axes[1], names, [100 * row["right"] for row in result["rows"]], "right at every step in the end, %")
    return figure


def quantised(result: dict):
    figure, axes = new_figure(2)
    rows = result["rows"]
    names = [f"{row['mode']}, judge of {row['judge_trained_on']}" for row in rows]
    bars(axes[0], names, [100 * (row["perplexity"] / rows[0]["perplexity"] - 1) for row in rows], "perplexity, % more")
    bars(axes[1], names, [row["judge_m"] for row in rows], "m* of the judge")
    return figure


def by_delta(result: dict, key: str):
    """Accuracy against m*, a line for each value of `key`."""
    figure, (axis,) = new_figure()
    for name in dict.fromkeys(row[key] for row in result["rows"]):
        rows = [row for row in result["rows"] if row[key] == name]
        x, y = [row["mean_accepted"] for row in rows], [100 * row["difference"] for row in rows]
        axis.plot(x, y, marker="o", label=name)
    axis.set(xlabel="m*, accepted tokens a round", ylabel="points to plain", title=result["title"])
    axis.legend()
    return figure


def ablations(result: dict):
    figure, axes = new_figure(2)
    for axis, feature in zip(axes, (True, False)):
        rows = [row for row in result["rows"] if (row["what"] == "feature") == feature]
        title, errors = "AUC by feature" if feature else "AUC by pairs of answers", [1.96 * row["auc_error"] for row in rows]
        bars(axis, [row["name"] for row in rows], [row["auc"] for row in rows], title, errors)
        axis.set_xlim(min(row["auc"] for row in result["rows"]) - 0.1, 1.05)
    return figure


def rule_cost(result: dict):
    figure, (axis,) = new_figure()
    bars(
        axis, [row["rule"] for row in result["rows"]], [100 * row["added"] for row in result["rows"]], "% added to verification"
    )
    return figure


FIGURES = {
    "judge_table": judge_table, "m_sweep": m_sweep, "pareto": pareto, "equal_risk": equal_risk, "other_text": other_text,
    "out_of_domain": out_of_domain, "self_correction": self_correction, "ablations": ablations,
    "rule_cost": rule_cost, "quantised": quantised,
    "label_policies": lambda result: by_delta(result, "policy"), "autojudge": lambda result: by_delta(result, "head"),
}  # fmt: skip


def run_rows(records: list[dict]) -> list[dict]:
    """The summary rows of a run as the figures want them: with `name`, the rule without threshold and M, `k`, the M, and
    tokens a round."""
    rows = summarise(records, list(dict.fromkeys(record["rule"] for record in records)))
    for row in rows:
        k = next(record.get("speculate_k") for record in records if record["rule"] == row["rule"])
        row |= {"name": re.split("[=@]", row["rule"])[0], "k": k, "tokens_a_round": 1 + (row["mean_accepted"] or 0)}
    return rows


def turn_ends(record: dict) -> list[int]:
    """Up to which token each turn of an answer goes."""
    return list(accumulate(turn["new_tokens"] for turn in record.get("turns") or [])) or [len(record["tokens"])]


def accepted_counts(records: list[dict]) -> dict[str, Counter]:
    """For each rule that drafts: how many rounds accepted 0, 1, 2, ... draft tokens. Answers without `origin` are left out."""
    counts: dict[str, Counter] = {}
    for record in records:
        if record["drafted"] and record.get("origin"):
            ends = turn_ends(record)
            for begin, end in zip([0, *ends], ends):
                counts.setdefault(record["rule"], Counter()).update(accepted_a_round(record["origin"][begin:end]))
    return counts


def run_pareto(records: list[dict]):
    rows = [row for row in run_rows(records) if row["mean_accepted"] is not None or row["name"] == "plain"]
    result = {"rows": rows, "title": "accuracy against accepted tokens", "measure": "right, %"}
    return pareto(result) if any(row["accuracy"] is not None and row["name"] != "plain" for row in rows) else None


def run_m_sweep(records: list[dict]):
    """Of the rules that ran with several M at the same threshold."""
    rows = [row | {"name": row["rule"].partition("@")[0]} for row in run_rows(records) if row["mean_accepted"] is not None]
    several = [row for row in rows if sum(other["name"] == row["name"] for other in rows) > 1]
    return m_sweep({"rows": several}) if several else None


def run_accepted(records: list[dict]):
    counts = accepted_counts(records)
    if not counts:
        return None
    figure, (axis,) = new_figure()
    for number, (rule, found) in enumerate(counts.items()):
        rounds, most = found.total(), max(found)
        mean = sum(n * times for n, times in found.items()) / rounds
        shares = [100 * found[n] / rounds for n in range(most + 1)]
        axis.plot(range(most + 1), shares, marker="os^vDPX*"[number % 8], markersize=4, alpha=0.8,
                  label=f"{rule}: m* {mean:.2f}, {rounds} rounds")  # fmt: skip
    axis.set(xlabel="draft tokens that a round accepted", ylabel="rounds, %", ylim=(0, None))
    axis.set_title("accepted tokens a round (the answer's end cuts its last round)", fontsize=10)
    axis.legend(fontsize=8)
    return figure


RUN_FIGURES = {"pareto": run_pareto, "accepted": run_accepted, "m_sweep": run_m_sweep}


def round_parts(result: dict):
    """Of a result of benchmark.py, for each M and position: the plain step, the draft loop with the verification after
    it, each timed alone, and the round as a whole, with what 80% of its repeats lie between."""
    parts = {row["part"]: row for row in result["rows"]}
    rounds = [(name, *m.groups()) for name in parts if (m := re.fullmatch(r"round, M = (\d+) at (\d+)", name))]
    if not rounds:
        raise InputError("This result of scripts/benchmark.py holds no rounds; there is nothing to draw.")
    figure, axes = new_figure(len(rounds))
    for axis, (name, m, at) in zip(axes, rounds):
        shown = [("plain step", [("the target, 1 row", f"plain step at {at}")]),
                ("draft loop, verification", [(f"draft loop, {m} tokens", f"draft loop, M = {m} at {at}"),
                                              (f"verification, {int(m) + 1} rows", f"verify {int(m) + 1} rows at {at}")]),
                ("round", [("round as a whole", name)])]  # fmt: skip
        for place, (_, pieces) in enumerate(shown):
            left = 0.0
            for label, part in pieces:
                if part not in parts:
                    continue
                ms = parts[part]["ms"]
                errors = [[ms - parts[part]["ms_p10"]], [parts[part]["ms_p90"] - ms]]
                axis.barh(place, ms, left=left, xerr=errors, capsize=2, alpha=0.8, label=f"{label}: {ms:.3g} ms")
                left += ms
        axis.set_yticks(range(len(shown)), [bar for bar, _ in shown])
        axis.invert_yaxis()
        axis.set(xlabel="ms, median; 10% to 90%", title=f"M = {m}, at position {at}")
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def save(figure, path: Path, caption: str) -> None:
    """Writes the PNG, beside and renamed."""
    figure.suptitle(caption, fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.stem + ".tmp.png")
    figure.savefig(beside, dpi=110, metadata={"Software": None})
    beside.replace(path)


def draw(result: dict, path: Path) -> None:
    """Draws a result of scripts/experiments.py or scripts/benchmark.py."""
    if "name" not in result and any("part" in row for row in result.get("rows", [])):
        imposed = result.get("imposed_acceptance")
        caption = "" if imposed is None else f", imposed acceptance of {imposed}"
        save(round_parts(result), path, f"{result['machine']}, commit {result['commit']}, {result['dtype']}{caption}")
        return
    if result.get("name") not in FIGURES:
        raise InputError(f"There is no figure for {result.get('name')!r}; known are {', '.join(FIGURES)}.")
    save(FIGURES[result["name"]](result), path, f"n {result['n']}, {result['machine']}, commit {result['commit']}")


def draw_run(file: Path) -> list[Path]:
    """Draws what a results file of scripts/evaluate.py has figures for; returns the files written."""
    header, records = read_run(file)
    n, written = len({record["index"] for record in records}), []
    caption = ", ".join(f"{name} {header[name]}" for name in ("questions", "precision", "device", "torch") if header.get(name))
    for name, make in RUN_FIGURES.items():
        if figure := make(records):
            written.append(file.with_suffix(f".{name}.png"))
            save(figure, written[-1], f"n {n}, {caption}")
    if not written:
        raise InputError(f"{file} has nothing to draw: no rule in it accepts draft tokens, as plain does not.")
    return written


def draw_files(files: list[Path]) -> None:
    """Draws the figures of each result file beside it, and prints their names."""
    for file in files:
        try:
            written = draw_run(file) if file.suffix == ".jsonl" else [file.with_suffix(".png")]
            if file.suffix != ".jsonl":
                draw(json.loads(file.read_text(encoding="utf-8")), *written)
            print(*written, sep="\n")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is not a result of experiments.py, benchmark.py or evaluate.py ({error}).") from None


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="results: .json of experiments or a benchmark, .jsonl of a run")
    args = parser.parse_args(argv)
    run_script("plot.py", lambda: draw_files(args.files))


if __name__ == "__main__":
    main()
