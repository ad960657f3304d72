"""
The Python blocks of the documentation, and what they may import where only the package and some of its extras are installed.

HTML comments, each on a line of its own before a block, say how it is tested:

- ``<!-- needs: zoo -->``: with this extra (or several, with commas between) besides the package
- ``<!-- when tested: 100_000 as 2_048 -->``: with these numbers in the place of those, so that training takes seconds
"""

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BLOCK = re.compile(
    r"(?P<marks>(?:^[ \t]*<!--.*-->[ \t]*\n(?:[ \t]*\n)?)*)^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[ \t]*(?:python|py)\b.*\n"
    r"(?P<code>(?:.*\n)*?)(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE,
)
#: For ``sitecustomize.py``, which also the processes run that a block starts: the modules of all other packages are not found
SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {absent!r} - {{name.partition(".")[0] for name in sys.modules}}  # a coverage tool is there before anything else


class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


class Block(NamedTuple):
    """
    A block of Python code.

    :param place: file and line
    :param code: as it is tested
    :param extras: of the package that it needs
    """

    place: str
    code: str
    extras: tuple[str, ...]


def documents(root: Path) -> list[Path]:
    """
    List the files whose blocks users copy.

    :param root: of the repository
    :return: the README and all of ``docs`` but what is built from it
    """
    pages = sorted((root / "docs").rglob("*.md"))
    return [root / "README.md", *[page for page in pages if "_build" not in page.relative_to(root).parts]]


def python_blocks(path: Path, root: Path) -> Iterator[Block]:
    """
    Find all blocks of Python code in a Markdown file.

    :param path: of the file
    :param root: of the repository
    """
    text = path.read_text()
    for found in BLOCK.finditer(text):
        place = f"{path.relative_to(root)}:{text.count(chr(10), 0, found.start('fence')) + 1}"
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        for number, shorter in re.findall(r"(?<=[:,] )([\d_]+) as ([\d_]+)", "".join(marks(found["marks"], "when tested"))):
            assert re.search(rf"\b{number}\b", code), f"{place}: {number} is not in the block"
            code = re.sub(rf"\b{number}\b", shorter, code)
        extras = re.findall(r"[\w-]+", "".join(marks(found["marks"], "needs")))
        yield Block(place, code, tuple(extras))


def marks(comments: str, name: str) -> list[str]:
    """
    :param comments: before a block
    :param name: of a mark
    :return: what stands behind the name, from the colon on
    """
    return re.findall(rf"<!-- {name}(: .*?) -->", comments)


def closure(needed: Iterable[Requirement]) -> set[str]:
    """
    Follow requirements through the installed packages.

    :param needed: what is asked for
    :return: canonical names of all packages that come with it
    """
    seen: set[tuple[str, str]] = set()
    waiting = [(need.name, extra) for need in needed for extra in ("", *need.extras)]
    while waiting:
        name, extra = waiting.pop()
        key = (canonicalize_name(name), extra)
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for need in map(Requirement, lines):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(need.name, each) for each in ("", *need.extras)]
    return {name for name, _ in seen}


def absent_modules(present: set[str]) -> set[str]:
    """
    List what could not be imported if only some of the installed packages were.

    :param present: canonical names of those
    :return: top-level modules of all other packages
    """
    owners = packages_distributions()
    return {module for module, names in owners.items() if not present & {canonicalize_name(name) for name in names}}
