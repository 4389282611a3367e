"""The base of fleet wrappers, which passes calls on."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedspine.core.aggregation import Aggregation
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet, Profile, T
from fedspine.core.server_optimiser import Server


class FleetWrapper:
    """Passes on everything of a fleet except `ask`, `send`, `next` and `unusable`, which each
    wrapper defines. Parts of the fleet (`only`, `together`) are not wrapped unless the wrapper
    overrides that.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def devices(self) -> tuple[Profile, ...]:
        return self._fleet.devices

    @property
    def now(self) -> float:
        return self._fleet.now

    @property
    def base(self) -> Any:
        return self._fleet.base

    @property
    def aggregation(self) -> Aggregation:
        return self._fleet.aggregation

    @property
    def server(self) -> Server:
        return self._fleet.server

    def only(self, ids: Iterable[DeviceId]) -> Fleet:
        return self._fleet.only(ids)

    def together(
        self, job: Callable[[str, Fleet], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        return self._fleet.together(job, groups)

    def wait(self, seconds: float) -> None:
        self._fleet.wait(seconds)

    def note(self, **values: Any) -> None:
        self._fleet.note(**values)

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        return self._fleet.foresee(
            device, flops=flops, launches=launches, bytes_down=bytes_down, bytes_up=bytes_up
        )
