"""
The article's recipe (section 5) as a hyperparameter module for RL Zoo.

``python -m sb3_ppo_penalty train --algo ppo_clip --env Pendulum-v1 --conf-file sb3_ppo_penalty.zoo.article``

It is a module and not a YAML file, because the recipe names a class, its rollout buffer, which RL Zoo does not read from YAML.
For the article see :mod:`sb3_ppo_penalty.algorithms`.
"""

from copy import deepcopy
from typing import Any

from sb3_ppo_penalty import ARTICLE_RECIPE

#: Entries in RL Zoo's format; 220,000 steps are 100 of the recipe's batches
hyperparams: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {"n_envs": 1, "n_timesteps": 220_000, "policy": "MlpPolicy", **deepcopy(ARTICLE_RECIPE)}
}
