"""Choosing sets: a split of a data set with objects pasted in that no street scene holds; written as a data folder.

    python tests/paste.py --data camvid --root /data/CamVid --split val --out pasted                    # flower pieces
    python tests/paste.py --data camvid --root /data/CamVid --out pasted --objects cutouts --classes dog boat bench
    python evaluate.py --ckpt ft.pt --data folder --root pasted

    in     a split without anomalies; --objects: PNGs with an alpha channel, named CLASS_….png
    out    images/N.png, labels/N.png (train ids; 255 ignored, 254 anomaly), dataset.json with the one split `test`;
           with --known it names no class, and so suits models of other classes

In the manner of Fishyscapes Static (Blum et al., The Fishyscapes Benchmark, IJCV 2021), but for its camera effects
(motion blur, glow, depth blur). Here:
  what     one to three objects an image, and more until 40 pixels are anomalous; every class equally often; mirrored
           half the time. CLASS_…_border.png, cut off by the edge of its photograph, is left out, as Fishyscapes does
  where    four of five stand on the ground, at a height that grows with the row of the foot (a flat ground seen by a
           level camera); one of five hangs anywhere, at any size. What is wider than half of the image is made
           smaller, and then hangs above its foot: every fourth object four times as wide as high, none as wide as high
  light    the colours times (mean grey of the surroundings / of the object)^½, a factor from ½ to 2
  edges    alpha is blurred inwards and blended; a pixel is anomalous where alpha is at least ½, else keeps its label
Without --objects: ellipses out of scikit-learn's flower photograph, which anybody has. What image N gets is a function
of (--seed, N), the files of --objects and their order by name.
"""
import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

HORIZON, LEAST = 0.4, 40   # of the height of the image; anomalous pixels of an image


def cut_outs(folder, classes):
    """{class: [paths]} of the PNGs of a folder whose class (the name up to its first digit) is asked for."""
    found = {}
    for path in sorted(Path(folder).glob("[!.]*.png")):
        name = re.split(r"_?\d", path.stem)[0]
        if not path.stem.endswith("_border") and (not classes or name in classes):
            found.setdefault(name, []).append(path)
    missing = [c for c in classes or () if c not in found]
    if missing or not found:
        raise common.InputError(f"{folder}: no {'_*.png, '.join(missing or ['*'])}_*.png; expected cut-outs with an "
                                "alpha channel, named CLASS_….png")
    return found


def choose(objects, rng):
    """One object as RGBA (h, w): a cut-out or, where `objects` is None, a piece of the flower photograph."""
    if objects:
        paths = objects[list(objects)[rng.integers(len(objects))]]
        path = paths[rng.integers(len(paths))]
        try:
            with Image.open(path) as opened:
                has_alpha, piece = "A" in opened.getbands(), opened.convert("RGBA")
        except Exception as e:   # whatever a damaged file makes Pillow raise
            raise common.InputError(f"{path}: cannot be read as an image: {e or type(e).__name__}")
        if not has_alpha or piece.getchannel("A").getextrema()[1] < 128:
            raise common.InputError(f"{path}: no alpha channel, or none of its pixels is opaque; expected a cut-out")
        piece = piece.crop(piece.getchannel("A").getbbox())
    else:
        from sklearn.datasets import load_sample_image
        flower = load_sample_image("flower.jpg")
        h, w = rng.integers(64, 257, 2)
        i, j = rng.integers(0, flower.shape[0] - h), rng.integers(0, flower.shape[1] - w)
        y, x = np.mgrid[:h, :w]
        inside = ((2 * y + 1) / h - 1)**2 + ((2 * x + 1) / w - 1)**2 <= 1
        piece = Image.fromarray(np.dstack([flower[i:i + h, j:j + w], 255 * inside.astype(np.uint8)]))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def place(size, aspect, rng):
    """(top, left, h, w) in an image of `size` (H, W) for an object of `aspect` = w / h; part of it may lie outside."""
    H, W = size
    if rng.random() < 0.8:
        foot = rng.uniform(HORIZON + 0.08, 1)                             # of the height
        h = 0.4 * H * (foot - HORIZON) * rng.uniform(0.5, 1.5)
        top = foot * H - h
    else:
        h = H * rng.uniform(0.08, 0.3)
        top = rng.uniform(0, H - h)
    h = max(4.0, min(h, 0.5 * W / aspect))                                # no wider than half of the image
    w = max(4.0, h * aspect)
    return round(top), round(rng.uniform(-w / 4, W - 3 * w / 4)), round(h), round(w)


