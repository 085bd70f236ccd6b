# SPDX-License-Identifier: MIT
"""RelaxMIM"""

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
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.ops import stochastic_depth
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
    workers: int = option(2, "processes that read a streamed folder", 0, 256)
    steps: int = option(500, "optimizer steps", 1, 10**9)
    batch_size: int = option(128, "images per step", 1, 10**6)
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
    precision: str = option("auto", "auto: bfloat16 if native", "auto", "float32", "bfloat16")


def parse(cls, about, args):
    """An instance of `cls` from a command line: a tuple is positional, every other field an option."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=how, allow_abbrev=False)

    def complain(message):
        raise UserError(message)

    parser.error = complain
    flags = {f.name: "--" + f.name.replace("_", "-") for f in fields(cls)}
    for f in fields(cls):
        if f.type is tuple:
            parser.add_argument(f.name, nargs="*", help=f.metadata["help"])
            continue
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        note = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        parser.add_argument(flags[f.name], default=f.default, help=note, **kind)
    config = cls(**vars(parser.parse_args(args)))
    for f in fields(cls):
        value, valid = getattr(config, f.name), f.metadata["valid"]
        if f.type is str and valid and value not in valid:
            near = difflib.get_close_matches(value, valid, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(valid)}"
            raise UserError(f"{flags[f.name]} {value}: {hint}")
        if f.type in (int, float) and not valid[0] <= value <= valid[1]:
            raise UserError(f"{flags[f.name]} {value}: must be from {valid[0]} to {valid[1]}")
    return config


# ------------------------------------------------------------------------------------- Data

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)  # ImageNet's, of 0..255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
SYNTHETIC = {"train": range(5000), "test": range(10**6, 10**6 + 1000)}  # index of each image
SHAPES = ["disc", "ring", "bar", "trefoil", "cross", "star"]  # the labels of synthetic images


def set_seed(seed, stream):
    """Make all that is random from here on a function of (seed, stream), not of what came before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]))


def synthetic_images(index, size, seed=0, leaves=24):
    """Dead leaves: textured ellipses of all sizes, one hiding the other, and one object among them.

    Image i is a function of (seed, i) alone. Leaf radii follow r**-3, which gives the statistics of
    natural images (Lee, Mumford and Huang, 2001). Returns uint8 (n, 3, *size) and labels (n,), the
    place in SHAPES of the object's shape.
    """
    u = np.stack([np.random.default_rng([seed, int(i)]).random((leaves + 3, 14)) for i in index])
    u = torch.from_numpy(u).float()[..., None, None]  # (n, layers, 14, 1, 1) in 0..1
    labels = (u[:, leaves, 0, 0, 0] * len(SHAPES)).long()
    y, x = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    images = u[:, 0, 1:4].repeat(1, 1, *size)
    for layer in range(leaves + 3):  # the object lies on the leaves, two more leaves on the object
        a, b, c, d, e, *texture = u[:, layer, :10].unbind(1)  # each (n, 1, 1)
        length, hole, edge = 1 + 2 * a, 0.0, 1.0
        radius, top, left = 0.13 / (1 - 0.95 * b).sqrt(), 2.4 * c - 1.2, 2.4 * d - 1.2
        if layer == leaves:
            radius, top, left = 0.45 + 0.25 * b, 0.9 * c - 0.45, 0.9 * d - 0.45
            shape = labels[:, None, None]
            length, hole = 1.0 + 2.0 * (shape == 2), 0.6 * (shape == 1)
        sin, cos = (2 * math.pi * e).sin(), (2 * math.pi * e).cos()
        along = ((x - left) * cos + (y - top) * sin) / (radius * length.sqrt())
        across = ((y - top) * cos - (x - left) * sin) / (radius / length.sqrt())
        r = (along.square() + across.square()).sqrt()
        if layer == leaves:  # three, four or five petals
            edge = 1 - 0.4 * (shape > 2) * (1 - (shape * torch.atan2(across, along)).cos())
        inside = torch.minimum(edge - r, r - hole) * radius * (min(size) / 2)  # in pixels
        stripes = (along * texture[0] * 9 + across * texture[1] * 9 + texture[2] * 6).sin()
        shade = 0.3 * texture[3] * stripes + 0.3 * (texture[4] - 0.5) * along
        colour = u[:, layer, 10:13] * 0.8 + 0.1 + shade[:, None]
        images.lerp_(colour, (inside + 0.5).clamp(0, 1)[:, None])
    return (images.clamp(0, 1) * 255).round().byte(), labels


