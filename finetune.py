# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9.1", "torchvision>=0.24.1", "numpy>=1.26.4", "tqdm>=4.66.1"]
# ///
"""Fine-tune what relaxmim.py has pretrained, probe it with a linear head, or train from scratch.

    python finetune.py runs/infonce-synthetic-1              all weights, from a run or a checkpoint
    python finetune.py                                       from scratch, by the same recipe
    python finetune.py runs/mae-cifar10 --linear-probe       a linear head on the frozen encoder
    python finetune.py runs/mae-cifar10 --data cifar10 --num-labels 10000

The accuracy on the test images is computed once, at the end; nothing is chosen by it. To choose
settings, --validate holds out a tenth of the training images and reports on that instead.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler
from torchvision.transforms import v2

import relaxmim as mim


@dataclass
class Config:
    """Every hyperparameter of fine-tuning; the values are our choice.

    They suit a short run. On a tenth held out from CIFAR-10's training images, 300 steps from a MAE
    gave 53.7 % with layer_decay 1, 52.6 % with 0.9 and 51.4 % with 0.75, which long runs like.
    """

    checkpoint: tuple = mim.option((), "a run's folder or its checkpoint.pt; none: from scratch")
    data: str = mim.option("synthetic", "synthetic, cifar10, cifar100, stl10 or a folder")
    num_labels: int = mim.option(0, "labelled training images, taken at random; 0: all", 0, 10**9)
    validate: bool = mim.option(False, "report on a tenth held out from train, never on test")
    linear_probe: bool = mim.option(False, "frozen encoder: linear head and nearest neighbours")
    model: str = mim.option("", "size; empty: the checkpoint's, or nano", "", *mim.SIZES)
    patch_size: int = mim.option(0, "side of a patch; 0: the checkpoint's, or 4", 0, 1024)
    img_size: str = mim.option("", "side in pixels, or HxW; empty: the checkpoint's, or 32")
    in_chans: int = mim.option(0, "channels; 0: the checkpoint's, or 3 (RGB)", 0, 1, 3, 4)
    data_dir: str = mim.option("data", "where torchvision's sets are kept")
    cache_gb: float = mim.option(1.0, "a folder larger than this is streamed, GiB", 0.0, 1e6)
    workers: int = mim.option(2, "processes that read files", 0, 256)
    steps: int = mim.option(800, "optimizer steps", 1, 10**9)
    batch_size: int = mim.option(128, "images per step", 2, 10**6)
    lr: float = mim.option(1e-3, "peak learning rate, of the head", 1e-12, 10.0)
    layer_decay: float = mim.option(1.0, "learning rate of a block over the next one's", 0.01, 1.0)
    weight_decay: float = mim.option(0.05, "decay of matrices", 0.0, 10.0)
    drop_path: float = mim.option(0.0, "chance to skip a branch, in the last block", 0.0, 0.99)
    label_smoothing: float = mim.option(0.1, "share of the target given to all", 0.0, 0.99)
    mixup: float = mim.option(0.0, "alpha of MixUp; 0: off", 0.0, 100.0)
    cutmix: float = mim.option(0.0, "alpha of CutMix; 0: off", 0.0, 100.0)
    smallest_crop: float = mim.option(0.5, "smallest area of a training crop", 0.01, 1.0)
    seed: int = mim.option(0, "of all that is random", 0, 2**31)
    out: str = mim.option("", "folder of the run; empty: runs/finetune-RUN-on-DATA")
    resume: bool = mim.option(False, "go on with the run in that folder")
    save_every: int = mim.option(500, "steps between checkpoints", 1, 10**9)
    device: str = mim.option("auto", "auto, cpu, cuda or mps")
    precision: str = mim.option("auto", "of matrix products", "auto", "float32", "bfloat16")


class Classifier(mim.ViT):
    """ViT, mean over the patch tokens, norm, linear head: timm's with global_pool="avg".

    probe: the encoder keeps its own norm, and a batch norm without weights comes before the head.
    Takes a mask as ViT does; the hidden patches are then missing from the mean too.
    """

    def __init__(self, *args, num_classes, probe=False, drop_path=0.0):
        super().__init__(*args)
        dim, depth = self.cls_token.shape[-1], len(self.blocks)
        for i, block in enumerate(self.blocks):  # rising from 0 to drop_path
            block.drop_path = drop_path * i / max(1, depth - 1)
        if probe:
            self.fc_norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        else:
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, mask=None, num_hidden=None):
        """(B, C, H, W) -> logits (B, num_classes)."""
        return self.head(self.fc_norm(super().forward(images, mask, num_hidden)[:, 1:].mean(1)))


def build(config, source, num_classes):
    """A Classifier of the size in config; source: a checkpoint's content, or None.

    Where its weights do not fit, one line names what is missing or left over.
    """
    with mim.blame(f"{''.join(config.checkpoint)}: does not fit"):
        size = mim.sides(config.img_size), config.patch_size, config.in_chans
        options = {"num_classes": num_classes, "probe": config.linear_probe}
        model = Classifier(*size, *mim.SIZES[config.model], **options, drop_path=config.drop_path)
        if not source:
            return model
        weights = mim.encoder_weights(source, model.grid)
        head, probed = weights.get("head.weight"), "fc_norm.running_mean" in weights
        other = head is None or head.shape != model.head.weight.shape  # of other classes
        if other or probed != config.linear_probe:  # or after another norm: left out
            weights = {k: v for k, v in weights.items() if not k.startswith(("head.", "fc_norm."))}
        missing, extra = model.load_state_dict(weights, strict=False)
        missing = [k for k in missing if not k.startswith(("head", "fc_norm"))]
        extra = [k for k in extra if not k.startswith("norm.")]  # replaced by fc_norm
        if missing or extra:
            raise ValueError(f"missing {missing}, left over {extra}")
    return model


def layer_groups(model, config):
    """Parameter groups: from the head down the rate falls by layer_decay a block (BEiT, MAE)."""
    depth, layers = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        layer = 0 if name.startswith(("cls_token", "patch_embed")) else depth + 1
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        if parameter.requires_grad:
            layers.setdefault(layer, []).append(parameter)
    scaled = ((config.layer_decay ** (depth + 1 - layer), found) for layer, found in layers.items())
    return [
        g for scale, found in scaled for g in mim.decay_groups(found, config.weight_decay, scale)
    ]


def choose(data, index):
    """The images at `index`, (n,), alone."""
    pixels = None if data.pixels is None else data.pixels[index]
    return replace(data, names=[data.names[i] for i in index], pixels=pixels)


def class_names(data):
    """The class of each image, by the folder in its name: a list of strings."""
    return [Path(name).parent.name for name in data.names]


def whole(data, pixels, size):
    """Images of `data`, uint8 (B, C, H, W), as they are: resized to `size` and normalised."""
    return data.normalise(v2.functional.resize(pixels.float(), mim.sides(size), antialias=True))


@torch.no_grad()
def accuracy(model, data, labels, device, size, workers=0):
    """Share of the images whose label, of labels (n,), the model gives the largest logit."""
    model.eval()
    right, every = 0, BatchSampler(range(len(data)), 256, drop_last=False)
    for index, pixels in data.batches(every, device, workers):
        guess = model(whole(data, pixels, size)).argmax(1).cpu()
        right += (guess == labels[index]).sum().item()
    return right / len(data)


@torch.no_grad()
def nearest_neighbours(model, data, labels, test, test_labels, size, device, workers=0, k=20):
    """Accuracy of a vote of the k nearest training images, by the cosine of mean patch tokens.

    Centred by the mean of the training images; a vote weighs exp(cosine / 0.07) (Wu et al., 2018).
    """
    found, model = [], model.eval()
    for part in (data, test):
        every = BatchSampler(range(len(part)), 256, drop_last=False)
        pixels = (pixels for _, pixels in part.batches(every, device, workers))
        tokens = (
            mim.ViT.forward(model, whole(data, x, size))[:, 1:].float().mean(1) for x in pixels
        )
        found.append(torch.cat(list(tokens)))
    train, test = (F.normalize(x - found[0].mean(0), dim=1) for x in found)  # (n, D) each
    right, labels = 0, F.one_hot(labels).float()
    for chunk, answer in zip(test.split(256), test_labels.to(device).split(256)):
        cosine, index = (chunk @ train.T).topk(min(k, len(train)))  # (B, k)
        votes = (cosine / 0.07).exp()[..., None] * labels[index]  # (B, k, classes)
        right += (votes.sum(1).argmax(1) == answer).sum().item()
    return right / len(test)


def open_parts(config):
    """The images to train on and those to report on, the labels of each, and the classes."""
    data = mim.open_data(config)
    labelled = [i for i, name in enumerate(class_names(data)) if name != "unlabelled"]  # STL10
    classes = sorted({*class_names(data)} - {"unlabelled"})
    if config.validate:  # always the same tenth
        order, tenth = np.random.default_rng(0).permutation(labelled), len(labelled) // 10
        labelled, test = order[tenth:], choose(data, order[:tenth])
    else:
        test = mim.open_data(config, train=False)
    if len(classes) < 2 or not {*class_names(test)} <= {*classes}:
        found = sorted({*class_names(test)})
        mim.fail(f"--data {config.data}: classes {classes[:9]} in train, {found[:9]} in test")
    if config.num_labels > len(labelled):
        mim.fail(f"--num-labels {config.num_labels}: {len(labelled)} labelled images found")
    order = np.random.default_rng([config.seed, 1]).permutation(labelled)
    data = choose(data, order[: config.num_labels or None])
    labels = [torch.tensor([classes.index(c) for c in class_names(x)]) for x in (data, test)]
    return data, test, *labels, classes


def train(config, source):
    """One fine-tuning run, from data to the figure on test. source: a checkpoint, or None."""
    started = time.time()
    device, autocast = mim.pick_device(config)
    resumed = mim.start_run(config)
    data, test, labels, test_labels, classes = open_parts(config)
    size, labels = config.img_size, labels.to(device)
    data.scale = test.scale = (source or {}).get("scale", data.scale)
    mim.set_seed(config.seed, 2**32)
    model = build(config, source, len(classes)).to(device)
    if config.linear_probe:
        frozen = {k: v.clone() for k, v in model.state_dict().items() if "head" not in k}
        model.requires_grad_(False).head.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer_groups(model, config), lr=config.lr, fused=True)
    n = len(classes)
    mixes = [v2.MixUp(alpha=config.mixup, num_classes=n)] if config.mixup else []
    mixes += [v2.CutMix(alpha=config.cutmix, num_classes=n)] if config.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes and not config.linear_probe else v2.Identity()
    net = torch.compile(model) if device.startswith("cuda") else model  # not for the test images
    net = nn.parallel.DistributedDataParallel(net) if mim.WORLD > 1 else net

    def forward(index, pixels):
        model.train()
        u = torch.rand(5, config.batch_size, device=device)[:, mim.MINE]
        images = data.normalise(mim.random_crops(pixels, u, size, config.smallest_crop))
        images, target = mix(images, labels[index.to(device, non_blocking=True)])
        with autocast:
            logits = net(images).float()
        return F.cross_entropy(logits, target, label_smoothing=config.label_smoothing), {}

    parts = {"encoder": model}
    mim.fit(config, parts, optimizer, resumed, data, device, forward, dict)
    if mim.RANK > 0:
        return
    if config.linear_probe:
        now = model.state_dict()
        moved = [k for k, v in frozen.items() if "fc_norm" not in k and (now[k] != v).any()]
        assert not moved, f"the frozen encoder moved: {moved}"
    part = "validation" if config.validate else "test"
    with autocast:
        figure = accuracy(model, test, test_labels, device, size, config.workers)
        result = {f"{part}_accuracy": figure, "images": len(test)}
        if config.linear_probe:
            pair = (data, labels, test, test_labels)
            found = nearest_neighbours(model, *pair, size, device, config.workers)
            result[f"{part}_accuracy_of_neighbours"] = found
            print(f"accuracy of 20 nearest neighbours: {found:.2%}")
    result["minutes"] = round((time.time() - started) / 60, 2)
    result = json.dumps({**result, **asdict(config)}, indent=2)
    Path(config.out, "result.json").write_text(result + "\n")
    print(f"accuracy on the {len(test)} {part} images: {figure:.2%}; written to {config.out}")


def main(args):
    config = mim.parse(Config, __doc__, args)
    if len(config.checkpoint) > 1:
        mim.fail(f"{' '.join(config.checkpoint)}: one checkpoint at a time")
    source = mim.load_checkpoint(config.checkpoint[0]) if config.checkpoint else None
    if config.linear_probe and not source:
        mim.fail("--linear-probe: needs a checkpoint, whose encoder it freezes")
    known = {"model": "nano", "patch_size": 4, "img_size": "32", "in_chans": 3}
    known |= source["config"] if source else {}
    for name in ("model", "patch_size", "img_size", "in_chans"):
        setattr(config, name, getattr(config, name) or known[name])
    mim.patch_grid(config)
    folder = Path(config.data)
    if config.data not in mim.SETS and folder.exists() and not (folder / "train").is_dir():
        mim.fail(f"--data {folder}: takes a folder of train/CLASS/ and test/CLASS/ or val/CLASS/")
    path = Path(config.checkpoint[0]) if source else Path("scratch")
    stem = (path.parent if path.name == "checkpoint.pt" else path).name
    kind = "probe" if config.linear_probe else "finetune"
    config.out = config.out or f"runs/{kind}-{stem}-on-{Path(config.data).stem}"
    train(config, source)


if __name__ == "__main__":
    main(sys.argv[1:])
