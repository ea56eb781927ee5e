"""Objects, open-set mIoU, thresholds, views, and test sets of real unknowns, against computations written out."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_curve
from torch import nn

import common
import evaluate
from evaluate import component_counts, component_metrics
from runner import NO_FIGURES, run, run_ok, run_ranks

TAU = [t / 20 for t in range(5, 16)]


# ──────────────────────────────────────────────── objects ────────────────────────────────────────────────

def components(mask):
    """[set of pixels], eight neighbours, by flood fill."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        todo, part = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(part)
    return found


def by_hand(images, smallest):
    """(mean sIoU, mean PPV, mean F1) of [(flagged, anomalous, ignored)], over sets of pixels."""
    siou, ppv = [], []
    for flagged, anomalous, ignored in images:
        objects = components(anomalous)
        found = [p for p in components(flagged & ~ignored) if len(p) >= smallest[1]]
        gone = set().union(*(k for k in objects if len(k) < smallest[0]))
        objects = [k for k in objects if len(k) >= smallest[0]]
        found = [p - gone for p in found if p - gone]
        for k in objects:
            meeting = set().union(*(p for p in found if p & k))
            others = set().union(*(o for o in objects if o is not k)) & meeting
            siou.append(len(k & meeting) / len((k | meeting) - others))
        ppv += [len(p & set().union(*objects)) / len(p) for p in found]
    f1 = []
    for tau in TAU:
        tp, fn, fp = sum(s >= tau for s in siou), sum(s < tau for s in siou), sum(p < tau for p in ppv)
        f1.append(2 * tp / (2 * tp + fn + fp) if tp + fn + fp else 0)
    mean = lambda v: 100 * np.mean(v) if v else None
    return mean(siou), mean(ppv), 100 * np.mean(f1) if siou or ppv else None


def ours(images, smallest):
    found = component_metrics([component_counts(*image, smallest) for image in images])
    return found["siou"], found["ppv"], found["f1"]


def blobs(rng, size=(22, 30), share=0.3):
    """Random objects of all sizes: smoothed noise above a quantile."""
    noise = rng.standard_normal(size)
    for _ in range(int(rng.integers(0, 3))):
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, -1, 0)) / 4
    return noise > np.quantile(noise, 1 - share)


@pytest.mark.parametrize("smallest", ((1, 1), (5, 3), (12, 20)))
def test_objects_against_sets_of_pixels(smallest):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        images = []
        for _ in range(3):
            anomalous, ignored = blobs(rng, share=0.2), blobs(rng, share=0.15)
            flagged = blobs(rng, share=0.3) | (anomalous if seed % 3 == 0 else anomalous & blobs(rng, share=0.6))
            images.append((flagged, anomalous & ~ignored, ignored))
        assert ours(images, smallest) == pytest.approx(by_hand(images, smallest), abs=1e-9), seed


def drawn(*rows):
    """(flagged, anomalous, ignored): a is an anomaly, A a flagged one; f a flagged known pixel; i, I ignored ones."""
    letters = np.array([list(row) for row in rows])
    return np.isin(letters, list("AfI")), np.isin(letters, list("aA")), np.isin(letters, list("iI"))


CORNERS = {   # sIoU, PPV, F1: what Sec. "objects" of evaluate.py says, counted by hand; smallest (1, 1)
    "one pixel, found": (("....", ".A..", "...."), 100, 100, 100),
    "one pixel, missed": (("....", ".a..", "f..."), 0, 0, 0),
    # a prediction over two objects: each is 2 pixels, the other's are not held against it: 2 / (2 + 5 − 2 − 2)
    "two objects, one prediction": (("AAfAA",), 100 * 2 / 3, 80, 100 * 9 / 11),   # ⅔ ≥ τ for nine of the eleven
    "corners touch": (("A..", ".A.", "..f"), 100 * 2 / 3, 100 * 2 / 3, 100 * 9 / 11),   # one object, one prediction
    "two predictions on one object": (("AaA",), 100 * 2 / 3, 100, 100 * 9 / 11),
    "cut by ignored pixels": (("AIa",), 50, 100, None),     # two objects; the prediction ends at the ignored pixel
    "flagged where ignored": (("II.a",), 0, None, 0),
    "nothing flagged": (("aa..", "...a"), 0, None, 0),
    "everything flagged": (("AAff", "AAff"), 50, 50, 100 * 6 / 11),
    "no object": (("ff..",), None, 0, 0),
    "nothing": (("....",), None, None, None),
}


@pytest.mark.parametrize("name", CORNERS)
def test_objects_in_corner_cases(name):
    rows, siou, ppv, f1 = CORNERS[name]
    got = ours([drawn(*rows)], (1, 1))
    assert got == pytest.approx(by_hand([drawn(*rows)], (1, 1)), abs=1e-9)
    assert got[:2] == pytest.approx((siou, ppv)) and (f1 is None and name != "nothing" or got[2] == pytest.approx(f1))


