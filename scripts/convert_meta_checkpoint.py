"""Turns Meta's own checkpoint (consolidated.*.pth and params.json, 1 to 16 shards) into a Hugging Face folder.

    python scripts/convert_meta_checkpoint.py --checkpoint_dir Meta-Llama-3.1-8B --out Llama-3.1-8B

Meta splits each matrix over the shards and pairs the even and odd halves of a head for RoPE; the published folders hold
whole matrices and pair its first and second half. Shards are memory-mapped, and one file is written a layer, so that
memory holds one layer at a time. The folder is written beside and renamed at the end.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from files import read_json
from model import LLAMA31_ROPE, LLAMA32_ROPE, ModelArgs, read_field, weight_plan

NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def open_shards(folder: Path) -> list[dict[str, Tensor]]:
    """Meta's shards in order, memory-mapped, without running any pickled code."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise InputError(f"{folder} has no consolidated.*.pth; name a folder as Meta publishes it.")
    shards = []
    for path in paths:
        try:
            shards.append(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} cannot be read as a checkpoint of plain tensors: {reason}") from None
    if len(shards) > 16:
        raise InputError(f"{folder} has {len(shards)} shards; Meta publishes at most 16.")
    return shards


def join(shards: list[dict[str, Tensor]], name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    """The whole tensor `name` of `shape`, put together along the dimension that makes it so.

    Norms are repeated in every shard; so are KV heads, by turns, when there are fewer heads than shards (405B on 16).
    """
    missing = [i for i, shard in enumerate(shards) if not isinstance(shard.get(name), Tensor)]
    if missing:
        raise InputError(f"{folder}/consolidated.{missing[0]:02}.pth has no tensor {name}.")
    parts = [shard[name] for shard in shards]
    if parts[0].shape == shape:
        return parts[0].clone()
    repeats = max(1, sum(part.shape[0] for part in parts) // shape[0]) if name.endswith((".wk.weight", ".wv.weight")) else 1
    for dim in range(len(shape)):
        others_fit = all(part.shape[d] == shape[d] for part in parts for d in range(len(shape)) if d != dim)
        if others_fit and sum(part.shape[dim] for part in parts[::repeats]) == shape[dim]:
            return torch.cat(parts[::repeats], dim)
    found = ", ".join(str(tuple(part.shape)) for part in parts)
    raise InputError(f"{folder}: the parts of {name} have shapes {found}, which do not make {shape}.")


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of a query or key matrix from (even, odd) pairs to first and second half of each head."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def make_config(params: dict, shards: list[dict[str, Tensor]], folder: Path) -> dict:
    """`config.json` from Meta's params.json and the tensors' shapes."""
    where = f"{folder}/params.json"
    dim, n_layers, n_heads = (read_field(params, name, int, where) for name in ("dim", "n_layers", "n_heads"))
    first = shards[0]
    for name in ("output.weight", "layers.0.feed_forward.w1.weight"):
        if not isinstance(first.get(name), Tensor):
            raise InputError(f"{folder}/consolidated.00.pth has no tensor {name}.")
    vocab = params.get("vocab_size", -1)
    if vocab <= 0:  # Llama 2 says -1
        vocab = first["output.weight"].shape[0] * len(shards)
    llama3 = vocab > 100000
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": dim,
        "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
        "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
        "num_key_value_heads": params.get("n_kv_heads") or n_heads, "head_dim": dim // n_heads,
        "vocab_size": vocab, "rms_norm_eps": read_field(params, "norm_eps", float, where),
        "rope_theta": read_field(params, "rope_theta", float, where, 10000.0),
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072 if params.get("use_scaled_rope") else 8192 if llama3 else 4096,
        "bos_token_id": 128000 if llama3 else 1, "eos_token_id": [128001, 128008, 128009] if llama3 else 2,
    }  # fmt: skip
    if params.get("use_scaled_rope"):
        # Meta's params.json does not say the factor: 32 for Llama 3.2's 1B and 3B, 8 for 3.1 and 3.3
        factor, low, high, original = LLAMA32_ROPE if (dim, n_layers) in ((2048, 16), (3072, 28)) else LLAMA31_ROPE
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                                  "high_freq_factor": high, "original_max_position_embeddings": original}  # fmt: skip
    return config


def convert(source: Path, out: Path) -> None:
    """Writes `out` from `source`. Raises InputError, with nothing left behind, for whatever is missing or broken."""
    if out.exists() or not out.absolute().parent.is_dir():
        raise InputError(f"{out} exists already, or lies in no folder; name a new folder.")
    shards, params = open_shards(source), read_json(source / "params.json")
    config = make_config(params, shards, source)
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write_weights(shards, config, source, beside)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in ("tokenizer.model", "tokenizer.json"):
            for path in (source / name, source.parent / name):
                if path.exists() and not (beside / name).exists():
                    shutil.copy(path, beside / name)
        os.replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_weights(shards: list[dict[str, Tensor]], config: dict, source: Path, folder: Path) -> None:
    """One safetensors file a layer and one for the rest, and their index."""
    n_layers, weight_map, total = config["num_hidden_layers"], {}, 0
    progress = Progress(f"converting {source}", n_layers + 1)
    shapes = {name: shape for name, (_, _, shape) in weight_plan(ModelArgs.from_hf_config(config)).items()}
    for number in range(n_layers + 1):
        if number < n_layers:
            names = {
                f"layers.{number}.{ours}.weight": f"model.layers.{number}.{theirs}.weight" for ours, theirs in NAMES.items()
            }
        else:
            names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in TOP.items()}
        tensors = {}
        for ours, theirs in names.items():
            tensor = join(shards, ours, shapes[theirs], source)
            if ".wq." in ours or ".wk." in ours:
                tensor = half_split(tensor, config["head_dim"])
            tensors[theirs] = tensor.contiguous()
            total += tensor.nbytes
        file = f"model-{number + 1:05}-of-{n_layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        progress.step()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="Meta's folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(argv)
    run_script("convert_meta_checkpoint.py", lambda: convert(args.checkpoint_dir, args.out))


if __name__ == "__main__":
    main()
