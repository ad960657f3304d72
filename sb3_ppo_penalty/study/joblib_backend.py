"""Runs in processes of this machine."""

import os
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from joblib import Parallel, delayed, parallel_config  # type: ignore[import-untyped]

from sb3_ppo_penalty.study.execution import Outcome, attempt, is_finished, remove_unfinished, unfinished_folders
from sb3_ppo_penalty.study.grid import Run

#: Seconds after which a process without work ends, also when the one that gave it work is gone
IDLE_TIMEOUT = 30


def perform_all(runs: list[Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    :param runs: to be performed
    :param out: the comparison's folder
    :param n_jobs: how many at a time, -1 for as many as there are cores
    :return: each run's outcome as soon as it has one
    """
    remaining = {run.name: run for run in runs}
    while remaining:
        yield from _until_a_process_dies(remaining, out, n_jobs)


def _until_a_process_dies(remaining: dict[str, Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    :param remaining: by name; those that have an outcome leave it
    :param out: the comparison's folder
    :param n_jobs: how many at a time
    :return: outcomes, until all have one or a process has died without a word (out of memory, a fault in native code)
    """
    try:
        for outcome in _run_in_processes(remaining.values(), out, n_jobs):
            del remaining[outcome.name]
            yield outcome
    except BrokenProcessPool:
        # It took the other processes with it. What was under way goes one by one: only the run at fault fails again
        suspects = [name for name in remaining if unfinished_folders(out, name)]
        remove_unfinished(out)
        if not suspects:
            raise
        for name in suspects:
            yield _run_alone(remaining.pop(name), out)


def _run_alone(run: Run, out: Path) -> Outcome:
    """
    :param run: one that was under way when a process died
    :param out: the comparison's folder
    :return: its outcome in a process of its own
    """
    if is_finished(run, out):
        return Outcome(run.name, "")
    try:
        return next(iter(_run_in_processes([run], out, n_jobs=2)))  # with one job joblib would stay in this process
    except BrokenProcessPool:
        remove_unfinished(out)
        return Outcome(run.name, f"its process died: {traceback.format_exc(limit=0)}")


def _run_in_processes(runs: Iterable[Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    :param runs: to be performed
    :param out: the comparison's folder
    :param n_jobs: how many at a time
    :return: outcomes in the order in which the runs end
    """
    with parallel_config(backend="loky", inner_max_num_threads=1, idle_worker_timeout=IDLE_TIMEOUT):
        pool = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
        yield from pool(delayed(attempt)(run, out, os.getpid()) for run in list(runs))