def test_small_components():
    """Small predictions are none; a small object is as if ignored, but only after the predictions were formed."""
    picture = drawn("AA..f.....", "AA........", "......AAff", "..........")     # 4 and 2 pixels; 4, 1 and 4
    assert ours([picture], (1, 1))[1] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert ours([picture], (3, 2)) == pytest.approx((100, 50, 100 * np.mean([2 / (2 + (0 < t)) for t in TAU])))
    counts = component_counts(*picture, (3, 2))
    assert [c.tolist() for c in counts] == [[4], [4], [4, 0], [4, 2]]    # the second keeps 2 of its 4 pixels
    assert [c.tolist() for c in component_counts(*picture, (3, 5))] == [[0], [4], [], []]
    nothing = component_counts(*picture, (5, 1))
    assert len(nothing[0]) == 0 and nothing[3].tolist() == [1, 2], "the prediction on the object is gone with it"


def test_whether_a_threshold_is_reached_is_exact():
    """0.6 and 0.35 are no float64: k/20 is reached where 20 · covered ≥ k · union, whatever rounding says."""
    for k in range(5, 16):
        at = component_metrics([(np.array([k]), np.array([20]), np.array([k]), np.array([20]))])
        below = component_metrics([(np.array([k * 100 - 1]), np.array([2000]), np.array([k]), np.array([20]))])
        f1 = lambda reached: 100 * np.mean([reached(t) for t in range(5, 16)])
        # PPV is k/20, so that a prediction is false for every larger τ
        assert at["f1"] == pytest.approx(f1(lambda t: 1.0 if t <= k else 0.0))
        assert below["f1"] == pytest.approx(f1(lambda t: 1.0 if t < k else 0.0))


# ─────────────────────────────────────────────── thresholds ───────────────────────────────────────────────

def histogram(scores, positive, exact):
    found = evaluate.ScoreHistogram(exact)
    found.add(*evaluate.sort_by_class(scores, positive))
    return found


def test_floors_of_bins():
    rng = np.random.default_rng(0)
    scores = (rng.choice([-1, 1], 100_000) * 2.0 ** rng.uniform(-140, 127, 100_000)).astype(np.float32)
    scores = np.append(scores, np.float32([0, -0.0, 1, -1, 1e-45, -1e-45, 0.125, -0.125, 3.4e38, -3.4e38]))
    bins = evaluate.bin_numbers(scores.copy()).astype(np.int64)
    floors = evaluate.bin_floors(bins)
    assert floors.dtype == np.float32 and (floors <= scores).all()
    assert (evaluate.bin_numbers(floors.copy()) == bins).all()
    below = np.nextafter(floors, np.float32(-np.inf))
    finite = np.isfinite(below) & (floors != 0)
    assert (evaluate.bin_numbers(below[finite]) == bins[finite] - 1).all()


@pytest.mark.parametrize("exact", (0, 10_000))
@pytest.mark.parametrize("seed", range(6))
def test_thresholds_against_scikit_learn(seed, exact):
    rng = np.random.default_rng(seed)
    positive = rng.random(4_000) < (0.02, 0.3)[seed % 2]
    scores = (rng.standard_normal(4_000) + positive).astype(np.float32)
    if seed >= 3:
        scores = np.round(scores, 1)                       # ties
    scores = evaluate.bin_floors(evaluate.bin_numbers(scores).astype(np.int64))   # so that bins tie no others
    h = histogram(scores, positive, exact)
    fpr, tpr, at = roc_curve(positive, scores, drop_intermediate=False)
    for share in (0.05, 0.5, 0.9, 0.95, 1):
        first = int(np.argmax(tpr >= share))
        t = evaluate.share_threshold(h, share)
        assert t == np.float32(at[first])
        assert h.rates(t) == dict(recall=round(100 * tpr[first], 4), fpr=round(100 * fpr[first], 4))
        assert evaluate.share_threshold(h, share, swapped=True) == np.float32(at[int(np.argmax(fpr >= share))])
    assert h.rates(evaluate.share_threshold(h, 0.95))["fpr"] == round(h.metrics()["fpr95_first"], 4)
    precision, recall, levels = precision_recall_curve(positive, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = levels[np.flatnonzero(np.isclose(f1[:-1], f1.max(), rtol=0, atol=1e-12)).max()]
    assert evaluate.f1_threshold(h) == np.float32(best)


@pytest.mark.parametrize("exact", (0, 10))
def test_the_highest_of_equal_thresholds(exact):
    """F1 is ⅔ at 100, with one of two positives, and at 0.001, with both and two negatives."""
    h = histogram(np.float32([100, 50, 50, 0.001]), np.array([1, 0, 0, 1], bool), exact)
    assert evaluate.f1_threshold(h) == 100


@pytest.mark.parametrize("exact", (0, 10))
def test_thresholds_without_a_class(exact):
    none = evaluate.ScoreHistogram(exact)
    assert evaluate.share_threshold(none, 0.95) is evaluate.f1_threshold(none) is None
    known = histogram(np.float32([1, 2, 3, 4]), np.zeros(4, bool), exact)
    assert evaluate.share_threshold(known, 0.95) is evaluate.f1_threshold(known) is None
    assert [evaluate.share_threshold(known, s, swapped=True) for s in (0.25, 0.26, 1)] == [4, 3, 1]
    assert known.rates(3) == dict(recall=None, fpr=50)


# ──────────────────────────────────────────────── open set ────────────────────────────────────────────────

def literal_open_miou(predictions, labels, N):
    """DenseHybrid's OpenIoU: N + 2 classes (N the anomaly, N + 1 void), void's row and column set to 0, mean of N."""
    matrix = confusion_matrix(labels.ravel(), predictions.ravel(), labels=range(N + 2)).astype(np.float64)
    matrix[:, N + 1] = matrix[N + 1] = 0
    hit = np.diag(matrix)
    with np.errstate(invalid="ignore"):
        iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)
    return 100 * np.nanmean(iou[:N]), 100 * iou[N]


