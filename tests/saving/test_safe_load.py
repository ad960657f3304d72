"""Files from strangers: ordinary models load as ever, all else is refused, nothing runs or is written, memory is bounded."""

import base64
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.save_util import data_to_json, json_to_data
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

import sb3_ppo_penalty
from sb3_ppo_penalty import ARTICLE_RECIPE, CnnPolicy, MlpPolicy, MultiInputPolicy, PPOClip, PPOPenalty, UnsafeFileError
from sb3_ppo_penalty.rollouts.reward_to_go import RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer
from sb3_ppo_penalty.saving.safe_load import BUFFERS, IGNORED, POLICIES, _class_among

TINY: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "device": "cpu"}
NET = {"net_arch": [4]}


class Simple(gym.Env):
    """Episodes of five steps over any spaces."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.random, self.steps = np.random.default_rng(0), 0

    def observe(self):
        self.observation_space.seed(int(self.random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        self.random, self.steps = np.random.default_rng(seed if seed is not None else self.random), 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(self.random.normal()), self.steps == 5, False, {}


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def two_dimensions() -> gym.Env:
    return Simple(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))


def pixels() -> gym.Env:
    return Simple(spaces.Box(0, 255, (36, 36, 1), np.uint8), spaces.Discrete(2))


def mixed() -> gym.Env:
    return Simple(spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(4)}), spaces.MultiBinary(2))


def train(algorithm, policy, env, **arguments):
    return algorithm(policy, env, **{**TINY, "seed": 3, "policy_kwargs": dict(NET), **arguments}).learn(32)


def saved(model) -> bytes:
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


@pytest.fixture(scope="module")
def env() -> DummyVecEnv:
    return DummyVecEnv([pendulum])


@pytest.fixture(scope="module")
def files() -> dict[type, bytes]:
    return {algorithm: saved(train(algorithm, "MlpPolicy", pendulum())) for algorithm in (PPOPenalty, PPOClip)}


@pytest.fixture(scope="module")
def file(files) -> bytes:
    return files[PPOPenalty]


def load(content: bytes, env, algorithm=PPOPenalty, **arguments):
    return algorithm.load_safe(io.BytesIO(content), env, device="cpu", **arguments)


def tensors_of(model) -> dict[str, th.Tensor]:
    states = model.policy.optimizer.state_dict()["state"]
    moments = {f"{index} {name}": tensor for index, state in states.items() for name, tensor in state.items()}
    return {**model.policy.state_dict(), **moments}


def numbers_of(model) -> dict[str, Any]:
    """Everything on the model that is a number, and the learning rate of the optimizer."""
    plain = {name: value for name, value in vars(model).items() if type(value) in (bool, int, float, tuple, type(None))}
    plain["lr"] = model.policy.optimizer.param_groups[0]["lr"]
    begun_anew = {
        "_compiler",
        "start_time",
        "tensorboard_log",
        "_last_obs",
        "_last_episode_starts",
        "ep_info_buffer",
        "ep_success_buffer",
    }
    return {name: value for name, value in plain.items() if name not in begun_anew}


def assert_equal(one, other) -> None:
    expected, found = tensors_of(one), tensors_of(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert th.equal(value, found[name]) if isinstance(value, th.Tensor) else value == found[name], name
    assert numbers_of(one) == numbers_of(other)


# Ordinary files


ORDINARY = {
    "penalty": (PPOPenalty, "MlpPolicy", pendulum, {"kl_coef": 3.0, "kl_coef_bounds": (0.5, 9.0)}),
    "penalty, clipped": (PPOPenalty, "MlpPolicy", pendulum, {"clip_range": 0.3, "clip_range_vf": 0.2}),
    "penalty, full covariance": (
        *(PPOPenalty, "MlpPolicy", two_dimensions),
        {"policy_kwargs": {"net_arch": {"pi": [4], "vf": [5, 3]}, "covariance": [[0.5, 0.1], [0.1, 0.3]]}},
    ),
    "a controller that remembers, a shaped penalty, a schedule": (
        *(PPOPenalty, "MlpPolicy", pendulum),
        {"kl_controller": "dual", "target_kl": LinearSchedule(0.02, 0.0, 1.0), "policy_kwargs": NET}
        | {"kl_penalty": {"direction": "symmetric", "cutoff_coef": 10, "per_state": True}, "max_ratio": 5},
    ),
    "a guard, gradients clipped apart": (
        *(PPOPenalty, "MlpPolicy", pendulum),
        {"guard": {"action": "rollback", "measure": "max"}, "max_grad_norm": (0.5, 5.0), "policy_kwargs": NET},
    ),
    "compiled": (PPOPenalty, "MlpPolicy", pendulum, {"compile": True, "kl_controller": "proportional", "policy_kwargs": NET}),
    "clip": (PPOClip, "MlpPolicy", pendulum, {}),
    "clip, learned covariance": (PPOClip, "MlpPolicy", pendulum, {"policy_kwargs": {"learn_covariance": True, **NET}}),
    "the article's recipe": (PPOClip, "MlpPolicy", pendulum, {**ARTICLE_RECIPE, "n_steps": 16, "batch_size": 16}),
    "SB3's policy, gSDE, schedules": (
        *(PPOClip, ActorCriticPolicy, pendulum),
        {
            "use_sde": True,
            "learning_rate": LinearSchedule(1e-3, 1e-5, 0.5),
            "clip_range": LinearSchedule(0.2, 0.1, 1.0),
            "policy_kwargs": {"activation_fn": nn.ELU, "log_std_init": -1, "full_std": False, **NET},
        },
    ),
    "images": (PPOClip, "CnnPolicy", pixels, {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 4}, **NET}}),
    "dicts": (PPOPenalty, "MultiInputPolicy", mixed, {"policy_kwargs": {"share_features_extractor": False, **NET}}),
    "dicts, the article's buffer": (
        *(PPOPenalty, "MultiInputPolicy", mixed),
        {"rollout_buffer_class": RewardToGoDictRolloutBuffer},
    ),
    "another optimizer": (
        *(PPOPenalty, "MlpPolicy", pendulum),
        {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"betas": (0.8, 0.9), "amsgrad": True}}},
    ),
    "SB3's optimizer, which counts in plain numbers": (
        *(PPOPenalty, "MlpPolicy", pendulum),
        {"policy_kwargs": {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.9}, **NET}},
    ),
    "an optimizer without moments": (
        *(PPOPenalty, "MlpPolicy", pendulum),
        {"learning_rate": 1e-2, "policy_kwargs": {"optimizer_class": th.optim.SGD, **NET}},
    ),
}


#: The compiler takes seconds
CASES = [pytest.param(name, marks=pytest.mark.slow) if name == "compiled" else name for name in ORDINARY]


@pytest.mark.parametrize("name", CASES)
def test_ordinary_file_predicts_and_learns_on_as_with_load(name: str) -> None:
    algorithm, policy, make, arguments = ORDINARY[name]
    trained = train(algorithm, policy, make(), **arguments)
    content = saved(trained)
    usual = algorithm.load(io.BytesIO(content), env=make(), device="cpu")
    safe = load(content, make(), algorithm)
    assert_equal(trained, safe)
    assert_equal(usual, safe)
    assert type(safe.policy) is type(usual.policy)
    assert safe.rollout_buffer_class is usual.rollout_buffer_class
    observations = [make().observation_space.sample() for _ in range(5)]
    for observation in observations:
        actions = [model.predict(observation, deterministic=True)[0] for model in (usual, safe)]
        np.testing.assert_array_equal(*actions)
    # Loading seeds the global generators: each model continues right after it was loaded
    continued = [
        loader(io.BytesIO(content), env=make(), device="cpu").learn(32, reset_num_timesteps=False)
        for loader in (algorithm.load, algorithm.load_safe)
    ]
    assert continued[1].num_timesteps == 64
    assert_equal(*continued)
    assert not th.equal(next(continued[1].policy.parameters()), next(safe.policy.parameters()))


def test_the_controllers_memory_comes_along() -> None:
    model = train(PPOPenalty, "MlpPolicy", pendulum(), kl_controller="dual")
    safe = load(saved(model), pendulum())
    assert safe.kl_controller == model.kl_controller
    assert safe.kl_controller.steps == 2
    assert safe.kl_penalty == model.kl_penalty


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("kl_penalty", {"direction": "sideways"}),
        ("kl_penalty", {"cutoff_coef": "1"}),
        ("kl_penalty", {"own": 1}),
        ("kl_penalty", {":type:": "<class 'os.system'>"}),
        ("kl_controller", {"steps": 1.5}),
        ("kl_controller", {"mean": float("inf")}),
        ("kl_controller", {"mean": [1.0]}),
        ("kl_controller", {"learning_rate": -1.0}),
    ],
)
def test_objects_with_other_fields_are_refused(name: str, fields: dict[str, Any], env) -> None:
    content = saved(train(PPOPenalty, "MlpPolicy", pendulum(), kl_controller="dual"))
    entry = json.loads(members(content)["data"])[name]
    load(edited(content, **{name: entry}), env)
    with pytest.raises(UnsafeFileError, match=r"kl_|Infinity"):
        load(edited(content, **{name: {**entry, **fields}}), env)


def test_live_state_comes_along() -> None:
    model = train(PPOPenalty, "MlpPolicy", pendulum(), target_kl=10.0, kl_coef_factor=4.0)
    model._saturated_updates = 7
    safe = load(saved(model), pendulum())
    # Two updates of two epochs over 16 steps, each far below the target
    assert (safe.num_timesteps, safe._n_updates, safe._saturated_updates, safe.kl_coef) == (32, 4, 7, 1 / 16)


def test_model_that_has_not_learned_yet() -> None:
    model = PPOClip("MlpPolicy", pendulum(), **TINY)
    assert_equal(model, load(saved(model), pendulum(), PPOClip))


def test_without_a_seed_the_same_random_numbers_are_drawn_as_by_load() -> None:
    content = saved(train(PPOPenalty, "MlpPolicy", pendulum(), seed=None))
    states = []
    for loader in (PPOPenalty.load, PPOPenalty.load_safe):
        th.manual_seed(5)
        np.random.seed(6)
        random.seed(7)
        loader(io.BytesIO(content), env=pendulum(), device="cpu")
        states.append((th.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert states[0] == states[1]


def test_file_of_stock_ppo(env) -> None:
    model = PPO("MlpPolicy", pendulum(), seed=3, policy_kwargs=NET, **TINY).learn(32)
    safe = load(saved(model), env, PPOClip)
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, safe.policy.state_dict()[name])


def test_weights_from_a_gpu(file: bytes, env) -> None:
    """Storages say where they were: "cuda:0" in a file from a GPU."""
    on_gpu = in_pickle(file, "policy.pth", lambda text: text.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert on_gpu != file
    model = load(on_gpu, env)
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}
    assert_equal(load(file, env), model)


def test_paths_and_files_as_load_takes_them(file: bytes, env, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(file)
    expected = load(file, env)
    for place in (path, str(path), tmp_path / "model", str(tmp_path / "model")):
        assert_equal(expected, PPOPenalty.load_safe(place, env, "cpu"))
    with path.open("rb") as opened:
        assert_equal(expected, PPOPenalty.load_safe(opened, "Pendulum-v1", "cpu"))
        assert not opened.closed
    with pytest.raises(FileNotFoundError):
        PPOPenalty.load_safe(tmp_path / "another", env)
    with pytest.raises(TypeError, match="invalid type"):
        PPOPenalty.load_safe(3, env)


def test_packed_again_with_compression(file: bytes, env) -> None:
    assert_equal(load(file, env), load(packed(members(file), zipfile.ZIP_DEFLATED), env))


# What is in the file and what is passed


class OwnPolicy(ActorCriticPolicy):
    """Somebody's own."""


