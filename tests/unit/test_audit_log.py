"""The audit log's file: rotation, full disks, cut lines, moved files. Nothing twice, nothing lost without a word."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace

import pytest

from server.observability import audit as audit_module
from server.observability.account import RequestAccount
from server.observability.audit import AuditLog, AuditLogError, prompt_sha256
from steering.decision import SteeringDecision


@dataclass
class Ended:
    """A generation as the audit log sees it."""

    name: str
    decision: SteeringDecision | None = field(default_factory=lambda: SteeringDecision(False, "opted_out"))
    prompt_tokens: int = 3
    completion_tokens: int = 1
    finish_reasons: tuple[str, ...] = ("stop",)

    @property
    def request(self):
        return SimpleNamespace(request_id=self.name, prompt_token_ids=(1, 2, 3))


def account(*names: str) -> RequestAccount:
    generations = [Ended(name) for name in names]
    return RequestAccount("r", "POST", "/v1/completions", None, 200, 0.0, 0.1, generations=generations)


def put(audit, *numbers: int) -> None:
    for number in numbers:
        audit.put(account(str(number)))


def ids(*paths) -> list[int]:
    """The records in some files, each line whole."""
    return [int(json.loads(line)["id"]) for path in paths for line in path.read_bytes().decode().splitlines()]


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(audit_module, "RETRY_S", 0.02)


@contextlib.contextmanager
def opened(path, **options):
    audit = AuditLog(path, **{"max_bytes": 2**20, "keep": 3} | options)
    try:
        yield audit
    finally:
        audit.close()


def test_a_line_each_from_any_thread_and_appended_to(tmp_path):
    path = tmp_path / "audit"
    with opened(path) as audit:
        threads = [threading.Thread(target=put, args=(audit, *range(i * 100, i * 100 + 100))) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = ids(path)
    assert sorted(found) == list(range(400))
    assert [n for n in found if n < 100] == list(range(100)), "each thread's in order"
    assert (audit.num_records, audit.num_failures, audit.num_lost) == (400, 0, 0)
    assert path.stat().st_mode & 0o777 == 0o600
    with opened(path) as audit:
        put(audit, 400)
    assert ids(path) == [*found, 400]


def test_a_request_without_a_decision_has_no_line(tmp_path):
    with opened(tmp_path / "audit") as audit:
        undecided = RequestAccount("r", "POST", "/", None, 500, 0.0, 0.1, generations=[Ended("1", decision=None)])
        audit.put(undecided)
        audit.put(RequestAccount("r", "GET", "/", None, 200, 0.0, 0.1))
        audit.put(account("2", "3"))
    assert ids(tmp_path / "audit") == [2, 3]


def test_rotation_keeps_the_newest(tmp_path):
    path = tmp_path / "audit"
    size = len(json.dumps(audit_module.record(account("100"), Ended("100")))) + 1
    for start in (100, 150):  # a start of the server in between changes nothing
        with opened(path, max_bytes=7 * size) as audit:
            put(audit, *range(start, start + 50))
    files = [tmp_path / f"audit.{number}" for number in (3, 2, 1)] + [path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 7 * size for file in files)
    assert ids(*files) == list(range(200 - 3 * 7 - 2, 200)), "100 records: 14 files of 7, and 2"


def test_a_record_larger_than_a_file_has_one_of_its_own(tmp_path):
    with opened(tmp_path / "audit", max_bytes=1) as audit:
        put(audit, 1, 2, 3)
    assert ids(tmp_path / "audit.2", tmp_path / "audit.1", tmp_path / "audit") == [1, 2, 3]


def test_a_cut_line_stays_and_a_new_one_begins(tmp_path):
    path = tmp_path / "audit"
    with opened(path) as audit:
        put(audit, 1, 2)
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 20)
    with opened(path) as audit:
        put(audit, 3, 4)
    first, cut, *new = path.read_bytes().decode().splitlines()
    assert json.loads(first)["id"] == "1" and cut.encode() in whole
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(cut)
    assert [json.loads(line)["id"] for line in new] == ["3", "4"]


@pytest.fixture(params=["tmpfs", "writer"])
def small_disk(request, tmp_path, monkeypatch):
    """A folder that holds a few kilobytes, and a function that makes room."""
    if request.param == "writer":
        write, most = os.write, [3000]

        def limited(descriptor, content):
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path)):
                return write(descriptor, content)
            room = most[0] - os.fstat(descriptor).st_size
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, content[:room])

        monkeypatch.setattr(audit_module.os, "write", limited)
        yield tmp_path, lambda: most.__setitem__(0, 10**9)
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 1024)
        os.truncate(filler, filler.stat().st_size - 4096)
        yield tmp_path, filler.unlink
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_told_and_overcome(small_disk, caplog):
    folder, make_room = small_disk
    with opened(folder / "audit", required=True) as audit:
        assert audit.refusal is None
        put(audit, *range(100))
        until(lambda: audit.num_failures >= 3)
        assert "No space left on device" in audit.failure and audit.refusal == audit.failure
        assert ids(folder / "audit") == list(range(audit.num_records)), "no half lines even now"
        assert 0 < audit.num_records < 100
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1, "not once a try"
        assert "No space left on device" in errors[0] and "no new request" in errors[0]
        make_room()
        until(lambda: audit.num_records == 100)
        until(lambda: audit.failure is None)
        assert audit.refusal is None and audit.num_lost == 0
    assert ids(folder / "audit") == list(range(100)), "each once, in order"
    assert "is written again" in caplog.text


def test_what_does_not_fit_is_lost_unless_it_is_required(small_disk, caplog):
    folder, make_room = small_disk
    with opened(folder / "audit", capacity=5) as audit:
        for number in range(100):
            put(audit, number)
            until(lambda number=number: audit.num_failures or audit.num_records > number)
        written = audit.num_records
        assert 0 < written < 90 and audit.failure and audit.refusal is None
        assert audit.num_lost == 100 - written - 5
        make_room()
        until(lambda: audit.failure is None)
        put(audit, 100)
    assert ids(folder / "audit") == [*range(written + 5), 100]
    assert "answers go out all the same" in caplog.text and "a record is lost" in caplog.text


def test_a_writer_that_is_behind_refuses_where_it_is_required(tmp_path, monkeypatch):
    going, write = threading.Event(), os.write

    def slow(descriptor, content):
        going.wait(10)
        return write(descriptor, content)

    monkeypatch.setattr(audit_module.os, "write", slow)
    with opened(tmp_path / "audit", required=True, capacity=5) as audit:
        put(audit, *range(4))
        assert audit.refusal is None
        put(audit, *range(4, 8))
        assert audit.refusal == "8 records wait to be written" and audit.failure is None
        going.set()
        until(lambda: audit.refusal is None)
    assert ids(tmp_path / "audit") == list(range(8)) and audit.num_lost == 0


def test_a_disk_that_does_not_hold_is_a_failure_too(tmp_path, monkeypatch):
    """`fsync` fails: what is written is not written again, and no request is needed to find out that it works again."""
    monkeypatch.setattr(audit_module, "SYNC_S", 0.02)
    broken, fsync = [True], os.fsync

    def sync(descriptor):
        if broken[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(audit_module.os, "fsync", sync)
    with opened(tmp_path / "audit", required=True) as audit:
        put(audit, 1, 2)
        until(lambda: audit.num_failures > 1)
        assert "Input/output error" in audit.refusal
        broken[0] = False
        until(lambda: audit.refusal is None)
    assert ids(tmp_path / "audit") == [1, 2]


def test_everything_is_synced_within_a_second_and_at_the_end(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def sync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(audit_module.os, "fsync", sync)
    with opened(tmp_path / "audit") as audit:
        put(audit, 1)
        until(lambda: synced)
        put(audit, 2)
    assert synced[-1] == (tmp_path / "audit").stat().st_size > synced[0]


@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_file_that_others_take_away_is_made_anew(tmp_path, action):
    path = tmp_path / "audit"
    with opened(path) as audit:
        put(audit, 1)
        until(lambda: audit.num_records == 1)
        if action == "move":
            path.rename(tmp_path / "moved")
        else:
            path.unlink()
        put(audit, 2)
    assert ids(path) == [2]
    assert action == "delete" or ids(tmp_path / "moved") == [1]


def test_the_end_does_not_wait_for_ever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(audit_module, "CLOSE_S", 0.1)

    def full(descriptor, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(audit_module.os, "write", full)
    with opened(tmp_path / "audit") as audit:
        put(audit, 1, 2)
    assert audit.num_lost == 2 and "2 records are lost" in caplog.text
    put(audit, 3)
    assert audit.num_lost == 3


@pytest.mark.parametrize(("name", "said"), [("no/such/folder", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_opened(tmp_path, name, said):
    with pytest.raises(AuditLogError, match=said):
        AuditLog(tmp_path / name, max_bytes=1, keep=1)


def test_the_prompts_hash(monkeypatch):
    token_ids = (0, 1, 255, 256, 151_643, 2**31)
    wanted = sha256(struct.pack("<6I", *token_ids)).hexdigest()
    assert prompt_sha256(token_ids) == wanted
    assert prompt_sha256(()) == sha256(b"").hexdigest()
