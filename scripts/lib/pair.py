"""Loading a target, its draft and its judge, after checking that they fit together and into memory."""

import argparse
from pathlib import Path

import torch

import tp
from checkpoint import DEMO
from cli import InputError
from judge import RULES, JudgeHead, check_threshold, load_judge
from model import ModelArgs, Transformer
from quantize import Checkpoint, Scheme, check_device, load_model, open_checkpoint, scheme_of
from scripts.lib.memory import in_words, memory_terms
from scripts.lib.ranks import agree, place
from tokenizer import Tokenizer, load_tokenizer


def check_pair(target: ModelArgs, draft: ModelArgs, folders: tuple[Path, Path]) -> None:
    """Raises InputError when draft and target do not share a vocabulary, by tokenizer and by size. Sizes may
    differ in padding, beyond the tokens that the tokenizer has."""
    tokenizer = load_tokenizer(folders[0])
    if target.vocab_size != draft.vocab_size and tokenizer.vocab_size > min(
        target.vocab_size, draft.vocab_size
    ):
        raise InputError(
            f"Draft and target must share a vocabulary: {folders[1]} has {draft.vocab_size} tokens, "
            f"{folders[0]} has {target.vocab_size}, and the difference is more than padding."
        )
    sample = "The quick brown fox: 12345 + 67890 = 80235, naïve Übermut 你好 🙂\n\n    def f(x):"
    other = load_tokenizer(folders[1])
    same = tokenizer.encode(sample) == other.encode(sample)
    if target.vocab_size != draft.vocab_size:  # sizes say nothing here: each token must be the same
        ids = range(max(tokenizer.vocab_size, other.vocab_size))
        same = same and all(tokenizer.token_bytes(id) == other.token_bytes(id) for id in ids)
    if not same:
        raise InputError(
            f"Draft and target must share a vocabulary: the tokenizers of {folders[1]} and {folders[0]} "
            f"differ."
        )


