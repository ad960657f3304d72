"""The algorithms that can be compared; imports nothing, so that the command line's help needs none of the extras."""

from typing import NamedTuple


class Algorithm(NamedTuple):
    """
    An algorithm of the comparison.

    :param zoo_name: RL Zoo's name of the class
    :param objective: under ``--same-policy``, algorithms with the same objective take all settings from one entry, others
        keep the settings of their own objective
    """

    zoo_name: str
    objective: str


ALGORITHMS = {
    "ppo_penalty": Algorithm("ppo_penalty", "penalty"),
    "ppo_clip": Algorithm("ppo_clip", "clip"),
    "ppo": Algorithm("ppo", "clip"),
    "trpo": Algorithm("trpo", "trust region"),
    "ppo_article": Algorithm("ppo_clip", "clip"),
}

#: The algorithm that the others are compared with
BASELINE = "ppo"
#: The article's recipe; its settings are ``sb3_ppo_penalty.ARTICLE_RECIPE`` and no entry of a file
ARTICLE = "ppo_article"
#: Algorithms for which this package has tuned entries, for its own policies
TUNED_ALGORITHMS = ("ppo_penalty", "ppo_clip")

#: Between an algorithm and the name of a variant of it, as in ``ppo_penalty+dual``
VARIANT_SEPARATOR = "+"


def base_algorithm(name: str) -> str:
    """
    Return the algorithm that a variant is a variant of.

    :param name: name of an algorithm or of a variant, such as ``ppo_penalty+dual``
    :return: the name in front of the plus sign; not checked against :data:`ALGORITHMS`
    """
    return name.partition(VARIANT_SEPARATOR)[0]
