"""Configurations as Python: what to write in a script to make one."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any


def source(configuration: Any) -> str:
    """The shortest expression that makes a configuration: fields that have their defaults are left out.

    Args:
        configuration: of an algorithm, a compressor or the like, or any value that one of their fields takes.

    Example:
        >>> from lightning_slowmo import Gossip, SlowMo
        >>> source(SlowMo(Gossip(overlap=1), sync_every=48))
        'SlowMo(base=Gossip(overlap=1), sync_every=48)'
        >>> source(SlowMo())
        'SlowMo()'
    """
    if not is_dataclass(configuration) or isinstance(configuration, type):
        return repr(configuration)
    written = [f"{name}={source(value)}" for name, value in settings(configuration).items()]
    return f"{type(configuration).__name__}({', '.join(written)})"


def settings(configuration: Any) -> dict[str, Any]:
    """The fields of a configuration that do not have their defaults.

    Example:
        >>> from lightning_slowmo import SlowMo
        >>> settings(SlowMo(sync_every=24))
        {'sync_every': 24}
    """
    return {
        field.name: getattr(configuration, field.name)
        for field in fields(configuration)
        if field.init and not _is_default(configuration, field)
    }


def _is_default(configuration: Any, field: Field) -> bool:
    """Whether leaving a field out makes the same configuration; a default may follow from other fields."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    try:
        return replace(configuration, **{field.name: default}) == configuration
    except (TypeError, ValueError):  # there is no default, or it does not go with the other fields
        return False
