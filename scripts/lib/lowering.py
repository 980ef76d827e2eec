"""What the compiled steps of generate.py would launch on a GPU, found without one.

`report` runs in a process of its own in which scripts/lib/no_gpu.py has pretended a GPU: it builds a pair of
models without memory, lets Inductor lower each step, and reads off the lowered code what is launched. An
operation of judge_fast is opaque to Inductor: its own launcher is called on tensors of the shapes that the
graph gives it, with Triton stopped short of launching.
"""

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._inductor.dependencies import MemoryDep, WeakDep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FixedLayout, FlexibleLayout, IRNode, MultiOutput
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import kernels
import quantize
from checkpoint import weight_plan
from cli import InputError, run_script
from judge import JudgeHead, needs_judge
from model import DTYPES, ModelArgs, Transformer, empty_model, materialise, pick_device
from scripts.lib import machine_code, no_gpu
from scripts.lib.benchmark_args import shape_of

STEPS = ("plain", "draft_first", "draft_next", "verify")
WEIGHT = 1 << 20  # bytes of an input from which on a kernel that reads it counts as a product
ALLOCATE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
READ_BY_HOST = ("item", "_local_scalar_dense", "is_nonzero", "equal")
PRODUCTS = ("mm", "mm_dtype", "addmm", "bmm", "_scaled_mm", "linear")
CALL = re.compile(
    r"^ +(?:\w+ = )?(extern_kernels\.|torch\.ops\.(?:aten|judge_fast)\.)?(\w+)(\.run)?[\w.]*\((.*)"
)
SOURCE = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.MULTILINE | re.DOTALL)
BUFFER = re.compile(r"\b(?:arg|buf)\d+(?:_\d+)?\b")


@dataclass
class Launch:
    """One kernel of a step. kind: cublas, inductor (its Triton kernels), own (ours), or aten (PyTorch's own).

    product: it reads a weight. programs: of a grid, or what a reduction's can be at most; 0: unknown.
    logits: whether it reads numbers by the vocabulary.
    """

    name: str
    kind: str
    product: bool = False
    programs: int = 0
    logits: bool = False


@dataclass
class Step:
    """A step of a few layers: what it launches, bytes that the kernels move, and what must not be."""

    launches: list[Launch] = field(default_factory=list)
    bytes: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    host_syncs: list[str] = field(default_factory=list)
    cache_copies: list[str] = field(default_factory=list)
    compiled: list[dict] = field(default_factory=list)  # machine code, where it was asked for


class Lowered(BaseException):
    """Ends a compilation once Inductor has written its code. A BaseException, so that nobody catches it."""

    def __init__(self, graph: GraphLowering, code: str):
        super().__init__()
        self.graph, self.code = graph, code


def stop_when_lowered(graph: GraphLowering):
    raise Lowered(graph, graph.codegen()[0].value)


def lower(action: Callable[[], None]) -> Lowered:
    """The first graph that an action compiles. Raises Unsupported for a graph break."""
    torch._dynamo.reset()
    GraphLowering.compile_to_module = stop_when_lowered
    try:
        action()
    except Lowered as lowered:
        return lowered
    raise RuntimeError("The step compiled nothing.")


# Launchers of opaque operations


