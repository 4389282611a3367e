"""Server optimisers against the formulas of Reddi et al. 2020, worked out by hand, and the lines
for settings that cannot work.
"""

from types import SimpleNamespace

import pytest
import torch

from fedspine.core.aggregation import Mean
from fedspine.core.errors import BadInput
from fedspine.core.merging import Weighted, combined
from fedspine.core.message import pack, unpack
from fedspine.core.server_optimiser import (
    CHOICES,
    Accumulated,
    FedAdam,
    FedAvgM,
    FedYogi,
    NoOptimiser,
    Server,
    server_optimiser_of,
)

# fp32 rounds by 2^-24; a step is some ten operations, of numbers below 2
OFF = 20 * 2**-24


def weights(*values):
    return {"w": torch.tensor(values)}


def moved(optimiser, *merged):
    """Where a server that begins at 0 ends, given what each round's replies were merged to, as
    changes of what it had.
    """
    server, now = Server(optimiser), weights(0.0)
    for change in merged:
        now = server.step("w", now, {"w": now["w"] + change})
    return float(now["w"])


def test_fedavgm_by_hand():
    # m = 1, w = 1 * 1; then m = 0.9 + 2 = 2.9, w = 1 + 2.9
    assert moved(FedAvgM(learning_rate=1.0), 1.0, 2.0) == pytest.approx(3.9, abs=OFF)
    assert moved(FedAvgM(learning_rate=0.5, momentum=0.0), 1.0, 2.0) == pytest.approx(1.5, abs=OFF)


def test_fedadam_by_hand():
    # v_0 = tau^2 = 1, beta1 = beta2 = 0.5: m = 0.5 * 2 = 1, v = 0.5 * 1 + 0.5 * 4 = 2.5
    how = FedAdam(learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0)
    first = 1 / (2.5**0.5 + 1)
    assert moved(how, 2.0) == pytest.approx(first, abs=OFF)
    # m = 0.5 + 0.5 * 1 = 1, v = 0.5 * 2.5 + 0.5 * 1 = 1.75
    assert moved(how, 2.0, 1.0) == pytest.approx(first + 1 / (1.75**0.5 + 1), abs=OFF)


def test_fedyogi_by_hand():
    # v_0 = 1 < 4 = change^2: v = 1 + 0.5 * 4 = 3; then 3 > 1 = change^2: v = 3 - 0.5 * 1 = 2.5
    how = FedYogi(learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0)
    first = 1 / (3**0.5 + 1)
    assert moved(how, 2.0) == pytest.approx(first, abs=OFF)
    assert moved(how, 2.0, 1.0) == pytest.approx(first + 1 / (2.5**0.5 + 1), abs=OFF)


def test_at_fedavgms_default_rate_a_steady_change_is_made_as_it_is():
    # m tends to 1 / (1 - 0.9) = 10, so that after 200 rounds a step is 1 - 0.9^201 = 1 to 1e-9
    server, now = Server(FedAvgM()), weights(0.0)
    for _ in range(200):
        before, now = now, server.step("w", now, {"w": now["w"] + 1.0})
    assert float(now["w"] - before["w"]) == pytest.approx(1.0, abs=200 * OFF)


def test_the_defaults_are_those_of_the_paper():
    for cls in (FedAdam, FedYogi):
        assert (cls().beta1, cls().beta2, cls().tau) == (0.9, 0.99, 1e-3)


def test_feddyns_server_by_hand():
    # half of the devices: s = 0.5, w = 1 + 0.5; then s = 0.5 + 1, w = 1.5 + 2 + 1.5
    assert moved(Accumulated(share=0.5), 1.0, 2.0) == pytest.approx(5.0, abs=OFF)


def test_without_an_optimiser_the_merged_weights_are_taken_as_they_are():
    server, merged = Server(), weights(0.1)
    assert server.step("w", weights(1.0), merged) is merged
    assert server.memory == {}


@pytest.mark.parametrize("optimiser", [FedAvgM(), FedAdam(), FedYogi(), Accumulated()])
def test_what_nobody_changed_stays_and_so_do_its_moments(optimiser):
    server = Server(optimiser)
    once = server.step("w", weights(1.0, 1.0), weights(1.5, 1.0))
    before = {kind: tensors["w"] for kind, tensors in server.moments["w"].items()}
    twice = server.step("w", once, {"w": once["w"] + torch.tensor([0.0, 0.5])})
    assert once["w"][1] == 1.0 and twice["w"][0] == once["w"][0]
    for kind, tensors in server.moments["w"].items():
        assert tensors["w"][0] == before[kind][0]
    # the entry that came second is where the first one was after its own first change
    assert twice["w"][1] == once["w"][0]


def test_moments_belong_to_what_was_merged_and_outlive_a_snapshot():
    server = Server(FedAdam())
    server.step("head", weights(0.0), weights(1.0))
    server.step("adapter", weights(0.0), weights(2.0))
    again = Server(FedAdam())
    again.restore(unpack(pack(server.memory)))
    assert again.memory.keys() == {"moments"} and again.moments.keys() == {"head", "adapter"}
    for what in ("head", "adapter"):
        one, other = (each.step(what, weights(3.0), weights(3.5)) for each in (server, again))
        assert torch.equal(one["w"], other["w"])


def test_a_merge_takes_the_step_but_not_for_statistics():
    fleet = SimpleNamespace(aggregation=Mean(), server=Server(FedAvgM(learning_rate=2.0)))
    parts = [Weighted(str(i), 1, weights(1.0) | {"s": torch.tensor([5.0])}) for i in range(2)]
    before = weights(0.0) | {"s": torch.tensor([1.0])}
    found = combined(fleet, "weights", parts, before, averaged={"s"})
    assert (float(found["w"]), float(found["s"])) == (2.0, 5.0)


def test_a_name_a_table_and_a_part_are_the_same():
    for name, cls in CHOICES.items():
        assert server_optimiser_of(name) == server_optimiser_of({"name": name}) == cls()
    assert server_optimiser_of({"name": "fedadam", "tau": 0.1}) == FedAdam(tau=0.1)
    assert server_optimiser_of(None) is None


@pytest.mark.parametrize(
    ("optimiser", "line"),
    [
        (FedAvgM(learning_rate=0.0), "learning_rate is 0, but a positive number"),
        (FedAvgM(momentum=1.0), "momentum is 1, but 0 to below 1"),
        (FedAdam(tau=-1.0), "tau is -1, but a positive number"),
        (FedYogi(beta2=1.5), "beta2 is 1.5, but 0 to below 1"),
        (FedAdam(learning_rate=float("inf")), "learning_rate is inf, but a positive number"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(optimiser, line):
    with pytest.raises(BadInput, match=f"fleet.server_optimiser.{line}") as refused:
        optimiser.check()
    assert "\n" not in str(refused.value)
    NoOptimiser().check()
