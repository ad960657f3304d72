"""Training that is killed and resumed equals training that was not. The children are real processes, really killed."""

import contextlib
import csv
import hashlib
import multiprocessing
import os
import random
import runpy
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.utils import EzPickle
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_ppo_penalty import PPOClip, PPOPenalty, ResumableCheckpointCallback, ResumableEnv, latest_checkpoint, resume

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["sb3_ppo_penalty", "pytest", "torch._dynamo"])  # torch's optimizers import the last
#: of the test that kills at random moments: KILLS=50 python -m pytest tests/saving/test_checkpoints.py -k random
KILLS = int(os.environ.get("KILLS", "8"))
N_ENVS = 2
SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
ROLLOUT = SMALL["n_steps"] * N_ENVS
TOTAL = 7 * ROLLOUT
#: Due at calls 50, 100, 150 and 200, where a rollout ends every 32: written after 64, 128, 160 and 224
SAVE_FREQ, SAVED_AT = 50, [128, 256, 320, 448]
#: In the middle of the fifth rollout
KILLED_AT = 296


def falling(progress: float) -> float:
    return 1e-4 + 2e-3 * progress


class Locked(gym.Wrapper):
    """An environment with something in it that cannot be pickled."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.lock = threading.Lock()


class LockedVec(VecEnvWrapper):
    """The same around all environments, with a count."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.lock, self.count = threading.Lock(), 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.count += 1
        return self.venv.step_wait()


class Foreign(VecEnv):
    """Environments of which nobody knows where they live."""

    def __init__(self, venv: VecEnv) -> None:
        for name in ("reset", "step_async", "step_wait", "close", "get_attr", "set_attr", "env_method", "seed"):
            setattr(self, name, getattr(venv, name))
        super().__init__(venv.num_envs, venv.observation_space, venv.action_space)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        raise NotImplementedError


Foreign.__abstractmethods__ = frozenset()  # set by its constructor


class Inner(gym.Env, EzPickle):
    """What says of itself that its constructor's arguments are all of it."""


