"""What a user installs: the wheel, built from this tree, imported from nowhere else."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path

import pytest
from documentation import SITECUSTOMIZE, Block, absent_modules, closure, documents, python_blocks
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sb3_ppo_penalty

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    # From a copy: setuptools leaves a build folder behind, from which old files would find their way into the next wheel
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.name in {"sb3_ppo_penalty", "tests", "docs", "examples", ".ci"}:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


def test_sdist_holds_what_the_tests_and_the_documentation_need(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("tests", "docs", "examples", ".ci")
    needed = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    written = {path for path in needed if {"__pycache__", "_build"} & set(path.parts)}
    files = {path.relative_to(ROOT).as_posix() for path in needed - written}
    files |= {path.name for pattern in ("*.md", "*.cff", "*.toml", "setup.*", "LICENSE") for path in ROOT.glob(pattern)}
    assert sorted(files - names) == []


def test_wheel_holds_the_package_its_types_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_ppo_penalty").rglob("*.py")}
    kinds = ("*.yml", "*.mplstyle")
    data = {path.relative_to(ROOT).as_posix() for kind in kinds for path in (ROOT / "sb3_ppo_penalty").rglob(kind)}
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


def bound_of(need: Requirement) -> list[Version]:
    """The version that is too new, if there is one."""
    return [Version(each.version) for each in need.specifier if each.operator == "<"]


def test_metadata_says_what_it_needs(metadata: Message) -> None:
    assert sorted(needs_of(metadata)) == ["cloudpickle", "gymnasium", "numpy", "sb3-contrib", "stable-baselines3", "torch"]
    assert metadata["Name"] == "sb3-ppo-penalty"
    assert metadata["Author"] == "the sb3-ppo-penalty developers"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_oldest_versions_that_it_admits_are_those_it_is_tested_with(metadata: Message) -> None:
    lines = (ROOT / "tests" / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for name, need in needs_of(metadata).items():
        (admitted,) = (each.version for each in need.specifier if each.operator == ">=")
        # torch alone is older than tested
        assert name == "torch" or Version(admitted) == Version(tested[name])


def test_the_newest_versions_that_it_admits_are_those_that_sb3_admits(metadata: Message) -> None:
    theirs = map(Requirement, [*requires("stable-baselines3"), *requires("sb3-contrib")])
    bounds = {canonicalize_name(need.name): bound_of(need) for need in theirs if need.marker is None}
    # sb3-contrib has SB3's versions
    bounds["sb3-contrib"] = bounds["stable-baselines3"]
    assert {name: bound_of(need) for name, need in needs_of(metadata).items()} == bounds


def test_package_page_has_the_readme_without_what_only_the_repository_has(metadata: Message) -> None:
    page, readme = metadata.get_payload(), (ROOT / "README.md").read_text()
    assert re.findall(r"\]\((?!https?:)[^)]*\)", page) == []
    assert "![" not in page
    addresses = re.findall(r"\]\((https?:[^)]*)\)", readme)
    assert re.findall(r"\]\((https?:[^)]*)\)", page) == addresses
    named = {line.partition(", ")[2] for line in metadata.get_all("Project-URL")}
    # SB3, the PPO paper and the article
    assert named == {address for address in addresses if "pytorch" not in address}
    # Nothing else is lost
    words = re.sub(r"^!\[.*\n|\]\([^)]*\)|\[", "", readme, flags=re.MULTILINE).split()
    assert re.sub(r"\]\([^)]*\)|\[", "", page).split() == words


def test_version_is_the_same_everywhere(wheel: Path, metadata: Message) -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    changelog = re.search(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert metadata["Version"] == citation == changelog == sb3_ppo_penalty.__version__
    assert wheel.name in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder


def present(metadata: Message, extras: Iterable[str]) -> set[str]:
    """Names of the packages that come with the wheel and these extras, the wheel included."""
    requirements = list(map(Requirement, metadata.get_all("Requires-Dist")))
    wanted = [each for each in requirements if each.marker is None]
    wanted += [each for extra in extras for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
    return closure(wanted) | {"sb3-ppo-penalty"}


def run_installed(code: str, extras: Iterable[str], site: Path, metadata: Message, folder: Path) -> str:
    """
    Run code where nothing is installed but the wheel, these extras of it, and what they need.

    :return: what it prints
    """
    (folder / "installed").mkdir()
    text = SITECUSTOMIZE.format(absent=absent_modules(present(metadata, extras)))
    (folder / "installed" / "sitecustomize.py").write_text(text)
    (folder / "work").mkdir()
    (folder / "work" / "block.py").write_text(code)
    path = os.pathsep.join([str(folder / "installed"), str(site)])
    finished = subprocess.run(
        [sys.executable, "-P", "block.py"],
        cwd=folder / "work",
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_installed_wheel_trains(site: Path, metadata: Message, tmp_path: Path) -> None:
    code = (
        "import sb3_ppo_penalty; from sb3_ppo_penalty import PPOPenalty, PPOClip\n"
        "model = PPOPenalty('MlpPolicy', 'Pendulum-v1', n_steps=64, batch_size=32).learn(64)\n"
        "print(sb3_ppo_penalty.__file__, model.num_timesteps)"
    )
    printed = run_installed(code, [], site, metadata, tmp_path)
    assert printed.split() == [str(site / "sb3_ppo_penalty" / "__init__.py"), "64"]


def test_console_script_is_the_module(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    commands = [str(site / "bin" / "sb3-ppo-penalty")], ["-m", "sb3_ppo_penalty"]
    runs = [
        subprocess.run(
            [sys.executable, "-P", *command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        for command in commands
    ]
    assert [run.returncode for run in runs] == [0, 0]
    assert runs[0].stdout == runs[1].stdout
    assert "usage: python -m sb3_ppo_penalty COMMAND" in runs[0].stdout


@pytest.mark.parametrize(
    ("extras", "expected"),
    [((), "tqdm rich pygame yaml rl_zoo3 ray"), (("examples",), "yaml rl_zoo3 ray"), (("zoo",), "ray"), (("ray",), "")],
)
def test_blocks_run_with_the_extras_that_they_name_and_no_others(
    extras: tuple[str, ...], expected: str, site: Path, metadata: Message, tmp_path: Path
) -> None:
    # The same in a process that the block starts
    code = (
        "import subprocess, sys; from importlib.util import find_spec\n"
        "names = 'tqdm rich pygame yaml rl_zoo3 ray torch stable_baselines3'.split()\n"
        "if len(sys.argv) == 1: subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
        "print(*[name for name in names if find_spec(name) is None], sep=' ')"
    )
    assert run_installed(code, extras, site, metadata, tmp_path).splitlines() == [expected] * 2


BLOCKS = [block for path in documents(ROOT) for block in python_blocks(path, ROOT)]


def test_every_python_block_is_found() -> None:
    fence = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*py", re.MULTILINE)
    assert len(BLOCKS) == sum(len(fence.findall(path.read_text())) for path in documents(ROOT)) >= 5


#: One is tried at once, the others take minutes
CASES = [pytest.param(each, marks=() if each.place.startswith("docs/index.md") else pytest.mark.slow) for each in BLOCKS]


@pytest.mark.parametrize("block", CASES, ids=lambda block: block.place)
def test_python_block_of_the_documentation_runs(block: Block, site: Path, metadata: Message, tmp_path: Path) -> None:
    printed = run_installed(block.code, block.extras, site, metadata, tmp_path)
    if block == BLOCKS[0]:
        # What a reader copies first runs as it is, on the package alone, and learns
        assert block.extras == ()
        assert block.code in (ROOT / "README.md").read_text()
        assert "mean return over 20 episodes: 500 +- 0 (the most is 500)" in printed


def test_blocks_are_read_with_their_marks(tmp_path: Path) -> None:
    text = """
<!-- needs: zoo, ray -->
<!-- when tested: 100_000 as 2_048, 10 as 1 -->
```python
learn(100_000, 10, 2_100_000)
```
  ~~~py
  if True:
      pass
  ~~~

<!-- needs: zoo -->

```python title="x"
```
```sh
python -m this
```
"""
    (tmp_path / "page.md").write_text(text)
    assert list(python_blocks(tmp_path / "page.md", tmp_path)) == [
        ("page.md:4", "learn(2_048, 1, 2_100_000)\n", ("zoo", "ray")),
        ("page.md:7", "if True:\n    pass\n", ()),
        ("page.md:14", "", ("zoo",)),
    ]
