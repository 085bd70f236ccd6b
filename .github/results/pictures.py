# SPDX-License-Identifier: MIT
"""Draw README's pictures, into .github/assets. Needs matplotlib.

    python .github/results/pictures.py bars DATA PHOTO          bars.png: accuracy by pretraining
    python .github/results/pictures.py occlusion                occlusion.png: accuracy kept
    python .github/results/pictures.py views DATA MAE SCRATCH   views.png: held-out images

DATA: CIFAR-10 as a folder of train/CLASS and test/CLASS, or "cifar10". PHOTO: the photograph of the
row "infonce, one photograph". MAE: a run of relaxmim.py --loss mae, SCRATCH: a run of
finetune.py from scratch, both with seed 0 and of one size.

The figures in bars.png and occlusion.png are those that mean.py reads. views.png takes the images
and masks that eval_occlusion.py takes with seed 0, so its shares are that script's retrieval.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
from torch.nn.functional import softmax
from torchvision.transforms.v2 import functional as tv
from torchvision.utils import make_grid

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent
ASSETS = RESULTS.parent / "assets"
sys.path.insert(0, str(RESULTS.parents[1]))

import mean as tables

import eval_occlusion
import relaxmim

GREY, BLUE, ORANGE, GREEN = "#868c92", "#4c78a8", "#e4792b", "#1a9850"
DARK = "#5f6368"
PHOTO = "infonce, one photograph"
BARS = {  # a row of mean.py: what it is called here
    "none": "trained from scratch",
    "none, twice the steps": "from scratch for\ntwice the steps",
    "infonce, one synthetic image": "pretrained on\none synthetic image",
    PHOTO: "pretrained on\none photograph",
    "infonce, 50,000 images": "pretrained on\n50,000 images",
}
LINES = {
    "none": ("from scratch", GREY),
    "none, twice the steps": ("from scratch, twice the steps", DARK),
    PHOTO: ("infonce, one photograph", ORANGE),
    "mae, 50,000 images": ("mae, 50,000 images", BLUE),
}


def conditions(rows):
    """Hardware and number of seeds of some rows, in words."""
    device = "H200"  # of gpu-0.json, which does not say it
    for records in rows.values():
        device = records[0].get("device", device).removeprefix("NVIDIA ")
    counts = sorted({len(records) for records in rows.values()})
    seeds = " to ".join(str(count) for count in counts)
    return f"one {device}, " + ("one seed" if counts == [1] else f"{seeds} seeds")


def read_rows(names):
    """{name: records} of those rows in names that are filed."""
    filed = tables.read_rows("gpu")
    return {name: filed[name] for name in names if name in filed}


def save(figure, name):
    ASSETS.mkdir(exist_ok=True)
    figure.savefig(ASSETS / name, dpi=150, facecolor="white")
    print(f"written: {ASSETS / name}")


def hide_frame(axis):
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------------- bars


def thumbnails(data, photo):
    """{row: picture uint8 (C, H, W) of what it was pretrained on}."""
    synthetic = relaxmim.synthetic_images([0], 256)[0]
    pixels = relaxmim.read_image(photo, in_chans=3)
    side = min(pixels.shape[1:])
    config = relaxmim.Config(data=data, workers=0)
    images = relaxmim.open_data(config, count=25)
    mosaic = make_grid(images.pixels, nrow=5, padding=1, pad_value=255)
    return {
        "infonce, one synthetic image": synthetic,
        PHOTO: tv.center_crop(pixels, [side, side]),
        "infonce, 50,000 images": mosaic,
    }


def draw_bars(data, photo):
    rows = read_rows(BARS)
    pictures = thumbnails(data, photo)
    figure = plt.figure(figsize=(9, 4.9))
    title = "One photograph did as well as 50,000 images"
    what = "ViT-Ti/4 on CIFAR-10, accuracy on the test images in %"
    figure.text(0.02, 0.925, title, size=17, weight="bold")
    figure.text(0.02, 0.868, f"{what} ({conditions(rows)})", size=11.5)

    axis = figure.add_axes([0.33, 0.11, 0.64, 0.73])
    axis.set(xlim=(0, 100), ylim=(-0.55, len(rows) - 0.45))
    hide_frame(axis)
    value = tables.share("accuracy")
    for i, (name, records) in zip(reversed(range(len(rows))), rows.items()):
        accuracies = [value(record) for record in records]
        color = GREY if name.startswith("none") else BLUE
        if name == PHOTO:
            color = ORANGE
        axis.barh(i, mean(accuracies), height=0.72, color=color)
        text = f"{mean(accuracies):.1f}"
        if len(accuracies) > 1:
            text += f" ± {stdev(accuracies):.1f}"
        axis.text(mean(accuracies) + 1, i, text, size=15, weight="bold", va="center")
        axis.text(-11.5, i, BARS[name], size=12.5, ha="right", va="center")
        if name in pictures:
            inset = axis.inset_axes([-10, i - 0.45, 9, 0.9], transform=axis.transData)
            inset.imshow(pictures[name].permute(1, 2, 0))
            hide_frame(inset)

    small = "Pretraining: infonce, the same number of crops whatever the images, then fine-tuning"
    small += " on all labels.\nFrom scratch: that fine-tuning alone, and for twice the steps."
    figure.text(0.02, 0.025, small, size=10, color=DARK, linespacing=1.4)
    save(figure, "bars.png")


# ----------------------------------------------------------------------------------- occlusion


def curve(records, mask):
    """Share of the accuracy above chance that is kept, in %, at each ratio: mean over the seeds."""
    shares = []
    clean = tables.occluded(mask, 0)
    for i in range(len(tables.RATIOS)):
        occluded = tables.occluded(mask, i)
        seeds = []
        for record in records:
            kept = (occluded(record) - tables.CHANCE) / (clean(record) - tables.CHANCE)
            seeds.append(100 * kept)
        shares.append(mean(seeds))
    return shares


def spread_out(heights, gap):
    """The heights, moved so that neighbours are at least gap apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    shift = mean(moved) - mean(heights)
    return [height - shift for height in moved]


