"""SB3's actor-critic policies with a Gaussian action distribution whose covariance is not learned."""

from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
