"""Makes the demo pair from a seed: tokenizer, target, draft and judge, as published folders under
checkpoints/demo.

    python scripts/train_demo.py                      # everything; resumes where it stopped
    python scripts/train_demo.py --stages judge       # only the judge, from the trained pair

The judge is trained on answers that the trained draft and target gave to training problems, the
wrong ones marked at their first wrong word or digit by the grammar of scripts/lib/demo_task.py.

The text is that of scripts/lib/demo_task.py. The target reads answers in its own style in which some steps go
wrong and are taken back; the loss skips the wrong tokens themselves, so that it learns to notice errors, not
to make them. The draft reads right answers in the other style, and is too small to calculate without slips.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from cli import InputError, Parser, Progress, run_script, shortened, whole  # isort: skip  (first: from here on Ctrl-C is silent)

import argparse
import io
import json
import math
import random
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from checkpoint import DEMO, weight_plan
from files import check_folder, check_writable, lock, read_bytes, write_file
from generate import Engine, Settings
from kernels import check_compiler
from model import ModelArgs, Transformer, pick_device
from quantize import load_model
from scripts.lib.answers import read_answers
from scripts.lib.demo_task import annotated, problems, write_answer, write_answer_with_errors
from scripts.lib.flags import add_flags
from scripts.lib.terminal import answer_text
from scripts.lib.training import TrainSettings, print_figures, train_judge
from tokenizer import load_tokenizer

VOCAB_SIZE = 640  # 3 control tokens, 256 bytes, the characters, the words
LENGTH = 160  # tokens of a training row: a problem and its answer, padded; 2% of answers with errors are cut
MAX_POSITION = 512
PRESETS = {  # dim, layers, heads, KV heads, intermediate size
    "target": ModelArgs(192, 12, 6, 2, 512, VOCAB_SIZE, 32, MAX_POSITION, 1e-5, 10000.0, tie_embeddings=True),
    "draft": ModelArgs(80, 2, 4, 2, 208, VOCAB_SIZE, 20, MAX_POSITION, 1e-5, 10000.0, tie_embeddings=True),
}
SCHEDULE = {"target": (2400, 2e-3), "draft": (1600, 4e-3)}  # steps, peak learning rate
BATCH = 64
SAVE_EVERY = 100  # steps between saved states
FOLDER = (
    "model.safetensors",
    "tokenizer.model",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
STAGES = ("tokenizer", "target", "draft", "judge")
# model, temperature, answers
JUDGE_ANSWERS = (("draft", 0.0, 1000), ("draft", 1.0, 1000), ("target", 1.0, 200))
JUDGE_THRESHOLD = 0.8  # chosen on held-out problems of another seed than the results' (--seed 7)


def train_tokenizer(path: Path, seed: int) -> None:
    """A SentencePiece BPE model in Llama 2's form: digits apart, bytes as fall-back, nothing normalised."""
    rng, texts = random.Random(seed), []
    for problem, _ in zip(problems(seed, held_out=False), range(20000)):
        style = rng.choice(["target", "draft"])
        texts.append(problem.question + write_answer_with_errors(problem, style, rng, 0.1)[0])

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    write_file(path, model.getvalue())


