"""What a GPU or several processes would exercise, on a CPU in their place: autocast, a device that is not "cpu", loader
processes that are not forked, torch.compile, ranks, and what happens when the memory runs out."""
import argparse
import contextlib
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import evaluate
import finetune
import pretrain
from runner import NO_FIGURES, REPO, lines, run_ok, run_ranks

SIZE = (10, 12)
TINY = f"""
import common, torch
from torch import nn

class Images(torch.utils.data.Dataset):
    '''n images of random pixels and labels of 4 classes; every number is a function of the index.'''
    def __init__(self, n):
        g = torch.Generator().manual_seed(5)
        self.image = torch.randint(0, 256, (n, 3, *{SIZE}), generator=g, dtype=torch.uint8)
        self.label = torch.randint(0, 4, (n, *{SIZE}), generator=g, dtype=torch.uint8)
        self.label[torch.rand(n, *{SIZE}, generator=g) < torch.linspace(0, 0.8, n).view(n, 1, 1)] = common.IGNORED

    def __len__(self):
        return len(self.label)

    def name(self, i):
        return f"image {{i}}"

    def __getitem__(self, key):
        return dict(image=self.image[key[1]], label=self.label[key[1]], index=key[1])

class Net(nn.Module):
    arch, backbone_name, num_classes = "deeplabv3", "mobilenet_v3_large", 4
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)   # batch norm would take a bias away again
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    def outputs(self, X):
        return dict(logits=self.layers(X))
    def forward(self, X):
        return self.outputs(X)["logits"]
"""
tiny = {"__name__": "tiny"}
exec(TINY, tiny)
Images, Net = tiny["Images"], tiny["Net"]

RANK = TINY + """
import argparse, sys
import pretrain

def main():
    device = common.setup("cpu")
    parser = argparse.ArgumentParser()
    pretrain.training_flags(parser, "")
    args = parser.parse_args(sys.argv[1:])
    args.out, args.alpha, args.loss, args.epochs = "f.pt", 0, "er", 1
    pretrain.train(Net(), Images(8), args, device, dict(epochs=1), dict(stage="test"))

if __name__ == "__main__":
    common.cli(main)
"""


def loop_args(out, **more):
    """The flags of the training loop as they default, and what a test sets."""
    parser = argparse.ArgumentParser()
    pretrain.training_flags(parser, "")
    args = parser.parse_args([])
    vars(args).update(dict(out=str(out), epochs=1, batch_size=8, lr=1e-3, schedule="constant", bn="train", alpha=0,
                           loss="er"), **more)
    return args


@pytest.fixture
def signals(monkeypatch):
    """The loop in this process, without its hands on the signals."""
    monkeypatch.setattr(pretrain, "catch_signals", list)


def losses(path):
    return [v["loss"] for v in map(json.loads, lines(path)) if "loss" in v]


def gxx():
    return shutil.which("g++") or shutil.which("clang++")


# ───────────────────────────────────────────────── autocast ─────────────────────────────────────────────────

def test_bf16_through_the_training_loop(small, tmp_path):
    """pretrain.py --precision bf16 computes in bf16, and its losses are near those of float32."""
    command = ("pretrain.py", "--root", small / "toy", "--epochs", 1, "--batch-size", 4, "--crop", 54, 96,
               "--lr", 1e-3, "--device", "cpu")
    watch = ("import torch\nwhole, seen = torch.nn.functional.conv2d, set()\n"
             "forward = torch.nn.Conv2d.forward\n"
             "def conv(self, x):\n    y = forward(self, x)\n    seen.add(str(y.dtype))\n"
             "    open('types', 'w').write(' '.join(sorted(seen)))\n    return y\ntorch.nn.Conv2d.forward = conv")
    found = {}
    for precision in ("float32", "bf16"):
        run_ok(*command, "--precision", precision, "--out", f"{precision}.pt", folder=tmp_path, before=watch)
        found[precision] = losses(tmp_path / f"{precision}.jsonl")
        # validation is in float32 in either case
        assert (tmp_path / "types").read_text() == ("torch.bfloat16 " if precision == "bf16" else "") + "torch.float32"
    assert found["bf16"] != found["float32"]
    np.testing.assert_allclose(found["bf16"], found["float32"], rtol=0.02)
    state = torch.load(tmp_path / "bf16.pt", weights_only=True)["model"]
    assert not any(v.dtype == torch.bfloat16 for v in state.values())


