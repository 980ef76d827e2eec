"""Marks the wrong spans of model answers by hand, in a terminal: training data for a judge.

    python scripts/annotate.py --data answers.jsonl --out annotated.jsonl --checkpoint_path
    Llama-3.1-8B-Instruct

--data holds one JSON object a line: `prompt`, `response`, and, where there are any, `errors` (null or
missing: nobody has looked yet), `reference` (shown with the question), `right` and `source`. All further
fields are kept. Answers with `"right": true` and no errors are known to be right: they are passed on and not
asked about, unless with --all.

--out holds the answers that are done, in the order of --data, with `errors` as [start, end) in characters of
the response. Marks are whole tokens, as the checkpoint's tokenizer splits the answer: a judge knows nothing
smaller. A character whose bytes are spread over several tokens is marked as one, with all of them.

Every change goes into the journal beside it (--out with .marks appended) before it is shown. The journal
alone counts, --out is written from it: whatever ends the program, the next start goes on at the first answer
that is not done. Answers are known there by their text, so --data may grow or change its order meanwhile.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import hashlib
import json
import re
import select
import signal
import termios
import tty
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from checkpoint import DEMO
from files import Lines, check_not_input, check_writable, read_json_lines, write_file
from scripts.lib.answers import encode_answer, is_span
from scripts.lib.flags import add_flags
from scripts.lib.pair import files_in
from tokenizer import Tokenizer, load_tokenizer

HELP = """
Mark every token that makes the answer wrong; an answer without marks counts as right (where the checker
calls it wrong, enter is asked for a second time).

left right, h l     one token back, on             space, m   mark the token, or the selection; again: unmark
up down, k j        one line up, down              v          begin a selection, or drop it
b w                 one word back, on              e          mark from here to the end of the sentence
page up, page down  scroll                         c          clear all marks of this answer
                                                   u          undo
enter, n            this answer is done: on to the next that is not
p                   back to the answer before
s                   skip: asked again at the next start
q, Ctrl-C           quit; every mark is kept already

Any other key closes this page.
"""
FOOTER = "space mark  v select  u undo  enter done, next  p back  s skip  q quit  ? help"
DOUBT = "nothing is marked, but the checker calls it wrong: enter again if it is right"
ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[@-~])")  # one key, as terminals send arrows and the like
ESCAPE_BEGUN = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O)?")
KEYS = {b"\r": "n", b"\n": "n", b" ": "m", b"\x03": "q", b"\x1b[5~": "page up", b"\x1b[6~": "page down"}
SENTENCE_END = re.compile(r"[.!?]+(?=\s|\Z)|[。！？]+|(?=\n)|\Z")
TEXT, HEADING = -1, -2  # stand where a row of an answer has the number of a token
Row = list[tuple[int, str]]  # (number of the token, what is shown of it), from left to right


def are_spans(errors: object, length: float = float("inf")) -> bool:
    """Whether this is a list of [start, end] with 0 <= start < end <= length."""
    return isinstance(errors, list) and all(is_span(span, length) for span in errors)


def read_item(item: dict, where: str) -> dict:
    """One answer. Raises InputError beginning with `where`."""
    for name, kind in (("prompt", str), ("response", str), ("reference", str), ("right", bool)):
        value, optional = item.get(name), name in ("reference", "right")
        if not isinstance(value, kind) and not (optional and value is None):
            raise InputError(f"{where}: field {name!r} must be a {kind.__name__}.")
    if not (length := len(item["response"])):
        raise InputError(f"{where}: field 'response' is empty.")
    if item.get("errors") is not None and not are_spans(item["errors"], length):
        raise InputError(
            f"{where}: field 'errors' must be null or a list of [start, end] within 0 and {length}."
        )
    return item


def read_items(path: Path) -> list[dict]:
    """The answers to mark. Raises InputError naming file, line and field of whatever is wrong."""
    items = [read_item(item, where) for where, item in read_json_lines(path, "--data")]
    if not items:
        raise InputError(f"--data {path} holds no answers; give JSON lines with prompt and response.")
    return items


def answer_key(item: dict) -> str:
    """What the journal knows an answer by."""
    return hashlib.sha256(json.dumps([item["prompt"], item["response"]]).encode()).hexdigest()[:32]


class Journal:
    """Marks as they were made, one JSON line a change: {"answer", "errors", "done"}; the last line of an
    answer counts.

    One process at a time. Raises InputError when another one has it, or when the file is no journal.
    """

    def __init__(self, path: Path):
        self.path, self.records = path, {}  # answer_key: {"errors", "done"}
        self.lines = Lines(path)
        try:
            for record in self.lines.objects():
                self.take(record)
            if not self.lines.content and not b'{"answer": "'.startswith(self.lines.rest[:12]):
                raise InputError("it has no whole line.")
        except InputError as error:
            self.lines.close()
            raise InputError(
                f"{path} is no journal of this script ({str(error)[:-1]}); name another --out."
            ) from None

    def take(self, record: dict) -> None:
        """Takes one line in. Raises InputError for one that is no record."""
        key = record.get("answer")
        record = {name: value for name, value in record.items() if name != "answer"}
        good = isinstance(key, str) and record.keys() == {"errors", "done"}
        if not good or not are_spans(record["errors"]) or type(record["done"]) is not bool:
            raise InputError("a line is no record.")
        self.records[key] = record

    def put(self, key: str, errors: list[list[int]], done: bool) -> None:
        """Records an answer's state; it is on the disk when this returns."""
        record = {"errors": errors, "done": done}
        try:
            self.lines.add({"answer": key, **record})
            os.fsync(self.lines.file.fileno())
        except (InputError, OSError) as error:
            reason = (
                error
                if isinstance(error, InputError)
                else f"{self.path} cannot be written: {error.strerror}."
            )
            raise InputError(f"The last change is not kept: {reason}") from None

        self.records[key] = record

    def is_done(self, key: str) -> bool:
        return self.records.get(key, {"done": False})["done"]


