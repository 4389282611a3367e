"""The secret of a site, which together with the order determines the random draws of its work, such
as the rows of a step.

If only the order's seed determined them, the server could choose the rows of every step. The secret
is made once and kept in the site's folder, so that the site can replay its own work. An empty file
makes the draws those of a simulation, for a comparison of the two.
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
    """The secret of the site in this folder, 32 random bytes, made now if there is none; only its
    owner may read it.

    Raises BadInput for a file that is not hexadecimal digits.
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
    """The seed of an order's random draws; the order's own seed if the secret is empty.

    It depends on the whole order, so that two orders that differ in one setting do not draw the
    same rows. Otherwise their answers could be compared row by row.
    """
    if not secret:
        return asked.seed
    named = (asked.work, asked.seed, asked.round)
    digest = hmac.digest(secret, pack(named).payload + asked.order.tobytes(), hashlib.sha256)
    return tuple(int.from_bytes(digest[at : at + 4], "little") for at in range(0, len(digest), 4))
