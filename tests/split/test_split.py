"""Split learning's parts: what crosses the wire, halves that make up the whole, the server's steps,
a round's course.
"""

import dataclasses
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import model_on, tiny
from tolerances import TINY
from toy import Lab, Spy, bits, toy_task

from fedspine.core.device import Call, Device, on_device, serve
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost
from fedspine.core.message import message, pack
from fedspine.core.scratch import Kept, Scratch
from fedspine.core.task import Arrays, Task
from fedspine.core.tensors import average
from fedspine.exports.hf import merged_tensors
from fedspine.lm.content import content_sha256
from fedspine.lm.lora import b_name
from fedspine.lm.tune import losses_of
from fedspine.nets.net import Net
from fedspine.split.batches import Budget, drawn, rows_at, rows_from
from fedspine.split.cut import split_model_of
from fedspine.split.device import HELD, begin, ended
from fedspine.split.interface import Features
from fedspine.split.merged_batch import Part, merged, per_device
from fedspine.split.messages import Begin, Cutting, Step
from fedspine.split.protocol import run_round
from fedspine.split.server import Copies, InTurn, MergedStep
from fedspine.split.trainable_half import (
    Optimising,
    TrainableHalf,
    check_optimising,
    learning_rate_at,
)
from fedspine.split.wire import (
    gradient_wired,
    labels_unwired,
    labels_wired,
    row_bytes,
    unwired,
    wired,
)

SGD = Optimising(kind="sgd", learning_rate=0.5)
ADAMW = Optimising(kind="adamw", learning_rate=2e-2, weight_decay=0.1, clip=1.0)
EPS = 2.0**-24  # half a unit in the last place of fp32, relative


