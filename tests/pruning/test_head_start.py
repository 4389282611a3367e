"""A task head that starts from class means: the means by hand, the classifier they give, and what
it is worth.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tolerances import CERTAIN, rounding
from toy import Lab, Spy, toy_task
from transformers import AutoModel

from fedspine.core.aggregation import Mean, Median, NormClip, TrimmedMean
from fedspine.core.device import FEWEST_OF_CLASS
from fedspine.core.errors import BadInput
from fedspine.core.privacy import Privacy
from fedspine.core.tensors import single
from fedspine.lm.load import load
from fedspine.lm.score import score
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine_plus import FedSpinePlus
from fedspine.pruning.head_start import (
    MARGIN,
    ClassMeans,
    MeansOrder,
    features,
    head_of,
    started,
)

HEAD = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}


@pytest.fixture(scope="module")
def mean_task(tiny_folder):
    """The toy task on the tiny BERT, whose classifier reads the mean of the tokens."""
    base, tokenizer = load(
        str(tiny_folder("bert")), kind="classification", classes=3, pooling="mean"
    )
    return toy_task(base, tokenizer, rounds=5)


@pytest.fixture
def lab_of(mean_task, tmp_path):
    """A function that builds a fleet over the toy task, closed after the test."""
    built = []

    def make(name="lab", **settings):
        built.append(Lab(mean_task, tmp_path / name, **settings))
        return built[-1]

    yield make
    for each in built:
        each.close()


@dataclasses.dataclass
class FakeReply:
    """A reply, as far as its value counts."""

    value: ClassMeans


def test_features_are_the_mean_of_the_true_tokens(mean_task, tiny_folder) -> None:
    rows = np.array([0, 7, 11])
    inputs = mean_task.train.batch(rows)
    inputs.pop("labels")
    found = features(mean_task.base, inputs)
    stock = AutoModel.from_pretrained(tiny_folder("bert"), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = stock(**inputs).last_hidden_state
    inside = inputs["attention_mask"].bool()
    expected = torch.stack([h[m].mean(0) for h, m in zip(hidden, inside, strict=True)])
    # two blocks of sums of at most 64 products each, of size 1: a few hundred roundings of 6e-8
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("method", [FedLora, FedSpinePlus])
def test_devices_send_the_means_of_their_own_classes(mean_task, lab_of, method) -> None:
    lab = lab_of()
    spy = Spy(lab.fleet)
    method = dataclasses.replace(method.toy(), head_start="class-means")
    state = method.start(mean_task, np.random.default_rng(0))
    lab.fleet.begin_round(0)
    method.round(state, spy)
    sums = {id: value for id, value in spy.results if isinstance(value, ClassMeans)}
    assert list(sums) == lab.ids
    for id, value in sums.items():
        # no device has more rows than a round trains on, so all count
        rows = lab.shares[lab.ids.index(id)]
        inputs = mean_task.train.batch(rows)
        labels = inputs.pop("labels")
        by_hand = features(mean_task.base, inputs)
        for label in range(3):
            own = by_hand[labels == label]
            assert value.counts[label] == len(own) >= FEWEST_OF_CLASS
            # fp16 on the wire: 11 bits
            found = single(value.means)["means"][label]
            torch.testing.assert_close(found, own.mean(0), atol=2e-3, rtol=2.0**-10)


def test_auto_starts_at_random_where_the_head_has_layers_of_its_own(task, tmp_path) -> None:
    lab = Lab(task, tmp_path / "lab")
    method = dataclasses.replace(FedLora.toy(), head_start="auto")
    method.check(task)
    lab.run(method, rounds=1)
    assert {row["work"] for row in lab.rows("exchange")} == {"tune_adapter"}
    lab.close()


def test_a_later_round_asks_for_nothing_more(mean_task, lab_of) -> None:
    lab = lab_of()
    method = dataclasses.replace(FedLora.toy(), head_start="auto")
    lab.run(method, rounds=2)
    asked = [row["work"] for row in lab.rows("exchange")]
    devices = len(lab.ids)
    assert asked == ["class_means"] * devices + ["tune_adapter"] * 2 * devices


def test_too_few_rows_of_a_class_say_nothing_of_it(mean_task, lab_of) -> None:
    lab = lab_of()
    labels = mean_task.train.labels
    rare = np.flatnonzero(labels == 2)[: FEWEST_OF_CLASS - 1]
    lab.shares[0][:] = np.resize(np.flatnonzero(labels == 0), len(lab.shares[0]))
    lab.shares[0][: len(rare)] = rare
    spy = Spy(lab.fleet.only(lab.ids[:1]))
    method = dataclasses.replace(FedLora.toy(), head_start="class-means")
    lab.fleet.begin_round(0)
    method.round(method.start(mean_task, np.random.default_rng(0)), spy)
    (value,) = (value for _, value in spy.results if isinstance(value, ClassMeans))
    assert value.counts.tolist() == [len(lab.shares[0]) - len(rare), 0, 0]
    assert not single(value.means)["means"][1:].any()


def test_the_head_finds_the_nearest_mean() -> None:
    rng = np.random.default_rng(0)
    means = torch.from_numpy(rng.normal(size=(3, 32)).astype(np.float32))
    counts = torch.tensor([10, 20, 30])
    halves = [FakeReply(ClassMeans(means={"means": means}, counts=counts // 2)) for _ in range(2)]
    head = head_of(HEAD, halves)
    weight, bias = head["classifier.weight"], head["classifier.bias"]
    points = torch.from_numpy(rng.normal(size=(200, 32)).astype(np.float32))
    nearest = torch.cdist(points, means).argmin(1)
    assert torch.equal((points @ weight.T + bias).argmax(1), nearest)
    mid = means.mean(0)
    own = ((means - mid) * weight).sum(1)
    assert float(own.mean()) == pytest.approx(MARGIN, rel=rounding(32))  # its width


def test_a_class_that_nobody_has_is_as_likely_as_the_mid() -> None:
    means = torch.eye(3, 32)
    counts = torch.tensor([4, 4, 0])
    head = head_of(HEAD, [FakeReply(ClassMeans(means={"means": means}, counts=counts))])
    assert not head["classifier.weight"][2].any() and head["classifier.bias"][2] == 0
    nobody = ClassMeans(means={"means": means}, counts=torch.tensor([4, 0, 0]))
    assert head_of(HEAD, [FakeReply(nobody)]) is HEAD


MEANS = torch.eye(3, 32)


def longer(means: torch.Tensor, times: float) -> FakeReply:
    return FakeReply(ClassMeans(means={"means": times * means}, counts=torch.tensor([9, 9, 9])))


@pytest.mark.parametrize("how", [TrimmedMean(), Median()], ids=lambda how: how.name)
def test_one_device_cannot_spoil_trimmed_means(how) -> None:
    honest = [longer(MEANS, times) for times in (0.9, 1.0, 1.1)]
    head = head_of(HEAD, [*honest, longer(MEANS, -1000.0)], how)
    expected = head_of(HEAD, [longer(MEANS, 0.95)])  # between 0.9 and 1
    torch.testing.assert_close(head, expected, rtol=rounding(32), atol=rounding(3))
    spoilt = head_of(HEAD, [*honest, longer(MEANS, -1000.0)])
    assert (MEANS @ spoilt["classifier.weight"].T + spoilt["classifier.bias"]).argmax(
        1
    ).tolist() != [0, 1, 2]


def test_a_class_that_too_few_devices_have_is_unknown_to_a_median() -> None:
    replies = [longer(MEANS, 1.0) for _ in range(3)]
    replies[0].value.counts[2] = 0
    head = head_of(HEAD, replies, Median())
    assert not head["classifier.weight"][2].any() and head["classifier.weight"][:2].any()


def test_class_means_are_bounded_by_the_median_norm(mean_task, lab_of) -> None:
    """One device of five sends means a thousand times as long; the head still finds the classes."""
    method, accuracy = dataclasses.replace(FedLora.toy(), head_start="class-means"), {}

    def attack(reply):
        if reply.device != "nx-02" or not isinstance(reply.value, ClassMeans):
            return reply
        long = {"means": -1000 * single(reply.value.means)["means"]}
        return dataclasses.replace(reply, value=dataclasses.replace(reply.value, means=long))

    for how in (Mean(), NormClip()):
        lab = lab_of(how.name, aggregation=how)
        start = method.start(mean_task, np.random.default_rng(0))
        head = started(method, start.head, Spy(lab.fleet, reply=attack), rows=128)
        state = dataclasses.replace(start, head=head)
        accuracy[how.name] = score(mean_task.base, method.deploy(state), mean_task.test).accuracy
        bounded = [
            row["values"]["device"] for row in lab.rows("note") if "bounded" in row["values"]
        ]
        assert ("nx-02" in bounded) == (how == NormClip())
    # three classes in equal parts: guesses are right in a third, but for five standard deviations
    guessed = 1 / 3 + CERTAIN * math.sqrt(2 / 9 / len(mean_task.test))
    assert accuracy["norm_clip"] > guessed > accuracy["mean"]


def test_it_begins_where_a_random_head_does_not(mean_task, lab_of) -> None:
    """Before anything is trained: a nearest-mean classifier on 300 rows beats chance, a third,
    beyond its noise.
    """
    found = {}
    for start in ("random", "class-means"):
        lab = lab_of(start)
        method = dataclasses.replace(FedLora.toy(), head_start=start, learning_rate=1e-9)
        found[start] = score(
            mean_task.base, method.deploy(lab.run(method, rounds=1)), mean_task.test
        ).accuracy
        # four standard errors of 90 rows at one in three: 0.2
    assert found["class-means"] > 1 / 3 + 0.2 and found["class-means"] > found["random"]


def test_each_device_is_asked_once_for_its_labels_and_a_resume_knows_them(lab_of) -> None:
    lab, spies = lab_of(kinds=("tx2", "nx", "agx")), []
    method = dataclasses.replace(FedLora.toy(), steps=2, head_weights="labels")
    after = lab.run(method, rounds=2, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    asked = [id for spy in spies for id, order in spy.orders if isinstance(order, MeansOrder)]
    assert sorted(asked) == sorted(lab.ids)
    names = {"classifier.weight", "classifier.bias"}
    for id, rows in zip(lab.ids, lab.shares, strict=True):
        shares = lab.fleet.server.row_shares[id]
        assert shares.keys() == names
        counts = np.bincount(lab.task.train.labels[rows], minlength=3)
        # of 32 rows drawn from these, by steps and batch: three standard errors of a share
        expected = torch.from_numpy(counts / counts.sum()).float()
        off = 3 * (0.25 / 32) ** 0.5
        torch.testing.assert_close(shares["classifier.bias"], expected, rtol=0, atol=off)
    lab.save(after)
    lab.close()
    again = lab_of(kinds=("tx2", "nx", "agx"))
    assert again.fleet.server.row_shares.keys() == set(lab.ids)


def test_labels_need_a_head_over_the_mean(task, mean_task) -> None:
    by_labels = dataclasses.replace(FedLora.toy(), head_weights="labels")
    by_labels.check(mean_task)
    with pytest.raises(BadInput, match='head_weights is "labels", which needs a head over'):
        by_labels.check(task)
    with pytest.raises(BadInput, match="unknown method.head_weights 'label'"):
        dataclasses.replace(FedLora.toy(), head_weights="label").check(mean_task)
    private = dataclasses.replace(
        mean_task, privacy=Privacy(level="rows", epsilon=1.0, delta=1e-5, clip=1.0, answers=2)
    )
    with pytest.raises(BadInput, match="counts of rows have no noise"):
        by_labels.check(private)


def test_another_readout_and_another_word_are_refused(task, mean_task) -> None:
    with pytest.raises(BadInput, match='task.pooling = "mean"'):
        dataclasses.replace(FedLora.toy(), head_start="class-means").check(task)
    with pytest.raises(BadInput, match="unknown method.head_start 'zero'"):
        dataclasses.replace(FedSpinePlus.toy(), head_start="zero").check(mean_task)
