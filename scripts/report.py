"""One page about a run of scripts/evaluate.py: tables, figures, and every answer coloured by who accepted its
tokens.

    python scripts/evaluate.py --limit 500 --verify plain,standard,judge --details --out results.jsonl
    python scripts/report.py results.jsonl --out report.html

The page is one file that needs nothing else, and asks no network for anything. Its view is in its address, so
that it can be linked: report.html#rule=judge&wrong=1&only=rule shows the judge's wrong answers that hold
tokens which the rule alone let through; right=1, lost=1 (wrong, but right by plain), q=text, item=INDEX,
at=TOKEN, sort=p|score|kl|place, all=1 (beside the other rules' answers) and view=spot|answers|figures|summary
are known, too. Without --details it says what is missing.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import Parser, one_line, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import base64
import hashlib
import html
import json
import math
import re
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from files import check_not_input, check_writable, write_file
from scripts.lib.flags import add_flags
from scripts.lib.runs import accepted_counts, read_run, run_rows, turn_ends

HERE = Path(__file__).resolve().parent
SHAPES = (  # of points and in tables, so that nothing depends on colour; drawn around 0, 0
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0",
    "M-4-4H4V4H-4Z",
    "M0-5L5 4H-5Z",
    "M0-5.5L4.5 0L0 5.5L-4.5 0Z",
    "M-5-4H5L0 5Z",
    "M-5-1.5H-1.5V-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5Z",
    "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
)
COLOURS = 7  # --c0 to --c6 of the page
ORIGINS = {
    "a": "accepted draft tokens",
    "r": "by the rule alone",
    "t": "the target's own",
    "b": "own, after full acceptance",
}
NAMES = {  # of a header's fields, where its own word does not say it
    "data": "questions, sha256",
    "shots": "examples before each question",
    "shots_data": "examples, sha256",
    "seed": "seed of the questions",
    "samples": "answers a question",
    "target": "target's fingerprint",
    "draft": "draft's fingerprint",
    "judge": "judge's sha256",
    "speculate_k": "M, draft tokens a round",
    "top_k": "sampled from the most likely",
    "top_p": "sampled from those that reach",
    "min_p": "sampled above this share of the largest",
    "min_prob": "floor under the rule",
    "max_new_tokens": "longest answer, tokens",
    "precision": "number type",
    "mode": "target's weights",
    "draft_mode": "draft's weights",
    "compile": "compiled",
    "details": "figures of each token",
}
COLUMNS = (
    "m*: draft tokens accepted a round, without the target's own token. By the rule alone: the share of all "
    "tokens that the target would not have said. Points to plain: on the same questions; lost are right by "
    "plain and wrong by the rule, won the other way."
)
MADE = ("command", "date", "time", "machine", "commit")  # how a run was made: first, where the header says it


def small(place: str, body: str) -> str:
    """A drawing beside a name. place: its viewBox."""
    return f'<svg class="mark" viewBox="{place}" aria-hidden="true">{body}</svg>'


def fill(rule: int) -> str:
    return f"fill:var(--c{rule % COLOURS})"


def mark(rule: int) -> str:
    """The shape of a rule."""
    return small("-6 -6 12 12", f'<path d="{SHAPES[rule % len(SHAPES)]}" style="{fill(rule)}"/>')


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def cells_of(row: dict, threshold: float | None) -> dict[str, str | None]:
    """A row of the summary: heading -> what stands below it."""
    right = difference = changed = None
    if row["accuracy"] is not None:
        right = (
            f"{percent(row['accuracy'])} ({' to '.join(f'{100 * share:.1f}' for share in row['interval'])})"
        )

    if row.get("difference") is not None:
        low, high = (100 * x for x in row["difference_interval"])
        difference = f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        changed = f"{row['lost']} / {row['won']}" if "lost" in row else None

    drafts = row["mean_accepted"] is not None
    return {
        "threshold": None if threshold is None else f"{threshold:g}",
        "M, draft tokens a round": str(row["k"]) if drafts else None,
        "questions": str(row["n"]),
        "right (95% interval)": right,
        **{key: percent(row[key]) for key in row if key.startswith("pass@")},
        "points to plain (95%)": difference,
        "lost / won": changed,
        "m*, accepted a round": f"{row['mean_accepted']:.2f}" if drafts else None,
        "by the rule alone": percent(row["by_rule_share"]) if drafts else None,
        "tokens a second": f"{row['tokens_per_second']:.1f}",
        "speed, × plain": f"{row['ratio']:.2f}" if row["ratio"] else None,
    }


def summary_table(rows: list[dict], records: list[dict]) -> str:
    """The summary, a row a rule."""
    threshold = {record["rule"]: record.get("threshold") for record in records}
    table = [cells_of(row, threshold[row["rule"]]) for row in rows]
    names, lines = dict.fromkeys(name for cells in table for name in cells), []
    for number, (row, cells) in enumerate(zip(rows, table)):
        line = "".join(f'<td class="n">{html.escape(cells.get(name) or "-")}</td>' for name in names)
        lines.append(f"<tr><th>{mark(number)} {html.escape(row['rule'])}</th>{line}</tr>")
    heads = "".join(f'<th class="n">{name}</th>' for name in names)
    table = f"<table><thead><tr><th>rule</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide">{table}</div><p class="soft">{COLUMNS}</p>'


def settings_list(header: dict, written: float) -> str:
    """How the run was made and its settings, a term and its value each. written: when its file was last
    written, in s since 1970, which stands for the date where the header has none."""
    made = {name: header[name] for name in MADE if header.get(name)}
    if not {"date", "time"} & made.keys():
        made["file last written"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    missing = [name for name in ("command", "machine", "commit") if name not in made]
    pairs = {name: value for name, value in (made | header).items() if value not in (None, False)}
    texts = {name: value if isinstance(value, str) else "yes" if value is True else json.dumps(value)
             for name, value in pairs.items()}  # fmt: skip
    shown = [(NAMES.get(name, name.replace("_", " ")), text) for name, text in texts.items()]
    note = f'<p class="soft">The results file does not say: {", ".join(missing)}.</p>' if missing else ""
    terms = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in shown)
    return f"<dl>{''.join(terms)}</dl>{note}"


# Figures: SVG by hand, 440 by 260, so that the page follows its theme and needs no package.
LEFT, RIGHT, TOP, BOTTOM = 58, 425, 12, 215


class Axis(NamedTuple):
    """at: where a value is drawn; numbers: those that are named."""

    name: str
    at: Callable[[float], float]
    numbers: list[float]


def scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1
    return lambda value: round(begin + (value - low) / span * (end - begin), 1)


def ticks(low: float, high: float) -> list[float]:
    """Some 5 round numbers from low to high."""
    raw = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [
        round(n * step, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def axes(x: Axis, y: Axis) -> str:
    """Grid lines with their numbers, and the names of both axes."""
    parts = []
    for v in y.numbers:
        parts.append(f'<path class="axis" d="M{LEFT} {y.at(v)}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y.at(v) + 4}" text-anchor="end">{v:g}</text>')
    parts += [f'<text x="{x.at(v)}" y="{BOTTOM + 18}" text-anchor="middle">{v:g}</text>' for v in x.numbers]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">{x.name}</text>')
    turned = f'transform="translate(11 {(TOP + BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{y.name}</text>')
    return "".join(parts)


def point(rule: int, x: float, y: float, title: str) -> str:
    place = f'transform="translate({x} {y})" d="{SHAPES[rule % len(SHAPES)]}" style="{fill(rule)}"'
    return f"<path {place}><title>{html.escape(title)}</title></path>"


def figure(body: str, title: str, caption: str, legend: list[str], bottom: float = 260) -> str:
    """A figure of 440 by `bottom` with a legend of marked entries below it."""
    entries, name = "".join(f"<li>{entry}</li>" for entry in legend), html.escape(title)
    drawing = f'<svg viewBox="0 0 440 {bottom:g}" role="img" aria-label="{name}">{body}</svg>'
    said = f"<figcaption><b>{name}</b>. {html.escape(caption)}</figcaption>"
    return f'<figure>{drawing}<ul class="legend">{entries}</ul>{said}</figure>'


def legend_of(rules: list[str], numbers: list[int]) -> list[str]:
    """The marks of some rules with their names."""
    return [f"{mark(number)} {html.escape(rules[number])}" for number in numbers]


def pareto_point(number: int, row: dict, x: Axis, y: Axis) -> str:
    """A rule's point with its interval and threshold; of plain, which has no m*, a line across."""
    right = y.at(100 * row["accuracy"])
    if row["mean_accepted"] is None:
        if row["rule"] != "plain":
            return ""
        return f'<path d="M{LEFT} {right}H{RIGHT}" stroke="currentColor" stroke-dasharray="2 4"/>'

    at, (top, bottom) = x.at(row["mean_accepted"]), (y.at(100 * share) for share in reversed(row["interval"]))
    low, high = map(percent, row["interval"])
    title = f"{row['rule']}: {percent(row['accuracy'])} right, {low} to {high}, m* {row['mean_accepted']:.2f}"
    drawn = f'<path d="M{at} {top}V{bottom}M{at - 3} {top}h6M{at - 3} {bottom}h6" stroke="currentColor"/>'
    drawn += point(number, at, right, title)
    if row["threshold"] is not None:
        name = f"{row['threshold']:g}"
        drawn += f'<text class="small" x="{at - 6}" y="{right - 6}" text-anchor="end">{name}</text>'

    return drawn


