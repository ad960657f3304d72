"""Actor-critic policies, and the Gaussian whose covariance does not learn."""

from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
