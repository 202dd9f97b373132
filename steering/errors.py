"""The three ways steering can fail. Knows nothing of HTTP: `service/errors.py` maps these to status codes."""


class SteeringError(Exception):
    """Base of the three families; carries the field at fault, so that a caller knows what to change."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        """Dotted path of the offending input ('steering.alpha', 'messages'), or None where there is none."""

    def __reduce__(self):
        return _rebuild, (type(self), self.message, self.field)


def _rebuild(family: type[SteeringError], message: str, field: str | None) -> SteeringError:
    """Unpickling calls a class with positional arguments only; Ray sends our errors between processes."""
    return family(message, field=field)


class InvalidSteering(SteeringError):
    """The caller asked for something that cannot be done; another request could be. The message names the remedy."""


class BadArtifact(SteeringError):
    """An artifact is damaged, or belongs to another model. Only whoever installed it can put it right."""


class EngineUnavailable(SteeringError):
    """The engine cannot take this request now (starting, stopping, stuck, full). Trying again later may work."""