class Halved(nn.Module):
    """Somebody's own."""

    def forward(self, x):
        return x / 2


def test_arguments_replace_what_the_file_says(file: bytes, env) -> None:
    model = load(file, env, learning_rate=1e-5, kl_coef=2.5, n_steps=32, verbose=0, tensorboard_log="logs", seed=9)
    assert (model.learning_rate, model.kl_coef, model.n_steps, model.tensorboard_log, model.seed) == (1e-5, 2.5, 32, "logs", 9)
    assert model.rollout_buffer.buffer_size == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", lambda progress: 1e-3 * progress),
        ("clip_range", lambda progress: 0.1),
        ("kl_controller", lambda reading: 2.0),
        ("policy", OwnPolicy),
        ("policy_kwargs", {**NET, "activation_fn": Halved}),
    ],
)
def test_what_only_a_pickle_holds_is_refused_by_name_and_can_be_passed(name: str, value: Any, env) -> None:
    arguments = {"policy": "MlpPolicy", "policy_kwargs": NET, **TINY, "seed": 3, name: value}
    model = PPOPenalty(env=pendulum(), **arguments).learn(32)
    entry = {"policy": "policy_class", "policy_kwargs": r"policy_kwargs\['activation_fn'\]"}.get(name, name)
    with pytest.raises(UnsafeFileError, match=rf"^`{entry}` must be .*`{name}`"):
        load(saved(model), env)
    safe = load(saved(model), env, **{name: value})
    assert_equal(model, safe)


