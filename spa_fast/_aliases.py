"""The names other libraries give to eps, max_iter and tol."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

from spa_fast import _checks as checks


def _eps_of_blur(blur: float) -> float:
    checks.check_blur(blur)
    return blur**2


_ALIASES: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "reg": ("eps", None),
    "epsilon": ("eps", None),
    "blur": ("eps", _eps_of_blur),
    "numItermax": ("max_iter", None),
    "iters": ("max_iter", None),
    "max_iterations": ("max_iter", None),
    "stopThr": ("tol", None),
    "thresh": ("tol", None),
}

_F = TypeVar("_F", bound=Callable[..., Any])


def accept_aliases(fn: _F) -> _F:
    """Let `fn` take other libraries' names of eps, max_iter and tol; refuse unknown ones with a hint."""
    parameters = inspect.signature(fn).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)

    @wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if any(name not in names for name in kwargs):
            kwargs = _map_aliases(names[: len(args)], names, kwargs)
        return fn(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _map_aliases(given: Sequence[str], names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    mapped = {name: value for name, value in kwargs.items() if name in names}
    source = {name: name for name in (*given, *mapped)}
    for name, value in kwargs.items():
        if name in names:
            continue
        if name not in _ALIASES:
            hint = checks.did_you_mean(name, (*names, *_ALIASES))
            raise TypeError(f"{name}: unexpected argument{hint}")
        target, convert = _ALIASES[name]
        if target in source:
            raise TypeError(f"{name}: means {target}, which {source[target]!r} gives already")
        source[target] = name
        mapped[target] = value if convert is None else convert(value)
    return mapped
