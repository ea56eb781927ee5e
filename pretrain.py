"""Stage 1 of 4: train the segmenter f on the known classes, with cross-entropy L_k alone (Sec. IV-A).

    in     a dataset folder (--data, --root); the toy data is written to data/toy on first use
    out    pretrained.pt    checkpoint that the later stages read (keys: load_checkpoint in common.py)
           pretrained.jsonl every logged value; pretrained.png loss and validation mIoU

    python pretrain.py                                                            # toy data: minutes on two CPU cores
    python pretrain.py --data streethazards --root /data/streethazards            # the paper's recipe, one GPU
    torchrun --nproc-per-node 8 pretrain.py --data streethazards --root /data/streethazards --cache /scratch
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 pretrain.py ...    # on each of 2 machines

A run that was stopped or killed continues when the same command is given again.
"""
import argparse
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common


def parse():
    p = argparse.ArgumentParser(description="Train the segmenter on the known classes (Sec. IV-A).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    g = p.add_argument_group("data")
    g.add_argument("--data", choices=tuple(common.DATASETS), default="toy", help="dataset (paper: streethazards, bdd; default: toy)")
    g.add_argument("--root", help="folder of the dataset (default: data/<name>)")
    g.add_argument("--anomaly", nargs="+", metavar="CLASS", help="camvid, bdd: the classes that are the anomalies "
                   "(default: bicyclist; train and motorcycle, Sec. IV-A)")
    g.add_argument("--cache", metavar="DIR", help="keep a decoded, memory-mapped copy of the training images here (default: decode each time)")
    g.add_argument("--crop", type=common.whole(16), nargs=2, metavar=("H", "W"), help="pixels of a training crop (ours: 512 512)")
    g.add_argument("--scale", type=common.real(0.01), nargs=2, metavar=("LOW", "HIGH"), help="range of the random scale, factors (ours: 0.5 2)")
    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=common.ARCHS, help="segmentation head (paper: deeplabv3 and pspnet, Sec. IV-A)")
    g.add_argument("--backbone", choices=tuple(common.BACKBONES), help="feature extractor (ours: resnet50; toy, camvid: mobilenet_v3_large)")
    g.add_argument("--width", type=common.whole(), help="channels of the fpn head (ours: 256; toy, camvid: 64)")
    g.add_argument("--weights", help="imagenet, none, or a state-dict file for the backbone (ours: imagenet; toy, camvid: none)")
    training_flags(p, "passes over the training images (paper: 1000; toy: 8, camvid: 40)")
    p.add_argument("--val-every", type=common.whole(), help="epochs between validations (default: a fiftieth of --epochs)")
    p.add_argument("--out", default="pretrained.pt", help="checkpoint to write (default: pretrained.pt)")
    args = p.parse_args()
    if args.scale and args.scale[0] > args.scale[1]:
        p.error(f"argument --scale: LOW {args.scale[0]} is above HIGH {args.scale[1]}")
    return args


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362}   # dense bf16, from the vendor's data sheets


def forward_tflop(f, H, W):
    """10¹² floating-point operations (2 a multiply-add) of one image of H×W through f; a training step has 3 times that."""
    shadow = copy.deepcopy(f).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, 3, H, W, device="meta"))
    return counter.get_total_flops() / 1e12


def share_of_peak(tflops, device):
    """" (x % of the peak)" where the GPU's peak is known, else ""."""
    peak = device.type == "cuda" and next((v for k, v in PEAK_TFLOPS.items() if k in torch.cuda.get_device_name(device)), None)
    return f" ({100 * tflops / peak:.1f} % of {peak}, dense bf16)" if peak else ""


# ─────────────────────────────────────────────── training ───────────────────────────────────────────────
# One loop for pretrain.py (Eq. 5 with an empty D_s) and finetune.py.

