"""DenseHybrid, noisy negatives, Real NVP outliers: losses and scores in float64, pasting, the flow, its training."""
import argparse
import functools
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import evaluate
import finetune
import pretrain
from runner import run, run_ok, run_ranks, without_figures

run, run_ok, run_ranks = without_figures(run, run_ok, run_ranks)
OUTLIER_SCORES = ("outlier", "outlier_msp", "hybrid")

N, H, W = 4, 40, 56


# ─────────────────────────────────────────── losses, in float64 ───────────────────────────────────────────

def batch(seed=0, B=4, dtype=torch.float64):
    """logits (B, N, 5, 6), Z with 255 and 254 in it, unknown (none in image 0), outlier logit d."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(3 * rng.standard_normal((B, N, 5, 6)), dtype=dtype)
    Z = torch.tensor(rng.choice([*range(N), 255, 254], (B, 5, 6)), dtype=torch.uint8)
    unknown = torch.tensor(rng.random((B, 5, 6)) < np.linspace(0, 0.6, B)[:, None, None])
    return logits, Z, unknown, torch.tensor(2 * rng.standard_normal((B, 5, 6)), dtype=dtype)


def reference(logits, Z, unknown, d, alpha, loss, gamma):
    """The objective one pixel at a time, from the definitions."""
    k, s, b = [], [], []
    for p in np.ndindex(*Z.shape):
        z = logits[p[0], :, p[1], p[2]].double().numpy()
        S = np.exp(z) / np.exp(z).sum()
        M, U = (S + 1 / N) / 2, np.full(N, 1 / N)
        if unknown[p]:
            s.append(dict(energy=lambda: math.log(np.exp(z).sum()), kl=lambda: (U * np.log(U / S)).sum(),
                          js=lambda: ((S * np.log(S / M)).sum() + (U * np.log(U / M)).sum()) / 2)[loss]())
            b.append(-math.log(1 / (1 + math.exp(-d[p]))))
        elif Z[p] < N:
            k.append(-math.log(S[Z[p]]))
            b.append(-math.log(1 - 1 / (1 + math.exp(-d[p]))))
    return np.mean(k) + alpha * np.mean(s) + gamma * np.mean(b)


@pytest.mark.parametrize("loss", ("energy", "kl", "js"))
@pytest.mark.parametrize("dtype, near", ((torch.float64, 1e-12), (torch.float32, 1e-6)))
def test_objective(loss, dtype, near):
    logits, Z, unknown, d = batch(dtype=dtype)
    got = common.objective_outlier(logits, Z, unknown, 0.03, loss, outlier=d, gamma=0.3)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(reference(logits, Z, unknown, d, 0.03, loss, 0.3), rel=near)


def test_gradients_in_closed_form():
    """∂/∂z of the energy term: α S / n_s on D_s, 0 elsewhere. ∂/∂d: γ (σ(d) − t) / (n_k + n_s), 0 without a class."""
    logits, Z, unknown, d = (t.requires_grad_(t.is_floating_point()) for t in batch(1))
    only_s = torch.full_like(Z, 255)                                        # no D_k: the energy term alone
    g, = torch.autograd.grad(common.objective_outlier(logits, only_s, unknown, 0.7, "energy"), logits)
    want = 0.7 * torch.softmax(logits, 1) / unknown.sum() * unknown[:, None]
    torch.testing.assert_close(g, want.detach(), rtol=1e-12, atol=0)
    g, = torch.autograd.grad(common.objective_outlier(logits, Z, unknown, 0, outlier=d, gamma=0.3), d)
    counted = unknown | (Z < N)
    want = 0.3 * (torch.sigmoid(d) - unknown.double()) / counted.sum() * counted
    torch.testing.assert_close(g, want.detach(), rtol=1e-12, atol=0)
    assert (~counted).any() and unknown.any()


@pytest.mark.parametrize("loss", common.LOSSES)
def test_parts_sum_to_the_whole(loss):
    logits, Z, unknown, d = (t.requires_grad_(t.is_floating_point()) for t in batch(2, B=5))
    whole = common.objective_outlier(logits, Z, unknown, 0.5, loss, outlier=d, gamma=0.3)
    n_k, n_s = int(((Z < N) & ~unknown).sum()), int(unknown.sum())
    parts = sum(common.objective_outlier(logits[p], Z[p], unknown[p], 0.5, loss, n_k, n_s, outlier=d[p], gamma=0.3)
                for p in (slice(0, 1), slice(1, 3), slice(3, 5)))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(parts, (logits, d)), torch.autograd.grad(whole, (logits, d))):
        torch.testing.assert_close(one, other)


def test_without_weights_it_is_L_k_bit_for_bit():
    logits, Z, unknown, d = batch(3, dtype=torch.float32)
    L_k = common.masked_mean(common.loss_k(common.log_softmax(logits), Z), (Z < N) & ~unknown)
    for loss in common.LOSSES:
        assert torch.equal(common.objective_outlier(logits, Z, unknown, 0, loss, outlier=d, gamma=0.0), L_k)


@pytest.mark.parametrize("size", (1e4, -1e4))
def test_extreme_values_are_finite(size):
    logits, Z, unknown, d = batch(4, dtype=torch.float32)
    logits[:, 2] = size
    d = torch.full_like(d, size).requires_grad_(True)
    logits.requires_grad_(True)
    for loss in common.LOSSES:
        value = common.objective_outlier(logits, Z, unknown, 0.05, loss, outlier=d, gamma=0.3)
        assert value.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(value, (logits, d)))
    js = common.loss_js(common.log_softmax(logits.detach()))
    assert (js >= -1e-6).all() and (js <= math.log(2)).all()
    assert abs(common.loss_js(common.log_softmax(torch.zeros(1, N, 2, 2)))).max() < 1e-6


# ─────────────────────────────────────────── scores, in float64 ───────────────────────────────────────────

def scores(logits, d):
    """{name: score} of one model, or an ensemble, that says these lists of logits and d."""
    fs = [argparse.Namespace(outlier=True, outputs=lambda X, z=z, d=d: dict(logits=z, outlier=d))
          for z, d in zip(logits, d)]
    made = evaluate.prepare_scores(fs, OUTLIER_SCORES, argparse.Namespace(refine=None), "cpu")
    return evaluate.anomaly_scores(fs, None, 0, made)[0]


@pytest.mark.parametrize("models", (1, 3))
def test_scores(models):
    """From P(outlier) as the softmax of two logits (−d/2, d/2), as DenseHybrid's head has: one logit says as much."""
    pairs = [batch(5 + m) for m in range(models)]
    logits, d = [p[0].float() for p in pairs], [p[3].float() for p in pairs]
    P = np.mean([torch.softmax(torch.stack([-v / 2, v / 2]).double(), 0)[1].numpy() for v in d], 0)
    S = np.mean([torch.softmax(z.double(), 1).numpy() for z in logits], 0)
    z = np.mean([z.double().numpy() for z in logits], 0)
    want = dict(outlier=np.log(P), outlier_msp=np.log(1 - (1 - P) * S.max(1)),
                hybrid=np.log(P) - np.log(np.exp(z).sum(1)))
    got = scores(logits, d)
    assert got.keys() == want.keys()
    for name, score in got.items():
        assert score.dtype == torch.float32
        np.testing.assert_allclose(score, want[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_scores_neither_tie_nor_overflow():
    """Where σ(d) is 0 in float32 (d below −104), or 1 and max S too, the order of the exact values stays."""
    low = torch.linspace(-1e4, -50, 60).view(1, 6, 10)
    zero = torch.zeros(1, N, 6, 10)
    assert (torch.sigmoid(low) == 0).float().mean() > 0.9
    for name in ("outlier", "hybrid"):
        score = scores([zero], [low])[name].ravel()
        assert score.isfinite().all() and (score.diff() > 0).all()
    sure = zero.clone()
    sure[:, 1] = 30 - torch.linspace(0, 10, 60).view(6, 10)              # 1 − max S from 3e-13 on: max S = 1 in float32
    score = scores([sure], [torch.full((1, 6, 10), -40.0)])["outlier_msp"].ravel()
    assert (torch.softmax(sure, 1).max(1).values == 1).any() and (score.diff() > 0).all()
    for d in (1e4, -1e4):
        for z in (1e4, -1e4):
            logits = zero.clone()
            logits[:, 2] = z
            assert all(s.isfinite().all() for s in scores([logits], [torch.full((1, 6, 10), d)]).values())


# ──────────────────────────────────────────── pasted negatives ────────────────────────────────────────────

class Streets(torch.utils.data.Dataset):
    """Six random images whose colours are below 100, as a stand-in for TrainingScenes."""

    def __len__(self):
        return 6

    def name(self, i):
        return f"street {i}"

    def identity(self):
        return "six"

    def __getitem__(self, key):
        rng = np.random.default_rng(key)
        Z = rng.integers(0, N, (H, W), np.uint8)
        Z[:2] = common.IGNORED
        return dict(image=torch.tensor(rng.integers(0, 100, (3, H, W), np.uint8)), label=torch.tensor(Z), index=key[1])


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """A photograph without a mask, a cut-out with alpha, an image with a mask beside it; colours above 150."""
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :50]
    disc = ((y - 25)**2 + (x - 30)**2 < 15**2)
    photo, cut_out, beside = rng.integers(150, 256, (3, 60, 50, 3), np.uint8)
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(np.dstack([cut_out, 255 * disc.astype(np.uint8)])).save(folder / "cut_out.png")
    Image.fromarray(beside).save(folder / "beside.png")
    Image.fromarray(disc).save(folder / "beside_mask.png")
    for kind in ("photo", "cut_out"):
        (folder / kind).mkdir()
        (folder / kind / "p.png").write_bytes((folder / f"{kind}.png").read_bytes())
    return folder


def pasted(folder, cut="side", sizes=(0.1, 0.5), seed=3, **more):
    return finetune.Pasted(Streets(), folder, seed, cut, sizes, **more)


@pytest.mark.parametrize("cut, sizes", (("side", (0.1, 0.5)), ("area", (0.001, 0.1)), ("area", (0.5, 1))))
def test_paste_changes_the_patch_and_nothing_else(patches, cut, sizes):
    data, streets, seen = pasted(patches, cut, sizes), Streets(), 0
    for epoch in range(4):
        for i in range(6):
            item, clean = data[epoch, i], streets[epoch, i]
            D_s = item["unknown"]
            assert item["image"].dtype == item["label"].dtype == torch.uint8 and item["index"] == i
            assert torch.equal(item["image"][:, ~D_s], clean["image"][:, ~D_s])
            assert torch.equal(item["label"][~D_s], clean["label"][~D_s])
            assert (item["label"][D_s] == common.IGNORED).all() and (item["image"][:, D_s] >= 150).all()
            seen += int(D_s.any())
    assert seen == 24


def test_patch_is_the_resized_image(patches):
    """Inside: what Pillow makes of the whole image at that size, mirrored or not. The area: as drawn."""
    photo = Image.open(patches / "photo.png")
    areas, mirrored = [], []
    for i in range(12):
        item = pasted(patches / "photo", "area", (0.02, 0.3))[i // 6, i % 6]
        rows, columns = torch.where(item["unknown"].any(1))[0], torch.where(item["unknown"].any(0))[0]
        h, w = len(rows), len(columns)
        assert item["unknown"].sum() == h * w                              # a rectangle
        found = item["image"][:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].permute(1, 2, 0).numpy()
        want = [np.asarray(image.resize((w, h), Image.BILINEAR)) for image in
                (photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
        assert any(np.array_equal(found, image) for image in want)
        mirrored.append(np.array_equal(found, want[1]))
        assert abs(h / w - 60 / 50) < 1.5 / w + 1.5 / h
        areas.append(h * w / (H * W))
    assert 0.02 * 0.75**2 * 0.8 < min(areas) and max(areas) < 0.3 * 1.5**2 * 1.1 and np.ptp(areas) > 0.02
    assert 0 < sum(mirrored) < 12


class Drawn:
    """A stand-in for a generator, whose draws are told."""

    def __init__(self, uniform, random=1.0):
        self.values, self.value = uniform, random

    def uniform(self, low, high, n=None):
        return np.array(self.values) if n else self.values

    def random(self):
        return self.value

    def integers(self, low, high):
        return low


def test_sizes_are_those_drawn():
    """Sides and areas within a pixel row and column of the draw, for any shape of patch, and never beyond the image."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        h, w = rng.integers(5, 300, 2)
        image, all_of_it = np.zeros((h, w, 3), np.uint8), np.ones((h, w), bool)
        share = rng.uniform(0.01, 0.9)
        patch, mask = finetune.cut_patch(image, all_of_it, "area", (0, 1), (90, 160), Drawn(share))
        fits = math.sqrt(share * 90 * 160 / (h * w)) <= min(90 / h, 160 / w)
        a, b = mask.shape
        assert patch.shape == (a, b, 3) and mask.all() and a <= 90 and b <= 160
        assert not fits or (a - 1) * (b - 1) <= share * 90 * 160 <= (a + 1) * (b + 1)
        assert fits or a == 90 or b == 160
        sides = rng.uniform(0.02, 0.49, 2)
        patch, mask = finetune.cut_patch(image, all_of_it, "side", (0.02, 0.49), (90, 160), Drawn(sides))
        assert mask.all() and np.abs(np.array(mask.shape) - 90 * sides).max() <= 1 and patch.shape[:2] == mask.shape
        disc = all_of_it.copy()
        disc[0, 0] = False                                                 # a mask: its longer side is what was drawn
        patch, mask = finetune.cut_patch(image, disc, "side", (0.02, 0.49), (90, 160), Drawn(0.4))
        assert max(mask.shape) == 36 and abs(min(mask.shape) - 36 * min(h, w) / max(h, w)) <= 1


def test_masks_cut(patches, tmp_path):
    """Alpha and NAME_mask.png: the disc's box, and its share of it (π/4)."""
    for name, mask in (("cut_out.png", None), ("beside.png", patches / "beside_mask.png")):
        image, found = finetune.read_patch(patches / name, mask)
        assert found.shape == image.shape[:2] == (29, 29) and found.mean() == pytest.approx(math.pi / 4, abs=0.05)
        assert np.array_equal(image, np.asarray(Image.open(patches / name).convert("RGB"))[11:40, 16:45])
    assert len(pasted(patches).patches) == 3 + 2                           # no mask among them
    for mode in ("P", "RGB"):                                              # one palette index or colour is transparent
        disc = np.zeros((50, 60), np.uint8)
        disc[(np.mgrid[:50, :60][0] - 25)**2 + (np.mgrid[:50, :60][1] - 30)**2 < 14.5**2] = 9
        image = Image.fromarray(disc).convert(mode)
        image.save(tmp_path / "a.png", transparency=0 if mode == "P" else (0, 0, 0))
        found = finetune.read_patch(tmp_path / "a.png", None)[1]
        assert found.shape == (29, 29) and found.mean() == pytest.approx(math.pi / 4, abs=0.05)
    Image.fromarray((disc > 0).astype(np.uint16)).save(tmp_path / "a_mask.png")       # above 0, in 16 bits
    Image.new("RGB", (60, 50)).save(tmp_path / "b.png")
    assert np.array_equal(finetune.read_patch(tmp_path / "b.png", tmp_path / "a_mask.png")[1], found)
    shares = [item["unknown"].sum() / (np.ptp(np.nonzero(item["unknown"].numpy()), 1) + 1).prod()
              for item in (pasted(patches / "cut_out", sizes=(0.4, 0.5))[0, i] for i in range(6))]
    assert max(abs(s - math.pi / 4) for s in shares) < 0.1


def test_items_are_functions_of_seed_epoch_and_index(patches):
    """The same for any number of loader processes; another epoch, image or seed pastes something else."""
    order = [[(e, i) for i in range(6)] for e in (0, 1)]
    load = lambda workers, seed=3: [b for b in torch.utils.data.DataLoader(
        pasted(patches, "area", (0.01, 0.2), seed, pure=0.3), batch_sampler=order, num_workers=workers)]
    one, two = load(0), load(2)
    for a, b in zip(one, two):
        assert all(torch.equal(a[k], b[k]) for k in a)
    changed = [(e, i, image.numpy().tobytes()) for batches in (one, load(0, 4))
               for e, b in enumerate(batches) for i, image in enumerate(b["image"])]
    assert len(set(changed)) == 24
    again = [torch.equal(a, b) for a, b in zip(one[0]["unknown"], one[1]["unknown"])]
    assert sum(again) <= 1, "the same places in another epoch"


def test_pure_negatives(patches):
    """A negative on its own: no pixel of D_k; all of it is D_s, or what the mask says; its loss is finite."""
    for kind in ("photo", "cut_out"):
        item = pasted(patches / kind, pure=1.0)[0, 0]
        D_s = item["unknown"]
        assert (item["label"] == common.IGNORED).all() and (item["image"] >= 150).all()
        assert D_s.all() if kind == "photo" else 0.3 < D_s.float().mean() < 1
    logits, _, _, d = batch(B=1)
    nothing, everything = torch.full((1, 5, 6), 255, dtype=torch.uint8), torch.ones(1, 5, 6, dtype=torch.bool)
    value = common.objective_outlier(logits, nothing, everything, 0, n_k=0, n_s=30, outlier=d, gamma=0.2)
    assert value.item() == pytest.approx(0.2 * F.softplus(-d).mean().item(), rel=1e-12)
    alone = [not (pasted(patches, pure=0.5, seed=s)[0, i]["label"] < N).any() for s in range(20) for i in range(6)]
    assert abs(np.mean(alone) - 0.5) < 4 * 0.5 / 120**0.5


def test_paste_controls(patches):
    """off: D_s empty, the rest the same. inlier: the same D_s, filled from another street. decoy: the patch, and beside
    it a piece of another street with its labels."""
    moved = 0
    for i in range(6):
        none, off, inlier, decoy = (pasted(patches, sizes=(0.3, 0.5), control=c)[2, i]
                                    for c in ("none", "off", "inlier", "decoy"))
        assert torch.equal(off["image"], none["image"]) and torch.equal(off["label"], none["label"])
        assert not off["unknown"].any()
        D_s = none["unknown"]
        assert torch.equal(inlier["unknown"], D_s) and torch.equal(decoy["unknown"], D_s)
        assert torch.equal(inlier["label"], none["label"]) and (inlier["image"] < 100).all()
        assert torch.equal(inlier["image"][:, ~D_s], none["image"][:, ~D_s])
        never_alone = pasted(patches, sizes=(0.3, 0.5), control="inlier", pure=1.0)[2, i]
        assert torch.equal(never_alone["image"], inlier["image"])
        assert (inlier["image"] != Streets()[2, i]["image"])[:, D_s].float().mean() > 0.9
        assert torch.equal(decoy["image"][:, D_s], none["image"][:, D_s])
        changed = (decoy["image"] != none["image"]).any(0)
        assert (decoy["image"][:, changed] < 100).all()
        moved += int(changed.sum())
        # The piece lies somewhere in another street, image and label alike
        y, x = (int(v[0]) for v in torch.where(changed))
        pixel, label = decoy["image"][:, y, x], decoy["label"][y, x]
        others = [Streets()[2, j] for j in range(6) if j != i]
        assert any(((o["image"] == pixel[:, None, None]).all(0) & (o["label"] == label)).any() for o in others)
    assert moved > 200


def blobs(*ids):
    """A label map of background 0 with a square (1) and an L (2), each of one of `ids`, and what is too small (3)."""
    Z = np.zeros((40, 60), np.uint8)
    Z[:3] = common.IGNORED
    Z[5:15, 5:15] = ids[0]
    Z[20:34, 10:14] = Z[30:34, 10:30] = ids[1]
    Z[10:15, 40:45] = 3
    return Z


def test_segment_is_a_connected_part_of_a_class():
    corner = np.zeros((14, 20), bool)
    corner[:, :4] = corner[10:] = True
    for ids in ((1, 2), (1, 1)):                                 # two of one class are still two
        Z, seen = blobs(*ids), {}
        rest = (Z == 0)[3:]
        for seed in range(300):
            shape = finetune.segment(Z, np.random.default_rng(seed))
            name = next(k for k, want in (("square", np.ones((10, 10), bool)), ("corner", corner), ("rest", rest))
                        if np.array_equal(shape, want))
            seen[name] = seen.get(name, 0) + 1
        assert len(seen) == 3 and all(70 < n < 130 for n in seen.values())
    small = np.full((6, 6), common.IGNORED, np.uint8)
    small[2:4, 2:4] = 1
    assert finetune.segment(small, np.random.default_rng(0)).all()


def test_pieces_without_patches(monkeypatch):
    """D_s: a window of another street in the shape of a segment; the rest stays."""
    Z = blobs(1, 2)
    monkeypatch.setattr(Streets, "__getitem__", lambda self, key: dict(
        image=torch.tensor(np.random.default_rng(key).integers(0, 256, (3, *Z.shape), np.uint8)),
        label=torch.tensor(Z), index=key[1]))
    data, streets, areas = pasted(None, sizes=(0.3, 0.5), control="inlier"), Streets(), set()
    assert data.identity() == pasted(None, control="inlier").identity() != ""
    for epoch in range(3):
        for i in range(6):
            item, clean = data[epoch, i], streets[epoch, i]
            D_s = item["unknown"]
            assert torch.equal(item["image"], data[epoch, i]["image"])
            assert torch.equal(item["image"][:, ~D_s], clean["image"][:, ~D_s])
            assert torch.equal(item["label"][~D_s], clean["label"][~D_s])
            assert (item["label"][D_s] == common.IGNORED).all() and 12 <= max(
                len(set(v.tolist())) for v in torch.where(D_s)) <= 20              # 0.3 to 0.5 of the 40 rows
            y, x = (v.tolist() for v in torch.where(D_s))
            found = 0
            for j in set(range(6)) - {i}:                        # the first pixel is there, and so all are
                other = streets[epoch, j]["image"]
                for v, u in zip(*np.nonzero((other == item["image"][:, y[0], x[0], None, None]).all(0).numpy())):
                    at = [b - y[0] + v for b in y], [b - x[0] + u for b in x]
                    inside = min(at[0] + at[1]) >= 0 and max(at[0]) < 40 and max(at[1]) < 60
                    found += inside and torch.equal(other[:, at[0], at[1]], item["image"][:, y, x])
            assert found == 1
            areas.add(int(D_s.sum()))
    assert len(areas) > 6


def test_bad_patches(tmp_path, patches):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(common.InputError, match=f"{folder}.*expected"):
            pasted(tmp_path / folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    with pytest.raises(common.InputError, match="a.png: cannot be read"):
        pasted(tmp_path / "broken")[0, 0]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "broken/a_mask.png")
    Image.open(patches / "photo.png").save(tmp_path / "broken/a.png")
    with pytest.raises(common.InputError, match="a_mask.png: its mask"):
        pasted(tmp_path / "broken")[0, 0]
    assert pasted(patches / "photo").identity() != pasted(patches / "cut_out").identity()
    for name, beside in (("a_mask.jpg", "a.jpg"), ("c_mask.png", "a.jpg")):      # a mask that would be passed over
        folder = tmp_path / name
        folder.mkdir()
        for made in (name, beside):
            Image.new("RGB", (9, 9)).save(folder / made)
        with pytest.raises(common.InputError, match=f"{name}: cuts out nothing; expected an image"):
            pasted(folder)


# ─────────────────────────────────────────────── the flow ───────────────────────────────────────────────

def some_flow(seed=0, spread=0.2):
    """A RealNVP in float64 with random weights, far from the identity that it starts as."""
    torch.manual_seed(seed)
    flow = common.RealNVP().double()
    for p in flow.parameters():
        p.data += spread * torch.randn_like(p) * (p.abs().mean() + 0.05)
    return flow


def test_flow_is_a_bijection_with_its_log_determinant():
    """inverse(forward(x)) = x; log |det| = that of autograd's 192 × 192 Jacobian."""
    flow, x = some_flow(), torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    z, log_det = flow(x)
    assert z.shape == x.shape and (z - x).abs().max() > 0.5
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow(flow.inverse(x))[0], x, rtol=0, atol=1e-10)
    for k in range(2):
        J = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[k]).view(192, 192)
        assert log_det[k].item() == pytest.approx(torch.linalg.slogdet(J).logabsdet.item(), abs=1e-8)
        if k == 0:
            far = torch.linalg.slogdet(J).logabsdet.item() - 192 * -math.log(0.3)
            assert abs(far) > 1, "the couplings have a determinant of their own"
    assert flow.inverse(torch.zeros(1, 3, 12, 20, dtype=torch.float64)).shape == (1, 3, 12, 20)


def test_flow_starts_as_a_gaussian():
    """bits = −log₂ Π N(x; 0, 0.3²) + 8 a value, in closed form; 192 values each."""
    X, u = torch.randint(0, 256, (2, 3, 8, 8)) / 255, torch.rand(2, 3, 8, 8)
    x = (255 * X.double() + u.double()) / 256 - 0.5
    normal = torch.distributions.Normal(0, 0.3)
    want = 8 * 192 - normal.log_prob(x).sum((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(common.RealNVP().double().bits(X.double(), u.double()), want, rtol=1e-7, atol=0)


def test_every_channel_is_transformed():
    """Each of the 12 and of the 24 channels by at least one coupling, for an even or an odd number of them."""
    for couplings in (5, 6, 7):
        flow = common.RealNVP(couplings)
        for c in (*flow.fine, *flow.coarse):
            c.net[-1].bias.data[:] = 0.5                                   # s, t > 0 everywhere
        moved = flow(torch.full((1, 3, 8, 8), 0.25))[0] - common.RealNVP()(torch.full((1, 3, 8, 8), 0.25))[0]
        assert (moved.abs() > 0.1).all()


def test_samples_are_grey_levels_with_a_gradient():
    flow = some_flow().float()
    z = torch.randn(2, 3, 16, 8)
    sample = flow.sample(z)
    assert sample.min() >= 0 and sample.max() <= 1 and len(sample.unique()) > 50
    torch.testing.assert_close(255 * sample, (255 * sample).round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sample, (flow.inverse(z) + 0.5).clamp(0, 1), rtol=0, atol=0.5 / 255 + 1e-6)
    weights = torch.randn_like(sample)
    (sample * weights).sum().backward()
    through = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    ((flow.inverse(z) + 0.5).clamp(0, 1) * weights).sum().backward()       # the same without rounding
    for a, p in zip(through, flow.parameters()):
        torch.testing.assert_close(a, p.grad)


def flow_args(**more):
    return argparse.Namespace(**{**dict(seed=1, alpha=0.5, loss="kl", gamma=0.0, paste_range=(0.2, 0.5), flow_steps=0,
                                        flow_border="yes", flow_lr=1e-3), **more})


class Net(nn.Module):
    """A small f with what add_heads and the loop ask for."""
    num_classes, arch, channels = N, "fpn", 6

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(6, N, 1)
        self.outlier, self.flow = None, None

    def outputs(self, X):
        x = self.layers(X)
        return dict(logits=self.classifier(x), **(dict(outlier=self.outlier(x).squeeze(1)) if self.outlier else {}))

    def forward(self, X):
        return self.outputs(X)["logits"]


def streets_batch(epoch=0):
    return torch.utils.data.default_collate([Streets()[epoch, i] for i in range(6)])


def placed(args, t=7, batch=None):
    """(batch, counts) after choose_places."""
    batch = batch or streets_batch()
    return batch, finetune.choose_places(args, batch, argparse.Namespace(t=t, f=Net()))


def test_places():
    """Outside the samples Z stays; n_k, n_s and the values are counted; other steps, and other images, other places."""
    clean = streets_batch()
    batch, (n_k, n_s, values) = placed(flow_args())
    h, w = batch["z"].shape[-2:]
    assert h % 8 == w % 8 == 0 and batch["u"].shape == batch["z"].shape == (6, 3, h, w) and values == 6 * 3 * h * w
    D_s = batch["unknown"]
    for k, (y, x) in enumerate(batch["corner"].tolist()):
        assert D_s[k, y:y + h, x:x + w].all() and D_s[k].sum() == h * w
    assert torch.equal(batch["label"][~D_s], clean["label"][~D_s]) and (batch["label"][D_s] == 255).all()
    assert torch.equal(batch["image"], clean["image"])
    assert (n_k, n_s) == (int(((clean["label"] < N) & ~D_s).sum()), 6 * h * w)
    assert abs(batch["z"].mean()) < 0.1 and batch["z"].std() == pytest.approx(1, abs=0.1)
    assert 0 <= batch["u"].min() and batch["u"].max() < 1 and batch["u"].mean() == pytest.approx(0.5, abs=0.05)
    assert len({tuple(c) for c in batch["corner"].tolist()}) > 3
    sizes = {placed(flow_args(), t)[0]["z"].shape for t in range(30)}
    assert len(sizes) == 4 and {s for shape in sizes for s in shape[2:]} == {8, 16}
    # Ranks: the same for each image, whatever its share of the batch
    shares = [placed(flow_args(), batch={k: v[s] for k, v in streets_batch().items()})
              for s in (slice(0, 2), slice(2, 6))]
    for key in ("corner", "z", "u", "unknown", "label"):
        assert torch.equal(torch.cat([b[key] for b, _ in shares]), batch[key])
    assert [sum(c) for c in zip(*(c for _, c in shares))] == [n_k, n_s, values]
    # While the flow is trained alone
    alone, (n_k, n_s, _) = placed(flow_args(flow_steps=8))
    assert n_s == 0 and not alone["unknown"].any() and torch.equal(alone["label"], clean["label"])


def test_objective_with_samples():
    """−log₂ p of the crops a value, + Eq. 5 of the image with the samples in their places: put together by hand."""
    args, f = flow_args(), Net()
    f.flow = some_flow(spread=0.02).float()
    batch, counts = placed(args)
    seen = []
    got = finetune.eq5_with_samples(args, f.flow, lambda X: seen.append(X.detach()) or f.outputs(X), batch, counts)
    bits, X = 0, batch["image"].float() / 255
    sample = f.flow.sample(batch["z"]).detach()
    for k, (y, x) in enumerate(batch["corner"].tolist()):
        at = np.s_[k, :, y:y + sample.shape[2], x:x + sample.shape[3]]
        bits += f.flow.bits(X[at][None].clone(), batch["u"][k:k + 1]).item()
        X[at] = sample[k]
    assert torch.equal(seen[0], X)
    want = bits / counts[2] + common.objective_outlier(f(X), batch["label"], batch["unknown"], 0.5, "kl").item()
    assert got.item() == pytest.approx(want, rel=1e-5)
    # The flow alone
    batch, counts = placed(flow_args(flow_steps=8))
    got = finetune.eq5_with_samples(args, f.flow, None, batch, counts)
    assert got.item() == pytest.approx(bits / counts[2], rel=1e-5)


def flow_gradient(border, alpha):
    args, f = flow_args(flow_border=border, alpha=alpha), Net()
    f.flow = some_flow(spread=0.02).float()
    batch, counts = placed(args)
    finetune.eq5_with_samples(args, f.flow, f.outputs, batch, counts).backward()
    return torch.cat([p.grad.flatten() for p in f.flow.parameters()])


def test_the_loss_reaches_the_flow_through_the_sample():
    """With the border term ∂/∂ψ depends on α, through 8-bit samples; without it it is that of the likelihood."""
    assert (flow_gradient("yes", 5.0) - flow_gradient("yes", 0.0)).abs().max() > 1e-3
    assert torch.equal(flow_gradient("no", 5.0), flow_gradient("no", 0.0))
    args, f = flow_args(flow_steps=8), Net()
    f.flow = some_flow(spread=0.02).float()
    batch, counts = placed(args)
    finetune.eq5_with_samples(args, f.flow, f.outputs, batch, counts).backward()
    likelihood = torch.cat([p.grad.flatten() for p in f.flow.parameters()])
    torch.testing.assert_close(flow_gradient("no", 5.0), likelihood)
    # ... and it is the slope of the objective, as finite differences along the gradient have it
    args = flow_args(alpha=50.0)
    f, batch_counts = Net().double(), placed(args)
    f.flow = some_flow(spread=0.02)
    batch, counts = {k: v.double() if v.is_floating_point() else v for k, v in batch_counts[0].items()}, batch_counts[1]
    smooth = lambda: f.flow.inverse(batch["z"]).add(0.5).clamp(0, 1)       # no rounding: it has steps

    def value():
        X = batch["image"].double() / 255
        for k, (y, x) in enumerate(batch["corner"].tolist()):
            X[k, :, y:y + smooth().shape[2], x:x + smooth().shape[3]] = smooth()[k]
        return common.objective_outlier(f(X), batch["label"], batch["unknown"], 50.0, "kl")
    p = f.flow.mean
    slope, = torch.autograd.grad(value(), p)
    with torch.no_grad():
        p += 1e-5
        up = value().item()
        p -= 2e-5
        down = value().item()
    assert (up - down) / 2e-5 == pytest.approx(slope.sum().item(), rel=1e-4)


@pytest.fixture
def signals():
    """pretrain.train() takes over SIGTERM and the others."""
    before = {s: signal.getsignal(s) for s in pretrain.SIGNALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def train(out, epochs, **more):
    """f and its log's losses after the loop, with an outlier head and a flow that starts alone."""
    args = flow_args(**{**dict(batch_size=4, epochs=epochs, lr=1e-3, bn="train", micro_batch=None, precision=None,
                               sync_bn=False, compile=False, workers=0, save_every=5, restart=False, gamma=0.3,
                               schedule="constant", flow_steps=1, negatives="flow", method="mgu", known_unknown=None,
                               out=str(out)), **more})
    f = Net()
    groups = finetune.add_heads(f, args)
    pretrain.train(f, Streets(), args, torch.device("cpu"), {"schedule": "constant", "epochs": epochs}, dict(
        stage="test", arch="net", classes=[], data="toy", root="", anomaly=None, backbone=""), groups=groups,
        count=functools.partial(finetune.choose_places, args),
        objective=functools.partial(finetune.eq5_with_samples, args, f.flow))
    return f, [v["loss"] for v in map(json.loads, out.with_suffix(".jsonl").read_text().splitlines())]


def test_resumed_training_is_bit_identical(tmp_path, signals, monkeypatch):
    """Stopped after the flow's own step and continued, all weights and losses are those of a run in one go."""
    whole, losses = train(tmp_path / "whole.pt", 3)
    train(tmp_path / "parts.pt", 1)
    state = torch.load(tmp_path / "parts.pt", weights_only=True)
    fresh = Net()
    finetune.add_heads(fresh, flow_args(negatives="flow", method="mgu", known_unknown=None, gamma=0.3, lr=1e-3))
    moved = {name for name, value in fresh.state_dict().items() if not torch.equal(state["model"][name], value)}
    assert "flow.mean" in moved and all(name.startswith("flow.") for name in moved), "f itself waits for the flow"
    monkeypatch.setattr(common, "load_checkpoint", lambda path, **_: (None, torch.load(path, weights_only=True)))
    parts, again = train(tmp_path / "parts.pt", 3)
    assert again == losses and len(losses) == 3
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values()):
        assert torch.equal(a, b), name


def test_parts_of_a_batch_sum_to_the_whole(tmp_path, signals):
    """Micro-batches of 2 and one of 4: the same gradient for f, head and flow, which is a mean over all values."""
    one, two = (train(tmp_path / f"{m}.pt", 1, micro_batch=m, flow_steps=0)[0] for m in (4, 2))
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert one.flow.mean.grad.abs().min() > 0 and one.outlier.weight.grad.abs().min() > 0


def test_groups_have_their_rates():
    """flow: --flow-lr; outlier head: ten times --lr; everything else once, and in one group without either."""
    f = Net()
    args = flow_args(gamma=0.3, lr=1e-4, flow_lr=5e-3, negatives="flow", method="mgu", known_unknown=None)
    groups = finetune.add_heads(f, args)
    assert [g.get("factor") for g in groups] == [None, 10, pytest.approx(50)]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in f.parameters())
    assert len(groups[1]["params"]) == 2 and len(groups[2]["params"]) == len(list(f.flow.parameters()))
    plain = argparse.Namespace(gamma=0.0, negatives="mgu", method="mgu", known_unknown=None, seed=0)
    f = Net()
    groups = finetune.add_heads(f, plain)
    assert [g.keys() for g in groups] == [{"params"}] and f.outlier is f.flow is None
    assert list(map(id, groups[0]["params"])) == list(map(id, f.parameters()))


# ─────────────────────────────────────────────── the scripts ───────────────────────────────────────────────

def test_method_fills_defaults_only():
    """flag > method > recipe > paper > ours."""
    names = {**common.PAPER["finetune"], **common.OURS["finetune"]}
    args = argparse.Namespace(**{**dict.fromkeys(names), "alpha": 0.7}, method="noisy", seed=0, known_unknown=None)
    told = common.resolve(args, "finetune", "toy", "fpn", without=finetune.other_flags(args))
    assert (args.alpha, args.gamma, args.pure, args.batch_size, args.lr) == (0.7, 0.2, 0.5, 8, 1e-4)
    assert (args.mix, args.images, args.flow_lr) == (None, None, None) and "mix" not in told
    for text in ("alpha 0.7 (flag)", "gamma 0.2 (method)", "batch-size 8 (recipe)", "lr 0.0001 (paper)",
                 "paste-control none (ours)"):
        assert text in told
    published = {name: common.METHODS[name] for name in common.METHODS}
    assert (published["densehybrid"]["alpha"], published["densehybrid"]["gamma"]) == (0.03, 0.3)
    assert not published["mgu"] and published["rnvp"]["negatives"] == "flow"
    for method in published.values():
        assert method.keys() <= names.keys()


def test_scripts(small, patches, tmp_path):
    """Every method writes a checkpoint that carries its heads; rnvp on two ranks is rnvp on one; scores want a head."""
    tune = ("finetune.py", "--ckpt", small / "pretrained.pt", "--root", small / "toy", "--epochs", 1, "--batch-size", 4)
    run_ok(*tune, "--method", "densehybrid", "--patches", patches, "--out", "dh.pt", folder=tmp_path)
    f, checkpoint = common.load_checkpoint(tmp_path / "dh.pt")
    assert f.outlier is not None and f.flow is None and checkpoint["outlier"]
    assert (checkpoint["settings"]["gamma"], checkpoint["settings"]["paste_control"]) == (0.3, "none")
    torch.manual_seed(0)
    assert not torch.equal(f.outlier.weight, nn.Conv2d(f.channels, 1, 1).weight), "γ's term has trained the head"
    losses = []
    for control in ("none", "off"):                              # of a head that this run does not train nothing stays
        run_ok(*tune[:1], "--ckpt", "dh.pt", *tune[3:], "--negatives", "paste", "--patches", patches, "--paste-control",
               control, "--out", f"{control}.pt", folder=tmp_path)
        f, checkpoint = common.load_checkpoint(tmp_path / f"{control}.pt")
        assert f.outlier is None and not checkpoint["outlier"] and checkpoint["settings"]["gamma"] is None
        losses.append(json.loads((tmp_path / f"{control}.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] != losses[1], "the control has no D_s"
    done = run_ok("evaluate.py", "--ckpt", "dh.pt", "--score", *OUTLIER_SCORES, "--panels", 0, folder=tmp_path)
    assert all(name in done.out for name in OUTLIER_SCORES)
    done = run("evaluate.py", "--ckpt", small / "pretrained.pt", "--score", "hybrid", folder=tmp_path)
    assert done.code == 1 and "--score hybrid" in done.err and len(done.err.splitlines()) == 1

    flow = (*tune, "--method", "rnvp", "--flow-steps", 1, "--bn", "frozen")
    run_ok(*flow, "--out", "one.pt", folder=tmp_path)
    run_ranks(*flow, "--out", "two.pt", folder=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["model"] for n in ("one", "two"))
    assert sum(k.startswith("flow.") for k in one) > 20
    before = torch.load(small / "pretrained.pt", weights_only=True)["model"]
    assert any(not torch.equal(one[k], v) for k, v in before.items()), "after the flow's own steps f is trained"
    steps = [json.loads(line)["step"] for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert len(steps) == 2 * (len(common.Scenes("toy", small / "toy", "train")) // 4), "an epoch of each"
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=5e-4, msg=name)

    pieces = run_ok(*tune, "--negatives", "paste", "--paste-control", "inlier", "--out", "pieces.pt", folder=tmp_path)
    assert "D_s = pieces of other images" in pieces.out

    for more, flag in ((("--method", "noisy"), "--patches"), (("--flow-lr", 1), "--flow-lr"),
                       (("--method", "rnvp", "--patches", "x"), "--patches"),
                       (("--method", "rnvp", "--paste-range", 0.5, 0.1), "--paste-range"),
                       (("--known-unknown", "car", "--negatives", "mgu"), "--negatives"),
                       (("--prototypes", 5, "--distill"), "--prototypes"), (("--distill", "--synthesis"), "--distill"),
                       (("--known-unknown", "car", "--distill"), "--distill"),
                       (("--prototypes", 5, "--method", "noisy"), "--prototypes"),
                       (("--prototypes", 5, "--bn", "train"), "--bn"), (("--distill", "--aux", "x"), "--aux"),
                       (("--method", "noisy", "--negatives", "flow"), "--paste-range"),
                       (("--method", "densehybrid", "--patches", patches, "--cut", "area"), "--paste-range"),
                       (("--negatives", "paste", "--patches", patches, "--pure", 5), "--pure"),
                       (("--method", "noisy", "--patches", patches, "--loss", "kl"), "--loss")):
        done = run(*tune, *more, folder=tmp_path)
        assert done.code == 2 and flag in done.err and "usage:" in done.err
