"""How much two texts overlap: the published measures, each by its own definition, over one kind of word.

Sources: BLEU, Papineni et al. 2002 (ACL P02-1040), for one sentence smoothed as in Lin & Och 2004 (ORANGE:
one is added above and below for n > 1); GLEU, Wu et al. 2016 (arXiv 1609.08144, section 5.2); METEOR,
Banerjee & Lavie 2005 (ACL W05-0909), its module of equal words alone; ROUGE-N and ROUGE-L, Lin 2004 (ACL
W04-1013), as F1; the longest common subsequence by bits, Hyyrö 2004; fuzzy match is 2·LCS / (|a| + |b|)
over characters, what rapidfuzz calls `ratio`; cosine is that of word counts (Salton et al. 1975), not of
embeddings.

A word is a run of letters and digits; for BLEU and GLEU every other printed sign is a word too, and case
counts there. Writing without spaces is not split. All give 0 to 1, and 0 where a text has no word, unless
both have none. It knows no stems, no synonyms and no second reference.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

LONGEST = 20_000  # signs or words of each side that a longest common subsequence looks at
_WORD = re.compile(r"\w+")
_SIGN = re.compile(r"\w+|[^\w\s]")
MOST = 4  # the longest n-gram of BLEU and GLEU


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def signs(text: str) -> list[str]:
    return _SIGN.findall(text)


def grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


def lcs(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence: one row of the table as the bits of one number.

    Time and memory grow with the square of the lengths, so only so much of each is compared.
    """
    a, b = a[:LONGEST], b[:LONGEST]
    places: dict[Hashable, int] = {}
    for at, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << at
    whole = (1 << len(a)) - 1
    row = whole
    for token in b:
        hit = row & places.get(token, 0)
        row = (row + hit | row - hit) & whole
    return len(a) - row.bit_count()


def fuzzy_match(said: str, wanted: str) -> float:
    said, wanted = said[:LONGEST], wanted[:LONGEST]
    return 2 * lcs(said, wanted) / (len(said) + len(wanted)) if said or wanted else 1.0


def bleu(said: str, wanted: str) -> float:
    a, b = signs(said), signs(wanted)
    if not a or not b:
        return float(a == b)
    logs = 0.0
    for n in range(1, MOST + 1):
        found, total = (grams(a, n) & grams(b, n)).total(), max(0, len(a) - n + 1)
        if n > 1:
            found, total = found + 1, total + 1
        if not found:
            return 0.0
        logs += math.log(found / total)
    return min(1.0, math.exp(min(0.0, 1 - len(b) / len(a)) + logs / MOST))


def gleu(said: str, wanted: str) -> float:
    a, b = signs(said), signs(wanted)
    if not a or not b:
        return float(a == b)
    found = sum((grams(a, n) & grams(b, n)).total() for n in range(1, MOST + 1))
    most = max(sum(grams(tokens, n).total() for n in range(1, MOST + 1)) for tokens in (a, b))
    return found / most


def meteor(said: str, wanted: str) -> float:
    """Harmonic mean with recall nine times as heavy, less a penalty for matches in many pieces.

    Each word is matched where it goes on from the match before it, else at its first free place.
    """
    a, b = words(said), words(wanted)
    if not a or not b:
        return float(a == b)
    free: dict[str, list[int]] = {}
    for at, word in enumerate(b):
        free.setdefault(word, []).append(at)
    matches, chunks, last = 0, 0, -2
    for word in a:
        places = free.get(word)
        if not places:
            last = -2
            continue
        at = last + 1 if last + 1 in places else places[0]
        places.remove(at)
        matches, chunks, last = matches + 1, chunks + (at != last + 1), at
    if not matches:
        return 0.0
    precision, recall = matches / len(a), matches / len(b)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / matches) ** 3)


def cosine(said: str, wanted: str) -> float:
    a, b = Counter(words(said)), Counter(words(wanted))
    if not a or not b:
        return float(a == b)
    dot = sum(count * b[word] for word, count in a.items())
    return min(1.0, dot / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values())))


def rouge(n: int) -> Callable[[str, str], float]:
    """ROUGE-n as F1."""

    def measure(said: str, wanted: str) -> float:
        a, b = grams(words(said), n), grams(words(wanted), n)
        return _f1((a & b).total(), a.total(), b.total(), said, wanted)

    return measure


def rouge_l(said: str, wanted: str) -> float:
    a, b = words(said), words(wanted)
    return _f1(lcs(a, b), len(a), len(b), said, wanted)


def _f1(found: int, claimed: int, present: int, said: str, wanted: str) -> float:
    """F1 of what was found; texts too short to have a part of that length are equal or not."""
    if not claimed and not present:
        return float(words(said) == words(wanted))
    return 2 * found / (claimed + present)


MEASURES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match, "bleu": bleu, "gleu": gleu, "meteor": meteor, "cosine": cosine,
    **{f"rouge_{n}": rouge(n) for n in range(1, 6)}, "rouge_l": rouge_l,
}  # fmt: skip
