"""What a reader is taught at each step of a run: to see, then to answer, from few things to everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from readers import batches
from readers.batches import Kind

# Kinds of batches, and how often each is drawn in each part of a run.
KINDS = {
    Kind("picture", 96, 1, 32): (0.40, 0.00, 0.30, 0.10, 0.05),
    Kind("picture", 128, 1, 24): (0.20, 0.00, 0.20, 0.15, 0.05),
    Kind("picture", 192, 1, 12): (0.40, 0.15, 0.15, 0.25, 0.25),
    Kind("several", 96, 3, 12): (0.0, 0.0, 0.10, 0.10, 0.10),
    Kind("several", 128, 4, 6): (0.0, 0.0, 0.05, 0.15, 0.20),
    Kind("video", 96, 8, 12): (0.0, 0.0, 0.10, 0.10, 0.15),
    Kind("signs", 96, 1, 48): (0.0, 0.70, 0.25, 0.15, 0.10),
    Kind("signs", 192, 1, 12): (0.0, 0.15, 0.10, 0.15, 0.15),
    Kind("crowd", 96, 1, 24): (0.0, 0.0, 0.25, 0.20, 0.20),
    Kind("crowd", 192, 1, 10): (0.0, 0.0, 0.10, 0.15, 0.15),
    Kind("tally", 96, 1, 48): (0.0, 0.0, 0.10, 0.10, 0.20),
    Kind("tally", 192, 1, 16): (0.0, 0.0, 0.10, 0.15, 0.40),
}
TAUGHT = ("signs", "crowd", "tally")  # names of those that are only taught, and never asked about in a test
LOOKING = 0.35  # share of a run in which the encoder learns to see, the language model left out
READING = 0.1  # share of a run, after that, that is nearly all writing: mixed with the rest it is learnt last
AGAIN = 4  # after the looking one step in so many is such a one
PARTS = (0.0, 0.3, 0.6)  # where the parts of the course of questions begin, which is all the rest


@dataclass(frozen=True)
class Course:
    """How a run is shared out.

    Attributes:
        looking, reading: shares of its steps, see `LOOKING` and `READING`.
        begin: where in the course of questions the run begins: 0 with few things in small pictures, 0.6 with
            everything at every size, as fits a reader that knows the course.
    """

    looking: float = LOOKING
    reading: float = READING
    begin: float = 0.0

    def settings(self, done: float) -> tuple[np.ndarray, float]:
        """Chances of each kind and ease of the pictures, when a share `done` of the run is behind."""
        first = self.looking + self.reading
        if done < self.looking:
            part, ease = 0, 1.0
        elif done < first:
            part, ease = 1, 1 - (done - self.looking) / self.reading / PARTS[1]
        else:
            asking = self.begin + (1 - self.begin) * (done - first) / (1 - first)
            part, ease = 1 + sum(asking >= start for start in PARTS), 1 - asking / PARTS[1]
        chances = np.array([row[part] for row in KINDS.values()])
        return chances / chances.sum(), max(0.0, ease)


class Lessons(Dataset):
    """The batch of every step of a run; each follows from the seed, its number and the process alone."""

    def __init__(
        self, composer: batches.Composer, steps: int, size: float, seed: int, process: int = 0,
        course: Course = Course(),
    ) -> None:  # fmt: skip
        self.composer, self.steps, self.size, self.seed = composer, steps, size, seed
        self.process, self.course = process, course

    def looking(self, step: int) -> bool:
        """Whether nothing is asked in a step, and the encoder alone learns."""
        return step < self.course.looking * self.steps or step % AGAIN == 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> batches.Batch:
        chances, ease = self.course.settings(step / self.steps)
        rng = np.random.default_rng([self.seed, step])
        kind = list(KINDS)[rng.choice(len(KINDS), p=chances)]
        kind = Kind(kind.name, kind.side, kind.count, max(1, round(kind.items * self.size)))
        rng = np.random.default_rng([self.seed, step, self.process])  # of one kind, so that none waits long
        if self.looking(step):
            calm = max(0.0, 1 - 2 * step / max(1, self.course.looking * self.steps))
            return self.composer(batches.charts(rng, kind, "train", calm=calm))
        return self.composer(batches.sample(rng, kind, "train", ease=ease))
