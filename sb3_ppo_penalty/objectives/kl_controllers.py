"""How the penalty's coefficient follows the measured divergence: plain floats in, plain floats out."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sb3_ppo_penalty.arguments import require, require_number

#: The paper's band around the target, section 4: ``kl_min = target / 1.5``, ``kl_max = 1.5 * target``
PAPER_BAND = 1.5


def kl_thresholds(target_kl: float, kl_min: float | None = None, kl_max: float | None = None) -> tuple[float, float]:
    """
    Between which divergences the coefficient rests: ``target / 1.5`` and ``1.5 * target`` unless given.

    Source: the document, section 4.2 (KL_min, KL_max); the band is the paper's (Schulman et al. 2017, section 4).

    :param target_kl: in nats
    :param kl_min: in nats; None for the paper's
    :param kl_max: in nats; None for the paper's
    :return: ``(kl_min, kl_max)``, in nats
    """
    low = target_kl / PAPER_BAND if kl_min is None else kl_min
    high = target_kl * PAPER_BAND if kl_max is None else kl_max
    return low, high


def next_kl_coef(kl_coef: float, kl: float, kl_min: float, kl_max: float, factor: float) -> float:
    """
    Raise the penalty when the policy moved too far, lower it when it barely moved.

    ``beta * f`` if ``kl > kl_max``, ``beta / f`` if ``kl < kl_min``, else ``beta`` (adaptive KL penalty, the document's
    section 4.2; Schulman et al. 2017, section 4, has ``kl_max = 1.5 d``, ``kl_min = d / 1.5``, ``f = 2``).

    :param kl_coef: beta of the update that was just made
    :param kl: mean KL(old || new) over the whole rollout after the last epoch, in nats; one that is not finite says
        nothing and moves nothing
    :param kl_min: in nats
    :param kl_max: in nats
    :param factor: f > 1
    :return: the coefficient for the next update
    """
    if not math.isfinite(kl):
        return kl_coef
    if kl > kl_max:
        return kl_coef * factor
    if kl < kl_min:
        return kl_coef / factor
    return kl_coef


def clamp(kl_coef: float, bounds: tuple[float, float]) -> float:
    """
    Keep the coefficient where a multiplicative rule can bring it back from.

    Without bounds it runs away (https://github.com/ray-project/ray/issues/18492) or reaches 0 and stays there.

    :param kl_coef: what the rule asks for
    :param bounds: ``(lowest, highest)``
    :return: the nearest coefficient inside the bounds
    """
    lowest, highest = bounds
    return min(max(kl_coef, lowest), highest)


def relative_kl(kl: float, target_kl: float) -> float:
    """
    ``KL / target``, also at the end of a schedule that takes the target to 0.

    :param kl: measured, in nats; one that rounding took below 0 counts as 0
    :param target_kl: aimed at, in nats
    :return: 0 or more; infinite if the target is 0 and the policy moved, 1 if neither
    """
    if target_kl > 0:
        return max(kl, 0.0) / target_kl
    return math.inf if kl > 0 else 1.0


class KLReading(NamedTuple):
    """
    What a controller is told after an update.

    :param kl_coef: beta of the update that was just made, whoever set it
    :param kl: mean KL(old || new) over the whole rollout after the last epoch, or when a guard acted, in nats; finite
    :param target_kl: the divergence aimed at, in nats
    :param kl_min: in nats
    :param kl_max: in nats
    :param factor: ``kl_coef_factor``, the most that one update may raise or lower the coefficient by
    """

    kl_coef: float
    kl: float
    target_kl: float
    kl_min: float
    kl_max: float
    factor: float


class KLController(Protocol):
    """
    How the coefficient follows the divergence: anything that can be called with a reading, a plain function too.

    It is called once after every update whose divergence is finite. What it returns is then brought inside
    ``kl_coef_bounds``, and stays until the next update unless the learning rate rises: see ``kl_coef`` of
    :class:`~.PPOPenalty`. What it remembers it keeps on itself: SB3's ``save`` pickles it with the
    model.
    """

    def __call__(self, reading: KLReading, /) -> float:
        """
        :param reading: of the update that was just made
        :return: the coefficient for the next update
        """
        ...


@dataclass(frozen=True)
class AdaptiveRule:
    """``"adaptive"``: thresholds and one factor, :func:`next_kl_coef`."""

    def __call__(self, reading: KLReading, /) -> float:
        """
        :param reading: of the update that was just made
        :return: the coefficient for the next update
        """
        return next_kl_coef(reading.kl_coef, reading.kl, reading.kl_min, reading.kl_max, reading.factor)


@dataclass(frozen=True)
class FixedCoefficient:
    """``"fixed"``: whatever the divergence, the coefficient stays (the paper's "fixed KL", section 4)."""

    def __call__(self, reading: KLReading, /) -> float:
        """
        :param reading: of the update that was just made
        :return: the coefficient for the next update
        """
        return reading.kl_coef


@dataclass(frozen=True)
class Proportional:
    """
    ``"proportional"``: ``beta * (KL / target)^p``, by no more than ``kl_coef_factor`` either way.

    Where an update goes until surrogate and penalty balance, KL is proportional to ``beta^-2``: then p = 1/2 meets the
    target in one step, p = 1 swings around it for ever. No threshold is used.

    :param exponent: p; half of what is exact is calmer where the measured divergence scatters
    :raises ValueError: if p is not above 0 and at most 1
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        require_number("kl_controller.exponent", self.exponent, 0, 1, open_below=True)

    def __call__(self, reading: KLReading, /) -> float:
        """
        :param reading: of the update that was just made
        :return: the coefficient for the next update
        """
        step = relative_kl(reading.kl, reading.target_kl) ** self.exponent
        return reading.kl_coef * clamp(step, (1 / reading.factor, reading.factor))


#: Adam's own defaults (Kingma and Ba 2015, algorithm 1)
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


@dataclass
class DualAscent:
    """
    ``"dual"``: gradient ascent with Adam on ``log beta``, by no more than ``kl_coef_factor`` in an update.

    Beta is the multiplier of the constraint ``KL <= target``, and too low as long as the constraint is violated. The gradient
    is the violation in units of the target, ``KL / target - 1`` (beta itself is left out, as SB3's SAC leaves it out for its
    entropy coefficient), clipped to [-1, 1]: it cannot be less, and one update that went a hundred times too far would
    otherwise make Adam's steps tiny for a thousand updates. No threshold is used.

    :param learning_rate: about the largest relative change of the coefficient in one update
    :raises ValueError: if it is not above 0
    """

    learning_rate: float = 0.1
    #: Adam's running means of the gradient and of its square, and how often they were updated
    mean: float = field(default=0.0, init=False)
    square: float = field(default=0.0, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        require_number("kl_controller.learning_rate", self.learning_rate, 0, open_below=True)

    def __call__(self, reading: KLReading, /) -> float:
        """
        :param reading: of the update that was just made
        :return: the coefficient for the next update
        """
        violation = relative_kl(reading.kl, reading.target_kl) - 1
        limit = math.log(reading.factor)
        return reading.kl_coef * math.exp(clamp(self._adam(min(violation, 1.0)), (-limit, limit)))

    def _adam(self, gradient: float) -> float:
        """
        :param gradient: of what is to grow
        :return: the step to take
        """
        slow, slower = ADAM_BETAS
        self.steps += 1
        self.mean = slow * self.mean + (1 - slow) * gradient
        self.square = slower * self.square + (1 - slower) * gradient**2
        mean, square = self.mean / (1 - slow**self.steps), self.square / (1 - slower**self.steps)
        return self.learning_rate * mean / (math.sqrt(square) + ADAM_EPSILON)


#: What may be asked for by name
CONTROLLERS: dict[str, Callable[..., KLController]] = {
    "adaptive": AdaptiveRule,
    "fixed": FixedCoefficient,
    "proportional": Proportional,
    "dual": DualAscent,
}


def make_controller(choice: str | Mapping[str, Any] | KLController) -> KLController:
    """
    The controller that was asked for.

    :param choice: a name of :data:`CONTROLLERS`; a mapping with that ``name`` and the controller's own parameters, as a YAML
        file has it; or a :class:`KLController`
    :return: a controller of this model alone: one that is given is copied, so that two models never share what it remembers
    :raises ValueError: naming ``kl_controller`` and what is wrong with it
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
