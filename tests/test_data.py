"""Datasets: small trees in the layouts of StreetHazards, BDD100K and CamVid, own data; augmentation, caches, toy."""
import filecmp
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
import evaluate
import finetune
import pretrain
import toy
from conftest import predict_every_class
from runner import NO_FIGURES, run, run_ok

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
    ("train", "a"): ids(0, 1, 255), ("train", "b"): ids(0, 16), ("train", "c"): ids(10, 18),
    ("train", "d"): ids(17, 13),
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
STREETHAZARDS_IDS = {1: "background", 2: "building", 3: "fence", 4: None, 5: "pedestrian", 6: "pole", 7: "road line",
                     8: "road",
                     9: "sidewalk", 10: "vegetation", 11: "car", 12: "wall", 13: "traffic sign", 14: "anomaly"}
CITYSCAPES_IDS = dict(enumerate((
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky",
    "person", "rider", "car", "truck", "bus", "anomaly", "anomaly", "bicycle"))) | {255: None}
IDD_LITE_IDS = dict(enumerate(("drivable", "non-drivable", "living things", "vehicles", "roadside objects",
                               "far objects", "sky"))) | {255: None}
CAMVID_IDS = dict(enumerate(("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
                             "pedestrian",
                             "anomaly", None)))


@pytest.mark.parametrize("data, names, N", (("streethazards", STREETHAZARDS_IDS, 12), ("toy", STREETHAZARDS_IDS, 12),
                                            ("bdd", CITYSCAPES_IDS, 17), ("camvid", CAMVID_IDS, 10),
                                            ("idd_lite", IDD_LITE_IDS, 7)))
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
    refused(lambda: common.dataset_classes("streethazards", ["car"]), "--anomaly", "bdd, camvid, idd_lite")


def test_class_indices():
    assert common.class_indices(["car", "sky"], ["sky", "road", "car"], "--known-unknown") == [2, 0]
    refused(lambda: common.class_indices(["tram"], ["sky", "road"], "--known-unknown"), "--known-unknown tram",
            "sky, road")


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
    item = finetune.KnownUnknown("streethazards", root, None, [1, 11])[3, 0]     # building (id 2), traffic sign (id 13)
    assert item["unknown"].dtype == torch.bool
    assert np.array_equal(item["unknown"].numpy(), np.isin(ids(1, 2, 3, 4, 13), (2, 13)))


@pytest.mark.parametrize("data", common.DATASETS)
def test_missing_folder(tmp_path, data):
    for root, found in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "photographs")):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        split = "train" if common.DATASETS[data].get("classes", True) else "test"      # test sets of anomalies alone
        message = refused(lambda: common.Scenes(data, root, split), root, found, common.DATASETS[data]["source"])
        tables = common.as_list(common.DATASETS[data].get("splits", []))
        for folder in [where[key] for table in tables for where in table.values() for key in ("images", "labels")]:
            assert folder in message


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


# ──────────────────────────────────────────── depths, by hand ────────────────────────────────────────────

def packed(samples, bits):
    """Rows of a (H, W) array of integers as bytes, `bits` a sample, most significant first, rows padded to a byte."""
    return [np.packbits(np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, -bits:]).tobytes()
            for row in samples]


def write_png(path, samples, bits, colour=0):
    """A PNG written from its specification: colour 0 is grey, 2 RGB, 3 palette (of 2^bits arbitrary colours)."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    flat = samples.reshape(len(samples), -1)
    data = b"".join(b"\0" + row for row in packed(flat, bits))
    palette = chunk(b"PLTE", picture(8, (1, 2**bits)).tobytes()) if colour == 3 else b""
    header = struct.pack(">IIBBBBB", samples.shape[1], len(samples), bits, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(data))
                     + chunk(b"IEND", b""))


def write_tiff(path, samples, bits, kind=1, order="<", photometric=1):
    """An uncompressed TIFF written from its specification: kind 1 is unsigned, 2 signed, 3 float; photometric 0: 0 is
    white, 1: 0 is black, 2: RGB, 3: palette."""
    channels = samples.shape[2] if samples.ndim == 3 else 1
    if bits in (16, 32):
        dtype = {1: "u", 2: "i", 3: "f"}[kind] + str(bits // 8)
        data = samples.astype(order + dtype).tobytes()
    else:
        data = b"".join(packed(samples.reshape(len(samples), -1), bits))
    data += b"\0" * (len(data) % 2)
    at = 8 + len(data)
    depths, palette = struct.pack(order + f"{channels}H", *[bits] * channels), b""
    if photometric == 3:
        palette = np.random.default_rng(8).integers(0, 65536, 3 * 2**bits).astype(order + "u2").tobytes()
    tags = [(256, 4, 1, samples.shape[1]), (257, 4, 1, len(samples)),
            (258, 3, channels, bits if channels == 1 else at), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8),
            (277, 3, 1, channels), (278, 4, 1, len(samples)), (279, 4, 1, len(data)),
            *([(320, 3, 3 * 2**bits, at + len(depths))] if palette else []), (339, 3, 1, kind)]
    out = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, at + len(depths) + len(palette))
    out += data + depths + palette
    out += struct.pack(order + "H", len(tags))
    for tag, size, count, value in tags:
        short = size == 3 and count == 1
        out += struct.pack(order + ("HHIHH" if short else "HHII"), tag, size, count, value, *([0] * short))
    path.write_bytes(out + struct.pack(order + "I", 0))


LABEL_FILES = {   # name: write(path, samples)
    **{f"png grey {bits}": (bits, lambda p, s, b=bits: write_png(p, s, b)) for bits in (1, 2, 4, 8, 16)},
    **{f"png palette {bits}": (bits, lambda p, s, b=bits: write_png(p, s, b, 3)) for bits in (1, 2, 4, 8)},
    **{f"tiff grey {bits} {order}": (bits, lambda p, s, b=bits, o=order: write_tiff(p, s, b, order=o))
       for bits in (1, 2, 4, 8, 16) for order in "<>"},
    **{f"tiff inverted {bits}": (bits, lambda p, s, b=bits: write_tiff(p, s, b, photometric=0))
       for bits in (1, 2, 4, 8)},
    **{f"tiff palette {bits}": (bits, lambda p, s, b=bits: write_tiff(p, s, b, photometric=3))
       for bits in (1, 2, 4, 8)}}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_labels_of_every_depth(tmp_path, kind):
    """The ids that the file holds, all that fit its depth, however Pillow would show them; odd widths."""
    bits, write = LABEL_FILES[kind]
    want = np.resize(np.arange(min(2**bits, 256)), (H, W - 1)).astype(np.uint16)
    path = tmp_path / f"a.{kind[:4].strip()}"
    write(path, want)
    got = common.read_label(path)
    assert got.dtype == np.uint8 and np.array_equal(got, want)


def test_labels_reencoded_in_fewer_bits(tmp_path):
    """What an optimiser of PNGs does to a label set: the same ids, in 4 bits."""
    root = streethazards(tmp_path, test=ids(8, 14))
    before = common.Scenes("streethazards", root, "test")[0]["label"]
    for path in (root / "test/annotations").rglob("*.png"):
        write_png(path, np.array(Image.open(path)), 4)
    assert torch.equal(common.Scenes("streethazards", root, "test")[0]["label"], before)


@pytest.mark.parametrize("write", (lambda p, s: write_png(p, s, 16), lambda p, s: write_tiff(p, s, 16),
                                   lambda p, s: write_tiff(p, s.astype(int) - 300, 32, 2),
                                   lambda p, s: write_tiff(p, s / 256, 32, 3)))
def test_labels_that_are_no_ids(tmp_path, write):
    """Above 255, below 0, floats (even whole and small ones)."""
    write(tmp_path / "a.png", np.full((H, W), 256, np.uint16))
    assert "\n" not in refused(lambda: common.read_label(tmp_path / "a.png"), tmp_path / "a.png", "8-bit channel")


GREY16 = {"png": lambda p, s: write_png(p, s, 16), "tiff <": lambda p, s: write_tiff(p, s, 16),
          "tiff >": lambda p, s: write_tiff(p, s, 16, order=">"), "ppm": lambda p, s: p.write_bytes(
              b"P5 %d %d 65535\n" % s.shape[::-1] + s.astype(">u2").tobytes())}


@pytest.mark.parametrize("kind", GREY16)
def test_images_of_16_bit_grey(tmp_path, kind):
    """65535 is white, and every other value its share of it, to one level."""
    values = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    path = tmp_path / f"a.{kind[:4].strip()}"
    GREY16[kind](path, values)
    got = common.read_image(path)
    assert got.shape == (H, W, 3) and got.dtype == np.uint8 and got.min() == 0 and got.max() == 255
    assert np.abs(got - (values / 65535.0 * 255)[..., None]).max() <= 1 and (got == got[..., :1]).all()


def test_images_of_16_bit_colour(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (H, W, 3))
    write_png(tmp_path / "a.png", values, 16, 2)
    write_tiff(tmp_path / "a.tif", values, 16, photometric=2)
    for name in ("a.png", "a.tif"):
        assert np.abs(common.read_image(tmp_path / name) - values / 65535 * 255).max() <= 1


@pytest.mark.parametrize("bits", (1, 2, 4, 12))
def test_images_of_other_depths(tmp_path, bits):
    """The largest value of the depth is white; 12 bits are a camera's TIFF."""
    values = np.arange(H * W).reshape(H, W) * 7 % 2**bits
    write_tiff(tmp_path / "a.tif", values, bits)
    if bits < 8:
        write_png(tmp_path / "a.png", values, bits)
    for path in tmp_path.iterdir():
        shown = common.read_image(path)
        assert np.abs(shown - (values / (2**bits - 1) * 255)[..., None]).max() <= (0.5 if bits < 8 else 1)