def pareto_figure(rows: list[dict]) -> str:
    """Accuracy against m*, in percent, with intervals; a line joins the thresholds of a rule. Empty without
    accuracies."""
    scored = [(number, row) for number, row in enumerate(rows) if row["accuracy"] is not None]
    drawn = [(number, row) for number, row in scored if row["mean_accepted"] is not None]
    if not drawn:
        return ""

    low = max(0, 100 * min(row["interval"][0] for _, row in scored) - 1)
    most = max(row["mean_accepted"] for _, row in drawn) * 1.08
    x = Axis("m*, draft tokens accepted a round", scale(0, most, LEFT, RIGHT), ticks(0, most))
    y = Axis("right answers, %", scale(low, 100.5, BOTTOM, TOP), ticks(low, 100))

    families: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _, row in drawn:
        place = x.at(row["mean_accepted"]), y.at(100 * row["accuracy"])
        families.setdefault((row["name"], row["rule"].partition("@")[2]), []).append(place)

    lines = [
        f'<polyline class="none axis" points="{" ".join(f"{a},{b}" for a, b in sorted(points))}"/>'
        for points in families.values()
    ]

    plain = [row for _, row in scored if row["rule"] == "plain"]
    points = [pareto_point(number, row, x, y) for number, row in scored]
    legend = legend_of([row["rule"] for row in rows], [number for number, _ in drawn])
    dashes = '<path d="M-6 0H6" stroke="currentColor" stroke-dasharray="2 2"/>'
    legend += [small("-6 -6 12 12", dashes) + " plain"] * len(plain)
    return figure(
        "".join([axes(x, y), *reversed(lines), *points]),
        "Right answers against accepted tokens",
        "Upright lines: 95% intervals; numbers: thresholds; up and right is better.",
        legend,
    )


