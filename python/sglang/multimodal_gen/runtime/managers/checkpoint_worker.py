"""Writes a quantised model in a process of its own: `python -m sglang.multimodal_gen.runtime.managers.checkpoint_worker
FD`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from sglang.multimodal_gen.errors import InternalError, ServingError
from sglang.multimodal_gen.registry import read_model_index
from sglang.multimodal_gen.runtime.loader.component_loader import NativeModule
from sglang.multimodal_gen.runtime.loader.quantization_wishes import check_wishes
from sglang.multimodal_gen.runtime.loader.quantized_checkpoint import write_quantized
from sglang.multimodal_gen.runtime.loader.quantized_layers import takes_quantization
from sglang.multimodal_gen.runtime.managers.checkpoint_task import (
    FromQuantizer,
    QuantizedComponent,
    QuantizeDone,
    QuantizeFailed,
    QuantizeTask,
    Telling,
)
from sglang.multimodal_gen.runtime.managers.child_process import exit_with_parent, inherited_connection
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.pipelines_core import find_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.memory import is_out_of_memory, model_too_large
from sglang.multimodal_gen.runtime.pipelines_core.placement import place

logger = logging.getLogger("sglang.multimodal_gen.runtime.managers")


class _Parent:
    def __init__(self) -> None:
        self.connection = inherited_connection()
        self.task = msgspec.msgpack.decode(self.connection.recv_bytes(), type=QuantizeTask)
        exit_with_parent(self.connection, lambda _: None, cleanup=lambda: None)

    def send(self, message: FromQuantizer) -> None:
        self.connection.send_bytes(msgspec.msgpack.encode(message))

    def tell(self, detail: str) -> None:
        self.send(Telling(detail=detail))


def _write(parent: _Parent) -> QuantizeDone:
    args = parent.task.engine.args
    resolved, pipeline_class = find_pipeline(args.model, report=parent.tell)
    check_wishes(args.execution, pipeline_class.components)
    assert resolved.local_path is not None, "found with its directory"
    index = read_model_index(resolved.local_path)
    components = {
        name: load
        for name, load in pipeline_class.components.items()
        if isinstance(load, NativeModule)
        and takes_quantization(load.module_class)
        and not pipeline_class.leaves_out(name, index)
    }
    device = place(args.execution).device
    try:
        written = write_quantized(
            resolved.local_path, Path(parent.task.target), components, args.execution, device=device, tell=parent.tell
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise model_too_large(device) from error
        raise
    return QuantizeDone(
        components=tuple(
            QuantizedComponent(
                component=each.component,
                num_layers=each.num_layers,
                bytes_before=each.bytes_before,
                bytes_after=each.bytes_after,
            )
            for each in written
        )
    )


def main() -> None:
    """Entry point of the process."""
    parent = _Parent()
    configure_logging(parent.task.engine.args.logging)
    parent.task.engine.apply()
    try:
        parent.send(_write(parent))
    except ServingError as error:
        parent.send(QuantizeFailed(error=error.info()))
        sys.exit(1)
    except Exception as error:
        logger.exception("a model could not be quantised")
        text = f"the model could not be quantised ({type(error).__name__}); the lines above say where"
        parent.send(QuantizeFailed(error=InternalError(text).info()))
        sys.exit(1)


if __name__ == "__main__":
    main()
