"""Numbers as people read them: each with its unit, thousands apart, no more digits than it has earned.

Source: SI brochure, 9th edition (a space between a number and its unit, decimal multiples). A missing
number is a dash, never a zero. This module does not know what it counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

THIN = "\u202f"
NBSP = "\u00a0"
DASH = "–"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
# Control characters and bidirectional overrides can hide or reorder what a reader sees.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def number(value: object) -> float | None:
    """The value as a finite float, or None: a report shows what was measured and invents nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: object) -> str:
    found = number(value)
    return DASH if found is None else f"{found:,.0f}"


def percent(value: object, digits: int = 1) -> str:
    found = number(value)
    return DASH if found is None else f"{found * 100:.{digits}f}{THIN}%"


def interval(low: object, high: object) -> str:
    first, last = number(low), number(high)
    return DASH if first is None or last is None else f"{first * 100:.1f}–{last * 100:.1f}{THIN}%"


def points(value: object) -> str:
    """A difference of two shares, in percentage points, with its sign."""
    found = number(value)
    return DASH if found is None else f"{_sign(found)}{abs(found) * 100:.1f} points"


def signed_percent(value: object) -> str:
    found = number(value)
    return DASH if found is None else f"{_sign(found)}{abs(found) * 100:.1f}{THIN}%"


def _sign(value: float) -> str:
    return "+" if value > 0 else "−" if value < 0 else "±"


def duration(seconds: object) -> str:
    found = number(seconds)
    if found is None or found < 0:
        return DASH
    if found < 0.9995:
        return f"{found * 1000:.{0 if found >= 0.00995 else 1}f}{THIN}ms"
    if found < 59.95:
        return f"{found:.1f}{THIN}s"
    whole = round(found)
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60:02d}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60:02d}{THIN}min"


def size(value: object) -> str:
    """Bytes in decimal multiples: 1 MB is 10⁶ bytes."""
    found = number(value)
    if found is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(found) >= scale:
            digits = 2 if found < 10 * scale else 1 if found < 100 * scale else 0
            return f"{found / scale:.{digits}f}{THIN}{unit}"
    return f"{found:.0f}{THIN}B"


def rate(value: object) -> str:
    found = number(value)
    return DASH if found is None else f"{found:,.{0 if found >= 100 else 1}f}{THIN}tokens/s"


def p_value(value: object) -> str:
    """`p = 0.38`, `p = 3 × 10⁻²⁷`, or `p < 10⁻³⁰⁰` where the arithmetic has underflowed."""
    found = number(value)
    if found is None:
        return f"p{NBSP}{DASH}"
    if found < 1e-300:
        return f"p{NBSP}<{NBSP}10⁻³⁰⁰"
    if found >= 0.001:
        return f"p{NBSP}={NBSP}{found:.{3 if found < 0.0995 else 2}f}"
    digits, exponent = f"{found:.0e}".split("e")
    return f"p{NBSP}={NBSP}{digits}{NBSP}×{NBSP}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def plain(value: object) -> str:
    """Any JSON value as a short text; floats keep four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: DASH}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else DASH
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items()) or DASH
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    return visible(value)


def visible(value: object) -> str:
    """Text from outside with every unseen character spelled out, so that nothing hides or runs backwards."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found.group()):04X}⟩", str(value).replace("\r\n", "\n"))


def clip(text: str, limit: int) -> str:
    """The first `limit` characters, cut at a space where one is near, with a sign that there was more."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    cut = head.rfind(" ", int(limit * 0.8))
    return f"{head[: cut if cut > 0 else limit].rstrip()} …"


def short(digest: object) -> str:
    return digest[:12] if isinstance(digest, str) and digest else DASH


_UNITS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("_flops", lambda value: f"{value / 1e9:,.0f}{THIN}GFLOP/s"),
    ("_bytes_s", lambda value: f"{size(value)}/s"),
    ("_bytes", size),
    ("_gb", lambda value: size(value * 1e9)),
    ("_minutes", lambda value: duration(value * 60)),
    ("_seconds", duration),
    ("_s", duration),
)
_SHARES = ("accuracy", "f1", "low", "high", "precision", "recall", "rate", "share", "drop", "tolerance")


def named(name: str, value: object) -> tuple[str, str]:
    """A fact's label, and its value with the unit that the name tells (`_s`, `_bytes`, `accuracy`, `p`)."""
    label = visible(name).strip("_")
    found = number(value)
    if isinstance(value, dict):
        value = dict(named(str(key), item) for key, item in value.items())
    elif found is not None and not label.endswith("_per_s"):
        for suffix, shown in _UNITS:
            if label.endswith(suffix):
                return label.removesuffix(suffix).replace("_", " "), shown(found)
        if label == "p" or label.startswith("p_"):
            return label[1:].strip("_").replace("_", " "), p_value(value)
        if isinstance(value, float) and label.split("_")[-1] in _SHARES and 0 <= value <= 1:
            return label.replace("_", " "), percent(value)
    elif isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return label.replace("_", " "), short(value)
    return label.replace("_", " "), plain(value)
