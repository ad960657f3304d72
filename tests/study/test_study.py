"""The side-by-side comparison: its statistics, what it runs, how it survives being killed, and what it reports."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import combinations, count
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import rl_zoo3
import torch as th
import yaml
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.registration import EnvSpec
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO

from sb3_ppo_penalty import MlpLstmPolicy, PPOPenalty, RecurrentPPOPenalty, zoo
from sb3_ppo_penalty.study import cli, execution, grid, plots, report, results, statistics
from sb3_ppo_penalty.study.run import EVALUATION_SEED, perform

COMPARE = [sys.executable, "-c", "import sys; from sb3_ppo_penalty.study.cli import main; sys.exit(main(sys.argv[1:]))"]

#: Episodes of three steps that return where they started, whatever is done. How many random numbers a step draws depends on
#: the action, so that the starts of later episodes would, too. The environment of seed 1 takes its process down
LOTTERY = """
import os
import gymnasium as gym
import numpy as np

class Lottery(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed == 1:
            os._exit(3)
        self.start, self.left = self.np_random.uniform(-1, 1), 3
        return np.array([self.start], dtype=np.float32), {}

    def step(self, action):
        self.np_random.random(action + 1)
        self.left -= 1
        over = self.left == 0
        return np.array([self.start], dtype=np.float32), self.start * over, over, False, {}

gym.register("Lottery-v0", Lottery)
"""


# ---------------------------------------------------------------------------------------------------------------- statistics


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert statistics.iqm([-1000, 3, 1, 2, 4, 5, 1000, 6]) == 3.5  # of 2, 3, 4, 5; rliable's example of robustness
    assert statistics.iqm([1, 2, 3, 4, 100]) == 3  # of five, one is cut off at either end
    assert statistics.iqm([[1.0, 2.0], [3.0, 6.0]], axis=0).tolist() == [2, 4]


def test_iqm_interval_holds_95_percent_of_the_resampled_means() -> None:
    # Three seeds, 0, 0 and 3: a resample's mean is 0, 1, 2 or 3 with probability 8/27, 12/27, 6/27 and 1/27
    assert statistics.iqm_interval([0, 0, 3]) == (0, 3)
    assert statistics.iqm_interval([7, 7, 7]) == (7, 7)
    low, high = statistics.iqm_interval([[0.0, 5.0], [0.0, 5.0], [3.0, 5.0]], axis=0)
    assert (low.tolist(), high.tolist()) == ([0, 5], [3, 5])


@pytest.mark.parametrize("seeds", [[7], [7, 9]])
def test_below_three_seeds_there_is_no_interval(seeds: list[int]) -> None:
    assert all(math.isnan(end) for end in statistics.iqm_interval(seeds))
    assert all(math.isnan(end) for end in statistics.improvement_interval(seeds, [1, 2, 3, 4]))
    assert all(math.isnan(end) for end in statistics.improvement_interval([1, 2, 3, 4], seeds))
    low, high = statistics.iqm_interval([seeds, seeds], axis=1)
    assert np.isnan([low, high]).tolist() == [[True, True], [True, True]]


def test_iqm_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    samples = np.random.default_rng(1).normal(size=(100, 20))
    low, high = statistics.iqm_interval(samples, axis=1)
    covered = np.mean((low < 0) & (high > 0))  # the IQM of a normal distribution is its mean
    assert 0.85 < covered < 1


def test_probability_of_improvement_counts_pairs() -> None:
    # 3 beats 1 and 2, 2 beats 1 and ties with 2: 3.5 of the 4 pairs
    assert statistics.probability_of_improvement([3, 2], [1, 2]) == 0.875
    assert statistics.probability_of_improvement([1, 1], [2, 2, 2]) == 0
    assert statistics.probability_of_improvement([2, 2], [2, 2, 2]) == 0.5
    assert statistics.improvement_interval([3, 4, 5], [0, 1, 2]) == (1, 1)
    # A resample of 1, 1 and 3 has no, one, two or three 3s, which beat 2, with probability 8/27, 12/27, 6/27 and 1/27
    assert statistics.improvement_interval([1, 1, 3], [2, 2, 2]) == (0, 1)


def test_steps_to_threshold_is_the_first_evaluation_that_reaches_it() -> None:
    assert statistics.steps_to_threshold([0, 10, 20, 30], [-5, -2, -3, -1], -2) == 10
    assert statistics.steps_to_threshold([0, 10, 20, 30], [-5, -2, -3, -1], 0) == math.inf


def test_mean_over_training_is_the_area_per_step() -> None:
    assert statistics.mean_over_training([0, 10, 30], [0, 2, 2], until=30) == 5 / 3  # a triangle of 10, a rectangle of 40


def test_mean_over_training_ends_at_the_same_step_for_all() -> None:
    # The line 0, 1, 2, ... up to 20 has the mean 10, whether its last evaluation was made at 20 or some steps later
    assert statistics.mean_over_training([0, 10, 20], [0, 10, 20], until=20) == 10
    assert statistics.mean_over_training([0, 16, 32], [0, 16, 32], until=20) == 10
    assert statistics.mean_over_training([0, 10], [0, 10], until=20) == 5  # a run that ended early


# ------------------------------------------------------------------------------------------------------------ what is to run


def task(env: str = "Pendulum-v1", n_timesteps: int = 600) -> grid.Task:
    return grid.Task(env, n_timesteps, eval_freq=200, n_eval_episodes=10, device="cpu", gym_packages=())


def a_run(**changes) -> grid.Run:
    given = {"algo": "ppo", "seed": 0, "hyperparams": {"gamma": 0.9}, "task": task(), "versions": {"torch": "2"}}
    return grid.Run(**{**given, **changes})


def test_a_run_is_another_as_soon_as_anything_that_decides_its_result_is() -> None:
    others = [
        a_run(algo="ppo_clip"),
        a_run(seed=1),
        a_run(hyperparams={"gamma": 0.99}),
        a_run(task=task(n_timesteps=601)),
        a_run(task=task("CartPole-v1")),
        a_run(versions={"torch": "3"}),
        a_run(task=grid.Task("Pendulum-v1", 600, eval_freq=100, n_eval_episodes=10, device="cpu", gym_packages=())),
        a_run(task=grid.Task("Pendulum-v1", 600, eval_freq=200, n_eval_episodes=11, device="cpu", gym_packages=())),
    ]
    names = [run.name.rpartition("-")[2] for run in (a_run(), *others)]
    assert len(set(names)) == 9
    assert a_run().name == a_run().name
    assert a_run(hyperparams={"a": 1, "b": 2}).name == a_run(hyperparams={"b": 2, "a": 1}).name


@pytest.mark.parametrize("constant", ["EVALUATION_SEED", "EVALUATION_ENVS"])
def test_how_runs_are_evaluated_is_part_of_their_identity(constant: str, monkeypatch) -> None:
    name = a_run().name
    monkeypatch.setattr(grid, constant, 7)
    assert a_run().name != name


def test_the_versions_that_decide_are_those_of_the_packages_and_of_the_environments() -> None:
    versions = grid.installed_versions()
    assert versions["torch"] == th.__version__
    assert "source" not in versions
    assert set(grid.installed_versions(["lottery", "yaml.loader"])) - set(versions) == {"PyYAML"}


@pytest.fixture(name="package")
def make_package(tmp_path: Path) -> Path:
    """A copy of the package, whose source can be changed."""
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(grid.__file__).parents[1], tmp_path / "sb3_ppo_penalty", ignore=ignored)


@pytest.mark.parametrize("name", ["version.py", "objectives/losses.py", "study/run.py", "a_new_room/deeper/module.py"])
def test_the_source_is_that_of_all_sub_packages(name: str, package: Path, monkeypatch) -> None:
    monkeypatch.setattr(grid.sb3_ppo_penalty, "__file__", str(package / "__init__.py"))
    digest = grid.source_digest.__wrapped__
    run, before = a_run().name, digest()
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    with (package / name).open("a") as file:
        file.write("# a comment")
    assert re.fullmatch("[0-9a-f]{10}", before)
    assert digest() != before
    assert a_run().name == run


def test_moving_a_module_is_another_source_and_compiling_one_is_not(package: Path, monkeypatch) -> None:
    monkeypatch.setattr(grid.sb3_ppo_penalty, "__file__", str(package / "__init__.py"))
    digest = grid.source_digest.__wrapped__
    before = digest()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "losses.cpython-311.pyc").write_bytes(b"compiled")
    assert digest() == before
    (package / "objectives" / "losses.py").rename(package / "zoo" / "losses.py")
    assert digest() != before


def test_default_settings_are_the_tuned_entries() -> None:
    zoo.register()
    found = grid.resolve_settings(["ppo_penalty", "ppo", "trpo"], task(), {}, {}, None)
    own = yaml.safe_load((zoo.HYPERPARAMS / "ppo_penalty.yml").read_text())["Pendulum-v1"]
    assert found["ppo_penalty"].hyperparams == {**own, "n_timesteps": 600}
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "trpo.yml").read_text())["Pendulum-v1"]
    assert found["trpo"].hyperparams == {**theirs, "n_timesteps": 600}
    assert found["ppo"].hyperparams["use_sde"] is True  # Zoo's PPO on Pendulum-v1: gSDE, gamma 0.9
    assert found["ppo"].hyperparams["gamma"] == 0.9
    assert found["ppo"].source == "entry `Pendulum-v1` of rl_zoo3's ppo.yml"


@pytest.mark.parametrize(
    ("env", "key"),
    [("Hopper-v5", "Hopper-v5"), ("Ant-v5", "Ant-v4"), ("Walker2d-v5", "default"), ("Antmaze-v1", "default")],
)
def test_another_version_of_the_environment_is_closer_than_the_default(env: str, key: str, monkeypatch) -> None:
    monkeypatch.setattr(grid.ExperimentManager, "is_atari", staticmethod(lambda _: False))
    assert grid.closest_entry({"default": {}, "Hopper-v4": {}, "Hopper-v5": {}, "Ant-v2": {}, "Ant-v4": {}}, env) == key


def test_an_environment_without_an_entry_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "my.yml").write_text("CartPole-v1: {policy: MlpPolicy}")
    with pytest.raises(ValueError, match=r"ppo: .*my.yml: has an entry neither for Pendulum-v1 nor `default`"):
        grid.zoo_settings("ppo", "Pendulum-v1", str(tmp_path / "my.yml"))


def test_the_article_s_batches_hold_whole_episodes() -> None:
    pendulum, cartpole = grid.article_settings("Pendulum-v1"), grid.article_settings("CartPole-v1")
    assert pendulum.hyperparams["n_steps"] == pendulum.hyperparams["batch_size"] == 2200  # 11 episodes of 200 steps
    assert cartpole.hyperparams["n_steps"] == 2500  # 5 of at most 500
    assert pendulum.hyperparams["policy_kwargs"]["covariance"] == 0.5
    assert "covariance" not in cartpole.hyperparams["policy_kwargs"]  # discrete actions have none


SHARED = """
Pendulum-v1:
  {n_envs: 2, n_timesteps: 7, policy: MlpPolicy, n_steps: 64, batch_size: 32, n_epochs: 2, gamma: 0.95, ent_coef: 0.01,
   clip_range: 0.3, target_kl: 0.05, policy_kwargs: "dict(covariance=0.7)"}
"""
OWN = """
Pendulum-v1:
  {n_envs: 9, n_timesteps: 7, policy: MlpPolicy, gamma: 0.5, target_kl: 0.02, kl_coef: 3.0, clip_range: 0.1,
   kl_controller: dual, max_ratio: 5.0}
"""


@pytest.fixture(name="same_policy")
def make_same_policy(tmp_path: Path) -> dict[str, dict]:
    zoo.register()
    (tmp_path / "shared.yml").write_text(SHARED)
    (tmp_path / "own.yml").write_text(OWN)
    files = {algo: str(tmp_path / "own.yml") for algo in ("ppo_penalty", "ppo", "trpo")}
    files["ppo_clip"] = str(tmp_path / "shared.yml")
    found = grid.resolve_settings(["ppo_penalty", "ppo_clip", "ppo", "trpo"], task(), files, {}, donor="ppo_clip")
    return {algo: settings.hyperparams for algo, settings in found.items()}


def test_same_policy_shares_all_but_the_objective(same_policy) -> None:
    shared = {"n_envs": 2, "n_timesteps": 600, "n_steps": 64, "batch_size": 32, "gamma": 0.95}
    shared |= {"policy": "sb3_ppo_penalty.MlpPolicy", "policy_kwargs": "dict(covariance=0.7)"}
    surrogate = {**shared, "n_epochs": 2, "ent_coef": 0.01}
    clip = {**surrogate, "clip_range": 0.3, "target_kl": 0.05}
    assert same_policy["ppo_clip"] == same_policy["ppo"] == clip
    penalty = {"kl_coef": 3.0, "kl_controller": "dual", "max_ratio": 5.0}
    assert same_policy["ppo_penalty"] == {**surrogate, **penalty, "target_kl": 0.02, "clip_range": 0.1}
    assert same_policy["trpo"] == {**shared, "target_kl": 0.02}


def test_same_policy_makes_ppo_clip_and_stock_ppo_the_same(same_policy, tmp_path: Path) -> None:
    small = grid.Task("Pendulum-v1", 256, eval_freq=256, n_eval_episodes=2, device="cpu", gym_packages=())
    returns, parameters = [], []
    for algo in ("ppo_clip", "ppo"):
        perform(grid.Run(algo, 3, same_policy[algo], small, {}), tmp_path / algo)
        returns.append(json.loads((tmp_path / algo / "result.json").read_text())["final_return"])
        parameters.append(PPO.load(tmp_path / algo / "Pendulum-v1.zip").policy.state_dict())
    assert returns[0] == returns[1]
    assert all(th.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])
    assert parameters[0]["covariance"].item() == pytest.approx(0.7)


def test_algorithms_with_a_memory_are_compared_with_the_stock_one_that_has_it(tmp_path: Path) -> None:
    words = ["--env", "CartPoleNoVel-v1", "--algos", "ppo_penalty_lstm", "ppo_lstm", "--same-policy", "ppo_penalty_lstm"]
    words += ["--seeds", "3", "--n-timesteps", "512", "--n-eval-episodes", "4", "--n-jobs", "1", "--out", str(tmp_path)]
    assert cli.main([*words, "--hyperparams", "n_epochs=2"]) == 0
    penalty, stock = sorted((tmp_path / "runs").glob("*-seed0-*"), key=lambda folder: folder.name.startswith("ppo_lstm"))
    policies = [
        algorithm.load(folder / "CartPoleNoVel-v1.zip").policy
        for algorithm, folder in ((RecurrentPPOPenalty, penalty), (RecurrentPPO, stock))
    ]
    assert [type(policy) for policy in policies] == [MlpLstmPolicy, MlpLstmPolicy]
    report = (tmp_path / "report.md").read_text()
    assert "| P(better than ppo_lstm) |" in report
    assert "a higher return than one of sb3-contrib's RecurrentPPO" in report
    with pytest.raises(ValueError, match="--same-policy ppo_clip: ppo_lstm cannot have its policy, since only one of them"):
        plan("--algos", "ppo_lstm", "--same-policy")


# ---------------------------------------------------------------------------------------------------------- the command line


def plan(*words: str) -> grid.Comparison:
    return cli.build_comparison(cli.build_parser().parse_args(words), "the command")


def test_plain_command_is_a_first_look_and_full_the_study() -> None:
    first, full = plan(), plan("--full")
    assert sorted({run.algo for run in first.runs}) == ["ppo", "ppo_clip", "ppo_penalty", "trpo"]
    assert len(first.runs) == 8
    assert first.task.n_timesteps == 80_000
    assert len(full.runs) == 40
    assert full.task.n_timesteps == 100_000
    assert full.task.eval_freq == 5_000
    assert (full.threshold, full.optimum, str(full.out)) == (-200, -137.6, "runs/pendulum")
    assert {run.seed for run in plan("--full", "--seeds", "2", "--first-seed", "40").runs} == {40, 41}


def test_the_threshold_is_gymnasium_s_where_it_has_one() -> None:
    assert plan("--env", "CartPole-v1", "--algos", "ppo").threshold == 475
    assert plan("--env", "CartPole-v1", "--algos", "ppo", "--threshold", "400").threshold == 400
    assert plan("--env", "CartPole-v1", "--algos", "ppo").optimum is None


def test_hyperparameters_of_the_command_line_are_python_or_zoo_s() -> None:
    words = ["gamma=0.5", "ppo:learning_rate=1e-3", "trpo:learning_rate=lin_0.01", "ppo:use_sde=False"]
    given = {run.algo: run.hyperparams for run in plan("--algos", "ppo", "trpo", "--hyperparams", *words).runs}
    assert (given["ppo"]["gamma"], given["trpo"]["gamma"]) == (0.5, 0.5)
    assert (given["ppo"]["learning_rate"], given["trpo"]["learning_rate"]) == (0.001, "lin_0.01")
    assert given["ppo"]["use_sde"] is False
    assert given["trpo"]["use_sde"] is True


def test_variants_are_one_algorithm_with_several_settings(tmp_path: Path) -> None:
    words = ["ppo_penalty+dual:kl_controller=dual", "ppo_penalty+0.1-wide:policy_kwargs=dict(covariance=3.0)", "n_steps=64"]
    algos = ["ppo_penalty", "ppo_penalty+dual", "ppo_penalty+0.1-wide"]
    task_words = ["--n-timesteps", "256", "--n-eval-episodes", "2", "--seeds", "1"]
    runs = {run.algo: run for run in plan("--algos", *algos, "--hyperparams", *words, *task_words).runs}
    plain = runs["ppo_penalty"].hyperparams
    assert plain["kl_controller"] == "proportional"
    assert runs["ppo_penalty+dual"].hyperparams == {**plain, "kl_controller": "dual"}
    assert runs["ppo_penalty+0.1-wide"].hyperparams == {**plain, "policy_kwargs": "dict(covariance=3.0)"}
    perform(runs["ppo_penalty+0.1-wide"], tmp_path / "run")
    model = PPOPenalty.load(tmp_path / "run" / "Pendulum-v1.zip")
    assert (type(model), model.n_steps, model.policy.covariance.item()) == (PPOPenalty, 64, 3)


def test_variants_look_like_nobody_else_in_a_comparison() -> None:
    algos = ["ppo_penalty", "ppo", *(f"ppo_penalty+{number}" for number in range(40))]
    found = plots.line_styles(algos)
    assert len(set(found.values())) == len(algos) == len(found)
    assert (found["ppo"], plots.line_styles(["ppo"])["ppo"]) == (plots.LINE_STYLES["ppo"], plots.LINE_STYLES["ppo"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hyperparams", "gamma"], "--hyperparams gamma: must be KEY=VALUE"),
        (["--hyperparams", "trpo:gamma=1"], "trpo is not among --algos ppo"),
        (["--hyperparams", "n_timesteps=5"], "see --n-timesteps"),
        (["--conf-file", "nowhere.yml"], "`--conf-file` for ppo: nowhere.yml: .*No such file"),
        (["--env", "Pendulun-v1"], "--env Pendulun-v1: not registered"),
        (["--n-timesteps", "100", "--eval-freq", "200"], "--eval-freq 200: a run has only 100 steps"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--algos", "sac"], "must be one of ppo_penalty, .*, got sac"),
        (["--algos", "ppo+"], r"or one of them and \+NAME, got ppo\+"),
        (["--hyperparams", "ppo+b:gamma=1"], r"ppo\+b is not among --algos ppo"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--algos", "ppo", *words])
    assert end.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_missing_extra_ends_with_the_pip_command(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 1
    assert capsys.readouterr().err == 'compare cannot run without joblib: pip install "sb3_ppo_penalty[zoo]"\n'


# ------------------------------------------------------------------------------------------ killed, and started again


WORDS = ["--algos", "ppo_penalty", "ppo", "--seeds", "2", "--n-timesteps", "600", "--eval-freq", "200"]
WORDS += ["--n-eval-episodes", "10", "--hyperparams", "n_steps=64", "n_epochs=2", "learning_rate=lin_0.002"]
WORDS += ["ppo_penalty:target_kl=0.02"]


def finished_files(out: Path) -> dict[str, tuple[int, bytes]]:
    """When each file of a finished run was written, and what is in it."""
    files = (path for folder in out.glob("runs/[!.]*") for path in folder.iterdir())
    return {path.relative_to(out).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def hidden(out: Path) -> list[Path]:
    return list(out.glob("runs/.*"))


def wait_until(condition, seconds: float = 300) -> None:
    for tick in count():
        if condition():
            return
        assert tick * 0.01 < seconds, "waited too long"
        time.sleep(0.01)


def in_this_process(*words: str) -> dict:
    """The command one run after the other, without the seconds that a process takes to import RL Zoo."""
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as errors:
        code = cli.main([*words, "--n-jobs", "1"])
    return {"code": code, "said": said.getvalue(), "errors": errors.getvalue()}


@pytest.fixture(name="study", scope="module")
def make_study(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("study")
    done = in_this_process(*WORDS, "--out", str(out))
    assert done["code"] == 0, done["errors"]
    return {"out": out, **done}


@pytest.mark.slow
def test_what_was_finished_before_the_kill_is_kept_and_the_rest_is_done(tmp_path: Path) -> None:
    command = [*COMPARE, *WORDS, "--n-jobs", "2", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: finished_files(tmp_path))
    os.kill(first.pid, signal.SIGKILL)  # alone: its worker processes have to notice
    first.wait()
    wait_until(lambda: not hidden(tmp_path), seconds=60)
    before = finished_files(tmp_path)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    kept = {name.split("/")[1] for name in before}
    after = finished_files(tmp_path)
    assert 1 <= len(kept) < 4
    assert {name: after[name] for name in before} == before
    assert_all_four_are_there(tmp_path)
    assert second.stdout.startswith(f"4 runs, {len(kept)} of them finished before")
    assert "4/4 runs" in second.stderr


def assert_all_four_are_there(out: Path) -> None:
    runs = sorted(path.name for path in (out / "runs").iterdir())
    assert [name.rpartition("-")[0] for name in runs] == ["ppo-seed0", "ppo-seed1", "ppo_penalty-seed0", "ppo_penalty-seed1"]


def test_only_what_is_missing_is_performed(study, tmp_path: Path) -> None:
    out = shutil.copytree(study["out"], tmp_path / "out")
    assert study["said"].startswith("4 runs, 0 of them finished before")
    shutil.rmtree(folder_of({"out": out}, "ppo", 1))
    before = finished_files(out)
    done = in_this_process(*WORDS, "--out", str(out))
    assert done["said"].startswith("4 runs, 3 of them finished before")
    assert "4/4 runs" in done["errors"]
    after = finished_files(out)
    assert {name: after[name] for name in before} == before
    assert_all_four_are_there(out)


def folder_of(study, algo: str, seed: int) -> Path:
    return next((study["out"] / "runs").glob(f"{algo}-seed{seed}-*"))


def test_hyperparameters_reach_the_model(study) -> None:
    own = yaml.safe_load((zoo.HYPERPARAMS / "ppo_penalty.yml").read_text())["Pendulum-v1"]
    penalty = PPOPenalty.load(folder_of(study, "ppo_penalty", 1) / "Pendulum-v1.zip")
    stock = PPO.load(folder_of(study, "ppo", 0) / "Pendulum-v1.zip")
    assert (penalty.target_kl, penalty.seed, penalty.gamma, penalty.n_envs) == (0.02, 1, own["gamma"], own["n_envs"])
    assert (stock.use_sde, stock.seed, stock.gamma, stock.n_envs) == (True, 0, 0.9, 4)  # Zoo's entry
    for model in (penalty, stock):
        assert (model.n_steps, model.n_epochs, model.num_timesteps) == (64, 2, 768)
        assert model.lr_schedule(0.5) == 0.001


def test_the_final_return_is_the_saved_model_s_on_the_starts_that_all_share(study) -> None:
    rows = pd.read_csv(study["out"] / "results.csv").set_index(["algo", "seed"])
    model = PPO.load(folder_of(study, "ppo", 1) / "Pendulum-v1.zip", device="cpu")
    returns = []
    for k in range(10):
        env = gym.make("Pendulum-v1")
        observation, _ = env.reset(seed=EVALUATION_SEED + k)
        over, total = False, 0.0
        while not over:
            observation, reward, _, over, _ = env.step(model.predict(observation, deterministic=True)[0])
            total += reward
        returns.append(total)
    assert rows.loc[("ppo", 1), "final_return"] == pytest.approx(np.mean(returns), rel=1e-5)


def test_evaluations_are_made_at_the_same_steps_for_all(study) -> None:
    for algo in ("ppo_penalty", "ppo"):
        with np.load(folder_of(study, algo, 0) / "evaluations.npz") as evaluations:
            assert evaluations["timesteps"].tolist() == [0, 200, 400, 600]
            assert evaluations["results"].shape == (4, 10)


def test_every_update_is_logged_at_its_own_step(study) -> None:
    log = pd.read_csv(folder_of(study, "ppo_penalty", 0) / "progress.csv")
    updates = log.dropna(subset=["train/kl"])
    assert updates["time/total_timesteps"].tolist() == [256, 512, 768]  # 4 environments of 64 steps; the last one too
    model = PPOPenalty.load(folder_of(study, "ppo_penalty", 0) / "Pendulum-v1.zip")
    assert updates["train/kl_coef"].iloc[-1] == model.kl_coef
    assert {"train/target_kl_min", "train/target_kl_max", "train/effective_sample_size", "train/clip_fraction"} <= set(log)
    assert updates["train/target_kl_max"].tolist() == [0.03] * 3


def test_the_report_has_the_table_the_pictures_and_where_it_comes_from(study) -> None:
    text = (study["out"] / "report.md").read_text()
    rows = pd.read_csv(study["out"] / "results.csv")
    means = rows.groupby("algo")["final_return"].mean()  # of two seeds the IQM is the mean
    for algo, mean in means.items():
        assert f"| {algo}" in text
        assert f"| {mean:,.1f} " in text
        assert f"{-137.6 - mean:,.1f}" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["intervals.png", "learning_curves.png", "kl.png", "importance_weights.png"]
    for picture in pictures:
        assert (study["out"] / picture).read_bytes().startswith(b"\x89PNG")
    assert f"torch {th.__version__}" in text
    assert "seeds 0, 1, 600 environment steps" in text
    assert "python -m sb3_ppo_penalty compare --algos ppo_penalty ppo --seeds 2" in text
    assert "target_kl: 0.02" in text
    assert f"source of sb3_ppo_penalty (runs made with it): {grid.source_digest()} (4)" in text
    assert "another source" not in text + study["said"]


def test_two_seeds_get_neither_intervals_nor_a_probability(study) -> None:
    table = (study["out"] / "report.md").read_text().split("## Result")[1].split("\n\n")[1]
    assert "[" not in table
    row = next(line for line in table.splitlines() if line.startswith("| ppo_penalty"))
    header = next(line for line in table.splitlines() if "P(better than ppo)" in line)
    cells = dict(zip(header.split("|"), row.split("|"), strict=True))
    assert cells[" P(better than ppo) "].strip() == report.NO_VALUE
    for text in ((study["out"] / "report.md").read_text(), study["said"]):
        assert "Fewer than 3 seeds: ppo_penalty (2), ppo (2)." in text


@pytest.mark.slow
def test_finished_runs_of_another_source_are_kept_and_named(study, package: Path, tmp_path: Path) -> None:
    out = shutil.copytree(study["out"], tmp_path / "out")
    before = finished_files(out)
    again = next((out / "runs").glob("ppo-seed1-*"))
    shutil.rmtree(again)
    with (package / "zoo" / "article.py").open("a") as file:
        file.write("# a comment")
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [*COMPARE, *WORDS, "--n-jobs", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = finished_files(out)
    kept = {name for name in before if not name.startswith(f"runs/{again.name}/")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    own = pd.read_csv(out / "results.csv").set_index("run")["source"]
    assert (own.drop(again.name) == grid.source_digest()).all()
    new = own[again.name]
    assert new != grid.source_digest()
    text = (out / "report.md").read_text()
    assert f"source of sb3_ppo_penalty (runs made with it): {grid.source_digest()} (3), {new} (1)" in text
    assert done.stdout.startswith("4 runs, 3 of them finished before")
    warning = (
        f"finished runs were made by another source of sb3_ppo_penalty ({grid.source_digest()}) than the present one ({new})"
    )
    assert f"Warning: 3 of 3 {warning}" in done.stdout  # before anything is performed
    assert f"Warning: 3 of 4 {warning}" in done.stdout
    assert f"**3 of 4 {warning}" in text


# ------------------------------------------------------------------------------------------------------ runs that fail


#: Of the environment above
DRAWS = ["--env", "Lottery-v0", "--gym-packages", "lottery", "--seeds", "1", "--n-timesteps", "128", "--eval-freq", "64"]
DRAWS += ["--n-eval-episodes", "120"]


@pytest.fixture(name="lottery", scope="module")
def make_lottery(tmp_path_factory) -> dict:
    """Three algorithms, one of which cannot be built."""
    room = tmp_path_factory.mktemp("lottery")
    (room / "lottery.py").write_text(LOTTERY)
    words = [*DRAWS, "--algos", "ppo_penalty", "ppo_clip", "trpo", "--out", str(room / "out")]
    words += ["--hyperparams", "n_steps=64", "ppo_penalty:n_epochs=1", "ppo_clip:nonsense=1", "trpo:batch_size=64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(room)
        done = in_this_process(*words)
    return {"out": room / "out", **done}


def names_in(folder: Path) -> list[str]:
    """Of runs, without the digests of their settings."""
    return sorted(path.name.rpartition("-")[0] for path in folder.iterdir())


def test_failed_runs_are_reported_and_the_others_go_on(lottery) -> None:
    assert lottery["code"] == 1
    assert names_in(lottery["out"] / "runs") == ["ppo_penalty-seed0", "trpo-seed0"], lottery["errors"]
    assert names_in(lottery["out"] / "failures") == ["ppo_clip-seed0"]
    assert "Traceback" in lottery["errors"]
    assert "got an unexpected keyword argument 'nonsense'" in lottery["errors"]
    assert "1 of 3 runs failed" in lottery["said"]
    assert "got an unexpected keyword argument 'nonsense'" in (lottery["out"] / "report.md").read_text()


@pytest.mark.slow
def test_a_run_whose_process_dies_takes_no_other_along(tmp_path: Path) -> None:
    (tmp_path / "lottery.py").write_text(LOTTERY)
    words = [*DRAWS, "--algos", "ppo_penalty", "ppo", "trpo", "--hyperparams", "n_steps=64", "ppo:n_envs=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*COMPARE, *words, "--out", "out"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert names_in(tmp_path / "out" / "runs") == ["ppo_penalty-seed0", "trpo-seed0"], done.stderr
    (failure,) = (tmp_path / "out" / "failures").iterdir()
    assert failure.name.startswith("ppo-seed0")
    assert "its process died" in failure.read_text()
    assert "1 of 3 runs failed" in done.stdout


class Fragile(CartPoleEnv):
    """Breaks in a step of its training, and knows how many of its kind are open."""

    open = made = 0

    def __init__(self, last_step: float = math.inf) -> None:
        super().__init__()
        self.left = last_step
        Fragile.open, Fragile.made = Fragile.open + 1, Fragile.made + 1

    def step(self, action):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("it broke")
        return super().step(action)

    def close(self) -> None:
        super().close()
        Fragile.open -= 1


@pytest.mark.parametrize(
    ("hyperparams", "error", "made"),
    [
        ({}, None, 2 + 3),
        ({"nonsense": 1}, TypeError, 2),
        ({"env_kwargs": {"last_step": 20}}, RuntimeError, 2 + 3),
    ],
    ids=["it succeeds", "its model cannot be made", "its environment breaks"],
)
def test_a_run_closes_its_environments_and_files(hyperparams, error, made: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(gym.registry, "Fragile-v0", EnvSpec("Fragile-v0", Fragile))
    monkeypatch.setattr(Fragile, "open", 0)
    monkeypatch.setattr(Fragile, "made", 0)
    small = {"policy": "MlpPolicy", "n_envs": 2, "n_timesteps": 64, "n_steps": 16, "batch_size": 16, "n_epochs": 1}
    work = grid.Task("Fragile-v0", 64, eval_freq=32, n_eval_episodes=3, device="cpu", gym_packages=())
    failure = pytest.raises(error) if error else nullcontext()
    # What pytest keeps of an error holds all that was opened, so that no garbage collector closes it
    with failure as kept:
        perform(grid.Run("ppo", 0, {**small, **hyperparams}, work, {}), tmp_path / "run")
    files = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert (Fragile.made, Fragile.open, [each for each in files if str(tmp_path) in each]) == (made, 0, []), kept


def test_every_evaluation_has_the_same_starts_whatever_the_policy_does(lottery) -> None:
    starts = [gym.utils.seeding.np_random(EVALUATION_SEED + k)[0].uniform(-1, 1) for k in range(150)]
    last_twenty = starts[130:]  # 120 episodes in 50 environments: the last twenty of them make the last ones
    folders = list((lottery["out"] / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        with np.load(folder / "evaluations.npz") as evaluations:
            for episodes in evaluations["results"]:
                assert sorted(episodes) == pytest.approx(sorted(starts[:50]), abs=1e-5)
        with np.load(folder / "final_evaluation.npz") as evaluation:
            assert evaluation["results"].tolist() == pytest.approx([*starts[:100], *last_twenty], abs=1e-5)


def test_the_batch_s_return_is_that_of_the_episodes_that_ended_in_it(lottery) -> None:
    folder = next((lottery["out"] / "runs").glob("ppo_penalty-seed0-*"))
    episodes = pd.read_csv(folder / "0.monitor.csv", skiprows=1)["r"]
    log = pd.read_csv(folder / "progress.csv").dropna(subset=["rollout/batch_return"])
    # Two batches of 64 steps, in each of which 21 episodes of 3 steps end
    assert log["rollout/batch_episodes"].tolist() == [21, 21]
    assert log["rollout/batch_return"].tolist() == pytest.approx([episodes[:21].mean(), episodes[21:].mean()], abs=1e-5)


def test_where_every_run_fails_there_is_no_report_but_the_tracebacks(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(execution, "perform", lambda *_: 1 / 0)
    assert cli.compare(plan("--algos", "ppo", "--seeds", "1", "--out", str(tmp_path)), n_jobs=1) == 1
    assert "1 of 1 runs failed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["failures"]


def test_a_finished_run_is_never_overwritten(tmp_path: Path, monkeypatch) -> None:
    run = a_run()
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    (tmp_path / "runs" / run.name / "result.json").write_text("kept")

    def write(run: grid.Run, folder: Path, parent_pid: int | None) -> None:
        folder.mkdir()
        (folder / "result.json").write_text("new")

    monkeypatch.setattr(execution, "perform", write)
    assert execution.attempt(run, tmp_path, os.getpid()).error == ""
    assert (tmp_path / "runs" / run.name / "result.json").read_text() == "kept"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]


# ----------------------------------------------------------------------------------- evaluations between the due steps


#: One of them steps three environments at a time and the other four
UNEVEN = {"ppo": 3, "ppo_clip": 4}


@pytest.fixture(name="uneven", scope="module")
def make_uneven(tmp_path_factory) -> results.Results:
    """Evaluations are due at 0, 2, 4, ... 24, more often than any of the two algorithms makes a step."""
    out = tmp_path_factory.mktemp("uneven")
    work = grid.Task("CartPole-v1", 25, eval_freq=2, n_eval_episodes=2, device="cpu", gym_packages=())
    small = {"policy": "MlpPolicy", "n_timesteps": 25, "n_steps": 4, "batch_size": 4, "n_epochs": 1}
    runs = [grid.Run(algo, 0, {**small, "n_envs": n_envs}, work, {}) for algo, n_envs in UNEVEN.items()]
    for run in runs:
        perform(run, out / "runs" / run.name)
    return results.read(runs, out, threshold=0.0)


@pytest.mark.parametrize(("algo", "steps"), [("ppo", [*range(0, 25, 3)]), ("ppo_clip", [*range(0, 25, 4)])])
def test_a_curve_stands_at_the_steps_at_which_it_was_evaluated(algo: str, steps: list[int], uneven) -> None:
    curve = results.curves_of(uneven, algo)
    assert curve.index.tolist() == steps
    row = uneven.runs.set_index("algo").loc[algo]
    assert row["return_over_training"] == pytest.approx(np.trapezoid(curve[0], steps) / 24)
    assert row["steps_to_threshold"] == 0


def test_curves_of_other_numbers_of_environments_are_drawn_together(uneven, tmp_path: Path) -> None:
    work = grid.Task("CartPole-v1", 25, eval_freq=2, n_eval_episodes=2, device="cpu", gym_packages=())
    settings = {algo: grid.AlgorithmSettings({"n_envs": n_envs}, "made up") for algo, n_envs in UNEVEN.items()}
    comparison = grid.Comparison(grid.plan_runs(settings, work, range(1)), work, settings, tmp_path, None, None, "made up")
    lines = plots.learning_curves(comparison, uneven).axes[0].get_lines()
    assert [line.get_xdata().tolist() for line in lines] == [[*range(0, 25, 3)], [*range(0, 25, 4)]]
    above, below = plots.divergence(comparison, uneven).axes
    assert above.get_lines()[0].get_xdata().tolist() == [12, 24, 36]  # rollouts of three environments and four steps
    assert above.get_xlim() == below.get_xlim() == (0, 36)


# ------------------------------------------------------------------------------------------------- tables and pictures


@pytest.fixture(name="made_up")
def make_made_up(tmp_path: Path) -> tuple[grid.Comparison, results.Results]:
    """Figures that can be checked by hand: four seeds, of which the IQM leaves out the best and the worst."""
    finals = {"ppo_penalty": [-140.0, -150.0, -152.0, -900.0], "ppo": [-170.0, -160.0, -180.0, -148.0]}
    runs, curves, updates = [], [], []
    for algo, values in finals.items():
        for seed, value in enumerate(values):
            reached = [20.0, 40.0, 40.0, math.inf][seed] if algo == "ppo_penalty" else math.inf
            row = {"env": "Pendulum-v1", "algo": algo, "seed": seed, "final_return": value, "return_over_training": 2 * value}
            row |= {"steps_to_threshold": reached, "steps": 100, "steps_per_second": 1000.0 * (seed + 1)}
            runs.append({**row, "last_batch_return": -90.0, "best_batch_return": -80.0, "source": grid.source_digest()})
            curves += [{"algo": algo, "seed": seed, "steps": 50 * k, "return": value * (3 - k)} for k in range(3)]
            kl = {
                "train/kl": 0.01 * (seed + 1),
                "train/kl_coef": 2.0**seed,
                "train/target_kl_min": 0.005,
                "train/target_kl_max": 0.02,
            }
            own = kl if algo == "ppo_penalty" else {"train/approx_kl": 0.001}
            updates += [{"algo": algo, "seed": seed, "time/total_timesteps": 50 * k, **own} for k in (1, 2)]
    settings = {algo: grid.AlgorithmSettings({"gamma": 0.9}, "made up") for algo in finals}
    work = grid.Task("Pendulum-v1", 100, eval_freq=50, n_eval_episodes=1000, device="cpu", gym_packages=())
    comparison = grid.Comparison(
        grid.plan_runs(settings, work, range(4)), work, settings, tmp_path, threshold=-200.0, donor=None, command="made up"
    )
    return comparison, results.Results(*map(pd.DataFrame, (runs, curves, updates)))


def test_the_table_s_figures(made_up) -> None:
    comparison, found = made_up
    figures = results.summary(found, comparison.optimum)
    penalty, stock = figures.loc["ppo_penalty"], figures.loc["ppo"]
    assert penalty["final_return"] == -151  # of -150 and -152
    assert penalty["worst_seed"] == -900
    assert penalty["gap_to_optimum"] == pytest.approx(13.4)
    assert stock["final_return"] == -165
    # -140, -150, -152 and -900 beat 4, 3, 3 and 0 of -148, -160, -170 and -180
    assert penalty["improvement"] == 10 / 16
    assert penalty["steps_to_threshold"] == 40
    assert penalty["reached_threshold"] == 3
    assert penalty["steps_per_second"] == 2500
    table = report.table(comparison, found)
    assert "| -151.0 [-900.0, -140.0] | -900.0     | 13.4 " in table
    assert "40 (3/4 seeds)" in table
    assert "not reached (0/4 seeds)" in table


def test_the_pictures_show_the_figures(made_up) -> None:
    comparison, found = made_up
    curves = plots.learning_curves(comparison, found).axes[0].get_lines()
    assert curves[0].get_xydata().tolist() == [[0, -453], [50, -302], [100, -151]]
    above, below = plots.divergence(comparison, found).axes
    assert above.get_lines()[0].get_ydata() == pytest.approx([0.025, 0.025])  # of 0.02 and 0.03
    assert [line.get_ydata()[0] for line in above.get_lines() if line.get_linestyle() == "--"] == [0.005, 0.02]
    assert below.get_lines()[0].get_ydata().tolist() == [3, 3]  # of 2 and 4
    labels = above.get_legend_handles_labels()[1]
    assert labels == ["ppo_penalty (exact)", "ppo (SB3's estimate)"]
    finals = plots.intervals(comparison, found).axes[0]
    assert finals.get_lines()[0].get_xdata()[0] == -151
    assert [label.get_text() for label in finals.get_yticklabels()] == ["ppo_penalty", "ppo"]


def test_seeds_of_different_length_are_averaged_where_all_were_evaluated(made_up) -> None:
    _, found = made_up
    ended_early = (found.curves["seed"] == 3) & (found.curves["steps"] == 100)
    shorter = found._replace(curves=found.curves[~ended_early])
    assert results.curves_of(shorter, "ppo").index.tolist() == [0, 50]
    assert results.curves_of(found, "ppo").index.tolist() == [0, 50, 100]


def with_seeds(found: results.Results, algo: str, count: int) -> results.Results:
    """The same with fewer seeds of one algorithm."""
    return results.Results(*(frame[(frame["algo"] != algo) | (frame["seed"] < count)] for frame in found))


@pytest.mark.parametrize("few", [1, 2])
@pytest.mark.parametrize("algo", ["ppo", "ppo_penalty"])
def test_few_seeds_of_either_leave_no_probability_and_no_interval(algo: str, few: int, made_up) -> None:
    comparison, found = made_up
    found = with_seeds(found, algo, few)
    figures = results.summary(found, comparison.optimum)
    assert figures.loc[algo, [name for name in figures if name.endswith(("_low", "_high"))]].isna().all()
    assert figures["improvement"].isna().all()
    (caveat,) = report.caveats(found)
    assert caveat.startswith(f"Fewer than 3 seeds: {algo} ({few}). Where these are concerned there are neither intervals")
    said = f"IQM over {few} to 4 seeds with its 95 % bootstrap interval where there are 3 seeds"
    assert plots.seeds_caption(found) == said
    panels = plots.intervals(comparison, found).axes
    assert [panel.get_title() for panel in panels] == ["final return", "return over training"]
    assert [len(panel.patches) for panel in panels] == [1, 1]  # the other algorithm's interval
    curves = plots.learning_curves(comparison, found)
    assert [len(panel.collections) for panel in curves.axes] == [1, 1]


def test_three_seeds_have_both(made_up) -> None:
    comparison, found = made_up
    found = with_seeds(with_seeds(found, "ppo", 3), "ppo_penalty", 3)
    assert results.summary(found, comparison.optimum).loc["ppo_penalty"].notna().all()
    assert report.caveats(found) == []
    assert len(plots.intervals(comparison, found).axes) == 3


#: Names and figures of twelve algorithms
CROWD = ["ppo", "ppo_penalty", "ppo_clip", "trpo", "ppo_article", "ppo+a", "ppo_clip+b", "trpo+c", "ppo_penalty+0.1"]
CROWD += ["ppo_penalty+truncated-at-two-with-guard-rollback", "ppo_penalty+per-state_cutoff.1000", f"ppo+{'x' * 60}"]


def crowd(algos: list[str], seeds: int, out: Path) -> tuple[grid.Comparison, results.Results]:
    """A comparison of many algorithms, with figures of some length."""
    settings = {algo: grid.AlgorithmSettings({}, "made up") for algo in algos}
    work = grid.Task("Pendulum-v1", 112_500, eval_freq=22_500, n_eval_episodes=9, device="cpu", gym_packages=())
    comparison = grid.Comparison(grid.plan_runs(settings, work, range(seeds)), work, settings, out, -200.0, None, "made up")
    runs, curves, updates = [], [], []
    for place, algo in enumerate(algos):
        for seed in range(seeds):
            whose = {"algo": algo, "seed": seed}
            final = -150.0 - 10 * place - seed
            runs.append({**whose, "env": work.env, "final_return": final, "return_over_training": 1.33 * final - 106.5})
            runs[-1] |= {"steps_to_threshold": math.inf, "steps_per_second": 1000.0, "source": grid.source_digest()}
            curves += [{**whose, "steps": 22_500 * k, "return": final - 200 * (5 - k)} for k in range(6)]
            figures = {"train/kl": 0.01, "train/clip_fraction": 0.1, "train/effective_sample_size": 0.9 + 0.01 * seed}
            figures |= {"train/kl_coef": 1.1, "train/target_kl_min": 0.005, "train/target_kl_max": 0.02}
            updates += [{**whose, "time/total_timesteps": 22_500 * k, **figures} for k in range(1, 6)]
    return comparison, results.Results(*map(pd.DataFrame, (runs, curves, updates)))


def texts_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """What is written in a picture, and where; ticks outside an axis are not drawn."""
    undrawn = {tick.label2 for axes in figure.axes for axis in axes._axis_map.values() for tick in axis.get_major_ticks()}
    for axes in figure.axes:
        for axis in axes._axis_map.values():
            low, high = sorted(axis.get_view_interval())
            undrawn |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in undrawn]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


@pytest.mark.parametrize(("n_algos", "seeds"), [(2, 1), (5, 10), (12, 2)])
def test_no_text_in_a_picture_covers_another_or_is_cut_off(n_algos: int, seeds: int, tmp_path: Path, monkeypatch) -> None:
    comparison, found = crowd(CROWD[-n_algos:], seeds, tmp_path)
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.update({path.name: figure}))
    plots.draw(comparison, found)
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        texts = texts_of(figure)
        covered = [(a, b) for (a, x), (b, y) in combinations(texts, 2) if Bbox.intersection(x, y) is not None]
        assert covered == [], name
        width, height = figure.bbox.size
        assert [text for text, box in texts if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height] == [], name
        if not name.startswith("importance_weights"):
            written = "".join(text for text, _ in texts).replace("\n", "")
            assert all(algo in written for algo in CROWD[-n_algos:]), name
    names = ("importance_weights", "intervals", "kl", "learning_curves")
    assert set(drawn) == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}


def test_a_long_name_is_broken_between_its_words() -> None:
    assert plots.wrap("ppo_penalty+dual") == "ppo_penalty+dual"
    assert plots.wrap("ppo_penalty+truncated-at-two_with.guard") == "ppo_penalty+truncated-\nat-two_with.guard"
    assert plots.wrap("ppo+" + "x" * 30) == f"ppo+\n{'x' * 22}\n{'x' * 8}"


@pytest.mark.parametrize("optimum", [None, -137.6])
def test_the_close_up_never_shows_more_than_all(optimum: float | None) -> None:
    bad = np.array([-1250.0, -1280, -1300, -1310, -1320, -1330])
    # The last third is -1320 to -1330, the optimum far away
    assert plots.close_up_limits([bad], optimum) == pytest.approx((-1330 - 0.15 * 13.2, -1320 + 0.15 * 13.2))


def test_the_close_up_shows_the_end_of_the_better_half_and_an_optimum_that_is_near() -> None:
    good, fair = np.linspace(-1300, -140, 30), np.linspace(-1300, -300, 30)
    low, high = plots.close_up_limits([good, fair], optimum=-137.6)
    # From the middle of both at two thirds of the steps to the optimum, and some room
    bottom = (good[20] + fair[20]) / 2
    assert (low, high) == pytest.approx((bottom - 0.45 * (-137.6 - bottom), -137.6 + 0.15 * (-137.6 - bottom)))
    flat = np.full(30, 500.0)
    assert plots.close_up_limits([flat], optimum=None) == pytest.approx((499.25, 500.75))


def test_the_article_s_recipe_is_also_reported_in_its_own_terms(made_up) -> None:
    _, found = made_up
    found.runs["algo"] = found.runs["algo"].replace("ppo_penalty", "ppo_article")
    text = report.article_section(found)
    assert "| 3           | 100              | -90.0                         | -80.0             | -900.0" in text
    assert "-76.99" in text


def test_a_single_algorithm_with_a_single_seed_is_reported_too(made_up) -> None:
    comparison, found = made_up
    one = results.Results(*(frame[(frame["algo"] == "ppo") & (frame["seed"] == 0)] for frame in found))
    report.write(comparison, one, {})
    text = (comparison.out / "report.md").read_text()
    assert "| ppo       | -170.0       | -170.0" in text
    assert "Evaluation during training: a single seed, without an interval. Right: the same, close up." in text
    assert sorted(path.name for path in comparison.out.glob("*.png")) == sorted(plots.draw(comparison, one))