def training_flags(parser, epochs_help):
    """The flags that pretrain.py and finetune.py share."""
    g = parser.add_argument_group("training (Sec. IV-A)")
    g.add_argument("--epochs", type=common.whole(), help=epochs_help)
    g.add_argument("--batch-size", type=common.whole(2), help="images a step, over all devices (paper: 256; toy, camvid: 8)")
    g.add_argument("--lr", type=common.real(0, above=True), help="learning rate of Adam (paper: 1e-4; in pretraining, toy: 2e-3, camvid: 1e-3)")
    g.add_argument("--schedule", choices=("constant", "poly"), help="learning rate over the steps; poly is lr·(1 − t/T)^0.9, "
                   "DeepLab's (ours: constant; toy, camvid: poly in pretraining)")
    g.add_argument("--seed", type=common.whole(0), default=0, help="seed of every random number (ours: 0)")
    g.add_argument("--bn", choices=("train", "frozen"),
                   help="batch norm: statistics of the micro-batch, or the running ones, not updated (ours: train; camvid: frozen in fine-tuning)")
    g = parser.add_argument_group("hardware (none changes what is computed, up to rounding, batch-norm statistics and dropout masks)")
    g.add_argument("--micro-batch", type=common.whole(2), help="images a forward pass and device (default: 32 on CUDA, "
                   "halved where they do not fit its memory, and 16 on a CPU)")
    g.add_argument("--precision", choices=("float32", "bf16"), help="autocast of the forward pass (default: bf16 on CUDA, else float32)")
    g.add_argument("--sync-bn", action="store_true", help="batch-norm statistics over all GPUs (torchrun; give --micro-batch)")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--workers", type=common.whole(0), help="loader processes a rank, each of which keeps one batch in shared memory (default: 8 on CUDA, else 0)")
    g.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    g = parser.add_argument_group("files")
    g.add_argument("--save-every", type=common.real(0), default=5.0, help="minutes between checkpoints inside an epoch (default: 5)")
    g.add_argument("--restart", action="store_true", help="start over, where --out holds an earlier run")


