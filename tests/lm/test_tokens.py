"""Tokenised data on disk: the same as made anew, mapped and not copied, and never needed."""

import dataclasses
import shutil
import threading

import numpy as np
import pytest
from toy import toy_rows

from fedspine.core.task import Examples
from fedspine.lm import tokens as module
from fedspine.lm.encode import encode
from fedspine.lm.load import load
from fedspine.lm.tokens import tokens


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
    monkeypatch.setattr(
        module, "encode", lambda *given, **named: (counted.append(1), encode(*given, **named))[1]
    )
    return counted


def assert_same(first, second):
    for field in dataclasses.fields(Examples):
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs, (
            field.name
        )


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
    # a mapped one would be damaged with its file
    expected = encode(tokenizer, rows, "classification", 6)
    tokens(tokenizer, rows, "classification", 6)
    (folder,) = cache.iterdir()
    for damage in (
        lambda: (folder / "ids.npy").write_bytes(b"no array"),
        lambda: (folder / "ids.npy").unlink(),
        lambda: np.save(folder / "ids.npy", np.arange(3)),
        lambda: (folder / "examples.json").write_text("{"),
        lambda: (folder / "examples.json").write_text("[]"),
        lambda: (folder / "labels.npy").unlink(),
        lambda: (folder / "ids.npy").write_bytes(b""),
        lambda: (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-8] + bytes(8)),
        lambda: shutil.rmtree(folder),
    ):
        damage()
        assert_same(tokens(tokenizer, rows, "classification", 6), expected)
        assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "change",
    [{"pad_token": "[UNK]"}, {"truncation_side": "left"}, {"model_input_names": ["input_ids"]}],
    ids=str,
)
def test_another_tokenizer_of_the_same_words_has_its_own(cache, tiny_folder, change):
    rows = toy_rows(20, 0)
    for changed in ({}, change):
        tokenizer = load(str(tiny_folder("bert")), kind="classification", classes=3)[1]
        for name, value in changed.items():
            setattr(tokenizer, name, value)
        assert_same(
            tokens(tokenizer, rows, "classification", 4),
            encode(tokenizer, rows, "classification", 4),
        )


def test_without_a_home_nothing_is_stored(monkeypatch, tokenizer):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDSPINE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(module.Path, "home", nobody)
    rows = toy_rows(20, 0)
    assert_same(
        tokens(tokenizer, rows, "classification", 6), encode(tokenizer, rows, "classification", 6)
    )


def test_processes_that_store_the_same_at_once_never_see_half_of_it(cache, tokenizer):
    rows = pairs(toy_rows(20, 0))
    expected = encode(tokenizer, rows, "pair", 6)
    stop, wrong = threading.Event(), []

    def spoil():
        while not stop.is_set():
            for folder in list(cache.glob("[0-9a-f]*")) if cache.exists() else []:
                shutil.rmtree(folder, ignore_errors=True)

    vandal = threading.Thread(target=spoil)
    vandal.start()
    try:
        for _ in range(60):
            found = tokens(tokenizer, rows, "pair", 6)
            wrong += [
                f
                for f in ("ids", "labels", "segments")
                if not np.array_equal(getattr(found, f), getattr(expected, f))
            ]
    finally:
        stop.set()
        vandal.join()
    assert not wrong


def test_without_a_place_to_store_nothing_is_lost(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path / "file"))
    rows = toy_rows(20, 0)
    assert_same(
        tokens(tokenizer, rows, "classification", 6), encode(tokenizer, rows, "classification", 6)
    )


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
