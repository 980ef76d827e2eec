"""Protects: a conversation goes on from the caches of its turns, exactly; its commands; a full context loses nothing."""

import argparse
import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import test_tokenizer
from conftest import ROOT, TEMPLATES
from test_generate import Scripted, one_hot

import generate
from cli import InputError
from generate import Engine, NotFinite, Settings, main
from scripts.lib import conversation
from scripts.lib.conversation import Conversation
from scripts.lib.guarantee import Drift
from scripts.lib.result import Result
from tokenizer import decode, load_tokenizer

END = 7
small_llama3 = test_tokenizer.small_llama3  # a fixture


class Letters:
    """A chat of tokens: 0 begins a question, 1 an answer, END ends it, 2 to 6 are the letters c to g."""

    stop_ids = [END]

    @property
    def chat(self):
        return SimpleNamespace(
            fill=lambda messages: "".join("<>cdefg!"[id] for id in self.encode_chat(messages))
        )

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        return b"<>cdefg!"[id : id + 1]

    def read(self, text: str) -> list[int]:
        return ["<>cdefg!".index(letter) for letter in text]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        ids = []
        for message in messages:
            ends = [END] if message["role"] == "assistant" else []
            ids += [int(message["role"] == "assistant"), *self.read(message["content"]), *ends]
        return [*ids, 1]

    def encode_next(self, turn: str) -> list[int]:
        return [END, *self.encode_chat([{"role": "user", "content": turn}])]


class Forgetful(Letters):
    """Its template drops the first letter of earlier answers."""

    def encode_chat(self, messages):
        said = [m | {"content": m["content"][m["role"] == "assistant" :]} for m in messages]
        return super().encode_chat(said)


def says(n: int, t: int) -> list[float]:
    return one_hot(END if n % 9 == 0 else 2 + (t - 1) % 5)


def start(tokenizer, k: int = 3, length: int = 120, draft=says, **more) -> Conversation:
    models = Scripted(says), Scripted(draft)
    engine = Engine(*models, None, Settings("standard", speculate_k=k), tokenizer.stop_ids, length)
    args = argparse.Namespace(**{"chat": True, "system": None, "marks": False, "stop": [], "max_new_tokens": 30,
                                 "compile": False, "verify": "standard"} | more)  # fmt: skip
    return Conversation(args, engine, tokenizer, Drift(None))


def text_of(talk: Conversation) -> list[int]:
    return talk.engine.buffers.tokens[: talk.taken].tolist()


@pytest.mark.parametrize("tokenizer", [Letters(), Forgetful()])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_the_caches_hold_the_conversation_and_only_what_is_new_is_read(monkeypatch, tokenizer, k):
    """Pages of one position: what either model read last at a place is the token that stands there, after every
    turn, with drafts that are taken whole or in part; and nothing is read again that need not be."""
    monkeypatch.setattr(generate, "PAGE", 1)
    for draft in (says, lambda n, t: one_hot(3) if n % 4 == 0 else says(n, t)):
        talk, caches = start(tokenizer, k, draft=draft), ({}, {})
        for turn, question in enumerate(("cc", "defg", "g", "cdc")):
            before, known = text_of(talk), len(talk.cached)
            for model in talk.engine.models:
                model.read.clear()
            talk.turn(question)
            result, text = talk.results[-1], text_of(talk)
            for model, cache in zip(talk.engine.models, caches):
                for call in model.read:
                    cache.update(call)
                assert [cache[n] for n in range(len(text) - 2)] == text[:-2]
            same = next((n for n, (a, b) in enumerate(zip(before, text)) if a != b), len(before))
            assert result.prefilled == result.prompt_tokens - 1 - min(same, known)
            assert known >= len(before) - 2 and (turn == 0 or result.prefilled < result.prompt_tokens - 1)
            prompt = text[: result.prompt_tokens]
            assert prompt == tokenizer.encode_chat(talk.messages[:-1])
            fresh = Engine(
                Scripted(says), Scripted(draft), None, Settings("standard", speculate_k=k), [END], 120
            )
            assert result.tokens == fresh.generate(prompt, 30).tokens
        assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 4


