"""FedSpine's controllers, sources of importance and late replies: each setting changes what it
should, and nothing else.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP32, ridge, rounding
from toy import Spy, bits, reached

from fedspine.control import controllers
from fedspine.control.bandit import Bandit, N, choose_plan, rewards
from fedspine.control.controllers import Deadline, Fixed, Oracle, SUcb, TextLoad
from fedspine.control.latency_model import (
    LIKE_THE_FLEET,
    LatencyModel,
    coefficients,
    coefficients_of,
    common_coefficients,
    no_evidence,
    observe,
    predicted,
)
from fedspine.control.plan import (
    Limits,
    Plan,
    PlanResult,
    fixed_plan,
    plans_for_deadline,
    random_plan,
)
from fedspine.core.device import Device, name_of
from fedspine.core.errors import BadInput
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.semi_async import SemiAsync
from fedspine.lm import importance_sources as sources
from fedspine.lm.forecast import forecast
from fedspine.lm.importance import magnitude_scores
from fedspine.lm.importance_sources import AtRandom, Blend, ByMagnitude, Gradient
from fedspine.lm.score import score
from fedspine.lm.structure import full, sparsity
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.fedspine_plus import FedSpinePlus
from fedspine.pruning.device import prune_and_tune

TOY = FedSpine.toy()
SOME = 3  # rounds, enough to warm up, prune and merge
RANDOM = controllers.Random()
SETTINGS = {  # each choice at least once
    "paper": {},
    "chance": {"controller": RANDOM, "importance": sources.RandomImportance()},
    "fixed": {"controller": Fixed(rank=4), "importance": sources.Magnitude()},
    "oracle": {"controller": Oracle(), "aggregation": "hetlora"},
    "shared": {"controller": Deadline(), "importance": Blend(), "aggregation": "flexlora"},
}
UNEQUAL = ("tx2", "tx2", "tx2", "agx", "agx")


def toy(**settings) -> FedSpine:
    return dataclasses.replace(TOY, **settings)


# laws of every method, for every setting


@pytest.mark.parametrize("name", ["chance", "fixed", "oracle", "shared"])
def test_resumed_equals_uninterrupted(name, lab):
    method, first = toy(**SETTINGS[name]), lab("killed")
    saved = first.run(method, rounds=2)
    first.save(saved)
    whole = first.run(method, rounds=SOME, state=saved)  # which a kill now makes forgotten
    first.close()
    assert bits(lab("killed").run(method, rounds=SOME)) == bits(whole)


@pytest.mark.parametrize("name", SETTINGS)
def test_learns_prunes_and_survives_losses(name, lab, task):
    method, bench = toy(**SETTINGS[name]), lab()
    method.check(task)
    state = bench.run(method, around=lambda fleet: Lossy(fleet, drop=0.2))
    assert any(row["values"].get("left_out") == "lost" for row in bench.rows("note"))
    model = method.deploy(state, bench.ids[0])
    layout = task.base.layout
    assert sparsity(layout, model.structure) == pytest.approx(reached(layout, 0.5))
    assert score(task.base, model, task.test).mean_loss < math.log(3)  # of one that knows nothing
    learns = {
        "chance": set(),
        "fixed": set(),
        "oracle": {TextLoad},
        "shared": {LatencyModel},
    }
    assert {type(each) for each in state.device_models.values()} == learns.get(name, {Bandit})


# who chooses

limits = st.builds(
    lambda sparsity, due, most, affordable: Limits(
        sparsity, due, 0.5, most, (2, 4, 8, 16), affordable
    ),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0.001, 1),
    st.integers(1, 4),
)


@given(limits, st.integers(0, 99), st.floats(0, 1), st.sampled_from([2, 4, 8, 16]))
def test_every_plan_keeps_to_schedule_and_memory(limits, seed, ratio, rank):
    rng = np.random.default_rng(seed)
    slow = plans_for_deadline(
        {"d": limits}, lambda id, sparsity, ranks: [1 - sparsity + r for r in ranks]
    )["d"]
    fixed = fixed_plan(limits, ratio, rank)
    for plan in (
        random_plan(limits, rng),
        fixed,
        choose_plan(Bandit(), limits, exploration=0.1, rng=rng),
        slow,
    ):
        assert max(limits.sparsity, min(limits.due, 0.5)) <= plan.sparsity <= 0.5
        gain, due = plan.sparsity - limits.sparsity, limits.due - limits.sparsity
        assert gain <= max(limits.most_per_round, due) + 1e-12
        assert plan.rank in limits.ranks[: limits.affordable]
        assert all(0 <= value <= 1 for value in (*plan.action, plan.progress))
    assert fixed.rank == min(rank, limits.ranks[limits.affordable - 1])


def test_random_takes_all_that_is_allowed_equally_often():
    limits, draws = Limits(0.1, 0.11, 0.5, 0.05, (4, 8, 16), 2), 2000
    plans = [random_plan(limits, np.random.default_rng(seed)) for seed in range(draws)]
    # four standard errors: of a share 1/2, and of the mean of a uniform draw from [0.11, 0.15]
    assert abs(np.mean([plan.rank == 8 for plan in plans]) - 0.5) < 4 * math.sqrt(0.25 / draws)
    assert abs(np.mean([plan.sparsity for plan in plans]) - 0.13) < 4 * 0.04 / math.sqrt(12 * draws)


def test_fixed_prunes_by_its_share_until_nothing_is_left():
    sparsity, path = 0.0, []
    for due in (0.0, 0.0, 0.0, 0.1, 0.1):
        plan = fixed_plan(Limits(sparsity, due, 0.12, 0.05, (4, 8), 2), 0.5, 8)
        sparsity = plan.sparsity
        path.append(sparsity)
    assert path == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.12])
    assert fixed_plan(Limits(0.1, 0.12, 0.5, 0.05, (4, 8), 2), 0.0, 4).sparsity == pytest.approx(
        0.12
    )
    assert fixed_plan(Limits(0.1, 0.05, 0.5, 0.05, (4, 8), 2), 0.0, 4).sparsity == 0.1


def test_fixed_uses_its_rank_from_the_first_round(lab):
    bench = lab()
    bench.run(toy(controller=Fixed(rank=4)), rounds=2)
    assert {row["values"]["rank"] for row in bench.rows("note")} == {4}


# the deadline


@given(
    st.lists(st.lists(st.floats(0.1, 9), min_size=6, max_size=6), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_plans_end_by_the_barrier_at_the_largest_rank(times, slack):
    times = {
        str(i): np.array(table).reshape(2, 3) for i, table in enumerate(times)
    }  # [least or most pruning, ranks]
    limits = {id: Limits(0.0, 0.0, 0.5, 0.05, (2, 4, 8), 3) for id in times}

    def foresee(
        id, sparsity, ranks
    ):  # the most pruning at once, or none: in between as if there was none
        return list(times[id][int(sparsity == 0.05)])

    earliest = max(table.min() for table in times.values())
    leisure = max(table[0, 2] for table in times.values())
    deadline = earliest + slack * max(0.0, leisure - earliest)
    plans = plans_for_deadline(limits, foresee, slack)
    for id, plan in plans.items():
        row, column = int(plan.sparsity == 0.05), (2, 4, 8).index(plan.rank)
        assert times[id][row, column] <= deadline
        assert (times[id][:, column + 1 :] > deadline).all(), "a larger rank would have fitted"
        assert row == 0 or times[id][0, column] > deadline, "less pruning would have done"


def test_a_margin_never_raises_a_rank():
    limits = {id: Limits(0.0, 0.0, 0.5, 0.05, (2, 4, 8), 3) for id in ("slow", "fast")}

    def foresee(id, sparsity, ranks):
        return [(3.0 if id == "slow" else 1.0) * (1 - sparsity + 0.2 * rank) for rank in ranks]

    ranks = {
        margin: plans_for_deadline(limits, foresee, 0.0, margin)["fast"].rank
        for margin in (0.0, 0.9, 9.0)
    }
    # by hand: the slow one ends at 3 * (0.95 + 0.4) = 4.05; rank 8 takes 2.55, rank 4 with 0.05
    # pruned 1.75
    assert ranks == {0.0: 8, 0.9: 4, 9.0: 2}
    assert (
        plans_for_deadline(limits, foresee, 0.0, 9.0)["slow"]
        == plans_for_deadline(limits, foresee)["slow"]
    )


def waiting_share(bench) -> float:
    return sum(row["waiting_seconds"] for row in bench.rows("round")) / bench.fleet.now


def test_the_oracle_waits_less_than_chance(lab, task):
    shares, means = {}, {}
    for controller in (Oracle(), RANDOM):
        bench = lab(controller.name, kinds=UNEQUAL)
        bench.run(toy(controller=controller), rounds=SOME)
        shares[controller.name] = waiting_share(bench)
        means[controller.name] = np.mean([row["values"]["rank"] for row in bench.rows("note")])
    assert shares["oracle"] < shares["random"]
    assert means["oracle"] > means["random"]  # not by making everything small


JITTER = {"compute_jitter": 0.05}


def test_foreseen_seconds_are_those_that_the_exchange_takes_but_for_its_jitter(lab, task):
    calm = {"link_jitter": 0.0, "compute_jitter": 0.0}
    ran, jittered, asked = (
        lab("ran", **calm),
        lab("jittered", **calm | JITTER),
        lab("asked", **calm),
    )
    for bench in (ran, jittered):
        bench.run(TOY, rounds=1)
    launches = TOY.steps * task.base.layout.layers
    for row, other in zip(ran.rows("exchange"), jittered.rows("exchange"), strict=True):
        cost = {key: row[key] for key in ("flops", "bytes_down", "bytes_up")}
        known = asked.fleet.foresee(row["device"], launches=launches, **cost)
        assert known == row["seconds"] != other["seconds"]
        assert jittered.fleet.foresee(row["device"], launches=launches, **cost) == known
    with pytest.raises(LookupError, match="not in this part"):
        asked.fleet.only(["tx2-00"]).foresee("nx-02", flops=0, launches=0, bytes_down=0, bytes_up=0)


def test_the_oracle_knows_what_a_plan_will_cost(lab, task):
    bench, method, spies = lab(), toy(controller=Oracle()), []
    state = bench.run(method, rounds=3)
    bench.fleet.begin_round(3)
    after = method.round(state, spies.append(Seer(bench.fleet)) or spies[0])
    rows = {row["device"]: row for row in bench.rows("exchange") if row["round"] == 3}
    ranks = {
        row["values"]["device"]: row["values"]["rank"]
        for row in bench.rows("note")
        if row["round"] == 3
    }
    for id, order in spies[0].orders:
        (cost,) = forecast(
            state.layout,
            state.structures[id],
            method._frame(state),
            sparsity=order.sparsity,
            target=0.5,
            ranks=[ranks[id]],
            load=state.device_models[id].load,
        )
        row = rows[id]
        # numbers of more or fewer digits in the header
        assert abs(cost.bytes_down - row["bytes_down"]) < 100
        assert abs(cost.bytes_up - row["bytes_up"]) < 1000
        # only how long this round's texts are is not known before
        read = after.device_models[id].load / state.device_models[id].load
        assert cost.flops * read == pytest.approx(row["flops"])


class Seer(Spy):
    """A spy on a fleet that foresees."""

    def foresee(self, device, **cost):
        return self._fleet.foresee(device, **cost)


class Blind:
    """A fleet of which nobody knows the truth."""

    def __init__(self, fleet):
        self.devices, self.note, self.now, self.wait = (
            fleet.devices,
            fleet.note,
            fleet.now,
            fleet.wait,
        )

    def ask(self, work, orders, **limits):
        raise AssertionError("nothing may be asked")

    def foresee(self, device, **cost):
        return None


@pytest.mark.parametrize(
    "around", [Blind, lambda fleet: Lossy(Blind(fleet))], ids=["blind", "lossy"]
)
def test_an_oracle_needs_a_fleet_that_foresees(lab, around):
    with pytest.raises(BadInput, match="controller is oracle, but only a simulated fleet"):
        lab().run(toy(controller=Oracle()), around=around)


def test_losses_let_the_truth_through_with_their_mean_delay(lab):
    fleet, cost = lab().fleet, {"flops": 1e12, "launches": 3, "bytes_down": 1000, "bytes_up": 1000}
    lossy = Lossy(fleet, delay_seconds=0.5)
    assert lossy.only(["nx-02"]).foresee("nx-02", **cost) == fleet.foresee("nx-02", **cost) + 0.5


# times learnt from reports

TRUE = {
    "a": (1.0, 3.0, 0.5),
    "b": (4.0, 1.0, 0.2),
    "c": (2.0, 9.0, 1.0),
}  # seconds of computing per 1 - sparsity, rank, round
MEGABYTES = (0.0, 2.0, 0.5)  # likewise, of every device
LINKS = {"a": 1.0, "b": 4.0, "c": 0.5}  # seconds of a megabyte


def observed(before, cost, link, *, sparsity, rank, discount=1.0):
    """The evidence after a round of a device that computes and sends at these costs."""
    megabytes = predicted(np.array(MEGABYTES), sparsity=sparsity, rank=rank)
    computing = predicted(np.array(cost), sparsity=sparsity, rank=rank)
    return observe(
        before,
        sparsity=sparsity,
        rank=rank,
        seconds=computing + link * megabytes,
        compute_seconds=computing,
        bytes=round(1e6 * megabytes),
        discount=discount,
    )


def reports(device, plays):
    rng, evidence = np.random.default_rng([len(device), ord(device)]), no_evidence()
    for _ in range(plays):
        s, r = rng.uniform(0, 0.5), rng.choice([0.25, 0.5, 0.75, 1.0])
        evidence = observed(evidence, TRUE[device], LINKS[device], sparsity=s, rank=r)
    return evidence


def truth(cost, link):
    return np.array(cost) + link * np.array(MEGABYTES)


def test_known_coefficients_are_recovered():
    learnt = {device: reports(device, 1000) for device in TRUE}
    largest = 2 * max(np.linalg.norm(cost) for cost in TRUE.values())
    for device, found in coefficients_of(learnt, TRUE).items():
        # ridge regression is off by at most prior / (prior + least eigenvalue) of the distance to
        # where it is drawn to, a multiple of the common ones that takes this device as long
        gram = learnt[device][:3, :3]
        allowed = LIKE_THE_FLEET / (LIKE_THE_FLEET + np.linalg.eigvalsh(gram)[0]) * largest
        # a link that never varies is known as well as its logarithm's sum of squares is: 1e-4
        allowed += 1e-4 * LINKS[device] * np.linalg.norm(MEGABYTES)
        assert allowed < 0.5
        assert np.linalg.norm(found - truth(TRUE[device], LINKS[device])) <= allowed


def test_a_device_alone_is_fitted_exactly_and_follows_a_change():
    evidence, cost = reports("a", 50), np.array(TRUE["a"])
    gram = evidence[:3, :3]

    def computing(evidence):
        everything = (evidence[None, :3, :3], evidence[None, :3, 3])
        return coefficients(*everything, common_coefficients(*everything))[0]

    assert np.linalg.norm(computing(evidence) - cost) <= ridge(gram, cost)
    # from then on everything takes four times as long, at any of these plans
    before = evidence
    for turn in range(80):
        s, r = 0.1 * (turn % 5), 0.25 * (1 + turn % 4)
        evidence = observed(evidence, 4 * cost, 4.0, sparsity=s, rank=r, discount=0.9)
    # the old evidence is left with 0.9^80 = 0.0002 of its say: so much of three times the truth is
    # missing
    gram = evidence[:3, :3]
    missing = 3 * 0.9**80 * before[:3, :3] @ cost
    expected = 4 * cost - np.linalg.solve(gram, missing)
    assert np.linalg.norm(expected / cost - 4) < 0.05
    assert np.linalg.norm(computing(evidence) - expected) <= ridge(gram, expected)
    total = coefficients_of({"a": evidence}, ["a"])["a"]
    assert total == pytest.approx(truth(4 * cost, 4.0), rel=0.05)


def test_what_work_costs_is_learnt_though_slow_devices_are_given_less():
    """Five devices of a hundredfold range of speeds, the slower the less they ran; across devices
    more of the model seems to take less time.
    """
    usual, learnt, rng = np.array([2.0, 3.0, 0.5]), {}, np.random.default_rng(0)
    speeds = (0.1, 0.3, 1.0, 3.0, 10.0)
    for i, speed in enumerate(speeds):
        evidence = no_evidence()
        for _ in range(10):
            s, r = rng.uniform(0.15 * i, 0.15 * i + 0.3), rng.uniform(0.1, 1 - 0.15 * i)
            evidence = observed(evidence, speed * usual, speed, sparsity=s, rank=r)
        learnt[str(speed)] = evidence
    everybody = sum(learnt.values())
    across = np.linalg.lstsq(everybody[:3, :3], everybody[:3, 3], rcond=None)[0]
    assert across[0] < 0
    for speed, found in coefficients_of(learnt, learnt).items():
        for s, r in ((0.0, 1.0), (0.0, 0.1), (0.6, 1.0), (0.6, 0.1)):
            # what the iterations leave of where they began, that all three cost the same
            assert predicted(found, sparsity=s, rank=r) == pytest.approx(
                float(speed) * predicted(truth(usual, 1.0), sparsity=s, rank=r), rel=0.02
            )


def test_of_one_round_the_bytes_tell_what_a_rank_costs():
    """Devices that were seen once, all unpruned: most of the time is the link's."""
    learnt = {
        device: observed(no_evidence(), (0.0, 0.0, 0.1), link, sparsity=0.0, rank=rank)
        for device, link, rank in (("a", 10.0, 0.25), ("b", 10.0, 1.0), ("c", 10.0, 0.5))
    }
    found = coefficients_of(learnt, ["a", "new"])
    for device in ("a", "new"):
        for rank in (0.25, 1.0):
            # of the 0.1 s of computing nobody can tell yet how much is the rank's
            assert predicted(found[device], sparsity=0.0, rank=rank) == pytest.approx(
                0.1 + 10 * predicted(np.array(MEGABYTES), sparsity=0.0, rank=rank), abs=0.1
            )


