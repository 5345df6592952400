"""The dispatcher: a sans-IO state machine that batches and routes every request.

`Dispatcher.handle(event, now_s=...)` is its one door; the server's engine and the simulator
drive the same object.
"""

from paceline.dispatch.dispatcher import Dispatcher
from paceline.dispatch.events import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    RemoveChain,
    Settled,
    Submit,
    Tick,
    Wake,
)
from paceline.dispatch.route import ChainRoute, ModuleRoute, route_chain

__all__ = [
    "Action",
    "Answer",
    "BatchDone",
    "BatchFailed",
    "Broken",
    "Cancel",
    "ChainRoute",
    "Dispatcher",
    "Event",
    "Execute",
    "Fail",
    "InstallChain",
    "MachineDown",
    "MachineUp",
    "ModuleRoute",
    "Partial",
    "RemoveChain",
    "Settled",
    "Submit",
    "Tick",
    "Wake",
    "route_chain",
]
