"""PPO-clip, from scratch."""

from collections.abc import Callable
from typing import Any

import torch as th

from sb3_ppo_penalty.algorithms.proximal import ProximalAlgorithm
from sb3_ppo_penalty.arguments import require, require_number
from sb3_ppo_penalty.objectives.divergence import ActionParameters
from sb3_ppo_penalty.objectives.losses import clipped_surrogate
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.saving.file_origin import PENALTY_ENTRIES, differences_for_clip
from sb3_ppo_penalty.updates.step import LossSettings, StepSettings


class PPOClip(ProximalAlgorithm):
    """
    Proximal Policy Optimization with the clipped surrogate (the article, sections 4.2 (2) and 5; the paper, equation 7).

    With SB3's own ``ActorCriticPolicy`` it is ``stable_baselines3.PPO``, parameter for parameter and bit for bit. The names
    ``"MlpPolicy"``, ``"CnnPolicy"`` and ``"MultiInputPolicy"`` stand for this package's policies, which differ from SB3's on
    Box action spaces: their covariance does not learn.

    The arguments are those of ``stable_baselines3.PPO``, in its order and with its defaults; see there.

    :param clip_range: eps; a number or a schedule
    :param target_kl: stop an update when a minibatch's estimate of the divergence exceeds 1.5 times this, in nats (SB3's
        rule: it also stops the critic); None to never stop
    :raises ValueError: naming the argument, for a value that cannot be meant
    """

    _foreign_entries = PENALTY_ENTRIES
    _differences = staticmethod(differences_for_clip)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_number("target_kl", self.target_kl, 0, open_below=True, optional=True)
        require(self.clip_range is not None, "clip_range", self.clip_range, "a number or a schedule")

    def _step_settings(self) -> StepSettings:
        target_kl: Any = self.target_kl
        return super()._step_settings()._replace(stop_kl=None if target_kl is None else 1.5 * target_kl)

    def _policy_objective(
        self,
        batch: Transitions,
        ratio: th.Tensor,
        advantages: th.Tensor,
        settings: LossSettings,
        parameters: Callable[[], ActionParameters],
    ) -> tuple[th.Tensor, th.Tensor]:
        assert settings.clip_range is not None
        objective = clipped_surrogate(ratio, advantages, settings.clip_range)
        return objective, objective
