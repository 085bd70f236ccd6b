# SPDX-License-Identifier: MIT
"""Measure what occlusion does to a model: accuracy, or features, as more of each image is hidden.

    python eval_occlusion.py runs/finetune-A runs/finetune-B   accuracy of classifiers, side by side
    python eval_occlusion.py runs/infonce-synthetic-1          features of an encoder without a head
    python eval_occlusion.py runs/finetune-A --fill swap         hidden behind other images' patches

Patches are hidden at random, in one block, or from the centre outwards. Every checkpoint sees the
same images behind the same masks. What is written: occlusion.json with all figures, occlusion.png
with what the models were shown, and occlusion-curve.png where matplotlib is installed.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler
from torchvision.utils import make_grid, save_image

from finetune import Classifier, choose, class_names, load_source, whole
from relaxmim import (
    MASKS,
    MEAN,
    SIZES,
    STD,
    ViT,
    fail,
    hide,
    open_data,
    option,
    parse,
    patchify,
    pick_device,
    places,
    set_seed,
    unpatchify,
)


@dataclass
class Config:
    """What to measure, and on what."""

    checkpoints: tuple = option((), "runs' folders or checkpoints, one or more")
    ratios: str = option("0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", "shares of the patches hidden")
    shapes: str = option("random,block,centre", "what is hidden: random, block, grid, centre")
    fill: str = option("drop", "what hidden patches show", "drop", "mean", "noise", "swap")
    mask_seeds: int = option(3, "masks tried on each image", 1, 1000)
    data: str = option("", "set or folder with labels; empty: the first checkpoint's")
    num_images: int = option(2000, "test images at most, taken at random; 0: all", 0, 10**9)
    data_dir: str = option("data", "where torchvision's sets are kept")
    cache_gb: float = option(4.0, "a folder larger than this is streamed, GiB", 0.0, 1e6)
    workers: int = option(2, "processes that read files", 0, 256)
    batch_size: int = option(250, "images at a time; features: in all", 2, 10**6)
    seed: int = option(0, "of images, masks and noise", 0, 2**31)
    out: str = option("runs/occlusion", "folder for what is written")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "of matrix products", "auto", "float32", "bfloat16")


def centre_mask(batch, grid, ratio, generator=None, device=None):
    """Hidden from the centre outwards, in squares; the same for every image but for ties."""
    extent = torch.tensor(grid, device=device)
    away = ((places(grid, device) + 0.5) / extent - 0.5).abs().amax(-1)  # (N,)
    ties = torch.rand(batch, len(away), generator=generator, device=device)
    return hide(away + 1e-3 * ties, ratio)


SHAPES = {**MASKS, "centre": centre_mask}


def occlude(images, mask, patch_size, fill):
    """Images (B, C, H, W) whose hidden patches are grey ("drop" too: to be looked at), noise, or
    the patches of the batch's next image. Normalised values: 0 is the mean colour, noise has std 1.
    """
    other = {"noise": torch.randn_like(images), "swap": images.roll(1, 0)}
    patches = patchify(other.get(fill, torch.zeros_like(images)), patch_size)
    patches = torch.where(mask[..., None], patches, patchify(images, patch_size))
    rows, cols = images.shape[2] // patch_size, images.shape[3] // patch_size
    return unpatchify(patches, (rows, cols), patch_size)


def look(model, images, mask, fill):
    """The model's output for images of which `mask` is hidden."""
    if fill == "drop":
        return model(images, mask if mask.any() else None)
    return model(occlude(images, mask, model.patch_size, fill))


def open_model(path, device):
    """A checkpoint's Classifier, or its ViT where it has no head; and its configuration."""
    content = load_source(path)
    config, weights = content["config"], content["encoder"]
    try:
        size = config["img_size"], config["patch_size"], 3, *SIZES[config["model"]]
        if "head.weight" in weights:
            options = {"num_classes": len(weights["head.weight"]), "probe": config["linear_probe"]}
            model = Classifier(*size, **options)
        else:
            model = ViT(*size)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"{path}: its weights do not fit its config ({' '.join(str(error).split())[:120]})")
    return model.eval().to(device), config


