"""One training on several processes (ranks), each with environments of its own; the engine is torch.distributed."""

from sb3_ppo_penalty.distributed.session import session
from sb3_ppo_penalty.updates.ranks import RankError, Ranks, current

__all__ = ["RankError", "Ranks", "current", "session"]
