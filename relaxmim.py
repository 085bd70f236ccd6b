# SPDX-License-Identifier: MIT
"""RelaxMIM: masked image modeling is siamese learning of occlusion-invariant features.

Siamese learning shows an encoder f two transformed views of an image and measures how alike its
features are. MAE looks different: it hides patches, and a decoder d paints them. It is the same
thing. Write x for an image, M for its visible patches and 1-M for the hidden ones, x M for x with
only the visible patches left:

    (1) siamese   min measure( f(T1(x)), f(T2(x)) )         T: what to become invariant to
    (2) MAE       L = || ( d(f(x M)) - x ) (1-M) ||^2
    (3) suppose a decoder d' can read the hidden patches back from their own features:
                  d'(f(x (1-M))) (1-M) = x (1-M), approximately
    (4) put into (2), with z1 = f(x M) and z2 = f(x (1-M)):
                  L = || ( d(z1) - d'(z2) ) (1-M) ||^2     a measurement: how alike are z1, z2
    (5) RelaxMIM  (4) + lambda || ( d'(z2) - x ) (1-M) ||^2    the penalty is (3)
    (6) InfoNCE   -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) )    instead of both

So T is the mask, the measurement is the decoder with its loss, and what is learned is to see
through occlusion. The argument is that of Kong and Zhang (arXiv 2208.04164, CVPR 2023); every
setting here is ours. This file is the whole method, and each piece stands alone: take it.

    python relaxmim.py --loss infonce --num-images 1      one embedded image: 2 minutes, 2 cores
    python relaxmim.py --loss mae --data cifar10          or a folder, or one photograph
    python relaxmim.py --transform crop                   (1) with T = crop and colour, to compare
    python relaxmim.py --loss mae --model base --patch-size 16 --img-size 224 --data DIR   for a GPU

A run's folder holds its settings, log, checkpoint and pictures. See finetune.py and
eval_occlusion.py for what the features are worth.
"""

import argparse
import difflib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.ops import roi_align, stochastic_depth
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ----------------------------------------------------------------------------------- Config

SIZES = {  # --model: width, depth, heads
    "nano": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class UserError(Exception):
    """A mistake of the user's, in one line: the option, the value given and what would do."""


def fail(message):
    raise UserError(message)


def option(default, help, *valid):
    """A field that is a command-line option too. valid: the names, or lowest and highest value."""
    return field(default=default, metadata={"help": help, "valid": valid})


@dataclass
class Config:
    """Every hyperparameter of pretraining; the values are our choice, not the paper's."""

    loss: str = option("infonce", "similarity of the two views", "mae", "relax", "infonce")
    transform: str = option("mask", "what to become invariant to", "mask", "crop")
    mask: str = option("random", "which patches are hidden", "random", "block", "grid")
    mask_ratio: float = option(0.75, "share of the patches that is hidden", 0.0, 1.0)
    norm_pix: bool = option(True, "mae, relax: target patches of mean 0 and variance 1")
    relax_weight: float = option(1.0, "relax: lambda, the weight of the constraint", 0.0, 1e6)
    temperature: float = option(0.2, "infonce: tau", 1e-3, 100.0)
    model: str = option("nano", "size of the encoder", *SIZES)
    patch_size: int = option(4, "side of a patch in pixels", 1, 1024)
    decoder_depth: int = option(1, "blocks of the decoder", 1, 64)
    data: str = option("synthetic", "synthetic, cifar10, cifar100, stl10, a folder or a photograph")
    num_images: int = option(0, "take so many of the images, at random; 0: all", 0, 10**9)
    img_size: int = option(32, "side of a crop in pixels", 1, 4096)
    data_dir: str = option("data", "where torchvision's sets are kept")
    cache_gb: float = option(4.0, "a folder larger than this is streamed, GiB", 0.0, 1e6)
    workers: int = option(2, "processes that read files", 0, 256)
    steps: int = option(400, "optimizer steps", 1, 10**9)
    batch_size: int = option(128, "images per step", 2, 10**6)
    lr: float = option(1e-3, "peak learning rate", 1e-12, 10.0)
    weight_decay: float = option(0.05, "decay of matrices", 0.0, 10.0)
    warmup: float = option(0.1, "share of the steps in which the rate rises", 0.0, 1.0)
    clip_grad: float = option(3.0, "largest gradient norm", 1e-6, 1e9)
    seed: int = option(0, "of all that is random", 0, 2**31)
    out: str = option("", "folder of the run; empty: runs/LOSS-DATA")
    resume: bool = option(False, "go on with the run in that folder")
    overwrite: bool = option(False, "replace the run in that folder")
    save_every: int = option(500, "steps between checkpoints", 1, 10**9)
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto", "auto is bfloat16 where that is native", "auto", "float32", "bfloat16"
    )


