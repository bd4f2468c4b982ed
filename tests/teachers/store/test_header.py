from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from distill.teachers.store import create, finish, finished, finished_shards, read_header, record
from distill.teachers.store.header import HEADER, ORDER, read_order
from distill.types import ConfigError, DataError
from tests.teachers.store.rows import header, write

COUNTS = np.array([3, 0, 9, 9] + [1] * 46)


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    ours = header(hidden={"layers.1": 8}, config={"num_hidden_layers": 2}, described={"parameters": 7})
    create(tmp_path / "new" / "store", ours, COUNTS)
    assert read_header(tmp_path / "new" / "store") == ours
    assert read_order(tmp_path / "new" / "store").tolist() == [2, 3, 0, *range(4, 50), 1]


def test_rows_are_cut_into_shards() -> None:
    ours = header(rows=7, rows_per_shard=3)
    assert ours.num_shards == 3
    assert [list(ours.rows_of(i)) for i in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert header(rows=6, rows_per_shard=3).num_shards == 2


@pytest.mark.parametrize("field", [{"teacher": "other"}, {"temperature": 2.0}, {"tokenizer": "77"}, {"data": "99"}, {"hidden": {"a": 1}}])
def test_another_store_is_refused_with_the_two_values(field: dict[str, object], tmp_path: Path) -> None:
    create(tmp_path, header(), COUNTS)
    ((name, value),) = field.items()
    with pytest.raises(ConfigError) as caught:
        create(tmp_path, replace(header(), **field), COUNTS)  # type: ignore[arg-type]
    assert f"{name}={getattr(header(), name)!r}" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert read_header(tmp_path) == header()


def test_of_a_whole_configuration_the_value_that_differs_is_named(tmp_path: Path) -> None:
    ours = header(config={"layers": 2, "rope": {"theta": 1.0, "type": "a"}})
    with pytest.raises(ConfigError, match=r"made with config\.rope\.theta=1\.0, but 2\.0 is wanted"):
        ours.refuse_other({"config": {"layers": 2, "rope": {"theta": 2.0, "type": "a"}}}, tmp_path)


def test_only_what_is_expected_is_compared(tmp_path: Path) -> None:
    header().refuse_other({}, tmp_path)
    header().refuse_other({"k": 5, "bits": 8}, tmp_path)
    with pytest.raises(ConfigError, match="k=5, but 6 is wanted"):
        header().refuse_other({"bits": 16, "k": 6}, tmp_path)  # k comes first


def test_a_store_is_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path, header(), range(1))
    create(tmp_path, header(), np.zeros(50))
    assert list(finished_shards(tmp_path)) == [0]
    assert read_order(tmp_path).tolist() == list(range(49, -1, -1)), "the order is that of the first time"


@pytest.mark.parametrize("name", [HEADER, ORDER])
@pytest.mark.parametrize("content", [None, b"", b"half of"])
def test_what_is_damaged_is_written_again_and_shards_stay_where_they_still_fit(name: str, content: bytes | None, tmp_path: Path) -> None:
    write(tmp_path, header(), range(1))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError):
        finished_shards(tmp_path)
    create(tmp_path, header(), np.arange(50))
    assert list(finished_shards(tmp_path)) == [0]
    (tmp_path / name).unlink()
    create(tmp_path, header(), np.zeros(50))
    assert list(finished_shards(tmp_path)) == [], "in another order its classes would be others"


def test_another_version_is_refused(tmp_path: Path) -> None:
    create(tmp_path, header(), COUNTS)
    record.write_record(tmp_path / HEADER, {"version": 99})
    with pytest.raises(ConfigError, match="version 99"):
        read_header(tmp_path)
    with pytest.raises(ConfigError, match="version 99"):
        create(tmp_path, header(), COUNTS)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.py cache"):
        read_header(tmp_path / "nowhere")


def test_a_store_says_that_it_is_finished(tmp_path: Path) -> None:
    create(tmp_path, header(), COUNTS)
    assert finished(tmp_path) is None
    finish(tmp_path, {"val/loss": 2.25})
    assert finished(tmp_path) == {"val/loss": 2.25}
    record.write_record(tmp_path / HEADER, asdict(header(k=6)))
    assert finished(tmp_path) is None, "that was said of another"
    record.write_record(tmp_path / HEADER, asdict(header()))
    (tmp_path / "finished.json").write_text("{")
    assert finished(tmp_path) is None
