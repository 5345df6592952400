"""`paceline serve`, wired: Triton, engine, controller, gRPC and HTTP, and a clean way down.

Order up: files are read and ports bound before any process is started, so that a mistake costs
nothing; the server is live (not ready) while models load. Order down: refuse, answer what was
accepted, stop serving, stop Triton.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path

from paceline.block_fetches import BlockFetches
from paceline.config import parse_chain, read_chains, read_hardware
from paceline.core.chain import Chain
from paceline.core.errors import BackendError, ConfigError, PacelineError, ResidencyError
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, ProfileRow
from paceline.discovery import TritonTarget
from paceline.dispatch import HangLimits
from paceline.fleet import RemoteTritons, connected_machine
from paceline.metrics import Metrics
from paceline.planner.replan import Replanning
from paceline.residency.evict import Eviction
from paceline.residency.state import Limits as ResidencyLimits
from paceline.rpc.server import MAX_MESSAGE_BYTES, start_grpc
from paceline.runtime.controller import Controller
from paceline.runtime.engine import Engine, EngineLimits
from paceline.runtime.placement import Share, Site
from paceline.runtime.plan_process import PlanningProcess
from paceline.runtime.provisioning import Step
from paceline.runtime.statistics import Statistics
from paceline.runtime.suspicions import Suspicions
from paceline.state import State
from paceline.triton.client import TritonClient, TritonFleet
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.profiler import TritonProfiler
from paceline.triton.repository import TritonRepository
from paceline.triton.turns import Turns
from paceline.web.app import start_web

logger = logging.getLogger(__name__)

LOCAL = "local"
LOCAL_HARDWARE = "cpu"
"""The name and hardware of the machine that Paceline starts itself."""

MOST_STARTS = 3
"""How often loading and planning begins when our own Triton dies while it lasts."""
NOTICED_WITHIN_S = 10.0
BACK_WITHIN_S = 120.0
"""How long it is waited, where it answers no more, for its process to end and for the next one."""


FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Between the tries to load what a Triton of ours had before it died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What `paceline serve` was asked to do."""

    chains: tuple[Path, ...]
    model_repositories: tuple[Path, ...]
    state_directory: Path
    tritons: tuple[TritonTarget, ...] = ()
    hardware: Path | None = None
    slots: int | None = None
    memory_bytes: int | None = None
    """What the models of a machine may take; None: as the hardware file says, or all there is."""
    eviction: Eviction = "cost"
    pace_loads: bool = True
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8002
    max_message_bytes: int = MAX_MESSAGE_BYTES
    drain_s: float = 30.0
    replan_window_s: int = 60
    """Over how many seconds traffic is measured to replan for it; 0: the plan stays."""
    hang: HangLimits = field(default_factory=HangLimits)
    """When a batch is tried elsewhere, and when its model is loaded afresh."""
    share: Share = field(default_factory=Share)
    """Which of several workers this is."""


@dataclass(slots=True)
class Events:
    """What the caller is told while the server comes up and goes down."""

    on_step: Callable[[Step], None] = field(default=lambda step: None)
    on_note: Callable[[str], None] = field(default=lambda text: None)
    on_ready: Callable[[Plan, int, int, bool], None] = field(
        default=lambda plan, grpc_port, http_port, priced: None
    )


