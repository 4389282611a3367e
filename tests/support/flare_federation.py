"""A federation for tests on this machine: a server and three sites with the toy task's rows, with
the same processes as on several machines.
"""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from toy import CLASS_WORDS, MAX_TOKENS, TEST_ROWS, TRAIN_ROWS, toy_rows

from fedspine.data.dataset import Rows
from fedspine.flare.provision import Kits, Project, create, write_site_file
from fedspine.flare.site_secret import SECRET
from fedspine.methods import all_methods
from fedspine.ui.fleet_demo import Federation, free_port, running

SITES = ("east", "north", "west")
NAMES = tuple(words[0] for words in CLASS_WORDS)  # of the classes, as in a site's file
# settings of short runs
ALLOW = {
    "methods": list(all_methods()),
    "fewest_rows": 1,
    "fewest_steps": 1,
    "noise": 0.0,
    "largest_rank": 64,
    "largest_merged_rank": 64,
    "optimisers": ["adamw", "adamw-kept", "sgd"],
}


@dataclass(frozen=True)
class Place:
    """A folder with kits, each with its site's rows, and the operator's data."""

    folder: Path
    kits: Kits
    shares: dict[str, np.ndarray]  # the row indices of the toy task by site
    recipe: dict[str, dict]  # tables of a recipe, to be completed


def labelled(rows):
    return pa.table({"text": rows.texts, "label": [NAMES[label] for label in rows.labels]})


def shared_out(rows, sites=SITES):
    """Unequal shares, so that weights matter; disjoint."""
    order = np.random.default_rng(7).permutation(rows)
    sizes = np.arange(4, 4 + len(sites))
    cuts = rows * np.cumsum(sizes)[:-1] // sizes.sum()
    return {site: np.sort(part) for site, part in zip(sites, np.split(order, cuts), strict=True)}


def make_place(folder, model, sites=SITES, *, model_name="tiny", **site_tables):
    """Kits and rows in `folder`; `site_tables` are further tables of every site's file.

    Sites allow all methods, and answers of any number of rows and steps; their draws are those of
    simulations.
    """
    train = toy_rows(TRAIN_ROWS, 0)
    made = create(
        Project(name="toys", host="127.0.0.1", port=free_port(), sites=tuple(sites)),
        folder / "kits",
    )
    shares = shared_out(TRAIN_ROWS, sites)
    for site, share in shares.items():
        rows = Rows(
            texts=tuple(train.texts[i] for i in share),
            pairs=None,
            labels=train.labels[share],
            columns={},
        )
        pq.write_table(labelled(rows), made.folder / site / "rows.parquet")
        tables = {
            "data": {"path": "rows.parquet"},
            "models": {model_name: str(model)},
            "allow": ALLOW,
        } | site_tables
        write_site_file(made.folder / site, name=site, **tables)
        (made.folder / site / SECRET).touch(0o600)  # empty: the draws of a simulation
    (folder / "data").mkdir()
    pq.write_table(labelled(train), folder / "data" / "train.parquet")
    pq.write_table(labelled(toy_rows(TEST_ROWS, 1)), folder / "data" / "test.parquet")
    named = folder / model_name  # sites know a model folder by its last part
    shutil.copytree(model, named)  # no link, which a recipe would resolve to another name
    task = {"model": str(named), "data": str(folder / "data"), "max_tokens": MAX_TOKENS}
    recipe = {"task": task, "fleet": {"devices": len(sites), "per_round": len(sites)}}
    return Place(folder, made, shares, recipe)


def write_recipe(place, path, **tables):
    """A recipe over the place's data, overridden by these tables."""
    path.write_text(
        tomli_w.dumps(
            {
                name: place.recipe.get(name, {}) | tables.get(name, {})
                for name in {*place.recipe, *tables}
            }
        )
    )
    return path


@contextmanager
def federation_of(place) -> "Federation":
    """The place's server and sites, connected."""
    with running(place.kits) as federation:
        yield federation


@pytest.fixture(scope="session")
def place(tiny_folder, tmp_path_factory):
    """The one place that tests share."""
    pytest.importorskip("nvflare", reason="a fleet of real machines needs the extra `flare`")
    return make_place(tmp_path_factory.mktemp("federation"), tiny_folder("bert"))


@pytest.fixture(scope="session")
def federation(place):
    """Server and sites of the shared place; a test that stops one of them starts it again."""
    with federation_of(place) as running_now:
        yield running_now
