"""The four scripts on a GPU, beside the same on the CPU. Skipped where there is none; about two minutes where there is.

TEST_CUDA_ON=cpu python -m pytest -q tests/test_cuda.py runs on the CPU what can be: it tries the tests themselves."""
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import runner
import toy
from conftest import GPU
from runner import REPO, finish, lines, run, start, wait_for

ON = os.environ.get("TEST_CUDA_ON", "cuda")
pytestmark = pytest.mark.skipif(ON == "cuda" and GPU is None, reason="needs a GPU")
cuda_only = pytest.mark.skipif(ON != "cuda", reason="needs a GPU")
VISIBLE = dict(CUDA_VISIBLE_DEVICES=GPU or "", CUBLAS_WORKSPACE_CONFIG=":4096:8")
# float32 without TF32, for comparisons: the scripts themselves allow TF32 in training
FLOAT32 = dict(VISIBLE, NVIDIA_TF32_OVERRIDE="0", before=(
    "import common, torch\nsetup = common.setup\ncommon.setup = lambda device=None, tf32=False: setup(device)\n"
    "torch.nn.Dropout.forward = torch.nn.Dropout2d.forward = lambda self, x: x"))   # other masks on another device
BF16 = dict(VISIBLE, before=FLOAT32["before"].splitlines()[-1].replace("torch.nn", "import torch\ntorch.nn", 1))

# One model at a time on both devices: the logits, Eq. 5 and its gradient, against float64 on the CPU
MODELS = """
import json, sys
import torch
import common
device = torch.device(sys.argv[1])
torch.set_num_threads(4)
found = {}
for arch, backbone in (("deeplabv3", "resnet50"), ("pspnet", "resnet50"), ("fpn", "mobilenet_v2"),
                       ("deeplabv3", "mobilenet_v3_large")):
    torch.manual_seed(0)
    f = common.Segmenter(arch, backbone, 5, width=32).train()
    for m in f.modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)):
            m.p = 0.0
    X, Z = torch.rand(2, 3, 65, 97), torch.randint(0, 5, (2, 65, 97), dtype=torch.uint8)

    def work(f, X, precision):
        f.zero_grad()
        device = X.device.type
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = f(X)
        assert logits.device == X.device and logits.dtype == torch.float32
        loss = common.objective(logits, Z.to(X.device), (Z == 3).to(X.device), 0.05, "er")
        loss.backward()
        gradient = torch.cat([p.grad.double().flatten().cpu() for p in f.classifier.parameters()])
        return logits.detach().double().cpu(), float(loss.detach()), gradient
    exact = work(f.double(), X.double(), "float32")
    f = f.float().to(device, memory_format=torch.channels_last)
    for precision in ("float32", "tf32", "bf16"):
        logits, loss, gradient = work(f, X.to(device, memory_format=torch.channels_last), precision)
        found[f"{arch} {backbone} {precision}"] = [
            float((logits - exact[0]).norm() / exact[0].norm()), abs(loss / exact[1] - 1),
            float((gradient - exact[2]).norm() / exact[2].norm())]
print(json.dumps(found))
"""

