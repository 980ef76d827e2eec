"""Text to ids and back: tiktoken (Llama 3), SentencePiece (Llama 2 and the demo pair), chat templates, stop
tokens.

`load_tokenizer(folder)` takes what a published folder holds: Llama 3's `tokenizer.json`, or `tokenizer.model`
or `original/tokenizer.model` in either format. Text is always plain text: "<|eot_id|>" typed by a user
becomes ordinary tokens, never the control token; only `encode_chat` writes control tokens, those that the
folder's own chat template has.
"""

import base64
import binascii
import codecs
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import sentencepiece
import tiktoken
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cli import InputError, one_line, shortened_value
from files import read_bytes, read_json, read_text
from hub import model_folder

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
MOST_TEXT = 256 << 20  # bytes of a tokenizer file
MOST_ID = 2**24


class TokenizerBase:
    """What both kinds share: names of control tokens, stop tokens, the chat format."""

    vocab_size: int
    bos_id: int
    stop_ids: list[int]
    chat: "ChatTemplate | None" = None
    no_chat = "This tokenizer was loaded without a folder, and so without a chat template"

    def __init__(self, control: dict[str, int]):
        self.control = control  # name -> id
        self.control_of_id = {id: name.encode() for name, id in control.items()}
        self.names: re.Pattern | None = None
        self.end_of_turn: int | None = None

    def add_names(self, added: dict[int, str]) -> None:
        """Names that the folder gives to tokens; they replace those known so far."""
        self.control_of_id |= {id: name.encode() for id, name in added.items()}
        self.control = {name.decode(): id for id, name in self.control_of_id.items()}

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def piece(self, id: int) -> str | None:
        """A token of the vocabulary as its file writes it; None for others."""
        raise NotImplementedError

    def encode_piece(self, text: str, first: bool) -> list[int]:
        """Ids of plain text in a chat. first: it begins the chat, else it follows a control token."""
        return self.encode(text)

    def check_chat(self) -> None:
        """Raises InputError where this folder has no chat template, or one that cannot be used; else makes
        the chat format's own end of turn a stop token, whichever others the folder names. To be called before
        stop_ids are handed on."""
        if self.chat is None:
            raise InputError(f"{self.no_chat}; run it without --chat.")
        if self.names is None:
            self.names = re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))))
            self.end_of_turn = next(iter(self.control_in(self.chat.after_answer())), None)
        if self.end_of_turn is not None and self.end_of_turn not in self.stop_ids:
            self.stop_ids = [*self.stop_ids, self.end_of_turn]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The folder's chat format for [{"role", "content"}, ...], up to where the assistant's answer begins.

        The ids are those of transformers' apply_chat_template, but that control tokens come from the template
        alone: where a message spells one, it stays plain text. Raises InputError as `check_chat`, and where
        the template refuses these messages.
        """
        for message in messages:
            check_text(message["content"])
        self.check_chat()
        return self.encode_parts(self.chat.render(messages, self.control_in), True)

    def encode_parts(self, parts: list[tuple[str, bool]], first: bool) -> list[int]:
        """Ids of texts and whether control tokens are to be read out of them. first: they begin a chat."""
        ids, plain = [], ""
        for text, own in parts:
            begin = 0
            for match in self.names.finditer(text) if own else ():
                plain += text[begin : match.start()]
                ids += [
                    *(self.encode_piece(plain, first and not ids) if plain else []),
                    self.control[match[0]],
                ]
                plain, begin = "", match.end()
            plain += text[begin:]
        return ids + (self.encode_piece(plain, first and not ids) if plain else [])

    def encode_next(self, turn: str) -> list[int]:
        """What comes between an answer, whose ids stay as they were decoded, and the next one: the end that
        the template gives an answer, the user's next `turn`, and how an answer begins."""
        check_text(turn)
        self.check_chat()
        answer = "An answer"
        said = [("user", "A question"), ("assistant", answer), ("user", turn)]
        parts = self.chat.render(
            [{"role": role, "content": content} for role, content in said], self.control_in
        )
        at = next((i for i, (text, own) in enumerate(parts) if text == answer and not own), None)
        if at is None:
            raise InputError(f"{self.chat.where}: the chat template leaves out an answer, or changes it.")
        return self.encode_parts(parts[at + 1 :], False)

    def control_in(self, text: str) -> list[int]:
        """The control tokens in a template's text."""
        return [self.control[match[0]] for match in self.names.finditer(text)]


