"""PPOClip with SB3's own policy is stock PPO: every parameter, bit for bit, after several updates."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_penalty import PPOClip
from sb3_ppo_penalty.vec_envs import LeanVecNormalize

SMALL = {"n_steps": 64, "batch_size": 24, "n_epochs": 3, "seed": 7}


def small_images() -> gym.Env:
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    env.observation_space.seed(0)
    return env


def several_inputs(discrete_actions: bool) -> gym.Env:
    np.random.seed(0)  # it draws its images when it is made
    return SimpleMultiObsEnv(discrete_actions=discrete_actions)


CASES = {
    "Box": (ActorCriticPolicy, "Pendulum-v1", {}),
    "Box, critic clipped": (ActorCriticPolicy, "Pendulum-v1", {"clip_range_vf": 0.2}),
    "Box, early stop": (ActorCriticPolicy, "Pendulum-v1", {"target_kl": 0.0002, "learning_rate": 1e-3}),
    "Box, entropy bonus": (ActorCriticPolicy, "Pendulum-v1", {"ent_coef": 0.05}),
    "Box, gSDE": (ActorCriticPolicy, "Pendulum-v1", {"use_sde": True, "sde_sample_freq": 4, "ent_coef": 0.01}),
    "Box, squashed": (ActorCriticPolicy, "Pendulum-v1", {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "Box, not normalised": (ActorCriticPolicy, "Pendulum-v1", {"normalize_advantage": False}),
    "Box, batches of one": (ActorCriticPolicy, "Pendulum-v1", {"batch_size": 63}),
    "Box, schedules": (
        ActorCriticPolicy,
        "Pendulum-v1",
        {"learning_rate": lambda p: 1e-3 * p, "clip_range": lambda p: 0.1 + 0.1 * p, "clip_range_vf": lambda p: 0.5 * p},
    ),
    "Discrete": (ActorCriticPolicy, "CartPole-v1", {}),
    "Discrete, all options": (
        ActorCriticPolicy,
        "CartPole-v1",
        {"clip_range_vf": 0.2, "target_kl": 0.01, "ent_coef": 0.01, "gae_lambda": 0.8, "gamma": 0.9},
    ),
    "images": (ActorCriticCnnPolicy, small_images, {"n_steps": 16, "batch_size": 8, "n_epochs": 2}),
    "Dict, Discrete": (MultiInputActorCriticPolicy, lambda: several_inputs(True), {}),
    "Dict, Box": (MultiInputActorCriticPolicy, lambda: several_inputs(False), {"ent_coef": 0.01}),
}


@pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
@pytest.mark.parametrize("case", CASES)
def test_equals_stock_ppo(case: str) -> None:
    policy, env, options = CASES[case]
    models = []
    for algorithm in (PPO, PPOClip):
        made = env if isinstance(env, str) else env()
        model = algorithm(policy, made, **{**SMALL, **options})
        before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        model.learn(4 * model.n_steps)
        assert any(not th.equal(before[name], tensor) for name, tensor in model.policy.state_dict().items())
        models.append(model)
    stock, ours = models
    expected = stock.policy.state_dict()
    for name, tensor in ours.policy.state_dict().items():
        assert th.equal(tensor, expected[name]), name
    assert ours._n_updates == stock._n_updates
    # What stock PPO logs is logged under the same names and with the same values
    for name, value in stock.logger.name_to_value.items():
        if name.startswith("train/"):
            assert ours.logger.name_to_value[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


class Recorder(BaseCallback):
    """Keeps a copy of everything that a callback can see at each event."""

    def __init__(self) -> None:
        super().__init__()
        self.events = []

    def _record(self, event: str) -> None:
        seen = {
            name: value for name, value in self.locals.items() if name not in ("self", "env", "callback", "rollout_buffer")
        }
        buffer = {name: value for name, value in vars(self.model.rollout_buffer).items() if isinstance(value, np.ndarray)}
        counts = self.num_timesteps, self.n_calls, self.model.rollout_buffer.pos, self.model._episode_num
        logged = [*self.model.ep_info_buffer], dict(self.logger.name_to_value)
        self.events.append((event, *copy.deepcopy((list(seen), seen, buffer, counts, logged))))

    def _on_rollout_start(self) -> None:
        self._record("rollout starts")

    def _on_step(self) -> bool:
        self._record("step")
        return True

    def _on_rollout_end(self) -> None:
        self._record("rollout ends")


def same(ours, theirs) -> bool:
    """Compare to the bit, type by type; what a clock or a callable says does not count."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours if key not in UNLIKE)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, th.Tensor):
        return ours.dtype == theirs.dtype and th.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    return callable(ours) or ours == theirs