def test_unknown_argument(file: bytes, env) -> None:
    with pytest.raises(TypeError, match=r"PPOPenalty\.load_safe.*beta"):
        load(file, env, beta=1)
    with pytest.raises(TypeError, match=r"PPOClip\.load_safe.*kl_coef"):
        load(file, env, PPOClip, kl_coef=1)


@pytest.mark.parametrize(("name", "value"), [("max_bytes", 0), ("max_bytes", 1.5), ("env", None), ("gamma", 2)])
def test_wrong_arguments(name: str, value: Any, file: bytes, env) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        PPOPenalty.load_safe(io.BytesIO(file), **{"env": env, name: value})


def test_folder_for_logs_is_not_the_files_to_choose(file: bytes, env) -> None:
    assert load(edited(file, tensorboard_log="/somewhere"), env).tensorboard_log is None


def test_another_environment(file: bytes) -> None:
    with pytest.raises(UnsafeFileError, match=r"`policy\.pth: covariance` must be left out"):
        load(file, "CartPole-v1")
    with pytest.raises(UnsafeFileError, match=r"`policy\.pth: covariance` must be torch.float32 of shape \(2,\), got .*1"):
        load(file, two_dimensions())


@pytest.mark.parametrize(
    "known",
    [
        *(ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy),
        *(RolloutBuffer, DictRolloutBuffer, RewardToGoRolloutBuffer, RewardToGoDictRolloutBuffer),
    ],
)
def test_known_classes_are_recognised_by_what_sb3_writes_beside_them(known: type) -> None:
    texts = json.loads(data_to_json({"it": known}), object_pairs_hook=sb3_ppo_penalty.saving.safe_archive._json_object)["it"]
    assert _class_among([*POLICIES, *BUFFERS], "it", texts) is known


# Tools to forge files with


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


def edited(content: bytes, **entries: Any) -> bytes:
    """The same file with other values in its JSON."""
    return with_text(content, json.dumps({**json.loads(members(content)["data"]), **entries}))


def with_text(content: bytes, text: str) -> bytes:
    return packed({**members(content), "data": text.encode()})


def in_pickle(content: bytes, name: str, edit) -> bytes:
    """The same file with another pickle in its tensors."""
    outer = members(content)
    inner = members(outer[name])
    return packed({**outer, name: packed({**inner, "archive/data.pkl": edit(inner["archive/data.pkl"])})})


def with_state(content: bytes, name: str, edit) -> bytes:
    """The same file with other tensors, saved by torch."""
    outer = members(content)
    state = th.load(io.BytesIO(outer[name]))
    edit(state)
    file = io.BytesIO()
    th.save(state, file)
    return packed({**outer, name: file.getvalue()})


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path, **texts: Any) -> dict[str, Any]:
    return {":type:": "x", ":serialized:": base64.b64encode(pickle.dumps(Payload(marker))).decode(), **texts}


FIELDS = sorted(json.loads(members(saved(PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=NET, **TINY)))["data"]))
NEW_FIELDS = ["policy", "env", "device", "_logger", "__class__", "__dict__", "learn", "anything"]


# Pickles


