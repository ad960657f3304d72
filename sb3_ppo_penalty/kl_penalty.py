"""The shape of the penalty: which divergence, how it is charged, and how far single ratios count."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch as th

from sb3_ppo_penalty import losses
from sb3_ppo_penalty.arguments import require, require_number
from sb3_ppo_penalty.divergence import DIRECTIONS, ActionParameters, directed_divergence


@dataclass(frozen=True)
class KLPenalty:
    """
    What is taken from the surrogate: ``kl_coef * mean(KL) + cutoff_coef * cutoff(KL)``, and of which ratios it is made.

    The fields are static; everything else may be a tensor, and nothing here looks at its value.

    :param direction: of the divergence in the objective, :func:`~sb3_ppo_penalty.divergence.directed_divergence`:
        ``"old_new"`` (the document's and the paper's), ``"new_old"`` or ``"symmetric"``. The logged divergence, which the
        controller follows, is KL(old || new) in any case
    :param cutoff_coef: of the quadratic cutoff beyond twice the target, :func:`~sb3_ppo_penalty.losses.quadratic_cutoff`, in
        the unit of the advantages per squared nat. 0: none; modular_rl has 1000
    :param per_state: whether the cutoff holds every state by itself, or the minibatch's mean (modular_rl)
    :param max_ratio: where single importance ratios are truncated, :func:`~sb3_ppo_penalty.losses.truncate_ratio`; None:
        nowhere. It also bounds what ``clip_range`` leaves open
    :raises ValueError: naming the field
    """

    direction: str = "old_new"
    cutoff_coef: float = 0.0
    per_state: bool = False
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.direction, str) and self.direction in DIRECTIONS
        require(known, "kl_penalty.direction", self.direction, f"one of {list(DIRECTIONS)}")
        require_number("kl_penalty.cutoff_coef", self.cutoff_coef, 0)
        require(isinstance(self.per_state, bool), "kl_penalty.per_state", self.per_state, "True or False")
        alone = self.per_state and not self.cutoff_coef
        require(not alone, "kl_penalty.per_state", self.per_state, "False without a `cutoff_coef`, which it is about")
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

    def bounded(self, ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
        """
        :param ratio: importance ratio, shape (batch,)
        :param advantages: shape (batch,)
        :return: what stands for the ratio in the surrogate, shape (batch,)
        """
        return ratio if self.max_ratio is None else losses.truncate_ratio(ratio, advantages, self.max_ratio)

    def divergence(self, old: ActionParameters, new: ActionParameters) -> th.Tensor:
        """
        :param old: the policy that acted
        :param new: the policy being trained, in the same states
        :return: shape (batch,), in nats
        """
        return directed_divergence(old, new, self.direction)

    def penalized(
        self, objective: th.Tensor, kl: th.Tensor, kl_coef: float | th.Tensor, target_kl: float | th.Tensor
    ) -> th.Tensor:
        """
        :param objective: the surrogate, a scalar
        :param kl: :meth:`divergence`, shape (batch,), in nats
        :param kl_coef: beta, in the unit of the objective per nat
        :param target_kl: the divergence aimed at, in nats
        :return: what the policy maximises, a scalar
        """
        penalized = losses.penalized_surrogate(objective, kl, kl_coef)
        if self.cutoff_coef:
            penalized = penalized - self.cutoff_coef * losses.quadratic_cutoff(kl, target_kl, self.per_state)
        return penalized