def accepted_figure(records: list[dict], rules: list[str]) -> str:
    """How many draft tokens rounds accepted, in percent of a rule's rounds. Empty when no rule drafts."""
    counts = accepted_counts(records)
    if not counts:
        return ""
    most = max(map(max, counts.values()))
    shares = {
        rule: [100 * found[n] / found.total() for n in range(most + 1)] for rule, found in counts.items()
    }
    high = max(map(max, shares.values())) * 1.05
    whole = [v for v in ticks(0, most) if v == int(v)]
    x = Axis("draft tokens that a round accepted", scale(0, most, LEFT + 8, RIGHT - 8), whole)
    y = Axis("share of the rounds, %", scale(0, high, BOTTOM, TOP), ticks(0, high))
    body = [axes(x, y)]
    for rule, values in shares.items():
        number = rules.index(rule)
        points = " ".join(f"{x.at(n)},{y.at(value)}" for n, value in enumerate(values))
        body.append(f'<polyline class="none" points="{points}" style="stroke:var(--c{number % COLOURS})"/>')
        body += [
            point(number, x.at(n), y.at(value), f"{rule}: {value:.1f}% of rounds accepted {n}")
            for n, value in enumerate(values)
        ]

    return figure(
        "".join(body),
        "Accepted tokens a round",
        "The last round of an answer is cut where the answer ends.",
        legend_of(rules, [rules.index(rule) for rule in shares]),
    )


