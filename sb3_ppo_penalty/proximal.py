"""The one constructor, the one train loop and the one place that logs, for every algorithm of the package."""

import inspect
import io
import pathlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_penalty import losses, safe_load
from sb3_ppo_penalty.arguments import ArgumentError, require, require_integer, require_number
from sb3_ppo_penalty.divergence import ActionParameters, concatenate, kl_divergence, parameters_of
from sb3_ppo_penalty.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ppo_penalty.rollout import IgnoreTimeLimits, Minibatch, Observations, Rollout

SelfProximal = TypeVar("SelfProximal", bound="ProximalAlgorithm")


class Clips(NamedTuple):
    """
    The clip ranges of one update.

    :param policy: how far the ratio may go from 1, None for no clip
    :param value: how far the critic may go from its old prediction, in the unit of the returns, None for no clip
    """

    policy: float | None
    value: float | None


class Terms(NamedTuple):
    """
    What a minibatch's loss is made of, each a scalar tensor.

    :param loss: everything with its coefficient: what is minimised
    :param surrogate: the policy's objective before any penalty, with its sign turned
    :param policy: the policy's objective with penalty, with its sign turned
    :param value: the critic's squared error
    :param entropy: negative entropy, in nats
    :param approx_kl: SB3's estimate of KL(old || new), in nats
    :param clip_fraction: share of ratios outside the clip range
    """

    loss: th.Tensor
    surrogate: th.Tensor
    policy: th.Tensor
    value: th.Tensor
    entropy: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor


class Drift(NamedTuple):
    """
    How far an update moved the policy, measured over the whole rollout after the last epoch.

    :param kl: mean over states of the exact KL(old || new), in nats
    :param kl_estimate: the same, estimated from the actions taken (k3), in nats
    :param effective_sample_size: of the importance weights, as a fraction
    :param max_ratio: the largest importance weight
    """

    kl: float
    kl_estimate: float
    effective_sample_size: float
    max_ratio: float


