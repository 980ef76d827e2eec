"""Accuracy, accepted tokens and speed of several verification rules on the same held-out problems, in one run.

    python scripts/evaluate.py --task demo --limit 500 --verify plain,standard,judge,kl,topk,typical --compile
    python scripts/evaluate.py --task demo --limit 500 --verify topk --threshold topk=2,topk=3,topk=5

Every problem is answered by every rule before the next problem, so that all rules see the machine in the same state.
One JSON line an answer goes to --out and is flushed; a killed run resumes from there. The task `demo` checks the final
answer and every step.
"""

import argparse
import json
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from generate import DEMO, Engine, Parser, Settings, answer_text, as_json, check_settings, load_pair, pick_device
from judge import RULES, fingerprint
from model import DTYPES, InputError, report_progress
from scripts.demo_task import check, problems
from tokenizer import load_tokenizer

HELD_OUT_SEED = 2026
PEERS = {"hf": "transformers generate", "hf-assisted": "transformers generate with assistant_model"}


def parse_rules(names: str, thresholds: str | None) -> list[tuple[str, float | None]]:
    """Pairs (rule, threshold or None for its default) from "a,b" and "b=1,b=2"; InputError for what is unknown."""
    given: dict[str, list[float]] = {}
    for part in filter(None, (thresholds or "").split(",")):
        name, _, value = part.partition("=")
        try:
            given.setdefault(name, []).append(float(value))
        except ValueError:
            raise InputError(f"--threshold {part} is not of the form rule=number, as in topk=3.") from None
    rules = []
    for name in names.split(","):
        if name not in ("plain", *RULES, *PEERS):
            raise InputError(f"--verify {name} is not a rule; known are {', '.join(('plain', *RULES, *PEERS))}.")
        rules += [(name, value) for value in given.pop(name, [None])]
    if given:
        raise InputError(f"--threshold names {next(iter(given))}, which --verify does not.")
    return rules


def load_demo(args: argparse.Namespace) -> list[dict]:
    """The first --limit held-out problems: index, question, and the problem itself to check with."""
    stream = problems(HELD_OUT_SEED, held_out=True, family=args.family)
    return [{"index": i, "question": p.question, "problem": p} for i, p in enumerate(islice(stream, args.limit))]


def score_demo(item: dict, text: str) -> dict:
    verdict = check(item["problem"], text)
    return {"family": item["problem"].family, "right": verdict.right, "answer_right": verdict.answer_right,
            "first_error": verdict.first_error}  # fmt: skip


TASKS = {"demo": (load_demo, score_demo)}


def label(rule: tuple[str, float | None]) -> str:
    return rule[0] if rule[1] is None else f"{rule[0]}={rule[1]:g}"


def make_engines(args: argparse.Namespace, rules: list, models: tuple, tokenizer, length: int) -> dict:
    """One engine a rule over the same weights and caches."""
    target, draft, head = models
    engines = {}
    for rule in rules:
        name, threshold = rule
        if name in PEERS:
            engines[rule] = peer(args, name, tokenizer)
            continue
        settings = Settings(name, threshold, args.speculate_k, args.temperature, args.top_k, args.compile)
        engines[rule] = Engine(target, draft, head, settings, tokenizer.stop_ids, length)
        print(f"{label(rule)}: warmed up in {engines[rule].warm_up():.1f} s", file=sys.stderr)
    return engines


