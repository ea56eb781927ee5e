"""Stage 2 of 4: Masked Gradient Update (Sec. III-B, Algorithm 1): auxiliary images with synthetic-unknown pixels.

    in     pretrained.pt (--ckpt) and its dataset's training images
    out    aux/CLASS_NAME-IMAGE.npz   one sample: image uint8 (H, W, 3) = X'; label uint8 (H, W) = Z; unknown bool
                                      (H, W), the flipped pixels; y; source; history = |P_ỹ| in each iteration
           aux/manifest.json          settings, and per class what is stored: flips, confidence, perturbation
           aux/sheets/*.png           contact sheet of each class; |P_ỹ| against the iteration

    python mgu_generate.py                                   # from the toy data's pretrained.pt
    python mgu_generate.py --ckpt pretrained.pt --per-class 300 --out aux_300
    torchrun --nproc-per-node 8 mgu_generate.py              # the same set for any number of processes

Algorithm 1 of the paper, and where we leave it:
  DEVIATION 1  the step is one grey level against the sign of the gradient (--step sign). Under the paper's
               X' − η∇L (--step plain) gradients are heavy-tailed: a few pixels move by hundreds of grey levels
               while most barely move, which leaves the range of an image and, in 8-bit storage, undoes flips.
               η doubles every 16 iterations for the pixels that resist: 1 to 5 % of them lie in cells whose
               neighbours have flipped and no longer move, and one grey level never takes them across.
  DEVIATION 2  X' is clamped to the range of an image in every iteration, and stays on the 8-bit grid under
               --step sign, so that the file holds exactly the X' that crossed the boundary.
  DEVIATION 3  a cap on the iterations (--max-steps), since P_ỹ can grow again and need never become empty; what is
               kept of an image that reaches it is the X' with the fewest pixels in P_ỹ.
The README has the measurements behind the first. A run that was killed continues when the command is repeated.
"""
import argparse
import copy
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common

MIN_PIXELS = 64   # ASSUMPTION: an image with fewer pixels of the class is passed over


