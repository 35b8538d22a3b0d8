"""Jobs that outlive every process: one row each in SQLite, written before a client learns of its job.

The columns beside the record are what is searched and what other processes' versions can read; the record itself is
msgpack. Write-ahead logging keeps what was committed when a process is killed, `synchronous=FULL` when the power fails.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ErrorInfo, InsufficientStorage, StorageError

logger = logging.getLogger(__name__)

_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    record BLOB NOT NULL
);
CREATE TABLE replies (
    key TEXT PRIMARY KEY,
    fingerprint BLOB NOT NULL,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    reply BLOB NOT NULL
);
"""
_BUSY_S = 5.0
Webhook = Literal["none", "due", "sent", "given_up"]


class VideoJob(msgspec.Struct, frozen=True, kw_only=True):
    """One video as the server keeps it. Times in unix seconds; `progress` in percent, 100 only when it is complete.

    `file_name` is that of the result, `profile` that of its trace: bare names. `num_bytes` counts all files of the
    result, wherever they are. `has_inputs`: what the job starts from lies beside the database, `num_input_bytes` of it
    until the job is final. `lora`: the adapters that it was accepted with, None before. `webhook` says whether somebody
    is still to be told of the end. `eta_s` and `queue_position`, the jobs before it, are of the moment.
    """

    id: str
    model: str
    params: SamplingParams
    created_at: int
    file_name: str
    owner: str = ""
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    eta_s: float | None = None
    queue_position: int | None = None
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    generation_time: float | None = None
    queue_seconds: float | None = None
    peak_memory_mb: float | None = None
    computed_steps: int | None = None
    profile: str | None = None
    error: ErrorInfo | None = None
    notes: tuple[str, ...] = ()
    attempts: int = 1
    safety_identifier: str | None = None
    remixed_from: str | None = None
    has_inputs: bool = False
    num_input_bytes: int = 0
    num_bytes: int = 0
    webhook: Webhook = "none"
    lora: tuple[LoraUse, ...] | None = None

    @property
    def is_final(self) -> bool:
        """No event will change it any more."""
        return self.status in ("completed", "failed")


class KeptReply(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to the call that created a job under an idempotency key."""

    key: str
    fingerprint: bytes
    reply: bytes


def prepare_job_store(path: Path) -> None:
    """Make the database, or find that it is one of ours. Raises StorageError."""
    with contextlib.closing(JobStore(path)):
        pass


class JobStore:
    """The open database. All calls belong to the thread that made it."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError: no database of ours, of a later version, or not readable."""
        self._path = path
        with _as_storage_error(path):
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        run("PRAGMA foreign_keys=ON")
        [version] = run("PRAGMA user_version").fetchone()
        if version == 0:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")
        elif version != _VERSION:
            text = f"state_dir: {self._path} is of version {version}; this release reads version {_VERSION}"
            raise StorageError(text, param="state_dir")

    def close(self) -> None:
        """Write everything into the one file."""
        self._connection.close()

    def insert(self, job: VideoJob, reply: KeptReply | None = None) -> None:
        """Keep a new job and the reply that tells of it, both or none. They are on disk when this returns.

        Raises:
            InsufficientStorage: the disk is full.
            StorageError: it cannot be written.
        """
        run = self._connection.execute
        with _as_storage_error(self._path), self._transaction():
            run(
                "INSERT INTO jobs (id, status, created_at, expires_at, record) VALUES (?, ?, ?, ?, ?)",
                (job.id, job.status, job.created_at, job.expires_at, msgspec.msgpack.encode(job)),
            )
            if reply is not None:
                run(
                    "INSERT OR REPLACE INTO replies (key, fingerprint, job_id, reply) VALUES (?, ?, ?, ?)",
                    (reply.key, reply.fingerprint, job.id, reply.reply),
                )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def update(self, job: VideoJob, *, synced: bool = True) -> None:
        """Keep what a job has become; one that was deleted stays so. What is not `synced` outlives this process but not
        a power failure, for a small part of the time. Raises as `insert` does."""
        run = self._connection.execute
        with _as_storage_error(self._path):
            if not synced:
                run("PRAGMA synchronous=NORMAL")
            try:
                run(
                    "UPDATE jobs SET status = ?, expires_at = ?, record = ? WHERE id = ?",
                    (job.status, job.expires_at, msgspec.msgpack.encode(job), job.id),
                )
            finally:
                if not synced:
                    run("PRAGMA synchronous=FULL")

    def delete(self, job_id: str) -> None:
        """Forget a job, and the reply that told of it. Raises as `insert` does."""
        with _as_storage_error(self._path):
            self._connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def load(self) -> tuple[list[VideoJob], list[str]]:
        """All jobs in order of creation, and the ids of those that this release cannot read: they are left alone, with
        a line in the log."""
        with _as_storage_error(self._path):
            rows = self._connection.execute("SELECT id, record FROM jobs ORDER BY number").fetchall()
        jobs, unreadable = [], []
        for job_id, record in rows:
            try:
                jobs.append(msgspec.msgpack.decode(record, type=VideoJob))
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                logger.error("job %s cannot be read by this release: %s", job_id, error)
                unreadable.append(job_id)
        return jobs, unreadable

    def replies(self) -> list[KeptReply]:
        """All kept replies, the oldest job's first."""
        with _as_storage_error(self._path):
            rows = self._connection.execute(
                "SELECT key, fingerprint, reply FROM replies JOIN jobs ON jobs.id = job_id ORDER BY number"
            ).fetchall()
        return [KeptReply(key=key, fingerprint=fingerprint, reply=reply) for key, fingerprint, reply in rows]


@contextlib.contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            raise InsufficientStorage("the server's disk is full; the job was not accepted") from error
        text = f"state_dir: {path} cannot be used as the database of jobs ({error}); move it away or repair it"
        raise StorageError(text, param="state_dir") from error