def test_images_without_a_range(tmp_path):
    """Floats and 32 bits: nothing says what white is."""
    for name, values, bits, kind in (("f", picture()[..., 0] / 255, 32, 3), ("f255", picture()[..., 0], 32, 3),
                                     ("i", 1000 * picture()[..., 0].astype(int), 32, 2),
                                     ("s", picture()[..., 0], 16, 2)):
        path = tmp_path / f"{name}.tif"
        write_tiff(path, values, bits, kind)
        message = refused(lambda: common.read_image(path), path, "cannot be read as an image", "expected 8 or 16")
        assert "\n" not in message


def exif_jpeg(path, image, tags):
    """A JPEG with an EXIF block of raw entries (tag, type, count, 4 bytes of value)."""
    image.save(path, quality=95)
    block = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags))
    block += b"".join(struct.pack(">HHI", *tag[:3]) + tag[3] for tag in tags) + b"\0\0\0\0"
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:])


TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
         8: lambda a: np.rot90(a), 0: lambda a: a, 9: lambda a: a}


@pytest.mark.parametrize("value", TURNS)
def test_upright(tmp_path, value):
    """The table of the EXIF standard; ImageOps agrees. A data set's images, which their labels fit, stay as stored."""
    path = tmp_path / "a.jpg"
    exif_jpeg(path, Image.fromarray(picture()), [(0x0112, 3, 1, struct.pack(">HH", value, 0))])
    stored = np.array(Image.open(path))
    assert np.array_equal(common.read_image(path), stored)
    got = evaluate.upright(path)
    assert np.array_equal(got, TURNS[value](stored)) and np.array_equal(got, ImageOps.exif_transpose(Image.open(path)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tags", (
    # Rationals and offsets of other types
    [(0x0112, 3, 1, b"\0\6\0\0"), (0x011A, 3, 1, b"\0\1\0\0"), (0x8769, 2, 4, b"abc\0")],
    [(0x0112, 2, 4, b"six\0")], [(0x0112, 5, 1, b"\xff\xff\xff\0")], [(0x0112, 99, 7, b"\0\0\0\0")],
    [(0x0112, 3, 2, b"\0\6\0\6")], [(0x010F, 2, 2**31, b"\0\0\0\x10")], [(0x8769, 4, 1, b"\xff\xff\xff\xff")]))
def test_malformed_exif(tmp_path, tags):
    """Processed, perhaps unrotated."""
    path = tmp_path / "a.jpg"
    exif_jpeg(path, Image.fromarray(picture()), tags)
    stored = np.array(Image.open(path))
    assert np.array_equal(common.read_image(path), stored)
    got = evaluate.upright(path)
    assert np.array_equal(got, stored) or np.array_equal(got, np.rot90(stored, -1))
    (tmp_path / "b.jpg").write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    refused(lambda: evaluate.upright(tmp_path / "b.jpg"), "b.jpg", "cannot be read")


def test_upright_where_exif_raises(tmp_path, monkeypatch):
    def broken(self):
        raise struct.error("unpack requires a buffer of 4 bytes")
    put(tmp_path / "a.png", picture())
    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert np.array_equal(evaluate.upright(tmp_path / "a.png"), picture())


@pytest.mark.parametrize("error", (struct.error("x"), KeyError("x"), TypeError("x"), EOFError(), zlib.error("x"),
                                   IndexError()))
