"""Local training: LoRA's own gradients against autograd, determinism, and its stated cost."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP32, TINY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import bits, toy_task

from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.fleets.hardware import Hardware
from fedspine.lm.base import Model
from fedspine.lm.cost import Extent, adapter_width, training_flops, training_memory_bytes
from fedspine.lm.lora import AdaptedLinear, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.score import score
from fedspine.lm.structure import Structure, full, shrink, sparsity
from fedspine.lm.tune import batches, losses_of, tune
from fedspine.lm.tuning import Tuning, check_tuning, tuning_at
from fedspine.methods.fedlora import FedLora

MIB = 2**20
ROBERTA = PrunableLayout(
    architecture="roberta",
    prefix="roberta",
    layers=12,
    heads=12,
    channels=3072,
    width=768,
    query_heads=12,
    head_dim=64,
)
ROBERTA_EMBEDDINGS = 50_265 * 768 + 514 * 768 + 768 + 2 * 768  # words, positions, segment, norm


def cut_to(layout, target):
    if not target:
        return full(layout)
    rng = np.random.default_rng(0)
    scores = tuple(
        torch.from_numpy(rng.random((layout.layers, units)).astype(np.float32))
        for units in (layout.heads, layout.channels)
    )
    return shrink(layout, full(layout), scores, sparsity=target, target=target)


def model_on(base, rank=4, seed=0):
    rng = np.random.default_rng(seed)
    layout = base.layout
    return Model(
        structure=full(layout),
        adapter=fresh(layout.sites, rank, rng),
        head=base.initial_head(rng),
        scale=2.0,
    )


def device_on(task, seed=0):
    return Device(
        id="d", data=task.train, base=task.base, memory={}, rng=np.random.default_rng(seed)
    )


# the adapted layer


def layer_case(dtype, scale=1.7, tokens=9, rows=6, columns=10, rank=3):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    weight, bias = normal(rows, columns).to(dtype), normal(rows).to(dtype)
    x, out = normal(2, tokens, columns).to(dtype), normal(2, tokens, rows).to(dtype)
    return x, out, weight, bias, normal(rank, columns), normal(rows, rank), scale


def gradients(layer, x, direction, a, b):
    """The layer's output, and the gradients of its product with `direction` in x, A and B."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    out = layer(*leaves)
    out.backward(direction)
    return out.detach(), *(leaf.grad for leaf in leaves)


def plain(weight, bias, scale):
    return lambda x, a, b: nn.functional.linear(x, weight, bias) + scale * (x @ a.T) @ b.T


def ours(weight, bias, scale):
    def layer(x, a, b):
        adapted = AdaptedLinear(weight, bias)
        adapted.put(weight, bias, a, b, scale)
        return adapted(x)

    return layer


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_adapted_layer_is_autograd_in_fp32(with_bias):
    x, direction, weight, bias, a, b, scale = layer_case(torch.float32)
    bias = bias if with_bias else None
    first = gradients(ours(weight, bias, scale), x, direction, a, b)
    second = gradients(plain(weight, bias, scale), x, direction, a, b)
    for mine, theirs in zip(first, second, strict=True):
        # fewer sums than in a tiny model
        torch.testing.assert_close(mine, theirs, rtol=TINY, atol=TINY)


def test_the_adapted_layer_is_autograd_in_bf16():
    # Against plain autograd in doubles. bf16 rounds by 2^-8 of a value at most. A, scale * B, the
    # narrow product, the wide product and the sum are rounded once each: at most six roundings of
    # any term, so the error is below 6 * 2^-8 of the same expression in absolute values
    # (accumulation in fp32 is finer by far).
    x, direction, weight, bias, a, b, scale = layer_case(torch.bfloat16)
    found = gradients(ours(weight, bias, scale), x, direction, a, b)
    exact = [tensor.double() for tensor in (x, direction, weight, bias, a, b)]
    expected = gradients(plain(exact[2], exact[3], scale), exact[0], exact[1], exact[4], exact[5])
    size = [tensor.abs() for tensor in exact]
    bounds = gradients(plain(size[2], size[3], scale), size[0], size[1], size[4], size[5])
    for mine, theirs, bound in zip(found, expected, bounds, strict=True):
        assert bool(((mine.double() - theirs).abs() <= 6 * 2**-8 * bound).all())
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_a_layer_without_adapter_is_linear():
    x, _, weight, bias, *_ = layer_case(torch.float32)
    assert torch.equal(AdaptedLinear(weight, bias)(x), nn.functional.linear(x, weight, bias))


# training


