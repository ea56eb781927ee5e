"""Stage 3 of 4: Anomaly-aware Fine-tuning (Sec. III-C): lower the confidence on D_s, keep the segmentation of D_k.

    minimise   E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER]     (Eq. 5; Eq. 4, Eq. 6), over the auxiliary images

    in     pretrained.pt (--ckpt) and the auxiliary set (--aux) that was made from it
    out    ft.pt, ft.jsonl, ft.png    as pretrain.py writes them, without a validation

    python finetune.py          # after python mgu_generate.py; the paper's L_ER and α = 0.05 on streethazards and bdd,
                                # L_KL and α = 0.3 on toy, camvid and idd_lite
    python finetune.py --loss kl --alpha 0.05 --mix none --out ft_kl.pt
    python finetune.py --known-unknown car fence pole --out ft_known.pt       # pilot study (Sec. IV-C): these are D_s
    torchrun --nproc-per-node 8 finetune.py

Read beside the paper: AuxiliarySet.__getitem__ (X', Z, D_s) → finetune → pretrain.train → pretrain.eq5 →
common.objective (Eq. 5). What stands behind stage 3 is for the related systems: here it puts all of f in one group.

Controls, which the paper lacks: what does the direction of MGU add, and what its size? With the same D_s, loss and
steps (but for clean and --alpha 0, L_k alone, and --any-model, with the other's D_s); the first four have X wherever
D_s is not:
    --images noise     X' − X shuffled over the pixels of D_s: its size without its place and direction
    --images sign      every value of X' − X with a random sign: its size and place without its direction
    --images still     X, with the same D_s: the place alone
    --images clean     X, without D_s: L_k alone (and γ's term on D_k), on the images that the set was made from
    --any-model        X' of another model: its size, and the direction of another f (--aux)
    --images aux       with a set of mgu_generate.py --ascent: its size and place, up the gradient: more of ỹ
    --alpha 0          L_k alone, on the auxiliary images
noise and sign are scaled so that their RMS over D_s is that of X' − X after clipping to 0..255 and rounding.

Related systems are other sources of D_s, other losses on it, other heads of f (METHODS in common.py); each flag stands
for itself too, so that any source goes with any loss:
    python finetune.py --method densehybrid --patches photographs     # evaluate.py --score hybrid
    python finetune.py --method densehybrid --negatives mgu           # the same losses on MGU's D_s
    python finetune.py --method noisy --patches photographs           # --score outlier outlier_msp
    python finetune.py --negatives paste --paste-control inlier       # pieces of other training images, AaFt's loss
    python finetune.py --method rnvp                                  # samples of a flow; --score msp entropy
    python finetune.py --loss margin                                  # Mask2Anomaly's, on any network; --score maxlogit
    python finetune.py --prototypes 5      # PGAN, from its abstract: a cosine classifier; --score cosine
    python finetune.py --distill           # DiCNet: a student of f; --score dicnet
    python finetune.py --synthesis         # SynthCP: a generator of images from label maps; --score synthcp
Their controls: --paste-control off | inlier | decoy, and --flow-border no.

The training loop is pretrain.py's. A run that was stopped or killed continues when the same command is given again.

Sections: command line · where D_s comes from · stage 3 · controls, pilot study · related systems, their flags · main
"""
import argparse
import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))   # python -P leaves it out
import common
import pretrain


def parse():
    p = argparse.ArgumentParser(usage="%(prog)s [flags]; --help lists them",
                                description="Anomaly-aware fine-tuning (Sec. III-C, Eq. 5).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open; small sets: "
                                       "toy, camvid, idd_lite.")
    p.add_argument("--ckpt", default="pretrained.pt", help="checkpoint of pretrain.py (default: pretrained.pt)")
    p.add_argument("--out", help="checkpoint to write (default: ft.pt; prototypes.pt, student.pt, generator.pt)")
    p.add_argument("--root", help="folder of the dataset (default: the checkpoint's)")
    g = p.add_argument_group("synthetic-unknown data")
    g.add_argument("--aux", help="folder that mgu_generate.py wrote (default: auxiliary)")
    g.add_argument("--unknown", choices=("flipped", "all"),
                   help="D_s: the pixels of I_ỹ that flipped, or all of I_ỹ (ours: flipped)")
    g.add_argument("--images", choices=("aux", "clean", "noise", "sign", "still"),
                   help="aux: X'. Controls: clean: X without D_s; noise: X' − X shuffled over D_s; sign: every value "
                        "of X' − X on D_s with a random sign; still: X with D_s (default: aux)")
    g.add_argument("--mix", choices=("none", "clean", "train"),
                   help="known images beside the auxiliary ones, as many: clean: the X that each was made from; train: "
                        "of the whole training split, augmented as in pretraining (ours: none; small sets: clean)")
    g.add_argument("--any-model", action="store_true", default=None,
                   help="control: take a set that was made with another checkpoint of the same classes, whose D_s lies "
                        "behind the boundaries of another f (default: refused)")
    g.add_argument("--known-unknown", nargs="+", metavar="CLASS",
                   help="no auxiliary set: D_s is the pixels of these classes in the training images, and the other "
                        "pixels are D_k (Sec. IV-C)")
    g = p.add_argument_group("objective (Eq. 5)")
    g.add_argument("--loss", choices=(*common.LOSSES, "margin"),
                   help="on D_s: entropy ratio, Eq. 6, or KL to uniform, Eq. 4 (paper: er is its best; small sets: "
                        "kl); js, energy, margin: of the related systems")
    g.add_argument("--alpha", type=common.real(0),
                   help="α, weight of the loss on D_s (paper: 0.05, Sec. IV-A; small sets: 0.3; margin: 1)")
    system_flags(p)
    pretrain.training_flags(p, "passes over the auxiliary set or, without one, the training split (paper: 10 for "
                            "deeplabv3, 30 for pspnet)", micro_batch=16)
    return checked(p, p.parse_args())


