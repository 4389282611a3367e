"""Tokenised data on disk: the same as made anew, mapped and not copied, and never needed."""

import dataclasses
import shutil

import numpy as np
import pytest
from toy import toy_rows

from fedspine.lm import tokens as module
from fedspine.lm.encode import encode
from fedspine.lm.load import load
from fedspine.lm.tokens import tokens
from fedspine.task import Examples


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenizer(tiny_folder):
    return load(str(tiny_folder("bert")), kind="classification", classes=3)[1]


@pytest.fixture
def made(monkeypatch):
    """Counts how often texts are tokenised."""
    counted = []
    monkeypatch.setattr(module, "encode", lambda *arguments: (counted.append(1), encode(*arguments))[1])
    return counted


def assert_same(first, second):
    for field in dataclasses.fields(Examples):
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs, field.name


def pairs(rows):
    return dataclasses.replace(rows, pairs=tuple(reversed(rows.texts)))


@pytest.mark.parametrize("change", [lambda rows: rows, pairs], ids=["texts", "pairs"])
@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_stored_is_made_anew(cache, tokenizer, made, kind, change):
    rows = change(toy_rows(40, 0)) if kind == "classification" else toy_rows(40, 0)
    expected = encode(tokenizer, rows, kind, 6)
    assert_same(tokens(tokenizer, rows, kind, 6), expected)
    stored = tokens(tokenizer, rows, kind, 6)
    assert_same(stored, expected)
    assert len(made) == 1
    assert isinstance(stored.ids.base, np.memmap) and not stored.ids.flags.writeable


def test_whatever_changes_tokens_is_stored_for_itself(cache, tokenizer, tiny_folder, made):
    rows = toy_rows(20, 0)
    other = load(str(tiny_folder("llama")), kind="causal-lm")[1]
    variants = [
        (tokenizer, rows, "classification", 6),
        (tokenizer, rows, "classification", 7),
        (tokenizer, rows, "causal-lm", 6),
        (other, rows, "classification", 6),
        (tokenizer, toy_rows(20, 1), "classification", 6),
        (tokenizer, pairs(rows), "classification", 6),
        (tokenizer, dataclasses.replace(rows, labels=rows.labels[::-1]), "classification", 6),
        (
            tokenizer,
            dataclasses.replace(rows, texts=(rows.texts[0] + rows.texts[1], *rows.texts[1:])),
            "classification",
            6,
        ),
    ]
    for _ in range(2):
        for variant in variants:
            assert_same(tokens(*variant), encode(*variant))
    assert len(made) == len(variants) == len(list(cache.iterdir()))


def test_a_damaged_or_half_gone_folder_is_made_anew(cache, tokenizer):
    rows = toy_rows(20, 0)
    expected = encode(tokenizer, rows, "classification", 6)  # a mapped one would be damaged with its file
    tokens(tokenizer, rows, "classification", 6)
    (folder,) = cache.iterdir()
    for damage in (
        lambda: (folder / "ids.npy").write_bytes(b"no array"),
        lambda: (folder / "ids.npy").unlink(),
        lambda: np.save(folder / "ids.npy", np.arange(3)),
        lambda: (folder / "examples.json").write_text("{"),
        lambda: shutil.rmtree(folder),
    ):
        damage()
        assert_same(tokens(tokenizer, rows, "classification", 6), expected)
        assert [path.name for path in cache.iterdir()] == [folder.name]


def test_without_a_place_to_store_nothing_is_lost(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path / "file"))
    rows = toy_rows(20, 0)
    assert_same(tokens(tokenizer, rows, "classification", 6), encode(tokenizer, rows, "classification", 6))


def test_the_oldest_make_way(cache, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    for length in (4, 5, 6):
        tokens(tokenizer, toy_rows(20, 0), "classification", length)
    assert len(list(cache.iterdir())) == 2


def test_a_stored_share_is_taken_and_padded_as_ever(cache, tokenizer):
    rows = toy_rows(40, 0)
    stored, made = tokens(tokenizer, rows, "causal-lm", 6), encode(tokenizer, rows, "causal-lm", 6)
    chosen = np.array([5, 3, 30])
    assert_same(stored.take(chosen), made.take(chosen))
    for name, tensor in stored.batch(chosen).items():
        assert tensor.equal(made.batch(chosen)[name])
