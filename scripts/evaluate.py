"""Accuracy, accepted tokens and speed of several verification rules on the same questions, in one run.

    python scripts/evaluate.py --limit 500 --verify plain,standard,judge,kl,topk,typical --compile
    python scripts/evaluate.py --questions gsm8k.jsonl --checker number --verify topk --threshold topk=2,topk=3,topk=5

Every question is answered by every rule before the next question, so that all rules see the machine in the same state.
One JSON line an answer goes to --out and is flushed; a killed run resumes from there. What questions may be and how they
are checked is in scripts/tasks.py; on demo problems (the default) an answer is right when every step is.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from generate import (
    DEMO,
    Engine,
    Settings,
    answer_text,
    as_json,
    capacity_for,
    check_settings,
    encode_prompt,
    load_pair,
    read_k,
    settings_of,
)
from judge import RULES, JudgeHead
from model import (
    DTYPES,
    InputError,
    ModelArgs,
    Parser,
    Progress,
    Transformer,
    check_writable,
    pick_device,
    run_dtype,
    run_script,
)
from quantize import Scheme, add_mode_flags, scheme_of
from scripts.tasks import CHECKERS, Question, add_question_flags, questions_of
from scripts.token_details import as_fields, cuts, token_details
from tokenizer import load_tokenizer

PEERS = {"hf": "transformers generate", "hf-assisted": "transformers generate with assistant_model"}


class Variant(NamedTuple):
    """A rule with its threshold (None: its default) and its M (None: --speculate_k)."""

    name: str
    threshold: float | None = None
    k: int | str | None = None


def parse_rules(names: str, thresholds: str | None) -> list[Variant]:
    """Variants from "a,b,b@8" and "b=1,b=2"; InputError for what is unknown."""
    given: dict[str, list[float]] = {}
    for part in filter(None, (thresholds or "").split(",")):
        name, _, value = part.partition("=")
        try:
            given.setdefault(name, []).append(float(value))
        except ValueError:
            raise InputError(f"--threshold {part} is not of the form rule=number, as in topk=3.") from None
    rules, taken = [], set()
    for part in names.split(","):
        name, _, k = part.partition("@")
        if name not in ("plain", *RULES, *PEERS):
            raise InputError(f"--verify {name} is not a rule; known are {', '.join(('plain', *RULES, *PEERS))}.")
        number = int(k) if k.isascii() and k.isdecimal() else None
        if k and not (number or k == "auto"):
            raise InputError(f"--verify {part} must name M after the @, a whole number or auto.")
        rules += [Variant(name, value, number or k or None) for value in given.get(name, [None])]
        taken.add(name)
    given = {name: values for name, values in given.items() if name not in taken}
    if given:
        raise InputError(f"--threshold names {next(iter(given))}, which --verify does not.")
    labels = [label(rule) for rule in rules]
    if len(set(labels)) < len(labels):
        raise InputError(f"--verify or --threshold names {max(labels, key=labels.count)} twice.")
    return rules


def label(rule: Variant) -> str:
    return rule.name + ("" if rule.threshold is None else f"={rule.threshold:g}") + (f"@{rule.k}" if rule.k else "")


class Bench:
    """The pair, one engine a rule, and a file of answers that is resumed: what answers questions by several rules.

    args: a command line with the flags of `add_engine_flags`; args.out may be None. largest_k: of the variants to come.
    All thresholds of a rule share one engine, and all engines the weights and caches.
    """

    def __init__(self, args: argparse.Namespace, questions: list[Question], needs_judge: bool, largest_k: int = 0):
        self.args, self.tokenizer, self.engines = args, load_tokenizer(args.checkpoint_path), {}
        self.prompts = {question.index: encode_prompt(args, self.tokenizer, question.prompt) for question in questions}
        self.length = max(map(len, self.prompts.values())) + args.max_new_tokens
        context = ModelArgs.from_folder(args.checkpoint_path).max_position
        if self.length > context:
            raise InputError(
                f"A prompt and --max_new_tokens {args.max_new_tokens} need {self.length} tokens, but the context is {context}."
            )
        judge, dtype = args.judge_path if needs_judge else None, run_dtype(args.precision, args.device)
        capacity = capacity_for(self.length, max(largest_k, settings_for(args, Variant("standard")).speculate_k))
        self.models = load_pair(
            args.checkpoint_path, args.draft_checkpoint_path, judge, args.device, dtype, capacity, schemes_of(args)
        )
        for model in self.models[:2]:
            if model is not None:
                model.setup_caches(capacity)  # at once for the largest M: engines come one by one, and share them
        header, head = make_header(args, *self.models), self.models[2]
        records = read_results(args.out, header) if args.out else []
        self.done = {(record.get("rule"), record.get("index")): record for record in records}
        stale = [r["threshold"] for (rule, _), r in self.done.items() if head and str(rule).split("@")[0] == "judge"]
        if any(threshold != head.threshold for threshold in stale):
            raise InputError(
                f"{args.out} holds answers at the judge's threshold {stale[0]}, which is now {head.threshold}; remove it."
            )
        self.file = open(args.out or os.devnull, "a", encoding="utf-8")  # noqa: SIM115 open as long as there are answers
        if not (args.out and self.file.tell()):
            self.write(header)

    def write(self, line: dict) -> None:
        print(json.dumps(line), file=self.file, flush=True)

    def engine(self, rule: Variant):
        """The engine for a rule, set to its threshold; made and warmed up at first use."""
        key = rule.name, rule.k
        if key not in self.engines and rule.name in PEERS:
            self.engines[key] = peer(self.args, rule.name, self.tokenizer)
        elif key not in self.engines:
            engine = Engine(*self.models, settings_for(self.args, rule), self.tokenizer.stop_ids, self.length)
            print(f"{label(rule)}: warmed up in {engine.warm_up():.1f} s", file=sys.stderr)
            self.engines[key] = engine
        if rule.name not in PEERS and rule.name != "plain":
            self.engines[key].set_threshold(rule.threshold)
        return self.engines[key]

    def answer(self, question: Question, rule: Variant) -> dict:
        """The record of one question by one rule: from the file, or decoded now and written to it."""
        if (label(rule), question.index) not in self.done:
            record = answer(self.engine(rule), rule, question, self.prompts[question.index], self.args, self.tokenizer)
            if getattr(self.args, "details", False):
                details = token_details(*self.models, self.prompts[question.index], record["tokens"])
                record |= as_fields(details, self.tokenizer, record["tokens"])
            self.done[label(rule), question.index] = record
            self.write(record)
        return self.done[label(rule), question.index]

    def answer_all(self, questions: list[Question], rules: list[Variant]) -> list[dict]:
        """The records of all questions by all rules, question by question."""
        todo = [(q, rule) for q in questions for rule in rules if (label(rule), q.index) not in self.done]
        for rule in dict.fromkeys(rule for _, rule in todo):
            self.engine(rule)  # warm-ups first: no answer waits for another rule's
        progress = Progress("answers", len(todo))
        for question, rule in todo:
            self.answer(question, rule)
            progress.step()
        return [self.done[label(rule), question.index] for question in questions for rule in rules]


def settings_for(args: argparse.Namespace, rule: Variant) -> Settings:
    """The settings of the command line for one of its rules."""
    more = {"verify": rule.name, "threshold": rule.threshold, "speculate_k": rule.k or args.speculate_k}
    return settings_of(argparse.Namespace(**vars(args) | more))


def peer(args: argparse.Namespace, name: str, tokenizer):
    """transformers on the same folders: (prompt, max_new_tokens) -> (tokens, seconds of prefill, seconds of decoding)."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(f"--verify {name} needs the package transformers; pip install -r requirements-dev.txt.") from None
    disable_progress_bar()
    load = {"dtype": run_dtype(args.precision, args.device), "local_files_only": True}
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


