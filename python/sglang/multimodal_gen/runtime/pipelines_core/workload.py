"""What a benchmark of one component runs: its inputs at a size, and the same forward through us and the reference.

A family lists its workloads in its pipeline class, so that benchmarks know no family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class WorkSize:
    """Pixels, frames, rows and text tokens of a forward.

    `latent_shape` is (C, T, H, W); `chunk_frames` latent frames go through an autoencoder at a time.
    """

    height: int
    width: int
    num_frames: int
    latent_shape: tuple[int, int, int, int]
    batch_size: int
    num_text_tokens: int
    chunk_frames: int


class Drawing:
    """Makes input tensors: random numbers of a seed, or on the meta device shapes alone."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from `low` to below `high`."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.long, device=self.device)
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)

    def full(self, value: float, *shape: int) -> Tensor:
        """The same number everywhere: fp32 whatever the dtype, or whole if the value is."""
        return torch.full(shape, value, device=self.device, dtype=torch.long if isinstance(value, int) else torch.float)


@dataclass(frozen=True)
class Workload:
    """One forward of a component. `component` is its directory in the checkpoint."""

    component: str

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """What both forwards take; `configs` holds those of all native components."""
        raise NotImplementedError

    def embed_steps(self, module: nn.Module, inputs: Inputs) -> Tensor | None:
        """What our module makes of the steps, for modules that compute it for several at once: [B, V]."""
        return None

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor | None:
        """What our module makes of texts, for modules that compute it once for a request: [B, …]."""
        return None

    def prepared(self, module: nn.Module, inputs: Inputs) -> Inputs:
        """The inputs and, behind them, what there is of `embed_steps` and `embed_text`, for many forwards."""
        found = (self.embed_steps(module, inputs), self.embed_text(module, inputs))
        return *inputs, *(tensor for tensor in found if tensor is not None)

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """Through our module; of inputs as they are or `prepared`."""
        raise NotImplementedError

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """The same work through the module of diffusers or transformers."""
        raise NotImplementedError


class TextEncoding(Workload):
    """Token ids to hidden states, every token counting."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Ids [B, L] and lengths [B]."""
        vocab_size: int = configs[self.component].vocab_size  # type: ignore[attr-defined]
        ids = draw.integers(0, vocab_size, size.batch_size, size.num_text_tokens)
        return ids, draw.full(size.num_text_tokens, size.batch_size)

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, L, D]."""
        return module(*inputs)

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, L, D]."""
        return module(inputs[0], attention_mask=torch.ones_like(inputs[0])).last_hidden_state


class VideoDecoding(Workload):
    """Latents to pixels, as many latent frames at a time as the size says; the reference does as it always does."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, T, H, W]."""
        return (draw.normal(size.batch_size, *size.latent_shape),)

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, 3, T, H, W]."""
        return module.decode(inputs[0], chunk_frames=size.chunk_frames)  # type: ignore[operator]

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, 3, T, H, W]."""
        return module.decode(inputs[0], return_dict=False)[0]  # type: ignore[operator]


class VideoEncoding(Workload):
    """Pixels to the mean of their latents, as many latent frames at a time as the size says."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Video [B, 3, T, H, W]."""
        return (draw.normal(size.batch_size, 3, size.num_frames, size.height, size.width),)

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, C, T, H, W]."""
        return module.encode(inputs[0], chunk_frames=size.chunk_frames).mean  # type: ignore[operator]

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, C, T, H, W]."""
        return module.encode(inputs[0]).latent_dist.mean  # type: ignore[operator]


class WholeDecoding(VideoDecoding):
    """Latents to pixels, for an autoencoder that is given whole clips, of which it may make pieces itself."""

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, 3, T, H, W]."""
        return module.decode(inputs[0])  # type: ignore[operator]


class WholeEncoding(VideoEncoding):
    """Pixels to the mean of their latents, likewise."""

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, C, T, H, W]."""
        return module.encode(inputs[0]).mean  # type: ignore[operator]


class PictureDecoding(WholeDecoding):
    """Latents to pixels of whole pictures, which the reference has without a dimension for time."""

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, 3, 1, H, W]."""
        return module.decode(inputs[0].squeeze(2), return_dict=False)[0].unsqueeze(2)  # type: ignore[operator]


class PictureEncoding(WholeEncoding):
    """Pixels of whole pictures to the mean of their latents."""

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, C, 1, H, W]."""
        return module.encode(inputs[0].squeeze(2)).latent_dist.mean.unsqueeze(2)  # type: ignore[operator]
