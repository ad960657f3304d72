"""Vectorised environments that cost less per step than SB3's, and an adapter for gymnasium's batched environments."""

from sb3_ppo_penalty.vec_envs.batched import BatchedVecEnv
from sb3_ppo_penalty.vec_envs.lean import LeanCallback, LeanVecEnv, LeanVecNormalize, lean

__all__ = ["BatchedVecEnv", "LeanCallback", "LeanVecEnv", "LeanVecNormalize", "lean"]
