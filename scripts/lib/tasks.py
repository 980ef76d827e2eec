"""Questions with reference answers: of the demo, of public benchmarks, of your own files; and the flags that
name them.

    questions = load_questions("mine.jsonl", "number", limit=100)
    CHECKERS[questions[0].checker].is_right(questions[0], "The answer is 18.")

--task names a public benchmark, --data its file as published; scripts/lib/public_tasks.py says in what words
it is put. --questions names `demo`, `demo:story`, `demo:list` (scripts/lib/demo_task.py), or a file of your
own: JSON lines, gzipped or not, with the fields `prompt` (or `question`), `reference` (or `answer`, or
`canonical_solution`) and, where lines differ, `checker` (scripts/lib/scoring.py). Their prompts are put to
the model as they stand.
"""

import hashlib
import re
import sys
from itertools import islice
from pathlib import Path

from cli import InputError, whole
from files import read_bytes
from scripts.lib.demo_task import FAMILIES, problems
from scripts.lib.flags import MOST_QUESTIONS, add_flags
from scripts.lib.public_tasks import TASKS, json_lines, read_task
from scripts.lib.sandbox import allow_code_execution, check_allowed
from scripts.lib.scoring import CHECKERS, Question, final_number

DEMO_LIMIT = 100  # demo problems without --limit: their stream has no end
OWN = ("number", "math", "choice", "code")  # the checkers for files of one's own


def distinct(questions: list[Question]) -> list[Question]:
    """Each question once, the first of equals: two of the same are not two observations."""
    kept: dict[str, Question] = {}
    for question in questions:
        kept.setdefault(question.id, question)
    if len(kept) < len(questions):
        print(f"left out {len(questions) - len(kept)} questions that come more than once", file=sys.stderr)
    return list(kept.values())


def choice_of(reference: str) -> str | None:
    """The letter of a reference that is nothing else: B, (B), B."""
    found = re.fullmatch(r"\(?([A-J])[).]*", reference.strip())
    return found[1] if found else None