class Types(TorchDispatchMode):
    """The names of the operations that had a bf16 result, forward and backward."""

    def __init__(self):
        super().__init__()
        self.bf16 = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16:
            self.bf16.add(function.__name__.split(".")[0])
        return out


@pytest.mark.parametrize("arch", common.ARCHS)
def test_what_sums_many_terms_is_in_float32_under_autocast(arch):
    """Upsampling, whose backward sums up to thousands of terms in the type of its result, softmax, loss."""
    f = common.Segmenter(arch, "mobilenet_v2", 5, width=32).train()
    X, Z = torch.rand(2, 3, 65, 97), torch.randint(0, 5, (2, 65, 97), dtype=torch.uint8)
    with Types() as types:
        with torch.autocast("cpu", torch.bfloat16):
            logits = f(X)
        common.objective(logits, Z, Z == 3, 0.05, "er").backward()
    assert logits.dtype == torch.float32
    assert "convolution" in types.bf16
    assert not [n for n in types.bf16 if "upsample" in n or "softmax" in n or "nll" in n or n in ("exp", "log")]


# ─────────────────────────────────────────── a device that is not "cpu" ───────────────────────────────────────────

@pytest.fixture
def fake():
    """Tensors on "cuda" that have a shape, a type and a device, and no values: a mix of devices is an error."""
    with FakeTensorMode():
        yield torch.device("cuda")


def test_a_mix_of_devices_is_found(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=fake) + torch.zeros(3)


@pytest.mark.parametrize("arch", common.ARCHS)
def test_models_losses_and_scores_stay_on_their_device(fake, arch):
    with fake:
        f = common.Segmenter(arch, "mobilenet_v3_large", 12, width=32)
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    Z = torch.randint(0, 12, (2, 64, 96), dtype=torch.uint8)
    logits = f(common.to_input(image, fake))
    assert logits.device.type == "cuda" and logits.shape == (2, 12, 64, 96)
    for loss in ("er", "kl"):
        for counts in ((None, None), (7000, 300)):
            value = common.objective(logits, Z.to(fake), (Z == 3).to(fake), 0.05, loss, *counts)
            assert value.device.type == "cuda" and value.shape == ()
    S = common.log_softmax(logits)
    y = torch.zeros(2, dtype=torch.int64, device=fake)
    assert common.loss_mgu(S, (Z == 3).to(fake), y).device.type == "cuda"
    for score in evaluate.PLAIN.values():
        assert score(logits).device.type == "cuda"
    assert evaluate.log_mean_softmax([logits, logits]).device.type == "cuda"
    assert evaluate.dropout_log_S(f.eval(), common.to_input(image, fake), 2).device.type == "cuda"
    if arch == common.ARCHS[0]:        # the CRF sees no model, and takes a second
        assert evaluate.crf_log_S(S, 2).device.type == "cuda"


# ────────────────────────────────────────────── loader processes ──────────────────────────────────────────────

def test_data_sets_can_be_sent_to_a_process(small, tmp_path):
    """What a loader process that is not forked gets is a pickled copy: the same items, and the cache not with it."""
    scenes = [pretrain.TrainingScenes("toy", str(small / "toy"), "train", crop=(32, 48), scale=(0.5, 2), cache=cache)
              for cache in (None, tmp_path / "cache")]
    run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 1, "--max-steps", 2, "--out", "set",
           "--device", "cpu", folder=tmp_path, before=NO_FIGURES)
    sets = [*scenes, finetune.AuxiliarySet(tmp_path / "set", small / "toy", 0, "flipped", "aux")]
    for data in sets:
        sent = pickle.dumps(data)
        assert len(sent) < 100_000
        for key in ((0, 1), (3, 2)):
            one, two = data[key], pickle.loads(sent)[key]
            assert one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k]))
                                                    for k in one)


def test_spawned_loader_processes_change_nothing(small, tmp_path):
    """Two processes, and one by the start method of macOS and Windows: the same bits as without any."""
    command = ("pretrain.py", "--root", small / "toy", "--epochs", 2, "--batch-size", 3, "--crop", 32, 48,
               "--lr", 1e-3, "--device", "cpu", "--val-every", 2)
    spawn = "import torch.multiprocessing as m\nm.set_start_method('spawn', force=True)"
    run_ok(*command, "--workers", 0, "--out", "none.pt", folder=tmp_path)
    run_ok(*command, "--workers", 1, "--out", "spawn.pt", folder=tmp_path, before=spawn)
    run_ok(*command, "--workers", 2, "--out", "default.pt", folder=tmp_path)
    states = [torch.load(tmp_path / f"{n}.pt", weights_only=True)["model"] for n in ("none", "spawn", "default")]
    for state in states[1:]:
        assert all(torch.equal(v, state[k]) for k, v in states[0].items())
    assert losses(tmp_path / "none.jsonl") == losses(tmp_path / "spawn.jsonl") == losses(tmp_path / "default.jsonl")


