"""swarmnode: run large language models together, peer to peer, from asyncio."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CausalLM", "Node", "NodeConfig", "SwarmError", "__version__"]

if TYPE_CHECKING:
    from .node.client.causal import CausalLM
    from .node.config import NodeConfig
    from .node.node import Node
    from .protocol.errors import SwarmError

_HOMES = {"Node": "node.node", "NodeConfig": "node.config", "SwarmError": "protocol.errors"}
_HOMES["CausalLM"] = "node.client.causal"


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import swarmnode` itself loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"swarmnode.{_HOMES[name]}"), name)
