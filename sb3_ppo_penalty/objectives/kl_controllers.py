"""
Rules that adapt the coefficient of the KL penalty to the measured divergence; plain floats in, plain floats out.

The article and the paper are named in :mod:`sb3_ppo_penalty.objectives`.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sb3_ppo_penalty.arguments import require, require_number

#: Width of the paper's band around the target divergence, section 4: ``kl_min = target / 1.5``, ``kl_max = 1.5 * target``
PAPER_BAND = 1.5


def kl_band(target_kl: float, kl_min: float | None = None, kl_max: float | None = None) -> tuple[float, float]:
    """
    Return the two divergences between which the adaptive rule leaves the coefficient unchanged.

    Source: the article, section 4.2 (KL_min, KL_max); the default band is the paper's, section 4.

    :param target_kl: divergence aimed at, in nats
    :param kl_min: lower threshold, in nats; None for ``target_kl / 1.5``
    :param kl_max: upper threshold, in nats; None for ``1.5 * target_kl``
    :return: ``(kl_min, kl_max)``, in nats
    """
    low = target_kl / PAPER_BAND if kl_min is None else kl_min
    high = target_kl * PAPER_BAND if kl_max is None else kl_max
    return low, high


def next_kl_coef(kl_coef: float, kl: float, kl_min: float, kl_max: float, factor: float) -> float:
    """
    Raise the penalty when the policy moved too far, lower it when it barely moved.

    ``beta * f`` if ``kl > kl_max``, ``beta / f`` if ``kl < kl_min``, else ``beta`` (adaptive KL penalty, the article's
    section 4.2; the paper's section 4 has ``kl_max = 1.5 d``, ``kl_min = d / 1.5``, ``f = 2``).

    :param kl_coef: beta of the update that was just made
    :param kl: mean KL(old || new) over the whole rollout after the last epoch, in nats; if it is not finite, the coefficient
        stays
    :param kl_min: lower threshold, in nats
    :param kl_max: upper threshold, in nats
    :param factor: f, above 1
    :return: the coefficient for the next update
    """
    if not math.isfinite(kl):
        return kl_coef
    if kl > kl_max:
        return kl_coef * factor
    if kl < kl_min:
        return kl_coef / factor
    return kl_coef


def clamp(value: float, bounds: tuple[float, float]) -> float:
    """
    Limit a number to an interval.

    Without limits, a coefficient that is multiplied after every update can overflow
    (https://github.com/ray-project/ray/issues/18492), or reach 0 and stay there.

    :param value: any number
    :param bounds: ``(lowest, highest)``
    :return: the nearest number within the bounds
    """
    lowest, highest = bounds
    return min(max(value, lowest), highest)


def relative_kl(kl: float, target_kl: float) -> float:
    """
    Return the divergence in units of its target: ``KL / target``.

    :param kl: measured divergence, in nats; slightly negative values, from rounding, count as 0
    :param target_kl: divergence aimed at, in nats; may be 0, where schedules end
    :return: 0 or more; for a target of 0, infinity if the policy moved, else 1
    """
    if target_kl > 0:
        return max(kl, 0.0) / target_kl
    return math.inf if kl > 0 else 1.0


class KLReading(NamedTuple):
    """
    Figures of an update, from which a controller computes the next coefficient.

    :param kl_coef: beta of the update that was just made
    :param kl: mean KL(old || new) over the whole rollout after the last epoch, or when a guard acted, in nats; finite
    :param target_kl: divergence aimed at, in nats
    :param kl_min: lower threshold, in nats
    :param kl_max: upper threshold, in nats
    :param factor: ``kl_coef_factor``, the largest factor by which one update may raise or lower the coefficient
    """

    kl_coef: float
    kl: float
    target_kl: float
    kl_min: float
    kl_max: float
    factor: float


class KLController(Protocol):
    """
    Rule for the next coefficient: any function, or object with ``__call__``, that takes a reading.

    It is called once after every update whose divergence is finite. Its result is limited to ``kl_coef_bounds`` and holds
    until the next update unless the learning rate rises: see ``kl_coef`` of :class:`~.PPOPenalty`. A rule with a memory keeps
    it in attributes of its own: SB3's ``save`` pickles the rule with the model.
    """

    def __call__(self, reading: KLReading, /) -> float:
        """
        Return the coefficient for the next update.

        :param reading: figures of the update that was just made
        :return: beta, before it is limited to ``kl_coef_bounds``
        """
        ...


@dataclass(frozen=True)
class AdaptiveRule:
    """Rule of the article and the paper, ``"adaptive"``: two thresholds and one factor, see :func:`next_kl_coef`."""

    def __call__(self, reading: KLReading, /) -> float:
        """Apply :func:`next_kl_coef`."""
        return next_kl_coef(reading.kl_coef, reading.kl, reading.kl_min, reading.kl_max, reading.factor)


@dataclass(frozen=True)
class FixedCoefficient:
    """Constant coefficient, ``"fixed"`` (the paper's "fixed KL", section 4)."""

    def __call__(self, reading: KLReading, /) -> float:
        """Return the coefficient unchanged."""
        return reading.kl_coef


@dataclass(frozen=True)
class Proportional:
    """
    Coefficient multiplied by a power of the relative divergence, ``"proportional"``: ``beta * (KL / target)^p``.

    One update changes it by no more than ``kl_coef_factor`` either way; the thresholds are not used. If updates go on until
    surrogate and penalty balance, KL is proportional to ``beta^-2``: then p = 1/2 meets the target in one step and p = 1
    oscillates around it for ever.

    :param exponent: p; 1/4 is calmer if the measured divergence is noisy
    :raises ValueError: if p is not above 0 and at most 1
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        require_number("kl_controller.exponent", self.exponent, 0, 1, open_below=True)

    def __call__(self, reading: KLReading, /) -> float:
        """Multiply the coefficient by the power of the relative divergence, within the factor."""
        step = relative_kl(reading.kl, reading.target_kl) ** self.exponent
        return reading.kl_coef * clamp(step, (1 / reading.factor, reading.factor))


#: Adam's default constants (Kingma and Ba 2015, algorithm 1)
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


@dataclass
class DualAscent:
    """
    Coefficient as the Lagrange multiplier of ``KL <= target``, ``"dual"``: gradient ascent with Adam on ``log beta``.

    One update changes it by no more than ``kl_coef_factor`` either way; the thresholds are not used. The gradient is the
    violation of the constraint in units of the target, ``KL / target - 1``, without the factor beta, which SB3's SAC omits for
    its entropy coefficient too. It is at least -1, and clipped to at most 1: otherwise one update a hundred times too far
    would make Adam's steps tiny for a thousand updates.

    :param learning_rate: approximate largest relative change of the coefficient in one update
    :raises ValueError: if it is not above 0
    """

    learning_rate: float = 0.1
    #: Adam's running means of the gradient and of its square, and the number of updates they have seen
    mean: float = field(default=0.0, init=False)
    square: float = field(default=0.0, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        require_number("kl_controller.learning_rate", self.learning_rate, 0, open_below=True)

    def __call__(self, reading: KLReading, /) -> float:
        """Make one step of Adam on the logarithm of the coefficient, within the factor."""
        violation = relative_kl(reading.kl, reading.target_kl) - 1
        limit = math.log(reading.factor)
        return reading.kl_coef * math.exp(clamp(self._adam(min(violation, 1.0)), (-limit, limit)))

    def _adam(self, gradient: float) -> float:
        """
        Update Adam's running means and return its step.

        :param gradient: gradient of the quantity to be maximised, with respect to ``log beta``
        :return: change of ``log beta``
        """
        beta_1, beta_2 = ADAM_BETAS
        self.steps += 1
        self.mean = beta_1 * self.mean + (1 - beta_1) * gradient
        self.square = beta_2 * self.square + (1 - beta_2) * gradient**2
        mean, square = self.mean / (1 - beta_1**self.steps), self.square / (1 - beta_2**self.steps)
        return self.learning_rate * mean / (math.sqrt(square) + ADAM_EPSILON)


#: Names that ``kl_controller`` accepts, and the class of each
CONTROLLERS: dict[str, Callable[..., KLController]] = {
    "adaptive": AdaptiveRule,
    "fixed": FixedCoefficient,
    "proportional": Proportional,
    "dual": DualAscent,
}


def make_controller(choice: str | Mapping[str, Any] | KLController) -> KLController:
    """
    Make the controller that the argument ``kl_controller`` describes.

    :param choice: a name of :data:`CONTROLLERS`; a mapping with such a ``name`` and the parameters of that controller, as
        written in a YAML file; or a :class:`KLController`
    :return: a controller; a copy if one was passed, so that two models never share its memory
    :raises ValueError: for anything else; names ``kl_controller`` and what is allowed
    """
    names = ", ".join(f'"{name}"' for name in CONTROLLERS)
    allowed = f"one of {names}, a dict with such a `name`, or a function of a KLReading"
    if not isinstance(choice, (str, Mapping)):
        require(callable(choice) and not isinstance(choice, type), "kl_controller", choice, allowed)
        return copy.deepcopy(choice)
    options: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = options.pop("name", None)
    require(isinstance(name, str) and name in CONTROLLERS, "kl_controller", choice, allowed)
    own = list(inspect.signature(CONTROLLERS[name]).parameters)
    require(set(options) <= set(own), "kl_controller", choice, f'"{name}" with no parameters but {own}')
    return CONTROLLERS[name](**options)
