"""Stage 1 of 4: train the segmenter f on the known classes, with cross-entropy L_k alone (Sec. IV-A).

    in     a dataset folder (--data, --root); the toy data is written to data/toy on first use
    out    pretrained.pt    checkpoint that the later stages read (keys: load_checkpoint in common.py)
           pretrained.jsonl every logged value; pretrained.png loss and validation mIoU

    python pretrain.py                                                            # toy data: minutes on two CPU cores
    python pretrain.py --data streethazards --root /data/streethazards            # the paper's recipe, one GPU
    torchrun --nproc-per-node 8 pretrain.py --data streethazards --root /data/streethazards --cache /scratch
    python pretrain.py --classifier cosine --out cosine.pt                        # PAnS; evaluate.py --score cosine
    python pretrain.py --tradi 0.02 0.02 --out tradi.pt                           # TRADI; evaluate.py --tradi 10
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 pretrain.py ...    # on each of 2 machines

The training loop is here too: `train` minimises Eq. 5, for this stage with an empty D_s, for finetune.py with the
auxiliary set's. A run that was stopped or killed continues when the same command is given again.

Sections: the training loop · training images (augmentation, --cache) · related systems (TRADI, masks) · stage 1
"""
import argparse
import contextlib
import copy
import functools
import glob
import json
import math
import os
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))   # python -P leaves it out

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common


def parse():
    p = argparse.ArgumentParser(usage="%(prog)s [flags]; --help lists them",
                                description="Train the segmenter on the known classes (Sec. IV-A).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open; small sets: "
                                       "toy, camvid, idd_lite.")
    g = p.add_argument_group("data")
    g.add_argument("--data", choices=tuple(common.DATASETS), default="toy",
                   help="dataset (paper: streethazards, bdd; folder: your own, with a dataset.json; default: toy)")
    g.add_argument("--root", help="folder of the dataset (default: data/<name>)")
    g.add_argument("--anomaly", nargs="+", metavar="CLASS", help="camvid, bdd, idd_lite: the classes that are the "
                   "anomalies, or none (default: bicyclist; train and motorcycle, Sec. IV-A; none)")
    g.add_argument("--cache", metavar="DIR", help="keep a decoded, memory-mapped copy of the training images here "
                   "(default: decode each time)")
    g.add_argument("--crop", type=common.whole(16), nargs=2, metavar=("H", "W"),
                   help="pixels of a training crop (ours: 512 512)")
    g.add_argument("--scale", type=common.real(0.01), nargs=2, metavar=("LOW", "HIGH"),
                   help="range of the random scale, factors (ours: 0.5 2)")
    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=common.ARCHS,
                   help="segmentation head (paper: deeplabv3 and pspnet, Sec. IV-A; small sets: fpn); mask2former: "
                   "Mask2Former's decoder on fpn's pyramid, for Mask2Anomaly and Maskomaly")
    g.add_argument("--backbone", choices=tuple(common.BACKBONES),
                   help="feature extractor (ours: resnet50; toy, camvid: mobilenet_v3_large; idd_lite: mobilenet_v2)")
    g.add_argument("--classifier", choices=common.CLASSIFIERS, default="linear",
                   help="last layer; cosine: PAnS, whose logits are 10 times the cosine to a prototype of each class "
                   "(default: linear)")
    g.add_argument("--width", type=common.whole(), help="channels of the fpn and mask2former heads (ours: 256; small "
                   "sets: 64)")
    g.add_argument("--attention", choices=common.ATTENTIONS, help="mask2former: where a query looks: at its own mask, "
                   "or by a second attention at the rest too, as in Mask2Anomaly (ours: masked)")
    g.add_argument("--queries", type=common.whole(), help="mask2former: number of them (ours: 100; small sets: 32)")
    g.add_argument("--decoder-layers", type=common.whole(), help="mask2former (ours: 9; small sets: 3)")
    g.add_argument("--weights", help="imagenet, none, or a state-dict file for the backbone (ours: imagenet; "
                   "toy, camvid: none)")
    training_flags(p, "passes over the training images (paper: 1000; toy: 8, camvid: 40, idd_lite: 16)", micro_batch=32)
    p.add_argument("--tradi", nargs="*", type=common.real(0, above=True), metavar="GAIN",
                   help="track mean and variance of the weights, for evaluate.py --tradi, over about the last 1/GAIN "
                   "steps each (published: 0.00316 0.00223, the default, for runs of many thousand steps)")
    p.add_argument("--val-every", type=common.whole(),
                   help="epochs between validations (default: a fiftieth of --epochs)")
    p.add_argument("--out", default="pretrained.pt", help="checkpoint to write (default: pretrained.pt)")
    args = p.parse_args()
    if args.scale and args.scale[0] > args.scale[1]:
        p.error(f"argument --scale: LOW {args.scale[0]} is above HIGH {args.scale[1]}")
    if args.tradi is not None:
        args.tradi = args.tradi or list(TRADI_GAIN)
        if len(args.tradi) != 2 or max(args.tradi) >= 1:
            p.error("argument --tradi: expected no GAIN, or two below 1")
    return args


