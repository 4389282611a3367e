"""A site's demands on a run's privacy, and its ledger of what it has spent over all runs.

The server cannot reset the ledger: ledger and key lie in the site's folder, and neither depends on
the memory versions that orders name.
"""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import pydantic

from fedspine.core.accountant import Spending, epsilon_of, needs_accountant
from fedspine.core.device import Call
from fedspine.core.draws import SecretDraws
from fedspine.core.errors import BadInput
from fedspine.core.message import NotAMessage, message, pack, unpack
from fedspine.core.privacy import (
    SPENT,
    BudgetExceeded,
    Guard,
    Level,
    Privacy,
    Spent,
    added,
    afforded,
)
from fedspine.core.strict import Section
from fedspine.core.task import Examples
from fedspine.flare.run_terms import Refused, RunTerms, refusing
from fedspine.flare.site_disk import LEDGERS
from fedspine.storage.store import STATE_SPARE_BYTES, sealed, unsealed, write_atomically

FOLDER, KEY, LEDGER = LEDGERS, "key", "ledger.safetensors"  # in the site's folder
ORDERS_KEPT = 128  # whose answers can be repeated without being counted again
KEY_BYTES = 32


class SitePrivacySection(Section):
    """What a run must promise, and the site's own budget over all private runs; None: no demand."""

    level: Level | None = None  # "rows": a promise of either level will do
    epsilon: float | None = pydantic.Field(None, gt=0)
    delta: float | None = pydantic.Field(None, gt=0, lt=1)

    @property
    def demands(self) -> bool:
        return self.level is not None or self.epsilon is not None


def check_section(section: SitePrivacySection) -> None:
    """Raise BadInput for an epsilon without a delta, or a delta alone."""
    if (section.epsilon is None) != (section.delta is None):
        given, lacking = ("epsilon", "delta") if section.delta is None else ("delta", "epsilon")
        raise BadInput(f"privacy.{given} is given and privacy.{lacking} is missing; give both")
    if section.demands:
        needs_accountant()


def check_promise(site: str, section: SitePrivacySection, terms: RunTerms) -> None:
    """Raise Refused for a run that promises less than the site demands."""
    with refusing("privacy"):
        if terms.privacy is not None:
            needs_accountant()
        if not section.demands:
            return
        if wrong := _short_of(section, terms.privacy):
            raise BadInput(
                f"site {site} does not take part: {wrong}; ask for a run that promises more, or "
                "demand less in [privacy]"
            )


def check_rows(site: str, privacy: Privacy | None, rows: int) -> None:
    """Raise Refused if level "rows" has a delta of 1 over the site's rows or more, which allows one
    of them to be published whole.
    """
    if privacy is not None and privacy.level == "rows" and privacy.delta >= 1 / rows:
        raise Refused(
            f"site {site} does not take part: the run's delta is {privacy.delta:g}, and it has "
            f"{rows} rows; below {1 / rows:.2g} was expected",
            "privacy",
        )


@message
class RunSpent:
    """What a site has spent in one run; `answers` are the digests of the latest counted orders."""

    entries: tuple[Spending, ...]
    epsilon: float
    answers: tuple[str, ...]


@message
class SiteSpent:
    """What a site has spent in each run, by the run's name."""

    runs: dict[str, RunSpent]


