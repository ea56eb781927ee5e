"""Stage 3 of 4: Anomaly-aware Fine-tuning (Sec. III-C): lower the confidence on D_s, keep the segmentation of D_k.

    minimise   E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER]     (Eq. 5; Eq. 4, Eq. 6), over the auxiliary images

    in     pretrained.pt (--ckpt) and the auxiliary set (--aux) that was made from it
    out    ft.pt, ft.jsonl, ft.png    as pretrain.py writes them

    python finetune.py                                    # after python mgu_generate.py; the paper's L_ER and α = 0.05 on
                                                          # streethazards and bdd, L_KL and α = 0.3 on toy and camvid
    python finetune.py --loss kl --alpha 0.05 --no-mix-clean --out ft_kl.pt
    python finetune.py --known-unknown car fence pole --out ft_known.pt    # pilot study (Sec. IV-C): D_s = pixels of these classes
    torchrun --nproc-per-node 8 finetune.py

Controls, which the paper lacks: --alpha 0 (L_k alone on the auxiliary images), --images clean --alpha 0 (L_k alone
on the images they were made from; with --mix-clean twice as many steps), --images noise (the perturbation shuffled
over I_ỹ, which is then D_s: the same RMS but for clipping, no direction; to be set beside --unknown all). A run that
was stopped or killed continues when the same command is given again.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

import common
import pretrain


def parse():
    p = argparse.ArgumentParser(description="Anomaly-aware fine-tuning (Sec. III-C, Eq. 5).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    p.add_argument("--ckpt", default="pretrained.pt", help="checkpoint of pretrain.py (default: pretrained.pt)")
    p.add_argument("--out", default="ft.pt", help="checkpoint to write (default: ft.pt)")
    p.add_argument("--root", help="folder of the dataset (default: the checkpoint's)")
    g = p.add_argument_group("synthetic-unknown data")
    g.add_argument("--aux", default="aux", help="folder that mgu_generate.py wrote (default: aux)")
    g.add_argument("--unknown", choices=("flipped", "all"), help="D_s: the pixels of I_ỹ that flipped, or all of I_ỹ (ours: flipped)")
    g.add_argument("--images", choices=("aux", "clean", "noise"), help="X', the X it was made from, or X with X' − X shuffled "
                   "over I_ỹ; the last two are controls (default: aux)")
    g.add_argument("--mix-clean", action=argparse.BooleanOptionalAction, help="add the clean X of every sample, without D_s, to the set "
                   "(ours: no; toy: yes)")
    g.add_argument("--known-unknown", nargs="+", metavar="CLASS", help="no auxiliary set: D_s is the pixels of these classes "
                   "in the training images, and the other pixels are D_k (Sec. IV-C)")
    g = p.add_argument_group("objective (Eq. 5)")
    g.add_argument("--loss", choices=("er", "kl"), help="on D_s: entropy ratio, Eq. 6, or KL to uniform, Eq. 4 (paper: er is its best; toy, camvid: kl)")
    g.add_argument("--alpha", type=common.real(0), help="α, weight of the loss on D_s (paper: 0.05, Sec. IV-A; toy, camvid: 0.3)")
    pretrain.training_flags(p, "passes over the auxiliary set (paper: 10 for deeplabv3, 30 for pspnet)")
    return p.parse_args()


class AuxiliarySet(torch.utils.data.Dataset):
    """Samples of mgu_generate.py: item (epoch, i) → dict(image uint8 (3, H, W), label uint8 (H, W), unknown bool (H, W)).

    ASSUMPTION: no augmentation: X' lies near the boundary pixel by pixel, and resampling would move it away."""

    def __init__(self, folder, root, seed, unknown, images, mix_clean):
        self.folder, self.root, self.seed = Path(folder), Path(root), seed
        self.unknown, self.images, self.mix_clean = unknown, images, mix_clean
        self.manifest = common.load_json(self.folder / "manifest.json")
        if not isinstance(self.manifest, dict) or "samples" not in self.manifest:
            raise common.InputError(f"{folder}/manifest.json: the set is not complete; run mgu_generate.py again to finish it")
        self.names = self.manifest["samples"]
        missing = [n for n in self.names if not (self.folder / n).is_file()]
        if missing:
            raise common.InputError(f"{self.folder / missing[0]}: missing, and {len(missing) - 1} others; run mgu_generate.py again")

    def __len__(self):
        return len(self.names) * (1 + self.mix_clean)

    def name(self, i):
        return str(self.folder / self.names[i % len(self.names)])

    def __getitem__(self, key):
        i = key[1]
        sample = common.load_sample(self.name(i))
        image, label, unknown = sample["image"], sample["label"], sample["unknown"]
        I = label == sample["y"]                                          # I_ỹ
        clean = i >= len(self.names)
        if clean or self.images != "aux":
            X = common.read_image(self.root / str(sample["source"]))
            if self.images == "noise" and not clean:
                moved = image[I].astype(np.int16) - X[I]                  # X' − X, (|I_ỹ|, 3)
                X[I] = (X[I] + np.random.default_rng([self.seed, i]).permutation(moved)).clip(0, 255)
            image = X
        if self.unknown == "all" or self.images == "noise":
            unknown = I
        if clean or self.images == "clean":
            unknown = np.zeros_like(unknown)
        return dict(image=torch.from_numpy(image).permute(2, 0, 1), label=torch.from_numpy(label),
                    unknown=torch.from_numpy(unknown), index=i)


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    f, checkpoint = common.load_checkpoint(args.ckpt)
    common.say(common.resolve(args, "finetune", checkpoint["data"], f.arch))
    root = args.root or checkpoint["root"]
    if args.known_unknown:   # ASSUMPTION: all training images at full size, from the model that was trained on all classes
        unknown = common.class_indices(args.known_unknown, checkpoint["classes"], "--known-unknown")
        with common.first_rank_first():
            data = common.Scenes(checkpoint["data"], args.root or common.default_root(checkpoint["data"], root), "train",
                                 checkpoint["anomaly"], unknown=unknown)
        aux = data.identity()
    else:
        data = AuxiliarySet(args.aux, root, args.seed, args.unknown, args.images, args.mix_clean)
        made_with, ckpt = data.manifest["settings"].get("ckpt"), common.fingerprint(args.ckpt)
        if made_with != ckpt:
            raise common.InputError(f"{args.aux}/manifest.json: the set was made with another checkpoint ({made_with}) than "
                                    f"{args.ckpt} ({ckpt}); run mgu_generate.py --ckpt {args.ckpt} --out another-folder")
        aux = common.fingerprint(Path(args.aux) / "manifest.json")
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))
    common.say(f"{len(data)} images, D_s = " + (", ".join(args.known_unknown) if args.known_unknown else
                                               {"clean": "none", "noise": "all of I_ỹ"}.get(args.images, f"{args.unknown} pixels of I_ỹ")
                                               + f", images {args.images}"))

    names = ("known_unknown", "unknown", "images", "mix_clean", "loss", "alpha", "epochs", "batch_size", "lr", "schedule", "bn", "seed")
    settings = dict({n: getattr(args, n) for n in names}, ckpt=common.fingerprint(args.ckpt), aux=aux)
    facts = {k: checkpoint[k] for k in ("arch", "backbone", "width", "classes", "data", "root", "anomaly")}
    pretrain.train(f, data, args, device, settings, dict(facts, stage="finetune", root=str(root), known_unknown=args.known_unknown))


if __name__ == "__main__":
    common.cli(main)