def parse(cls, about, args):
    """An instance of `cls` from a command line: a tuple is positional, other fields are options."""
    parser = argparse.ArgumentParser(
        description=about,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    parser.error = fail
    flags = {f.name: "--" + f.name.replace("_", "-") for f in fields(cls)}
    for f in fields(cls):
        names = ": " + ", ".join(filter(None, f.metadata["valid"])) if f.type is str else ""
        note = f"{f.metadata['help']}{names.rstrip(': ')} [{f.default}]".replace("%", "%%")
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        if f.type is tuple:
            parser.add_argument(f.name, nargs="*", help=f.metadata["help"])
        else:
            parser.add_argument(flags[f.name], default=f.default, help=note, **kind)
    config = cls(**vars(parser.parse_args(args)))
    for f in fields(cls):
        value, valid = getattr(config, f.name), f.metadata["valid"]
        if f.type is str and valid and value not in valid:
            near = difflib.get_close_matches(value, valid, 1) or [", ".join(valid)]
            fail(f"{flags[f.name]} {value}: did you mean {near[0]}?")
        if f.type in (int, float) and not valid[0] <= value <= valid[1]:
            fail(f"{flags[f.name]} {value}: must be from {valid[0]} to {valid[1]}")
    return config


# ------------------------------------------------------------------------------------- Data

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)  # ImageNet's, of 0..255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
SHAPES = ["disc", "ring", "bar", "trefoil", "cross", "star"]  # labels of the synthetic images


