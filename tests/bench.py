# SPDX-License-Identifier: MIT
"""Images per second of whole training steps, beside transformers' ViTMAE and timm's ViT.

    python tests/bench.py                CPU: about five minutes on two cores
    python tests/bench.py --photos DIR   CUDA, cut off after --seconds; DIR: photographs to stream
    BENCH_TINY=1 python tests/bench.py   both with toy sizes, on the CPU, to try the script

Ours are the scripts as users run them. The others train in a plain loop on the same crops. ViT-Ti/4
at 32 x 32, 75 % of the patches hidden. In the comparison with ViTMAE, both have the same decoder:
192 x 4 blocks ("equal"), or that of the published MAE ("512x8"). CPU: batch 128, all in turn,
medians. CUDA: batch 2,048, bfloat16; ours compile themselves, with CUDA graphs, and the others,
where "compiled", by torch.compile's defaults. Each variant has a process of its own. They compile
side by side, then are measured one after the other. The last line is one JSON object.
"""

import argparse
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
import relaxmim

TINY = os.environ.get("BENCH_TINY") == "1"
CUDA = torch.cuda.is_available() and not TINY
DEVICE = "cuda" if CUDA else "cpu"
CAPABILITIES = getattr(torch.cpu, "get_capabilities", dict)()
NATIVE = CUDA or CAPABILITIES.get("avx512_bf16", False)  # bfloat16
BATCH = 2048 if CUDA else 128
BASE_BATCHES = (512, 1024)  # of ViT-B/16
READY, START, STOP = 5, 20, 60  # steps: compiled; measured from here; to here
SIZES = {"tiny": ("tiny", 32, 4), "base": ("base", 224, 16)}  # model, img_size, patch_size
if TINY:
    BATCH = 8
    BASE_BATCHES = (4, 8)
    READY, START, STOP = 2, 3, 5
    SIZES = {"tiny": ("nano", 16, 4), "base": ("nano", 16, 4)}
    torch.compile = partial(torch.compile, backend="eager")

# -------------------------------------------------------------------------------------- Clocks


class Enough(Exception):
    """Ends a training that has been measured."""


class Clock:
    """Takes the time at the start of every step, 0 to stop. wait_at: the step to wait at."""

    def __init__(self, start, stop, wait_at=None):
        self.start = start
        self.stop = stop
        self.wait_at = wait_at
        self.times = []

    def tick(self):
        step = len(self.times)
        if CUDA and step in (self.wait_at, self.start, self.stop):
            torch.cuda.synchronize()
        if step == self.wait_at:
            tell_parent()
        self.times.append(time.perf_counter())
        if step == self.stop:
            raise Enough

    def rate(self, batch):
        """Images per second."""
        seconds = self.times[self.stop] - self.times[self.start]
        return round(batch * (self.stop - self.start) / seconds, 1)