@dataclass(frozen=True)
class Marking:
    """One answer and the marks on it. A selection runs from `anchor` to the cursor."""

    response: str
    units: tuple[tuple[int, int], ...]  # characters of each token; tokens that share a character are one unit
    starts: tuple[bool, ...]  # whether a word begins with the unit
    marks: frozenset[int] = frozenset()  # numbers of units
    cursor: int = 0
    anchor: int | None = None
    past: tuple[frozenset[int], ...] = ()  # marks before each change, for undo

    @property
    def errors(self) -> list[list[int]]:
        """The marks as spans of characters, neighbours in one."""
        spans: list[list[int]] = []
        for start, end in (self.units[i] for i in sorted(self.marks)):
            if spans and spans[-1][1] == start:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        return spans

    @property
    def selection(self) -> frozenset[int]:
        """The selected units; the cursor's own when no selection has begun."""
        ends = (self.cursor, self.cursor if self.anchor is None else self.anchor)
        return frozenset(range(min(ends), max(ends) + 1))


def make_units(spans: list[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """The response cut where one token ends and the next begins, and nowhere within a character or a
    token."""
    cuts, reach = [0], 0
    for start, end in spans:
        if start >= reach and cuts[-1] < start < length:
            cuts.append(start)
        reach = max(reach, end)
    return tuple(zip(cuts, [*cuts[1:], length]))


def open_answer(tokenizer: Tokenizer, item: dict, errors: list[list[int]]) -> Marking:
    """An answer in the tokenizer's units, those marked that an error touches (as `label_tokens` reads
    them)."""
    response = item["response"]
    units = make_units(encode_answer(tokenizer, item["prompt"], response)[2], len(response))
    starts = tuple(
        a == 0 or response[a] != "\n" and (response[a].isspace() or response[a - 1] == "\n") for a, _ in units
    )
    marks = frozenset(
        i for i, (start, end) in enumerate(units) if any(start < b and end > a for a, b in errors)
    )
    return Marking(response, units, starts, marks)


def row_of(rows: list[Row], unit: int) -> int:
    """The row in which a unit begins."""
    return next(number for number, row in enumerate(rows) if any(i == unit for i, _ in row))


@cache
def width_of(char: str) -> int:
    """Columns that a character takes: none for a combining mark, two for a wide one."""
    if char == "\n" or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def columns(row: Row) -> dict[int, int]:
    """{unit: the column at which it begins}"""
    places, column = {}, 0
    for i, text in row:
        places[i] = column
        column += sum(map(width_of, text))
    return places


def moved(state: Marking, key: str, rows: list[Row]) -> int:
    """Where the cursor goes."""
    cursor, last = state.cursor, len(state.units) - 1
    if key in ("h", "l"):
        return min(max(cursor + (1 if key == "l" else -1), 0), last)
    if key == "w":
        return next((i for i in range(cursor + 1, last + 1) if state.starts[i]), last)
    if key == "b":
        return next((i for i in range(cursor - 1, -1, -1) if state.starts[i]), 0)
    at = row_of(rows, cursor)
    column = columns(rows[at])[cursor]
    for row in rows[at + 1 :] if key == "j" else rows[:at][::-1]:
        places = columns(row)
        nearest = max((i for i in places if places[i] <= column), default=cursor)
        if nearest != cursor:  # else the row shows no more than the rest of a long token
            return nearest

    return cursor


def edit(state: Marking, key: str, rows: list[Row]) -> Marking:
    """The state after a key that moves or marks; `rows` is the answer as shown, for moving by line."""
    if key in ("h", "l", "k", "j", "w", "b"):
        return replace(state, cursor=moved(state, key, rows))
    if key == "v":
        return replace(state, anchor=state.cursor if state.anchor is None else None)
    marks, past = state.marks, (*state.past, state.marks)
    if key == "m":
        chosen = state.selection
        marks = marks - chosen if chosen <= marks else marks | chosen
    elif key == "e":
        begin = state.units[state.cursor][0]
        end = max(SENTENCE_END.search(state.response, begin).end(), begin + 1)
        marks = marks | {i for i, (start, _) in enumerate(state.units) if begin <= start < end}
    elif key == "c":
        marks = frozenset()
    elif key == "u" and state.past:
        marks, past = state.past[-1], state.past[:-1]

    return state if marks == state.marks else replace(state, marks=marks, past=past, anchor=None)


@cache
def visible(char: str) -> str:
    """A character as it is safe to show: text from a model may hold what would drive the terminal or turn its
    writing round."""
    if char < " " and char not in "\t\n":
        return chr(0x2400 + ord(char))  # its picture
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")
    return {"\t": "→   ", "\n": "\n"}.get(char, "·" if hidden else char)


def pieces_of(state: Marking, colour: bool) -> tuple[str, ...]:
    """What is shown of each unit; without colours marks stand in brackets."""
    pieces = []
    for i, (start, end) in enumerate(state.units):
        text = "".join(map(visible, state.response[start:end])).replace("\n", "↵\n")
        if not width_of(text[0]):
            text = "◌" + text  # an accent on its own needs something to stand on
        if not colour and i in state.marks:
            text = text if i - 1 in state.marks else "⟦" + text
            body = text.removesuffix("\n")
            text = text if i + 1 in state.marks else body + "⟧" + text[len(body) :]
        pieces.append(text)
    return tuple(pieces)


@lru_cache(maxsize=8)
def wrap(pieces: tuple[str, ...], starts: tuple[bool, ...], width: int) -> list[Row]:
    """Rows of at most `width` columns, broken before words where they fit into a row."""
    rows, used = [[]], 0
    first = [i for i, start in enumerate(starts) if start or not i]
    for begin, end in zip(first, [*first[1:], len(pieces)]):
        size = sum(width_of(char) for piece in pieces[begin:end] for char in piece)
        if width - used < size <= width:
            rows.append([])
            used = 0
        for i in range(begin, end):
            for char in pieces[i]:
                if char == "\n" or used + width_of(char) > width:
                    rows.append([])
                    used = 0
                if char != "\n":
                    text = rows[-1].pop()[1] if rows[-1] and rows[-1][-1][0] == i else ""
                    rows[-1].append((i, text + char))
                    used += width_of(char)

    return rows


def wrap_text(text: str, width: int) -> list[Row]:
    """Rows of the text around an answer."""
    pieces = re.findall(r"\n|[^\S\n]*\S+|[^\S\n]+", "".join(map(visible, text)))
    return [[(TEXT, piece) for _, piece in row] for row in wrap(tuple(pieces), (True,) * len(pieces), width)]


def paint(row: Row, state: Marking | None, colour: bool) -> str:
    """A row with its attributes: the cursor reversed, a selection underlined, marks on red."""
    painted, selected = "", state.selection if state and state.anchor is not None else ()
    for i, text in row:
        codes = ["1"] * (i == HEADING) + ["4"] * (i in selected)
        if state and i >= 0:
            codes += ["97;41"] * (colour and i in state.marks) + ["7"] * (i == state.cursor)
        painted += f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text
    return painted


class Session:
    """What is asked, where we are, and what each key does; knows no terminal, only its width and height."""

    def __init__(
        self,
        items: list[dict],
        journal: Journal,
        tokenizer: Tokenizer,
        out: Path,
        *,
        ask_all: bool,
        colour: bool,
    ):
        self.journal, self.tokenizer, self.out, self.colour = journal, tokenizer, out, colour
        self.items = [(answer_key(item), item) for item in items]
        known = {
            key for key, item in self.items if item.get("right") and item.get("errors") == [] and not ask_all
        }
        self.known_right = known - journal.records.keys()  # an earlier --all may have asked about some
        self.queue: dict[str, dict] = {}  # what is asked, in order; the same text twice is asked once
        for key, item in self.items:
            if key not in self.known_right:
                self.queue.setdefault(key, item)

        self.keys = list(self.queue)
        self.states: dict[str, Marking] = {}
        self.position, self.top, self.follows, self.helps, self.doubts = -1, 0, True, False, False
        self.go_on()

    @property
    def key(self) -> str | None:
        """The answer on the screen; None after the last."""
        return self.keys[self.position] if self.position < len(self.keys) else None

    @property
    def state(self) -> Marking | None:
        """Its marks; tokenised when it is first shown, so that a start takes no longer for more answers."""
        if self.key and self.key not in self.states:
            item = self.queue[self.key]
            errors = self.journal.records.get(self.key, item).get("errors") or []
            self.states[self.key] = open_answer(self.tokenizer, item, errors)
        return self.states.get(self.key)

    def go_to(self, position: int) -> None:
        """To this answer, from its top; a selection that was begun here is dropped."""
        if self.position >= 0 and self.state:
            self.states[self.key] = replace(self.state, anchor=None)
        self.position, self.top, self.follows = position, 0, True

    def go_on(self) -> None:
        """To the next answer that is not done."""
        later = range(self.position + 1, len(self.keys))
        self.go_to(next((i for i in later if not self.journal.is_done(self.keys[i])), len(self.keys)))

    def press(self, key: str, width: int, height: int) -> bool:
        """Does what the key says; False for quit. A change is in the journal when this returns."""
        if key == "q":
            return False
        doubted, self.doubts = self.doubts, False
        if self.helps or key == "?":
            self.helps = not self.helps
        elif key in ("page up", "page down"):
            self.top, self.follows = self.top + max(height - 4, 1) * (1 if key == "page down" else -1), False
        elif key == "p":
            self.go_to(max(self.position - 1, 0))
        elif (
            self.state
            and key == "n"
            and self.queue[self.key].get("right") is False
            and not (self.state.marks or doubted)
        ):
            self.doubts = True  # the checker and this person differ: asked once
        elif self.state and key == "n":
            self.journal.put(self.key, self.state.errors, True)
            self.write_out()
            self.go_on()
        elif self.state and key == "s":
            if self.journal.is_done(self.key):
                self.journal.put(self.key, self.state.errors, False)
            self.go_on()
        elif self.state:
            before = self.state
            self.states[self.key] = edit(before, key, self.answer_rows(width))
            # also of an answer that was done: it is open again until it is confirmed
            if self.state.marks != before.marks:
                self.journal.put(self.key, self.state.errors, False)
            self.follows = True

        return True

    def write_out(self) -> None:
        """Writes --out: the answers that are done and those known to be right."""
        errors = {key: record["errors"] for key, record in self.journal.records.items() if record["done"]}
        errors |= {key: [] for key in self.known_right}
        lines = [
            json.dumps(item | {"errors": errors[key]}) + "\n" for key, item in self.items if key in errors
        ]
        try:
            write_file(self.out, "".join(lines).encode())
        except InputError as error:
            raise InputError(f"--out: {str(error)[:-1]}; {self.journal.path} has it all.") from None

    def summary(self) -> str:
        done = [key for key in self.keys if self.journal.is_done(key)]
        wrong = sum(bool(self.journal.records[key]["errors"]) for key in done)
        known = f"; {len(self.known_right)} known to be right" if self.known_right else ""
        return f"{len(done)} of {len(self.keys)} answers done, {wrong} of them with errors{known}"

    def answer_rows(self, width: int) -> list[Row]:
        return wrap(pieces_of(self.state, self.colour), self.state.starts, width)

    def render(self, width: int, height: int) -> list[str]:
        """The screen: `height` lines of at most `width` columns, with their attributes."""
        body, state = max(height - 2, 1), self.state
        if self.helps or not state:
            end = f"\nThere is no answer left to mark here: {self.summary()}.\n\n"
            end += "p goes back to the last one, q quits."
            rows, head = wrap_text(HELP if self.helps else end, width), "annotate.py"
        else:
            rows, answer, item = [], self.answer_rows(width), self.queue[self.key]
            for name in ("prompt", "reference"):
                if item.get(name):
                    rows += [[(HEADING, name)], *wrap_text(item[name], width), []]
            rows += [[(HEADING, "answer")], *answer]
            if self.follows:
                line = len(rows) - len(answer) + row_of(answer, state.cursor)
                margin = body // 4
                self.top = min(max(self.top, line - body + 1 + margin), max(line - margin, 0))
            self.top = max(min(self.top, len(rows) - body), 0)
            rows = rows[self.top :]
            head = f"answer {self.position + 1} of {len(self.keys)}: {len(state.marks)} marked"
            head += ", done" * self.journal.is_done(self.key) + ", selecting" * (state.anchor is not None)
            head += f", {item['source']}" if item.get("source") else ""

        foot = DOUBT if self.doubts else FOOTER
        head, foot = (wrap_text(text.replace("\n", " "), width)[0] for text in (head, foot))
        lines = [head, *rows[:body], *[[]] * (body - len(rows)), foot]
        return [paint(row, state, self.colour) for row in lines[:height]]


def split_keys(data: bytes) -> tuple[list[str], bytes]:
    """Names of the keys that a terminal sent, and the beginning of one whose rest is still to come."""
    keys = []
    while data and not ESCAPE_BEGUN.fullmatch(data):
        escape = ESCAPE.match(data)
        code = escape.group() if escape else data[:1]
        arrow = escape and dict(zip(b"ABCD", "kjlh")).get(code[-1])
        keys.append(arrow or KEYS.get(code, code.decode("latin-1")))
        data = data[len(code) :]
    return keys, data


def show(text: str) -> None:
    """Writes straight to the terminal: in UTF-8 whatever the locale, and nothing is left over when it is
    gone."""
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(1, data) :]


@contextmanager
def full_screen():
    """The terminal in raw mode on its other screen, without cursor and wrapping; as it was afterwards, come
    what may."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # Ctrl-C is a key like any other: nothing interrupts a write
        show("\x1b[?1049h\x1b[?25l\x1b[?7l")
        yield
    finally:
        with suppress(OSError, termios.error):  # the terminal may be gone, as when a connection breaks
            show("\x1b[?7h\x1b[?25h\x1b[?1049l")
            termios.tcsetattr(0, termios.TCSAFLUSH, before)


def wake_on(*signals: signal.Signals) -> int:
    """A file that becomes readable at these signals and holds their numbers; they do nothing else."""
    wake, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in signals:
        signal.signal(number, lambda *_: None)
    return wake


def run(session: Session) -> None:
    """Shows the session and feeds it keys until quit; a signal to end or a closed terminal is quit, too."""
    wake, unread = wake_on(signal.SIGWINCH, signal.SIGINT, signal.SIGTERM, signal.SIGHUP), b""
    while True:
        size = os.get_terminal_size(1)
        width, height = max((size.columns or 80) - 1, 8), size.lines or 24
        show("\x1b[H" + "\r\n".join(line + "\x1b[K" for line in session.render(width, height)) + "\x1b[J")
        ready = select.select([0, wake], [], [])[0]
        if wake in ready and set(os.read(wake, 4096)) - {signal.SIGWINCH}:
            return
        if 0 in ready:
            new = os.read(0, 4096)
            keys, unread = split_keys(unread + new)
            if not new or not all(session.press(key, width, height) for key in keys):
                return


def annotate(args: argparse.Namespace) -> None:
    """Checks everything that can be wrong, then marks until quit."""
    items = read_items(args.data)
    check_writable(args.out, "--out")
    journal_path = args.out.with_name(args.out.name + ".marks")
    for path in (args.out, journal_path):
        check_writable(path, "--out")
        check_not_input(path, [args.data, *files_in([args.checkpoint_path])])

    if args.out.exists() and not journal_path.exists():
        raise InputError(
            f"--out {args.out} exists, but not its journal {journal_path}; name another --out or remove it."
        )

    tokenizer = load_tokenizer(args.checkpoint_path)
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        raise InputError(
            "Marking needs a terminal for input and output, one that can move its cursor (TERM is not dumb)."
        )

    journal, colour = Journal(journal_path), not os.environ.get("NO_COLOR")
    session = Session(items, journal, tokenizer, args.out, ask_all=args.all, colour=colour)
    session.write_out()  # a kill may have come between the journal and this
    with full_screen(), suppress(OSError):  # of a terminal that is gone
        run(session)
    session.write_out()
    with suppress(OSError):
        show(f"{session.summary()}: {args.out}\n")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_flags(
        parser,
        data={"help": "answers to mark, JSON lines"},
        out={"required": True, "help": "answers that are done, JSON lines; goes on where it stopped"},
        checkpoint_path={"default": DEMO / "target", "help": "folder whose tokenizer splits the answers"},
    )
    parser.add_argument("--all", action="store_true", help="ask about answers known to be right, too")
    args = parser.parse_args(argv)
    run_script("annotate.py", lambda: annotate(args))


if __name__ == "__main__":
    main()
