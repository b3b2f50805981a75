"""Licences that luthier knows by their SPDX identifier; anything else stops a run until a person has looked.

Source: the SPDX licence list (spdx.org/licenses), cut to licences met on data sets and model weights.
This module does not give legal advice and does not know what a licence permits in your case: it makes
sure that one was stated, spelt so that it means one thing, and is written on every card.
"""

from __future__ import annotations

import difflib

KNOWN = (
    *("0BSD", "AFL-3.0", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause"),
    *("BSD-3-Clause", "BSL-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"),
    *("CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0"),
    *("CDLA-Sharing-1.0", "ECL-2.0", "EPL-2.0", "EUPL-1.2", "GFDL-1.3-or-later", "GPL-2.0-only"),
    *("GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "ISC", "LGPL-2.1-or-later", "LGPL-3.0-only"),
    *("LGPL-3.0-or-later", "MIT", "MIT-0", "MPL-2.0", "MS-PL", "ODC-By-1.0", "ODbL-1.0", "OFL-1.1"),
    *("PDDL-1.0", "PSF-2.0", "Unlicense", "WTFPL", "Zlib"),
)
OWN = "LicenseRef-own"  # rows or weights that are yours
HINT = f"state the giver's licence by its SPDX identifier; `{OWN}` for what is your own"
_BY_LOWER = {name.lower(): name for name in (*KNOWN, OWN)}


def spdx(licence: str) -> str | None:
    """The identifier as SPDX spells it (its matching ignores case); None when it is not known here."""
    return _BY_LOWER.get(licence.strip().lower())


def unknown(licence: str) -> str:
    """What to say about a licence that is not known."""
    near = difflib.get_close_matches(licence.lower(), _BY_LOWER, n=1, cutoff=0.5)
    guess = f"; did you mean {_BY_LOWER[near[0]]!r}?" if near else ""
    return f"unknown licence {licence!r}{guess} (known: {', '.join((*KNOWN, OWN))})"


def noncommercial(licence: str) -> bool:
    """True where the licence's own name says that commercial use is not granted."""
    return "-NC-" in licence
