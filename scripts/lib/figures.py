"""The figures of experiments, of benchmark.py and of runs."""

import re
import textwrap
import warnings
from pathlib import Path

from cli import InputError, one_line
from files import replacing
from scripts.lib.fields import is_count, is_figure, is_interval, is_share, is_text, maybe
from scripts.lib.runs import accepted_counts, range_of, run_rows


def new_figure(columns: int = 1, rows: int = 1, height: float = 4.4):
    """A figure of `rows` by `columns` axes, without a display; the axes one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns if rows == 1 else 4.2 * columns, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def shown(value: float | None) -> str:
    """A number to three or more places, without powers of ten."""
    if not value:
        return "-" if value is None else "0"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def in_words(rule: str) -> str:
    """A rule's label, as judge=0.8@16, in words."""
    name, _, k = rule.partition("@")
    name, _, threshold = name.partition("=")
    return name + f", threshold {threshold}" * bool(threshold) + f", M = {k}" * bool(k)


def bars(
    axis, names: list[str], values: list[float | None], title: str, label: str, *, errors=None, most=None
) -> None:
    """Horizontal bars with their values in a column at the right, where no axis cuts them. most: what can be
    at all."""
    axis.barh(range(len(names)), [value or 0 for value in values], color="tab:blue", alpha=0.8, label=label)
    if errors is not None:
        axis.errorbar(
            [value or 0 for value in values],
            range(len(names)),
            xerr=errors,
            fmt="none",
            ecolor="black",
            capsize=2,
            label="95% interval",
        )

    axis.set_yticks(range(len(names)), [one_line(name)[:60] for name in names])
    axis.invert_yaxis()
    for i, value in enumerate(values):
        axis.text(1.01, i, shown(value), va="center", fontsize=8, transform=axis.get_yaxis_transform())
    axis.set_title(title, fontsize=10)
    axis.set_xlim(right=most)


