"""What all tests share: one thread in each process, the folder of SB3's logs, and the order of the files."""

import os
import tempfile
from pathlib import Path

import pytest

# Before torch and numpy are imported, and for all processes that tests start. pytest-xdist has a process on every core; their
# threads would wait for each other, which makes the tests of small networks ten times slower beside other work.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
# Else SB3 leaves a new folder in the temporary one for each of the thousands of trainings
os.environ["SB3_LOGDIR"] = str(Path(tempfile.gettempdir(), "sb3_ppo_penalty-tests"))

#: Folders and files that take longest: they come first, so that no process is left alone with one of them at the end
LONGEST_FIRST = ("compiled", "study", "zoo", "test_package.py", "distributed", "test_examples.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by cost, each file whole."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    root = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(root).parts[0], len(places)))
