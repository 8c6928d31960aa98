"""The exceptions that end a command with one line instead of a traceback."""


class UserError(Exception):
  """A mistake in a flag, a config, a file or a shard. Exit code 2.

  The message is one line that names the thing, what was found and what was
  expected.
  """


class RunFailed(Exception):
  """A run that went wrong by itself, such as a loss that is not finite. Exit code 1."""


class StorageDown(OSError):
  """A bucket that was out of order for minutes. Exit code 1."""


class Stopped(Exception):
  """A run that was asked to stop and saved what it had. Exit code 75: run it again."""


def first_line(error: BaseException) -> str:
  """Returns an error's first line, or its type where it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