def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch, error):
    def broken(self, *_, **__):
        raise error
    put(tmp_path / "a.png", picture()[..., 0])
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    for read in (common.read_image, common.read_label):
        assert "\n" not in refused(lambda: read(tmp_path / "a.png"), tmp_path / "a.png", "cannot be read")


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
    message = refused(lambda: common.Scenes("bdd", root, split), first, "holds id 20", "id + 2", "Cityscapes train ids")
    assert "\n" not in message


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
        want = {int(i): int(n) for i, n in zip(*np.unique(label, return_counts=True))}
        assert want == {i: int(n) for i, n in enumerate(row) if n}


# ──────────────────────────────────────────────── CamVid ────────────────────────────────────────────────

def drives(anomalous=10):
    """Drives of 10, 20 and 2 free images, over two folders, and three images with the anomaly, one in each folder."""
    labels = {(("train", "test")[i % 2], f"{drive}_{i:03d}"): ids(3, 8, 11)
              for drive, n in (("0001TP", 10), ("0016E5", 20))
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
    assert got["train"] == sorted({name for _, name in drives()} - {*got["test"], *got["val"]})
    assert len(got["train"]) == 28
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
    assert [len(splits[split]) for split in common.SPLITS] == [275, 47, 379]
    assert len(splits["test"]) == 379 and sum(map(len, splits.values())) == 701
    assert len({image for pairs in splits.values() for image, _ in pairs}) == 701
    rng = np.random.default_rng(0)
    for split, pairs in splits.items():     # a sample of the masks themselves
        for k in rng.permutation(len(pairs))[:20]:
            assert (10 in np.array(Image.open(pairs[k][1]))) == (split == "test")


# ──────────────────────────────────────────────── own data ────────────────────────────────────────────────

EXAMPLE = {   # the README's
    "classes": {"road": 7, "pavement": 8, "building": [11, 12, 13], "vehicle": [26, 27, 28], "person": 24},
    "ignored": [0, 255],
    "anomaly": [99],
    "splits": {
        "train": {"images": "photos/train", "labels": "masks/train", "label_end": "_ids"},
        "val": {"images": "photos/val", "labels": "masks/val", "label_end": "_ids"},
        "test": [["photos/odd/moose.jpg", "masks/odd/moose.png"], ["photos/odd/sofa.png", "masks/odd/sofa.png"]]},
    "unlabeled": ["vehicle"]}


def describe(root, spec=None, **changes):
    """Write root/dataset.json: EXAMPLE with changes; a change to None takes the key away."""
    spec = {k: v for k, v in {**(spec or EXAMPLE), **changes}.items() if v is not None}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(spec))
    return root


def own(root, **changes):
    """A data set as EXAMPLE says: two drives of two training images, one validation image, two of pairs."""
    for n, (name, label) in enumerate((("train/a/0", ids(7, 8, 11)), ("train/a/1", ids(12, 13, 24)),
                                       ("train/b/0", ids(26, 27, 28)), ("train/b/1", ids(0, 7, 255)),
                                       ("val/0", ids(7)))):
        put(root / "photos" / f"{name}.png", picture(n))
        put(root / "masks" / f"{name}_ids.png", label)
        put(root / "masks" / f"{name}_colour.png", picture(n))       # another map beside it
    for n, name in enumerate(("moose.jpg", "sofa.png")):
        put(root / "photos/odd" / name, picture(n))
        put(root / "masks/odd" / f"{name[:-4]}.png", ids(7, 99))
    return describe(root, **changes)


def test_own_data(tmp_path):
    root = own(tmp_path)
    train, val, test = (common.Scenes("folder", root, split) for split in common.SPLITS)
    assert train.classes == ["road", "pavement", "building", "vehicle", "person"]
    assert train.spec["unlabeled"] == ["vehicle"]
    assert [os.path.relpath(train.name(i), root) for i in range(len(train))] == \
        [f"photos/train/{n}.png" for n in ("a/0", "a/1", "b/0", "b/1")]
    assert stems(val.pairs) == ["0"] and stems(test.pairs) == ["moose", "sofa"]
    want = ([0, 1, 2], [2, 2, 4], [3, 3, 3], [IGNORED, 0, IGNORED])
    for i, labels in enumerate(want):
        assert train[i]["label"][3, :3].tolist() == labels
        assert np.array_equal(train[i]["image"].permute(1, 2, 0), picture(i))
    assert test[1]["label"][0, :2].tolist() == [0, ANOMALY]
    assert np.array_equal(test[1]["image"].permute(1, 2, 0), picture(1))


@pytest.mark.parametrize("data", ("streethazards", "bdd", "camvid"))
def test_built_in_sets_are_in_the_same_terms(tmp_path, data):
    """Their entries, written as dataset.json beside the same files, give the same splits, classes and labels."""
    root = dict(streethazards=streethazards, bdd=lambda r: bdd(r, "old"),
                camvid=lambda r: camvid(r, drives()))[data](tmp_path)
    describe(root, common.DATASETS[data])
    other = dict(streethazards=None, bdd=["train", "motorcycle", "bicycle"], camvid=["sky"])[data]
    for anomaly in (None, other):
        for split in common.SPLITS:
            built_in, described = (common.Scenes(d, root, split, anomaly) for d in (data, "folder"))
            assert built_in.pairs == described.pairs and built_in.classes == described.classes and len(built_in)
            assert np.array_equal(built_in.lut, described.lut)
            assert torch.equal(built_in[0]["label"], described[0]["label"])


def test_overlapping_splits_are_refused(tmp_path):
    """A folder in another one, a pair named twice; validation and test images may be the same."""
    root = own(tmp_path)
    train, val = (EXAMPLE["splits"][split] for split in ("train", "val"))
    shared = dict(train, images="photos", labels="masks")
    for splits in (dict(train=shared, val=val), dict(train=train, val=shared), dict(train=train, val=val, test=shared)):
        describe(root, splits=splits)
        for split in ("train", "val"):
            refused(lambda: common.split_pairs("folder", root, split), "dataset.json: ", "is in train and in",
                    "expected every image once")
    pairs = EXAMPLE["splits"]["test"]
    describe(root, splits=dict(train=train, val=val, test=[*pairs, pairs[0]]))
    refused(lambda: common.split_pairs("folder", root, "test"), "moose.jpg is in test and in test")
    (root / "again").symlink_to(root / train["images"])
    describe(root, splits=dict(train=train, val=dict(train, images="again")))
    refused(lambda: common.split_pairs("folder", root, "val"), "is in train and in val")
    (root / "again").unlink()
    shutil.copytree(root / val["labels"], root / "others")
    describe(root, splits=dict(train=train, val=val, test=dict(val, labels="others")), anomaly=None,
             anomaly_classes=["person"])
    refused(lambda: common.split_pairs("folder", root, "test"), "has the labels", "others", "expected one")
    shutil.rmtree(root / "others")
    describe(root, splits=dict(train=train, val=val, test=val), anomaly=None, anomaly_classes=["person"])
    assert [stems(common.split_pairs("folder", root, s)) for s in common.SPLITS] == [["0", "0", "1"], ["0"], ["1"]]


