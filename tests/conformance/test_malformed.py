"""What a bad site can send: every field of every declared result and order, changed in many ways.

None ends a run or changes a state other than by leaving that site out. Nothing is trained here: the
messages of one round are recorded and given to the method again, one of them changed.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from array_toy import array_task
from malformed import Recorded, Replayed, Stray, changed, mutants
from toy import Lab, bits, toy_task

from fedspine.control.depth import Lcd
from fedspine.control.split_parts import Regulated
from fedspine.core.checks import Agreeing, Asked, Terms, check_state, why_unusable
from fedspine.core.device import find_work
from fedspine.core.fleet import AllLost, Diverged
from fedspine.core.logit_adjustment import OwnLabelSkew
from fedspine.core.schema import conforms, work_kinds
from fedspine.flare.session import FlareSession
from fedspine.flare.site_worker import works_of
from fedspine.flare.wire import SiteAnswer
from fedspine.fleets.checked import Checked
from fedspine.lm.distillation import DenseTeacher
from fedspine.lm.drift import FedDyn
from fedspine.lm.importance_sources import Activation
from fedspine.lm.load import load
from fedspine.methods import all_methods
from fedspine.methods.fedlora import tune_adapter

METHODS = all_methods()
KINDS = ("tx2", "nx", "agx")  # of the devices; the second one is bad
BAD = "nx-01"
FEWEST_CASES = 10_000  # over all methods
TRIED = 12  # cases of a method that are refused and given to it, beside all that pass
SHORT = {"steps": 2, "batch": 4}


class Round:
    """One round of a method as it was, to be had again with other replies of the bad device."""

    def __init__(self, method, task, folder, before=1):
        self.method, self.task, self.terms = method, task, Terms.of(task)
        lab = Lab(task, folder, kinds=KINDS)
        try:
            self.state = lab.run(method, rounds=before)
            lab.fleet.begin_round(before)
            self.recorded = Recorded(lab.fleet)
            self.after = bits(method.round(self.state, self.checked(self.recorded)))
        finally:
            lab.close()
        self.exchanges = self.recorded.exchanges[BAD]
        self.rows = {device.id: device.examples for device in self.recorded.devices}[BAD]

    def checked(self, fleet):
        return Checked(fleet, self.terms)

    def again(self, changed=None):
        """The state after the round, with these replies of the bad device instead (by exchange, a
        value or None for none), and why devices were left out.
        """
        change = {(BAD, number): value for number, value in (changed or {}).items()}
        fleet = Replayed(self.recorded, change)
        return self.method.round(self.state, self.checked(fleet)), fleet.left_out

    def asked(self, number):
        """What the reply of this exchange of the bad device is checked against."""
        agreed = None
        for _, order, reply in self.exchanges[:number]:
            for each in (order, reply.value):
                if isinstance(each, Agreeing):
                    agreed = each.agreed(agreed, self.terms)
        _, order, _ = self.exchanges[number]
        if isinstance(order, Agreeing):
            agreed = order.agreed(agreed, self.terms)
        return Asked(self.terms, rows=self.rows, order=order, agreed=agreed)


def short(name):
    return replace(METHODS[name].toy(), **SHORT)


VARIANTS = {name: short(name) for name in sorted(METHODS)} | {
    # batches that are not planned again, since a replayed device goes on with those it had
    "u-shape": replace(short("mergesfl-plus"), labels_stay=True, batches=Regulated()),
    "int8": replace(short("splitfed_v1"), precision="int8"),
    "fp32": replace(short("mergesfl"), precision="fp32"),
    "net": replace(short("splitfed_v2"), rank=4),
    "net u-shape": replace(short("mergesfl-plus"), labels_stay=True, batches=Regulated()),
    "net pyramidfl": short("pyramidfl"),
    "held": replace(
        short("fedlora"),
        drift=FedDyn(),
        keep_optimiser=True,
        personal_head=True,
        logit_adjustment=OwnLabelSkew(),
    ),
    "uniform": replace(
        short("fedspine"), structure="uniform", sparsity=0.4, teacher=DenseTeacher(hidden=0.1)
    ),
    "few heads": replace(short("magnitude"), structure="few_heads", sparsity=0.4),
    "deep": replace(
        short("fedspine-plus"),
        depths=Lcd(rule="fixed", fixed=1),
        importance=Activation(),
        head_start="random",
    ),
    "first legend": short("legend"),  # which probes devices
    "first mergesfl": short("mergesfl"),  # which asks for labels
    "first fedlora": replace(short("fedlora"), head_start="class-means"),
}


@pytest.fixture(scope="module")
def rounds(task, tiny_folder, tmp_path_factory):
    """A function that gives the recorded round of a variant, each recorded once."""
    made = {}

    def of(name):
        if name not in made:
            on = array_task() if name.startswith("net") else task
            if name == "first fedlora":
                folder = str(tiny_folder("bert"))
                mean = load(folder, kind="classification", classes=3, pooling="mean")
                on = toy_task(*mean, rounds=5)
            before = 0 if name.startswith("first") else 1
            made[name] = Round(VARIANTS[name], on, tmp_path_factory.mktemp("round"), before)
        return made[name]

    return of


@pytest.fixture(scope="module")
def cases():
    return []


@pytest.fixture(scope="module")
def reached():
    """The types of the results."""
    return set()


def results_of(round):
    """The exchanges of the bad device, one for each pair of work and type of order."""
    seen = {}
    for number, (work, order, _) in enumerate(round.exchanges):
        seen[work, type(order)] = number  # the last: what came before is agreed
    return seen.values()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_replayed_round_is_the_round(name, rounds):
    again, left_out = rounds(name).again()
    assert (bits(again), left_out) == (rounds(name).after, {})


@pytest.mark.parametrize("name", VARIANTS)
def test_no_result_ends_a_run_or_changes_more_than_that_its_site_is_left_out(name, rounds, cases):
    here = rounds(name)
    rng = np.random.default_rng(sorted(VARIANTS).index(name))
    passed, refused = 0, []
    for number in results_of(here):
        work, _, reply = here.exchanges[number]
        asked, kind = here.asked(number), work_kinds(work)[1]
        assert why_unusable(reply.value, kind, asked) is None
        for value in mutants(reply.value):
            why = why_unusable(value, kind, asked)
            cases.append(name)
            assert why is None or (why and "\n" not in why and len(why) < 200)
            if why is not None:
                refused.append((number, value))
                continue
            passed += 1
            if passed % 7 == 0:  # what passes is a result like another
                check_state(here.again({number: value})[0])
    without = {}
    for i in rng.permutation(len(refused))[:TRIED]:
        number, value = refused[i]
        if number not in without:
            without[number] = bits(here.again({number: None})[0])
        after, left_out = here.again({number: value})
        assert bits(after) == without[number] and set(left_out) <= {BAD}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_order_is_more_than_refused_by_a_device(name, rounds, cases, reached):
    here = rounds(name)
    asked = Asked(here.terms, rows=here.rows)
    for number in results_of(here):
        work, order, _ = here.exchanges[number]
        kind = work_kinds(work)[0]
        assert why_unusable(order, kind, asked) is None
        reached.add(type(here.exchanges[number][2].value))
        for value in mutants(order):
            why = why_unusable(value, kind, asked)
            cases.append(name)
            assert why is None or (why and "\n" not in why and len(why) < 200)


COST = SiteAnswer(
    result=np.zeros(0, np.uint8), flops=1.0, launches=1, samples=1, peak_memory_bytes=1,
    compute_seconds=1.0, epsilon=1.0, noise=1.0,
)  # fmt: skip


def test_no_cost_that_a_site_declares_is_taken_where_it_cannot_be(cases):
    taken, refused = [], 0
    for value in mutants(COST):
        if not conforms(value, SiteAnswer):  # which ends where it is decoded
            continue
        cases.append("cost")
        numbers = [each for each in vars(value).values() if isinstance(each, int | float)]
        found = FlareSession._taken(None, SimpleNamespace(asks=0), tune_adapter, value)
        # the result is none, which is said of those whose cost is taken
        if "its result cannot be used" in found:
            taken += numbers
        else:
            refused += 1
            assert "its answer cannot be used" in found and len(found) < 200
    assert refused > 20
    assert all(math.isfinite(each) and 0 <= each <= 2**76 for each in taken)


def test_these_were_many_cases_of_all_results(cases, reached, request):
    ran = {item.name for item in request.session.items}
    if not {f"test_no_order_is_more_than_refused_by_a_device[{name}]" for name in VARIANTS} <= ran:
        pytest.skip("only where all variants run")
    assert len(cases) >= FEWEST_CASES
    works = {work for method in METHODS for work in works_of(method)}
    assert reached == {work_kinds(find_work(work))[1] for work in works}


# --- replies that once ended a run, or spoilt it without a word ---


def with_layer(tensor):
    """One layer more than the model has."""
    return torch.cat([tensor, tensor[:1]])


def tensors(name, change):
    """A change of all tensors of a field of weights."""

    def of(value):
        return changed(value, name, {k: change(each) for k, each in getattr(value, name).items()})

    return of


def field(name, change):
    """A change of a field, `a.b` for one inside another."""

    def of(value):
        first, _, rest = name.partition(".")
        inside = getattr(value, first)
        return changed(value, first, field(rest, change)(inside) if rest else change(inside))

    return of


def constant(value):
    return lambda _: value


def without_last_rows(value):
    """Features of no row, consistent in themselves."""
    sent = value.features
    features = replace(sent, values=sent.values[:0], mask=sent.mask[:0])
    return replace(value, features=features, labels=value.labels[:0])


def narrow(value):
    return field("features.values", lambda values: values[:, :-1].contiguous())(value)


def deeper(value):
    """Weights for a layer that the model has not, under its name."""
    more = {k.replace("layer.1.", "layer.2."): each for k, each in value.adapter.items()}
    return changed(value, "adapter", value.adapter | more)


def nan_in(tensor):
    return torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 1, math.nan, tensor)


SCORES = "scores.heads"
BEGIN, LABELS = "begin", "label_distribution"
MALFORMED = {  # variant, work, change, what is said
    "scores wide": ("fedspine", None, field(SCORES, lambda t: t[:, :-1]), "where (2, 4)"),
    "scores flat": ("loraprune", None, field(SCORES, torch.flatten), "expected SpineResult, got"),
    "scores nan": ("fedspine", None, field(SCORES, nan_in), "scores.heads is not finite"),
    "scores negative": ("magnitude", None, field(SCORES, lambda t: t - 2), "0 to 1 was"),
    "scores deeper": ("fedspine", None, field(SCORES, with_layer), "where (2, 4)"),
    "structure deeper": (
        "fedspine",
        None,
        field("structure.heads", with_layer),
        "where (2, 4) was expected",
    ),
    "structure of nothing": (
        "fedspine-plus",
        None,
        field("structure.heads", torch.zeros_like),
        "keeps none in some layer",
    ),
    "adapter deeper": ("fedlora", None, deeper, "tensors of other names"),
    "loss nan": ("fedlora", None, field("loss", constant(math.nan)), "loss is nan"),
    "loss 1e308": ("fedlora", None, field("loss", constant(1e308)), "loss is 1e+308"),
    "loss 10**400": ("fedlora", None, field("loss", constant(10**400)), "1329 bits"),
    "loss below 0": ("hetlora", None, field("loss", constant(-1.0)), "loss is -1"),
    "loss before": ("fedspine", None, field("loss_before", constant(1e308)), "1e+308"),
    "adapter empty": ("fedlora", None, field("adapter", constant({})), "0 tensors of other"),
    "head empty": ("linear_probe", None, field("head", constant({})), "0 tensors of other"),
    "head of 3e38": ("fedavg", None, tensors("weights", lambda t: t * 0 - math.inf), "not finite"),
    "examples 10**9": ("flexlora", None, field("examples", constant(10**9)), "declared 100"),
    "examples below 0": ("fedavg", None, field("examples", constant(-(10**6))), "declared 100"),
    "rank": ("hetlora", None, field("rank", constant(3)), "rank is 3, but one of"),
    "update short": ("pyramidfl", None, tensors("update", lambda t: t[:-1]), "where ("),
    "labels 99": ("splitfed_v1", BEGIN, field("labels", lambda t: t * 0 + 99), "labels has 99"),
    "labels -7": ("splitfed_v2", BEGIN, field("labels", lambda t: t * 0 - 7), "labels has -7"),
    "labels None": ("splitlora", BEGIN, field("labels", constant(None)), "labels are missing"),
    "labels too few": ("adasfl", BEGIN, field("labels", lambda t: t[:-1]), "where (4,)"),
    "mask None": ("mergesfl", BEGIN, field("features.mask", constant(None)), "no mask"),
    "mask all ones": ("mergesfl", BEGIN, field("features.mask", torch.ones_like), "mask has"),
    "wrong width": ("mergesfl", BEGIN, narrow, "(31,) wide, but (32,)"),
    "zero rows": ("mergesfl", BEGIN, without_last_rows, "the number of rows is 0"),
    "labels that stay": ("u-shape", BEGIN, field("labels", constant(torch.zeros(4))), "they stay"),
    "counted": ("u-shape", "answer", field("counted", constant(10**6)), "counted is 1000000"),
    "answer's loss": ("u-shape", "answer", field("loss", constant(10**400)), "1329 bits"),
    "ended empty": ("splitfed_v1", "end", field("weights", constant({})), "0 tensors of other"),
    "ended broadcast": ("splitfed_v1", "end", tensors("weights", lambda t: t[:1, :1]), "where ("),
    "shares nan": ("first mergesfl", LABELS, field("shares", lambda a: a * math.nan), "finite"),
    "shares negative": (
        "first mergesfl",
        LABELS,
        field("shares", constant(np.array([2.0, -0.5, -0.5]))),
        "a negative one",
    ),
    "shares 2-d": ("first mergesfl", LABELS, field("shares", lambda a: a[None]), "where (3,)"),
    "shares of 2": ("first mergesfl", LABELS, field("shares", lambda a: 2 * a), "sum to 2"),
    "class counts": (
        "first fedlora",
        "class_means",
        field("counts", lambda t: t * 0 + 2**62),
        "rows at most",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_reply_is_named_and_the_round_goes_on_without_it(what, rounds):
    name, wanted, change, words = MALFORMED[what]
    here = rounds(name)
    number = next(
        i
        for i, (work, _, _) in enumerate(here.exchanges)
        if wanted is None or work.__name__ == wanted
    )
    value = change(here.exchanges[number][2].value)
    after, left_out = here.again({number: value})
    assert left_out.keys() == {BAD} and left_out[BAD].startswith("cannot be used: ")
    assert words in left_out[BAD]
    assert bits(after) == bits(here.again({number: None})[0])


@pytest.mark.parametrize("name", ["fedlora", "fedspine", "mergesfl", "u-shape", "splitfed_v1"])
@pytest.mark.parametrize(
    ("spoilt", "error", "words"),
    [(math.nan, Diverged, "not finite"), (None, AllLost, "cannot be used")],
    ids=["nan", "of another type"],
)
def test_where_nothing_usable_is_left_the_round_says_why(name, rounds, spoilt, error, words):
    here = rounds(name)

    def spoil(value):
        if spoilt is None:
            return Stray()
        first = "features" if "features" in vars(value) else "loss"
        if first == "loss":
            return changed(value, "loss", spoilt)
        values = torch.full_like(value.features.values, spoilt)
        return field("features.values", constant(values))(value)

    change = {
        (id, 0): spoil(each[0][2].value) for id, each in here.recorded.exchanges.items() if each
    }
    fleet = here.checked(Replayed(here.recorded, change))
    with pytest.raises(AllLost, match=words) as raised:
        here.method.round(here.state, fleet)
    assert type(raised.value) is error
