"""Speed and memory, each against a named baseline in the same run; never part of the tests.

    python tests/benchmark.py gpu --json gpu.json           # everything on one GPU, within ten minutes (--budget)
    python tests/benchmark.py memory                        # which batches fit a card, by calculation
    python tests/benchmark.py metrics                       # against scikit-learn; minutes
    python tests/benchmark.py mgu --ckpt pretrained.pt      # against Algorithm 1 image by image
    python tests/benchmark.py training                      # against a loop in the manner of torchvision's reference
    python tests/benchmark.py scores                        # of evaluate.py, each against the forward pass
    python tests/benchmark.py all --small                   # everything at toy size: does it run?
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import evaluate
import pretrain
import mgu_generate


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ───────────────────────────────────────────────── metrics ─────────────────────────────────────────────────

FRAME = (720, 1280)


def metric_frames(n, shape=FRAME):
    """n frames (float32 scores, bool labels with 1.5 % positive), drawn once and then only transformed,
    so that generation stays cheap next to the metrics: a new scale, offset and label position each."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape, np.float32)
    label = rng.random(shape) < 0.015
    for _ in range(n):
        scores = base * np.float32(rng.uniform(0.8, 1.2))
        positive = np.roll(label.ravel(), rng.integers(label.size)).reshape(shape)
        scores[positive] += np.float32(1.5)
        scores += np.float32(rng.normal(0, 0.2))
        yield scores, positive


def memory(peak=True):
    """MiB of this process. VmHWM, not ru_maxrss: the latter starts at the size of the parent process."""
    field = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))


def run_ours(n, per_image, shape=FRAME):
    imported, spent, generated, images = memory(False), 0.0, 0.0, []
    clock, histogram = time.perf_counter(), evaluate.ScoreHistogram()
    for scores, positive in metric_frames(n, shape):
        start = time.perf_counter()
        generated += start - clock
        parts = evaluate.sort_by_class(scores, positive)
        if per_image:
            images.append(evaluate.image_metrics(*parts))
        histogram.add(*parts)
        clock = time.perf_counter()
        spent += clock - start
    start = time.perf_counter()
    metrics = histogram.metrics()
    spent += time.perf_counter() - start
    return dict(metrics=metrics, seconds=spent, generation=generated, peak=memory(),
                above=memory() - imported, kept=histogram.table is None)


def run_sklearn(n, shape=FRAME):
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    imported, clock = memory(False), time.perf_counter()
    scores, positive = np.empty((n, *shape), np.float32), np.empty((n, *shape), bool)
    for i, (s, p) in enumerate(metric_frames(n, shape)):
        scores[i], positive[i] = s, p
    scores, positive = scores.reshape(-1), positive.reshape(-1)
    start = time.perf_counter()
    ap = average_precision_score(positive, scores)
    area = roc_auc_score(positive, scores)
    fpr, tpr, _ = roc_curve(positive, scores)
    first = fpr[np.argmax(tpr >= 0.95)]
    return dict(metrics=dict(aupr=100 * ap, auroc=100 * area, fpr95_first=100 * first),
                seconds=time.perf_counter() - start, generation=start - clock, peak=memory(),
                above=memory() - imported)


