"""The progress of an evaluation: kept in files, so that it can go on after an interruption, and shown in bars."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jacobian_robust.attacks import Attack, Norm
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.classifiers import Classifier, device, weights_hash
from jacobian_robust.evaluation.options import Evaluation
from jacobian_robust.provenance import versions
from jacobian_robust.reporting.figures import SYMBOLS
from jacobian_robust.robustness.certificates import Certificate
from jacobian_robust.robustness.results import parameters

__all__ = ["PROGRESS", "Bars", "FileJournal", "identity_of", "once"]


PROGRESS = "progress"
"""Directory of an unfinished evaluation's state, within its own."""


class FileJournal:
    """Keeps a sweep's state in a file, replaced at most every few seconds.

    Args:
        path: the file.
        identity: of what is attacked and how; the state of anything else is not resumed.
    """

    SECONDS = 5.0

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._saved = time.monotonic()
        path.parent.mkdir(exist_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept last, if any was."""
        try:
            stored = torch.load(self.path, weights_only=True, map_location=device())
            identity, state = stored["identity"], dict(stored["state"])
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file makes the reader fail in any way
            raise UserError(
                f"{self.path} cannot be read as the progress of an evaluation ({type(error).__name__}): delete it, and "
                "its part begins anew"
            ) from error
        if identity != self.identity:
            raise UserError(
                f"{self.path} is the progress of another evaluation (other weights, options or versions, or on another "
                "device): finish it with those, or choose another hydra.run.dir"
            )
        return state

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state that a function returns, unless the last one was kept a moment ago."""
        if time.monotonic() - self._saved >= self.SECONDS:
            self.keep(state())

    def keep(self, state: dict[str, Any]) -> None:
        """Keep a state at once."""
        scratch = self.path.with_suffix(".part")
        torch.save({"identity": self.identity, "state": state}, scratch)
        scratch.replace(self.path)
        self._saved = time.monotonic()


def once(journal: FileJournal, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was made before an interruption, or else make it and keep it."""
    found = journal.load()
    if found is None:
        found = make()
        journal.keep(found)
    return found


def identity_of(
    classifier: Classifier, images: Tensor, attacks: Sequence[Attack | Certificate], evaluation: Evaluation
) -> dict[str, Any]:
    """Return what tells a part of an evaluation from that of another."""
    return {
        "sha256": weights_hash(classifier),
        "attacks": {attack.name: parameters(attack) for attack in attacks},
        "seed": evaluation.seed,
        "independent": evaluation.independent,
        "images": hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest(),
        "versions": versions(),
        "device": device().type,  # it decides how many images are in a batch, and what is drawn
    }


class Bars:
    """A progress bar for each attack at each budget, with how many images are still robust."""

    def __init__(self, name: str, norm: Norm) -> None:
        self.name = name
        self.symbol = SYMBOLS[norm]
        self._of: tuple[str, float] | None = None
        self._bar: tqdm | None = None

    def __call__(self, attack: str, eps: float, met: int, of: int, robust: int) -> None:
        """Move the bar of an attack at a budget, or begin it."""
        if self._of != (attack, eps):
            self.close()
            self._of = (attack, eps)
            self._bar = tqdm(total=of, desc=f"{attack} {self.symbol}={eps:g} on {self.name}", unit="image")
        assert self._bar is not None
        self._bar.set_postfix(robust=robust, refresh=False)
        self._bar.update(met - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.total = self._bar.n  # later starts attacked fewer images than the first
            self._bar.refresh()
            self._bar.close()