async def serve(settings: ServeSettings, events: Events) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises PacelineError when it cannot start."""
    declared = read_chains(settings.chains)
    hardware = _hardware(settings)
    check_directories(settings)
    stop = stop_on_signals(events)
    async with AsyncExitStack() as stack:
        state = State(settings.state_directory)
        stack.callback(state.close)
        chains = state.chains(declared)
        fleet = TritonFleet()
        metrics = Metrics()
        statistics = Statistics()
        planner = PlanningProcess()
        stack.callback(planner.close)
        several = settings.share.count > 1
        engine = Engine(
            fleet,
            limits=EngineLimits(hang=settings.hang),
            suspicions=Suspicions(suspicions_file(settings)) if several else None,
        )
        controller = Controller(
            engine,
            statistics,
            hardware=hardware,
            share=settings.share,
            rules=Replanning(window_s=settings.replan_window_s or Replanning().window_s),
            memory=state,
            on_step=events.on_step,
            planner=planner,
        )
        engine.watch(on_timeline=metrics.observe)
        engine.watch(
            on_timeline=controller.observe,
            on_batch=statistics.observe_batch,
            on_broken=controller.machines.broken,
        )
        metrics.watch(controller)
        controller.machines.residence.state.limits = ResidencyLimits(
            eviction=settings.eviction, paced=settings.pace_loads
        )
        # Whatever loads, sends and asks is at rest before the Tritons go.
        tritons = await stack.enter_async_context(AsyncExitStack())
        tritons.push_async_callback(fleet.close)
        stack.push_async_callback(engine.close)
        stack.push_async_callback(controller.close)
        web = await start_web(
            controller, metrics.registry, host=settings.host, port=settings.http_port
        )
        stack.push_async_callback(web.stop)
        rpc = await start_grpc(
            engine,
            controller,
            parse_chain=parse_chain,
            host=settings.host,
            port=settings.grpc_port,
            max_message_bytes=settings.max_message_bytes,
            shared_port=settings.share.count > 1,
        )
        stack.push_async_callback(rpc.stop, 1.0)
        starting = asyncio.create_task(
            _start(settings, chains, declared, controller, fleet, tritons, events), name="start"
        )
        if not await _finished_before(starting, stop):
            return
        if settings.share.count == 1 and settings.replan_window_s:
            replanning = asyncio.create_task(controller.replanner.run(), name="replan")
            stack.push_async_callback(_cancelled, replanning)
        reload_on_hangup(settings, controller, state, events, stack)
        _settle_garbage_collection()
        events.on_ready(starting.result(), rpc.port, web.port, settings.hardware is not None)
        await stop.wait()
        events.on_note(f"draining {engine.dispatcher.in_flight} requests")
        if not await engine.drain(timeout_s=settings.drain_s):
            left = engine.dispatcher.in_flight
            logger.warning("%d requests were not answered within %g s", left, settings.drain_s)


def _settle_garbage_collection() -> None:
    """Requests make no cycles worth looking for: what start-up made is never looked at again, and
    the rest seldom. A sixth of the processor time per request otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _hardware(settings: ServeSettings) -> dict[str, Hardware] | None:
    """Prices; None where none are given: costs then count machines."""
    return read_hardware(settings.hardware) if settings.hardware is not None else None


def _budget_bytes(settings: ServeSettings, hardware: str) -> float:
    """What models may take on a machine. Several workers keep no budget: none of them knows what
    the others have loaded.
    """
    if settings.share.count > 1:
        return inf
    declared = 0
    if settings.hardware is not None:
        kinds = read_hardware(settings.hardware)
        declared = kinds[hardware].memory_bytes if hardware in kinds else 0
    return settings.memory_bytes or declared or inf


def check_directories(settings: ServeSettings) -> None:
    """Raises ConfigError for a repository that is not there, a state directory that cannot be."""
    for repository in settings.model_repositories:
        if not repository.is_dir():
            raise ConfigError(f"{repository} is not a directory", key="--model-repository")
    try:
        settings.state_directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = settings.state_directory
        raise ConfigError(f"{where}: {error.strerror}", key="--state-dir") from None


def turns_directory(settings: ServeSettings) -> Path:
    """Where several workers take turns at changing a Triton's models; made by their supervisor."""
    return settings.state_directory / "turns"


def suspicions_file(settings: ServeSettings) -> Path:
    """What several workers know of processes that were found dead; made by their supervisor."""
    return settings.state_directory / "suspicions"


def stop_on_signals(events: Events) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a further SIGINT ends the process at once.

    A further SIGTERM changes nothing: `timeout` and supervisors send it to a process and again
    to its group, and that is no reason to lose accepted requests.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set() and number == signal.SIGINT:
            events.on_note("stopped at once; requests under way are lost")
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def reload_on_hangup(
    settings: ServeSettings,
    controller: Controller,
    state: State,
    events: Events,
    stack: AsyncExitStack,
) -> None:
    """On SIGHUP serve what the chain files say now: all of it, or nothing changes."""
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)

    async def reload() -> None:
        while True:
            await asked.wait()
            asked.clear()
            try:
                declared = await asyncio.to_thread(read_chains, settings.chains)
                changed, gone = state.redeclared(declared)
                await controller.reload(changed, gone)
            except PacelineError as error:
                logger.error("nothing was reloaded: %s", error)
            else:
                await asyncio.to_thread(state.accept, declared)
                names = ", ".join(sorted({*(chain.name for chain in changed), *gone}))
                events.on_note(f"reloaded the chain files; changed: {names or 'nothing'}")

    stack.push_async_callback(_cancelled, asyncio.create_task(reload(), name="reload"))