class HidesAnother(gym.Wrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.hidden = Inner()


SIMULATORS: list[np.ndarray] = []


class Simulated(gym.Env):
    """Its state lies outside of it, and it says how to save it."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.handle = len(SIMULATORS)
        SIMULATORS.append(np.zeros(2, dtype=np.float32))

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        SIMULATORS[self.handle][:] = self.np_random.uniform(-1, 1, 2)
        return SIMULATORS[self.handle].copy(), {}

    def step(self, action: np.ndarray) -> Any:
        SIMULATORS[self.handle][:] += action
        far = bool(np.abs(SIMULATORS[self.handle]).max() > 5)
        return SIMULATORS[self.handle].copy(), -float(np.abs(SIMULATORS[self.handle]).sum()), far, False, {}

    def __getstate__(self) -> Any:
        return SIMULATORS[self.handle].tolist(), self.np_random.bit_generator.state

    def __setstate__(self, state: Any) -> None:
        SIMULATORS[self.handle][:], self.np_random.bit_generator.state = state


class Noisy(gym.RewardWrapper):
    """Draws from the global generator of its process."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        np.random.seed(3)

    def reward(self, reward: Any) -> float:
        return float(reward) + np.random.normal()


def noisy_and_resumable(env: gym.Env) -> ResumableEnv:
    return ResumableEnv(Noisy(env))


class Controlled(PPOClip):
    """With a live state of its own, which `load` alone loses: `_setup_model` creates it, and it is a tuple."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.controller = (0, 1.0)

    def train(self) -> None:
        super().train()
        self.controller = (self.controller[0] + 1, self.controller[1] * self._current_progress_remaining)


class Case(NamedTuple):
    algorithm: type
    env_id: str | type[gym.Env]
    wrap: Callable[[VecEnv], VecEnv] = lambda env: env
    vec_env: dict[str, Any] = {}  # noqa: RUF012 (read only)
    arguments: dict[str, Any] = {}  # noqa: RUF012 (read only)


PROCESSES = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}, "wrapper_class": noisy_and_resumable}
CASES = {
    "pendulum": Case(PPOPenalty, "Pendulum-v1", arguments={"learning_rate": falling}),
    "cartpole": Case(PPOPenalty, "CartPole-v1", arguments={"learning_rate": falling, "clip_range": 0.3}),
    "normalized": Case(PPOPenalty, "CartPole-v1", lambda env: VecNormalize(env, gamma=0.9)),
    "stacked": Case(PPOClip, "Pendulum-v1", lambda env: VecNormalize(VecFrameStack(VecMonitor(env), 3))),
    "clip": Case(Controlled, "CartPole-v1", arguments={"clip_range": falling, "learning_rate": falling, "target_kl": 0.05}),
    "stock": Case(PPO, "Pendulum-v1", arguments={"use_sde": True, "learning_rate": falling}),
    "processes": Case(PPOPenalty, "CartPole-v1", vec_env=PROCESSES),
    "simulated": Case(PPOPenalty, Simulated),
}


class Kill(BaseCallback):
    """As `kill -9` does. With all processes of the group: SB3's workers that were forked would wait for ever."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            os.killpg(0, signal.SIGKILL)
        return True


class Stop(BaseCallback):
    """At the end of a rollout, so that what is compared is a whole number of updates."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        return self.num_timesteps <= self.at


def environment(case: Case) -> VecEnv:
    return case.wrap(make_vec_env(case.env_id, N_ENVS, seed=7, **case.vec_env))


def outcome(model: Any) -> dict[str, Any]:
    """Everything that training has come to, in plain values and tensors."""
    plain = (int, float, tuple, np.ndarray)
    found = {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "attributes": {
            name: value for name, value in vars(model).items() if isinstance(value, plain) and name != "start_time"
        },
        "episodes": [(info["r"], info["l"]) for info in model.ep_info_buffer],
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "action_space": str(model.action_space.np_random.bit_generator.state),
    }
    if isinstance(model.env, VecNormalize):
        rms = model.env.obs_rms
        found["normalize"] = [rms.mean, rms.var, rms.count, model.env.ret_rms.var, model.env.returns, model.env.old_obs]
    # Where the environments' own generators and episodes stand: what the next steps and resets give
    actions = np.zeros((N_ENVS, *model.action_space.shape), dtype=model.action_space.dtype)
    found["steps"] = [model.env.step(actions)[:3] for _ in range(30)]
    found["start"] = model.env.reset()
    return found


def train(name: str, folder: Path, total: int, at: int, ends: str = "whole", save_freq: int = SAVE_FREQ) -> None:
    """What runs in a child: start or go on, with checkpoints unless `ends` is "whole"."""
    os.setpgrp()
    case, checkpoints = CASES[name], folder / "checkpoints"
    callback = ResumableCheckpointCallback(save_freq, checkpoints, keep=2)
    path = latest_checkpoint(checkpoints)
    random.seed(3)
    if path is None:
        model, left = case.algorithm("MlpPolicy", environment(case), seed=5, **SMALL, **case.arguments), total
        (folder / "first").touch()
    else:
        model, left = resume(path, environment(case), callback)
    model.set_logger(configure(str(folder / f"{'resumed' if path else 'first'}_log"), ["csv"]))
    callbacks: list[BaseCallback] = [] if ends == "whole" else [callback]
    callbacks.append(Kill(at) if ends == "killed" else Stop(at))
    model.learn(left, callbacks, reset_num_timesteps=path is None)
    result = {**outcome(model), "n_calls": callbacks[-1].n_calls if ends == "whole" else callback.n_calls}
    th.save(result, folder / "outcome.pt")
    model.env.close()


def child(target: Callable[..., None], *arguments: Any, dies: bool = False) -> None:
    process = CHILDREN.Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if dies else 0)


def assert_equal(one: Any, other: Any, where: str = "outcome") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{where}[{place}]")
    elif isinstance(one, th.Tensor):
        assert th.equal(one, other), where
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, strict=True, err_msg=where)
    else:
        assert one == other, where


def outcome_in(folder: Path) -> dict[str, Any]:
    return th.load(folder / "outcome.pt", weights_only=False)


def steps_in(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()]
    assert all(name.startswith("rl_model_") and name.endswith("_steps.zip") for name in names), names
    return sorted(int(name.split("_")[2]) for name in names)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The log, without what depends on the clock or is counted anew by every `learn`."""
    with (path / "progress.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if not key.startswith("time/") or key.endswith("timesteps")} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a whole training, which every case makes once."""
    folders: dict[str, Path] = {}

    def make_once(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            child(train, name, folders[name], TOTAL, TOTAL)
        return folders[name]

    return make_once


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_uninterrupted(name: str, uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    child(train, name, tmp_path, TOTAL, KILLED_AT, "killed", dies=True)
    assert steps_in(tmp_path / "checkpoints") == SAVED_AT[:2]
    child(train, name, tmp_path, TOTAL, TOTAL, "resumed")
    assert steps_in(tmp_path / "checkpoints") == SAVED_AT[2:]
    whole = uninterrupted(name)
    expected = outcome_in(whole)
    assert expected["attributes"]["num_timesteps"] == TOTAL
    assert expected["attributes"].get("kl_coef", 0.5) != 1
    assert_equal(outcome_in(tmp_path), expected)
    # The first line of the resumed log holds the update before the checkpoint, which had not been written
    rows = rows_of(whole / "first_log")
    assert len(rows) == 7
    assert rows_of(tmp_path / "resumed_log") == rows[4:]


def dying(folder: Path, stage: str) -> None:
    """What runs in a child that dies while it writes its third checkpoint."""
    fsync, replace = os.fsync, os.replace
    renamed = 0

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_fsync(descriptor: int) -> None:
        file = os.fstat(descriptor)
        if renamed == 2 and stage in ("nothing written", "half written") and stat.S_ISREG(file.st_mode):
            os.ftruncate(descriptor, file.st_size // 2 if stage == "half written" else 0)
            die()
        fsync(descriptor)

    def dying_replace(*names: Any) -> None:
        nonlocal renamed
        renamed += 1
        if renamed == 3 and stage == "before the renaming":
            die()
        replace(*names)
        if renamed == 3 and stage == "after the renaming":
            die()

    os.fsync, os.replace = dying_fsync, dying_replace
    train("pendulum", folder, TOTAL, TOTAL, "resumed")


@pytest.mark.parametrize("stage", ["nothing written", "half written", "before the renaming", "after the renaming"])
def test_killed_while_writing(stage: str, uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    child(dying, tmp_path, stage, dies=True)
    temporary = [path for path in checkpoints.iterdir() if path.suffix == ".tmp"]
    path = latest_checkpoint(checkpoints)
    if stage == "after the renaming":
        assert temporary == []
        assert path == checkpoints / "rl_model_320_steps.zip"
    else:
        assert len(temporary) == 1
        assert path == checkpoints / "rl_model_256_steps.zip"
    child(train, "pendulum", tmp_path, TOTAL, TOTAL, "resumed")
    assert steps_in(checkpoints) == SAVED_AT[2:]
    assert_equal(outcome_in(tmp_path), outcome_in(uninterrupted("pendulum")))


def on_slow_disk(*arguments: Any) -> None:
    """What runs in a child: a disk on which a file grows for 100 ms, so that many a kill meets one half written."""
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                content = file.read()
            os.ftruncate(descriptor, 0)
            for start in range(0, size, size // 20):
                os.pwrite(descriptor, content[start : start + size // 20], start)
                time.sleep(0.005)
        fsync(descriptor)

    os.fsync = slow_fsync
    train(*arguments)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """One training, killed again and again, ends where one ends that is never killed."""
    checkpoints, whole, endless = tmp_path / "checkpoints", tmp_path / "whole", 10**6
    for folder in (checkpoints, whole):
        folder.mkdir()
    moments = random.Random(0)
    unfinished = 0
    for _ in range(KILLS):
        before = set(checkpoints.iterdir())
        process = CHILDREN.Process(
            target=on_slow_disk, args=("normalized", tmp_path, endless, endless, "resumed", SMALL["n_steps"])
        )
        process.start()
        while process.is_alive() and not {path for path in checkpoints.iterdir() if path.suffix == ".zip"} - before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        files = list(checkpoints.iterdir())
        unfinished += any(path.suffix == ".tmp" for path in files)
        # Killed after a file was renamed and before another was removed, there is one too many
        assert 1 <= sum(path.suffix == ".zip" for path in files) <= 3
        path = latest_checkpoint(checkpoints)
        assert path is not None
        reached = PPOPenalty.load(path).num_timesteps
        assert path.name == f"rl_model_{reached}_steps.zip"
        assert all(int(each.name.split("_")[2]) <= reached for each in files if each.suffix == ".zip")
    end = reached + 3 * ROLLOUT
    child(train, "normalized", tmp_path, endless, end, "resumed", SMALL["n_steps"])
    child(train, "normalized", whole, endless, end)
    assert_equal(outcome_in(tmp_path), outcome_in(whole))
    assert steps_in(checkpoints) == [end - ROLLOUT, end]
    sys.stdout.write(f"{KILLS} kills, {unfinished} of them while a file was being written, {end} steps\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three checkpoints, after 32, 64 and 96 steps of 128."""
    folder = tmp_path_factory.mktemp("trained")
    model = PPOClip("MlpPolicy", "CartPole-v1", seed=1, tensorboard_log=None, **SMALL)
    model.learn(128, [ResumableCheckpointCallback(32, folder), Stop(96)])
    assert steps_in(folder) == [32, 64, 96]
    return folder


def copy(folder: Path, to: Path, *steps: int) -> list[Path]:
    for each in steps:
        (to / f"rl_model_{each}_steps.zip").write_bytes((folder / f"rl_model_{each}_steps.zip").read_bytes())
    return [to / f"rl_model_{each}_steps.zip" for each in steps]


def test_a_truncated_file_is_skipped_with_a_warning(trained: Path, tmp_path: Path) -> None:
    older, newest = copy(trained, tmp_path, 32, 64)
    content = newest.read_bytes()
    sizes = [*range(200), *range(200, len(content) - 200, len(content) // 150), *range(len(content) - 200, len(content))]
    for size in sizes:
        newest.write_bytes(content[:size])
        with pytest.warns(UserWarning, match=f"{newest} is torn"):
            assert latest_checkpoint(tmp_path) == older, size
    newest.write_bytes(content + b"0")
    with pytest.warns(UserWarning, match="torn"):
        assert latest_checkpoint(tmp_path) == older
    newest.write_bytes(content)
    assert latest_checkpoint(tmp_path) == newest


def flipped(content: bytes, place: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def test_a_flipped_bit_is_detected(trained: Path, tmp_path: Path) -> None:
    older, newest = copy(trained, tmp_path, 32, 64)
    content, where = newest.read_bytes(), random.Random(0)
    # Before the digest stands the number, and flipped it might make an older file the newest: there each bit
    end = len(content)
    places = [(place, bit) for place in range(end - 100, end - 64) for bit in range(8)]
    places += [(place, where.randrange(8)) for place in [*range(end - 140, end - 100), *range(end - 64, end)]]
    places += [(where.randrange(end), where.randrange(8)) for _ in range(200)]
    for place, bit in places:
        newest.write_bytes(flipped(content, place, bit))
        with pytest.warns(UserWarning, match=f"{newest} is torn"):
            assert latest_checkpoint(tmp_path) == older, place
    newest.write_bytes(content)
    content = older.read_bytes()
    for place, bit in places[: 36 * 8]:
        older.write_bytes(flipped(content, place - end, bit))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert latest_checkpoint(tmp_path) == newest, place


def test_what_is_torn_is_never_loaded(trained: Path, tmp_path: Path) -> None:
    older, newest = copy(trained, tmp_path, 32, 64)
    for path in (older, newest):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="torn") as caught:
        assert latest_checkpoint(tmp_path) is None
    assert [str(each.message).split()[0] for each in caught] == [str(newest), str(older)]
    callback = ResumableCheckpointCallback(32, tmp_path)
    with pytest.raises(ValueError, match=r"`path` must be .*torn"):
        resume(newest, "CartPole-v1", callback)
    PPOClip.load(trained / "rl_model_64_steps.zip").save(newest)
    with pytest.raises(ValueError, match=r"`path` must be .*torn"):
        resume(newest, "CartPole-v1", callback)
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_is_the_last_written_not_the_one_after_most_steps(tmp_path: Path) -> None:
    """Also when training begins anew in the same folder, and whatever the clock and copying made of the files' times."""
    model = PPOClip("MlpPolicy", "CartPole-v1", seed=1, **SMALL)
    callback = ResumableCheckpointCallback(32, tmp_path, keep=2)
    model.learn(160, callback)
    assert steps_in(tmp_path) == [128, 160]
    model.learn(32, callback)
    assert steps_in(tmp_path) == [32, 160]
    os.utime(tmp_path / "rl_model_32_steps.zip", (0, 0))
    assert latest_checkpoint(tmp_path) == tmp_path / "rl_model_32_steps.zip"
    # Another callback, as in another process
    model.learn(32, ResumableCheckpointCallback(32, tmp_path, keep=2), reset_num_timesteps=False)
    assert steps_in(tmp_path) == [32, 64]
    model.learn(32, ResumableCheckpointCallback(32, tmp_path, keep=2))
    assert steps_in(tmp_path) == [32, 64]
    assert latest_checkpoint(tmp_path) == tmp_path / "rl_model_32_steps.zip"


def test_all_are_kept_and_nothing_foreign_is_removed(tmp_path: Path) -> None:
    model = PPOClip("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(96, CheckpointCallback(32, str(tmp_path), name_prefix="other"))
    (tmp_path / ".other_32_steps.zip.1.tmp").touch()
    (tmp_path / ".rl_model_32_steps.zip.1.tmp").touch()
    model.save(tmp_path / "rl_model_7_steps.zip")
    with pytest.warns(UserWarning, match=r"rl_model_7_steps\.zip is torn, or no checkpoint"):
        model.learn(128, ResumableCheckpointCallback(32, tmp_path, keep=1))
    names = {path.name for path in tmp_path.iterdir()}
    others = {f"other_{steps}_steps.zip" for steps in (32, 64, 96)} | {".other_32_steps.zip.1.tmp"}
    assert names == others | {"rl_model_7_steps.zip", "rl_model_128_steps.zip"}
    model.learn(128, ResumableCheckpointCallback(32, tmp_path / "all", name_prefix="a.b*", keep=None))
    assert {path.name for path in (tmp_path / "all").iterdir()} == {f"a.b*_{steps}_steps.zip" for steps in (32, 64, 96, 128)}
    assert latest_checkpoint(tmp_path / "all") is None
    assert latest_checkpoint(tmp_path / "all", "a.b*") == tmp_path / "all" / "a.b*_128_steps.zip"


def test_a_checkpoint_is_a_model_of_sb3(trained: Path) -> None:
    path = trained / "rl_model_64_steps.zip"
    model = PPOClip.load(path, env=gym.make("CartPole-v1"))
    assert model.num_timesteps == 64
    assert model.predict(np.zeros(4, dtype=np.float32), deterministic=True)[0] in (0, 1)
    model.learn(32, reset_num_timesteps=False)
    content = path.read_bytes()
    assert content[-64:].decode() == hashlib.sha256(content[:-64]).hexdigest()
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) > {"data", "policy.pth", "policy.optimizer.pth"}


def test_checkpoints_wait_for_the_end_of_a_rollout(tmp_path: Path) -> None:
    """At the end of training too, but not if the training was stopped within a rollout."""
    model = PPOClip("MlpPolicy", "CartPole-v1", **SMALL)
    callback = ResumableCheckpointCallback(20, tmp_path, keep=None)
    model.learn(96, callback)
    assert steps_in(tmp_path) == [32, 64, 96]
    model.learn(96, [callback, Stop(145)], reset_num_timesteps=False)
    assert steps_in(tmp_path) == [32, 64, 96, 128]
    model.learn(32, callback, reset_num_timesteps=False)
    # Stopped after 146 steps; due since 140
    assert steps_in(tmp_path) == [32, 64, 96, 128, 146, 178]


@pytest.mark.parametrize("name", ["pendulum", "stock"])
def test_going_on_after_the_end_of_training(name: str, tmp_path: Path) -> None:
    """`learn` twice in one process equals `learn`, another process (here: another model) and `learn`."""
    case = CASES[name]
    model = case.algorithm("MlpPolicy", environment(case), seed=5, **SMALL, **case.arguments)
    model.learn(2 * ROLLOUT, ResumableCheckpointCallback(2 * SMALL["n_steps"], tmp_path))
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    expected = outcome(model)
    callback = ResumableCheckpointCallback(1000, tmp_path)
    random.seed(11)
    model, left = resume(tmp_path / f"rl_model_{2 * ROLLOUT}_steps.zip", environment(case), callback)
    assert left == 0
    # What is drawn in between does not matter
    random.random(), np.random.random(), th.rand(1)
    model.learn(2 * ROLLOUT, callback, reset_num_timesteps=False)
    found = outcome(model)
    # Of the whole: a second `learn` begins to count at its start
    assert found["attributes"].pop("_num_timesteps_at_start") == 0
    assert expected["attributes"].pop("_num_timesteps_at_start") == 2 * ROLLOUT
    assert_equal(found, expected)


def test_an_environment_by_name_the_remaining_steps_and_the_clock(trained: Path, tmp_path: Path) -> None:
    model = PPOClip("MlpPolicy", "CartPole-v1", seed=1, **SMALL)
    model.learn(128)
    expected = model.policy.state_dict()
    callback = ResumableCheckpointCallback(32, tmp_path)
    resumed, left = resume(trained / "rl_model_32_steps.zip", "CartPole-v1", callback, device="cpu")
    assert type(resumed) is PPOClip
    assert left == 96
    assert resumed.action_space is resumed.env.action_space
    resumed.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    an_hour_ago = callback._resumed._replace(elapsed=3600 * 10**9)
    callback._continue(an_hour_ago)
    resumed.learn(left, callback, reset_num_timesteps=False)
    assert_equal(dict(resumed.policy.state_dict()), dict(expected))
    with (tmp_path / "log" / "progress.csv").open(newline="") as file:
        row = next(iter(csv.DictReader(file)))
    assert 3600 <= int(row["time/time_elapsed"]) < 3700
    assert row["time/fps"] == "0"
    resumed.logger.close()


def test_resumed_models_have_to_go_on(trained: Path, tmp_path: Path) -> None:
    callback = ResumableCheckpointCallback(32, tmp_path)
    model, left = resume(trained / "rl_model_32_steps.zip", "CartPole-v1", callback)
    with pytest.raises(ValueError, match="`reset_num_timesteps` must be False"):
        model.learn(left, callback)
    callback = ResumableCheckpointCallback(32, tmp_path)
    resume(trained / "rl_model_32_steps.zip", "CartPole-v1", callback)
    with pytest.raises(ValueError, match=r"`reset_num_timesteps` must be False in the `learn` of the model that `resume`"):
        PPOClip("MlpPolicy", "CartPole-v1", **SMALL).learn(left, callback, reset_num_timesteps=False)


def test_environments_have_to_be_made_as_they_were(tmp_path: Path) -> None:
    case = CASES["normalized"]
    PPOPenalty("MlpPolicy", environment(case), **SMALL).learn(ROLLOUT, ResumableCheckpointCallback(1, tmp_path))
    path = tmp_path / f"rl_model_{ROLLOUT}_steps.zip"
    wrong = {
        "2 environments in VecNormalize of DummyVecEnv, not 3 in": VecNormalize(make_vec_env("CartPole-v1", 3)),
        "not 2 in DummyVecEnv": make_vec_env("CartPole-v1", 2),
        "not 2 in VecNormalize of LockedVec of DummyVecEnv": VecNormalize(LockedVec(make_vec_env("CartPole-v1", 2))),
        r"TimeLimit', .*, not .*'HidesAnother', 'Monitor": VecNormalize(
            make_vec_env("CartPole-v1", 2, wrapper_class=HidesAnother),
        ),
    }
    for problem, env in wrong.items():
        with pytest.raises(ValueError, match=f"`env` must be .*{problem}"):
            resume(path, env, ResumableCheckpointCallback(1, tmp_path))


def test_arguments(tmp_path: Path) -> None:
    for arguments, name in (
        ({"save_freq": 0}, "save_freq"),
        ({"save_freq": 1.5}, "save_freq"),
        ({"save_freq": 1, "keep": 0}, "keep"),
        ({"save_freq": 1, "name_prefix": "a/b"}, "name_prefix"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            ResumableCheckpointCallback(save_path=tmp_path, **arguments)
    callback = ResumableCheckpointCallback(1, tmp_path)
    with pytest.raises(ValueError, match=r"`callback` must be outside an EventCallback"):
        PPOClip("MlpPolicy", "CartPole-v1", **SMALL).learn(32, EveryNTimesteps(8, callback))
    with pytest.raises(ValueError, match=r"`model` must be an on-policy algorithm"):
        SAC("MlpPolicy", "Pendulum-v1", buffer_size=10).learn(1, ResumableCheckpointCallback(1, tmp_path))


def failing(*_: Any) -> None:
    raise OSError("no space left on device")


def test_a_full_disk_ends_the_training_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOClip("MlpPolicy", "CartPole-v1", **SMALL)
    callback = ResumableCheckpointCallback(32, tmp_path)
    model.learn(32, callback)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="no space left"):
        model.learn(64, callback, reset_num_timesteps=False)
    assert steps_in(tmp_path) == [32]


def locked(**vec_env: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", N_ENVS, seed=7, wrapper_class=Locked, **vec_env)


@pytest.mark.parametrize(
    ("make_env", "problem"),
    [
        (lambda: VecNormalize(locked()), r"cannot be pickled \(Locked\.lock: cannot pickle '_thread\.lock' object\)"),
        (
            lambda: VecNormalize(
                DummyVecEnv([lambda: HidesAnother(gym.make("CartPole-v1")), lambda: HidesAnother(gym.make("CartPole-v1"))])
            ),
            r"cannot be pickled \(HidesAnother\.hidden: Inner is an EzPickle",
        ),
        (lambda: VecNormalize(Foreign(locked())), "live in a Foreign, which is known neither"),
        (lambda: VecNormalize(locked(vec_env_cls=SubprocVecEnv)), "live where only `ResumableEnv` reaches them"),
    ],
)
def test_environments_that_cannot_be_saved_start_new_episodes(
    make_env: Callable[[], VecNormalize], problem: str, tmp_path: Path
) -> None:
    env = make_env()
    model = PPOPenalty("MlpPolicy", env, seed=5, **SMALL)
    first = env.venv.reset()
    with pytest.warns(UserWarning, match=f"environments: they {problem}"):
        model.learn(2 * ROLLOUT, ResumableCheckpointCallback(32, tmp_path))
    count, parameters = env.obs_rms.count, {name: value.clone() for name, value in model.policy.state_dict().items()}
    env.close()
    starts = []
    for _ in range(2):
        env, callback = make_env(), ResumableCheckpointCallback(10**6, tmp_path)
        with pytest.warns(UserWarning, match=f"start new episodes: they {problem}"):
            model, _ = resume(tmp_path / f"rl_model_{2 * ROLLOUT}_steps.zip", env, callback)
        assert env.obs_rms.count == count
        assert_equal(dict(model.policy.state_dict()), dict(parameters))
        model.learn(ROLLOUT, callback, reset_num_timesteps=False)
        starts.append(model.rollout_buffer.observations.copy())
        env.close()
    np.testing.assert_array_equal(*starts)
    assert not np.isin(env.unnormalize_obs(starts[0][:2]).astype(np.float32), first).any()


def test_processes_that_cannot_say_their_state_live_on(tmp_path: Path) -> None:
    """A wrapper outside `ResumableEnv` would be forgotten; what cannot be pickled would end the process if it were sent."""
    for wrapper, problem in (
        (lambda env: Monitor(ResumableEnv(env)), "outside `ResumableEnv`"),
        (lambda env: ResumableEnv(Locked(env)), r"Locked\.lock: cannot pickle"),
    ):
        env = make_vec_env("CartPole-v1", N_ENVS, wrapper_class=wrapper, vec_env_cls=SubprocVecEnv)
        with pytest.warns(UserWarning, match=f"checkpoint goes without the environments: they .*{problem}"):
            PPOPenalty("MlpPolicy", env, **SMALL).learn(ROLLOUT, ResumableCheckpointCallback(32, tmp_path))
        env.close()


def test_a_vecenv_wrapper_that_cannot_be_pickled_whole(tmp_path: Path) -> None:
    env = LockedVec(make_vec_env("CartPole-v1", N_ENVS))
    with pytest.warns(UserWarning, match=r"goes without LockedVec\.lock: cannot pickle"):
        PPOPenalty("MlpPolicy", env, **SMALL).learn(ROLLOUT, ResumableCheckpointCallback(32, tmp_path))
    env = LockedVec(make_vec_env("CartPole-v1", N_ENVS))
    lock = env.lock
    resume(tmp_path / f"rl_model_{ROLLOUT}_steps.zip", env, ResumableCheckpointCallback(32, tmp_path))
    assert env.lock is lock
    assert env.count == SMALL["n_steps"]


SCRIPT = """
import os, signal, sys
from dataclasses import dataclass
import gymnasium as gym, numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from sb3_ppo_penalty import PPOPenalty, ResumableCheckpointCallback, latest_checkpoint, resume

@dataclass
class Place:
    x: float

class Walk(gym.Env):
    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    def __init__(self):
        self.pay, self.shared = lambda x: -abs(x), SHARED
    def observe(self):
        return np.array([self.place.x], dtype=np.float32)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = Place(self.np_random.uniform(-1, 1))
        return self.observe(), {}
    def step(self, action):
        assert isinstance(self.place, Place)
        self.place = Place(self.place.x + float(action[0]) + 0.1 * self.np_random.normal())
        self.shared["steps"] += 1
        out = abs(self.place.x) > 5 or self.shared["steps"] % 50 == 0
        return np.clip(self.observe(), -9, 9), self.pay(self.place.x), out, False, {}

class Kill(BaseCallback):
    def _on_step(self):
        if self.num_timesteps > 150 and KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

def make():
    global SHARED
    SHARED = {"steps": 0}
    from stable_baselines3.common.vec_env import DummyVecEnv
    return DummyVecEnv([Walk, Walk])

def end_of(model):
    parameters = [parameter.detach().numpy() for parameter in model.policy.parameters()]
    total = sum(np.abs(each).astype(np.float64).sum() for each in parameters)
    return float(total).hex(), model.kl_coef, model._last_obs.tolist()

ARGUMENTS = dict(n_steps=32, batch_size=16, n_epochs=2, seed=4)
checkpoints = ResumableCheckpointCallback(save_freq=40, save_path="checkpoints")
path = latest_checkpoint("checkpoints")
if path is None:
    KILL = False
    print(end_of(PPOPenalty("MlpPolicy", make(), **ARGUMENTS).learn(320)), flush=True)
    KILL = True
    PPOPenalty("MlpPolicy", make(), **ARGUMENTS).learn(320, [Kill(), checkpoints])
else:
    KILL = False
    model, remaining_timesteps = resume(path, make(), checkpoints)
    model.learn(remaining_timesteps, [Kill(), checkpoints], reset_num_timesteps=False)
    print(end_of(model))
"""


def run_script(folder: Path) -> None:
    """What runs in a child: as `python script.py > first.txt`, without the seconds that the imports take."""
    os.chdir(folder)
    with open("first.txt", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path("script.py", run_name="__main__")


def test_a_users_script_started_twice(tmp_path: Path) -> None:
    """With classes, lambdas and shared objects of its own; the second time as a user runs it, in a new interpreter."""
    (tmp_path / "script.py").write_text(SCRIPT)
    child(run_script, tmp_path, dies=True)
    command = [sys.executable, "script.py"]
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    first = (tmp_path / "first.txt").read_text()
    assert len(first) > 50
    assert first == second.stdout


def test_nothing_to_go_on_from_is_said(tmp_path: Path) -> None:
    callback = ResumableCheckpointCallback(save_freq=1, save_path=tmp_path)
    with pytest.raises(ValueError, match="`path` must be a checkpoint, got None"):
        resume(latest_checkpoint(tmp_path), "Pendulum-v1", callback)
