#!/usr/bin/env python3
"""Serves chains on real Tritons while things break, and holds every answer against what is right.

    .venv/bin/python scripts/check_faults.py                  # Paceline's own Triton, two minutes
    .venv/bin/python scripts/check_faults.py --tritons 2      # two Tritons it only knows by address
    .venv/bin/python scripts/check_faults.py --seed 7 --seconds 600 -- --memory-mib 150
    .venv/bin/python scripts/check_faults.py --tritons 3 --follow    # which come and go
    .venv/bin/python scripts/check_faults.py --workers 2      # which are killed as well
    .venv/bin/python scripts/check_faults.py --blocks         # one of the models swaps its weights
    .venv/bin/python scripts/check_faults.py --fused          # two of them are members of one
    .venv/bin/python scripts/check_faults.py --say "runs: auto" --say "keep_alive_s: 3"

Clients ask a chain of three, a chain with a fan-out and a model by its own name, alone, in streams,
cancelled and in bursts. Meanwhile, drawn from the seed: a model's process or a whole Triton is
killed or stopped for a while, and so is the process that makes plans; chains are deleted and
applied anew, models unloaded and loaded;
with --follow a Triton leaves the list and comes back, with --workers a front process is killed.
What is after `--` is handed to `paceline serve`.

Exits 1 where a request ended twice, never, or too late, with a wrong answer or an error that faults
do not explain; where anything was not served again after the last fault, or was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from tritonclient.utils import InferenceServerException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.faults_clients import Clients, Seen
from scripts.faults_models import ASKED, CHAINS, write_models
from tests.integration.paceline_process import free_ports

from paceline.core.errors import PacelineError
from paceline.triton.launcher import LocalTriton, LocalTritonSettings, shm_owner_prefix
from paceline.v1 import control_pb2, control_pb2_grpc

MOST_ENDS = 3
"""So often a front process is killed: one that ends again and again ends them all."""
HEALED_S = 60.0
"""How long after the last fault everything must be served again."""


class Faults:
    """What breaks."""

    def __init__(
        self,
        seen: Seen,
        rng: random.Random,
        clients: Clients,
        control: Any,
        work: Path,
        options: argparse.Namespace,
    ) -> None:
        self._seen = seen
        self._rng = rng
        self._clients = clients
        self._control = control
        self._state = work / "state"
        self._list = work / "machines"
        self._options = options

    async def run(self, until_s: float) -> None:
        """One after the other, with pauses in which some of them heal."""
        kinds = {
            "model killed": (4, self._kill_model),
            "model stopped": (4, self._stop_model),
            "Triton killed": (1, self._kill_triton),
            "Triton stopped": (2, self._stop_triton),
            "planner killed": (1, self._kill_planner),
            "planner stopped": (1, self._stop_planner),
        }
        if self._options.workers > 1:
            kinds["worker killed"] = (2, self._kill_worker)
        else:
            kinds |= {
                "chain applied anew": (2, self._apply),
                "chain deleted": (1, self._delete),
                "model unloaded": (1, self._unload),
            }
        if self._options.follow:
            kinds["Triton taken off the list"] = (3, self._leave)
        names = list(kinds)
        weights = [kinds[name][0] for name in names]
        while time.monotonic() < until_s:
            (name,) = self._rng.choices(names, weights)
            self._seen.faults[name] += 1
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                await kinds[name][1]()
            await asyncio.sleep(self._rng.choice((0.1, 0.5, 2.0, 6.0)))

    def _processes(self, name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            if process.info["name"] == name and str(self._state) in command:
                found.append(process)
        return found

    async def _kill_model(self) -> None:
        self._kill(self._stubs())

    async def _stop_model(self) -> None:
        await self._stop(self._stubs())

    async def _kill_triton(self) -> None:
        self._kill(self._processes("tritonserver"))

    def _planners(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "plan_process" in " ".join(process.info["cmdline"] or ())
            and (server := process.parent()) is not None
            and str(self._state) in " ".join(server.cmdline())
        ]

    async def _kill_planner(self) -> None:
        self._kill(self._planners())

    async def _stop_planner(self) -> None:
        await self._stop(self._planners())

    async def _kill_worker(self) -> None:
        found = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "--worker" in (command := process.info["cmdline"] or ())
            and str(self._state) in command
        ]
        # Not so often that the supervisor gives up.
        if self._seen.faults["worker killed"] < MOST_ENDS:
            self._kill(found)

    async def _leave(self) -> None:
        """Off the list for a while, which is read every two seconds."""
        lines = self._list.read_text(encoding="utf-8").splitlines()
        gone = self._rng.choice(lines)
        self._write_list([line for line in lines if line != gone])
        try:
            await asyncio.sleep(self._rng.choice((0.5, 3.0, 8.0)))
        finally:
            self._write_list(lines)

    def _write_list(self, lines: Sequence[str]) -> None:
        """Whole or not at all."""
        new = self._list.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        new.replace(self._list)

    async def _stop_triton(self) -> None:
        await self._stop(self._processes("tritonserver"))

    def _stubs(self) -> list[psutil.Process]:
        tritons = self._processes("tritonserver")
        return [
            child
            for triton_process in tritons
            for child in triton_process.children(recursive=True)
            if "stub" in child.name()
        ]

    def _kill(self, found: Sequence[psutil.Process]) -> None:
        """One of them."""
        if found:
            os.kill(self._rng.choice(found).pid, signal.SIGKILL)

    async def _stop(self, found: Sequence[psutil.Process]) -> None:
        """One of them, for a while."""
        if not found:
            return
        process = self._rng.choice(found)
        process.suspend()
        try:
            await asyncio.sleep(self._rng.choice((0.05, 0.3, 1.0, 4.0)))
        finally:
            process.resume()

    async def _apply(self) -> None:
        await self._changed(self._put(self._rng.choice(sorted(CHAINS))))

    async def _delete(self) -> None:
        name = self._rng.choice(sorted(CHAINS))
        await self._changed(self._control.Delete(control_pb2.DeleteRequest(chain=name)))
        await asyncio.sleep(0.2)
        await self.put_back(name)

    async def _unload(self) -> None:
        client = self._clients.client
        await self._changed(client.unload_model("second"))
        await asyncio.sleep(0.2)
        await self.have("second")

    async def put_back(self, name: str) -> None:
        """Apply a chain until it is served: nothing else does that."""
        await self._until_changed(f"chain {name}", lambda: self._put(name))

    async def have(self, model: str) -> None:
        """Load a model until it is there."""
        client = self._clients.client
        await self._until_changed(f"model {model}", lambda: client.load_model(model))

    async def _until_changed(self, what: str, change: Callable[[], Any]) -> None:
        until_s = time.monotonic() + HEALED_S
        while not await self._changed(change()):
            if time.monotonic() > until_s:
                self._seen.complain(f"{what} was refused for {HEALED_S:g} s")
                return
            await asyncio.sleep(1.0)

    def _put(self, name: str) -> Any:
        return self._control.Apply(
            control_pb2.ApplyRequest(chains=[control_pb2.ChainDocument(yaml=CHAINS[name])])
        )

    async def _changed(self, change: Any) -> bool:
        """Changes may fail while Tritons are down, but end."""
        try:
            async with asyncio.timeout(HEALED_S):
                await change
        except (grpc.aio.AioRpcError, InferenceServerException):
            self._seen.ends["changes refused"] += 1
            return False
        except TimeoutError:
            self._seen.complain(f"a change took more than {HEALED_S:g} s")
            return False
        return True


async def healed(clients: Clients, seen: Seen) -> None:
    """Everything is answered again, many times over; now and then one may be late."""
    for name in ASKED:
        until_s = time.monotonic() + HEALED_S
        good = 0
        while good < 20:
            answered = await clients.ask(name)
            good = good + 1 if answered else max(0, good - 4)
            if time.monotonic() > until_s:
                seen.complain(f"{name} is not served {HEALED_S:g} s after the last fault")
                break
            await asyncio.sleep(0.02 if answered else 0.5)


@asynccontextmanager
async def serving(
    work: Path, options: argparse.Namespace
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`paceline serve` over what it is to serve; its address."""
    models, chains, state = work / "models", work / "chains", work / "state"
    chains.mkdir()
    await asyncio.to_thread(write_models, models, blocks=options.blocks, fused=options.fused)
    for name, text in CHAINS.items():
        (chains / f"{name}.yaml").write_text(text, encoding="utf-8")
    async with AsyncExitStack() as stack:
        remote: list[str] = []
        for index in range(options.tritons):
            settings = LocalTritonSettings(
                state_directory=state / f"triton{index}", model_repositories=(models,)
            )
            started = await stack.enter_async_context(LocalTriton(settings))
            remote.append(f"cpu@{started.url}")
        if options.follow:
            (work / "machines").write_text("".join(f"{each}\n" for each in remote), "utf-8")
            remote = [f"file:{work / 'machines'}"]
        ports = free_ports(options.workers) if options.workers > 1 else (0, 0)
        command = [
            *(sys.executable, "-m", "paceline", "serve", "--state-dir", str(state)),
            *("--chains", str(chains), "--model-repository", str(models)),
            *("--grpc-port", str(ports[0]), "--http-port", str(ports[1])),
            *("--replan-window-s", "5", "--workers", str(options.workers)),
            *(part for each in remote for part in ("--triton", each)),
            *(() if remote else ("--slots", "3")),
            *options.serve,
        ]
        log = stack.enter_context((work / "paceline.log").open("w+"))
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield await _address(process, work / "paceline.log"), process
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def _address(process: asyncio.subprocess.Process, log: Path) -> str:
    for _ in range(1200):
        text = await asyncio.to_thread(log.read_text, encoding="utf-8")
        if found := re.search(r"workers serve gRPC on (\S+);|serving gRPC on (\S+),", text):
            return found[1] or found[2]
        if process.returncode is not None:
            break
        await asyncio.sleep(0.1)
    raise PacelineError(f"paceline serve did not start:\n{text}")


