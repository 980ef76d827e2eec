"""The experiments of the judge decoding papers on the demo pair, each one command; results go to benchmarks/.

    python scripts/experiments.py judge_table          # or another of the names below, or all
    python scripts/experiments.py pareto --limit 50 --results trial

    judge_table     plain, standard and judge: m*, tokens/s, accuracy, on both families (arXiv 2501.19309)
    m_sweep         tokens a round and tokens/s against M, for standard and judge, and --speculate_k auto
    pareto          accuracy against m* over thresholds, for every rule
    equal_risk      every rule calibrated to the same bound on harm, then compared
    other_text      how much of somebody else's text passes, standard and judge
    out_of_domain   judge and AutoJudge head trained on one family, tested on the other, beside kl
    self_correction the target made to go on after a wrong span: how often it puts it right
    label_policies  the three ways to label what follows an error, trained and decoded
    ablations       feature, row, layer, size of the training set, target+draft
    autojudge       mining: share of important tokens, AUC, agreement with the true labels
    rule_cost       what each rule adds to the verification's time (needs --compile)
    quantised       the target in int8, fp8 and int4: perplexity, accuracy, m*, the judge as it is and anew

Each writes NAME.json, NAME.md and NAME.png, with n, seed, 95% intervals (paired where runs share problems),
command, machine and commit, and one sentence that says what was found. Answers are kept in --work; a killed
run resumes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, number, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch

from checkpoint import DEMO
from files import check_folder, check_not_input, check_writable, write_file
from generate import Engine, Settings
from judge import LABEL_POLICIES, RULES, JudgeHead, load_judge, needs_judge, relaxed_rules
from model import pick_device
from quantize import load_model, scheme_named
from scripts.lib import acceptance, calibration, figures
from scripts.lib.answers import encode_answer, encode_items, read_answers
from scripts.lib.bench import Bench, Variant, label
from scripts.lib.demo_task import (
    FAMILIES,
    WAIT,
    Problem,
    check,
    choose,
    corrupt,
    match,
    problems,
    sentence,
    stop_writing,
    write,
    write_answer,
)
from scripts.lib.features import RowReader, extract_features
from scripts.lib.flags import add_engine_flags, add_flags
from scripts.lib.intervals import interval
from scripts.lib.likelihood import perplexity, read_pairs
from scripts.lib.pair import name_models
from scripts.lib.published import take_sampling
from scripts.lib.results import commit, machine
from scripts.lib.summary import difference, shares_of, summarise
from scripts.lib.tasks import load_questions
from scripts.lib.terminal import answer_text
from scripts.lib.training import (
    TrainSettings,
    area_under_curve,
    balanced,
    fit_head,
    split_prompts,
    train_judge,
)
from tokenizer import decode, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DELTA = 0.8  # the shipped judge's threshold


def summary_rows(records: list[dict], variants: list[Variant]) -> list[dict]:
    """The rows of evaluate.py."""
    return summarise(records, [label(variant) for variant in variants])


def bench_of(args, asked, name: str, with_judge: bool = True, largest_k: int = 0, **more) -> Bench:
    """A Bench whose answers are kept in the work folder under `name`."""
    fixed = {"out": args.work / f"{name}.jsonl", "task": None, "questions": "demo", "checker": None}
    return Bench(argparse.Namespace(**vars(args) | fixed | more), asked, with_judge, largest_k)


def times(value: float | None, base: float | None) -> str:
    """How many times as much, "-" where one of the two is missing or 0."""
    return f"{value / base:.1f}" if value is not None and base else "-"


def judge_table(args) -> dict:
    """Experiment 1."""
    variants = [Variant("plain"), Variant("standard"), Variant("judge", DELTA)]
    questions = load_questions("demo", None, args.limit or 500, args.seed)
    records = bench_of(args, questions, "judge_table").answer_all(questions, variants)
    rows = [{"family": "both", **row} for row in summary_rows(records, variants)]
    for family in FAMILIES:
        # a few problems may all be of one
        if mine := [record for record in records if record["family"] == family]:
            rows += [{"family": family, **row} for row in summary_rows(mine, variants)]

    plain, standard, judge = rows[:3]
    return {
        "title": "Plain, standard and judge",
        "n": len(questions),
        "rows": rows,
        "finding": f"The judge accepts {times(judge['mean_accepted'], standard['mean_accepted'])} "
        f"times as many tokens a round as standard ({judge['mean_accepted']:.2f} "
        f"against {standard['mean_accepted']:.2f}) and decodes {judge['ratio']:.2f} "
        f"times as fast as plain; of {judge['n']} problems it loses {judge['lost']} "
        f"that plain has right and wins {judge['won']} that plain has wrong.",
    }


SWEEP = (1, 2, 4, 8, 12, 16, 24, 32)


def m_sweep(args) -> dict:
    """Experiment 2, and adaptive M beside it."""
    variants = [Variant("plain")] + [Variant(name, DELTA if name == "judge" else None, k)
                                     for name in ("standard", "judge") for k in (*SWEEP, "auto")]  # fmt: skip
    questions = load_questions("demo", None, args.limit or 100, args.seed)
    rows = summary_rows(
        bench_of(args, questions, "m_sweep", largest_k=max(SWEEP)).answer_all(questions, variants), variants
    )
    for row, variant in zip(rows, variants):
        row |= {"name": variant.name, "k": variant.k, "tokens_a_round": 1 + (row["mean_accepted"] or 0)}
    parts = []
    for name in ("standard", "judge"):
        mine = {row["k"]: row for row in rows if row["name"] == name}
        speed = {k: row["tokens_per_second"] for k, row in mine.items()}
        best, worst = (pick((k for k in speed if k != "auto"), key=speed.get) for pick in (max, min))
        parts.append(
            f"{name} goes from {mine[8]['mean_accepted']:.1f} accepted tokens at M = 8 to "
            f"{mine[16]['mean_accepted']:.1f} at 16 and {mine[32]['mean_accepted']:.1f} at 32 and "
            f"is fastest at M = {best}; auto reaches {speed['auto'] / speed[best]:.0%} of that "
            f"speed and {speed['auto'] / speed[worst]:.2f} times that of the worst (M = {worst})"
        )

    return {
        "title": "Tokens a round against M",
        "n": len(questions),
        "rows": rows,
        "finding": "; ".join(parts) + ".",
    }


def all_thresholds() -> list[Variant]:
    return [Variant(name, threshold) for name in relaxed_rules() for threshold in RULES[name].walk]


def pareto(args) -> dict:
    """Experiment 3, first half."""
    variants = [Variant("plain"), Variant("standard"), *all_thresholds()]
    questions = load_questions("demo", None, args.limit or 150, args.seed)
    rows = summary_rows(bench_of(args, questions, "pareto").answer_all(questions, variants), variants)
    for row, variant in zip(rows, variants):
        row |= {"name": variant.name, "threshold": variant.threshold}
    floor = next(row["accuracy"] for row in rows if row["rule"] == "plain") - 0.02
    best = {}
    for row in rows[2:]:
        if (
            row["accuracy"] >= floor
            and row["mean_accepted"] > best.get(row["name"], {"mean_accepted": 0})["mean_accepted"]
        ):
            best[row["name"]] = row

    order = sorted(best.values(), key=lambda row: -row["mean_accepted"])
    said = ", ".join(f"{row['name']} {row['mean_accepted']:.1f} ({row['threshold']:g})" for row in order)
    return {
        "title": "Accuracy against m*",
        "n": len(questions),
        "rows": rows,
        "finding": f"Within 2 points of plain's accuracy the rules reach m* {said or 'nowhere'}.",
    }


def equal_risk(args) -> dict:
    """Experiment 3, second half: thresholds from other problems than those that are then answered."""
    n, seed, found = args.limit or 250, args.seed + 1, {}
    asked = load_questions("demo", None, n, seed)
    demo = {"task": None, "questions": "demo", "checker": None, "data": None, "seed": seed}
    for name in relaxed_rules():
        # A file of answers names the judge, if one was loaded.
        kept = args.work / ("calibration_judge.jsonl" if needs_judge(name) else "calibration.jsonl")
        walked = {"verify": name, "max_harm": args.max_harm, "confidence": 0.95, "answers": kept}
        each = argparse.Namespace(**vars(args) | demo | walked)
        found[name], _ = calibration.by_generating(each, list(RULES[name].walk), asked)
    variants = [Variant("plain"), Variant("standard")]
    variants += [Variant(name, c["threshold"]) for name, c in found.items() if c["threshold"] is not None]
    questions = load_questions("demo", None, args.limit or 200, args.seed)
    rows = summary_rows(bench_of(args, questions, "equal_risk").answer_all(questions, variants), variants)
    for row, variant in zip(rows, variants):
        row |= {"name": variant.name, "threshold": variant.threshold}
        if variant.name in found:
            row |= {name: found[variant.name][name] for name in ("harms", "bound")}

    none = [name for name, c in found.items() if c["threshold"] is None]
    failed = [{"rule": name, "name": name, "threshold": None, "n": found[name]["n"]} for name in none]
    order = sorted((row for row in rows if "bound" in row), key=lambda row: -row["mean_accepted"])
    said = ", ".join(f"{row['name']} {row['mean_accepted']:.1f} ({row['threshold']:g})" for row in order)
    return {
        "title": f"Every rule at the same risk: at most {args.max_harm:.0%} harmed, 95% confidence",
        "n": len(questions),
        "calibrated_on": n,
        "rows": rows + failed,
        "seed_of_calibration": seed,
        "finding": "At the same bound the rules accept m* "
        f"{said or 'nowhere'}{'; none qualifies of ' * bool(none)}{', '.join(none)}.",
    }


def other_text(args) -> dict:
    """Experiment 4: text by other writers of the same task, right and wrong, read as score_text.py does."""
    rng, n, rows = random.Random(args.seed), args.limit or 300, []
    chosen = [problem for problem, _ in zip(problems(args.seed, held_out=True), range(n))]
    variants = [Variant("standard"), Variant("judge", DELTA), Variant("kl", 2.0)]

    def mixed(problem) -> str:
        parts = (sentence(problem, i) for i in range(len(problem.steps) + 1))
        return "".join(write(slots, [rng.randrange(len(slot.wordings)) for slot in slots]) for slots in parts)

    writers = {
        "the target's own style": lambda problem: write_answer(problem, "target", rng),
        "any wording at random": mixed,
        "the draft's style": lambda problem: write_answer(problem, "draft", rng),
    }
    tokenizer = load_tokenizer(args.checkpoint_path)
    for writer, write_text in writers.items():
        items = [{"prompt": p.question, "response": write_text(p), "errors": []} for p in chosen]
        _, letters = acceptance.score_texts(args, variants, tokenizer, items, f"the text of {writer}")
        found = acceptance.summarise(letters, variants, args.speculate_k)
        rows += [{"writer": writer, **row} for row in found]

    mixed_rows = {row["rule"].split("=")[0]: row for row in rows if row["writer"] == "any wording at random"}
    standard, judge = mixed_rows["standard"], mixed_rows["judge"]
    return {
        "title": "Somebody else's right answers as the draft",
        "n": n,
        "rows": rows,
        "finding": "Of right answers in wordings picked at random, standard "
        f"verification accepts {standard['mean_accepted']:.1f} tokens a "
        f"round, the judge {judge['mean_accepted']:.1f} "
        f"({standard['passed']:.0%} and {judge['passed']:.0%} of the tokens).",
    }


def load_target(args, scheme=None) -> tuple:
    """The demo target in fp32, quantised by a scheme, and its tokenizer."""
    folder = DEMO / "target"
    return load_model(folder, args.device, torch.float32, scheme), load_tokenizer(folder)


def train_head(args, target, tokenizer, answers: list[dict], name: str, **more) -> tuple[JudgeHead, Path]:
    """A head on these answers, saved under `name` in the work folder. more: of `TrainSettings`."""
    settings = TrainSettings(threshold=DELTA, **more)
    head = train_judge([target], tokenizer, answers, settings, args.work / "features")
    path = args.work / f"{name}.safetensors"
    head.save(path)
    return head, path


def read_made(paths: list[Path], script: str) -> list[dict]:
    """Training answers that another script makes. Raises InputError naming that script when they are
    missing."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"There is no {path}; {script} makes it.")
    return [item for path in paths for item in read_answers(path)]


