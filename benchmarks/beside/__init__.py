"""This program beside SpecForge, each step of both in a process of its own: what the benchmarks of training steps share."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEER = "specforge==0.2.0"
NEEDS = ["torch==2.11.0", "transformers==5.8.1"]


def environment(folder: Path) -> Path:
    """An interpreter that has SpecForge; made where there is none. A mark says that the installation ended well."""
    python, mark = folder / "bin/python", folder / "eagle3-step-installed"
    wanted = "\n".join([PEER, *NEEDS])
    if not mark.is_file() or mark.read_text() != wanted:
        print(f"installing {PEER}, {', '.join(NEEDS)} into {folder} (2 GB)", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *NEEDS], check=True)
        subprocess.run([*pip, "--no-deps", PEER], check=True)
        mark.write_text(wanted)
    return python


def busy_ticks() -> tuple[int, int]:
    """Ticks of all processors since the start, and those in which they worked, stolen ones included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields), sum(fields) - fields[3] - fields[4]


def run(command: list[str], threads: int) -> dict:
    """One process: what it prints as JSON, its peak memory, and what others took of the machine meanwhile."""
    total, busy = busy_ticks()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    report = json.loads(output)
    all_ticks, all_busy = busy_ticks()
    ticks = (usage.ru_utime + usage.ru_stime) * os.sysconf("SC_CLK_TCK")
    peak = usage.ru_maxrss * 1024
    return {
        "seconds": report["seconds"],
        "cpu_seconds": report["cpu_seconds"],
        "median_seconds": statistics.median(report["seconds"]),
        "median_cpu_seconds": statistics.median(report["cpu_seconds"]),
        "peak_bytes": peak,
        "steps_bytes": peak - report["memory_before_bytes"],
        "loss": report["loss"],
        "trainable_parameters": report["trainable_parameters"],
        "others": max(0.0, (all_busy - busy - ticks) / max(1, all_ticks - total)),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else "unknown processor"
    return f"{model}, {len(models)} cores, {platform.system()} {platform.machine()}"


def ratios_of(runs: dict[str, list[dict]]) -> list[dict]:
    """Prints and returns how often SpecForge's figures are ours, by round and in the median."""
    names = {"time": "median_seconds", "processor time": "median_cpu_seconds"}
    names |= {"memory": "peak_bytes", "memory of the steps": "steps_bytes"}
    ratios = []
    for ours in [name for name in runs if name.startswith("ours")]:
        for theirs in [name for name in runs if not name.startswith("ours")]:
            rounds = list(zip(runs[theirs], runs[ours], strict=True))
            values = {name: [left[key] / right[key] for left, right in rounds] for name, key in names.items()}
            medians = {name: statistics.median(each) for name, each in values.items()}
            ratios.append({"theirs": theirs, "ours": ours, "medians": medians, "rounds": values})
            text = ", ".join(f"{name} {value:.2f}" for name, value in medians.items())
            print(f"{theirs} / {ours}: {text}")
    return ratios


def show(runs: dict[str, list[dict]]) -> None:
    """Prints the median of each program."""

    def median(program: str, key: str) -> float:
        return statistics.median(each[key] for each in runs[program])

    print(f"{'':24} {'s/step':>7} {'cpu s':>7} {'peak MiB':>9} {'of steps':>9}  others")
    for program in runs:
        peak, steps = (median(program, key) / 2**20 for key in ("peak_bytes", "steps_bytes"))
        others = max(each["others"] for each in runs[program])
        seconds, cpu = (median(program, key) for key in ("median_seconds", "median_cpu_seconds"))
        print(f"{program:24} {seconds:7.3f} {cpu:7.3f} {peak:9.0f} {steps:9.0f}  {others:6.1%}")