def in_fresh_process(function, *args):
    """Peak memory is per process, so each measurement gets its own interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def bench_metrics(small=False):
    few, many, n = (3, 12, 4) if small else (150, 1500, 54)
    scores, positive = (a.ravel() for a in next(metric_frames(1, (180, 240))))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        evaluate.image_metrics(*evaluate.sort_by_class(scores, positive))
        times.append(1e3 * (time.perf_counter() - start))
    print(f"one 240x180 image: {np.median(times):.2f} ms (best {min(times):.2f})")

    def line(name, r):
        print(f"{name:<34} {r['seconds']:8.2f} s  peak {r['peak']:6.0f} MiB, {r['above']:6.0f} above imports"
              f"  (generation {r['generation']:.2f} s)", flush=True)

    pixels = n * FRAME[0] * FRAME[1]
    print(f"{n} frames of 1280x720 ({pixels / 1e6:.1f} million pixels, 1.5 % positive)")
    both = in_fresh_process(run_ours, n, True)
    line("  per image and pooled", both)
    pooled = in_fresh_process(run_ours, n, False)
    line("  pooled alone", pooled)
    sklearn = in_fresh_process(run_sklearn, n)
    line("  scikit-learn, pooled alone", sklearn)
    print(f"  faster {sklearn['seconds'] / both['seconds']:.1f}x (pooled alone "
          f"{sklearn['seconds'] / pooled['seconds']:.1f}x); memory above imports 1/"
          f"{sklearn['above'] / both['above']:.1f}, raw peak 1/{sklearn['peak'] / both['peak']:.1f}")
    for key, want in sklearn["metrics"].items():
        print(f"  {key:<12} {both['metrics'][key]:.6f}  differs by {both['metrics'][key] - want:+.1e} points")
    runs = {count: in_fresh_process(run_ours, count, True) for count in (few, many)}
    for count, r in runs.items():
        line(f"  {count} frames, {count * FRAME[0] * FRAME[1] / 1e6:.0f} million pixels", r)
    change = runs[many]["peak"] / runs[few]["peak"] - 1
    print(f"  peak memory of {many} against {few} frames: {100 * change:+.1f} %, "
          f"{1e3 * runs[many]['seconds'] / many:.1f} ms a frame, "
          + ("scores kept" if runs[many]["kept"] else "in bins"))


# ─────────────────────────────────────────────────── mgu ───────────────────────────────────────────────────

def literal_mgu(f, X, I, y, eta, max_steps):
    """Algorithm 1 for one image, line by line; the baseline. Returns the X' of the smallest |P_ỹ|, in grey levels, and
    |P_ỹ| of each iteration."""
    X_aux, history = X.clone(), []
    while True:
        X_aux.requires_grad_(True)
        S = f(X_aux[None] / 255).softmax(1)[0]
        P = I & (S.argmax(0) == y)
        history.append(int(P.sum()))
        if history[-1] < min(history[:-1], default=math.inf):
            best = X_aux.detach()
        if history[-1] == 0 or len(history) > max_steps:
            return best, history
        gradient, = torch.autograd.grad(S[y][P].mean(), X_aux)
        X_aux = X_aux.detach()
        moved = eta * 255**2 * gradient                          # η for images in [0, 1], X' in grey levels
        X_aux = torch.where(P, (X_aux - moved).clamp(0, 255), X_aux)


class NoiseScenes:
    """What mgu_generate.generate() uses of common.Scenes: images of noise, labelled y everywhere."""
    root, classes = "/", [f"class {c}" for c in range(12)]

    def __init__(self, shape, y):
        self.shape, self.y = shape, y

    def __getitem__(self, i):
        image = np.random.default_rng(i).integers(0, 256, (3, *self.shape), np.uint8)
        return dict(image=torch.from_numpy(image), label=torch.full(self.shape, self.y, dtype=torch.uint8))

    def name(self, i):
        return f"/{i}.png"


def run_mgu(images, batch_size, shape):
    """MiB above the imports that generate() takes at its peak for so many images, 3 iterations each."""
    torch.manual_seed(0)
    f = common.Segmenter("deeplabv3", "mobilenet_v3_large", 12).eval()
    y = int(f(common.to_input(NoiseScenes(shape, 0)[0]["image"][None])).argmax(1).mode().values.mode().values)
    imported = memory(False)
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(batch_size=batch_size, step_size=5.0, max_steps=3, ascent=False, augment=False)
        mgu_generate.generate(f, NoiseScenes(shape, y), [(y, i) for i in range(images)], Path(folder), args,
                              torch.device("cpu"))
    return memory() - imported


def bench_mgu(args, device):
    if args.ckpt:
        f, checkpoint = common.load_checkpoint(args.ckpt)
        root = common.default_root(checkpoint["data"], args.root or checkpoint["root"])
        scenes = common.Scenes(checkpoint["data"], root, "train", checkpoint["anomaly"])
        todo = mgu_generate.choose(scenes, 1 if args.small else args.per_class, 0)
        jobs = [(k, scenes[i]["image"], scenes[i]["label"] == y, y) for k, (y, i) in enumerate(todo)]
    else:   # random weights predict one class everywhere: the cost of an iteration is the same, the flips are not
        torch.manual_seed(0)
        f = common.Segmenter("deeplabv3", "mobilenet_v3_large", 12).eval()
        X = torch.randint(0, 256, (8, 3, 108, 192), dtype=torch.uint8)
        top = f(common.to_input(X)).argmax(1)
        ys = [int(t.flatten().mode().values) for t in top]
        jobs = [(k, X[k], top[k] == y, y) for k, y in enumerate(ys)]
    cap = 5 if args.small else args.max_steps
    f = f.to(device)
    print(f"mgu: {len(jobs)} images of {tuple(jobs[0][1].shape[1:])}, {f.arch} on {f.backbone_name}, "
          f"η = 5, cap {cap}; {common.about_run(device)}")
    literal = copy.deepcopy(f).to(memory_format=torch.contiguous_format).requires_grad_(False)
    folded = mgu_generate.fold_batch_norm(f)
    ratios = []
    for turn in range(1 if args.small else args.repeat):
        synchronise(device)
        begun = time.perf_counter()
        slow = {k: literal_mgu(literal, X.to(device).float(), I.to(device), y, 5.0, cap) for k, X, I, y in jobs}
        synchronise(device)
        t_slow, begun = time.perf_counter() - begun, time.perf_counter()
        engine = mgu_generate.mgu(folded, jobs, args.batch_size, 5.0, cap, device)
        fast = {k: (X, history) for k, X, _, history in engine}
        synchronise(device)
        t_fast = time.perf_counter() - begun
        ratios.append(t_slow / t_fast)
        iterations = sum(len(h) for _, h in slow.values())
        print(f"  run {turn}: literal {len(jobs) / t_slow:.2f} images/s ({iterations / t_slow:.1f} iterations/s) · "
              f"engine at batch {args.batch_size} {len(jobs) / t_fast:.2f} images/s · ratio {ratios[-1]:.2f}",
              flush=True)
    same = [len(fast[k][1]) == len(slow[k][1]) for k in slow]
    apart = max(float((fast[k][0].float() - slow[k][0].cpu().round()).abs().mean()) for k in slow)
    X = jobs[0][1]
    per_image = 2 * pretrain.forward_tflop(f, *X.shape[1:])   # forward, and as much for the gradient of the input
    tflops = per_image * sum(len(h) for _, h in fast.values()) / t_fast
    for images, batch_size in ((16, 4), (64, 4), (64, 8)):
        count, shape = (images // 8, (54, 96)) if args.small else (images, (180, 240))
        peak = in_fresh_process(run_mgu, count, batch_size, shape)
        print(f"  peak memory on a CPU above the imports, {images} images at --batch-size {batch_size}: {peak:.0f} MiB",
              flush=True)
    print(f"  ratio engine : literal, median of {len(ratios)}: {statistics.median(ratios):.2f}×; {tflops:.3f} TFLOP/s"
          f"{pretrain.share_of_peak(tflops, device)}\n  same number of iterations in {sum(same)} of {len(same)} "
          f"images; largest mean difference of X' {apart:.4f} grey levels")


# ────────────────────────────────────────────────── training ──────────────────────────────────────────────────

class RandomScenes(torch.utils.data.Dataset):
    """n images of noise with labels of noise, in memory: the cost of a step does not depend on what is in them.

    With `unknown`, a tenth of the pixels is D_s. It counts the batches that a loop takes from it: after `warm` of them
    and at least `seconds` more it raises Enough, so that any loop can be measured from outside."""

    root, classes = "/", [f"class {c}" for c in range(12)]

    def __init__(self, n, H, W, unknown=False, batch=1, warm=0, seconds=math.inf, device=torch.device("cpu")):
        rng = np.random.default_rng(0)
        self.images = torch.from_numpy(rng.integers(0, 256, (8, 3, H, W), np.uint8))
        self.labels = torch.from_numpy(rng.integers(0, 12, (8, H, W)).astype(np.uint8))
        self.n, self.unknown, self.batch, self.warm, self.limit, self.device = n, unknown, batch, warm, seconds, device
        self.taken, self.begun = 0, time.perf_counter()
        self.first = self.seconds = self.steps = self.search = None

    def __len__(self):
        return self.n

    def name(self, i):
        return f"noise {i}"

    def __getitem__(self, key):
        if self.taken % self.batch == 0:
            self.look(self.taken // self.batch)
        self.taken += 1
        i = key[1] if isinstance(key, tuple) else key
        item = dict(image=self.images[i % 8], label=self.labels[i % 8], index=i)
        if self.unknown:
            item["unknown"] = torch.zeros_like(item["label"], dtype=torch.bool)
            item["unknown"][:len(item["label"]) // 10] = True
        return item

    def look(self, step):
        """The loop asks for batch `step`: all before it is queued on the device."""
        if step == 1:                                    # compilation, cuDNN's search for algorithms
            synchronise(self.device)
            self.first = time.perf_counter() - self.begun
        if step == self.warm:
            synchronise(self.device)
            self.search = peak_memory(self.device, reset=True)
            self.begun = time.perf_counter()
        elif step >= self.warm + 3 and time.perf_counter() - self.begun > self.limit:
            synchronise(self.device)
            self.seconds, self.steps = time.perf_counter() - self.begun, step - self.warm
            raise Enough


class Enough(Exception):
    pass


def peak_memory(device, reset=False, reserved=False):
    """GiB of tensors (or what PyTorch holds of the device) at their peak since the last reset; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = (torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated)(device) / 2**30
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 2)


