"""The one constructor, the one train loop and the one place that logs, for every algorithm of the package."""

import inspect
import io
import itertools
import logging
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_penalty.arguments import ArgumentError, require, require_integer, require_number, schedule_at
from sb3_ppo_penalty.distributed import team as distributed
from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.objectives.divergence import (
    ActionParameters,
    UnknownDivergenceError,
    collect_rows,
    concatenate,
    kl_divergence,
    parameters_of,
)
from sb3_ppo_penalty.objectives.losses import Drift
from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, covariance_mismatch
from sb3_ppo_penalty.rollouts.rollout import (
    IgnoreTimeLimits,
    Minibatch,
    Observations,
    Rollout,
    SampledRollout,
    draws_rows,
    flat_copy,
)
from sb3_ppo_penalty.saving import safe_load
from sb3_ppo_penalty.saving.file_origin import require_ppo, saved_entries
from sb3_ppo_penalty.updates.evaluation import Evaluation, acting, evaluate, example, example_actions, find_source, uncompiled
from sb3_ppo_penalty.updates.step import Roles, Settings, Step, Stepper, Terms, as_of_now, minibatch_mean, reached

LOGGER = logging.getLogger(__name__)

#: In how many states of a rollout the policy's action distribution is looked for
LOOKED_AT = 8

SelfProximal = TypeVar("SelfProximal", bound="ProximalAlgorithm")


