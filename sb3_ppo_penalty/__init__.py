"""PPO with an adaptive KL penalty, PPO-clip and a fixed-covariance Gaussian policy for Stable-Baselines3."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sb3_ppo_penalty.algorithms.ppo_clip import PPOClip
from sb3_ppo_penalty.algorithms.ppo_penalty import PPOPenalty
from sb3_ppo_penalty.algorithms.presets import ARTICLE_RECIPE, MUJOCO, PAPER, PENDULUM, ROBUST
from sb3_ppo_penalty.objectives.divergence import register_divergence
from sb3_ppo_penalty.objectives.kl_controllers import DualAscent, KLController, KLReading, Proportional
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty
from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ppo_penalty.rollouts.reward_to_go import RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer
from sb3_ppo_penalty.saving.checkpoints import ResumableCheckpointCallback, latest_checkpoint, resume
from sb3_ppo_penalty.saving.safe_archive import UnsafeFileError
from sb3_ppo_penalty.saving.training_state import ResumableEnv
from sb3_ppo_penalty.updates.guard import Guard
from sb3_ppo_penalty.version import __version__

if TYPE_CHECKING:
    from sb3_ppo_penalty.algorithms.maskable import MaskablePPOPenalty
    from sb3_ppo_penalty.algorithms.recurrent import RecurrentPPOClip, RecurrentPPOPenalty
    from sb3_ppo_penalty.policies.recurrent import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy

__all__ = [
    "ARTICLE_RECIPE",
    "MUJOCO",
    "PAPER",
    "PENDULUM",
    "ROBUST",
    "CnnLstmPolicy",
    "CnnPolicy",
    "DualAscent",
    "Guard",
    "KLController",
    "KLPenalty",
    "KLReading",
    "MaskablePPOPenalty",
    "MlpLstmPolicy",
    "MlpPolicy",
    "MultiInputLstmPolicy",
    "MultiInputPolicy",
    "PPOClip",
    "PPOPenalty",
    "Proportional",
    "RecurrentPPOClip",
    "RecurrentPPOPenalty",
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


#: Names whose modules need sb3-contrib, which takes its time to import -> the module
IMPORTED_LATER = {
    "MaskablePPOPenalty": "algorithms.maskable",
    "RecurrentPPOClip": "algorithms.recurrent",
    "RecurrentPPOPenalty": "algorithms.recurrent",
    "CnnLstmPolicy": "policies.recurrent",
    "MlpLstmPolicy": "policies.recurrent",
    "MultiInputLstmPolicy": "policies.recurrent",
}


def __getattr__(name: str) -> Any:
    """
    Import what needs sb3-contrib only when it is asked for.

    :param name: of the attribute
    :raises AttributeError: for a name that the package does not have
    """
    if name in IMPORTED_LATER:
        return getattr(import_module(f"{__name__}.{IMPORTED_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
