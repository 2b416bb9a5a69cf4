"""Fingerprints: what an output was made of, so that nothing is taken for another's."""

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def fingerprint(*parts: Any) -> str:
    """Hash tensors and bytes by their values, dataclasses, lists and dictionaries by what is in them, all else by its
    repr.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: "hashlib.blake2b", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {f.name: getattr(value, f.name) for f in fields(value)})
    elif isinstance(value, dict):
        _feed(digest, [part for pair in value.items() for part in pair])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}:".encode())
        for part in value:
            _feed(digest, part)
    elif isinstance(value, bytes):
        digest.update(f"{len(value)} bytes;".encode())
        digest.update(value)
    else:
        digest.update(f"{value!r};".encode())