def test_a_device_of_which_little_is_known_is_slow_or_fast_in_everything():
    learnt = {device: reports(device, 50) for device in "ab"}
    moments = np.stack(list(learnt.values()))
    common = common_coefficients(moments[:, :3, :3], moments[:, :3, 3])
    slow = observed(no_evidence(), 5 * common, 1.0, sparsity=0.0, rank=0.25)
    found = coefficients(slow[:3, :3], slow[:3, 3], common)
    assert found.tolist() == pytest.approx((5 * common).tolist())


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.floats(0.1, 1), st.floats(0, 100), st.integers(0, 10**9)),
        max_size=8,
    )
)
def test_more_work_never_takes_less_time(plays):
    own = no_evidence()
    for s, r, seconds, bytes in plays:
        own = observe(
            own,
            sparsity=s,
            rank=r,
            seconds=seconds,
            compute_seconds=seconds / 2,
            bytes=bytes,
            discount=0.95,
        )
    known = {"a": reports("a", 3)} | ({"own": own} if plays else {})
    for found in coefficients_of(known, ["own", "new"]).values():
        assert (found >= 0).all() and np.isfinite(found).all()


def test_what_an_earlier_version_kept_is_passed_over():
    old, cost = np.ones((3, 4)), {"seconds": 2.0, "compute_seconds": 1.0, "bytes": 10}
    assert coefficients_of({"a": old}, ["a"])["a"].tolist() == [0.0, 0.0, 0.0]
    again = observe(old, sparsity=0.0, rank=1.0, discount=0.9, **cost)
    assert (again == observe(no_evidence(), sparsity=0.0, rank=1.0, discount=0.9, **cost)).all()