def peer(args: argparse.Namespace, name: str, tokenizer):
    """transformers on the same folders: (prompt, max_new_tokens) -> (tokens, seconds of prefill, seconds of decoding)."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(f"--verify {name} needs the package transformers; pip install -r requirements-dev.txt.") from None
    disable_progress_bar()
    load = {"dtype": DTYPES[args.precision], "local_files_only": True}
    target = AutoModelForCausalLM.from_pretrained(args.checkpoint_path, **load).to(args.device).eval()
    more = {"do_sample": False, "eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.stop_ids[0]}
    if name == "hf-assisted":
        draft = AutoModelForCausalLM.from_pretrained(args.draft_checkpoint_path, **load).to(args.device).eval()
        draft.generation_config.num_assistant_tokens = args.speculate_k
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        more["assistant_model"] = draft

    @torch.inference_mode()
    def run(prompt: list[int], max_new_tokens: int) -> tuple[list[int], float, float]:
        ids, seconds = torch.tensor([prompt], device=args.device), []
        for length in (1, max_new_tokens):  # the first token alone stands for the prefill, which our figures leave out
            started = time.monotonic()
            out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **more)
            seconds.append(time.monotonic() - started)
        return out[0, len(prompt) :].tolist(), seconds[0], max(seconds[1] - seconds[0], 1e-9)

    return run


def answer(engine, rule: tuple, item: dict, prompt: list[int], args: argparse.Namespace, tokenizer) -> dict:
    """One problem by one rule: the engine's JSON record with what the task's checker says."""
    if rule[0] in PEERS:
        tokens, prefill, seconds = engine(prompt, args.max_new_tokens)
        text = answer_text(tokenizer, tokens)
        record = {"prompt_tokens": len(prompt), "tokens": tokens, "text": text, "seconds_prefill": prefill,
                  "seconds_decode": seconds, "rounds": 0, "accepted": 0, "accepted_by_rule": 0, "drafted": 0}  # fmt: skip
    else:
        result = engine.generate(prompt, args.max_new_tokens, seed=item["index"])
        text = answer_text(tokenizer, result.tokens)
        record = json.loads(as_json(engine, result, text))
    return {
        "index": item["index"],
        "rule": label(rule),
        "question": item["question"],
        **record,
        **TASKS[args.task][1](item, text),
    }


def read_results(path: Path, header: dict) -> list[dict]:
    """The answers of an earlier run with the same settings; InputError when the file is of other settings."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not a results file of this script: {error}; name another --out.") from None
    if lines and lines[0] != header:
        differ = [key for key in header if lines[0].get(key) != header[key]]
        raise InputError(f"{path} holds results of other settings ({', '.join(differ)}); name another --out or remove it.")
    if text != whole:
        path.write_text(whole, encoding="utf-8")
    return lines[1:]


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.959964, right / n
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def summarise(records: list[dict], rules: list[str]) -> list[dict]:
    """One row a rule: n, accuracy with its interval, the same by family, m*, tokens/s, ratio to plain."""
    rows, plain_speed = [], None
    for rule in rules:
        mine = [record for record in records if record["rule"] == rule]
        right, rounds = sum(r["right"] for r in mine), sum(r["rounds"] for r in mine)
        speed = sum(len(r["tokens"]) for r in mine) / sum(r["seconds_decode"] for r in mine)
        plain_speed = speed if rule == "plain" else plain_speed
        drafted = sum(r["drafted"] for r in mine)
        families = {f: [r["right"] for r in mine if r["family"] == f] for f in sorted({r["family"] for r in mine})}
        rows.append({
            "rule": rule, "n": len(mine), "accuracy": right / len(mine), "interval": interval(right, len(mine)),
            "by_family": {f: sum(x) / len(x) for f, x in families.items()},
            "answer_accuracy": sum(r["answer_right"] for r in mine) / len(mine),
            "mean_accepted": sum(r["accepted"] for r in mine) / rounds if drafted else None,
            "by_rule_share": sum(r["accepted_by_rule"] for r in mine) / sum(len(r["tokens"]) for r in mine),
            "tokens_per_second": speed, "ratio": speed / plain_speed if plain_speed else None,
        })  # fmt: skip
    return rows


def print_table(rows: list[dict]) -> None:
    print("rule          n     right    95% interval   answer    m*   by rule  tokens/s  x plain")
    for row in rows:
        low, high = row["interval"]
        accepted = f"{row['mean_accepted']:5.2f}" if row["mean_accepted"] is not None else "    -"
        ratio = f"{row['ratio']:7.2f}" if row["ratio"] else "      -"
        print(
            f"{row['rule']:12} {row['n']:4} {row['accuracy']:8.1%}  {low:6.1%} - {high:6.1%} {row['answer_accuracy']:8.1%} "
            f"{accepted} {row['by_rule_share']:8.1%} {row['tokens_per_second']:9.1f} {ratio}"
        )


