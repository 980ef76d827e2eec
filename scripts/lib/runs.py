"""Reading result files of evaluate.py and reports for pages and figures, checked field by field."""

import math
import re
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

from cli import InputError
from files import parse_json, read_text
from scripts.lib.fields import (
    DECODED,
    is_count,
    is_figure,
    is_seconds,
    is_share,
    is_text,
    is_verdict,
    maybe,
)
from scripts.lib.summary import summarise

MOST_RULES = 40  # in one figure
FIELDS = {  # of an answer; those of OPTIONAL may be missing
    "rule": is_text,
    "index": lambda value: is_count(value) or is_text(value),
    "family": is_text,
    "question": is_text,
    "right": is_verdict,
    "text": is_text,
    "answer_right": is_verdict,
    **DECODED,
    "seconds_decode": is_seconds,
    "threshold": maybe(is_figure),
    "speculate_k": lambda value: value in (None, "auto") or is_count(value),
    "failed": maybe(is_text),
    "item": maybe(is_count),
    "final_answer": lambda value: value is None or isinstance(value, (str, int, float)),
}
OPTIONAL = ("failed", "threshold", "speculate_k", "item", "final_answer")
PER_TOKEN = ("origin", "cuts", "p", "kl", "score", "top")  # one entry a token; may be missing


def depth(value) -> int:
    """How deeply lists and objects are nested, up to 4."""
    level, found = [value], 0
    while found < 4 and (level := [x for x in level if isinstance(x, (dict, list))]):
        level, found = [y for x in level for y in (x.values() if isinstance(x, dict) else x)], found + 1
    return found


def finite(value) -> bool:
    """Whether no number in a value, 3 levels deep at most, is infinite or NaN."""
    if isinstance(value, (dict, list)):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def turn_ends(record: dict) -> list[int]:
    """Up to which token each turn of an answer goes."""
    return list(accumulate(turn["new_tokens"] for turn in record.get("turns") or [])) or [
        len(record["tokens"])
    ]


def check_tokens(record: dict, where: str) -> None:
    """The same for what holds an entry a token."""
    n = len(record["tokens"])
    goods = {"p": is_share, "score": is_share, "kl": is_figure, "cuts": is_figure, "top": maybe(is_text)}
    for name in PER_TOKEN:
        value = record.get(name)
        if value is not None and (
            not isinstance(value, str if name == "origin" else list) or len(value) != n
        ):
            raise InputError(f"{where}: field {name!r} must hold one entry for each of the {n} tokens.")
        if name in goods and not all(map(goods[name], value or [])):
            what = (
                "text"
                if name == "top"
                else "share"
                if goods[name] is is_share and all(map(is_figure, value))
                else "number"
            )
            raise InputError(f"{where}: field {name!r} holds what is no {what}.")

    if set(record.get("origin") or "") - set("artb"):
        raise InputError(f"{where}: field 'origin' must be of the letters a, r, t and b.")
    cuts = record.get("cuts")
    if cuts is not None and (not all(map(is_count, cuts)) or sum(cuts) != len(record["text"])):
        raise InputError(
            f"{where}: field 'cuts' must be whole numbers that "
            f"add up to the {len(record['text'])} characters."
        )

    turns = record.get("turns") or []
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and is_count(turn.get("new_tokens")) for turn in turns
    )
    if not good or turn_ends(record)[-1:] != [n]:
        raise InputError(f"{where}: field 'turns' must name new_tokens that add up to the {n} tokens.")


def check_record(record, where: str) -> None:
    """Raises InputError beginning with `where` for what scripts/evaluate.py did not write."""
    for name, good in FIELDS.items():
        if (
            not isinstance(record, dict)
            or (name not in record and name not in OPTIONAL)
            or not good(record.get(name))
        ):
            raise InputError(
                f"{where}: field {name!r} is missing or of another type than scripts/evaluate.py writes."
            )

    if record["accepted_by_rule"] > record["accepted"]:
        raise InputError(
            f"{where}: field 'accepted_by_rule' is "
            f"{record['accepted_by_rule']}, more than were accepted at all."
        )
    if record["drafted"] and not record["rounds"]:
        raise InputError(f"{where}: field 'rounds' is 0, but 'drafted' is {record['drafted']}.")
    if record["right"] is not None and record["answer_right"] is None:
        raise InputError(f"{where}: field 'answer_right' is missing, though 'right' is there.")
    check_tokens(record, where)


