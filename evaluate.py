"""Stage 4 of 4: anomaly and semantic segmentation metrics, figures, and anomaly maps of your own photographs.

    in     one checkpoint (--ckpt; several are a Deep Ensemble), others to compare with (--baseline), datasets
    out    results/results.json   the protocol and every number
           results/panels.png     image, label, anomaly maps (Fig. 3)
           results/threshold.png  semantic and anomaly accuracy against δ (Fig. 4)
           results/curves.png     precision-recall and ROC curves; of several datasets panels_DATA.png, and so on
           or, with --images, results/NAME_anomaly.png, NAME_classes.png and NAME_score.npy for each photograph NAME

    python evaluate.py --ckpt ft.pt --baseline pretrained.pt
    python evaluate.py --ckpt ft.pt --score msp entropy maxlogit energy dropout crf
    python evaluate.py --ckpt seed0.pt seed1.pt seed2.pt            # Deep Ensemble
    python evaluate.py --ckpt m2f.pt --score maxlogit maskomaly     # made with pretrain.py --arch mask2former
    python evaluate.py --ckpt pretrained.pt --score synthcp --generator generator.pt
    python evaluate.py --ckpt ft.pt --data roadanomaly roadobstacle21 --root RA RO21 --components   # real unknowns
    python evaluate.py --ckpt ft.pt --open --operating-point 0.95   # open-mIoU; the δ to use
    python evaluate.py --ckpt ft.pt --images photographs/           # no labels: overlays and raw scores
    python evaluate.py --ckpt ft.pt --score msp knn                 # dense kNN, against the training images
    python evaluate.py --ckpt pretrained.pt --score dicnet --student student.pt      # DiCNet
    python evaluate.py --ckpt tradi.pt --tradi 10                   # TRADI: an ensemble of sampled weights
    torchrun --nproc-per-node 8 evaluate.py                         # the same numbers (CPUs: for one OMP_NUM_THREADS)

The folder holds one run: what an earlier one left there is removed (photographs leave results.json and its figures).

Protocol (Sec. IV-B): anomalous pixels are the positives. ASSUMPTION: the paper does not say over what a metric is
taken; each is given pooled (all pixels of the split) and as the mean over the images that hold anomalous pixels (as
the CAOS code does, from which the baselines of Table II presumably come). Metrics beyond the paper's: objects, as
SegmentMeIfYouCan counts them (--components), and open-set mIoU, DenseHybrid's (--open); both need thresholds, which are
set from all images, and so a second pass over them.

Sections: scores · metrics · protocol · evaluation · results · figures · photographs · scores of the related systems ·
main
"""
import argparse
import contextlib
import errno
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))   # python -P leaves it out
import common

PAPER_ROWS = {   # AUPR, AUROC, FPR95 of Tables II and III
    "streethazards": [
        ("Dropout (AUROC, FPR95 possibly swapped)", 7.5, 79.4, 69.9), ("MSP (L_k only)", 6.6, 87.7, 33.7),
        ("MSP+CRF", 6.5, 88.1, 29.9), ("SynthCP", 9.3, 88.6, 28.4), ("TRADI", 7.2, 89.2, 25.3),
        ("Deep Ensemble", 7.2, 90.0, 25.4), ("MGU+AaFt (L_ER, pspnet)", 10.9, 89.5, 32.9),
        ("MGU+AaFt (L_KL, deeplabv3)", 13.2, 90.4, 34.0), ("MGU+AaFt (L_ER, deeplabv3)", 14.6, 92.2, 25.9)],
    "bdd": [
        ("Dropout", 6.5, 83.7, 33.4), ("MSP", 6.3, 84.2, 31.9), ("MSP+CRF", 8.2, 86.3, 26.0),
        ("TRADI", 5.6, 86.1, 26.9), ("Deep Ensemble", 6.0, 87.0, 25.0),
        ("MGU+AaFt (L_ER, deeplabv3)", 14.7, 91.5, 30.8)],
}


def parse():
    """The command line."""
    p = argparse.ArgumentParser(usage="%(prog)s [flags]; --help lists them",
                                description="Evaluate anomaly segmentation (Sec. IV-B) and draw the paper's figures.",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    p.add_argument("--ckpt", nargs="+", default=["ft.pt"],
                   help="checkpoint; several are a Deep Ensemble, the mean of their softmax (default: ft.pt)")
    p.add_argument("--baseline", nargs="+", default=[], metavar="CKPT",
                   help="checkpoints to set beside it, each on its own (default: none)")
    p.add_argument("--out", default="results", help="folder of the results (default: results)")
    g = p.add_argument_group("data and protocol (Sec. IV-B)")
    g.add_argument("--data", nargs="+", choices=tuple(common.DATASETS),
                   help="dataset, or several (default: the checkpoint's)")
    g.add_argument("--root", nargs="+", help="folder of each dataset (default: the checkpoint's, or data/<name>)")
    g.add_argument("--split", choices=common.SPLITS, default="test", help="images to evaluate on (default: test)")
    g.add_argument("--unlabeled", choices=("negative", "other", "ignore"), default="negative",
                   help="pixels without a known class, and StreetHazards' background: negatives, as in the CAOS code; "
                   "other: the former are left out, as in DenseHybrid's; ignore: both are (default: negative; always "
                   "left out are ignored pixels of labels that tell no classes)")
    g.add_argument("--ignore-classes", nargs="+", metavar="CLASS", help="leave out the pixels of these classes "
                   "(default: those of finetune.py --known-unknown)")
    g.add_argument("--size", nargs="+", type=common.real(0, above=True), metavar="H W",
                   help="pixels at which f sees an image, or one factor; metrics stay at the labels' own size "
                   "(default: its own)")
    g.add_argument("--tta", nargs="*", type=common.real(0, above=True), metavar="SCALE",
                   help="average over mirrored images and, if named, over these scales (default: off)")
    g = p.add_argument_group("metrics beyond the paper's")
    g.add_argument("--per-image", action="store_true",
                   help="AUPR and FPR95 of each image that holds both kinds of pixel, in results.json (default: off)")
    g.add_argument("--components", nargs="*", type=common.whole(), metavar="PIXELS",
                   help="objects as SegmentMeIfYouCan counts them: sIoU, PPV, mean F1; the smallest object and the "
                   "smallest prediction that count (default of both: 100 500, or the dataset's)")
    g.add_argument("--open", action="store_true",
                   help="open-mIoU, as DenseHybrid defines it, and with the threshold of the validation images")
    g.add_argument("--operating-point", type=common.real(0, above=True), metavar="RECALL",
                   help="the δ with this recall on the validation images; without anomalies there, the δ that flags "
                   "1 − RECALL of their pixels (default: none)")
    g = p.add_argument_group("scores")
    g.add_argument("--score", nargs="+", default=["msp"],
                   choices=tuple(SCORES),
                   help="one or several: msp is the paper's (Eq. 2); dropout and crf are baselines of Table II, "
                   "outlier, outlier_msp and hybrid of a model with an outlier head (default: msp)")
    g.add_argument("--passes", type=common.whole(2), help="forward passes of --score dropout (ours: 10)")
    g.add_argument("--crf-iterations", type=common.whole(),
                   help="mean-field iterations of --score crf (CAOS: 100; ours: 10)")
    g.add_argument("--seed", type=common.whole(0), default=0, help="seed of the dropout masks, of kNN's references and "
                   "of TRADI's samples (default: 0)")
    system_flags(p)
    g = p.add_argument_group("figures")
    g.add_argument("--panels", nargs="+", default=["4"], metavar="N|NAME",
                   help="the N images with the largest anomalies, or images whose path ends in these names, such as "
                   "5.png or t5/5.png (default: 4; 0 for none)")
    g.add_argument("--images", nargs="+", metavar="PATH",
                   help="photographs or folders of them: no metrics, overlays at their own size")
    g.add_argument("--max-side", type=common.whole(32),
                   help="photographs: pixels of the longer side as f sees it (ours: 1280)")
    g = p.add_argument_group("hardware")
    g.add_argument("--batch-size", type=common.whole(), default=8,
                   help="images read ahead of f, which sees them one at a time (default: 8)")
    g.add_argument("--workers", type=common.whole(), help="threads that read them (default: 8 on CUDA, else 1)")
    g.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    return checked(p, p.parse_args())


WITHOUT_IMAGES = ("baseline", "data", "root", "split", "unlabeled", "ignore_classes", "per_image", "components", "open",
                  "operating_point", "panels", "size", "tta")   # flags that photographs do not have


def checked(p, args):
    """args, with `views`; ends with a usage message where flags do not go together."""
    if len(args.size or ()) == 2 and not any(n % 1 for n in args.size):
        args.size = [int(n) for n in args.size]
    size, folders, sets = args.size or [1], len(args.root or ()), len(args.data or [0])
    useless = [f"--{name.replace('_', '-')}" for name in WITHOUT_IMAGES if getattr(args, name) != p.get_default(name)]
    for wrong, told in (
            (len(size) > 2 or len(size) == 2 and any(n % 1 or n > 1 << 15 for n in size) or
             len(size) == 1 and size[0] > 16,
             "--size: expected H W of at most 32768, or a factor of at most 16"),
            (max(args.tta or [1]) > 16, "--tta: expected factors of at most 16"),
            (len(args.components or [0, 0]) != 2, "--components: expected no number, or two"),
            ((args.operating_point or 0) >= 1, "--operating-point: expected a share below 1, such as 0.95"),
            (folders not in (0, sets), f"--root: {folders} for {sets} data sets; expected one for each"),
            (args.images and len(args.score) > 1, "--images: goes with one --score"),
            (args.images and useless, f"--images: goes without {', '.join(useless)}"),
            (args.max_side and not args.images, "--max-side: without effect; it is for --images"),
            (sets > 1 and not args.panels[0].isdecimal(), "--panels: expected a number beside several --data")):
        if wrong:
            p.error(f"argument {told}")
    args.score, args.max_side = list(dict.fromkeys(args.score)), args.max_side or 1280
    # The views that f has of an image: (H and W or a factor, scale, mirrored)
    args.views = [(size, scale, flip) for scale in args.tta or [1]
                  for flip in ((False,) if args.tta is None else (False, True))]
    check_system_flags(p, args)
    return args


# ──────────────────────────────────────────────── scores ────────────────────────────────────────────────

# Anomaly scores (B, H, W), float32, higher = more anomalous; those of PLAIN are pure functions of logits
# (B, N, H, W). The logarithm of a mean softmax (dropout, ensemble, CRF) serves as logits of msp and entropy.

def score_msp(logits):
    """Maximum softmax probability, the paper's score (Eq. 2; Hendrycks & Gimpel, ICLR 2017): log(1 − max_i S_i).

    The same order as −max_i S_i, but no ties where float32 cannot tell the latter from −1:
    log Σ_{j ≠ top} exp f_j − log Σ_j exp f_j, with f_j the logits. In (−∞, log(1 − 1/N)]."""
    logits = logits.float()
    top = logits.argmax(1, keepdim=True)
    return logits.scatter(1, top, -math.inf).logsumexp(1) - logits.logsumexp(1)


def score_entropy(logits):
    """Softmax entropy H(S) = −Σ_i S_i log S_i, in [0, log N]."""
    log_S = common.log_softmax(logits)
    return -(log_S.exp() * log_S).sum(1)


def score_maxlogit(logits):
    """−max_i z_i (Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", ICML 2022)."""
    return -logits.float().max(1).values


def score_energy(logits):
    """−log Σ_i exp z_i (Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020)."""
    return -logits.float().logsumexp(1)


PLAIN = dict(msp=score_msp, entropy=score_entropy, maxlogit=score_maxlogit, energy=score_energy)
LOG_1_MINUS_MAX_S = ("msp", "dropout", "crf")     # scores that are told and drawn as 1 − max S


def log_mean_softmax(logits):
    """log of the mean softmax of several logits [(B, N, H, W), …]: Deep Ensemble (Lakshminarayanan et al., NeurIPS
    2017), MC-dropout."""
    return torch.stack([common.log_softmax(z) for z in logits]).logsumexp(0) - np.log(len(logits))


def dropout_layers(f):
    return [m for m in f.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]


def dropout_log_S(f, X, passes):
    """MC-dropout (Gal & Ghahramani, ICML 2016): log of the mean softmax over passes with dropout on (B, N, H, W).
    ASSUMPTION: 10 passes by default (--passes).

    Batch norm keeps its averages. Dropout is off again at the end; its masks come from torch's global generator."""
    for m in dropout_layers(f):
        m.train()
    logits = log_mean_softmax([f(X) for _ in range(passes)])
    for m in dropout_layers(f):
        m.eval()
    return logits


def crf_log_S(log_S, iterations=10, sigma_xy=10.0, sigma_p=13.0, compat=10.0, radius=20, stride=4):
    """Dense-CRF refinement of a softmax (Krähenbühl & Koltun, NeurIPS 2011): log of the mean-field marginals.

    Unary −log S; Potts compatibility `compat` times a bilateral kernel over position and class probabilities,
    exp(−|Δxy|²/2σ_xy² − |Δp|²/2σ_p²), normalised over each pixel's neighbours, with the CAOS code's σ_xy = 10,
    σ_p = 13 and compat = 10. ASSUMPTION: the kernel is cut to a window of ±20 pixels sampled every 4 (120 neighbours),
    and 10 iterations replace 100, so that it runs on the device. log_S (B, N, H, W)."""
    S = log_S.exp()
    H, W = S.shape[-2:]
    steps = range(-radius, radius + 1, stride)
    offsets = [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0) and abs(dy) < H and abs(dx) < W]

    def overlap(dy, dx):
        """Slices of the pixels that have a neighbour at (dy, dx), and of those neighbours."""
        here = (..., slice(max(-dy, 0), H - max(dy, 0)), slice(max(-dx, 0), W - max(dx, 0)))
        there = (..., slice(max(dy, 0), H - max(-dy, 0)), slice(max(dx, 0), W - max(-dx, 0)))
        return here, there

    kernels, norm = [], torch.zeros_like(S[:, :1])
    for dy, dx in offsets:
        here, there = overlap(dy, dx)
        apart = ((S[here] - S[there])**2).sum(1, keepdim=True)                     # |Δp|², (B, 1, h, w)
        k = torch.exp(-(dy**2 + dx**2) / (2 * sigma_xy**2) - apart / (2 * sigma_p**2))
        kernels.append(k)
        norm[here] += k
    Q = S
    for _ in range(iterations):
        message = torch.zeros_like(Q)                                              # Σ over neighbours of k · Q
        for (dy, dx), k in zip(offsets, kernels):
            here, there = overlap(dy, dx)
            message[here] += k * Q[there]
        log_Q = torch.log_softmax(log_S + compat * message / norm.clamp(min=1e-12), 1)
        Q = log_Q.exp()
    return log_Q


