# SPDX-License-Identifier: MIT
"""The tables on CIFAR-10: each start by one recipe, then occlusion, features and shape bias.

    python .github/results/cifar10.py gpu DATA PHOTO CUES --seed 0      8 minutes on one H200
    python .github/results/cifar10.py laptop DATA PHOTO CUES --seed 0   3 hours on 2 cores, estimated
    python .github/results/cifar10.py tiny DATA PHOTO CUES              to try the script
    python .github/results/cifar10.py alone DATA PHOTO CUES             mae alone; not measured

DATA: CIFAR-10 as a folder of train/CLASS and test/CLASS, or "cifar10". PHOTO: one photograph. CUES:
a folder of cue-conflict images (Geirhos et al., 2019). Trainings run side by side, each in a process
of its own: --together 4 is for a GPU, 2 for two cores. A GPU shares itself better after
`nvidia-cuda-mps-control -d`. What is finished is skipped and what was cut off is resumed, so the
same command goes on after an interruption. Prints the table and writes it to summary.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU = ["--model", "tiny", "--batch-size", "1024", "--compile", "yes"]
AUGMENT = ["--drop-path", "0.1", "--cutmix", "1.0", "--mixup", "0.2", "--smallest-crop", "0.4"]
SCALES = {  # options of all trainings; those of fine-tuning; steps of pretraining, of fine-tuning
    "gpu": {"common": GPU, "tune": AUGMENT, "steps": [2000, 1000], "long": 2000, "probe": 300},
    "laptop": {"tune": ["--num-labels", "10000"], "steps": [500, 250], "long": 450},
    "tiny": {"common": ["--batch-size", "8"], "tune": AUGMENT, "steps": [2, 2], "probe": 2},
    "alone": {"common": GPU, "tune": AUGMENT, "steps": [24000, 7000]},
}


def starts(scale, data, photo):
    """Name of each start, and the options of its pretraining; None: from scratch."""
    if scale == "alone":
        return {"mae": ["--loss", "mae", "--data", data]}
    found = {"scratch": None}
    for loss in ("relax", "infonce", "mae"):
        found[loss] = ["--loss", loss, "--data", data]
    found["scratch-long"] = None
    found["infonce-photo"] = ["--loss", "infonce", "--data", photo]
    found["mae-photo"] = ["--loss", "mae", "--data", photo]
    found["infonce-synthetic"] = ["--loss", "infonce", "--num-images", "1"]
    if scale == "laptop":
        found["infonce-synthetic"] = ["--loss", "infonce"]
        found["mae-synthetic"] = ["--loss", "mae"]
        for count in ("10", "1000"):
            for loss in ("infonce", "mae"):
                found[f"{loss}-{count}"] = [*found[loss], "--num-images", count]
        found["crop"] = ["--loss", "crop", "--data", data]
    return found


def run(script, out, *options):
    """Run one of the three scripts, unless its result is there. What it prints goes to a file."""
    results = {"relaxmim.py": "views.png", "finetune.py": "result.json"}
    if (out / results.get(script, "occlusion.json")).exists():
        return
    command = [sys.executable, str(ROOT / script), *options, "--out", str(out)]
    if (out / "checkpoint.pt").exists():
        command.append("--resume")
    begun = time.time()
    with open(f"{out}.txt", "a") as file:
        if "tiny" in sys.argv:  # in this process: as good, and starts at once
            sys.path.insert(0, str(ROOT))
            with redirect_stdout(file), redirect_stderr(file):
                import_module(script[:-3]).main(command[2:])
            return
        status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    print(f"{out.name}: {time.time() - begun:.0f} s, exit status {status}", flush=True)


def train_start(name, pretraining, args):
    """Pretrain, fine-tune, and probe the frozen encoder."""
    scale = SCALES[args.scale]
    common = [*scale.get("common", []), "--seed", str(args.seed), "--workers", str(args.workers)]
    steps, tune_steps = scale["steps"]
    if name == "scratch-long":
        tune_steps = scale.get("long", 3)
    tune = [*common, *scale["tune"], "--data", args.data, "--steps", str(tune_steps)]
    if pretraining is None:
        run("finetune.py", args.out / f"ft-{name}", *tune)
        return
    encoder = args.out / name
    run("relaxmim.py", encoder, *pretraining, *common, "--steps", str(steps))
    run("finetune.py", args.out / f"ft-{name}", str(encoder), *tune)
    if "probe" in scale:
        probe = [*common, "--compile", "no", "--data", args.data, "--linear-probe"]
        probe += ["--steps", str(scale["probe"])]
        run("finetune.py", args.out / f"probe-{name}", str(encoder), *probe)


def side_by_side(jobs, together):
    """Call the jobs, so many at a time."""
    if together == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(together) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


def summarize(names, args):
    """Collect the figures of every start in summary.json, and print them as a table."""
    occlusion = read(args.out / "occlusion" / "occlusion.json")
    features = read(args.out / "features" / "occlusion.json")
    summary = {"seed": args.seed, "scale": args.scale, "starts": {}}
    summary["features"] = features.get("features", {})
    head = ["start", "accuracy", "random, 75 %", "AUC", "retention", "block, 75 %", "AUC"]
    head += ["retention", "shape bias (95 %)", "linear", "k-NN"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name in names:
        tuned = read(args.out / f"ft-{name}" / "result.json")
        probe = read(args.out / f"probe-{name}" / "result.json")
        start = {"accuracy": tuned.get("test_accuracy"), "minutes": tuned.get("minutes")}
        start["linear"] = probe.get("test_accuracy")
        start["neighbours"] = probe.get("test_accuracy_of_neighbours")
        cells = [name, percent(start["accuracy"])]
        for mask in ("random", "block"):
            start[mask] = occlusion.get("accuracy", {}).get(mask, {}).get(f"ft-{name}")
            if start[mask]:
                at = occlusion["ratios"].index(0.75)
                curve = start[mask]["accuracy"]
                values = (curve[at][0], start[mask]["auc"], start[mask]["retention"])
                cells += [percent(value) for value in values]
            else:
                cells += [""] * 3
        start["shape_bias"] = occlusion.get("shape_bias", {}).get(f"ft-{name}")
        cells.append("")
        if start["shape_bias"]:
            shape = start["shape_bias"]["shape"]
            texture = start["shape_bias"]["texture"]
            low, high = start["shape_bias"]["interval"]
            cells[-1] = f"{shape / max(1, shape + texture):.0%} ({low:.0%} to {high:.0%})"
        cells += [percent(start["linear"]), percent(start["neighbours"])]
        print("| " + " | ".join(cells) + " |")
        summary["starts"][name] = start
    for mask, found in summary["features"].items():
        print(f"\nCKA of clean and occluded features after the last block, {mask}")
        for name, figures in found.items():
            print(f"{name}: " + ", ".join(f"{blocks[-1]:.2f}" for blocks in figures["cka"]))
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scale", choices=list(SCALES))
    parser.add_argument("data")
    parser.add_argument("photo")
    parser.add_argument("cues")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: runs/SCALE-SEED")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--together", type=int, default=4, help="trainings side by side")
    args = parser.parse_args()
    args.out = args.out or Path("runs", f"{args.scale}-{args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.scale == "tiny":
        args.together = 1
    found = starts(args.scale, args.data, args.photo)
    side_by_side([partial(train_start, *item, args) for item in found.items()], args.together)

    options = ["--data", args.data, "--mask-seeds", "1", "--workers", str(args.workers)]
    tuned = [str(args.out / f"ft-{name}") for name in found]
    tuned = [path for path in tuned if Path(path, "result.json").exists()]
    encoders = [str(args.out / name) for name, pretraining in found.items() if pretraining]
    encoders += [path for path in tuned if path.endswith("ft-scratch")]
    encoders = [path for path in encoders if Path(path, "checkpoint.pt").exists()]
    images = {"tiny": "60", "laptop": "2000"}.get(args.scale, "10000")
    cues = ["--num-images", images, "--cue-conflict", args.cues]
    features = [*encoders, *options, "--num-images", "1000", "--features"]
    accuracy = [*tuned, *options, *cues]
    jobs = [partial(run, "eval_occlusion.py", args.out / "occlusion", *accuracy)]
    jobs.append(partial(run, "eval_occlusion.py", args.out / "features", *features))
    side_by_side(jobs, args.together)
    summarize(found, args)


if __name__ == "__main__":
    main()
