"""The toy by kind of unknown: which of its 12 silhouettes and 5 patterns are found, before and after fine-tuning.

    python tests/results/kinds.py runs/toy/[345]          # folders of experiments.py systems, with --keep

    in     pretrained.pt (row msp) and recipe.pt (row recipe) of every folder, of the data set toy
    out    kinds.json beside this file: rows of dict(row, seed, axis, kind, pixels, aupr, auroc), the last two in %

Every anomaly of the toy is one silhouette in one pattern. The test scenes are drawn again, with a note of what each
anomalous pixel belongs to. Positives are the pixels of one kind, negatives all pixels that are no anomaly; the score is
evaluate.py's msp. AUPR falls with the number of positives, AUROC does not.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
import common
import evaluate
import experiments
import toy

KINDS = {"silhouette": ("random glyph", "animal", "fish", "bird", "star", "ring", "crescent", "blob with holes", "cone",
                        "balloon", "mushroom", "box"),
         "pattern": ("plain", "chequers", "stripes", "rings", "speckles")}
FILES = {"msp": "pretrained.pt", "recipe": "recipe.pt"}


class Noting:
    """A generator that notes its draws of whole numbers."""

    def __init__(self, rng):
        self.rng, self.drawn = rng, []

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def integers(self, *args, **kwargs):
        self.drawn.append(self.rng.integers(*args, **kwargs))
        return self.drawn[-1]


def kinds_of(rng):
    """(ids uint8 (H, W), {axis: index of the kind of each pixel, int (H, W); −1: no anomaly}) of a test scene."""
    draw, scene, found = toy.toy_anomaly, [None], []

    def noted(s, x, y, k, rng):
        if scene[0] is not s:                                 # the scene before was given up
            scene[0] = s
            found.clear()
        earlier = s["ids"] == toy.ODD
        s["ids"][earlier] = 255
        noting = Noting(rng)
        draw(s, x, y, k, noting)
        found.append((s["ids"] == toy.ODD, noting.drawn[1], noting.drawn[3]))   # after the glyph, and after how many
        s["ids"][earlier & (s["ids"] == 255)] = toy.ODD
    toy.toy_anomaly = noted
    try:
        _, ids = toy.toy_scene(rng, anomaly=True)
    finally:
        toy.toy_anomaly = draw
    maps = {axis: np.full(ids.shape, -1) for axis in KINDS}
    for mask, silhouette, pattern in found:
        for axis, kind in zip(KINDS, (silhouette, pattern)):
            maps[axis][mask[::2, ::2] & (ids == toy.ODD)] = kind
    return ids, maps


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description="AUPR and AUROC on the toy by kind of unknown.")
    p.add_argument("folder", nargs="+", help="of a seed, with pretrained.pt and recipe.pt")
    p.add_argument("--out", default=str(HERE / "kinds.json"), help="JSON to add to (default: kinds.json here)")
    args = p.parse_args()
    out, noted = Path(args.out), None
    rows = experiments.rows_in(out, lambda row: tuple(row[k] for k in ("row", "seed", "axis", "kind")))
    for folder in map(Path, args.folder):
        for name, file in FILES.items():
            f, checkpoint = common.load_checkpoint(folder / file)
            scenes = common.Scenes("toy", common.data_root(None, checkpoint), "test")
            if noted is None:
                names = [int(Path(scenes.name(i)).stem) for i in range(len(scenes))]
                noted = [kinds_of(np.random.default_rng([0, 2, n])) for n in names]
                for i, (ids, _) in enumerate(noted):
                    if not np.array_equal(scenes.lut[ids], scenes[i]["label"]):
                        raise common.InputError(f"{scenes.name(i)}: another scene than --seed 0 of toy.py draws")
            score = np.concatenate([evaluate.score_msp(f(common.to_input(item["image"][None])))[0].numpy().ravel()
                                    for item in scenes])
            known = np.concatenate([(item["label"] != common.ANOMALY).numpy().ravel() for item in scenes])
            for axis, kinds in KINDS.items():
                kind = np.concatenate([maps[axis].ravel() for _, maps in noted])
                for k, label in enumerate(kinds):
                    mine = kind == k
                    if not mine.any():
                        continue
                    y, s = mine[mine | known], score[mine | known]
                    row = dict(row=name, seed=checkpoint["settings"]["seed"], axis=axis, kind=label,
                               pixels=int(mine.sum()), aupr=round(100 * average_precision_score(y, s), 3),
                               auroc=round(100 * roc_auc_score(y, s), 3))
                    rows[name, row["seed"], axis, label] = row
                    print(*row.values(), flush=True)
    order = lambda key: (list(KINDS).index(key[2]), KINDS[key[2]].index(key[3]), key[0], key[1])
    experiments.write_rows(out, [rows[k] for k in sorted(rows, key=order)])


if __name__ == "__main__":
    common.cli(main)
