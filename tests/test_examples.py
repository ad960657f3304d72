import argparse
import csv
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rl_zoo3.exp_manager
import torch as th
from gymnasium import make
from PIL import Image
from scipy.stats import norm
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_penalty import ARTICLE_RECIPE, ROBUST, Guard, PPOClip, PPOPenalty, zoo
from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.study.report import NO_VALUE

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run_here(name: str, *arguments: str, folder: Path) -> str:
    """The same without the seconds that a process takes to import torch."""
    with chdir(folder), redirect_stdout(StringIO()) as said:
        script_module(name).main(arguments)
    return said.getvalue()


def script_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(picture: Path) -> np.ndarray:
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def panel_has(panel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return (np.abs(panel - np.array(colour)).max(axis=2) < 8).sum() > 100


def red(image: np.ndarray) -> np.ndarray:
    return image[:, :, 0] - image[:, :, 1] > 80


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same_weights(one: th.nn.Module, other: th.nn.Module) -> bool:
    return all(th.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# The pictures' green and blue, their red at 45 % over white, and the two ends of viridis that are used
GREEN, BLUE, RED, PURPLE, LIGHT_GREEN = (0, 158, 115), (0, 114, 178), (236, 182, 140), (68, 1, 84), (122, 209, 81)


def test_plot_objectives_draws_the_four_panels(tmp_path):
    out = tmp_path / "new" / "objectives.png"
    assert str(out) in run("plot_objectives.py", "--out", str(out), folder=tmp_path)
    image = pixels(out)
    height, width = image.shape[0] // 2, image.shape[1] // 2
    panels = [image[:height, :width], image[:height, width:], image[height:, :width], image[height:, width:]]
    drawn = [[panel_has(panel, colour) for colour in (GREEN, BLUE, RED, PURPLE, LIGHT_GREEN)] for panel in panels]
    assert drawn == [
        [False, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, False, False],
        [False, False, False, True, True],
    ]
    assert out.stat().st_size < 300_000
    assert out.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["objectives", "importance_sampling"])
def test_committed_pictures_are_small_and_not_blank(name):
    picture = EXAMPLES / "results" / f"{name}.png"
    assert picture.stat().st_size < 300_000
    assert panel_has(pixels(picture), BLUE)


def test_curves_of_plot_objectives():
    script = script_module("plot_objectives")
    ratio = th.tensor([0.0, 0.5, 0.8, 1.0, 1.1, 1.2, 2.0])
    curves = {
        "clip": script.clip_curve(ratio),
        "unclipped": script.surrogate_curve(ratio, -1.0),
        "good": script.clipped_surrogate_curve(ratio, 1.0),
        "bad": script.clipped_surrogate_curve(ratio, -1.0),
    }
    expected = {
        "clip": [0.8, 0.8, 0.8, 1.0, 1.1, 1.2, 1.2],
        "unclipped": [0.0, -0.5, -0.8, -1.0, -1.1, -1.2, -2.0],
        "good": [0.0, 0.5, 0.8, 1.0, 1.1, 1.2, 1.2],
        "bad": [-0.8, -0.8, -0.8, -1.0, -1.1, -1.2, -2.0],
    }
    for name, values in expected.items():
        assert curves[name].tolist() == pytest.approx(values, abs=1e-6), name
    # A Gaussian shifted by d standard deviations: J = d, KL = d^2 / 2
    shift = th.tensor([-0.5, 0.0, 1.0, 2.0])
    objective, divergence = script.penalized_curve(shift, 2.0)
    assert divergence.tolist() == pytest.approx([0.125, 0.0, 0.5, 2.0], abs=1e-9)
    assert objective.tolist() == pytest.approx([-0.75, 0.0, 0.0, -2.0], abs=1e-6)


def test_curves_of_plot_objectives_follow_the_package(monkeypatch):
    script = script_module("plot_objectives")
    ratio, shift = th.tensor([0.5, 1.0, 2.0]), th.tensor([1.0])
    clipped, penalized = losses.clipped_surrogate, losses.penalized_surrogate
    monkeypatch.setattr(losses, "clipped_surrogate", lambda r, a, eps: clipped(r, a, 2 * eps))
    monkeypatch.setattr(losses, "penalized_surrogate", lambda j, kl, beta: penalized(j, kl, 0.0))
    monkeypatch.setattr(losses, "surrogate", lambda r, a: (r * a).mean())
    monkeypatch.setattr(script, "kl_diagonal_gaussian", lambda mean, std, new_mean, new_std: th.full((1,), 7.0))
    assert script.clip_curve(ratio).tolist() == pytest.approx([0.6, 1.0, 1.4])
    assert script.penalized_curve(shift, 2.0)[0].item() == pytest.approx(1.0)
    assert script.penalized_curve(shift, 2.0)[1].item() == 7.0


def integral(integrand: Callable[[np.ndarray], np.ndarray]) -> float:
    # The trapezoidal rule is exact to rounding for functions that vanish at both ends
    x = np.linspace(-50, 50, 200_001)
    return np.trapezoid(integrand(x), x)


def test_importance_sampling_table_against_integrals(tmp_path):
    n_samples = 200_000
    arguments = ["--n-samples", str(n_samples), "--out", str(tmp_path / "picture.png")]
    output = run_here("importance_sampling", *arguments, folder=tmp_path)
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["shift", "width"])
    names = lines[start].split()
    table = [dict(zip(names, map(float, line.split()), strict=True)) for line in lines[start + 1 : lines.index("", start)]]
    assert [row["shift"] for row in table if row["width"] == 1] == [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    for row in table:
        q = norm(row["shift"], row["width"])

        def moment(f_power: int, weight_power: int, q=q) -> float:
            log_product = lambda x: weight_power * norm.logpdf(x) + (1 - weight_power) * q.logpdf(x)  # noqa: E731
            return integral(lambda x: x ** (2 * f_power) * np.exp(log_product(x)))

        exact_mean = moment(1, 1)
        assert row["mean"] == pytest.approx(exact_mean, rel=1e-3)
        kl = integral(lambda x, q=q: q.pdf(x) * (q.logpdf(x) - norm.logpdf(x)))
        assert row["KL(q||p)"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
        if row["width"] < math.sqrt(0.5):
            assert (row["var"], row["ess"]) == (math.inf, 0)
            continue
        variance = moment(2, 2) - exact_mean**2
        assert row["var"] == pytest.approx(variance, rel=1e-3)
        assert row["ess"] == pytest.approx(1 / moment(0, 2), rel=1e-3)
        assert abs(row["mean*"] - exact_mean) < 4.5 * math.sqrt(variance / n_samples)
        if row["shift"] <= 0.75 and row["width"] >= 1:
            fourth = moment(4, 4) - 4 * moment(3, 3) + 6 * moment(2, 2) - 3
            assert abs(row["var*"] - variance) < 4.5 * math.sqrt((fourth - variance**2) / n_samples)
            assert row["ess*"] == pytest.approx(row["ess"], rel=0.02)
    equal_widths = [row for row in table if row["width"] == 1]
    assert [row["ess"] for row in equal_widths] == pytest.approx(
        [math.exp(-(row["shift"] ** 2)) for row in equal_widths], rel=1e-3
    )
    assert panel_has(pixels(tmp_path / "picture.png"), BLUE)


def test_article_recipe_logs_saves_and_renders_like_the_article(tmp_path):
    arguments = ["--n-timesteps", "4400", "--save-freq", "1", "--render-every", "2", "--seed", "3"]
    output = run_here("article_recipe", *arguments, folder=tmp_path)
    out = tmp_path / "runs" / "article_recipe"
    rows = rows_of(out / "progress.csv")
    # Each line belongs to one iteration: its own batch and its own ten updates
    for key, values in {
        "time/iterations": [1, 2],
        "time/total_timesteps": [2200, 4400],
        "train/n_updates": [10, 20],
        "rollout/ep_len_mean": [200, 200],
    }.items():
        assert [float(row[key]) for row in rows] == values, key
    assert {"rollout/ep_rew_mean", "train/policy_gradient_loss", "train/value_loss"} <= set(rows[0])
    assert f"last batch: {float(rows[-1]['rollout/ep_rew_mean']):.2f}, 11 episodes, iteration 2\n" in output
    assert "-76.99" in output
    assert "-137.6" in output

    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "ppo_article_2200_steps.zip",
        "ppo_article_4400_steps.zip",
    ]
    first, second = (PPOClip.load(out / "checkpoints" / f"ppo_article_{steps}_steps.zip") for steps in (2200, 4400))
    final = PPOClip.load(out / "model")
    assert same_weights(second.policy, final.policy), "saved after the iteration's updates"
    assert not same_weights(first.policy, final.policy)
    action, _ = first.predict(np.array([1.0, 0.0, 0.0], dtype=np.float32))
    assert first.action_space.contains(action)

    assert [path.name for path in (out / "episodes").iterdir()] == ["iteration_00001.gif"]
    with Image.open(out / "episodes" / "iteration_00001.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (100, 40)
        poses = []
        for frame in (0, 20, 40):
            gif.seek(frame)
            poses.append(np.asarray(gif.convert("RGB")).astype(int))
    assert len({pose.tobytes() for pose in poses}) == 3, "the pendulum moves"
    # The batch's first episode: one step, whatever its torque, turns the rod by less than a degree from the seeded start
    start = make("Pendulum-v1", render_mode="rgb_array")
    start.reset(seed=3)
    start.step(np.zeros(1))
    first_rod, rod = red(start.render()[::2, ::2].astype(int)), red(poses[0])
    start.close()
    assert (first_rod & rod).sum() > 0.85 * (first_rod | rod).sum() > 500


def test_article_recipe_averages_over_the_batch(tmp_path, monkeypatch):
    script = script_module("article_recipe")
    batches: list[float] = []

    class Spy(PPOClip):
        def train(self) -> None:
            batches.append(self.rollout_buffer.rewards.sum() / 11)
            super().train()

    monkeypatch.setattr(script, "PPOClip", Spy)
    script.main(["--n-timesteps", "4400", "--out", str(tmp_path)])
    averages = [float(row["rollout/ep_rew_mean"]) for row in rows_of(tmp_path / "progress.csv")]
    assert averages == pytest.approx(batches, rel=1e-5)
    assert len(averages) == 2
    assert ARTICLE_RECIPE["n_steps"] == 11 * 200


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("features")
    output = run("sb3_features.py", folder=folder)
    parts = re.split(r"^== (\w+)\n", output, flags=re.MULTILINE)[1:]
    printed = dict(zip(parts[::2], parts[1::2], strict=True))
    out = folder / "runs" / "sb3_features"
    for name, part in printed.items():
        files = {str(path.relative_to(folder)): path.stat().st_size for path in (out / name).rglob("*") if path.is_file()}
        assert {name: int(size) for name, size in re.findall(r"wrote (\S+) \((\d+) bytes\)", part)} == files
    return out, printed


@pytest.mark.slow
def test_callbacks_evaluate_save_and_stop(features):
    out, printed = features[0] / "callbacks", features[1]["callbacks"]
    evaluations = np.load(out / "evaluations.npz")
    means = evaluations["results"].mean(axis=1)
    assert evaluations["results"].shape[1] == 10
    assert means[-1] >= 200
    assert (means[:-1] < 200).all()
    stopped = int(evaluations["timesteps"][-1])
    assert f"stopped after {stopped} of 30000 steps, best mean return {means[-1]:g}" in printed
    assert stopped < 30_000
    assert f"{stopped:,}/30,000" in printed, "the progress bar"

    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert checkpoints == sorted(f"ppo_penalty_{steps}_steps.zip" for steps in evaluations["timesteps"])
    last = PPOPenalty.load(out / "checkpoints" / f"ppo_penalty_{stopped}_steps.zip")
    best = PPOPenalty.load(out / "best_model")
    assert same_weights(best.policy, last.policy), "training ended at the best model"
    action, _ = best.predict(make("CartPole-v1").reset(seed=0)[0])
    assert action in (0, 1)


@pytest.mark.slow
def test_normalization_is_saved_with_the_model(features):
    out, printed = features[0] / "normalization", features[1]["normalization"]
    match = re.search(r"mean return (\S+), after loading (\S+); kl_coef (\S+), after loading (\S+)\n", printed)
    assert match
    assert match[1] == match[2]
    assert match[3] == match[4]
    env = VecNormalize.load(str(out / "vecnormalize.pkl"), make_vec_env("Pendulum-v1", n_envs=2))
    # Every observation of the rollouts and the first two; RunningMeanStd starts at 1e-4
    assert env.obs_rms.count == pytest.approx(2048 + 2, abs=1)
    model = PPOPenalty.load(out / "model", env=env)
    assert model.kl_coef == float(match[3])
    # The velocity reaches 8, far from the scale that a network likes: without VecNormalize its variance would be 1
    assert env.obs_rms.var[2] > 4
    assert np.abs(env.reset()).max() <= 10


@pytest.mark.slow
def test_subprocesses_each_ran_their_own_episodes(features):
    out, printed = features[0] / "subprocesses", features[1]["subprocesses"]
    assert "2048 steps from 2 processes\n" in printed
    episodes = []
    for process in (0, 1):
        lines = (out / f"{process}.monitor.csv").read_text().splitlines()
        assert lines[1] == "r,l,t"
        episodes.append([line.split(",")[:2] for line in lines[2:]])
    assert [[length for _, length in part] for part in episodes] == [["200"] * 5] * 2
    assert episodes[0] != episodes[1]
    assert PPOPenalty.load(out / "model").num_timesteps == 2048


@pytest.mark.slow
def test_loggers_agree(features):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, printed = features[0] / "loggers", features[1]["loggers"]
    rows = rows_of(out / "progress.csv")
    assert [row["time/total_timesteps"] for row in rows] == [str(512 * number) for number in range(1, 7)]
    accumulator = EventAccumulator(str(out)).Reload()
    for key in ("train/kl", "train/kl_coef", "train/target_kl_max", "train/effective_sample_size", "train/max_ratio"):
        events = accumulator.Scalars(key)
        assert [event.step for event in events] == [512 * number for number in range(2, 7)]
        assert [event.value for event in events] == pytest.approx([float(row[key]) for row in rows[1:]], rel=1e-6)
    coefficients = re.findall(r"^ *(\d+) +[\d.]+ +(\S+)$", printed, flags=re.MULTILINE)
    assert [(int(steps), float(value)) for steps, value in coefficients] == [
        (int(row["time/total_timesteps"]), float(row["train/kl_coef"])) for row in rows[1:]
    ]
    assert len({value for _, value in coefficients}) > 1, "the coefficient moves"


def test_unknown_feature_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        script_module("sb3_features").main(["callback"])
    named = "no such feature: callback; there are callbacks, normalization, subprocesses, loggers"
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_pendulum_writes_what_it_promises(tmp_path):
    arguments = ["--seed", "1", "--n-timesteps", "10240", "--n-eval-episodes", "100", "--out", "made"]
    printed = run("train_pendulum.py", *arguments, folder=tmp_path)
    out = tmp_path / "made"
    said = re.search(r"Mean return over 100 episodes: (\S+) \+- (\S+) \(optimum -137.6\)", printed)
    assert said is not None
    # The saved model, on the same starts, reaches what was printed
    model = PPOPenalty.load(out / "ppo_penalty_pendulum")
    returns, _ = evaluate_policy(
        model, make_vec_env("Pendulum-v1", n_envs=50, seed=20_000), 100, return_episode_rewards=True, warn=False
    )
    assert float(said[1]) == pytest.approx(np.mean(returns), abs=0.06)
    assert model.num_timesteps == 10240
    with Image.open(out / "pendulum.gif") as film:
        assert film.n_frames == 75
        first = np.asarray(film.convert("RGB")).astype(int)
        film.seek(20)
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - first).max() > 100  # it moves
        assert red(first).sum() > 300  # and the rod is there
    assert panel_has(pixels(out / "learning_curve.png"), BLUE)
    assert (out / "pendulum.gif").stat().st_size < 1_000_000
    assert np.load(out / "evaluations.npz")["results"].shape == (2, 20)  # at 5,000 and 10,000 steps


# benchmark_speed.py


class Clocked:
    """An algorithm that needs a known time: 2 s to collect, 6 s to learn, and more the first time if it compiles."""

    now = 0.0

    def __init__(self, policy, env, seed, device, slowness=1.0, compilation=0.0) -> None:
        self.env, self.n_envs, self.n_steps = env, env.num_envs, 10
        self.slowness, self.compilation = slowness, compilation

    def learn(self, total_timesteps: int, reset_num_timesteps: bool) -> None:
        assert total_timesteps == self.n_steps * self.n_envs
        Clocked.now += 2 * self.slowness
        self.train()

    def train(self) -> None:
        Clocked.now += 6 * self.slowness + self.compilation
        self.compilation = 0.0


def test_speed_is_reported_as_ratios_without_the_compilation(monkeypatch, tmp_path: Path) -> None:
    script = script_module("benchmark_speed")
    known = {"stock PPO": (Clocked, {}), "other, compiled": (Clocked, {"slowness": 0.5, "compilation": 11.0})}
    monkeypatch.setattr(script, "contenders", lambda: known)
    monkeypatch.setattr(script.time, "perf_counter", lambda: Clocked.now)
    rows = script.run_case("main", "a case", "Pendulum-v1", 3)
    assert [row["contender"] for row in rows] == list(known)
    figures = [list(row.values())[3:] for row in rows]
    assert figures == [[5, 1.0, 1.0, 1.0, 0.0], [10, 2.0, 2.0, 2.0, 11.0]]
    monkeypatch.setitem(script.PARTS, "main", lambda repetitions: rows)
    script.main(["--out", str(tmp_path)])
    assert "| a case | other, compiled | 10 | 2.00 | 2.00 | 2.00 | 11 s |\n" in (tmp_path / "main.md").read_text()
    assert [row["ratio"] for row in rows_of(tmp_path / "main.csv")] == ["1.0", "2.0"]


def test_speed_is_that_of_the_real_algorithms() -> None:
    script = script_module("benchmark_speed")
    options = {"n_steps": 32, "batch_size": 16, "n_envs": 2}
    rows = script.run_case("main", "a case", lambda: script.CheapEnv(3), 2, ["stock PPO", "PPOPenalty"], **options)
    assert [(row["contender"], row["ratio"]) for row in rows if row["contender"] == "stock PPO"] == [("stock PPO", 1.0)]
    assert all(0 < row["steps_per_second"] < 1e6 and row["ratio"] > 0 for row in rows)


def test_speed_with_a_memory_is_compared_with_that_of_recurrent_ppo() -> None:
    script = script_module("benchmark_speed")
    options = {
        "n_steps": 16,
        "batch_size": 16,
        "n_envs": 2,
        "policy": "MlpLstmPolicy",
        "policy_kwargs": {"lstm_hidden_size": 8},
    }
    rows = script.run_case("recurrent", "a case", "CartPole-v1", 1, among=script.recurrent_contenders(), **options)
    assert (rows[0]["contender"], rows[0]["update_ratio"], len(rows)) == ("RecurrentPPO", 1.0, 5)
    assert all(0 < row["steps_per_second"] < 1e6 and row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process() -> None:
    script = script_module("benchmark_speed")
    # A process with torch in it, in MB
    assert 100 < script.peak_memory("stock PPO", images=False) < 20_000


@pytest.mark.slow
def test_trust_region_study_tells_variants_apart(tmp_path: Path) -> None:
    words = ["--envs", "CartPole-v1", "--variants", "fixed", "robust", "--share", "0.05", "--seeds", "1", "--n-jobs", "1"]
    run("trust_region_study.py", *words, folder=tmp_path)
    folder = tmp_path / "runs" / "trust_region"
    rows = {row["algo"]: row for row in rows_of(folder / "summary.csv")}
    assert list(rows) == ["ppo", "ppo_penalty+fixed", "ppo_penalty+robust"]
    assert [row["steps"] for row in rows.values()] == ["1500"] * 3
    assert rows["ppo_penalty+fixed"]["kl_coef"] == "1"
    for algo in ("ppo_penalty+fixed", "ppo_penalty+robust"):
        (own,) = (folder / "CartPole-v1" / "runs").glob(f"{algo}-seed0-*")
        updates = [row for row in rows_of(own / "progress.csv") if row["train/kl"] and int(row["time/total_timesteps"]) > 1200]
        for name in ("kl", "max_ratio"):
            mean = np.mean([float(row[f"train/{name}"]) for row in updates])
            assert float(rows[algo][name]) == pytest.approx(mean, rel=1e-4)
    robust = PPOPenalty.load(own / "CartPole-v1.zip")
    assert (robust.guard, robust.max_ratio) == (Guard("rollback"), ROBUST["max_ratio"])
    text = (folder / "summary.md").read_text()
    assert "## CartPole-v1\n\n1,500 steps, seeds 0 to 0 (too few for intervals), 50 evaluation episodes." in text
    for title, column in (("Final return, without noise", "final_return"), ("Return with noise", "last_batch_return")):
        table = text.split(f"## {title}")[1].split("\n##")[0]
        cells = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")]
        figures = {name.strip(): figure.strip() for name, figure in cells}
        assert float(figures["robust"]) == pytest.approx(float(rows["ppo_penalty+robust"][column]), abs=0.051)
        assert set(figures) >= {"ppo", "fixed", "robust"}


def test_scaling_model_recovers_what_made_the_figures() -> None:
    script = script_module("benchmark_scaling")
    known = script.TimeModel(200e-6, 20e-6, 0.1, 1e-3, 300e-6, 50e-6, 2e-9)
    sizes = {"minibatches": 320.0, "gradient_bytes": 40_000.0}
    one, two = [], []
    for n_envs in (1, 4, 16, 64):
        row = {"n_envs": n_envs, "n_steps": 2048 / n_envs, **sizes}
        collect = row["n_steps"] * (200e-6 + 20e-6 * n_envs)
        one.append({**row, "collect_s": collect, "collect_std_s": 0.1 * collect, "update_s": 320 * 1e-3})
        # Two messages of 20,000 bytes: 2 * (50e-6 + 40e-6) on top
        two.append({**row, "update_s": 320 * (1e-3 + 300e-6 + 180e-6)})
    sums = [{"bytes": size, "seconds": 2 * 50e-6 + size * 2e-9} for size in (1e3, 1e5, 1e7)]
    assert vars(script.fit_model(one, two, sums)) == pytest.approx(vars(known), rel=1e-6)
    # By hand: 14 messages of 5,000 bytes in a ring of 8; 6 latencies up and down a tree, and every byte twice
    assert known.all_reduce_s(8, 40_000, "ring") == pytest.approx(14 * (50e-6 + 5_000 * 2e-9))
    assert known.all_reduce_s(8, 40_000, "tree") == pytest.approx(6 * 50e-6 + 2 * 40_000 * 2e-9)
    assert known.all_reduce_s(1, 40_000, "ring") == 0
    alone, eight = 32 * 1480e-6 + 0.32, 32 * 1480e-6 * (1 + 0.1 * math.sqrt(2 * math.log(8))) + 320 * (1.3e-3 + 840e-6)
    assert known.efficiency(one[-1], 8, "ring") == pytest.approx(alone / eight)
    assert known.efficiency(one[-1], 1, "tree") == 1


def test_scaling_fits_no_negative_times() -> None:
    line = script_module("benchmark_scaling").fit_line
    assert line([1, 2, 4], [3, 5, 9]) == pytest.approx((1, 2))
    assert line([1, 2, 4], [1, 3, 7]) == (0, pytest.approx(1.2638, abs=1e-4))
    assert line([1, 2, 4], [7, 3, 1]) == (pytest.approx(1.3046, abs=1e-4), 0)


@pytest.mark.slow
def test_scaling_is_measured_and_planned(tmp_path: Path) -> None:
    options = "--n-envs 1 2 --rollout 64 --repetitions 1 --all-reduce-repetitions 2 --out out"
    text = run("benchmark_scaling.py", *options.split(), folder=tmp_path)
    assert (tmp_path / "out" / "scaling.md").read_text() in text
    rows = rows_of(tmp_path / "out" / "trainings.csv")
    assert [(float(row["ranks"]), float(row["n_envs"]), float(row["n_steps"])) for row in rows] == [
        *((1, 1, 64), (1, 2, 32), (2, 1, 64), (2, 2, 32))
    ]
    for row in rows:
        seconds = float(row["collect_s"]) + float(row["update_s"])
        assert float(row["steps_per_second"]) == pytest.approx(float(row["ranks"]) * 64 / seconds, rel=1e-3)
    assert [float(row["bytes"]) for row in rows_of(tmp_path / "out" / "all_reduce.csv")][:2] == [1024, 4096]
    planned = [row for row in text.splitlines() if row.startswith("| 25 Gbit/s")]
    assert len(planned) == 2
    assert all(0 < float(cell) <= 1 for row in planned for cell in row.split("|")[3:-1])
    assert "which is a plan and not a measurement" in text


@pytest.mark.slow
def test_field_protocol_trains_and_reports(tmp_path):
    words = ("--steps", "4096", "--seeds", "11", "--out", str(tmp_path), "--n-jobs", "1")
    run("field_protocol.py", "run", "Pendulum-v1", "--methods", "clip", "sampled", *words, folder=tmp_path)
    files = sorted((tmp_path / "runs" / "Pendulum-v1").iterdir())
    assert [path.name for path in files] == ["clip-11.json", "sampled-11.json"]
    clip, sampled = (json.loads(path.read_text()) for path in files)
    # 20 whole episodes of 200 steps, 2 of them in the last tenth of training
    assert len([each for each in clip["curve"] if each is not None]) == 20
    assert clip["last_tenth"] == pytest.approx(np.mean([each for each in clip["curve"][90:] if each is not None]), rel=1e-4)
    assert (clip["settings"]["clip_range"], "kl_coef" in clip["updates"]) == (0.2, False)
    assert sampled["settings"]["kl_penalty"] == {"sampled": True, "advantage_weighted": True}
    assert len(sampled["without_noise"]) == 20
    # Started again, nothing is left to do
    before = [path.stat().st_mtime_ns for path in files]
    assert run("field_protocol.py", "run", "Pendulum-v1", "--methods", "clip", "sampled", *words, folder=tmp_path) == ""
    assert [path.stat().st_mtime_ns for path in files] == before
    # Seeds that settings were chosen on stand apart
    (tmp_path / "runs" / "Pendulum-v1" / "clip-1.json").write_text(json.dumps({**clip, "seed": 1, "last_tenth": -7.0}))
    run("field_protocol_report.py", "--out", str(tmp_path), folder=tmp_path)
    reported, chosen_on = (tmp_path / "summary.md").read_text().split("## Pendulum-v1, seeds for choosing")
    assert f"| `clip` | 1 |  | {clip['last_tenth']:,.0f} |" in reported
    assert "| `clip` | the clip, 0.2 (stock PPO) | -7 |" in chosen_on
    assert len(rows_of(tmp_path / "summary.csv")) == 3
    assert {f"{name}.{ending}" for name in ("returns", "updates", "ablation") for ending in ("png", "pdf")} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.fixture
def report():
    return script_module("field_protocol_report")


def made_up(env: str, method: str, seed: int, returned: float) -> dict[str, object]:
    updates = {"kl": [0.01] * 100, "std": [0.5] * 100, "max_ratio": [1.5] * 100}
    run = {"env": env, "method": method, "seed": seed, "steps": 1000, "last_tenth": returned, "without_noise": [returned]}
    return {**run, "curve": [returned] * 100, "updates": updates}


def test_field_protocol_is_aggregated_over_the_tasks_that_both_have(report):
    clip = {"Ant-v4": [1000, 2000, 3000], "Humanoid-v4": [500, 600, 700], "Hopper-v4": [1, 1, 1]}
    own = {"Ant-v4": [2193, 4386, 2500], "Humanoid-v4": [660, 400, 660]}
    runs = [made_up(env, "clip", 11 + k, each) for env, values in clip.items() for k, each in enumerate(values)]
    runs += [made_up(env, "sampled", 11 + k, each) for env, values in own.items() for k, each in enumerate(values)]
    (line,) = report.aggregate_table(report.rows_of(runs))[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["`sampled`", "Ant-v4, Humanoid-v4"]
    # Without the lowest and the highest of 1, 2, 1.14, 1, 0.606, 1; and of 0.456, 0.912, 1.368, 0.758, 0.909, 1.06
    assert [cell.split()[0] for cell in cells[2:4]] == ["1.03", "0.91"]
    # 8 of 9 pairs on Ant (2193 and 2500 do not beat 3000, 4386 does: 7 of 9), on Humanoid 2/3 twice and none
    assert cells[4].split()[0] == f"{(7 / 9 + 4 / 9) / 2:.2f}"


def test_field_protocol_front_page_has_the_figures_of_the_committed_runs(report):
    rows = report.rows_of([run for run in report.read(report.OUT) if run["seed"] in report.REPORTED])
    lines = report.front_table(rows)
    assert {line.split(" | ")[0] for line in lines[2:]} >= {"| Ant-v4", "| HalfCheetah-v4"}
    assert "\n".join(lines) in (EXAMPLES.parent / "README.md").read_text()
    made = [made_up("Ant-v4", method, seed, 10.0 * seed) for method in report.FRONT for seed in (11, 12, 13)]
    made += [made_up("Hopper-v4", "clip", seed, 1.0) for seed in (11, 12, 13)]
    made += [made_up("Walker2d-v4", method, seed, 1.0) for method in ("clip", "sampled-floor") for seed in (11, 12, 13)]
    assert report.front_table(report.rows_of(made))[2:] == [
        "| Ant-v4 | 120 ± 10 (2,193 ± 361) | 120 ± 10 | 120 ± 10 (159 ± 86) |",
        f"| Walker2d-v4 | 1 ± 0 (3,717 ± 425) | 1 ± 0 | {NO_VALUE} (3,639 ± 374) |",
    ]


def test_field_protocol_normalises_cartpoles_advantages_over_the_rollout():
    protocol = script_module("field_protocol")
    seen = {}
    for method in ("clip", "clip-minibatch"):
        run = protocol.perform("CartPole-v1", method, 11, 1024)
        assert (run["steps"], run["settings"]["n_steps"], run["settings"]["clip_range_vf"]) == (1024, 128, 0.2)
        seen[method] = run["settings"]["normalize_advantage"], run["settings"]["rollout_buffer_class"]
    assert seen == {"clip": (False, protocol.NormalisedOverRollout), "clip-minibatch": (True, None)}
    model = PPOClip("MlpPolicy", "CartPole-v1", n_steps=64, **protocol.OVER_ROLLOUT).learn(64)
    advantages = model.rollout_buffer.advantages
    assert (advantages.mean(), advantages.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-5))


@pytest.mark.slow
def test_field_protocol_plays_atari_with_the_clip_as_published_and_the_penalty_without(monkeypatch):
    protocol = script_module("field_protocol")
    monkeypatch.setattr(protocol, "EVAL_EPISODES", 1)
    for method in ("clip", "sampled-floor"):
        run = protocol.perform("BreakoutNoFrameskip-v4", method, 11, 4096)
        clip_range = run["settings"]["clip_range"]
        assert (clip_range and clip_range(0.5)) == (0.05 if method == "clip" else None)
        assert (run["settings"]["batch_size"], len(run["without_noise"])) == (256, 1)
        assert len([kl for kl in run["updates"]["kl"] if kl is not None]) == 4
        # Whole games of five lives, with points as the game counts them
        assert 0 < run["last_tenth"] < 20


def test_field_protocol_draws_nothing_before_the_first_episode_of_any_seed(report):
    runs = [{"curve": [None, 1.0, None]}, {"curve": [None, 3.0, 5.0]}]
    mean, band = report.curve_of(runs, lambda run: run["curve"])
    assert np.array_equal(mean, [np.nan, 2.0, 3.0], equal_nan=True)
    assert np.array_equal(band, [[np.nan, 1.0, 1.0], [np.nan, 3.0, 5.0]], equal_nan=True)


def test_field_protocol_gives_no_interval_below_three_seeds(report):
    runs = [made_up("Ant-v4", method, seed, 5.0 * seed) for method in ("clip", "sampled") for seed in (11, 12)]
    rows = report.rows_of(runs)
    assert len(report.aggregate_table(rows)) == 2
    assert report.task_table(rows)[3].count(NO_VALUE) == 3
    assert "±" not in report.task_table(rows)[3]


def test_field_protocol_shows_every_run_on_the_seeds_for_choosing_the_best_method_first(report):
    runs = [made_up("Ant-v4", "clip", seed, 100.0 * seed) for seed in (1, 2)]
    runs += [made_up("Ant-v4", "sampled", 2, 2000.0), made_up("Ant-v4", "weighted", 1, -3.0)]
    assert report.ablation_table(report.rows_of(runs)) == [
        "| method | what it is | seed 1 | seed 2 | without noise | KL | coefficient | std | largest ratio |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| `sampled` | {report.MEANINGS['sampled']} | {NO_VALUE} | 2,000 | 2,000 | 0.01 | {NO_VALUE} | 0.5 | 1.5 |",
        f"| `clip` | {report.MEANINGS['clip']} | 100 | 200 | 150 | 0.01 | {NO_VALUE} | 0.5 | 1.5 |",
        f"| `weighted` | {report.MEANINGS['weighted']} | -3 | {NO_VALUE} | -3 | 0.01 | {NO_VALUE} | 0.5 | 1.5 |",
    ]


def test_recurrent_study_trains_and_reports(tmp_path: Path) -> None:
    words = ("--envs", "PassiveTMaze-v0", "--share", "0.05", "--out", str(tmp_path))
    for seed in ("11", "12"):
        done = run("recurrent_study.py", "run", "--seeds", seed, *words, folder=tmp_path)
        assert done == "".join(f"PassiveTMaze-v0 {method} {seed}: done\n" for method in ("clip", "penalty"))
    assert run("recurrent_study.py", "run", "--seeds", "11", "12", *words, folder=tmp_path) == ""
    clip, penalty = (
        json.loads((tmp_path / f"runs/PassiveTMaze-v0/{name}-11.json").read_text()) for name in ("clip", "penalty")
    )
    # Whole rollouts of 16 times four episodes of 21 steps
    assert clip["steps"] == 5 * 16 * 84
    assert (clip["settings"]["n_steps"], "clip_range" in penalty["settings"], len(penalty["without_noise"])) == (
        84,
        False,
        100,
    )
    assert all(len([kl for kl in each["updates"]["kl"] if kl is not None]) == 5 for each in (clip, penalty))
    run("recurrent_study.py", "report", "--out", str(tmp_path), folder=tmp_path)
    table = (tmp_path / "summary.md").read_text()
    assert "seeds 11, 12; in place of the clip: `kl_controller='proportional'`" in table
    assert len(re.findall(r"^\| (?:clip|penalty) +\| 2 +\|", table, re.MULTILINE)) == 2
    assert panel_has(pixels(tmp_path / "curves.png"), BLUE)


@pytest.fixture(scope="module")
def study():
    """It imports other examples, and registers an environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return script_module("recurrent_study")


SCHEDULES = {"learning_rate", "clip_range", "target_kl"}


def at_three_times(settings: dict) -> dict:
    """Settings with RecurrentPPO's batch size for a default, and what may be a schedule as its values."""
    return {
        name: [round(FloatSchedule(value)(progress), 9) for progress in (1.0, 0.5, 0.0)] if name in SCHEDULES else value
        for name, value in {"batch_size": 128, **settings}.items()
    }


@pytest.mark.parametrize("env", ["PendulumNoVel-v1", "CartPoleNoVel-v1"])
@pytest.mark.parametrize(("algo", "method"), [("ppo_lstm", "clip"), ("ppo_penalty_lstm", "penalty")])
def test_recurrent_study_has_the_entries_of_rl_zoo_and_of_the_package(algo, method, env, study, tmp_path: Path) -> None:
    zoo.register()
    manager = rl_zoo3.exp_manager.ExperimentManager(argparse.Namespace(), algo, env, log_folder=str(tmp_path), verbose=0)
    entry, _ = manager.read_hyperparameters()
    assert (entry["n_envs"], entry["normalize"]) == (study.TASKS[env].n_envs, study.TASKS[env].normalize)
    entry, *_ = manager._preprocess_hyperparams(entry)
    assert entry.pop("policy") == "MlpLstmPolicy"
    assert at_three_times(entry) == at_three_times(study.settings_of(env, method))


def test_passive_t_maze_pays_for_the_sign_alone(study) -> None:
    env = study.PassiveTMaze(length=3)
    check_env(env)
    for seed in range(4):
        (sign, at_end), _ = env.reset(seed=seed)
        assert (abs(sign), at_end) == (1, 0)
        steps = [env.step(0) for _ in range(3)]
        assert [seen.tolist() for seen, *_ in steps] == [[0, 0], [0, 0], [0, 1]]
        assert sum(step[1] for step in steps) == 0
        _, reward, over, *_ = env.step(2 if sign > 0 else 3)
        assert (reward, over) == (1, True)
        # Back, forth, and too late for the turn
        env.reset(seed=seed)
        assert [env.step(action)[1:3] for action in (1, 0, 0, 2)] == [(-1 / 3, False)] * 3 + [(0, True)]
        # The other way
        env.reset(seed=seed)
        assert [env.step(action)[1] for action in (0, 0, 0, 3 if sign > 0 else 2)] == [0, 0, 0, 0]
