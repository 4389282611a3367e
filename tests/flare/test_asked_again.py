"""What a server learns by asking a site repeatedly: the noise of answers about the same rows grows,
whatever differs between the orders, and no number beside the weights reveals a single row.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hostile_server import ROWS, few_rows
from toy import toy_rows

from fedspine.core.device import Call, name_of
from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.core.noise import MOST_LOSS, grown
from fedspine.core.tensors import half, single
from fedspine.flare.site_disk import MEMORY
from fedspine.flare.site_noise import ANSWERED, site_noise
from fedspine.flare.site_privacy import FOLDER
from fedspine.flare.site_terms import AllowSection
from fedspine.flare.site_worker import SiteWorker
from fedspine.flare.wire import SiteAnswer, SiteOrder, as_array
from fedspine.lm.lora import fresh
from fedspine.lm.structure import full, shrink
from fedspine.methods.fedadapter import BRANCHES, score_branches
from fedspine.methods.fedlora import tune_adapter
from fedspine.methods.pyramidfl import train_and_thin
from fedspine.pruning.device import prune_and_tune
from fedspine.pruning.head_start import MeansOrder, class_means, features
from fedspine.split.label_distribution import LabelQuery, label_distribution
from fedspine.storage.store import unsealed

SHARE, RARE = AllowSection().noise, AllowSection().fewest_of_class
OFTEN = AllowSection().answers * ROWS / 32  # answers about all rows before noise grows
TIMES = 20
EVERY = {"steps": 8, "batch": ROWS}  # all rows of the site in each step
PLAIN = {"noise": 0.0, "fewest_of_class": 1}  # terms of a site without those that are tested here


def answered(site, work, order, **more):
    """The site's whole answer."""
    asked = {"seed": (0, 0, 0), "memory": None, "version": 1} | more
    message = SiteOrder(
        run=site.run, work=name_of(work), order=as_array(pack(order).payload), round=0, needed=(),
        **asked,
    )  # fmt: skip
    came = site.sent(message)
    assert isinstance(came, SiteAnswer), came
    return came


def share_of(site, order, **more):
    return answered(site, tune_adapter, order, **more).noise


# --- the count ---


def test_every_further_answer_about_the_same_rows_has_more_noise(hostile):
    """Noise grows whatever differs: seed, weights, rank, run, method, length of texts."""
    site = hostile().opened("fedlora")
    order = site.lora(**EVERY)
    wider = half(fresh(site.base.layout.sites, 8, np.random.default_rng(1)))
    came = [share_of(site, order)]
    came.append(share_of(site, order, seed=(0, 0, 1)))
    came.append(share_of(site, replace(order, scale=2.001)))
    came.append(share_of(site, replace(order, adapter=wider)))
    came.append(share_of(site.opened("flexlora"), order, seed=(0, 0, 2)))
    came.append(share_of(site.opened("fedlora", max_tokens=9), order))
    site.worker = SiteWorker(site.site, site.folder)  # a restarted worker
    came.append(share_of(site.opened("fedlora"), order, seed=(0, 0, 3)))
    first = SHARE * (32 / ROWS) ** 0.25
    assert came == pytest.approx([first * grown(n + 1, OFTEN) for n in range(len(came))])


def test_class_means_and_accuracies_count_as_answers_too(hostile):
    site = hostile().opened("fedlora")
    for seed in (1, 2):
        site.ask(class_means, MeansOrder(rows=ROWS), seed=(0, 0, seed))
    assert share_of(site, site.lora(**EVERY)) == pytest.approx(
        SHARE * (32 / ROWS) ** 0.25 * grown(3, OFTEN)
    )


def test_the_same_order_has_the_same_answer_and_counts_once(hostile):
    site = hostile().opened("fedlora")
    orders = [site.lora(**EVERY, learning_rate=rate) for rate in (0.01, 0.02)]
    came = [answered(site, tune_adapter, order) for order in orders]
    site.worker = SiteWorker(site.site, site.folder)
    site.opened("fedlora")
    again = [answered(site, tune_adapter, order) for order in reversed(orders)]
    # but for the seconds, which the second answer took anew
    came, again = ([pack(replace(a, compute_seconds=0.0)).payload for a in each]
                   for each in (came, again[::-1]))  # fmt: skip
    assert again == came


