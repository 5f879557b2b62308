"""Declarative messages: frozen dataclasses whose fields say their wire key, type and bounds once.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Truncate(Message, kind=7):
        epoch: int = integer(2, high=MAX_EPOCH)

`to_header` and `from_header` are derived from that, so no message has hand-written parsing to get wrong. Unknown keys
are ignored (a newer peer may send them), a missing or out-of-bounds field is the peer's fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Final, Self

from .errors import LocalProtocolError, RemoteProtocolError
from .frames import Header

KIND_KEY: Final = 0
Check = Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Wire:
    """How one field stands on the wire: its integer key, a check, and words for the check."""

    key: int
    check: Check
    expected: str


def integer(key: int, *, low: int = 0, high: int, default: Any = MISSING) -> Any:
    """An int in [low, high]."""
    return _field(Wire(key, _int_in(low, high), f"an integer in {low}..{high}"), default)


def number(key: int, *, low: float, high: float, default: Any = MISSING) -> Any:
    """A finite float (or int) in [low, high]."""
    return _field(
        Wire(
            key,
            lambda v: isinstance(v, int | float) and type(v) is not bool and low <= v <= high,
            f"a number in {low}..{high}",
        ),
        default,
    )


def flag(key: int, *, default: Any = MISSING) -> Any:
    """A bool."""
    return _field(Wire(key, lambda v: type(v) is bool, "a bool"), default)


def blob(key: int, *, low: int = 0, high: int, default: Any = MISSING) -> Any:
    """Bytes of a length in [low, high]."""
    return _field(Wire(key, lambda v: type(v) is bytes and low <= len(v) <= high, f"{low}..{high} bytes"), default)


def text(key: int, *, high: int, default: Any = MISSING) -> Any:
    """A str of at most `high` characters."""
    return _field(
        Wire(key, lambda v: type(v) is str and len(v) <= high, f"a text of at most {high} characters"),
        default,
    )


def integers(key: int, *, low: int = 0, high: int, most: int, default: Any = MISSING) -> Any:
    """A tuple of at most `most` ints, each in [low, high]."""
    return _field(
        Wire(key, _list_of(_int_in(low, high), most), f"at most {most} integers"),
        default,
    )


def texts(key: int, *, high: int, most: int, default: Any = MISSING) -> Any:
    """A tuple of at most `most` strs of at most `high` characters."""
    return _field(
        Wire(key, _list_of(lambda v: type(v) is str and len(v) <= high, most), f"at most {most} texts"),
        default,
    )


def _int_in(low: int, high: int) -> Check:
    return lambda v: type(v) is int and low <= v <= high


def _list_of(check: Check, most: int) -> Check:
    return lambda v: type(v) is list and len(v) <= most and all(map(check, v))


def _field(wire: Wire, default: Any) -> Any:
    if default is MISSING:
        return field(metadata={"wire": wire})
    return field(default=default, metadata={"wire": wire})


class Message:
    """Base of all wire messages. `kind` is the frame's key 0 and never changes meaning."""

    __slots__ = ()
    kind: ClassVar[int] = -1

    def __init_subclass__(cls, kind: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:  # a slotted dataclass is created twice; only the first time carries the argument
            cls.kind = kind

    def to_header(self) -> Header:
        """The frame header that says this message. Raises LocalProtocolError for a value that breaks its bounds."""
        header: Header = {KIND_KEY: self.kind}
        for name, wire, optional in _layout(type(self)):
            value = getattr(self, name)
            if optional is not MISSING and value == optional:
                continue
            if isinstance(value, tuple):
                value = list(value)
            if not wire.check(value):
                raise LocalProtocolError(f"{type(self).__name__}.{name} must be {wire.expected}, not {value!r:.60}")
            header[wire.key] = value
        return header

    @classmethod
    def from_header(cls, header: Header) -> Self:
        """Parse a header. Raises RemoteProtocolError naming the field that is missing or out of bounds."""
        values: dict[str, Any] = {}
        for name, wire, optional in _layout(cls):
            if wire.key not in header:
                if optional is MISSING:
                    raise RemoteProtocolError(f"{cls.__name__} lacks its field {name}")
                continue
            value = header[wire.key]
            if not wire.check(value):
                raise RemoteProtocolError(f"{cls.__name__}.{name} must be {wire.expected}, not {value!r:.60}")
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


_LAYOUTS: dict[type[Message], tuple[tuple[str, Wire, Any], ...]] = {}


def _layout(cls: type[Message]) -> tuple[tuple[str, Wire, Any], ...]:
    """(name, wire, default) of each field; computed once a class, because a frame is parsed per token."""
    layout = _LAYOUTS.get(cls)
    if layout is None:
        layout = tuple((f.name, f.metadata["wire"], f.default) for f in fields(cls))  # type: ignore[arg-type]
        _LAYOUTS[cls] = layout
    return layout


class Catalogue:
    """The messages one protocol knows, by kind."""

    def __init__(self, *messages: type[Message]) -> None:
        self._by_kind = {message.kind: message for message in messages}

    def parse(self, header: Header) -> Message:
        """The message a header says. An unknown kind is a protocol error."""
        kind = header.get(KIND_KEY)
        message = self._by_kind.get(kind) if type(kind) is int else None
        if message is None:
            raise RemoteProtocolError(f"unknown message kind {kind!r:.20}")
        return message.from_header(header)
