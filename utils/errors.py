"""The errors the command line turns into one line and an exit code."""

import torch


class UserError(Exception):
    """A problem the user can mend. The message names the problem and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """Flags that are wrong, or that disagree with each other or with a checkpoint."""

    exit_code = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM: to be handled as Ctrl-C is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is no memory left, on a GPU or a CPU."""
    said = ("can't allocate memory", "Storage size calculation overflowed")  # by torch, of a CPU
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def one_line(error: BaseException) -> str:
    """An error's kind and message in one line of about 200 characters at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
