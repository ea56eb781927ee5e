"""The training loop: Eq. 5 whole or in parts, on one process or two; interruptions, other settings, damaged files."""
import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn

import common
import pretrain
from runner import NO_FIGURES, lines, finish, run, run_ok, run_ranks, start, wait_for, without_figures

run, run_ok, run_ranks, start = without_figures(run, run_ok, run_ranks, start)
N = 4


# ─────────────────────────────────────── the gradient, in this process ───────────────────────────────────────

class Images(torch.utils.data.Dataset):
    """Random images with very different numbers of ignored and of synthetic-unknown pixels."""

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        self.items = []
        for i in range(n):
            Z = rng.integers(0, N, (10, 12))
            Z[rng.random(Z.shape) < (0, 0.9, 0.3, 1, 0.05)[i % 5]] = common.IGNORED      # one image has no label at all
            unknown = (rng.random(Z.shape) < (0.5, 0, 0.02, 0, 0.9)[i % 5]) & (Z < N)
            self.items.append((rng.integers(0, 256, (3, 10, 12), np.uint8), Z.astype(np.uint8), unknown))

    def __len__(self):
        return len(self.items)

    def name(self, i):
        return f"image {i}"

    def __getitem__(self, key):
        X, Z, unknown = (torch.from_numpy(v) for v in self.items[key[1]])
        return dict(image=X, label=Z, unknown=unknown, index=key[1])


class Net(nn.Module):
    arch, backbone_name, num_classes = "deeplabv3", "mobilenet_v3_large", N

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, N, 1))
        self.layers[1].running_mean.uniform_(-0.2, 0.2)
        self.sizes = []

    def outputs(self, X):
        self.sizes.append(len(X))
        return dict(logits=self.layers(X))

    def forward(self, X):
        return self.outputs(X)["logits"]