def passed_on(constructor: Callable[..., None], scope: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments that one constructor hands on to another under the same names.

    :param constructor: the one that is called
    :param scope: the caller's ``locals()``
    :return: keyword arguments
    """
    return {name: scope[name] for name in inspect.signature(constructor).parameters if name != "self" and name in scope}


class ProximalAlgorithm(OnPolicyAlgorithm):
    """
    What PPO-clip and PPO-penalty share: everything but the policy's objective and what follows an update.

    Collection, callbacks, ``learn``, ``save`` and ``load`` are SB3's. A subclass implements :meth:`_policy_objective` and may
    extend :meth:`_stops_early`, :meth:`_after_update` and :meth:`_check_arguments`.

    The arguments are those of ``stable_baselines3.PPO``, in its order and with its defaults; see there.

    :param clip_range: as in PPO; a subclass may allow None
    :param target_kl: what it means is the subclass's matter
    :raises ValueError: naming the argument, for a value that cannot be meant
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule | None = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        inherited = passed_on(OnPolicyAlgorithm.__init__, locals())
        try:
            super().__init__(**{**inherited, "_init_setup_model": False})
        except AssertionError as error:
            raise ArgumentError(str(error)) from error
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Check the arguments, also those that ``load`` was given, and build buffer, policy and schedules."""
        self._check_arguments()
        super()._setup_model()
        if self.clip_range is not None:
            self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def _check_arguments(self) -> None:
        """:raises ValueError: naming the argument that is wrong."""
        for name, value in list(vars(self).items()):
            # Plain Python: SB3's schedules and queues refuse numpy's numbers, and the saved file keeps Python's readable
            if isinstance(value, np.generic):
                setattr(self, name, value.item())
        supported = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        names = "Box, Discrete, MultiDiscrete or MultiBinary"
        require(isinstance(self.action_space, supported), "env's action space", self.action_space, names)
        tables = (spaces.MultiDiscrete, spaces.MultiBinary)
        if isinstance(self.action_space, tables) and len(self.action_space.shape) > 1:
            raise ArgumentError(f"`env`: Multi-dimensional {self.action_space} action space is not supported: flatten it")
        require_number("learning_rate", self.learning_rate, 0, schedule=True)
        require_integer("n_steps", self.n_steps, 1)
        require_integer("batch_size", self.batch_size, 2 if self.normalize_advantage else 1)
        require_integer("n_epochs", self.n_epochs, 1)
        require(isinstance(self.normalize_advantage, bool), "normalize_advantage", self.normalize_advantage, "True or False")
        require_integer("sde_sample_freq", self.sde_sample_freq, -1)
        require_number("gamma", self.gamma, 0, 1)
        require_number("gae_lambda", self.gae_lambda, 0, 1)
        require_number("clip_range", self.clip_range, 0, open_below=True, infinite=True, optional=True, schedule=True)
        require_number("clip_range_vf", self.clip_range_vf, 0, open_below=True, optional=True, schedule=True)
        require_number("ent_coef", self.ent_coef, 0)
        require_number("vf_coef", self.vf_coef, 0)
        require_number("max_grad_norm", self.max_grad_norm, 0, open_below=True, infinite=True)
        require_number("target_kl", self.target_kl, 0, open_below=True, optional=True)
        require_integer("stats_window_size", self._stats_window_size, 1)
        self._check_rollout()

    def _check_rollout(self) -> None:
        """
        :raises ValueError: for a rollout that cannot be normalised or a buffer whose samples would be passed over
        """
        buffer_class = self.rollout_buffer_class or RolloutBuffer
        own = {RolloutBuffer.get, DictRolloutBuffer.get}, {RolloutBuffer._get_samples, DictRolloutBuffer._get_samples}
        plain = getattr(buffer_class, "get", None) in own[0] and getattr(buffer_class, "_get_samples", None) in own[1]
        allowed = "a RolloutBuffer with SB3's own `get` and `_get_samples`: minibatches are cut from its arrays"
        require(plain, "rollout_buffer_class", buffer_class, allowed)
        dicts = isinstance(self.observation_space, spaces.Dict)
        suits = self.rollout_buffer_class is None or issubclass(buffer_class, DictRolloutBuffer) == dicts
        require(suits, "rollout_buffer_class", buffer_class, f"for {'Dict' if dicts else 'array'} observations")
        size = self.n_steps * self.n_envs
        if self.normalize_advantage:
            require(size > 1, "n_steps", self.n_steps, f"more than 1 in total over {self.n_envs} environment(s)")
        if size % self.batch_size:
            warnings.warn(
                f"With `n_steps` = {self.n_steps} and {self.n_envs} environment(s) a rollout holds {size} transitions: "
                f"there will be a truncated mini-batch of size {size % self.batch_size} after the full ones of "
                f"`batch_size` = {self.batch_size}",
                stacklevel=2,
            )

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        """
        Warn of a GPU where it is slower, for SB3's MlpPolicy and for the package's.

        :param mlp_class_name: see SB3
        """
        super()._maybe_recommend_cpu(mlp_class_name)
        super()._maybe_recommend_cpu(MlpPolicy.__name__)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Collect as SB3 does; where the buffer asks for no bootstrapping, time limits are hidden from SB3.

        :param env: the training environments
        :param callback: called at each step
        :param rollout_buffer: filled with the rollout
        :param n_rollout_steps: number of steps per environment
        :return: False if the callback ended training
        """
        if not getattr(rollout_buffer, "bootstrap_timeouts", True):
            env = IgnoreTimeLimits(env)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def train(self) -> None:
        """Update the policy from the rollout that was just collected."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clips = Clips(*(self._scheduled(schedule) for schedule in (self.clip_range, self.clip_range_vf)))
        rollout = self._freeze_rollout()
        epochs: list[list[Terms]] = []
        for _ in range(self.n_epochs):
            epochs.append([])
            finished = self._run_epoch(rollout, clips, epochs[-1])
            self._n_updates += 1
            if not finished:
                break
        drift = self._measure_drift(rollout)
        self._after_update(drift)
        self._log_update(epochs, clips, drift)

    def _scheduled(self, schedule: Any) -> float | None:
        """
        :param schedule: a ``FloatSchedule`` or None
        :return: its value now
        """
        return None if schedule is None else float(schedule(self._current_progress_remaining))

    def _freeze_rollout(self) -> Rollout:
        """
        :return: the rollout on the device with the distributions of the policy that collected it
        """
        rollout = Rollout.of(self.rollout_buffer)
        with self._acting():
            old = [parameters_of(self.policy.get_distribution(chunk.observations)) for chunk in rollout.chunks()]
        return replace(rollout, old=concatenate(old))

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """The policy as it acts: without gradient, and without dropout or a moving batch norm."""
        self.policy.set_training_mode(False)
        with th.no_grad():
            yield
        self.policy.set_training_mode(True)

    def _run_epoch(self, rollout: Rollout, clips: Clips, steps: list[Terms]) -> bool:
        """
        Go once over the rollout.

        :param rollout: frozen
        :param clips: clip ranges of this update
        :param steps: gets the detached terms of every minibatch
        :return: False if the subclass stopped the update
        """
        for batch in rollout.minibatches(self.batch_size):
            terms = self._evaluate(batch, clips)
            steps.append(Terms(*(term.detach() for term in terms)))
            if self._stops_early(terms.approx_kl):
                return False
            self._step(terms)
        return True

    def _evaluate(self, batch: Minibatch, clips: Clips) -> Terms:
        """
        :param batch: some transitions
        :param clips: clip ranges of this update
        :return: the loss and its parts
        """
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions)
        advantages = losses.normalize_advantages(batch.advantages) if self.normalize_advantage else batch.advantages
        ratio = losses.importance_ratio(log_prob, batch.old_log_prob)
        surrogate, objective = self._policy_objective(batch, ratio, advantages, clips.policy)
        value_loss = losses.value_loss(values.flatten(), batch.returns, batch.old_values, clips.value)
        entropy_loss = losses.entropy_loss(entropy, log_prob)
        with th.no_grad():
            approx_kl = losses.k3_estimate(log_prob - batch.old_log_prob)
            clip_fraction = losses.clip_fraction(ratio, clips.policy)
        loss = -objective + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        return Terms(loss, -surrogate, -objective, value_loss, entropy_loss, approx_kl, clip_fraction)

    def _current_parameters(self, observations: Observations) -> ActionParameters:
        """
        :param observations: those that the policy has just evaluated
        :return: its action distributions there, with their gradient
        """
        if type(self.policy).evaluate_actions is ActorCriticPolicy.evaluate_actions:
            return parameters_of(self.policy.action_dist)  # holds what was just evaluated: no second pass
        return parameters_of(self.policy.get_distribution(observations))

    def _policy_objective(
        self,
        batch: Minibatch,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        What the policy maximises.

        :param batch: the transitions that the policy has just evaluated
        :param ratio: importance ratios, shape (batch,)
        :param advantages: normalised if asked for, shape (batch,)
        :param clip_range: eps, or None
        :return: the surrogate, and the objective made of it; two scalars
        """
        raise NotImplementedError

    def _stops_early(self, approx_kl: th.Tensor) -> bool:
        """
        :param approx_kl: the minibatch's estimate of KL(old || new), in nats
        :return: whether the update ends before this minibatch's step
        """
        return False

    def _step(self, terms: Terms) -> None:
        """
        One step of the optimizer.

        :param terms: of one minibatch
        :raises FloatingPointError: if the loss or a gradient is not finite; the policy stays as it was before the step
        """
        self.policy.optimizer.zero_grad()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.policy.parameters())
        norm = th.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        # Before the clipping, which would spread one bad gradient over all of them
        if not th.isfinite(norm + terms.loss.detach()):
            raise FloatingPointError(self._what_is_not_finite(terms))
        th.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        self.policy.optimizer.step()

    def _what_is_not_finite(self, terms: Terms) -> str:
        """
        :param terms: of the minibatch whose loss or gradient is not finite
        :return: where it went wrong, in a sentence
        """
        bad = [name for name, term in terms._asdict().items() if not th.isfinite(term)]
        gradients = ((name, parameter.grad) for name, parameter in self.policy.named_parameters())
        bad_gradients = [name for name, gradient in gradients if gradient is not None and not th.isfinite(gradient).all()]
        buffer = self.rollout_buffer
        arrays = {name: getattr(buffer, name) for name in ("rewards", "values", "returns", "advantages", "log_probs")}
        bad_arrays = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        return (
            f"an update of {type(self).__name__} after {self.num_timesteps} steps is not finite: terms of the loss "
            f"{bad or 'all finite'}, gradients {bad_gradients or 'all finite'}, rollout {bad_arrays or 'all finite'}. "
            "The optimizer did not step: the policy is the last good one and can be saved"
        )

    def _measure_drift(self, rollout: Rollout) -> Drift:
        """
        :param rollout: frozen before the update
        :return: how far the policy moved
        """
        kl, log_ratio = [], []
        with self._acting():
            for chunk in rollout.chunks():
                distribution = self.policy.get_distribution(chunk.observations)
                kl.append(kl_divergence(chunk.old, parameters_of(distribution)))
                log_ratio.append(distribution.log_prob(chunk.actions) - chunk.old_log_prob)
            log_ratios = th.cat(log_ratio)
            measures = (
                th.cat(kl).mean(),
                losses.k3_estimate(log_ratios),
                losses.effective_sample_size(log_ratios),
                log_ratios.max().exp(),
            )
            return Drift(*th.stack(measures).tolist())

    def _after_update(self, drift: Drift) -> None:
        """
        React to how far the policy moved, and record what goes beside SB3's own figures.

        :param drift: over the whole rollout
        """

    def _log_update(self, epochs: list[list[Terms]], clips: Clips, drift: Drift) -> None:
        """
        Record SB3's figures under SB3's names, and how far the policy moved.

        :param epochs: the terms of each epoch's minibatches; ``approx_kl`` is the last epoch's mean, as in SB3
        :param clips: clip ranges of this update
        :param drift: over the whole rollout
        """
        steps = Terms(*th.stack([th.stack(terms) for epoch in epochs for terms in epoch]).double().cpu().T)
        figures = {
            "entropy_loss": steps.entropy.mean().item(),
            "policy_gradient_loss": steps.surrogate.mean().item(),
            "value_loss": steps.value.mean().item(),
            "approx_kl": steps.approx_kl[-len(epochs[-1]) :].mean().item(),
            "clip_fraction": steps.clip_fraction.mean().item(),
            "loss": steps.loss[-1].item(),
            "explained_variance": explained_variance(
                self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()
            ),
            "clip_range": float("inf") if clips.policy is None else clips.policy,
            **drift._asdict(),
        }
        if hasattr(self.policy, "log_std"):
            figures["std"] = self.policy.log_std.exp().mean().item()
        if clips.value is not None:
            figures["clip_range_vf"] = clips.value
        for name, figure in figures.items():
            self.logger.record(f"train/{name}", figure)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfProximal,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfProximal:
        """
        Train, as SB3's algorithms do.

        :param total_timesteps: number of environment steps
        :param callback: called at every step
        :param log_interval: number of updates between two logs
        :param tb_log_name: name of the run for TensorBoard; default: the class's
        :param reset_num_timesteps: whether to count steps from zero
        :param progress_bar: show one (needs tqdm and rich)
        :return: the trained model
        """
        name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    @classmethod
    def load_safe(
        cls: type[SelfProximal],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str,
        device: th.device | str = "auto",
        *,
        max_bytes: int = safe_load.DEFAULT_MAX_BYTES,
        **arguments: Any,
    ) -> SelfProximal:
        """
        Load a file that may come from a stranger: nothing that it says is run, which SB3's ``load`` cannot promise.

        Only plain values and tensors are read. Spaces come from the environment; the classes of policy, buffer, activation,
        extractor, optimizer and schedule are recognised by name if they are SB3's, torch's or this package's, and have to
        be passed otherwise. The model predicts and learns on as one from ``load`` does, except that the statistics of the
        last 100 episodes begin anew and that ``tensorboard_log`` is not taken from the file.

        :param path: a path, with or without ``.zip``, or a binary file
        :param env: the environment that the model was made for, or its name
        :param device: to put the model on, wherever it was saved
        :param max_bytes: what the file may unpack to, and what the rollout buffer that it asks for may take. While a file is
            read, up to five times as much memory is in use
        :param arguments: the constructor's, to replace what the file says
        :return: the model
        :raises UnsafeFileError: naming the entry that is pickled and needed, of the wrong type, shape or range, too large,
            or none of a model's
        """
        return safe_load.load_safe(cls, path, env, device, max_bytes, arguments)
