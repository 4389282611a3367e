"""What blocks keep for the backward pass in a few bits: the numbers, the gradient, the bytes."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_models import model_on
from toy import toy_task

from fedspine.lm.cost import Extent, quantising_flops, training_flops, training_memory_bytes
from fedspine.lm.load import load
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.stored import GROUP, Codes, Quantised, Stored, bits_each
from fedspine.lm.structure import full
from fedspine.lm.trainable_stack import TrainableStack
from fedspine.lm.tune import losses_of


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, GROUP - 1, GROUP, 5 * GROUP + 3])
def test_a_number_is_off_by_half_a_step_at_most(bits, size):
    numbers = torch.from_numpy(np.random.default_rng(size).normal(0, 3, size).astype(np.float32))
    codes = Codes.of(numbers, bits)
    back = codes.numbers()
    assert back.shape == numbers.shape
    for start in range(0, size, GROUP):
        group, found = numbers[start : start + GROUP], back[start : start + GROUP]
        step = float(group.max() - group.min()) / (2**bits - 1)
        # and what rounding in fp32 adds: a few units in the last place of the largest
        assert float((found - group).abs().max()) <= step / 2 + 4 * 2**-24 * float(
            group.abs().max()
        )
    groups = -(-size // GROUP)
    assert codes.bytes == groups * GROUP * bits_each(bits) / 8


def test_equal_numbers_and_those_of_a_few_values_come_back_as_they_were():
    for numbers in (torch.zeros(200), torch.full((3,), 7.5), torch.arange(16.0).repeat(20)):
        assert torch.equal(Codes.of(numbers, 4).numbers(), numbers)


@pytest.fixture(scope="module", params=["bert", "llama"])
def passes(request, tiny_folder):
    """A loss and the gradient of the adapter without, at 8 and at 4 bits; and what was stored."""
    base, tokenizer = load(str(tiny_folder(request.param)), kind="classification", classes=3)
    inputs = toy_task(base, tokenizer, rounds=1).train.batch(np.arange(16))
    model, found = model_on(base, rank=4), {}
    for bits in (None, 8, 4):
        stack = TrainableStack(base, [model])
        module = stack.fit()
        how = nullcontext() if bits is None else Stored(base, Quantised((0, 1), bits))
        with how as stored:
            loss = losses_of(module, inputs, 1).sum()
            loss.backward()
        gradient = torch.cat([tensor.grad.flatten() for tensor in stack.adapter.values()])
        found[bits] = (float(loss.detach()), gradient, stored)
    return base, inputs, model, found


def test_the_forward_pass_is_exact_and_the_gradient_is_nearly(passes):
    *_, found = passes
    loss, exact, _ = found[None]
    assert found[8][0] == found[4][0] == loss
    off = {bits: float((found[bits][1] - exact).norm() / exact.norm()) for bits in (4, 8)}
    # an error is in proportion to the step, which is 255 / 15 = 17 times as large
    assert 17 / 2 < off[4] / off[8] < 17 * 2
    # a group spans about 6 standard deviations, of which 255 steps, uniformly off within one each,
    # are 6 / 255 / sqrt(12) = 0.7 %; what two blocks of seven products store adds up to 2.5 %
    assert 0 < off[8] < math.sqrt(14) * 6 / 255 / math.sqrt(12)


def test_bytes_are_those_of_the_bits(passes):
    *_, found = passes
    for bits in (4, 8):
        stored = found[bits][2]
        # fp32 before; each kind of tensor here is a whole number of groups
        assert stored.bytes == stored.whole_bytes * bits_each(bits) / 32
    assert found[4][2].whole_bytes == found[8][2].whole_bytes > 0


def test_only_the_named_blocks_are_quantised_and_nothing_stays_behind(passes):
    base, inputs, model, found = passes
    bytes = 0
    for block in (0, 1):
        stack = TrainableStack(base, [model])
        module = stack.fit()
        with Stored(base, Quantised((block,), 4)) as stored:
            losses_of(module, inputs, 1).sum().backward()
        assert 0 < stored.bytes < found[4][2].bytes
        bytes += stored.bytes
    assert bytes == found[4][2].bytes
    again = TrainableStack(base, [model])
    losses_of(again.fit(), inputs, 1).sum().backward()
    gradient = torch.cat([tensor.grad.flatten() for tensor in again.adapter.values()])
    assert torch.equal(gradient, found[None][1])


def test_costs_by_hand(passes):
    base = passes[0]
    layout: PrunableLayout = base.layout
    sizes = {"rank": 4, "embeddings": 0, "batch": 2, "tokens": 8, "first": 0}

    def bytes(quantised, bits):
        return training_memory_bytes(
            layout, full(layout), quantised=quantised, bits=bits_each(bits), **sizes
        )

    whole = training_memory_bytes(layout, full(layout), **sizes)
    block = whole - training_memory_bytes(layout, full(layout), **sizes | {"first": 1})
    adapter = 16 * 4 * sum(s.rows + s.columns for s in layout.sites if s.layer == 0)
    block -= adapter
    # one of two: its codes and the whole other block; both: one is whole while it is computed
    assert whole - bytes(1, 4) == pytest.approx(block * (1 - 4.5 / 16), abs=1)
    assert whole - bytes(2, 8) == pytest.approx(block * (1 - 8.5 / 16), abs=1)
    assert bytes(0, 4) == whole
    extent = Extent(tokens=16, squared_tokens=128)
    numbers = (16 * layout.width * 34 + 5 * 128 * layout.query_heads) / 2
    assert quantising_flops(layout, full(layout), extent, 2) == 2 * 8 * numbers
    assert quantising_flops(layout, full(layout), extent, 2) < training_flops(
        layout, full(layout), 4, extent
    )
