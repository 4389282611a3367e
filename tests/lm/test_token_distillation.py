"""Teachers of language models: what they say of each token, which tokens count, what holding that
costs, and what a device without a teacher of its own takes.
"""

import dataclasses

import numpy as np
import pytest
import torch
from test_held import device_on
from tiny_models import model_on
from tolerances import TINY
from toy import Lab, Spy, bits, toy_task

from fedspine.core.task import IGNORED
from fedspine.core.tensors import half
from fedspine.lm.cost import Extent, forward_flops, taught_states_bytes
from fedspine.lm.distillation import DenseTeacher, Taught, Teaching, TokenOutputs, teacher_outputs
from fedspine.lm.structure import cut_adapter
from fedspine.lm.tune import Request, train, tune
from fedspine.lm.tuning import Tuning
from fedspine.methods.loraprune import LoraPrune
from fedspine.pruning.device import _teacher_for

TUNING = Tuning(steps=6, batch=8, learning_rate=5e-3)
TEACHING = Teaching(temperature=2.0, weight=0.5, hidden=0.0, own=False)


@pytest.fixture(scope="module")
def language(decoder):
    """Continuing the toy texts on a tiny Llama."""
    return toy_task(*decoder, rounds=5, kind="causal-lm")


@pytest.fixture(scope="module")
def teacher(language):
    return model_on(language.base)


@pytest.fixture(scope="module")
def student(language, teacher):
    """Half of the teacher's heads and channels, and its adapter's part there."""
    base = language.base
    layers, heads, channels = base.layout.layers, base.layout.heads, base.layout.channels
    pruned = model_on(base, heads=[heads // 2] * layers, channels=[channels // 2] * layers)
    adapter = cut_adapter(teacher.adapter, base.layout.sites, pruned.structure)
    return dataclasses.replace(pruned, adapter=adapter)


def answers(base, model, data, rows):
    """Logits [rows, tokens, vocabulary] and labels [rows, tokens]."""
    inputs = data.batch(rows)
    labels = inputs.pop("labels")
    with torch.no_grad():
        return base.fit(model)(**inputs).logits, labels


def apart(base, data, teacher, student, rows, temperature):
    """temperature^2 KL(teacher || student), the mean over the tokens that are predicted, in a loop
    over single tokens.
    """
    taught, labels = answers(base, teacher, data, rows)
    said, _ = answers(base, student, data, rows)
    each = []
    for row, token in np.ndindex(labels.shape[0], labels.shape[1] - 1):
        if labels[row, token + 1] != IGNORED:
            p = torch.softmax(taught[row, token].double() / temperature, -1)
            q = torch.softmax(said[row, token].double() / temperature, -1)
            each.append(float((p * (p / q).log()).sum()))
    return temperature**2 * float(np.mean(each))


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "some tokens"])
def test_a_teacher_says_what_it_would_say_of_each_token(language, teacher, student, masked):
    device, base = device_on(language), language.base
    if masked:  # as with answers to prompts: most tokens are read and not learnt
        counted = np.random.default_rng(0).random(len(device.data.ids)) < 0.3
        counted[device.data.offsets[:-1]] = False
        counted[device.data.offsets[3] : device.data.offsets[4]] = False  # a row with none
        device = dataclasses.replace(device, data=dataclasses.replace(device.data, counted=counted))
    plan, rows = [np.array([5, 3, 5]), np.array([0, 59, 3])], np.array([59, 3, 5])
    found = teacher_outputs(device, Taught(teacher, TEACHING), plan)
    assert isinstance(found, TokenOutputs)
    assert len(found.states) == device.data.lengths[[0, 3, 5, 59]].sum()  # each row once, unpadded
    logits, labels = answers(base, student, device.data, rows)
    expected = apart(base, device.data, teacher, student, rows, 2.0)
    # the teacher's adapter is merged into its weights, and rows are padded otherwise: rounding. At
    # temperature t a distance is t^2 times that of logits / t, which moves by at most what each of
    # the two moves by.
    off = 2.0 * 2 * TINY * float(logits.abs().max())
    assert float(found.distance(logits, labels, rows, 2.0)) == pytest.approx(expected, abs=off)
    if masked:
        none = np.array([3])
        logits, labels = answers(base, student, device.data, none)
        assert float(found.distance(logits, labels, none, 2.0)) == 0


