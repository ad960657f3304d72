"""With memory: the clip is RecurrentPPO bit for bit, the divergence that of whole episodes, and padding is nothing."""

import inspect
import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import Sound
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

import sb3_ppo_penalty
from sb3_ppo_penalty import PPOClip, PPOPenalty, ResumableCheckpointCallback, resume
from sb3_ppo_penalty.algorithms.recurrent import RecurrentPPOClip, RecurrentPPOPenalty
from sb3_ppo_penalty.policies.recurrent import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from sb3_ppo_penalty.updates.ranks import Ranks

TINY = {"lstm_hidden_size": 8, "net_arch": [8]}
SMALL = {"n_steps": 32, "batch_size": 24, "n_epochs": 2, "seed": 7, "learning_rate": 3e-3, "policy_kwargs": TINY}
IGNORE = pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
pytestmark = IGNORE


class Lengths(Sound):
    """Episodes of 1 to 7 steps, each as long as the environment's own generator says."""

    def step(self, action):
        seen, reward, _, _, infos = super().step(action)
        return seen, reward, bool(self.np_random.random() < 0.3), bool(self.np_random.random() < 0.1), infos


class Images(FakeImageEnv):
    def __init__(self) -> None:
        super().__init__(screen_height=36, screen_width=36, n_channels=1, discrete=True)
        self.observation_space.seed(0)


def several_inputs() -> gym.Env:
    np.random.seed(0)  # it draws its images when it is made
    return SimpleMultiObsEnv(discrete_actions=False)


def made(env, n_envs: int = 2, **options) -> VecEnv:
    return make_vec_env(env, n_envs, seed=3, **options)


