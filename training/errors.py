"""The one way a stage of training refuses what it was given. Knows no stage."""


class InvalidTraining(ValueError):
    """A file, a store or a setting cannot be used; the message names it and the remedy. Work done so far is kept."""
