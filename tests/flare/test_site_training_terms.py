"""A site's terms of training: every order beyond them is refused with the term, and no method's own
order is.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flare_federation import NAMES
from hostile_server import ROWS, few_rows, refused
from toy import Spy

from fedspine.core.device import Call, name_of, returns_learnt, serve
from fedspine.core.message import pack
from fedspine.core.reads import Descent, Reads, reads_of
from fedspine.core.tensors import half, single
from fedspine.flare.run_terms import Refused, RunTerms
from fedspine.flare.site_terms import (
    AllowSection,
    check_noise,
    check_order,
    check_run,
    check_training,
)
from fedspine.flare.site_weights import check_magnitudes, check_weights
from fedspine.flare.site_worker import SiteWorker
from fedspine.flare.wire import SiteAnswer, SiteOrder, as_array
from fedspine.lm.distillation import Teaching
from fedspine.lm.lora import is_a, is_b
from fedspine.lm.tuning import HeldTuning
from fedspine.methods import all_methods, sends_features
from fedspine.methods.fedavg import AverageOrder, train_and_send
from fedspine.methods.fedlora import tune_adapter
from fedspine.methods.hetlora import HetLoraOrder, tune_and_shrink
from fedspine.methods.legend import DepthOrder, on_blocks, probe_top, tune_top
from fedspine.pruning.device import TaughtOrder, prune_and_tune
from fedspine.pruning.head_start import MeansOrder, class_means, head_of
from fedspine.split.messages import Cutting
from fedspine.split.trainable_half import Optimising
from fedspine.split.whole_model import Training

ADAPTERS = sorted(name for name, cls in all_methods().items() if not sends_features(cls))
ROUNDS = 2  # B is zero at first and not later


def of_tuning(**changes):
    return lambda order: replace(order, tuning=replace(order.tuning, **changes))


def of_adapter(change, of):
    """The order with `change` applied to the factors of one kind."""

    def changed(order):
        adapter = {n: change(t.clone()) if of(n) else t for n, t in order.adapter.items()}
        return replace(order, adapter=adapter)

    return changed


def of_head(change):
    def changed(order):
        head = {n: change(n, t.clone()) for n, t in order.head.items()}
        return replace(order, head=head)

    return changed


def first_row(value):
    """One direction of A set to `value`."""

    def change(tensor):
        tensor[0] = value
        return tensor

    return change


def sure(name, tensor):
    """A head that is certain of the first class, as in attacks on labels."""
    if name.endswith(".bias"):
        return torch.tensor([0.0, -10.0, -10.0]).half()
    return 1e-2 * tensor


HELD = {"proximal": 0.0, "dynamic": False, "keep_optimiser": True, "personal_head": False}
BEYOND = [
    (of_tuning(steps=7, batch=5), "expected at least 8 steps behind an answer, got 7"),
    # 64 steps of which the decay leaves one
    (of_tuning(steps=64, batch=32, learning_rate=0.1, weight_decay=10.0), "fewest_steps"),
    (of_tuning(weight_decay=1.5), "expected at most 1 for weight decay, got 1.5"),
    (of_tuning(clip=1e-12), "expected at least 0.5 for the gradient's clip, got 1e-12"),
    (of_tuning(clip=0.0), "allow.lowest_clip"),
    (
        of_tuning(learning_rate=1e7, weight_decay=0.0),
        "at most 0.1 for a learning rate",
    ),
    (of_tuning(head_learning_rate=0.2), "allow.rates"),
    (of_tuning(learning_rate=1e-9, head_learning_rate=1e-3), "at least 1e-07 for a learning rate"),
    # steps by the far larger gradients of an earlier training are proportional to the gradient
    (
        lambda order: replace(order, tuning=HeldTuning(**vars(order.tuning), **HELD)),
        "the optimiser 'adamw-kept' is not among allow.optimisers",
    ),
    (lambda order: replace(order, scale=1e-6), "at least 0.25 for the adapter's scale"),
    (lambda order: replace(order, scale=1e6), "allow.scales"),
    (of_adapter(torch.zeros_like, is_a), "at least 0.001 for the norm of each direction of A"),
    (of_adapter(first_row(0.0), is_a), "allow.norms"),
    (of_adapter(first_row(65504.0), is_a), "at most 1000 for the norm of each direction of A"),
    (of_adapter(lambda b: torch.full_like(b, 1e-5), is_b), "norm of each direction of B"),
    (
        of_head(lambda _, tensor: torch.zeros_like(tensor)),
        "0.001 for the norm of the head",
    ),
    (
        of_head(lambda _, tensor: 10_000 * tensor),
        "at most 1000 for the norm of a class in the head",
    ),
    (of_head(sure), "at most 4 nats of the head's bias beyond what features make up for"),
]


@pytest.mark.parametrize(("change", "words"), BEYOND)
def test_an_order_beyond_a_term_is_refused_with_the_term(hostile, change, words):
    site = hostile().opened("fedlora")
    assert refused(site.ask(tune_adapter, change(site.lora())), words)


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1e30])
def test_a_temperature_at_which_only_some_rows_overflow_is_refused(hostile, temperature):
    """The attack: whether a logit exceeds what fp32 holds times the temperature decided whether the
    site answered, so each order told exactly whether the rows have such a logit.
    """
    site = hostile().opened("fedspine")
    (order,) = [order for _, work, order in few_rows(site, 4) if work is prune_and_tune]
    order = replace(order, tuning=replace(order.tuning, steps=16))
    teaching = Teaching(temperature=temperature, weight=0.5, hidden=0.0, own=False)
    reply = site.ask(prune_and_tune, TaughtOrder(**vars(order), teaching=teaching))
    assert (reply.reason, "but 0.01 to 100 was expected" in reply.detail) == ("bad order", True)
    steep = replace(order, scoring=replace(order.scoring, cross=1e30))
    reply = site.ask(prune_and_tune, steep)
    assert (reply.reason, "cross is 1e+30" in reply.detail) == ("bad order", True)


def test_the_gradient_itself_does_not_leave(hostile):
    """SGD changes weights in proportion to the gradient; a dominant penalty does so in AdamW."""
    site = hostile().opened("fedavg")
    training = Training(
        cutting=Cutting(cut=1, rank=4),
        optimising=Optimising(kind="sgd", learning_rate=0.1),
        steps=8,
        batch=4,
    )
    order = AverageOrder(weights=site.weights(), training=training, precision="fp32")
    assert refused(site.ask(train_and_send, order), "the optimiser 'sgd' is not among allow.optim")
    adamw = replace(training, optimising=Optimising(kind="adamw", learning_rate=0.1))
    assert site.ask(train_and_send, replace(order, training=adamw)).examples

    site.opened("hetlora")
    lora = site.lora()
    shrinking = HetLoraOrder(
        adapter=lora.adapter,
        head=lora.head,
        scale=2.0,
        tuning=lora.tuning,
        rank=4,
        shrunk=2,
        penalty=1e6,
    )
    assert refused(site.ask(tune_and_shrink, shrinking), "at most 1 for a penalty")
    assert site.ask(tune_and_shrink, replace(shrinking, penalty=1e-3)).examples


@pytest.mark.parametrize(
    ("predicted", "words"),
    [
        ({"steps": 5}, "expected at least 8 steps behind an answer, got 5"),
        ({"rank": 64}, "expected at most 32 for a rank, got 64 (allow.largest_rank"),
        (
            {"merged": 384},
            "at most 0 for the rank that is merged into the base, got 384 (allow.larg",
        ),
        ({"scale": 32.0}, "expected at most 16 for the adapter's scale, got 32"),
    ],
)
def test_a_run_beyond_a_term_is_refused_before_a_row_is_read(hostile, predicted, words):
    site = hostile()
    (site.folder / "rows.parquet").write_bytes(b"no rows at all")
    how = Descent(kind="adamw", learning_rates=(1e-3,), weight_decay=0.1, clip=1.0)
    asked = {"steps": 20, "batch": 32, "descent": how} | predicted
    assert refused(site.open("fedlora", foretold=Reads(**asked)), words)
    slow = replace(how, learning_rates=(1e-9,))
    assert refused(site.open("fedlora", foretold=Reads(**asked | {"descent": slow})), "allow.")


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_order_of_a_method_with_its_defaults_is_refused(name, lab, task):
    method = all_methods()[name]()
    terms, allow = terms_of(name, method, task), AllowSection()
    if name == "flora":  # whose merged rank a site has to allow, apart from the rank that it trains
        with pytest.raises(Refused, match="allow.largest_merged_rank"):
            check_run("east", allow, ("tiny",), terms)
        allow = AllowSection(largest_merged_rank=32, largest_rank=max(method.ranks))
    check_run("east", allow, ("tiny",), terms)
    sent = []

    def watched(fleet):
        return Asked(fleet, sent)

    # as few as the terms allow, since the rows do not matter here
    quick = replace(method, steps=allow.fewest_steps, batch=16)
    lab(kinds=("tx2",)).run(quick, rounds=ROUNDS, around=watched)
    assert len(sent) >= ROUNDS
    for work, order in sent:
        check_order("east", allow, terms, order)
        check_weights("east", allow, order, task.base)
        if returns_learnt(work):
            check_training("east", allow, order)
        check_magnitudes("east", allow, order, task.base)
    trained = [reads for _, order in sent for reads in reads_of(order) if reads.descent is not None]
    assert len(trained) >= ROUNDS  # so everything that trains declares it
    last = next((w, o) for w, o in reversed(sent) if returns_learnt(w) and trains(o))
    noise_is_added(*last, task, allow)


def trains(order):
    return any(reads.descent is not None for reads in reads_of(order))


def noise_is_added(work, order, task, allow):
    """Trained weights have the site's noise; an answer without it would not leave."""
    plain = Call(
        device="east",
        index=0,
        work=name_of(work),
        order=pack(order).payload,
        memory=None,
        seed=(1,),
    )
    without = serve(plain, task.base, task.train)
    noisy = serve(replace(plain, noise=allow.noise), task.base, task.train)
    assert noisy.noise is not None and noisy.result != without.result
    assert serve(replace(plain, noise=allow.noise), task.base, task.train).result == noisy.result
    check_noise("east", allow, order, noisy.noise)
    with pytest.raises(Refused, match="adds no noise, which allow.noise"):
        check_noise("east", allow, order, without.noise)
    check_noise("east", allow.model_copy(update={"noise": 0.0}), order, without.noise)


