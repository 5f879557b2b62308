"""Chat messages -> one prompt, by the model's own Jinja template.

A template is code from whoever made the checkpoint, and models come from strangers: CVE-2024-34359 turned one into
remote code execution. It runs in Jinja's immutable sandbox, without loader, files or objects of ours, on plain JSON
values. That still lets it loop for ever or grow a string to terabytes, so its work and sizes are budgeted: loop turns,
calls and what an operation reads cost steps, and whatever can grow a value is measured before it is done. Lists are
measured when they are made, so none holds itself 2^40 times. Steps, not seconds: the same template gives the same
prompt on a slow machine, without a clock.
"""

from __future__ import annotations

import datetime
import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..protocol.errors import ConfigError, CorruptCheckpoint

Function = Callable[..., Any]

MAX_SOURCE: Final = 256 * 1024
"""Characters of a template; the longest published ones have some 20,000."""
MAX_STEPS: Final = 300_000
"""Loop turns, calls, list items and blocks of STEP_CHARACTERS of one rendering."""
STEP_CHARACTERS: Final = 64
MAX_SIZE: Final = 4 * 1024 * 1024
"""Characters of any value and of the prompt."""
MAX_DEPTH: Final = 32
"""Nesting of the values a template is given or prints."""
MAX_WIDTH: Final = 256
"""Columns a value may be indented by."""
FILTERS: Final = (
    *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
    *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper"),
)
"""Jinja's own filters a template may use, besides our join, replace, indent and tojson."""
METHODS: Final = (
    *("capitalize", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isdigit", "islower"),
    *("isspace", "isupper", "items", "keys", "lower", "lstrip", "removeprefix", "removesuffix", "replace", "rfind"),
    *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values"),
)
"""Methods of strings, lists and maps a template may call: none that pads or formats to a chosen width."""


class _OverBudget(Exception):
    """The template asks for more than any honest one needs."""


class ChatTemplate:
    """A compiled template. Raises CorruptCheckpoint when it is too long or no valid template. Thread-safe."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise CorruptCheckpoint(f"chat template of {len(source)} characters: at most {MAX_SOURCE} are allowed")
        self._lock = threading.Lock()
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as exc:
            raise CorruptCheckpoint(f"the chat template is not valid: {exc}") from exc

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation. Encode it with add_special=False: it holds its special tokens.

        `variables` reach the template: bos_token, eos_token, tools, enable_thinking, ... Raises ConfigError when
        the template does not accept the messages, CorruptCheckpoint when it misbehaves.
        """
        values = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables}
        try:
            values = json.loads(json.dumps(values))  # plain values only: nothing of ours can be reached from them
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigError(f"chat messages must be plain JSON values: {exc}") from exc
        if now is not None:
            values["strftime_now"] = now.strftime
        with self._lock:
            return self._render(values)

    def _render(self, values: dict[str, Any]) -> str:
        self._environment.steps = 0
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                _bound(size)
                pieces.append(piece)
        except _Refused as exc:
            raise ConfigError(f"the model's chat template does not accept these messages: {exc}") from exc
        except (_OverBudget, jinja2.TemplateError, RecursionError, MemoryError) as exc:
            raise CorruptCheckpoint(f"the model's chat template cannot be used: {exc or type(exc).__name__}") from exc
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as exc:
            raise ConfigError(f"the model's chat template failed on these messages: {exc}") from exc
        return "".join(pieces)


