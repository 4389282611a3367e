"""A check that some device of a fleet has the memory for the least work of a method."""

from collections.abc import Iterable
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.method import FitsMemory
from fedspine.core.task import Task
from fedspine.lm.forecast import USABLE_MEMORY


def check_memory(method: Any, task: Task, memories: Iterable[int]) -> None:
    """Raise BadInput if none of the devices' `memories`, in bytes, has room for the least work.

    A method that leaves no device out for its memory passes, and so does a fleet with a device that
    does not state its memory, 0.
    """
    known = list(memories)
    if not isinstance(method, FitsMemory) or not known or min(known) <= 0:
        return
    least, most = method.least_work(task), max(known)
    if least.memory_bytes <= USABLE_MEMORY * most:
        return
    *others, last = least.settings
    raise BadInput(
        f"no device has enough memory for {method.name}, which needs at least "
        f"{least.memory_bytes / 2**30:.3g} GiB; at most {USABLE_MEMORY:.0%} of the largest memory, "
        f"{most / 2**30:.3g} GiB, may be used; lower {', '.join(others)} or {last}"
    )
