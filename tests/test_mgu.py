"""The batched MGU engine against Algorithm 1 written out for one image, in float64 with Python sets of pixels."""
import argparse
import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import mgu_generate
from mgu_generate import choose, fold_batch_norm, mgu
from runner import NO_FIGURES, finish, run, start, wait_for

N = 5
SIZES = ((12, 16), (12, 16), (9, 11), (12, 16))   # of the images, in turn


def literal(f, X, Z, y, eta, max_steps):
    """Algorithm 1, line by line, for an image X (3, H, W) in [0, 1]; returns X' and |P_ỹ| of every iteration.

    Beyond the paper, as the README says: the clamp, and the cap, after which the X' with the fewest pixels in P_ỹ
    counts."""
    Omega = [(h, w) for h in range(X.shape[1]) for w in range(X.shape[2])]
    X_aux = X.clone()                                                              # 1
    I = {(h, w) for h, w in Omega if Z[h, w] == y}                                 # 2
    P, history, tried = set(I), [], []                                             # 3
    while P:                                                                       # 4
        X_aux.requires_grad_(True)
        z = f(X_aux[None])[0]
        S = [z[i].exp() / sum(z[j].exp() for j in range(N)) for i in range(N)]     # Eq. 1
        P = {(h, w) for h, w in I if max(range(N), key=lambda i: S[i][h, w].item()) == y}   # 5
        history.append(len(P))
        tried.append(X_aux.detach())
        if not P or len(history) > max_steps:
            break
        loss = sum(S[y][h, w] for h, w in P) / len(P)                              # Eq. 3
        gradient, = torch.autograd.grad(loss, X_aux)
        X_next = X_aux.detach().clone()
        for h, w in P:                                                             # 6
            for c in range(3):                                                     # 7
                X_next[c, h, w] = min(max(float(X_next[c, h, w]) - eta * float(gradient[c, h, w]), 0), 1)
        X_aux = X_next                                                             # 8, 9
    return tried[history.index(min(history))], history


def network(seed):
    """A random segmenter with batch norm, in eval mode, that predicts all N classes."""
    g = torch.Generator().manual_seed(seed)
    f = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                      nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, N, 1)).double().eval()
    for m in f:
        if isinstance(m, nn.Conv2d):
            scale = (2 / m.weight[0].numel())**0.5
            m.weight.data = torch.randn(m.weight.shape, generator=g, dtype=torch.float64) * scale
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in ((m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 1.5), (m.weight.data, 0.7, 1.5),
                                 (m.bias.data, -0.2, 0.4)):
                t.copy_(torch.rand(8, generator=g) * (high - low) + low)
    with torch.no_grad():
        z = f(torch.rand(4, 3, 12, 16, generator=g, dtype=torch.float64))
        f[-1].weight *= 3 / z.std((0, 2, 3)).view(-1, 1, 1, 1)
        f[-1].bias.copy_(-3 * (z - f[-1].bias.view(-1, 1, 1)).mean((0, 2, 3)) / z.std((0, 2, 3)))
    return f.requires_grad_(False)


def make_jobs(f, count, seed):
    """[(key, X uint8, Z, ỹ)] of several sizes: mostly classes that f predicts; saturated pixels; one that f never gets
    right."""
    rng, jobs = np.random.default_rng(seed), []
    for k in range(count):
        H, W = SIZES[k % len(SIZES)]
        X = rng.normal(128, 60, (3, H, W)).clip(0, 255).astype(np.uint8)   # one value in 30 at a limit
        predicted = f(torch.from_numpy(X)[None].double() / 255)[0].argmax(0).numpy()
        Z = np.where(rng.random((H, W)) < rng.choice([0.05, 0.2, 0.5]), predicted, rng.integers(0, N, (H, W)))
        Z[rng.random((H, W)) < 0.05] = common.IGNORED
        y = int(rng.choice(np.unique(predicted)))
        if k == 4:
            Z[predicted == y] = (y + 1) % N   # I_ỹ holds only pixels that f gets wrong
            Z[0] = np.where(predicted[0] == y, (y + 1) % N, y)
        jobs.append((k, X, Z, y))
    return jobs


