"""RoPE: the kinds of scaling by which Llamas reach longer contexts, the table of angles, the rotation.

The layout is the half-split one of the published weights: dimension i of a head pairs with i + head_dim / 2.
"""

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from cli import InputError


@dataclass(frozen=True, repr=False)
class Llama3Rope:
    """RoPE scaling by wavelength, as Llama 3.1 defines it. Fields are those of `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise InputError(f"high_freq_factor={high} must be above low_freq_factor={low}.")

    def __repr__(self) -> str:
        return repr(astuple(self))  # as it stands in the fingerprints of judges and packed folders

    def scale(self, freqs: Tensor, theta: float) -> Tensor:
        """Frequencies (head_dim / 2,): long waves are slowed down by the factor, short ones kept."""
        factor, low, high, original = astuple(self)
        wavelength = 2 * math.pi / freqs
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 1: keep, 0: divide by factor
        return (1 - smooth) * freqs / factor + smooth * freqs


@dataclass(frozen=True)
class LinearRope:
    """Positions are squeezed together, and nothing else (Vicuna 16k, LongChat)."""

    factor: float

    def scale(self, freqs: Tensor, theta: float) -> Tensor:
        return freqs / self.factor


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071), with the defaults and the arithmetic of transformers. 0: not given."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def scale(self, freqs: Tensor, theta: float) -> Tensor:
        """Frequencies (head_dim / 2,): those that turn more than beta_fast times over the original context
        are kept, those under beta_slow divided by the factor, with a ramp between."""
        half = len(freqs)
        waves = (self.original_max_position_embeddings / beta for beta in (self.beta_fast, self.beta_slow))
        low, high = (half * math.log(wave / (2 * math.pi)) / math.log(theta) for wave in waves)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = (torch.arange(half, device=freqs.device) - low) / (high - low or 0.001)
        ramp = ramp.clamp(0, 1)  # 0: keep, 1: divide by the factor
        return (1 - ramp) * freqs + ramp * freqs / self.factor

    @property
    def amplitude(self) -> float:
        """By which cos and sin are multiplied: attention scores grow with the context."""
        if self.attention_factor:
            return self.attention_factor
        wider = 0.1 * math.log(max(1.0, self.factor))
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * wider + 1) / (self.mscale_all_dim * wider + 1)
        return wider + 1


# rope_type -> its fields in config.json, and what they do to the frequencies
ROPES = {"llama3": Llama3Rope, "linear": LinearRope, "yarn": YarnRope}
Rope = Llama3Rope | LinearRope | YarnRope
LLAMA31_ROPE, LLAMA32_ROPE = (Llama3Rope(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))


def rope_table(args, length: int, device: torch.device) -> Tensor:
    """fp32 cos and sin of a model's (ModelArgs) angles, (length, 2, head_dim / 2).

    fp32 matters: in bf16 the angle of position 8193 differs from that of 8192 by less than a rounding step.
    """
    even = torch.arange(0, args.head_dim, 2, device=device).float()
    freqs = 1.0 / args.rope_theta ** (even / args.head_dim)
    if args.rope_scaling is not None:
        freqs = args.rope_scaling.scale(freqs, args.rope_theta)
    angles = torch.outer(torch.arange(length, device=device).float(), freqs)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * getattr(args.rope_scaling, "amplitude", 1.0)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x (B, T, H, D) by table (T, 2, D/2), in fp32; the halves of D are the pairs."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = table[:, None, 0], table[:, None, 1]  # (T, 1, D/2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
