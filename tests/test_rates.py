"""What `learning_rate = "auto"` and `optimiser = "auto"` stand for, and where they are decided."""

import pytest

from fedspine.core import rates
from fedspine.core.errors import BadInput
from fedspine.lm.tune import LocalTraining
from fedspine.methods import all_methods
from fedspine.methods.fedlora import FedLora
from fedspine.methods.mergesfl import MergeSfl
from fedspine.runs import config
from fedspine.runs.assemble import settled

OPEN = [name for name, method in all_methods().items() if rates.open_fields(method())]


def test_every_method_but_the_probe_leaves_its_rate_to_the_run():
    assert set(all_methods()) - set(OPEN) == {"linear_probe"}


@pytest.mark.parametrize("name", OPEN)
def test_every_open_choice_is_decided_for_each_kind_of_model(name):
    method = all_methods()[name]
    for family in method.models:
        decided = rates.settled(method(), family)
        assert not rates.open_fields(decided)
        assert isinstance(decided.learning_rate, float)
        if not issubclass(method, LocalTraining):
            assert decided.optimiser == rates.OPTIMISERS[family]


def test_what_is_given_stays_and_decides_the_rest():
    method = MergeSfl(optimiser="sgd")
    assert rates.settled(method, "transformer").learning_rate == rates.RATES["transformer", "sgd"]
    values, line = rates.chosen(MergeSfl(learning_rate=0.5), "net")
    assert values == {"optimiser": "adamw"}
    assert line == "training: AdamW, learning rate 0.5"
    assert rates.chosen(FedLora(learning_rate=0.5), "transformer") is None


@pytest.mark.parametrize("method", [FedLora(), MergeSfl(learning_rate=0.1)])
def test_an_open_choice_is_refused_where_no_run_decides_it(method):
    with pytest.raises(BadInput, match='is "auto", which stands for a value only in a recipe'):
        rates.check_settled(method)


def test_a_run_decides_prints_and_keeps_its_choice():
    wanted = config.recipe({"method": {"name": "fedlora"}, "run": {"precision": "fp32"}})
    begun, lines = settled(wanted)
    rate = rates.RATES["transformer", "adamw"]
    assert lines[-1] == f"training: AdamW, learning rate {rate:g}"
    assert begun.method.learning_rate == rate and not begun.open_choices
    assert wanted.settled_as(begun).difference(begun) is None


def test_the_embedded_jobs_rate_holds_for_its_own_data_and_method():
    own = config.load(None, []).method
    assert own.learning_rate != "auto"
    for setting in ("task.data=other.csv", "method.name=fedlora"):
        other = config.load(None, [setting]).method
        assert other.learning_rate == "auto" and other.steps == own.steps
        assert other.head_speed == FedLora.head_speed
    given = config.load(None, ["task.data=other.csv", "method.learning_rate=0.001"]).method
    assert given.learning_rate == 0.001


def test_a_rate_that_is_neither_a_number_nor_auto_is_refused():
    with pytest.raises(BadInput, match="method.learning_rate is 'fast': .* number, or 'auto'"):
        config.load(None, ["method.learning_rate=fast"])
