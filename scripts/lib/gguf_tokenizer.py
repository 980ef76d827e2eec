"""The tokenizer that a GGUF file holds, written as its published files: tokenizer.json or tokenizer.model."""

import struct
from pathlib import Path

from cli import InputError, shortened_value
from files import write_file
from scripts.lib.converting import write_json
from tokenizer import SPLIT, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(
    1, 7
)  # kinds of tokens, as SentencePiece has them
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {  # name -> steps, whether a word that is a token stays whole, whether texts begin with bos
    "llama-bpe": ([{"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                   LEVEL | {"use_regex": False}], True, True),
    "smollm": ([{"type": "Digits", "individual_digits": True}, LEVEL], False, False),
    "gpt-2": ([LEVEL], False, False),
}  # fmt: skip


PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3"), PRE_TOKENIZERS["llama-bpe"])
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read(fields: dict, name: str, kind: type, where: str, default: list | None = None) -> list:
    """A field's values, one or a list of them. Raises InputError where it is missing or of another kind."""
    if name not in fields and default is not None:
        return default
    found = fields.get(name)
    found = found if isinstance(found, list) else [found]
    if not found or not all(type(value) is kind for value in found):
        raise InputError(f"{where}: {name} is missing, or not of the kind that is called for.")
    return found


def write_tokenizer(fields: dict, folder: Path, where: str) -> None:
    """tokenizer.json or tokenizer.model, tokenizer_config.json and generation_config.json. Raises InputError
    for a kind that is not implemented, and for what is damaged."""

    def field(name: str, kind: type, default=None):
        return read(fields, f"tokenizer.ggml.{name}", kind, where, default)

    tokens, kind = field("tokens", str), field("model", str)[0]
    types = field("token_type", int, [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError(
            f"{where}: the tokenizer has {len(tokens)} tokens of {len(types)} kinds, or one twice."
        )
    names = {name: field(f"{short}_token_id", int, [-1])[0] for name, short in SPECIAL.items()}
    settings = {name: tokens[id] for name, id in names.items() if 0 <= id < len(tokens)}
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = read(fields, "tokenizer.chat_template", str, where)[0]
    if kind == "gpt2":
        begins = write_byte_level(fields, field, tokens, types, settings.get("bos_token"), folder, where)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif kind == "llama":
        begins, scores = field("add_bos_token", bool, [True])[0], field("scores", float)
        if len(scores) != len(tokens):
            raise InputError(f"{where}: the tokenizer has {len(tokens)} tokens and {len(scores)} scores.")
        space_before = field("add_space_prefix", bool, [True])[0]
        content = sentencepiece_model(tokens, scores, types, names, space_before)
        write_file(folder / "tokenizer.model", content)
        added = {
            str(id): {"content": token, "special": True}
            for id, token in enumerate(tokens)
            if types[id] in (CONTROL, USER_DEFINED)
        }
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "added_tokens_decoder": added}
    else:
        raise InputError(f"{where}: a tokenizer of the kind {kind!r} is not implemented; gpt2 and llama are.")
    write_json(folder / "tokenizer_config.json", settings | {"add_bos_token": begins})
    ends = [field(f"{name}_token_id", int, [-1])[0] for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(id for id in ends if id >= 0))
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    write_json(folder / "generation_config.json", generation)
    load_tokenizer(folder)


def write_byte_level(fields, field, tokens, types, bos: str | None, folder: Path, where: str) -> bool:
    """GPT-2's form, as tokenizer.json; returns whether a text begins with `bos`."""
    pre = field("pre", str, ["default"])[0]
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(
            f"{where}: the pre-tokenizer {shortened_value(pre)} is not implemented; {known} are."
        )
    steps, whole_words, begins = PRE_TOKENIZERS[pre]
    begins = field("add_bos_token", bool, [begins])[0] and bos is not None
    vocab = {token: id for id, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    added = [
        {"id": id, "content": token, "special": kind == CONTROL, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for id, (token, kind) in enumerate(zip(tokens, types)) if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}] if begins else []
    text, other = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    special = {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}} if begins else {}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": LEVEL,
        "post_processor": {"type": "TemplateProcessing", "single": [*begin, text],
                           "pair": [*begin, text, other], "special_tokens": special},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": whole_words, "vocab": vocab, "merges": field("merges", str)},
    }  # fmt: skip
    write_json(folder / "tokenizer.json", content)
    return begins


def sentencepiece_model(tokens, scores, types, names: dict[str, int], space_before: bool) -> bytes:
    """A SentencePiece file of byte-pair encoding, by the fields of its ModelProto: pieces (1), trainer (2),
    normaliser (3). A user-defined token, which text could write, becomes a control token."""

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value & (2**64 - 1))

    def block(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    def piece(token: str, score: float, kind: int) -> bytes:
        kind = CONTROL if kind == USER_DEFINED and token.strip("\u2581 ") else kind
        return block(1, token.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind)

    ids = {40: names["unk_token"], 41: names["bos_token"], 42: names["eos_token"], 43: -1}
    trainer = number(3, 2) + number(4, len(tokens)) + number(35, 1)
    trainer += b"".join(number(field, id) for field, id in ids.items())
    named = {45: names["unk_token"], 46: names["bos_token"], 47: names["eos_token"]}
    trainer += b"".join(
        block(field, tokens[id].encode()) for field, id in named.items() if 0 <= id < len(tokens)
    )
    normaliser = block(1, b"identity") + number(3, int(space_before)) + number(4, 0) + number(5, 1)
    pieces = b"".join(block(1, piece(*each)) for each in zip(tokens, scores, types, strict=True))
    return pieces + block(2, trainer) + block(3, normaliser)


def varint(value: int) -> bytes:
    """A number as protobuf writes it, 7 bits a byte."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