def test_times_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite seconds"):
        observe(
            no_evidence(),
            sparsity=0.0,
            rank=1.0,
            seconds=math.nan,
            compute_seconds=0.0,
            bytes=1,
            discount=1.0,
        )


def test_the_deadline_sees_nothing_but_reported_times(lab):
    """Twice the same run, once with every reported time of one device ten times as long: it gets a
    smaller rank.
    """

    def slower(reply):
        times = 10 if reply.device == "nx-03" else 1
        return dataclasses.replace(
            reply, cost=dataclasses.replace(reply.cost, seconds=times * reply.cost.seconds)
        )

    ranks = {}
    for name, change in (("as-is", lambda reply: reply), ("slow", slower)):
        bench = lab(name)
        bench.run(
            toy(controller=Deadline(latency_margin=0.0)),
            rounds=4,
            around=lambda fleet, change=change: Spy(fleet, reply=change),
        )
        # from the third round on: how much of a first time was the rank's, nobody can tell
        notes = [
            row
            for row in bench.rows("note")
            if row["round"] > 1 and row["values"]["device"] == "nx-03"
        ]
        ranks[name] = [row["values"]["rank"] for row in notes]
    assert max(ranks["slow"]) < max(ranks["as-is"]) == TOY.ranks[-1]


# rewards