class Asked(Spy):
    """A fleet that records the work and order of each ask in `sent`."""

    def __init__(self, fleet, sent):
        super().__init__(fleet)
        self._sent = sent

    def ask(self, work, orders, **more):
        self._sent += [(work, order) for order in orders.values()]
        return super().ask(work, orders, **more)


def test_a_site_adds_noise_to_what_leaves_and_says_how_much(hostile):
    """More rows get less noise; the same order gets the same answer, also in another run."""
    site = hostile().opened("fedlora")
    orders = [site.lora(steps=8, batch=batch) for batch in (4, 5)]
    came = [answered(site, order) for order in orders]
    assert pack(answered(site.opened("fedlora"), orders[0])).payload == pack(came[0]).payload
    share = AllowSection().noise
    expected = [share * (32 / rows) ** 0.25 for rows in (32, 40)]
    assert [answer.noise for answer in came] == pytest.approx(expected)
    plain = hostile("plain", allow={"noise": 0.0}).opened("fedlora")
    assert answered(plain, orders[0]).noise is None


def test_noise_is_the_sites_own_where_its_rows_are_drawn_as_in_a_simulation(hostile):
    order, found = hostile("any").lora(), {}
    for noise in (0.0, 4.0):
        for name in ("one", "two"):
            site = hostile(f"{name}{noise:g}", allow={"noise": noise})
            site.worker = SiteWorker(site.site, site.folder, b"")
            found[noise, name] = pack(site.opened("fedlora").ask(tune_adapter, order)).payload
    assert found[0.0, "one"] == found[0.0, "two"]
    assert found[4.0, "one"] != found[4.0, "two"]