def test_the_identity_of_a_split(tmp_path):
    """The same files elsewhere are the same data; a file of another size is not."""
    one, two = (own(tmp_path / name) for name in ("one", "two"))
    same = [common.Scenes("folder", root, "train").identity() for root in (one, two)]
    assert same[0] == same[1]
    put(two / "photos/train/a/0.png", picture(0)[:, :-1])
    assert common.Scenes("folder", two, "train").identity() != same[0]


def test_what_ids_mean_is_part_of_the_identity(tmp_path):
    root = own(tmp_path)
    before = common.Scenes("folder", root, "train").identity()
    assert common.Scenes("folder", root, "train").identity() == before
    describe(root, classes={**EXAMPLE["classes"], "road": 8, "pavement": 7})
    assert common.Scenes("folder", root, "train").identity() != before


def test_masks_of_anomalies_alone(tmp_path):
    """A test set without classes: known pixels are told from ignored ones, and there is no training split."""
    for n in range(2):
        put(tmp_path / "images" / f"{n}.webp", picture(n))
        put(tmp_path / "masks" / f"{n}.png", ids(0, 1, 255))
    root = describe(tmp_path, {"classes": {}, "known": [0], "anomaly": [1], "ignored": [255],
                               "splits": {"test": {"images": "images", "labels": "masks"}}})
    scenes = common.Scenes("folder", root, "test")
    assert len(scenes) == 2 and scenes.classes == []
    assert scenes[0]["label"][0, :3].tolist() == [common.KNOWN, ANOMALY, IGNORED]
    for split in ("train", "val"):
        message = refused(lambda: common.Scenes("folder", root, split), f"no {split} split", "expected one of test")
        assert "\n" not in message


def test_validation_images_from_the_ends_of_drives(tmp_path):
    """`hold_out` where there is no val split; frames are in the order of their numbers, drives are folders or names."""
    for drive, n in (("a", 10), ("b", 4)):
        for i in range(n):
            put(tmp_path / "images" / drive / f"{i}.png", picture(i))
            put(tmp_path / "labels" / drive / f"{i}.png", ids(1, 2))
    for i in range(20):
        put(tmp_path / "images" / f"c_{i}.png", picture(i))
        put(tmp_path / "labels" / f"c_{i}.png", ids(1, 2))
    spec = {"classes": {"x": 1, "y": 2}, "splits": {"train": {"images": "images", "labels": "labels"}}, "hold_out": 0.3}
    root = describe(tmp_path, spec)
    train, val = (common.split_pairs("folder", root, split) for split in ("train", "val"))
    # 10 − 7 of ten, 4 − ⌈2.8⌉ of four, 20 − 14 of twenty
    assert [os.path.relpath(image, root / "images") for image, _ in val] == \
        ["a/7.png", "a/8.png", "a/9.png", "b/3.png", *(f"c_{i}.png" for i in range(14, 20))]
    assert len(train) == 34 - 10 and not {*train} & {*val}


def test_why_a_split_is_empty(tmp_path):
    val = lambda: common.Scenes("folder", tmp_path, "val")
    own(tmp_path, splits={"train": {"images": "photos/train", "labels": "masks/train", "label_end": "_ids"}})
    refused(val, "dataset.json", "no val split", "expected splits.val or hold_out")
    describe(tmp_path, hold_out=0.1, splits={"train": {"images": "photos/train", "labels": "masks/train",
                                                       "label_end": "_ids"}})
    refused(val, "the val split is empty: hold_out 0.1 leaves none of 4 images")
    describe(tmp_path, anomaly=None, anomaly_classes=["road", "pavement", "building"],
             splits={"train": [["photos/train/a/0.png", "masks/train/a/0_ids.png"]]})
    refused(lambda: common.Scenes("folder", tmp_path, "train"), "every image has a pixel of an anomaly class")


def test_hold_out_of_round_shares():
    """0.7 · 10 is 7.000000000000001 in floating point or not: three of ten are held out all the same."""
    for share, n, want in ((0.3, 10, 3), (0.1, 10, 1), (0.15, 20, 3), (0.2, 5, 1), (0.4, 35, 14), (0.7, 30, 21)):
        pairs = [(Path(f"d_{i:03}.png"), None) for i in range(n)]
        assert len(common.ends_of_drives(pairs, share)) == want


def test_anomaly_none(tmp_path, capsys):
    """No class is anomalous: all are known, and the original splits stay."""
    root = camvid(tmp_path / "camvid", drives())
    scenes = [common.Scenes("camvid", root, split, ["none"]) for split in common.SPLITS]
    assert all(s.classes == list(common.DATASETS["camvid"]["classes"]) for s in scenes)
    assert [len(s) for s in scenes] == [sum(folder == f for f, _ in drives()) for folder in common.SPLITS]
    assert not any((s.lut == ANOMALY).any() for s in scenes)
    root = bdd(tmp_path / "bdd")
    assert stems(common.split_pairs("bdd", root, "train", ["none"])) == ["a", "b", "c", "d"]
    refused(lambda: common.split_pairs("bdd", root, "test", ["none"]), "no test split without an anomaly", "train, val")
    refused(lambda: common.dataset_classes("camvid", ["none", "car"]), "--anomaly none")
    refused(lambda: common.dataset_classes("streethazards", ["none"]), "--anomaly")


def test_too_many_anomalies():
    classes = list(common.DATASETS["camvid"]["classes"])
    assert common.dataset_classes("camvid", classes[2:])[0] == classes[:2]
    refused(lambda: common.dataset_classes("camvid", classes[1:]), "1 known class", "at least 2")


def test_anomaly_of_own_data(tmp_path):
    """Recipe of BDD-Anomaly on own data; and a dataset.json with anomaly ids takes no --anomaly."""
    root = own(tmp_path, anomaly=None)
    for name in ("moose", "sofa"):
        put(root / "masks/odd" / f"{name}.png", ids(7, 8))
    assert stems(common.split_pairs("folder", root, "test", ["vehicle"])) == ["0"]
    # The free images of the test split train
    assert len(common.split_pairs("folder", root, "train", ["vehicle"])) == 3 + 2
    describe(root, anomaly=None, anomaly_classes=["person"])
    assert stems(common.split_pairs("folder", root, "test")) == ["1"]
    refused(lambda: common.split_pairs("folder", describe(root), "test", ["person"]), "--anomaly: folder has its own")


