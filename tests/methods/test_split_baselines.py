"""SplitFed, LocFedMix-SL, AdaSFL and SplitLoRA: what they must reduce to, and what each has that
the others have not.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_models import model_on
from tolerances import FP32, rounding
from toy import Lab, Spy, bits, toy_task

from fedspine.control.split_parts import Regulated
from fedspine.control.worker_state import costs
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost
from fedspine.core.task import IGNORED, Arrays, Task
from fedspine.core.tensors import average
from fedspine.methods import find
from fedspine.methods.adasfl import AdaSfl
from fedspine.methods.fedavg import FedAvg
from fedspine.methods.locfedmix import LocFedMix, ReadingOrder, blended, mixup
from fedspine.methods.splitfed_v1 import SplitFedV1
from fedspine.methods.splitfed_v2 import SplitFedV2
from fedspine.methods.splitlora import SplitLora
from fedspine.nets.net import Net
from fedspine.nets.score import score_nets
from fedspine.split.auxiliary import DECODER, OUT_BIAS, DecodedCutting
from fedspine.split.cut import split_model_of
from fedspine.split.interface import Features
from fedspine.split.merged_batch import Part
from fedspine.split.messages import Begin, Cutting, Ended, Step
from fedspine.split.server import Copies, MergedStep, WeightedStep
from fedspine.split.trainable_half import Optimising

PLAIN = {  # SGD, nothing rounded on the wire
    "rank": 4,
    "steps": 3,
    "batch": 16,
    "optimiser": "sgd",
    "learning_rate": 0.3,
    "decay": 1.0,
    "weight_decay": 0.0,
    "clip": 0.0,
    "precision": "fp32",
}
SGD = Optimising(kind="sgd", learning_rate=0.3)
BASELINES = (SplitFedV1, SplitFedV2, LocFedMix, AdaSfl, SplitLora)
FOR_NETS = (SplitFedV1, SplitFedV2, LocFedMix, AdaSfl)
EPS = 2.0**-24  # half a unit in the last place of fp32, relative
# sums of some 64 products, one after another in a few layers, in another order: a few tens of
# roundings
OFF = 64 * EPS


def run(bench, method, rounds=1, **spying):
    """The state after some rounds and what a spy recorded in each."""
    spies = []
    state = bench.run(
        method,
        rounds=rounds,
        around=lambda fleet: spies.append(Spy(fleet, **spying)) or spies[-1],
    )
    return state, spies


def rows_of(bench):
    return dict(zip(bench.ids, map(len, bench.shares), strict=True))


def orders_of(spy, kind):
    """The orders of this kind in a round, by device, in their order."""
    found = {}
    for id, order in spy.orders:
        if isinstance(order, kind):
            found.setdefault(id, []).append(order)
    return found


def server_parts(task, split_model, client_model, sizes=(4, 4, 4)):
    """Features of devices whose rows differ in length, as they reach the server."""
    made, start = [], 0
    by_length = np.argsort(task.train.lengths, kind="stable")
    for number, size in enumerate(sizes):
        rows = by_length[start : start + size]
        start += 100
        inputs = task.train.batch(rows, int(task.train.lengths[rows].max()))
        features = split_model.client_forward(client_model, inputs, seed=None)
        leaf = Features(values=features.values.detach(), mask=features.mask)
        made.append(Part(device=f"d{number}", features=leaf, labels=inputs["labels"]))
    return made


@pytest.fixture
def split_model(task):
    """The tiny BERT after block 1, with an adapter that does something: halves, client model and
    server model.
    """
    made = split_model_of(task.base, 1, rank=3)
    return made, *made.parts(model_on(task.base))


def assert_same_model(found, expected, *, off):
    """All weights alike but for `off` of each tensor's largest entry."""
    assert bits(found.structure) == bits(expected.structure)
    for part in ("adapter", "head"):
        one, other = getattr(found, part), getattr(expected, part)
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(
                one[name], tensor, rtol=0, atol=off * float(tensor.abs().max()), msg=name
            )


# --- what they reduce to ---


def test_splitfed_v1_is_fedavg(lab):
    split, _ = run(lab("split"), SplitFedV1(**PLAIN))
    whole, _ = run(lab("whole"), FedAvg(**PLAIN))
    # the same products, whether the two halves are computed in one place or in two
    assert_same_model(split.model, whole.model, off=OFF)