MLP, CNN = RecurrentActorCriticPolicy, RecurrentActorCriticCnnPolicy
DICT = RecurrentMultiInputActorCriticPolicy
CASES = {
    "Box": (MLP, Lengths, 2, {}),
    "Box, time limits": (MLP, "Pendulum-v1", 2, {"n_steps": 128, "batch_size": 100, "n_epochs": 1}),
    "Box, one environment": (MLP, Lengths, 1, {"vf_coef": 0.3}),
    "Box, critic clipped": (MLP, Lengths, 3, {"clip_range_vf": 0.2}),
    "Box, early stop": (MLP, Lengths, 2, {"target_kl": 0.0001}),
    "Box, not normalised": (MLP, Lengths, 2, {"normalize_advantage": False, "ent_coef": 0.05}),
    "Box, gSDE": (MLP, Lengths, 2, {"use_sde": True, "sde_sample_freq": 4}),
    "Box, whole rollout": (MLP, Lengths, 2, {"batch_size": None}),
    "Discrete": (MLP, "CartPole-v1", 3, {}),
    "Discrete, all options": (
        MLP, "CartPole-v1", 2, {"clip_range_vf": 0.2, "target_kl": 1e-6, "ent_coef": 0.01, "vf_coef": 0.7},
    ),
    "Discrete, schedules": (
        MLP, "CartPole-v1", 2, {"learning_rate": lambda p: 1e-2 * p, "clip_range": lambda p: 0.1 + 0.1 * p},
    ),
    "MultiDiscrete": (MLP, lambda: Lengths(spaces.MultiDiscrete([2, 3])), 2, {}),
    "shared memory": (MLP, Lengths, 2, {"policy_kwargs": {**TINY, "shared_lstm": True, "enable_critic_lstm": False}}),
    "critic without memory": (MLP, Lengths, 2, {"policy_kwargs": {**TINY, "enable_critic_lstm": False}}),
    "two layers, two extractors": (
        MLP, Lengths, 2, {"policy_kwargs": {**TINY, "n_lstm_layers": 2, "share_features_extractor": False}},
    ),
    "images": (CNN, Images, 1, {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
    "Dict": (DICT, several_inputs, 1, {"n_steps": 16, "batch_size": 12}),
}  # fmt: skip


def assert_same_weights(ours, theirs) -> None:
    expected = theirs.policy.state_dict()
    for name, tensor in ours.policy.state_dict().items():
        assert th.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_clip_equals_recurrent_ppo(case: str) -> None:
    policy, env, n_envs, options = CASES[case]
    models = []
    for algorithm in (RecurrentPPO, RecurrentPPOClip):
        model = algorithm(policy, made(env, n_envs), **{**SMALL, **options})
        before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        model.learn(3 * model.n_steps * n_envs)
        assert any(not th.equal(before[name], tensor) for name, tensor in model.policy.state_dict().items())
        models.append(model)
    stock, ours = models
    assert_same_weights(ours, stock)
    assert ours._n_updates == stock._n_updates < (6 if "target_kl" in options else 7)
    for name, value in stock.logger.name_to_value.items():
        if name.startswith("train/"):
            assert ours.logger.name_to_value[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


class Acted(BaseCallback):
    """Keeps what was seen and done, episode by episode, and the policy that acted with the states of its memory."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.episodes = []
        for env in range(buffer.n_envs):
            starts = np.flatnonzero(buffer.episode_starts[:, env])
            cuts = sorted({0, *starts.tolist(), buffer.buffer_size})
            for begin, end in itertools.pairwise(cuts):
                state = tuple(
                    th.as_tensor(np.array(getattr(buffer, name)[begin, :, env : env + 1]))
                    for name in ("hidden_states_pi", "cell_states_pi")
                )
                started = bool(buffer.episode_starts[begin, env])
                self.episodes.append((th.as_tensor(buffer.observations[begin:end, env]), state, started))
        self.old = self.distributions()

    def distributions(self) -> list:
        """Of every step of every episode, one step after the other."""
        found = []
        with th.no_grad():
            for observations, memory, started in self.episodes:
                states = tuple(th.zeros_like(each) for each in memory) if started else memory
                for seen in observations:
                    made, states = self.model.policy.get_distribution(seen[None], states, th.zeros(1))
                    found.append(self.parameters(made))
        return found

    def parameters(self, made) -> th.Tensor | tuple[th.Tensor, th.Tensor]:
        own = made.distribution
        return (
            own.logits.double().clone() if hasattr(own, "logits") else (own.mean.double().clone(), own.stddev.double().clone())
        )


def divergence(old, new) -> float:
    """KL(old || new), as torch's own distributions give it."""
    kind = (lambda each: th.distributions.Normal(*each)) if isinstance(old, tuple) else (
        lambda each: th.distributions.Categorical(logits=each)
    )  # fmt: skip
    return th.distributions.kl_divergence(kind(old), kind(new)).sum().item()


@pytest.mark.parametrize("chunk_rows", [None, 10])
@pytest.mark.parametrize("policy", ["MlpLstmPolicy", MLP])
@pytest.mark.parametrize("env", [Lengths, "CartPole-v1"])
def test_divergence_is_that_of_a_loop_over_episodes(env, policy, chunk_rows, monkeypatch) -> None:
    if chunk_rows:
        monkeypatch.setattr("sb3_ppo_penalty.rollouts.rollout.CHUNK_ROWS", chunk_rows)
    model = RecurrentPPOPenalty(policy, made(env, 3), **{**SMALL, "learning_rate": 0.03})
    model.learn(3 * 32 * 2, callback=(acted := Acted()))
    divergences = [divergence(*pair) for pair in zip(acted.old, acted.distributions(), strict=True)]
    assert len(divergences) == 96
    figures = model.logger.name_to_value
    assert figures["train/kl"] == pytest.approx(np.mean(divergences), rel=1e-3)
    assert figures["train/kl_max_state"] == pytest.approx(max(divergences), rel=1e-3)
    assert np.mean(divergences) > 1e-3


class Unlike(RecurrentActorCriticPolicy):
    """Makes of an episode's start whatever it likes."""

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        return RecurrentActorCriticPolicy._process_sequence(features, lstm_states, episode_starts, lstm)


@pytest.mark.parametrize(("policy", "told"), [(MLP, False), (Unlike, True)])
def test_only_a_policy_of_its_own_kind_is_told_where_episodes_begin(policy, told: bool) -> None:
    model = RecurrentPPOPenalty(policy, made(Lengths), **SMALL).learn(64)
    update = model._new_update()
    parts = [part.observations["<episode_starts>"] for part in update.evaluator.parts(update.rollout)]
    assert any(starts.any() for starts in parts) == told


def test_old_distributions_of_a_minibatch_are_those_of_its_steps() -> None:
    model = RecurrentPPOPenalty(MLP, made("CartPole-v1"), **{**SMALL, "batch_size": 20, "learning_rate": 0.0})
    model.learn(64)
    update = model._new_update()
    for batch in [*update.minibatches(normalize=True)]:
        assert th.allclose(update.evaluator.divergence(batch), th.zeros(len(batch.actions)), atol=1e-6)
        assert th.allclose(update.evaluator.ask(batch.observations, batch.actions).log_prob, batch.old_log_prob, atol=1e-5)
    logits = update.rollout.old.per_state[0]
    assert logits.var(dim=0).min() > 1e-8


class Dirty(RecurrentRolloutBuffer):
    """Fills the padding with NaN, and with random bits where there is none."""

    def _get_samples(self, batch_inds, env_change, env=None):
        samples = super()._get_samples(batch_inds, env_change, env)
        padding, generator = samples.mask < 0.5, th.Generator().manual_seed(0)
        names = ("observations", "actions", "old_values", "old_log_prob", "advantages", "returns", "episode_starts")
        for name in names:
            column = getattr(samples, name)
            noise = th.randint(2, column.shape, generator=generator).to(column)
            column[padding] = noise[padding] if name in ("actions", "episode_starts") else np.nan
        self.padded = getattr(self, "padded", 0) + int(padding.sum())
        return samples


@pytest.mark.parametrize("algorithm", [RecurrentPPOClip, RecurrentPPOPenalty])
@pytest.mark.parametrize("env", [Lengths, "CartPole-v1"])
def test_padding_of_whatever_content_changes_nothing(algorithm, env) -> None:
    models = [
        algorithm(MLP, made(env), **SMALL, clip_range_vf=0.2, ent_coef=0.01, rollout_buffer_class=buffer).learn(192)
        for buffer in (None, Dirty)
    ]
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    figures = [{name: value for name, value in model.logger.name_to_value.items() if "train/" in name} for model in models]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)


class Direction(BaseFeaturesExtractor):
    """NaN where all of an observation is 0, as it is in sb3-contrib's padding."""

    def __init__(self, observation_space) -> None:
        super().__init__(observation_space, observation_space.shape[0])

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations / observations.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", MLP])
def test_policy_is_not_asked_about_what_no_environment_gave(policy) -> None:
    arguments = {**SMALL, "policy_kwargs": {**TINY, "features_extractor_class": Direction}}
    model = RecurrentPPOPenalty(policy, made(Lengths), **arguments).learn(64)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())
    with pytest.raises(ValueError, match="nan"):
        RecurrentPPO(MLP, made(Lengths), **arguments).learn(64)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_memory_goes_through_a_sequence_in_one_call(layers: int, within: bool) -> None:
    """Where an episode begins within a sequence it cannot; sb3-contrib's policy is the oracle of both."""
    kwargs = {**TINY, "n_lstm_layers": layers}
    stock = RecurrentPPO(MLP, made(Lengths), **{**SMALL, "policy_kwargs": kwargs}).policy
    ours = RecurrentPPOClip(
        "MlpLstmPolicy", made(Lengths), **{**SMALL, "policy_kwargs": {**kwargs, "learn_covariance": True, "covariance": 1.0}}
    ).policy
    assert_same_weights(SimpleNamespace(policy=ours), SimpleNamespace(policy=stock))
    generator = th.Generator().manual_seed(0)
    observations, actions = (th.randn(15, count, generator=generator) for count in (3, 2))
    states = [th.randn(layers, 3, 8, generator=generator) for _ in range(4)]
    starts = th.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, within, 0], [1, 0, 0, 0, 0]]).flatten()
    answers, calls = {}, []
    for policy in (stock, ours):
        handle = policy.lstm_actor.register_forward_hook(lambda *_: calls.append(1))
        asked = policy.evaluate_actions(observations, actions, RNNStates(tuple(states[:2]), tuple(states[2:])), starts)
        handle.remove()
        sum(each.sum() for each in asked[:2]).backward()
        answers[policy] = [*asked, *(weight.grad for weight in policy.parameters())]
    assert len(calls) == (10 if within else 6)
    for own, theirs in zip(answers[ours], answers[stock], strict=True):
        th.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)