def family_of(item: dict, tokenizer) -> str:
    """The family of a training answer, of either form."""
    prompt = (
        item["prompt"] if "prompt" in item else decode(tokenizer, item["prompt_tokens"][1:], at_start=True)
    )
    return "list" if prompt.lstrip().startswith("The list is") else "story"


def mean_of(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def family_row(args, name: str, family: str, variants: list[Variant], judge: Path | None) -> dict:
    """A rule (the second variant, beside plain) tested on one family."""
    questions = load_questions(f"demo:{family}", None, args.limit or 150, args.seed)
    more = {"judge_path": judge} if judge else {}
    bench = bench_of(
        args, questions, f"out_of_domain_{name}_{family}", bool(judge), questions=f"demo:{family}", **more
    )
    return summary_rows(bench.answer_all(questions, variants), variants)[1]


def out_of_domain(args) -> dict:
    """Experiment 5."""
    (target, tokenizer), rows = load_target(args), []
    data = {"judge": read_made(args.judge_data, "scripts/train_demo.py --stages judge"),
            "autojudge": read_made([args.mined], "scripts/mine_important_tokens.py")}  # fmt: skip
    for train_family in FAMILIES:
        for kind, answers in data.items():
            mine = [item for item in answers if family_of(item, tokenizer) == train_family]
            _, path = train_head(args, target, tokenizer, mine, f"{kind}_{train_family}")
            for test_family in FAMILIES:
                variants = [Variant("plain"), Variant("judge", DELTA)]
                row = family_row(args, f"{kind}_{train_family}", test_family, variants, path)
                rows.append({"kind": kind, "trained_on": train_family, "tested_on": test_family, **row})

    for test_family in FAMILIES:
        row = family_row(args, "kl", test_family, [Variant("plain"), Variant("kl", 2.0)], None)
        rows.append({"kind": "kl", "trained_on": "-", "tested_on": test_family, **row})

    found: dict[tuple[str, bool], list[dict]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["trained_on"] == row["tested_on"]), []).append(row)
    said = []
    for (kind, same), part in found.items():
        where = "" if kind == "kl" else " in its family" if same else " on the other family"
        lost, m = mean_of(part, "difference"), mean_of(part, "mean_accepted")
        said.append(f"{kind}{where} loses {0 - lost:.1%} at m* {m:.1f}")

    return {
        "title": "Trained on one family, tested on the other",
        "n": args.limit or 150,
        "rows": rows,
        "finding": "; ".join(said) + ".",
    }


