"""The bound that a calibration gives: its file, the sentence that says it, and what watches whether it still
fits."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from cli import InputError, one_line, shortened, shortened_value
from files import is_number, read_json
from judge import RULES, JudgeHead, needs_judge, relaxed_rules
from model import Transformer
from scripts.lib.intervals import upper_bound
from scripts.lib.result import Result

WATCHED = {
    "by_rule": "the share of tokens that the rule alone let through",
    "mean_score": "the judge's mean score",
}


CALIBRATION = (
    "kind",
    "conditions",
    "threshold",
    "passed",
    "max_harm",
    "confidence",
    "bound",
    "harms",
    "n",
    "data",
)


DEPENDS_ON = {  # what a bound was found under, where that is not all that a run may differ in
    "false_accept": (
        "verify",
        "target",
        "chat",
        "dtype",
    ),  # of given answers: no M, no sampling, a draft only if read
}


MOST_UNITS = 10**7  # questions that a calibration is made of


MOST_SHOWN = 200  # characters of a description or an example


def read_calibration(path: Path) -> dict:
    """What `calibrate.py` wrote for a rule. Raises InputError when it is missing or of another kind."""
    if not path.is_file():
        raise InputError(f"There is no calibration {path}; calibrate.py writes one.")
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path} is a judge's file, which holds its calibration itself; name it with --judge_path."
        )
    calibration = read_json(path)
    check_calibration(calibration, str(path))
    return calibration


def take_calibration(args: argparse.Namespace) -> None:
    """--calibration gives the rule and, unless there is a --threshold, the threshold."""
    if not args.calibration:
        return
    calibration = read_calibration(args.calibration)
    rule = calibration["conditions"]["verify"]
    if args.verify not in (None, rule):
        raise InputError(f"{args.calibration} is of --verify {rule}, not of {args.verify}.")
    args.verify = rule
    if args.threshold is None:
        args.threshold = calibration["threshold"]


def calibration_of(head: JudgeHead, path: Path) -> dict | None:
    """The calibration in a judge's file, `path`. Raises InputError when it is broken."""
    if "calibration" in head.info:
        check_calibration(head.info["calibration"], str(path))
    return head.info.get("calibration")


def is_list(value, kind: Callable) -> bool:
    return isinstance(value, list) and all(map(kind, value))


def is_range(name: str, pair) -> bool:
    """Whether this is the mean and the standard deviation of a live statistic."""
    return name in WATCHED and is_list(pair, is_number) and len(pair) == 2 and pair[1] >= 0


def check_calibration(calibration: object, where: str) -> None:
    """Raises InputError beginning with `where` for what `calibrate.py` did not write."""
    if not isinstance(calibration, dict):
        raise InputError(f"{where} is no calibration by calibrate.py: it is no object.")
    if missing := [name for name in CALIBRATION if name not in calibration]:
        raise InputError(f"{where} is no calibration by calibrate.py: it lacks {missing[0]!r}.")
    c, live = calibration, calibration.get("live") or {}
    rule = RULES.get(str(c["conditions"].get("verify"))) if isinstance(c["conditions"], dict) else None

    def count(value) -> bool:
        return type(value) is int and 0 <= value < 2**53

    def text(value) -> bool:
        return isinstance(value, str) and len(value) <= MOST_SHOWN

    def threshold(value) -> bool:
        return rule is not None and is_number(value, rule.low, rule.high)

    good = {
        "kind": c["kind"] in ("harm", "false_accept"),
        "conditions": rule is not None and rule.knob is not None,
        "threshold": threshold(c["threshold"]),
        "passed": is_list(c["passed"], threshold) and c["threshold"] in c["passed"],
        "max_harm": is_number(c["max_harm"], 0, 1),
        "confidence": is_number(c["confidence"], 0, 1),
        "n": count(c["n"]) and 0 < c["n"] <= MOST_UNITS,
        "harms": count(c["harms"]) and count(c["n"]) and c["harms"] <= c["n"],
        "bound": is_number(c["bound"], 0, 1),
        "data": text(c["data"]),
        "questions": text(c.get("questions", "")),
        "examples": is_list(c.get("examples", []), text),
        "cut_off": count(c.get("cut_off", 0)),
        "live": isinstance(live, dict) and all(is_range(name, pair) for name, pair in live.items()),
    }
    if all(good.values()):
        bound = upper_bound(c["harms"], c["n"], c["confidence"])
        good["bound"] = (
            math.isclose(c["bound"], bound, rel_tol=1e-4, abs_tol=1e-9) and c["bound"] <= c["max_harm"]
        )
        good["cut_off"] = c.get("cut_off", 0) <= c["harms"]
    if bad := [name for name, fine in good.items() if not fine]:
        raise InputError(
            f"{where} is no calibration by calibrate.py: {bad[0]!r} cannot be "
            f"{shortened_value(c.get(bad[0]))}."
        )


