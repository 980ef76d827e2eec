"""Accuracy, accepted tokens and speed of several verification rules on the same held-out problems, in one run.

    python scripts/evaluate.py --task demo --limit 500 --verify plain,standard,judge,kl,topk,typical --compile
    python scripts/evaluate.py --task demo --limit 500 --verify topk --threshold topk=2,topk=3,topk=5

Every problem is answered by every rule before the next problem, so that all rules see the machine in the same state.
One JSON line an answer goes to --out and is flushed; a killed run resumes from there. The task `demo` checks the final
answer and every step.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from generate import DEMO, Engine, Settings, answer_text, as_json, check_settings, load_pair
from judge import RULES
from model import DTYPES, InputError, Parser, Progress, Transformer, check_writable, pick_device, run_script
from scripts.demo_task import check, problems
from tokenizer import load_tokenizer

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
        raise InputError(f"--threshold names {next(iter(given))}, which --verify does not, or twice.")
    labels = [label(rule) for rule in rules]
    if len(set(labels)) < len(labels):
        raise InputError(f"--verify or --threshold names {max(labels, key=labels.count)} twice.")
    return rules


def load_demo(args: argparse.Namespace) -> list[dict]:
    """The first --limit held-out problems: index, question, and the problem itself to check with."""
    stream = problems(args.seed, held_out=True, family=args.family)
    return [{"index": i, "question": p.question, "problem": p} for i, p in enumerate(islice(stream, args.limit))]


def score_demo(item: dict, text: str) -> dict:
    verdict = check(item["problem"], text)
    return {"family": item["problem"].family, "right": verdict.right, "answer_right": verdict.answer_right,
            "first_error": verdict.first_error}  # fmt: skip


TASKS = {"demo": (load_demo, score_demo)}


def label(rule: tuple[str, float | None]) -> str:
    return rule[0] if rule[1] is None else f"{rule[0]}={rule[1]:g}"


def settings_for(args: argparse.Namespace, rule: tuple[str, float | None]) -> Settings:
    return Settings(*rule, args.speculate_k, args.temperature, args.top_k, args.compile, args.min_prob)


def make_engines(args: argparse.Namespace, rules: list, models: tuple, tokenizer, length: int) -> dict:
    """One engine a rule over the same weights and caches."""
    target, draft, head = models
    engines = {}
    for rule in rules:
        if rule[0] in PEERS:
            engines[rule] = peer(args, rule[0], tokenizer)
            continue
        engines[rule] = Engine(target, draft, head, settings_for(args, rule), tokenizer.stop_ids, length)
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
    """The answers of an earlier run with the same settings; InputError when the file is of other settings or foreign."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a killed run may leave half a line
    first = json.dumps(header).encode()
    try:
        lines = [json.loads(line) for line in whole.split(b"\n") if line]
        if not whole and not first.startswith(text) or not all(isinstance(line, dict) for line in lines):
            raise ValueError("no header")
    except ValueError as error:
        raise InputError(f"{path} is not a results file of this script ({error}); name another --out.") from None
    if lines and lines[0] != header:
        differ = [key for key in header if lines[0].get(key) != header[key]]
        raise InputError(f"{path} holds results of other settings ({', '.join(differ)}); name another --out or remove it.")
    if text != whole:
        os.truncate(path, len(whole))
    return lines[1:]


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.959964, right / n
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def summarise(records: list[dict], rules: list[str]) -> list[dict]:
    """One row a rule: n, accuracy with its interval, the same by family, m*, tokens/s, ratio to plain."""
    rows = []
    for rule in rules:
        mine = [record for record in records if record["rule"] == rule]
        right, rounds = sum(r["right"] for r in mine), sum(r["rounds"] for r in mine)
        timed = sum(len(r["tokens"]) - (rule in PEERS) for r in mine)  # the peers' first token counts as prefill
        speed = timed / sum(r["seconds_decode"] for r in mine)
        drafted = sum(r["drafted"] for r in mine)
        families = {f: [r["right"] for r in mine if r["family"] == f] for f in sorted({r["family"] for r in mine})}
        rows.append({
            "rule": rule, "n": len(mine), "accuracy": right / len(mine), "interval": interval(right, len(mine)),
            "by_family": {f: sum(x) / len(x) for f, x in families.items()},
            "answer_accuracy": sum(r["answer_right"] for r in mine) / len(mine),
            "mean_accepted": sum(r["accepted"] for r in mine) / rounds if drafted else None,
            "by_rule_share": sum(r["accepted_by_rule"] for r in mine) / sum(len(r["tokens"]) for r in mine),
            "tokens_per_second": speed,
        })  # fmt: skip
    plain_speed = next((row["tokens_per_second"] for row in rows if row["rule"] == "plain"), None)
    return [row | {"ratio": row["tokens_per_second"] / plain_speed if plain_speed else None} for row in rows]


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
    rules = parse_rules(args.verify, args.threshold)
    check_args(args, rules)
    items, tokenizer = TASKS[args.task][0](args), load_tokenizer(args.checkpoint_path)
    judge = args.judge_path if any(name == "judge" for name, _ in rules) else None
    models = load_pair(args.checkpoint_path, args.draft_checkpoint_path, judge, args.device, DTYPES[args.precision])
    header = make_header(args, *models[:2])
    records = read_results(args.out, header) if args.out else []
    done = {(record["rule"], record["index"]) for record in records}
    todo = [(item, rule) for item in items for rule in rules if (label(rule), item["index"]) not in done]
    if todo:
        prompts = {item["index"]: [tokenizer.bos_id, *tokenizer.encode(item["question"])] for item in items}
        length = max(map(len, prompts.values())) + args.max_new_tokens
        engines = make_engines(args, rules, models, tokenizer, length)
        records += answer_all(args, todo, prompts, engines, tokenizer, header)
    wanted = {label(rule) for rule in rules}
    kept = [r for r in records if r["index"] < args.limit and r["rule"] in wanted]
    return summarise(kept, [label(rule) for rule in rules])


