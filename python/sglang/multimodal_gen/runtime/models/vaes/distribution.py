"""What a variational encoder gives. Source: arXiv:1312.6114.

Shapes: B batch, Z latent channels, t, h, w latent frames, height, width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LatentDistribution(NamedTuple):
    """Normal distribution over the latents, not yet normalised; both tensors [B, Z, t, h, w]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of_moments(cls, moments: Tensor) -> LatentDistribution:
        """[B, 2·Z, t, h, w], means before logarithms of variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw. A CPU generator gives the same noise on every device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def chosen(self, generator: torch.Generator | None) -> Tensor:
        """The most likely latents, or with a generator a draw."""
        return self.mean if generator is None else self.sample(generator)
