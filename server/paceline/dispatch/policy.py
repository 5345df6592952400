"""Dispatch policies: when a batch is closed, and which machine collects it.

One interface, `Collector`, a module each. All close a batch when it is full or when its oldest
request's slack has run out (its launch-by time has come).

* **pooled** (ours; worst case `d + b/T`): one queue. A batch that is neither full nor out of
  slack is also launched when waiting could not fill it before a machine idles anyway: when, after
  launching it now, a machine will be free for every full batch that the planned rate can form.
  With sorted expected free times `f_1 <= f_2 <= ...`: `f_j <= now + j b/T` for all j. At low load
  nobody waits; at planned load machines stay staggered and the bound holds. Of several kinds of
  hardware that which the plan has for most rows is used as far as it goes, others no more than was
  planned or nobody needs (decision 48).
* **throughput-cost** (Harpagon 1.1; full machines `d + b/w`): allocations ranked by
  throughput-cost ratio; whole batches are cut from the stream, the best rank that is due first.
  A rank of n machines is due every `d/n`; what no rank is due for goes to the next one, and what
  is more than was planned for to the best rank that has it in time. A rank's own `d + b/w` takes
  what better ranks leave as evenly spaced; they collect whole batches, so that it comes in bursts,
  and ranks below the first have the largest bound of the schedule.
* **round-robin** (what Nexus does; `2d`): every machine has a queue of its own, requests are dealt
  out in proportion to throughput.

The last two are as published while no more comes than was planned for. Beyond, a row that would be
late where its turn is goes where it is done first, and what no batch worth its time can save is
given up: published rules have answers late then, nearly all of them.
"""

from __future__ import annotations

from paceline.dispatch.collector import Collector
from paceline.dispatch.lots import RoundRobin, ThroughputCost
from paceline.dispatch.pooled import Pooled
from paceline.dispatch.route import ChainRoute, ModuleRoute


def collector(chain: ChainRoute, route: ModuleRoute) -> Collector:
    """The module's collector under its chain's policy; unplanned modules are always pooled."""
    if chain.policy == "throughput-cost" and route.allocations:
        return ThroughputCost(route)
    if chain.policy == "round-robin" and route.allocations:
        return RoundRobin(route)
    return Pooled(route)
