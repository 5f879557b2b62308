"""What a model is, by content: the root of this manifest's hash tree is the digest in `name@digest`.

Three kinds of leaves, so that a server checks only what it holds: one per block, one for embedding and head, one
for config and text files (tokenizer, chat template, generation defaults). A tensor stands in its leaf by name, type,
shape and sha256 of its bytes as stored in the checkpoint: GGUF and safetensors files of one model are two models,
because their numbers differ. Whoever has no file fetches this from any peer and checks it against the digest alone.

The display name is not hashed: renaming a folder makes no new model. Text files are kept deflated (Gemma's
tokenizer.json is 33 MB, 5 MB packed) and hashed unpacked. Layout and golden vectors: docs/spec/manifest.md.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from .errors import CorruptCheckpoint, LocalProtocolError, RemoteProtocolError

Buffer = bytes | bytearray | memoryview

VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 * 1024 * 1024
MAX_BLOCKS: Final = 1024
MAX_TENSORS: Final = 4096
"""Tensors in one leaf; a block of a mixture of 512 experts has 1,550."""
MAX_ALL_TENSORS: Final = 1 << 18
"""Tensors of the whole model: 384 experts in 61 blocks are 70,000. Each takes about 400 bytes of memory."""
MAX_KEYS: Final = 64
"""Fields a manifest may have; six have a meaning."""
MAX_FILES: Final = 16
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
"""Of one text file, unpacked."""
MAX_CONFIG_BYTES: Final = 64 * 1024
MAX_NAME: Final = 256
MAX_DIMENSIONS: Final = 8
MAX_SIZE: Final = 2**50
_DEFLATE_LEVEL: Final = 6
_DIGEST_SIZE: Final = 32

TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor."""

    name: str
    """As in the checkpoint file."""
    dtype: str
    """As the file spells it: BF16, F32, Q5_0, ..."""
    shape: tuple[int, ...]
    """Outermost first."""
    size_bytes: int
    """Of the stored bytes."""
    sha256: bytes
    """Of the stored bytes."""

    def to_wire(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), self.size_bytes, self.sha256]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One text file, whole."""

    name: str
    """For example tokenizer.json."""
    size_bytes: int
    """Unpacked."""
    sha256: bytes
    """Of the unpacked bytes."""
    packed: bytes
    """zlib stream of the bytes."""

    @classmethod
    def pack(cls, name: str, data: bytes) -> FileEntry:
        """Deflate a file. Raises CorruptCheckpoint when it is larger than a manifest may carry."""
        if len(data) > MAX_FILE_BYTES:
            raise CorruptCheckpoint(f"{name} of {len(data)} bytes: a model's text files may have {MAX_FILE_BYTES}")
        return cls(name, len(data), hashlib.sha256(data).digest(), zlib.compress(data, _DEFLATE_LEVEL))

    def unpack(self) -> bytes:
        """The file's bytes, checked. Raises RemoteProtocolError: only a peer's entry can be wrong."""
        try:
            inflater = zlib.decompressobj()
            data = inflater.decompress(self.packed, self.size_bytes + 1)  # never more than was announced
        except zlib.error as exc:
            raise RemoteProtocolError(f"manifest: {self.name} is not a zlib stream") from exc
        if len(data) != self.size_bytes or hashlib.sha256(data).digest() != self.sha256:
            raise RemoteProtocolError(f"manifest: {self.name} does not match its sha256")
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A model's identity and everything about it but the weights."""

    name: str
    """Display name; not part of the digest."""
    config: bytes
    """Canonical JSON of the model config."""
    blocks: tuple[tuple[TensorEntry, ...], ...]
    """The tensors of each block, sorted by name."""
    head: tuple[TensorEntry, ...]
    """Embedding, final norm and LM head, sorted by name."""
    files: tuple[FileEntry, ...]
    """Text files, sorted by name."""

    @property
    def digest(self) -> bytes:
        """The 32-byte root over all leaves."""
        return root([self.block_leaf(index) for index in range(len(self.blocks))], self.head_leaf(), self.text_leaf())

    def block_leaf(self, index: int) -> bytes:
        """Hash of one block's entries."""
        return _leaf(b"block", [entry.to_wire() for entry in self.blocks[index]])

    def head_leaf(self) -> bytes:
        """Hash of the entries of embedding, final norm and head."""
        return _leaf(b"head", [entry.to_wire() for entry in self.head])

    def text_leaf(self) -> bytes:
        """Hash of the config and of the text files' names, sizes and hashes."""
        return _leaf(b"text", [self.config, [[file.name, file.size_bytes, file.sha256] for file in self.files]])

    def has_file(self, name: str) -> bool:
        """Whether a text file of this name came with the model."""
        return any(file.name == name for file in self.files)

    def file(self, name: str) -> bytes:
        """A text file's bytes. Raises KeyError when the model has no such file."""
        for entry in self.files:
            if entry.name == name:
                return entry.unpack()
        raise KeyError(name)

    def matches_file(self, name: str, data: Buffer) -> bool:
        """Whether `data` are the bytes of the text file `name`."""
        digest = hashlib.sha256(data).digest()
        return any(file.name == name and file.sha256 == digest for file in self.files)

    def mismatches(self, entries: Iterable[TensorEntry], stored: Mapping[str, Buffer]) -> list[str]:
        """Names of the tensors of a leaf (`blocks[i]` or `head`) whose stored bytes are absent or differ."""
        return [entry.name for entry in entries if not _same(entry, stored.get(entry.name))]

    def encode(self) -> bytes:
        """The bytes that travel; at most MAX_MANIFEST_BYTES."""
        packed: bytes = msgpack.packb(
            {
                0: VERSION,
                1: self.name,
                2: self.config,
                3: [[entry.to_wire() for entry in block] for block in self.blocks],
                4: [entry.to_wire() for entry in self.head],
                5: [[file.name, file.size_bytes, file.sha256, file.packed] for file in self.files],
            }
        )
        if len(packed) > MAX_MANIFEST_BYTES:
            raise LocalProtocolError(f"manifest of {len(packed)} bytes: at most {MAX_MANIFEST_BYTES} can be sent")
        return packed

    @classmethod
    def decode(cls, data: bytes, digest: bytes | None = None) -> Manifest:
        """Parse and check what a peer (or our own cache) says a model is, files included.

        With `digest`, the content must have that root. Raises RemoteProtocolError on anything else.
        """
        manifest = _parse(data)
        for file in manifest.files:
            file.unpack()
        if digest is not None and manifest.digest != digest:
            raise RemoteProtocolError("manifest does not match the model digest it was asked for")
        return manifest


