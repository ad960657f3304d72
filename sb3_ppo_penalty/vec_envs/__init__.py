"""Vectorised environments that cost less per step than SB3's."""

from sb3_ppo_penalty.vec_envs.lean import LeanVecEnv, LeanVecNormalize, lean

__all__ = ["LeanVecEnv", "LeanVecNormalize", "lean"]
