"""The command line. Only commands' words are here; what one does is node/commands.py, loaded when it runs.

`swarmnode --help` must cost nothing, so this module imports click, its options and the error tree. Data goes to stdout,
everything else to stderr. Every error is one line, `error: cause. fix`, with the exit codes of protocol/errors.py:
0 ok, 1 error, 2 usage, 3 no route, 4 refused, 5 timeout, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import __version__
from .node.options import AS_JSON, REACH, SAMPLING, SWARM, WEIGHTS, option
from .protocol.errors import ConfigError, SwarmError

if TYPE_CHECKING:
    from .node.config import NodeConfig
    from .node.console import Console
    from .node.generating import Generating

INTERRUPTED: Final = 130
USAGE: Final = 2
_MAX_PROMPT_BYTES: Final = 16 * 1024 * 1024


def main(args: Sequence[str] | None = None) -> None:
    """The console script."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors a user can meet end as one line on stderr."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = swarmnode.main(words, prog_name="swarmnode", standalone_mode=False, obj=words)
    except click.UsageError as exc:
        return _fail(_usage(exc), USAGE)
    except click.ClickException as exc:
        return _fail(exc.format_message(), exc.exit_code)
    except SwarmError as exc:
        return _fail(str(exc), exc.exit_code)
    except BaseExceptionGroup as exc:
        return _first_of(exc)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 1
    except OSError as exc:
        return _fail(f"{exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}", 1)
    return code if isinstance(code, int) else 0


def _first_of(group: BaseExceptionGroup[BaseException]) -> int:
    """The first error of a group that a user can meet; a group of anything else is a bug and goes on."""
    known = group.subgroup(SwarmError)
    if known is None:
        raise group
    leaf: BaseException = known
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return _fail(str(leaf), leaf.exit_code if isinstance(leaf, SwarmError) else 1)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    click.echo(f"error: {line}", err=True)
    return code


def _usage(exc: click.UsageError) -> str:
    where = exc.ctx.command_path if exc.ctx is not None else "swarmnode"
    return f"{exc.format_message().rstrip('.')}. See {where} --help"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config", type=click.Path(path_type=Path), envvar="SWARMNODE_CONFIG", metavar="FILE", help="Settings file (TOML)."
)
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.option("-v", "--verbose", count=True, help="Log to stderr; twice for every detail.")
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def swarmnode(ctx: click.Context, /, config: Path | None, quiet: bool, verbose: int) -> None:
    """Run large language models together, peer to peer."""
    if verbose:
        from .node.log import configure_logging

        configure_logging(verbose)
    if not {"-h", "--help"} & set(ctx.obj):  # help must work with a broken settings file, and cost nothing
        ctx.default_map = _settings(config)


def _settings(path: Path | None) -> dict[str, Any]:
    """The settings file as every command's defaults."""
    from .node.settings import load

    known = {name for command in swarmnode.commands.values() for name in _settable(command)}
    values = load(path, known)
    return {
        name: {key: value for key, value in values.items() if key in _settable(command)}
        for name, command in swarmnode.commands.items()
    }


def _settable(command: click.Command) -> set[str]:
    """Names a settings file may give a command: all but what only makes sense for one call."""
    return {param.name for param in command.params if param.name} - {
        "as_json",
        "prompt",
        "address",
        "stats",
        "raw",
        "count",
        "tokens",
        "file",
        "verbose",
    }


def _console(ctx: click.Context, /, as_json: bool) -> Console:
    from .node.console import Console

    return Console(as_json=as_json, quiet=bool(ctx.find_root().params["quiet"]))


def _config(peer: Sequence[str], swarm: str, **settings: Any) -> NodeConfig:
    """NodeConfig from options; folders come from the environment or the system's usual places."""
    from .node.config import NodeConfig

    folders: dict[str, Any] = {
        name: Path(os.environ[f"SWARMNODE_{name.upper()}"]) for name in _FOLDERS if _folder_set(name)
    }
    return NodeConfig(peers=tuple(peer), swarm=swarm, **(folders | settings))