@pytest.mark.parametrize("field", [*FIELDS, *NEW_FIELDS])
def test_pickle_in_every_field(field: str, file: bytes, env, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    forged = edited(file, **{field: pickled(marker)})
    if field in IGNORED:
        assert_equal(load(file, env), load(forged, env))
    else:
        with pytest.raises(UnsafeFileError, match=rf"`{field}` must be"):
            load(forged, env)
    assert list(tmp_path.iterdir()) == []
    json_to_data(members(forged)["data"].decode())  # what `load` begins with
    assert marker.exists()


@pytest.mark.parametrize(
    "place",
    [
        {"policy_kwargs": {"net_arch": "HERE"}},
        {"policy_kwargs": {"net_arch": ["HERE"]}},
        {"policy_kwargs": {"net_arch": {"pi": "HERE"}}},
        {"policy_kwargs": {"covariance": ["HERE"]}},
        {"policy_kwargs": {"optimizer_kwargs": "HERE"}},
        {"policy_kwargs": {"optimizer_kwargs": {"eps": "HERE"}}},
        {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": "HERE"}}},
        {"policy_kwargs": {"activation_fn": "HERE"}},
        {"rollout_buffer_kwargs": {"gamma": "HERE"}},
        {"kl_coef_bounds": ["HERE", 1]},
    ],
    ids=str,
)
def test_pickle_deep_inside(place: dict[str, Any], file: bytes, env, tmp_path: Path) -> None:
    here = json.dumps(pickled(tmp_path / "marker"))
    forged = edited(file, **json.loads(json.dumps(place).replace('"HERE"', here)))
    with pytest.raises(UnsafeFileError, match=f"`{next(iter(place))}"):
        load(forged, env)
    assert list(tmp_path.iterdir()) == []


def test_pickle_that_calls_itself_a_known_class_is_dropped(file: bytes, env, tmp_path: Path) -> None:
    entry = json.loads(members(file)["data"])["policy_class"]
    forged = edited(file, policy_class={**entry, ":serialized:": pickled(tmp_path / "marker")[":serialized:"]})
    assert_equal(load(file, env), load(forged, env))
    assert list(tmp_path.iterdir()) == []


class System:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["policy.pth", "policy.optimizer.pth"])
@pytest.mark.parametrize("kind", ["value", "metadata", "storage", "raw", "legacy", "protocol 4"])
def test_pickle_in_the_tensors(name: str, kind: str, file: bytes, env, tmp_path: Path, monkeypatch) -> None:
    # Even where torch is told to trust every file
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    payload, out = System(tmp_path / "marker"), io.BytesIO()
    state = OrderedDict(weight=th.zeros(1))
    if kind == "metadata":
        state.__dict__["_metadata"] = payload
    else:
        state["payload"] = payload
    if kind == "raw":
        pickle.dump(state, out)
    elif kind == "storage":
        out.write(packed({"archive/data.pkl": b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstQ.", "archive/version": b"3\n"}))
    else:
        th.save(state, out, _use_new_zipfile_serialization=kind != "legacy", pickle_protocol=4 if kind == "protocol 4" else 2)
    with pytest.raises(UnsafeFileError, match=re.escape(name)):
        load(packed({**members(file), name: out.getvalue()}), env)
    assert list(tmp_path.iterdir()) == []


# Archives


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "..\\evil",
        "/tmp/evil",
        "C:\\evil",
        "folder/",
        "data/../x",
        "./data",
        "data\0",
        "DATA",
        "evil.pth",
        "x" * 999,
    ],
)
def test_names_that_save_does_not_write(name: str, file: bytes, env, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    forged = packed({**members(file), "?" * len(name.encode()): b"evil"}).replace(b"?" * len(name.encode()), name.encode())
    with pytest.raises(UnsafeFileError) as refusal:
        load(forged, env)
    assert str(refusal.value).startswith(f"`{name[:300].replace(chr(0), '?')}` must be left out")
    inner = packed({**members(members(file)["policy.pth"]), "archive/data/" + name: b"evil"})
    with pytest.raises(UnsafeFileError, match=r"^`policy.pth/archive/data/"):
        load(packed({**members(file), "policy.pth": inner}), env)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["data", "policy.pth", "system_info.txt"])
def test_name_that_occurs_twice(name: str, file: bytes, env) -> None:
    out = io.BytesIO(file)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(name, archive.read(name))
    with pytest.raises(UnsafeFileError, match=f"`{name}` must be in the file once"):
        load(out.getvalue(), env)


@pytest.mark.parametrize("name", ["data", "policy.pth", "policy.optimizer.pth"])
def test_missing_member(name: str, file: bytes, env) -> None:
    rest = {other: content for other, content in members(file).items() if other != name}
    with pytest.raises(UnsafeFileError, match=f"`{name}` must be in the file"):
        load(packed(rest), env)


def test_members_that_are_not_needed(file: bytes, env) -> None:
    needed = {
        name: content for name, content in members(file).items() if name in ("data", "policy.pth", "policy.optimizer.pth")
    }
    assert_equal(load(file, env), load(packed(needed), env))


def test_variables_are_not_read(file: bytes, env, tmp_path: Path) -> None:
    forged = packed({**members(file), "pytorch_variables.pth": pickle.dumps(Payload(tmp_path / "marker"))})
    assert_equal(load(file, env), load(forged, env))
    assert list(tmp_path.iterdir()) == []


def test_encrypted_member(file: bytes, env) -> None:
    start = file.rindex(b"PK\x01\x02")  # the directory's entry of system_info.txt
    flagged = file[: start + 8] + b"\x01" + file[start + 9 :]
    with pytest.raises(UnsafeFileError, match=r"`system_info\.txt` must be readable"):
        load(flagged, env)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_of_compression_that_save_does_not_use(method: int, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match="`data` must be packed by"):
        load(packed(members(file), method), env)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a zip", packed({}), b"PK\x05\x06" + b"\0" * 18, b"PK\x05\x06" + b"\xff" * 18]
)
def test_no_model_at_all(content: bytes, env) -> None:
    with pytest.raises(UnsafeFileError):
        load(content, env)


def test_size_limit_is_a_parameter(file: bytes, env) -> None:
    size = sum(len(content) for content in members(file).values())
    load(file, env, max_bytes=size)
    with pytest.raises(UnsafeFileError, match=f"got {size}"):
        load(file, env, max_bytes=size - 1)


def test_message_does_not_pass_on_control_characters(file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError) as refusal:
        load(edited(file, **{"\x1b[2J\n\ud800": 1}), env)
    assert str(refusal.value).startswith("`?[2J??` must be left out")


@pytest.mark.parametrize("value", ["x" * 100_000, [[[[[[0] * 6] * 6] * 6] * 6] * 6] * 6], ids=["text", "lists"])
def test_message_shows_only_the_beginning_of_a_value(value: Any, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match=r"^`gamma` must be ") as refusal:
        load(edited(file, gamma=value), env)
    assert len(str(refusal.value)) < 400


# Values


@pytest.mark.parametrize(
    ("entry", "values"),
    {
        "num_timesteps": ["x", -1, 1.5, True, None, [], {}, [1], 2**63],
        "_total_timesteps": ["x", -1],
        "_num_timesteps_at_start": ["x", -1],
        "_n_updates": ["x", -1, 0.5, False],
        "_episode_num": [None],
        "_saturated_updates": [-1, "3"],
        "_current_progress_remaining": ["x", float("inf"), None, False],
        "start_time": ["x", float("inf"), None],
        "learning_rate": ["x", -1, True, float("inf"), [], {}, None],
        "clip_range": ["x", 0, -0.2, [0.1], {}, True],
        "clip_range_vf": ["x", 0, float("inf")],
        "n_steps": ["x", 0, -5, 16.0, None, True, 2**40],
        "batch_size": ["x", 1, 0, None, 8.0],
        "n_epochs": [0, None, 1.5],
        "gamma": [-0.1, 1.1, "x", None],
        "gae_lambda": [2, [0.9]],
        "ent_coef": [-1, "x", float("inf")],
        "vf_coef": [-1, None],
        "max_grad_norm": [0, "x", -float("inf")],
        "normalize_advantage": [1, None, "true"],
        "use_sde": [0, None, "x"],
        "sde_sample_freq": [-2, 0.5],
        "target_kl": [0, -1, "x"],
        "verbose": [-1, 3, True, "x", None],
        "seed": [-1, 2**32, 1.0, "x", True],
        "_stats_window_size": ["x"],
        "kl_coef": [0, 1e9, "x", None, True],
        "kl_coef_bounds": [[1], [2, 1], [0, 1], "x", None, [1, 2, 3], 3],
        "kl_coef_factor": [1, 0.5, "x", float("inf")],
        "kl_min": [-1, 5, "x"],
        "kl_max": [0, "x"],
        "rollout_buffer_class": [3, "RolloutBuffer", {"__module__": "os"}],
        "rollout_buffer_kwargs": [{"gamma": 1}, [1], "x"],
        "policy_class": [None, "MlpPolicy", {"__module__": "sb3_ppo_penalty.policies.policies", "__doc__": "x"}],
        "policy_kwargs": ["x", [1], 3],
        "n_envs_": [1],
        "_custom_logger": [False],
        "device": ["cpu"],
        "train": [0],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_value_of_the_wrong_type_or_range_is_refused_by_name(entry: str, values: list[Any], file: bytes, env) -> None:
    for value in values:
        with pytest.raises(UnsafeFileError) as refusal:
            load(edited(file, **{entry: value}), env)
        where = "data" if value == 2**63 else entry
        assert re.search(rf"`{where}` must be", str(refusal.value)), (value, str(refusal.value))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "net_arch": ["x", [0], [-4], [4.0], [True], [[4]], {"pi": [4], "q": [4]}, {"pi": {"pi": [4]}}, [4] * 101, 4],
        "ortho_init": [0, "x", None],
        "log_std_init": ["x", None, [0], float("inf")],
        "covariance": ["x", [True], [{}], [[["x"]]], {"a": 1}],
        "activation_fn": ["os.system", "<class 'os.system'>", "Tanh", 3, None],
        "optimizer_class": ["<class 'torch.optim.lbfgs.LBFGS'>"],
        "features_extractor_class": ["<class 'stable_baselines3.common.torch_layers.NatureCNN'> "],
        "optimizer_kwargs": [[1], "x", {"eps": "x"}, {"eps": {"a": 1}}, {"betas": list(range(9))}],
        "features_extractor_kwargs": ["x", {"features_dim": [True]}],
        "device": ["cpu"],
        "use_sde": [True],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policy_kwargs_of_the_wrong_type_are_refused_by_name(name: str, values: list[Any], file: bytes, env) -> None:
    for value in values:
        with pytest.raises(UnsafeFileError, match=rf"^`policy_kwargs\['{name}'\]"):
            load(edited(file, policy_kwargs={**NET, name: value}), env)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("covariance", -1),
        ("covariance", [1.0, 1.0]),
        ("covariance", [[1.0], 1.0]),
        ("log_std_init", 1000),
        ("optimizer_kwargs", {"lr": 1.0}),
        ("optimizer_kwargs", {"betas": [0.9, 2.0]}),
        ("optimizer_kwargs", {"betas": [0.9, 0.9]}),
        ("optimizer_kwargs", {"params": [1]}),
        ("optimizer_kwargs", {"unknown": 1}),
        ("features_extractor_kwargs", {"unknown": 1}),
        ("features_extractor_class", "<class 'stable_baselines3.common.torch_layers.NatureCNN'>"),
        ("squash_output", True),
        ("net_arch", [5]),
        ("net_arch", []),
    ],
)
def test_policy_kwargs_that_make_no_policy_or_another_one(name: str, value: Any, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError):
        load(edited(file, policy_kwargs={**NET, name: value}), env)


def test_constant_schedules_are_numbers(env) -> None:
    arguments = {"learning_rate": ConstantSchedule(1e-3), "clip_range": float("inf"), "clip_range_vf": ConstantSchedule(0.5)}
    model = load(saved(train(PPOClip, "MlpPolicy", pendulum(), **arguments)), env, PPOClip)
    assert model.learning_rate == 1e-3
    assert (model.lr_schedule(0.3), model.clip_range(0.3), model.clip_range_vf(0.3)) == (1e-3, float("inf"), 0.5)


@pytest.mark.parametrize(
    "text",
    [
        *("LinearSchedule(start=1, end=0, end_fraction=0)", "LinearSchedule(start=-1, end=0, end_fraction=1)"),
        *(
            "ConstantSchedule(val=nan)",
            "ConstantSchedule(val=__import__('os'))",
            "ConstantSchedule(val=1..2)",
            "<function f>",
            "",
        ),
        *("ConstantSchedule(val=-0.1)", "ConstantSchedule(val=1e999)", f"ConstantSchedule(val={'1' * 400})"),
    ],
)
def test_schedules_that_are_none(text: str, file: bytes, env) -> None:
    entry = {":type:": "<class 'stable_baselines3.common.utils.FloatSchedule'>", ":serialized:": "", "value_schedule": text}
    with pytest.raises(UnsafeFileError, match="`clip_range`"):
        load(edited(file, clip_range=entry), env)
    kind = {":type:": "<class 'stable_baselines3.common.utils.LinearSchedule'>", ":serialized:": "", "start": text, "end": 1}
    with pytest.raises(UnsafeFileError, match="`learning_rate`"):
        load(edited(file, learning_rate=kind), env)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": "Expecting value",
        "[]": "object",
        "3": "object",
        '{":serialized:": "x"}': "object",
        '{"gamma": NaN}': "numbers",
        '{"gamma": 1e999}': "a float can hold",
        '{"gamma": -1e999}': "a float can hold",
        '{"seed": 1%s}' % ("0" * 5000): "64 bits",
        '{"seed": -9223372036854775808}': "64 bits",
        '{"seed": 1, "seed": 2}': "`seed` must be in the file once",
        '{"seed": 1': "delimiter",
        '{"seed": 1}}': "Extra data",
        "[" * 90_000: "RecursionError",
        '{"a":' * 40_000: "RecursionError",
        "[" + "[]," * 60_000 + "[]]": "parts",
        "{" + ",".join(f'"{index}":1' for index in range(110_000)) + "}": "parts",
    }.items(),
    ids=lambda value: value[:20],
)
def test_json_that_is_none_or_too_much(text: str, message: str, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match=message):
        load(with_text(file, text), env)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x80", b'{"a": "\xc3"}', '{"a": "é"}'.encode(), b"\0"])
