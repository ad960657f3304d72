"""The algorithms that can be compared; imports nothing, so that the command line's help needs none of the extras."""

from collections.abc import Collection
from typing import NamedTuple


class Algorithm(NamedTuple):
    """
    An algorithm of the comparison.

    :param zoo_name: RL Zoo's name of the class
    :param objective: under ``--same-policy``, algorithms with the same objective take all settings from one entry, others
        keep the settings of their own objective
    :param recurrent: whether its policies have a memory
    """

    zoo_name: str
    objective: str
    recurrent: bool = False


ALGORITHMS = {
    "ppo_penalty": Algorithm("ppo_penalty", "penalty"),
    "ppo_clip": Algorithm("ppo_clip", "clip"),
    "ppo": Algorithm("ppo", "clip"),
    "trpo": Algorithm("trpo", "trust region"),
    "ppo_article": Algorithm("ppo_clip", "clip"),
    "ppo_penalty_lstm": Algorithm("ppo_penalty_lstm", "penalty", recurrent=True),
    "ppo_lstm": Algorithm("ppo_lstm", "clip", recurrent=True),
}

#: Stock PPO, and sb3-contrib's with a memory: the first that takes part is what the others are compared with
BASELINES = ("ppo", "ppo_lstm")
#: The article's recipe; its settings are ``sb3_ppo_penalty.ARTICLE_RECIPE`` and no entry of a file
ARTICLE = "ppo_article"
#: Algorithms for which this package has tuned entries, for its own policies
TUNED_ALGORITHMS = ("ppo_penalty", "ppo_clip", "ppo_penalty_lstm")

#: Between an algorithm and the name of a variant of it, as in ``ppo_penalty+dual``
VARIANT_SEPARATOR = "+"


def base_algorithm(name: str) -> str:
    """
    Return the algorithm that a variant is a variant of.

    :param name: name of an algorithm or of a variant, such as ``ppo_penalty+dual``
    :return: the name in front of the plus sign; not checked against :data:`ALGORITHMS`
    """
    return name.partition(VARIANT_SEPARATOR)[0]


def baseline_of(algos: Collection[str]) -> str | None:
    """
    Choose the algorithm that the others are compared with.

    :param algos: names of the algorithms that take part
    :return: one of :data:`BASELINES`; None if neither takes part
    """
    return next((name for name in BASELINES if name in algos), None)
