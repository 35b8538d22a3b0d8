"""The scheduler's side of the output process, and the ledger of files that are under way."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import cast

import zmq

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.managers.messages import MappedArray, MediaInputs, Message, encode
from sglang.multimodal_gen.runtime.managers.output_messages import OutputDone, RemoveOutput, ToOutput
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir

# Files that may have been mapped before anybody looks whether they were.
_UNSETTLED = 256


@dataclass
class OutputLink:
    """Sends to the output process; holds messages back until it has said hello."""

    socket: zmq.Socket[bytes]
    connected: bool = False
    _backlog: deque[bytes] = field(default_factory=deque)

    def send(self, message: ToOutput) -> None:
        """In order, never blocking."""
        self._backlog.append(encode(cast(Message, message)))
        self.flush()

    def remove(self, done: OutputDone) -> None:
        """An output that nobody waits for any more: an upload goes on after its request was cancelled."""
        paths = (done.output_file_path, done.thumbnail_path, done.contact_sheet_path)
        self.send(
            RemoveOutput(
                request_id=done.request_id,
                paths=tuple(path for path in paths if path is not None),
                keys=tuple(file.key for file in done.stored.values()),
            )
        )

    def greeted(self) -> bool:
        """An output process said hello; whether an earlier one had been there before it."""
        again, self.connected = self.connected, True
        if again:
            self._backlog.clear()
        self.flush()
        return again

    def flush(self) -> None:
        """Send what is held back, as far as the socket takes it."""
        while self.connected and self._backlog:
            try:
                self.socket.send(self._backlog[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._backlog.popleft()


@dataclass
class Ledger:
    """Mapped files by name, with the request they belong to, until their receiver has mapped them; and the files of
    requests' inputs, which nobody unlinks but the ledger at the request's end."""

    run_dir: RunDir
    _files: dict[str, tuple[str, MappedArray]] = field(default_factory=dict)
    _inputs: dict[str, MediaInputs] = field(default_factory=dict)
    _input_files: Counter[str] = field(default_factory=Counter)
    _strike_out_at: int = 0

    def add(self, request_id: str, *arrays: MappedArray | None) -> None:
        """Files that some process wrote for another one."""
        for array in arrays:
            if array is not None and array.content is None:
                self._files[array.file] = (request_id, array)
        if len(self._files) > self._strike_out_at:
            self.settle()

    def drop_request(self, request_id: str) -> None:
        """Unlink whatever is left of a request that nobody waits for, but its inputs: it may run again."""
        for array in [array for owner, array in self._files.values() if owner == request_id]:
            self.run_dir.discard(array)
            del self._files[array.file]

    def keep_inputs(self, request_id: str, inputs: MediaInputs | None) -> None:
        """Own a request's inputs from its arrival on."""
        if inputs is not None:
            self._inputs[request_id] = inputs
            self._input_files.update(array.file for array in inputs.arrays)

    def inputs_of(self, request_id: str) -> MediaInputs | None:
        """The inputs of a request that has not ended."""
        return self._inputs.get(request_id)

    def drop_inputs(self, request_id: str) -> None:
        """The request has ended: unlink its inputs."""
        inputs = self._inputs.pop(request_id, None)
        if inputs is not None:
            for array in inputs.arrays:
                self._input_files[array.file] -= 1
                if not self._input_files[array.file]:
                    del self._input_files[array.file]
            self.refuse_inputs(inputs)

    def refuse_inputs(self, inputs: MediaInputs | None) -> None:
        """Unlink what came with a message that is not taken, as far as it is no other request's."""
        for array in () if inputs is None else inputs.arrays:
            if array.file not in self._input_files and array.file not in self._files:
                with contextlib.suppress(StorageError):  # a name that is none
                    self.run_dir.discard(array)

    def settle(self) -> tuple[int, int]:
        """Strike out files that were mapped; how many files and elements are left."""
        for file in [name for name in self._files if not self.run_dir.exists(name)]:
            del self._files[file]
        self._strike_out_at = 2 * len(self._files) + _UNSETTLED
        sizes = [math.prod(array.shape) for _, array in self._files.values()]
        sizes += [math.prod(array.shape) for inputs in self._inputs.values() for array in inputs.arrays]
        return len(sizes), sum(sizes)
