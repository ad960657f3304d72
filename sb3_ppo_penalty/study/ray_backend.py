"""
Perform runs on a Ray cluster: each run is a task, whose result is the contents of the run's folder.

Ray's own tasks are used and not joblib's ``ray`` backend, which has no ``return_as="generator_unordered"``: there all outcomes
would arrive together with the last one.
"""

import logging
import os
import platform
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray.exceptions import RayError

from sb3_ppo_penalty.study.execution import RUNS, BackendError, Outcome, attempt
from sb3_ppo_penalty.study.grid import Run, installed_versions

#: Contents of a run's folder by file name, relative to the folder
RunFiles = dict[str, bytes]
#: Result of a run's task: the outcome, and the files of a finished run
NodeResult = tuple[Outcome, RunFiles]


def perform_all(runs: list[Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    Perform runs on the cluster.

    :param runs: the runs to perform
    :param out: the comparison's folder on this machine, which the cluster need not see
    :param n_jobs: number of runs at a time; -1 for as many as the cluster has CPUs, -2 for one less, and so on
    :return: the outcome of each run as soon as it ends
    :raises BackendError: if there is no cluster, or it has no GPU where the runs need one
    """
    _connect()
    if any(map(_gpus_needed, runs)) and not _resources().get("GPU"):
        ray.shutdown()
        raise BackendError(f"--device {runs[0].task.device}: no node of the cluster has a GPU")
    return _perform_concurrently(runs, out, n_jobs)


def _connect() -> None:
    """
    Join the cluster that ``RAY_ADDRESS`` names, or else the one that this machine is part of.

    :raises BackendError: if there is none
    """
    # In seconds; where no cluster answers, Ray would try for a quarter of an hour by default
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ImportError, OSError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise BackendError(
            f"no Ray cluster can be reached ({reason}): start one with `ray start --head`, or set RAY_ADDRESS to one that runs"
        ) from error


def _perform_concurrently(runs: list[Run], out: Path, n_jobs: int) -> Iterator[Outcome]:
    """
    Keep as many runs under way as are allowed, until all have ended.

    :param runs: the runs to perform
    :param out: the comparison's folder
    :param n_jobs: number of runs at a time, as for :func:`perform_all`
    :return: the outcome of each run as soon as it ends
    """
    queue = deque(runs)
    under_way: dict[ray.ObjectRef[NodeResult], Run] = {}
    try:
        while queue or under_way:
            while queue and len(under_way) < _max_concurrent_runs(n_jobs):
                run = queue.popleft()
                under_way[_submit(run)] = run
            (ended, *_), _ = ray.wait(list(under_way))
            yield _fetch(under_way.pop(ended), ended, out)
    finally:
        ray.shutdown()


def _max_concurrent_runs(n_jobs: int) -> int:
    """
    Count how many runs may be under way now; nodes may join and leave the cluster.

    :param n_jobs: number of runs at a time, as for :func:`perform_all`
    :return: at least 1
    """
    return n_jobs if n_jobs > 0 else max(int(_resources().get("CPU", 0)) + 1 + n_jobs, 1)


def _resources() -> dict[str, float]:
    """
    Look up the resources of all nodes together.

    :return: amount by name (``"CPU"``, ``"GPU"`` and others), including what is in use
    """
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _submit(run: Run) -> "ray.ObjectRef[NodeResult]":
    """
    Submit a run to the cluster.

    :param run: the run to perform
    :return: a reference to its result
    """
    # No retries: a run that ends its worker would otherwise end one worker after the other, without a message
    task = ray.remote(perform_on_node).options(name=run.name, num_cpus=1, num_gpus=_gpus_needed(run), max_retries=0)
    return task.remote(run)


def _gpus_needed(run: Run) -> int:
    """
    Count the GPUs that a run needs; Ray hides from a task those that it has not asked for.

    :param run: the run to perform
    :return: 0 or 1
    """
    return 1 if run.task.device.startswith("cuda") else 0


def perform_on_node(run: Run) -> NodeResult:
    """
    Perform a run on a node of the cluster; Ray ends it when the comparison that waits for it ends.

    :param run: the run to perform
    :return: its outcome, and the contents of its folder if it finished
    """
    difference = _version_differences(run.versions, installed_versions(run.task.gym_packages))
    if difference:
        return Outcome(run.name, f"node {platform.node()} is not installed like the comparison's machine: {difference}"), {}
    with TemporaryDirectory(prefix="sb3_ppo_penalty-") as room:
        (Path(room) / RUNS).mkdir()
        outcome = attempt(run, Path(room), parent_pid=os.getpid())
        folder = Path(room) / RUNS / run.name
        files = [path for path in folder.rglob("*") if path.is_file()]
        return outcome, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _version_differences(wanted: dict[str, str], here: dict[str, str]) -> str:
    """
    Describe how the packages of a node differ from those that a run must be made with.

    :param wanted: version by package, of the comparison's machine
    :param here: version by package, of this node
    :return: the differences in words, empty if there are none
    """
    names = [name for name in sorted({*wanted, *here}) if wanted.get(name) != here.get(name)]
    return ", ".join(f"{name} {here.get(name, 'missing')} instead of {wanted.get(name, 'none')}" for name in names)


def _fetch(run: Run, ended: "ray.ObjectRef[NodeResult]", out: Path) -> Outcome:
    """
    Fetch the result of a run that has ended, and write its folder.

    :param run: the run
    :param ended: reference to its result
    :param out: the comparison's folder
    :return: the run's outcome
    """
    try:
        outcome, files = ray.get(ended)
    except RayError as error:
        return Outcome(run.name, f"not performed by the cluster: {type(error).__name__}: {error}")
    if files:
        _write_run_folder(run, files, out)
    return outcome


def _write_run_folder(run: Run, files: RunFiles, out: Path) -> None:
    """
    Write a finished run into a hidden folder, which is renamed in one step.

    :param run: the finished run
    :param files: contents by file name, relative to the run's folder
    :param out: the comparison's folder
    """
    folder = out / RUNS / f".{run.name}.{os.getpid()}"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.rename(folder, out / RUNS / run.name)