def test_its_pass_and_what_it_leaves_are_charged(language, teacher, student):
    layout, plain = language.base.layout, device_on(language)
    rows = np.arange(4)
    device = device_on(language)
    teacher_outputs(device, Taught(teacher, TEACHING), [rows])
    width = device.data.take(rows).width(rows)
    extent = Extent(tokens=4 * width, squared_tokens=4 * width**2)
    adapter = 3 * sum(site.rows + site.columns for site in layout.sites)
    assert device.flops == forward_flops(layout, extent) + 2 * adapter * extent.tokens
    taught = device_on(language)
    large = dataclasses.replace(TUNING, steps=1, batch=48)  # takes more than the teacher's pass
    tune(plain, student, large)
    tune(taught, student, large, taught=Taught(teacher, TEACHING))
    tokens = 48 * int(taught.data.lengths.max())
    held = taught_states_bytes(layout, min(tokens, len(taught.data.ids)))
    assert taught.peak_memory_bytes - plain.peak_memory_bytes == held > 0


def test_a_student_comes_nearer_to_its_teacher(language, teacher, student):
    found = {}
    for weight, hidden in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        device = device_on(language)
        how = dataclasses.replace(TEACHING, weight=weight, hidden=hidden)
        model = tune(device, student, TUNING, taught=Taught(teacher, how)).model
        rows = np.arange(20)
        found[weight, hidden] = apart(language.base, device.data, teacher, model, rows, 2.0)
    assert found[1.0, 0.0] < found[0.0, 0.0]
    assert found[1.0, 1.0] != found[1.0, 0.0]


def test_a_teacher_without_weight_changes_no_bit(language, teacher, student):
    unheard = Taught(teacher, dataclasses.replace(TEACHING, weight=0.0))
    alone = tune(device_on(language), student, TUNING)
    found = tune(device_on(language), student, TUNING, taught=unheard)
    assert bits(found.model) == bits(alone.model) and found.loss == alone.loss


def test_students_in_one_pass_have_their_own_teachers(language, teacher, student):
    """One step from the same weights: each one's adapter moves as it does alone."""
    tuning = dataclasses.replace(TUNING, steps=1)
    teaching = dataclasses.replace(TEACHING, weight=1.0)
    teachers = [teacher, model_on(language.base, seed=3)]

    def device(i):
        return device_on(language, seed=i)

    taught = [Taught(each, teaching) for each in teachers]
    together = train([Request(device(i), student, tuning, taught=taught[i]) for i in (0, 1)])
    swapped = tune(device(0), student, tuning, taught=taught[1]).model.adapter
    for i in (0, 1):
        alone = tune(device(i), student, tuning, taught=taught[i]).model.adapter

        def off(adapter, alone=alone):
            return sum(float((t - alone[name]).square().sum()) for name, t in adapter.items())

        moved = off(student.adapter)
        # as in test_together: rounding makes up 1 % of the change, another device's rows all of it
        assert off(together[i].model.adapter) < 0.05**2 * moved
        if i == 0:  # which would be seen
            assert off(swapped) > 0.5**2 * moved


def test_who_teaches_a_language_model(language, tmp_path, teacher):
    """In round 0 devices are whole, in round 1 they prune; one that has no model of its own from
    before is taught by what came, or by the base alone.
    """
    DenseTeacher().check(language)
    method = dataclasses.replace(
        LoraPrune.toy(), steps=2, warmup=0.0, until=0.4, teacher=DenseTeacher(adapter="own")
    )
    bench, sent = Lab(language, tmp_path / "lab", kinds=("nx", "agx")), []
    state = bench.run(method, rounds=2, around=lambda f: sent.append(Spy(f)) or sent[-1])
    bench.close()
    assert all(not bool(structure.channels.all()) for structure in state.structures.values())
    order = sent[-1].orders[-1][1]
    assert order.teaching.own and order.sparsity > 0
    held = _teacher_for(device_on(language, {"teacher": teacher}), order)
    assert held is not None and held.teacher is teacher
    none = _teacher_for(device_on(language), order)
    assert none is not None and none.teacher.adapter == {}
    assert bool(none.teacher.structure.channels.all())
    current = dataclasses.replace(order, teaching=dataclasses.replace(order.teaching, own=False))
    came = _teacher_for(device_on(language, {"teacher": teacher}), current)
    assert came is not None and bits(half(came.teacher.adapter)) == bits(order.adapter)