BAD = (   # (what is changed, what the line names)
    (dict(class_names=["road"]), ("class_names: expected another key", "classes, ignored")),
    ({"classes.bus": 9}, ("\"classes.bus\": expected another key",)),
    (dict(classes={"road": 7, "car": {"id": 8}}, unlabeled=None), ("classes.car: expected an id",)),
    (dict(classes=None), ("classes: expected an object", "null")),
    (dict(splits=None), ("splits: expected an object", "null")),
    (dict(classes=["road", "car"]), ("classes: expected an object",)),
    (dict(classes={}, anomaly=None), ("classes: expected names",)),
    (dict(classes={"road": 7}, unlabeled=None), ("1 known class",)),
    (dict(classes={"road": 7, "car": "8"}, unlabeled=None), ("classes.car", "ids from 0 to 255", "\"8\"")),
    (dict(classes={"road": 7, "car": 256}, unlabeled=None), ("classes.car", "ids from 0 to 255", "256")),
    (dict(classes={"road": 7, "car": [8, -1]}, unlabeled=None), ("classes.car", "-1")),
    (dict(classes={"road": 7, "car": True}, unlabeled=None), ("classes.car", "true")),
    (dict(classes={"road": 7, "car": 8.0}, unlabeled=None), ("classes.car", "8.0")),
    (dict(classes={"road": 7, "car": None}, unlabeled=None), ("classes.car", "null")),
    (dict(classes={"road": 7, "car": []}, unlabeled=None), ("classes.car", "an id or a list")),
    (dict(classes={"road": 7, "car": 7}, unlabeled=None),
     ("classes.car: expected other ids than classes.road has", "7")),
    (dict(classes={"road": 7, "car": [8, 8]}, unlabeled=None),
     ("classes.car: expected other ids than classes.car has", "8")),
    (dict(classes={"road": 7, "none": 8}, unlabeled=None), ("classes", "none")),
    (dict(classes={f"c{i}": i for i in range(254)}, ignored=[], anomaly=[255], unlabeled=None),
     ("classes: expected at most 252",)),
    (dict(ignored=255), ("ignored: expected a list", "255")),
    (dict(ignored=[7]), ("ignored: expected other ids than classes.road has", "7")),
    (dict(anomaly=[300]), ("anomaly: expected", "ids from 0 to 255", "300")),
    (dict(anomaly_classes=["person"]), ("anomaly_classes", "not both")),
    (dict(anomaly=None, anomaly_classes=["tram"]), ("anomaly_classes", "tram", "road, pavement")),
    (dict(unlabeled=["tram"]), ("unlabeled", "tram")),
    (dict(unlabeled=[["road"]]), ("unlabeled",)),
    (dict(hold_out="0.1"), ("hold_out: expected a number",)),
    (dict(hold_out=1.5), ("hold_out", "between 0 and 1", "1.5")),
    (dict(hold_out=float("nan")), ("hold_out", "between 0 and 1")),
    (dict(counts={"train": "many"}), ("counts.train", "many")),
    (dict(counts={"training": 3}), ("counts.training: expected another key", "train, val, test")),
    (dict(splits={}), ("splits: expected at least one",)),
    (dict(splits=[]), ("splits: expected at least one",)),
    (dict(splits="train"), ("splits: expected an object",)),
    (dict(splits=["train"]), ("splits: expected an object",)),
    (dict(splits={"training": {"images": "a", "labels": "b"}}),
     ("splits.training: expected another key", "train, val, test")),
    (dict(splits={"train": "photos"}), ("splits.train", "photos")),
    (dict(splits={"train": {"images": "photos/train"}}), ("splits.train.labels: expected", "path", "null")),
    (dict(splits={"train": {"images": "photos/train", "label": "x"}}),
     ("splits.train.label: expected another key", "images, labels")),
    (dict(splits={"train": {"images": 3, "labels": "x"}}), ("splits.train.images", "a text")),
    (dict(splits={"train": {"images": "/etc", "labels": "x"}}), ("splits.train.images", "below the folder", "/etc")),
    (dict(splits={"train": {"images": "photos", "labels": "x/../../y"}}),
     ("splits.train.labels", "below the folder", "..")),
    (dict(splits={"train": {"images": "a\0b", "labels": "x"}}), ("splits.train.images", "below the folder")),
    (dict(splits={"train": {"images": "photos", "labels": "./photos"}}),
     ("splits.train: images and labels are one folder",)),
    (dict(splits={"train": [["a.png"]]}), ("splits.train", "pairs [image, label]")),
    (dict(splits={"train": [["a.png", "../b.png"]]}), ("splits.train", "../b.png")),
    (dict(splits={"train": {"images": "photos/train", "labels": "masks/trian"}}),
     ("splits.train.labels: no folder masks/trian", "found: dataset.json, masks, photos")),
    (dict(splits={"val": EXAMPLE["splits"]["val"]}), ("splits: folder has no train split", "expected one of val")),
)


@pytest.mark.parametrize("changes, parts", BAD)
def test_mistakes_in_dataset_json(tmp_path, changes, parts):
    root = own(tmp_path, **changes)
    message = refused(lambda: common.Scenes("folder", root, "train"), *parts)
    assert "\n" not in message and ("dataset.json: " in message or "1 known class" in message)


@pytest.mark.parametrize("text, part", (
    (b"", "not JSON"), (b"{", "not JSON"), (b"classes: {road: 7}", "not JSON"), (b"\xff\xfe{}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "the file: expected an object"), (b"3", "the file: expected an object"),
    (b'{"classes": {"road": 1, "car": 2, "road": 3}, "splits": {}}', "road: named twice")))
def test_dataset_json_that_is_none(tmp_path, text, part):
    (tmp_path / "dataset.json").write_bytes(text)
    assert "\n" not in refused(lambda: common.Scenes("folder", tmp_path, "train"), tmp_path / "dataset.json", part)


def test_dataset_json_of_a_text_editor(tmp_path):
    """With a byte-order mark, and names beyond ASCII."""
    root = own(tmp_path, classes={"straße": 7, "auto": [8, 11, 12, 13, 24, 26, 27, 28]}, unlabeled=["straße"])
    path = root / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode())
    assert common.Scenes("folder", root, "train").classes == ["straße", "auto"]


SIZED = ("--arch", "fpn", "--width", 16, "--backbone", "mobilenet_v3_large", "--weights", "none", "--epochs", 1,
         "--batch-size", 2,
         "--lr", 1e-3, "--crop", 32, 48, "--scale", 1, 1, "--schedule", "poly")


