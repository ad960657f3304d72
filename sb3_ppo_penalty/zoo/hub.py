"""Adapt RL Zoo's ``push_to_hub`` to the hub integration that is installed, and its model card to this package."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def adapted() -> Iterator[None]:
    """
    Make RL Zoo's ``push_to_hub`` run with sb3-team-hf-integration 3.2, and its card name commands that know the algorithms.

    RL Zoo 2.9.2 imports ``generate_metadata``, which 3.2 has made private and which returns an object there in the place of a
    dictionary. To be entered before RL Zoo's script is imported.
    """
    # By their names: the package has a function of the same name as its module
    integration: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    repocard: Any = importlib.import_module("huggingface_hub.repocard")
    save, is_broken = repocard.metadata_save, not hasattr(integration, "generate_metadata")

    def save_own(path: Path, metadata: dict[str, Any]) -> None:
        path.write_text(own_commands(path.read_text(encoding="utf-8")), encoding="utf-8")
        save(path, metadata)

    repocard.metadata_save = save_own
    if is_broken:
        integration.generate_metadata = lambda *args: integration._generate_metadata(*args).to_dict()
    try:
        yield
    finally:
        repocard.metadata_save = save
        if is_broken:
            del integration.generate_metadata


def own_commands(card: str) -> str:
    """
    Replace RL Zoo's commands by this package's, which know its algorithms as well.

    :param card: text of a model card that RL Zoo wrote
    :return: the same text with ``python -m sb3_ppo_penalty COMMAND`` for ``python -m rl_zoo3.COMMAND``
    """
    card = re.sub(r"\bpython -m rl_zoo3\.(\w+)", r"python -m sb3_ppo_penalty \1", card)
    return card.replace("pip install rl_zoo3", 'pip install "sb3_ppo_penalty[zoo]"')
