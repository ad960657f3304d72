"""Environments that misbehave, and callbacks that stop in between: what stock PPO does, with the last good policy intact."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from environments import Sound
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecCheckNan

from sb3_ppo_penalty import PPOClip, PPOPenalty

SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0}
#: Behaves for the whole of the first rollout
FIRST_FAULT = 41


class Fragile(Sound):
    """Sound, until it goes wrong in subclasses."""

    def step(self, action):
        result = super().step(action)
        return self.fault(*result) if self.steps >= FIRST_FAULT else result

    def fault(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, info


def faulty(method):
    """An environment whose steps end in the given way."""
    return type(method.__name__, (Fragile,), {"fault": method})


class FailsToReset(Fragile):
    def reset(self, *, seed=None, options=None):
        if self.steps >= FIRST_FAULT:
            raise ConnectionError("the simulator is gone")
        return super().reset(seed=seed, options=options)


def raises(self, observation, reward, terminated, truncated, info):
    raise ConnectionError("the simulator is gone")


def exits(self, observation, reward, terminated, truncated, info):
    raise SystemExit(3)


def interrupts(self, observation, reward, terminated, truncated, info):
    raise KeyboardInterrupt


def gives_too_many_numbers(self, observation, reward, terminated, truncated, info):
    return np.zeros(5, np.float32), reward, terminated, truncated, info


def gives_text(self, observation, reward, terminated, truncated, info):
    return np.array(["a", "b", "c"]), reward, terminated, truncated, info


def gives_nothing_to_see(self, observation, reward, terminated, truncated, info):
    return None, reward, terminated, truncated, info


def gives_two_rewards(self, observation, reward, terminated, truncated, info):
    return observation, np.array([1.0, 2.0]), terminated, truncated, info


def gives_a_reward_in_words(self, observation, reward, terminated, truncated, info):
    return observation, "good", terminated, truncated, info


def gives_no_reward(self, observation, reward, terminated, truncated, info):
    return observation, None, terminated, truncated, info


def gives_no_info(self, observation, reward, terminated, truncated, info):
    return observation, reward, terminated, truncated, None


def speaks_the_old_interface(self, observation, reward, terminated, truncated, info):
    return observation, reward, terminated, info


def grows(self, observation, reward, terminated, truncated, info):
    self.observation_space = spaces.Box(-1, 1, (7,), np.float32)
    return np.zeros(7, np.float32), reward, terminated, truncated, info


def gives_numbers_beyond_float32(self, observation, reward, terminated, truncated, info):
    return observation.astype(np.float64) * 1e300, reward, terminated, truncated, info


def gives_one_number_for_three(self, observation, reward, terminated, truncated, info):
    return np.ones(1, np.float32), reward, terminated, truncated, info


def gives_another_type(self, observation, reward, terminated, truncated, info):
    return (10 * observation).astype(np.int64), np.float16(reward), np.bool_(terminated), truncated, info


def asks_for_other_actions(self, observation, reward, terminated, truncated, info):
    self.action_space = spaces.Discrete(2)
    return observation, reward, terminated, truncated, info


def leaves_its_space(self, observation, reward, terminated, truncated, info):
    return 1e6 * observation, reward, terminated, truncated, info


def terminates_and_truncates(self, observation, reward, terminated, truncated, info):
    return observation, reward, True, True, info


class OneStep(Fragile):
    length = 1


FATAL = {method.__name__: faulty(method) for method in (raises, exits, interrupts, gives_too_many_numbers, gives_text)}
FATAL |= {m.__name__: faulty(m) for m in (gives_nothing_to_see, gives_two_rewards, gives_a_reward_in_words, gives_no_reward)}
FATAL |= {m.__name__: faulty(m) for m in (gives_no_info, speaks_the_old_interface, grows, gives_numbers_beyond_float32)}
FATAL |= {"FailsToReset": FailsToReset}
#: What numpy makes fit, and what nobody looks at
ODD = {m.__name__: faulty(m) for m in (gives_one_number_for_three, gives_another_type, asks_for_other_actions)}
ODD |= {m.__name__: faulty(m) for m in (leaves_its_space, terminates_and_truncates)} | {"OneStep": OneStep}


def weights(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def assert_equal(left: dict, right: dict) -> None:
    for name, tensor in left.items():
        assert th.equal(tensor, right[name]), name


def assert_learns_on(model, good: dict, tmp_path, env=None) -> None:
    """The policy is as it was, can be saved, and learns on from there in an environment that behaves."""
    assert_equal(weights(model), good)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=env or Sound())
    assert_equal(weights(loaded), good)
    for each in (model, loaded):
        each.set_env(env or Sound())
        each.learn(64, reset_num_timesteps=False)
        now = weights(each)
        assert all(th.isfinite(tensor).all() for tensor in now.values())
        assert any(not th.equal(tensor, good[name]) for name, tensor in now.items())


def failure_of(model) -> tuple:
    """What the second rollout ends with."""
    with np.errstate(over="ignore"):
        try:
            model.learn(32, reset_num_timesteps=False)
        except BaseException as error:
            return type(error), str(error)
    return None, ""


@pytest.mark.parametrize("fault", FATAL)
def test_fatal_faults_end_as_in_stock_ppo(fault: str, tmp_path) -> None:
    """The same error in the same words, the policy of the last update, and what was collected is not learned from."""
    failures = []
    for algorithm in (PPO, PPOClip):
        model = algorithm(ActorCriticPolicy, FATAL[fault](), **SMALL).learn(32)
        good = weights(model)
        failures.append(failure_of(model))
        assert failures[-1][0] is not None
        assert_equal(weights(model), good)
    assert failures[0] == failures[1]
    assert_learns_on(model, good, tmp_path)
    penalty = PPOPenalty("MlpPolicy", FATAL[fault](), **SMALL).learn(32)
    good = weights(penalty)
    assert failure_of(penalty)[0] is failures[0][0]
    assert_learns_on(penalty, good, tmp_path)


@pytest.mark.parametrize("fault", ODD)
def test_odd_environments_are_learned_from_as_by_stock_ppo(fault: str) -> None:
    models = [each(ActorCriticPolicy, ODD[fault](), **SMALL).learn(128) for each in (PPO, PPOClip)]
    assert_equal(*map(weights, models))
    model = PPOPenalty("MlpPolicy", ODD[fault](), **SMALL)
    before = weights(model)
    model.learn(128)
    after = weights(model)
    assert all(th.isfinite(tensor).all() for tensor in after.values())
    # Everything has learned but the covariance, which does not
    assert {name for name in after if th.equal(after[name], before[name])} == {"covariance"}


def test_one_step_episodes_have_no_future() -> None:
    """The critic's target is the reward itself: here the sum of the action as it was taken, clipped to [-1, 1]."""
    model = PPOPenalty("MlpPolicy", OneStep(), **SMALL).learn(32)
    buffer = model.rollout_buffer
    rewards = np.clip(buffer.actions, -1, 1).sum(axis=-1)
    np.testing.assert_allclose(buffer.returns.flatten(), rewards.flatten(), rtol=1e-5, atol=1e-6)
    assert len(model.ep_info_buffer) == 32
    assert {info["l"] for info in model.ep_info_buffer} == {1}


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_other_spaces_are_refused(algorithm, tmp_path) -> None:
    model = algorithm("MlpPolicy", Sound(), **SMALL).learn(32)
    good = weights(model)
    model.save(tmp_path / "model")
    other = Sound()
    other.action_space = spaces.Discrete(2)
    wide = Sound()
    wide.observation_space = spaces.Box(-1, 1, (7,), np.float32)
    for env, message in ((other, "Action spaces do not match"), (wide, "Observation spaces do not match")):
        with pytest.raises(ValueError, match=message):
            model.set_env(env)
        with pytest.raises(ValueError, match=message):
            algorithm.load(tmp_path / "model", env=env)
    assert_equal(weights(model), good)
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        model.predict(np.zeros(7, dtype=np.float32))


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_sb3s_check_names_the_step(algorithm) -> None:
    blind = faulty(gives_nothing_to_see)
    env = VecCheckNan(DummyVecEnv([blind, blind]), raise_exception=True)
    model = algorithm("MlpPolicy", env, **SMALL).learn(32)
    good = weights(model)
    with pytest.raises(ValueError, match="found nan in observations"):
        model.learn(64, reset_num_timesteps=False)
    assert_equal(weights(model), good)


