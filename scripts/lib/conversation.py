"""A conversation on a terminal: every further turn goes on from the caches of those before."""

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import tp
from chat import TemplateChangesAnswers
from cli import InputError, number, shortened
from files import check_writable, write_file
from judge import RULES, needs_judge, relaxed_rules
from scripts.lib.guarantee import Drift, announce, warn_of_drift
from scripts.lib.result import Result
from scripts.lib.stops import AnswerText
from scripts.lib.terminal import Paint, encode_prompt, first_messages, name_of, summary
from tokenizer import Tokenizer


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
    """Asks for prompts and commands until end of input. With --chat all turns are one conversation; without,
    each prompt stands alone.

    Ctrl-C stops the answer, of which what was shown is kept; while a prompt is asked for it ends the program.
    """
    if tp.RANK == 0 and sys.stdin is not None and sys.stdin.isatty():
        with suppress(ImportError):  # arrow keys and history, where Python has it
            import readline  # noqa: F401
    talk = Conversation(args, engine, tokenizer, drift)
    engine.generator.manual_seed(args.seed % 2**63)
    while (line := tp.first(ask)) is not None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                talk.command(line)
            elif line:
                talk.turn(line.removeprefix("/"))
        except InputError as error:
            print(f"generate.py: {error}", file=sys.stderr)
    print()