def test_several_switches_at_once() -> None:
    """``RecurrentPPO`` itself fails on them: torch's Bernoulli does not take the buffer's int8."""
    env = made(lambda: Lengths(spaces.MultiBinary(3)))
    figures = RecurrentPPOPenalty("MlpLstmPolicy", env, **SMALL).learn(128).logger.name_to_value
    assert 1e-6 < figures["train/kl"] < 1


# Everything else that works on SB3's PPO


@pytest.mark.parametrize("guard", ["stop", "rollback", "fixup"])
@pytest.mark.parametrize("learn", [False, True])
def test_guard_measures_whole_episodes(guard: str, learn: bool) -> None:
    arguments = {**SMALL, "learning_rate": 0.1, "policy_kwargs": {**TINY, "learn_covariance": learn}}
    model = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **arguments, guard=guard, target_kl=0.003).learn(64)
    figures = model.logger.name_to_value
    assert figures["train/guard_acted"] == 1
    assert (figures["train/kl"] > 4 * 0.003) == (guard == "stop")


@pytest.mark.parametrize(
    ("policy", "env", "n_envs"),
    [
        ("MlpLstmPolicy", Lengths, 2),
        (MLP, "CartPole-v1", 2),
        ("CnnLstmPolicy", Images, 1),
        ("MultiInputLstmPolicy", several_inputs, 1),
    ],
)
def test_predicts_is_evaluated_saved_loaded_and_learns_on(policy, env, n_envs, tmp_path) -> None:
    model = RecurrentPPOPenalty(policy, made(env, n_envs), **{**SMALL, "batch_size": 16}).learn(64)
    model.save(tmp_path / "model")
    loaded = RecurrentPPOPenalty.load(tmp_path / "model", env=made(env, n_envs))
    safe = RecurrentPPOPenalty.load_safe(tmp_path / "model", made(env, n_envs), device="cpu")
    observations = model.env.reset()
    actions, states = model.predict(observations, deterministic=True)
    assert states[0].shape == (1, n_envs, 8)
    for each in (loaded, safe):
        assert_same_weights(each, model)
        assert each.kl_coef == model.kl_coef
        own, memory = each.predict(observations, deterministic=True)
        np.testing.assert_array_equal(own, actions)
        after = [one.predict(observations, memory, np.zeros(n_envs, bool), True)[1][0] for one in (model, each)]
        np.testing.assert_array_equal(*after)
        assert not np.allclose(after[0], memory[0])
        each.learn(64, reset_num_timesteps=False)
    evaluate_policy(loaded, made(env, n_envs), n_eval_episodes=2, warn=False)


