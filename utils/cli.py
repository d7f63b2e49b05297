"""What the entry scripts' command lines share: flag types, one-line errors, exit codes."""

import argparse
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch

from utils.errors import Terminated, UsageError, UserError, is_out_of_memory, one_line

# by which one torchrun a machine finds the others of a SLURM job
RENDEZVOUS = '--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint="$(scontrol show hostnames | head -n1):29500"'


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, except a default of None: there the help text says what happens."""

    def _get_help_string(self, action):
        if action.default is None or isinstance(action, argparse.BooleanOptionalAction):
            return action.help  # some Pythons add BooleanOptionalAction's default: spelled out
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without prefix abbreviation, whose errors are one line instead of a usage text."""

    def __init__(self, **arguments):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **arguments)

    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def number(convert: type, minimum: float, maximum: float | None = None, *, exclusive: bool = False) -> Callable:
    """An argparse type: a finite number from minimum, or above it if ``exclusive``, to maximum."""
    bound = f"{'more than' if exclusive else 'at least'} {minimum}"
    bound += f" and at most {maximum}" if maximum is not None else ""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n int' if convert is int else ' number'}") from None
        inside = minimum < value if exclusive else minimum <= value
        if not inside or value > (math.inf if maximum is None else maximum) or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        if convert is int and value >= 2**63:
            raise argparse.ArgumentTypeError(f"must be less than 2^63, not {text}")
        return value

    return parse


positive_int = number(int, 1)
positive_float = number(float, 0, exclusive=True)
nonnegative_float = number(float, 0)
fraction = number(float, 0, 1, exclusive=True)


def pixel_distance(text: str) -> float:
    """An argparse type: a positive number, or a fraction such as 8/255.

    Pixels are at most 1: beyond 1e9 a distance would say nothing, and its square overflow.
    """
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 8/255") from None
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1e9, not {text}")
    return value


def device(text: str) -> torch.device:
    """An argparse type: "auto", a GPU if there is one, or a torch device that works here."""
    if text in ("auto", "cuda") and torch.cuda.is_available():  # torchrun's processes take a GPU each
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        chosen = torch.device("cpu" if text == "auto" else text)
        torch.ones(1, device=chosen).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason}); try cpu") from None
    return chosen


def add_shared_flags(parser: argparse.ArgumentParser, *, cpu_only: bool = False):
    """--device, --num-threads and --seed, the same in every script; returns their group."""
    group = parser.add_argument_group("machine")
    flag = group.add_argument
    if not cpu_only:
        flag("--device", type=device, default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if any")
    threads = "CPU threads (default: torch's choice); one is often fastest for small networks"
    flag("--num-threads", type=positive_int, help=threads)
    names, seed = ("--prng-seed", "--prng_seed", "--seed"), number(int, 0, 2**31)
    flag(*names, type=seed, default=1729, help="seed of everything random")
    return group


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """So many CPU threads, put back afterwards; None leaves everything to torch."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        if count:
            torch.set_num_threads(before)


@contextmanager
def sigterm_as_an_exception() -> Iterator[None]:
    """Raise Terminated on SIGTERM: files under way are cleaned up as on Ctrl-C."""

    def terminate(*_) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def own_command(function: Callable, arguments: Sequence[str]) -> str:
    """What goes behind "python" or "torchrun" to run a function's script with these arguments."""
    module = sys.modules[function.__module__]
    script = ["-m", module.__spec__.name] if module.__package__ else [module.__file__]
    return shlex.join([*script, *arguments])


def refuse_srun_alone(command: Callable, arguments: Sequence[str], shares_work: bool) -> None:
    """Raise UsageError, with the line to use, if srun starts several processes without torchrun."""
    tasks, nodes = (int(os.environ.get(f"SLURM_{name}") or 1) for name in ("NTASKS", "NNODES"))
    if tasks == 1 or "RANK" in os.environ:
        return
    script = own_command(command, arguments)
    line = f"srun --nodes=1 --ntasks=1 python {script}"
    if shares_work:
        line = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 torchrun --nnodes={nodes} "
        line += f"--nproc-per-node={-(-tasks // nodes)} {RENDEZVOUS if nodes > 1 else '--standalone'} {script}"
    raise UsageError(f"srun starts {tasks} processes that do not know of each other; use: {line}")


def run(parser: Parser, command: Callable, argv: Sequence[str] | None, *, shares_work: bool = False) -> int:
    """Parse argv, run the command, and return the exit code, as docs/training.md lists them.

    An error a user can cause ends as one line on stderr. Others keep their traceback.
    ``shares_work``: whether the processes of a torchrun share the command's work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with sigterm_as_an_exception():
            flags = parser.parse_args(arguments)
            refuse_srun_alone(command, arguments, shares_work)
            with threads_of_torch(flags.num_threads):
                command(flags)
        return 0
    except SystemExit as stop:  # --help
        return stop.code or 0
    except UserError as error:
        message, code = str(error), error.exit_code
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message, code = f"out of memory ({one_line(error)}); try a smaller --batch-size or --image-size", 1
    except OSError as error:
        message, code = str(error), 1
    except KeyboardInterrupt as stop:
        message, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    message = "\\n".join(message.splitlines())  # the name of a file may have any character
    print(f"{parser.prog}: {'' if code > 128 else 'error: '}{message}", file=sys.stderr)
    return code
