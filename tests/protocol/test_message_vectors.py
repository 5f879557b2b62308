"""Every message against frames written down once: a change of these bytes is a change of the protocol."""

import json
from pathlib import Path

import pytest
from swarmnode.protocol import messages
from swarmnode.protocol.frames import PREFIX, pack, unpack_header, unpack_prefix
from swarmnode.protocol.wire import Catalogue, Message

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "messages.json").read_text())["vectors"]
KINDS = {name: item for name, item in vars(messages).items() if isinstance(item, type) and issubclass(item, Message)}
del KINDS["Message"]


def value(plain):
    if isinstance(plain, dict):
        return bytes.fromhex(plain["hex"])
    return tuple(plain) if isinstance(plain, list) else plain


def built(vector):
    return KINDS[vector["message"]](**{name: value(plain) for name, plain in vector["fields"].items()})


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['message']} {v.get('case', '')}".strip())
def test_frame_is_as_written_down(vector):
    frame = bytes.fromhex(vector["frame"])
    assert pack(built(vector).to_header(), vector["payload_size"]) == frame
    header_size, payload_size = unpack_prefix(frame[: PREFIX.size], vector["payload_size"])
    assert (header_size, payload_size) == (len(frame) - PREFIX.size, vector["payload_size"])
    catalogue = Catalogue(*KINDS.values())
    assert catalogue.parse(unpack_header(frame[PREFIX.size :])) == built(vector)


def test_every_message_has_a_vector():
    assert {vector["message"] for vector in VECTORS} == set(KINDS)


def test_no_two_messages_share_a_kind():
    assert len({item.kind for item in KINDS.values()}) == len(KINDS)
