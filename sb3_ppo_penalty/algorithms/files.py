"""What the algorithms write into files and pickles, and what they read of other algorithms' files."""

import io
import pathlib
import warnings
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_penalty.policies.policies import covariance_mismatch
from sb3_ppo_penalty.saving.file_origin import require_ppo, saved_entries
from sb3_ppo_penalty.updates.ranks import ALONE, Ranks, current

SelfPortable = TypeVar("SelfPortable", bound="PortableAlgorithm")
#: What ``load_safe`` lets a file unpack to, in bytes
DEFAULT_MAX_BYTES = 2**28


class PortableAlgorithm(OnPolicyAlgorithm):
    """An algorithm whose files can be exchanged with stock PPO, and loaded without running anything in them."""

    #: Keeps compiled graphs from update to update; no file holds it
    _compiler: Any = None
    #: The processes that train this model; no file holds them
    _ranks: Ranks = ALONE
    #: Where the action distribution of an evaluation is found, see :func:`~.find_source`; None while nobody knows, and where
    #: its divergence is not known. No file holds it
    _distribution_source: str | None = None
    #: Names of what only other algorithms keep in their files
    _foreign_entries: ClassVar[frozenset[str]] = frozenset()

    def _excluded_save_params(self) -> list[str]:
        """Name what no file holds: SB3's list, the compiled graphs, and who trained."""
        return [*super()._excluded_save_params(), "_compiler", "_ranks", "_distribution_source"]

    def __getstate__(self) -> dict[str, Any]:
        """Give what is pickled and copied: all but the compiled graphs, and who trained."""
        return {name: value for name, value in vars(self).items() if name not in ("_compiler", "_ranks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """
        Take over what was pickled; the model belongs to the session that is open here, as one that is loaded does.

        :param state: attributes by name
        """
        vars(self).update(state)
        self._ranks = current()

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load weights, as SB3 does; the error says what to do where only one of two covariances learns.

        :param load_path_or_dict: a saved model, or weights as from ``get_parameters``
        :param exact_match: whether all weights have to be given
        :param device: to read a saved model on
        :raises RuntimeError: if names or shapes do not fit
        """
        given: Any = load_path_or_dict
        if not isinstance(given, dict):
            _, given, _ = load_from_zip_file(given, device=device, load_data=False)
        mismatch = covariance_mismatch(self.policy.state_dict().keys(), given.get("policy", {}).keys())
        # Without an exact match the policy's other weights are taken, but an optimizer's state fits all of them or none
        if mismatch and (exact_match or "policy.optimizer" in given):
            raise RuntimeError(f"the parameters do not fit {type(self).__name__}: {mismatch}")
        super().set_parameters(given, exact_match, device)

    @classmethod
    def load(
        cls: type[SelfPortable],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfPortable:
        """
        Load a model as SB3 does, and warn where arguments in a file of another algorithm mean something else here.

        :param path: see SB3, as for all of these
        :param env: to go on training in
        :param device: to put the model on
        :param custom_objects: to take in the place of what the file has
        :param print_system_info: whether to print on what system the file was saved
        :param force_reset: whether training resets the environments first
        :param kwargs: the constructor's, to replace what the file says
        :return: the model
        :raises ValueError: for the file of an algorithm that is no PPO
        """
        objects = custom_objects or {}
        found = saved_entries(path)
        entries = cls._own_entries(found, {**objects, **kwargs})
        if "clip_range" in objects.keys() - found.keys():
            # SB3 replaces only what the file has
            kwargs = {"clip_range": objects["clip_range"], **kwargs}
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        for name in found.keys() - entries.keys():
            vars(model).pop(name, None)
        return model

    @staticmethod
    def _differences(entries: dict[str, Any], given: dict[str, Any]) -> list[str]:
        """
        List what in a file means something else here than to the algorithm that saved it.

        :param entries: of the file
        :param given: arguments that the user replaces entries with
        :return: sentences; a subclass has its own
        """
        return []

    @classmethod
    def _own_entries(cls, entries: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """
        Take from a file's entries those that this algorithm has; warn where one means something else here.

        :param entries: of the file
        :param given: arguments that the user replaces entries with
        :return: without what only another algorithm has
        :raises ValueError: for the file of an algorithm that is no PPO
        """
        require_ppo(entries)
        differences = cls._differences(entries, given)
        if differences:
            warnings.warn(f"{cls.__name__} opens a file of another algorithm: {'; '.join(differences)}", stacklevel=3)
        return {name: entry for name, entry in entries.items() if name not in cls._foreign_entries}

    @classmethod
    def load_safe(
        cls: type[SelfPortable],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str,
        device: th.device | str = "auto",
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        **arguments: Any,
    ) -> SelfPortable:
        """
        Load a file that may come from a stranger: nothing that it says is run, which SB3's ``load`` cannot promise.

        Only plain values and tensors are read. Spaces come from the environment; the classes of policy, buffer, activation,
        extractor, optimizer and schedule are recognised by name if they are SB3's, torch's or this package's, and have to
        be passed otherwise. The model predicts and learns on as one from ``load`` does, except that the statistics of the
        last 100 episodes begin anew and that ``tensorboard_log`` is not taken from the file.

        :param path: a path, with or without ``.zip``, or a binary file
        :param env: the environment that the model was made for, or its name
        :param device: to put the model on, wherever it was saved
        :param max_bytes: what the file may unpack to, and what the rollout buffer that it asks for may take. While a file is
            read, up to five times as much memory is in use
        :param arguments: the constructor's, to replace what the file says
        :return: the model
        :raises UnsafeFileError: naming the entry that is pickled and needed, of the wrong type, shape or range, too large,
            or none of a model's
        """
        # Here, because nobody else needs it
        from sb3_ppo_penalty.saving import safe_load

        return safe_load.load_safe(cls, path, env, device, max_bytes, arguments, cls._own_entries)
