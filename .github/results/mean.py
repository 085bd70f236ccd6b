# SPDX-License-Identifier: MIT
"""Mean and standard deviation over the seeds of what cifar10.py wrote, as a table.

python .github/results/mean.py .github/results/laptop-*.json
"""

import json
import sys
from statistics import mean, stdev


def cell(values):
    """Percent, with the deviation if there is more than one value."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main(paths):
    runs = []
    for path in paths:
        with open(path) as file:
            runs.append(json.load(file))
    head = ["start", "accuracy", "random, 75 %", "AUC", "retention"]
    head += ["block, 75 %", "AUC", "retention", "shape bias", "linear", "k-NN"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name in runs[0]["starts"]:
        starts = [run["starts"][name] for run in runs]
        cells = [name, cell([start["accuracy"] for start in starts])]
        for mask in ("random", "block"):
            curves = [start[mask] for start in starts]
            cells.append(cell([curve["accuracy"][3][0] for curve in curves]))
            cells += [cell([curve[key] for curve in curves]) for key in ("auc", "retention")]
        shape = sum(start["shape_bias"]["shape"] for start in starts)
        texture = sum(start["shape_bias"]["texture"] for start in starts)
        cells.append(f"{shape / (shape + texture):.0%} of {shape + texture}")
        cells += [cell([start[key] for start in starts]) for key in ("linear", "neighbours")]
        print(f"| {' | '.join(cells)} |")
    for mask, found in runs[0]["features"].items():
        print(f"\nCKA of clean and occluded features after the last block, {mask}")
        for name in found:
            values = [[blocks[-1] for blocks in run["features"][mask][name]["cka"]] for run in runs]
            print(f"{name}: " + ", ".join(f"{mean(column):.2f}" for column in zip(*values)))


if __name__ == "__main__":
    main(sys.argv[1:])