def engine(f, jobs, batch_size, eta, max_steps):
    """{key: (X' (3, H, W), P_ỹ of the first iteration, history)}"""
    inputs = ((k, torch.from_numpy(X), torch.from_numpy(Z == y), y) for k, X, Z, y in jobs)
    ended = list(mgu(f, inputs, batch_size, eta, max_steps))
    assert sorted(k for k, *_ in ended) == sorted(k for k, *_ in jobs)
    return {k: (X, first, history) for k, X, first, history in ended}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


STEPS = {"small η": (0.5, 25), "large η": (2.0, 25), "small cap": (0.5, 8)}   # η and the cap


@pytest.fixture(scope="module", params=STEPS)
def case(request):
    """A network, jobs, step settings, and what the literal algorithm makes of them."""
    f = network(3)
    jobs = make_jobs(f, 11, 0)
    settings = STEPS[request.param]
    expected = {k: literal(f, torch.from_numpy(X).double() / 255, Z, y, *settings) for k, X, Z, y in jobs}
    lengths = sorted(len(history) - 1 for _, history in expected.values())
    assert lengths[0] == 0 and len(set(lengths)) >= 5, "the test needs different ending times"
    at_the_cap = sum(history[-1] > 0 for _, history in expected.values())
    assert at_the_cap in range(1, 9), "and images that hit the cap, but not all"
    grew = sum(np.diff(history).max(initial=0) > 0 for _, history in expected.values())
    assert grew >= 1, "and a P_ỹ that grows again"
    return f, jobs, settings, expected


@pytest.mark.parametrize("batch_size", (1, 3, 8))
def test_engine_is_algorithm_1(case, batch_size, float64):
    """float64: the same |P_ỹ| in every iteration, the same X'; also with the batch norms folded."""
    f, jobs, settings, expected = case
    for g in (f, fold_batch_norm(f)):
        found = engine(g, jobs, batch_size, *settings)
        for k, X, Z, y in jobs:
            X_aux, first, history = found[k]
            assert history == expected[k][1]
            torch.testing.assert_close(X_aux / 255, expected[k][0], rtol=0, atol=1e-9)
            assert int(first.sum()) == history[0] and not first[torch.from_numpy(Z != y)].any()
    assert found[4][2] == [0] and torch.equal(found[4][0], torch.from_numpy(jobs[4][1]).double())


@pytest.mark.parametrize("batch_size", (1, 3, 8))
def test_engine_in_float32(case, batch_size):
    """float32, as the script runs it. Rounding may let a pixel on the boundary flip an iteration earlier or later:
    9 in 10 histories are the same, those X' to 0.01 grey levels."""
    f, jobs, settings, expected = case
    found = engine(copy.deepcopy(f).float(), jobs, batch_size, *settings)
    same = [k for k in found if found[k][2] == expected[k][1]]
    assert len(same) >= 0.9 * len(jobs)
    for k in same:
        torch.testing.assert_close(found[k][0].double(), 255 * expected[k][0], rtol=0, atol=0.01)


def test_what_moves(case):
    """Only pixels of I_ỹ that were in P_ỹ move; X' stays an image; P_ỹ = ∅ is what the network itself, without folding,
    says of X'."""
    f, jobs, settings, _ = case
    f = copy.deepcopy(f).float()
    found = engine(fold_batch_norm(f), jobs, 3, *settings)
    emptied = 0
    for k, X, Z, y in jobs:
        X_aux, first, history = found[k]
        moved = (X_aux != torch.from_numpy(X)).any(0)
        assert not moved[torch.from_numpy(Z != y)].any()
        assert X_aux.min() >= 0 and X_aux.max() <= 255 and X_aux.shape == X.shape
        assert len(history) <= settings[1] + 1 and all(n > 0 for n in history[:-1])
        assert moved.any() == (len(history) > 1)
        if history[-1] == 0:
            emptied += history[0] > 0
            assert not (f(X_aux[None] / 255)[0].argmax(0) == y)[torch.from_numpy(Z == y)].any()
    assert emptied >= 2


