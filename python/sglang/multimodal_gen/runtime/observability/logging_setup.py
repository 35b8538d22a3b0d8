"""Logging of every process: one line per event on stderr, as text or JSON, without prompts unless they are asked for.

A line about requests says so with `extra=fields(request_id=…)`: in JSON the fields stand beside the message, in text
the ids stand in brackets before it. So one search for an id finds a request in every process.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.observability.private_texts import PRIVATE_TEXTS

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.server_args import LoggingArgs

LIBRARY_LEVEL = "warning"
"""Of an engine inside a Python program or a command, whose terminal belongs to the user."""
_KEY = "fields"


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """The `extra` of a log call: facts by name. Ids go by the names `request_id` and, for several, `request_ids`."""
    return {_KEY: values}


def log_refusal(logger: logging.Logger, error: ServingError, extra: dict[str, dict[str, Any]]) -> None:
    """A deliberate error. The client's own mistakes are told to the client; of others the sentence is for the log."""
    if error.http_status < 500:
        logger.info("%s", error.code, extra=extra)
    else:
        logger.warning("%s: %s", error.code, error, extra=extra)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, _KEY, {})


class _Formatter(logging.Formatter):
    """What both forms share: warnings, errors and tracebacks lose what users wrote. Lines below never hold any."""

    def __init__(self, *, blot: bool) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._blot = blot

    def _public(self, text: str, record: logging.LogRecord) -> str:
        return PRIVATE_TEXTS.blot(text) if self._blot and record.levelno >= logging.WARNING else text

    def _message(self, record: logging.LogRecord) -> str:
        return self._public(record.getMessage(), record)

    def _traceback(self, record: logging.LogRecord) -> str:
        """Empty when the record has none."""
        return self._public(self.formatException(record.exc_info), record) if record.exc_info else ""


class TextFormatter(_Formatter):
    """`[2026-01-31 12:00:00] INFO scheduler: [request id] message`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record, and its traceback."""
        facts = _fields_of(record)
        ids = [str(i) for i in (facts.get("request_id"), *facts.get("request_ids", ())) if i is not None]
        where = f"[{' '.join(ids)}] " if ids else ""
        stamp = self.formatTime(record, self.datefmt)
        traceback = self._traceback(record)
        name = record.name.rpartition(".")[2] if record.name.startswith("sglang.") else record.name
        line = f"[{stamp}] {record.levelname} {name}: {where}{self._message(record)}"
        return f"{line}\n{traceback}" if traceback else line


class JsonFormatter(_Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, fields, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._message(record),
        }
        entry |= {name: value for name, value in _fields_of(record).items() if name not in entry}
        if traceback := self._traceback(record):
            entry["exception"] = traceback
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(args: LoggingArgs) -> None:
    """Set up logging of this process, which must be one of ours.

    Libraries are heard from `warning` on. Python's warnings and errors that nothing catches become lines as well, so
    that a JSON log holds nothing else.
    """
    handler = logging.StreamHandler(sys.stderr)
    blot = not args.log_prompts
    handler.setFormatter(JsonFormatter(blot=blot) if args.log_format == "json" else TextFormatter(blot=blot))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    package = logging.getLogger("sglang")
    package.handlers[:] = [handler]
    package.setLevel((args.log_level or LIBRARY_LEVEL).upper())
    package.propagate = False
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("sglang").critical("an error that nothing caught", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
