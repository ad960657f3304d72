"""Recognise which algorithm a model file is of, and what in it means something else to another algorithm."""

import io
import json
import pathlib
import zipfile
from typing import Any

from stable_baselines3.common.save_util import open_path

from sb3_ppo_penalty.arguments import ArgumentError

#: Attributes that ``PPOPenalty`` saves and no other algorithm has
PENALTY_ENTRIES = frozenset(
    {"kl_coef", "kl_min", "kl_max", "kl_coef_factor", "kl_coef_bounds", "kl_controller", "kl_penalty", "max_ratio", "guard"}
    | {"_saturated_updates", "_granted_kl_coef", "_kl_coef_in_reach", "_risen_learning_rate", "_last_learning_rate"}
)


def saved_entries(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
    """
    Read the attributes in a model file without unpickling anything.

    :param path: as for SB3's ``load``; an open file is left at its start
    :return: values by name, with a dict in the place of each pickle; empty if the file is no model file
    :raises ArgumentError: if the file is no zip file
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            entries: dict[str, Any] = json.loads(archive.read("data"))
            return entries
    except zipfile.BadZipFile as error:
        # In SB3's words
        raise ArgumentError(f"`path`: the file {path} wasn't a zip-file") from error
    except KeyError:
        return {}
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
        else:
            file.seek(0)


def require_ppo(entries: dict[str, Any]) -> None:
    """
    Refuse the file of an algorithm that is neither PPO nor a variant of it.

    :param entries: attributes in the file, by name
    :raises ArgumentError: if ``n_epochs`` is missing, which A2C, TRPO and off-policy algorithms do not have
    """
    if "n_epochs" not in entries:
        raise ArgumentError(
            "`path` must be a model of PPO, PPOClip or PPOPenalty: this file is none, or of another algorithm. Load that with "
            "its own class; its weights can be handed over: `model.policy.load_state_dict(other.policy.state_dict())`"
        )


def differences_for_penalty(entries: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """
    Describe the arguments in another algorithm's file that mean something else to ``PPOPenalty``.

    :param entries: attributes in the file, by name
    :param given: arguments of the user, by name; they replace the file's
    :return: one clause per argument; empty for a file of ``PPOPenalty``
    """
    if "kl_coef" in entries:
        return []
    clauses = {
        "clip_range": "its `clip_range` stays in force beside the penalty: pass `clip_range=None` for the penalty alone",
        "target_kl": "its `target_kl`, which stopped an update, is now what `kl_coef` aims at: pass another to aim elsewhere",
    }
    return [clause for name, clause in clauses.items() if name not in given and entries.get(name) is not None]


def differences_for_clip(entries: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """
    Describe the arguments in a file of ``PPOPenalty`` that mean something else to ``PPOClip``.

    :param entries: attributes in the file, by name
    :param given: arguments of the user, by name; they replace the file's
    :return: one clause per argument; empty for a file of another algorithm
    """
    if "kl_coef" not in entries:
        return []
    clauses = []
    if "clip_range" not in given and entries.get("clip_range") is None:
        clauses.append("it has no `clip_range`, so PPO's default holds: pass `clip_range` for another")
    if "target_kl" not in given and entries.get("target_kl") is not None:
        clauses.append("its `target_kl`, which `kl_coef` aimed at, now stops an update: pass `target_kl=None` to stop none")
    return clauses