def test_result_does_not_depend_on_neighbours_or_order(case):
    """At one batch size: the same bits in any order, beside any others, and alone."""
    f, jobs, settings, _ = case
    f = fold_batch_norm(copy.deepcopy(f).float())
    found = engine(f, jobs, 3, *settings)
    for others in (jobs[::-1], [jobs[i] for i in np.random.default_rng(1).permutation(len(jobs))], jobs[5:], jobs[2:3]):
        for k, (X_aux, first, history) in engine(f, others, 3, *settings).items():
            assert torch.equal(X_aux, found[k][0]) and torch.equal(first, found[k][1]) and history == found[k][2]


def test_the_cap_keeps_the_fewest():
    """P_ỹ of 12, 6, 4 and again 12 pixels, never none: what is kept at the cap is the X' that had 4."""
    class Fickle(nn.Module):
        """Class 0 at the first 12, 6, 4, 12, 12, … pixels, one count for each call; its logits fall with X."""
        calls = 0

        def forward(self, X):
            count = (12, 6, 4, 12)[min(self.calls, 3)]
            self.calls += 1
            first = (torch.arange(X[0, 0].numel()) < count).view(X.shape[2:])
            return torch.stack([X.mean(1) * 1e-3 + torch.where(first, 1, -1), 0 * X[:, 0]], 1)
    eta = 1e4
    X, I = torch.full((3, 4, 5), 200, dtype=torch.uint8), torch.ones(4, 5, dtype=torch.bool)
    (_, X_aux, _, history), = mgu(Fickle(), [(0, X, I, 0)], 1, eta, 6)
    assert history == [12, 6, 4, 12, 12, 12, 12]
    S = 1 / (1 + np.exp(-1 - 1e-3 * 200 / 255))            # of class 0 where it wins; X moves it by less than 1e-4
    total = 255 * eta * S * (1 - S) * 1e-3 / 3             # η∇L summed over P_ỹ, of one channel: Eq. 3 is a mean
    # two steps, of 12 and of 6 pixels
    expected = torch.tensor([total / 12 + total / 6] * 6 + [total / 12] * 6 + [0] * 8).view(4, 5)
    assert total > 100, "the test needs steps that are not lost in rounding"
    torch.testing.assert_close((200 - X_aux).double(), expected.double().expand(3, 4, 5), rtol=1e-3, atol=1e-3)


def test_nothing_to_do():
    assert list(mgu(network(0), [], 4)) == []
    X, I = torch.full((3, 4, 5), 7, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.bool)
    (_, X_aux, first, history), = mgu(network(0).float(), [(0, X, I, 1)], 4)
    assert history == [0] and torch.equal(X_aux, X.float()) and not first.any()


@pytest.mark.parametrize("arch", common.ARCHS)
def test_folding_batch_norm_changes_nothing(arch):
    torch.manual_seed(0)
    f = common.Segmenter(arch, "mobilenet_v3_large", N).eval()
    norms = [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.running_mean.uniform_(-0.2, 0.2)
        m.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(m.weight, 0.6, 1.4)
        nn.init.uniform_(m.bias, -0.2, 0.2)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    X = torch.rand(2, 3, 48, 64)
    folded = fold_batch_norm(f)
    with torch.no_grad():
        expected, found = f(X), folded(X)
    assert expected.std() > 1e-3, "the test needs logits that are not all 0"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert len(norms) > 40 and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not folded.training
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items()), "f itself was changed"


