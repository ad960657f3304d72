"""Perform runs in processes of this machine."""

import os
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from joblib import Parallel, delayed, parallel_config  # type: ignore[import-untyped]

from sb3_ppo_penalty.study.execution import Outcome, attempt, is_finished, remove_unfinished, unfinished_folders
from sb3_ppo_penalty.study.grid import Run

#: Seconds after which an idle worker process ends, also when the process that started it has ended
IDLE_TIMEOUT = 30


def perform_all(runs: list[Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    Perform runs in worker processes; a worker that dies fails only its own run.

    :param runs: the runs to perform
    :param out: the comparison's folder
    :param n_jobs: number of runs at a time, -1 for as many as there are cores
    :return: the outcome of each run as soon as it ends
    """
    remaining = {run.name: run for run in runs}
    while remaining:
        yield from _until_a_process_dies(remaining, out, n_jobs)


def _until_a_process_dies(remaining: dict[str, Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    Perform runs until all have an outcome, or until a worker process dies (out of memory, a fault in native code).

    :param remaining: runs by name; those that have an outcome are removed
    :param out: the comparison's folder
    :param n_jobs: number of runs at a time
    :return: the outcome of each run as soon as it ends
    """
    try:
        for outcome in _run_in_processes(remaining.values(), out, n_jobs):
            del remaining[outcome.name]
            yield outcome
    except BrokenProcessPool:
        # joblib has ended all workers with it. The runs under way are repeated one by one: only the run at fault fails again
        suspects = [name for name in remaining if unfinished_folders(out, name)]
        remove_unfinished(out)
        if not suspects:
            raise
        for name in suspects:
            yield _run_alone(remaining.pop(name), out)


def _run_alone(run: Run, out: Path) -> Outcome:
    """
    Perform a run in a process of its own, to find out whether it was at fault.

    :param run: a run that was under way when a process died
    :param out: the comparison's folder
    :return: its outcome
    """
    if is_finished(run, out):
        return Outcome(run.name, "")
    try:
        return next(iter(_run_in_processes([run], out, n_jobs=2)))  # with one job joblib would start no process
    except BrokenProcessPool:
        remove_unfinished(out)
        return Outcome(run.name, f"its process died: {traceback.format_exc(limit=0)}")


def _run_in_processes(runs: Iterable[Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    Perform runs in worker processes.

    :param runs: the runs to perform
    :param out: the comparison's folder
    :param n_jobs: number of runs at a time
    :return: the outcome of each run as soon as it ends
    """
    with parallel_config(backend="loky", inner_max_num_threads=1, idle_worker_timeout=IDLE_TIMEOUT):
        pool = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
        yield from pool(delayed(attempt)(run, out, os.getpid()) for run in list(runs))
