"""What all attacks of leakage.py share: rows, the server's knowledge of them, and results."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import leakage_attacks as attacks
import leakage_ground as ground
import leakage_orders as orders
import numpy as np
import torch

from fedspine.core.task import Examples, Task
from fedspine.data.dataset import Rows
from fedspine.data.pydocs import TOPICS, read
from fedspine.flare.site_terms import AllowSection
from fedspine.lm.base import Base, Model
from fedspine.lm.encode import encode
from fedspine.lm.load import load
from fedspine.lm.structure import full

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
PLACES = 16  # tokens of a text that are read
PUBLIC, POOL = 2000, 1500  # rows that the server knows, rows that a device may hold
CANDIDATES = 96  # of the latter, of which a server asks whether they were used
ROUNDS = 10  # of the run of which the second round is attacked
SIZES = {"places": PLACES, "public": PUBLIC, "candidates": CANDIDATES}
DEFAULT = AllowSection()  # what a site allows whose file says nothing else


@dataclass
class Scene:
    """What all attacks of a run share."""

    task: Task
    public: Examples
    pool: Examples
    candidates: Examples  # the first of the pool, from which answers about few rows are
    vocabulary: attacks.Vocabulary
    known: tuple[int, ...]  # tokens in every text
    seed: int
    states: dict[Any, Any] = field(default_factory=dict)  # of methods, after one round

    @classmethod
    def of(
        cls,
        task: Task,
        known: Sequence[int],
        *,
        public: int,
        pool: int,
        candidates: int,
        seed: int,
    ) -> "Scene":
        """The first rows of a shuffle are the server's, the next may be the device's."""
        order = np.random.default_rng(seed).permutation(len(task.train))
        return cls(
            task=task,
            public=task.train.take(order[:public]),
            pool=task.train.take(order[public : public + pool]),
            candidates=task.train.take(order[public : public + candidates]),
            vocabulary=attacks.Vocabulary.of(task.base, task.max_tokens, known),
            known=tuple(known),
            seed=seed,
        )

    @property
    def prior(self) -> np.ndarray:
        """The share of each class in the public rows."""
        counts = np.bincount(self.public.labels, minlength=len(self.task.label_names))
        return counts / counts.sum()

    def warmed(self, method: Any) -> Any:
        """The state of a method after one round on public rows, so that its adapter is not zero."""
        if method not in self.states:
            self.states[method] = ground.warmed(method, self.task, self.public, self.seed)
        return self.states[method]

    @cached_property
    def of_base(self) -> attacks.BagDecoder:
        """The reader of tokens from features of the base."""
        base = self.task.base
        head = base.initial_head(np.random.default_rng(0))
        bare = Model(structure=full(base.layout), adapter={}, head=head, scale=1.0)
        return self.decoder(ground.readout(base, bare, self.public))

    def decoder(self, features: torch.Tensor) -> attacks.BagDecoder:
        """The reader of tokens, learnt from such features of the public rows."""
        tokens = self.task.base.config.vocab_size
        return attacks.BagDecoder.learnt(features, self.public, tokens, self.known)

    def draws(self, rows: int, answers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """A seed, the device's rows and as many others, for each answer."""
        for answer in range(answers):
            rng = np.random.default_rng([self.seed, rows, answer])
            few = 2 * rows <= len(self.candidates)
            chosen = rng.permutation(len(self.candidates if few else self.pool))
            yield int(rng.integers(2**31)), chosen[:rows], chosen[rows : 2 * rows]


def scene_of(data: str, layers: int, seed: int, *, own_words: bool = False) -> Scene:
    """MiniLM's first blocks, and trec6 or pydoc-topics; if `own_words`, with the embeddings of the
    tokens of these alone, among which a server then has to look.
    """
    if data == "trec6":
        from pyarrow import parquet

        table = parquet.read_table(DATA / "trec6" / "train.parquet")
        names = tuple(json.loads(table.schema.metadata[b"label_names"]))
        columns = table.to_pydict()
        texts, labels = tuple(columns["text"]), np.array(columns["label"])
    else:
        names, found = tuple(TOPICS), read()
        texts = tuple(text for text, _, _ in found)
        labels = np.array([names.index(topic) for _, topic, _ in found])
    base, tokenizer = load("minilm", kind="classification", classes=len(names), layers=layers)
    rows = Rows(texts=texts, pairs=None, labels=labels, columns={})
    train, known = encode(tokenizer, rows, "classification", PLACES), tokenizer.all_special_ids
    if own_words:
        train, known = _own_words(base, train, known)
    task = Task(
        kind="classification",
        base=base,
        train=train,
        test=train,
        label_names=names,
        max_tokens=PLACES,
        rounds=ROUNDS,
    )
    return Scene.of(task, known, public=PUBLIC, pool=POOL, candidates=CANDIDATES, seed=seed)


