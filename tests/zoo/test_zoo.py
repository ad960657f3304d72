"""RL Zoo's own commands with this package's algorithms; in processes, which take seconds to import it, where that matters."""

import inspect
import json
import os
import re
import runpy
import shlex
import site
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import rl_zoo3.exp_manager
import rl_zoo3.train
import torch as th
import yaml
from local_hub import local_hub
from matplotlib import pyplot as plt
from optuna.trial import FixedTrial, TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import sb3_ppo_penalty
from sb3_ppo_penalty import (
    ARTICLE_RECIPE,
    PENDULUM,
    PPOClip,
    PPOPenalty,
    RecurrentPPOPenalty,
    RewardToGoRolloutBuffer,
    zoo,
)
from sb3_ppo_penalty.__main__ import main
from sb3_ppo_penalty.zoo.commands import FUNCTIONS, PLOTS, SCRIPTS, child_command

zoo.register()
from sb3_ppo_penalty.zoo.registration import Manager  # noqa: E402

CLASSES = {"ppo_penalty": PPOPenalty, "ppo_clip": PPOClip}
ENVIRONMENTS = {
    "Pendulum-v1",
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCarContinuous-v0",
    "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "InvertedPendulum-v5",
    *(f"{task}-{version}" for task in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Walker2d") for version in ("v4", "v5")),
}
#: 64 steps of four environments to an update, where Pendulum's entry has 512
TINY = "-params n_steps:64 n_epochs:2"
#: One update of a single environment, where CartPole's entry has eight
TINIER = "-n 64 --eval-freq -1 -params n_envs:1 n_steps:64 batch_size:64"
ROOT = Path(sb3_ppo_penalty.__file__).parent.parent


def start(command: str, cwd: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    words = [sys.executable, *shlex.split(command)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def ours(command: str, cwd: Path) -> str:
    run = start(f"-m sb3_ppo_penalty {command}", cwd)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def in_this_process(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same without the seconds that a process takes to import RL Zoo."""
    monkeypatch.chdir(folder)
    afresh(command.split()[0], monkeypatch)
    with redirect_stdout(StringIO()) as said:
        assert main(shlex.split(command)) == 0
    return said.getvalue()


def afresh(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: RL Zoo's `enjoy` imports another script, which runpy warns of when it is to run that."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, f"rl_zoo3.{command}", raising=False)


def pendulum_return(model: PPOPenalty) -> float:
    """Of the episode that starts from seed 0, stepped by hand."""
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    total, truncated = 0.0, False
    while not truncated:
        observation, reward, _, truncated, _ = env.step(model.predict(observation, deterministic=True)[0])
        total += float(reward)
    return total


def manager(algo: str, env: str, folder: Path, **kwargs: object) -> Manager:
    settings = {
        "n_timesteps": 1,
        "eval_freq": -1,
        "verbose": 0,
        "seed": 0,
        "device": "cpu",
        "config": None,
        "log_interval": -1,
    }
    return Manager(Namespace(), algo, env, str(folder), **{**settings, **kwargs})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `train` has run on Pendulum-v1 for two updates, with a schedule of RL Zoo's."""
    folder = tmp_path_factory.mktemp("trained")
    saving = "--eval-freq 256 --save-freq 256 --tensorboard-log tb"
    command = f"train --algo ppo_penalty --env Pendulum-v1 -n 512 --seed 1 {saving} {TINY}"
    # The adaptive rule, which stays where the divergence is below no threshold
    with pytest.MonkeyPatch.context() as patch:
        said = in_this_process(f"{command} \"learning_rate:'lin_0.001'\" \"kl_controller:'adaptive'\"", folder, patch)
    assert f"Loading hyperparameters from: {zoo.HYPERPARAMS / 'ppo_penalty.yml'}" in said
    return folder


@pytest.fixture
def agent(trained: Path) -> Path:
    return trained / "logs/ppo_penalty/Pendulum-v1_1/Pendulum-v1.zip"


# ---- train, enjoy, continue


def test_train_leaves_what_zoo_leaves(trained: Path) -> None:
    folder = trained / "logs/ppo_penalty/Pendulum-v1_1"
    expected = {"Pendulum-v1.zip", "best_model.zip", "evaluations.npz", "rl_model_256_steps.zip", "rl_model_512_steps.zip"}
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".csv")} == expected | {"Pendulum-v1"}
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [256, 512]
    events = EventAccumulator(str(trained / "tb/Pendulum-v1/PPOPenalty_1")).Reload()
    assert [event.step for event in events.Scalars("train/kl_coef")] == [512]


def test_what_zoo_trained_loads_without_zoo(agent: Path) -> None:
    model = PPOPenalty.load(agent)
    given = model.num_timesteps, model.n_envs, model.n_steps, model.n_epochs, model.gamma, model.gae_lambda, model.seed
    assert given == (512, 4, 64, 2, 0.98, 0.9, 1)
    assert model.policy.covariance.tolist() == [2.0]
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5)] == [0.001, 0.0005]


