"""Planning a session's chain and opening it: round servers that refuse, and on through whatever fails meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakSet

from ...protocol.chain import ChainSpec
from ...protocol.errors import NoRoute, Refused, SwarmError
from ...protocol.ids import PeerId
from ...protocol.messages import MAX_ROWS, Output
from ...protocol.sampling import SamplingParams
from ...protocol.tensors import Codec, codec_at, payload_size
from ...routing.planner import Plan, PlanRequest
from ...routing.swarm import SwarmView
from ..clock import Clock
from ..host import Host
from ..models import Model, Models
from ..tasks import Supervisor
from .chain import ChainSession
from .ends import FORWARD_ROWS
from .router import Router
from .target import Target, new_session_id

AUTO_WIRE: Final = "auto"
HOP_BYTES: Final = 14_480
"""One initial congestion window: a token's frame beyond it costs a second round trip after idle."""
FRAME_OVERHEAD: Final = 100
OPEN_ATTEMPTS: Final = 64
"""Chains to try before giving up; each failure teaches which server to go round."""
PEER_ATTEMPTS: Final = 2
"""The second try dials anew: the connection may have been what was dead."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a model needs of its node."""

    host: Host
    router: Router
    clock: Clock
    tasks: Supervisor
    repair_timeout_s: float
    models: Models


class Opener:
    """Opens chains over one model."""

    def __init__(self, context: Context, model: Model) -> None:
        self._context = context
        self._model = model
        self._chains: WeakSet[ChainSession] = WeakSet()

    @property
    def _hidden(self) -> int:
        return self._model.config.hidden_size

    async def view(self, *, fresh: bool = False) -> SwarmView:
        """Who serves which blocks now."""
        model = self._model
        return await self._context.router.view(model.name, model.digest, model.config.num_blocks, fresh=fresh)

    async def route(self, *, tokens: int, remote_ends: bool) -> Plan:
        """The chain that would be used now. Raises NoRoute."""
        whole = (0, self._model.config.num_blocks)
        request = self._request(tokens=tokens, remote_ends=remote_ends, kv_tokens=0, span=whole)
        return await self._context.router.plan(await self.view(fresh=True), request)

    async def close(self) -> None:
        """End all chains that are open."""
        for chain in list(self._chains):
            await chain.close()

    async def open(
        self,
        output: Output,
        max_length: int,
        wire: str,
        *,
        lanes: int = 1,
        span: tuple[int, int] | None = None,
        remote_ends: bool,
        embed: bool = False,
        params: SamplingParams | None = None,
    ) -> tuple[ChainSession, Codec]:
        """Plan a chain and open it, around servers that refuse or do not answer.

        `remote_ends`: token ids go in and what the head gives comes out; `embed`: token ids go in, hidden states out.
        Raises NoRoute when no chain is left, Refused when all were declined.
        """
        whole = span or (0, self._model.config.num_blocks)
        request = self._request(tokens=lanes, remote_ends=remote_ends, kv_tokens=lanes * max_length, span=whole)
        request = replace(request, need_embed=remote_ends or embed)
        problems: list[SwarmError] = []
        failures: Counter[PeerId] = Counter()
        for _ in range(OPEN_ATTEMPTS):
            plan = await self._plan(request, problems, failures)
            if any(failures[peer] >= PEER_ATTEMPTS for peer in plan.peers):
                break  # nobody else is left
            codec = self._codec(wire, plan.peers)
            spec = ChainSpec(
                session=new_session_id(),
                digest=self._model.digest,
                start=whole[0],
                end=whole[1],
                codec=codec,
                cuts=_cuts(plan, embedded=remote_ends or embed, headed=remote_ends),
                lanes=lanes,
                max_length=max_length,
                embed=remote_ends or embed,
                output=output,
                sampling=params.to_wire() if params and output == Output.TOKEN else b"",
            )
            target = Target(
                spec=spec,
                request=request,
                view=self._view,
                row_bytes=self._row_bytes(spec),
                max_payload=self._max_payload(output),
                vocab=self._model.config.vocab_size,
            )
            context = self._context
            chain = ChainSession(context.host, context.router, context.clock, context.tasks, context.repair_timeout_s)
            problems = await chain.open(target, plan)
            if not problems:
                self._chains.add(chain)
                return chain, codec
            failures.update(chain.failed)
            request = replace(request, deny=request.deny | chain.refusing)
        raise problems[0]

    async def _plan(self, request: PlanRequest, problems: Sequence[SwarmError], failures: Counter[PeerId]) -> Plan:
        """A chain, given what went wrong before: round servers that failed, through them if there is no other way."""
        router, view = self._context.router, await self.view(fresh=bool(problems))
        try:
            try:
                return await router.plan(view, replace(request, deny=request.deny | failures.keys()))
            except NoRoute:
                if not failures:
                    raise
                return await router.plan(view, request)
        except NoRoute as exc:  # that servers declined says more than that none is left
            declined = next((problem for problem in problems if isinstance(problem, Refused)), exc)
            raise declined from exc

    async def _view(self, fresh: bool) -> SwarmView:
        return await self.view(fresh=fresh)

    def _codec(self, wire: str, peers: Sequence[PeerId]) -> Codec:
        """The session's codec. `auto`: bf16, or int8s where a token's frame would not fit or a link is slow."""
        if wire != AUTO_WIRE:
            return Codec.from_label(wire)
        frame = payload_size(Codec.BF16, 1, self._hidden) + FRAME_OVERHEAD
        return Codec.INT8S if frame > HOP_BYTES or self._context.router.any_slow(peers) else Codec.BF16

    def _request(self, *, tokens: int, remote_ends: bool, kv_tokens: int, span: tuple[int, int]) -> PlanRequest:
        return PlanRequest(
            start=span[0],
            end=span[1],
            tokens=tokens,
            bytes_per_token=payload_size(Codec.BF16, 1, self._hidden),
            need_embed=remote_ends,
            need_head=remote_ends,
            kv_tokens=kv_tokens,
        )

    def _row_bytes(self, spec: ChainSpec) -> int:
        """Payload of a result per row wanted."""
        match spec.output:
            case Output.TOKEN:
                return 0
            case Output.LOGITS:
                return 4 * self._model.config.vocab_size
            case _:
                return payload_size(codec_at(spec.end, spec.codec, spec.cuts), 1, self._hidden)

    def _max_payload(self, output: Output) -> int:
        rows = payload_size(Codec.FP32, MAX_ROWS, self._hidden)
        return max(rows, 4 * self._model.config.vocab_size * FORWARD_ROWS) if output == Output.LOGITS else rows


def _cuts(plan: Plan, *, embedded: bool, headed: bool) -> tuple[int, ...]:
    """Borders where hidden states are encoded: those of the first chain, for the session's whole life.

    Where a server embeds or runs the head, no hidden states cross the model's own ends.
    """
    borders = [hop.start for hop in plan.hops] + [plan.hops[-1].end]
    return tuple(borders[1 if embedded else 0 : -1 if headed else None])