async def check(work: Path, options: argparse.Namespace) -> Seen:
    """The whole run."""
    seen, rng = Seen(), random.Random(options.seed)
    async with serving(work, options) as (address, process):
        connections = 4 * options.workers if options.workers > 1 else 1
        clients = Clients(address, seen, random.Random(rng.random()), connections)
        async with grpc.aio.insecure_channel(address) as channel:
            control = control_pb2_grpc.ControlStub(channel)
            faults = Faults(seen, rng, clients, control, work, options)
            await healed(clients, seen)
            front = psutil.Process(process.pid)
            before_bytes = front.memory_info().rss
            began_s = time.monotonic()
            until_s = began_s + options.seconds
            waited_for = {
                asyncio.create_task(clients.run(options.rate, until_s + 2.0)),
                asyncio.create_task(faults.run(until_s)),
            }
            while waited_for:
                done, waited_for = await asyncio.wait(waited_for, timeout=15.0)
                for task in done:
                    task.result()
                print(
                    f"{time.monotonic() - began_s:5.0f} s: {sum(seen.faults.values())} faults, "
                    f"{seen.asked} requests: {dict(seen.ends)}",
                    flush=True,
                )
            if options.workers == 1:
                for name in CHAINS:
                    await faults.put_back(name)
                await faults.have("second")
            await healed(clients, seen)
            for _ in range(20):
                status = json.loads((await control.Status(control_pb2.StatusRequest())).json)
                if not status["in_flight"]:
                    break
                await asyncio.sleep(0.5)
            else:
                seen.complain(f"{status['in_flight']} requests are still in flight")
            print(
                f"paceline serve takes {front.memory_info().rss / 2**20:.0f} MiB, "
                f"{before_bytes / 2**20:.0f} before"
            )
        await clients.close()
        process.terminate()
        async with asyncio.timeout(60.0):
            code = await process.wait()
        if code:
            seen.complain(f"paceline serve ended with {code}")
    look_around(work, process.pid, seen)
    return seen