# ─────────────────────────────────────────── where D_s comes from ───────────────────────────────────────────

class AuxiliarySet(torch.utils.data.Dataset):
    """Samples of mgu_generate.py, and known images beside them: item (epoch, i) → dict(image uint8 (3, H, W), label
    uint8 (H, W), unknown bool (H, W) = D_s, index = i). With n samples: 0 ≤ i < n are these, n ≤ i < 2n those of --mix.

    folder: of the set. root: of the dataset, where X is read. unknown, images: the flags. clean: also the X of every
    sample. train: also as many items of this TrainingScenes (the training split, augmented), or None. Every random
    number is a function of (seed, epoch, i), that of a control of (seed, i).
    Raises InputError for a set that is not complete or not well-formed, and an item where X is not under `root`.
    ASSUMPTION: no augmentation: X' lies across the boundary pixel by pixel, and resampling would change that."""

    def __init__(self, folder, root, seed, unknown, images, clean=False, train=None):
        self.folder, self.root, self.seed = Path(folder), Path(root), seed
        self.unknown, self.images, self.clean, self.train = unknown, images, clean, train
        self.manifest = common.load_manifest(folder, "--aux")
        self.names = self.manifest["samples"]

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
        X, X_aux = sample["original"] if "original" in sample else common.read_image(source), sample["image"]
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
        images = "clean" if i >= n else self.images              # paper: "aux", and neither `if` below
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


def auxiliary_data(args, checkpoint, root):
    """(AuxiliarySet, what it was made from as plain values). InputError where it belongs to another checkpoint: the
    pixels of D_s lie behind the boundaries of the f that they were made with (Sec. III-B), of no other. --any-model
    lets that pass, but for another list of classes, whose labels are others."""
    data = AuxiliarySet(args.aux, root, args.seed, args.unknown, args.images, clean=args.mix == "clean")
    path = Path(args.aux) / "manifest.json"
    made_with, ckpt = data.manifest["settings"].get("ckpt"), checkpoint["fingerprint"]
    if data.manifest.get("classes", checkpoint["classes"]) != checkpoint["classes"] and made_with == ckpt:
        raise common.InputError(f"{path}: the set was made with other classes than {args.ckpt} has, or in another "
                                "order; expected the dataset.json of pretraining: run mgu_generate.py again")
    if made_with != ckpt and not (args.any_model and data.manifest.get("classes") == checkpoint["classes"]):
        others = "" if data.manifest.get("classes") == checkpoint["classes"] else ", of other classes,"
        raise common.InputError(f"{path}: the set was made with another checkpoint ({made_with}){others} than "
                                f"{args.ckpt} ({ckpt}); run mgu_generate.py --ckpt {args.ckpt} --out another-folder")
    if data.manifest.get("unknown_pixels") == 0 and args.unknown == "flipped" and args.images != "clean":
        raise common.InputError(f"{path}: no sample has a pixel in D_s: f had none right, or none has flipped; "
                                "expected an f that was trained longer, or a larger --max-steps of mgu_generate.py")
    first = common.load_sample(data.name(0))
    data.original(data.name(0), first)                           # fail now where --root is another data set
    identity = dict(aux=common.fingerprint(path), train=None)
    if args.mix == "train":
        # ASSUMPTION: pretraining's augmentation in a window as large as the auxiliary images, so that they stack
        data.train = pretrain.training_scenes(args, checkpoint, root, first["label"].shape)
        identity["train"] = data.train.identity()
        if data.manifest["settings"].get("dataset", identity["train"]) != identity["train"]:
            raise common.InputError(f"{root}: not the dataset that {path} was made from; say where it is with --root")
    D_s = "none" if args.images == "clean" else f"{args.unknown} pixels of I_ỹ"
    common.say(f"{len(data)} images, D_s = {D_s}, images {args.images}, mix {args.mix}")
    return data, identity


# ────────────────────────────────────────────────── stage 3 ──────────────────────────────────────────────────

SETTINGS = ("known_unknown", "unknown", "images", "mix", "loss", "alpha", "epochs", "batch_size", "lr", "schedule",
            "bn", "seed")


def finetune(args, f, checkpoint, root, device):
    """Minimise Eq. 5 over D_s and D_k of the chosen source (the paper's: the auxiliary set); writes args.out."""
    make = {"mgu": auxiliary_data, "known-unknown": known_unknown_data, "paste": pasted_data, "flow": flow_data}
    data, identity = make[source(args)](args, checkpoint, root)
    others = system_parts(f, args)       # of related systems; the paper: train() minimises Eq. 5 over all of f
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))

    # What decides the result, and so what a continued run must share with the first
    settings = dict({n: getattr(args, n) for n in SETTINGS}, ckpt=checkpoint["fingerprint"], **identity,
                    **system_settings(args))
    facts = facts_of(f, "finetune", checkpoint, root)
    facts["known_unknown"] = args.known_unknown or facts["known_unknown"]
    # Adam (Sec. IV-A). ASSUMPTION: dropout is active, as in pretraining; all of f is trained
    pretrain.train(f, data, args, device, settings, facts, **others)


def facts_of(model, stage, checkpoint, root, **more):
    """What the new checkpoint tells beside its settings: of the model, and what it has from the one that it starts
    from, pretraining's crop, scale and weights and the pilot study's classes among it."""
    inherited = {k: checkpoint[k] for k in ("classes", "data", "anomaly")}
    return dict(common.model_facts(model), stage=stage, root=root, **inherited, **more,
                known_unknown=checkpoint.get("known_unknown"), pretrained=pretrain.pretrained_with(checkpoint))


