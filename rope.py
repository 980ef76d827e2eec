"""Kinds of RoPE scaling: how a model that was made for a short context turns positions of a longer one.

A kind is a class in ROPES. Its fields are those of `config.json`; one with a default may be missing there.
"""

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from cli import InputError


class Rope:
    """One kind of scaling."""

    amplitude = 1.0  # of cos and sin

    def scale(self, freqs: Tensor, theta: float) -> Tensor:
        """Frequencies (head_dim / 2,) of the base theta -> those to turn by, of the same shape."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Llama3Rope(Rope):
    """By wavelength, as Llama 3.1 defines it: long waves are slowed down by the factor, short ones kept."""

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
        factor, low, high, original = astuple(self)
        wavelength = 2 * math.pi / freqs
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 1: keep, 0: divide by factor
        return (1 - smooth) * freqs / factor + smooth * freqs


@dataclass(frozen=True)
class LinearRope(Rope):
    """Positions are squeezed together, as in Vicuna 16k and LongChat (Chen et al. 2023, 2306.15595)."""

    factor: float

    def scale(self, freqs: Tensor, theta: float) -> Tensor:
        return freqs / self.factor


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (Peng et al. 2023, 2309.00071): waves that turn more than beta_fast times in the original context
    are kept, those that turn less than beta_slow times slowed down, with a ramp over the pairs between them;
    and queries and keys grow by an attention factor. None: as the factor or the mscales give it."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp begins and ends at whole pairs

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(max(1.0, self.factor))
        if self.mscale and self.mscale_all_dim:
            return (1 + self.mscale * growth) / (1 + self.mscale_all_dim * growth)
        return 1 + growth

    def scale(self, freqs: Tensor, theta: float) -> Tensor:
        low, high = (self.pair(turns, 2 * len(freqs), theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(freqs) - 1)
        width = high - low or 0.001  # a step in place of the ramp
        pairs = torch.arange(len(freqs), dtype=torch.float32, device=freqs.device)
        slowed = ((pairs - low) / width).clamp(0, 1)  # 0: keep, 1: divide by factor
        return slowed * freqs / self.factor + (1 - slowed) * freqs

    def pair(self, turns: float, head_dim: int, theta: float) -> float:
        """The pair, not a whole one, that turns so often in the original context."""
        wavelength = self.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))


# rope_type -> its fields in config.json, and what they do to the frequencies
ROPES = {"llama3": Llama3Rope, "linear": LinearRope, "yarn": YarnRope}
