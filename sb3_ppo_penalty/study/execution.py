"""Perform many runs: in parallel, resumable, and so that a run that fails ends no other one."""

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from sb3_ppo_penalty.study.grid import Run
from sb3_ppo_penalty.study.run import STEPS, perform

#: Folders inside the comparison's folder
RUNS, FAILURES = "runs", "failures"
LOG = "log.txt"
#: Seconds between two updates of the progress bar, at a terminal and in a log file, where each update adds a line
REFRESH, REFRESH_LOG = 0.5, 30.0


class Outcome(NamedTuple):
    """
    What became of a run.

    :param name: name of the run
    :param error: traceback, empty if the run finished
    """

    name: str
    error: str


class BackendError(RuntimeError):
    """Raised when the machines that should perform the runs cannot be reached."""


#: Performs runs. Takes the runs, the comparison's folder and the number of runs at a time (-1 for as many as there are cores);
#: yields the outcome of each run as soon as it ends, and leaves a folder for each that finished
Backend = Callable[[list[Run], Path, int], Iterator[Outcome]]


def is_finished(run: Run, out: Path) -> bool:
    """
    Say whether a run is finished: its folder gets its name only when everything is in it.

    :param run: a run of the comparison
    :param out: the comparison's folder
    :return: whether the folder is there
    """
    return (out / RUNS / run.name).is_dir()


def unfinished_folders(out: Path, name: str = "") -> list[Path]:
    """
    List what runs that are under way, or were broken off, have written.

    :param out: the comparison's folder
    :param name: name of a run, empty for all runs
    :return: paths of their hidden folders and logs
    """
    return sorted((out / RUNS).glob(f".{name}*"))


def attempt(run: Run, out: Path, parent_pid: int) -> Outcome:
    """
    Perform a run in a hidden folder, which is renamed in one step when the run is finished.

    :param run: the run to perform
    :param out: the comparison's folder
    :param parent_pid: process id of the comparison that waits for the run
    :return: the outcome; an error of the run is part of it and not raised
    """
    folder, final = out / RUNS / f".{run.name}.{os.getpid()}", out / RUNS / run.name
    shutil.rmtree(folder, ignore_errors=True)
    log = out / RUNS / f".{run.name}.{os.getpid()}.{LOG}"
    try:
        with log.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
            perform(run, folder, parent_pid if parent_pid != os.getpid() else None)
        os.replace(log, folder / LOG)
        if not final.exists():  # another process may have finished the run, which is never overwritten
            os.rename(folder, final)
    except Exception:
        return Outcome(run.name, traceback.format_exc())
    finally:
        log.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(run.name, "")


def execute(runs: Iterable[Run], out: Path, n_jobs: int, backend: Backend) -> dict[str, str]:
    """
    Perform the runs that are not finished.

    :param runs: all runs of the comparison
    :param out: the comparison's folder; gets a folder for each finished run and a traceback for each failed one
    :param n_jobs: number of runs at a time, -1 for as many as there are cores
    :param backend: performs the runs, see :data:`Backend`
    :return: tracebacks by name of the run
    """
    (out / RUNS).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / FAILURES, ignore_errors=True)
    remove_unfinished(out)
    runs = list(runs)
    remaining = [run for run in runs if not is_finished(run, out)]
    errors = {}
    # Where nothing remains to be done, no cluster need be reachable
    outcomes: Iterable[Outcome] = backend(remaining, out, n_jobs) if remaining else ()
    with progress_bar(runs, out) as bar:
        for outcome in outcomes:
            if outcome.error:
                errors[outcome.name] = outcome.error
                (out / FAILURES).mkdir(exist_ok=True)
                (out / FAILURES / f"{outcome.name}.txt").write_text(outcome.error)
                bar.write(f"{outcome.name} failed:\n{outcome.error}", file=sys.stderr)
    return errors


def remove_unfinished(out: Path) -> None:
    """
    Remove what runs that were broken off have left behind.

    :param out: the comparison's folder
    """
    for path in unfinished_folders(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _steps_under_way(out: Path) -> int:
    """
    Count the steps of the runs that are under way, for the progress bar.

    :param out: the comparison's folder
    :return: number of environment steps
    """
    steps = 0
    for folder in unfinished_folders(out):
        with suppress(FileNotFoundError, NotADirectoryError):  # not begun, ended in the meantime, or a log
            steps += int((folder / STEPS).read_text())
    return steps


@contextmanager
def progress_bar(runs: list[Run], out: Path) -> Iterator[tqdm]:
    """
    Show the number of finished runs, steps per second and the time left.

    :param runs: all runs of the comparison
    :param out: the comparison's folder
    """
    per_run = runs[0].task.n_timesteps
    start = per_run * sum(is_finished(run, out) for run in runs)
    layout = "{percentage:3.0f}%|{bar}|{postfix}, {rate_fmt}, {remaining} left"
    bar = tqdm(total=per_run * len(runs), initial=start, unit=" steps", unit_scale=True, bar_format=layout, smoothing=0)
    ended = Event()

    def look() -> None:
        finished = sum(is_finished(run, out) for run in runs)
        bar.n = min(per_run * finished + _steps_under_way(out), bar.total)
        bar.set_postfix_str(f"{finished}/{len(runs)} runs", refresh=False)
        bar.refresh()

    def watch() -> None:
        while not ended.wait(REFRESH if sys.stderr.isatty() else REFRESH_LOG):
            look()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield bar
    finally:
        ended.set()
        watcher.join()
        look()
        bar.close()
