"""Cut a tokenizer to some of its tokens, for WordPiece, BPE and Unigram of `tokenizers`.

Ids are renumbered in their order. Special and added tokens, the unknown token, byte tokens and
single characters stay, so every text that could be encoded still can. A text whose tokens are all
kept has the same tokens as before: WordPiece takes the longest piece that there is, Unigram the
likeliest pieces, and of BPE all merges stay that make a kept token, so the same ones come first.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fedspine.core.errors import BadInput

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
KINDS = ("WordPiece", "BPE", "Unigram")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_NAMED = 3  # tokens that a message lists


@dataclass(frozen=True)
class Definition:
    """A tokenizer's definition as `tokenizer.json` has it.

    Raises BadInput for a tokenizer that has none, and for a kind that cannot be cut.
    """

    content: dict[str, Any]
    _parts: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        kind = self.content["model"].get("type")
        if kind not in KINDS:
            raise BadInput(
                f"the model's tokenizer is of the kind {kind}, whose vocabulary cannot be cut; "
                f"leave task.vocabulary out, or take a model with one of {', '.join(KINDS)}"
            )

    @classmethod
    def of(cls, tokenizer: Any) -> "Definition":
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BadInput(
                "the model's tokenizer has no tokenizer.json, so its vocabulary cannot be cut; "
                "leave task.vocabulary out"
            )
        return cls(json.loads(backend.to_str()))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token, of those added to the model's own, too."""
        return self._own_ids | {token["content"]: token["id"] for token in self._added}

    @cached_property
    def tokens(self) -> dict[int, str]:
        return {id: token for token, id in self.ids.items()}

    def required(self) -> set[int]:
        """The ids of what has to stay: added and special tokens, the unknown token, and what makes
        any text encodable.
        """
        unknown = self._model.get("unk_token")
        if self._model["type"] == "Unigram" and self._model.get("unk_id") is not None:
            unknown = self._model["vocab"][self._model["unk_id"]][0]
        named = [unknown, *(token["content"] for token in self._added), *self._alphabet()]
        return {self.ids[token] for token in named if token in self.ids}

    def with_parts(self, id: int) -> set[int]:
        """A token and all tokens from which BPE makes it; of other kinds the token alone."""
        token = self.tokens.get(id)
        if token is None or self._model["type"] != "BPE":
            return {id}
        return {id} | {
            self.ids[part] for part in self._intermediate_tokens(token) if part in self.ids
        }

    def cut(self, kept: Sequence[int]) -> "Definition":
        """The definition of these tokens alone, ascending old ids, of which each becomes its place.

        Raises BadInput where one of `required` is missing, or a part of a BPE token.
        """
        places = {id: place for place, id in enumerate(kept)}
        self._check(places)
        content = json.loads(json.dumps(self.content)) | {"truncation": None, "padding": None}
        model = content["model"]
        if model["type"] == "Unigram":
            unknown = model.get("unk_id")
            model["vocab"] = [model["vocab"][id] for id in kept if id < len(model["vocab"])]
            model["unk_id"] = None if unknown is None else places[unknown]
        else:
            model["vocab"] = {
                token: places[id] for token, id in self._own_ids.items() if id in places
            }
        if model["type"] == "BPE":
            there = model["vocab"]
            model["merges"] = [
                merge
                for merge, (left, right) in zip(self._model["merges"], self._merges, strict=True)
                if left in there and right in there and self._merged_token(left, right) in there
            ]
        content["added_tokens"] = [token | {"id": places[token["id"]]} for token in self._added]
        content["post_processor"] = _renumbered(content.get("post_processor"), self.ids, places)
        return Definition(content)

    def _check(self, places: dict[int, int]) -> None:
        if missing := sorted(self.required() - places.keys()):
            which = ", ".join(repr(self.tokens[id]) for id in missing[:_NAMED])
            raise BadInput(
                f"the vocabulary would lose {len(missing)} special tokens and single characters, "
                f"{which} among them, without which not every text can be encoded; keep them"
            )
        parts = {part for id in places for part in self.with_parts(id)}
        if missing := sorted(parts - places.keys()):
            raise BadInput(
                f"the vocabulary would lose {self.tokens[missing[0]]!r}, of which kept tokens are "
                "made; keep all parts of a token"
            )

    # --- what the definition says ---

    @property
    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = self.content["model"]
        return model

    @property
    def _added(self) -> list[dict[str, Any]]:
        return list(self.content.get("added_tokens") or ())

    @cached_property
    def _own_ids(self) -> dict[str, int]:
        vocabulary = self._model["vocab"]
        if self._model["type"] == "Unigram":
            return {token: id for id, (token, _) in enumerate(vocabulary)}
        return dict(vocabulary)

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in self._model["merges"]]
        return [(left, right) for left, right in merges]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(self._merges)))}

    @property
    def _prefix(self) -> str:
        """What marks a piece that goes on with a word."""
        return self._model.get("continuing_subword_prefix") or ""

    @property
    def _suffix(self) -> str:
        """What marks a piece that ends a word."""
        return self._model.get("end_of_word_suffix") or ""

    def _merged_token(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    def _alphabet(self) -> Iterator[str]:
        """Byte tokens where there are all of them, with the marks that stand for spaces, which no
        bytes would give back; else single characters and all tokens with a character that does not
        stand alone.
        """
        own, kind = self._own_ids, self._model["type"]
        falls_back = self._model.get("byte_fallback") and all(byte in own for byte in _BYTES)
        if falls_back:
            yield from _BYTES
            steps = (self.content.get("normalizer"), self.content.get("pre_tokenizer"))
            yield from {mark for step in steps for mark in _inserted(step)}
            return
        for token in own:
            characters = self._characters(token)
            alone = len(characters) <= 1
            if alone or (kind != "BPE" and not all(each in own for each in characters)):
                yield token

    def _characters(self, token: str) -> list[str]:
        """A token's single characters, marked as the tokens that they are."""
        prefix, suffix = self._prefix, self._suffix
        goes_on = bool(prefix) and token.startswith(prefix) and token != prefix
        ends = bool(suffix) and token.endswith(suffix) and token != suffix
        body = token[len(prefix) if goes_on else 0 : -len(suffix) if ends else None]
        return [
            (prefix if place or goes_on else "")
            + character
            + (suffix if ends and place == len(body) - 1 else "")
            for place, character in enumerate(body)
        ]

    def _intermediate_tokens(self, token: str) -> tuple[str, ...]:
        """What BPE makes on its way to a token: the token's own symbols are merged as they would
        be in any text that has the token, since nothing was merged across its borders there. None
        for a token that merges do not make, such as that of a byte, or a special one.
        """
        if token in self._parts:
            return self._parts[token]
        symbols = self._characters(token)
        made = list(symbols)
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            place = pairs.index(best)
            symbols[place : place + 2] = [self._merged_token(*best)]
            made.append(symbols[place])
        return self._parts.setdefault(token, tuple(made) if symbols == [token] else ())


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """The tokenizer with these tokens alone, ascending old ids, of which each becomes its place.

    Raises BadInput for a tokenizer that cannot be cut, and where a token is missing that must stay.
    """
    before = Definition.of(tokenizer)
    after = before.cut(kept)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():  # of slow tokenizers, which would be read first
            if path.suffix == ".model" or path.name in ("vocab.txt", "vocab.json", "merges.txt"):
                path.unlink()
        (folder / "added_tokens.json").unlink(missing_ok=True)
        (folder / FILE).write_text(json.dumps(after.content), encoding="utf-8")
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # by old ids; tokenizer.json has them
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = found.get_vocab()
    tokens = before.tokens
    if wrong := [i for n, i in enumerate(kept) if i in tokens and ids.get(tokens[i]) != n]:
        raise BadInput(
            f"the model's tokenizer cannot be cut: {tokens[wrong[0]]!r} gets another id "
            "than its place; leave task.vocabulary out"
        )
    return found


def _renumbered(step: Any, ids: dict[str, int], places: dict[int, int]) -> Any:
    """A post-processor, which names special tokens, with their new ids."""
    match step:
        case {"type": "Sequence", "processors": inner}:
            return step | {"processors": [_renumbered(each, ids, places) for each in inner]}
        case {"type": "TemplateProcessing", "special_tokens": named}:
            new = {
                name: entry | {"ids": [places[id] for id in entry["ids"]]}
                for name, entry in named.items()
            }
            return step | {"special_tokens": new}
        case {"type": "BertProcessing" | "RobertaProcessing"}:
            ends = {key: [step[key][0], places[step[key][1]]] for key in ("sep", "cls")}
            return step | ends
    return step


def _inserted(step: Any) -> Iterator[str]:
    """The characters that a step of a definition writes into a text."""
    match step:
        case dict():
            for key, value in step.items():
                if key in ("replacement", "prepend", "content") and isinstance(value, str):
                    yield from value
                else:
                    yield from _inserted(value)
        case list():
            for each in step:
                yield from _inserted(each)


def special_ids(tokenizer: Any, *settings: Any) -> set[int]:
    """The ids of special tokens, and of all tokens that configurations name (`*_token_id`)."""
    named = {id for each in settings for _, ids in token_ids(each) for id in ids}
    return set(tokenizer.all_special_ids) | {id for id in named if id in tokens_by_id(tokenizer)}


def tokens_by_id(tokenizer: Any) -> dict[int, str]:
    return {id: token for token, id in tokenizer.get_vocab().items()}


def token_ids(settings: Any) -> Iterator[tuple[str, list[int]]]:
    """The keys of a configuration that name tokens, and their ids."""
    for key, value in settings.to_dict().items():
        if key.endswith("_token_id") and value is not None:
            yield key, list(value) if isinstance(value, Iterable) else [value]