def root(block_leaves: Iterable[bytes], head_leaf: bytes, text_leaf: bytes) -> bytes:
    """The model digest over its leaves: with a manifest's leaf hashes, one leaf can be checked alone."""
    leaves = list(block_leaves)
    state = hashlib.sha256(b"swarmnode/model/1/root" + len(leaves).to_bytes(4, "big"))
    for leaf in (*leaves, head_leaf, text_leaf):
        state.update(leaf)
    return state.digest()


def _leaf(kind: bytes, content: list[Any]) -> bytes:
    return hashlib.sha256(b"swarmnode/model/1/" + kind + b"\0" + msgpack.packb(content)).digest()


def _same(entry: TensorEntry, data: Buffer | None) -> bool:
    return (
        data is not None
        and memoryview(data).nbytes == entry.size_bytes
        and hashlib.sha256(data).digest() == entry.sha256
    )


def _parse(data: bytes) -> Manifest:
    if len(data) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(f"manifest of {len(data)} bytes: at most {MAX_MANIFEST_BYTES} are allowed")
    reader = _Reader(data)
    found: dict[object, Any] = {}
    for _ in range(reader.map("manifest", MAX_KEYS)):
        key = reader.scalar()
        if key in found:
            raise RemoteProtocolError(f"manifest names its field {key!r:.20} twice")
        found[key] = _FIELDS.get(key, _Reader.skip)(reader)
    reader.end()
    if found.get(0) != VERSION or not found.keys() >= _FIELDS.keys():
        raise RemoteProtocolError(f"manifest is not a whole one of version {VERSION}: the peer runs another release")
    return Manifest(name=found[1], config=found[2], blocks=found[3], head=found[4], files=found[5])


