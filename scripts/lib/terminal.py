"""What a person sees of an answer: colours, one line of figures, JSON."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path

import torch

import tp
from checkpoint import DEMO
from cli import InputError, Parser, shortened, whole
from files import write_file
from judge import RULES
from quantize import add_mode_flags, memory_line
from scripts.lib.flags import MOST_TOKENS, add_decoding_flags, add_device_flags, add_flags, add_model_flags
from scripts.lib.guarantee import Drift, announce, kind_of, warn_of_drift
from scripts.lib.pair import name_demo
from scripts.lib.ranks import add_rank_flags
from scripts.lib.result import Result
from scripts.lib.stops import cut, decode_until, pieces_of
from tokenizer import Tokenizer, decode

DEMO_PROMPT = "Mia has 47 apples. She buys 38. She multiplies it by 3. She sells 79. How many apples now?"
DEMO_FORMS = """the demo pair knows only problems of the forms "Mia has 47 apples. She buys 38. She \
multiplies it by 3. She sells 79. How many apples now?" (3 or 4 steps; numbers from 11 to 99, times 2 to 6) \
and "The list is [5,17,23,8]. Sort it. Drop the first. Add 4 to each. What is the largest?" (4 or 5 numbers, \
2 or 3 steps); it answers everything else, and wrong."""


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
        self.legend = ", ".join([
            f"{a[0]}accepted draft tokens{a[1]}", f"{r[0]}let through by the rule alone{r[1]}",
            f"{t[0]}the target's own{t[1]}",
        ])  # fmt: skip

    def token(self, text: str, letter: str) -> str:
        opening, closing = self.marks["t" if letter == "b" else letter] if self.on else ("", "")
        return f"{opening}{text}{closing}" if text else ""


def paint_tokens(tokenizer: Tokenizer, result: Result, paint: Paint, stops: Sequence[str] = ()) -> str:
    """The answer with marks, up to its first stop text; stop tokens are left out."""
    groups = groupby(pieces_of(tokenizer, result, stops), key=lambda piece: piece[1])
    return "".join(paint.token("".join(text for text, _ in group), letter) for letter, group in groups)


def answer_text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The answer as text, without a stop token at its end."""
    return decode(tokenizer, tokens[:-1] if tokens and tokens[-1] in tokenizer.stop_ids else tokens)


def summary(name: str, result: Result) -> str:
    """Speed of one sample in one line."""
    rate, n = result.tokens_per_second, len(result.tokens)
    line = f"{name:15} {rate:7.1f} tokens/s, {n} tokens in {result.seconds_decode:.3f} s"
    if result.drafted:
        accepted = f"m* {result.mean_accepted:.2f} ({result.accepted_by_rule} by the rule alone)"
        line += f", {result.rounds} rounds, {accepted}"
    return f"{line}, prefill {result.seconds_prefill:.3f} s"


def name_of(engine) -> str:
    """The rule with the threshold in force, as in "kl 0.5"."""
    s = engine.settings
    return s.verify if s.threshold is None else f"{s.verify} {s.threshold:g}"


def as_json(engine, result: Result, text: str, stops: Sequence[str] = ()) -> str:
    """One sample as one line of JSON. stops: the stop texts asked for."""
    s = engine.settings
    return json.dumps({
        "prompt_tokens": result.prompt_tokens, "tokens": result.tokens, "origin": "".join(result.origin),
        "text": text, "stop_reason": result.stop_reason, "rounds": result.rounds, "drafted": result.drafted,
        "accepted": result.accepted, "accepted_by_rule": result.accepted_by_rule,
        "mean_accepted": result.mean_accepted, "seconds_prefill": result.seconds_prefill,
        "seconds_decode": result.seconds_decode, "tokens_per_second": result.tokens_per_second,
        "verify": s.verify, "threshold": s.threshold, "min_prob": s.min_prob,
        "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p,
        "stop": list(stops),
        "speculate_k": "auto" if s.adaptive else s.speculate_k, "relax_between": s.relax_between,
        "mean_score": result.mean_score, "device": str(engine.target.device), "dtype": kind_of(engine.target),
    })  # fmt: skip


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
        return [*tokenizer.prefix, *ids][: int(text)]
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


def first_messages(args: argparse.Namespace) -> list[dict[str, str]]:
    """What a conversation begins with: the system message, where there is one."""
    system = getattr(args, "system", None)
    return [{"role": "system", "content": system}] if system is not None else []


