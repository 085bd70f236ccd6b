# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9.1", "torchvision>=0.24.1", "numpy>=1.26.4", "tqdm>=4.66.1"]
# ///
"""Measure what occlusion does to a model: accuracy, or features, as more of each image is hidden.

    python eval_occlusion.py runs/finetune-A runs/finetune-B   accuracy of classifiers, side by side
    python eval_occlusion.py runs/infonce-synthetic-1          features of an encoder without a head
    python eval_occlusion.py runs/finetune-A --fill swap       hidden behind other images' patches

Patches are hidden at random, in one block, or from the centre outwards. Every checkpoint sees the
same images behind the same masks. What is written: occlusion.json with all figures, occlusion.png
with what the models were shown and, where matplotlib is installed, occlusion-curve.png of accuracy
and features-by-block.png of how alike clean and occluded features are after each block.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler
from torchvision.utils import make_grid, save_image

import relaxmim as mim
from finetune import Classifier, choose, class_names, whole


@dataclass
class Config:
    """What to measure, and on what."""

    checkpoints: tuple = mim.option((), "runs' folders or checkpoints, one or more")
    ratios: str = mim.option(
        "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", "shares of the patches hidden"
    )
    shapes: str = mim.option("random,block,centre", "what is hidden: random, block, grid, centre")
    fill: str = mim.option("drop", "what hidden patches show", "drop", "mean", "noise", "swap")
    mask_seeds: int = mim.option(3, "masks tried on each image", 1, 1000)
    data: str = mim.option("", "set or folder with labels; empty: the first checkpoint's")
    cue_conflict: str = mim.option("", "folder of SHAPEn-TEXTUREm.png: measure shape bias too")
    num_images: int = mim.option(2000, "test images at most, taken at random; 0: all", 0, 10**9)
    data_dir: str = mim.option("data", "where torchvision's sets are kept")
    cache_gb: float = mim.option(1.0, "a folder larger than this is streamed, GiB", 0.0, 1e6)
    workers: int = mim.option(2, "processes that read files", 0, 256)
    batch_size: int = mim.option(250, "images at a time", 2, 10**6)
    seed: int = mim.option(0, "of images, masks and noise", 0, 2**31)
    out: str = mim.option("runs/occlusion", "folder for what is written")
    device: str = mim.option("auto", "auto, cpu, cuda or mps")
    precision: str = mim.option("auto", "of matrix products", "auto", "float32", "bfloat16")


def centre_mask(batch, grid, ratio, generator=None, device=None):
    """Hidden from the centre outwards, in squares; the same for every image but for ties."""
    extent = torch.tensor(grid, device=device)
    away = ((mim.places(grid, device) + 0.5) / extent - 0.5).abs().amax(-1)  # (N,)
    ties = torch.rand(batch, len(away), generator=generator, device=device)
    return mim.hide(away + 1e-3 * ties, ratio)


SHAPES = {**mim.MASKS, "centre": centre_mask}
SYNONYMS = {"car": "automobile", "boat": "ship", "plane": "airplane", "bike": "bicycle"}


def occlude(images, mask, patch_size, fill):
    """Images (B, C, H, W) whose hidden patches are grey ("drop" too: to be looked at), noise, or
    the patches of the batch's next image. Normalised values: 0 is the mean colour, noise has std 1.
    """
    other = {"noise": torch.randn_like(images), "swap": images.roll(1, 0)}
    patches = mim.patchify(other.get(fill, torch.zeros_like(images)), patch_size)
    patches = torch.where(mask[..., None], patches, mim.patchify(images, patch_size))
    rows, cols = images.shape[2] // patch_size, images.shape[3] // patch_size
    return mim.unpatchify(patches, (rows, cols), patch_size)


def look(model, images, mask, fill):
    """The model's output for images of which `mask` is hidden."""
    if fill == "drop":
        return model(images, mask if mask.any() else None)
    return model(occlude(images, mask, model.patch_size, fill))


def open_model(path, device, trained=True):
    """A checkpoint's Classifier, or its ViT where it has no head; its configuration; its scale."""
    content = mim.load_checkpoint(path)
    config, weights = {"in_chans": 3, **content["config"]}, content["encoder"]
    with mim.blame(f"{path}: its weights do not fit its config"):
        size = mim.sides(config["img_size"]), config["patch_size"], config["in_chans"]
        kind, options = mim.ViT, {}
        if "head.weight" in weights:
            options = {"num_classes": len(weights["head.weight"]), "probe": config["linear_probe"]}
            kind = Classifier
        model = kind(*size, *mim.SIZES[config["model"]], **options)
        model.load_state_dict(weights if trained else model.state_dict())
    return model.eval().to(device), config, content.get("scale")


def batches(config, data, img_size, device):
    """The test images, (B, C, H, W), and their indices, in the order of all models."""
    every = BatchSampler(range(len(data)), config.batch_size, drop_last=False)
    for index, pixels in data.batches(every, device, config.workers):
        yield index, whole(data, pixels, img_size)