def test_same_seed_same_bits_and_another_seed_others(task):
    tuning = Tuning(steps=4, batch=8, learning_rate=1e-2)
    first, second, other = (
        tune(device_on(task, seed), model_on(task.base), tuning) for seed in (0, 0, 1)
    )
    assert bits(first.model) == bits(second.model)
    assert first.loss == second.loss
    assert bits(first.model) != bits(other.model)


def test_training_leaves_the_given_model_alone(task):
    model = model_on(task.base)
    before = bits(model)
    tune(device_on(task), model, Tuning(steps=2, batch=8, learning_rate=1e-2))
    assert bits(model) == before
    assert not any(
        tensor.requires_grad for tensor in (*model.adapter.values(), *model.head.values())
    )


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_training_lowers_the_loss(task, decoder, kind):
    task = task if kind == "classification" else toy_task(*decoder, rounds=1, kind=kind)
    model = model_on(task.base)
    trace = tune(device_on(task), model, Tuning(steps=30, batch=16, learning_rate=1e-2))
    before, after = (score(task.base, each, task.test).mean_loss for each in (model, trace.model))
    # for classes: below ln 3, what guessing costs; for tokens: the texts' words alone leave few of
    # 101 tokens
    assert after < min(before, math.log(3) if kind == "classification" else math.log(101))


def test_a_loss_that_is_not_finite_ends_training(task):
    model = model_on(task.base)
    name = next(iter(model.head))
    broken = dataclasses.replace(
        model, head=model.head | {name: torch.full_like(model.head[name], math.nan)}
    )
    device = device_on(task)
    trace = tune(device, broken, Tuning(steps=7, batch=8, learning_rate=1e-2))
    assert math.isnan(trace.loss)
    assert device.samples == 8  # of one step
    assert device.launches == task.base.layout.layers


def test_padding_is_no_token_to_predict(decoder):
    task = toy_task(*decoder, rounds=1, kind="causal-lm")
    module = task.base.fit(model_on(task.base))
    order = np.argsort(task.test.lengths)
    short, long = int(order[0]), int(order[-1])
    alone = [
        losses_of(module, task.test.batch([row]), 1) * (task.test.lengths[row] - 1)
        for row in (short, long)
    ]
    together = (
        losses_of(module, task.test.batch([short, long]), 1)
        * (task.test.lengths[[short, long]] - 1).sum()
    )
    torch.testing.assert_close(together, sum(alone), rtol=TINY, atol=0)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_batches_are_whole_passes(task, rows, steps, size, seed):
    data = task.train.take(np.arange(rows))
    tuning = Tuning(steps=steps, batch=size, learning_rate=1.0)
    drawn = list(batches(data, tuning, np.random.default_rng(seed)))
    assert [len(batch) for batch in drawn] == [size] * steps
    times = np.bincount(np.concatenate(drawn), minlength=rows)
    assert times.sum() == steps * size
    assert times.max() - times.min() <= 1


def test_the_learning_rates_fall_linearly():
    method = FedLora(learning_rate=0.8, head_lr_multiplier=0.5)
    tunings = [tuning_at(method, round, 4) for round in range(4)]
    assert [tuning.learning_rate for tuning in tunings] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [tuning.head_learning_rate for tuning in tunings] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_head_learns_at_its_own_rate(task):
    # the first step of AdamW is the learning rate in size, whatever the gradient; decay off. It is
    # the difference of two weights below 1, each rounded to fp32.
    model = model_on(task.base)
    tuning = Tuning(
        steps=1, batch=16, learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.0
    )
    tuned = tune(device_on(task), model, tuning).model

    def steps(before, after):
        return torch.stack([(after[name] - before[name]).abs().max() for name in before])

    assert float(steps(model.head, tuned.head).max()) == pytest.approx(1e-2, abs=2 * FP32)
    assert float(steps(model.adapter, tuned.adapter).max()) == pytest.approx(1e-3, abs=2 * FP32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("learning_rate", 0.0),
        ("head_lr_multiplier", 0.0),
        ("weight_decay", -0.1),
    ],
)
def test_settings_that_cannot_work_are_refused(field, value):
    with pytest.raises(BadInput, match=f"method.{field} is {value}"):
        check_tuning(dataclasses.replace(FedLora(), **{field: value}))


# what it costs


