"""A teacher's targets on disk: written once by `cache`, read at random by the content of a row. Numpy only; nothing here runs a model.

    folder/
      order.bin             the classes by falling frequency, so that frequent ones cost fewer bits; written first
      header.json           what the targets are of; both by one process (`create`)
      shard-00000.bin       rows [0, R), R = header.rows_per_shard (`write_shard`)
      shard-00000.json      its manifest, written last: a shard without a valid one does not exist (`finished_shards`)
      finished.json         written when all shards are there (`finish`)

Every file is written beside its place, synced and renamed. Each JSON file carries a hash of itself, each manifest the
sha256 of its shard and the identity of the store.
"""

from distill.teachers.store.header import Header, create, finish, finished, read_header
from distill.teachers.store.reader import Store, verify
from distill.teachers.store.row import StoredRow, row_key
from distill.teachers.store.shard import Manifest, finished_shards, write_shard

__all__ = [
    "Header",
    "Manifest",
    "Store",
    "StoredRow",
    "create",
    "finish",
    "finished",
    "finished_shards",
    "read_header",
    "row_key",
    "verify",
    "write_shard",
]