def test_four_scripts_on_own_data(small, tmp_path):
    """The toy scenes described in a dataset.json: the same weights and the same numbers as of the built-in set; and a
    class whose name would be a formula in a figure."""
    shutil.copytree(small / "toy", tmp_path / "mine")
    spec = {k: v for k, v in common.DATASETS["toy"].items() if k not in ("counts", "source")}
    spec["classes"] = {name.replace("car", "$_$"): ids for name, ids in spec["classes"].items()}
    describe(tmp_path / "mine", spec)
    results = {}
    for data, root in (("toy", small / "toy"), ("folder", tmp_path / "mine")):
        folder = tmp_path / data
        folder.mkdir()
        run_ok("pretrain.py", "--data", data, "--root", root, *SIZED, folder=folder)
        checkpoint = common.load_checkpoint(folder / "pretrained.pt")[1]
        assert checkpoint["data"] == data and checkpoint["root"] == str(root)
        results[data] = checkpoint["model"]
    assert all(torch.equal(v, results["folder"][k]) for k, v in results["toy"].items())
    predict_every_class(folder / "pretrained.pt")
    run_ok("mgu_generate.py", "--per-class", 1, "--batch-size", 4, "--max-steps", 2, "--out", "aux", folder=folder)
    run_ok("finetune.py", "--aux", "aux", "--epochs", 1, "--batch-size", 4, folder=folder, before=NO_FIGURES)
    run_ok("evaluate.py", "--unlabeled", "ignore", "--panels", 0, folder=folder, before=NO_FIGURES)
    evaluated = json.loads((folder / "results/results.json").read_text())
    assert evaluated["protocol"]["images"] == 3 and evaluated["pooled"]["aupr"] > 0
    (folder / "elsewhere").mkdir()
    done = run("evaluate.py", "--ckpt", folder / "ft.pt", "--root", "elsewhere", folder=folder)
    assert done.code == 1 and done.err.count("\n") == 1 and "elsewhere/dataset.json: no such file" in done.err


# ──────────────────────────────────────────────── listing ────────────────────────────────────────────────

def test_links_to_folders_are_followed(tmp_path):
    root, disk = streethazards(tmp_path / "data"), tmp_path / "disk"
    for kind in ("images", "annotations"):
        for town in ("t5", "t6")[:1 if kind == "annotations" else 2]:
            (disk / kind).mkdir(parents=True, exist_ok=True)
            folder = root / f"test/{kind}/test/{town}"
            folder.rename(disk / kind / town)
            folder.symlink_to(disk / kind / town)
    scenes = common.Scenes("streethazards", root, "test")
    assert [os.path.relpath(scenes.name(i), root) for i in range(len(scenes))] == \
        [f"test/images/test/{n}.png" for n in ("t5/0", "t5/1", "t6/0")]
    assert np.array_equal(scenes[2]["image"].permute(1, 2, 0), picture(8))
    (root / "train/images/training").rename(disk / "training")        # the folder that the entry names is itself a link
    (root / "train/images/training").symlink_to(disk / "training")
    assert len(common.Scenes("streethazards", root, "train")) == 3


def test_links_that_lead_back(tmp_path):
    root = streethazards(tmp_path)
    images = root / "test/images/test"
    (images / "t5/all").symlink_to(images)                   # its own grandparent
    (images / "t6/me").symlink_to("me")                      # itself
    (images / "t6/gone.png").symlink_to("nowhere.png")       # nothing
    assert len(common.Scenes("streethazards", root, "test")) == 3


@pytest.mark.parametrize("suffix", (".PNG", ".JPG", ".jpeg", ".Jpg", ".webp", ".tif", ".TIFF", ".bmp"))
def test_suffixes(tmp_path, suffix):
    """Images of any kind and case beside PNG labels, in every layout."""
    for root, data, n in ((streethazards(tmp_path / "s"), "streethazards", 3), (bdd(tmp_path / "b"), "bdd", 2),
                          (bdd(tmp_path / "old", "old"), "bdd", 2), (camvid(tmp_path / "c", drives()), "camvid", 28)):
        for path in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
            if "annot" in str(path.relative_to(root)) or "label" in str(path.relative_to(root)):
                path.rename(path.with_suffix(".PNG"))
            else:
                Image.open(path).save(path.with_suffix(suffix))
                if path.suffix != suffix:
                    path.unlink()
        scenes = common.Scenes(data, root, "train")
        assert len(scenes) == n and {Path(scenes.name(i)).suffix for i in range(n)} == {suffix}
        scenes[0]


def test_other_files_are_no_images(tmp_path):
    root = streethazards(tmp_path)
    for name in ("list.txt", "Thumbs.db", "0.png.part", "readme", "0.npz"):
        (root / "train/images/training/t1-3" / name).write_text("x")
    assert len(common.Scenes("streethazards", root, "train")) == 3


def test_everything_that_is_missing_is_told(tmp_path):
    """Both ways, with the number and the first few; the splits of a recipe together."""
    root = bdd(tmp_path / "bdd", labels={("train", f"{i:02}"): ids(0, 1) for i in range(12)} | {("val", "v"): ids(16)})
    for name in ("02", "05", "06", "08", "11"):
        (root / f"images/10k/train/{name}.jpg").unlink()
    (root / "labels/sem_seg/masks/train/03.png").unlink()
    (root / "labels/sem_seg/masks/val/v.png").unlink()
    message = refused(lambda: common.Scenes("bdd", root, "train"), root,
                      "2 images without label", "5 labels without image",
                      *(root / f"images/10k/train/{n}.jpg" for n in ("02", "03", "05", "06")),
                      root / "labels/sem_seg/masks/train/03.png", root / "images/10k/val/v.jpg", ", …")
    assert "\n" not in message and "/08." not in message and "/11." not in message
    root = own(tmp_path / "own")
    (root / "photos/odd/moose.jpg").unlink()
    (root / "masks/odd/sofa.png").unlink()
    refused(lambda: common.Scenes("folder", root, "test"), "1 image without label", root / "masks/odd/sofa.png",
            "1 label without image", root / "photos/odd/moose.jpg")
    assert len(common.Scenes("folder", root, "train")) == 4       # has all of its own