@pytest.fixture
def signals():
    """pretrain.train() takes these over."""
    before = {s: signal.getsignal(s) for s in pretrain.SIGNALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def train(data, out, f=None, validate=None, **more):
    """The network after pretrain.train(); its .grad are those of the last step."""
    args = argparse.Namespace(**{**dict(batch_size=len(data), epochs=1, lr=1e-3, seed=0, bn="frozen", micro_batch=None,
                                        precision=None, sync_bn=False, compile=False, workers=0, save_every=5,
                                        restart=False, schedule="constant", alpha=0.05, loss="er", out=str(out)),
                                 **more})
    f = f or Net()
    pretrain.train(f, data, args, torch.device("cpu"), {"schedule": args.schedule, "epochs": args.epochs},
                   dict(stage="test"), validate)
    return f


def gradient(data, alpha, loss):
    """Eq. 5 over all pixels of all images, written out pixel by pixel, in float64; its value and gradients."""
    f = Net().double().eval()
    k, s = [], []
    for X, Z, unknown in data.items:
        z = f(torch.from_numpy(X)[None].double() / 255)[0]
        S = z.exp() / z.exp().sum(0)
        for h in range(Z.shape[0]):
            for w in range(Z.shape[1]):
                if unknown[h, w]:
                    H, H_max = -sum(S[i, h, w] * S[i, h, w].log() for i in range(N)), np.log(N)
                    s.append((1.01 * H_max) / (H + 0.01 * H_max) - 1 if loss == "er" else
                             -sum((S[i, h, w] * N).log() / N for i in range(N)))
                elif Z[h, w] < N:
                    k.append(-S[int(Z[h, w]), h, w].log())
    value = sum(k) / len(k) + alpha * sum(s) / len(s)
    value.backward()
    return float(value.detach()), [p.grad for p in f.parameters()]


@pytest.mark.parametrize("alpha, loss", ((0.05, "er"), (0.5, "kl")))
def test_parts_of_a_batch_add_up_to_eq_5(tmp_path, signals, alpha, loss):
    """Batch norm frozen: the gradient of one piece and of accumulated parts is that of Eq. 5 over the pixels of the
    batch."""
    data = Images(7)
    value, expected = gradient(data, alpha, loss)
    for micro in (None, 2, 3, 5):
        f = train(data, tmp_path / f"{micro}.pt", micro_batch=micro, alpha=alpha, loss=loss)
        for p, g in zip(f.parameters(), expected):
            torch.testing.assert_close(p.grad.double(), g, rtol=1e-4, atol=1e-5 * float(g.abs().max()))
        log = [json.loads(line) for line in (tmp_path / f"{micro}.jsonl").read_text().splitlines()]
        assert [v["loss"] for v in log] == [pytest.approx(value, rel=1e-5)]
        assert torch.equal(f.layers[1].running_mean, Net().layers[1].running_mean), "frozen batch norm was updated"
        assert sum(f.sizes) == 7 and min(f.sizes) >= 2 and max(f.sizes) <= max(micro or 7, 3)


class Dropping(Net):
    """It notes what a layer of dropout makes of ones."""

    def __init__(self):
        super().__init__()
        self.drop, self.masks = nn.Dropout(0.5), []

    def outputs(self, X):
        self.masks.append(self.drop(torch.ones(64)))
        return super().outputs(X)


def test_dropout_is_active_with_other_masks_in_each_step_and_rank(tmp_path, signals, monkeypatch):
    """ASSUMPTION of the README: in both trainings, with frozen batch norm too. The same run has the same masks."""
    masks, accumulate = [], pretrain.accumulate

    def of_rank(*args):
        with monkeypatch.context() as m:
            m.setattr(common, "rank", lambda: rank)
            return accumulate(*args)
    for rank, seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        f = Dropping()
        with monkeypatch.context() as m:
            m.setattr(pretrain, "accumulate", of_rank)
            (tmp_path / str(len(masks))).mkdir()
            train(Images(6), tmp_path / f"{len(masks)}/f.pt", f, batch_size=3, epochs=2, seed=seed)
        masks.append(torch.stack(f.masks))
    first, again, of_rank, of_seed = masks
    assert set(first.unique().tolist()) == {0, 2} and len(first) == 4 == len({tuple(v.tolist()) for v in first})
    assert torch.equal(first, again)
    assert all((first != other).any(1).all() for other in (of_rank, of_seed))


def test_batch_norm_trains_by_default(tmp_path, signals):
    f = train(Images(7), tmp_path / "f.pt", bn="train")
    assert not torch.equal(f.layers[1].running_mean, Net().layers[1].running_mean)


@pytest.mark.parametrize("schedule", ("constant", "poly"))
def test_learning_rate(tmp_path, signals, schedule):
    """The first step of Adam moves every weight by lr · g / (|g| + 10⁻⁸); poly falls from there, to an eighth in
    the tenth of ten."""
    f = train(Images(7), tmp_path / "f.pt", schedule=schedule)
    for p, q in zip(f.parameters(), Net().parameters()):
        torch.testing.assert_close(q - p, 1e-3 * p.grad / (p.grad.abs() + 1e-8), rtol=1e-3, atol=1e-7)
    train(Images(6), tmp_path / "g.pt", schedule=schedule, epochs=5, batch_size=3)
    last = torch.load(tmp_path / "g.pt", weights_only=True)["optimiser"]["param_groups"][0]["lr"]
    assert last == pytest.approx(1e-3 * (0.1**0.9 if schedule == "poly" else 1))   # step 9 of 10


def test_a_batch_too_small_is_refused(tmp_path, signals):
    with pytest.raises(common.InputError, match="batch of 1 images is too small for 1 process: .* add images$"):
        train(Images(1), tmp_path / "f.pt", batch_size=4)


@pytest.mark.parametrize("name, out", (("x.png", "x"), ("x.png", "x.pt"), ("x.jsonl", "x")))
def test_no_run_replaces_what_another_wrote(tmp_path, signals, name, out):
    """A checkpoint may be called as the plot or the log of another run would be."""
    train(Images(3), tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(common.InputError, match=f"{name}: this run to .*{out} would replace it"):
        train(Images(3), tmp_path / out)
    assert (tmp_path / name).read_bytes() == before and not (tmp_path / out).exists()


def test_curve_of_a_loss_below_zero(tmp_path, monkeypatch):
    """LSE ("energy") has no lower bound: the figure shows all of it."""
    import matplotlib.figure
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda fig, *a, **k: drawn.append(fig.axes[0].get_ylim()))
    for values in ((3, 1, -2.5), (3, 1, 2)):
        log = "".join(json.dumps(dict(step=k, loss=v)) + "\n" for k, v in enumerate(values))
        (tmp_path / "log.jsonl").write_text(log)
        with contextlib.suppress(OSError):                       # nothing was written that could be renamed
            pretrain.training_curves(tmp_path / "log.jsonl", tmp_path / "log.png")
    assert drawn[0][0] <= -2.5 and drawn[1][0] == 0 and min(top for _, top in drawn) >= 3


def test_the_log_was_taken_away(tmp_path, signals, monkeypatch):
    """A run that is killed in its last validation goes on there, once; without its log it has no curves to draw."""
    load = lambda path, **_: (None, torch.load(path, weights_only=True))
    monkeypatch.setattr(common, "load_checkpoint", load)                         # Net is no Segmenter

    def killed(f):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train(Images(6), tmp_path / "f.pt", validate=killed, epochs=2, batch_size=3)
    assert torch.load(tmp_path / "f.pt", weights_only=True)["step"] == 2         # of epoch 0: its validation is due
    seen = []
    go_on = lambda: train(Images(6), tmp_path / "f.pt", validate=lambda f: seen.append(1) or 50.0, epochs=2,
                          batch_size=3)
    go_on()
    assert len(seen) == 2 and [v["miou"] for v in log(tmp_path / "f.jsonl") if "miou" in v] == [50, 50]
    (tmp_path / "f.png").unlink()
    (tmp_path / "f.jsonl").write_text('{"step": 4, "epoch": 2, "miou": 50.0}\n')
    pretrain.training_curves(tmp_path / "f.jsonl", tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()


def test_a_signal_that_was_ignored_before_stays_so(monkeypatch, signals):
    """nohup ignores SIGHUP, so that the closing of the terminal does not end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = pretrain.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("optimiser", (None, 5, dict(state={}, param_groups=[])))
def test_a_checkpoint_without_its_optimiser(tmp_path, signals, monkeypatch, optimiser):
    train(Images(3), tmp_path / "f.pt")
    checkpoint = dict(torch.load(tmp_path / "f.pt", weights_only=True), optimiser=optimiser)
    if optimiser is None:
        del checkpoint["optimiser"]
    monkeypatch.setattr(common, "load_checkpoint", lambda path, **_: (None, checkpoint))   # Net is no Segmenter
    with pytest.raises(common.InputError, match="f.pt: holds no state of the optimiser"):
        train(Images(3), tmp_path / "f.pt", epochs=2)


def test_a_step_to_weights_that_are_not_finite(tmp_path, signals):
    """The loss was finite, the step is not: nothing of it is saved."""
    with pytest.raises(common.InputError, match="weights are not finite after epoch 0, step 1 .*nothing was saved yet"):
        train(Images(6), tmp_path / "f.pt", lr=1e39)
    assert not (tmp_path / "f.pt").exists()


def test_averages_that_are_not_finite_are_not_saved(tmp_path, signals, monkeypatch):
    """Weights and loss are finite, the running variance of batch norm is not: load_checkpoint would refuse the file."""
    norm = Net.__init__
    monkeypatch.setattr(Net, "__init__", lambda self: (norm(self), self.layers[1].running_var.fill_(np.inf))[0])
    with pytest.raises(common.InputError, match="not finite.*nothing was saved"):
        train(Images(4), tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_a_restart_is_continued_by_the_same_command_without_it(tmp_path, signals, monkeypatch):
    """Log and checkpoint are of one run from the first step on, not only from the first checkpoint on."""
    train(Images(4), tmp_path / "a.pt", epochs=2)
    monkeypatch.setattr(pretrain, "gradient", lambda *_: 1 / 0)          # killed in the first step
    with pytest.raises(ZeroDivisionError):
        train(Images(4), tmp_path / "a.pt", epochs=3, restart=True, schedule="poly")
    kept = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (kept["epoch"], kept["step"], kept["settings"]["epochs"]) == (0, 0, 3)
    assert (tmp_path / "a.jsonl").read_text() == ""


@pytest.mark.parametrize("line", (b'{"x": 1}', b"{bad}", b"[1, {}", b"\xff"))
def test_a_damaged_log(tmp_path, line):
    log = tmp_path / "a.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b"\n")
    run = argparse.Namespace(out=tmp_path / "a.pt", log_path=log, first=2, validation_due=False)
    with pytest.raises(common.InputError, match="a.jsonl: not the log of"):
        pretrain.trim_log(run)


def test_stopped_in_the_last_step(tmp_path, signals, monkeypatch):
    """Nothing is left to continue: the run ends as usual, with its figure."""
    catch = pretrain.catch_signals
    monkeypatch.setattr(pretrain, "catch_signals", lambda: catch() + [signal.SIGTERM])
    with pytest.raises(SystemExit):
        train(Images(4), tmp_path / "two.pt", epochs=2)
    train(Images(4), tmp_path / "one.pt")
    assert (tmp_path / "one.png").exists() and not (tmp_path / "two.png").exists()


def test_odd_outputs(tmp_path, signals, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("", ".", "/"):
        with pytest.raises(common.InputError, match="expected the name of a file"):
            train(Images(4), out)
    os.mkfifo("pipe")
    with pytest.raises(common.InputError, match="pipe: not a regular file"):
        common.write_bytes("pipe", b"a")
    other = tmp_path / ".run1.pt.tmp999"     # of a run to run1.pt, which is no leftover of a run to run[1].pt
    other.touch()
    (tmp_path / ".run[1].pt.tmp7").touch()
    train(Images(4), "run[1].pt")
    assert other.exists() and not (tmp_path / ".run[1].pt.tmp7").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(common.InputError, match="notes.txt.*would replace it"):
        train(Images(4), "notes.txt", restart=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with open("archive.pt", "wb") as file:
        np.savez(file, a=1)                                   # a zip as well
    archive = Path("archive.pt").read_bytes()
    with pytest.raises(common.InputError, match="archive.pt.*would replace it"):
        train(Images(4), "archive.pt", restart=True)
    assert Path("archive.pt").read_bytes() == archive
    Path("elk.png").mkdir()                                   # where the figure is to lie
    with pytest.raises(common.InputError, match="elk.png: this run to .*elk.pt would replace it"):
        train(Images(4), "elk.pt")
    Path("damaged.pt").write_bytes(Path("run[1].pt").read_bytes()[:1000])
    train(Images(4), "damaged.pt", restart=True)
    Image.new("RGB", (9, 9)).save("moose.png")                # a photograph beside where its model is to lie
    photograph = Path("moose.png").read_bytes()
    with pytest.raises(common.InputError, match="moose.png: this run to .*moose.pt would replace it"):
        train(Images(4), "moose.pt")
    assert Path("moose.png").read_bytes() == photograph and not Path("moose.pt").exists()
    for _ in range(2):
        train(Images(4), "deer.pt", restart=True)             # its own picture it replaces
    assert b"Matplotlib" in Path("deer.png").read_bytes()[:256]


def test_images_of_different_sizes_are_refused(tmp_path, signals):
    data = Images(2)
    data.items[1] = tuple(v[..., :9] for v in data.items[1])
    with pytest.raises(common.InputError, match="different sizes.*12×10"):
        train(data, tmp_path / "f.pt")


@pytest.mark.parametrize("n, batch", ((10, 4), (12, 4), (7, 7), (3, 8), (23, 6)))
def test_epoch_batches(monkeypatch, n, batch):
    def every(world, epoch=0, step=0, seed=5):
        """[rank][step] → [(epoch, i), …] over 3 epochs"""
        monkeypatch.setenv("WORLD_SIZE", str(world))
        shares = []
        for r in range(world):
            monkeypatch.setenv("RANK", str(r))
            shares.append(list(pretrain.epoch_batches(n, batch, seed, epoch, step, 3)))
        return shares
    alone, = every(1)
    steps, size = n // min(batch, n), min(batch, n)
    assert len(alone) == 3 * steps and all(len(b) == size for b in alone)
    for e in range(3):
        seen = [key for b in alone[e * steps:(e + 1) * steps] for key in b]
        assert {k for k, _ in seen} == {e}
        indices = [i for _, i in seen]
        assert len(set(indices)) == len(indices) == steps * size and set(indices) <= set(range(n)), "an image twice"
    assert [i for _, i in alone[0]] != [i for _, i in alone[steps]] or n < 4, "every epoch has the same order"
    assert every(1, seed=6)[0] != alone or n < 4
    for world in (2, 3):
        shares = every(world)
        assert [sum(parts, []) for parts in zip(*shares)] == alone, "the ranks' shares are not the batch"
        assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*shares))
    for position in range(3 * steps):
        assert every(1, *divmod(position, steps))[0] == alone[position:], "a continued run sees other batches"


# ───────────────────────────────────────── runs of the two scripts ─────────────────────────────────────────

PRETRAIN = ("pretrain.py", "--epochs", 2, "--batch-size", 2, "--crop", 32, 48, "--lr", 1e-3, "--schedule", "constant",
            "--save-every", 0)
TIMES = ("seconds", "images_per_second")


def log(path):
    """The .jsonl without its timing fields."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]


def same(a, b):
    """Model, optimiser and position of two checkpoints, bit by bit, and what was logged beside them."""
    one, two = (torch.load(p, weights_only=True) for p in (a, b))
    assert (one["model"].keys() == two["model"].keys()
            and one["optimiser"]["state"].keys() == two["optimiser"]["state"].keys())
    assert all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    for k, state in one["optimiser"]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(two["optimiser"]["state"][k][n]))
                   for n, v in state.items())
    assert (one["epoch"], one["step"]) == (two["epoch"], two["step"])
    assert log(a.with_suffix(".jsonl")) == log(b.with_suffix(".jsonl"))


