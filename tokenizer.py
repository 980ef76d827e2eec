"""Text to ids and back, and stop tokens: a tokenizer.json by the package tokenizers, Meta's own files by
tiktoken (Llama 3) and SentencePiece (Llama 2 and the demo pair).

`load_tokenizer(folder)` takes what a published folder holds: `tokenizer.json`, or else `tokenizer.model` or
`original/tokenizer.model` in either format. Text is always plain text: "<|eot_id|>" typed by a user becomes
ordinary tokens, never the control token; only `encode_chat` writes control tokens, those that the folder's
own chat template has.
"""

import base64
import binascii
import codecs
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

from chat import ChatTemplate, TemplateChangesAnswers, find_template
from cli import InputError, one_line, shortened_value
from files import parse_object, read_bytes, read_json, read_text
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
    """What all kinds share: names of control tokens, stop tokens, the chat format."""

    vocab_size: int
    bos_id: int | None
    prefix: list[int]  # what the folder puts before a plain text: begin-of-text, or nothing
    stop_ids: list[int]
    chat: ChatTemplate | None = None
    no_chat = "This tokenizer was loaded without a folder, and so without a chat template"

    def __init__(self, control: dict[str, int]):
        self.control = control  # name -> id
        self.control_of_id = {id: name.encode() for name, id in control.items()}
        self.names: re.Pattern | None = None
        self.strips: dict[str, tuple[bool, bool]] = {}  # names that take the space before or after them along
        self.end_of_turn: int | None = None

    def add_names(self, added: dict[int, str]) -> None:
        """Names that the folder gives to tokens; they replace those known so far."""
        self.control_of_id |= {id: name.encode() for id, name in added.items()}
        self.control = {name.decode(): id for id, name in self.control_of_id.items()}

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def prompt(self, text: str) -> list[int]:
        """Ids of a plain text that a model is to continue, begun as the folder begins one."""
        return [*self.prefix, *self.encode(text)]

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
            self.names = re.compile("|".join(map(self.pattern, sorted(self.control, key=len, reverse=True))))
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
                    self.control[match[match.lastindex]],
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
            raise TemplateChangesAnswers(
                f"{self.chat.where}: the chat template leaves out an answer, or changes it."
            )
        return self.encode_parts(parts[at + 1 :], False)

    def pattern(self, name: str) -> str:
        """A regular expression of a control token, whose only group is its name."""
        before, after = (r"\s*" if strip else "" for strip in self.strips.get(name, (False, False)))
        return f"{before}({re.escape(name)}){after}"

    def control_in(self, text: str) -> list[int]:
        """The control tokens in a template's text."""
        return [self.control[match[match.lastindex]] for match in self.names.finditer(text)]


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
        self.prefix = [self.bos_id]
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
            self.prefix, self.stop_ids = [self.bos_id], [self.model.eos_id()]
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


