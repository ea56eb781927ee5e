"""The baselines of Table II and the counts behind Fig. 4, against computations written out; the script as it is run."""
import argparse
import inspect
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.metrics import precision_recall_curve
from torch import nn

import common
import evaluate
from runner import NO_FIGURES, finish, run, run_ok, run_ranks, start, wait_for


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
    ours = evaluate.crf_log_S(log_S, **settings).exp().numpy()
    for b in range(2):
        assert np.abs(ours[b] - literal_crf(log_S[b].numpy(), **settings)).max() < 1e-5
    assert np.abs(ours - log_S.exp().numpy()).max() > 0.05   # it did something


def test_crf_has_the_constants_of_caos_and_its_iterations():
    defaults = {k: p.default for k, p in inspect.signature(evaluate.crf_log_S).parameters.items()}
    assert (defaults["sigma_xy"], defaults["sigma_p"], defaults["compat"]) == (10, 13, 10)
    log_S = common.log_softmax(torch.randn(1, 3, 12, 14))
    for n in (1, 4):
        score = evaluate.make_crf("crf", None, argparse.Namespace(crf_iterations=n), "cpu")
        z = evaluate.crf_log_S(log_S, n)
        expected = (1 - z.double().softmax(1).amax(1)).log()
        torch.testing.assert_close(score(None, dict(log_S=log_S), 0).double(), expected, atol=1e-4, rtol=0)
        assert n == 1 or (z - evaluate.crf_log_S(log_S, 1)).abs().max() > 1e-3


def test_crf_on_an_image_smaller_than_its_window():
    log_S = common.log_softmax(torch.randn(1, 3, 5, 6))
    assert torch.isfinite(evaluate.crf_log_S(log_S)).all()


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
        ours = evaluate.dropout_log_S(f, X, 4).exp()
        assert not f.drop.training
        torch.manual_seed(5)
        f.train()
        by_hand = torch.stack([f(X).double().softmax(1) for _ in range(4)])
    assert (by_hand[0] - by_hand[1]).abs().max() > 0.01     # the masks differ
    assert torch.allclose(ours.double(), by_hand.mean(0), atol=1e-6)


def test_dropout_masks_are_of_the_image_and_the_seed():
    torch.manual_seed(3)
    f, X = Noisy().eval(), torch.rand(1, 3, 6, 8)
    scores = {seed: evaluate.make_dropout("dropout", [f], argparse.Namespace(seed=seed, passes=2), "cpu")
              for seed in (0, 1)}
    with torch.no_grad():
        first, other, of_seed, again = (scores[seed](X, None, i) for seed, i in ((0, 0), (0, 1), (1, 0), (0, 0)))
    assert first.equal(again) and not first.equal(other) and not first.equal(of_seed)
    calls = []
    f.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        evaluate.make_dropout("dropout", [f], argparse.Namespace(seed=0, passes=5), "cpu")(X, None, 0)
    assert len(calls) == 5


@pytest.mark.parametrize("arch", common.ARCHS)
def test_dropout_needs_a_network_with_dropout(arch):
    f = common.Segmenter(arch, "mobilenet_v3_large", 4, 16)
    f.origin = "f.pt", {}
    if arch in ("deeplabv3", "pspnet"):
        evaluate.make_dropout("dropout", [f], argparse.Namespace(seed=0, passes=2), "cpu")
    else:
        with pytest.raises(common.InputError, match=f"f.pt: --score dropout: {arch} has no dropout"):
            evaluate.make_dropout("dropout", [f], argparse.Namespace(seed=0, passes=2), "cpu")


def test_delta_is_of_the_score_that_was_measured():
    """1 − e^t exactly, below 1 whatever t is; none for a mean over views, at another size, or of another score."""
    one = [([1], 1, False)]
    assert evaluate.delta("msp", math.log(0.25), one) == pytest.approx(0.75, rel=1e-12)
    assert 0 < 1 - evaluate.delta("crf", -30, one) == pytest.approx(math.exp(-30), rel=1e-2)
    for views in ([([1], 1, False), ([1], 1, True)], [([0.5], 1, False)], [((32, 48), 1, False)], [([1], 2, False)]):
        assert evaluate.delta("msp", -2, views) is None
    assert evaluate.delta("energy", -2, one) is None and evaluate.delta("msp", None, one) is None


