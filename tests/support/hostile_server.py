"""A hostile server for one site: it opens runs and sends arbitrary orders, in this process."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flare_federation import MAX_TOKENS, NAMES
from toy import toy_rows

from fedspine.core.device import name_of
from fedspine.core.message import pack, unpack
from fedspine.core.tensors import half
from fedspine.flare.provision import write_site_file
from fedspine.flare.run_terms import RunTerms
from fedspine.flare.site import load_site
from fedspine.flare.site_worker import SiteWorker
from fedspine.flare.wire import NotDone, Opened, Opening, SiteAnswer, SiteOrder, as_array, decoded
from fedspine.lm.content import content_sha256
from fedspine.lm.importance_sources import Gradient
from fedspine.lm.load import load
from fedspine.lm.lora import fresh
from fedspine.lm.structure import full
from fedspine.lm.tuning import Tuning
from fedspine.methods.fed_hello import BlocksOrder, tune_blocks
from fedspine.methods.fedadapter import TrialOrder, score_branches
from fedspine.methods.fedavg import AverageOrder, train_and_send
from fedspine.methods.fedlora import LoraOrder, tune_adapter
from fedspine.methods.fedquad import QuadOrder, tune_quantised
from fedspine.methods.ffa_lora import FfaOrder, tune_b
from fedspine.methods.flora import FloraOrder, merge_and_tune
from fedspine.methods.hetlora import HetLoraOrder, tune_and_shrink
from fedspine.methods.legend import DepthOrder, tune_top
from fedspine.methods.linear_probe import ProbeOrder, tune_head
from fedspine.methods.locfedmix import ReadingOrder, begin_reading
from fedspine.methods.pyramidfl import PyramidOrder, train_and_thin
from fedspine.pruning.device import SpineOrder, prune_and_tune
from fedspine.pruning.head_start import MeansOrder, class_means
from fedspine.split.batches import Budget
from fedspine.split.cut import split_model_of
from fedspine.split.device import begin
from fedspine.split.messages import Begin, Cutting
from fedspine.split.trainable_half import Optimising
from fedspine.split.whole_model import Training

ROWS = 40  # of the site
SGD = Optimising(kind="sgd", learning_rate=0.1)
ADAMW = Optimising(kind="adamw", learning_rate=0.01, clip=1.0)


@pytest.fixture(scope="module")
def models(tiny_folder):
    """(folder, base, tokenizer) of a tiny model by kind of task."""
    made = {}
    for kind, family, classes in (("classification", "bert", 3), ("causal-lm", "llama", None)):
        folder = tiny_folder(family)
        options = {} if classes is None else {"classes": classes, "pooling": "mean"}
        made[kind] = (folder, *load(str(folder), kind=kind, **options))
    return made


class Hostile:
    """A server that sends arbitrary orders to one site."""

    def __init__(
        self, folder, models, *, allow=None, limits=None, kind="classification", rows=None
    ):
        self.folder, self.kind, self.runs = folder, kind, 0
        self.model, self.base, self.tokenizer = models[kind]
        folder.mkdir()
        rows = rows or toy_rows(ROWS, 0)
        table = {"text": rows.texts, "label": [NAMES[label] for label in rows.labels]}
        pq.write_table(pa.table(table), folder / "rows.parquet")
        tables = {"data": {"path": "rows.parquet"}, "models": {"tiny": str(self.model)}}
        tables |= {"allow": allow or {}, "limits": limits or {}}
        write_site_file(folder, name="east", **tables)
        self.site = load_site(folder)
        self.now = 0.0
        self.worker = SiteWorker(self.site, folder, now=lambda: self.now)

    def terms(self, method, **changes):
        stated = {
            "method": method,
            "kind": self.kind,
            "model": "tiny",
            "model_sha256": content_sha256(self.base, self.tokenizer),
            "layers": None,
            "precision": "fp32",
            "pooling": "mean" if self.kind == "classification" else "auto",
            "max_tokens": MAX_TOKENS,
            "label_names": NAMES if self.kind == "classification" else (),
        }
        return RunTerms(**stated | changes)

    def open(self, method, **changes):
        self.runs += 1
        self.run = f"{self.runs:032x}"
        return self.sent(Opening(run=self.run, terms=self.terms(method, **changes)))

    def opened(self, method, **changes):
        assert isinstance(self.open(method, **changes), Opened)
        return self

    def ask(self, work, order, *, seed=(0, 0, 0), memory=None, version=1, needed=()):
        asked = SiteOrder(
            run=self.run,
            work=name_of(work),
            order=as_array(pack(order).payload),
            seed=seed,
            round=0,
            memory=memory,
            version=version,
            needed=needed,
        )
        reply = self.sent(asked)
        if isinstance(reply, SiteAnswer):
            return unpack(reply.result.tobytes())
        return reply

    def sent(self, message):
        return decoded(self.worker.answer(pack(message).payload), Opened, SiteAnswer, NotDone)

    # orders as a method would send them, except for the given settings

    def weights(self, cut=None, rank=4):
        """The client model's weights at this cut, or all that is trained."""
        model = split_model_of(self.base, 1 if cut is None else cut, rank=rank)
        client, server = model.start(np.random.default_rng(0))
        return client | server if cut is None else client

    def begin(self, batch=32, cut=1, rank=4, **more):
        order = {
            "weights": self.weights(cut, rank),
            "cutting": Cutting(cut=cut, rank=rank),
            "batch": batch,
            "optimising": SGD,
            "precision": "fp32",
        }
        return Begin(**order | more)

    def lora(self, **tuning):
        settings = {"steps": 8, "batch": 4, "learning_rate": 1e-2} | tuning
        return LoraOrder(
            adapter=half(fresh(self.base.layout.sites, 4, np.random.default_rng(0))),
            head=half(self.base.initial_head(np.random.default_rng(0))),
            scale=2.0,
            tuning=Tuning(**settings),
        )


