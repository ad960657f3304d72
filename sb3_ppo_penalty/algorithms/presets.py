"""Dicts of arguments to print and to pass: the article's recipe, the paper's constants, and tuned sets."""

from typing import Any

from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_ppo_penalty.rollouts.reward_to_go import RewardToGoRolloutBuffer

#: The article's section 5, with the numbers of the tutorial that it follows:
#: ``PPOClip("MlpPolicy", "Pendulum-v1", **ARTICLE_RECIPE)``.
#:
#: Batches of 11 whole episodes of 200 steps, the smallest number that reaches the tutorial's 2048 steps; rewards-to-go with no
#: bootstrapping and no GAE; advantages normalised once over the batch; 10 full-batch updates; separate 64-64 ReLU networks
#: for actor and critic; plain mean squared error; no entropy bonus; no gradient clipping; covariance 0.5 I. One Adam over two
#: disjoint networks is two Adams: it works parameter by parameter. With more than one environment, multiply ``batch_size``
#: by their number. What becomes of an episode that the batch cuts short:
#: see :class:`~.RewardToGoMixin`.
ARTICLE_RECIPE: dict[str, Any] = {
    "learning_rate": 3e-4,
    "n_steps": 2200,
    "batch_size": 2200,
    "n_epochs": 10,
    "gamma": 0.99,
    "clip_range": 0.2,
    "normalize_advantage": False,
    "ent_coef": 0.0,
    "vf_coef": 1.0,
    "max_grad_norm": float("inf"),
    "rollout_buffer_class": RewardToGoRolloutBuffer,
    "policy_kwargs": {
        "net_arch": {"pi": [64, 64], "vf": [64, 64]},
        "activation_fn": nn.ReLU,
        "ortho_init": False,
        "covariance": 0.5,
        "optimizer_kwargs": {"eps": 1e-8},
    },
}

#: The paper's constants (Schulman et al. 2017, section 4 and, for MuJoCo, table 3):
#: ``PPOPenalty("MlpPolicy", "Pendulum-v1", **PAPER)``.
#:
#: ``kl_min`` and ``kl_max`` are left to follow ``target_kl``: the paper's band of 1.5 either way is the default. The paper's
#: Gaussian learns its deviations: on Box actions add ``policy_kwargs=dict(learn_covariance=True)``.
PAPER: dict[str, Any] = {
    # Table 3: horizon, Adam's step size, epochs, minibatch, discount, GAE parameter
    "n_steps": 2048,
    "learning_rate": 3e-4,
    "n_epochs": 10,
    "batch_size": 64,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    # Table 1: the best of the three targets; section 4: the first coefficient and its factor
    "target_kl": 0.01,
    "kl_coef": 1.0,
    "kl_coef_factor": 2.0,
    "kl_controller": "adaptive",
}

#: What keeps single states from going far where the mean stays on its target, without the ratio clip:
#: ``PPOPenalty("MlpPolicy", "Pendulum-v1", **ROBUST)``. From ``examples/trust_region_study.py``; its figures stand in
#: ``examples/results/trust_region/summary.md``.
ROBUST: dict[str, Any] = {
    # About what PPO-clip itself moves in an update; the paper's 0.01 is slow, but for a fixed covariance and small steps
    "target_kl": 0.03,
    # Exact for an update that converges, where the paper's doubling swings around the target
    "kl_controller": "proportional",
    # modular_rl's and TF-Agents' largest step
    "kl_coef_factor": 1.5,
    # No sample pulls on once it is twice as likely. A tighter 1.3 breaks LunarLander and CartPole at this target
    "max_ratio": 2.0,
    # Heess et al. 2017: no epoch goes on beyond four times the target
    "guard": {"action": "rollback", "max_kl_factor": 4.0},
}

#: A penalty without any clip for the field's own protocol on MuJoCo, where the learning rate falls to 0:
#: ``PPOPenalty(ActorCriticPolicy, env, **MUJOCO)``. From ``examples/field_protocol.py``; its figures stand in
#: ``examples/results/field_protocol/summary.md``.
MUJOCO: dict[str, Any] = {
    # What the clip moves in an update while the learning rate is high
    "target_kl": 0.028,
    "kl_controller": "proportional",
    "kl_coef_factor": 1.5,
    # A floor: below it the last updates would go as far as the first ones, whatever the learning rate
    "kl_coef": 2.0,
    "kl_coef_bounds": (2.0, 1e3),
    # Charged by the sample, so that no ratio runs away: it rests at 1 + 1 / kl_coef, that of a worse action at 1 - 1 / kl_coef
    "kl_penalty": {"sampled": True, "advantage_weighted": True},
}

#: What learns Pendulum-v1 in a minute or two, of RL Zoo's entry, which says how it was tuned:
#: ``PPOPenalty("MlpPolicy", env, **PENDULUM).learn(100_000)``, where ``env`` is four environments with normalised rewards,
#: ``VecNormalize(make_vec_env("Pendulum-v1", n_envs=4), norm_obs=False, gamma=PENDULUM["gamma"])``.
PENDULUM: dict[str, Any] = {
    "n_steps": 256,
    "batch_size": 64,
    "n_epochs": 10,
    "gamma": 0.98,
    "gae_lambda": 0.9,
    "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
    "max_grad_norm": 5.0,
    "target_kl": 0.003,
    "kl_coef": 3.0,
    "kl_coef_factor": 1.5,
    "kl_coef_bounds": (0.1, 1e3),
    "kl_controller": "proportional",
    "policy_kwargs": {"covariance": 2.0, "activation_fn": nn.ReLU},
}
