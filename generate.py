"""The engine: prefill, draft, verify, the round loop; and the command line.

    python generate.py                                    # the demo pair, with its judge, on a demo problem
    python generate.py --checkpoint_path META-LLAMA-70B --draft_checkpoint_path META-LLAMA-8B --judge_path J
    --chat

One round: the draft proposes M tokens; the target reads them in one pass of M + 1 rows; one compiled graph
computes logits, judge scores, the rule, how many tokens are accepted, the target's own next token, and
commits; the host reads one small tensor. Nothing in the KV caches is rolled back: `pos` decides what is
visible.
"""

from cli import InputError, Parser, run_script, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import kernels
import tp
from checkpoint import DEMO
from files import check_writable, write_file
from judge import RULES, JudgeHead, Markers, check_threshold, make_markers, mixture, rule_mask
from kernels import Graph, capture, check_compiler, compile_step
from model import (
    DTYPES,
    PAGE,
    PREFILL_ROWS,
    ModelArgs,
    Transformer,
    first_not_finite,
    pick_device,
    run_dtype,
    whole_pages,
)
from quantize import Checkpoint, add_mode_flags, memory_line, open_checkpoint, scheme_of
from scripts.lib.flags import MOST_TOKENS, read_k
from scripts.lib.guarantee import Drift, announce, kind_of, read_calibration, warn_of_drift
from scripts.lib.pace import Pace
from scripts.lib.pair import load_pair
from scripts.lib.terminal import (
    Paint,
    answer_text,
    as_json,
    chat_loop,
    name_of,
    paint_tokens,
    read_prompt,
    summary,
)
from tokenizer import Tokenizer, load_tokenizer

DEMO_PROMPT = "Mia has 47 apples. She buys 38. She multiplies it by 3. She sells 79. How many apples now?"
DEMO_FORMS = (
    'the demo pair knows only problems of the forms "Mia has 47 apples. She buys 38. She multiplies it by 3. '
    "She sells 79. How "
    'many apples now?" (3 or 4 steps; numbers from 11 to 99, times 2 to 6) and "The list is [5,17,23,8]. '
    "Sort it. Drop the "
    'first. Add 4 to each. What is the largest?" (4 or 5 numbers, 2 or 3 steps); it answers everything else, '
    "and wrong."
)
SIZES = (4, 6, 8, 12, 16, 24, 32)  # what --speculate_k auto chooses from
TINY = 1e-20


@dataclass
class Settings:
    """How to decode. `threshold` None takes the judge's own or the rule's default; temperature 0 is
    greedy."""

    verify: str = "judge"
    threshold: float | None = None
    speculate_k: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    compile: bool = False
    min_prob: float = 0.0  # no rule accepts a token that the target gives less
    adaptive: bool = False  # choose each round's M from SIZES; speculate_k is then the largest
    relax_between: tuple[str, str] | None = (
        None  # the rule applies only between these texts, `standard` elsewhere
    )
    impose: int | None = None  # for benchmarks: accept so many draft tokens a round, whatever they are
    check_ranks: bool = False  # compare tokens and positions of all ranks every round
    debug_numerics: bool = False  # where logits are not finite, say where that begins

    @property
    def needs_probabilities(self) -> bool:
        """Whether more than the most likely token counts, so that ranks must gather the target's logits."""
        return self.temperature > 0 or self.min_prob > 0 or self.verify not in ("plain", "standard", "judge")


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

    def first(self, m: int) -> "Buffers":
        """The same memory for a round of only m draft tokens."""
        cut = {name: getattr(self, name)[:m] for name in ("drafted", "draft_logits", "draft_hidden")}
        return replace(self, uniforms=self.uniforms[: 2 * m + 1], **cut)


@dataclass
class Round:
    """What one round put out. by_rule[i]: draft token i passed by the rule alone; the last token is the
    target's. score: the sum of the judge's scores of the accepted tokens and the first rejected one, which
    are `scored`. flawed: whether the logits were not finite, + 1 the target's, + 2 the draft's."""

    tokens: list[int]
    accepted: int
    by_rule: list[bool]
    drafted: int = 0
    score: float = 0.0
    scored: int = 0
    flawed: int = 0


class NotFinite(InputError):
    """Logits were NaN or infinite: nothing that is decoded from them means anything."""


@dataclass
class Result:
    """A finished sample. origin: one letter a token, a(ccepted), r(ule alone), t(arget's own), b(onus)."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)
    stop_reason: str = "length"
    rounds: int = 0
    drafted: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    score: float = 0.0
    scored: int = 0

    @property
    def mean_score(self) -> float | None:
        """The judge's mean score over the draft tokens that were looked at, None without a judge."""
        return self.score / self.scored if self.scored else None

    @property
    def accepted(self) -> int:
        return sum(letter in "ar" for letter in self.origin)

    @property
    def accepted_by_rule(self) -> int:
        return self.origin.count("r")

    @property
    def mean_accepted(self) -> float:
        """m*: draft tokens accepted a round, without the target's own token."""
        return self.accepted / self.rounds if self.rounds and self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds_decode if self.seconds_decode else 0.0


