"""A site of a real fleet: the data, limits and permissions of its `fedspine-site.toml`, and how a
run is opened by them.

The server sends the terms of a run and never names a path. The site's own file decides whether it
joins, and the site loads its own rows and its own copy of the model.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from fedspine.core.errors import BadInput
from fedspine.core.strict import Section, known_keys, read_toml, section, validated
from fedspine.core.task import BUILT_IN_DATA, BUILT_IN_MODELS, Examples
from fedspine.flare.run_terms import Refused, RunTerms, refusing
from fedspine.flare.site_noise import text_names
from fedspine.flare.site_privacy import (
    SitePrivacySection,
    check_promise,
    check_rows,
    check_section,
)
from fedspine.flare.site_terms import SITE_FILE, AllowSection, check_run

if TYPE_CHECKING:
    from fedspine.data.dataset import Rows
    from fedspine.lm.base import Base

MODELS = ("minilm",)  # the models of a site whose file names none
TOKENS_KEPT = 4  # encodings of the rows that the cache holds, one for each kind and length
# of a site's name, which is used in certificates and addresses
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
RESERVED = {"server", "admin", "all"}


class DataSection(Section):
    """The path of the site's rows and the meaning of their columns."""

    path: str  # file, folder, built-in name or Hub id
    text: str = "text"
    pair: str = "text2"  # read for pairs of texts only
    label: str = "label"
    encoding: str | None = None  # of text files that are not UTF-8
    # class names by value of the label column
    labels: dict[str, str] = pydantic.Field({})


class LimitsSection(Section):
    """Resource limits of a run at the site."""

    memory_bytes: int | None = pydantic.Field(None, ge=1 << 20)  # None: all of the machine's
    threads: int = pydantic.Field(1, ge=1)
    # of all that runs leave here: memory, kept activations and tokens
    disk_bytes: int = pydantic.Field(10 << 30, ge=1 << 20)


class CachesSection(Section):
    """The folder of encoded rows."""

    folder: str = "cache"  # relative to the site's folder; counts towards its disk quota


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "limits": LimitsSection,
    "allow": AllowSection,
    "caches": CachesSection,
    "privacy": SitePrivacySection,
}


@dataclass(frozen=True)
class Site:
    """The contents of `fedspine-site.toml`; paths are absolute."""

    name: str
    data: DataSection
    limits: LimitsSection
    allow: AllowSection
    caches: CachesSection
    privacy: SitePrivacySection
    models: dict[str, str]  # the name in a recipe: a built-in name, a folder here, or a Hub id

    @property
    def memory_bytes(self) -> int:
        """The memory that the site declares: its limit, or the machine's."""
        return self.limits.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the site's worker process."""
        threads = {"OMP_NUM_THREADS": str(self.limits.threads), "TOKENIZERS_PARALLELISM": "false"}
        return threads | {"FEDSPINE_CACHE": self.caches.folder}

    def check(self, terms: RunTerms) -> None:
        """Raise Refused if the site's file does not allow these terms; reads no rows."""
        check_run(self.name, self.allow, self.models, terms)
        check_promise(self.name, self.privacy, terms)


@dataclass(frozen=True)
class Holding:
    """A site's copy of the model, and its encoded rows."""

    base: "Base"
    tokenizer: Any
    examples: Examples
    texts: np.ndarray  # int64 [texts], their identifiers by `site_noise.text_names`


def load_site(path: Path) -> Site:
    """The site that a `fedspine-site.toml`, or a folder that holds one, describes. Paths in the
    file are relative to it.

    Raises BadInput for a file that cannot be read, an unknown or missing key, and an invalid value.
    """
    path = path / SITE_FILE if path.is_dir() else path
    tables = read_toml(
        path,
        "site file",
        f"write one as docs/real-devices.md says, or name the folder of {SITE_FILE}",
    )
    try:
        return _site(tables, path.expanduser().resolve().parent)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def open_site(site: Site, terms: RunTerms) -> Holding:
    """Check the terms, then load model and rows; raises Refused if the site cannot join."""
    # these import torch, which reading a site's file does not need
    from fedspine.lm.content import content_sha256
    from fedspine.lm.load import load as load_model

    site.check(terms)
    with refusing("model"):
        base, tokenizer = load_model(
            site.models[terms.model],
            kind=terms.kind,
            classes=len(terms.label_names),
            precision=terms.precision,
            layers=terms.layers,
            pooling=terms.pooling,
        )
    if (found := content_sha256(base, tokenizer)) != terms.model_sha256:
        raise Refused(
            f"site {site.name}: the model {terms.model!r} ({site.models[terms.model]}) has content "
            f"{found[:12]}..., the server's has {terms.model_sha256[:12]}...; take the same model, "
            "and the same versions of its libraries",
            "content",
        )
    with refusing("data"):
        rows = site_rows(site, terms)
        examples = _encoded(site, terms, tokenizer, rows, bi_encoder=base.pooling == "bi-encoder")
        return Holding(base, tokenizer, examples, text_names(rows.texts))


