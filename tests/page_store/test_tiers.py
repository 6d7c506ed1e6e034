"""The tiers below the device's pages: what is read is what was saved, or nothing; and the limits are kept."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pytest

from icarus_jax.page_store import page_folder
from icarus_jax.page_store.host_cache import HostCache
from icarus_jax.page_store.page_file import HEADER_BYTES, decode, encode
from icarus_jax.page_store.page_folder import PageFolder
from icarus_jax.page_store.rates import TRIES, CopyRule
from icarus_jax.page_store.store import THREADS, PageStore

IDENTITY, OTHER = b"identity of one!", b"identity of two!"
SIZE = 1000  # bytes of a page's K/V
FILE = SIZE + HEADER_BYTES
NO_LIMIT = 1 << 30


def key_of(i: int) -> bytes:
    return i.to_bytes(16, "little")


def page(i: int) -> bytes:
    return np.random.default_rng(i).bytes(SIZE)


def make_store(
    url: object = "", host_bytes: int = 0, identity: bytes = IDENTITY, max_bytes: int = NO_LIMIT
) -> PageStore:
    folder = PageFolder(str(url), identity, max_bytes) if url else None
    return PageStore(identity, SIZE, HostCache(host_bytes), folder)


def fill(store: PageStore, count: int) -> list[bytes]:
    store.save((key_of(i), memoryview(page(i))) for i in range(count))
    return [key_of(i) for i in range(count)]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("*.page"))


@pytest.mark.parametrize("i", [0, 15, 16, 40, HEADER_BYTES - 1, HEADER_BYTES, FILE - 1])
def test_a_flipped_bit_anywhere_is_noticed(i):
    data = bytearray(encode(IDENTITY, key_of(1), page(1)))
    assert decode(IDENTITY, key_of(1), SIZE, bytes(data)) == page(1)
    data[i] ^= 4
    assert decode(IDENTITY, key_of(1), SIZE, bytes(data)) is None


@pytest.mark.parametrize("identity, key, size", [(OTHER, key_of(1), SIZE), (IDENTITY, key_of(2), SIZE)])
def test_another_engines_page_and_another_page_are_noticed(identity, key, size):
    assert decode(identity, key, size, encode(IDENTITY, key_of(1), page(1))) is None


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES, FILE - 1, FILE + 1])
def test_a_torn_page_is_noticed(length):
    data = (encode(IDENTITY, key_of(1), page(1)) + b"x")[:length]
    assert decode(IDENTITY, key_of(1), SIZE, data) is None


@pytest.mark.parametrize("url", ["", "folder", "memory://bucket"])
def test_what_was_saved_is_read(tmp_path, url):
    url = tmp_path / "pages" if url == "folder" else f"{url}/{tmp_path.name}" if url else ""
    store = make_store(url, NO_LIMIT if not url else 0)
    keys = fill(store, 40)
    assert store.read(keys) == [page(i) for i in range(40)]
    assert store.read([*keys[:3], key_of(99), keys[3]]) == [
        page(i) for i in range(3)
    ]  # up to the first that is nowhere
    assert store.read([key_of(99), keys[0]]) == []
    hits = store.stats.host_hits + store.stats.folder_hits
    assert hits >= 43 and store.stats.misses == 2 and not store.stats.invalid_pages
    if url:
        assert make_store(url).read(keys) == [page(i) for i in range(40)]
        assert make_store(url, identity=OTHER).read(keys) == []


def test_a_hundred_flipped_bytes_are_a_hundred_misses(tmp_path):
    keys = fill(make_store(tmp_path), 100)
    rng = np.random.default_rng(0)
    for file in files(tmp_path):
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
    store = make_store(tmp_path, NO_LIMIT)
    assert [store.read([key]) for key in keys] == [[]] * 100
    assert store.stats.misses == store.stats.invalid_pages == 100
    assert not files(tmp_path)  # so that they can be saved anew
    assert fill(store, 100) == keys and make_store(tmp_path).read(keys) == [page(i) for i in range(100)]


def test_torn_and_foreign_files_are_removed(tmp_path):
    keys = fill(make_store(tmp_path), 2)
    torn, foreign = files(tmp_path)
    torn.write_bytes(torn.read_bytes()[:-7])
    foreign.write_bytes(encode(OTHER, bytes.fromhex(foreign.stem), page(0)))
    store = make_store(tmp_path)
    assert [store.read([key]) for key in keys] == [[], []] and not files(tmp_path)


def test_host_memory_keeps_what_was_used_last():
    cache = HostCache(5 * 10)
    for i in range(5):
        cache.put(key_of(i), bytes(10))
    assert cache.get(key_of(0)) is not None
    cache.put(key_of(5), bytes(15))
    assert [i for i in range(6) if cache.get(key_of(i)) is not None] == [0, 3, 4, 5]
    assert cache.size == (4, 45)
    cache.put(key_of(6), bytes(51))  # larger than all of it
    cache.put(key_of(5), bytes(10))
    assert cache.size == (4, 40)
    cache.remove(key_of(5))
    cache.remove(key_of(5))
    assert cache.size == (3, 30)


def test_a_folder_keeps_what_was_used_last(tmp_path):
    limit = 32 * FILE
    store = make_store(tmp_path, max_bytes=limit)
    keys = fill(store, 30)
    for i, file in enumerate(sorted(files(tmp_path), key=lambda file: keys.index(bytes.fromhex(file.stem)))):
        os.utime(file, (1000 + i, 1000 + i))
    assert store.read(keys[:1])  # the oldest is used
    for i in range(30, 40):
        store.save([(key_of(i), memoryview(page(i)))])
        assert sum(file.stat().st_size for file in files(tmp_path)) <= limit
    left = {bytes.fromhex(file.stem) for file in files(tmp_path)}
    assert len(left) >= 28 and keys[0] in left and key_of(39) in left
    assert {keys[i] for i in range(1, 9)}.isdisjoint(left)
    assert store.stats.folder_bytes == FILE * len(left) == FILE * store.stats.folder_pages


def test_several_engines_keep_the_limit_of_a_folder_together(tmp_path):
    """Each of them wrote a sixteenth of the limit before it looked, and knew nothing of what the others wrote."""
    limit = 64 * FILE
    stores = [make_store(tmp_path, identity=name, max_bytes=limit) for name in (IDENTITY, IDENTITY, OTHER, OTHER)]
    for i in range(100):
        for store in stores[::2] if i % 2 else stores[1::2]:
            store.save([(key_of(i), memoryview(page(i)))])
            assert sum(file.stat().st_size for file in files(tmp_path)) <= limit
    assert len(files(tmp_path)) >= 59  # and it is used
    threads = [threading.Thread(target=fill, args=(store, 150 + i)) for i, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # How full it is depends on the moment: a page that two engines write at once, or that gets its name while the
    # folder is looked through, counts twice until the next look.
    assert 48 * FILE <= sum(file.stat().st_size for file in files(tmp_path)) <= limit
    assert not any(store.stats.lost_pages for store in stores)


def test_a_page_that_is_put_again_counts_as_used(tmp_path):
    """It was computed, because that was faster: others go before it."""
    store = make_store(tmp_path)
    keys = fill(store, 1)
    (file,) = files(tmp_path)
    os.utime(file, (1, 1))
    store.save([(keys[0], memoryview(page(0)))])
    assert file.stat().st_mtime > 1


def test_a_total_that_makes_no_sense_is_counted_anew(tmp_path):
    store = make_store(tmp_path, max_bytes=8 * FILE)
    fill(store, 8)
    for said in ("", "nonsense", "-5", f"{10**15:020}", "9" * 30, "x" * 40, "1" * 5000):
        (tmp_path / ".total").write_text(said)
        store.save([(key_of(9), memoryview(page(9)))])
        store.save([(key_of(len(said) + 10), memoryview(page(0)))])
        assert int((tmp_path / ".total").read_text()) == FILE * len(files(tmp_path)) <= 8 * FILE
    assert not store.stats.lost_pages


def test_pages_that_are_being_written_count(tmp_path, caplog):
    """Those of a process that was killed, too, until they are old: there may be no room beside them."""
    store = make_store(tmp_path, max_bytes=4 * FILE)
    fill(store, 1)
    parts = [files(tmp_path)[0].with_name(f".part-{i}") for i in range(4)]
    for part in parts:
        part.write_bytes(bytes(FILE))
    (tmp_path / ".total").unlink()
    store.save([(key_of(5), memoryview(page(5)))])
    assert not files(tmp_path) and store.stats.lost_pages == 1 and "engine.page_store_bytes" in caplog.text
    for part in parts:
        part.unlink()
    fill(store, 2)
    assert len(files(tmp_path)) == 2 and store.stats.lost_pages == 1


def test_a_page_that_is_larger_than_the_limit_is_not_saved(tmp_path, caplog):
    store = make_store(tmp_path, max_bytes=FILE - 1)
    fill(store, 2)
    assert store.stats.lost_pages == 2 and not files(tmp_path)
    assert "engine.page_store_bytes" in caplog.text


def test_only_pages_are_removed_and_what_a_dead_process_left(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.page").write_text("not one of ours")
    part = tmp_path / IDENTITY.hex() / "00" / ".part-1"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"torn")
    fill(make_store(tmp_path, max_bytes=4 * FILE), 20)
    assert part.exists() and (tmp_path / "mine" / "notes.page").exists()
    monkeypatch.setattr(page_folder, "LEFT_SECONDS", -1.0)
    fill(make_store(tmp_path, max_bytes=4 * FILE), 21)
    assert not part.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for url in (tmp_path / "file" / "pages", "nothing://bucket/pages"):
        with pytest.raises(ValueError, match=r"engine.page_store=") as refused:
            make_store(url)
        assert "\n" not in str(refused.value)


class Broken(fsspec.AbstractFileSystem):
    """A bucket that opens, and then does not answer."""

    protocol = "broken"

    def cat_file(self, *args, **kwargs):
        raise TimeoutError("no answer")

    exists = pipe_file = rm_file = cat_file

    def makedirs(self, *args, **kwargs):
        pass


def test_a_store_that_does_not_answer_is_a_miss(caplog):
    fsspec.register_implementation("broken", Broken, clobber=True)
    store = make_store("broken://bucket")
    keys = fill(store, 5)
    assert [store.read([key]) for key in keys] == [[]] * 5
    assert store.stats.lost_pages == store.stats.misses == 5
    assert len([r for r in caplog.records if "page store" in r.getMessage()]) == 1  # not one for each page


def test_reading_does_not_wait_for_writing(tmp_path, monkeypatch):
    """A sequence waits for what is read, and nobody for what is written."""
    store = make_store(tmp_path)
    keys = fill(store, 2)
    answers, put, begun = threading.Event(), PageFolder.put, threading.Semaphore(0)

    def slow(folder, key, data):
        begun.release()
        assert answers.wait(60)
        return put(folder, key, data)

    monkeypatch.setattr(PageFolder, "put", slow)
    writing = threading.Thread(target=fill, args=(store, 100))
    reading = threading.Thread(target=store.read, args=(keys,), daemon=True)
    writing.start()
    for _ in range(THREADS):
        begun.acquire()
    reading.start()
    reading.join(10)
    waits = reading.is_alive()
    answers.set()
    writing.join()
    assert not waits and store.stats.folder_hits == 2


HANGING = """
import sys, threading, fsspec
from tests.page_store.test_tiers import Broken, key_of, make_store, page
hangs = threading.Semaphore(0)
def wait(*args, **kwargs):
    hangs.release()
    threading.Event().wait()
