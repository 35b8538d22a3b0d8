"""`SteppedCall`: a library's call that stops after each of its steps until it is told to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

StepEnd = Callable[[Tensor | None], None]
"""Called by the library's call at the end of a step, with the latents if they can be had."""


class _Closed(BaseException):
    """Ends the call from within; no `except Exception` of the library may catch it."""


class SteppedCall:
    """A call in a thread of its own that runs only while `advance` waits for it.

    So there is never more than one thread at work, and the call sees the world as it left it.
    """

    def __init__(self, call: Callable[[StepEnd], Any], *, device: torch.device) -> None:
        """`call` gets what it must call at the end of each step; nothing runs before `advance`."""
        self.result: Any = None
        self.latents: Tensor | None = None
        self.num_steps = 0
        self.is_over = False
        self._call = call
        self._device = device
        self._stop_at: int | None = 0
        self._is_closing = False
        self._error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="stepped-call", daemon=True)
        self._thread.start()

    def advance(self, num_steps: int | None) -> None:
        """Run until the call has done so many steps in all, or has ended; None: to its end. Raises what it raises."""
        if self.is_over or (num_steps is not None and num_steps <= self.num_steps):
            return
        self._stop_at = num_steps
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            # Kept here, its traceback would keep what the call had allocated.
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """End the call where it stands, and its thread. Idempotent."""
        if not self.is_over:
            self._is_closing = True
            self._go.release()
        self._thread.join()
        self.result = self.latents = None

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._is_closing:
                # Both belong to a thread, not to the process.
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                with torch.inference_mode():
                    self.result = self._call(self._step_ended)
        except _Closed:
            pass
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        self.is_over = True
        self._stopped.release()

    def _step_ended(self, latents: Tensor | None) -> None:
        self.num_steps += 1
        self.latents = latents
        if self._stop_at is None or self.num_steps < self._stop_at:
            return
        self._stopped.release()
        self._go.acquire()
        if self._is_closing:
            raise _Closed
