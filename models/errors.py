"""The exceptions of Stageline: what a user did or met, in one line.

StagelineError
├── CheckpointError     the checkpoint is missing, broken, unsafe or of an unknown kind
├── ExportError         the checkpoint cannot be traced or cut
├── BundleError         the bundle is missing, changed, unsafe or of another version
├── EngineError         an engine is not installed, or failed to open or to run a stage
│   ├── StructureError  a text cannot go on by the structure that its request asks for
│   ├── WireError       a connection to a stage elsewhere has ended, or brought what cannot be believed
│   └── StageLostError  a stage in another process or on another machine is gone, with all that was under way
├── RequestError        what was submitted to a pipeline cannot be run
├── QueueFullError      the pipeline's queue is full and the submitter asked not to wait
├── DeadlineError       a request was not finished by its deadline
└── StoreError          the store of benchmark runs cannot be read or written

The command line prints the message and exits with 1 (2 for usage); any other exception is our bug and keeps its
traceback.
"""


class StagelineError(Exception):
    """Base of all errors that Stageline raises for what a user did or met. The message is one line."""


class CheckpointError(StagelineError):
    """The checkpoint is missing, broken, unsafe or of an unknown kind."""


class ExportError(StagelineError):
    """The checkpoint cannot be traced or cut."""


class BundleError(StagelineError):
    """The bundle is missing, changed, unsafe or of another version."""


class EngineError(StagelineError):
    """An engine is not installed, or failed to open or to run a stage."""


class StructureError(EngineError):
    """A text cannot go on by the structure that its request asks for. Seen while the stages run, for one request."""


class WireError(EngineError):
    """A connection to a stage in another process or on another machine has ended, or brought what cannot be
    believed."""


class StageLostError(EngineError):
    """A stage in another process or on another machine is gone, and with it all that was under way."""


class RequestError(StagelineError):
    """What was submitted to a pipeline cannot be run."""


class QueueFullError(StagelineError):
    """The pipeline's queue is full and the submitter asked not to wait."""


class DeadlineError(StagelineError):
    """A request was not finished by its deadline."""


class StoreError(StagelineError):
    """The store of benchmark runs is damaged, locked, full, read-only or of a newer version, or has no such run."""