# A score is a function score(X, seen, index) → (B, H, W). Whatever it needs beside an image is made once, by its entry
# of SCORES: make(name, fs, args, device) → score. fs: the model [f], or an ensemble [f, …]; X (B, 3, H, W); seen: what
# forward() says of it; index: of the image in its split, from which random numbers are drawn. It is a pure function of
# these, so that no number depends on the order of the images or the number of ranks.

def make_plain(name, fs, args, device):
    """A score of PLAIN: msp and entropy of an ensemble are those of its mean softmax, the others of its mean logits."""
    if name == "maxlogit" and args.refine:
        return make_mask_score(name, fs, args, device)
    key = "mixture" if name in ("msp", "entropy") else "logits"
    return lambda X, seen, index: PLAIN[name](seen[key])


def make_dropout(name, fs, args, device):
    """MSP of the mean softmax of passes with dropout, whose masks are a function of --seed and the image. Raises
    InputError for a model without a dropout layer."""
    for f in fs:
        if not dropout_layers(f):
            raise common.InputError(f"{f.origin[0]}: --score dropout: {f.arch} has no dropout; expected a model of "
                                    "--arch deeplabv3 or pspnet")

    def dropout(X, seen, index):
        torch.manual_seed((args.seed * 1_000_003 + index) % 2**63)
        return score_msp(log_mean_softmax([dropout_log_S(f, X, args.passes) for f in fs]))
    return dropout


def make_crf(name, fs, args, device):
    """MSP after the dense CRF."""
    return lambda X, seen, index: score_msp(crf_log_S(seen["log_S"], args.crf_iterations))


def prepare_scores(fs, names, args, device):
    """{name: score(X, seen, index) → (B, H, W)} of a model or ensemble."""
    made = {}
    for name in names:
        if name not in made:
            score = SCORES[name](name, fs, args, device)
            made |= score if isinstance(score, dict) else {name: score}          # knn and cknn share their references
    return {name: made[name] for name in names}


def forward(fs, X):
    """What a model or ensemble says of X: dict(logits: their mean; mixture: the logarithm of their mean softmax, or of
    one model its logits, whose softmax is the same; log_S: log-softmax, all (B, N, H, W); each: every f.outputs(X))."""
    each = [f.outputs(X) for f in fs]
    logits = [o["logits"].float() for o in each]
    if len(each) == 1:
        return dict(each=each, logits=logits[0], mixture=logits[0], log_S=common.log_softmax(logits[0]))
    log_S = log_mean_softmax(logits)
    return dict(each=each, logits=torch.stack(logits).mean(0), mixture=log_S, log_S=log_S)


def anomaly_scores(fs, X, index, scores):
    """({score name: float32 (B, H, W)}, log-softmax (B, N, H, W)) of image `index`; scores: of prepare_scores()."""
    seen = forward(fs, X)
    return {name: score(X, seen, index) for name, score in scores.items()}, seen["log_S"]


def over_views(X, views, maps):
    """maps(X) → ({score: (B, H, W)}, log-softmax (B, N, H, W)) over the views of X (--size, --tta), at X's own size.

    views [(size, scale, flip)]: f sees X at scale times size, (H, W) or one factor, and mirrored. The mean of the score
    maps and of the softmax, each brought back bilinearly (as PAnS, Fontanel et al., CVPRW 2021, over its scales)."""
    def resized(t, size):
        return t if t.shape[-2:] == size else nn.functional.interpolate(t, size, mode="bilinear", antialias=True)

    own, scores, log_S = X.shape[-2:], {}, None
    for size, scale, flip in views:
        seen = X
        if [*size, scale] != [1, 1]:
            full = size if len(size) == 2 else [size[0] * n for n in own]
            seen = resized(X, torch.Size(max(32, round(scale * n)) for n in full))
        of_view, log_S_of_view = maps(seen.flip(-1) if flip else seen)
        back = lambda t: resized(t.flip(-1) if flip else t, own)
        scores = {k: back(v[:, None])[:, 0] + scores.get(k, 0) for k, v in of_view.items()}
        same = log_S_of_view.shape[-2:] == own                     # else the softmax is resized, not its logarithm
        mine = back(log_S_of_view) if same else back(log_S_of_view.exp()).log()
        log_S = mine if log_S is None else torch.logaddexp(log_S, mine)
    return {k: v / len(views) for k, v in scores.items()}, log_S - math.log(len(views))


# ──────────────────────────────────────────────── metrics ────────────────────────────────────────────────

# Anomalous pixels are the positives, and a higher score is more anomalous.
# ASSUMPTION: the paper names AUPR and the "FPR at 95 % true positive rate" without a formula. Here, in percent:
#     aupr         step-wise average precision, as sklearn.metrics.average_precision_score
#     auroc        area under the ROC curve, a tied positive/negative pair counting one half
#     fpr95        FPR95: FPR at the threshold whose recall is nearest to 95 %: fpr_and_fdr_at_recall of the CAOS code
#     fpr95_first  FPR at the highest threshold whose recall reaches 95 %: the textbook definition

METRICS = ("aupr", "auroc", "fpr95", "fpr95_first")


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
    """All METRICS, as they are defined above, from the distinct scores held by at least one positive; None when either
    class is empty: a per-image mean skips and counts such images.

    chunks  iterable of non-empty int64 arrays (pos, recalled, above, upto, …), in descending score order, one entry
            per such score: positives at it, positives above or at it, negatives strictly above it, above or at it
    P, N    total positives and negatives, together below 2**32
    Other scores need no entry: between two positives recall is constant, so a run of negatives adds to
    neither area, and FPR is only ever read at its ends.
    """
    if not P or not N:
        return None
    ap, pairs, nearest, fpr95, first = 0.0, 0, np.inf, 0, None
    for pos, recalled, above, upto, *_ in chunks:
        ap += float(np.sum(pos * (recalled / (recalled + upto))))   # Σ precision · Δrecall, times P
        pairs += int(np.sum(pos * (above + upto)))                  # twice the misordered pairs
        reached = recalled / P >= 0.95
        if first is None and reached[-1]:
            first = int(upto[np.argmax(reached)])
        # CAOS scans from the lowest threshold and keeps the first of the nearest: for a recall below 1
        # the one just before the next positive, whose FP count is `above` of that positive ...
        distance = np.abs((recalled - pos) / P - 0.95)
        i = len(pos) - 1 - int(np.argmin(distance[::-1]))
        if distance[i] <= nearest:
            nearest, fpr95 = distance[i], int(above[i])
        fp = int(upto[-1])
    if abs(1 - 0.95) <= nearest:   # ... but for recall 1 the highest threshold that reaches it
        fpr95 = fp
    return dict(aupr=100 * ap / P, auroc=100 - 50 * pairs / (P * N),
                fpr95=100 * fpr95 / N, fpr95_first=100 * first / N)


def image_metrics(pos, neg):
    """Exact metrics of one image from `sort_by_class`."""
    return curve_metrics(exact_chunks(pos, neg), len(pos), len(neg))


def exact_chunks(pos, neg, size=1 << 20):
    """The chunks of `curve_metrics`, and the scores, for ascending scores of the two classes, `size` at a time."""
    scores, counts = np.unique(pos, return_counts=True)
    for end in range(len(scores), 0, -size):
        score, count = (v[max(0, end - size):end][::-1] for v in (scores, counts))
        above = len(neg) - np.searchsorted(neg, score, "right")
        recalled, upto = (len(part) - np.searchsorted(part, score, "left") for part in (pos, neg))
        yield count, recalled, above, upto, score


# The bins of ScoreHistogram. The bits of a float32, with its sign handled, are an integer of the same order: 1 bit of
# sign, 8 of exponent, 23 of mantissa. A bin is a sign, an exponent and the upper bits of the mantissa: 19 of them for
# magnitudes in [1/8, 32), where most scores of models lie, 17 around that, 10 where none do: fewer than 2**24 bins.
# (15 bits everywhere, the upper half of the integer, put FPR95 off by up to 0.004 points on scores of trained models.)
POWERS = np.r_[128:-128:-1, -127:129]   # exponent for each upper 9 bits of a key: of negative scores, then of positive
SHIFTS = np.full(512, 13, np.uint32)    # lower bits of the mantissa that are dropped
SHIFTS[(POWERS >= -20) & (POWERS < 12)] = 6
SHIFTS[(POWERS >= -3) & (POWERS < 5)] = 4
FIRST = np.cumsum(np.append(0, 1 << 23 - SHIFTS.astype(np.int64))).astype(np.uint32)   # bin of mantissa 0, by POWERS
BINS = int(FIRST[-1])                                                                  # 0.91 · 2**24


def bin_numbers(scores):
    """float32 → uint32 bin numbers, of the same order or equal."""
    bits = (scores + np.float32(0)).view(np.int32)    # adding 0 turns -0.0 into 0.0
    bits ^= bits >> 31 | -1 << 31                     # negative: all bits inverted; positive: the upper one
    keys = bits.view(np.uint32)
    upper = keys >> 23
    return FIRST[upper] + ((keys & 0x7FFFFF) >> SHIFTS[upper])


def bin_floors(bins):
    """The smallest float32 of each bin: s ≥ bin_floors(b) where bin_numbers(s) ≥ b."""
    upper = np.searchsorted(FIRST, bins, "right") - 1
    keys = (upper.astype(np.uint32) << 23) | (bins.astype(np.uint32) - FIRST[upper]) << SHIFTS[upper]
    return np.where(keys >> 31, keys ^ np.uint32(1 << 31), ~keys).view(np.float32)


