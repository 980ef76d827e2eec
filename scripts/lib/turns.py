"""Answers of one or more turns: the ids of a conversation, an answer up to a stop text, all turns as one
record."""

import json
import re
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import NamedTuple

from cli import InputError
from generate import Engine
from scripts.lib.pair import check_prompt
from scripts.lib.result import Result
from scripts.lib.scoring import Question
from scripts.lib.stops import cut, decode_until
from scripts.lib.terminal import answer_text, as_json, encode_prompt
from scripts.lib.token_details import cuts
from tokenizer import Tokenizer

SUMS = ("rounds", "drafted", "accepted", "accepted_by_rule", "seconds_prefill", "seconds_decode")
# of which each turn has one entry a token, or text
LISTS = ("tokens", "origin", "text", "cuts", "p", "kl", "score", "top")


def prompt_ids(
    args, tokenizer: Tokenizer, questions: list[Question], context: int, where: str = ""
) -> dict[str, list[int]]:
    """{question id: prompt ids}. Raises InputError, which goes on with `where` after the question, for one
    that leaves no room in the context for --max_new_tokens."""
    prompts = {}
    for question in questions:
        prompts[question.id] = encode_prompt(args, tokenizer, question.prompt)
        try:
            check_prompt(prompts[question.id], args.max_new_tokens, context, context)
        except InputError as error:
            raise InputError(f"Question {question.index}{where}: {error}") from None
    return prompts


def turn_ids(args, tokenizer: Tokenizer, question: Question) -> list[list[int]]:
    """Ids of the prompt, and for each further turn those that come between the answer before it and its own
    answer.

    The answer itself stays as it was decoded: with the chat format this gives the ids of `encode_chat` of the
    whole.
    """
    further = tokenizer.encode_next if args.chat else tokenizer.encode
    return [encode_prompt(args, tokenizer, question.prompt), *map(further, question.more_turns)]


class Answering(NamedTuple):
    """How questions are answered. engine: ours, or a peer's (see `peers.peer`)."""

    engine: Engine | Callable
    tokenizer: Tokenizer
    max_new_tokens: int
    seed: int


def decode_turn(how: Answering, prompt: list[int], stops: tuple[str, ...]) -> Result:
    """An answer of our engine."""
    return decode_until(how.engine, how.tokenizer, prompt, how.max_new_tokens, how.seed, stops)


def answer_turn(how: Answering, prompt: list[int], stops: tuple[str, ...]) -> dict:
    """The record of one turn, by our engine or by a peer."""
    if isinstance(how.engine, Engine):
        result = decode_turn(how, prompt, stops)
        text = answer_text(how.tokenizer, result.tokens)
        record = json.loads(as_json(how.engine, result, text, stops)) | {"origin": "".join(result.origin)}
    else:
        tokens, prefill, seconds = how.engine(prompt, how.max_new_tokens)
        record = {
            "prompt_tokens": len(prompt),
            "tokens": tokens,
            "text": answer_text(how.tokenizer, tokens),
            "seconds_prefill": prefill,
            "seconds_decode": seconds,
            **dict.fromkeys(("rounds", "accepted", "accepted_by_rule", "drafted"), 0),
        }

    return record | {"cuts": cuts(how.tokenizer, record["tokens"])}


def said_ids(record: dict, stops: tuple[str, ...]) -> list[int]:
    """The tokens of an answer that lie before its stop text or stop token."""
    room, ids = len(cut(record["text"], stops)), []
    for token, count in zip(record["tokens"], record["cuts"]):
        if count > room or (count == 0 and room == 0):
            break
        ids.append(token)
        room -= count
    return ids


def join(records: list[dict]) -> dict:
    """Several turns as one record: counts and seconds added up, tokens and texts one after the other."""
    if len(records) == 1:
        return records[0]
    whole = dict(records[-1])
    whole |= {name: sum(record[name] for record in records) for name in SUMS}
    for name in LISTS:
        if whole.get(name) is not None:
            whole[name] = reduce(add, (record[name] for record in records))

    if "mean_accepted" in whole:
        whole["mean_accepted"] = (
            whole["accepted"] / whole["rounds"] if whole["rounds"] and whole["drafted"] else 0.0
        )
        whole["tokens_per_second"] = (
            len(whole["tokens"]) / whole["seconds_decode"] if whole["seconds_decode"] else 0.0
        )
        scores = [record["mean_score"] for record in records if record["mean_score"] is not None]
        whole["mean_score"] = sum(scores) / len(scores) if scores else None

    return whole


def summary_of(record: dict, stops: tuple[str, ...]) -> dict:
    """What one turn said, and what it took: new_tokens, rounds, seconds with prefill, tokens of each
    round."""
    rounds = re.findall("[ar]*[tb]|[ar]+$", record.get("origin", ""))
    return {
        "text": cut(record["text"], stops),
        "new_tokens": len(record["tokens"]),
        "rounds": record["rounds"],
        "seconds": record["seconds_prefill"] + record["seconds_decode"],
        "accept_lengths": [len(tokens) for tokens in rounds],
    }


def answer_turns(how: Answering, parts: list[list[int]], question: Question, more: Callable) -> dict:
    """The record of a question: a single turn's, or several turns' joined, with "turns", what each said and
    took.

    parts: from `turn_ids`. more: (prompt, tokens) -> further fields of a turn.
    """
    context, records = [], []
    for part in parts:
        context = context + part
        record = answer_turn(how, context, question.stops)
        records.append(record | more(context, record["tokens"]))
        context = context + said_ids(record, question.stops)

    whole = join(records)
    if question.checker == "none":
        whole |= {"turns": [summary_of(record, question.stops) for record in records], "time": time.time()}
    return whole


def failed_turn(engine, parts: list[list[int]], question: Question, sentence: str) -> dict:
    """The record of a question without an answer: what the logits were, instead of a text; all counts are
    zero."""
    n = len(parts[0])
    record = {"prompt_tokens": n, "tokens": [], "text": "", "failed": sentence, **dict.fromkeys(SUMS, 0)}
    if isinstance(engine, Engine):
        record = json.loads(as_json(engine, Result(n), "")) | {"origin": ""} | record
    record |= {"cuts": [], "stop_reason": "failed"}
    if question.checker == "none":
        record |= {"turns": [summary_of(record, ()) for _ in parts], "time": time.time()}
    return record
