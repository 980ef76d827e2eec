"""AutoJudge's mining (arXiv 2504.20039): finds by trial which of the draft's tokens change the final answer.

    python scripts/mine_important_tokens.py --limit 200 --compile --out mined.jsonl
    python scripts/mine_important_tokens.py --questions gsm8k/train.jsonl --checker number \\
        --checkpoint_path BIG --draft_checkpoint_path SMALL --out mined.jsonl
    torchrun --nproc_per_node 8 scripts/mine_important_tokens.py ... --out mined.jsonl     # then once:
    python scripts/mine_important_tokens.py ... --out mined.jsonl --merge 8

Take the target's own greedy answer. Where the draft would first have said another token, put that token, let
the target finish greedily, and compare the two final answers (not the reference). The same: the token is
unimportant, and the new continuation is adopted. Another: it is important, and the target's token stays. Go
on at the next such place to the right.

The target finishes with the draft's help (`standard` verification, which gives the same tokens), and nothing
that the caches hold already is read again. Each process keeps its share in OUT.partRANKofSIZE, a line a
question, and resumes from there. OUT holds what train_judge.py reads: for each important token the text up to
it with label 0, and for each question the adopted text with label 1 at the unimportant ones.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import glob
import json
import time
from collections import Counter
from contextlib import closing

import torch
from torch import Tensor

from checkpoint import read_config
from files import Lines, check_not_input, check_writable, write_file
from generate import Engine, NotFinite, Settings
from model import PAGE, pick_device, run_dtype
from scripts.lib.fields import check_fields, is_counts, is_seconds, is_text
from scripts.lib.flags import FIXED_K, add_flags
from scripts.lib.pair import files_in, load_pair, name_models
from scripts.lib.ranks import own_device
from scripts.lib.results import check_parts, part, rank_and_size, read_part, resume
from scripts.lib.scoring import CHECKERS, Question
from scripts.lib.tasks import add_question_flags, question_files, questions_of
from scripts.lib.terminal import answer_text
from scripts.lib.turns import prompt_ids
from tokenizer import Tokenizer, load_tokenizer

GROWTH = 1.5  # a trial that has not ended at so many times the target's own length counts as another answer


@torch.inference_mode()
def draft_choices(engine: Engine, ids: list[int], start: int, known: int) -> list[int]:
    """The draft's most likely token for each position from `start` to the end of `ids`, given what is before
    it.

    known: so many leading tokens the draft's cache holds already.
    """
    device, choices = engine.draft.device, []
    begin = min(start - 1, known)
    tokens = torch.zeros(len(ids) + PAGE, dtype=torch.long, device=device)
    tokens[: len(ids)] = torch.tensor(ids)
    for at in range(begin // PAGE * PAGE, len(ids) - 1, PAGE):
        pos = torch.arange(at, at + PAGE, device=device)
        choices.append(engine.draft(tokens[None, at : at + PAGE], pos, at + PAGE)[1][0].argmax(-1))
    flat: Tensor = torch.cat(choices) if choices else torch.zeros(0)
    first = start - 1 - begin // PAGE * PAGE
    return flat[first : first + len(ids) - start].tolist()


def mine(
    engine: Engine, prompt: list[int], question: Question, tokenizer: Tokenizer, max_new_tokens: int
) -> dict:
    """The adopted tokens of a question, where they are the draft's ("unimportant"), and the draft's tokens
    that changed the answer ("important": [[place, token], ...]). {"skipped": why} when the target's own
    answer cannot be compared."""

    def final(ids: list[int]) -> str | None:
        return CHECKERS[question.checker].final_answer(question, answer_text(tokenizer, ids))

    own = engine.generate(prompt, max_new_tokens)
    kept, answer = own.tokens, final(own.tokens)
    if own.stop_reason == "length" or answer is None:
        return {"skipped": "cut off" if own.stop_reason == "length" else "no final answer"}
    longest = min(max_new_tokens, int(GROWTH * len(kept)))
    unimportant, important, at, before = [], [], 0, len(prompt)
    known = before + len(kept) - 2  # of the last two tokens a model may have read none
    choices = draft_choices(engine, prompt + kept, before, known)
    while at < len(kept):
        token = choices[at]
        # no rule may let a stop token through: nothing to learn
        if token == kept[at] or token in tokenizer.stop_ids:
            at += 1
            continue
        trial = kept[:at] + [token]
        rest = None
        if len(trial) < longest:
            rest = engine.generate(prompt + trial, longest - len(trial), keep=min(known, before + at))
            known = before + at  # the caches now follow the trial
        if rest is not None and rest.stop_reason == "stop" and final(trial + rest.tokens) == answer:
            unimportant.append(at)
            kept = trial + rest.tokens
            known = before + len(kept) - 2
            choices[at + 1 :] = draft_choices(engine, prompt + kept, before + at + 1, before + at)
        else:
            important.append([at, token])
        at += 1

    return {"tokens": kept, "unimportant": unimportant, "important": important}


def training_lines(record: dict) -> list[dict]:
    """What train_judge.py reads, from a mined question."""
    source = {"source": record["source"], "question": record["question"]}
    lines = []
    for at, token in record["important"]:
        ids = record["tokens"][:at] + [token]  # what was adopted later lies to the right
        lines.append(
            {"prompt_tokens": record["prompt_tokens"], "tokens": ids, "labels": [-100] * at + [0], **source}
        )

    if record["unimportant"]:
        labels = [-100] * len(record["tokens"])
        for at in record["unimportant"]:
            labels[at] = 1
        lines.append(
            {"prompt_tokens": record["prompt_tokens"], "tokens": record["tokens"], "labels": labels, **source}
        )

    return lines


def check_record(record: dict, where: str) -> dict:
    """A line of a part. Raises InputError beginning with `where`, and naming the field, for what no run has
    written."""
    kinds = {"question": is_text, "source": is_text, "prompt_tokens": is_counts, "seconds": is_seconds}
    if "skipped" in record:
        kinds["skipped"] = is_text
    else:
        n = len(record["tokens"]) if is_counts(record.get("tokens")) else 0
        kinds |= {
            "tokens": lambda value: n > 0,
            "unimportant": lambda value: is_counts(value) and all(at < n for at in value),
            "important": lambda value: (
                isinstance(value, list)
                and all(is_counts(pair) and len(pair) == 2 and pair[0] < n for pair in value)
            ),
        }

    return check_fields(record, kinds, where)


def check_args(args: argparse.Namespace, rank: int, size: int) -> None:
    """Raises InputError for a command line that cannot run, before anything is loaded or written; completes
    it."""
    name_models(args)
    if args.merge and size > 1:
        raise InputError(f"--merge {args.merge} goes without torchrun.")
    check_writable(args.out, "--out")
    inputs = [*question_files(args), *files_in([args.checkpoint_path, args.draft_checkpoint_path])]
    for path in (args.out, part(args.out, rank, size)):
        check_writable(path, "--out")
        check_not_input(path, inputs)

    if args.out.exists() and not list(args.out.parent.glob(f"{glob.escape(args.out.name)}.part*of*")):
        raise InputError(f"--out {args.out} is there already, and not from mining; name another file.")
    if not args.merge:
        check_parts(args.out, size)
        args.device = pick_device(own_device(args.device))


def mine_share(args, tokenizer: Tokenizer, questions: list[Question], prompts: dict, lines: Lines) -> None:
    """Loads the pair and mines the questions that `lines` lacks; each is one line, written whole."""
    dtype = run_dtype(args.precision, args.device)
    pair = load_pair(args.checkpoint_path, args.draft_checkpoint_path, None, args.device, dtype)
    header = {"target": pair[0].fingerprint, "draft": pair[1].fingerprint, "chat": args.chat,
              "max_new_tokens": args.max_new_tokens}  # fmt: skip
    done = {record["question"] for record in resume(lines, header, check_record)}
    if not lines.content:
        lines.add(header)
    todo = [question for question in questions if question.id not in done]
    if not todo:
        return

    length = max(map(len, prompts.values())) + args.max_new_tokens
    settings = Settings("standard", speculate_k=args.speculate_k, compile=args.compile)
    engine = Engine(*pair[:2], None, settings, tokenizer.stop_ids, length)
    print(f"warmed up in {engine.warm_up():.1f} s", file=sys.stderr)

    progress = Progress("questions", len(todo))
    source = f"{args.checkpoint_path.name} and {args.draft_checkpoint_path.name}"
    for question in todo:
        prompt, began = prompts[question.id], time.monotonic()
        try:
            found = mine(engine, prompt, question, tokenizer, args.max_new_tokens)
        except NotFinite:
            found = {"skipped": "not finite"}
        lines.add(
            found
            | {
                "question": question.id,
                "group": question.group,
                "source": source,
                "prompt_tokens": prompt,
                "seconds": time.monotonic() - began,
            }
        )
        progress.step()


def merge(args: argparse.Namespace, questions: list[Question], size: int) -> None:
    """Writes OUT from the parts of `size` processes, in the order of the questions, and prints what was
    found.

    Raises InputError naming a part or a question that is missing, or parts of different runs.
    """
    records, headers = {}, set()
    for rank in range(size):
        header, lines = read_part(args.out, rank, size, "mining")
        records |= {check_record(record, where)["question"]: record for where, record in lines}
        headers.add(json.dumps(header))

    if len(headers) > 1:
        raise InputError(f"The parts of {args.out} are of different models or settings; mine them again.")
    missing = [question for question in questions if question.id not in records]
    if missing:
        raise InputError(
            f"The parts of {args.out} lack {len(missing)} questions, the first is "
            f"{missing[0].prompt[:60]!r}; give --questions, --limit and --seed as for mining."
        )

    found = [records[question.id] for question in questions]
    mined = [record for record in found if "skipped" not in record]
    text = "".join(json.dumps(line) + "\n" for record in mined for line in training_lines(record))
    if not text:
        raise InputError("Nothing was mined: all questions were skipped, or draft and target never differ.")
    write_file(args.out, text.encode())
    important, others = (sum(len(record[name]) for record in mined) for name in ("important", "unimportant"))
    share = important / max(1, important + others)
    reasons = Counter(record["skipped"] for record in found if "skipped" in record)
    why = f" ({', '.join(f'{n} {reason}' for reason, n in reasons.items())})" if reasons else ""
    print(f"{args.out}: {len(mined)} questions mined, {len(found) - len(mined)} "
          f"skipped{why}, in {sum(r['seconds'] for r in found):.0f} s: "
          f"{important + others} mismatches, {important} important ({share:.1%})")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Mines this process's share of the questions; alone, it also merges."""
    rank, size = rank_and_size()
    check_args(args, rank, size)
    questions = questions_of(args, held_out=args.held_out, stops=False)
    if args.merge:
        merge(args, questions, args.merge)
        return

    tokenizer = load_tokenizer(args.checkpoint_path)
    folders = (args.checkpoint_path, args.draft_checkpoint_path)
    context = min(read_config(folder).max_position for folder in folders)
    prompts = prompt_ids(args, tokenizer, questions[rank::size], context)
    with closing(Lines(part(args.out, rank, size))) as lines:
        mine_share(args, tokenizer, questions[rank::size], prompts, lines)
    if size == 1:
        merge(args, questions, 1)
    elif rank == 0:
        print(
            f"When all {size} processes are done: the same command, without torchrun, with --merge {size}",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_question_flags(parser)
    parser.add_argument(
        "--held_out", action="store_true", help="of the demo: take the problems that are kept for evaluation"
    )
    add_flags(
        parser,
        "checkpoint_path",
        "draft_checkpoint_path",
        "chat",
        speculate_k=FIXED_K | {"default": 8, "help": "M; short, since drafts derail after a wrong token"},
        max_new_tokens={
            "type": whole(1, 10_000_000),
            "help": "after which an answer is cut off, and skipped",
        },
        compile={},
        device={},
        precision={},
        out={"required": True, "help": "training data for judge.py, JSON lines"},
        merge={},
    )
    parser.set_defaults(judge_path=None)
    args = parser.parse_args(argv)
    run_script("mine_important_tokens.py", lambda: run(args))


if __name__ == "__main__":
    main()
