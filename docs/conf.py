"""Settings of Sphinx, and the check that the API reference names everything that the package exports."""

import sys
from collections.abc import Iterable
from importlib import import_module

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import sb3_ppo_penalty

project = "sb3_ppo_penalty"
author = "the sb3-ppo-penalty developers"
project_copyright = author
release = sb3_ppo_penalty.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"{project} {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
add_module_names = False
maximum_signature_line_length = 100
autodoc_typehints = "none"
autodoc_member_order = "bysource"

#: Module -> the names that users import from it, each of which must be documented
PUBLIC = {
    "sb3_ppo_penalty": sb3_ppo_penalty.__all__,
    "sb3_ppo_penalty.vec_envs": import_module("sb3_ppo_penalty.vec_envs").__all__,
    "sb3_ppo_penalty.distributed": import_module("sb3_ppo_penalty.distributed").__all__,
    "sb3_ppo_penalty.zoo": ["register"],
}


def is_documented(name: str, value: object, paths: Iterable[str]) -> bool:
    """
    Tell whether one of the documented objects is a given one, under the same name.

    :param name: of the object
    :param value: the object
    :param paths: dotted paths of all documented objects
    """
    modules = [path.removesuffix(f".{name}") for path in paths if path.endswith(f".{name}")]
    return any(getattr(sys.modules.get(module), name, None) is value for module in modules)


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """
    Warn of every public name that no page documents; a build with ``-W`` then fails.

    :param app: the running Sphinx
    :param env: what it has read
    """
    paths = list(env.domains["py"].objects)
    for module, names in PUBLIC.items():
        for name in names:
            if not is_documented(name, getattr(import_module(module), name), paths):
                logging.getLogger(__name__).warning("%s.%s is not documented", module, name)


def setup(app: Sphinx) -> None:
    """
    Connect the check.

    :param app: the running Sphinx
    """
    app.connect("env-check-consistency", check_public_names)