def read_image(path, size=None):
    """An image file as uint8 (3, H, W); with size (H, W) it is scaled to cover it and cut around."""
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

    As a data set, item i is (i, uint8 (3, *size)). A damaged file is named on stderr, and the next
    one takes its place.
    """

    def __init__(self, names, pixels=None, labels=None, classes=(), size=None):
        self.names, self.pixels, self.labels = names, pixels, labels
        self.classes, self.size = classes, size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        for j in (k % len(self) for k in range(i, i + len(self))):
            try:
                return j, read_image(self.names[j], self.size)
            except Exception as error:  # decoders raise whatever they like
                reason = str(error).splitlines()[0][:80]
                print(f"skipped {self.names[j]}: {reason}", file=sys.stderr)
        raise UserError("--data: no image in it can be decoded")

    def batches(self, indices, device, workers):
        """For each (B,) of `indices`: the indices and uint8 (B, 3, H, W), or (1, 3, H, W) if n = 1."""
        if self.pixels is None:
            lists, pin = (index.tolist() for index in indices), str(device).startswith("cuda")
            options = {"batch_sampler": lists, "num_workers": workers, "pin_memory": pin}
            loader = DataLoader(self, **options)
            for index, pixels in loader:
                yield index, pixels.to(device, non_blocking=True)
        else:
            pixels = self.pixels.to(device)
            for index in indices:
                here = index.to(device, non_blocking=True)
                yield index, pixels if len(self) == 1 else pixels[here]


def list_images(name, split, labelled, data_dir):
    """All there is: names, labels, classes, and pixels (n, 3, H, W) where the names are not files."""
    if name == "synthetic":
        return SYNTHETIC[split], None, SHAPES, None
    if name == "stl10":
        found = datasets.STL10(data_dir, split if labelled else "unlabeled", download=True)
        return range(len(found)), found.labels, found.classes, torch.from_numpy(found.data)
    if name in ("cifar10", "cifar100"):
        found = getattr(datasets, name.upper())(data_dir, split == "train", download=True)
        pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        return range(len(found)), found.targets, found.classes, pixels
    if Path(name).is_file() and not labelled:
        return [name], None, [], None
    roots = [Path(name, part) for part in (["train"] if split == "train" else ["test", "val"])]
    root = next((root for root in roots if root.is_dir()), roots[0] if labelled else Path(name))
    if labelled:
        found = datasets.ImageFolder(root)  # root/CLASS/*
        return *zip(*found.samples), found.classes, None
    files = (str(f) for f in root.rglob("*") if f.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    return sorted(files), None, [], None


def open_data(config, split, img_size, count=0, labelled=False):
    """The Images that config.data names. split: "train", "test", or "fit" and "val", which are nine
    tenths and one tenth of train. count: so many, by a seeded permutation; 0: all.
    """
    part, H, W = "test" if split == "test" else "train", img_size, img_size
    try:
        names, labels, classes, pixels = list_images(config.data, part, labelled, config.data_dir)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {config.data}: {str(error).splitlines()[0]}") from None
    keep = np.arange(len(names))
    if split in ("fit", "val"):
        keep, tenth = np.random.default_rng(0).permutation(keep), len(keep) // 10
        keep = keep[tenth:] if split == "fit" else keep[:tenth]
    if not len(keep) or count > len(keep):
        choice = "synthetic, cifar10, cifar100, stl10, a folder or a photograph"
        raise UserError(
            f"--data {config.data}: {len(keep)} images found; give {choice} with enough"
        )
    keep = np.random.default_rng([config.seed, 1]).permutation(keep)[:count] if count else keep
    names = [names[i] for i in keep]
    labels = None if labels is None else torch.tensor([int(labels[i]) for i in keep])
    if config.data == "synthetic":
        return Images(names, *synthetic_images(names, (H, W)), classes)
    if pixels is not None:
        return Images(names, pixels[keep], labels, classes)
    # Files are brought to one size: their own, if they have one and it is small, or a crop's twice.
    # From a lone photograph all crops come, so it is kept finer.
    finer, sizes = 8 if len(names) == 1 else 2, set()
    for file in names[:64]:
        with suppress(Exception), Image.open(file) as image:  # what is damaged is named later
            sizes.add(image.size[::-1])
    size = sizes.pop() if len(sizes) == 1 else (math.inf, math.inf)
    size = size if min(size) <= finer * min(H, W) else (finer * H, finer * W)
    data = Images(names, None, labels, classes, size)
    if len(names) * 3 * math.prod(data.size) <= config.cache_gb * 2**30:
        every = torch.arange(len(names))
        read = data.batches(every.split(256), "cpu", config.workers if len(names) > 1000 else 0)
        index, data.pixels = map(torch.cat, zip(*read))
        good = (index == every).nonzero()[:, 0]  # the rest are damaged, and others stand there
        if len(good) < len(every):
            print(f"{len(every) - len(good)} of {len(every)} files skipped", file=sys.stderr)
        data.pixels, data.names = data.pixels[good], [names[i] for i in good]
        data.labels = None if labels is None else labels[good]
    return data


@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def batch_index(step, batch, n, seed):
    """Which images (B,) a step takes: each epoch takes all n once, in an order of its own."""
    size = n * -(-batch // n)  # a set smaller than a batch is repeated
    first, last = step * batch // size, ((step + 1) * batch - 1) // size
    order = torch.cat([epoch_order(size, seed, epoch) for epoch in range(first, last + 1)])
    return order[step * batch - first * size :][:batch] % n


def resize_matrix(start, length, source, target):
    """Weights (B, target, source) that resample [start, start + length) of each row to `target`.

    Linear, and wider where it shrinks, so that nothing aliases: the filter of torchvision's resize
    with antialias=True. start, length: (B,), in pixels of the source.
    """
    scale = length[:, None] / target  # (B, 1)
    centre = start[:, None] + (torch.arange(target, device=start.device) + 0.5) * scale
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    weight = 1 - (pixel - centre[..., None]).abs() / scale[..., None].clamp(min=1)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])  # (B, source)
    weight = weight.clamp(min=0) * inside[:, None]
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)


def crop(images, box, flip, size):
    """Cut a box from each image, resize and mirror it, in two matrix products, and normalise.

    images: uint8 (B, 3, H, W), or (1, 3, H, W) to cut all from one. box: top, left, height, width,
    each (B,), in pixels. flip: bool (B,). Returns float (B, 3, *size).
    """
    top, left, height, width = box
    rows = resize_matrix(top, height, images.shape[2], size[0])  # (B, h, H)
    cols = resize_matrix(left, width, images.shape[3], size[1])  # (B, w, W)
    cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    x = images.float()
    if len(images) == 1:  # one photograph is not copied B times
        x = torch.einsum("bhy,cyx->bchx", rows, x[0])
    else:
        x = torch.einsum("bhy,bcyx->bchx", rows, x)
    x = torch.einsum("bchx,bwx->bchw", x, cols)
    return (x - MEAN.to(x.device, non_blocking=True)) / STD.to(x.device, non_blocking=True)


def random_crops(images, batch, size, smallest=0.2):
    """RandomResizedCrop and flip of uint8 images: float (batch, 3, *size).

    The area is `smallest` to 1 of the image, or from where a crop has one pixel for each of its
    own, if that is less. The sides are in a ratio of 3/4 to 4/3.
    """
    (H, W), u = images.shape[2:], torch.rand(5, batch, device=images.device)
    smallest = min(smallest, math.prod(size) / (H * W))
    area = (smallest + (1 - smallest) * u[0]) * H * W
    stretch = ((u[1] - 0.5) * math.log(4 / 3)).exp()  # the root of the ratio
    height, width = (area.sqrt() / stretch).clamp(max=H), (area.sqrt() * stretch).clamp(max=W)
    box = u[2] * (H - height), u[3] * (W - width), height, width
    return crop(images, box, u[4] < 0.5, size)


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
    frequency = 10000.0 ** -(torch.arange(dim // 4).double() / (dim // 4))
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
    """Pre-norm transformer block. drop_path: chance that a sample skips a branch in training."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        fc1, fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.drop_path = drop_path
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

    def __init__(
        self,
        img_size,
        patch_size,
        in_chans,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio=4.0,
        drop_path=0.0,
    ):
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
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, r) for r in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images, mask=None, num_hidden=None):
        """images (B, C, H, W), mask (B, N) or None, all visible -> (B, 1 + V, D), class token first."""
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
    """(5)  M(z1, z2) + lambda || ( d'(z2) - x ) (1-M) ||^2  with  M = || ( d(z1) - d'(z2) ) (1-M) ||^2.

    d1 = d(z1), d2 = d'(z2), x: shapes and mask as in mae_loss; equal to it where d' is perfect.
    """
    return mae_loss(d1, d2, mask) + weight * mae_loss(d2, x, mask)