# --- processes


class DiesInItsProcess(Fragile):
    def fault(self, observation, reward, terminated, truncated, info):
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_an_environment_whose_process_dies(tmp_path) -> None:
    failures = []
    for algorithm in (PPO, PPOClip):
        env = SubprocVecEnv([DiesInItsProcess, DiesInItsProcess], start_method="fork")
        model = algorithm(ActorCriticPolicy, env, **SMALL).learn(64)
        good = weights(model)
        failures.append(failure_of(model)[0])
        assert_equal(weights(model), good)
        for process in env.processes:
            process.join()
            assert process.exitcode == 1
    assert issubclass(failures[0], (EOFError, ConnectionError))
    assert failures[0] is failures[1]
    assert_learns_on(model, good, tmp_path, DummyVecEnv([Sound, Sound]))


HANGS = """
import sys, time
from pathlib import Path

sys.path[:0] = {tests!r}
from environments import Sound
from stable_baselines3.common.vec_env import SubprocVecEnv
from test_bad_environments import SMALL
from sb3_ppo_penalty import {algorithm} as Algorithm


class HangsOnClose(Sound):
    def close(self):
        Path("closing").touch()
        time.sleep(3600)


env = SubprocVecEnv([HangsOnClose], start_method="fork")
model = Algorithm("MlpPolicy", env, **SMALL).learn(64)
model.save("model")
Path("values").write_text(repr(model.predict(env.reset(), deterministic=True)[0].shape))
env.close()
"""


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_an_environment_that_hangs_on_close_takes_nothing_along(algorithm, tmp_path) -> None:
    """Neither training nor saving closes it; the process that waits for it is killed, and its file is whole."""
    code = HANGS.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], algorithm=algorithm.__name__)
    script = tmp_path / "script.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, start_new_session=True) as process:
        try:
            while not (tmp_path / "closing").exists() and process.poll() is None:
                time.sleep(0.05)
            assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "values").read_text() == "(1, 2)"
    model = algorithm.load(tmp_path / "model", env=Sound())
    assert model.num_timesteps == 64
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 96


