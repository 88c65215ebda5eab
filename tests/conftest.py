"""Shapes and types of every call into the package are checked while the tests run."""

import os

# The workers share the processors: more threads than these wait for one another, in child processes too.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings
from jaxtyping import install_import_hook

# The machine's speed is not what is tested.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

install_import_hook("jacobian_robust", "beartype.beartype")