def masks(config, shape, ratio, seed, index, grid, device):
    """The masks (B, N) of the images `index`: a function of seed, shape, ratio and index alone."""
    stream = (seed * 100 + list(SHAPES).index(shape)) * 1000 + round(ratio * 999)
    mim.set_seed(config.seed, stream * 2**20 + int(index[0]))
    return SHAPES[shape](len(index), grid, ratio, device=device)


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
    total = torch.trapezoid(*(torch.tensor(x, dtype=torch.float64) for x in (values, ratios)))
    return total.item() / (ratios[-1] - ratios[0])


def cka(a, b):
    """Linear centred kernel alignment of features (n, D) and (n, D'): 0..1 (Kornblith, 2019)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return ((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()


def cosine(a, b):
    """Mean cosine of features (n, D), centred over both: -1..1."""
    return F.cosine_similarity(*(torch.stack([a, b]) - (a + b).mean(0) / 2)).mean().item()


def block_features(model, images, mask, fill):
    """Mean patch token after each block: a list of (B, D)."""
    found = []
    keep = lambda block, inputs, tokens: found.append(tokens[:, 1:].float().mean(1))
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


def draw(config, model, images, scale, shapes, ratios, path):
    """A row for each shape, a column for each ratio: what the models were shown."""
    shown, index = [], torch.arange(len(images))
    for shape in shapes:
        for ratio in ratios:
            mask = masks(config, shape, ratio, 0, index, model.grid, images.device)
            shown.append(occlude(images, mask, model.patch_size, config.fill)[0])
    shown = (torch.stack(shown).cpu() * scale[1] + scale[0]).div(255).clamp(0, 1)
    shown = F.interpolate(shown, scale_factor=int(np.ceil(96 / images.shape[-1])))
    save_image(make_grid(shown, nrow=len(ratios), padding=4), path)


def draw_curves(panels, x, label, path):
    """Panels {title: {checkpoint: ys, or pairs of y and std}} over x; matplotlib is optional."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for (title, curves), axis in zip(panels.items(), axes[0]):
        for name, values in curves.items():
            y, *std = np.array(values).reshape(len(values), -1).T
            axis.errorbar(x[: len(y)], y, *std, label=name)
        axis.set(title=title, xlabel=label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def cue_conflict(model, folder, classes, img_size, device):
    """Answers to images of one class's shape in the texture of another (Geirhos et al., 2019).

    folder: SHAPEn-TEXTUREm.png in any depth; those of two known classes are taken. Returns counts:
    images, and answers that name the shape and the texture.
    """
    known, cues = [SYNONYMS.get(name, name) for name in classes], {}
    for path in sorted(Path(folder).rglob("*-*.png")):
        cue = [SYNONYMS.get(name, name) for name in re.findall(r"[a-z]+", path.stem.lower())]
        if len(set(cue)) == 2 and {*cue} <= {*known}:
            cues[str(path)] = [known.index(name) for name in cue]
    if not cues:
        mim.fail(f"--cue-conflict {folder}: no SHAPEn-TEXTUREm.png of two of {', '.join(classes)}")
    every = BatchSampler(range(len(cues)), 250, drop_last=False)
    data = mim.Images(list(cues), None, tuple(4 * n for n in mim.sides(img_size)[::-1]))
    seen = (whole(data, pixels, img_size) for _, pixels in data.batches(every, device))
    guess = torch.cat([model(images).argmax(1).cpu() for images in seen])
    hits = (guess[:, None] == torch.tensor(list(cues.values()))).sum(0).tolist()
    return len(cues), *hits


def interval(hits, n, z=1.96):
    """95 % interval of a share (Wilson, 1927)."""
    centre, half = hits + z * z / 2, z * (hits * (n - hits) / max(n, 1) + z * z / 4) ** 0.5
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def print_table(head, rows):
    """A Markdown table of strings."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |")


@torch.no_grad()
def evaluate(config, ratios, shapes, device):
    """All that is asked for, printed and written."""
    paths, folder = [Path(path) for path in config.checkpoints], Path(config.out)
    names = [path.parent.name if path.name == "checkpoint.pt" else path.name for path in paths]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    opened = dict(zip(names, (open_model(path, device) for path in paths)))
    known = opened[names[0]][1]
    config.data, config.in_chans = config.data or known.get("data", "synthetic"), known["in_chans"]
    sizes = [c["img_size"] for _, c, _ in opened.values()]
    config.img_size = max(sizes, key=lambda size: np.prod(mim.sides(size)))  # for the largest
    data = mim.open_data(config, train=False)
    classes = sorted({*class_names(data)})
    order = np.random.default_rng([config.seed, 1]).permutation(len(data))
    data = choose(data, order[: config.num_images or None])
    labels = torch.tensor([classes.index(name) for name in class_names(data)])
    heads, bare = {}, {}  # name: model, the size of its images, these in its scale
    for name, (model, c, scale) in opened.items():
        seen = model, c["img_size"], replace(data, scale=data.scale if scale is None else scale)
        (heads if isinstance(model, Classifier) else bare)[name] = seen
        if c["in_chans"] != config.in_chans:
            mim.fail(f"{name}: takes {c['in_chans']} channels, {names[0]} {config.in_chans}")
        if name in heads and (count := model.head.out_features) != len(classes):
            mim.fail(f"--data {config.data}: {len(classes)} classes; {name} has {count}")
    if bare and len(data) < 2:
        mim.fail(f"--data {config.data}: one image; features want a set or a folder of more")
    if bare:  # what features are alike without any training
        mim.set_seed(config.seed, 0)
        name, (_, *seen) = next(iter(bare.items()))
        blank = open_model(paths[names.index(name)], device, trained=False)[0]
        bare["random initialisation"] = blank, *seen
    if config.cue_conflict and (not heads or config.in_chans != 3):
        mim.fail(f"--cue-conflict {config.cue_conflict}: needs a checkpoint with a head, for RGB")
    with mim.blame(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)

    result = {"config": asdict(config), "ratios": ratios, "images": len(data)}
    result |= {"accuracy": {}, "features": {}, "cue_conflict": {}}
    for shape in shapes:
        curves, rows, shown = {}, [], [f"{ratio:.0%}" for ratio in ratios]
        for name, (model, size, data) in heads.items():
            found = accuracies(config, model, data, labels, size, shape, ratios, device)
            level = area(ratios, [value for value, _ in found])
            kept = level / found[0][0] if found[0][0] else 0.0
            curves[name] = {"accuracy": found, "area": level, "kept": kept}
            cells = [f"{100 * value:.1f}±{100 * std:.1f}" for value, std in found]
            rows.append([name, *cells, f"{100 * level:.1f}", f"{kept:.0%}"])
        if heads:
            print(f"\naccuracy in %, hidden: {shape}, fill: {config.fill}, {len(data)} images")
            print_table(["checkpoint", *shown, "area", "kept"], rows)
            result["accuracy"][shape] = curves
        for name, (model, size, data) in bare.items():
            found = alignment(config, model, data, size, shape, ratios, device)
            result["features"].setdefault(shape, {})[name] = found
            print(f"\n{name}: clean against occluded features, cosine / CKA, hidden: {shape}")
            cells = [[f"{x:.2f} / {y:.2f}" for x, y in zip(f["cosine"], f["cka"])] for f in found]
            rows = [[f"block {i}", *row] for i, row in enumerate(zip(*cells), 1)]
            print_table(["after", *shown], rows)
    if config.cue_conflict:
        rows = []
        for name, (model, size, _) in heads.items():
            count, shape, texture = cue_conflict(model, config.cue_conflict, classes, size, device)
            low, high = interval(shape, shape + texture)
            found = {"images": count, "shape": shape, "texture": texture, "interval": [low, high]}
            result["cue_conflict"][name] = found
            bias = f"{shape / max(shape + texture, 1):.0%} ({low:.0%} to {high:.0%})"
            rows.append([name, str(count), str(shape), str(texture), bias])
        print("\nanswers to images of one class's shape in another's texture")
        print_table(["checkpoint", "images", "shape", "texture", "shape bias (95 %)"], rows)

    model, size, data = {**heads, **bare}[names[0]]
    _, images = next(batches(config, data, size, device))
    draw(config, model, images[:8], data.scale, shapes, ratios, folder / "occlusion.png")
    if heads:
        found = result["accuracy"].items()
        panels = {shape: {k: v["accuracy"] for k, v in curves.items()} for shape, curves in found}
        draw_curves(panels, ratios, "share of patches hidden", folder / "occlusion-curve.png")
    if bare:
        i = min(range(len(ratios)), key=lambda i: abs(ratios[i] - 0.75))
        panels = {
            f"{kind}, {ratios[i]:.0%} hidden, {shape}": {k: v[i][kind] for k, v in found.items()}
            for shape, found in result["features"].items()
            for kind in ("cosine", "cka")
        }
        draw_curves(panels, range(1, 100), "block", folder / "features-by-block.png")
    (folder / "occlusion.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {folder}")


def main(args):
    config = mim.parse(Config, __doc__, args)
    if not config.checkpoints:
        mim.fail("checkpoints: name one or more runs' folders or checkpoint files")
    try:
        ratios = [float(part) for part in config.ratios.split(",")]
    except ValueError:
        ratios = [-1.0]
    if ratios != sorted(set(ratios)) or not all(0 <= ratio < 1 for ratio in ratios):
        mim.fail(f"--ratios {config.ratios}: rising numbers from 0 to below 1, with commas")
    shapes = config.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        mim.fail(f"--shapes {unknown[0]}: choose from {', '.join(SHAPES)}, with commas")
    device, autocast = mim.pick_device(config)
    with autocast:
        evaluate(config, ratios, shapes, device)


if __name__ == "__main__":
    main(sys.argv[1:])
