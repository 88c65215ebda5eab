"""Adds this project's configs to the search path of every Hydra program, its own and a user's, from any directory."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from jacobian_robust.files import config_directory

__all__ = ["JacobianRobustSearchPath"]


class JacobianRobustSearchPath(SearchPathPlugin):
    """Appends the configs, so that a program's own files of the same name come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directory unless it is the program's own already."""
        path = f"file://{config_directory()}"
        if all(known.path != path for known in search_path.get_path()):
            search_path.append(provider="jacobian_robust", path=path)