class JsonTokenizer(TokenizerBase):
    """A tokenizer.json of any kind whose tokens stand for bytes. content: the file; where: names it in a
    sentence; settings: tokenizer_config.json.

    transformers reads added tokens that are not "special" out of plain text. Here that is so for runs of
    space alone: all others are control tokens of some template (DeepSeek's "<｜User｜>", "<think>").
    """

    def __init__(self, content: str, where: str, settings: dict):
        spec = parse_object(content, where)
        names = mark_control_tokens(spec, f"{where}: added_tokens")
        self.bytes_of = decoder_of(spec, where)
        first, inner = (metaspace(spec, place, settings) for place in ("first", "never"))
        self.model = build(first, where)
        self.inner = self.model if inner == first else build(inner, where)
        vocab = self.model.get_vocab(with_added_tokens=False)
        self.pieces = {id: piece for piece, id in vocab.items()}
        for name, id in names.items():
            if self.model.token_to_id(name) != id:
                raise InputError(
                    f"{where}: added_tokens: {shortened_value(name)} of id {id} is not the vocabulary's next."
                )
        super().__init__({name: id for name, id in names.items() if name.strip()})
        self.strips = {
            entry["content"]: (entry["lstrip"], entry["rstrip"]) for entry in spec.get("added_tokens") or ()
        }
        self.control_of_id |= {id: name.encode() for name, id in names.items()}
        self.vocab_size = max(self.pieces.keys() | self.control_of_id.keys(), default=-1) + 1
        if len(self.pieces) < len(vocab) or not 0 < self.vocab_size <= MOST_ID:
            raise InputError(f"{where}: the vocabulary has an id twice, or none, or one beyond {MOST_ID}.")
        if decode(self, self.encode(PROBE), True).removeprefix(" ") != PROBE:
            raise InputError(f"{where} is damaged: {PROBE!r} is not what its tokens say when read back.")
        self.prefix = self.begin_of_text()
        self.bos_id = self.id_of(settings.get("bos_token"), self.prefix[0] if self.prefix else None)
        ends = [self.id_of(name) for name in (settings.get("eos_token"), *ENDS)]
        self.stop_ids = list(dict.fromkeys(id for id in ends if id is not None))

    def begin_of_text(self) -> list[int]:
        """What the file's post-processor puts before a text."""
        plain, whole = (self.model.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = range(len(whole) - len(plain) + 1)
        return whole[: next((at for at in starts if whole[at : at + len(plain)] == plain), 0)]

    def id_of(self, token, default: int | None = None) -> int | None:
        """The id of a token that a setting names, as text or as an object with its content."""
        name = token.get("content") if isinstance(token, dict) else token
        id = self.model.token_to_id(name) if isinstance(name, str) else None
        return default if id is None else id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin-of-text."""
        return self.encode_piece(text, True)

    def encode_piece(self, text: str, first: bool) -> list[int]:
        check_text(text)
        model = self.model if first else self.inner
        return model.encode(text, add_special_tokens=False).ids

    def piece(self, id: int) -> str | None:
        return self.pieces.get(id)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """As `SentencePieceTokenizer.token_bytes`."""
        if id not in self.pieces or id in self.control_of_id:
            return self.control_of_id.get(id, f"<|reserved_{id}|>".encode())
        piece = self.pieces[id]
        spaced = first and self.bytes_of is bytes_of_piece
        return self.bytes_of(piece.removeprefix("\u2581") if spaced else piece)


PROBE = "the user 123 x=a+b"  # a tokenizer that loses text is damaged
ENDS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")  # where known


def mark_control_tokens(spec: dict, where: str) -> dict[str, int]:
    """Makes the added tokens of a tokenizer.json such as text cannot write -> name to id. Raises InputError
    for what is no token."""
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise InputError(f"{where} is not a list of objects.")
    names = check_names((entry.get("id"), entry.get("content"), where) for entry in added)
    for entry in added:
        entry["special"] = bool(entry["content"].strip())
        for name in ("single_word", "lstrip", "rstrip", "normalized"):
            entry.setdefault(name, False)
    return {name: id for id, name in names.items()}


def steps_of(part) -> list[dict]:
    """The steps of a part of a tokenizer.json (pre_tokenizer, decoder): it is one, or a sequence of them."""
    if not isinstance(part, dict):
        return []
    inner = next((part[name] for name in ("pretokenizers", "decoders", "normalizers") if name in part), None)
    return [step for each in inner for step in steps_of(each)] if isinstance(inner, list) else [part]


def decoder_of(spec: dict, where: str) -> Callable[[str], bytes]:
    """How a piece of the vocabulary becomes bytes: GPT-2's stand-ins for bytes, or SentencePiece's form.
    Raises InputError for other kinds, by name."""
    kinds = [step.get("type") for part in ("decoder", "pre_tokenizer") for step in steps_of(spec.get(part))]
    if "ByteLevel" in kinds:
        return bytes_of_stand_ins
    if {"ByteFallback", "Metaspace"} & set(kinds):
        return bytes_of_piece
    found = ", ".join(str(kind) for kind in kinds) or "none"
    raise InputError(
        f"{where}: a tokenizer with the decoder {shortened_value(found)} is not implemented; byte-level BPE "
        f"and SentencePiece's forms are."
    )


def bytes_of_stand_ins(piece: str) -> bytes:
    """GPT-2's form: a character stands for a byte; others, as in added tokens, for themselves."""
    byte_of = byte_of_stand_in()
    return b"".join(bytes([byte_of[char]]) if char in byte_of else char.encode() for char in piece)


def bytes_of_piece(piece: str) -> bytes:
    """SentencePiece's form: <0x0A> is a byte, U+2581 a space."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def metaspace(spec: dict, place: str, settings: dict) -> dict:
    """The file as transformers reads it for a LlamaTokenizer; place: of the text, "first" or "never".

    That class puts a space before the first text alone, and before each after a control token where
    tokenizer_config.json says "legacy". Other classes, and byte-level files, are read as they stand.
    """
    kinds = [step.get("type") for step in steps_of(spec.get("decoder"))]
    llama = settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if "ByteFallback" not in kinds or not llama:
        return spec
    legacy, prefix = settings.get("legacy") is True, settings.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if legacy else place
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    return spec | {"normalizer": None, "pre_tokenizer": step}


def build(spec: dict, where: str) -> tokenizers.Tokenizer:
    """The package's tokenizer, which reads no control token out of text. Raises InputError for what it does
    not take."""
    try:
        model = tokenizers.Tokenizer.from_str(json.dumps(spec))
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        model.encode("probe")
        return model
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        reason = one_line(str(error)).rstrip(".")[:300]
        raise InputError(f"{where} is not a tokenizer that can be read: {reason}.") from None


Tokenizer = TiktokenTokenizer | SentencePieceTokenizer | JsonTokenizer


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
    whole, file = folder / "tokenizer.json", folder / "tokenizer.model"
    if not there(file):
        file = folder / "original" / "tokenizer.model"
    content = None
    if there(whole):
        content = read_text(whole, most=MOST_TEXT)
        tokenizer = JsonTokenizer(content, str(whole), settings)
    elif there(file):
        tokenizer = read_model_file(file, settings.get("legacy") is True)
        if settings.get("add_bos_token") is False:
            tokenizer.prefix = []
    else:
        raise InputError(f"{folder} has no tokenizer.json, tokenizer.model or original/tokenizer.model.")
    add_names(tokenizer, added_tokens(folder, tokenizer, settings))
    config = read_optional(folder / "config.json")
    check_size(tokenizer, config.get("vocab_size"), folder)
    for name, found in (
        ("generation_config.json", read_optional(folder / "generation_config.json")),
        ("config.json", config),
    ):
        if found.get("eos_token_id") is not None:
            tokenizer.stop_ids = read_stops(found["eos_token_id"], tokenizer, config, folder / name)
            break
    if not tokenizer.stop_ids:
        raise InputError(
            f"{folder} names no token that ends a text; generation_config.json must, as eos_token_id."
        )
    found = find_template(folder, settings, special_tokens(folder, settings, tokenizer))
    if isinstance(found, str):
        tokenizer.no_chat = found
    else:
        tokenizer.chat = found
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


def added_tokens(folder: Path, tokenizer: Tokenizer, settings: dict) -> list[tuple[object, object, str]]:
    """(id, name, where) of all tokens that a folder adds to its vocabulary, as its files say it."""
    found = []
    if whole := isinstance(tokenizer, JsonTokenizer):
        where = f"{folder / 'tokenizer.json'}: added_tokens"
        found += [(id, name, where) for name, id in tokenizer.control.items()]
    where, entries = (
        f"{folder / 'tokenizer_config.json'}: added_tokens_decoder",
        settings.get("added_tokens_decoder") or {},
    )
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{where} is not an object of objects.")
    for id, entry in entries.items():
        good = id.isascii() and id.isdecimal() and len(id) < 10
        found.append((int(id) if good else id, entry.get("content"), where))
    if not whole and not entries:
        path = folder / "added_tokens.json"
        found += [(id, name, str(path)) for name, id in read_optional(path).items()]
    return found


def check_names(found: Iterable[tuple[object, object, str]]) -> dict[int, str]:
    """Added tokens by id, of (id, name, where). Raises InputError for ids and names that are none, or are
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
    return names


def add_names(tokenizer: Tokenizer, found: list[tuple[object, object, str]]) -> None:
    """Gives a tokenizer the names of added tokens. Raises InputError as `check_names`, and where the
    vocabulary has another."""
    names = check_names(found)
    for id, name, where in found:
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


@lru_cache
def byte_of_stand_in() -> dict[str, int]:
    return {char: byte for byte, char in byte_alphabet().items()}