def site_examples(site: Site, terms: RunTerms, tokenizer: Any) -> Examples:
    """All of the site's rows, encoded as a simulation encodes them; raises as `site_rows` does."""
    bi_encoder = terms.pooling == "bi-encoder"
    return _encoded(site, terms, tokenizer, site_rows(site, terms), bi_encoder=bi_encoder)


def _encoded(
    site: Site, terms: RunTerms, tokenizer: Any, rows: "Rows", *, bi_encoder: bool
) -> Examples:
    from fedspine.lm.tokens import tokens

    kept = Path(site.caches.folder)
    return tokens(
        tokenizer,
        rows,
        terms.kind,
        terms.max_tokens,
        bi_encoder=bi_encoder,
        folder=kept,
        kept=TOKENS_KEPT,
    )


def site_rows(site: Site, terms: RunTerms) -> "Rows":
    """All of the site's rows, before they are encoded.

    Raises Refused for fewer rows than the site answers about, BadInput for rows that do not fit the
    terms.
    """
    from fedspine.data.tasks import load_stated

    data = site.data
    rows = load_stated(
        data.path,
        kind=terms.kind,
        label_names=terms.label_names,
        text=data.text,
        pair=data.pair if terms.kind == "pair" else None,
        label=data.label,
        spelled=data.labels,
        encoding=data.encoding,
        answers=terms.loss_on == "answers",
        say=lambda remark: print(f"{data.path}: {remark}", file=sys.stderr, flush=True),
    )
    if len(rows.texts) < site.allow.fewest_rows:
        raise Refused(
            f"site {site.name} has {len(rows.texts)} rows and answers "
            f"about {site.allow.fewest_rows} at least; give more "
            f"rows, or lower allow.fewest_rows of its {SITE_FILE}",
            "rows",
        )
    check_rows(site.name, terms.privacy, len(rows.texts))
    return rows


def check_name(name: str) -> None:
    """Raise BadInput for an invalid site name."""
    if not NAME.fullmatch(name) or name.lower() in RESERVED:
        raise BadInput(
            f"{name!r} cannot be the name of a site; take up to 63 letters, digits, - and _, "
            f"beginning with a letter or a digit, and none of {', '.join(sorted(RESERVED))}"
        )


# --- reading the file ---


def _site(tables: dict[str, Any], folder: Path) -> Site:
    known_keys("part of a site file", tables, {"name", "models", *SECTIONS})
    tables = {"models": {name: name for name in MODELS}, "data": {}} | tables
    top_level = validated(
        "site",
        _Top,
        {key: tables[key] for key in ("name", "models") if key in tables},
    )
    check_name(top_level.name)
    sections = {}
    for key, cls in SECTIONS.items():
        table = tables.get(key, {})
        if not isinstance(table, dict):
            raise BadInput(f"[{key}] is {table!r}, but a table of keys and values was expected")
        sections[key] = section(
            key, cls, {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
        )
    data, caches = sections["data"], sections["caches"]
    check_section(sections["privacy"])
    path = data.path if data.path in BUILT_IN_DATA else _local(data.path, folder)
    return Site(
        name=top_level.name,
        models={
            name: where if where in BUILT_IN_MODELS else _local(where, folder)
            for name, where in top_level.models.items()
        },
        data=data.model_copy(update={"path": path}),
        caches=caches.model_copy(update={"folder": str((folder / _home(caches.folder)).resolve())}),
        limits=sections["limits"],
        allow=sections["allow"],
        privacy=sections["privacy"],
    )


class _Top(Section):
    name: str
    models: dict[str, str]


def _local(name: str, folder: Path) -> str:
    """A path of the site's file, made absolute; a name that is no existing path stays a Hub id."""
    here = folder / _home(name)
    return str(here.resolve()) if here.exists() or name.startswith((".", "/", "~")) else name


def _home(name: str) -> Path:
    return Path(name).expanduser()
