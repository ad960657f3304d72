"""The shape of the penalty: which divergence, how it is charged, and how far single ratios count."""

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
    What is taken from the surrogate: ``kl_coef * mean(KL) + cutoff_coef * cutoff(KL)``, and of which ratios it is made.

    The fields are static; everything else may be a tensor, and nothing here looks at its value.

    :param direction: of the divergence in the objective, :func:`~.directed_divergence`:
        ``"old_new"`` (the document's and the paper's), ``"new_old"`` or ``"symmetric"``. The logged divergence, which the
        controller follows, is KL(old || new) in any case
    :param cutoff_coef: of the quadratic cutoff beyond twice the target, :func:`~.quadratic_cutoff`, in
        the unit of the advantages per squared nat. 0: none; modular_rl has 1000
    :param per_state: whether the cutoff holds every state by itself, or the minibatch's mean (modular_rl)
    :param sampled: charge :func:`~.squared_ratio_deviation` of the action taken in each state instead
        of the exact divergence, which it equals to second order in expectation. Being quadratic in the ratio it holds every
        single sample, where the exact divergence lets an unusual action run away
    :param advantage_weighted: charge each state in proportion to the size of its advantage, ``|A|``, so that the penalty is
        as strong as what pulls there. With ``sampled`` and a constant coefficient this is Simple Policy Optimization (Xie et
        al. 2024, https://arxiv.org/abs/2401.16025)
    :param max_ratio: where single importance ratios are truncated, :func:`~.truncate_ratio`; None:
        nowhere. It also bounds what ``clip_range`` leaves open
    :raises ValueError: naming the field
    """

    direction: str = "old_new"
    cutoff_coef: float = 0.0
    per_state: bool = False
    sampled: bool = False
    advantage_weighted: bool = False
    max_ratio: float | None = None

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
        require_number("kl_penalty.max_ratio", self.max_ratio, 1, open_below=True, optional=True)

    @classmethod
    def of(cls, choice: Any) -> "KLPenalty":
        """
        The shape that was asked for.

        :param choice: a :class:`KLPenalty`, the name of a direction, or a mapping of its fields, as a YAML file has it
        :raises ValueError: naming ``kl_penalty`` or the field
        """
        if isinstance(choice, cls):
            return choice
        if isinstance(choice, str):
            return cls(direction=choice)
        own = [field.name for field in fields(cls)]
        known = isinstance(choice, Mapping) and set(choice) <= set(own)
        require(known, "kl_penalty", choice, f"a KLPenalty, one of {list(DIRECTIONS)}, or a dict of {own}")
        return cls(**choice)

    def truncate(self, ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
        """
        :param ratio: importance ratio, shape (batch,)
        :param advantages: shape (batch,)
        :return: what stands for the ratio in the surrogate, shape (batch,)
        """
        return ratio if self.max_ratio is None else losses.truncate_ratio(ratio, advantages, self.max_ratio)

    def charge(
        self, ratio: th.Tensor, advantages: th.Tensor, old: ActionParameters, new: Callable[[], ActionParameters]
    ) -> th.Tensor:
        """
        What the coefficient multiplies in each state, before the mean is taken.

        :param ratio: importance ratio, not truncated, shape (batch,)
        :param advantages: shape (batch,)
        :param old: the policy that acted
        :param new: gives the policy being trained, in the same states; not asked where the charge is sampled
        :return: shape (batch,), in nats, times the unit of the advantages where they weigh it
        """
        kl = losses.squared_ratio_deviation(ratio) if self.sampled else directed_divergence(old, new(), self.direction)
        return advantages.abs() * kl if self.advantage_weighted else kl

    def penalize(
        self, objective: th.Tensor, kl: th.Tensor, kl_coef: float | th.Tensor, target_kl: float | th.Tensor
    ) -> th.Tensor:
        """
        :param objective: the surrogate, a scalar
        :param kl: :meth:`charge`, shape (batch,), in nats
        :param kl_coef: beta, in the unit of the objective per nat
        :param target_kl: the divergence aimed at, in nats
        :return: what the policy maximises, a scalar
        """
        penalized = losses.penalized_surrogate(objective, kl, kl_coef)
        if self.cutoff_coef:
            penalized = penalized - self.cutoff_coef * losses.quadratic_cutoff(kl, target_kl, self.per_state)
        return penalized
