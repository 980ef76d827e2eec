"""The demo task: word problems with checkable steps, as a slot grammar that writes, checks and labels
answers.

Two families: arithmetic stories, and operations on short lists (standing in for code). The right answer to a
problem is a fixed sequence of sentences; each sentence is a sequence of slots; each slot offers equally right
wordings. One grammar therefore (1) writes answers in any style, (2) says whether an answer is right at every
step, and (3) says at which character an answer first goes wrong. Two styles prefer different wordings, as
different model families do.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

WAIT = (
    " Wait, that is wrong."  # follows a wrong step in the target's training text; the step is then done again
)
FAMILIES = ("story", "list")
NAMES = {
    "Mia": "she",
    "Tom": "he",
    "Ana": "she",
    "Ben": "he",
    "Eva": "she",
    "Max": "he",
    "Lea": "she",
    "Sam": "he",
}
ITEMS = ("apples", "coins", "books", "cards", "shells", "stamps", "pens", "beads")
ASKED = {"+": ("buys", "finds", "wins"), "-": ("sells", "loses", "eats"), "*": ("multiplies it by",)}


class Slot(NamedTuple):
    """Equally right wordings. The target's favourite is the first; the draft's is the second where styles
    differ."""

    wordings: tuple[str, ...]
    differ: bool = False


FIRST = Slot((" First,", " To start,", " At first,"), differ=True)
LATER = Slot((" Then", " Next,", " After that,"), differ=True)
VERBS = {
    "+": (" gains", " gets", " adds"),
    "-": (" drops", " removes", " spends"),
    "*": (" multiplies by", " scales by", " takes times"),
    "sort": (" sort it", " order it", " arrange it"),
    "reverse": (" reverse it", " flip it", " turn it around"),
    "drop first": (" drop the first", " remove the first", " cut the first"),
    "drop last": (" drop the last", " remove the last", " cut the last"),
    "add": (" add {} to each", " raise each by {}", " increase each by {}"),
}
LINK = Slot((", so", ", and", ", which means"), differ=True)
TOTAL = Slot((" we have", " there are", " that makes"))
LISTED = Slot((" the list is", " we get", " that gives"), differ=True)
PICKED = Slot((" Finally,", " Now", " Last,"), differ=True)
ANSWER = Slot((" The answer is", " So the result is", " Answer:"), differ=True)


@dataclass(frozen=True)
class Step:
    """One step of a right answer: `before` and `number` give `after`. Lists are tuples of int, totals int."""

    op: str
    before: int | tuple[int, ...]
    number: int
    after: int | tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    family: str
    question: str
    name: str
    item: str
    steps: tuple[Step, ...]
    answer: int


def make_story(rng: random.Random) -> Problem:
    name, item = rng.choice(list(NAMES)), rng.choice(ITEMS)
    total = rng.randint(11, 99)
    text, steps = [f"{name} has {total} {item}."], []
    for _ in range(rng.randint(3, 4)):
        op = rng.choice([o for o in "+-*" if (o != "*" or total <= 160) and (o != "-" or total > 20)])
        number = rng.randint(2, 6) if op == "*" else rng.randint(11, 99 if op == "+" else min(total - 2, 99))
        after = {"+": total + number, "-": total - number, "*": total * number}[op]
        steps.append(Step(op, total, number, after))
        verb = rng.choice(ASKED[op])
        text.append(f"{NAMES[name].title()} {verb} {number}.")
        total = after

    text.append(f"How many {item} now?")
    return Problem("story", " ".join(text), name, item, tuple(steps), total)


def apply_list(op: str, numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The list after one operation."""
    return {
        "sort": lambda: tuple(sorted(numbers)),
        "reverse": lambda: numbers[::-1],
        "drop first": lambda: numbers[1:],
        "drop last": lambda: numbers[:-1],
        "add": lambda: tuple(n + number for n in numbers),
    }[op]()


