"""The audit log: one JSON line for each steering decision that an answer was given under, and for each change of what decides.
Append-only, written by a thread.

A line is handed to the operating system at once, so it outlives the process; the disk is made to hold it (`fsync`) once a
second at most, at each rotation and at the end, so a power cut costs a second. What cannot be written is kept and tried again
each second; the server says so, and with `required` it takes no new requests until it can.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.answers.generation import Generation
    from server.observability.account import RequestAccount

RETRY_S = SYNC_S = 1.0
CLOSE_S = 5.0  # how long the end of the server waits for what is not written yet
CAPACITY = 10_000  # records that may wait
REMIND_S = 60.0
logger = logging.getLogger("finesteer")


class AuditLogError(Exception):
    """The file cannot be opened for writing; says why."""


class AuditLog:
    """Writes records to a file, and rotates it: FILE.1 is the newest old one, FILE.`keep` the oldest. Safe from any thread.

    Args:
        max_bytes: a file that would grow beyond this is rotated first.
        required: see `refusal`; and what waits is never given up for want of room.
        capacity: records that may wait to be written.
    Raises:
        AuditLogError: on construction.

    Attributes:
        num_records: written. `num_failures`: attempts to write that failed. `num_lost`: records given up.
    """

    def __init__(
        self, path: Path, *, max_bytes: int, keep: int, required: bool = False, capacity: int = CAPACITY
    ) -> None:
        self.num_records = self.num_failures = self.num_lost = 0
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self._required, self._capacity = required, capacity
        self._failure: str | None = None
        self._waiting: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._told_s: dict[str, float] = {}
        self._unsynced_since_s: float | None = None
        self._torn = False
        self._file = -1
        try:
            self._open()
        except OSError as error:
            raise AuditLogError(f"{path}: cannot be written ({error.strerror}).") from error
        self._thread = threading.Thread(target=self._run, name="audit-log", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why records are not being written now, or None."""
        return self._failure

    @property
    def refusal(self) -> str | None:
        """Why no new request may be answered, or None: only where the log is required."""
        if not self._required:
            return None
        if self._failure is None and len(self._waiting) >= self._capacity:
            return f"{len(self._waiting)} records wait to be written"
        return self._failure

    def put(self, account: RequestAccount) -> None:
        """Have a request's decisions written, one line each. Returns at once."""
        for generation in account.generations:
            if generation.decision is not None:
                self._put(json.dumps(record(account, generation)).encode() + b"\n")

    def tell(self, event: str, **fields: Any) -> None:
        """Have something written that is no decision and changes later ones: who loaded which profile, say."""
        self._put(json.dumps({"time": _utc(time.time()), "event": event} | fields).encode() + b"\n")

    def flush(self, timeout_s: float) -> bool:
        """Whether all that waits is written within that time; no sooner than it fails."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._failure is not None, timeout_s)
            return not self._waiting and self._failure is None

    def close(self) -> None:
        """Write what waits, for `CLOSE_S` at most, and end. Says what is lost. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        with self._changed:
            lost, self._waiting = len(self._waiting), deque()
            self.num_lost += lost
        if lost:
            logger.error("the audit log %s: %d records are lost, since the server ends", self._path, lost)

    def _put(self, line: bytes) -> None:
        with self._changed:
            if self._closing or (not self._required and len(self._waiting) >= self._capacity):
                self.num_lost += 1
                self._remind("%s: a record is lost, since %d wait to be written already", len(self._waiting))
                return
            self._waiting.append(line)
            self._changed.notify()

    def _remind(self, message: str, *arguments: object) -> None:
        """Log an error, but the same not more than once a minute while it lasts."""
        now = time.monotonic()
        if now - self._told_s.get(message, -math.inf) >= REMIND_S:
            self._told_s[message] = now
            logger.error("the audit log " + message, self._path, *arguments)

    # -- the writer's thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._closing:
                    self._changed.wait(None if self._unsynced_since_s is None else SYNC_S)
                lines, ending = self._next_lines(), self._closing
            try:
                self._write(lines)
                self._written(len(lines))
                if ending or time.monotonic() - (self._unsynced_since_s or math.inf) >= SYNC_S:
                    self._sync()
            except OSError as error:
                self._failed(error)
                if ending:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)
                continue
            self._recovered()
            if ending and not self._waiting:
                os.close(self._file)
                return

    def _next_lines(self) -> Sequence[bytes]:
        """Those that go into the file together: as many as it has room for, one at least; one by one while it fails."""
        lines: list[bytes] = []
        room = self._max_bytes - self._size
        for line in self._waiting:
            room -= len(line)
            if lines and (room < 0 or self._failure is not None):
                break
            lines.append(line)
        return lines

    def _written(self, count: int) -> None:
        with self._changed:
            for _ in range(min(count, len(self._waiting))):  # none are left where `close` has given them up
                self._waiting.popleft()
            self.num_records += count
            self._changed.notify_all()

    def _recovered(self) -> None:
        if self._failure is not None and not self._waiting:
            self._failure = None
            self._told_s.clear()
            logger.warning("the audit log %s: is written again; %d records are lost so far", self._path, self.num_lost)

    def _failed(self, error: OSError) -> None:
        self.num_failures += 1
        with self._changed:
            self._failure = f"the audit log cannot be written ({error.strerror})"
            self._changed.notify_all()
        consequence = "no new request is answered until it can" if self._required else "answers go out all the same"
        self._remind("%s: cannot be written (%s); tried again each second; %s", error.strerror, consequence)

    def _open(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        # A process that was killed may have left half a line: it stays, and a new one begins.
        self._torn = self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"

    def _write(self, lines: Sequence[bytes]) -> None:
        """All of the lines or, where the file can be cut back, none. Raises OSError."""
        if not lines:
            return
        if not self._is_in_place():
            self._open()
        content = b"".join(lines)
        if self._size and self._size + len(content) > self._max_bytes:
            self._rotate()
        if self._torn:
            content = b"\n" + content
        written = 0
        try:
            while written < len(content):
                written += os.write(self._file, content[written:])
        except OSError:
            if written:
                self._cut_back()
            raise
        self._torn = False
        self._size += written
        if self._unsynced_since_s is None:
            self._unsynced_since_s = time.monotonic()

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._torn = True

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one of that name: it may have been moved or deleted by others."""
        if self._file < 0:
            return False
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._file))

    def _sync(self) -> None:
        if self._unsynced_since_s is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a pipe or a device, which nothing can make durable
                    raise
            self._unsynced_since_s = None

    def _rotate(self) -> None:
        self._sync()
        for number in range(self._keep - 1, 0, -1):
            older = _numbered(self._path, number)
            if older.exists():
                older.replace(_numbered(self._path, number + 1))
        self._path.replace(_numbered(self._path, 1))
        self._open()


def record(account: RequestAccount, generation: Generation) -> dict[str, Any]:
    """What the audit log says of one decision. `prompt_sha256` is that of the token ids, each as four bytes, lowest first."""
    decision = generation.decision
    assert decision is not None
    return {
        "time": _utc(account.began_s),
        "request": account.request_id,
        "id": generation.request.request_id,
        "path": account.path,
        "status": account.status,
        "key": account.key,
        "model": account.model,
        "applied": decision.applied,
        "reason": decision.reason,
        "profiles": [
            {
                "name": profile.name,
                "version": profile.version,
                "fired": profile.fired,
                "gate": profile.gate,
                "strength": profile.strength,
                "source": profile.strength_source,
                "applied": profile.applied,
                "reason": profile.reason,
            }
            for profile in decision.profiles
        ],
        "prompt_sha256": prompt_sha256(generation.request.prompt_token_ids),
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "finish": list(generation.finish_reasons),
    }


def prompt_sha256(token_ids: Sequence[int]) -> str:
    """In hex, of the ids as unsigned 32-bit little-endian numbers."""
    ids = array("I", token_ids)
    if ids.itemsize != 4 or array("H", [1]).tobytes()[0] != 1:
        return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in token_ids)).hexdigest()
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _utc(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s)) + f".{int(unix_s % 1 * 1000):03d}Z"


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