def epoch_batches(n, batch_size, seed, epoch, step, epochs):
    """Yields, for every step from (epoch, step) on, this rank's share [(epoch, i), …] of the global batch.

    Without padding and without duplicates. ASSUMPTION: each epoch is a new permutation, and the images left over
    by whole batches wait for another epoch. A data set smaller than a batch is one batch."""
    batch_size = min(batch_size, n)
    while epoch < epochs:
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for s in range(step, n // batch_size):
            share = np.array_split(order[s * batch_size:(s + 1) * batch_size], common.world())[common.rank()]
            yield [(epoch, int(i)) for i in share]
        epoch, step = epoch + 1, 0


def ignore_signals(_):
    """For loader workers: the main process saves and leaves, they only feed it."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def collate(items):
    """A batch dict of tensors; InputError where the images differ in size."""
    sizes = {tuple(item["label"].shape) for item in items}
    if len(sizes) > 1:
        raise common.InputError(f"images of different sizes in one batch ({' and '.join(f'{w}×{h}' for h, w in sorted(sizes)[:2])}); "
                         "expected one size: resize the data")
    return torch.utils.data.default_collate(items)


def adopt(checkpoint, settings, path):
    """The (epoch, step) to continue from; InputError names the setting in which the earlier run differs."""
    for name, value in settings.items():
        before = checkpoint["settings"].get(name)
        if isinstance(before, list):
            before = tuple(before)
        if isinstance(value, list):
            value = tuple(value)
        if before != value and not (name == "epochs" and value > before and settings["schedule"] == "constant"):
            raise common.InputError(f"{path}: made with {name.replace('_', '-')} {before}, this run has {value}; "
                             "pass --restart to start over, or another --out")
    return checkpoint["epoch"], checkpoint["step"]


def train(f, data, args, device, settings, facts, validate=None, val_every=1):
    """Minimise Eq. 5 over `data` with Adam; writes args.out (and .jsonl, .png beside it) and returns nothing.

    f: Segmenter on `device`. data: a map-style set of dict(image, label[, unknown], index) with name(i).
    settings: every plain value that decides the result; a checkpoint of other settings is refused.
    facts: what later stages need, stored in the checkpoint. validate(f) → dict, every `val_every` epochs.

    The gradient is that of the whole global batch: each part divides its loss sums by the pixel counts of the
    batch (Eq. 5 is an expectation over pixels), and parts and ranks are summed by one all-reduce. Every random
    number is a function of (seed, epoch, step), so model, optimiser and position are the whole state, and a run
    that was killed continues to the same result (bit-identical on a CPU).
    Raises InputError for a non-finite loss, after which the last good checkpoint stands.
    """
    n_steps = max(len(data) // args.batch_size, 1)
    if min(args.batch_size, len(data)) < 2 * common.world():
        raise common.InputError(f"a batch of {min(args.batch_size, len(data))} images is too small for {common.world()} processes: "
                         "batch norm on the pooled branch needs 2 images each")
    cuda = device.type == "cuda"
    optimiser = torch.optim.Adam(f.parameters(), lr=args.lr, fused=True)   # ASSUMPTION: a new one in fine-tuning
    out, epoch, step = Path(args.out), 0, 0
    log_path = out.with_suffix(".jsonl")
    if len(set(common.gather(common.fingerprint(out) if out.exists() else None))) > 1:
        raise common.InputError(f"{out}: not the same file on every machine; expected --out in a folder that all of them share")
    if out.exists() and not args.restart:
        checkpoint = common.load_checkpoint(out)[1]
        epoch, step = adopt(checkpoint, settings, out)
        if epoch >= args.epochs:
            common.say(f"{out} is complete ({epoch} epochs); --restart starts over")
            return
        f.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        common.say(f"continuing {out} from epoch {epoch}, step {step}")
    first = epoch * n_steps + step
    if common.rank() == 0:   # what was logged after the checkpoint is computed again
        for leftover in out.parent.glob(f".{out.name}.tmp*"):   # of a run that was killed
            leftover.unlink()
        old = log_path.read_text().splitlines() if first and log_path.exists() else []
        old = [json.loads(line) for line in old if line.endswith("}")]   # the last one may be half-written
        kept = [v for v in old if v["step"] < first or (v["step"] == first and ("loss" in v or step == 0))]
        common.write_bytes(log_path, "".join(json.dumps(v) + "\n" for v in kept).encode())
    if args.sync_bn and common.world() > 1 and cuda:
        if not args.micro_batch:
            raise common.InputError("--sync-bn needs --micro-batch: every rank has to make the same forward passes")
        if min(args.batch_size, len(data)) % common.world():
            raise common.InputError(f"--sync-bn: expected a batch that {common.world()} processes share evenly, found {min(args.batch_size, len(data))}")
        f = nn.SyncBatchNorm.convert_sync_batchnorm(f)
    net = torch.compile(f) if args.compile else f
    parameters = [p for p in f.parameters() if p.requires_grad]
    # ASSUMPTION: bf16 on CUDA, where the paper names no precision
    dtype = torch.bfloat16 if (args.precision or ("bf16" if cuda else "float32")) == "bf16" else torch.float32
    micro = args.micro_batch or (32 if cuda else 16)
    workers = (8 if cuda else 0) if args.workers is None else args.workers
    loader = iter(torch.utils.data.DataLoader(
        data, batch_sampler=epoch_batches(len(data), args.batch_size, args.seed, epoch, step, args.epochs),
        num_workers=workers, pin_memory=cuda, prefetch_factor=1 if workers else None, collate_fn=collate,
        worker_init_fn=ignore_signals))

    stop = []     # the signal that asks to save and leave
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, _: stop.append(number))

    def save(epoch, step):
        if not all(torch.isfinite(p).all() for p in parameters):   # a finite loss can have a step that is not
            raise common.InputError(f"the weights are not finite after epoch {epoch}, step {step} (lower --lr?); "
                             + (f"{out} holds the last good state" if out.exists() else "nothing was saved yet"))
        if common.rank() == 0:
            common.save_checkpoint(out, dict(facts, model=f.state_dict(), optimiser=optimiser.state_dict(),
                                      settings=settings, epoch=epoch, step=step))

    def log(**values):
        if common.rank() == 0:
            with open(log_path, "a") as file:
                file.write(json.dumps(values) + "\n")

    pending = []   # (epoch, step, loss on the device, indices): read every `interval` steps, so that the host never waits

    def settle():
        """Bring the pending losses to the host; the last one, finite, or InputError."""
        for e, s, value, indices in pending:
            value = float(value)
            if not math.isfinite(value):
                raise common.InputError(f"loss {value} at epoch {e}, step {s}; images {', '.join(data.name(i) for i in indices)}; "
                                 + (f"{out} holds the last good state" if out.exists() else "nothing was saved yet"))
        pending.clear()
        return value

    interval = 20 if cuda else 1
    started, saved, told = time.time(), time.time(), False
    bar = common.progress(None, "training", total=args.epochs * n_steps, initial=first, unit="step")
    while epoch < args.epochs:
        if step == n_steps:   # the state was saved as (epoch, n_steps): validation may take long
            epoch, step = epoch + 1, 0
            text = f"epoch {epoch}/{args.epochs}"
            if validate and (epoch % val_every == 0 or epoch == args.epochs):
                figures = validate(f)
                log(step=epoch * n_steps, epoch=epoch, **figures)
                text += "".join(f", validation {k} {v:.2f}" for k, v in figures.items())
            if epoch % max(1, args.epochs // 50) == 0 or epoch == args.epochs:
                common.say(f"{text}, {time.time() - started:.0f} s")
            continue
        f.train()
        if args.bn == "frozen":
            for m in f.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        batch = next(loader)
        image, label = batch["image"], batch["label"]
        unknown = batch["unknown"] if "unknown" in batch else torch.zeros_like(label, dtype=torch.bool)
        # Pixels of the global batch, and whether a rank was asked to stop: on the host, before the forward pass
        n_k, n_s, stopped = common.all_sum(torch.tensor([int(((label < f.num_classes) & ~unknown).sum()), int(unknown.sum()),
                                                  len(stop)])).tolist()
        while True:
            logits = part_loss = None   # after a failed try: let its graph go
            torch.manual_seed((args.seed * 1_000_003 + epoch * n_steps + step) * 1009 + common.rank())   # dropout
            optimiser.zero_grad()
            loss = torch.zeros((), device=device)
            try:
                # at least 2 images in every part: batch norm after a 1×1 pooling cannot do with one
                parts = min(-(-len(label) // micro), len(label) // 2)
                for X, Z, D_s in zip(*(t.tensor_split(parts) for t in (image, label, unknown))):
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        logits = net(common.to_input(X, device))
                    part_loss = common.objective(logits, Z.to(device), D_s.to(device), args.alpha, args.loss, n_k, n_s)
                    part_loss.backward()
                    loss += part_loss.detach()
                break
            except torch.cuda.OutOfMemoryError:
                micro = min(micro, len(label)) // 2
                if args.micro_batch or micro < 2:
                    raise common.InputError(f"out of GPU memory with {2 * micro} images a forward pass: lower --micro-batch "
                                     "(2 at least) or the image size")
                torch.cuda.empty_cache()
                print(f"rank {common.rank()}: out of GPU memory, going on with --micro-batch {micro}", flush=True)
        if common.world() > 1:
            # ASSUMPTION: the running averages of batch norm are the mean over the ranks
            averages = [b for name, b in f.named_buffers() if "running_" in name and args.bn == "train"]
            tensors = [loss, *(p.grad for p in parameters), *averages]
            flat = common.all_sum(torch.cat([t.reshape(-1) for t in tensors]))
            for t, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(summed.view_as(t))
            for b in averages:
                b.div_(common.world())
        for group in optimiser.param_groups:
            group["lr"] = args.lr * ((1 - (epoch * n_steps + step) / (args.epochs * n_steps))**0.9 if args.schedule == "poly" else 1)
        optimiser.step()
        pending.append((epoch, step, loss, batch["index"].tolist()))
        step += 1
        bar.update()
        due = step == n_steps or stopped or time.time() - saved > 60 * args.save_every
        if len(pending) >= interval or due:
            value, elapsed, now = settle(), time.time() - started, epoch * n_steps + step
            rate = (now - first) * min(args.batch_size, len(data)) / elapsed
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0
            log(step=now, epoch=epoch, loss=value, images_per_second=round(rate, 2), seconds=round(elapsed, 2))
            bar.set_postfix_str(f"loss {value:.4f}, {rate:.1f} img/s" + f", {memory:.1f} GiB" * cuda)
            if not told and now - first >= min(5 * interval, n_steps):
                told = True
                tflops = 3 * forward_tflop(f, *label.shape[1:]) * rate / common.world()
                common.say(f"{rate:.1f} images/s, {tflops:.2f} TFLOP/s a device{share_of_peak(tflops, device)}: about {(args.epochs * n_steps - now) * elapsed / (now - first) / 3600:.2f} h "
                    f"for the {args.epochs * n_steps - now} steps of batch {min(args.batch_size, len(data))} that are left")
        if due:
            save(epoch, step)
            saved = time.time()
        if stopped:
            bar.close()
            common.say(f"stopped by a signal: {out} holds epoch {epoch}, step {step}; the same command continues")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    save(epoch, step)
    bar.close()
    if common.rank() == 0:
        training_curves(log_path, out.with_suffix(".png"))
    common.say(f"wrote {out} ({time.time() - started:.0f} s)")


def training_curves(log_path, png):
    """Figure of the loss and, where it was measured, the validation mIoU against the epoch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    loss, miou = [v for v in lines if "loss" in v], [v for v in lines if "miou" in v]
    fig, ax = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    window = max(1, len(loss) // 100)
    smooth = np.convolve([v["loss"] for v in loss], np.ones(window) / window, "valid")
    ax.plot([v["step"] for v in loss][window - 1:], smooth, color="tab:blue", lw=1)
    ax.set(xlabel="step", ylabel="loss (Eq. 5)", ylim=(0, None))
    if miou:
        right = ax.twinx()
        right.plot([v["step"] for v in miou], [v["miou"] for v in miou], "o-", color="tab:orange", ms=3, lw=1)
        right.set(ylabel="validation mIoU (%)", ylim=(0, 100))
    with common.replacing(png) as temporary:
        fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)


@torch.inference_mode()
def validation(f, scenes, device):
    """dict(miou) of f on a split at full size, shared by the ranks, one image at a time (sizes may differ)."""
    f.eval()
    matrix = torch.zeros(f.num_classes, f.num_classes, dtype=torch.int64)
    for i in common.progress(range(common.rank(), len(scenes), common.world()), "validating", leave=False):
        item = scenes[i]
        prediction = f(common.to_input(item["image"][None], device)).argmax(1)[0].cpu()
        matrix += common.confusion(prediction, item["label"], f.num_classes)
    return dict(miou=common.segmentation_metrics(common.all_sum(matrix), scenes.classes)["miou"])


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    common.say(common.resolve(args, "pretrain", args.data))
    args.alpha, args.loss = 0, "er"   # Eq. 5 with an empty D_s
    with common.first_rank_first():
        args.root = common.default_root(args.data, args.root)
        scenes = common.Scenes(args.data, args.root, "train", args.anomaly, args.crop, args.scale, args.seed, cache=args.cache)
        val = common.Scenes(args.data, args.root, "val", args.anomaly)
    torch.manual_seed(args.seed)
    f = common.Segmenter(args.arch, args.backbone, len(scenes.classes), args.width)
    common.load_backbone(f, args.weights)
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))
    common.say(f"{args.data} at {args.root}: {len(scenes)} training and {len(val)} validation images, N = {len(scenes.classes)}")

    names = ("data", "anomaly", "arch", "backbone", "width", "weights", "epochs", "batch_size", "lr", "crop", "scale", "schedule", "bn", "seed")
    settings = dict({n: getattr(args, n) for n in names}, dataset=scenes.identity())
    facts = dict(stage="pretrain", arch=args.arch, backbone=args.backbone, width=args.width, classes=list(scenes.classes), data=args.data,
                 root=args.root, anomaly=args.anomaly)
    train(f, scenes, args, device, settings, facts,
                 validate=lambda f: validation(f, val, device), val_every=args.val_every or max(1, args.epochs // 50))


if __name__ == "__main__":
    common.cli(main)