def release(device):
    """Let go of what a measurement, perhaps a failed one, left on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def set_tf32(conv, matmul):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul


def plain_loop(f, data, device):
    """A plain loop in the manner of torchvision's references/segmentation: float32 model and data, contiguous in
    memory, cuDNN's search on, the loss read in every step."""
    optimiser = torch.optim.Adam(f.parameters(), lr=1e-6)
    torch.backends.cudnn.benchmark = True
    f.train()
    for item in torch.utils.data.DataLoader(data, data.batch, shuffle=True, drop_last=True):
        logits = f((item["image"].float() / 255).to(device))
        loss = F.cross_entropy(logits, item["label"].long().to(device), ignore_index=common.IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()


def loop_args(out, batch, **more):
    """What pretrain.train() reads, as its flags default, but for what a measurement sets."""
    parser = argparse.ArgumentParser()
    pretrain.training_flags(parser, "")
    args = parser.parse_args([])
    vars(args).update(dict(out=str(out), epochs=1, batch_size=batch, micro_batch=batch, lr=1e-6, schedule="constant",
                           bn="train", workers=0, save_every=1e9, alpha=0.05, loss="er"), **more)
    return args


def our_loop(f, data, device, **more):
    """pretrain.train() itself on such data, until that says Enough or its images are used up; then images a second
    between the first and the last line that it logs (on CUDA every 20 steps)."""
    handlers = {s: signal.getsignal(s) for s in pretrain.SIGNALS}
    facts = dict(arch=f.arch, backbone=f.backbone_name, classes=[""] * 12, data="toy", root=None, anomaly=None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with mock.patch.object(pretrain, "forward_tflop", lambda *_: 0):   # it takes time in the middle of a run
            try:
                pretrain.train(f, data, loop_args(f"{folder}/x.pt", data.batch, **more), device,
                               dict(epochs=1, schedule="constant"), facts)
            finally:
                for s, handler in handlers.items():
                    signal.signal(s, handler)
        lines = [json.loads(line) for line in Path(folder, "x.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return (last["step"] - first["step"]) * data.batch / max(last["seconds"] - first["seconds"], 1e-9)


def time_training(f, size, batch, seconds, device, plain=False, unknown=False, **more):
    """A row of figures: images/s and memory of our loop, or of the plain one, at one batch size."""
    release(device)
    torch._dynamo.reset()                                # or another size would be compiled for every size
    data = RandomScenes(10**6, *size, unknown, batch, 3 if device.type == "cuda" else 1, seconds, device)
    with contextlib.suppress(Enough):
        plain_loop(f, data, device) if plain else our_loop(f, data, device, **more)
    f.zero_grad()
    rate = data.steps * batch / data.seconds
    return dict(batch=batch, images_per_second=round(rate, 2), step_ms=round(1e3 * data.seconds / data.steps, 1),
                **speed(3 * common_tflop(f, size) * rate, device),   # forward, gradients of inputs and of weights
                gib=peak_memory(device), gib_reserved=peak_memory(device, reserved=True), gib_first_steps=data.search,
                first_step_s=round(data.first, 1))


def common_tflop(f, size, known={}):
    key = f.arch, f.backbone_name, *size
    if key not in known:
        known[key] = pretrain.forward_tflop(f, *size)
    return known[key]


def speed(tflops, device):
    """dict(tflops, percent_of_peak), the latter None where the device's peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((v for k, v in pretrain.PEAK_TFLOPS.items() if k in name), None)
    return dict(tflops=round(tflops, 3), percent_of_peak=peak and round(100 * tflops / peak, 1))


def bench_training(args, device):
    cuda = device.type == "cuda"
    backbone = args.backbone or ("resnet50" if cuda else "mobilenet_v3_large")
    size, batch, seconds = ((512, 512), 16, 8) if cuda else ((180, 240), 8, 8)
    if args.small:
        size, batch, seconds = (48, 64), 2, 0.1
    size = tuple(args.crop or size)
    arch = args.arch or "deeplabv3"
    print(f"training: {arch} on {backbone}, batch {batch}, {size[0]}×{size[1]}; {common.about_run(device)}")
    plain = common.Segmenter(arch, backbone, 12).to(device)
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    rows = {}
    for _ in range(1 if args.small else args.repeat):   # in turn: the machine's speed drifts
        set_tf32(False, False)
        row = time_training(plain, size, batch, seconds, device, plain=True)
        rows.setdefault("plain loop, float32", []).append(row)
        set_tf32(True, True)
        for precision in ("float32", "bf16"):
            row = time_training(ours, size, batch, seconds, device, precision=precision)
            rows.setdefault(f"ours, {precision}", []).append(row)
    for name, row in rows.items():
        r = [v["images_per_second"] for v in row]
        ratio = statistics.median(a / b["images_per_second"] for a, b in zip(r, rows["plain loop, float32"]))
        tflops = 3 * common_tflop(ours, size) * statistics.median(r)
        print(f"  {name:20} {statistics.median(r):7.1f} images/s (from {min(r):.1f} to {max(r):.1f}) · {ratio:.2f}× "
              f"the plain loop · {tflops:.2f} TFLOP/s{pretrain.share_of_peak(tflops, device)}"
              + (f" · {row[-1]['gib']:.1f} GiB" if cuda else ""), flush=True)
    for arch, backbone in (("deeplabv3", "resnet50"), ("pspnet", "resnet50"), ("deeplabv3", "resnet101")):
        f = common.Segmenter(arch, backbone, 12)
        work = {(h, w): common_tflop(f, (h, w)) for h, w in ((720, 1280), (512, 512))}
        print(f"  {arch} on {backbone}: " + "; ".join(f"{v:.3f} TFLOP forward, {3 * v:.2f} a training image at {h}×{w}"
                                                     for (h, w), v in work.items()))
    with tempfile.TemporaryDirectory() as folder:
        write_street(folder, *((108, 192, 4) if args.small else (720, 1280, 24)))
        for row in time_reading(Path(folder), args.small):
            print(f"  input, {row['what']}: {row['images_per_second']:.0f} images/s a process")


# ──────────────────────────────────────────────── the input pipeline ────────────────────────────────────────────────

def write_street(folder, H, W, n):
    """n training images in StreetHazards' layout and, in auxiliary/, as many samples: smooth, with camera noise."""
    rng = np.random.default_rng(0)
    coarse = common.Image.fromarray(rng.integers(0, 256, (H // 8, W // 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((W, H), common.Image.BILINEAR)).astype(np.int16)
    for split in ("train/{}/training/t1-3", "train/{}/validation/t4", "test/{}/test/t5"):
        for kind in ("images", "annotations"):
            Path(folder, split.format(kind)).mkdir(parents=True)
    ids = rng.choice([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13], (-(-H // 40), -(-W // 40))).astype(np.uint8)
    label = ids.repeat(40, 0).repeat(40, 1)[:H, :W]
    noise = rng.integers(-6, 7, (2 * H, *smooth.shape[1:]))

    def write(i):
        image = (smooth + noise[(37 * i) % H:][:H]).clip(0, 255).astype(np.uint8)
        for kind, pixels in (("images", image), ("annotations", label)):
            common.Image.fromarray(pixels).save(Path(folder, "train", kind, "training/t1-3", f"{i}.png"))
        common.save_npz(Path(folder, "auxiliary", f"{i}.npz"), dict(
            format=common.FORMAT, image=image, label=label % 12, unknown=label == 8, y=8, correct=0,
            source=f"train/images/training/t1-3/{i}.png", history=np.zeros(3, np.int32)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(n)))


def street_scenes(folder, H, W, cache=None):
    with contextlib.redirect_stdout(io.StringIO()):   # "n training images, where streethazards has 5125"
        return pretrain.TrainingScenes("streethazards", str(folder), "train", crop=(min(H, 512), min(W, 512)),
                                       scale=(0.5, 2.0), cache=cache)


def time_reading(folder, small):
    """Rows: images a second that one process reads, from PNG files, from the decoded cache, from samples."""
    samples = sorted(folder.glob("auxiliary/*.npz"))
    H, W = common.load_sample(samples[0])["label"].shape
    png, cache = street_scenes(folder, H, W), street_scenes(folder, H, W, folder / "cache")
    readers = {"PNG files, augmented": lambda k, i: png[k, i], "decoded cache, augmented": lambda k, i: cache[k, i],
               "auxiliary samples": lambda k, i: common.load_sample(samples[i])}
    for what, read in readers.items():
        n, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < (0.2 if small else 2):
            read(n // len(samples), n % len(samples))
            n += 1
        yield dict(what=f"{what}, {H}×{W}", images_per_second=round(n / (time.perf_counter() - begun), 1))


class Repeated(torch.utils.data.Dataset):
    """A set as if it had n images."""

    def __init__(self, scenes, n):
        self.scenes, self.n = scenes, n

    def __len__(self):
        return self.n

    def name(self, i):
        return self.scenes.name(i % len(self.scenes))

    def __getitem__(self, key):
        return dict(self.scenes[key[0], key[1] % len(self.scenes)], index=key[1])


def time_loader(scenes, batch, workers, seconds):
    """Images a second of pretrain.py's loader alone."""
    order = pretrain.epoch_batches(10**6, batch, 0, 0, 0, 1)
    loader = iter(torch.utils.data.DataLoader(Repeated(scenes, 10**6), batch_sampler=order, num_workers=workers,
                                              prefetch_factor=1 if workers else None, collate_fn=pretrain.collate,
                                              worker_init_fn=pretrain.ignore_signals))
    for _ in range(workers + 1):
        next(loader)
    n, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds or n < 2:
        next(loader)
        n += 1
    rate = n * batch / (time.perf_counter() - begun)
    if workers:
        loader._shutdown_workers()                       # before its end: they would go on for ever
    return round(rate, 1)


def time_fed(f, scenes, batch, steps, device, **more):
    """A row: our loop with loader processes."""
    release(device)
    data = Repeated(scenes, batch * steps)
    data.batch = batch
    return dict(batch=batch, images_per_second=round(our_loop(f, data, device, **more), 2), gib=peak_memory(device))


# ──────────────────────────────────────────────────── gpu ────────────────────────────────────────────────────

class Report:
    """What the gpu section found: printed and written as JSON after every row, so that nothing is lost. What `path`
    holds of an earlier run on the same machine is not measured again."""

    def __init__(self, path, budget, found):
        self.path, self.budget, self.begun = path, budget, time.perf_counter()
        self.values = dict(machine=found, rows=[], left_out=[], hours={})
        if path and Path(path).exists():
            before = json.loads(Path(path).read_text())
            old = before["machine"]
            other = {k for k in {**found, **old} if k != "date" and found.get(k) != old.get(k)}
            if other:
                raise common.InputError(f"{path}: of a machine with another {', '.join(sorted(other))}; expected a new "
                                        "file, or one that this machine wrote")
            self.values = dict(before, machine=found, left_out=[])
            self.values["rows"] = [r for r in before["rows"] if "error" not in r]

    def left(self):
        return self.budget - (time.perf_counter() - self.begun)

    def write(self):
        self.values["seconds"] = round(time.perf_counter() - self.begun, 1)
        if self.path:
            common.save_json(self.path, self.values)

    def row(self, section, **values):
        self.values["rows"].append(dict(section=section, **values))
        shown = " · ".join(f"{k} {v}" for k, v in values.items() if v is not None)
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {section}: {shown}", flush=True)
        self.write()

    def attempt(self, device, section, needs, measure, **names):
        """Run measure() → a row or several, if `needs` seconds are left; what fails is recorded, the rest goes on."""
        if any(r["section"] == section and all(r.get(k) == v for k, v in names.items()) for r in self.values["rows"]):
            return
        if self.left() < needs:
            self.values["left_out"].append(dict(section=section, **names))
            print(f"{section} {names}: left out, {self.left():.0f} s are left", flush=True)
            return
        begun = time.perf_counter()
        try:
            rows = measure()
            for row in [rows] if isinstance(rows, dict) else rows:
                self.row(section, **names, **row, took=round(time.perf_counter() - begun, 1))
        except Exception as e:
            memory = isinstance(e, torch.cuda.OutOfMemoryError) or "out of GPU memory" in str(e)
            if not memory:
                traceback.print_exc()
            self.row(section, **names, error="out of memory" if memory else f"{type(e).__name__}: {str(e)[:300]}")
        with contextlib.suppress(Exception):
            release(device)

    def find(self, section, key, **names):
        """The value `key` of the first good row of these names, or None."""
        for r in self.values["rows"]:
            if r["section"] == section and key in r and all(r.get(k) == v for k, v in names.items()):
                return r[key]


def machine(device):
    """Card, driver, versions, date."""
    values = dict(date=time.strftime("%Y-%m-%d"), python=platform.python_version(), torch=torch.__version__,
                  torchvision=torchvision.__version__, cores=os.cpu_count(), threads=torch.get_num_threads())
    with contextlib.suppress(Exception):
        values["shared_memory_gib"] = round(shutil.disk_usage("/dev/shm").free / 2**30, 1)
    if device.type == "cuda":
        values.update(card=torch.cuda.get_device_name(device), cuda=torch.version.cuda,
                      cudnn=torch.backends.cudnn.version(),
                      gib=round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1))
        with contextlib.suppress(Exception):
            values["driver"] = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=20).stdout.strip()
    return values


def bench_gpu(args, device):
    """Everything that a user with a GPU wants to know before a long run, the most important first."""
    report = Report(args.json, args.budget, machine(device))
    print(" · ".join(f"{k} {v}" for k, v in report.values["machine"].items()), flush=True)
    cuda, small = device.type == "cuda", args.small
    crop, full = ((48, 64), (54, 96)) if small else ((512, 512), (720, 1280))
    backbone = args.backbone or ("mobilenet_v3_large" if small else "resnet50")
    seconds, scale = (0.05, 16) if small else (3, 1)           # of a measurement; by what batches are divided
    archs = [args.arch] if args.arch else ["deeplabv3", "pspnet"]
    size_of = {"pretraining": crop, "fine-tuning": full}
    models = {}

    def model(arch):
        if arch not in models:
            models[arch] = common.Segmenter(arch, backbone, 12).to(device, memory_format=torch.channels_last)
        return models[arch]

    def train(needs, arch, stage, batch, loop="ours", tf32=True, **more):
        def measure():
            set_tf32(tf32, tf32 and loop == "ours")            # PyTorch's own default: convolutions alone
            f = model(arch)
            if loop == "plain":
                f = copy.deepcopy(f).to(memory_format=torch.contiguous_format)
            return time_training(f, size_of[stage], max(2, batch // scale), seconds, device, loop == "plain",
                                 stage == "fine-tuning", **more)
        precision = more.get("precision", "bf16" if loop == "ours" else "float32")
        report.attempt(device, stage, needs if cuda else 0, measure, arch=arch, loop=loop, size=list(size_of[stage]),
                       precision="tf32" if precision == "float32" and tf32 else precision,
                       compiled=more.get("compile", False), micro_batch=more.get("micro_batch", batch))

    def mgu(needs, arch, batch, tf32, engine="batched", deterministic=True):
        def measure():
            theirs = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False)
            with mock.patch.object(common, "upsample", theirs) if "PyTorch" in engine else contextlib.nullcontext():
                return time_mgu(model(arch), full, max(2, batch // scale), tf32, engine.split(",")[0], deterministic,
                                seconds, device)
        report.attempt(device, "mgu", needs if cuda else 0, measure, arch=arch, engine=engine, size=list(full),
                       precision="tf32" if tf32 else "float32", micro_batch=batch,
                       deterministic=deterministic and engine != "literal")

    def evaluation(needs, arch):
        report.attempt(device, "evaluation", needs if cuda else 0, lambda: time_evaluation(
            model(arch), full, 3 if small else 32, device), arch=arch, size=list(full))

    def hours():
        report.values["hours"] = recipe_hours(report, archs, crop, full)
        report.write()

    first = archs[0]
    train(20, first, "pretraining", 32)
    train(20, first, "pretraining", 32, loop="plain")
    train(20, first, "fine-tuning", 16)
    mgu(15, first, 8, True)
    mgu(12, first, 8, True, engine="batched, PyTorch's gradient of upsampling")
    mgu(12, first, 8, True, deterministic=False)
    mgu(15, first, 8, True, engine="literal")
    mgu(15, first, 8, False)
    evaluation(15, first)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        report.attempt(device, "input, one process", 20 if cuda else 0, lambda: [
            write_street(files, *full, 4 if small else 24), *time_reading(files, small)][1:])
        report.attempt(device, "input beside the model", 30 if cuda else 0, lambda: time_beside(
            model(first), files, full, seconds, device, report.left, small), arch=first)
    for arch in archs[1:]:
        train(20, arch, "pretraining", 32)
        train(20, arch, "fine-tuning", 16)
        mgu(15, arch, 8, True)
    hours()

    report.attempt(device, "the paper's batch", 50 if cuda else 0, lambda: time_fed(
        model(first), RandomScenes(8, *crop), 2 if small else 256, 4 if small else 40, device,
        workers=1 if small else 8, micro_batch=None), arch=first)
    for batch in (8, 4, 32):
        train(20, first, "fine-tuning", batch)
    for batch in (16, 4):
        mgu(12, first, batch, True)
    for batch in (16, 8):
        train(20, first, "pretraining", batch)
    train(20, first, "pretraining", 32, loop="plain", tf32=False)
    train(20, first, "pretraining", 32, precision="float32")
    mgu(15, first, 8, False, engine="literal")
    if cuda:
        train(150, first, "pretraining", 32, compile=True)
        train(150, first, "fine-tuning", 16, compile=True)
    for arch in archs[1:]:
        for batch in (8, 4, 32):
            train(20, arch, "fine-tuning", batch)
        for batch in (16, 8):
            train(20, arch, "pretraining", batch)
        train(20, arch, "pretraining", 32, loop="plain")
        mgu(12, arch, 8, False)
        mgu(12, arch, 8, True, engine="literal")
        evaluation(15, arch)
    hours()
    report.values["ratios"] = ratios(report, archs)
    report.write()
    for r in [r for r in report.values["rows"] if r.get("gib") and r.get("loop") == "ours" and not r["compiled"]]:
        report.attempt(device, "memory", 15, lambda: dict(measured=r["gib"], calculated=round(calculated(
            r["section"], r["arch"], backbone, tuple(r["size"]), r["precision"], r["batch"]), 2)),
            arch=r["arch"], stage=r["section"], precision=r["precision"], batch=r["batch"])
    failed = [r for r in report.values["rows"] if r.get("error", "out of memory") != "out of memory"]
    print(f"\n{len(report.values['rows'])} rows, {len(failed)} failed, {len(report.values['left_out'])} left out, "
          f"{report.values['seconds']:.0f} s" + (f"; wrote {args.json}" if args.json else ""), flush=True)


def time_mgu(f, size, batch, tf32, engine, deterministic, seconds, device):
    """Image-iterations a second of Algorithm 1; with a step of η = 0 no pixel flips, and no image ends early."""
    f.eval()
    X = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, *size), np.uint8))
    with torch.no_grad():
        y = int(f(common.to_input(X[:1], device)).argmax(1).flatten().mode().values)
    jobs = [(k, X[k], torch.ones(size, dtype=torch.bool), y) for k in range(batch)]
    torch.backends.cudnn.benchmark = False                     # as mgu_generate.py leaves it
    set_tf32(tf32, tf32 and engine == "batched")
    torch.backends.cudnn.deterministic = deterministic and engine == "batched"
    torch.use_deterministic_algorithms(deterministic and engine == "batched", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if engine == "batched":
        net = mgu_generate.fold_batch_norm(f)
        work = lambda cap: sum(len(h) for *_, h in mgu_generate.mgu(net, jobs, batch, 0.0, cap, device, tf32))
    else:
        net = copy.deepcopy(f).to(memory_format=torch.contiguous_format).requires_grad_(False)
        image, I = X[0].to(device).float(), jobs[0][2].to(device)
        work = lambda cap: len(literal_mgu(net, image, I, y, 0.0, cap)[1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                    # of operations without a deterministic kernel
            work(1)
            first = peak_memory(device, reset=True)
            cap, spent = 2, 0.0
            while spent < seconds / 2:                         # doubled until it takes long enough to be measured
                cap *= 2
                synchronise(device)
                begun = time.perf_counter()
                n = work(cap)
                synchronise(device)
                spent = time.perf_counter() - begun
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    rate = n / spent
    return dict(batch=batch if engine == "batched" else 1, image_iterations_per_second=round(rate, 2),
                **speed(2 * common_tflop(f, size) * rate, device),   # forward, gradient of the input
                gib=peak_memory(device), gib_first_steps=first)


class TestScenes(RandomScenes):
    """With 1.5 % of anomalous pixels."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        label = item["label"].clone()
        label[: max(1, len(label) // 8), : max(1, label.shape[1] // 8)] = common.ANOMALY
        return dict(item, label=label)


def time_evaluation(f, size, n, device):
    """Images a second of evaluate.evaluate(), all told, and its parts as it counts them: they run side by side."""
    argv, sys.argv = sys.argv, ["evaluate.py"]
    try:
        args = evaluate.parse()
    finally:
        sys.argv = argv
    set_tf32(False, False)
    torch.backends.cudnn.benchmark = False
    f = f.eval()
    ignore = np.zeros(256, bool)
    scores = {"f": evaluate.prepare_scores([f], args.score, args, device)}
    for count in (2, n):                                       # the first to warm up
        release(device)
        begun = time.perf_counter()
        spent = evaluate.evaluate({"f": [f]}, scores, TestScenes(count, *size), ignore, args, device)[2]
        synchronise(device)
        elapsed = time.perf_counter() - begun
    with torch.no_grad():
        X = common.to_input(torch.zeros(1, 3, *size, dtype=torch.uint8), device)
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(5):
            score = evaluate.score_msp(f(X))
        synchronise(device)
    return dict(images=n, images_per_second=round(n / elapsed, 2), gib=peak_memory(device),
                score_ms=round(200 * (time.perf_counter() - begun), 2),
                **{f"{k}_ms": round(1e3 * v / n, 1) for k, v in spent.items()}, size_of_score=list(score.shape))


def time_beside(f, files, size, seconds, device, left, small):
    """Rows: the loader of pretrain.py alone, and our loop that it feeds, from PNG files and from the cache."""
    batch, workers = (2, 1) if small else (32, 8)
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 1 << 40
    while workers > 1 and 2 * workers * batch * 512 * 512 * 5 > free:      # each keeps a batch there
        workers //= 2
    for what, cache in (("decoded cache", files / "cache"), ("PNG files", None)):
        scenes = street_scenes(files, *size, cache=cache)
        for count in dict.fromkeys((workers, 1 if small else max(workers, (os.cpu_count() or 8) - 2))):
            if left() > 15 or small:
                yield dict(what=f"{what}: the loader alone", workers=count,
                           images_per_second=time_loader(scenes, batch, count, seconds))
        if left() > 25 or small:
            set_tf32(True, True)
            yield dict(what=f"{what}: the loop that it feeds", workers=workers,
                       **time_fed(f, scenes, batch, 3 if small else 60, device, workers=workers))


# StreetHazards, Sec. IV-A: 5,125 images are 20 steps of 256; 12 classes of 300 images; 1,031 and 1,500 to evaluate
RECIPE = dict(pretraining=1000 * 20 * 256, mgu=3600 * 25, validation=50 * 1031, evaluation=1500)


def recipe_hours(report, archs, crop, full):
    """Hours of the paper's recipe on this one device, from the rows; MGU at 25 iterations an image."""
    every = {}
    for arch in archs:
        ask = lambda section, key="images_per_second", **names: report.find(section, key, arch=arch, **names)
        rates = dict(
            pretraining=ask("the paper's batch")
            or ask("pretraining", loop="ours", precision="bf16", compiled=False, micro_batch=32),
            mgu=ask("mgu", "image_iterations_per_second", engine="batched", precision="tf32"),
            finetuning=ask("fine-tuning", loop="ours", precision="bf16", compiled=False, micro_batch=16),
            evaluation=ask("evaluation") or report.find("evaluation", "images_per_second"))
        forward = ask("evaluation", "forward_ms") or report.find("evaluation", "forward_ms")
        rates["validation"] = forward and 1000 / forward
        images = dict(RECIPE, finetuning=3600 * common.PAPER["finetune"]["epochs"].get(arch, 10))
        hours = {k: round(images[k] / rates[k] / 3600, 2) for k in images if rates.get(k)}
        every[arch] = dict(hours, all=round(sum(hours.values()), 1))
        print(f"hours of the paper's recipe, {arch}: " + " · ".join(f"{k} {v}" for k, v in every[arch].items())
              + ("" if len(hours) == len(images) else " (parts are missing)"), flush=True)
    return every


def ratios(report, archs):
    """What ours gains over the baselines: {what: factor}."""
    found = {}
    for arch in archs:
        training = lambda **names: report.find("pretraining", "images_per_second", arch=arch, micro_batch=32, **names)
        mgu = lambda **names: report.find("mgu", "image_iterations_per_second", arch=arch, **names)
        ours, engine = dict(loop="ours", compiled=False), dict(engine="batched", micro_batch=8, deterministic=True)
        pairs = {
            "training, ours in bf16 : plain loop": (training(**ours, precision="bf16"),
                                                    training(loop="plain", precision="tf32")),
            "training, ours in TF32 : plain loop": (training(**ours, precision="tf32"),
                                                    training(loop="plain", precision="tf32")),
            "training, bf16 and compiled : plain loop": (training(loop="ours", compiled=True),
                                                         training(loop="plain", precision="tf32")),
            "mgu, batch 8 in TF32 : literal": (mgu(**engine, precision="tf32"),
                                               mgu(engine="literal", precision="tf32")),
            "mgu, batch 8 in float32 : literal in float32": (mgu(**engine, precision="float32"),
                                                             mgu(engine="literal", precision="float32")),
            "mgu, TF32 : float32": (mgu(**engine, precision="tf32"), mgu(**engine, precision="float32")),
            "mgu, gradient of upsampling by products : PyTorch's": (
                mgu(**engine, precision="tf32"),
                mgu(**dict(engine, engine="batched, PyTorch's gradient of upsampling"), precision="tf32")),
            "mgu, not deterministic : deterministic": (mgu(**dict(engine, deterministic=False), precision="tf32"),
                                                       mgu(**engine, precision="tf32"))}
        found[arch] = {k: round(a / b, 2) for k, (a, b) in pairs.items() if a and b}
        print(f"{arch}: " + " · ".join(f"{k} {v}×" for k, v in found[arch].items()), flush=True)
    return found


# ─────────────────────────────────────────────────── memory ───────────────────────────────────────────────────

class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak; counts storages, once each."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def step_bytes(stage, arch, backbone, size, batch, precision):
    """(bytes that autograd saves for the backward pass, peak of all that is alive) of one pass over a batch.

    By calculation: on fake tensors, which have shapes and no values. Without workspaces of cuDNN, the CUDA context
    and what fragmentation costs. Training counts weights, gradients and Adam's two moments (16 bytes a weight)."""
    training = stage in ("pretraining", "fine-tuning")
    if not training:
        f = mgu_generate.fold_batch_norm(common.Segmenter(arch, backbone, 12))
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if training:
            f = common.Segmenter(arch, backbone, 12).train()
        live, saved = Live(), {}
        own = [*f.parameters(), *f.buffers()]
        weights = {t.untyped_storage()._cdata for t in own}

        def pack(t):
            key = t.untyped_storage()._cdata
            if key not in weights:
                saved[key] = t.untyped_storage().nbytes()
            return t
        image = torch.zeros(batch, 3, *size, dtype=torch.uint8)
        Z, D_s = torch.zeros(batch, *size, dtype=torch.uint8), torch.zeros(batch, *size, dtype=torch.bool)
        y = torch.zeros(batch, dtype=torch.int64)
        if training:
            for p in f.parameters():                     # of the parts before this one
                p.grad = torch.zeros_like(p)
            own += [p.grad for p in f.parameters()]
            own += [torch.zeros_like(p) for p in f.parameters() for _ in range(2)]
        with live, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for t in (*own, image, Z, D_s):
                live.see(t)
            X = common.to_input(image)
            if stage == "evaluation":
                with torch.no_grad():
                    evaluate.score_msp(f(X))
            elif stage == "mgu":
                own.append(X.clone())                    # mgu()'s X_best, held all the while
                X.requires_grad_(True)
                logits = f(X / 255)
                P = D_s & (logits.argmax(1) == y.view(-1, 1, 1))
                L = common.loss_mgu(common.log_softmax(logits), P, y)
                held = sum(saved.values())
                gradient, = torch.autograd.grad(L.sum(), X)
                torch.where(P[:, None], (X - gradient).clamp(0, 255), X)
                return held, live.peak
            else:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    logits = f(X)
                loss = common.objective(logits, Z, D_s, 0.05 * (stage == "fine-tuning"), "er", 1000, 1000)
                held = sum(saved.values())
                loss.backward()
                return held, live.peak
        return 0, live.peak


def memory_line(stage, arch, backbone, size, precision, batches=(2, 4)):
    """dict(fixed, saved, peak): GiB that do not grow with the batch, and GiB an image: both passes are linear in it."""
    (s1, p1), (s2, p2) = (step_bytes(stage, arch, backbone, size, b, precision) for b in batches)
    per_image, saved = (p2 - p1) / (batches[1] - batches[0]), (s2 - s1) / (batches[1] - batches[0])
    return dict(fixed=(p1 - batches[0] * per_image) / 2**30, saved=saved / 2**30, image=per_image / 2**30)


def calculated(stage, arch, backbone, size, precision, batch, known={}):
    """GiB of the peak, by calculation."""
    key = stage, arch, backbone, size, "bf16" if precision == "bf16" else "float32"
    if key not in known:
        known[key] = memory_line(*key)
    return known[key]["fixed"] + batch * known[key]["image"]


def real_peak(arch, backbone, size, batch):
    """Bytes that one real float32 training pass takes at its peak above what was there before, on this CPU."""
    f = common.Segmenter(arch, backbone, 12).train().to(memory_format=torch.channels_last)
    for p in f.parameters():
        p.grad = torch.zeros_like(p)
    before = memory(False)
    image, Z = torch.zeros(batch, 3, *size, dtype=torch.uint8), torch.zeros(batch, *size, dtype=torch.uint8)
    common.objective(f(common.to_input(image)), Z, Z > 0, 0.05, "er", 1000, 1000).backward()
    return (memory() - before) * 2**20


STAGES = (("pretraining", "crop", "bf16"), ("pretraining", "crop", "float32"), ("fine-tuning", "full", "bf16"),
          ("fine-tuning", "full", "float32"), ("mgu", "full", "float32"), ("evaluation", "full", "float32"))
CARDS, MARGIN = (24, 40, 80), 1.5   # GiB of a card; of them, for the CUDA context, workspaces and fragmentation


def bench_memory(args):
    sizes = dict(crop=(48, 64), full=(54, 96)) if args.small else dict(crop=(512, 512), full=(720, 1280))
    backbone = args.backbone or ("mobilenet_v3_large" if args.small else "resnet50")
    rows = []
    print(f"GiB on {backbone}, by calculation: peak = fixed + batch × image; of it, saved for the backward pass\n"
          f"{'':10} {'stage':12} {'pixels':9} {'precision':9} {'fixed':>6} {'image':>7} {'saved':>7}   batch that fits "
          + ", ".join(f"{c} GiB" for c in CARDS) + f" ({MARGIN} GiB left free)")
    for arch in [args.arch] if args.arch else ("deeplabv3", "pspnet"):
        for stage, which, precision in STAGES:
            size = sizes[which]
            line = memory_line(stage, arch, backbone, size, precision)
            fits = {c: int((c - MARGIN - line["fixed"]) // line["image"]) for c in CARDS}
            rows.append(dict(arch=arch, stage=stage, size=list(size), precision=precision, **line, fits=fits))
            print(f"{arch:10} {stage:12} {size[0]}×{size[1]:<5} {precision:9} {line['fixed']:6.2f} "
                  f"{line['image']:7.3f} {line['saved']:7.3f}   " + ", ".join(map(str, fits.values())), flush=True)
    size, batch = ((54, 96), 2) if args.small else ((360, 640), 2)
    arch = rows[0]["arch"]
    found = in_fresh_process(real_peak, arch, backbone, size, batch)
    weights = sum(p.nbytes for p in common.Segmenter(arch, backbone, 12).parameters())
    f_bytes = step_bytes("fine-tuning", arch, backbone, size, batch, "float32")[1] - 4 * weights
    print(f"{arch}, {batch} images of {size[0]}×{size[1]} in float32 on this CPU: {found / 2**30:.2f} GiB above the "
          f"model, by calculation {f_bytes / 2**30:.2f}: ratio {found / f_bytes:.2f}")
    if args.json:
        common.save_json(args.json, dict(rows=rows, check=dict(
            arch=arch, size=list(size), batch=batch, measured=found / 2**30, calculated=f_bytes / 2**30)))


# ────────────────────────────────────────────────── scores ──────────────────────────────────────────────────

def seconds_of(make, device, repeat):
    """Median seconds of make() after one that does not count, and GiB at its peak: of the device, or on a CPU above
    what was there before (where /proc tells: Linux)."""
    make()
    synchronise(device)
    peak_memory(device, reset=True)
    before = reset_peak() if device.type == "cpu" else None
    make()
    synchronise(device)
    peak = (memory() - before) / 1024 if before else peak_memory(device)
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        make()
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), peak and round(peak, 2)


def reset_peak():
    """Let the peak of this process's memory start anew; MiB that it holds now, or None where /proc does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)              # what was freed and is still held would hide what comes
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return memory(False)


@torch.no_grad()
def bench_scores(args, device):
    """Every score of one image beside the forward pass that it needs anyway: random weights, references of noise."""
    size, vectors = ((54, 96), 1000) if args.small else (FRAME, 100_000)
    arch, backbone = args.arch or "deeplabv3", args.backbone or ("mobilenet_v3_large" if args.small else "resnet50")
    torch.manual_seed(0)
    to = lambda net: net.eval().to(device, memory_format=torch.channels_last)
    make = lambda name, arch=arch, **how: to(common.Segmenter(arch, name, 12, **how))
    f, cosine, student = make(backbone), make(backbone, classifier="cosine"), common.bare(make("mobilenet_v3_large"))
    outlier, masks = make(backbone, outlier=True), make(backbone, "mask2former")
    of_score = dict(cosine=cosine, outlier=outlier, outlier_msp=outlier, hybrid=outlier, maskomaly=masks)
    companions = dict(distill=student, synthesis=to(common.Synthesizer(backbone, 12, 8 if args.small else 64)))
    for net in (f, cosine):
        net.origin = "f.pt", dict(fingerprint="f")
    X = torch.rand(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    options = argparse.Namespace(passes=10, crf_iterations=10, seed=0, knn_k=3, knn_images=500, knn_vectors=vectors,
                                 knn_chunk=1024, knn_layer="embedding", train_root=None, student="student.pt",
                                 generator="generator.pt", synthcp_threshold=0.999, ckpt=["f.pt"], baseline=[],
                                 queries_from=None, lam=0.6, border=None, refine=None)
    references = dict(vectors=torch.randn(vectors, f.classifier.in_channels, device=device), energy=(-1.0, 0.0),
                      farthest=1.0)
    rows = []

    def line(name, make, needs=0.0):
        spent, peak = seconds_of(make, device, args.repeat)
        rows.append(dict(score=name, seconds=spent, times_forward=spent / (needs or spent), gib=peak))
        print(f"{name:24} {spent:8.4f} s   {rows[-1]['times_forward']:6.2f} × forward   "
              + (f"{peak:.2f} GiB" if peak else ""), flush=True)
        return spent

    print(f"{arch} on {backbone}, {size[1]}×{size[0]}, {vectors} reference vectors; {common.about_run(device)}")
    with mock.patch.object(evaluate, "knn_references", lambda *_: references), \
            mock.patch.object(common, "load_checkpoint", lambda *_, companion=None: (companions[companion],
                                                                                     dict(companion_of="f"))), \
            mock.patch.object(common, "fingerprint", lambda _: "f"):
        forward = line("forward", lambda: evaluate.forward([f], X))
        line("forward, mask2former", lambda: evaluate.forward([masks], X), forward)
        line("tradi 10", lambda: evaluate.forward([f] * 10, X), forward)
        for name in evaluate.SCORES:
            fs = [of_score.get(name, f)]
            score, seen = evaluate.prepare_scores(fs, [name], options, device)[name], evaluate.forward(fs, X)
            line(name, lambda: score(X, dict(seen), 0), forward)         # a copy: knn keeps its distances there
    if args.json:
        common.save_json(args.json, dict(arch=arch, backbone=backbone, size=list(size), vectors=vectors, rows=rows,
                                         device=common.about_run(device)))


def main():
    p = argparse.ArgumentParser(description="Speed and memory against named baselines.")
    p.add_argument("section", choices=("gpu", "memory", "metrics", "mgu", "training", "scores", "all"))
    p.add_argument("--small", action="store_true", help="tiny sizes: only to see that it runs")
    p.add_argument("--json", help="gpu, memory, scores: write every number to this file too")
    p.add_argument("--budget", type=float, default=600, help="gpu: seconds that it may take (default: 600)")
    p.add_argument("--arch", choices=common.ARCHS,
                   help="gpu, memory: this one alone (default: deeplabv3 and pspnet); training, scores (default: "
                   "deeplabv3)")
    p.add_argument("--repeat", type=int, default=5,
                   help="mgu, training: runs of each side, in turn; scores: of each (default: 5)")
    p.add_argument("--ckpt", help="mgu: checkpoint of pretrain.py (default: random weights)")
    p.add_argument("--root", help="mgu: folder of its dataset (default: the checkpoint's)")
    p.add_argument("--per-class", type=int, default=2, help="mgu: images of each class (default: 2)")
    p.add_argument("--max-steps", type=int, default=80, help="mgu: iteration cap (default: 80)")
    p.add_argument("--batch-size", type=int, default=8, help="mgu: images at once (default: 8)")
    p.add_argument("--backbone", choices=tuple(common.BACKBONES),
                   help="gpu, memory, training, scores (default: resnet50; training on a CPU: mobilenet_v3_large)")
    p.add_argument("--crop", type=int, nargs=2, help="training: pixels (default: 512 512 on CUDA, else 180 240)")
    p.add_argument("--device", help="cuda or cpu (default: cuda where there is a GPU)")
    args = p.parse_args()
    device = common.setup(args.device)
    sections = dict(gpu=lambda: bench_gpu(args, device), memory=lambda: bench_memory(args),
                    metrics=lambda: bench_metrics(args.small), mgu=lambda: bench_mgu(args, device),
                    training=lambda: bench_training(args, device), scores=lambda: bench_scores(args, device))
    for section, bench in sections.items():
        if args.section in (section, "all"):
            bench()


if __name__ == "__main__":
    main()