def result(seconds, gain, importance, progress) -> PlanResult:
    plan = Plan(sparsity=0.1, rank=4, action=(0.3, 0.4), progress=progress)
    return PlanResult(
        plan=plan, seconds=seconds, gain=gain, importance=importance, effective_rank=1.0
    )


BASE = {"a": result(1.0, 0.2, 0.5, 0.5), "b": result(3.0, -0.1, 1.0, 0.2)}


def test_rewards_compare_the_devices_of_a_round():
    earned, scale = rewards(BASE, 0.1)
    # the median of 0.2 and 0.1 enters the scale with a weight of 0.1: 0.9 * 0.1 + 0.1 * 0.15
    assert scale == pytest.approx(0.105)
    # both are half of the mean of two seconds away from it, and the largest importance counts 1
    for id, (gain, progress, importance) in {"a": (0.2, 0.5, 0.5), "b": (-0.1, 0.2, 1.0)}.items():
        quality = 0.5 * (1 + math.tanh(gain / (2 * (scale + 1e-3))))
        assert earned[id] == pytest.approx((quality + progress + importance) / 3 / 1.5)


def test_only_the_bandit_is_credited():
    earned, _ = rewards(BASE, 0.1)
    bandits = SUcb().learn({}, BASE, earned, 8)
    assert {id: each.leaves[:, N].sum() for id, each in bandits.items()} == {"a": 1.0, "b": 1.0}
    assert RANDOM.learn({}, BASE, earned, 8) == {}
    timed = Deadline().learn({}, BASE, earned, 8)
    assert timed["a"].evidence.any()
    # a device that did not reply keeps what was known of it
    assert Deadline().learn(timed, {"b": BASE["b"]}, earned, 8)["a"] is timed["a"]


