"""Files and weights of one algorithm opened by another: SB3's, sb3-contrib's and this package's."""

import io
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_penalty import MlpPolicy, PPOClip, PPOPenalty, UnsafeFileError
from sb3_ppo_penalty.algorithms.maskable import MaskablePPOPenalty

TINY: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "seed": 0, "device": "cpu"}
CLIP = r"its `clip_range` stays in force beside the penalty: pass `clip_range=None` for the penalty alone"
TARGET = r"its `target_kl`, which stopped an update, is now what `kl_coef` aims at: pass another to aim elsewhere"
NO_CLIP = r"it has no `clip_range`, so PPO's default holds: pass `clip_range` for another"
STOP = r"its `target_kl`, which `kl_coef` aimed at, now stops an update: pass `target_kl=None` to stop none"
LOADS = pytest.mark.parametrize("load", ["load", "load_safe"])


class Masked(gym.Wrapper):
    """Two actions, both allowed."""

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def masked() -> gym.Env:
    return Masked(gym.make("CartPole-v1"))


def saved(algorithm: type, env: gym.Env, policy: Any = "MlpPolicy", **arguments: Any) -> io.BytesIO:
    file = io.BytesIO()
    algorithm(policy, env, **{**TINY, **arguments}).learn(16).save(file)
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def penalty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "penalty.zip"
    path.write_bytes(saved(PPOPenalty, pendulum()).getvalue())
    return path


@pytest.fixture(scope="module")
def stock_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "stock.zip"
    path.write_bytes(saved(PPO, pendulum(), target_kl=0.05).getvalue())
    return path


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize(("clip_range", "found"), [(None, 0.2), (0.3, 0.3), (LinearSchedule(0.1, 0.1, 1.0), 0.1)])
def test_stock_ppo_opens_our_file_and_trains_on(policy: Any, clip_range: Any, found: float) -> None:
    file = saved(PPOPenalty, pendulum(), policy, clip_range=clip_range, clip_range_vf=0.4)
    stock, ours = PPO.load(file, env=pendulum()), PPOPenalty.load(file)
    # Without a clip range in the file it is stock PPO's own default
    assert stock.clip_range(1.0) == found
    assert (stock.target_kl, stock.clip_range_vf(1.0)) == (0.01, 0.4)
    assert (None if ours.clip_range is None else ours.clip_range(1.0)) == (found if clip_range else None)
    observation = pendulum().observation_space.sample()
    assert stock.predict(observation, deterministic=True)[0] == ours.predict(observation, deterministic=True)[0]
    assert stock.learn(16).num_timesteps == 16


def test_maskable_ppo_opens_our_masked_file_and_trains_on() -> None:
    file = saved(MaskablePPOPenalty, masked())
    assert MaskablePPO.load(file, env=masked()).learn(16).clip_range(1.0) == 0.2
    assert MaskablePPOPenalty.load(file, env=masked()).clip_range is None


def test_a_clip_range_among_custom_objects_holds_where_the_file_has_none(penalty_file: Path) -> None:
    assert PPOPenalty.load(penalty_file, custom_objects={"clip_range": 0.3}).clip_range(1.0) == 0.3
    assert PPOPenalty.load(penalty_file, custom_objects={"clip_range": 0.3}, clip_range=0.4).clip_range(1.0) == 0.4
    assert PPOPenalty.load(penalty_file, custom_objects={"gamma": 0.5}).gamma == 0.5


@LOADS
def test_penalty_says_what_stock_arguments_mean_to_it(load: str, stock_file: Path) -> None:
    with pytest.warns(UserWarning, match=f"^PPOPenalty opens a file of another algorithm: {CLIP}; {TARGET}$"):
        model = getattr(PPOPenalty, load)(stock_file, pendulum())
    assert (model.clip_range(1.0), model.current_target_kl) == (0.2, 0.05)
    with pytest.warns(UserWarning, match=f": {TARGET}$"):
        model = getattr(PPOPenalty, load)(stock_file, pendulum(), clip_range=None)
    assert model.clip_range is None
    with pytest.warns(UserWarning, match=f": {CLIP}$"):
        getattr(PPOPenalty, load)(stock_file, pendulum(), target_kl=None, n_epochs=2)
    # Nothing to say where the user has said all
    model = getattr(PPOPenalty, load)(stock_file, pendulum(), clip_range=None, target_kl=0.02)
    assert (model.clip_range, model.current_target_kl) == (None, 0.02)


def test_custom_objects_count_as_said(stock_file: Path) -> None:
    objects = {"clip_range": None, "target_kl": None}
    assert PPOPenalty.load(stock_file, custom_objects=objects).clip_range is None