def test_answers_with_unlike_shares_of_noise_never_share_its_draws(hostile):
    """Two answers to one order with different shares of the same noise would reveal the noise."""
    site = hostile().opened("fedlora")
    order = site.lora(**EVERY)
    one = unpack(answered(site, tune_adapter, order).result.tobytes())
    (site.folder / FOLDER / ANSWERED).unlink()
    for seed in (1, 2):
        share_of(site, order, seed=(0, 0, seed))
    two = unpack(answered(site, tune_adapter, order).result.tobytes())
    plain = hostile("plain", allow=PLAIN)
    plain.worker = SiteWorker(plain.site, plain.folder, site.worker._secret)
    bare = plain.opened("fedlora").ask(tune_adapter, order)
    sent = bare.adapter.items()
    drawn = [
        torch.cat([(got.adapter[name].float() - own.float()).flatten() for name, own in sent])
        for got in (one, two)
    ]
    likeness = torch.nn.functional.cosine_similarity(*drawn, dim=0)
    # of independent draws it is below four deviations, 1 / root of their number, times the
    # unevenness of sizes, which halves their number at most
    assert abs(likeness) < 4 * (2 / len(drawn[0])) ** 0.5


def test_a_damaged_count_stops_answers(hostile):
    site = hostile().opened("fedlora")
    order = site.lora(**EVERY)
    share_of(site, order)
    path = site.folder / FOLDER / ANSWERED
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(bytes(flipped))
    assert site.ask(tune_adapter, order, seed=(0, 0, 1)).reason == "work failed"


def test_the_best_average_of_many_answers_keeps_the_noise_that_the_terms_say(hostile):
    """The attack: the same question 20 times. Answers are already weighted by inverse variance, so
    the best average is that of the sum. Without growth 1 / 4.5 of the noise of one would be left.
    """
    site = hostile().opened("fedlora")
    plain = hostile("plain", allow=PLAIN).opened("fedlora")
    order = site.lora(**EVERY, learning_rate=1e-4)

    def changed(got):
        after, before = single(got.adapter), single(order.adapter)
        return {n: after[n] - before[n] for n in before if n.endswith(".lora_B")}

    clean = changed(plain.ask(tune_adapter, order))
    weights = sum(grown(n + 1, OFTEN) ** -2.0 for n in range(TIMES))
    came = [changed(site.ask(tune_adapter, order, seed=(0, 0, n))) for n in range(TIMES)]
    left, size = 0.0, 0.0
    for name, own in clean.items():
        mean = sum(each[name] for each in came) / weights
        left += float((mean - own).square().sum())
        size += float(own.square().sum())
    share = SHARE * (32 / ROWS) ** 0.25 / weights**0.5
    assert share > 1.5 * SHARE * (32 / ROWS) ** 0.25 / TIMES**0.5
    # at least, since the noise of an entry follows the larger of its row and its column
    assert share * 0.9 < (left / size) ** 0.5 < share * 1.6


# --- numbers that are no weights ---


@pytest.fixture
def one_of_a_class():
    """Rows with a single one of the last class, and its place."""
    rows = toy_rows(ROWS + 40, 0)
    alone = np.flatnonzero(rows.labels == 2)[:1]
    keep = np.concatenate([np.flatnonzero(rows.labels != 2)[: ROWS - 1], alone])
    return replace(rows, texts=tuple(rows.texts[i] for i in keep), labels=rows.labels[keep])


def place_of(site):
    """The class of the site's last row."""
    return int(site.worker._open.holding.examples.labels[-1])