# The group of torchrun, its collectives on the CPU (gloo) and on the GPU (NCCL), with one process
GROUP = """
import os, sys
import torch
import common, pretrain
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
device = torch.device(sys.argv[1])
if device.type == "cuda":
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
assert common.all_sum(torch.tensor([3, 4])).tolist() == [3, 4]
assert common.all_sum(torch.tensor([1.5, 2.5], device=device)).tolist() == [1.5, 2.5]
assert common.gather({"a": 1}) == [{"a": 1}]
with common.first_rank_first():
    pass
common.barrier()
f = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(device)
loss = f(torch.rand(2, 3, 5, 5, device=device)).square().mean()
loss.backward()
before, mean = [p.grad.clone() for p in f.parameters()], f[1].running_mean.clone()
common.world = lambda: 2
pretrain.sum_over_ranks(loss.detach(), f, type("args", (), {"bn": "train"}))
assert all(torch.equal(p.grad, g) for p, g in zip(f.parameters(), before))
torch.testing.assert_close(f[1].running_mean, mean / 2)      # as if a second process had had zeros
torch.distributed.destroy_process_group()
print("all well")
"""


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    """Processes forked from one that has imported torch see the GPU; where they do not, each starts from nothing."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.py").write_text(f"import torch\ntorch.ones(2, device='{ON}').sum().item()\n")
    done = run(folder / "probe.py", folder=folder, **VISIBLE)
    if done.code:
        warnings.warn(f"forked processes do not see the GPU: {done.err[-300:]}")
        runner.processes = multiprocessing.get_context("spawn")
        done = run(folder / "probe.py", folder=folder, **VISIBLE)
    assert done.code == 0, f"CUDA does not work at all:\n{done.err}"


@pytest.fixture(scope="module")
def runs(works, small, tmp_path_factory):
    """{name: what to call for a finished run, with its folder}: all that do not need each other, a few at a time."""
    ckpt, root = small / "pretrained.pt", ("--root", small / "toy")
    train = ("pretrain.py", *root, "--epochs", 4, "--batch-size", 4, "--crop", 54, 96, "--lr", 1e-4, "--schedule",
             "constant", "--save-every", 0)
    mgu = ("mgu_generate.py", "--ckpt", ckpt, *root, "--per-class", 1, "--max-steps", 6, "--batch-size", 3,
           "--out", "set")
    score = ("evaluate.py", "--ckpt", ckpt, *root, "--panels", 1, "--crf-iterations", 2, "--score", "msp", "entropy",
             "maxlogit", "energy", "crf")
    photo = ("evaluate.py", "--ckpt", ckpt, "--images", next((small / "toy/test/images").rglob("0.png")))
    cpu, gpu = ("--device", "cpu"), ("--device", ON)
    folders = {}

    def go(name, args, more):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        if name.endswith(".py"):
            (folder / name).write_text(args[0])
            args = (folder / name, *args[1:])
        begun = time.time()
        done = run(*args, folder=folder, **more)
        done.folder, done.seconds = folder, time.time() - begun
        return done

    jobs = {"train compiled": ((*train, *gpu, "--precision", "float32", "--compile"), FLOAT32),
            "models.py": ((MODELS, ON), VISIBLE),
            "train": ((*train, *gpu, "--precision", "float32"), FLOAT32),
            "mgu cpu": ((*mgu, *cpu), {}), "train cpu": ((*train, *cpu), FLOAT32),
            "train bf16": ((*train, *gpu, "--precision", "bf16"), BF16),
            "train by default": (train, VISIBLE),
            "mgu": ((*mgu, *gpu), FLOAT32), "mgu by default": ((*mgu, *gpu), VISIBLE),
            "mgu again": ((*mgu, *gpu), VISIBLE),
            "evaluate": ((*score, *gpu), VISIBLE), "evaluate cpu": ((*score, *cpu), {}),
            "photo": ((*photo, *gpu), VISIBLE), "photo cpu": ((*photo, *cpu), {}),
            "group.py": ((GROUP, ON), VISIBLE)}
    if ON != "cuda" or not shutil.which("gcc"):
        del jobs["train compiled"]
    if ON == "cuda":
        jobs["another device"] = ((*train, "--device", "cuda:7"), VISIBLE)
        jobs["no memory"] = (mgu, dict(VISIBLE, before=capped(0.01)))
    with ThreadPoolExecutor(5) as pool:
        futures = {name: pool.submit(go, name, *job) for name, job in jobs.items()}
        mgu_cpu = futures["mgu cpu"].result()
        assert mgu_cpu.code == 0, mgu_cpu.err
        tune = ("finetune.py", "--ckpt", ckpt, *root, "--aux", mgu_cpu.folder / "set", "--epochs", 2, "--batch-size", 4,
                "--bn", "frozen", "--loss", "er", "--alpha", 0.05, "--lr", 1e-6, "--save-every", 0)
        for name, job in {"tune": ((*tune, *gpu, "--precision", "float32"), FLOAT32),
                          "tune cpu": ((*tune, *cpu), FLOAT32),
                          "tune bf16": ((*tune, *gpu, "--precision", "bf16"), BF16)}.items():
            futures[name] = pool.submit(go, name, *job)

        def finished(name, code=0):
            done = futures[name].result()
            assert done.code == code, f"{name}: exit {done.code}\n{done.out}\n{done.err}"
            if done.err and not code:
                warnings.warn(f"{name} said on stderr: {done.err[:500]}")
            return done
        yield finished


def capped(gib):
    """Code that leaves a process so many GiB of the GPU."""
    return ("import torch\ntotal = torch.cuda.get_device_properties(0).total_memory\n"
            f"torch.cuda.set_per_process_memory_fraction({gib} * 2**30 / total, 0)")


def losses(folder, name="pretrained"):
    values = [json.loads(line) for line in lines(folder / f"{name}.jsonl")]
    return np.array([v["loss"] for v in values if "loss" in v])


def stored(folder):
    """The checkpoint as it is in the file; on the CPU, for this process sees no GPU."""
    return torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=True)


def apart(a, b):
    """‖a − b‖ / ‖b‖ over two lists of tensors."""
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (a, b))
    return float((a - b).norm() / b.norm())


# ──────────────────────────────────────────── numbers beside the CPU's ────────────────────────────────────────────

def test_models_losses_and_gradients(runs):
    """Relative errors of logits, Eq. 5 and the last layer's gradient against float64. A deep network of random weights
    amplifies rounding (on a CPU: float32 1e-4, bf16 0.7 of the logits), the loss and its gradient average over it."""
    found = json.loads(runs("models.py").out.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert len(found) == 12
    bounds = dict(float32=(2e-3, 1e-4, 1e-3), tf32=(0.4, 0.01, 0.1), bf16=(1.2, 0.03, 0.3))
    for name, errors in found.items():
        assert all(e < bound for e, bound in zip(errors, bounds[name.split()[-1]])), (name, errors)


def test_first_losses_of_pretraining(runs):
    """Four steps of batch 4: the first within rounding, then what Adam's division by |g| makes of it."""
    expected, found, bf16 = (losses(runs(n).folder) for n in ("train cpu", "train", "train bf16"))
    assert len(expected) == len(found) == len(bf16) == 4
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    np.testing.assert_allclose(bf16[0], expected[0], rtol=0.02)
    np.testing.assert_allclose(bf16, expected, rtol=0.05)
    if ON == "cuda":
        assert not np.array_equal(bf16, found)


