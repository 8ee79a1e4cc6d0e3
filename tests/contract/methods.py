"""Methods of one's own that several tests use: functions in place of a score and a rule."""

import torch


def evenly(c):
    """A score that needs no attention: units in turn, over the whole segment."""
    place = torch.arange(c.index.shape[1], device=c.index.device)
    return -((place[None] * 7) % 11).float().expand(c.index.shape)


def each_alone(c, kept):
    """A rule: each survivor is itself alone."""
    return torch.nn.functional.one_hot(kept, c.index.shape[1]).float()


def whole_mean(c, kept):
    """A rule: each survivor is half of itself, half the mean of its segment."""
    mean = c.real / c.real.sum(dim=1, keepdim=True)
    return (each_alone(c, kept) + mean[:, None]) / 2