def parse():
    p = argparse.ArgumentParser(description="Masked Gradient Update: make the auxiliary set (Sec. III-B, Algorithm 1).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    p.add_argument("--ckpt", default="pretrained.pt", help="checkpoint of pretrain.py: f, frozen (default: pretrained.pt)")
    p.add_argument("--root", help="folder of the dataset (default: the checkpoint's)")
    p.add_argument("--per-class", type=common.whole(), help="auxiliary images for each class (paper: 300, Sec. IV-A; toy: 2, camvid: 20)")
    p.add_argument("--step", choices=("sign", "plain"), help="X' − η·sign(∇L), η in grey levels, or X' − η∇L for images "
                   "in [0, 1] as in Algorithm 1, line 7 (ours: sign)")
    p.add_argument("--step-size", type=common.real(0, above=True), metavar="η", help="η (ours: 1 grey level for sign, 5 for plain)")
    p.add_argument("--double-every", type=common.whole(0), metavar="ITERATIONS", help="double η for what has not flipped after "
                   "so many, and again after as many more; 0: never (ours: 16 for sign, 0 for plain)")
    p.add_argument("--max-steps", type=common.whole(), help="iterations after which an image is given up (ours: 80)")
    p.add_argument("--batch-size", type=common.whole(), help="images at once on a device; sets the memory, not the result (ours: 4; toy, camvid: 8)")
    p.add_argument("--seed", type=common.whole(0), default=0, help="seed of the choice of images (default: 0)")
    p.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    p.add_argument("--out", default="aux", help="folder of the auxiliary set (default: aux)")
    p.add_argument("--restart", action="store_true", help="remove the set that --out holds and start over")
    return p.parse_args()


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


def mgu(f, jobs, batch_size, step="sign", eta=1.0, double_every=0, max_steps=80, device="cpu"):
    """Algorithm 1 for many images at once; yields (key, X' in grey levels (3, H, W), P_ỹ of the first iteration,
    history of |P_ỹ|) as they end. X' is that of the smallest |P_ỹ|: the last one, unless the cap ended it.

    f: frozen segmenter. jobs: iterable of (key, X uint8 (3, H, W), I_ỹ bool (H, W), ỹ). Each
    image of the batch has its own P_ỹ, its own 1/|P_ỹ| and its own end; the next job takes the place of a finished
    one. The batch keeps its shape to the end (empty places compute nothing that is used), so that a result does not
    depend on its neighbours: bit-identical on a CPU for one batch size, else to float32 rounding.
    """
    jobs = iter(jobs)
    job, running = next(jobs, None), [None] * batch_size      # running: [key, history, P_ỹ of the first iteration]
    while job or any(running):
        if not any(running):   # the start, or another size of image
            X = torch.zeros(batch_size, *job[1].shape, device=device).contiguous(memory_format=torch.channels_last)
            I = torch.zeros(batch_size, *job[1].shape[1:], dtype=torch.bool, device=device)
            y = torch.zeros(batch_size, dtype=torch.int64, device=device)
            X_best, fewest = X.clone(), torch.zeros_like(y)
        for b in range(batch_size):
            if running[b] is None and job and job[1].shape == X.shape[1:]:
                key, X[b], I[b], y[b] = job                                     # lines 1 and 2; X in grey levels
                running[b], job, fewest[b] = [key, [], None], next(jobs, None), I[b].numel() + 1
        X.requires_grad_(True)
        logits = f(X / 255)
        P = I & (logits.argmax(1) == y.view(-1, 1, 1))                          # line 5 (line 3 only opens the loop): (B, H, W)
        L = common.loss_mgu(common.log_softmax(logits), P, y)                   # Eq. 3: (B,)
        gradient, = torch.autograd.grad(L.sum(), X)     # L_b depends on X'_b alone: the sum keeps the images apart
        X = X.detach()
        size = P.sum((1, 2))
        X_best = torch.where((size < fewest).view(-1, 1, 1, 1), X, X_best)
        fewest = torch.minimum(size, fewest)
        sizes = size.tolist()                                                   # the one wait of an iteration
        for b in range(batch_size):
            if running[b] is None:
                continue
            key, history, first = running[b]
            history.append(sizes[b])
            running[b][2] = first = P[b].clone() if first is None else first
            if sizes[b] == 0 or len(history) > max_steps:                       # line 4; DEVIATION 3: or the cap
                yield key, X_best[b].cpu(), first.cpu(), history
                running[b], I[b] = None, False
        done = torch.tensor([len(r[1]) - 1 if r else 0 for r in running])       # iterations before this one
        eta_t = (eta * 2.0 ** (done // double_every if double_every else 0 * done)).view(-1, 1, 1, 1).to(device)
        # line 7; DEVIATION 1: sign and doubling; the paper's plain step is for images in [0, 1]: ∇_[0,1] = 255 ∇_grey, and a unit is 255 grey levels
        X_next = X - eta_t * gradient.sign() if step == "sign" else X - eta_t * 255**2 * gradient
        X = torch.where((P & I)[:, None], X_next.clamp(0, 255), X)              # lines 6 to 8: P_ỹ alone moves; DEVIATION 2: clamp


def choose(scenes, per_class, seed):
    """[(class, image index)]: for each class `per_class` images with at least MIN_PIXELS pixels of it, by seed.

    Independent of the file system's order; a larger per_class keeps the images of a smaller one."""
    labels = [label for _, label in scenes.pairs]
    counts = common.id_histograms(labels)
    common.check_ids(scenes.data, scenes.lut, counts, labels)
    jobs = []
    for c, name in enumerate(scenes.classes):
        enough = np.flatnonzero(counts[:, scenes.lut == c].sum(1) >= MIN_PIXELS)
        chosen = np.random.default_rng([seed, c]).permutation(enough)[:per_class]
        if len(chosen) < per_class:
            common.say(f"{name}: only {len(chosen)} training images have {MIN_PIXELS} pixels of it ({per_class} asked)")
        jobs += [(c, int(i)) for i in chosen]
    return jobs


def sample_name(scenes, y, i):
    return f"{y:02d}_{re.sub('[^a-z0-9]+', '-', scenes.classes[y])}-{i:06d}.npz"


@torch.inference_mode()
def predict(f, image, device):
    """(classes uint8 (H, W), max softmax float32 (H, W)) of one uint8 image (3, H, W), as a loader gives it."""
    top, classes = f(common.to_input(torch.as_tensor(image)[None], device)).softmax(1).max(1)
    return classes[0].to(torch.uint8).cpu().numpy(), top[0].cpu().numpy()


def generate(f, scenes, jobs, out, args, device):
    """Run Algorithm 1 for `jobs` [(class, image index)] and write one .npz each.

    ASSUMPTION: D_s ("unknown") is the pixels of I_ỹ that f gets right on X and no longer on the stored, 8-bit X'. The other
    pixels of I_ỹ stay in D_k with the label ỹ, the few that moved without flipping among them."""
    def inputs():
        for y, i in jobs:
            item = scenes[i]
            yield (y, i, item["label"]), item["image"], item["label"] == y, y
    ended = mgu(fold_batch_norm(f), inputs(), args.batch_size, args.step, args.step_size, args.double_every,
                args.max_steps, device)
    for (y, i, label), image, first, history in common.progress(ended, "MGU", total=len(jobs), unit="image"):
        image = image.round().to(torch.uint8)   # changes nothing after sign steps
        common.save_npz(out / sample_name(scenes, y, i), dict(
            format=common.FORMAT, image=image.permute(1, 2, 0).numpy(), label=label.numpy(),
            unknown=first.numpy() & (predict(f, image, device)[0] != y), y=y, correct=int(first.sum()),
            source=os.path.relpath(scenes.name(i), scenes.root), history=np.array(history, np.int32)))


def measure(f, scenes, jobs, out, device):
    """Read the stored samples back, put them through f, and return a row of figures for each job."""
    rows = []
    for y, i in common.progress(jobs, "verifying what is stored", unit="image"):
        path = out / sample_name(scenes, y, i)
        sample = common.load_sample(path)
        image, D_s = sample["image"], sample["unknown"]
        classes, top = predict(f, torch.as_tensor(image).permute(2, 0, 1), device)
        moved = (image.astype(np.int16) - scenes.decode(i)[0])[sample["label"] == y]   # (|I_ỹ|, 3) grey levels
        rows.append(dict(
            name=path.name, y=y, iterations=len(sample["history"]) - 1, correct=int(sample["correct"]),
            flipped=int((D_s & (classes != y)).sum()), unflipped=int(sample["history"].min()),
            confidence=float(top[D_s].astype(np.float64).sum()), unknown=int(D_s.sum()),
            linf=int(np.abs(moved).max(initial=0)), squares=int((moved.astype(np.int64)**2).sum()), values=moved.size,
            bytes=path.stat().st_size))
    return rows


def class_figures(rows):
    """The manifest's figures over some samples: what the files hold, not what the optimiser believed."""
    total = {k: sum(r[k] for r in rows) for k in ("correct", "flipped", "unflipped", "confidence", "unknown", "squares", "values")}
    return dict(
        images=len(rows), iterations_median=float(np.median([r["iterations"] for r in rows])),
        iterations_max=max(r["iterations"] for r in rows), correct_pixels=total["correct"],
        flip_rate=round(100 * total["flipped"] / max(total["correct"], 1), 3), unflipped_pixels=total["unflipped"],
        mean_max_softmax=round(total["confidence"] / max(total["unknown"], 1), 4),
        linf=max(r["linf"] for r in rows), rms=round((total["squares"] / max(total["values"], 1))**0.5, 3),
        kilobytes=round(sum(r["bytes"] for r in rows) / len(rows) / 1000, 1))


def sheets(f, scenes, jobs, out, device, per_class=3):
    """PNG figures: for each class X, X' with D_s outlined, X' − X amplified, the predictions on both; and |P_ỹ|."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder = out / "sheets"
    cmap = plt.get_cmap("tab20", len(scenes.classes))
    by_class = {}
    for y, i in jobs:
        by_class.setdefault(y, []).append(i)
    curves, ax = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    for y, images in common.progress(by_class.items(), "sheets"):
        name = scenes.classes[y]
        fig, axes = plt.subplots(min(per_class, len(images)), 5, figsize=(13, 1.7 * min(per_class, len(images)) + 0.3),
                                 squeeze=False, constrained_layout=True)
        for row, i in zip(axes, images):
            X = scenes.decode(i)[0]
            sample = common.load_sample(out / sample_name(scenes, y, i))
            X_aux = sample["image"]
            before, after = (predict(f, torch.as_tensor(v).permute(2, 0, 1), device)[0] for v in (X, X_aux))
            moved = X_aux.astype(float) - X
            gain = max(1, round(100 / max(np.percentile(np.abs(moved[sample["unknown"]]), 95), 1))) if sample["unknown"].any() else 1
            row[0].imshow(X)
            row[1].imshow(X_aux)
            row[1].contour(sample["unknown"], [0.5], colors="cyan", linewidths=0.6)
            row[2].imshow((128 + gain * moved).clip(0, 255).astype(np.uint8))
            row[3].imshow(before, cmap=cmap, vmin=-0.5, vmax=len(scenes.classes) - 0.5, interpolation="nearest")
            row[4].imshow(after, cmap=cmap, vmin=-0.5, vmax=len(scenes.classes) - 0.5, interpolation="nearest")
            for cell, title in zip(row, ("X", "X', D_s outlined", f"(X' − X) × {gain}", "prediction on X",
                                         f"prediction on X' ({len(sample['history']) - 1} iterations)")):
                cell.set_title(title, fontsize=8)
                cell.axis("off")
        fig.suptitle(f"adversarial class ỹ = {name}", fontsize=10)
        with common.replacing(folder / f"{sample_name(scenes, y, 0)[:-11]}.png") as temporary:
            fig.savefig(temporary, dpi=110, format="png")
        plt.close(fig)
        for i in images:
            history = common.load_sample(out / sample_name(scenes, y, i))["history"]
            ax.plot(history / max(history[0], 1), color=cmap(y), lw=0.6, alpha=0.6, label=name if i == images[0] else None)
    ax.set(xlabel="iteration", ylabel="|P_ỹ| / initial |P_ỹ|", xscale="symlog", ylim=(0, None))
    ax.legend(fontsize=6, ncols=2)
    with common.replacing(folder / "iterations.png") as temporary:
        curves.savefig(temporary, dpi=110, format="png")
    plt.close(curves)


def main():
    args = parse()
    device = common.setup(args.device)
    torch.backends.cudnn.deterministic = True    # the same bytes in every run, as far as cuDNN goes
    f, checkpoint = common.load_checkpoint(args.ckpt)
    common.say(common.resolve(args, "mgu", checkpoint["data"], f.arch))
    if args.step == "sign" and args.step_size % 1:
        raise common.InputError(f"--step-size {args.step_size}: sign steps are whole grey levels, expected 1, 2, …")
    with common.first_rank_first():
        root = args.root or common.default_root(checkpoint["data"], checkpoint["root"])
        scenes = common.Scenes(checkpoint["data"], root, "train", checkpoint["anomaly"])
        jobs = choose(scenes, args.per_class, args.seed)
    if not jobs:
        raise common.InputError(f"{root}: no training image has {MIN_PIXELS} pixels of any class; expected larger images or more labels")
    args.batch_size = min(args.batch_size, len(jobs))
    f = f.to(device).requires_grad_(False)
    common.say(common.about_run(device, f))

    out = Path(args.out)
    settings = dict(ckpt=common.fingerprint(args.ckpt), data=checkpoint["data"], dataset=scenes.identity(), per_class=args.per_class, step=args.step,
                    step_size=args.step_size, double_every=args.double_every, max_steps=args.max_steps, seed=args.seed, min_pixels=MIN_PIXELS)
    with common.first_rank_first():
        if common.rank() == 0:
            prepare(out, settings, args.restart)
    names = [sample_name(scenes, y, i) for y, i in jobs]
    missing = [job for job, name in zip(jobs, names) if not (out / name).exists()]
    common.barrier()   # every rank has looked before any writes
    if len(missing) < len(jobs):
        common.say(f"{out}: {len(jobs) - len(missing)} of {len(jobs)} samples are there; making the rest")
    started = time.time()
    generate(f, scenes, missing[common.rank()::common.world()], out, args, device)
    common.barrier()
    made = time.time() - started
    rows = [row for part in common.gather(measure(f, scenes, jobs[common.rank()::common.world()], out, device)) for row in part]
    if common.rank():
        return
    rows.sort(key=lambda r: names.index(r["name"]))
    table = {scenes.classes[y]: class_figures([r for r in rows if r["y"] == y]) for y in sorted({r["y"] for r in rows})}
    table["all"] = class_figures(rows)
    common.save_json(out / "manifest.json", dict(format=common.FORMAT, settings=settings, classes=list(scenes.classes),
                                                 data=checkpoint["data"], anomaly=checkpoint["anomaly"], figures=table, samples=names))
    report(table)
    sheets(f, scenes, jobs, out, device)
    common.say(f"wrote {out}: {len(names)} samples ({made:.0f} s, {len(missing) / max(made, 1e-9):.2f} images/s), "
               f"manifest.json, sheets/")


def prepare(out, settings, restart):
    """Make the folder of the set, or check that the one that is there was made with these settings."""
    manifest = out / "manifest.json"
    if restart:
        for path in [*out.glob("[0-9][0-9]_*.npz"), *out.glob("sheets/*.png"), manifest]:
            path.unlink(missing_ok=True)
    for path in out.glob(".*.tmp*"):   # left by a run that was killed
        path.unlink()
    if manifest.exists():
        before = common.load_json(manifest).get("settings", {})
        for name, value in settings.items():
            if before.get(name) != value:
                raise common.InputError(f"{manifest}: this set was made with {name.replace('_', '-')} {before.get(name)}, "
                                        f"this run has {value}; pass --restart to replace it, or another --out")
    elif any(out.glob("*.npz")):
        raise common.InputError(f"{out}: holds samples but no manifest.json; expected an empty folder: pass --restart or another --out")
    else:
        common.save_json(manifest, dict(format=common.FORMAT, settings=settings))


def report(table):
    """Print the figures of every class."""
    print(f"\n{'class':14} images  iterations  flipped after  pixels not   mean max   L∞    RMS    kB\n"
          f"{'':14}         median  max  8-bit storage  flipped    softmax   grey levels  a file")
    for name, v in table.items():
        print(f"{name:14} {v['images']:6} {v['iterations_median']:8.0f} {v['iterations_max']:4} {v['flip_rate']:12.2f} % "
              f"{v['unflipped_pixels']:10} {v['mean_max_softmax']:10.3f} {v['linf']:5} {v['rms']:6.2f} {v['kilobytes']:6.0f}")
    poor = [n for n, v in table.items() if v["flip_rate"] < 99]
    if poor:
        print(f"below 99 % flipped: {', '.join(poor)}; raise --max-steps, or lower --step-size with --step plain")


if __name__ == "__main__":
    common.cli(main)
