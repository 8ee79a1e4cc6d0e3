"""What a reader is taught at each step of a run: to see, then to answer, from few things to everything."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from readers import batches
from readers.batches import Kind

# Kinds of batches, and how often each is drawn in each part of a run.
KINDS = {
    Kind("picture", 96, 1, 32): (0.60, 0.40, 0.15, 0.05),
    Kind("picture", 128, 1, 24): (0.25, 0.25, 0.15, 0.10),
    Kind("picture", 192, 1, 12): (0.15, 0.15, 0.30, 0.40),
    Kind("several", 96, 3, 12): (0.0, 0.10, 0.15, 0.10),
    Kind("several", 128, 4, 6): (0.0, 0.0, 0.10, 0.20),
    Kind("video", 96, 8, 12): (0.0, 0.10, 0.15, 0.15),
    Kind("signs", 96, 1, 24): (0.0, 0.0, 0.0, 0.12),
    Kind("signs", 192, 1, 12): (0.0, 0.0, 0.0, 0.18),
}
LOOKING = 0.4  # share of a run in which the encoder learns to see, the language model left out
AGAIN = 4  # thereafter one step in so many is such a one
PARTS = (LOOKING, 0.5, 0.7)  # where the parts after the first begin


def settings(done: float) -> tuple[np.ndarray, float]:
    """Chances of each kind and ease of the pictures, when a share `done` of the run is behind."""
    part = sum(done >= start for start in PARTS)
    chances = np.array([row[part] for row in KINDS.values()])
    ease = max(0.0, min(1.0, (PARTS[1] - done) / (PARTS[1] - LOOKING)))
    return chances / chances.sum(), ease


class Lessons(Dataset):
    """The batch of every step of a run; each follows from the seed, its number and the process alone."""

    def __init__(
        self, composer: batches.Composer, steps: int, size: float, seed: int, process: int = 0
    ) -> None:
        self.composer, self.steps, self.size, self.seed = composer, steps, size, seed
        self.process = process

    def looking(self, step: int) -> bool:
        """Whether nothing is asked in a step, and the encoder alone learns."""
        return step < LOOKING * self.steps or step % AGAIN == 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> batches.Batch:
        chances, ease = settings(step / self.steps)
        rng = np.random.default_rng([self.seed, step])
        kind = list(KINDS)[rng.choice(len(KINDS), p=chances)]
        kind = Kind(kind.name, kind.side, kind.count, max(1, round(kind.items * self.size)))
        rng = np.random.default_rng([self.seed, step, self.process])  # of one kind, so that none waits long
        if self.looking(step):
            calm = max(0.0, 1 - 2 * step / (LOOKING * self.steps))
            return self.composer(batches.charts(rng, kind, "train", calm=calm))
        return self.composer(batches.sample(rng, kind, "train", ease=ease))