def one_line(done, *parts):
    assert done.code == 1 and done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
    assert all(part in done.err for part in parts), done.err


def test_a_whole_run(small, tmp_path):
    """Its first loss, from initial weights of its seed, on crops of its scale, is L_k in float64; the mIoU that two
    processes logged, every second epoch and at the end, is scikit-learn's, by the running averages of batch norm."""
    run_ranks(*PRETRAIN, "--root", small / "toy", "--epochs", 3, "--batch-size", 6, "--seed", 3, "--scale", 0.5, 2,
              "--bn", "frozen", "--val-every", 2, folder=tmp_path)
    said = log(tmp_path / "pretrained.jsonl")
    assert [v["step"] for v in said if "miou" in v] == [2, 3]
    checkpoint = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    torch.manual_seed(3)
    first = common.Segmenter(checkpoint["arch"], checkpoint["backbone"], 12, checkpoint["width"]).double().eval()
    train = pretrain.TrainingScenes("toy", small / "toy", "train", None, (32, 48), (0.5, 2), 3)
    batch = [train[0, i] for i in range(6)]
    with torch.no_grad():
        z = first(torch.stack([item["image"] for item in batch]).double() / 255)
    Z = torch.stack([item["label"] for item in batch]).long()
    assert said[0]["loss"] == pytest.approx(float(nn.functional.cross_entropy(z, Z, ignore_index=255)), rel=1e-4)

    f, scenes = common.load_checkpoint(tmp_path / "pretrained.pt")[0], common.Scenes("toy", small / "toy", "val")
    found = [f.double()(item["image"][None].double() / 255).argmax(1)[0] for item in scenes]
    Z, p = torch.cat([item["label"].flatten() for item in scenes]), torch.cat([v.flatten() for v in found])
    known = Z < 12
    miou = 100 * jaccard_score(Z[known], p[known], labels=Z[known].unique(), average="macro")
    assert said[-1]["miou"] == pytest.approx(miou, abs=0.05)
    with torch.no_grad():
        alone = pretrain.validation(f.float().train(), scenes, torch.device("cpu"))
    assert alone == pytest.approx(miou, abs=0.05)


