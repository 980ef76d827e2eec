"""The engine: settings, the steps of a round, the round loop; and the command line.

    python generate.py                                    # the demo pair, with its judge, on a demo problem
    python generate.py --checkpoint_path BIG --draft_checkpoint_path SMALL --judge_path J --chat

One round: the draft proposes M tokens; the target reads them in one pass of M + 1 rows; one compiled graph
computes logits, judge scores, the rule, how many tokens are accepted and the target's own next token, and
commits; the host reads one small tensor. Nothing in the KV caches is rolled back: `pos` decides what counts.

Read `draft_step`, `verify_step`, then `Engine.stream`.
"""

from cli import InputError, run_script  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import kernels
import tp
from files import check_writable
from judge import PLAIN, RULES, JudgeHead, Rule, mixture, rule_mask
from kernels import compile_step
from model import PAGE, PREFILL_ROWS, Transformer, first_not_finite, pick_device, run_dtype, whole_pages
from quantize import open_checkpoint
from sampling import accept_sampled, distribution, pick, residual
from scripts.lib import pair
from scripts.lib.conversation import chat_loop
from scripts.lib.guarantee import kind_of, take_calibration
from scripts.lib.markers import Markers, make_markers
from scripts.lib.pace import Pace
from scripts.lib.published import filters_of, take_sampling
from scripts.lib.ranks import check_flags, check_round, own_device
from scripts.lib.result import Report, Result, Round
from scripts.lib.terminal import introduce, parse_args, print_answers, read_prompt
from tokenizer import Tokenizer, load_tokenizer

SIZES = (4, 6, 8, 12, 16, 24, 32)  # what --speculate_k auto chooses from


