"""Shared by all tests: tiny checkpoints in published form, made by transformers, and where real data files lie."""

import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports Triton: its kernels then run on a CPU, slowly
    )
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = Path(
    os.environ.get("JUDGE_FAST_DATA", ROOT.parent / "shared" / "data")
)  # public files; tests on them skip without
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

TINY = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "attention_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip

# Small chat templates of the forms that are published: what --chat writes is the folder's own.
LAST = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
TURN = "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\\n\\n' }}{{ m.content | trim }}<|eot_id|>"
DATED = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = TODAY %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}TURN{% endfor %}LAST""".replace("TURN", TURN).replace("LAST", LAST)
TEMPLATES = {
    "llama 3": "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + LAST,
    "llama 3.1": DATED.replace("TODAY", "'26 Jul 2024'"),
    "llama 3.2": DATED.replace("TODAY", "strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024'"),
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
                "{{ '<｜User｜>' + m.content }}{% else %}{% set said = m.content %}{% if '</think>' in said %}"
                "{% set said = said.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}"
                "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
              "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "mistral": "{%- if messages[0].role == 'system' %}{%- set system, rest = messages[0].content, messages[1:] %}{%- else %}{%- set rest = messages"
               " %}{%- endif %}{{- bos_token }}{%- for m in rest %}{%- if m.role == 'user' %}{{- '[INST] ' }}{%- if system is defined and loop.last %}"
               "{{- system + '\n\n' }}{%- endif %}{{- m.content + ' [/INST]' }}{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim +"
               " eos_token }}{%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}{%- endfor %}",
    "llama 2": "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
               "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
               "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n') if system"
               " and loop.first else '') + m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
               "{% endif %}{% endfor %}",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def make_folder(
    folder: Path, seed: int = 0, shard: str = "1GB", dtype=torch.float32, scale: float = 4.0, **changes
):
    """Writes a random Llama as transformers publishes it; returns the transformers model in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # far from flat: else every bug hides behind near-uniform logits
            weight.mul_(scale) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) * 0.3)
            weight.copy_(weight.to(dtype))
    tensors = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=tensors, max_shard_size=shard)
    return model


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that live at once, of those that operations inside make."""

    def __init__(self):
        super().__init__()
        self.living, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                if all(
                    x.untyped_storage().data_ptr() != key
                    for x in torch.utils._pytree.tree_leaves((args, kwargs))
                    if isinstance(x, torch.Tensor)
                ):
                    self.living[key] = 0
                    self.now += size
                    self.peak = max(self.peak, self.now)
                if key in self.living:
                    self.living[key] += 1
                    weakref.finalize(tensor, self.gone, key, size)
        return out

    def gone(self, key: int, size: int):
        self.living[key] -= 1
        if not self.living[key]:
            del self.living[key]
            self.now -= size


class Child:
    """A script's `main` in a silent child of this process, which has loaded PyTorch already: signals, locks and files
    are as in a process of its own, without the seconds that a start takes."""

    def __init__(self, main: Callable[[list[str]], None], argv: list[str], **environ: str):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            os._exit(exit_code(main, argv, environ))

    def poll(self) -> int | None:
        """The exit code, minus the signal where one ended it, None while it runs."""
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def exit_code(main: Callable[[list[str]], None], argv: list[str], environ: dict[str, str]) -> int:
    """What a fresh interpreter would end with: of a child of pytest, whose streams are the descriptors 0, 1 and 2."""
    os.environ.update(environ)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A random target and a draft that often agrees with it: (target, draft), our models in fp32."""
    from quantize import load_model

    root = tmp_path_factory.mktemp("pair")
    make_folder(root / "target", seed=1)
    make_folder(root / "draft", seed=2, num_hidden_layers=1)
    return load_model(root / "target"), load_model(root / "draft")