def check_args(args: argparse.Namespace, rules: list[tuple[str, float | None]]) -> None:
    """Raises InputError for what cannot run, before anything is loaded."""
    args.device = pick_device(args.device)
    if args.limit < 1:
        raise InputError(f"--limit {args.limit} is too small: at least 1 problem.")
    if args.out:
        check_writable(args.out, "--out")
    for rule in rules:
        if rule[0] not in PEERS:
            check_settings(settings_for(args, rule), True, True)
        elif args.temperature:
            raise InputError(f"--verify {rule[0]} is greedy; leave --temperature out.")


def make_header(args: argparse.Namespace, target: Transformer, draft: Transformer) -> dict:
    """What a results file must agree on for a run to go on with it."""
    judge = hashlib.sha256(args.judge_path.read_bytes()).hexdigest()[:16] if args.judge_path.is_file() else None
    return {"task": args.task, "family": args.family, "seed": args.seed, "target": target.fingerprint,
            "draft": draft.fingerprint, "judge": judge,
            "speculate_k": args.speculate_k, "temperature": args.temperature, "top_k": args.top_k, "min_prob": args.min_prob,
            "max_new_tokens": args.max_new_tokens, "precision": args.precision, "compile": args.compile,
            "device": str(args.device), "torch": torch.__version__}  # fmt: skip


def answer_all(args, todo: list, prompts: dict, engines: dict, tokenizer, header: dict) -> list[dict]:
    """Runs the open (problem, rule) pairs, writing each as it is done."""
    records, progress = [], Progress("answers", len(todo))
    with open(args.out or os.devnull, "a", encoding="utf-8") as out:
        if not (args.out and out.tell()):
            print(json.dumps(header), file=out, flush=True)
        for item, rule in todo:
            records.append(answer(engines[rule], rule, item, prompts[item["index"]], args, tokenizer))
            print(json.dumps(records[-1]), file=out, flush=True)
            progress.step()
    return records


def report(args: argparse.Namespace) -> None:
    rows = evaluate(args)
    if args.json:
        print(json.dumps({"task": args.task, "rows": rows}))
    else:
        print_table(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="demo")
    add("--family", choices=["story", "list"], help="only this family of demo problems")
    add("--seed", type=int, default=2026, help="another seed, other held-out problems (to choose a threshold on, say)")
    add("--limit", type=int, default=100, help="number of problems")
    add("--verify", default="plain,standard,judge,kl,topk,typical", help="rules, and hf and hf-assisted (transformers)")
    add("--threshold", help="rule=number, ...; several for one rule run it several times")
    add("--checkpoint_path", type=Path, default=DEMO / "target")
    add("--draft_checkpoint_path", type=Path, default=DEMO / "draft")
    add("--judge_path", type=Path, default=DEMO / "judge.safetensors")
    add("--min_prob", type=float, default=0.0)
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
    run_script("evaluate.py", lambda: report(args))


if __name__ == "__main__":
    main()
