"""A table in one test reports every row that is wrong, and no other."""

import pytest
from tables import rows


@rows("factor", [1, 2])
@rows(("given", "doubled"), [(1, 2), (2, 4), (3, 7), (4, 9)])
def doubling(given, doubled, factor, tmp_path):
    assert factor * given * 2 == factor * doubled
    (tmp_path / f"{factor}-{given}").touch()


def test_all_rows_are_run_and_the_bad_ones_told(tmp_path):
    with pytest.raises(
        AssertionError, match=r"(?s)2 of 2 rows:\n1: .*2 of 4 rows:\n\(3, 7\): .*\n\(4, 9\): .*\n2: .*2 of"
    ):
        doubling(tmp_path=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"1-1", "1-2", "2-1", "2-2"}
