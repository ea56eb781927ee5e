"""The baselines of Table II and the counts behind Fig. 4, against computations written out."""
import argparse
import math

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve
from torch import nn

import common
import evaluate


def literal_crf(log_S, iterations, sigma_xy, sigma_p, compat, radius, stride):
    """Mean field over explicit neighbours, float64, one image (N, H, W)."""
    log_S = log_S.astype(np.float64)
    S = np.exp(log_S)
    N, H, W = S.shape
    Q = S.copy()
    steps = range(-radius, radius + 1, stride)
    for _ in range(iterations):
        new = np.zeros_like(Q)
        for y in range(H):
            for x in range(W):
                message, norm = np.zeros(N), 0.0
                for dy in steps:
                    for dx in steps:
                        v, u = y + dy, x + dx
                        if (dy or dx) and 0 <= v < H and 0 <= u < W:
                            k = math.exp(-(dy * dy + dx * dx) / (2 * sigma_xy**2)
                                         - ((S[:, y, x] - S[:, v, u])**2).sum() / (2 * sigma_p**2))
                            message += k * Q[:, v, u]
                            norm += k
                energy = log_S[:, y, x] + compat * message / norm
                new[:, y, x] = np.exp(energy - energy.max()) / np.exp(energy - energy.max()).sum()
        Q = new
    return Q


def test_crf_is_mean_field_on_the_window():
    torch.manual_seed(0)
    log_S = common.log_softmax(3 * torch.randn(2, 4, 7, 9))
    settings = dict(iterations=3, sigma_xy=2.0, sigma_p=0.5, compat=3.0, radius=4, stride=2)
    ours = evaluate.crf_logits(log_S, **settings).exp().numpy()
    for b in range(2):
        assert np.abs(ours[b] - literal_crf(log_S[b].numpy(), **settings)).max() < 1e-5
    assert np.abs(ours - log_S.exp().numpy()).max() > 0.05   # it did something


def test_crf_on_an_image_smaller_than_its_window():
    log_S = common.log_softmax(torch.randn(1, 3, 5, 6))
    assert torch.isfinite(evaluate.crf_logits(log_S)).all()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.conv = nn.Dropout(0.5), nn.Conv2d(3, 4, 1)

    def forward(self, X):
        return 5 * self.conv(self.drop(X))


def test_dropout_is_the_mean_softmax_of_passes_with_dropout_on_and_then_off():
    torch.manual_seed(1)
    f, X = Noisy().eval(), torch.rand(1, 3, 6, 8)
    with torch.no_grad():
        torch.manual_seed(5)
        ours = evaluate.dropout_logits(f, X, 4).exp()
        assert not f.drop.training
        torch.manual_seed(5)
        f.train()
        by_hand = torch.stack([f(X).double().softmax(1) for _ in range(4)])
    assert (by_hand[0] - by_hand[1]).abs().max() > 0.01     # the masks differ
    assert torch.allclose(ours.double(), by_hand.mean(0), atol=1e-6)


def test_ensemble_is_the_mean_softmax_and_the_mean_logit():
    torch.manual_seed(2)
    z = [3 * torch.randn(1, 5, 4, 4) for _ in range(3)]
    models = [lambda X, z=z_k: z for z_k in z]
    names = ["msp", "entropy", "maxlogit", "energy"]
    scores, log_S = evaluate.anomaly_scores(models, None, names, argparse.Namespace())
    p = torch.stack([v.double().softmax(1) for v in z]).mean(0)
    mean = torch.stack(z).double().mean(0)
    assert torch.allclose(log_S.exp().double(), p, atol=1e-6)
    assert torch.allclose(scores["msp"].double(), (1 - p.max(1).values).log(), atol=1e-5)
    assert torch.allclose(scores["entropy"].double(), -(p * p.log()).sum(1), atol=1e-5)
    assert torch.allclose(scores["maxlogit"].double(), -mean.max(1).values, atol=1e-5)
    assert torch.allclose(scores["energy"].double(), -mean.exp().sum(1).log(), atol=1e-5)


def tally(seed=0, n=4):
    """A tally over n random images, and their (Z, max S, prediction)."""
    rng = np.random.default_rng(seed)
    t, images = evaluate.Tally(["msp"], 3), []
    for i in range(n):
        labels = [0, 1, 2, common.IGNORED, common.ANOMALY]
        Z = rng.choice(labels, (20, 30), p=[0.4, 0.2, 0.2, 0.1, 0.1]).astype(np.uint8)
        top = rng.uniform(1 / 3, 1, (20, 30)).astype(np.float32)
        prediction = rng.integers(0, 3, (20, 30)).astype(np.uint8)
        t.add(i, {"msp": np.log1p(-top)}, top, prediction, Z, Z == common.IGNORED)
        images.append((Z, top, prediction))
    return t, images


def test_accuracy_against_delta():
    t, images = tally()
    Z, top, prediction = (np.concatenate([i[k].ravel() for i in images]) for k in range(3))
    flagged = t.threshold.cumsum(1)
    for k in (0, 400, 555, 900, 1000):
        delta = k / 1000
        assert flagged[2, k] == ((Z == common.ANOMALY) & (top.astype(np.float64) <= delta)).sum()
        known = Z < 3
        kept_right = (known & (prediction == Z) & (top.astype(np.float64) > delta)).sum()
        assert t.threshold[0].sum() - flagged[0, k] == kept_right
        assert t.threshold[1].sum() == known.sum()


def test_curve_lies_on_scikit_learns():
    t, images = tally(n=6)
    keep = np.concatenate([(i[0] != common.IGNORED).ravel() for i in images])
    y = np.concatenate([(i[0] == common.ANOMALY).ravel() for i in images])[keep]
    score = np.concatenate([np.log1p(-i[1]).ravel() for i in images])[keep]
    precision, recall, _ = precision_recall_curve(y, score)
    ours_recall, ours_precision, _ = t.histograms["msp"].curve(points=50)
    theirs = {round(r, 9): set() for r in recall}
    for p, r in zip(precision, recall):
        theirs[round(r, 9)].add(round(p, 9))
    assert len(ours_recall) > 40 and ours_recall[0] == 0 and ours_recall[-1] == 1
    for r, p in list(zip(ours_recall, ours_precision))[1:-1]:
        assert round(p, 9) in theirs[round(r, 9)]


def test_figures_mean_over_images_with_both_kinds_of_pixel():
    t, _ = tally()
    t.images[9] = {"msp": None}   # an image without an anomalous pixel
    found = evaluate.figures(t, "msp", [0, 1, 2, 3, 9])
    assert found["per_image"]["auroc"] == round(float(np.mean([t.images[i]["msp"]["auroc"] for i in range(4)])), 4)


def test_confusion_ignores_what_is_no_class():
    Z = torch.tensor([[0, 1, 255, 254]], dtype=torch.uint8)
    matrix = common.confusion(torch.tensor([[0, 2, 1, 1]], dtype=torch.uint8), Z, 3)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
