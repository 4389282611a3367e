"""The worker's side of a run at a site: open it by the site's rules, serve its orders, keep its
memory.

No failure here ends the worker; the server gets a fixed reason, and the site's log the details.
"""

import importlib
import os
import resource
import shutil
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fedspine.core.device import Call, Scratch, Served, find_work, name_of, serve
from fedspine.core.errors import BadInput
from fedspine.core.message import NotAMessage, pack
from fedspine.core.process import keep_freed_memory
from fedspine.flare.run_terms import Refused
from fedspine.flare.schema import work_kinds
from fedspine.flare.site import Holding, Site, load_site, open_site
from fedspine.flare.wire import (
    RUN,
    NotDone,
    Opened,
    Opening,
    SiteAnswer,
    SiteOrder,
    as_array,
    decoded,
)
from fedspine.lm.prefix import Prefixes
from fedspine.methods import find
from fedspine.storage.store import sealed, unsealed, write_atomically

MEMORY, PREFIXES = "memory", "prefixes"  # in the site's folder, each with a folder for a run
RUNS_KEPT = 16  # memories of so many runs are kept, those used last
# packages whose works a site may serve
OFFERED = ("fedspine.methods.", "fedspine.pruning.", "fedspine.split.")


@dataclass(frozen=True)
class Open:
    """A run that the site has joined."""

    run: str
    terms: str  # their digest
    holding: Holding
    works: frozenset[str]


class SiteWorker:
    """Serves the messages of a run at a site; `folder` holds the site's file and memory."""

    def __init__(self, site: Site, folder: Path) -> None:
        self._site, self._folder = site, folder
        self._open: Open | None = None
        self._scratch = Scratch()

    def answer(self, payload: bytes) -> bytes:
        """The packed reply to a packed message; raises nothing."""
        try:
            return pack(self._answered(decoded(payload, Opening, SiteOrder))).payload
        except NotAMessage as error:
            return _not_done("bad order", error)
        except Refused as error:
            return _not_done("refused", error, error.detail)
        except Exception as error:
            return _not_done("work failed", error)

    def _answered(self, asked: Opening | SiteOrder) -> Opened | SiteAnswer | NotDone:
        if not RUN.fullmatch(asked.run):
            raise NotAMessage("the name of the run is none")
        match asked:
            case Opening():
                return self._join(asked)
            case SiteOrder():
                return self._serve(asked)

    def _join(self, asked: Opening) -> Opened:
        self._site.check(asked.terms)  # before the method's package is imported
        works = works_of(asked.terms.method)
        terms, here = pack(asked.terms).sha256, self._open
        holding = (
            here.holding
            if here is not None and here.terms == terms
            else open_site(self._site, asked.terms)
        )
        holding.base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for folder, kept in ((MEMORY, RUNS_KEPT), (PREFIXES, 1)):
            _keep_newest(self._folder / folder / asked.run, kept)
        self._open, self._scratch = Open(asked.run, terms, holding, works), Scratch()
        return Opened(examples=len(holding.examples), memory_bytes=self._site.memory_bytes)

    def _serve(self, asked: SiteOrder) -> SiteAnswer | NotDone:
        here = self._open
        if here is None or here.run != asked.run:
            return NotDone(reason="not opened")
        if asked.work not in here.works:
            return NotDone(reason="work not allowed")
        work = find_work(asked.work)
        order = asked.order.tobytes()
        decoded(order, work_kinds(work)[0])
        memory = None
        if asked.memory is not None:
            path = self._version(asked.run, asked.memory)
            if not path.is_file():
                return NotDone(reason="memory lost")
            try:
                memory = unsealed(path.read_bytes())
            except NotAMessage as error:
                print(f"{path} is damaged: {error}", file=sys.stderr, flush=True)
                return NotDone(reason="memory lost")
        served = self._served(here, asked, order, memory)
        write_atomically(self._version(asked.run, asked.version), sealed(served.memory))
        self._sweep(asked)
        return SiteAnswer(
            result=as_array(served.result),
            flops=float(served.flops),
            launches=int(served.launches),
            samples=int(served.samples),
            peak_memory_bytes=int(served.peak_memory_bytes),
        )

    def _served(self, here: Open, asked: SiteOrder, order: bytes, memory: bytes | None) -> Served:
        call = Call(
            device=self._site.name,
            index=0,
            work=asked.work,
            order=order,
            memory=memory,
            seed=asked.seed,
            round=asked.round,
        )
        prefixes = Prefixes(self._folder / PREFIXES / here.run)
        return serve(
            call, here.holding.base, here.holding.examples, prefixes, scratch=self._scratch
        )

    def _version(self, run: str, version: int) -> Path:
        return self._folder / MEMORY / run / f"{version:09d}.safetensors"

    def _sweep(self, asked: SiteOrder) -> None:
        wanted = {
            self._version(asked.run, v) for v in (asked.version, *asked.needed) if v is not None
        }
        if asked.memory is not None:
            wanted.add(self._version(asked.run, asked.memory))
        for path in (self._folder / MEMORY / asked.run).iterdir():
            if path not in wanted:
                path.unlink()


def open_site_worker(folder: Path) -> SiteWorker:
    """The worker of the site in this folder, within the limits of its file."""
    site = load_site(folder)
    os.environ.update(site.environment)
    torch.set_num_threads(site.limits.threads)
    if site.limits.memory_bytes is not None:  # beyond it an allocation fails, not the machine
        resource.setrlimit(
            resource.RLIMIT_DATA, (site.limits.memory_bytes, site.limits.memory_bytes)
        )
    keep_freed_memory()
    return SiteWorker(site, folder)


def _keep_newest(folder: Path, kept: int) -> None:
    """Make the folder the newest among its siblings, and remove all but the newest `kept`."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for old in sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-kept]:
        shutil.rmtree(old, ignore_errors=True)


@cache
def works_of(method: str) -> frozenset[str]:
    """The names of the works that a method may ask for: those of its module and of the offered ones
    that it uses.

    Raises Refused for a method that is not installed here.
    """
    try:
        start = importlib.import_module(find(method).__module__)
    except BadInput as error:
        raise Refused(str(error), "method") from None
    seen, left = set(), [start]
    while left:
        module = left.pop()
        seen.add(module)
        left += [
            other
            for other in map(_home, vars(module).values())
            if other is not None and other not in seen
        ]
    works = [
        value
        for module in seen
        for value in vars(module).values()
        if getattr(value, "__on_device__", False)
    ]
    return frozenset(name_of(work) for work in works)


def _home(value: Any) -> ModuleType | None:
    """The offered module that something was defined in."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) and name.startswith(OFFERED) else None


def _not_done(reason: Any, error: Exception, detail: str = "") -> bytes:
    print(f"{reason}: {error}", file=sys.stderr, flush=True)
    if reason == "work failed":
        traceback.print_exc()
    return pack(NotDone(reason=reason, detail=detail)).payload
