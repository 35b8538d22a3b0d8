"""A benchmark's child that takes ReferenceCalls and answers none of them."""

from __future__ import annotations

import threading

import msgspec

from sglang.multimodal_gen.runtime.bench.messages import ReferenceCall, StartupTask
from sglang.multimodal_gen.runtime.bench.worker.reporting import take_task, watch_parent


def main() -> None:
    """Entry point of the process, which ends when its parent does or when it reads what it does not know."""
    connection, _ = take_task(StartupTask)
    decoder = msgspec.msgpack.Decoder(ReferenceCall)
    watch_parent(connection, decoder.decode).tell("waiting")
    threading.Event().wait()


if __name__ == "__main__":
    main()