def read_text(item: dict, names: tuple[str, ...], where: str) -> str:
    """The first of these fields that the object has, as valid text that is not empty (a number is taken as
    text)."""
    name = next((name for name in names if name in item), None)
    if name is None:
        raise InputError(f"{where} has no field {' or '.join(repr(name) for name in names)}.")
    value = item[name]
    if type(value) in (int, float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {name!r} must be text that is not empty.")
    return value


def read_question(item: dict, where: str, index: int, checker: str | None) -> Question:
    """The question of one line. Raises InputError beginning with `where`."""
    checker = item.get("checker", checker)
    if checker not in OWN:
        raise InputError(
            f"{where}: field 'checker' is {checker!r}; give {', '.join(OWN)} there or with --checker."
        )

    prompt = read_text(item, ("prompt", "question"), where)
    fields = ("reference", "answer", "canonical_solution")
    if checker == "code":
        check_allowed()
        read_text(item, ("test",), where)
        if not read_text(item, ("entry_point",), where).isidentifier():
            raise InputError(
                f"{where}: field 'entry_point' is {item['entry_point']!r}, which is no function's name."
            )
        reference = read_text(item, fields, where) if any(name in item for name in fields) else ""
    else:
        reference = read_text(item, fields, where)
        find = {"number": final_number, "math": str.strip, "choice": choice_of}[checker]
        kind, found = "letter" if checker == "choice" else "number", find(reference)
        if found is None:
            raise InputError(
                f"{where}: the reference {reference[-60:]!r} gives "
                f"no {kind}, which --checker {checker} needs."
            )

    group = next((item[name] for name in ("group", "subject") if isinstance(item.get(name), str)), "")
    return Question(index, prompt, reference, checker, group, item)


def load_questions(
    source: str, checker: str | None, limit: int | None = None, seed: int = 2026, held_out: bool = True
) -> list[Question]:
    """The first `limit` questions of a source (of a file: all, by default); what a source is, is said on top.

    checker: for the lines of a file that name none. seed, held_out: of the demo's problems. Raises InputError
    naming file, line and field of whatever is wrong, and when code would have to run that is not allowed.
    """
    if checker is not None and checker not in CHECKERS:
        raise InputError(f"--checker {checker} is unknown; known are {', '.join(CHECKERS)}.")
    name, _, family = str(source).partition(":")
    if name == "demo":
        if family and family not in FAMILIES or checker not in (None, "demo"):
            raise InputError(
                f"--questions {source} is demo, demo:story or demo:list, and goes with --checker demo."
            )
        stream = islice(problems(seed, held_out, family or None), limit or DEMO_LIMIT)
        return distinct([Question(i, p.question, "", "demo", p.family, p) for i, p in enumerate(stream)])

    lines = islice(json_lines(Path(source), "--questions"), limit)
    questions = [read_question(item, where, index, checker) for index, (where, item) in enumerate(lines)]
    if not questions:
        raise InputError(f"{source} holds no questions; give JSON lines with prompt and reference.")
    return distinct(questions)


def add_question_flags(parser) -> None:
    """The flags that name questions; `questions_of` reads them."""
    add = parser.add_argument
    add("--task", choices=["demo", *TASKS], help="a benchmark, read from --data as published (default: demo)")
    add_flags(
        parser, data={"required": False, "help": "the benchmark's file or folder, see scripts/download.py"}
    )
    add(
        "--shots",
        type=whole(0, MOST_QUESTIONS),
        help="examples before each question (default: as its harness has it, with --chat none)",
    )
    add("--shots_data", type=Path, help="where examples come from (default: the training file beside --data)")
    add(
        "--questions",
        help="instead of --task: demo, demo:story, demo:list, or your own JSON lines (.jsonl, .jsonl.gz)",
    )
    add(
        "--checker",
        choices=(*OWN, "demo"),
        help="what says whether an answer is right, where a line of --questions does not",
    )
    limit = f"number of questions (default: all, or {DEMO_LIMIT} demo problems)"
    add_flags(parser, limit={"help": limit}, seed={})
    add(
        "--allow_code_execution",
        action="store_true",
        help="let humaneval and --checker code run programs that a model wrote",
    )


def questions_of(args, held_out: bool = True, scored: bool = True, stops: bool = True) -> list[Question]:
    """The questions that a parsed command line names.

    scored: refuse those that have no right and wrong answers. stops: whether the caller ends answers at
    Question.stops; if not, questions with any are refused.
    """
    if args.allow_code_execution:
        allow_code_execution()
    if args.task in (None, "demo"):
        if args.data or args.shots or args.shots_data:
            raise InputError(
                "--data, --shots and --shots_data belong to a "
                "--task with a file, not to the demo or --questions."
            )
        if args.task and args.questions not in (None, "demo", *(f"demo:{family}" for family in FAMILIES)):
            raise InputError("Give one of --task and --questions.")
        return load_questions(args.questions or "demo", args.checker, args.limit, args.seed, held_out)
    if args.questions or args.checker or args.data is None:
        raise InputError(
            f"--task {args.task} goes with --data, its file, and without --questions and --checker."
        )
    if scored and TASKS[args.task].checker == "none":
        raise InputError(
            f"--task {args.task} has no right and wrong answers, which this needs; take another."
        )
    if not stops and not args.chat and TASKS[args.task].stops:
        raise InputError(
            f"--task {args.task} needs --chat here: a base model's answers do not end by themselves."
        )

    more = {"shots": args.shots, "shots_data": args.shots_data, "limit": args.limit}
    return read_task(args.task, args.data, args.chat, **more)


def question_files(args) -> list[Path]:
    """The files that a command line reads questions from, which no output may replace."""
    return [Path(path) for path in (args.data, args.shots_data, args.questions) if path]


def question_header(args) -> dict:
    """What of a command line decides which questions there are, and in what words."""

    def digest(path: Path | None) -> str | None:
        if path is None or not path.exists():
            return None
        files = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
        return hashlib.sha256(b"".join(map(read_bytes, files))).hexdigest()[:16]

    task = getattr(args, "task", None) or "demo"
    if task == "demo":
        questions = args.questions or "demo"
        data = None if questions.partition(":")[0] == "demo" else digest(Path(questions))
        return {"questions": questions, "data": data, "checker": args.checker, "seed": args.seed}

    return {
        "questions": task,
        "data": digest(args.data),
        "shots": args.shots,
        "shots_data": digest(args.shots_data),
    }
