"""What a user installs: the wheel, built from this tree, imported from nowhere else."""

import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: setuptools leaves a build folder behind, from which old files would find their way into the next wheel
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "sb3_ppo_penalty", source / "sb3_ppo_penalty", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_its_types_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_ppo_penalty").rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_ppo_penalty").rglob("*.yml")}
    assert sources | data | {"sb3_ppo_penalty/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("METADATA"))
    return Parser().parsestr(archive.read(name).decode())


def needs_of(metadata: Message) -> dict[str, Requirement]:
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    return {requirement.name: requirement for requirement in requirements if requirement.marker is None}


def test_metadata_says_what_it_needs(metadata: Message) -> None:
    assert sorted(needs_of(metadata)) == ["cloudpickle", "gymnasium", "numpy", "sb3-contrib", "stable-baselines3", "torch"]
    assert metadata["Name"] == "sb3-ppo-penalty"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "PPOPenalty" in metadata.get_payload()


def test_the_oldest_versions_that_it_admits_are_those_it_is_tested_with(metadata: Message) -> None:
    lines = (ROOT / "tests" / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for name, need in needs_of(metadata).items():
        (admitted,) = need.specifier
        assert admitted.operator == ">="
        # torch alone is older than tested
        assert name == "torch" or Version(admitted.version) == Version(tested[name])


def test_installed_wheel_trains(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sb3_ppo_penalty; from sb3_ppo_penalty import PPOPenalty, PPOClip\n"
        "model = PPOPenalty('MlpPolicy', 'Pendulum-v1', n_steps=64, batch_size=32).learn(64)\n"
        "print(sb3_ppo_penalty.__file__, model.num_timesteps)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(site)}
    )
    assert run.stdout.split() == [str(site / "sb3_ppo_penalty" / "__init__.py"), "64"], run.stderr
