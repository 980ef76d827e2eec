"""Labelled answers, which a judge is trained on: reading them from JSON lines, and as token ids with labels.

An answer is text with the characters of its errors, or token ids with a label each.
scripts/train_judge.py shows both.
"""

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cli import InputError, shortened_value
from files import read_json_lines
from tokenizer import Tokenizer


def read_answers(path: str | Path, labelled: bool = True) -> list[dict]:
    """Answers from JSON lines. Raises InputError naming file, line and field of whatever is wrong.

    labelled False: the marks may be missing.
    """
    answers = [read_answer(item, where, labelled) for where, item in read_json_lines(path)]
    if not answers:
        raise InputError(f"{path} holds no answers; give JSON lines with prompt, response and errors.")
    return answers


def read_answer(item: dict, where: str, labelled: bool = True) -> dict:
    """One labelled answer, of either form. Raises InputError beginning with `where`."""
    if type(item.get("guard", False)) is not bool:
        raise InputError(f"{where}: field 'guard' must be a bool.")
    if "tokens" in item:
        check_mined(item, where)
        return item
    if not labelled:
        item["errors"] = item.get("errors") or []
    if "errors" in item and item["errors"] is None:
        raise InputError(
            f"{where}: field 'errors' is null, so nobody has marked this answer; "
            "run scripts/annotate.py first."
        )

    for field_name, kind in (("prompt", str), ("response", str), ("errors", list)):
        if not isinstance(item.get(field_name), kind):
            raise InputError(f"{where}: field {field_name!r} must be a {kind.__name__}.")
    length = len(item["response"])
    if not length:
        raise InputError(f"{where}: field 'response' is empty.")
    if bad := [span for span in item["errors"] if not is_span(span, length)]:
        raise InputError(
            f"{where}: 'errors' has {shortened_value(bad[0])}, not [start, end] within 0 and {length}."
        )
    return item


def is_span(span: object, length: float) -> bool:
    """Whether this is [start, end] with 0 <= start < end <= length."""
    return (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
            and 0 <= span[0] < span[1] <= length)  # fmt: skip


def check_mined(item: dict, where: str) -> None:
    """Raises InputError beginning with `where` for a broken answer in tokens."""
    for field_name in ("prompt_tokens", "tokens", "labels"):
        value = item.get(field_name)
        if not isinstance(value, list) or not value or not all(type(n) is int for n in value):
            raise InputError(f"{where}: field {field_name!r} must be a list of whole numbers, not empty.")
    if min(item["prompt_tokens"] + item["tokens"]) < 0:
        raise InputError(f"{where}: 'prompt_tokens' and 'tokens' must be token ids of at least 0.")
    if len(item["labels"]) != len(item["tokens"]) or not set(item["labels"]) <= {1, 0, -100}:
        raise InputError(
            f"{where}: 'labels' must be one of 1, 0, -100 for each of the {len(item['tokens'])} tokens."
        )


Spans = list[tuple[int, int]]  # characters [start, end) that each token covers


def encode_answer(
    tokenizer: Tokenizer, prompt: str, response: str, chat: bool = False
) -> tuple[list[int], list[int], Spans]:
    """Prompt ids, response ids, and the characters of the response that each of its tokens covers.

    A character whose bytes are spread over tokens is covered by each of them. chat: in the folder's chat
    format.
    """
    if chat:
        prompt_ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        rest = tokenizer.encode(response)
    else:
        plain, both = tokenizer.encode(prompt), tokenizer.encode(prompt + response)
        if both[: len(plain)] != plain:  # a token spans the border: read them apart
            both = plain + tokenizer.encode(response)
        prompt_ids, rest = [*tokenizer.prefix, *plain], both[len(plain) :]

    spans, done, utf8 = [], 0, codecs.getincrementaldecoder("utf-8")("replace")
    for id in rest:
        start = done
        done += len(utf8.decode(tokenizer.token_bytes(id)))
        spans.append((start, done + bool(utf8.getstate()[0])))
    extra = done - len(response)  # SentencePiece's space before a text that is read on its own
    return prompt_ids, rest, [(start - extra, end - extra) for start, end in spans]


def label_tokens(spans: Spans, errors: list[list[int]], policy: str) -> list[int]:
    """1 right, 0 wrong, -100 ignored, for response tokens that cover `spans`.

    A token is wrong when it covers any character of an error, or a part of one. After the first error: `span`
    counts the rest as right, `ignore_after` skips it, `from_error` counts it as wrong.
    """
    labels = []
    for start, end in spans:
        wrong = any(start < b and end > a for a, b in errors)
        after = any(start >= b for _, b in errors)
        if wrong or (after and policy == "from_error"):
            labels.append(0)
        else:
            labels.append(-100 if after and policy == "ignore_after" else 1)
    return labels


@dataclass(frozen=True)
class Encoded:
    """An answer as token ids. spans: the characters of each token, or None when labels came with the
    tokens."""

    prompt: list[int]
    ids: list[int]
    spans: Spans | None
    item: dict

    @property
    def key(self) -> int:
        """What the split goes by: the prompt's tokens; a guarded text stands for itself."""
        return prompt_key(self.prompt + self.ids if self.item.get("guard") else self.prompt)

    def labels(self, policy: str) -> list[int]:
        """1 right, 0 wrong, -100 ignored, a token each."""
        if self.item.get("guard"):
            return [0] * len(self.ids)
        if self.spans is None:
            return self.item["labels"]
        return label_tokens(self.spans, self.item["errors"], policy)


def prompt_key(ids: list[int]) -> int:
    """63 bits that tell prompts apart."""
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:8], "big") >> 1


def encode_items(tokenizer: Tokenizer, answers: list[dict], chat: bool, vocab_size: int) -> list[Encoded]:
    """Answers of either form as tokens. Raises InputError for ids that the model does not have."""
    encoded = []
    for place, item in enumerate(answers, 1):
        if "tokens" in item:
            encoded.append(Encoded(item["prompt_tokens"], item["tokens"], None, item))
        else:
            encoded.append(Encoded(*encode_answer(tokenizer, item["prompt"], item["response"], chat), item))
        if max(encoded[-1].prompt + encoded[-1].ids) >= vocab_size:
            raise InputError(f"Answer {place} has a token id of {vocab_size} or more, which the model lacks.")
    return encoded
