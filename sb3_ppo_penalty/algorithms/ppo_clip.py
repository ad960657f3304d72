"""PPO-clip, from scratch, and the document's own recipe of it."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_ppo_penalty.algorithms.proximal import ProximalAlgorithm
from sb3_ppo_penalty.arguments import require, require_number
from sb3_ppo_penalty.objectives.divergence import ActionParameters
from sb3_ppo_penalty.objectives.losses import clipped_surrogate
from sb3_ppo_penalty.rollouts.rollout import Minibatch, RewardToGoRolloutBuffer
from sb3_ppo_penalty.saving.file_origin import PENALTY_ENTRIES, differences_for_clip
from sb3_ppo_penalty.updates.step import Settings


class PPOClip(ProximalAlgorithm):
    """
    Proximal Policy Optimization with the clipped surrogate (the document, sections 4.2 (2) and 5; the paper, equation 7).

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

    def _settings(self) -> Settings:
        return {**super()._settings(), "stop_kl": None if self.target_kl is None else 1.5 * self.target_kl}

    def _policy_objective(
        self,
        batch: Minibatch,
        ratio: th.Tensor,
        advantages: th.Tensor,
        settings: Settings,
        parameters: Callable[[], ActionParameters],
    ) -> tuple[th.Tensor, th.Tensor]:
        objective = clipped_surrogate(ratio, advantages, settings["clip_range"])
        return objective, objective


#: The document's section 5, with the numbers of the tutorial that it follows:
#: ``PPOClip("MlpPolicy", "Pendulum-v1", **ARTICLE_RECIPE)``.
#:
#: Batches of 11 whole episodes of 200 steps, the smallest number that reaches the tutorial's 2048 steps; rewards-to-go with no
#: bootstrapping and no GAE; advantages normalised once over the batch; 10 full-batch updates; separate 64-64 ReLU networks
#: for actor and critic; plain mean squared error; no entropy bonus; no gradient clipping; covariance 0.5 I. One Adam over two
#: disjoint networks is two Adams: it works parameter by parameter. With more than one environment, multiply ``batch_size``
#: by their number. What becomes of an episode that the batch cuts short:
#: see :class:`~.RewardToGoMixin`.
ARTICLE_RECIPE: dict[str, Any] = {
    "learning_rate": 3e-4,
    "n_steps": 2200,
    "batch_size": 2200,
    "n_epochs": 10,
    "gamma": 0.99,
    "clip_range": 0.2,
    "normalize_advantage": False,
    "ent_coef": 0.0,
    "vf_coef": 1.0,
    "max_grad_norm": float("inf"),
    "rollout_buffer_class": RewardToGoRolloutBuffer,
    "policy_kwargs": {
        "net_arch": {"pi": [64, 64], "vf": [64, 64]},
        "activation_fn": nn.ReLU,
        "ortho_init": False,
        "covariance": 0.5,
        "optimizer_kwargs": {"eps": 1e-8},
    },
}
