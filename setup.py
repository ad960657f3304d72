"""The README as a package page shows it; everything else about the package is in setup.cfg and pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
# Paths of the repository lead nowhere from a package page: its pictures go, of its links the text stays
page = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n\n?", "", readme, flags=re.MULTILINE)
page = re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", page)
setup(long_description=page, long_description_content_type="text/markdown")
