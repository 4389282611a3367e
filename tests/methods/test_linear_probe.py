"""Linear probing: the head alone is trained, sent and averaged; the base runs once for each row."""

import dataclasses

import numpy as np
import pytest
from toy import Spy, bits, toy_task

from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.message import pack
from fedspine.core.tensors import half
from fedspine.lm.base import Base
from fedspine.lm.prefix import Prefixes
from fedspine.lm.tuning import tuning_at
from fedspine.methods.fedlora import FedLora
from fedspine.methods.linear_probe import LinearProbe, ProbeOrder, tune_head

TOY = LinearProbe.toy()
SHARED = {"steps": TOY.steps, "batch": TOY.batch, "learning_rate": TOY.learning_rate}
NOTHING = 1e-30  # a scale whose products vanish in fp32: adapter and its gradients change no bit


def test_fedlora_whose_adapter_adds_nothing_is_this_method(lab, task):
    lora = FedLora(rank=1, scale=NOTHING, head_lr_multiplier=1.0, **SHARED)
    rng = np.random.default_rng(0)
    # kept features are computed in other batches, which rounds otherwise
    ours = dataclasses.replace(TOY.start(task, rng), turns=0.0)
    theirs = dataclasses.replace(lora.start(task, rng), turns=0.0, head=ours.head)
    benches = lab("probe"), lab("lora")
    for round in range(3):
        for bench in benches:
            bench.fleet.begin_round(round)
        ours = TOY.round(ours, benches[0].fleet)
        theirs = lora.round(theirs, benches[1].fleet)
    assert bits(ours.head) == bits(theirs.head)


def test_messages_hold_the_head_and_no_adapter(lab, task):
    spies = []
    lab().run(TOY, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    head = sum(
        tensor.numel() for tensor in task.base.initial_head(np.random.default_rng(0)).values()
    )
    for _, value in spies[0].orders + spies[0].results:
        assert sum(tensor.numel() for tensor in value.head.values()) == head
        # two bytes a number, and names, shapes and a few settings beside them
        assert 2 * head <= pack(value).bytes < 2 * head + 2048


def test_the_base_is_run_once_for_each_row(task, tmp_path, monkeypatch):
    passes, below = [], Base.below
    monkeypatch.setattr(Base, "below", lambda *given: (passes.append(1), below(*given))[1])
    prefixes, start = Prefixes(tmp_path), TOY.start(task, np.random.default_rng(0))
    counted = []
    for round in range(3):
        device = Device(
            id="d",
            data=task.train.take(np.arange(60)),
            base=task.base,
            memory={},
            rng=np.random.default_rng(round),
            prefixes=prefixes,
        )
        tune_head(device, ProbeOrder(head=half(start.head), tuning=tuning_at(TOY, round, 3)))
        counted.append(len(passes))
    assert counted == [2, 2, 2]  # 60 rows in batches of 32


def test_a_language_model_has_no_head_to_train(decoder):
    with pytest.raises(BadInput, match="a language model has none; choose"):
        TOY.check(toy_task(*decoder, rounds=1, kind="causal-lm"))
