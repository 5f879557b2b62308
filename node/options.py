"""Options that several commands share, or that one has many of. Loaded for `--help`, so it imports click only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def option(*names: str, env: str | None = None, **attributes: Any) -> Callable[[Command], Command]:
    """A click option that also reads SWARMNODE_<name>."""
    variable = env or "SWARMNODE_" + names[0].partition("/")[0].lstrip("-").upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=False, **attributes)


def together(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
SWARM = together(
    option(
        "--peer",
        multiple=True,
        metavar="ADDR",
        help="Address of a live node, ending in /p2p/ID, or invite. Repeatable.",
    ),
    option("--swarm", default="main", show_default=True, metavar="NAME", help="Name of the swarm."),
    option("--lan/--no-lan", default=True, show_default=True, help="Find nodes on the local network, and be found."),
)
SAMPLING = together(
    option("--model", default=None, help="Model, when the swarm serves several."),
    option("--max-new-tokens", type=int, default=256, show_default=True, metavar="N", help="Tokens to write at most."),
    option("--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0: the likeliest token."),
    option("--top-p", type=float, default=1.0, metavar="P", help="Keep the likeliest tokens up to this probability."),
    option("--top-k", type=int, default=0, metavar="K", help="Keep the K likeliest tokens; 0 keeps all."),
    option("--min-p", type=float, default=0.0, metavar="P", help="Keep tokens this likely beside the likeliest."),
    option("--seed", type=int, default=None, metavar="S", help="Same seed, same text. Default: a random one."),
    option("--repetition-penalty", type=float, default=1.0, metavar="R", help="Above 1, make tokens seen less likely."),
    option("--frequency-penalty", type=float, default=0.0, metavar="F", help="Taken off per time a token was seen."),
    option("--presence-penalty", type=float, default=0.0, metavar="F", help="Taken off once a token was seen."),
    option("--penalty-last-n", type=int, default=0, metavar="N", help="Tokens penalties look back at; 0: all."),
    option("--logit-bias", multiple=True, metavar="ID=BIAS", help="Add BIAS to a token's logit. Repeatable."),
    option("--logprobs", type=int, default=0, metavar="N", help="With --json, the N likeliest tokens at each place."),
    option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable."),
    option("--stop-token", type=int, multiple=True, metavar="ID", help="Stop at this token id. Repeatable."),
    option(
        "--wire",
        default="auto",
        show_default=True,
        metavar="CODEC",
        help="Codec of activations: auto, bf16, int8s, fp32.",
    ),
    option(
        "--speculate",
        default="auto",
        show_default=True,
        metavar="auto|ngram|off",
        help="Guess tokens and confirm several at once. The text is the same.",
    ),
    option("--draft", default=None, metavar="MODEL", help="Let this small model guess, in this process."),
    click.option("--stats", is_flag=True, help="Print route and speed to stderr at the end."),
)
WEIGHTS = together(
    option(
        "--quant",
        default=None,
        metavar="none|int8|nf4|llm-int8",
        help="How to hold weights. [default: what suits the memory]",
    ),
    option("--dtype", default="bf16", show_default=True, metavar="bf16|fp32", help="Type computed in."),
    option("--device", default="cpu", show_default=True, help="Torch device."),
    option(
        "--kv", default="full", show_default=True, metavar="full|int8", help="Keys and values as computed, or halved."
    ),
    option(
        "--share-prefixes",
        default="all",
        show_default=True,
        metavar="all|user|none",
        help="Whose sessions compute what they begin with once.",
    ),
    option("--threads", type=click.IntRange(1, 1024), default=None, metavar="N", help="Threads to compute with."),
)
REACH = together(
    option("--relay", multiple=True, metavar="ADDR", help="Relay by which others reach this node. Repeatable."),
    option(
        "--be-relay",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Pass on connections between others; auto: if this node can be dialed.",
    ),
    option("--relay-limit", multiple=True, metavar="NAME=N", help="What to give as a relay at most. Repeatable."),
    option(
        "--reachability",
        type=click.Choice(["auto", "public", "private"]),
        default="auto",
        show_default=True,
        help="Whether others can dial this node; auto finds out.",
    ),
    option(
        "--port-mapping",
        type=click.Choice(["auto", "off"]),
        default="auto",
        show_default=True,
        help="Have the router open a port (PCP, NAT-PMP, UPnP).",
    ),
)