# ─────────────────────────────────── stage 3: controls, and the pilot study ───────────────────────────────────

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
    image[D_s] = common.add_with_rms(X[D_s].astype(np.float64), moved)
    return image


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
        data = common.same_classes(KnownUnknown(checkpoint["data"], root, checkpoint["anomaly"], unknown), checkpoint)
    common.say(f"{len(data)} images, D_s = {', '.join(args.known_unknown)}")
    return data, dict(aux=data.identity(), train=None)


# ─────────────────────────────── related systems: heads, and what is minimised ───────────────────────────────

def system_parts(f, args):
    """What related systems put in place of train()'s own: dict(groups[, count, objective]). Gives f its new heads."""
    parts = dict(groups=add_heads(f, args))
    if source(args) == "flow":
        parts.update(count=functools.partial(choose_places, args),
                     objective=functools.partial(eq5_with_samples, args, f.flow))
    elif args.gamma:
        parts.update(objective=functools.partial(eq5_with_outlier, args))
    elif args.loss == "margin":
        parts.update(objective=functools.partial(margin_objective, args),
                     count=pretrain.count_masks if f.decoder else None)
    return parts


def system_settings(args):
    """What their flags decide. gamma is None where it is 0, as in files that are older than the flag."""
    names = ("cut", "paste_range", "pure", "paste_control", "flow_lr", "flow_steps", "flow_border")
    settings = dict({n: getattr(args, n) for n in names}, gamma=args.gamma or None)
    if args.loss == "margin":
        settings.update(margin=args.margin, margin_published=args.margin_published)
    return settings


HEAD_FACTOR = 10   # ASSUMPTION: the new outlier head learns ten times as fast as f, DeepLab's custom for a new layer


def add_heads(f, args):
    """Give f what it lacks for this run: an outlier head where γ > 0, a flow; and take away what an earlier fine-tuning
    gave it and this one would not train. Returns the optimiser's groups."""
    torch.manual_seed(args.seed % 2**63)
    factors = {}                                                 # module: its learning rate, in those of f
    f.outlier = (f.outlier or nn.Conv2d(f.channels, 1, 1)) if args.gamma else None
    f.flow = (f.flow or common.RealNVP()) if source(args) == "flow" else None
    if f.outlier:
        factors[f.outlier] = HEAD_FACTOR
    if f.flow:
        factors[f.flow] = args.flow_lr / args.lr
    special = {p for module in factors for p in module.parameters()}
    groups = [dict(params=[p for p in f.parameters() if p not in special])]
    return groups + [dict(params=list(module.parameters()), factor=factor) for module, factor in factors.items()]


def eq5_with_outlier(args, net, part, counts, X=None):
    """Eq. 5, and with γ the outlier head's term, of a part of the batch; of X in place of the part's image if given."""
    found = net(common.to_input(part["image"]) if X is None else X)
    return common.objective_outlier(found["logits"], part["label"], part["unknown"], args.alpha, args.loss, *counts,
                                    outlier=found.get("outlier"), gamma=args.gamma)


def margin_objective(args, net, part, counts):
    """Mask2Anomaly (Rai et al., ICCV 2023): L_k + α · loss_margin, of a part of the batch. L_k is Mask2Former's loss
    for a mask network, and cross-entropy for the others, whose confidence is max S."""
    found = net(common.to_input(part["image"]))
    where = part["label"], part["unknown"], args.alpha
    if "sets" in found:
        return common.objective_sets(found["sets"], *where, args.margin, args.margin_published, *counts)
    return common.objective_margin(found["logits"], *where, *counts, args.margin, args.margin_published)


# ───────────────────────────────── related systems: D_s from pasted patches ─────────────────────────────────

class Pasted(torch.utils.data.Dataset):
    """Training images with a foreign patch pasted in, which is D_s: item (epoch, i) → as AuxiliarySet's.

    scenes: TrainingScenes, whose item (epoch, i) it is pasted into. folder: of the patches, or None for control
    "inlier", whose shapes are then those of segments of training images. cut, sizes, pure, control: the flags. Every
    random number is a function of (seed, epoch, i); the controls draw the same shapes and places, but that "inlier"
    replaces no image as a whole, whatever `pure` is.
    Raises InputError for a folder without images.
    ASSUMPTION: pasted after the augmentation, with hard edges, as DenseHybrid does; where a patch has a mask, it cuts
    (published: a rectangle half of the time); noisy negatives are jittered and mirrored as their image would be, but
    those that replace an image are not mirrored."""

    def __init__(self, scenes, folder, seed, cut, sizes, pure=0.0, control="none"):
        self.scenes, self.seed, self.cut, self.sizes, self.pure, self.control = scenes, seed, cut, sizes, pure, control
        self.patches = patch_files(folder) if folder else []

    def __len__(self):
        return len(self.scenes)

    def name(self, i):
        return self.scenes.name(i)

    def another(self, epoch, i, rng):
        return self.scenes[epoch, (i + int(rng.integers(1, max(2, len(self))))) % len(self)]

    def identity(self):
        """What the result depends on: names and sizes of the files, and the training images."""
        files = [f"{path.name} {path.stat().st_size}" for pair in self.patches for path in pair if path]
        return f"{len(self.patches)} patches, {common.digest(chr(10).join(files))}; {self.scenes.identity()}"

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng([self.seed, epoch, i, 1])    # the augmentation has (seed, epoch, i)
        item = self.scenes[epoch, i]
        image, Z = item["image"].permute(1, 2, 0).numpy().copy(), item["label"].numpy().copy()
        D_s = np.zeros(Z.shape, bool)
        alone = rng.random() < self.pure and self.control != "inlier"
        if self.patches:
            whole, mask = read_patch(*self.patches[rng.integers(len(self.patches))])
        else:                                                    # a shape, which a piece fills
            mask = segment(self.another(epoch, i, rng)["label"].numpy(), rng)
            whole = np.zeros((*mask.shape, 3), np.uint8)
        if alone:                                                # a negative that no street surrounds
            image, D_s = cover(whole, mask, Z.shape, rng)
            Z[:] = common.IGNORED
        else:
            patch, mask = cut_patch(whole, mask, self.cut, self.sizes, Z.shape, rng)
            at, at_2, window = (place(mask.shape, Z.shape, rng) for _ in range(3))
            if self.control in ("inlier", "decoy"):              # a piece of another training image
                other = self.another(epoch, i, rng)
                piece, ids = other["image"].permute(1, 2, 0).numpy()[window], other["label"].numpy()[window]
            if self.control == "inlier":
                patch = piece
            elif self.control == "decoy":                        # known, and with the same edges
                image[at_2][mask], Z[at_2][mask] = piece[mask], ids[mask]
            image[at][mask], Z[at][mask], D_s[at][mask] = patch[mask], common.IGNORED, True
        if self.control == "off":
            D_s[:] = False
        return dict(image=torch.from_numpy(image).permute(2, 0, 1), label=torch.from_numpy(Z),
                    unknown=torch.from_numpy(D_s), index=i)