def test_a_run_with_loader_processes_ends_on_a_signal(small, tmp_path):
    """In a plain process, since the loader processes ignore signals, and Python waits for its children. (One that ends
    by itself: test_scripts.pipeline.)"""
    command = [sys.executable, REPO / "pretrain.py", "--root", small / "toy", "--batch-size", 2, "--crop", 32, 48,
               "--workers", 2, "--device", "cpu", "--val-every", 1000, "--epochs", 1000, "--out", "long.pt"]
    with open(tmp_path / "long.txt", "w") as said:
        p = subprocess.Popen([*map(str, command)], stdout=said, cwd=tmp_path, start_new_session=True)
    try:
        end = time.time() + 300
        while len(lines(tmp_path / "long.jsonl")) < 5 and p.poll() is None and time.time() < end:
            time.sleep(0.05)
        os.killpg(p.pid, signal.SIGTERM)            # the loader processes get it too, as from a scheduler
        assert p.wait(120) == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)


# ──────────────────────────────────────────────── torch.compile ────────────────────────────────────────────────

@pytest.mark.skipif(not gxx(), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_is_the_same(tmp_path, signals):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    for out, more in (("plain", {}), ("compiled", dict(compile=True))):
        graphs.clear()
        pretrain.train(Net(), Images(8), loop_args(tmp_path / f"{out}.pt", epochs=3, micro_batch=4, **more),
                       torch.device("cpu"), dict(epochs=3, schedule="constant"), dict(stage="test"))
        assert (graphs["unique_graphs"] > 0) == (out == "compiled")
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["model"] for n in ("plain", "compiled"))
    assert list(one) == list(two), "the names of a compiled module got into the checkpoint"
    np.testing.assert_allclose(losses(tmp_path / "compiled.jsonl"), losses(tmp_path / "plain.jsonl"), rtol=1e-5)
    for k, v in one.items():
        torch.testing.assert_close(two[k], v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", common.ARCHS)
def test_a_model_is_one_graph(arch):
    """torch.compile finds nothing in f that it has to leave to Python."""
    torch._dynamo.reset()
    f = common.Segmenter(arch, "mobilenet_v2", 5, width=32).eval()
    X = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(X), f(X))


# ─────────────────────────────────────────────────── ranks ───────────────────────────────────────────────────

def ranks(folder, *args, before=""):
    (folder / "rank.py").write_text(RANK)
    run_ranks(folder / "rank.py", "--batch-size", 8, "--lr", 1e-3, "--schedule", "constant", *args, folder=folder,
              before=before)
    return torch.load(folder / "f.pt", weights_only=True)


def test_batch_norm_averages_are_the_mean_over_ranks(tmp_path):
    """One step of two processes, four images each: 0.9 · r₀ + 0.1 · a rank's statistics, and of these the mean."""
    state = ranks(tmp_path, "--bn", "train")["model"]
    data, norm = Images(8), Net().layers[1]
    shares = np.array_split(np.random.default_rng([0, 0]).permutation(8), 2)   # by epoch_batches' definition
    means, variances = [], []
    for share in shares:
        X = data.image[share].double() / 255
        x = Net().layers[0].double()(X).detach()                          # what batch norm sees: (4, 6, 10, 12)
        means.append(x.mean((0, 2, 3)))
        variances.append(x.transpose(0, 1).flatten(1).var(1))             # running_var is the unbiased one
    assert float((means[0] - means[1]).abs().max()) > 1e-3, "the ranks' statistics have to differ"
    for name, found in (("mean", means), ("var", variances)):
        before = getattr(norm, f"running_{name}").double()
        expected = 0.9 * before + 0.1 * (found[0] + found[1]) / 2
        torch.testing.assert_close(state[f"layers.1.running_{name}"].double(), expected, rtol=1e-5, atol=1e-6)


