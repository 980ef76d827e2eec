"""Text to ids and back: tiktoken (Llama 3), SentencePiece (Llama 2 and the demo pair), chat format, stop tokens.

`load_tokenizer(folder)` takes what a published folder holds: `tokenizer.model` or `original/tokenizer.model` in either
format, else Llama 3's `tokenizer.json`. Text is always plain text: "<|eot_id|>" typed by a user becomes ordinary
tokens, never the control token; only `encode_chat` writes control tokens.
"""

import base64
import codecs
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import sentencepiece
import tiktoken

from cli import InputError
from files import read_json

# Llama 3's pre-tokeniser, as its tokenizer files define it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = {  # offset after the 128,000 ordinary tokens; the other offsets below 256 are reserved
    "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6,
    "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
}  # fmt: skip
N_CONTROL = 256
CHAT_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's own default


class TiktokenTokenizer:
    """Llama 3's tokenizer, from byte-pair ranks: {token bytes: id}."""

    def __init__(self, ranks: dict[bytes, int], dated_chat: bool = True, where: str = "the tokenizer file"):
        base = len(ranks)
        if set(ranks.values()) != set(range(base)) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise InputError(f"{where} is not a whole vocabulary: it needs every single byte, and ranks from 0 without gaps.")
        self.control = {name: base + offset for name, offset in CONTROL.items()}
        self.model = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.token_of_id = {id: token for token, id in ranks.items()}
        self.control_of_id = {id: name.encode() for name, id in self.control.items()}
        self.vocab_size = base + N_CONTROL
        self.bos_id = self.control["<|begin_of_text|>"]
        self.stop_ids = [self.control[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
        self.dated_chat = dated_chat

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin-of-text."""
        check_text(text)
        parts = re.split(r"(\s{50000})", text)  # tiktoken's regular expression overflows on longer runs of space
        return [id for part in parts for id in self.model.encode_ordinary(part)]

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens by their names."""
        if id in self.token_of_id:
            return self.token_of_id[id]
        return self.control_of_id.get(id, f"<|reserved_{id}|>".encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Llama 3.1's chat format for [{"role", "content"}, ...], up to where the assistant's answer begins.

        As in the template published with the models, content is trimmed, and 3.1 always has a system message that
        begins with two dates (Llama 3 has none unless given).
        """
        turns = [(message["role"], message["content"].strip()) for message in messages]
        if self.dated_chat:
            system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
            turns.insert(0, ("system", CHAT_DATES + system))
        ids = [self.bos_id]
        for role, content in turns:
            ids += [*self.header(role), *self.encode("\n\n" + content), self.control["<|eot_id|>"]]
        return [*ids, *self.header("assistant"), *self.encode("\n\n")]

    def header(self, role: str) -> list[int]:
        return [self.control["<|start_header_id|>"], *self.encode(role), self.control["<|end_header_id|>"]]


class SentencePieceTokenizer:
    """Llama 2's tokenizer; the demo pair's is of the same form."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.model.vocab_size()
        self.bos_id = self.model.bos_id()
        self.stop_ids = [self.model.eos_id()]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin-of-text."""
        check_text(text)
        return self.model.encode(text)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """The bytes that a token stands for. `first`: it begins the text, so the space put before all text goes."""
        if self.model.is_control(id):
            return self.model.id_to_piece(id).encode()
        piece = self.model.id_to_piece(id)
        if self.model.is_byte(id):
            return bytes([int(piece[3:5], 16)])
        text = piece.replace("\u2581", " ")
        return (text.removeprefix(" ") if first else text).encode()

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        raise InputError("This checkpoint's tokenizer has no Llama-3 chat format; run it without --chat.")


Tokenizer = TiktokenTokenizer | SentencePieceTokenizer


def check_text(text: str) -> None:
    """Raises InputError for text that is no valid Unicode (half of a surrogate pair, as broken escapes leave it)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The text is not valid Unicode: {error}.") from None


class Decoder:
    """Turns ids into text as they come; a character split over tokens appears when it is complete."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool = False):
        self.tokenizer, self.first = tokenizer, at_start
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes; may be empty."""
        text = self.utf8.decode(self.tokenizer.token_bytes(id, self.first))
        self.first = False
        return text

    def flush(self) -> str:
        """What an incomplete character at the end turns into: nothing, or U+FFFD."""
        return self.utf8.decode(b"", final=True)


def decode(tokenizer: Tokenizer, ids: Iterable[int], at_start: bool = False) -> str:
    """Text of ids. at_start: they begin a text (SentencePiece's leading space goes); else they continue one."""
    decoder = Decoder(tokenizer, at_start)
    return "".join([*map(decoder.push, ids), decoder.flush()])


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a snapshot folder, with the stop tokens of its generation_config.json or config.json.

    Raises InputError when there is none, or none of a kind that is implemented.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no checkpoint folder {folder}; name a Hugging Face snapshot folder.")
    models = [path for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model") if path.is_file()]
    if models:
        tokenizer = read_model_file(models[0], has_dated_chat(folder))
    elif (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        tokenizer = TiktokenTokenizer(ranks_of_json(path), has_dated_chat(folder), str(path))
        for token in read_json(path).get("added_tokens") or []:  # names of its own, as <think> of reasoning models
            tokenizer.control_of_id[token["id"]] = token["content"].encode()
    else:
        raise InputError(f"{folder} has no tokenizer.model, original/tokenizer.model or tokenizer.json.")
    for name in ("generation_config.json", "config.json"):
        stops = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if stops is not None:
            tokenizer.stop_ids = stops if isinstance(stops, list) else [stops]
            good = [type(stop) is int and 0 <= stop < tokenizer.vocab_size for stop in tokenizer.stop_ids]
            if not good or not all(good):
                raise InputError(f"{folder / name}: eos_token_id={stops!r} must name tokens below {tokenizer.vocab_size}.")
            break
    return tokenizer


def read_model_file(path: Path, dated_chat: bool) -> Tokenizer:
    """A `tokenizer.model`: lines of base64 and rank are tiktoken's, anything else SentencePiece's."""
    content = path.read_bytes()
    if not re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", content):
        try:
            return SentencePieceTokenizer(path)
        except (RuntimeError, OSError):
            raise InputError(f"{path} is neither a tiktoken nor a SentencePiece file.") from None
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError:
        raise InputError(f"{path} looks like a tiktoken file, but has a line that is not 'base64 rank'.") from None
    return TiktokenTokenizer(ranks, dated_chat, str(path))


def has_dated_chat(folder: Path) -> bool:
    """Whether the folder's chat template is that of Llama 3.1 and later (also assumed when it has none)."""
    template = folder / "chat_template.jinja"
    if template.exists():
        return "Cutting Knowledge Date" in template.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    text = read_json(settings).get("chat_template") if settings.exists() else None
    return text is None or "Cutting Knowledge Date" in str(text)


def ranks_of_json(path: Path) -> dict[bytes, int]:
    """Llama 3's byte-pair ranks from Hugging Face's tokenizer.json, where an ordinary token's id is its rank."""
    content = read_json(path)
    model = content.get("model") if isinstance(content.get("model"), dict) else {}
    patterns = re.findall(r'"Regex": "((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8")[:20_000_000])
    if model.get("type") != "BPE" or not any(codecs.decode(p, "unicode_escape") == SPLIT for p in patterns):
        raise InputError(f"{path} is not Llama 3's byte-level BPE; only that form of tokenizer.json is implemented.")
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    return {bytes(byte_of[char] for char in token): id for token, id in model["vocab"].items()}


@lru_cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(rest)}
