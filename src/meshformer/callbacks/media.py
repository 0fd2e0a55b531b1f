"""Sends texts, figures and tables to the loggers that can show them: TensorBoard, Weights & Biases and MLflow; others are left out. For rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


def log_text(loggers: Iterable[Logger], name: str, text: str, step: int) -> None:
    """`name` as in samples/continuation; in MLflow it is the file name-STEP.txt."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown: four spaces keep the lines as they are
            logger.experiment.add_text(name, indented, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns=["step", "text"], data=[[str(step), text]], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(str(logger.run_id), text, f"{name}-{step:08d}.txt")


def log_figure(loggers: Iterable[Logger], name: str, figure: Any, step: int) -> None:
    """`figure`: of matplotlib."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [figure], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(str(logger.run_id), figure, f"{name}.png")


def log_drawing(loggers: Iterable[Logger], drawing: Path, rows: Sequence[Mapping[str, str]], step: int) -> None:
    """`drawing`: FOLDER/NAME.svg; `rows`: the table that it draws. TensorBoard cannot show SVG, so it gets the table."""
    name = f"{drawing.parent.name}/{drawing.stem}"
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and rows:
            lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
            logger.experiment.add_text(name, "\n".join("| " + " | ".join(line) + " |" for line in lines), step)
        elif isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({name: wandb.Html(drawing.read_text(encoding="utf-8"), inject=False), "trainer/global_step": step})
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(str(logger.run_id), str(drawing), drawing.parent.name)
