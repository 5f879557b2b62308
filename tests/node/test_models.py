"""Manifests by digest: fetched from whoever tells the truth, kept on disk, checked every time."""

from __future__ import annotations

import contextlib

import pytest
from helpers.hosts import hosts
from helpers.swarms import make_model
from swarmnode.node.framing import FrameStream
from swarmnode.node.models import Models
from swarmnode.protocol.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from swarmnode.protocol.messages import MODEL_MESSAGES, MODEL_PROTOCOL, GetManifest, ManifestReply

LIAR, HONEST, ASKER = range(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def three(folder, tmp_path):
    """A host that lies as told, one with the checkpoint, one that asks; and the model."""
    async with hosts("tcp", 3) as made:
        honest = Models(made[HONEST], tmp_path / "honest")
        yield made, await honest.open(str(folder)), Models(made[ASKER], tmp_path / "asker")


def lie(host, answer: bytes, *, found: bool = True) -> list[bytes]:
    """Answer every request for a manifest with these bytes. Returns where requests are noted."""
    asked = []

    async def serve(stream):
        frames = FrameStream(stream, MODEL_MESSAGES)
        request, _ = await frames.receive()
        asked.append(request.digest)
        await frames.send(ManifestReply(found=found), answer)
        await frames.close()

    host.handle(MODEL_PROTOCOL, serve)
    return asked


async def test_a_model_is_what_its_digest_says_whoever_is_asked(three):
    made, model, asker = three
    encoded = model.manifest.encode()
    for answer in (b"", b"junk", encoded[:-1], encoded + b"\0", encoded.replace(b"<pad>", b"<PAD>")):
        asked = lie(made[LIAR], answer)
        fetched = await asker.fetch(model.digest, [made[LIAR].peer_id, made[HONEST].peer_id])
        assert asked == [model.digest]
        assert (fetched.digest, fetched.config, fetched.name) == (model.digest, model.config, model.name)
        assert fetched.checkpoint is None
        asker._by_digest.clear()
        asker._path(model.digest).unlink()
        made[LIAR].unhandle(MODEL_PROTOCOL)


async def test_nobody_has_it(three):
    made, _, asker = three
    lie(made[LIAR], b"", found=False)
    stranger = bytes(32)
    with pytest.raises(ModelNotFound, match="does not have the manifest") as caught:
        await asker.fetch(stranger, [made[LIAR].peer_id, made[HONEST].peer_id])
    assert made[HONEST].peer_id.short in str(caught.value)
    with pytest.raises(ModelNotFound, match="nobody serves it"):
        await asker.fetch(stranger, [])


async def test_a_fetched_manifest_is_kept_and_a_damaged_file_fetched_again(three):
    made, model, asker = three
    await asker.fetch(model.digest, [made[HONEST].peer_id])
    path = asker._path(model.digest)
    kept = path.read_bytes()
    asker._by_digest.clear()
    assert (await asker.fetch(model.digest, [])).digest == model.digest
    asker._by_digest.clear()
    path.write_bytes(kept[:100] + b"x" + kept[101:])
    with pytest.raises(ModelNotFound):
        await asker.fetch(model.digest, [])
    await asker.fetch(model.digest, [made[HONEST].peer_id])
    assert path.read_bytes() == kept


async def test_a_cache_that_cannot_be_written_is_no_obstacle(three, tmp_path):
    made, model, _ = three
    (tmp_path / "file").write_text("")
    asker = Models(made[ASKER], tmp_path / "file")
    assert (await asker.fetch(model.digest, [made[HONEST].peer_id])).digest == model.digest


async def test_junk_requests_are_dropped_and_good_ones_still_served(three):
    made, model, _ = three
    for junk in (b"\0\0\0\1\0\0\0\0\xff", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64):
        stream = await made[ASKER].open_stream(made[HONEST].peer_id, MODEL_PROTOCOL)
        with contextlib.suppress(ConnectionError):
            await stream.write(junk)
            await stream.close_write()
            assert await stream.read(1) == b""
        await stream.close()
    frames = FrameStream(await made[ASKER].open_stream(made[HONEST].peer_id, MODEL_PROTOCOL), MODEL_MESSAGES, 1 << 20)
    await frames.send(GetManifest(digest=model.digest))
    _, data = await frames.receive()
    assert data == model.manifest.encode()
    frames.reset()


async def test_opening_is_done_once(three, folder):
    made, _, _ = three
    models = Models(made[ASKER], folder.parent / "cache")
    first = await models.open(str(folder))
    assert await models.open(str(folder)) is first
    assert models.known(first.digest) is first
    assert list(models) == [first]


async def test_what_is_no_model_is_named(three, tmp_path):
    _, _, models = three
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.gguf").write_bytes(b"junk" * 100)
    with pytest.raises((ModelNotFound, CorruptCheckpoint, UnsupportedModel), match="empty"):
        await models.open(str(tmp_path / "empty"))
    with pytest.raises(CorruptCheckpoint, match=r"weights\.gguf"):
        await models.open(str(tmp_path / "weights.gguf"))
    with pytest.raises(ModelNotFound, match="nowhere"):
        await models.open(str(tmp_path / "nowhere"))
