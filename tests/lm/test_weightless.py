"""A base from a configuration alone has the sizes of the one with weights."""

import pytest
import torch
from tiny_models import KINDS, LABELS, tiny

from fedspine.core.message import pack
from fedspine.lm import weightless


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weightless")


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_sizes_are_those_of_the_loaded_base(architecture, kind, folder):
    base, _ = tiny(folder, architecture, kind)
    (place,) = folder.glob(f"tiny-{architecture}")
    for file in place.glob("*.safetensors"):
        file.write_bytes(b"")  # which nobody reads
    bare = weightless.load(str(place), kind=kind, classes=len(LABELS))
    assert pack(bare.layout).payload == pack(base.layout).payload
    assert (bare.embeddings, bare.pooling) == (base.embeddings, base.pooling)
    shapes = [[(layer.path, layer.weight.shape) for layer in each.head] for each in (bare, base)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in bare.skeleton.parameters())
    assert bare.device == torch.device("meta")
