"""The site's terms against a hostile server: attacks that worked on earlier versions, and variants
of them.
"""

import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from flare_federation import MAX_TOKENS, NAMES
from hostile_server import ROWS, SGD, few_rows, refused
from tolerances import TINY
from toy import toy_rows

from fedspine.core.device import FEWEST_OF_CLASS, Device
from fedspine.core.message import pack
from fedspine.core.reads import Reads
from fedspine.flare.run_terms import REFUSALS
from fedspine.flare.site_disk import LOG, LOG_BYTES, MEMORY, PREFIXES, TOKENS, used
from fedspine.flare.site_secret import SECRET, seed_of, site_secret
from fedspine.flare.site_worker import SiteWorker, works_of
from fedspine.flare.wire import NotDone, Opened, SiteOrder, as_array
from fedspine.lm.lora import a_name, b_name, fresh
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning
from fedspine.methods import all_methods, sends_features
from fedspine.methods.fedavg import AverageOrder, train_and_send
from fedspine.methods.fedlora import tune_adapter
from fedspine.methods.linear_probe import ProbeOrder, tune_head
from fedspine.methods.locfedmix import ReadingOrder, begin_reading
from fedspine.pruning.device import prune_and_tune
from fedspine.pruning.head_start import MeansOrder, class_means
from fedspine.split.batches import Budget
from fedspine.split.cut import split_model_of
from fedspine.split.device import begin, end, resize
from fedspine.split.label_distribution import LabelQuery, label_distribution
from fedspine.split.messages import Cutting, Resized, Step
from fedspine.split.trainable_half import Optimising
from fedspine.split.whole_model import Training
from fedspine.split.wire import unwired

SPLIT = sorted(name for name, cls in all_methods().items() if sends_features(cls))
OTHERS = sorted(name for name, cls in all_methods().items() if not sends_features(cls))


# --- what is off by default ---


@pytest.mark.parametrize("method", SPLIT)
def test_split_methods_are_off_until_the_site_names_them(hostile, method):
    assert refused(hostile().open(method), "only in the split methods that its file names")
    assert isinstance(hostile("named", allow={"methods": [method]}).open(method), Opened)


def test_the_other_methods_are_on(hostile):
    site = hostile()
    assert len(OTHERS) > 8
    for method in OTHERS:
        assert isinstance(site.open(method), Opened), method


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_that_does_not_split_gives_no_way_to_ask_for_features(hostile, method):
    site = hostile(allow={"methods": [method], "lowest_cut": 0, "fewest_rows": 1}).opened(method)
    assert site.ask(begin, site.begin()).reason == "work not allowed"
    assert not any("split.device" in work for work in works_of(method))


def test_labels_of_a_language_model_do_not_leave(hostile):
    """The attack: splitlora sent the input ids as labels, 40 of 40 rows."""
    allow = {"methods": ["splitlora", "mergesfl-plus", "locfedmix"]}
    site = hostile(allow=allow, kind="causal-lm")
    for honest in ("splitlora", "mergesfl-plus", "locfedmix"):
        predicted = Reads(batch=32, cut=1, labels=True)
        assert refused(site.open(honest, foretold=predicted), "labels of a language model")
    site.opened("splitlora")  # a server that predicts nothing
    assert refused(site.ask(begin, site.begin()), "labels of a language model")
    site.opened("locfedmix")
    order = ReadingOrder(begin=site.begin(), width=4, weight=1.0)
    assert refused(site.ask(begin_reading, order), "labels of a language model")
    site.opened("mergesfl-plus", foretold=Reads(batch=32, cut=1))
    kept = site.ask(begin, site.begin(ending={}, ending_optimising=SGD))
    assert kept.labels is None
    assert refused(site.ask(label_distribution, LabelQuery(classes=3, longest=16)), "do not say")


