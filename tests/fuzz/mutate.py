"""Damage to valid inputs, at the level of bytes: what bit errors, cut links and hostile encoders make of a message."""

import struct

INTERESTING = (
    *(bytes([byte]) for byte in (0, 1, 0x7F, 0x80, 0xFF)),
    *(
        number.to_bytes(size, order)
        for number in (0, 1, 0x7F, 0xFF)
        for size in (2, 4, 8)
        for order in ("big", "little")
    ),
    *(b"\xff" * size for size in (2, 4, 8)),
    *(b"\x7f" + b"\xff" * (size - 1) for size in (2, 4, 8)),
    # varints: the largest of 32, 63 and 64 bits, one bit too many, not minimal, never ending
    b"\xff\xff\xff\xff\x0f",
    b"\xff" * 8 + b"\x7f",
    b"\xff" * 9 + b"\x01",
    b"\xff" * 9 + b"\x02",
    b"\x81\x00",
    b"\x80" * 10,
    # msgpack: collections and texts that promise 4 GiB, extension types, the byte that means nothing
    *(bytes([code]) + b"\xff" * 4 for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)),
    b"\xc1",
    b"\xd4\xff\x00",
    b"\x91" * 32,
    b"\xcb\x7f\xf8" + bytes(6),
    b"\xcb\xff\xf0" + bytes(6),
    # text: half a character, a surrogate, an overlong zero
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xc0\x80",
)
"""Bytes at which parsers go wrong."""
MAX_GROWTH = 4096
"""A mutation may lengthen an input by this much."""


def mutate(data, rng, other=b""):
    """One to four kinds of damage; `other` is a second input to splice with. Never raises, for any input."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(MUTATORS)(out, rng, other)
        del out[len(data) + MAX_GROWTH :]
    return bytes(out)


def _span(out, rng):
    start = rng.randint(0, len(out))
    return start, min(len(out), start + rng.choice((1, 1, 2, 4, 8, 32, 256)))


def flip(out, rng, other):
    """One bit."""
    if out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def overwrite(out, rng, other):
    """Some bytes replaced by interesting ones of the same length."""
    piece = rng.choice(INTERESTING)
    at = rng.randint(0, len(out))
    out[at : at + len(piece)] = piece


def insert(out, rng, other):
    at = rng.randint(0, len(out))
    out[at:at] = rng.choice(INTERESTING) if rng.random() < 0.7 else rng.randbytes(rng.choice((1, 2, 16)))


def delete(out, rng, other):
    start, end = _span(out, rng)
    del out[start:end]


def duplicate(out, rng, other):
    start, end = _span(out, rng)
    out[end:end] = out[start:end] * rng.choice((1, 1, 2, 8))


def truncate(out, rng, other):
    del out[rng.randint(0, len(out)) :]


def swap(out, rng, other):
    """Two pieces change places."""
    start, end = _span(out, rng)
    piece = bytes(out[start:end])
    del out[start:end]
    at = rng.randint(0, len(out))
    out[at:at] = piece


def splice(out, rng, other):
    """The front of this input, the back of the other."""
    out[rng.randint(0, len(out)) :] = other[rng.randint(0, len(other)) :]


def lengths(out, rng, other):
    """A number somewhere, taken as a length field, made a little or very wrong."""
    form = rng.choice((struct.Struct(">H"), struct.Struct("<H"), struct.Struct(">I"), struct.Struct("<I")))
    if len(out) < form.size:
        return
    at = rng.randint(0, len(out) - form.size)
    (value,) = form.unpack_from(out, at)
    limit = 256**form.size
    form.pack_into(out, at, rng.choice((value + 1, value - 1, 2 * value, limit - 1, limit // 2, 0, len(out))) % limit)


def nudge(out, rng, other):
    """A byte, which may be a short length, counted up or down."""
    if out:
        at = rng.randrange(len(out))
        out[at] = (out[at] + rng.choice((-1, 1))) % 256


MUTATORS = (flip, flip, overwrite, overwrite, insert, delete, duplicate, truncate, swap, splice, lengths, nudge, nudge)


def mutate_parts(parts, rng, others):
    """Damage to a sequence: inside one part, so that its frame stays sound, or to the order of the parts."""
    out = list(parts)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(6):
            case 0 | 1 | 2 if out:
                out[at] = mutate(out[at], rng, rng.choice(others) if others else b"")
            case 3 if out:
                del out[at]
            case 4 if out:
                out.insert(rng.randint(0, len(out)), out[at])
            case _ if others:
                out.insert(at, rng.choice(others))
    return out