def test_enjoy_plays_the_checkpoint_asked_for(trained: Path, agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "enjoy --algo ppo_penalty --env Pendulum-v1 -f logs -n 200 --no-render --load-checkpoint 256"
    said = in_this_process(command, trained, monkeypatch)
    played = float(re.search(r"Mean reward: (\S+)", said)[1])
    expected = pendulum_return(PPOPenalty.load(agent.parent / "rl_model_256_steps.zip"))
    assert played == pytest.approx(expected, abs=0.01)
    assert abs(expected - pendulum_return(PPOPenalty.load(agent))) > 0.02


@pytest.mark.slow
def test_benchmark_evaluates_the_trained_agent(trained: Path, agent: Path) -> None:
    ours("benchmark --log-dir logs --no-hub -n 200 --num-threads 1", trained)
    row = (trained / "benchmark.md").read_text().strip().splitlines()[-1].strip("|").split("|")
    assert [cell.strip() for cell in row[:2]] == ["ppo_penalty", "Pendulum-v1"]
    assert float(row[2]) == pytest.approx(pendulum_return(PPOPenalty.load(agent)), abs=0.01)


def test_record_video_films_the_trained_agent(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "record_video --algo ppo_penalty --env Pendulum-v1 -f logs -n 4 -o films --exp-id 1"
    in_this_process(command, trained, monkeypatch)
    (film,) = (trained / "films").glob("final-model-ppo_penalty-Pendulum-v1*.mp4")
    assert film.stat().st_size > 1000


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `train` has run twice on CartPole-v1, for eight updates; RL Zoo's plots want two runs."""
    folder = tmp_path_factory.mktemp("two_runs")
    for seed in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            evaluated = f"-n 512 --seed {seed} --eval-freq 256 -params n_envs:1 n_steps:64 n_epochs:1 batch_size:64"
            in_this_process(f"train --algo ppo_penalty --env CartPole-v1 {evaluated}", folder, patch)
    return folder


def test_training_is_plotted(two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plt, "show", lambda: None)
    in_this_process("plot_train -a ppo_penalty -e CartPole -f logs -w 2", two_runs, monkeypatch)
    returns = load_results(str(two_runs / "logs/ppo_penalty/CartPole-v1_1")).r
    drawn = {line.get_label(): line.get_ydata() for line in plt.gca().lines}
    plt.close()
    assert sorted(drawn) == ["CartPole-v1_1", "CartPole-v1_2"]
    assert drawn["CartPole-v1_1"].tolist() == pytest.approx(returns.rolling(2).mean().dropna().tolist())


@pytest.mark.slow
def test_evaluations_are_tabulated_and_plotted(two_runs: Path) -> None:
    files = sorted(two_runs.glob("logs/ppo_penalty/CartPole-v1_*/evaluations.npz"))
    last = [np.load(path)["results"][-1].mean() for path in files]
    said = ours("all_plots -a ppo_penalty -e CartPole-v1 -f logs -print -o evaluations --no-display", two_runs)
    assert "CartPole-v1-PPO_PENALTY-logs: 2" in said
    assert f"|CartPole-v1 |{np.mean(last):.0f} +/- {np.std(last) / np.sqrt(2):.0f}" in said
    # With rliable's intervals
    said = ours("plot_from_file -i evaluations -r -o bars.png --format png", two_runs)
    assert "Computing bootstrap CI" in said
    assert (two_runs / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_pandas_3_beside_rliable_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_ppo_penalty.zoo.commands.version", {"pandas": "3.1.1"}.get)
    with pytest.raises(SystemExit, match=r"^RL Zoo's plots cannot run with pandas 3, .*: pip install \"pandas<3\"$"):
        main(["all_plots"])


@pytest.mark.slow
def test_agent_goes_to_the_hub_and_comes_back(trained: Path, agent: Path, tmp_path: Path) -> None:
    agents = "--algo ppo_penalty --env Pendulum-v1 -orga me"
    with local_hub() as (address, files):
        home = {"HF_ENDPOINT": address, "HF_HOME": tmp_path / "home", "HF_TOKEN": "hf_of_nobody"}
        run = start(f"-m sb3_ppo_penalty push_to_hub {agents} -f {trained / 'logs'} --no-render", tmp_path, **home)
        assert run.returncode == 0, run.stderr
        command = f"-m sb3_ppo_penalty load_from_hub {agents} -f back"
        run = start(command, tmp_path, **home, TRUST_REMOTE_CODE="True")
        assert run.returncode == 0, run.stderr
    assert {"ppo_penalty-Pendulum-v1.zip", "config.yml", "args.yml", "vec_normalize.pkl", "README.md"} <= set(files)
    # The card has its figures, and names no command that does not know the algorithm
    card = files["README.md"].decode()
    result = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]
    evaluated = json.loads(files["results.json"])
    assert result["metrics"][0]["value"] == f"{evaluated['mean_reward']:.2f} +/- {evaluated['std_reward']:.2f}"
    assert "python -m sb3_ppo_penalty load_from_hub --algo ppo_penalty --env Pendulum-v1 -orga me -f logs/" in card
    assert "python -m rl_zoo3" not in card
    back = tmp_path / "back/ppo_penalty/Pendulum-v1_1"
    assert same_weights(PPOPenalty.load(back / "Pendulum-v1.zip"), PPOPenalty.load(agent))
    assert (back / "Pendulum-v1/vecnormalize.pkl").exists()


def test_nothing_is_downloaded_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    with pytest.raises(ValueError, match="set the environment variable `TRUST_REMOTE_CODE` to `True`"):
        in_this_process("load_from_hub --algo ppo_penalty --env Pendulum-v1 -orga me -f back", tmp_path, monkeypatch)
    assert not (tmp_path / "back").exists()


def continue_from(model: PPOPenalty, folder: Path, params: str = "") -> str:
    """The command that continues an agent by one update in which neither the weights nor the coefficient can move."""
    model.save(folder / "agent")
    settings = yaml.safe_load((zoo.HYPERPARAMS / "ppo_penalty.yml").read_text())
    settings["Pendulum-v1"]["kl_coef"] = 0.25
    del settings["Pendulum-v1"]["kl_controller"]
    (folder / "conf.yml").write_text(yaml.dump(settings))
    files = "-f logs -i agent.zip --conf-file conf.yml"
    still = f"{TINY} learning_rate:0.0 kl_min:0.0 {params}"
    return f"train --algo ppo_penalty --env Pendulum-v1 -n 256 --eval-freq -1 {files} {still}"


def same_weights(one: PPOPenalty, other: PPOPenalty) -> bool:
    pairs = zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    return all(th.equal(mine, theirs) for mine, theirs in pairs)


def test_continuing_keeps_the_weights_and_the_coefficient_reached(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = PPOPenalty.load(agent, custom_objects={"kl_coef": 8.0})
    in_this_process(continue_from(before, tmp_path), tmp_path, monkeypatch)
    after = PPOPenalty.load(tmp_path / "logs/ppo_penalty/Pendulum-v1_1/Pendulum-v1.zip")
    assert (after.kl_coef, after.num_timesteps, after._n_updates) == (8.0, 256, before._n_updates + 2)
    assert same_weights(before, after)


def test_continuing_takes_the_coefficient_that_the_user_names(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(continue_from(PPOPenalty.load(agent), tmp_path, "kl_coef:5.0"), tmp_path, monkeypatch)
    assert PPOPenalty.load(tmp_path / "logs/ppo_penalty/Pendulum-v1_1/Pendulum-v1.zip").kl_coef == 5.0


def test_continuing_keeps_what_the_controller_remembers(agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOPenalty.load(agent, kl_controller="dual")
    model.kl_controller.steps = 6
    command = continue_from(model, tmp_path)
    settings = yaml.safe_load((tmp_path / "conf.yml").read_text())
    settings["Pendulum-v1"] |= {"kl_controller": {"name": "dual"}, "kl_penalty": {"direction": "symmetric"}}
    (tmp_path / "conf.yml").write_text(yaml.dump(settings))
    in_this_process(command, tmp_path, monkeypatch)
    after = PPOPenalty.load(tmp_path / "logs/ppo_penalty/Pendulum-v1_1/Pendulum-v1.zip")
    assert (after.kl_controller.steps, after.kl_penalty.direction) == (7, "symmetric")


# ---- RL Zoo's own commands, and a script of the user's


@pytest.mark.slow
def test_zoos_own_command_with_a_module_of_custom_environments(tmp_path: Path) -> None:
    (tmp_path / "custom_envs.py").write_text("from sb3_ppo_penalty.zoo import register\n\nregister()\n")
    run = start(f"-m rl_zoo3.train --algo ppo_penalty --env CartPole-v1 {TINIER}", tmp_path)
    assert str(zoo.HYPERPARAMS / "ppo_penalty.yml") in run.stdout, run.stderr
    assert PPOPenalty.load(tmp_path / "logs/ppo_penalty/CartPole-v1_1/CartPole-v1.zip").gae_lambda == 0.8


def test_script_gets_the_algorithms_with_one_call(tmp_path: Path) -> None:
    script = "from rl_zoo3.train import train\nfrom sb3_ppo_penalty.zoo import register\nregister()\ntrain()\n"
    (tmp_path / "script.py").write_text(script)
    run = start(f"script.py --algo ppo_clip --env CartPole-v1 {TINIER}", tmp_path)
    assert str(zoo.HYPERPARAMS / "ppo_clip.yml") in run.stdout, run.stderr
    assert PPOClip.load(tmp_path / "logs/ppo_clip/CartPole-v1_1/CartPole-v1.zip").gae_lambda == 0.8


def test_registering_again_changes_nothing() -> None:
    tables = rl_zoo3.ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER
    before = [dict(table) for table in tables]
    zoo.register()
    assert [dict(table) for table in tables] == before
    assert {name: rl_zoo3.ALGOS[name] for name in CLASSES} == CLASSES
    assert rl_zoo3.ALGOS["ppo"] is PPO
    assert rl_zoo3.train.ExperimentManager is rl_zoo3.exp_manager.ExperimentManager is Manager
    assert Manager.__mro__[1].__mro__[1] is object


def test_importing_does_not_import_zoo(tmp_path: Path) -> None:
    code = (
        "import sys, sb3_ppo_penalty, sb3_ppo_penalty.zoo, sb3_ppo_penalty.__main__;"
        "print([name for name in ('rl_zoo3', 'optuna', 'joblib') if name in sys.modules])"
    )
    assert start(f"-c {shlex.quote(code)}", tmp_path).stdout.strip() == "[]"


def test_other_algorithms_keep_zoos_hyperparameters(tmp_path: Path) -> None:
    assert Path(manager("ppo", "Pendulum-v1", tmp_path).config).parent.parent == Path(rl_zoo3.__file__).parent
    assert manager("ppo_clip", "Pendulum-v1", tmp_path, config="mine.yml").config == "mine.yml"


# ---- the command line


@pytest.mark.parametrize("words", [[], ["treno"], ["--algo", "ppo"]])
def test_no_or_unknown_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "usage: python -m sb3_ppo_penalty COMMAND ..."
    assert len(lines) == 2


def test_help_names_every_command(tmp_path: Path) -> None:
    said = ours("--help", tmp_path)
    named = re.findall(r"^  (\w+)  ", said[said.index("commands:") :], re.MULTILINE)
    assert named == ["train", "enjoy", *SCRIPTS, *PLOTS, "compare"]


@pytest.mark.parametrize("command", [*FUNCTIONS, *SCRIPTS])
def test_every_command_has_zoos_help_and_knows_the_algorithms(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    afresh(command, monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "--help" in said
    # Benchmark and the plots take what they find in a folder
    assert command in {"benchmark", *PLOTS} or "ppo_penalty,ppo_clip,ppo_penalty_lstm" in said


def test_compare_gets_its_arguments_and_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("sb3_ppo_penalty.study.cli.main", lambda words: given.append(words) or 7)
    assert main(["compare", "--seeds", "1"]) == 7
    assert given == [["--seeds", "1"]]


def test_missing_extra_is_a_sentence(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in {path for path in map(Path, site.getsitepackages()) if path.is_dir()}:
        for path in folder.iterdir():
            if not path.name.startswith(("rl_zoo3", "requests", "pandas", "__pycache__")):
                (packages / path.name).symlink_to(path)
    # -S: of what is installed, only these links are seen
    paths = os.pathsep.join([str(ROOT), str(packages)])
    run = start("-S -m sb3_ppo_penalty train --algo ppo_penalty", tmp_path, PYTHONPATH=paths)
    assert run.returncode == 1
    assert run.stderr == 'RL Zoo cannot run without rl_zoo3, requests and pandas: pip install "sb3_ppo_penalty[zoo]"\n'
    assert run.stdout == ""


def test_zoos_scripts_start_commands_that_know_the_algorithms() -> None:
    ours_ = [sys.executable, "-m", "sb3_ppo_penalty"]
    assert child_command(["python", "enjoy.py", "-n", "5"]) == [*ours_, "enjoy", "-n", "5"]
    assert child_command(["python", "-m", "rl_zoo3.record_video", "-n", "5"]) == [*ours_, "record_video", "-n", "5"]
    assert child_command(["ffmpeg", "-i", "a.mp4"]) == ["ffmpeg", "-i", "a.mp4"]
    assert child_command("ffmpeg -i a.mp4") == "ffmpeg -i a.mp4"


# ---- searching hyperparameters

SHARED = {
    "batch_size_pow": 7,
    "n_steps_pow": 5,
    "one_minus_gamma": 0.1,
    "one_minus_gae_lambda": 0.2,
    "learning_rate": 0.001,
    "ent_coef": 0.01,
    "n_epochs": 5,
    "max_grad_norm": 0.5,
    "net_arch": "tiny",
    "activation_fn": "relu",
}
SHARED_MEANING = {
    "batch_size": 128,
    "n_steps": 32,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "learning_rate": 0.001,
    "ent_coef": 0.01,
    "n_epochs": 5,
    "max_grad_norm": 0.5,
}
NETWORK = {"net_arch": {"pi": [64], "vf": [64]}, "activation_fn": nn.ReLU}
OF_CLIP = {"clip_range": 0.3, "target_kl": None}
OF_PENALTY = {"clip_range": None, "target_kl": 0.02, "kl_coef": 3.0, "kl_coef_factor": 1.5}


@pytest.mark.parametrize("algo", CLASSES)
def test_search_on_discrete_actions(algo: str) -> None:
    own = OF_CLIP if algo == "ppo_clip" else OF_PENALTY
    trial = FixedTrial({**SHARED, **own})
    sampled = HYPERPARAMS_SAMPLER[algo](trial, 0, 4, {})
    bounds = {} if algo == "ppo_clip" else {"kl_coef_bounds": (0.001, 1000.0)}  # not the file's, which may be narrower
    assert sampled == {**SHARED_MEANING, **own, **bounds, "policy_kwargs": NETWORK}
    assert trial.user_attrs == {"batch_size": 128, "n_steps": 32, "gamma": 0.9, "gae_lambda": 0.8}
    # What RL Zoo reads back with --trial-id, where it knows no clip range that is None
    if algo == "ppo_penalty":
        del sampled["clip_range"]
    assert HYPERPARAMS_CONVERTER[algo](trial.params) == sampled


@pytest.mark.parametrize(
    ("exploration", "spread", "use_sde"),
    [
        ("fixed", {"covariance": 0.25}, False),
        ("learned", {"covariance": 0.25, "learn_covariance": True}, False),
        ("gsde", {"log_std_init": pytest.approx(np.log(0.5))}, True),
    ],
)
def test_search_on_a_box(exploration: str, spread: dict[str, object], use_sde: bool) -> None:
    trial = FixedTrial({**SHARED, **OF_PENALTY, "exploration": exploration, "covariance": 0.25})
    sampled = HYPERPARAMS_SAMPLER["ppo_penalty"](trial, 1, 4, {})
    expected = {**SHARED_MEANING, **OF_PENALTY, "kl_coef_bounds": (0.001, 1000.0), "use_sde": use_sde}
    assert sampled == {**expected, "policy_kwargs": {**NETWORK, **spread}}
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **{**sampled, "n_steps": 128})
    actions = model.policy.get_distribution(th.zeros(1, 3)).distribution
    # gSDE spreads by the state's features; the other two start at the standard deviation of the variance 0.25
    assert use_sde or actions.stddev.item() == pytest.approx(0.5)
    assert model.policy.log_std.requires_grad == (exploration != "fixed")


@pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
@pytest.mark.parametrize(
    ("algo", "env", "own"),
    [
        ("ppo_penalty", "Pendulum-v1", {"exploration", "covariance", "target_kl", "kl_coef", "kl_coef_factor", "clip_range"}),
        ("ppo_clip", "CartPole-v1", {"target_kl", "clip_range"}),
    ],
)
def test_optimize_two_trials(algo: str, env: str, own: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The seed of two short trials, one of them with gSDE
    search = "-optimize --n-trials 2 --n-evaluations 1 --eval-episodes 1 --seed 57 --no-optim-plots"
    command = f"train --algo {algo} --env {env} -n 64 {search} --storage study.log --study-name s -params n_envs:1"
    in_this_process(command, tmp_path, monkeypatch)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert all(set(trial.params) == {*SHARED, *own} for trial in trials)
    assert trials[0].params != trials[1].params
    assert len(list((tmp_path / f"logs/{algo}").glob("report_*.csv"))) == 1


class InfiniteReward(gym.Wrapper):
    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float("inf"), terminated, truncated, info


def test_trial_that_goes_out_of_range_is_pruned(tmp_path: Path) -> None:
    pendulum = "gymnasium.envs.classic_control:PendulumEnv"
    wrappers = (gym.envs.registration.WrapperSpec("InfiniteReward", f"{__name__}:InfiniteReward", {}),)
    gym.register("Infinite-v0", pendulum, max_episode_steps=200, disable_env_checker=True, additional_wrappers=wrappers)
    experiment = manager("ppo_clip", "Infinite-v0", tmp_path, n_timesteps=1000, optimize_hyperparameters=True, n_evaluations=1)
    experiment.setup_experiment()
    study = optuna.create_study()
    study.enqueue_trial({**SHARED, "exploration": "fixed", "covariance": 0.5, "clip_range": 0.2, "target_kl": None})
    with (
        pytest.raises(optuna.TrialPruned, match="not finite"),
        pytest.warns(UserWarning, match="truncated mini-batch"),
        np.errstate(invalid="ignore"),
    ):
        experiment.objective(study.ask())


# ---- the hyperparameter files


def entries(algo: str) -> dict[str, dict[str, object]]:
    return yaml.safe_load((zoo.HYPERPARAMS / f"{algo}.yml").read_text())


@pytest.mark.parametrize("algo", CLASSES)
def test_file_has_the_promised_entries_and_says_which_are_tuned(algo: str) -> None:
    assert set(entries(algo)) == ENVIRONMENTS | {"default", "atari"}
    lines = (zoo.HYPERPARAMS / f"{algo}.yml").read_text().splitlines()
    for name in ENVIRONMENTS:
        # An entry that is another's, as in `Ant-v5: *mujoco`, is tuned as that is
        own = "Ant-v4:" if f"{name}: *mujoco" in lines else f"{name}:"
        above = lines[: [line.removesuffix(" &mujoco") for line in lines].index(own)]
        comment = above[max(number for number, line in enumerate(above) if not line.startswith("#")) + 1 :]
        assert "tuned" in " ".join(comment).lower(), name


@pytest.mark.parametrize("algo", CLASSES)
def test_mujoco_has_the_fields_protocol(algo: str) -> None:
    of_the_field = yaml.safe_load((zoo.HYPERPARAMS / zoo.FIELD_PROTOCOL / f"{algo}.yml").read_text())
    assert entries(algo)["Ant-v4"] == of_the_field["default"]


@pytest.mark.parametrize("algo", CLASSES)
def test_numbers_are_numbers_and_minibatches_whole(algo: str) -> None:
    words = {"policy", "policy_kwargs", "env_wrapper", "normalize", "kl_controller"}
    schedule = re.compile(r"lin_[0-9.]+")
    for name, entry in entries(algo).items():
        strings = {key: value for key, value in entry.items() if isinstance(value, str) and key not in words}
        assert all(schedule.fullmatch(value) for value in strings.values()), (name, strings)
        rollout = entry.get("n_envs", 1) * entry.get("n_steps", 2048)
        assert rollout % entry.get("batch_size", 64) == 0, name


# Box2D's import crashes where this warning of its is an error
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
@pytest.mark.parametrize("env", [*sorted(ENVIRONMENTS), "Reacher-v5", "MountainCar-v0", "ALE/Pong-v5"])
@pytest.mark.parametrize("algo", CLASSES)
def test_entry_trains(algo: str, env: str, tmp_path: Path) -> None:
    experiment = manager(algo, env, tmp_path, hyperparams={"n_steps": 8, "batch_size": 8, "n_epochs": 1})
    name = env if env in ENVIRONMENTS else "atari" if env.startswith("ALE") else "default"
    entry = entries(algo)[name]
    model, _ = experiment.setup_experiment()
    before = [parameter.clone() for parameter in model.policy.parameters()]
    experiment.learn(model)
    assert type(model) is CLASSES[algo]
    assert model.num_timesteps == 8 * entry.get("n_envs", 1)
    after = list(model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not all(th.equal(old, new) for old, new in zip(before, after, strict=True))
    for key in {"gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "target_kl"} & set(entry):
        assert getattr(model, key) == entry[key], key
    assert model.get_vec_normalize_env() is not None or not entry.get("normalize", False)
    assert (model.clip_range is None) == ("clip_range" not in entry and algo == "ppo_penalty")


@pytest.mark.parametrize("env", ["CartPoleNoVel-v1", "PendulumNoVel-v1", "CartPole-v1"])
def test_entry_with_memory_trains(env: str, tmp_path: Path) -> None:
    experiment = manager("ppo_penalty_lstm", env, tmp_path, hyperparams={"n_steps": 8, "batch_size": 8, "n_epochs": 1})
    entry = entries("ppo_penalty_lstm").get(env, entries("ppo_penalty_lstm")["default"])
    model, _ = experiment.setup_experiment()
    experiment.learn(model)
    assert type(model) is RecurrentPPOPenalty
    assert model.num_timesteps == 8 * entry.get("n_envs", 1)
    assert model.clip_range is None
    targets = {"CartPoleNoVel-v1": (0.034, 0.004), "PendulumNoVel-v1": (0.1, 0.1)}.get(env, (0.01, 0.01))
    assert tuple(FloatSchedule(model.target_kl)(progress) for progress in (1.0, 0.0)) == pytest.approx(targets)
    assert model.policy.lstm_actor.hidden_size == (256 if env == "CartPole-v1" else 64)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    fitting = HYPERPARAMS_SAMPLER["ppo_penalty_lstm"](FixedTrial({**SHARED, **OF_PENALTY}), 0, 4, {})
    assert fitting.keys() <= inspect.signature(RecurrentPPOPenalty).parameters.keys()


def test_pendulums_entry_is_the_dict_of_the_package(tmp_path: Path) -> None:
    own = {"normalize": "{'norm_obs': False, 'norm_reward': True}", "n_envs": 4, "n_timesteps": 100_000, "policy": "MlpPolicy"}
    entry = entries("ppo_penalty")["Pendulum-v1"]
    assert entry.keys() - own.keys() == PENDULUM.keys()
    assert {name: entry[name] for name in own} == own
    by_zoo, _ = manager("ppo_penalty", "Pendulum-v1", tmp_path, seed=3).setup_experiment()
    by_zoo.env.close()
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=4, seed=3), norm_obs=False, gamma=PENDULUM["gamma"])
    model = PPOPenalty("MlpPolicy", env, seed=3, **PENDULUM)
    for name in PENDULUM.keys() - {"learning_rate", "policy_kwargs", "kl_controller"}:
        assert getattr(by_zoo, name) == getattr(model, name), name
    assert by_zoo.kl_controller == model.kl_controller
    assert str(by_zoo.policy) == str(model.policy)
    assert th.equal(by_zoo.policy.covariance, model.policy.covariance)
    for progress in (1.0, 0.3, 0.0):
        assert by_zoo.lr_schedule(progress) == pytest.approx(model.lr_schedule(progress))
    normalize = by_zoo.get_vec_normalize_env()
    assert (normalize.norm_obs, normalize.norm_reward, normalize.gamma) == (False, True, PENDULUM["gamma"])
    assert all(th.equal(one, other) for one, other in zip(by_zoo.policy.parameters(), model.policy.parameters(), strict=True))


def test_articles_recipe_is_a_hyperparameter_module(tmp_path: Path) -> None:
    experiment = manager("ppo_clip", "Pendulum-v1", tmp_path, config="sb3_ppo_penalty.zoo.article", n_timesteps=0)
    model, saved = experiment.setup_experiment()
    model.env.close()
    assert isinstance(model.rollout_buffer, RewardToGoRolloutBuffer)
    assert (experiment.n_timesteps, model.n_envs, model.n_steps, model.batch_size) == (220_000, 1, 2200, 2200)
    # As `enjoy` reads it back
    kept = yaml.unsafe_load((Path(experiment.params_path) / "config.yml").read_text())
    assert {key: kept[key] for key in ARTICLE_RECIPE} == ARTICLE_RECIPE
    assert saved["policy"] == "MlpPolicy"


def field_protocol(algo: str, folder: Path, **overrides: object) -> Manager:
    return manager(algo, "Pendulum-v1", folder, config=zoo.FIELD_PROTOCOL, n_timesteps=0, hyperparams=overrides, seed=5)


@pytest.mark.parametrize(("algo", "method"), [("ppo", "clip"), ("ppo_clip", "clip"), ("ppo_penalty", "sampled-floor")])
def test_field_protocol_is_that_of_the_published_runs(algo: str, method: str, tmp_path: Path) -> None:
    published = runpy.run_path(str(ROOT / "examples" / "field_protocol.py"))
    experiment = field_protocol(algo, tmp_path)
    by_zoo, _ = experiment.setup_experiment()
    by_zoo.env.close()
    assert (experiment.n_timesteps, by_zoo.n_envs) == (published["STEPS"], 1)
    normalize = by_zoo.get_vec_normalize_env()
    assert (normalize.norm_obs, normalize.norm_reward, normalize.gamma) == (True, True, 0.99)
    settings = published["settings_of"](published["MUJOCO_TASK"], method)
    env = VecNormalize(make_vec_env("Pendulum-v1", seed=5))
    model = published["METHODS"][method][0](ActorCriticPolicy, env, **settings, seed=5, device="cpu")
    for name in ("learning_rate", "clip_range", "clip_range_vf", *{"target_kl"} & settings.keys()):
        zoos, ours = getattr(by_zoo, name), getattr(model, name)
        for progress in (1.0, 0.3, 0.0) if callable(ours) else ():
            assert zoos(progress) == pytest.approx(ours(progress)), name
        assert (zoos is None) == (ours is None), name
    for name in settings.keys() - {"target_kl"}:
        if not callable(getattr(model, name)) or name == "kl_controller":
            assert getattr(by_zoo, name) == getattr(model, name), name
    assert all(th.equal(one, other) for one, other in zip(by_zoo.policy.parameters(), model.policy.parameters(), strict=True))


def test_ppo_clip_on_the_field_protocol_is_ppo(tmp_path: Path) -> None:
    models = []
    for algo in ("ppo", "ppo_clip"):
        model, _ = field_protocol(algo, tmp_path / algo, n_steps=64, n_epochs=2).setup_experiment()
        models.append(model.learn(128))
        model.env.close()
    ppo, clip = models
    assert (type(ppo), type(clip)) == (PPO, PPOClip)
    assert all(th.equal(one, other) for one, other in zip(ppo.policy.parameters(), clip.policy.parameters(), strict=True))


@pytest.mark.parametrize("name", ["target_kl", "kl_min", "kl_max"])
def test_a_hyperparameter_file_can_name_schedules_of_the_penalty(name: str) -> None:
    read = Manager._preprocess_schedules
    falling, to_zero = read({name: "lin_0.03_0.002"})[name], read({name: "lin_0.03"})[name]
    assert [falling(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.03, 0.016, 0.002])
    assert [to_zero(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.03, 0.015, 0.0])
    assert read({name: 0.03}) == {name: 0.03}
    with pytest.raises(ValueError, match=f"`{name}` must be a number, lin_START or lin_START_END, got 'cos_0.03'"):
        read({name: "cos_0.03"})


def test_a_linear_schedule_of_rl_zoo_rests_at_its_end_where_training_overshoots():
    schedule = SimpleLinearSchedule(0.02)
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, target_kl=schedule, device="cpu")
    # Two rollouts of 64 steps: the second goes beyond the 100 that were asked for
    assert model.learn(100).current_target_kl == 0