def set_seed(seed, stream):
    """Make all that is random from here on a function of (seed, stream), not of what was before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]))


def synthetic_images(index, size, seed=0, leaves=24):
    """Dead leaves: textured ellipses of all sizes, one hiding the other, and an object among them.

    Image i is a function of (seed, i) alone. Leaf radii follow r**-3, as in natural images (Lee,
    Mumford and Huang, 2001). Returns uint8 (n, 3, size, size) and labels (n,): places in SHAPES.
    """
    u = np.stack([np.random.default_rng([seed, int(i)]).random((leaves + 3, 13)) for i in index])
    u = torch.from_numpy(u).float()[..., None, None]  # (n, layers, 13, 1, 1) in 0..1
    y, x = torch.linspace(-1, 1, size)[:, None], torch.linspace(-1, 1, size)
    images, shape = u[:, 0, 10:].repeat(1, 1, size, size), (u[:, leaves, 0] * len(SHAPES)).long()
    for layer in range(leaves + 3):  # the object lies on the leaves, two more leaves on the object
        a, b, c, d, e, *t = u[:, layer, :10].unbind(1)  # each (n, 1, 1)
        length, radius, edge, hole = 1 + 2 * a, 0.13 / (1 - 0.95 * b).sqrt(), 1.0, 0.0
        top, left, angle = 2.4 * c - 1.2, 2.4 * d - 1.2, 2 * math.pi * e
        if layer == leaves:
            top, left, radius = top * 0.4, left * 0.4, 0.45 + 0.25 * b
            length, hole = 1 + 2 * (shape == 2), 0.6 * (shape == 1)
        along = ((x - left) * angle.cos() + (y - top) * angle.sin()) / (radius * length.sqrt())
        across = ((y - top) * angle.cos() - (x - left) * angle.sin()) / (radius / length.sqrt())
        r = (along.square() + across.square()).sqrt()
        if layer == leaves:  # three, four or five petals
            edge = 1 - 0.4 * (shape > 2) * (1 - (shape * torch.atan2(across, along)).cos())
        inside = torch.minimum(edge - r, r - hole) * radius * size / 2  # in pixels
        stripes = (9 * along * t[0] + 9 * across * t[1] + 6 * t[2]).sin()
        shade = 0.1 + 0.3 * t[3] * stripes + 0.3 * (t[4] - 0.5) * along
        colour = u[:, layer, 10:] * 0.8 + shade[:, None]
        images.lerp_(colour, (inside + 0.5).clamp(0, 1)[:, None])
    return (images.clamp(0, 1) * 255).round().byte(), shape.flatten()


def read_image(path, size=None):
    """An image file as uint8 (3, H, W); with size (H, W) it is scaled to cover it and cut."""
    with Image.open(path) as image:
        if size:
            image.draft(None, size[::-1])  # a large JPEG is decoded at 1/2, 1/4 or 1/8
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel: convert() would cut them off
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
        if size and image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(Dataset):
    """n images. pixels: uint8 (n, 3, H, W), or None if `names` are files to be read when needed.

    As a data set, item i is (i, uint8 (3, *size)); if file i is damaged the next takes its place.
    """

    def __init__(self, names, pixels, labels, classes, size=None):
        self.names, self.pixels, self.labels = names, pixels, labels
        self.classes, self.size = classes, size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        for j in (k % len(self) for k in range(i, i + len(self))):
            try:
                return j, read_image(self.names[j], self.size)
            except Exception as error:  # noqa: BLE001 (decoders raise anything)
                print(f"skipped {self.names[j]}: {str(error)[:80]}", file=sys.stderr)
        fail("--data: none of its images can be decoded")

    def batches(self, indices, device, workers):
        """For each (B,) of `indices`: the indices and uint8 (B, 3, H, W), (1, 3, H, W) if n = 1."""
        if self.pixels is not None:
            pixels = self.pixels.to(device)
            for index in indices:
                here = index.to(device, non_blocking=True)
                yield index, pixels if len(self) == 1 else pixels[here]
            return
        lists, pin = (index.tolist() for index in indices), torch.cuda.is_available()
        loader = DataLoader(self, batch_sampler=lists, num_workers=workers, pin_memory=pin)
        for index, pixels in loader:
            yield index, pixels.to(device, non_blocking=True)


def open_data(config, split, img_size, count=0):
    """The Images that config.data names. split: "train", "test", or "fit" and "val", which are nine
    tenths and one tenth of train. count: so many, by a seeded permutation; 0: all.
    """
    name, train, pixels = config.data, split != "test", None
    try:
        if name == "synthetic":
            names, classes = range(5000) if train else range(10**6, 10**6 + 1000), SHAPES
            labels = [0] * len(names)  # known once they are made
        elif name in ("cifar10", "cifar100"):
            found = getattr(datasets, name.upper())(config.data_dir, train, download=True)
            names, labels, classes = range(len(found)), found.targets, found.classes
            pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        elif name == "stl10":  # train has 100,000 more without a label, -1
            part = "train+unlabeled" if split == "train" else "train" if train else "test"
            found = datasets.STL10(config.data_dir, part, download=True)
            names, labels, classes = range(len(found)), found.labels, found.classes
            pixels = torch.from_numpy(found.data)
        else:  # a photograph, or a folder: of train/CLASS and test/CLASS, or of any depth
            parts = (Path(name, part) for part in (["train"] if train else ["test", "val"]))
            root = next((part for part in parts if part.is_dir()), Path(name))
            files = [root] if root.is_file() else sorted(root.rglob("*"))
            names = [str(f) for f in files if f.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
            folders = [Path(f).relative_to(root).parts[:-1][:1] for f in names]  # () or (CLASS,)
            found = {folder: label for label, folder in enumerate(sorted(set(folders)))}
            labels, classes = [found[folder] for folder in folders], ["".join(f) for f in found]
    except (OSError, RuntimeError) as error:
        fail(f"--data {name}: cannot be had ({str(error).splitlines()[0]})")
    keep = np.arange(len(names))
    if split in ("fit", "val"):
        keep, tenth = np.random.default_rng(0).permutation(keep), len(keep) // 10
        keep = keep[tenth:] if split == "fit" else keep[:tenth]
    if not len(keep) or count > len(keep):
        known = "synthetic, cifar10, cifar100, stl10, a folder or a photograph"
        fail(f"--data {name}: {len(keep)} images found, {count or 1} wanted; it takes {known}")
    if count:
        keep = np.random.default_rng([config.seed, 1]).permutation(keep)[:count]
    names, labels = [names[i] for i in keep], torch.tensor([int(labels[i]) for i in keep])
    if name == "synthetic":
        return Images(names, *synthetic_images(names, img_size), classes)
    if pixels is not None:
        return Images(names, pixels[keep], labels, classes)
    # Files are brought to one size: their own if they share it and it is small, or a crop's twice.
    # From a lone photograph all crops come, so it is kept finer.
    finest, sizes = img_size * (4 if len(names) == 1 else 2), set()
    for file in names[:64]:
        with suppress(Exception), Image.open(file) as image:  # what is damaged is named later
            sizes.add(image.size[::-1])
    own = sizes.pop() if len(sizes) == 1 else (finest + 1,)
    data = Images(names, None, labels, classes, own if min(own) <= finest else (finest, finest))
    if len(names) * 3 * math.prod(data.size) <= config.cache_gb * 2**30:
        every = torch.arange(len(names))
        read = data.batches(every.split(256), "cpu", config.workers if len(names) > 1000 else 0)
        index, data.pixels = map(torch.cat, zip(*read))
        good = (index == every).nonzero()[:, 0]  # the rest are damaged, and others stand there
        if len(good) < len(every):
            print(f"{len(every) - len(good)} of {len(every)} files skipped", file=sys.stderr)
        data.names, data.labels = [names[i] for i in good], labels[good]
        data.pixels = data.pixels[good]
    return data


def batch_indices(n, batch, seed, steps):
    """For each of `steps` the images (B,) it takes: an epoch takes all n, in its own order."""
    size, orders = n * -(-batch // n), {}  # a set smaller than a batch is repeated
    for step in steps:
        first, last = step * batch // size, ((step + 1) * batch - 1) // size
        for epoch in {first, last} - orders.keys():
            orders[epoch] = np.random.default_rng([seed, 2, epoch]).permutation(size)
        orders = {epoch: orders[epoch] for epoch in (first, last)}
        start = step * batch - first * size
        yield torch.from_numpy(np.concatenate(list(orders.values()))[start : start + batch] % n)


def normalise(images):
    """0..255 to mean 0 and variance 1, by ImageNet's figures."""
    mean, std = (figure.to(images, non_blocking=True) for figure in (MEAN, STD))
    return (images - mean) / std


