"""Churn: how many tokens of a fixed batch go to another expert than at the evaluation before.

M MoE layers, L tokens of the batch.
"""

import io
import pathlib

import numpy as np

from moejax import files

FOLDER = "probe"


class Probe:
    """Remembers which expert each token preferred at every evaluation: one small file a step in the run's folder.

    A run that goes on compares with the newest evaluation up to its step, so that the numbers are those of a run that
    was never interrupted.
    """

    def __init__(self, workdir: pathlib.Path, *, step: int):
        self._folder = workdir / FOLDER
        seen = [int(path.stem) for path in self._folder.glob("*.npy") if path.stem.isdigit()]
        last = max((number for number in seen if number <= step), default=None)
        self._previous_ML = None if last is None else np.load(self._path(last))

    def churn(self, preferred_ML: np.ndarray, step: int) -> np.ndarray | None:
        """churn_M: the share of tokens whose preferred expert changed; None at the first evaluation.

        preferred_ML: -1 where a token is none of the layer's.
        """
        content = io.BytesIO()
        np.save(content, preferred_ML)
        files.write(self._path(step), content.getvalue())
        previous_ML, self._previous_ML = self._previous_ML, preferred_ML
        if previous_ML is None:
            return None
        return (preferred_ML != previous_ML).sum(axis=1) / np.maximum((preferred_ML >= 0).sum(axis=1), 1)

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / f"{step:08d}.npy"