def text(rows=5, tokens=7, width=4, seed=0, spread=1.0):
    """Random features with unequal row lengths."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(0, spread, (rows, tokens, width)).astype(np.float32))
    lengths = np.append(rng.integers(1, tokens, rows - 1), tokens)
    mask = torch.from_numpy(np.arange(tokens)[None] < lengths[:, None])
    return Features(values=values * mask[:, :, None], mask=mask)


# --- batches ---


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    sizes=st.lists(
        st.integers(1, 70) | st.builds(Budget, tokens=st.integers(1, 200), rows=st.integers(1, 40)),
        max_size=9,
    ),
    seed=st.integers(0, 9),
)
def test_batches_of_rows_and_of_tokens_take_every_row_of_a_pass_once(lengths, sizes, seed):
    """What was drawn and what is in line still are the passes so far, whatever the batches; tokens
    are never exceeded.
    """
    lengths, used, taken, left = np.array(lengths), [], 0, np.empty(0, np.int64)
    for size in sizes:
        batch = drawn(lengths, size, seed, taken, left)
        again = drawn(lengths, size, seed, taken, left)
        assert batch.rows.tolist() == again.rows.tolist()
        used, taken, left = used + batch.rows.tolist(), batch.taken, batch.left
        if isinstance(size, int):
            assert len(batch.rows) == min(size, len(lengths))
        else:
            assert 1 <= len(batch.rows) <= size.rows
            assert lengths[batch.rows].sum() <= size.tokens or len(batch.rows) == 1
    passes = [
        row for start in range(taken) for row in rows_from(len(lengths), 1, seed, start).tolist()
    ]
    assert sorted(used + left.tolist()) == sorted(passes)


def test_batches_of_rows_are_the_passes_in_their_order():
    taken, left, found = 0, (), []
    for size in (3, 5, 2, 9):
        batch = drawn(np.full(7, 4), size, 1, taken, left)
        taken, left = batch.taken, batch.left
        found.append(batch.rows.tolist())
    starts = [0, 3, 8, 10]
    sizes = [3, 5, 2, 7]
    assert found == [
        rows_from(7, size, 1, start).tolist() for size, start in zip(sizes, starts, strict=True)
    ]


def test_a_batch_of_tokens_is_nearly_full():
    """No row that is next in line would have fitted besides, and few tokens are left over."""
    rng = np.random.default_rng(0)
    lengths, taken, left, over = rng.integers(4, 20, 100), 0, (), []
    for _ in range(30):
        batch = drawn(lengths, Budget(tokens=60, rows=40), 0, taken, left)
        taken, left = batch.taken, batch.left
        over.append(60 - lengths[batch.rows].sum())
        assert lengths[left[:8]].min() > over[-1]
    assert np.mean(over) < 2


# --- the wire ---


@pytest.mark.parametrize("spread", [1.0, 1e-9, 1e6])
def test_features_come_back_as_precisely_as_they_are_sent(spread):
    features = text(spread=spread)
    assert torch.equal(unwired(wired(features, "fp32")).values, features.values)
    found = unwired(wired(features, "fp16"))
    assert torch.equal(found.mask, features.mask)
    # fp16 keeps 11 bits of normal numbers; the largest is brought to 2^14 or more, so those below
    # 2^-14 of 1 are 2^-28 of the largest, and are off by half a step of 2^-24 of 1
    off = (found.values - features.values).abs()
    assert bool(
        (off <= features.values.abs() * 2**-11 + features.values.abs().max() * 2**-39).all()
    )
    found = unwired(wired(features, "int8"))
    step = features.values.abs().amax(-1, keepdim=True) / 127
    assert bool(((found.values - features.values).abs() <= step * (0.5 + 1e-5)).all())


def test_no_padding_is_sent():
    features = text()
    tokens = int(features.mask.sum())
    assert tokens < features.mask.numel()
    sizes = {
        name: (sent := wired(features, name)).values.numel() * sent.values.itemsize
        for name in ("fp32", "fp16")
    }
    assert sizes == {"fp32": 16 * tokens, "fp16": 8 * tokens}
    small = wired(features, "int8")
    assert (small.values.numel(), small.scale.numel()) == (4 * tokens, tokens)
    assert (
        unwired(dataclasses.replace(small, mask=None), features.mask).values.shape
        == features.values.shape
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_what_is_zero_too(precision, bad):
    values = torch.zeros(3, 2, 5)
    assert torch.equal(unwired(wired(Features(values=values), precision)).values, values)
    values[1, 0, 3] = bad
    found = unwired(wired(Features(values=values), precision)).values
    assert not torch.isfinite(found).all()


def test_labels_take_two_bytes_where_they_fit():
    for labels in (torch.tensor([3, 0]), torch.tensor([[5, -100], [40_000, 7]])):
        assert torch.equal(labels_unwired(labels_wired(labels)), labels)
    assert labels_wired(torch.tensor([3, 0])).dtype == torch.int16


def test_bytes_of_the_spec_for_alexnet():
    # section 4 and 16: 16 KB of features a sample and an 8.6 MB client model; 42 steps of 64 rows
    # are 84 MB, both ways
    net = Net("alexnet", (3, 32, 32), 10)
    split_model = split_model_of(net, net.default_cut)
    assert split_model.feature_shape(1) == (256, 4, 4)
    feature = row_bytes(split_model.feature_shape(1), "fp32")
    assert 42 * 64 * 2 * feature == 84 * 2**20
    client_model, _ = split_model.parts(
        split_model.join(*split_model.start(np.random.default_rng(0)))
    )
    assert round(4 * sum(tensor.numel() for tensor in client_model.values()) / 2**20, 1) == 8.6


# --- the two halves ---


def split_model_and_weights(base, cut):
    """Halves and the weights of a model whose adapter does something."""
    model = model_on(base)
    split_model = split_model_of(base, cut, rank=3)
    return split_model, model, split_model.parts(model)


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("classification", "bert"),
        ("classification", "distilbert"),
        ("classification", "llama"),
        ("causal-lm", "qwen2"),
    ],
)
def test_the_two_halves_are_the_model(tmp_path, kind, model_type):
    base, tokenizer = tiny(tmp_path, model_type, kind)
    task = toy_task(base, tokenizer, rounds=1, kind=kind)
    inputs = task.train.batch(np.arange(6))
    for cut in range(base.layout.layers + 1):
        split_model, model, weights = split_model_and_weights(base, cut)
        assert bits(split_model.join(*weights)) == bits(model)
        leaves = [
            {name: tensor.clone().requires_grad_() for name, tensor in half.items()}
            for half in weights
        ]
        features = split_model.client_forward(leaves[0], inputs, seed=None)
        losses = split_model.server_forward(leaves[1], features, inputs["labels"], seed=None)
        losses.mean.backward()
        again = split_model.ending_forward(
            weights[1],
            split_model.middle_forward(weights[1], features, seed=None),
            inputs["labels"],
            seed=None,
        )
        torch.testing.assert_close(again.total, losses.total)

        whole = {
            name: tensor.clone().requires_grad_()
            for half in weights
            for name, tensor in half.items()
        }
        module = base.fit(split_model.join(whole, {}))
        loss = losses_of(module, inputs, 1).sum()
        loss.backward()
        # the same sums in the same order, but for the mean, whose 6 terms or some 60 are added up
        # otherwise
        torch.testing.assert_close(losses.mean, loss, rtol=64 * EPS, atol=0)
        for name, leaf in {**leaves[0], **leaves[1]}.items():
            scale = whole[name].grad.abs().max()
            assert bool((leaf.grad - whole[name].grad).abs().max() <= TINY * scale), (cut, name)
        assert set(split_model.ends) <= set(weights[1])


def test_a_cut_outside_the_model_is_refused(task):
    for cut in (-1, 3):
        with pytest.raises(BadInput, match=f"after block {cut}.*choose 0 to 2"):
            split_model_of(task.base, cut)


def test_what_a_half_costs_adds_up(task):
    def cost(cut, half):
        split_model = split_model_of(task.base, cut, rank=4)
        return split_model.flops(half, 8, 16), split_model.launches(half)

    assert cost(0, "client") == (0.0, 0)
    whole = cost(2, "client")
    assert cost(0, "server") == whole
    assert tuple(a + b for a, b in zip(cost(1, "client"), cost(1, "server"), strict=True)) == whole
    split_model = split_model_of(task.base, 1, rank=4)
    assert (
        split_model.memory_bytes("client", 16, 16)
        > split_model.memory_bytes("client", 8, 16)
        > 2 * task.base.embeddings
    )


# --- the server ---


def parts_of(task, split_model, client_model, sizes=(3, 9, 5)):
    """Features of three devices with unequal batches, each padded to a length of its own."""
    made, start = [], 0
    by_length = np.argsort(task.train.lengths, kind="stable")
    for number, size in enumerate(sizes):
        rows = by_length[start : start + size]
        inputs = task.train.batch(rows, int(task.train.lengths[rows].max()))
        start += 100  # rows of other lengths
        features = unwired(
            wired(split_model.client_forward(client_model, inputs, seed=None), "fp32")
        )
        made.append(Part(device=f"d{number}", features=features, labels=inputs["labels"]))
    return made


def test_padding_does_not_change_the_loss(task, decoder):
    lm = toy_task(*decoder, rounds=1, kind="causal-lm")
    for each in (task, lm):
        split_model, _, (client_model, server_model) = split_model_and_weights(each.base, 1)
        parts = parts_of(each, split_model, client_model)
        widths = {part.features.mask.shape[1] for part in parts}
        assert len(widths) > 1, "nothing would be padded"
        together = split_model.server_forward(server_model, *merged(parts), seed=None)
        alone = [
            split_model.server_forward(server_model, part.features, part.labels, seed=None)
            for part in parts
        ]
        # other shapes sum in another order: some 64 terms at each of 20 products one after another
        torch.testing.assert_close(
            together.total, torch.cat([own.total for own in alone]), rtol=64 * 20 * EPS, atol=0
        )
        assert torch.equal(together.counted, torch.cat([own.counted for own in alone]))


def test_merging_and_parting_are_inverse(task):
    split_model, _, (client_model, _) = split_model_and_weights(task.base, 1)
    parts = parts_of(task, split_model, client_model)
    for part, own in zip(parts, per_device(merged(parts)[0].values, parts), strict=True):
        assert torch.equal(own.values, part.features.values)
        assert torch.equal(own.mask, part.features.mask)


def test_dispatch_rescales_the_slices_of_one_gradient(task):
    split_model, _, (client_model, server_model) = split_model_and_weights(task.base, 1)
    parts = parts_of(task, split_model, client_model)
    rescaled = MergedStep(split_model, server_model, SGD).step(parts, 0)
    plain = MergedStep(split_model, server_model, SGD, rescale=False).step(parts, 0)
    rows = sum(len(part.features) for part in parts)
    for part in parts:
        share = len(part.features) / rows  # d_i / Q
        found, expected = (outcome.gradients[part.device].values for outcome in (rescaled, plain))
        # two products on the way
        torch.testing.assert_close(share * found, expected, rtol=4 * EPS, atol=0)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("kind", ["merged", "in-turn", "copies"])
def test_shifts_change_what_features_and_the_first_block_of_the_top_learn_and_nothing_else(
    task, kind
):
    """Both get what autograd makes of the adjusted loss; the rest of the server model learns as
    without.
    """
    split_model, _, (client_model, server_model) = split_model_and_weights(task.base, 1)
    parts = parts_of(task, split_model, client_model)
    classes = len(task.label_names)
    adjustments = {
        part.device: torch.linspace(-3, number, classes) for number, part in enumerate(parts)
    }
    if kind == "in-turn":  # the second device meets a server model that has moved
        parts = parts[:1]
    make = {
        "merged": MergedStep,
        "in-turn": InTurn,
        "copies": partial(Copies, every_iteration=False),
    }[kind]
    adjusted, plain = (
        make(split_model, server_model, SGD, adjustments=adjustments),
        make(split_model, server_model, SGD),
    )
    found, other = adjusted.step(parts, 0), plain.step(parts, 0)
    even = dict.fromkeys((part.device for part in parts), 1.0)
    after, without = adjusted.finish(even), plain.finish(even)
    rest = server_model.keys() - split_model.entry
    assert rest
    assert bits({name: after[name] for name in rest}) == bits(
        {name: without[name] for name in rest}
    )
    assert found.losses == other.losses
    labels = sum(len(part.labels) for part in parts)
    moved = {name: torch.zeros_like(tensor) for name, tensor in server_model.items()}
    for part in parts:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in server_model.items()}
        values = part.features.values.clone().requires_grad_()
        entered = Features(values=values, mask=part.features.mask)
        rows = adjustments[part.device].expand(len(values), -1)
        split_model.server_forward(
            leaves, entered, part.labels, seed=None, adjustments=rows
        ).adjusted.mean().backward()
        # merged batches are padded further and summed in another order: as in the test of padding,
        # and back again
        allowed = 2 * 64 * 20 * EPS * values.grad.abs().max()
        assert bool((found.gradients[part.device].values - values.grad).abs().max() <= allowed)
        assert not torch.allclose(
            found.gradients[part.device].values, other.gradients[part.device].values
        )
        share = 1 / len(parts) if kind == "copies" else len(part.labels) / labels
        for name, leaf in leaves.items():
            moved[name] += share * leaf.grad
    for name in split_model.entry:
        expected = server_model[name] - 0.5 * moved[name]
        allowed = (
            2 * 64 * 20 * EPS * moved[name].abs().max() + 2 * EPS * server_model[name].abs().max()
        )
        assert bool((after[name] - expected).abs().max() <= allowed)
    assert any(not torch.equal(after[name], without[name]) for name in split_model.entry)


def test_with_one_device_all_strategies_are_one(task):
    split_model, _, (client_model, server_model) = split_model_and_weights(task.base, 1)
    (part, *_) = parts_of(task, split_model, client_model)
    servers = [
        MergedStep(split_model, server_model, ADAMW),
        InTurn(split_model, server_model, ADAMW),
        Copies(split_model, server_model, ADAMW, every_iteration=False),
        Copies(split_model, server_model, ADAMW, every_iteration=True),
    ]
    outcomes = [server.step([part], 0) for server in servers]
    found = {
        bits({name: tensor.float() for name, tensor in server.finish({"d0": 1.0}).items()})
        for server in servers
    }
    assert len(found) == 1
    assert len({bits(outcome.gradients["d0"]) for outcome in outcomes}) == 1


def test_copies_average_what_each_device_would_make_of_the_top(task):
    split_model, _, (client_model, server_model) = split_model_and_weights(task.base, 1)
    parts = parts_of(task, split_model, client_model)
    weights = {"d0": 3.0, "d1": 1.0, "d2": 2.0}
    alone = {}
    for part in parts:
        server = InTurn(split_model, server_model, SGD)
        for seed in range(2):
            server.step([part], seed)
        alone[part.device] = server.finish({})
    copies = Copies(split_model, server_model, SGD, every_iteration=False)
    for seed in range(2):
        copies.step(parts, seed)
    assert bits(copies.finish(weights)) == bits(
        average((weights[id], own) for id, own in alone.items())
    )


def test_a_loss_that_is_not_finite_leaves_the_iteration_to_the_others(task):
    split_model, _, (client_model, server_model) = split_model_and_weights(task.base, 1)
    parts = parts_of(task, split_model, client_model)
    huge = dataclasses.replace(
        parts[1],
        features=Features(values=parts[1].features.values * 1e30, mask=parts[1].features.mask),
    )
    for server in (MergedStep, InTurn):
        bad, without = (
            server(split_model, server_model, SGD),
            server(split_model, server_model, SGD),
        )
        outcome = bad.step([parts[0], huge], 0)
        assert (list(outcome.losses), list(outcome.left_out)) == (["d0"], ["d1"])
        without.step([parts[0]], 0)
        assert bits(bad.finish({})) == bits(without.finish({}))


def test_an_optimiser_is_taken_up_where_it_was_left(task):
    _, _, (_, server_model) = split_model_and_weights(task.base, 1)
    whole, halved = TrainableHalf(server_model, ADAMW), TrainableHalf(server_model, ADAMW)
    for step in range(4):
        for half in (whole, halved):
            for leaf in half.leaves:
                leaf.grad = torch.full_like(leaf, 0.1 * (step + 1))
            half.step()
        halved = TrainableHalf(halved.now(), ADAMW, moments=halved.moments())
    assert bits(whole.now()) == bits(halved.now())
    assert bits(whole.now()) != bits(server_model)


def test_settings_of_optimisers_that_cannot_work_are_refused():
    for changed, match in (
        ({"learning_rate": 0.0}, "positive"),
        ({"clip": -1.0}, "clip"),
        ({"weight_decay": -1.0}, "decay"),
    ):
        with pytest.raises(BadInput, match=match):
            check_optimising(dataclasses.replace(SGD, **changed))
    with pytest.raises(BadInput, match="choose sgd or adamw"):
        TrainableHalf({}, Optimising(kind="lion", learning_rate=1.0))
    assert [learning_rate_at(0.1, round, 4) for round in (0, 2)] == [0.1, 0.05]


def test_a_model_that_was_last_computed_in_part_is_still_whole(task):
    """What it is digested and exported as does not depend on what it did last."""
    base, data = task.base, task.train.take(np.arange(4))
    split_model = split_model_of(base, 1, rank=4)
    client_model, server_model = split_model.start(np.random.default_rng(0))
    base.fit(split_model.join(client_model, server_model))
    before, content = (
        merged_tensors(base, split_model.join(client_model, server_model)),
        content_sha256(base, None),
    )
    batch = data.batch(np.arange(4))
    split_model.server_forward(
        server_model,
        split_model.client_forward(client_model, batch, seed=None),
        batch["labels"],
        seed=None,
    )
    after = merged_tensors(base, split_model.join(client_model, server_model))
    assert content_sha256(base, None) == content
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- a round ---


def whole_round(
    bench,
    *,
    batches=(7, 4, 16, 9, 12),
    steps=3,
    optimising=ADAMW,
    precision="fp16",
    server=MergedStep,
    round=0,
):
    """Both halves after one round of all devices, and how it went."""
    base = bench.fleet.base
    split_model = split_model_of(base, 1, rank=4)
    client_model, server_model = split_model.start(np.random.default_rng(0))
    made = server(split_model, server_model, optimising)
    orders = {
        id: Begin(
            weights=client_model,
            cutting=Cutting(cut=1, rank=4),
            batch=batch,
            optimising=optimising,
            precision=precision,
        )
        for id, batch in zip(bench.ids, batches, strict=False)
    }
    bench.fleet.begin_round(round)
    result = run_round(bench.fleet, orders, steps, made, seed=5)
    return {"clients": result.client_models, "server": made.finish({})}, result


def without_graphs(bench):
    """The same bench, where every graph has to be computed again."""
    workshop = bench.workers._workshop
    bench.workers._workshop = dataclasses.replace(workshop, scratch=Scratch(most_bytes=0))
    return bench


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_graph_that_is_computed_again_gives_the_same_bits(lab, precision):
    kept, _ = whole_round(lab("kept"), precision=precision)
    again, _ = whole_round(without_graphs(lab("again")), precision=precision)
    assert bits(kept) == bits(again)


def pictures(rows=40):
    """A small net with batch norm and dropout, and noise to train it on."""
    rng = np.random.default_rng(0)
    data = Arrays(x=rng.normal(size=(rows, 3, 8, 8)).astype(np.float32), labels=np.arange(rows) % 3)
    net = Net("vgg-small", (3, 8, 8), 3)
    names = ("a", "b", "c")
    return Task(
        kind="array", base=net, train=data, test=data, label_names=names, max_tokens=1, rounds=2
    )


def test_it_does_so_with_batch_norm_and_dropout(tmp_path):
    results = []
    for name in ("kept", "again"):
        bench = Lab(pictures(), tmp_path / name, kinds=("tx2", "nx"))
        result, _ = whole_round(
            without_graphs(bench) if name == "again" else bench, optimising=SGD, steps=2
        )
        results.append(bits(result))
        bench.close()
    assert results[0] == results[1]
    assert split_model_of(Net("vgg-small", (3, 8, 8), 3), 1).statistics


def test_worker_processes_give_the_same_bits(lab):
    found = {bits(whole_round(lab(f"{count}", workers=count))[0]) for count in (0, 1, 2)}
    assert len(found) == 1


@message
class Whereabouts:
    process: int
    before: bool  # whether what the last ask kept is still there


@on_device
def whereabouts(device: Device, order: Step) -> Whereabouts:
    before = device.kept == device.id
    device.keep(device.id, 1)
    device.memory["asked"] = device.memory.get("asked", 0) + 1
    return Whereabouts(process=os.getpid(), before=before)


def test_a_device_goes_on_where_its_work_was_left(lab):
    bench = lab(workers=2)
    asked = [
        {
            r.device: r.value
            for r in bench.fleet.ask(whereabouts, dict.fromkeys(bench.ids, Step(gradient=None)))
        }
        for _ in range(3)
    ]
    for id in bench.ids:
        assert [said[id].before for said in asked] == [False, True, True]
        assert len({said[id].process for said in asked}) == 1
    bench.fleet.begin_round(1)
    (reply, *_) = bench.fleet.ask(whereabouts, dict.fromkeys(bench.ids, Step(gradient=None)))
    assert not reply.value.before


def test_what_is_kept_counts_only_for_the_memory_it_belongs_to():
    scratch = Scratch(most_bytes=10)

    def taken(memory=b"m", round=0):
        return scratch.take("d", memory, round)

    assert taken() is None
    assert not scratch.put("d", b"m", {}, Kept("too much", 11))
    assert scratch.put("d", b"m", {"x": 1}, Kept("graph", 10))
    assert not scratch.put("e", b"m", {}, Kept("no room", 1))
    assert taken() == ({"x": 1}, "graph")
    assert taken() is None  # once
    for other in ({"memory": b"another"}, {"round": 1}):
        # what was taken or is of no use makes room
        assert scratch.put("d", b"m", {}, Kept("graph", 10))
        assert taken(**other) is None


def test_memories_are_written_when_a_round_is_saved(lab):
    bench = lab()
    bench.fleet.begin_round(0)
    bench.fleet.ask(whereabouts, dict.fromkeys(bench.ids[:2], Step(gradient=None)))
    folder = bench.store._folder
    assert not list(folder.glob("memory-*"))
    files = dict(bench.fleet.memories)
    assert {path.name for path in folder.glob("memory-*")} == set(files.values())
    assert set(files) == set(bench.ids[:2])


def test_a_device_that_vanishes_leaves_the_merge_and_is_not_asked_again(lab):
    bench, spies = lab("vanishing"), []

    class Vanishing(Spy):
        """Keeps the second device's second features back."""

        def ask(self, work, orders, **limits):
            replies = super().ask(work, orders, **limits)
            return [
                reply for reply in replies if not (reply.device == gone and work.__name__ == "step")
            ]

    gone, fleet = bench.ids[1], bench.fleet
    bench.fleet.begin_round(0)
    bench.fleet = spies = Vanishing(fleet)
    spies.begin_round = fleet.begin_round
    _, result = whole_round(bench)
    bench.fleet = fleet
    works = [row["work"] for row in bench.rows("exchange") if row["device"] == gone]
    assert works == ["begin", "step"]  # both are paid for
    assert set(result.client_models) == set(bench.ids) - {gone}
    assert all(len(progress.losses) == 3 for progress in result.progress.values())
    assert sum(row["bytes_up"] for row in bench.rows("exchange") if row["device"] == gone) > 0