def tensors_of(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def storage_of(x: Tensor) -> int:
    """What tensors that share memory share."""
    return x.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Notes what a launcher launches: Triton's kernels, compiled only if asked, and PyTorch's own."""

    def __init__(self, step: Step, is_cache: Callable[[Tensor], bool], vocabulary: int, compile: bool):
        super().__init__()
        self.step, self.is_cache, self.vocabulary, self.compile = step, is_cache, vocabulary, compile
        self.weights: set[int] = set()  # memory of tensors that are inputs of the step
        self.counting, self.tiling = True, ""
        self.seen: set[tuple] = set()  # kernels that are described

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        name = function._opname
        if function.namespace == "judge_fast":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **(keywords or {}))
        if name in READ_BY_HOST:
            self.step.host_syncs.append("a launcher reads a number on the host")
            return 1
        out = function(*args, **(keywords or {}))
        inputs, outputs = tensors_of((args, keywords)), tensors_of(out)
        fresh = {storage_of(x) for x in outputs} - {storage_of(x) for x in inputs}
        launches = outputs and (fresh or function._schema.is_mutable) and name not in ALLOCATE
        if not launches or not self.counting:
            return out
        devices = [{x.device.type for x in some} for some in (inputs, outputs)]
        if "cuda" in devices[0] and "cpu" in devices[1]:
            self.step.host_syncs.append(f"a launcher copies to the host: {name}")
        self.step.cache_copies += [
            f"a launcher makes one: {name}" for x in outputs if self.is_cache(x) and fresh
        ]
        self.step.launches.append(Launch(name, "aten", name in PRODUCTS))
        self.step.bytes += sum(x.nbytes for x in (*inputs, *outputs))
        return out

    def launched(self, kernel, grid, args: tuple, keywords: dict) -> None:
        """A Triton kernel's launch."""
        given = {**dict(zip(kernel.arg_names, args)), **keywords}
        grid = grid(given) if callable(grid) else grid
        tensors = {id(x): x for x in given.values() if isinstance(x, Tensor)}
        if self.counting:
            product = any(storage_of(x) in self.weights for x in tensors.values())
            logits = any(
                storage_of(x) not in self.weights and x.numel() and x.numel() % self.vocabulary == 0
                for x in tensors.values()
            )
            programs = math.prod(grid)
            self.step.launches.append(Launch(kernel.__name__, "own", product, programs, logits))
            self.step.bytes += sum(x.nbytes for x in tensors.values())
        if not self.compile:
            return
        made = machine_code.compile_only(kernel, grid, args, keywords)
        key = made.hash, self.tiling
        if key not in self.seen:
            self.seen.add(key)
            shapes = " ".join("x".join(map(str, x.shape)) for x in tensors.values())
            row = {"kernel": kernel.__name__, "kind": "own", "programs": math.prod(grid), "shapes": shapes}
            self.step.compiled.append(row | {"tiling": self.tiling} | machine_code.describe(made))

    def take_first(self, candidates: list, action: Callable):
        """Stands in for the tuner, which measures: gives the first candidate. Compiles all, if asked."""
        for candidate in candidates if self.compile else []:
            self.counting, self.tiling = False, str(candidate)
            try:
                action(candidate)
            finally:
                self.counting, self.tiling = True, ""
        return candidates[0]


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """While this lasts, Triton's kernels and the tuner report to the recorder and run nothing."""
    from triton.runtime.jit import JITFunction

    kept = JITFunction.run, kernels.tune

    def run(kernel, *args, grid, warmup, **keywords):
        recorder.launched(kernel, grid, args, keywords)

    JITFunction.run, kernels.tune = run, recorder.take_first
    try:
        with recorder:
            yield
    finally:
        JITFunction.run, kernels.tune = kept


def run_launcher(node: torch.fx.Node, recorder: Recorder) -> None:
    """Calls an operation of judge_fast on tensors like those that a graph's node is given."""

    def stand_in(value):
        if not isinstance(value, torch.fx.Node):
            return value
        like = value.meta["val"]
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda")
        if value.op == "placeholder" and made.nbytes >= WEIGHT and not recorder.is_cache(made):
            recorder.weights.add(storage_of(made))
        kept.append(made)
        return made

    kept: list[Tensor] = []
    args, keywords = torch.fx.node.map_aggregate((node.args, node.kwargs), stand_in)
    with recording(recorder):
        node.target(*args, **keywords)
    recorder.weights.clear()


# Lowered code


def opaque_nodes(graph: GraphLowering) -> list[torch.fx.Node]:
    """The graph's nodes that are operations of judge_fast."""
    return [
        node for node in graph.module.graph.nodes if getattr(node.target, "namespace", "") == "judge_fast"
    ]


def read_launches(
    lowered: Lowered, is_cache: Callable[[tuple, torch.dtype], bool], vocab: int
) -> list[Launch]:
    """The launches that stand in the code of a lowered step, those of opaque operations left out."""
    graph, found = lowered.graph, []
    body = re.sub(r"'''.*?'''", "", lowered.code, flags=re.DOTALL)
    for line in body.splitlines():
        match = CALL.match(line)
        if not match or not (match[1] or match[3]) or match[1] == "torch.ops.judge_fast.":
            continue
        names = dict.fromkeys(BUFFER.findall(match[4]))
        inputs = {name: graph.graph_inputs[name] for name in names if name in graph.graph_inputs}
        weights = [x for x in inputs.values() if not is_cache(tuple(x.get_size()), x.get_dtype())]
        numbers = [int(n) for n in re.findall(r"(?<=, )\d+(?=, )", match[4])]
        covered = [x for x in weights if bytes_of(x) >= WEIGHT and math.prod(numbers) >= int(x.get_numel())]
        product = match[2] in PRODUCTS or bool(match[3] and covered)
        kind = "inductor" if match[3] else "cublas" if match[2] in PRODUCTS else "aten"
        launch = Launch(match[2], kind, product)
        made = [graph.try_get_buffer(name) for name in names if name not in inputs]
        by_vocabulary = any(x is not None and not x.get_numel() % vocab for x in made)
        if re.match("triton_(red|per)_", match[2]) and len(numbers) > 1:
            launch.programs = math.prod(numbers[:-1])
            launch.logits = by_vocabulary and not product and math.prod(numbers) >= vocab
        found.append(launch)
    return found


def bytes_of(buffer) -> int:
    return int(buffer.get_numel()) * buffer.get_dtype().itemsize


def flaws_of_graph(step: Step, graph: GraphLowering, is_cache: Callable) -> None:
    """Notes what waits for the host, and buffers that are a cache once more."""
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        given = [x.meta.get("val") for x in node.all_input_nodes]
        on_gpu = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in given)
        to_host = isinstance(value, Tensor) and value.device.type == "cpu"
        if (
            node.op == "call_function"
            and on_gpu
            and (to_host or not isinstance(value, Tensor | tuple | list | None))
        ):
            step.host_syncs.append(f"{node.target} gives the host {node.name}")
    for name, buffer in graph.name_to_buffer.items():
        layout = getattr(buffer, "layout", None)
        allocated = isinstance(layout, FixedLayout | FlexibleLayout) and name not in graph.removed_buffers
        if allocated and is_cache(tuple(layout.size), layout.dtype):
            step.cache_copies.append(f"buffer {name} is a cache once more")


