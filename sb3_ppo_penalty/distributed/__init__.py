"""One training on several processes, started by ``torchrun``."""

from sb3_ppo_penalty.distributed.team import RankError, Ranks, current, session

__all__ = ["RankError", "Ranks", "current", "session"]