def test_defaults(runs):
    """Without --device the GPU is taken, with bf16 and eight loader processes."""
    done = runs("train by default")
    assert ("CPU threads" in done.out) == (ON != "cuda")
    assert len(losses(done.folder)) == 4
    log = [json.loads(line) for line in lines(done.folder / "pretrained.jsonl")]
    if ON == "cuda":
        assert all(v["gib"] > 0 and v["micro_batch"] >= 4 for v in log if "loss" in v)
    assert any("miou" in v for v in log) and (done.folder / "pretrained.png").exists()


def test_compiled(runs):
    if ON != "cuda" or not shutil.which("gcc"):
        pytest.skip("needs a GPU and a C compiler")
    done = runs("train compiled")
    np.testing.assert_allclose(losses(done.folder), losses(runs("train").folder), rtol=0.02)
    assert not any("_orig_mod" in k for k in stored(done.folder)["model"])


def samples(folder):
    return {p.name: common.load_sample(p) for p in sorted((folder / "set").glob("*.npz"))}


def test_flips_of_mgu(runs, small):
    """The same pixels, but for those that lie on the boundary; and what is stored fools f on the CPU too."""
    expected = samples(runs("mgu cpu").folder)
    figures = json.loads((runs("mgu cpu").folder / "set/manifest.json").read_text())["figures"]["all"]
    f, _ = common.load_checkpoint(small / "pretrained.pt")
    assert len(expected) >= 8 and sum(s["unknown"].sum() for s in expected.values()) > 200
    # TF32 moves pixels to and fro along the boundary in other iterations: other paths, the same D_s
    for name, bound, furthest in (("mgu", 0.02, 1), ("mgu by default", 0.1, 3)):
        found = samples(runs(name).folder)
        assert list(found) == list(expected)
        differ = union = wrong = moved = 0
        for key, sample in found.items():
            other = expected[key]
            assert abs(int(sample["history"][0]) - int(other["history"][0])) <= 2 + 0.002 * other["history"][0]
            differ += (sample["unknown"] != other["unknown"]).sum()
            union += (sample["unknown"] | other["unknown"]).sum()
            moved = max(moved, np.abs(sample["image"].astype(float) - other["image"]).mean())
            X = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None]
            with torch.no_grad():
                wrong += (f(common.to_input(X))[0].argmax(0).numpy() == sample["y"])[sample["unknown"]].sum()
        mine = json.loads((runs(name).folder / "set/manifest.json").read_text())["figures"]["all"]
        print(name, "D_s differs in", differ, "of", union, "· unflipped on the CPU", wrong, "· mean |ΔX'|", moved,
              "· flip rate", mine["flip_rate"], figures["flip_rate"])
        assert differ <= bound * union and moved < furthest
        assert wrong <= 0.005 * union, "D_s on the GPU is not D_s on the CPU"
        assert abs(mine["flip_rate"] - figures["flip_rate"]) < 100 * bound


