"""
Files that an earlier version wrote can be read by ``load_safe``.

Those in ``data`` are from commit 8f7026a, of two updates each. Since then the modules of some classes have moved, so that
``load``, whose pickles name modules, does not find them.
"""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

import sb3_ppo_penalty
from sb3_ppo_penalty import (
    Guard,
    KLPenalty,
    MlpPolicy,
    PPOClip,
    PPOPenalty,
    RewardToGoRolloutBuffer,
    UnsafeFileError,
)
from sb3_ppo_penalty.algorithms.maskable import MaskablePPOPenalty
from sb3_ppo_penalty.objectives.kl_controllers import AdaptiveRule
from sb3_ppo_penalty.saving.safe_load import BUFFERS, OBJECTS, POLICIES

DATA = Path(__file__).parents[1] / "data"
STATE = np.array([0.5, -0.5, 1.0], dtype=np.float32)


def masked_env() -> gym.Env:
    return InvalidActionEnvDiscrete(dim=3, n_invalid_actions=1)


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


#: Algorithm, environment, coefficient, the mean action in STATE and the sum of all weights, as they were when it was saved
FILES: dict[str, tuple[Any, ...]] = {
    "penalty": (PPOPenalty, pendulum, 0.25, 0.01115318, -2.7519228433957323),
    "penalty_options": (PPOPenalty, pendulum, 0.6703198237933976, 0.00794842, -2.7441435390646802),
    "clip": (PPOClip, pendulum, None, 0.00688864, -2.7456401292656665),
    "masked": (MaskablePPOPenalty, masked_env, 0.25, 0, 1.2404732829309069),
    "checkpoint_16_steps": (PPOPenalty, pendulum, 0.25, 0.01066197, None),
}


def assert_is_as_saved(model: Any, name: str) -> None:
    _, _, kl_coef, action, weights = FILES[name]
    assert (model.num_timesteps, model.n_steps, model.seed) == (16, 8, 0)
    assert getattr(model, "kl_coef", None) == kl_coef
    state = 2 if name == "masked" else STATE
    assert model.predict(state, deterministic=True)[0] == pytest.approx(action, abs=1e-7)
    total = sum(weight.double().sum().item() for weight in model.policy.parameters())
    assert weights is None or total == pytest.approx(weights, abs=1e-6)
    if name == "penalty_options":
        assert model.policy.covariance.tolist() == pytest.approx([0.3])
        # Where ratios are truncated was a field of the penalty
        assert (model.kl_penalty, model.max_ratio) == (KLPenalty("symmetric"), 5.0)
        assert model.guard == Guard("rollback", measure="max")
        assert (model.kl_controller.learning_rate, model.kl_controller.steps) == (0.2, 2)
        assert model.kl_controller.mean == pytest.approx(-0.18999162327790708)
    if name == "penalty":
        assert model.kl_controller == AdaptiveRule()
    if name == "clip":
        assert model.rollout_buffer_class is RewardToGoRolloutBuffer
    if name != "masked":
        assert type(model.policy) is MlpPolicy


@pytest.mark.parametrize("name", FILES)
def test_file_is_read_and_learns_on(name: str) -> None:
    algorithm, make, *_ = FILES[name]
    model = algorithm.load_safe(DATA / name, make(), "cpu")
    assert_is_as_saved(model, name)
    assert model.learn(8, reset_num_timesteps=False).num_timesteps == 24


@pytest.fixture
def moved(monkeypatch) -> None:
    """Every class of the package that a file can name is in another module, and is described in other words."""
    for cls in [*POLICIES, *BUFFERS, *(each for kinds in OBJECTS.values() for each in kinds)]:
        if cls.__module__.startswith(f"{sb3_ppo_penalty.__name__}."):
            monkeypatch.setattr(cls, "__module__", "sb3_ppo_penalty.another.place")
            monkeypatch.setattr(cls, "__doc__", "Other words.")


@pytest.mark.usefixtures("moved")
@pytest.mark.parametrize("name", FILES)
def test_safe_loading_asks_neither_for_modules_nor_for_docstrings(name: str, tmp_path: Path) -> None:
    algorithm, make, *_ = FILES[name]
    model = algorithm.load_safe(DATA / name, make(), "cpu")
    assert_is_as_saved(model, name)
    model.save(tmp_path / "new")
    assert_is_as_saved(algorithm.load_safe(tmp_path / "new", make(), "cpu"), name)


def test_new_file_is_read_after_its_classes_have_moved(tmp_path: Path, request) -> None:
    PPOPenalty.load_safe(DATA / "penalty_options", pendulum(), "cpu").save(tmp_path / "penalty_options")
    PPOClip.load_safe(DATA / "clip", pendulum(), "cpu").save(tmp_path / "clip")
    request.getfixturevalue("moved")
    assert_is_as_saved(PPOPenalty.load_safe(tmp_path / "penalty_options", pendulum(), "cpu"), "penalty_options")
    assert_is_as_saved(PPOClip.load_safe(tmp_path / "clip", pendulum(), "cpu"), "clip")


def test_subclass_is_not_taken_for_its_parent() -> None:
    class Wider(MlpPolicy):
        """SB3's ``MlpPolicy`` with a fixed covariance: but wider."""

    file = io.BytesIO()
    PPOPenalty(Wider, pendulum(), n_steps=8, batch_size=4, policy_kwargs={"net_arch": [2]}).save(file)
    with pytest.raises(UnsafeFileError, match="policy_class"):
        PPOPenalty.load_safe(file, pendulum(), "cpu")
    assert type(PPOPenalty.load_safe(file, pendulum(), "cpu", policy=Wider).policy) is Wider
