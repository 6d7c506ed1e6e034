"""Adapters on the Hugging Face hub or in a bucket: they are copied into a folder of limited size, and read there.

    hf://org/name[@revision][/subfolder]     on the hub
    gs://bucket/folder, s3://bucket/folder   in a bucket, or whatever else fsspec can open

A copy is made under a temporary name and renamed, so that it is never incomplete. Beside its files lies a record of
their SHA-256, which is checked before each use. The store is asked each time whether its files have changed; if it does
not answer, the copy that is there is good enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec

from icarus_jax.weights.adapter_files import ARRAYS, CONFIG_FILE, WEIGHTS_FILE
from icarus_jax.weights.sources import RECORD, cache_dir, sha256

log = logging.getLogger(__name__)

MAX_BYTES = 16 << 30  # of a cache, unless another limit is given
LEFT_SECONDS = 86_400.0  # a temporary folder of this age was left behind by a process that ended
_PART = ".part-"  # how the names of temporary folders begin


class StoreError(OSError):
    """A hub or a bucket does not give what it has. It may do so later."""


def is_remote(source: str) -> bool:
    """Returns whether an adapter's source lies in a store, rather than in a local folder."""
    return "://" in source


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The files of an adapter in a store.

    Attributes:
        files: the name below the adapter's folder -> what the store says of it.
        store: the store.
        root: the adapter's folder, as the store names it.
    """

    files: dict[str, dict[str, Any]]
    store: fsspec.AbstractFileSystem
    root: str

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(info["size"] for info in self.files.values())

    @property
    def version(self) -> str:
        """The name of this version: another one if any file has changed."""
        return _digest(repr(sorted((name, sorted(info.items(), key=str)) for name, info in self.files.items())))


@dataclasses.dataclass(frozen=True)
class AdapterCache:
    """The folder of copies. Several threads and processes may use it at once.

    Attributes:
        max_bytes: how many bytes the copies may have. Those used least recently go first, but none that is being read.
        folder: the folder; None: 'adapters' in `sources.cache_dir()`.
    """

    max_bytes: int = MAX_BYTES
    folder: pathlib.Path | None = None

    @contextlib.contextmanager
    def local(self, source: str) -> Iterator[pathlib.Path]:
        """Gives the local folder of an adapter. A copy stays where it is until the context ends.

        Args:
            source: an adapter in a store, which is copied, or a local folder.

        Raises:
            FileNotFoundError: the store has no such adapter.
            StoreError: the store does not answer, and there is no copy.
            ValueError: no store is written so, or the adapter is larger than the cache. One of the body about the
                copy is changed to name the source.
        """
        if not is_remote(source):
            yield pathlib.Path(source).expanduser()
            return
        with contextlib.ExitStack() as held:
            copy = self._copy(source, held)
            try:
                yield copy
            except ValueError as error:
                raise ValueError(str(error).replace(str(copy), source)) from error

    def _copy(self, source: str, held: contextlib.ExitStack) -> pathlib.Path:
        """Returns the folder of a copy that nobody removes before `held` is closed."""
        folder = self.folder or cache_dir() / "adapters"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            listing = _list(source)
        except StoreError as error:
            older = sorted(folder.glob(f"{_digest(source)}-*"), key=_used, reverse=True)
            if copy := next((copy for copy in older if _hold(copy, held)), None):
                log.warning("%s; the copy from before is used", error)
                return copy
            raise
        copy = folder / f"{_digest(source)}-{listing.version}"
        if not _hold(copy, held):
            if listing.size > self.max_bytes:
                raise ValueError(
                    f"adapter {source}: it has {listing.size} bytes, and the cache of adapters may have "
                    f"{self.max_bytes}: --config.server.adapter_cache_bytes={listing.size}"
                )
            self._fetch(source, listing, copy, held)
        return copy

    def _fetch(self, source: str, listing: _Listing, copy: pathlib.Path, held: contextlib.ExitStack) -> None:
        """Copies an adapter into the folder `copy`, which is held."""
        with tempfile.TemporaryDirectory(prefix=_PART, dir=copy.parent) as temp:
            part = pathlib.Path(temp) / "copy"
            part.mkdir()
            record = {name: _download(source, listing, name, part / name) for name in listing.files}
            if _list(source).version != listing.version:
                raise StoreError(f"adapter {source} changed while it was read: load it again once it is written")
            (part / RECORD).write_text(json.dumps({"source": source, "sha256": record}, indent=1))
            while not _hold(copy, held):  # somebody else may have made the copy meanwhile
                with contextlib.ExitStack() as ours:
                    _hold(part, ours)
                    with _changing(copy.parent):
                        self._make_room(copy.parent, listing.size)
                        try:
                            part.rename(copy)
                        except OSError as error:
                            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                                raise
                            if not (copy / RECORD).exists():  # somebody has removed a part of it
                                _remove(copy)
                        else:
                            held.push(ours.pop_all())
                            return

    def _make_room(self, folder: pathlib.Path, size: int) -> None:
        """Removes copies until `size` bytes more are within the limit, or every other copy is being read."""
        for left in folder.glob(f"{_PART}*"):
            if time.time() - _used(left) > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        sizes = {copy: _size(copy) for copy in folder.glob("[!.]*")}
        for copy in sorted(sizes, key=_used):
            if sum(sizes.values()) + size <= self.max_bytes:
                return
            with contextlib.ExitStack() as held:
                if _hold(copy, held, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _remove(copy)
                    del sizes[copy]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _list(source: str) -> _Listing:
    """Asks the store for the files of an adapter, those of either form of adapter_files.py."""
    with _asking(source):
        store, root = fsspec.url_to_fs(source)
        root = root.rstrip("/")
        store.invalidate_cache()  # of listings: the files may have changed
        found = store.find(root, maxdepth=1, detail=True)
        if f"{root}/{WEIGHTS_FILE}" not in found:
            found |= store.find(f"{root}/{ARRAYS}", detail=True)
        names = {name[len(root) + 1 :]: info for name, info in found.items() if name.startswith(f"{root}/")}
    files = {name: info for name, info in names.items() if name in (CONFIG_FILE, WEIGHTS_FILE) or "/" in name}
    if CONFIG_FILE not in files:
        raise FileNotFoundError(f"{source} is no adapter: it has no {CONFIG_FILE} (a PEFT folder holds it)")
    if any({"", ".."} & set(name.split("/")) or not isinstance(info.get("size"), int) for name, info in files.items()):
        raise ValueError(f"adapter {source}: its store does not say which files there are, and how large")
    return _Listing(files, store, root)


def _download(source: str, listing: _Listing, name: str, to: pathlib.Path) -> str:
    """Copies a file, and returns its SHA-256."""
    info = listing.files[name]
    to.parent.mkdir(parents=True, exist_ok=True)
    with _asking(source):
        listing.store.get_file(f"{listing.root}/{name}", str(to))
    digest = sha256(to)
    if to.stat().st_size != info["size"] or digest != (info.get("lfs") or {}).get("sha256", digest):  # lfs: the hub's
        raise StoreError(f"adapter {source}: {name} did not arrive whole")
    return digest


@contextlib.contextmanager
def _asking(source: str) -> Iterator[None]:
    """Turns what a store raises into a FileNotFoundError, ValueError or StoreError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"adapter {source}: nothing lies there") from None
    except ImportError as error:
        raise ValueError(f"adapter {source}: this kind of source needs another package: {error}") from None
    except Exception as error:  # every store has errors of its own
        said = f"adapter {source}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise (ValueError if isinstance(error, ValueError | NotImplementedError) else StoreError)(said) from error