# importance and aggregation


def order(task, **settings):
    method = toy(**settings)
    state = method.start(task, np.random.default_rng(0))
    return method._order(state, "d", Plan(sparsity=0.3, rank=4, action=None, progress=0.0))


def device(task, memory, seed=0):
    return Device(
        id="d", data=task.train, base=task.base, memory=memory, rng=np.random.default_rng(seed)
    )


def test_magnitude_importance_drops_the_smallest_weights(task):
    sent, one = order(task, importance=sources.Magnitude()), device(task, {})
    assert type(sent.scoring) is ByMagnitude
    first = prune_and_tune(one, sent)
    known = one.memory["scores"]
    # what it knows are the norms of its tuned weights; the result holds their adapter in fp16, off
    # by 2^-11 of each factor
    assert known.heads.shape == first.scores.heads.shape
    again = prune_and_tune(one, sent)
    for kept, scores in (
        (again.structure.heads, known.heads),
        (again.structure.channels, known.channels),
    ):
        for row, values in zip(kept, scores, strict=True):
            if not row.all():
                assert values[~row].max() <= values[row].min()
    dense = magnitude_scores(
        task.base, dataclasses.replace(_start_model(task), structure=full(task.base.layout))
    )
    assert (
        torch.corrcoef(torch.stack([dense.channels.flatten(), known.channels.flatten()]))[0, 1]
        > 0.5
    )