def crop(images, boxes, size):
    """Cut a box from each image and resize it, all in one call: float (B, 3, size, size) in 0..255.

    images: uint8 (B, 3, H, W), or (1, 3, H, W) to cut all from one. boxes: (B, 4), left, top, right
    and bottom in pixels. Averages where it shrinks, so nothing aliases.
    """
    which = torch.arange(len(boxes), device=images.device) % len(images)
    boxes = torch.cat([which[:, None], boxes], dim=1)
    return roi_align(images.float(), boxes, size, aligned=True)


def random_crops(images, batch, size, smallest=0.2):
    """RandomResizedCrop and flip of uint8 images: float (batch, 3, size, size) in 0..255.

    The area is `smallest` to 1 of the image, or from where a crop has one pixel for each of its
    own, if that is less. The sides are in a ratio of 3/4 to 4/3.
    """
    (H, W), u = images.shape[2:], torch.rand(5, batch, device=images.device)
    smallest = min(smallest, size * size / (H * W))
    side = ((smallest + (1 - smallest) * u[0]) * H * W).sqrt()
    stretch = ((u[1] - 0.5) * math.log(4 / 3)).exp()  # the root of the ratio
    width, height = (side * stretch).clamp(max=W), (side / stretch).clamp(max=H)
    left, top = u[2] * (W - width), u[3] * (H - height)
    crops = crop(images, torch.stack([left, top, left + width, top + height], dim=1), size)
    return torch.where((u[4] < 0.5)[:, None, None, None], crops.flip(3), crops)


# ------------------------------------------------------------------------------------ Masks
# mask: bool (B, N), True = hidden; grid: rows and columns of patches; ratio: share that is hidden


def hide(score, ratio):
    """Hide the round(ratio * N) patches of each row whose score (B, N) is smallest."""
    order = score.argsort(dim=1)[:, : round(ratio * score.shape[1])]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def places(grid, device=None):
    """Row and column (N, 2) of each patch."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid))


def random_mask(batch, grid, ratio, generator=None, device=None):
    """Patches hidden independently of one another, as in MAE."""
    return hide(torch.rand(batch, math.prod(grid), generator=generator, device=device), ratio)


def block_mask(batch, grid, ratio, generator=None, device=None):
    """One rectangle hidden, of random place and proportions, cut to the exact count."""
    u = torch.rand(batch, 1, 3, generator=generator, device=device)
    extent = torch.tensor(grid, device=device)
    away = (places(grid, device) + 0.5 - u[..., :2] * extent).abs() / extent  # (B, N, 2)
    stretch = (u[..., 2] - 0.5).exp()  # of rows against columns: 0.6 to 1.6
    return hide(torch.maximum(away[..., 0] * stretch, away[..., 1] / stretch), ratio)


def grid_mask(batch, grid, ratio, generator=None, device=None):
    """What stays visible is spread evenly: at 0.75 it is every second row and column."""
    shift = torch.randint(8, (batch, 1, 2), generator=generator, device=device)
    row, col = (places(grid, device) + shift).unbind(-1)  # (B, N)
    score = torch.rand(row.shape, generator=generator, device=device)
    for bit, weight in enumerate((16, 4, 1)):  # an 8 x 8 Bayer matrix, the order of a dither
        i, j = row >> bit & 1, col >> bit & 1
        score = score - weight * ((i ^ j) * 2 + j)
    return hide(score, ratio)


MASKS = {"random": random_mask, "block": block_mask, "grid": grid_mask}

# ------------------------------------------------------------------------------------ Model
# B images of N patches, V of them visible and H hidden; D width, P = p*p*C numbers in a patch


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, N, P), patches row by row, each laid out as rows, columns, channels."""
    (B, C, H, W), p = images.shape, patch_size
    x = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, grid, patch_size):
    """(B, N, P) -> (B, C, H, W), the inverse of patchify. grid: (H/p, W/p)."""
    (h, w), p = grid, patch_size
    x = patches.reshape(len(patches), h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), -1, h * p, w * p)