def test_open_miou_is_dense_hybrids():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        Z = rng.choice([0, 1, 2, 3, common.IGNORED, common.ANOMALY], (40, 50)).astype(np.uint8)
        prediction, flagged = rng.integers(0, 4, (40, 50)).astype(np.uint8), rng.random((40, 50)) < 0.2
        matrix = evaluate.open_confusion(prediction, flagged, Z, 4)
        label = np.where(Z == common.ANOMALY, 4, np.where(Z == common.IGNORED, 5, Z))
        assert evaluate.open_miou(matrix) == pytest.approx(
            literal_open_miou(np.where(flagged, 4, prediction), label, 4), abs=1e-9)
        assert matrix.sum() == (Z != common.IGNORED).sum()


def test_open_miou_by_hand():
    """A false alarm is a false negative, a missed anomaly a false positive; nothing flagged, everything flagged."""
    A = common.ANOMALY
    Z, prediction = np.uint8([[0, 0, 0, 1, 1, A, A]]), np.uint8([[0, 0, 1, 1, 1, 1, 0]])
    at = lambda flags: evaluate.open_miou(evaluate.open_confusion(prediction, np.array([flags], bool), Z, 2))
    assert at([0, 0, 0, 0, 0, 1, 0]) == pytest.approx((100 * (2 / 4 + 2 / 3) / 2, 50))
    assert at([1, 0, 0, 0, 0, 1, 0]) == pytest.approx((100 * (1 / 4 + 2 / 3) / 2, 100 / 3))
    assert at([0] * 7) == pytest.approx((100 * (2 / 4 + 2 / 4) / 2, 0))
    assert at([1] * 7) == pytest.approx((0, 100 * 2 / 7))
    assert evaluate.open_miou(torch.zeros(3, 3, dtype=torch.int64)) == (None, None)


def test_folds():
    class Named(list):
        name = list.__getitem__
    assert evaluate.two_folds(Named(["r/t5/0.png", "r/t5/1.png", "r/t6/0.png"])).tolist() == [0, 0, 1]
    assert evaluate.two_folds(Named([f"r/{i}.png" for i in range(5)])).tolist() == [0, 0, 0, 1, 1]
    assert evaluate.two_folds(Named(["a/0", "b/0", "c/0", "c/1"])).tolist() == [0, 0, 1, 1]


# ───────────────────────────────────────────────── views ─────────────────────────────────────────────────

def test_views_are_averaged_at_the_images_own_size():
    torch.manual_seed(0)
    X, seen = torch.rand(1, 3, 60, 90), []
    weight = torch.randn(4, 3)

    def maps(V):
        seen.append(tuple(V.shape[-2:]))
        logits = torch.einsum("nc,bchw->bnhw", weight, V) + torch.linspace(0, 1, V.shape[-1])   # not symmetric
        return {"energy": evaluate.score_energy(logits)}, common.log_softmax(logits)
    views = [([1], 1, False), ([1], 1, True), ([40.0, 70.0], 1, False), ([2.0], 0.5, False), ([0.1], 1, False)]
    scores, log_S = evaluate.over_views(X, views, maps)
    assert seen == [(60, 90), (60, 90), (40, 70), (60, 90), (32, 32)]
    resize = lambda t, size: torch.nn.functional.interpolate(t, size, mode="bilinear", antialias=True)
    want_scores, want_S = [], []
    for size, flip in (((60, 90), 0), ((60, 90), 1), ((40, 70), 0), ((60, 90), 0), ((32, 32), 0)):
        V = X if size == (60, 90) else resize(X, size)
        s, l = maps(V.flip(-1) if flip else V)
        back = [t.flip(-1) if flip else t for t in (s["energy"][:, None], l.exp())]
        back = [t if size == (60, 90) else resize(t, (60, 90)) for t in back]
        want_scores.append(back[0][:, 0].double())
        want_S.append(back[1].double())
    assert torch.allclose(scores["energy"].double(), torch.stack(want_scores).mean(0), atol=1e-5)
    assert torch.allclose(log_S.double().exp(), torch.stack(want_S).mean(0), atol=1e-5)
    assert torch.allclose(log_S.double().exp().sum(1), torch.ones(1, 60, 90, dtype=torch.float64), atol=1e-5)
    only = evaluate.over_views(X, [([1], 1, False)], maps)
    assert torch.equal(only[0]["energy"], maps(X)[0]["energy"]) and torch.equal(only[1], maps(X)[1])


