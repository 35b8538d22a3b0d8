"""Whose turn it is: classes of requests share the device's time by weighted virtual time.

A class is a priority and a size of work, so that short requests share with long ones as one class with another, however
many there are of each. Its account runs ahead by the seconds that its units take over its weight, and the class whose
account is furthest behind is served next. So a class that always has work gets its weight's share of the time, at least
the smallest weight over the sum of all: none starves. Source: start-time fair queueing (Goyal, Vin, Cheng, 1996).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams

_WEIGHT_PER_PRIORITY = 2.0
# Requests whose work differs by less than about eightfold are of one class.
_BITS_PER_SIZE = 3


class ShareClass(NamedTuple):
    """What requests are first come, first served among themselves."""

    priority: int = 0
    size: int = 0

    @classmethod
    def of(cls, params: SamplingParams) -> ShareClass:
        """That of a request with these complete parameters."""
        return cls(params.priority, params.cost.bit_length() // _BITS_PER_SIZE)

    @property
    def weight(self) -> float:
        """Its share beside others'."""
        return float(_WEIGHT_PER_PRIORITY**self.priority)


@dataclass(eq=False)
class Account:
    """What one class has had: `virtual_s` are seconds of the device over the class's weight."""

    share_class: ShareClass = field(default_factory=ShareClass)
    virtual_s: float = 0.0

    def charge(self, seconds: float) -> None:
        """The class had the device for so long."""
        self.virtual_s += seconds / self.share_class.weight

    @property
    def turn(self) -> tuple[float, int]:
        """The least is served next."""
        return self.virtual_s, -self.share_class.priority


@dataclass
class FairShare:
    """The accounts of all classes. `now_s` is the virtual time at which the last turn began."""

    now_s: float = 0.0
    _accounts: dict[ShareClass, Account] = field(default_factory=dict)

    def account(self, share_class: ShareClass) -> Account:
        """That of a class; a new one begins now."""
        found = self._accounts.get(share_class)
        if found is None:
            found = self._accounts[share_class] = Account(share_class, self.now_s)
        return found

    def begin_turn(self, ready: Collection[Account]) -> None:
        """These classes have work. One that had none meanwhile has saved nothing up."""
        for account in ready:
            account.virtual_s = max(account.virtual_s, self.now_s)
        self.now_s = min((account.virtual_s for account in ready), default=self.now_s)