def paste(image, label, piece, at):
    """Blend a piece (RGBA) into image (H, W, 3) and label (H, W), uint8, in place; returns alpha (H, W), 0 outside."""
    (H, W), (top, left, h, w) = label.shape, at
    piece = piece.resize((w, h), Image.Resampling.LANCZOS)
    alpha = np.minimum(*(np.asarray(a, float) for a in (piece.getchannel("A"), piece.getchannel("A").filter(
        ImageFilter.GaussianBlur(0.7))))) / 255
    colour = np.asarray(piece.convert("RGB"), float)

    rows, columns = slice(max(top, 0), min(top + h, H)), slice(max(left, 0), min(left + w, W))
    inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    full = np.zeros((H, W))
    full[rows, columns] = alpha[inside]
    around = slice(max(top - h // 4, 0), top + h + h // 4 + 1), slice(max(left - w // 4, 0), left + w + w // 4 + 1)
    near = image[around][full[around] == 0]
    light = np.sqrt(near.mean() / max(np.average(colour.mean(2), weights=alpha + 1e-6), 1)) if near.size else 1

    a = alpha[inside][..., None]
    blended = (1 - a) * image[rows, columns] + a * colour[inside] * np.clip(light, 0.5, 2)
    image[rows, columns] = blended.round().clip(0, 255)
    label[full >= 0.5] = common.ANOMALY
    return full


def pasted(image, label, objects, rng):
    """Copies of image (H, W, 3) and label (H, W) with one to three objects, or as many as 40 anomalous pixels take."""
    image, label = image.copy(), label.copy()
    todo = rng.integers(1, 4)
    while todo > 0 or (label == common.ANOMALY).sum() < LEAST:
        piece = choose(objects, rng)
        paste(image, label, piece, place(label.shape, piece.width / piece.height, rng))
        todo -= 1
    return image, label


def main():
    p = argparse.ArgumentParser(description="Paste objects into the images of a split that has no anomalies.")
    p.add_argument("--data", choices=tuple(common.DATASETS), default="toy", help="data set (default: toy)")
    p.add_argument("--root", help="its folder (default: data/<name>)")
    p.add_argument("--anomaly", nargs="+", metavar="CLASS", help="camvid, bdd: as pretrain.py (default: as it)")
    p.add_argument("--split", choices=common.SPLITS, default="val", help="which images (default: val)")
    p.add_argument("--objects", metavar="FOLDER", help="PNGs with alpha, CLASS_….png (default: flower pieces)")
    p.add_argument("--classes", nargs="+", metavar="CLASS", help="of these classes only (default: all)")
    p.add_argument("--seed", type=common.whole(0), default=0, help="which objects, and where (default: 0)")
    p.add_argument("--known", action="store_true", help="the labels are to tell known from anomalous alone, for models "
                   "of other classes (default: classes)")
    p.add_argument("--out", required=True, help="folder to write")
    args = p.parse_args()
    common.check_torchrun()
    out = Path(args.out)
    if out.exists():
        raise common.InputError(f"{out}: is there already; expected a new folder")
    scenes = common.Scenes(args.data, common.default_root(args.data, args.root), args.split, args.anomaly)
    objects = cut_outs(args.objects, args.classes) if args.objects else None

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        work = Path(work, out.name)                                       # renamed when it is complete
        for kind in ("images", "labels"):
            (work / kind).mkdir(parents=True)
        for i in common.progress(range(len(scenes)), "pasting"):
            image, label = scenes.decode(i)
            if (label == common.ANOMALY).any():
                raise common.InputError(f"{scenes.pairs[i][1]}: holds anomalies already; expected a split without them")
            arrays = pasted(image, label, objects, np.random.default_rng([args.seed, i]))
            for kind, array in zip(("images", "labels"), arrays):
                Image.fromarray(array).save(work / kind / f"{i:04d}.png")
        classes = {name: i for i, name in enumerate(scenes.classes)}
        common.save_json(work / "dataset.json", dict(
            classes={} if args.known else classes, known=list(classes.values()) if args.known else [],
            ignored=[common.IGNORED], anomaly=[common.ANOMALY],
            splits={"test": {"images": "images", "labels": "labels"}}))
        work.rename(out)
    common.say(f"wrote {out}: {len(scenes)} images")


if __name__ == "__main__":
    common.cli(main)