def shared_legend(figure) -> None:
    """One legend for all axes, below them, each entry once."""
    pairs = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels())]
    entries = {label: handle for handle, label in reversed(pairs)}
    names = list(dict.fromkeys(label for _, label in pairs))
    figure.legend(
        [entries[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(4, len(names)),
        fontsize=8,
    )


def spread(rows: list[dict]) -> list[list[float]]:
    """95% intervals of the accuracies as matplotlib wants them, in percent."""
    return [
        [100 * abs(r["accuracy"] - r["interval"][side]) if r.get("interval") else 0 for r in rows]
        for side in (0, 1)
    ]


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


M_STAR = "m*, accepted draft tokens a round"


def bar_figure(names: list[str], label: str, *columns: tuple):
    """Bars of the same rows in axes side by side. columns: (title, values), and a third where `bars` is to
    know more."""
    figure, axes = new_figure(len(columns), height=max(4.4, 0.3 * len(names) + 1.5))
    for axis, (title, values, *more) in zip(axes, columns):
        bars(axis, names, values, title, label, **(more[0] if more else {}))
    shared_legend(figure)
    return figure


def column(rows: list[dict], key: str) -> list[float | None]:
    return [row[key] for row in rows]


def judge_table(result: dict):
    rows = [row for row in result["rows"] if row["family"] == "both"]
    right = [percent(row["accuracy"]) for row in rows]
    return bar_figure(
        [in_words(row["rule"]) for row in rows],
        "all answers together",
        (M_STAR, column(rows, "mean_accepted")),
        ("tokens a second", column(rows, "tokens_per_second")),
        ("right at every step, %", right, {"errors": spread(rows), "most": 100}),
    )


def m_sweep(result: dict):
    figure, axes = new_figure(2)
    for name in dict.fromkeys(row["name"] for row in result["rows"] if row["name"] != "plain"):
        rows = sorted(
            (r for r in result["rows"] if r["name"] == name and is_count(r["k"])), key=lambda row: row["k"]
        )
        auto = [row for row in result["rows"] if row["name"] == name and row["k"] == "auto"]
        for axis, key in zip(axes, ("tokens_a_round", "tokens_per_second")):
            (line,) = axis.plot(
                [row["k"] for row in rows], [row[key] for row in rows], marker="o", label=name
            )
            for row in auto:
                axis.axhline(row[key], color=line.get_color(), linestyle=":", label=f"{name}, auto")

    titles = "tokens a round, the target's own among them", "tokens a second"
    for axis, title in zip(axes, titles):
        axis.set(xlabel="M, draft tokens a round (auto: chosen round by round)", title=title, ylim=(0, None))
        axis.legend()

    return figure


def name_points(
    axis, rows: list[dict], x: list[float], y: list[float], span: tuple[float, float], *, colour="black"
) -> None:
    """Writes each point's threshold beside it, and of points that follow one another closely the first and
    the last. span: of the axes."""
    groups: list[list[int]] = []
    for number, row in enumerate(rows):
        if row.get("threshold") is None:
            continue
        last = groups[-1][-1] if groups else None
        near = (
            last is not None
            and abs(x[number] - x[last]) < 0.05 * span[0]
            and abs(y[number] - y[last]) < 0.06 * span[1]
        )
        groups[-1].append(number) if near else groups.append([number])

    for place, group in enumerate(groups):
        left = x[group[0]] < span[0] / 2
        text = " to ".join(
            f"{rows[number]['threshold']:g}" for number in dict.fromkeys((group[0], group[-1]))
        )
        axis.annotate(
            text,
            (x[group[0]], y[group[0]]),
            fontsize=7,
            textcoords="offset points",
            color=colour,
            ha="left" if left else "right",
            xytext=(4 if left else -4, -20 if place % 2 else -11),
        )


def draw_rule(axis, mine: list[dict], others: list[dict], span: tuple[float, float], number: int) -> None:
    """A rule's points, named by their thresholds, before those of the others, where it has an axis alone."""
    name, label, colour = mine[0]["name"], mine[0]["name"], f"C{number % 10}"
    if others:
        x, y = column(others, "mean_accepted"), [100 * row["accuracy"] for row in others]
        axis.plot(x, y, ".", color="lightgrey", label="the other rules", zorder=0)
        axis.set_title(name, fontsize=10)
        label, colour = "the rule; line: 95% interval; number: its threshold", "tab:blue"
    x, y = column(mine, "mean_accepted"), [100 * row["accuracy"] for row in mine]
    style = {"marker": "o", "markersize": 4, "capsize": 2, "alpha": 0.8}
    axis.errorbar(x, y, yerr=spread(mine), color=colour, label=label, **style)
    name_points(axis, mine, x, y, span)


def pareto(result: dict):
    """Accuracy against m*: one axis, or with more than three rules an axis each, the others in grey."""
    rows = [row for row in result["rows"] if row.get("accuracy") is not None]
    plain = next((row for row in rows if row["name"] == "plain"), None)
    rows = [row for row in rows if row["name"] != "plain" and row["mean_accepted"] is not None]
    names = list(dict.fromkeys(row["name"] for row in rows))
    if not names:
        raise InputError("No rule in it that drafts has an accuracy; there is nothing to draw.")

    span = max(row["mean_accepted"] for row in rows), 100 * (1 - min(row["accuracy"] for row in rows))
    together, columns = len(names) <= 3, min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = new_figure() if together else new_figure(columns, lines, 3.2 * lines + 0.8)
    for number, name in enumerate(names):
        axis = axes[0 if together else number]
        mine, others = [row for row in rows if row["name"] == name], []
        if not together:
            others = [row for row in rows if row["name"] != name]
        draw_rule(axis, mine, others, span, number)

    used = 1 if together else len(names)
    for axis in axes[:used]:
        if plain is not None:
            axis.axhline(100 * plain["accuracy"], color="grey", linestyle=":", label="plain")
        axis.set(xlim=(0, 1.1 * span[0] or 1), ylim=(None if together else 99 - 1.3 * span[1], 101))
        axis.set_xlabel(M_STAR, fontsize=10 if together else 8)
        axis.set_ylabel(result.get("measure", "right at every step, %"), fontsize=10 if together else 8)

    for axis in axes[used:]:
        axis.remove()
    if together:
        axes[0].set_title(result["title"] + "; line: 95% interval, number: threshold", fontsize=10)
        axes[0].legend(fontsize=8)
    else:
        shared_legend(figure)

    return figure


def equal_risk(result: dict):
    rows = [row for row in result["rows"] if row.get("accuracy") is not None and row["name"] != "plain"]
    return bar_figure(
        [in_words(row["rule"]) for row in rows],
        "each rule at the threshold that calibration allows",
        (M_STAR, column(rows, "mean_accepted")),
        ("tokens a second", column(rows, "tokens_per_second")),
    )


def other_text(result: dict):
    rows = result["rows"]
    names = [f"{row['writer']}: {in_words(row['rule'])}" for row in rows]
    return bar_figure(names, M_STAR, (result["title"], column(rows, "mean_accepted")))


def out_of_domain(result: dict):
    rows = result["rows"]
    lost = [None if row["difference"] is None else -100 * row["difference"] for row in rows]
    return bar_figure(
        [f"{row['kind']} ({row['trained_on']}) on {row['tested_on']}" for row in rows],
        "the rule (and the family that it was trained on) on a family",
        ("right answers lost to plain, points", lost),
        (M_STAR, column(rows, "mean_accepted")),
    )


def self_correction(result: dict):
    rows, most = result["rows"], {"most": 100}
    return bar_figure(
        [f"{row['stopped']} ({row['n']})" for row in rows],
        "share of the answers, whose number is in brackets",
        ("wrong span taken back at once, %", [percent(row["at_once"]) for row in rows], most),
        ("right at every step in the end, %", [percent(row["right"]) for row in rows], most),
    )


def quantised(result: dict):
    rows = result["rows"]
    base = rows[0]["perplexity"]
    more = [
        100 * (row["perplexity"] / base - 1) if base and row["perplexity"] is not None else None
        for row in rows
    ]
    return bar_figure(
        [f"{row['mode']}, judge of {row['judge_trained_on']}" for row in rows],
        "the target's weights, and what the judge was trained on",
        ("perplexity against unquantised, % more", more),
        (f"{M_STAR}, by the judge", column(rows, "judge_m")),
    )


def rule_cost(result: dict):
    rows = result["rows"]
    return bar_figure(
        [in_words(row["rule"]) for row in rows],
        "beside verification by the rule standard",
        ("% added to the time of a verification", [percent(row["added"]) for row in rows]),
    )


def threshold_of(rule: str) -> float | None:
    """The threshold in a rule's label."""
    found = re.search(r"=(-?[0-9.]{1,12}(?:e-?[0-9]{1,2})?)(?:@|$)", rule)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None


def by_delta(result: dict, key: str):
    """Accuracy against m*, a line for each value of `key`."""
    figure, (axis,) = new_figure()
    for name in dict.fromkeys(row[key] for row in result["rows"]):
        rows = [
            row
            for row in result["rows"]
            if row[key] == name and None not in (row["mean_accepted"], row["difference"])
        ]
        rows = [row | {"threshold": threshold_of(row["rule"])} for row in rows]
        x, y = [row["mean_accepted"] for row in rows], [100 * row["difference"] for row in rows]
        (line,) = axis.plot(x, y, marker="o", label=name)
        name_points(
            axis,
            rows,
            x,
            y,
            (max(x, default=1), max(y, default=0) - min(y, default=0)),
            colour=line.get_color(),
        )

    axis.set(xlabel=M_STAR, ylabel="right answers against plain, points")
    axis.margins(0.12)
    axis.set_title(result["title"] + "; number: threshold", fontsize=10)
    axis.legend()
    return figure


def ablations(result: dict):
    figure, axes = new_figure(2)
    known = [row for row in result["rows"] if row["auc"] is not None]
    for axis, feature in zip(axes, (True, False)):
        rows = [row for row in known if (row["what"] == "feature") == feature]
        title = (
            "area under the ROC curve, by feature"
            if feature
            else "area under the ROC curve, by pairs of answers"
        )
        widths = [1.96 * (row["auc_error"] or 0) for row in rows]
        errors = [widths, [min(width, max(1 - row["auc"], 0)) for width, row in zip(widths, rows)]]
        bars(
            axis,
            [row["name"] for row in rows],
            [row["auc"] for row in rows],
            title,
            "of held-out tokens",
            errors=errors,
        )
        axis.set_xlim(max(0, min((row["auc"] for row in known), default=0) - 0.05), 1)

    shared_legend(figure)
    return figure


FIGURES = {
    "judge_table": judge_table,
    "m_sweep": m_sweep,
    "pareto": pareto,
    "equal_risk": equal_risk,
    "other_text": other_text,
    "out_of_domain": out_of_domain,
    "self_correction": self_correction,
    "ablations": ablations,
    "rule_cost": rule_cost,
    "quantised": quantised,
    "label_policies": lambda result: by_delta(result, "policy"),
    "autojudge": lambda result: by_delta(result, "head"),
}
SPEED = {"mean_accepted": maybe(is_figure), "tokens_per_second": is_figure}
SCORED = {"accuracy": maybe(is_share), "interval": maybe(is_interval)}
CHANGE = {"rule": is_text, "mean_accepted": maybe(is_figure), "difference": maybe(is_figure)}
ROW_FIELDS = {  # what a figure needs of each row
    "judge_table": {"rule": is_text, "family": is_text} | SPEED | SCORED,
    "m_sweep": {
        "name": is_text,
        "k": lambda value: value in (None, "auto") or is_count(value),
        "tokens_a_round": is_figure,
        "tokens_per_second": is_figure,
    },
    "pareto": {"name": is_text, "mean_accepted": maybe(is_figure), "threshold": maybe(is_figure)} | SCORED,
    "equal_risk": {"name": is_text, "rule": is_text} | dict.fromkeys(SPEED, maybe(is_figure)) | SCORED,
    "other_text": {"writer": is_text, "rule": is_text, "mean_accepted": maybe(is_figure)},
    "out_of_domain": {"kind": is_text, "trained_on": is_text, "tested_on": is_text} | CHANGE,
    "self_correction": {
        "stopped": is_text,
        "n": is_count,
        "at_once": maybe(is_share),
        "right": maybe(is_share),
    },
    "quantised": {
        "mode": is_text,
        "judge_trained_on": is_text,
        "perplexity": maybe(is_figure),
        "judge_m": maybe(is_figure),
    },
    "ablations": {
        "what": is_text,
        "name": lambda value: is_text(value) or is_count(value),
        "auc": maybe(is_share),
        "auc_error": maybe(is_figure),
    },
    "rule_cost": {"rule": is_text, "added": maybe(is_figure)},
    "label_policies": {"policy": is_text} | CHANGE,
    "autojudge": {"head": is_text} | CHANGE,
    "": {
        "part": is_text,
        "ms": lambda value: is_figure(value) and value > 0,
        # of benchmark.py
        **dict.fromkeys(("ms_p10", "ms_p90", "ms_min", "ms_max", "ms_p25", "ms_p75"), maybe(is_figure)),
    },
}


def check_result(result: dict, name: str) -> None:
    """Raises InputError for a result that a figure cannot be drawn of, naming row and field. name: in
    ROW_FIELDS."""
    texts = {"machine": is_text, "commit": is_text} | (
        {"title": is_text, "n": is_figure} if name else {"dtype": is_text}
    )
    for field, good in texts.items():
        if not good(result.get(field)):
            raise InputError(f"field {field!r} is missing or of another type than is written.")

    rows = result.get("rows")
    if not isinstance(rows, list) or not 0 < len(rows) <= 1000:
        raise InputError("field 'rows' must be a list of 1 to 1000 rows.")
    for number, row in enumerate(rows, 1):
        for field, good in ROW_FIELDS[name].items():
            if not isinstance(row, dict) or not good(row.get(field)):
                raise InputError(
                    f"row {number}: field {field!r} is missing or of another type than is written."
                )


def run_pareto(records: list[dict]):
    rows = [row for row in run_rows(records) if row["mean_accepted"] is not None or row["name"] == "plain"]
    result = {"rows": rows, "title": "accuracy against accepted tokens", "measure": "right, %"}
    return (
        pareto(result)
        if any(row["accuracy"] is not None and row["name"] != "plain" for row in rows)
        else None
    )


def run_m_sweep(records: list[dict]):
    """Of the rules that ran with several M at the same threshold."""
    rows = [
        row | {"name": row["rule"].partition("@")[0]}
        for row in run_rows(records)
        if row["mean_accepted"] is not None
    ]
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
    axis.set_title("m* is their mean; the answer's end cuts its last round", fontsize=10)
    axis.legend(fontsize=8)
    return figure


RUN_FIGURES = {"pareto": run_pareto, "accepted": run_accepted, "m_sweep": run_m_sweep}


def stack(axis, place: int, pieces: list[tuple[str, dict]]) -> None:
    """One bar of a report's rows, one after the other."""
    left = 0.0
    for label, row in pieces:
        ms, (low, high) = row["ms"], range_of(row)
        errors = [[max(ms - low, 0)], [max(high - ms, 0)]]
        axis.barh(place, ms, left=left, xerr=errors, capsize=2, alpha=0.8, label=f"{label}: {shown(ms)} ms")
        left += ms


def round_parts(result: dict):
    """Of a result of benchmark.py, for each M and position: the plain step, the draft loop with the
    verification after it, each timed alone, and the round as a whole, with what its times lie between."""
    parts = {row["part"]: row for row in result["rows"]}
    rounds = [
        (name, *m.groups())
        for name in parts
        if (m := re.fullmatch("round, M = ([0-9]{1,9}) at ([0-9]{1,9})", name))
    ]
    if not rounds:
        raise InputError("This result of scripts/benchmark.py holds no rounds; there is nothing to draw.")

    words = {"ms_p25": "25% to 75%", "ms_min": "least to most"}
    between = next((words[key] for key in words if key in parts[rounds[0][0]]), "10% to 90%")
    figure, axes = new_figure(len(rounds))
    for axis, (name, m, at) in zip(axes, rounds):
        shown_bars = {
            "plain step": [("the target, 1 row", f"plain step at {at}")],
            "draft loop, verification": [
                (f"draft loop, {m} tokens", f"draft loop, M = {m} at {at}"),
                (f"verification, {int(m) + 1} rows", f"verify {int(m) + 1} rows at {at}"),
            ],
            "round": [("round as a whole", name)],
        }
        for place, pieces in enumerate(shown_bars.values()):
            stack(axis, place, [(label, parts[part]) for label, part in pieces if part in parts])
        axis.set_yticks(range(len(shown_bars)), list(shown_bars))
        axis.invert_yaxis()
        axis.set(xlabel=f"milliseconds, median; line: {between} of the times")
        axis.set_title(f"a round of {m} draft tokens (M), at position {at}", fontsize=10)
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))

    return figure


