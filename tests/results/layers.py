"""Dense kNN: which map of f to compare, and how to bring its distances to the image's size. On a choosing set.

    python tests/results/layers.py --root pasted 0/pretrained.pt 1/pretrained.pt       # made by tests/paste.py

    in     checkpoints of --arch fpn; a choosing set, its split `test` (--train-root: where f's training data lie)
    out    layers.json beside this file: rows of dict(data, seed, layer, upsampling, aupr: {pooled, per_image}), in %

Everything but the map is as in `evaluate.py --score knn`: k = 3, --images and --vectors references. AUPR is
scikit-learn's.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import common
import evaluate
import experiments

LAYERS = {   # name: what f gives for it
    "embedding": lambda f, maps: f.head(maps),
    "embedding after its activation": lambda f, maps: f.activation(f.head(maps)),
    **{f"backbone, stride {s}": lambda f, maps, s=s: maps[s] for s in ("4", "8", "16", "32")}}
UPSAMPLING = ("bilinear", "nearest")


class Tap:
    """f, with another of its maps in place of the embedding."""

    def __init__(self, f, layer):
        self.f, self.layer, self.origin, self.num_classes = f, layer, f.origin, f.num_classes

    def outputs(self, X):
        maps = self.f.maps(X)
        return dict(embedding=LAYERS[self.layer](self.f, maps), logits=torch.zeros(1, 1, 1, 1))


@torch.no_grad()
def scores(f, scenes, args):
    """Yields (layer, upsampling, [score (H, W) of every image])."""
    for layer in LAYERS:
        tap, found = Tap(f, layer), {u: [] for u in UPSAMPLING}
        known = evaluate.knn_references(tap, args.train_root, args.images, args.vectors, k=3, chunk=1024, seed=0,
                                        device=torch.device("cpu"))
        for item in common.progress(scenes, layer):
            E = tap.outputs(common.to_input(item["image"][None]))["embedding"].movedim(1, -1)       # (1, h, w, C)
            d = evaluate.knn_distance(E.flatten(0, 2), known["vectors"]).view(1, 1, *E.shape[1:3])
            for how in UPSAMPLING:
                flags = dict(align_corners=False) if how == "bilinear" else {}
                found[how].append(F.interpolate(d, item["label"].shape, mode=how, **flags)[0, 0].numpy())
        yield from ((layer, how, maps) for how, maps in found.items())


def parse(argv=None):
    p = argparse.ArgumentParser(description="AUPR of dense kNN by layer and upsampling, on a choosing set.")
    p.add_argument("ckpt", nargs="+")
    p.add_argument("--data", default="folder", help="the choosing set (default: folder, as tests/paste.py writes it)")
    p.add_argument("--root", required=True, help="its folder")
    p.add_argument("--train-root", help="of f's training images (default: the checkpoint's)")
    p.add_argument("--images", type=int, default=500)
    p.add_argument("--vectors", type=int, default=20_000, help="references (default: 20000, a fifth of evaluate.py's)")
    p.add_argument("--out", default=str(HERE / "layers.json"), help="JSON to add to (default: layers.json here)")
    return p.parse_args(argv)


def main():
    args = parse()
    out = Path(args.out)
    rows = experiments.rows_in(out, lambda row: tuple(row[k] for k in ("data", "seed", "layer", "upsampling")))
    scenes = common.Scenes(args.data, args.root, "test")
    labels = [item["label"].numpy() == common.ANOMALY for item in scenes]
    for path in args.ckpt:
        f, checkpoint = common.load_checkpoint(path)
        if f.arch not in common.PYRAMIDS:
            raise common.InputError(f"{path}: a model of --arch {f.arch}; expected one of {', '.join(common.PYRAMIDS)}")
        f.origin, key = (path, checkpoint), (checkpoint["data"], checkpoint["settings"]["seed"])
        for layer, how, maps in scores(f.requires_grad_(False), scenes, args):
            pooled = average_precision_score(np.concatenate([l.ravel() for l in labels]),
                                             np.concatenate([m.ravel() for m in maps]))
            each = [average_precision_score(l.ravel(), m.ravel()) for l, m in zip(labels, maps) if l.any()]
            aupr = dict(pooled=round(100 * float(pooled), 3), per_image=round(100 * float(np.mean(each)), 3))
            rows[*key, layer, how] = dict(data=key[0], seed=key[1], layer=layer, upsampling=how, aupr=aupr)
            print(*key, layer, how, aupr, flush=True)
    order = lambda key: (key[0], list(LAYERS).index(key[2]), key[3], key[1])
    experiments.write_rows(out, [rows[k] for k in sorted(rows, key=order)])


if __name__ == "__main__":
    common.cli(main)
