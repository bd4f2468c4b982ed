import hashlib
import struct

import numpy as np
import torch

from distill.teachers.store import row_key

IDS, STARTS, VALID = [5, 7, 9, 2], [0, 1, 0, 1], [True, False, True, True]


def test_a_key_is_a_hash_of_tokens_positions_and_labels() -> None:
    data = struct.pack("<2q", 4, 4) + struct.pack("<4q", *IDS) + struct.pack("<4q", *STARTS) + bytes([0b10110000])
    assert row_key(IDS, STARTS, VALID) == hashlib.blake2b(data, digest_size=16).digest()


def test_the_same_content_has_the_same_key() -> None:
    wanted = row_key(IDS, None, VALID)
    assert row_key(np.array(IDS, np.int32), range(4), np.array(VALID)) == wanted
    assert row_key(torch.tensor([*IDS, 0, 0])[:4], torch.arange(4), torch.tensor(VALID)) == wanted


def test_other_content_has_another_key() -> None:
    keys = [
        row_key(IDS, None, VALID),
        row_key([5, 7, 9, 3], None, VALID),
        row_key([5, 7, 2, 9], None, VALID),
        row_key([*IDS, 0], None, VALID),
        row_key(IDS, STARTS, VALID),
        row_key(IDS, None, [True, True, True, True]),
        row_key(IDS, None, [True, False, True]),
        row_key(IDS, None, [True]),
        row_key(IDS, None, [False]),
        row_key([], None, []),
        row_key(IDS, None, VALID, [0, 0, 0, 0]),
        row_key(IDS, None, VALID, [0, 0, 1, 1]),
        row_key(IDS, None, [True], [0]),
        row_key(IDS, None, [True], [1]),
    ]
    assert len(set(keys)) == len(keys)
