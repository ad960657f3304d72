"""RL Zoo support: registration of the algorithms, tuned hyperparameters and Optuna's search spaces."""

from importlib.util import find_spec
from pathlib import Path

#: Folder with a YAML file for each algorithm, named after it, in RL Zoo's format
HYPERPARAMS = Path(__file__).parent / "hyperparams"
#: Name for ``--conf-file`` of the settings that the field publishes its MuJoCo results with
FIELD_PROTOCOL = "field_protocol"
#: Modules that RL Zoo's commands import; RL Zoo does not declare the last two as dependencies
REQUIRED = ("rl_zoo3", "requests", "pandas")


class MissingExtraError(ModuleNotFoundError):
    """
    Raised where an optional dependency is not installed; says how to install it.

    :param what: the part of the package that needs the dependency
    :param names: names of the missing modules
    :param extra: the extra of this package that installs them
    """

    def __init__(self, what: str, *names: str, extra: str = "zoo") -> None:
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        sentence = f'{what} cannot run without {listed}: pip install "sb3_ppo_penalty[{extra}]"'
        super().__init__(sentence, name=names[0])


def entries_file(conf_file: str, algo: str) -> str:
    """
    Find the file of hyperparameters that ``--conf-file`` means.

    :param conf_file: a YAML file, a module, or the name of a set of settings that comes with this package
    :param algo: RL Zoo's name of the algorithm
    :return: this package's file of that set for the algorithm, else what was given
    """
    own = HYPERPARAMS / conf_file / f"{algo}.yml"
    return str(own) if conf_file == FIELD_PROTOCOL and own.exists() else conf_file


def register() -> None:
    """
    Make ``ppo_penalty``, ``ppo_clip`` and ``ppo_penalty_lstm`` known to RL Zoo's functions and, in this process, its commands.

    Their classes go into ``rl_zoo3.ALGOS``, their search spaces into RL Zoo's two tables for Optuna, and RL Zoo reads this
    package's hyperparameter files for them unless another file is named. Call it before ``rl_zoo3.train.train()`` and the
    like, which build their choice of algorithms; calling it again changes nothing.

    :raises MissingExtraError: if RL Zoo or one of its dependencies is not installed
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise MissingExtraError("RL Zoo", *missing)
    # Imported here, because RL Zoo is optional and takes a second to import
    from sb3_ppo_penalty.zoo import registration

    registration.register()
