"""The comparison on a Ray cluster, a real one on this machine: the same results, as they finish, whatever dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_ppo_penalty.study import cli, execution, grid, ray_backend
from sb3_ppo_penalty.study.run import perform

COMPARE = [sys.executable, "-m", "sb3_ppo_penalty", "compare", "--backend", "ray"]
SMALL = ["--n-timesteps", "600", "--eval-freq", "300", "--n-eval-episodes", "10", "--hyperparams", "n_steps=64", "n_epochs=2"]
FOLDERS = (execution.RUNS, execution.FAILURES)
GRID = [*SMALL, "--algos", "ppo_penalty", "ppo", "--seeds", "2"]

#: A cluster of two CPUs until its standard input ends. Not `ray start`, which makes it this machine's default, nor `ray stop`,
#: which ends every cluster there is
HEAD = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

#: The environment of seed 1 has its process killed, as the kernel does when memory is short
DEADLY = """
import os, signal
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Deadly(CartPoleEnv):
    def reset(self, *, seed=None, options=None):
        if seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(seed=seed, options=options)

gym.register("Deadly-v1", Deadly, max_episode_steps=20)
"""


def wait_until(condition, seconds: float = 200):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def start(*words: str, **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMPARE, *words], env={**os.environ, **environment}, **pipes)


@pytest.fixture(name="nobody", scope="module")
def make_nobody(tmp_path_factory) -> subprocess.Popen:
    """A comparison for which there is no cluster, which takes Ray a while to believe: the other tests' time."""
    process = start(*GRID, "--out", str(tmp_path_factory.mktemp("nobody")), RAY_ADDRESS="127.0.0.1:1")
    yield process
    process.kill()
    process.communicate()


def start_ray(folder: str) -> tuple[subprocess.Popen, str]:
    """A cluster that keeps all its files in a folder, and its address."""
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder, "TMPDIR": folder}
    # Seconds to come up in, which Ray's own thirty are too few for on a machine with much else to do
    settings["RAY_raylet_start_wait_time_s"] = "120"
    # Coverage would be measured in every process of Ray's own
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    head = subprocess.Popen([sys.executable, "-c", HEAD], env={**inherited, **settings}, **pipes)
    address = head.stdout.readline().strip()
    if not address:
        head.communicate()
        pytest.fail("Ray has not started: its reason stands in the captured stderr")
    return head, address


@pytest.fixture(name="ray_cluster", scope="module")
def make_ray_cluster(nobody: subprocess.Popen) -> dict[str, str]:
    """What a comparison's environment needs to find it, and the folder for its workers' temporary files."""
    # (short, because the paths of its sockets may not be long)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        head, address = start_ray(folder)
        yield {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "TMPDIR": folder}
        head.communicate()


def workers(ray_cluster: dict[str, str]) -> set[int]:
    """Processes of the cluster that perform a run, or were ended while they did: a run's log bears its process's id."""
    logs = Path(ray_cluster["TMPDIR"]).glob("sb3_ppo_penalty-*/runs/.*.log.txt")
    return {int(path.name.split(".")[-3]) for path in logs}


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def finished(out: Path) -> dict[str, int]:
    """When each file of a finished run was written."""
    files = (path for folder in out.glob("runs/[!.]*") for path in folder.iterdir())
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in files}


@pytest.fixture(name="study", scope="module")
def make_study(ray_cluster: dict[str, str], tmp_path_factory) -> dict:
    """A comparison that is killed after its first finished run, and started again."""
    out = tmp_path_factory.mktemp("study")
    first = start(*GRID, "--n-jobs", "1", "--out", str(out), **ray_cluster)
    wait_until(lambda: finished(out) or first.poll() is not None)
    under_way = wait_until(lambda: workers(ray_cluster) or first.poll() is not None)
    first.kill()
    _, errors = first.communicate()
    assert first.returncode == -signal.SIGKILL, errors
    before = finished(out)
    wait_until(lambda: not any(map(is_alive, under_way)), seconds=30)
    second = start(*GRID, "--out", str(out), **ray_cluster)
    said, errors = second.communicate()
    assert second.returncode == 0, errors
    return {"out": out, "before": before, "said": said, "errors": errors}