class _Refused(Exception):
    """`raise_exception` in a template: it tells the user what it cannot do."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.steps = 0
        ours: dict[str, Function] = {
            "tojson": self.to_json,
            "join": self.join_items,
            "replace": self.replace,
            "indent": _indent,
        }
        self.filters = {name: self.metered(cast(Function, self.filters[name]), name) for name in FILTERS}
        self.filters |= {name: self.metered(function, name) for name, function in ours.items()}
        self.tests = {name: self.metered(cast(Function, test), name) for name, test in self.tests.items()}
        kept = {name: self.globals[name] for name in ("range", "namespace", "dict")}
        self.globals = {**kept, "raise_exception": _raise_exception}
        self.globals |= {"_tick": self.tick, "_read": self.read, "_made": self.made}
        self.finalize = self.printable
        self.concat = self.join_pieces  # type: ignore[method-assign]  # macros and block sets join their output with it

    def tick(self, count: int = 1) -> None:
        """Charge `count` steps."""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise _OverBudget(f"it takes over {MAX_STEPS} steps")

    def read(self, value: Any) -> Any:
        """Charge an operation that goes through a value once."""
        if isinstance(value, str):
            self.tick(len(value) // STEP_CHARACTERS)
        elif isinstance(value, list | tuple | dict | range):
            self.tick(len(value))
        return value

    def made(self, value: Any) -> Any:
        """Measure a container that a template just made, or prints: every value in it, once per place."""
        size = 0
        for leaf, depth in _leaves(value, 0):
            self.tick()
            size = _bound(size + (len(leaf) if isinstance(leaf, str) else 1))
            if depth > MAX_DEPTH:
                raise _OverBudget(f"it nests values over {MAX_DEPTH} deep")
            if not isinstance(leaf, str | int | float | dict | list | tuple | jinja2.Undefined | None):
                raise _OverBudget(f"it keeps a {type(leaf).__name__} in a list or prints it")
        return value

    def printable(self, value: Any) -> Any:
        """What `{{ value }}` shows: plain values only."""
        return value if isinstance(value, str) else self.made(value)

    def metered(self, function: Function, name: str) -> Function:
        """A filter or test that charges for the values it reads."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            for value in args[first:]:
                self.read(value)
            value = args[first] if len(args) > first else None
            if isinstance(value, str) and name in _EXPLODING:
                self.tick(len(value))
            elif isinstance(value, list | tuple | dict) and name in _PRINTING:
                self.made(value)
            return function(*args, **kwargs)

        return charged

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods by name; attributes of loops and namespaces as the sandbox decides."""
        if callable(value) and isinstance(obj, str | list | dict | tuple | int | float):
            return attr in METHODS
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic; on texts and lists, measured."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise _OverBudget(f"it uses the operator {operator!r}")
        sized = [value for value in (left, right) if isinstance(value, str | list | tuple)]
        times = next((value for value in (left, right) if isinstance(value, int)), 1) if operator == "*" else 1
        size = _bound(sum(map(len, sized)) * max(times, 0))
        self.tick(size if sized and not isinstance(sized[0], str) else size // STEP_CHARACTERS)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A function, macro or method."""
        self.tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        for value in (owner, *args):
            self.read(value)
        if isinstance(owner, str):
            if name == "replace" and len(args) >= 2:
                return self.replace(owner, *args)
            if name in ("split", "rsplit", "splitlines"):
                self.tick(len(owner))
        result = super().call(context, obj, *args, **kwargs)
        return self.made(result) if isinstance(result, dict) else result

    def to_json(self, value: Any, indent: int | None = None, **_: Any) -> str:
        """As transformers has it: no HTML escapes, other scripts kept."""
        self.made(value)
        return json.dumps(value, ensure_ascii=False, indent=None if indent is None else _width(indent))

    def join_items(self, values: Any, separator: str = "", attribute: str | None = None) -> str:
        """The `join` filter, and `~`."""
        items: list[str] = []
        size = 0
        for value in values:
            item = value.get(attribute, "") if attribute is not None and isinstance(value, dict) else value
            items.append(str(self.printable(item)))
            size = _bound(size + len(items[-1]) + len(separator))
        self.tick(size // STEP_CHARACTERS)
        return separator.join(items)

    def join_pieces(self, pieces: Iterable[str]) -> str:
        """The output of a macro or block."""
        return self.join_items(pieces)

    def replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        """The filter and the method."""
        text = str(self.printable(text))
        size = _bound(len(text) + len(new) * (text.count(old) if old else len(text) + 1))
        self.tick(size // STEP_CHARACTERS)
        return str(text.replace(old, new, -1 if count is None else count))


class _Meter(NodeTransformer):
    """Rewrites a template so that it reports its work: see _Environment.tick, read, made."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _reported("_read", node.iter)
        node.body.insert(0, _tick())
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _tick())
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _reported("_read", node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _reported("_read", node.node)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _reported("_made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _reported("_made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _reported("_made", node) if node.ctx == "load" else node


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the type Jinja declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_EXPLODING: Final = ("list", "batch", "map", "select", "reject", "sort", "unique", "max", "min")
"""Filters that make an item of each character of a text."""
_PRINTING: Final = ("string", "lower", "upper", "title", "trim", "capitalize", "e", "escape", "safe", "int", "float")
"""Filters that turn a list into text first."""


def _reported(function: str, node: Any) -> nodes.Expr:
    return nodes.Call(nodes.Name(function, "load"), [node], [], None, None)


def _tick() -> nodes.Node:
    return nodes.ExprStmt(nodes.Call(nodes.Name("_tick", "load"), [], [], None, None))


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:500])


def _bound(size: int) -> int:
    if size > MAX_SIZE:
        raise _OverBudget(f"it makes a text or list of over {MAX_SIZE} characters")
    return size


def _leaves(value: Any, depth: int) -> Iterator[tuple[Any, int]]:
    """Every value inside a value, itself included, and how deep it lies."""
    yield value, depth
    if depth > MAX_DEPTH:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, depth + 1
            yield from _leaves(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, depth + 1)


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    padding = " " * _width(width)
    lines = str(text).splitlines()
    _bound(len(text) + len(padding) * (len(lines) + 1))
    padded = [padding + line if line or blank else line for line in lines[1:]]
    return "\n".join([(padding if first else "") + lines[0], *padded]) if lines else ""


def _width(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_WIDTH:
        raise _OverBudget(f"it indents by {value!r:.40}, at most {MAX_WIDTH} is allowed")
    return value