def answer(engine, rule: Variant, question: Question, prompt: list[int], args: argparse.Namespace, tokenizer) -> dict:
    """One question by one rule: the engine's JSON record with what the checker says."""
    if rule.name in PEERS:
        tokens, prefill, seconds = engine(prompt, args.max_new_tokens)
        text = answer_text(tokenizer, tokens)
        record = {"prompt_tokens": len(prompt), "tokens": tokens, "text": text, "seconds_prefill": prefill,
                  "seconds_decode": seconds, "rounds": 0, "accepted": 0, "accepted_by_rule": 0, "drafted": 0}  # fmt: skip
    else:
        result = engine.generate(prompt, args.max_new_tokens, seed=question.index)
        text = answer_text(tokenizer, result.tokens)
        record = json.loads(as_json(engine, result, text)) | {"origin": "".join(result.origin)}
    checker = CHECKERS[question.checker]
    found = checker.final_answer(question, text)
    reference = str(question.content.answer) if question.checker == "demo" else None
    right = checker.is_right(question, text)
    return {"index": question.index, "rule": label(rule), "family": question.group, "right": right,
            "answer_right": right if reference is None else found == reference, "final_answer": found,
            "question": question.prompt, **record, "cuts": cuts(tokenizer, record["tokens"])}  # fmt: skip


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
        differ = [key for key in header | lines[0] if lines[0].get(key) != header.get(key)]
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
    """Answers what is not yet in --out, rule by rule on each question, and returns the summary rows."""
    rules = parse_rules(args.verify, args.threshold)
    check_args(args, rules)
    questions = questions_of(args)
    largest = max(settings_for(args, rule).speculate_k for rule in rules)
    bench = Bench(args, questions, any(rule.name == "judge" for rule in rules), largest)
    records = bench.answer_all(questions, rules)
    labels = [label(rule) for rule in rules]
    return summarise(records, labels)


