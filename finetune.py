"""Stage 3 of 4: Anomaly-aware Fine-tuning (Sec. III-C): lower the confidence on D_s, keep the segmentation of D_k.

    minimise   E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER]     (Eq. 5; Eq. 4, Eq. 6), over the auxiliary images

    in     pretrained.pt (--ckpt) and the auxiliary set (--aux) that was made from it
    out    ft.pt, ft.jsonl, ft.png    as pretrain.py writes them

    python finetune.py          # after python mgu_generate.py; the paper's L_ER and α = 0.05 on streethazards and bdd,
                                # L_KL and α = 0.3 on toy and camvid
    python finetune.py --loss kl --alpha 0.05 --mix none --out ft_kl.pt
    python finetune.py --known-unknown car fence pole --out ft_known.pt       # pilot study (Sec. IV-C): these are D_s
    torchrun --nproc-per-node 8 finetune.py

Controls, which the paper lacks: what does the direction of MGU add, and what its size? With everything else the same,
    --images noise     X' − X shuffled over the pixels of D_s: its size without its place and direction
    --images sign      every value of X' − X with a random sign: its size and place without its direction
    --images still     X, with the same D_s: the place alone
    --images clean     X, without D_s: L_k alone, on the images that the set was made from
    --alpha 0          L_k alone, on the auxiliary images
noise and sign are scaled so that their RMS over D_s is that of X' − X after clipping to 0..255 and rounding.

The training loop is pretrain.py's. A run that was stopped or killed continues when the same command is given again.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))   # python -P leaves it out
import common
import pretrain


def parse():
    p = argparse.ArgumentParser(description="Anomaly-aware fine-tuning (Sec. III-C, Eq. 5).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    p.add_argument("--ckpt", default="pretrained.pt", help="checkpoint of pretrain.py (default: pretrained.pt)")
    p.add_argument("--out", default="ft.pt", help="checkpoint to write (default: ft.pt)")
    p.add_argument("--root", help="folder of the dataset (default: the checkpoint's)")
    g = p.add_argument_group("synthetic-unknown data")
    g.add_argument("--aux", default="auxiliary", help="folder that mgu_generate.py wrote (default: auxiliary)")
    g.add_argument("--unknown", choices=("flipped", "all"),
                   help="D_s: the pixels of I_ỹ that flipped, or all of I_ỹ (ours: flipped)")
    g.add_argument("--images", choices=("aux", "clean", "noise", "sign", "still"),
                   help="aux: X'. Controls: clean: X without D_s; noise: X' − X shuffled over D_s; sign: every value "
                        "of X' − X on D_s with a random sign; still: X with D_s (default: aux)")
    g.add_argument("--mix", choices=("none", "clean", "train"),
                   help="known images beside the auxiliary ones, as many: clean: the X that each was made from; train: "
                        "of the whole training split, augmented as in pretraining (ours: none; toy, camvid: clean)")
    g.add_argument("--known-unknown", nargs="+", metavar="CLASS",
                   help="no auxiliary set: D_s is the pixels of these classes in the training images, and the other "
                        "pixels are D_k (Sec. IV-C)")
    g = p.add_argument_group("objective (Eq. 5)")
    g.add_argument("--loss", choices=("er", "kl"),
                   help="on D_s: entropy ratio, Eq. 6, or KL to uniform, Eq. 4 (paper: er is its best; toy, camvid: "
                        "kl)")
    g.add_argument("--alpha", type=common.real(0),
                   help="α, weight of the loss on D_s (paper: 0.05, Sec. IV-A; toy, camvid: 0.3)")
    pretrain.training_flags(p, "passes over the auxiliary set (paper: 10 for deeplabv3, 30 for pspnet)", micro_batch=16)
    args = p.parse_args()
    # The pilot study has neither X' nor I_ỹ: what is said about them would be silently without effect
    if args.known_unknown and (args.images or args.mix or args.unknown):
        p.error("argument --known-unknown: takes no auxiliary set: leave out --images, --mix and --unknown")
    return args


# ─────────────────────────────────────────── where D_s comes from ───────────────────────────────────────────

class AuxiliarySet(torch.utils.data.Dataset):
    """Samples of mgu_generate.py, and known images beside them: item (epoch, i) → dict(image uint8 (3, H, W), label
    uint8 (H, W), unknown bool (H, W) = D_s, index = i). With n samples: 0 ≤ i < n are these, n ≤ i < 2n those of --mix.

    folder: of the set. root: of the dataset, where X is read. unknown, images: the flags. clean: also the X of every
    sample. train: also as many items of this TrainingScenes (the training split, augmented), or None. Every random
    number is a function of (seed, epoch, i), that of a control of (seed, i).
    Raises InputError for a set that is not complete or not well-formed, and an item where X is not under `root`.
    ASSUMPTION: no augmentation: X' lies near the boundary pixel by pixel, and resampling would move it away."""

    def __init__(self, folder, root, seed, unknown, images, clean=False, train=None):
        self.folder, self.root, self.seed = Path(folder), Path(root), seed
        self.unknown, self.images, self.clean, self.train = unknown, images, clean, train
        path = self.folder / "manifest.json"
        self.manifest = common.load_json(path)
        for key, kind in dict(settings=dict, samples=list).items():
            if not isinstance(self.manifest, dict) or not isinstance(self.manifest.get(key), kind):
                raise common.InputError(f"{path}: no {key}: the set is not complete; "
                                        "run mgu_generate.py again to finish it")
        self.names = self.manifest["samples"]
        if not self.names or not all(isinstance(n, str) and Path(n).name == n for n in self.names):
            raise common.InputError(f"{path}: samples is no list of file names; expected a file of mgu_generate.py")
        missing = [n for n in self.names if not (self.folder / n).is_file()]
        if missing:
            raise common.InputError(f"{self.folder / missing[0]}: missing, and {len(missing) - 1} others; "
                                    "run mgu_generate.py again")

    def __len__(self):
        return len(self.names) * (2 if self.clean or self.train else 1)

    def name(self, i):
        n = len(self.names)
        if i >= n and self.train:
            return f"a training image, number {i - n} beside {self.folder}"
        return str(self.folder / self.names[i % n])

    def original(self, path, sample):
        """X uint8 (H, W, 3) of a sample; InputError where the file is not the image that the sample was made from:
        outside I_ỹ, X' equals X."""
        source = self.root / str(sample["source"])               # load_sample() has seen that it leads nowhere else
        if not source.is_file():
            raise common.InputError(f"{source}: no such file; {path} was made from it: "
                                    "expected the folder of the dataset, say where it is with --root")
        X, X_aux = common.read_image(source), sample["image"]
        if X.shape != X_aux.shape or ((X != X_aux).any(2) & (sample["label"] != sample["y"])).any():
            raise common.InputError(f"{source}: not the image that {path} was made from; "
                                    "expected the same dataset, say where it is with --root")
        return X

    def __getitem__(self, key):
        epoch, i = key
        n = len(self.names)
        if i >= n and self.train:
            return self.training_image(epoch, i)
        path = self.name(i)
        sample = common.load_sample(path)
        image, Z = sample["image"], sample["label"]
        D_s = Z == sample["y"] if self.unknown == "all" else sample["unknown"]   # I_ỹ, or its flipped pixels
        images = "clean" if i >= n else self.images
        if images != "aux":                                      # X itself is only read where it is needed
            X = self.original(path, sample)
            image = control(images, X, image, D_s, np.random.default_rng([self.seed, i]))
        if images == "clean":                                    # every labelled pixel is D_k
            D_s = np.zeros_like(D_s)
        return dict(image=torch.from_numpy(image).permute(2, 0, 1), label=torch.from_numpy(Z),
                    unknown=torch.from_numpy(D_s), index=i)

    def training_image(self, epoch, i):
        """Item n + k: the k-th image of a permutation of the training split, another one in each epoch (and, where the
        split has fewer than n images, for each round through it)."""
        n, N_train = len(self.names), len(self.train)
        # A function of (seed, epoch, i) alone: neither loader processes nor an interruption change it
        rounds, k = divmod(i - n, N_train)
        rounds += epoch * -(-n // N_train)                       # those of the epochs before
        order = np.random.default_rng([self.seed, rounds]).permutation(N_train)
        item = self.train[rounds, int(order[k])]
        return dict(item, unknown=torch.zeros_like(item["label"], dtype=torch.bool), index=i)


def control(images, X, X_aux, D_s, rng):
    """The image of a control, uint8 (H, W, 3): X outside D_s, and on D_s what `images` says (top of the file)."""
    moved = X_aux[D_s].astype(np.float64) - X[D_s]               # X' − X, (|D_s|, 3) grey levels
    if images == "noise":
        moved = rng.permutation(moved)                           # of the pixels: (R, G, B) stay together
    elif images == "sign":
        moved = moved * rng.choice([-1.0, 1.0], moved.shape)
    else:                                                        # clean, still
        return X
    image = X.copy()
    image[D_s] = add_with_rms(X[D_s].astype(np.float64), moved)
    return image


def add_with_rms(x, moved):
    """x + c · moved, rounded and clipped to 0..255, with the c whose result differs from x by the RMS of `moved`.

    X' − X itself never leaves 0..255 (MGU clamps), but shuffled or turned over it does: the control would be weaker.
    Clipping takes away some of c · moved, the more the larger c is: c ← c · (RMS asked) / (RMS found) rises to the
    c that is sought. Where rounding or saturation forbid it: the nearest found. x, moved (n, 3) → uint8 (n, 3)."""
    rms = lambda d: float(np.sqrt(np.mean(d**2))) if d.size else 0.0
    asked, c, best = rms(moved), 1.0, None
    for _ in range(20):
        result = (x + c * moved).round().clip(0, 255)
        found = rms(result - x)
        if best is None or abs(found - asked) < abs(rms(best - x) - asked):
            best = result
        if abs(found - asked) <= 1e-3 * asked or found == 0:
            break
        c *= asked / found
    return best.astype(np.uint8)


def auxiliary_data(args, checkpoint, root):
    """(AuxiliarySet, what it was made from as plain values). InputError where it belongs to another checkpoint: the
    pixels of D_s lie behind the boundaries of the f that they were made with (Sec. III-B), of no other."""
    data = AuxiliarySet(args.aux, root, args.seed, args.unknown, args.images, clean=args.mix == "clean")
    path = Path(args.aux) / "manifest.json"
    made_with, ckpt = data.manifest["settings"].get("ckpt"), common.fingerprint(args.ckpt)
    if made_with != ckpt:
        raise common.InputError(f"{path}: the set was made with another checkpoint ({made_with}) than {args.ckpt} "
                                f"({ckpt}); run mgu_generate.py --ckpt {args.ckpt} --out another-folder")
    first = common.load_sample(data.name(0))
    data.original(data.name(0), first)                           # fail now where --root is another data set
    identity = dict(aux=common.fingerprint(path), train=None)
    if args.mix == "train":
        # ASSUMPTION: pretraining's augmentation in a window as large as the auxiliary images, so that they stack
        size, scale = first["label"].shape, checkpoint["settings"].get("scale", (1, 1))
        with common.first_rank_first():
            data.train = pretrain.TrainingScenes(checkpoint["data"], root, "train", checkpoint["anomaly"], size, scale,
                                                 args.seed)
        identity["train"] = data.train.identity()
    D_s = "none" if args.images == "clean" else f"{args.unknown} pixels of I_ỹ"
    common.say(f"{len(data)} images, D_s = {D_s}, images {args.images}, mix {args.mix}")
    return data, identity


class KnownUnknown(common.Scenes):
    """The pilot study (Sec. IV-C): the training images, where D_s is the pixels of some known classes; item (epoch, i)
    → dict(image uint8 (3, H, W), label uint8 (H, W), unknown bool (H, W) = D_s, index = i).

    ASSUMPTION: all training images at full size, from the model that was trained on all classes."""

    def __init__(self, data, root, anomaly, unknown):
        super().__init__(data, root, "train", anomaly)
        self.unknown = torch.tensor(unknown, dtype=torch.uint8)   # indices of these classes

    def __getitem__(self, key):
        item = super().__getitem__(key[1])
        return dict(item, unknown=torch.isin(item["label"], self.unknown))


def known_unknown_data(args, checkpoint, root):
    """(KnownUnknown, what it was made from as plain values)."""
    unknown = common.class_indices(args.known_unknown, checkpoint["classes"], "--known-unknown")
    with common.first_rank_first():
        data = KnownUnknown(checkpoint["data"], root, checkpoint["anomaly"], unknown)
    common.say(f"{len(data)} images, D_s = {', '.join(args.known_unknown)}")
    return data, dict(aux=data.identity(), train=None)


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    f, checkpoint = common.load_checkpoint(args.ckpt)
    common.say(common.resolve(args, "finetune", checkpoint["data"], f.arch))
    root = common.data_root(args.root, checkpoint)               # X and the training split are read there
    data, identity = (known_unknown_data if args.known_unknown else auxiliary_data)(args, checkpoint, root)
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))

    # What decides the result, and so what a continued run must share with the first
    names = ("known_unknown", "unknown", "images", "mix", "loss", "alpha", "epochs", "batch_size", "lr", "schedule",
             "bn", "seed")
    settings = dict({n: getattr(args, n) for n in names}, ckpt=common.fingerprint(args.ckpt), **identity)
    facts = dict(common.model_facts(f), stage="finetune", **{k: checkpoint[k] for k in ("classes", "data", "anomaly")},
                 root=root, known_unknown=args.known_unknown)
    # Eq. 5 with Adam (Sec. IV-A). ASSUMPTION: dropout is active, as in pretraining; all of f is trained
    pretrain.train(f, data, args, device, settings, facts)


if __name__ == "__main__":
    common.cli(main)