def test_json_that_is_no_text(content: bytes, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match="`data` cannot be used"):
        load(packed({**members(file), "data": content}), env)


def test_entries_that_are_missing_are_the_defaults_of_the_algorithm(file: bytes, env) -> None:
    entries = json.loads(members(file)["data"])
    shorter = {name: value for name, value in entries.items() if name not in ("n_steps", "gae_lambda", "_n_updates")}
    model = load(with_text(file, json.dumps({**shorter, "policy_kwargs": NET, "batch_size": 64})), env)
    assert (model.n_steps, model.gae_lambda, model._n_updates) == (2048, 0.95, 0)
    with pytest.raises(UnsafeFileError, match="`policy_class` must be in the file, or passed as `policy`"):
        load(with_text(file, json.dumps({name: entries[name] for name in entries if name != "policy_class"})), env)
    # Two networks of 64 and 64 units do not come from a file of two times 4
    with pytest.raises(UnsafeFileError, match="`policy_kwargs` must be such that the policy is of the size"):
        load(edited(file, policy_kwargs=None), env)


def test_number_of_episodes_in_the_statistics(file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match="`stats_window_size` must be"):
        load(edited(file, _stats_window_size=0), env)


def test_infinity_is_a_number_where_it_means_no_clipping(file: bytes, env) -> None:
    assert load(edited(file, max_grad_norm=float("inf")), env).max_grad_norm == float("inf")


