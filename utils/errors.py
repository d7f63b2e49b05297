"""The errors the command line turns into one line and an exit code."""


class UserError(Exception):
    """A problem the user can mend: a file, a data set, a device. The message names the problem and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """Flags that are wrong, or that disagree with each other or with a checkpoint."""

    exit_code = 2
