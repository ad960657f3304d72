"""The algorithms at home in RL Zoo: registration, hyperparameters and Optuna's search spaces."""

from importlib.util import find_spec
from pathlib import Path

#: A YAML file for each algorithm, named after it, in RL Zoo's format
HYPERPARAMS = Path(__file__).parent / "hyperparams"
#: What RL Zoo's commands import; it does not declare the last two
REQUIRED = ("rl_zoo3", "requests", "pandas")


class MissingExtraError(ModuleNotFoundError):
    """
    An optional dependency is not installed.

    :param what: the part of the package that needs it
    :param names: of the modules
    :param extra: that brings them
    """

    def __init__(self, what: str, *names: str, extra: str = "zoo") -> None:
        sentence = f'{what} cannot run without {" and ".join(names)}: pip install "sb3_ppo_penalty[{extra}]"'
        super().__init__(sentence, name=names[0])


def register() -> None:
    """
    Make ``ppo_penalty`` and ``ppo_clip`` known to RL Zoo: to its functions and, in this process, to its commands.

    They get their classes in ``rl_zoo3.ALGOS``, their search spaces in Optuna's two tables, and the hyperparameter files of
    this package where none is named. Call it before ``rl_zoo3.train.train()`` and the like build their choice of algorithms;
    calling it again changes nothing.

    :raises MissingExtraError: if RL Zoo or something it needs is not installed; says how to install it
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise MissingExtraError("RL Zoo", *missing)
    # Not at the top: RL Zoo is optional, and takes a second
    from sb3_ppo_penalty.zoo import registration

    registration.register()
