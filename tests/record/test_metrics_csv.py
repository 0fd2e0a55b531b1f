import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meshformer.record.metrics_csv import COLUMNS, MetricsCsv, read_metrics


def lines(path):
    return path.read_text().splitlines()


def test_one_row_a_step_and_validation_joins_its_step(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    table.row(10, epoch=0, samples=80, **{"train/loss": 2.5})
    table.row(10, **{"val/loss": 2.25})
    table.row(20, epoch=0, samples=160, **{"train/loss": 2.0})
    table.close()
    assert lines(path)[0] == ",".join(COLUMNS)
    assert lines(path)[1:] == ["10,0,80,2.5,,,,2.25", "20,0,160,2.0,,,,"]
    assert read_metrics(path)[0] == {"step": 10, "epoch": 0, "samples": 80, "train/loss": 2.5, "val/loss": 2.25}


def test_full_precision_survives(tmp_path):
    path = tmp_path / "metrics.csv"
    value = 1 / 3
    table = MetricsCsv(path)
    table.row(1, **{"train/loss": value, "train/lr": np.float64(value), "val/loss": float("nan")})
    table.close()
    (row,) = read_metrics(path)
    assert row["train/loss"] == value and row["train/lr"] == value and math.isnan(row["val/loss"])


def test_flush_puts_the_open_row_on_disk_and_later_values_still_join_it(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    table.row(1, **{"train/loss": 3.0})
    table.row(2, **{"train/loss": 2.123456789012345})
    table.flush()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    table.row(2, **{"train/loss": 2.0, "val/loss": 1.0})  # shorter than what it replaces
    table.flush()
    assert lines(path)[1:] == ["1,,,3.0,,,,", "2,,,2.0,,,,1.0"]
    table.row(3, **{"train/loss": 1.5})
    table.flush()
    assert lines(path)[1:] == ["1,,,3.0,,,,", "2,,,2.0,,,,1.0", "3,,,1.5,,,,"]


@pytest.mark.parametrize("flushed", [False, True])
def test_a_new_column_widens_the_file_and_keeps_every_row(tmp_path, flushed):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    table.row(1, **{"train/loss": 3.0})
    table.row(2, **{"train/loss": 2.0})
    if flushed:
        table.flush()
    table.row(2, mfu=0.5)
    table.row(3, other=1)
    table.close()
    assert lines(path)[0] == ",".join([*COLUMNS, "mfu", "other"])
    assert read_metrics(path) == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0, "mfu": 0.5}, {"step": 3, "other": 1.0}]


@pytest.mark.parametrize("checkpoint", [10, 12])
def test_resume_drops_later_rows_and_appends(tmp_path, checkpoint):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    for step in (5, 10, 15, 20):
        table.row(step, **{"train/loss": 1 / step})
    table.close()
    resumed = MetricsCsv(path)
    resumed.truncate_after(checkpoint)
    resumed.row(10, **{"val/loss": 9.0})
    resumed.row(15, **{"train/loss": 7.0})
    resumed.close()
    assert read_metrics(path) == [
        {"step": 5, "train/loss": 0.2},
        {"step": 10, "train/loss": 0.1, "val/loss": 9.0},
        {"step": 15, "train/loss": 7.0},
    ]


def test_resume_before_the_first_row_leaves_the_header(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    table.row(5, **{"train/loss": 1.0})
    table.truncate_after(3)
    assert read_metrics(path) == [] and lines(path)[0].startswith("step,epoch,samples")
    table.row(4, **{"train/loss": 2.0})
    table.close()
    assert read_metrics(path) == [{"step": 4, "train/loss": 2.0}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    table.row(1, **{"train/loss": 3.0})
    table.row(2, **{"train/loss": 2.5})
    table.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [row["step"] for row in read_metrics(path)] == [1]
    resumed = MetricsCsv(path)
    resumed.row(2, **{"train/loss": 2.5})
    resumed.close()
    assert path.read_bytes() == whole


def test_steps_do_not_go_back(tmp_path):
    table = MetricsCsv(tmp_path / "metrics.csv")
    table.row(5, a=1)
    table.row(6, a=1)
    with pytest.raises(ValueError, match="at step 6; a row for step 5"):
        table.row(5, a=2)


def test_what_is_not_a_metrics_file_is_not_overwritten(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("name,age\nx,1\n")
    with pytest.raises(ValueError, match=r"not a metrics\.csv"):
        MetricsCsv(path)
    assert path.read_text() == "name,age\nx,1\n"


def test_a_value_with_a_line_break_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not fit one line"):
        MetricsCsv(tmp_path / "metrics.csv").row(1, note="a\nb")


def test_a_killed_process_loses_no_flushed_row(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from meshformer.record import MetricsCsv\n"
        "m = MetricsCsv(sys.argv[2])\n"
        "for s in range(1, 8): m.row(s, **{'train/loss': s / 3})\n"
        "m.flush(); m.row(8, **{'train/loss': 1.0}); os._exit(9)\n"
    )
    import meshformer

    path = tmp_path / "metrics.csv"
    source = str(Path(meshformer.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code, source, str(path)], check=False).returncode == 9
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 8))
