"""The state of a training beside its output, from which an interrupted one is resumed."""

import io
from dataclasses import astuple, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import InputFileError, UsageError
from ..model import files
from .result import Epoch
from .training import History, Trainee


@dataclass(frozen=True)
class Saved:
    """Where the state is saved after each epoch.

    `header` tells what a training must agree in to be resumed, and `resume` whether this one is.
    """

    path: Path
    header: list[str]
    resume: bool

    def save(self, trainee: Trainee, optimizer: torch.optim.Optimizer, history: History) -> None:
        """Save the state after an epoch.

        Raises:
            UsageError: the file cannot be written.
        """
        document = {
            "header": self.header,
            "state": trainee.state(),
            "optimizer": optimizer.state_dict(),
            "losses": history.losses,
            "epochs": [astuple(epoch) for epoch in history.epochs],
            "best": None if history.best is None else astuple(history.best),
            "best_state": history.best_state,
            "good": history.good,
            "stopped": history.stopped,
        }
        buffer = io.BytesIO()
        torch.save(document, buffer)
        files.write(self.path, buffer.getvalue())

    def restore(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> History:
        """The history so far, with `trainee` and `optimizer` as they were; a new one where this
        training is not resumed.

        Raises:
            InputFileError: the file cannot be read.
            UsageError: it is of another training.
        """
        if not self.resume:
            return History()
        try:
            document: dict[str, Any] = torch.load(self.path, "cpu", weights_only=True)
            header = document["header"]
        except FileNotFoundError:
            raise InputFileError(f"{self.path}: no such file: there is nothing to resume") from None
        except Exception:  # torch.load raises many types for a damaged file.
            raise InputFileError(
                f"{self.path}: cannot be read as the state of a training"
            ) from None
        if header != self.header:
            raise UsageError(
                f"{self.path}: is of another model, other data or options: leave out resume"
            )
        trainee.load(document["state"])
        optimizer.load_state_dict(document["optimizer"])
        return History(
            losses=document["losses"],
            epochs=[Epoch(*fields) for fields in document["epochs"]],
            best=None if document["best"] is None else Epoch(*document["best"]),
            stopped=document["stopped"],
            good=document["good"],
            best_state=document["best_state"],
        )

    def remove(self) -> None:
        """Remove the file, once the output is written."""
        self.path.unlink(missing_ok=True)


def progress_path(output: str | PathLike) -> Path:
    """The file that a training saves its state in until `output` is written."""
    return Path(f"{output}.progress")