def test_mgu_again(runs):
    """Deterministic: the same bytes in both runs."""
    one, two = (samples(runs(n).folder) for n in ("mgu by default", "mgu again"))
    assert list(one) == list(two)
    for key in one:
        assert all(np.array_equal(v, two[key][k]) for k, v in one[key].items()), key


def test_first_losses_of_fine_tuning(runs):
    """Eq. 5 with both terms, frozen batch norm. A small rate, for L_ER is steep near one-hot and Adam divides by
    |g|: at 1e-4 a loss of 32 was 36 on a GPU after eight steps in float32, and one of 26 was 41 in bf16 on a CPU."""
    expected, found, bf16 = (losses(runs(n).folder, "ft") for n in ("tune cpu", "tune", "tune bf16"))
    assert len(expected) == len(found) == len(bf16) >= 4
    print("float32", np.abs(found / expected - 1).max(), "bf16", np.abs(bf16 / expected - 1).max())
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    np.testing.assert_allclose(bf16, expected, rtol=0.1)


def test_scores_and_metrics(runs):
    """All metrics within 0.3 points (few pixels, and many scores that differ in the last bit), mIoU within 0.2."""
    one, two = (json.loads((runs(n).folder / "results/results.json").read_text())["rows"]
                for n in ("evaluate cpu", "evaluate"))
    assert [(r["model"], r["score"]) for r in one] == [(r["model"], r["score"]) for r in two] and len(one) == 5
    for a, b in zip(one, two):
        for kind in ("pooled", "per_image"):
            for k, v in a[kind].items():
                assert abs(v - b[kind][k]) < 0.3, (a["score"], kind, k, v, b[kind][k])
        assert abs(a["miou"] - b["miou"]) < 0.2
    one, two = (np.load(next((runs(n).folder / "results").glob("*_score.npy"))) for n in ("photo cpu", "photo"))
    assert one.shape == two.shape and np.abs(one - two).max() < 5e-3


# ─────────────────────────────────────────────── interruptions ───────────────────────────────────────────────

def test_stopped_killed_and_continued(works, small, tmp_path):
    """SIGTERM, then SIGKILL, then to the end: every step once, and the losses of a run without interruptions."""
    command = ("finetune.py", "--ckpt", small / "pretrained.pt", "--root", small / "toy", "--known-unknown", "car",
               "pole", "--epochs", 20, "--batch-size", 2, "--bn", "frozen", "--lr", 1e-4, "--precision", "float32",
               "--save-every", 0, "--workers", 2, "--device", ON)
    (tmp_path / "whole").mkdir()
    whole = start(*command, folder=tmp_path / "whole", **FLOAT32)
    stopped = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        count = len(lines(tmp_path / "ft.jsonl")) + 5
        p = start(*command, folder=tmp_path, **FLOAT32)
        if wait_for(lambda: len(lines(tmp_path / "ft.jsonl")) >= count and (tmp_path / "ft.pt").exists(), p):
            os.kill(p.pid, number)
        done = finish(p, tmp_path)
        stopped += done.code in (128 + signal.SIGTERM, -signal.SIGKILL)
    assert stopped == 2, (done.code, done.err)
    done = run(*command, folder=tmp_path, **FLOAT32)
    assert done.code == 0 and "continuing ft.pt from epoch" in done.out, done.err
    done = finish(whole, tmp_path / "whole")
    assert done.code == 0, done.err
    steps = [json.loads(line)["step"] for line in lines(tmp_path / "ft.jsonl")]
    assert steps == list(range(1, 61))
    np.testing.assert_allclose(losses(tmp_path, "ft"), losses(tmp_path / "whole", "ft"), rtol=0.01)


