"""Stage 2 of 4: Masked Gradient Update (Sec. III-B, Algorithm 1): auxiliary images with synthetic-unknown pixels.

    in     pretrained.pt (--ckpt) and its dataset's training images
    out    auxiliary/CLASS-IMAGE.npz   one sample: image uint8 (H, W, 3) = X'; label uint8 (H, W) = Z; unknown bool
                                       (H, W) = D_s, the flipped pixels; y = ỹ; correct = pixels of I_ỹ that f gets
                                       right on X; source = X's file; history = |P_ỹ| in each iteration; original = X
                                       (only with --augment)
           auxiliary/manifest.json     settings, and per class what is stored: flips, confidence, perturbation
           auxiliary/sheets/*.png      contact sheet of each class; |P_ỹ| against the iteration

    python mgu_generate.py                                   # from the toy data's pretrained.pt
    python mgu_generate.py --ckpt pretrained.pt --per-class 300 --out auxiliary_300
    python mgu_generate.py --ascent --out auxiliary_up       # a control of finetune.py's
    torchrun --nproc-per-node 8 mgu_generate.py              # the same set for any number of processes, up to rounding

Algorithm 1, for an image X with labels Z, a class ỹ that occurs in it, and all its pixels Ω:
    1   X' ← X
    2   I_ỹ ← {(h, w) ∈ Ω : Z_{h,w} = ỹ}
    3   P_ỹ ← I_ỹ
    4   while P_ỹ ≠ ∅ do
    5       P_ỹ ← {(h, w) ∈ I_ỹ : arg max_i S_i(X'_{h,w}) = ỹ}
    6       for (h, w) in P_ỹ do
    7           X'_{h,w} ← X'_{h,w} − η ∇_{X'_{h,w}} L_mgu(f(X'), ỹ)       L_mgu: Eq. 3, the mean of S_ỹ over P_ỹ
    8       end for
    9   end while
update() is lines 5 to 8, mgu() the rest, for many images at once. Run as printed, with η for images in [0, 1], but for:
  DEVIATION 1  X' is clamped to the range of an image in every iteration. Gradients are heavy-tailed: without the clamp
               a few pixels leave the range by hundreds of grey levels, and 8-bit storage undoes their flips.
  DEVIATION 2  a cap on the iterations (--max-steps), since P_ỹ can grow again and need never become empty; what is
               kept of an image that reaches it is the X' with the fewest pixels in P_ỹ.
  DEVIATION 3  X' is stored in 8 bits, and D_s is decided on what is stored (generate()).
For one image, line by line and without batches: `literal` in tests/test_mgu.py. What the paper leaves open is marked
ASSUMPTION where it is decided. A run that was killed continues when the command is repeated. The set has the same bytes
in every run on a CPU; on a GPU as far as its kernels are deterministic.
"""
import argparse
import contextlib
import copy
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))   # python -P leaves it out
import common
import pretrain

MIN_PIXELS = 64   # ASSUMPTION: an image with fewer pixels of the class is passed over


def parse():
    p = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help lists them",
        description="Masked Gradient Update: make the auxiliary set (Sec. III-B, Algorithm 1).",
        epilog="'paper' is a value of the paper, 'ours' one that it leaves open; small sets: toy, camvid, idd_lite.")
    p.add_argument("--ckpt", default="pretrained.pt",
                   help="checkpoint of pretrain.py: f, frozen (default: pretrained.pt)")
    p.add_argument("--root", help="folder of the dataset (default: the checkpoint's)")
    p.add_argument("--per-class", type=common.whole(),
                   help="auxiliary images for each class (paper: 300, Sec. IV-A; toy: 10, camvid, idd_lite: 20)")
    p.add_argument("--step-size", type=common.real(0, above=True), metavar="η",
                   help="η of Algorithm 1, line 7, for images in [0, 1] (ours: 5; toy: 10)")
    p.add_argument("--max-steps", type=common.whole(), help="iterations after which the X' with the fewest pixels "
                   "in P_ỹ is kept as it is (ours: 80; toy: 40)")
    p.add_argument("--augment", action="store_true", help="X is a training image as pretraining augments it (scale, "
                   "crop, flip), a function of --seed and the image (default: off: the image itself)")
    p.add_argument("--ascent", action="store_true", help="control: in D_s, X moved up the gradient, to the RMS that "
                   "X' − X has there (default: off); what is told of flips is then of this image")
    p.add_argument("--batch-size", type=common.whole(),
                   help="images at once on a device; sets the memory, not the result (ours: 4; small sets: 8)")
    p.add_argument("--precision", choices=("float32", "tf32"),
                   help="of Algorithm 1 on a GPU; which pixels of the stored X' have flipped is decided in float32 "
                        "(default: tf32 on CUDA, else float32)")
    p.add_argument("--seed", type=common.whole(0), default=0, help="seed of the choice of images (default: 0)")
    p.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    p.add_argument("--out", default="auxiliary", help="folder of the auxiliary set (default: auxiliary)")
    p.add_argument("--restart", action="store_true", help="remove the set that --out holds and start over")
    return p.parse_args()


