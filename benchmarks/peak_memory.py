"""Run a command and report the peak memory of its largest process; quickstart.sh measures with it.

Notable: it costs nothing while the command runs. The kernel keeps each process's high-water mark
and hands it over with the exit status, for the command and every descendant that was waited for.

    python -m benchmarks.peak_memory peak.txt python train_pretrain.py
"""
import resource
import signal
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run `argv[2:]`, write its peak resident memory in MiB to `argv[1]`, pass its status on."""
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.peak_memory REPORT COMMAND [ARGUMENT ...]")
    report, command = Path(sys.argv[1]), sys.argv[2:]
    # A terminal sends Ctrl-C to both processes: the command decides what it means, this one waits.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    status = child.wait()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    report.write_text(f"{peak / (1 << 20 if sys.platform == 'darwin' else 1 << 10):.0f}\n")
    return status if status >= 0 else 128 - status  # as a shell reports a signal


if __name__ == "__main__":
    sys.exit(main())