def check_together(path: Path, records: list[dict]) -> None:
    """Raises InputError where answers do not go together: some of a rule scored and some not, or none of any
    length."""
    scored: dict[str, bool] = {}
    for number, record in enumerate(records, 2):
        if scored.setdefault(record["rule"], record["right"] is not None) != (record["right"] is not None):
            raise InputError(
                f"{path}, line {number}: field 'right' is known for some answers of {record['rule']} alone."
            )

    for rule in scored:
        mine = [record for record in records if record["rule"] == rule]
        if any("failed" in record for record in mine):
            continue  # such answers have neither
        if sum(r["seconds_decode"] for r in mine) < 1e-9 or not any(r["tokens"] for r in mine):
            raise InputError(
                f"{path}: the answers of {rule} hold no tokens, "
                "or took no time; there is nothing to show of it."
            )


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """The header and the answers of a results file of scripts/evaluate.py. A last line that was cut off is
    left out, with a note. Raises InputError naming file, line and field of whatever else is wrong."""
    *lines, rest = read_text(path).split("\n")
    if rest and lines:
        print(
            f"{path}: the last line is cut off and left out; the same evaluate.py command goes on there.",
            file=sys.stderr,
        )

    parsed = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if not parsed or not isinstance(parsed[0], dict) or "target" not in parsed[0] or "rule" in parsed[0]:
        raise InputError(
            f"{path} is not a results file of scripts/evaluate.py: its first line is no header of a run."
        )

    for name, value in parsed[0].items():
        if depth(value) > 3 or not finite(value):
            raise InputError(f"{path}, line 1: field {name!r} is no setting that scripts/evaluate.py writes.")

    seen: set = set()
    for number, record in enumerate(parsed[1:], 2):
        check_record(record, f"{path}, line {number}")
        if (record["rule"], record["index"]) in seen:
            raise InputError(
                f"{path}, line {number}: item {record['index']} was answered by {record['rule']} before."
            )
        seen.add((record["rule"], record["index"]))

    if not seen:
        raise InputError(f"{path} holds no answers yet; run scripts/evaluate.py with this --out.")
    check_together(path, parsed[1:])
    return parsed[0], parsed[1:]


def accepted_a_round(origin: str) -> list[int]:
    """How many draft tokens each round accepted: a round ends with the target's own token, t or b, or with
    the answer."""
    return [len(run) - 1 if run[-1] in "tb" else len(run) for run in re.findall("[ar]*[tb]|[ar]+$", origin)]


def run_rows(records: list[dict]) -> list[dict]:
    """The summary rows of a run as the figures want them: with `name`, the rule without threshold and M,
    `threshold`, `k`, the M, and tokens a round."""
    rows = summarise(records, list(dict.fromkeys(record["rule"] for record in records)))
    for row in rows:
        first = next(record for record in records if record["rule"] == row["rule"])
        row |= {
            "name": re.split("[=@]", row["rule"])[0],
            "k": first.get("speculate_k"),
            "threshold": first.get("threshold"),
            "tokens_a_round": 1 + (row["mean_accepted"] or 0),
        }
    return rows


def accepted_counts(records: list[dict]) -> dict[str, Counter]:
    """For each rule that drafts: how many rounds accepted 0, 1, 2, ... draft tokens. Answers without `origin`
    are left out."""
    counts: dict[str, Counter] = {}
    for record in records:
        if record["drafted"] and record.get("origin"):
            ends = turn_ends(record)
            for begin, end in zip([0, *ends], ends):
                counts.setdefault(record["rule"], Counter()).update(
                    accepted_a_round(record["origin"][begin:end])
                )
    return counts


def range_of(row: dict) -> tuple[float, float]:
    """What a part's times lie between, in ms, in a row by benchmark.py: its quartiles where it has them, else
    least and most (in files of schema 1 the 10% and 90% points)."""
    for low, high in (("ms_p25", "ms_p75"), ("ms_min", "ms_max"), ("ms_p10", "ms_p90")):
        if row.get(low) is not None and row.get(high) is not None:
            return row[low], row[high]
    return row["ms"], row["ms"]
