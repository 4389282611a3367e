"""SplitFed V2: one top on the server, which takes a step for each device in turn, in an order drawn anew each time.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split Learning", AAAI
(arXiv:2004.12088). Departures: docs/methods/splitfed_v2.md.
"""

from dataclasses import dataclass, replace

from fedspine.fleet import Fleet
from fedspine.method import method
from fedspine.methods.splitting import (
    SplitMethod,
    SplitState,
    averaged,
    noted,
    opened,
    rooms,
    rows_of,
)
from fedspine.split.rounds import play
from fedspine.split.server import InTurn


@method("splitfed_v2")
@dataclass(frozen=True)
class SplitFedV2(SplitMethod):
    """Split learning with one top, which sees the devices one after another; only the bottoms are averaged."""

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        now, rows = opened(self, state, fleet), rows_of(fleet)
        top = InTurn(now.halves, now.top, now.optimising, gradients=bool(now.bottom))
        batches = rooms(fleet, now.halves, self.batch, state.longest)
        orders = {device: now.begin(batch) for device, batch in batches.items()}
        played = play(fleet, orders, self.steps, top, now.seed)
        noted(fleet, played)
        model = now.halves.join(averaged(played.bottoms, rows), top.finish(rows))
        return replace(state, round=state.round + 1, model=model)
