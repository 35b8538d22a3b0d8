"""Weights without a checkpoint: seeded random numbers at a scale that keeps activations finite, for benchmarks."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.shards import shards_of
from sglang.multimodal_gen.runtime.loader.component_loader import DtypeOf
from sglang.multimodal_gen.runtime.loader.quantized_layers import LayerQuantizer
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer, TokenizedText, load_tokenizer

# Drawn once and repeated: real models have billions of numbers, and drawing a billion takes ten seconds of a core. A
# prime, so that the repeats do not line up with rows.
_POOL_SIZE = 1_048_573
_START_TOKEN = 1
# Behind padding, start and unknown, and within the vocabulary of any text encoder.
_WORD_TOKENS = range(3, 35)
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class RandomSource:
    """A ComponentSource that needs configs only. The same seed gives the same numbers on every device."""

    seed: int = 0

    def tensors_for(
        self,
        directory: Path,
        module: nn.Module,
        *,
        dtype_of: DtypeOf,
        device: torch.device,
        quantizer: LayerQuantizer | None = None,
    ) -> dict[str, Tensor]:
        """See ComponentSource."""
        pool = torch.randn(_POOL_SIZE, generator=torch.Generator("cpu").manual_seed(self.seed)).to(device)
        shards, tensors = shards_of(module), {}
        for name, tensor in module.state_dict().items():
            dtype, shard = dtype_of(name) if tensor.is_floating_point() else tensor.dtype, shards.get(name)
            whole = tensor if shard is None else tensor.new_empty(shard.whole_shape(tuple(tensor.shape)))
            filled = self._filled(name, whole, pool, dtype)
            held = None if quantizer is None else quantizer.placed(name, name, filled, shard, dtype)
            if held is not None:
                tensors[name] = held
                continue
            tensors[name] = filled if shard is None else shard.cut(filled).clone()
        return tensors

    def tokenizer(self, directory: Path) -> TextTokenizer:
        """The directory's own where there is one, else a StandInTokenizer."""
        return load_tokenizer(directory) if directory.is_dir() else StandInTokenizer()

    def _filled(self, name: str, like: Tensor, pool: Tensor, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(like.shape, dtype=dtype, device=pool.device)
        flat = tensor.view(-1)
        scale, mean = _scale_and_mean(name, like)
        start = random.Random(f"{self.seed} {name}").randrange(pool.numel())
        filled = 0
        while filled < flat.numel():
            part = pool[start : start + flat.numel() - filled]
            torch.mul(part, scale, out=flat[filled : filled + part.numel()])
            filled, start = filled + part.numel(), 0
        return tensor.add_(mean) if mean else tensor


def _scale_and_mean(name: str, tensor: Tensor) -> tuple[float, float]:
    """Matrices and kernels by their fan-in, factors and spreads around one, all else small around zero."""
    is_norm = name.endswith("gamma") or (name.endswith("weight") and "norm" in name)
    if is_norm or name.endswith("_std"):
        return 0.1, 1.0
    if tensor.ndim < 2:
        return 0.1, 0.0
    return (tensor.numel() / tensor.shape[0]) ** -0.5, 0.0


class StandInTokenizer:
    """A token at the start and one for each word or sign, where a model without a checkpoint has no tokenizer either.

    Equal words get equal ids; unequal ones may, since there are 32 ids. Nothing stands at the end, so that a cut text's
    ids are the first ones of the whole text's: other pipelines cut states in place of ids.
    """

    pad_id = 0

    def __call__(self, text: str, *, max_length: int) -> TokenizedText:
        """See PromptTokenizer."""
        words = [_WORD_TOKENS[crc32(word.encode()) % len(_WORD_TOKENS)] for word in _WORD_OR_SIGN.findall(text)]
        ids = (_START_TOKEN, *words)
        return TokenizedText(ids=ids[:max_length], num_tokens=len(ids))