def training_flags(parser, epochs_help, micro_batch=32):
    """The flags that pretrain.py and finetune.py share; `micro_batch` is the default on CUDA."""
    parser.set_defaults(cuda_micro_batch=micro_batch)
    g = parser.add_argument_group("training (Sec. IV-A)")
    g.add_argument("--epochs", type=common.whole(), help=epochs_help)
    g.add_argument("--batch-size", type=common.whole(2),
                   help="images a step, over all devices (paper: 256; small sets: 8)")
    g.add_argument("--lr", type=common.real(0, above=True),
                   help="learning rate of Adam (paper: 1e-4; in pretraining, toy: 2e-3, camvid: 1e-3, idd_lite: 5e-4)")
    g.add_argument("--schedule", choices=("constant", "poly"), help="learning rate over the steps; poly is "
                   "lr·(1 − t/T)^0.9, DeepLab's (ours: constant; small sets: poly in pretraining)")
    g.add_argument("--seed", type=common.whole(0), default=0, help="seed of every random number (ours: 0)")
    g.add_argument("--bn", choices=("train", "frozen"), help="batch norm: statistics of the micro-batch, or the "
                   "running ones, not updated (ours: train)")
    g = parser.add_argument_group("hardware (none changes what is computed, up to rounding, statistics of batch and "
                                  "spectral norm, and dropout masks)")
    g.add_argument("--micro-batch", type=common.whole(2), help=f"images a forward pass and device; with 2, 3 of an odd "
                   f"number (default: {micro_batch} on CUDA, halved where they do not fit its memory, and 16 on a CPU)")
    g.add_argument("--precision", choices=("float32", "bf16"),
                   help="autocast of the forward pass (default: bf16 on CUDA, else float32; on CUDA "
                   "float32 multiplies in TF32, unless NVIDIA_TF32_OVERRIDE=0 is set)")
    g.add_argument("--sync-bn", action="store_true",
                   help="batch-norm statistics over all GPUs (torchrun; give --micro-batch)")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--workers", type=common.whole(0), help="loader processes a rank, each of which keeps one batch "
                   "in shared memory (default: 8 on CUDA, else 0)")
    g.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is a GPU)")
    g = parser.add_argument_group("files")
    g.add_argument("--save-every", type=common.real(0), default=5.0,
                   help="minutes between checkpoints; one is written before a validation too (default: 5)")
    g.add_argument("--restart", action="store_true", help="start over, where --out holds an earlier run")


# ──────────────────────────────────────────── the training loop ────────────────────────────────────────────

