# SPDX-License-Identifier: MIT
"""Images per second of whole training steps: ours, transformers' ViTMAE and timm's ViT, in turn.

    pip install transformers timm
    python tests/bench.py

ViT-Ti/4 at 32 x 32 (width 192, depth 12, 3 heads; decoder 192 x 4 blocks), mask ratio 0.75, batch
128, two threads on a CPU. Ours is `relaxmim.train` and `finetune.train` as users run them, data,
optimizer and log included; the others are trained in the plain way on the same crops. Medians over
all steps of all turns, the first of each turn left out. bfloat16 only where the CPU multiplies it
natively. The last line is one JSON object.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import timm
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
import relaxmim

BATCH, STEPS, TURNS = 128, 7, 3
DEVICE = relaxmim.pick_device(relaxmim.Config())[0]


def gflops(dtype, n=2048):
    """Rate of a large matrix product."""
    a, seconds = torch.randn(n, n, device=DEVICE, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds) / 1e9


def ours(main, *options):
    """Seconds of each step of a script's run; its loop asks for the learning rate once a step."""
    times, rate = [], relaxmim.learning_rate

    def clocked(step, config):
        times.append(time.perf_counter())
        return rate(step, config)

    relaxmim.learning_rate = clocked
    options = ["--model", "tiny", "--batch-size", str(BATCH), "--steps", str(STEPS + 1), *options]
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, out, err:
        main([*options, "--out", f"{folder}/run"])
    relaxmim.learning_rate = rate
    return [b - a for a, b in pairwise(times)]


def plain(model, loss, dtype=None):
    """Seconds of each step but the first of a plain loop over the same crops."""
    optimizer = torch.optim.AdamW(model.to(DEVICE).train().parameters(), lr=1e-3)
    names = [f"x/{i}" for i in range(500)]
    data = relaxmim.Images(names, relaxmim.synthetic_images(range(500), 32))
    times, indices = [], (torch.randint(500, (BATCH,)).tolist() for _ in range(STEPS + 2))
    for _, pixels in data.batches(indices, DEVICE):
        times.append(time.perf_counter())
        images = relaxmim.random_crops(pixels, torch.rand(5, BATCH, device=DEVICE), 32)
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            value = loss(model, images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        value.item()
    return [b - a for a, b in pairwise(times[1:])]


def vitmae(dtype=None):
    config = ViTMAEConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        decoder_hidden_size=192,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=768,
        norm_pix_loss=True,
    )
    return plain(ViTMAEForPreTraining(config), lambda model, x: model(x).loss, dtype)


def timm_vit():
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    model = timm.models.VisionTransformer(**sizes, num_classes=6, global_pool="avg")
    target = torch.randint(6, (BATCH,), device=DEVICE)
    return plain(model, lambda m, x: torch.nn.functional.cross_entropy(m(x), target))


def main():
    if DEVICE == "cpu":
        torch.set_num_threads(2)
    pretrain = relaxmim.main, "--decoder-depth", "4", "--loss"
    native = DEVICE != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    contenders = {
        "ours_default": lambda: ours(*pretrain, "mae"),
        "ours_fp32": lambda: ours(*pretrain, "mae", "--precision", "float32"),
        "vitmae_fp32": vitmae,
        "ours_relax": lambda: ours(*pretrain, "relax"),
        "ours_infonce": lambda: ours(*pretrain, "infonce"),
        "finetune_fp32": lambda: ours(finetune.main, "--precision", "float32"),
        "timm_fp32": timm_vit,
    }
    if native:
        contenders["ours_bf16"] = lambda: ours(*pretrain, "mae", "--precision", "bfloat16")
        contenders["vitmae_bf16"] = lambda: vitmae(torch.bfloat16)
    seconds = {name: [] for name in contenders}
    for _ in range(TURNS):
        for name, run in contenders.items():
            seconds[name] += run()
    result = {"ours_bf16": None, "vitmae_bf16": None}
    result |= {name: round(BATCH / statistics.median(s), 1) for name, s in seconds.items()}
    result["fp32_gflops"] = round(gflops(torch.float32), 1)
    result["bf16_gflops"] = round(gflops(torch.bfloat16), 1) if native else None
    for name, value in result.items():
        print(f"{name:16}{value or 'not native':>12}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
