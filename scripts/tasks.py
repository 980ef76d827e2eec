"""Questions with reference answers, and what says whether a text answers them rightly.

    questions = load_questions("gsm8k/test.jsonl", "number", limit=100)
    CHECKERS[questions[0].checker].is_right(questions[0], "The answer is 18.")

A source is `demo`, `demo:story`, `demo:list` (scripts/demo_task.py), or a file of JSON lines, gzipped or not, with the
fields `prompt` (or `question`), `reference` (or `answer`, or `canonical_solution`) and, where lines differ, `checker`.
GSM8K's test.jsonl and HumanEval.jsonl.gz are read as published. Prompts are put to the model as they stand.

The checkers, and what each takes for a text's final answer:

`number`  the first number after the last "####" (with nothing but a unit behind it), "answer is", "answer:" or
          "\\boxed{"; without such a mark, or a number after it, the last number of the text. 1,234 is one number;
          currency, % and units are ignored, 18, 18.0 and 18.00 are the same. Fractions and words are not read.
`choice`  the letter A to J after the last "answer is", "answer:", "option is" or "choice is", or in "\\boxed{"; without
          one the last bold letter (**B**, **B. Paris**); without one the last letter that stands alone ("A train" and
          "I think" begin with words).
`code`    "pass" or "fail": runs HumanEval's tests on the prompt with the text put after it, see `program_of`.
`demo`    the number that the answer sentence gives; right is an answer with every step right.

The checker `code` runs what a model wrote, so it must be allowed by --allow_code_execution. The program runs in a fresh
interpreter with an empty environment, in an empty folder, under limits of time, memory, file size and processes; an audit
hook ends it when it opens files elsewhere, a socket or a process, or sends a signal; where Linux permits, it has
process, network and user namespaces of its own. This stops what models write by mistake. It is no boundary against code
that sets out to break it: audit hooks can be got around from within the interpreter, a process owned by root may start
others without limit (until its time is up), and the tests share their process with what they test, so that code which
knows this file can forge a pass. Run it in a container or a virtual machine if that matters.
"""

import gzip
import hashlib
import inspect
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import InputError
from scripts.demo_task import FAMILIES, answer_of, check, problems