def sincos_positions(grid, dim):
    """Fixed 2-D positions (1, 1+N, D), zero for the class token; MAE's layout: column, then row."""
    if dim % 4:
        raise ValueError(f"sin-cos positions take a width that 4 divides, not {dim}")
    frequency = (-math.log(10000) / (dim // 4) * torch.arange(dim // 4).double()).exp()
    angle = places(grid).flip(1)[..., None] * frequency  # (N, 2, D/4)
    table = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (N, D)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def split(mask, num_hidden=None):
    """Indices of the visible (B, V) and of the hidden (B, H) patches, each in ascending order.

    num_hidden: how many each row hides, where known; to count them would make a GPU wait.
    """
    if num_hidden is None:
        num_hidden = int(mask[0].sum())
        if (mask.sum(1) != num_hidden).any():
            raise ValueError("every row of a mask must hide the same number of patches")
    order = mask.byte().argsort(dim=1, stable=True)
    return order.split([mask.shape[1] - num_hidden, num_hidden], dim=1)


def take(x, index):
    """Tokens of x (B or 1, N, D) at index (B, K): (B, K, D)."""
    return x.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        if x.is_cuda:
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # written out, a training step is 1.5 times faster on a CPU at 17 to 65 tokens
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        fc1, fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.drop_path = 0.0  # chance that a sample skips a branch in training
        for linear in (self.attn.qkv, self.attn.proj, fc1, fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


class ViT(nn.Module):
    """Vision transformer with timm's names, that leaves hidden patches out before its first layer.

    img_size: side in pixels, or (H, W). Raises ValueError where patch_size does not divide it.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio=4.0):
        super().__init__()
        H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
        if H % patch_size or W % patch_size:
            raise ValueError(f"patches of {patch_size} do not divide an image of {H} x {W}")
        self.patch_size, self.grid = patch_size, (H // patch_size, W // patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.register_buffer("pos_embed", sincos_positions(self.grid, embed_dim))
        proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        nn.init.xavier_uniform_(proj.weight.view(embed_dim, -1))
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images, mask=None, num_hidden=None):
        """images (B, C, H, W), mask (B, N) or None: all visible -> (B, 1 + V, D), class first."""
        patches, pos = patchify(images, self.patch_size), self.pos_embed[:, 1:]
        if mask is not None:
            visible, _ = split(mask, num_hidden)
            patches, pos = take(patches, visible), take(pos, visible)
        proj = self.patch_embed.proj  # a convolution's weights, used as the matrix they are here
        x = F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias) + pos
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + V, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """MAE's decoder: from the tokens of visible patches a prediction for each hidden one."""

    def __init__(self, grid, in_dim, embed_dim, depth, num_heads, out_dim):
        super().__init__()
        self.decoder_embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, embed_dim))
        self.decoder_blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(embed_dim, out_dim)

    def forward(self, tokens, mask, num_hidden=None):
        """tokens (B, 1 + V, D) of the encoder, mask (B, N) -> (B, H, out_dim)."""
        visible, hidden = split(mask, num_hidden)
        cls, pos = self.decoder_pos_embed.split([1, mask.shape[1]], dim=1)
        seen = torch.cat([cls.expand(len(mask), -1, -1), take(pos, visible)], dim=1)
        unseen = self.mask_token + take(pos, hidden)
        x = torch.cat([self.decoder_embed(tokens) + seen, unseen], dim=1)  # in any order: attention
        for block in self.decoder_blocks:  # does not mind
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, -hidden.shape[1] :]))


# ----------------------------------------------------------------------------- Similarities


def mae_loss(pred, x, mask=None):
    """(2)  L = || ( d(f(x M)) - x ) (1-M) ||^2, averaged over what is hidden.

    pred, x: (B, N, P) with mask (B, N), True = hidden; or (B, H, P), hidden patches only, without.
    """
    error = (pred - x).square().mean(-1)  # (B, N)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


def relax_loss(d1, d2, x, weight=1.0, mask=None):
    """(5)  || ( d(z1) - d'(z2) ) (1-M) ||^2 + lambda || ( d'(z2) - x ) (1-M) ||^2.

    d1 = d(z1), d2 = d'(z2), x: shapes and mask as in mae_loss; equal to it where d' is perfect.
    """
    return mae_loss(d1, d2, mask) + weight * mae_loss(d2, x, mask)


def info_nce(q, k, temperature):
    """(6)  -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) ), averaged over the queries.

    q, k: (..., n, D), made unit vectors here; k_i answers q_i, the other n - 1 are its negatives.
    Returns the loss, about log(n) for features that say nothing, and the share of queries whose
    answer is the nearest candidate, 1/n by chance.
    """
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    with torch.autocast(q.device.type, enabled=False):  # bfloat16 is too coarse for exp(1 / tau)
        logits = q @ k.mT / temperature  # (..., n, n)
    loss = logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)  # (..., n)
    right = logits.argmax(-1) == torch.arange(logits.shape[-1], device=q.device)
    return loss.mean(), right.float().mean()


# --------------------------------------------------------------------------------- RelaxMIM


