"""Rows that sum up answers, one a rule: accuracy with its interval, m*, speed, the difference to plain."""

from scripts.lib.intervals import interval, mcnemar, mean_interval, paired_interval, pass_at_k
from scripts.lib.results import PEERS


def shares_of(records: list[dict], rule: str) -> dict[int, list[bool]]:
    """Item -> whether each of its samples is right; empty where there is no right and wrong."""
    found: dict[int, list[bool]] = {}
    for record in records:
        if record["rule"] == rule and record["right"] is not None:
            found.setdefault(record.get("item", record["index"]), []).append(record["right"])
    return found


def accuracy_of(records: list[dict], shares: dict[int, list[bool]]) -> dict:
    """Accuracy, its interval (Wilson's, or with several samples the normal one over items), by family, and
    pass@k."""
    if not shares:
        return {
            "accuracy": None,
            "interval": None,
            "by_family": {},
            "answer_accuracy": None,
            "answer_interval": None,
        }

    means = [sum(rights) / len(rights) for rights in shares.values()]
    samples = min(map(len, shares.values()))
    records = [record for record in records if record["right"] is not None]
    families = {
        f: [r["right"] for r in records if r["family"] == f] for f in sorted({r["family"] for r in records})
    }
    answers = [r["answer_right"] for r in records]
    return {
        "accuracy": sum(means) / len(means),
        "interval": interval(sum(means), len(means)) if samples == 1 else mean_interval(means),
        "by_family": {f: sum(x) / len(x) for f, x in families.items()},
        "answer_accuracy": sum(answers) / len(answers),
        "answer_interval": interval(sum(answers), len(answers)) if samples == 1 else None,
        **{f"pass@{k}": sum(pass_at_k(len(x), sum(x), k) for x in shares.values()) / len(shares)
           for k in (1, 10, 100) if 1 < samples >= k},
    }  # fmt: skip


def difference(shares: dict[int, list[bool]], base: dict[int, list[bool]]) -> dict:
    """Accuracy less that of `base` on the same items, with Newcombe's paired interval and McNemar's exact p.

    With several samples an item: the mean of the items' differences, with the normal interval.
    """
    both = [(shares[item], base[item]) for item in base if item in shares]
    if not both:
        return {}
    changes = [sum(a) / len(a) - sum(b) / len(b) for a, b in both]
    if any(len(rights) > 1 for pair in both for rights in pair):
        return {
            "difference": sum(changes) / len(changes),
            "difference_interval": list(mean_interval(changes)),
        }

    won, lost, right = changes.count(1), changes.count(-1), sum(a[0] and b[0] for a, b in both)
    return {
        "difference": (won - lost) / len(both),
        "lost": lost,
        "won": won,
        "p_value": mcnemar(won, lost),
        "difference_interval": list(paired_interval(right, won, lost, len(both) - right - won - lost)),
    }


def summarise(records: list[dict], rules: list[str]) -> list[dict]:
    """One row a rule: n, accuracy with its interval, the same by family, m*, tokens/s, and what is different
    from plain.

    With several samples a question its accuracy is the share that is right, and pass@k is given. Accuracy is
    None where a checker knows no right and wrong. The difference to plain is on the questions that both
    answered.
    """
    rows, shares = [], {rule: shares_of(records, rule) for rule in rules}
    for rule in rules:
        mine = [record for record in records if record["rule"] == rule]
        rounds, drafted = sum(r["rounds"] for r in mine), sum(r["drafted"] for r in mine)
        tokens = sum(len(r["tokens"]) for r in mine)
        timed = tokens - len(mine) * (rule in PEERS)  # the peers' first token counts as prefill
        seconds, failed = sum(r["seconds_decode"] for r in mine), sum("failed" in r for r in mine)
        row = {
            "rule": rule,
            "n": len({r.get("item", r["index"]) for r in mine}),
            **accuracy_of(mine, shares[rule]),
        }
        row |= {
            "mean_accepted": sum(r["accepted"] for r in mine) / rounds if drafted else None,
            "by_rule_share": sum(r["accepted_by_rule"] for r in mine) / tokens if tokens else 0.0,
            "tokens_per_second": timed / seconds if seconds else 0.0,
            **({"failed": failed} if failed else {}),
        }
        rows.append(row)

    plain = next((row for row in rows if row["rule"] == "plain"), None)
    for row in rows:
        row["ratio"] = (
            row["tokens_per_second"] / plain["tokens_per_second"]
            if plain and plain["tokens_per_second"]
            else None
        )
        if plain and row is not plain:
            row |= difference(shares[row["rule"]], shares["plain"])

    return rows