def test_overlays_span_the_range_of_max_S(tmp_path):
    """S uniform is the brightest colour of the anomaly map, whatever N is; certainty the darkest."""
    black, N = np.zeros((2, 40, 3), np.uint8), 4
    score = np.repeat(np.log([1 - 1 / N, 1e-9]), 20)[None].repeat(2, 0)
    evaluate.save_overlays(tmp_path, "a", black, score, np.zeros((2, 40), np.uint8), "msp", N)
    got = np.array(Image.open(tmp_path / "a_anomaly.png"))[0, [5, -5]] / 0.6 / 255
    assert np.abs(got - evaluate.pyplot().get_cmap("viridis")([255, 0])[:, :3]).max() < 0.02


def test_ensemble_is_the_mean_softmax_and_the_mean_logit():
    torch.manual_seed(2)
    z = [3 * torch.randn(1, 5, 4, 4) for _ in range(3)]
    models = [argparse.Namespace(outputs=lambda X, z=z_k: dict(logits=z)) for z_k in z]
    names = ["msp", "entropy", "maxlogit", "energy"]
    scores = evaluate.prepare_scores(models, names, argparse.Namespace(refine=None), "cpu")
    scores, log_S = evaluate.anomaly_scores(models, None, 0, scores)
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
    flagged = t.top_counts.cumsum(1)
    for k in (0, 400, 555, 900, 1000):
        delta = k / 1000
        assert flagged[2, k] == ((Z == common.ANOMALY) & (top.astype(np.float64) <= delta)).sum()
        known = Z < 3
        kept_right = (known & (prediction == Z) & (top.astype(np.float64) > delta)).sum()
        assert t.top_counts[0].sum() - flagged[0, k] == kept_right
        assert t.top_counts[1].sum() == known.sum()


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
    found = evaluate.score_metrics(t, "msp", [0, 1, 2, 3, 9])
    assert found["per_image"]["auroc"] == round(float(np.mean([t.images[i]["msp"]["auroc"] for i in range(4)])), 4)


# ──────────────────────────────────────────── the protocol's parts ────────────────────────────────────────────

class Named(list):
    """What named_panels uses of common.Scenes."""
    split = "test"

    def name(self, i):
        return self[i]


@pytest.mark.parametrize("N", (7, 20, 21, 60))
def test_every_class_has_its_colour(N):
    assert len(np.unique(evaluate.class_colours(N)[:N], axis=0)) == N


def test_panels_are_named_by_whole_parts_of_their_path():
    scenes = Named(["toy/test/t5/15.png", "toy/test/t5/5.png", "toy/test/t6/5.png", "toy/test/tt6/7.png"])
    find = lambda *names: evaluate.named_panels(list(names), scenes)
    assert find("5.png") == [1, 2] and find("t6/5.png") == [2] and find("test/t5/15.png") == [0]
    assert find("7.png", "15.png", "7.png") == [3, 0]
    assert find("4") is None and find("0") is None
    for wrong in (".png", "png", "6/5.png", "t6/7.png", "", "5", "/5.png"):
        with pytest.raises(common.InputError, match="no image of the test split"):
            find("5.png", wrong)


def test_labels_tell_checkpoints_apart(tmp_path):
    assert evaluate.short_names(["ft.pt"]) == ["ft"]
    assert evaluate.short_names(["run0/ft.pt", "run1/ft.pt", "a/x_0.5.pt"]) == ["run0/ft", "run1/ft", "x_0.5"]
    assert evaluate.short_names(["a/b/ft.pt", "c/b/ft.pt", "b/ft.pt"])[:2] == ["a/b/ft", "c/b/ft"]
    assert evaluate.short_names(["ft_alpha0.05", "ft_alpha0.1", "ft.pth"]) == ["ft_alpha0.05", "ft_alpha0.1", "ft.pth"]
    for twice in (["run/ft.pt", "x.pt", "run/../run/ft.pt"], ["a/ft.pt", "a/ft"]):
        with pytest.raises(common.InputError, match=f"{twice[-1]}: the same file as {twice[0]}, or"):
            evaluate.short_names(twice)
    assert evaluate.short_names([b"a\xff.pt".decode("utf-8", "surrogateescape")]) == ["a\\xff"]


# ─────────────────────────────────────────── the script, as it is run ───────────────────────────────────────────