def distribution(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Probabilities to sample from, fp32 (..., V): temperature first, then the top_k most likely,
    renormalised."""
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -float("inf"))
    return logits.softmax(-1)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Samples an index of the last dimension in proportion to weights (..., V) by inverting the sum; uniform
    (...)."""
    total = weights.double().cumsum(-1)
    return (total <= (uniform.double() * total[..., -1])[..., None]).sum(-1).clamp(max=weights.shape[-1] - 1)


def plain_step(model: Transformer, b: Buffers, s: Settings, visible: Tensor) -> Tensor:
    """One token: reads tokens[pos], writes tokens[pos + 1], advances. Returns (2,): the token, and whether
    the logits were not finite.

    visible: only its length counts, how much of the cache the step may look at; a tensor, so that one graph
    serves all.
    """
    _, logits = model(b.tokens[b.pos][None], b.pos, len(visible))
    token, peak = choose(logits[0], b.uniforms[:1], s, model.args.vocab_size)
    b.tokens[b.pos + 1] = token
    b.pos += 1
    return torch.cat([token, not_finite(peak)])


def choose(logits: Tensor, uniform: Tensor, s: Settings, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The next token (1,) from logits (1, V), or a rank's part of them: the most likely one, or a sample; and
    the largest logit (1,)."""
    if s.temperature == 0:
        return tp.most_likely(logits, vocab_size)
    logits = tp.whole(logits, vocab_size)
    return pick(distribution(logits, s.temperature, s.top_k), uniform), logits.amax(-1)


def not_finite(peaks: Tensor) -> Tensor:
    """(1,): 1 where a row's largest logit is NaN or infinite, as it is if any of its logits is NaN or +inf. A
    NaN or an infinity anywhere in a model reaches the logits as NaN. peaks: (T,)."""
    return (~peaks.isfinite()).any().long()[None]


def draft_step(model: Transformer, b: Buffers, s: Settings, visible: Tensor, first: bool) -> None:
    """Writes drafted[step] (and its logits), advances `step`.

    The first step of a round reads two rows: when all draft tokens of the round before were accepted, the
    draft has not read the last one yet. At position 0 both rows are the same token, written to the same
    place.
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
        logits = tp.whole(logits, model.args.vocab_size)
        b.draft_logits[b.step] = logits
    if b.draft_hidden.numel() > 1:
        b.draft_hidden[b.step] = hidden[0, -1:]
    b.drafted[b.step], peak = choose(logits, b.uniforms[b.step], s, model.args.vocab_size)
    b.flawed |= not_finite(peak)
    b.step += 1


def verify_step(
    model: Transformer,
    head: JudgeHead | None,
    b: Buffers,
    s: Settings,
    visible: Tensor,
    markers: Markers | None,
) -> Tensor:
    """Reads tokens[pos] and the M draft tokens in one pass, accepts a prefix, commits it and the target's
    next token.

    Returns int64 (2 M + 4,), all that the host needs: how many were accepted; the M + 1 tokens committed
    (those past the accepted ones and the target's own are padding); for each draft token whether the rule
    alone let it through; the sum of the judge's scores (in millionths) of the accepted tokens and the first
    rejected one; whether the logits were not finite (+ 1 the target's, + 2 the draft's). Of a short round
    only the `step` tokens that were drafted can pass.
    """
    m = len(b.drafted)
    ids = torch.cat([b.tokens[b.pos], b.drafted])
    hidden, logits = model(ids[None], b.pos + torch.arange(m + 1, device=ids.device), len(visible))
    logits, allowed, regions = logits[0], None, None
    if s.needs_probabilities:
        logits = tp.whole(logits, model.args.vocab_size)
    scores = (
        head.score(hidden[0, 1:], b.draft_hidden) if head is not None else None
    )  # the judge reads the token's own row
    if markers is not None:
        allowed, regions = markers.walk(b.region, b.drafted)
    most_likely, peaks = tp.most_likely(logits, model.args.vocab_size)
    standard, p, q = standard_test(logits, most_likely, b, s, allowed)
    if s.verify == "standard":
        relaxed = standard
    elif s.verify == "ensemble" and s.temperature > 0:
        relaxed = accept_sampled(
            b.drafted, p[:-1], q, b.uniforms[m : 2 * m]
        )  # p is the mixture where that is allowed
    else:
        relaxed = rule_mask(
            s.verify, b.drafted, logits[:-1], b.draft_logits, scores, b.threshold, b.stop_ids, s.min_prob
        )
        relaxed = relaxed if allowed is None else relaxed & allowed
    index = torch.arange(m + 1, device=ids.device)
    passed = (standard | relaxed) & (index[:-1] < b.step)
    accepted = passed.long().cumprod(0).sum(0, keepdim=True)  # (1,)
    if s.impose is not None:
        accepted = accepted.clamp(min(s.impose, m), min(s.impose, m))
    own = p[accepted] if s.temperature == 0 else pick(residual(p, q, accepted), b.uniforms[2 * m :])
    committed = torch.where(index < accepted, torch.cat([b.drafted, own]), own)
    b.tokens[b.pos + 1 + index] = committed
    b.pos += accepted + 1
    if markers is not None:
        b.region.copy_(markers.table[regions[accepted], own])
    score = torch.zeros_like(accepted)
    if scores is not None:
        unseen = (index[:-1] > accepted) | (index[:-1] >= b.step)
        score = (scores.masked_fill(unseen, 0).sum(0, keepdim=True) * 1e6).long()
    return torch.cat(
        [accepted, committed, (relaxed & ~standard).long(), score, not_finite(peaks) + 2 * b.flawed]
    )


def standard_test(
    logits: Tensor, most_likely: Tensor, b: Buffers, s: Settings, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The standard test, bool (M,), and what the target's own token comes from: greedy, `most_likely` tokens
    (M + 1,); when sampling, p (M + 1, V) and q (M, V).

    `ensemble` puts its mixture in the place of p, in allowed rows; the last row stays the target's.
    """
    m, ensemble = len(b.drafted), s.verify == "ensemble"
    if s.temperature == 0:
        standard = most_likely[:-1] == b.drafted  # the row before the token
        if not ensemble:
            return standard, most_likely, None
        p, q = logits.softmax(-1), b.draft_logits.softmax(-1)
    else:
        p, q = (distribution(x, s.temperature, s.top_k) for x in (logits, b.draft_logits))
        standard = accept_sampled(b.drafted, p[:-1], q, b.uniforms[m : 2 * m])
    if ensemble:
        mixed = mixture(p[:-1], q, b.threshold, s.min_prob)
        p = torch.cat([mixed if allowed is None else mixed.where(allowed[:, None], p[:-1]), p[-1:]])
    return standard, p.argmax(-1) if s.temperature == 0 else p, q


def accept_sampled(drafted: Tensor, p: Tensor, q: Tensor, uniforms: Tensor) -> Tensor:
    """Rejection sampling's test, bool (M,): u < p(d) / q(d) (arXiv 2211.17192). p, q: (M, V)."""
    own_p, own_q = (probs.gather(-1, drafted[:, None]).squeeze(-1) for probs in (p, q))
    return uniforms * own_q < own_p


def residual(p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
    """Weights (1, V) of the target's own token: max(p - q, 0) at the first rejection, p after full
    acceptance.

    p: (M + 1, V), q: (M, V), accepted: (1,). Where p equals q nothing is rejected but by rounding; p stands
    in then.
    """
    rest = (p[accepted] - torch.cat([q, torch.zeros_like(q[:1])])[accepted]).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > TINY, rest, p[accepted])


@dataclass
class Slot:
    """Host memory of a round in flight; two take turns, so that a round may be launched before the last one
    is read."""

    report: Tensor  # pinned on CUDA
    uniforms: Tensor
    event: torch.cuda.Event | None  # the report is there
    m: int = 0  # draft tokens that the verification has room for, 0 of a plain step
    drafts: int = 0  # of them made this round


class Engine:
    """A target (and a draft, and a judge) with buffers for sequences of up to `length` tokens, prompt
    included.

    Engines over the same models share their caches and may take turns, the longest first.
    """

    def __init__(
        self, target: Transformer, draft: Transformer | None, head: JudgeHead | None, settings: Settings, stop_ids: list[int],
        length: int, markers: Markers | None = None,
    ):  # fmt: skip
        check_settings(settings, draft is not None, head is not None)
        self.target, self.head, self.settings = (
            target,
            head,
            replace(settings, threshold=threshold_of(settings, head)),
        )
        self.draft = None if settings.verify == "plain" else draft
        self.ahead = RULES[settings.verify].ahead if settings.verify in RULES else 0
        self.device = target.device
        self.overlap = self.device.type == "cuda"  # launch a round before the last one is read
        self.markers = markers.to(self.device) if markers is not None else None
        self.stop_ids = stop_ids
        self.generator = torch.Generator().manual_seed(0)
        self.length = length
        self.result = Result(0)  # of the answer under way, or the last one
        self.context = smallest_context(target.args, self.draft and self.draft.args)
        self.allocate()
        if settings.compile and self.device.type == "cpu":
            check_compiler()
            kernels.use_cpu_kernels()
        self.plain_step, self.draft_step = self.compiled(plain_step), self.compiled(draft_step)
        sizes = (
            tuple(m for m in SIZES if m <= settings.speculate_k)
            if settings.adaptive and self.draft is not None
            else ()
        )
        self.use_sizes(sizes or (settings.speculate_k,))

    def use_sizes(self, sizes: tuple[int, ...]) -> None:
        """Prepares verification for these M, none above speculate_k."""
        self.sizes, self.pace = sizes, Pace(sizes)
        self.verify_steps = {m: (self.compiled(verify_step), self.buffers.first(m)) for m in sizes}
        self.graphs: dict[int, tuple[Graph, ...]] = {}  # by M; empty, or one for each of `sizes`

    def compiled(self, step: Callable) -> Callable:
        if not self.settings.compile:
            return step
        if tp.GROUP:
            tp.own_compile_cache()
        return compile_step(step, self.device.type, not tp.GROUP)

    def allocate(self) -> None:
        """Caches and buffers for `length` tokens, and for what rounds may write past them."""
        s, device = self.settings, self.device
        self.capacity = capacity = capacity_for(self.length, s.speculate_k)
        for model in (self.target, self.draft):
            if model is not None:
                model.setup_caches(capacity)
        self.cache_epochs = [model.cache_epoch for model in (self.target, self.draft) if model is not None]
        keep_logits = self.draft is not None and (s.temperature > 0 or RULES[s.verify].needs_draft_logits)
        shape = (s.speculate_k, self.target.args.vocab_size) if keep_logits else (1, 1)
        keep_hidden = self.draft is not None and self.head is not None and self.head.draft_weight is not None
        hidden = (s.speculate_k, self.draft.args.dim) if keep_hidden else (1, 1)
        long = {"dtype": torch.long, "device": device}
        self.buffers = Buffers(
            tokens=torch.zeros(capacity, **long), pos=torch.zeros(1, **long),
            drafted=torch.zeros(s.speculate_k, **long), draft_logits=torch.zeros(shape, device=device),
            draft_hidden=torch.zeros(hidden, device=device, dtype=self.draft.dtype if keep_hidden else None),
            step=torch.zeros(1, **long), flawed=torch.zeros(1, **long),
            uniforms=torch.zeros(2 * s.speculate_k + 1, device=device),
            threshold=torch.tensor(s.threshold or 0.0, device=device),
            stop_ids=torch.tensor(self.stop_ids, **long), region=torch.zeros(1, **long),
        )  # fmt: skip
        self.ruler = torch.zeros(
            capacity, device=device
        )  # its slices say how much of the cache a step may look at
        cuda = device.type == "cuda"
        size = 2 * s.speculate_k + 1
        self.slots = [
            Slot(torch.zeros(size + 3, dtype=torch.long, pin_memory=cuda), torch.zeros(size, pin_memory=cuda),
                 torch.cuda.Event() if cuda else None)
            for _ in range(2)
        ]  # fmt: skip

    def set_threshold(self, threshold: float | None) -> None:
        """Another threshold for the same rule; compiles nothing."""
        settings = replace(self.settings, threshold=threshold)
        check_settings(settings, self.draft is not None, self.head is not None)
        self.settings = replace(settings, threshold=threshold_of(settings, self.head))
        self.buffers.threshold.fill_(self.settings.threshold or 0.0)

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Runs every step, which compiles it, captures the CUDA graphs, and measures what --speculate_k auto
        chooses by. Returns the seconds it took."""
        started = time.monotonic()
        # As few rows as a last pass may have: products of few rows are tuned for them, too
        self.prefill([0] * min(PAGE + 1, self.capacity))
        for m in self.sizes:
            for needed in (
                1,
                1,
                self.capacity,
            ):  # again, and elsewhere: no step may depend on where it stands
                self.buffers.pos.fill_(needed // 2)
                self.round(needed, m)
        if self.settings.compile and self.device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            for m in self.sizes:
                self.buffers.pos.fill_(1)
                self.graphs[m] = tuple(
                    capture(step, pool) for step in self.steps(self.visible(self.capacity), m)
                )
        if self.settings.adaptive:
            for length in self.pace.lengths(self.capacity):
                self.measure(length)
        return time.monotonic() - started

    def measure(self, length: int, repeats: int = 9) -> None:
        """Tells `pace` the median seconds of a round for each size; the sizes take turns, as other work comes
        and goes."""
        seconds = {m: [] for m in self.sizes}
        for m in self.sizes * repeats:
            self.buffers.pos.fill_(max(0, length - m - 2))
            began = time.monotonic()
            self.round(length, m)
            seconds[m].append(time.monotonic() - began)
        medians = [sorted(found)[repeats // 2] for found in seconds.values()]
        self.pace.seconds |= {(length, m): found for m, found in zip(seconds, tp.first(lambda: medians))}

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def prefill(self, prompt: list[int], keep: int = 0) -> None:
        """Reads all of the prompt but its last token into the caches, in passes of PREFILL_ROWS, the last one
        padded.

        keep: so many of its first tokens are there already, from the sequence before.
        """
        if self.cache_epochs != [
            model.cache_epoch for model in (self.target, self.draft) if model is not None
        ]:
            raise RuntimeError("Another engine has since made this model's caches longer; make a new engine.")
        b, count = self.buffers, len(prompt) - 1
        b.tokens.zero_()
        b.tokens[: len(prompt)] = torch.tensor(prompt)
        start = min(keep, count) // PAGE * PAGE
        while start < count:
            end = min(start + PREFILL_ROWS[self.device.type], whole_pages(count))
            for model in (self.target, self.draft):
                if model is not None:
                    pos = torch.arange(start, end, device=b.tokens.device)
                    model(b.tokens[None, start:end], pos, end, n_logits=0, prefill=True)
            start = end
        b.pos.fill_(count)
        if self.markers is not None:
            b.region.fill_(self.markers.after(prompt))

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

    def steps(self, visible: Tensor, m: int, drafts: int = 0) -> list:
        """What a round launches, in order: the draft loop (of `drafts` tokens, default m) and the
        verification of m, or the plain step. The last one reports."""
        b, s = self.buffers, self.settings
        if self.draft is None:
            return [lambda: self.plain_step(self.target, b, s, visible)]

        def draft() -> None:
            for i in range(drafts or m):
                self.draft_step(self.draft, b, s, visible, i == 0)

        verify, part = self.verify_steps[m]
        return [draft, lambda: verify(self.target, self.head, part, s, visible, self.markers)]

    @torch.inference_mode()
    def launch(self, needed: int, m: int = 0, most: int = 0) -> Slot:
        """Starts a round of m draft tokens (default speculate_k), or only of the `most` that can still be
        used, which may look at positions below `needed`; waits for nothing. A captured draft loop always
        makes m."""
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
        report, m = slot.report.tolist(), slot.m
        if m == 0:
            return Round(report[:1], 0, [], flawed=report[1])
        accepted, by_rule = report[0], [bool(x) for x in report[m + 2 : m + 2 + report[0]]]
        scored = min(accepted + 1, slot.drafts) if self.head is not None else 0
        score, flawed = report[2 * m + 2] / 1e6, report[2 * m + 3]
        return Round(report[1 : accepted + 2], accepted, by_rule, slot.drafts, score, scored, flawed)

    def round(self, needed: int, m: int = 0) -> Round:
        """One round, launched and read."""
        return self.collect(self.launch(needed, m))

    def stream(
        self, prompt: list[int], max_new_tokens: int, result: Result | None = None, keep: int = 0
    ) -> Iterator[tuple[int, str]]:
        """Decodes after `prompt`, yields (token, origin) as rounds commit them, and fills `result`.

        Stops exactly at the first stop token (which is put out) or after max_new_tokens. keep: as in
        `prefill`. With `overlap` a round is under way before the last one is read; one that lies past the end
        is thrown away.
        """
        check_prompt(prompt, max_new_tokens, self.length, *self.context)
        result = self.result = result or Result(len(prompt))
        if self.settings.adaptive and not self.pace.seconds:
            self.warm_up()
        started = time.monotonic()
        self.prefill(prompt, keep)
        self.sync()
        result.seconds_prefill, began = time.monotonic() - started, time.monotonic()
        pos, rows, ahead = len(prompt) - 1, self.settings.speculate_k + 1, None
        while len(result.tokens) < max_new_tokens and result.stop_reason == "length":
            left = max_new_tokens - len(result.tokens)
            current = ahead or self.launch(pos + rows, *self.size_of_round(pos + rows, left))
            another = self.overlap and left > 1  # this round gives at least one token
            ahead = (
                self.launch(pos + 2 * rows, *self.size_of_round(pos + 2 * rows, left - 1))
                if another
                else None
            )
            got = self.collect(current)
            if got.flawed:
                self.stop_at_not_finite(got.flawed, prompt + result.tokens)
            if self.settings.check_ranks:
                tp.check_round(pos, got.accepted, got.tokens)
            pos += len(got.tokens)
            result.seconds_decode = time.monotonic() - began
            fresh = self.count(got, result, max_new_tokens)
            yield from fresh

    def size_of_round(self, needed: int, left: int) -> tuple[int, int]:
        """M of a round that looks at positions below `needed`, and how many draft tokens can be used, of
        `left` to come."""
        most = left + self.ahead
        return self.pace.choose(needed, most), most

    def stop_at_not_finite(self, flawed: int, ids: list[int]) -> None:
        """Raises NotFinite. The caches are cleared, since a NaN there outlives every mask."""
        role, model = ("target", self.target) if flawed & 1 else ("draft", self.draft)
        text = f"The {role}'s logits are not finite (NaN or infinite) after {len(ids)} tokens, in {kind_of(model)}"
        if self.settings.debug_numerics:
            text += f"; {first_not_finite(model, ids)}"
        else:
            text += "; --debug_numerics says where that begins"
        for each in (self.target, self.draft):
            if each is not None:
                each.clear_caches()
        advice = "its weights may be damaged or not made for this type"
        if model.dtype == torch.float16:
            advice = "fp16 ends at 65504, --precision bf16 and fp32 do not"
        raise NotFinite(f"{text} ({advice}).")

    def count(self, got: Round, result: Result, max_new_tokens: int) -> list[tuple[int, str]]:
        """Adds a round to `result`; returns its tokens up to the end, with their origin."""
        result.rounds += 1
        result.drafted += got.drafted
        result.score, result.scored = result.score + got.score, result.scored + got.scored
        letters = ["r" if by_rule else "a" for by_rule in got.by_rule]
        letters.append("b" if got.drafted == got.accepted > 0 else "t")
        fresh = list(zip(got.tokens, letters))[: max_new_tokens - len(result.tokens)]
        for at, (token, _) in enumerate(fresh):
            if token in self.stop_ids:
                fresh, result.stop_reason = fresh[: at + 1], "stop"
                break
        self.pace.learn(got.drafted, min(got.accepted, len(fresh)))  # what lies past the end is worth nothing
        result.tokens += [token for token, _ in fresh]
        result.origin += [letter for _, letter in fresh]
        return fresh

    def generate(self, prompt: list[int], max_new_tokens: int, seed: int = 0, keep: int = 0) -> Result:
        """Decodes one sample after `prompt` (ids, begin-of-text included). keep: as in `prefill`."""
        self.generator.manual_seed(seed % 2**63)
        result = Result(len(prompt))
        for _ in self.stream(prompt, max_new_tokens, result, keep):
            pass
        return result


def capacity_for(length: int, speculate_k: int) -> int:
    """Positions that caches and buffers hold for sequences of `length` tokens: whole WINDOWs, with room for
    the drafts of two rounds past the end, since one may be under way when the end is found."""
    return whole_pages(length + 2 * (speculate_k + 1))


def threshold_of(settings: Settings, head: JudgeHead | None) -> float | None:
    """The threshold in force: as asked for, else the judge's own, else the rule's default; None without a
    knob."""
    if settings.verify in ("plain", "standard"):
        return None
    if settings.threshold is not None:
        return float(settings.threshold)
    return float(head.threshold if settings.verify == "judge" else RULES[settings.verify].default)


def check_settings(settings: Settings, has_draft: bool, has_judge: bool) -> None:
    """Raises InputError for settings that cannot run."""
    if settings.verify != "plain" and settings.verify not in RULES:
        raise InputError(f"--verify {settings.verify} is not a rule; known are plain, {', '.join(RULES)}.")
    if not 1 <= settings.speculate_k <= 1024:
        raise InputError(f"--speculate_k {settings.speculate_k} must be between 1 and 1024.")
    if not (settings.temperature == 0 or 1e-3 <= settings.temperature <= 1e3):
        raise InputError(
            f"--temperature {settings.temperature} must be 0 (greedy) or between 0.001 and 1000."
        )
    if settings.top_k is not None and settings.top_k < 1:
        raise InputError(f"--top_k {settings.top_k} is too small: it keeps at least 1 token.")
    if not 0 <= settings.min_prob < 1:
        raise InputError(f"--min_prob {settings.min_prob} is no probability below 1.")
    if settings.verify != "plain" and not has_draft:
        raise InputError(f"--verify {settings.verify} needs a draft; name one with --draft_checkpoint_path.")
    if settings.relax_between is not None and settings.verify in ("plain", "standard"):
        raise InputError(
            f"--relax_between says where a rule applies, but --verify {settings.verify} has none; leave it "
            f"out."
        )
    if settings.verify == "judge" and not has_judge:
        raise InputError("--verify judge needs a judge; name one with --judge_path.")
    if settings.threshold is not None and settings.verify in ("plain", "standard"):
        raise InputError(f"--verify {settings.verify} has no threshold; leave --threshold out.")
    if settings.threshold is not None:
        check_threshold(settings.verify, settings.threshold)


def smallest_context(target: ModelArgs, draft: ModelArgs | None) -> tuple[int, str]:
    """The tokens that a sequence may have, and whose limit that is."""
    if draft is not None and draft.max_position < target.max_position:
        return draft.max_position, "the draft's context"
    return target.max_position, "the target's context"


def check_prompt(
    prompt: list[int], max_new_tokens: int, length: int, context: int, whose: str = "the model's context"
) -> None:
    """Raises InputError when the prompt is empty, or prompt and output do not fit the context, `whose` it is,
    or the cache."""
    if not prompt:
        raise InputError("The prompt is empty; give at least one token.")
    if max_new_tokens < 1:
        raise InputError(f"--max_new_tokens {max_new_tokens} is too small: put out at least 1 token.")
    for size, what in ((context, whose), (length, "the cache")):
        if len(prompt) + max_new_tokens > size:
            raise InputError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit {what} of {size}; "
                "shorten the prompt or lower --max_new_tokens."
            )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Without a target it names the demo pair, its judge and a demo problem."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add(
        "--checkpoint_path",
        type=Path,
        help="the target, a Hugging Face snapshot folder (default: the demo target)",
    )
    add(
        "--draft_checkpoint_path", type=Path, help="the draft, with the same vocabulary (default: the demo's)"
    )
    add("--judge_path", type=Path, help="judge.safetensors, made by judge.py for this target")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--precision", choices=DTYPES, help="run type (default: bf16 on a GPU, fp32 on a CPU)")
    add_mode_flags(parser.add_argument_group("quantised weights"))
    add = parser.add_argument_group("what to say").add_argument
    add(
        "--prompt",
        help="text, a number N for a synthetic prompt of N tokens, or - for standard input (default: a demo "
        "problem)",
    )
    add("--chat", action="store_true", help="put the prompt into the folder's chat format")
    add(
        "--interactive",
        action="store_true",
        help="ask for prompts and stream the answers; Ctrl-C stops an answer",
    )
    add("--max_new_tokens", type=whole(1, MOST_TOKENS), default=200, help="tokens of an answer, at most")
    add(
        "--cache_length",
        type=whole(1, MOST_TOKENS),
        help="tokens that the cache holds (default: what this run needs)",
    )
    add("--num_samples", type=whole(1, MOST_TOKENS), default=1, help="answers to the prompt")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add(
        "--top_k",
        type=whole(0, MOST_TOKENS),
        help="sample from the K most likely tokens; 0: from all (default: all)",
    )
    add("--seed", type=whole(-(2**63), 2**63 - 1), default=0, help="of sampling")
    add = parser.add_argument_group("verification").add_argument
    add(
        "--verify",
        choices=["plain", *RULES],
        help="default: judge if there is one, standard if there is a draft",
    )
    add(
        "--threshold",
        type=float,
        help="the rule's knob: delta, tau, K, ... (default: the judge's own, or the rule's)",
    )
    add(
        "--min_prob",
        type=float,
        default=0.0,
        help="no rule accepts a token that the target gives less than this",
    )
    add(
        "--relax_between",
        nargs=2,
        metavar=("BEGIN", "END"),
        help="the rule applies only between these two texts",
    )
    add(
        "--calibration",
        type=Path,
        help="a file by judge.py calibrate: its rule, its threshold, its guarantee",
    )
    add("--speculate_k", type=read_k, default=16, help="M, draft tokens a round, or auto: chosen as it goes")
    add = parser.add_argument_group("speed and output").add_argument
    add("--compile", action="store_true", help="compile the step functions with torch.compile")
    add("--profile", type=Path, help="write a Chrome trace of the last sample to this file")
    add(
        "--json",
        action="store_true",
        help="print one JSON object a sample, and nothing else, on standard output",
    )
    add(
        "--marks",
        action="store_true",
        help="show by brackets who accepted each token, where output is no terminal, too",
    )
    add(
        "--debug_numerics",
        action="store_true",
        help="where logits are not finite, say where in the model that begins",
    )
    tp.add_flags(parser.add_argument_group("several GPUs"))
    parser.set_defaults(compare=False)  # the demo decodes its prompt once more plainly
    args = parser.parse_args(argv)
    if args.checkpoint_path is None:
        name_demo(args)
    if args.verify is None and not args.calibration:
        args.verify = (
            "plain" if not args.draft_checkpoint_path else "judge" if args.judge_path else "standard"
        )
    return args


def name_demo(args: argparse.Namespace) -> None:
    """No target is named: the demo pair, its judge, and one of the problems that it knows."""
    args.checkpoint_path = DEMO / "target"
    args.draft_checkpoint_path = args.draft_checkpoint_path or DEMO / "draft"
    args.judge_path = args.judge_path or DEMO / "judge.safetensors"
    if args.prompt is None and not args.interactive:
        args.prompt, args.compare = DEMO_PROMPT, True


def load_engine(
    args: argparse.Namespace, pair: list[Checkpoint | None], prompt_tokens: int, tokenizer: Tokenizer
) -> Engine:
    """Loads what the command line names (pair: target and draft, opened) and builds the engine."""
    settings, device = settings_of(args), pick_device(tp.own_device(args.device))
    tp.connect(device, args.all_reduce)
    dtype, shape = run_dtype(args.precision, device), pair[0].args
    if tokenizer.vocab_size > shape.vocab_size:
        raise InputError(
            f"{args.checkpoint_path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only "
            f"{shape.vocab_size}."
        )
    length = args.cache_length or prompt_tokens + args.max_new_tokens
    if args.interactive and not args.cache_length:
        length = min(shape.max_position, 8192)
    judge = args.judge_path if args.verify == "judge" else None
    capacity, schemes = (
        capacity_for(length, settings.speculate_k),
        (scheme_of(args), scheme_of(args, "draft_")),
    )
    models = load_pair(*pair, judge, device, dtype, capacity, schemes, args.draft_tp)
    markers = make_markers(settings.relax_between, tokenizer, shape.vocab_size)
    engine = Engine(*models, settings, tokenizer.stop_ids, length, markers)
    for name, model in (("target", engine.target), ("draft", engine.draft)):
        if model is not None:
            print(memory_line(name, model), file=sys.stderr)
    return engine


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; flags that a script lacks take their defaults.

    M is at most what an answer can use: --max_new_tokens, and what the rule looks at beyond.
    """
    auto = args.speculate_k == "auto"
    between = tuple(args.relax_between) if getattr(args, "relax_between", None) else None
    budget = (getattr(args, "max_new_tokens", None) or 1 << 30) + (
        RULES[args.verify].ahead if args.verify in RULES else 0
    )
    return Settings(
        args.verify,
        args.threshold,
        min(max(SIZES) if auto else args.speculate_k, budget),
        args.temperature,
        args.top_k or None,
        args.compile,
        args.min_prob,
        auto,
        between,
        check_ranks=getattr(args, "check_ranks", False),
        debug_numerics=getattr(args, "debug_numerics", False),
    )


def run_samples(
    args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, prompt: list[int], drift: Drift
) -> None:
    """Generates --num_samples answers and prints them: the answer on standard output, figures on standard
    error."""
    paint = Paint(sys.stdout, engine.draft is not None, args.marks)
    for sample in range(args.num_samples):
        last = sample + 1 == args.num_samples
        with profile(args.profile) if args.profile and last else nullcontext():
            result = engine.generate(prompt, args.max_new_tokens, args.seed + sample)
        warn_of_drift(drift, result)
        if args.json:
            print(as_json(engine, result, answer_text(tokenizer, result.tokens)), flush=True)
            continue
        print(paint_tokens(tokenizer, result, paint), flush=True)
        if paint.on and last:
            print(f"\n{paint.legend}", file=sys.stderr)
        print(summary(name_of(engine), result), file=sys.stderr)
    if args.compare and not args.json and engine.draft is not None:
        compare_plainly(args, engine, prompt)


@contextmanager
def profile(path: Path) -> Iterator[None]:
    """Writes a Chrome trace of what runs inside."""
    with torch.profiler.profile() as trace:
        yield
    if tp.is_first():
        with tempfile.TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/trace.json")  # it takes no name that is not UTF-8
            write_file(path, Path(f"{folder}/trace.json").read_bytes())


COMPARED = 5  # pairs of runs that a ratio of speeds is the median of, after one that warms up


def compare_plainly(args: argparse.Namespace, engine: Engine, prompt: list[int]) -> None:
    """Decodes the same prompt without a draft and with it, by turns, and prints passes of the target and
    speeds of both."""
    settings = replace(
        engine.settings, verify="plain", threshold=None, adaptive=False, relax_between=None, min_prob=0.0
    )
    plain_engine = Engine(engine.target, None, None, settings, engine.stop_ids, engine.length)
    if args.compile:
        plain_engine.warm_up()
    ratios = []
    for turn in range(COMPARED + 1):
        fast, plain = (
            each.generate(prompt, args.max_new_tokens, args.seed) for each in (engine, plain_engine)
        )
        if turn:
            ratios.append(fast.tokens_per_second / plain.tokens_per_second)
    ratios.sort()
    same = (
        "" if args.temperature else f", {'the same text' if plain.tokens == fast.tokens else 'another text'}"
    )
    print(summary("plain", plain), file=sys.stderr)
    print(
        f"{args.verify}: {fast.rounds} passes of the target for {len(fast.tokens)} tokens, plain: "
        f"{plain.rounds} for "
        f"{len(plain.tokens)}{same}; {ratios[COMPARED // 2]:.2f} times as fast (median of {COMPARED} runs "
        f"by turns, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}).",
        file=sys.stderr,
    )


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for a command line that cannot run, before anything is loaded. A calibration gives
    the rule."""
    if args.calibration:
        calibration = read_calibration(args.calibration)
        rule = calibration["conditions"]["verify"]
        if args.verify not in (None, rule):
            raise InputError(f"{args.calibration} is of --verify {rule}, not of {args.verify}.")
        args.verify = rule
        if args.threshold is None:
            args.threshold = calibration["threshold"]
    check_settings(settings_of(args), bool(args.draft_checkpoint_path), bool(args.judge_path))
    if args.judge_path and not args.draft_checkpoint_path:
        raise InputError("--judge_path needs a draft; name one with --draft_checkpoint_path.")
    if args.min_prob and args.verify in ("plain", "standard"):
        raise InputError(
            f"--min_prob is a floor under a rule, but --verify {args.verify} has none; leave it out."
        )
    if args.interactive and (args.json or args.profile or args.prompt is not None or args.num_samples != 1):
        raise InputError("--interactive goes without --json, --profile, --prompt and --num_samples.")
    if args.profile:
        check_writable(args.profile, "--profile")


def run(args: argparse.Namespace) -> None:
    """From a parsed command line to the output."""
    tp.check_flags(args)
    check_args(args)
    tokenizer = load_tokenizer(args.checkpoint_path)
    if args.chat:
        tokenizer.check_chat()
    prompt = [] if args.interactive else read_prompt(args, tokenizer)
    draft = args.draft_checkpoint_path if args.verify != "plain" else None
    pair = [folder and open_checkpoint(folder) for folder in (args.checkpoint_path, draft)]
    if not args.interactive:
        context, whose = smallest_context(*(source and source.args for source in pair))
        check_prompt(prompt, args.max_new_tokens, args.cache_length or context, context, whose)
    engine = load_engine(args, pair, len(prompt), tokenizer)
    if engine.head is not None and bool(engine.head.info.get("chat")) != args.chat:
        forms = ["without the chat format", "in the chat format"]
        trained, runs = forms[not args.chat], forms[args.chat]
        print(f"Note: {args.judge_path} was trained {trained}, and this run is {runs}.", file=sys.stderr)
    if args.checkpoint_path == DEMO / "target":
        print(f"question: {args.prompt}" if args.compare else f"Note: {DEMO_FORMS}", file=sys.stderr)
    drift = announce(args, engine)
    if args.compile:
        print(f"compiled and warmed up in {engine.warm_up():.1f} s", file=sys.stderr)
    if args.interactive:
        chat_loop(args, engine, tokenizer, drift)
    else:
        run_samples(args, engine, tokenizer, prompt, drift)


def main(argv: list[str] | None = None) -> None:
    with tp.ranks("generate.py"):
        run_script("generate.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    main()
