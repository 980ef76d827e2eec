"""Hugging Face transformers on our weights, to compare speeds and results with: plain, compiled, assisted by
a draft."""

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from checkpoint import weight_plan
from cli import InputError
from hub import model_folder
from model import Transformer, run_dtype
from rope import ROPES
from tokenizer import Tokenizer

SAID = 7  # any token


def timed(action: Callable, device: torch.device) -> float:
    """Seconds of one call; on a GPU until it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def transformers_for(flag: str):
    """The package, which is loaded here. Raises InputError beginning with `flag` where there is none."""
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{flag} needs the package transformers; pip install -r requirements-dev.txt."
        ) from None
    return transformers


def draft_always(model, k: int) -> None:
    """Makes an assistant propose k tokens every round, however unsure it is."""
    config = model.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = k, "constant"
    config.assistant_confidence_threshold = 0.0


def peer(args: argparse.Namespace, tokenizer: Tokenizer, k: int | None) -> Callable:
    """transformers on the folders of a command line: (prompt, max_new_tokens) -> (tokens, seconds of prefill,
    seconds of decoding). k: draft tokens a round, None: plainly."""
    theirs = transformers_for("--verify hf" + "-assisted" * (k is not None))
    theirs.utils.logging.disable_progress_bar()

    def load(name):
        more = {"dtype": run_dtype(args.precision, args.device), "local_files_only": True}
        model = theirs.AutoModelForCausalLM.from_pretrained(model_folder(name), **more)
        return model.to(args.device).eval()

    target = load(args.checkpoint_path)
    more = {"do_sample": False, "eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.stop_ids[0]}
    if k is not None:
        more["assistant_model"] = load(args.draft_checkpoint_path)
        draft_always(more["assistant_model"], k)

    @torch.inference_mode()
    def run(prompt: list[int], max_new_tokens: int) -> tuple[list[int], float, float]:
        ids, seconds = torch.tensor([prompt], device=args.device), []
        # the first token alone stands for the prefill, which our figures leave out
        for length in (1, max_new_tokens):
            started = time.monotonic()
            found = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **more)
            seconds.append(time.monotonic() - started)
        return found[0, len(prompt) :].tolist(), seconds[0], max(seconds[1] - seconds[0], 1e-9)

    return run


def twin(model: Transformer):
    """A transformers LlamaForCausalLM whose parameters are views of a model's: the same weights, no further
    memory."""
    transformers, a = transformers_for("--peers"), model.args
    rope = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling is not None:
        kinds = {kind: name for name, kind in ROPES.items()}
        rope |= {"rope_type": kinds[type(a.rope_scaling)]} | asdict(a.rope_scaling)

    config = transformers.LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.dim,
        intermediate_size=a.intermediate_size,
        num_hidden_layers=a.n_layer,
        num_attention_heads=a.n_head,
        num_key_value_heads=a.n_kv_head,
        head_dim=a.head_dim,
        rms_norm_eps=a.norm_eps,
        max_position_embeddings=a.max_position,
        rope_parameters=rope,
        tie_word_embeddings=a.tie_embeddings,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    for name, row in weight_plan(a).items():
        owner, _, leaf = name.rpartition(".")
        view = model.get_parameter(row.ours)[row.first : row.first + row.shape[0]].detach()
        setattr(theirs.get_submodule(owner), leaf, torch.nn.Parameter(view, requires_grad=False))

    if a.tie_embeddings:
        theirs.lm_head.weight = theirs.model.embed_tokens.weight
    with torch.device(model.device):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its table is no weight
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return theirs.eval()


class Peers:
    """Decodes n tokens after a prompt; each way returns the seconds of decoding alone, without prefill.

    k: draft tokens a round, always as many. accept: as many of them are made right, the others wrong; None:
    as they come.
    """

    def __init__(
        self,
        target: Transformer,
        draft: Transformer | None,
        prompt: list[int],
        n: int,
        *,
        k: int,
        accept: int | None,
    ):
        self.device, self.prompt, self.n, self.k, self.accept = target.device, prompt, n, k, accept
        self.target, self.compiled = twin(target), twin(target)
        if self.device.type == "cpu":  # on a GPU transformers compiles a static cache's forward by itself
            self.compiled.forward = torch.compile(self.compiled.forward)
        self.draft = twin(draft) if draft is not None else None
        if self.draft is not None:
            draft_always(self.draft, k)

    def plain(self) -> float:
        """`generate` as it is, with its dynamic cache."""
        return self.decode(self.target)

    def static(self) -> float:
        """With a static cache and its forward compiled; the first call compiles."""
        return self.decode(self.compiled, cache_implementation="static")

    def assisted(self) -> float:
        """With the draft as assistant_model."""
        with self.impose() if self.accept is not None else contextlib.nullcontext():
            return self.decode(self.target, assistant_model=self.draft)

    def decode(self, model, **more) -> float:
        """The time of n tokens less that of the first one."""
        first, all_ = (timed(lambda n=n: self.generate(model, n, **more), self.device) for n in (1, self.n))
        return all_ - first

    @torch.inference_mode()
    def generate(self, model, n: int, **more) -> Tensor:
        """Prompt and n tokens, greedy, (1, prompt + n)."""
        ids = torch.tensor([self.prompt], device=self.device)
        mask = torch.ones_like(ids)
        assistant = {"assistant_model": more.pop("assistant_model")} if "assistant_model" in more else {}
        config = {
            "max_new_tokens": n,
            "min_new_tokens": n,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        config = type(model.generation_config)(**config, **more)
        return model.generate(ids, attention_mask=mask, generation_config=config, **assistant)

    @contextlib.contextmanager
    def impose(self):
        """Makes the target say SAID at every place, and each proposal of the draft `accept` times that, then
        another token.

        Both compute all that they would; only their outputs are overwritten. (Real outputs will not do: with
        random weights a pass of several rows soon rounds to another token than passes of one.)
        """
        from transformers.generation.candidate_generator import AssistedCandidateGenerator

        original, forward = AssistedCandidateGenerator.get_candidates, self.target.forward

        def get_candidates(generator, input_ids, *rest, **named):
            ids, logits = original(generator, input_ids, *rest, **named)
            known = input_ids.shape[1]
            ids[0, known:] = SAID
            ids[0, known + self.accept :] = SAID + 1
            return ids, logits

        def say(*rest, **named):
            out = forward(*rest, **named)
            out.logits[..., SAID] = 1e4
            return out

        AssistedCandidateGenerator.get_candidates, self.target.forward = get_candidates, say
        try:
            yield
        finally:
            AssistedCandidateGenerator.get_candidates, self.target.forward = original, forward
