"""What a reader is taught at each step of a run: to see, then to answer, from few things to everything."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from readers import batches
from readers.batches import Kind

# Kinds of batches, and how often each is drawn in each part of a run.
KINDS = {
    Kind("picture", 96, 1, 32): (0.60, 0.30, 0.10, 0.05),
    Kind("picture", 128, 1, 24): (0.25, 0.20, 0.15, 0.10),
    Kind("picture", 192, 1, 12): (0.15, 0.15, 0.25, 0.35),
    Kind("several", 96, 3, 12): (0.0, 0.10, 0.10, 0.05),
    Kind("several", 128, 4, 6): (0.0, 0.05, 0.15, 0.20),
    Kind("video", 96, 8, 12): (0.0, 0.10, 0.10, 0.10),
    Kind("signs", 96, 1, 24): (0.0, 0.25, 0.15, 0.05),
    Kind("signs", 192, 1, 12): (0.0, 0.10, 0.15, 0.15),
}
LOOKING = 0.35  # share of a run in which the encoder learns to see, the language model left out
AGAIN = 4  # thereafter one step in so many is such a one
PARTS = (0.0, 0.3, 0.6)  # where the parts after that begin, in shares of what is left of the run


def settings(done: float, looking: float = LOOKING) -> tuple[np.ndarray, float]:
    """Chances of each kind and ease of the pictures, when a share `done` of the run is behind."""
    asking = (done - looking) / (1 - looking)
    part = sum(asking >= start for start in PARTS)
    chances = np.array([row[part] for row in KINDS.values()])
    ease = max(0.0, min(1.0, 1 - asking / PARTS[1]))
    return chances / chances.sum(), ease


class Lessons(Dataset):
    """The batch of every step of a run; each follows from the seed, its number and the process alone."""

    def __init__(
        self, composer: batches.Composer, steps: int, size: float, seed: int, process: int = 0,
        share_looking: float = LOOKING,
    ) -> None:  # fmt: skip
        self.composer, self.steps, self.size, self.seed = composer, steps, size, seed
        self.process, self.share_looking = process, share_looking

    def looking(self, step: int) -> bool:
        """Whether nothing is asked in a step, and the encoder alone learns."""
        return step < self.share_looking * self.steps or step % AGAIN == 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> batches.Batch:
        chances, ease = settings(step / self.steps, self.share_looking)
        rng = np.random.default_rng([self.seed, step])
        kind = list(KINDS)[rng.choice(len(KINDS), p=chances)]
        kind = Kind(kind.name, kind.side, kind.count, max(1, round(kind.items * self.size)))
        rng = np.random.default_rng([self.seed, step, self.process])  # of one kind, so that none waits long
        if self.looking(step):
            calm = max(0.0, 1 - 2 * step / max(1, self.share_looking * self.steps))
            return self.composer(batches.charts(rng, kind, "train", calm=calm))
        return self.composer(batches.sample(rng, kind, "train", ease=ease))
