"""The lines that follow a request through its life, in the scheduler's log. They hold no prompt unless asked to."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sglang.multimodal_gen.runtime.observability.logging_setup import fields


@dataclass(frozen=True, kw_only=True)
class FinishedFacts:
    """What a finished request tells. `batch` is the mean number of requests that shared its steps; `pixels` are all
    those of its frames, 0 when it stopped at the latents."""

    seconds: float
    queue_seconds: float
    steps: int
    computed_steps: int
    batch: float
    attempts: int
    stage_seconds: dict[str, float]
    peak_memory_bytes: int
    pixels: int
    warmup_excluded: bool


class RequestLog:
    """One method per transition; the terminal ones carry `outcome`."""

    def __init__(self, logger: logging.Logger, *, log_prompts: bool) -> None:
        self._logger = logger
        self._log_prompts = log_prompts

    def received(self, request_id: str, *, prompt: str, num_before: int) -> None:
        """It waits behind `num_before` others."""
        facts = {"request_id": request_id, "num_before": num_before, "prompt_characters": len(prompt)}
        if self._log_prompts:
            self._info("received, %d before it: %r", num_before, prompt, prompt=prompt, **facts)
        else:
            self._info("received, %d before it", num_before, **facts)

    def started(self, request_id: str, *, queue_seconds: float) -> None:
        """The workers hold it."""
        facts = {"request_id": request_id, "queue_seconds": round(queue_seconds, 4)}
        self._info("started after %.3f s in the queue", queue_seconds, **facts)

    def finished(self, request_id: str, facts: FinishedFacts) -> None:
        """Its output is complete. The form of the second line is fixed, since scripts read it."""
        self._info(
            "finished: %d steps, %.1f requests a step, %.3f s in the queue, attempt %d",
            *(facts.steps, facts.batch, facts.queue_seconds, facts.attempts),
            request_id=request_id,
            outcome="finished",
            seconds=round(facts.seconds, 4),
            queue_seconds=round(facts.queue_seconds, 4),
            steps=facts.steps,
            computed_steps=facts.computed_steps,
            batch=round(facts.batch, 2),
            attempts=facts.attempts,
            stage_seconds={stage: round(seconds, 4) for stage, seconds in facts.stage_seconds.items()},
            peak_memory_bytes=facts.peak_memory_bytes,
            pixels=facts.pixels,
            warmup_excluded=facts.warmup_excluded,
        )
        if facts.pixels:
            excluded = " (warmup excluded)" if facts.warmup_excluded else ""
            line = f"Pixel data generated successfully in %.4f seconds{excluded}"
            self._info(line, facts.seconds, request_id=request_id)

    def refused(self, request_id: str, *, code: str) -> None:
        """It was not taken."""
        self._info("refused: %s", code, request_id=request_id, outcome="refused", code=code)

    def failed(self, request_id: str, *, code: str, seconds: float) -> None:
        """It ended with an error. The sentence stays out: it may quote what the client wrote."""
        facts = {"request_id": request_id, "outcome": "failed", "code": code, "seconds": round(seconds, 4)}
        self._info("failed after %.3f s: %s", seconds, code, **facts)

    def cancelled(self, request_id: str, *, reason: str, seconds: float) -> None:
        """It was stopped."""
        facts = {"request_id": request_id, "outcome": "cancelled", "reason": reason, "seconds": round(seconds, 4)}
        self._info("cancelled after %.3f s: %s", seconds, reason, **facts)

    def requeued(self, request_id: str, *, reason: str, attempts: int) -> None:
        """It left its worker and waits again."""
        self._info("back in the queue: %s", reason, request_id=request_id, reason=reason, attempts=attempts)

    def _info(self, message: str, *values: object, **facts: object) -> None:
        self._logger.info(message, *values, extra=fields(**facts))
