"""The record of a run: its folder, `run.json` and `metrics.csv`. Uses only the standard library, so that analysis needs no torch."""

from meshformer.record.metrics_csv import MetricsCsv, read_metrics
from meshformer.record.run_folder import RunNotFound, atomic_write_text, find_run, new_run_folder
from meshformer.record.run_json import RunRecord, read_run

__all__ = ["MetricsCsv", "RunNotFound", "RunRecord", "atomic_write_text", "find_run", "new_run_folder", "read_metrics", "read_run"]
