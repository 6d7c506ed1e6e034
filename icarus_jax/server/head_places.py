"""The places that heads may be loaded from when a client says so: folders, buckets and names on the hub."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from icarus_jax.weights.adapter_cache import is_remote
from icarus_jax.weights.adapter_files import CONFIG_FILE

_URL = re.compile(r"[a-z][a-z0-9]*://[\w.@%+=~-]+(?:/[\w.@%+=~-]+)*", re.ASCII)
_LOCAL = re.compile(r"(?:file|local)://")


class HeadPlaces:
    """Finds the adapters that clients name. Without places, none is found."""

    def __init__(self, places: Iterable[str | pathlib.Path] = ()):
        """Takes the places.

        Args:
            places: folders, and in stores what the source of an adapter may begin with: 'gs://bucket/heads', 'hf://org'.

        Raises:
            ValueError: a place is neither.
        """
        named = [str(place) for place in places]
        self._stores = [place.removesuffix("/") for place in named if is_remote(place)]
        for place in self._stores:
            if not _is_plain(place):
                raise ValueError(f"{place!r} is no place of adapters: it is a folder, or gs://.., s3://.. or hf://..")
        self._folders = [_real(pathlib.Path(place).expanduser()) for place in named if not is_remote(place)]

    def __bool__(self) -> bool:
        return bool(self._stores or self._folders)

    def find(self, path: str) -> str:
        """Finds the adapter that a client names.

        Args:
            path: what lies in a store with its whole name; or an absolute path, or one relative to any of the folders.

        Returns:
            The adapter's source: its name in the store, which may lack it, or the real path of its folder.

        Raises:
            PermissionError: it lies outside the places, also once symbolic links in it and below it are followed, or
                something below it is neither a file nor a folder.
            FileNotFoundError: the folder holds no adapter.
        """
        if is_remote(path):
            path = path.removesuffix("/")
            if _is_plain(path) and any(f"{path}/".startswith(f"{place}/") for place in self._stores):
                return path
            raise PermissionError(f"{path[:256]!r} is outside the places that heads may be loaded from")
        return str(self._find_folder(path))

    def _find_folder(self, path: str) -> pathlib.Path:
        places = [_real(folder / path) for folder in self._folders]  # joined with an absolute path, this is that path
        allowed = [place for place in places if self._is_inside(place)]
        if not allowed:
            raise PermissionError(f"{path[:256]!r} is outside the folders that heads may be loaded from")
        found = next((place for place in allowed if (place / CONFIG_FILE).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path[:256]!r} is no adapter: it has no {CONFIG_FILE} (a PEFT folder holds it)")
        for place in _below(found):
            name = str(place.relative_to(found))[:256]
            real = _real(place)
            if not self._is_inside(real):
                raise PermissionError(f"{path[:256]!r}: {name} is a link to outside the folders that heads lie in")
            if real.exists() and not (real.is_file() or real.is_dir()):
                raise PermissionError(f"{path[:256]!r}: {name} is neither a file nor a folder")
        return found

    def _is_inside(self, path: pathlib.Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._folders)


def _is_plain(url: str) -> bool:
    """Returns whether a URL names one thing in a store: no chain of stores, no way up, no local file."""
    parts = url.split("/")
    return bool(_URL.fullmatch(url)) and not _LOCAL.match(url) and "." not in parts and ".." not in parts


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields everything below a folder, and below the folders that links there lead to, each folder once.

    A folder is entered only after it has been yielded: who stops there has not looked into it.
    """
    entered: set[pathlib.Path] = set()
    waiting = [folder]
    while waiting:
        if (real := _real(waiting[-1])) in entered:
            waiting.pop()
            continue
        entered.add(real)
        for place in waiting.pop().iterdir():
            yield place
            if place.is_dir():
                waiting.append(place)


def _real(path: pathlib.Path) -> pathlib.Path:
    """Follows every symbolic link in a path. The path need not exist."""
    return pathlib.Path(os.path.realpath(path))
