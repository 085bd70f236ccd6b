# SPDX-License-Identifier: MIT
"""CIFAR-10 at the scale of a GPU: nine starts by one recipe, then occlusion, features, shape bias.

    python .github/results/cifar10.py DATA PHOTO CUES --seed 0     8 minutes on one H100
    python .github/results/cifar10.py DATA PHOTO CUES --tiny       the same rows on a CPU, to try it
    python .github/results/cifar10.py DATA PHOTO CUES --minutes 10 mae alone, as long as that

DATA: CIFAR-10 as a folder of train/CLASS and test/CLASS, or "cifar10". PHOTO: one photograph. CUES:
a folder of cue-conflict images (Geirhos et al., 2019). Trainings run side by side, each in a process
of its own. What is finished is skipped and what was cut off is resumed, so the same command goes on
after an interruption. Writes summary.json and prints the table; logs and results stay in --out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["--model", "tiny", "--batch-size", "1024", "--compile", "yes"]
RECIPE = ["--drop-path", "0.1", "--cutmix", "1.0", "--mixup", "0.2", "--smallest-crop", "0.4"]
PRETRAIN_STEPS = 2000  # of 1,024 crops
TUNE_STEPS = 1200  # 25 epochs
LONG_STEPS = 2400  # from scratch, in the time that infonce needs for both
PROBE_STEPS = 300


def rows(data, photo):
    """Name of each start, and the options of its pretraining; None: from scratch."""
    return {
        "scratch": None,
        "scratch-long": None,
        "relax": ["--loss", "relax", "--data", data],
        "infonce": ["--loss", "infonce", "--data", data],
        "infonce-photo": ["--loss", "infonce", "--data", photo],
        "infonce-embedded": ["--loss", "infonce", "--num-images", "1"],
        "mae": ["--loss", "mae", "--data", data],
        "mae-photo": ["--loss", "mae", "--data", photo],
    }


def run(script, out, *options):
    """Run one of the three scripts, unless its result is there. Its output goes to out.txt."""
    finished = {"relaxmim.py": "views.png", "finetune.py": "result.json"}
    if (out / finished.get(script, "occlusion.json")).exists():
        return
    command = [sys.executable, str(ROOT / script), *options, "--out", str(out)]
    if (out / "checkpoint.pt").exists():
        command.append("--resume")
    start = time.time()
    with open(out.with_suffix(".txt"), "a") as file:
        status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    print(f"{out.name}: {time.time() - start:.0f} s, status {status}", flush=True)


def train_row(name, pretraining, args):
    """Pretrain, fine-tune, and probe the frozen encoder."""
    steps = LONG_STEPS if name == "scratch-long" else TUNE_STEPS
    common = [*COMMON, "--seed", str(args.seed), "--workers", str(args.workers)]
    if args.tiny:
        steps = 2
        common = ["--batch-size", "8", "--seed", str(args.seed)]
    tune = [*common, *RECIPE, "--data", args.data, "--steps", str(steps)]
    if pretraining is None:
        run("finetune.py", args.out / f"ft-{name}", *tune)
        return
    pretrained = args.out / name
    steps = 2 if args.tiny else PRETRAIN_STEPS
    run("relaxmim.py", pretrained, *pretraining, *common, "--steps", str(steps))
    run("finetune.py", args.out / f"ft-{name}", str(pretrained), *tune)
    steps = 2 if args.tiny else PROBE_STEPS
    probe = [*common, "--data", args.data, "--steps", str(steps), "--linear-probe"]
    run("finetune.py", args.out / f"probe-{name}", str(pretrained), *probe)


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def percent(value):
    return f"{100 * value:.1f}" if value is not None else ""


def summarize(names, args):
    """Collect the figures of every row in summary.json, and print them as a table."""
    occlusion = read(args.out / "occlusion" / "occlusion.json")
    summary = {"seed": args.seed, "rows": {}}
    summary["features"] = read(args.out / "features" / "occlusion.json").get("features", {})
    at = occlusion["ratios"].index(0.75) if occlusion else 0
    print(
        "| start | accuracy | random, 75 % | AUC | retention | block, 75 % | AUC | retention |",
        end="",
    )
    print(" shape bias (95 %) | linear | k-NN |\n" + "|---" * 11 + "|")
    for name in names:
        tuned = read(args.out / f"ft-{name}" / "result.json")
        probe = read(args.out / f"probe-{name}" / "result.json")
        row = {"accuracy": tuned.get("test_accuracy"), "minutes": tuned.get("minutes")}
        row["linear"] = probe.get("test_accuracy")
        row["neighbours"] = probe.get("test_accuracy_of_neighbours")
        cells = [name, percent(row["accuracy"])]
        for mask in ("random", "block"):
            figures = occlusion.get("accuracy", {}).get(mask, {}).get(f"ft-{name}")
            row[mask] = figures
            if figures:
                values = (figures["accuracy"][at][0], figures["auc"], figures["retention"])
                cells += [percent(value) for value in values]
            else:
                cells += ["", "", ""]
        row["shape_bias"] = occlusion.get("shape_bias", {}).get(f"ft-{name}")
        bias = ""
        if row["shape_bias"]:
            shape = row["shape_bias"]["shape"]
            texture = row["shape_bias"]["texture"]
            low, high = row["shape_bias"]["interval"]
            bias = f"{shape / max(1, shape + texture):.0%} ({low:.0%} to {high:.0%})"
        cells += [bias, percent(row["linear"]), percent(row["neighbours"])]
        print("| " + " | ".join(cells) + " |")
        summary["rows"][name] = row
    for mask, figures in summary["features"].items():
        print(f"\nCKA after the last block, {mask}")
        for name, found in figures.items():
            print(f"{name}: " + ", ".join(f"{blocks[-1]:.2f}" for blocks in found["cka"]))
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def mae_alone(args):
    """Pretrain with mae and fine-tune, two thirds and one third of the given minutes."""
    # measured on one H100: 100,000 crops a second, and 36,000 in fine-tuning
    steps = int(args.minutes * 60 * 0.6 * 100_000 / 1024)
    common = [*COMMON, "--data", args.data, "--seed", str(args.seed)]
    run("relaxmim.py", args.out / "mae", "--loss", "mae", *common, "--steps", str(steps))
    steps = int(args.minutes * 60 * 0.3 * 36_000 / 1024)
    tune = [*common, *RECIPE, "--steps", str(steps)]
    run("finetune.py", args.out / "ft-mae", str(args.out / "mae"), *tune)
    print(read(args.out / "ft-mae" / "result.json").get("test_accuracy"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data")
    parser.add_argument("photo")
    parser.add_argument("cues")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--together", type=int, default=8, help="trainings side by side")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float)
    args = parser.parse_args()
    args.out = args.out or Path("runs", f"cifar10-{args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.minutes:
        mae_alone(args)
        return
    starts = rows(args.data, args.photo)
    with ThreadPoolExecutor(args.together) as pool:
        list(pool.map(lambda item: train_row(*item, args), starts.items()))
    common = ["--data", args.data, "--mask-seeds", "1", "--workers", str(args.workers)]
    common += ["--num-images", "60" if args.tiny else "10000"]
    tuned = [str(args.out / f"ft-{name}") for name in starts]
    cues = ["--cue-conflict", args.cues]
    pretrained = [str(args.out / name) for name, options in starts.items() if options]
    features = [*pretrained, str(args.out / "ft-scratch"), *common, "--features"]
    features[features.index("--num-images") + 1] = "60" if args.tiny else "2000"
    with ThreadPoolExecutor(2) as pool:
        pool.submit(run, "eval_occlusion.py", args.out / "occlusion", *tuned, *common, *cues)
        pool.submit(run, "eval_occlusion.py", args.out / "features", *features)
    summarize(starts, args)


if __name__ == "__main__":
    main()
