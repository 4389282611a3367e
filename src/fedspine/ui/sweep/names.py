"""Folder names of a sweep's cells: readable, deterministic and distinct."""

import hashlib
import re
from collections import Counter
from typing import Any

LONGEST = 120  # characters; file systems take 255 bytes

Settings = dict[str, Any]  # values by dotted key, such as {"fleet.alpha": 0.1}


def name_of(label: str, settings: Settings, seed: int) -> str:
    """The full name of a cell; `distinct` makes a folder name of it.

    >>> name_of("fedspine", {"data": "trec6", "fleet.alpha": 0.1}, 0)
    'fedspine, trec6, alpha=0.1, seed=0'
    """
    parts = [
        text_of(value) if key == "data" else f"{_short(key, settings)}={text_of(value)}"
        for key, value in settings.items()
    ]
    return ", ".join([label, *parts, f"seed={seed}"])


def distinct(names: list[str]) -> list[str]:
    """Folders' names, with a digest where one is long or where a file system could take it for
    another.

    >>> distinct(["FedSpine (ours), seed=0", "b, seed=0"])
    ['FedSpine-ours--seed=0', 'b--seed=0']
    """
    folders = ["--".join(map(_safe, name.split(", "))) for name in names]
    count = Counter(folder.casefold() for folder in folders)
    return [
        folder
        if count[folder.casefold()] == 1 and len(folder) <= LONGEST
        else f"{folder[:LONGEST]}--{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, folder in zip(names, folders, strict=True)
    ]


def text_of(value: Any) -> str:
    """A value in a name: of a list its items, of a path all of it.

    >>> text_of([4, 8]), text_of("../rows.csv"), text_of(True), text_of(4e-3), text_of({"tx2": 3})
    ('4-8', '../rows.csv', 'true', '0.004', 'tx2=3')
    """
    match value:
        case bool():
            return str(value).lower()
        case list():
            return "-".join(map(text_of, value))
        case dict():
            return "-".join(f"{key}={text_of(item)}" for key, item in value.items())
    return str(value)


def _short(key: str, among: Settings) -> str:
    """The key without its section, where no other key ends the same."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in among) == 1 else key


def _safe(text: str) -> str:
    """The text as a part of a folder's name.

    >>> _safe("rank=8 of Zoë"), _safe("../..")
    ('rank=8-of-Zo', 'x')
    """
    return re.sub(r"[^\w=.+]+", "-", text, flags=re.ASCII).strip("-.") or "x"
