"""What a person sees of an answer: colours, one line of figures, JSON, and a conversation."""

import argparse
import json
import os
import sys
from itertools import groupby

import torch

import tp
from cli import InputError, shortened
from scripts.lib.guarantee import Drift, kind_of, warn_of_drift
from tokenizer import Decoder, Tokenizer, decode


class Paint:
    """Text with each token marked by who accepted it: by colours on a terminal, by brackets with `marks` or
    NO_COLOR, not at all elsewhere, where the answer itself is wanted.

    The target's own token is marked alike after a rejection (t) and after full acceptance (b).
    """

    COLOURS = {"a": ("\033[32m", "\033[0m"), "r": ("\033[33m", "\033[0m"), "t": ("\033[31m", "\033[0m")}
    MARKS = {"a": ("", ""), "r": ("{", "}"), "t": ("<", ">")}

    def __init__(self, stream, drafted: bool = True, marks: bool = False):
        terminal = stream.isatty()
        self.on = drafted and (terminal or marks)
        self.marks = self.COLOURS if terminal and not marks and not os.environ.get("NO_COLOR") else self.MARKS
        a, r, t = (self.marks[letter] for letter in "art")
        self.legend = f"{a[0]}accepted draft tokens{a[1]}, {r[0]}let through by the rule alone{r[1]}, {t[0]}the target's own{t[1]}"

    def token(self, text: str, letter: str) -> str:
        opening, closing = self.marks["t" if letter == "b" else letter] if self.on else ("", "")
        return f"{opening}{text}{closing}" if text else ""


def paint_tokens(tokenizer: Tokenizer, result, paint: Paint) -> str:
    """The answer with marks; stop tokens are left out."""
    decoder, parts = Decoder(tokenizer), []
    tokens = [pair for pair in zip(result.tokens, result.origin) if pair[0] not in tokenizer.stop_ids]
    for letter, group in groupby(tokens, key=lambda pair: pair[1]):
        parts.append(paint.token("".join(decoder.push(token) for token, _ in group), letter))
    return "".join(parts) + decoder.flush()


