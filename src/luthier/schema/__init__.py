"""The store's schema: one file a room of tables, each with its migration; here they are put in order.

This package does not know who calls it, when to migrate, or how to lock.
"""

from __future__ import annotations

from luthier.schema import jobs, keys, quotas, runs, splits, uploads
from luthier.schema.core import Migration

MIGRATIONS: tuple[Migration, ...] = (
    runs.MIGRATION, keys.MIGRATION, uploads.MIGRATION, jobs.MIGRATION, splits.MIGRATION,
    quotas.MIGRATION,
)  # fmt: skip