def test_with_one_device_all_baselines_are_one(lab):
    methods = (
        SplitFedV1(**PLAIN),
        SplitFedV2(**PLAIN),
        AdaSfl(**PLAIN, fewest=1.0, most=1.0),
        LocFedMix(**PLAIN, reconstruction=0.0),  # nobody to mix with
        SplitLora(**PLAIN, average_every=100),
    )
    expected, *others = (
        run(lab(type(method).__name__, kinds=("agx",)), method)[0].model for method in methods
    )
    for model in others:
        # a mean of one: times its weight, over its weight
        assert_same_model(model, expected, off=4 * EPS)


def test_weighed_by_their_rows_separate_passes_are_the_merged_step(task, split_model):
    made, client_model, server_model = split_model
    parts = server_parts(task, made, client_model, sizes=(3, 9, 5))
    rows = {part.device: float(len(part.features)) for part in parts}
    servers = WeightedStep(made, server_model, SGD, rows), MergedStep(made, server_model, SGD)
    one, other = (server.step(parts, 0) for server in servers)
    assert one.losses == pytest.approx(other.losses, rel=OFF)
    for device in rows:
        expected = other.gradients[device].values
        off = OFF * 20 * float(expected.abs().max())  # some ten layers there and back
        torch.testing.assert_close(one.gradients[device].values, expected, rtol=0, atol=off)
    moved = 0.0
    for name, tensor in servers[1].finish({}).items():
        step = float((tensor - server_model[name]).abs().max())
        moved = max(moved, step)
        torch.testing.assert_close(
            servers[0].finish({})[name], tensor, rtol=0, atol=20 * OFF * step + EPS
        )
    assert moved > 0


def test_averaging_copies_after_each_step_of_sgd_is_one_step_on_the_mean_loss(task, split_model):
    made, client_model, server_model = split_model
    parts = server_parts(task, made, client_model)
    alike = dict.fromkeys((part.device for part in parts), 1.0)
    servers = (
        WeightedStep(made, server_model, SGD, alike),
        Copies(made, server_model, SGD, every_iteration=True),
    )
    for seed in range(2):
        for server in servers:
            server.step(parts, seed)
    one, other = (server.finish(alike) for server in servers)
    for name, tensor in other.items():
        torch.testing.assert_close(
            one[name], tensor, rtol=20 * OFF, atol=20 * OFF * float(tensor.abs().max())
        )


def test_a_loss_that_is_not_finite_leaves_the_weighted_sum(task, split_model):
    made, client_model, server_model = split_model
    parts = server_parts(task, made, client_model)
    huge = dataclasses.replace(
        parts[1],
        features=dataclasses.replace(parts[1].features, values=parts[1].features.values * 1e30),
    )
    shares = {"d0": 1.0, "d1": 5.0, "d2": 2.0}
    bad, without = (
        WeightedStep(made, server_model, SGD, shares),
        WeightedStep(made, server_model, SGD, shares),
    )
    outcome = bad.step([parts[0], huge, parts[2]], 0)
    assert (list(outcome.losses), list(outcome.left_out)) == (["d0", "d2"], ["d1"])
    without.step([parts[0], parts[2]], 0)
    assert bits(bad.finish({})) == bits(without.finish({}))
    assert not WeightedStep(made, server_model, SGD, shares).step([huge], 0).losses


# --- LocFedMix-SL: mixup ---


def test_mixup_teaches_the_top_alone(task, split_model):
    made, client_model, server_model = split_model
    parts = server_parts(task, made, client_model)
    shares = {"d0": 1.0, "d1": 3.0, "d2": 2.0}
    plain, mixing = (
        WeightedStep(made, server_model, SGD, shares),
        WeightedStep(made, server_model, SGD, shares, extra=mixup(made, shares, 1.0)),
    )
    one, other = plain.step(parts, 0), mixing.step(parts, 0)
    assert bits(one.gradients) == bits(other.gradients)
    assert one.losses == other.losses
    assert bits(plain.finish({})) != bits(mixing.finish({}))


