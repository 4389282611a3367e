"""Nets in halves: sizes of the papers, cuts that change nothing, what dropout and batch norm draw
and keep.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from array_toy import array_task, bars, waves
from tolerances import FP32, rounding
from torch import nn

from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.nets.load import load
from fedspine.nets.models import BatchNorm
from fedspine.nets.net import Net, NetModel
from fedspine.nets.score import score_nets
from fedspine.split.cut import split_model_of
from fedspine.split.interface import Features
from fedspine.split.merged_batch import Part
from fedspine.split.server import MergedStep
from fedspine.split.trainable_half import Optimising

SMALL = {
    "cnn-h": (2, 16),
    "cnn-s": (1, 6848),
    "alexnet": (1, 8, 8),
    "alexnet-small": (1, 8, 8),
    "vgg16": (3, 32, 32),
    "vgg-small": (3, 8, 8),
}
QUICK = ("cnn-h", "cnn-s", "alexnet-small", "vgg-small")


def rng(seed=0):
    return np.random.default_rng(seed)


def batch_for(net, rows=4, seed=0):
    inputs = rng(seed).standard_normal((rows, *net.shape)).astype(np.float32)
    labels = torch.arange(rows) % net.classes
    return {"inputs": torch.from_numpy(inputs), "labels": labels}


def copies(weights, split_model):
    """Weights that ask for gradients, and statistics that may be changed."""
    return {
        name: w.clone().requires_grad_(name not in split_model.statistics)
        for name, w in weights.items()
    }


def losses(split_model, client_model, server_model, batch, seed):
    return split_model.server_forward(
        server_model,
        split_model.client_forward(client_model, batch, seed=seed),
        batch["labels"],
        seed=seed,
    )


def linear(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs, kernel=9):
    return linear(inputs * kernel, outputs)


# section 4 of the reconstruction: feature shapes, and the weights counted layer by layer; 4 numbers
# a channel of a norm
PAPER = {
    "cnn-h": (
        (9, 128), 6, (32, 32, 2),
        conv(1, 12) + conv(12, 32),
        conv(32, 64) + linear(4096, 1024) + linear(1024, 6),
    ),
    "cnn-s": (
        (1, 16000), 35, (64, 14),
        conv(1, 32, 80) + conv(32, 32, 3) + conv(32, 64, 3) + 4 * (32 + 32 + 64),
        conv(64, 64, 3) + 4 * 64 + linear(64, 35),
    ),
    "alexnet": (
        (3, 32, 32), 10, (256, 4, 4),
        conv(3, 64) + conv(64, 192) + conv(192, 384) + conv(384, 256) + conv(256, 256),
        linear(4096, 4096) + linear(4096, 4096) + linear(4096, 10),
    ),
    "vgg16": (
        (3, 144, 144), 100, (512, 5, 5),
        conv(3, 64) + conv(64, 64) + conv(64, 128) + conv(128, 128)
        + conv(128, 256) + 2 * conv(256, 256)
        + conv(256, 512) + 5 * conv(512, 512) + 4 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512),
        linear(12800, 4096) + linear(4096, 4096) + linear(4096, 100),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_sizes_at_the_default_cut_are_those_of_the_paper(name):
    shape, classes, features, below, above = PAPER[name]
    net = Net(name, shape, classes)
    split_model = split_model_of(net, net.default_cut)
    assert split_model.feature_shape(1) == features
    state = net.blocks.state_dict()
    first = [f"block{i}." for i in range(1, net.default_cut + 1)]
    client_model = sum(t.numel() for n, t in state.items() if n.startswith(tuple(first)))
    assert (client_model, sum(t.numel() for t in state.values()) - client_model) == (below, above)


@pytest.mark.parametrize("name", QUICK)
def test_a_cut_anywhere_computes_the_whole(name):
    net = Net(name, SMALL[name], 3)
    batch, whole = batch_for(net), net.start(rng())
    logits = net.logits(whole, batch["inputs"])
    expected = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    for cut in range(1, len(net.blocks)):
        split_model = split_model_of(net, cut)
        client_model, server_model = split_model.start(rng())
        assert not client_model.keys() & server_model.keys()
        assert (
            pack({**client_model, **server_model}).sha256
            == pack({n: whole[n] for n in [*client_model, *server_model]}).sha256
        )
        found = losses(split_model, client_model, server_model, batch, None)
        assert torch.equal(found.total, expected)  # the same products of the same shapes
        assert found.counted.tolist() == [1] * 4
        features = split_model.client_forward(client_model, batch, seed=None)
        assert tuple(features.values.shape) == (4, *split_model.feature_shape(1))
        by_parts = split_model.ending_forward(
            server_model,
            split_model.middle_forward(server_model, features, seed=7),
            batch["labels"],
            seed=7,
        )
        assert torch.equal(
            by_parts.total,
            split_model.server_forward(server_model, features, batch["labels"], seed=7).total,
        )
        assert split_model.ends <= server_model.keys()


@pytest.mark.parametrize(
    ("name", "entry"),
    [("cnn-h", "block3."), ("cnn-s", "block4."), ("alexnet-small", None), ("vgg-small", "block5.")],
)
def test_a_first_block_of_the_top_that_makes_features_learns_as_they_do(name, entry):
    """With logit adjustment, convolutions learn from the adjusted loss and what is fully connected
    from the plain one.
    """
    net = Net(name, SMALL[name], 3)
    split_model, batch = split_model_of(net, net.default_cut), batch_for(net)
    assert (
        split_model.entry
        == {n for n in split_model.parts(net_model(net))[1] if entry and n.startswith(entry)}
        - split_model.statistics
    )
    client_model, server_model = split_model.start(rng())
    part = Part(
        device="d",
        features=split_model.client_forward(client_model, batch, seed=5),
        labels=batch["labels"],
    )
    sgd = Optimising(kind="sgd", learning_rate=0.5)
    plain, adjusted = (
        MergedStep(split_model, server_model, sgd),
        MergedStep(
            split_model, server_model, sgd, adjustments={"d": torch.tensor([0.0, 2.0, -1.0])}
        ),
    )
    sent, changed = (server.step([part], 5).gradients["d"].values for server in (plain, adjusted))
    (bias,) = (n for n, t in server_model.items() if n.endswith("bias") and t.shape == (3,))
    for found, added in ((sent, [0.0, 0.0, 0.0]), (changed, [0.0, 2.0, -1.0])):
        # what is added to logits might as well be in the last layer's bias
        weights = server_model | {bias: server_model[bias] + torch.tensor(added)}
        entered = Features(values=part.features.values.clone().requires_grad_())
        losses = split_model.server_forward(weights, entered, part.labels, seed=5)
        losses.total.mean().backward()
        expected = entered.values.grad
        # the logits round otherwise, by a few units of numbers near 1
        off = rounding(3, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=off)
    before, after = plain.finish({"d": 1.0}), adjusted.finish({"d": 1.0})
    assert {n for n in server_model if not torch.equal(before[n], after[n])} == split_model.entry


def net_model(net):
    return NetModel(net=net.name, weights=net.start(rng()))


@pytest.mark.parametrize("name", QUICK)
def test_a_gradient_sent_back_is_the_gradient_of_the_whole(name):
    net = Net(name, SMALL[name], 3)
    split_model, batch = split_model_of(net, net.default_cut), batch_for(net)
    client_model, server_model = (copies(part, split_model) for part in split_model.start(rng()))
    losses(split_model, client_model, server_model, batch, 5).mean.backward()
    below, above = (copies(part, split_model) for part in split_model.start(rng()))
    features = split_model.client_forward(below, batch, seed=5)
    arrived = Features(values=features.values.detach().requires_grad_())
    split_model.server_forward(above, arrived, batch["labels"], seed=5).mean.backward()
    features.values.backward(arrived.values.grad)
    for name_, tensor in {**client_model, **server_model}.items():
        again = {**below, **above}[name_]
        assert torch.equal(
            again if tensor.grad is None else again.grad,
            tensor if tensor.grad is None else tensor.grad,
        )


def test_a_model_is_taken_apart_at_another_cut():
    net = Net("cnn-h", (2, 16), 3)
    model = split_model_of(net, 2).join(*split_model_of(net, 2).start(rng()))
    client_model, server_model = split_model_of(net, 4).parts(model)
    assert sorted({**client_model, **server_model}) == sorted(model.weights)
    assert {name.split(".")[0] for name in client_model} == {f"block{i}" for i in (1, 2, 3, 4)}


def test_dropout_follows_from_its_seed_alone():
    net = Net("cnn-h", (2, 16), 3)
    split_model, batch = split_model_of(net, 2), batch_for(net)
    client_model, server_model = split_model.start(rng())
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = losses(split_model, client_model, server_model, batch, 3).total
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(losses(split_model, client_model, server_model, batch, 3).total, first)
    assert not torch.equal(losses(split_model, client_model, server_model, batch, 4).total, first)
    assert torch.equal(
        losses(split_model, client_model, server_model, batch, None).total,
        losses(split_model, client_model, server_model, batch, None).total,
    )


@pytest.mark.parametrize(
    ("cls", "shape"), [(nn.BatchNorm1d, (5, 3, 4)), (nn.BatchNorm2d, (5, 3, 4, 2))]
)
def test_batch_norm_is_torchs(cls, shape):
    ours, theirs = BatchNorm(3), cls(3)
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 2 + 1
        assert torch.equal(ours.train()(x), theirs.train()(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_batch_norm_of_one_value_uses_what_it_knows():
    norm = BatchNorm(3).train()
    x = torch.tensor([[[1.0], [2.0], [3.0]]])  # one row, one place
    # by mean 0 and variance 1, as they start; a root and a product round
    torch.testing.assert_close(norm(x), x / np.sqrt(1 + 1e-5), rtol=2 * FP32, atol=0)
    assert norm.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_statistics_move_in_place_and_only_in_training():
    net = Net("vgg-small", (3, 8, 8), 3)
    split_model, batch = split_model_of(net, 4), batch_for(net)
    client_model, _ = split_model.start(rng())
    name = "block1.norm.running_mean"
    assert name in split_model.statistics
    split_model.client_forward(client_model, batch, seed=None)
    assert not client_model[name].any()
    conv_out = nn.functional.conv2d(
        batch["inputs"],
        client_model["block1.conv.weight"],
        client_model["block1.conv.bias"],
        padding=1,
    )
    split_model.client_forward(client_model, batch, seed=1)
    # momentum 0.1 from 0; 27 products each, and the mean of 4 rows of 64
    off = 0.1 * rounding(27 + 4 * 64, float(conv_out.std()))
    expected = 0.1 * conv_out.mean((0, 2, 3))
    torch.testing.assert_close(client_model[name], expected, rtol=0, atol=off)
    assert not any(t.requires_grad for t in client_model.values())


def test_costs_are_those_counted_by_hand():
    split_model = split_model_of(Net("cnn-h", (9, 128), 6), 2)
    # 2 operations a product: forward and weights' gradient, and the gradient of what came in, but
    # of the data itself
    first, second = 128 * 9 * 12 * 9, 64 * 4 * 32 * 12 * 9
    assert split_model.flops("client", 3, 1) == 3 * (4 * first + 6 * second)
    third, linears = 32 * 2 * 64 * 32 * 9, 4096 * 1024 + 1024 * 6
    assert split_model.flops("server", 1, 1) == 6 * (third + linears)
    assert (split_model.launches("client"), split_model.launches("server")) == (2, 3)
    per_row = split_model.memory_bytes("client", 2, 1) - split_model.memory_bytes("client", 1, 1)
    # the row, its picture, and after each of both convolutions, relus and poolings; fp32, with
    # gradients
    numbers = 2 * 1152 + 2 * 12 * 1152 + 12 * 64 * 4 + 2 * 32 * 64 * 4 + 32 * 32 * 2
    assert per_row == 8 * numbers


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cnn-h", (1, 4)), ("cnn-h", (3, 50)), ("cnn-s", (2, 6848)), ("alexnet-small", (3, 31, 17)),
     ("vgg-small", (4, 8, 9)), ("vgg-small", (1, 28, 28)), ("alexnet-small", (1, 8, 8))],
)  # fmt: skip
def test_nets_take_the_shape_that_comes(name, shape):
    net = Net(name, shape, 4)
    weights = net.start(rng())
    assert net.logits(weights, batch_for(net, 2)["inputs"]).shape == (2, 4)
    # one row in training, as a slow device may have it
    split_model = split_model_of(net, net.default_cut)
    client_model, server_model = split_model.start(rng())
    assert torch.isfinite(
        losses(split_model, client_model, server_model, batch_for(net, 1), 0).total
    ).all()


def test_models_of_144_pixels_need_no_weights_to_be_planned():
    net = Net("vgg16", (3, 144, 144), 100)
    assert all(tensor.is_meta for tensor in net.blocks.state_dict().values())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Net("cnn", (9, 128), 6), "unknown net for arrays 'cnn'; did you mean 'cnn-"),
        (
            lambda: Net("cnn-h", (1, 28, 28), 6),
            "reads rows of [channels, time], got rows of shape [1, 28, 28]",
        ),
        (lambda: Net("alexnet", (9, 128), 6), "reads rows of [channels, height, width]"),
        (lambda: Net("cnn-h", (9, 3), 6), "needs at least 4 samples in time"),
        (lambda: Net("cnn-s", (1, 6847), 6), "needs at least 6848 samples in time"),
        (lambda: Net("vgg-small", (3, 7, 99), 6), "needs at least 8 pixels each way"),
        (
            lambda: split_model_of(Net("cnn-h", (9, 128), 6), 0),
            "the cut is after block 0, but cnn-h has 5 blocks",
        ),
        (lambda: split_model_of(Net("cnn-h", (9, 128), 6), 5), "choose 1 to 4"),
        (
            lambda: load("cnn-h", waves(4, 0, channels=20), waves(4, 1, channels=20), 3),
            "got rows of shape [20, 16]",
        ),
        (
            lambda: load("alexnet-small", waves(4, 0), waves(4, 1), 3),
            "8 pixels each way, got rows of shape [1, 2, 16]",
        ),
        (
            lambda: load("vgg-small", bars(4, 0, channels=2), bars(4, 1, channels=2), 3),
            "1, 3 or 4 channels",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, said):
    with pytest.raises(BadInput) as error:
        call()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_floats_are_standardised_by_the_training_rows():
    x, labels = waves(50, 0)
    scaled = x * np.array([3.0, 0.0], np.float32)[None, :, None] + 7
    _, train, test = load("cnn-h", (scaled, labels), (scaled[:5] + 1, labels[:5]), 3)
    deviation = scaled[:, 0].std()
    # the mean, its difference and the quotient are rounded
    off = 3 * FP32 * np.abs(scaled).max() / deviation
    assert np.allclose(train.x.mean((0, 2)), 0, rtol=0, atol=off)
    # a channel that never changes stays at zero
    assert np.allclose(train.x.std((0, 2)), [1, 0], rtol=0, atol=off)
    assert np.allclose(test.x[:, 0] - train.x[:5, 0], 1 / deviation, rtol=0, atol=2 * off)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_put_channels_first_and_scaled(channels):
    x, labels = bars(6, 0, channels=channels)
    _, train, _ = load("vgg-small", (x, labels), (x, labels), 3)
    batch = train.batch([4, 1])
    assert batch["inputs"].shape == (2, channels, 8, 8) and batch["inputs"].dtype is torch.float32
    assert torch.allclose(
        batch["inputs"][1, -1] * 255, torch.from_numpy(x[1].reshape(8, 8, -1)[..., -1]).float()
    )
    assert batch["labels"].tolist() == [1, 1]
    assert len(train.take(np.array([0, 2]))) == 2


def test_scores_are_sums_over_all_rows():
    task = array_task()
    model = split_model_of(task.base, 2).join(*split_model_of(task.base, 2).start(rng()))
    (found,) = score_nets(task.base, [model], task.test)
    logits = task.base.logits(model.weights, torch.from_numpy(task.test.x))
    expected = nn.functional.cross_entropy(logits, torch.from_numpy(task.test.labels))
    assert found.count == 90
    assert found.correct == int((logits.argmax(1).numpy() == task.test.labels).sum())
    assert found.mean_loss == pytest.approx(float(expected), rel=rounding(90))  # of rows


def test_a_model_survives_the_wire():
    net = Net("cnn-h", (2, 16), 3)
    model = split_model_of(net, 2).join(*split_model_of(net, 2).start(rng()))
    again = unpack(pack(model))
    assert again.net == "cnn-h" and pack(again).payload == pack(model).payload
    assert pack(replace(model, net="other")).payload != pack(model).payload
