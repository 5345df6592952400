"""paceline.v1.Control: chains, plans, status and explanations over gRPC.

Invariant: a plan and a status travel as the published JSON, field by field (the messages' fields
have its keys as names), and once more as text. How a chain file is read is given to the service:
rpc knows chains, not files.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from google.protobuf import json_format

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError, ErrorKind, RequestError
from paceline.core.plan import Plan
from paceline.core.ports import Control
from paceline.core.request import Timeline
from paceline.rpc.status import answered
from paceline.rpc.stopping import until
from paceline.v1 import control_pb2, control_pb2_grpc

SERVICE = "paceline.v1.Control"

Context = Any
"""A CallContext; generated code only knows grpc's own."""


class ParseChain(Protocol):
    """Reads a chain file's text; `name` is what messages call it. Raises ConfigError."""

    def __call__(self, text: str, *, name: str) -> Chain: ...


class ControlService(control_pb2_grpc.ControlServicer):
    """The servicer. `stopping` ends WatchStatus when the server stops."""

    def __init__(
        self, control: Control, *, parse_chain: ParseChain, stopping: asyncio.Event
    ) -> None:
        self._control = control
        self._parse_chain = parse_chain
        self._stopping = stopping

    async def Apply(
        self, request: control_pb2.ApplyRequest, context: Context
    ) -> control_pb2.ApplyResponse:
        async def apply() -> control_pb2.ApplyResponse:
            plan = await self._control.apply(self._chains(request.chains))
            return control_pb2.ApplyResponse(plan=plan_message(plan))

        return await answered(context, apply())

    async def Plan(
        self, request: control_pb2.PlanRequest, context: Context
    ) -> control_pb2.PlanResponse:
        async def plan() -> control_pb2.PlanResponse:
            would = await self._control.plan(self._chains(request.chains))
            return control_pb2.PlanResponse(plan=plan_message(would))

        return await answered(context, plan())

    async def Delete(
        self, request: control_pb2.DeleteRequest, context: Context
    ) -> control_pb2.DeleteResponse:
        deleted = await answered(context, self._control.delete(request.chain))
        return control_pb2.DeleteResponse(deleted=deleted)

    async def List(
        self, request: control_pb2.ListRequest, context: Context
    ) -> control_pb2.ListResponse:
        async def chains() -> control_pb2.ListResponse:
            return control_pb2.ListResponse(chains=map(chain_message, self._control.chains()))

        return await answered(context, chains())

    async def CurrentPlan(
        self, request: control_pb2.CurrentPlanRequest, context: Context
    ) -> control_pb2.CurrentPlanResponse:
        async def current() -> control_pb2.CurrentPlanResponse:
            plan = plan_message(self._control.current_plan())
            return control_pb2.CurrentPlanResponse(plan=plan)

        return await answered(context, current())

    async def Status(
        self, request: control_pb2.StatusRequest, context: Context
    ) -> control_pb2.StatusResponse:
        async def status() -> control_pb2.StatusResponse:
            return status_message(self._control.status())

        return await answered(context, status())

    async def WatchStatus(
        self, request: control_pb2.StatusRequest, context: Context
    ) -> AsyncIterator[control_pb2.StatusResponse]:
        changes = until(self._stopping, self._control.watch_status())
        async with aclosing(changes):
            async for status in changes:
                yield status_message(status)

    async def Explain(
        self, request: control_pb2.ExplainRequest, context: Context
    ) -> control_pb2.ExplainResponse:
        async def explain() -> control_pb2.ExplainResponse:
            timeline = self._control.explain(request.request_id)
            if timeline is None:
                raise RequestError(
                    ErrorKind.UNKNOWN_MODEL,
                    f"request '{request.request_id}' is unknown or no longer remembered",
                )
            return timeline_message(timeline)

        return await answered(context, explain())

    def _chains(self, documents: Iterable[control_pb2.ChainDocument]) -> list[Chain]:
        chains: list[Chain] = []
        for index, document in enumerate(documents):
            name = document.name or f"chains[{index}]"
            chain = self._parse_chain(document.yaml, name=name)
            if any(other.name == chain.name for other in chains):
                raise ConfigError(
                    f"chain {chain.name!r} is in this call twice", key="chain", where=name
                )
            chains.append(chain)
        if not chains:
            raise ConfigError("no chain document in the call")
        return chains


def plan_message(plan: Plan) -> control_pb2.ServingPlan:
    """The published plan format as a message."""
    published = plan.as_json()
    message = json_format.ParseDict(
        published, control_pb2.ServingPlan(), ignore_unknown_fields=True
    )
    message.json = json.dumps(published)
    return message


def status_message(status: dict[str, Any]) -> control_pb2.StatusResponse:
    """`Control.status()` as a message; keys that the message has no field for stay in `json`."""
    message = json_format.ParseDict(
        status, control_pb2.StatusResponse(), ignore_unknown_fields=True
    )
    message.json = json.dumps(status)
    return message


def chain_message(chain: Chain) -> control_pb2.ChainSummary:
    """What a chain file declares, without its text."""
    return control_pb2.ChainSummary(
        name=chain.name,
        slo_ms=round(chain.slo_s * 1e3, 6),
        attainment=chain.attainment,
        rate_rps=chain.rate_rps,
        arrivals=chain.arrivals,
        priority=chain.priority,
        inputs=[
            control_pb2.TensorDeclaration(name=s.name, datatype=s.datatype, shape=s.shape)
            for s in chain.inputs
        ],
        modules=[
            control_pb2.ModuleSummary(
                name=module.name,
                model=module.model,
                for_each=str(module.for_each or ""),
                when=str(module.when or ""),
                fan_out=module.fan_out,
            )
            for module in chain.modules
        ],
        outputs={name: str(source) for name, source in chain.outputs.items()},
    )


def timeline_message(timeline: Timeline) -> control_pb2.ExplainResponse:
    """Where a request's time went; offsets count from its arrival."""
    return control_pb2.ExplainResponse(
        request=timeline.request,
        request_id=timeline.request_id,
        chain=timeline.chain,
        latency_ms=_ms(timeline.latency_s),
        slack_ms=_ms(timeline.deadline_s - timeline.ended_s),
        met=timeline.met,
        error=timeline.error,
        spans=[
            control_pb2.Span(
                module=span.module,
                model=span.model,
                machine=span.machine,
                rows=span.rows,
                batch_size=span.batch_size,
                start_ms=_ms(span.queued_s - timeline.arrived_s),
                queue_ms=_ms(span.started_s - span.queued_s),
                execute_ms=_ms(span.ended_s - span.started_s),
            )
            for span in timeline.spans
        ],
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