_FOLDERS: Final = ("data_dir", "cache_dir", "state_dir", "trace_dir")


def _folder_set(name: str) -> bool:
    return bool(os.environ.get(f"SWARMNODE_{name.upper()}"))


@swarmnode.command()
@click.argument("model", required=False, envvar="SWARMNODE_MODEL")
@option(
    "--serve",
    default="auto",
    show_default=True,
    metavar="A:B|auto|none",
    help="Blocks A to B-1, a choice, or DHT only.",
)
@SWARM
@option("--listen", multiple=True, metavar="ADDR", help="Where to listen. Repeatable. [default: any port]")
@WEIGHTS
@option("--identity", type=click.Path(path_type=Path), default=None, metavar="FILE", help="Key file, made if missing.")
@option("--allow", multiple=True, metavar="PEER|CIDR", help="Let it in even when the node is full. Repeatable.")
@REACH
@option("--public-name", default="", metavar="NAME", help="What others see beside your peer id.")
@option(
    "--trace",
    env="SWARMNODE_TRACE_DIR",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Trace connections into files of this folder: headers and lengths, no content.",
)
@AS_JSON
@click.pass_context
def join(
    ctx: click.Context,
    /,
    model: str | None,
    serve: str,
    peer: tuple[str, ...],
    swarm: str,
    lan: bool,
    listen: tuple[str, ...],
    quant: str | None,
    dtype: str,
    device: str,
    kv: str,
    share_prefixes: str,
    threads: int | None,
    identity: Path | None,
    allow: tuple[str, ...],
    relay: tuple[str, ...],
    be_relay: str,
    relay_limit: tuple[str, ...],
    reachability: str,
    port_mapping: str,
    public_name: str,
    trace: Path | None,
    as_json: bool,
) -> int:
    """Join a swarm and serve blocks of MODEL until interrupted.

    MODEL is a folder with safetensors, a .gguf file, a Hugging Face repository, or the built-in gemma3-270m. Prints
    READY and an address on stdout when others can use it.
    """
    span = parse_span(serve)
    settings: dict[str, Any] = {"identity": identity, "public_name": public_name, "persistent": True}
    settings |= {"lan": lan, "allow": allow, "trace_dir": trace}
    settings |= {"relay": be_relay, "relays": relay, "reachability": reachability, "port_mapping": port_mapping}
    if relay_limit:
        from .protocol.relay_ledger import RelayLimits

        settings["relay_limits"] = RelayLimits.parse(relay_limit)
    if listen:
        settings["listen"] = listen
    config = _config(peer, swarm, publish_runtime=True, **settings)
    from .node import commands

    serving = commands.Serving(
        model=model,
        span=span,
        nothing=serve == "none",
        quant=quant,
        dtype=dtype,
        device=device,
        kv=kv,
        share_prefixes=share_prefixes,
        threads=threads,
    )
    return commands.run(commands.join(config, serving, _console(ctx, as_json)))


def parse_span(text: str) -> tuple[int, int] | None:
    """`A:B` as a half-open span; None for auto and none. Raises ConfigError."""
    if text in ("auto", "none"):
        return None
    start, colon, end = text.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal() and len(text) < 20):
        raise ConfigError(f"--serve {text[:40]!r}: use A:B for blocks A to B-1, such as 0:9, or auto, or none")
    if int(start) >= int(end):
        raise ConfigError(f"--serve {text} is empty: A:B serves blocks A to B-1, so B must be larger than A")
    return int(start), int(end)