def info_nce(q, k, temperature, mask=None):
    """(6)  -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) ), averaged over the queries.

    q, k: (..., B, D), made unit vectors here; k_i answers q_i and the other B - 1 are its negatives.
    mask: (..., B), the queries that count. Returns the loss, about log(B) for features that say
    nothing, and the share of queries whose answer is the nearest candidate (1/B by chance).
    """
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    logits = q @ k.mT / temperature  # (..., B, B)
    loss = logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)  # (..., B)
    right = (logits.argmax(-1) == torch.arange(logits.shape[-1], device=q.device)).float()
    if mask is None:
        return loss.mean(), right.mean()
    return (loss * mask).sum() / mask.sum(), (right * mask).sum() / mask.sum()


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
        """The loss, and a dict of figures to watch, for two views (B, C, H, W) and a mask (B, N)."""
        c = self.config
        if c.transform == "crop":  # conventional siamese learning: pooled features, nothing hidden
            q, k = (self.head(self.encoder(x)[:, 1:].mean(1)) for x in (view1, view2))
            loss, accuracy = info_nce(q, k, c.temperature)
            return loss, {"accuracy": accuracy, "feature_std": spread(q)}
        x = patchify(view1, c.patch_size)  # (B, N, P)
        _, hidden = split(mask, num_hidden)
        z1 = self.encoder(view1, mask, num_hidden)  # f(x M): (B, 1 + V, D)
        d1 = self.decoder(z1, mask, num_hidden).float()  # d(z1): (B, H, P or d)
        figures = {"feature_std": spread(z1.mean(1))}
        if c.loss == "infonce":
            with torch.no_grad():
                z2 = self.encoder(view2)  # f(x): (B, 1 + N, D)
            k = self.head(z2[:, 1:]).float()  # (B, N, d)
            q = torch.zeros_like(k).scatter(1, hidden[..., None].expand_as(d1), d1)  # (B, N, d)
            # candidates are the same position of all images: where a patch lies tells nothing
            q, k = q.transpose(0, 1), k.transpose(0, 1)  # (N, B, d)
            loss, accuracy = info_nce(q, k, c.temperature, mask.T)
            return loss, {**figures, "accuracy": accuracy}
        x = take(x, hidden)  # x (1-M): (B, H, P)
        if c.norm_pix:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        if c.loss == "mae":
            return mae_loss(d1, x), figures
        z2 = self.encoder(view2, ~mask, mask.shape[1] - num_hidden)  # f(x (1-M)): (B, 1 + H, D)
        d2 = self.head(z2[:, 1:]).float()  # d'(z2): (B, H, P)
        return relax_loss(d1, d2, x, c.relax_weight), {
            **figures,
            "output_std": spread(d2.flatten(0, 1)),
        }


