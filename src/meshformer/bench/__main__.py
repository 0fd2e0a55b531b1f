"""`python -m meshformer.bench [WHAT ...]`: run benchmarks and print their figures with the date and the machine."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from pathlib import Path

import torch

from meshformer.bench import (
    drawing,
    gpu,
    layouts,
    learning,
    litert,
    memory_plan,
    models,
    plan,
    prepare,
    profiling,
    recognition,
    runs,
    safety,
    speed,
    startup,
    sweeps,
    tfrecord,
    threads,
    transfer,
    translation,
)

MEASUREMENTS = {
    "speed": speed.report,
    "gpu": gpu.report_gpu,
    "trainer": speed.report_trainer,
    "memory": speed.report_memory,
    "models": models.report_models,
    "memory_plan": memory_plan.report_memory_plan,
    "learning": learning.report_learning,
    "speedrun": learning.report_speedrun,
    "finetune": learning.report_finetune,
    "layouts": layouts.report_layouts,
    "pipeline": layouts.report_pipeline,
    "drawing": drawing.report_drawing,
    "startup": startup.report_startup,
    "threads": threads.report_threads,
    "runs": runs.report_runs,
    "plan": plan.report_plan,
    "plan_here": plan.report_plan_here,
    "prepare": prepare.report_prepare,
    "litert": litert.report_litert,
    "tfrecord": tfrecord.report_tfrecord,
    "sweep_overhead": sweeps.report_sweep_overhead,
    "grid": sweeps.report_grid,
    "saving": safety.report_saving,
    "checks": safety.report_checks,
    "profile": profiling.report_profile,
    "speech": recognition.report_speech,
    "translation": translation.report_translation,
    "sentiment": transfer.report_sentiment,
    "adapters": transfer.report_adapters,
    "images": transfer.report_images,
    "masked": transfer.report_masked,
    "decoder": transfer.report_decoder,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshformer.bench", description=__doc__)
    parser.add_argument("what", nargs="*", default=["speed"], help=f"any of {', '.join(MEASUREMENTS)} (default: speed)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each timed variant of `speed` and `trainer` runs")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the text for `prepare`")
    for_gpu = parser.add_argument_group("options of `gpu`")
    for_gpu.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    for_gpu.add_argument("--tiny", action="store_true", help="toy sizes, to see that every part runs")
    for_gpu.add_argument("--minutes", type=float, default=8.0, help="start no part after this many minutes")
    for_gpu.add_argument("--parts", nargs="+", metavar="PART", help=f"any of {', '.join(gpu.PARTS)}")
    for_gpu.add_argument("--json", type=Path, metavar="FILE", help="where the figures are saved, after each part")
    for_plan = parser.add_argument_group("options of `plan`")
    for_plan.add_argument("--write", action="store_true", help="store the fitted constants in plan/constants.json")
    for_plan.add_argument("--fsdp", metavar="FILE", help="rows with the columns of bench/published/fsdp.csv, which are only predicted")
    for_plan.add_argument("--products", metavar="FILE", help="the same with the columns of bench/published/products.csv")
    for_plan.add_argument("--figure", metavar="FILE", help="draw predictions against measurements")
    options = parser.parse_args(argv)
    unknown = [what for what in options.what if what not in MEASUREMENTS]
    if unknown:
        parser.error(f"there is no measurement {unknown[0]!r}; there are {', '.join(MEASUREMENTS)}")
    torch.set_num_threads(options.threads)
    print(f"{datetime.date.today()}  {machine()}  torch {torch.__version__}  {options.threads} threads")
    for what in options.what:
        print(f"\n## {what}")
        MEASUREMENTS[what](options)
    return 0


def machine() -> str:
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return f"{cpu} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
