"""GPUs by name, as their data sheets have them, what a step costs there, and what it launches."""

from dataclasses import dataclass

from cli import InputError

COPY_SHARE = 0.9  # of a data sheet's bandwidth that a copy reaches; assumed


@dataclass(frozen=True)
class Gpu:
    """memory in bytes, bandwidth and link (one way, to all others together) in bytes a second, latency of a
    collective in s, compute capability."""

    memory: float
    bandwidth: float
    link: float
    latency: float = 10e-6
    capability: tuple[int, int] = (9, 0)

    @property
    def copies(self) -> float:
        """Bytes a second of a copy, reads and writes counted."""
        return COPY_SHARE * self.bandwidth


GPUS = {  # data sheets; the latency is assumed (NCCL inside a machine; --all_reduce symmetric is about half)
    "a100": Gpu(80e9, 2.04e12, 300e9, capability=(8, 0)),
    "h100": Gpu(80e9, 3.35e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 450e9),
    "b200": Gpu(180e9, 7.7e12, 900e9, capability=(10, 0)),
}


@dataclass(frozen=True)
class Costs:
    """What a step costs under a CUDA graph: its bytes over the bandwidth, and a gap at each kernel's end.

    All but a measured bandwidth is assumed: seconds until the next kernel reads at full speed after one that
    reads a weight (product_gap) and after any other (kernel_gap).
    """

    bandwidth: float  # bytes a second that kernels reach
    product_gap: float = 3e-6
    kernel_gap: float = 2.5e-6

    def seconds(self, step: dict) -> float:
        """step: its products, all kernels, and bytes_moved."""
        gaps = step["products"] * self.product_gap + (step["kernels"] - step["products"]) * self.kernel_gap
        return step["bytes_moved"] / self.bandwidth + gaps


# step -> for weights as they are and quantised: kernels of a layer (docs/latency.md names them), and those
# outside layers; products among them are four a layer and the LM head. Counted by scripts/gpu_dry_run.py
# --verify judge for up to 8192 wide models: a 405B has more
KERNELS = {
    "plain": ((5, 5), (9, 6)),
    "draft_first": ((8, 5), (9, 6)),
    "draft_next": ((5, 4), (9, 5)),
    "verify": ((9, 12), (10, 12)),
}


def launches(step: str, quantised: bool, layers: int) -> dict[str, int]:
    """Kernels of a step, and the products among them."""
    layer, outside = KERNELS[step][quantised]
    return {"kernels": layer * layers + outside, "products": 4 * layers + 1}


def field_of(report: dict, name: str, kind: type, where: str):
    """A field of a report, None where it may be missing (kind: str | None). Raises InputError naming file and
    field."""
    value = report.get(name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(
            f"{where}: field {name!r} is missing or of another type than scripts/benchmark.py writes."
        )
    return value


def positive(report: dict, name: str, where: str) -> float:
    """A number of a report that is more than 0 and finite. Raises InputError naming file and field."""
    value = field_of(report, name, int | float, where)
    if not 1e-9 <= value <= 1e15:
        raise InputError(f"{where}: field {name!r} is {value:g}, and must be a positive number.")
    return float(value)


def measured_bandwidth(report: dict, where: str) -> float:
    """Bytes a second that a large read (on a GPU: a copy) reached in a report by scripts/benchmark.py."""
    if report.get("limit") not in ("read", "copy"):
        raise InputError(f"{where}: field 'limit' must be read or copy.")
    return positive(report, f"{report['limit']}_gb_per_s", where) * 1e9