def test_hidden_files_are_left_out(tmp_path):
    root = streethazards(tmp_path)
    for folder in ("train/images/training/t1-3", "train/annotations/training/t1-3"):
        (root / folder / "._0.png").write_bytes(b"\0\5\x16\7")
        put(root / folder / ".ipynb_checkpoints/0-checkpoint.png", picture())
    put(root / "train/images/training/.thumbnails/0.png", picture())
    assert len(common.Scenes("streethazards", root, "train")) == 3
    (tmp_path / ".hidden").mkdir()
    # A root below a hidden folder is no hidden folder of the data set
    assert len(common.Scenes("streethazards", streethazards(tmp_path / ".hidden/root"), "train")) == 3


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    odd = os.fsdecode(b"k\xf6ln")
    try:
        (tmp_path / odd).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    labels = drives()
    root = camvid(tmp_path / odd, {(folder, f"{odd}_{name}"): label for (folder, name), label in labels.items()})
    scenes = [common.Scenes("camvid", root, split) for split in common.SPLITS]
    cached = pretrain.TrainingScenes("camvid", root, "train", cache=tmp_path / "decoded")
    assert cached.identity() == scenes[0].identity()
    assert sum(map(len, scenes)) == len(labels) and len({s.identity() for s in scenes}) == 3
    assert list((tmp_path / "cache").rglob("*.npz"))
    item = scenes[2][0]
    assert item["label"][0, :2].tolist() == [0, ANOMALY]
    put(Path(str(scenes[0].pairs[0][1])), ids(77))
    refused(lambda: scenes[0].decode(0), "holds id 77")


def test_scripts_with_names_that_are_not_utf8(small, tmp_path):
    odd = os.fsdecode(b"k\xf6ln")
    try:
        (tmp_path / odd).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    root = tmp_path / odd / "toy"
    for path in (small / "toy").rglob("*.png"):
        to = root / path.relative_to(small / "toy")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to.with_name(f"{odd}{path.name}"))
    run_ok("pretrain.py", "--root", root, "--epochs", 1, "--batch-size", 2, "--crop", 32, 48, folder=tmp_path)
    predict_every_class(tmp_path / "pretrained.pt")
    run_ok("mgu_generate.py", "--per-class", 1, "--batch-size", 4, "--max-steps", 2, "--out", "aux", folder=tmp_path,
           before=NO_FIGURES)
    run_ok("finetune.py", "--aux", "aux", "--images", "clean", "--epochs", 1, "--batch-size", 4, folder=tmp_path)
    run_ok("evaluate.py", "--panels", 1, folder=tmp_path)
    shutil.copy(next(root.rglob("*.png")), tmp_path / f"{odd}.png")
    next((root / "test/annotations").rglob("*.png")).unlink()
    done = run("evaluate.py", folder=tmp_path)
    assert done.code == 1 and "1 image without label" in done.err and "Traceback" not in done.err


def test_only_the_test_folder(tmp_path):
    root = streethazards(tmp_path)
    shutil.rmtree(root / "train")
    assert len(common.Scenes("streethazards", root, "test")) == 3
    refused(lambda: common.Scenes("streethazards", root, "train"), "no folder train/images/training")
    root = own(tmp_path / "own")
    shutil.rmtree(root / "photos/train")
    assert len(common.Scenes("folder", root, "test")) == 2
    # Its test images lie in all folders: those that are left would be another set
    root = camvid(tmp_path / "camvid", drives())
    shutil.rmtree(root / "train")
    refused(lambda: common.Scenes("camvid", root, "test"), "no folder train")


@pytest.mark.parametrize("kind, suffixes", (("images", ("png", "jpg")), ("images", ("png", "PNG")),
                                            ("annotations", ("png", "tif"))))
def test_two_files_of_one_name(tmp_path, kind, suffixes):
    root = streethazards(tmp_path)
    paths = [root / f"train/{kind}/training/t1-3/1.{s}" for s in suffixes]
    put(paths[1], ids(1) if kind == "annotations" else picture())
    if len({p.stat().st_ino for p in paths}) == 1:
        pytest.skip("this file system does not tell cases apart")
    message = refused(lambda: common.Scenes("streethazards", root, "train"), *(p.name for p in paths), "one name")
    assert "\n" not in message


@pytest.mark.parametrize("image_end, label_end", (("", "_ids"), ("_photo", ""), ("_photo", "_ids"), ("_x", "_x_ids")))
def test_images_and_labels_in_one_folder(tmp_path, image_end, label_end):
    """Told apart by the ends of their names, whichever of the two has one."""
    for n in range(3):
        put(tmp_path / f"all/{n}{image_end}.png", picture(n))
        put(tmp_path / f"all/{n}{label_end}.png", ids(1, 2))
    where = {"images": "all", "labels": "all", "image_end": image_end, "label_end": label_end}
    describe(tmp_path, {"classes": {"x": 1, "y": 2}, "splits": {"train": where}})
    scenes = common.Scenes("folder", tmp_path, "train")
    assert stems(scenes.pairs) == [f"{n}{image_end}" for n in range(3)]
    assert scenes[1]["label"][0, :2].tolist() == [0, 1]
    assert np.array_equal(scenes[1]["image"].permute(1, 2, 0), picture(1))


def test_scan_without_a_home(tmp_path, monkeypatch):
    """A user id without an entry in the system's list of users, and no HOME."""
    def nobody():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", nobody)
    root, seen = bdd(tmp_path / "bdd"), scans(monkeypatch)
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
        seen.clear()
        assert stems(common.split_pairs("bdd", root, "test")) == ["b", "d", "f"] and len(seen) == 7
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common.split_pairs("bdd", root, "test")
    assert list((tmp_path / "cache").rglob("*.npz"))


# ───────────────────────────────────────────── augmentation ─────────────────────────────────────────────

RAMP = np.arange(240, dtype=np.uint8)


def ramps():
    """An image whose red channel is x and green channel y, and the two labels x and y."""
    y, x = np.meshgrid(RAMP[:160], RAMP, indexing="ij")
    return np.dstack([x, y, np.full_like(x, 7)]), x, y