DEMO_LIMIT = 100  # demo problems without --limit: their stream has no end
TIMEOUT_S = 10.0
LIMITS = {"AS": 1 << 30, "CPU": 10, "FSIZE": 16 << 20, "NPROC": 0, "NOFILE": 64, "CORE": 0}  # RLIMIT_*, bytes and s
STOPS = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```")  # where a plain completion has left the function


@dataclass(frozen=True)
class Question:
    """One question. content: what its checker needs besides (the demo's Problem, or the line's whole JSON object)."""

    index: int  # position in its source
    prompt: str
    reference: str  # as in the source; "" for the demo
    checker: str  # a name in CHECKERS
    group: str = ""  # the demo's family, or the line's "group" or "subject"
    content: object = None

    @property
    def id(self) -> str:
        """16 hex digits of checker and prompt, to split and to resume by question."""
        return hashlib.sha256(f"{self.checker}\n{self.prompt}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Checker:
    """final_answer: what two answers to a question are compared by, None when the text gives none."""

    final_answer: Callable[[Question, str], str | None]
    is_right: Callable[[Question, str], bool]


# An optional sign (no minus between two numbers), then digits that no letter precedes.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?\$?(?P<digits>(?<![A-Za-z0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![A-Za-z0-9.])\.[0-9]+)"
)
NUMBER_MARK = re.compile(
    r"####(?=[ \t*$-]*[0-9.](?:[0-9,.]*[0-9])?[ \t]*[%\w]*[.*]*[ \t]*$)|\\boxed\s*\{|(?i:\banswer[*_\s]*(?:is\b|:))",
    re.MULTILINE,
)
LETTER_AFTER_MARK = re.compile(
    r"(?:(?i:\banswer[*_\s]*(?:is\b|:)|\b(?:option|choice) is\b)|\\boxed(?=\s*\{))(?:\\[a-z]+\{|\W)*(?i:(?:option|choice)\W+)?"
    r"(?:([A-J])(?![\w'])|(?<=\()([a-j])(?=\)))"
)
BOLD_LETTER = re.compile(r"\*\*\(?([A-J])(?:[).:]+\s|[).:]*\*\*)")
LONE_LETTER = re.compile(r"(?<![\w'])(?:[B-HJ]|[AI](?! [a-z]))(?![\w'])")


def final_number(text: str) -> str | None:
    """The number that a text gives as its answer, in one spelling (18.00 is 18), or None; the rule is on top."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    marks = list(NUMBER_MARK.finditer(text))
    found = NUMBER.search(text, marks[-1].end()) if marks else None
    numbers = [found] if found else list(NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    whole, _, part = found["digits"].replace(",", "").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if found["sign"] and number != "0" else number


def final_letter(text: str) -> str | None:
    """The letter A to J that a text gives as its answer, or None; the rule is on top."""
    if marked := LETTER_AFTER_MARK.findall(text):
        return "".join(marked[-1]).upper()
    letters = BOLD_LETTER.findall(text) or LONE_LETTER.findall(text)
    return letters[-1] if letters else None


def demo_answer(question: Question, text: str) -> str | None:
    answer = answer_of(text)
    return None if answer is None else str(answer)


def program_of(question: Question, text: str) -> str:
    """The program that tests a text: the prompt completed with it, the tests, and their call.

    A text with Markdown code blocks is its first block that defines the function, or else its first; one that begins
    indented is a plain completion, whatever follows. Where the text defines the function itself, it takes the place of
    the prompt's; else it continues the prompt, indented if it is not. What is not in a block is cut at the first of STOPS.
    """
    name, item = question.content["entry_point"], question.content
    definition = re.compile(rf"^[ \t]*(?:async )?def {name}\b", re.MULTILINE)
    indented = re.match(r"(?:[ \t]*\n)*(?:  |\t)", text)
    blocks = [] if indented else re.findall(r"```\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", text, re.DOTALL)
    code = next(filter(definition.search, blocks), blocks[0]) if blocks else text
    defined = definition.search(code)
    if not blocks:
        start = re.search(r"^(?:import|from|def|class|@)\b", code, re.MULTILINE) if defined else None
        begin = min(start.start(), defined.start()) if start else 0
        ends = [code.find(stop, defined.end() if defined else 0) for stop in STOPS]
        code = code[begin : min((end for end in ends if end >= 0), default=len(code))]
    if defined:
        before = list(definition.finditer(item["prompt"]))
        whole = item["prompt"][: before[-1].start()] + "\n" + textwrap.dedent(code) if before else code
    else:
        first = next((line for line in code.split("\n") if line.strip()), "")
        whole = item["prompt"] + (code if first[:1] in (" ", "\t") else textwrap.indent(code, "    "))
    return f"{whole}\n\n{item['test']}\n\ncheck({name})\n"


def run_answer() -> None:
    """Runs in the child, from this very source: reads what to run, locks itself in, runs it, and reports.

    Only a program that came to its end is reported, by a word that it was not told: exiting early is no pass.
    """
    import json
    import os
    import sys

    word, folder, limits, program = json.load(sys.stdin)
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    enter_namespaces()
    set_limits(limits)
    forbid_events(folder)
    exec(compile(program, "<answer>", "exec"), {"__name__": "answer"})
    os.write(report, word.encode())
    os._exit(0)


def enter_namespaces() -> None:
    """Where Linux permits: no network, no sight of other processes, and none that outlives this one."""
    import os
    import signal
    import sys

    try:
        import ctypes

        libc = ctypes.CDLL(None)
        user, others = 0x10000000, 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWUSER; NEWPID, NEWNET, NEWIPC
        if sys.platform != "linux" or (libc.unshare(user | others) and libc.unshare(others)):
            return
    except (ImportError, OSError, AttributeError):
        return
    first = os.fork()  # a namespace's first process takes all others with it when it dies
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: the parent's death is its own


