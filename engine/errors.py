"""Everything that can go wrong and be told to a user, as one tree.

CottentionError
├── ModelFolderError      a model that cannot be served: what is wrong with its folder
├── ConfigurationError    a setting, or a combination of settings, that cannot work
├── OutOfMemoryError      the pool does not fit: what was asked, what there is
├── ParameterError        a request's field: its name and what is allowed
├── EngineStoppedError    the engine takes no more work
└── RequestFailedError    a request that the engine accepted and could not finish
"""


class CottentionError(Exception):
    """Base of all errors that carry a message for a person."""


class ModelFolderError(CottentionError):
    """A model folder that is missing, incomplete, damaged or of another kind."""


class ConfigurationError(CottentionError):
    """A setting that is not allowed, by itself or beside the others."""


class OutOfMemoryError(CottentionError):
    """The state pool does not fit into memory."""


class ParameterError(CottentionError):
    """A request's parameter is not allowed; `param` is the field's public name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class EngineStoppedError(CottentionError):
    """The engine is stopping or stopped: it takes no more work."""


class RequestFailedError(CottentionError):
    """The engine accepted this request and failed on it; the engine goes on."""