@swarmnode.command()
@click.argument("prompt")
@SWARM
@SAMPLING
@AS_JSON
@click.pass_context
def generate(
    ctx: click.Context, /, prompt: str, peer: tuple[str, ...], swarm: str, lan: bool, as_json: bool, **how: Any
) -> int:
    """Write what comes after PROMPT ("-" reads it from stdin), as it is generated.

    Finds a swarm by --peer, the settings file, a node running on this machine, or one on the local network; without one
    it runs the whole model here.
    """
    text = _stdin() if prompt == "-" else prompt
    generating, config = _generating(how), _config(peer, swarm, lan=lan)
    from .node import commands

    return commands.run(commands.generate(config, text, generating, _console(ctx, as_json)))


def _stdin() -> str:
    data = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    if len(data) > _MAX_PROMPT_BYTES:
        raise ConfigError(f"the prompt on stdin is over {_MAX_PROMPT_BYTES} bytes: shorten it")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the prompt on stdin is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc


def _generating(how: dict[str, Any]) -> Generating:
    from .node.generating import Generating

    return Generating.checked(how)


@swarmnode.command()
@SWARM
@SAMPLING
@click.option("--system", default=None, metavar="TEXT", help="Instruction before the conversation.")
@click.option("--raw", is_flag=True, help="No chat template: lines as they are, for base models.")
@AS_JSON
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    peer: tuple[str, ...],
    swarm: str,
    lan: bool,
    system: str | None,
    raw: bool,
    as_json: bool,
    **how: Any,
) -> int:
    """Talk to a model: a line in, an answer out, until an empty line or Ctrl-D."""
    generating, config = _generating(how), _config(peer, swarm, lan=lan)
    from .node import commands

    return commands.run(commands.chat(config, generating, system, _console(ctx, as_json), raw=raw))


@swarmnode.command()
@SWARM
@AS_JSON
@click.pass_context
def status(ctx: click.Context, /, peer: tuple[str, ...], swarm: str, lan: bool, as_json: bool) -> int:
    """Nodes on this machine, and who serves which blocks."""
    from .node import commands, reports

    return commands.run(reports.status(_config(peer, swarm, lan=lan), _console(ctx, as_json)))


@swarmnode.command()
@SWARM
@click.option(
    "-v", "--verbose", is_flag=True, help="Every connection: round trips, streams, bytes, and why others ended."
)
@AS_JSON
@click.pass_context
def peers(ctx: click.Context, /, peer: tuple[str, ...], swarm: str, lan: bool, verbose: bool, as_json: bool) -> int:
    """Nodes met on joining, with a measured round trip each.

    With -v, the connections of the nodes running on this machine; with --peer, those of this command itself.
    """
    from .node import commands, reports

    config, console = _config(peer, swarm, lan=lan), _console(ctx, as_json)
    if verbose:
        own = ctx.get_parameter_source("peer") is click.core.ParameterSource.COMMANDLINE
        return commands.run(reports.connections(config, console, own=own))
    return commands.run(reports.peers(config, console))


@swarmnode.command()
@SWARM
@AS_JSON
@click.pass_context
def models(ctx: click.Context, /, peer: tuple[str, ...], swarm: str, lan: bool, as_json: bool) -> int:
    """Models the swarm serves."""
    from .node import commands, reports

    return commands.run(reports.models(_config(peer, swarm, lan=lan), _console(ctx, as_json)))


@swarmnode.command()
@click.argument("model", required=False, envvar="SWARMNODE_MODEL")
@SWARM
@click.option("--tokens", type=click.IntRange(1, 1 << 20), default=1, show_default=True, help="Tokens a step carries.")
@AS_JSON
@click.pass_context
def route(
    ctx: click.Context, /, model: str | None, peer: tuple[str, ...], swarm: str, lan: bool, tokens: int, as_json: bool
) -> int:
    """The chain of servers MODEL would use now, and what each hop costs."""
    from .node import commands, reports

    return commands.run(reports.route(_config(peer, swarm, lan=lan), model, tokens, _console(ctx, as_json)))


