"""PPO with an adaptive KL penalty, PPO-clip and a fixed-covariance Gaussian policy for Stable-Baselines3."""

from sb3_ppo_penalty.checkpoints import ResumableCheckpointCallback, latest_checkpoint, resume
from sb3_ppo_penalty.continuation import ResumableEnv
from sb3_ppo_penalty.divergence import register_divergence
from sb3_ppo_penalty.guard import Guard
from sb3_ppo_penalty.kl_control import DualAscent, KLController, KLReading, Proportional
from sb3_ppo_penalty.kl_penalty import KLPenalty
from sb3_ppo_penalty.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ppo_penalty.ppo_clip import DOCUMENT_RECIPE, PPOClip
from sb3_ppo_penalty.ppo_penalty import PAPER, PENDULUM, ROBUST, PPOPenalty
from sb3_ppo_penalty.rollout import RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer
from sb3_ppo_penalty.safe_archive import UnsafeFileError
from sb3_ppo_penalty.version import __version__

__all__ = [
    "DOCUMENT_RECIPE",
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
