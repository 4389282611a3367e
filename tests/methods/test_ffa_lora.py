"""FFA-LoRA: A stays as drawn and is never sent; what is averaged is what is deployed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Spy

from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.lm.lora import a_name, b_name, is_a
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning
from fedspine.methods.fedlora import FedLora
from fedspine.methods.ffa_lora import FfaLora

TOY = FfaLora.toy()


def test_a_is_the_one_of_the_start_and_crosses_no_wire(lab, task):
    spies, bench = [], lab()
    start = TOY.deploy(TOY.start(task, np.random.default_rng([0, 1])))
    state = bench.run(TOY, rounds=2, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    end = TOY.deploy(state)
    for name, factor in start.adapter.items():
        assert torch.equal(end.adapter[name], factor) == is_a(name)
    for _, value in [pair for spy in spies for pair in spy.orders + spy.results]:
        assert value.adapter and not any(is_a(name) for name in value.adapter)


def test_b_is_trained_as_lora_trains_it_beside_a_frozen_a(lab, task):
    """One step from B = 0, where A has no gradient and so no part in the norm: LoRA's step."""
    base = task.base
    state = TOY.start(task, np.random.default_rng(0))
    model, tuning = TOY.deploy(state), Tuning(steps=1, batch=16, learning_rate=1e-2)

    def trained(**frozen):
        data, rng = task.train.take(np.arange(60)), np.random.default_rng(3)
        device = Device(id="a", data=data, base=base, memory={}, rng=rng)
        return tune(device, model, tuning, **frozen).model

    ours, lora = trained(freeze_a=True), trained()
    for site in base.layout.sites:
        assert torch.equal(ours.adapter[b_name(site.path)], lora.adapter[b_name(site.path)])
        assert torch.equal(ours.adapter[a_name(site.path)], model.adapter[a_name(site.path)])
    assert all(torch.equal(ours.head[name], tensor) for name, tensor in lora.head.items())


def test_the_mean_of_what_devices_run_is_what_is_deployed(lab, task):
    """Without A's, averages of products are products of averages: exactly, but for rounding."""
    spies, bench = [], lab()
    state = bench.run(TOY, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    deployed, results = TOY.deploy(state), [result for _, result in spies[0].results]
    whole = sum(result.examples for result in results)
    for site in task.base.layout.sites:
        a = deployed.adapter[a_name(site.path)]
        mean = sum(r.examples / whole * r.adapter[b_name(site.path)].float() @ a for r in results)
        product = deployed.adapter[b_name(site.path)] @ a
        # sums of 5 devices and 4 directions in fp32
        assert float((mean - product).abs().max()) <= 9 * 2.0**-23 * float(product.abs().max())


def test_it_moves_half_of_what_fedlora_moves(lab):
    bytes_up = {}
    for method in (TOY, FedLora.toy()):
        bench = lab(method.name)
        bench.run(method, rounds=1)
        bytes_up[method.name] = sum(row["bytes_up"] for row in bench.rows("exchange"))
    start = TOY.start(bench.task, np.random.default_rng(0)).adapter
    factors = sum(tensor.numel() for name, tensor in start.items() if "lora_A" in name)
    # of each device, in fp16; their names and shapes stay away as well
    assert bytes_up["fedlora"] - bytes_up["ffa-lora"] > 2 * factors * len(bench.ids)


@pytest.mark.parametrize("depth", [1, 0])
def test_depth_says_which_blocks_have_an_adapter(task, depth):
    state = replace(TOY, depth=depth).start(task, np.random.default_rng(0))
    layers = task.base.layout.layers
    expected = [s for s in task.base.layout.sites if s.layer >= layers - (depth or layers)]
    assert list(state.adapter) == [b_name(site.path) for site in expected]


def test_settings_that_cannot_be_are_refused(task):
    for wrong in ({"rank": 0}, {"depth": 99}, {"steps": 0}):
        with pytest.raises(BadInput):
            replace(TOY, **wrong).check(task)
