"""One table over every method: those that take a server's step, with the settings of local training
that go with it, and the refusal of the others.
"""

import dataclasses

import pytest
import torch
from toy import bits

from fedspine.core.errors import BadInput
from fedspine.core.message import unpack
from fedspine.core.server_optimiser import CHOICES, Accumulated, FedAvgM, Server
from fedspine.lm.drift import FedDyn, FedProx
from fedspine.lm.schedules import Cosine
from fedspine.lm.tuning import HeadTraining, LocalTraining
from fedspine.methods import all_methods
from fedspine.runs.config import Recipe

METHODS = all_methods()
STEPPING = sorted(name for name, cls in METHODS.items() if cls.server_optimiser)
OTHERS = sorted(METHODS.keys() - set(STEPPING))
STEPS = [how for how in CHOICES if how != "none"]
# every method with one optimiser, in turn
CASES = [(name, STEPS[i % len(STEPS)]) for i, name in enumerate(STEPPING)]


def with_settings(method):
    """The method with few steps, and what it knows of settings of local training."""
    changed = {"steps": 2}
    if isinstance(method, HeadTraining):
        changed |= {"drift": FedProx(mu=0.1), "schedule": Cosine(warmup_rounds=1)}
    if isinstance(method, LocalTraining):
        changed["personal_head"] = True
    return dataclasses.replace(method, **changed)


def next_round(bench, method, state):
    bench.fleet.begin_round(state.round)
    after = method.round(state, bench.checked(bench.fleet))
    bench.fleet.end_round(0.0)
    return after


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_step_is_taken_and_a_resume_goes_on_with_its_moments(name, how, lab):
    method, two = with_settings(METHODS[name].toy()), ("tx2", "agx")
    first = lab("run", kinds=two, server=Server(CHOICES[how]()))
    after = first.run(method, rounds=1)
    assert first.fleet.server.moments
    first.save(after)
    whole = next_round(first, method, after)
    first.close()
    second = lab("run", kinds=two, server=Server(CHOICES[how]()))
    assert bits(second.run(method, rounds=2)) == bits(whole)
    second.close()
    plain = lab("run", kinds=two)  # goes on from there without a server's step
    assert bits(plain.run(method, rounds=2)) != bits(whole)


@pytest.mark.parametrize("name", [name for name in STEPPING if METHODS[name].same_shapes])
def test_feddyn_and_kept_optimisers_are_resumed(name, lab):
    two, share = ("tx2", "agx"), Accumulated(share=1.0)
    method = dataclasses.replace(
        METHODS[name].toy(), steps=2, drift=FedDyn(alpha=0.5), keep_optimiser=True
    )
    first = lab("run", kinds=two, server=Server(share))
    after = first.run(method, rounds=1)
    first.save(after)
    whole = next_round(first, method, after)
    first.close()
    second = lab("run", kinds=two, server=Server(share))
    assert bits(second.run(method, rounds=2)) == bits(whole)
    for file in second.fleet.memories.values():
        memory = unpack(second.store.get_memory(file))
        assert memory["optimiser"].steps == 4 and memory["drift"]


def test_momentum_of_zero_at_rate_one_is_the_mean_but_for_rounding(lab):
    method = METHODS["fedlora"].toy()
    plain = lab("plain").run(method, rounds=1)
    stepped = lab("stepped", server=Server(FedAvgM(learning_rate=1.0, momentum=0.0))).run(
        method, rounds=1
    )
    for one, other in ((plain.adapter, stepped.adapter), (plain.head, stepped.head)):
        for name, tensor in one.items():
            # w + (mean - w) is rounded twice, by 2^-24 of numbers below 1
            assert torch.allclose(tensor, other[name], rtol=0, atol=2 * 2**-24)


@pytest.mark.parametrize("name", OTHERS)
def test_methods_that_cannot_say_so_in_one_line(name):
    with pytest.raises(BadInput, match=f"fedadam, but {name} does not support") as refused:
        Recipe(method=name, server_optimiser="fedadam")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_feddyn_and_kept_optimisers_are_for_methods_of_the_same_shapes(name):
    cls = METHODS[name]
    if not issubclass(cls, HeadTraining):
        return
    for changed in ({"drift": FedDyn()}, {"keep_optimiser": True}):
        method = dataclasses.replace(cls.toy(), **changed)
        if cls.same_shapes:
            assert Recipe(method=method).method == method
            continue
        with pytest.raises(BadInput, match=f"those of {name} change"):
            Recipe(method=method)
