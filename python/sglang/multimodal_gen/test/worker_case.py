"""A worker in the test's own process, spoken to through its pipe."""

from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch

from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker, _error_info
from sglang.multimodal_gen.runtime.managers.messages import Codec
from sglang.multimodal_gen.runtime.managers.preview_source import PreviewSource
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.state_writer import StateWriter
from sglang.multimodal_gen.runtime.managers.worker_adapters import WorkerAdapters
from sglang.multimodal_gen.runtime.managers.worker_channel import Channel
from sglang.multimodal_gen.runtime.managers.worker_messages import FromWorker, StopWorker
from sglang.multimodal_gen.runtime.managers.worker_profiling import WorkerProfiler
from sglang.multimodal_gen.runtime.server_args import ServerArgs


class InProcessWorker:
    """Of a loaded pipeline, with its files in `directory`."""

    def __init__(self, pipeline: Any, directory: Path) -> None:
        (directory / "run").mkdir()
        args = ServerArgs.from_kwargs(model_path="demo", state_dir=str(directory / "state"))
        config = EngineConfig.of_this_process(args, run_dir=str(directory / "run"))
        self.pipeline = pipeline
        self.run_dir = RunDir.at(config.run_dir)
        self.connection, workers_end = Pipe()
        self.channel = Channel(workers_end)
        self.previews = PreviewSource(pipeline, self.run_dir, self.channel.send)
        self.worker = GPUWorker(
            config,
            self.channel,
            pipeline,
            states=StateWriter(self.channel.send),
            profiler=WorkerProfiler(config.profile_dir(), cuda=False),
            previews=self.previews,
            adapters=WorkerAdapters(pipeline.adapters, self.channel.send, error_info=_error_info),
        )

    def give(self, *messages: Any) -> None:
        """Let it take these, and return when it has."""
        for message in (*messages, StopWorker()):
            self.channel.inbox.put(message)
        with torch.inference_mode():
            self.worker.run()

    def take(self, *messages: Any, until: type) -> list[Any]:
        """Its answers to these up to the first one of this type."""
        self.give(*messages)
        answers: list[Any] = []
        while not (answers and isinstance(answers[-1], until)):
            answers.append(Codec(FromWorker).decode(self.connection.recv_bytes()))
        return answers