def origin_figure(records: list[dict], rules: list[str]) -> str:
    """Who put in the tokens of each rule's answers, a bar a rule. Empty when nothing says so."""
    letters = {rule: "".join(r.get("origin") or "" for r in records if r["rule"] == rule) for rule in rules}
    bars = [(rule, text) for rule, text in letters.items() if text]
    if not bars:
        return ""
    height, x, body = 26, scale(0, 1, 12, RIGHT), []
    for place, (rule, text) in enumerate(bars):
        top, left = TOP + place * (height + 26) + 18, 0.0
        body.append(f'<text x="12" y="{top - 5}">{html.escape(rule)}</text>')
        for letter, name in ORIGINS.items():
            share = text.count(letter) / len(text)
            title = f"{rule}: {percent(share)} {name}"
            width = x(left + share) - x(left)
            body.append(
                f'<g><title>{html.escape(title)}</title><rect class="{letter}" x="{x(left)}" y="{top}" '
                f'width="{width:.1f}" height="{height}" stroke="currentColor" stroke-width=".5"/>'
            )
            if width > 34:
                at = (x(left) + x(left + share)) / 2
                body.append(
                    f'<text x="{at:.1f}" y="{top + 17}" '
                    f'text-anchor="middle">{letter} {100 * share:.0f}%</text>'
                )
            body.append("</g>")
            left += share

    square = '<rect class="{}" width="12" height="12" stroke="currentColor"/>'
    legend = [
        small("0 0 12 12", square.format(letter)) + f" {letter}: {name}" for letter, name in ORIGINS.items()
    ]
    caption, bottom = "Shares of all tokens of a rule's answers.", TOP + len(bars) * (height + 26) + 8
    return figure("".join(body), "Who put in the tokens", caption, legend, bottom)


class Pieces:
    """Texts, each kept once and numbered: what a page says of 100,000 tokens is said in few bytes."""

    def __init__(self):
        self.number: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.number.setdefault(text, len(self.number))


def has_details(record: dict) -> bool:
    return all(record.get(name) for name in ("p", "kl", "top"))


def thousandths(share: float) -> float | int:
    """A probability in few characters, with 3 digits where it is small: those are what one looks for."""
    return round(1000 * share) if share >= 0.1 else float(f"{1000 * share:.3g}")


