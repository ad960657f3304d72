"""Vectorised environments that cost less per step than SB3's, and gymnasium's batched environments as SB3's."""

from sb3_ppo_penalty.vec_envs.batched import BatchedVecEnv
from sb3_ppo_penalty.vec_envs.lean import LeanCallback, LeanVecEnv, LeanVecNormalize, lean

__all__ = ["BatchedVecEnv", "LeanCallback", "LeanVecEnv", "LeanVecNormalize", "lean"]