def nearest_texts(site, features, embeddings):
    """The ids that a server reads from features at cut 0: at each position the nearest embedding of
    the vocabulary.
    """
    read = []
    for row, mask in zip(features.values, features.mask, strict=True):
        found = torch.cdist(embeddings[: int(mask.sum())].flatten(0, 1), row[mask])
        vocabulary = embeddings.shape[1]
        ids = [
            int(found[place * vocabulary : (place + 1) * vocabulary, place].argmin())
            for place in range(int(mask.sum()))
        ]
        read.append(ids)
    return read


def features_at(base, tokenizer, weights=None, **cutting):
    """The client model's output for each token at each position, [positions, vocabulary, width]."""
    model, vocabulary = split_model_of(base, **({"cut": 0} | cutting)), len(tokenizer)
    rows = []
    for first in range(vocabulary):
        ids = torch.full((1, MAX_TOKENS), first)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows.append(model.client_forward(weights or {}, inputs, seed=None).values[0].float())
    return torch.stack(rows, 1)


def test_texts_are_read_from_features_of_no_block_so_the_lowest_cut_holds(hostile):
    """The attack: mergesfl at cut 0, 40 of 40 texts by the nearest embedding."""
    named = {"methods": ["mergesfl", "locfedmix"]}
    site = hostile(allow=named)
    assert refused(
        site.open("mergesfl", foretold=Reads(batch=32, cut=0)),
        "expected at least 1 blocks under the features that leave, got 0 (allow.lowest_cut",
    )
    site.opened("mergesfl")
    assert refused(site.ask(begin, site.begin(cut=0)), "allow.lowest_cut")
    below = replace(site.begin(), cutting=Cutting(cut=-1))
    assert refused(site.ask(begin, below), "allow.lowest_cut")
    site.opened("locfedmix")
    order = ReadingOrder(begin=site.begin(cut=0), width=4, weight=1.0)
    assert refused(site.ask(begin_reading, order), "allow.lowest_cut")

    open_to_it = hostile("open", allow=named | {"lowest_cut": 0}).opened("mergesfl")
    answered = open_to_it.ask(begin, open_to_it.begin(batch=ROWS, cut=0))
    table = features_at(open_to_it.base, open_to_it.tokenizer)
    read = nearest_texts(open_to_it, unwired(answered.features), table)
    assert sorted(read) == own_texts(open_to_it)  # the attack works if a site allows it


def own_texts(site):
    examples = site.worker._open.holding.examples
    return sorted(part.tolist() for part in np.split(examples.ids, examples.offsets[1:-1]))


