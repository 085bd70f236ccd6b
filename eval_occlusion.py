# SPDX-License-Identifier: MIT
"""Measure what occlusion does to a model: its accuracy, or its features, as more is hidden.

    python eval_occlusion.py runs/finetune-A runs/finetune-B   accuracy of classifiers, side by side
    python eval_occlusion.py runs/infonce-synthetic-1          features of an encoder without a head
    python eval_occlusion.py runs/finetune-A --fill swap       covered by other images' patches
    python eval_occlusion.py mae_finetuned_vit_base.pth --data DIR    a classifier of MAE or timm

Every model sees the same images, and models of one grid the same masks, in float32. "kept" is the
share of accuracy above chance that is left at the highest ratio up to 75 %. Retrieval is the share
of occluded images whose mean patch token is nearest to that of their own whole image. Written:
occlusion.json, all figures; occlusion.png, one image, a row for each mask, a column for each ratio;
and with matplotlib accuracy.png. A classifier from elsewhere must average the patch tokens
(fc_norm); the folders of --data, sorted, are its classes. Files are cropped to squares and resized,
nothing else is cut off.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from torchvision.utils import save_image
from tqdm import tqdm

import finetune
import relaxmim as mim
from relaxmim import Mistake, option

FILLS = ("drop", "grey", "swap")  # swap: with the patches of another image
OUTPUTS = ("occlusion.json", "occlusion.png", "accuracy.png")
SYNONYMS = {"car": "automobile", "boat": "ship", "plane": "airplane", "bike": "bicycle"}


@dataclass
class Config:
    """What to measure, and on what."""

    checkpoints: tuple = option((), "runs' folders or files of weights", positional=True)
    ratios: str = option("0,0.25,0.5,0.75,0.9", "shares of the patches that are hidden")
    masks: str = option("random,block", f"how they are chosen: {', '.join(mim.MASKS)}")
    fill: str = option("drop", "drop hidden patches, or cover them", choices=FILLS)
    mask_seeds: int = option(3, "number of masks for every image", 1, 1000)
    features: bool = option(False, "measure the features of classifiers too")
    cue_conflict: str = option("", "folder of SHAPEn-TEXTUREm.png: measure shape bias")
    data: str = option("", "a data set with labels; empty: that of the first run")
    num_images: int = option(2000, "size of a random subset of the test images; 0: all", 0, 1e9)
    data_dir: str = option("data", "torchvision's download directory")
    cache_gb: float = option(1.0, "GiB of memory for files; a larger set is streamed", 0, 1e6)
    workers: int = option(2, "number of processes that read files", 0, 256)
    batch_size: int = option(250, "images at a time; does not change results", 1, 1e6)
    seed: int = option(0, "random seed, of images and masks", 0, 1e9)
    out: str = option("runs/occlusion", "folder for the results")
    overwrite: bool = option(False, "replace results in that folder")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")


def check(config):
    """Raise Mistake for what cannot be measured. Returns the ratios and the names of the masks."""
    mim.check_values(config)
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
    if config.cue_conflict and not Path(config.cue_conflict).is_dir():
        raise Mistake(f"--cue-conflict {config.cue_conflict}: no such folder")
    found = [name for name in OUTPUTS if Path(config.out, name).exists()]
    if found and not config.overwrite:
        raise Mistake(f"--out {config.out}: has {found[0]}; add --overwrite, or choose another")
    return ratios, masks


@dataclass
class Subject:
    """A model to be measured, and the images for it."""

    name: str
    model: torch.nn.Module
    img_size: int
    classes: list | None  # None: no head
    images: mim.Images | None = None  # labels index into classes


def open_model(path, device, trained=True):
    """The model of a checkpoint as a Subject, and its settings. Raises Mistake."""
    weights, settings, classes = finetune.load_encoder(path)
    size = [settings[key] for key in ("img_size", "patch_size", "in_chans")]
    size += mim.SIZES[settings["model"]]
    if classes is None and "head.weight" in weights:
        if "fc_norm.weight" in weights and "norm.weight" not in weights:
            classes = [None] * len(weights["head.weight"])
        elif trained:
            print(f"{path}: its head is left out; it does not read the mean of the patch tokens")
    model = mim.ViT(*size)
    if classes:
        probe = "fc_norm.running_mean" in weights
        model = finetune.Classifier(*size, num_classes=len(classes), probe=probe)
    if trained:
        finetune.load_weights(model, weights, path, () if classes else ("head.", "fc_norm."))
    model = model.eval().to(device)
    return Subject(finetune.run_path(path).name, model, settings["img_size"], classes), settings


def open_images(config, subjects):
    """The test images, all of them readable, so that row i of a batch of masks is for image i."""
    labelled = any(subject.classes for subject in subjects)
    options = {name: getattr(config, name) for name in ("data", "data_dir", "cache_gb", "workers")}
    options["img_size"] = max(subject.img_size for subject in subjects)
    options["in_chans"] = subjects[0].model.in_chans
    images = mim.open_data(mim.Config(**options), train=False, labelled=labelled)
    images = images.sample(min(config.num_images, len(images)), config.seed)
    if images.pixels is None:
        found = []
        for batch in images.loader(torch.arange(len(images)).split(256), config.workers):
            found += [] if batch is None else batch[2].tolist()
        images = images.subset(torch.tensor(found, dtype=torch.int64))
    if len(images) < 2:
        raise Mistake(f"--data {config.data}: {len(images)} readable images; 2 or more are needed")
    if config.fill == "swap":  # in random order, since neighbours in a folder share their class
        images = images.sample(len(images), config.seed)
    return images


def open_subjects(config, ratios, device):
    """A Subject for every checkpoint. Raises Mistake for those that cannot be compared."""
    subjects = []
    for path in config.checkpoints:
        subject, settings = open_model(path, device)
        if subject.name in [other.name for other in subjects]:
            subject.name = f"{subject.name} ({len(subjects)})"
        subjects.append(subject)
        config.data = config.data or settings.get("data", "")
        in_chans = subject.model.in_chans
        expected = subjects[0].model.in_chans
        if in_chans != expected:
            raise Mistake(f"{path}: has {in_chans} channels, the first model {expected}")
        N = math.prod(subject.model.grid)
        if round(ratios[-1] * N) == N:
            raise Mistake(f"--ratios {ratios[-1]:g}: would hide all {N} patches of {subject.name}")
        if config.cue_conflict and (in_chans != 3 or not subject.classes):
            raise Mistake(f"--cue-conflict: {path} is not a classifier of RGB images")
    config.data = config.data or "synthetic"
    images = open_images(config, subjects)
    print(f"data: {images}")
    for subject in subjects:
        subject.images = images
        if subject.classes and subject.classes[0] is None:  # a classifier from elsewhere
            if len(subject.classes) != len(images.classes):
                given = f"--data {config.data}: has {len(images.classes)} classes"
                raise Mistake(f"{given}, the head of {subject.name} has {len(subject.classes)}")
            subject.classes = images.classes
            known = f"{images.classes[0]} to {images.classes[-1]}"
            print(f"{subject.name}: its classes are taken to be the folders {known}")
        if subject.classes:
            subject.images = finetune.relabel(images, subject.classes, subject.name)
    return subjects


def draw_masks(config, subject, mask, ratio, mask_seed=0):
    """Visible (n, V) and hidden (n, K) for all images of a subject, row i for image i.

    The same for all subjects of one grid. Of our masks, a higher ratio hides what a lower one
    hides, and more.
    """
    mim.seed_all(config.seed, mask_seed)
    return mim.MASKS[mask](len(subject.images), subject.model.grid, ratio)


def cover(images, others, hidden, patch_size):
    """Images (B, C, H, W) whose patches hidden (B, K) are those of others (B, C, H, W)."""
    patches = mim.patchify(images, patch_size)
    covering = mim.gather_tokens(mim.patchify(others, patch_size), hidden)
    place = hidden[..., None].expand_as(covering)
    grid = [side // patch_size for side in images.shape[2:]]
    return mim.unpatchify(patches.scatter(1, place, covering), grid, patch_size)


def observe(config, subject, hiding=None):
    """Show all images to a model, whole or with hiding: visible (n, V) and hidden (n, K).

    Returns logits (n, classes), None without a head; labels (n,); and the mean patch tokens after
    each block, (n, D) each, float64, an empty list if they are not to be measured. The last ones
    are taken after the final norm, which fine-tuned classifiers do not have.
    """
    model = subject.model
    device = model.cls_token.device
    watched = config.features or not subject.classes
    layers = [*model.blocks[:-1], model.norm] if watched else []
    tokens = []  # of every batch, block by block

    def keep(layer, inputs, x):
        tokens.append(x[:, 1:].mean(dim=1).cpu().double())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    n = len(subject.images)
    rows = torch.arange(n).split(config.batch_size)
    longer = [torch.cat([index, (index[-1:] + 1) % n]) for index in rows]
    batches = subject.images.batches(longer, device, config.workers)
    logits = []
    labels = []
    for index, (pixels, y) in zip(rows, batches):
        images = finetune.whole_images(pixels, subject.img_size)
        images, others = images[:-1], images[1:]  # others: the next image of each, to swap with
        visible = None
        if hiding:
            visible, hidden = (part[index].to(device) for part in hiding)
        if hiding and config.fill != "drop":
            if config.fill == "grey":
                others = torch.zeros_like(images)  # the mean color
            images = cover(images, others, hidden, model.patch_size)
            visible = None
        output = model(images, visible)
        if subject.classes:
            logits.append(output)
        labels.append(y[:-1])
    for hook in hooks:
        hook.remove()
    blocks = [torch.cat(tokens[i :: len(hooks)]) for i in range(len(hooks))]
    return torch.cat(logits) if logits else None, torch.cat(labels), blocks


def cka(a, b):
    """Linear centered kernel alignment of features (n, D), (n, E): 0..1 (Kornblith et al., 2019).

    None if the features of all images are alike.
    """
    a = a - a.mean(dim=0)
    b = b - b.mean(dim=0)
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    return ((a.T @ b).norm() ** 2 / scale).item() if scale > 0 else None


def measure(config, subject, mask, ratios, clean):
    """Figures of a model behind one kind of mask, a list entry for each ratio.

    clean: what observe returns for whole images. Returns those of its accuracy, {} without a head,
    and those of its features, for each block, {} if they are not to be measured.
    """
    logits, labels, blocks = clean
    curve = []
    features = {"retrieval": [], "cosine": [], "cka": []} if blocks else {}
    for ratio in ratios:
        shares = []
        for mask_seed in range(config.mask_seeds if ratio > 0 else 1):
            seen = clean
            if ratio > 0:
                hiding = draw_masks(config, subject, mask, ratio, mask_seed)
                seen = observe(config, subject, hiding)
            if subject.classes:
                shares.append(finetune.share_correct(seen[0], labels))
            if blocks and mask_seed == 0:
                pairs = list(zip(blocks, seen[2]))
                compared = [mim.compare_features(a, b)[1] for a, b in pairs]
                features["retrieval"].append([pair["retrieval"].item() for pair in compared])
                features["cosine"].append([pair["invariance"].item() for pair in compared])
                features["cka"].append([cka(a, b) for a, b in pairs])
        if shares:
            curve.append((mean(shares), stdev(shares) if len(shares) > 1 else 0.0))
    if not subject.classes:
        return {}, features
    n = len(labels)
    share = finetune.share_correct(logits, labels)
    chance = 1 / len(subject.classes)
    at = max((i for i, ratio in enumerate(ratios) if ratio <= 0.75), default=None)
    figures = {"images": n, "accuracy": curve, "clean": share, "retention": None}
    figures["sampling_error"] = [math.sqrt(value * (1 - value) / n) for value, _ in curve]
    if at is not None:
        figures["retention_ratio"] = ratios[at]
    if at is not None and share > chance:  # of the accuracy above chance, if there is any
        figures["retention"] = (curve[at][0] - chance) / (share - chance)
    return figures, features


def print_table(title, head, rows):
    """A Markdown table of strings."""
    print(f"\n{title}\n")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def print_accuracy(models, ratios, how):
    """A row for each of models, {name: figures}: accuracy at each ratio, and what is kept."""
    rows = []
    for name, figures in models.items():
        cells = [f"{100 * value:.1f}" for value, _ in figures["accuracy"]]
        if any(std > 0 for _, std in figures["accuracy"]):
            cells = [f"{100 * value:.1f} ± {100 * std:.1f}" for value, std in figures["accuracy"]]
        cells.append(f"{100 * max(figures['sampling_error']):.1f}")
        kept = figures["retention"]
        cells.append("" if kept is None else f"{100 * kept:.0f}")
        rows.append([name, *cells])
    head = ["model", *[f"{ratio:.0%}" for ratio in ratios], "sampling error"]
    head.append(f"kept at {figures.get('retention_ratio', 0.75):.0%}")
    title = f"accuracy in % ± deviation over masks, {figures['images']} images, share hidden"
    print_table(f"{title} ({how})", head, rows)


def print_retrieval(models, ratios, how):
    """A row for each of models, {name: figures}: retrieval after the last block at each ratio."""
    rows = []
    for name, figures in models.items():
        rows.append([name, *[f"{100 * blocks[-1]:.1f}" for blocks in figures["retrieval"]]])
    title = "occluded images whose features find their own whole image, in %, share hidden"
    print_table(f"{title} ({how})", ["model", *[f"{ratio:.0%}" for ratio in ratios]], rows)


def open_cues(config, subject):
    """Images SHAPEn-TEXTUREm.png of two classes that a model knows; labels (n, 2) are those two."""
    known = [SYNONYMS.get(name.lower(), name.lower()) for name in subject.classes]
    names, cues = [], []
    found, _ = mim.find_images(config.cue_conflict)
    for name in found:
        words = re.findall("[a-z]+", Path(name).stem.lower())
        cue = [SYNONYMS.get(word, word) for word in words]
        if len(set(cue)) == 2 and set(cue) <= set(known):
            names.append(name)
            cues.append([known.index(word) for word in cue])
    if not names:
        what = f"no SHAPEn-TEXTUREm.png of two of {', '.join(subject.classes[:10])}"
        raise Mistake(f"--cue-conflict {config.cue_conflict}: {what}")
    return mim.Images(names, torch.tensor(cues), [], side=4 * subject.img_size)


def wilson_interval(hits, n, z=1.96):
    """95 % interval of a share (Wilson, 1927)."""
    center = hits + z * z / 2
    half = z * math.sqrt(hits * (n - hits) / max(n, 1) + z * z / 4)
    return (center - half) / (n + z * z), (center + half) / (n + z * z)


def shape_bias(cues, subject):
    """How many answers name the shape, how many the texture (Geirhos et al., 2019)."""
    device = subject.model.cls_token.device
    logits, labels = finetune.outputs(subject.model, cues, subject.img_size, device)
    answers = logits.argmax(dim=1, keepdim=True)  # (n, 1)
    shape, texture = (answers == labels).sum(dim=0).tolist()
    figures = {"images": len(labels), "shape": shape, "texture": texture}
    return {**figures, "interval": wilson_interval(shape, shape + texture)}


def print_shape_bias(models):
    """A row for each of models, {name: figures}."""
    rows = []
    for name, figures in models.items():
        shape, texture = figures["shape"], figures["texture"]
        low, high = figures["interval"]
        share = f"{shape / max(1, shape + texture):.0%} ({low:.0%} to {high:.0%})"
        rows.append([name, str(figures["images"]), str(shape), str(texture), share])
    head = ["model", "images", "shape", "texture", "shape bias (95 %)"]
    print_table("answers to the shape of one class in the texture of another", head, rows)


def draw_examples(config, subject, ratios, masks):
    """Write occlusion.png: one image, a row for each mask, a column for each ratio."""
    pixels, _ = next(subject.images.batches([torch.tensor([0, 1])], torch.device("cpu")))
    images = finetune.whole_images(pixels, subject.img_size)
    others = images[1:] if config.fill == "swap" else torch.zeros_like(images[1:])
    shown = []
    for mask in masks:
        for ratio in ratios:
            _, hidden = draw_masks(config, subject, mask, ratio)
            shown.append(cover(images[:1], others, hidden[:1], subject.model.patch_size))
    pictures = (mim.denormalize(torch.cat(shown)) / 255).clamp(0, 1)
    path = Path(config.out, "occlusion.png")
    with mim.writing(path):
        save_image(pictures, path, nrow=len(ratios), padding=4, pad_value=1.0)


def draw_curves(path, result, ratios, chance):
    """Write accuracy over the share hidden, a panel for each mask, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    figure = Figure(figsize=(5 * len(result) + 2, 4), layout="constrained")
    axes = figure.subplots(1, len(result), squeeze=False, sharey=True)[0]
    x = [100 * ratio for ratio in ratios]
    for axis, (mask, models) in zip(axes, result.items()):
        for name, figures in models.items():
            y, std = 100 * torch.tensor(figures["accuracy"]).T
            axis.plot(x, y, marker=".", label=name)
            axis.fill_between(x, y - std, y + std, alpha=0.2)
        axis.axhline(100 * chance, color="grey", linestyle=":", label="chance")
        axis.set(title=f"hidden: {mask}", xlabel="patches hidden, %")
    axes[0].set_ylabel("accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    with mim.writing(path):
        figure.savefig(path, dpi=100)


@torch.no_grad()
def evaluate(config):
    """Measure, write and print all that config asks for. Returns the figures. Raises Mistake."""
    ratios, masks = check(config)
    folder = Path(config.out)
    device, _ = mim.pick_device(mim.Config(device=config.device, precision="float32"))
    subjects = open_subjects(config, ratios, device)
    cues = [open_cues(config, subject) for subject in subjects] if config.cue_conflict else []
    with mim.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

    classifiers = [subject for subject in subjects if subject.classes]
    watched = [config.features or not subject.classes for subject in subjects]
    if any(watched):
        mim.seed_all(config.seed, 0)
        blank, _ = open_model(config.checkpoints[watched.index(True)], device, trained=False)
        images = subjects[watched.index(True)].images
        name = "random initialisation"
        subjects.append(replace(blank, name=name, classes=None, images=images))
    result = {"config": asdict(config), "ratios": ratios}
    result["accuracy"] = {mask: {} for mask in masks}
    result["features"] = {mask: {} for mask in masks}
    for subject in tqdm(subjects, unit="model"):
        clean = observe(config, subject)
        for mask in masks:
            figures, blocks = measure(config, subject, mask, ratios, clean)
            if figures:
                result["accuracy"][mask][subject.name] = figures
            if blocks:
                result["features"][mask][subject.name] = blocks
    if cues:
        pairs = zip(cues, classifiers)
        result["shape_bias"] = {subject.name: shape_bias(cue, subject) for cue, subject in pairs}
    Path(folder, "accuracy.png").unlink(missing_ok=True)  # of other models
    mim.write_text(folder / "occlusion.json", json.dumps(result, indent=2) + "\n")

    for mask in masks:
        how = f"{mask}, {config.fill}"
        if result["accuracy"][mask]:
            print_accuracy(result["accuracy"][mask], ratios, how)
        if result["features"][mask]:
            print_retrieval(result["features"][mask], ratios, how)
    if cues:
        print_shape_bias(result["shape_bias"])
    draw_examples(config, subjects[0], ratios, masks)
    if classifiers:
        chance = 1 / len(classifiers[0].classes)
        draw_curves(folder / "accuracy.png", result["accuracy"], ratios, chance)
    print(f"\nwritten to {folder}")
    return result


def main(args=None):
    with mim.command_line():
        evaluate(mim.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