def patch_files(folder):
    """[(path of an image, that of its mask or None)] of a folder."""
    try:
        masks = common.files_by_name(folder, common.LABELS, "_mask")
        found = common.files_by_name(folder, common.IMAGES, "")
    except OSError as e:
        raise common.InputError(f"{folder}: {e.strerror}; expected a folder of images (--patches)")
    for name, path in [*found.items(), *((f"{name}_mask", path) for name, path in masks.items())]:
        of = name.removesuffix("_mask")
        if name != of and (of not in masks or of not in found):
            raise common.InputError(f"{path}: cuts out nothing; expected an image {of} beside it, and a mask as "
                                    f"{', '.join(common.LABELS)} (--patches)")
    patches = sorted((path, masks.get(name)) for name, path in found.items() if not name.endswith("_mask"))
    if not patches:
        raise common.InputError(f"{folder}: no image; expected some of {', '.join(common.IMAGES)} (--patches)")
    return patches


def read_patch(path, mask_path):
    """(image uint8 (h, w, 3), bool (h, w): what of it is the patch), cut to the box of the mask; without one: all."""
    image = common.read_image(path)
    mask = np.ones(image.shape[:2], bool)
    if mask_path:
        mask = common.read_image(mask_path).any(2)               # InputError for a damaged one, before 16 bits are read
        with Image.open(mask_path) as opened:
            if opened.mode.startswith("I"):                      # of which read_image keeps the upper 8
                mask = np.asarray(opened) > 0
    else:
        with Image.open(path) as opened:
            if "A" in opened.getbands() or "transparency" in opened.info:
                mask = np.asarray(opened.convert("RGBA").getchannel("A")) >= 128
    if mask.shape != image.shape[:2] or not mask.any():
        raise common.InputError(f"{mask_path or path}: its mask is empty or of another size than its image; expected "
                                "one that cuts something out")
    box, = ndimage.find_objects(mask.astype(int))
    return image[box], mask[box]


MIN_SEGMENT = 64   # pixels


def segment(label, rng):
    """bool (h, w), the shape of a random connected segment of a label map (H, W), cut to its box.

    ASSUMPTION: each segment of at least MIN_SEGMENT pixels is as likely, of whatever class and size; where there is
    none, a rectangle of the shape of the image."""
    found = []
    for c in np.setdiff1d(label, common.IGNORED):
        parts, _ = ndimage.label(label == c)
        boxes, sizes = ndimage.find_objects(parts), np.bincount(parts.ravel())[1:]
        found += [parts[box] == k for k, (box, size) in enumerate(zip(boxes, sizes), 1) if size >= MIN_SEGMENT]
    return found[rng.integers(len(found))] if found else np.ones(label.shape, bool)


def resized(image, mask, h, w):
    """Image (bilinear) and mask (nearest) at h×w."""
    size = max(1, round(w)), max(1, round(h))
    return (np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR)),
            np.asarray(Image.fromarray(mask).resize(size, Image.NEAREST)))


def place(part, whole, rng):
    """A random window of size `part` (h, w) inside `whole` (H, W), as slices."""
    return tuple(slice(at, at + p) for at, p in ((int(rng.integers(0, f - p + 1)), p) for p, f in zip(part, whole)))


def cut_patch(image, mask, cut, sizes, shape, rng):
    """(uint8 (h, w, 3), bool (h, w)), the patch to paste into an image of `shape` (H, W), which it does not exceed.

    cut "side": h and w each from `sizes`, shares of the shorter side of `shape`; the image is first resized so that its
    own shorter side is the largest of them. With a mask, its longer side. "area": all of it, of an area from `sizes`
    times a jitter from 0.56 to 2.25, mirrored half of the time."""
    (h, w), short = mask.shape, min(shape)
    low, high = sizes
    if cut == "side" and mask.all():
        image, mask = resized(image, mask, *(s * high * short / min(h, w) for s in (h, w)))
        window = [min(max(1, round(s * short)), full) for s, full in zip(rng.uniform(low, high, 2), mask.shape)]
        at = place(window, mask.shape, rng)
        return image[at], mask[at]
    if cut == "side":
        scale = rng.uniform(low, high) * short / max(h, w)
    else:
        jitter = rng.uniform(0.75, 1.5) if rng.random() < 0.7 else 1.0       # of noisy negatives' code
        scale = jitter * np.sqrt(rng.uniform(low, high) * shape[0] * shape[1] / (h * w))
        if rng.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
    scale = min(scale, shape[0] / h, shape[1] / w)
    return resized(image, mask, scale * h, scale * w)


def cover(image, mask, shape, rng):
    """A random window of `shape` of the image and mask, scaled so that they fill it, or up to 1.5 times as large."""
    scale = max(full / s for full, s in zip(shape, mask.shape)) * rng.uniform(1, 1.5)
    h, w = (max(full, scale * s) for full, s in zip(shape, mask.shape))
    image, mask = resized(image, mask, h, w)
    at = place(shape, mask.shape, rng)
    return image[at].copy(), mask[at].copy()


