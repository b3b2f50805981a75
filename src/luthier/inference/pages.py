"""Which block of the cache holds whose tokens: allocation on demand, and full blocks found again by content.

Sources: paged attention (Kwon et al. 2023, arXiv 2309.06180); prefix caching by a chain of hashes, as in vLLM
(https://docs.vllm.ai/en/latest/design/prefix_caching.html). A chain begins with what the tokens were read
under (the base's and the adapter's digest), so a block is found again only under the very same weights:
a name never is a key, and new weights under an old name find nothing of the old ones. A salt beside them
keeps those apart who may not learn from its speed what another has asked (vLLM's `cache_salt`).

A block is free, held by one or more sequences, or idle: nobody holds it, but its content is known and may be
found again, until it is the longest unused one and its room is needed. It knows numbers only, no tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16  # tokens


class Pool:
    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._key_of: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self.found = self.filled = 0  # full blocks found again, and computed, since the start

    @property
    def available(self) -> int:
        """Blocks that can be taken now: free ones, and idle ones whose content would be forgotten."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.blocks - self.available

    def take(self) -> int | None:
        """A block for new tokens, held once; None when all are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._found[self._key_of.pop(block)]
        else:
            return None
        self._holders[block] = 1
        return block

    def let(self, block: int) -> None:
        """One holder less; the last one leaves it idle if its content is known, else free."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._key_of:
            self._idle[block] = None
        else:
            self._free.append(block)

    def name(self, block: int, key: bytes) -> None:
        """A held block is full, and this is its content. Of two with the same content the first is kept."""
        if key not in self._found and block not in self._key_of:
            self.filled += 1
            self._key_of[block] = key
            self._found[key] = block

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a chain, each held once more."""
        blocks = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1
            blocks.append(block)
        self.found += len(blocks)
        return blocks

    def forget(self) -> None:
        """No content is known any more; what is held stays held."""
        self._free += self._idle
        self._idle.clear()
        self._key_of.clear()
        self._found.clear()

    def check(self) -> None:
        """Raise `AssertionError` where the books do not balance (for tests and after a failed step)."""
        held = {block for block in range(self.blocks) if self._holders[block]}
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert not held & set(self._free) and not held & set(self._idle), "a held block is free"
        assert len(held) + len(self._free) + len(self._idle) == self.blocks, "a block is lost"
        assert {self._found[key]: key for key in self._found} == self._key_of, "a name leads elsewhere"


def root(*digests: str | None) -> bytes:
    """Where a chain begins: what the tokens are read under."""
    return hashlib.sha256(repr(digests).encode()).digest()


def chain(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full block, given the key of the block before it (or the root)."""
    return hashlib.sha256(before + array("q", ids).tobytes()).digest()
