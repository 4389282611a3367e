"""The worker's side of a run at a site: it opens the run by the site's rules, serves its orders and
keeps its memory.

A failure does not end the worker: the server gets a fixed reason, and the site's log the details.
"""

import importlib
import os
import resource
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fedspine.core.checks import Asked, Terms, Unusable, need, why_unusable
from fedspine.core.device import (
    Call,
    Scratch,
    Served,
    Work,
    find_work,
    keeps,
    name_of,
    returns_learnt,
    serve,
)
from fedspine.core.errors import BadInput
from fedspine.core.message import NotAMessage, pack
from fedspine.core.privacy import SPENT, Privacy
from fedspine.core.process import keep_freed_memory
from fedspine.core.schema import work_kinds
from fedspine.flare import site_disk
from fedspine.flare.run_terms import Refused, RunTerms
from fedspine.flare.site import Holding, Site, load_site, open_site
from fedspine.flare.site_disk import LOG, MEMORY, PREFIXES, RUNS_KEPT
from fedspine.flare.site_noise import site_noise
from fedspine.flare.site_privacy import opened_sha256, site_guard
from fedspine.flare.site_secret import seed_of, site_secret
from fedspine.flare.site_terms import (
    check_noise,
    check_order,
    check_sampled,
    check_training,
    check_used,
)
from fedspine.flare.site_weights import check_magnitudes, check_weights
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
from fedspine.lm.prefix import MOST_BYTES, Prefixes
from fedspine.methods import find, sends_features
from fedspine.storage.store import sealed, unsealed, write_atomically

MOST_VERSION = 10**9  # of a memory, whose file's name has so many digits
NEEDED = 2  # versions that an order may keep beside those that it reads and writes
MINUTE = 60.0
LINE = 2000  # characters of an error in the log
FEATURES = "fedspine.split.device"  # its works send features, so only split methods may use them
# packages whose works a site may serve
OFFERED = ("fedspine.methods.", "fedspine.pruning.", "fedspine.split.")


@dataclass(frozen=True)
class Open:
    """A run that the site has joined."""

    run: str
    terms: RunTerms
    holding: Holding
    works: frozenset[str]
    task: Terms  # of orders and rows
    privacy: Privacy | None  # what the run promises
    content: str  # the digest of terms and rows, on which draws of noise depend


