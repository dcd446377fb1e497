"""How a sequence lies on ranks: pieces, the sequences that cross their borders, and what each piece has for the others.

Everything here is arithmetic of the host, made once for a length and kept.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from itertools import pairwise

Crossing = tuple[int, int]  # begin and end of a sequence, as global positions


@dataclasses.dataclass(frozen=True)
class States:
    """The chunk states of the sequence that leaves a piece: how its tokens in the piece make them.

    The tokens of the piece are, in order, ``before`` of other sequences, ``head`` that end a chunk that an earlier piece began,
    ``whole`` chunks, and ``tail`` of a chunk that stays open.

    Attributes:
        first: index, in the sequence, of the first chunk that closes in the piece.
        closed: how many close.
        open: tokens of the chunk that is open at the end of the piece, those of earlier pieces counted.
        through: that chunk began in an earlier piece: none closes here, and all tokens are ``tail``.
        offset: tokens of the open chunk before the piece.
    """

    before: int
    head: int
    whole: int
    tail: int
    first: int
    closed: int
    open: int
    through: bool
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens ``begin : end`` of the global row.

    Attributes:
        owner: the rank that holds it.
        inward, outward: the sequence that crosses its begin, and its end; None where one begins there.
        fresh: lengths, within the piece, of the sequences that begin in it.
    """

    begin: int
    end: int
    owner: int
    inward: Crossing | None
    outward: Crossing | None
    fresh: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.end - self.begin

    @property
    def continued(self) -> int:
        """Tokens of the sequence that crosses its begin."""
        return 0 if self.inward is None else min(self.inward[1], self.end) - self.begin

    @property
    def past(self) -> int:
        """Tokens of that sequence before the piece."""
        return 0 if self.inward is None else self.begin - self.inward[0]

    def ending(self) -> list[tuple[int, int, int]]:
        """Of each sequence that ends in the piece: its tokens; 0 where it crosses the begin, else 1; its place among those."""
        found = []
        if self.inward is not None and self.continued and self.inward[1] <= self.end:
            found.append((self.inward[1] - self.inward[0], 0, 0))
        inside = len(self.fresh) - (self.outward is not None)
        return found + [(n, 1, j) for j, n in enumerate(self.fresh[: max(inside, 0)])]

    def states(self, chunk_size: int) -> States | None:
        """Of the sequence that crosses its end; None where there is none."""
        if self.outward is None:
            return None
        start = self.outward[0]
        at = max(self.begin, start)
        tokens, offset, first = self.end - at, (at - start) % chunk_size, (at - start) // chunk_size
        still_open = (self.end - start) % chunk_size
        if offset and offset + tokens < chunk_size:
            return States(at - self.begin, 0, 0, tokens, first, 0, still_open, True, offset)
        head = -offset % chunk_size
        whole, tail = divmod(tokens - head, chunk_size)
        return States(at - self.begin, head, whole, tail, first, whole + (head > 0), still_open, False, offset)


class Layout:
    """The pieces of a row of tokens: of W ranks, 2 W, of which rank r holds pieces r and 2 W - 1 - r, in this order.

    Attention costs a piece what lies before it: an early and a late piece together cost every rank the same.
    """

    def __init__(self, world: int, cuts: Sequence[int], cu_seqlens: Sequence[int] | None):
        self.tokens, self.cuts = cuts[-1], tuple(cuts)
        starts = [0, self.tokens] if cu_seqlens is None else sorted(set(cu_seqlens))
        self.starts = starts
        self.longest = max((b - a for a, b in pairwise(starts)), default=0)  # tokens of a sequence
        self.pieces: list[Piece] = []
        crossings = [self._crossing(cut) for cut in cuts]
        for p, (begin, end) in enumerate(pairwise(cuts)):
            inner = [s for s in starts[bisect.bisect_left(starts, begin) : bisect.bisect_left(starts, end)]]
            fresh = tuple(b - a for a, b in pairwise([*inner, end]))
            self.pieces.append(Piece(begin, end, min(p, 2 * world - 1 - p), crossings[p], crossings[p + 1], fresh))

    def _crossing(self, cut: int) -> Crossing | None:
        after = bisect.bisect_right(self.starts, cut)
        if after == 0 or after == len(self.starts) or self.starts[after - 1] == cut:
            return None
        return self.starts[after - 1], self.starts[after]

    def earlier(self, p: int) -> list[int]:
        """Pieces before p that hold tokens of the sequence that crosses its begin."""
        inward = self.pieces[p].inward
        return [] if inward is None else [q for q in range(p) if self.pieces[q].outward == inward and self.pieces[q].tokens]

    def chain(self, p: int, chunk_size: int) -> list[int]:
        """Pieces with tokens of the chunk that the begin of p divides; none where it divides none."""
        inward, begin = self.pieces[p].inward, self.pieces[p].begin
        if inward is None or (begin - inward[0]) % chunk_size == 0:
            return []
        start = begin - (begin - inward[0]) % chunk_size
        return [q for q in self.earlier(p) if self.pieces[q].end > start]