def test_mixed_backends(tmp_path):
    """CPU messages over gloo in a group with a backend for every device, as on GPUs: the same bits as gloo alone."""
    mixed = ("import torch.distributed as d\nfirst = d.init_process_group\n"
             "def init(backend):\n    first('cpu:gloo')\n    open('config', 'w').write(str(d.get_backend_config()))\n"
             "d.init_process_group = init")
    found = []
    for name, before in (("gloo", ""), ("mixed", mixed)):
        (tmp_path / name).mkdir()
        found.append(ranks(tmp_path / name, "--bn", "frozen", before=before)["model"])
    assert "cpu:gloo" in (tmp_path / "mixed/config").read_text()
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_synchronised_batch_norm(monkeypatch):
    """Every batch norm of f itself changes, with the parameters that the optimiser has; torch has it for GPUs alone,
    so what it computes is not run here."""
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    f = common.Segmenter("fpn", "mobilenet_v3_large", 4, width=8)
    before = dict(f.named_parameters()), dict(f.named_buffers())
    norms = [name for name, m in f.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    args = SimpleNamespace(sync_bn=True, micro_batch=4, compile=False, precision="float32")
    run = SimpleNamespace(cuda=True, batch_size=8, total=1, t=0)
    pretrain.prepare(f, args, run, torch.device("cpu"))
    changed = [name for name, m in f.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(norms) > 40 and changed == norms
    for kind, now in zip(before, (dict(f.named_parameters()), dict(f.named_buffers()))):
        assert kind.keys() == now.keys() and all(now[k] is v for k, v in kind.items())
    pretrain.freeze_batch_norm(f.train())
    assert not any(m.training for m in f.modules() if isinstance(m, torch.nn.SyncBatchNorm))
    for wrong, words in ((dict(micro_batch=None), "--sync-bn needs --micro-batch"), (dict(batch_size=7), "evenly"),
                         (dict(cuda=False), "--sync-bn: expected GPUs, found cpu")):
        changed = [SimpleNamespace(**{k: wrong.get(k, v) for k, v in vars(x).items()}) for x in (args, run)]
        with pytest.raises(common.InputError, match=words):
            pretrain.prepare(f, *changed, torch.device("cpu"))


# ──────────────────────────────────────────── memory that runs out ────────────────────────────────────────────

class Narrow(Net):
    """As if the memory held four images: a larger part fails, after batch norm has seen it."""

    def outputs(self, X):
        found = super().outputs(X)
        if len(X) > 4:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return found


def accumulated(f, micro, given):
    """Gradients, buffers and value of one step of 8 images; run.cuda says that the memory is a GPU's."""
    data = Images(8)
    batch = dict(image=data.image, label=data.label, unknown=torch.zeros_like(data.label, dtype=torch.bool))
    args = SimpleNamespace(micro_batch=given, seed=0, alpha=0, loss="er", bn="train")
    run = SimpleNamespace(f=f, cuda=True, micro=micro, t=0, optimiser=torch.optim.Adam(f.parameters()))
    n_k = int((data.label < 4).sum())
    eq5 = functools.partial(pretrain.eq5, args)
    loss = pretrain.gradient(f.train().outputs, batch, eq5, [n_k, 0], args, run, torch.device("cpu"))
    return [loss, *(p.grad for p in f.parameters()), *f.buffers()], run.micro


def test_out_of_memory_halves_and_leaves_no_trace(capsys):
    """The step is that of the smaller parts, bit by bit, batch norm's averages and their counter too."""
    halved, micro = accumulated(Narrow(), 8, None)
    expected, _ = accumulated(Net(), 4, 4)
    assert micro == 4 and "going on with --micro-batch 4" in capsys.readouterr().out
    assert len(halved) == len(expected) and all(torch.equal(a, b) for a, b in zip(halved, expected))
    whole, _ = accumulated(Net(), 8, 8)
    assert not torch.equal(whole[-2], expected[-2]), "batch norm does not see the parts: the test shows nothing"


def test_out_of_memory_with_a_size_that_was_asked_for():
    with pytest.raises(common.InputError, match="out of GPU memory with 8 images a forward pass: lower --micro-batch"):
        accumulated(Narrow(), 8, 8)


@pytest.mark.parametrize("n, micro, sizes", ((8, 8, [8]), (7, 2, [3, 2, 2]), (5, 4, [3, 2]), (256, 32, [32] * 8)))
def test_parts(n, micro, sizes):
    assert [len(part) for part in torch.arange(n).tensor_split(pretrain.n_parts(n, micro))] == sizes