@dataclass
class Settings:
    """How to decode. threshold None: the judge's own, or the rule's default. temperature 0: greedy."""

    verify: str = "judge"  # plain (no draft), or a name in RULES
    threshold: float | None = None
    speculate_k: int = 16  # M; the commands' default stands in scripts/lib/flags.py
    temperature: float = 0.0
    top_k: int | None = None  # None: this filter is off, and so with the next two
    top_p: float | None = None
    min_p: float | None = None
    compile: bool = False
    min_prob: float = 0.0  # no rule accepts a token that the target gives less
    adaptive: bool = False  # choose each round's M from SIZES; speculate_k is then the largest
    relax_between: tuple[str, str] | None = None  # the rule applies only between these, `standard` elsewhere
    impose: int | None = None  # for benchmarks: accept so many draft tokens a round, whatever they are
    check_ranks: bool = False  # compare tokens and positions of all ranks every round
    debug_numerics: bool = False  # where logits are not finite, say where that begins

    @property
    def rule(self) -> Rule:
        """The rule; without a draft the standard test, of which nothing is asked."""
        return RULES.get(self.verify, PLAIN)

    def distribution(self, logits: Tensor) -> Tensor:
        """What is sampled from, (..., V); target and draft are filtered alike."""
        return distribution(logits, self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def needs_probabilities(self) -> bool:
        """Whether more than the most likely token counts, so that ranks must gather the target's logits."""
        return self.temperature > 0 or self.min_prob > 0 or "target" in self.rule.reads

    def resolved(self, head: JudgeHead | None) -> "Settings":
        """With the threshold in force: as asked for, else the rule's default, else the judge's own."""
        if self.threshold is not None or not self.rule.knob:
            return self
        default = head.threshold if self.rule.default is None else self.rule.default
        return replace(self, threshold=float(default))


@dataclass
class Buffers:
    """What the compiled steps read and write in place. L: cache length, M: speculate_k, V: vocabulary."""

    tokens: Tensor  # (L,) prompt and output so far
    pos: Tensor  # (1,) position of the last known token; never 0-dim, since indexing with that would sync
    drafted: Tensor  # (M,) draft tokens of this round
    draft_logits: Tensor  # (M, V), or (1, 1) when neither rule nor sampling needs them
    draft_hidden: Tensor  # (M, dim of the draft), or (1, 1) when the judge does not read it
    step: Tensor  # (1,) number of the next draft token; after the draft loop, how many there are this round
    flawed: Tensor  # (1,) whether the draft's logits were not finite this round
    uniforms: Tensor  # (2 M + 1,) random numbers of this round: drafting, accepting, the target's own token
    threshold: Tensor  # ()
    stop_ids: Tensor  # (n,)
    region: Tensor  # (1,) state of the markers' automaton after tokens[pos]

    def cut_to(self, m: int) -> "Buffers":
        """The same memory for a round of only m draft tokens."""
        cut = {name: getattr(self, name)[:m] for name in ("drafted", "draft_logits", "draft_hidden")}
        return replace(self, uniforms=self.uniforms[: 2 * m + 1], **cut)


# The steps; each compiles whole. visible: only its length counts, how much of the cache a step may look at;
# a tensor, so that one graph serves all lengths.


def plain_step(model: Transformer, b: Buffers, s: Settings, visible: Tensor) -> Tensor:
    """Decodes one token without a draft: reads tokens[pos], writes the next one; a packed Report."""
    _, logits = model(b.tokens[b.pos][None], b.pos, len(visible))
    own, peak = choose(logits[0], b.uniforms[:1], s, model)
    b.tokens[b.pos + 1] = own
    b.pos += 1

    none = torch.zeros_like(own)
    return Report(none, own, none[:0], none, not_finite(peak)).pack()


def draft_step(model: Transformer, b: Buffers, s: Settings, visible: Tensor, first: bool) -> None:
    """Writes drafted[step] (and its logits), advances `step`.

    The first step of a round reads two rows: when all draft tokens of the round before were accepted, the
    draft has not read the last one yet. At position 0 both rows are the same token, in the same place.
    """
    if first:
        b.step.zero_()
        b.flawed.zero_()
        pos = (b.pos + torch.arange(-1, 1, device=b.pos.device)).clamp(min=0)
        ids = b.tokens[pos]
    else:
        pos, ids = b.pos + b.step, b.drafted[b.step - 1]
    hidden, logits = model(ids[None], pos, len(visible), n_logits=1)
    logits = logits[0]

    if b.draft_logits.numel() > 1:
        logits = tp.whole(logits, model.speaks)
        b.draft_logits[b.step] = logits
    if b.draft_hidden.numel() > 1:
        b.draft_hidden[b.step] = hidden[0, -1:]

    b.drafted[b.step], peak = choose(logits, b.uniforms[b.step], s, model)
    b.flawed |= not_finite(peak)
    b.step += 1


def verify_step(
    model: Transformer, head: JudgeHead | None, b: Buffers, s: Settings, visible: Tensor,
    markers: Markers | None,
) -> Tensor:  # fmt: skip
    """One round's verification of the M draft tokens. Returns a packed Report.

    Row i of the logits predicts draft token i; row i + 1 of the hidden states is read at draft token i.
    """
    m, vocab_size = len(b.drafted), model.args.vocab_size
    index = torch.arange(m + 1, device=b.pos.device)

    # 1. Read tokens[pos] and the draft tokens in one pass
    ids = torch.cat([b.tokens[b.pos], b.drafted])
    hidden, logits = model(ids[None], b.pos + index, len(visible))
    logits = tp.whole(logits[0], vocab_size) if s.needs_probabilities else logits[0]  # (M + 1, V)
    most_likely, peaks = tp.most_likely(logits, vocab_size)  # (M + 1,)

    # 2. Score: the judge reads each draft token's own row
    scores = head.score(hidden[0, 1:], b.draft_hidden) if head is not None else None  # (M,)

    # 3. Test: would the target have said this, or does the rule call it right?
    allowed, regions = markers.walk(b.region, b.drafted) if markers is not None else (None, None)
    standard, p, q = standard_test(logits, most_likely, b, s, allowed)
    relaxed = relaxed_test(logits, scores, (p, q), b, s, allowed) if s.rule.knob else standard

    # 4. Accept the longest prefix of tokens that passed; of a short round only `step` tokens were drafted
    passed = (standard | relaxed) & (index[:-1] < b.step)
    accepted = passed.long().cumprod(0).sum(0, keepdim=True)  # (1,)
    if s.impose is not None:
        accepted = accepted.clamp(min(s.impose, m), min(s.impose, m))

    # 5. Correct: the target's own token where the prefix ends, or one more where all were accepted
    own = p[accepted] if s.temperature == 0 else pick(residual(p, q, accepted), b.uniforms[2 * m :])
    if s.temperature > 0 or s.rule.knob:  # else most likely tokens alone decide, which all ranks know
        accepted, own = tp.broadcast(accepted, own)
    committed = torch.where(index < accepted, torch.cat([b.drafted, own]), own)

    # 6. Commit: what is written beyond the new pos is written over by the next round
    b.tokens[b.pos + 1 + index] = committed
    b.pos += accepted + 1
    if markers is not None:
        b.region.copy_(markers.table[regions[accepted], own])

    # 7. Report
    score = torch.zeros_like(accepted)
    if scores is not None:
        unseen = (index[:-1] > accepted) | (index[:-1] >= b.step)
        score = (scores.masked_fill(unseen, 0).sum(0, keepdim=True) * 1e6).long()
    by_rule = (relaxed & ~standard).long()
    return Report(accepted, committed, by_rule, score, not_finite(peaks) + 2 * b.flawed).pack()


def standard_test(
    logits: Tensor, most_likely: Tensor, b: Buffers, s: Settings, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The standard test, bool (M,), and what the target's own token comes from: greedy, `most_likely` tokens
    (M + 1,); when sampling, p (M + 1, V) and q (M, V).

    A rule that mixes puts its mixture in the place of p, in allowed rows; the last row stays the target's.
    """
    m = len(b.drafted)
    if s.temperature == 0:
        standard = most_likely[:-1] == b.drafted  # the row before the token
        if not s.rule.mixes:
            return standard, most_likely, None
        p, q = logits.softmax(-1), b.draft_logits.softmax(-1)
    else:
        p, q = (s.distribution(x) for x in (logits, b.draft_logits))
        standard = accept_sampled(b.drafted, p[:-1], q, b.uniforms[m : 2 * m])

    if s.rule.mixes:
        mixed = mixture(p[:-1], q, b.threshold, s.min_prob)
        p = torch.cat([mixed if allowed is None else mixed.where(allowed[:, None], p[:-1]), p[-1:]])
    return standard, p.argmax(-1) if s.temperature == 0 else p, q


def relaxed_test(
    logits: Tensor, scores, pq: tuple, b: Buffers, s: Settings, allowed: Tensor | None
) -> Tensor:
    """What the rule accepts, bool (M,), where it is allowed to. pq: p and q of `standard_test`."""
    if s.rule.mixes and s.temperature > 0:
        (p, q), m = pq, len(b.drafted)
        return accept_sampled(b.drafted, p[:-1], q, b.uniforms[m : 2 * m])
    relaxed = rule_mask(
        s.verify, b.drafted, logits[:-1], b.draft_logits, scores, b.threshold,
        stop_ids=b.stop_ids, min_prob=s.min_prob,
    )  # fmt: skip
    return relaxed if allowed is None else relaxed & allowed


def choose(logits: Tensor, uniform: Tensor, s: Settings, model: Transformer) -> tuple[Tensor, Tensor]:
    """The next token (1,) and the largest logit (1,), from logits (1, V) or a rank's part of them."""
    if s.temperature == 0:
        return tp.most_likely(logits, model.speaks)
    logits = tp.whole(logits, model.speaks)
    token = pick(s.distribution(logits), uniform)
    return tp.broadcast(token)[0] if tp.divided(model) else token, logits.amax(-1)


def not_finite(peaks: Tensor) -> Tensor:
    """(1,): 1 if a row's largest logit, of peaks (T,), is NaN or infinite, as it is where any logit is."""
    return (~peaks.isfinite()).any().long()[None]


class NotFinite(InputError):
    """Logits were NaN or infinite: nothing that is decoded from them means anything."""


@dataclass
class Slot:
    """Host memory of a round in flight; two take turns, so that one may start before the last is read."""

    report: Tensor  # pinned on CUDA
    uniforms: Tensor
    event: torch.cuda.Event | None  # the report is there
    m: int = 0  # draft tokens that the verification has room for, 0 of a plain step
    drafts: int = 0  # of them made this round


class Engine:
    """A target (and a draft, and a judge) with buffers for sequences of up to `length` tokens.

    Engines over the same models share their caches and may take turns, the longest first.
    """

    def __init__(
        self, target: Transformer, draft: Transformer | None, head: JudgeHead | None, settings: Settings,
        stop_ids: list[int], length: int, markers: Markers | None = None,
    ):  # fmt: skip
        pair.check_settings(settings, draft is not None, head is not None)
        self.target, self.head, self.settings = target, head, settings.resolved(head)
        self.draft = None if settings.verify == "plain" else draft
        self.models = [model for model in (self.target, self.draft) if model is not None]
        pair.fit(target, self.draft)
        self.device = target.device
        self.overlap = self.device.type == "cuda"  # launch a round before the last one is read
        self.markers = markers.to(self.device) if markers is not None else None
        self.stop_ids, self.length = stop_ids, length
        self.generator = torch.Generator().manual_seed(0)
        self.result = Result(0)  # of the answer under way, or the last one
        self.context = pair.smallest_context(target.args, self.draft and self.draft.args)
        self.allocate()
        if settings.compile and self.device.type == "cpu":
            kernels.check_compiler()
            kernels.use_cpu_kernels()
        self.plain_step, self.draft_step = self.compiled(plain_step), self.compiled(draft_step)
        sizes = [m for m in SIZES if m <= settings.speculate_k] if settings.adaptive and self.draft else []
        self.use_sizes(tuple(sizes) or (settings.speculate_k,))

    def use_sizes(self, sizes: tuple[int, ...]) -> None:
        """Prepares verification for these M, none above speculate_k."""
        self.sizes, self.pace = sizes, Pace(sizes)
        self.verify_steps = {m: (self.compiled(verify_step), self.buffers.cut_to(m)) for m in sizes}
        self.graphs: dict[int, tuple[kernels.Graph, ...]] = {}  # by M; empty, or one for each of `sizes`

    def compiled(self, step: Callable) -> Callable:
        return compile_step(step, self.device.type, not tp.GROUP) if self.settings.compile else step

    def allocate(self) -> None:
        """Caches and buffers for `length` tokens, and for what rounds may write past them."""
        s, head, device, m = self.settings, self.head, self.device, self.settings.speculate_k
        self.capacity = capacity_for(self.length, m)
        for model in self.models:
            model.setup_caches(self.capacity)
        self.cache_epochs = [model.cache_epoch for model in self.models]
        self.ruler = torch.zeros(self.capacity, device=device)  # its slices are the steps' `visible`

        logits = hidden = torch.zeros(1, 1, device=device)
        if self.draft is not None and (s.temperature > 0 or "draft" in s.rule.reads):
            logits = torch.zeros(m, self.target.args.vocab_size, device=device)
        if self.draft is not None and head is not None and head.draft_weight is not None:
            hidden = torch.zeros(m, self.draft.args.dim, device=device, dtype=self.draft.dtype)
        numbers = partial(torch.zeros, dtype=torch.long, device=device)
        self.buffers = Buffers(
            tokens=numbers(self.capacity), pos=numbers(1), drafted=numbers(m), draft_logits=logits,
            draft_hidden=hidden, step=numbers(1), flawed=numbers(1), region=numbers(1),
            uniforms=torch.zeros(2 * m + 1, device=device),
            stop_ids=torch.tensor(self.stop_ids, dtype=torch.long, device=device),
            threshold=torch.tensor(s.threshold or 0.0, device=device),
        )  # fmt: skip
        cuda = device.type == "cuda"
        self.slots = []
        for _ in range(2):
            report = torch.zeros(2 * m + 4, dtype=torch.long, pin_memory=cuda)
            uniforms = torch.zeros(2 * m + 1, pin_memory=cuda)
            self.slots.append(Slot(report, uniforms, torch.cuda.Event() if cuda else None))

    def set_threshold(self, threshold: float | None) -> None:
        """Another threshold for the same rule; compiles nothing."""
        settings = replace(self.settings, threshold=threshold)
        pair.check_settings(settings, self.draft is not None, self.head is not None)
        self.settings = settings.resolved(self.head)
        self.buffers.threshold.fill_(self.settings.threshold or 0.0)

    def otherwise(self, verify: str) -> "Engine":
        """An engine on the same models with another rule, at its default; plain: without the draft."""
        s = replace(self.settings, verify=verify, threshold=None)
        if not s.rule.knob:
            s.relax_between, s.min_prob = None, 0.0
        if verify == "plain":
            s.adaptive = False
        draft, head = None if verify == "plain" else self.draft, None
        if "scores" in s.rule.reads:
            head = self.head
        markers = self.markers if s.relax_between else None
        return Engine(self.target, draft, head, s, self.stop_ids, self.length, markers)

    def without_draft(self) -> "Engine":
        """An engine on the same target that decodes plainly."""
        return self.otherwise("plain")

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Runs every step, which compiles it, captures the CUDA graphs, and measures what --speculate_k auto
        chooses by. Returns the seconds it took."""
        started = time.monotonic()
        # As few rows as a last pass may have: products of few rows are tuned for them, too
        self.prefill([0] * min(PAGE + 1, self.capacity))
        for m in self.sizes:
            for needed in (1, 1, self.capacity):  # again, and elsewhere: no step depends on where it stands
                self.buffers.pos.fill_(needed // 2)
                self.round(needed, m)

        if self.settings.compile and self.device.type == "cuda":
            pool, visible = torch.cuda.graph_pool_handle(), self.visible(self.capacity)
            for m in self.sizes:
                self.buffers.pos.fill_(1)
                self.graphs[m] = tuple(kernels.capture(step, pool) for step in self.steps(visible, m))
        if self.settings.adaptive:
            self.pace.measure(self.capacity, self.timed_round)
        return time.monotonic() - started

    @torch.inference_mode()
    def prefill(self, prompt: list[int], keep: int = 0) -> int:
        """Reads all of the prompt but its last token into the caches, in passes of PREFILL_ROWS, the last one
        padded; returns how many. keep: so many of its first tokens are there already, from the sequence
        before, of which whole pages are not read again."""
        if self.cache_epochs != [model.cache_epoch for model in self.models]:
            raise RuntimeError("Another engine has since made this model's caches longer; make a new engine.")
        b, last = self.buffers, len(prompt) - 1
        b.tokens.zero_()
        b.tokens[: len(prompt)] = torch.tensor(prompt)

        start = kept = min(keep, last) // PAGE * PAGE
        while start < last:
            end = min(start + PREFILL_ROWS[self.device.type], whole_pages(last))
            pos = torch.arange(start, end, device=self.device)
            for model in self.models:
                model(b.tokens[None, start:end], pos, end, n_logits=0, prefill=True)
            start = end
        b.pos.fill_(last)
        if self.markers is not None:
            b.region.fill_(self.markers.after(prompt))
        return last - kept

    def visible(self, needed: int) -> Tensor:
        """A tensor as long as the part of the cache that a step looks at, which must hold `needed` positions.

        On a GPU that is all: the kernel there finds on the device how far to read.
        """
        if self.device.type == "cuda":
            return self.ruler
        visible = self.ruler[: whole_pages(needed)]
        if self.settings.compile and self.capacity > PAGE:  # else there is only one length
            torch._dynamo.mark_dynamic(visible, 0)
        return visible

    def steps(self, visible: Tensor, m: int, drafts: int = 0) -> list[Callable]:
        """What a round launches, in order: the draft loop (of `drafts` tokens, default m) and the
        verification of m, or the plain step. The last one reports."""
        b, s = self.buffers, self.settings
        if self.draft is None:
            return [lambda: self.plain_step(self.target, b, s, visible)]
        verify, part = self.verify_steps[m]

        def draft() -> None:
            for i in range(drafts or m):
                self.draft_step(self.draft, b, s, visible, i == 0)
            if tp.GROUP and not tp.divided(self.draft):  # each rank drafts by itself: rank 0's count
                part.drafted[:], b.flawed[:] = tp.broadcast(part.drafted, b.flawed)

        return [draft, lambda: verify(self.target, self.head, part, s, visible, self.markers)]

    @torch.inference_mode()
    def launch(self, needed: int, m: int = 0, most: int = 0) -> Slot:
        """Starts a round of m draft tokens (default speculate_k), or of the `most` that can still be used,
        which may look at positions below `needed`; waits for nothing. A captured draft loop makes all m."""
        b, m = self.buffers, m or self.settings.speculate_k
        drafts = m if self.graphs or not most else min(m, most)
        slot = self.slots[0]
        self.slots.reverse()
        slot.m, slot.drafts = (m, drafts) if self.draft is not None else (0, 0)
        if self.settings.temperature > 0:
            slot.uniforms.copy_(torch.rand(slot.uniforms.shape, generator=self.generator))
            b.uniforms.copy_(slot.uniforms, non_blocking=True)

        if self.graphs:
            for captured in self.graphs[m]:
                captured.graph.replay()
            report = captured.output
        else:
            for step in self.steps(self.visible(needed), m, drafts):
                report = step()

        slot.report[: len(report)].copy_(report, non_blocking=True)
        if slot.event is not None:
            slot.event.record()
        return slot

    def collect(self, slot: Slot) -> Round:
        """Waits for a launched round; the host's only read of it."""
        if slot.event is not None:
            slot.event.synchronize()
        report = Report.unpack(slot.report[: 2 * slot.m + 4].tolist())
        return Round.of(report, slot.drafts, self.head is not None)

    def round(self, needed: int, m: int = 0) -> Round:
        """One round, launched and read."""
        return self.collect(self.launch(needed, m))

    def timed_round(self, length: int, m: int) -> float:
        """Seconds of a round of m draft tokens that ends at position `length`."""
        self.buffers.pos.fill_(max(0, length - m - 2))
        began = time.monotonic()
        self.round(length, m)
        return time.monotonic() - began

    def launch_for(self, needed: int, left: int) -> Slot:
        """Starts a round that looks at positions below `needed`, when `left` tokens are still to come."""
        most = left + self.settings.rule.ahead
        return self.launch(needed, self.pace.choose(needed, most), most)

    def stream(
        self, prompt: list[int], max_new_tokens: int, result: Result | None = None, keep: int = 0
    ) -> Iterator[tuple[int, str]]:
        """Decodes after `prompt`, yields (token, origin) as rounds commit them, and fills `result`.

        Stops exactly after the first stop token or max_new_tokens. keep: as in `prefill`. With `overlap` a
        round is under way before the last one is read; one that lies past the end is thrown away.
        """
        pair.check_prompt(prompt, max_new_tokens, self.length, *self.context)
        result = self.result = result or Result(len(prompt))
        if self.settings.adaptive and not self.pace.seconds:
            self.warm_up()
        started = time.monotonic()
        result.prefilled = self.prefill(prompt, keep)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        result.seconds_prefill, began = time.monotonic() - started, time.monotonic()

        pos, rows, in_flight = len(prompt) - 1, self.settings.speculate_k + 1, None  # rows: M + 1
        while len(result.tokens) < max_new_tokens and result.stop_reason == "length":
            left = max_new_tokens - len(result.tokens)
            current = in_flight or self.launch_for(pos + rows, left)
            more = self.overlap and left > 1  # this round gives at least one token
            in_flight = self.launch_for(pos + 2 * rows, left - 1) if more else None

            got = self.collect(current)
            if got.flawed:
                self.stop_at_not_finite(got.flawed, prompt + result.tokens)
            if self.settings.check_ranks:
                check_round(pos, got.accepted, got.tokens)
            pos += len(got.tokens)
            result.seconds_decode = time.monotonic() - began
            fresh = result.add(got, max_new_tokens, self.stop_ids)
            self.pace.learn(got.drafted, min(got.accepted, len(fresh)))  # beyond the end nothing is gained
            yield from fresh

    def stop_at_not_finite(self, flawed: int, ids: list[int]) -> None:
        """Raises NotFinite. The caches are cleared, since a NaN there outlives every mask."""
        role, model = ("target", self.target) if flawed & 1 else ("draft", self.draft)
        where = "--debug_numerics says where that begins"
        if self.settings.debug_numerics:
            where = first_not_finite(model, ids)
        advice = "its weights may be damaged or not made for this type"
        if model.dtype == torch.float16:
            advice = "fp16 ends at 65504, --precision bf16 and fp32 do not"

        for each in self.models:
            each.clear_caches()
        raise NotFinite(
            f"The {role}'s logits are not finite (NaN or infinite) after {len(ids)} tokens, "
            f"in {kind_of(model)}; {where} ({advice})."
        )

    def generate(self, prompt: list[int], max_new_tokens: int, seed: int = 0, keep: int = 0) -> Result:
        """Decodes one sample after `prompt` (ids, begin-of-text included). keep: as in `prefill`."""
        self.generator.manual_seed(seed % 2**63)
        for _ in self.stream(prompt, max_new_tokens, keep=keep):
            pass
        return self.result


def capacity_for(length: int, speculate_k: int) -> int:
    """Positions that caches and buffers hold for sequences of `length` tokens: whole pages, with room for the
    drafts of two rounds past the end, since one may be under way when the end is found."""
    return whole_pages(length + 2 * (speculate_k + 1))


# The command line


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; flags that a script lacks take their defaults.

    M is at most what an answer can use: --max_new_tokens, and what the rule looks at beyond.
    """
    given = {name: getattr(args, name) for name in ("check_ranks", "debug_numerics") if name in args}
    s = Settings(args.verify, args.threshold, temperature=args.temperature, **given)
    s.top_k, s.top_p, s.min_p = filters_of(args)
    s.compile, s.min_prob, s.adaptive = args.compile, args.min_prob, args.speculate_k == "auto"
    if getattr(args, "relax_between", None):
        s.relax_between = tuple(args.relax_between)
    budget = (getattr(args, "max_new_tokens", None) or 1 << 30) + s.rule.ahead
    s.speculate_k = min(max(SIZES) if s.adaptive else args.speculate_k, budget)
    return s


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for a command line that cannot run, before anything is loaded."""
    take_sampling(args)
    take_calibration(args)
    settings = settings_of(args)
    pair.check_settings(settings, bool(args.draft_checkpoint_path), bool(args.judge_path))
    if args.judge_path and not args.draft_checkpoint_path:
        raise InputError("--judge_path needs a draft; name one with --draft_checkpoint_path.")
    if args.min_prob and not settings.rule.knob:
        raise InputError(
            f"--min_prob is a floor under a rule, but --verify {args.verify} has none; leave it out."
        )
    if args.interactive and (args.json or args.profile or args.prompt is not None or args.num_samples != 1):
        raise InputError("--interactive goes without --json, --profile, --prompt and --num_samples.")
    if args.profile:
        check_writable(args.profile, "--profile")
    if args.verify == "plain":
        args.draft_checkpoint_path = None
    if "scores" not in settings.rule.reads:
        args.judge_path = None


def load_engine(args: argparse.Namespace, prompt: list[int], tokenizer: Tokenizer) -> Engine:
    """Loads what the command line names and builds the engine for this prompt (none: for a conversation)."""
    settings, device = settings_of(args), pick_device(own_device(args.device))
    tp.connect(device, args.all_reduce)
    kernels.use_pdl(args.pdl, device)
    folders = args.checkpoint_path, args.draft_checkpoint_path
    target, draft = (folder and open_checkpoint(folder) for folder in folders)
    shape = target.args
    pair.check_tokenizer(tokenizer, shape, args.checkpoint_path)

    if args.interactive:
        length = args.cache_length or min(shape.max_position, 8192)
    else:
        length = args.cache_length or len(prompt) + args.max_new_tokens
        context, whose = pair.smallest_context(shape, draft and draft.args)
        pair.check_prompt(prompt, args.max_new_tokens, args.cache_length or context, context, whose)
    models = pair.load_pair(
        target, draft, args.judge_path, device, run_dtype(args.precision, device), draft_tp=args.draft_tp,
        capacity=capacity_for(length, settings.speculate_k), speculate_k=settings.speculate_k,
        schemes=pair.schemes_of(args),
    )  # fmt: skip
    markers = make_markers(settings.relax_between, tokenizer, shape.vocab_size)
    return Engine(*models, settings, tokenizer.stop_ids, length, markers)


def run(args: argparse.Namespace) -> None:
    """From a parsed command line to the output: the answer on standard output, all else on standard error."""
    check_flags(args)
    check_args(args)
    tokenizer = load_tokenizer(args.checkpoint_path)
    if args.chat:
        tokenizer.check_chat()
    prompt = [] if args.interactive else read_prompt(args, tokenizer)
    engine = load_engine(args, prompt, tokenizer)

    drift = introduce(args, engine)
    if args.compile:
        print(f"compiled and warmed up in {engine.warm_up():.1f} s", file=sys.stderr)
    if args.interactive:
        chat_loop(args, engine, tokenizer, drift)
    else:
        print_answers(args, engine, tokenizer, prompt, drift)


def main(argv: list[str] | None = None) -> None:
    with tp.ranks("generate.py"):
        run_script("generate.py", lambda: run(parse_args(argv, __doc__)))


if __name__ == "__main__":
    main()
