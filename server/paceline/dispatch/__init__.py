"""The dispatcher: a sans-IO state machine that batches and routes every request.

`Dispatcher.handle(event, now_s=...)` is its one door; the server's engine and the simulator
drive the same object.
"""

from paceline.dispatch.dispatcher import Dispatcher
from paceline.dispatch.events import (
    Abort,
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Entered,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    Passed,
    Reached,
    RemoveChain,
    Settled,
    Submit,
    Tick,
    TooCold,
    Wake,
)
from paceline.dispatch.learned import LearnedDuration
from paceline.dispatch.machines import HangLimits
from paceline.dispatch.route import ChainRoute, ModuleRoute, route_chain

__all__ = [
    "Abort",
    "Action",
    "Answer",
    "BatchDone",
    "BatchFailed",
    "Broken",
    "Cancel",
    "ChainRoute",
    "Dispatcher",
    "Entered",
    "Event",
    "Execute",
    "Fail",
    "HangLimits",
    "InstallChain",
    "LearnedDuration",
    "MachineDown",
    "MachineUp",
    "ModuleRoute",
    "Partial",
    "Passed",
    "Reached",
    "RemoveChain",
    "Settled",
    "Submit",
    "Tick",
    "TooCold",
    "Wake",
    "route_chain",
]