def spread(features):
    """How much the directions of features (B, D) differ: near 1 if they do, 0 where they collapsed."""
    return F.normalize(features.detach().float(), dim=-1).std(0).norm()


@torch.no_grad()
def invariance(encoder, images, mask):
    """The claim, measured: mean cosine of images and their masked selves, and of different images.

    images: (B, C, H, W); mask: (B, N). Features are the mean of the patch tokens, centred over the
    batch and both views: what all images share is no likeness. Returns (same, different) in -1..1.
    """
    a, b = (encoder(images, m)[:, 1:].float().mean(1) for m in (None, mask))  # (B, D)
    centre = torch.cat([a, b]).mean(0)
    cosine = F.normalize(a - centre, dim=1) @ F.normalize(b - centre, dim=1).T  # (B, B)
    same, B = cosine.diagonal().sum(), len(cosine)
    return (same / B).item(), ((cosine.sum() - same) / (B * B - B)).item()


@torch.no_grad()
def draw(model, images, mask, folder):
    """Write features.png and, where the model predicts pixels, reconstruction.png into `folder`.

    Rows of features.png: original, masked, and the patch features of the whole and of the masked
    image: their first three principal components, each position centred, as colours. Rows of
    reconstruction.png: original, masked, and predictions pasted into the visible patches. With
    norm_pix these lack mean and variance: the nearest visible patch, never the hidden one, lends its.
    """
    p, grid, n = model.encoder.patch_size, model.encoder.grid, 8
    visible, hidden = split(mask)
    x = patchify(images * STD.to(images) / 255 + MEAN.to(images) / 255, p)  # (B, N, P) in 0..1
    whole, masked = (model.encoder(images, m).float()[:, 1:] for m in (None, mask))
    centre = whole.mean(0, keepdim=True)  # (1, N, D)
    axes = torch.linalg.svd((whole - centre).flatten(0, 1), full_matrices=False)[2][:3].T
    a, b = (whole - centre) @ axes, (masked - take(centre, visible)) @ axes  # (B, N or V, 3)
    low, high = a.flatten(0, 1).quantile(torch.tensor([0.02, 0.98]).to(a), dim=0)
    b = torch.full_like(a, math.nan).scatter(1, visible[..., None].expand_as(b), b)
    a, b = (((c - low) / (high - low)).nan_to_num(0.5).repeat(1, 1, p * p) for c in (a, b))
    shown = x.masked_fill(mask[..., None], 0.5)
    pictures = {"features.png": [x, shown, a, b]}
    if model.config.loss != "infonce":
        d = model.decoder(model.encoder(images, mask), mask).float()  # (B, H, P)
        if model.config.norm_pix:
            place = places(grid, x.device).float()
            away = torch.cdist(place, place)[hidden].masked_fill(mask[:, None], math.inf)
            lender = take(x, away.argmin(-1))  # (B, H, P)
            d = d * lender.std(-1, keepdim=True) + lender.mean(-1, keepdim=True)
        pictures["reconstruction.png"] = [x, shown, x.scatter(1, hidden[..., None].expand_as(d), d)]
    for name, rows in pictures.items():
        rows = unpatchify(torch.cat([row[:n] for row in rows]).clamp(0, 1), grid, p)
        rows = F.interpolate(rows, scale_factor=max(1, 96 // rows.shape[-1]))  # larger, not blurred
        save_image(make_grid(rows, nrow=n, padding=4), folder / name)


# --------------------------------------------------------------------------------- Training

FORMAT, LOG_EVERY = 1, 20  # of checkpoint.pt; steps from one line of the log to the next
FREE = {"steps", "out", "resume", "overwrite", "save_every", "workers", "cache_gb", "data_dir"}


def learning_rate(step, config):
    """Linear warm-up, then half a cosine down to 0: a function of the step."""
    rise = max(1, round(config.warmup * config.steps))
    fall = (step - rise) / max(1, config.steps - rise)
    return config.lr * ((step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * fall))


def pick_device(config):
    """The device asked for, or the best there is; and autocast to bfloat16 where it is native."""
    device = config.device
    if device == "auto":
        device = "mps" if torch.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {device}: not to be had here; auto takes what is") from None
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
            raise ValueError(f"format {content['format']} is newer than this script's {FORMAT}")
        return content
    except OSError as error:
        raise UserError(f"{path}: no checkpoint can be read there ({error.strerror})") from None
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).strip().split("\n")[0][:80]
        raise UserError(f"{path}: not a checkpoint of this project ({reason})") from None


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
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {settings.get(name)}: the run in {folder} has {value}")
        if content["step"] >= config.steps:
            raise UserError(f"--steps {config.steps}: the run in {folder} has {content['step']}")
        return content
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise UserError(f"--out {folder}: not empty; add --resume or --overwrite, or name another")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--out {folder}: cannot be written in {above}")


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
        f"{n} images, {config.steps} steps of {B}: {config.steps * B / n:.1f} epochs, on {device}"
    )
    order = (batch_index(step, B, n, config.seed) for step in range(first, config.steps))
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
                raise UserError(
                    f"step {step}: the loss is not finite; try a lower --lr. Saved: {log}"
                )
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
    size, grid, ratio = (config.img_size, config.img_size), model.encoder.grid, config.mask_ratio
    make_mask = MASKS[config.mask]

    # 256 crops and masks, the same each time, by which the claim is measured
    _, pixels = next(data.batches([batch_index(0, 256, len(data), config.seed)], device, 0))
    probe = random_crops(pixels, 256, size)
    probe_mask = make_mask(256, grid, ratio, device=device)

    def watch():
        with autocast:
            same, different = invariance(model.encoder, probe, probe_mask)
        return {"invariance": same, "different": different}

    def forward(index, pixels):
        view1 = view2 = random_crops(pixels, config.batch_size, size)
        if config.transform == "crop":  # two crops, each with colours of its own, as in SimCLR
            view2 = random_crops(pixels, config.batch_size, size)
            mean, std = MEAN.to(device) / 255, STD.to(device) / 255
            jitter = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2)])
            view1, view2 = (
                torch.stack([(jitter(x) - mean) / std for x in view * std + mean])
                for view in (view1, view2)
            )
        mask = make_mask(config.batch_size, grid, ratio, device=device)
        with autocast:
            return model(view1, view2, mask, round(ratio * mask.shape[1]))

    before = watch()
    line = fit(
        config, dict(model.named_children()), optimizer, resumed, data, device, forward, watch
    )
    draw(model, probe, probe_mask, Path(config.out))
    if "accuracy" in line:
        B = config.batch_size
        print(
            f"accuracy {line['accuracy']:.3f}, chance {1 / B:.3f}; log(candidates) {math.log(B):.2f}"
        )
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
        raise UserError(
            f"--patch-size {config.patch_size}: must divide --img-size {config.img_size}"
        )
    if not 0 < round(config.mask_ratio * N) < N:
        raise UserError(f"--mask-ratio {config.mask_ratio}: must hide some of {N} patches, not all")
    if config.transform == "crop" and config.loss != "infonce":
        raise UserError(f"--loss {config.loss}: two crops are compared by --loss infonce")
    if config.batch_size < 2:
        raise UserError("--batch-size 1: features are compared over a batch, of at least 2")
    name = "crop" if config.transform == "crop" else config.loss
    count = f"-{config.num_images}" if config.num_images else ""
    config.out = config.out or f"runs/{name}-{Path(config.data).stem}{count}"
    train(config)


if __name__ == "__main__":
    run(main)
