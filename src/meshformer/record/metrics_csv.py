"""`metrics.csv`: one row per logged step, one column per metric, in full precision. Training writes it and analysis reads it."""

import csv
import io
from pathlib import Path
from typing import Any

from meshformer.record.run_folder import atomic_write_text

COLUMNS = ("step", "epoch", "samples", "train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "val/loss")
INTEGERS = frozenset({"step", "epoch", "samples"})


class MetricsCsv:
    """Writer of one `metrics.csv`, new or continued.

    All values of a step share one row: `row(5, **{"train/loss": 1.2})` then `row(5, **{"val/loss": 1.3})`. The row of the
    latest step stays open, even after `flush()`, until a later step is logged. A new column rewrites the file atomically
    with the wider header. Rows on disk end in a newline; a last line without one was cut off when the process was killed,
    and is dropped on opening.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.columns: list[str]
        self.columns, rows = _load(self.path) if self.path.is_file() else ([], [])
        if not self.columns:
            self.columns = list(COLUMNS)
        self._pending: dict[str, str] = rows.pop() if rows else {}
        self._last_closed = int(rows[-1]["step"]) if rows else -1
        self._dirty = False
        self._rewrite(rows)

    def row(self, step: int, **values: Any) -> None:
        """Add `values` to the row of `step`, replacing earlier values of the same columns. Raises ValueError if `step` goes back."""
        pending_step = int(self._pending["step"]) if self._pending else self._last_closed
        if step < pending_step or (step == self._last_closed and not self._pending):
            raise ValueError(f"metrics.csv is at step {pending_step}; a row for step {step} would be out of order (truncate_after first).")
        if self._pending and step > pending_step:
            self.flush()
            self._offset += len(self._line(self._pending))
            self._last_closed, self._pending = pending_step, {}
        cells = {"step": str(step), **{name: _format(name, value) for name, value in values.items()}}
        if new := [name for name in cells if name not in self.columns]:
            self.columns += new
            rows = _load(self.path)[1]
            self._rewrite(rows[:-1] if self._pending and rows and rows[-1]["step"] == self._pending["step"] else rows)
        self._pending.update(cells)
        self._dirty = True

    def flush(self) -> None:
        """Write all values so far to disk. Call it before each checkpoint, so that no checkpoint is newer than its rows."""
        if not (self._pending and self._dirty):
            return
        line = self._line(self._pending)
        with open(self.path, "r+b") as file:
            # A single write replaces the row's earlier version, so a kill here loses at most this row.
            file.seek(self._offset)
            file.write(line)
            file.truncate()
        self._dirty = False

    def truncate_after(self, step: int) -> None:
        """Drop every row after `step`: a run logged them after the checkpoint that it now resumes from."""
        self.flush()
        rows = [row for row in _load(self.path)[1] if int(row["step"]) <= step]
        self._pending = rows.pop() if rows else {}
        self._last_closed = int(rows[-1]["step"]) if rows else -1
        self._rewrite(rows)

    def close(self) -> None:
        self.flush()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        head = _encode(self.columns) + b"".join(self._line(row) for row in rows)
        tail = self._line(self._pending) if self._pending else b""
        self._offset = len(head)
        self._dirty = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, (head + tail).decode())

    def _line(self, row: dict[str, str]) -> bytes:
        return _encode([row.get(name, "") for name in self.columns])


def read_metrics(path: Path | str) -> list[dict[str, int | float | str]]:
    """Return all complete rows, oldest first, without empty cells. `step`, `epoch` and `samples` are ints, the rest floats or text."""
    return [{name: _parse(name, cell) for name, cell in row.items() if cell != ""} for row in _load(Path(path))[1]]


def _load(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = list(csv.reader(io.StringIO(whole.decode("utf-8"))))
    if not lines:
        return [], []
    header, body = lines[0], lines[1:]
    if header[0] != "step":
        raise ValueError(f"{path} is not a metrics.csv: its first column is {header[0]!r}, not 'step'.")
    # strict=False: a row written by hand or under an older header may be short, and its missing cells count as empty.
    return header, [dict(zip(header, cells, strict=False)) for cells in body if cells and cells[0]]


def _encode(cells: list[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode("utf-8")


def _format(name: str, value: Any) -> str:
    if hasattr(value, "item"):  # NumPy and torch scalars: their repr is not a number
        value = value.item()
    if isinstance(value, bool):
        return repr(int(value))
    text = value if isinstance(value, str) else "" if value is None else repr(value)
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError(f"{name}={value!r} does not fit one line of metrics.csv.")
    return text


def _parse(name: str, cell: str) -> int | float | str:
    try:
        return int(cell) if name in INTEGERS else float(cell)
    except ValueError:
        return cell
