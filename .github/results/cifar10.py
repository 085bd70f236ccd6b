# SPDX-License-Identifier: MIT
"""The tables on CIFAR-10. Every row and seed is pretrained, fine-tuned, measured, and filed.

    python .github/results/cifar10.py laptop DATA PHOTO CUES --seeds 0 1 2 --together 2
    python .github/results/cifar10.py gpu DATA PHOTO CUES --together 4 --workers 4
    python .github/results/cifar10.py alone DATA PHOTO CUES     mae alone, a long schedule
    python .github/results/cifar10.py tiny DATA PHOTO CUES      two steps of each, to try the script
    python .github/results/cifar10.py work                      count the work of every row

On two CPU cores a row of `laptop` takes 8 to 16 minutes with one thread, measuring included, relax
and crop 20 to 28: about four hours for all rows and three seeds. On one H200 the rows of `gpu` take
9 minutes.
DATA: CIFAR-10 as a folder of train/CLASS and test/CLASS, or "cifar10". PHOTO: one photograph. CUES:
a folder of cue-conflict images (Geirhos et al., 2019). Before sharing a GPU, start
`nvidia-cuda-mps-control -d`: it is faster.

Seed by seed, each row makes one file, .github/results/SCALE/ROW-SEED.json. A row whose file exists
is skipped, and one that was interrupted is resumed, so run the same command again. The training
runs, and what the scripts print (*.txt), are in --out. Accuracy is measured on all test images,
features on 2,000 of them. Each seed has its own weights, batches, crops, masks and random subsets.

Work is counted in fine-tunings: the floating-point operations of pretraining and fine-tuning,
divided by those of the fine-tuning of "scratch".
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
sys.path.insert(0, str(ROOT))

import finetune
import relaxmim

LAPTOP_ROWS = {  # options of pretraining; empty: none, trained from scratch
    "relax": "--loss relax --data DATA",
    "mae": "--loss mae --data DATA",
    "scratch": "",
    "infonce": "--loss infonce --data DATA",
    "scratch-as-mae": "",  # for as many steps as cost the work of both phases of mae
    "mae-photo": "--loss mae --data PHOTO",
    "infonce-photo": "--loss infonce --data PHOTO",
    "scratch-as-infonce": "",
    "infonce-10": "--loss infonce --data DATA --num-images 10",
    "crop": "--loss crop --data DATA",
    "infonce-synthetic": "--loss infonce",  # 5,000 synthetic images
}
GPU_ROWS = {
    "scratch": "",
    "scratch-twice": "",  # for twice the steps
    "mae": "--loss mae --data DATA",
    "relax": "--loss relax --data DATA",
    "infonce": "--loss infonce --data DATA",
    "infonce-photo": "--loss infonce --data PHOTO",
    "mae-photo": "--loss mae --data PHOTO",
    "infonce-synthetic": "--loss infonce --num-images 1",
}
TINY_ROWS = {
    "scratch": "",
    "relax": "--loss relax --data DATA",
    "mae": "--loss mae --data DATA",
    "infonce-photo": "--loss infonce --data PHOTO",
}
GPU = "--model tiny --batch-size 1024 --compile yes"
AUGMENT = "--drop-path 0.1 --cutmix 1.0 --mixup 0.2 --min-crop-scale 0.4"


class Scale(NamedTuple):
    """How large everything is."""

    rows: dict
    model: str  # as in `common`; to count its work
    common: str  # options of every training
    tuning: str  # options of fine-tuning
    steps: int  # of pretraining
    tune_steps: int  # of fine-tuning
    probe_steps: int = 0  # of the linear probe; 0: none


SCALES = {
    "gpu": Scale(GPU_ROWS, "tiny", GPU, AUGMENT, 2000, 1000, 300),
    "laptop": Scale(LAPTOP_ROWS, "nano", "--save-every 100", "--num-train 10000", 500, 250),
    "alone": Scale({"mae": GPU_ROWS["mae"]}, "tiny", GPU, AUGMENT, 24000, 7000),
    "tiny": Scale(TINY_ROWS, "nano", "--batch-size 8", AUGMENT, 2, 2, 2),
}

# ---------------------------------------------------------------------------------------- Work


def step_flops(model, *inputs):
    """Floating-point operations an image of one training step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        output = model(*inputs)
        loss = output[0] if isinstance(output, tuple) else output.sum()
        loss.backward()
    return counter.get_total_flops() / len(inputs[0])


def count_flops(model):
    """{"fine-tuning" or loss: floating-point operations an image}. model: a name in SIZES."""
    images = torch.randn(8, 3, 32, 32)
    size = (32, 4, 3, *relaxmim.SIZES[model])
    flops = {"fine-tuning": step_flops(finetune.Classifier(*size, num_classes=10), images)}
    for loss in ("mae", "relax", "infonce", "crop"):
        pretraining = relaxmim.LOSSES[loss](relaxmim.ViT(*size))
        views = [images, images] if loss == "crop" else [images]
        flops[loss] = step_flops(pretraining, *views)
    return flops


