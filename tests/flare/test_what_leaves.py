"""docs/fleets.md on what leaves a site and what can be read from it: its tables are compared with
the messages, its sentences with attacks.
"""

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flare_federation import NAMES
from hostile_server import ROWS, SGD, few_rows
from toy import toy_rows

from fedspine.core.device import find_work
from fedspine.core.message import unpack
from fedspine.core.schema import work_kinds
from fedspine.data.dataset import Rows
from fedspine.flare.site_disk import MEMORY
from fedspine.flare.site_terms import AllowSection
from fedspine.flare.site_worker import works_of
from fedspine.methods import all_methods, sends_features
from fedspine.methods.fedlora import tune_adapter
from fedspine.pruning.head_start import MeansOrder, class_means
from fedspine.split.cut import split_model_of
from fedspine.split.device import HELD, answer, begin, end
from fedspine.split.interface import Features
from fedspine.split.label_distribution import LabelQuery, label_distribution
from fedspine.split.messages import Answer, Step
from fedspine.split.wire import gradient_wired, unwired
from fedspine.storage.store import unsealed

DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"`([\w.-]+)`")


def tables(page, first):
    """The cells of the rows of the table with this first heading."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def results():
    """The message class of every result of a site, by name."""
    works = {work for method in all_methods() for work in works_of(method)}
    kinds = [work_kinds(find_work(work))[1] for work in works]
    return {kind.__name__: kind for kind in kinds}


def test_the_table_of_methods_has_all_works_with_their_results():
    documented = {}
    for methods, works in tables("fleets.md", "method"):
        names = NAME.findall(works)
        for method in NAME.findall(methods):
            documented[method] = dict(zip(names[::2], names[1::2], strict=True))
    assert documented == {
        method: {
            work.split(":")[1]: work_kinds(find_work(work))[1].__name__ for work in works_of(method)
        }
        for method in all_methods()
    }


def described():
    """(result, field, shape) of each row; an empty cell repeats the name above."""
    found, result = [], ""
    for first, names, shape, _, _ in tables("fleets.md", "result"):
        result = NAME.findall(first)[0] if first else result
        found += [(result, name, shape) for name in NAME.findall(names)]
    return found


def test_the_table_of_results_has_all_their_fields():
    documented = sorted((result, name) for result, name, _ in described())
    assert documented == sorted(
        (name, field.name) for name, kind in results().items() for field in fields(kind)
    )


def numbers(value):
    """All tensors and arrays in a value."""
    if isinstance(value, dict):
        return [found for each in value.values() for found in numbers(each)]
    if isinstance(value, torch.Tensor | np.ndarray):
        return [value]
    return [found for each in getattr(value, "__dict__", {}).values() for found in numbers(each)]


def test_the_shapes_are_those_of_the_answers(hostile):
    site = hostile(allow={"methods": list(all_methods()), "fewest_steps": 1})
    came = []
    for method, work, order in few_rows(site, 32):
        if method != "locfedmix":
            came.append(site.opened(method).ask(work, order))
    head = site.base.initial_head(np.random.default_rng(0))
    site.opened("mergesfl-plus")
    features = site.ask(begin, site.begin(ending=head, ending_optimising=SGD))
    back = Answer(features=gradient_wired(unwired(features.features), "fp32"))
    came += [features, site.ask(answer, back, memory=1, version=2)]
    came += [site.ask(end, Step(gradient=None), memory=2, version=3)]
    came += [site.ask(label_distribution, LabelQuery(classes=3, longest=16))]
    assert {type(one).__name__ for one in came} == set(results())
    shapes = {(result, name): shape for result, name, shape in described()}
    for one in came:
        for field in fields(one):
            value, shape = getattr(one, field.name), shapes[type(one).__name__, field.name]
            if "as `LoraResult`" in shape:
                shape += shapes.get(("LoraResult", field.name), shapes["LoraResult", "loss"])
            documented = {len(part.split(",")) for part in re.findall(r"\[([a-z, ]+)\]", shape)}
            for tensor in numbers(value):
                assert tensor.ndim in documented, (type(one).__name__, field.name, tensor.shape)
            if isinstance(value, int | float):
                assert "number" in shape, (type(one).__name__, field.name)


def test_the_terms_have_the_defaults_that_the_guide_says():
    section = (DOCS / "real-devices.md").read_text().split("## What a site allows")[1]
    documented = dict(
        re.findall(r"^\| `(\w+)` \| (.*?) \|", section.split("\n## ")[0], re.MULTILINE)
    )
    known = {name: field.default for name, field in AllowSection.model_fields.items()}
    assert documented.keys() == known.keys()
    for name, default in known.items():
        if default is not None:
            given = list(default) if isinstance(default, tuple) else default
            assert tomllib.loads(f"it = {documented[name]}") == {"it": given}, name


# --- what the page says can be read ---


def held(site, version=1):
    """Labels, lengths and tokens of the site's current batch, from its memory."""
    path = site.folder / MEMORY / site.run / f"{version:09d}.safetensors"
    rows = unpack(unsealed(path.read_bytes()))[HELD].rows
    return site.worker._open.holding.examples.take(rows)


