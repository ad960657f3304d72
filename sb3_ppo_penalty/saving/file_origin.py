"""What a file that SB3's ``save`` wrote tells about the algorithm that it is of."""

import io
import json
import pathlib
import zipfile
from typing import Any

from stable_baselines3.common.save_util import open_path

from sb3_ppo_penalty.arguments import ArgumentError

#: What ``PPOPenalty`` keeps and no other algorithm has
PENALTY_ENTRIES = frozenset(
    {"kl_coef", "kl_min", "kl_max", "kl_coef_factor", "kl_coef_bounds", "kl_controller", "kl_penalty", "guard"}
    | {"_saturated_updates", "_granted_kl_coef", "_kl_coef_in_reach", "_risen_learning_rate", "_last_learning_rate"}
)


def saved_entries(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
    """
    Read the names and plain values in the file of a saved model; nothing is unpickled.

    :param path: as for SB3's ``load``; an open file is left at its start
    :return: by name, with a dict in the place of what is pickled; empty if the file is of no saved model
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            entries: dict[str, Any] = json.loads(archive.read("data"))
            return entries
    except (zipfile.BadZipFile, KeyError):
        return {}
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
        else:
            file.seek(0)


def require_ppo(entries: dict[str, Any]) -> None:
    """
    Refuse the file of an algorithm that is neither PPO nor a variant of it.

    :param entries: of the file
    :raises ArgumentError: if they do not hold the epochs of an update, which A2C, TRPO and off-policy algorithms do not have
    """
    if "n_epochs" not in entries:
        raise ArgumentError(
            "`path` must be a model of PPO, PPOClip or PPOPenalty: this file is none, or of another algorithm. Load that with "
            "its own class; its weights can be handed over: `model.policy.load_state_dict(other.policy.state_dict())`"
        )


def differences_for_penalty(entries: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """
    List what in a file means something else to ``PPOPenalty`` than to the algorithm that it is of.

    :param entries: of the file
    :param given: arguments that the user replaces entries with
    :return: sentences; none for a file of ``PPOPenalty``
    """
    if "kl_coef" in entries:
        return []
    sentences = {
        "clip_range": "its `clip_range` stays in force beside the penalty: pass `clip_range=None` for the penalty alone",
        "target_kl": "its `target_kl`, which stopped an update, is now what `kl_coef` aims at: pass another to aim elsewhere",
    }
    return [sentence for name, sentence in sentences.items() if name not in given and entries.get(name) is not None]


def differences_for_clip(entries: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """
    List what in a file of ``PPOPenalty`` means something else to an algorithm that has no penalty.

    :param entries: of the file
    :param given: arguments that the user replaces entries with
    :return: sentences; none for a file of another algorithm
    """
    if "kl_coef" not in entries:
        return []
    sentences = []
    if "clip_range" not in given and entries.get("clip_range") is None:
        sentences.append("it has no `clip_range`, so PPO's default holds: pass `clip_range` for another")
    if "target_kl" not in given and entries.get("target_kl") is not None:
        sentences.append("its `target_kl`, which `kl_coef` aimed at, now stops an update: pass `target_kl=None` to stop none")
    return sentences