def test_the_mixed_loss_by_hand(task, split_model):
    made, client_model, server_model = split_model
    parts = server_parts(task, made, client_model, sizes=(4, 6))
    # Beta(a, a) of a large a is 1/2, and of two devices each is the other's partner: both mixtures
    # are the mean
    loss = mixup(made, {"d0": 1.0, "d1": 3.0}, 1e12)(server_model, parts, 0)
    first, second = (part.features for part in parts)
    tokens = second.values.shape[1]
    mean = torch.zeros(4, tokens, first.values.shape[2])
    mean[:, : first.values.shape[1]] += first.values / 2
    mean += second.values[:4] / 2
    mask = second.mask[:4].clone()
    mask[:, : first.values.shape[1]] |= first.mask
    each = [
        made.server_forward(
            server_model, Features(values=mean, mask=mask), part.labels[:4], seed=None
        ).mean
        for part in parts
    ]
    # of lam, which is 1/2 to 1e-6
    assert float(loss) == pytest.approx(float(sum(each)) / 2, rel=1e-5)


def test_nobody_is_mixed_with_himself(task, split_model):
    made, client_model, server_model = split_model
    parts = server_parts(task, made, client_model)
    assert float(mixup(made, {"d0": 1.0}, 1.0)(server_model, parts[:1], 0)) == 0
    # a device whose features are all the same rows would otherwise lose exactly its own loss
    seen = {
        float(mixup(made, dict.fromkeys(("d0", "d1"), 1.0), 1.0)(server_model, parts[:2], seed))
        for seed in range(5)
    }
    assert len(seen) == 5


def test_blending_keeps_what_only_one_device_has():
    short = Features(values=torch.ones(2, 2, 3), mask=torch.tensor([[True, True], [True, False]]))
    long = Features(
        values=torch.full((3, 4, 3), 5.0),
        mask=torch.tensor([[True] * 4, [True, False, False, False]] * 2)[:3],
    )
    parts = [
        Part(device=id, features=f, labels=torch.zeros(f.mask.shape, dtype=torch.long))
        for id, f in (("a", short), ("b", long))
    ]
    mixed, own, theirs = blended(*parts, 0.75)
    assert mixed.values.shape == (2, 4, 3)
    assert mixed.values[0, :, 0].tolist() == [2.0, 2.0, 1.25, 1.25]
    assert mixed.mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert own.tolist() == [[0, 0, IGNORED, IGNORED]] * 2
    assert theirs.tolist() == [[0] * 4] * 2
    arrays = [
        Part(
            device=id,
            features=Features(values=torch.full((rows, 1, 2), value)),
            labels=torch.arange(rows),
        )
        for id, rows, value in (("a", 3, 1.0), ("b", 2, 3.0))
    ]
    mixed, own, theirs = blended(*arrays, 0.25)
    assert mixed.values.tolist() == [[[2.5, 2.5]]] * 2
    assert own.tolist() == theirs.tolist() == [0, 1]


# --- LocFedMix-SL: reconstruction ---


def decoded_of(base, cut=1):
    decoded = DecodedCutting(cutting=Cutting(cut=cut, rank=3), width=16, weight=1.0).of(base)
    return decoded, decoded.start(np.random.default_rng(0))


def features_and_inputs(data, split_model, client_model, rows, **width):
    inputs = data.batch(rows, **width)
    return split_model.client_forward(client_model, inputs, seed=None), inputs


def test_a_decoder_that_reads_nothing_loses_the_mean_square(task, split_model):
    made, client_model, _ = split_model
    decoded, weights = decoded_of(task.base)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    features, inputs = features_and_inputs(task.train, made, client_model, np.arange(5))
    embedded = split_model_of(task.base, 0).client_forward({}, inputs, seed=None).values
    expected = float(embedded[features.mask].square().mean())
    assert float(decoded.loss(nothing, features, inputs)) == pytest.approx(expected, rel=OFF)
    net = Net("cnn-h", (3, 16), 3)
    decoded, weights = decoded_of(net)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    nothing[OUT_BIAS] += 2.0
    data = waves(6, 0)
    cut = split_model_of(net, 1)
    features, inputs = features_and_inputs(
        data, cut, cut.start(np.random.default_rng(0))[0], np.arange(6)
    )
    assert float(decoded.loss(nothing, features, inputs)) == pytest.approx(
        float(np.square(data.x - 2).mean()), rel=rounding(data.x.size)
    )


def test_padding_is_not_read_back(task, split_model):
    made, client_model, _ = split_model
    decoded, weights = decoded_of(task.base)
    longest = int(task.train.lengths.max())
    short = np.argsort(task.train.lengths, kind="stable")[:5]
    widths = int(task.train.lengths[short].max()), longest
    assert widths[0] < widths[1]
    found = [
        float(
            decoded.loss(
                weights, *features_and_inputs(task.train, made, client_model, short, width=width)
            )
        )
        for width in widths
    ]
    assert found[0] == pytest.approx(found[1], rel=100 * OFF)


