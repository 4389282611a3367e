"""The noise of a site's answers, and how often its rows have answered, over all runs.

The count lies in the site's folder and goes by the rows' texts, so neither another run nor another
name, model, rank, seed or length of text begins it anew.
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
from fedspine.flare.site_privacy import FOLDER, asked_sha256, key
from fedspine.flare.site_terms import AllowSection
from fedspine.storage.store import STATE_SPARE_BYTES, sealed, unsealed, write_atomically

ANSWERED = "answered.safetensors"  # in the same folder
NAME_BYTES = 8  # of a text's digest: of a million texts two share one with a chance of 3e-8
ORDERS_KEPT = 128  # whose answers can be repeated as they were


def text_names(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, int64, the same wherever and in whichever run it is read."""
    digests = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=NAME_BYTES).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<i8")


def site_noise(
    folder: Path, secret: bytes, allow: AllowSection, opened: str, texts: np.ndarray, call: Call
) -> GrowingNoise | None:
    """The noise of a call's answer at the site in `folder`, None where its terms ask for none;
    `texts` are the names of all of the site's.

    Its draws follow from the site's `secret`, with which the answer can be replayed, and from all
    that the answer depends on, whichever run asks; where the secret is empty, from the site's key.
    """
    if not allow.noise:
        return None
    asked = hashlib.sha256(b"noise" + asked_sha256("", opened, call)).digest()
    own = secret or key(folder / FOLDER)

    def draws(answers: float) -> SecretDraws:
        named = asked + struct.pack("<d", answers)
        return SecretDraws(hmac.digest(own, named, hashlib.sha256))

    answered = SiteAnswered(folder / FOLDER / ANSWERED, texts, asked)
    return GrowingNoise(allow.noise, draws, answered, allow.answers)


@message
class SiteCount:
    """How many answers there are about each text, by name, and how many there were about those of
    an order.
    """

    texts: np.ndarray  # int64 [texts], ascending
    answers: np.ndarray  # int64 [texts]
    orders: dict[str, float]  # by digest, the latest last


@dataclass
class SiteAnswered:
    """The count of a site for one order, written before the order's answer exists.

    An order that is served again gives the same answer, so it does not count again.
    """

    path: Path
    names: np.ndarray  # of the site's texts
    order: bytes  # its digest
    _calls: int = field(default=0, init=False)

    def count(self, texts: np.ndarray) -> float:
        """Note one more answer about these of the site's texts; see `core.noise.Answered`.

        Raises BadInput for a file that is damaged.
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
        # a server cannot cut the power, after which the latest answers might count no more
        write_atomically(self.path, sealed(pack(now).payload), sync=False)
        return found

    def _read(self) -> SiteCount:
        if not self.path.is_file():
            return SiteCount(texts=np.zeros(0, "<i8"), answers=np.zeros(0, np.int64), orders={})
        try:
            return unpack(unsealed(self.path.read_bytes()), spare_bytes=STATE_SPARE_BYTES)
        except NotAMessage as error:
            raise BadInput(
                f"{self.path} is damaged, so nobody knows how often the rows have answered "
                f"({error}); the site answers nothing until it is restored, or removed, which "
                "forgets it"
            ) from None
