"""Errors that end a job, each with the exit code that the job gives (table in jobs/README.md).

Floor 1 of the house: standard library only, so every folder may raise them. A message says what was wrong, the values,
where, and the way out; `jobs/cli.py` prints it as the last line and writes it to `<run>/result.json`.
"""


class JobError(Exception):
    """A failure that the user or the world can cause; `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(JobError, ValueError):
    """The configuration cannot work: unknown key, value out of range, impossible batch, unwritable output."""

    exit_code = 2


class DataError(JobError):
    """The data cannot be used: missing shard, empty cache, wrong fingerprint, too many bad records."""

    exit_code = 3


class DamagedCheckpointError(DataError):
    """A committed checkpoint is not what was written: a file is gone, cut short, or has another checksum."""


class RunInUseError(ConfigError):
    """Another driver holds the run, or took it over: two of them must not write the same checkpoints."""


class StoreError(JobError, OSError):
    """A store could not be used: no credentials, no permission, no server, no room.

    Ends a job that meets it before its workers start; a worker that meets it later is restarted, as after any OSError.
    """

    exit_code = 3


class NoSpaceError(StoreError):
    """A disk or a quota is full; what stood at that path stands."""


class OutOfMemoryJobError(JobError):
    """A device or the host ran out of memory."""

    exit_code = 4


class PreemptedError(JobError):
    """The job was asked to stop, and its state is saved: submit it again to go on."""

    exit_code = 5


class RetriesExhaustedError(JobError):
    """Workers failed more often than `launch.max_failures` allows, or again and again without a new checkpoint."""

    exit_code = 6


class NonFiniteError(JobError):
    """Training diverged: more steps in a row than allowed had a loss or gradient that is not finite.

    A code of its own: a restart would diverge again, and neither the config nor the data alone is known to be wrong.
    """

    exit_code = 7


class SaveFailedError(JobError):
    """Checkpoints could not be written, `trainer.max_failed_saves` times in a row; the last committed one stands.

    A code of its own: it is neither the config nor the data, and a restart would do work that cannot be kept.
    """

    exit_code = 8
