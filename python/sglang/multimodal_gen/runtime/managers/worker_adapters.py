"""A worker's side of adapters: files are read beside what runs, and what needs them waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource
from sglang.multimodal_gen.runtime.managers.messages import Message
from sglang.multimodal_gen.runtime.managers.worker_messages import ForgetLora, LoadLora, LoraDone, MergeLora
from sglang.multimodal_gen.runtime.pipelines_core.adapters import Adapter, Adapters


class WorkerAdapters:
    """Takes the scheduler's messages in the order of the pipe; answers each once."""

    def __init__(
        self,
        adapters: Adapters,
        send: Callable[[Message], None],
        *,
        error_info: Callable[[Exception], ErrorInfo],
    ) -> None:
        """`error_info`: what travels of an error."""
        self._adapters = adapters
        self._send = send
        self._error_info = error_info
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="lora")
        self._reads: dict[str, Future[Adapter]] = {}
        self._unmerged: Exception | None = None

    def take(self, message: LoadLora | ForgetLora | MergeLora) -> None:
        """Begin to read, forget, or merge."""
        if isinstance(message, LoadLora):
            self._load(message)
        elif isinstance(message, ForgetLora):
            self._reads.pop(message.adapter_id, None)
            self._adapters.forget(message.adapter_id)
        else:
            self._merge(message)

    def wait_for(self, adapter_ids: Iterable[str]) -> None:
        """Until these are read. Raises the error of the one that could not be, or that of what should be merged."""
        if self._unmerged is not None:
            raise self._unmerged
        for adapter_id in adapter_ids:
            if (reading := self._reads.get(adapter_id)) is not None:
                self._adapters.loaded[adapter_id] = reading.result()
                del self._reads[adapter_id]

    def _load(self, message: LoadLora) -> None:
        if message.adapter_id in self._adapters.loaded:
            self._send(LoraDone(query_id=message.query_id))
            return
        reading = self._reads.get(message.adapter_id)
        if reading is None:
            source = LoraSource(path=message.path, weight_name=message.weight_name, alpha=message.alpha)
            reading = self._reads[message.adapter_id] = self._reading.submit(
                self._adapters.read, source, message.target
            )
        reading.add_done_callback(lambda done: self._answer(message.query_id, done))

    def _answer(self, query_id: str, done: Future[Adapter]) -> None:
        error = done.exception()
        if isinstance(error, Exception):
            self._send(LoraDone(query_id=query_id, error=self._error_info(error)))
        else:
            self._send(LoraDone(query_id=query_id, notes=done.result().notes))

    def _merge(self, message: MergeLora) -> None:
        """One that nobody waits for is what was merged before this process: without it no request may run."""
        self._unmerged = None
        try:
            self.wait_for(adapter_id for adapter_id, _ in message.uses)
            self._adapters.merge_ids(message.uses)
        except Exception as error:
            self._unmerged = None if message.query_id else error
            self._send(LoraDone(query_id=message.query_id, error=self._error_info(error)))
        else:
            self._send(LoraDone(query_id=message.query_id))
