"""FedAvg of whole models: the mean of what devices learnt, on texts and on arrays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from array_toy import array_task, bars
from tolerances import FP32, TINY, rounding
from toy import TEST_ROWS, Lab, bits

from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost
from fedspine.core.message import pack
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.simulated import SimulatedFleet
from fedspine.methods.fedavg import FedAvg
from fedspine.nets.score import score_nets
from fedspine.split.cut import split_model_of


@pytest.fixture(scope="module")
def waves_task():
    return array_task(rounds=10)


@pytest.fixture
def bench(waves_task, tmp_path):
    built = []

    def make(name="lab", task=waves_task, **settings):
        built.append(Lab(task, tmp_path / name, **settings))
        return built[-1]

    yield make
    for each in built:
        each.close()


SGD = {"optimiser": "sgd", "learning_rate": 0.3}


def on_arrays(**settings):
    return FedAvg(**{"steps": 12, "batch": 16, "precision": "fp32"} | SGD | settings)


def weights_of(model, task):
    split_model = split_model_of(task.base, 1, rank=4, scale=2.0)
    client_model, server_model = split_model.parts(model)
    return split_model, {**client_model, **server_model}


def test_one_full_step_everywhere_is_one_step_on_all_rows(lab, task):
    # sum over devices of |D_i| / |D| times the gradient on D_i is the gradient on the union, and
    # SGD is linear in it
    method = FedAvg(
        steps=1, batch=300, optimiser="sgd", learning_rate=0.5, decay=1.0, rank=4, precision="fp32"
    )
    bench = lab()
    start = method.start(task, np.random.default_rng([0, 1]))
    split_model, weights = weights_of(start.model, task)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    batch = task.train.batch(np.arange(len(task.train)))
    split_model.server_forward(
        leaves, split_model.client_forward(leaves, batch, seed=0), batch["labels"], seed=0
    ).mean.backward()
    _, after = weights_of(bench.run(method, rounds=1).model, task)
    moved = 0.0
    for name, tensor in leaves.items():
        step = 0.5 * tensor.grad
        # the sums of a gradient, and a weight's eight roundings in a step and a mean over devices,
        # which come to the root of eight
        off = TINY * float(step.abs().max()) + 3 * FP32 * float(tensor.detach().abs().max())
        assert torch.allclose(after[name], (tensor - step).detach(), rtol=0, atol=off)
        moved = max(moved, float(tensor.grad.abs().max()))
    assert moved > 1e-3


def test_learns_arrays_and_every_process_gives_the_same_bytes(bench, waves_task):
    state = bench().run(on_arrays())
    before = on_arrays().start(waves_task, np.random.default_rng(0)).model
    (fresh,), (learnt,) = (
        score_nets(waves_task.base, [model], waves_task.test) for model in (before, state.model)
    )
    luck = 1 / 3 + 4 * np.sqrt(1 / 3 * 2 / 3 / TEST_ROWS)
    assert learnt.accuracy > luck and learnt.mean_loss < fresh.mean_loss
    two = bench("two", workers=2)
    assert bits(two.run(on_arrays(), rounds=2)) == bits(bench("one").run(on_arrays(), rounds=2))


def test_goes_on_after_a_kill_and_without_lost_devices(bench):
    whole = bits(bench("whole").run(on_arrays(), rounds=3))
    first = bench("killed")
    first.save(first.run(on_arrays(), rounds=1))
    first.close()
    assert bits(bench("killed").run(on_arrays(), rounds=3)) == whole
    lossy = bench("lossy").run(on_arrays(), rounds=3, around=lambda fleet: Lossy(fleet, drop=0.3))
    assert lossy.round == 3 and bits(lossy) != whole


def test_statistics_of_batch_norm_are_averaged_and_not_trained(bench):
    task = array_task("vgg-small", make=bars, rounds=1, train=60, test=90)
    method = FedAvg(
        steps=1, batch=60, optimiser="sgd", learning_rate=1e-6, decay=1.0, precision="fp32"
    )
    start = method.start(task, np.random.default_rng([0, 1])).model.weights
    lab = bench(task=task)
    after = lab.run(method).model.weights
    mean = "block1.norm.running_mean"
    expected = torch.zeros_like(start[mean])
    for share in (
        lab.shares
    ):  # at so small a rate weights stay as they are, so the first layer gives what it gave
        x = torch.from_numpy(task.train.x[share]).float() / 255
        out = torch.nn.functional.conv2d(
            x, start["block1.conv.weight"], start["block1.conv.bias"], padding=1
        )
        expected += len(share) / 60 * 0.1 * out.mean((0, 2, 3))
    # 27 products each, and a mean of 60 rows of 64, of numbers near 1
    off = 0.1 * rounding(27 + 60 * 64)
    assert torch.allclose(after[mean], expected, rtol=0, atol=off) and expected.abs().max() > 1e-2


def test_an_exchange_costs_the_weights_and_little_else(bench, waves_task):
    lab = bench()
    state = lab.run(on_arrays(), rounds=1)
    numbers = sum(tensor.numel() for tensor in state.model.weights.values())
    halved = bench("halved")
    halved.run(on_arrays(precision="fp16"), rounds=1)
    for row, other in zip(lab.rows("exchange"), halved.rows("exchange"), strict=True):
        assert (
            0 < row["bytes_down"] - 4 * numbers < 4000 and 0 < row["bytes_up"] - 4 * numbers < 4000
        )
        assert 0 < other["bytes_up"] - 2 * numbers < 4000
    split_model, rows = split_model_of(waves_task.base, 2), 12 * 16
    assert row["flops"] == split_model.flops("client", rows, 1) + split_model.flops(
        "server", rows, 1
    )
    assert row["peak_memory_bytes"] == split_model.memory_bytes(
        "client", 16, 1
    ) + split_model.memory_bytes("server", 16, 1)


def test_devices_without_the_memory_are_left_out(bench, waves_task):
    lab, method = bench(), on_arrays()
    state = method.start(waves_task, np.random.default_rng(0))
    profiles = [
        replace(p, memory_bytes=1000) if p.id.startswith("tx2") else p for p in lab.fleet.devices
    ]
    method.round(state, SimulatedFleet(lab.fleet._world, tuple(profiles)))
    assert [row["device"] for row in lab.rows("exchange")] == ["nx-02", "nx-03", "agx-04"]
    assert [row["values"]["device"] for row in lab.rows("note") if "needed" in str(row)] == [
        "tx2-00",
        "tx2-01",
    ]
    nobody = SimulatedFleet(
        lab.fleet._world, tuple(replace(p, memory_bytes=1000) for p in profiles)
    )
    with pytest.raises(AllLost, match=r"lower method.batch or take a smaller task.model"):
        method.round(state, nobody)


def test_the_state_holds_a_model_of_either_kind(bench, task, waves_task):
    for kind in (task, waves_task):
        model = FedAvg(rank=4).start(kind, np.random.default_rng(0)).model
        assert type(model).__name__ == {"array": "NetModel"}.get(kind.kind, "Model")
        assert pack(model).bytes > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "method.steps is 0, but at least 1"),
        ({"batch": 0}, "method.batch is 0"),
        ({"batch": 241}, "method.batch is 241, but all devices together hold 240 rows"),
        ({"rank": 0}, "method.rank is 0"),
        ({"scale": 0.0}, "method.scale is 0.0"),
        ({"learning_rate": 0.0}, "method.learning_rate is 0.0"),
        ({"decay": 1.1}, "method.decay is 1.1, but 0 to 1"),
        ({"lowest": -1.0}, "method.lowest is -1.0"),
        ({"weight_decay": -1.0}, "method.weight_decay is -1.0"),
        ({"clip": -1.0}, "method.clip is -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(waves_task, settings, said):
    with pytest.raises(BadInput, match=said):
        replace(on_arrays(), **settings).check(waves_task)


def test_a_rank_beyond_the_model_is_refused(task):
    with pytest.raises(BadInput, match=r"method.rank has rank 4000"):
        FedAvg(rank=4000, **SGD).check(task)
