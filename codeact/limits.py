"""What the code of a model may use at most."""
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Of one conversation, unless it says otherwise. Seconds, bytes, characters.

    The clock of a step stands still while a tool works, which has a limit of its own.
    """

    seconds: float = 30.0  # of a step; then it is interrupted, and its variables are kept
    grace: float = 1.5  # after the interrupt; then the process is ended
    start_seconds: float = 60.0  # until a new process is ready
    tool_seconds: float = 60.0  # of one call of a tool
    tool_calls: int = 1000  # in a step
    memory: int = 512 * MIB  # Python's; then it sees a MemoryError, and lives on
    resident: int = 1024 * MIB  # the whole process's; then it is ended
    message: int = 4 * MIB  # arguments or result of a tool's call, as JSON; also a step's code
    output: int = 10_000  # characters that a step may print; the rest is counted only
    recursion: int = 1000  # depth of Python's calls
    idle_seconds: float = 900.0  # without a step; then the process is ended
    conversations: int = 20  # of a `Sandbox` at once; then the one that is idle longest is ended
    second_layer: str = "auto"  # bubblewrap: auto (if it works here), yes or no
