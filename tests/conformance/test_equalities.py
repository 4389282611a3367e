"""Equalities between methods, and between a method and what it must reduce to."""

import dataclasses

import numpy as np
import pytest
from toy import Spy, bits

from fedspine.control.controllers import Deadline, Fixed, Oracle, Random
from fedspine.core.device import Device
from fedspine.core.tensors import half, single
from fedspine.fleets.lossy import Lossy
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import tuning_at
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine import FedSpine

WIDTH = 32  # of the tiny model: a rank at which nothing is truncated


@pytest.mark.parametrize("rank", [3, 8])
def test_fedspine_without_pruning_at_one_rank_is_fedlora(lab, rank):
    toy = FedLora.toy()
    shared = {"steps": toy.steps, "batch": toy.batch, "learning_rate": toy.learning_rate}
    spine = lab("spine").run(
        FedSpine(sparsity=0.0, ranks=(rank,), aggregation="zeropad", **shared), rounds=2
    )
    lora = lab("lora").run(FedLora(rank=rank, **shared), rounds=2)
    assert list(spine.adapter) == list(lora.adapter)
    assert bits(spine.adapter) == bits(lora.adapter)
    assert bits(spine.head) == bits(lora.head)


@pytest.mark.parametrize(
    "controller",
    [
        Random(),
        Fixed(rank=4),
        Oracle(),
        Deadline(),
    ],
    ids=lambda controller: controller.name,
)
def test_with_one_rank_and_nothing_to_prune_there_is_no_choice(lab, controller):
    method = FedSpine(
        sparsity=0.0,
        ranks=(4,),
        steps=4,
        batch=16,
        learning_rate=2e-2,
    )
    plain, other = lab("plain"), lab("other")
    first, second = (
        plain.run(method, rounds=2),
        other.run(dataclasses.replace(method, controller=controller), rounds=2),
    )
    assert bits(dataclasses.replace(first, device_models={})) == bits(
        dataclasses.replace(second, device_models={})
    )
    assert plain.fleet.now == other.fleet.now


def test_one_device_at_full_rank_is_local_training(lab, task):
    method = FedSpine(sparsity=0.0, ranks=(WIDTH,), steps=8, batch=16, learning_rate=2e-3)
    bench, spies = lab(kinds=("agx",)), []
    start = method.start(task, np.random.default_rng([0, 1]))
    state = bench.run(method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])

    # the same training, without a fleet: a device's generator is seeded with (run, device, asks
    # served)
    rows = task.train.take(bench.shares[0])
    device = Device(
        id="agx-00", data=rows, base=task.base, memory={}, rng=np.random.default_rng((0, 0, 0))
    )
    sent = Model(
        structure=full(task.base.layout),
        adapter=single(half(start.adapter)),
        head=single(half(start.head)),
        scale=method.scale,
    )
    local = tune(device, sent, tuning_at(method, 0, task.rounds)).model
    for site in task.base.layout.sites:
        a, b = local.adapter[a_name(site.path)].double(), local.adapter[b_name(site.path)].double()
        merged = (
            state.adapter[b_name(site.path)].double() @ state.adapter[a_name(site.path)].double()
        )
        # Only the wire rounds: an entry of fp16 is off by half a unit in the last place, 2^-11 of
        # it, or by 2^-25 where it is below the normal numbers. So |d(BA)| <= |dB| |A| + |B| |dA|,
        # with 1 % for second-order terms, and what fp32 SVD and products add: some 32 roundings of
        # 2^-24 of the largest entry.
        off_a, off_b = a.abs() * 2**-11 + 2**-25, b.abs() * 2**-11 + 2**-25
        allowed = 1.01 * (off_b @ a.abs() + b.abs() @ off_a) + 32 * 2**-24 * (b @ a).norm()
        assert bool(((merged - b @ a).abs() <= allowed).all()), site.path
        assert (b @ a).abs().max() > 10 * allowed.max(), "the change is too small to tell"
    assert {name: tensor.half().tolist() for name, tensor in local.head.items()} == {
        name: tensor.tolist() for name, tensor in state.head.items()
    }


def test_a_lossy_fleet_that_loses_nothing_is_the_fleet(lab):
    method = FedSpine.toy()
    plain, around = lab("plain"), lab("around")
    first = plain.run(method, rounds=3)
    second = around.run(
        method, rounds=3, around=lambda fleet: Lossy(fleet, drop=0.0, delay_seconds=0.0, seed=5)
    )
    assert bits(first) == bits(second)
    assert plain.fleet.now == around.fleet.now
    assert plain.rows("exchange") == around.rows("exchange")


def test_together_with_one_group_is_ask(lab):
    class Grouped(Spy):
        """Asks through one group of everybody."""

        def ask(self, work, orders, **limits):
            everybody = {"all": list(orders)}
            return self._fleet.together(
                lambda name, part: part.ask(work, orders, **limits), everybody
            )["all"]

    method = FedSpine.toy()
    plain, grouped = lab("plain"), lab("grouped")
    assert bits(plain.run(method, rounds=3)) == bits(grouped.run(method, rounds=3, around=Grouped))
    assert plain.fleet.now == grouped.fleet.now


def test_one_step_pruning_of_nothing_leaves_the_structure_full(lab):
    state = lab().run(dataclasses.replace(FedSpine.toy(), sparsity=0.0), rounds=3)
    for structure in state.structures.values():
        assert bool(structure.heads.all())
        assert bool(structure.channels.all())