def _start_model(task):
    return TOY.deploy(TOY.start(task, np.random.default_rng(0)))


def test_random_importance_is_the_devices_own_draw(task):
    sent = order(task, importance=sources.RandomImportance())
    assert type(sent.scoring) is AtRandom
    same, again, other = (device(task, {}, seed) for seed in (0, 0, 1))
    for each in (same, again, other):
        prune_and_tune(each, sent)
    assert torch.equal(same.memory["scores"].channels, again.memory["scores"].channels)
    assert not torch.equal(same.memory["scores"].channels, other.memory["scores"].channels)


@pytest.mark.parametrize(
    "importance",
    [
        sources.Magnitude(),
        sources.RandomImportance(),
        sources.Activation(),
        sources.Gate(),
        Blend(),
    ],
    ids=lambda importance: importance.name,
)
def test_importance_does_not_touch_what_is_trained(task, importance):
    plain, other = (
        prune_and_tune(device(task, {}), order(task, importance=how))
        for how in (Gradient(), importance)
    )
    assert bits(plain.adapter) == bits(other.adapter) and bits(plain.head) == bits(other.head)
    assert not torch.equal(plain.scores.channels, other.scores.channels)


def test_one_device_makes_weights_meaningless(lab):
    methods = [toy(aggregation=how) for how in ("zeropad", "hetlora")]
    labs, state = [lab(how, kinds=("agx",)) for how in ("zeropad", "hetlora")], None
    for rounds in (1, 2):
        runs = [
            bench.run(method, rounds=rounds, state=state)
            for bench, method in zip(labs, methods, strict=True)
        ]
        for name, tensor in runs[0].adapter.items():
            # a weighted mean of one value is x * w / w: two roundings in each
            torch.testing.assert_close(runs[1].adapter[name], tensor, rtol=4 * FP32, atol=0)
        state = runs[0]  # both train on from the same bits, as AdamW makes steps of rounding