class Scenes:
    """What generate() and measure() use of common.Scenes, without files."""
    root, classes = "/data", [f"class {i}" for i in range(N)]

    def __init__(self, jobs):
        self.items = [(X, Z.astype(np.uint8)) for _, X, Z, _ in jobs]

    def __getitem__(self, i):
        return dict(image=torch.from_numpy(self.items[i][0]), label=torch.from_numpy(self.items[i][1]))

    def name(self, i):
        return f"/data/train/{i}.png"

    def decode(self, i):
        return self.items[i][0].transpose(1, 2, 0), self.items[i][1]


@pytest.mark.parametrize("eta, cap", (*STEPS.values(), (0.05, 40)))
def test_stored_samples(eta, cap, tmp_path):
    """A file holds X' rounded to 8 bits, and as D_s what f gets right on X and wrong on that (which the smallest η can
    tell from wrong before rounding); the figures fit."""
    f = network(3)
    jobs = make_jobs(f, 9, 0)   # the last one hits the cap
    args = argparse.Namespace(batch_size=4, step_size=eta, max_steps=cap, ascent=False, augment=False)
    scenes, chosen = Scenes(jobs), [(y, k) for k, _, _, y in jobs]
    f = f.float()
    mgu_generate.generate(f, scenes, chosen, tmp_path, args, "cpu")
    figures = mgu_generate.class_figures(mgu_generate.measure(f, scenes, chosen, tmp_path, "cpu"))
    correct = flipped = undone = 0
    sure, moved, iterations = [], [], []
    for k, X, Z, y in jobs:
        X_aux, history = literal(network(3), torch.from_numpy(X).double() / 255, Z, y, eta, cap)
        sample = common.load_sample(tmp_path / f"{y:02d}_class-{y}-{k:06d}.npz")
        X_stored = sample["image"].transpose(2, 0, 1)
        S, S_aux = (f(torch.from_numpy(np.array(v))[None] / 255)[0].softmax(0).numpy() for v in (X, X_stored))
        right, wrong = (Z == y) & (S.argmax(0) == y), S_aux.argmax(0) != y
        assert np.array_equal(sample["unknown"], right & wrong) and np.array_equal(sample["label"], Z)
        assert sample["y"] == y and sample["source"] == f"train/{k}.png"
        assert sample["correct"] == right.sum() == sample["history"][0]
        if sample["history"].tolist() == history:   # not always, in float32
            assert np.abs(X_stored - 255 * X_aux.numpy()).max() <= 0.51
        correct, flipped = correct + right.sum(), flipped + (right & wrong).sum()
        undone += (right & (f(X_aux[None].float())[0].argmax(0).numpy() != y) & ~wrong).sum()
        iterations.append(len(sample["history"]) - 1)
        sure.append(S_aux.max(0)[right & wrong])
        moved.append((X_stored.astype(float) - X)[:, Z == y])
    assert figures["images"] == 9 and figures["correct_pixels"] == correct and 20 < flipped < correct
    assert figures["flip_rate"] == pytest.approx(100 * flipped / correct, abs=1e-3)
    assert figures["mean_max_softmax"] == pytest.approx(np.concatenate(sure).mean(), abs=1e-4)
    assert undone > 0 or eta > 0.05, "the test needs flips that rounding takes back"
    assert figures["iterations_median"] == np.median(iterations) and figures["iterations_max"] == max(iterations)
    assert figures["linf"] == max(np.abs(m).max() for m in moved)
    assert figures["rms"] == pytest.approx(np.sqrt(np.mean(np.concatenate([m.ravel() for m in moved])**2)), abs=1e-3)