# Tensors


WEIGHT = "mlp_extractor.policy_net.0.weight"


def broken_weights() -> dict[str, Any]:
    def replace(tensor):
        return lambda state: state.update({WEIGHT: tensor})

    return {
        "missing": lambda state: state.pop(WEIGHT),
        "additional": lambda state: state.update(more=th.zeros(1)),
        "renamed": lambda state: state.update({"more": state.pop(WEIGHT)}),
        "shape": replace(th.zeros(3, 4)),
        "scalar": replace(th.tensor(0.0)),
        "empty": replace(th.zeros(0)),
        "type": replace(th.zeros(4, 3, dtype=th.float64)),
        "integers": replace(th.zeros(4, 3, dtype=th.int64)),
        "nan": replace(th.full((4, 3), th.nan)),
        "one infinity": lambda state: state[WEIGHT][1].fill_(th.inf),
        "no tensor": replace(3.0),
        "None": replace(None),
        "list": replace([[0.0] * 3] * 4),
        "parameter": replace(nn.Parameter(th.zeros(4, 3))),
        "sparse": replace(th.zeros(4, 3).to_sparse()),
        "meta": replace(th.zeros(4, 3, device="meta")),
        "huge by stride": replace(th.zeros(1).expand(10**9, 10**3)),
        "name is a number": lambda state: state.update({3: th.zeros(1)}),
        "covariance below zero": lambda state: state["covariance"].fill_(-1),
        "covariance of zero": lambda state: state["covariance"].fill_(0),
    }


@pytest.mark.parametrize("name", broken_weights())
def test_weights_that_do_not_fit(name: str, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match=r"^`policy\.pth"):
        load(with_state(file, "policy.pth", broken_weights()[name]), env)


@pytest.mark.parametrize("value", [[1], 3, None, {}, th.zeros(2)], ids=repr)
def test_weights_of_another_kind(value: Any, file: bytes, env) -> None:
    out = io.BytesIO()
    th.save(value, out)
    for name in ("policy.pth", "policy.optimizer.pth"):
        with pytest.raises(UnsafeFileError, match=rf"`{re.escape(name)}"):
            load(packed({**members(file), name: out.getvalue()}), env)


def test_views_and_shared_storages_become_tensors_of_their_own(file: bytes, env) -> None:
    """One number seen twelve times by its strides, and one storage under two names."""

    def share(state) -> None:
        state[WEIGHT] = th.ones(1).expand(4, 3)
        state["mlp_extractor.value_net.0.weight"] = state[WEIGHT]
        state["action_net.weight"] = th.ones(1, 4).requires_grad_()

    policy = load(with_state(file, "policy.pth", share), env).policy
    pi, vf = policy.mlp_extractor.policy_net[0].weight, policy.mlp_extractor.value_net[0].weight
    assert pi.is_contiguous()
    assert pi.untyped_storage().nbytes() == 48
    with th.no_grad():
        pi[0, 0] = 5.0
    assert pi.sum().item() == 16.0
    assert vf.sum().item() == 12.0


