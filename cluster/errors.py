"""Exceptions of the project, in one tree.

EmoeError
├── UserError           the request, file or setting is wrong; says which, and what was expected
│   ├── ConfigError         a flag or a key of the YAML file
│   ├── CheckpointError     a model directory that is missing, damaged or not servable
│   ├── PlacementError      a placement that breaks a rule or cannot exist
│   └── RequestError        a request that cannot be served; carries OpenAI's `param` and `code`
├── ConflictError       another operation is under way
├── NotReadyError       the cluster cannot serve yet, or not now
├── WorkerError         a worker could not do what it was asked, and its peers are not the cause
└── StepAborted         a lock-step peer is gone; the step must be run again in the next epoch
"""


def why(error: Exception) -> str:
    """The reason of an error of the system without the file's name and the number; else the error's text, in which
    Python's words for bytes that are no text are replaced."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: byte {error.start + 1} is wrong"
    return getattr(error, "strerror", None) or str(error)


class EmoeError(Exception):
    """Base of every error that this project raises on purpose."""


class UserError(EmoeError, ValueError):
    """Something that its author can put right; the message names the field or file."""


class ConfigError(UserError):
    """A flag, or a key of the configuration file."""


class CheckpointError(UserError):
    """A model directory that is missing, damaged, or of an architecture that cannot be served."""


class PlacementError(UserError):
    """A placement that breaks a rule, or a problem that has none."""


class RequestError(UserError):
    """A request that cannot be served. `param` names the field, `code` is OpenAI's error code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_request_error, (str(self), self.param, self.code, self.status))


def _rebuild_request_error(message: str, param: str | None, code: str | None, status: int) -> RequestError:
    return RequestError(message, param=param, code=code, status=status)


class ConflictError(EmoeError):
    """Another operation is under way; the message carries its id."""


class NotReadyError(EmoeError):
    """The cluster cannot serve yet, or not now."""


class WorkerError(EmoeError):
    """A worker could not do what it was asked; for example, the model failed on these tokens. The message says how."""


class StepAborted(EmoeError):
    """A lock-step peer died or hung. Nothing of the step counts; it is run again in the next epoch."""