def tell_parent():
    """Tell the parent that all is compiled, and wait until no other process computes."""
    signal.alarm(0)
    print("ready", file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    signal.alarm(60)  # ends this process


def run_script(clock, module, size="tiny", batch=BATCH, **options):
    """Clock a script's own loop, which asks for the learning rate once a step."""
    model, img_size, patch_size = SIZES[size]
    learning_rate = relaxmim.learning_rate

    def clocked(step, config):
        clock.tick()
        return learning_rate(step, config)

    options = {"steps": 4000, "batch_size": batch, "device": DEVICE, **options}
    options.update(model=model, img_size=img_size, patch_size=patch_size)
    out = redirect_stdout(io.StringIO())
    err = redirect_stderr(io.StringIO())
    clocking = patch.object(relaxmim, "learning_rate", clocked)
    with TemporaryDirectory() as folder, out, err, clocking, suppress(Enough):
        module.train(module.Config(out=f"{folder}/run", **options))


def run_plain(clock, model, loss_of, precision="bfloat16", compiled=False):
    """Clock a plain loop over the same crops. loss_of: (model, images) -> loss."""
    img_size = SIZES["tiny"][1]
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        model = torch.compile(model)
    pixels = relaxmim.synthetic_images(range(64), img_size).to(DEVICE)
    with suppress(Enough):
        while True:
            clock.tick()
            images = pixels[torch.randint(64, (BATCH,), device=DEVICE)]
            u = torch.rand(BATCH, 5, device=DEVICE)
            crops = relaxmim.random_crops(images, img_size, u)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = loss_of(model, relaxmim.normalize(crops))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


# ------------------------------------------------------------------------------------ Variants


def vitmae(clock, decoder_dim=192, decoder_depth=4, **options):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model, img_size, patch_size = SIZES["tiny"]
    width, depth, heads = relaxmim.SIZES[model]
    config = ViTMAEConfig(
        image_size=img_size,
        patch_size=patch_size,
        norm_pix_loss=True,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder_dim,
        decoder_num_hidden_layers=decoder_depth,
        decoder_num_attention_heads=decoder_dim // 32,
        decoder_intermediate_size=4 * decoder_dim,
    )
    run_plain(clock, ViTMAEForPreTraining(config), lambda net, x: net(x).loss, **options)


def timm_vit(clock, **options):
    from timm.models import VisionTransformer

    model, img_size, patch_size = SIZES["tiny"]
    width, depth, heads = relaxmim.SIZES[model]
    vit = VisionTransformer(
        img_size,
        patch_size,
        num_classes=6,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        global_pool="avg",
    )
    labels = torch.randint(6, (BATCH,), device=DEVICE)
    run_plain(clock, vit, lambda net, x: F.cross_entropy(net(x), labels), **options)


pretrain = partial(run_script, module=relaxmim, num_images=64, loss="mae")
equal = partial(pretrain, decoder_dim=192, decoder_depth=4)
classify = partial(run_script, module=finetune, num_train=500)
published = {"decoder_dim": 512, "decoder_depth": 8}
FLOAT = {"precision": "float32"}
BFLOAT = {"precision": "bfloat16"}

ON_CPU = {
    "mae": pretrain,
    "infonce": partial(pretrain, loss="infonce"),
    "relax": partial(pretrain, loss="relax"),
    "finetune_bf16": partial(classify, **BFLOAT),
    "finetune_fp32": partial(classify, **FLOAT),
    "timm_fp32": partial(timm_vit, **FLOAT),
    "equal_bf16": partial(equal, **BFLOAT),
    "equal_vitmae_bf16": partial(vitmae, **BFLOAT),
    "equal_fp32": partial(equal, **FLOAT),
    "equal_vitmae_fp32": partial(vitmae, **FLOAT),
}
ON_CUDA = {  # the scripts compile by default
    "equal": equal,
    "equal_vitmae": vitmae,
    "equal_vitmae_compiled": partial(vitmae, compiled=True),
    "finetune": classify,
    "timm": timm_vit,
    "timm_compiled": partial(timm_vit, compiled=True),
    "512x8": partial(pretrain, **published),
    "512x8_vitmae": partial(vitmae, **published),
    "512x8_vitmae_compiled": partial(vitmae, **published, compiled=True),
}
for batch in BASE_BATCHES:
    ON_CUDA[f"base_{batch}"] = partial(pretrain, size="base", batch=batch)

# ------------------------------------------------------------------------------- Other figures


def loss_curve(loss, compiled, precision):
    """The loss at each of 200 steps."""
    relaxmim.LOG_EVERY = 1
    options = {"loss": loss, "compile": compiled, "precision": precision, "device": DEVICE}
    options["steps"] = 200
    if TINY:
        options.update(steps=4, batch_size=8, num_images=8)
    out = redirect_stdout(io.StringIO())
    err = redirect_stderr(io.StringIO())
    with TemporaryDirectory() as folder, out, err:
        relaxmim.train(relaxmim.Config(out=f"{folder}/run", **options))
        lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines])


def compare_losses(loss):
    """Largest relative difference of the loss at any step: through CUDA graphs; and for
    comparison, through bfloat16.
    """
    eager = loss_curve(loss, "no", "bfloat16")
    graphs = loss_curve(loss, "yes", "bfloat16")
    exact = loss_curve(loss, "no", "float32")
    return {
        f"{loss}_changed_by_graphs": (graphs / eager - 1).abs().max().item(),
        f"{loss}_changed_by_bfloat16": (eager / exact - 1).abs().max().item(),
    }


def matrix_rate(dtype):
    """GFLOP/s of a large matrix product."""
    n = 8192 if CUDA else 256 if TINY else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    seconds = timer.blocked_autorange(min_run_time=0.5).median
    return round(2 * n**3 / seconds / 1e9, 1)


def gflop_an_image(size):
    """Of one step of mae, forward and backward."""
    model, img_size, patch_size = SIZES[size]
    encoder = relaxmim.ViT(img_size, patch_size, 3, *relaxmim.SIZES[model])
    mae = relaxmim.MAE(encoder)
    with FlopCounterMode(display=False) as counter:
        loss, _ = mae(torch.randn(2, 3, img_size, img_size))
        loss.backward()
    return counter.get_total_flops() / 2e9