def test_a_rank_as_wide_as_the_model_would_undo_the_blocks_under_a_cut(hostile):
    """A variant: adapters equal to minus the weights, so block 0 adds nothing to embeddings."""
    wide = {"methods": ["mergesfl"], "largest_rank": 64}
    site = hostile(allow=wide).opened("mergesfl")
    width, scale = site.base.layout.width, 2.0
    undone = site.weights(1, rank=width)
    for at in site.base.layout.sites:
        if at.layer == 0 and at.path.endswith("output.dense"):  # of attention and feed-forward
            undone[a_name(at.path)] = site.base.weights[at.path][0].float().clone()
            undone[b_name(at.path)] = -torch.eye(width) / scale
    cutting = {"cut": 1, "rank": width, "scale": scale}
    order = replace(site.begin(batch=ROWS), weights=undone, cutting=Cutting(**cutting))
    features = unwired(site.ask(begin, order).features)
    table = features_at(site.base, site.tokenizer, undone, **cutting)
    assert sorted(nearest_texts(site, features, table)) == own_texts(site)

    narrow = hostile("narrow", allow={"methods": ["mergesfl"], "largest_rank": width // 2})
    words = f"expected at most {width // 2} for a rank, got {width} (allow.largest_rank"
    assert refused(narrow.opened("mergesfl").ask(begin, order), words)
    unsaid = replace(order, cutting=Cutting(cut=1, rank=1, scale=scale))
    assert refused(narrow.opened("mergesfl").ask(begin, unsaid), REFUSALS["weights"])


# --- how many rows stand behind an answer ---


@pytest.mark.parametrize("which", range(13))
def test_no_answer_rests_on_fewer_rows_than_the_site_says(hostile, which):
    """The attack: `fewest_rows = 10` answered about one row at batch 1, by all of these."""
    few = {"fewest_rows": 10, "fewest_steps": 1}
    site = hostile(allow={"methods": list(all_methods())} | few)
    for rows, least in ((1, True), (9, True), (10, False)):
        method, work, order = few_rows(site, rows)[which]
        site.opened(method)
        reply = site.ask(work, order)
        if least:
            assert refused(reply, f"expected at least 10 rows behind an answer, got {rows}")
        elif (
            method != "locfedmix"
        ):  # whose order lacks the decoder, which has nothing to do with rows
            assert not isinstance(reply, NotDone)


def test_training_that_is_made_to_end_early_does_not_answer(hostile):
    """A variant: a rate at which the second step's loss overflows, so that the answer rests on two
    rows alone.
    """
    site = hostile(allow={"rates": [0.0, 1e20]}).opened("fedlora")
    order = site.lora(steps=64, batch=1, learning_rate=1e20, weight_decay=0.0)
    reply = site.ask(tune_adapter, order)
    assert refused(reply, "expected at least 32 distinct rows behind the answer, got ")
    assert not list((site.folder / MEMORY / site.run).iterdir())


@pytest.mark.parametrize("decay", [10.0, 110.0])
def test_weights_that_forget_all_but_one_step_do_not_leave(hostile, decay):
    """Variants: with rate times decay of 1 only the last step remains, with 11 the first."""
    wide = {"optimisers": ["sgd", "adamw"], "rates": [0.0, 1.0], "largest_decay": 1000.0}
    site = hostile(allow={"methods": ["fedavg", "fedlora", "fedspine"]} | wide).opened("fedavg")
    sgd = Optimising(kind="sgd", learning_rate=0.1, weight_decay=decay)
    training = Training(cutting=Cutting(cut=1, rank=4), optimising=sgd, steps=64, batch=1)
    order = AverageOrder(weights=site.weights(), training=training, precision="fp32")
    words = "expected at least 32 rows behind an answer, got 1"
    assert refused(site.ask(train_and_send, order), words)
    usual = replace(training, optimising=replace(sgd, weight_decay=0.1))
    assert site.ask(train_and_send, replace(order, training=usual)).weights
    site.opened("fedlora")
    rates = {"learning_rate": 1e-9, "head_learning_rate": 0.1, "weight_decay": decay}
    assert refused(site.ask(tune_adapter, site.lora(steps=64, batch=1, **rates)), words)


def test_scores_of_the_last_step_alone_do_not_leave(hostile):
    """A variant: importance that forgets all earlier steps."""
    site = hostile().opened("fedspine")
    (order,) = [order for _, work, order in few_rows(site, 1) if work is prune_and_tune]
    order = replace(order, tuning=replace(order.tuning, steps=64))
    forgetful = replace(order, scoring=replace(order.scoring, keep=0.0))
    rare = replace(order, scoring=replace(order.scoring, every=64))
    for each in (forgetful, rare):
        assert refused(site.ask(prune_and_tune, each), "rows behind an answer")
    kept = replace(order, scoring=replace(order.scoring, keep=1.0))
    assert site.ask(prune_and_tune, kept).examples == ROWS


def test_a_batch_of_tokens_with_few_rows_is_refused_once_its_rows_are_known(hostile):
    site = hostile(allow={"methods": ["mergesfl"], "fewest_rows": 10}).opened("mergesfl")
    few = site.begin(batch=Budget(tokens=8, rows=20))
    assert refused(site.ask(begin, few), "at least 10 distinct rows behind the answer")
    assert site.ask(begin, site.begin(batch=20)).labels is not None
    step = Step(gradient=None)
    shrunk = Resized(step=step, batch=Budget(tokens=8, rows=20))
    assert refused(site.ask(resize, shrunk, memory=1, version=2), "at least 10 distinct rows")
    assert refused(
        site.ask(resize, Resized(step=step, batch=1), memory=1, version=2), "rows behind an answer"
    )
    assert site.ask(end, step, memory=1, version=2).weights


def test_windows_of_one_text_are_one_row(models):
    """A variant: rows of four tokens, many of them from one long text."""
    _, base, tokenizer = models["causal-lm"]
    from fedspine.lm.encode import encode

    data = encode(tokenizer, toy_rows(6, 0), "causal-lm", 4)
    device = Device("d", data, base, {}, np.random.default_rng(0))
    device.uses(np.arange(len(data)))
    assert len(data) > 6
    assert device.rows_used == 6


def test_a_loss_is_of_as_many_rows_as_the_answer(task):
    """A variant: the loss of the last five steps of one row each."""
    data = task.train.take(np.arange(64))
    from fedspine.lm.base import Model

    model = Model(
        structure=full(task.base.layout),
        adapter=fresh(task.base.layout.sites, 4, np.random.default_rng(0)),
        head=task.base.initial_head(np.random.default_rng(0)),
        scale=1.0,
    )
    tuning = Tuning(steps=64, batch=1, learning_rate=0.0, weight_decay=0.0)

    def loss(fewest, **changes):
        device = Device("d", data, task.base, {}, np.random.default_rng(0), fewest_rows=fewest)
        return tune(device, model, replace(tuning, **changes)).loss

    every = loss(0, steps=1, batch=64)
    assert loss(64) == pytest.approx(every, rel=TINY)
    assert loss(0) != pytest.approx(every, rel=1e-3)


def test_of_a_rare_class_no_share_and_no_mean_leaves(hostile):
    rows = toy_rows(ROWS, 0)
    few = [at for at, label in enumerate(rows.labels) if label == 2][: FEWEST_OF_CLASS - 1]
    keep = np.array(sorted({*np.flatnonzero(rows.labels != 2).tolist(), *few}))
    rare = replace(rows, texts=tuple(rows.texts[i] for i in keep), labels=rows.labels[keep])
    # without noise, which could hide the counts of all classes
    allow = {"methods": ["mergesfl", "fedlora"], "fewest_rows": 10, "noise": 0}
    site = hostile(allow=allow, rows=rare)
    shares = site.opened("mergesfl").ask(label_distribution, LabelQuery(classes=3, longest=16))
    place = site.terms("fedlora").label_names.index(NAMES[2])
    assert shares.shares[place] == 0
    assert shares.shares.sum() == pytest.approx(1.0)
    means = site.opened("fedlora").ask(class_means, MeansOrder(rows=ROWS))
    assert means.counts[place] == 0
    assert not means.means["means"][place].any()
    assert refused(
        site.opened("mergesfl").ask(label_distribution, LabelQuery(classes=10**9, longest=16)),
        "do not say",
    )


# --- the rows of a step depend on the site's secret ---


def test_the_secret_is_made_once_and_for_its_owner_alone(hostile, tmp_path):
    site = hostile()
    secret = site_secret(site.folder)
    assert len(secret) == 32
    assert site_secret(site.folder) == secret != site_secret(hostile("other").folder)
    assert stat.S_IMODE((site.folder / SECRET).stat().st_mode) == 0o600
    (site.folder / SECRET).chmod(0o644)
    assert site_secret(site.folder) == secret
    assert stat.S_IMODE((site.folder / SECRET).stat().st_mode) == 0o600


def test_rows_are_drawn_from_the_seed_and_the_secret_and_can_be_replayed(hostile, models):
    one, other = hostile().opened("fedlora"), hostile("other").opened("fedlora")
    order = one.lora()
    came = pack(one.ask(tune_adapter, order)).payload
    assert pack(one.ask(tune_adapter, order)).payload == came
    assert pack(other.ask(tune_adapter, order)).payload != came
    replay = SiteWorker(one.site, one.folder / "replay", site_secret(one.folder))
    one.worker = replay
    assert pack(one.opened("fedlora").ask(tune_adapter, order)).payload == came

    asked = SiteOrder(
        run=one.run, work="a", order=as_array(b"1"), seed=(0, 1, 2), round=0, memory=None,
        version=1, needed=(),
    )  # fmt: skip
    assert seed_of(b"", asked) == asked.seed  # as in a simulation
    drawn = {
        seed_of(secret, each)
        for secret in (b"1", b"2")
        for each in (asked, replace(asked, order=as_array(b"2")), replace(asked, seed=(0, 1, 3)))
    }
    assert len(drawn) == 6  # two orders that differ in one setting do not share rows either


# --- what fills or stalls a site ---


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"steps": 10**7}, "expected at most 1000 steps, got 10000000 (allow.most_steps"),
        ({"batch": 10**12}, "expected at most 256 rows of a step, got far more"),
        ({"batch": 257}, "expected at most 256 rows of a step, got 257 (allow.largest_batch"),
        ({"steps": 0}, "at least 1 steps"),
        ({"steps": -5, "batch": -5}, "at least 1 steps"),
        ({"batch": 0}, "at least 1 rows"),
    ],
)
def test_work_without_end_is_refused(hostile, tuning, words):
    site = hostile().opened("fedlora")
    assert refused(site.ask(tune_adapter, site.lora(**tuning)), words)
    asked = {"steps": 2, "batch": 16} | tuning
    assert refused(site.open("fedlora", foretold=Reads(**asked)), words)