def _hold(copy: pathlib.Path, held: contextlib.ExitStack, how: int = fcntl.LOCK_SH) -> bool:
    """Locks a copy until `held` is closed. A copy that is not what was downloaded is removed.

    Args:
        copy: the folder of a copy.
        held: takes the lock.
        how: of fcntl.flock: shared, to read the copy, or exclusive, to remove it.

    Returns:
        False if there is no such copy, or if it is locked otherwise.
    """
    with contextlib.ExitStack() as own:
        try:
            file = own.enter_context((copy / RECORD).open("rb"))
            fcntl.flock(file, how)
        except OSError:
            return False
        if not _is_record_of(file, copy):
            return False  # it was removed, and made again, before it was locked
        if how == fcntl.LOCK_SH and not _is_whole(copy):
            with _changing(copy.parent):
                if _is_record_of(file, copy):  # else somebody else has removed it, and it may have been made again
                    log.warning("%s is not what was downloaded: it is removed", copy)
                    _remove(copy)
            return False
        os.utime(copy / RECORD)
        held.push(own.pop_all())
        return True


def _is_record_of(file: BinaryIO, copy: pathlib.Path) -> bool:
    """Returns whether an open file is the record that a copy has now."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), (copy / RECORD).stat())
    return False


@contextlib.contextmanager
def _changing(folder: pathlib.Path) -> Iterator[None]:
    """Lets one at a time look at what lies in the folder of copies, and put a copy there or remove it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_whole(copy: pathlib.Path) -> bool:
    with contextlib.suppress(ValueError, OSError, LookupError, TypeError, AttributeError):
        # Not read_json, which minds that others set the time of last use meanwhile.
        record = json.loads((copy / RECORD).read_bytes())
        return all(sha256(copy / name) == digest for name, digest in record["sha256"].items())
    return False


def _used(copy: pathlib.Path) -> float:
    """Returns when a copy was last used, in Unix seconds."""
    with contextlib.suppress(OSError):
        return ((copy / RECORD) if (copy / RECORD).exists() else copy).stat().st_mtime
    return 0.0


def _size(copy: pathlib.Path) -> int:
    total = 0
    for folder, _, files in os.walk(copy):  # which passes over what is removed meanwhile
        for name in files:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(folder, name))
    return total


def _remove(copy: pathlib.Path) -> None:
    """Removes a copy. It is renamed first, so that it is never seen in part."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=_PART, dir=copy.parent) as temp:
        copy.rename(pathlib.Path(temp) / "gone")