def page_answer(record: dict, rules: list[str], pieces: Pieces) -> dict:
    """An answer for the page's script: r(ule), ok, f(inal answer), m*, t(okens), where further turns
    begin, o(rigin); and, where the run kept them,
    p, kl and s(core) in thousandths, and the target's own tokens where they are others."""
    text, cuts = record["text"], record.get("cuts")
    ends = list(accumulate(cuts)) if cuts else [len(text)]
    tokens = [pieces(text[begin:end]) for begin, end in zip([0, *ends], ends)]
    if record.get("failed"):
        tokens, cuts = [pieces(f"(no answer: {record['failed']})")], None
    final = record.get("final_answer")
    answer = {"r": rules.index(record["rule"]), "ok": -1 if record["right"] is None else int(record["right"]),
              "f": None if final is None else str(final),
              "m": round(record["accepted"] / max(1, record["rounds"]), 2) if record["drafted"] else None,
              "t": tokens, "turns": turn_ends(record)[:-1] if cuts else [],
              "o": (record.get("origin") if cuts else None) or "?" * len(tokens)}  # fmt: skip
    if cuts and has_details(record):
        answer |= {
            "p": [thousandths(p) for p in record["p"]],
            "kl": [round(1000 * x) for x in record["kl"]],
            "s": [round(1000 * x) for x in record["score"]] if record.get("score") else None,
            "top": {at: pieces(top) for at, top in enumerate(record["top"]) if top is not None},
        }

    return answer


def page_data(records: list[dict], rules: list[str]) -> str:
    """The answers by question, as JSON that may stand in a script element: it holds no <."""
    pieces, items = Pieces(), {}
    for record in records:
        key = str(record["index"])
        item = {"i": key, "q": record["question"], "f": record.get("family") or "", "plain": None, "a": []}
        item = items.setdefault(key, item)
        item["a"].append(page_answer(record, rules, pieces))
        if record["rule"] == "plain":
            item["plain"] = item["a"][-1]["ok"]
    data = {"rules": rules, "pieces": list(pieces.number), "items": list(items.values())}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def notes(records: list[dict]) -> str:
    """What is missing, and how to get it."""
    lines, n = [], len(records)
    if failed := [record for record in records if record.get("failed")]:
        lines.append(
            f"{len(failed)} of {n} answers failed and count as wrong, the first that of "
            f"{failed[0]['rule']} to item {failed[0]['index']}: {failed[0]['failed']}"
        )
        records = [record for record in records if not record.get("failed")]

    if bare := sum(not (record.get("origin") and record.get("cuts")) for record in records):
        lines.append(
            f"{bare} of {n} answers do not say who accepted their tokens, and are not coloured: they are "
            "of transformers, or older than this report; run scripts/evaluate.py anew with another --out."
        )

    if bare := sum(not has_details(record) for record in records):
        lines.append(
            f"{bare} of {n} answers come without probability, KL and score of their tokens: "
            "run scripts/evaluate.py with --details and another --out to see them here."
        )

    return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def make_page(header: dict, records: list[dict], title: str, written: float) -> str:
    """The whole page. written: when the results were, in s since 1970."""
    rows, script = run_rows(records), (HERE / "report_page.js").read_text(encoding="utf-8")
    rules = [row["rule"] for row in rows]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": html.escape(title),
        "notes": notes(records),
        "summary": summary_table(rows, records),
        "settings": settings_list(header, written),
        "marks": "".join(map(mark, range(len(rules)))),
        "script": script,
        "figures": pareto_figure(rows) + accepted_figure(records, rules) + origin_figure(records, rules),
        "data": page_data(records, rules),
    }
    page = (HERE / "report_page.html").read_text(encoding="utf-8")
    # in one pass: what is put in is not looked at
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def report(args: argparse.Namespace) -> None:
    """Reads the run, writes the page and says so."""
    check_writable(args.out, "--out")
    check_not_input(args.out, [args.results])
    header, records = read_run(args.results)
    name = one_line(os.fsencode(args.results.name).decode(errors="replace"))
    content = make_page(header, records, f"Run of {name}", args.results.stat().st_mtime).encode()
    write_file(args.out, content)
    questions = len({record["index"] for record in records})
    print(
        f"{one_line(str(args.out))}: {len(records)} answers to "
        f"{questions} questions, {len(content) / 1e6:.1f} MB"
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, help="JSON lines of scripts/evaluate.py")
    add_flags(parser, out={"default": Path("report.html"), "help": "the page to write"})
    args = parser.parse_args(argv)
    run_script("report.py", lambda: report(args))


if __name__ == "__main__":
    main()