# ───────────────────────────────────────────── Algorithm 1 ─────────────────────────────────────────────

def update(f, X_aux, I, y, eta):
    """Line 5 to line 8, one iteration of every image of a batch: (P_ỹ, the next X').

    f is frozen: the gradient is with respect to the image. ASSUMPTION: P_ỹ is computed anew from all of I_ỹ, as line 5
    is printed, so a pixel that had flipped and fell back when its neighbours moved is in it again; the text of
    Sec. III-B reads as if a pixel that has flipped never moved again.
    X_aux (B, 3, H, W) float, grey levels 0..255; I = I_ỹ (B, H, W) bool; y = ỹ (B,) int64; P_ỹ (B, H, W) bool.
    eta: η, a number, for images in [0, 1]."""
    x = (X_aux / 255).requires_grad_(True)                               # X' as f takes it
    logits = f(x)
    # 5: P_ỹ ← {(h, w) ∈ I_ỹ : arg max_i S_i(X'_{h,w}) = ỹ}; the arg max of the logits is that of S
    P = I & (logits.argmax(1) == y.view(-1, 1, 1))
    L = common.loss_mgu(common.log_softmax(logits), P, y)                # Eq. 3: (B,)
    gradient, = torch.autograd.grad(L.sum(), x)      # L_b depends on image b alone: the sum keeps the images apart
    # 6 to 8: for (h, w) in P_ỹ: X'_{h,w} ← X'_{h,w} − η ∇_{X'_{h,w}} L_mgu(f(X'), ỹ)
    # ASSUMPTION: the loop is over one gradient: all of P_ỹ moves at once
    X_next = X_aux - 255 * eta * gradient                                # 255: η∇L in grey levels
    X_next = X_next.clamp(0, 255)                                        # DEVIATION 1: the clamp
    return P, torch.where(P[:, None], X_next, X_aux)


def mgu(f, jobs, batch_size, eta=5.0, max_steps=80, device="cpu", tf32=False):
    """Algorithm 1 for many images; yields (key, X' in grey levels (3, H, W), P_ỹ of the first iteration, history of
    |P_ỹ|) as they end. X' is that of the smallest |P_ỹ|: the last one, unless the cap ended it.

    f: frozen segmenter. jobs: iterable of (key, X uint8 (3, H, W), I_ỹ bool (H, W), ỹ). Each image of the batch has
    its own P_ỹ, its own 1/|P_ỹ| and its own end; the next job takes the place of a finished one. The batch keeps its
    shape to the end (empty places compute nothing that is used), so that a result does not depend on its neighbours:
    bit-identical on a CPU for one batch size, else to rounding.
    `tf32`: of f on a GPU. It moves a logit by about 1e-3 of its size, which the stored X' does not take on trust:
    generate() looks again in float32."""
    jobs = iter(jobs)
    job, places = next(jobs, None), [None] * batch_size                  # a place: its job's key, history, first P_ỹ
    while job or any(places):
        if not any(places):                                              # the start, or images of another size
            X_aux = torch.zeros(batch_size, *job[1].shape, device=device).contiguous(memory_format=torch.channels_last)
            I = torch.zeros(batch_size, *job[1].shape[1:], dtype=torch.bool, device=device)
            y, fewest = torch.zeros(2, batch_size, dtype=torch.int64, device=device)      # fewest: smallest |P_ỹ|
            X_best = X_aux.clone()
        for b in range(batch_size):
            if places[b] is None and job and job[1].shape == X_aux.shape[1:]:
                key, X_aux[b], I[b], y[b] = job                          # 1: X' ← X; 2: I_ỹ; 3 only opens the loop
                fewest[b] = I[b].numel() + 1
                places[b], job = dict(key=key, history=[]), next(jobs, None)

        with allow_tf32(tf32):
            P, X_next = update(f, X_aux, I, y, eta)                      # 5 to 8

        size = P.sum((1, 2))                                             # |P_ỹ| of each image: (B,)
        X_best = torch.where((size < fewest).view(-1, 1, 1, 1), X_aux, X_best)
        fewest = torch.minimum(size, fewest)
        for b, n in enumerate(size.tolist()):                            # the one wait of an iteration
            if places[b]:
                places[b]["history"].append(n)
                places[b].setdefault("first", P[b])
                # 4: while P_ỹ ≠ ∅, tested behind line 5, which says what P_ỹ is (an empty one moves nothing);
                # DEVIATION 2: or the cap. The history has one entry more than X' was moved
                if n == 0 or len(places[b]["history"]) > max_steps:
                    yield places[b]["key"], X_best[b].cpu(), places[b]["first"].cpu(), places[b]["history"]
                    places[b], I[b] = None, False
        X_aux = X_next                                                   # 9


