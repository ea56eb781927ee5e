"""Stage 3 of 4: Anomaly-aware Fine-tuning (Sec. III-C): lower the confidence on D_s, keep the segmentation of D_k.

    minimise   E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER]     (Eq. 5; Eq. 4, Eq. 6), over the auxiliary images

    in     pretrained.pt (--ckpt) and the auxiliary set (--aux) that was made from it
    out    ft.pt, ft.jsonl, ft.png    as pretrain.py writes them

    python finetune.py          # after python mgu_generate.py; the paper's L_ER and α = 0.05 on streethazards and bdd,
                                # L_KL and α = 0.3 on toy and camvid
    python finetune.py --loss kl --alpha 0.05 --mix none --out ft_kl.pt
    python finetune.py --known-unknown car fence pole --out ft_known.pt       # pilot study (Sec. IV-C): these are D_s
    python finetune.py --loss margin --out ft_margin.pt       # Mask2Anomaly's, for --arch mask2former or any other
    python finetune.py --synthesis        # SynthCP's generator of the checkpoint, for evaluate.py --score synthcp
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
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))   # python -P leaves it out
import common
import pretrain


def parse():
    p = argparse.ArgumentParser(description="Anomaly-aware fine-tuning (Sec. III-C, Eq. 5).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    p.add_argument("--ckpt", default="pretrained.pt", help="checkpoint of pretrain.py (default: pretrained.pt)")
    p.add_argument("--out", help="checkpoint to write (default: ft.pt; of --synthesis: generator.pt)")
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
    g.add_argument("--loss", choices=("er", "kl", "margin"),
                   help="on D_s: entropy ratio, Eq. 6, or KL to uniform, Eq. 4 (paper: er is its best; toy, camvid: "
                        "kl); margin: Mask2Anomaly's")
    g.add_argument("--alpha", type=common.real(0),
                   help="α, weight of the loss on D_s (paper: 0.05, Sec. IV-A; toy, camvid: 0.3; margin: 1)")
    g.add_argument("--margin", type=common.real(0, above=True), default=0.75,
                   help="--loss margin: M, by which the confidence on D_s is to be below 1 (default: 0.75, published)")
    g.add_argument("--margin-published", action="store_true", help="--loss margin: −max p̂ in place of 1 − max p̂, as "
                   "published, which lowers the confidence on D_k too (default: off)")
    g = p.add_argument_group("SynthCP")
    g.add_argument("--synthesis", action="store_true", help="nothing is fine-tuned: train a generator of images from "
                   "label maps, and its discriminator, on the training split (no auxiliary set, no objective above)")
    g.add_argument("--generator-width", type=common.whole(), help="channels of its last layer, a sixteenth of the "
                   "first one's (SynthCP: 64; toy, camvid: 8)")
    pretrain.training_flags(p, "passes over the auxiliary set (paper: 10 for deeplabv3, 30 for pspnet) or, of "
                            "--synthesis, the training split (SynthCP: 200; toy: 8, camvid: 40)", micro_batch=16)
    args = p.parse_args()
    args.out = args.out or ("generator.pt" if args.synthesis else "ft.pt")
    if args.loss == "margin" and args.alpha is None:
        args.alpha = 1.0   # Mask2Anomaly's
    of_objective = [args.images, args.mix, args.unknown, args.known_unknown, args.loss, args.alpha]
    if args.synthesis and any(value is not None for value in of_objective):
        p.error("argument --synthesis: leave out --unknown, --images, --mix, --known-unknown, --loss and --alpha")
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


# ─────────────────────────────────────── systems of the related work ───────────────────────────────────────

def margin_objective(args, net, part, counts):
    """Mask2Anomaly (Rai et al., ICCV 2023): L_k + α · loss_margin, of a part of the batch. L_k is Mask2Former's loss
    for a mask network, and cross-entropy for the others, whose confidence is max S."""
    found = net(common.to_input(part["image"]))
    where = part["label"], part["unknown"], args.alpha
    if "sets" in found:
        return common.objective_sets(found["sets"], *where, args.margin, args.margin_published, *counts)
    return common.objective(found["logits"], *where, "margin", *counts, margin=args.margin,
                            published=args.margin_published)


def count_images(batch, run):
    """[|D_k|, |D_s|, images] of this rank's share."""
    return [*pretrain.count_pixels(batch, run), len(batch["label"])]


def perceived(f, X):
    """What f makes of images: the backbone's maps, and the embedding."""
    maps = f.maps(X)
    return [*(maps.values() if isinstance(maps, dict) else [maps]), f.head(maps)]