def test_a_row_of_a_sheet():
    """What its five cells show: X, X', the amplified difference, f's predictions on both."""
    import matplotlib.pyplot as plt
    f, rng = network(3).float(), np.random.default_rng(0)
    X = rng.integers(60, 190, (12, 16, 3), np.uint8)
    X_aux, D_s = X.copy(), np.zeros((12, 16), bool)
    D_s[3:9, 4:12] = True
    X_aux[D_s] = X[D_s] + rng.choice([-10, 10], (48, 3))
    fig, axes = plt.subplots(1, 5)
    sample = dict(image=X_aux, unknown=D_s, history=np.array([48, 5]))
    mgu_generate.sheet_row(axes, f, X, sample, plt.get_cmap("tab20", N), "cpu")
    cells = [ax.get_images()[0].get_array() for ax in axes]
    plt.close(fig)
    predictions = [f(torch.from_numpy(v.transpose(2, 0, 1))[None] / 255)[0].argmax(0).numpy() for v in (X, X_aux)]
    difference = 128 + 10 * (X_aux.astype(int) - X)              # its 95th percentile, 10 levels, becomes 100
    for cell, want in zip(cells, (X, X_aux, difference, *predictions)):
        assert np.array_equal(cell, want)
    assert (predictions[0] != predictions[1]).any() and "× 10" in axes[2].get_title()


def test_ascent(tmp_path):
    """The control has the D_s, the history and the RMS of MGU, and on D_s the way up the gradient of S_ỹ, taken here
    in float64, of steps of a 40th of that RMS; nothing else of X moves. It is more of ỹ, at every step size of MGU."""
    f, jobs = network(3), make_jobs(network(3), 8, 0)
    scenes, chosen = Scenes(jobs), [(y, k) for k, _, _, y in jobs]
    for ascent in (False, True):
        args = argparse.Namespace(batch_size=4, step_size=0.5, max_steps=25, ascent=ascent, augment=False)
        mgu_generate.generate(network(3).float(), scenes, chosen, tmp_path / str(ascent), args, "cpu")
    seen = 0
    for k, X, Z, y in jobs:
        down, up = (common.load_sample(path) for path in sorted(tmp_path.glob(f"*/{y:02d}_class-{y}-{k:06d}.npz")))
        assert all(np.array_equal(down[key], up[key]) for key in down if key != "image")
        D_s, X = down["unknown"], X.transpose(1, 2, 0).astype(float)
        assert np.array_equal(up["image"][~D_s], X[~D_s])
        if D_s.sum() < 5:
            continue
        seen += 1
        rms = [np.sqrt(np.mean((sample["image"] - X)[D_s]**2)) for sample in (down, up)]
        assert rms[1] == pytest.approx(rms[0], rel=0.05)                       # of grey levels, on few pixels

        X_up = torch.from_numpy(X).permute(2, 0, 1)
        of_D_s = lambda v: v.permute(1, 2, 0).numpy()[D_s]
        while np.sqrt(np.mean((of_D_s(X_up) - X[D_s])**2)) < rms[0]:
            X_up.requires_grad_(True)
            S = f(X_up[None] / 255).softmax(1)[0]
            P = torch.from_numpy(Z == y) & (S.argmax(0) == y)
            gradient, = torch.autograd.grad(S[y][P].mean(), X_up)
            step = torch.where(P, gradient, 0)
            step *= rms[0] / 40 / np.sqrt(np.mean(of_D_s(step)**2))
            X_up = (X_up.detach() + step).clamp(0, 255)
        moved = of_D_s(X_up) - X[D_s]
        c = min(np.linspace(0, 20, 2001), key=lambda c: abs(
            np.sqrt(np.mean(((X[D_s] + c * moved).clip(0, 255) - X[D_s])**2)) - rms[0]))
        off = np.abs((X[D_s] + c * moved).clip(0, 255) - up["image"][D_s])
        assert off.mean() < 0.5 and np.quantile(off, 0.95) < 2, "but for rounding"
        S = [float(f(torch.from_numpy(v.transpose(2, 0, 1))[None].double() / 255).softmax(1)[0, y][D_s].mean())
             for v in (down["image"], X, up["image"])]
        assert S[0] < S[1] < S[2]
    assert seen >= 4