def interrupt(command, folder, out, moments, rng=np.random.default_rng()):
    """Start `command` once for each (further lines of log to wait for, signal); the signal comes a random moment
    later."""
    stopped = 0
    for more, number in moments:
        count = len(lines(folder / f"{out}.jsonl")) + more
        p = start(*command, folder=folder)
        if wait_for(lambda: len(lines(folder / f"{out}.jsonl")) >= count and (folder / f"{out}.pt").exists(), p):
            p.join(rng.uniform(0, 0.1))
        if p.exitcode is None:
            (p.kill if number == signal.SIGKILL else p.terminate)()
        done = finish(p, folder)
        if number == signal.SIGTERM and done.code:
            assert done.code == 128 + signal.SIGTERM and "stopped by a signal" in done.out and not done.err
        stopped += done.code in (143, -signal.SIGKILL)
    return stopped


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, small):
    """An uninterrupted run: 6 steps in 2 epochs, a validation after each."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ok(*PRETRAIN, "--root", small / "toy", folder=folder)
    expected = [("loss", 1), ("loss", 2), ("loss", 3), ("miou", 3), ("loss", 4), ("loss", 5), ("loss", 6), ("miou", 6)]
    assert [("loss" if "loss" in v else "miou", v["step"]) for v in log(folder / "pretrained.jsonl")] == expected
    return folder / "pretrained.pt"


def test_pretraining_killed_and_continued(pretrained, small, tmp_path):
    """SIGTERM and SIGKILL at random moments; then the same bits as without."""
    command = (*PRETRAIN, "--root", small / "toy")
    moments = [(1, signal.SIGTERM), (1, signal.SIGKILL), (1, signal.SIGKILL)]
    assert interrupt(command, tmp_path, "pretrained", moments) >= 2
    with open(tmp_path / "pretrained.jsonl", "a") as file:
        file.write('{"step": 9, "lo')   # a line that the machine did not finish
    done = run_ok(*command, folder=tmp_path)
    assert re.search(r"continuing pretrained.pt from epoch \d, step \d", done.out)
    same(tmp_path / "pretrained.pt", pretrained)
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_finished_changed_longer_and_restarted_runs(pretrained, small, tmp_path):
    command = (*PRETRAIN, "--root", small / "toy")
    for name in ("pretrained.pt", "pretrained.jsonl"):
        shutil.copy(pretrained.parent / name, tmp_path)
    before = (tmp_path / "pretrained.pt").read_bytes()
    assert "pretrained.pt is complete (2 epochs)" in run_ok(*command, folder=tmp_path).out
    for *flags, said in (("--lr", 1e-4, "lr 0.001, this run has 0.0001"), ("--seed", 1, "seed 0, this run has 1"),
                         ("--bn", "frozen", "bn train, this run has frozen"),
                         ("--epochs", 1, "epochs 2, this run has 1"),
                         ("--crop", 32, 64, "crop (32, 48), this run has (32, 64)"),
                         ("--arch", "pspnet", "arch fpn, this run has pspnet")):
        one_line(run(*command, *flags, folder=tmp_path), "pretrained.pt", said, "--restart")
    shutil.copytree(small / "toy", tmp_path / "fewer")
    for folder in ("images", "annotations"):
        next((tmp_path / "fewer/train" / folder / "training").rglob("*0.png")).unlink()
    one_line(run(*command[:-1], tmp_path / "fewer", folder=tmp_path), "pretrained.pt", "dataset 6 images",
             "this run has 5 images")
    assert (tmp_path / "pretrained.pt").read_bytes() == before

    # one epoch, then two: as two at once
    run_ok(*command, "--epochs", 1, "--restart", folder=tmp_path)
    assert len(log(tmp_path / "pretrained.jsonl")) == 4
    run_ok(*command, folder=tmp_path)
    same(tmp_path / "pretrained.pt", pretrained)

    # under a schedule the learning rates depend on the epochs: none can be added
    shutil.copy(small / "pretrained.pt", tmp_path / "poly.pt")
    one_line(run(*command, "--schedule", "poly", "--epochs", 3, "--out", "poly.pt", folder=tmp_path),
             "epochs 2, this run has 3")


def test_full_disk(pretrained, small, tmp_path):
    """No file may grow beyond 10 MB (a checkpoint has 130): the checkpoint from before stands, and the run goes on
    later."""
    command = (*PRETRAIN, "--root", small / "toy")
    interrupt(command, tmp_path, "pretrained", [(1, signal.SIGTERM)])
    before = (tmp_path / "pretrained.pt").read_bytes()
    one_line(run(*command, folder=tmp_path, limit=10_000_000), "pretrained.pt", "File too large")
    assert (tmp_path / "pretrained.pt").read_bytes() == before and not list(tmp_path.glob(".*"))
    one_line(run("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 1, "--max-steps", 1,
                 folder=tmp_path, limit=5_000), ".npz", "File too large")
    assert not list((tmp_path / "auxiliary").glob("*.npz")) and not list((tmp_path / "auxiliary").glob(".*"))
    run_ok(*command, folder=tmp_path)
    same(tmp_path / "pretrained.pt", pretrained)


def test_machines_without_a_shared_folder(pretrained, small, tmp_path):
    """Rank 1 does not find the checkpoint that rank 0 continues from: one line, instead of two different runs."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shutil.copy(pretrained, tmp_path / "a/pretrained.pt")
    run_ranks(*PRETRAIN[:-2], "--epochs", 3, "--root", small / "toy", "--batch-size", 4, folder=None,
              folders=[tmp_path / "a", tmp_path / "b"], code=1)
    for folder, rank in (("a", 0), ("b", 1)):
        assert "pretrained.pt: not the same file on every machine" in (tmp_path / folder / f"stderr{rank}").read_text()
    assert ((tmp_path / "a/pretrained.pt").read_bytes() == pretrained.read_bytes()
            and not (tmp_path / "b/pretrained.pt").exists())


