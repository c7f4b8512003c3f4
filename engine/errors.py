"""The errors that carry a message for a user, as one tree.

CottentionError
├── ModelFolderError      a model that cannot be served: what is wrong with its folder
├── ConfigurationError    a setting, or a combination of settings, that cannot work
├── OutOfMemoryError      the pool does not fit: what was asked, what there is
├── ParameterError        a request's field: its name and what is allowed
├── EngineStoppedError    the engine takes no more work
├── DeviceFaultError      the device computes nothing any more: the engine ends
├── RequestFailedError    a request that the engine accepted and could not finish
├── SnapshotError         bytes that are no snapshot of a session
│   └── SnapshotMismatchError   a snapshot of another model, tokenizer, layout or format
└── SessionError          what cannot be done with a session
    ├── SessionNotFoundError    unknown, expired, deleted, or somebody else's
    ├── SessionBusyError        another turn has it
    ├── SessionMovedError       it is not at the version that the caller has seen
    ├── NothingToRewindError    no turn to go back to
    ├── ContextPolicyError      too old for another policy
    ├── SessionQuotaError       its owner has no room for more
    ├── NonFiniteStateError     its new state has values that are not finite
    ├── StateTooLargeError      its new state has more bytes than are stored
    ├── KeyReusedError          an idempotency key of another request
    └── StoreUnavailableError   the store does not take it, or cannot be read now
        ├── StoreFullError          the disk takes no more
        └── StoreUnreachableError   the database that several servers share cannot be used now
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


class DeviceFaultError(CottentionError):
    """The device has failed, not a request: nothing more can be computed in this process."""


class RequestFailedError(CottentionError):
    """The engine accepted this request and failed on it; the engine goes on."""


class SnapshotError(CottentionError):
    """Bytes that are no snapshot: of another kind, cut, damaged or lying about their sizes.

    session_id: of the stored session that was read; None for bytes that a client sent.
    """

    session_id: str | None = None


class SnapshotMismatchError(SnapshotError):
    """A snapshot that is whole but does not fit here; the message names all that differs."""


class SessionError(CottentionError):
    """Something that cannot be done with a session as it is."""


class SessionNotFoundError(SessionError):
    """No session of that id for this owner."""


class SessionBusyError(SessionError):
    """Another turn holds the session. is_late: its server may be dead: it has missed heartbeats."""

    def __init__(self, message: str, *, is_late: bool = False) -> None:
        super().__init__(message)
        self.is_late = is_late


class SessionMovedError(SessionError):
    """The session's version is not the expected one, or the lease has been taken over."""


class NothingToRewindError(SessionError):
    """The session has no checkpoint of an earlier turn."""


class ContextPolicyError(SessionError):
    """The session is past the window in which every context policy is the same."""


class SessionQuotaError(SessionError):
    """The owner's sessions are as many, or take as much, as its quota allows."""


class NonFiniteStateError(SessionError):
    """A state to be stored has NaN or infinite values; the session stays as it was."""


class StateTooLargeError(SessionError):
    """A state to be stored has more bytes than the store takes; the session stays as it was."""


class KeyReusedError(SessionError):
    """An idempotency key that was sent with another request."""


class StoreUnavailableError(SessionError):
    """The store does not take a write, or cannot be read now; what was stored is as it was."""


class StoreFullError(StoreUnavailableError):
    """The disk takes no more."""


class StoreUnreachableError(StoreUnavailableError):
    """The database that several servers share cannot be used now; later it can."""
