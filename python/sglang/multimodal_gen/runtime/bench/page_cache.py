"""How fast the files of a checkpoint are read where they are cached already: what loading is measured against."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

_BLOCK_BYTES = 8 << 20
_MOST_THREADS = 8


class PageCacheRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The second reading of the files into memory that is used again and again, by one thread and by several."""

    num_bytes: int
    num_threads: int
    bytes_per_second_of_one: float
    bytes_per_second: float


def page_cache_rate(files: Sequence[Path]) -> PageCacheRate:
    """Reads each file once, so that it is cached as far as the memory goes, and then again. Raises OSError."""
    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    _read(files, num_threads)
    num_bytes, seconds = _read(files, num_threads)
    _, seconds_of_one = _read(files, 1)
    return PageCacheRate(
        num_bytes=num_bytes,
        num_threads=num_threads,
        bytes_per_second_of_one=num_bytes / seconds_of_one,
        bytes_per_second=num_bytes / seconds,
    )


def weight_files(directory: Path) -> list[Path]:
    """Those of all components of a checkpoint."""
    return sorted(directory.glob("*/*.safetensors"))


def _read(files: Sequence[Path], num_threads: int) -> tuple[int, float]:
    """Bytes and seconds."""
    blocks = [(file, offset) for file in files for offset in range(0, file.stat().st_size, _BLOCK_BYTES)]
    failures: list[OSError] = []
    totals = [0] * num_threads

    def read(thread: int) -> None:
        buffer = bytearray(_BLOCK_BYTES)
        try:
            for file, offset in blocks[thread::num_threads]:
                with file.open("rb", buffering=0) as stream:
                    totals[thread] += os.preadv(stream.fileno(), [buffer], offset)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(num_threads)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(totals), time.perf_counter() - begin
