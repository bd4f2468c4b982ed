from datasets import Dataset, concatenate_datasets

from distill.data import digest


def test_the_content_counts_not_the_chunks():
    rows = [{"input_ids": [i, i + 1], "labels": [i, -100]} for i in range(10)]
    whole = Dataset.from_list(rows)
    chunked = concatenate_datasets([Dataset.from_list(rows[:3]), Dataset.from_list(rows[3:])])
    chosen = Dataset.from_list([rows[0], *rows]).select(range(1, 11))
    assert digest.of_rows(whole) == digest.of_rows(chunked) == digest.of_rows(chosen)
    for other in (rows[:9], rows[::-1], [{"input_ids": [0], "labels": [0]}, *rows[1:]], [{**rows[0], "labels": [1, -100]}, *rows[1:]]):
        assert digest.of_rows(Dataset.from_list(other)) != digest.of_rows(whole)


def test_valid_positions():
    assert digest.valid_positions(Dataset.from_list([{"labels": [1, -100]}, {"labels": [-100, -100]}, {"labels": [2, 3]}])) == 3


def test_values_are_kept_apart():
    assert digest.of("ab", "c") != digest.of("a", "bc")
    assert digest.of(1) != digest.of("1")
    assert digest.of("ä", 1, None) == digest.of("ä", 1, None)
