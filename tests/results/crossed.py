"""On which side of f's boundary the pixels of D_s lie, with MGU's samples and with each control: the study `real`.

    python tests/results/crossed.py runs/real_camvid/[012]        # folders of experiments.py real, with their sets

    in     pretrained.pt and, of every folder, what is there of auxiliary/, auxiliary_other/ (MGU of another f) and
           auxiliary_ascent/ (up the gradient)
    out    crossed.json beside this file: rows of dict(trained_on, row, seed, right: share of D_s that f has right on X,
           wrong: share of D_s that f has wrong on what fine-tuning sees, max_softmax: mean of max S over D_s there)
"""
import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import common
import experiments
import finetune

# name of a row of experiments.py: (folder of the set, --images of finetune.py)
ROWS = {"recipe": ("auxiliary", "aux"), "still": ("auxiliary", "still"), "noise": ("auxiliary", "noise"),
        "sign": ("auxiliary", "sign"), "other": ("auxiliary_other", "aux"), "ascent": ("auxiliary_ascent", "aux")}


@torch.no_grad()
def sides(f, data):
    """(right, wrong, max_softmax) over the D_s of an AuxiliarySet, in percent, percent, and 0 to 1."""
    right = wrong = confidence = total = 0
    for i in range(len(data)):
        sample, item = common.load_sample(data.name(i)), data[0, i]
        X = torch.from_numpy(data.original(data.name(i), sample)).permute(2, 0, 1)
        D_s, y = item["unknown"], int(sample["y"])
        before, after = (common.log_softmax(f(common.to_input(image[None])))[0] for image in (X, item["image"]))
        right += int((before.argmax(0) == y)[D_s].sum())
        wrong += int((after.argmax(0) != y)[D_s].sum())
        confidence += float(after.amax(0).exp()[D_s].double().sum())
        total += int(D_s.sum())
    return 100 * right / total, 100 * wrong / total, confidence / total


def main():
    p = argparse.ArgumentParser(description="Which share of D_s lies across the boundary of f.")
    p.add_argument("folder", nargs="+", help="of a seed of experiments.py real, with pretrained.pt and its sets")
    p.add_argument("--out", default=str(HERE / "crossed.json"), help="JSON to add to (default: crossed.json here)")
    args = p.parse_args()
    out = Path(args.out)
    key = lambda row: tuple(row[k] for k in ("trained_on", "row", "seed"))
    rows = experiments.rows_in(out, key)
    for folder in map(Path, args.folder):
        f, checkpoint = common.load_checkpoint(folder / "pretrained.pt")
        root, seed = common.data_root(None, checkpoint), checkpoint["settings"]["seed"]
        for name, (aux, images) in ROWS.items():
            if not (folder / aux).exists():
                continue
            right, wrong, confidence = sides(f, finetune.AuxiliarySet(folder / aux, root, seed, "flipped", images))
            row = dict(trained_on=checkpoint["data"], row=name, seed=seed, right=round(right, 2), wrong=round(wrong, 2),
                       max_softmax=round(confidence, 4))
            rows[key(row)] = row
            print(*row.values(), flush=True)
    experiments.write_rows(out, [rows[k] for k in sorted(rows)])


if __name__ == "__main__":
    common.cli(main)