def test_non_finite_loss(pretrained, small, tmp_path):
    """It stops at that step and names it and its images; the checkpoint before it stands, and leads on."""
    nan = ("import common, torch\nwhole, calls = common.objective, []\n"
           "def objective(*args):\n    calls.append(1)\n"
           "    return whole(*args) * (float('nan') if len(calls) == 5 else 1)\n"
           "common.objective = objective")
    command = (*PRETRAIN, "--root", small / "toy")
    done = run(*command, folder=tmp_path, before=nan)
    one_line(done, "loss nan at epoch 1, step 1", "pretrained.pt holds the last good state")
    order = np.random.default_rng([0, 1]).permutation(6)[2:4]   # the images of that step, by epoch_batches' definition
    names = sorted((small / "toy/train/images").rglob("*.png"))
    assert re.findall(r"[^ ,;]+\.png", done.err) == [str(names[i]) for i in order]
    checkpoint = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 1)
    assert all(torch.isfinite(v).all() for v in checkpoint["model"].values())
    run_ok(*command, folder=tmp_path)
    same(tmp_path / "pretrained.pt", pretrained)

    # weights that are not numbers, from the start
    checkpoint["model"]["classifier.weight"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pt")
    photograph = next((small / "toy/test/images").rglob("*.png"))
    for command in (("finetune.py", "--known-unknown", "car", "--epochs", 1, "--batch-size", 2), ("mgu_generate.py",),
                    ("evaluate.py",), ("evaluate.py", "--images", photograph)):
        one_line(run(*command, "--ckpt", "nan.pt", folder=tmp_path), "nan.pt: classifier.weight", "not finite")
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == ["", "", ".jsonl", ".png", ".pt", ".pt"]


def test_diverging_learning_rate(small, tmp_path):
    done = run(*PRETRAIN[:-2], "--root", small / "toy", "--lr", 1e30, folder=tmp_path)
    one_line(done, "at epoch 0, step", ".png")
    assert not (tmp_path / "pretrained.pt").exists()


@pytest.fixture(scope="module")
def aux(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("set")
    run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 1, "--max-steps", 4, folder=folder,
           before=NO_FIGURES)
    assert sum(np.load(p)["unknown"].sum() for p in (folder / "auxiliary").glob("*.npz")) > 50
    return folder / "auxiliary"


def test_finetuning_killed_and_continued(small, aux, tmp_path):
    command = ("finetune.py", "--ckpt", small / "pretrained.pt", "--aux", aux, "--epochs", 2, "--batch-size", 4,
               "--mix", "clean", "--loss", "kl")
    run_ok(*command, "--out", "whole.pt", folder=tmp_path)
    assert len(log(tmp_path / "whole.jsonl")) >= 8
    moments = [(1, signal.SIGKILL), (2, signal.SIGKILL), (1, signal.SIGTERM)]
    assert interrupt((*command, "--save-every", 0), tmp_path, "ft", moments) >= 2
    run_ok(*command, folder=tmp_path)
    same(tmp_path / "ft.pt", tmp_path / "whole.pt")
    one_line(run(*command, "--alpha", 0.5, folder=tmp_path), "alpha 0.3, this run has 0.5")
    one_line(run(*command, "--loss", "er", folder=tmp_path), "loss kl, this run has er")


def test_two_processes_are_one(small, tmp_path):
    """Frozen batch norm and no dropout, whose masks depend on the rank: the same losses, gradients and weights. Batches
    of 5: three images and two, so the ranks' numbers of pixels differ."""
    command = ("finetune.py", "--ckpt", small / "pretrained.pt", "--known-unknown", "car", "pole", "--epochs", 3,
               "--batch-size", 5, "--bn", "frozen", "--out")
    off = "import torch\ntorch.nn.Dropout.forward = lambda self, x: x"
    run_ok(*command, "one.pt", folder=tmp_path, before=off)
    run_ranks(*command, "two.pt", folder=tmp_path, before=off)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    losses = [[v["loss"] for v in log(tmp_path / f"{n}.jsonl")] for n in ("one", "two")]
    assert len(losses[0]) == 3 and len(set(losses[0])) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for k, state in one["optimiser"]["state"].items():   # the mean of the gradients
        g = state["exp_avg"]
        assert float((g - two["optimiser"]["state"][k]["exp_avg"]).norm()) <= 0.02 * float(g.norm()) + 1e-7
    moved = apart = 0.0
    before = torch.load(small / "pretrained.pt", weights_only=True)["model"]
    for k, v in one["model"].items():
        if "running" in k or "num_batches" in k:
            assert torch.equal(v, before[k]) and torch.equal(two["model"][k], before[k])
        else:
            moved += float((v - before[k]).abs().sum())
            apart += float((v - two["model"][k]).abs().sum())
    assert apart < 0.02 * moved   # Adam divides by |g|: where that is rounding error, so is the direction


# ─────────────────────────────────────────────── hostile files ───────────────────────────────────────────────

class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_hostile_files_run_nothing(small, tmp_path):
    mark = tmp_path / "ran"
    hostile = Hostile(mark)
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, root=hostile), tmp_path / "zip.pt")
    torch.save(dict(checkpoint, root=hostile), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(hostile))
    for name in ("zip.pt", "old.pt", "pickle.pt"):
        with pytest.raises(common.InputError, match=name):
            common.load_checkpoint(tmp_path / name)
        with pytest.raises(common.InputError, match=name):   # as --weights
            pretrain.load_backbone(common.Segmenter("deeplabv3", "mobilenet_v3_large", 12), str(tmp_path / name))
    one_line(run(*PRETRAIN, "--root", small / "toy", "--out", "zip.pt", folder=tmp_path),
             "zip.pt: refused")   # as a run to continue

    label = np.zeros((4, 4), np.uint8)
    for name, key in (("label", "label"), ("extra", "extra")):
        np.savez(tmp_path / f"{name}.npz", **{**dict(format=1, image=np.zeros((4, 4, 3), np.uint8), label=label,
                                                     unknown=label > 0),
                                              key: np.array([hostile], object)})
        with pytest.raises(common.InputError, match=f"{name}.npz"):
            common.load_sample(tmp_path / f"{name}.npz")
    assert not mark.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)["root"].close()   # they would have
    assert mark.exists()
