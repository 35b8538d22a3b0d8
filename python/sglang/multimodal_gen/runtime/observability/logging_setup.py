"""Logging of every process: one line per event on stderr, as text or JSON, without prompts."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.server_args import LoggingArgs


class TextFormatter(logging.Formatter):
    """`[2026-01-31 12:00:00] INFO scheduler: message`."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] %(levelname)s %(module)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, and `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(args: LoggingArgs) -> None:
    """Set up the package's logger in this process; other libraries stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if args.log_format == "json" else TextFormatter())
    package = logging.getLogger("sglang")
    package.handlers[:] = [handler]
    package.setLevel(args.log_level.upper())
    package.propagate = False
