"""The noise of a site's answers, and the counts of answers about each of its texts, over all runs.

The counts are kept in the site's folder by the texts themselves, so another run, name, model, rank,
seed or length of text does not reset them.
"""

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedspine.core.device import Call
from fedspine.core.draws import SecretDraws
from fedspine.core.errors import BadInput
from fedspine.core.message import NotAMessage, message, pack, unpack
from fedspine.core.noise import GrowingNoise
from fedspine.flare.site_privacy import FOLDER, ORDERS_KEPT, asked_sha256, key
from fedspine.flare.site_terms import AllowSection
from fedspine.storage.store import STATE_SPARE_BYTES, sealed, unsealed, write_atomically

ANSWERED = "answered.safetensors"  # in the same folder
NAME_BYTES = 8  # of a text's digest: among a million texts the probability of a collision is 3e-8


def text_names(texts: Sequence[str]) -> np.ndarray:
    """An identifier of each text, int64, the same on every machine and in every run."""
    digests = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=NAME_BYTES).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<i8")


def site_noise(
    folder: Path, secret: bytes, allow: AllowSection, opened: str, texts: np.ndarray, call: Call
) -> GrowingNoise | None:
    """The noise of a call's answer at the site in `folder`; None if its terms have none.

    `texts` are the identifiers of all texts of the site, and `opened` is the digest of the run's
    terms and rows.

    The draws depend on the site's `secret`, with which the answer can be replayed, and on all that
    the answer depends on, including the site's terms, but not on the name of the run. If the secret
    is empty, the site's key replaces it.
    """
    if not allow.noise:
        return None
    terms = allow.model_dump_json().encode()  # the same draws with another share would reveal them
    asked = hashlib.sha256(b"noise" + asked_sha256("", opened, call) + terms).digest()
    own = secret or key(folder / FOLDER)

    def draws(answers: float) -> SecretDraws:
        named = asked + struct.pack("<d", answers)
        return SecretDraws(hmac.digest(own, named, hashlib.sha256))

    counter = SiteAnswerCounter(folder / FOLDER / ANSWERED, texts, asked)
    return GrowingNoise(allow.noise, draws, counter, allow.answers)


@message
class SiteCount:
    """The number of answers about each text, and the counts returned for recent orders."""

    texts: np.ndarray  # int64 [texts], identifiers, ascending
    answers: np.ndarray  # int64 [texts]
    orders: dict[str, float]  # by digest, latest last


@dataclass
class SiteAnswerCounter:
    """The counter of a site for one order; it is written before the answer is computed.

    An order that is served again gives the same answer and is not counted again, if it is among the
    last `ORDERS_KEPT`.
    """

    path: Path
    names: np.ndarray  # of the site's texts
    order: bytes  # its digest
    _calls: int = field(default=0, init=False)

    def count(self, texts: np.ndarray) -> float:
        """Count one more answer about these texts of the site, as `core.noise.AnswerCounter` says.

        Raises BadInput for a damaged file.
        """
        self._calls += 1
        order, before = f"{self.order.hex()[:32]}-{self._calls}", self._read()
        if (known := before.orders.get(order)) is not None:
            return known
        asked = np.unique(self.names[texts])
        every = np.union1d(before.texts, asked)
        answers = np.zeros(len(every), np.int64)
        answers[np.searchsorted(every, before.texts)] = before.answers
        at = np.searchsorted(every, asked)
        answers[at] += 1
        found = float(answers[at].mean()) if len(at) else 1.0
        orders = dict([*before.orders.items(), (order, found)][-ORDERS_KEPT:])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = SiteCount(texts=every, answers=answers, orders=orders)
        # no fsync: only a power cut, which no server can cause, may lose the latest counts
        write_atomically(self.path, sealed(pack(now).payload), sync=False)
        return found

    def _read(self) -> SiteCount:
        if not self.path.is_file():
            return SiteCount(texts=np.zeros(0, "<i8"), answers=np.zeros(0, np.int64), orders={})
        try:
            return unpack(unsealed(self.path.read_bytes()), spare_bytes=STATE_SPARE_BYTES)
        except NotAMessage as error:
            raise BadInput(
                f"{self.path} is damaged, so the number of answers about each row is unknown "
                f"({error}); restore it, or remove it, which resets the counts; the site answers "
                "nothing until then"
            ) from None