class RelaxMIM(nn.Module):
    """Two views of each image, one encoder f, and a measurement of how alike it finds them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, depth, heads = SIZES[config.model]
        self.encoder = ViT(config.img_size, config.patch_size, 3, dim, depth, heads)
        out_dim = dim // 2 if config.loss == "infonce" else 3 * config.patch_size**2
        if config.transform == "crop":  # a projection head, as in SimCLR
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
            return
        self.decoder = Decoder(self.encoder.grid, dim, dim, config.decoder_depth, heads, out_dim)
        if config.loss != "mae":
            self.head = nn.Linear(dim, out_dim)  # relax: d' of (3); infonce: from a token to its k

    def forward(self, view1, view2, mask, num_hidden):
        """The loss, and a dict of figures to watch, of two views (B, C, H, W) and a mask (B, N)."""
        c = self.config
        if c.transform == "crop":  # conventional siamese learning: pooled features, nothing hidden
            q, k = (self.head(self.encoder(x)[:, 1:].mean(1)) for x in (view1, view2))  # (B, D)
            loss, accuracy = info_nce(q, k, c.temperature)
            return loss, {"accuracy": accuracy, "feature_std": spread(q)}
        _, hidden = split(mask, num_hidden)
        z1 = self.encoder(view1, mask, num_hidden)  # f(x M): (B, 1 + V, D)
        d1 = self.decoder(z1, mask, num_hidden).float()  # d(z1): (B, H, P), or q: (B, H, D/2)
        figures = {"feature_std": spread(z1[:, 1:].mean(1))}
        x = take(patchify(view1, c.patch_size), hidden)  # x (1-M): (B, H, P)
        if c.norm_pix:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        if c.loss == "mae":
            return mae_loss(d1, x), figures
        if c.loss == "relax":
            z2 = self.encoder(view2, ~mask, mask.shape[1] - num_hidden)  # f(x (1-M)): (B, 1 + H, D)
            d2 = self.head(z2[:, 1:]).float()  # d'(z2): (B, H, P)
            figures["output_std"] = d2.detach().flatten(0, 1).std(0).mean()  # 0: collapsed
            return relax_loss(d1, d2, x, c.relax_weight), figures
        with torch.no_grad():
            z2 = self.encoder(view2)  # f(x), nothing hidden: (B, 1 + N, D)
        k = self.head(z2[:, 1:]).float()  # (B, N, D/2)
        k = k - k.mean(0)  # what all images have at a place would give the place away
        # Which of the image's hidden patches lies here? q_i = d1_i; the candidates are all of them.
        loss, accuracy = info_nce(d1, take(k, hidden), c.temperature)
        return loss, {**figures, "accuracy": accuracy}


def spread(features):
    """How far the directions of features (B, D) differ: 0 where they collapsed, 1 at the most."""
    return F.normalize(features.detach().float(), dim=-1).std(0, correction=0).norm()


@torch.no_grad()
def invariance(encoder, images, mask):
    """The claim, measured: mean cosine of images and their masked selves, and of different images.

    images: (B, C, H, W); mask: (B, N). Features are the mean of the patch tokens, centred over the
    batch and both views: what all images share is no likeness. Returns (same, different) in -1..1.
    """
    a, b = (encoder(images, m)[:, 1:].float().mean(1) for m in (None, mask))  # (B, D)
    centre = torch.cat([a, b]).mean(0)
    a, b = F.normalize(a - centre, dim=1), F.normalize(b - centre, dim=1)
    same, every, B = (a * b).sum(), (a.sum(0) * b.sum(0)).sum(), len(a)
    return (same / B).item(), ((every - same) / (B * B - B)).item()


@torch.no_grad()
def draw(model, images, mask, folder):
    """Write features.png and, where pixels are predicted, reconstruction.png: 8 images in columns.

    features.png: original, masked, and the patch features of the whole and of the masked image:
    first three principal components as colours. reconstruction.png: original, masked, predictions
    pasted in. With norm_pix they lack mean and variance: the nearest visible patch lends its own.
    """
    p, grid, (visible, hidden) = model.encoder.patch_size, model.encoder.grid, split(mask)
    x = patchify((images * STD.to(images) + MEAN.to(images)) / 255, p)  # (B, N, P) in 0..1
    shown = x.masked_fill(mask[..., None], 0.5)
    whole, masked = (model.encoder(images, m).float()[:, 1:] for m in (None, mask))
    centre = whole.mean(0, keepdim=True)  # of each position: (1, N, D)
    axes = torch.linalg.svd((whole - centre).flatten(0, 1), full_matrices=False)[2][:3].T
    a, b = (whole - centre) @ axes, (masked - take(centre, visible)) @ axes  # (B, N or V, 3)
    b = torch.zeros_like(a).scatter(1, visible[..., None].expand_as(b), b)
    scale = 4 * a.flatten(0, 1).std(0)
    pictures = {"features": [x, shown, *((c / scale + 0.5).repeat(1, 1, p * p) for c in (a, b))]}
    if model.config.loss != "infonce":
        d = model.decoder(model.encoder(images, mask), mask).float()  # (B, H, P)
        if model.config.norm_pix:
            at = places(grid, x.device).float()
            away = torch.cdist(at, at)[hidden].masked_fill(mask[:, None], math.inf)  # (B, H, N)
            lender = take(x, away.argmin(-1))
            d = d * lender.std(-1, keepdim=True) + lender.mean(-1, keepdim=True)
        pictures["reconstruction"] = [x, shown, x.scatter(1, hidden[..., None].expand_as(d), d)]
    for name, rows in pictures.items():
        rows = unpatchify(torch.cat([row[:8] for row in rows]).clamp(0, 1), grid, p)
        rows = F.interpolate(rows, scale_factor=max(1, 96 // rows.shape[-1]))  # larger, not blurred
        save_image(make_grid(rows, nrow=8, padding=4), folder / f"{name}.png")


# --------------------------------------------------------------------------------- Training

FORMAT, LOG_EVERY = 1, 20  # of checkpoint.pt; steps from one line of the log to the next
# what may differ when a run is resumed
FREE = {"steps", "out", "resume", "overwrite", "save_every", "workers", "cache_gb", "device"}


def learning_rate(step, config):
    """Linear warm-up, then half a cosine down to 0: a function of the step."""
    rise = max(1, round(config.warmup * config.steps))
    fall = (step - rise) / max(1, config.steps - rise)
    return config.lr * ((step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * fall))


def pick_device(config):
    """The device asked for, or the best there is; and autocast to bfloat16 where that is native."""
    there = torch.accelerator.is_available()
    best = torch.accelerator.current_accelerator().type if there else "cpu"
    device = best if config.device == "auto" else config.device
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {device}: not to be had here; auto takes what is")
    native = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    native |= device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    low = native if config.precision == "auto" else config.precision == "bfloat16"
    return device, torch.autocast(device.split(":")[0], torch.bfloat16, enabled=low)


def load_checkpoint(path):
    """The content of a checkpoint, or of the one in a run's folder; nothing in it is executed."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] > FORMAT:
            fail(f"format {content['format']} is newer than this script's {FORMAT}")
        return content
    except Exception as error:  # noqa: BLE001 (damaged files make torch raise anything)
        reason = str(error).strip().split("\n")[0][:80]
        fail(f"{path}: not a checkpoint of this project ({reason})")


