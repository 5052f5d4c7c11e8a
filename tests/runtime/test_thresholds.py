"""The strategy table: look-up rules, files written and read, files refused."""

import json

import pytest

from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import thresholds
from arfusion_pass.runtime.thresholds import BUILT_IN, ThresholdError, ThresholdTable


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ARFUSION_THRESHOLDS", raising=False)


def test_built_in_covers_every_supported_world():
    assert thresholds.load() is BUILT_IN
    for world in range(2, 9):
        assert BUILT_IN.oneshot_max_bytes("sm_90", world, 4096) > 0
    assert BUILT_IN.oneshot_max_bytes("sm_90", 16, 4096) == 0


def test_look_up_takes_the_largest_size_not_above():
    table = ThresholdTable(
        {"sm_90": {"4": {"4096": 100, "8192": 200, "*": 300}, "2": {"4096": 10, "8192": 20}}}, "test"
    )
    assert table.oneshot_max_bytes("sm_90", 4, 8192) == 200
    assert table.oneshot_max_bytes("sm_90", 4, 5120) == 100
    assert table.oneshot_max_bytes("sm_90", 4, 2048) == 300, "any hidden size counts as size 0"
    assert table.oneshot_max_bytes("sm_90", 2, 5120) == 10
    assert table.oneshot_max_bytes("sm_90", 2, 1024) == 10, "below the smallest: the smallest"
    assert table.oneshot_max_bytes("sm_90", 2, 16384) == 20
    assert table.oneshot_max_bytes("sm_100", 2, 4096) == BUILT_IN.oneshot_max_bytes("sm_100", 2, 4096)
    assert table.by_hidden("sm_90", 4) == [(0, 300), (4096, 100), (8192, 200)]


def test_sharded_has_its_own_rows():
    assert BUILT_IN.sharded_min_bytes("sm_90", 2, 1024) == thresholds.NEVER, "not measured"
    assert BUILT_IN.sharded_min_bytes("sm_90", 2, 5120) == BUILT_IN.sharded_min_bytes("sm_90", 2, 4096) == 2 << 20
    assert BUILT_IN.sharded_min_bytes("sm_90", 4, 4096) == thresholds.NEVER, "no row"
    table = BUILT_IN.with_sharded("sm_90", 4, 7168, 77)
    table.save(thresholds.tuned_path())
    loaded = thresholds.load()
    assert loaded.sharded_min_bytes("sm_90", 4, 8192) == 77
    assert loaded.sharded_by_hidden("sm_90", 2) == BUILT_IN.sharded_by_hidden("sm_90", 2)


def test_a_file_without_sharded_rows_keeps_the_built_in_ones():
    document = {"version": 1, "oneshot_max_bytes": {"sm_90": {"2": {"*": 5}}}}
    thresholds.tuned_path().write_text(json.dumps(document))
    assert thresholds.load().sharded_min_bytes("sm_90", 2, 7168) == BUILT_IN.sharded_min_bytes("sm_90", 2, 7168)


def test_save_and_load(tmp_path):
    table = BUILT_IN.with_measurement("sm_90", 4, 7168, 12345)
    table.save(thresholds.tuned_path())
    loaded = thresholds.load()
    assert loaded.oneshot_max_bytes("sm_90", 4, 7168) == 12345
    assert loaded.source == str(tmp_path / "thresholds.json")
    assert BUILT_IN.oneshot_max_bytes("sm_90", 4, 7168) != 12345, "the built-in table is not written to"


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"version": 99, "oneshot_max_bytes": {}},
        {"version": 1},
        {"version": 1, "oneshot_max_bytes": {"sm_90": {"1": {"*": 5}}}},
        {"version": 1, "oneshot_max_bytes": {"sm_90": {"2": {"*": -5}}}},
        {"version": 1, "oneshot_max_bytes": {"sm_90": {"2": {"wide": 5}}}},
        {"version": 1, "oneshot_max_bytes": {"sm_90": {"2": {}}}},
        {
            "version": 1,
            "oneshot_max_bytes": {"sm_90": {"2": {"*": 5}}},
            "sharded_min_bytes": {"sm_90": {"2": {"*": -5}}},
        },
    ],
)
def test_a_bad_file_is_named_in_the_error(document, tmp_path):
    thresholds.tuned_path().write_text(json.dumps(document))
    with pytest.raises(ThresholdError, match=r"thresholds\.json"):
        thresholds.load()


def test_a_named_file_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("ARFUSION_THRESHOLDS", str(tmp_path / "none.json"))
    with pytest.raises(ThresholdError, match=r"none\.json"):
        thresholds.load()


def test_strategies_follow_the_kernels_rule():
    """From how many tokens each strategy is taken; forced, absent and sharded ones included (``make_plan``)."""
    table = ThresholdTable({"sm_90": {"4": {"*": 1 << 20}, "2": {"*": thresholds.ALWAYS}, "8": {"*": 100}}}, "test")
    marks = int(Flags.RESIDUAL_IN_SHARDED)

    def rows(world: int, flags: int = 0, hidden: int = 4096) -> tuple[tuple[int, str], ...]:
        return table.strategies("sm_90", world, hidden, 2, flags)

    assert rows(4) == ((1, "oneshot"), (129, "twoshot"))
    assert rows(2) == ((1, "oneshot"),), "at every size"
    assert rows(8) == ((1, "twoshot"),), "not even one row"
    assert rows(4, int(Flags.ONESHOT) | marks) == ((1, "oneshot"),)
    assert rows(4, int(Flags.TWOSHOT)) == ((1, "twoshot"),)
    assert rows(4, marks) == rows(4), "a mark alone shards nothing until the table says so"
    assert rows(4, int(Flags.SHARDED)) == rows(4), "outside of a chain there is nothing to shard"
    assert rows(4, int(Flags.SHARDED) | marks) == ((1, "sharded"),)
    table = table.with_sharded("sm_90", 4, None, (4 << 20) - 1)
    assert rows(4, marks) == ((1, "oneshot"), (129, "twoshot"), (512, "sharded"))
    assert rows(4, marks, hidden=16384) == ((1, "oneshot"), (33, "twoshot")), "rows too wide for the table"
    table = table.with_sharded("sm_90", 4, None, 1)
    assert rows(4, marks) == ((1, "sharded"),)
