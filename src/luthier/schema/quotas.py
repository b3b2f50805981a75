"""What else a key may spend: columns of `keys` that came later, tokens a month and requests at once.

This module does not know how either is counted; the table itself stands in `schema.keys`.
"""

from __future__ import annotations

from luthier.schema.core import Migration

MIGRATION = Migration(
    number=6,
    title="tokens a month and requests at once of a key",
    common=(
        "ALTER TABLE keys ADD COLUMN tokens_per_month BIGINT CHECK (tokens_per_month > 0)",
        "ALTER TABLE keys ADD COLUMN concurrent_requests INTEGER CHECK (concurrent_requests > 0)",
    ),
)
