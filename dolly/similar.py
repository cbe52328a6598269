"""Near-duplicates among texts: MinHash over shingles of four words, and the Jaccard similarity of what it finds.

Two texts are near-duplicates when more than `SAME` of the shingles that occur in either occur in both. MinHash (Broder
1997) with banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) proposes pairs: 99.6 % of those
at 0.4, more above it; the exact similarity decides. All of it is arithmetic on arrays: a million records of 900
characters take about a minute.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

SAME = 0.4  # Jaccard similarity above which two texts are near-duplicates
WORDS = 4  # of a shingle
BANDS, ROWS = 32, 2  # a pair of similarity s is proposed with probability 1 - (1 - s**ROWS)**BANDS
NEIGHBOURS = 3  # texts before it in a band that a text is compared to: all pairs of n alike ones would be n**2
PART = 2**20  # characters that are worked on at once
AGREE = 16  # of the 64 minima must agree, or the pair is not looked at: a pair at 0.4 has 14 in one case of 300

_NONE = np.empty(0, dtype=np.uint64)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_MIX, _STEP = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_FACTORS = np.random.default_rng(0).integers(2**63, size=(BANDS * ROWS, 2), dtype=np.uint64) * 2 + 1

# Letters and digits of ASCII, and all bytes of other characters; punctuation beyond ASCII is taken out apart.
_IN_WORD = np.array([chr(byte).isalnum() if byte < 128 else True for byte in range(256)])


class Sketches:
    """What is kept of each text: its shingles, 4 bytes each, and, to find pairs, 64 minima of them."""

    def __init__(self, minima: bool = True):
        self.with_minima = minima
        self.lengths: list[np.ndarray] = []  # shingles of each text
        self.shingles: list[np.ndarray] = []  # ascending in each text
        self.minima: list[np.ndarray] = []  # [texts, BANDS * ROWS]

    def add(self, texts: Iterable[str]) -> None:
        part, size = [], 0
        for text in texts:
            part.append(text)
            size += len(text)
            if size > PART:
                self._add(part)
                part, size = [], 0
        if part:
            self._add(part)

    def _add(self, texts: list[str]) -> None:
        pieces = [
            (number, text[at : at + PART]) for number, text in enumerate(texts) for at in range(0, len(text), PART)
        ]
        keys = np.concatenate([_keys(*zip(*part, strict=True)) for part in _of_size(pieces)] or [_NONE])
        keys = np.sort(keys)
        keys = keys[np.diff(keys, prepend=keys[:1] - np.uint64(1)) > 0]  # np.unique takes ten times as long
        owners, shingles = (keys >> np.uint64(32)).astype(np.int64), keys & np.uint64(0xFFFFFFFF)
        lengths = np.bincount(owners, minlength=len(texts))
        self.lengths.append(lengths)
        self.shingles.append(shingles.astype(np.uint32))
        if self.with_minima:
            self.minima.append(_minima(lengths, shingles))

    def similarities(self, pairs: np.ndarray) -> np.ndarray:
        """The Jaccard similarities of pairs of texts, [pairs, 2] -> [pairs]; 1 for two without words."""
        if not len(pairs):
            return np.empty(0)
        lengths, shingles = np.concatenate(self.lengths), np.concatenate(self.shingles)
        return _similarities(pairs, lengths, shingles)

    def pairs(self, also: Callable[[np.ndarray], np.ndarray] = lambda pairs: np.ones(len(pairs), bool)) -> np.ndarray:
        """Near-duplicates as pairs of indices of texts, [pairs, 2], each of the lower and the higher one.

        Of texts that are all alike not every pair is given, but enough to connect them. also: which of some pairs,
        [pairs, 2] -> [pairs], are near-duplicates by another measure too.
        """
        if not self.lengths:
            return np.empty((0, 2), dtype=np.int64)
        lengths, shingles, minima = map(np.concatenate, (self.lengths, self.shingles, self.minima))
        root, found = np.arange(len(lengths)), []
        for band in range(BANDS):
            keys = minima[:, ROWS * band].astype(np.uint64) << np.uint64(32) | minima[:, ROWS * band + 1]
            order = np.argsort(keys, kind="stable")
            order = order[lengths[order] > 0]
            for lag in range(1, NEIGHBOURS + 1):
                low, high = order[:-lag], order[lag:]
                new = (keys[low] == keys[high]) & (root[low] != root[high])
                pairs = np.stack([low[new], high[new]], 1)
                agree = [(minima[a] == minima[b]).sum(1) >= AGREE for a, b in _parts(pairs)]
                pairs = pairs[np.concatenate(agree)] if agree else pairs
                pairs = pairs[_similarities(pairs, lengths, shingles) > SAME]
                pairs = pairs[also(pairs)]
                found.append(pairs)
                root = _joined(root, pairs)
        return np.concatenate(found)


def _joined(root: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The lowest text that each is connected to, after more pairs."""
    root = root.copy()
    for a, b in pairs.tolist():
        while root[a] != a:
            a = root[a]
        while root[b] != b:
            b = root[b]
        root[max(a, b)] = min(a, b)
    while (further := root[root]).tobytes() != root.tobytes():
        root = further
    return root


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` things the lowest one that pairs connect it to, itself where there is none."""
    lowest = list(range(count))

    def root(at: int) -> int:
        while lowest[at] != at:
            lowest[at] = at = lowest[lowest[at]]
        return at

    for a, b in pairs:
        a, b = sorted((root(a), root(b)))
        lowest[b] = a
    return [root(at) for at in range(count)]


def _parts(pairs: np.ndarray, size: int = 2**16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for at in range(0, len(pairs), size):
        yield pairs[at : at + size, 0], pairs[at : at + size, 1]


def _of_size(pieces: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The pieces in runs of about `PART` characters."""
    part, size = [], 0
    for piece in pieces:
        part.append(piece)
        size += len(piece[1])
        if size > PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _keys(numbers: tuple[int, ...], pieces: tuple[str, ...]) -> np.ndarray:
    """The shingles of pieces of texts, each with the number of its text in the upper 32 bits."""
    shingles, owners = _shingles(list(pieces))
    return np.array(numbers, dtype=np.uint64)[owners] << np.uint64(32) | shingles


def _minima(lengths: np.ndarray, shingles: np.ndarray) -> np.ndarray:
    minima = np.full((len(lengths), BANDS * ROWS), 0xFFFFFFFF, dtype=np.uint32)
    if len(shingles):
        filled = lengths.nonzero()[0]
        starts = (lengths.cumsum() - lengths)[filled]
        for column, (factor, more) in enumerate(_FACTORS):
            minima[filled, column] = np.minimum.reduceat(shingles * factor + more, starts) >> np.uint64(32)
    return minima


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the shingles of all texts, 32 bits in uint64, and whose they are. A shorter text is one shingle."""
    words, owners = _words(texts)
    if not len(words):
        return words, owners
    count = np.bincount(owners, minlength=len(texts))
    place = np.arange(len(words)) - (count.cumsum() - count)[owners]  # of the word in its text
    begins = (place + WORDS <= count[owners]) | (place == 0)
    padded = np.concatenate([words, np.zeros(WORDS - 1, dtype=np.uint64)])
    hashes = words
    for further in range(1, WORDS):
        inside = place + further < count[owners]
        hashes = hashes * _STEP + np.where(inside, padded[further : further + len(words)], np.uint64(0))
    return _mixed(hashes[begins]) >> np.uint64(32), owners[begins]


def _words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each word of the texts in lower case and the number of its text.

    A word is a run of letters and digits; each character of a script without spaces is one.
    """
    encoded = [text.lower().encode(errors="replace") for text in texts]
    data = np.frombuffer(b"\n".join(encoded) + b"\n", dtype=np.uint8)
    in_word = _IN_WORD[data]
    for lead, length in ((0xC2, 2), (0xE2, 3)):  # signs such as a no-break space, and general punctuation
        at = (data == lead).nonzero()[0]
        for further in range(length):
            in_word[at + further] = False
    ideograph = (data >= 0xE3) & (data <= 0xED)
    before = np.concatenate([[False], in_word[:-1]])
    starts = (in_word & (~before | ideograph)).nonzero()[0]
    ends = np.append(starts[1:], len(data))  # the next start, or what ends the word before it
    breaks = (~in_word).nonzero()[0]
    if len(starts):
        ends = np.minimum(ends, breaks[np.searchsorted(breaks, starts)])
    powers = np.cumprod(np.full(len(data), _BASE))
    sums = np.concatenate([[np.uint64(0)], np.cumsum(data.astype(np.uint64) * powers)])
    inverse = np.cumprod(np.full(len(data), _INVERSE))
    hashes = _mixed((sums[ends] - sums[starts]) * inverse[starts])
    borders = np.cumsum([len(text) + 1 for text in encoded])
    return hashes, np.searchsorted(borders, starts, side="right")


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint64(33))) * _MIX
    x = (x ^ (x >> np.uint64(33))) * _STEP
    return x ^ (x >> np.uint64(33))


def _similarities(pairs: np.ndarray, lengths: np.ndarray, shingles: np.ndarray) -> np.ndarray:
    """The Jaccard similarities of pairs of texts, some of which are worked on at once."""
    starts = lengths.cumsum() - lengths
    work = (lengths[pairs].sum(1) + 1).cumsum()
    borders = np.searchsorted(work, np.arange(PART, work[-1] if len(work) else 0, PART))
    parts = [
        _jaccard(part[:, 0], part[:, 1], shingles, starts, lengths) for part in np.split(pairs, np.unique(borders))
    ]
    return np.concatenate(parts)


def _jaccard(a: np.ndarray, b: np.ndarray, shingles: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The Jaccard similarities of the texts `a` and `b`, pair by pair."""
    texts, pair = np.concatenate([a, b]), np.concatenate([np.arange(len(a))] * 2)
    size = lengths[texts]
    offset = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
    found = shingles[np.repeat(starts[texts], size) + offset].astype(np.uint64)
    keys = np.sort(np.repeat(pair, size).astype(np.uint64) << np.uint64(32) | found)
    twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
    both = np.bincount(twice.astype(np.int64), minlength=len(a))
    either = lengths[a] + lengths[b] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