# ──────────────────────────────────────────── memory that runs out ────────────────────────────────────────────

@cuda_only
def test_out_of_memory_halves(works, tmp_path):
    """A run that is left too little memory for 8 images takes the step of one that was told the smaller number: the
    gradient (with frozen batch norm that of the whole batch), and batch norm's averages and counters."""
    toy.write_toy(str(tmp_path / "toy"), seed=3, counts=(8, 1, 1))
    off = "\ntype(torch.backends.cudnn).benchmark = False"   # whose search takes what memory there is
    command = ("pretrain.py", "--root", tmp_path / "toy", "--epochs", 1, "--batch-size", 8, "--crop", 384, 640,
               "--scale", 3, 3, "--lr", 1e-4, "--precision", "float32", "--workers", 0, "--save-every", 0)
    model = lambda n: stored(tmp_path / n)
    gradient = lambda n: [s["exp_avg"] for s in model(n)["optimiser"]["state"].values()]

    def together(jobs):
        ps = {}
        for name, (flags, before) in jobs.items():
            (tmp_path / name).mkdir()
            ps[name] = start(*command, *flags, folder=tmp_path / name,
                             **dict(FLOAT32, before=FLOAT32["before"] + off + "\n" + before))
        done = {name: finish(p, tmp_path / name) for name, p in ps.items()}
        for name, d in done.items():
            assert d.code == 0, f"{name}: {d.out}\n{d.err}"
        return done
    together({n: (("--micro-batch", 8, "--bn", n), "") for n in ("train", "frozen")})
    gib = {n: json.loads(lines(tmp_path / n / "pretrained.jsonl")[0])["gib"] for n in ("train", "frozen")}
    found, capped_in = {}, {}
    for share in (0.72, 0.5, 0.36, 0.26):       # the peak holds workspaces of cuDNN, which takes less where it must
        jobs = {f"{n} {share}": (("--bn", n), capped(share * g)) for n, g in gib.items() if n not in found}
        for name, d in together(jobs).items():
            halvings = re.findall(r"going on with --micro-batch (\d)", d.out)
            if halvings:
                found[name.split()[0]], capped_in[name.split()[0]] = int(halvings[-1]), name
    print("GiB of 8 images", gib, "· halved to", found, capped_in)
    assert set(found) == set(gib), "no cap bit"
    micro = found["train"]
    assert micro in (2, 4)
    together({"smaller": (("--micro-batch", micro, "--bn", "train"), "")})

    one, two = model(capped_in["train"])["model"], model("smaller")["model"]
    counters = [k for k in one if "num_batches" in k]
    assert counters and all(int(one[k]) == int(two[k]) == 8 // micro for k in counters)
    averages = [k for k in one if "running" in k]
    assert apart([one[k] for k in averages], [two[k] for k in averages]) < 1e-3
    assert apart(gradient(capped_in["train"]), gradient("smaller")) < 0.02
    assert apart(gradient(capped_in["frozen"]), gradient("frozen")) < 2e-3
    assert losses(tmp_path / capped_in["frozen"])[0] == pytest.approx(losses(tmp_path / "frozen")[0], rel=1e-5)


@cuda_only
def test_too_little_memory_is_one_line(runs):
    done = runs("no memory", code=1)
    assert done.err.startswith("error: out of GPU memory: lower --batch-size") and done.err.count("\n") == 1, done.err


# ─────────────────────────────────────────────── devices, ranks ───────────────────────────────────────────────

@cuda_only
def test_a_gpu_that_is_not_there(runs):
    done = runs("another device", code=1)
    assert "--device cuda:7: this machine has 1 GPUs" in done.err and done.err.count("\n") == 1, done.err


def test_group_of_one(runs):
    assert "all well" in runs("group.py").out


def test_torchrun(works, small, tmp_path):
    """One process under torchrun, as a user starts it."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1,
               REPO / "pretrain.py", "--root", small / "toy", "--epochs", 1, "--batch-size", 2, "--crop", 32, 48,
               "--workers", 1, *(("--device", ON) if ON != "cuda" else ()))
    done = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=dict(os.environ, **VISIBLE))
    assert done.returncode == 0, done.stderr
    assert common.load_checkpoint(Path(tmp_path, "pretrained.pt"))[1]["epoch"] == 1
