"""Mask classification (Mask2Former, Mask2Anomaly, Maskomaly) and SynthCP: each against the literal definition."""
import argparse
import copy
import itertools
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

import common
import evaluate
import finetune
import mgu_generate
import pretrain
from runner import run, run_ok, without_figures

run, run_ok = without_figures(run, run_ok)
N, Q = 5, 6
SMALL = "mobilenet_v3_large"


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def labels(B, H, W, seed=0):
    """(Z uint8, unknown bool), (B, H, W): every image another set of classes, the last one without any."""
    rng = np.random.default_rng(seed)
    Z = np.stack([rng.choice([*rng.choice(N, 1 + b % N, replace=False), 255, 254], (H, W)) for b in range(B)])
    Z[-1] = 255
    return torch.from_numpy(Z.astype(np.uint8)), torch.from_numpy((rng.random(Z.shape) < 0.1) & (Z < N))


def random_sets(B, h, w, layers=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(B, Q, N + 1, generator=g, dtype=torch.float64),
             2 * torch.randn(B, Q, h, w, generator=g, dtype=torch.float64)) for _ in range(layers)]


class Backbone(nn.Module):
    """Maps at strides 4 to 32 with the channels of MobileNetV3, in a hundredth of its time."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, 1) for c in common.TAPS[SMALL].values())

    def forward(self, X):
        size = lambda stride: [-(-n // stride) for n in X.shape[-2:]]
        return {str(s): conv(F.adaptive_avg_pool2d(X, size(s))).tanh() for s, conv in zip((4, 8, 16, 32), self.convs)}


def small_network(arch="mask2former"):
    torch.manual_seed(0)
    f = common.Segmenter(arch, SMALL, N, 16, attention="global", queries=Q, decoder_layers=3)
    f.backbone = Backbone()
    return f.eval()


@pytest.fixture
def f():
    return small_network()


# ───────────────────────────────────────────────── the set loss ─────────────────────────────────────────────────

def pixel_losses(z, Z, known, c):
    """(BCE, dice) of one mask with class c by a loop over pixels; z (h, w) cells of 4×4 pixels, Z and known (H, W)."""
    bce, pixels, overlap, masks, targets = 0.0, 0, 0.0, 0.0, 0.0
    for i, j in np.ndindex(*Z.shape):
        if known[i, j]:
            m, t = sigmoid(z[i // 4, j // 4]), float(Z[i, j] == c)
            bce -= t * np.log(m) + (1 - t) * np.log(1 - m)
            pixels += 1
            overlap, masks, targets = overlap + m * t / 16, masks + m / 16, targets + t / 16   # in cells
    return bce / pixels, 1 - (2 * overlap + 1) / (masks + targets + 1)


def literal_loss(sets, Z, unknown):
    """(loss_sets, masks matched): loops, and every assignment tried."""
    known = ((Z < N) & ~unknown).numpy()
    Z, total, n_masks, weights = Z.numpy(), 0.0, 0, 0.0
    ce = masks = 0.0
    for classes, z in sets:
        n_masks = weights = 0
        for b in range(len(Z)):
            log_p = np.log(softmax(classes[b].numpy()))
            present = sorted(set(Z[b][known[b]].tolist()))
            terms = np.array([[pixel_losses(z[b, q].numpy(), Z[b], known[b], c) for c in present] for q in range(Q)])
            cost = lambda qs: sum(-2 * np.exp(log_p[q, c]) + 5 * terms[q, k].sum()
                                  for k, (q, c) in enumerate(zip(qs, present)))
            best = min(itertools.permutations(range(Q), len(present)), key=cost)
            for k, (q, c) in enumerate(zip(best, present)):
                ce -= log_p[q, c]
                masks += terms[q, k].sum()
            rest = [q for q in range(Q) if q not in best]
            ce -= 0.1 * sum(log_p[q, N] for q in rest)
            n_masks += len(best)
            weights += len(best) + 0.1 * len(rest)
        total += 2 * ce / weights + 5 * masks / n_masks
        ce = masks = 0.0
    return total, n_masks


def test_the_set_loss_is_that_of_every_pixel_and_the_best_of_all_assignments():
    (Z, unknown), sets = labels(4, 12, 16), random_sets(4, 3, 4)
    known = (Z < N) & ~unknown
    want, n_masks = literal_loss(sets, Z, unknown)
    got = common.loss_sets(sets, Z, known)
    np.testing.assert_allclose(float(got), want, rtol=1e-6)                       # targets are float32
    np.testing.assert_allclose(float(common.loss_sets(sets, Z, known, n_masks, len(Z))), want, rtol=1e-6)
    assert pretrain.count_masks(dict(label=Z, unknown=unknown), SimpleNamespace(
        f=SimpleNamespace(num_classes=N, decoder=SimpleNamespace(queries=Q)))) == \
        [int(known.sum()), int(unknown.sum()), n_masks, 4]


def test_an_ignored_pixel_says_nothing():
    (Z, unknown), sets = labels(3, 12, 16), random_sets(3, 3, 4)
    known = (Z < N) & ~unknown
    value = common.loss_sets(sets, Z, known)
    other = torch.where(known, Z, torch.randint(0, N, Z.shape, dtype=torch.uint8))
    assert torch.equal(common.loss_sets(sets, other, known), value)
    assert not torch.equal(common.loss_sets(sets, other, other < N), value)


def test_matching_with_fewer_queries_than_classes():
    cost = torch.rand(2, 3, 2, N, generator=torch.Generator().manual_seed(3))
    present = torch.tensor([[True] * N, [False, True, False, False, False], [False] * N])
    l, b, q, c = common.match(cost, present)
    assert l.tolist() == [0, 0, 0, 1, 1, 1] and b.tolist() == [0, 0, 1] * 2      # 2, 1 and 0 masks
    for layer in range(2):
        best = min(float(cost[layer, 0, 0, i] + cost[layer, 0, 1, j]) for i, j in itertools.permutations(range(N), 2))
        mine = (l == layer) & (b == 0)
        assert float(cost[layer, 0, q[mine], c[mine]].sum()) == pytest.approx(best)
        assert c[(l == layer) & (b == 1)].tolist() == [1]
    assert torch.isfinite(common.match(torch.full((1, 1, 3, 2), torch.nan), torch.ones(1, 2) > 0)).all()


@pytest.mark.parametrize("alpha", (0, 0.7))
def test_parts_have_the_gradient_of_the_batch(f, alpha):
    """5 images of very different numbers of masks and pixels, whole and in parts of 2 and 3."""
    Z, unknown = labels(5, 32, 48)
    batch = dict(image=torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8), label=Z, unknown=unknown)
    args = argparse.Namespace(seed=0, alpha=alpha, margin=0.75, margin_published=False)
    counts = pretrain.count_masks(batch, SimpleNamespace(f=f))
    found = []
    for micro in (5, 2):
        run = SimpleNamespace(micro=micro, t=0, optimiser=torch.optim.SGD(f.parameters()))
        objective = (lambda *a: finetune.margin_objective(args, *a)) if alpha else pretrain.mask_loss
        loss = pretrain.accumulate(f.outputs, batch, objective, counts, args, run, torch.device("cpu"))
        found.append((float(loss), torch.cat([p.grad.flatten() for p in f.parameters()])))
    (a, grad_a), (b, grad_b) = found
    assert a == pytest.approx(b, rel=1e-5) and (grad_a - grad_b).norm() < 1e-4 * grad_a.norm()
    with torch.no_grad():
        want = common.objective_sets(f.outputs(common.to_input(batch["image"]))["sets"], Z, unknown, alpha)
    assert a == pytest.approx(float(want), rel=1e-5), "the whole batch knows its counts by itself"


# ─────────────────────────────────────────────────── the network ───────────────────────────────────────────────────

def test_masked_attention_is_softmax_without_the_closed_cells():
    torch.manual_seed(1)
    C, heads, S = 8, 2, 7
    attention = nn.MultiheadAttention(C, heads, batch_first=True).double()
    nn.init.uniform_(attention.in_proj_bias)
    queries, keys, values = (torch.randn(2, n, C, dtype=torch.float64) for n in (Q, S, S))
    closed = torch.rand(2, Q, S) < 0.6
    closed[0, 0], closed[1, 3] = True, False
    found = common.attend(attention, queries, keys, values, closed).detach().numpy()
    Wq, Wk, Wv = attention.in_proj_weight.detach().numpy().reshape(3, C, C)
    bq, bk, bv = attention.in_proj_bias.detach().numpy().reshape(3, C)
    for b, q in np.ndindex(2, Q):
        parts = []
        for h in range(heads):
            mine = slice(h * C // heads, (h + 1) * C // heads)
            k, v = (keys[b].numpy() @ Wk.T + bk)[:, mine], (values[b].numpy() @ Wv.T + bv)[:, mine]
            z = k @ (queries[b, q].numpy() @ Wq.T + bq)[mine] / np.sqrt(C / heads)
            if not closed[b, q].all():                                   # a fully closed row is opened
                z = np.where(closed[b, q].numpy(), -np.inf, z)
            parts.append(softmax(z) @ v)
        want = attention.out_proj.weight.detach().numpy() @ np.concatenate(parts) + \
            attention.out_proj.bias.detach().numpy()
        np.testing.assert_allclose(found[b, q], want, atol=1e-12)


def test_the_two_attentions_see_complements(f, monkeypatch):
    """Of the global kind, each layer sees at its own stride, where bilinear masks of the one before are ≥ and ≤ 1/2."""
    seen, attend = [], common.attend
    monkeypatch.setattr(common, "attend", lambda *a: (seen.append((a[0], a[4])), attend(*a))[1])
    levels = [torch.randn(2, 16, *size) for size in ((2, 3), (4, 6), (8, 12))]
    with torch.no_grad():
        sets = f.decoder(levels, torch.randn(2, 16, 16, 24))
    assert len(seen) == 6 and [c.shape[2] for _, c in seen] == [6, 6, 24, 24, 96, 96]      # strides 32, 16, 8
    for layer, ((inside, a), (outside, b)), (_, masks) in zip(f.decoder.layers, zip(seen[::2], seen[1::2]), sets):
        assert inside is layer.inside and outside is layer.outside
        half = {6: (2, 3), 24: (4, 6), 96: (8, 12)}[a.shape[2]]
        m = F.interpolate(masks, half, mode="bilinear").flatten(2).sigmoid()
        assert torch.equal(a, m < 0.5) and torch.equal(a, ~b) and 0 < a.float().mean() < 1
    exact = torch.zeros(1, 1, 4)
    layer, opened = f.decoder.layers[0], []
    monkeypatch.setattr(common, "attend", lambda *a: (opened.append(a[4]), attend(*a))[1])
    layer(torch.rand(1, 1, 16), torch.rand(1, 16), torch.rand(1, 4, 16), torch.rand(1, 4, 16), exact)
    assert not opened[0].any() and not opened[1].any(), "a cell at exactly 1/2 is seen by both"


def literal_decoder(decoder, levels, x, heads):
    """[(class logits (Q, N + 1), mask logits (Q, h, w)), …] of one image, from the weights alone; maps (C, h, w)."""
    W = {name: p.detach() for name, p in decoder.named_parameters()}
    linear = lambda name, v: v @ W[f"{name}.weight"].T + W[f"{name}.bias"]
    normed = lambda name, v: (v - v.mean(1, keepdim=True)) / (v.var(1, correction=0, keepdim=True) + 1e-5).sqrt() \
        * W[f"{name}.weight"] + W[f"{name}.bias"]

    def attention(name, queries, keys, values, closed=None):
        C = queries.shape[1]
        q, k, v = (part @ w.T + b for part, w, b in zip((queries, keys, values), W[f"{name}.in_proj_weight"].chunk(3),
                                                        W[f"{name}.in_proj_bias"].chunk(3)))
        found = []
        for h in range(heads):
            mine = slice(h * C // heads, (h + 1) * C // heads)
            z = q[:, mine] @ k[:, mine].T / (C // heads)**0.5
            if closed is not None:
                z = torch.where(closed & ~closed.all(1, keepdim=True), -torch.inf, z)
            found.append(z.softmax(1) @ v[:, mine])
        return linear(f"{name}.out_proj", torch.cat(found, 1))

    def predict(x):
        x = normed("norm", x)
        embedding = linear("mask.4", linear("mask.2", linear("mask.0", x).relu()).relu())
        return linear("classify", x), torch.einsum("qc,chw->qhw", embedding, pixels)

    C, where, x_q = x.shape[0], W["where"], W["query"]
    pixels = torch.einsum("oc,chw->ohw", W["pixel.weight"][..., 0, 0], x) + W["pixel.bias"].view(-1, 1, 1)
    found = [predict(x_q)]
    for i in range(len(decoder.layers)):
        layer, level = f"layers.{i}", levels[i % 3]                                # strides 32, 16, 8, and again
        values = level.reshape(C, -1).T + W["level"][i % 3]
        keys = values + common.sine_positions(*level.shape[1:], C)
        m = F.interpolate(found[-1][1][None], level.shape[1:], mode="bilinear")[0].flatten(1).sigmoid()
        seen = attention(f"{layer}.inside", x_q + where, keys, values, m < 0.5)
        if decoder.attention == "global":
            seen = seen + attention(f"{layer}.outside", x_q + where, keys, values, m > 0.5)
        x_q = normed(f"{layer}.norms.0", x_q + seen)
        x_q = normed(f"{layer}.norms.1", x_q + attention(f"{layer}.between", x_q + where, x_q + where, x_q))
        x_q = normed(f"{layer}.norms.2", x_q + linear(f"{layer}.feed.2", linear(f"{layer}.feed.0", x_q).relu()))
        found.append(predict(x_q))
    return found


@pytest.mark.parametrize("attention", ("masked", "global"))
def test_the_decoder_is_the_literal_one(attention):
    g = torch.Generator().manual_seed(7)
    decoder = common.MaskDecoder(16, N, Q, 4, attention).double().eval()
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.4, generator=g)
    levels = [torch.randn(2, 16, *size, generator=g, dtype=torch.float64) for size in ((2, 3), (4, 6), (8, 12))]
    x = torch.randn(2, 16, 16, 24, generator=g, dtype=torch.float64)
    found = decoder(levels, x)
    for b in range(2):
        want = literal_decoder(decoder, [level[b] for level in levels], x[b], heads=8)
        assert len(found) == len(want) == 5
        for (classes, masks), (want_classes, want_masks) in zip(found, want):
            torch.testing.assert_close(classes[b].double(), want_classes, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(masks[b].double(), want_masks, rtol=1e-4, atol=1e-4)
    # what a layer sees of the masks has no gradient: the last class logits do not reach the embedding through them
    classes = decoder(levels, x.requires_grad_(True))[-1][0]
    assert torch.autograd.grad(classes.sum(), x, allow_unused=True)[0] is None


def test_log_mixture_and_the_order_of_queries(f):
    X = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        found = f.outputs(X)
        assert len(found["sets"]) == 4 and found["logits"].shape == (2, N, 40, 56)
        classes, masks = (v.double().numpy() for v in found["sets"][-1])
        m = sigmoid(F.interpolate(torch.from_numpy(masks), (40, 56), mode="bilinear").numpy())
        want = np.einsum("bqn,bqhw->bnhw", softmax(classes)[..., :-1], m)
        np.testing.assert_allclose(found["logits"].numpy(), np.log(want), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            p = common.log_mixture(*found["sets"][-1])
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, common.log_mixture(*found["sets"][-1]))
        assert torch.isfinite(common.log_mixture(torch.zeros(1, Q, N + 1), torch.full((1, Q, 2, 2), -200.0))).all()

        order = torch.randperm(Q, generator=torch.Generator().manual_seed(1))
        g = copy.deepcopy(f)
        for name in ("query", "where"):
            setattr(g.decoder, name, nn.Parameter(getattr(f.decoder, name)[order]))
        torch.testing.assert_close(g(X), found["logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(g.outputs(X)["sets"][-1][0], found["sets"][-1][0][:, order], rtol=1e-3, atol=1e-4)
        top = np.log(want).max(1)
        np.testing.assert_allclose(evaluate.score_maxlogit(found["logits"]).numpy(), -top, atol=1e-5)


def test_the_pixel_decoder_is_that_of_fpn(f):
    g = small_network("fpn")
    g.backbone.load_state_dict(f.backbone.state_dict())
    g.head.load_state_dict(f.head.state_dict())
    X = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        assert torch.equal(f.outputs(X)["embedding"], g.outputs(X)["embedding"])
        assert torch.equal(f.embed(X), g.embed(X))
        assert (f.outputs(X)["embedding"] < 0).any()
    assert f.decoder.pixel.kernel_size == g.classifier.kernel_size == (1, 1)


def test_sine_positions():
    found, C = common.sine_positions(3, 5, 16).double().numpy(), 16
    assert found.shape == (15, C)
    for y, x in np.ndindex(3, 5):
        angle = lambda n, size, k: 2 * np.pi * (n + 1) / size / 10000**(k / 4)
        want = [wave(angle(n, size, k)) for n, size in ((y, 3), (x, 5)) for wave in (np.sin, np.cos) for k in range(4)]
        np.testing.assert_allclose(found[5 * y + x], want, atol=1e-5)


def test_wrong_widths_and_heads_are_refused():
    for more in (dict(width=18), dict(width=16, classifier="cosine")):
        with pytest.raises(common.InputError, match="no such model"):
            common.Segmenter("mask2former", SMALL, N, **more)


# ────────────────────────────────────────────────── the margin loss ──────────────────────────────────────────────────

POINTS = ((0.9, True), (0.2, True), (0.9, False), (0.1, False))                  # (max p̂, whether in D_k)


@pytest.mark.parametrize("published, values, gradients", (
    (False, (0.1**2, 0.8**2, 0.65**2, 0), (-0.1, -0.8, 0.65, 0)),
    (True, (0.9**2, 0.2**2, 1.65**2, 0.85**2), (0.9, 0.2, 1.65, 0.85))))
def test_margin_loss_at_four_points(published, values, gradients):
    """½ of each value, alone; as published, every gradient lowers the confidence, on D_k too."""
    for (p, known), value, slope in zip(POINTS, values, gradients):
        top = torch.tensor([[[p]]], dtype=torch.float64, requires_grad=True)
        known = torch.tensor([[[known]]])
        L = common.loss_margin(top, known, ~known, 0.75, published)
        L.backward()
        np.testing.assert_allclose([L.item(), top.grad.item()], [value / 2, slope], atol=1e-12)


@pytest.mark.parametrize("published", (False, True))
def test_margin_objective_of_a_pixel_head(published):
    Z, unknown = labels(3, 8, 9)
    logits = torch.randn(3, N, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    S, k, s = softmax(logits.permute(0, 2, 3, 1).numpy()), ((Z < N) & ~unknown).numpy(), unknown.numpy()
    top = -S.max(-1) if published else 1 - S.max(-1)
    L_k = -np.log(np.take_along_axis(S, np.where(k, Z.numpy(), 0)[..., None].astype(int), -1))[..., 0]
    want = L_k[k].mean() + 0.3 * ((top[k]**2).mean() + (np.maximum(0, 0.6 - top[s])**2).mean()) / 2
    found = common.objective_margin(logits, Z, unknown, 0.3, margin=0.6, published=published)
    np.testing.assert_allclose(float(found), want, rtol=1e-12)
    halves = [common.objective_margin(logits[i], Z[i], unknown[i], 0.3, int(k.sum()), int(s.sum()), 0.6, published)
              for i in (slice(0, 1), slice(1, 3))]
    np.testing.assert_allclose(float(sum(halves)), want, rtol=1e-12)


def test_margin_objective_of_a_mask_network():
    """Every prediction has its own term, of the p̂ that its cells have, upsampled."""
    (Z, unknown), sets = labels(3, 12, 16), random_sets(3, 3, 4)
    k, s = ((Z < N) & ~unknown).numpy(), unknown.numpy()
    want = literal_loss(sets, Z, unknown)[0]
    for classes, masks in sets:
        p = np.einsum("bqn,bqhw->bnhw", softmax(classes.numpy())[..., :-1], sigmoid(masks.numpy())).max(1)
        l = 1 - F.interpolate(torch.from_numpy(p)[:, None], (12, 16), mode="bilinear")[:, 0].numpy()
        want += 0.3 * ((l[k]**2).mean() + (np.maximum(0, 0.75 - l[s])**2).mean()) / 2
    np.testing.assert_allclose(float(common.objective_sets(sets, Z, unknown, 0.3)), want, rtol=1e-6)


# ─────────────────────────────────────────── the scores of a mask network ───────────────────────────────────────────

def made_by_hand(p, m):
    """p [[…], …] (Q, N + 1), m [[…], …] (Q, pixels) → (1, Q, N + 1), (1, Q, 1, pixels)."""
    return torch.tensor(p)[None], torch.tensor(m)[None, :, None]


def test_maskomaly_of_three_queries():
    p, m = made_by_hand([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.1, 0.0, 0.9]],       # class 0; 1, not sure; ∅
                        [[0.9, 0.2, 0.05, 0.5], [0.05, 0.5, 0.05, 0.9], [0.1, 0.3, 1.0, 0.2]])
    rejected = [1 - 0.72, 1 - 0.16, 1 - 0.04, 1 - 0.4]                             # query 0 alone is a class and sure
    check = lambda want, **more: np.testing.assert_allclose(evaluate.score_maskomaly(p, m, **more)[0, 0], want,
                                                            atol=1e-6)
    check(rejected)
    anomaly = [0.9 * v for v in (0.1, 0.3, 1.0, 0.2)]
    check([0.6 * r + 0.4 * a for r, a in zip(rejected, anomaly)], anomaly=[2])
    check(rejected, anomaly=[2], lam=1)
    check([1 - 0.72, min(1 - 0.16, 1 - 0.3), 1 - 0.04, min(1 - 0.4, 1 - 0.54)], ground=[1])
    check([1 - 0.72, 0, 1 - 0.04, 0], border=0.1)                                  # two masks of classes above 0.1
    p[0, 0] = torch.tensor([0.5, 0.3, 0.2])
    check([1, 1, 1, 1])                                                            # no query is sure


def test_border_is_the_loop_over_pairs():
    g = torch.Generator().manual_seed(4)
    p, m = (2 * torch.randn(2, Q, N + 1, generator=g)).softmax(2), torch.rand(2, Q, 5, 7, generator=g)**3
    found = evaluate.score_maskomaly(p, m, border=0.1)
    plain = evaluate.score_maskomaly(p, m)
    of_class = (p.argmax(2) < N).numpy()
    zero = np.zeros((2, 5, 7), bool)
    for b, i, j in np.ndindex(2, Q, Q):
        if i != j and of_class[b, i] and of_class[b, j]:
            zero[b] |= ((m[b, i] > 0.1) & (m[b, j] > 0.1)).numpy()
    assert 0.2 < zero.mean() < 0.9
    np.testing.assert_array_equal(found.numpy(), np.where(zero, 0, plain.numpy()))


def test_rejection_of_one_sure_query_a_class_has_the_order_of_maxlogit():
    """p one-hot: Σ_q p_q(c) m_q = m of the query of c, and 1 − max s_q m_q = 1 − max p̂."""
    m = torch.rand(1, N, 8, 8, generator=torch.Generator().manual_seed(5))
    classes = torch.where(torch.eye(N, N + 1) > 0, 30.0, -30.0)[None]
    logits = common.log_mixture(classes, m.logit())
    score = evaluate.score_maskomaly(classes.softmax(2), m)
    assert torch.equal(score.flatten().argsort(), evaluate.score_maxlogit(logits).flatten().argsort())


def test_refinement():
    p, m = made_by_hand([[0.97, 0.02, 0.01], [0.96, 0.02, 0.02], [0.02, 0.97, 0.01], [0.9, 0.1, 0.0]],
                        [[0.9, 0.1, 0.2, 0.0], [0.1, 0.515, 0.1, 0.0], [0.0, 0.0, 0.9, 0.0], [0.0, 0.0, 0.0, 1.0]])
    score = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    check = lambda classes, want: np.testing.assert_array_equal(evaluate.refine(score, p, m, classes)[0, 0], want)
    check([0], [0, 2, 3, 4])             # 0.96 · 0.515 < 1/2; the fourth query is not sure enough
    check([0, 1], [0, 2, 0, 4])
    check([1], [1, 2, 3, 4])             # one query alone
    # 0 is the lowest value where Σ m ≤ 1, and a · R has the same order
    a = np.random.default_rng(0).random(4)
    np.testing.assert_array_equal(np.argsort(a * (1, 0, 1, 1)), np.argsort(-np.log(1 - a) * (1, 0, 1, 1)))


def test_queries_are_ranked_by_iou():
    """Two images: the first has three anomalous pixels and two ignored, the second none; mean IoU by hand."""
    m = torch.zeros(1, 7, 1, 7)
    for q, on in enumerate(([0, 1, 2], [0, 1], [0], [0, 1, 2, 5, 6], [0, 1, 2, 3, 4], [3, 4], [])):
        m[0, q, 0, on] = 0.95
    m[0, 6] = 0.9                                                                  # not above 0.9
    f = SimpleNamespace(outputs=lambda X: dict(sets=[(torch.zeros(1, 7, N + 1), m.logit())]))
    image = torch.zeros(3, 1, 7, dtype=torch.uint8)
    Z = torch.tensor([[254, 254, 254, 1, 1, 255, 255]], dtype=torch.uint8)
    items = [(image, Z, Z == 254), (image, torch.full_like(Z, 1), Z > 255)]
    # IoU with the anomaly: 1, 2/3, 1/3, 1 (two pixels are ignored), 3/5. With class 1, the mean of two images: query 5
    # (1 + 2/7) / 2, query 4 (2/5 + 5/7) / 2, query 3 (0 + 5/7) / 2
    anomaly, ground = evaluate.rank_queries(f, items, "cpu", 1)
    assert set(list(anomaly)[:2]) == {0, 3} and list(anomaly)[2:] == [1, 4] and list(ground) == [5, 4]
    assert list(anomaly.values()) == pytest.approx([1, 1, 2 / 3, 3 / 5])
    assert list(ground.values()) == pytest.approx([(1 + 2 / 7) / 2, (2 / 5 + 5 / 7) / 2])
    assert evaluate.rank_queries(f, items, "cpu")[1] == {} == evaluate.rank_queries(f, items[1:], "cpu")[0]
    empty = SimpleNamespace(outputs=lambda X: dict(sets=[(torch.zeros(1, 7, N + 1), torch.full_like(m, -9.0))]))
    assert evaluate.rank_queries(empty, items, "cpu", 1) == ({}, {}), "a mask that never meets the anomaly is no choice"


# ──────────────────────────────────────────────────── SynthCP ────────────────────────────────────────────────────

def test_spade_without_a_label_is_batch_norm():
    torch.manual_seed(0)
    spade, x = common.Spade(4, N, 8), torch.randn(3, 4, 6, 5)
    Y = common.one_hot(labels(3, 12, 11)[0], N)
    norm = nn.BatchNorm2d(4, affine=False)
    assert not torch.allclose(spade(x, Y), norm(x), atol=1e-3)
    for conv in (spade.gamma, spade.beta):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    torch.testing.assert_close(spade(x, Y), norm(x))
    nn.init.constant_(spade.gamma.bias, 2)
    nn.init.constant_(spade.beta.bias, -1)
    torch.testing.assert_close(spade(x, Y), 3 * norm(x) - 1)


def test_one_hot_leaves_out_what_is_no_class():
    Z = labels(3, 12, 11)[0]
    Y = common.one_hot(Z, N)
    assert Y.shape == (3, N, 12, 11) and torch.equal(Y.sum(1) > 0, Z < N) and set(Y.unique().tolist()) == {0, 1}
    assert torch.equal(Y.argmax(1)[Z < N], Z[Z < N].long())


def test_score_of_the_comparison():
    g = torch.Generator().manual_seed(6)
    log_S = (4 * torch.randn(2, N, 8, 12, generator=g)).log_softmax(1)
    a, b = (torch.randn(2, 16, 2, 3, generator=g) for _ in range(2))
    found = evaluate.score_synthcp(log_S, a, b, 0.9).numpy()
    A, B = a.double().numpy(), b.double().numpy()
    cos = (A * B).sum(1) / np.linalg.norm(A, axis=1) / np.linalg.norm(B, axis=1)
    at = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in ((8, 2), (12, 3))]        # bilinear, pixel centres at i + 1/2
    for axis, points in zip((1, 2), at):
        cos = np.apply_along_axis(lambda v, p=points: np.interp(p, np.arange(len(v)), v), axis, cos)
    top = np.exp(log_S.double().numpy()).max(1)
    assert 0.1 < (top > 0.9).mean() < 0.9
    np.testing.assert_allclose(found, 1 - np.where(top > 0.9, top, cos), atol=1e-6)
    same = evaluate.score_synthcp(log_S, a, a)
    assert (same <= 1e-3 + 1e-6).all(), "a synthesis that looks like the image is no anomaly anywhere"
    sure = torch.zeros(1, 2, 1, 4)
    sure[0, 0, 0] = torch.tensor([17.0, 18, 20, 30])             # max S is 1 in float32 for the last two
    score = evaluate.score_synthcp(sure.log_softmax(1), a[:1], b[:1]).flatten()
    assert (score.diff() < 0).all() and score[3] > 0


def literal_spade(spade, x, Y):
    conv = lambda m, v: F.conv2d(v, m.weight, m.bias, padding=1)
    hidden = torch.clamp(conv(spade.shared, F.interpolate(Y, x.shape[-2:], mode="nearest")), min=0)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * (1 + conv(spade.gamma, hidden)) + conv(spade.beta, hidden)


@pytest.mark.parametrize("c_in, c_out", ((4, 4), (6, 3)))
def test_a_block_of_spade_is_the_literal_one(c_in, c_out):
    torch.manual_seed(3)
    block = common.SpadeBlock(c_in, c_out, N, 8).double()
    x = torch.randn(3, c_in, 6, 5, dtype=torch.float64)
    Y = common.one_hot(labels(3, 12, 11)[0], N).double()
    for _ in range(100):
        block(x, Y)                                              # the power iteration of spectral norm settles
    weights = [conv.weight for conv in (*block.convs, *(block.beside or ())[1:])]
    for weight in weights:
        assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1, rel=1e-3)
    leaky = lambda v: torch.where(v > 0, v, 0.2 * v)
    y = x
    for spade, conv, weight in zip(block.norms, block.convs, weights):
        y = F.conv2d(leaky(literal_spade(spade, y, Y)), weight, conv.bias, padding=1)
    beside = F.conv2d(literal_spade(block.beside[0], x, Y), weights[2]) if c_in != c_out else x
    torch.testing.assert_close(block(x, Y), beside + y, rtol=1e-4, atol=1e-5)


def test_the_discriminator_is_the_literal_one():
    torch.manual_seed(4)
    D = common.PatchDiscriminator(N + 3, 4).double()
    x = torch.randn(2, N + 3, 40, 56, dtype=torch.float64)
    for _ in range(100):
        D(x)
    D.eval()
    leaky = lambda v: torch.where(v > 0, v, 0.2 * v)
    for k, (layers, found) in enumerate(zip(D.scales, D(x))):
        y = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) if k else x
        for i, stride in enumerate((2, 2, 2, 1)):
            conv = layers[i][0]
            y = F.conv2d(y, conv.weight, conv.bias, stride, 2)
            if i:
                assert conv.bias is None
                assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1, rel=1e-3)
                y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
            y = leaky(y)
            torch.testing.assert_close(found[i], y)
        torch.testing.assert_close(found[4], F.conv2d(y, layers[4].weight, layers[4].bias, 1, 2))


@pytest.fixture(scope="module")
def gan():
    frozen = small_network("fpn").requires_grad_(False)
    return frozen, common.Synthesizer(SMALL, N, 1).double()


def synthesis_batch():
    return dict(image=torch.randint(0, 256, (4, 3, 40, 56), dtype=torch.uint8,
                                    generator=torch.Generator().manual_seed(0)), label=labels(4, 40, 56)[0])


def test_one_backward_pass_is_the_two_of_a_gan(gan, monkeypatch):
    """L_G does not move D and L_D not G: the gradients are those of two separate passes with plain calls of D."""
    frozen, model = gan
    monkeypatch.setattr(common, "to_input", lambda X: X.double() / 255)
    monkeypatch.setattr(common, "one_hot", lambda Z, n, make=common.one_hot: make(Z, n).double())
    frozen, model, part = copy.deepcopy(frozen).double(), copy.deepcopy(model), synthesis_batch()
    model.eval()                                             # spectral norm stands still: the calls can be compared
    loss = finetune.synthesis_objective(frozen, model.outputs, part, [0, 0, 8])
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}

    X, Y = part["image"].double() / 255, F.one_hot(torch.where(part["label"] < N, part["label"], N).long(),
                                                   N + 1)[..., :N].permute(0, 3, 1, 2).double()
    G, D = model.generator, model.discriminator
    image, real, total = G(Y), D(torch.cat([Y, X], 1)), 0.0
    for net in (G, D):
        model.zero_grad()
        seen = D(torch.cat([Y, image if net is G else image.detach()], 1))
        if net is G:
            L = sum(-s[-1].mean() for s in seen) / 2
            for k in range(2):
                L = L + 10 * sum((seen[k][i] - real[k][i].detach()).abs().mean() for i in range(4)) / 2
            maps = [[*frozen.backbone((x - frozen.mean) / frozen.std).values(), frozen.embed(x)] for x in (image, X)]
            L = L + 10 * sum((a - b).abs().mean() * w for a, b, w in zip(*maps, (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)))
        else:
            L = sum(torch.clamp(1 - r[-1], min=0).mean() + torch.clamp(1 + s[-1], min=0).mean()
                    for r, s in zip(real, seen)) / 2
        grads = torch.autograd.grad(L, list(net.parameters()), retain_graph=True)
        total += L.item()
        prefix = "generator." if net is G else "discriminator."
        for (name, _), want in zip(net.named_parameters(), grads):
            torch.testing.assert_close(found[prefix + name], want / 2, rtol=1e-6, atol=1e-12)   # 4 of 8 images
    assert loss.item() == pytest.approx(total / 2, rel=1e-9)
    assert all(p.grad is None for p in frozen.parameters())


def test_generator_and_discriminator_shapes(gan):
    model = copy.deepcopy(gan[1]).float()
    for H, W in ((64, 128), (33, 70)):
        Y = common.one_hot(labels(2, H, W)[0], N)
        image = model(Y)
        assert image.shape == (2, 3, H, W) and 0 <= image.min() and image.max() <= 1
        found = model.discriminator(torch.cat([Y, image], 1))
        assert [len(s) for s in found] == [5, 5] and all(s[-1].shape[1] == 1 for s in found)
        assert found[1][0].shape[-1] < 0.6 * found[0][0].shape[-1]                 # the second sees half the size
    widths = [64 * b.convs[1].out_channels for b in model.generator.blocks]
    assert 64 * model.generator.first.out_channels == 1024 and widths == [1024, 1024, 1024, 512, 256, 128, 64]


# ──────────────────────────────────────────────────── the scripts ────────────────────────────────────────────────────

SYNTHESIS = ("--synthesis", "--batch-size", 3, "--schedule", "constant", "--generator-width", 1)


@pytest.fixture(scope="module")
def masks(tmp_path_factory, small):
    """A folder with m2f.pt, a mask network of two steps, its auxiliary set, and a generator of it."""
    folder = tmp_path_factory.mktemp("masks")
    run_ok("pretrain.py", "--root", small / "toy", "--arch", "mask2former", "--width", 16, "--queries", Q,
           "--decoder-layers", 1, "--attention", "global", "--epochs", 1, "--batch-size", 3, "--crop", 32, 48, "--out",
           "m2f.pt", folder=folder)
    checkpoint = torch.load(folder / "m2f.pt", weights_only=True)
    for name in ("weight", "bias"):                              # two steps teach no mask: let them be some m > 0.9
        checkpoint["model"][f"decoder.mask.4.{name}"] *= 50
    torch.save(checkpoint, folder / "m2f.pt")
    run_ok("mgu_generate.py", "--ckpt", "m2f.pt", "--per-class", 1, "--max-steps", 1, folder=folder)
    for path in (folder / "auxiliary").glob("*.npz"):            # nor a class, so that nothing flips: D_s is I_ỹ
        sample = common.load_sample(path)
        common.save_npz(path, dict(sample, unknown=sample["label"] == sample["y"]))
    manifest = common.load_json(folder / "auxiliary/manifest.json")
    assert manifest.pop("unknown_pixels") == 0
    common.save_json(folder / "auxiliary/manifest.json", manifest)
    run_ok("finetune.py", "--ckpt", "m2f.pt", *SYNTHESIS, "--epochs", 1, folder=folder)
    return folder


def test_a_mask_network_goes_through_every_stage(masks):
    checkpoint = torch.load(masks / "m2f.pt", weights_only=True)
    facts = ("mask2former", "global", Q, 1, 16)
    assert tuple(checkpoint[k] for k in ("arch", "attention", "queries", "decoder_layers", "width")) == facts
    f = common.load_checkpoint(masks / "m2f.pt")[0]
    assert tuple(common.model_facts(f)[k] for k in ("arch", "attention", "queries", "decoder_layers", "width")) == facts
    for loss, more in (("margin", ("--margin", 0.5)), ("kl", ())):
        run_ok("finetune.py", "--ckpt", "m2f.pt", "--loss", loss, *more, "--epochs", 1, "--out", f"{loss}.pt",
               folder=masks)
    settings = torch.load(masks / "margin.pt", weights_only=True)["settings"]
    assert (settings["margin"], settings["margin_published"], settings["alpha"]) == (0.5, False, 1)
    said = run_ok("evaluate.py", "--ckpt", "margin.pt", "--score", "maxlogit", "maskomaly", "msp", "--queries-from",
                  "auxiliary", "--ground", "road", "--lambda", 0.7, "--border", 0.05, "--panels", 0, folder=masks)
    assert re.search(r"anomaly queries \d \(IoU 0\.\d\d\).*; ground queries \d.*; of auxiliary", said.out)
    results = json.loads((masks / "results/results.json").read_text())
    assert results["protocol"]["maskomaly"] == dict(
        border=0.05, ground="road", share_of_rejection=0.7,
        queries_from=common.fingerprint(masks / "auxiliary/manifest.json"))
    rows = results["rows"]
    assert [r["score"] for r in rows] == ["maxlogit", "maskomaly", "msp"]
    assert all(np.isfinite(list(r["pooled"].values())).all() for r in rows)
    run_ok("evaluate.py", "--ckpt", "m2f.pt", "--score", "maxlogit", "--refine", "road", "building", "--panels", 0,
           folder=masks)
    results = json.loads((masks / "results/results.json").read_text())
    assert results["protocol"]["refine"] == ["road", "building"]
    got = results["rows"][0]["pooled"]["aupr"]
    truth, scores = [], []
    scenes = common.Scenes("toy", checkpoint["root"], "test")
    for item in (scenes[i] for i in range(len(scenes))):
        with torch.no_grad():
            scores.append(-f(common.to_input(item["image"][None])).amax(1).flatten().numpy())    # no query is so sure
        truth.append((item["label"] == 254).flatten().numpy())
    assert got == pytest.approx(100 * average_precision_score(np.concatenate(truth), np.concatenate(scores)), abs=0.1)


def test_a_mask_network_with_an_outlier_head(masks):
    """Any source and loss goes with it, but for prototypes, which take the place of a classifier that it has not."""
    run_ok("finetune.py", "--ckpt", "m2f.pt", "--method", "densehybrid", "--negatives", "mgu", "--epochs", 1, "--out",
           "hybrid.pt", folder=masks)
    run_ok("evaluate.py", "--ckpt", "hybrid.pt", "--score", "hybrid", "--panels", 0, "--out", "hybrid", folder=masks)
    assert 0 < json.loads((masks / "hybrid/results.json").read_text())["pooled"]["aupr"] < 100
    done = run("finetune.py", "--ckpt", "m2f.pt", "--prototypes", 1, folder=masks)
    assert done.code == 1 and "a mask network has no classifier" in done.err and done.err.count("\n") == 1, done.err


def test_a_generator_belongs_to_one_checkpoint(masks, small):
    generator = torch.load(masks / "generator.pt", weights_only=True)
    assert generator["companion_of"] == common.fingerprint(masks / "m2f.pt")
    assert not [k for k in generator["model"] if "backbone" in k], "the frozen network is not stored again"
    groups = generator["optimiser"]["param_groups"]              # the discriminator learns four times as fast
    assert [(g["factor"], tuple(g["betas"])) for g in groups] == [(1, (0, 0.9)), (4, (0, 0.9))]
    lr = generator["settings"]["lr"]
    assert [g["lr"] for g in groups] == pytest.approx([lr, 4 * lr])
    run_ok("evaluate.py", "--ckpt", "m2f.pt", "--score", "synthcp", "--generator", "generator.pt", "--panels", 0,
           folder=masks)
    results = json.loads((masks / "results/results.json").read_text())
    assert results["protocol"]["synthcp"] == dict(generator=common.fingerprint(masks / "generator.pt"), threshold=0.999)
    assert np.isfinite(list(results["rows"][0]["pooled"].values())).all()
    shutil.copy(small / "pretrained.pt", masks / "other.pt")
    for args, told in ((("--ckpt", "other.pt", "--score", "synthcp", "--generator", "generator.pt"), "for another"),
                       (("--ckpt", "generator.pt"), "synthesis of another checkpoint, no segmenter")):
        done = run("evaluate.py", *args, folder=masks)
        assert done.code == 1 and told in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("name, changed, told", (
    ("synthcp", dict(baseline=["other.pt"]), "other.pt .* finetune.py --synthesis --ckpt other.pt"),
    ("synthcp", dict(generator="other.pt"), "other.pt: a checkpoint of pretrain; expected one of .* --synthesis"),
    ("maskomaly", dict(queries_from="foreign"), "foreign/manifest.json: of other classes"),
    ("maskomaly", dict(queries_from="val"), "val: no anomalous pixel"),
    ("maskomaly", dict(queries_from="nowhere"), "nowhere/manifest.json: no such file; expected"),
    ("maskomaly", dict(queries_from="unfinished"), "unfinished/manifest.json: no samples: the set is not complete"),
    ("maskomaly", dict(queries_from="val", ground="lamp"), "--ground lamp: no such class"),
    ("maxlogit", dict(refine=["lamp"]), "--refine lamp: no such class")))
def test_what_a_score_needs_is_refused_in_one_line(masks, small, monkeypatch, name, changed, told):
    monkeypatch.chdir(masks)
    shutil.copy(small / "pretrained.pt", "other.pt")
    os.makedirs("unfinished", exist_ok=True)
    with open("unfinished/manifest.json", "w") as file:
        file.write('{"format": 1, "settings": {}}')
    shutil.copytree("auxiliary", "foreign", dirs_exist_ok=True)
    common.save_json("foreign/manifest.json", dict(common.load_json("auxiliary/manifest.json"), classes=["a", "b"]))
    args = dict(ckpt=["m2f.pt"], baseline=[], generator="generator.pt", split="test", queries_from=None, ground=None,
                refine=None, data=None, train_root=None)
    of = changed.get("baseline", ["m2f.pt"])[0]
    f, checkpoint = common.load_checkpoint(of)
    f.origin = of, checkpoint
    with pytest.raises(common.InputError, match=told):
        evaluate.prepare_scores([f], [name],
                                argparse.Namespace(**{**args, **changed}), torch.device("cpu"))


def test_queries_are_not_chosen_on_images_that_are_evaluated(masks):
    """Whatever their data sets and splits are called."""
    _, checkpoint = common.load_checkpoint(masks / "m2f.pt")
    opened = {split: common.Scenes("toy", checkpoint["root"], split) for split in ("val", "test")}
    for place, tested, refused in (("test", "test", True), ("val", "val", True), ("test", "val", False),
                                   (None, "test", False), ("auxiliary", "test", False)):
        check = lambda: evaluate.check_queries(argparse.Namespace(queries_from=place, train_root=None),
                                               {tested: opened[tested]}, checkpoint)
        if refused:
            with pytest.raises(common.InputError, match=f"--queries-from {place}: .* that are evaluated, .*png among"):
                check()
        else:
            check()


def test_ground_queries_are_of_what_is_no_anomaly(masks):
    """D_s of a sample of road keeps the label road."""
    Z = torch.zeros(8, 8, dtype=torch.uint8)
    anomalous = torch.zeros(8, 8, dtype=torch.bool)
    anomalous[:, :4] = True
    m = torch.full((1, 2, 8, 8), -9.0)
    m[0, 0, :, :4] = m[0, 1, :, 4:] = 9
    f = argparse.Namespace(outputs=lambda X: dict(sets=[(torch.zeros(1, 2, 3), m)]))
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert evaluate.rank_queries(f, [(image, Z, anomalous)], "cpu", ground=0) == ({0: 1.0}, {1: 1.0})


def test_what_the_options_of_a_score_do(masks, monkeypatch):
    """make_mask_score and make_synthcp hand their options on."""
    monkeypatch.chdir(masks)
    f, checkpoint = common.load_checkpoint("m2f.pt")
    f.origin = "m2f.pt", checkpoint
    X = torch.rand(1, 3, 54, 96, generator=torch.Generator().manual_seed(1))
    given = dict(ckpt=["m2f.pt"], baseline=[], generator="generator.pt", split="test", queries_from="auxiliary",
                 ground="road", refine=[checkpoint["classes"][1]], data=None, train_root=None, lam=0.3, border=0.2,
                 synthcp_threshold=1.0)
    make = lambda name, **more: evaluate.prepare_scores([f], [name], argparse.Namespace(**{**given, **more}),
                                                        torch.device("cpu"))[name]
    with torch.no_grad():
        seen = evaluate.forward([f], X)
        p, m = evaluate.masks_of(seen["each"][0], X.shape[-2:])
        queries = [list(part) for part in evaluate.rank_queries(f, evaluate.labelled_anomalies(
            "auxiliary", checkpoint, None), "cpu", checkpoint["classes"].index("road"))]
        assert all(queries)
        want = evaluate.score_maskomaly(p, m, *queries, lam=0.3, border=0.2)
        assert torch.equal(make("maskomaly")(X, seen, 0), want)

        G = common.load_checkpoint("generator.pt", companion="synthesis")[0]
        of = lambda x: f.activation(f.embed(x))
        a, b = of(X), of(G(F.one_hot(seen["logits"].argmax(1), f.num_classes).movedim(-1, 1).float()))
        cos = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
        want = 1 - F.interpolate(cos[:, None], X.shape[-2:], mode="bilinear")[:, 0]
        torch.testing.assert_close(make("synthcp")(X, seen, 0), want, rtol=1e-4, atol=1e-5)

        # --refine: two queries that are sure of class 1, in the left half
        classes = torch.full((1, Q, f.num_classes + 1), -9.0)
        classes[0, :2, 1], classes[0, 2:, -1] = 9, 9
        masks_ = torch.full((1, Q, 2, 4), -9.0)
        masks_[0, :2, :, :2] = 9
        hand = dict(seen, each=[dict(sets=[(classes, masks_)], logits=torch.randn(1, f.num_classes, 8, 16))])
        score = make("maxlogit")(torch.zeros(1, 3, 8, 16), hand, 0)
        assert (score[..., :7] == 0).all() and (score[..., 9:] != 0).all()


def test_flags_without_effect_are_refused(monkeypatch, capsys):
    for args, told in (("--refine road", "--refine: without effect on --score msp; it is for maxlogit"),
                       ("--score maskomaly --ground road", "maskomaly with --queries-from"),
                       ("--score maskomaly --lambda 0.5", "--lambda: without effect"),
                       ("--score maskomaly --queries-from val --lambda 3", "share of at most 1"),
                       ("--border 0.1", "--border: without effect on --score msp; it is for maskomaly"),
                       ("--synthcp-threshold 0.5", "it is for synthcp"), ("--knn-k 5", "it is for knn cknn"),
                       ("--score synthcp", "--generator: --score synthcp needs it"),
                       ("--score maxlogit --generator x.pt", "it is for synthcp"),
                       ("--passes 5", "--passes: without effect on --score msp"), ("--crf-iterations 3", "is for crf"),
                       ("--max-side 64", "it is for --images"), ("--size 400", "a factor of at most 16"),
                       ("--images a.png --open --components --panels 3 --baseline b.pt",
                        "--images: goes without --baseline, --components, --open, --panels"),
                       ("--images a.png --data toy --root d --split val --unlabeled ignore --ignore-classes car "
                        "--per-image --operating-point 0.9", "goes without --data, --root, --split, --unlabeled, "
                        "--ignore-classes, --per-image, --operating-point")):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *args.split()])
        with pytest.raises(SystemExit):
            evaluate.parse()
        assert told in capsys.readouterr().err
    for args in ("--margin-published", "--synthesis --alpha 1", "--synthesis --mix clean", "--loss margin --gamma 0.1",
                 "--loss margin --negatives flow", "--loss margin --method densehybrid --patches x",
                 "--method mask2anomaly --gamma 0.3", "--method mask2anomaly --negatives flow", "--margin 0.5",
                 "--loss kl --margin 0.5", "--synthesis --margin 0.5"):
        monkeypatch.setattr("sys.argv", ["finetune.py", *args.split()])
        with pytest.raises(SystemExit):
            finetune.parse()
    monkeypatch.setattr("sys.argv", ["finetune.py", "--loss", "margin"])
    args = finetune.parse()
    assert args.out == "ft.pt" and "alpha 1.0 (method)" in common.resolve(args, "finetune", "toy", "fpn")
    for given in ("--images clean", "--negatives paste --patches x --paste-control off"):   # L_k alone: no term on D_k
        monkeypatch.setattr("sys.argv", ["finetune.py", "--method", "mask2anomaly", *given.split()])
        args = finetune.parse()
        assert "alpha 0.0 (flag)" in common.resolve(args, "finetune", "toy", "fpn") and args.alpha == 0
    for given in ("--method mask2anomaly", "--loss margin"):
        monkeypatch.setattr("sys.argv", ["finetune.py", *given.split(), "--margin-published", "--margin", "0.5"])
        args = finetune.parse()
        assert (args.margin, args.margin_published) == (0.5, True)


def test_a_score_of_masks_needs_a_mask_network():
    with pytest.raises(common.InputError, match="--arch mask2former"):
        evaluate.masks_of(dict(logits=torch.zeros(1, N, 4, 4)), (4, 4))


def test_a_synthesis_that_is_continued_is_the_same(masks, tmp_path):
    """Two epochs at once, and one after the other: G, D, and the vectors of the spectral norms, bit for bit."""
    for name in ("m2f.pt", "generator.pt", "generator.jsonl"):
        shutil.copy(masks / name, tmp_path)
    for out in ("generator.pt", "at_once.pt"):
        run_ok("finetune.py", "--ckpt", "m2f.pt", *SYNTHESIS, "--epochs", 2, "--out", out, folder=tmp_path)
    first, one, two = (torch.load(path, weights_only=True)["model"] for path in (
        masks / "generator.pt", tmp_path / "generator.pt", tmp_path / "at_once.pt"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    for part in ("generator.", "discriminator."):
        assert any(not torch.equal(v, first[k]) for k, v in one.items() if k.startswith(part))
    done = run("finetune.py", "--synthesis", "--loss", "kl", folder=tmp_path)
    assert done.code == 2 and "argument --loss: has no effect with synthesis" in done.err


def test_mgu_runs_on_a_mask_network(f):
    """Algorithm 1 sees p̂ / Σ p̂: a step against it lowers S_ỹ."""
    g = mgu_generate.fold_batch_norm(f)
    X = torch.randint(0, 256, (2, 3, 40, 56)).float()
    y = g(X / 255).argmax(1).flatten(1).mode().values
    I = torch.ones(2, 40, 56, dtype=torch.bool)
    P, X_next = mgu_generate.update(g, X, I, y, 50.0)
    assert P.any((1, 2)).all() and not torch.equal(X, X_next)
    S = [g(x / 255).softmax(1)[torch.arange(2), y][P].mean() for x in (X, X_next)]
    assert S[1] < S[0]
