import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.packing import Document, pack, pad, pieces, stack


def document(ids, trained=None):
    return Document(np.array(ids, np.int32), np.ones(len(ids), bool) if trained is None else np.array(trained, bool))


def lists(rows):
    return [{k: v.tolist() for k, v in row.items()} for row in rows]


def test_labels_are_shifted_and_only_of_trained_tokens():
    assert document([5, 6, 7, 8], [1, 0, 1, 1]).labels.tolist() == [-100, 7, 8, -100]
    assert document([]).labels.tolist() == []


def test_pack_by_hand():
    rows = pack([document([1, 2, 3]), document([4, 5, 6, 7, 8]), document([9, 10])], 4, pad_id=0)
    assert lists(rows) == [
        {"input_ids": [1, 2, 3, 4], "labels": [2, 3, -100, 5], "position_ids": [0, 1, 2, 0]},
        {"input_ids": [5, 6, 7, 8], "labels": [6, 7, 8, -100], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [9, 10, 0, 0], "labels": [10, -100, -100, -100], "position_ids": [0, 1, 0, 1]},
    ]


def test_pack_adds_no_padding_to_a_full_last_block():
    assert [row["input_ids"].tolist() for row in pack([document([1, 2]), document([3, 4])], 2, pad_id=0)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("length", [2, 3, 7, 50])
def test_pack_loses_no_trained_token_but_the_first_of_each_document(length):
    rng = np.random.default_rng(length)
    documents = [Document(rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.6) for n in rng.integers(1, 20, 30)]
    expected = [token for d in documents for token, trained in zip(d.ids[1:], d.trained[1:], strict=True) if trained]
    packed = np.concatenate([row["labels"] for row in pack(documents, length, pad_id=0)])
    assert packed[packed != -100].tolist() == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    rng = np.random.default_rng(0)
    documents = [document(rng.integers(1, 50, n)) for n in (5, 9, 2, 11, 7, 8, 3)]
    batch = stack(list(pack(documents, 24, pad_id=0)))
    assert batch["input_ids"].shape == (2, 24)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False).logits
        flat, labels, at = packed.flatten(0, 1), batch["labels"].flatten(), 0
        for doc in documents:
            ids = torch.tensor(doc.ids.tolist())
            # a document cut by the end of the block is two segments, each on its own
            for segment in (ids[: max(0, 24 - at)], ids[max(0, 24 - at) :]) if at < 24 < at + len(ids) else (ids,):
                alone = model(input_ids=segment[None], use_cache=False).logits[0]
                assert (flat[at : at + len(segment)] - alone).abs().max() <= 1e-5
                at += len(segment)
            assert labels[at - len(ids) : at].tolist() == [*ids[1:].tolist(), -100]


def test_a_leak_would_be_seen():
    """The same comparison fails when the positions do not restart: the test above can fail."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        leaky = model(input_ids=ids, position_ids=torch.arange(12)[None], use_cache=False).logits[0, 6:]
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits[0]
    assert (leaky - alone).abs().max() > 1e-3


def test_pieces_keep_the_label_across_the_cut():
    assert lists(pieces(document([1, 2, 3, 4, 5]), 2)) == [
        {"input_ids": [1, 2], "labels": [2, 3]},
        {"input_ids": [3, 4], "labels": [4, 5]},
        {"input_ids": [5], "labels": [-100]},
    ]


def test_pad_on_the_right():
    batch = pad([{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, {"input_ids": [8], "labels": [9]}], 3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["labels"].tolist() == [[6, 7, -100], [9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {v.dtype for v in batch.values()} == {torch.int64}
