"""What a load test sends, and when: the same options give the same requests at the same moments."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.runtime.bench.load.prompts import PROMPTS
from sglang.multimodal_gen.runtime.entrypoints.prompt_file import read_bodies

DEFAULT_NUM_REQUESTS = 20
BODY_OPTIONS = ("num_frames", "fps", "num_inference_steps", "guidance_scale")
"""Parameters of a generation that are most often given; all others go into --extra-body."""
_SIZE = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
_SHARE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")

SizeMix = tuple[tuple[str, float], ...]
"""Sizes as WIDTHxHEIGHT, each with a share above 0; shares need not add up to 1."""


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """One request. `due_s` is when it arrives, since the start; None where it is sent as soon as another has ended."""

    number: int
    prompt: int
    body: Mapping[str, Any]
    due_s: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All requests. `bodies` are taken in turn, with what `common` says where they do not say it themselves."""

    bodies: Sequence[Mapping[str, Any]]
    common: Mapping[str, Any]
    size_mix: SizeMix
    request_rate: float | None
    num_requests: int | None
    duration_s: float | None
    seed: int

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Plan:
        """Raises UsageError when the file of prompts cannot be used."""
        file = options["prompts_file"]
        streaming = {"stream": True, "partial_images": options["partial_images"]} if options["partial_images"] else {}
        named = {} if options["model"] is None else {"model": options["model"]}
        of_generation = {name: options[name] for name in BODY_OPTIONS if options[name] is not None}
        num_requests = options["num_requests"]
        if num_requests is None and options["duration"] is None:
            num_requests = DEFAULT_NUM_REQUESTS
        return cls(
            bodies=read_bodies(file, flag="--prompts-file") if file else [{"prompt": text} for text in PROMPTS],
            common=named | of_generation | streaming | (options["extra_body"] or {}),
            size_mix=read_size_mix(options["size_mix"]) if options["size_mix"] else (),
            request_rate=options["request_rate"],
            num_requests=num_requests,
            duration_s=options["duration"],
            seed=options["seed"],
        )

    def requests(self) -> Iterator[PlannedRequest]:
        """Those that are counted; with a duration and no number, as many as somebody takes."""
        numbers = itertools.count() if self.num_requests is None else range(self.num_requests)
        sizes = self._sizes()
        moments = self._moments()
        for number in numbers:
            due_s = next(moments)
            if due_s is not None and self.duration_s is not None and due_s > self.duration_s:
                return
            yield self._request(number, next(sizes), due_s)

    def warm_ups(self, number: int) -> Iterator[PlannedRequest]:
        """`number` requests before the others; each size has its turn, since each may be slow the first time."""
        sizes = itertools.cycle([size for size, _ in self.size_mix] or [None])
        return (self._request(index, next(sizes), None) for index in range(number))

    def _request(self, number: int, size: str | None, due_s: float | None) -> PlannedRequest:
        prompt = number % len(self.bodies)
        body = {**({} if size is None else {"size": size}), **self.common, **self.bodies[prompt]}
        given = {name: value for name, value in body.items() if value is not None}
        return PlannedRequest(number=number, prompt=prompt, body=given, due_s=due_s)

    def _sizes(self) -> Iterator[str | None]:
        # A generator of its own for each purpose: another rate leaves the sizes as they are.
        chance = random.Random(f"{self.seed} sizes")
        names, shares = [size for size, _ in self.size_mix], [share for _, share in self.size_mix]
        while True:
            yield chance.choices(names, shares)[0] if names else None

    def _moments(self) -> Iterator[float | None]:
        """Of a Poisson process: the gaps are exponential."""
        chance, now = random.Random(f"{self.seed} arrivals"), 0.0
        while True:
            if self.request_rate is None:
                yield None
            else:
                now += chance.expovariate(self.request_rate)
                yield now


def read_size_mix(text: str) -> SizeMix:
    """`256x256:0.7,512x512:0.3` as pairs; a size without a share has 1. Empty when the text is no such thing."""
    mix: list[tuple[str, float]] = []
    for item in text.split(","):
        size, colon, share = item.strip().partition(":")
        if not _SIZE.fullmatch(size) or (colon and not _SHARE.fullmatch(share)):
            return ()
        mix.append((size, float(share) if colon else 1.0))
    return tuple(mix) if all(share > 0 for _, share in mix) and len(dict(mix)) == len(mix) else ()
