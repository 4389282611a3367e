"""The benchmark's numbers: derived ones are checked exactly, measured ones only for their order."""

import sys

import pytest
import torch
from tiny_models import LABELS, minilm, model_on, tiny

from fedspine.core.errors import BadInput
from fedspine.exports.bench import CALLS, bench, compare, peak_memory_bytes, random_ids
from fedspine.exports.hf import export, load_model
from fedspine.lm.load import load as load_base
from fedspine.lm.tiny import write_tiny

OPTIONS = {"kind": "classification", "max_tokens": 64, "name": "toy"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny BERT that reads the mean of its tokens, whole and with 2 of 4 heads and 32 of 64
    channels in each layer.
    """
    folder = tmp_path_factory.mktemp("bench")
    place = str(write_tiny(folder / "tiny", "bert"))
    base, tokenizer = load_base(place, kind="classification", classes=3, pooling="mean")
    for name, model in (("whole", model_on(base)), ("half", model_on(base, [2, 2], [32, 32]))):
        export(base, model, tokenizer, folder / name, labels=LABELS, **OPTIONS)
    return folder / "whole", folder / "half"


@pytest.fixture(scope="module")
def one(folders):
    """The measurement of the whole model, by a process that itself holds 600 MB; and the numbers of
    threads before and after.
    """
    held, threads = torch.ones(150_000_000), torch.get_num_threads()
    found = bench(folders[0], tokens=8, repeats=2)
    del held
    return found, threads, torch.get_num_threads()


@pytest.fixture(scope="module")
def two(folders):
    whole, half = folders
    return compare(half, whole, tokens=8, repeats=2)


def test_bench_of_one(folders, one):
    whole, _ = folders
    found, threads_before, threads_after = one
    assert threads_before == threads_after
    # 2 layers of 4 projections of 32 x 32 and 2 of 32 x 64
    assert found.block_parameters == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert found.file_bytes == (whole / "model.safetensors").stat().st_size
    # fp32 and a header
    assert 4 * found.parameters < found.file_bytes < 4 * found.parameters + 20_000
    assert set(found.latency_seconds) == {1, 32}
    assert all(0 < seconds < 10 for seconds in found.latency_seconds.values())
    assert found.peak_memory_bytes > found.file_bytes


def test_two_side_by_side(folders, two):
    _, half = folders
    assert two.block_ratio == 0.5
    assert (
        two.file_ratio
        == half.joinpath("model.safetensors").stat().st_size / two.against.file_bytes
        < 1
    )
    assert set(two.latency_ratio) == set(CALLS)
    assert two.memory_ratio == two.model.peak_memory_bytes / two.against.peak_memory_bytes


def test_peak_memory_is_that_of_the_child(one, two):
    """600 MB held by the measuring process must not show in the process that it starts."""
    # of the same model, alone and beside another: a sixth of what would show
    assert abs(one[0].peak_memory_bytes - two.against.peak_memory_bytes) < 100e6


def test_a_child_that_the_kernel_ends_is_bad_input(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BadInput, match="ended by signal 9; free memory"):
        peak_memory_bytes(tmp_path, tokens=4)


@pytest.mark.parametrize(("name", "room"), [("bert", 130), ("roberta", 129), ("llama", 128)])
def test_more_tokens_than_positions_are_refused(tmp_path, name, room):
    base, tokenizer = tiny(tmp_path, name)
    export(base, model_on(base), tokenizer, tmp_path / "e", labels=LABELS, **OPTIONS)
    with pytest.raises(BadInput, match=f"1000 tokens are more than the {room} positions"):
        bench(tmp_path / "e", tokens=1000, repeats=1)
    model = load_model(tmp_path / "e")
    with torch.inference_mode():
        assert model.module(input_ids=random_ids(model, 1, room)).logits.shape == (1, 3)


def test_half_of_minilm(tmp_path):
    # benchmarks/deployed.py measures the speed: no test asserts a time
    base, tokenizer = minilm()
    labels = tuple("abcdefgh")
    for name, model in (("whole", model_on(base)), ("half", model_on(base, [6] * 6, [768] * 6))):
        export(base, model, tokenizer, tmp_path / name, labels=labels, **OPTIONS)
    whole, half = load_model(tmp_path / "whole"), load_model(tmp_path / "half")
    assert half.block_parameters * 2 == whole.block_parameters
    assert half.parameters <= whole.parameters - half.block_parameters
    stored = (tmp_path / "half" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(stored[:8], "little")
    assert len(stored) == header + 4 * half.parameters
