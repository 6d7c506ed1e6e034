"""Watches a folder of heads. Each subfolder is one head: it is loaded, reloaded when it changes, and unloaded.

The watcher compares the times and sizes of files, once a second. It loads a subfolder only after a poll in which
nothing has changed, so that it does not read an adapter that is still being written. It tries again, at growing
intervals, to load an adapter that it could not load. Whatever goes wrong with one head is logged, and the others go on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import threading

from icarus_jax.server.head_loader import HeadLoader, UnknownHead
from icarus_jax.weights.adapter_files import ARRAYS, CONFIG_FILE, WEIGHTS_FILE
from icarus_jax.weights.reading import Stamp, stamp

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_WAIT = 64  # the most polls between two tries to load a head


@dataclasses.dataclass
class _Watched:
    """The state of a subfolder.

    Attributes:
        stamp: its files as of the last poll.
        loaded: its files as they were when the served head was loaded; None if it has not been loaded.
        error: why the last try to load it failed; '' if it did not fail.
        tries: how many tries to load this stamp have failed.
        wait: how many polls to let pass before the next try.
    """

    stamp: Stamp
    loaded: Stamp | None = None
    error: str = ""
    tries: int = 0
    wait: int = 0


class HeadWatcher:
    """Watches a folder of heads on a thread of its own: `with HeadWatcher(loader, folder): ...`.

    A subfolder's name is the name of its head. Subfolders whose names start with a dot are ignored: an adapter can be
    written into one of them, which is then renamed.
    """

    def __init__(self, loader: HeadLoader, folder: str | pathlib.Path, poll_seconds: float = POLL_SECONDS):
        """Notes which heads of the folder are served already; the thread starts on entering the context.

        Args:
            loader: loads and unloads the heads.
            folder: the folder to watch.
            poll_seconds: seconds between two polls.

        Raises:
            ValueError: there is no such folder.
        """
        self._loader = loader
        self._folder = pathlib.Path(folder).expanduser().absolute()
        if not self._folder.is_dir():
            raise ValueError(f"{self._folder} is no folder: there is nothing to watch")
        self._poll_seconds = poll_seconds
        self._known = {name: _Watched(now, loaded=now) for name, now in self._stamps().items() if self._is_served(name)}
        self._failing = ""  # what the last poll failed with as a whole; '' if it did not
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
                self._failing = ""
            except Exception as error:  # the folder cannot be listed
                if self._failing != str(error):  # once, not at every poll
                    log.exception("watching %s failed; it goes on", self._folder)
                self._failing = str(error)

    def poll(self) -> None:
        """Looks at the folder once, and loads and unloads what has changed. The thread calls it at every poll."""
        stamps = self._stamps()
        for name in [name for name in self._known if name not in stamps]:
            self._remove(name)
        for name, now in stamps.items():
            head = self._known.setdefault(name, _Watched(()))
            if head.stamp != now:
                head.stamp, head.tries, head.wait = now, 0, 0
            elif head.loaded != now:
                self._try(name, head)

    def _try(self, name: str, head: _Watched) -> None:
        if head.wait:
            head.wait -= 1
            return
        try:
            self._loader.load(name, str(self._folder / name))
        except Exception as error:
            head.tries += 1
            head.wait = min(2**head.tries, MAX_WAIT) - 1
            if head.error != _line(error):
                bug = not isinstance(error, ValueError | OSError)
                log.error("head %s in %s is not loaded: %s", name, self._folder, _line(error), exc_info=bug)
            head.error = _line(error)
        else:
            head.loaded, head.error = head.stamp, ""

    def _remove(self, name: str) -> None:
        del self._known[name]
        if not self._is_served(name):  # it was never loaded, or a head from elsewhere has its name now
            return
        try:
            self._loader.unload(name)
        except UnknownHead:
            pass  # somebody else has unloaded it in the meantime
        except Exception as error:
            bug = not isinstance(error, ValueError)
            message = "head %s, whose folder in %s is gone, is not unloaded: %s"
            log.error(message, name, self._folder, _line(error), exc_info=bug)

    def _is_served(self, name: str) -> bool:
        source = self._loader.source(name)
        return name in self._loader.engine.models and os.path.realpath(source) == os.path.realpath(self._folder / name)

    def _stamps(self) -> dict[str, Stamp]:
        """Returns the stamps of the subfolders that hold an adapter. Its weights may not have been written yet."""
        found: dict[str, Stamp] = {}
        for place in self._folder.iterdir():
            if not place.name.startswith(".") and (config := stamp(place / CONFIG_FILE)):
                found[place.name] = (*config, *stamp(place / WEIGHTS_FILE), *stamp(place / ARRAYS))
        return found


def _line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {said}"