def save_checkpoint(folder, content):
    """Written beside, flushed to the disk, then renamed: a crash leaves the old or the new one."""
    with open(folder / "checkpoint.tmp", "wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def start_run(config):
    """See that a run can be had in config.out. Returns the checkpoint to resume from, or None."""
    folder, settings = Path(config.out), asdict(config)
    if config.resume:
        content = load_checkpoint(folder)
        for name, value in content["config"].items():
            if name not in FREE and settings.get(name) != value:
                fail(f"--{name.replace('_', '-')} {settings.get(name)}: the run has {value}")
        if content["step"] >= config.steps:
            fail(f"--steps {config.steps}: the run in {folder} has {content['step']} already")
        return content
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        fail(f"--out {folder}: not empty; add --resume or --overwrite, or name another")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        fail(f"--out {folder}: cannot be written in {above}")


def decay_groups(named, weight_decay, scale=1.0):
    """Parameter groups in which only what has two dimensions or more decays."""
    matrices = {"params": [p for p in named if p.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0}
    return [{**group, "scale": scale} for group in (matrices, vectors)]


def fit(config, parts, optimizer, resumed, data, device, forward, watch):
    """The one loop: from the step that `resumed` had come to, or 0, to config.steps.

    parts: the modules by their names in checkpoint.pt. forward(index, pixels): the loss and a dict
    of figures of one batch, tensors all; watch(): figures that cost more, for each fifth line of
    the log. Nothing makes a GPU wait but the log. Returns the last line of the log.
    """
    first, folder, caught = 0, Path(config.out), []
    log = folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if resumed:
        first = resumed["step"]
        for name, part in parts.items():
            part.load_state_dict(resumed[name])
        optimizer.load_state_dict(resumed["optimizer"])
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= first]
        log.write_text("".join(line + "\n" for line in lines))
    else:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        log.write_text("")
    (folder / "images.txt").write_text("".join(f"{name}\n" for name in data.names))

    def stop(number, frame):  # a second Ctrl-C or SIGTERM ends the program at once
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    B, n, since, watched = config.batch_size, len(data), None, watch()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    print(
        f"{n} images, {config.steps} steps of {B} = {config.steps * B / n:.1f} epochs, on {device}"
    )
    order = batch_indices(n, B, config.seed, range(first, config.steps))
    bar = tqdm(data.batches(order, device, config.workers), total=config.steps, initial=first)
    for step, (index, pixels) in enumerate(bar, first + 1):
        set_seed(config.seed, step)  # all that is random in a step is a function of its number
        loss, figures = forward(index, pixels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, config.clip_grad)
        rate = learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.found_inf = (~norm.isfinite()).float()  # then no weight moves
        optimizer.step()
        optimizer.zero_grad()

        last = step == config.steps or bool(caught)
        if step == 1 or step % LOG_EVERY == 0 or last:
            if not (loss.isfinite() and norm.isfinite()):
                fail(f"step {step}: the loss is not finite, and no weight moved; try a lower --lr")
            if step % (5 * LOG_EVERY) == 0 or last:
                watched = watch()
            now = time.perf_counter()
            speed = 0.0 if since is None else B * (step - since[0]) / (now - since[1])
            since = step, now
            line = {"step": step, "loss": loss.item(), "lr": rate, "grad_norm": norm.item()}
            line |= {name: value.item() for name, value in figures.items()}
            line |= {**watched, "images_per_s": round(speed, 1)}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            shown = ", ".join(f"{k} {line[k]:.3f}" for k in ("loss", *watched))
            bar.set_postfix_str(f"{shown}, {speed:.0f} images/s")
        if step % config.save_every == 0 or last:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "optimizer": optimizer.state_dict()}
            save_checkpoint(folder, {"config": asdict(config), **state})
        if caught and step < config.steps:
            bar.close()
            print(f"stopped after step {step}; go on with: python {shlex.join(sys.argv)} --resume")
            raise SystemExit(128 + caught[0])
    return line


