# SPDX-License-Identifier: MIT
"""Measure what occlusion does to a model: its accuracy, or its features, as more is hidden.

    python eval_occlusion.py runs/finetune-A runs/finetune-B   accuracy of classifiers, side by side
    python eval_occlusion.py runs/infonce-synthetic-1          features of an encoder without a head
    python eval_occlusion.py runs/finetune-A --fill swap       covered by other images' patches

Every model sees the same images behind the same masks. Everything is computed in float32. Written:
occlusion.json, all figures; occlusion.png, the masks on one image; and with matplotlib
accuracy.png, accuracy over the share hidden.

kept is the share of accuracy above chance that is left at the highest ratio up to 75 %. The mean
patch token of an occluded image finds its own whole image if that is the nearest one by cosine.
"""

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

import finetune
import relaxmim as mim
from relaxmim import Mistake, option

FILLS = ("drop", "grey", "swap")  # swap: with the patches of another image


@dataclass
class Config:
    """What to measure, and on what."""

    checkpoints: tuple = option((), "runs' folders or files of weights", nargs="*", type=str)
    ratios: str = option("0,0.25,0.5,0.75,0.9", "shares of the patches that are hidden")
    masks: str = option("random,block", f"how they are chosen: {', '.join(mim.MASKS)}")
    fill: str = option("drop", "drop hidden patches, or cover them", choices=FILLS)
    mask_seeds: int = option(3, "number of masks for every image")
    features: bool = option(False, "measure the features of classifiers too")
    cue_conflict: str = option("", "folder of SHAPEn-TEXTUREm.png: measure shape bias")
    data: str = option("", "a data set with labels; empty: the first checkpoint's")
    num_images: int = option(2000, "size of a random subset of the test images; 0: all")
    data_dir: str = option("data", "where torchvision keeps its data sets")
    cache_gb: float = option(1.0, "GiB of memory for a folder; a larger one is streamed")
    workers: int = option(2, "number of processes that read files")
    batch_size: int = option(250, "images at a time")
    seed: int = option(0, "random seed, of images and masks")
    out: str = option("runs/occlusion", "folder for the results")
    overwrite: bool = option(False, "replace results in that folder")
    device: str = option("auto", "auto, cpu, cuda or mps")


SYNONYMS = {"car": "automobile", "boat": "ship", "plane": "airplane", "bike": "bicycle"}


def check(config):
    """Raise Mistake for what cannot be measured. Returns the ratios and the names of the masks."""
    if not config.checkpoints:
        raise Mistake("checkpoints: name one or more runs or files of weights")
    try:
        ratios = [float(part) for part in config.ratios.split(",")]
    except ValueError:
        ratios = []
    if not ratios or ratios != sorted(set(ratios)) or not 0 <= ratios[0] <= ratios[-1] < 1:
        raise Mistake(f"--ratios {config.ratios}: must be increasing numbers from 0 to below 1")
    masks = config.masks.split(",")
    for name in masks:
        if name not in mim.MASKS:
            raise Mistake(f"--masks {name}: must be one of {', '.join(mim.MASKS)}")
    mim.check_values(config)
    if config.cue_conflict and not Path(config.cue_conflict).is_dir():
        raise Mistake(f"--cue-conflict {config.cue_conflict}: no such folder")
    if Path(config.out, "occlusion.json").exists() and not config.overwrite:
        raise Mistake(f"--out {config.out}: has results; add --overwrite, or choose another folder")
    return ratios, masks


@dataclass
class Subject:
    """A model to be measured, and the images for it."""

    name: str
    model: torch.nn.Module
    settings: dict  # model, patch_size, img_size, in_chans
    classes: list | None = None  # None: no head
    images: mim.Images | None = None  # labels index into classes


def open_model(path, device, trained=True):
    """The model of a checkpoint: a Classifier if it has a head, else a ViT."""
    weights, settings, classes = finetune.load_encoder(path)
    size = [settings[name] for name in ("img_size", "patch_size", "in_chans")]
    size += mim.SIZES[settings["model"]]
    model = mim.ViT(*size)
    if classes:
        probe = "fc_norm.running_mean" in weights
        model = finetune.Classifier(*size, num_classes=len(classes), probe=probe)
    if trained:
        finetune.load_weights(model, weights, path)
    return Subject(finetune.run_name(path), model.eval().to(device), settings, classes)