def test_weights_that_are_not_the_models_are_refused(hostile):
    site = hostile(allow={"methods": ["fedlora", "mergesfl", "locfedmix"]}).opened("fedlora")
    order = site.lora()
    name, tensor = next(iter(order.adapter.items()))
    words = REFUSALS["weights"]
    large = torch.zeros(65, tensor.shape[1])  # of a rank that would undo a block of W
    for adapter in (order.adapter | {"more": tensor}, order.adapter | {name: large}):
        assert refused(site.ask(tune_adapter, replace(order, adapter=adapter)), words)
    head = order.head | {"decoder.into.weight": tensor}
    assert refused(site.ask(tune_adapter, replace(order, head=head)), words)
    spoilt = site.begin(weights=site.weights(1) | {"more": tensor})
    assert refused(site.opened("mergesfl").ask(begin, spoilt), words)
    reading = ReadingOrder(begin=spoilt, width=4, weight=1.0)
    assert refused(site.opened("locfedmix").ask(begin_reading, reading), words)


def test_versions_of_memory_are_few(hostile):
    """The attack: `needed = range(1, v)` kept every version."""
    site = hostile(allow={"methods": ["mergesfl"]}).opened("mergesfl")
    order, kept = site.begin(), site.folder / MEMORY / site.run
    for version in range(1, 8):
        every = tuple(range(1, version))
        reply = site.ask(begin, order, version=version, needed=every)
        assert isinstance(reply, NotDone) == (version > 3)
        site.ask(begin, order, version=version, needed=every[-2:])
        assert len(list(kept.iterdir())) <= 3
    for numbers in ({"version": 10**9}, {"version": -1}, {"memory": 10**30}, {"needed": (-1,)}):
        assert site.ask(begin, order, **numbers).reason == "bad order"