# ──────────────────────────────────────────────── data sets ────────────────────────────────────────────────

def image(path, size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)


def mask(path, ids=(0, 1, 255), size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[0, :len(ids)] = ids
    Image.fromarray(pixels).save(path)


LAYOUTS = {   # (data set, layout): images and masks that belong together, files beside them that do not count
    ("roadanomaly", "official"): (("frames/animals01_a.jpg", "frames/animals01_a.labels/labels_semantic.png"),
                                  ("frames/x.webp", "frames/x.labels/labels_semantic.png"),
                                  "frames/x.labels/labels_instance.png", "frames/x.labels/labels_semantic_color.png"),
    ("roadanomaly", "plain"): (("images/0.jpg", "labels_masks/0.png"), ("images/1.webp", "labels_masks/1.png")),
    ("roadanomaly21", "official"): (
        ("images/validation0000.jpg", "labels_masks/validation0000_labels_semantic.png"),
        "images/airplane0000.jpg", "labels_masks/validation0000_labels_semantic_color.png"),
    ("roadobstacle21", "official"): (
        ("images/validation_1.webp", "labels_masks/validation_1_labels_semantic.png"),
        ("images/validation_10.webp", "labels_masks/validation_10_labels_semantic.png"), "images/snowstorm1_0.webp"),
    ("roadobstacle21", "plain"): (("images/0.webp", "labels_masks/0.png"), ("images/1.webp", "labels_masks/1.png")),
    ("fishyscapes_static", "official"): (
        ("validation_set/0000_frankfurt_0_rgb.png", "validation_set/0000_frankfurt_0_labels.png"),
        ("validation_set/0001_munster_1_rgb.jpg", "validation_set/0001_munster_1_labels.png")),
    ("fishyscapes_static", "plain"): (("images/7.jpg", "labels_masks/7.png"),),
    ("fishyscapes_static", "original"): (("original/7.png", "labels/7.png"),),
    ("fishyscapes_laf", "official"): (
        ("leftImg8bit/test/04_Maurener_Weg_8/04_Maurener_Weg_8_000000_000030_leftImg8bit.png",
         "fishyscapes_lostandfound/0000_04_Maurener_Weg_8_000000_000030_labels.png"),
        ("leftImg8bit/train/01_Hanns_Klemm_Str_45/01_Hanns_Klemm_Str_45_000000_000080_leftImg8bit.png",
         "fishyscapes_lostandfound/0031_01_Hanns_Klemm_Str_45_000000_000080_labels.png"),
        "leftImg8bit/train/01_Hanns_Klemm_Str_45/01_Hanns_Klemm_Str_45_000000_000090_leftImg8bit.png"),
    ("fishyscapes_laf", "plain"): (("images/0.png", "labels_masks/0.png"),),
    ("idd_lite", "official"): (("leftImg8bit/val/119/903127_image.jpg", "gtFine/val/119/903127_label.png"),
                               "gtFine/val/119/903127_inst_label.png"),
}


@pytest.mark.parametrize("data, layout", LAYOUTS)
def test_layouts(tmp_path, data, layout):
    ids, want = (0, 2, 1) if data == "roadanomaly" else (0, 1, 255), []
    for entry in LAYOUTS[data, layout]:
        if isinstance(entry, str):
            mask(tmp_path / entry, (9, 9, 9))              # ids that would be refused
            continue
        image(tmp_path / entry[0])
        mask(tmp_path / entry[1], ids)
        want.append((tmp_path / entry[0], tmp_path / entry[1]))
    if data == "idd_lite":
        shutil.copytree(tmp_path / "leftImg8bit/val", tmp_path / "leftImg8bit/train")
        shutil.copytree(tmp_path / "gtFine/val", tmp_path / "gtFine/train")
        scenes = common.Scenes(data, tmp_path, "val")
        assert scenes.pairs == want and scenes[0]["label"][0, :3].tolist() == [0, 1, common.IGNORED]
        assert len(scenes.classes) == 7
        return
    scenes = common.Scenes(data, tmp_path, "test")
    assert sorted(scenes.pairs) == sorted(want) and scenes.classes == []
    third = common.KNOWN if data == "roadanomaly" else common.IGNORED
    for i in range(len(scenes)):
        assert scenes[i]["label"][0, :3].tolist() == [common.KNOWN, common.ANOMALY, third]


def test_entries_are_in_the_terms_of_dataset_json():
    for data, entry in common.DATASETS.items():
        if data != "folder":
            common.check_spec(json.loads(json.dumps(entry)))
    for wrong, told in (({"common": "("}, "splits.test.common: expected a regular expression"),
                        ({"spare_images": "yes"}, "splits.test.spare_images: expected true or false")):
        spec = {"classes": {}, "anomaly": [1], "splits": {"test": {"images": "a", "labels": "b", **wrong}}}
        with pytest.raises(common.InputError, match=told):
            common.check_spec(spec)
    for wrong in ([10], [10, "50"], [0, 5], [True, 5]):
        with pytest.raises(common.InputError, match="objects: expected two numbers of pixels"):
            common.check_spec({"classes": {}, "anomaly": [1], "objects": wrong, "splits": {"test": []}})


def anomalies(root, n=2, ids=(0, 2), size=(96, 54), suffix=".webp"):
    """A RoadAnomaly of n images with an object of 30×20 pixels each."""
    for i in range(n):
        image(root / f"images/{i}{suffix}", size)
        pixels = np.full(size[::-1], ids[0], np.uint8)
        pixels[10:30, 10 + 5 * i:40 + 5 * i] = ids[1]
        (root / "labels_masks").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"labels_masks/{i}.png")
    return root


