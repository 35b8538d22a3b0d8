"""What was encoded lately, kept across requests: an LRU bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor


class ConditioningCache:
    """Embeddings of texts and pictures by what they were made of. Values are tensors, or tuples of tensors and plain
    values, which nobody writes into."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The value, which is now the one used last; None for none."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value, and forget those used longest ago until all fit. One that is too large is not kept."""
        size = _num_bytes(value)
        if size > self.max_bytes or key in self._entries:
            return
        self._entries[key] = value
        self.held_bytes += size
        while self.held_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.held_bytes -= _num_bytes(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.held_bytes = 0


def _num_bytes(value: Any) -> int:
    """What the tensors hold: a view keeps the whole of what it is a part of."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(_num_bytes, value)) if isinstance(value, Iterable) and not isinstance(value, str) else 0