class _Reader:
    """Takes values out one after another, each where the layout has it, so that nothing else is ever built.

    Unpacked whole, a manifest of 64 MiB of empty lists would take 4.6 GB.
    """

    def __init__(self, data: bytes) -> None:
        self._size = len(data)
        self._tensors = 0
        self._unpacker = msgpack.Unpacker(
            strict_map_key=False,
            max_buffer_size=MAX_MANIFEST_BYTES,
            read_size=max(len(data), 1),
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
        self._unpacker.feed(data)

    def _call(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
            raise RemoteProtocolError(f"manifest is not valid msgpack: {exc or type(exc).__name__}") from exc

    def scalar(self) -> Any:
        """The next value; of lists and maps only empty ones get here, which no field may be."""
        value = self._call(self._unpacker.unpack)
        if isinstance(value, list | dict):
            raise RemoteProtocolError("manifest: a list or map stands where a value should be")
        return value

    def skip(self) -> None:
        """Pass over a field that a later release has added."""
        self._call(self._unpacker.skip)

    def map(self, where: str, most: int) -> int:
        """Entries of the map that begins here."""
        return self._bounded(self._unpacker.read_map_header, where, most)

    def list(self, where: str, most: int, least: int = 0) -> int:
        """Items of the list that begins here."""
        return self._bounded(self._unpacker.read_array_header, where, most, least)

    def _bounded(self, read: Callable[[], int], where: str, most: int, least: int = 0) -> int:
        count: int = self._call(read)
        if not least <= count <= most:
            raise RemoteProtocolError(f"manifest: {where} has {count} entries, {least}..{most} are allowed")
        return count

    def end(self) -> None:
        """Nothing may follow."""
        if self._unpacker.tell() != self._size:
            raise RemoteProtocolError("manifest is followed by other bytes")

    def tensors(self, where: str) -> tuple[TensorEntry, ...]:
        count = self.list(where, MAX_TENSORS)
        self._tensors += count
        if self._tensors > MAX_ALL_TENSORS:
            raise RemoteProtocolError(f"manifest: over {MAX_ALL_TENSORS} tensors")
        entries = tuple(self._tensor(where) for _ in range(count))
        _sorted_names([entry.name for entry in entries], where)
        return entries

    def _tensor(self, where: str) -> TensorEntry:
        self.list(where, 5, 5)
        name, dtype = _text(self.scalar(), where), _text(self.scalar(), where)
        shape = tuple(_size(self.scalar(), where) for _ in range(self.list(where, MAX_DIMENSIONS)))
        size_bytes = _size(self.scalar(), where)
        return TensorEntry(name, dtype, shape, size_bytes, _blob(self.scalar(), where, _DIGEST_SIZE, _DIGEST_SIZE))

    def blocks(self) -> tuple[tuple[TensorEntry, ...], ...]:
        return tuple(self.tensors(f"block {index}") for index in range(self.list("blocks", MAX_BLOCKS)))

    def files(self) -> tuple[FileEntry, ...]:
        files = tuple(self._file() for _ in range(self.list("files", MAX_FILES)))
        _sorted_names([file.name for file in files], "files")
        return files

    def _file(self) -> FileEntry:
        self.list("files", 4, 4)
        name, size = _text(self.scalar(), "files"), _size(self.scalar(), "files")
        if size > MAX_FILE_BYTES:
            raise RemoteProtocolError(f"manifest: a file of {size} bytes: at most {MAX_FILE_BYTES} are allowed")
        sha256 = _blob(self.scalar(), "files", _DIGEST_SIZE, _DIGEST_SIZE)
        return FileEntry(name, size, sha256, _blob(self.scalar(), "files", MAX_MANIFEST_BYTES))


_FIELDS: Final[dict[object, Callable[[_Reader], Any]]] = {
    0: _Reader.scalar,
    1: lambda reader: _text(reader.scalar(), "name"),
    2: lambda reader: _blob(reader.scalar(), "config", MAX_CONFIG_BYTES),
    3: _Reader.blocks,
    4: lambda reader: reader.tensors("head"),
    5: _Reader.files,
}


def _sorted_names(names: list[str], where: str) -> None:
    """One order only, so that equal content has equal leaves; and no name twice."""
    if names != sorted(set(names)):
        raise RemoteProtocolError(f"manifest: the names of {where} are not sorted and unique")


def _text(value: object, where: str) -> str:
    if type(value) is not str or len(value) > MAX_NAME:
        raise RemoteProtocolError(f"manifest: {where} has a name that is no text of at most {MAX_NAME} characters")
    return value


def _size(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise RemoteProtocolError(f"manifest: {where} has a size that is no integer in 0..{MAX_SIZE}")
    return value


def _blob(value: object, where: str, most: int, least: int = 0) -> bytes:
    if type(value) is not bytes or not least <= len(value) <= most:
        raise RemoteProtocolError(f"manifest: {where} has bytes that are not {least}..{most} long")
    return value