def test_when_all_vanish_the_round_ends_in_so_many_words(lab):
    bench = lab()
    split_model = split_model_of(bench.fleet.base, 1, rank=4)
    client_model, server_model = split_model.start(np.random.default_rng(0))
    order = Begin(
        weights=client_model,
        cutting=Cutting(cut=1, rank=4),
        batch=2,
        optimising=SGD,
        precision="fp32",
    )
    silent = Spy(bench.fleet, reply=lambda reply: None)
    with pytest.raises(AllLost, match="of 5 devices asked, 0 replied"):
        run_round(
            silent,
            dict.fromkeys(bench.ids, order),
            2,
            MergedStep(split_model, server_model, SGD),
            seed=0,
        )


def body_bytes(value):
    """Bytes of a packed message without its header."""
    payload = pack(value).payload
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


@pytest.mark.parametrize(("precision", "number"), [("fp32", 4), ("fp16", 2)])
def test_the_ledger_is_what_one_computes_by_hand(lab, precision, number):
    bench = lab()
    spy = Spy(bench.fleet)
    steps, batch, width = 2, 6, 32
    split_model = split_model_of(bench.fleet.base, 1, rank=4)
    client_model, server_model = split_model.start(np.random.default_rng(0))
    weights = (
        client_model
        if number == 4
        else {name: tensor.half() for name, tensor in client_model.items()}
    )
    order = Begin(
        weights=weights,
        cutting=Cutting(cut=1, rank=4),
        batch=batch,
        optimising=SGD,
        precision=precision,
    )
    id = bench.ids[0]
    run_round(spy, {id: order}, steps, MergedStep(split_model, server_model, SGD), seed=0)

    # per block: query, key, value and output of 32 x 32, up and down of 32 x 64, each with A and B
    # of rank 4
    adapter = 4 * (4 * (32 + 32) + 2 * (32 + 64)) * number
    seed = int(np.random.default_rng((0, 0, 0)).integers(2**31))
    data = bench.task.train.take(bench.shares[0])
    rows = [rows_at(len(data), batch, seed, iteration) for iteration in range(steps)]
    tokens = [int(data.lengths[chosen].sum()) for chosen in rows]
    masks = [-(-batch * data.width(chosen) // 8) for chosen in rows]  # bits
    scale = 4 if number == 2 else 0
    down = [adapter] + [width * number * count + scale for count in tokens]
    up = [
        width * number * count + scale + mask + 2 * batch
        for count, mask in zip(tokens, masks, strict=True)
    ] + [adapter]
    assert [body_bytes(order) for _, order in spy.orders] == down
    assert [body_bytes(result) for _, result in spy.results] == up


def test_gradients_of_a_device_are_for_the_batch_it_sent(lab, task):
    """The last exchange moves the client model by the rate times the gradient of what was sent
    before.
    """
    split_model = split_model_of(task.base, 1, rank=4)
    client_model, _ = split_model.start(np.random.default_rng(0))
    data = task.train.take(np.arange(20))
    order = Begin(
        weights=client_model,
        cutting=Cutting(cut=1, rank=4),
        batch=5,
        optimising=SGD,
        precision="fp32",
    )
    device = Device(id="d", data=data, base=task.base, memory={}, rng=np.random.default_rng(3))
    sent = unwired(begin(device, order).features)
    rows = rows_at(20, 5, device.memory[HELD].seed, 0)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in client_model.items()}
    features = split_model.client_forward(leaves, data.batch(rows), seed=None)
    assert torch.equal(features.values.detach() * sent.mask[:, :, None], sent.values)
    gradient = torch.ones_like(features.values) * sent.mask[:, :, None]
    features.values.backward(gradient)
    back = gradient_wired(Features(values=gradient, mask=sent.mask), "fp32")
    after = ended(device, Step(gradient=back))
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            after.weights[name], leaf.detach() - 0.5 * leaf.grad, rtol=4 * EPS, atol=0
        )
    assert any(
        leaf.grad.abs().max() > 0
        for name, leaf in leaves.items()
        if name == b_name(name.removesuffix(".lora_B"))
    )
    assert device.memory == {}


def test_serving_without_scratch_is_the_same(task):
    split_model = split_model_of(task.base, 1, rank=4)
    client_model, _ = split_model.start(np.random.default_rng(0))
    order = Begin(
        weights=client_model,
        cutting=Cutting(cut=1, rank=4),
        batch=5,
        optimising=SGD,
        precision="fp32",
    )
    call = Call(
        device="d",
        index=0,
        work="fedspine.split.device:begin",
        order=pack(order).payload,
        memory=None,
        seed=(0, 0, 0),
    )
    data, scratch = task.train.take(np.arange(20)), Scratch()
    kept, plain = serve(call, task.base, data, scratch=scratch), serve(call, task.base, data)
    assert (kept.kept, plain.kept) == (True, False)
    assert (kept.result, kept.memory) == (plain.result, plain.memory)
