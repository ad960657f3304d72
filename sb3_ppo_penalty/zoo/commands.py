"""Run RL Zoo's commands with this package's algorithms registered."""

import importlib
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: RL Zoo's modules that have a function of the same name
FUNCTIONS = ("train", "enjoy")
#: RL Zoo's modules that are scripts
SCRIPTS = ("benchmark", "record_video", "record_training")
#: First words of the commands that these scripts start -> this package's command that does the same
CHILD_COMMANDS = {("python", "enjoy.py"): "enjoy", ("python", "-m", "rl_zoo3.record_video"): "record_video"}


def run(command: str, arguments: Sequence[str]) -> None:
    """
    Run one of RL Zoo's commands; :func:`sb3_ppo_penalty.zoo.register` must have been called.

    :param command: one of :data:`FUNCTIONS` or :data:`SCRIPTS`
    :param arguments: the command's arguments, RL Zoo's own: see its ``--help``
    """
    module = f"rl_zoo3.{command}"
    sys.argv = [f"sb3_ppo_penalty {command}", *arguments]
    if command in FUNCTIONS:
        getattr(importlib.import_module(module), command)()
        return
    with _registered_children():
        runpy.run_module(module, run_name="__main__")


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
