"""Fixtures for all tests; shapes in the annotations of the packages named below are checked at run
time.

In each test the first calls of each function are checked, and then every so many-th: checking all
of them took more than half of the time of a run of the toy task.
"""

import dataclasses
import functools
import gc
import inspect
import os
import tempfile

# what is first imported under the hook below is compiled again, so here comes what takes seconds
import beartype.claw  # noqa: F401
import jaxtyping
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel  # noqa: F401

os.environ["FEDSPINE_CACHE"] = tempfile.mkdtemp(prefix="fedspine-cache-")  # never the user's own

FIRST_CALLS = 4  # of a function in a test, all checked
# of the calls after those; a prime, so that it does not keep step with layers or batches
EVERY = 97
JAXTYPED = jaxtyping.jaxtyped
this_test = 0  # the number of the test that runs


def sampled(fn=None, *, typechecker):
    """jaxtyping's decorator, which the import hook puts on each function, with its checks left out
    by turns.
    """
    if fn is None:
        return functools.partial(sampled, typechecker=typechecker)
    if inspect.isclass(fn):  # whose methods are decorated, but for what dataclass wrote
        if dataclasses.is_dataclass(fn):
            fn.__init__ = sampled(fn.__init__, typechecker=typechecker)
        return fn
    checked, test, count = JAXTYPED(fn, typechecker=typechecker), this_test, 0

    @functools.wraps(fn)
    def called(*args, **kwargs):
        nonlocal test, count
        test, count = this_test, count + 1 if test == this_test else 1
        if count > FIRST_CALLS and count % EVERY:
            return fn(*args, **kwargs)
        return checked(*args, **kwargs)

    return called


jaxtyping.jaxtyped = sampled  # what the hook writes into a module looks it up there

# before fedspine is imported; elsewhere annotations name protocols and forward references that
# cannot be checked
jaxtyping.install_import_hook(
    ["fedspine.core.tensors", "fedspine.lm", "fedspine.split.split_transformer"],
    "beartype.beartype",
)

import pytest  # noqa: E402
from flare_federation import federation, place  # noqa: E402, F401
from hostile_server import hostile, models  # noqa: E402, F401
from hypothesis import settings  # noqa: E402
from toy import Lab, toy_task  # noqa: E402

from fedspine.lm.load import load  # noqa: E402
from fedspine.lm.tiny import write_tiny  # noqa: E402
from fedspine.report import drawing  # noqa: E402

collect_ignore = ["conftest.py"]  # has no examples, and src has a module of this name, too

# the same cases every time; `pytest --hypothesis-profile=search` draws new ones, and ten times as
# many
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("same")

# minutes each, so that the workers begin with them and none is left with one at the end
LONG = ("test_federation", "test_every_method", "test_sweep", "test_controls")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    # half a million objects that imports made, which each full collection would look through
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _shapes_are_checked_anew():
    global this_test
    this_test += 1


@pytest.fixture(scope="session", autouse=True)
def real_drawing():
    """A figure as text, which takes 50 ms; in the pages that tests write in this process, an empty
    element takes its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        real = drawing._drawn
        patch.setattr(drawing, "_drawn", lambda panel: "<svg>not drawn</svg>")
        yield real


@pytest.fixture
def drawn(real_drawing, monkeypatch):
    """Pages that the test writes contain their figures."""
    monkeypatch.setattr(drawing, "_drawn", real_drawing)


torch.set_num_threads(1)  # sums must not depend on how many cores there are


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny random model by its architecture; written once."""
    root = tmp_path_factory.mktemp("tiny")
    written = {}

    def folder(model_type):
        if model_type not in written:
            written[model_type] = write_tiny(root / model_type, model_type)
        return written[model_type]

    return folder


@pytest.fixture(scope="session")
def task(tiny_folder):
    """The toy classification task on the tiny BERT, five rounds of it."""
    base, tokenizer = load(str(tiny_folder("bert")), kind="classification", classes=3)
    return toy_task(base, tokenizer, rounds=5)


@pytest.fixture(scope="session")
def decoder(tiny_folder):
    """A tiny Llama for language modelling, with its tokenizer."""
    return load(str(tiny_folder("llama")), kind="causal-lm")


@pytest.fixture
def lab(task, tmp_path):
    """A function that builds a simulated fleet over the toy task, closed after the test."""
    built = []

    def make(name="lab", **settings):
        built.append(Lab(task, tmp_path / name, **settings))
        return built[-1]

    yield make
    for each in built:
        each.close()