def broken_moments() -> dict[str, Any]:
    def group(**settings):
        return lambda state: state["param_groups"][0].update(settings)

    def moment(name, value):
        return lambda state: state["state"][0].update({name: value})

    first = (4, 3)
    return {
        "no groups": lambda state: state.update(param_groups=[]),
        "two groups": lambda state: state["param_groups"].append(state["param_groups"][0]),
        "group is a number": lambda state: state.update(param_groups=[3]),
        "no state": lambda state: state.pop("state"),
        "additional": lambda state: state.update(more=1),
        "no lr": lambda state: state["param_groups"][0].pop("lr"),
        "lr is a text": group(lr="x"),
        "lr below zero": group(lr=-1.0),
        "lr nan": group(lr=float("nan")),
        "lr a tensor": group(lr=th.tensor(1.0)),
        "betas": group(betas=(0.5, 0.999)),
        "betas a text": group(betas="x"),
        "eps": group(eps=0.0),
        "params": group(params=[0, 0]),
        "more settings": group(more=1),
        "amsgrad": group(amsgrad=1.5),
        "state for no parameter": lambda state: state["state"].update({99: state["state"][0]}),
        "state under a text": lambda state: state["state"].update(a=state["state"][0]),
        "state is a list": lambda state: state.update(state=[1]),
        "moments are a number": lambda state: state["state"].update({0: 3}),
        "a moment missing": lambda state: state["state"][0].pop("exp_avg_sq"),
        "a moment more": moment("more", th.zeros(first)),
        "shape": moment("exp_avg", th.zeros(3, 4)),
        "nan": moment("exp_avg", th.full(first, th.nan)),
        "square below zero": moment("exp_avg_sq", th.full(first, -1.0)),
        "step below zero": moment("step", th.tensor(-1.0)),
        "step infinite": moment("step", th.tensor(th.inf)),
        "step a number": moment("step", 3),
    }


@pytest.mark.parametrize("name", broken_moments())
def test_optimizer_that_does_not_fit(name: str, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match=r"^`policy\.optimizer\.pth"):
        load(with_state(file, "policy.optimizer.pth", broken_moments()[name]), env)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(b"_rebuild_tensor_v2", b"_rebuild_parameter"),
        lambda text: text.replace(b"torch._utils\n_rebuild_tensor_v2", b"builtins\nbytearray"),
        lambda text: text.replace(b"FloatStorage", b"ComplexFloatStorage"),
        lambda text: text.replace(b"\x80\x02", b"\x80\x04"),
        lambda text: text[:-1],
        lambda text: text.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),
        lambda text: b"\x80\x02h\x07.",
        lambda text: b"\x80\x02\x93.",
        lambda text: b"\x80\x02.",
        lambda text: b"",
        # The offset and the size of a view, beyond the storage
        lambda text: text.replace(b"QK\x00K\x01\x85", b"QK\x00K\xff\x85"),
        lambda text: text.replace(b"QK\x00K\x01\x85", b"QK\xffK\x01\x85"),
    ],
)
def test_pickles_that_torch_does_not_write(edit, file: bytes, env) -> None:
    forged = in_pickle(file, "policy.pth", edit)
    assert forged != file
    with pytest.raises(UnsafeFileError, match=r"`policy\.pth"):
        load(forged, env)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(b"cpuq\x07K\x01t", b"cpuq\x07K\xfft"),
        lambda text: text.replace(b"cpuq\x07K\x01t", b"cpuq\x07K\x00t"),
        lambda text: text.replace(b"cpuq\x07K\x01t", b"cpuq\x07Nt"),
        lambda text: text.replace(b"torch\nFloatStorage", b"torch\nDoubleStorage"),
        lambda text: text.replace(b"X\x01\x00\x00\x000", b"X\x02\x00\x00\x0099"),
        lambda text: text.replace(b"X\x01\x00\x00\x000", b"K\x00"),
    ],
)
def test_storages_of_another_size_than_their_records(edit, file: bytes, env) -> None:
    with pytest.raises(UnsafeFileError, match=r"`policy\.pth/archive/data\.pkl` must be .* sizes of their records"):
        load(in_pickle(file, "policy.pth", edit), env)


def test_other_order_of_bytes(file: bytes, env) -> None:
    inner = {**members(members(file)["policy.pth"]), "archive/byteorder": b"big"}
    with pytest.raises(UnsafeFileError, match="byteorder"):
        load(packed({**members(file), "policy.pth": packed(inner)}), env)
    del inner["archive/byteorder"]  # as versions of torch before 2.1 wrote it
    assert_equal(load(file, env), load(packed({**members(file), "policy.pth": packed(inner)}), env))


# Bombs


def zeros(compressed_name: str, contents: dict[str, bytes]) -> bytes:
    """An archive with a member of 128 MiB, packed into half a megabyte."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        info = zipfile.ZipInfo(compressed_name)
        info.compress_type, info._compresslevel = zipfile.ZIP_DEFLATED, 1
        with archive.open(info, "w") as member:
            for _ in range(128):
                member.write(b" " * 2**20)
    return out.getvalue()


def claims(content: bytes, name: str, size: int) -> bytes:
    """The same archive, whose directory and header state another size for a member."""
    start, directory = content.index(name.encode()), content.rindex(name.encode())
    forged = bytearray(content)
    struct.pack_into("<L", forged, start - 30 + 22, size)
    struct.pack_into("<L", forged, directory - 46 + 24, size)
    return bytes(forged)


def bombs(file: bytes) -> dict[str, tuple[bytes, str]]:
    """Files, and the entry that each is refused for."""
    outer = members(file)
    rest = {name: content for name, content in outer.items() if name != "data"}
    weights = {name: content for name, content in outer.items() if name != "policy.pth"}
    inner = members(outer["policy.pth"])
    deep = b"\x80\x02}(" + b")" + b"\x85" * 500_000 + b"K\x01u."
    storages = {**inner, **{f"archive/data/{index}": b"" for index in range(100, 40_000)}}
    return {
        "packed data": (zeros("data", rest), "data"),
        "packed data that says it is small": (claims(zeros("data", rest), "data", 100), "data"),
        "packed weights": (zeros("policy.pth", weights), "policy.pth"),
        "packed record": (packed({**outer, "policy.pth": zeros("archive/data/99", inner)}), "policy.pth/archive/data/99"),
        "many members": (packed({**outer, **{f"{index}": b"" for index in range(40_000)}}), "directory"),
        "many records": (packed({**outer, "policy.pth": packed(storages)}), "directory"),
        "bytes by a call": (
            in_pickle(file, "policy.pth", lambda _: b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x40\x85R."),
            "policy.pth",
        ),
        "deep tuple as a key": (in_pickle(file, "policy.pth", lambda _: deep), "policy.pth"),
        "many lists": (in_pickle(file, "policy.pth", lambda _: b"\x80\x02" + b"]" * 500_000 + b"."), "policy.pth"),
        "many numbers": (in_pickle(file, "policy.pth", lambda _: b"\x80\x02" + b"K\xff" * 250_000 + b"."), "policy.pth"),
        "large pickle": (in_pickle(file, "policy.pth", lambda _: b"\x80\x02" + b"N" * 2**21 + b"."), "policy.pth"),
        "view beyond the file": (with_state(file, "policy.pth", broken_weights()["huge by stride"]), "policy.pth"),
        "deep JSON": (with_text(file, "[" * 99_000), "data"),
        "JSON of many parts": (with_text(file, "[" + "{}," * 10**6 + "{}]"), "data"),
        "steps": (edited(file, n_steps=10**12), "n_steps"),
        "layers": (edited(file, policy_kwargs={"net_arch": [10**5, 10**5]}), "policy_kwargs"),
        "one layer": (edited(file, policy_kwargs={"net_arch": [10**12]}), "data"),
        "many layers": (edited(file, policy_kwargs={"net_arch": [1] * 50_000}), "policy_kwargs"),
    }


MEASURE = """
import json, pathlib, sys
from sb3_ppo_penalty import PPOPenalty, UnsafeFileError