@pytest.mark.slow
def test_runs_arrive_as_they_finish_and_what_is_there_is_not_made_again(study) -> None:
    kept = {name.split("/")[1] for name in study["before"]}
    after = finished(study["out"])
    assert 1 <= len(kept) < 4
    assert {name: after[name] for name in study["before"]} == study["before"]
    runs = sorted(path.name for path in (study["out"] / "runs").iterdir())
    assert [name.rpartition("-")[0] for name in runs] == ["ppo-seed0", "ppo-seed1", "ppo_penalty-seed0", "ppo_penalty-seed1"]
    assert study["said"].startswith(f"4 runs, {len(kept)} of them finished before")
    assert "4/4 runs" in study["errors"]
    assert "compare --backend ray" in (study["out"] / "report.md").read_text()


@pytest.mark.slow
def test_nothing_but_the_bar_is_written_to_the_terminal(study) -> None:
    words = re.sub(r"\s*\d*%\|.*?\|[^|]*left", "", study["errors"])
    assert words.strip() == ""


@pytest.mark.slow
def test_results_are_those_of_this_machine_bit_by_bit(study, tmp_path: Path) -> None:
    comparison = cli.build_comparison(cli.build_parser().parse_args([*GRID, "--out", str(study["out"])]), "")
    for run in comparison.runs:
        there, here = study["out"] / "runs" / run.name, tmp_path / run.name
        perform(run, here)
        assert {path.name for path in here.iterdir()} | {"log.txt"} == {path.name for path in there.iterdir()}
        assert (there / "settings.json").read_text() == run.settings
        for name in ("evaluations.npz", "final_evaluation.npz"):
            with np.load(there / name) as theirs, np.load(here / name) as ours:
                assert theirs["results"].tolist() == ours["results"].tolist(), f"{run.name}: {name}"
        zips = [folder / "Pendulum-v1.zip" for folder in (there, here)]
        theirs, ours = (load_from_zip_file(path, load_data=False)[1]["policy"] for path in zips)
        assert all(th.equal(theirs[name], ours[name]) for name in {**theirs, **ours})


@pytest.fixture(name="at_the_cluster")
def make_at_the_cluster(ray_cluster: dict[str, str], monkeypatch) -> None:
    """For comparisons in this process."""
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("at_the_cluster")
def test_a_worker_that_dies_is_its_run_s_failure_and_the_others_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.chdir(tmp_path)  # where Ray's workers look for modules, too
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--env", "Deadly-v1", "--gym-packages", "deadly", "--algos", "ppo", "ppo_clip", "ppo_penalty", "--seeds", "1"]
    words += [*SMALL, "n_envs=1", "ppo:n_envs=2", "ppo_clip:nonsense=1", "--n-jobs", "1", "--out", "out", "--backend", "ray"]
    code = cli.main(words)
    said, errors = capsys.readouterr()
    names = {folder: sorted(path.name.rpartition("-")[0] for path in Path("out", folder).iterdir()) for folder in FOLDERS}
    assert code == 1
    assert names == {"runs": ["ppo_penalty-seed0"], "failures": ["ppo-seed0", "ppo_clip-seed0"]}, errors
    died, broken = sorted(Path("out/failures").iterdir())
    assert died.read_text().startswith("not performed by the cluster: WorkerCrashedError")
    assert "got an unexpected keyword argument 'nonsense'" in broken.read_text()
    assert "2 of 3 runs failed" in said


@pytest.mark.slow
@pytest.mark.usefixtures("at_the_cluster")
def test_gpus_that_the_cluster_does_not_have_are_not_waited_for(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*GRID, "--device", "cuda", "--out", str(tmp_path), "--backend", "ray"])
    assert end.value.code == 1
    said = "python -m sb3_ppo_penalty compare --backend ray: --device cuda: no node of the cluster has a GPU\n"
    assert capsys.readouterr().err == said


# ------------------------------------------------------------------------------------------------------- without a cluster


def a_run(**changes) -> grid.Run:
    task = grid.Task("CartPole-v1", 64, eval_freq=64, n_eval_episodes=2, device="cpu", gym_packages=())
    hyperparams = {"policy": "MlpPolicy", "n_envs": 1, "n_steps": 64, "batch_size": 64, "n_epochs": 1, "n_timesteps": 64}
    return grid.Run(**{"algo": "ppo", "seed": 0, "hyperparams": hyperparams, "task": task, **changes})