def train(f, data, args, device, settings, facts, validate=None, val_every=1, count=None, objective=None,
          groups=None):
    """Minimise Eq. 5 over `data` with Adam; writes args.out (and .jsonl, .png beside it) and returns nothing.

    f         Segmenter on `device`
    data      a map-style set of dict(image uint8 (3, H, W), label uint8 (H, W)[, unknown bool (H, W)], index), with
              name(i); its items are functions of (epoch, i)
    settings  every plain value that decides the result; a checkpoint of other settings is refused
    facts     what later stages need, stored in the checkpoint
    validate  f → mIoU or None, every `val_every` epochs and at the end
    count     (batch, run) → whole numbers of this rank's share, the pixels of D_k first; the sums over the ranks are
              `counts`. It may edit the batch: it sees it on the host, before any part goes through f (default: |D_k|,
              |D_s|)
    objective (net, part, counts) → scalar, for a part of the batch on the device; X → net(X) is f.outputs under
              autocast. The sum over all parts and ranks is what is minimised (default: Eq. 5 by args.alpha, args.loss)
    groups    the optimiser's parameter groups; "factor" multiplies the learning rate (default: all of f in one)

    The gradient is that of the whole global batch: each part divides its loss sums by the pixel counts of the
    batch (Eq. 5 is an expectation over pixels), and parts and ranks are summed by one all-reduce. Every random
    number is a function of (seed, epoch, step), so model, optimiser and position are the whole state, and a run
    that was killed continues to the same result (bit-identical on a CPU).
    Raises InputError for a non-finite loss or step, after which the last good checkpoint stands.
    """
    run = Run(f, data, args, device, groups)
    run.whole = objective is None and f.arch in common.ARCHS and all(p.requires_grad for p in f.parameters())
    count, objective = count or count_pixels, objective or functools.partial(eq5, args)
    # All three files of the run: --out x and --out x.pt share a log, --out x draws what --out x.png writes
    with common.locked(run.out), common.locked(run.log_path), common.locked(beside(run.out, ".png")), \
            contextlib.closing(batches(data, args, run)) as loader:
        if not resume(run, settings, facts):
            return
        net = prepare(f, args, run, device)
        run.stop = catch_signals()
        if run.restart:                              # from here on the same command without --restart continues
            save(run, settings, facts)
        if run.validation_due:                       # the run was stopped between the last step of an epoch and this
            end_epoch(run, validate)
        bar = common.progress(None, "training", total=run.total, initial=run.t, unit="step")

        while run.t < run.total:
            f.train()
            if args.bn == "frozen":
                freeze_batch_norm(f)
            batch = next(loader)
            # Eq. 5 is a mean over |D_k| and |D_s| of the global batch: known before any part of it goes through f
            counts, stopped = count_over_ranks(count, batch, run)
            loss = gradient(net, batch, objective, counts, args, run, device)    # of Eq. 5, of this rank's share
            sum_over_ranks(loss, f, args)
            lr = args.lr * (1 - run.t / run.total)**0.9 if args.schedule == "poly" else args.lr
            for group in run.optimiser.param_groups:
                group["lr"] = lr * group.get("factor", 1)
            run.optimiser.step()
            if run.tradi:                                # a related system, --tradi
                run.tradi.step(lr)
            run.pending.append((run.t, loss, batch["index"].tolist()))
            run.t += 1
            bar.update()

            # A checkpoint is written before a validation, which may take long, and when --save-every has passed
            run.validation_due = bool(validate) and run.t % run.n_steps == 0 and \
                (run.t // run.n_steps % val_every == 0 or run.t == run.total)
            due = run.validation_due or stopped or time.time() - run.saved > 60 * args.save_every
            if due or len(run.pending) >= run.interval or run.t == run.total:
                report(run, batch, bar)
            if due:
                save(run, settings, facts)
            if stopped and (run.t < run.total or run.validation_due):
                bar.close()
                common.say(f"stopped by a signal: {run.out} holds {run.position()}; the same command continues")
                sys.exit(128 + (run.stop or [signal.SIGTERM])[0])
            if run.t % run.n_steps == 0:
                end_epoch(run, validate)

        save(run, settings, facts)
        bar.close()
        if common.rank() == 0:
            training_curves(run.log_path, beside(run.out, ".png"))
        common.say(f"wrote {run.out} ({time.time() - run.started:.0f} s)")


class Run:
    """Where a run stands: its files and sizes, and the position t, in steps over all epochs (Sec. IV-A counts epochs).

    n_steps   steps of an epoch: whole batches of the global batch size
    t, total  steps done, and of the whole run; `first` were done by the run that this one continues
    micro     images a forward pass: a batch is accumulated in parts of so many
    pending   (t, loss on the device, indices) of the steps whose loss nobody has looked at yet
    """

    def __init__(self, f, data, args, device, groups=None):
        self.f, self.data, self.epochs = f, data, args.epochs
        self.batch_size = min(args.batch_size, len(data))
        if self.batch_size < 2 * common.world():
            n = common.world()
            remedy = f"give --batch-size {2 * n} or more" if args.batch_size < 2 * n else "add images"
            if n > 1:
                remedy += ", or start fewer processes"
            raise common.InputError(f"a batch of {self.batch_size} images is too small for {n} "
                                    f"process{'es' * (n > 1)}: batch norm on the pooled branch needs 2 images each; "
                                    f"{remedy}")
        if self.batch_size < args.batch_size:
            common.say(f"a batch holds all {self.batch_size} images, fewer than --batch-size {args.batch_size}")
        self.n_steps = len(data) // self.batch_size                        # steps of an epoch
        self.t, self.total, self.first = 0, args.epochs * self.n_steps, 0  # steps done, of all, of earlier runs
        self.out = Path(args.out)
        if not self.out.name or self.out.is_dir():
            raise common.InputError(f"--out {args.out!r}: expected the name of a file, such as pretrained.pt")
        self.log_path = beside(self.out, ".jsonl")
        self.restart, self.device, self.cuda = args.restart, device, device.type == "cuda"
        # ASSUMPTION: a new optimiser in fine-tuning
        self.optimiser = torch.optim.Adam(groups or f.parameters(), lr=args.lr, fused=True)
        self.tradi = Tradi(f, args.tradi) if getattr(args, "tradi", None) else None
        # ASSUMPTION: batch norm sees a micro-batch, not the 256; --bn frozen and --sync-bn are others
        self.micro = args.micro_batch or (args.cuda_micro_batch if self.cuda else 16)
        self.interval = 20 if self.cuda else 1       # steps between looks at the loss, so that the host never waits
        self.pending, self.labelled, self.told, self.validation_due = [], 0, False, False
        self.started = self.saved = time.time()

    def position(self):
        return "epoch {}, step {}".format(*divmod(self.t, self.n_steps))


def beside(out, suffix):
    """ft.pt → ft.jsonl; any other name keeps all of itself: ft_alpha0.05 → ft_alpha0.05.jsonl."""
    return out.with_name(out.name.removesuffix(".pt") + suffix)


def resume(run, settings, facts):
    """Take model, optimiser and position from an earlier run of the same settings. False where it is complete."""
    out = run.out
    twin = beside(out, "" if out.name.endswith(".pt") else ".pt")
    if twin.is_file():
        raise common.InputError(f"{out}: {twin} is there, and both would log to {run.log_path}; expected another --out")
    for path in (run.log_path, beside(out, ".png"), *[out] * run.restart):
        # a checkpoint, --out x.png? a photograph, an archive, a folder?
        if path.exists() and not (path.is_file() and may_be_ours(run, path)):
            raise common.InputError(f"{path}: this run to {out} would replace it, and no earlier one wrote it; "
                                    "expected another --out")
    common.same_everywhere(out, common.fingerprint(out) if out.exists() else None, "--out in a folder that all share")
    if out.exists():
        checkpoint = {}
        try:
            checkpoint = common.load_checkpoint(out, companion="any")[1]
        except common.InputError as e:
            if not run.restart:                                          # which replaces a damaged one
                raise common.InputError(f"{e}; pass --restart to replace it, or another --out")
        if checkpoint.get("stage", facts["stage"]) != facts["stage"]:
            raise common.InputError(f"{out}: a checkpoint of stage {checkpoint['stage']}, and this is "
                                    f"{facts['stage']}; expected another --out")
    if out.exists() and not run.restart:
        epoch, step = adopt(checkpoint, settings, out)
        if not (epoch >= 0 and 0 <= step <= run.n_steps):
            raise common.InputError(f"{out}: stands at epoch {epoch}, step {step}; expected up to {run.n_steps} steps")
        if epoch >= run.epochs:
            common.say(f"{out} is complete ({epoch} epochs); --restart starts over")
            return False
        run.f.load_state_dict(checkpoint["model"])
        try:
            run.optimiser.load_state_dict(checkpoint["optimiser"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise common.InputError(f"{out}: holds no state of the optimiser to continue from; "
                                    "pass --restart to start over, or another --out")
        if run.tradi:
            run.tradi.load(checkpoint["tradi"])
        run.t = run.first = epoch * run.n_steps + step
        run.validation_due = step == run.n_steps
        common.say(f"continuing {out} from epoch {epoch}, step {step}")
        if checkpoint.get("micro_batch", run.micro) != run.micro:
            common.say(f"note: --micro-batch was {checkpoint['micro_batch']} and is {run.micro}: "
                       "batch norm sees other parts of a batch")
    if common.rank() == 0:
        trim_log(run)
    return True


def may_be_ours(run, path):
    """Whether a file of the name of a run's log, figure or checkpoint looks like one."""
    with open(path, "rb") as file:
        start = file.read(256)
    if path == run.log_path:
        return start[:1] in (b"", b"{")
    if path != run.out:
        return not start or b"Matplotlib" in start
    return b"PK".startswith(start[:2]) and (not zipfile.is_zipfile(path) or any(   # a damaged one has no list
        name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()))


def trim_log(run):
    """Drop what was logged after the checkpoint: it is computed again."""
    target = Path(os.path.realpath(run.out))
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.tmp*"):   # of a run that was killed
        leftover.unlink()
    try:
        lines = run.log_path.read_text().splitlines() if run.first and run.log_path.exists() else []
        values = [json.loads(line) for line in lines if line.endswith("}")]   # the last one may be half-written
        kept = [v for v in values if v["step"] < run.first
                or (v["step"] == run.first and ("loss" in v or not run.validation_due))]
    except (ValueError, KeyError, TypeError):
        raise common.InputError(f"{run.log_path}: not the log of {run.out}; expected lines of JSON with a step each: "
                                "delete it to go on without")
    common.write_bytes(run.log_path, "".join(json.dumps(v) + "\n" for v in kept).encode())


def adopt(checkpoint, settings, path):
    """The (epoch, step) to continue from; InputError names the setting in which the earlier run differs."""
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    for name, value in settings.items():
        absent = "linear" if name == "classifier" else None    # before it was a setting
        before, value = plain(checkpoint["settings"].get(name, absent)), plain(value)
        longer = name == "epochs" and isinstance(before, int) and value > before and settings["schedule"] == "constant"
        if before != value and not longer:
            raise common.InputError(f"{path}: made with {name.replace('_', '-')} {before}, this run has {value}; "
                                    "pass --restart to start over, or another --out")
    return checkpoint["epoch"], checkpoint["step"]


def prepare(f, args, run, device):
    """X → f.outputs(X), in bf16 where that is asked for; with synchronised batch norm, compiled."""
    if args.sync_bn and common.world() > 1:
        if not run.cuda:
            raise common.InputError(f"--sync-bn: expected GPUs, found {device}")
        if not args.micro_batch:
            raise common.InputError("--sync-bn needs --micro-batch: every rank has to make the same forward passes")
        if run.batch_size % common.world():
            raise common.InputError(f"--sync-bn: expected a batch that {common.world()} processes share evenly, "
                                    f"found {run.batch_size}")
        f = nn.SyncBatchNorm.convert_sync_batchnorm(f)
    # One shape for the whole run: let cuDNN try its algorithms, which takes 15 s, where the run is long
    torch.backends.cudnn.benchmark = run.cuda and run.total - run.t >= 2000
    outputs = torch.compile(f.outputs) if args.compile else f.outputs
    # ASSUMPTION: bf16 on CUDA, where the paper names no precision
    bf16 = (args.precision or ("bf16" if run.cuda else "float32")) == "bf16"

    def net(X):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return outputs(X)
    return net


def batches(data, args, run):
    """Yields this rank's share of every batch from position t on; the loader processes end when it is closed."""
    workers = (8 if run.cuda else 0) if args.workers is None else args.workers
    order = epoch_batches(len(data), args.batch_size, args.seed, *divmod(run.t, run.n_steps), args.epochs)
    loader = iter(torch.utils.data.DataLoader(
        data, batch_sampler=order, num_workers=workers, pin_memory=run.cuda,
        prefetch_factor=1 if workers else None, collate_fn=collate, worker_init_fn=ignore_signals))
    try:
        yield from loader
    finally:
        if workers:   # they ignore signals: Python would ask them to end by one, and wait for ever
            loader._shutdown_workers()


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


def collate(items):
    """A batch dict of tensors; InputError where the images differ in size."""
    sizes = {tuple(item["label"].shape) for item in items}
    if len(sizes) > 1:
        two = " and ".join(f"{w}×{h}" for h, w in sorted(sizes)[:2])
        raise common.InputError(f"images of different sizes in one batch ({two}); expected one size: resize the data")
    return torch.utils.data.default_collate(items)


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def catch_signals():
    """A list that fills with the signals that ask to save and leave; schedulers send SIGUSR1 before they kill."""
    stop = []
    for s in SIGNALS:
        if signal.getsignal(s) != signal.SIG_IGN:      # as nohup leaves SIGHUP: the run is to outlive the terminal
            signal.signal(s, lambda number, _: stop.append(number))
    return stop


def ignore_signals(_):
    """For loader processes: the main process saves and leaves, they only feed it."""
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)


def freeze_batch_norm(f):
    """Batch norm by the running averages of pretraining, which then stay (--bn frozen)."""
    for m in f.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()


def count_pixels(batch, run):
    """[|D_k|, |D_s|] of this rank's share of a batch."""
    label = batch["label"]
    unknown = batch.setdefault("unknown", torch.zeros_like(label, dtype=torch.bool))
    known = (label < run.f.num_classes) & ~unknown
    return [int(known.sum()), int(unknown.sum())]


def count_over_ranks(count, batch, run):
    """(the counts of the global batch, how many ranks were asked to stop): on the host, before the forward pass."""
    *counts, stopped = common.all_sum(torch.tensor([*count(batch, run), len(run.stop)])).tolist()
    run.labelled += counts[0]
    if not run.labelled and run.t + 1 - run.first >= min(10, run.n_steps):
        raise common.InputError(f"{run.data.name(0)} and the images after it: no labelled pixel outside D_s in "
                                f"{run.t + 1 - run.first} steps; expected labels of the {run.f.num_classes} classes")
    return counts, stopped


def eq5(args, net, part, counts):
    """Eq. 5 of a part of the batch: Σ L_k / |D_k| + α · Σ (L_KL or L_ER) / |D_s|, with the counts of the whole."""
    logits = net(common.to_input(part["image"]))["logits"]                       # (b, N, H, W)
    return common.objective(logits, part["label"], part["unknown"], args.alpha, args.loss, *counts)


def gradient(net, batch, objective, counts, args, run, device):
    """Backpropagate the objective over this rank's share, in parts that fit the memory; returns its value.

    batch: image uint8 (n, 3, H, W), label uint8 (n, H, W), unknown bool (n, H, W) = D_s, index (n,), and whatever
    `count` put in. counts: of the global batch. Where a part does not fit a GPU's memory, all parts are made again at
    half the size.
    Raises InputError where two images do not fit, or --micro-batch was given."""
    buffers = [(b, b.clone()) for b in run.f.buffers()] if run.cuda and not args.micro_batch else []
    while True:
        try:
            return accumulate(net, batch, objective, counts, args, run, device)
        except torch.cuda.OutOfMemoryError:
            tried = -(-len(batch["label"]) // n_parts(len(batch["label"]), run.micro))
            run.micro = tried // 2
            if args.micro_batch or run.micro < 2:
                raise common.InputError(f"out of GPU memory with {tried} images a forward pass: lower --micro-batch "
                                        "(2 at least) or the image size")
        torch.cuda.empty_cache()
        with torch.no_grad():
            for b, before in buffers:    # the failed part has moved the running averages of batch norm
                b.copy_(before)
        print(f"rank {common.rank()}: out of GPU memory, going on with --micro-batch {run.micro}", flush=True)


def n_parts(n, micro):
    """How many parts of at most `micro` images n images make, of at least 2 each (with micro = 2 one may have 3): batch
    norm after a 1×1 pooling needs them."""
    return min(-(-n // micro), n // 2)


def accumulate(net, batch, objective, counts, args, run, device):
    """One try of `gradient`: the objective of parts of run.micro images, whose sum is that of the batch."""
    torch.manual_seed(((args.seed * 1_000_003 + run.t) * 1009 + common.rank()) % 2**63)   # dropout
    run.optimiser.zero_grad()
    loss = torch.zeros((), device=device)
    parts = n_parts(len(batch["label"]), run.micro)
    for part in zip(*(values.tensor_split(parts) for values in batch.values())):
        part = {k: v.to(device, non_blocking=True) for k, v in zip(batch, part)}   # before the forward pass: no wait
        part_loss = objective(net, part, counts)
        part_loss.backward()
        loss += part_loss.detach()
    return loss


def sum_over_ranks(loss, f, args):
    """One all-reduce of the loss and every gradient. ASSUMPTION: the running averages of batch norm are the mean."""
    if common.world() == 1:
        return
    averages = [b for name, b in f.named_buffers() if "running_" in name and args.bn == "train"]
    tensors = [loss, *(p.grad for p in f.parameters() if p.grad is not None), *averages]   # the same on every rank
    flat = common.all_sum(torch.cat([t.reshape(-1) for t in tensors]))
    for t, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(summed.view_as(t))
    for b in averages:
        b.div_(common.world())


def report(run, batch, bar):
    """Look at the losses since the last report, log the last one, and tell the rate once.

    On a GPU that is every 20 steps: reading a loss waits for all that was queued before it.
    Raises InputError where a loss is not finite; it names the step and its images."""
    for t, value, indices in run.pending:
        value = float(value)
        if not math.isfinite(value):
            epoch, step = divmod(t, run.n_steps)
            names = ", ".join(run.data.name(i) for i in indices)
            raise common.InputError(f"loss {value} at epoch {epoch}, step {step}; images {names}; {stands(run)}")
    run.pending.clear()
    done, elapsed = run.t - run.first, time.time() - run.started
    rate = done * run.batch_size / elapsed
    memory = torch.cuda.max_memory_allocated(run.device) / 2**30 if run.cuda else 0
    log(run, step=run.t, epoch=(run.t - 1) // run.n_steps, loss=value, images_per_second=round(rate, 2),
        seconds=round(elapsed, 2), **({"gib": round(memory, 2), "micro_batch": run.micro} if run.cuda else {}))
    bar.set_postfix_str(f"loss {value:.4f}, {rate:.1f} img/s" + f", {memory:.1f} GiB" * run.cuda)
    if not run.told and done >= min(5 * run.interval, run.n_steps) and run.t < run.total:
        run.told = True
        speed = f"{rate:.1f} images/s"
        if run.whole:                    # one forward and one backward pass through all of f, and nothing else
            tflops = 3 * forward_tflop(run.f, *batch["label"].shape[1:]) * rate / common.world()
            speed += f", {tflops:.2f} TFLOP/s a device{share_of_peak(tflops, run.device)}"
        left = run.total - run.t
        hours = left * elapsed / done / 3600
        common.say(f"{speed}: about " + (f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min")
                   + f" for the {left} steps of batch {run.batch_size} that are left")


def log(run, **values):
    """Append a line of JSON to the log."""
    if common.rank() == 0:
        with open(run.log_path, "a") as file:
            file.write(json.dumps(values) + "\n")


def stands(run):
    return f"{run.out} holds the last good state" if run.out.exists() else "nothing was saved yet"


def save(run, settings, facts):
    """Write the checkpoint of position t: model, optimiser and (epoch, step) are the whole state.

    Raises InputError where the weights are not finite; the earlier checkpoint stands."""
    finite = torch.stack([torch.isfinite(v).all() for v in run.f.state_dict().values()]).all()   # averages of norms too
    if not finite:                              # a finite loss can have a step that is not
        epoch, step = divmod(run.t - 1, run.n_steps)
        raise common.InputError(f"the weights are not finite after epoch {epoch}, step {step + 1} (lower --lr?); "
                                f"{stands(run)}")
    epoch, step = divmod(run.t, run.n_steps)
    if run.validation_due:                      # (epoch, n_steps): the epoch's validation is still to come
        epoch, step = epoch - 1, run.n_steps
    tracked = dict(tradi=run.tradi.state()) if run.tradi else {}
    if common.rank() == 0:
        common.save_checkpoint(run.out, dict(facts, model=run.f.state_dict(), optimiser=run.optimiser.state_dict(),
                                             settings=settings, epoch=epoch, step=step, micro_batch=run.micro,
                                             **tracked))
    run.saved = time.time()


def end_epoch(run, validate):
    """Tell that an epoch has ended, and validate where that is due."""
    epoch = run.t // run.n_steps
    text, due = f"epoch {epoch}/{run.epochs}", run.validation_due
    if due:
        miou = validate(run.f)
        log(run, step=run.t, epoch=epoch, miou=miou)
        text += f", validation miou {miou:.2f}" if miou is not None else ", validation: no labelled pixel"
        run.validation_due = False
    if due or epoch % max(1, run.epochs // 50) == 0 or epoch == run.epochs:
        common.say(f"{text}, {time.time() - run.started:.0f} s")


@torch.inference_mode()
def validation(f, scenes, device):
    """mIoU of f on a split at full size, shared by the ranks, one image at a time (sizes may differ): in percent, None
    where no pixel of the split has a class."""
    f.eval()
    matrix = torch.zeros(f.num_classes, f.num_classes, dtype=torch.int64)
    share = range(common.rank(), len(scenes), common.world())
    with ThreadPoolExecutor(8 if device.type == "cuda" else 1) as readers:
        items = common.ahead(readers, scenes.__getitem__, share, count=16)
        for item in common.progress(items, "validating", total=len(share), leave=False):
            prediction = f(common.to_input(item["image"][None], device)).argmax(1)[0].cpu()
            matrix += common.confusion(prediction, item["label"], f.num_classes)
    return common.segmentation_metrics(common.all_sum(matrix), scenes.classes)["miou"]


def training_curves(log_path, png):
    """Figure of the loss and, where it was measured, the validation mIoU against the step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    if not any("loss" in v for v in lines):      # it was taken away, and the run went on from its last step
        return
    loss, miou = [v for v in lines if "loss" in v], [v for v in lines if v.get("miou") is not None]
    fig, ax = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    window = max(1, len(loss) // 100)
    smooth = np.convolve([v["loss"] for v in loss], np.ones(window) / window, "valid")
    ax.plot([v["step"] for v in loss][window - 1:], smooth, color="tab:blue", lw=1)
    ax.set(xlabel="step", ylabel="loss", ylim=(min(0, *smooth), None))
    if miou:
        right = ax.twinx()
        right.plot([v["step"] for v in miou], [v["miou"] for v in miou], "o-", color="tab:orange", ms=3, lw=1)
        right.set(ylabel="validation mIoU (%)", ylim=(0, 100))
    with common.replacing(png) as temporary:
        fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362}   # dense bf16, from the vendor's data sheets


def forward_tflop(f, H, W):
    """10¹² operations (2 a multiply-add) of one image of H×W through f; a training step has 3 times that."""
    shadow = copy.deepcopy(f).requires_grad_(False).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, 3, H, W, device="meta"))
    return counter.get_total_flops() / 1e12


def share_of_peak(tflops, device):
    """" (x % of the peak)" where the GPU's peak is known, else ""."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    return f" ({100 * tflops / peak:.1f} % of {peak}, dense bf16)" if peak else ""


# ──────────────────────────────────────────── training images ────────────────────────────────────────────

class TrainingScenes(common.Scenes):
    """A split for training: item (epoch, i) → dict(image uint8 (3, h, w), label uint8 (h, w), index = i), augmented.

    crop: (h, w) of an item; scale: range of the random scale. Random numbers are a function of (seed, epoch, i) alone,
    so that neither loader processes nor interruptions change them. cache: a folder for a decoded copy of the split."""

    cached = None   # paths of the copy

    def __init__(self, data, root, split, anomaly=None, crop=(512, 512), scale=(1, 1), seed=0, cache=None):
        super().__init__(data, root, split, anomaly)
        self.crop, self.scale, self.seed = crop, scale, seed
        self.cached = decoded_cache(self, cache) if cache else None

    def decode(self, i):
        """(image uint8 (H, W, 3), label uint8 (H, W)) at full size."""
        if not self.cached:
            return super().decode(i)
        # Opened for every item: as attributes they would be copied whole into spawned processes
        return tuple(np.load(path, "r", allow_pickle=False)[i] for path in self.cached)

    def __getitem__(self, key):
        epoch, i = key
        image, label = self.decode(i)
        image, label = augment(image, label, self.crop, self.scale, np.random.default_rng([self.seed, epoch, i]))
        return dict(image=torch.tensor(image).permute(2, 0, 1), label=torch.tensor(label), index=i)


def augment(image, label, crop, scale, rng):
    """Random scale, crop and flip, in one resampling of the window (image bilinear, label nearest).

    ASSUMPTION: DeepLabv3's choice (scale 0.5 to 2, crop, flip); the scale is uniform in its logarithm, and outside the
    image is grey 114 and ignored. The paper names none."""
    s = math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))
    size = [max(1, round(c / s)) for c in crop]           # the window in source pixels
    window = []
    for full, part in zip(label.shape, size):
        at = int(rng.integers(min(0, full - part), max(0, full - part) + 1))   # below 0: the window overhangs
        window.append((at, slice(max(at, 0), min(at + part, full))))
    (y, ys), (x, xs) = window
    patch, ids = np.full((*size, 3), 114, np.uint8), np.full(size, common.IGNORED, np.uint8)
    inside = (slice(ys.start - y, ys.stop - y), slice(xs.start - x, xs.stop - x))
    patch[inside], ids[inside] = image[ys, xs], label[ys, xs]
    if rng.random() < 0.5:
        patch, ids = patch[:, ::-1], ids[:, ::-1]
    if tuple(size) != tuple(crop):
        patch = np.asarray(Image.fromarray(np.ascontiguousarray(patch)).resize(crop[::-1], Image.BILINEAR))
        ids = np.asarray(Image.fromarray(np.ascontiguousarray(ids)).resize(crop[::-1], Image.NEAREST))
    return np.ascontiguousarray(patch), np.ascontiguousarray(ids)


def training_scenes(args, checkpoint, root, crop=None):
    """The training split as pretraining saw it: in its scale, and in its crop if none is given."""
    usual = pretrained_with(checkpoint)
    with common.first_rank_first():
        scenes = TrainingScenes(checkpoint["data"], root, "train", checkpoint["anomaly"], crop or usual["crop"],
                                usual["scale"], args.seed)
        return common.same_classes(scenes, checkpoint)


def pretrained_with(checkpoint):
    """dict(crop, scale, weights) of the pretraining of a checkpoint. Later stages hand it on; one of before they did
    has the defaults of its data."""
    recipe = common.RECIPES.get(checkpoint["data"], {}).get("pretrain", {})
    told = {**common.OURS["pretrain"], **recipe, **checkpoint["settings"], **checkpoint.get("pretrained", {})}
    return {name: told[name] for name in ("crop", "scale", "weights")}


def decoded_cache(scenes, folder):
    """Paths of two .npy files, images uint8 (n, H, W, 3) and labels uint8 (n, H, W); written once, and again when a
    source file changes. Needs n·H·W·4 bytes of disk: 19 GB for StreetHazards' training split. What an earlier state of
    the files left is told, not deleted: another run may read it."""
    folder = Path(folder)
    listing = [f"{p.absolute()} {os.stat(p).st_size} {os.stat(p).st_mtime_ns}" for pair in scenes.pairs for p in pair]
    # Another root or anomaly: another copy
    root = Path(scenes.root).absolute()
    of = f"{scenes.data}-{scenes.split}-{common.digest(str(root) + scenes.lut.tobytes().hex())[:8]}"
    paths = [folder / f"{of}-{common.digest(chr(10).join(listing))}-{kind}.npy" for kind in ("images", "labels")]
    with contextlib.suppress(Exception):      # missing or damaged: made again
        if all(len(np.load(p, "r", allow_pickle=False)) == len(scenes) for p in paths):
            return paths
    folder.mkdir(parents=True, exist_ok=True)
    # Temporary files of a killed run; a young one may be another run's
    for leftover in folder.glob(f".{of}-*"):
        if time.time() - leftover.stat().st_mtime > 86400:
            leftover.unlink(missing_ok=True)
    for old in sorted({*folder.glob(f"{of}-*-images.npy")} - {paths[0]}):
        common.say(f"note: {old} is of an earlier state of {root}: delete it, and its labels, when no run reads it")
    H, W = scenes.decode(0)[1].shape
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(common.replacing(p)) for p in paths]
        images, labels = (np.lib.format.open_memmap(p, "w+", np.uint8, (len(scenes), H, W, *tail))
                          for p, tail in zip(files, ((3,), ())))
        if hasattr(os, "posix_fallocate"):   # a full disk is an error here, not a crash on a later write
            for p in files:
                with open(p, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(p))

        def put(i):
            image, label = scenes.decode(i)
            if label.shape != (H, W):
                raise common.InputError(f"{scenes.name(i)}: {label.shape[1]}×{label.shape[0]}, the first image is "
                                        f"{W}×{H}; --cache expects one size: leave it out")
            images[i], labels[i] = image, label
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(common.progress(pool.map(put, range(len(scenes))), "decoding to the cache", total=len(scenes)))
        images.flush()
        labels.flush()
    return paths


# ─────────────────────────────────────────── related systems ───────────────────────────────────────────

TRADI_GAIN = (0.00316, 0.00223)   # the steady gains of TRADI's published constants: Q as below, R = 10


class Tradi:
    """TRADI's filter over the steps of training (Franchi et al., "TRADI: Tracking deep neural network weight
    distributions", ECCV 2020): for every weight w that is not batch norm's, with gradient g and rate lr of a step,

        μ ← (1 − K_μ)(μ − lr·g) + K_μ w        v ← (1 − K_v)(v + (lr·g)²) + K_v (w − μ)²
        P⁻ = P + Q,   K = P⁻ / (P⁻ + R),   P ← (1 − K) P⁻          (both scalars, for all weights; P starts at 0)

    The gains K rise from Q / (Q + R) to those given, whatever R that takes: R = Q (1 − K) / K².
    ASSUMPTION: starts at μ = w_0, v = 0, where the public code starts at μ = 0. Of the start 65 % are left after 317
    = 1/K_μ steps, 8 % after 1000. With Adam a step is not lr·g, and the filter an average over the last 1/K_μ iterates.

    mean, var {name: tensor}; first: the share of w_0 that is left in the mean where Adam forgets it, Π(1 − K_μ)."""

    Q = (1e-4, 5e-5)   # of the mean, of the variance

    def __init__(self, f, gain=TRADI_GAIN):
        norms = {id(p) for m in f.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
        self.weights = {name: w for name, w in f.named_parameters() if id(w) not in norms}
        self.mean = {name: w.detach().clone() for name, w in self.weights.items()}
        self.var = {name: torch.zeros_like(w) for name, w in self.mean.items()}
        self.R = [q * (1 - k) / k**2 for q, k in zip(self.Q, gain)]
        self.P, self.first = [0.0, 0.0], 1.0

    @torch.no_grad()
    def step(self, lr):
        """After the optimiser's step, with its rate; the weights have its gradients."""
        K = []
        for i in (0, 1):
            prior = self.P[i] + self.Q[i]
            K.append(prior / (prior + self.R[i]))
            self.P[i] = (1 - K[i]) * prior
        self.first *= 1 - K[0]
        for name, w in self.weights.items():
            moved = 0 * w if w.grad is None else lr * w.grad
            mean = self.mean[name].sub_(moved).lerp_(w, K[0])
            self.var[name].add_(moved**2).lerp_((w - mean)**2, K[1])

    def state(self):
        """What a checkpoint keeps of it."""
        return dict(mean=self.mean, var=self.var, P=self.P, first=self.first)

    def load(self, state):
        for name in self.mean:
            self.mean[name].copy_(state["mean"][name])
            self.var[name].copy_(state["var"][name])
        self.P, self.first = list(state["P"]), state["first"]


def count_masks(batch, run):
    """[|D_k|, |D_s|, masks that queries are matched with, images] of this rank's share: what a mask network's loss is
    divided by. An image has a mask for each class in it, and at most as many as there are queries."""
    counts = count_pixels(batch, run)
    known = ~batch["unknown"] & (batch["label"] < run.f.num_classes)
    present = [int((torch.bincount(Z[k]) > 0).sum()) for Z, k in zip(batch["label"], known)]
    return [*counts, sum(min(n, run.f.decoder.queries) for n in present), len(present)]


def mask_loss(net, part, counts):
    """Mask2Former's loss of a part of the batch, in place of L_k."""
    sets = net(common.to_input(part["image"]))["sets"]
    return common.objective_sets(sets, part["label"], part["unknown"], 0, 0, False, *counts)


# ─────────────────────────────────────────────── stage 1 ───────────────────────────────────────────────

def load_backbone(f, weights, flag="--weights"):
    """Load backbone weights into f: "none", "imagenet" (torchvision's; downloaded once) or a state-dict file.

    Raises InputError where they cannot be had or do not fit."""
    if weights == "none":
        return
    if weights == "imagenet":
        enum = common.BACKBONES[f.backbone_name]
        kept = Path(torch.hub.get_dir(), "checkpoints", enum.url.rpartition("/")[2])   # torchvision's cache
        there = kept.exists()
        try:
            state = enum.get_state_dict(progress=False, check_hash=True)
        except Exception as e:   # no network; or whatever a damaged file makes torch raise
            if there:
                raise common.InputError(f"{kept}: not the ImageNet weights of {f.backbone_name} (a broken download?): "
                                        "delete the file, and they are fetched again")
            raise common.InputError(f"cannot download the ImageNet weights ({getattr(e, 'reason', e)}): pass {flag} "
                                    f"none to start from random weights, or fetch {enum.url} elsewhere and pass "
                                    f"{flag} FILE")
    else:
        state, _ = common.load_tensors(weights, "a state dict of torchvision's ImageNet classifier")
    try:
        state = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
        f.backbone.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as e:
        raise common.InputError(f"{weights}: not the weights of {f.backbone_name}: "
                                f"{str(e).splitlines()[-1].strip()[:200]}")


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    given = [name for name in common.ARCH_FLAGS if getattr(args, name) is not None]
    common.say(common.resolve(args, "pretrain", args.data))
    for name in given:
        if args.arch not in common.ARCH_FLAGS[name]:
            raise common.InputError(f"--{name.replace('_', '-')}: without effect on --arch {args.arch}; "
                                    f"it is for {' and '.join(common.ARCH_FLAGS[name])}")
    args.alpha, args.loss = 0, "er"   # Eq. 5 with an empty D_s
    with common.first_rank_first():
        if args.data == "toy":
            common.dataset_classes("toy", args.anomaly)  # a wrong --anomaly is told before the images are drawn
        args.root = common.default_root(args.data, args.root, write=True)
        scenes = TrainingScenes(args.data, args.root, "train", args.anomaly, args.crop, args.scale, args.seed,
                                args.cache)
        val = common.Scenes(args.data, args.root, "val", args.anomaly)
        for part in (scenes, val):                       # a wrong label is told now, not in the epoch that meets it
            labels = [label for _, label in part.pairs]
            common.check_ids(part.spec, part.lut, common.id_histograms(labels), labels)
    torch.manual_seed(args.seed % 2**63)
    f = common.Segmenter(args.arch, args.backbone, len(scenes.classes), args.width, args.classifier,
                         attention=args.attention, queries=args.queries, decoder_layers=args.decoder_layers)
    if args.restart or not Path(args.out).exists():      # a run that goes on holds its weights
        load_backbone(f, args.weights)
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))
    common.say(f"{args.data} at {args.root}: {len(scenes)} training and {len(val)} validation images, "
               f"N = {len(scenes.classes)}")

    names = ("data", "anomaly", "arch", "backbone", "width", "weights", "epochs", "batch_size", "lr", "crop", "scale",
             "schedule", "bn", "seed", "classifier", "tradi",
             *(("attention", "queries", "decoder_layers") if f.decoder else ()))
    settings = dict({n: getattr(args, n) for n in names}, dataset=scenes.identity())
    facts = dict(common.model_facts(f), stage="pretrain", classes=list(scenes.classes), data=args.data, root=args.root,
                 anomaly=args.anomaly)
    train(f, scenes, args, device, settings, facts, validate=lambda f: validation(f, val, device),
          val_every=args.val_every or max(1, args.epochs // 50),
          **(dict(count=count_masks, objective=mask_loss) if f.decoder else {}))


if __name__ == "__main__":
    common.cli(main)