class Conversation:
    """What was said, its ids, and what the caches hold of it."""

    def __init__(self, args: argparse.Namespace, engine, tokenizer: Tokenizer, drift: Drift):
        self.args, self.tokenizer = args, tokenizer
        self.loaded = engine  # with the draft and the judge that were loaded, whatever rule is in force
        self.cached: list[int] = []  # what the caches of target and draft hold
        self.told = self.explained = False  # that the template changes turns; what the colours mean
        self.begin()
        self.use(engine, drift)

    def begin(self) -> None:
        """Forgets all turns. What the caches hold stays, for a next prompt that begins alike."""
        self.messages = first_messages(self.args)
        self.ids: list[int] = []  # of all turns, answers as they were decoded; []: to be encoded
        self.results: list[Result] = []

    def use(self, engine, drift: Drift) -> None:
        self.engine, self.drift = engine, drift
        self.paint = Paint(sys.stdout, engine.draft is not None, self.args.marks)
        if self.paint.on and not self.explained:
            print(self.paint.legend, file=sys.stderr)
        self.explained = self.explained or self.paint.on

    @property
    def taken(self) -> int:
        """The tokens of all turns by now."""
        return self.results[-1].prompt_tokens + len(self.results[-1].tokens) if self.results else 0

    @property
    def room(self) -> int:
        """The most tokens that a conversation may have."""
        return min(self.engine.length, self.engine.context[0])

    # A turn

    def turn(self, text: str) -> None:
        """Answers a person's text. Raises InputError, and leaves the conversation as it was, where there is
        no room."""
        prompt = self.encode(text)
        if len(prompt) >= self.room and self.args.chat and self.results:
            raise InputError(
                f"The context of {self.room} tokens is full: with this turn the conversation has "
                f"{len(prompt)}; /reset begins a new one."
            )
        answer, ids = self.answer(prompt)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.ids = ids if self.args.chat else []
        self.results.append(self.engine.result)
        warn_of_drift(self.drift, self.engine.result)

    def encode(self, text: str) -> list[int]:
        """The ids of all turns and this one, up to where its answer begins."""
        if not self.args.chat:
            return encode_prompt(self.args, self.tokenizer, text)
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.ids:
            try:
                if self.goes_on(messages):
                    return self.ids + self.tokenizer.encode_next(text)
            except TemplateChangesAnswers:
                pass
            self.tell("the chat template rewrites earlier turns")
        return self.tokenizer.encode_chat(messages)

    def goes_on(self, messages: list[dict[str, str]]) -> bool:
        """Whether the template writes what was said before as it stood there when the last answer was given,
        and then that answer. Reasoning models' templates drop what was thought, Mistral's moves the system
        message."""
        before, whole = map(self.tokenizer.chat.fill, (messages[:-2], messages))
        answer = messages[-2]["content"].strip()
        return whole.startswith(before) and whole[len(before) :].lstrip().startswith(answer)

    def tell(self, why: str) -> None:
        """Says once why a conversation is encoded anew."""
        if not self.told:
            print(
                f"Note: {why}, so each turn encodes the whole conversation anew; what begins as in the cache "
                f"is kept.",
                file=sys.stderr,
            )
        self.told = True

    def answer(self, prompt: list[int]) -> tuple[str, list[int]]:
        """Prints an answer as it comes, until it ends or Ctrl-C, and returns what was shown, and the ids up
        to there, [] where these say something else."""
        engine, stream = self.engine, AnswerText(self.tokenizer, self.args.stop)
        keep = len(os.path.commonprefix([prompt, self.cached]))
        self.cached, said, shown = [], [], []  # an answer that fails clears the caches

        def show(pieces: list[tuple[str, str]]) -> None:
            shown.extend(text for text, _ in pieces)
            print("".join(self.paint.token(*piece) for piece in pieces), end="", flush=True)

        most = min(self.args.max_new_tokens, max(1, self.room - len(prompt)))
        try:
            for token, letter in engine.stream(prompt, most, keep=keep):
                said.append(token)
                show(stream.push(token, letter))
                if stream.found:
                    engine.result.stop_reason = "text"
                    break
        except KeyboardInterrupt:
            if tp.shard():  # torchrun ends all ranks
                raise
            engine.result.stop_reason = "interrupt"
        show(stream.flush())
        print(flush=True)
        print(summary(name_of(engine), engine.result), file=sys.stderr)
        if said:  # the target has not read the last token, and the draft perhaps not the one before
            self.cached = (prompt + engine.result.tokens)[:-2]
            said = said[:-1] if said[-1] in self.tokenizer.stop_ids else said
        return "".join(shown), [] if stream.found else prompt + said

    # Commands

    def command(self, line: str) -> None:
        """Runs a line that begins with /. Raises InputError for one that is no command."""
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise InputError(f"There is no command {shortened(name)}; /help lists them.")
        action, argument, _ = COMMANDS[name]
        if bool(rest.strip()) != bool(argument) and name != "/system":
            raise InputError(f"{name} takes {argument or 'nothing'}; /help says more.")
        action(self, rest.strip())

    def reset(self, _: str) -> None:
        self.begin()

    def system(self, text: str) -> None:
        if not self.args.chat:
            raise InputError("/system is a message of a chat; start with --chat.")
        turns = self.messages[len(first_messages(self.args)) :]
        self.args.system = text or None
        self.messages, self.ids = first_messages(self.args) + turns, []

    def verify(self, rule: str) -> None:
        if rule not in ("plain", *RULES):
            raise InputError(f"/verify {shortened(rule)} is no rule; known are plain, {', '.join(RULES)}.")
        lacks = rule != "plain" and self.loaded.draft is None
        if lacks or (needs_judge(rule) and self.loaded.head is None):
            raise InputError(
                f"/verify {rule} needs a {'draft' if lacks else 'judge'}, and this run has loaded none; "
                f"start with --verify {rule}."
            )
        engine = self.loaded.otherwise(rule)
        engine.generator = self.engine.generator
        if self.args.compile:
            print(f"compiled and warmed up in {engine.warm_up():.1f} s", file=sys.stderr)
        self.cached = []  # without a draft its cache is not kept up
        self.use(engine, self.promise(engine))

    def threshold(self, text: str) -> None:
        try:
            value = number(0, float("inf"))(text)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"/threshold {error}.") from None
        self.engine.set_threshold(value)
        self.drift = self.promise(self.engine)

    def promise(self, engine) -> Drift:
        """Says what is promised of the rule and threshold now in force."""
        self.args.verify = engine.settings.verify
        return announce(self.args, engine) if self.args.verify in relaxed_rules() else Drift(None)

    def stats(self, _: str) -> None:
        results = self.results
        tokens, rounds = sum(len(r.tokens) for r in results), sum(r.rounds for r in results)
        seconds, accepted = sum(r.seconds_decode for r in results), sum(r.accepted for r in results)
        prompts, read = sum(r.prompt_tokens for r in results), sum(r.prefilled + 1 for r in results)
        print(
            f"{len(results)} turns, {name_of(self.engine)} now: {tokens} tokens in {rounds} rounds, "
            f"{tokens / seconds if seconds else 0:.1f} tokens/s, m* {accepted / max(1, rounds):.2f}; of "
            f"{prompts} prompt tokens {prompts - read} were in the cache; {self.taken} of {self.room} "
            f"positions are taken.",
            file=sys.stderr,
        )

    def save(self, name: str) -> None:
        """Writes the conversation as JSON, into a new file."""
        s, path = self.engine.settings, Path(name)
        names = ("verify", "threshold", "temperature", "top_k", "top_p", "min_p")
        content = {"messages": self.messages, **{name: getattr(s, name) for name in names}}

        def write() -> str | None:
            try:
                check_writable(path, "/save")
                if path.exists():
                    return f"/save {path} exists; name a new file."
                write_file(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
            except (InputError, OSError) as error:
                return str(error)
            return None

        if mistake := tp.first(write):
            raise InputError(mistake)
        print(f"Wrote {path}.", file=sys.stderr)

    def help(self, _: str) -> None:
        for name, (_, argument, what) in COMMANDS.items():
            print(f"{name + ' ' + argument:16} {what}", file=sys.stderr)
        print("//TEXT           says a text that begins with /", file=sys.stderr)


COMMANDS = {  # name -> what it does, its argument, its help
    "/reset": (Conversation.reset, "", "begins a new conversation"),
    "/system": (Conversation.system, "TEXT", "another system message; without a text, none"),
    "/verify": (Conversation.verify, "RULE", "another rule, or plain"),
    "/threshold": (Conversation.threshold, "X", "the rule's knob"),
    "/stats": (Conversation.stats, "", "figures of the conversation so far"),
    "/save": (Conversation.save, "FILE", "writes the conversation as JSON"),
    "/help": (Conversation.help, "", "this list"),
}