@pytest.mark.parametrize("least", (64, 500))
def test_choose(toy_root, capsys, monkeypatch, least):
    """Every image with enough pixels of the class, counted here from the PNGs; seeded; fewer are the first of more."""
    assert mgu_generate.MIN_PIXELS == 64
    monkeypatch.setattr(mgu_generate, "MIN_PIXELS", least)
    scenes = common.Scenes("toy", toy_root, "train")
    png_ids = {c: k for k, c in scenes_ids().items()}
    every = choose(scenes, 100, 0)
    told = capsys.readouterr().out
    for c, name in enumerate(scenes.classes):
        pixels = [(np.array(Image.open(label)) == png_ids[c]).sum() for _, label in scenes.pairs]
        enough = {i for i, count in enumerate(pixels) if count >= least}
        mine = [i for y, i in every if y == c]
        assert set(mine) == enough and len(mine) == len(enough)
        assert f"{name}: only {len(enough)} training images have {least} pixels of it (100 asked)" in told
        monkeypatch.setattr(mgu_generate, "MIN_PIXELS", max(pixels))      # at least: exactly so many are enough
        assert {i for y, i in choose(scenes, 100, 0) if y == c} == {i for i, n in enumerate(pixels) if n == max(pixels)}
        monkeypatch.setattr(mgu_generate, "MIN_PIXELS", least)
    orders = [[i for y, i in every if y == c] for c in range(12)]
    alike = [(a, b) for a in orders for b in orders if a is not b and sorted(a) == sorted(b) and len(a) > 4]
    assert all(a != b for a, b in alike) and (alike or least == 500), "every class draws anew"
    counts = {len([i for y, i in every if y == c]) for c in range(12)}
    assert least == 64 or len(counts) > 2, "too few images were left out"
    for k in (1, 2, 3):   # more images of each class keep those of fewer
        jobs = choose(scenes, k, 0)
        for c in range(12):
            assert [j for j in jobs if j[0] == c] == [j for j in every if j[0] == c][:k]
    assert choose(scenes, 100, 0) == every and choose(scenes, 100, 1) != every
    assert sorted(choose(scenes, 100, 1)) == sorted(every)


def scenes_ids():
    """{PNG id: class} of the toy data, which has StreetHazards' ids."""
    return {1: 0, 2: 1, 3: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7, 10: 8, 11: 9, 12: 10, 13: 11}


# ─────────────────────────────────────────── around the algorithm ───────────────────────────────────────────

def test_default_step_and_cap():
    for arch in common.ARCHS:
        for data in common.RECIPES:
            names = {**common.PAPER["mgu"], **common.OURS["mgu"]}
            args = argparse.Namespace(**dict.fromkeys(names), seed=0)
            told = common.resolve(args, "mgu", data, arch)
            eta = "10.0 (recipe)" if data == "toy" else "5.0 (ours)"
            assert (args.step_size, args.max_steps) == ((10, 40) if data == "toy" else (5, 80))
            cap = "40 (recipe)" if data == "toy" else "80 (ours)"
            assert f"step-size {eta}" in told and f"max-steps {cap}" in told


