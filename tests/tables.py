"""The README's tables from finished runs: mean and standard deviation over seeds, a row a setting.

python tests/tables.py runs/finetune-* > results.jsonl    one JSON line a run, with its settings
python tests/tables.py results.jsonl                      the table of such a file
python tests/tables.py occlusion.json                     the tables of what eval_occlusion.py wrote
"""

import json
import re
import statistics
import sys
from pathlib import Path


def read_run(folder):
    """A fine-tuning's result.json, with the settings and the minutes of what it started from."""
    result = json.loads(Path(folder, "result.json").read_text())
    start = Path(*result["checkpoint"]) if result["checkpoint"] else None
    if start:
        result["pretraining"] = json.loads((start / "config.json").read_text())
        log = [json.loads(line) for line in (start / "log.jsonl").read_text().splitlines()]
        rate = statistics.median(line["images_per_s"] for line in log)
        images = result["pretraining"]["steps"] * result["pretraining"]["batch_size"]
        result["pretraining_minutes"] = round(images / rate / 60, 2) if rate else 0.0
    return result


def row_name(result):
    """What a run has in common with those of other seeds."""
    start = result.get("pretraining")
    if not start:
        return f"from scratch, {result['steps']} steps"
    count = f"{start['num_images']:,} of " if start["num_images"] else ""
    name = "crop" if start["transform"] == "crop" else start["loss"]
    return f"{name}, {count}{Path(start['data']).name}, {start['steps']} steps"


def spread(values):
    values = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(values):.1f}" if values[1:] else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def occlusion_tables(content):
    """A table for each shape of what is hidden; area and kept as eval_occlusion.py has them."""
    head = ["checkpoint", *(f"{ratio:.0%}" for ratio in content["ratios"]), "area", "kept"]
    for shape, curves in content["accuracy"].items():
        rows = {}
        for name, curve in curves.items():
            figures = [value for value, _ in curve["accuracy"]]
            rows.setdefault(re.sub(r"-\d+$", "", name), []).append(
                [*figures, curve["area"], curve["kept"]]
            )
        print(f"\nhidden: {shape}\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for name, found in rows.items():
            print(f"| {' | '.join([name, *map(spread, zip(*found))])} |")
    answers = {}
    for name, found in content["cue_conflict"].items():
        row = answers.setdefault(re.sub(r"-\d+$", "", name), [0, 0])
        row[0], row[1] = row[0] + found["shape"], row[1] + found["texture"]
    for name, (shape, texture) in answers.items():
        print(f"{name}: shape {shape}, texture {texture}: {shape / (shape + texture):.0%}")


def main(paths):
    if paths[0].endswith(".json"):
        occlusion_tables(json.loads(Path(paths[0]).read_text()))
        return
    if Path(paths[0]).is_dir():
        print("\n".join(json.dumps(read_run(path)) for path in paths))
        return
    lines = [line for path in paths for line in Path(path).read_text().splitlines()]
    rows = {}
    for result in map(json.loads, lines):
        part = "validation" if result["validate"] else "test"
        rows.setdefault((row_name(result), part, result["linear_probe"]), []).append(result)
    print("| start | accuracy, % | seeds | minutes |\n|---|---|---|---|")
    for (name, part, probe), found in rows.items():
        minutes = [r["minutes"] + r.get("pretraining_minutes", 0) for r in found]
        cells = [spread([r[f"{part}_accuracy"] for r in found])]
        name += ", held out" if part == "validation" else ""
        if probe:
            name += ", linear probe / nearest neighbours"
            cells += [spread([r[f"{part}_accuracy_of_neighbours"] for r in found])]
        print(f"| {name} | {' / '.join(cells)} | {len(found)} | {statistics.mean(minutes):.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
