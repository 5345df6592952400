"""Clients of `check_faults.py`: requests whose right answers are known, and what became of them."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from scripts.faults_models import ASKED, asked_of
from tritonclient.utils import InferenceServerException

TIMEOUT_S = 4.0
"""A client's deadline."""
LATE_S = 1.0
"""How long after it an answer may come: two busy cores."""
EXPLAINED = {
    "StatusCode.DEADLINE_EXCEEDED": "late",
    "StatusCode.RESOURCE_EXHAUSTED": "shed",
    "StatusCode.UNAVAILABLE": "unavailable",
    "StatusCode.CANCELLED": "cancelled",
}
SAID = {
    "late": "timeout expired|deadline exceeded",
    "shed": "is overloaded|maximum queue size|is not in memory",
    "unavailable": "not reachable|not healthy|found dead|no other machine|connection|unavailable",
    "unknown": "unknown model|is not available|not found|is not ready",
}
"""On streams errors come without a status; unknown: while a chain is deleted, a model unloaded."""


@dataclass
class Seen:
    """What became of the requests, and what was done meanwhile."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    asked: int = 0

    def complain(self, text: str) -> None:
        self.wrong.append(text)
        print(f"WRONG: {text}", flush=True)


class Clients:
    """Requests without end, each held against what is right."""

    def __init__(self, address: str, seen: Seen, rng: random.Random, connections: int = 1) -> None:
        self.address = address
        self.seen = seen
        self.rng = rng
        self.client = triton.InferenceServerClient(address)
        self._connections = [self.client]
        for index in range(1, connections):
            # What differs in their options keeps gRPC from giving them one connection.
            options = [("grpc.use_local_subchannel_pool", 1), ("paceline.connection", index)]
            self._connections.append(triton.InferenceServerClient(address, channel_args=options))

    async def ask(self, name: str, *, give_up_s: float | None = None) -> bool:
        """One request; whether it was answered."""
        number, x, right = self._next(name)
        began_s = time.monotonic()
        call = asyncio.create_task(
            self._any().infer(name, [x], request_id=str(number), client_timeout=TIMEOUT_S)
        )
        if give_up_s is not None:
            await asyncio.wait((call,), timeout=give_up_s)
            call.cancel()
        try:
            result = await call
        except asyncio.CancelledError:
            if give_up_s is None:
                raise
            self.seen.ends["given up"] += 1
            return False
        except InferenceServerException as error:
            self._failed(name, number, error)
            return False
        finally:
            took_s = time.monotonic() - began_s
            if took_s > TIMEOUT_S + LATE_S:
                self.seen.complain(f"request {number} to {name} ended after {took_s:.1f} s")
        self._answered(name, number, right, result)
        return True

    async def stream(self, count: int) -> None:
        """Some requests on one stream, whose answers come by request id, items as they come."""
        rights: dict[str, Any] = {}
        parts: dict[str, list[Any]] = {}

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for _ in range(count):
                number, x, right = self._next("items")
                rights[str(number)] = right
                yield {"model_name": "items", "inputs": [x], "request_id": str(number)}
                await asyncio.sleep(self.rng.random() * 0.02)

        try:
            async with asyncio.timeout(TIMEOUT_S + LATE_S + count * 0.02):
                async for result, error in self._any().stream_infer(
                    requests(), stream_timeout=TIMEOUT_S
                ):
                    if error is not None:
                        self._failed("items", None, error)
                        continue
                    identity = result.get_response().id
                    parts.setdefault(identity, []).append(result.as_numpy("y"))
        except TimeoutError:
            self.seen.complain(f"a stream of {count} did not end")
        except InferenceServerException as error:
            self._failed("items", None, error)
        for identity, found in parts.items():
            # Parts come in any order; those that did come are rows of the right answer.
            rows = {tuple(row) for row in rights[identity]}
            got = [tuple(row) for part in found if part is not None for row in part]
            if not rows.issuperset(got) or len(set(got)) < len(got):
                self.seen.complain(f"request {identity} on a stream: {got}, not {rows}")
            self.seen.ends["streamed"] += len(got) == len(rows)

    def _any(self) -> Any:
        return self.rng.choice(self._connections)

    async def close(self) -> None:
        for each in self._connections:
            await each.close()

    def _next(self, name: str) -> tuple[int, Any, Any]:
        """A request's number, its input, and the right output."""
        self.seen.asked += 1
        given, right = asked_of(name, self.seen.asked)
        x = triton.InferInput("x", given.shape, "FP32")
        x.set_data_from_numpy(given)
        return self.seen.asked, x, right

    def _answered(self, name: str, number: int, right: Any, result: Any) -> None:
        got = result.as_numpy("y")
        if result.get_response().id != str(number):
            self.seen.complain(f"request {number} got the answer of {result.get_response().id}")
        elif got is None or got.shape != right.shape or not np.array_equal(got, right):
            self.seen.complain(f"request {number} to {name} got {got}, not {right}")
        self.seen.ends["answered"] += 1

    def _failed(self, name: str, number: int | None, error: InferenceServerException) -> None:
        status = str(error.status() or "")
        said = error.message() or ""
        kinds = (kind for kind, words in SAID.items() if re.search(words, said, re.IGNORECASE))
        kind = EXPLAINED.get(status) or next(kinds, None)
        if kind is not None:
            self.seen.ends[kind] += 1
        else:
            self.seen.ends["failed"] += 1
            self.seen.complain(f"request {number} to {name}: {status} {said}")

    async def run(self, rate_rps: float, until_s: float) -> None:
        """Ask at that rate (Poisson), now and then in bursts and streams, some given up."""
        tasks: set[asyncio.Task[Any]] = set()
        while time.monotonic() < until_s:
            draw = self.rng.random()
            batch: list[Coroutine[Any, Any, Any]]
            if draw < 0.004:
                batch = [self.ask(self.rng.choice(ASKED)) for _ in range(60)]
            elif draw < 0.02:
                batch = [self.stream(self.rng.randint(1, 12))]
            elif draw < 0.08:
                batch = [self.ask(self.rng.choice(ASKED), give_up_s=self.rng.random() * 0.1)]
            else:
                batch = [self.ask(self.rng.choice(ASKED))]
            for each in batch:
                task = asyncio.create_task(each)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(self.rng.expovariate(rate_rps))
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=TIMEOUT_S + 5 * LATE_S)
            for task in pending:
                task.cancel()
            if pending:
                self.seen.complain(f"{len(pending)} requests never ended")
