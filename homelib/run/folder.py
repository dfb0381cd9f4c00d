"""A run folder: `runs/<name>/` with settings.json, status.json, history.csv, last.ckpt and the one before it, best.safetensors, and by what is done
with it validation.csv, initial.csv, samples/, metrics.csv, predictions/, routing.csv, routing/, figures/.

Files are written beside and renamed, so that a killed run leaves either the old file or the new one.
"""

import json
import time
from pathlib import Path
from typing import Literal

import pandas as pd

from ..config import Settings
from ..errors import UserError
from ..paths import written_whole

HISTORY = ("step", "loss", "learning_rate", "gradient_norm", "seconds")  # that every row has
CONTENTS = {
    "settings.json": "every setting",
    "status.json": "how far it is, or how it ended",
    "history.csv": "each step's loss, rate, gradient; validation",
    "best.safetensors": "the weights to predict with",
    "last.ckpt": "all that it takes to go on",
    "previous.ckpt": "the same, of the checkpoint before",
    "validation.csv": "Dice by validation case and class, at its best",
    "initial.csv": "what was taken of the weights at its start",
    "samples": "predictions on the training patient, by step",
    "tensorboard": "the history for TensorBoard",
    "metrics.csv": "what the evaluation found",
    "predictions": "label volumes as NIfTI",
    "routing.csv": "use of every expert, by step",
    "routing_lift.csv": "lift of every expert in every class, by step",
    "routing_information.csv": "bits that class and expert share, by step",
    "routing": "routing maps and tables, by case",
}
State = Literal["queued", "running", "stopped", "done", "failed", "stale"]


class Run:
    """A run by its folder, which need not exist yet."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """A run that exists. Raises UserError where the folder holds none."""
        run = cls(folder)
        if not run.settings_file.exists():
            raise UserError(f"{run.folder}: no settings.json there, expected a run folder. `home train` makes one.")
        return run

    settings_file = property(lambda self: self.folder / "settings.json")
    lock_file = property(lambda self: self.folder / "training.lock")
    checkpoint_file = property(lambda self: self.folder / "last.ckpt")
    previous_file = property(lambda self: self.folder / "previous.ckpt")
    validation_file = property(lambda self: self.folder / "validation.csv")
    initial_file = property(lambda self: self.folder / "initial.csv")
    samples = property(lambda self: self.folder / "samples")
    weights_file = property(lambda self: self.folder / "best.safetensors")
    history_file = property(lambda self: self.folder / "history.csv")
    metrics_file = property(lambda self: self.folder / "metrics.csv")
    predictions = property(lambda self: self.folder / "predictions")
    figures = property(lambda self: self.folder / "figures")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def settings(self) -> Settings:
        return Settings.load(self.settings_file)

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: step, loss, learning_rate, gradient_norm (before clipping), seconds, and what validation added; empty before the first."""
        return pd.read_csv(self.history_file) if self.history_file.exists() else pd.DataFrame(columns=list(HISTORY))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a case, class and metric. Raises UserError where it was not measured."""
        if not self.metrics_file.exists():
            raise UserError(f"{self.metrics_file}: no such file; `home evaluate {self.folder}` writes it.")
        return pd.read_csv(self.metrics_file)

    @property
    def status(self) -> dict:
        """What status.json says: state, time, and by state the steps done, the seconds, or the error. Raises UserError where it is damaged."""
        status = self.folder / "status.json"
        try:
            return {"state": "queued"} | (json.loads(status.read_text()) if status.exists() else {})
        except (ValueError, TypeError):
            raise UserError(f"{status}: no JSON object, expected the state of the run. Delete it; the same training writes it anew.") from None

    @property
    def state(self) -> State:
        return self.status["state"]

    def set_state(self, state: State, **told: object) -> None:
        with written_whole(self.folder / "status.json") as part:
            part.write_text(json.dumps({"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **told}) + "\n")

    def saved(self) -> pd.DataFrame:
        """What the folder holds: one row a file or folder, with its size in MiB and what it is."""
        rows = []
        for name, what in CONTENTS.items():
            if (path := self.folder / name).exists():
                files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                rows.append({"file": name, "MiB": sum(file.stat().st_size for file in files) / 2**20, "what": what})
        return pd.DataFrame(rows, columns=["file", "MiB", "what"])