def streamed(folder, workers):
    """Photographs per second that are read, decoded and cropped to 224 x 224."""
    config = relaxmim.Config(data=folder, img_size=224, cache_gb=0)
    images = relaxmim.open_data(config)
    size = 32
    warm = 4 * workers
    count = 5 * warm if TINY else 40 * workers
    order = relaxmim.batch_order(len(images), size, warm + count, seed=0)
    batches = images.batches(order, torch.device("cpu"), workers)
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    read = sum(len(pixels) for pixels, _ in batches)
    return round(read / (time.perf_counter() - start), 1)


def write_photos(folder, count):
    """Write synthetic JPEGs of 500 x 375 pixels, in the place of photographs."""
    pixels = relaxmim.synthetic_images([0], 500)[0, :, :375]
    picture = relaxmim.tv.to_pil_image(pixels)
    for i in range(count):
        picture.save(f"{folder}/{i}.jpg", quality=90)


# ----------------------------------------------------------------------------------- Measuring


def report(result, figures):
    """Keep figures, and print them."""
    result.update(figures)
    for name, value in figures.items():
        print(f"{name:32} {value}", flush=True)


def measure_variant(name):
    """In a process of its own: print the figures of a variant as a line of JSON."""
    signal.alarm(150)  # until all is compiled
    if name.startswith("losses_"):
        figures = compare_losses(name.removeprefix("losses_"))
        print(json.dumps(figures), flush=True)
        return
    clock = Clock(START, STOP, wait_at=READY)
    ON_CUDA[name](clock)
    batch = int(name.removeprefix("base_")) if name.startswith("base_") else BATCH
    figures = {name: clock.rate(batch)}
    if CUDA:
        figures[f"{name}_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print(json.dumps(figures), flush=True)


def measure_together(result, names):
    """Let variants compile side by side, then measure one after the other."""
    processes = {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        for name in names:
            command = [sys.executable, __file__, "--variant", name]
            processes[name] = subprocess.Popen(command, **pipes)
        lines = {name: process.stdout.readline() for name, process in processes.items()}
        for name, process in processes.items():
            line = lines[name]
            if line == "ready\n":
                print("go", file=process.stdin, flush=True)
                line = process.stdout.readline()
            process.kill()
            process.wait()  # its memory is free
            report(result, json.loads(line) if line else {name: None})
    finally:
        for process in processes.values():
            process.kill()


def on_cuda(result):
    """The most important first. What is in one list must fit into the memory together."""
    base = [f"base_{batch}" for batch in BASE_BATCHES]
    peers = ["equal", "equal_vitmae", "equal_vitmae_compiled"]
    measure_together(result, [*peers, *base, "losses_mae"])
    gflop = gflop_an_image("base")
    best = max(result[name] or 0 for name in base)
    tflops = round(best * gflop / 1000, 1)
    report(result, {"base_gflop": round(gflop, 2), "base_tflops": tflops})
    peers = ["finetune", "timm", "timm_compiled"]
    measure_together(result, [*peers, "losses_infonce", "losses_relax"])
    measure_together(result, ["512x8", "512x8_vitmae", "512x8_vitmae_compiled"])


def on_cpu(result, turns):
    """All variants in turn, five steps each time; medians over all steps."""
    seconds = {name: [] for name in ON_CPU if NATIVE or not name.endswith("bf16")}
    for _ in range(turns):
        for name, steps in seconds.items():
            clock = Clock(start=1, stop=6)  # the first step is slower
            ON_CPU[name](clock)
            times = clock.times[1:]
            steps += [after - before for before, after in pairwise(times)]
    for name, steps in seconds.items():
        report(result, {name: round(BATCH / statistics.median(steps), 1)})


def stop_late(number, frame):
    raise TimeoutError


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--photos", help="default: synthetic JPEGs of 500 x 375")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--turns", type=int, default=1 if TINY else 3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        measure_variant(args.variant)
        return
    name = torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine()
    result = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    report(result, {"fp32_gflops": matrix_rate(torch.float32)})
    if NATIVE:
        report(result, {"bf16_gflops": matrix_rate(torch.bfloat16)})
    with TemporaryDirectory() as folder:
        if not args.photos:
            write_photos(folder, 80 if TINY else 1000)
        workers = os.cpu_count()
        figure = f"streamed_{workers}_workers"
        report(result, {figure: streamed(args.photos or folder, workers)})
    if CUDA or TINY:
        signal.signal(signal.SIGALRM, stop_late)
        signal.alarm(args.seconds)
        with suppress(TimeoutError):
            on_cuda(result)
        signal.alarm(0)
    if not CUDA:
        on_cpu(result, args.turns)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