def draw_occlusion():
    rows = read_rows(LINES)
    figure = plt.figure(figsize=(9, 4.4))
    title = "With a block hidden, pretrained models kept more of their accuracy"
    what = "Share of the accuracy above chance that is kept, in %"
    figure.text(0.02, 0.92, title, size=15, weight="bold")
    figure.text(0.02, 0.855, f"{what}. ViT-Ti/4 on CIFAR-10, {conditions(rows)}", size=11)
    left = figure.add_axes([0.06, 0.135, 0.32, 0.61])
    right = figure.add_axes([0.70, 0.135, 0.28, 0.61])
    left.set_title("hidden in a block", size=12)
    right.set_title("hidden at random", size=12)
    for axis, mask in ((left, "block"), (right, "random")):
        ends = []
        for name, records in rows.items():
            shares = curve(records, mask)
            color = LINES[name][1]
            axis.plot(tables.RATIOS, shares, color=color, linewidth=2.2, marker="o", markersize=4)
            ends.append(shares[-1])
        axis.set(xlim=(0, 92), ylim=(0, 104), xticks=tables.RATIOS, yticks=range(0, 101, 25))
        axis.set_xlabel("patches hidden, %", size=11)
        axis.grid(color="#e8eaed")
        axis.spines[["top", "right"]].set_visible(False)
        if axis is left:
            for name, height in zip(rows, spread_out(ends, gap=8)):
                label, color = LINES[name]
                axis.text(95, height, label, color=color, va="center", size=11)
        else:
            axis.text(88, min(ends) - 5, "all alike", ha="right", va="center", size=11)
    save(figure, "occlusion.png")


# --------------------------------------------------------------------------------------- views


def open_mae(folder):
    """The MAE that a run trained, and the options of the run."""
    content = relaxmim.load_checkpoint(Path(folder, "checkpoint.pt"))
    config = content["config"]
    size = (config["img_size"], config["patch_size"], config["in_chans"])
    encoder = relaxmim.ViT(*size, *relaxmim.SIZES[config["model"]])
    options = {name: config[name] for name in ("decoder_dim", "decoder_depth")}
    model = relaxmim.MAE(encoder, **options)
    model.load_state_dict(content["model"])
    return model.eval(), config


def reconstruct(model, images, visible, hidden):
    """Images (B, C, H, W) whose hidden patches are predicted. Nothing of those is used.

    The model predicts normalised patches. They take mean and deviation from the visible patches
    around them, weighted by a Gaussian of the distance.
    """
    encoder = model.encoder
    patches = relaxmim.patchify(images, encoder.patch_size)  # (B, N, P)
    seen = relaxmim.gather_tokens(patches, visible)  # (B, V, P)
    place = torch.stack(relaxmim.patch_coords(encoder.grid), dim=1).float()  # (N, 2)
    distance = torch.cdist(place[hidden], place[visible])  # (B, K, V)
    weights = softmax(-(distance**2) / (2 * 0.8**2), dim=2)
    level = weights @ seen.mean(dim=2, keepdim=True)  # (B, K, 1)
    deviation = weights @ seen.std(dim=2, keepdim=True)
    pred = model.decoder(encoder(images, visible), visible, hidden)  # (B, K, P)
    index = hidden[..., None].expand_as(pred)
    patches = patches.scatter(1, index, pred * deviation + level)
    return relaxmim.unpatchify(patches, encoder.grid, encoder.patch_size)


