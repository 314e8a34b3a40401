"""What a checkpoint may hold, and a checksum over it that does not depend on how it is stored."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MAPPINGS = (dict, OrderedDict, Counter)
SEQUENCES = (list, tuple)
SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype)  # None: many an optimizer's options


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` accepts a value: tensors, numbers, text, and collections of them."""
    if type(value) in MAPPINGS:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if type(value) in (*SEQUENCES, set):
        return all(map(is_plain, value))
    return type(value) in SCALARS or isinstance(value, Tensor)


def checksums(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The checksum of each entry of a checkpoint.

    It covers every bit of numbers, text and dense tensors, and shapes, dtypes, keys and their order. Of objects that
    are none of these (such as a user's own class among the hyperparameters) it covers the type alone, since their
    pickles may differ from one process to the next. It is the same on all devices, and after saving and loading.
    """
    return {str(key): _digest(value).hex() for key, value in checkpoint.items()}


def fingerprint(parts: Iterable[bytes]) -> int:
    """48 bits of a checksum: an integer that a header carries exactly, by which workers compare what they have read."""
    return int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:6], "big")


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()
    _feed(digest, value, ())
    return digest.digest()


def _feed(digest: Any, value: Any, above: tuple[int, ...]) -> None:
    """Add a value to a digest, behind its type and its length, so that no two values add the same bytes.

    Args:
        digest: of hashlib.
        value: what to add.
        above: identities of the collections that contain it; one that contains itself is not entered again.
    """
    kind = type(value)
    if id(value) in above:
        _tag(digest, "inside itself", len(above))
    elif kind in MAPPINGS:
        _tag(digest, kind.__name__, len(value))
        for pair in value.items():
            for item in pair:
                _feed(digest, item, (*above, id(value)))
    elif kind in SEQUENCES:
        _tag(digest, kind.__name__, len(value))
        for item in value:
            _feed(digest, item, (*above, id(value)))
    elif kind is set:
        _tag(digest, "set", len(value))
        for part in sorted(map(_digest, value)):
            digest.update(part)
    elif isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta):
        _tag(digest, f"tensor {value.dtype} {list(value.shape)}", value.numel())
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.numel():  # one without elements may have strides that no such view takes
            digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif kind in SCALARS:
        raw = _raw(value)
        _tag(digest, kind.__name__, len(raw))
        digest.update(raw)
    else:
        _tag(digest, f"{kind.__module__}.{kind.__qualname__}", 0)


def _raw(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, complex):
        return struct.pack("<dd", value.real, value.imag)
    return repr(value).encode()


def _tag(digest: Any, kind: str, length: int) -> None:
    digest.update(f"{len(kind)} {kind} {length} ".encode())