class ScoreHistogram:
    """Pooled metrics over any number of pixels, in one pass and bounded memory.

    Up to `exact` pixels (64 MiB) are kept as they are, and the metrics are exact. More are counted in a table of BINS,
    fewer than 2**24, bins a class (116 MiB). Both depend on the set of the scores alone, and counts are integers: any
    order, batching or split over ranks gives identical results.

    Bins tie scores that differ by less than 2e-6 of their value (magnitudes in [1/8, 32); 8e-6 of it in [2**-20, 4096),
    1e-3 beyond). On scores of trained models the errors are below 0.001 points. They are not where most scores are
    nearly tied: a large constant plus small differences, probabilities next to 1 (take the logarithm of 1 − p), the
    entropies of a network that knows nothing, all next to log N.
    """

    def __init__(self, exact=1 << 24):
        self.exact, self.total = exact, np.zeros(2, np.int64)   # total: positives, negatives
        self.kept = [np.empty((2, 0), np.float32)]              # (pos, neg) of every image, until there is a table
        self.table = None                                       # uint32 (2, BINS), rows as in total

    def add(self, pos, neg):
        """Count pixels, e.g. of one image; arguments from `sort_by_class`. InputError above 2**32 - 1 pixels in all."""
        self.count((len(pos), len(neg)))
        if self.table is None:
            self.kept.append((pos, neg))
        else:
            self.fill(pos, neg)

    def count(self, total):
        self.total += total
        if self.total.sum() >= 1 << 32:
            raise common.InputError(f"{self.total.sum()} pixels: the pooled metrics count to {2**32 - 1}; "
                                    "expected fewer or smaller images")
        self.make_room(self.total.sum())

    def make_room(self, pixels):
        """Go over from kept scores to the table if so many `pixels` are too many to keep."""
        if self.table is None and pixels > self.exact:
            self.table = np.zeros((2, BINS), np.uint32)
            while self.kept:
                self.fill(*self.kept.pop())

    def fill(self, *parts):
        for row, scores in zip(self.table, parts):
            for piece in np.array_split(scores, 1 + (len(scores) >> 20)):
                bins, counts = np.unique(bin_numbers(piece), return_counts=True)
                row[bins] += counts.astype(np.uint32)

    def sorted_scores(self):
        """Ascending (pos, neg) of all that is kept."""
        if len(self.kept) > 1:
            self.kept = [[np.concatenate(part) for part in zip(*self.kept)]]
            for part in self.kept[0]:
                part.sort()
        return self.kept[0]

    def state(self):
        """All that was counted, as a dict of numpy arrays: the scores kept, or the bins that are not empty."""
        if self.table is None:
            bins, counts, (pos, neg) = np.empty(0, np.uint32), np.empty((2, 0), np.uint32), self.sorted_scores()
        else:
            bins, (pos, neg) = np.flatnonzero(self.table.any(0)).astype(np.uint32), np.empty((2, 0), np.float32)
            counts = self.table[:, bins]
        return dict(header=np.array([self.exact, *self.total]), bins=bins, counts=counts, pos=pos, neg=neg)

    def merge(self, state):
        """Add the `state()` of another histogram of the same `exact`, as if its pixels came here."""
        exact, *total = state["header"].tolist()
        if exact != self.exact:
            raise ValueError(f"cannot merge histograms that keep {self.exact} and {exact} scores")
        if len(state["bins"]) == 0:
            return self.add(state["pos"], state["neg"])
        self.make_room(np.inf)
        self.count(total)
        self.table[:, state["bins"]] += state["counts"]

    def chunks(self, swapped=False):
        """The chunks of `curve_metrics`, and the scores, for all that was counted; a bin is one score, its smallest.

        `swapped` takes the negatives for positives, and the positives for negatives."""
        rows = slice(None, None, -1 if swapped else 1)
        if self.table is None:
            yield from exact_chunks(*self.sorted_scores()[rows])
            return
        flagged = np.zeros((2, 1), np.int64)
        for end in range(BINS, 0, -1 << 16):
            pos, neg = part = self.table[rows, max(0, end - (1 << 16)):end][:, ::-1].astype(np.int64)
            recalled, upto = flagged = flagged[:, -1:] + part.cumsum(1)
            hit = np.flatnonzero(pos)
            if len(hit):
                yield pos[hit], recalled[hit], upto[hit] - neg[hit], upto[hit], bin_floors(end - 1 - hit)

    def metrics(self):
        """`curve_metrics` of all that was counted."""
        return curve_metrics(self.chunks(), *self.total.tolist())

    def curve(self, points=1000):
        """(recall, precision, FPR), each float64 of at most about `points`, along falling thresholds."""
        P, N = self.total.tolist()
        drawn, curve = 0, [(0.0, 1.0, 0.0)]
        for _, recalled, _, upto, _ in self.chunks():
            steps = recalled * points // P
            for i in np.flatnonzero(np.diff(steps, prepend=drawn)):    # whenever recall passes a step
                curve.append((recalled[i] / P, recalled[i] / (recalled[i] + upto[i]), upto[i] / N))
            drawn = int(steps[-1])
        return np.array([*curve, (1.0, P / (P + N), 1.0)]).T

    def rates(self, t):
        """Recall and FPR in percent of flagging scores of at least t; None for a class without pixels."""
        if self.table is None:
            flagged = [len(part) - np.searchsorted(part, np.float32(t)) for part in self.sorted_scores()]
        else:
            flagged = self.table[:, bin_numbers(np.float32([t]))[0]:].sum(1, dtype=np.int64)
        return {k: round(100 * int(n) / int(total), 4) if total else None
                for k, n, total in zip(("recall", "fpr"), flagged, self.total)}


# Thresholds: a pixel is flagged where its score is at least t, a float that is a float32

def share_threshold(histogram, share, swapped=False):
    """The highest t that flags at least `share` (in (0, 1]) of the positives (swapped: negatives); None without any.
    Of the share 0.95 of the positives it is the threshold of fpr95_first."""
    for _, flagged, _, _, score in histogram.chunks(swapped):
        reached = flagged / histogram.total[int(swapped)] >= share
        if reached[-1]:
            return float(score[np.argmax(reached)])
    return None


def f1_threshold(histogram):
    """The highest t with the largest F1 = 2 TP / (2 TP + FP + FN) of pixels; None without a positive."""
    best, t = 0.0, None
    for _, recalled, _, upto, score in histogram.chunks():
        f1 = 2 * recalled / (recalled + upto + histogram.total[0])   # TP + FN = P
        if f1.max() > best:
            best, t = f1.max(), float(score[np.argmax(f1)])
    return t


# Objects: connected components, eight neighbours, as SegmentMeIfYouCan counts them (Chan et al., NeurIPS 2021 Datasets
# and Benchmarks, and its code). k an object of the labels, k̂ a predicted one, K̂(k) the pixels of all k̂ that meet k:
#     sIoU(k)   |k ∩ K̂(k)| / |(k ∪ K̂(k)) − A(k)|, A(k) the pixels of K̂(k) that belong to other objects
#     PPV(k̂)    share of the pixels of k̂ that belong to any object
#     F1(τ)     2 TP / (2 TP + FN + FP): TP objects with sIoU ≥ τ, FN the others, FP predictions with PPV < τ;
#               mean over τ = 0.25, 0.30, …, 0.75

SMALLEST = (100, 500)   # pixels of the smallest object and the smallest prediction that count; RoadObstacle21: (10, 50)


def component_counts(flagged, anomalous, ignored, smallest=SMALLEST):
    """The pixel counts behind sIoU and PPV of one image; three bool (H, W) maps.

    Predictions are not made of ignored pixels, nor do they reach across them. Those below smallest[1] pixels are no
    predictions; objects below smallest[0] are as if ignored (after the predictions were formed).
    Returns int64 arrays: |k ∩ K̂| and |(k ∪ K̂) − A| of each object, pixels in objects and pixels of each k̂."""
    objects, n = ndimage.label(anomalous, np.ones((3, 3)))
    found, m = ndimage.label(flagged & ~ignored, np.ones((3, 3)))
    small = np.bincount(objects.ravel(), minlength=n + 1) < smallest[0]
    small[0] = False                                                  # 0 is no object
    found[np.bincount(found.ravel(), minlength=m + 1)[found] < smallest[1]] = 0
    left_out = small[objects]
    objects[left_out] = found[left_out] = 0

    size, found_size = np.bincount(objects.ravel(), minlength=n + 1), np.bincount(found.ravel(), minlength=m + 1)
    both = (objects > 0) & (found > 0)
    pairs, area = np.unique(objects[both].astype(np.int64) * (m + 1) + found[both], return_counts=True)
    k, k_hat = pairs // (m + 1), pairs % (m + 1)                      # the pairs that meet, in `area` pixels
    total = lambda at, what, length: np.bincount(at, what, length).astype(np.int64)
    covered, hit = total(k, area, n + 1), total(k_hat, area, m + 1)   # |k ∩ K̂(k)|; pixels of k̂ in objects
    of_others = total(k, hit[k_hat], n + 1) - covered                 # |A(k)|
    union = size + total(k, found_size[k_hat], n + 1) - covered - of_others
    counted, predicted = np.flatnonzero(size[1:]) + 1, np.flatnonzero(found_size[1:]) + 1
    return covered[counted], union[counted], hit[predicted], found_size[predicted]


def component_metrics(images):
    """sIoU, PPV and mean F1 in percent over [component_counts of an image, …], every object counting the same.

    None for what is a mean over nothing. Whether a ratio reaches τ = i/20 is decided in integers."""
    covered, union, hit, size = (np.concatenate([image[i] for image in images] + [np.empty(0, np.int64)])
                                 for i in range(4))
    f1 = []
    for i in range(5, 16):
        tp, fp = int((20 * covered >= i * union).sum()), int((20 * hit < i * size).sum())
        f1.append(2 * tp / max(tp + len(union) + fp, 1))
    return dict(siou=float(100 * np.mean(covered / union)) if len(union) else None,
                ppv=float(100 * np.mean(hit / size)) if len(size) else None,
                f1=100 * float(np.mean(f1)) if len(union) or len(size) else None,
                objects=len(union), predictions=len(size))


def open_confusion(prediction, flagged, Z, N):
    """int64 (N + 1, N + 1): rows the label, columns the prediction, class N being the anomaly; a flagged pixel is
    predicted as N. Pixels without a class are left out. prediction, Z uint8 (H, W), flagged bool."""
    label = np.where(Z == common.ANOMALY, N, Z).astype(np.uint8)
    return common.confusion(torch.from_numpy(np.where(flagged, N, prediction).astype(np.uint8)),
                            torch.from_numpy(label), N + 1)


def open_miou(matrix):
    """(mean IoU of the N known classes that the labels hold, IoU of the anomaly), in percent; None where absent.

    DenseHybrid's open-mIoU (Grcić et al., ECCV 2022): a false alarm is a false negative of its class, a missed anomaly
    a false positive of the class that it is taken for."""
    N = len(matrix) - 1
    iou = list(common.segmentation_metrics(matrix, range(N + 1))["iou"].values())
    known = [v for v in iou[:N] if v is not None]
    return float(np.mean(known)) if known else None, iou[N]


# ──────────────────────────────────────────────── protocol ────────────────────────────────────────────────

def shown(path):
    """A path as text that any file can hold: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def short_names(paths):
    """A label for each file: its stem, with as many folders before it as tell it from the others.

    run0/ft.pt, run1/ft.pt, pretrained.pt → run0/ft, run1/ft, pretrained. Raises InputError for a file named twice."""
    parts = [(p.parent / p.name.removesuffix(".pt")).parts for p in (Path(os.path.abspath(p)) for p in paths)]
    names = []
    for i, mine in enumerate(parts):
        if mine in parts[:i]:
            raise common.InputError(f"{paths[i]}: the same file as {paths[parts.index(mine)]}, or of the "
                                    "same name but for its end; expected different names")
        k = next(k for k in range(1, len(mine) + 1) if sum(p[-k:] == mine[-k:] for p in parts if p != mine) == 0)
        names.append(shown("/".join(mine[-k:])))
    return names


def load_models(args, device):
    """({label: [f, …]}, {path: checkpoint}), --ckpt first. Raises InputError where their classes differ."""
    paths = [*args.ckpt, *args.baseline]
    names = short_names(paths) if not args.tradi else \
        [f"{name} TRADI" for name in short_names(args.ckpt)] + short_names(args.baseline)
    loaded = {path: common.load_checkpoint(path) for path in paths}
    classes = loaded[paths[0]][1]["classes"]
    for path, (_, checkpoint) in loaded.items():
        if checkpoint["classes"] != classes:
            raise common.InputError(f"{path}: its classes are not those of {paths[0]}: {len(checkpoint['classes'])} "
                                    f"and {len(classes)}; expected the same")
    for path, (f, checkpoint) in loaded.items():
        common.same_everywhere(path, checkpoint["fingerprint"], "the one f")
        f.origin = path, checkpoint                      # where its training images lie, and who it is
    for path in filter(None, (args.student, args.generator)):
        common.same_everywhere(path, common.fingerprint(path) if os.path.exists(path) else None, "the one made for f")
    fs = [loaded[path][0].to(device).requires_grad_(False) for path in paths]
    n = len(args.ckpt)
    for path, name in zip(args.baseline, names[n:]):
        if name == "+".join(names[:n]):
            raise common.InputError(f"{path}: {name} is what the row of --ckpt is called; expected another file name")
    models = {"+".join(names[:n]): fs[:n], **{name: [f] for name, f in zip(names[n:], fs[n:])}}
    if args.tradi:
        models[next(iter(models))] = [f for p in args.ckpt for f in tradi_samples(p, loaded[p][1], args, device)]
    for _, checkpoint in loaded.values():
        for key in ("model", "optimiser", "tradi"):      # f has the weights; the rest is to resume training
            checkpoint.pop(key, None)
    return models, {path: checkpoint for path, (_, checkpoint) in loaded.items()}


def open_scenes(args, checkpoint):
    """{name: the split to evaluate on} of every --data and --root, else the checkpoint's. A name is that of the data
    set, with a number where it is named twice. Raises InputError for other classes; a data set without classes (labels
    that tell anomalies alone) suits every checkpoint."""
    wanted, opened = args.data or [checkpoint["data"]], {}
    for i, data in enumerate(wanted):
        own = data == checkpoint["data"]
        if own and not args.root and data != "toy":      # the toy's is drawn where it is not there
            common.data_root(None, checkpoint)
        with common.first_rank_first():
            root = common.default_root(data, args.root[i] if args.root else checkpoint["root"] if own else None)
            scenes = common.Scenes(data, root, args.split, own_anomaly(data, root, checkpoint))
        if scenes.classes:
            common.same_classes(scenes, checkpoint)
        opened[data if wanted.count(data) == 1 else f"{data}_{wanted[:i].count(data) + 1}"] = scenes
    if args.open and not any(scenes.classes for scenes in opened.values()):
        raise common.InputError(f"--open: the labels of {', '.join(opened)} tell no classes; expected a data set that "
                                "has those of the checkpoint")
    if args.ignore_classes and not any(scenes.classes for scenes in opened.values()):
        raise common.InputError(f"--ignore-classes: the labels of {', '.join(opened)} tell no classes")
    return opened


def check_queries(args, opened, checkpoint):
    """InputError where --queries-from would choose on images that are evaluated."""
    if args.queries_from in common.SPLITS:
        files = lambda scenes: {os.path.realpath(image) for image, _ in scenes.pairs}
        chosen_on = files(own_split(checkpoint, args.train_root, args.queries_from))
        for path in sorted(chosen_on & set().union(*map(files, opened.values())))[:1]:
            raise common.InputError(f"--queries-from {args.queries_from}: the queries would be chosen on images that "
                                    f"are evaluated, {path} among them; expected others")


def own_anomaly(data, root, checkpoint):
    """The checkpoint's --anomaly, on the data set that it was trained on; None on another, and on a folder whose
    dataset.json says by ids what is anomalous (tests/paste.py)."""
    other = data != checkpoint["data"] or common.dataset_spec(data, root).get("anomaly")
    return None if other else checkpoint["anomaly"]


def own_split(checkpoint, train_root, split):
    """A split of the data that f was trained on, whole images, in the folder `train_root` if it is given."""
    return common.scenes_of(checkpoint, common.data_root(train_root, checkpoint, "--train-root"), split)


def validation_scenes(scenes, checkpoint, train_root=None):
    """The images on which thresholds are set: the validation split of the data set itself, where it has one and
    classes; else, and with `train_root` where its folders are not there, that of the checkpoint's, in that folder."""
    has_val = scenes.classes and ("hold_out" in scenes.spec or "val" in scenes.spec["splits"])
    if has_val and train_root and scenes.data == checkpoint["data"]:
        has_val = not common.missing_folders({**scenes.spec, "root": Path(scenes.root)}, ("train", "val"))
    if has_val:
        return common.Scenes(scenes.data, scenes.root, "val", own_anomaly(scenes.data, scenes.root, checkpoint))
    return own_split(checkpoint, train_root, "val")