@pytest.fixture
def hostile(models, tmp_path):
    def make(name="east", **settings):
        return Hostile(tmp_path / name, models, **settings)

    return make


def refused(reply, words):
    assert isinstance(reply, NotDone)
    assert reply.reason == "refused"
    assert words in reply.detail, reply.detail
    return True


def few_rows(site, rows):
    """(method, work, order): one order of each kind, with one step over so many rows."""
    base, tuning = site.base, Tuning(steps=1, batch=rows, learning_rate=1e-2)
    head = half(base.initial_head(np.random.default_rng(0)))
    adapter = half(fresh(base.layout.sites, 4, np.random.default_rng(0)))
    training = Training(cutting=Cutting(cut=1, rank=4), optimising=ADAMW, steps=1, batch=rows)
    weights = {"weights": site.weights(), "training": training, "precision": "fp32"}
    spine = {
        "round": 0, "adapter": adapter, "head": head, "structure": full(base.layout),
        "scores": None, "global_importance_weight": 0.0, "sparsity": 0.0, "target": 0.0,
        "scale": 2.0, "tuning": tuning, "scoring": Gradient().order,
    }  # fmt: skip
    b_factors = {name: each for name, each in adapter.items() if name.endswith(".lora_B")}
    lora = {"adapter": adapter, "head": head, "scale": 2.0, "tuning": tuning}
    trial = TrialOrder(adapters={"present": adapter}, heads={"present": head}, scale=2.0, rows=rows)
    flora = FloraOrder(
        round=0, since=0, stacks={}, change={}, merged_rank=0, head=head, rank=4, scale=2.0,
        tuning=tuning,
    )  # fmt: skip
    return [
        ("fedlora", tune_adapter, LoraOrder(**lora)),
        ("flexlora", tune_adapter, LoraOrder(**lora)),
        ("hetlora", tune_and_shrink, HetLoraOrder(**lora, rank=4, shrunk=2, penalty=0.0)),
        ("legend", tune_top, DepthOrder(**lora, lowest=0)),
        ("ffa-lora", tune_b, FfaOrder(**lora | {"adapter": b_factors}, seed=0)),
        ("fedadapter", score_branches, trial),
        ("fedquad", tune_quantised, QuadOrder(**lora, lowest=0, quantised=2, bits=4)),
        ("flora", merge_and_tune, flora),
        ("fed-hello", tune_blocks, BlocksOrder(**lora, blocks=(1,))),
        ("linear_probe", tune_head, ProbeOrder(head=head, tuning=tuning)),
        ("fedspine", prune_and_tune, SpineOrder(**spine)),
        ("fedavg", train_and_send, AverageOrder(**weights)),
        ("pyramidfl", train_and_thin, PyramidOrder(**weights, drop=0.0)),
        ("fedlora", class_means, MeansOrder(rows=rows)),
        ("mergesfl", begin, site.begin(batch=rows)),
        ("mergesfl", begin, site.begin(batch=Budget(tokens=10**6, rows=rows))),
        (
            "locfedmix",
            begin_reading,
            ReadingOrder(begin=site.begin(batch=rows), width=4, weight=1.0),
        ),
    ]
