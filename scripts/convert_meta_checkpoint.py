"""Turns Meta's own checkpoint (consolidated.*.pth and params.json, 1 to 16 shards) into a Hugging Face
folder.

    python scripts/convert_meta_checkpoint.py --checkpoint_dir Meta-Llama-3.1-8B --out Llama-3.1-8B

Meta splits each matrix over the shards and pairs the even and odd halves of a head for RoPE; the published
folders hold whole matrices and pair its first and second half. Shards are memory-mapped, and one file is
written a layer, so that memory holds one layer at a time. The folder is written beside and renamed at the
end. Meta's folders have no chat template: for --chat put the published chat_template.jinja into the new one.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import args_of, read_field, weight_plan
from files import checkpoint_folder, is_file, read_json
from rope import LLAMA31_ROPE, LLAMA32_ROPE
from scripts.lib.converting import check_new, half_split, new_folder, open_pickled, write_json, write_weights
from scripts.lib.flags import add_flags

NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def open_shards(folder: Path) -> list[dict[str, Tensor]]:
    """Meta's shards in order, memory-mapped, without running any pickled code."""
    paths = sorted(
        checkpoint_folder(folder, "Meta's folder with consolidated.00.pth").glob("consolidated.*.pth")
    )
    if not paths:
        raise InputError(f"{folder} has no consolidated.*.pth; name a folder as Meta publishes it.")
    if len(paths) > 16:
        raise InputError(f"{folder} has {len(paths)} shards; Meta publishes at most 16.")
    for number, path in enumerate(paths):
        if path.name != f"consolidated.{number:02}.pth":
            raise InputError(
                f"{folder} has {path.name} where consolidated.{number:02}.pth should be; a shard is missing."
            )

    return [open_pickled(path) for path in paths]


