"""Parsers of weights files as targets. Apart from the others, for importing them loads torch."""

import os
from pathlib import Path
from tempfile import gettempdir

from swarmnode.kernels.loading.gguf_file import GgufFile
from swarmnode.kernels.loading.safetensors import SafetensorsFile
from swarmnode.protocol.errors import CorruptCheckpoint, UnsupportedModel

from . import seeds
from .targets import KIB, Target


def _written(data, suffix):
    """Both parsers map files, so the input must be one; on tmpfs where there is one."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(gettempdir())
    path = folder / f"swarmnode-fuzz-{os.getpid()}{suffix}"
    path.write_bytes(data)
    return path


def run_gguf(data):
    path = _written(data, ".gguf")
    try:
        file = GgufFile(path)
        for name, tensor in file.tensors.items():
            assert len(file.raw(name)) == tensor.size_bytes <= len(data)
    finally:
        path.unlink()


def run_safetensors(data):
    path = _written(data, ".safetensors")
    try:
        file = SafetensorsFile(path)
        for name, tensor in file.tensors.items():
            assert file.raw(name).nbytes == tensor.end - tensor.start <= len(data)
            try:
                assert list(file.tensor(name).shape) == list(tensor.shape)
            except UnsupportedModel:
                continue
    finally:
        path.unlink()


ERRORS = (CorruptCheckpoint, UnsupportedModel)
FILES = (
    Target("gguf", seeds.gguf, run_gguf, errors=ERRORS, base=512 * KIB),
    Target("safetensors", seeds.safetensors, run_safetensors, errors=ERRORS, base=512 * KIB),
)
