"""PPO with an adaptive KL penalty, PPO-clip and a fixed-covariance Gaussian policy for Stable-Baselines3."""

from sb3_ppo_penalty.algorithms.ppo_clip import ARTICLE_RECIPE, PPOClip
from sb3_ppo_penalty.algorithms.ppo_penalty import PAPER, PENDULUM, ROBUST, PPOPenalty
from sb3_ppo_penalty.objectives.divergence import register_divergence
from sb3_ppo_penalty.objectives.kl_controllers import DualAscent, KLController, KLReading, Proportional
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty
from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ppo_penalty.rollouts.rollout import RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer
from sb3_ppo_penalty.saving.checkpoints import ResumableCheckpointCallback, latest_checkpoint, resume
from sb3_ppo_penalty.saving.safe_archive import UnsafeFileError
from sb3_ppo_penalty.saving.training_state import ResumableEnv
from sb3_ppo_penalty.updates.guard import Guard
from sb3_ppo_penalty.version import __version__

__all__ = [
    "ARTICLE_RECIPE",
    "PAPER",
    "PENDULUM",
    "ROBUST",
    "CnnPolicy",
    "DualAscent",
    "Guard",
    "KLController",
    "KLPenalty",
    "KLReading",
    "MlpPolicy",
    "MultiInputPolicy",
    "PPOClip",
    "PPOPenalty",
    "Proportional",
    "ResumableCheckpointCallback",
    "ResumableEnv",
    "RewardToGoDictRolloutBuffer",
    "RewardToGoRolloutBuffer",
    "UnsafeFileError",
    "__version__",
    "latest_checkpoint",
    "register_divergence",
    "resume",
]
