"""Serving asks and scoring models, in this process or in worker processes, with the same bytes.

Workers are forked after the base and the data are loaded, so they share those pages and nothing is
rebuilt per round. Every job runs on one thread, because the number of threads changes the order of
floating-point sums.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

import torch

from fedspine.core.device import Call, serve
from fedspine.core.errors import BadInput, of_machine
from fedspine.core.message import unpack
from fedspine.core.process import SIGNALS_TO_END, handling
from fedspine.core.scratch import Scratch
from fedspine.core.task import Data, Task
from fedspine.execution.together import serve_together
from fedspine.lm.base import Base
from fedspine.lm.decoding import Decoding, written
from fedspine.lm.prefix import Prefixes
from fedspine.lm.score import Score, score, score_together
from fedspine.nets.net import Net
from fedspine.nets.score import score_nets

PARENT_CHECK_SECONDS = 1.0
TRIES = 3  # lost workers in a row on one job, after which the run stops
Job: TypeAlias = "list[Call] | ScoreJob | AnswerJob"


@dataclass(frozen=True)
class ScoreJob:
    """Score packed models on the first `rows` rows of the test set, in the order of
    `Workshop.test_rows`, or of the rows that the device with the index `device` holds out.

    Several models must have one structure and are scored in one pass.
    """

    models: tuple[bytes, ...]
    rows: int
    device: int | None = None


@dataclass(frozen=True)
class AnswerJob:
    """Let a packed model continue prompts, given as tokens; the result is the tokens that it writes
    after each.
    """

    model: bytes
    prompts: tuple[tuple[int, ...], ...]
    decoding: Decoding
    ends: tuple[int, ...]
    padding: int


class WorkerLost(RuntimeError):
    """TRIES worker processes in a row died at one job; the message says how."""


class WorkFailed(RuntimeError):
    """Work raised an error in a worker process; the message is its traceback. `of_machine` is as in
    `core.errors.of_machine`.
    """

    def __init__(self, text: str, of_machine: bool) -> None:
        super().__init__(text, of_machine)  # both, so that it can be sent between processes
        self.of_machine = of_machine

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Workshop:
    """The shared inputs of all jobs: the task, each device's rows, and the fixed order of test
    rows.
    """

    task: Task
    shares: tuple[Any, ...]  # int64 row indices by device
    test_rows: Any  # int64 [rows of the test set]
    prefixes: Prefixes | None = None
    held_out: tuple[Any, ...] = ()  # int64 indices by device, of rows that it does not train on
    # each worker process fills its own
    scratch: Scratch = field(default_factory=Scratch)
    # rows of the devices asked so far; one workshop's own, since another's task or shares may
    # differ
    taken: dict[int, Data] = field(default_factory=dict, init=False)

    def do(self, job: Job) -> list[Any]:
        """The results of one job, run on one thread; its calls or models run together."""
        torch.set_num_threads(1)
        if isinstance(job, ScoreJob):
            models = [unpack(model) for model in job.models]
            if job.device is not None:
                own = self.task.train.take(self.held_out[job.device][: job.rows])
                return _scores(self.task.base, models, own, None)
            test = self.task.test.take(self.test_rows[: job.rows])
            return _scores(self.task.base, models, test, self.prefixes)
        if isinstance(job, AnswerJob):
            return [_answers(self.task.base, job)]
        data = [self._data(call.index) for call in job]
        if len(job) == 1:
            return [serve(job[0], self.task.base, data[0], self.prefixes, scratch=self.scratch)]
        return serve_together(job, self.task.base, data, self.prefixes, self.scratch)

    def _data(self, index: int) -> Data:
        """A device's own rows."""
        if index not in self.taken:
            self.taken[index] = self.task.train.take(self.shares[index])
        return self.taken[index]


def _scores(
    base: Base | Net, models: list[Any], test: Data, prefixes: Prefixes | None
) -> list[Score]:
    match base:
        case Net():
            return score_nets(base, models, test)
        case _ if len(models) == 1:
            rows = f"test-{len(test)}"
            return [score(base, models[0], test, prefixes=prefixes, rows=rows)]
    return score_together(base, models, test)


def _answers(base: Base, job: AnswerJob) -> list[list[int]]:
    module = base.fit(unpack(job.model).to(base.device), merge=True)
    return written(module, job.prompts, job.decoding, ends=job.ends, padding=job.padding)