def test_openings_leave_little(hostile):
    """The attack: 20 openings left 101 entries of caches."""
    site = hostile()
    for number in range(40):
        site.opened("fedlora", max_tokens=8 + number)
    entries = {kind: list(folder.iterdir()) for kind, folder in places(site).items()}
    assert {kind: len(found) for kind, found in entries.items()} == {
        MEMORY: 16, PREFIXES: 1, TOKENS: 4,
    }  # fmt: skip
    assert refused(site.open("fedlora", max_tokens=10**6), "at most 2048 tokens of a row")
    apart = {"kind": "pair", "pooling": "bi-encoder", "max_tokens": 1025}  # of each text
    assert refused(site.open("fedlora", **apart), "at most 2048 tokens of a row")
    names = tuple(str(n) for n in range(10**5))
    assert refused(site.open("fedlora", label_names=names), REFUSALS["terms"])


@pytest.mark.parametrize("changed", ["terms", "rows"])
def test_a_run_that_is_opened_again_gets_activations_of_its_own_rows(hostile, changed):
    """The attack: activations of long texts were kept and read again as those of short ones, so
    that all rows were parts of the first text. Those of rows that the site had earlier are no
    better.
    """
    rows = toy_rows(ROWS, 0)
    long = replace(rows, texts=(" ".join(["cab"] * 900), *rows.texts[1:]))

    def opened(name, rows, **terms):
        site = hostile(name, rows=rows, allow={"noise": 0.0})
        site.worker = SiteWorker(site.site, site.folder, b"the same")
        return site.opened("linear_probe", **terms)

    again = opened("again", long, max_tokens=120)
    tuning = Tuning(steps=8, batch=ROWS, learning_rate=1e-2, turns=100.0)
    order = ProbeOrder(head=again.lora().head, tuning=tuning)
    again.ask(tune_head, order)
    assert list((again.folder / PREFIXES).glob("*/*"))  # which are kept
    again.runs -= 1  # under the same name
    if changed == "rows":
        long = rows
        shutil.copy(opened("short", rows).folder / "rows.parquet", again.folder)
        again.worker = SiteWorker(again.site, again.folder, b"the same")
    terms = {"max_tokens": 4 if changed == "terms" else 120}
    came = again.opened("linear_probe", **terms).ask(tune_head, order)
    fresh_site = opened("fresh", long, **terms)
    assert pack(came).payload == pack(fresh_site.ask(tune_head, order)).payload


