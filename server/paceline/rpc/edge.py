"""paceline.v1.Edge: rounds are decided, payloads come in at the rate that was granted.

Invariant: a grant is used once, is forgotten when its batch has started, and there are at most
`MAX_GRANTS` of them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from math import ceil
from typing import Any

from tritonclient.grpc import service_pb2

from paceline.core.errors import ErrorKind, Rejected, RequestError
from paceline.edge.pacing import Upload as Granted
from paceline.edge.round import EdgeModel, Round, User
from paceline.edge.round import Schedule as Decided
from paceline.edge.schedule import schedule
from paceline.rpc.status import answered
from paceline.v1 import edge_pb2, edge_pb2_grpc

SERVICE = "paceline.v1.Edge"
MAX_GRANTS = 4096
FIRST_PART_S = 10.0
_REQUEST_OVERHEAD_BYTES = 16 << 10
"""What a request may have besides the payload: names, shapes, parameters."""

Context = Any
"""A CallContext; generated code only knows grpc's own."""

InferMessage = Callable[[Any, float | None], Awaitable[Any]]
"""A ModelInferRequest and the time it has left, as a ModelInferResponse."""


class EdgeService(edge_pb2_grpc.EdgeServicer):
    """The servicer."""

    def __init__(self, infer: InferMessage, *, max_message_bytes: int) -> None:
        self._infer = infer
        self._max_message_bytes = max_message_bytes
        self._grants: dict[str, Granted] = {}

    async def Schedule(
        self, request: edge_pb2.ScheduleRequest, context: Context
    ) -> edge_pb2.ScheduleResponse:
        async def decide() -> edge_pb2.ScheduleResponse:
            round_ = _round(request)
            began_s = asyncio.get_running_loop().time()
            found = await asyncio.to_thread(schedule, round_)
            ids = self._granted(round_, found, began_s) if request.grant else {}
            return _message(found, ids)

        return await answered(context, decide())

    async def Upload(
        self, requests: AsyncIterator[edge_pb2.UploadRequest], context: Context
    ) -> edge_pb2.UploadResponse:
        return await answered(context, self._upload(requests, context))

    async def _upload(
        self, requests: AsyncIterator[edge_pb2.UploadRequest], context: Context
    ) -> edge_pb2.UploadResponse:
        upload: Granted | None = None
        payload = bytearray()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(FIRST_PART_S) as limit:
                async for part in requests:
                    if upload is None:
                        upload = self._taken(part.grant_id)
                        limit.reschedule(upload.starts_s)
                    wait_s = upload.take(len(part.payload), loop.time())
                    payload += part.payload
                    if wait_s:
                        # Not reading is what holds the client back.
                        await asyncio.sleep(wait_s)
        except TimeoutError:
            raise RequestError(
                ErrorKind.DEADLINE, "the upload was not there when its batch started"
            ) from None
        if upload is None:
            raise RequestError(ErrorKind.INVALID, "an upload begins with its grant_id")
        message = service_pb2.ModelInferRequest()
        try:
            message.ParseFromString(bytes(payload))
        except Exception:
            raise RequestError(
                ErrorKind.INVALID, "the payload is no serialized ModelInferRequest"
            ) from None
        if message.model_name != upload.model:
            raise RequestError(
                ErrorKind.INVALID,
                f"the grant is for model {upload.model!r}, not {message.model_name!r}",
            )
        left_s = upload.deadline_s - loop.time()
        if (of_call_s := context.time_remaining()) is not None:
            left_s = min(left_s, of_call_s)
        answer = await self._infer(message, left_s)
        return edge_pb2.UploadResponse(response=answer.SerializeToString())

    def _taken(self, grant: str) -> Granted:
        found = self._grants.pop(grant, None)
        if found is None or found.starts_s < asyncio.get_running_loop().time():
            raise RequestError(
                ErrorKind.UNKNOWN_MODEL, "no such grant: it was used, or has expired"
            )
        return found

    def _granted(self, round_: Round, found: Decided, began_s: float) -> dict[str, str]:
        """A new grant for each user who is served, by user."""
        now_s = asyncio.get_running_loop().time()
        for expired in [key for key, g in self._grants.items() if g.starts_s < now_s]:
            del self._grants[expired]
        if len(self._grants) + found.served > MAX_GRANTS:
            first_s = min(grant.starts_s for grant in self._grants.values())
            raise Rejected(
                ErrorKind.OVERLOADED,
                f"{len(self._grants)} grants are open, {MAX_GRANTS} are allowed",
                retry_after_s=first_s - now_s,
            )
        users = {user.name: user for user in round_.users}
        starts = {name: batch.starts_s for batch in found.batches for name in batch.users}
        ids: dict[str, str] = {}
        for grant in found.grants:
            user = users[grant.user]
            payload_bytes = ceil(user.payload_bits / 8) + _REQUEST_OVERHEAD_BYTES
            ids[user.name] = secrets.token_urlsafe(16)
            self._grants[ids[user.name]] = Granted(
                user.model,
                grant.bits_per_s / 8,
                min(payload_bytes, self._max_message_bytes),
                began_s + starts[user.name],
                began_s + user.deadline_s,
            )
        return ids


def _round(request: edge_pb2.ScheduleRequest) -> Round:
    return Round(
        users=tuple(
            User(u.user, u.model, u.payload_bits, u.efficiency_bps_per_hz, u.deadline_ms / 1e3)
            for u in request.users
        ),
        models={
            m.model: EdgeModel(m.model, dict(m.blocks_bytes), m.batch_ms / 1e3, m.per_user_ms / 1e3)
            for m in request.models
        },
        bandwidth_hz=request.bandwidth_hz,
        load_bytes_per_s=request.load_bytes_per_s,
    )


def _message(found: Decided, ids: dict[str, str]) -> edge_pb2.ScheduleResponse:
    return edge_pb2.ScheduleResponse(
        batches=[
            edge_pb2.EdgeBatch(
                model=batch.model,
                users=batch.users,
                load_ms=batch.loads_s * 1e3,
                start_ms=batch.starts_s * 1e3,
                end_ms=batch.ends_s * 1e3,
            )
            for batch in found.batches
        ],
        grants=[
            edge_pb2.EdgeGrant(
                user=grant.user,
                needed_hz=grant.needed_hz,
                bandwidth_hz=grant.bandwidth_hz,
                bytes_per_s=grant.bits_per_s / 8,
                grant_id=ids.get(grant.user, ""),
            )
            for grant in found.grants
        ],
        method=found.method,
        exact=found.exact,
    )
