"""The methods by name, from code, from `--method` text and from a config file. One file a method."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import ConfigError
from .base import LeanModule, Method, Plan, Reducer, index_range

__all__ = ["LeanModule", "Method", "Plan", "Reducer", "available", "from_config", "parse", "register"]

_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Make a method known by its name; a name is given once."""
    if cls.name in _registry:
        raise ConfigError(f"a method named {cls.name!r} is registered already: {_registry[cls.name].__name__}")
    _registry[cls.name] = cls
    return cls


def available() -> dict[str, type[Method]]:
    """Every registered method by name, in alphabetical order."""
    return dict(sorted(_registry.items()))


def from_config(config: Mapping[str, Any]) -> Method:
    """A method from its `to_config`.

    Raises:
        ConfigError: The name or a parameter is not known, or a value is out of range.
    """
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key != "name"}
    cls = _find(str(config.get("name")))
    _check_names(cls, params)
    return cls(**params)


def parse(text: str) -> tuple[Method, ...]:
    """Methods from text: ``"dgssa:layers=auto:4+glad:at=6,8,10"``; parameters of one method are separated by commas.

    Raises:
        ConfigError: The text cannot be read, or names something that is not known.
    """
    methods = []
    for part in text.split("+"):
        name, _, rest = part.strip().partition(":")
        cls = _find(name)
        # A comma separates parameters only where a name and "=" follow: values may be lists.
        pieces = [_parameter(name, piece) for piece in re.split(r",(?=\s*\w+=)", rest) if rest]
        params = dict(pieces)
        if len(params) < len(pieces):
            raise ConfigError(f"{name}: a parameter is given twice in {rest!r}")
        _check_names(cls, params)
        methods.append(cls(**{key: _value(value) for key, value in params.items()}))
    return tuple(methods)


def _find(name: str) -> type[Method]:
    if name not in _registry:
        raise ConfigError(f"unknown method {name!r}; known are {', '.join(available())}")
    return _registry[name]


def _check_names(cls: type[Method], params: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in params:
        if key not in known:
            raise ConfigError(f"{cls.name} has no parameter {key!r}; it has {', '.join(known)}")


def _parameter(method: str, piece: str) -> tuple[str, str]:
    key, equals, value = piece.strip().partition("=")
    if not equals or not value:
        raise ConfigError(f"{method}: {piece!r} is not of the form parameter=value")
    return key, value


def _value(text: str) -> Any:
    """A value of `--method` text: a list ``6,8,10`` or ``1-4``, a number, true or false, else the text itself."""
    if re.fullmatch(r"\d+-\d+", text):
        return index_range(text)
    if "," in text:
        values = [_value(item) for item in text.split(",") if item]
        return tuple(item for value in values for item in (value if isinstance(value, tuple) else (value,)))
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


from . import adavit, castling, dgssa, glad, merging, pruning, sparsifiner  # noqa: E402, F401  (they register)