def test_policy_alone_is_saved_with_its_memory(tmp_path) -> None:
    kwargs = {**TINY, "n_lstm_layers": 2, "enable_critic_lstm": False, "covariance": 0.3}
    policy = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), policy_kwargs=kwargs).policy
    policy.save(tmp_path / "policy")
    again = MlpLstmPolicy.load(tmp_path / "policy")
    assert all(th.equal(tensor, again.state_dict()[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("loader", ["load", "load_safe"])
def test_file_of_recurrent_ppo(loader: str, tmp_path) -> None:
    stock = RecurrentPPO("MlpLstmPolicy", made(Lengths), **SMALL).learn(64)
    stock.save(tmp_path / "stock")
    models = []
    for algorithm, options in ((RecurrentPPO, {}), (RecurrentPPOClip, {})):
        load = getattr(algorithm, loader if algorithm is RecurrentPPOClip else "load")
        model = load(tmp_path / "stock", env=made(Lengths), device="cpu", **options)
        model.set_random_seed(5)
        models.append(model.learn(64, reset_num_timesteps=False))
    assert_same_weights(*models)
    penalty = getattr(RecurrentPPOPenalty, loader)(tmp_path / "stock", env=made(Lengths), device="cpu", clip_range=None)
    penalty.learn(64, reset_num_timesteps=False).save(tmp_path / "penalty")
    assert_same_weights(RecurrentPPO.load(tmp_path / "penalty"), penalty)


def test_vec_normalize_and_evaluation_callback(tmp_path) -> None:
    train, evaluated = (VecNormalize(made("Pendulum-v1"), training=training) for training in (True, False))
    callback = EvalCallback(evaluated, n_eval_episodes=2, eval_freq=32, best_model_save_path=tmp_path, warn=False, verbose=0)
    RecurrentPPOPenalty("MlpLstmPolicy", train, **SMALL).learn(128, callback=callback)
    assert -4000 < callback.best_mean_reward < 0
    np.testing.assert_array_equal(train.obs_rms.mean, evaluated.obs_rms.mean)
    RecurrentPPOPenalty.load(tmp_path / "best_model", env=train).learn(64)


@pytest.mark.parametrize("algorithm", [RecurrentPPOPenalty, RecurrentPPO])
def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(algorithm, tmp_path) -> None:
    """The checkpoint lies within episodes of 50 steps: the states of the memory have to come along."""

    def env() -> VecEnv:
        return made("Pendulum-v1", wrapper_class=gym.wrappers.TimeLimit, wrapper_kwargs={"max_episode_steps": 50})

    callback = ResumableCheckpointCallback(32, tmp_path, keep=None)
    whole = algorithm("MlpLstmPolicy", env(), **SMALL).learn(192, callback=callback)
    callback = ResumableCheckpointCallback(32, tmp_path / "again")
    model, remaining = resume(tmp_path / "rl_model_128_steps.zip", env(), callback)
    assert model._last_lstm_states.pi[0].abs().min() > 0
    model.learn(remaining, callback=callback, reset_num_timesteps=False)
    assert_same_weights(model, whole)


def test_names_and_arguments_are_those_of_sb3_contrib() -> None:
    assert set(RecurrentPPOPenalty.policy_aliases) == set(RecurrentPPO.policy_aliases)
    theirs = inspect.signature(RecurrentPPO).parameters
    for ours in (RecurrentPPOPenalty, RecurrentPPOClip):
        own = inspect.signature(ours).parameters
        for name, parameter in theirs.items():
            penalty = ours is RecurrentPPOPenalty and name in ("clip_range", "target_kl")
            assert penalty or own[name].default == parameter.default, name
    assert set(inspect.signature(PPOPenalty).parameters) == set(inspect.signature(RecurrentPPOPenalty).parameters)
    assert RecurrentPPOPenalty("MlpLstmPolicy", "CartPole-v1", policy_kwargs=TINY).n_steps == 128
    assert sb3_ppo_penalty.RecurrentPPOPenalty is RecurrentPPOPenalty
    assert sb3_ppo_penalty.RecurrentPPOClip is RecurrentPPOClip


@pytest.mark.parametrize("kind", [MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy])
def test_names_stand_for_policies_with_a_fixed_covariance(kind: type) -> None:
    env = several_inputs() if kind is MultiInputLstmPolicy else "Pendulum-v1"
    if kind is not CnnLstmPolicy:
        model = RecurrentPPOPenalty(kind.__name__, env, policy_kwargs={**TINY, "covariance": 0.25})
        assert type(model.policy) is kind
        assert model.policy.covariance.tolist() == [0.25] * model.action_space.shape[0]
    assert RecurrentPPOPenalty.policy_aliases[kind.__name__] is kind


def test_covariance_follows_its_schedule() -> None:
    arguments = {**SMALL, "policy_kwargs": {**TINY, "covariance": lambda progress: 0.1 + progress}}
    model = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **arguments).learn(128)
    assert model.policy.covariance.tolist() == pytest.approx([0.6, 0.6])


def test_gradients_of_actor_and_critic_can_be_clipped_apart() -> None:
    model = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **SMALL, max_grad_norm=(0.5, 1.0)).learn(64)
    assert {"train/grad_norm_actor", "train/grad_norm_critic"} <= set(model.logger.name_to_value)
    actor, critic = model._actor_and_critic()
    assert {"lstm_actor.weight_hh_l0", "lstm_critic.weight_hh_l0"} <= {*actor, *critic}
    assert not {*actor} & {*critic}


def test_compile_says_why_not() -> None:
    plain = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **SMALL).learn(64)
    model = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **SMALL, compile=True)
    with pytest.warns(RuntimeWarning, match="`compile=True` has no effect.*padded sequences differ in shape") as warned:
        model.learn(64)
    assert len(warned) == 1
    assert_same_weights(model, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": ActorCriticPolicy}, "`policy` must be a RecurrentActorCriticPolicy"),
        ({"policy": "MlpPolicy"}, "MlpPolicy"),
        ({"n_steps": 0}, "`n_steps`"),
        ({"batch_size": -1}, "`batch_size`"),
        (
            {"rollout_buffer_class": sb3_ppo_penalty.RewardToGoRolloutBuffer},
            "`rollout_buffer_class` must be a RecurrentRollout",
        ),
        ({"rollout_buffer_kwargs": 3}, "`rollout_buffer_kwargs`"),
        ({"rollout_buffer_kwargs": {"hidden_state_shape": 3}}, "`rollout_buffer_kwargs`"),
        ({"policy_kwargs": {"lstm_hidden_size": 0}}, "`policy_kwargs\\['lstm_hidden_size'\\]` must be"),
        ({"policy_kwargs": {"shared_lstm": True}}, "`policy_kwargs`: You must choose between shared LSTM"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecurrentPPOPenalty(**{"policy": "MlpLstmPolicy", "env": DummyVecEnv([Lengths]), **arguments})


def test_several_ranks_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("sb3_ppo_penalty.algorithms.proximal.current", lambda: Ranks(0, 2))
    with pytest.raises(ValueError, match="RecurrentPPOPenalty trains in a single process"):
        RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **SMALL)


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_algorithms_without_memory_name_the_one_with_it(algorithm) -> None:
    with pytest.raises(ValueError, match=r"`policy` must be a policy for PPO .*RecurrentPPOPenalty"):
        algorithm(MLP, "CartPole-v1", n_steps=32, batch_size=16)


class Owns(RecurrentRolloutBuffer):
    """Somebody's own: minibatches that are made elsewhere."""

    def get(self, batch_size=None):
        yield RecurrentRolloutBuffer._get_samples(self, np.arange(4), np.ones((64, 1)))


def test_buffer_that_does_not_say_which_steps_it_draws_is_refused() -> None:
    model = RecurrentPPOPenalty("MlpLstmPolicy", made(Lengths), **SMALL, rollout_buffer_class=Owns)
    with pytest.raises(ValueError, match=r"`rollout_buffer_class` must be one whose `get` calls `_get_samples`"):
        model.learn(64)


class Remembers(gym.Env):
    """The first observation says which of two actions pays at the end, four steps later."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.answer, self.steps = int(self.np_random.integers(2)), 0
        return np.array([2 * self.answer - 1], np.float32), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == 4
        return np.zeros(1, np.float32), float(over and action == self.answer), over, False, {}


def test_learns_what_only_memory_can_tell() -> None:
    """Chance, and any policy without memory, earns 0.5 a game."""
    model = RecurrentPPOPenalty(
        "MlpLstmPolicy", made(Remembers, 8), n_steps=32, batch_size=64, learning_rate=1e-2, seed=0, policy_kwargs=TINY
    )
    model.learn(6144)
    assert evaluate_policy(model, made(Remembers, 4), n_eval_episodes=40, warn=False)[0] > 0.95
