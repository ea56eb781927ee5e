"""Datasets: small trees in the layouts of StreetHazards, BDD100K and CamVid; augmentation, caches, toy scenes."""
import filecmp
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import toy

H, W = 24, 36
IGNORED, ANOMALY = 255, 254


def put(path, array, mode=None):
    """Write an array as an image file, in another mode of Pillow's if asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    image = image.convert(mode) if mode else image
    image.save(path)


def picture(seed=0, size=(H, W)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def ids(*values, size=(H, W)):
    """A label with the values in vertical stripes."""
    return np.repeat(np.resize(np.array(values, np.uint8), size[1])[None], size[0], 0)


def refused(call, *words):
    with pytest.raises(common.InputError) as e:
        call()
    for word in words:
        assert str(word) in str(e.value), str(e.value)
    return str(e.value)


def streethazards(root, train=ids(1, 2, 3), val=ids(8), test=ids(8, 14)):
    """{split: number of images}: 3, 2 and 2 + 1 in the two test towns."""
    n = 0
    for folder, town, count, label in (("train/{}/training", "t1-3", 3, train), ("train/{}/validation", "t4", 2, val),
                                       ("test/{}/test", "t5", 2, test), ("test/{}/test", "t6", 1, test)):
        for i in range(count):
            n += 1
            put(root / folder.format("images") / town / f"{i}.png", picture(n))
            put(root / folder.format("annotations") / town / f"{i}.png", label)
    (root / "train" / "training.odgt").write_text("[]")
    return root


BDD = {"new": ("images/10k/{split}/{name}.jpg", "labels/sem_seg/masks/{split}/{name}.png"),
       "old": ("seg/images/{split}/{name}.jpg", "seg/labels/{split}/{name}_train_id.png")}
BDD_LABELS = {   # (folder, name): ids; 16 = train, 17 = motorcycle
    ("train", "a"): ids(0, 1, 255), ("train", "b"): ids(0, 16), ("train", "c"): ids(10, 18), ("train", "d"): ids(17, 13),
    ("val", "e"): ids(2, 255), ("val", "f"): ids(0, 16, 17), ("val", "g"): ids(8, 12)}


def bdd(root, layout="new", labels=BDD_LABELS):
    for n, ((split, name), label) in enumerate(labels.items()):
        for kind, pattern in zip((picture(n), label), BDD[layout]):
            put(root / pattern.format(split=split, name=name), kind)
    return root


def camvid(root, labels):
    """labels: {(folder, name): ids}."""
    for folder in common.SPLITS:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / f"{folder}annot").mkdir(exist_ok=True)
    for n, ((folder, name), label) in enumerate(labels.items()):
        put(root / folder / f"{name}.png", picture(n))
        put(root / f"{folder}annot" / f"{name}.png", label)
    return root


def stems(pairs):
    return sorted(Path(image).stem for image, _ in pairs)


# ────────────────────────────────────────────── ids and classes ──────────────────────────────────────────────

# The datasets' own documents: name of every id in the PNGs, None where pixels do not count.
STREETHAZARDS_IDS = {1: "background", 2: "building", 3: "fence", 4: None, 5: "pedestrian", 6: "pole", 7: "road line", 8: "road",
                     9: "sidewalk", 10: "vegetation", 11: "car", 12: "wall", 13: "traffic sign", 14: "anomaly"}
CITYSCAPES_IDS = dict(enumerate((
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "anomaly", "anomaly", "bicycle"))) | {255: None}
CAMVID_IDS = dict(enumerate(("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                             "anomaly", None)))


@pytest.mark.parametrize("data, names, N", (("streethazards", STREETHAZARDS_IDS, 12), ("toy", STREETHAZARDS_IDS, 12),
                                            ("bdd", CITYSCAPES_IDS, 17), ("camvid", CAMVID_IDS, 10)))
def test_ids(data, names, N):
    classes, lut = common.dataset_classes(data)
    assert len(classes) == N and lut.dtype == np.uint8 and lut.shape == (256,)
    assert [classes[lut[i]] for i, name in names.items() if name not in (None, "anomaly")] == \
        [name for name in names.values() if name not in (None, "anomaly")]
    assert {i for i in range(256) if lut[i] == IGNORED} == {i for i, name in names.items() if name is None}
    assert {i for i in range(256) if lut[i] == ANOMALY} == {i for i, name in names.items() if name == "anomaly"}
    assert {i for i in range(256) if lut[i] == 253} == set(range(256)) - names.keys()
    assert sorted(set(lut.tolist()) - {253, 254, 255}) == list(range(N))


def test_other_anomaly_classes():
    classes, lut = common.dataset_classes("camvid", ["car", "sky"])
    assert classes == ["building", "pole", "road", "pavement", "tree", "sign", "fence", "pedestrian", "bicyclist"]
    assert [lut[i] for i in range(12)] == [ANOMALY, 0, 1, 2, 3, 4, 5, 6, ANOMALY, 7, 8, IGNORED]
    classes, lut = common.dataset_classes("bdd", ["train", "motorcycle", "bicycle"])    # the split of the CAOS script
    assert len(classes) == 16 and (lut[16:19] == ANOMALY).all()


def test_anomaly_classes_that_are_none():
    refused(lambda: common.dataset_classes("camvid", ["tram"]), "--anomaly tram", "bicyclist")
    refused(lambda: common.dataset_classes("streethazards", ["car"]), "--anomaly", "bdd and camvid")


def test_class_indices():
    assert common.class_indices(["car", "sky"], ["sky", "road", "car"], "--known-unknown") == [2, 0]
    refused(lambda: common.class_indices(["tram"], ["sky", "road"], "--known-unknown"), "--known-unknown tram", "sky, road")


# ─────────────────────────────────────────────── StreetHazards ───────────────────────────────────────────────

def test_streethazards(tmp_path, capsys):
    root = streethazards(tmp_path, train=ids(*range(1, 14)), test=ids(*range(1, 15)))
    for split, n, real in (("train", 3, 5125), ("val", 2, 1031), ("test", 3, 1500)):
        scenes = common.Scenes("streethazards", root, split)
        warning = capsys.readouterr().out
        assert len(scenes) == n and len(scenes.classes) == 12
        assert warning.count("warning") == 1 and f"{n} {split} images" in warning and str(real) in warning
        assert [scenes.name(i) for i in range(n)] == sorted(scenes.name(i) for i in range(n))
    item = scenes[0]
    assert item["image"].dtype == item["label"].dtype == torch.uint8
    assert item["image"].shape == (3, H, W) and item["label"].shape == (H, W) and item["index"] == 0
    want = [0, 1, 2, IGNORED, 3, 4, 5, 6, 7, 8, 9, 10, 11, ANOMALY]
    assert item["label"][5, :14].tolist() == want
    assert [Path(scenes.name(i)).parent.name for i in range(3)] == ["t5", "t5", "t6"]
    for i, seed in enumerate((6, 7, 8)):    # the pixels of the very file
        assert np.array_equal(scenes[i]["image"].permute(1, 2, 0).numpy(), picture(seed))


def test_synthetic_unknown_pixels_of_known_classes(tmp_path):
    """The pilot study: D_s is the pixels of the classes (Sec. IV-C)."""
    root = streethazards(tmp_path, train=ids(1, 2, 3, 4, 13))
    plain = common.Scenes("streethazards", root, "train")
    assert "unknown" not in plain[0]
    item = common.Scenes("streethazards", root, "train", unknown=[1, 11])[0]     # building (id 2), traffic sign (id 13)
    assert item["unknown"].dtype == torch.bool
    assert np.array_equal(item["unknown"].numpy(), np.isin(ids(1, 2, 3, 4, 13), (2, 13)))


@pytest.mark.parametrize("data", common.DATASETS)
def test_missing_folder(tmp_path, data):
    for root, found in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "photographs")):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        message = refused(lambda: common.Scenes(data, root, "train"), root, found, common.DATASETS[data]["source"])
        for line in common.DATASETS[data]["layout"].splitlines():
            assert line in message


def test_one_missing_folder_is_named(tmp_path):
    root = streethazards(tmp_path)
    (root / "train/annotations/validation").rename(root / "elsewhere")
    refused(lambda: common.Scenes("streethazards", root, "train"), "no folder train/annotations/validation")


def test_missing_annotation(tmp_path):
    root = streethazards(tmp_path)
    label = root / "train/annotations/training/t1-3/1.png"
    label.unlink()
    refused(lambda: common.Scenes("streethazards", root, "train"), root / "train/images/training/t1-3/1.png", label)


def test_empty_split(tmp_path):
    root = streethazards(tmp_path)
    for path in (root / "train/images/validation").rglob("*.png"):
        path.unlink()
    refused(lambda: common.Scenes("streethazards", root, "val"), root, "val split", "empty")
    assert len(common.Scenes("streethazards", root, "train")) == 3


def test_wrong_size(tmp_path):
    root = streethazards(tmp_path)
    label = root / "train/annotations/training/t1-3/1.png"
    put(label, ids(1, size=(H, W - 2)))
    scenes = common.Scenes("streethazards", root, "train")
    scenes[0]
    message = refused(lambda: scenes[1], label, f"{W - 2}×{H}", f"{W}×{H}")
    assert "\n" not in message


def test_id_outside_the_set(tmp_path):
    root = streethazards(tmp_path, train=ids(1, 8, 15))
    label = root / "train/annotations/training/t1-3/0.png"
    refused(lambda: common.Scenes("streethazards", root, "train")[0], label, "holds id 15", "1, 2, 3")


# ──────────────────────────────────────────────── file modes ────────────────────────────────────────────────

@pytest.mark.parametrize("mode", ("RGBA", "L", "P", "RGB", "LA", "1", "CMYK"))
def test_image_modes(tmp_path, mode):
    path = tmp_path / ("a.png" if mode != "CMYK" else "a.tif")
    grey = np.repeat(255 * (picture(1)[..., :1] > 127), 3, 2).astype(np.uint8)    # survives every mode
    put(path, grey, mode)
    assert Image.open(path).mode == mode
    got = common.read_image(path)
    assert got.dtype == np.uint8 and np.array_equal(got, grey)


def test_colours_of_an_rgba_image_do_not_depend_on_its_alpha(tmp_path):
    rgba = np.dstack([picture(1), picture(2)[..., 0]])
    put(tmp_path / "a.png", rgba)
    assert np.array_equal(common.read_image(tmp_path / "a.png"), rgba[..., :3])


def test_palette_label_gives_indices(tmp_path):
    want = ids(1, 8, 13, 14)
    image = Image.new("P", (W, H))
    image.putdata(want.ravel().tolist())
    image.putpalette(picture(3, (16, 16)).ravel().tolist())
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert np.array_equal(common.read_label(tmp_path / "a.png"), want)


def test_label_of_16_bits(tmp_path):
    small, path = ids(1, 8, 14).astype(np.uint16), tmp_path / "a.png"
    put(path, small)
    assert Image.open(path).mode.startswith("I")
    got = common.read_label(path)      # what fits is taken
    assert got.dtype == np.uint8 and np.array_equal(got, small)
    put(path, small + 256 * (small == 8).astype(np.uint16))
    assert "\n" not in refused(lambda: common.read_label(path), path, "8-bit")


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "LA"))
def test_colour_label(tmp_path, mode):
    put(tmp_path / "a.png", ids(1, 8), mode)
    assert "\n" not in refused(lambda: common.read_label(tmp_path / "a.png"), tmp_path / "a.png", "8-bit channel", H, W)


@pytest.mark.parametrize("suffix", ("png", "jpg"))
@pytest.mark.parametrize("part", (0, 0.02, 0.5, 0.95))
def test_truncated_files(tmp_path, suffix, part):
    path = tmp_path / f"a.{suffix}"
    put(path, picture())
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    for read in (common.read_image, common.read_label):
        assert "\n" not in refused(lambda: read(path), path, "cannot be read")


def test_other_files(tmp_path):
    (tmp_path / "a.png").write_text("<html>404</html>")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png", "missing.png"):
        for read in (common.read_image, common.read_label):
            refused(lambda: read(tmp_path / name), tmp_path / name)


# ────────────────────────────────────────────── BDD-Anomaly ──────────────────────────────────────────────

@pytest.mark.parametrize("layout", BDD)
def test_bdd_split(tmp_path, layout, capsys):
    """Every image with a train or motorcycle pixel, of either folder, is a test image."""
    root = bdd(tmp_path, layout)
    want = dict(train=["a", "c"], val=["e", "g"], test=["b", "d", "f"])
    for split, real in (("train", 6688), ("val", 951), ("test", 361)):
        scenes = common.Scenes("bdd", root, split)
        warning = capsys.readouterr().out
        assert stems(scenes.pairs) == want[split] and len(scenes.classes) == 17
        assert f"{len(want[split])} {split} images" in warning and str(real) in warning
        for image, label in scenes.pairs:
            assert label == root / BDD[layout][1].format(split=image.parent.name, name=image.stem)
    labels = {Path(scenes.name(i)).stem: scenes[i]["label"].numpy() for i in range(3)}
    assert labels["b"][0, :2].tolist() == [0, ANOMALY] and labels["d"][0, :2].tolist() == [ANOMALY, 13]
    bicycle = common.Scenes("bdd", root, "train")[1]["label"]
    assert bicycle[0, :2].tolist() == [10, 16]      # bicycle moves up behind the two anomalies


def test_bdd_split_of_other_anomalies(tmp_path, capsys):
    root = bdd(tmp_path)
    assert stems(common.split_pairs("bdd", root, "test", ["train", "motorcycle", "bicycle"])) == ["b", "c", "d", "f"]
    assert stems(common.split_pairs("bdd", root, "test", ["terrain", "rider"])) == ["g"]
    assert "warning" not in capsys.readouterr().out      # the paper's counts say nothing about them


def test_bdd_without_anomalies_has_no_test_split(tmp_path):
    root = bdd(tmp_path, labels={k: v for k, v in BDD_LABELS.items() if k[1] in "aceg"})
    refused(lambda: common.Scenes("bdd", root, "test"), root, "test split", "empty")


@pytest.mark.parametrize("split", common.SPLITS)
def test_bdd_rerelease_with_other_ids(tmp_path, split):
    """id + 2, with 1 = ignore: read as train ids it would be silently wrong."""
    shifted = {k: np.where(v == 255, 1, v + 2).astype(np.uint8) for k, v in BDD_LABELS.items()}
    root = bdd(tmp_path, labels=shifted)
    first = root / "labels/sem_seg/masks/train/c.png"      # bicycle, 18 + 2
    assert "\n" not in refused(lambda: common.Scenes("bdd", root, split), first, "holds id 20", "id + 2", "Cityscapes train ids")


def scans(monkeypatch):
    """List that grows by the path of every label file that is read."""
    read, seen = common.read_label, []

    def counting(path):
        seen.append(Path(path).stem)
        return read(path)
    monkeypatch.setattr(common, "read_label", counting)
    return seen


def test_scan_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, seen = bdd(tmp_path / "bdd"), scans(monkeypatch)
    first = common.split_pairs("bdd", root, "test")
    assert sorted(seen) == list("abcdefg")
    assert common.split_pairs("bdd", root, "test") == first and len(seen) == 7
    common.split_pairs("bdd", root, "train")
    assert len(seen) == 7
    assert [p.parent.name for p in (tmp_path / "cache").rglob("*.npz")] == ["mgu-aaft"]


def test_scan_is_repeated_where_a_mask_changed(tmp_path, monkeypatch):
    root, seen = bdd(tmp_path / "bdd"), scans(monkeypatch)
    assert stems(common.split_pairs("bdd", root, "test")) == ["b", "d", "f"]
    mask = root / "labels/sem_seg/masks/train/a.png"
    stat = os.stat(mask)
    put(mask, ids(0, 16, 255))
    os.utime(mask, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))     # even within the clock's resolution
    assert stems(common.split_pairs("bdd", root, "test")) == ["a", "b", "d", "f"]
    assert len(seen) == 14


@pytest.mark.parametrize("damage", (b"", b"PK\x03\x04", b"text"))
def test_damaged_scan_is_repeated(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, seen = bdd(tmp_path / "bdd"), scans(monkeypatch)
    want = common.split_pairs("bdd", root, "test")
    kept, = (tmp_path / "cache").rglob("*.npz")
    kept.write_bytes(damage)
    assert common.split_pairs("bdd", root, "test") == want and len(seen) == 14
    assert common.split_pairs("bdd", root, "test") == want and len(seen) == 14     # written anew


def test_scan_without_a_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert stems(common.split_pairs("bdd", bdd(tmp_path / "bdd"), "test")) == ["b", "d", "f"]


def test_scan_with_a_full_disk(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert stems(common.split_pairs("bdd", bdd(tmp_path / "bdd"), "test")) == ["b", "d", "f"]


def test_id_histograms(tmp_path):
    labels = [ids(0, 1, 255), np.random.default_rng(0).integers(0, 256, (H, W), dtype=np.uint8)]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, label in zip(paths, labels):
        put(path, label)
    got = common.id_histograms(paths)
    assert got.shape == (2, 256) and got.sum() == 2 * H * W
    for row, label in zip(got, labels):
        assert {int(i): int(n) for i, n in zip(*np.unique(label, return_counts=True))} == {i: int(n) for i, n in enumerate(row) if n}


# ──────────────────────────────────────────────── CamVid ────────────────────────────────────────────────

def drives(anomalous=10):
    """Drives of 10, 20 and 2 free images, over two folders, and three images with the anomaly, one in each folder."""
    labels = {(("train", "test")[i % 2], f"{drive}_{i:03d}"): ids(3, 8, 11) for drive, n in (("0001TP", 10), ("0016E5", 20))
              for i in range(n)}
    labels |= {("test", f"Seq05VD_{i:03d}"): ids(3, 0, 11) for i in range(2)}
    return labels | {(folder, f"0001TP_9{n}"): ids(0, anomalous) for n, folder in enumerate(common.SPLITS)}


def test_camvid_split(tmp_path, capsys):
    """Every image with a bicyclist is a test image, of any folder; the last 15 % of each drive validate."""
    root = camvid(tmp_path, drives())
    got = {split: stems(common.split_pairs("camvid", root, split)) for split in common.SPLITS}
    assert got["test"] == ["0001TP_90", "0001TP_91", "0001TP_92"]
    # 10 − ⌈8.5⌉ of ten, 20 − ⌈17⌉ of twenty, 2 − ⌈1.7⌉ of two
    assert got["val"] == ["0001TP_009", "0016E5_017", "0016E5_018", "0016E5_019"]
    assert got["train"] == sorted({name for _, name in drives()} - {*got["test"], *got["val"]}) and len(got["train"]) == 28
    item = common.Scenes("camvid", root, "test")[0]
    assert item["label"][0, :2].tolist() == [0, ANOMALY]
    item = common.Scenes("camvid", root, "train")[0]
    assert item["label"][0, :3].tolist() == [3, 8, IGNORED]
    assert "warning" not in capsys.readouterr().out


def test_camvid_with_another_anomaly(tmp_path):
    root = camvid(tmp_path, drives())
    scenes = common.Scenes("camvid", root, "test", ["car"])
    assert len(scenes) == 30 and len(scenes.classes) == 10 and "bicyclist" in scenes.classes
    assert scenes[0]["label"][0, :3].tolist() == [3, ANOMALY, IGNORED]
    rest = common.Scenes("camvid", root, "train", ["car"])
    bicyclists = [rest[i]["label"] for i in range(len(rest)) if "_9" in rest.name(i)]
    assert bicyclists and all(label[0, :2].tolist() == [0, 9] for label in bicyclists)    # ids above car's move down


@pytest.mark.skipif(not os.environ.get("CAMVID_ROOT"), reason="CAMVID_ROOT names no CamVid folder")
def test_real_camvid():
    splits = {split: common.split_pairs("camvid", os.environ["CAMVID_ROOT"], split) for split in common.SPLITS}
    assert len(splits["test"]) == 379 and sum(map(len, splits.values())) == 701
    assert len({image for pairs in splits.values() for image, _ in pairs}) == 701
    rng = np.random.default_rng(0)
    for split, pairs in splits.items():     # a sample of the masks themselves
        for k in rng.permutation(len(pairs))[:20]:
            assert (10 in np.array(Image.open(pairs[k][1]))) == (split == "test")


# ───────────────────────────────────────────── augmentation ─────────────────────────────────────────────

RAMP = np.arange(240, dtype=np.uint8)


def ramps():
    """An image whose red channel is x and green channel y, and the two labels x and y."""
    y, x = np.meshgrid(RAMP[:160], RAMP, indexing="ij")
    return np.dstack([x, y, np.full_like(x, 7)]), x, y


def augmented(rng_seed, crop, scale, image, label):
    return common.augment(image, label, crop, scale, np.random.default_rng(rng_seed))


@pytest.mark.parametrize("seed", range(12))
def test_augment_without_scale_is_a_window(seed):
    """Read off the labels where the window lies; it is that part of the source, flipped or not, bit for bit."""
    image, x, y = ramps()
    patch, at_x = augmented(seed, (50, 70), (1, 1), image, x)
    again, at_y = augmented(seed, (50, 70), (1, 1), image, y)
    assert np.array_equal(patch, again) and patch.shape == (50, 70, 3) and at_x.shape == (50, 70)
    assert patch.dtype == at_x.dtype == np.uint8
    top, left, flipped = int(at_y.min()), int(at_x.min()), at_x[0, 0] > at_x[0, -1]
    source = image[top:top + 50, left:left + 70]
    assert np.array_equal(patch, source[:, ::-1] if flipped else source)


def test_augment_flips_half_and_reaches_everywhere():
    image, x, y = ramps()
    drawn = [augmented(seed, (50, 70), (1, 1), image, x)[1] for seed in range(300)]
    tops = [augmented(seed, (50, 70), (1, 1), image, y)[1].min() for seed in range(300)]
    flips = sum(int(d[0, 0] > d[0, -1]) for d in drawn)
    assert 110 < flips < 190                                # 150 ± 4.6 σ
    lefts = [int(d.min()) for d in drawn]
    assert min(lefts) < 10 and max(lefts) > 160 and max(lefts) <= 170
    assert min(tops) < 8 and max(tops) > 102 and max(tops) <= 110


@pytest.mark.parametrize("seed", range(12))
def test_augment_moves_label_and_image_together(seed):
    """At any scale, bilinear and nearest disagree by less than a source pixel at most."""
    image, x, y = ramps()
    crop, scale = (60, 84), (0.75, 2.0)     # the window, at most 80 × 112, lies inside: no padding
    patch, at_x = augmented(seed, crop, scale, image, x)
    _, at_y = augmented(seed, crop, scale, image, y)
    assert (at_x != IGNORED).all()
    assert np.abs(patch[..., 0].astype(int) - at_x).max() <= 1 and np.abs(patch[..., 1].astype(int) - at_y).max() <= 1
    assert (patch[..., 2] == 7).all()
    s = 83 / abs(int(at_x[0, -1]) - int(at_x[0, 0]))
    assert 0.7 < s < 2.1 and s == pytest.approx(59 / (int(at_y[-1, 0]) - int(at_y[0, 0])), rel=0.1)


def test_scales_are_log_uniform():
    image, x, _ = ramps()
    scales = []
    for seed in range(300):
        row = augmented(seed, (40, 60), (0.5, 2.0), image, x)[1][20].astype(int)
        scales.append(59 / abs(row[-1] - row[0]))
    assert 0.45 < min(scales) < 0.55 and 1.8 < max(scales) < 2.2
    assert np.mean(np.array(scales) < 1) == pytest.approx(0.5, abs=0.13)     # the median is √(½ · 2)


@pytest.mark.parametrize("scale", ((1, 1), (0.5, 0.5), (1.5, 1.5)))
@pytest.mark.parametrize("seed", range(4))
def test_padding_is_ignored(seed, scale):
    """A crop larger than the image: all of the image is inside once, and the rest of the label is 255."""
    image = np.full((20, 30, 3), 200, np.uint8)
    label = np.full((20, 30), 3, np.uint8)
    crop = (60, 80)
    patch, ids = augmented(seed, crop, scale, image, label)
    assert patch.shape == (60, 80, 3) and set(np.unique(ids)) == {3, IGNORED}
    inside = ids == 3
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert inside.sum() == len(rows) * len(columns)          # a rectangle of the image's size
    assert abs(len(rows) - 20 * scale[0]) <= 1 and abs(len(columns) - 30 * scale[0]) <= 1
    core = inside.copy()                                     # without the rim that bilinear mixes
    core[[rows[0], rows[-1]]] = core[:, [columns[0], columns[-1]]] = False
    assert (patch[core] == 200).all() and (patch[~inside] < 200).mean() > 0.9


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    root = streethazards(tmp_path, train=ids(*range(1, 14)))
    same = picture(9)      # one picture in all files, so that only the random numbers can differ
    for i in range(3):
        put(root / f"train/images/training/t1-3/{i}.png", same)

    def scenes(seed):
        return common.Scenes("streethazards", root, "train", crop=(16, 20), scale=(0.75, 1.5), seed=seed)

    def equal(a, b):
        return torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    a, b = scenes(0), scenes(0)
    for _ in range(3):
        a[(7, 0)]      # what was drawn before does not matter
    items = {(seed, epoch, i): scenes(seed)[(epoch, i)] for seed in (0, 1) for epoch in (0, 1) for i in range(3)}
    for (seed, epoch, i), item in items.items():
        assert item["image"].shape == (3, 16, 20) and item["label"].shape == (16, 20)
        if seed == 0:
            assert equal(a[(epoch, i)], item) and equal(b[(epoch, i)], item)
    keys = list(items)
    assert not any(equal(items[p], items[q]) for n, p in enumerate(keys) for q in keys[:n])


# ──────────────────────────────────────────── the decoded copy ────────────────────────────────────────────

def test_decoded_cache(tmp_path, monkeypatch):
    root = streethazards(tmp_path / "data")
    plain = common.Scenes("streethazards", root, "train", crop=(16, 20), scale=(0.5, 2))
    cached = common.Scenes("streethazards", root, "train", crop=(16, 20), scale=(0.5, 2), cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(p.suffix == ".npy" for p in files)
    for key in ((0, 0), (0, 2), (5, 1)):
        assert torch.equal(plain[key]["image"], cached[key]["image"]) and torch.equal(plain[key]["label"], cached[key]["label"])
    images, labels = map(np.load, cached.cached)
    assert np.array_equal(images[1], np.array(Image.open(plain.pairs[1][0]))) and np.array_equal(labels[1], plain.decode(1)[1])
    assert len(pickle.dumps(cached)) < images.nbytes / 2, "loader processes that are not forked would each copy the cache"

    def forbidden(path):
        raise AssertionError(f"{path} decoded again")
    with monkeypatch.context() as m:     # the second time, and the items, come from the copy alone
        m.setattr(common, "read_image", forbidden)
        m.setattr(common, "read_label", forbidden)
        again = common.Scenes("streethazards", root, "train", cache=tmp_path / "cache")
        assert np.array_equal(again[2]["image"].permute(1, 2, 0), picture(3))
    assert sorted((tmp_path / "cache").iterdir()) == files


@pytest.mark.parametrize("kind, content", (("images", picture(77)), ("annotations", ids(11))))
def test_decoded_cache_is_made_again(tmp_path, kind, content):
    root = streethazards(tmp_path / "data")
    common.Scenes("streethazards", root, "val", cache=tmp_path / "cache")
    before = sorted((tmp_path / "cache").iterdir())
    path = root / f"train/{kind}/validation/t4/1.png"
    stat = os.stat(path)
    put(path, content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    item = common.Scenes("streethazards", root, "val", cache=tmp_path / "cache")[1]
    if kind == "images":
        assert np.array_equal(item["image"].permute(1, 2, 0), content)
    else:
        assert (item["label"] == 9).all()
    after = sorted((tmp_path / "cache").iterdir())
    assert len(after) == 2 and not set(after) & set(before)       # the old copy is gone


def test_decoded_cache_of_another_anomaly(tmp_path):
    """The labels in the copy depend on --anomaly."""
    root = camvid(tmp_path / "data", drives())
    common.Scenes("camvid", root, "train", ["pedestrian", "bicyclist"], cache=tmp_path / "cache")
    scenes = common.Scenes("camvid", root, "train", ["bicyclist"], cache=tmp_path / "cache")
    other = common.Scenes("camvid", root, "train", ["building", "bicyclist"], cache=tmp_path / "cache")
    assert scenes[0]["label"][0, :2].tolist() == [3, 8] and other[0]["label"][0, :2].tolist() == [2, 7]
    assert len(list((tmp_path / "cache").iterdir())) == 3 * 2, "one took away the copy of another"


def test_decoded_cache_of_two_sizes(tmp_path):
    root = streethazards(tmp_path / "data")
    put(root / "train/images/training/t1-3/2.png", picture(5, (H, 2 * W)))
    put(root / "train/annotations/training/t1-3/2.png", ids(1, size=(H, 2 * W)))
    refused(lambda: common.Scenes("streethazards", root, "train", cache=tmp_path / "cache"),
            root / "train/images/training/t1-3/2.png", f"{2 * W}×{H}", f"{W}×{H}", "--cache")
    assert len(common.Scenes("streethazards", root, "train")) == 3
    put(root / "train/images/training/t1-3/2.png", picture(5))       # mended: nothing half-made is taken
    put(root / "train/annotations/training/t1-3/2.png", ids(9))
    scenes = common.Scenes("streethazards", root, "train", cache=tmp_path / "cache")
    assert (scenes[2]["label"] == 7).all() and np.array_equal(scenes[2]["image"].permute(1, 2, 0), picture(5))
    assert len(list((tmp_path / "cache").iterdir())) == 2


# ────────────────────────────────────────────── toy scenes ──────────────────────────────────────────────

def tree(root):
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


def test_toy_has_the_layout_of_streethazards(toy_root):
    want = [f"train/{kind}/{part}/{i}.png" for kind in ("images", "annotations")
            for part, n in (("training/t1-3", 6), ("validation/t4", 2)) for i in range(n)]
    want += [f"test/{kind}/test/{town}/{i}.png" for kind in ("images", "annotations") for i, town in enumerate(("t5", "t5", "t6"))]
    assert tree(toy_root) == sorted(want)
    assert [p.name for p in Path(toy_root).parent.iterdir()] == ["toy"]       # no temporary folder is left


def test_toy_is_read_by_the_loader_of_streethazards(toy_root, capsys):
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        scenes, toy = (common.Scenes(data, toy_root, split) for data in ("streethazards", "toy"))
        assert len(scenes) == len(toy) == n and scenes.classes == toy.classes
        for i in range(n):
            assert torch.equal(scenes[i]["image"], toy[i]["image"]) and torch.equal(scenes[i]["label"], toy[i]["label"])
    assert capsys.readouterr().out.count("warning") == 3         # StreetHazards' own; the toy has no fixed counts


def test_toy_is_a_function_of_its_seed(toy_root, tmp_path):
    toy.write_toy(str(tmp_path / "same"), seed=0, counts=(6, 2, 3))
    toy.write_toy(str(tmp_path / "other"), seed=1, counts=(6, 2, 3))
    files = tree(toy_root)
    assert filecmp.cmpfiles(toy_root, tmp_path / "same", files, shallow=False) == (files, [], [])
    assert filecmp.cmpfiles(toy_root, tmp_path / "other", files, shallow=False) == ([], files, [])
    contents = {(Path(toy_root) / p).read_bytes() for p in files}
    assert len(contents) == len(files)                           # no scene twice


def test_toy_replaces_an_earlier_folder(tmp_path):
    for counts in ((2, 1, 1), (1, 1, 1)):
        toy.write_toy(str(tmp_path / "toy"), counts=counts)
        assert len(tree(tmp_path / "toy")) == 2 * sum(counts)
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_toy_statistics(tmp_path):
    """A benchmark in small: StreetHazards' ids, every class somewhere, 1 to 3 % of anomalous test pixels."""
    toy.write_toy(str(tmp_path / "toy"), seed=5, counts=(24, 2, 30))
    pixels = {}
    for split, folder in (("train", "train/annotations/training"), ("test", "test/annotations/test")):
        labels = [np.array(Image.open(p)) for p in sorted((tmp_path / "toy" / folder).rglob("*.png"))]
        assert all(label.shape == (108, 192) and label.dtype == np.uint8 for label in labels)
        pixels[split] = np.array([np.bincount(label.ravel(), minlength=15) for label in labels])
        assert pixels[split].shape[1] == 15 and not pixels[split][:, 0].any()       # ids 1 to 14
    assert not pixels["train"][:, 14].any()
    assert (pixels["test"][:, 14] >= 40).all()
    assert 0.01 < pixels["test"][:, 14].sum() / pixels["test"].sum() < 0.03
    share = pixels["train"].sum(0) / pixels["train"].sum()
    assert (share[1:4] > 0.003).all() and (share[5:14] > 0.003).all()               # every known class
    assert 0 < share[4] < 0.02                                                      # a little of "other"
    images = [np.array(Image.open(p)) for p in (tmp_path / "toy/train/images").rglob("*.png")]
    assert all(image.shape == (108, 192, 3) for image in images)
    means, spreads = [image.mean() for image in images], [image.std() for image in images]
    assert 60 < min(means) and max(means) < 200 and min(spreads) > 20               # neither black, white nor flat


def test_toy_is_written_on_first_use(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(common.runpy, "run_path", lambda path: dict(write_toy=written.append))
    monkeypatch.chdir(tmp_path)
    assert Path(common.default_root("toy", None)) == Path("data/toy") and [Path(w) for w in written] == [Path("data/toy")]
    assert "data" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    assert common.default_root("toy", "mine") == "mine" and len(written) == 1       # there already
    assert Path(common.default_root("bdd", None)) == Path("data/bdd") and len(written) == 1


def test_to_input():
    image = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    x = common.to_input(image)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x, image.numpy().astype(np.float64) / 255, rtol=1e-6)
    assert common.to_input(image[0]).shape == (3, 4, 5)