def synthesis_objective(f, net, part, counts):
    """SynthCP's generator and discriminator (Xia et al., ECCV 2020, with SPADE's losses): L_G + L_D of a part.

    L_G = −E D(G(Y)) + 10 · Σ |D's features of G(Y) − of X| + 10 · Σ w |f's features of G(Y) − of X|; L_D: hinge. Every
    term is a mean over images, so the parts are weighted by their share of the batch.
    DEVIATION: the perceptual term is in the features of the frozen f, not of VGG19: no download, and they are what the
    score compares. w is 1 for the last map and half as much for each before it (VGG19's: 1/32, 1/16, 1/8, 1/4, 1)."""
    X, Y = common.to_input(part["image"]), common.one_hot(part["label"], f.num_classes)
    found = net((Y, X))
    real, fake, judged = found["real"], found["fake"], found["judged"]             # [[4 maps, score], …] of two scales
    L_D = adversarial = matching = 0
    for r, k, j in zip(real, fake, judged):
        L_D = L_D + (1 - r[-1]).relu().mean() / 2 + (1 + k[-1]).relu().mean() / 2
        adversarial = adversarial - j[-1].mean() / 2
        matching = matching + sum(F.l1_loss(a, b.detach()) for a, b in zip(j[:-1], r[:-1])) / 2
    with torch.no_grad():
        wanted = perceived(f, X)
    made = perceived(f, found["image"].float())
    perceptual = sum(0.5**k * F.l1_loss(a, b) for k, (a, b) in enumerate(zip(made[::-1], wanted[::-1])))
    return len(X) / counts[2] * (L_D + adversarial + 10 * matching + 10 * perceptual)


def synthesize(args, f, checkpoint, device):
    """Train SynthCP's generator for f and write it to args.out; f is frozen. Its checkpoint names that of f.

    ASSUMPTION: pretraining's crops and augmentation, where SynthCP squeezes images to 512×256; its 100 epochs of linear
    decay after 100 constant ones are the schedule "poly"."""
    common.say(common.resolve(args, "synthesis", checkpoint["data"]))
    root, trained = common.data_root(args.root, checkpoint), checkpoint["settings"]
    with common.first_rank_first():
        data = pretrain.TrainingScenes(checkpoint["data"], root, "train", checkpoint["anomaly"], seed=args.seed)
    data.crop, data.scale = trained.get("crop") or data.decode(0)[1].shape, trained.get("scale", (1, 1))
    f = f.to(device, memory_format=torch.channels_last).requires_grad_(False)
    torch.manual_seed(args.seed % 2**63)
    model = common.Synthesizer(f.backbone_name, f.num_classes, args.generator_width)
    model = model.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, model))

    ckpt = common.fingerprint(args.ckpt)
    names = ("epochs", "batch_size", "lr", "schedule", "bn", "seed", "generator_width")
    settings = dict({n: getattr(args, n) for n in names}, ckpt=ckpt, train=data.identity())
    facts = dict(common.model_facts(model), stage="synthesis", companion_of=ckpt, root=root,
                 **{k: checkpoint[k] for k in ("classes", "data", "anomaly")})
    # SynthCP's Adam: no first moment, and four times the rate for the discriminator
    groups = [dict(params=list(m.parameters()), betas=(0, 0.9), factor=factor)
              for m, factor in ((model.generator, 1), (model.discriminator, 4))]
    pretrain.train(model, data, args, device, settings, facts, groups=groups, count=count_images,
                   objective=functools.partial(synthesis_objective, f))


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    f, checkpoint = common.load_checkpoint(args.ckpt)
    if args.synthesis:
        return synthesize(args, f, checkpoint, device)
    common.say(common.resolve(args, "finetune", checkpoint["data"], f.arch))
    root = common.data_root(args.root, checkpoint)               # X and the training split are read there
    data, identity = (known_unknown_data if args.known_unknown else auxiliary_data)(args, checkpoint, root)
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))

    # What decides the result, and so what a continued run must share with the first
    names = ("known_unknown", "unknown", "images", "mix", "loss", "alpha", "epochs", "batch_size", "lr", "schedule",
             "bn", "seed")
    margin = args.loss == "margin"
    names += ("margin", "margin_published") if margin else ()
    settings = dict({n: getattr(args, n) for n in names}, ckpt=common.fingerprint(args.ckpt), **identity)
    facts = dict(common.model_facts(f), stage="finetune", **{k: checkpoint[k] for k in ("classes", "data", "anomaly")},
                 root=root, known_unknown=args.known_unknown)
    # Eq. 5 with Adam (Sec. IV-A). ASSUMPTION: dropout is active, as in pretraining; all of f is trained
    pretrain.train(f, data, args, device, settings, facts,
                   objective=functools.partial(margin_objective, args) if margin else None,
                   count=pretrain.count_masks if margin and f.decoder else None)


if __name__ == "__main__":
    common.cli(main)
