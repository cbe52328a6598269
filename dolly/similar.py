"""Near-duplicates among texts: MinHash over shingles of four words, and the Jaccard similarity of what it finds.

Two texts are near-duplicates when more than `SAME` of the shingles that occur in either occur in both. MinHash (Broder
1997) with banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) proposes pairs: 99.6 % of those
at 0.4, more above it; the exact similarity decides. All of it is arithmetic on arrays: a million records of 900
characters take about a minute.

A text may have parts: question, context, answer, question ... Then contexts and answers have to be alike too, since
neither several questions about one text nor one question about several texts are duplicates.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SAME = 0.4  # Jaccard similarity above which two texts are near-duplicates
WORDS = 4  # of a shingle
PARTS = 3  # kinds of parts of a text: question, context and answer; a shingle has that of its part in the lower bits
BANDS, ROWS = 32, 2  # a pair of similarity s is proposed with probability 1 - (1 - s**ROWS)**BANDS
NEIGHBOURS = 3  # texts before it in a band that a text is compared to: all pairs of n alike ones would be n**2
PART = 2**20  # characters that are worked on at once
AGREE = 16  # of the 64 minima must agree, or the pair is not looked at: a pair at 0.4 has 14 in one case of 300

_NONE, _PART = np.empty(0, dtype=np.uint64), np.uint64(3)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_MIX, _STEP = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_FACTORS = np.random.default_rng(0).integers(2**63, size=(BANDS * ROWS, 2), dtype=np.uint64) * 2 + 1

# Letters and digits of ASCII, and all bytes of other characters; punctuation beyond ASCII is taken out apart.
_IN_WORD = np.array([chr(byte).isalnum() if byte < 128 else True for byte in range(256)])


class Sketches:
    """What is kept of each text: its shingles, 4 bytes each, and, to find pairs, 64 minima of them."""

    def __init__(self):
        self.lengths: list[np.ndarray] = []  # shingles of each text
        self.shingles: list[np.ndarray] = []  # ascending in each text
        self.minima: list[np.ndarray] = []  # [texts, BANDS * ROWS]

    def add(self, texts: Iterable[Sequence[str]]) -> None:
        """texts: each as its parts; the part at `i` is of kind `i % PARTS`."""
        some, size = [], 0
        for text in texts:
            some.append(text)
            size += sum(map(len, text))
            if size > PART:
                self._add(some)
                some, size = [], 0
        if some:
            self._add(some)

    def _add(self, texts: list[Sequence[str]]) -> None:
        pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
        keys = np.concatenate([_keys(*zip(*some, strict=True)) for some in _of_size(pieces)] or [_NONE])
        keys = np.sort(keys)
        keys = keys[np.diff(keys, prepend=keys[:1] - np.uint64(1)) > 0]  # np.unique takes ten times as long
        owners, shingles = (keys >> np.uint64(32)).astype(np.int64), keys & np.uint64(0xFFFFFFFF)
        lengths = np.bincount(owners, minlength=len(texts))
        self.lengths.append(lengths)
        self.shingles.append(shingles.astype(np.uint32))
        self.minima.append(_minima(lengths, shingles))

    def similarities(self, pairs: np.ndarray) -> np.ndarray:
        """The least Jaccard similarity, of the wholes, contexts and answers, of pairs of texts, [pairs, 2] -> [pairs].

        Where both have no word they are alike.
        """
        return _similarities(pairs, np.concatenate(self.lengths), np.concatenate(self.shingles))

    def pairs(self) -> np.ndarray:
        """Near-duplicates as pairs of indices of texts, [pairs, 2], each of the lower and the higher one.

        Of texts that are all alike not every pair is given, but enough to connect them.
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


def _pieces(text: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """The text as (kind of part, string), one longer than `PART` in several pieces."""
    if sum(map(len, text)) <= PART:
        yield [(at % PARTS, string) for at, string in enumerate(text)]
        return
    for at, string in enumerate(text):
        for start in range(0, len(string), PART):
            yield [(at % PARTS, string[start : start + PART])]


def _of_size(pieces: list[tuple[int, list]]) -> Iterator[list[tuple[int, list]]]:
    """The pieces in runs of about `PART` characters."""
    some, size = [], 0
    for piece in pieces:
        some.append(piece)
        size += sum(len(string) for _, string in piece[1])
        if size > PART:
            yield some
            some, size = [], 0
    if some:
        yield some


def _keys(numbers: tuple[int, ...], pieces: tuple[list[tuple[int, str]], ...]) -> np.ndarray:
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


def _shingles(pieces: list[list[tuple[int, str]]]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the shingles of all pieces, 32 bits in uint64, and whose they are. A short part is one shingle."""
    kinds = np.array([kind for piece in pieces for kind, _ in piece], dtype=np.uint64)
    words, strings = _words([string for piece in pieces for _, string in piece])
    if not len(words):
        return words, strings
    count = np.bincount(strings, minlength=len(kinds))
    place = np.arange(len(words)) - (count.cumsum() - count)[strings]  # of the word in its part
    left = count[strings] - place
    begins = (left >= WORDS) | (place == 0)
    padded = np.concatenate([words, np.zeros(WORDS - 1, dtype=np.uint64)])
    hashes = words
    for further in range(1, WORDS):
        hashes = hashes * _STEP + np.where(left > further, padded[further : further + len(words)], np.uint64(0))
    strings = strings[begins]
    owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return _mixed(hashes[begins]) >> np.uint64(32) & ~_PART | kinds[strings], owners[strings]


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
    """What `Sketches.similarities` tells, some pairs at a time."""
    if not len(pairs):
        return np.empty(0)
    starts = lengths.cumsum() - lengths
    work = (lengths[pairs].sum(1) + 1).cumsum()
    borders = np.searchsorted(work, np.arange(PART, work[-1], PART))
    some = np.split(pairs, np.unique(borders))
    return np.concatenate([_jaccard(part[:, 0], part[:, 1], shingles, starts, lengths) for part in some])


def _jaccard(a: np.ndarray, b: np.ndarray, shingles: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The least Jaccard similarity, of the wholes, contexts and answers, of the texts `a` and `b`, pair by pair."""
    texts, pair = np.concatenate([a, b]), np.concatenate([np.arange(len(a))] * 2)
    size = lengths[texts]
    offset = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
    found = shingles[np.repeat(starts[texts], size) + offset].astype(np.uint64)
    keys = np.sort(np.repeat(pair, size).astype(np.uint64) << np.uint64(32) | found)
    both = _counted(keys[1:][keys[1:] == keys[:-1]], len(a))
    either = _counted(keys, len(a)) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0).min(1)


def _counted(keys: np.ndarray, pairs: int) -> np.ndarray:
    """How many keys each pair has in all, in contexts and in answers, [pairs, 3]."""
    cells = (keys >> np.uint64(32)) * np.uint64(PARTS) + (keys & _PART)
    counts = np.bincount(cells.astype(np.int64), minlength=PARTS * pairs).reshape(pairs, PARTS)
    return np.column_stack([counts.sum(1), counts[:, 1:]])