AFTER_WRONG, AT_THE_END = "right after the wrong characters", "at the end of the sentence"


def wrong_start(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """(where it stops, an answer's beginning whose last step goes wrong), in the target's wording."""
    index = rng.randrange(len(problem.steps) + 1)
    before = "".join(
        write(slots, choose(slots, "target", rng)) for slots in (sentence(problem, i) for i in range(index))
    )
    picks = choose(sentence(problem, index), "target", rng)
    at = None
    while at is None:  # not every corruption is wrong after all
        wrong = write(sentence(problem, index, corrupt(problem, index, rng)), picks)
        end, at = match(sentence(problem, index), wrong, 0)
        at = at if end is None else None

    stop = stop_writing(wrong, at, rng)
    return AT_THE_END if stop == len(wrong) else AFTER_WRONG, before + wrong[:stop]


def self_correction(args) -> dict:
    """Experiment 6: the right answer up to a step, then that step wrong, in the target's wording; greedy from
    there."""
    target, tokenizer = load_target(args)
    engine = Engine(target, None, None, Settings("plain"), tokenizer.stop_ids, 400)
    rng, n, cases = random.Random(args.seed), args.limit or 300, []
    progress = Progress("continuations", n)
    for problem, _ in zip(problems(args.seed, held_out=True), range(n)):
        where, forced = wrong_start(problem, rng)
        prompt, ids, _ = encode_answer(tokenizer, problem.question, forced)
        rest = answer_text(tokenizer, engine.generate(prompt + ids, 200).tokens)
        verdict = check(problem, forced + rest)
        cases.append({"where": where, "at_once": rest.startswith(WAIT), "right": verdict.right,
                      "answer_right": verdict.answer_right, "prompt": problem.question,
                      "forced": forced, "continued": rest})  # fmt: skip
        progress.step()

    rows = []
    for where in (AFTER_WRONG, AT_THE_END, "all"):
        mine = [case for case in cases if where in ("all", case["where"])]
        if not mine:  # of few problems none may be of a kind
            continue
        shares = {name: mean_of(mine, name) for name in ("at_once", "right", "answer_right")}
        right = interval(sum(case["right"] for case in mine), len(mine))
        rows.append({"stopped": where, "n": len(mine), **shares, "interval": right})

    parts = [f"{row['right']:.0%} {row['stopped']}" for row in rows[:-1]]
    examples = [next((c for c in cases if c["right"] is right and c["at_once"] is once), None)
                for right in (True, False) for once in (True, False)]  # fmt: skip
    return {
        "title": "The target after a wrong span",
        "n": n,
        "rows": rows,
        "examples": [case for case in examples if case],
        "finding": f"The target takes back {rows[-1]['at_once']:.0%} of the wrong spans at once "
        f"and ends right at every step in {rows[-1]['right']:.0%} ({', '.join(parts)}).",
    }


DELTAS = (0.5, 0.8, 0.9, 0.95)


def label_policies(args) -> dict:
    """Experiment 7, label policies: heads trained on the same answers with each, compared by decoding."""
    (target, tokenizer), rows = load_target(args), []
    answers = read_made(args.judge_data, "scripts/train_demo.py --stages judge")
    questions = load_questions("demo", None, args.limit or 300, args.seed + 2)
    variants = [Variant("plain"), *(Variant("judge", delta) for delta in DELTAS)]
    for policy in LABEL_POLICIES:
        head, path = train_head(args, target, tokenizer, answers, f"policy_{policy}", policy=policy)
        bench = bench_of(args, questions, f"policy_{policy}", judge_path=path)
        summary = summary_rows(bench.answer_all(questions, variants), variants)[1:]
        made = {"policy": policy, "auc": head.info["held_out"]["auc"], "l2": head.info["l2"]}
        rows += [made | row for row in summary]

    by_policy = {policy: [row for row in rows if row["policy"] == policy] for policy in LABEL_POLICIES}
    within = [policy for policy, mine in by_policy.items() if -mean_of(mine, "difference") <= 0.02]
    best = max(within, key=lambda policy: mean_of(by_policy[policy], "mean_accepted"), default="none")
    lost = {
        policy: ", ".join(
            f"{0 - row['difference']:.1%} lost at m* {row['mean_accepted']:.1f}" for row in mine
        )
        for policy, mine in by_policy.items()
    }
    said = "; ".join(f"{policy}: {parts}" for policy, parts in lost.items())
    return {
        "title": "Label policies",
        "n": len(questions),
        "rows": rows,
        "finding": f"{best} accepts most over the four thresholds, within 2 points "
        f"of plain ({said}, at delta {', '.join(map(str, DELTAS))}).",
    }


@torch.inference_mode()
def read_variants(target, draft, answers) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """{variant: features (N, d)}, labels (N,) and answer number (N,): one reading of all answers with hooks
    on the layers."""
    layers = [i for i in range(len(target.layers)) if (i + 1) % 3 == 0]
    caught, parts, labels, number = {}, {}, [], []
    hooks = [
        target.layers[i].register_forward_hook(
            lambda module, inputs, out, i=i: caught.setdefault(i, []).append(out[0])
        )
        for i in layers
    ]
    length = max(len(answer.prompt) + len(answer.ids) for answer in answers)
    readers = [RowReader(model, 17, length) for model in (target, draft)]
    progress = Progress("reading answers", len(answers))
    for n, answer in enumerate(answers):
        both, base = answer.prompt + answer.ids, len(answer.prompt) - 1
        kept = torch.tensor(answer.labels("ignore_after")) >= 0
        caught.clear()
        readers[0].ids = []  # read it all: the hooks need every row
        own = readers[0].read(both, base, base, len(both))
        rows = -(-(len(both) - base) // 17) * 17
        found = {
            "own row, before the final norm": own[1:],
            "own row, after the final norm": target.norm(own[1:]),
            "row before": own[:-1],
        }
        found |= {
            f"own row, layer {i + 1} of {len(target.layers)}": torch.cat(caught[i])[-rows:][
                1 : len(both) - base
            ]
            for i in layers[:-1]
        }
        found["target+draft"] = torch.cat([own[1:], readers[1].read(both, base, base, len(both) - 1)], dim=1)
        for name, x in found.items():
            parts.setdefault(name, []).append(x[kept].clone())
        labels.append(torch.tensor(answer.labels("ignore_after"))[kept])
        number.append(torch.full((int(kept.sum()),), n))
        progress.step()

    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in parts.items()}, torch.cat(labels), torch.cat(number)


def fit_and_measure(x: torch.Tensor, labels: torch.Tensor, train: torch.Tensor, test: torch.Tensor) -> dict:
    """AUC of the head at the best of three L2, with its standard error, and wrong tokens accepted at 95%
    recall."""
    best = {}
    for weight, bias in fit_head([x], labels, balanced(labels, train), [0.1, 0.01, 0.001]):
        scores, truth = (x @ weight + bias)[test], labels[test]
        auc, right, wrong = area_under_curve(scores, truth), scores[truth == 1], scores[truth == 0]
        if auc > best.get("auc", -1):
            cut = right.quantile(0.05) if len(right) < 1 << 24 else right.sort().values[len(right) // 20]
            best = {
                "auc": auc,
                "auc_error": math.sqrt(auc * (1 - auc) / max(1, len(wrong))),
                "wrong_tokens": len(wrong),
                "training_wrong_tokens": int((labels[train] == 0).sum()),
                "wrong_accepted_at_95": (wrong > cut).float().mean().item(),
            }

    return best


def ablations(args) -> dict:
    """Experiment 7, features and data: AUC on held-out prompts, and wrong tokens accepted where 95% of right
    ones are."""
    target, draft = (load_model(DEMO / role, args.device, torch.float32) for role in ("target", "draft"))
    answers = read_made(args.judge_data, "scripts/train_demo.py --stages judge")
    answers = encode_items(load_tokenizer(DEMO / "target"), answers, False, target.args.vocab_size)
    answers = answers[: args.limit]
    features, labels, number = read_variants(target, draft, answers)
    keys = torch.tensor([answer.key for answer in answers])
    test = split_prompts(keys, args.seed, 0.15)[0]
    for side in (test[number], ~test[number]):
        if not 0 < labels[side].sum() < side.sum():
            raise InputError(
                f"{len(answers)} answers are too few: a side of "
                "the split lacks right or wrong tokens; give more."
            )

    rows = []
    for name, x in features.items():
        rows.append(
            {"what": "feature", "name": name, **fit_and_measure(x, labels, ~test[number], test[number])}
        )

    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(args.seed))
    wrong = torch.zeros(len(answers), dtype=torch.bool)
    wrong[number[labels == 0].unique()] = True
    own, pool = next(iter(features.values())), order[~test[order]]
    for size in (50, 100, 200, 500, 1000, 2000):
        chosen = torch.cat([pool[wrong[pool]][:size], pool[~wrong[pool]][:size]])
        if len(chosen) == 2 * size:
            used = torch.isin(number, chosen)
            figures = fit_and_measure(own, labels, used, test[number])
            rows.append({"what": "pairs of a right and a wrong answer", "name": str(size), **figures})

    auc = {row["name"]: row["auc"] for row in rows}
    sizes = [row for row in rows if row["what"] != "feature"]
    return {
        "title": "Ablations of feature and data",
        "n": len(answers),
        "rows": rows,
        "finding": "AUC by feature: "
        + ", ".join(f"{name} {auc[name]:.3f}" for name in features)
        + "; by pairs of answers: "
        + (", ".join(f"{row['name']} {row['auc']:.3f}" for row in sizes) or "too few")
        + ".",
    }


def compare_labels(args, mined: list[dict], tokenizer) -> dict[tuple[bool, int], int]:
    """How many mined tokens are (right by the grammar, unimportant by mining). Raises InputError for answers
    to other problems than those of --mined_seed."""
    problem_of, found = {}, {(truth, mark): 0 for truth in (True, False) for mark in (0, 1)}
    for seed in args.mined_seed:
        problem_of |= {p.question: p for p, _ in zip(problems(seed, held_out=False), range(5000))}
    for item in mined:
        problem = problem_of.get(decode(tokenizer, item["prompt_tokens"][1:], at_start=True).strip())
        if problem is None:
            raise InputError(
                f"{args.mined} is of other problems than those of --mined_seed {args.mined_seed}."
            )
        for place, mark in enumerate(item["labels"]):
            if mark >= 0:
                text = decode(tokenizer, item["tokens"][: place + 1])
                error = check(problem, text).first_error
                found[error is None or error >= len(text), mark] += 1

    return found


def autojudge(args) -> dict:
    """Experiment 8: mined labels against the grammar's, and what heads trained on either are worth."""
    target, tokenizer = load_target(args)
    mined = read_made([args.mined], "scripts/mine_important_tokens.py")
    if not all("tokens" in item for item in mined):
        raise InputError(
            f"{args.mined} holds annotated answers; autojudge needs what mine_important_tokens.py wrote."
        )

    found = compare_labels(args, mined, tokenizer)
    head, path = train_head(args, target, tokenizer, mined, "autojudge")

    questions, rows = load_questions("demo", None, args.limit or 200, args.seed), []
    variants = [Variant("plain"), Variant("standard"), *(Variant("judge", delta) for delta in DELTAS)]
    for kind, judge in (("judge", args.judge_path), ("autojudge", path)):
        records = bench_of(args, questions, f"autojudge_{kind}", judge_path=judge).answer_all(
            questions, variants
        )
        rows += [{"head": kind, **row} for row in summary_rows(records, variants)[2:]]

    total, auc = sum(found.values()), head.info["held_out"]["auc"]
    important = (found[True, 0] + found[False, 0]) / total
    agree = (found[True, 1] + found[False, 0]) / total
    wrong = found[False, 0] + found[False, 1]
    labelled = {"right, unimportant": found[True, 1], "wrong, important": found[False, 0],
                "right, important": found[True, 0], "wrong, unimportant": found[False, 1]}  # fmt: skip
    return {
        "title": "AutoJudge's mining",
        "n": len(questions),
        "rows": rows,
        "labels": labelled,
        "auc": auc,
        "mismatches": total,
        "important": important,
        "agreement": agree,
        "finding": f"{important:.1%} of {total} mismatches are important; the head's AUC "
        f"on mined labels is {auc:.3f}; mined labels agree with the grammar's "
        f"on {agree:.1%}: of {wrong} wrong tokens {found[False, 1]} changed "
        f"no final answer, of {total - wrong} right ones {found[True, 0]} did.",
    }


def rule_cost(args) -> dict:
    """What judge and rule cost inside the verification graph: every rule's graph in turn, at one position;
    medians."""
    questions, times = load_questions("demo", None, 1, args.seed), {name: [] for name in RULES}
    bench, n = bench_of(args, questions, "rule_cost"), args.limit or 3000
    engines = {name: bench.engine(Variant(name)) for name in RULES}
    for _ in range(n):
        for name, engine in engines.items():
            verify, buffers = engine.verify_steps[args.speculate_k]
            buffers.pos.fill_(100)
            began = time.perf_counter()
            with torch.inference_mode():
                verify(
                    engine.target, engine.head, buffers, engine.settings, engine.visible(256), engine.markers
                ).tolist()
            times[name].append(time.perf_counter() - began)

    base = torch.tensor(times["standard"]).median()
    rows = [
        {
            "rule": name,
            "milliseconds": 1e3 * torch.tensor(found).median().item(),
            "added": (torch.tensor(found).median() / base - 1).item(),
        }
        for name, found in times.items()
    ]
    return {"title": f"Time of a verification of {args.speculate_k + 1} rows by rule", "n": n, "rows": rows,
            "finding": f"Beside {1e3 * base:.2f} ms of standard verification the rules add "
            + ", ".join(f"{row['rule']} {row['added']:+.1%}" for row in rows[1:]) + "."}  # fmt: skip


TRIED = ("none", "int8", "fp8", "int4", "int4/128")


def answer_quantised(args, questions, name: str, judge: Path, plain: dict | None) -> dict:
    """Rows by rule of a quantised target with a judge, and the shares that plain and the judge have right.
    plain: what this gave for another judge; plain and standard decoding are not done again then."""
    scheme = scheme_named(name)
    flags = {"mode": scheme.mode, "group_size": scheme.group_size} if scheme else {}
    variants = [Variant("judge", DELTA)]
    if plain is None:
        variants = [Variant("plain"), Variant("standard"), *variants]
    place = name.replace("/", "_")
    kept = f"quantised_{place}_{'own' if judge.stem == f'quantised_{place}' else 'first'}"
    records = bench_of(args, questions, kept, judge_path=judge, **flags).answer_all(questions, variants)
    found = {row["rule"].partition("=")[0]: row for row in summary_rows(records, variants)}
    return found | {"shares": shares_of(records, "plain"), "judged": shares_of(records, label(variants[-1]))}


def quantised_row(plain: dict, found: dict, base: dict, judge: dict) -> dict:
    """A row of the table. plain, found: from `answer_quantised`; base: shares of the unquantised target;
    judge: what its columns say of it."""
    change, lost = difference(plain["shares"], base), difference(found["judged"], plain["shares"])
    return {
        "plain": plain["plain"]["accuracy"],
        "change": change["difference"],
        "change_interval": change["difference_interval"],
        "standard_m": plain["standard"]["mean_accepted"],
        **judge,
        "judge_m": found["judge"]["mean_accepted"],
        "judge": found["judge"]["accuracy"],
        "lost": lost["lost"],
        "won": lost["won"],
    }


def what_quantising_does(rows: list[dict]) -> str:
    """The finding in one sentence or two."""
    first, others = rows[0], [row for row in rows[1:] if row["judge_trained_on"] != "this target"]
    said = [
        f"{row['mode']} {row['perplexity'] / first['perplexity'] - 1:+.2%}, "
        f"{100 * row['change']:+.1f} points and m* {row['judge_m']:.1f}"
        for row in others
    ]
    as_it_is = [row["auc"] for row in others]
    anew = [row["auc"] for row in rows[1:] if row["judge_trained_on"] == "this target"]
    return (
        "Perplexity, accuracy and the judge's m* beside the unquantised target's "
        f"({first['perplexity']:.4f}, {first['plain']:.1%}, {first['judge_m']:.1f}): {'; '.join(said)}. "
        f"Its head has AUC {first['auc']:.4f} there, {min(as_it_is):.4f} to {max(as_it_is):.4f} on "
        f"quantised targets, where heads of their own reach {min(anew):.4f} to {max(anew):.4f}."
    )


def held_out_auc(head, target, tokenizer, answers: list[dict], cache: Path) -> float:
    """AUC of a head on the held-out prompts of `train_judge`, with features of this target."""
    s = TrainSettings()
    encoded = encode_items(tokenizer, answers, False, target.args.vocab_size)
    shards = extract_features([target], encoded, s.rows, cache)
    labels = shards.labels(encoded, s.policy)
    test = split_prompts(torch.tensor([answer.key for answer in encoded]), s.seed, s.held_out)[0][
        shards.answer
    ] & (labels >= 0)
    return area_under_curve(torch.cat([head.score(x) for x in shards])[test], labels[test])


def quantised(args) -> dict:
    """Quantised targets, with a head that was trained on the unquantised target and with one of their own."""
    tokenizer, rows, n = load_tokenizer(DEMO / "target"), [], args.limit or 300
    answers = read_made(args.judge_data, "scripts/train_demo.py --stages judge")
    pairs = [[tokenizer.encode(part) for part in pair] for pair in read_pairs("demo", args.seed, 300)]
    questions, base = load_questions("demo", None, n, args.seed), None
    for name in TRIED:
        scheme = scheme_named(name)
        target, _ = load_target(args, scheme)
        known = {"mode": name, "perplexity": perplexity(target, tokenizer.prefix, pairs)}
        _, own = train_head(args, target, tokenizer, answers, f"quantised_{name.replace('/', '_')}")
        heads = {"the unquantised target": args.work / "quantised_none.safetensors", "this target": own}
        if name == "none":
            del heads["the unquantised target"]

        plain = None  # with what stands for standard: another head changes neither
        for trained_on, path in heads.items():
            found = answer_quantised(args, questions, name, path, plain)
            plain = plain or found
            base = base or plain["shares"]
            head = load_judge(path, target)
            auc = held_out_auc(head, target, tokenizer, answers, args.work / "features")
            judge = {"judge_trained_on": trained_on, "auc": auc}
            rows.append(known | quantised_row(plain, found, base, judge))

    return {"title": "Quantised targets", "n": n, "rows": rows, "finding": what_quantising_does(rows)}


EXPERIMENTS = {
    f.__name__: f
    for f in (
        judge_table,
        m_sweep,
        pareto,
        equal_risk,
        other_text,
        out_of_domain,
        self_correction,
        label_policies,
        ablations,
        autojudge,
        rule_cost,
        quantised,
    )
}


def as_markdown(result: dict) -> str:
    """Title, finding, table, and how it was made."""
    # a rule's label says it all
    hidden = {"by_family", "name"} if any("rule" in row for row in result["rows"]) else set()
    names = [
        name for name in dict.fromkeys(key for row in result["rows"] for key in row) if name not in hidden
    ]

    def cell(value) -> str:
        if isinstance(value, (list, tuple)):
            return " to ".join(cell(x) for x in value)
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [f"# {result['title']}", "", result["finding"], ""]
    lines.append("| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    lines.append("|" + "---|" * len(names))
    lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in result["rows"]]
    for case in result.get("examples", []):
        lines += ["", f"> {case['prompt']} **{case['forced'].strip()}**{case['continued']}"]
        lines += [f"> ({'right' if case['right'] else 'wrong'})"]

    made = f"`{result['command']}`; {result['machine']}; commit {result['commit']}."
    lines += ["", f"n {result['n']}, seed {result['seed']}; {made}"]
    if "interval" in names:
        lines[-1] += (
            " Intervals are 95%: `interval` is Wilson's; `difference` is to plain on the same problems."
        )

    return "\n".join(lines) + "\n"


def check_args(args: argparse.Namespace, names: list[str]) -> None:
    """Raises InputError for what cannot run or be written, before there is any work."""
    if "rule_cost" in names and not args.compile:
        raise InputError("rule_cost is about compiled graphs; give --compile.")
    name_models(args)
    take_sampling(args)
    for flag, folder in (("--work", args.work), ("--results", args.results)):
        check_folder(folder, flag)
    inputs = [*args.judge_data, args.mined, *filter(None, [args.judge_path])]
    for path in [args.results / f"{name}.{kind}" for name in names for kind in ("json", "md", "png")]:
        if args.results.is_dir():
            check_writable(path, "--results")
        check_not_input(path, inputs, "--results")
    args.device = pick_device(args.device)


def run(args: argparse.Namespace) -> None:
    """Runs the experiments asked for and writes their three files each."""
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    check_args(args, names)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in names:
        made = {"machine": machine(), "commit": commit()}
        result = EXPERIMENTS[name](args)
        result |= {
            "name": name,
            "seed": args.seed,
            **made,
            "command": f"python scripts/experiments.py {name} {args.flags}".strip(),
        }
        write_file(args.results / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        write_file(args.results / f"{name}.md", as_markdown(result).encode())
        figures.draw(result, args.results / f"{name}.png")
        print(f"{name}: {result['finding']}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", choices=[*EXPERIMENTS, "all"], help="which, see above")
    add_flags(
        parser,
        limit={"help": "fewer problems, for a trial (default: as many as each experiment names)"},
        seed={"type": whole(0, 2**62), "help": "another seed, other problems"},
    )
    add("--max_harm", type=number(0, 1), default=0.02, help="of equal_risk")
    training = DEMO.with_name("demo-training")
    made = sorted(training.glob("judge_data_*.jsonl"))
    add(
        "--judge_data",
        type=Path,
        nargs="+",
        default=made[-1:] or [training / "judge_data.jsonl"],
        help="what train_demo.py --stages judge writes and trains on; more from build_judge_data.py",
    )
    add(
        "--mined",
        type=Path,
        default=training / "mined.jsonl",
        help="what mine_important_tokens.py wrote of demo problems",
    )
    add(
        "--mined_seed",
        type=whole(0, 2**62),
        nargs="+",
        default=[2026],
        help="the --seed that they were mined with",
    )
    kept = {"default": training / "experiments", "help": "where answers are kept, and resumed from"}
    add_flags(parser, work=kept)
    add("--results", type=Path, default=ROOT / "benchmarks", help="where NAME.json, NAME.md and NAME.png go")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    args.flags = " ".join(word for word in argv if word != args.name)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    run_script("experiments.py", lambda: run(args))


if __name__ == "__main__":
    main()
