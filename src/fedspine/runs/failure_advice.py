"""Advice on a run that ended early: resume it, or change the recipe because it would end the same
way again.

A simulated run is a function of its recipe. So whatever does not come from the machine, or from the
person who runs it, comes again after a resume.
"""

from pathlib import Path

from fedspine.core.errors import of_machine
from fedspine.core.fleet import AllLost, Diverged, NoMemory
from fedspine.core.privacy import SPENT
from fedspine.execution.workers import WorkerLost, WorkFailed
from fedspine.methods import comes_with_fedspine
from fedspine.runs.config import Recipe


def advice(
    error: Exception, recipe: Recipe, saved: str, folder: Path, *, simulated: bool = True
) -> str:
    """What follows the cause in the one line that ends a run; `saved` says how many of its rounds
    are in `folder`.
    """
    again = f"fedspine run --resume {folder}"
    resume = f"{saved}; resume with: {again}"
    anew = f"{saved}, but a resume would end the same way"
    match error:
        case Diverged():
            # all other rates of a method are multiples of this one
            rate = _number(recipe.method.learning_rate)
            return f"lower method.learning_rate ({rate}) and start a new run; {anew}"
        case NoMemory():
            return f"start a new run with that; {anew}"
        case AllLost() if SPENT in str(error):
            return f"raise privacy.epsilon and start a new run; {anew}"
        case AllLost() if simulated and recipe.fleet.drop:
            return f"lower fleet.drop ({_number(recipe.fleet.drop)}) and start a new run; {anew}"
        case AllLost():
            return resume
        case WorkerLost():  # killed, most often for its memory
            return _with_less(recipe, saved, folder)
        case _ if _of_machine(error):
            return _with_less(recipe, saved, folder) if _memory(error) else resume
        case _ if not simulated:
            return resume
        case _ if not comes_with_fedspine(recipe.method.name):
            module = type(recipe.method).__module__
            return (
                f"{saved}; if the fault is in {module}, correct it there and resume with: {again}, "
                f'or resume("{folder}") in Python'
            )
    return f"{anew}: change the recipe and start a new run"


def _of_machine(error: Exception) -> bool:
    return error.of_machine if isinstance(error, WorkFailed) else of_machine(error)


def _memory(error: Exception) -> bool:
    """Whether an error of the machine is about memory, not the disk."""
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("MemoryError", "OutOfMemoryError", "DefaultCPUAllocator"))


def _with_less(recipe: Recipe, saved: str, folder: Path) -> str:
    """How to go on in less memory: fewer processes change no result."""
    resume = f"fedspine run --resume {folder}"
    if recipe.run.workers != 1:
        return f"{saved}; resume with fewer processes: {resume} --set run.workers=1"
    return (
        f"{saved}; free memory and resume with: {resume}, or lower method.batch and start a new run"
    )


def _number(value: float) -> str:
    """A number as it is written in a recipe.

    >>> _number(1e9), _number(0.0002), _number(1.0)
    ('1e9', '0.0002', '1')
    """
    mantissa, mark, exponent = f"{value:g}".partition("e")
    return mantissa + mark + (str(int(exponent)) if mark else "")
