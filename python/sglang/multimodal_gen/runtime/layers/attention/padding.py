"""Padding of text: left out, alone or by a mask, or folded into one token where models were trained to attend to it.

Folding: padding tokens are all alike, so their keys and values are too, and n equal keys take n times the share of one:
softmax sees that as one key whose score is larger by log n. Exact but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.table_cache import table_cache


def trim_padding(text: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """[B, L, D], where nothing attends to row b's tokens from `lengths[b]` on -> as many as the longest row has.

    The mask [B, 1, 1, l] is True at the tokens that count; None where every row has as many.
    """
    assert len(lengths) == text.shape[0] and min(lengths) > 0, "each row has a length, and a token to attend to"
    kept = min(max(lengths), text.shape[1])
    return text[:, :kept], text_mask(tuple(lengths), kept, 0, text.device)


def fold_padding(text: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, L, D], where row b's tokens from `lengths[b]` on are padding, all alike -> fewer tokens, and their mask.

    The tokens [B, l, D] keep one of padding where there is any. The mask [B, 1, 1, l] is additive, for the attention of
    anything to these tokens.
    """
    mask = _folding_mask(tuple(lengths), text.shape[1], text.dtype, text.device)
    return text[:, : mask.shape[-1]], mask


@table_cache(32)
def _folding_mask(lengths: tuple[int, ...], num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A mask made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        mask = torch.zeros(len(lengths), 1, 1, min(max(lengths) + 1, num_tokens), dtype=dtype)
        for row, length in enumerate(lengths):
            if length < num_tokens:
                mask[row, ..., length] = math.log(num_tokens - length)
                mask[row, ..., length + 1 :] = -math.inf
        return mask.to(device)


@table_cache(32)
def text_mask(
    lengths: tuple[int, ...], num_text_tokens: int, num_image_tokens: int, device: torch.device
) -> Tensor | None:
    """Mask [B, 1, 1, L + S] of text and then image tokens, False at padding: text tokens from `lengths[b]` on.

    None when no row is padded, because kernels without a mask are faster.
    """
    if min(lengths) == num_text_tokens:
        return None
    # A mask made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        positions = torch.arange(num_text_tokens + num_image_tokens, device="cpu")
        padded = (positions >= torch.tensor(lengths).unsqueeze(-1)) & (positions < num_text_tokens)
        return ~padded[:, None, None].to(device)


def drop_padding(text: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """[B, L, D], padding from `lengths[b]` on in row b -> as few tokens as hold all others, and their `text_mask`."""
    longest = max(lengths)
    return text[:, :longest], text_mask(tuple(lengths), longest, 0, text.device)