def check_args(args: argparse.Namespace, rules: list[Variant]) -> None:
    """Raises InputError for what cannot run, before anything is loaded."""
    name_models(args)
    args.device = pick_device(args.device)
    if args.out:
        check_writable(args.out, "--out")
    for rule in rules:
        if rule.name not in PEERS:
            check_settings(settings_for(args, rule), True, args.judge_path is not None)
        elif settings_for(args, rule).adaptive:
            raise InputError(f"--verify {rule.name} needs a number for --speculate_k.")
        elif args.temperature:
            raise InputError(f"--verify {rule.name} is greedy; leave --temperature out.")
        elif any(schemes_of(args)):
            raise InputError(f"--verify {rule.name} runs the folders as they are; leave --mode and --draft_mode out.")


def make_header(args: argparse.Namespace, target: Transformer, draft: Transformer, head: JudgeHead | None) -> dict:
    """What a results file must agree on for a run to go on with it."""
    weights = [] if head is None else [w.tolist() for w in (head.weight, head.bias, head.draft_weight) if w is not None]
    judge = hashlib.sha256(repr(weights).encode()).hexdigest()[:16] if weights else None
    source = Path(args.questions)
    data = hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source.is_file() else None
    return {"questions": args.questions, "data": data, "checker": args.checker, "seed": args.seed, "chat": args.chat,
            "target": target.fingerprint, "draft": draft.fingerprint, "judge": judge, "speculate_k": args.speculate_k,
            "temperature": args.temperature, "top_k": args.top_k, "min_prob": args.min_prob,
            "max_new_tokens": args.max_new_tokens, "precision": str(target.dtype).removeprefix("torch."),
            "mode": target.quantization or None, "draft_mode": draft.quantization or None,
            "compile": args.compile, "device": str(args.device), "torch": torch.__version__,
            **({"details": True} if getattr(args, "details", False) else {})}  # fmt: skip


def report(args: argparse.Namespace) -> None:
    rows = evaluate(args)
    if args.json:
        print(json.dumps({"questions": args.questions, "rows": rows}))
    else:
        print_table(rows)


def add_engine_flags(parser: Parser) -> None:
    """The flags that say which models answer, and how."""
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="the target (default: the demo target, with its draft and judge)")
    add("--draft_checkpoint_path", type=Path, help="the draft")
    add("--judge_path", type=Path, help="judge.safetensors of this target, for the rule judge")
    add("--chat", action="store_true", help="put questions into Llama 3.1's chat format")
    add("--min_prob", type=float, default=0.0)
    add("--speculate_k", type=read_k, default=16, help="M, or auto")
    add("--max_new_tokens", type=int, default=200)
    add("--temperature", type=float, default=0.0)
    add("--top_k", type=int)
    add("--compile", action="store_true")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add_mode_flags(parser)


def schemes_of(args: argparse.Namespace) -> tuple[Scheme | None, Scheme | None]:
    """How target and draft are to be quantised."""
    return scheme_of(args), scheme_of(args, "draft_")


def name_models(args: argparse.Namespace) -> None:
    """Fills in the demo pair and its judge where no target is named. Raises InputError for a target without a draft."""
    if args.checkpoint_path is None:
        args.checkpoint_path = DEMO / "target"
        args.draft_checkpoint_path = args.draft_checkpoint_path or DEMO / "draft"
        args.judge_path = args.judge_path or DEMO / "judge.safetensors"
    if args.draft_checkpoint_path is None:
        raise InputError("--checkpoint_path needs a draft beside it; name one with --draft_checkpoint_path.")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_question_flags(parser.add_argument)
    add_engine_flags(parser)
    add = parser.add_argument
    add("--verify", default="plain,standard,judge,kl,topk,typical", help="rules (judge@8: with M = 8), hf, hf-assisted")
    add("--threshold", help="rule=number, ...; several for one rule run it several times")
    add("--out", type=Path, help="results, JSON lines; resumed when it exists")
    add("--details", action="store_true", help="keep probability, KL and score of each token, for report.py (not timed)")
    add("--json", action="store_true", help="print the summary as one JSON object")
    args = parser.parse_args(argv)
    run_script("evaluate.py", lambda: report(args))


if __name__ == "__main__":
    main()