def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

def growth(run):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = peak()
    result = run()
    return peak() - before, result

def refusal(path):
    try:
        PPOPenalty.load_safe(path, "Pendulum-v1", "cpu", max_bytes=2**23)
    except UnsafeFileError as error:
        return str(error)

folder = pathlib.Path(sys.argv[1])
PPOPenalty.load_safe(folder / "ordinary", "Pendulum-v1", "cpu")
found = {path.stem: growth(lambda: refusal(path)) for path in sorted(folder.glob("*.bomb"))}
print(json.dumps([growth(lambda: len(bytearray(2**27))), found]))
"""


def test_bombs_are_refused_within_bounded_memory(file: bytes, tmp_path: Path) -> None:
    """In a process of its own, whose largest resident set the kernel keeps, in MiB; the first bombs unpack to 128."""
    (tmp_path / "ordinary").write_bytes(file)
    forged = bombs(file)
    for name, (content, _) in forged.items():
        (tmp_path / f"{name}.bomb").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (known, _), found = json.loads(run.stdout)
    assert known == pytest.approx(128, abs=4)
    assert found.keys() == forged.keys()
    for name, (growth, message) in found.items():
        assert message.startswith(f"`{forged[name][1]}"), (name, message)
        assert growth < 24, name  # three times `max_bytes`
    assert sorted(tmp_path.rglob("*")) == before


# Damaged files


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect"}
FORBIDDEN |= {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "ctypes.dlopen",
    "compile",
}


class Watch:
    """Python's own record of what is run or written, while it is switched on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in FORBIDDEN or (event == "open" and arguments[2] & WRITES)):
            self.seen.append((event, arguments))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit, cut the file short, or overwrite, repeat, drop or append some bytes."""
    kind, place = chance.randrange(8), chance.randrange(len(content))
    length = chance.randint(1, 64)
    noise = chance.randbytes(length)
    if kind < 4:
        return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
    if kind == 4:
        return content[:place]
    if kind == 5:
        return content[:place] + noise + content[place + length :]
    if kind == 6:
        return content[:place] + content[place : place + length] * chance.randrange(3) + content[place + length :]
    return content + noise


@pytest.fixture(scope="module")
def small() -> bytes:
    return saved(train(PPOPenalty, "MlpPolicy", pendulum(), policy_kwargs={"net_arch": []}))


def attempt(content: bytes, env, watch: Watch):
    """The model, or None if the file is refused; anything but a refusal goes through."""
    watch.on = True
    try:
        return load(content, env)
    except UnsafeFileError:
        return None
    finally:
        watch.on = False


def test_damaged_files_load_unchanged_or_are_refused(small: bytes, env, watch: Watch, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    original, chance = load(small, env), random.Random(0)
    watch.seen.clear()
    models = [model for _ in range(2000) if (model := attempt(damage(small, chance), env, watch))]
    # What is not read can be damaged: dates, the texts for people, bytes after the end
    assert 50 < len(models) < 1000
    for model in models:
        assert_equal(original, model)
    assert watch.seen == []
    assert list(tmp_path.iterdir()) == []


def forge(content: bytes, chance: random.Random) -> bytes:
    """Damage something and put it back with its checksums right."""
    outer = members(content)
    name = chance.choice(["data", "policy.pth", "policy.optimizer.pth"])
    if name == "data":
        return packed({**outer, name: damage(outer[name], chance)})
    inner = members(outer[name])
    record = chance.choice(["archive/data.pkl"] * 4 + sorted(inner))
    return packed({**outer, name: packed({**inner, record: damage(inner[record], chance)})})


@pytest.mark.filterwarnings("ignore:With `n_steps`:UserWarning")
def test_forged_files_load_or_are_refused(small: bytes, env, watch: Watch, tmp_path: Path, monkeypatch) -> None:
    """As above, but with the checksums of the archives made anew: what comes through is a model in working order."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(1)
    watch.seen.clear()
    models = [model for _ in range(600) if (model := attempt(forge(small, chance), env, watch))]
    assert 50 < len(models) < 550
    for model in models:
        assert model.predict(np.array([1.0, 0.0, 0.0], dtype=np.float32), deterministic=True)[0].shape == (1,)
    assert watch.seen == []
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_what_it_is_for(watch: Watch, file: bytes, tmp_path: Path) -> None:
    watch.seen.clear()
    watch.on = True
    (tmp_path / "text").write_text("x")
    json_to_data(members(edited(file, policy_class=pickled(tmp_path / "marker")))["data"].decode())
    watch.on = False
    assert {"pickle.find_class", "open", "os.mkdir"} <= {event for event, _ in watch.seen}