def refused(small, folder, *args, code=1):
    """One line, and the exit status."""
    done = run("evaluate.py", "--ckpt", small / "pretrained.pt", *args, folder=folder)
    lines = [line for line in done.err.splitlines() if line.startswith(("error", "evaluate.py: error"))]
    assert done.code == code and len(lines) == 1 and "Traceback" not in done.err, done.err
    assert not (folder / "results/results.json").exists()
    return done.err


def test_bad_test_sets(small, tmp_path):
    data = ("--data", "roadanomaly", "--root", "RA")
    root = anomalies(tmp_path / "RA")
    mask(root / "labels_masks/1.png", (0, 2, 7), (96, 54))
    told = refused(small, tmp_path, *data)
    assert "labels_masks/1.png: holds id 7; expected 0, 1, 2" in told
    mask(root / "labels_masks/1.png", (0, 2), (54, 96))
    assert "1.png: the label is 54×96, its image 96×54; expected the same size" in refused(small, tmp_path, *data)
    (root / "labels_masks/1.png").unlink()
    assert "1 image without label: RA/images/1.webp (expected RA/labels_masks/1.png)" in \
        refused(small, tmp_path, *data)
    image(root / "labels_masks/1.jpg", (96, 54))                       # a JPEG keeps no ids
    assert "1 image without label" in refused(small, tmp_path, *data)
    mask(root / "labels_masks/1.png", (0, 2), (96, 54))
    (root / "images/1.webp").write_bytes((root / "images/1.webp").read_bytes()[:60])
    assert "images/1.webp: cannot be read as an image" in refused(small, tmp_path, *data)
    assert "not the layout of roadobstacle21: splits.test.images: no folder images" in \
        refused(small, tmp_path, "--data", "roadobstacle21", "--root", small / "toy")
    for path in (tmp_path / "IDD/leftImg8bit/val/0/0_image.jpg", tmp_path / "IDD/leftImg8bit/train/0/0_image.jpg"):
        image(path)
        mask(Path(str(path).replace("leftImg8bit", "gtFine").replace("_image.jpg", "_label.png")))
    told = refused(small, tmp_path, "--data", "idd_lite", "--root", "IDD", "--split", "val")
    assert "IDD: has the classes drivable, non-drivable" in told and "in its order: background" in told
    assert "--open: the labels of roadanomaly tell no classes" in refused(small, tmp_path, *data, "--open")
    for flags, part in ((("--size", "0"), "--size"), (("--size", "10.5", "20"), "--size"), (("--size", "1", "2", "3"),
                        "--size"), (("--components", "5"), "--components"), (("--operating-point", "1"), "RECALL"),
                        (("--root", "a", "b"), "--root: 2 for 1"), (("--tta", "-1"), "--tta"),
                        (("--data", "toy", "roadanomaly", "--panels", "0.png"), "--panels")):
        told = refused(small, tmp_path, *flags, code=2)
        assert "error: argument" in told and (part in told or "--operating-point" in told)


def test_thresholds_of_labels_without_classes(toy_root):
    """They come from f's own validation images, in the folder of --train-root where that has moved."""
    scenes = SimpleNamespace(classes=(), data="roadanomaly")
    checkpoint = dict(data="toy", root="/nowhere", anomaly=None, classes=common.Scenes("toy", toy_root, "val").classes)
    found = evaluate.validation_scenes(scenes, checkpoint, str(toy_root))
    assert (found.split, len(found)) == ("val", len(common.Scenes("toy", toy_root, "val"))) and len(found)
    with pytest.raises(common.InputError, match="nowhere.*--train-root"):
        evaluate.validation_scenes(scenes, checkpoint)