def _own_words(base: Base, rows: Examples, known: Sequence[int]) -> tuple[Examples, list[int]]:
    """Rows and special tokens in the numbers of a vocabulary of these alone, which becomes that of
    the base.
    """
    kept = np.unique([*rows.ids, *known, rows.padding])
    embeddings = base.skeleton.get_input_embeddings()
    embeddings.weight = torch.nn.Parameter(embeddings.weight[kept], requires_grad=False)
    embeddings.num_embeddings = base.config.vocab_size = len(kept)
    embeddings.padding_idx = int(np.searchsorted(kept, rows.padding))
    ids = np.searchsorted(kept, rows.ids).astype(rows.ids.dtype)
    numbered = replace(rows, ids=ids, padding=embeddings.padding_idx)
    return numbered, np.searchsorted(kept, known).tolist()


@dataclass(frozen=True)
class Found:
    """The result of one attack over all answers: the score of each, and the same for rows that the
    answer is not about.
    """

    server: str
    what: str  # "tokens", "texts", "labels", "members" or "refused"
    attack: str
    scores: list[float]
    control: list[float]
    refused: str | None = None  # a site's line, where `what` is "refused"

    def row(self, method: str, terms: tuple[int, int]) -> dict[str, Any]:
        if self.refused is not None:
            row = {"method": method, "server": self.server, "what": self.what}
            return row | {"attack": self.attack, "terms": terms, "line": self.refused}
        low, high = attacks.interval(self.scores)
        chance = attacks.interval(self.control) if self.control else (0.5, 0.5)
        return {
            "method": method,
            "server": self.server,
            "what": self.what,
            "attack": self.attack,
            "terms": terms,
            "answers": len(self.scores),
            "mean": float(np.mean(self.scores)),
            "low": low,
            "high": high,
            "control": float(np.mean(self.control)) if self.control else 0.5,
            "control_low": chance[0],
            "control_high": chance[1],
            "whole": float(np.mean([score >= 1 - 1e-9 for score in self.scores])),  # all found
        }


class Tally:
    """Scores by server, what was sought and attack, and what the default terms refuse."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._found: dict[tuple[str, str, str], Found] = {}

    def allowed(self, server: str, attack: str, order: Any, method: str, rows: int) -> bool:
        """Whether a site of the default terms and so many rows answers an order; its line is kept
        where not.
        """
        line = orders.refusal(order, method, self._scene.task, DEFAULT, rows)
        if line is not None:
            self._found[server, "refused", attack] = Found(server, "refused", attack, [], [], line)
        return line is None

    def add(
        self, server: str, what: str, attack: str, score: float, control: float | None = None
    ) -> None:
        key = server, what, attack
        found = self._found.setdefault(key, Found(*key, [], []))
        found.scores.append(score)
        if control is not None:
            found.control.append(control)

    def tokens(
        self, server: str, attack: str, came: Any, used: np.ndarray, unused: np.ndarray
    ) -> None:
        """Recall of the distinct tokens of the rows used, and of others from the same answer; with
        it the share of rows of which no token is missing.

        `came` are tokens, or scores of all of them, of which as many count as there are.
        """
        recalls, whole = [], []
        for rows in (used, unused):
            held = ground.distinct_tokens(self._scene.pool.take(rows), self._scene.known)
            said = came if isinstance(came, set) else attacks.best(came, len(held))
            recalls.append(len(said & held) / len(held))
            texts = (self._scene.pool.take(np.array([row])) for row in rows)
            missing = [ground.distinct_tokens(text, self._scene.known) - said for text in texts]
            whole.append(float(np.mean([not tokens for tokens in missing])))
        self.add(server, "tokens", attack, *recalls)
        self.add(server, "texts", attack, *whole)

    def labels(
        self, server: str, attack: str, counts: np.ndarray, used: np.ndarray, unused: np.ndarray
    ) -> None:
        """The share of rows whose class is among the counts, and of others from the same answer."""
        shares = []
        for rows in (used, unused):
            held = np.bincount(self._scene.pool.labels[rows], minlength=len(counts))
            shares.append(float(np.minimum(held, counts).sum() / len(rows)))
        self.add(server, "labels", attack, *shares)

    @property
    def found(self) -> list[Found]:
        return list(self._found.values())