def test_a_node_with_other_versions_does_not_spoil_the_comparison() -> None:
    versions = {**grid.installed_versions(), "torch": "1.0", "box3d": "7"}
    outcome, files = ray_backend.perform_on_node(a_run(versions=versions))
    assert f"torch {th.__version__} instead of 1.0" in outcome.error
    assert "box3d missing instead of 7" in outcome.error
    assert "numpy" not in outcome.error
    assert files == {}


def test_a_node_notes_its_own_source_beside_the_result(monkeypatch) -> None:
    # An edit on the comparison's machine while it waits would else fail every run that is still to come
    monkeypatch.setattr("sb3_ppo_penalty.study.run.source_digest", lambda: "0123456789")
    outcome, files = ray_backend.perform_on_node(a_run(versions=grid.installed_versions()))
    assert outcome.error == ""
    assert json.loads(files["result.json"])["source"] == "0123456789"


def test_what_a_run_has_written_comes_back_and_nothing_stays_on_the_node(tmp_path: Path, monkeypatch) -> None:
    def write(run: grid.Run, folder: Path, parent_pid: int | None) -> None:
        assert parent_pid is None  # the comparison is on another machine: Ray watches over it
        (folder / "deeper").mkdir(parents=True)
        (folder / "deeper" / "model.bin").write_bytes(b"\x00\xff")

    monkeypatch.setattr(execution, "perform", write)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome, files = ray_backend.perform_on_node(a_run(versions=grid.installed_versions()))
    assert outcome.error == ""
    assert files == {"deeper/model.bin": b"\x00\xff", "log.txt": b""}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("n_jobs", "places"), [(1, 1), (8, 8), (-1, 5), (-2, 4), (-9, 1)])
def test_places_are_counted_back_from_the_cluster_s_cpus(n_jobs: int, places: int, monkeypatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 5.0, "memory": 1e9})
    assert ray_backend._max_concurrent_runs(n_jobs) == places


def test_so_many_are_under_way_and_the_first_to_end_is_the_first_to_arrive(tmp_path: Path, monkeypatch) -> None:
    under_way = []

    def last_one_ends(references: list[int]) -> tuple[list[int], list[int]]:
        under_way.append(len(references))
        return references[-1:], references[:-1]

    monkeypatch.setattr("ray.wait", last_one_ends)
    monkeypatch.setattr("ray.shutdown", lambda: under_way.append("end"))
    monkeypatch.setattr(ray_backend, "_submit", lambda run: run.seed)
    monkeypatch.setattr(ray_backend, "_fetch", lambda run, *_: execution.Outcome(str(run.seed), ""))
    runs = [a_run(seed=seed, versions={}) for seed in range(5)]
    outcomes = ray_backend._perform_concurrently(runs, tmp_path, n_jobs=2)
    assert next(outcomes).name == "1"
    assert under_way == [2]
    assert [outcome.name for outcome in outcomes] == ["2", "3", "4", "0"]
    assert under_way == [2, 2, 2, 2, 1, "end"]


def test_no_run_at_a_time_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["--n-jobs", "0"])
    assert "argument --n-jobs: must be at least 1, or -1 for as many as there are cores, got 0" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "ray" else True)
    with pytest.raises(SystemExit) as end:
        cli.main(["--backend", "ray"])
    assert end.value.code == 1
    assert capsys.readouterr().err == 'compare --backend ray cannot run without ray: pip install "sb3_ppo_penalty[ray]"\n'


def test_an_address_that_is_none_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(
        execution.BackendError, match=r"no Ray cluster can be reached \(Invalid address format: nonsense\): start"
    ):
        ray_backend.perform_all([a_run(versions={})], tmp_path, n_jobs=1)


def test_where_nothing_remains_to_be_done_no_cluster_is_needed(tmp_path: Path) -> None:
    run = a_run(versions={})
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    assert execution.execute([run], tmp_path, 1, lambda *_: pytest.fail("asked for")) == {}


@pytest.mark.slow
def test_no_cluster_is_one_sentence_that_says_how_to_start_one(nobody: subprocess.Popen) -> None:
    _, errors = nobody.communicate(timeout=120)
    assert nobody.returncode == 1
    sentence = errors.strip().splitlines()[-1]
    assert re.fullmatch(
        r"python -m sb3_ppo_penalty compare --backend ray: no Ray cluster can be reached \(.*:1\): "
        r"start one with `ray start --head`, or set RAY_ADDRESS to one that runs",
        sentence,
    )
    assert "Traceback" not in errors
