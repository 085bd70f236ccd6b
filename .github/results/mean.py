# SPDX-License-Identifier: MIT
"""Tables of what cifar10.py filed: mean ± standard deviation over the seeds, in %.

    python .github/results/mean.py             the tables of the results page
    python .github/results/mean.py --readme    the two tables of README.md: GPU, laptop

It reads gpu/*.json and laptop/*.json, a file for each row and seed. As long as gpu/ is empty, it
reads gpu-0.json, written by an earlier version, in which relax has a linear d'. The best value of
each column is bold, with all that round to the same number. Work is in fine-tunings. "none" is
trained from scratch; features are those of that classifier, of the other rows before fine-tuning.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent
CHANCE = 10.0  # %: CIFAR-10 has ten classes
RATIOS = (0, 25, 50, 75, 90)  # % of the patches hidden
AT_75 = RATIOS.index(75)
MASKS = ("random", "block")
RANDOM = "random initialisation"
ROW_NAMES = {  # in the order of the tables
    "scratch": "none",
    "scratch-twice": "none, twice the steps",
    "scratch-as-mae": "none, for mae's work",
    "scratch-as-infonce": "none, for infonce's work",
    "mae": "mae, 50,000 images",
    "infonce": "infonce, 50,000 images",
    "relax": "relax, 50,000 images",
    "crop": "crop, 50,000 images",
    "mae-photo": "mae, one photograph",
    "infonce-photo": "infonce, one photograph",
    "infonce-10": "infonce, ten images",
    "infonce-synthetic": "infonce, 5,000 synthetic images",
    RANDOM: RANDOM,
}
GPU_NAMES = {"infonce-synthetic": "infonce, one synthetic image"}
OLD_NAMES = {"relax": "relax with a linear d', 50,000 images"}

# ----------------------------------------------------------------------------------- Records


def read_json(path):
    return json.loads(path.read_text())


def read_rows(scale):
    """{name of a row: its records, by seed}, in the order of the tables."""
    names = dict(ROW_NAMES)
    records = [read_json(path) for path in (RESULTS / scale).glob("*.json")]
    if scale == "gpu":
        names.update(GPU_NAMES)
    if scale == "gpu" and not records:
        names.update(OLD_NAMES)
        records = read_old()
    records += split_features(records)
    records.sort(key=lambda record: record["seed"])
    rows = {}
    for row, name in names.items():
        found = [record for record in records if record["row"] == row]
        if found:
            rows[name] = found
    return rows


def read_old():
    """The records of gpu-0.json, in today's form."""
    old = read_json(RESULTS / "gpu-0.json")
    work = read_json(RESULTS / "work.json")["gpu"]["rows"]
    records = []
    for name, start in old["starts"].items():
        row = "scratch-twice" if name == "scratch-long" else name
        record = {"row": row, "seed": old["seed"], "work": work[row]["work"]}
        for key in ("accuracy", "shape_bias", "linear", "neighbours"):
            record[key] = start[key]
        record["occlusion"] = {mask: start[mask] for mask in MASKS}
        if row == "scratch":
            models = {"supervised": "ft-scratch", RANDOM: RANDOM}
        elif row == "scratch-twice":
            models = {}
        else:
            models = {"encoder": row}
        record["features"] = {}
        for mask in MASKS:
            found = old["features"][mask]
            record["features"][mask] = {key: found[model] for key, model in models.items()}
        records.append(record)
    return records


def split_features(records):
    """Leave one model's features in each record; return records of random initialisation."""
    others = []
    for record in records:
        features = record.get("features", {})
        record["features"] = {}
        other = {"row": RANDOM, "seed": record["seed"], "features": {}}
        for mask, models in features.items():
            for model, figures in models.items():
                owner = other if model == RANDOM else record
                owner["features"][mask] = figures
        if other["features"]:
            others.append(other)
    return others


# ------------------------------------------------------------------------------------ Values
# Of one record, in %; None: not measured.


def share(key):
    """A share that the record holds under this key."""

    def value(record):
        found = record.get(key)
        return None if found is None else 100 * found

    return value


def occluded(mask, ratio=AT_75):
    """Accuracy with RATIOS[ratio] % of the patches hidden."""

    def value(record):
        if "occlusion" not in record:
            return None
        return 100 * record["occlusion"][mask]["accuracy"][ratio][0]

    return value


def kept(mask):
    """Share of the accuracy above chance that is kept with 75 % of the patches hidden."""

    def value(record):
        clean = occluded(mask, 0)(record)
        if clean is None or clean <= CHANCE:
            return None
        return 100 * (occluded(mask)(record) - CHANCE) / (clean - CHANCE)

    return value


def shape_bias(record):
    """Share of the shape among the answers that name the shape or the texture."""
    answers = record.get("shape_bias", {"shape": 0, "texture": 0})
    total = answers["shape"] + answers["texture"]
    return 100 * answers["shape"] / total if total > 0 else None