def encode_prompt(args: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt's text: in the chat format, or after begin-of-text."""
    if args.chat:
        return tokenizer.encode_chat([*first_messages(args), {"role": "user", "content": text}])
    return tokenizer.prompt(text)


def print_answers(
    args: argparse.Namespace, engine, tokenizer: Tokenizer, prompt: list[int], drift: Drift
) -> None:
    """Generates --num_samples answers and prints them: the answer on standard output, figures on standard
    error."""
    paint = Paint(sys.stdout, engine.draft is not None, args.marks)
    for sample in range(args.num_samples):
        last = sample + 1 == args.num_samples
        with profile(args.profile) if args.profile and last else nullcontext():
            result = decode_until(
                engine, tokenizer, prompt, args.max_new_tokens, args.seed + sample, args.stop
            )
        warn_of_drift(drift, result)
        if args.json:
            text = cut(answer_text(tokenizer, result.tokens), args.stop)
            print(as_json(engine, result, text, args.stop), flush=True)
            continue
        print(paint_tokens(tokenizer, result, paint, args.stop), flush=True)
        if paint.on and last:
            print(f"\n{paint.legend}", file=sys.stderr)
        print(summary(name_of(engine), result), file=sys.stderr)
    if args.compare and not args.json and engine.draft is not None:
        compare_plainly(args, engine, prompt)


@contextmanager
def profile(path: Path) -> Iterator[None]:
    """Writes a Chrome trace of what runs inside."""
    with torch.profiler.profile() as trace:
        yield
    if tp.RANK == 0:
        with tempfile.TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/trace.json")  # it takes no name that is not UTF-8
            write_file(path, Path(f"{folder}/trace.json").read_bytes())


COMPARED = 5  # pairs of runs that a ratio of speeds is the median of, after one that warms up


def compare_plainly(args: argparse.Namespace, engine, prompt: list[int]) -> None:
    """Decodes the same prompt without a draft and with it, by turns, and prints passes of the target and
    speeds of both."""
    plain_engine = engine.without_draft()
    if args.compile:
        plain_engine.warm_up()
    ratios = []
    for turn in range(COMPARED + 1):
        fast, plain = (
            each.generate(prompt, args.max_new_tokens, args.seed) for each in (engine, plain_engine)
        )
        if turn:
            ratios.append(fast.tokens_per_second / plain.tokens_per_second)
    ratios.sort()
    same = (
        "" if args.temperature else f", {'the same text' if plain.tokens == fast.tokens else 'another text'}"
    )
    print(summary("plain", plain), file=sys.stderr)
    print(
        f"{args.verify}: {fast.rounds} passes of the target for {len(fast.tokens)} tokens, plain: "
        f"{plain.rounds} for {len(plain.tokens)}{same}; {ratios[COMPARED // 2]:.2f} times as fast (median "
        f"of {COMPARED} runs by turns, {ratios[0]:.2f} to {ratios[-1]:.2f}).",
        file=sys.stderr,
    )


def introduce(args: argparse.Namespace, engine) -> Drift:
    """Says on standard error what runs and what is promised of it, and returns what watches over that."""
    for name, model in (("target", engine.target), ("draft", engine.draft)):
        if model is not None:
            print(memory_line(name, model), file=sys.stderr)
    if engine.head is not None and bool(engine.head.info.get("chat")) != args.chat:
        forms = ["without the chat format", "in the chat format"]
        trained, runs = forms[not args.chat], forms[args.chat]
        print(f"Note: {args.judge_path} was trained {trained}, and this run is {runs}.", file=sys.stderr)
    if args.checkpoint_path == DEMO / "target":
        print(f"question: {args.prompt}" if args.compare else f"Note: {DEMO_FORMS}", file=sys.stderr)
    return announce(args, engine)


def parse_args(argv: list[str] | None, doc: str = "") -> argparse.Namespace:
    """The command line of generate.py. Without a target it names the demo pair and a demo problem."""
    parser, tokens = Parser(doc), whole(1, MOST_TOKENS)
    group = parser.add_argument_group("models")
    add_model_flags(group)
    add_device_flags(group)
    add_flags(group, "compile", "pdl")
    add_mode_flags(parser.add_argument_group("quantised weights"))

    group = parser.add_argument_group("what to say")
    add = group.add_argument
    add(
        "--prompt",
        help="text, a number N for a synthetic prompt of N tokens, or - for standard input (default: a demo "
        "problem)",
    )
    add_flags(group, "chat", "system")
    add("--interactive", action="store_true", help="ask for prompts, stream answers; Ctrl-C stops an answer")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the answer, and is not part of it; may be given several times (default: none)",
    )
    add("--num_samples", type=tokens, default=1, help="answers to the prompt")
    add_decoding_flags(group)
    seed = {"type": whole(-(2**63), 2**63 - 1), "default": 0, "help": "of sampling"}
    add_flags(group, "cache_length", seed=seed)

    group = parser.add_argument_group("verification")
    add = group.add_argument
    add("--verify", choices=["plain", *RULES], help="default: judge if there is one, else standard")
    add("--threshold", type=float, help="the rule's knob (default: the judge's own, or the rule's)")
    add(
        "--relax_between", nargs=2, metavar=("BEGIN", "END"), help="the rule applies only between these texts"
    )
    add("--calibration", type=Path, help="a file by calibrate.py: its rule, its threshold, its guarantee")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add_flags(group, json={"help": "print one JSON object a sample, and nothing else"},
              profile={"help": "write a Chrome trace of the last sample to this file"})  # fmt: skip
    add("--marks", action="store_true", help="show who accepted each token by brackets, also in a pipe")
    add("--debug_numerics", action="store_true", help="where logits are not finite, say where that begins")
    add_rank_flags(parser.add_argument_group("several GPUs"))

    args = parser.parse_args(argv)
    if args.system is not None and not args.chat:
        raise InputError("--system is a message of a chat; give --chat, or leave it out.")
    if "" in args.stop:
        raise InputError("--stop '' would end every answer before it begins; give a text.")
    args.compare = args.checkpoint_path is None and args.prompt is None and not args.interactive  # the demo
    if args.compare:
        args.prompt = DEMO_PROMPT
    name_demo(args)
    if args.verify is None and not args.calibration:
        args.verify = "judge" if args.judge_path else "standard"
        if not args.draft_checkpoint_path:
            args.verify = "plain"
    return args
