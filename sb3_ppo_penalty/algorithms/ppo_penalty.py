"""PPO with an adaptive KL penalty."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ppo_penalty.algorithms.proximal import ProximalAlgorithm
from sb3_ppo_penalty.arguments import ArgumentError, as_number, require, require_number, schedule_at
from sb3_ppo_penalty.objectives.divergence import ActionParameters, UnknownDivergenceError
from sb3_ppo_penalty.objectives.drift import Drift
from sb3_ppo_penalty.objectives.kl_controllers import KLController, KLReading, clamp, kl_band, make_controller
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty
from sb3_ppo_penalty.objectives.losses import clipped_surrogate, surrogate, truncate_ratio
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.saving.file_origin import differences_for_penalty
from sb3_ppo_penalty.updates.guard import Guard, GuardedUpdate, GuardReport
from sb3_ppo_penalty.updates.step import LossSettings, Stepper
from sb3_ppo_penalty.updates.update import Update

#: The target of the paper's best adaptive variant (Schulman et al. 2017, table 1), in nats
PAPER_TARGET_KL = 0.01
#: Beyond these the penalty of a divergence near the target is nothing, or everything, beside advantages of size 1
DEFAULT_KL_COEF_BOUNDS = (1e-3, 1e3)
#: Updates in a row at a bound before the user is told
SATURATION_PATIENCE = 10


class PPOPenalty(ProximalAlgorithm):
    """
    Proximal Policy Optimization with an adaptive KL penalty (the article, section 4.2 (1); the paper, equation 8).

    Maximises ``J(theta) = E[r A] - kl_coef * KL(pi_old || pi)`` with the exact divergence, in nats, summed over action
    dimensions and averaged over states. After the last epoch the divergence over the whole rollout is measured with the new
    policy: above ``kl_max`` the coefficient is multiplied by ``kl_coef_factor``, below ``kl_min`` divided by it. Both the rule
    (``kl_controller``) and what is charged (``kl_penalty``) can be exchanged.

    At the old policy the penalty's gradient is exactly 0: with one epoch of a single minibatch it cannot act.

    The arguments up to ``device`` are those of ``stable_baselines3.PPO``, in its order and with its defaults except two:

    :param clip_range: None (default): the ratio is not clipped. A number or a schedule clips it in addition to the penalty
    :param target_kl: the divergence to aim at, in nats: 0.01, the paper's. It does not stop an update. None, which is PPO's
        default, stands for 0.01 too, so that PPO's arguments can be passed as they are. A number, or a schedule like
        ``clip_range``, as are ``kl_min`` and ``kl_max``; where training overshoots ``total_timesteps`` these three stay at
        their end, while SB3 asks its own for a progress below 0

    It adds:

    :param kl_coef: beta of the first update, 1 as in the paper, in the unit of the (normalised) advantages per nat. The
        attribute of this name is the live coefficient; ``save`` keeps it. It sinks where a learning rate that falls to 0
        keeps the policy from its target; where the rate rises again it returns to where the target was last in reach
    :param kl_min: in nats; default: the paper's ``target_kl / 1.5``
    :param kl_max: in nats; default: the paper's ``1.5 * target_kl``
    :param kl_coef_factor: by how much the coefficient moves, with a ``kl_controller`` other than ``"adaptive"`` at most;
        default: the paper's 2
    :param kl_coef_bounds: ``(lowest, highest)`` coefficient. Two equal numbers keep it fixed. A lowest one of your own
        is a floor, on which the divergence falls as the learning rate does, as it does under the clip
    :param kl_controller: how the coefficient follows the divergence: ``"adaptive"`` (default), ``"fixed"``,
        ``"proportional"``, ``"dual"``; a dict with that ``name`` and the controller's own parameters; or anything that takes a
        :class:`~.KLReading` and returns the next coefficient. See
        :mod:`~sb3_ppo_penalty.objectives.kl_controllers`. A copy is kept, and saved with all that it remembers
    :param kl_penalty: what is charged: a :class:`~.KLPenalty`, a dict of its fields, or the name
        of a direction; default: the article's KL(old || new) and nothing else
    :param max_ratio: where single importance ratios are truncated in the surrogate, :func:`~.truncate_ratio`; None (default):
        nowhere. It also bounds what ``clip_range`` leaves open
    :param guard: what becomes of an update that goes too far all the same: ``"stop"``, ``"rollback"`` or ``"fixup"`` once the
        divergence exceeds ``4 * target_kl`` after an epoch; a :class:`~.Guard`, or a dict of its fields;
        default: nothing. When it acted, the coefficient follows the mean divergence of that moment, whatever the guard's
        measure, and not of where it left the policy: one that was taken back would look as if it hardly moved
    :raises ValueError: naming the argument, for a value that cannot be meant
    """

    _differences = staticmethod(differences_for_penalty)
    #: Of the last update; no file holds it
    _guard_report: GuardReport | None = None

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
        clip_range: float | Schedule | None = None,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | tuple[float, float] = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | Schedule | None = PAPER_TARGET_KL,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        compile: bool = False,
        kl_coef: float = 1.0,
        kl_min: float | Schedule | None = None,
        kl_max: float | Schedule | None = None,
        kl_coef_factor: float = 2.0,
        kl_coef_bounds: tuple[float, float] = DEFAULT_KL_COEF_BOUNDS,
        kl_controller: str | Mapping[str, Any] | KLController = "adaptive",
        kl_penalty: str | Mapping[str, Any] | KLPenalty = "old_new",
        max_ratio: float | None = None,
        guard: str | Mapping[str, Any] | Guard | None = None,
    ) -> None:
        # Here and not in `_setup_model`, which `load` calls after it has restored them
        self.kl_coef = kl_coef
        self.kl_min = kl_min
        self.kl_max = kl_max
        self.kl_coef_factor = kl_coef_factor
        self.kl_coef_bounds = kl_coef_bounds
        self.kl_controller = make_controller(kl_controller)
        self.kl_penalty = KLPenalty.of(kl_penalty)
        self.max_ratio = max_ratio
        self.guard = Guard.of(guard)
        self._saturated_updates = 0  # in a row that left the coefficient at a bound
        self._granted_kl_coef = 0.0  # by the last update: `kl_coef` differs where the user has set it since
        # Of the last update whose divergence was in reach, at no less than half of the learning rate that last rose
        self._kl_coef_in_reach = 0.0
        self._risen_learning_rate = 0.0
        self._last_learning_rate = 0.0
        # In PPO's order
        super().__init__(
            policy, env, learning_rate, n_steps, batch_size, n_epochs, gamma, gae_lambda, clip_range, clip_range_vf,
            normalize_advantage, ent_coef, vf_coef, max_grad_norm, use_sde, sde_sample_freq, rollout_buffer_class,
            rollout_buffer_kwargs, target_kl, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed, device,
            _init_setup_model, compile=compile,
        )  # fmt: skip

    def _check_arguments(self) -> None:
        super()._check_arguments()
        bounds = self.kl_coef_bounds
        pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
        require(pair, "kl_coef_bounds", bounds, "two numbers, (lowest, highest)")
        smallest: dict[str, Any] = {"kl_coef": self.kl_coef, "kl_coef_bounds": bounds[0]}
        for name, value in smallest.items():
            switched_off = isinstance(value, Real) and value == 0
            require(not switched_off, name, getattr(self, name), "above 0: to train without the penalty take `PPOClip`")
        require_number("kl_coef_bounds", bounds[0], 0, open_below=True)
        require_number("kl_coef_bounds", bounds[1], bounds[0])
        require_number("kl_coef", self.kl_coef, *bounds)
        require_number("kl_coef_factor", self.kl_coef_factor, 1, open_below=True)
        require_number("max_ratio", self.max_ratio, 1, open_below=True, optional=True)
        require_number("target_kl", self.target_kl, 0, open_below=True, optional=True, schedule=True)
        require_number("kl_min", self.kl_min, 0, optional=True, schedule=True)
        require_number("kl_max", self.kl_max, 0, open_below=True, optional=True, schedule=True)
        for progress in (1.0, 0.0):
            self._aims(progress)
        # What `load` was given
        self.kl_controller = make_controller(self.kl_controller)
        self.kl_penalty = KLPenalty.of(self.kl_penalty)
        self.guard = Guard.of(self.guard)
        apart = self._ranks.size == 1 or self.kl_penalty.per_state or not self.kl_penalty.cutoff_coef
        allowed = "one with `per_state=True` on several ranks: a cutoff on the mean over all of their minibatch is not there"
        require(apart, "kl_penalty", self.kl_penalty, allowed)
        # Plain Python: JSON in the saved file, which turns tuples into lists
        self.kl_coef_bounds = (float(bounds[0]), float(bounds[1]))
        self.kl_coef = float(self.kl_coef)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._look_at_policy()

    def _require_no_divergence(self, error: UnknownDivergenceError) -> None:
        raise ArgumentError(f"`policy` must have a KL divergence to penalise: {error}; PPOClip needs none") from error

    def _aims(self, progress: float) -> tuple[float, float, float]:
        """
        Ask the schedules, and check what they answer.

        :param progress: remaining, from 1 to 0; below it, where training overshoots ``total_timesteps``, 0 is what counts
        :return: target, lower and upper threshold, in nats
        :raises ValueError: naming the schedule and the progress
        """
        remaining = clamp(progress, (0.0, 1.0))
        target, kl_min, kl_max = (self._number_at(name, remaining) for name in ("target_kl", "kl_min", "kl_max"))
        target = PAPER_TARGET_KL if target is None else target
        low, high = kl_band(target, kl_min, kl_max)
        require(low <= high, "kl_max" if kl_min is None else "kl_min", (low, high), "such that kl_min <= kl_max")
        return target, low, high

    def _number_at(self, name: str, progress: float) -> float | None:
        """
        Ask an argument that may be a schedule for its value.

        :param name: of the argument
        :param progress: remaining, from 1 to 0
        :raises ValueError: naming the schedule and the progress, for an answer that is not a number of at least 0
        """
        value: float | Schedule | None = getattr(self, name)
        return schedule_at(name, value, progress) if callable(value) else value

    @property
    def current_target_kl(self) -> float:
        """``target_kl`` in force, in nats."""
        return self._aims(self._current_progress_remaining)[0]

    @property
    def kl_thresholds(self) -> tuple[float, float]:
        """``(kl_min, kl_max)`` in force, in nats."""
        return self._aims(self._current_progress_remaining)[1:]

    def _loss_settings(self) -> LossSettings:
        # A plain float, so that a compiled graph takes it as a number
        return (
            super()
            ._loss_settings()
            ._replace(
                kl_coef=float(self.kl_coef),
                target_kl=self.current_target_kl,
                kl_penalty=self.kl_penalty,
                max_ratio=self.max_ratio,
            )
        )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        """
        Set the learning rate; where it rises, give the coefficient back what it lost at smaller steps.

        While the rate falls to 0 the coefficient sinks with it: no penalty is light enough for a policy that can hardly move.
        At larger steps, as in a second ``learn``, it would hold nothing. It returns at least to where the divergence was last
        in reach at steps of that size; one that the user has set stays.

        :param optimizers: SB3's, whose rate is set
        """
        super()._update_learning_rate(optimizers)
        rate = float(self.policy.optimizer.param_groups[0]["lr"])
        if self.kl_coef != self._granted_kl_coef:
            self._kl_coef_in_reach = float(self.kl_coef)
        if rate > self._last_learning_rate:
            self.kl_coef = clamp(max(self.kl_coef, self._kl_coef_in_reach), self.kl_coef_bounds)
            self._risen_learning_rate = rate
        self._last_learning_rate = rate

    def _policy_objective(
        self,
        batch: Transitions,
        ratio: th.Tensor,
        advantages: th.Tensor,
        settings: LossSettings,
        parameters: Callable[[], ActionParameters],
    ) -> tuple[th.Tensor, th.Tensor]:
        penalty, kl_coef, target_kl = settings.kl_penalty, settings.kl_coef, settings.target_kl
        assert penalty is not None
        assert kl_coef is not None
        assert target_kl is not None
        kl = penalty.charge(ratio, advantages, batch.old, parameters)
        if settings.max_ratio is not None:
            ratio = truncate_ratio(ratio, advantages, settings.max_ratio)
        clip_range = settings.clip_range
        objective = surrogate(ratio, advantages) if clip_range is None else clipped_surrogate(ratio, advantages, clip_range)
        return objective, penalty.penalize(objective, kl, kl_coef, target_kl)

    def _excluded_save_params(self) -> list[str]:
        # A file without a clip range opens in stock PPO, which takes its default where it could not take None
        return [*super()._excluded_save_params(), "_guard_report", *["clip_range"] * (self.clip_range is None)]

    def _steppers(self, update: Update) -> Iterator[Stepper]:
        if self.guard is None:
            return super()._steppers(update)
        guarded = GuardedUpdate(self.guard, update, self._actor_and_critic(), self.current_target_kl)
        self._guard_report = guarded.report
        return guarded.steppers(self.n_epochs)

    def _after_update(self, drift: Drift) -> None:
        assert drift.kl is not None, "a policy without a known divergence is refused"
        target, low, high = self._aims(self._current_progress_remaining)
        report = self._guard_report if self.guard else None
        reached = report.mean_kl if report and report.acted else drift.kl
        reading = KLReading(float(self.kl_coef), reached, target, low, high, self.kl_coef_factor)
        wanted = self._wanted_kl_coef(reading)
        granted = clamp(wanted, self.kl_coef_bounds)
        change = (granted > reading.kl_coef) - (granted < reading.kl_coef)
        self.kl_coef = self._granted_kl_coef = granted
        self._watch_saturation(saturated=granted != wanted)
        # Half the rate takes a policy a quarter as far in KL, which half the coefficient makes good: the rule's one step
        if reading.kl >= low and self._last_learning_rate >= self._risen_learning_rate / 2:
            self._kl_coef_in_reach = granted
        figures = {
            "kl_coef": granted,
            "kl_coef_change": change,
            "target_kl": target,
            "target_kl_min": low,
            "target_kl_max": high,
        }
        if report:
            figures |= {f"guard_{name}": float(figure) for name, figure in vars(report).items()}
        self._record(figures)

    def _wanted_kl_coef(self, reading: KLReading) -> float:
        """
        Ask the controller for the next coefficient.

        :param reading: of the update that was just made
        :return: the controller's answer; the present coefficient where the divergence is not finite
        :raises ValueError: if that is not a number
        """
        if not math.isfinite(reading.kl):
            warnings.warn(
                f"KL(old || new) is {reading.kl}: `kl_coef` stays at {reading.kl_coef:g}", RuntimeWarning, stacklevel=2
            )
            return reading.kl_coef
        wanted = as_number(self.kl_controller(reading))
        require_number("kl_controller(reading)", wanted, infinite=True)
        return float(wanted)

    def _watch_saturation(self, saturated: bool) -> None:
        """
        Warn once when the coefficient has stood at a bound for ten updates in a row and the rule would go on.

        A lowest coefficient of the user's own is a floor to stand on, of which nobody has to be told.

        :param saturated: whether the last update left it there
        """
        lowest, highest = self.kl_coef_bounds
        weak = self.kl_coef == highest
        told = lowest < highest and (weak or lowest == DEFAULT_KL_COEF_BOUNDS[0])
        self._saturated_updates = self._saturated_updates + 1 if saturated and told else 0
        if self._saturated_updates == SATURATION_PATIENCE:
            warnings.warn(
                f"`kl_coef` has stood at its bound {self.kl_coef:g} for {SATURATION_PATIENCE} updates: the policy moves "
                f"{'more' if weak else 'less'} than asked for all the same. Try a "
                f"{'lower' if weak else 'higher'} `learning_rate`, {'fewer' if weak else 'more'} `n_epochs`, or another "
                "`target_kl`",
                RuntimeWarning,
                stacklevel=2,
            )
