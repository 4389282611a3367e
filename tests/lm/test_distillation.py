"""Recovery by distillation: the distances by hand, what a teacher says and costs, and what its
student comes to.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_held import device_on
from tiny_models import model_on
from tolerances import TINY
from toy import Spy, bits

from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.core.tensors import half
from fedspine.execution.together import _kind
from fedspine.lm.cost import Extent, forward_flops
from fedspine.lm.distillation import (
    DenseTeacher,
    NoTeacher,
    Taught,
    Teaching,
    distances,
    hidden_distances,
    teacher_outputs,
)
from fedspine.lm.structure import cut_adapter, widen_adapter
from fedspine.lm.tune import Request, train, tune
from fedspine.lm.tuning import Tuning
from fedspine.methods import all_methods
from fedspine.methods.fedlora import FedLora
from fedspine.pruning.device import TaughtOrder

TUNING = Tuning(steps=6, batch=8, learning_rate=5e-3)
TEACHING = Teaching(temperature=2.0, weight=0.5, hidden=0.0, own=False)


def student_of(base):
    """Half of the heads and channels of the teacher, and its adapter's part there."""
    pruned = model_on(base, heads=[2] * base.layout.layers, channels=[30] * base.layout.layers)
    return dataclasses.replace(
        pruned, adapter=cut_adapter(teacher_of(base).adapter, base.layout.sites, pruned.structure)
    )


def teacher_of(base):
    return model_on(base)


def logits_of(base, model, data):
    inputs = data.batch(np.arange(len(data)))
    inputs.pop("labels")
    with torch.no_grad():
        return base.fit(model)(**inputs).logits


def test_the_distance_of_answers_by_hand():
    student, teacher = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    # 3 : 1 against 1 : 1, and a second row without a difference; in fp32 terms of 0.30 and -0.17
    # are added up to 0.13, so four roundings of 2^-24 are 1e-6 of it
    apart = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(distances(student, teacher, 1.0, 1)) == pytest.approx(apart / 2, rel=1e-6)
    assert distances(student, teacher, 1.0, 2).tolist() == pytest.approx([apart, 0.0], rel=1e-6)
    # at temperature 2 the same answers are those of logits twice as large, times 2^2
    twice = distances(student, 2 * teacher, 2.0, 1)
    assert float(twice) == pytest.approx(4 * apart / 2, rel=1e-6)


def test_the_distance_of_hidden_states_by_hand():
    states, taught = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])
    assert hidden_distances(states, taught, 2).tolist() == [5.0, 2.0]


def test_a_widened_adapter_is_cut_to_the_same_and_is_zero_elsewhere(task):
    layout, student = task.base.layout, student_of(task.base)
    wide = widen_adapter(student.adapter, layout.sites, student.structure)
    again = cut_adapter(wide, layout.sites, student.structure)
    for name, factor in student.adapter.items():
        assert torch.equal(again[name], factor)
        assert wide[name].shape == teacher_of(task.base).adapter[name].shape
        assert torch.equal(wide[name][wide[name] != 0], factor[factor != 0])


def test_a_teacher_says_what_it_would_say_of_each_row(task):
    device, teacher = device_on(task), teacher_of(task.base)
    plan = [np.array([5, 3, 5]), np.array([0, 59, 3])]
    found = teacher_outputs(
        device, Taught(teacher, dataclasses.replace(TEACHING, hidden=1.0)), plan
    )
    answers, states = found.of(np.array([59, 3, 5]))
    expected = logits_of(task.base, teacher, device.data.take(np.array([59, 3, 5])))
    # the adapter is merged into the weights there, and rows are padded to other lengths: rounding
    torch.testing.assert_close(answers, expected.float(), rtol=TINY, atol=TINY)
    assert states.shape == (3, task.base.layout.layers, task.base.layout.width)
    assert found.logits.shape == (4, 3)  # rows that come twice are read once


def test_its_pass_is_charged(task):
    """Four rows of one padded length: the whole model, its adapter, and no backward pass."""
    device, layout = device_on(task), task.base.layout
    plan = [np.array([5, 3, 0, 59])]
    teacher_outputs(device, Taught(teacher_of(task.base), TEACHING), plan)
    width = device.data.take(plan[0]).width(np.arange(4))
    extent = Extent(tokens=4 * width, squared_tokens=4 * width**2)
    adapter = 3 * sum(site.rows + site.columns for site in layout.sites)
    assert device.flops == forward_flops(layout, extent) + 2 * adapter * extent.tokens
    assert device.launches == layout.layers
    assert device.peak_memory_bytes > 2 * (task.base.embeddings + layout.parameters)
    assert device.samples == 0  # nothing was trained on


def test_a_student_comes_nearer_to_its_teacher(task):
    base, student, teacher = task.base, student_of(task.base), teacher_of(task.base)
    apart = {}
    for weight, hidden in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        device = device_on(task)
        taught = Taught(teacher, Teaching(temperature=2.0, weight=weight, hidden=hidden, own=False))
        found = tune(device, student, TUNING, taught=taught).model
        data = device.data
        answers = logits_of(base, teacher, data)
        apart[weight, hidden] = float(distances(logits_of(base, found, data), answers, 2.0, 1))
    assert apart[1.0, 0.0] < apart[0.0, 0.0]
    assert apart[1.0, 1.0] != apart[1.0, 0.0]


