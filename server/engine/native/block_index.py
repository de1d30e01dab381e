"""Which blocks of tokens are cached, under which key, and which goes next. Bookkeeping only: no torch.

A block's key is a chained hash: of all tokens up to its end and of the steering that shaped them. Equal keys mean equal
keys and values, to rounding.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def chain(
    token_ids: Sequence[int], block_size: int, salt: bytes = b"", salted_from: int = 0, owner: str = ""
) -> list[bytes]:
    """One key for each full block of `token_ids`.

    Args:
        salt: what shaped the states at and after position `salted_from` besides the tokens; empty = nothing.
        owner: whose blocks these are; nobody else finds them.
    """
    keys, previous = [], _hash(owner.encode()) if owner else b""
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = previous + array("q", token_ids[start : start + block_size]).tobytes()
        salted = salt and start + block_size > salted_from
        previous = _hash(block + salt if salted else block)
        keys.append(previous)
    return keys


def digest(token_ids: Sequence[int], owner: str = "") -> bytes:
    """A hash of a whole prompt and of whose it is."""
    return _hash(array("q", token_ids).tobytes() + owner.encode())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class BlockIndex:
    """Keys → places in a store of `num_blocks` blocks; the least recently used one makes room."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._places: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._places)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The places of the longest cached prefix of `keys`. Its first block counts as the most recently used."""
        found = []
        for key in keys:
            place = self._places.get(key)
            if place is None:
                break
            found.append(place)
        for key in reversed(keys[: len(found)]):
            self._places.move_to_end(key)
        return found

    def insert(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Make places for those of a prompt's `keys` that have none: (number of the block, place) of each.

        A prompt never evicts its own blocks: what does not fit at its end is left out.
        """
        self.match(keys)  # what it has must not be the oldest, or nothing of others' could make room for the rest
        mine = set(keys)
        added = []
        for number, key in enumerate(keys):
            if key in self._places:
                continue
            if len(self._places) < self.num_blocks:
                place = len(self._places)
            else:
                oldest = next(iter(self._places), None)
                if oldest is None or oldest in mine:
                    break
                place = self._places.pop(oldest)
            self._places[key] = place
            added.append((number, place))
        for key in reversed(keys):
            if key in self._places:
                self._places.move_to_end(key)
        return added