def test_accounted_operations_are_those_that_run(task):
    device, model, rank, batch = device_on(task), model_on(task.base), 4, 8

    def addmm(
        out, left, right, **_
    ):  # shapes; torch counts this product only where it is not in place
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        tune(device, model, Tuning(steps=1, batch=batch, learning_rate=1e-2))
    rows = next(
        batches(
            task.train, Tuning(steps=1, batch=batch, learning_rate=1.0), np.random.default_rng(0)
        )
    )
    tokens = task.train.batch(rows)["input_ids"].numel()
    # The estimate leaves out the head: pooler 32x32 and classifier 3x32, 6 operations a weight on
    # one token of a row. It counts gradients that nobody asks for: those of the embeddings, through
    # q, k and v of the first layer.
    head = 6 * batch * (32 * 32 + 3 * 32)
    unasked = tokens * 3 * (2 * 32 * 32 + 2 * rank * 32)
    assert counter.get_total_flops() == device.flops + head - unasked


def test_operations_follow_the_specification():
    # K*B*(L*(4*P_blk*(1-s) + 6*r*sum(|O|+|I|)) + n_layer*12*L^2*d*(1-s)), 20 steps of 32 rows of
    # 128 tokens
    rows, length = 20 * 32, 128
    extent = Extent(tokens=rows * length, squared_tokens=rows * length**2)
    dense = training_flops(ROBERTA, full(ROBERTA), 16, extent)
    assert dense == rows * (
        length * (4 * 12 * 7_077_888 + 6 * 16 * 12 * 13_824) + 12 * 12 * length**2 * 768
    )
    half = training_flops(ROBERTA, cut_to(ROBERTA, 0.5), 16, extent)
    # half of the rows of q, k, v and fc1, of the columns of o and fc2
    sides = 12 * (4 * (384 + 768) + 2 * (1536 + 768))
    assert half == rows * (length * (4 * 6 * 7_077_888 + 6 * 16 * sides) + 12 * 6 * length**2 * 768)


def test_roberta_in_the_specification():
    assert ROBERTA.shape.parameters == 7_077_888
    assert ROBERTA.shape.head_parameters == 196_608
    assert ROBERTA.shape.channel_parameters == 1_536
    assert adapter_width(ROBERTA, full(ROBERTA)) == 12 * 13_824
    assert pytest.approx(39e6, rel=0.01) == ROBERTA_EMBEDDINGS


@pytest.mark.parametrize(("target", "expected"), [(0.0, 1_862), (0.3, 1_440), (0.5, 1_159)])
def test_memory_is_that_of_the_specification(target, expected):
    # The table there counts the head's 768x768 layer with the embeddings and takes 1 - s/2 of the
    # adapter where the slices leave less. With these two put right it must agree to its rounding of
    # half a MiB, and to what the grain of whole channels shifts.
    structure, rank = cut_to(ROBERTA, target), 16
    ours = training_memory_bytes(
        ROBERTA, structure, rank=rank, embeddings=ROBERTA_EMBEDDINGS, batch=32, tokens=128
    )
    head = 2 * (768 * 768 + 768)
    adapter = 16 * rank * ((1 - target / 2) * 12 * 13_824 - adapter_width(ROBERTA, structure))
    grain = abs(sparsity(ROBERTA, structure) - target) * (1_862 - 1_159) / 0.5
    assert (ours + head + adapter) / MIB == pytest.approx(expected, abs=0.5 + grain)


@pytest.mark.parametrize("device", range(3))
def test_time_falls_with_sparsity_and_grows_with_rank(device):
    fleet = Hardware(seed=device, kinds=("tx2", "nx", "agx"))
    extent = Extent(tokens=20 * 32 * 128, squared_tokens=20 * 32 * 128**2)

    def seconds(target, rank):
        structure = cut_to(ROBERTA, target)
        wire = 2 * rank * adapter_width(ROBERTA, structure)
        flops = training_flops(ROBERTA, structure, rank, extent)
        return fleet.seconds(
            device, round=0, ask=0, flops=flops, launches=240, bytes_down=wire, bytes_up=wire
        ).total

    by_sparsity = [seconds(target, 16) for target in (0.0, 0.1, 0.3, 0.5, 0.7)]
    assert by_sparsity == sorted(by_sparsity, reverse=True)
    assert len(set(by_sparsity)) == 5
    by_rank = [seconds(0.3, rank) for rank in (4, 8, 16, 32)]
    assert by_rank == sorted(by_rank)
    assert len(set(by_rank)) == 4


def test_memory_grows_with_rank_and_falls_with_sparsity():
    def needed(structure: Structure, rank: int) -> int:
        return training_memory_bytes(
            ROBERTA, structure, rank=rank, embeddings=0, batch=32, tokens=128
        )

    assert needed(full(ROBERTA), 32) - needed(full(ROBERTA), 16) == 16 * 16 * 12 * 13_824
    assert (
        needed(cut_to(ROBERTA, 0.5), 16)
        < needed(cut_to(ROBERTA, 0.3), 16)
        < needed(full(ROBERTA), 16)
    )
