"""The filled rollout buffer as tensors, and the article's buffer of rewards-to-go."""