def evaluate(args: argparse.Namespace) -> list[dict]:
    """Answers what is not yet in --out, rule by rule on each problem, and returns the summary rows."""
    args.device = pick_device(args.device)
    rules = parse_rules(args.verify, args.threshold)
    for name, threshold in rules:
        if name not in PEERS:
            check_settings(Settings(name, threshold, args.speculate_k, args.temperature, args.top_k), True, True)
    items = TASKS[args.task][0](args)
    tokenizer = load_tokenizer(args.checkpoint_path)
    needs_judge = any(name == "judge" for name, _ in rules)
    target, draft, head = load_pair(
        args.checkpoint_path, args.draft_checkpoint_path, args.judge_path if needs_judge else None, args.device,
        DTYPES[args.precision],
    )  # fmt: skip
    header = {"task": args.task, "family": args.family, "target": fingerprint(target), "speculate_k": args.speculate_k,
              "temperature": args.temperature, "top_k": args.top_k, "max_new_tokens": args.max_new_tokens,
              "precision": args.precision, "compile": args.compile, "torch": torch.__version__,
              "judge_threshold": head.threshold if head else None}  # fmt: skip
    records = read_results(args.out, header) if args.out else []
    done = {(record["rule"], record["index"]) for record in records}
    todo = [(item, rule) for item in items for rule in rules if (label(rule), item["index"]) not in done]
    if todo:
        prompts = {item["index"]: [tokenizer.bos_id, *tokenizer.encode(item["question"])] for item in items}
        length = max(map(len, prompts.values())) + args.max_new_tokens
        engines = make_engines(args, rules, (target, draft, head), tokenizer, length)
        records += answer_all(args, todo, prompts, engines, tokenizer, header)
    wanted = {label(rule) for rule in rules}
    kept = [r for r in records if r["index"] < args.limit and r["rule"] in wanted]
    return summarise(kept, [label(rule) for rule in rules])


def answer_all(args, todo: list, prompts: dict, engines: dict, tokenizer, header: dict) -> list[dict]:
    """Runs the open (problem, rule) pairs, writing each as it is done."""
    records, started, shown = [], time.monotonic(), 0.0
    with open(args.out or os.devnull, "a", encoding="utf-8") as out:
        if not (args.out and out.tell()):
            print(json.dumps(header), file=out, flush=True)
        for number, (item, rule) in enumerate(todo):
            records.append(answer(engines[rule], rule, item, prompts[item["index"]], args, tokenizer))
            print(json.dumps(records[-1]), file=out, flush=True)
            shown = report_progress("answers", number + 1, len(todo), started, shown)
    if shown:
        print(file=sys.stderr)
    return records


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="demo")
    add("--family", choices=["story", "list"], help="only this family of demo problems")
    add("--limit", type=int, default=100, help="number of problems")
    add("--verify", default="plain,standard,judge,kl,topk,typical", help="rules, and hf and hf-assisted (transformers)")
    add("--threshold", help="rule=number, ...; several for one rule run it several times")
    add("--checkpoint_path", type=Path, default=DEMO / "target")
    add("--draft_checkpoint_path", type=Path, default=DEMO / "draft")
    add("--judge_path", type=Path, default=DEMO / "judge.safetensors")
    add("--speculate_k", type=int, default=16)
    add("--max_new_tokens", type=int, default=200)
    add("--temperature", type=float, default=0.0)
    add("--top_k", type=int)
    add("--compile", action="store_true")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=DTYPES, default="fp32")
    add("--out", type=Path, help="results, JSON lines; resumed when it exists")
    add("--json", action="store_true", help="print the summary as one JSON object")
    args = parser.parse_args(argv)
    try:
        rows = evaluate(args)
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps({"task": args.task, "rows": rows}))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