@pytest.mark.parametrize(
    ("name", "shape", "cut"),
    [("cnn-h", (3, 16), 2), ("vgg-small", (3, 8, 8), 2), ("cnn-h", (3, 16), 3)],
)
def test_decoders_learn_to_read_arrays(name, shape, cut):
    net = Net(name, shape, 3)
    split_model, (decoded, weights) = split_model_of(net, cut), decoded_of(net, cut)
    rng = np.random.default_rng(0)
    inputs = {"inputs": torch.from_numpy(rng.normal(size=(8, *shape)).astype(np.float32) + 1)}
    client_model, _ = split_model.start(rng)
    features = Features(
        values=split_model.client_forward(client_model, inputs, seed=None).values.detach()
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    optimiser = torch.optim.SGD(leaves.values(), lr=0.1)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = decoded.loss(leaves, features, inputs)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # of inputs of mean 1 and deviation 1 the mean alone is half of the square
    assert losses[-1] < 0.8 * losses[0]
    assert decoded.flops("client", 8, 1) > split_model.flops("client", 8, 1)
    assert decoded.memory_bytes("client", 8, 1) > split_model.memory_bytes("client", 8, 1)


def test_reading_back_changes_what_devices_learn_and_its_decoder_too(lab):
    method = LocFedMix(**PLAIN, mixup=0.0)
    reading, spies = run(lab("reading"), method, rounds=2)
    blind, _ = run(lab("blind"), dataclasses.replace(method, reconstruction=0.0), rounds=2)
    start = method.start(lab("start").task, np.random.default_rng([0, 1]))
    assert bits(blind.decoder) == bits(start.decoder)
    for name, tensor in start.decoder.items():
        assert float((reading.decoder[name] - tensor).abs().max()) > 1e-3 * float(
            tensor.abs().max()
        )
    assert bits(reading.model) != bits(blind.model)
    sent = next(iter(orders_of(spies[1], ReadingOrder).values()))[0]
    assert sent.begin.weights.keys() >= DECODER
    ended = [value.weights for _, value in spies[0].results if isinstance(value, Ended)]
    assert all(weights.keys() == sent.begin.weights.keys() for weights in ended)
    assert not any(name in DECODER for name in reading.model.adapter)


# --- AdaSFL ---


def test_adasfl_batches_follow_the_speed_that_was_measured(lab):
    bench, method = lab(), AdaSfl(**PLAIN)
    first, (spy,) = run(bench, method)
    assert {order.batch for (order,) in orders_of(spy, Begin).values()} == {16}
    bench.fleet.begin_round(1)
    spy = Spy(bench.fleet)
    method.round(first, spy)
    cost = costs([first.workers[id] for id in bench.ids])
    batches = np.array([orders_of(spy, Begin)[id][0].batch for id in bench.ids])
    assert batches[cost.argmin()] == 16
    assert batches.tolist() == [max(1, math.floor(16 * float(cost.min() / own))) for own in cost]
    assert len(set(batches)) > 1
    assert [worker.rounds for worker in first.workers.values()] == [1] * 5


def test_adasfl_takes_fewer_steps_as_the_loss_falls(lab):
    bench, method = lab(kinds=("nx", "agx")), AdaSfl(**PLAIN | {"steps": 8})
    state, _ = run(bench, method)
    for loss, steps in (
        (state.first_loss, 8),
        (state.first_loss / 4, 4),
        (0.0, 4),
        (state.first_loss * 1.5, 10),
        (100.0, 24),
    ):
        bench.fleet.begin_round(1)
        spy = Spy(bench.fleet)
        method.round(dataclasses.replace(state, loss=loss), spy)
        # a step applies a gradient, and the last one is applied at the end
        assert [len(orders) for orders in orders_of(spy, Step).values()] == [steps, steps]


def test_adasfl_averages_client_models_alike(lab):
    state, (spy,) = run(lab(), AdaSfl(**PLAIN))
    client_models = [value.weights for _, value in spy.results if isinstance(value, Ended)]
    mean = average((1, client_model) for client_model in client_models)
    assert bits(mean) == bits({name: state.model.adapter[name] for name in mean})
    other, (spy,) = run(lab("other"), SplitFedV2(**PLAIN))
    rows = {profile.id: profile.examples for profile in lab("rows").fleet.devices}
    weighed = [(rows[id], value.weights) for id, value in spy.results if isinstance(value, Ended)]
    assert bits(average(weighed)) == bits({name: other.model.adapter[name] for name in mean})


# --- SplitLoRA ---


def test_splitlora_averages_on_the_way(lab):
    state, (spy,) = run(lab(), SplitLora(**PLAIN | {"steps": 5}, average_every=2))
    begun = orders_of(spy, Begin)
    assert [len(orders) for orders in begun.values()] == [3] * 5  # 2 + 2 + 1 iterations
    ended = [value.weights for _, value in spy.results if isinstance(value, Ended)]
    for turn in range(1, 3):
        mean = average((1, weights) for weights in ended[5 * (turn - 1) : 5 * turn])
        assert {bits(orders[turn].weights) for orders in begun.values()} == {bits(mean)}
    mean = average((1, weights) for weights in ended[10:])
    assert bits(mean) == bits({name: state.model.adapter[name] for name in mean})


def test_splitlora_serves_devices_in_a_fixed_order_and_splitfed_in_a_random_one(lab):
    settings = PLAIN | {"steps": 1}
    fixed, _ = run(lab("fixed"), SplitLora(**settings))
    drawn, _ = run(lab("drawn"), SplitFedV2(**settings))
    # one iteration: client models saw other server models, which had taken other steps before
    assert bits(fixed.model) != bits(drawn.model)


# --- all of them ---


@pytest.mark.parametrize("method", BASELINES)
def test_who_vanishes_in_mid_round_is_not_asked_again_in_it(lab, method):
    replied = []

    def losing(reply):
        replied.append(reply.device)
        return None if reply.device == "nx-02" and replied.count("nx-02") == 2 else reply

    bench = lab()
    state, spies = run(bench, method.toy(), rounds=2, reply=losing)
    asked = [[id for id, _ in spy.orders].count("nx-02") for spy in spies]
    others = [[id for id, _ in spy.orders].count("agx-04") for spy in spies]
    assert asked[0] == 2 < others[0]
    assert asked[1] == others[1]
    assert state.round == 2
    rows = [row for row in bench.rows("exchange") if row["round"] == 0 and row["device"] == "nx-02"]
    assert len(rows) == 2 and all(row["bytes_up"] > 0 for row in rows)  # what it cost is counted


def test_in_splitfed_v1_a_vanished_device_leaves_no_trace(lab):
    def silent_after(asks):
        replied = []

        def losing(reply):
            replied.append(reply.device)
            return None if reply.device == "nx-02" and replied.count("nx-02") > asks else reply

        return losing

    late, never = (
        run(lab(f"after-{n}"), SplitFedV1(**PLAIN), reply=silent_after(n))[0] for n in (3, 0)
    )
    assert bits(late.model) == bits(never.model)


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("method", BASELINES)
def test_any_block_boundary_will_do(lab, method, cut):
    state, _ = run(lab(), dataclasses.replace(method.toy(), cut=cut, steps=2))
    assert state.round == 1


@pytest.mark.parametrize("method", BASELINES)
def test_language_models_learn_split(decoder, tmp_path, method):
    bench = Lab(
        toy_task(*decoder, rounds=2, kind="causal-lm"), tmp_path / "lm", kinds=("tx2", "agx")
    )
    state, _ = run(bench, dataclasses.replace(method.toy(), steps=2), rounds=2)
    losses = [row["values"]["loss"] for row in bench.rows("note") if "loss" in row["values"]]
    assert losses[-1] < losses[0]
    assert state.round == 2
    bench.close()


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cut": 3}, "the cut is after block 3"),
        ({"steps": 0}, "method.steps is 0"),
        ({"batch": 0}, "method.batch is 0"),
        ({"batch": 301}, "all devices together hold 300 rows"),
        ({"rank": 0}, "method.rank"),
        ({"scale": 0.0}, "method.scale is 0.0"),
        ({"learning_rate": 0.0}, "method.learning_rate is 0.0"),
        ({"decay": 1.5}, "method.decay is 1.5"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, method, change, words):
    with pytest.raises(BadInput, match=words):
        dataclasses.replace(method.toy(), **change).check(task)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LocFedMix(reconstruction=-1.0), "method.reconstruction is -1.0"),
        (LocFedMix(mixup=math.nan), "method.mixup is nan"),
        (AdaSfl(fewest=0.0), "method.fewest and method.most are 0.0 and 3.0"),
        (AdaSfl(most=0.5), "0.5 and 0.5"),
        (AdaSfl(batches=Regulated(keep=1.0)), "method.batches.keep is 1.0"),
        (SplitLora(average_every=0), "method.average_every is 0"),
    ],
)
def test_their_own_settings_are_checked_too(task, method, words):
    with pytest.raises(BadInput, match=words):
        dataclasses.replace(method, optimiser="adamw", learning_rate=2e-4).check(task)