async def _finished_before(task: asyncio.Task[Plan], stop: asyncio.Event) -> bool:
    """Whether `task` ended before `stop` was set; cancelled otherwise. Its failure is raised."""
    stopped = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _start(
    settings: ServeSettings,
    chains: tuple[Chain, ...],
    declared: tuple[Chain, ...],
    controller: Controller,
    fleet: TritonFleet,
    tritons: AsyncExitStack,
    events: Events,
) -> Plan:
    """Bring up every Triton, then load, profile, plan and install the chains.

    What was applied over the API and cannot be served any more is no reason not to start.
    """
    remote: RemoteTritons | None = None
    if settings.tritons:
        remote = RemoteTritons(
            settings.tritons,
            controller,
            fleet,
            model_repositories=settings.model_repositories,
            state_directory=settings.state_directory,
            slots=settings.slots or 1,
            budget_bytes=partial(_budget_bytes, settings),
            on_note=events.on_note,
            turns=Turns(turns_directory(settings)) if settings.share.count > 1 else None,
        )
        tritons.push_async_callback(remote.close)
        await remote.start()
        is_back: Callable[[], Awaitable[bool]] = _never
    else:
        is_back = await _start_local(settings, controller, fleet, tritons, events)
    try:
        plan = await start_chains(partial(controller.start, chains), is_back)
    except PacelineError as error:
        if all(chain in declared for chain in chains):
            raise
        names = {chain.name for chain in chains}
        in_files = tuple(chain for chain in declared if chain.name in names)
        logger.error("of the chains only those in files are served: %s", error)
        plan = await start_chains(partial(controller.start, in_files), is_back)
    if remote is not None:
        remote.follow()
    return plan


async def start_chains(
    start: Callable[[], Awaitable[Plan]], is_back: Callable[[], Awaitable[bool]]
) -> Plan:
    """`start()`, and again where it failed because our Triton died under it and is back."""
    for _ in range(MOST_STARTS - 1):
        try:
            return await start()
        except (ResidencyError, BackendError) as error:
            if not await is_back():
                raise
            logger.warning("starting over: %s", error)
    return await start()


async def _never() -> bool:
    return False


async def _start_local(
    settings: ServeSettings,
    controller: Controller,
    fleet: TritonFleet,
    tritons: AsyncExitStack,
    events: Events,
) -> Callable[[], Awaitable[bool]]:
    """Bring up a Triton of our own. What is returned tells, after something has failed, whether
    that is because it died; then it is back, with the models that it had."""
    client: TritonClient | None = None
    died, back = asyncio.Event(), asyncio.Event()

    async def on_down(reason: str) -> None:
        logger.error("the local Triton stopped (%s); restarting it", reason)
        back.clear()
        died.set()
        controller.machines.down(LOCAL)

    async def on_up(url: str) -> None:
        assert client is not None
        try:
            await client.retarget(url)
            pause_s = FIRST_PAUSE_S
            # Where it died again its supervisor knows, and calls this again.
            while triton.pid is not None:
                try:
                    await controller.machine_up(LOCAL)
                except ResidencyError as error:
                    logger.error("the local Triton is back, but not its models: %s", error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                else:
                    logger.warning("the local Triton is back, models loaded")
                    break
        finally:
            back.set()

    async def is_back() -> bool:
        assert client is not None
        if not died.is_set() and await client.live(timeout_s=NOTICED_WITHIN_S):
            return False
        try:
            # A connection that breaks is noticed before the process's end.
            await asyncio.wait_for(died.wait(), NOTICED_WITHIN_S)
            await asyncio.wait_for(back.wait(), BACK_WITHIN_S)
        except TimeoutError:
            return False
        died.clear()
        return True

    fetches = BlockFetches()
    tritons.callback(fetches.close)
    triton = local_triton(settings, events)
    triton.on_down, triton.on_up = on_down, on_up
    tritons.push_async_callback(triton.stop)
    url = await triton.start()
    client = await TritonClient.connect(url, name=LOCAL)
    fleet.add(LOCAL, client)
    site = Site(LOCAL, LOCAL_HARDWARE, settings.slots or os.cpu_count() or 1)
    controller.add_machine(
        await connected_machine(
            client,
            site,
            settings.model_repositories,
            settings.state_directory,
            local=True,
            budget_bytes=_budget_bytes(settings, LOCAL_HARDWARE),
            process=triton,
            fetches=fetches,
        )
    )
    return is_back


def local_triton(settings: ServeSettings, events: Events) -> LocalTriton:
    """The local Triton, not started yet."""
    triton = LocalTriton(
        LocalTritonSettings(
            state_directory=settings.state_directory / "triton",
            model_repositories=settings.model_repositories,
        )
    )
    events.on_note(f"starting a local Triton (log: {triton.log_path})")
    return triton


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def measure(
    target: TritonTarget,
    models: Sequence[str],
    repositories: tuple[Path, ...],
    on_progress: Callable[[str, int, int], None],
) -> tuple[ProfileRow, ...]:
    """Profile models on a running Triton, loading those that are not loaded."""
    client = await TritonClient.connect(target.url)
    try:
        repository = TritonRepository(client, repositories)
        profiler = TritonProfiler(repository)
        rows: list[ProfileRow] = []
        for name in models:
            await repository.load(name, instances=1)
            spec = await repository.spec(name)
            rows += await profiler.measure(
                spec, target.hardware, on_progress=partial(on_progress, name)
            )
        return tuple(rows)
    finally:
        await client.close()