class TiktokenTokenizer(TokenizerBase):
    """Llama 3's tokenizer, from byte-pair ranks: {token bytes: id}."""

    def __init__(self, ranks: dict[bytes, int], where: str = "the tokenizer file"):
        base = len(ranks)
        whole = set(ranks.values()) == set(range(base)) and b"" not in ranks
        if not whole or not all(bytes([byte]) in ranks for byte in range(256)):
            raise InputError(
                f"{where} is not a whole vocabulary: it needs every single byte, and ranks from 0 without "
                f"gaps."
            )
        super().__init__({name: base + offset for name, offset in CONTROL.items()})
        self.model = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.token_of_id = {id: token for token, id in ranks.items()}
        self.vocab_size = base + N_CONTROL
        self.bos_id = self.control["<|begin_of_text|>"]
        self.stop_ids = [self.control[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin-of-text."""
        check_text(text)
        parts = re.split(
            r"(\s{50000})", text
        )  # tiktoken's regular expression overflows on longer runs of space
        return [id for part in parts for id in self.model.encode_ordinary(part)]

    def piece(self, id: int) -> str | None:
        return self.token_of_id[id].decode(errors="replace") if id in self.token_of_id else None

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens by their names, and ids beyond the tokenizer by
        their number."""
        if id in self.token_of_id:
            return self.token_of_id[id]
        return self.control_of_id.get(id, f"<|reserved_{id}|>".encode())


NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec { add_dummy_prefix: false }


class SentencePieceTokenizer(TokenizerBase):
    """Llama 2's tokenizer; the demo pair's is of the same form. where: names its file in a sentence.

    legacy: text after a control token is read with a space before it, as Llama 2's own code does.
    """

    def __init__(self, content: bytes, where: str = "the tokenizer file", legacy: bool = True):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.inner = (
                self.model
                if legacy
                else sentencepiece.SentencePieceProcessor(model_proto=content + NO_PREFIX)
            )
            self.vocab_size, self.bos_id = self.model.vocab_size(), self.model.bos_id()
            self.stop_ids = [self.model.eos_id()]
            self.bytes_of_id = [self.read_piece(id) for id in range(self.vocab_size)]
            self.pieces = [self.model.id_to_piece(id) for id in range(self.vocab_size)]
            self.model.encode("probe")
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise InputError(
                f"{where} is not a whole SentencePiece file: {one_line(str(error)).rstrip('.')}."
            ) from None
        if not (0 <= self.bos_id < self.vocab_size and 0 <= self.stop_ids[0] < self.vocab_size):
            raise InputError(
                f"{where} has no begin-of-text or no end-of-text piece; a Llama's tokenizer has both."
            )
        ids = range(self.vocab_size)
        super().__init__(
            {self.pieces[id]: id for id in ids if self.model.is_control(id) or self.model.is_unknown(id)}
        )

    def read_piece(self, id: int) -> bytes:
        """The bytes of a piece, as text that goes on."""
        piece = self.model.id_to_piece(id)
        if self.model.is_control(id):
            return piece.encode()
        return (
            bytes([int(piece[3:5], 16)]) if self.model.is_byte(id) else piece.replace("\u2581", " ").encode()
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin-of-text."""
        check_text(text)
        return self.model.encode(text)

    def encode_piece(self, text: str, first: bool) -> list[int]:
        check_text(text)
        return (self.model if first else self.inner).encode(text)

    def piece(self, id: int) -> str | None:
        return self.pieces[id] if id < self.vocab_size else None

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """The bytes that a token stands for; ids beyond the tokenizer by their number. `first`: it begins the
        text, so the space put before all text goes."""
        if not 0 <= id < self.vocab_size:
            return self.control_of_id.get(id, f"<|reserved_{id}|>".encode())
        text = self.bytes_of_id[id]
        spaced = first and not self.model.is_control(id) and not self.model.is_byte(id)
        return text.removeprefix(b" ") if spaced else text


Tokenizer = TiktokenTokenizer | SentencePieceTokenizer


def check_text(text: str) -> None:
    """Raises InputError for text that is no valid Unicode (half of a surrogate pair, as broken escapes leave
    it)."""
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
    """Text of ids. at_start: they begin a text (SentencePiece's leading space goes); else they continue
    one."""
    decoder = Decoder(tokenizer, at_start)
    return "".join([*map(decoder.push, ids), decoder.flush()])


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a snapshot folder, with its chat template and the stop tokens of its
    generation_config.json or, where that names none, of its config.json.

    As in transformers a tokenizer.json comes first. Raises InputError when there is no tokenizer, none of a
    kind that is implemented, when two contradict each other, and for whatever is damaged.
    """
    folder = model_folder(folder)
    settings = read_optional(folder / "tokenizer_config.json")
    file = next(
        (
            path
            for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model")
            if there(path)
        ),
        None,
    )
    whole = folder / "tokenizer.json"
    content = read_json(whole) if there(whole) else None
    if content is not None and (is_llama3(content) or file is None):
        tokenizer = TiktokenTokenizer(ranks_of_json(content, str(whole)), str(whole))
    elif file is not None:
        tokenizer = read_model_file(file, settings.get("legacy") is True)
        check_agreement(tokenizer, content, file, whole)
    else:
        raise InputError(f"{folder} has no tokenizer.model, original/tokenizer.model or tokenizer.json.")
    add_names(tokenizer, added_tokens(folder, content, settings))
    config = read_optional(folder / "config.json")
    check_size(tokenizer, config.get("vocab_size"), folder)
    for name, found in (
        ("generation_config.json", read_optional(folder / "generation_config.json")),
        ("config.json", config),
    ):
        if found.get("eos_token_id") is not None:
            tokenizer.stop_ids = read_stops(found["eos_token_id"], tokenizer, config, folder / name)
            break
    source, where = chat_source(folder, settings)
    if source is None:
        tokenizer.no_chat = where
    else:
        tokenizer.chat = ChatTemplate(source, where, special_tokens(folder, settings, tokenizer))
    return tokenizer


def there(path: Path) -> bool:
    """Whether a path exists, as whatever: opening what is no file says so."""
    return os.path.lexists(path)


def read_optional(path: Path) -> dict:
    """The JSON object in a file, {} where there is none."""
    return read_json(path) if there(path) else {}


def check_size(tokenizer: Tokenizer, size, folder: Path) -> None:
    """Raises InputError for a tokenizer that gives ids which the model, of `size` tokens, lacks."""
    if type(size) is int and 0 < size < tokenizer.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only {size}."
        )


def read_stops(stops, tokenizer: Tokenizer, config: dict, where: Path) -> list[int]:
    """A folder's stop tokens. A model may have more tokens than its tokenizer (Llama 2's with a chat format
    of its own)."""
    size = config.get("vocab_size")
    limit = max(tokenizer.vocab_size, size if type(size) is int and size <= MOST_ID else 0)
    found = stops if isinstance(stops, list) else [stops]
    if not found or len(found) > 1000 or not all(type(stop) is int and 0 <= stop < limit for stop in found):
        raise InputError(f"{where}: eos_token_id={shortened_value(stops)} must name tokens below {limit}.")
    return list(dict.fromkeys(found))


def read_model_file(path: Path, legacy: bool) -> Tokenizer:
    """A `tokenizer.model`: lines of base64 and rank are tiktoken's, anything else SentencePiece's."""
    content = read_bytes(path, most=MOST_TEXT)
    if not re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", content):
        try:
            sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, ValueError):
            raise InputError(f"{path} is neither a tiktoken nor a SentencePiece file.") from None
        return SentencePieceTokenizer(content, str(path), legacy)
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise InputError(
            f"{path} looks like a tiktoken file, but has a line that is not 'base64 rank'."
        ) from None
    return TiktokenTokenizer(ranks, str(path))


def check_agreement(tokenizer: Tokenizer, content: dict | None, file: Path, whole: Path) -> None:
    """Raises InputError where a tokenizer.json, which transformers would read, has other tokens than
    tokenizer.model."""
    if content is None:
        return
    model = content.get("model") if isinstance(content.get("model"), dict) else {}
    vocab, pieces = model.get("vocab"), getattr(tokenizer, "pieces", None)
    if isinstance(vocab, list):  # of pieces and scores
        firsts = [entry[0] if isinstance(entry, list) and entry else None for entry in vocab]
        vocab = {piece: id for id, piece in enumerate(firsts) if isinstance(piece, str)}
    if (
        pieces is None
        or not isinstance(vocab, dict)
        or any(vocab.get(piece) != id for id, piece in enumerate(pieces))
    ):
        raise InputError(
            f"{whole} is neither Llama 3's byte-level BPE nor of the same tokens as {file}; one of them must "
            f"go."
        )


def is_llama3(content: dict) -> bool:
    """Whether a tokenizer.json is Llama 3's byte-level BPE, in all that decides about ids but the
    vocabulary."""
    model, pre = content.get("model"), content.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(pre, dict) or content.get("normalizer") is not None:
        return False
    steps = pre.get("pretokenizers")
    if not isinstance(steps, list) or [isinstance(step, dict) for step in steps] != [True, True]:
        return False
    split, level = steps
    plain = not any(
        model.get(name)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    return (
        model.get("type") == "BPE"
        and plain
        and split.get("type") == "Split"
        and split.get("pattern") == {"Regex": SPLIT}
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and level.get("type") == "ByteLevel"
        and not level.get("add_prefix_space")
        and not level.get("use_regex", True)
    )


def ranks_of_json(content: dict, where: str) -> dict[bytes, int]:
    """Llama 3's byte-pair ranks from Hugging Face's tokenizer.json, where an ordinary token's id is its
    rank."""
    if not is_llama3(content):
        raise InputError(
            f"{where} is not Llama 3's byte-level BPE; only that form of tokenizer.json is implemented."
        )
    vocab, merges = content["model"].get("vocab"), content["model"].get("merges")
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    try:
        ranks = {bytes(byte_of[char] for char in token): id for token, id in vocab.items()}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        made = [vocab[left + right] for left, right in pairs]
        if not all(type(id) is int for id in ranks.values()) or len(ranks) != len(vocab):
            raise ValueError
        whole = made == sorted(made) and len(set(made)) + 256 == len(vocab)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{where}: the vocabulary or the merges are damaged.") from None
    if not whole:
        raise InputError(f"{where}: the merges are not those of the vocabulary.")
    return ranks


def added_tokens(folder: Path, content: dict | None, settings: dict) -> list[tuple[object, object, str]]:
    """(id, name, where) of all tokens that a folder adds to its vocabulary, as its files say it."""
    found = []
    if content is not None and content.get("added_tokens") is not None:
        where, entries = f"{folder / 'tokenizer.json'}: added_tokens", content["added_tokens"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{where} is not a list of objects.")
        found += [(entry.get("id"), entry.get("content"), where) for entry in entries]
    where, entries = (
        f"{folder / 'tokenizer_config.json'}: added_tokens_decoder",
        settings.get("added_tokens_decoder") or {},
    )
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{where} is not an object of objects.")
    for id, entry in entries.items():
        good = id.isascii() and id.isdecimal() and len(id) < 10
        found.append((int(id) if good else id, entry.get("content"), where))
    if content is None and not entries:
        path = folder / "added_tokens.json"
        found += [(id, name, str(path)) for name, id in read_optional(path).items()]
    return found


def add_names(tokenizer: Tokenizer, found: list[tuple[object, object, str]]) -> None:
    """Gives a tokenizer the names of added tokens. Raises InputError for ids and names that are none, or are
    double."""
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    for id, name, where in found:
        if type(id) is not int or not 0 <= id < MOST_ID or not isinstance(name, str) or not name:
            raise InputError(
                f"{where}: id {shortened_value(id)} and content {shortened_value(name)} are no token."
            )
        if names.setdefault(id, name) != name or ids.setdefault(name, id) != id:
            raise InputError(
                f"{where}: token {shortened_value(name)} of id {id} has two ids, or its id two names."
            )
        piece = tokenizer.piece(id)
        if piece is not None and name not in (piece, piece.replace("\u2581", " ")):
            raise InputError(
                f"{where}: token {id} is {shortened_value(name)}, but {shortened_value(piece)} in the "
                f"vocabulary."
            )
    tokenizer.add_names(names)


def special_tokens(folder: Path, settings: dict, tokenizer: Tokenizer) -> dict[str, str]:
    """What a template may call bos_token and so on: as the folder says, else the tokenizer's own first and
    last token."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    older = read_optional(folder / "special_tokens_map.json")
    own = {name: tokenizer.control_of_id.get(id, b"").decode() for name, id in
           (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.stop_ids[0]))}  # fmt: skip
    tokens = {}
    for name in names:
        value = settings.get(name, older.get(name, own.get(name)))
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: {name}={shortened_value(value)} is no token."
            )
        if value is not None:
            tokens[name] = value
    return tokens


@lru_cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(rest)}


MOST_TEMPLATE = 1 << 20  # bytes of a chat template


MOST_STEPS = (
    3_000_000  # lines of Python to read or fill in a template (Llama 3.1's: 2,000 and a few a message)
)


MOST_MEMORY = 1 << 30  # bytes that a template may take on top of what the process has


class ChatTemplate:
    """A folder's chat template, filled in as transformers fills it in. source: its text; where: its file, in
    a sentence; special: what it may call bos_token, eos_token and so on."""

    def __init__(self, source: str, where: str, special: dict[str, str]):
        self.source, self.where, self.special = source, where, special
        self.template: jinja2.Template | None = None
        self.now = datetime.now()

    def render(self, messages: list[dict[str, str]], controls: Callable) -> list[tuple[str, bool]]:
        """The filled-in template in parts (text, whether it is the template's own and not a message's
        content).

        To tell them apart, texts that no one can guess stand in for the contents. A template may look into a
        content (as DeepSeek's, which drops what was thought in earlier turns): then that content is left as
        it is, if the template's own text has the same control tokens (by `controls`) with it and without.
        Raises InputError where it has not.
        """
        self.now = datetime.now()
        whole = self.fill(messages)
        wanted = None
        for hidden in (lambda role: True, lambda role: role != "assistant", lambda role: False):
            marks, shown = {}, []
            for message in messages:
                content = message["content"]
                inner = content.strip()
                mark = "q" + secrets.token_hex(16)
                if inner and hidden(message["role"]):
                    marks[mark] = inner
                    content = content.replace(inner, mark, 1)  # the space around it stays: templates trim it
                shown.append(message | {"content": content})
            parts = re.split("(" + "|".join(marks) + ")", self.fill(shown)) if marks else [whole]
            parts = [(marks.get(part, part), part not in marks) for part in parts]
            found = [controls(text) for text, own in parts if own]
            found = [id for ids in found for id in ids]
            wanted = found if wanted is None else wanted
            if found == wanted and "".join(text for text, _ in parts) == whole:
                return parts
        raise InputError(
            f"{self.where}: the chat template changes a message that spells a control token; leave that text "
            f"out."
        )

    def after_answer(self) -> str:
        """What the template writes after an answer, before the next question if there may be one."""
        answer, last = "q" + secrets.token_hex(16), "q" + secrets.token_hex(16)
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        try:
            text = self.fill([*said, {"role": "user", "content": last}], False)
        except InputError:
            text = self.fill(said, False)
        return text.partition(answer)[2].partition(last)[0]

    def fill(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The filled-in template. Raises InputError with what it says against the messages, or what is wrong
        with it."""
        try:
            with bounded():
                if self.template is None:
                    self.template = self.environment().from_string(self.source)
                return self.template.render(
                    messages=[dict(message) for message in messages], tools=None, documents=None,
                    add_generation_prompt=add_generation_prompt, **self.special,
                )  # fmt: skip
        except TooLong:
            raise InputError(f"{self.where}: the chat template does not come to an end.") from None
        except MemoryError:
            raise InputError(f"{self.where}: the chat template takes too much memory.") from None
        except RecursionError:
            raise InputError(f"{self.where}: the chat template is nested too deeply.") from None
        except Exception as error:  # a template is a program: anything may be wrong with it
            reason = (one_line(str(error)) or type(error).__name__).rstrip(".")
            raise InputError(
                f"{self.where}: the chat template cannot be used for these messages: {reason}."
            ) from None

    def environment(self) -> jinja2.Environment:
        """Jinja as chat templates expect it (settings and functions are those of transformers'
        apply_chat_template)."""
        extensions = ["jinja2.ext.loopcontrols", Generation]
        jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        jinja.filters["tojson"] = to_json
        jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: self.now.strftime(form)}
        return jinja


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no single product or power can take minutes."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context, operator, left, right):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right if operator == "**" else right.bit_length())
            if bits > 1_000_000:
                raise SecurityError("a number is too large.")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """The block {% generation %}, which marks an assistant's words for training; here it is only its
    content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would write HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str):
    """`raise_exception` of templates."""
    raise jinja2.TemplateError(message)


class TooLong(BaseException):
    """Raised inside a template that does not come to an end; nothing in Jinja catches it."""


@contextmanager
def bounded(steps: int = MOST_STEPS) -> Iterator[None]:
    """Python for at most so many lines and, on Linux, in at most MOST_MEMORY more than now: raises TooLong,
    MemoryError."""
    left = steps

    def count(frame, event, arg):
        nonlocal left
        left -= 1
        if left < 0:
            raise TooLong
        return count

    before = sys.gettrace()
    with bounded_memory():
        sys.settrace(count)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets the process grow by at most MOST_MEMORY, where the system can do that."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY
    lowest = min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=most)
    resource.setrlimit(resource.RLIMIT_AS, (min(most, lowest), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def chat_source(folder: Path, settings: dict) -> tuple[str | None, str]:
    """A folder's chat template and its file; or None and why there is none. A file of its own comes first."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path, most=MOST_TEMPLATE), str(path)
    where, found = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(found, list):
        try:
            named = {entry["name"]: entry["template"] for entry in found}
        except (TypeError, KeyError):
            raise InputError(
                f"{where}: chat_template is not a list of objects with name and template."
            ) from None
        if named and "default" not in named:
            return None, f"{where} has several chat templates, but none of the name default"
        found = named.get("default")
    if found is not None and (not isinstance(found, str) or len(found) > MOST_TEMPLATE):
        raise InputError(f"{where}: chat_template={shortened_value(found)} is no template.")
    if not found:
        return (
            None,
            f"{folder} has no chat format: neither chat_template.jinja nor chat_template in "
            f"tokenizer_config.json",
        )
    return found, str(where)
