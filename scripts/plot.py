"""Figures from the result files of scripts/experiments.py.

python scripts/plot.py benchmarks/pareto.json benchmarks/m_sweep.json       # writes the PNG beside each
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import InputError, Parser, run_script


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
    for name in ("standard", "judge"):
        rows = [row for row in result["rows"] if row["name"] == name and row["k"] != "auto"]
        auto = next(row for row in result["rows"] if row["name"] == name and row["k"] == "auto")
        for axis, key in zip(axes, ("tokens_a_round", "tokens_per_second")):
            (line,) = axis.plot([row["k"] for row in rows], [row[key] for row in rows], marker="o", label=name)
            axis.axhline(auto[key], color=line.get_color(), linestyle=":", label=f"{name}, auto")
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
    axis.set(xlabel="m*, accepted tokens a round", ylabel="right at every step, %", title=result["title"])
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
    "rule_cost": rule_cost,
    "label_policies": lambda result: by_delta(result, "policy"), "autojudge": lambda result: by_delta(result, "head"),
}  # fmt: skip


def draw(result: dict, path: Path) -> None:
    """Draws a result of scripts/experiments.py and writes the PNG, beside and renamed."""
    if result.get("name") not in FIGURES:
        raise InputError(f"There is no figure for {result.get('name')!r}; known are {', '.join(FIGURES)}.")
    figure = FIGURES[result["name"]](result)
    figure.suptitle(f"n {result['n']}, {result['machine']}, commit {result['commit']}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.stem + ".tmp.png")
    figure.savefig(beside, dpi=110, metadata={"Software": None})
    beside.replace(path)


def draw_files(files: list[Path]) -> None:
    """Draws the figure of each result file beside it."""
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            draw(result, file.with_suffix(".png"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is not a result of scripts/experiments.py ({error}).") from None


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="results, JSON")
    args = parser.parse_args(argv)
    run_script("plot.py", lambda: draw_files(args.files))


if __name__ == "__main__":
    main()
