"""Stage 3 of 4: Anomaly-aware Fine-tuning (Sec. III-C): lower the confidence on D_s, keep the segmentation of D_k.

    minimise   E_{D_k}[L_k] + α · E_{D_s}[L_KL or L_ER]     (Eq. 5; Eq. 4, Eq. 6), over the auxiliary images

    in     pretrained.pt (--ckpt) and the auxiliary set (--aux) that was made from it
    out    ft.pt, ft.jsonl, ft.png    as pretrain.py writes them

    python finetune.py          # after python mgu_generate.py; the paper's L_ER and α = 0.05 on streethazards and bdd,
                                # L_KL and α = 0.3 on toy and camvid
    python finetune.py --loss kl --alpha 0.05 --mix none --out ft_kl.pt
    python finetune.py --known-unknown car fence pole --out ft_known.pt       # pilot study (Sec. IV-C): these are D_s
    torchrun --nproc-per-node 8 finetune.py

Related systems, which need no auxiliary set (end of the file):
    --prototypes K     PGAN: a cosine classifier from K annotated images a class (from its abstract, all that is public)
    --distill          DiCNet: a student of f, for evaluate.py --score dicnet

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
    p.add_argument("--out", help="checkpoint to write (default: ft.pt; prototypes.pt, student.pt)")
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
    g = p.add_argument_group("related systems, without auxiliary set")
    g.add_argument("--prototypes", type=common.whole(), metavar="K",
                   help="PGAN: a cosine classifier from K annotated images a class, all else of f stays (default: "
                   "none)")
    g.add_argument("--distill", action="store_true", help="DiCNet: a student that predicts the embedding of f")
    g.add_argument("--student-backbone", choices=tuple(common.BACKBONES),
                   help="of the student (ours: mobilenet_v3_large; published: ResNet-34 for ResNet-50)")
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
    args.stage = "prototypes" if args.prototypes else "distill" if args.distill else "finetune"
    foreign = ["images", "mix", "unknown", "known_unknown", "loss", "alpha"]
    foreign += ["distill", "bn"] if args.prototypes else []
    if args.stage != "finetune" and any(getattr(args, name) for name in foreign):
        p.error(f"argument --{args.stage}: takes none of " + ", ".join("--" + n.replace("_", "-") for n in foreign))
    args.out = args.out or dict(finetune="ft.pt", prototypes="prototypes.pt", distill="student.pt")[args.stage]
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


# ──────────────────────── related systems that train something else than f with Eq. 5 ────────────────────────

def chosen_scenes(K, checkpoint, root):
    """The training images that are among the K with the most pixels of a class, at full size, without D_s.

    Raises InputError for a class that no image has."""
    scenes = KnownUnknown(checkpoint["data"], root, checkpoint["anomaly"], unknown=[])
    labels = [label for _, label in scenes.pairs]
    counts = common.id_histograms(labels)                                                 # (images, 256)
    common.check_ids(scenes.data, scenes.lut, counts, labels)
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
def class_prototypes(f, items, device):
    """(N, C) float32 of unit rows: row i is the mean over all cells of class i of the normalised embedding (after its
    activation), normalised. items: dicts of image uint8 (3, H, W) and label (H, W), in any order.

    Sums in float64, then one division. Raises InputError for a class without a cell."""
    N, C = f.num_classes, f.classifier.in_channels
    total, cells = torch.zeros(N, C, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for item in items:
        x = f.activation(f.embed(common.to_input(item["image"][None], device)))[0].cpu().double()    # (C, h, w)
        Z = common.labels_at(item["label"], x.shape[1:]).flatten()
        of_class = (Z == torch.arange(N)[:, None]).double()                                          # (N, h·w)
        total += of_class @ torch.nn.functional.normalize(x, dim=0).flatten(1).T
        cells += of_class.sum(1)
    if not cells.all():
        raise common.InputError(f"class {int(cells.argmin())} of the checkpoint's has no cell of the embedding in the "
                                "chosen images; expected more --prototypes")
    return torch.nn.functional.normalize(total / cells[:, None], dim=1).float()


def train_prototypes(args, f, checkpoint, root, device):
    """PGAN (Hao et al., "Prototype guided network for anomaly segmentation", 2022): class prototypes from a few
    annotated images, optimised by similarity. Writes an ordinary checkpoint with a cosine classifier: score cosine.

    Only the abstract of PGAN is public, and this follows it. ASSUMPTION: K images a class, those with most of it; a
    prototype starts as the masked mean of the embedding; then L_k of 10 · cosine on the same images, everything but the
    prototypes frozen; one level of features for the "hierarchical" ones."""
    with common.first_rank_first():
        scenes = chosen_scenes(args.prototypes, checkpoint, root)
    f = f.to(device)
    weight = class_prototypes(f, (scenes[0, i] for i in range(len(scenes))), device)
    common.say(f"{len(scenes)} images with {args.prototypes} of each of {len(scenes.classes)} classes")
    g = common.Segmenter(f.arch, f.backbone_name, f.num_classes, f.width, "cosine")
    g.load_state_dict({k: v for k, v in f.state_dict().items() if not k.startswith(("classifier.", "outlier."))},
                      strict=False)
    g = g.requires_grad_(False).to(device, memory_format=torch.channels_last)
    g.classifier.weight.copy_(weight[:, :, None, None]).requires_grad_(True)
    args.alpha, args.loss, args.bn = 0, "er", "frozen"                # Eq. 5 with an empty D_s
    settings = dict({n: getattr(args, n) for n in ("prototypes", "epochs", "batch_size", "lr", "schedule", "seed")},
                    ckpt=common.fingerprint(args.ckpt), dataset=scenes.identity())
    facts = dict(common.model_facts(g), stage="prototypes", root=root,
                 **{k: checkpoint[k] for k in ("classes", "data", "anomaly")})
    pretrain.train(g, scenes, args, device, settings, facts)


def distill(args, f, checkpoint, root, device):
    """DiCNet's student (Zhou et al., 2021): a smaller network that predicts the embedding T of the frozen f from clean
    training images without their labels: it fits where it was taught, on the known classes.

    minimise  mean over images, channels and cells of (S − T)²,  T behind f's batch norm, S a bare convolution.
    ASSUMPTION: pretraining's crops and scales (published: whole images, flipped), no weight decay (published: 1e-5), a
    map of the student that is coarser than f's is upsampled bilinearly."""
    # Those of pretraining; a fine-tuned f does not tell them, and has the defaults of its data
    usual = {**common.OURS["pretrain"], **common.RECIPES.get(checkpoint["data"], {}).get("pretrain", {})}
    crop, scale, weights = (checkpoint["settings"].get(k, usual[k]) for k in ("crop", "scale", "weights"))
    with common.first_rank_first():
        scenes = pretrain.TrainingScenes(checkpoint["data"], root, "train", checkpoint["anomaly"], crop, scale,
                                         args.seed)
    teacher = f.to(device, memory_format=torch.channels_last).requires_grad_(False)
    torch.manual_seed(args.seed % 2**63)
    student = common.bare(common.Segmenter(f.arch, args.student_backbone, f.num_classes, f.width))
    pretrain.load_backbone(student, "none" if weights == "none" else "imagenet")
    student = student.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, student))
    names = ("student_backbone", "epochs", "batch_size", "lr", "schedule", "bn", "seed")
    settings = dict({n: getattr(args, n) for n in names}, ckpt=common.fingerprint(args.ckpt),
                    dataset=scenes.identity())
    facts = dict(common.model_facts(student), stage="distill", companion_of=common.fingerprint(args.ckpt), root=root,
                 **{k: checkpoint[k] for k in ("classes", "data", "anomaly")})

    def count(batch, run):
        return [len(batch["label"])]

    pretrain.train(student, scenes, args, device, settings, facts, count=count,
                   objective=lambda net, part, counts: distillation(teacher, net, part, counts))


def distillation(teacher, net, part, counts):
    """Σ over the images of a part of mean (S − T)², by the number of images in the batch: scalar."""
    X = common.to_input(part["image"])
    with torch.no_grad():
        T = teacher.embed(X).float()
    S = common.upsample(net(X)["embedding"].float(), T.shape[-2:])
    return ((S - T)**2).mean((1, 2, 3)).sum() / counts[0]


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    f, checkpoint = common.load_checkpoint(args.ckpt)
    common.say(common.resolve(args, args.stage, checkpoint["data"], f.arch))
    root = common.data_root(args.root, checkpoint)               # X and the training split are read there
    if args.stage != "finetune":
        return (train_prototypes if args.prototypes else distill)(args, f, checkpoint, root, device)
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