# --- callbacks


class Stop(BaseCallback):
    """Ends training after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def _on_step(self) -> bool:
        return self.n_calls < self.after


class Fail(Stop):
    def _on_step(self) -> bool:
        if self.n_calls == self.after:
            raise ZeroDivisionError("of the callback's own")
        return True


@pytest.mark.parametrize("after", [1, 33, 45, 64])
def test_a_callback_that_stops_in_the_middle_of_a_rollout(after: int, tmp_path) -> None:
    """Half a rollout is not learned from, and the next call of ``learn`` starts anew: as stock PPO, bit for bit."""
    models, stopped = [], []
    for algorithm in (PPO, PPOClip):
        model = algorithm(ActorCriticPolicy, Sound(), **SMALL)
        model.learn(128, callback=Stop(after))
        assert model.num_timesteps == after
        # 2 epochs for every full rollout; one that ends with the call is not counted
        assert model._n_updates == 2 * ((after - 1) // 32)
        stopped.append(weights(model))
        model.learn(64, reset_num_timesteps=False)
        models.append(model)
    assert_equal(*stopped)
    assert_equal(*map(weights, models))
    penalty = PPOPenalty("MlpPolicy", Sound(), **SMALL)
    penalty.learn(128, callback=Stop(after))
    with pytest.raises(RuntimeError, match="no full rollout"):
        penalty.train()
    assert_learns_on(penalty, weights(penalty), tmp_path)


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_a_callback_that_raises_in_the_middle_of_a_rollout(algorithm, tmp_path) -> None:
    model = algorithm("MlpPolicy", Sound(), **SMALL).learn(32)
    good = weights(model)
    with pytest.raises(ZeroDivisionError, match="of the callback's own"):
        model.learn(64, callback=Fail(7), reset_num_timesteps=False)
    assert_learns_on(model, good, tmp_path)