def tried(small, *args, folder, ok=True, figures=False, before="", **more):
    """evaluate.py with the small checkpoint; the `figures` of matplotlib are drawn where a test asks for them."""
    ckpt = () if "--ckpt" in args else ("--ckpt", small / "pretrained.pt")
    before = before if figures else NO_FIGURES + before
    return (run_ok if ok else run)("evaluate.py", *ckpt, *args, folder=folder, before=before, **more)


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def results(folder):
    return json.loads((folder / "results.json").read_text())


def picture(path, size=(64, 48), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path, **options)


def one_error(done, *parts):
    """Exit 1 and one error; a list stands indented below it."""
    first, *rest = done.err.splitlines()
    assert done.code == 1 and first.startswith("error: ") and all(t.startswith("    ") for t in rest), done.err
    assert all(str(p) in done.err for p in parts), done.err


@pytest.fixture
def toy(small, tmp_path):
    """A copy of the small toy set that a test may change."""
    shutil.copytree(small / "toy", tmp_path / "toy")
    return tmp_path / "toy"


def test_a_results_folder_holds_one_run(small, tmp_path):
    picture(tmp_path / "p/a.jpg")
    picture(tmp_path / "p/panels_1.jpg")          # whose overlays are called like a figure of several data sets
    out = tmp_path / "results"
    tried(small, "--panels", 1, folder=tmp_path, figures=True)
    evaluated = ["curves.png", "panels.png", "results.json", "threshold.png"]
    assert files(out) == evaluated
    (out / "notes.txt").write_text("mine")
    picture(out / "mine_anomaly.png")     # the user's, whatever its name
    np.save(out / "mine_score.npy", np.zeros(3))
    mine = ["mine_anomaly.png", "mine_score.npy", "notes.txt"]
    tried(small, "--images", "p", folder=tmp_path)
    overlays = [f"{n}_{kind}" for n in ("a", "panels_1") for kind in ("anomaly.png", "classes.png", "score.npy")]
    assert files(out) == sorted(evaluated + mine + overlays), "photographs leave an evaluation alone"
    tried(small, "--images", "p/panels_1.jpg", folder=tmp_path)
    assert files(out) == sorted(evaluated + mine + overlays[3:]), "but not those of the run before"
    (out / "results.json").rename(tmp_path / "kept.json")
    (out / "results.json").symlink_to("../kept.json")
    tried(small, "--split", "val", "--panels", 0, folder=tmp_path)
    assert files(out) == sorted(["results.json", "threshold.png", *mine]), "no anomaly, no curves"
    assert (out / "results.json").is_symlink() and results(out)["protocol"]["split"] == "val", "a link leads on"


def test_its_own_overlays_are_no_photographs(small, tmp_path):
    for name in ("a.jpg", "sub/b.png"):
        picture(tmp_path / "pp" / name)
    tried(small, "--panels", 1, "--out", "pp", folder=tmp_path, figures=True)   # nor are figures and results.json
    wanted = [f"{n}_{kind}" for n in ("a", "sub_b") for kind in ("anomaly.png", "classes.png", "score.npy")]
    for out in ("pp", "pp", "pp/deep/results", "pp/deep/results", "elsewhere", "."):
        done = tried(small, "--images", "pp", "--out", out, folder=tmp_path)
        assert "2 photographs" in done.out
        assert [n for n in files(tmp_path / out) if n.endswith(evaluate.PHOTOGRAPH)] == wanted
    done = tried(small, "--images", ".", "--out", "x", folder=tmp_path, ok=False)
    one_error(done, "files were not done", "stdout")                 # the log of this test, of all that lies here
    assert "2 photographs" in done.out and "anomaly.png:" not in done.err


def test_a_photograph_is_never_replaced(small, tmp_path):
    picture(tmp_path / "p/a.jpg")
    picture(tmp_path / "p/a_anomaly.png")
    before = (tmp_path / "p/a_anomaly.png").read_bytes()
    one_error(tried(small, "--images", "p", "--out", "p", folder=tmp_path, ok=False), "a_anomaly.png: a photograph")
    assert (tmp_path / "p/a_anomaly.png").read_bytes() == before and files(tmp_path / "p") == ["a.jpg", "a_anomaly.png"]


