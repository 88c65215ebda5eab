"""Writing results so that an interruption leaves the old file or the new one, never half of one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from jacobian_robust.errors import UserError

__all__ = ["claim", "distinct_names", "from_here", "write_atomically"]


def from_here(path: str | Path) -> Path:
    """Return a path relative to the working directory if it is below it, as a person would write it."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


RESULTS = (
    "config.yaml",
    "metrics.csv",
    "summary.json",
    "checkpoints",
    "evaluation",
    "robustness.json",
    "robustness.csv",
    "images.csv",
    "report.html",
)


def claim(directory: Path, config: dict[str, Any], *, resume: bool = False) -> None:
    """Write the ``config.yaml`` that makes a directory a result's own; of two processes, one succeeds.

    Args:
        directory: made if need be.
        config: plain containers.
        resume: take a directory, too, that holds an unfinished evaluation of the same configuration.

    Raises:
        UserError: if the directory holds a result already; nothing is changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(config))
    held = [name for name in RESULTS if (directory / name).exists()]
    if resume and "config.yaml" in held and "robustness.json" not in held:
        if (directory / "config.yaml").read_text(encoding="utf-8") == text:
            return
        raise UserError(f"{directory} holds an evaluation with other options, in its config.yaml: resume with those")
    with contextlib.suppress(FileExistsError):
        if not held:
            with (directory / "config.yaml").open("x", encoding="utf-8") as file:
                file.write(text)
            return
    raise UserError(
        f"{directory} already holds a result ({', '.join(held) or 'config.yaml'}), which is left as it is: "
        "choose another hydra.run.dir"
    )


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that takes the place of ``path`` when the block ends, and is dropped if it raises."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    scratch = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct names of absolute paths: what they do not share from the left."""
    if len(paths) == 1:
        return [paths[0].name]
    shared = 0
    while len({path.parts[: shared + 1] for path in paths}) == 1 and shared < min(len(p.parts) for p in paths) - 1:
        shared += 1
    return ["/".join(path.parts[shared:]) for path in paths]
