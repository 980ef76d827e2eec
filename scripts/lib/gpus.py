"""GPUs by name, as their data sheets have them, and the bandwidth that a report by benchmark.py measured."""

from dataclasses import dataclass

from cli import InputError


@dataclass(frozen=True)
class Gpu:
    """memory in bytes, bandwidth and link (one way, to all others together) in bytes a second, latency of a
    collective in s, compute capability."""

    memory: float
    bandwidth: float
    link: float
    latency: float = 10e-6
    capability: tuple[int, int] = (9, 0)


GPUS = {  # data sheets; the latency is assumed (NCCL inside a machine; --all_reduce symmetric is about half)
    "a100": Gpu(80e9, 2.04e12, 300e9, capability=(8, 0)),
    "h100": Gpu(80e9, 3.35e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 450e9),
    "b200": Gpu(180e9, 7.7e12, 900e9, capability=(10, 0)),
}


def positive(report: dict, name: str, where: str) -> float:
    """A number of a report that is more than 0 and finite. Raises InputError naming file and field."""
    value = report.get(name)
    if type(value) not in (int, float):
        raise InputError(
            f"{where}: field {name!r} is missing or of another type than scripts/benchmark.py writes."
        )
    if not 1e-9 <= value <= 1e15:
        raise InputError(f"{where}: field {name!r} is {value:g}, and must be a positive number.")
    return float(value)


def measured_bandwidth(report: dict, where: str) -> float:
    """Bytes a second that a large read (on a GPU: a copy) reached in a report by scripts/benchmark.py."""
    if report.get("limit") not in ("read", "copy"):
        raise InputError(f"{where}: field 'limit' must be read or copy.")
    return positive(report, f"{report['limit']}_gb_per_s", where) * 1e9