def test_tf32_is_on_in_the_iterations_alone():
    """Flips are decided by predict(), in float32: between two images the switches are as setup() left them."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    state = lambda: [s.allow_tf32 for s in switches]
    seen, before = [], state()

    class Spy(nn.Conv2d):
        def forward(self, X):
            seen.append(state())
            if len(seen) == 5:
                raise ZeroDivisionError
            return super().forward(X)
    X, I = torch.full((3, 4, 5), 200, dtype=torch.uint8), torch.ones(4, 5, dtype=torch.bool)
    torch.manual_seed(0)
    try:
        for s in switches:
            s.allow_tf32 = False
        for tf32 in (True, False):
            for _ in mgu(Spy(3, 2, 1), [(0, X, I, 0)], 1, max_steps=1, tf32=tf32):
                assert state() == [False, False] and seen[-1] == [tf32, tf32]
        seen[:] = seen[-1:] * 4
        with pytest.raises(ZeroDivisionError):
            list(mgu(Spy(3, 2, 1), [(0, X, I, 0)], 1, tf32=True))
        assert seen[-1] == [True, True] and state() == [False, False]
    finally:
        for s, value in zip(switches, before):
            s.allow_tf32 = value


def test_ahead_keeps_the_order_and_its_distance():
    begun = []

    def make(i):
        begun.append(i)
        if i == 30:
            raise common.InputError("30")
        return i * i
    with ThreadPoolExecutor(3) as pool:
        squares, got = common.ahead(pool, make, range(40), 4), []
        with pytest.raises(common.InputError, match="30"):
            for value in squares:
                got.append(value)
                assert len(begun) <= len(got) + 5
    assert got == [i * i for i in range(30)]


def test_the_name_of_a_sample():
    scenes = SimpleNamespace(classes=["Road", "traffic sign"])
    assert [mgu_generate.sample_name(scenes, y, 3) for y in (0, 1)] == ["00_road-000003.npz",
                                                                       "01_traffic-sign-000003.npz"]


def test_restart_takes_its_own_files_alone(tmp_path):
    mine = ("03_car-000017.npz", "12_light-pole-1234567.npz", "sheets/03_car.png", "sheets/iterations.png",
            ".03_car-000017.npz.tmp12", "sheets/.03_car.png.tmp7")
    other = ("2024_notes.npz", "sheets/mine.png", "iterations.png", ".draft.tmp", ".x.tmpdir/a", "notes.npz")
    for name in (*mine, *other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    common.save_json(tmp_path / "manifest.json", dict(format=1, settings=dict(seed=0)))
    mgu_generate.prepare(tmp_path, dict(seed=0), False)
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {*mine[:4], *other, "manifest.json"}
    mgu_generate.prepare(tmp_path, dict(seed=1), True)
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {*other, "manifest.json"} and common.load_json(tmp_path / "manifest.json")["settings"]["seed"] == 1
    common.save_json(tmp_path / "manifest.json", dict(name="a web page's"))
    with pytest.raises(common.InputError, match="holds no settings"):
        mgu_generate.prepare(tmp_path, dict(seed=1), True)
    assert common.load_json(tmp_path / "manifest.json") == dict(name="a web page's")


def test_figures_of_classes(capsys):
    """A class of which f had nothing right is not one that more steps would flip."""
    table = {name: dict(images=1, iterations_median=3, iterations_max=3, flip_rate=rate, unflipped_pixels=0,
                        mean_max_softmax=0.5, linf=1, rms=1.0, kilobytes=1, correct_pixels=right)
             for name, rate, right in (("car", 90.0, 100), ("pole", 0.0, 0), ("road", 99.5, 100))}
    mgu_generate.report(table)
    said = capsys.readouterr().out
    assert "below 99 % flipped: car; raise" in said and "f has no pixel right of: pole;" in said


def test_a_second_run_and_a_damaged_manifest(small, tmp_path):
    """Two runs with the same --out at once: the second is refused, the first is not disturbed."""
    command = ("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 1, "--max-steps", 1)
    slow = "import common, time\nsave = common.save_npz\n" \
           "common.save_npz = lambda p, a: ('image' in a and (open('begun', 'w'), time.sleep(0.5)), save(p, a))"
    (tmp_path / "second").mkdir()
    first = start(*command, folder=tmp_path, before=NO_FIGURES + slow)
    assert wait_for((tmp_path / "begun").exists, first)
    second = run(*command, "--out", tmp_path / "auxiliary", "--restart", folder=tmp_path / "second")
    assert second.code == 1 and second.err.count("\n") == 1 and "another run" in second.err, second.err
    assert finish(first, tmp_path).code == 0 and not list((tmp_path / "auxiliary").glob(".*"))
    manifest = common.load_json(tmp_path / "auxiliary/manifest.json")
    assert len(manifest["samples"]) == len(list((tmp_path / "auxiliary").glob("*.npz"))) >= 8
    for content in ([], {}, dict(manifest, settings=3)):
        common.save_json(tmp_path / "auxiliary/manifest.json", content)
        done = run(*command, folder=tmp_path)
        assert done.code == 1 and done.err.count("\n") == 1 and "manifest.json: holds no settings" in done.err, done.err
