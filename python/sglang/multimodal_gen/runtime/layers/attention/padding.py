"""Text padding: left away where models do not attend to it, computed once where they were trained to.

Padding tokens are all alike, so their keys and values are too, and n equal keys take n times the share of one:
softmax sees that as one key whose score is larger by log n. Exact but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fold_padding(text: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, L, D], where row b's tokens from `lengths[b]` on are padding, all alike -> fewer tokens, and their mask.

    The tokens [B, l, D] keep one of padding where there is any. The mask [B, 1, 1, l] is additive, for the attention of
    anything to these tokens.
    """
    num_tokens = text.shape[1]
    kept = min(max(lengths) + 1, num_tokens)
    mask = torch.zeros(len(lengths), 1, 1, kept, dtype=text.dtype)
    for row, length in enumerate(lengths):
        if length < num_tokens:
            mask[row, ..., length] = math.log(num_tokens - length)
            mask[row, ..., length + 1 :] = -math.inf
    return text[:, :kept], mask.to(text.device)


def drop_padding(text: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """[B, L, D], where row b's tokens from `lengths[b]` on are nothing to attend to -> as few as hold all, and a mask.

    The mask [B, 1, 1, l] is True at a row's own tokens, and None where all rows are equally long.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return text[:, :longest], None
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    return text[:, :longest], mask[:, None, None].to(text.device)