@pytest.mark.parametrize("algorithm", [PPO, PPOClip])
def test_penalty_says_that_a_clip_stays(algorithm: type) -> None:
    with pytest.warns(UserWarning, match=f": {CLIP}$"):
        PPOPenalty.load(saved(algorithm, pendulum()))


def test_own_files_are_opened_without_a_word(penalty_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOPenalty.load(penalty_file)
        PPOPenalty.load(saved(PPOPenalty, pendulum(), clip_range=0.2))
        PPOClip.load(saved(PPOClip, pendulum(), target_kl=0.05))
        PPOClip.load(saved(PPO, pendulum(), target_kl=0.05))
        PPOPenalty.load_safe(penalty_file, pendulum())


@LOADS
def test_clip_opens_a_file_of_the_penalty_and_keeps_nothing_of_it(load: str, penalty_file: Path) -> None:
    with pytest.warns(UserWarning, match=f"^PPOClip opens a file of another algorithm: {NO_CLIP}; {STOP}$"):
        model = getattr(PPOClip, load)(penalty_file, pendulum())
    assert (model.clip_range(1.0), model.target_kl) == (0.2, 0.01)
    model = getattr(PPOClip, load)(penalty_file, pendulum(), clip_range=0.3, target_kl=None)
    assert (model.clip_range(1.0), model.target_kl) == (0.3, None)
    assert vars(model).keys() == vars(PPOClip("MlpPolicy", pendulum())).keys()
    file = io.BytesIO()
    model.learn(16).save(file)
    PPOClip.load(file, pendulum())  # its own file now


@LOADS
def test_clip_opens_a_clipped_file_of_the_penalty(load: str, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(saved(PPOPenalty, pendulum(), clip_range=0.3).getvalue())
    with pytest.warns(UserWarning, match=f": {STOP}$"):
        assert getattr(PPOClip, load)(tmp_path / "model", pendulum()).clip_range(1.0) == 0.3


@LOADS
@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip, MaskablePPOPenalty])
@pytest.mark.parametrize("other", [A2C, TRPO, DQN])
def test_files_of_what_is_no_ppo_are_refused(load: str, algorithm: Any, other: Any, tmp_path: Path) -> None:
    other("MlpPolicy", masked()).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"must be a model of PPO, PPOClip or PPOPenalty|in the file") as caught:
        getattr(algorithm, load)(tmp_path / "model", masked())
    if other is DQN and load == "load_safe":
        assert isinstance(caught.value, UnsafeFileError)
    else:
        assert "`model.policy.load_state_dict(other.policy.state_dict())`" in str(caught.value)


def test_weights_of_another_algorithm_are_handed_over_as_the_error_says() -> None:
    other = A2C("MlpPolicy", masked(), seed=1)
    model = PPOPenalty("MlpPolicy", masked())
    model.policy.load_state_dict(other.policy.state_dict())
    assert all(th.equal(one, two) for one, two in zip(model.policy.parameters(), other.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("other", "policy"), [(MaskablePPO, "MlpPolicy"), (MaskablePPOPenalty, "MlpPolicy"), (RecurrentPPO, "MlpLstmPolicy")]
)
@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
@LOADS
def test_policies_that_act_on_more_than_observations_are_refused(
    other: Any, policy: str, algorithm: Any, load: str, tmp_path: Path
) -> None:
    other(policy, masked()).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`policy` must be a policy for PPO|`policy_class` must be one of ActorCriticPolicy"):
        getattr(algorithm, load)(tmp_path / "model", masked(), clip_range=0.2, target_kl=0.01)


@LOADS
def test_masked_penalty_refuses_a_policy_without_masks(load: str, tmp_path: Path) -> None:
    PPO("MlpPolicy", masked()).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`policy` must be a Maskable|`policy_class` must be one of Maskable"):
        getattr(MaskablePPOPenalty, load)(tmp_path / "model", masked(), clip_range=None)


@LOADS
def test_masked_penalty_says_that_a_clip_stays(load: str, tmp_path: Path) -> None:
    MaskablePPO("MlpPolicy", masked(), **TINY).save(tmp_path / "model")
    with pytest.warns(UserWarning, match=f"^MaskablePPOPenalty opens a file of another algorithm: {CLIP}$"):
        assert getattr(MaskablePPOPenalty, load)(tmp_path / "model", masked()).clip_range(1.0) == 0.2
    model = getattr(MaskablePPOPenalty, load)(tmp_path / "model", masked(), clip_range=None)
    assert model.learn(16).clip_range is None


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"no archive"):
        with pytest.raises(ValueError, match=r"`path`: the file .* wasn't a zip-file"):
            PPOPenalty.load(io.BytesIO(content))
    with pytest.raises(FileNotFoundError):
        PPOPenalty.load(tmp_path / "nothing")