@dataclass
class SiteLedger:
    """The ledger of a site for one order; it is on disk before the order's answer exists.

    An order that is served again makes the same draws and gives the same answer, so it spends
    nothing if it is among the run's last `ORDERS_KEPT`.
    """

    path: Path
    section: SitePrivacySection
    terms: Privacy
    run: str
    order: str  # its digest

    @property
    def spent(self) -> Spent:
        found = self._read().runs.get(self.run)
        return Spent() if found is None else Spent(entries=found.entries, epsilon=found.epsilon)

    def spend(self, spending: Spending) -> None:
        whole = self._read()
        before = whole.runs.get(self.run) or RunSpent(entries=(), epsilon=0.0, answers=())
        if self.order in before.answers:
            return
        after = afforded(before.entries, spending, self.terms)
        self._check_site([run for name, run in whole.runs.items() if name != self.run], after)
        now = RunSpent(
            entries=after.entries,
            epsilon=after.epsilon,
            answers=(*before.answers, self.order)[-ORDERS_KEPT:],
        )
        written = pack(SiteSpent(runs=whole.runs | {self.run: now})).payload
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, sealed(written))

    def _check_site(self, others: list[RunSpent], after: Spent) -> None:
        """Raise BudgetExceeded if all runs together exceed the site's own budget."""
        epsilon, delta = self.section.epsilon, self.section.delta
        if epsilon is None or delta is None:
            return
        entries = after.entries
        for run in others:
            for entry in run.entries:
                entries = added(entries, entry)
        if epsilon_of(entries, delta) > epsilon:
            raise BudgetExceeded(SPENT)

    def _read(self) -> SiteSpent:
        if not self.path.is_file():
            return SiteSpent(runs={})
        try:
            return unpack(unsealed(self.path.read_bytes()), spare_bytes=STATE_SPARE_BYTES)
        except NotAMessage as error:
            raise BadInput(
                f"{self.path} is damaged, so the spent budget is unknown ({error}); the site "
                "answers no private run until it is restored, or removed, which forgets it"
            ) from None


def opened_sha256(terms: RunTerms, rows: Examples) -> str:
    """A digest of the terms and the rows: what answers depend on besides the orders."""
    arrays = (rows.ids, rows.offsets, rows.labels, rows.segments)
    held = hashlib.sha256(pack(terms).payload)
    for array in arrays:
        held.update(b"none" if array is None else hashlib.sha256(array.tobytes()).digest())
    for name in ("sources", "context", "counted", "positions"):  # of windows and dialogues only
        if (array := getattr(rows, name)) is not None:
            held.update(name.encode() + hashlib.sha256(array.tobytes()).digest())
    return held.hexdigest()


def site_guard(
    folder: Path, section: SitePrivacySection, run: str, opened: str, call: Call
) -> Guard | None:
    """The guard of a call at the site in `folder`; None if its run promises nothing.

    The draws follow from the site's key and from all that the answer depends on, where `opened` is
    the digest of terms and rows. So two different answers never have the same noise.
    """
    if call.privacy is None:
        return None
    digest = asked_sha256(run, opened, call)
    path = folder / FOLDER / LEDGER
    return Guard(
        terms=call.privacy,
        draws=SecretDraws(hmac.digest(key(folder / FOLDER), digest, hashlib.sha256)),
        ledger=SiteLedger(path, section, call.privacy, run, digest.hex()),
    )


def asked_sha256(run: str, opened: str, call: Call) -> bytes:
    """A digest of all that the answer to a call depends on; with an empty `run`, whichever run
    asks.
    """
    named = pack((run, opened, call.device, call.work, call.seed, call.round)).payload
    parts = (named, call.order, call.memory or b"")
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def key(home: Path) -> bytes:
    """The key of a site's noise, 32 random bytes, made once in the folder `home`; only its owner
    may read it. Raises BadInput for a damaged file.

    Whoever has the key can remove the noise from an answer, so it must never be empty or known.
    """
    home.mkdir(parents=True, exist_ok=True)
    path = home / KEY
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_bytes()
        if len(found) != KEY_BYTES:
            raise BadInput(
                f"{path} is damaged: {KEY_BYTES} bytes were expected; remove it, and the site "
                "makes another"
            ) from None
        return found
    with os.fdopen(descriptor, "wb") as file:
        made = secrets.token_bytes(KEY_BYTES)
        file.write(made)
        file.flush()
        os.fsync(file.fileno())
    return made


def _short_of(section: SitePrivacySection, privacy: Privacy | None) -> str | None:
    """Which demand of the site a run does not meet; None if it meets all."""
    if privacy is None or privacy.epsilon is None:
        return "the run promises no privacy, which its [privacy] demands"
    if section.level == "devices" and privacy.level == "rows":
        return "the run promises privacy of rows, and its privacy.level demands that of devices"
    for name in ("epsilon", "delta"):
        most, came = getattr(section, name), getattr(privacy, name)
        if most is not None and came > most:
            return f"the run's {name} is {came:g}, and its privacy.{name} allows {most:g}"
    return None