def open_models(config, ratios, device):
    """A Subject for every checkpoint. Raises Mistake for those that cannot be compared."""
    subjects = []
    for path in config.checkpoints:
        subject = open_model(path, device)
        if subject.name in [other.name for other in subjects]:
            subject.name = f"{subject.name} ({len(subjects)})"
        subjects.append(subject)
        in_chans = subject.settings["in_chans"]
        first = subjects[0].settings["in_chans"]
        if in_chans != first:
            raise Mistake(f"{path}: has {in_chans} channels, the first model {first}")
        N = math.prod(subject.model.grid)
        if round(ratios[-1] * N) == N:
            raise Mistake(f"--ratios {ratios[-1]:g}: would hide all {N} patches of {subject.name}")
        if config.cue_conflict and (in_chans != 3 or not subject.classes):
            raise Mistake(f"--cue-conflict: {path} is not a classifier of RGB images")
    return subjects


def open_images(config, subjects):
    """Give every subject the test images, labelled by its own classes."""
    first = subjects[0].settings
    config.data = config.data or first.get("data", "synthetic")
    config.in_chans = first["in_chans"]
    config.img_size = max(subject.settings["img_size"] for subject in subjects)
    labelled = any(subject.classes for subject in subjects)
    images = mim.open_data(config, train=False, labelled=labelled)
    count = min(config.num_images, len(images))
    images = images.sample(count, config.seed)
    if len(images) < 2:
        raise Mistake(f"--data {config.data}: one image; must be two or more")
    for subject in subjects:
        subject.images = images
        if subject.classes:
            subject.images = finetune.relabel(images, subject.classes, subject.name)


def occlude(images, others, visible, hidden, patch_size):
    """Arguments for a model that hide patches of images (B, C, H, W): images, visible or None.

    others: images (B, C, H, W) whose patches cover the hidden ones; None: those are left out.
    """
    if others is None:
        return images, visible
    patches = mim.patchify(images, patch_size)
    cover = mim.gather_tokens(mim.patchify(others, patch_size), hidden)
    index = hidden[..., None].expand_as(cover)
    grid = [side // patch_size for side in images.shape[2:]]
    return mim.unpatchify(patches.scatter(1, index, cover), grid, patch_size), None


def behind_masks(function, config, subject, mask, ratio, mask_seed=0):
    """function, of occluded images, for all images: (n, ...), and labels (n,).

    function takes images and visible as a ViT does. Masks are the same for all subjects with the
    same grid, and at a higher ratio hide all that they hide at a lower one, and more.
    """
    device = subject.model.cls_token.device
    size = subject.settings["img_size"]
    n = len(subject.images)
    mim.seed_all(config.seed, mask_seed)
    visible, hidden = mim.MASKS[mask](n, subject.model.grid, ratio)  # row i is for image i
    rows = torch.arange(n).split(config.batch_size)
    next_rows = torch.arange(n).roll(-1).split(config.batch_size)
    batches = subject.images.batches(rows, device, config.workers)
    covers = itertools.repeat((None, None))
    if config.fill == "swap":
        covers = subject.images.batches(next_rows, device, config.workers)
    values = []
    labels = []
    for index, (pixels, y), (cover, _) in zip(rows, batches, covers):
        images = finetune.whole_images(pixels, size)
        others = None
        if config.fill == "grey":
            others = torch.zeros_like(images)  # the mean color
        if config.fill == "swap":
            others = finetune.whole_images(cover, size)
        hide = (visible[index].to(device), hidden[index].to(device))
        values.append(function(*occlude(images, others, *hide, subject.model.patch_size)))
        labels.append(y)
    return torch.cat(values), torch.cat(labels)


def accuracy_curve(config, subject, mask, ratios):
    """Accuracy at each ratio, (mean, deviation) over the mask seeds."""
    curve = []
    for ratio in ratios:
        shares = []
        for mask_seed in range(config.mask_seeds if ratio > 0 else 1):
            logits, labels = behind_masks(subject.model, config, subject, mask, ratio, mask_seed)
            shares.append(finetune.share_correct(logits, labels))
        curve.append((mean(shares), stdev(shares) if len(shares) > 1 else 0.0))
    return curve


def share_kept(occluded, clean, num_classes):
    """The share of accuracy above chance that is kept under occlusion; None if there is none."""
    chance = 1 / num_classes
    if clean <= chance:
        return None
    return (occluded - chance) / (clean - chance)


def print_table(title, head, rows):
    """A Markdown table of strings."""
    print(f"\n{title}\n")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def accuracy_table(config, subjects, ratios, mask):
    """Print accuracy at each ratio, and return {name: figures}."""
    result = {}
    rows = []
    at = max((i for i, ratio in enumerate(ratios) if ratio <= 0.75), default=0)
    for subject in subjects:
        curve = accuracy_curve(config, subject, mask, ratios)
        clean, _ = curve[0]
        if ratios[0] > 0:
            [(clean, _)] = accuracy_curve(config, subject, mask, [0.0])
        n = len(subject.images)
        errors = [math.sqrt(share * (1 - share) / n) for share, _ in curve]
        retention = share_kept(curve[at][0], clean, len(subject.classes))
        figures = {"images": n, "accuracy": curve, "sampling_error": errors, "clean": clean}
        result[subject.name] = {**figures, "retention": retention}
        cells = [f"{100 * value:.1f}" for value, _ in curve]
        if config.mask_seeds > 1:
            cells = [f"{100 * value:.1f} ± {100 * std:.1f}" for value, std in curve]
        kept = "" if retention is None else f"{100 * retention:.0f}"
        rows.append([subject.name, *cells, f"{100 * max(errors):.1f}", kept])
    head = ["model", *[f"{ratio:.0%}" for ratio in ratios], "sampling error"]
    head.append(f"kept at {ratios[at]:.0%}")
    print_table(f"accuracy in %, {n} images, share hidden ({mask}, {config.fill})", head, rows)
    return result


def block_features(model, images, visible):
    """The mean patch token after each block, the last after the final norm, float64: (B, depth, D)."""
    found = []

    def keep(block, inputs, tokens):
        found.append(tokens[:, 1:].mean(dim=1))

    layers = [*model.blocks[:-1], model.norm]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    model(images, visible)
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1).cpu().double()