def pasted_data(args, checkpoint, root):
    """(Pasted, what it was made from)."""
    data = Pasted(pretrain.training_scenes(args, checkpoint, root), args.patches, args.seed, args.cut, args.paste_range,
                  args.pure, args.paste_control)
    patches = f"patches of {len(data.patches)} images in {args.patches}" if data.patches else "pieces of other images"
    common.say(f"{len(data)} images, D_s = {patches}")
    return data, dict(aux=data.identity(), train=None)


# ───────────────────────── related systems: D_s from samples of a flow, trained jointly ─────────────────────────
# Real NVP outliers (Grcić et al., VISAPP 2021): minimise over f and the flow together
#     Eq. 5, whose D_s is a sample of the flow pasted into X,  +  −log₂ p of the crop that it replaced, bits a value.
# The loss on D_s reaches the flow through the sample and draws it to where f is unsure; the likelihood holds it at the
# data: the samples come to lie at the border (Lee et al., ICLR 2018).

def flow_data(args, checkpoint, root):
    """(the training images, what they are). Makes of --flow-steps whole epochs and adds them to args.epochs, over all
    of which a --schedule poly falls."""
    data = pretrain.training_scenes(args, checkpoint, root)
    n_steps = len(data) // min(args.batch_size, len(data))
    first = -(-args.flow_steps // n_steps)
    args.flow_steps, args.epochs = first * n_steps, first + args.epochs
    common.say(f"{len(data)} images, D_s = samples of a flow, trained alone for the first {args.flow_steps} steps")
    return data, dict(aux=None, train=data.identity())


def choose_places(args, batch, run):
    """[|D_k|, |D_s|, values of all samples] of this rank's share. Chooses one size for the batch and a place in each
    image, takes these pixels out of D_k and into D_s; adds `corner` (n, 2), noise `z`, `u` (n, 3, h, w) to the batch.

    Functions of (seed, step) and (seed, step, image): no part, rank or interruption changes them. While the flow is
    trained alone nothing is pasted: |D_s| = 0. ASSUMPTION: multiples of 8 pixels, as in the authors' later code."""
    n, H, W = batch["label"].shape
    unknown = batch["unknown"] = torch.zeros(n, H, W, dtype=torch.bool)
    shares = np.random.default_rng([args.seed, run.t, 0, 1]).uniform(*args.paste_range, 2)
    h, w = (8 * min(max(1, round(s * min(H, W) / 8)), full // 8) for s, full in zip(shares, (H, W)))
    rngs = [np.random.default_rng([args.seed, run.t, i, 2]) for i in batch["index"].tolist()]
    places = [place((h, w), (H, W), rng) for rng in rngs]
    batch["corner"] = torch.tensor([[at.start for at in window] for window in places])
    batch["z"] = torch.stack([torch.from_numpy(rng.standard_normal((3, h, w), np.float32)) for rng in rngs])
    batch["u"] = torch.stack([torch.from_numpy(rng.random((3, h, w), np.float32)) for rng in rngs])
    if run.t >= args.flow_steps:
        for k, at in enumerate(places):
            batch["label"][k][at], unknown[k][at] = common.IGNORED, True
    return [*pretrain.count_pixels(batch, run), batch["z"].numel()]


def eq5_with_samples(args, flow, net, part, counts):
    """−log₂ p of the crops, bits a value, + Eq. 5 with samples in their places; the first alone where |D_s| = 0."""
    *counts, values = counts
    X = common.to_input(part["image"])                                             # (b, 3, H, W)
    h, w = part["z"].shape[-2:]
    corner = part["corner"][..., None, None]                                       # (b, 2, 1, 1)
    rows = corner[:, 0] + torch.arange(h, device=X.device)[:, None]                # (b, h, 1)
    columns = corner[:, 1] + torch.arange(w, device=X.device)                      # (b, 1, w)
    window = torch.arange(len(X), device=X.device)[:, None, None], slice(None), rows, columns
    crops = X[window].permute(0, 3, 1, 2)                                          # a copy, (b, 3, h, w)
    value = flow.bits(crops, part["u"]).sum() / values
    if counts[1] == 0:
        return value
    sample = flow.sample(part["z"])      # in grey levels of 8 bits; its gradient is straight-through (RealNVP.sample)
    if args.flow_border == "no":
        sample = sample.detach()
    X[window] = sample.permute(0, 2, 3, 1)
    return value + eq5_with_outlier(args, net, part, counts, X)


# ──────────────────── related systems: prototypes, a student, a generator in place of Eq. 5 ────────────────────

def chosen_scenes(K, checkpoint, root):
    """The training images that are among the K with the most pixels of a class, at full size, without D_s.

    Raises InputError for a class that no image has."""
    scenes = KnownUnknown(checkpoint["data"], root, checkpoint["anomaly"], unknown=[])
    labels = [label for _, label in scenes.pairs]
    counts = common.id_histograms(labels)                                                 # (images, 256)
    common.check_ids(scenes.spec, scenes.lut, counts, labels)
    chosen = set()
    for c, name in enumerate(scenes.classes):
        pixels = counts[:, scenes.lut == c].sum(1)
        if not pixels.any():
            raise common.InputError(f"{root}: no training image has a pixel of {name}; expected one for its prototype")
        most = np.argsort(-pixels, kind="stable")[:K]
        chosen |= {int(i) for i in most if pixels[i]}
    scenes.pairs = [scenes.pairs[i] for i in sorted(chosen)]
    return scenes


@torch.no_grad()
def class_prototypes(f, items, device, classes):
    """(N, C) float32 of unit rows: row i is the mean over all cells of class i of the normalised embedding (after its
    activation), normalised. items: dicts of image uint8 (3, H, W) and label (H, W), in any order. classes: names.

    Sums in float64, then one division. Raises InputError for a class without a cell."""
    N, C = f.num_classes, f.classifier.in_channels
    total, cells = torch.zeros(N, C, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for item in items:
        x = f.activation(f.embed(common.to_input(item["image"][None], device)))[0].cpu().double()    # (C, h, w)
        Z = common.labels_at(item["label"], x.shape[1:]).flatten()
        of_class = (Z == torch.arange(N)[:, None]).double()                                          # (N, h·w)
        total += of_class @ F.normalize(x, dim=0).flatten(1).T
        cells += of_class.sum(1)
    if not cells.all():
        raise common.InputError(f"{classes[int(cells.argmin())]}: smaller than a cell of the embedding in every chosen "
                                "image; expected more --prototypes")
    return F.normalize(total / cells[:, None], dim=1).float()


def train_prototypes(args, f, checkpoint, root, device):
    """PGAN (Hao et al., "Prototype guided network for anomaly segmentation", 2022): class prototypes from a few
    annotated images, optimised by similarity. Writes an ordinary checkpoint with a cosine classifier: score cosine.

    Only the abstract of PGAN is public, and this follows it. ASSUMPTION: K images a class, those with most of it; a
    prototype starts as the masked mean of the embedding; then L_k of 10 · cosine on the same images, everything but the
    prototypes frozen; one level of features for the "hierarchical" ones."""
    if f.decoder:
        raise common.InputError(f"{args.ckpt}: a mask network has no classifier to replace; expected a checkpoint of "
                                "another --arch")
    with common.first_rank_first():
        scenes = common.same_classes(chosen_scenes(args.prototypes, checkpoint, root), checkpoint)
    f = f.to(device)
    weight = class_prototypes(f, (scenes[0, i] for i in range(len(scenes))), device, scenes.classes)
    common.say(f"{len(scenes)} images: the {args.prototypes} with most of each of {len(scenes.classes)} classes")
    g = common.Segmenter(f.arch, f.backbone_name, f.num_classes, f.width, "cosine")
    g.load_state_dict({k: v for k, v in f.state_dict().items() if not k.startswith(("classifier.", "outlier."))},
                      strict=False)
    g = g.requires_grad_(False).to(device, memory_format=torch.channels_last)
    g.classifier.weight.copy_(weight[:, :, None, None]).requires_grad_(True)
    args.alpha, args.loss, args.bn = 0, "er", "frozen"                # Eq. 5 with an empty D_s
    settings = dict({n: getattr(args, n) for n in ("prototypes", "epochs", "batch_size", "lr", "schedule", "seed")},
                    ckpt=checkpoint["fingerprint"], dataset=scenes.identity())
    facts = facts_of(g, "prototypes", checkpoint, root)
    pretrain.train(g, scenes, args, device, settings, facts)


def distill(args, f, checkpoint, root, device):
    """DiCNet's student (Zhou et al., 2021): a network, smaller as published, that predicts the embedding T of the
    frozen f from clean training images without their labels: it fits where it was taught, on the known classes.

    minimise  mean over images, channels and cells of (S − T)²,  T behind f's batch norm, S a bare convolution.
    ASSUMPTION: pretraining's crops and scales (published: whole images, flipped), no weight decay (published: 1e-5),
    dropout active; a map of the student that is coarser than f's is upsampled bilinearly (published: align_corners)."""
    scenes = pretrain.training_scenes(args, checkpoint, root)
    teacher = f.to(device, memory_format=torch.channels_last).requires_grad_(False)
    torch.manual_seed(args.seed % 2**63)
    arch = "fpn" if f.decoder else f.arch               # the same pyramid, without the queries
    student = common.bare(common.Segmenter(arch, args.student_backbone, f.num_classes, f.width))
    usual = "none" if pretrain.pretrained_with(checkpoint)["weights"] == "none" else "imagenet"
    if args.restart or not Path(args.out).exists():      # a run that goes on holds its weights
        pretrain.load_backbone(student, args.student_weights or usual, "--student-weights")
    student = student.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, student))
    names = ("student_backbone", "student_weights", "epochs", "batch_size", "lr", "schedule", "bn", "seed")
    settings = dict({n: getattr(args, n) for n in names}, ckpt=checkpoint["fingerprint"], dataset=scenes.identity())
    facts = facts_of(student, "distill", checkpoint, root, companion_of=checkpoint["fingerprint"])

    pretrain.train(student, scenes, args, device, settings, facts, count=lambda batch, run: [len(batch["label"])],
                   objective=lambda net, part, counts: distillation(teacher, net, part, counts))


def distillation(teacher, net, part, counts):
    """Σ over the images of a part of mean (S − T)², by the number of images in the batch: scalar."""
    X = common.to_input(part["image"])
    with torch.no_grad():
        T = teacher.embed(X).float()
    S = common.upsample(net(X)["embedding"].float(), T.shape[-2:])
    return ((S - T)**2).mean((1, 2, 3)).sum() / counts[0]


def perceived(f, X):
    """What f makes of images: the backbone's maps, and the embedding."""
    maps = f.maps(X)
    return [*(maps.values() if isinstance(maps, dict) else [maps]), f.head(maps)]


def synthesis_objective(f, net, part, counts):
    """SynthCP's generator and discriminator (Xia et al., ECCV 2020, with SPADE's losses): L_G + L_D of a part.

    L_G = −E D(G(Y)) + 10 · Σ |D's features of G(Y) − of X| + 10 · Σ w |f's features of G(Y) − of X|; L_D: hinge. Every
    term is a mean over images, so the parts are weighted by their share of the batch.
    DEVIATION: the perceptual term is in the features of the frozen f, not of VGG19: no download. They are the
    backbone's maps that its head sees and the embedding, before its activation; w is 1 for the last and half as much
    for each before it (VGG19's: 1/32, 1/16, 1/8, 1/4, 1). G and D step at once, where SPADE's code takes turns."""
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
    made = perceived(f, found["image"])
    perceptual = sum(0.5**k * F.l1_loss(a, b) for k, (a, b) in enumerate(zip(made[::-1], wanted[::-1])))
    return len(X) / counts[2] * (L_D + adversarial + 10 * matching + 10 * perceptual)


def synthesize(args, f, checkpoint, root, device):
    """Train SynthCP's generator for f and write it to args.out; f is frozen. Its checkpoint names that of f.

    ASSUMPTION: pretraining's crops and augmentation, where SynthCP squeezes images to 512×256; its 100 epochs of linear
    decay after 100 constant ones are the schedule "poly"."""
    data = pretrain.training_scenes(args, checkpoint, root)
    f = f.to(device, memory_format=torch.channels_last).requires_grad_(False)
    torch.manual_seed(args.seed % 2**63)
    model = common.Synthesizer(f.backbone_name, f.num_classes, args.generator_width)
    model = model.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, model))

    ckpt = checkpoint["fingerprint"]
    names = ("epochs", "batch_size", "lr", "schedule", "bn", "seed", "generator_width")
    settings = dict({n: getattr(args, n) for n in names}, ckpt=ckpt, train=data.identity())
    facts = facts_of(model, "synthesis", checkpoint, root, companion_of=ckpt)
    # SynthCP's Adam: no first moment, and four times the rate for the discriminator
    groups = [dict(params=list(m.parameters()), betas=(0, 0.9), factor=factor)
              for m, factor in ((model.generator, 1), (model.discriminator, 4))]
    pretrain.train(model, data, args, device, settings, facts, groups=groups,
                   count=lambda batch, run: [*pretrain.count_pixels(batch, run), len(batch["label"])],
                   objective=functools.partial(synthesis_objective, f))


