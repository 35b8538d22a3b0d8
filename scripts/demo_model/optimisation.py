"""One optimiser step over all parameters as one flat tensor: few kernels, one all-reduce, one file to resume from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Views start at multiples of this many elements, so that every kernel sees aligned memory.
_ALIGNMENT = 64
_MAX_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together, each with a device of its own."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> Ranks:
        """Join the group that `torchrun` started, or stand alone."""
        cuda = torch.cuda.is_available()
        if not dist.is_torchelastic_launched():
            return cls(rank=0, size=1, device=torch.device("cuda:0" if cuda else "cpu"))
        dist.init_process_group("nccl" if cuda else "gloo")
        rank = dist.get_rank()
        device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(device)
        return cls(rank=rank, size=dist.get_world_size(), device=device)

    def mean(self, tensor: Tensor) -> None:
        """Replace by the mean over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)

    def from_first(self, values: list[float]) -> list[float]:
        """The first rank's numbers, on every rank."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return tensor.tolist()

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class FlatParameters:
    """All parameters of some modules, and their gradients, as views of two flat fp32 tensors."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self._places: dict[str, tuple[int, torch.Size]] = {}
        parameters: list[nn.Parameter] = []
        total = 0
        for prefix, module in modules.items():
            module.to(device)
            for name, parameter in module.named_parameters():
                self._places[f"{prefix}.{name}"] = (total, parameter.shape)
                parameters.append(parameter)
                total += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.values = nn.Parameter(torch.zeros(total, device=device))
        self.values.grad = torch.zeros(total, device=device)
        for parameter, (name, view) in zip(parameters, self.views(self.values.detach()).items(), strict=True):
            assert parameter.shape == view.shape, name
            view.copy_(parameter.detach())
            parameter.data = view
        for parameter, gradient in zip(parameters, self.views(self.values.grad).values(), strict=True):
            parameter.grad = gradient

    @property
    def gradient(self) -> Tensor:
        assert self.values.grad is not None
        return self.values.grad

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named parameters as views of a flat tensor with this layout."""
        return {
            name: flat[start : start + math.prod(shape)].view(shape) for name, (start, shape) in self._places.items()
        }


class Optimiser:
    """AdamW with clipping and an average of the weights; a step whose gradient is not finite changes nothing."""

    def __init__(self, modules: Mapping[str, nn.Module], ranks: Ranks, *, betas: tuple[float, float]) -> None:
        self.ranks = ranks
        self.flat = FlatParameters(modules, ranks.device)
        if ranks.size > 1:
            dist.broadcast(self.flat.values.detach(), 0)
        self.average = self.flat.values.detach().clone()
        self.adam = torch.optim.AdamW(
            [self.flat.values], lr=0.0, betas=betas, weight_decay=0.01, fused=ranks.device.type == "cuda"
        )
        self.step_count = 0
        self.elapsed_s = 0.0
        self.skipped = torch.zeros((), device=ranks.device)
        self.gradient_norm = torch.zeros((), device=ranks.device)

    def step(self, learning_rate: float, longest_average: float) -> None:
        """Apply the accumulated gradients and clear them. Nothing here waits for the device.

        The average's decay grows with the step count, up to `longest_average`.
        """
        gradient = self.flat.gradient
        self.ranks.mean(gradient)
        norm = gradient.norm()
        finite = norm.isfinite()
        clipped = gradient * (_MAX_NORM / norm.clamp_min(_MAX_NORM))
        gradient.copy_(torch.where(finite, clipped, torch.zeros_like(clipped)))
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        gradient.zero_()
        self.step_count += 1
        decay = min(longest_average, (1 + self.step_count) / (10 + self.step_count))
        self.average.lerp_(self.flat.values.detach(), 1 - decay)
        self.skipped += ~finite
        self.gradient_norm.copy_(norm)

    def averaged(self, prefix: str) -> dict[str, Tensor]:
        """State dict of one of the modules, with averaged weights (views)."""
        views = self.flat.views(self.average)
        return {name.removeprefix(f"{prefix}."): view for name, view in views.items() if name.startswith(f"{prefix}.")}

    def save(self, path: Path) -> None:
        """Write everything needed to go on. The file is whole or the one from before."""
        part = path.with_suffix(".part")
        state = {
            "values": self.flat.values.detach(),
            "average": self.average,
            "adam": self.adam.state_dict(),
            "step_count": self.step_count,
            "elapsed_s": self.elapsed_s,
        }
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on where `save` was called; without `adam` (a packed state) its moments start anew."""
        state = torch.load(path, map_location=self.ranks.device, weights_only=True)
        self.flat.values.detach().copy_(state["values"])
        self.average.copy_(state["average"])
        if state["adam"] is not None:
            self.adam.load_state_dict(state["adam"])
        self.step_count, self.elapsed_s = state["step_count"], state["elapsed_s"]


def cosine(progress: float, step_count: int, *, peak: float, warmup_steps: int) -> float:
    """Learning rate at a share of the time budget: a short linear start, then a cosine that ends at zero."""
    return peak * min(1.0, (step_count + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