def places(site):
    cache = site.folder / "cache"
    return {
        MEMORY: site.folder / MEMORY,
        PREFIXES: site.folder / PREFIXES,
        TOKENS: cache / TOKENS,
    }


def test_runs_never_take_more_than_the_sites_quota(hostile):
    most = 1 << 20
    allow = {"methods": ["mergesfl"], "fewest_rows": 1}
    site = hostile(allow=allow, limits={"disk_bytes": most})
    memories = 0
    for _ in range(14):
        site.opened("mergesfl")
        for version in (1, 2, 3):
            order = site.begin(cut=2, rank=32)
            assert not isinstance(
                site.ask(begin, order, version=version, needed=(version - 1,)), NotDone
            )
            found = used(site.folder, site.folder / "cache")
            assert sum(found.values()) <= most
            memories = max(memories, found[MEMORY])
    assert memories > most / 2  # so the quota did apply
    full_up = hostile("full", allow=allow, limits={"disk_bytes": most}).opened("mergesfl")
    (full_up.folder / MEMORY / full_up.run / "000000009.safetensors").write_bytes(bytes(most - 9))
    order = full_up.begin(cut=2, rank=32)
    assert refused(full_up.ask(begin, order, needed=(9,)), REFUSALS["disk"])


def test_orders_beyond_so_many_a_minute_are_refused(hostile):
    site = hostile(allow={"orders_per_minute": 5}).opened("fedlora")
    order = site.lora(steps=0)
    for _ in range(4):
        site.ask(tune_adapter, order)
    assert refused(site.ask(tune_adapter, order), REFUSALS["rate"])
    assert refused(site.open("fedlora"), REFUSALS["rate"])
    site.now = 60.0
    assert isinstance(site.open("fedlora"), Opened)


def test_refusals_do_not_fill_the_log(hostile):
    site = hostile().opened("fedlora")
    log = site.folder / LOG
    log.write_bytes(b"a" * LOG_BYTES + b"the end")
    site.ask(tune_adapter, site.lora(steps=0))
    kept = log.read_bytes()
    assert len(kept) == LOG_BYTES // 2
    assert kept.endswith(b"athe end")


def test_predicted_reads_beyond_a_term_are_refused_before_a_row_is_read(hostile):
    site = hostile()
    (site.folder / "rows.parquet").write_bytes(b"no rows at all")
    assert refused(
        site.open("fedlora", foretold=Reads(steps=1, batch=8)),
        "expected at least 32 rows behind an answer, got 8 (allow.fewest_rows of its",
    )
    assert refused(site.open("fedlora", foretold=Reads(steps=2000, batch=8)), "allow.most_steps")
    assert refused(site.open("fedlora"), REFUSALS["data"])  # which is only then opened