@swarmnode.command()
@click.argument("address")
@click.option(
    "-c",
    "--count",
    type=click.IntRange(1, 1000),
    default=None,
    help="Round trips.  [default: 4; at most 30 with --until-direct]",
)
@click.option("--until-direct", is_flag=True, help="Tell the path of each; end when one needs no relay, else exit 1.")
@AS_JSON
@click.pass_context
def ping(ctx: click.Context, /, address: str, count: int | None, until_direct: bool, as_json: bool) -> int:
    """Measure round trips to the node at ADDRESS, checking its identity."""
    from .node import commands, reports

    if until_direct:
        from .node.nat.pinging import ping_until_direct

        return commands.run(ping_until_direct(_config((), "main"), address, count or 30, _console(ctx, as_json)))
    return commands.run(reports.ping(_config((), "main"), address, count or 4, _console(ctx, as_json)))


@swarmnode.command()
@SWARM
@option("--listen", multiple=True, metavar="ADDR", help="Where to listen meanwhile. Repeatable. [default: any port]")
@option("--port-mapping", type=click.Choice(["auto", "off"]), default="auto", help="Have the router open a port.")
@AS_JSON
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    peer: tuple[str, ...],
    swarm: str,
    lan: bool,
    listen: tuple[str, ...],
    port_mapping: str,
    as_json: bool,
) -> int:
    """What kind of network this is, whether others can reach this machine, why not, and what to do about it.

    Joins the swarm for up to half a minute. Exit code 1 when something keeps others out.
    """
    settings: dict[str, Any] = {"listen": listen} if listen else {}
    config = _config(peer, swarm, lan=lan, port_mapping=port_mapping, **settings)
    from .node import commands
    from .node.nat.doctor import doctor

    return commands.run(doctor(config, _console(ctx, as_json)))


@swarmnode.command()
@SWARM
@AS_JSON
@click.pass_context
def invite(ctx: click.Context, /, peer: tuple[str, ...], swarm: str, lan: bool, as_json: bool) -> int:
    """A word that lets others in, for their --peer: ways to the nodes on this machine, or to the --peer given."""
    from .node.entrance import invite

    return invite(_config(peer, swarm, lan=lan), _console(ctx, as_json))


@swarmnode.command()
@click.argument("file", type=click.Path(path_type=Path))
@AS_JSON
@click.pass_context
def trace(ctx: click.Context, /, file: Path, as_json: bool) -> int:
    """Replay a connection's trace, and say where it departs from what this version does.

    FILE was written by a node with --trace. Exit code 0: the same to the last record, 1: it departs.
    """
    from .node import observed

    return observed.replay_file(file, _console(ctx, as_json))


@swarmnode.command()
@click.argument("model", required=False, envvar="SWARMNODE_MODEL")
@option("--threads", type=click.IntRange(1, 1024), default=None, metavar="N", help="Threads to compute with.")
@click.option(
    "--quant",
    type=click.Choice(("none", "int8", "nf4", "llm-int8")),
    multiple=True,
    help="Only this way to hold weights. Repeatable.",
)
@AS_JSON
@click.pass_context
def bench(ctx: click.Context, /, model: str | None, threads: int | None, quant: tuple[str, ...], as_json: bool) -> int:
    """How fast this machine is, and how fast MODEL's blocks are on it. Joins no swarm.

    Shows memory bandwidth, multiplication rates, and per way of holding weights the time of a block for one token and
    for a prompt of 128, as a share of what the hardware allows.
    """
    from .node.bench import bench
    from .node.config import BUILTIN_MODEL

    return bench(_config((), "main"), model or BUILTIN_MODEL, quant or None, threads, _console(ctx, as_json))


@swarmnode.command("id")
@option("--identity", type=click.Path(path_type=Path), default=None, metavar="FILE", help="Key file, made if missing.")
@AS_JSON
@click.pass_context
def identity(ctx: click.Context, /, identity: Path | None, as_json: bool) -> int:
    """The peer id of your default key file, or of FILE."""
    from .node import reports

    return reports.identity(_config((), "main", identity=identity), _console(ctx, as_json))


if __name__ == "__main__":
    main()