def feature(kind, mask, ratio=AT_75):
    """retrieval, cosine or cka after the last block."""

    def value(record):
        figures = record.get("features", {}).get(mask, {})
        return 100 * figures[kind][ratio][-1] if kind in figures else None

    return value


def last_logged(key):
    """A number of the last line of pretraining's log, as it is."""
    return lambda record: record.get("pretraining", {}).get(key)


# ------------------------------------------------------------------------------------ Tables


class Column(NamedTuple):
    title: str
    value: Callable  # of a record
    decimals: int = 1
    compare: bool = True  # the best is bold


ACCURACY = Column("accuracy", share("accuracy"))
RANDOM_75 = Column("75 % hidden, random", occluded("random"))
BLOCK_75 = Column("75 % hidden, block", occluded("block"))
RANDOM_KEPT = Column("kept, random", kept("random"), decimals=0)
BLOCK_KEPT = Column("kept, block", kept("block"), decimals=0)
SHAPE_BIAS = Column("shape bias", shape_bias, decimals=0)
LINEAR = Column("linear", share("linear"))
NEIGHBOURS = Column("k-NN", share("neighbours"))
RETRIEVAL = Column("retrieval", feature("retrieval", "random"), decimals=0)
WORK = Column("work", lambda record: record.get("work"), compare=False)

GPU = [ACCURACY, RANDOM_75, BLOCK_75, BLOCK_KEPT, SHAPE_BIAS, LINEAR, WORK]
LAPTOP = [ACCURACY, RANDOM_75, BLOCK_75, BLOCK_KEPT, RETRIEVAL, WORK]
LONG = [ACCURACY, RANDOM_75, RANDOM_KEPT, BLOCK_75, BLOCK_KEPT]
LONG += [SHAPE_BIAS, LINEAR, NEIGHBOURS, WORK]


def cell(values, decimals=1):
    """The mean of values, with the deviation if they differ."""
    if not values:
        return ""
    text = f"{mean(values):.{decimals}f}"
    if len(set(values)) > 1:
        text += f" ± {stdev(values):.{decimals}f}"
    return text


def make_cells(column, rows):
    """The cells of a column, one for each row."""
    cells = []
    means = []
    for records in rows.values():
        values = [column.value(record) for record in records]
        values = [value for value in values if value is not None]
        cells.append(cell(values, column.decimals))
        means.append(round(mean(values), column.decimals) if values else -1e9)
    if column.compare:
        best = max(means, default=0)
        for i, text in enumerate(cells):
            if text and means[i] == best:
                cells[i] = f"**{text}**"
    return cells


def print_table(columns, rows, first=("pretraining",)):
    """A Markdown table of {name: records}. Rows and columns without any value are left out."""
    found = [(column, make_cells(column, rows)) for column in columns]
    found = [(column, cells) for column, cells in found if any(cells)]
    if not found:
        return
    head = [*first, *[column.title for column, _ in found]]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for i, (name, records) in enumerate(rows.items()):
        values = [cells[i] for _, cells in found]
        if any(values):
            label = [name, str(len(records))]
            print(f"| {' | '.join([*label[: len(first)], *values])} |")
    print()


def print_long_tables(scale):
    """Everything that was filed at one scale."""
    rows = read_rows(scale)
    if not rows:
        return
    first = ("pretraining", "seeds")
    print(f"## {scale}\n")
    print_table(LONG, rows, first)

    print("Accuracy of each seed\n")
    seeds = sorted({record["seed"] for records in rows.values() for record in records})
    print_table([seed_column(seed) for seed in seeds], rows)

    print("Accuracy, by the share of the patches hidden\n")
    print_table(mask_columns(occluded), rows, first)

    for kind in ("retrieval", "cka", "cosine"):
        columns = mask_columns(partial(feature, kind), compare=kind == "retrieval")
        if any(any(make_cells(column, rows)) for column in columns):
            print(f"Features of the whole and of the occluded image, last block: {kind} in %\n")
            print_table(columns, rows, first)

    if any("pretraining" in record for records in rows.values() for record in records):
        print("At the last step of pretraining\n")
        keys = ("loss", "measure_eq4", "constraint_eq3", "mae_eq2", "retrieval", "invariance")
        columns = [Column(key, last_logged(key), 3, compare=False) for key in keys]
        print_table(columns, rows, first)


def seed_column(seed):
    def value(record):
        return share("accuracy")(record) if record["seed"] == seed else None

    return Column(f"seed {seed}", value)


def mask_columns(make_value, compare=True):
    """A column for each mask and share hidden. make_value: of the mask and an index into RATIOS."""
    columns = []
    for mask in MASKS:
        for i, ratio in enumerate(RATIOS):
            if ratio > 0:
                title = f"{mask} {ratio} %"
                columns.append(Column(title, make_value(mask, i), compare=compare))
    return columns


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--readme", action="store_true")
    if parser.parse_args().readme:
        print_table(GPU, read_rows("gpu"))
        print_table(LAPTOP, read_rows("laptop"))
        return
    print_long_tables("gpu")
    print_long_tables("laptop")


if __name__ == "__main__":
    main()
