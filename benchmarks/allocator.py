"""A training step with glibc's own ways and with :func:`keep_freed_memory`: ``python benchmarks/allocator.py``.

Each round starts two fresh processes, one of each kind, as the setting cannot be taken back; medians over the rounds.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Frobenius

PENALTIES = {"plain": None, "frobenius, 1 probe": Frobenius(delta_over_eps=1e-3, probes=1)}


def steps_in_this_process(steps: int) -> dict[str, dict[str, float]]:
    model = LeNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.rand(32, 1, 28, 28), torch.randint(0, 10, (32,))
    measured = {}
    for name, penalty in PENALTIES.items():
        seconds, faults = [], []
        for _ in range(steps):
            started, faults_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            inputs = images.detach().requires_grad_(penalty is not None)
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits, labels)
            if penalty is not None:
                loss = 0.998 * loss + 0.002 * penalty(logits, inputs).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
        warm = slice(steps // 4, None)
        measured[name] = {"ms": 1e3 * statistics.median(seconds[warm]), "faults": statistics.mean(faults[warm])}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind in a process")
    parser.add_argument("--child", choices=("default", "kept"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.child == "kept" and not keep_freed_memory():
            sys.exit("this C library has no mallopt, or MALLOC_… is set")
        print(json.dumps(steps_in_this_process(arguments.steps)))
        return
    results: dict[str, list[dict[str, dict[str, float]]]] = {"default": [], "kept": []}
    for _ in range(arguments.rounds):
        for kind, measured in results.items():
            command = [sys.executable, __file__, "--child", kind, "--steps", str(arguments.steps)]
            measured.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    table = Table(title=f"LeNet, batch 32, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("", "default, ms", "page faults", "kept, ms", "page faults", "kept / default"):
        table.add_column(column, justify="right" if column else "left")
    for name in PENALTIES:
        default, kept = (
            {key: statistics.median(m[name][key] for m in results[kind]) for key in ("ms", "faults")}
            for kind in results
        )
        ratios = [b[name]["ms"] / a[name]["ms"] for a, b in zip(results["default"], results["kept"], strict=True)]
        table.add_row(
            name,
            f"{default['ms']:.1f}",
            f"{default['faults']:.0f}",
            f"{kept['ms']:.1f}",
            f"{kept['faults']:.0f}",
            f"{statistics.median(ratios):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