def test_the_first_mean_of_changes_is_the_mean_of_products(lab):
    """B starts at zero, so what a device changed is what it has; a round later it is not."""
    methods = [toy(aggregation=how) for how in ("delta-product", "flexlora")]
    labs, runs = [lab("delta-product"), lab("flexlora")], [None, None]
    for rounds, same in ((1, True), (2, False)):
        runs = [
            bench.run(method, rounds=rounds, state=state)
            for bench, method, state in zip(labs, methods, runs, strict=True)
        ]
        for path, dense in runs[0].dense.items():
            # products of ranks up to 8 before and after, of five devices
            off = rounding(2 * 8 * 5, float(dense.abs().max()))
            apart = float((dense - runs[1].dense[path]).abs().max())
            assert apart <= off if same else apart > 1000 * off


def test_hetlora_weighs_by_norm(lab):
    runs = {how: lab(how).run(toy(aggregation=how), rounds=2) for how in ("zeropad", "hetlora")}
    # the second round starts from another adapter
    assert bits(runs["zeropad"].head) != bits(runs["hetlora"].head)
    assert bits(runs["zeropad"].adapter) != bits(runs["hetlora"].adapter)
    assert bits(runs["zeropad"].dense) == bits(runs["hetlora"].dense)  # which neither uses


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"controller": Fixed(rank=5)},
            "controller.rank is 5, but one of method.ranks was expected",
        ),
        ({"controller": Fixed(rank=4, ratio=1.5)}, "controller.ratio is 1.5, but 0 to 1"),
        ({"controller": Deadline(deadline_slack=-0.1)}, "controller.deadline_slack is -0.1, but 0"),
        ({"controller": Deadline(latency_margin=-0.1)}, "controller.latency_margin is -0.1"),
        ({"controller": Oracle(deadline_slack=2.0)}, "controller.deadline_slack is 2.0, but 0 to"),
        ({"controller": SUcb(exploration=math.nan)}, "controller.exploration is nan"),
        ({"sparsity": 0.0, "warmup": 0.8}, "warmup < until"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        toy(**settings).check(task)


# --- rounds that do not wait for everybody ---


@pytest.mark.parametrize("quorum", [1.0, 0.7, 0.4])
def test_a_round_ends_at_its_quorum(lab, quorum):
    """As long as the slowest of those it waits for; the late ones are merged in a later round, each
    once.
    """
    here, work = lab(f"quorum-{quorum}"), name_of(prune_and_tune)

    def around(fleet):
        return SemiAsync(fleet, quorum=quorum, late_work=work, in_flight=fleet.in_flight)

    here.run(TOY, rounds=4, around=around)
    spent = here.rows("exchange")
    ends = [row["now"] for row in here.rows("round")]
    began = [0.0, *ends[:-1]]
    for round, (start, end) in enumerate(zip(began, ends, strict=True)):
        asked = sorted(row["seconds"] for row in spent if row["round"] == round)
        assert end - start == pytest.approx(asked[math.ceil(quorum * len(asked)) - 1])
    merged = [
        (note["values"]["device"], note["round"])
        for note in here.rows("note")
        if "reward" in note["values"]
    ]
    assert len(merged) + len(here.fleet.in_flight) == len(spent)
    assert bool(here.fleet.in_flight) == (quorum < 1)


def test_nobody_is_credited_for_a_late_reply(lab):
    """Its reward would be that of a plan for another round's barrier."""
    here, work = lab(), name_of(prune_and_tune)

    def around(fleet):
        return SemiAsync(fleet, quorum=0.4, late_work=work, in_flight=fleet.in_flight)

    here.run(toy(warmup=0.0, controller=RANDOM), rounds=4, around=around)
    sent = {
        (row["device"], row["started"] + row["seconds"]): row["round"]
        for row in here.rows("exchange")
    }
    rewarded = [n for n in here.rows("note") if n["values"].get("reward") is not None]
    merged = [n for n in here.rows("note") if "reward" in n["values"]]

    def late(note):
        times = [end for id, end in sent if id == note["values"]["device"] and end <= note["now"]]
        return sent[note["values"]["device"], max(times)] < note["round"]

    assert any(map(late, merged)) and rewarded and not any(map(late, rewarded))


def test_without_what_it_adds_fedspine_plus_is_fedspine(lab):
    paper = {
        "controller": TOY.controller,
        "importance": TOY.importance,
        "aggregation": TOY.aggregation,
        "head_start": "random",
    }
    plus = dataclasses.replace(FedSpinePlus.toy(), global_importance_weight=0.0, **paper)
    states = [lab("plus").run(plus, rounds=SOME), lab("paper").run(TOY, rounds=SOME)]
    # of an order the weight 0.0 is written down in either case, so even the clocks agree
    assert bits(states[0]) == bits(states[1])