def describe_guarantee(calibration: dict | None, run: dict, threshold: float) -> tuple[bool, str]:
    """Whether a calibrated bound covers a run under these conditions, and one sentence that says it, or why
    not.

    All that a run may differ in must stand in the calibration, and be equal. Its answers may be longer,
    where questions that were cut off have counted as harmed.
    """
    if calibration is None:
        what = "this judge" if needs_judge(run.get("verify")) else f"--verify {run.get('verify')}"
        return (
            False,
            f"No guarantee: {what} has no calibration; calibrate.py finds how much harm it does at most.",
        )
    c, missing = calibration, object()
    known = dict.fromkeys([*DEPENDS_ON.get(c["kind"], run), *c["conditions"]])
    for name in known:
        found, value = run.get(name, missing), c["conditions"].get(name, missing)
        if value is missing:
            return False, one_line(
                f"No guarantee: the calibration does not say with which {name} it was made."
            )
        longer = (
            name == "max_new_tokens"
            and "cut_off" in c
            and type(value) is type(found) is int
            and found > value > 0
        )
        if not longer and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            has = "none" if found is missing else found
            return False, one_line(f"No guarantee: calibrated with {name} {value}, but this run has {has}.")
    if threshold not in c["passed"]:
        text = f"No guarantee: calibrated for threshold {c['threshold']}, but this run has {threshold}."
        return False, text
    event = "questions like these are answered wrong because of the rule"
    if c["kind"] == "false_accept":
        event = (
            "prompts whose answers hold a mistake, like these, have a wrong token that the judge alone lets"
        )
        event += " through"
    percent = {name: f"{100 * c[name]:.6g}%" for name in ("confidence", "max_harm")}
    these = c.get("questions", "") + "".join(f", {shortened(example)}" for example in c.get("examples", []))
    these = f"these: {these}; {c['n']}" if these else f"{c['n']}"
    return True, one_line(
        f"Guarantee: with {percent['confidence']} confidence, at most {percent['max_harm']} of {event} "
        f"({these} calibrated on, data {c['data']}). Whether a single prompt is like them is not checked."
    )


class Drift:
    """Watches answers for text unlike the calibration's: warns once when the mean of a live statistic is off.

    The calibration keeps mean and standard deviation over its n answers of each statistic; after k answers
    the mean is off when it is LIMIT standard errors away, sd sqrt(1 / n + 1 / k).
    """

    LIMIT = 4.0

    def __init__(self, calibration: dict | None):
        self.live = (calibration or {}).get("live") or {}
        self.n = (calibration or {}).get("n", 0)
        self.sums, self.counts = dict.fromkeys(self.live, 0.0), dict.fromkeys(self.live, 0)

    def add(self, statistics: dict[str, float]) -> str | None:
        """Takes one answer's statistics; the warning, at most once."""
        for name, (mean, sd) in self.live.items():
            if name not in statistics:
                continue
            self.sums[name], self.counts[name] = self.sums[name] + statistics[name], self.counts[name] + 1
            count, found = self.counts[name], self.sums[name] / self.counts[name]
            if abs(found - mean) > self.LIMIT * max(sd, 1e-3) * math.sqrt(1 / self.n + 1 / count):
                self.live = {}
                return (
                    f"Warning: {WATCHED[name]} is {found:.3f} ({count} answers so far), but was {mean:.3f} "
                    "on the calibration questions: this text is unlike them, and the guarantee may not "
                    "hold."
                )
        return None


def conditions(engine, chat: bool, max_new_tokens: int, speculate_k: int | str | None = None) -> dict:
    """What a calibrated bound holds under: another run must agree in all of it.

    speculate_k: as asked for, where the engine's is lower since no answer can use more.
    """
    s, draft = engine.settings, engine.draft
    named = (
        " ".join(filter(None, (draft.fingerprint, draft.quantization))) if draft else None
    )  # quantised it is another
    between = list(s.relax_between) if s.relax_between else None
    # Only where they are on: calibrations made before there were these stay what they are
    filters = {name: value for name, value in (("top_p", s.top_p), ("min_p", s.min_p)) if value is not None}
    return {
        "verify": s.verify,
        "target": engine.target.fingerprint,
        "draft": named,
        "speculate_k": speculate_k or ("auto" if s.adaptive else s.speculate_k),
        "temperature": s.temperature,
        "top_k": s.top_k if s.temperature else None,
        **(filters if s.temperature else {}),
        "min_prob": s.min_prob,
        "relax_between": between,
        "chat": chat,
        "max_new_tokens": max_new_tokens,
        "dtype": kind_of(engine.target),
    }


def kind_of(model: Transformer) -> str:
    """The type that a model runs in, and how its weights are quantised."""
    return " ".join(filter(None, (str(model.dtype).removeprefix("torch."), model.quantization)))


def announce(args: argparse.Namespace, engine) -> Drift:
    """Prints the guarantee that this run has, if it was calibrated, and returns what watches over it."""
    calibration = None
    if args.calibration:
        calibration = read_calibration(args.calibration)
    elif engine.head is not None:
        calibration = calibration_of(engine.head, args.judge_path)
    if calibration is None and args.verify not in relaxed_rules():
        return Drift(None)
    run = conditions(engine, args.chat, args.max_new_tokens, args.speculate_k)
    threshold = engine.settings.threshold
    covered, text = describe_guarantee(calibration, run, threshold)
    print(text, file=sys.stderr)
    same = covered and threshold == calibration["threshold"]  # a stricter one accepts less
    return Drift(calibration if same else None)


def live_statistics(result: Result) -> dict[str, float]:
    """What is watched of each answer: the share of its tokens that the rule alone let through, and the mean
    score."""
    watched = {"by_rule": result.accepted_by_rule / max(1, len(result.tokens))}
    return watched if result.mean_score is None else watched | {"mean_score": result.mean_score}


def warn_of_drift(drift: Drift, result: Result) -> None:
    """Prints one line, once, when the answers so far do not look like those of the calibration; stopped ones
    do not count."""
    if result.stop_reason == "interrupt":
        return
    if warning := drift.add(live_statistics(result)):
        print(warning, file=sys.stderr)
