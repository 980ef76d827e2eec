"""Runs benchmark.py's code for a GPU where there is none: command lines as JSON in, its reports out.

Tensors are fake and live on "cuda"; steps run eagerly in the place of captured graphs, and a round's report is made up. So
wrong devices, arguments and names show, numbers and times mean nothing. A process that does nothing else.
"""

import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.lib import no_gpu

no_gpu.pretend((9, 0))

import torch
import torch.nn.attention.bias as bias
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import generate
import kernels
import model
import quantize
from judge import JudgeHead
from scripts import benchmark
from scripts.lib import pair
from scripts.lib.result import Round


class Event:
    def record(self) -> None:
        pass

    synchronize = record


def captured(action, pool) -> kernels.Graph:
    return kernels.Graph(types.SimpleNamespace(replay=action), action())


def collected(engine, slot) -> Round:
    accepted = (engine.settings.impose or 0) if slot.m else 0
    return Round([5] * (accepted + 1), accepted, [False] * accepted, slot.m)


def packed(weight, scheme, whole_row=None) -> tuple:
    kinds = quantize.packed_shapes(weight.shape, scheme).values()
    return tuple(torch.empty(size, dtype=dtype, device=weight.device) for dtype, size in kinds)


def judge(bench) -> JudgeHead:
    return JudgeHead(
        torch.empty(bench.target.args.dim, device="cuda"), torch.empty((), device="cuda"), 0.5, "", {}
    )


def diagonal(*sizes, real=model.causal_lower_right):
    with unset_fake_temporarily():
        return real(*sizes)


def main() -> None:
    torch.cuda.Event, torch.cuda.graph_pool_handle, torch.cuda.empty_cache = Event, int, lambda: None
    torch.backends.cuda.can_use_flash_attention = bias.can_use_flash_attention = lambda *rest, **more: True
    torch.Generator = lambda device=None, real=torch.Generator: real()
    model.causal_lower_right = diagonal
    generate.compile_step = lambda step, *rest: step
    generate.Engine.collect, benchmark.Workbench.judge = collected, judge
    kernels.capture = benchmark.capture = generate.kernels.capture = captured
    quantize.quantize = benchmark.quantize = packed
    benchmark.synthetic = lambda n, vocab_size: [5] * n
    pair.free_memory = lambda device: 1 << 50
    kernels.milliseconds, kernels.write_tilings = lambda action: float(len(action())), lambda device: None
    for argv in json.loads(sys.argv[1]):
        with FakeTensorMode(allow_non_fake_inputs=True):
            benchmark.main(argv)


if __name__ == "__main__":
    main()
