"""Keeps the files and the batches of the batch API in a folder, so that a restart finds them.

What they are lies in SQLite (batch_table.py). The content of each file lies beside it, and so do the answers of a batch
until it is finished. A content is whole before SQLite knows its file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from icarus_jax.evaluation import batch_table
from icarus_jax.evaluation.batch_table import UNFINISHED, Kind, Shown

_OURS = re.compile(r"(file-|batch_)[0-9a-f]{32}(\.part)?")  # the names of contents


class Conflict(ValueError):
    """What was asked for cannot be done in the state that a file or a batch has."""


class Full(ValueError):
    """A tenant has as much as it may have."""


@dataclasses.dataclass(frozen=True)
class BatchLimits:
    """How much the batch API takes.

    Attributes:
        file_bytes: the size of a file that is sent.
        sent_bytes: the size of all files that are being sent, at the same time and by all tenants.
        requests: how many requests a batch has.
        files: how many files a tenant has, when it sends one or makes a batch. The answers of batches come on top.
        total_bytes: the size of all these files.
        batches: how many batches of a tenant are unfinished.
    """

    file_bytes: int = 200 << 20
    sent_bytes: int = 1 << 30
    requests: int = 50_000
    files: int = 1_000
    total_bytes: int = 10 << 30
    batches: int = 100


class BatchStore:
    """The files and batches in a folder. Thread-safe; its methods wait for the disk.

    Attributes:
        limits: how much it takes.
    """

    def __init__(self, folder: Path, limits: BatchLimits | None = None):
        """Opens the folder, which is made if it does not exist, and removes what a killed process has left half done.

        Args:
            folder: the folder.
            limits: how much it takes; None: the default limits.

        Raises:
            ValueError: the folder is used by another server, or its database is broken.
            OSError: the folder cannot be written.
        """
        self.limits = limits or BatchLimits()
        self._contents = folder / "contents"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._contents.mkdir(exist_ok=True)
        self._lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process at the latest
            self._db = batch_table.open_table(folder / "batches.sqlite")
        except BaseException as error:
            os.close(self._lock_fd)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"{folder} is used by another server") from None
            raise
        self._lock = threading.Lock()
        self._sweep()

    def close(self) -> None:
        """Closes the folder, so that another process may open it."""
        with self._lock:
            self._db.close()
        os.close(self._lock_fd)

    def path(self, object_id: str) -> Path:
        """Returns where the content of a file lies, or the answers of an unfinished batch. The id must be known."""
        return self._contents / object_id

    def find(self, kind: Kind, object_id: str, tenant: str) -> Shown | None:
        """Returns a file or a batch of a tenant; None if the tenant has none of this id."""
        with self._transaction() as db:
            return batch_table.find(db, kind, object_id, tenant)

    def page(self, kind: Kind, tenant: str, after: str | None, most: int, **more: bool | str | None) -> list[Shown]:
        """Lists files or batches of a tenant; see `batch_table.page`."""
        with self._transaction() as db:
            return batch_table.page(db, kind, tenant, after, most, **more)  # type: ignore[arg-type]

    # ---- files

    def check_room(self, tenant: str, num_bytes: int = 0) -> None:
        """Checks that a tenant may have one more file.

        Args:
            tenant: whose file it would be.
            num_bytes: the file's size.

        Raises:
            Full: it may not.
        """
        with self._transaction() as db:
            self._check_room(db, tenant, num_bytes)

    def _check_room(self, db: sqlite3.Connection, tenant: str, num_bytes: int = 0) -> None:
        (count, total), limits = batch_table.file_totals(db, tenant), self.limits
        if count >= limits.files or total + num_bytes > limits.total_bytes:
            most = f"at most {limits.files} files and {limits.total_bytes} bytes are kept"
            raise Full(f"you have {count} files with {total} bytes, and {most}: delete some")

    def add_file(self, tenant: str, filename: str, purpose: str, content: BinaryIO) -> Shown:
        """Keeps a file.

        Args:
            tenant: whose it is.
            filename: its name, for people.
            purpose: what it is for, in OpenAI's words.
            content: the content, from where it is to be read.

        Returns:
            The file, as the API shows it.

        Raises:
            Full: the tenant may not have one more file.
            OSError: it cannot be written.
        """
        with self._new_contents() as made:
            made.append(self._write(filename, purpose, iter(lambda: content.read(1 << 20), b"")))
            self._sync_names()
            with self._transaction() as db:
                self._check_room(db, tenant, made[0]["bytes"])  # others may have come since the caller has checked
                batch_table.insert(db, "file", tenant, made[0])
        return made[0]

    def delete_file(self, tenant: str, file_id: str) -> bool:
        """Removes a file.

        Args:
            tenant: whose it is.
            file_id: its id.

        Returns:
            Whether there was such a file.

        Raises:
            Conflict: an unfinished batch needs it.
        """
        with self._transaction() as db:
            if batch_table.find(db, "file", file_id, tenant) is None:
                return False
            for _, batch in batch_table.unfinished(db):
                if batch["input_file_id"] == file_id:
                    raise Conflict(f"the file {file_id} is the input of the batch {batch['id']}, which is not finished")
            batch_table.delete(db, file_id)
        self.path(file_id).unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def _new_contents(self) -> Iterator[list[Shown]]:
        """Gives a list for new files. If SQLite does not get to know them, their contents are removed."""
        made: list[Shown] = []
        try:
            yield made
        except BaseException:
            for shown in made:
                self.path(shown["id"]).unlink(missing_ok=True)
            raise

    def _write(self, filename: str, purpose: str, content: Iterable[bytes]) -> Shown:
        """Writes a new file's content. Returns the file, as the API shows it."""
        file_id = f"file-{uuid.uuid4().hex}"
        part = self.path(f"{file_id}.part")
        try:
            with part.open("xb") as stream:
                stream.writelines(content)
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
            part.rename(self.path(file_id))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        shown = {"purpose": purpose, "filename": filename, "bytes": size, "status": "processed", "expires_at": None}
        return {"id": file_id, "object": "file", "created_at": int(time.time()), **shown}

    def _sync_names(self) -> None:
        """Waits until the disk has the names of the contents."""
        folder = os.open(self._contents, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    # ---- batches

    def add_batch(self, tenant: str, shown: Shown) -> None:
        """Keeps a new batch.

        Args:
            tenant: whose it is.
            shown: the batch, as the API shows it.

        Raises:
            LookupError: the tenant has no such input file.
            Full: the tenant has as many unfinished batches, or as many files, as it may have.
        """
        with self._transaction() as db:
            if batch_table.find(db, "file", shown["input_file_id"], tenant) is None:
                raise LookupError(shown["input_file_id"])
            count = sum(owner == tenant for owner, _ in batch_table.unfinished(db))
            if count >= self.limits.batches:
                raise Full(f"{count} of your batches are not finished, and at most {self.limits.batches} may be")
            self._check_room(db, tenant)  # for the batch's own files
            batch_table.insert(db, "batch", tenant, shown)

    def unfinished(self) -> list[tuple[str, Shown]]:
        """Returns the batches that are not finished, the oldest first: the tenant of each, and the batch."""
        with self._transaction() as db:
            return batch_table.unfinished(db)

    def change(self, batch_id: str, allowed: Collection[str], changes: Shown) -> Shown:
        """Changes a batch if it has one of the allowed statuses.

        Args:
            batch_id: its id.
            allowed: the statuses.
            changes: the new values.

        Returns:
            The batch as it is now.
        """
        with self._transaction() as db:
            return batch_table.change(db, batch_id, allowed, changes)

    def finish(self, batch_id: str, tenant: str, lines: Mapping[str, Iterable[bytes]], changes: Shown) -> None:
        """Makes files of a batch's lines and ends the batch: both, or neither.

        Args:
            batch_id: its id.
            tenant: whose it is.
            lines: the batch's field that names a file -> the lines of that file.
            changes: the batch's other new values.

        Raises:
            OSError: a file cannot be written.
        """
        with self._new_contents() as made:
            for field, content in lines.items():
                name = f"{batch_id}_{field.removesuffix('_file_id')}.jsonl"
                made.append(self._write(name, "batch_output", content))
            self._sync_names()
            with self._transaction() as db:
                for shown in made:
                    batch_table.insert(db, "file", tenant, shown)
                ids = {field: shown["id"] for field, shown in zip(lines, made, strict=True)}
                batch_table.change(db, batch_id, UNFINISHED, {**changes, **ids})
        self.path(batch_id).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Opens a transaction. Raises OSError if the database fails, because the disk is full, say."""
        try:
            with self._lock, self._db:
                yield self._db
        except sqlite3.Error as error:
            raise OSError(errno.EIO, str(error)) from error

    def _sweep(self) -> None:
        """Removes contents whose files SQLite does not know, and the answers of finished batches."""
        with self._transaction() as db:
            known = batch_table.file_ids(db) | {batch["id"] for _, batch in batch_table.unfinished(db)}
        for path in self._contents.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in known:
                path.unlink()
