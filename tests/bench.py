# SPDX-License-Identifier: MIT
"""Images per second of whole training steps: ours, transformers' ViTMAE and timm's ViT.

    python tests/bench.py                CPU: --steps, --turns; CUDA: cut off after --seconds
    BENCH_TINY=1 python tests/bench.py   what runs on CUDA, on the CPU and with toy sizes

Equal work: ViT-Ti/4 at 32 x 32, decoder 192 x 4 blocks (1 in ours_mae, ours_relax, ours_infonce),
mask ratio 0.75. Ours is the scripts as users run them; the others train plainly on the same crops.
CPU: batch 128, two threads, in turn, medians. CUDA: batch 2,048, float32 not compiled, a process
for each variant; those of a wave compile side by side from cold caches (so first_step_s is an upper
bound), then measure alone. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval_occlusion
import finetune
import relaxmim

TINY = os.environ.get("BENCH_TINY") == "1"
CUDA = torch.cuda.is_available() and not TINY
DEVICE = "cuda" if CUDA else "cpu"
NATIVE = CUDA or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
BATCH = 2048 if CUDA else 8 if TINY else 128
BASE = (4, 8, 16) if TINY else (256, 512, 1024)  # batches of ViT-B/16
STEPS, SKIP, READY = (8, 6, 4) if TINY else (60, 20, 5)  # of a variant on CUDA
MODES = {"reduce-overhead": {"mode": "reduce-overhead"}, "cudagraphs": {"backend": "cudagraphs"}}
SIZE = {"tiny": ("tiny", 32, 4), "base": ("base", 224, 16), "large": ("large", 224, 16)}
if TINY:
    SIZE = dict.fromkeys(SIZE, ("nano", 16, 4))
    torch.compile = partial(torch.compile, backend="eager")
SHAPE = {key: (side, p, 3, *relaxmim.SIZES[model]) for key, (model, side, p) in SIZE.items()}


class Enough(Exception): ...


class Clock:
    """Takes the time at the start of each step. skip: the first that counts; stop: the end."""

    def __init__(self, stop, skip=1):
        self.stop, self.skip, self.times = stop, skip, []

    def tick(self):
        n = len(self.times)
        if CUDA and n in (1, READY, self.skip, self.stop):
            torch.cuda.synchronize()
        if n == READY < self.skip:  # compiled: tell the parent, and wait until alone
            signal.alarm(0)
            print("ready", file=sys.__stdout__, flush=True)
            sys.stdin.readline()
            signal.alarm(60)  # it ends the process
        self.times.append(time.perf_counter())
        if n == self.stop:
            raise Enough


@contextlib.contextmanager
def quiet():
    """A temporary folder; what is printed is lost."""
    with TemporaryDirectory() as folder, open(f"{folder}/printed", "w") as file:  # noqa: SIM117
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield folder


def compiled(mode, model, *ignored):
    """The model, compiled in one of several ways. Takes the place of relaxmim.wrap."""
    if mode in ("whole", *MODES):
        return torch.compile(model, **MODES.get(mode, {}))
    for module in model.modules():
        if mode == "regional" and isinstance(module, relaxmim.Block):
            module.compile()
    return model


def script(clock, module, mode="", size="tiny", **options):
    """Clock the loop of a script, which asks for the learning rate once a step."""
    rate = relaxmim.learning_rate
    clocked = patch.object(relaxmim, "learning_rate", lambda *step: clock.tick() or rate(*step))
    if mode:
        relaxmim.wrap = partial(compiled, mode)
    options = {"steps": 4000, "batch_size": BATCH, "device": DEVICE, **options}
    options.update(zip(("model", "img_size", "patch_size"), SIZE[size]))
    with quiet() as folder, suppress(Enough), clocked:
        module.train(module.Config(out=f"{folder}/run", **options))


def plain(clock, model, loss, precision="float32", mode="", batch=BATCH, size="tiny"):
    """Clock a plain loop over the same crops. loss: (model, images) -> loss."""
    optimizer = torch.optim.AdamW(model.to(DEVICE).train().parameters(), lr=1e-4, fused=True)
    net = compiled(mode, model)
    pixels = relaxmim.synthetic_images(range(64), SHAPE[size][0]).to(DEVICE)
    with suppress(Enough):
        while True:
            clock.tick()
            images = pixels[torch.randint(64, (batch,), device=DEVICE)]
            draws = torch.rand(batch, 5, device=DEVICE)
            crops = relaxmim.random_crops(images, SHAPE[size][0], draws)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
                value = loss(net, relaxmim.normalize(crops))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()


def vitmae(clock, **options):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    img_size, patch_size, _, width, depth, heads = SHAPE["tiny"]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    sizes.update({f"decoder_{name}": value for name, value in sizes.items()})
    sizes.update(num_hidden_layers=depth, decoder_num_hidden_layers=4)
    config = ViTMAEConfig(image_size=img_size, patch_size=patch_size, norm_pix_loss=True, **sizes)
    plain(clock, ViTMAEForPreTraining(config), lambda m, x: m(x).loss, **options)


def timm_vit(clock, **options):
    from timm.models import VisionTransformer

    img_size, patch_size, _, width, depth, heads = SHAPE["tiny"]
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "global_pool": "avg"}
    model = VisionTransformer(img_size, patch_size, num_classes=6, **sizes)
    y = torch.randint(6, (BATCH,), device=DEVICE)
    plain(clock, model, lambda m, x: torch.nn.functional.cross_entropy(m(x), y), **options)


def same_loss(clock, loss):
    """Largest relative difference of the loss of any step: by compilation; by bfloat16 itself."""
    relaxmim.LOG_EVERY = 1
    size = {"steps": 4, "batch_size": 8} if TINY else {"steps": 200, "batch_size": 128}
    curves = []
    for choice, precision in (("no", "bfloat16"), ("yes", "bfloat16"), ("no", "float32")):
        options = {"loss": loss, "compile": choice, "precision": precision, "device": DEVICE}
        with quiet() as folder:
            relaxmim.train(relaxmim.Config(out=f"{folder}/run", **size, **options))
            lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
        curves.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
    apart = [round((curve / curves[0] - 1).abs().max().item(), 5) for curve in curves[1:]]
    return {f"same_loss_{loss}": apart[0], f"same_loss_{loss}_float32": apart[1]}


def first_command():
    """Seconds of the README's first command, start and end included."""
    command = f"{sys.executable} {relaxmim.__file__} --loss infonce --num-images 1"
    command += " --steps 3" * TINY
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        failed = subprocess.call(command.split(), cwd=folder, stdout=subprocess.DEVNULL)
    return None if failed else round(time.perf_counter() - start, 1)