def test_thresholds_of_f_s_own_data_come_from_the_train_root(toy_root, tmp_path):
    """Where the test images lie in a folder that has no others."""
    other = shutil.copytree(toy_root, tmp_path / "toy")
    scenes = common.Scenes("toy", toy_root, "test")
    checkpoint = dict(data="toy", root=str(toy_root), anomaly=None, classes=scenes.classes)
    for root, of in (("/of/the/test/images/alone", toy_root), (toy_root, toy_root), (other, other)):
        scenes.root = root
        found = evaluate.validation_scenes(scenes, checkpoint, str(toy_root))
        assert (found.split, str(found.root)) == ("val", str(of))


# ─────────────────────────────────────────── the script, as it is run ───────────────────────────────────────────

def results(folder):
    return json.loads((folder / "results.json").read_text())


def model_maps(small, split="test", data="toy", root=None):
    """[(score msp float64, prediction, label ids)] of the small checkpoint, by its own forward pass."""
    f, _ = common.load_checkpoint(small / "pretrained.pt")
    scenes = common.Scenes(data, root or small / "toy", split)
    found = []
    for i in range(len(scenes)):
        with torch.no_grad():
            S = f(common.to_input(scenes[i]["image"][None])).double().softmax(1)[0].numpy()
        rest = np.sort(S, 0)[:-1].sum(0)                    # 1 − max S, without cancellation
        found.append((np.log(rest), S.argmax(0), scenes[i]["label"].numpy(), scenes.name(i)))
    return found


def test_objects_and_open_miou_of_a_model(small, tmp_path):
    """From f's maps: folds t5 and t6, each at the other's threshold; objects at the best F1 of all pixels."""
    run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--components", 20, 30, "--open", "--operating-point", 0.9,
           "--panels", 0, folder=tmp_path)
    row = results(tmp_path / "results")["rows"][0]
    maps = model_maps(small)
    y = np.concatenate([(Z == common.ANOMALY).ravel() for _, _, Z, _ in maps])
    s = np.concatenate([score.ravel() for score, *_ in maps])
    precision, recall, at = precision_recall_curve(y, s)
    t = at[np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))]
    assert row["objects"]["threshold"] == pytest.approx(t, rel=1e-4)
    close = row["objects"]["threshold"] - 1e-7
    pictures = [(score >= close, Z == common.ANOMALY, np.zeros(Z.shape, bool)) for score, _, Z, _ in maps]
    want = by_hand(pictures, (20, 30))
    assert tuple(row["objects"][k] for k in ("siou", "ppv", "f1")) == pytest.approx(want, abs=0.3)
    assert row["objects"]["objects"] == sum(len(k) >= 20 for _, anomalous, _ in pictures for k in components(anomalous))

    folds = [[m for m in maps if f"/{town}/" in m[3]] for town in ("t5", "t6")]
    assert all(folds)
    miou = []
    for here, other in (folds, folds[::-1]):
        y = np.concatenate([(Z == common.ANOMALY).ravel() for _, _, Z, _ in other])
        fpr, tpr, at = roc_curve(y, np.concatenate([score.ravel() for score, *_ in other]), drop_intermediate=False)
        t = at[np.argmax(tpr >= 0.95)]
        prediction = np.concatenate([np.where(score >= t - 1e-9, 12, p).ravel() for score, p, _, _ in here])
        label = np.concatenate([Z.ravel() for _, _, Z, _ in here])
        label = np.where(label == common.ANOMALY, 12, np.where(label == common.IGNORED, 13, label))
        matrix = evaluate.common.confusion(torch.from_numpy(prediction.astype(np.uint8)),
                                           torch.from_numpy(label.astype(np.uint8)), 13)
        present = np.unique(label[label < 12])
        iou = [100 * ((prediction == c) & (label == c)).sum() /
               (((prediction == c) & (label != 13)) | (label == c)).sum() for c in present]
        assert matrix.sum() == (label < 13).sum()
        miou.append(np.mean(iou))
    assert [row["open"]["fold_0"], row["open"]["fold_1"]] == pytest.approx(miou, abs=0.05)
    assert row["open"]["miou"] == pytest.approx(np.average(miou, weights=[len(f) for f in folds]), abs=0.05)
    assert row["open"]["miou"] < row["miou"]

    # No anomaly in the validation images: 10 % of their pixels are flagged
    s = np.sort(np.concatenate([score.ravel() for score, *_ in model_maps(small, "val")]))
    t = row["operating_point"]["threshold"]
    assert t == pytest.approx(s[len(s) - math.ceil(0.1 * len(s))], rel=1e-4)
    assert row["operating_point"]["delta"] == pytest.approx(1 - math.exp(t))
    s, y = (np.concatenate(v) for v in zip(*[(m[0].ravel(), (m[2] == common.ANOMALY).ravel()) for m in maps]))
    assert row["operating_point"]["recall"] == pytest.approx(100 * (s[y] >= t).mean(), abs=0.2)
    assert row["operating_point"]["fpr"] == pytest.approx(100 * (s[~y] >= t).mean(), abs=0.2)