#: What differs between two runs of one program, or between the two algorithms' logs of an update
UNLIKE = {"t", "time/fps", "time/time_elapsed", "tb_log_name"}


@pytest.mark.parametrize("vec_env", [DummyVecEnv, LeanVecNormalize])
def test_callbacks_see_what_they_see_in_stock_ppo(vec_env) -> None:
    """Normalised observations, three environments, time limits within a rollout: every local, the buffer, the episodes."""
    views = []
    for algorithm, cls in ((PPO, DummyVecEnv), (PPOClip, vec_env)):
        env = make_vec_env("Pendulum-v1", 3, seed=0, env_kwargs={"max_episode_steps": 20}, vec_env_cls=cls)
        env = env if cls is LeanVecNormalize else VecNormalize(env)
        recorder = Recorder()
        algorithm(ActorCriticPolicy, env, **{**SMALL, "batch_size": 48}).learn(400, callback=recorder)
        views.append(recorder.events)
    stock, ours = views
    assert [event for event, *_ in ours].count("step") == 192
    assert any(info.get("TimeLimit.truncated") for _, _, seen, *_ in ours for info in seen.get("infos", ()))
    for at, (found, expected) in enumerate(zip(ours, stock, strict=True)):
        *view, (episodes, logged) = found
        *stock_view, (stock_episodes, stock_logged) = expected
        assert same(view, stock_view), at
        assert same(episodes, stock_episodes), at
        assert stock_logged.keys() <= logged.keys()


@pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
def test_early_stop_was_exercised() -> None:
    """The case above named "early stop" does stop: it makes fewer epochs than asked for."""
    policy, env, options = CASES["Box, early stop"]
    model = PPOClip(policy, env, **{**SMALL, **options})
    model.learn(4 * model.n_steps)
    assert model._n_updates < 4 * model.n_epochs


@pytest.mark.parametrize("number", [float, th.tensor], ids=["numbers", "tensors"])
def test_schedules_go_below_zero_as_in_stock_ppo(number) -> None:
    """Training overshoots, and SB3 asks its schedules for a progress of -0.28: RL Zoo's linear ones answer below 0."""
    weights = []
    for algorithm in (PPO, PPOClip):
        falling = {name: lambda p: number(0.2 * p) for name in ("clip_range", "clip_range_vf")}
        model = algorithm(
            ActorCriticPolicy, "Pendulum-v1", **{**SMALL, "batch_size": 32}, learning_rate=lambda p: 1e-3 * p, **falling
        )
        model.learn(100)
        assert model.logger.name_to_value["train/clip_range"] == pytest.approx(-0.056)
        assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(-0.00028)
        weights.append(model.policy.state_dict())
    stock, ours = weights
    assert all(th.equal(tensor, ours[name]) for name, tensor in stock.items())


def test_continues_like_stock_ppo_after_save_and_load(tmp_path) -> None:
    """The optimizer's state comes along in the file: an update after loading is stock PPO's update after loading."""
    results = []
    for algorithm in (PPO, PPOClip):
        model = algorithm(ActorCriticPolicy, "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=2, seed=3)
        model.learn(128)
        model.save(tmp_path / "model")
        loaded = algorithm.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
        loaded.learn(128, reset_num_timesteps=False)
        results.append(th.cat([parameter.flatten() for parameter in loaded.policy.parameters()]))
    assert th.equal(*results)
