"""Makes PyTorch and Triton believe in a GPU that is not there, far enough to compile for it.

Under FakeTensorMode tensors then live on "cuda" and have no memory; Inductor writes its CUDA code, and Triton
compiles to machine code. Nothing can run. What is replaced stays so: `pretend` is called once, in a process
that does nothing else. With CPU builds of PyTorch that takes the package triton and a C++ compiler.
"""

import subprocess
import types
from pathlib import Path

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._subclasses.fake_tensor as fake_tensor

import kernels
from cli import InputError

CHIPS = {  # compute capability -> multiprocessors, bytes of shared memory that a program may have
    (8, 0): (108, 166912),
    (8, 9): (142, 101376),
    (9, 0): (132, 232448),
    (10, 0): (148, 232448),
}
SOURCE = Path(__file__).with_suffix(".cpp")


def check_tools() -> None:
    """Raises InputError where Triton, its machine code tool or a C++ compiler is missing."""
    if kernels.triton is None:
        raise InputError("A dry run of the GPU path needs the package triton; pip install triton.")
    if not cuobjdump().is_file():
        raise InputError(
            f"A dry run needs cuobjdump, which Triton's wheel brings; there is no {cuobjdump()}."
        )
    try:
        kernels.check_compiler()
    except InputError:
        raise InputError(
            "A dry run needs a C++ compiler such as g++; install one, or name it in CXX."
        ) from None


def cuobjdump() -> Path:
    return Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def replace(owner, **by_name) -> None:
    """Sets attributes that exist: one that another release of PyTorch calls otherwise is an error here."""
    for name, fake in by_name.items():
        getattr(owner, name)
        setattr(owner, name, fake)


def pretend(capability: tuple[int, int]) -> None:
    """From here on there is one GPU of that compute capability, one of CHIPS."""
    if not torch.backends.cuda.is_built():
        try:
            torch.ops.load_library(kernels.build(SOURCE))
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"{SOURCE.name} could not be built: {error}.") from None
    torch._C._ensureCUDADeviceGuardSet()
    pretend_in_torch(capability)
    pretend_in_inductor()
    pretend_in_triton(capability)


def pretend_in_torch(capability: tuple[int, int]) -> None:
    """What torch.cuda answers, and tensors that are made from numbers."""
    multiprocessors, shared = CHIPS[capability]
    properties = types.SimpleNamespace(
        name="no GPU", major=capability[0], minor=capability[1], multi_processor_count=multiprocessors,
        total_memory=1 << 40, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, warp_size=32, shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared, L2_cache_size=50 << 20, gcnArchName="", is_integrated=0,
    )  # fmt: skip
    answers = {
        "is_available": True, "is_initialized": True, "_is_compiled": True, "_lazy_init": None,
        "device_count": 1, "current_device": 0, "set_device": None, "get_device_properties": properties,
        "get_device_capability": capability, "get_device_name": "no GPU", "synchronize": None,
        "current_stream": types.SimpleNamespace(cuda_stream=0), "is_bf16_supported": True,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    fakes = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    replace(torch.cuda, **fakes, Event=types.SimpleNamespace)
    replace(torch.cuda.random, **{name: fakes[name] for name in ("get_rng_state", "set_rng_state")})
    for name in ("_cuda_getDevice", "_cuda_setDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, lambda *_: 0)  # CPU builds have none of these
    replace(torch.accelerator, is_available=lambda: False)
    replace(fake_tensor, init_gpu_context=lambda device: None)
    bound = device_interface.CudaInterface
    for name, fake in fakes.items():
        if name in vars(bound):
            setattr(bound, name, staticmethod(fake))

    make, zeros = torch.tensor, torch.zeros

    def tensor(data, *args, device=None, **keywords):
        """On "cuda" torch.tensor makes a real tensor even under FakeTensorMode."""
        made = make(data, *args, **keywords)
        on_gpu = device is not None and torch.device(device).type == "cuda"
        return torch.zeros(made.shape, dtype=made.dtype, device=device) if on_gpu else made

    replace(torch, tensor=tensor, zeros=lambda *args, pin_memory=None, **keywords: zeros(*args, **keywords))


def pretend_in_inductor() -> None:
    """What Inductor would do on the device itself: time products, and fold constants."""
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.shape_padding = False  # decided by timing; products of few rows are never padded
    folder = joint_graph.UniformValueConstantFolder
    fold = folder._deduce_value

    def fold_on_cpu(self, node):
        kept = node.kwargs
        if kept.get("device") is not None:
            node.kwargs = {**kept, "device": torch.device("cpu")}
        try:
            return fold(self, node)
        finally:
            node.kwargs = kept

    replace(folder, _deduce_value=fold_on_cpu)


def pretend_in_triton(capability: tuple[int, int]) -> None:
    """A driver that knows its target and nothing else."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    multiprocessors, shared = CHIPS[capability]
    limits = {
        "max_shared_mem": shared, "max_num_regs": 65536, "multiprocessor_count": multiprocessors,
        "warpSize": 32,
    }  # fmt: skip
    nowhere = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        get_current_device=lambda: 0, get_current_stream=lambda device=None: 0,
        set_current_device=lambda device: None, get_device_interface=lambda: torch.cuda,
        is_active=lambda: True, utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
    )  # fmt: skip
    driver.set_active(nowhere)
    replace(triton_helpers, set_driver_to_gpu=lambda: None, set_driver_to_cpu=lambda: None)