def tuning_steps(scale, row, flops):
    """Steps of fine-tuning: the scale's, or for a row from scratch those of its name."""
    if row == "scratch-twice":
        return 2 * scale.tune_steps
    if row.startswith("scratch-as-"):
        return round(scale.tune_steps * work(scale, row.removeprefix("scratch-as-"), flops))
    return scale.tune_steps


def work(scale, row, flops):
    """Pretraining and fine-tuning, in fine-tunings. Both have batches of the same size."""
    fine_tunings = tuning_steps(scale, row, flops) / scale.tune_steps
    if not scale.rows[row]:
        return fine_tunings
    loss = scale.rows[row].split()[1]
    relative = flops[loss] / flops["fine-tuning"]  # of a step
    return fine_tunings + relative * scale.steps / scale.tune_steps


def file_work():
    """Print the work of every row of laptop and gpu, and write it to work.json."""
    result = {}
    for name in ("laptop", "gpu"):
        scale = SCALES[name]
        flops = count_flops(scale.model)
        rows = {}
        print(f"\n{name}: an image takes")
        for kind, count in flops.items():
            print(f"    {kind:20} {count / 1e9:6.3f} GFLOP")
        print("| row | steps of fine-tuning | work, in fine-tunings |\n|---|---|---|")
        for row in scale.rows:
            steps = tuning_steps(scale, row, flops)
            rows[row] = {"tuning_steps": steps, "work": round(work(scale, row, flops), 4)}
            print(f"| {row} | {steps} | {rows[row]['work']:.2f} |")
        result[name] = {"flops_an_image": flops, "rows": rows}
    write_json(RESULTS / "work.json", result)


# ------------------------------------------------------------------------------------ One row


def row_options(scale, row, seed, flops, probes):
    """The options of each script that the row takes, with DATA, PHOTO and CUES for the paths."""
    common = f"{scale.common} --seed {seed}"
    steps = tuning_steps(scale, row, flops)
    measuring = f"--data DATA --mask-seeds 1 --seed {seed}"
    pretraining = scale.rows[row]
    options = {}
    if pretraining:
        options["pretraining"] = f"{pretraining} {common} --steps {scale.steps}"
    options["fine_tuning"] = f"--data DATA {common} {scale.tuning} --steps {steps}"
    if pretraining and scale.probe_steps and probes:
        probe = f"--data DATA --linear-probe {common} --compile no"
        options["probe"] = f"{probe} --steps {scale.probe_steps}"
    options["occlusion"] = f"{measuring} --num-images 0 --cue-conflict CUES"
    if pretraining or row == "scratch":
        options["features"] = f"{measuring} --num-images 2000 --features"
    return options


def run(script, runs, options, out, args):
    """Run one of the three scripts, on some runs. What it prints goes to a file beside `out`."""
    command = [str(path) for path in runs]
    command += [args.paths.get(word, word) for word in options.split()]
    command += ["--workers", str(args.workers), "--out", str(out)]
    with open(f"{out}.txt", "a") as file:
        if args.scale == "tiny":  # in this process: as good, and starts at once
            status = 0
            try:
                with redirect_stdout(file), redirect_stderr(file):
                    import_module(script).main(command)
            except SystemExit as error:
                status = error.code
        else:
            command = [sys.executable, str(ROOT / f"{script}.py"), *command]
            status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if status != 0:
        raise RuntimeError(f"{script}.py ended with status {status}; see {out}.txt")