def save(figure, path: Path, caption: str) -> None:
    """Writes the PNG, beside and renamed."""
    # matplotlib's wrap reads $ as a formula
    lines = textwrap.fill(one_line(caption)[:400], int(17 * figure.get_figwidth()))
    figure.suptitle(lines, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is a box
        figure.savefig(fresh, format="png", dpi=110, metadata={"Software": None})


def drawing():
    """A context in which matplotlib takes every text as it is: $ begins no formula. Raises InputError without
    matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        raise InputError(
            "Figures need the package matplotlib; pip install -r requirements-dev.txt."
        ) from None
    return matplotlib.rc_context({"text.parse_math": False})


def draw(result: dict, path: Path) -> None:
    """Draws a result of scripts/experiments.py or scripts/benchmark.py. Raises InputError naming the field
    that is wrong."""
    name, rows = result.get("name"), result.get("rows")
    measured = (
        "name" not in result
        and isinstance(rows, list)
        and any(isinstance(row, dict) and "part" in row for row in rows)
    )
    if not measured and (not isinstance(name, str) or name not in FIGURES):
        raise InputError(
            f"There is no figure for {one_line(repr(name))[:60]}; known are {', '.join(FIGURES)}."
        )

    check_result(result, "" if measured else name)
    if measured:
        imposed = result.get("imposed_acceptance")
        caption = f"{result['machine']}, commit {result['commit']}, {result['dtype']}"
        caption += "" if imposed is None else f", imposed acceptance of {imposed}"
    else:
        caption = f"n = {result['n']}, {result['machine']}, commit {result['commit']}"

    with drawing():
        save(round_parts(result) if measured else FIGURES[name](result), path, caption)