def ignored_labels(args, scenes, checkpoints):
    """(bool (256,): labels whose pixels are left out, names of the classes among them by choice)."""
    classes = next(iter(checkpoints.values()))["classes"]
    left_out = args.ignore_classes if scenes.classes else []
    # ASSUMPTION: the pilot study's classes count as neither known nor anomalous, for the baseline beside it too. The
    # random-guess column of Table I (1.9, 1.6, 5.3, 1.5) fits that: the share of anomalies rises as pixels are left out
    if left_out is None:
        left_out = sorted({k for c in checkpoints.values() for k in c.get("known_unknown") or ()})
    # ASSUMPTION: pixels without a known class are negatives unless --unlabeled says otherwise, as in the CAOS code
    ignore = np.zeros(256, bool)
    ignore[common.class_indices(left_out, classes, "--ignore-classes")] = True
    if args.unlabeled != "negative" or not scenes.classes:   # labels of anomalies alone: outside the region of interest
        ignore[common.IGNORED] = True
    if args.unlabeled == "ignore":
        ignore[common.class_indices(scenes.spec.get("unlabeled", ()), classes, "unlabeled")] = True
    return ignore, list(left_out)


def two_folds(scenes):
    """int (n,): the fold, 0 or 1, of every image: its folder where there are two of them (StreetHazards' t5 and t6),
    else the half of the list. ASSUMPTION: DenseHybrid has StreetHazards alone."""
    folders = [Path(scenes.name(i)).parent for i in range(len(scenes))]
    if len(set(folders)) == 2:
        return np.array([sorted(set(folders)).index(f) for f in folders])
    return (np.arange(len(scenes)) >= (len(scenes) + 1) // 2).astype(int)


def named_panels(wanted, scenes):
    """Indices of the images whose paths end in the names of --panels, by whole parts: 5.png is not 15.png.

    None where --panels is a number. Raises InputError for a name that no image has."""
    if len(wanted) == 1 and wanted[0].isdecimal():
        return None
    found = []
    for name in wanted:
        end = Path(name).parts
        hits = [i for i in range(len(scenes)) if end and Path(scenes.name(i)).parts[-len(end):] == end]
        if not hits:
            raise common.InputError(f"--panels {name}: no image of the {scenes.split} split ends in that name")
        found += [i for i in hits if i not in found]
    return found


def describe(args, scenes, counts, left_out, both, checkpoints):
    """The protocol of results.json: what was counted and how. `both`: images with anomalies and negatives."""
    classes = next(iter(checkpoints.values()))["classes"]
    pixels, anomalous, ignored = (sum(c[k] for c in counts.values()) for k in ("pixels", "anomalous", "ignored"))
    share = [100 * counts[i]["anomalous"] / (counts[i]["pixels"] - counts[i]["ignored"]) for i in both]
    special = {common.IGNORED: "no known class", common.ANOMALY: "anomaly", common.KNOWN: "known, of no told class"}
    unlabeled = ", ".join((f"{args.unlabeled}: ids without a known class", *scenes.spec.get("unlabeled", ())))
    if args.unlabeled == "other" or not scenes.classes:
        unlabeled = "other: ids without a known class are left out"
    return dict(
        data=scenes.data, split=args.split, images=len(counts), resolution=sorted({c["size"] for c in counts.values()}),
        size=args.size, tta=args.tta,
        positives="anomalous pixels",
        class_ids={str(k): special.get(v) or classes[v]
                   for k, v in enumerate(scenes.lut.tolist()) if v != common.FOREIGN},
        unlabeled=unlabeled, ignored_classes=left_out, pixels=pixels, ignored_pixels=ignored,
        ignored_share=round(100 * ignored / pixels, 4),
        # ASSUMPTION: AUPR of a constant score is positives / all pixels; the paper writes positives : negatives
        base_rate=round(100 * anomalous / max(pixels - ignored, 1), 4),
        base_rate_per_image=round(float(np.mean(share)), 4) if share else None,
        images_without_anomaly_or_negative=len(counts) - len(both),
        per_image=f"mean over the {len(both)} images that hold both", pooled="all pixels at once",
        fpr95="recall nearest to 0.95, larger FPR on ties (CAOS); "
              "fpr95_first: first threshold with recall of at least 0.95",
        miou="over the classes present in the labels, ignored_classes included",
        dataset=scenes.identity(),
        checkpoints={shown(path): checkpoint["fingerprint"] for path, checkpoint in checkpoints.items()},
        **scores_protocol(args, next(iter(checkpoints.values()))))


def environment(device):
    """What the numbers were computed with; nothing that differs between runs on one machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                numpy=np.__version__, device=name)


# ─────────────────────────────────────────────── evaluation ───────────────────────────────────────────────

class Tally:
    """What one model accumulates over the images of this rank."""

    def __init__(self, score_names, N, folds=None):
        self.N, self.folds = N, folds                    # folds: of two_folds, for --open
        self.histograms = {s: ScoreHistogram() for s in score_names}
        self.of_fold = {s: (ScoreHistogram(), ScoreHistogram()) for s in score_names if folds is not None}
        self.confusion = torch.zeros(N, N, dtype=torch.int64)
        # Pixels with max S in ((k − 1)/1000, k/1000], k = 0..1000: known and right, known, anomalous (Fig. 4)
        self.top_counts = np.zeros((3, 1001), np.int64)
        self.images = {}                                 # index → {score: metrics or None}

    def add(self, index, scores, top, prediction, Z, ignored):
        """One image: scores {name: float32 (H, W)}, top = max S, prediction and Z uint8, ignored bool, all (H, W)."""
        keep = ~ignored
        positive = (Z == common.ANOMALY)[keep]
        self.images[index] = {}
        for name, score in scores.items():
            pos, neg = sort_by_class(score[keep], positive)
            self.histograms[name].add(pos, neg)
            if self.of_fold:
                self.of_fold[name][self.folds[index]].add(pos, neg)
            self.images[index][name] = image_metrics(pos, neg)
        self.confusion += common.confusion(torch.from_numpy(prediction), torch.from_numpy(Z), self.N)
        known = (Z < self.N) & keep
        bins = np.ceil(top * 1000).astype(np.int64).clip(0, 1000)
        for row, mask in zip(self.top_counts, (known & (prediction == Z), known, Z == common.ANOMALY)):
            row += np.bincount(bins[mask], minlength=1001)

    def merge_ranks(self):
        """Gather the tally of all ranks on rank 0: counts are integers, so no number depends on how it was split."""
        common.all_sum(self.confusion)
        common.all_sum(torch.from_numpy(self.top_counts))      # in place
        self.images = {k: v for part in common.gather(self.images) for k, v in part.items()}
        for histogram in [*self.histograms.values(), *(h for pair in self.of_fold.values() for h in pair)]:
            pixels = common.all_sum(torch.tensor(histogram.total.sum()))
            histogram.make_room(int(pixels))             # the bins of many scores are fewer than these
            if torch.distributed.is_initialized():
                states = [None] * common.world() if common.rank() == 0 else None
                torch.distributed.gather_object(histogram.state(), states)
                for state in (states or ())[1:]:
                    histogram.merge(state)


class Marked:
    """What one model accumulates in the second pass, in which every score has thresholds.

    thresholds  {score: dict(objects=t, open=(t of fold 0, of fold 1), val=t)}; None where there is none"""

    def __init__(self, N, thresholds, folds=None, smallest=SMALLEST):
        self.N, self.thresholds, self.folds, self.smallest = N, thresholds, folds, smallest
        self.objects = {}                                # index → {score: component_counts}
        self.confusion = {(s, k): torch.zeros(N + 1, N + 1, dtype=torch.int64)
                          for s in thresholds for k in (0, 1, "val") if folds is not None}

    def add(self, index, scores, top, prediction, Z, ignored):
        """As Tally.add."""
        self.objects[index] = {}
        for name, score in scores.items():
            at = self.thresholds[name]
            if at["objects"] is not None:
                self.objects[index][name] = component_counts(score >= np.float32(at["objects"]), Z == common.ANOMALY,
                                                             ignored, self.smallest)
            if self.folds is None:
                continue
            fold = int(self.folds[index])
            for key, t in ((fold, at["open"][1 - fold]), ("val", at["val"])):    # the threshold of the other fold
                if t is not None:
                    self.confusion[name, key] += open_confusion(prediction, score >= np.float32(t), Z, self.N)

    def merge_ranks(self):
        """As Tally.merge_ranks."""
        self.objects = {k: v for part in common.gather(self.objects) for k, v in part.items()}
        for matrix in self.confusion.values():
            common.all_sum(matrix)


@torch.no_grad()
def evaluate(models, scores, scenes, ignore, args, device, tallies=None):
    """Run every model of {label: [f, …]} over the split; {label: Tally}, {index: pixel counts}, seconds by part.

    Loading and metrics run in threads beside the forward pass. `ignore` (256,) bool says which labels are left out;
    `tallies` {label: Tally or Marked} (default: a Tally each) is what is filled and returned."""
    tallies = tallies or {label: Tally(args.score, fs[0].num_classes) for label, fs in models.items()}
    counts, spent = {}, dict(forward=0.0, metrics=0.0)

    def account(item, label, maps):
        begun = time.perf_counter()
        Z, index = item["label"].numpy(), item["index"]
        ignored = ignore[Z]
        *scores, top, prediction = maps
        try:
            tallies[label].add(index, dict(zip(args.score, scores)), top, prediction.astype(np.uint8), Z, ignored)
        except ValueError as e:
            raise common.InputError(f"{scenes.name(index)}: {e} under {label}")
        counts[index] = dict(pixels=Z.size, anomalous=int((Z == common.ANOMALY).sum()), ignored=int(ignored.sum()),
                             size=f"{Z.shape[1]}×{Z.shape[0]}")
        spent["metrics"] += time.perf_counter() - begun

    threads = args.workers or (8 if device.type == "cuda" else 1)
    share = range(common.rank(), len(scenes), common.world())   # every image once, whatever the number of ranks
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(1) as accountant:
        waiting, items = deque(), common.ahead(readers, scenes.__getitem__, share, args.batch_size - 1)
        for item in common.progress(items, "evaluating", unit="image", total=len(share)):
            X = common.to_input(item["image"][None], device)    # one image: no number depends on its neighbours
            for label, fs in models.items():
                begun = time.perf_counter()
                maps = image_maps(fs, X, item["index"], scores[label], args.views)
                spent["forward"] += time.perf_counter() - begun
                waiting.append(accountant.submit(account, item, label, maps))
            while len(waiting) > 2 * len(models):
                waiting.popleft().result()
        for job in waiting:
            job.result()
    for tally in tallies.values():
        tally.merge_ranks()
    return tallies, {k: v for part in common.gather(counts) for k, v in part.items()}, spent


def calibrate(models, scores, scenes, checkpoints, args, device):
    """({share: {label: {score: threshold}}} from validation images, for 0.95 (--open) and --operating-point: with this
    recall there, where they hold anomalies; else 1 − share of their pixels are flagged; what the protocol says of it).
    On rank 0."""
    common.say(f"thresholds from the {len(scenes)} validation images of {scenes.root}")
    tallies = evaluate(models, scores, scenes, ignored_labels(args, scenes, checkpoints)[0], args, device)[0]
    anomalous = any(h.total[0] for tally in tallies.values() for h in tally.histograms.values())
    told = dict(images=scenes.identity(), share=args.operating_point or 0.95,
                of="anomalous pixels found" if anomalous else "pixels not flagged")
    return {share: {label: {s: share_threshold(h, share if anomalous else round(1 - share, 9), swapped=not anomalous)
                            for s, h in tally.histograms.items()} for label, tally in tallies.items()}
            for share in {args.operating_point or 0.95, 0.95}}, told


def assess(models, scores, scenes, checkpoints, calibrated, args, device):
    """Everything about one data set: dict(protocol, rows, and what the figures need); None but on rank 0."""
    ignore, left_out = ignored_labels(args, scenes, checkpoints)
    folds = two_folds(scenes) if args.open and scenes.classes else None
    N = next(iter(models.values()))[0].num_classes
    tallies, counts, spent = evaluate(models, scores, scenes, ignore, args, device,
                                      {label: Tally(args.score, N, folds) for label in models})
    marked = None
    if args.components is not None or folds is not None:
        smallest = args.components or scenes.spec.get("objects", SMALLEST)
        found = {label: {s: dict(objects=f1_threshold(h) if args.components is not None else None,
                                 open=[share_threshold(h, 0.95) for h in tally.of_fold[s]] if tally.of_fold else None,
                                 val=calibrated[0.95][label][s] if tally.of_fold else None)
                         for s, h in tally.histograms.items()} for label, tally in tallies.items()}
        found = common.gather(found)[0]                # rank 0 alone has all scores
        marked = {label: Marked(N, thresholds, folds, smallest) for label, thresholds in found.items()}
        again = evaluate(models, scores, scenes, ignore, args, device, marked)[2]
        spent = {k: spent[k] + again[k] for k in spent}
    if common.rank():
        return None
    common.say(f"time: forward {spent['forward']:.1f} s, metrics {spent['metrics']:.1f} s beside it "
               f"({100 * spent['metrics'] / max(sum(spent.values()), 1e-9):.0f} % of both)")
    order, main = sorted(counts), next(iter(tallies.values()))
    both = [i for i in order if main.images[i][args.score[0]] is not None]
    protocol = describe(args, scenes, counts, left_out, both, checkpoints)
    if args.components is not None:
        protocol["objects"] = f"at least {smallest[0]} pixels; predictions of at least {smallest[1]}"
    classes = next(iter(checkpoints.values()))["classes"]
    rows = table_rows(tallies, marked, calibrated, order, classes, args)
    if args.per_image:
        files = {i: shown(Path(os.path.relpath(scenes.name(i), scenes.root)).as_posix()) for i in both}
        for row in rows:
            found = tallies[row["model"]].images
            row["images"] = {files[i]: {k: round(found[i][row["score"]][k], 4) for k in ("aupr", "fpr95")}
                             for i in both}
    curves = [tallies[r["model"]].histograms[r["score"]].curve() for r in rows] if rows[0]["pooled"] else None
    return dict(protocol=protocol, rows=rows, curves=curves, counts=counts,
                top_counts={label: tally.top_counts for label, tally in tallies.items()})


def image_maps(fs, X, index, scores, views):
    """Every score, max S and the predicted class of one image: float32 (scores + 2, H, W), in one copy to the CPU."""
    maps, log_S = over_views(X, views, lambda X: anomaly_scores(fs, X, index, scores))
    log_top, prediction = log_S[0].max(0)
    return torch.stack([*(v[0] for v in maps.values()), log_top.exp(), prediction.float()]).cpu().numpy()


# ──────────────────────────────────────────────── results ────────────────────────────────────────────────

FIGURES = ("panels", "threshold", "curves")                    # .png, or _DATA.png each where there are several --data
PHOTOGRAPH = ("_anomaly.png", "_classes.png", "_score.npy")   # what each photograph gets
MARK = "evaluate.py, anomaly-aware semantic segmentation"     # in every PNG of this script


def score_metrics(tally, name, order):
    """{"pooled": …, "per_image": …} of one score, in percent to 4 decimals; None where a side has no pixel."""
    rounded = lambda m: m and {k: round(m[k], 4) for k in METRICS}
    images = [m for m in (tally.images[i][name] for i in order) if m]
    mean = {k: float(np.mean([m[k] for m in images])) for k in METRICS} if images else None
    return dict(pooled=rounded(tally.histograms[name].metrics()), per_image=rounded(mean))


def table_rows(tallies, marked, calibrated, order, classes, args):
    """A row for each model and score: anomaly metrics, mIoU, IoU of each class, pixel accuracy, in percent; `objects`,
    `open` and `operating_point` where they were asked for."""
    rounded = lambda v: v if v is None else round(v, 4)
    rows = []
    for label, tally in tallies.items():
        segmentation = common.segmentation_metrics(tally.confusion, classes)
        iou = {c: rounded(v) for c, v in segmentation["iou"].items()}
        segmentation = {**{k: rounded(segmentation[k]) for k in segmentation if k != "iou"}, "iou": iou}
        for score in args.score:
            row = dict(model=label, score=score, **score_metrics(tally, score, order), **segmentation)
            if args.components is not None:
                images = [o[score] for o in (marked[label].objects[i] for i in order) if score in o]
                row["objects"] = {**{k: rounded(v) for k, v in component_metrics(images).items()},
                                  "threshold": marked[label].thresholds[score]["objects"]}
            if tally.of_fold:
                row["open"] = open_metrics(marked[label], score)
            if args.operating_point:
                t = calibrated[args.operating_point][label][score]
                row["operating_point"] = dict(threshold=t, delta=delta(score, t, args.views),
                                              **(dict(recall=None, fpr=None) if t is None else
                                                 tally.histograms[score].rates(t)))
            rows.append(row)
    return rows


def open_metrics(marked, score):
    """open-mIoU in percent over both folds, weighted by their images, and of each; IoU of the anomaly; open-mIoU of all
    images at the threshold of the validation images. None where no anomaly of the other fold tells a threshold."""
    at, rounded = marked.thresholds[score], lambda v: v if v is None else round(v, 4)
    of_fold = [(None, None) if at["open"][1 - k] is None else open_miou(marked.confusion[score, k]) for k in (0, 1)]
    images = np.bincount(marked.folds, minlength=2)
    miou, iou = (None if None in v else float(np.average(v, weights=images)) for v in zip(*of_fold))
    calibrated = None if at["val"] is None else open_miou(marked.confusion[score, "val"])[0]
    return dict(miou=rounded(miou), fold_0=rounded(of_fold[0][0]), fold_1=rounded(of_fold[1][0]),
                iou_anomaly=rounded(iou), miou_val=rounded(calibrated),
                threshold_0=at["open"][1], threshold_1=at["open"][0], threshold_val=at["val"])


def delta(score, t, views):
    """δ of Eq. 2, max S ≤ δ, for the threshold t of a score that is log(1 − max S); None for another, and for the mean
    of such a score over views, or resampled."""
    plain = score in LOG_1_MINUS_MAX_S and [[*size, *of] for size, *of in views] == [[1, 1, False]]
    return -math.expm1(t) if plain and t is not None else None


def report(tables):
    """Print one table of {data set: dict(protocol, rows)}: ours first, then the paper's, marked as such."""
    several = len(tables) > 1
    width = max(12, *(len(r["model"]) for table in tables.values() for r in table["rows"]))
    names = max(map(len, tables)) if several else 0
    start = lambda name, model, score: f"{name:{names}} " * several + f"{model:{width}} {score:8}"
    for name, table in tables.items():
        told = {k: v for k, v in table["protocol"].items() if k not in ("class_ids", "checkpoints", "fpr95")}
        print("\nprotocol: " + " · ".join(f"{k} {v}" for k, v in told.items()))
        if table["protocol"]["base_rate_per_image"] is not None:
            print(f"base line: a constant score has AUPR {told['base_rate_per_image']} per image, "
                  f"{told['base_rate']} pooled")
    print(f"\n{start('', '', '')}  pooled                        per-image mean\n"
          f"{start('data' * several, 'model', 'score')} "
          "  AUPR   AUROC  FPR95 (first)    AUPR   AUROC  FPR95 (first)    mIoU  pixel acc.")
    for name, table in tables.items():
        kept = table["protocol"]["pixels"] - table["protocol"]["ignored_pixels"]
        side = "no pixel counts" if not kept else \
            "no anomalous pixel" if not table["protocol"]["base_rate"] else "no negative pixel"
        for r in table["rows"]:
            cells = []
            for m, lacking in ((r["pooled"], side),
                               (r["per_image"], side if not r["pooled"] else "no image holds both")):
                cells.append(f"{m['aupr']:6.2f}  {m['auroc']:6.2f} {m['fpr95']:6.2f} ({m['fpr95_first']:5.2f})" if m
                             else f"{lacking:30}")
            print(f"{start(name, r['model'], r['score'])} {'  '.join(cells)}  "
                  f"{cell(r['miou'], 6)} {cell(r['pixel_accuracy'], 7)}")
    report_more([(start(name, r["model"], r["score"]), r) for name, table in tables.items() for r in table["rows"]])
    for name, table in tables.items():
        if table["protocol"]["data"] in PAPER_ROWS:
            print("\nthe paper's numbers (Table II, III; presumably means over the images, as in the CAOS code):")
            for method, aupr, auroc, fpr in PAPER_ROWS[table["protocol"]["data"]]:
                print(f"  paper  {method:40} {aupr:6.1f} {auroc:6.1f} {fpr:6.1f}")
        told = [f"{c} {v:.1f}" for c, v in table["rows"][0]["iou"].items() if v is not None]
        print(f"per class IoU{f', {name}' * several}: " + (", ".join(told) or "no pixel of a known class"))
    print(flush=True)


def cell(value, width, digits=2):
    """A number of a table, or a dash for None."""
    return f"{'–' if value is None else value if isinstance(value, int) else f'{value:.{digits}f}':>{width}}"


def report_more(rows):
    """Print the metrics beyond the paper's of [(beginning of the line, row)], a table each."""
    for key, title in (
            ("objects", "objects (SegmentMeIfYouCan) at the threshold of the best F1 of pixels"),
            ("open", "open set (DenseHybrid): mIoU of a fold at the other's threshold of 95 % recall; validation's"),
            ("operating_point", "operating point: flagged are scores of at least the threshold, or max S ≤ delta")):
        having = [(begin, r[key]) for begin, r in rows if key in r]
        if having:
            print(f"\n{title}\n{'':{len(having[0][0])}} {' '.join(f'{k:>13}' for k in having[0][1])}")
            for begin, values in having:
                digits = [{"threshold": 5, "delta": 9}.get(k.partition("_")[0], 2) for k in values]
                cells = (cell(v, 13, n) for v, n in zip(values.values(), digits))
                print(f"{begin} {' '.join(cells)}")


def check_writable(out):
    """InputError before the work, not after it, where its results could not be written. Makes the folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as e:
        raise common.InputError(f"--out {out}: cannot be written: {e.strerror}; expected a folder with room")


def own_picture(path):
    """Whether a file is an image that this script wrote."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == MARK
    except Exception:   # whatever a damaged file makes Pillow raise
        return False


def own_file(path):
    """Whether a file in a folder of photographs is a result of this script."""
    path = Path(path)
    if path.name.endswith("_score.npy"):
        path = path.with_name(path.name.removesuffix("_score.npy") + "_anomaly.png")
    return path.name == "results.json" or own_picture(path)


def remove_earlier(out, evaluation):
    """A folder holds one run: remove an earlier one's overlays and, for an evaluation, its results."""
    earlier = [p for p in out.iterdir() if p.is_file() and p.name.endswith(PHOTOGRAPH) and own_file(p)]
    if evaluation:                                       # of a link the target, which common.replacing() writes
        names = "results.json", *(f"{figure}.png" for figure in FIGURES)
        earlier += [(out / name).resolve() for name in names if (out / name).is_file()]
        earlier += [p.resolve() for figure in FIGURES for p in out.glob(f"{figure}_*.png") if own_picture(p)]
    for path in earlier:
        path.unlink(missing_ok=True)                     # a photograph panels_1.jpg has an overlay called like a figure


# ──────────────────────────────────────────────── figures ────────────────────────────────────────────────

def pyplot():
    """matplotlib.pyplot, imported where it is needed and without a display."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False   # a checkpoint may be called a$^$.pt
    import matplotlib.pyplot as plt
    return plt


def save_figure(fig, path):
    """As a PNG with this script's mark."""
    with common.replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png", bbox_inches="tight", metadata={"Software": MARK})
    pyplot().close(fig)


def class_colours(N):
    """uint8 (256, 3): a colour for each class, sky blue for anomalies (as in Fig. 3), white for ignored pixels, grey
    for known ones of no told class."""
    colours = np.full((256, 3), 255, np.uint8)
    name, places = ("tab20", np.arange(N)) if N <= 20 else ("nipy_spectral", np.linspace(0, 1, N))
    colours[:N] = (pyplot().get_cmap(name)(places)[:, :3] * 200).astype(np.uint8)
    colours[common.ANOMALY] = (0, 191, 255)
    colours[common.KNOWN] = 150
    return colours


@torch.inference_mode()
def panel_maps(models, scores, scenes, chosen, name, args, device):
    """{(index, label): the anomaly map (H, W)} and the ends of one colour scale for all of them.

    Scores that are log(1 − max S) are drawn as 1 − max S, in [0, 1 − 1/N]; others between percentiles 1 and 99."""
    maps = {}
    for i in chosen:
        X = common.to_input(scenes[i]["image"][None], device)
        for label, fs in models.items():
            maps[i, label] = image_maps(fs, X, i, {name: scores[label][name]}, args.views)[0]
    if name in LOG_1_MINUS_MAX_S:
        N = next(iter(models.values()))[0].num_classes
        return {k: np.exp(v) for k, v in maps.items()}, 0, 1 - 1 / N
    low, high = np.percentile(np.concatenate([m.ravel() for m in maps.values()]), (1, 99))
    return maps, float(low), float(high)


def draw_panels(models, scores, scenes, chosen, name, args, device, path):
    """Fig. 3: a row for each image: the image, its label, the anomaly map of every model on one scale."""
    plt = pyplot()
    maps, low, high = panel_maps(models, scores, scenes, chosen, name, args, device)
    colours = class_colours(next(iter(models.values()))[0].num_classes)
    H, W = scenes[chosen[0]]["label"].shape
    size = 3 * (2 + len(models)) + 0.8, 3 * H / W * len(chosen) + 0.3
    fig, axes = plt.subplots(len(chosen), 2 + len(models), squeeze=False, layout="constrained", figsize=size)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, i in zip(axes, chosen):
        item = scenes[i]
        row[0].imshow(item["image"].permute(1, 2, 0))
        row[1].imshow(colours[item["label"].numpy()])
        for cell, label in zip(row[2:], models):
            drawn = cell.imshow(maps[i, label], vmin=low, vmax=high, cmap="viridis")
    for cell, title in zip(axes[0], ("image", "label (anomaly: sky blue)", *models)):
        cell.set_title(title, fontsize=9)
    for cell in axes.flat:
        cell.axis("off")
    label = "1 − max softmax" if name in LOG_1_MINUS_MAX_S else name
    fig.colorbar(drawn, ax=axes, label=label, fraction=0.03, pad=0.01)
    save_figure(fig, path)


def draw_threshold(top_counts, path):
    """Fig. 4: semantic and anomaly accuracy against δ, from {label: Tally.top_counts}. ASSUMPTION: semantic accuracy
    is the share of the known pixels that are classified right and not flagged; the paper gives no formula."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    delta = np.arange(1001) / 1000
    for k, (label, counts) in enumerate(top_counts.items()):
        below = counts.cumsum(1)                                     # pixels with max S ≤ δ: flagged (Eq. 2)
        right, known, anomalous = counts.sum(1)
        if known:
            ax.plot(delta, 100 * (right - below[0]) / known, color=f"C{k}", label=f"semantic accuracy: {label}")
        if anomalous:
            ax.plot(delta, 100 * below[2] / anomalous, color=f"C{k}", ls="--", label=f"anomaly accuracy: {label}")
    ax.set(xlabel="threshold δ (Eq. 2)", ylabel="accuracy (%)", xlim=(0, 1), ylim=(0, 100))
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(fontsize=7)
    save_figure(fig, path)


def draw_curves(rows, curves, path):
    """Precision-recall and ROC curves (ScoreHistogram.curve) of the pooled pixels, every row of the table in one axes.

    A colour for each score and a line style for each model; with one score, a colour for each model."""
    plt = pyplot()
    fig, (pr, roc) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels, scores = (list(dict.fromkeys(row[k] for row in rows)) for k in ("model", "score"))
    highest = 0.01
    for row, (recall, precision, fpr) in zip(rows, curves):
        m, s = labels.index(row["model"]), scores.index(row["score"])
        style = dict(color=f"C{s}", ls=("-", "--", ":", "-.")[m % 4]) if len(scores) > 1 else dict(color=f"C{m}")
        label = f"{row['model']}, {row['score']}"
        highest = max(highest, precision[recall > 0.02].max())   # the first few pixels may have any precision
        pr.plot(recall, precision, **style, label=f"AUPR {row['pooled']['aupr']:.1f}: {label}")
        roc.plot(fpr, recall, **style, label=f"AUROC {row['pooled']['auroc']:.1f}: {label}")
    pr.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, min(1, 1.2 * highest)))
    roc.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))
    roc.axhline(0.95, color="grey", lw=0.6, ls=":")
    for ax in (pr, roc):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    save_figure(fig, path)


# ─────────────────────────────────────────────── photographs ───────────────────────────────────────────────

def find_photographs(paths):
    """({file: name of its results}, {file: why it cannot be read}) of photographs and folders, sub-folders included.

    Left out are hidden files and results of this script. The name of a file in a sub-folder begins with that folder's.
    Raises InputError for two photographs of one name, and for none."""
    found = {}
    for given in paths:
        if not os.path.isdir(given):
            if not own_file(given):
                found[given] = Path(given).stem
            continue
        for file in sorted(common.walk(given)):
            if not own_file(file):
                found[file] = "_".join(Path(file).relative_to(given).with_suffix("").parts)
    if not found:
        raise common.InputError(f"{', '.join(paths)}: no photographs; expected image files")
    first, unread = {}, {}
    for file, name in found.items():
        try:
            Image.open(file).close()
        except FileNotFoundError:
            unread[file] = f"{file}: no such file"
        except Exception as e:   # whatever a damaged file makes Pillow raise
            unread[file] = f"{file}: cannot be read as an image: {str(e) or type(e).__name__}"
        else:
            if name in first:
                raise common.InputError(f"{first[name]} and {file}: two photographs whose results would have one name, "
                                        f"{name}; expected different names")
            first[name] = file
    return {file: name for name, file in first.items()}, unread


TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}   # by the value of EXIF's tag "orientation"


def upright(path):
    """A photograph as uint8 (H, W, 3), turned as its EXIF orientation says, if that can be read. InputError as of
    common.read_image."""
    pixels, turn = common.read_image(path), None
    with contextlib.suppress(Exception), warnings.catch_warnings():   # struct.error and others, by Pillow's version
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            turn = TURNS.get(image.getexif().get(0x0112))
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


@torch.inference_mode()
def photograph_maps(models, pixels, scores, args, device):
    """(score float32, predicted class uint8), (H, W) each, of pixels (H, W, 3) that f sees at --max-side.

    Classes are upsampled one at a time: all N at once would take N float32 maps of the photograph's size."""
    H, W = pixels.shape[:2]
    shrink = min(1, args.max_side / max(H, W))
    if shrink < 1:
        size = [max(32, round(shrink * s)) for s in (W, H)]
        seen = np.array(Image.fromarray(pixels).resize(size, Image.LANCZOS))
    else:
        seen = pixels
    X = common.to_input(torch.from_numpy(seen).permute(2, 0, 1)[None], device)
    maps, log_S = anomaly_scores(models, X, 0, scores)
    score, = maps.values()
    if not torch.isfinite(score).all():
        raise common.InputError("non-finite anomaly score")
    own = lambda t: nn.functional.interpolate(t, (H, W), mode="bilinear", align_corners=False)[0, 0]
    best = own(log_S[:, :1])
    predicted = torch.zeros(H, W, dtype=torch.uint8, device=device)
    for c in range(1, log_S.shape[1]):
        value = own(log_S[:, c:c + 1])
        predicted[value > best] = c
        torch.maximum(best, value, out=best)
    return own(score[None]).cpu().numpy(), predicted.cpu().numpy()


def save_overlays(out, stem, pixels, score, predicted, name, N):
    """out/STEM_anomaly.png, STEM_classes.png, STEM_score.npy of pixels uint8 (H, W, 3) and their maps (H, W).

    The overlays are mixed in uint8: a photograph may have 100 megapixels."""
    if name in LOG_1_MINUS_MAX_S:
        share = np.exp(score) / (1 - 1 / N)                        # (1 − max S) of its largest value
    else:
        share = (score - score.min()) / max(float(np.ptp(score)), 1e-9)
    viridis = (255 * pyplot().get_cmap("viridis")(np.arange(256))[:, :3]).round().astype(np.uint8)
    levels = (255.999 * share.clip(0, 1)).astype(np.uint8)
    mark = PngInfo()
    mark.add_text("Software", MARK)
    photo = Image.fromarray(pixels)
    for suffix, table, index, weight in (("_anomaly.png", viridis, levels, 0.6),
                                         ("_classes.png", class_colours(N), predicted, 0.5)):
        with common.replacing(out / f"{stem}{suffix}") as temporary:
            Image.blend(photo, Image.fromarray(table[index]), weight).save(temporary, "PNG", pnginfo=mark)
    with common.replacing(out / f"{stem}_score.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, score)


def photographs(models, classes, args, device, out):
    """For each photograph NAME: NAME_anomaly.png and NAME_classes.png (overlays at its own size), NAME_score.npy.

    Raises InputError at the end, with a line for each file that could not be read or scored."""
    warnings.filterwarnings("ignore", module="PIL")   # its remarks on odd files: what cannot be read is listed
    files, failed = find_photographs(args.images)
    name, N = args.score[0], len(classes)
    originals = {os.path.realpath(p) for p in files}
    for result in (out / f"{stem}{suffix}" for stem in files.values() for suffix in PHOTOGRAPH):
        if os.path.realpath(result) in originals:
            raise common.InputError(f"{result}: a photograph, which a result would replace; expected another --out")
    scores = prepare_scores(models, [name], args, device)
    if files:
        remove_earlier(out, evaluation=False)
    for path, stem in common.progress(files.items(), "photographs"):
        try:
            pixels = upright(path)
            score, predicted = photograph_maps(models, pixels, scores, args, device)
        except common.InputError as e:
            failed[path] = str(e) if str(e).startswith(str(path)) else f"{path}: {e}"
            continue
        try:
            save_overlays(out, stem, pixels, score, predicted, name, N)
        except OSError as e:
            if e.errno != errno.ENAMETOOLONG:
                raise
            failed[path] = f"{path}: its name is too long for {', '.join(PHOTOGRAPH)} behind it"
            continue
        seen = np.bincount(predicted.ravel(), minlength=N)
        most = ", ".join(f"{classes[c]} {100 * seen[c] / predicted.size:.0f} %" for c in seen.argsort()[::-1][:3])
        common.say(f"{path}: {pixels.shape[1]}×{pixels.shape[0]}, {name} from {score.min():.3f} to {score.max():.3f}; "
                   f"mostly {most}")
    done = len(files) - sum(path in failed for path in files)
    if done:
        common.say(f"wrote {out}: {done} photographs, each {', '.join(PHOTOGRAPH)}")
    if failed:
        start = f"{len(failed)} of {done + len(failed)} files were not done:\n    " if done + len(failed) > 1 else ""
        raise common.InputError(start + "\n    ".join(failed.values()))


# ──────────────────────────────────── scores of the related systems ────────────────────────────────────

def system_flags(p):
    """Their flags. Which score reads which, and its default: SCORE_FLAGS."""
    g = p.add_argument_group("related systems that read the embedding or the weights")
    g.add_argument("--knn-k", type=common.whole(),
                   help="neighbours of --score knn and cknn (published: 3, the default)")
    g.add_argument("--knn-layer", choices=("embedding", "4", "8", "16", "32"),
                   help="what they compare: the embedding before its activation, or the backbone's map at a stride, of "
                   "--arch fpn and mask2former (ours: embedding)")
    g.add_argument("--knn-images", type=common.whole(),
                   help="training images that the references come from (published: 500, the default)")
    g.add_argument("--knn-vectors", type=common.whole(),
                   help="reference vectors at most (published: 100000, the default)")
    g.add_argument("--knn-chunk", type=common.whole(), help="cells compared at once, which bounds the memory: 4 · "
                   "CHUNK · VECTORS bytes (default: 1024: 0.4 GB)")
    g.add_argument("--student", metavar="CKPT", help="--score dicnet: checkpoint of finetune.py --distill "
                   "(default: none)")
    g.add_argument("--tradi", type=common.whole(), metavar="N", help="an ensemble of N samples of the weights that "
                   "pretrain.py --tradi tracked, in place of each --ckpt (default: none)")
    g.add_argument("--bn-images", type=common.whole(2),
                   help="training images from which --tradi re-estimates batch norm (ours: 500)")
    g.add_argument("--train-root", metavar="FOLDER", help="knn, cknn, --tradi, --queries-from a split, --open, "
                   "--operating-point: folder of the data that f was trained on (default: the checkpoint's)")
    g = p.add_argument_group("scores of a mask network (--arch mask2former), and SynthCP's")
    g.add_argument("--refine", nargs="+", metavar="CLASS", help="--score maxlogit, Mask2Anomaly's: 0 inside the masks "
                   "of these classes, if at least two queries have one of them with s > 0.95 (default: off)")
    g.add_argument("--queries-from", metavar="PLACE", help="--score maskomaly: find the queries whose masks are "
                   "anomalies on a folder of mgu_generate.py (its D_s), or on this split of the checkpoint's data, "
                   "which must hold anomalies and not be evaluated itself (default: rejection alone)")
    g.add_argument("--ground", metavar="CLASS", help="with --queries-from: and the two of this class, road for "
                   "instance, which are no anomaly (default: none)")
    g.add_argument("--lambda", dest="lam", type=common.real(0), metavar="λ", help="with --queries-from: share of the "
                   "rejection, at most 1 (default: 0.6, as published)")
    g.add_argument("--border", type=common.real(0), help="--score maskomaly: rejection is 0 where two masks exceed "
                   "this, their common border (as published: 0.1; default: 0, off)")
    g.add_argument("--generator", help="--score synthcp: checkpoint of finetune.py --synthesis (no default)")
    g.add_argument("--synthcp-threshold", type=common.real(0), help="--score synthcp: compare with the synthesis where "
                   "max S is not above this (default: 0.999, of the public code)")


SCORE_FLAGS = {   # flag: (the scores that read it, its default, whether they need it)
    "passes": ("dropout", 10, False), "crf_iterations": ("crf", 10, False),
    "knn_k": ("knn cknn", 3, False), "knn_layer": ("knn cknn", "embedding", False),
    "knn_images": ("knn cknn", 500, False), "knn_vectors": ("knn cknn", 100_000, False),
    "knn_chunk": ("knn cknn", 1024, False), "student": ("dicnet", None, True), "refine": ("maxlogit", None, False),
    "queries_from": ("maskomaly", None, False), "ground": ("maskomaly", None, False), "lam": ("maskomaly", 0.6, False),
    "border": ("maskomaly", 0.0, False), "generator": ("synthcp", None, True),
    "synthcp_threshold": ("synthcp", 0.999, False)}


def check_system_flags(p, args):
    """Fills the defaults in; a usage message where a flag is without effect, or missing."""
    for name, (scores, default, needed) in SCORE_FLAGS.items():
        flag = "--lambda" if name == "lam" else f"--{name.replace('_', '-')}"
        given, read = getattr(args, name) is not None, bool(set(scores.split()) & set(args.score))
        if given and not read:
            p.error(f"argument {flag}: without effect on --score {' '.join(args.score)}; it is for {scores}")
        if given and name in ("ground", "lam") and not args.queries_from:
            p.error(f"argument {flag}: without effect; it is for maskomaly with --queries-from")
        if needed and read and not given:
            p.error(f"argument {flag}: --score {scores} needs it")
        if not given:
            setattr(args, name, default)
    if args.lam > 1:
        p.error("argument --lambda: expected a share of at most 1")
    if args.bn_images and not args.tradi:
        p.error("argument --bn-images: without effect; it is for --tradi")
    if args.train_root and not ({"knn", "cknn"} & set(args.score) or args.tradi or args.open or args.operating_point
                                or args.queries_from in common.SPLITS):
        p.error("argument --train-root: without effect; it is for knn, cknn, --tradi, --queries-from a split, --open "
                "and --operating-point")
    for score in {"dicnet", "synthcp"} & set(args.score) if args.tradi else ():
        p.error(f"argument --tradi: --score {score} belongs to one f, and not to samples of it")
    args.bn_images = args.bn_images or 500


# The outlier head: DenseHybrid, noisy negatives

def score_outlier(name, seen):
    """Scores of the outlier logit d: P(outlier) = σ(d), of an ensemble the mean. Each from logarithms, never from a
    probability, which in float32 is 0 where d < −104 and 1 where d > 17, and ties.

    outlier      log σ(d) (noisy negatives, Bevandić et al., GCPR 2019)
    outlier_msp  log(1 − P(inlier) · max_i S_i) = log(σ(d) + σ(−d) (1 − max_i S_i))
    hybrid       log σ(d) − log Σ_i exp z_i (DenseHybrid, Grcić et al., ECCV 2022); z of an ensemble: the mean"""
    d = torch.stack([o["outlier"].float() for o in seen["each"]])                 # (models, B, H, W)
    log_outlier, log_inlier = (nn.functional.logsigmoid(v).logsumexp(0) - math.log(len(d)) for v in (d, -d))
    if name == "outlier_msp":
        return torch.logaddexp(log_outlier, log_inlier + score_msp(seen["mixture"]))
    return log_outlier + score_energy(seen["logits"]) if name == "hybrid" else log_outlier


def make_outlier(name, fs, args, device):
    """A score of the outlier head. Raises InputError for a model without one."""
    without = next((f for f in fs if f.outlier is None), None)
    if without:
        raise common.InputError(f"{without.origin[0]}: no outlier head, which --score {name} reads; expected "
                                "checkpoints of finetune.py --gamma, or of a --method with one")
    return lambda X, seen, index: score_outlier(name, seen)


# Mask networks. What one said of an image: p (B, Q, N + 1), the last class ∅; m (B, Q, H, W), the probability of a
# pixel to belong to the mask of query q. s_q = max_c p_q(c), ∅ too; c_q = arg max. What msp, entropy, maxlogit and
# energy read of it are its `logits`, which are log p̂ (log_mixture in common.py).

def masks_of(output, size):
    """(p, m) of the f.outputs(X) of a mask network, m at the size of the image. InputError for another network."""
    if "sets" not in output:
        raise common.InputError("--score maskomaly, --refine: expected checkpoints of --arch mask2former")
    classes, masks = output["sets"][-1]
    return classes.softmax(2), common.upsample(masks, size).sigmoid()


def strongest(weight, m):
    """max_q weight_q m_q: (B, Q), (B, Q, H, W) → (B, H, W); 0 where no query has a weight."""
    return (weight[..., None, None] * m).amax(1)


def refine(score, p, m, classes):
    """Mask2Anomaly's refinement (Rai et al., ICCV 2023, Sec. 3.4) of −max_c log p̂_c (B, H, W): 0 where a query of
    these classes with s_q > 0.95 has s_q m_q ≥ 1/2, if at least two are so sure; else the score. That is the order of
    the publication's a · R, a = 1 − max p̂, and as there 0 is the lowest score only where max p̂ ≤ 1 elsewhere.
    DEVIATION: with --tta each view is refined, and the mean is that of −log max p̂ (theirs: of a, then refined)."""
    s, c = p.max(2)
    sure = (s > 0.95) & torch.isin(c, torch.tensor(classes, device=c.device))                # (B, Q)
    inside = (strongest(s * sure, m) >= 0.5) & (sure.sum(1) >= 2).view(-1, 1, 1)
    return torch.where(inside, 0.0, score)


def score_maskomaly(p, m, anomaly=(), ground=(), lam=0.6, border=0.0):
    """Maskomaly (Ackermann et al., BMVC 2023): λ · A_rej + (1 − λ) · A_anom, (B, H, W) in [0, 1].

    A_rej = 1 − max {s_q m_q: c_q ≠ ∅, s_q > 0.7}; 0 where two masks of classes exceed `border`; at most what the
    `ground` queries leave. A_anom = max s_q m_q of the `anomaly` queries. Without any: A_rej alone.
    ASSUMPTION: the border is off unless asked for: it zeroes small anomalies at the edge of two masks."""
    s, c = p.max(2)
    of_class = c < p.shape[2] - 1
    rejected = 1 - strongest(s * (of_class & (s > 0.7)), m)
    if border:
        two = ((m > border) & of_class[..., None, None]).sum(1) >= 2
        rejected = torch.where(two, 0.0, rejected)
    if len(ground):
        rejected = torch.minimum(rejected, 1 - strongest(s[:, ground], m[:, ground]))
    if not len(anomaly):
        return rejected
    return lam * rejected + (1 - lam) * strongest(s[:, anomaly], m[:, anomaly])


def labelled_anomalies(place, checkpoint, root):
    """Yields (image uint8 (3, H, W), label (H, W), anomalous (H, W) bool) of a folder of mgu_generate.py, where D_s is
    the anomaly, or of a split of the checkpoint's data, in the folder `root` if it is given."""
    if place in common.SPLITS:
        for item in own_split(checkpoint, root, place):
            yield item["image"], item["label"], item["label"] == common.ANOMALY
    else:
        manifest = common.load_manifest(place, "--queries-from; or one of train, val, test")
        if manifest.get("classes", checkpoint["classes"]) != checkpoint["classes"]:
            raise common.InputError(f"{Path(place, 'manifest.json')}: of other classes than the checkpoint has, or in "
                                    "another order; expected a set of its data")
        for name in manifest["samples"]:
            sample = {k: torch.from_numpy(v) for k, v in common.load_sample(Path(place) / name).items()
                      if k in ("image", "label", "unknown")}
            yield sample["image"].permute(2, 0, 1), sample["label"], sample["unknown"]


def rank_queries(f, items, device, ground=None):
    """(anomaly queries, ground queries), {query: mean IoU, in [0, 1]}: at most four and two, those with the largest
    mean IoU of {m_q > 0.9} with the anomaly and with class `ground` (None: no ground query) over the images that hold
    it, and none whose mask never meets it (published: the best four, or all of at least 0.25). `items`: of
    labelled_anomalies()."""
    found = dict(anomaly=[], ground=[])
    for image, Z, anomalous in items:
        X = common.to_input(image[None], device)
        mine = masks_of(f.outputs(X), X.shape[-2:])[1][0].cpu() > 0.9                        # (Q, H, W)
        valid = (Z != common.IGNORED) | anomalous
        for name, mask in (("anomaly", anomalous), ("ground", torch.zeros_like(anomalous) if ground is None
                                                    else (Z == ground) & ~anomalous)):
            if mask.any():
                found[name].append((mine & mask).sum((1, 2)) / ((mine | mask) & valid).sum((1, 2)))

    def best(ious, n):
        mean, order = torch.stack(ious).mean(0).sort(descending=True) if ious else ((), ())
        return {int(q): float(iou) for iou, q in zip(mean[:n], order[:n]) if iou > 0}
    return best(found["anomaly"], 4), best(found["ground"], 2)


def make_mask_score(name, fs, args, device):
    """score(X, seen, index) of --score maskomaly and of maxlogit with --refine."""
    each = lambda X, seen: [masks_of(o, X.shape[-2:]) for o in seen["each"]]
    if name == "maxlogit":
        of = common.load_checkpoint(args.ckpt[0])[1]["classes"]
        classes = common.class_indices(args.refine, of, "--refine")
        return lambda X, seen, index: torch.stack([refine(score_maxlogit(o["logits"]), *pm, classes)
                                                   for o, pm in zip(seen["each"], each(X, seen))]).mean(0)
    queries = [((), ())] * len(fs)
    if args.queries_from:
        checkpoint = common.load_checkpoint(args.ckpt[0])[1]
        ground = common.class_indices([args.ground], checkpoint["classes"], "--ground")[0] if args.ground else None
        queries = []
        for f in fs:
            found = rank_queries(f, labelled_anomalies(args.queries_from, checkpoint, args.train_root), device, ground)
            if not found[0]:
                raise common.InputError(f"{args.queries_from}: no anomalous pixel in the mask of any query; expected "
                                        "images that hold anomalies")
            told = [", ".join(f"{q} (IoU {iou:.2f})" for q, iou in part.items()) for part in found]
            common.say(f"maskomaly: anomaly queries {told[0]}; ground queries {told[1] or 'none'}; of "
                       f"{args.queries_from}")
            queries.append(tuple(list(part) for part in found))
    return lambda X, seen, index: torch.stack([score_maskomaly(*pm, *q, args.lam, args.border)
                                               for pm, q in zip(each(X, seen), queries)]).mean(0)


def companion(path, stage, fs, device):
    """The network of finetune.py --distill or --synthesis. InputError where it was made for another checkpoint than
    one of fs."""
    net, checkpoint = common.load_checkpoint(path, companion=stage)
    for of, own in (f.origin for f in fs):
        if checkpoint["companion_of"] != own["fingerprint"]:
            raise common.InputError(f"{path}: made for another checkpoint ({checkpoint['companion_of']}) than {of} "
                                    f"({own['fingerprint']}); run finetune.py --{stage} --ckpt {of}")
    return net.to(device).requires_grad_(False)


def score_synthcp(log_S, a, b, threshold=0.999):
    """SynthCP's comparison (Xia et al., ECCV 2020; public code): 1 − max S where max S exceeds the threshold, elsewhere
    1 − cos of f's features of the image and of its synthesis. log_S (B, N, H, W); a, b (B, C, h, w) → (B, H, W) in
    [0, 2]. The published score is this one less 1: the same order, but with ties in float32."""
    doubt = score_msp(log_S).exp()                                                       # 1 − max S, without rounding
    alike = common.upsample(nn.functional.cosine_similarity(a, b, dim=1)[:, None], doubt.shape[-2:]).squeeze(1)
    return torch.where(doubt < 1 - threshold, doubt, 1 - alike)


def make_synthcp(name, fs, args, device):
    """score(X, seen, index) of --score synthcp: x̂ = G(arg max f(X)), compared with X in the activated embedding.

    ASSUMPTION: the embedding, where the public code has PSPNet's pooled maps, at one scale in place of five."""
    f, G = fs[0], companion(args.generator, "synthesis", fs, device)

    def score(X, seen, index):
        image = G(common.one_hot(seen["logits"].argmax(1), f.num_classes))
        a, b = (f.activation(e) for e in (seen["each"][0]["embedding"], f.embed(image)))
        return score_synthcp(seen["log_S"], a, b, args.synthcp_threshold)
    return score


# Scores of the embedding: the mean over the models of a map (B, h, w), brought to full size bilinearly.

def full_size(maps, X):
    """The mean (B, H, W) of a map (B, h, w) of every model, at the size of X."""
    return torch.stack([common.upsample(m[:, None], X.shape[-2:])[:, 0] for m in maps]).mean(0)


def make_cosine(name, fs, args, device):
    """PAnS (Fontanel et al., CVPR Workshops 2021): (1 − max_i cos(x, w_i)) / 2 in [0, 1].

    As published the maximum is taken on the map of the embedding and then upsampled: not the order of maxlogit, whose
    logits are upsampled first. Raises InputError for a model with another classifier."""
    for f in fs:
        if not isinstance(f.classifier, common.CosineClassifier):
            raise common.InputError(f"{f.origin[0]}: --score cosine expects a checkpoint of pretrain.py --classifier "
                                    "cosine or finetune.py --prototypes")

    def cosine(X, seen, index):
        maps = []
        for f, outputs in zip(fs, seen["each"]):
            z = f.classifier(f.activation(outputs["embedding"]))        # s · cos, (B, N, h, w)
            maps.append((1 - z.max(1).values / f.classifier.scale) / 2)
        return full_size(maps, X)
    return cosine


def knn_distance(queries, references, k=3, chunk=1024, skip=0):
    """Mean Euclidean distance (Q,) of queries (Q, C) to the k nearest of references (R, C), or to the next k after
    `skip`. Memory: chunk · R distances at once."""
    found = []
    for part in queries.split(chunk):
        nearest = torch.cdist(part, references).topk(k + skip, largest=False).indices            # (chunk, k + skip)
        # cdist has |a|² + |b|² − 2ab, whose rounding is large for near vectors: those few again, as differences
        exact = (part[:, None] - references[nearest]).norm(dim=2)
        found.append(exact.sort(1).values[:, skip:].mean(1))
    return torch.cat(found)


def knn_map(f, X, outputs, layer):
    """The map (B, C, h, w) to compare: the embedding before its activation, or a pyramid's from the backbone."""
    return (outputs["embedding"] if layer == "embedding" else f.maps(X)[layer]).float()


@torch.no_grad()
def knn_references(f, train_root, images, vectors, k, chunk, seed, device, layer="embedding"):
    """What knn and cknn compare with, from f's training images, the same on every rank: dict(vectors (R, C) float32,
    energy: its (lowest, highest) over all their pixels, farthest: the largest distance among the vectors themselves).

    As published: `images` at random, whole; `vectors` at random among the cells with a known class; the distance of a
    vector of at most 30000 to its k nearest among the others.
    ASSUMPTION: the layer (published: keys of a transformer); as many vectors from each image; the 30000 are references
    (published: of their own)."""
    scenes = own_split(f.origin[1], train_root, "train")
    chosen = np.random.default_rng(seed).permutation(len(scenes))[:min(images, vectors)].tolist()
    share, kept, low, high = vectors // len(chosen), [], math.inf, -math.inf
    with ThreadPoolExecutor(8 if device.type == "cuda" else 1) as readers:
        items = common.ahead(readers, scenes.__getitem__, chosen, count=16)
        for item in common.progress(items, "kNN references", total=len(chosen), leave=False):
            X = common.to_input(item["image"][None], device)
            seen = f.outputs(X)
            E = knn_map(f, X, seen, layer)[0]                                                    # (C, h, w)
            cells = np.flatnonzero(common.labels_at(item["label"], E.shape[1:]) < f.num_classes)
            cells = np.random.default_rng([seed, item["index"]]).permutation(cells)[:share]
            kept.append(E.flatten(1)[:, torch.from_numpy(cells).to(device)].T)
            energy = score_energy(seen["logits"])
            low, high = min(low, float(energy.min())), max(high, float(energy.max()))
    references = torch.cat(kept).contiguous()
    some = references[torch.from_numpy(np.random.default_rng(seed).permutation(len(references))[:30_000]).to(device)]
    if len(some) <= k:
        raise common.InputError(f"{len(references)} labelled vectors in {len(chosen)} images of {scenes.root}: too few "
                                f"for {k} neighbours; expected more --knn-images and --knn-vectors, or a --knn-k below "
                                "30000")
    farthest = float(knn_distance(some, some, k, chunk, skip=1).max())                           # itself left out
    return dict(vectors=references, energy=(low, high), farthest=farthest)


def make_knn(name, fs, args, device):
    """Dense kNN (Galesso et al., "Far away in the deep space: dense nearest-neighbor-based out-of-distribution
    detection", ICCV Workshops 2023), DNP: the distance d of a cell of the embedding to its k nearest references; "cknn"
    is cDNP, with the energy e: (e − e_min)/(e_max − e_min) + d/d_max. Raises InputError for a layer that f has not."""
    for f in fs:
        if args.knn_layer != "embedding" and f.arch not in common.PYRAMIDS:
            raise common.InputError(f"{f.origin[0]}: --knn-layer {args.knn_layer}: {f.arch} has no map of it; expected "
                                    "embedding")
    known = [knn_references(f, args.train_root, args.knn_images, args.knn_vectors, args.knn_k, args.knn_chunk,
                            args.seed, device, args.knn_layer) for f in fs]

    def distances(X, seen):
        """A map (B, h, w) of each model; made once for an image, for knn and cknn."""
        if "distances" not in seen:
            seen["distances"] = []
            for f, outputs, r in zip(fs, seen["each"], known):
                E = knn_map(f, X, outputs, args.knn_layer).movedim(1, -1)                        # (B, h, w, C)
                d = knn_distance(E.flatten(0, 2), r["vectors"], args.knn_k, args.knn_chunk)
                seen["distances"].append(d.view(E.shape[:3]))
        return seen["distances"]

    def knn(X, seen, index):
        return full_size(distances(X, seen), X)

    def cknn(X, seen, index):
        score = full_size([d / r["farthest"] for d, r in zip(distances(X, seen), known)], X)
        for outputs, r in zip(seen["each"], known):
            low, high = r["energy"]
            score = score + (score_energy(outputs["logits"]) - low) / (high - low) / len(known)
        return score
    return dict(knn=knn, cknn=cknn)


def make_dicnet(name, fs, args, device):
    """DiCNet (Zhou et al., "Anomaly discovery in semantic segmentation via distillation comparison networks", 2021):
    mean_c (T − S)² of the teacher's embedding T and the student's S."""
    student = companion(args.student, "distill", fs, device)

    def dicnet(X, seen, index):
        S, each = student.embed(X), [outputs["embedding"] for outputs in seen["each"]]
        return full_size([((T - common.upsample(S, T.shape[-2:]))**2).mean(1) for T in each], X)
    return dicnet


# Samples of the weights

def sample_tensor(mean, var, generator, D=10):
    """A draw w̃ of the weights of a tensor, float32 of the shape of mean and var: TRADI's

        w̃ = μ + √v · √(2/D) Σ_d cos(θ_d μ + b_d) ξ_d,    θ, ξ ~ N(0, 1), b ~ U(0, 2π),    all of size D

    random Fourier features of Cov(w̃_i, w̃_j) = √(v_i v_j) exp(−(μ_i − μ_j)²/2). They need one phase b_d for all
    weights of the tensor: with one for each weight, as the public code draws them, the covariance is diagonal. Weights
    differ by far less than 1, so that a draw moves all of a tensor by nearly the same multiple of √v.
    ASSUMPTION: the cosine is of μ (public code: of the last weights)."""
    theta, xi = torch.randn(2, D, generator=generator).to(mean)
    b = 2 * math.pi * torch.rand(D, generator=generator).to(mean)
    field = torch.zeros_like(mean)
    for d in range(D):
        field += torch.cos(theta[d] * mean + b[d]) * xi[d]
    return mean + var.clamp(min=0).sqrt() * math.sqrt(2 / D) * field


def tradi_samples(path, checkpoint, args, device):
    """[f, …]: args.tradi draws of the weights that pretrain.py --tradi tracked, with batch norm of their own."""
    if "tradi" not in checkpoint:
        raise common.InputError(f"{path}: no tracked weights; expected a checkpoint of pretrain.py --tradi")
    tracked, fs = checkpoint["tradi"], []
    for n in range(args.tradi):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + n) % 2**63)
        drawn = {name: sample_tensor(mean, tracked["var"][name], generator) for name, mean in tracked["mean"].items()}
        f = common.build(checkpoint)
        f.load_state_dict({**checkpoint["model"], **drawn})
        f.origin = path, checkpoint
        fs.append(f.to(device, memory_format=torch.channels_last).requires_grad_(False).eval())
    common.say(f"{path}: {args.tradi} samples of the weights; the tracked mean holds up to "
               f"{100 * tracked['first']:.0f} % of their first values")
    scenes = own_split(fs[0].origin[1], args.train_root, "train")
    chosen = np.random.default_rng(args.seed).permutation(len(scenes))[:args.bn_images]
    estimate_batch_norm(fs, scenes, chosen, device)
    return fs