def test_labels_and_lengths_of_single_rows_leave_in_a_split_method(hostile):
    site = hostile(allow={"methods": ["splitlora"]}).opened("splitlora")
    came = site.ask(begin, site.begin())
    assert came.labels.tolist() == held(site).labels.tolist()
    assert came.features.mask.sum(1).tolist() == held(site).lengths.tolist()


def guesses(site, features, ending, labels):
    """The gradient of each row's loss at the middle's output, for each guess of the labels."""
    model, found = split_model_of(site.base, 1, rank=4), []
    for guess in labels:
        values = features.values.detach().clone().requires_grad_()
        entered = Features(values=values, mask=features.mask)
        lost = model.ending_forward(ending, entered, guess, seed=None)
        found.append(torch.autograd.grad(lost.total.sum(), values)[0])
    return torch.stack(found)


def asked_back(site, ending):
    """The middle's output that the server sent, and the gradient that came back."""
    order = site.begin(ending=ending, ending_optimising=SGD)
    features = unwired(site.ask(begin, order).features)
    sent = Answer(features=gradient_wired(features, "fp32"))
    came = site.ask(answer, sent, memory=1, version=2)
    return features, unwired(came.gradient, features.mask).values


def test_labels_are_read_from_the_gradients_of_the_u_shape(hostile):
    site = hostile(allow={"methods": ["mergesfl-plus"]}).opened("mergesfl-plus")
    ending = site.base.initial_head(np.random.default_rng(0))
    features, gradient = asked_back(site, ending)
    rows = len(features)
    tried = guesses(site, features, ending, [torch.full((rows,), c) for c in range(len(NAMES))])
    read = (tried - gradient).flatten(2).norm(dim=2).argmin(0)
    assert read.tolist() == held(site).labels.tolist()


def test_tokens_are_read_from_the_gradients_of_the_u_shape(hostile):
    site = hostile(allow={"methods": ["mergesfl-plus"]}, kind="causal-lm").opened("mergesfl-plus")
    features, gradient = asked_back(site, {})
    shape = features.mask.shape
    every = [torch.full(shape, token) for token in range(len(site.tokenizer))]
    tried = guesses(site, features, {}, every)
    read, own = (tried - gradient).norm(dim=3).argmin(0), held(site)
    for row, length in enumerate(own.lengths.tolist()):
        text = own.ids[own.offsets[row] : own.offsets[row + 1]].tolist()
        assert read[row, : length - 1].tolist() == text[1:]


def test_the_heads_bias_tells_which_classes_are_rare(hostile):
    rows = toy_rows(60, 0)
    keep = np.flatnonzero(rows.labels < 2)
    two = Rows(
        texts=tuple(rows.texts[i] for i in keep), pairs=None, labels=rows.labels[keep], columns={}
    )
    site = hostile(rows=two, allow={"noise": 0.0}).opened("fedlora")
    order = site.lora(batch=32, learning_rate=1e-4)
    # to which all classes are about equally likely
    even = {name: 1e-2 * tensor for name, tensor in order.head.items()}
    order = replace(order, head=even)
    came = site.ask(tune_adapter, order)
    (bias,) = [name for name in order.head if name.endswith(".bias")]
    change = came.head[bias].float() - order.head[bias].float()
    examples = site.worker._open.holding.examples
    there = np.bincount(examples.labels, minlength=len(NAMES)) > 0
    assert (change > 0).tolist() == there.tolist()


def test_without_noise_class_means_and_label_distributions_tell_the_exact_counts(hostile):
    site = hostile(allow={"methods": ["mergesfl", "fedlora"], "noise": 0.0})
    opened = site.opened("fedlora")
    counts = np.bincount(site.worker._open.holding.examples.labels, minlength=len(NAMES))
    assert opened.ask(class_means, MeansOrder(rows=ROWS)).counts.tolist() == counts.tolist()
    shares = site.opened("mergesfl").ask(label_distribution, LabelQuery(classes=3, longest=16))
    assert (shares.shares * ROWS).round().astype(int).tolist() == counts.tolist()


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_the_page_of_real_devices_names_the_methods_that_send_features(method):
    page = (DOCS / "real-devices.md").read_text()
    documented = re.search(r"Split methods \((.*?)\)", page).group(1)
    families = {
        "adasfl": "AdaSFL", "locfedmix": "LocFedMix", "mergesfl": "both MergeSFL",
        "mergesfl-plus": "both MergeSFL", "splitfed_v1": "SplitFed", "splitfed_v2": "SplitFed",
        "splitlora": "SplitLoRA",
    }  # fmt: skip
    assert sends_features(all_methods()[method]) == (method in families)
    if method in families:
        assert families[method] in documented.split(", ")