# Weights of a Gaussian whose spread learns, and of one whose covariance is fixed

LEARNS = r"a policy that learns `log_std`, as SB3's does: build this one with `policy_kwargs=dict\(learn_covariance=True\)`"
FIXED = r"a policy with a fixed `covariance`, which is this package's: build this one with this package's policy, without"


def learning(policy: Any = "MlpPolicy", **arguments: Any) -> PPOPenalty:
    return PPOPenalty(policy, pendulum(), **TINY, **arguments)


def test_stock_weights_name_the_policy_that_takes_them(stock_file: Path, tmp_path: Path) -> None:
    stock, fixed = PPO.load(stock_file), learning()
    stock.policy.save(tmp_path / "policy")
    before = [weight.clone() for weight in fixed.policy.parameters()]
    for attempt in (
        lambda: fixed.set_parameters(stock_file),
        lambda: fixed.set_parameters(stock.get_parameters()),
        lambda: fixed.set_parameters(stock.get_parameters(), exact_match=False),
        lambda: fixed.policy.load_state_dict(stock.policy.state_dict()),
        lambda: MlpPolicy.load(tmp_path / "policy"),
        lambda: TRPO(MlpPolicy, pendulum()).set_parameters(stock_file),
    ):
        with pytest.raises(RuntimeError, match=LEARNS):
            attempt()
    assert all(th.equal(one, two) for one, two in zip(before, fixed.policy.parameters(), strict=True)), "untouched"
    with pytest.raises(UnsafeFileError, match=LEARNS):
        PPOPenalty.load_safe(stock_file, pendulum(), policy=MlpPolicy, clip_range=None, target_kl=None)
    with pytest.raises(RuntimeError, match=LEARNS):
        PPOPenalty.load(stock_file, policy_class=MlpPolicy, clip_range=None, target_kl=None)
    # The networks alone can be taken on purpose
    fixed.set_parameters({"policy": stock.policy.state_dict()}, exact_match=False)
    assert th.equal(fixed.policy.action_net.weight, stock.policy.action_net.weight)
    assert fixed.policy.covariance.item() == 0.5


def test_the_policy_that_is_named_takes_them(stock_file: Path) -> None:
    stock, kwargs = PPO.load(stock_file), {"learn_covariance": True}
    model = learning(policy_kwargs=kwargs)
    model.set_parameters(stock_file)
    own = {"clip_range": None, "target_kl": None}
    loaded = PPOPenalty.load(
        stock_file, pendulum(), custom_objects={"policy_class": MlpPolicy, "policy_kwargs": kwargs, **own}
    )
    safe = PPOPenalty.load_safe(stock_file, pendulum(), policy=MlpPolicy, policy_kwargs=kwargs, **own)
    for each in (model, loaded, safe):
        assert th.equal(each.policy.log_std, stock.policy.log_std)
        each.learn(16)


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_weights_with_a_fixed_covariance_name_the_policy_that_takes_them(policy: Any, penalty_file: Path) -> None:
    model = learning(policy, policy_kwargs={"learn_covariance": True} if policy == "MlpPolicy" else {})
    with pytest.raises(RuntimeError, match=FIXED):
        model.set_parameters(penalty_file)
    with pytest.raises(UnsafeFileError, match=FIXED):
        PPOPenalty.load_safe(penalty_file, pendulum(), policy=type(model.policy), policy_kwargs=model.policy_kwargs)


def test_other_mismatches_keep_torchs_words() -> None:
    model = learning()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.policy.load_state_dict({})
    result = model.policy.load_state_dict({"else": th.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["else"]
    narrower = learning(policy_kwargs={"net_arch": [4]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        narrower.set_parameters(model.get_parameters())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("kl_coef", {"kl_coef": zero}) for zero in (0, 0.0, np.float32(0), -0.0)),
        *(("kl_coef_bounds", {"kl_coef_bounds": bounds}) for bounds in [(0, 1), [0.0, 0.0], (0, 1e3)]),
        ("kl_coef", {"kl_coef": 0, "kl_coef_bounds": (0, 1)}),
    ],
)
def test_switching_the_penalty_off_is_the_clips_business(name: str, arguments: dict[str, Any], penalty_file: Path) -> None:
    sentence = f"`{name}` must be above 0: to train without the penalty take `PPOClip`, got"
    with pytest.raises(ValueError, match=sentence):
        learning(**arguments)
    with pytest.raises(ValueError, match=sentence):
        PPOPenalty.load(penalty_file, **arguments)
    with pytest.raises(UnsafeFileError, match=sentence):
        PPOPenalty.load_safe(penalty_file, pendulum(), **arguments)
    with pytest.raises(ValueError, match=sentence):
        MaskablePPOPenalty("MlpPolicy", masked(), **arguments)
