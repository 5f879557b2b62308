"""The cache of converted weights: made once, checked when read, shared by processes, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from swarmnode.kernels.loading import store as module
from swarmnode.kernels.loading.store import Store, fingerprint

torch.set_num_threads(1)


class Maker:
    """Counts how often an item is made."""

    def __init__(self) -> None:
        self.calls = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"a": torch.arange(100.0), "b": torch.ones(3, 3, dtype=torch.bfloat16)}

    def blob(self) -> bytes:
        self.calls += 1
        return b"data" * 100


def test_an_item_is_made_once_and_mapped_afterwards(tmp_path):
    maker = Maker()
    store = Store(tmp_path / "deep" / "er")
    first = store.tensors("x", maker.tensors)
    again = Store(tmp_path / "deep" / "er").tensors("x", maker.tensors)
    assert maker.calls == 1
    assert all(torch.equal(first[name], again[name]) for name in "ab")
    assert store.blob("y", maker.blob) == store.blob("y", maker.blob) == b"data" * 100
    assert maker.calls == 2
    assert not list(store.folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap"])
def test_a_damaged_item_is_noticed_and_made_again(tmp_path, damage, caplog):
    caplog.set_level("WARNING")
    maker = Maker()
    store = Store(tmp_path)
    store.tensors("x", maker.tensors)
    store.blob("x", maker.blob)
    for name in ("x.safetensors", "x.bin"):
        path = tmp_path / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        damaged = {"flip": data, "truncate": data[:-5], "empty": b"", "swap": b"{}" * 100}[damage]
        path.write_bytes(damaged)
    assert torch.equal(store.tensors("x", maker.tensors)["a"], torch.arange(100.0))
    assert store.blob("x", maker.blob) == b"data" * 100
    assert maker.calls == 4
    assert caplog.text.count("damaged cache item") == 2
    store.tensors("x", maker.tensors)
    assert maker.calls == 4


def test_a_full_disk_serves_from_memory_and_says_so(tmp_path, monkeypatch, caplog):
    def full(path: Path, chunks: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    maker = Maker()
    assert torch.equal(Store(tmp_path).tensors("x", maker.tensors)["a"], torch.arange(100.0))
    assert maker.calls == 1
    assert "No space left on device" in caplog.text
    assert "free some space" in caplog.text


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    def chunks():
        yield b"x" * 100
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).file("f", chunks, lambda path: path.exists())
    assert [path.name for path in tmp_path.iterdir()] == ["f.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="a file as a folder is another error there")
def test_an_unusable_cache_folder_serves_from_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert Store(tmp_path / "file" / "cache").blob("x", Maker().blob) == b"data" * 100
    assert "cannot keep x.bin" in caplog.text


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    leftover = tmp_path / "x.safetensors.1-2.tmp"
    leftover.write_bytes(b"half")
    Store(tmp_path).tensors("x", Maker().tensors)
    assert not leftover.exists()


def test_threads_that_start_together_make_an_item_once(tmp_path):
    maker = Maker()
    entered = threading.Event()

    def slow() -> dict[str, torch.Tensor]:
        entered.set()
        return maker.tensors()

    results: list[dict[str, torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(Store(tmp_path).tensors("x", slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered.is_set()
    assert maker.calls == 1
    assert len(results) == 4


@pytest.mark.slow
def test_processes_that_start_together_make_an_item_once(tmp_path):
    code = (
        "import sys, torch, pathlib\n"
        "from swarmnode.kernels.loading.store import Store\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def make():\n"
        "    with (folder / 'made').open('a') as log: log.write('x')\n"
        "    return {'a': torch.ones(1_000_000)}\n"
        "assert Store(folder / 'cache').tensors('x', make)['a'].sum() == 1_000_000\n"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment) for _ in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4
    assert (tmp_path / "made").read_text() == "x"


def test_a_fingerprint_changes_with_the_file_and_the_version(tmp_path):
    path = tmp_path / "f"
    path.write_text("one")
    before = fingerprint([path], 1)
    assert before == fingerprint([path], 1) != fingerprint([path], 2)
    path.write_text("other")
    assert fingerprint([path], 1) != before