def test_validation_images_with_anomalies_give_a_recall(small, tmp_path):
    shutil.copytree(small / "toy", tmp_path / "mine")
    spec = dict(common.DATASETS["toy"], splits={s: common.STREETHAZARDS["splits"]["test"] for s in ("val", "test")})
    (tmp_path / "mine/dataset.json").write_text(json.dumps(spec))
    run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--data", "folder", "--root", "mine", "--panels", 0,
           "--operating-point", 0.8, folder=tmp_path)
    found = results(tmp_path / "results")["rows"][0]["operating_point"]
    y = np.concatenate([(Z == common.ANOMALY).ravel() for _, _, Z, _ in model_maps(small)])
    assert 80 <= found["recall"] <= 80 + 100 / y.sum() + 0.01


def test_thresholds_of_two_data_sets_in_one_folder(small, tmp_path):
    """Each has the validation images of its own: the threshold that it has alone."""
    shutil.copytree(small / "toy", tmp_path / "mine")
    spec = dict(common.DATASETS["toy"], splits={s: common.STREETHAZARDS["splits"]["test"] for s in ("val", "test")})
    (tmp_path / "mine/dataset.json").write_text(json.dumps(spec))
    command = ("evaluate.py", "--ckpt", small / "pretrained.pt", "--operating-point", 0.8, "--panels", 0)
    run_ok(*command, "--data", "toy", "folder", "--root", "mine", "mine", "--out", "both", folder=tmp_path,
           before=NO_FIGURES)
    both = {row["data"]: row["operating_point"] for row in results(tmp_path / "both")["rows"]}
    for data in both:
        run_ok(*command, "--data", data, "--root", "mine", "--out", data, folder=tmp_path, before=NO_FIGURES)
        assert both[data] == results(tmp_path / data)["rows"][0]["operating_point"]
    assert both["toy"]["threshold"] != both["folder"]["threshold"]


def test_validation_images_are_looked_for_first_and_where_they_are_needed(small, tmp_path):
    """The checkpoint's data have moved: --open of a set with classes and of one without needs them for neither."""
    shutil.copytree(small / "toy", tmp_path / "moved")
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, root=str(tmp_path / "gone")), tmp_path / "ft.pt")
    anomalies(tmp_path / "ra")
    command = ("evaluate.py", "--data", "toy", "roadanomaly", "--root", "moved", "ra", "--panels", 0)
    run_ok(*command, "--open", "--score", "msp", "energy", "msp", folder=tmp_path)
    rows = results(tmp_path / "results")["rows"]
    assert [(row["data"], row["score"], "open" in row) for row in rows] == [
        (data, score, data == "toy") for data in ("toy", "roadanomaly") for score in ("msp", "energy")]
    done = run(*command, "--operating-point", 0.9, folder=tmp_path)
    assert done.code == 1 and "gone" in done.err and done.err.count("\n") == 1, done.err
    assert "time: forward" not in done.out, "it evaluated first"


def test_unlabeled_other_and_the_base_line(small, tmp_path):
    """Id 4 is left out, background is a negative; a constant score has the mean share of anomalies as its AUPR."""
    shutil.copytree(small / "toy", tmp_path / "toy")
    share, left_out = [], 0
    for k, path in enumerate(sorted((tmp_path / "toy/test/annotations").rglob("*.png"))):
        ids = np.array(Image.open(path))
        ids[:5 + k, :20] = 4
        Image.fromarray(ids).save(path)
        counted = ids != 4
        share.append(average_precision_score(ids[counted] == 14, np.zeros(counted.sum())))
        left_out += (~counted).sum()
    args = ("--ckpt", small / "pretrained.pt", "--root", "toy", "--panels", 0)
    done = run_ok("evaluate.py", *args, "--unlabeled", "other", folder=tmp_path)
    found = results(tmp_path / "results")
    assert found["protocol"]["ignored_pixels"] == left_out
    assert found["protocol"]["base_rate_per_image"] == pytest.approx(100 * np.mean(share), abs=1e-4)
    assert f"AUPR {found['protocol']['base_rate_per_image']} per image" in done.out
    maps = model_maps(small, root=tmp_path / "toy")
    keep = [Z != common.IGNORED for _, _, Z, _ in maps]
    aupr = average_precision_score(np.concatenate([(m[2] == common.ANOMALY)[k] for m, k in zip(maps, keep)]),
                                   np.concatenate([m[0][k] for m, k in zip(maps, keep)]))
    assert found["pooled"]["aupr"] == pytest.approx(100 * aupr, abs=0.02)
    run_ok("evaluate.py", *args, folder=tmp_path)
    assert results(tmp_path / "results")["protocol"]["ignored_pixels"] == 0