class Workers:
    """A pool of `count` worker processes. If `count` is 0 or 1, or processes cannot be forked, this
    process does the work.

    Up to `together` calls are served in one batched pass. A worker that dies, for example killed
    for its memory, is replaced and its job is done again, with the same result; `lost` has a line
    about each. `run` raises WorkerLost if one job lost TRIES workers in a row.
    """

    def __init__(self, workshop: Workshop, count: int, together: int = 1) -> None:
        self._workshop, self.together = workshop, together
        self._count = (
            count
            if count > 1
            and "fork" in multiprocessing.get_all_start_methods()
            and sys.platform == "linux"
            else 0
        )
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self.lost: list[str] = []
        self._homes: dict[
            int, Connection
        ] = {}  # by device: the worker that keeps data for its next ask

    @property
    def base(self) -> Any:
        """The frozen model that all jobs compute with."""
        return self._workshop.task.base

    def rows_held_out(self, index: int) -> int:
        """How many rows the device of this index holds out."""
        held = self._workshop.held_out
        return len(held[index]) if held else 0

    @property
    def computing(self) -> str:
        """A line on what rounding depends on besides the recipe: cpu or cuda, and the number of
        devices in one pass.
        """
        return f"{self._workshop.task.base.device.type}, {self.together} in one pass"

    def run(self, jobs: Iterable[Call | ScoreJob | AnswerJob]) -> Iterator[Any]:
        """The results in the order of `jobs`, which are read as workers become free. Raises
        BadInput, WorkFailed or WorkerLost.
        """
        bundles = _bundled(jobs, self.together)
        if self._count and not self._processes:
            self._start()
        for result in self._spread(bundles) if self._count else map(self._workshop.do, bundles):
            yield from result

    def close(self) -> None:
        """End the worker processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
        self._pipes, self._processes, self._homes = [], [], {}

    def _start(self) -> None:
        with _signals_put_off():
            for _ in range(self._count):
                self._fork()

    def _fork(self) -> Connection:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        inherited = [*self._pipes, ours]
        process = context.Process(
            target=_work, args=(self._workshop, theirs, inherited, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)
        return ours

    def _spread(self, jobs: Iterator[Job]) -> Iterator[Any]:
        idle, busy = deque(self._pipes), {}
        waiting: dict[Connection, deque[tuple[int, Job]]] = {pipe: deque() for pipe in self._pipes}
        results: dict[int, Any] = {}
        numbered, given, tries = enumerate(jobs), 0, Counter[int]()
        while True:
            for _ in range(len(idle)):
                pipe = idle.popleft()
                found = self._job_for(pipe, waiting, numbered)
                if found is None:
                    idle.append(pipe)
                else:
                    busy[pipe] = found
                    with suppress(BrokenPipeError, ConnectionResetError):  # found by the next read
                        pipe.send(found[1])
            if not busy:
                return
            for pipe in wait(list(busy)):
                number, job = busy.pop(pipe)
                try:
                    failure, value = pipe.recv()
                except (EOFError, OSError):
                    tries[number] += 1
                    new = self._replaced(pipe, tries[number])
                    waiting[new] = waiting.pop(pipe)
                    waiting[new].appendleft((number, job))
                    idle.append(new)
                    continue
                if failure is not None:
                    raise failure
                results[number] = value
                self._settle(pipe, job, value)
                idle.append(pipe)
            while given in results:
                yield results.pop(given)
                given += 1

    def _job_for(
        self,
        pipe: Connection,
        waiting: dict[Connection, deque[tuple[int, Job]]],
        numbered: Iterator[tuple[int, Job]],
    ) -> tuple[int, Job] | None:
        """The next job for an idle worker: one bound to it, else the first that is bound to no
        other.
        """
        if waiting[pipe]:
            return waiting[pipe].popleft()
        for number, job in numbered:
            home = self._homes.get(job[0].index, pipe) if isinstance(job, list) else pipe
            if home is pipe:
                return number, job
            waiting[home].append((number, job))
        return None

    def _settle(self, pipe: Connection, job: Job, served: list[Any]) -> None:
        """Remember which worker keeps a device's data, since its next ask must run there."""
        for call, result in zip(job, served, strict=True) if isinstance(job, list) else ():
            if result.kept:
                self._homes[call.index] = pipe
            else:
                self._homes.pop(call.index, None)

    def _replaced(self, pipe: Connection, tries: int) -> Connection:
        """The pipe of a new worker in place of one that ended; raises WorkerLost after too many
        `tries`.
        """
        place = self._pipes.index(pipe)
        pipe.close()
        process = self._processes[place]
        process.join(timeout=2)
        how = _end_of(process.exitcode)
        process.kill()
        if tries == TRIES:
            raise WorkerLost(
                f"{TRIES} worker processes in a row ended without a reply to the same work, "
                f"the last {how}"
            )
        self.lost.append(f"a worker process ended {how}; another does its work")
        del self._pipes[place], self._processes[place]
        # what it kept for its devices only saved time
        self._homes = {device: home for device, home in self._homes.items() if home is not pipe}
        with _signals_put_off():
            return self._fork()


def _end_of(code: int | None) -> str:
    """How a process died, by its exit code; None: it has not exited yet.

    >>> _end_of(-9), _end_of(1)
    ('by SIGKILL, perhaps for its memory', 'with exit code 1')
    """
    if code is None or code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    return f"by {name}" + (", perhaps for its memory" if name == "SIGKILL" else "")


def _bundled(jobs: Iterable[Call | ScoreJob | AnswerJob], most: int) -> Iterator[Job]:
    """The jobs in their order, with up to `most` consecutive calls combined into one."""
    calls: list[Call] = []
    for job in jobs:
        if isinstance(job, Call):
            calls.append(job)
        if calls and (len(calls) == most or not isinstance(job, Call)):
            yield calls
            calls = []
        if not isinstance(job, Call):
            yield job
    if calls:
        yield calls


def _work(workshop: Workshop, pipe: Connection, inherited: list[Connection], parent: int) -> None:
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    while True:
        while not pipe.poll(PARENT_CHECK_SECONDS):
            if os.getppid() != parent:  # the run was killed
                os._exit(1)
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            reply = (None, workshop.do(job))
        except BadInput as error:  # whose line is for the user, from wherever it comes
            reply = (BadInput(str(error)), None)
        except BaseException as error:
            text = f"a worker failed:\n{traceback.format_exc()}"
            reply = (WorkFailed(text, of_machine(error)), None)
        try:
            pipe.send(reply)
        except OSError:  # the run ended meanwhile
            os._exit(1)


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block: callbacks that libraries run at a fork
    would swallow them.

    Forked workers keep ignoring both signals; the run's process handles them and ends its workers.
    """
    came: list[int] = []
    with handling(SIGNALS_TO_END, lambda number, _: came.append(number)):
        yield
    for number in dict.fromkeys(came):
        signal.raise_signal(number)