def batches(config, data, img_size, device):
    """The test images, (B, 3, H, W), and their indices, in the order of all models."""
    every = BatchSampler(range(len(data)), config.batch_size, drop_last=False)
    for index, pixels in data.batches(every, device, config.workers):
        yield index, whole(pixels, img_size)


def masks(config, shape, ratio, seed, index, grid, device):
    """The masks (B, N) of the images `index`: a function of seed, shape, ratio and index alone."""
    stream = (seed * 100 + list(SHAPES).index(shape)) * 1000 + round(ratio * 999)
    set_seed(config.seed, stream * 2**20 + int(index[0]))
    return SHAPES[shape](len(index), grid, ratio, device=device)


@torch.no_grad()
def accuracies(config, model, data, labels, img_size, shape, ratios, device):
    """Accuracy at each ratio: a list of (mean, std) over the mask seeds."""
    found = []
    for ratio in ratios:
        per_seed = []
        for seed in range(config.mask_seeds if ratio else 1):
            right = 0
            for index, images in batches(config, data, img_size, device):
                mask = masks(config, shape, ratio, seed, index, model.grid, device)
                guess = look(model, images, mask, config.fill).argmax(1).cpu()
                right += (guess == labels[index]).sum().item()
            per_seed.append(right / len(data))
        found.append((mean(per_seed), stdev(per_seed) if len(per_seed) > 1 else 0.0))
    return found


def area(ratios, values):
    """Mean height of a curve over its range of ratios, by the trapezoid rule."""
    if len(ratios) < 2:
        return values[0]
    steps = zip(ratios, ratios[1:], values, values[1:])
    return sum((b - a) * (u + v) / 2 for a, b, u, v in steps) / (ratios[-1] - ratios[0])


