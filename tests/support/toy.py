"""A toy task that a tiny model learns, a simulated fleet over it, and a spy on its traffic."""

import json

import numpy as np

from fedspine.control.sparsity import final_counts
from fedspine.core.aggregation import Mean
from fedspine.core.checks import Terms
from fedspine.core.message import pack
from fedspine.core.server_optimiser import Server
from fedspine.core.task import Task
from fedspine.data.dataset import Rows
from fedspine.execution.workers import Workers, Workshop
from fedspine.fleets.checked import Checked, Exchanges
from fedspine.fleets.hardware import Hardware
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.simulated import SimulatedFleet, profiles
from fedspine.fleets.simulated_world import World
from fedspine.lm.encode import encode
from fedspine.storage.records import Records
from fedspine.storage.store import Saved, Store

KINDS = ("tx2", "tx2", "nx", "nx", "agx")
CLASS_WORDS = (("good", "the", "to"), ("bad", "of", "for"), ("small", "and", "on"))
NOISE = ("in", "is", "with", "at", "not", "very", "cab", "dig", "27")
TRAIN_ROWS, TEST_ROWS, MAX_TOKENS = 300, 90, 16


def toy_rows(rows, seed):
    """Short texts of three words of their class among four others, classes in equal parts."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(CLASS_WORDS)
    texts = []
    for label in labels:
        words = [*rng.choice(CLASS_WORDS[label], 3), *rng.choice(NOISE, 4)]
        texts.append(" ".join(rng.permutation(words)))
    return Rows(texts=tuple(texts), pairs=None, labels=labels, columns={})


def toy_task(base, tokenizer, *, rounds, kind="classification"):
    """The task of classifying the three classes, or of continuing their texts."""
    train, test = (
        encode(tokenizer, toy_rows(rows, seed), kind, MAX_TOKENS)
        for rows, seed in ((TRAIN_ROWS, 0), (TEST_ROWS, 1))
    )
    names = () if kind == "causal-lm" else ("good", "bad", "small")
    return Task(
        kind=kind,
        base=base,
        train=train,
        test=test,
        label_names=names,
        max_tokens=MAX_TOKENS,
        rounds=rounds,
    )


def reached(layout, target):
    """The sparsity of whole heads and channels that a target comes to, the same in every layer: a
    quarter of a percent off, or half a channel where that is more.
    """
    shape = layout.shape
    found = shape.sparsity(*final_counts(shape, target))
    off = max(0.0025, shape.channel_parameters / shape.parameters / 2)
    assert abs(found - target) <= off + 1e-9
    return found


class Lab:
    """A simulated fleet of `kinds` in `folder`, with its store and records; an existing folder is
    resumed.

    `truth` has further arguments of `Hardware`, such as its jitter.
    """

    def __init__(
        self,
        task,
        folder,
        *,
        kinds=KINDS,
        workers=0,
        together=1,
        seed=0,
        aggregation=Mean(),
        server=None,
        privacy=None,
        **truth,
    ):
        order = np.random.default_rng(7).permutation(len(task.train))
        self.task, self.seed = task, seed
        sizes = np.arange(4, 4 + len(kinds))  # unequal, so that weights matter
        cuts = len(order) * np.cumsum(sizes)[:-1] // sizes.sum()
        self.shares = tuple(np.sort(part) for part in np.split(order, cuts))
        folder.mkdir(exist_ok=True)
        self.store = Store(folder / "state")
        self.saved = self.store.open()
        self.records_path = folder / "records.jsonl"
        self.records = Records(self.records_path, self.saved.records if self.saved else 0)
        self.workers = Workers(
            Workshop(task=task, shares=self.shares, test_rows=np.arange(TEST_ROWS)),
            workers,
            together,
        )
        self.hardware = Hardware(seed=seed, kinds=tuple(kinds), **truth)
        world = World(
            seed=seed,
            profiles=profiles(list(kinds), [len(share) for share in self.shares]),
            hardware=self.hardware,
            workers=self.workers,
            store=self.store,
            records=self.records,
            aggregation=aggregation,
            server=server or Server(),
            privacy=privacy,
        )
        self.fleet = SimulatedFleet(world)
        self.exchanges = Exchanges()
        if self.saved:
            self.fleet.restore(self.saved.fleet, self.saved.memories)

    def run(self, method, *, rounds=None, around=lambda fleet: fleet, state=None):
        """The state after `rounds` rounds (default: all of the task's), from `state`, or from the
        saved one if there is one.
        """
        if state is None:
            rng = np.random.default_rng([self.seed, 1])
            state = self.saved.state if self.saved else method.start(self.task, rng)
        for round in range(state.round, self.task.rounds if rounds is None else rounds):
            self.fleet.begin_round(round)
            state = method.round(state, self.checked(around(self.fleet)))
            self.fleet.end_round(0.0)
        return state

    def checked(self, fleet):
        """The fleet as a method gets it in a run, with every reply checked."""
        terms, everyone = Terms.of(self.task), self.fleet.devices
        return Checked(fleet, terms, everyone=everyone, exchanges=self.exchanges)

    def save(self, state):
        """Save everything, as the run loop does after a round."""
        self.store.save(
            Saved(
                round=state.round,
                state=state,
                fleet=self.fleet.snapshot(),
                memories=self.fleet.memories,
                records=self.records.flush(),
            )
        )

    def rows(self, kind):
        """The records of this kind."""
        self.records.flush()
        rows = map(json.loads, self.records_path.read_text().splitlines())
        return [row for row in rows if row["row"] == kind]

    @property
    def ids(self):
        return [profile.id for profile in self.fleet.devices]

    def close(self):
        self.workers.close()
        self.records.close()
        self.store.close()


class Spy:
    """A fleet that records all messages and can change orders and replies; None drops a reply."""

    def __init__(self, fleet, *, order=lambda id, order: order, reply=lambda reply: reply):
        self._fleet, self._order, self._reply = fleet, order, reply
        self.orders, self.results, self.clock = [], [], [fleet.now]

    @property
    def devices(self):
        return self._fleet.devices

    @property
    def base(self):
        return self._fleet.base

    @property
    def aggregation(self):
        return self._fleet.aggregation

    @property
    def server(self):
        return self._fleet.server

    @property
    def now(self):
        self.clock.append(self._fleet.now)
        return self._fleet.now

    def ask(self, work, orders, *, within=float("inf")):
        sent = {id: self._order(id, order) for id, order in orders.items()}
        self.orders += list(sent.items())
        replies = self._fleet.ask(work, sent, within=within)
        self.results += [(reply.device, reply.value) for reply in replies]
        self.clock.append(self._fleet.now)
        return [changed for reply in replies if (changed := self._reply(reply)) is not None]

    def send(self, work, orders):
        sent = {id: self._order(id, order) for id, order in orders.items()}
        self.orders += list(sent.items())
        self._fleet.send(work, sent)

    def next(self):
        while True:
            reply = self._fleet.next()
            self.results.append((reply.device, reply.value))
            self.clock.append(self._fleet.now)
            if (changed := self._reply(reply)) is not None:
                return changed

    def note(self, **values):
        self.clock.append(self._fleet.now)
        self._fleet.note(**values)

    @property
    def unusable(self):
        return self._fleet.unusable

    def __getattr__(self, name):
        raise NotImplementedError(f"no method needs {name} yet; let the spy record it")


class Unlucky(Lossy):
    """A fleet that loses the replies of `lost` after the work, and delays all by `seconds`."""

    def __init__(self, fleet, lost=(), seconds=0.0):
        super().__init__(fleet, drop=1.0, delay_seconds=seconds)
        self.lost = lost

    def _luck(self, device):
        return (0.75 if device in self.lost else 1.0), 1.0


def bits(value):
    """The packed bytes of a state, which are equal for equal states."""
    return pack(value).sha256