def join(shards: list[dict[str, Tensor]], name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    """The whole tensor `name` of `shape`, put together along the dimension that makes it so.

    Norms are repeated in every shard; so are KV heads, by turns, when there are fewer heads than shards (405B
    on 16).
    """
    missing = [i for i, shard in enumerate(shards) if not isinstance(shard.get(name), Tensor)]
    if missing:
        raise InputError(f"{folder}/consolidated.{missing[0]:02}.pth has no tensor {name}.")
    parts = [shard[name] for shard in shards]
    if parts[0].shape == shape and (len(shape) == 1 or all(torch.equal(part, parts[0]) for part in parts)):
        return parts[0].clone()
    if all(part.dim() == len(shape) and part.dtype == parts[0].dtype for part in parts):
        kv = name.endswith((".wk.weight", ".wv.weight"))
        repeats = max(1, sum(part.shape[0] for part in parts) // shape[0]) if kv else 1
        alike = (
            all(torch.equal(part, parts[i // repeats * repeats]) for i, part in enumerate(parts))
            if repeats > 1
            else True
        )
        for dim in range(len(shape) if alike else 0):
            others_fit = all(
                part.shape[d] == shape[d] for part in parts for d in range(len(shape)) if d != dim
            )
            if others_fit and sum(part.shape[dim] for part in parts[::repeats]) == shape[dim]:
                return torch.cat(parts[::repeats], dim)

    found = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
    raise InputError(f"{folder}: the parts of {name} have shapes {found}, which do not make {shape}.")


def rope_scaling(dim: int, n_layers: int) -> dict:
    """Meta's params.json does not say the factor: 32 for Llama 3.2's 1B and 3B, 8 for 3.1 and 3.3."""
    small = (dim, n_layers) in ((2048, 16), (3072, 28))
    return {"rope_type": "llama3"} | asdict(LLAMA32_ROPE if small else LLAMA31_ROPE)


def make_config(params: dict, shards: list[dict[str, Tensor]], folder: Path) -> dict:
    """`config.json` from Meta's params.json and the tensors' shapes."""
    where = f"{folder}/params.json"
    dim, n_layers, n_heads = (read_field(params, name, int, where) for name in ("dim", "n_layers", "n_heads"))
    scaled = params.get("use_scaled_rope", False)
    if dim % n_heads or not isinstance(scaled, bool):
        raise InputError(
            f"{where}: dim={dim} must be a multiple of n_heads={n_heads}, and use_scaled_rope true or false."
        )

    first = shards[0]
    for name in ("output.weight", "layers.0.feed_forward.w1.weight"):
        if not isinstance(first.get(name), Tensor) or first[name].dim() != 2:
            raise InputError(f"{folder}/consolidated.00.pth has no matrix {name}.")

    if params.get("vocab_size", -1) == -1:  # as Llama 2 says
        vocab = first["output.weight"].shape[0] * len(shards)
    else:
        vocab = read_field(params, "vocab_size", int, where)

    llama3 = vocab > 100000
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": read_field(params, "n_kv_heads", int, where, n_heads),
        "head_dim": dim // n_heads,
        "vocab_size": vocab,
        "rms_norm_eps": read_field(params, "norm_eps", float, where),
        "rope_theta": read_field(params, "rope_theta", float, where, 10000.0),
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072 if scaled else 8192 if llama3 else 4096,
        "bos_token_id": 128000 if llama3 else 1,
        "eos_token_id": [128001, 128008, 128009] if llama3 else 2,
    }
    if scaled:
        config["rope_scaling"] = rope_scaling(dim, n_layers)
    return config


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Meta puts it into the folder of a size, or beside these folders."""
    for name in ("tokenizer.model", "tokenizer.json"):
        for path in (source / name, source.parent / name):
            if is_file(path) and not (folder / name).exists():
                shutil.copyfile(path, folder / name)


def names_of(config: dict) -> list[dict[str, str]]:
    """For each layer, and for the rest: Meta's name -> the published one."""
    layers = [
        {f"layers.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight" for ours, theirs in NAMES.items()}
        for i in range(config["num_hidden_layers"])
    ]
    return [*layers, {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in TOP.items()}]


def check_names(shards: list[dict[str, Tensor]], config: dict, source: Path) -> None:
    """Raises InputError, before anything is written, for tensors that are missing, or that params.json does
    not call for."""
    called = {ours for names in names_of(config) for ours in names}
    for number, shard in enumerate(shards):
        where = f"{source}/consolidated.{number:02}.pth"
        for name in [name for name in called if name not in shard][:1]:
            raise InputError(f"{where} has no tensor {name}.")
        for name in shard:
            if name not in called and name != "rope.freqs":
                raise InputError(
                    f"{where} has an unexpected tensor {name}, which params.json does not call for."
                )


def whole_tensors(shards: list[dict[str, Tensor]], config: dict, source: Path) -> Iterator[dict[str, Tensor]]:
    """The published tensors of each layer, and of the rest."""
    shapes = {name: row.shape for name, row in weight_plan(args_of(config)).items()}
    for names in names_of(config):
        tensors = {}
        for ours, theirs in names.items():
            tensor = join(shards, ours, shapes[theirs], source)
            halved = ".wq." in ours or ".wk." in ours
            tensors[theirs] = half_split(tensor, config["head_dim"]) if halved else tensor
        yield tensors


def convert(source: Path, out: Path) -> None:
    """Writes `out` from `source`. Raises InputError, with nothing left behind, for whatever is missing or
    broken."""
    check_new(out)
    shards, params = open_shards(source), read_json(source / "params.json")
    config = make_config(params, shards, source)
    check_names(shards, config, source)
    with new_folder(out) as folder:
        write_weights(folder, whole_tensors(shards, config, source), len(names_of(config)), source)
        write_json(folder / "config.json", config)
        copy_tokenizer(source, folder)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="Meta's folder")
    add_flags(parser, out={"required": True, "help": "the folder to write"})
    args = parser.parse_args(argv)
    run_script("convert_meta_checkpoint.py", lambda: convert(args.checkpoint_dir, args.out))


if __name__ == "__main__":
    main()