def test_pages_are_kept_whole(pair):
    """Real models, whose pages are of 64 positions: exactly the whole pages of what went before are not read again."""
    target, draft = pair
    target_engine = Engine(target, draft, None, Settings("standard", speculate_k=4), [96], 400)

    class Plain(Letters):
        stop_ids = [96]

        def token_bytes(self, id, first=False):
            return b"%d " % id

        def encode_chat(self, messages):
            return [5 + len(messages), *([9] * 50)]

        chat = SimpleNamespace(fill=lambda messages: "".join(m["content"] for m in messages))

        def encode_next(self, turn):
            return [96, 3, *([8] * len(turn))]

    talk = start(Plain(), max_new_tokens=40)
    talk.use(target_engine, Drift(None))
    talk.turn("a")
    for question in ("b" * 10, "c" * 70, "d"):
        known = talk.taken - 2
        talk.turn(question)
        result, text = talk.results[-1], text_of(talk)
        assert result.prefilled == result.prompt_tokens - 1 - known // 64 * 64 and known >= 64
        fresh = Engine(target, draft, None, Settings("standard", speculate_k=4), [96], 400)
        assert fresh.generate(text[: result.prompt_tokens], 40).tokens == result.tokens


class Says:
    """An engine that says given answers, and notes what it was given to read."""

    length, context, draft, settings = 4000, (4000, ""), None, Settings("plain")

    def __init__(self, *answers: list[int]):
        self.answers, self.asked = list(answers), []

    def stream(self, prompt, most, keep):
        self.asked.append((prompt, keep))
        tokens = self.answers.pop(0)
        self.result = Result(len(prompt), tokens, ["t"] * len(tokens))
        yield from zip(tokens, self.result.origin)


@pytest.mark.parametrize("form, system, thinks, goes_on", [
    ("llama 3", "Be brief.", False, True), ("llama 3.2", None, False, True), ("chatml", "Be brief.", True, True),
    ("llama 2", "Be brief.", False, True), ("mistral", None, False, True), ("mistral", "Be brief.", False, False),
    ("deepseek", None, True, False),
])  # fmt: skip
def test_each_turn_is_what_the_folders_template_says(
    tmp_path, small_llama3, form, system, thinks, goes_on, capsys
):
    """Three turns by real templates: the text of each prompt is the template's of the whole conversation, and all of
    the turn before is kept, but where the template changes that."""
    folder = test_tokenizer.small_chat(tmp_path / "m", small_llama3, TEMPLATES[form])
    tokenizer = load_tokenizer(folder)
    tokenizer.check_chat()
    spoken = "hmm</think>So: {}" if thinks else " So: {}" if form in ("llama 2", "mistral") else "So: {}"
    answers = [[*tokenizer.encode_parts([(spoken.format(word), True)], False), tokenizer.stop_ids[-1]]
               for word in ("the user", "two", "3")]  # fmt: skip
    talk = start(tokenizer, system=system)
    talk.engine = Says(*answers)
    before: list[int] = []
    for question in ("Why?", "the user <|eot_id|>", "1+1?"):
        talk.turn(question)
        prompt, keep = talk.engine.asked[-1]
        assert decode(tokenizer, prompt) == tokenizer.chat.fill(talk.messages[:-1])
        assert len(talk.results) == 1 or (keep == len(before) - 2) == goes_on
        assert prompt[:keep] == before[:keep]
        before = prompt + talk.engine.result.tokens
    assert [m["content"] for m in talk.messages if m["role"] == "assistant"][1] == spoken.format("two")
    assert ("rewrites" in capsys.readouterr().err) != goes_on


def test_a_template_that_rewrites_answers_is_said_once(capsys):
    talk = start(Forgetful())
    for question in ("c", "d", "e"):
        talk.turn(question)
    err = capsys.readouterr().err
    assert err.count("rewrites earlier turns") == 1


def test_a_stop_text_ends_a_turn_and_is_not_in_the_next(capsys):
    talk = start(Letters(), stop=["ef"])
    talk.turn("c")
    assert talk.results[0].stop_reason == "text" and talk.messages[1]["content"] == "cd"
    talk.turn("d")
    assert text_of(talk)[: talk.results[1].prompt_tokens] == Letters().encode_chat(talk.messages[:3])
    assert capsys.readouterr().out == "cd\nc\n"


def test_a_full_context_is_said_and_loses_nothing(capsys):
    talk = start(Letters(), length=30)
    with pytest.raises(InputError, match="context of 30 tokens is full.*/reset begins"):
        for question in ("cd" * 4, "ef" * 4, "gc" * 4):
            before = list(talk.messages)
            talk.turn(question)
    assert talk.messages == before and len(before) >= 2 and talk.taken <= 30
    talk.turn("c") if talk.taken < 25 else None
    talk.command("/reset")
    talk.turn("cd")
    assert [m["content"] for m in talk.messages][0] == "cd" and len(talk.messages) == 2
    with pytest.raises(InputError, match="do not fit the cache of 30"):
        talk.command("/reset")
        talk.turn("c" * 40)