def matrix_rate(dtype):
    """GFLOP/s of a large matrix product."""
    n = 8192 if CUDA else 256 if TINY else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return round(2 * n**3 / timer.blocked_autorange(min_run_time=0.5).median / 1e9, 1)


def eval_10k():
    """Seconds in which eval_occlusion.py measures 10,000 images at five ratios, one mask."""
    n, side = 100 if TINY else 10_000, SHAPE["tiny"][0]
    pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8)
    images = relaxmim.Images([""] * n, torch.arange(n) % 6, relaxmim.SHAPES, pixels)
    model = finetune.Classifier(*SHAPE["tiny"], num_classes=6).eval().to(DEVICE)
    subject = eval_occlusion.Subject("", model, {"img_size": side}, relaxmim.SHAPES, images)
    task = eval_occlusion.Config(mask_seeds=1), subject, "random", [0, 0.25, 0.5, 0.75, 0.9]
    start = time.perf_counter()
    with torch.no_grad():
        eval_occlusion.accuracy_curve(*task)
    return round(time.perf_counter() - start, 2)


def link_images(folder, size, name, count):
    """Write one synthetic image of size (width, height) to folder, and links to it."""
    pixels = relaxmim.synthetic_images([0], max(size))
    relaxmim.tv.to_pil_image(pixels[0]).resize(size).save(f"{folder}/{name}")
    for i in range(1, count):
        os.symlink(name, f"{folder}/{i}{name}")


def open_folder():
    """Seconds in which a folder of 50,000 images of 32 x 32 is read into memory by all cores."""
    with TemporaryDirectory() as folder:
        link_images(folder, (32, 32), "0.png", 1100 if TINY else 50_000)
        start = time.perf_counter()
        relaxmim.open_data(relaxmim.Config(data=folder, workers=os.cpu_count()))
        return round(time.perf_counter() - start, 2)


def streamed_per_worker():
    """Images per second that one worker streams: JPEGs of 500 x 375, for crops of 224."""
    count = 80 if TINY else 1000
    with TemporaryDirectory() as folder:
        link_images(folder, (500, 375), "0.jpg", count)
        images = relaxmim.open_data(relaxmim.Config(data=folder, img_size=224, cache_gb=0))
        batches = images.batches(torch.arange(count).split(20), "cpu", workers=1)
        next(batches)  # the worker has started
        start = time.perf_counter()
        read = sum(len(pixels) for pixels, _ in batches)
        return round(read / (time.perf_counter() - start), 1)


def largest_batch(size):
    """Largest batch of mae in bfloat16 that fits 78 GiB, not compiled."""
    if CUDA:
        card = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, 78 * 2**30 / card))
    model = relaxmim.RelaxMIM(relaxmim.ViT(*SHAPE[size]), "mae")
    largest = 0
    with suppress(torch.OutOfMemoryError):
        for batch in (8, 16) if TINY else range(512, 8193, 512):
            plain(Clock(2), model, lambda m, x: m(x)[0], "bfloat16", batch=batch, size=size)
            largest = batch
    return largest


