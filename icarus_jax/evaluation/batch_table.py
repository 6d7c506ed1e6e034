"""The SQLite table of the batch API: one row for each file and each batch, in the form in which the API shows it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

Kind = Literal["file", "batch"]
Shown = dict[str, Any]  # a file or a batch, as the API shows it
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, shown TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS of_tenant ON objects (kind, tenant, number);
"""


def open_table(path: Path) -> sqlite3.Connection:
    """Opens the database, and makes it if it does not exist. Its connection may be used by one thread at a time.

    Args:
        path: its file.

    Raises:
        ValueError: the file is no database, or a broken one.
    """
    try:
        db = sqlite3.connect(path, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(_SCHEMA)
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}") from None
    return db


def find(db: sqlite3.Connection, kind: Kind, object_id: str, tenant: str) -> Shown | None:
    """Returns a file or a batch of a tenant; None if the tenant has none of this id."""
    query = "SELECT shown FROM objects WHERE id = ? AND kind = ? AND tenant = ?"
    row = db.execute(query, [object_id, kind, tenant]).fetchone()
    return json.loads(row[0]) if row else None


def page(
    db: sqlite3.Connection,
    kind: Kind,
    tenant: str,
    after: str | None,
    most: int,
    newest_first: bool = True,
    purpose: str | None = None,
) -> list[Shown]:
    """Lists files or batches of a tenant.

    Args:
        db: the database.
        kind: which of the two.
        tenant: whose.
        after: the id after which the list begins; None: it begins with the first.
        most: how many.
        newest_first: whether the newest comes first, or the oldest.
        purpose: the purpose of the files; None: any.

    Raises:
        LookupError: the tenant has nothing with the id `after`.
    """
    order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
    where, values = "kind = ? AND tenant = ?", [kind, tenant]
    if purpose is not None:
        where, values = f"{where} AND json_extract(shown, '$.purpose') = ?", [*values, purpose]
    if after is not None:
        if find(db, kind, after, tenant) is None:
            raise LookupError(after)
        where, values = f"{where} AND number {beyond} (SELECT number FROM objects WHERE id = ?)", [*values, after]
    query = f"SELECT shown FROM objects WHERE {where} ORDER BY number {order} LIMIT ?"
    return [json.loads(shown) for (shown,) in db.execute(query, [*values, most])]


def file_totals(db: sqlite3.Connection, tenant: str) -> tuple[int, int]:
    """Returns how many files a tenant has, and their bytes."""
    query = "SELECT count(*), sum(json_extract(shown, '$.bytes')) FROM objects WHERE kind = 'file' AND tenant = ?"
    count, total = db.execute(query, [tenant]).fetchone()
    return count, total or 0


def file_ids(db: sqlite3.Connection) -> set[str]:
    """Returns the ids of all files."""
    return {name for (name,) in db.execute("SELECT id FROM objects WHERE kind = 'file'")}


def unfinished(db: sqlite3.Connection) -> list[tuple[str, Shown]]:
    """Returns the batches that are not finished, the oldest first: the tenant of each, and the batch."""
    marks = ", ".join("?" * len(UNFINISHED))
    where = f"kind = 'batch' AND json_extract(shown, '$.status') IN ({marks})"
    rows = db.execute(f"SELECT tenant, shown FROM objects WHERE {where} ORDER BY number", UNFINISHED)
    return [(tenant, json.loads(shown)) for tenant, shown in rows]


def insert(db: sqlite3.Connection, kind: Kind, tenant: str, shown: Shown) -> None:
    """Adds a file or a batch of a tenant."""
    values = [kind, shown["id"], tenant, json.dumps(shown)]
    db.execute("INSERT INTO objects (kind, id, tenant, shown) VALUES (?, ?, ?, ?)", values)


def change(db: sqlite3.Connection, batch_id: str, allowed: Collection[str], changes: Shown) -> Shown:
    """Changes a batch if it has one of the allowed statuses.

    Args:
        db: the database.
        batch_id: the batch's id.
        allowed: the statuses.
        changes: the new values.

    Returns:
        The batch as it is now.
    """
    (text,) = db.execute("SELECT shown FROM objects WHERE id = ?", [batch_id]).fetchone()
    shown = json.loads(text)
    if shown["status"] in allowed:
        shown |= changes
        db.execute("UPDATE objects SET shown = ? WHERE id = ?", [json.dumps(shown), batch_id])
    return shown


def delete(db: sqlite3.Connection, object_id: str) -> None:
    """Removes a file or a batch."""
    db.execute("DELETE FROM objects WHERE id = ?", [object_id])