def training_row(
    sp, problem, style: str, rng: random.Random, late: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and, for each, whether its prediction is trained: the answer without its wrong tokens.

    late: errors are rarer at the end of training, so that the target takes back right steps less often.
    """
    prompt = [sp.bos_id(), *sp.encode(problem.question)]
    share, rate = (0.35, 0.2) if late else (0.6, 0.3)
    if style == "target" and rng.random() < share:
        answer, errors = write_answer_with_errors(problem, style, rng, rate)
    else:
        answer, errors = write_answer(problem, style, rng), []

    pieces = sp.encode(problem.question + answer, out_type=str)
    ids, mask = [sp.bos_id(), *sp.piece_to_id(pieces)], [0]
    # characters from the answer's start; SentencePiece puts a space before all
    end = -len(problem.question) - 1
    for piece in pieces:
        begin, end = end, end + len(piece)
        wrong = any(begin < b and end > a for a, b in errors)
        mask.append(int(end > 0 and not wrong))

    assert ids[: len(prompt)] == prompt
    return [*ids, sp.eos_id()], [*mask, 1]


def batch(sp, style: str, seed: int, step: int, late: bool) -> tuple[Tensor, Tensor]:
    """Training batch number `step`: ids (BATCH, LENGTH + 1) and targets (BATCH, LENGTH), -100 where not
    trained."""
    rng = random.Random(f"{seed} {style} {step}")
    stream = problems(rng.randrange(2**60), held_out=False)
    ids = torch.zeros(BATCH, LENGTH + 1, dtype=torch.long)
    targets = torch.full((BATCH, LENGTH), -100)
    for row in range(BATCH):
        tokens, mask = training_row(sp, next(stream), style, rng, late)
        tokens, mask = tokens[: LENGTH + 1], mask[: LENGTH + 1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        kept = torch.tensor(mask[1:]).bool()
        targets[row, : len(tokens) - 1][kept] = ids[row, 1 : len(tokens)][kept]
    return ids, targets


def make_optimizers(model: Transformer, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("layers") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def init_weights(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.02 if "tok" in name else weight.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * model.args.n_layer)  # keeps the residual stream's size at any depth
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where what an optimizer remembers of a weight is not of its shape, or no number."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            kept = [x for x in optimizer.state[weight].values() if isinstance(x, Tensor) and x.dim()]
            if not kept or any(x.shape != weight.shape for x in kept):
                raise ValueError("an optimizer's state is not of its weights")
            if not all(x.isfinite().all() for x in (weight, *kept)):
                raise ValueError("it holds numbers that are not finite")


def resume(
    model: Transformer, optimizers: list[torch.optim.Optimizer], state: Path, seed: int, steps: int
) -> int:
    """Puts model and optimizers where a killed run saved them, and returns the steps that it had done.

    Raises InputError for a file of another run, and for one that no run has saved.
    """
    content = read_bytes(state)
    try:
        saved = torch.load(
            io.BytesIO(content), weights_only=True, map_location=next(model.parameters()).device
        )
        if (saved["seed"], saved["steps"]) != (seed, steps):
            raise InputError(
                f"{state} is of another seed or number of steps; remove it, or name another --work."
            )
        if type(saved["step"]) is not int or not 0 < saved["step"] <= steps:
            raise ValueError(f"step is {saved['step']!r}")
        model.load_state_dict(saved["model"])
        for optimizer, its in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(its)
            check_moments(optimizer)
    except InputError:
        raise
    except Exception as error:  # what a damaged pickle raises has no end
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{state} is damaged ({shortened(reason)}); remove it, and its model is trained anew."
        ) from None

    return saved["step"]


def train_model(role: str, sp, state: Path, *, seed: int, device: str, steps: int) -> Transformer:
    """Trains the target or the draft for `steps` batches; `state` is where it resumes from."""
    model = Transformer(PRESETS[role])
    init_weights(model, seed)
    model.to(device)
    peak = SCHEDULE[role][1]
    optimizers, start, began = make_optimizers(model, peak), 0, time.monotonic()
    if os.path.lexists(state):
        start = resume(model, optimizers, state, seed, steps)
    loss_of = torch.compile(
        lambda ids, targets: F.cross_entropy(model(ids)[1].flatten(0, 1), targets.flatten())
    )
    for step in range(start, steps):
        ids, targets = (t.to(device) for t in batch(sp, role, seed, step, step >= 0.7 * steps))
        warm, left = min(1.0, (step + 1) / 150), (steps - step) / steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * min(1.0, left / 0.6)  # flat, then linear to zero
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(ids[:, :-1], targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            pace = (time.monotonic() - began) / (step + 1 - start)
            left_min = pace * (steps - step - 1) / 60
            print(
                f"{role}: step {step + 1}/{steps}, loss {loss.item():.4f}, {left_min:.0f} min left",
                file=sys.stderr,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            if not math.isfinite(loss.item()):
                raise InputError(
                    f"{role}: the loss of step {step + 1} is not finite; {state} keeps what was before."
                )
            content = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
                "seed": seed,
                "steps": steps,
            }
            buffer = io.BytesIO()
            torch.save(content, buffer)
            write_file(state, buffer.getvalue())

    return model


def write_judge_data(out: Path, path: Path, seed: int, device: str) -> None:
    """Answers to training problems by draft and target, wrong ones marked, as JSON lines for judge.py."""
    tokenizer = load_tokenizer(out / "target")
    lines, progress = [], Progress("answers to judge", sum(count for _, _, count in JUDGE_ANSWERS))
    for role, temperature, count in JUDGE_ANSWERS:
        model = load_model(out / role, device, torch.float32)
        engine = Engine(
            model, None, None, Settings("plain", temperature=temperature), tokenizer.stop_ids, MAX_POSITION
        )
        for problem, number in zip(problems(seed, held_out=False), range(count)):
            prompt = tokenizer.prompt(problem.question)
            text = answer_text(tokenizer, engine.generate(prompt, 200, seed=number).tokens)
            lines.append(json.dumps(annotated(problem, text, f"{role}, temperature {temperature}")))
            progress.step()

    write_file(path, ("\n".join(lines) + "\n").encode())


def train_demo_judge(out: Path, work: Path, seed: int, device: str) -> None:
    """Trains and saves the judge, from answers of this very pair."""
    target, draft = (load_model(out / role, device, torch.float32) for role in ("target", "draft"))
    data = work / f"judge_data_{target.fingerprint}_{draft.fingerprint}.jsonl"
    if not os.path.lexists(data):
        write_judge_data(out, data, seed + 1, device)
    settings = TrainSettings(threshold=JUDGE_THRESHOLD, seed=seed)
    head = train_judge(
        [target], load_tokenizer(out / "target"), read_answers(data), settings, work / "features"
    )
    head.save(out / "judge.safetensors")
    print_figures(head)


def hf_config(args: ModelArgs) -> dict:
    """The `config.json` of a published folder, in the spelling that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "hidden_size": args.dim,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.n_layer,
        "num_attention_heads": args.n_head,
        "num_key_value_heads": args.n_kv_head,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_position,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def save_folder(model: Transformer, tokenizer: Path, folder: Path) -> None:
    """Writes a snapshot folder as Hugging Face publishes them, weights in bf16."""
    ours, tensors = model.state_dict(), {}
    for name, row in weight_plan(model.args).items():
        part = ours[row.ours][row.first : row.first + row.shape[0]]
        tensors[name] = part.to("cpu", torch.bfloat16).contiguous()
    write_file(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_file(folder / "tokenizer.model", read_bytes(tokenizer))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    for file, content in zip(FOLDER[2:], (hf_config(model.args), generation, settings)):
        write_file(folder / file, (json.dumps(content, indent=2) + "\n").encode())


def check_args(args: argparse.Namespace) -> list[str]:
    """The stages. Raises InputError for what cannot run or be written, before there is any work."""
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise InputError(f"--stages {unknown[0]} is not a stage; known are {', '.join(STAGES)}.")
    if args.steps and not args.out:
        raise InputError("--steps is for trials, which must not replace the shipped pair; name an --out.")
    args.out, args.device = args.out or DEMO, pick_device(args.device)
    written = [args.work / name for name in ("tokenizer.model", *(f"{role}.pt" for role in PRESETS))]
    written += [args.out / role / name for role in PRESETS for name in FOLDER]
    for path in [*written, args.out / "judge.safetensors"]:
        check_folder(path.parent, "--work" if path.parent == args.work else "--out")
        if path.parent.is_dir():
            check_writable(path)

    if args.device.type == "cpu" and set(PRESETS) & set(stages):
        check_compiler()
    return stages


def load_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of an earlier stage. Raises InputError where there is none, or not one for these
    models."""
    if not os.path.lexists(path):
        raise InputError(f"There is no {path}; run the stage tokenizer first.")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path))
    except RuntimeError:
        raise InputError(
            f"{path} is no SentencePiece model; remove it, and run the stage tokenizer."
        ) from None

    if not 0 < pieces.vocab_size() <= VOCAB_SIZE or min(pieces.bos_id(), pieces.eos_id()) < 0:
        raise InputError(
            f"{path} is no tokenizer of at most {VOCAB_SIZE} pieces with "
            "begin and end; remove it, and run the stage tokenizer."
        )

    return pieces


def run_stages(args: argparse.Namespace, stages: list[str]) -> None:
    """Tokenizer, target, draft, judge: those of `stages`, with the files of the earlier ones."""
    tokenizer = args.work / "tokenizer.model"
    if "tokenizer" in stages and not tokenizer.exists():
        train_tokenizer(tokenizer, args.seed)
    sp = load_pieces(tokenizer) if set(PRESETS) & set(stages) else None
    for role in PRESETS:
        if role in stages:
            steps = args.steps or SCHEDULE[role][0]
            model = train_model(
                role, sp, args.work / f"{role}.pt", seed=args.seed, device=args.device, steps=steps
            )
            save_folder(model, tokenizer, args.out / role)
            print(f"{role}: written to {args.out / role}", file=sys.stderr)

    if "judge" in stages:
        train_demo_judge(args.out, args.work, args.seed, args.device)


def train_all(args: argparse.Namespace) -> None:
    """Runs the stages that are asked for, each from where it stopped."""
    stages = check_args(args)
    args.work.mkdir(parents=True, exist_ok=True)
    held = os.open(args.work, os.O_RDONLY)  # the folder: its files are replaced as the training goes on
    try:
        lock(held, args.work)
        run_stages(args, stages)
    finally:
        os.close(held)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_flags(
        parser,
        out={"help": "default: checkpoints/demo of this repository, whose pair is replaced"},
        work={"default": DEMO.with_name("demo-training")},
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="which to make, with commas between")
    add_flags(parser, seed={"type": whole(0, 2**62), "default": 1, "help": "of everything random"}, device={})
    parser.add_argument(
        "--steps", type=whole(1, 1_000_000), help="batches a model, for a quick trial; needs --out"
    )
    args = parser.parse_args(argv)
    run_script("train_demo.py", lambda: train_all(args))


if __name__ == "__main__":
    main()
