"""Run RL Zoo's commands with this package's algorithms registered."""

import importlib
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from sb3_ppo_penalty.zoo import hub

#: RL Zoo's commands that draw; :mod:`rl_zoo3.plots` has a function for each
PLOTS = ("plot_train", "all_plots", "plot_from_file")
#: RL Zoo's commands that are functions -> the module that has them
FUNCTIONS = {"train": "rl_zoo3.train", "enjoy": "rl_zoo3.enjoy", **dict.fromkeys(PLOTS, "rl_zoo3.plots")}
#: RL Zoo's modules that are scripts
SCRIPTS = ("benchmark", "record_video", "record_training", "push_to_hub", "load_from_hub")
#: First words of the commands that these scripts start -> this package's command that does the same
CHILD_COMMANDS = {("python", "enjoy.py"): "enjoy", ("python", "-m", "rl_zoo3.record_video"): "record_video"}


def run(command: str, arguments: Sequence[str]) -> None:
    """
    Run one of RL Zoo's commands; :func:`sb3_ppo_penalty.zoo.register` must have been called.

    :param command: one of :data:`FUNCTIONS` or :data:`SCRIPTS`
    :param arguments: the command's arguments, RL Zoo's own: see its ``--help``
    :raises SystemExit: with one sentence, if what is installed cannot draw
    """
    sys.argv = [f"sb3_ppo_penalty {command}", *arguments]
    if command in PLOTS and find_spec("rliable") and version("pandas").startswith("3."):
        sys.exit('RL Zoo\'s plots cannot run with pandas 3, with which rliable cannot be imported: pip install "pandas<3"')
    if command in FUNCTIONS:
        getattr(importlib.import_module(FUNCTIONS[command]), command)()
        return
    with _registered_children(), hub.adapted() if command == "push_to_hub" else nullcontext():
        runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


def child_command(command: Any) -> Any:
    """
    Replace a command that RL Zoo's scripts start by the command of this package that does the same.

    :param command: words of the command: ``python enjoy.py ...`` (a file that an installed RL Zoo lacks),
        ``python -m rl_zoo3.record_video ...``, or one that is not RL Zoo's
    :return: ``python -m sb3_ppo_penalty enjoy ...`` or ``python -m sb3_ppo_penalty record_video ...``; any other command
        unchanged
    """
    for start, name in CHILD_COMMANDS.items():
        if tuple(command[: len(start)]) == start:
            return [sys.executable, "-m", "sb3_ppo_penalty", name, *command[len(start) :]]
    return command


@contextmanager
def _registered_children() -> Iterator[None]:
    """Register the algorithms in the processes that RL Zoo's scripts start, too."""
    call = subprocess.call

    def call_registered(command: Any, *args: Any, **kwargs: Any) -> int:
        return call(child_command(command), *args, **kwargs)

    patched: Any = subprocess
    patched.call = call_registered
    try:
        yield
    finally:
        patched.call = call
