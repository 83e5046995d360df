"""How a symbol of LMDeploy is replaced: looked at first, then exchanged wherever it is held.

A patch depends on what the code it replaces looked like when it was written. Applied to another
version it would fail later and elsewhere, or worse, not fail. So each one names the parameters and
the lines of source that it counts on, and refuses if they are not there.
"""
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

SUPPORTED = "0.18.0"


class UpstreamChanged(RuntimeError):
    """LMDeploy is not as a patch expects it; the message is one line."""


@dataclass(frozen=True)
class Patch:
    """A change of one symbol, not applied yet."""

    symbol: str  # "lmdeploy.utils.is_bf16_supported"
    reason: str  # what is wrong with the original here
    apply: Callable[[], None]


def installed_version() -> str | None:
    """LMDeploy's version, None if it is not installed."""
    try:
        return metadata.version("lmdeploy")
    except metadata.PackageNotFoundError:
        return None


def refuse(symbol: str, difference: str) -> UpstreamChanged:
    """The error that says which symbol differs, in which version, and what to do."""
    return UpstreamChanged(
        f"{symbol} {difference}: LMDeploy {installed_version()} is installed, patches/ supports "
        f"{SUPPORTED}; `pip install --no-deps lmdeploy=={SUPPORTED}`"
    )


def find(symbol: str) -> tuple[Any, str, Any]:
    """The module or class that holds a dotted name, the name in it, and what it holds.

    Raises:
        UpstreamChanged: there is no such thing.
    """
    if installed_version() is None:
        raise UpstreamChanged(
            f"LMDeploy is not installed: `bash setup.sh` installs {SUPPORTED} (on Linux)"
        )
    path, _, name = symbol.rpartition(".")
    try:
        owner = pkgutil.resolve_name(path)
        return owner, name, vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise refuse(symbol, f"cannot be found ({error})") from error


@cache
def source_of(function: Any) -> str:
    """Its source; reading a file takes a while, and some tests look a hundred times."""
    return inspect.getsource(function)


def look_at(
    symbol: str, *, parameters: Iterable[str] | None = None, contains: Iterable[str] = ()
) -> Any:
    """The thing of this dotted name, after a look at its parameters and its source.

    Raises:
        UpstreamChanged: it is not there, takes other parameters, or lacks a line.
    """
    _, _, held = find(symbol)
    function = held.__func__ if isinstance(held, staticmethod | classmethod) else held
    try:
        found = list(inspect.signature(function).parameters) if parameters is not None else None
        source = source_of(function) if contains else ""
    except (TypeError, ValueError, OSError) as error:
        raise refuse(symbol, f"cannot be looked into ({error})") from error
    if parameters is not None and found != list(parameters):
        raise refuse(symbol, f"takes ({', '.join(found)}), not ({', '.join(parameters)})")
    for line in contains:
        if line not in source:
            raise refuse(symbol, f"no longer contains `{line}`")
    return held


def exchange(symbol: str, reason: str, new: Any, *, also: Iterable[str] = ()) -> Patch:
    """A patch that puts `new` in the place of a symbol, and of the copies that other modules took
    with `from … import`.

    Raises:
        UpstreamChanged: a copy is missing or is not one.
    """
    _, _, old = find(symbol)
    places = [find(place) for place in (symbol, *also)]
    for place, (_, _, held) in zip((symbol, *also), places, strict=True):
        if held is not old:
            raise refuse(place, f"is no longer {symbol}")

    def apply() -> None:
        for owner, name, _ in places:
            setattr(owner, name, new)

    return Patch(symbol, reason, apply)
