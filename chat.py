"""Chat templates: a folder's own Jinja program, found, filled in as transformers fills it in, and bounded.

`find_template` gives a folder's `ChatTemplate`, or says why there is none. What a template writes comes in
parts, so that the tokenizer reads control tokens out of its own text only, never out of a message's.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cli import InputError, one_line, shortened_value
from files import read_json, read_text

MOST_TEMPLATE = 1 << 20  # bytes of a chat template
MOST_STEPS = (
    3_000_000  # lines of Python to read or fill in a template (Llama 3.1's: 2,000 and a few a message)
)
MOST_MEMORY = 1 << 30  # bytes that a template may take on top of what the process has


class TemplateChangesAnswers(InputError):
    """The template writes an earlier answer otherwise than it was given: the cache cannot go on from it."""


class ChatTemplate:
    """A folder's chat template, filled in as transformers fills it in. source: its text; where: its file, in
    a sentence; special: what it may call bos_token, eos_token and so on."""

    def __init__(self, source: str, where: str, special: dict[str, str]):
        self.source, self.where, self.special = source, where, special
        self.template: jinja2.Template | None = None
        self.now = datetime.now()

    def render(self, messages: list[dict[str, str]], controls: Callable) -> list[tuple[str, bool]]:
        """The filled-in template in parts (text, whether it is the template's own and not a message's
        content).

        To tell them apart, texts that no one can guess stand in for the contents. A template may look into a
        content (as DeepSeek's, which drops what was thought in earlier turns): then that content is left as
        it is, if the template's own text has the same control tokens (by `controls`) with it and without.
        Raises InputError where it has not.
        """
        self.now = datetime.now()
        whole = self.fill(messages)
        wanted = None
        for hidden in (lambda role: True, lambda role: role != "assistant", lambda role: False):
            marks, shown = {}, []
            for message in messages:
                content = message["content"]
                inner = content.strip()
                mark = "q" + secrets.token_hex(16)
                if inner and hidden(message["role"]):
                    marks[mark] = inner
                    content = content.replace(inner, mark, 1)  # the space around it stays: templates trim it
                shown.append(message | {"content": content})
            parts = re.split("(" + "|".join(marks) + ")", self.fill(shown)) if marks else [whole]
            parts = [(marks.get(part, part), part not in marks) for part in parts]
            found = [controls(text) for text, own in parts if own]
            found = [id for ids in found for id in ids]
            wanted = found if wanted is None else wanted
            if found == wanted and "".join(text for text, _ in parts) == whole:
                return parts
        raise InputError(
            f"{self.where}: the chat template changes a message that spells a control token; leave that text "
            f"out."
        )

    def after_answer(self) -> str:
        """What the template writes after an answer, before the next question if there may be one."""
        answer, last = "q" + secrets.token_hex(16), "q" + secrets.token_hex(16)
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        try:
            text = self.fill([*said, {"role": "user", "content": last}], False)
        except InputError:
            text = self.fill(said, False)
        return text.partition(answer)[2].partition(last)[0]

    def fill(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The filled-in template. Raises InputError with what it says against the messages, or what is wrong
        with it."""
        try:
            with bounded():
                if self.template is None:
                    self.template = self.environment().from_string(self.source)
                return self.template.render(
                    messages=[dict(message) for message in messages], tools=None, documents=None,
                    add_generation_prompt=add_generation_prompt, **self.special,
                )  # fmt: skip
        except TooLong:
            raise InputError(f"{self.where}: the chat template does not come to an end.") from None
        except MemoryError:
            raise InputError(f"{self.where}: the chat template takes too much memory.") from None
        except RecursionError:
            raise InputError(f"{self.where}: the chat template is nested too deeply.") from None
        except Exception as error:  # a template is a program: anything may be wrong with it
            reason = (one_line(str(error)) or type(error).__name__).rstrip(".")
            raise InputError(
                f"{self.where}: the chat template cannot be used for these messages: {reason}."
            ) from None

    def environment(self) -> jinja2.Environment:
        """Jinja as chat templates expect it (settings and functions are those of transformers'
        apply_chat_template)."""
        extensions = ["jinja2.ext.loopcontrols", Generation]
        jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        jinja.filters["tojson"] = to_json
        jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: self.now.strftime(form)}
        return jinja


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no single product or power can take minutes."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context, operator, left, right):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right if operator == "**" else right.bit_length())
            if bits > 1_000_000:
                raise SecurityError("a number is too large.")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """The block {% generation %}, which marks an assistant's words for training; here it is only its
    content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would write HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str):
    """`raise_exception` of templates."""
    raise jinja2.TemplateError(message)


class TooLong(BaseException):
    """Raised inside a template that does not come to an end; nothing in Jinja catches it."""


@contextmanager
def bounded(steps: int = MOST_STEPS) -> Iterator[None]:
    """Python for at most so many lines and, on Linux, in at most MOST_MEMORY more than now: raises TooLong,
    MemoryError."""
    left = steps

    def count(frame, event, arg):
        nonlocal left
        left -= 1
        if left < 0:
            raise TooLong
        return count

    before = sys.gettrace()
    with bounded_memory():
        sys.settrace(count)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets the process grow by at most MOST_MEMORY, where the system can do that."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY
    lowest = min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=most)
    resource.setrlimit(resource.RLIMIT_AS, (min(most, lowest), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def find_template(folder: Path, settings: dict, special: dict[str, str]) -> ChatTemplate | str:
    """A folder's chat template, or why there is none. settings: tokenizer_config.json; special: what the
    template may call bos_token and so on.

    As in transformers files of their own come before tokenizer_config.json, and of several the one named
    default is taken.
    """
    found, files = settings.get("chat_template"), templates_in(folder)
    where = folder / ("chat_template.jinja" if "default" in files else "tokenizer_config.json")
    if found is None and not files and os.path.lexists(older := folder / "chat_template.json"):
        where, found = older, read_json(older).get("chat_template")
    named = (
        named_templates(found, where)
        if isinstance(found, list)
        else {}
        if found is None
        else {"default": found}
    )
    named |= files
    found = named.get("default")
    if named and "default" not in named:
        names = ", ".join(sorted(named))
        return f"{where} has several chat templates ({shortened_value(names)}), but none of the name default"
    if found is not None and (not isinstance(found, str) or len(found) > MOST_TEMPLATE):
        raise InputError(f"{where}: chat_template={shortened_value(found)} is no template.")
    if not found:
        return (
            f"{folder} has no chat format: neither chat_template.jinja nor chat_template in "
            f"tokenizer_config.json"
        )
    return ChatTemplate(found, str(where), special)


def templates_in(folder: Path) -> dict[str, str]:
    """The templates that are files of their own: chat_template.jinja, and others in a folder beside it."""
    single, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    named = {"default": read_text(single, most=MOST_TEMPLATE)} if os.path.lexists(single) else {}
    if more.is_dir():
        named |= {path.stem: read_text(path, most=MOST_TEMPLATE) for path in sorted(more.glob("*.jinja"))}
    return named


def named_templates(found: list, where: Path) -> dict:
    """Templates by name, as tokenizer_config.json lists several."""
    try:
        return {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        raise InputError(f"{where}: chat_template is not a list of objects with name and template.") from None
