"""The one constructor and the one train loop of every algorithm of the package."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_penalty.algorithms import checks
from sb3_ppo_penalty.algorithms.loss import LossAlgorithm
from sb3_ppo_penalty.arguments import ArgumentError, require
from sb3_ppo_penalty.objectives.drift import Drift
from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ppo_penalty.rollouts.lean import make_lean
from sb3_ppo_penalty.rollouts.reward_to_go import without_time_limits
from sb3_ppo_penalty.rollouts.rollout import Transitions, draws_rows, flat_copy, sampled_minibatches
from sb3_ppo_penalty.updates.evaluation import (
    Evaluator,
    acting,
    with_weights_of_now,
)
from sb3_ppo_penalty.updates.figures import update_figures
from sb3_ppo_penalty.updates.health import undone_if_not_finite
from sb3_ppo_penalty.updates.ranks import current
from sb3_ppo_penalty.updates.step import EagerStepper, LossSettings, Stepper, StepSettings
from sb3_ppo_penalty.updates.update import Update

LOGGER = logging.getLogger(__name__)

#: In how many states of a rollout the policy's action distribution is looked for
LOOKED_AT = 8

SelfProximal = TypeVar("SelfProximal", bound="ProximalAlgorithm")


class ProximalAlgorithm(LossAlgorithm):
    """
    What PPO-clip and PPO-penalty share: everything but the policy's objective and the reaction to an update.

    Collection, callbacks, ``learn``, ``save`` and ``load`` are SB3's. A subclass implements :meth:`_policy_objective` and may
    extend :meth:`_loss_settings`, :meth:`_step_settings`, :meth:`_steppers`, :meth:`_after_update` and
    :meth:`_check_arguments`.

    The arguments are those of ``stable_baselines3.PPO``, in its order and with its defaults, except:

    :param clip_range: as in PPO; a subclass may allow None
    :param target_kl: its meaning is the subclass's
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
    #: Buffer classes whose minibatches are known to be rows of their arrays
    _rollout_buffer_classes: ClassVar[tuple[type[RolloutBuffer], ...]] = (RolloutBuffer, DictRolloutBuffer)
    #: The method that steps through the environments
    _collect: ClassVar[Callable[..., bool]] = OnPolicyAlgorithm.collect_rollouts
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
        target_kl: float | Schedule | None = None,
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
        try:
            super().__init__(
                policy,
                env,
                learning_rate,
                n_steps=n_steps,
                gamma=gamma,
                gae_lambda=gae_lambda,
                ent_coef=ent_coef,
                vf_coef=vf_coef,
                max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                rollout_buffer_class=rollout_buffer_class,
                rollout_buffer_kwargs=rollout_buffer_kwargs,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                # Rank 0 speaks for all
                verbose=verbose if current().is_main_process else 0,
                device=device,
                seed=seed,
                _init_setup_model=False,
            )
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
        self._ranks = current()
        self._check_arguments()
        policy_class = self.policy_class
        self.policy_class = self._policy_maker()  # type: ignore[assignment]
        try:
            self._build()
        finally:
            self.policy_class = policy_class
        make_lean(self.rollout_buffer)
        if self.clip_range is not None:
            self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        self._compiler = None

    def _policy_maker(self) -> Callable[..., Any]:
        """Return what SB3 makes the policy with."""
        return self.policy_class

    def _build(self) -> None:
        """Let SB3 make buffer and policy of arguments that have been checked."""
        super()._setup_model()

    def _check_arguments(self) -> None:
        """
        Check the arguments before anything is built.

        :raises ValueError: naming the argument that is wrong
        """
        checks.to_plain_python(vars(self))
        require(hasattr(self, "action_space"), "env", self.env, "an environment or the name of one")
        checks.check_action_space(self.action_space)
        checks.check_numbers(self)
        self.max_grad_norm = checks.checked_max_grad_norm(self.max_grad_norm)
        checks.check_schedules(self)
        self._check_policy()
        checks.check_rollout(self, self._rollout_buffer_classes)

    def _check_policy(self) -> None:
        """
        Refuse a policy that the algorithm cannot train.

        :raises ValueError: naming ``policy``
        """
        checks.check_policy(self.policy_class)

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        """
        Warn of a GPU where it is slower, for SB3's MlpPolicy and for the package's.

        :param mlp_class_name: name of SB3's class
        """
        super()._maybe_recommend_cpu(mlp_class_name)
        super()._maybe_recommend_cpu(MlpPolicy.__name__)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the random generators and the environments, as SB3 does; those of several ranks differently.

        :param seed: of the whole training
        """
        super().set_random_seed(self._ranks.seed(seed))

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
        env = without_time_limits(env, rollout_buffer)
        # Not by its class: a policy may be wrapped, as by `th.compile`
        if (update_covariance := getattr(self.policy, "update_covariance", None)) is not None:
            update_covariance(1 - self.num_timesteps / self._total_timesteps)
        with self._get_compiler().acting() if self.compile else nullcontext():
            return self._ranks.collect(self, callback, lambda own: self._collect(env, own, rollout_buffer, n_rollout_steps))

    def train(self) -> None:
        """Update the policy from the rollout that was just collected."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        update = self._new_update()
        with undone_if_not_finite(self, update, self._evaluate):
            for step in self._steppers(update):
                goes_on = update.run_epoch(step, self.normalize_advantage)
                self._n_updates += 1
                if not goes_on:
                    break
            drift = update.drift()
        self._after_update(drift)
        self._ranks.check_same(self)
        self._record(update_figures(update, self.rollout_buffer.values, self.rollout_buffer.returns, drift))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _new_update(self) -> Update:
        """Freeze the rollout on the device, with the distributions of the policy that collected it, and take the schedules."""
        buffer = self.rollout_buffer
        checks.check_sampling("rollout_buffer", buffer, self._rollout_buffer_classes, self._ranks.size)
        flat = buffer if draws_rows(buffer, self._rollout_buffer_classes) else flat_copy(buffer)
        rollout = Transitions.of(flat)
        rollout = rollout._replace(observations=self._observed(rollout.observations, flat))
        some = rollout.first(LOOKED_AT)
        with acting(self.policy):
            self._distribution_source = self._find_source(some.observations, some.actions)
        evaluator, batch_size = self._evaluator(self._distribution_source), min(self.batch_size, rollout.size)
        rollout, loss = evaluator.freeze(rollout), self._loss_settings()

        def stepper(settings: StepSettings) -> Stepper:
            return self._stepper(loss, settings, batch_size)

        sampled, settings = self._sampler(rollout, evaluator), self._step_settings()
        return Update(self.policy, rollout, sampled, loss, settings, batch_size, evaluator, self._ranks, stepper)

    def _sampler(self, rollout: Transitions, evaluator: Evaluator) -> Callable[[], Iterator[Transitions]] | None:
        """
        Give the minibatches that the buffer makes by a ``get`` of its own.

        :param rollout: frozen
        :param evaluator: asks the policy that acted
        :return: goes once over them; None where minibatches are rows of the rollout
        """
        if draws_rows(self.rollout_buffer, self._rollout_buffer_classes):
            return None
        if self.compile and self._get_compiler().refusal is None:
            self._get_compiler().refuse("the rollout buffer has a `get` of its own, whose minibatches may differ in kind")
        get, old = self.rollout_buffer.get, with_weights_of_now(self.policy, lambda asked: evaluator.parameters(*asked))

        def take(sample: Any) -> Transitions:
            actions = sample.actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else sample.actions
            observations = self._observed(sample.observations, sample)
            with acting(self.policy):
                frozen = None if evaluator.source is None else old((observations, actions))
            columns = (sample.old_values, sample.old_log_prob, sample.advantages, sample.returns)
            return Transitions(observations, actions, *columns, frozen)

        return lambda: sampled_minibatches(get, self.batch_size, take)

    def _step_settings(self) -> StepSettings:
        """Give what an optimizer step depends on besides the gradient; a subclass adds its own."""
        apart = isinstance(self.max_grad_norm, tuple)
        return StepSettings(self.max_grad_norm, actor=self._actor_and_critic().actor if apart else None)

    def _steppers(self, update: Update) -> Iterator[Stepper]:
        """
        Give what makes the steps of each epoch; a subclass may look at the policy between two epochs.

        :param update: that is made
        """
        yield from itertools.repeat(update.stepper(update.settings), self.n_epochs)

    def _stepper(self, loss: LossSettings, settings: StepSettings, batch_size: int) -> Stepper:
        """
        Give what makes the optimizer's steps.

        :param loss: settings of the loss
        :param settings: of the steps
        :param batch_size: of all minibatches but an epoch's last
        """
        eager = EagerStepper(self.policy, self._evaluate, loss, settings, self._ranks)
        stepper: Stepper = self._get_compiler().stepper(eager, batch_size) if self.compile else eager
        return stepper

    def _get_compiler(self) -> Any:
        """Give the one that keeps this model's graphs."""
        if self._compiler is None or self._compiler.policy is not self.policy:
            # Here, because torch's compiler takes longer to import than everything else together
            from sb3_ppo_penalty.compiled.compiler import Compiler

            self._compiler = Compiler(self.policy, self._evaluate, lambda text: self.logger.info(text))
        return self._compiler

    def _after_update(self, drift: Drift) -> None:
        """
        React to how far the policy moved, and record what goes beside SB3's own figures.

        :param drift: over the whole rollout
        """

    def _record(self, figures: Mapping[str, float]) -> None:
        """
        Log figures of an update under ``train/``.

        :param figures: by name. One that is not finite (an importance ratio that overflowed, the explained variance of returns
            that do not vary) is kept out of JSON, which has no number for it
        """
        for name, figure in figures.items():
            self.logger.record(f"train/{name}", figure, exclude=None if math.isfinite(figure) else "json")

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self._ranks != current():
            raise RuntimeError(
                "a model is trained where it was made or loaded: inside the same `distributed.session`, or none"
            )
        self._ranks.enter(self)
        progress_bar = progress_bar and self._ranks.is_main_process
        started = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._look_at_policy()
        self._ranks.begin(self, lambda: self._facts(started[0]))
        return started

    def _facts(self, total_timesteps: int) -> dict[str, Any]:
        """
        Name what has to be the same on all ranks.

        :param total_timesteps: at the end of training
        """
        checks.check_sampling("rollout_buffer", self.rollout_buffer, self._rollout_buffer_classes, self._ranks.size)
        names = ("num_timesteps", "n_epochs", "normalize_advantage", "gamma", "gae_lambda", "compile")
        facts = {name: getattr(self, name) for name in (*names, "observation_space", "action_space")}
        rate = self.lr_schedule(self._current_progress_remaining)
        facts |= {"algorithm": type(self).__name__, "learning_rate": rate, "total_timesteps": total_timesteps}
        return facts | self._loss_settings()._asdict() | self._step_settings()._asdict()

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