def answer_text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The answer as text, without a stop token at its end."""
    return decode(tokenizer, tokens[:-1] if tokens and tokens[-1] in tokenizer.stop_ids else tokens)


def summary(name: str, result) -> str:
    """Speed of one sample in one line."""
    line = f"{name:15} {result.tokens_per_second:7.1f} tokens/s, {len(result.tokens)} tokens in {result.seconds_decode:.3f} s"
    if result.drafted:
        line += f", {result.rounds} rounds, m* {result.mean_accepted:.2f} ({result.accepted_by_rule} by the rule alone)"
    return f"{line}, prefill {result.seconds_prefill:.3f} s"


def name_of(engine) -> str:
    """The rule with the threshold in force, as in "kl 0.5"."""
    s = engine.settings
    return s.verify if s.threshold is None else f"{s.verify} {s.threshold:g}"


def as_json(engine, result, text: str) -> str:
    """One sample as one line of JSON."""
    s = engine.settings
    return json.dumps(
        {
            "prompt_tokens": result.prompt_tokens,
            "tokens": result.tokens,
            "origin": "".join(result.origin),
            "text": text,
            "stop_reason": result.stop_reason,
            "rounds": result.rounds,
            "drafted": result.drafted,
            "accepted": result.accepted,
            "accepted_by_rule": result.accepted_by_rule,
            "mean_accepted": result.mean_accepted,
            "seconds_prefill": result.seconds_prefill,
            "seconds_decode": result.seconds_decode,
            "tokens_per_second": result.tokens_per_second,
            "verify": s.verify,
            "threshold": s.threshold,
            "min_prob": s.min_prob,
            "speculate_k": "auto" if s.adaptive else s.speculate_k,
            "relax_between": s.relax_between,
            "mean_score": result.mean_score,
            "device": str(engine.target.device),
            "dtype": kind_of(engine.target),
        }
    )


def ask() -> str | None:
    """A line from a person, None at end of input. Raises InputError for input that is closed or no text."""
    if sys.stdin is None:
        raise InputError("--interactive finds standard input closed.")
    try:
        return input("> ").strip()
    except EOFError:
        return None
    except UnicodeError as error:
        raise InputError(f"--interactive found no UTF-8 text on standard input: {error}.") from None


def chat_loop(args: argparse.Namespace, engine, tokenizer: Tokenizer, drift: Drift) -> None:
    """Asks for prompts and streams answers until end of input; with --chat the conversation is kept until it
    is full.

    Ctrl-C stops the answer, of which what was shown is kept; while a prompt is asked for it ends the program.
    """
    paint, messages = Paint(sys.stdout, engine.draft is not None, args.marks), []
    if paint.on:
        print(paint.legend, file=sys.stderr)
    engine.generator.manual_seed(args.seed % 2**63)
    while True:
        text = tp.first(ask)
        if text is None:
            print()
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        try:
            prompt = tokenizer.encode_chat(messages) if args.chat else encode_prompt(args, tokenizer, text)
            answer, result = stream_answer(args, engine, tokenizer, prompt, paint)
            warn_of_drift(drift, result)
            messages.append({"role": "assistant", "content": answer})
        except InputError as error:
            print(
                f"generate.py: {error}" + (" The conversation begins anew." if args.chat else ""),
                file=sys.stderr,
            )
            messages = []


def stream_answer(
    args: argparse.Namespace, engine, tokenizer: Tokenizer, prompt: list[int], paint: Paint
) -> tuple[str, object]:
    """Prints one answer as it comes, as long as there is room for it or until Ctrl-C, and returns what was
    shown."""
    room = min(engine.length, engine.context[0]) - len(prompt)
    decoder, shown = Decoder(tokenizer), []
    try:
        for token, letter in engine.stream(prompt, min(args.max_new_tokens, max(1, room))):
            shown.append(token)
            if token not in tokenizer.stop_ids:
                print(paint.token(decoder.push(token), letter), end="", flush=True)
    except KeyboardInterrupt:
        if tp.LINK is not None:  # torchrun ends all ranks
            raise
        engine.result.stop_reason = "interrupt"
    print(decoder.flush(), flush=True)
    print(summary(name_of(engine), engine.result), file=sys.stderr)
    return answer_text(tokenizer, shown), engine.result


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids: a synthetic prompt of N tokens, or text (given, or read from standard input)."""
    text = args.prompt
    if not text:
        raise InputError("There is no prompt; give --prompt, or --interactive.")
    if text == "-":
        text = tp.first(read_stdin)
    elif text.isascii() and text.isdigit():
        if len(text) > 7:
            raise InputError(
                f"--prompt {shortened(text)} asks for too long a synthetic prompt; at most 9999999 tokens."
            )
        generator = torch.Generator().manual_seed(args.seed % 2**63)
        ids = torch.randint(0, min(256, tokenizer.vocab_size), (int(text),), generator=generator).tolist()
        return [tokenizer.bos_id, *ids][: int(text)]
    return encode_prompt(args, tokenizer, text)


MOST_INPUT = 64 << 20  # bytes of a prompt on standard input; no context holds more


def read_stdin() -> str:
    """Standard input as UTF-8, without a byte-order mark and the line's end that `echo` adds. Raises
    InputError where it is closed, endless, empty or no text."""
    if sys.stdin is None:
        raise InputError("--prompt - finds standard input closed.")
    try:
        content = getattr(sys.stdin, "buffer", None)
        content = content.read(MOST_INPUT + 1) if content else sys.stdin.read(MOST_INPUT + 1).encode()
        text = content.decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"--prompt - found no UTF-8 text on standard input: {error}.") from None
    if len(content) > MOST_INPUT:
        raise InputError(f"--prompt - found more than {MOST_INPUT >> 20} MiB on standard input.")
    if not (text := text.removesuffix("\n").removesuffix("\r")):
        raise InputError("--prompt - found nothing on standard input.")
    return text


def encode_prompt(args: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt's text: in the chat format, or after begin-of-text."""
    if args.chat:
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    return [tokenizer.bos_id, *tokenizer.encode(text)]