def check_tokenizer(tokenizer: Tokenizer, shape: ModelArgs, folder: Path) -> None:
    """Raises InputError for a tokenizer with more tokens than the model."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only "
            f"{shape.vocab_size}."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_memory(
    models: list[ModelArgs], capacity: int, dtype: torch.dtype, device: torch.device,
    schemes: list[Scheme | None], speculate_k: int = 0,
) -> None:  # fmt: skip
    """Raises InputError where what `memory_terms` counts will not fit into what is free on `device`. models,
    schemes: of the target and, where there is one, of the draft."""
    world = shard.world if (shard := tp.shard()) else 1
    sizes = {"capacity": capacity, "speculate_k": speculate_k, "world": world}
    terms = memory_terms(models, schemes, dtype, device.type, **sizes)
    free = free_memory(device)
    terms.pop("context")  # it is there by now, and not among what is free
    if free is not None and sum(terms.values()) > free:
        raise InputError(
            f"Not enough memory on {device}: {in_words(terms)} together, but {free / 1e9:.1f} GB are free; "
            "use a smaller --precision, a --mode, or a shorter --cache_length."
        )


def load_pair(
    target: Path | Checkpoint, draft: Path | Checkpoint | None, judge: Path | None,
    device: torch.device, dtype: torch.dtype, *, capacity: int = 0, speculate_k: int = 0,
    schemes: tuple[Scheme | None, Scheme | None] = (None, None), draft_tp: str | None = None,
) -> tuple[Transformer, Transformer | None, JudgeHead | None]:  # fmt: skip
    """Loads what is named, after checking that draft and target fit together and into memory.

    capacity: of the caches. speculate_k: the largest M. schemes: to quantise target and draft by, while they
    are loaded. draft_tp: where ranks share the target, whether they share the draft as well (default: by its
    size).
    """
    sources = [open_checkpoint(folder) for folder in (target, draft) if folder is not None]
    shapes = [source.args for source in sources]
    if draft is not None:
        check_pair(*shapes, tuple(source.folder for source in sources))
    written = [source.scheme or scheme for source, scheme in zip(sources, schemes)]
    shards = place(shapes, dtype, written, device, draft_tp)
    local = [shard.local(shape) if shard else shape for shape, shard in zip(shapes, shards)]
    for scheme in written:
        check_device(device, scheme)
    check_memory(local, capacity, dtype, device, written, speculate_k)
    models = [load_model(*each) for each in zip(sources, [device] * 2, [dtype] * 2, schemes, shards)]
    models = [tp.join(model, shard) if shard else model for model, shard in zip(models, shards)]
    agree({f"weights of the {role}": model.fingerprint for role, model in zip(("target", "draft"), models)})
    head = load_judge(judge, *models) if judge is not None else None
    return models[0], models[1] if draft is not None else None, head


def fit(target: Transformer, draft: Transformer | None) -> None:
    """Makes the draft's logits as wide as the target's, where the two differ in padding."""
    size = target.args.vocab_size
    if draft is None or draft.speaks == size:
        return
    if tp.divided(draft):
        raise InputError(
            f"The draft has {draft.args.vocab_size} tokens and the target {size}: ranks cannot share such a "
            f"draft; give --draft_tp replicate."
        )
    draft.speaks = size


def schemes_of(args: argparse.Namespace) -> tuple[Scheme | None, Scheme | None]:
    """How target and draft are to be quantised."""
    return scheme_of(args), scheme_of(args, "draft_")


def name_demo(args: argparse.Namespace) -> None:
    """Where no target is named: the demo pair and its judge."""
    if args.checkpoint_path is None:
        args.checkpoint_path = DEMO / "target"
        args.draft_checkpoint_path = args.draft_checkpoint_path or DEMO / "draft"
        args.judge_path = args.judge_path or DEMO / "judge.safetensors"


def name_models(args: argparse.Namespace) -> None:
    """Fills in the demo pair and its judge where no target is named. Raises InputError for a target without a
    draft."""
    name_demo(args)
    if args.draft_checkpoint_path is None:
        raise InputError("--checkpoint_path needs a draft beside it; name one with --draft_checkpoint_path.")


def files_in(folders: list[Path]) -> list[Path]:
    """The files of checkpoint folders, which no output may replace."""
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def check_settings(s, has_draft: bool, has_judge: bool) -> None:
    """Raises InputError for settings (generate.Settings) that cannot run."""
    if s.verify != "plain" and s.verify not in RULES:
        raise InputError(f"--verify {s.verify} is not a rule; known are plain, {', '.join(RULES)}.")
    if not 1 <= s.speculate_k <= 1024:
        raise InputError(f"--speculate_k {s.speculate_k} must be between 1 and 1024.")
    if not (s.temperature == 0 or 1e-3 <= s.temperature <= 1e3):
        raise InputError(f"--temperature {s.temperature} must be 0 (greedy) or between 0.001 and 1000.")
    if s.top_k is not None and s.top_k < 1:
        raise InputError(f"--top_k {s.top_k} is too small: it keeps at least 1 token.")
    for name, value in (("top_p", s.top_p), ("min_p", s.min_p)):
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"--{name} {value} is no share between 0 and 1.")
    if not 0 <= s.min_prob < 1:
        raise InputError(f"--min_prob {s.min_prob} is no probability below 1.")
    if s.verify != "plain" and not has_draft:
        raise InputError(f"--verify {s.verify} needs a draft; name one with --draft_checkpoint_path.")
    if "scores" in s.rule.reads and not has_judge:
        raise InputError(f"--verify {s.verify} needs a judge; name one with --judge_path.")

    if s.rule.knob:
        if s.threshold is not None:
            check_threshold(s.verify, s.threshold)
    elif s.relax_between is not None:
        raise InputError(
            f"--relax_between says where a rule applies, but --verify {s.verify} has none; leave it out."
        )
    elif s.threshold is not None:
        raise InputError(f"--verify {s.verify} has no threshold; leave --threshold out.")


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
        raise InputError(f"--max_new_tokens {max_new_tokens} is too small: generate at least 1 token.")
    for size, what in ((context, whose), (length, "the cache")):
        if len(prompt) + max_new_tokens > size:
            raise InputError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit {what} of {size}; "
                "shorten the prompt or lower --max_new_tokens."
            )