# ──────────────────────────────────── related systems: the command line ────────────────────────────────────

def system_flags(p):
    """Flags of the related systems."""
    g = p.add_argument_group("related systems: other sources of D_s")
    g.add_argument("--method", choices=tuple(common.METHODS), default="mgu",
                   help="fills defaults with what a related system has published (default: mgu, the paper's)")
    g.add_argument("--negatives", choices=("mgu", "paste", "flow"),
                   help="D_s from the auxiliary set, from patches pasted into the training images, or from samples of "
                        "a flow trained jointly, pasted likewise (ours: mgu)")
    g.add_argument("--patches", metavar="FOLDER", help="paste: images of anything but the known classes; an alpha "
                   "channel or NAME_mask.png (above 0) cuts out (default: none; paste needs one, but for "
                   "--paste-control inlier)")
    g.add_argument("--cut", choices=("side", "area"), help="paste: a patch is a rectangle whose sides are drawn each "
                   "by itself, or all of the image or mask, of a drawn area (ours: side)")
    g.add_argument("--paste-range", type=common.real(0, above=True), nargs=2, metavar=("LOW", "HIGH"),
                   help="paste, flow: sides as shares of the image's shorter side; with --cut area, areas as shares of "
                        "the image's (ours: 0.02 0.49)")
    g.add_argument("--pure", type=common.real(0), help="paste: share of the images that are replaced by a patch's own, "
                   "all of which is D_s, or what the mask says (ours: 0)")
    g.add_argument("--paste-control", choices=("none", "off", "inlier", "decoy"),
                   help="controls. off: the same paste without D_s; inlier: D_s is a piece of another training image, "
                        "of the same shape, or without --patches of a labelled segment's; decoy: such a piece beside "
                        "the patch, with its labels in D_k (ours: none)")
    g.add_argument("--flow-lr", type=common.real(0, above=True), help="learning rate of the flow (ours: 1e-3)")
    g.add_argument("--flow-steps", type=common.whole(0), help="steps, in whole epochs, that train the flow alone "
                   "before --epochs (ours: 300)")
    g.add_argument("--flow-border", choices=("yes", "no"), help="whether the loss reaches the flow through its "
                   "samples; no: the flow learns from the likelihood alone (ours: yes)")
    usual = {stage: common.PAPER[stage] | common.OURS[stage] for stage in ("prototypes", "distill", "synthesis")}
    g = p.add_argument_group("related systems, without auxiliary set", "passes over the training split (--prototypes: "
                             "over its images). Defaults, small sets differ: " + "; ".join(
                                 "--{}: {epochs} epochs, batch {batch_size}, rate {lr:g}".format(stage, **values)
                                 for stage, values in usual.items()))
    g.add_argument("--prototypes", type=common.whole(), metavar="K",
                   help="PGAN: a cosine classifier from K annotated images a class, all else of f stays (default: "
                   "none)")
    g.add_argument("--distill", action="store_true", help="DiCNet: a student that predicts the embedding of f")
    g.add_argument("--student-backbone", choices=tuple(common.BACKBONES),
                   help="of the student (ours: mobilenet_v3_large; published: ResNet-34 for ResNet-50)")
    g.add_argument("--student-weights", help="of its backbone, as pretrain.py --weights (default: none where f had "
                   "none, else imagenet)")
    g.add_argument("--synthesis", action="store_true", help="SynthCP: a generator of images from label maps, and its "
                   "discriminator, on the training split")
    g.add_argument("--generator-width", type=common.whole(), help="channels of its last layer, a sixteenth of the "
                   "first one's (ours: SynthCP's 64; small sets: 8)")
    g = p.add_argument_group("related systems: other terms")
    g.add_argument("--gamma", type=common.real(0), help="γ, weight of the cross-entropy of an outlier head, which "
                   "tells D_s from D_k; 0: none is added or kept (ours: 0)")
    g.add_argument("--margin", type=common.real(0, above=True), help="--loss margin: M, by which the confidence on D_s "
                   "is to be below 1 (default: 0.75, the publication's; its code has 1)")
    g.add_argument("--margin-published", action="store_true", default=None, help="--loss margin: −max p̂ in place of "
                   "1 − max p̂, as published, which lowers the confidence on D_k too (default: off)")