def cka(a, b):
    """Linear centred kernel alignment of features (n, D) and (n, D'): 0..1 (Kornblith, 2019)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return ((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()


def cosine(a, b):
    """Mean cosine of features (n, D), centred over both."""
    centre = torch.cat([a, b]).mean(0)
    return F.cosine_similarity(a - centre, b - centre).mean().item()


@torch.no_grad()
def block_features(model, images, mask, fill):
    """Mean patch token after each block: a list of (B, D)."""
    found = []

    def keep(block, inputs, tokens):
        found.append(tokens[:, 1:].float().mean(1))

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    look(model, images, mask, fill)
    for hook in hooks:
        hook.remove()
    return found


def alignment(config, model, data, img_size, shape, ratios, device):
    """At each ratio, clean against occluded features: lists over the blocks of cosine and CKA."""
    found = []
    for ratio in ratios:
        pairs = []
        for index, images in batches(config, data, img_size, device):
            mask = masks(config, shape, ratio, 0, index, model.grid, device)
            clean = block_features(model, images, torch.zeros_like(mask), config.fill)
            pairs.append(list(zip(clean, block_features(model, images, mask, config.fill))))
        both = [[torch.cat(side) for side in zip(*block)] for block in zip(*pairs)]
        found.append({"cosine": [cosine(*b) for b in both], "cka": [cka(*b) for b in both]})
    return found


def draw(config, images, patch_size, shapes, ratios, path):
    """A row for each shape, a column for each ratio: what the models were shown."""
    shown, index = [], torch.arange(len(images))
    grid = images.shape[2] // patch_size, images.shape[3] // patch_size
    for shape in shapes:
        for ratio in ratios:
            mask = masks(config, shape, ratio, 0, index, grid, images.device)
            shown.append(occlude(images, mask, patch_size, config.fill)[0])
    shown = (torch.stack(shown).cpu() * STD + MEAN).div(255).clamp(0, 1)
    shown = F.interpolate(shown, scale_factor=max(1, 96 // images.shape[-1]))
    save_image(make_grid(shown, nrow=len(ratios), padding=4), path)


def draw_curves(found, ratios, path):
    """Accuracy over ratio, a panel for each shape; only where matplotlib can be imported."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no curve: matplotlib is not installed")
        return
    figure, panels = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for (shape, models), panel in zip(found.items(), panels[0]):
        for name, result in models.items():
            level = [value for value, _ in result["accuracy"]]
            panel.errorbar(ratios, level, [std for _, std in result["accuracy"]], label=name)
        panel.set(title=shape, xlabel="share of patches hidden", ylabel="accuracy")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def print_table(head, rows):
    """A Markdown table of strings."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |")


def evaluate(config, ratios, shapes):
    """All that is asked for, printed and written."""
    device, autocast = pick_device(config)
    opened = [open_model(path, device) for path in config.checkpoints]
    first, folder = opened[0][1], Path(config.out)
    config.data = config.data or first["data"]
    names = [Path(p).parent.name if Path(p).suffix else Path(p).name for p in config.checkpoints]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    has_head = [isinstance(model, Classifier) for model, _ in opened]
    config.img_size = first["img_size"]
    data = open_data(config, train=False)
    classes, n = sorted(set(class_names(data))), config.num_images or len(data)
    data = choose(data, np.random.default_rng([config.seed, 1]).permutation(len(data))[:n])
    labels = torch.tensor([classes.index(name) for name in class_names(data)])
    for name, (model, _), head in zip(names, opened, has_head):
        if head and model.head.out_features != len(classes):
            count = model.head.out_features
            fail(f"--data {config.data}: {len(classes)} classes; {name} has {count}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {folder}: {error.strerror}")

    result = {"config": asdict(config), "ratios": ratios, "images": len(data)}
    result |= {"accuracy": {}, "features": {}}
    shown = [f"{ratio:.0%}" for ratio in ratios]
    for shape in shapes:
        curves, rows, table = {}, [], {}
        for name, (model, c), head in zip(names, opened, has_head):
            with autocast:
                if not head:
                    arguments = (config, model, data, c["img_size"], shape, ratios, device)
                    table[name] = alignment(*arguments)
                    continue
                sizes = (c["img_size"], shape, ratios, device)
                found = accuracies(config, model, data, labels, *sizes)
            level = area(ratios, [value for value, _ in found])
            curves[name] = {
                "accuracy": found,
                "area": level,
                "kept": level / max(found[0][0], 1e-9),
            }
            cells = [f"{100 * value:.1f}±{100 * std:.1f}" for value, std in found]
            rows.append([name, *cells, f"{100 * level:.1f}", f"{100 * curves[name]['kept']:.0f}%"])
        if curves:
            print(
                f"\naccuracy in %, patches hidden: {shape}, fill: {config.fill}, {len(data)} images"
            )
            print_table(["checkpoint", *shown, "area", "kept"], rows)
            result["accuracy"][shape] = curves
        for name, found in table.items():
            print(
                f"\n{name}: clean against occluded features, cosine / CKA, patches hidden: {shape}"
            )
            depth = range(len(found[0]["cosine"]))
            rows = [
                [f"block {i + 1}", *(f"{f['cosine'][i]:.2f} / {f['cka'][i]:.2f}" for f in found)]
                for i in depth
            ]
            print_table(["after", *shown], rows)
            result["features"].setdefault(shape, {})[name] = found
    _, images = next(batches(config, data, first["img_size"], device))
    draw(config, images[:8], first["patch_size"], shapes, ratios, folder / "occlusion.png")
    if result["accuracy"]:
        draw_curves(result["accuracy"], ratios, folder / "occlusion-curve.png")
    (folder / "occlusion.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {folder}")


def main(args):
    config = parse(Config, __doc__, args)
    if not config.checkpoints:
        fail("checkpoints: name one or more runs' folders or checkpoint files")
    try:
        ratios = [float(part) for part in config.ratios.split(",")]
    except ValueError:
        ratios = [-1.0]
    if ratios != sorted(set(ratios)) or ratios[0] < 0 or ratios[-1] >= 1:
        fail(f"--ratios {config.ratios}: rising numbers from 0 to below 1, with commas")
    shapes = config.shapes.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            fail(f"--shapes {shape}: choose from {', '.join(SHAPES)}, with commas")
    evaluate(config, ratios, shapes)


if __name__ == "__main__":
    main(sys.argv[1:])
