"""What a field of a JSON line may be: questions about one value, and the check of a line by them."""

from collections.abc import Callable

from cli import InputError
from files import is_number

MOST = 10**12  # of a number that a page or a figure can show


def is_text(value) -> bool:
    return isinstance(value, str)


def is_verdict(value) -> bool:
    """Right, wrong, or not known."""
    return value is None or type(value) is bool


def is_count(value) -> bool:
    return type(value) is int and 0 <= value <= MOST


def is_counts(value) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def is_figure(value) -> bool:
    return is_number(value, -MOST, MOST)


def is_seconds(value) -> bool:
    return is_number(value, 0, MOST)


def is_share(value) -> bool:
    return is_number(value, -1e-3, 1 + 1e-3)  # rounding; intervals of many samples


def is_interval(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_figure, value))


DECODED = {  # what decoding counted for an answer: its token ids, and draft tokens over all rounds
    "tokens": is_counts,
    "rounds": is_count,
    "drafted": is_count,
    "accepted": is_count,
    "accepted_by_rule": is_count,
}


def maybe(kind: Callable) -> Callable:
    """None, too, or missing."""
    return lambda value: value is None or kind(value)


def check_fields(record: dict, kinds: dict[str, Callable], where: str) -> dict:
    """The record. Raises InputError beginning with `where`, and naming the field, for what no run has
    written."""
    wrong = next((name for name, kind in kinds.items() if name not in record or not kind(record[name])), None)
    if wrong:
        raise InputError(
            f"{where}: field {wrong!r} is missing or wrong; remove the file, or name another --out."
        )
    return record