def checked(p, args):
    """args, with `stage` and `out`; ends with a usage message where flags do not go together."""
    chosen, asked, method = source(args), alone(args), common.METHODS[args.method]
    if len(asked) > 1 or args.method != "mgu" and asked not in ([], ["known-unknown"]):
        p.error(f"argument --{asked[0]}: goes without --{asked[1] if len(asked) > 1 else 'method'}")
    if chosen == "prototypes" and args.bn:
        p.error("argument --bn: has no effect with prototypes: leave it out")
    # The pilot study has neither X' nor I_ỹ, a flow no patches: what is said about them would be without effect
    for flag in other_flags(args):
        if getattr(args, flag) is not None:
            p.error(f"argument --{flag.replace('_', '-')}: has no effect with {chosen}: leave it out")
    empty = "images clean" if args.images == "clean" else "paste-control off" if args.paste_control == "off" else ""
    for flag in ("unknown", "loss", "alpha") if empty else ():   # D_s is empty
        if getattr(args, flag) is not None:
            p.error(f"argument --{flag}: has no effect with --{empty}: leave it out")
    files = dict(finetune="ft.pt", prototypes="prototypes.pt", distill="student.pt", synthesis="generator.pt")
    args.stage = chosen if chosen in files else "finetune"
    args.out = args.out or files[args.stage]
    args.aux = args.aux or "auxiliary"
    if args.loss == "margin" and args.method == "mgu":
        args.method, method = "mask2anomaly", common.METHODS["mask2anomaly"]
    if chosen == "paste" and not args.patches and args.paste_control != "inlier":
        p.error("argument --patches: D_s comes from paste: expected a folder of images, or --paste-control inlier")
    if args.paste_range and args.paste_range[0] > args.paste_range[1] or max(args.paste_range or [0]) > 1:
        p.error(f"argument --paste-range: expected shares LOW ≤ HIGH ≤ 1, found {args.paste_range}")
    cut = method.get("cut", "side")                              # what the method's range is of
    wanted = "side" if chosen == "flow" else args.cut or cut
    if "paste_range" in method and chosen in ("paste", "flow") and not args.paste_range and wanted != cut:
        p.error(f"argument --paste-range: that of --method {args.method} is of --cut {cut}: expected LOW HIGH")
    if (args.pure or 0) > 1:
        p.error("argument --pure: expected a share of at most 1")
    if args.pure and args.paste_control == "inlier":
        p.error("argument --pure: has no effect with --paste-control inlier: leave it out")
    if args.loss and args.alpha is None and method.get("alpha") == 0:
        p.error(f"argument --loss: --method {args.method} gives it no weight: expected --alpha too")
    if args.loss and args.alpha == 0:
        p.error("argument --loss: has no effect with --alpha 0: leave it out")
    loss, gamma = args.loss or method.get("loss"), method.get("gamma", 0) if args.gamma is None else args.gamma
    if loss == "margin" and (chosen == "flow" or gamma):
        p.error("argument --loss: margin goes without an outlier head (--gamma) and without a flow")
    for flag in ("margin", "margin_published"):
        if getattr(args, flag) is not None and (loss != "margin" or args.stage != "finetune"):
            p.error(f"argument --{flag.replace('_', '-')}: expected --loss margin")
    if empty and loss == "margin":                               # its term on D_k goes too: what is left is L_k
        args.alpha = 0.0
    args.margin, args.margin_published = args.margin or 0.75, bool(args.margin_published)
    return args