def train(config):
    """One pretraining run, from data to pictures."""
    device, autocast = pick_device(config)
    resumed = start_run(config)
    data = open_data(config, "train", config.img_size, config.num_images)
    set_seed(config.seed, 2**32)
    model = RelaxMIM(config).to(device)
    groups = decay_groups(list(model.parameters()), config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    if device.startswith("cuda"):
        model.compile()
    size, B, ratio = config.img_size, config.batch_size, config.mask_ratio
    make_mask = MASKS[config.mask]

    # 256 crops and masks, the same each time, by which the claim is measured
    set_seed(config.seed, 2**32 + 1)
    index = next(batch_indices(len(data), 256, config.seed, [0]))
    probe = normalise(random_crops(next(data.batches([index], device, 0))[1], 256, size))
    probe_mask = make_mask(256, model.encoder.grid, ratio, device=device)

    def watch():
        with autocast:
            same, different = invariance(model.encoder, probe, probe_mask)
        return {"invariance": same, "different": different}

    def forward(index, pixels):
        view1 = view2 = random_crops(pixels, B, size)
        if config.transform == "crop":  # two crops, each with colours of its own, as in SimCLR
            jitter = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2)])
            views = view1, random_crops(pixels, B, size)
            view1, view2 = (torch.stack([jitter(x / 255) * 255 for x in view]) for view in views)
        mask = make_mask(B, model.encoder.grid, ratio, device=device)
        with autocast:
            return model(normalise(view1), normalise(view2), mask, round(ratio * mask.shape[1]))

    before, parts = watch(), dict(model.named_children())
    line = fit(config, parts, optimizer, resumed, data, device, forward, watch)
    draw(model, probe, probe_mask, Path(config.out))
    if config.loss == "infonce":
        rivals = B if config.transform == "crop" else round(ratio * probe_mask.shape[1])
        log = f"log(candidates) {math.log(rivals):.2f}"
        print(f"{log}, accuracy {line['accuracy']:.3f} where chance is {1 / rivals:.3f}")
    for name, what in (("invariance", "an image and its masked self"), ("different", "two images")):
        print(f"cosine of {what}: {before[name]:.3f} at the start, {line[name]:.3f} at the end")
    print(f"loss {line['loss']:.3f}; written to {config.out}")


def run(main):
    """Run a script: a mistake of the user's becomes one line and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        message = str(error).split("UserError: ")[-1].strip()  # a worker's comes with its traceback
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def main(args):
    config = parse(Config, __doc__, args)
    N = (config.img_size // config.patch_size) ** 2
    if config.img_size % config.patch_size:
        fail(f"--patch-size {config.patch_size}: must divide --img-size {config.img_size}")
    if not 0 < round(config.mask_ratio * N) < N:
        fail(f"--mask-ratio {config.mask_ratio}: must hide some of {N} patches, not all")
    if config.transform == "crop" and config.loss != "infonce":
        fail(f"--loss {config.loss}: two crops are compared by --loss infonce")
    name = "crop" if config.transform == "crop" else config.loss
    count = f"-{config.num_images}" if config.num_images else ""
    config.out = config.out or f"runs/{name}-{Path(config.data).stem}{count}"
    train(config)


if __name__ == "__main__":
    run(main)