def test_a_teacher_without_weight_changes_no_bit(task):
    teacher, student = teacher_of(task.base), student_of(task.base)
    weightless = Taught(teacher, dataclasses.replace(TEACHING, weight=0.0))
    alone = tune(device_on(task), student, TUNING)
    found = tune(device_on(task), student, TUNING, taught=weightless)
    assert bits(found.model) == bits(alone.model) and found.loss == alone.loss


def test_students_in_one_pass_have_their_own_teachers(task):
    # at next to no rate the weights stay, so losses differ by rounding; AdamW at a rate turns
    # rounding into steps, which differ from one processor to the next
    still = dataclasses.replace(TUNING, learning_rate=1e-9)
    teaching = dataclasses.replace(TEACHING, hidden=0.5)
    teachers = [teacher_of(task.base), model_on(task.base, seed=3)]
    student = student_of(task.base)

    def requests(tuning):
        return [
            Request(device_on(task, seed=i), student, tuning, taught=Taught(teacher, teaching))
            for i, teacher in enumerate(teachers)
        ]

    first = requests(TUNING)
    assert _kind(first[0]) == _kind(first[1])
    assert _kind(dataclasses.replace(first[0], taught=None)) != _kind(first[1])
    trained, losses = train(first), [found.loss for found in train(requests(still))]
    for i, teacher in enumerate(teachers):
        taught = Taught(teacher, teaching)
        alone = tune(device_on(task, seed=i), student, TUNING, taught=taught).model.adapter
        apart = moved = 0.0
        for name, tensor in alone.items():
            apart += float((tensor - trained[i].model.adapter[name]).square().sum())
            moved += float((tensor - student.adapter[name]).square().sum())
        # as in test_together: rounding makes up 1 % of the change, another device's rows all of it
        assert apart < 0.05**2 * moved
        alone = tune(device_on(task, seed=i), student, still, taught=taught)
        assert losses[i] == pytest.approx(alone.loss, rel=TINY)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        (DenseTeacher(weight=1.5), "method.teacher.weight is 1.5, but 0 to 1"),
        (DenseTeacher(temperature=0.0), "method.teacher.temperature is 0.0, but 0.01 to 100.0"),
        (DenseTeacher(hidden=-1.0), "method.teacher.hidden is -1, but it cannot be negative"),
    ],
)
def test_settings_that_cannot_work(task, teacher, line):
    with pytest.raises(BadInput, match=line):
        teacher.check(task)
    NoTeacher().check(task)


def test_a_device_can_be_taught_by_what_it_was_before_it_pruned(task, lab):
    """Two rounds, of which the second prunes: the teacher is the model of the first one, which the
    device keeps while it is whole and not after.
    """
    cls = all_methods()["prune_after"]
    method = dataclasses.replace(cls.toy(), steps=2, recover=4, teacher=DenseTeacher(adapter="own"))
    bench = lab(kinds=("nx",))
    after = bench.run(method, rounds=1)
    (file,) = bench.fleet.memories.values()
    kept = unpack(bench.store.get_memory(file))["teacher"]
    assert bool(kept.structure.channels.all())
    came = half(kept.adapter)  # of one device the server's adapter is what it sent
    assert bits(half(after.training.adapter)) == bits(came)
    bench.save(after)
    bench.fleet.begin_round(1)
    method.round(after, bench.checked(bench.fleet))
    (file,) = bench.fleet.memories.values()
    assert bits(unpack(bench.store.get_memory(file))["teacher"]) == bits(kept)


TEACHABLE = sorted(
    name
    for name, cls in all_methods().items()
    if "teacher" in {field.name for field in dataclasses.fields(cls)}
)


def test_all_methods_that_prune_can_be_taught():
    expected = ["fedspine", "fedspine-plus", "loraprune", "magnitude", "prune_after"]
    assert expected == TEACHABLE
    assert not hasattr(FedLora(), "teacher")


@pytest.mark.parametrize("name", TEACHABLE)
def test_devices_are_taught_once_they_have_pruned(name, lab, task):
    cls = all_methods()[name]
    changed = {"recover": 4} if name == "prune_after" else {"warmup": 0.0, "until": 0.4}
    method = dataclasses.replace(cls.toy(), steps=2, teacher=DenseTeacher(hidden=0.5), **changed)
    bench, sent = lab(kinds=("nx", "agx")), []

    method.check(task)
    state = bench.run(method, rounds=2, around=lambda fleet: sent.append(Spy(fleet)) or sent[-1])
    orders = [order for spy in sent for _, order in spy.orders if hasattr(order, "structure")]
    assert orders and all(isinstance(order, TaughtOrder) for order in orders)
    assert bits(unpack(pack(orders[-1]).payload)) == bits(orders[-1])
    assert orders[-1].reads.descent.penalty == method.teacher.hidden == 0.5
    flops = [row["flops"] for row in bench.rows("exchange") if row["work"] == "prune_and_tune"]
    untaught = lab("untaught", kinds=("nx", "agx"))
    untaught.run(dataclasses.replace(method, teacher=NoTeacher()), rounds=2)
    plain = [row["flops"] for row in untaught.rows("exchange") if row["work"] == "prune_and_tune"]
    assert flops[0] == plain[0]  # of a whole model there is nothing to teach
    assert flops[-1] > plain[-1]
    structures = getattr(state, "training", state).structures
    assert all(not bool(kept.channels.all()) for kept in structures.values())