class SiteWorker:
    """Serves the messages of a run at a site; `folder` holds the site's memory and secret.

    Pass a `secret` to replay a site's work in another folder.
    """

    def __init__(
        self,
        site: Site,
        folder: Path,
        secret: bytes | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site, self._folder, self._now = site, folder, now
        folder.mkdir(parents=True, exist_ok=True)
        self._secret = site_secret(folder) if secret is None else secret
        self._open: Open | None = None
        self._scratch = Scratch()
        self._came: deque[float] = deque()  # times of the messages of the last minute

    def answer(self, payload: bytes) -> bytes:
        """The packed reply to a packed message; raises nothing."""
        try:
            self._check_rate()
            return pack(self._answered(decoded(payload, Opening, SiteOrder))).payload
        except NotAMessage as error:
            return self._not_done("bad order", error)
        except Unusable as error:
            return self._not_done("bad order", error, str(error))
        except Refused as error:
            return self._not_done("refused", error, error.detail)
        except Exception as error:
            return self._not_done("work failed", error)

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
        works = _keeping(works_of(asked.terms.method), asked.terms)
        terms, here = asked.terms, self._open
        holding = (
            here.holding
            if here is not None and pack(here.terms).payload == pack(terms).payload
            else open_site(self._site, terms)
        )
        holding.base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        content = opened_sha256(asked.terms, holding.examples)
        site_disk.keep_newest(self._folder / MEMORY / asked.run, RUNS_KEPT)
        site_disk.keep_newest(self._prefixes(content), 1)
        self._room(asked.run, needed=0)
        promised = asked.terms.privacy
        task = _terms(asked, holding)
        here = Open(asked.run, terms, holding, works, task, promised, content)
        self._open, self._scratch = here, Scratch()
        return Opened(examples=len(holding.examples), memory_bytes=self._site.memory_bytes)

    def _serve(self, asked: SiteOrder) -> SiteAnswer | NotDone:
        here = self._open
        if here is None or here.run != asked.run:
            return NotDone(reason="not opened")
        if asked.work not in here.works:
            return NotDone(reason="work not allowed")
        work = find_work(asked.work)
        _check_versions(asked)
        order = asked.order.tobytes()
        value = decoded(order, work_kinds(work)[0])
        self._check(here, value)
        _check_form(here, value, work)
        self._check_training(here, value, work)
        memory = None
        if asked.memory is not None:
            path = self._version(asked.run, asked.memory)
            if not path.is_file():
                return NotDone(reason="memory lost")
            try:
                memory = unsealed(path.read_bytes())
            except NotAMessage as error:
                self._log(f"{path} is damaged: {error}")
                return NotDone(reason="memory lost")
        began = time.monotonic()
        served = self._served(here, asked, order, memory)
        compute_seconds = time.monotonic() - began
        if served.declined is not None:
            return NotDone(reason=SPENT)
        check_used(self._site.name, self._site.allow, served.rows)
        if returns_learnt(work):
            check_noise(self._site.name, self._site.allow, value, served.noise)
        remembered = sealed(served.memory)
        self._room(asked.run, needed=len(remembered))
        write_atomically(self._version(asked.run, asked.version), remembered)
        self._sweep(asked)
        reveals = here.privacy is None  # else resources would tell of the rows
        return SiteAnswer(
            result=as_array(served.result),
            flops=float(served.flops) if reveals else 0.0,
            launches=int(served.launches) if reveals else 0,
            samples=int(served.samples) if reveals else 0,
            peak_memory_bytes=int(served.peak_memory_bytes) if reveals else 0,
            compute_seconds=compute_seconds if reveals else 0.0,
            epsilon=served.epsilon,
            noise=served.noise,
        )

    def _served(self, here: Open, asked: SiteOrder, order: bytes, memory: bytes | None) -> Served:
        call = Call(
            device=self._site.name,
            index=0,
            work=asked.work,
            order=order,
            memory=memory,
            seed=seed_of(self._secret, asked),
            round=asked.round,
            privacy=here.privacy,
        )
        allow = self._site.allow
        prefixes = Prefixes(self._prefixes(here.content), self._room_of_prefixes(here.run))
        return serve(
            call,
            here.holding.base,
            here.holding.examples,
            prefixes,
            scratch=self._scratch,
            fewest_rows=allow.fewest_rows,
            fewest_of_class=allow.fewest_of_class,
            guard=site_guard(self._folder, self._site.privacy, here.run, here.content, call),
            noise=site_noise(
                self._folder, self._secret, allow, here.content, here.holding.texts, call
            ),
        )

    def _check(self, here: Open, order: Any) -> None:
        """Raise Refused for an order that the site's terms do not allow; reads no row."""
        site, allow = self._site.name, self._site.allow
        check_order(site, allow, here.terms, order)
        check_weights(site, allow, order, here.holding.base)

    def _check_training(self, here: Open, order: Any, work: Work[Any, Any]) -> None:
        """Raise Refused for an order whose answer would reveal more than the site's terms allow;
        its numbers were checked before, and no row is read.
        """
        site, allow = self._site.name, self._site.allow
        check_training(site, allow, order, learnt=returns_learnt(work))
        check_magnitudes(site, allow, order, here.holding.base)
        if here.privacy is not None and here.privacy.level == "rows":
            check_sampled(site, allow, order, here.holding.examples)

    def _check_rate(self) -> None:
        now, most = self._now(), self._site.allow.orders_per_minute
        while self._came and now - self._came[0] >= MINUTE:
            self._came.popleft()
        if len(self._came) >= most:
            raise Refused(f"expected at most {most} orders within a minute, got more", "rate")
        self._came.append(now)

    def _not_done(self, reason: Any, error: Exception, detail: str = "") -> bytes:
        lines = f"{reason}: {str(error)[:LINE]}"
        if reason == "work failed":
            lines += "\n" + "".join(traceback.format_exception(error)).rstrip()
        self._log(lines)
        return pack(NotDone(reason=reason, detail=detail)).payload

    def _log(self, lines: str) -> None:
        with suppress(OSError):  # where a disk is full, so may be the log's
            site_disk.shorten(self._folder / LOG)
            print(lines, file=sys.stderr, flush=True)

    def _room(self, run: str, needed: int) -> int:
        """The free bytes of the site's quota; raises Refused if there are fewer than `needed`."""
        cache, most = Path(self._site.caches.folder), self._site.limits.disk_bytes
        free = site_disk.room(self._folder, cache, run, most, needed)
        if free < needed:
            raise Refused(
                f"{needed} bytes are needed, {free} of limits.disk_bytes are left", "disk"
            )
        return free

    def _room_of_prefixes(self, run: str) -> int:
        """The bytes that all kept activations may take."""
        free = self._room(run, needed=0)
        there = site_disk.used(self._folder, Path(self._site.caches.folder))[PREFIXES]
        return min(free + there, MOST_BYTES)

    def _prefixes(self, content: str) -> Path:
        """The folder of activations. Its name depends on terms and rows: a run that is opened again
        under its name with shorter texts, or after the rows have changed, must not get activations
        of other rows.
        """
        return self._folder / PREFIXES / content

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


def _terms(asked: Opening, holding: Holding) -> Terms:
    return Terms(holding.base, len(asked.terms.label_names), asked.terms.row_tokens)


def _check_form(here: Open, order: Any, work: Work[Any, Any]) -> None:
    """Raise Unusable for an order that no device could serve; its line is about the order only."""
    asked = Asked(here.task, rows=len(here.holding.examples))
    need(not (why := why_unusable(order, work_kinds(work)[0], asked)), str(why))


def open_site_worker(folder: Path) -> SiteWorker:
    """The worker of the site in this folder, with the limits of its file."""
    site = load_site(folder)
    os.environ.update(site.environment)
    torch.set_num_threads(site.limits.threads)
    if site.limits.memory_bytes is not None:  # beyond it an allocation fails, not the machine
        resource.setrlimit(
            resource.RLIMIT_DATA, (site.limits.memory_bytes, site.limits.memory_bytes)
        )
    keep_freed_memory()
    return SiteWorker(site, folder)


def _check_versions(asked: SiteOrder) -> None:
    """Raise NotAMessage for versions of memory that no run has, or more than a run keeps."""
    named = (asked.version, *asked.needed, *(() if asked.memory is None else (asked.memory,)))
    if len(asked.needed) > NEEDED or not all(0 <= version < MOST_VERSION for version in named):
        raise NotAMessage(
            f"at most {NEEDED} needed versions from 0 to {MOST_VERSION} were expected"
        )


def _keeping(works: frozenset[str], terms: RunTerms) -> frozenset[str]:
    """The works among these that keep the run's privacy promise."""
    if terms.privacy is None:
        return works
    return frozenset(name for name in works if keeps(find_work(name)))


@cache
def works_of(method: str) -> frozenset[str]:
    """The names of the works that a method may ask for: those in its module and in the modules of
    `OFFERED` packages that it uses.

    Raises Refused for a method that is not installed here.
    """
    try:
        cls = find(method)
    except BadInput as error:
        raise Refused(str(error), "method") from None
    seen, left = set(), [importlib.import_module(cls.__module__)]
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
        and (value.__module__ != FEATURES or sends_features(cls))
    ]
    return frozenset(name_of(work) for work in works)


def _home(value: Any) -> ModuleType | None:
    """The offered module that something was defined in."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) and name.startswith(OFFERED) else None