def augmented(rng_seed, crop, scale, image, label):
    return pretrain.augment(image, label, crop, scale, np.random.default_rng(rng_seed))


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
        return pretrain.TrainingScenes("streethazards", root, "train", crop=(16, 20), scale=(0.75, 1.5), seed=seed)

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
    plain = pretrain.TrainingScenes("streethazards", root, "train", crop=(16, 20), scale=(0.5, 2))
    cached = pretrain.TrainingScenes("streethazards", root, "train", crop=(16, 20), scale=(0.5, 2),
                                     cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(p.suffix == ".npy" for p in files)
    for key in ((0, 0), (0, 2), (5, 1)):
        assert torch.equal(plain[key]["image"], cached[key]["image"])
        assert torch.equal(plain[key]["label"], cached[key]["label"])
    images, labels = map(np.load, cached.cached)
    assert np.array_equal(images[1], np.array(Image.open(plain.pairs[1][0])))
    assert np.array_equal(labels[1], plain.decode(1)[1]) and np.array_equal(labels[1], cached.decode(1)[1])
    assert len(pickle.dumps(cached)) < images.nbytes / 2, "spawned loader processes would each copy the cache"

    def forbidden(path):
        raise AssertionError(f"{path} decoded again")
    with monkeypatch.context() as m:     # the second time, and the items, come from the copy alone
        m.setattr(common, "read_image", forbidden)
        m.setattr(common, "read_label", forbidden)
        again = pretrain.TrainingScenes("streethazards", root, "train", cache=tmp_path / "cache")
        assert np.array_equal(again.decode(2)[0], picture(3))
    assert sorted((tmp_path / "cache").iterdir()) == files


@pytest.mark.parametrize("kind, content", (("images", picture(77)), ("annotations", ids(11))))
def test_decoded_cache_is_made_again(tmp_path, capsys, kind, content):
    """A run that still reads the copy of the old state keeps it; which that is, is told."""
    root = streethazards(tmp_path / "data")
    pretrain.TrainingScenes("streethazards", root, "val", cache=tmp_path / "cache")
    before = sorted((tmp_path / "cache").iterdir())
    path = root / f"train/{kind}/validation/t4/1.png"
    stat = os.stat(path)
    put(path, content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    image, label = pretrain.TrainingScenes("streethazards", root, "val", cache=tmp_path / "cache").decode(1)
    assert np.array_equal(image, content) if kind == "images" else (label == 9).all()
    after = sorted((tmp_path / "cache").iterdir())
    assert len(after) == 4 and set(before) < set(after)
    assert f"note: {before[0]} is of an earlier state of {root}: delete it" in capsys.readouterr().out


def test_decoded_cache_of_another_anomaly(tmp_path):
    """The labels in the copy depend on --anomaly."""
    root = camvid(tmp_path / "data", drives())
    _, scenes, other = (pretrain.TrainingScenes("camvid", root, "train", anomaly, cache=tmp_path / "cache")
                        for anomaly in (["pedestrian", "bicyclist"], ["bicyclist"], ["building", "bicyclist"]))
    assert scenes.decode(0)[1][0, :2].tolist() == [3, 8] and other.decode(0)[1][0, :2].tolist() == [2, 7]
    assert len(list((tmp_path / "cache").iterdir())) == 3 * 2, "one took away the copy of another"


def test_decoded_cache_of_two_folders_named_alike(tmp_path, monkeypatch):
    """Runs with one --cache and a relative root, from two folders: neither takes the other's copy away."""
    scenes = []
    for place in "ab":
        streethazards(tmp_path / place / "data")
        monkeypatch.chdir(tmp_path / place)
        scenes.append(pretrain.TrainingScenes("streethazards", Path("data"), "train", cache=tmp_path / "cache"))
    assert all(np.array_equal(s.decode(2)[0], picture(3)) for s in scenes)


@pytest.mark.parametrize("damage", (lambda b: b[:-100], lambda b: b[:9], lambda b: b"no array"))
def test_a_damaged_decoded_cache_is_made_again(tmp_path, damage):
    root = streethazards(tmp_path / "data")
    copy = pretrain.TrainingScenes("streethazards", root, "train", cache=tmp_path / "cache").cached[0]
    copy.write_bytes(damage(copy.read_bytes()))
    again = pretrain.TrainingScenes("streethazards", root, "train", cache=tmp_path / "cache")
    assert np.array_equal(again.decode(2)[0], picture(3))


def test_decoded_cache_of_two_sizes(tmp_path):
    root = streethazards(tmp_path / "data")
    put(root / "train/images/training/t1-3/2.png", picture(5, (H, 2 * W)))
    put(root / "train/annotations/training/t1-3/2.png", ids(1, size=(H, 2 * W)))
    refused(lambda: pretrain.TrainingScenes("streethazards", root, "train", cache=tmp_path / "cache"),
            root / "train/images/training/t1-3/2.png", f"{2 * W}×{H}", f"{W}×{H}", "--cache")
    assert len(common.Scenes("streethazards", root, "train")) == 3
    put(root / "train/images/training/t1-3/2.png", picture(5))       # mended: nothing half-made is taken
    put(root / "train/annotations/training/t1-3/2.png", ids(9))
    image, label = pretrain.TrainingScenes("streethazards", root, "train", cache=tmp_path / "cache").decode(2)
    assert (label == 7).all() and np.array_equal(image, picture(5))
    assert len(list((tmp_path / "cache").iterdir())) == 2


# ────────────────────────────────────────────── toy scenes ──────────────────────────────────────────────

def tree(root):
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


def test_toy_has_the_layout_of_streethazards(toy_root):
    want = [f"train/{kind}/{part}/{i}.png" for kind in ("images", "annotations")
            for part, n in (("training/t1-3", 6), ("validation/t4", 2)) for i in range(n)]
    want += [f"test/{kind}/test/{town}/{i}.png" for kind in ("images", "annotations")
             for i, town in enumerate(("t5", "t5", "t6"))]
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
    assert Path(common.default_root("toy", None)) == Path("data/toy")
    assert [Path(w) for w in written] == [Path("data/toy")]
    assert "data" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    assert common.default_root("toy", "mine") == "mine" and len(written) == 1       # there already
    assert Path(common.default_root("bdd", None)) == Path("data/bdd") and len(written) == 1


def test_toy_is_never_written_where_a_checkpoint_says(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(common.runpy, "run_path", lambda path: dict(write_toy=lambda root: written.append(str(root))))
    monkeypatch.chdir(tmp_path)
    for root in ("/etc/toy", str(tmp_path / "elsewhere"), "../toy", "data/toys", str(tmp_path / "data/toy")):
        assert common.default_root("toy", root) == root and not written
    for root in (None, "data/toy", "./data/toy"):
        common.default_root("toy", root)
    assert written == ["data/toy"] * 3
    assert common.default_root("toy", "mine", write=True) == "mine" and written[3:] == ["mine"]
    assert common.default_root("streethazards", "nowhere", write=True) == "nowhere" and len(written) == 4


def test_later_stages_do_not_write_to_a_checkpoints_root(small, tmp_path):
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, root=str(tmp_path / "victim/toy")), tmp_path / "pretrained.pt")
    for script, *args in (("mgu_generate.py",), ("finetune.py", "--known-unknown", "car"),
                          ("evaluate.py", "--ckpt", "pretrained.pt")):
        done = run(script, *args, folder=tmp_path)
        assert done.code == 1 and "victim/toy: no" in done.err and not (tmp_path / "victim").exists()


def test_to_input():
    image = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    x = common.to_input(image)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x, image.numpy().astype(np.float64) / 255, rtol=1e-6)
    assert common.to_input(image[0]).shape == (3, 4, 5)
