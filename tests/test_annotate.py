"""Protects: no mark is ever lost (kill -9, hangup, quit at any point), spans are valid and in whole tokens, the output is
the same however often the work was interrupted, and the terminal is left as it was found.

The sessions run the real script on a pseudo-terminal and wait for what the screen shows, never for a time.
"""

import errno
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from unicodedata import east_asian_width

import pytest
from conftest import ROOT, exit_code

from cli import InputError
from scripts.annotate import (
    Journal,
    Marking,
    Session,
    edit,
    main,
    make_units,
    open_answer,
    pieces_of,
    split_keys,
    wrap,
)
from tokenizer import load_tokenizer

SCRIPT = str(ROOT / "scripts" / "annotate.py")
DEMO = ROOT / "checkpoints" / "demo" / "target"
TIMES = {
    "prompt": "What is 6 times 7?",
    "response": "6 times 7 is 48.",
    "errors": None,
    "reference": "42",
    "more": {"a": [1, 2.5]},
}
RIGHT = {"prompt": "And 2 plus 2?", "response": "4.", "errors": [], "right": True}
WIDE = {"prompt": "Say it.", "response": "日本語 é 😀!", "source": "hand"}  # 3, 3, 3, 1, 2, 1, 4 and 1 tokens
MARKED = {"prompt": "And 1 plus 1?", "response": "It is\n3.", "errors": [[6, 7]]}
ITEMS = [TIMES, RIGHT, WIDE, MARKED]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def write_lines(path, items) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Terminal:
    """annotate.py on a pseudo-terminal of its own."""

    def __init__(self, *args, rows: int = 24, columns: int = 80, **env: str):
        fresh = pty.openpty()
        self.before, self.output = termios.tcgetattr(fresh[1]), b""  # how every pseudo-terminal begins
        for fd in fresh:
            os.close(fd)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.environ.pop("NO_COLOR", None)
            os._exit(exit_code(main, list(map(str, args)), {"TERM": "xterm"} | env))

    def read(self) -> bool:
        """Takes in what there is; False at the end."""
        assert select.select([self.fd], [], [], 20)[0], f"nothing more came after {self.output[-2000:]!r}"
        try:
            new = os.read(self.fd, 65536)
        except OSError as error:  # how Linux says that the other side has closed
            assert error.errno == errno.EIO
            new = b""
        self.output += new
        return bool(new)

    @property
    def frame(self) -> str:
        """The last screen that is complete, with its attributes."""
        return (re.findall(rb"\x1b\[H(.*?)\x1b\[J", self.output, re.DOTALL) or [b""])[-1].decode()

    @property
    def lines(self) -> list[str]:
        return re.sub(r"\x1b\[[0-9;]*[mK]", "", self.frame).split("\r\n")

    def shown_with(self, code: str) -> str:
        """What has an attribute: 7 is the cursor, 41 a mark."""
        runs = re.findall(r"\x1b\[([0-9;]+)m(.*?)\x1b\[0m", self.frame)
        return "".join(text for codes, text in runs if code in codes.split(";"))

    def until(self, *texts: str, cursor: str | None = None) -> "Terminal":
        """Waits for a screen with all these texts, with the cursor on a token."""
        while not (
            all(text in "\n".join(self.lines) for text in texts) and cursor in (None, self.shown_with("7"))
        ):
            assert self.read(), f"it ended while waiting for {texts}: {self.output.decode()[-2000:]}"
        return self

    def press(self, keys: str, *texts: str, cursor: str | None = None) -> "Terminal":
        os.write(self.fd, keys.encode())
        return self.until(*texts, cursor=cursor)

    def wait(self) -> int:
        """The exit code, or minus the signal, once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end(self, keys: str) -> int:
        """Presses what ends it and reads the rest."""
        os.write(self.fd, keys.encode())
        while self.read():
            pass
        return self.wait()


RIGHT_ARROW = "\x1b[C"
EXPECTED = [
    TIMES | {"errors": [[13, 15]]},
    RIGHT,
    WIDE | {"errors": [[0, 2], [6, 7]]},
    MARKED | {"errors": []},
]


def test_an_interrupted_session_loses_nothing_and_gives_the_same_file(tmp_path):
    write_lines(tmp_path / "data.jsonl", ITEMS)
    calm = Terminal("--data", tmp_path / "data.jsonl", "--out", tmp_path / "calm.jsonl")
    calm.until("answer 1 of 3: 0 marked", "What is 6 times 7?", "42", cursor="6")
    calm.press(RIGHT_ARROW * 6, cursor="4").press(" lm", "2 marked", cursor="8")
    assert calm.shown_with("41") == "48"
    calm.press("\r", "answer 2 of 3: 0 marked, hand").press("vl ", "2 marked", cursor="本").press(
        "wwm", "3 marked", cursor=" "
    )
    calm.press("uu", "0 marked").press("c", "0 marked").press("bbvl ", "2 marked").press(
        "wwlm", "3 marked", cursor="😀"
    )
    calm.press("\r", "answer 3 of 3: 1 marked").press("c", "0 marked").press(
        "\r", "no answer left", "3 of 3 answers done, 2 of them"
    )
    assert (
        calm.end("q") == 0
        and "3 of 3 answers done, 2 of them with errors; 1 known to be right" in calm.output.decode()
    )
    assert read_lines(tmp_path / "calm.jsonl") == EXPECTED

    out = tmp_path / "out.jsonl"
    args = ("--data", tmp_path / "data.jsonl", "--out", out)
    killed = (
        Terminal(*args)
        .until("answer 1 of 3")
        .press("llllllm", "1 marked")
        .press("lm", "2 marked")
        .press("hm", "1 marked")
    )
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert read_lines(out) == [RIGHT]
    with open(f"{out}.marks", "ab") as journal:
        journal.write(b'{"answer": "half a li')

    write_lines(
        tmp_path / "data.jsonl", [{"prompt": "New?", "response": "Yes."}, *ITEMS[::-1]]
    )  # it grew and was re-ordered
    cut_off = Terminal(*args).until("answer 1 of 4", "New?").press("s", "answer 2 of 4: 1 marked", "1 plus 1")
    cut_off.press("\n", "answer 3 of 4").press("v", "selecting").press("lm", "2 marked").press(
        "p", "answer 2 of 4: 1 marked, done"
    )
    cut_off.press("c", "answer 2 of 4: 0 marked\n")  # no longer done: it was changed
    os.close(cut_off.fd)  # the connection breaks
    assert cut_off.wait() == 0
    assert read_lines(out) == [RIGHT]

    write_lines(tmp_path / "data.jsonl", ITEMS)
    last = (
        Terminal(*args)
        .until("answer 1 of 3: 1 marked")
        .press("s", "answer 2 of 3: 2 marked")
        .press("wwlm", "3 marked", cursor="😀")
    )
    last.press("n", "answer 3 of 3: 0 marked").press("n", "no answer left")
    os.kill(last.pid, signal.SIGTERM)
    assert last.end("") == 0 and read_lines(out) == EXPECTED[1:]

    last = (
        Terminal(*args)
        .until("answer 1 of 3: 1 marked")
        .press("wwwwlm", "2 marked", cursor="4")
        .press("n", "no answer left")
    )
    assert last.end("q") == 0
    assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_the_terminal_is_left_as_it_was_and_a_second_process_is_refused(tmp_path):
    write_lines(tmp_path / "data.jsonl", [MARKED | {"response": "so it goes " * 40 + "\x1b[2J\u202eend"}])
    args = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "out.jsonl")
    first = Terminal(*args, rows=10, columns=40, NO_COLOR="1").until("answer 1 of 1", "⟦")
    assert first.shown_with("41") == "" and len(first.lines) == 10 and max(map(len, first.lines)) < 40
    raw = termios.tcgetattr(first.fd)
    assert raw[3] & (termios.ECHO | termios.ICANON | termios.ISIG) == 0 and raw != first.before

    second = Terminal(*args)
    assert second.end("") == 2
    assert second.output.decode().startswith(
        f"annotate.py: {args[3]}.marks is being written by another process; "
    )
    assert second.output.count(b"\n") == 1

    fcntl.ioctl(first.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    first.until(
        "end", "␛[2J·"
    )  # all of it fits now; what would clear the screen or turn the writing round is shown instead
    assert len(first.lines) == 30 and "\x1b[2J" not in first.frame
    first.press("?", "Any other key closes this page").press("x", "answer 1 of 1")
    assert first.end("\x03") == 0  # Ctrl-C
    assert termios.tcgetattr(first.fd) == first.before
    assert (
        first.output.count(b"\x1b[?1049h") == 1 and b"\x1b[?25h\x1b[?1049l0 of 1 answers done" in first.output
    )


def test_without_a_terminal_it_says_so(tmp_path):
    write_lines(tmp_path / "data.jsonl", ITEMS)
    args = [sys.executable, SCRIPT, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out.jsonl"]
    done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith("annotate.py: Marking needs a terminal")
    )
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == ["data.jsonl"]


@pytest.mark.parametrize("line, words", [
    ("{", "line 2 is not valid JSON"),
    ("[1]", "line 2 is a JSON list, not an object"),
    ("[" * 100_000, "line 2 is nested too deeply"),
    ('{"prompt": "a", "response": "b", "n": ' + "1" * 5000 + "}", "line 2 is not valid JSON: a whole number of 5000 digits"),
    ('{"prompt": "a", "response": "b", "errors": [[0, NaN]]}', "within 0 and 1"),
    ('{"prompt": "a", "response": "b", "errors": [[0]]}', "within 0 and 1"),
    ('{"response": "a"}', "line 2: field 'prompt' must be a str"),
    ('{"prompt": "a", "response": null}', "line 2: field 'response' must be a str"),
    ('{"prompt": "a", "response": ""}', "line 2: field 'response' is empty"),
    ('{"prompt": "a", "response": "\\ud83d"}', "line 2 holds half of a surrogate pair"),
    ('{"prompt": "a", "response": "b", "reference": 3}', "line 2: field 'reference' must be a str"),
    ('{"prompt": "a", "response": "b", "right": "no"}', "line 2: field 'right' must be a bool"),
    ('{"prompt": "a", "response": "b", "errors": false}', "line 2: field 'errors' must be null or a list"),
    ('{"prompt": "a", "response": "b", "errors": [[0, 2]]}', "within 0 and 1"),
    ('{"prompt": "a", "response": "b", "errors": [[1, 1]]}', "within 0 and 1"),
    ('{"prompt": "a", "response": "b", "errors": [[0, true]]}', "within 0 and 1"),
])  # fmt: skip
def test_a_bad_line_is_named_in_one_sentence_and_no_file_is_touched(tmp_path, capsys, line, words):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps(TIMES) + "\n" + line + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(data), "--out", str(out)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and str(data) in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_files_that_would_be_overwritten_are_refused(tmp_path, capsys):
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    write_lines(data, ITEMS)
    other.write_text("mine")
    (tmp_path / "linked").symlink_to(data)
    os.mkfifo(tmp_path / "pipe")
    for out, words in (
        (data, "is one of the inputs"),
        (tmp_path / "linked", "is one of the inputs"),
        (tmp_path / "pipe", "it is a pipe"),
        ("/dev/null", "it is a device"),
        ("/", "it is a folder"),
        (tmp_path / ("x" * 252), "too long"),
        (other, "exists, but not its journal"),
        (tmp_path / "no" / "a", "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--data", str(data), "--out", str(out)])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert read_lines(data) == ITEMS and other.read_text() == "mine" and len(os.listdir(tmp_path)) == 4
    for content in (b"mine", b"mine\n", b'{"answer": "a", "errors": [[3, 2]], "done": true}\n', b"[]\n"):
        other.write_bytes(content)
        with pytest.raises(InputError, match="name another --out"):
            Journal(other)
        assert other.read_bytes() == content


def test_a_journal_cut_anywhere_keeps_every_whole_change(tmp_path):
    changes = [("a", [[0, 1]], False), ("b", [], True), ("a", [[0, 1], [3, 9]], False), ("a", [[3, 9]], True)]
    journal, states = Journal(tmp_path / "whole"), [{}]
    for key, errors, done in changes:
        journal.put(key, errors, done)
        states.append(states[-1] | {key: {"errors": errors, "done": done}})
    content = (tmp_path / "whole").read_bytes()
    assert journal.records == states[-1] and content.count(b"\n") == 4
    for size in range(len(content) + 1):
        cut = tmp_path / "cut"
        cut.write_bytes(content[:size])
        again = Journal(cut)
        assert again.records == states[content[:size].count(b"\n")]
        again.put("c", [], True)
        again.lines.close()
        again = Journal(cut)
        assert again.records == states[content[:size].count(b"\n")] | {"c": {"errors": [], "done": True}}
        again.lines.close()


def test_a_full_disk_is_said_and_the_change_does_not_count(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / "j")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="The last change is not kept: .*No space left"):
        journal.put("a", [], True)
    assert journal.records == {}
    monkeypatch.undo()

    class NearlyFull(io.FileIO):
        def write(self, data):
            if self.tell() > self.size:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:5])

    journal.put("a", [[0, 1]], True)
    whole = journal.lines.file
    journal.lines.file = NearlyFull(tmp_path / "j", "ab")
    journal.lines.file.size = journal.lines.file.tell()
    with pytest.raises(InputError, match="The last change is not kept: .*No space left"):
        journal.put("a", [], True)
    journal.lines.file = whole
    journal.lines.close()
    assert journal.records == Journal(tmp_path / "j").records == {"a": {"errors": [[0, 1]], "done": True}}


@pytest.mark.parametrize("spans, length, units", [
    ([(0, 1), (1, 3), (3, 4)], 4, ((0, 1), (1, 3), (3, 4))),
    ([(0, 1), (0, 1), (0, 1), (1, 2)], 2, ((0, 1), (1, 2))),  # one character over three tokens
    ([(0, 2), (1, 2), (1, 3), (3, 4)], 4, ((0, 3), (3, 4))),  # tokens that end within a character
    ([(-1, 0), (0, 2), (2, 3)], 3, ((0, 2), (2, 3))),  # SentencePiece's own space before the text
    ([(-1, 2), (2, 2), (2, 3)], 3, ((0, 2), (2, 3))),
    ([(0, 2), (2, 5)], 3, ((0, 2), (2, 3))),
])  # fmt: skip
def test_units_are_whole_tokens_and_whole_characters(spans, length, units):
    assert make_units(spans, length) == units


def letters(response: str, starts: set[int], **fields) -> Marking:
    """An answer of one token a character."""
    units = tuple((i, i + 1) for i in range(len(response)))
    return Marking(response, units, tuple(i in starts for i, _ in units), **fields)


@pytest.mark.parametrize("keys, cursor, errors", [
    ("h", 0, []), ("llh", 1, []), ("l" * 50, 18, []), ("w", 1, []), ("www", 9, []), ("wwwb", 4, []), ("wwwlb", 9, []), ("w" * 9, 18, []),
    ("bb", 0, []), ("j", 13, []), ("llj", 15, []), ("wwwlljh", 17, []), ("jllk", 2, []), ("k", 0, []), ("jj", 13, []),
    ("m", 0, [[0, 1]]), ("mlm", 1, [[0, 2]]), ("mm", 0, []), ("mllm", 2, [[0, 1], [2, 3]]), ("mllmhm", 1, [[0, 3]]),
    ("llvhhm", 0, [[0, 3]]), ("mvlm", 1, [[0, 2]]), ("mlmhvlm", 1, []), ("vllvm", 2, [[2, 3]]), ("vlmlm", 2, [[0, 3]]),
    ("mlmu", 1, [[0, 1]]), ("mlmuu", 1, []), ("mu" * 3 + "u", 0, []), ("mlmcu", 1, [[0, 2]]), ("mlmc", 1, []), ("cum", 0, [[0, 1]]),
    ("wwe", 4, [[4, 9]]), ("wwwe", 9, [[9, 12]]), ("wwwllle", 12, [[12, 13]]), ("wwwwe", 13, [[13, 19]]), ("wwewweu", 13, [[4, 9]]),
    ("zZ\x1b", 0, []),
])  # fmt: skip
def test_keys_move_and_mark(keys, cursor, errors):
    state = letters("a bb 3.5? ok\nno end", {0, 1, 4, 9, 13, 15})
    rows = wrap(tuple(state.response), state.starts, 80)
    for key in keys:
        state = edit(state, key, rows)
    assert (state.cursor, state.errors) == (cursor, errors)


def test_moving_by_line_passes_rows_that_only_go_on_with_the_same_token():
    state = Marking(
        "ab" + "x" * 19 + "cd",
        ((0, 1), (1, 2), (2, 21), (21, 22), (22, 23)),
        (True, False, False, False, False),
    )
    rows = wrap(tuple(state.response[a:b] for a, b in state.units), state.starts, 10)
    assert ["".join(text for _, text in row) for row in rows] == ["abxxxxxxxx", "xxxxxxxxxx", "xcd"]
    last = edit(replace(state, cursor=2), "j", rows)
    assert last.cursor == 4 and edit(last, "j", rows).cursor == 4
    assert edit(last, "k", rows).cursor == 2 and edit(replace(state, cursor=2), "k", rows).cursor == 2


@pytest.mark.parametrize("text", [
    "Mia scales by 3, and we have 85*3=255 apples.\n\n  Next\tline.\n",
    "日本語のテキスト、全角。 e\u0301e\u0301 😀😀 \u0301x" * 3,
    "supercalifragilistic" * 5 + "\n" + "x" * 40,
])  # fmt: skip
@pytest.mark.parametrize("width", [8, 20, 79])
def test_rows_fit_the_screen_and_show_everything_in_order(tokenizer, text, width):
    state = open_answer(tokenizer, {"prompt": "p", "response": text}, [])
    pieces = pieces_of(state, True)
    rows = wrap(pieces, state.starts, width)
    for row in rows:
        text_of_row = "".join(piece for _, piece in row)
        assert sum(1 + (east_asian_width(c) in "WF") - (c == "\u0301") for c in text_of_row) <= width
    assert "".join(piece for row in rows for _, piece in row) == "".join(pieces).replace("\n", "")
    assert [i for row in rows for i, _ in row] == sorted(i for row in rows for i, _ in row)


def test_rows_break_at_line_ends_and_before_words(tokenizer):
    state = open_answer(
        tokenizer, {"prompt": "p", "response": "Mia has 85*3=255 apples.\n\n So abcdefghijklmn."}, []
    )
    rows = ["".join(piece for _, piece in row) for row in wrap(pieces_of(state, True), state.starts, 12)]
    assert rows == ["Mia has", " 85*3=255", " apples.↵", "↵", " So abcdefgh", "ijklmn."]
    assert len(wrap(("e\u0301",) * 8, (True,) * 8, 8)) == 1  # accents take no column


def test_marks_reopen_as_they_were_and_widen_to_whole_tokens(tokenizer):
    item = {"prompt": "p", "response": "So 日本語 é times 48."}
    for i in range(len(open_answer(tokenizer, item, []).units)):
        for j in range(i, len(open_answer(tokenizer, item, []).units)):
            marked = edit(replace(open_answer(tokenizer, item, []), cursor=i, anchor=j), "m", [])
            ((start, end),) = marked.errors
            assert (
                0 <= start < end <= len(item["response"])
                and marked.units[i][0] == start
                and marked.units[j][1] == end
            )
            assert open_answer(tokenizer, item, marked.errors).errors == marked.errors
    assert open_answer(tokenizer, item, [[4, 5], [10, 11]]).errors == [
        [4, 5],
        [8, 14],
    ]  # " times" is one token
    assert (
        "".join(pieces_of(open_answer(tokenizer, item, [[3, 5], [10, 11]]), False))
        == "So ⟦日本⟧語 é⟦ times⟧ 48."
    )
    assert pieces_of(letters("e\u0301", {0}), True) == (
        "e",
        "◌\u0301",
    )  # else the cursor on it could not be seen
    assert pieces_of(letters("a\n", {0}, marks=frozenset({0, 1})), False) == ("⟦a", "↵⟧\n")


def make_session(tmp_path, tokenizer, items=ITEMS, ask_all: bool = False) -> Session:
    session = Session(
        items, Journal(tmp_path / "out.marks"), tokenizer, tmp_path / "out", ask_all=ask_all, colour=True
    )
    session.write_out()
    return session


def press(session: Session, *keys: str) -> None:
    for key in keys:
        assert session.press(key, 79, 24)


@pytest.mark.parametrize("width, height", [(79, 24), (30, 6), (10, 3), (8, 1)])
def test_the_cursor_is_always_on_the_screen(tmp_path, tokenizer, width, height):
    item = {"prompt": "line\n" * 30, "response": "So 日本語 it is.\n" * 20 + "end"}
    session = make_session(tmp_path, tokenizer, [item])
    for key in (
        ["l"] * len(session.state.units) + ["k"] * 25 + ["j", "page up", "h", "page down", "page down", "l"]
    ):
        press(session, key)
        lines = session.render(width, height)
        assert len(lines) == height
        if height > 2 and not key.startswith("page"):
            assert sum("\x1b[7m" in line for line in lines) >= 1
    press(session, *["page down"] * 200)
    assert height < 3 or "end" in session.render(width, height)[-2]  # no further than the end
    press(session, *["page up"] * 400)
    assert height < 3 or session.render(width, height)[1].endswith("prompt\x1b[0m")
    press(session, "h")
    assert height < 3 or any("\x1b[7m" in line for line in session.render(width, height))


def test_an_answer_that_is_changed_again_is_open_until_it_is_confirmed(tmp_path, tokenizer):
    session, out = make_session(tmp_path, tokenizer, [TIMES, WIDE, MARKED]), tmp_path / "out"
    press(session, "m", "n", "s", "n")
    assert read_lines(out) == [TIMES | {"errors": [[0, 1]]}, MARKED] and session.key is None
    press(session, "p", "p", "p", "p")
    assert session.state.errors == [[0, 1]]
    press(session, "l", "h", "v", "n")
    assert (
        read_lines(out) == [TIMES | {"errors": [[0, 1]]}, MARKED] and session.position == 1
    )  # to the one that was skipped
    press(session, "p")
    assert session.state.anchor is None and session.state.errors == [[0, 1]]
    press(session, "u")
    session.write_out()
    assert read_lines(out) == [MARKED] and session.state.errors == []
    press(session, "n", "p", "s")
    session.write_out()
    assert read_lines(out) == [MARKED]  # skipped: asked again
    assert not session.press("q", 79, 24)


def test_enter_on_what_the_checker_calls_wrong_is_asked_once(tmp_path, tokenizer):
    wrong = [item | {"right": False} for item in (TIMES, WIDE, MARKED)]
    session, out = make_session(tmp_path, tokenizer, wrong), tmp_path / "out"
    press(session, "n")
    assert (
        read_lines(out) == []
        and session.position == 0
        and "enter again if it is right" in session.render(79, 24)[-1]
    )
    press(session, "l")  # anything else is no answer to that
    assert "enter again" not in session.render(79, 24)[-1]
    press(session, "n", "n")
    assert read_lines(out) == [wrong[0] | {"errors": []}] and session.position == 1
    press(session, "m", "n")  # something is marked: nothing to ask
    assert session.position == 2 and len(read_lines(out)) == 2
    press(session, "n")  # marked before
    assert session.key is None and [line["errors"] for line in read_lines(out)] == [[], [[0, 1]], [[6, 7]]]
    session.journal.lines.close()
    other = make_session(
        tmp_path, tokenizer, [TIMES | {"right": None, "prompt": "y"}, MARKED | {"errors": [], "prompt": "x"}]
    )
    press(other, "n")
    assert other.position == 1  # nobody called it wrong


def test_what_is_known_right_is_asked_only_with_all(tmp_path, tokenizer):
    twin = {"prompt": RIGHT["prompt"], "response": RIGHT["response"], "source": "the same text again"}
    items = [
        RIGHT,
        twin,
        RIGHT | {"response": "5.", "errors": None},
        RIGHT | {"response": "6.", "errors": [[0, 1]]},
    ]
    session = make_session(tmp_path, tokenizer, items)
    assert [session.queue[key]["response"] for key in session.keys] == ["5.", "6."]
    assert read_lines(tmp_path / "out") == [RIGHT, twin | {"errors": []}]
    session.journal.lines.close()
    session = make_session(tmp_path, tokenizer, items, ask_all=True)
    assert len(session.keys) == 3 and read_lines(tmp_path / "out") == []
    press(session, "m", "n")
    assert read_lines(tmp_path / "out") == [RIGHT | {"errors": [[0, 1]]}, twin | {"errors": [[0, 1]]}]
    session.journal.lines.close()
    session = make_session(
        tmp_path, tokenizer, items
    )  # what somebody has marked is no longer known to be right
    assert (
        read_lines(tmp_path / "out") == [RIGHT | {"errors": [[0, 1]]}, twin | {"errors": [[0, 1]]}]
        and len(session.keys) == 3
    )


def test_marks_of_answers_that_are_gone_come_back_with_them(tmp_path, tokenizer):
    other = TIMES | {"prompt": "Another question?"}  # with the same answer
    session = make_session(tmp_path, tokenizer, [TIMES, WIDE, other])
    press(session, "m", "n", "m", "n", "n")
    whole = (tmp_path / "out").read_bytes()
    assert [line["errors"] for line in read_lines(tmp_path / "out")] == [[[0, 1]], [[0, 1]], []]
    session.journal.lines.close()
    session = make_session(tmp_path, tokenizer, [MARKED])
    press(session, "n")
    assert read_lines(tmp_path / "out") == [MARKED]
    session.journal.lines.close()
    make_session(tmp_path, tokenizer, [TIMES, WIDE, other])
    assert (tmp_path / "out").read_bytes() == whole


def test_keys_are_understood_however_the_bytes_arrive():
    sent = b"h\x1b[C\x1bOD \x1b[1;5A\r\x1b[5~\x1b[6~\x1b[200~\x1bj\xc3\xa9\x1b\x1b[B\x03"
    keys = [
        "h",
        "l",
        "h",
        "m",
        "k",
        "n",
        "page up",
        "page down",
        "\x1b[200~",
        "\x1b",
        "j",
        "\xc3",
        "\xa9",
        "\x1b",
        "j",
        "q",
    ]
    assert split_keys(sent) == (keys, b"")
    found, rest = [], b""
    for i in range(len(sent)):
        new, rest = split_keys(rest + sent[i : i + 1])
        found += new
    assert [key for key in found if key not in "\x1b"] == [
        key for key in keys if key not in "\x1b"
    ] and rest == b""