def cka(a, b):
    """Linear centred kernel alignment of features (n, D), (n, E): 0..1 (Kornblith et al., 2019)."""
    a = a - a.mean(dim=0)
    b = b - b.mean(dim=0)
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    return ((a.T @ b).norm() ** 2 / scale).item()


def feature_table(config, subjects, ratios, mask):
    """Print how many occluded images find their own whole one after the last block; return all."""
    result = {}
    rows = []
    for subject in subjects:
        features = partial(block_features, subject.model)
        clean, _ = behind_masks(features, config, subject, mask, 0.0)  # (n, depth, D)
        figures = {"retrieval": [], "cosine": [], "cka": []}
        for ratio in ratios:
            occluded, _ = behind_masks(features, config, subject, mask, ratio)
            pairs = list(zip(clean.unbind(1), occluded.unbind(1)))
            compared = [mim.compare_features(a, b) for a, b in pairs]
            figures["retrieval"].append([pair["retrieval"].item() for pair in compared])
            figures["cosine"].append([pair["invariance"].item() for pair in compared])
            figures["cka"].append([cka(a, b) for a, b in pairs])
        result[subject.name] = figures
        rows.append([subject.name, *[f"{100 * blocks[-1]:.1f}" for blocks in figures["retrieval"]]])
    head = ["model", *[f"{ratio:.0%}" for ratio in ratios]]
    n = len(subjects[0].images)
    title = f"occluded images that find their own whole one among {n}, in %, share hidden"
    print_table(f"{title} ({mask}, {config.fill})", head, rows)
    return result


def shape_bias(config, subject):
    """Count shape and texture answers on images SHAPEn-TEXTUREm.png (Geirhos et al., 2019).

    Returns the number of images whose two classes the model knows, of answers that name the shape,
    and of answers that name the texture.
    """
    known = [SYNONYMS.get(name, name) for name in subject.classes]
    names, cues = [], []
    for name in mim.find_images(config.cue_conflict):
        words = re.findall("[a-z]+", Path(name).stem.lower())
        cue = [SYNONYMS.get(word, word) for word in words]
        if len(set(cue)) == 2 and set(cue) <= set(known):
            names.append(name)
            cues.append([known.index(word) for word in cue])
    if not names:
        what = f"no SHAPEn-TEXTUREm.png of two of {', '.join(subject.classes)}"
        raise Mistake(f"--cue-conflict {config.cue_conflict}: {what}")
    size = subject.settings["img_size"]
    images = mim.Images(names, torch.tensor(cues), [], side=4 * size)
    device = subject.model.cls_token.device
    logits, labels = finetune.outputs(subject.model, images, size, device)
    pred = logits.argmax(dim=1)
    shape = (pred == labels[:, 0]).sum().item()
    texture = (pred == labels[:, 1]).sum().item()
    return len(labels), shape, texture