def test_a_device_without_memory_for_a_row_is_left_out(lab):
    class Small(Spy):
        @property
        def devices(self):
            return tuple(
                dataclasses.replace(p, memory_bytes=0 if p.id == "nx-02" else p.memory_bytes)
                for p in self._fleet.devices
            )

    bench, spies = lab(), []
    bench.run(
        SplitFedV2.toy(), rounds=1, around=lambda fleet: spies.append(Small(fleet)) or spies[-1]
    )
    assert "nx-02" not in {id for id, _ in spies[0].orders}
    assert [
        row["values"]["device"] for row in bench.rows("note") if "left_out" in row["values"]
    ] == ["nx-02"]

    class Tiny(Spy):
        @property
        def devices(self):
            return tuple(dataclasses.replace(p, memory_bytes=0) for p in self._fleet.devices)

    with pytest.raises(AllLost, match="has the memory for one row"):
        lab("none").run(SplitFedV2.toy(), around=Tiny)


# --- nets ---


def waves(rows, seed, classes=3):
    """Three channels of noise, with a wave of the class's frequency in them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    time = np.arange(16) / 16
    wave = np.sin(2 * np.pi * (labels[:, None] + 1) * time + rng.uniform(0, 2 * np.pi, (rows, 1)))
    x = wave[:, None] + 0.3 * rng.normal(size=(rows, 3, 16))
    return Arrays(x=x.astype(np.float32), labels=labels)


@pytest.mark.parametrize("method", FOR_NETS)
def test_nets_learn_split(tmp_path, method):
    train, test = waves(300, 0), waves(90, 1)
    net = Net("cnn-h", (3, 16), 3)
    task = Task(
        kind="array",
        base=net,
        train=train,
        test=test,
        label_names=("a", "b", "c"),
        max_tokens=1,
        rounds=5,
    )
    bench = Lab(task, tmp_path / "net", kinds=("tx2", "nx", "agx"))
    made = method(steps=5, batch=16, optimiser="adamw", learning_rate=2e-3)
    made.check(task)
    assert "net" in made.models
    state = bench.run(made)
    (found,) = score_nets(net, [made.deploy(state)], test)
    luck = 1 / 3 + 4 * math.sqrt(1 / 3 * 2 / 3 / len(test))  # four standard errors above guessing
    assert found.accuracy > luck and found.mean_loss < math.log(3)
    bench.close()


@pytest.mark.parametrize("method", FOR_NETS)
def test_statistics_of_batch_norm_are_averaged_with_the_weights(tmp_path, method):
    rng = np.random.default_rng(0)
    data = Arrays(x=rng.normal(1, 1, (60, 3, 8, 8)).astype(np.float32), labels=np.arange(60) % 3)
    net = Net("vgg-small", (3, 8, 8), 3)
    task = Task(
        kind="array",
        base=net,
        train=data,
        test=data,
        label_names=("a", "b", "c"),
        max_tokens=1,
        rounds=2,
    )
    bench = Lab(task, tmp_path / "net", kinds=("tx2", "nx"))
    made = method(steps=2, batch=8, optimiser="adamw", learning_rate=2e-4)
    before, (state, (spy,)) = made.start(task, np.random.default_rng([0, 1])), run(bench, made)
    ended = {id: value.weights for id, value in spy.results if isinstance(value, Ended)}
    shares = dict.fromkeys(bench.ids, 1) if method is AdaSfl else rows_of(bench)
    mean = average((shares[id], weights) for id, weights in ended.items())
    statistics = split_model_of(net, net.default_cut).statistics
    assert statistics & mean.keys()
    for name in statistics:
        after = state.model.weights[name]
        assert bool(torch.isfinite(after).all())
        assert not torch.equal(after, before.model.weights[name])
        if name in mean:  # of the client models; those of the server's move with its steps
            torch.testing.assert_close(after, mean[name], rtol=4 * FP32, atol=0)
    bench.close()


def test_splitlora_is_for_transformers():
    assert find("splitlora").models == ("transformer",)