def set_limits(limits: dict) -> None:
    """Sets soft and hard limits, those that the system has."""
    import resource
    from contextlib import suppress

    for name, value in limits.items():
        with suppress(AttributeError, ValueError, OSError):  # unknown here, or already lower
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def forbid_events(folder: str) -> None:
    """From here on ends the process at once, where no `except` can hold it, when it reaches out of `folder`."""
    import os
    import sys

    fork_exec = type(sys)("_posixsubprocess")  # asyncio and others import subprocess without using it
    fork_exec.fork_exec = None
    sys.modules["_posixsubprocess"] = fork_exec
    real, leave = os.path.realpath, os._exit
    ours = (real(folder), os.devnull)
    readable = (*ours, *map(real, sys.path))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    harmless = ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk")
    refused = ("os.", "socket.", "subprocess.", "ctypes.", "signal.", "resource.", "pty.", "sqlite3.", "syslog.")

    def within(path, folders: tuple) -> bool:
        path = real(os.fsdecode(path if path is not None else "."))
        return any(path == each or path.startswith(each + os.sep) for each in folders)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            good = type(args[0]) is int or within(args[0], ours if args[2] & writing else readable)
        elif event in ("os.listdir", "os.scandir"):
            good = type(args[0]) is int or within(args[0], readable)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            good = args[-1] == -1 and within(args[0], ours)  # -1: relative to no other folder
        elif event == "import":
            good = args[0] != "_posixsubprocess"
        else:
            good = event in harmless or not event.startswith(refused)
        if not good:
            leave(1)

    sys.addaudithook(hook)


CHILD = "\n".join(map(inspect.getsource, (run_answer, enter_namespaces, set_limits, forbid_events))) + "\nrun_answer()\n"
code_is_allowed = False


def allow_code_execution() -> None:
    """Lets the checker `code` run what a model wrote; what it is kept from is on top."""
    global code_is_allowed
    code_is_allowed = True


def check_allowed() -> None:
    """Raises InputError when code would be run that nobody has allowed."""
    if not code_is_allowed:
        raise InputError("The checker code runs programs that a model wrote; allow that with --allow_code_execution.")
    if os.name != "posix":
        raise InputError("The checker code needs Linux or another POSIX system, where it can limit what a program does.")
    if not passes(""):
        raise InputError("The checker code cannot run here: even an empty program does not come to its end.")


@lru_cache(maxsize=4096)
def passes(program: str) -> bool:
    """Whether a program comes to its end in TIMEOUT_S seconds, locked in. Whatever it started is gone afterwards."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as report:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", CHILD], cwd=folder, env={"TMPDIR": folder}, stdin=subprocess.PIPE,
            stdout=report, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(json.dumps([word, folder, LIMITS, program]).encode(), TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        report.seek(0)
        return report.read(len(word) + 1) == word.encode()


def code_passes(question: Question, text: str) -> bool:
    check_allowed()
    return passes(program_of(question, text))


def compared_by(answer_in: Callable[[str], str | None]) -> Checker:
    """A text is right when its final answer is the reference's."""
    return Checker(
        lambda question, text: answer_in(text),
        lambda question, text: answer_in(text) is not None and answer_in(text) == answer_in(question.reference),
    )


CHECKERS = {
    "number": compared_by(final_number),
    "choice": compared_by(final_letter),
    "code": Checker(lambda question, text: "pass" if code_passes(question, text) else "fail", code_passes),
    "demo": Checker(demo_answer, lambda question, text: check(question.content, text).right),
}


def load_questions(
    source: str, checker: str | None, limit: int | None = None, seed: int = 2026, held_out: bool = True
) -> list[Question]:
    """The first `limit` questions of a source (of a file: all, by default); what a source is, is said on top.

    checker: for the lines of a file that name none. seed, held_out: of the demo's problems. Raises InputError naming
    file, line and field of whatever is wrong, and when code would have to run that is not allowed.
    """
    if checker is not None and checker not in CHECKERS:
        raise InputError(f"--checker {checker} is unknown; known are {', '.join(CHECKERS)}.")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} is too small: at least 1 question.")
    name, _, family = str(source).partition(":")
    if name == "demo":
        if family and family not in FAMILIES or checker not in (None, "demo"):
            raise InputError(f"--questions {source} is demo, demo:story or demo:list, and goes with --checker demo.")
        stream = islice(problems(seed, held_out, family or None), limit or DEMO_LIMIT)
        return distinct([Question(i, p.question, "", "demo", p.family, p) for i, p in enumerate(stream)])
    numbered = ((number, line) for number, line in enumerate(read_lines(Path(source)), 1) if line.strip())
    questions = [
        read_question(line, f"{source}, line {number}", index, checker)
        for index, (number, line) in enumerate(islice(numbered, limit))
    ]
    if not questions:
        raise InputError(f"{source} holds no questions; give JSON lines with prompt and reference.")
    return distinct(questions)


