"""Speed and memory, each against a named baseline in the same run; never part of the tests.

    python tests/benchmark.py metrics                       # against scikit-learn; minutes
    python tests/benchmark.py mgu --ckpt pretrained.pt      # against Algorithm 1 image by image
    python tests/benchmark.py training                      # against a loop in the manner of torchvision's reference
    python tests/benchmark.py all --small                   # everything at toy size: does it run?
"""
import argparse
import contextlib
import copy
import io
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

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
                above=memory() - imported, level=histogram.level)


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
          f"{1e3 * runs[many]['seconds'] / many:.1f} ms a frame, level {runs[many]['level']}")


# ─────────────────────────────────────────────────── mgu ───────────────────────────────────────────────────

def literal_mgu(f, X, I, y, step, eta, max_steps):
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
        moved = eta * gradient.sign() if step == "sign" else eta * 255**2 * gradient
        X_aux = torch.where(P, (X_aux - moved).clamp(0, 255), X_aux)


class NoiseScenes:
    """What mgu_generate.generate() uses of common.Scenes: images of noise, made when asked for, labelled y everywhere."""
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
        mgu_generate.generate(f, NoiseScenes(shape, y), [(y, i) for i in range(images)], Path(folder), argparse.Namespace(
            batch_size=batch_size, step="sign", step_size=1.0, double_every=0, max_steps=3), torch.device("cpu"))
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
        jobs = [(k, X[k], top[k] == top[k].mode().values.mode().values, int(top[k].mode().values.mode().values)) for k in range(8)]
    cap = 5 if args.small else args.max_steps
    f = f.to(device)
    print(f"mgu: {len(jobs)} images of {tuple(jobs[0][1].shape[1:])}, {f.arch} on {f.backbone_name}, sign step of 1 grey level, "
          f"cap {cap}; {common.about_run(device)}")
    literal = copy.deepcopy(f).to(memory_format=torch.contiguous_format).requires_grad_(False)
    folded = mgu_generate.fold_batch_norm(f)
    ratios = []
    for turn in range(1 if args.small else args.repeat):
        synchronise(device)
        begun = time.perf_counter()
        slow = {k: literal_mgu(literal, X.to(device).float(), I.to(device), y, "sign", 1.0, cap) for k, X, I, y in jobs}
        synchronise(device)
        t_slow, begun = time.perf_counter() - begun, time.perf_counter()
        fast = {k: (X, history) for k, X, _, history in mgu_generate.mgu(folded, jobs, args.batch_size, "sign", 1.0, 0, cap, device)}
        synchronise(device)
        t_fast = time.perf_counter() - begun
        ratios.append(t_slow / t_fast)
        iterations = sum(len(h) for _, h in slow.values())
        print(f"  run {turn}: literal {len(jobs) / t_slow:.2f} images/s ({iterations / t_slow:.1f} iterations/s) · engine at batch "
              f"{args.batch_size} {len(jobs) / t_fast:.2f} images/s · ratio {ratios[-1]:.2f}", flush=True)
    same = [len(fast[k][1]) == len(slow[k][1]) for k in slow]
    apart = max(float((fast[k][0].float() - slow[k][0].cpu().round()).abs().mean()) for k in slow)
    X = jobs[0][1]
    per_image = 2 * common.forward_tflop(f, *X.shape[1:])   # forward, and as much again for the gradient of the input
    tflops = per_image * sum(len(h) for _, h in fast.values()) / t_fast
    for images, batch_size in ((16, 4), (64, 4), (64, 8)):
        peak = in_fresh_process(run_mgu, images // (8 if args.small else 1), batch_size, (54, 96) if args.small else (180, 240))
        print(f"  peak memory on a CPU above the imports, {images} images at --batch-size {batch_size}: {peak:.0f} MiB", flush=True)
    print(f"  ratio engine : literal, median of {len(ratios)}: {statistics.median(ratios):.2f}×; {tflops:.3f} TFLOP/s{common.share_of_peak(tflops, device)}"
          f"\n  same number of iterations in {sum(same)} of {len(same)} images; largest mean difference of X' {apart:.4f} grey levels")


# ────────────────────────────────────────────────── training ──────────────────────────────────────────────────

class RandomScenes(torch.utils.data.Dataset):
    """n images of noise with labels of noise: the cost of a step does not depend on what is in them."""

    def __init__(self, n, H, W):
        rng = np.random.default_rng(0)
        self.images = torch.from_numpy(rng.integers(0, 256, (8, 3, H, W), np.uint8))
        self.labels = torch.from_numpy(rng.integers(0, 12, (8, H, W)).astype(np.uint8))
        self.n = n

    def __len__(self):
        return self.n

    def name(self, i):
        return f"noise {i}"

    def __getitem__(self, key):
        i = key[1] if isinstance(key, tuple) else key
        return dict(image=self.images[i % 8], label=self.labels[i % 8], index=i)


def reference_loop(f, data, batch, warm, device):
    """A plain loop in the manner of torchvision's references/segmentation: float32, contiguous, loss read every step."""
    optimiser = torch.optim.Adam(f.parameters(), lr=1e-4)
    f.train()
    for step, item in enumerate(torch.utils.data.DataLoader(data, batch, shuffle=True, drop_last=True)):
        if step == warm:
            begun = time.perf_counter()
        loss = F.cross_entropy(f((item["image"].float() / 255).to(device)), item["label"].long().to(device), ignore_index=common.IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()
    return (step + 1 - warm) * batch / (time.perf_counter() - begun)


def our_loop(f, data, batch, warm, device, precision, compile=False):
    """common.train itself, on the same data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = argparse.Namespace(out=f"{folder}/x.pt", epochs=1, batch_size=batch, micro_batch=None, lr=1e-4, schedule="constant", seed=0,
                                  bn="train", precision=precision, sync_bn=False, compile=compile, workers=0, save_every=1e9, restart=False,
                                  alpha=0, loss="er")
        pretrain.train(f, data, args, device, dict(epochs=1), dict(arch=f.arch, backbone=f.backbone_name, classes=[""] * 12, data="toy", root=None, anomaly=None))
        lines = [json.loads(line) for line in Path(folder, "x.jsonl").read_text().splitlines()]
    interval = lines[1]["step"] - lines[0]["step"]   # how often the loop looks at the clock
    first = next(v for v in lines if v["step"] >= warm or v["step"] >= interval)
    return (lines[-1]["step"] - first["step"]) * batch / (lines[-1]["seconds"] - first["seconds"])


def bench_training(args, device):
    cuda = device.type == "cuda"
    backbone = args.backbone or ("resnet50" if cuda else "mobilenet_v3_large")
    H, W = args.crop or ((512, 512) if cuda else (180, 240))
    batch, steps = (16, 100) if cuda else (8, 8)
    if args.small:
        H, W, batch, steps = 48, 64, 2, 4
    print(f"training: deeplabv3 on {backbone}, batch {batch}, {H}×{W}; {common.about_run(device)}")
    data, warm = RandomScenes(batch * steps, H, W), 20 if cuda else 2
    make = lambda: common.Segmenter("deeplabv3", backbone, 12).to(device)
    plain, ours = make(), make().to(memory_format=torch.channels_last)
    rates = {"plain loop, float32": [], "ours, float32": [], "ours, bf16": []}
    for _ in range(1 if args.small else args.repeat):   # in turn: the machine's speed drifts
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        rates["plain loop, float32"].append(reference_loop(plain, data, batch, warm, device))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        for precision in ("float32", "bf16"):
            rates[f"ours, {precision}"].append(our_loop(ours, data, batch, warm, device, precision))
    work = 3 * common.forward_tflop(ours, H, W)   # forward, gradients of inputs and of weights
    for name, r in rates.items():
        ratio = statistics.median(a / b for a, b in zip(r, rates["plain loop, float32"]))
        tflops = work * statistics.median(r)
        print(f"  {name:20} {statistics.median(r):7.1f} images/s (from {min(r):.1f} to {max(r):.1f}) · {ratio:.2f}× the plain loop · "
              f"{tflops:.2f} TFLOP/s{common.share_of_peak(tflops, device)}")
    if cuda:
        print(f"  peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    for arch, backbone in (("deeplabv3", "resnet50"), ("pspnet", "resnet50"), ("deeplabv3", "resnet101")):
        f = common.Segmenter(arch, backbone, 12)
        sizes = {size: common.forward_tflop(f, *size) for size in ((720, 1280), (512, 512))}
        print(f"  {arch} on {backbone}: " + "; ".join(f"{v:.3f} TFLOP forward, {3 * v:.2f} a training image at {h}×{w}" for (h, w), v in sizes.items()))
    bench_input(args)


def bench_input(args):
    """Images a second that one process decodes and augments, from PNG files and from the decoded cache."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        H, W, n = (108, 192, 4) if args.small else (720, 1280, 24)
        smooth = np.asarray(common.Image.fromarray(rng.integers(0, 256, (H // 8, W // 8, 3), np.uint8)).resize((W, H), common.Image.BILINEAR))
        for kind in ("images", "annotations"):
            path = Path(folder, "train", kind, "training", "t1-3")
            path.mkdir(parents=True)
            for split in ("train/{}/validation/t4", "test/{}/test/t5"):
                Path(folder, split.format(kind)).mkdir(parents=True)
            for i in range(n):
                noisy = (smooth.astype(np.int16) + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
                common.Image.fromarray(noisy if kind == "images" else np.full((H, W), 8, np.uint8)).save(path / f"{i}.png")
        for name, cache in (("PNG files", None), ("decoded cache", Path(folder, "cache"))):
            scenes = common.Scenes("streethazards", folder, "train", crop=(min(H, 512), min(W, 512)), scale=(0.5, 2.0), cache=cache)
            begun = time.perf_counter()
            for k in range(3 if cache else 1):
                for i in range(n):
                    scenes[k, i]
            print(f"  input, {name} of {H}×{W}, augmented to 512×512: {(3 if cache else 1) * n / (time.perf_counter() - begun):.0f} images/s a process")


def main():
    p = argparse.ArgumentParser(description="Speed and memory against named baselines.")
    p.add_argument("section", choices=("metrics", "mgu", "training", "all"))
    p.add_argument("--small", action="store_true", help="tiny sizes: only to see that it runs")
    p.add_argument("--repeat", type=int, default=5, help="runs of each side, in turn (default: 5)")
    p.add_argument("--ckpt", help="mgu: checkpoint of pretrain.py (default: random weights)")
    p.add_argument("--root", help="mgu: folder of its dataset (default: the checkpoint's)")
    p.add_argument("--per-class", type=int, default=2, help="mgu: images of each class (default: 2)")
    p.add_argument("--max-steps", type=int, default=80, help="mgu: iteration cap (default: 80)")
    p.add_argument("--batch-size", type=int, default=8, help="mgu: images at once (default: 8)")
    p.add_argument("--backbone", choices=tuple(common.BACKBONES), help="training (default: resnet50 on CUDA, else mobilenet_v3_large)")
    p.add_argument("--crop", type=int, nargs=2, help="training: pixels (default: 512 512 on CUDA, else 180 240)")
    p.add_argument("--device", help="cuda or cpu (default: cuda where there is a GPU)")
    args = p.parse_args()
    device = common.setup(args.device)
    for section, bench in (("metrics", lambda: bench_metrics(args.small)), ("mgu", lambda: bench_mgu(args, device)),
                           ("training", lambda: bench_training(args, device))):
        if args.section in (section, "all"):
            bench()


if __name__ == "__main__":
    main()
