"""SplitFed V1: every device has a top of its own on the server, and both halves are averaged at the round's end.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split Learning", AAAI
(arXiv:2004.12088). Departures: docs/methods/splitfed_v1.md.
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
from fedspine.split.server import Copies


@method("splitfed_v1")
@dataclass(frozen=True)
class SplitFedV1(SplitMethod):
    """Split learning with a copy of the top for each device: FedAvg of models that are trained in two places."""

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        now, rows = opened(self, state, fleet), rows_of(fleet)
        top = Copies(now.halves, now.top, now.optimising, every_iteration=False, gradients=bool(now.bottom))
        batches = rooms(fleet, now.halves, self.batch, state.longest)
        orders = {device: now.begin(batch) for device, batch in batches.items()}
        played = play(fleet, orders, self.steps, top, now.seed)
        noted(fleet, played)
        stayed = {device: rows[device] for device in played.bottoms}
        model = now.halves.join(averaged(played.bottoms, stayed), top.finish(stayed))
        return replace(state, round=state.round + 1, model=model)