def test_the_mean_of_a_class_with_one_row_is_withheld(hostile, one_of_a_class):
    """The attack: it is that row's features, and a search for the nearest row finds it."""
    plain = hostile("plain", rows=one_of_a_class, allow=PLAIN).opened("fedlora")
    came = plain.ask(class_means, MeansOrder(rows=ROWS))
    place = place_of(plain)
    assert nearest(plain, came.means["means"][place].float()) == ROWS - 1
    site = hostile(rows=one_of_a_class).opened("fedlora")
    for rows in range(32, ROWS + 1):
        means = site.ask(class_means, MeansOrder(rows=rows))
        assert means.counts[place] == 0
        assert not means.means["means"][place].any()
        assert all(count == 0 or count >= RARE // 2 for count in means.counts.tolist())


def nearest(site, found):
    """The place of the row whose features are nearest."""
    return int((features_of(site) - found).norm(dim=1).argmin())


def features_of(site):
    examples = site.worker._open.holding.examples
    inputs = examples.batch(np.arange(len(examples)))
    inputs.pop("labels")
    return features(site.base, inputs)


def test_the_difference_of_two_class_means_tells_no_row(hostile):
    """The attack: sums over all rows, and over all but one, differ by that row's features."""
    found = {}
    for name, allow in (("plain", PLAIN), ("site", {})):
        site = hostile(name, allow=allow).opened("fedlora")
        sums, counts = [], []
        for rows in (ROWS, ROWS - 1):
            came = site.ask(class_means, MeansOrder(rows=rows))
            counts.append(came.counts)
            sums.append(came.means["means"].float() * came.counts[:, None])
        gone = counts[0] - counts[1]
        found[name] = gone.abs().sum() == 1, nearest(site, (sums[0] - sums[1])[gone.argmax()])
        own = features_of(site)
        # the missing row's features, with noise
        error = (own - (sums[0] - sums[1])[gone.argmax()]).norm(dim=1).min() / own.std(0).norm()
        assert (error < 1) == (name == "plain"), (name, error)
    assert found["plain"][0]


def test_counts_of_classes_are_not_exact_and_keep_the_terms(hostile, one_of_a_class):
    exact = hostile("plain", rows=one_of_a_class, allow=PLAIN | {"methods": ["mergesfl"]})
    site = hostile(rows=one_of_a_class, allow={"methods": ["mergesfl", "fedlora"]})
    shares = [
        each.opened("mergesfl").ask(label_distribution, LabelQuery(classes=3, longest=16)).shares
        for each in (exact, site)
    ]
    place = place_of(site)
    assert shares[0][place] == pytest.approx(1 / ROWS)
    assert shares[1][place] == 0
    assert shares[1].sum() == pytest.approx(1.0)
    site.opened("fedlora")
    reported = np.stack(
        [
            site.ask(class_means, MeansOrder(rows=ROWS), seed=(0, 0, n)).counts.numpy()
            for n in range(12)
        ]
    )
    own = np.bincount(site.worker._open.holding.examples.labels, minlength=3)
    assert reported.sum(1).max() <= ROWS
    assert len(np.unique(reported[:, own.argmax()])) > 3  # with noise of 8 rows and more
    assert not reported[:, own < RARE].any()


def test_losses_accuracies_rewards_and_scores_have_noise(hostile):
    """Each beside what one row changes: of a head that knows one class alone, an exact accuracy or
    loss would tell how many rows that class has.
    """
    found = {}
    # with these secrets no two numbers are below 0, which is reported as 0
    for name, secret in (("plain", b"t"), ("site", b"t"), ("other", b"s")):
        site = hostile(name, allow=PLAIN if name == "plain" else {})
        site.worker = SiteWorker(site.site, site.folder, 32 * secret)
        orders = site_orders(site)
        found[name] = [site.opened(method).ask(work, order) for method, work, order in orders]
    plain, site, other = (numbers(found[name]) for name in ("plain", "site", "other"))
    assert plain.keys() == {"loss", "accuracy", "reward", "pyramid loss", "spine loss", "scores"}
    for name, exact in plain.items():
        assert not np.allclose(site[name], exact, rtol=1e-3), name
        assert not np.allclose(site[name], other[name], rtol=1e-3), name
        assert np.isfinite(site[name]).all() and (site[name] >= 0).all()
    assert 0 <= site["accuracy"][0] <= 1


def site_orders(site):
    made = {work: order for _, work, order in few_rows(site, ROWS)}
    lora = site.lora(**EVERY)
    spine = replace(made[prune_and_tune], tuning=lora.tuning)
    pyramid = made[train_and_thin]
    pyramid = replace(pyramid, training=replace(pyramid.training, steps=8))
    return [
        ("fedlora", tune_adapter, lora),
        ("fedadapter", score_branches, made[score_branches]),
        ("pyramidfl", train_and_thin, pyramid),
        ("fedspine", prune_and_tune, spine),
    ]


def numbers(came):
    lora, trial, pyramid, spine = came
    return {
        "loss": np.array([lora.loss]),
        "accuracy": np.array(list(trial.accuracies.values())),
        "reward": np.array([pyramid.reward]),
        "pyramid loss": np.array([pyramid.loss]),
        "spine loss": np.array([spine.loss]),
        "scores": spine.scores.channels.float().numpy(),
    }


def test_weights_that_make_losses_huge_do_not_reveal_how_many_rows_have_them(hostile):
    """The attack: a head that is sure of one class by 20,000 nats, which its weights could make up
    for: the loss, and the reward, told how many rows have others through any noise.
    """
    sure, found = 20_000.0, {}
    for name, allow in (("plain", PLAIN), ("site", {})):
        site = hostile(name, allow=allow)
        lora, *_, (_, thin, pyramid), _ = site_orders(site)
        lora = site.lora(**EVERY | {"learning_rate": 1e-7})
        weight, bias = sorted(lora.head, key=lambda name: name.endswith(".bias"))
        head = {name: torch.zeros_like(tensor) for name, tensor in lora.head.items()}
        head[weight][0, 0], head[bias][0] = 900.0, sure
        weights = pyramid.weights | single(head)
        trained = site.opened("fedlora").ask(tune_adapter, replace(lora, head=head))
        thinned = site.opened("pyramidfl").ask(thin, replace(pyramid, weights=weights))
        found[name] = trained.loss, thinned.loss, thinned.reward / ROWS
    # of which each of the rows makes hundreds
    assert min(found["plain"]) > 1000 * MOST_LOSS
    noise = SHARE * MOST_LOSS / ROWS
    assert max(found["site"][:2]) < MOST_LOSS + 5 * noise
    assert found["site"][2] ** 2 < MOST_LOSS * (MOST_LOSS + 5 * noise)


def test_what_is_pruned_follows_from_the_scores_that_have_left(hostile):
    """The attack: units that go are told exactly, and with scores from the server beside the site's
    own a search found those without their noise.
    """
    site = hostile().opened("fedspine")
    *_, (_, work, order) = site_orders(site)
    site.ask(work, order)
    memory = site.folder / MEMORY / site.run / f"{1:09d}.safetensors"
    known, layout = unpack(unsealed(memory.read_bytes())), site.base.layout
    pruned = site.ask(
        work, replace(order, sparsity=0.4, target=0.5), memory=1, version=2, seed=(0, 0, 1)
    )
    kept = {
        name: shrink(layout, full(layout), (votes.heads, votes.channels), sparsity=0.4, target=0.5)
        for name, votes in known.items()
        if name in ("scores", "shown")
    }
    assert pack(pruned.structure).payload == pack(kept["shown"]).payload
    assert pack(pruned.structure).payload != pack(kept["scores"]).payload


def test_one_model_in_all_branches_tells_no_more_than_in_one(hostile):
    """The attack: the mean of three accuracies of one model had less noise than one."""
    site = hostile(allow={"noise": 1.0, "answers": 0.0})
    site.worker = SiteWorker(site.site, site.folder, 32 * b"s")
    _, (_, work, order), *_ = site_orders(site.opened("fedadapter"))
    (adapter,), (head,) = order.adapters.values(), order.heads.values()
    same = replace(
        order, adapters=dict.fromkeys(BRANCHES, adapter), heads=dict.fromkeys(BRANCHES, head)
    )
    means = [
        np.mean(list(site.ask(work, same, seed=(0, 0, n)).accuracies.values())) for n in range(24)
    ]
    # of 24 draws a deviation is known to a seventh; without the factor it would be 0.58 of this
    assert np.std(means) > 0.72 / ROWS


def test_terms_that_its_owner_changes_have_other_noise(tmp_path):
    """The attack: of an order that is sent again, two shares of the same noise told the rest."""
    call = Call(device="east", index=0, work="w", order=b"o", memory=None, seed=(0, 0, 0))
    terms = (AllowSection(), AllowSection(), AllowSection(noise=4.0), AllowSection(answers=3.0))
    drawn = [
        site_noise(tmp_path, 32 * b"s", allow, "", np.arange(40), call)
        .about(np.arange(40))
        .draws.coarse_normal(1)[0]
        for allow in terms
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("term", [{"answers": -1.0}, {"noise": -1.0}, {"fewest_of_class": 0}])
def test_terms_beyond_their_bounds_are_refused(hostile, term):
    with pytest.raises(BadInput, match=f"allow.{next(iter(term))}"):
        hostile(allow=term)
