"""How often a model raises an alarm where it knows the streets, and elsewhere: MSP at a threshold of its own domain.

    python tests/results/alarms.py 0/pretrained.pt 0/recipe.pt --data folder roadanomaly \\
        --root pasted_real /data/RoadAnomaly     # folder: the in-domain images of experiments.py real (tests/paste.py)

    in     checkpoints; test sets (--train-root: where f's training data lie)
    out    alarms.json beside this file: rows of dict(trained_on, row: name of the checkpoint, seed, data, known,
           anomalous: share of these pixels that are flagged, in %)

The threshold flags 5 % of the labelled pixels of f's own validation images, which hold no unknown: as `evaluate.py
--operating-point 0.95`, but here they are seen at their own size. Pixels without a class count in neither share.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import common
import evaluate
import experiments

FLAGGED = 0.05     # of the validation images' pixels


def parse(argv=None):
    p = argparse.ArgumentParser(description="Shares of known and of anomalous pixels that MSP flags, by test set.")
    p.add_argument("ckpt", nargs="+", help="ROW.pt: the file's name names the row (pretrained: msp)")
    p.add_argument("--data", nargs="+", required=True, help="test sets")
    p.add_argument("--root", nargs="+", required=True, help="the folder of each")
    p.add_argument("--size", nargs=2, type=int, default=(352, 512), metavar=("H", "W"),
                   help="at which f sees the sets other than `folder` (default: 352 512)")
    p.add_argument("--train-root", help="of f's data (default: the checkpoint's)")
    p.add_argument("--out", default=str(HERE / "alarms.json"), help="JSON to add to (default: alarms.json here)")
    args = p.parse_args(argv)
    if len(args.data) != len(args.root):
        p.error("--root: expected one folder for each of --data")
    return args


@torch.no_grad()
def scored(f, scenes, size=(1,)):
    """Yields (score, label) of every image, (H, W): log(1 − max S), f seeing the image at `size`."""
    def msp(X):
        logits = f(X)
        return {"msp": evaluate.score_msp(logits)}, common.log_softmax(logits)

    for item in scenes:
        maps, _ = evaluate.over_views(common.to_input(item["image"][None]), [(size, 1, False)], msp)
        yield maps["msp"][0].numpy(), item["label"].numpy()


def main():
    args = parse()
    out = Path(args.out)
    key = lambda row: tuple(row[k] for k in ("trained_on", "row", "seed", "data"))
    rows = experiments.rows_in(out, key)
    tests = {data: common.Scenes(data, Path(root), "test") for data, root in zip(args.data, args.root)}
    for path in args.ckpt:
        f, checkpoint = common.load_checkpoint(path)
        f.requires_grad_(False)
        root = common.data_root(args.train_root, checkpoint, "--train-root")
        val = common.Scenes(checkpoint["data"], root, "val", checkpoint["anomaly"])
        threshold = np.quantile(np.concatenate([s[Z < f.num_classes] for s, Z in scored(f, val)]), 1 - FLAGGED)
        for data, scenes in tests.items():
            flagged, total = np.zeros(2, int), np.zeros(2, int)      # known, anomalous
            for s, Z in scored(f, scenes, (1,) if data == "folder" else args.size):
                for k, mask in enumerate(((Z != common.ANOMALY) & (Z != common.IGNORED), Z == common.ANOMALY)):
                    flagged[k] += (s[mask] > threshold).sum()
                    total[k] += mask.sum()
            if not total.all():
                raise common.InputError(f"{scenes.root}: {total[0]} known and {total[1]} anomalous pixels; "
                                        "expected some of both")
            known, anomalous = (round(100 * float(n / of), 3) for n, of in zip(flagged, total))
            name = "msp" if Path(path).stem == "pretrained" else Path(path).stem
            row = dict(trained_on=checkpoint["data"], row=name, seed=checkpoint["settings"]["seed"], data=data,
                       known=known, anomalous=anomalous)
            rows[key(row)] = row
            print(*row.values(), flush=True)
    experiments.write_rows(out, [rows[k] for k in sorted(rows)])


if __name__ == "__main__":
    common.cli(main)
