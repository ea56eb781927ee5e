"""Stage 4 of 4: anomaly and semantic segmentation metrics, figures, and anomaly maps of your own photographs.

    in     one checkpoint (--ckpt; several are a Deep Ensemble), others to compare with (--baseline), a dataset
    out    results/results.json   the protocol and every number
           results/panels.png     image, label, anomaly maps (Fig. 3)
           results/threshold.png  semantic and anomaly accuracy against δ (Fig. 4)
           results/curves.png     precision-recall and ROC curves

    python evaluate.py --ckpt ft.pt --baseline pretrained.pt
    python evaluate.py --ckpt ft.pt --score msp entropy maxlogit energy dropout crf
    python evaluate.py --ckpt seed0.pt seed1.pt seed2.pt            # Deep Ensemble
    python evaluate.py --ckpt ft.pt --images photographs/           # no labels: overlays and raw scores
    torchrun --nproc-per-node 8 evaluate.py                         # the same numbers

Protocol (Sec. IV-B): anomalous pixels are the positives. ASSUMPTION: the paper does not say over what a metric is taken;
each is given pooled (all pixels of the split) and as the mean over the images that hold anomalous pixels (as the CAOS
code does, from which the baselines of Table II come).
"""
import argparse
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

import common

EXTRA_SCORES = ("dropout", "crf")
PAPER_ROWS = {   # AUPR, AUROC, FPR95 of Tables II and III
    "streethazards": [
        ("Dropout (AUROC, FPR95 possibly swapped)", 7.5, 79.4, 69.9), ("MSP (L_k only)", 6.6, 87.7, 33.7),
        ("MSP+CRF", 6.5, 88.1, 29.9), ("SynthCP", 9.3, 88.6, 28.4), ("TRADI", 7.2, 89.2, 25.3),
        ("Deep Ensemble", 7.2, 90.0, 25.4), ("MGU+AaFt (L_ER, pspnet)", 10.9, 89.5, 32.9),
        ("MGU+AaFt (L_KL, deeplabv3)", 13.2, 90.4, 34.0), ("MGU+AaFt (L_ER, deeplabv3)", 14.6, 92.2, 25.9)],
    "bdd": [
        ("Dropout", 6.5, 83.7, 33.4), ("MSP", 6.3, 84.2, 31.9), ("MSP+CRF", 8.2, 86.3, 26.0), ("TRADI", 5.6, 86.1, 26.9),
        ("Deep Ensemble", 6.0, 87.0, 25.0), ("MGU+AaFt (L_ER, deeplabv3)", 14.7, 91.5, 30.8)],
}


