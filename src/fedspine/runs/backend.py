"""The backend of a run: simulated devices or the sites of a real fleet, for the same run loop."""

import json
import secrets
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fedspine.core.aggregation import Aggregation, Mean, MultiKrum, NormClip
from fedspine.core.errors import BadInput
from fedspine.core.reads import PredictsReads
from fedspine.core.strict import parsed
from fedspine.execution.workers import Workers
from fedspine.flare.run_terms import RunTerms, model_name
from fedspine.flare.session import FlareSession
from fedspine.flare.site_state import Timeouts
from fedspine.fleets.rounds import RoundFleet
from fedspine.lm.content import content_sha256
from fedspine.runs.assemble import Assembled, assemble, simulate
from fedspine.runs.config import Recipe
from fedspine.runs.memory_check import check_memory
from fedspine.runs.optimisation import server_of
from fedspine.runs.run_dir import FLEET
from fedspine.runs.sections import FleetSection
from fedspine.storage.records import Records
from fedspine.storage.store import Store, write_atomically


class Backend(Protocol):
    """What the run loop needs of a backend."""

    def adapted(self, recipe: Recipe, *, begun: Recipe | None = None) -> Recipe:
        """The recipe adapted to this backend; `begun` is the recipe of a resumed run."""
        ...

    def assemble(self, recipe: Recipe, *, begun: Path | None = None) -> Assembled:
        """Load and check everything; raises BadInput before the run's folder is made.

        `begun` is the folder of a resumed run.
        """
        ...

    def fleet(
        self, assembled: Assembled, workers: Workers, store: Store, records: Records
    ) -> RoundFleet: ...

    def remember(self, run_dir: Path) -> None:
        """Write into the run directory what a resume needs to find this backend."""
        ...

    def close(self) -> None: ...


class Simulation:
    """Simulated devices, in this process and its workers."""

    def adapted(self, recipe: Recipe, *, begun: Recipe | None = None) -> Recipe:
        return recipe

    def assemble(self, recipe: Recipe, *, begun: Path | None = None) -> Assembled:
        return assemble(recipe, begun=begun)

    def fleet(
        self, assembled: Assembled, workers: Workers, store: Store, records: Records
    ) -> RoundFleet:
        return simulate(assembled, workers, store, records)

    def remember(self, run_dir: Path) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class RealSites:
    """The sites of a fleet that `fedspine fleet create` provisioned; `kit` is the operator's."""

    kit: Path
    timeouts: Timeouts = field(default_factory=Timeouts)
    _link: Any = field(default=None, init=False)
    _session: Any = field(default=None, init=False)

    def adapted(self, recipe: Recipe, *, begun: Recipe | None = None) -> Recipe:
        """One device per site, each with its own rows; connects if necessary."""
        if recipe.task.kind == "array":
            raise BadInput(
                f"task.model {recipe.task.model!r} is a net for arrays, "
                "but the sites of a fleet hold texts; leave --fleet out to "
                "run on simulated devices, or choose a model for texts"
            )
        if recipe.task.vocabulary is not None:
            raise BadInput(
                "task.vocabulary is for simulated devices, and the sites of a fleet load the whole "
                "model; leave it out, or leave --fleet out"
            )
        if recipe.run.frozen_bits is not None:
            raise BadInput(
                "run.frozen_bits is for simulated devices, and the sites of a fleet load the model "
                "as run.precision says; leave it out, or leave --fleet out"
            )
        devices = len(self._connected().sites) if begun is None else begun.fleet.devices
        changed = {
            "devices": devices,
            "mix": None,
            "partition": "auto",
            "per_round": min(recipe.fleet.per_round, devices),
            "held_out": None,  # of rows that are not here
            "noise": None,  # which each site decides
        }
        fleet = recipe.fleet.model_copy(update=changed)
        if begun is not None:  # as it began, if the recipe does not say
            how = fleet.aggregation or begun.fleet.aggregation
        else:
            how = fleet.aggregation or _by_default(recipe.method, fleet)
        return replace(
            recipe,
            fleet=fleet.model_copy(update={"aggregation": how}),
            run=recipe.run.model_copy(
                update={"workers": 1}
            ),  # processes cannot be forked beside an open connection
        )

    def assemble(self, recipe: Recipe, *, begun: Path | None = None) -> Assembled:
        from fedspine.flare.fleet import FlareFleet

        assembled = assemble(recipe, here=False, begun=begun)
        self._session = FlareSession(
            link=self._connected(),
            base=assembled.task.base,
            terms=terms_of(assembled),
            seed=recipe.run.seed,
            run=secrets.token_hex(16),
            timeouts=self.timeouts,
            aggregation=recipe.fleet.aggregation or Mean(),
            server=server_of(recipe.method, recipe.fleet),
        )
        refusals = FlareFleet(self._session).join()
        if refusals and len(self._session.sites) < max(self.timeouts.sites, self.timeouts.quorum):
            reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
            sites = len(self._link.sites)
            raise BadInput(f"{len(refusals)} of {sites} sites take no part: {reasons}")
        joined = [site.memory_bytes for site in self._session.sites.values()]
        check_memory(recipe.method, assembled.task, joined)
        absent = [f"site {name} takes no part: {why}" for name, why in refusals.items()]
        return replace(assembled, remarks=(*assembled.remarks, _aggregation_line(recipe), *absent))

    def fleet(
        self, assembled: Assembled, workers: Workers, store: Store, records: Records
    ) -> RoundFleet:
        from fedspine.flare.fleet import FlareFleet

        self._session.records, self._session.began = records, time.monotonic()
        return FlareFleet(self._session)

    def remember(self, run_dir: Path) -> None:
        """Write the kit's path and the timeouts, so that a resume needs neither."""
        said = {"kit": str(self.kit.absolute()), **asdict(self.timeouts)}
        write_atomically(run_dir / FLEET, json.dumps(said, indent=1).encode())

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connected(self) -> Any:
        if self._link is None:
            from fedspine.flare.startup_kit import needs_flare

            needs_flare()
            from fedspine.flare.link import FlareLink

            self._link = FlareLink(self.kit, self.timeouts.quorum)
            self._link.wait_for(
                max(self.timeouts.sites, self.timeouts.quorum), self.timeouts.outage
            )
        return self._link


