"""What tests/test_survival.py kills: train_models.py, forked from a process that has imported everything already.

    python kill_worker.py OUTPUT_DIR SEED train_models-flags ...

Starts the run again and again with --resume, and sends SIGKILL after a random time or in the middle of a write, until
it has killed KILLS runs; then prints what it found and lets the run finish.
"""

import csv
import os
import random
import signal
import sys
import time
from pathlib import Path

import train_models
from models.checkpoint import read_checkpoint

KILLS = 20


def start(arguments: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(train_models.main(arguments))
    return pid


def wait_for_a_write(folder: Path, pid: int) -> None:
    """Until a temporary file is there, or the process has ended."""
    while not any(folder.glob(".*.tmp")) and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.0005)


def check_files(folder: Path) -> int:
    """Everything with a name of its own is whole; the last epoch saved."""
    epoch = 0
    for path in folder.glob("[!.]*"):
        if path.suffix == ".pt":
            epoch = read_checkpoint(path)["epoch"]
        elif path.suffix == ".csv":
            with path.open() as file:
                rows = list(csv.reader(file))
            assert rows[0][0] == "epoch"
            assert [row[0] for row in rows[1:]] == [str(i) for i in range(1, len(rows))]
            assert all(len(row) == len(rows[0]) for row in rows)
    return epoch


def main() -> None:
    folder, seed, *arguments = sys.argv[1:]
    folder, generator = Path(folder), random.Random(int(seed))
    folder.mkdir(parents=True, exist_ok=True)
    arguments += ["--resume", "--output-dir", str(folder)]
    kills = during_writes = 0
    while kills < KILLS:
        pid = start(arguments)
        began = time.monotonic()
        if kills % 2:
            for old in folder.glob(".*.tmp"):
                old.unlink()
            wait_for_a_write(folder, pid)
            time.sleep(generator.uniform(0, 0.01))
        else:
            time.sleep(generator.uniform(0.05, 1.0))
        during_writes += any(folder.glob(".*.tmp"))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"ended by itself after {time.monotonic() - began} s: more epochs are needed"
        kills += 1
        epoch = check_files(folder)
    print(f"{kills} kills, {during_writes} during writes, epoch {epoch}", flush=True)
    _, status = os.waitpid(start(arguments), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