def test_several_data_sets_for_any_batch_size_and_number_of_ranks(small, tmp_path, monkeypatch):
    """One table, one results.json, figures of each; the same bytes however the work is split; and the objects of a set
    as they are by hand, of the views that the flags ask for and without the ignored pixels."""
    anomalies(tmp_path / "RA", n=3, suffix=".jpg")
    anomalies(tmp_path / "RO", n=1, ids=(255, 1))
    mask(tmp_path / "RO/labels_masks/1.png", (0, 1, 255), (96, 54))
    image(tmp_path / "RO/images/1.webp", (96, 54))
    image(tmp_path / "RO/images/2.webp", (96, 54))         # the benchmark's test images have no label
    args = ("--ckpt", small / "pretrained.pt", "--data", "toy", "roadanomaly", "roadobstacle21",
            "--root", small / "toy", "RA", "RO", "--components", "--open", "--operating-point", 0.95,
            "--score", "msp", "energy", "--size", 40, 64, "--tta", "--panels", 1)
    done = run_ok("evaluate.py", *args, folder=tmp_path)
    bytes_of = lambda out: (tmp_path / out / "results.json").read_bytes()
    run_ok("evaluate.py", *args, "--batch-size", 1, "--workers", 2, "--out", "one", folder=tmp_path,
           before=NO_FIGURES)
    run_ranks("evaluate.py", *args, "--batch-size", 3, "--out", "ranks", folder=tmp_path, before=NO_FIGURES)
    assert bytes_of("one") == bytes_of("ranks") == bytes_of("results")
    found = results(tmp_path / "results")
    names = [f"{figure}_{d}.png" for figure in ("curves", "panels", "threshold") for d in found["protocol"]]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == sorted([*names, "results.json"])
    assert [(r["data"], r["score"]) for r in found["rows"]] == [(d, s) for d in found["protocol"]
                                                                for s in ("msp", "energy")]
    assert found["protocol"]["roadobstacle21"]["images"] == 2 and found["protocol"]["toy"]["size"] == [40, 64]
    assert found["protocol"]["roadobstacle21"]["ignored_pixels"] == 96 * 54 - 600 + 1    # no labels of classes: always
    assert found["protocol"]["roadobstacle21"]["objects"] == "at least 10 pixels; predictions of at least 50"
    assert found["protocol"]["roadanomaly"]["objects"] == "at least 100 pixels; predictions of at least 500"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args)])
    assert evaluate.parse().views == [([40, 64], 1, False), ([40, 64], 1, True)]
    f = common.load_checkpoint(small / "pretrained.pt")[0]
    pictures, scenes = [], common.Scenes("roadobstacle21", tmp_path / "RO", "test")
    at = next(r for r in found["rows"] if (r["data"], r["score"]) == ("roadobstacle21", "energy"))["objects"]
    for item in scenes:
        X = nn.functional.interpolate(item["image"][None] / 255, (40, 64), mode="bilinear", antialias=True)
        with torch.no_grad():
            maps = [-nn.functional.interpolate(z.logsumexp(1, keepdim=True), item["label"].shape, mode="bilinear")[0, 0]
                    for z in (f(X), f(X.flip(3)).flip(3))]
        flagged = (sum(maps) / 2).numpy() >= at["threshold"] - 1e-5
        pictures.append((flagged, (item["label"] == common.ANOMALY).numpy(),
                         (item["label"] == common.IGNORED).numpy()))
    assert tuple(at[k] for k in ("siou", "ppv", "f1")) == pytest.approx(by_hand(pictures, (10, 50)), abs=0.5)
    for row in found["rows"]:
        assert ("open" in row) == (row["miou"] is not None) == (row["data"] == "toy") and "objects" in row
    table = [line.split()[:3] for line in done.out.splitlines() if " pretrained " in line]
    assert table[:6] == [[d, "pretrained", s] for d in found["protocol"] for s in ("msp", "energy")]
    run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--panels", 0, folder=tmp_path)
    assert not list((tmp_path / "results").glob("*_*.png")), "a folder holds one run"


def test_nothing_to_count(small, tmp_path):
    """A test set without anomalies: dashes, no traceback."""
    anomalies(tmp_path / "RA", ids=(0, 0))
    done = run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--data", "roadanomaly", "--root", "RA",
                  "--components", "--operating-point", 0.5, folder=tmp_path)
    row = results(tmp_path / "results")["rows"][0]
    assert row["objects"] == dict(siou=None, ppv=None, f1=None, objects=0, predictions=0, threshold=None)
    assert row["pooled"] is None and row["operating_point"]["recall"] is None and "no anomalous pixel" in done.out
    shutil.copytree(small / "toy", tmp_path / "bad")                  # no threshold, in the first row of the table
    for path in (tmp_path / "bad/train/annotations/validation").rglob("*.png"):
        Image.fromarray(np.full_like(np.array(Image.open(path)), 4)).save(path)
    done = run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--data", "toy", "toy", "--root", "bad",
                  small / "toy", "--operating-point", 0.9, "--unlabeled", "other", folder=tmp_path, before=NO_FIGURES)
    points = [row["operating_point"] for row in results(tmp_path / "results")["rows"]]
    assert [p["threshold"] is None for p in points] == [True, False] and points[0].keys() == points[1].keys()