def test_a_run_that_fails_takes_no_overlays_away(small, tmp_path):
    picture(tmp_path / "p/a.jpg")
    tried(small, "--images", "p", folder=tmp_path)
    before = files(tmp_path / "results")
    assert len(before) == 3
    for more in (("p", "--score", "dropout"), ("nowhere.jpg",)):
        one_error(tried(small, "--images", *more, folder=tmp_path, ok=False))
        assert files(tmp_path / "results") == before


def test_what_names_nothing_is_refused(small, tmp_path):
    """A baseline that is called like the ensemble; classes to ignore where no label tells one."""
    for name in ("a.pt", "b.pt", "a+b.pt"):
        shutil.copy(small / "pretrained.pt", tmp_path / name)
    one_error(run("evaluate.py", "--ckpt", "a.pt", "b.pt", "--baseline", "a+b.pt", folder=tmp_path), "a+b.pt: a+b is")
    args = argparse.Namespace(data=["roadanomaly"], root=[str(tmp_path)], split="test", open=False,
                              ignore_classes=["car"])
    picture(tmp_path / "images/0.png", (40, 48))
    Image.fromarray(np.resize([0, 2], (40, 48)).astype(np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "labels_masks").mkdir()
    (tmp_path / "x.png").rename(tmp_path / "labels_masks/0.png")
    with pytest.raises(common.InputError, match="--ignore-classes: the labels of roadanomaly tell no classes"):
        evaluate.open_scenes(args, common.load_checkpoint(small / "pretrained.pt")[1])


def test_figure_4(monkeypatch):
    """Both accuracies against δ, counted one threshold at a time."""
    drawn, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(evaluate, "save_figure", lambda fig, path: drawn.append(fig))
    top, kind = rng.integers(0, 1001, 5000), rng.integers(0, 3, 5000)     # max S in 1/1000; right, wrong, anomalous
    counts = np.zeros((3, 1001), np.int64)
    for k, rows in ((0, kind == 0), (1, kind < 2), (2, kind == 2)):
        np.add.at(counts[k], top[rows], 1)
    evaluate.draw_threshold({"ft": counts}, "x.png")
    (semantic, anomaly), = [ax.lines for ax in drawn[0].axes]
    for at in (0, 1, 500, 999, 1000):
        assert semantic.get_ydata()[at] == pytest.approx(100 * ((kind == 0) & (top > at)).sum() / (kind < 2).sum())
        assert anomaly.get_ydata()[at] == pytest.approx(100 * (top[kind == 2] <= at).mean())
        assert semantic.get_xdata()[at] == anomaly.get_xdata()[at] == at / 1000


def test_a_photograph_with_non_finite_scores_is_refused(small, tmp_path):
    picture(tmp_path / "p/bad.png", (40, 48))
    picture(tmp_path / "p/good.png", (64, 48))
    before = ("import common\nwhole = common.upsample\ncommon.upsample = lambda x, size: "
              "whole(x, size) * (float('nan') if tuple(size) == (48, 40) else 1)")
    for score in ("msp", "entropy", "energy"):
        done = tried(small, "--images", "p", "--score", score, folder=tmp_path, before=before, ok=False)
        one_error(done, "1 of 2 files", "p/bad.png: non-finite anomaly score")
        assert [n.partition("_")[0] for n in files(tmp_path / "results")] == ["good"] * 3


def test_the_rest_of_a_folder_is_done(small, tmp_path):
    folder = tmp_path / "photos"
    picture(folder / "a.jpg")
    picture(folder / "cut.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-400])
    picture(folder / "day 1/b.PNG")
    picture(folder / "day 2/b.tif")                                  # the same name in another folder
    (folder / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))     # the same name, but no photograph
    (folder / "doc.pdf").write_bytes(b"%PDF-1.7")
    (folder / "empty.png").write_bytes(b"")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/c.jpg").write_bytes(b"")
    (folder / "._a.jpg").write_bytes(b"")
    picture(tmp_path / "other/linked.jpg")
    (folder / "link").symlink_to(tmp_path / "other")
    done = tried(small, "--images", "photos", "nowhere.jpg", folder=tmp_path, ok=False)
    one_error(done, "5 of 9 files were not done")
    failed = [line.split(":")[0].strip() for line in done.err.splitlines()[1:]]
    assert sorted(failed) == sorted([*(f"photos/{n}" for n in ("a.HEIC", "cut.jpg", "doc.pdf", "empty.png")),
                                     "nowhere.jpg"])
    stems = ("a", "day 1_b", "day 2_b", "link_linked")
    assert files(tmp_path / "results") == sorted(s + end for s in stems for end in evaluate.PHOTOGRAPH)


def test_odd_exif_blocks(small, tmp_path):
    rational = b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\0\0\0\0\0\0"     # its value lies beyond the end
    text = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0"
    short = b"II*\0\x08\0\0\0\x09\0\x12\x01"
    turned = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    for name, block in dict(rational=rational, text=text, short=short, noise=b"\x07" * 40, turned=turned).items():
        picture(tmp_path / f"p/{name}.jpg", exif=b"Exif\0\0" + block)
    tried(small, "--images", "p", folder=tmp_path)
    shapes = {n: np.load(tmp_path / f"results/{n}_score.npy").shape for n in ("rational", "text", "short", "noise")}
    assert set(shapes.values()) == {(48, 64)}
    assert np.load(tmp_path / "results/turned_score.npy").shape == (64, 48)


def test_two_photographs_of_one_name(small, tmp_path):
    picture(tmp_path / "one/a.jpg")
    picture(tmp_path / "two/a.png")
    done = tried(small, "--images", "one", "two/a.png", folder=tmp_path, ok=False)
    one_error(done, "one/a.jpg and two/a.png")
    assert not (tmp_path / "results").exists() or not files(tmp_path / "results")


def test_maps_of_a_photograph(small):
    """The score and the class at its own size are those of f's maps, upsampled as a whole."""
    f, _ = common.load_checkpoint(small / "pretrained.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (75, 130, 3), np.uint8)
    args = argparse.Namespace(max_side=64, passes=2, crf_iterations=1, seed=0)
    scores = evaluate.prepare_scores([f], ["energy"], args, "cpu")
    score, predicted = evaluate.photograph_maps([f], pixels, scores, args, torch.device("cpu"))
    seen = np.array(Image.fromarray(pixels).resize((64, 37), Image.LANCZOS))
    with torch.no_grad():
        logits = f(torch.from_numpy(seen).permute(2, 0, 1)[None] / 255)
        upsample = lambda t: nn.functional.interpolate(t, (75, 130), mode="bilinear")[0]
        assert np.abs(score - upsample(-logits.logsumexp(1)[None])[0].numpy()).max() < 1e-3
        right = predicted == upsample(logits.log_softmax(1)).argmax(0).numpy()
    assert right.mean() > 0.99 and len(np.unique(predicted)) > 2 and predicted.dtype == np.uint8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_of_a_large_photograph(small, tmp_path):
    """At most 50 bytes a pixel, where N float32 maps alone would take as much."""
    before = ("import common\nwhole = common.cli\ndef cli(main):\n    whole(main)\n"
              "    print(open('/proc/self/status').read())\ncommon.cli = cli")
    peaks = []
    for size in ((96, 64), (2400, 1600)):
        picture(tmp_path / f"{size[0]}.jpg", size)
        done = tried(small, "--images", f"{size[0]}.jpg", "--max-side", 96, folder=tmp_path, before=before)
        peaks.append(1024 * int(done.out.split("VmHWM:")[1].split()[0]))
    assert peaks[1] - peaks[0] < 50 * 2400 * 1600


@pytest.mark.parametrize("every, told", ((14, "no negative pixel"), (8, "no anomalous pixel"),
                                         (4, "no anomalous pixel")))
def test_a_side_without_pixels(small, toy, tmp_path, every, told):
    """All pixels anomalous, of one class, or of none."""
    for path in (toy / "test/annotations").rglob("*.png"):
        Image.fromarray(np.full_like(np.array(Image.open(path)), every)).save(path)
    done = tried(small, "--root", "toy", "--panels", 1, folder=tmp_path)
    found = results(tmp_path / "results")
    row = next(line for line in done.out.splitlines() if line.startswith("pretrained   msp"))
    assert row.count(told) == 2 and found["pooled"] is found["per_image"] is None
    if every == 8:
        assert found["miou"] is not None and f"{found['miou']:.2f}" in row
    else:
        assert found["miou"] is None and "0.00" not in row and "–" in row
    assert files(tmp_path / "results") == ["panels.png", "results.json", "threshold.png"]


def test_no_image_holds_both_sides(small, toy, tmp_path):
    for k, path in enumerate(sorted((toy / "test/annotations").rglob("*.png"))):
        Image.fromarray(np.full_like(np.array(Image.open(path)), 14 if k == 0 else 8)).save(path)
    done = tried(small, "--root", "toy", folder=tmp_path)
    found = results(tmp_path / "results")
    assert found["pooled"]["aupr"] > 0 and found["per_image"] is None and "no image holds both" in done.out
    done = tried(small, "--root", "toy", "--unlabeled", "ignore", "--ignore-classes", "road", "--split", "val",
                 folder=tmp_path)
    assert "no anomalous pixel" in done.out


def test_every_pixel_left_out(small, toy, tmp_path):
    for path in (toy / "test/annotations").rglob("*.png"):
        Image.fromarray(np.full_like(np.array(Image.open(path)), 4)).save(path)
    done = tried(small, "--root", "toy", "--unlabeled", "ignore", folder=tmp_path)
    assert "no pixel counts" in done.out and results(tmp_path / "results")["protocol"]["base_rate"] == 0


def test_names_that_are_no_utf_8(small, tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    try:
        (tmp_path / odd).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    shutil.copytree(small / "toy", tmp_path / odd / "toy")
    shutil.copy(small / "pretrained.pt", tmp_path / odd / f"{odd}.pt")
    picture(tmp_path / odd / f"photos/{odd}.jpg")
    args = ("--ckpt", f"{odd}/{odd}.pt", "--out", f"{odd}/out")
    done = tried(small, *args, "--root", f"{odd}/toy", folder=tmp_path, figures=True)
    assert list(results(tmp_path / odd / "out")["protocol"]["checkpoints"]) == ["caf\\xe9/caf\\xe9.pt"]
    assert "caf\\xe9 " in done.out and "curves.png" in files(tmp_path / odd / "out")
    tried(small, *args, "--images", f"{odd}/photos", folder=tmp_path)
    assert (tmp_path / odd / f"out/{odd}_score.npy").exists()
    one_error(tried(small, "--images", f"{odd}.jpg", folder=tmp_path, ok=False), ".jpg: no such file")


def test_out_is_tried_before_the_evaluation(small, tmp_path):
    (tmp_path / "file").write_text("")
    picture(tmp_path / "a.jpg")
    for extra in ((), ("--images", "a.jpg")):
        for out in ("file", "file/results", "/proc/results"):
            done = tried(small, *extra, "--out", out, folder=tmp_path, ok=False)
            one_error(done, f"--out {out}: cannot be written")
            assert "protocol" not in done.out and "mostly" not in done.out
        done = tried(small, *extra, folder=tmp_path, ok=False, limit=20_000)    # a disk that is nearly full
        one_error(done, "--out results: cannot be written")
        assert "protocol" not in done.out and "mostly" not in done.out
    assert files(tmp_path / "results") == []


def test_the_table_is_printed_before_anything_is_written(small, tmp_path):
    tried(small, folder=tmp_path)
    before = ("import common\ndef full(*args):\n    raise OSError(28, 'No space left on device')\n"
              "common.save_json = full")
    done = tried(small, folder=tmp_path, before=before, ok=False)
    one_error(done, "No space left")
    value = re.search(r"pretrained +msp +(\d+\.\d\d) ", done.out)
    assert value and float(value[1]) > 0


def test_checkpoints_of_one_name(small, tmp_path):
    for k in range(2):
        (tmp_path / f"run{k}").mkdir()
        shutil.copy(small / "pretrained.pt", tmp_path / f"run{k}/ft.pt")
    tried(small, "--ckpt", "run0/ft.pt", "run1/ft.pt", "--panels", 0, folder=tmp_path)
    found = results(tmp_path / "results")
    assert found["rows"][0]["model"] == "run0/ft+run1/ft"
    assert list(found["protocol"]["checkpoints"]) == ["run0/ft.pt", "run1/ft.pt"]
    done = tried(small, "--ckpt", "run0/ft.pt", "--baseline", "run1/ft.pt", folder=tmp_path)
    found = results(tmp_path / "results")
    assert [r["model"] for r in found["rows"]] == ["run0/ft", "run1/ft"] and "run1/ft" in done.out
    assert found["rows"][0]["pooled"] == found["rows"][1]["pooled"], "one file, two names"
    done = tried(small, "--ckpt", "run0/ft.pt", "./run0/ft.pt", folder=tmp_path, ok=False)
    one_error(done, "the same file as run0/ft.pt")


def test_names_that_matplotlib_would_read(small, tmp_path):
    """As TeX, or as that of a line which the legend leaves out."""
    for name in ("a$^$.pt", "_x.pt"):
        shutil.copy(small / "pretrained.pt", tmp_path / name)
    tried(small, "--ckpt", "_x.pt", "--baseline", "a$^$.pt", "--panels", 1, folder=tmp_path, figures=True)
    assert [r["model"] for r in results(tmp_path / "results")["rows"]] == ["_x", "a$^$"]


def test_numbers_of_every_image(small, tmp_path):
    """--per-image: a row's mean is that of its images; the same bytes for any batch size and number of ranks; without
    the flag, the file is the same but for them."""
    flags = ("--ckpt", small / "pretrained.pt", "--score", "msp", "entropy", "--panels", 0)
    tried(small, *flags, folder=tmp_path)
    run_ok("evaluate.py", *flags, "--per-image", "--batch-size", 1, "--out", "one", folder=tmp_path)
    run_ok("evaluate.py", *flags, "--per-image", "--batch-size", 8, "--workers", 3, "--out", "many", folder=tmp_path)
    run_ranks("evaluate.py", *flags, "--per-image", "--out", "ranks", folder=tmp_path)
    one, many, ranks = ((tmp_path / out / "results.json").read_bytes() for out in ("one", "many", "ranks"))
    assert one == many == ranks
    found = results(tmp_path / "one")
    scenes = common.Scenes("toy", small / "toy", "test")
    for row in found["rows"]:
        images = row.pop("images")
        assert list(images) == [f"test/images/test/{Path(scenes.name(i)).parent.name}/{Path(scenes.name(i)).name}"
                                for i in range(len(scenes))]
        for key in ("aupr", "fpr95"):
            assert row["per_image"][key] == pytest.approx(np.mean([m[key] for m in images.values()]), abs=1e-4)
    assert found == results(tmp_path / "results")


def test_environment_names_versions_and_the_device(small, tmp_path):
    tried(small, "--panels", 0, folder=tmp_path)
    assert results(tmp_path / "results")["environment"] == dict(
        python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__,
        numpy=np.__version__, device=f"CPU {os.uname().machine}")


def test_the_test_folders_are_enough(small, toy, tmp_path):
    tried(small, folder=tmp_path)
    shutil.rmtree(toy / "train")
    tried(small, "--root", "toy", "--out", "alone", folder=tmp_path)
    assert (tmp_path / "alone/results.json").read_bytes() == (tmp_path / "results/results.json").read_bytes()


def test_labels_that_tell_anomalies_alone(small, toy, tmp_path):
    """A data set without classes suits every checkpoint; its anomaly metrics are those of the same pixels."""
    entry = {"classes": {}, "known": [i for i in range(1, 14)], "anomaly": [14],
             "splits": {"test": {"images": "test/images/test", "labels": "test/annotations/test"}}}
    (toy / "dataset.json").write_text(json.dumps(entry))
    done = tried(small, "--data", "folder", "--root", "toy", "--out", "alone", folder=tmp_path)
    tried(small, folder=tmp_path)
    alone, whole = results(tmp_path / "alone"), results(tmp_path / "results")
    assert alone["pooled"] == whole["pooled"] and alone["per_image"] == whole["per_image"]
    assert alone["miou"] is None and "no pixel of a known class" in done.out
    assert alone["protocol"]["data"] == "folder" and alone["protocol"]["class_ids"]["14"] == "anomaly"


def test_two_runs_of_one_folder(small, tmp_path):
    """The second is refused while the first runs."""
    before = ("import os, time, common\nwhole = common.Scenes.__getitem__\n"
              "def slow(*args):\n    open('started', 'w')\n"
              "    while not os.path.exists('go'):\n        time.sleep(0.02)\n    return whole(*args)\n"
              "common.Scenes.__getitem__ = slow")
    (tmp_path / "second").mkdir()
    p = start("evaluate.py", "--ckpt", small / "pretrained.pt", "--out", "out", folder=tmp_path, before=before)
    assert wait_for(lambda: (tmp_path / "started").exists(), p)
    done = tried(small, "--out", tmp_path / "out", folder=tmp_path / "second", ok=False)
    (tmp_path / "go").write_text("")
    one_error(done, "another run is writing it")
    assert finish(p, tmp_path).code == 0 and "curves.png" in files(tmp_path / "out")
