"""A folder whose subfolders are heads: what appears is loaded, what changes loaded anew, what goes unloaded.

Files are watched by their times and sizes, a poll a second. What has just changed is given one more poll to settle, so
that an adapter is not read while it is written; one that cannot be loaded is tried again, at growing intervals.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import threading

from icarus_jax.server.head_loader import HeadLoader, UnknownHead
from icarus_jax.weights.adapter_files import CONFIG_FILE, WEIGHTS_FILE

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_WAIT = 64  # polls between two tries at most

Stamp = tuple[tuple[int, int, int], ...]  # of each file: inode, time, size


@dataclasses.dataclass
class _Watched:
    """What is known of a subfolder."""

    stamp: Stamp  # as of the last poll
    loaded: Stamp | None = None  # what is served
    error: str = ""  # why the last try failed
    tries: int = 0  # failed ones, of this stamp
    wait: int = 0  # polls until the next


class HeadWatcher:
    """Watches `folder` on a thread of its own while it is entered: `with HeadWatcher(loader, folder): ...`.

    A subfolder's name is the head's. Names that start with a dot are passed over: write there and rename, if you like.
    """

    def __init__(self, loader: HeadLoader, folder: str | pathlib.Path, poll_seconds: float = POLL_SECONDS):
        self._loader = loader
        self._folder = pathlib.Path(folder).expanduser().absolute()
        if not self._folder.is_dir():
            raise ValueError(f"{self._folder} is no folder: there is nothing to watch")
        self._poll_seconds = poll_seconds
        self._known = {
            name: _Watched(stamp, loaded=stamp) for name, stamp in self._stamps().items() if self._is_served(name)
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="head-watcher", daemon=True)

    def __enter__(self) -> HeadWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            try:
                self.poll()
            except Exception:
                log.exception("watching %s failed; it goes on", self._folder)

    def poll(self) -> None:
        """Looks once."""
        stamps = self._stamps()
        for name in [name for name in self._known if name not in stamps]:
            self._remove(name)
        for name, stamp in stamps.items():
            head = self._known.setdefault(name, _Watched(()))
            if head.stamp != stamp:
                head.stamp, head.tries, head.wait = stamp, 0, 0
            elif head.loaded != stamp:
                self._try(name, head)

    def _try(self, name: str, head: _Watched) -> None:
        if head.wait:
            head.wait -= 1
            return
        try:
            self._loader.load(name, str(self._folder / name))
        except (ValueError, OSError) as error:
            head.tries += 1
            head.wait = min(2**head.tries, MAX_WAIT) - 1
            if head.error != str(error):
                log.error("head %s in %s is not loaded: %s", name, self._folder, error)
            head.error = str(error)
        else:
            head.loaded, head.error = head.stamp, ""

    def _remove(self, name: str) -> None:
        del self._known[name]
        if not self._is_served(name):  # it never was, or something else has its name now
            return
        try:
            self._loader.unload(name)
        except UnknownHead:
            pass  # gone already
        except ValueError as error:
            log.error("head %s, whose folder in %s is gone, is not unloaded: %s", name, self._folder, error)

    def _is_served(self, name: str) -> bool:
        source = self._loader.source(name)
        return name in self._loader.engine.models and os.path.realpath(source) == os.path.realpath(self._folder / name)

    def _stamps(self) -> dict[str, Stamp]:
        """The subfolders that hold an adapter, whole or not yet."""
        found: dict[str, Stamp] = {}
        for place in self._folder.iterdir():
            if not place.name.startswith("."):
                stamp = tuple(_stamp(place / file) for file in (CONFIG_FILE, WEIGHTS_FILE))
                if stamp[0] != ABSENT:
                    found[place.name] = stamp
        return found


ABSENT = (0, 0, 0)


def _stamp(file: pathlib.Path) -> tuple[int, int, int]:
    try:
        stat = file.stat()
    except OSError:
        return ABSENT
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