pretrain = partial(script, module=relaxmim, num_images=64, decoder_depth=1, loss="mae")
equal = partial(pretrain, decoder_depth=4)
fine = partial(script, module=finetune, num_labels=500)
bf16, fp32 = {"precision": "bfloat16"}, {"precision": "float32", "mode": "eager"}
VARIANTS = {
    "ours_default": equal,
    "ours_eager": partial(equal, mode="eager"),
    "ours_infonce": partial(pretrain, loss="infonce"),
    "ours_relax": partial(pretrain, loss="relax"),
    "ours_mae": pretrain,
    **{f"base_{batch}": partial(pretrain, size="base", batch_size=batch) for batch in BASE},
    "vitmae_bf16": partial(vitmae, **bf16),
    "vitmae_compiled": partial(vitmae, **bf16, mode="whole"),
    **{f"ours_{mode}": partial(equal, mode=mode) for mode in ("whole", "regional", *MODES)},
    **{f"same_loss_{loss}": partial(same_loss, loss=loss) for loss in relaxmim.SIMILARITIES},
    "finetune_bf16": partial(fine, **bf16),
    "timm_compiled": partial(timm_vit, **bf16, mode="whole"),
    "ours_fp32": partial(equal, **fp32),
    "vitmae_fp32": vitmae,
    "finetune_fp32": partial(fine, **fp32),
    "timm_fp32": timm_vit,
}
NAMES = list(VARIANTS)  # the most important first
WAVES = NAMES[:7], NAMES[7:17], NAMES[17:]  # what waits together must fit in 80 GB
ON_CPU = ["ours_default", "ours_mae", "ours_relax", "ours_infonce"]
ON_CPU += [name for name in NAMES if name.endswith(("fp32", "bf16"))]


def report(result, name, value):
    """Keep a figure, and print it."""
    result[name] = value
    print(f"{name:36}{value!s:>12}", flush=True)


def measure(name):
    """One variant on CUDA: print its figures as a line of JSON."""
    signal.alarm(300 if TINY else 120)  # until it is prepared
    clock = Clock(STEPS, SKIP)
    found = VARIANTS[name](clock) or {}
    if clock.times:
        batch = int(name[5:]) if name.startswith("base_") else BATCH
        found[name] = round(batch * (STEPS - SKIP) / (clock.times[-1] - clock.times[SKIP]), 1)
        found[f"first_step_s_{name}"] = round(clock.times[1] - clock.times[0], 1)
        found[f"gib_{name}"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print(json.dumps(found), flush=True)


def wave(result, names, folder):
    """Let variants prepare side by side, then measure one after the other."""
    running = {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        for name in names:
            own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{name}"}
            running[name] = subprocess.Popen([sys.executable, __file__, name], env=own, **pipes)
            stack.callback(running[name].kill)
        lines = [process.stdout.readline() for process in running.values()]
        for (name, process), line in zip(running.items(), lines):
            if line == "ready\n":
                print("go", file=process.stdin, flush=True)
                line = process.stdout.readline()
            process.kill()
            process.wait()
            for key, value in json.loads(line or f'{{"{name}": null}}').items():
                report(result, key, value)


def on_cuda(result):
    """All variants, each in a process of its own, then what is measured in this one."""
    report(result, "first_command_s", first_command())
    model = relaxmim.RelaxMIM(relaxmim.ViT(*SHAPE["base"]), "mae")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, SHAPE["base"][0], SHAPE["base"][0]))[0].backward()
    report(result, "base_gflop", round(counter.get_total_flops() / 2e9, 2))  # of an image
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for names in WAVES:
            wave(result, names, folder)
            best = max(result[f"base_{batch}"] or 0 for batch in BASE if f"base_{batch}" in result)
            result["base_mae_tflops"] = round(best * result["base_gflop"] / 1000, 1)
            result["vitmae_eager"] = result.get("vitmae_bf16")
    report(result, "eval_10k_s", eval_10k())
    for size in ("base", "large"):
        report(result, f"{size}_mae_largest_batch", largest_batch(size))


def on_cpu(result, steps, turns):
    """All contenders in turn. bfloat16 only where it is native."""
    seconds = {name: [] for name in ON_CPU}
    for name in turns * ON_CPU:
        if NATIVE or not name.endswith("bf16"):
            clock = Clock(steps + 1)
            VARIANTS[name](clock)
            seconds[name] += [b - a for a, b in zip(clock.times[1:], clock.times[2:])]
    for name, found in seconds.items():
        report(result, name, round(BATCH / statistics.median(found), 1) if found else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="?", help="CUDA: only this; < /dev/null")
    for name, default in (("--seconds", 340), ("--steps", 5), ("--turns", 3)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    if options.variant:
        return measure(options.variant)
    torch.set_num_threads(16 if CUDA else 2)
    result = {}
    report(result, "fp32_gflops", matrix_rate(torch.float32))
    report(result, "bf16_gflops", matrix_rate(torch.bfloat16) if NATIVE else None)
    if CUDA or TINY:
        signal.signal(signal.SIGALRM, lambda *_: sys.exit("out of time"))
        signal.alarm(options.seconds)
        with suppress(SystemExit):
            on_cuda(result)
    else:
        on_cpu(result, options.steps, options.turns)
    result["ours_bf16"] = result.get("ours_default") if NATIVE else None  # the default there
    report(result, "open_folder_s", open_folder())
    report(result, "streamed_per_worker", streamed_per_worker())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