def distinct(questions: list[Question]) -> list[Question]:
    """Each question once, the first of equals: two of the same are not two observations."""
    kept: dict[str, Question] = {}
    for question in questions:
        kept.setdefault(question.id, question)
    if len(kept) < len(questions):
        print(f"left out {len(questions) - len(kept)} questions that come more than once", file=sys.stderr)
    return list(kept.values())


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, gzipped if its name ends in .gz."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--questions {path} cannot be read: {reason}.") from None


def read_question(line: str, where: str, index: int, checker: str | None) -> Question:
    """The question of one line. Raises InputError beginning with `where`."""
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(item, dict):
        raise InputError(f"{where} is no JSON object with the fields prompt and reference.")
    checker = item.get("checker", checker)
    if checker not in ("number", "choice", "code"):
        raise InputError(f"{where}: field 'checker' is {checker!r}; give number, choice or code there or with --checker.")
    prompt = read_text(item, ("prompt", "question"), where)
    fields = ("reference", "answer", "canonical_solution")
    if checker == "code":
        check_allowed()
        read_text(item, ("test",), where)
        if not read_text(item, ("entry_point",), where).isidentifier():
            raise InputError(f"{where}: field 'entry_point' is {item['entry_point']!r}, which is no function's name.")
        reference = read_text(item, fields, where) if any(name in item for name in fields) else ""
    else:
        reference = read_text(item, fields, where)
        kind, found = ("number", final_number(reference)) if checker == "number" else ("letter", choice_of(reference))
        if found is None:
            raise InputError(f"{where}: the reference {reference[-60:]!r} gives no {kind}, which --checker {checker} needs.")
    group = next((item[name] for name in ("group", "subject") if isinstance(item.get(name), str)), "")
    return Question(index, prompt, reference, checker, group, item)


def choice_of(reference: str) -> str | None:
    """The letter of a reference that is nothing else: B, (B), B."""
    found = re.fullmatch(r"\(?([A-J])[).]*", reference.strip())
    return found[1] if found else None


def read_text(item: dict, names: tuple[str, ...], where: str) -> str:
    """The first of these fields that the object has, as valid text that is not empty (a number is taken as text)."""
    name = next((name for name in names if name in item), None)
    if name is None:
        raise InputError(f"{where} has no field {' or '.join(repr(name) for name in names)}.")
    value = item[name]
    if type(value) in (int, float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {name!r} must be text that is not empty.")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InputError(f"{where}: field {name!r} is not valid Unicode.")
    return value


def add_question_flags(add: Callable) -> None:
    """Gives a parser (by its add_argument) the flags that name questions; `questions_of` reads them."""
    add("--questions", default="demo", help="demo, demo:story, demo:list, or a file of JSON lines (.jsonl, .jsonl.gz)")
    add("--checker", choices=CHECKERS, help="what says whether an answer is right, where a line of the file does not")
    add("--limit", type=int, help=f"number of questions (default: the whole file, or {DEMO_LIMIT} demo problems)")
    add("--seed", type=int, default=2026, help="another seed, other demo problems")
    add("--allow_code_execution", action="store_true", help="let --checker code run programs that a model wrote")


def questions_of(args, held_out: bool = True) -> list[Question]:
    """The questions that a parsed command line names."""
    if args.allow_code_execution:
        allow_code_execution()
    return load_questions(args.questions, args.checker, args.limit, args.seed, held_out)