def wilson_interval(hits, n, z=1.96):
    """95 % interval of a share (Wilson, 1927)."""
    center = hits + z * z / 2
    half = z * math.sqrt(hits * (n - hits) / max(n, 1) + z * z / 4)
    return (center - half) / (n + z * z), (center + half) / (n + z * z)


def shape_table(config, subjects):
    """Print and return how many answers name the shape, and how many the texture."""
    result = {}
    rows = []
    for subject in subjects:
        total, shape, texture = shape_bias(config, subject)
        low, high = wilson_interval(shape, shape + texture)
        figures = {"images": total, "shape": shape, "texture": texture, "interval": [low, high]}
        result[subject.name] = figures
        share = f"{shape / max(1, shape + texture):.0%} ({low:.0%} to {high:.0%})"
        rows.append([subject.name, str(total), str(shape), str(texture), share])
    head = ["model", "images", "shape", "texture", "shape bias (95 %)"]
    print_table("answers to the shape of one class in the texture of another", head, rows)
    return result


def draw_examples(config, subject, ratios, masks):
    """Write occlusion.png: one image, a row for each mask, a column for each ratio."""
    fill = "grey" if config.fill == "drop" else config.fill
    config = replace(config, fill=fill)
    index = torch.arange(len(subject.images))[: config.batch_size]
    subject = replace(subject, images=subject.images.subset(index))
    rows = {}
    for mask in masks:
        shown = []
        for ratio in ratios:
            images, _ = behind_masks(lambda images, visible: images, config, subject, mask, ratio)
            shown.append(mim.denormalize(images[:1]) / 255)
        rows[mask] = torch.cat(shown).expand(-1, 3, -1, -1)
    mim.save_picture(Path(config.out, "occlusion.png"), rows, [f"{ratio:.0%}" for ratio in ratios])


def draw_curves(path, result, ratios, chance):
    """Write accuracy over the share hidden, a panel for each mask, if matplotlib is there."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(1, len(result), squeeze=False, sharey=True, layout="constrained")
    figure.set_size_inches(5 * len(result) + 2, 4)
    x = [100 * ratio for ratio in ratios]
    for axis, (mask, models) in zip(axes[0], result.items()):
        for name, figures in models.items():
            y, std = 100 * torch.tensor(figures["accuracy"]).T
            axis.plot(x, y, marker=".", label=name)
            axis.fill_between(x, y - std, y + std, alpha=0.2)
        axis.axhline(100 * chance, color="grey", linestyle=":", label="chance")
        axis.set(title=f"hidden: {mask}", xlabel="patches hidden, %")
    axes[0, 0].set_ylabel("accuracy, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    with mim.writing(path):
        figure.savefig(path, dpi=100)
    pyplot.close(figure)


@torch.no_grad()
def evaluate(config):
    """Measure, print and write all that config asks for. Returns the figures. Raises Mistake."""
    ratios, masks = check(config)
    folder = Path(config.out)
    config.precision = "float32"
    device, _ = mim.pick_device(config)
    subjects = open_models(config, ratios, device)
    open_images(config, subjects)
    with mim.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

    result = {"config": asdict(config), "ratios": ratios}
    classifiers = [subject for subject in subjects if subject.classes]
    if classifiers:
        result["accuracy"] = {
            mask: accuracy_table(config, classifiers, ratios, mask) for mask in masks
        }
        chance = 1 / len(classifiers[0].classes)
        draw_curves(folder / "accuracy.png", result["accuracy"], ratios, chance)
    measured = [subject for subject in subjects if config.features or not subject.classes]
    if measured:
        mim.seed_all(config.seed, 0)
        path = config.checkpoints[subjects.index(measured[0])]
        blank = open_model(path, device, trained=False)
        measured.append(replace(blank, name="random initialisation", images=measured[0].images))
        result["features"] = {mask: feature_table(config, measured, ratios, mask) for mask in masks}
    if config.cue_conflict:
        result["shape_bias"] = shape_table(config, subjects)
    draw_examples(config, subjects[0], ratios, masks)
    mim.write_text(folder / "occlusion.json", json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {folder}")
    return result


def main(args=None):
    with mim.command_line():
        evaluate(mim.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