@torch.no_grad()
def estimate_batch_norm(fs, scenes, chosen, device, batch=8):
    """Replace the running averages of batch norm of every f by the plain mean over one pass through chosen images.

    ASSUMPTION: whole images at their own size; of a batch of several sizes, what the smallest covers."""
    norms = [m for f in fs for m in f.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.train()
        m.momentum = None                                               # the cumulative average
    for part in common.progress(np.array_split(chosen, -(-len(chosen) // batch)), "batch norm", leave=False):
        images = [scenes[int(i)]["image"] for i in part]
        h, w = (min(image.shape[axis] for image in images) for axis in (1, 2))
        X = common.to_input(torch.stack([image[:, :h, :w] for image in images]), device)
        for f in fs:
            f(X)
    for m in norms:
        m.eval()


def scores_protocol(args, checkpoint):
    """What results.json says of the scores that have settings of their own, where one is used."""
    told = {}
    if "dropout" in args.score:
        told["dropout"] = dict(passes=args.passes, seed=args.seed)
    if "crf" in args.score:
        told["crf"] = dict(iterations=args.crf_iterations)
    if {"knn", "cknn"} & set(args.score) or args.tradi:
        told["training_images"] = own_split(checkpoint, args.train_root, "train").identity()
    if {"knn", "cknn"} & set(args.score):
        told["knn"] = dict(k=args.knn_k, images_at_most=args.knn_images, vectors_at_most=args.knn_vectors,
                           seed=args.seed, layer=args.knn_layer, upsampling="bilinear")
    if "dicnet" in args.score:
        told["student"] = common.fingerprint(args.student)
    if "maskomaly" in args.score:
        place = args.queries_from
        of = place if place is None or place in common.SPLITS else common.fingerprint(Path(place) / "manifest.json")
        told["maskomaly"] = dict(border=args.border, queries_from=of) | (
            dict(ground=args.ground, share_of_rejection=args.lam) if of else {})
    if args.refine:
        told["refine"] = args.refine
    if "synthcp" in args.score:
        told["synthcp"] = dict(generator=common.fingerprint(args.generator), threshold=args.synthcp_threshold)
    if args.tradi:
        told["tradi"] = dict(samples=args.tradi, bn_images_at_most=args.bn_images, seed=args.seed)
    return told


SCORES = {**dict.fromkeys(PLAIN, make_plain), "dropout": make_dropout, "crf": make_crf, "cosine": make_cosine,
          "knn": make_knn, "cknn": make_knn, "dicnet": make_dicnet, "maskomaly": make_mask_score,
          "synthcp": make_synthcp, **dict.fromkeys(("outlier", "outlier_msp", "hybrid"), make_outlier)}


# ───────────────────────────────────────────────── main ─────────────────────────────────────────────────

def main():
    args = parse()
    device = common.setup(args.device)
    out = Path(args.out)

    # Models, and photographs where there are any
    models, checkpoints = load_models(args, device)
    main_label, checkpoint = next(iter(models)), next(iter(checkpoints.values()))
    common.say(common.about_run(device, models[main_label][0]))
    if args.images:
        if common.rank() == 0:
            check_writable(out)
            with common.locked(out / "results.json"):
                photographs(models[main_label], checkpoint["classes"], args, device, out)
        return

    # Data and protocol
    opened = open_scenes(args, checkpoint)
    check_queries(args, opened, checkpoint)
    chosen = named_panels(args.panels, next(iter(opened.values())))
    for scenes in opened.values():
        ignored_labels(args, scenes, checkpoints)
    validation = {name: validation_scenes(scenes, checkpoint, args.train_root) for name, scenes in opened.items()
                  if args.operating_point or args.open and scenes.classes}
    if common.rank() == 0:
        check_writable(out)

    with common.locked(out / "results.json"):
        # Numbers; printed before anything is written
        scores = {label: prepare_scores(fs, args.score, args, device) for label, fs in models.items()}
        tables, thresholds = {}, {}
        for name, scenes in opened.items():
            if name in validation:
                val = validation[name]
                key = val.data, str(val.root)
                if key not in thresholds:
                    thresholds[key] = calibrate(models, scores, val, checkpoints, args, device)
            calibrated, told = thresholds[key] if name in validation else (None, None)
            tables[name] = assess(models, scores, scenes, checkpoints, calibrated, args, device)
            if told and tables[name]:
                tables[name]["protocol"]["thresholds"] = told
        if common.rank():
            return
        report(tables)

        # Files; the first row is also at the top
        remove_earlier(out, evaluation=True)
        several, protocols = len(tables) > 1, {name: table["protocol"] for name, table in tables.items()}
        rows = [{**({"data": name} if several else {}), **row} for name, t in tables.items() for row in t["rows"]]
        first = {k: rows[0][k] for k in ("pooled", "per_image", "miou", "pixel_accuracy", "iou")}
        common.save_json(out / "results.json",
                         dict(first, protocol=protocols if several else next(iter(protocols.values())),
                              environment=environment(device), rows=rows))

        # Figures
        for name, table in tables.items():
            panels, threshold, curves = (out / f"{figure}{f'_{name}' * several}.png" for figure in FIGURES)
            counts = table["counts"]
            picked = chosen if chosen is not None else \
                sorted(counts, key=lambda i: (-counts[i]["anomalous"], i))[:int(args.panels[0])]
            if picked:
                beside = {k: models[k] for k in [*list(models)[1:], main_label]}   # baselines first, as in Fig. 3
                draw_panels(beside, scores, opened[name], picked, args.score[0], args, device, panels)
            draw_threshold(table["top_counts"], threshold)
            if table["curves"]:
                draw_curves(table["rows"], table["curves"], curves)
        common.say(f"wrote {out}: results.json, figures")


if __name__ == "__main__":
    common.cli(main)