@contextlib.contextmanager
def allow_tf32(allowed):
    """Whether CUDA may round the factors of a product to TF32 (10-bit mantissa) in this block; nothing on a CPU."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [s.allow_tf32 for s in switches]
    try:
        for s in switches:
            s.allow_tf32 = allowed
        yield
    finally:
        for s, value in zip(switches, before):
            s.allow_tf32 = value


def deterministic():
    """The same bytes in every run on one GPU, as far as PyTorch has deterministic kernels (it warns where not).

    The gradient of the bilinear upsampling is a sum of atomic additions in any order otherwise, and the last bit of a
    gradient decides, some iterations later, whether a pixel on the boundary has flipped.
    cudnn.benchmark stays off: it picks kernels by timing, and so others in another run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # what deterministic cuBLAS needs
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False          # a help in debugging that costs time


def fold_batch_norm(f):
    """A copy of f in eval mode with every batch norm folded into the convolution before it: the same function,
    fewer passes over memory. Relies on conv and norm being registered one after the other, as torchvision does."""
    f = copy.deepcopy(f).eval()
    for module in list(f.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return f.requires_grad_(False).to(memory_format=torch.channels_last)


# ──────────────────────────────────────────────── the set ────────────────────────────────────────────────

def choose(scenes, per_class, seed):
    """[(class, image index)]: for each class `per_class` images with at least MIN_PIXELS pixels of it, by seed.

    Sec. III-B: an auxiliary image has one adversarial class; Sec. IV-A: 300 of every class. The choice does not depend
    on the file system's order, and a larger per_class keeps the images of a smaller one.
    ASSUMPTION: at random among the images that hold the class; a class that fewer hold gets all of them; one image may
    serve several classes."""
    labels = [label for _, label in scenes.pairs]
    counts = common.id_histograms(labels)                                # (images, 256)
    common.check_ids(scenes.spec, scenes.lut, counts, labels)
    jobs = []
    for c, name in enumerate(scenes.classes):
        enough = np.flatnonzero(counts[:, scenes.lut == c].sum(1) >= MIN_PIXELS)
        chosen = np.random.default_rng([seed, c]).permutation(enough)[:per_class]
        if len(chosen) < per_class:
            common.say(f"{name}: only {len(chosen)} training images have {MIN_PIXELS} pixels of it ({per_class} asked)")
        jobs += [(c, int(i)) for i in chosen]
    return jobs


def training_image(scenes, y, i, tries=10):
    """X for class y, as an item of Scenes: training image i; of TrainingScenes the first of its augmentations that
    leaves MIN_PIXELS pixels of y, or the last of `tries`: a function of (seed, i, y)."""
    if not isinstance(scenes, pretrain.TrainingScenes):
        return scenes[i]
    for k in range(tries):
        item = scenes[k, i]
        if (item["label"] == y).sum() >= MIN_PIXELS:
            break
    return item


def sample_name(scenes, y, i):
    """File name of the sample of class y from training image i: "09_car-000017.npz"."""
    return f"{y:02d}_{re.sub('[^a-z0-9]+', '-', scenes.classes[y].lower())}-{i:06d}.npz"


@torch.inference_mode()
def predict(f, image, device):
    """(classes uint8 (H, W), max softmax float32 (H, W)) of one uint8 image (3, H, W), as a loader gives it."""
    top, classes = f(common.to_input(image[None], device)).softmax(1).max(1)
    return classes[0].to(torch.uint8).cpu().numpy(), top[0].cpu().numpy()


def generate(f, scenes, jobs, out, args, device, tf32=False):
    """Run Algorithm 1 for `jobs` [(class, image index)], choose D_s, and write one .npz each.

    ASSUMPTION: D_s ("unknown") is the pixels of I_ỹ that f gets right on X and no longer on the stored, 8-bit X': only
    these have crossed a boundary. Sec. III-B can be read as all of I_ỹ (finetune.py --unknown all).
    The other pixels of I_ỹ stay in D_k with the label ỹ: those that moved without flipping, those that f got wrong on X
    and that never moved, and those that it got wrong, that joined P_ỹ later and crossed (fewer than 1 in 100).
    ASSUMPTION: "right on X" is P_ỹ of the first iteration, on a GPU in TF32 and with batch norm folded into f; "no
    longer on X'" is f itself in float32, in which D_s has to lie across the boundary.
    ASSUMPTION: an image of which f gets no pixel of I_ỹ right is stored all the same: X' = X, with an empty D_s."""
    f_folded = fold_batch_norm(f)

    def job(chosen):                                                     # what mgu() takes; the label goes along
        y, i = chosen
        item = training_image(scenes, y, i)
        return (y, i, item["label"], item["image"]), item["image"], item["label"] == y, y

    # Reading takes as long as a few iterations on a GPU, and so does compressing: both run beside them
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(4) as writers:
        ended = mgu(f_folded, common.ahead(reader, job, jobs), args.batch_size, args.step_size, args.max_steps,
                    device, tf32)

        def samples():                                                   # (path, arrays), as images end
            for (y, i, label, X), X_aux, first, history in ended:
                image = X_aux.round().to(torch.uint8)
                flipped = predict(f, image, device)[0] != y
                D_s = first.numpy() & flipped
                if args.ascent:
                    with allow_tf32(tf32):
                        image = ascended(f_folded, X, label == y, torch.from_numpy(D_s), image, y, device)
                original = dict(original=X.permute(1, 2, 0).numpy()) if args.augment else {}
                yield out / sample_name(scenes, y, i), dict(
                    format=common.FORMAT, image=image.permute(1, 2, 0).numpy(), label=label.numpy(),
                    unknown=D_s, y=y, correct=int(first.sum()),
                    source=Path(os.path.relpath(scenes.name(i), scenes.root)).as_posix(),
                    history=np.array(history, np.int32), **original)
        written = common.ahead(writers, lambda sample: common.save_npz(*sample), samples())
        for _ in common.progress(written, "MGU", total=len(jobs), unit="image"):
            pass


def ascended(f, X, I, D_s, X_aux, y, device):
    """The control --ascent, uint8 (3, H, W): X, but on D_s moved up the gradient of line 7 (more of ỹ in place of less)
    until it has the RMS that X' − X has there. X, X_aux uint8 (3, H, W); I = I_ỹ, D_s bool (H, W).

    A step is a 40th of that RMS: with steps of η, as MGU's, many pixels leap over the top and lose ỹ as well."""
    rms = lambda v: float(v[:, D_s].double().square().mean().sqrt()) if D_s.any() else 0.0
    x, wanted = X.float(), rms(X_aux.float() - X.float())
    up, y, I = x, torch.tensor([y], device=device), I[None].to(device)
    for _ in range(200):                                                 # enough, though the steps are not in one line
        step = update(f, up[None].to(device), I, y, -1.0)[1][0].cpu() - up
        if rms(step) == 0 or rms(up - x) >= wanted:
            break
        up = (up + wanted / 40 / rms(step) * step).clamp(0, 255)
    image, moved = X.clone(), (up - x)[:, D_s].double().numpy()
    scale = wanted / rms(up - x) if moved.any() else 0
    image[:, D_s] = torch.from_numpy(common.add_with_rms(x[:, D_s].double().numpy(), scale * moved))
    return image


def measure(f, scenes, jobs, out, device):
    """Read the stored samples back, put them through f, and return a row of figures for each job.

    Counts and sums, not means: class_figures() adds them up over the pixels of a class, whichever rank read them."""
    def read(job):
        path = out / sample_name(scenes, *job)
        sample = common.load_sample(path)
        return path, sample, sample["original"] if "original" in sample else scenes.decode(job[1])[0]

    rows = []
    with ThreadPoolExecutor(4) as readers:
        stored = common.ahead(readers, read, jobs)
        for path, sample, X in common.progress(stored, "verifying what is stored", total=len(jobs), unit="image"):
            image, D_s, y = sample["image"], sample["unknown"], int(sample["y"])
            classes, top = predict(f, torch.as_tensor(image).permute(2, 0, 1), device)
            moved = (image.astype(np.int16) - X)[sample["label"] == y]   # X' − X on I_ỹ: (|I_ỹ|, 3) grey levels
            rows.append(dict(
                name=path.name, y=y, iterations=len(sample["history"]) - 1, correct=int(sample["correct"]),
                flipped=int((D_s & (classes != y)).sum()), unflipped=int(sample["history"].min()),
                confidence=float(top[D_s].astype(np.float64).sum()), unknown=int(D_s.sum()),
                linf=int(np.abs(moved).max(initial=0)), squares=int((moved.astype(np.int64)**2).sum()),
                values=moved.size, bytes=path.stat().st_size, history=sample["history"]))
    return rows


def class_figures(rows):
    """The manifest's figures over some samples. What is said of D_s and X' is measured on the stored files; correct,
    unflipped and iterations are what Algorithm 1 saw, before the storage in 8 bits.

    flip_rate: of the pixels of I_ỹ that f gets right on X, the percentage that it gets wrong on the stored X'.
    mean_max_softmax: over D_s; near 1/2 means near the boundary (Sec. III-B), near 1 that η is too large.
    unflipped_pixels: sum of the smallest |P_ỹ|, 0 where the cap ended no image. linf, rms: of X' − X over I_ỹ and the
    three channels, grey levels; iterations: that moved X', up to the cap where it ended them, though an earlier X' is
    kept."""
    summed = ("correct", "flipped", "unflipped", "confidence", "unknown", "squares", "values", "bytes")
    total = {k: sum(r[k] for r in rows) for k in summed}
    iterations = [r["iterations"] for r in rows]
    return dict(
        images=len(rows), iterations_median=float(np.median(iterations)), iterations_max=max(iterations),
        correct_pixels=total["correct"], flip_rate=round(100 * total["flipped"] / max(total["correct"], 1), 3),
        unflipped_pixels=total["unflipped"],
        mean_max_softmax=round(total["confidence"] / max(total["unknown"], 1), 4),
        linf=max(r["linf"] for r in rows), rms=round((total["squares"] / max(total["values"], 1))**0.5, 3),
        kilobytes=round(total["bytes"] / len(rows) / 1000, 1))


# ──────────────────────────────────────────────── figures ────────────────────────────────────────────────

def sheets(f, scenes, jobs, rows, out, device, per_class=3):
    """PNG figures: for each class X, X' with D_s outlined, X' − X amplified, the predictions on both; and |P_ỹ|, of
    `rows`, those of measure()."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cmap = plt.get_cmap("tab20", len(scenes.classes))
    names = [name.replace("$", r"\$") for name in scenes.classes]        # no formulas
    by_class = {}
    for y, i in jobs:
        by_class.setdefault(y, []).append(i)
    for y, images in common.progress(by_class.items(), "sheets"):
        samples = [common.load_sample(out / sample_name(scenes, y, i)) for i in images[:per_class]]
        fig, axes = plt.subplots(len(samples), 5, figsize=(13, 1.7 * len(samples) + 0.3), squeeze=False,
                                 constrained_layout=True)
        for row, i, sample in zip(axes, images, samples):
            X = sample["original"] if "original" in sample else scenes.decode(i)[0]
            sheet_row(row, f, X, sample, cmap, device)
        fig.suptitle(f"adversarial class ỹ = {names[y]}", fontsize=10)
        with common.replacing(out / "sheets" / f"{sample_name(scenes, y, 0)[:-11]}.png") as temporary:
            fig.savefig(temporary, dpi=110, format="png")
        plt.close(fig)

    fig, ax = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    for y in by_class:
        for k, history in enumerate(row["history"] for row in rows if row["y"] == y):
            ax.plot(history / max(history[0], 1), color=cmap(y), lw=0.6, alpha=0.6,
                    label=None if k else names[y])
    ax.set(xlabel="iteration", ylabel="|P_ỹ| / initial |P_ỹ|", xscale="symlog", ylim=(0, None))
    ax.legend(fontsize=6, ncols=2)
    with common.replacing(out / "sheets/iterations.png") as temporary:
        fig.savefig(temporary, dpi=110, format="png")
    plt.close(fig)


def sheet_row(row, f, X, sample, cmap, device):
    """Draw one sample into the five axes of `row`; X uint8 (H, W, 3).

    X' − X is amplified until its 95th percentile on D_s spans 100 grey levels, around a mid grey."""
    X_aux, D_s = sample["image"], sample["unknown"]
    before, after = (predict(f, torch.as_tensor(v).permute(2, 0, 1), device)[0] for v in (X, X_aux))
    moved = X_aux.astype(float) - X
    typical = np.percentile(np.abs(moved[D_s]), 95) if D_s.any() else 100
    gain = max(1, round(100 / max(typical, 1)))
    row[0].imshow(X)
    row[1].imshow(X_aux)
    if min(D_s.shape) > 1:
        row[1].contour(D_s, [0.5], colors="cyan", linewidths=0.6)
    row[2].imshow((128 + gain * moved).clip(0, 255).astype(np.uint8))
    for cell, classes in zip(row[3:], (before, after)):
        cell.imshow(classes, cmap=cmap, vmin=-0.5, vmax=cmap.N - 0.5, interpolation="nearest")
    titles = ("X", "X', D_s outlined", f"(X' − X) × {gain}", "prediction on X",
              f"prediction on X' ({len(sample['history']) - 1} iterations)")
    for cell, title in zip(row, titles):
        cell.set_title(title, fontsize=8)
        cell.axis("off")


# ───────────────────────────────────────────────── main ─────────────────────────────────────────────────

def main():
    args = parse()
    device = common.setup(args.device)
    if device.type != "cuda" and args.precision == "tf32":
        raise common.InputError(f"--precision tf32: expected float32 on {device}, only a GPU rounds to TF32")
    tf32 = device.type == "cuda" and args.precision != "float32"
    if device.type == "cuda":
        deterministic()
    f, checkpoint = common.load_checkpoint(args.ckpt)
    common.same_everywhere(args.ckpt, checkpoint["fingerprint"], "the one f")
    common.say(common.resolve(args, "mgu", checkpoint["data"], f.arch))
    with common.first_rank_first():
        root = common.data_root(args.root, checkpoint)
        scenes = pretrain.training_scenes(args, checkpoint, root) if args.augment else \
            common.scenes_of(checkpoint, root, "train")
        jobs = choose(scenes, args.per_class, args.seed)
    if not jobs:
        raise common.InputError(f"{root}: no training image has {MIN_PIXELS} pixels of any class; "
                                "expected larger images or more labels")
    args.batch_size = min(args.batch_size, len(jobs))
    f = f.to(device).requires_grad_(False)
    common.say(common.about_run(device, f))

    # What decides the bytes of the set, and so what a continued run must share with the first; not the batch size,
    # the device or the number of processes, which change them by rounding alone
    out = Path(args.out)
    settings = dict(
        ckpt=checkpoint["fingerprint"], data=checkpoint["data"], dataset=scenes.identity(),
        per_class=args.per_class, step_size=args.step_size, max_steps=args.max_steps,
        precision="tf32" if tf32 else "float32", seed=args.seed, min_pixels=MIN_PIXELS,
        **(dict(augment=[list(scenes.crop), list(scenes.scale)]) if args.augment else {}),
        **(dict(ascent=True) if args.ascent else {}))
    with common.locked(out / "manifest.json"):
        with common.first_rank_first():
            if common.rank() == 0:
                prepare(out, settings, args.restart)
        manifest = out / "manifest.json"
        common.same_everywhere(manifest, common.fingerprint(manifest) if manifest.exists() else None,
                               "--out in a folder that all share")
        # A sample has its name once it is whole: what is there need not be made again
        missing = [job for job in jobs if not (out / sample_name(scenes, *job)).exists()]
        common.barrier()                                                 # every rank has looked before any writes
        if len(missing) < len(jobs):
            common.say(f"{out}: {len(jobs) - len(missing)} of {len(jobs)} samples are there"
                       + "; making the rest" * bool(missing))

        started = time.time()
        generate(f, scenes, missing[common.rank()::common.world()], out, args, device, tf32)
        common.barrier()
        made = time.time() - started
        parts = common.gather(measure(f, scenes, jobs[common.rank()::common.world()], out, device))
        if common.rank() == 0:
            rows = [row for part in parts for row in part]
            complete(out, settings, checkpoint, scenes, jobs, rows)
            sheets(f, scenes, jobs, rows, out, device)
            common.say(f"wrote {out}: {len(jobs)} samples ({made:.0f} s, "
                       f"{len(missing) / max(made, 1e-9):.2f} images/s), manifest.json, sheets/")


# What this script writes, by where it lies below --out: --restart takes nothing else away
OWN_FILES = {"": r"manifest\.json|\d\d+_[a-z0-9-]*-\d{6,}\.npz", "sheets/": r"\d\d+_[a-z0-9-]*\.png|iterations\.png"}


def prepare(out, settings, restart):
    """Make the folder of the set, or check that the one that is there was made with these settings."""
    manifest = out / "manifest.json"
    if restart and manifest.exists():
        manifest_settings(manifest)                                      # refuses what is no set
    for place, own in OWN_FILES.items():
        for path in out.glob(f"{place}*"):
            left = re.fullmatch(r"\.(.+)\.tmp\w+", path.name)               # by a run that was killed
            if (left or restart) and re.fullmatch(own, left[1] if left else path.name) and path.is_file():
                path.unlink()
    if manifest.exists():                                                # continue, with the same settings alone
        before = manifest_settings(manifest)
        for name in {**settings, **before}:
            value = settings.get(name)
            if before.get(name) != value:
                raise common.InputError(
                    f"{manifest}: this set was made with {name.replace('_', '-')} {before.get(name)}, "
                    f"this run has {value}; pass --restart to replace it, or another --out")
    elif any(re.fullmatch(OWN_FILES[""], p.name) for p in out.glob("*.npz")):
        raise common.InputError(f"{out}: holds samples but no manifest.json; expected an empty folder: "
                                "pass --restart or another --out")
    else:
        common.save_json(manifest, dict(format=common.FORMAT, settings=settings))


def manifest_settings(path):
    """The settings in a manifest; InputError where it holds none."""
    try:
        manifest = common.load_json(path)
    except common.InputError as e:
        raise common.InputError(f"{e}: delete it, or pass another --out")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise common.InputError(f"{path}: holds no settings; expected a file of mgu_generate.py: "
                                "delete it, or pass another --out")
    return manifest["settings"]


def complete(out, settings, checkpoint, scenes, jobs, rows):
    """Write the whole manifest, without which a set counts as unfinished, and print its figures. rows: of measure()."""
    names = [sample_name(scenes, y, i) for y, i in jobs]
    rows.sort(key=lambda r: names.index(r["name"]))
    table = {scenes.classes[y]: class_figures([r for r in rows if r["y"] == y]) for y in sorted({r["y"] for r in rows})}
    table["all"] = class_figures(rows)
    common.save_json(out / "manifest.json", dict(
        format=common.FORMAT, settings=settings, classes=list(scenes.classes), data=checkpoint["data"],
        anomaly=checkpoint["anomaly"], figures=table, samples=names,
        unknown_pixels=sum(r["unknown"] for r in rows)))
    report(table, "ascent" in settings)


def report(table, ascent=False):
    """Print the figures of every class."""
    print(f"\n{'class':14} images  iterations  flipped after   left in     mean max   L∞    RMS    kB\n"
          f"{'':14}         median  max  8-bit storage   P_ỹ        softmax   grey levels  a file")
    for name, v in table.items():
        print(f"{name:14} {v['images']:6} {v['iterations_median']:8.0f} {v['iterations_max']:4} "
              f"{v['flip_rate']:12.2f} % {v['unflipped_pixels']:10} {v['mean_max_softmax']:10.3f} {v['linf']:5} "
              f"{v['rms']:6.2f} {v['kilobytes']:6.0f}")
    poor = [n for n, v in table.items() if v["flip_rate"] < 99 and v["correct_pixels"]]
    lost = [n for n, v in table.items() if not v["correct_pixels"]]
    if lost and not ascent:
        print(f"f has no pixel right of: {', '.join(lost)}; their D_s is empty")
    if ascent:
        print(f"--ascent: f still calls {100 - table['all']['flip_rate']:.1f} % of what it had right on X what it is")
    elif poor:
        print(f"below 99 % flipped: {', '.join(poor)}; raise --max-steps or --step-size")


if __name__ == "__main__":
    common.cli(main)