def look_around(work: Path, pid: int, seen: Seen) -> None:
    """What a `paceline serve` that has ended left behind."""
    left = [
        " ".join(p.info["cmdline"])
        for p in psutil.process_iter(["cmdline"])
        if str(work / "state") in " ".join(p.info["cmdline"] or ()) and p.pid != os.getpid()
    ]
    left += [str(path) for path in Path("/dev/shm").glob(f"{shm_owner_prefix(pid)}*")]
    for each in left:
        seen.complain(f"left behind: {each}")
    if "Traceback" in (work / "paceline.log").read_text(encoding="utf-8"):
        seen.complain("paceline serve logged a traceback")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="how long things break")
    parser.add_argument("--rate", type=float, default=40.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=1, help="what breaks, and when")
    parser.add_argument("--tritons", type=int, default=0, help="remote Tritons (0: its own)")
    parser.add_argument("--keep", type=Path, help="a new directory, to work in and keep with logs")
    parser.add_argument("--follow", action="store_true", help="a list of them, which changes")
    parser.add_argument("--workers", type=int, default=1, help="front processes")
    parser.add_argument("--blocks", action="store_true", help="one of the models within a budget")
    parser.add_argument("--fused", action="store_true", help="two of them as one within a budget")
    parser.add_argument(
        "--say", action="append", default=[], help="one more line of every chain file; repeatable"
    )
    parser.add_argument("serve", nargs="*", help="further options of paceline serve, after --")
    options = parser.parse_args()
    if options.follow and not options.tritons:
        parser.error("--follow needs --tritons N: who can leave is known by address")
    for name in CHAINS:
        CHAINS[name] += "".join(f"{line}\n" for line in options.say)
    with ExitStack() as stack:
        if options.keep is None:
            temporary = tempfile.TemporaryDirectory(prefix="paceline-faults-")
            work = Path(stack.enter_context(temporary))
        else:
            work = options.keep.resolve()
            work.mkdir(parents=True)
        seen = asyncio.run(check(work, options))
    print(f"{seen.asked} requests: {dict(seen.ends)}; faults: {dict(seen.faults)}")
    print(f"{len(seen.wrong)} wrong")
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
