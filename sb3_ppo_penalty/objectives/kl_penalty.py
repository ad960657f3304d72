"""Form of the KL penalty: which divergence is charged in which states, and how large ratios are truncated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch as th

from sb3_ppo_penalty.arguments import require, require_number
from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.objectives.divergence import DIRECTIONS, ActionParameters, directed_divergence


@dataclass(frozen=True)
class KLPenalty:
    """
    Form of the penalty that is subtracted from the surrogate: ``kl_coef * mean(KL) + cutoff_coef * cutoff(KL)``.

    The methods take tensors and never branch on their values, so that one compiled graph serves all coefficients.

    :param direction: direction of the penalised divergence, see :func:`~.directed_divergence`: ``"old_new"`` (the article's
        and the paper's), ``"new_old"`` or ``"symmetric"``. The logged divergence, which the controller follows, is always
        KL(old || new)
    :param cutoff_coef: coefficient of the quadratic penalty beyond twice the target, :func:`~.quadratic_cutoff`, in the unit
        of the advantages per squared nat; 0 for none. modular_rl has 1000
    :param per_state: whether the cutoff applies to each state separately, instead of to the minibatch's mean (modular_rl)
    :param sampled: penalise :func:`~.squared_ratio_deviation` of the action taken in each state instead of the exact
        divergence, which it equals to second order in expectation. Quadratic in the ratio, it limits the ratio of every
        sample; under the exact divergence the ratio of a rare action can grow without limit
    :param advantage_weighted: multiply the divergence of each state by the size of its advantage, ``|A|``, so that penalty and
        surrogate stay in proportion. With ``sampled`` and a constant coefficient this is Simple Policy Optimization (Xie et
        al. 2024, https://arxiv.org/abs/2401.16025)
    :raises ValueError: for a field that is not allowed; names it
    """

    direction: str = "old_new"
    cutoff_coef: float = 0.0
    per_state: bool = False
    sampled: bool = False
    advantage_weighted: bool = False

    def __post_init__(self) -> None:
        known = isinstance(self.direction, str) and self.direction in DIRECTIONS
        require(known, "kl_penalty.direction", self.direction, f"one of {list(DIRECTIONS)}")
        require_number("kl_penalty.cutoff_coef", self.cutoff_coef, 0)
        for name in ("per_state", "sampled", "advantage_weighted"):
            require(isinstance(getattr(self, name), bool), f"kl_penalty.{name}", getattr(self, name), "True or False")
        alone = self.per_state and not self.cutoff_coef
        require(not alone, "kl_penalty.per_state", self.per_state, "False without a `cutoff_coef`, which it is about")
        exact = not self.sampled or self.direction == "old_new"
        require(exact, "kl_penalty.direction", self.direction, "left out with `sampled`, whose charge has no direction")

    @classmethod
    def of(cls, choice: Any) -> "KLPenalty":
        """
        Make the penalty that the argument ``kl_penalty`` describes.

        :param choice: a :class:`KLPenalty`, the name of a direction, or a mapping of fields, as written in a YAML file
        :raises ValueError: for anything else; names ``kl_penalty`` or the field
        """
        if isinstance(choice, cls):
            return choice
        if isinstance(choice, str):
            return cls(direction=choice)
        own = [field.name for field in fields(cls)]
        known = isinstance(choice, Mapping) and set(choice) <= set(own)
        require(known, "kl_penalty", choice, f"a KLPenalty, one of {list(DIRECTIONS)}, or a dict of {own}")
        return cls(**choice)

    def charge(
        self, ratio: th.Tensor, advantages: th.Tensor, old: ActionParameters, new: Callable[[], ActionParameters]
    ) -> th.Tensor:
        """
        Return the divergence that is penalised in each state, before the mean and the coefficient.

        :param ratio: importance ratios, not truncated, shape (batch,)
        :param advantages: advantages of the minibatch, shape (batch,)
        :param old: action distributions of the policy that acted
        :param new: function that returns those of the policy being trained, in the same states; not called with ``sampled``
        :return: divergence in each state, shape (batch,), in nats; with ``advantage_weighted`` times the advantages' unit
        """
        kl = losses.squared_ratio_deviation(ratio) if self.sampled else directed_divergence(old, new(), self.direction)
        return advantages.abs() * kl if self.advantage_weighted else kl

    def penalize(
        self, objective: th.Tensor, kl: th.Tensor, kl_coef: float | th.Tensor, target_kl: float | th.Tensor
    ) -> th.Tensor:
        """
        Subtract the penalty and the cutoff from the surrogate.

        :param objective: surrogate, scalar
        :param kl: result of :meth:`charge`, shape (batch,), in nats
        :param kl_coef: beta, in the unit of the objective per nat
        :param target_kl: divergence aimed at, in nats
        :return: objective that the policy maximises, scalar
        """
        penalized = losses.penalized_surrogate(objective, kl, kl_coef)
        if self.cutoff_coef:
            penalized = penalized - self.cutoff_coef * losses.quadratic_cutoff(kl, target_kl, self.per_state)
        return penalized