def answered(site, order):
    asked = SiteOrder(
        run=site.run,
        work=name_of(tune_adapter),
        order=as_array(pack(order).payload),
        seed=(0, 0, 0),
        round=0,
        memory=None,
        version=1,
        needed=(),
    )
    reply = site.sent(asked)
    assert isinstance(reply, SiteAnswer)
    return replace(reply, compute_seconds=0.0)  # which is measured


def test_a_head_of_class_means_is_within_the_terms(hostile):
    site = hostile().opened("fedlora")
    means, lora = site.ask(class_means, MeansOrder(rows=ROWS)), site.lora()
    head = half(head_of(single(lora.head), [SimpleNamespace(value=means)]))
    (bias,) = [tensor for name, tensor in head.items() if name.endswith(".bias")]
    assert bias.any()
    assert site.ask(tune_adapter, replace(lora, head=head)).examples == ROWS


def test_a_probe_of_time_tells_nothing_that_was_learnt(hostile):
    """LEGEND's probe has few steps, so it sends no changed weights."""
    site = hostile().opened("legend")
    lora = site.lora(steps=2, batch=16)
    order = DepthOrder(
        adapter=lora.adapter, head=lora.head, scale=2.0, lowest=1, tuning=lora.tuning
    )
    assert refused(site.ask(tune_top, order), "allow.fewest_steps")
    hot = replace(order.tuning, head_learning_rate=1e30, weight_decay=0.0)
    # whose loss, finite or not, would tell of the rows without noise
    assert refused(site.ask(probe_top, replace(order, tuning=hot)), "allow.rates")
    came = site.ask(probe_top, order)
    assert came.adapter.keys() == on_blocks(site.base.layout, order.adapter, 1).keys()
    for name, tensor in (came.adapter | came.head).items():
        assert torch.equal(tensor, (order.adapter | order.head)[name]), name


def terms_of(name, method, task):
    return RunTerms(
        method=name,
        foretold=method.predicted_reads(task.base),
        kind="classification",
        model="tiny",
        model_sha256="0" * 64,
        layers=None,
        precision="fp32",
        pooling="auto",
        max_tokens=task.max_tokens,
        label_names=NAMES,
    )
