"""The secret of a site, which decides with the order's seed what its work draws: rows among others.

A server that chose the seed alone would choose the rows of every step. The secret is made once and
kept in the site's folder, so that the site can replay its own work. An empty file makes the draws
those of a simulation, for a comparison of the two.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fedspine.core.errors import BadInput
from fedspine.core.message import pack
from fedspine.flare.wire import SiteOrder

SECRET = "secret"  # in the site's folder
BYTES = 32


def site_secret(folder: Path) -> bytes:
    """The secret of the site in this folder, made now if there is none; only its owner may read it.

    Raises BadInput for a file that holds something else.
    """
    path = folder / SECRET
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        try:
            return bytes.fromhex(path.read_text(encoding="ascii").strip())
        except ValueError:
            raise BadInput(
                f"{path} is damaged: hexadecimal digits were expected; remove it, and the site "
                "makes another, with which earlier work cannot be replayed"
            ) from None
    made = secrets.token_bytes(BYTES)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(made.hex())
        file.flush()
        os.fsync(file.fileno())
    return made


def seed_of(secret: bytes, asked: SiteOrder) -> tuple[int, ...]:
    """The seed of what the work of an order draws: the order's own where the secret is empty.

    All of the order decides, so that two orders that differ in one setting do not draw the same
    rows, of which their answers would tell apart.
    """
    if not secret:
        return asked.seed
    named = (asked.work, asked.seed, asked.round)
    digest = hmac.digest(secret, pack(named).payload + asked.order.tobytes(), hashlib.sha256)
    return tuple(int.from_bytes(digest[at : at + 4], "little") for at in range(0, len(digest), 4))
