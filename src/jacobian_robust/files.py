"""Writing results so that an interruption leaves the old file or the new one, never half of one."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from jacobian_robust.errors import UserError

__all__ = [
    "PROJECT",
    "claimed",
    "config_directory",
    "distinct_names",
    "file_name",
    "from_here",
    "in_project",
    "locked",
    "write_atomically",
]


_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parents[1] if (_PACKAGE.parents[1] / "conf" / "train.yaml").is_file() else None
_SHIPPED = _CLONE or _PACKAGE

PROJECT = _CLONE or Path()
"""The clone that this package runs from; of an installed wheel, the working directory."""


def config_directory() -> Path:
    """Return the directory of the Hydra configs: the clone's ``conf``, or the installed package's."""
    return _SHIPPED / "conf"


def in_project(path: str | Path) -> Path:
    """Return a path that exists in the working directory as it is, and any other relative one as the project's."""
    path = Path(path)
    return path if path.exists() else _SHIPPED / path


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


@contextlib.contextmanager
def claimed(directory: Path, config: dict[str, Any], *, resume: bool = False) -> Iterator[None]:
    """Make a directory a result's own while the block runs, by its ``config.yaml``; of two processes, one succeeds.

    Args:
        directory: made if need be.
        config: plain containers.
        resume: also take a directory that holds a result of the same configuration, to go on with it.

    Raises:
        UserError: if the directory holds a result that is not to be gone on with, or a link to a place outside, which
            would be written to; nothing is changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.rglob("*"):
        earlier = path.relative_to(directory).match("wandb/*run-*/*/*")  # W&B's own, which links to its cache
        if path.is_symlink() and not earlier and not path.resolve().is_relative_to(directory.resolve()):
            raise UserError(f"{path} is a link to {path.resolve()}, outside of {directory}: remove it")
    text = OmegaConf.to_yaml(OmegaConf.create(config))
    file = directory / "config.yaml"
    held = [name for name in RESULTS if (directory / name).exists()]
    if resume and "config.yaml" in held:
        lines = zip_longest(file.read_text(encoding="utf-8").splitlines(), text.splitlines(), fillvalue="nothing")
        if differ := [(theirs.strip(), ours.strip()) for theirs, ours in lines if theirs != ours]:
            raise UserError(
                f"{directory} holds a result with other options: its config.yaml says {differ[0][0]}, and now it is "
                f"{differ[0][1]}; resume with the same options and version, or give another hydra.run.dir"
            )
    else:
        if not held:
            with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as new:
                new.write(text)
                text = ""
        if text:
            raise UserError(
                f"{directory} already holds a result ({', '.join(held) or 'config.yaml'}), which is left as it is: "
                "choose another hydra.run.dir"
            )
    with locked(directory / ".lock"):
        yield


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes out of the directory of a lock file, which holds nothing, while the block runs.

    Raises:
        UserError: if another process is in it.
    """
    lock = FileLock(file)  # let go by the system when the process ends, however it ends
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{file.parent} is in use by another process: let it end, or end it") from error
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def file_name(text: str) -> str:
    """Return a text made fit for a file system: the same has the same name, another has another."""
    name = re.sub(r"[^\w.,=+-]+", "-", text).strip("-.")[:140] or "default"
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