def _by_default(method: Any, fleet: FleetSection) -> Aggregation | None:
    """What bounds the harm of a bad site, where the method and the number of sites allow it."""
    how, replies = NormClip(), fleet.replies // method.groups
    return how if method.robust and replies >= how.fewest(replies) else None


def _aggregation_line(recipe: Recipe) -> str:
    """A line on how what the sites send is merged."""
    match recipe.fleet.aggregation:
        case None | Mean():
            return "aggregation: mean, so one bad site can spoil the model (docs/robustness.md)"
        case NormClip(bound=bound):
            return f"aggregation: norm_clip, no change is larger than {bound:g} x the median"
        case MultiKrum():
            return (
                "aggregation: multi_krum, from which the noise of sites hides who is bad "
                "(docs/robustness.md)"
            )
        case how:
            return f"aggregation: {how.name}"


def backend_of(run_dir: Path, named: RealSites | None = None) -> Backend:
    """The backend of the run in `run_dir`, or `named` if it fits; raises BadInput otherwise."""
    path = run_dir / FLEET
    if not path.exists():
        if named is not None:
            raise BadInput(
                f"the run in {run_dir} is simulated, so it "
                "cannot be resumed at real sites; leave --fleet out"
            )
        return Simulation()
    try:
        said = parsed(path.read_text(encoding="utf-8"))
        kit, timeouts = (
            Path(said.pop("kit")),
            Timeouts(**said | {"sites": said["quorum"]}),
        )  # the others may come later
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} is damaged ({error}); name the operator's kit with --fleet"
        ) from None
    return named or RealSites(kit, timeouts)


def terms_of(assembled: Assembled) -> RunTerms:
    """The terms that a site needs in order to join a run."""
    section, task, method = assembled.recipe.task, assembled.task, assembled.recipe.method
    return RunTerms(
        method=method.name,
        foretold=method.predicted_reads(task.base) if isinstance(method, PredictsReads) else None,
        kind=section.kind,
        model=model_name(section.model),
        model_sha256=content_sha256(task.base, assembled.tokenizer),
        layers=section.layers,
        precision=assembled.recipe.run.precision,
        pooling=task.base.pooling or section.pooling,
        max_tokens=section.max_tokens,
        loss_on=section.loss_on,
        label_names=task.label_names,
        privacy=task.privacy,
    )
