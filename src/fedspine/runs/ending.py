"""How a run ends early: every error is one line, kept in its folder for `fedspine show`."""

import shutil
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput, Stopped
from fedspine.core.fleet import AllLost, Diverged
from fedspine.core.process import farewell
from fedspine.execution.workers import Workers
from fedspine.report.tables import counted
from fedspine.runs.assemble import Assembled, workers_for
from fedspine.runs.failure_advice import advice
from fedspine.runs.run_dir import CACHE, ENDED, FAILURE, STATE
from fedspine.storage.store import Store, write_atomically


def guarded(
    go: Callable[[Store, Workers], dict[str, Any]],
    assembled: Assembled,
    run_dir: Path,
    *,
    simulated: bool,
) -> dict[str, Any]:
    """What `go` returns, with the run's store and workers, which are closed after it.

    Any error becomes one line: BadInput passes, all others become Stopped. The last saved round
    stays untouched.
    """
    store, workers = Store(run_dir / STATE), workers_for(assembled, run_dir / CACHE)

    def then(error: Exception) -> str:
        return advice(error, assembled.recipe, _saved(store), run_dir, simulated=simulated)

    try:
        attempt = Attempt.of(run_dir, store)
        (run_dir / ENDED).unlink(missing_ok=True)  # of an earlier attempt
        return go(store, workers)
    except BadInput:
        raise
    except KeyboardInterrupt as interrupt:
        word, exit_code = farewell(interrupt)
        raise _stopped(run_dir, f"{word}; {_kept(store, run_dir)}", exit_code) from None
    except AllLost as error:
        if isinstance(error, Diverged) and attempt.is_second(error, store):
            with suppress(BadInput):  # where the round before is not whole, this one stays
                store.go_back(attempt.rounds - 1)
        raise _stopped(run_dir, f"{error}; {then(error)}") from None
    except OSError as error:
        what = f"{error.filename or run_dir}: {error.strerror or error}"
        raise _stopped(run_dir, f"{what}; {_kept(store, run_dir)}") from error
    except Exception as error:
        with suppress(OSError):
            (run_dir / FAILURE).write_text(
                "".join(traceback.format_exception(error)), encoding="utf-8"
            )
        lines = str(error).strip().splitlines() or [""]
        what = " ".join(dict.fromkeys((lines[0], lines[-1])))  # of a worker's traceback, its cause
        where = f"details are in {run_dir / FAILURE}"
        line = f"{type(error).__name__}: {what}; {then(error)}; {where}"
        raise _stopped(run_dir, line) from error
    finally:
        store.close()
        workers.close()
        shutil.rmtree(run_dir / CACHE, ignore_errors=True)


@dataclass(frozen=True)
class Attempt:
    """Where an attempt to go on with a run began, and the line that ended the one before."""

    rounds: int
    ended: str

    @classmethod
    def of(cls, run_dir: Path, store: Store) -> "Attempt":
        path = run_dir / ENDED
        return cls(store.rounds(), path.read_text(encoding="utf-8") if path.exists() else "")

    def is_second(self, error: Diverged, store: Store) -> bool:
        """Whether all replies to the last saved state were not finite for a second time in a row,
        and there is a round before it, whose state devices could use.
        """
        return self.rounds == store.rounds() > 1 and self.ended.startswith(str(error))


def _stopped(run_dir: Path, line: str, exit_code: int = 2) -> Stopped:
    """The error that ends the command; its line stays in the run directory for `fedspine show`."""
    with suppress(OSError):
        write_atomically(run_dir / ENDED, line.encode())
    return Stopped(line, exit_code)


def _kept(store: Store, run_dir: Path) -> str:
    return f"{_saved(store)}; resume with: fedspine run --resume {run_dir}"


def _saved(store: Store) -> str:
    rounds = store.rounds()
    return f"{counted(rounds, 'round')} saved" if rounds else "no round is saved yet"