def run_row(row, seed, args):
    """Pretrain, fine-tune, probe and measure one row. Returns what is filed."""
    name = f"{row}-{seed}"
    encoder = args.out / name
    tuned = args.out / f"ft-{name}"
    scale = SCALES[args.scale]
    options = row_options(scale, row, seed, args.flops, args.probes)
    record = {"row": row, "scale": args.scale, "seed": seed, "options": options}
    record["work"] = round(work(scale, row, args.flops), 4)
    record.update(environment(args))
    record["resumed"] = encoder.exists() or tuned.exists()  # then minutes are of the last part
    begun = time.time()
    minutes = {}

    pretrained = []
    if "pretraining" in options:
        pretrained = [encoder]
        run("relaxmim", [], f"{options['pretraining']} --resume", encoder, args)
        minutes["pretraining"] = round((time.time() - begun) / 60, 2)
        log = (encoder / "log.jsonl").read_text().splitlines()
        record["pretraining"] = json.loads(log[-1])
    run("finetune", pretrained, f"{options['fine_tuning']} --resume", tuned, args)
    record["accuracy"] = read_json(tuned / "result.json")["test_accuracy"]

    if "probe" in options:
        out = args.out / f"probe-{name}"
        run("finetune", pretrained, f"{options['probe']} --resume", out, args)
        probe = read_json(out / "result.json")
        record["linear"] = probe["test_accuracy"]
        record["neighbours"] = probe["test_accuracy_of_neighbours"]

    out = args.out / f"occlusion-{name}"
    run("eval_occlusion", [tuned], f"{options['occlusion']} --overwrite", out, args)
    measured = read_json(out / "occlusion.json")
    record["ratios"] = measured["ratios"]
    record["occlusion"] = {}
    for mask, models in measured["accuracy"].items():
        record["occlusion"][mask] = models[tuned.name]
    record["shape_bias"] = measured["shape_bias"][tuned.name]

    if "features" in options:
        out = args.out / f"features-{name}"
        subject = pretrained or [tuned]
        run("eval_occlusion", subject, f"{options['features']} --overwrite", out, args)
        record["features"] = {}
        for mask, models in read_json(out / "occlusion.json")["features"].items():
            record["features"][mask] = named_features(models, name)
    minutes["total"] = round((time.time() - begun) / 60, 2)
    record["minutes"] = minutes
    return record


def named_features(models, name):
    """Figures of one mask by what they are of: an encoder, or for scratch two other models."""
    if name in models:
        return {"encoder": models[name]}
    random = "random initialisation"
    return {"supervised": models[f"ft-{name}"], random: models[random]}


def environment(args):
    """Where the figures come from: commit, versions, device and date."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version()}
    versions["torch"] = torch.__version__
    versions["torchvision"] = torchvision.__version__
    result = {"commit": args.commit or done.stdout.strip(), "versions": versions}
    if torch.cuda.is_available():
        result["device"] = torch.cuda.get_device_name()
    else:
        result["device"] = f"{cpu_name()}, {args.threads} threads"
    result["date"] = time.strftime("%Y-%m-%d")
    return result


def cpu_name():
    """The model of the CPU."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def read_json(path):
    return json.loads(path.read_text())


def write_json(path, content):
    """Write all of a file, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


# ----------------------------------------------------------------------------------- All rows


def file_row(row, seed, args):
    """Run a row and file it, unless it is filed. Returns whether that went well."""
    name = f"{row}-{seed}"
    path = args.folder / f"{name}.json"
    if path.exists():
        return True
    try:
        record = run_row(row, seed, args)
    except Exception as error:  # noqa: BLE001 (the other rows go on)
        print(f"{name} failed: {error}", flush=True)
        return False
    write_json(path, record)
    minutes = record["minutes"]["total"]
    print(f"{name}: {record['accuracy']:.2%}, {minutes:.1f} minutes, {path}", flush=True)
    return True


def file_rows(units, args):
    """File all (row, seed), --together of them at a time. Returns for each whether it went well."""
    if args.scale == "tiny":
        return [file_row(row, seed, args) for row, seed in units]
    pool = ThreadPoolExecutor(args.together)
    futures = [pool.submit(file_row, row, seed, args) for row, seed in units]
    try:
        return [future.result() for future in futures]
    except KeyboardInterrupt:  # the scripts get it too, save, and end
        pool.shutdown(cancel_futures=True)
        raise SystemExit("interrupted; the same command resumes") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scale", choices=[*SCALES, "work"])
    parser.add_argument("data", nargs="?")
    parser.add_argument("photo", nargs="?")
    parser.add_argument("cues", nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", help="names, separated by commas; default: all of the scale")
    parser.add_argument("--together", type=int, default=2, help="rows at a time")
    parser.add_argument("--workers", type=int, default=1, help="of each script")
    parser.add_argument("--no-probes", dest="probes", action="store_false")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/SCALE")
    args = parser.parse_args()
    if args.scale == "work":
        file_work()
        return
    if args.cues is None:
        parser.error("DATA, PHOTO and CUES are needed")
    scale = SCALES[args.scale]
    rows = args.rows.split(",") if args.rows else list(scale.rows)
    for row in rows:
        if row not in scale.rows:
            parser.error(f"--rows {row}: must be among {', '.join(scale.rows)}")

    args.paths = {"DATA": args.data, "PHOTO": args.photo, "CUES": args.cues}
    args.out = args.out or Path("runs", args.scale)
    args.out.mkdir(parents=True, exist_ok=True)
    args.folder = args.out if args.scale == "tiny" else RESULTS / args.scale
    if args.together > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts
    args.threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    torch.set_num_threads(1)  # here, where little is computed, not in the scripts
    args.flops = count_flops(scale.model)
    units = [(row, seed) for seed in args.seeds for row in rows]
    if not all(file_rows(units, args)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