def show(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else "[" + ",".join(map(str, value)) + "]"


def make_list(rng: random.Random) -> Problem:
    numbers = tuple(rng.sample(range(2, 80), rng.randint(4, 5)))
    text, steps, last = [f"The list is {show(numbers)}."], [], ""
    for _ in range(rng.randint(2, 3)):
        op = rng.choice(
            [o for o in ("sort", "reverse", "drop first", "drop last", "add") if o.split()[0] != last]
        )
        last, number = op.split()[0], rng.randint(2, 19) if op == "add" else 0
        after = apply_list(op, numbers, number)
        steps.append(Step(op, numbers, number, after))
        text.append(
            {"sort": "Sort it.", "reverse": "Reverse it.", "add": f"Add {number} to each."}.get(
                op, f"Drop the {op[5:]}."
            )
        )
        numbers = after

    question = rng.choice(["largest", "smallest", "first plus last"])
    if question == "first plus last":
        steps.append(Step("ends", numbers[0], numbers[-1], numbers[0] + numbers[-1]))
    answer = {"largest": max, "smallest": min}.get(question, lambda n: n[0] + n[-1])(numbers)
    text.append(f"What is the {question}?")
    return Problem("list", " ".join(text), "", question, tuple(steps), answer)


def make_problem(rng: random.Random, family: str | None = None) -> Problem:
    """A problem of `family` (or of either, by turns of the die)."""
    family = family or rng.choice(FAMILIES)
    return make_story(rng) if family == "story" else make_list(rng)


def sentence(problem: Problem, index: int, step: Step | None = None) -> list[Slot]:
    """The slots of sentence `index` of the right answer (the last sentence gives the answer).

    `step` replaces the right step, to write a wrong one in the same words.
    """
    if index == len(problem.steps):
        return [ANSWER, Slot((f" {step.after if step else problem.answer}.",))]
    step = step or problem.steps[index]
    if step.op == "ends":
        return [PICKED, TOTAL, Slot((f" {step.before}+{step.number}={step.after}.",))]
    start = FIRST if index == 0 else LATER
    verb = Slot(tuple(verb.format(step.number) for verb in VERBS[step.op]), differ=True)
    if problem.family == "list":
        return [start, verb, LINK, LISTED, Slot((f" {show(step.after)}",)), Slot((".", " now."))]
    subject = Slot((f" {problem.name}", f" {NAMES[problem.name]}"))
    amount = Slot(
        (f" {step.number} {problem.item}", f" {step.number} of them")
        if step.op != "*"
        else (f" {step.number}",)
    )
    equation = Slot((f" {step.before}{step.op}{step.number}={step.after}",))
    return [start, subject, verb, amount, LINK, TOTAL, equation, Slot((f" {problem.item}.", ".", " in all."))]


def choose(slots: list[Slot], style: str, rng: random.Random, sure: float = 0.8) -> list[int]:
    """One wording a slot: the style's favourite with probability `sure`, else one of the others."""
    picks = []
    for slot in slots:
        best = 1 if slot.differ and style == "draft" else 0
        others = [i for i in range(len(slot.wordings)) if i != best]
        picks.append(best if not others or rng.random() < sure else rng.choice(others))
    return picks


def write(slots: list[Slot], picks: list[int]) -> str:
    """The sentence; a pick beyond a slot's wordings takes its last (a wrong step may offer fewer)."""
    return "".join(slot.wordings[min(pick, len(slot.wordings) - 1)] for slot, pick in zip(slots, picks))


def write_answer(problem: Problem, style: str, rng: random.Random) -> str:
    """A right answer in the wordings of `style`."""
    parts = []
    for index in range(len(problem.steps) + 1):
        slots = sentence(problem, index)
        parts.append(write(slots, choose(slots, style, rng)))
    return "".join(parts)


def stop_writing(wrong: str, at: int, rng: random.Random) -> int:
    """Where the writer of a wrong sentence notices: after the wrong digit or word, its number, or the
    sentence."""
    number = max(at + 1, re.compile(r"\d*").match(wrong, at).end())
    first = at + 1 if wrong[at].isdigit() else max(at + 1, re.compile(r"[a-z]*").match(wrong, at).end())
    return rng.choices([first, max(first, number), len(wrong)], [0.6, 0.2, 0.2])[0]


def wrong_number(n: int, rng: random.Random) -> int:
    """A near miss: off by a little, by ten, one digit changed, or two digits swapped."""
    digits = list(str(n))
    place = rng.randrange(len(digits))
    changed = digits[:place] + [rng.choice("0123456789")] + digits[place + 1 :]
    near = [
        n + rng.choice([-2, -1, 1, 2]),
        n + rng.choice([-10, 10, -100, 100]),
        int("".join(changed)),
        int("".join(digits[::-1])),
    ]
    good = [x for x in near if x > 0 and x != n]
    return rng.choice(good) if good else n + 1


def wrong_list(numbers: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """A list with two numbers swapped, one changed, left out, or written twice."""
    out, i = list(numbers), rng.randrange(len(numbers))
    kind = rng.random()
    if kind < 0.4:
        out[i] = wrong_number(out[i], rng)
    elif kind < 0.7 and len(out) > 1:
        j = rng.randrange(len(out))
        out[i], out[j] = out[j], out[i]
    elif kind < 0.85 and len(out) > 2:
        del out[i]
    else:
        out.insert(i, out[i])

    return tuple(out)


def corrupt(problem: Problem, index: int, rng: random.Random) -> Step:
    """A wrong version of step `index`: a wrong digit, operand or operation, a list out of order, a step left
    out."""
    if index == len(problem.steps):
        return Step("answer", 0, 0, wrong_number(problem.answer, rng))
    step = problem.steps[index]
    kind = rng.random()
    if isinstance(step.after, tuple):
        if (
            kind < 0.15
            and index + 1 < len(problem.steps)
            and isinstance(problem.steps[index + 1].after, tuple)
        ):
            return problem.steps[index + 1]  # leaves this step out
        if kind < 0.25:
            other = rng.choice(["sort", "reverse", "drop first", "drop last", "add"])
            number = step.number or rng.randint(2, 19)
            return Step(other, step.before, number, apply_list(other, step.before, number))
        return replace(step, after=wrong_list(step.after, rng))
    if kind < 0.6:
        return replace(step, after=wrong_number(step.after, rng))
    if kind < 0.8:
        return replace(step, before=wrong_number(step.before, rng))
    if kind < 0.9 or step.op == "ends":
        return replace(step, number=wrong_number(step.number, rng))
    if index + 1 < len(problem.steps) and rng.random() < 0.5:
        return replace(problem.steps[index + 1], before=step.before)
    return replace(step, op=rng.choice("+-" if step.op != "*" else "+*"))


def match(slots: list[Slot], text: str, start: int) -> tuple[int | None, int]:
    """Matches a sentence at `start`: (where it ends or None, the furthest character that was still right)."""
    ends, furthest = {start}, start
    for slot in slots:
        following = set()
        for at in ends:
            for wording in slot.wordings:
                shared = 0
                while (
                    shared < len(wording) and at + shared < len(text) and text[at + shared] == wording[shared]
                ):
                    shared += 1
                furthest = max(furthest, at + shared)
                if shared == len(wording):
                    following.add(at + shared)
        if not following:
            return None, furthest
        ends = following

    return max(ends), furthest


def write_answer_with_errors(
    problem: Problem, style: str, rng: random.Random, rate: float
) -> tuple[str, list[tuple[int, int]]]:
    """An answer in which steps go wrong with probability `rate`, each noticed (`WAIT`) and done again.

    Returns the text and the character spans of the wrong tokens: from the first wrong character to where the
    writer notices, which is right after the first wrong character, after the wrong number, or at the end of
    the sentence.
    """
    text, spans = "", []
    for index in range(len(problem.steps) + 1):
        slots = sentence(problem, index)
        while rng.random() < rate:
            picks = choose(slots, style, rng)
            wrong = write(sentence(problem, index, corrupt(problem, index, rng)), picks)
            end, at = match(slots, wrong, 0)
            if end is not None:
                continue  # not wrong after all
            stop = stop_writing(wrong, at, rng)
            spans.append((len(text) + at, len(text) + stop))
            text += wrong[:stop] + WAIT
        text += write(slots, choose(slots, style, rng))

    return text, spans


@dataclass(frozen=True)
class Verdict:
    """What `check` found. right: final answer and every step. first_error: index of the first wrong character
    that was not taken back (the text's length when its end is missing), None when all is right. taken_back:
    those that were."""

    right: bool
    answer_right: bool
    first_error: int | None
    taken_back: tuple[int, ...] = ()


def answer_of(text: str) -> int | None:
    """The number that the answer sentence gives, or None; a number of more digits than any problem's is
    none."""
    found = re.findall(r"(?:answer is|result is|Answer:) ([0-9]+)\.", text)
    return int(found[-1]) if found and len(found[-1]) <= 300 else None


def check(problem: Problem, text: str) -> Verdict:
    """Checks an answer: each sentence must be one of the right wordings, or be taken back with `WAIT` and
    redone."""
    at, taken_back, known = 0, [], answer_of(text) == problem.answer
    for index in range(len(problem.steps) + 1):
        slots = sentence(problem, index)
        end, furthest = match(slots, text, at)
        while end is None:
            retry = text.find(WAIT, furthest)
            if retry < 0:
                return Verdict(False, known, furthest, tuple(taken_back))
            taken_back.append(furthest)
            end, furthest = match(slots, text, retry + len(WAIT))
        at = end

    complete = text[at:].strip() == ""
    return Verdict(complete, known, None if complete else at, tuple(taken_back))


def is_held_out(problem: Problem) -> bool:
    """One question in 32, by its text, is never trained on: evaluation and training cannot meet."""
    return zlib.crc32(problem.question.encode()) % 32 == 0


def problems(seed: int, held_out: bool, family: str | None = None) -> Iterator[Problem]:
    """An endless stream of training or held-out problems, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        problem = make_problem(rng, family)
        if is_held_out(problem) == held_out:
            yield problem


def annotated(problem, text: str, source: str) -> dict:
    """An answer as judge.py reads it: the first wrong word or digit is the error. Its end, too, can be the
    error."""
    verdict = check(problem, text)
    starts = [
        *verdict.taken_back,
        *([] if verdict.first_error in (None, len(text)) else [verdict.first_error]),
    ]
    errors = [[at, max(at + 1, re.compile(r"[a-z]*").match(text, at).end())] for at in starts]
    return {"prompt": problem.question, "response": text, "errors": errors, "source": source}