def passed_on(constructor: Callable[..., None], scope: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments that one constructor hands on to another under the same names.

    :param constructor: the one that is called
    :param scope: the caller's ``locals()``
    :return: keyword arguments
    """
    return {name: scope[name] for name in inspect.signature(constructor).parameters if name != "self" and name in scope}


def takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """
    Tell from its signature whether a function can be called with some arguments, others being added by name.

    :param function: not called
    :param args: by position
    :param kwargs: by name
    :return: whether they fit
    """
    parameters = inspect.signature(function)
    try:
        (parameters.bind if args else parameters.bind_partial)(*args, **kwargs)
    except TypeError:
        return False
    return True


def one_epoch(batches: Iterable[Minibatch], step: Stepper) -> Iterator[Step]:
    """
    Go once over the rollout, or up to where the update stops.

    :param batches: all of the rollout
    :param step: makes the optimizer's steps
    :return: what came of each minibatch
    """
    for batch in batches:
        made = step(batch)
        yield made
        if made.stopped:
            return


class ProximalAlgorithm(OnPolicyAlgorithm):
    """
    What PPO-clip and PPO-penalty share: everything but the policy's objective and what follows an update.

    Collection, callbacks, ``learn``, ``save`` and ``load`` are SB3's. A subclass implements :meth:`_policy_objective` and may
    extend :meth:`_settings`, :meth:`_steppers`, :meth:`_after_update` and :meth:`_check_arguments`.

    The arguments are those of ``stable_baselines3.PPO``, in its order and with its defaults; see there.

    :param clip_range: as in PPO; a subclass may allow None
    :param target_kl: what it means is the subclass's matter
    :param max_grad_norm: the largest length of the gradient; or a pair, for the actor's and for the critic's, which are then
        clipped apart: with one number a large gradient of either leaves little of the other's. Weights that both use, as
        those of a shared features extractor, count to the actor
    :param compile: run each minibatch's step (loss, gradient, clipping, Adam) as one graph made by ``torch.compile``: several
        times as fast on small networks after some 20 seconds of compilation, the same weights up to rounding. Where torch or
        the machine cannot compile, a warning says why and training goes on without
    :raises ValueError: naming the argument, for a value that cannot be meant
    """

    #: A pair clips the actor's and the critic's gradient apart
    max_grad_norm: Any
    #: Keeps compiled graphs from update to update; no file holds it
    _compiler: Any = None
    #: The processes that train this model; no file holds them
    _ranks: distributed.Ranks = distributed.ALONE
    #: Where the distribution is with which the policy evaluates actions; None while nobody knows, and where it has no known
    #: divergence. No file holds it
    _distribution_source: str | None = None
    #: Names of what only other algorithms keep in their files
    _foreign_entries: ClassVar[frozenset[str]] = frozenset()
    #: Those whose minibatches are known to be rows of their arrays
    _rollout_buffer_classes: ClassVar[tuple[type[RolloutBuffer], ...]] = (RolloutBuffer, DictRolloutBuffer)
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
        max_grad_norm: float | tuple[float, float] = 0.5,
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
        *,
        compile: bool = False,
    ) -> None:
        inherited = passed_on(OnPolicyAlgorithm.__init__, locals())
        try:
            # What it says, rank 0 says for all
            own = {"verbose": verbose if distributed.current().leads else 0, "_init_setup_model": False}
            super().__init__(**{**inherited, **own})
        except AssertionError as error:
            raise ArgumentError(str(error)) from error
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.compile = compile
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Check the arguments, also those that ``load`` was given, and build buffer, policy and schedules."""
        self._ranks = distributed.current()
        self._check_arguments()
        policy_class = self.policy_class
        self.policy_class = self._policy_maker()  # type: ignore[assignment]
        try:
            super()._setup_model()
        finally:
            self.policy_class = policy_class
        if self.clip_range is not None:
            self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        self._compiler = None

    def _policy_maker(self) -> Callable[..., Any]:
        """:return: what SB3 makes the policy with."""
        return self.policy_class

    def _excluded_save_params(self) -> list[str]:
        """:return: what no file holds: SB3's list, the compiled graphs, and who trained."""
        return [*super()._excluded_save_params(), "_compiler", "_ranks", "_distribution_source"]

    def _look_at_policy(self) -> None:
        """Find the policy's action distribution before there is a rollout; :meth:`_freeze_rollout` asks again."""
        try:
            with acting(self.policy):
                self._distribution_source = self._find_source(*self._examples())
        except ArgumentError:
            raise
        except Exception as error:
            # Made-up observations may be none that the policy can take; a rollout's are
            LOGGER.debug("the policy's action distribution is not known before the first rollout: %s", error)

    def _examples(self) -> tuple[Observations, th.Tensor]:
        """:return: the last observations, or such as might come, and actions that could be taken there."""
        last = example(self.observation_space, rows=2) if self._last_obs is None else self._last_obs
        observations, _ = self.policy.obs_to_tensor(last)
        some = next(iter(observations.values())) if isinstance(observations, dict) else observations
        return observations, example_actions(self.policy, rows=len(some))

    def _find_source(self, observations: Observations, actions: th.Tensor) -> str | None:
        """
        :param observations: shape (batch, *obs_shape), or one such tensor per key
        :param actions: as ``evaluate_actions`` takes them
        :return: see :func:`~.find_source`; None where no divergence is known
        """
        try:
            inputs, others = self._unpacked(observations)
            return find_source(self.policy, inputs, actions, **others)
        except UnknownDivergenceError as error:
            self._require_no_divergence(error)
        return None

    def _require_no_divergence(self, error: UnknownDivergenceError) -> None:
        """
        Do without the exact divergence, which serves nothing but the log; a subclass that needs it raises.

        :param error: says why it is not known
        """

    def __getstate__(self) -> dict[str, Any]:
        """:return: what is pickled and copied: all but the compiled graphs, and who trained."""
        return {name: value for name, value in vars(self).items() if name not in ("_compiler", "_ranks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """
        Belong to the session that is open here, as a model that is loaded does.

        :param state: see :meth:`__getstate__`
        """
        vars(self).update(state)
        self._ranks = distributed.current()

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the random generators and the environments, as SB3 does; those of several ranks differently.

        :param seed: of the whole training
        """
        super().set_random_seed(self._ranks.seed(seed))

    def _check_arguments(self) -> None:
        """:raises ValueError: naming the argument that is wrong."""
        for name, value in list(vars(self).items()):
            # Plain Python: SB3's schedules and queues refuse numpy's numbers, and the saved file keeps Python's readable
            if isinstance(value, np.generic):
                setattr(self, name, value.item())
        require(hasattr(self, "action_space"), "env", self.env, "an environment or the name of one")
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
        self._check_max_grad_norm()
        require(isinstance(self.compile, bool), "compile", self.compile, "True or False")
        require(isinstance(self.use_sde, bool), "use_sde", self.use_sde, "True or False")
        require_integer("stats_window_size", self._stats_window_size, 1)
        if self.seed is not None:
            require_integer("seed", self.seed, 0)
            require(self.seed < 2**32, "seed", self.seed, "below 2**32")
        for name in ("policy_kwargs", "rollout_buffer_kwargs"):
            value = getattr(self, name)
            require(isinstance(value, Mapping), name, value, "a dict or None")
        self._check_schedules()
        self._check_policy()
        self._check_rollout()

    def _check_max_grad_norm(self) -> None:
        """
        :raises ValueError: if it is neither a length nor a pair of them
        """
        limits: Any = self.max_grad_norm
        pair = isinstance(limits, (tuple, list))
        require(not pair or len(limits) == 2, "max_grad_norm", limits, "one number, or two: (actor, critic)")
        for limit in limits if pair else [limits]:
            require_number("max_grad_norm", limit, 0, open_below=True, infinite=True)
        if pair:
            # A tuple also where JSON or YAML made a list of it
            self.max_grad_norm = (float(limits[0]), float(limits[1]))

    def _check_schedules(self) -> None:
        """:raises ValueError: naming the schedule and the progress, for an answer at either end that cannot be meant."""
        for name, infinite in {"learning_rate": False, "clip_range": True, "clip_range_vf": False}.items():
            schedule = getattr(self, name)
            for progress in (1.0, 0.0) if callable(schedule) else ():
                schedule_at(name, schedule, progress, infinite=infinite)

    def _check_policy(self) -> None:
        """
        Refuse a policy that wants more than observations and actions, as sb3-contrib's for masks and for memory do.

        :raises ValueError: if the policy's class cannot be used
        """
        evaluate = getattr(self.policy_class, "evaluate_actions", None)
        suits = evaluate is not None and takes(evaluate, None, None, None) and takes(self.policy_class, use_sde=False)
        allowed = "a policy for PPO (sb3_ppo_penalty.algorithms.maskable.MaskablePPOPenalty takes sb3-contrib's maskable ones)"
        require(suits, "policy", self.policy_class, allowed)

    def _check_rollout(self) -> None:
        """
        :raises ValueError: for a rollout that cannot be normalised or a buffer that cannot be used
        """
        buffer_class = self._rollout_buffer_classes[0] if self.rollout_buffer_class is None else self.rollout_buffer_class
        known = isinstance(buffer_class, type) and issubclass(buffer_class, self._rollout_buffer_classes)
        names = " or ".join(each.__name__ for each in self._rollout_buffer_classes)
        require(known, "rollout_buffer_class", buffer_class, f"a {names}")
        self._check_sampling("rollout_buffer_class", buffer_class)
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

    def _check_sampling(self, name: str, buffer: RolloutBuffer | type[RolloutBuffer]) -> None:
        """
        Refuse minibatches that a buffer draws by itself where all ranks have to make as many of the same transitions.

        :param name: under which the user gave it
        :param buffer: to be used, or its class
        :raises ValueError: naming it
        """
        allowed = "one with SB3's own `get` and `_get_samples` on several ranks, which cut their minibatches together"
        require(self._ranks.size == 1 or draws_rows(buffer, self._rollout_buffer_classes), name, buffer, allowed)

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
        env = self._seen_by(rollout_buffer, env)
        # Not by its class: a policy may be wrapped, as by `th.compile`
        update_covariance: Any = getattr(self.policy, "update_covariance", None)
        if update_covariance is not None:
            update_covariance(1 - self.num_timesteps / self._total_timesteps)
        collect = super().collect_rollouts
        with self._get_compiler().acting() if self.compile else nullcontext():
            return self._ranks.collect(self, callback, lambda own: collect(env, own, rollout_buffer, n_rollout_steps))

    def _seen_by(self, rollout_buffer: RolloutBuffer, env: VecEnv) -> VecEnv:
        """
        Hide time limits from SB3 where the buffer asks for no bootstrapping.

        :param rollout_buffer: to be filled
        :param env: the training environments
        :return: the environments to collect from
        """
        return env if getattr(rollout_buffer, "bootstrap_timeouts", True) else IgnoreTimeLimits(env)

    def train(self) -> None:
        """Update the policy from the rollout that was just collected."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        rollout = self._freeze_rollout()
        settings = self._settings()
        epochs: list[list[Step]] = []
        with self._undone_if_not_finite(rollout, settings, epochs):
            for step in self._steppers(rollout, settings):
                batches = self._ranks.minibatches(rollout, self.batch_size, self.normalize_advantage)
                epochs.append(list(one_epoch(batches, step)))
                self._n_updates += 1
                if epochs[-1][-1].stopped:
                    break
            drift = self._measure_drift(rollout)
        self._after_update(drift)
        self._ranks.check_alike(self)
        self._log_update(epochs, settings, drift)

    def _settings(self) -> Settings:
        """
        :return: what the loss of this update depends on besides weights and minibatch; a subclass adds its own
        """
        return {
            "clip_range": self._scheduled(self.clip_range),
            "clip_range_vf": self._scheduled(self.clip_range_vf),
            # Over the minibatch of all ranks, before the loss sees a part of it, if there are several
            "normalize_advantage": self.normalize_advantage and self._ranks.size == 1,
            # None: not worked out
            "ent_coef": self.ent_coef or None,
            "vf_coef": self.vf_coef,
            "max_grad_norm": self.max_grad_norm,
            # Asked for only where they are clipped apart
            "actor": self._roles().actor if isinstance(self.max_grad_norm, tuple) else None,
            "learning": None,
            "stop_kl": None,
            "distribution": self._distribution_source,
        }

    def _roles(self) -> Roles:
        """
        :return: which weights the actions' distribution depends on, and which the value
        """
        with acting(self.policy), th.enable_grad():
            values, log_prob, _ = uncompiled(self.policy.evaluate_actions)(*self._examples())
        return Roles(reached(self.policy, [log_prob]), reached(self.policy, [values]))

    def _scheduled(self, schedule: Any) -> float | None:
        """
        :param schedule: a ``FloatSchedule`` or None
        :return: its value now
        """
        return None if schedule is None else float(schedule(self._current_progress_remaining))

    def _steppers(self, rollout: Rollout, settings: Settings) -> Iterator[Stepper]:
        """
        What makes the steps of each epoch; a subclass may look between two epochs at what became of the policy.

        :param rollout: frozen
        :param settings: of this update
        :return: one for each epoch
        """
        step = self._stepper(settings, min(self.batch_size, len(rollout)))
        yield from itertools.repeat(step, self.n_epochs)

    def _stepper(self, settings: Settings, batch_size: int) -> Stepper:
        """
        :param settings: of its steps
        :param batch_size: of all minibatches but an epoch's last
        :return: makes the optimizer's steps
        """
        eager = self._ranks.stepper(self.policy, self._evaluate, settings)
        if not self.compile:
            return eager
        stepper: Stepper = self._get_compiler().stepper(eager, batch_size)
        return stepper

    def _get_compiler(self) -> Any:
        """:return: the one that keeps this model's graphs."""
        if self._compiler is None or self._compiler.policy is not self.policy:
            # Here, because torch's compiler takes longer to import than everything else together
            from sb3_ppo_penalty.compiled.compiler import Compiler

            self._compiler = Compiler(self.policy, self._evaluate)
        return self._compiler

    def _freeze_rollout(self) -> Rollout:
        """
        :return: the rollout on the device with the distributions of the policy that collected it, if their divergence is known
        """
        buffer = self.rollout_buffer
        self._check_sampling("rollout_buffer", buffer)
        if draws_rows(buffer, self._rollout_buffer_classes):
            return self._frozen(buffer)
        if self.compile and self._get_compiler().refusal is None:
            self._get_compiler().refuse("the rollout buffer has a `get` of its own, whose minibatches may differ in kind")
        rollout = self._frozen(flat_copy(buffer))
        old = as_of_now(self.policy, lambda asked: self._parameters(*asked))
        return SampledRollout(*rollout.whole, samples=buffer.get, minibatch=lambda sample: self._minibatch(sample, old))

    def _frozen(self, buffer: RolloutBuffer) -> Rollout:
        """
        Freeze what a buffer's arrays hold.

        :param buffer: full
        :return: see :meth:`_freeze_rollout`
        """
        rollout = Rollout.of(buffer)
        rollout = replace(rollout, observations=self._observed(rollout.observations, buffer))
        with self._acting():
            some = rollout.first(LOOKED_AT)
            self._distribution_source = self._find_source(some.observations, some.actions)
            if self._distribution_source is None:
                return rollout
            parts = (self._parameters(chunk.observations, chunk.actions) for chunk in rollout.chunks())
            return replace(rollout, old=concatenate(parts, len(rollout)))

    def _parameters(self, observations: Observations, actions: th.Tensor) -> ActionParameters:
        """
        :param observations: of a minibatch
        :param actions: of the same
        :return: the policy's action distributions there, with their gradient
        """
        return parameters_of(self._asked(observations, actions, self._distribution_source).distribution())

    def _divergence(self, batch: Minibatch) -> th.Tensor:
        """
        :param batch: some transitions
        :return: KL(old || new) in each of their states, in nats, shape (batch,), with its gradient
        """
        return kl_divergence(batch.old, self._parameters(batch.observations, batch.actions))

    def _minibatch(self, sample: Any, old: Callable[[tuple[Observations, th.Tensor]], ActionParameters]) -> Minibatch:
        """
        Take over a minibatch that a buffer has drawn.

        :param sample: SB3's ``RolloutBufferSamples``, or what stands for them
        :param old: asks the policy that acted about observations and actions
        :return: with the distributions of the policy that acted
        """
        actions = sample.actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else sample.actions
        observations = self._observed(sample.observations, sample)
        with self._acting():
            frozen = None if self._distribution_source is None else old((observations, actions))
        columns = (sample.old_values, sample.old_log_prob, sample.advantages, sample.returns)
        return Minibatch(observations, actions, *columns, frozen)

    def _observed(self, observations: Observations, source: Any) -> Observations:
        """
        Join to the observations what a minibatch needs besides; :meth:`_unpacked` takes it apart.

        :param observations: of a rollout or of a minibatch
        :param source: the buffer, flattened, or the sample that they come from
        :return: in the place of the observations
        """
        return observations

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """The policy as it acts: without gradient, and without dropout or a moving batch norm."""
        self.policy.set_training_mode(False)
        with th.no_grad():
            yield
        self.policy.set_training_mode(True)

    @contextmanager
    def _undone_if_not_finite(self, rollout: Rollout, settings: Settings, epochs: list[list[Step]]) -> Iterator[None]:
        """
        An update, after which policy and optimizer are as they were before if it failed or anything in it was not finite.

        Looked at once, after the last step: a look at each would make the device wait. It may not come to that: torch's
        distributions refuse the parameters that such weights give.

        :param rollout: frozen
        :param settings: of this update
        :param epochs: filled by the update
        :raises FloatingPointError: if a loss, a gradient or a weight is not finite
        """
        before = deepcopy((self.policy.state_dict(), self.policy.optimizer.state_dict(), self._n_updates))
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        figures = [figure for epoch in epochs for step in epoch for figure in (step.terms.loss, *step.grad_norms)]
        weights = th.nn.utils.get_total_norm(self.policy.parameters())
        finite = self._ranks.agree(bool(th.isfinite(th.stack([*figures, weights])).all()), failure)
        if finite and failure is None:
            return
        self.policy.load_state_dict(before[0])
        self.policy.optimizer.load_state_dict(before[1])
        self._n_updates = before[2]
        if finite and failure is not None:
            raise failure
        raise FloatingPointError(self._what_is_not_finite(rollout, settings)) from failure

    def _unpacked(self, observations: Observations) -> tuple[Any, dict[str, Any]]:
        """
        Take apart what a minibatch holds in the place of observations.

        :param observations: of a minibatch, or the environments' own
        :return: what the policy takes as observations, and what it takes besides, by name
        """
        return observations, {}

    def _asked(self, observations: Observations, actions: th.Tensor, source: str | None) -> Evaluation:
        """
        Let the policy evaluate actions.

        :param observations: of a minibatch
        :param actions: of the same
        :param source: where the distribution is found, see :func:`~.find_source`
        :return: what it says, with its gradient
        """
        inputs, others = self._unpacked(observations)
        return evaluate(self.policy, inputs, actions, source, **others)

    def _evaluate(self, batch: Minibatch, settings: Settings) -> Terms:
        """
        The loss, from nothing but the policy and the arguments, so that it can be compiled.

        :param batch: some transitions
        :param settings: of this update
        :return: the loss and its parts
        """
        evaluation = self._asked(batch.observations, batch.actions, settings["distribution"])
        values, log_prob, entropy, distribution = evaluation
        advantages = losses.normalize_advantages(batch.advantages) if settings["normalize_advantage"] else batch.advantages
        ratio = losses.importance_ratio(log_prob, batch.old_log_prob)
        surrogate, objective = self._policy_objective(
            batch, ratio, advantages, settings, lambda: parameters_of(distribution())
        )
        value_loss = losses.value_loss(values.flatten(), batch.returns, batch.old_values, settings["clip_range_vf"])
        loss = -objective + settings["vf_coef"] * value_loss
        if settings["ent_coef"] is not None:
            loss = loss + settings["ent_coef"] * losses.entropy_loss(entropy, log_prob)
        log_ratio, entropies = log_prob - batch.old_log_prob, losses.state_entropy(entropy, log_prob)
        return Terms(loss, -surrogate, -objective, value_loss, log_ratio, entropies)

    def _policy_objective(
        self,
        batch: Minibatch,
        ratio: th.Tensor,
        advantages: th.Tensor,
        settings: Settings,
        parameters: Callable[[], ActionParameters],
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        What the policy maximises. May depend on no attribute but the policy: a compiled graph would not see it change.

        :param batch: the transitions that the policy has just evaluated
        :param ratio: importance ratios, shape (batch,)
        :param advantages: normalised if asked for, shape (batch,)
        :param settings: of this update
        :param parameters: gives the action distributions of that evaluation, with their gradient
        :return: the surrogate, and the objective made of it; two scalars
        """
        raise NotImplementedError

    def _what_is_not_finite(self, rollout: Rollout, settings: Settings) -> str:
        """
        :param rollout: of the update that failed, with the policy back to what it was before
        :param settings: of that update
        :return: where it went wrong, in a sentence
        """
        bad: dict[str, list[str]] = {"terms of the loss": [], "gradients": []}
        for batch in rollout.chunks():
            self.policy.optimizer.zero_grad()
            terms = self._evaluate(batch, settings)
            terms.loss.backward()  # type: ignore[no-untyped-call]
            gradients = {name: weight.grad for name, weight in self.policy.named_parameters() if weight.grad is not None}
            for place, tensors in zip(bad, (terms._asdict(), gradients), strict=True):
                bad[place] += [name for name, tensor in tensors.items() if not th.isfinite(tensor).all()]
        self.policy.optimizer.zero_grad()
        buffer = self.rollout_buffer
        names = ("actions", "rewards", "values", "returns", "advantages", "log_probs")
        seen = buffer.observations if isinstance(buffer.observations, dict) else {"observations": buffer.observations}
        arrays = {**seen, **{name: getattr(buffer, name) for name in names}}
        bad["rollout"] = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        found = ", ".join(f"{place} {list(dict.fromkeys(names)) or 'all finite'}" for place, names in bad.items())
        elsewhere = f", or on another rank than this, {self._ranks.rank}" if self._ranks.size > 1 else ""
        late = "" if any(bad.values()) else f" (it went wrong within the update{elsewhere}: try a lower `learning_rate`)"
        largest = float(np.abs(buffer.returns).max())
        if float(np.finfo(np.float32).max) ** 0.5 < largest < np.inf:
            late = f" (returns reach {largest:.3g}, whose square is too large for float32: scale the rewards)"
        return (
            f"an update of {type(self).__name__} after {self.num_timesteps} steps is not finite: {found}{late}. "
            "The update was undone: the policy is the last good one and can be saved"
        )

    def _measure_drift(self, rollout: Rollout) -> Drift:
        """
        :param rollout: frozen before the update
        :return: how far the policy moved
        """

        def of(chunk: Minibatch) -> tuple[th.Tensor, ...]:
            evaluation = self._asked(chunk.observations, chunk.actions, self._distribution_source)
            log_ratio = evaluation.log_prob - chunk.old_log_prob
            if chunk.old is None:
                return (log_ratio,)
            return log_ratio, kl_divergence(chunk.old, parameters_of(evaluation.distribution()))

        def moved() -> tuple[th.Tensor | None, th.Tensor]:
            with self._acting():
                log_ratio, *exact = collect_rows(map(of, rollout.chunks()), len(rollout))
            return exact[0] if exact else None, log_ratio

        return self._ranks.drift(self.policy, moved)

    def _after_update(self, drift: Drift) -> None:
        """
        React to how far the policy moved, and record what goes beside SB3's own figures.

        :param drift: over the whole rollout
        """

    def _log_update(self, epochs: list[list[Step]], settings: Settings, drift: Drift) -> None:
        """
        Record SB3's figures under SB3's names, and how far the policy moved.

        :param epochs: what came of each epoch's minibatches; ``approx_kl`` is the last epoch's mean, as in SB3
        :param settings: of this update
        :param drift: over the whole rollout
        """
        terms = [step.terms for epoch in epochs for step in epoch]
        log_ratios = [each.log_ratio for each in terms]
        clip_range = settings["clip_range"]
        figures = {
            "entropy_loss": -minibatch_mean(th.mean, [each.entropy for each in terms]),
            "policy_gradient_loss": minibatch_mean(th.mean, [each.surrogate for each in terms]),
            "value_loss": minibatch_mean(th.mean, [each.value for each in terms]),
            "approx_kl": minibatch_mean(losses.k3_estimate, log_ratios[-len(epochs[-1]) :]),
            "clip_fraction": minibatch_mean(
                lambda values: losses.clip_fraction(losses.importance_ratio(values, 0.0), clip_range), log_ratios
            ),
            "loss": terms[-1].loss.item(),
            "explained_variance": float(
                explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten())
            ),
        }
        figures = self._ranks.mean(figures, self.rollout_buffer.values.size)
        figures |= {name: measure for name, measure in drift._asdict().items() if measure is not None}
        figures |= self._gradient_norms([step for epoch in epochs for step in epoch])
        if hasattr(self.policy, "log_std"):
            figures["std"] = self.policy.log_std.exp().mean().item()
        figures |= {name: settings[name] for name in ("clip_range", "clip_range_vf") if settings[name] is not None}
        self._record(figures)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _record(self, figures: Mapping[str, float]) -> None:
        """
        Log figures of an update under ``train/``.

        :param figures: by name. One that is not finite (an importance ratio that overflowed, the explained variance of returns
            that do not vary) is kept out of JSON, which has no number for it
        """
        for name, figure in figures.items():
            self.logger.record(f"train/{name}", figure, exclude=None if math.isfinite(figure) else "json")

    def _gradient_norms(self, steps: list[Step]) -> dict[str, float]:
        """
        :param steps: of an update; the one that an early stop kept from being made has no gradient
        :return: mean length of the gradient, or of its parts, before it was clipped
        """
        names = ("grad_norm_actor", "grad_norm_critic") if isinstance(self.max_grad_norm, tuple) else ("grad_norm",)
        made = [step.grad_norms for step in steps if step.grad_norms]
        return {name: minibatch_mean(th.mean, norms) for name, norms in zip(names, zip(*made, strict=True), strict=False)}

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self._ranks != distributed.current():
            raise RuntimeError(
                "a model is trained where it was made or loaded: inside the same `distributed.session`, or none"
            )
        self._ranks.enter(self)
        progress_bar = progress_bar and self._ranks.leads
        started = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._look_at_policy()
        self._ranks.begin(self, lambda: self._alike(started[0]))
        return started

    def _alike(self, total_timesteps: int) -> dict[str, Any]:
        """
        :param total_timesteps: at the end of training
        :return: what has to be the same on all ranks, by name
        """
        self._check_sampling("rollout_buffer", self.rollout_buffer)
        names = ("num_timesteps", "n_epochs", "normalize_advantage", "gamma", "gae_lambda", "compile")
        own = {name: getattr(self, name) for name in names}
        rate = self.lr_schedule(self._current_progress_remaining)
        made = {"algorithm": type(self).__name__, "learning_rate": rate, "total_timesteps": total_timesteps}
        return {
            **made,
            **own,
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            **self._settings(),
        }

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

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load weights, as SB3 does; the error says what to do where only one of two covariances learns.

        :param load_path_or_dict: a saved model, or weights as from ``get_parameters``
        :param exact_match: whether all weights have to be given
        :param device: to read a saved model on
        :raises RuntimeError: if names or shapes do not fit
        """
        given: Any = load_path_or_dict
        if not isinstance(given, dict):
            _, given, _ = load_from_zip_file(given, device=device, load_data=False)
        mismatch = covariance_mismatch(self.policy.state_dict().keys(), given.get("policy", {}).keys())
        # Without an exact match the policy's other weights are taken, but an optimizer's state fits all of them or none
        if mismatch and (exact_match or "policy.optimizer" in given):
            raise RuntimeError(f"the parameters do not fit {type(self).__name__}: {mismatch}")
        super().set_parameters(given, exact_match, device)

    @classmethod
    def load(
        cls: type[SelfProximal],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfProximal:
        """
        Load a model as SB3 does, and warn where arguments in a file of another algorithm mean something else here.

        :param path: see SB3, as for all of these
        :param env: to go on training in
        :param device: to put the model on
        :param custom_objects: to take in the place of what the file has
        :param print_system_info: whether to print on what system the file was saved
        :param force_reset: whether training resets the environments first
        :param kwargs: the constructor's, to replace what the file says
        :return: the model
        :raises ValueError: for the file of an algorithm that is no PPO
        """
        objects = custom_objects or {}
        found = saved_entries(path)
        entries = cls._own_entries(found, {**objects, **kwargs})
        if "clip_range" in objects.keys() - found.keys():
            # SB3 replaces only what the file has
            kwargs = {"clip_range": objects["clip_range"], **kwargs}
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        for name in found.keys() - entries.keys():
            vars(model).pop(name, None)
        return model

    @staticmethod
    def _differences(entries: dict[str, Any], given: dict[str, Any]) -> list[str]:
        """
        List what in a file means something else here than to the algorithm that saved it.

        :param entries: of the file
        :param given: arguments that the user replaces entries with
        :return: sentences; a subclass has its own
        """
        return []

    @classmethod
    def _own_entries(cls, entries: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """
        Take from a file's entries those that this algorithm has; warn where one means something else here.

        :param entries: of the file
        :param given: arguments that the user replaces entries with
        :return: without what only another algorithm has
        :raises ValueError: for the file of an algorithm that is no PPO
        """
        require_ppo(entries)
        differences = cls._differences(entries, given)
        if differences:
            warnings.warn(f"{cls.__name__} opens a file of another algorithm: {'; '.join(differences)}", stacklevel=3)
        return {name: entry for name, entry in entries.items() if name not in cls._foreign_entries}

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
        return safe_load.load_safe(cls, path, env, device, max_bytes, arguments, cls._own_entries)
