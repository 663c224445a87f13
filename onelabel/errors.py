"""What can go wrong, and whose fault it is.

OnelabelError
├── ConfigError      the configuration: an unknown key, a value out of its range, stages that contradict each other
├── DataError        a file or a cohort: not an image, wrong dimensions, label and image on different grids
├── CheckpointError  a checkpoint that is missing, incomplete or was made for another network
└── ClusterError     machines: a node that is lost, a demand that the cluster can never meet
    └── StorageError storage that cannot be written to, or does not answer: no scan's fault

Every message is one sentence that names the value, the rule it breaks, and what to do.
"""


class OnelabelError(Exception):
    """Base of all errors that a user can mend; the command line prints the message alone and exits with 2."""


class ConfigError(OnelabelError):
    """The configuration is wrong."""


class DataError(OnelabelError):
    """A scan, a label or a cohort is wrong."""


class CheckpointError(OnelabelError):
    """A checkpoint cannot be used."""


class ClusterError(OnelabelError):
    """The machines or their storage cannot do what was asked."""


class StorageError(ClusterError):
    """Storage, be it disks or an object store, refuses or does not answer."""


SCAN_FAULTS = (OnelabelError, OSError, ValueError, RuntimeError, MemoryError)
"""What one bad scan may raise without stopping the others."""


def last_line(error: BaseException, /) -> str:
    """What an error of many lines comes to; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def sentence(error: BaseException, /) -> str:
    """An error as one line; what is not ours is named by its class."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OnelabelError) else f"{type(error).__name__}: {text}".removesuffix(": ")
