"""What the documentation says of the package: its log keys and files. Its Python blocks are run by ``test_package.py``."""

import csv
import re
from pathlib import Path

import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_ppo_penalty import PPOClip, PPOPenalty
from sb3_ppo_penalty.study.statistics import MIN_SEEDS

DOCS = Path(__file__).parent.parent / "docs"
SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0}


class Keys(KVWriter, set):
    """The names of all that is logged."""

    def write(self, key_values, key_excluded, step=0) -> None:
        self.update(key_values)

    def close(self) -> None:
        pass


def logged(algorithm, **arguments) -> set[str]:
    model, keys = algorithm("MlpPolicy", "Pendulum-v1", **SMALL, **arguments), Keys()
    model.set_logger(Logger(None, [keys]))
    model.learn(128)
    return keys


def test_every_key_that_is_logged_beside_those_of_ppo_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"`(train/\w+)`", (DOCS / "guide" / "logging.md").read_text()))
    keys = logged(PPOPenalty, guard="fixup", max_grad_norm=(0.5, 0.5)) | logged(PPOClip)
    # Of these two of PPO's the page says what is different
    assert keys - logged(PPO) == documented - {"train/clip_fraction", "train/clip_range"}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`(?:\S+ )*((?:examples|tests|\.ci)/[\w./-]+)(?: [^`]*)?`", page.read_text())
    assert [name for name in named if not (DOCS.parent / name).exists()] == []


@pytest.mark.parametrize(
    "path", sorted((DOCS.parent / "examples/results").rglob("*.csv")), ids=lambda path: str(path.parent.name)
)
def test_results_of_fewer_than_three_seeds_have_neither_intervals_nor_a_probability(path: Path) -> None:
    with path.open() as file:
        few = [row for row in csv.DictReader(file) if int(row.get("seeds") or MIN_SEEDS) < MIN_SEEDS == 3]
    assert [
        value for row in few for name, value in row.items() if name.endswith(("_low", "_high", "improvement")) and value
    ] == []
