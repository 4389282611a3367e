"""Replays a run over real sites in one process, on the same rows and without exactly the replies
that were lost.

A run's state follows from its recipe, its sites' rows, and the replies it got. So a replay without
the same replies must end in the same bits, whatever died during the run.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fedspine.methods
from fedspine.core.aggregation import Mean
from fedspine.core.message import pack
from fedspine.flare.fleet import FlareFleet
from fedspine.flare.session import FlareSession
from fedspine.flare.site import load_site
from fedspine.flare.site_secret import site_secret
from fedspine.flare.site_state import Timeouts
from fedspine.flare.site_worker import SiteWorker
from fedspine.flare.wire import Opening, SiteOrder, decoded
from fedspine.runs.assemble import START, assemble, cohort
from fedspine.runs.backend import terms_of
from fedspine.runs.run_dir import recipe_of
from fedspine.storage.records import Records

fedspine.methods.__path__.append(str(Path(__file__).parent / "exchange_site" / "methods"))
SPOIL = "FEDSPINE_SPOIL"  # as in exchange_site/methods/brittle.py
RUN = "0" * 32


class Replay:
    """Sites in this process that fail where those of the run did."""

    def __init__(
        self,
        workers: dict[str, SiteWorker],
        lost: set[tuple[int, str]],
        spoilt: set[tuple[int, str]],
    ) -> None:
        self._workers, self._lost, self._spoilt = workers, lost, spoilt
        self.relay, self.sites = "replay", tuple(workers)

    def connected(self) -> tuple[str, ...]:
        return self.sites

    def exchange(self, site: str, payload: bytes, seconds: float) -> tuple[str, bytes]:
        asked = decoded(payload, Opening, SiteOrder)
        if isinstance(asked, SiteOrder) and (asked.round, site) in self._lost:
            return "died", b""
        said = Path(os.environ[SPOIL]) / site
        if isinstance(asked, SiteOrder) and (asked.round, site) in self._spoilt:
            said.write_text("nan")
        reply = self._workers[site].answer(payload)
        said.unlink(missing_ok=True)
        return "done", reply

    def ping(self, site: str, seconds: float) -> bool:
        return True

    def mend(self, broken: str | None, give_up: Callable[[], bool]) -> None:
        raise AssertionError("a replay loses no relay")

    def close(self) -> None:
        pass


def replayed(out: Path, kits: Path, scratch: Path) -> str:
    """The sha256 of the state that the run in `out` should have ended with."""
    rows = [
        json.loads(line)
        for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    lost = {
        (row["round"], row["device"]) for row in rows if row["row"] == "exchange" and row["lost"]
    }
    notes = [row for row in rows if row["row"] == "note"]
    spoilt = {
        (row["round"], row["values"]["device"])
        for row in notes
        if "not finite" in str(row["values"].get("left_out"))
        or "loss is" in str(row["values"].get("left_out"))
    }
    recipe = recipe_of(out)
    assembled = assemble(recipe, here=False)
    shutil.rmtree(scratch, ignore_errors=True)
    sites = sorted({row["device"] for row in rows if row["row"] == "exchange"})
    workers = {
        site: SiteWorker(load_site(kits / site), scratch / site, site_secret(kits / site))
        for site in sites
    }
    link, method = Replay(workers, lost, spoilt), recipe.method
    session = FlareSession(
        link,
        assembled.task.base,
        terms_of(assembled),
        recipe.run.seed,
        RUN,
        Timeouts(),
        recipe.fleet.aggregation or Mean(),
    )
    fleet = FlareFleet(session)
    assert fleet.join() == {}
    session.records = Records(scratch / "records.jsonl")
    state = method.start(assembled.task, np.random.default_rng([recipe.run.seed, START]))
    for round in range(recipe.run.rounds):
        fleet.begin_round(round)
        everyone = fleet.devices
        part = fleet.only(everyone[i].id for i in cohort(recipe, round, len(everyone)))
        state = method.round(state, part)
    session.records.close()
    return pack(state).sha256