def parse():
    p = argparse.ArgumentParser(description="Evaluate anomaly segmentation (Sec. IV-B) and draw the paper's figures.",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    p.add_argument("--ckpt", nargs="+", default=["ft.pt"], help="checkpoint; several are a Deep Ensemble, the mean of their softmax (default: ft.pt)")
    p.add_argument("--baseline", nargs="+", default=[], metavar="CKPT", help="checkpoints to set beside it, each on its own (default: none)")
    p.add_argument("--out", default="results", help="folder of the results (default: results)")
    g = p.add_argument_group("data and protocol (Sec. IV-B)")
    g.add_argument("--data", choices=tuple(common.DATASETS), help="dataset (default: the checkpoint's)")
    g.add_argument("--root", help="folder of the dataset (default: the checkpoint's)")
    g.add_argument("--split", choices=common.SPLITS, default="test", help="images to evaluate on (default: test)")
    g.add_argument("--unlabeled", choices=("negative", "ignore"), default="negative", help="pixels without a known class, and "
                   "StreetHazards' background: negatives, as in the CAOS code, or left out (default: negative)")
    g.add_argument("--ignore-classes", nargs="+", metavar="CLASS", help="leave out the pixels of these classes (default: "
                   "those of finetune.py --known-unknown, Sec. IV-C)")
    g = p.add_argument_group("scores")
    g.add_argument("--score", nargs="+", choices=(*SCORES, *EXTRA_SCORES), default=["msp"], help="one or several: msp is the "
                   "paper's (Eq. 2); dropout and crf are baselines of Table II (default: msp)")
    g.add_argument("--passes", type=common.whole(2), default=10, help="forward passes of --score dropout (ours: 10)")
    g.add_argument("--crf-iterations", type=common.whole(), default=10, help="mean-field iterations of --score crf (CAOS: 100; ours: 10)")
    g.add_argument("--seed", type=common.whole(0), default=0, help="seed of the dropout masks (default: 0)")
    g = p.add_argument_group("figures")
    g.add_argument("--panels", nargs="+", default=["4"], metavar="N|NAME", help="the N images with the largest anomalies, or "
                   "images whose path ends in these names (default: 4; 0 for none)")
    g.add_argument("--images", nargs="+", metavar="PATH", help="photographs or folders of them: no metrics, overlays at their own size")
    g.add_argument("--max-side", type=common.whole(32), default=1280, help="photographs: pixels of the longer side as f sees it (ours: 1280)")
    g = p.add_argument_group("hardware")
    g.add_argument("--batch-size", type=common.whole(), default=8, help="images read ahead of f, which sees them one at a time (default: 8)")
    g.add_argument("--workers", type=common.whole(), help="threads that read them (default: 8 on CUDA, else 1)")
    g.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    return p.parse_args()


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
    log_S = common.log_softmax(logits)
    return -(log_S.exp() * log_S).sum(1)


def score_maxlogit(logits):
    """−max_i z_i (Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", ICML 2022)."""
    return -logits.float().max(1).values


def score_energy(logits):
    """−log Σ_i exp z_i (Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020)."""
    return -logits.float().logsumexp(1)


SCORES = dict(msp=score_msp, entropy=score_entropy, maxlogit=score_maxlogit, energy=score_energy)


def mean_softmax(logits):
    """log of the mean softmax of several logits [(B, N, H, W), …]: Deep Ensemble, MC-dropout."""
    return torch.stack([common.log_softmax(z) for z in logits]).logsumexp(0) - np.log(len(logits))


def dropout_logits(f, X, passes):
    """MC-dropout (Gal & Ghahramani, ICML 2016): log of the mean softmax over passes with dropout on."""
    drops = [m for m in f.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]
    for m in drops:
        m.train()
    logits = mean_softmax([f(X) for _ in range(passes)])
    for m in drops:
        m.eval()
    return logits


def crf_logits(log_S, iterations=10, sigma_xy=10.0, sigma_p=13.0, compat=10.0, radius=20, stride=4):
    """Dense-CRF refinement of a softmax (Krähenbühl & Koltun, NeurIPS 2011): log of the mean-field marginals.

    Unary −log S; Potts compatibility `compat` times a bilateral kernel over position and class probabilities,
    exp(−|Δxy|²/2σ_xy² − |Δp|²/2σ_p²), normalised over each pixel's neighbours, with the CAOS code's σ_xy = 10, σ_p = 13
    and compat = 10. ASSUMPTION: the kernel is cut to a window of ±20 pixels sampled every 4 (120 neighbours), and
    10 iterations replace 100, so that it runs on the device. log_S (B, N, H, W)."""
    S = log_S.exp()
    offsets = [(dy, dx) for dy in range(-radius, radius + 1, stride) for dx in range(-radius, radius + 1, stride) if (dy, dx) != (0, 0)]
    H, W = S.shape[-2:]

    def overlap(dy, dx):
        """Slices of the pixels that have a neighbour at (dy, dx), and of those neighbours."""
        here = (..., slice(max(-dy, 0), H - max(dy, 0)), slice(max(-dx, 0), W - max(dx, 0)))
        there = (..., slice(max(dy, 0), H - max(-dy, 0)), slice(max(dx, 0), W - max(-dx, 0)))
        return here, there
    offsets = [o for o in offsets if abs(o[0]) < H and abs(o[1]) < W]
    kernels, norm = [], torch.zeros_like(S[:, :1])
    for dy, dx in offsets:
        here, there = overlap(dy, dx)
        k = torch.exp(-(dy**2 + dx**2) / (2 * sigma_xy**2) - ((S[here] - S[there])**2).sum(1, keepdim=True) / (2 * sigma_p**2))
        kernels.append(k)
        norm[here] += k
    Q = S
    for _ in range(iterations):
        message = torch.zeros_like(Q)
        for (dy, dx), k in zip(offsets, kernels):
            here, there = overlap(dy, dx)
            message[here] += k * Q[there]
        log_Q = torch.log_softmax(log_S + compat * message / norm.clamp(min=1e-12), 1)
        Q = log_Q.exp()
    return log_Q


def anomaly_scores(models, X, names, args):
    """({score name: float32 (B, H, W)}, log-softmax (B, N, H, W)) of one forward pass of the model or ensemble."""
    logits = [f(X).float() for f in models]
    log_S = common.log_softmax(logits[0]) if len(logits) == 1 else mean_softmax(logits)
    scores = {}
    for name in names:
        if name in ("msp", "entropy"):
            scores[name] = SCORES[name](log_S if len(logits) > 1 else logits[0])
        elif name in SCORES:
            scores[name] = SCORES[name](torch.stack(logits).mean(0))
        elif name == "dropout":
            scores[name] = score_msp(mean_softmax([dropout_logits(f, X, args.passes) for f in models]))
        else:
            scores[name] = score_msp(crf_logits(log_S, args.crf_iterations))
    return scores, log_S


# ──────────────────────────────────────────────── metrics ────────────────────────────────────────────────

# Anomalous pixels are the positives, and a higher score is more anomalous. In percent:
#     aupr         step-wise average precision, as sklearn.metrics.average_precision_score
#     auroc        area under the ROC curve, a tied positive/negative pair counting one half
#     fpr95        FPR at the threshold whose recall is nearest to 95 %: fpr_and_fdr_at_recall of the CAOS code
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
    """All metrics, from the distinct scores held by at least one positive.

    chunks  iterable of non-empty int64 arrays (pos, above, upto), in descending score order, one entry
            per such score: positives at it, negatives strictly above it, negatives above or at it
    P, N    total positives and negatives, both > 0, together below 2**32
    Other scores need no entry: between two positives recall is constant, so a run of negatives adds to
    neither area, and FPR is only ever read at its ends.
    """
    tp, ap, pairs, nearest, fpr95, first = 0, 0.0, 0, np.inf, 0, None
    for pos, above, upto in chunks:
        recalled = tp + np.cumsum(pos)
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
    return curve_metrics(exact_chunks(pos, neg), len(pos), len(neg))


def exact_chunks(pos, neg, size=1 << 20):
    """The chunks of `curve_metrics` for ascending scores of the two classes, `size` scores at a time."""
    starts = run_starts(pos)
    counts = np.diff(starts, append=len(pos))
    for end in range(len(starts), 0, -size):
        part = slice(max(0, end - size), end)
        score = pos[starts[part]][::-1]
        above = len(neg) - np.searchsorted(neg, score, "right")
        upto = len(neg) - np.searchsorted(neg, score, "left")
        yield counts[part][::-1], above, upto


def run_starts(ordered):
    """Index of the first element of every run of equal values."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[:len(ordered)])


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


class ScoreHistogram:
    """Pooled metrics over any number of pixels, in one pass and bounded memory.

    Up to `exact` pixels (64 MiB) are kept as they are, and the metrics are exact. More are counted in a table of 2**24
    bins a class (128 MiB). Both depend on the set of the scores alone, and counts are integers: any order, batching or
    split over ranks gives identical results.

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
                bins = bin_numbers(piece)                       # ascending, so equal ones follow each other
                starts = run_starts(bins)
                row[bins[starts]] += np.diff(starts, append=len(bins)).astype(np.uint32)

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

    def chunks(self):
        """The chunks of `curve_metrics` for all that was counted; a bin is one score."""
        if self.table is None:
            yield from exact_chunks(*self.sorted_scores())
            return
        fp = 0
        for end in range(BINS, 0, -1 << 16):
            pos, neg = self.table[:, max(0, end - (1 << 16)):end][:, ::-1]
            upto, hit = fp + np.cumsum(neg, dtype=np.int64), np.flatnonzero(pos)
            if len(hit):
                yield pos[hit].astype(np.int64), upto[hit] - neg[hit], upto[hit]
            fp = int(upto[-1])

    def metrics(self):
        """`curve_metrics` of all that was counted; None when either class is empty."""
        P, N = self.total.tolist()
        return curve_metrics(self.chunks(), P, N) if P and N else None

    def curve(self, points=1000):
        """(recall, precision, FPR), each float64 of at most about `points`, along falling thresholds."""
        P, N = self.total.tolist()
        tp, drawn, curve = 0, 0, [(0.0, 1.0, 0.0)]
        for pos, _, upto in self.chunks():
            recalled = tp + np.cumsum(pos)
            steps = recalled * points // P
            for i in np.flatnonzero(np.diff(steps, prepend=drawn)):    # whenever recall passes a step
                curve.append((recalled[i] / P, recalled[i] / (recalled[i] + upto[i]), upto[i] / N))
            tp, drawn = int(recalled[-1]), int(steps[-1])
        return np.array([*curve, (1.0, P / (P + N), 1.0)]).T


class Tally:
    """What one model accumulates over the images of this rank."""

    def __init__(self, score_names, N):
        self.histograms = {s: ScoreHistogram() for s in score_names}
        self.confusion = torch.zeros(N, N, dtype=torch.int64)
        self.threshold = np.zeros((3, 1001), np.int64)   # pixels with max S in ((k − 1)/1000, k/1000]: right, known, anomalous
        self.images = {}                                 # index → {score: metrics or None}

    def add(self, index, scores, top, prediction, Z, ignored, N):
        """scores {name: (H, W)}, top = max S (H, W), prediction and Z (H, W): one image."""
        keep = ~ignored
        positive = (Z == common.ANOMALY)[keep]
        self.images[index] = {}
        for name, score in scores.items():
            pos, neg = sort_by_class(score[keep], positive)
            self.histograms[name].add(pos, neg)
            self.images[index][name] = image_metrics(pos, neg)
        self.confusion += common.confusion(torch.from_numpy(prediction), torch.from_numpy(Z), N)
        known, bins = (Z < N) & keep, np.ceil(top * 1000).astype(np.int64).clip(0, 1000)
        for row, mask in zip(self.threshold, (known & (prediction == Z), known, Z == common.ANOMALY)):
            row += np.bincount(bins[mask], minlength=1001)

    def merge_ranks(self):
        """The tally of all ranks, on rank 0: counts are integers, so the numbers do not depend on how it was split."""
        common.all_sum(self.confusion)
        self.threshold = common.all_sum(torch.from_numpy(self.threshold)).numpy()
        self.images = {k: v for part in common.gather(self.images) for k, v in part.items()}
        for histogram in self.histograms.values():
            histogram.make_room(int(common.all_sum(torch.tensor(histogram.total.sum()))))   # tables are smaller to send
            for state in common.gather_first(histogram.state)[1:]:
                histogram.merge(state)


def figures(tally, name, order):
    """{"pooled": …, "per_image": …} of one score, in percent to 4 decimals; None where there is no anomalous pixel."""
    rounded = lambda m: m and {k: round(m[k], 4) for k in METRICS}
    images = [m for m in (tally.images[i][name] for i in order) if m]
    return dict(pooled=rounded(tally.histograms[name].metrics()),
                per_image=rounded({k: float(np.mean([m[k] for m in images])) for k in METRICS} if images else None))


@torch.no_grad()
def evaluate(models, scenes, ignore, args, device):
    """Run every model of {label: [f, …]} over the split; {label: Tally}, {index: pixel counts}, seconds by part.

    Loading and metrics run in threads beside the forward pass. `ignore` (256,) bool says which labels are left out."""
    N = len(scenes.classes)
    tallies = {label: Tally(args.score, N) for label in models}
    counts, spent = {}, dict(forward=0.0, metrics=0.0)

    def account(item, label, scores, top, prediction):
        begun = time.perf_counter()
        Z = item["label"].numpy()
        ignored = ignore[Z]
        try:
            tallies[label].add(item["index"], scores, top, prediction, Z, ignored, N)
        except ValueError as e:
            raise common.InputError(f"{scenes.name(item['index'])}: {e} under {label}")
        counts[item["index"]] = dict(anomalous=int((Z == common.ANOMALY).sum()), ignored=int(ignored.sum()), pixels=Z.size,
                                     size=f"{Z.shape[1]}×{Z.shape[0]}")
        spent["metrics"] += time.perf_counter() - begun

    cuda, share = device.type == "cuda", range(common.rank(), len(scenes), common.world())
    with ThreadPoolExecutor(args.workers or (8 if cuda else 1)) as readers, ThreadPoolExecutor(1) as accountant:
        loading, waiting = deque(), deque()
        for n in common.progress(range(len(share)), "evaluating", unit="image"):
            while len(loading) < args.batch_size and n + len(loading) < len(share):
                loading.append(readers.submit(scenes.__getitem__, share[n + len(loading)]))
            item = loading.popleft().result()
            X = common.to_input(item["image"][None], device)   # one image at a time: no number depends on its neighbours
            for label, fs in models.items():
                begun = time.perf_counter()
                torch.manual_seed(args.seed * 1_000_003 + item["index"])   # dropout masks
                scores, log_S = anomaly_scores(fs, X, args.score, args)
                top, prediction = log_S[0].max(0)
                done = ({k: v[0].cpu().numpy() for k, v in scores.items()}, top.exp().cpu().numpy(), prediction.to(torch.uint8).cpu().numpy())
                spent["forward"] += time.perf_counter() - begun
                waiting.append(accountant.submit(account, item, label, *done))
            while len(waiting) > 2 * len(models):
                waiting.popleft().result()
        for job in waiting:
            job.result()
    for tally in tallies.values():
        tally.merge_ranks()
    return tallies, {k: v for part in common.gather(counts) for k, v in part.items()}, spent


# ──────────────────────────────────────────────── figures ────────────────────────────────────────────────

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(fig, path):
    with common.replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png", bbox_inches="tight")
    pyplot().close(fig)


def class_colours(N):
    """uint8 (256, 3): a colour for each class, sky blue for anomalies (as in Fig. 3), white for ignored pixels."""
    colours = np.full((256, 3), 255, np.uint8)
    colours[:N] = (pyplot().get_cmap("tab20b" if N > 20 else "tab20")(np.arange(N))[:, :3] * 200).astype(np.uint8)
    colours[common.ANOMALY] = (0, 191, 255)
    return colours


def draw_panels(models, scenes, chosen, name, args, device, path):
    """Fig. 3: a row per image: the image, its label, the anomaly map of every model on one scale."""
    plt = pyplot()
    N, maps = len(scenes.classes), {}
    with torch.inference_mode():
        for i in chosen:
            X = common.to_input(scenes[i]["image"][None], device)
            for label, fs in models.items():
                torch.manual_seed(args.seed * 1_000_003 + i)   # the dropout masks of the evaluation
                maps[i, label] = anomaly_scores(fs, X, [name], args)[0][name][0].cpu().numpy()
    if name in ("msp", "dropout", "crf"):   # drawn as 1 − max S
        maps = {k: np.exp(v) for k, v in maps.items()}
        low, high = 0, 1 - 1 / N
    else:
        low, high = (float(np.percentile(np.concatenate([m.ravel() for m in maps.values()]), q)) for q in (1, 99))
    H, W = scenes[chosen[0]]["label"].shape
    fig, axes = plt.subplots(len(chosen), 2 + len(models), squeeze=False, layout="constrained",
                             figsize=(3 * (2 + len(models)) + 0.8, 3 * H / W * len(chosen) + 0.3))
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, i in zip(axes, chosen):
        item = scenes[i]
        row[0].imshow(item["image"].permute(1, 2, 0))
        row[1].imshow(class_colours(N)[item["label"].numpy()])
        for cell, label in zip(row[2:], models):
            shown = cell.imshow(maps[i, label], vmin=low, vmax=high, cmap="viridis")
    for cell, title in zip(axes[0], ("image", "label (anomaly: sky blue)", *models)):
        cell.set_title(title, fontsize=9)
    for cell in axes.flat:
        cell.axis("off")
    fig.colorbar(shown, ax=axes, label="1 − max softmax" if high == 1 - 1 / N else name, fraction=0.03, pad=0.01)
    save_figure(fig, path)


def draw_threshold(tallies, path):
    """Fig. 4: semantic and anomaly accuracy against δ. ASSUMPTION: semantic accuracy is the share of the known pixels
    that are classified right and not flagged; the paper gives no formula."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    delta = np.arange(1001) / 1000
    for k, (label, tally) in enumerate(tallies.items()):
        flagged = 100 * tally.threshold.cumsum(1) / np.maximum(tally.threshold.sum(1, keepdims=True), 1)   # max S ≤ δ
        right = 100 * tally.threshold[0].sum() / max(tally.threshold[1].sum(), 1)
        ax.plot(delta, right * (1 - flagged[0] / 100), color=f"C{k}", label=f"{label}: semantic accuracy")
        ax.plot(delta, flagged[2], color=f"C{k}", ls="--", label=f"{label}: anomaly accuracy")
    ax.set(xlabel="threshold δ (Eq. 2)", ylabel="accuracy (%)", xlim=(0, 1), ylim=(0, 100))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    save_figure(fig, path)


def draw_curves(rows, tallies, path):
    """Precision-recall and ROC curves of the pooled pixels, every row of the table in one axes each."""
    plt = pyplot()
    fig, (pr, roc) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    highest = 0.01
    kinds = [list(dict.fromkeys(row[k] for row in rows)) for k in ("model", "score")]
    for row in rows:   # a colour for each score and a line style for each model; with one score, a colour for each model
        m, k = (values.index(row[key]) for values, key in zip(kinds, ("model", "score")))
        style = dict(color=f"C{k}", ls=("-", "--", ":", "-.")[m % 4]) if len(kinds[1]) > 1 else dict(color=f"C{m}")
        histogram = tallies[row["model"]].histograms[row["score"]]
        recall, precision, fpr = histogram.curve()
        label = f"{row['model']}, {row['score']}"
        highest = max(highest, precision[recall > 0.02].max())   # the first few pixels may have any precision
        pr.plot(recall, precision, **style, label=f"{label}: AUPR {row['pooled']['aupr']:.1f}")
        roc.plot(fpr, recall, **style, label=f"{label}: AUROC {row['pooled']['auroc']:.1f}")
    pr.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, min(1, 1.2 * highest)))
    roc.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))
    roc.axhline(0.95, color="grey", lw=0.6, ls=":")
    for ax in (pr, roc):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    save_figure(fig, path)


@torch.inference_mode()
def photographs(models, paths, classes, args, device, out):
    """For each photograph NAME: NAME_anomaly.png and NAME_classes.png (overlays at its own size), NAME_score.npy."""
    files = [f for p in map(Path, paths) for f in (sorted(q for q in p.iterdir() if q.suffix.lower() in Image.registered_extensions())
                                                   if p.is_dir() else [p])]
    if not files:
        raise common.InputError(f"{', '.join(paths)}: no photographs; expected image files")
    if len({f.stem for f in files}) < len(files):
        raise common.InputError(f"{', '.join(paths)}: two photographs have the same name; expected different ones")
    plt, N, name = pyplot(), len(classes), args.score[0]
    for path in common.progress(files, "photographs"):
        try:
            with Image.open(path) as opened:
                photo = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise common.InputError(f"{path}: cannot be read as an image: {e}")
        shrink = min(1, args.max_side / max(photo.size))
        seen = photo.resize([max(32, round(shrink * s)) for s in photo.size], Image.LANCZOS) if shrink < 1 else photo
        X = common.to_input(torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None], device)
        scores, log_S = anomaly_scores(models, X, [name], args)
        own = lambda t: nn.functional.interpolate(t, photo.size[::-1], mode="bilinear", align_corners=False)
        score = own(scores[name][None])[0, 0].cpu().numpy()
        predicted = own(log_S).argmax(1)[0].cpu().numpy()
        shown = np.exp(score) / (1 - 1 / N) if name in ("msp", "dropout", "crf") else \
            (score - score.min()) / max(float(np.ptp(score)), 1e-9)
        grey = np.asarray(photo).astype(float)
        for kind, colour, weight in (("anomaly", 255 * plt.get_cmap("viridis")(shown.clip(0, 1))[..., :3], 0.6),
                                     ("classes", class_colours(N)[predicted], 0.5)):
            with common.replacing(out / f"{path.stem}_{kind}.png") as temporary:
                Image.fromarray(((1 - weight) * grey + weight * colour).round().astype(np.uint8)).save(temporary, "PNG")
        with common.replacing(out / f"{path.stem}_score.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, score)
        seen_classes = np.bincount(predicted.ravel(), minlength=N)
        common.say(f"{path}: {photo.width}×{photo.height}, {name} from {score.min():.3f} to {score.max():.3f}; mostly "
                   + ", ".join(f"{classes[c]} {100 * seen_classes[c] / predicted.size:.0f} %" for c in seen_classes.argsort()[::-1][:3]))
    common.say(f"wrote {out}: {len(files)} photographs, each _anomaly.png, _classes.png, _score.npy")


# ───────────────────────────────────────────────── main ─────────────────────────────────────────────────

def main():
    args = parse()
    device = common.setup(args.device)
    out = Path(args.out)
    models, checkpoints = {}, {}
    for label, paths in (("+".join(Path(c).stem for c in args.ckpt), args.ckpt), *((Path(b).stem, [b]) for b in args.baseline)):
        if label in models:
            raise common.InputError(f"--baseline {paths[0]}: its name is taken; expected files of different names")
        loaded = [common.load_checkpoint(c) for c in paths]
        for (f, c), path in zip(loaded, paths):
            checkpoints[str(path)] = c
            reference = next(iter(checkpoints.values()))
            if c["classes"] != reference["classes"]:
                raise common.InputError(f"{path}: its classes are not those of {args.ckpt[0]}: {len(c['classes'])} and "
                                        f"{len(reference['classes'])}; expected the same")
        models[label] = [f.to(device).requires_grad_(False) for f, _ in loaded]
    checkpoint = next(iter(checkpoints.values()))
    classes, main_label = checkpoint["classes"], next(iter(models))
    common.say(common.about_run(device, models[main_label][0]))
    if args.images:
        if common.rank() == 0:
            photographs(models[main_label], args.images, classes, args, device, out)
        return

    data = args.data or checkpoint["data"]
    with common.first_rank_first():
        root = args.root or common.default_root(data, checkpoint["root"] if data == checkpoint["data"] else None)
        scenes = common.Scenes(data, root, args.split, checkpoint["anomaly"] if data == checkpoint["data"] else None)
    if scenes.classes != classes:
        raise common.InputError(f"--data {data} has the classes {', '.join(scenes.classes)}; the checkpoint {', '.join(classes)}")
    left_out = args.ignore_classes if args.ignore_classes is not None else \
        sorted({k for c in checkpoints.values() for k in c.get("known_unknown") or ()})
    unlabeled = scenes.spec.get("unlabeled", ())
    ignore = np.zeros(256, bool)
    ignore[common.class_indices(left_out, classes, "--ignore-classes")] = True
    if args.unlabeled == "ignore":
        ignore[[common.IGNORED, *common.class_indices(unlabeled, classes, "unlabeled")]] = True

    named = [next((i for i in range(len(scenes)) if scenes.name(i).endswith(n)), n) for n in args.panels]
    if len(args.panels) == 1 and args.panels[0].isdigit():
        named = None   # a number of images, chosen when their anomalies are known
    for n in named or ():
        if isinstance(n, str):
            raise common.InputError(f"--panels {n}: no image of the {args.split} split ends in that name")

    tallies, counts, spent = evaluate(models, scenes, ignore, args, device)
    if common.rank():
        return
    order = sorted(counts)
    pixels, anomalous, ignored = (sum(c[k] for c in counts.values()) for k in ("pixels", "anomalous", "ignored"))
    valued = sum(tallies[main_label].images[i][args.score[0]] is not None for i in order)
    protocol = dict(
        data=data, split=args.split, images=len(order), resolution=sorted({c["size"] for c in counts.values()}),
        positives="anomalous pixels", class_ids={str(k): {common.IGNORED: "no known class", common.ANOMALY: "anomaly"}.get(v) or classes[v]
                                                 for k, v in enumerate(scenes.lut.tolist()) if v != 253},
        unlabeled=f"{args.unlabeled}: ids without a known class" + "".join(f", {c}" for c in unlabeled),
        ignored_classes=list(left_out), pixels=pixels, ignored_pixels=ignored, ignored_share=round(100 * ignored / pixels, 4),
        base_rate=round(100 * anomalous / max(pixels - ignored, 1), 4), images_without_anomaly_or_negative=len(order) - valued,
        per_image=f"mean over the {valued} images that hold both", pooled="all pixels at once",
        fpr95="recall nearest to 0.95, larger FPR on ties (CAOS); fpr95_first: first threshold with recall of at least 0.95",
        miou="over the classes present in the labels, ignored_classes included", checkpoints={k: common.fingerprint(k) for k in checkpoints})
    rows = []
    for label, tally in tallies.items():
        segmentation = common.segmentation_metrics(tally.confusion, classes)
        segmentation = {k: round(v, 4) if isinstance(v, float) else {c: u and round(u, 4) for c, u in v.items()} if v else v
                        for k, v in segmentation.items()}
        rows += [dict(model=label, score=s, **figures(tally, s, order), **segmentation) for s in args.score]
    common.save_json(out / "results.json", dict(
        {k: rows[0][k] for k in ("pooled", "per_image", "miou", "pixel_accuracy", "iou")}, protocol=protocol, rows=rows))
    report(rows, protocol, data)
    common.say(f"time: forward {spent['forward']:.1f} s, metrics {spent['metrics']:.1f} s beside it "
               f"({100 * spent['metrics'] / max(sum(spent.values()), 1e-9):.0f} % of both)")

    chosen = named or sorted(order, key=lambda i: -counts[i]["anomalous"])[:int(args.panels[0])]
    if chosen:
        beside = {k: models[k] for k in [*list(models)[1:], main_label]}   # baselines first, as in Fig. 3
        draw_panels(beside, scenes, chosen, args.score[0], args, device, out / "panels.png")
    draw_threshold(tallies, out / "threshold.png")
    if anomalous and rows[0]["pooled"]:
        draw_curves(rows, tallies, out / "curves.png")
    common.say(f"wrote {out}: results.json, figures")


def report(rows, protocol, data):
    """The table on the terminal: ours first, then the paper's, marked as such."""
    print("\nprotocol: " + " · ".join(f"{k} {v}" for k, v in protocol.items() if k not in ("class_ids", "checkpoints", "fpr95")))
    width = max(12, *(len(r["model"]) for r in rows))
    print(f"\n{'':{width}}           pooled                        per-image mean\n"
          f"{'model':{width}} score     AUPR   AUROC  FPR95 (first)    AUPR   AUROC  FPR95 (first)    mIoU  pixel acc.")
    for r in rows:
        cells = [f"{m['aupr']:6.2f}  {m['auroc']:6.2f} {m['fpr95']:6.2f} ({m['fpr95_first']:5.2f})" if m else f"{'no anomalous pixel':30}"
                 for m in (r["pooled"], r["per_image"])]
        print(f"{r['model']:{width}} {r['score']:8} {cells[0]}  {cells[1]}  {r['miou'] or 0:6.2f} {r['pixel_accuracy'] or 0:7.2f}")
    if data in PAPER_ROWS:
        print("\nthe paper's numbers (Table II, III; per-image mean as in the CAOS code, as far as it says):")
        for name, aupr, auroc, fpr in PAPER_ROWS[data]:
            print(f"  paper  {name:40} {aupr:6.1f} {auroc:6.1f} {fpr:6.1f}")
    print("per class IoU: " + ", ".join(f"{c} {v:.1f}" for c, v in rows[0]["iou"].items() if v is not None) + "\n")


if __name__ == "__main__":
    common.cli(main)