def find_whole(model, images, visible):
    """Index (n,) of the whole image nearest to each occluded one, and the share found, in %."""
    parts = []
    for part, seen in zip(images.split(250), visible.split(250)):
        whole = relaxmim.ViT.forward(model, part)[:, 1:].mean(dim=1)  # without a classifier's head
        occluded = relaxmim.ViT.forward(model, part, seen)[:, 1:].mean(dim=1)
        parts.append(torch.stack([whole, occluded]))
    whole, occluded = torch.cat(parts, dim=1)  # (n, D) each
    nearest, metrics = relaxmim.compare_features(whole, occluded)
    return nearest, 100 * metrics["retrieval"].item()


@torch.no_grad()
def draw_views(data, mae_run, scratch_run):
    columns = 12
    cpu = torch.device("cpu")
    mae, options = open_mae(mae_run)
    encoder = mae.encoder
    relaxmim.seed_all(0, 0)  # as eval_occlusion.py does
    blank, _ = eval_occlusion.open_model(scratch_run, cpu, trained=False)
    scratch, settings = eval_occlusion.open_model(scratch_run, cpu)
    if settings.get("checkpoint", "") or not scratch.classes:
        raise SystemExit(f"{scratch_run}: not a classifier trained from scratch")
    config = relaxmim.Config(data=data, workers=0)
    dataset = relaxmim.open_data(config, train=False, labelled=True, count=2000)
    images = relaxmim.normalize(dataset.pixels.float())
    relaxmim.seed_all(0, 0)
    visible, hidden = relaxmim.random_mask(len(images), encoder.grid, 0.75)

    first = slice(0, columns)
    shown = dataset.pixels[first] / 255
    light = torch.full_like(shown, 0.88)
    seen = eval_occlusion.cover(shown, light, hidden[first], encoder.patch_size)
    reconstructed = reconstruct(mae, images[first], visible[first], hidden[first])
    reconstructed = (relaxmim.denormalize(reconstructed) / 255).clamp(0, 1)
    rows = [("image", shown), ("visible patches", seen), ("mae's reconstruction", reconstructed)]
    found = {}
    models = {"random initialisation": blank.model, "supervised": scratch.model, "mae": encoder}
    for name, model in models.items():
        nearest, share = find_whole(model, images, visible)
        label = f"{name}\nfinds {share:.0f} %"
        rows.append((label, dataset.pixels[nearest[first]] / 255))
        found[label] = nearest[first] == torch.arange(columns)

    question = f"Which of {len(images):,} whole images has the most similar features?"
    small = f"ViT {options['model']}/{options['patch_size']}, seed 0, {options['steps']} steps on"
    small += " CIFAR-10. In the reconstruction, hidden patches take mean and contrast from visible"
    small += " neighbours."
    lay_out(rows, found, f"{question} Green: the right one.", small)


def lay_out(rows, found, question, small):
    """Save views.png. rows: label and pictures; found: of some labels, which are right."""
    figure = plt.figure(figsize=(9, 4.7))
    title = "Recognising a test image by a quarter of its patches"
    figure.text(0.01, 0.945, title, size=14, weight="bold")
    figure.text(0.01, 0.492, question, size=11.5)
    figure.text(0.01, 0.03, small, size=9, color=DARK)
    step = 0.0645  # from one picture to the next, of the width
    for i, (label, pictures) in enumerate(rows):
        bottom = 0.805 - 0.122 * i
        if label in found:
            bottom -= 0.07  # below the question
        figure.text(0.208, bottom + 0.056, label, size=11, ha="right", va="center")
        for j, picture in enumerate(pictures):
            axis = figure.add_axes([0.218 + step * j, bottom, step, 0.112])
            axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            own = label in found and found[label][j]
            axis.spines[:].set(color=GREEN if own else "white", linewidth=2.5)
    save(figure, "views.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    pictures = parser.add_subparsers(dest="picture", required=True)
    bars = pictures.add_parser("bars")
    bars.add_argument("data")
    bars.add_argument("photo")
    pictures.add_parser("occlusion")
    views = pictures.add_parser("views")
    views.add_argument("data")
    views.add_argument("mae")
    views.add_argument("scratch")
    args = parser.parse_args()
    if args.picture == "bars":
        draw_bars(args.data, args.photo)
    elif args.picture == "occlusion":
        draw_occlusion()
    else:
        draw_views(args.data, args.mae, args.scratch)


if __name__ == "__main__":
    main()