EQ5 = ("loss", "alpha", "gamma")
SOURCES = {   # where D_s comes from, or what is trained without one: the flags that it reads
    "mgu": ("aux", "negatives", "unknown", "images", "mix", "any_model", *EQ5),
    "known-unknown": EQ5,
    "paste": ("negatives", "patches", "cut", "paste_range", "pure", "paste_control", *EQ5),
    "flow": ("negatives", "paste_range", "flow_lr", "flow_steps", "flow_border", *EQ5),
    "prototypes": (),
    "distill": ("student_backbone", "student_weights"),
    "synthesis": ("generator_width",),
}


def alone(args):
    """Of SOURCES those that have a flag of their name, and are asked for."""
    return [name for name in ("prototypes", "distill", "synthesis", "known-unknown")
            if getattr(args, name.replace("-", "_"), None)]


def source(args):
    """One of SOURCES: what a flag of that name asks for, or --negatives, else the method's, else mgu."""
    return (alone(args) or [args.negatives or common.METHODS[args.method].get("negatives", "mgu")])[0]


def other_flags(args):
    """The flags that only others of SOURCES read."""
    mine = SOURCES[source(args)]
    return [flag for flag in dict.fromkeys(f for flags in SOURCES.values() for f in flags) if flag not in mine]


# ─────────────────────────────────────────────────── main ───────────────────────────────────────────────────

def main():
    args = parse()
    if Path(args.out).exists() and Path(args.ckpt).exists() and os.path.samefile(args.out, args.ckpt):
        raise common.InputError(f"{args.out}: --out is --ckpt, which this run starts from; expected another --out")
    device = common.setup(args.device, tf32=True)
    f, checkpoint = common.load_checkpoint(args.ckpt)
    common.same_everywhere(args.ckpt, checkpoint["fingerprint"], "the one f")
    common.say(common.resolve(args, args.stage, checkpoint["data"], f.arch, without=other_flags(args)))
    root = common.data_root(args.root, checkpoint)               # X and the training split are read there
    run = dict(finetune=finetune, prototypes=train_prototypes, distill=distill, synthesis=synthesize)[args.stage]
    run(args, f, checkpoint, root, device)


if __name__ == "__main__":
    common.cli(main)