def test_a_system_message_begins_the_conversation(capsys):
    talk = start(Letters())
    talk.turn("c")
    talk.command("/system gg")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    talk.turn("d")
    assert text_of(talk)[:3] == [0, 6, 6]
    talk.command("/system")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_another_rule_answers_as_if_it_had_begun(monkeypatch):
    """Also after turns without a draft, whose cache has a hole then."""
    monkeypatch.setattr(conversation, "announce", lambda args, engine: Drift(None))
    monkeypatch.setattr(generate, "PAGE", 1)
    talk, caches = start(Letters()), ({}, {})
    models = talk.engine.models
    for rule in ("plain", "standard", "topk"):
        talk.turn("cd")
        talk.command(f"/verify {rule}")
        assert talk.engine.settings.verify == rule
    talk.command("/threshold 3")
    assert talk.engine.settings.threshold == 3 and talk.engine.buffers.threshold == 3
    talk.turn("c")
    for model, cache in zip(models, caches):
        for call in model.read:
            cache.update(call)
        text = text_of(talk)
        assert [cache[n] for n in range(len(text) - 2)] == text[:-2]


@pytest.mark.parametrize("line, words", {
    "/nothing": "There is no command /nothing; /help lists them.", "/reset now": "/reset takes nothing",
    "/verify": "/verify takes RULE", "/verify magic": "no rule; known are plain, standard, judge",
    "/verify judge": "needs a judge, and this run has loaded none; start with --verify judge",
    "/threshold 1": "has no threshold", "/threshold many": "/threshold many must be a number",
    "/save /no/such/file": "/save /no/such/file cannot be written",
}.items())  # fmt: skip
def test_a_mistaken_command_is_one_sentence_and_changes_nothing(line, words):
    talk = start(Letters())
    talk.turn("c")
    before = (list(talk.messages), list(talk.ids), talk.engine, talk.engine.settings)
    with pytest.raises(InputError, match=words):
        talk.command(line)
    assert before == (talk.messages, talk.ids, talk.engine, talk.engine.settings)


def test_save_writes_a_new_file_only(tmp_path):
    talk = start(Letters())
    talk.turn("c")
    talk.command(f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"] == talk.messages and saved["verify"] == "standard"
    with pytest.raises(InputError, match="exists; name a new file"):
        talk.command(f"/save {tmp_path / 'talk.json'}")


def test_commands_and_prompts_from_a_person(tmp_path, capsys, monkeypatch):
    """Line by line, with the demo pair: commands, a text that begins with /, mistakes that do not end the program."""
    lines = ["/help", "/wrong", "//x", "/stats", "", "/verify standard", "y", "/system z", "/threshold 0.5"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    main(["--device", "cpu", "--interactive", "--max_new_tokens", "5"])
    err = capsys.readouterr().err
    assert (
        err.count("tokens in 0.") == 2 and "1 turns, judge 0.8 now: 5 tokens" in err and "\nstandard  " in err
    )
    for words in (
        "/threshold X ",
        "no command /wrong",
        "/system is a message of a chat",
        "standard has no threshold",
    ):
        assert err.count(words) == 1, words


def test_the_transcript_of_the_page_is_what_happens(tmp_path, capsys, monkeypatch):
    """Word for word, but for speeds."""
    transcript = (ROOT / "docs" / "chat.md").read_text().rpartition("## A transcript")[2].split("```\n")[1]
    typed = iter([line[2:] for line in transcript.splitlines() if line.startswith("> ")])

    def answer(prompt: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        print(f"{prompt}{line}")
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    monkeypatch.chdir(tmp_path)
    main(["--device", "cpu", "--interactive", "--marks"])
    said = capsys.readouterr().out
    said = said[said.index("accepted draft tokens") :]
    without = [re.sub(r" +\d+\.\d+ (tokens/s|s)\b", r" \1", text).rstrip() for text in (transcript, said)]
    assert without[0] == without[1]


def test_after_an_answer_that_failed_nothing_is_taken_from_the_caches(monkeypatch):
    """Logits that are not finite clear the caches: what was kept of them before must be read again."""
    talk, kept, stream = start(Letters()), [], Engine.stream

    def failing(self, prompt, most, keep=0):
        kept.append(keep)
        if len(kept) == 2:
            raise NotFinite("The target's logits are not finite.")
        yield from stream(self, prompt, most, keep=keep)

    monkeypatch.setattr(Engine, "stream", failing)
    talk.turn("c")
    with pytest.raises(NotFinite):
        talk.turn("d")
    talk.turn("e")
    assert kept[0] == 0 and kept[1] > 0 and kept[2] == 0