Broken.cat_file = Broken.exists = wait
fsspec.register_implementation("broken", Broken)
store = make_store("broken://bucket")
for call in (lambda: store.read([key_of(0)]), lambda: store.save([(key_of(0), memoryview(page(0)))])):
    threading.Thread(target=call, daemon=True).start()
    hangs.acquire()
store.close()
"""


def test_a_store_that_hangs_does_not_keep_the_process_from_ending():
    """Threads of concurrent.futures are waited for at the end, for ever."""
    subprocess.run([sys.executable, "-c", HANGING], check=True, timeout=120)


def test_several_threads(tmp_path):
    store = make_store(tmp_path, 20 * FILE, max_bytes=60 * FILE)
    faults = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i in rng.integers(0, 100, 200).tolist():
            if rng.random() < 0.5:
                store.save([(key_of(i), memoryview(page(i)))])
            elif store.read([key_of(i)]) not in ([], [page(i)]):
                faults.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and not store.stats.invalid_pages and not store.stats.lost_pages
    for i in range(100, 105):  # on a busy machine others have written while one looked through the folder
        store.save([(key_of(i), memoryview(page(i)))])
    assert store.stats.host_bytes <= 20 * FILE and len(files(tmp_path)) <= 60


WRITER = """
import sys
from tests.page_store.test_tiers import key_of, make_store, page
store = make_store(sys.argv[1])
print("writing", flush=True)
for i in range(10**9):
    store.save([(key_of(i), memoryview(page(i)))])
"""


def test_a_process_killed_while_it_writes_leaves_whole_pages(tmp_path):
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline()
        while len(files(tmp_path)) < 20:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        store = make_store(tmp_path)
        found = files(tmp_path)
        assert all(store.read([bytes.fromhex(file.stem)]) for file in found) and not store.stats.invalid_pages
        for file in found[1:]:
            file.unlink()


def test_the_faster_way_is_taken():
    rule = CopyRule()
    assert rule.pays()  # what was never measured is tried
    rule.computing.add(10, 1.0)
    assert rule.pays()
    rule.loading.add(10, 2.0)
    assert [rule.pays() for _ in range(2 * TRIES)].count(True) == 2  # now and then, to measure again
    for _ in range(20):
        rule.loading.add(10, 0.5)
    assert rule.pays() and rule.loading.seconds_per_page == pytest.approx(0.05, rel=0.5)