def moved_bytes(graph: GraphLowering, rows: int) -> int:
    """Bytes that Inductor's kernels and cuBLAS read and write: of each buffer what a kernel touches, once."""
    total = 0
    with V.set_graph_handler(graph):
        for node in graph.scheduler.nodes:
            inner = node.node
            if is_opaque(inner) or isinstance(inner, MultiOutput):
                continue
            touched: dict[str, int] = {}
            for dep in node.read_writes.reads | node.read_writes.writes:
                if dep.name not in graph.removed_buffers and not isinstance(dep, WeakDep):
                    touched[dep.name] = touched.get(dep.name, 0) + numbers_touched(dep, rows)
            for name, count in touched.items():
                buffer = graph.graph_inputs.get(name) or graph.try_get_buffer(name)
                if isinstance(buffer, IRNode) and buffer.maybe_get_dtype() is not None:  # else a number
                    total += min(count * buffer.get_dtype().itemsize, bytes_of(buffer))
    return total


def is_opaque(operation) -> bool:
    """Whether an operation of Inductor's is one of judge_fast."""
    return getattr(getattr(operation, "op_overload", None), "namespace", "") == "judge_fast"


def numbers_touched(dep, rows: int) -> int:
    """Numbers of a buffer that a kernel reads or writes; through an index (into an embedding or a cache)
    those of one place for each row of the step."""
    if not (isinstance(dep, MemoryDep) and dep.is_indirect()):
        return int(dep.get_numel())
    direct = [int(size) for var, size in zip(dep.var_names, dep.size) if var in dep.index.free_symbols]
    return math.prod(direct) * min(rows, math.prod(map(int, dep.size)) // math.prod(direct))


def read_step(action: Callable[[], None], rows: int, caches: set, vocabulary: int, compile: bool) -> Step:
    """What a step of so many rows launches. caches: (shape, type) of the models' KV caches."""

    def is_cache(size: tuple, dtype: torch.dtype) -> bool:
        return (tuple(map(int, size)), dtype) in caches

    step = Step()
    kernels.tilings.clear()  # the tuner begins anew
    try:
        lowered = lower(action)
    except Unsupported as error:
        step.graph_breaks.append(str(error).splitlines()[0])
        return step
    step.launches = read_launches(lowered, is_cache, vocabulary)
    step.bytes = moved_bytes(lowered.graph, rows)
    flaws_of_graph(step, lowered.graph, is_cache)
    recorder = Recorder(step, lambda x: is_cache(x.shape, x.dtype), vocabulary, compile)
    for node in opaque_nodes(lowered.graph):
        run_launcher(node, recorder)
    if compile:
        step.compiled += machine_code.of_inductor(dict(SOURCE.findall(lowered.code)))
    return step


def own_kernels(model: Transformer, rows: int, recorder: Recorder) -> None:
    """Compiles what a pass of so many rows launches of our own kernels."""
    kernels.tilings.clear()
    with recording(recorder):
        ids, pos = torch.zeros(1, rows, dtype=torch.long, device="cuda"), torch.arange(rows, device="cuda")
        model(ids, pos)


# The pair


def make_model(args: ModelArgs, mode: str, dtype: torch.dtype) -> Transformer:
    """A model without memory; mode: none or a mode of quantize.py."""
    model, scheme = empty_model(args), quantize.scheme_named(mode)
    if scheme is not None:
        quantize.prepare(pick_device("cuda"), scheme)
    rows = {row.ours: row for row in weight_plan(args).values()}
    for name in [name for name, _ in model.named_parameters()]:
        weight = materialise(model, name, dtype, "cuda")
        if scheme is not None and quantize.is_quantized(rows[name], scheme):
            kinds = quantize.packed_shapes(weight.shape, scheme).values()
            packed = tuple(torch.empty(size, dtype=dtype, device="cuda") for dtype, size in kinds)
            quantize.replace_linear(model, name, packed, weight.shape, scheme)
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def make_engines(request: dict, layers: int) -> tuple[generate.Engine, generate.Engine]:
    """An engine that drafts and verifies, and one that decodes plainly, of so many layers."""
    shapes = [replace(shape_of(request[name]), n_layer=layers) for name in ("preset", "draft_preset")]
    if shapes[0].vocab_size != shapes[1].vocab_size:
        raise InputError(f"{request['draft_preset']} and {request['preset']} do not share a vocabulary.")
    modes = request["mode"], request["draft_mode"]
    dtype = DTYPES[request["precision"]]
    target, draft = (make_model(shape, mode, dtype) for shape, mode in zip(shapes, modes))
    head = None
    if needs_judge(request["verify"]):
        head = JudgeHead(
            torch.empty(shapes[0].dim, device="cuda"), torch.empty((), device="cuda"), 0.5, "", {}
        )
    settings = generate.Settings(
        verify=request["verify"], speculate_k=request["speculate_k"], temperature=request["temperature"],
        compile=True,
    )  # fmt: skip
    length = request["cache_length"]
    drafting = generate.Engine(target, draft, head, settings, [shapes[0].vocab_size - 1], length)
    return drafting, drafting.without_draft()


def call_only(number: int, step: Callable) -> Callable:
    """A step that does nothing but in its call of that number."""
    calls = itertools.count()
    return lambda *args: step(*args) if next(calls) == number else None


def action_of(name: str, drafting: generate.Engine, plain: generate.Engine) -> Callable[[], None]:
    """What compiles a step of STEPS."""
    engine = plain if name == "plain" else drafting
    if name.startswith("draft"):
        engine.draft_step = call_only(int(name == "draft_next"), engine.compiled(generate.draft_step))
    steps = engine.steps(engine.visible(engine.capacity), engine.settings.speculate_k)
    return steps[0] if name != "verify" else steps[-1]


def shapes_of_cache(model: Transformer) -> list[tuple[tuple, torch.dtype]]:
    """(shape, type) of a layer's cache, and of one that Inductor has flattened."""
    cache = model.layers[0].attention.k_cache
    return [(tuple(cache.shape), cache.dtype), ((cache.numel(),), cache.dtype)]


def needed_bytes(args: ModelArgs, mode: str, dtype: torch.dtype, rows: int, capacity: int) -> int:
    """Bytes of weights and of the whole cache that a step must read."""
    packed = quantize.weight_bytes(args, dtype, quantize.scheme_named(mode))
    saved = quantize.weight_bytes(args, dtype, None) - packed
    return args.step_bytes(capacity, dtype, rows) - saved


def report(request: dict) -> dict:
    """By step, what it launches in a layer and in all; and the machine code of our own kernels by rows.

    request: the flags of scripts/gpu_dry_run.py.
    """
    few, many, found, own = request["layers"] // 2, request["layers"], {}, []
    rows = {"plain": 1, "draft_first": 2, "draft_next": 1, "verify": request["speculate_k"] + 1}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        device = pick_device("cuda")
        kernels.use_pdl(request["pdl"], device)
        kernels.arrivals.cache_clear()
        kernels.arrivals(device)  # made once a process, not by a step
        for layers in (few, many):
            drafting, plain = make_engines(request, layers)
            caches = {x for model in drafting.models for x in shapes_of_cache(model)}
            for name in request["steps"]:
                compile = request["machine_code"] and layers == many
                action = action_of(name, drafting, plain)
                step = read_step(action, rows[name], caches, drafting.target.args.vocab_size, compile)
                found.setdefault(name, {})[layers] = step
            if layers == few and request["rows"]:
                own = machine_code_by_rows(drafting.models, request["rows"])
    for name, entry in found.items():
        whose = "draft_" if name.startswith("draft") else ""
        shape, mode = shape_of(request[whose + "preset"]), request[whose + "mode"]
        needed = needed_bytes(shape, mode, DTYPES[request["precision"]], rows[name], drafting.capacity)
        whole = whole_step(entry[few], entry[many], many - few, shape.n_layer - few)
        found[name] = {"rows": rows[name], "bytes_needed": needed} | whole
    return {
        "capability": request["capability"], "positions": drafting.capacity, "steps": found, "by_rows": own,
    }  # fmt: skip


def machine_code_by_rows(models: list[Transformer], rows: list[int]) -> list[dict]:
    """Our own kernels in passes of so many rows through a target and a draft, by every tiling."""
    found = []
    for model, n in itertools.product(models, rows):
        step = Step()
        own_kernels(model, n, Recorder(step, lambda x: False, model.args.vocab_size, compile=True))
        found += [row | {"head_dim": model.args.head_dim, "rows": n} for row in step.compiled]
    return found


def whole_step(few: Step, many: Step, between: int, further: int) -> dict:
    """A step of all layers, from one of few and one of `between` more layers; `further` is what few lacks."""

    def grown(count: Callable[[Step], int]) -> tuple[float, int]:
        each = (count(many) - count(few)) / between
        return each, round(count(few) + each * further)

    def of(kind: str) -> Callable[[Step], int]:
        return lambda step: sum(launch.kind == kind for launch in step.launches)

    counts = {"kernels": lambda step: len(step.launches), "bytes_moved": lambda step: step.bytes}
    counts |= {"products": lambda step: sum(launch.product for launch in step.launches)}
    counts |= {kind: of(kind) for kind in ("inductor", "own", "cublas", "aten")}
    whole, layer = {}, {}
    for name, count in counts.items():
        layer[name], whole[name] = grown(count)
    by_vocabulary = [launch.programs for launch in many.launches if launch.logits]
    return whole | {
        "layer": layer, "least_programs_of_the_vocabulary": min(by_vocabulary, default=None),
        "graph_breaks": many.graph_breaks, "host_syncs": many.host_syncs, "cache_copies": many.cache_copies,
        "launches": [asdict(launch) for launch in many.launches], "machine_code": many.compiled,
    }  # fmt: skip


def main() -> None:
    """The process that scripts/gpu_dry_run.py starts: flags as JSON in, a report as JSON out."""
    request = json.loads(sys.argv[1])
    no_gpu.pretend(tuple(request["capability"]))
    kernels.tune = lambda candidates, action: candidates[0]  # nothing can be measured
    kernels.read_tilings, kernels.write_tilings = lambda device: {}, lambda device: None
    print(json.dumps(report(request)))


if __name__ == "__main__":
    run_script("gpu_dry_run.py", main)
