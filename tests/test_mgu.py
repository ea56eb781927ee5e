"""The MGU engine against Algorithm 1 written out: one image, float64, explicit sets of pixels."""
import math

import numpy as np
import pytest
import torch
from torch import nn

import common
import mgu_generate
from mgu_generate import choose, fold_batch_norm, mgu

H, W, N = 9, 12, 4


def small_model(seed=0):
    """A random convolutional net with batch norm, in eval mode: logits at input size, several classes in a picture."""
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, N, 1)).eval()
    with torch.no_grad():
        f[1].running_mean.uniform_(-0.3, 0.3)
        f[1].running_var.uniform_(0.5, 2)
        f[0].weight[:, :, 1, 1] *= 6          # a pixel decides for itself more than its neighbours do
        f[3].weight.mul_(6)
        f[3].bias -= f(torch.rand(8, 3, H, W)).mean((0, 2, 3))
    return f.requires_grad_(False)


def jobs_of(f, n=7, size=(H, W)):
    """n random images, each with a class that f sees in it as ỹ and labels that f gets partly right."""
    rng = np.random.default_rng(1)
    for k in range(n):
        X = torch.from_numpy(rng.integers(0, 256, (3, *size)).astype(np.uint8))
        S, seen = f(X[None].to(next(f.parameters()).dtype) / 255).softmax(1)[0].max(0)
        y = int(seen.flatten().mode().values)
        I = (seen == y) & (S < S[seen == y].quantile(0.1 * (k + 1)))    # the more, the farther from the boundary
        I[0, :4] = True    # some of them predicted as something else
        yield k, X, I, y


def algorithm_1(f, X, I, y, step, eta, max_steps):
    """Algorithm 1, line by line, in float64. Returns X' (grey levels) and P_ỹ of every iteration as sets."""
    f = f.double()
    X_aux = X.double() / 255                                              # 1: X' ← X
    I_y = {(h, w) for h in range(X.shape[1]) for w in range(X.shape[2]) if I[h, w]}   # 2
    sets = []
    while True:                                                           # 4 (with P ← I_ỹ at first, line 3)
        x = X_aux[None].clone().requires_grad_(True)
        f_x = f(x)[0]
        S = torch.exp(f_x) / torch.exp(f_x).sum(0, keepdim=True)          # Eq. 1
        P_y = {(h, w) for h, w in I_y if int(S[:, h, w].argmax()) == y}   # 5
        sets.append(P_y)
        if not P_y or len(sets) > max_steps:
            return X_aux * 255, sets
        L = sum(S[y, h, w] for h, w in P_y) / len(P_y)                    # Eq. 3
        L.backward()
        for h, w in P_y:                                                  # 6
            g = x.grad[0, :, h, w]
            moved = eta / 255 * torch.sign(g) if step == "sign" else eta * g
            X_aux[:, h, w] = torch.clamp(X_aux[:, h, w] - moved, 0, 1)    # 7, and the range of an image


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("step, eta, cap", [("plain", 1.0, 40), ("sign", 4.0, 60), ("sign", 16.0, 5)])
def test_engine_is_algorithm_1(step, eta, cap, batch_size):
    f = small_model().double()
    jobs = list(jobs_of(f))
    torch.set_default_dtype(torch.float64)
    try:
        ended = {key: (X, first, history) for key, X, first, history in mgu(f, jobs, batch_size, step, eta, 0, cap)}
    finally:
        torch.set_default_dtype(torch.float32)
    lengths = set()
    for key, X, I, y in jobs:
        want, sets = algorithm_1(f, X, I, y, step, eta, cap)
        got, first, history = ended[key]
        assert history == [len(s) for s in sets]
        assert (got - want).abs().max() / 255 < 1e-5
        assert {tuple(p) for p in first.nonzero().tolist()} == sets[0]
        lengths.add(len(sets))
    assert len(lengths) > 2      # they end at different times
    assert len(ended) == len(jobs)
    assert cap > 5 or any(h[-1] for _, _, h in ended.values())      # and some at the cap


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_engine_in_float32(batch_size):
    """float32 against the float64 algorithm: the plain step, so that rounding is not amplified by a sign."""
    f = small_model()
    jobs = list(jobs_of(f))
    ended = {key: (X, history) for key, X, _, history in mgu(f, jobs, batch_size, "plain", 0.5, 0, 5)}
    for key, X, I, y in jobs:
        want, sets = algorithm_1(small_model(), X, I, y, "plain", 0.5, 5)
        assert ended[key][1] == [len(s) for s in sets]
        assert (ended[key][0].double() - want).abs().max() / 255 < 1e-5


def test_doubling():
    """η is 1, 1, 2, 2, 4, …: no pixel moves further than their sum, one that never flips moves exactly that far."""
    f = nn.Conv2d(3, 2, 1)
    with torch.no_grad():   # class 0 wherever the mean is above 10 % of white: out of reach in 6 iterations
        f.weight[:] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) / 3
        f.bias[:] = torch.tensor([-0.1, 0.1])
    X = torch.full((3, 4, 5), 200, dtype=torch.uint8)
    (_, moved, _, history), = mgu(f.requires_grad_(False), [(0, X, torch.ones(4, 5, dtype=torch.bool), 0)], 1, "sign", 1.0, 2, 6)
    assert history == [20] * 7
    assert (200 - moved == 1 + 1 + 2 + 2 + 4 + 4).all()


def test_neighbours_and_order_change_nothing():
    f = common.Segmenter("deeplabv3", "mobilenet_v3_large", 5).eval().to(memory_format=torch.channels_last).requires_grad_(False)
    torch.manual_seed(3)
    pictures = torch.randint(0, 256, (5, 3, 48, 64), dtype=torch.uint8)
    top = f(common.to_input(pictures)).argmax(1)
    jobs = [(k, pictures[k], top[k] == int(top[k].flatten().mode().values), int(top[k].flatten().mode().values)) for k in range(5)]
    alone = {k: (X, h) for j in jobs for k, X, _, h in mgu(f, [j], 3, "sign", 1.0, 0, 6)}
    for order in (jobs, jobs[::-1], jobs[2:] + jobs[:2]):
        for k, X, _, h in mgu(f, order, 3, "sign", 1.0, 0, 6):
            assert torch.equal(X, alone[k][0]) and h == alone[k][1]
    assert any((alone[k][0] != pictures[k]).any() for k in range(5))


def test_only_I_moves_and_stays_in_range_and_flips():
    f = small_model(2)
    for key, X, I, y in jobs_of(f):
        (_, X_aux, first, history), = mgu(f, [(key, X, I, y)], 2, "sign", 8.0, 0, 200)
        assert torch.equal(X_aux[:, ~I], X[:, ~I].float())
        assert X_aux.min() >= 0 and X_aux.max() <= 255 and torch.equal(X_aux, X_aux.round())
        still = first & (f(X_aux[None] / 255).argmax(1)[0] == y)
        assert int(still.sum()) <= history[-1]
        assert history[-1] == 0 or len(history) == 201


def test_nothing_correct_ends_at_once_and_sizes_mix():
    f = small_model()
    jobs = list(jobs_of(f, 3)) + [(9, torch.zeros(3, H, W, dtype=torch.uint8), torch.zeros(H, W, dtype=torch.bool), 1)]
    jobs += [(10 + k, X, I, y) for k, X, I, y in jobs_of(f, 2, (7, 10))]
    ended = {k: (X, h) for k, X, _, h in mgu(f, jobs, 3, "sign", 2.0, 0, 20)}
    assert set(ended) == {0, 1, 2, 9, 10, 11}
    assert ended[9][1] == [0] and not ended[9][0].any()
    for key, X, I, y in jobs:
        want, sets = algorithm_1(small_model(), X, I, y, "sign", 2.0, 20)
        assert abs(len(ended[key][1]) - len(sets)) <= 1 and ended[key][0].shape == X.shape


def test_folding_is_the_same_function():
    f = common.Segmenter("pspnet", "mobilenet_v3_large", 6)
    torch.manual_seed(0)
    f.train()(torch.rand(4, 3, 64, 64))   # other running statistics than 0 and 1
    f.eval()
    X = torch.rand(2, 3, 50, 70)
    with torch.no_grad():
        assert torch.allclose(fold_batch_norm(f)(X), f(X), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold_batch_norm(f).modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in f.modules())   # f itself is untouched


def test_choice_of_images(toy_root, capsys):
    scenes = common.Scenes("toy", toy_root, "train")
    few, more, other = choose(scenes, 2, 0), choose(scenes, 4, 0), choose(scenes, 4, 1)
    pixels = {i: np.bincount(scenes[i]["label"].numpy().ravel(), minlength=256) for i in range(len(scenes))}
    assert all(pixels[i][c] >= mgu_generate.MIN_PIXELS for c, i in more)
    for c in range(12):
        of = lambda jobs: [i for k, i in jobs if k == c]
        assert of(few) == of(more)[:2] and len(set(of(more))) == len(of(more))
    assert more != other and more == choose(scenes, 4, 0)
    choose(scenes, 100, 0)
    enough = [sum(p[c] >= mgu_generate.MIN_PIXELS for p in pixels.values()) for c in range(12)]
    assert f"{scenes.classes[6]}: only {enough[6]} training images" in capsys.readouterr().out


def test_figures_of_the_manifest():
    row = dict(correct=10, flipped=9, unflipped=1, confidence=4.5, unknown=9, squares=48, values=12, iterations=3, linf=4, bytes=2000)
    found = mgu_generate.class_figures([row, dict(row, iterations=5, linf=7, flipped=10, unflipped=0)])
    assert found["flip_rate"] == 95 and found["iterations_median"] == 4 and found["linf"] == 7 and found["unflipped_pixels"] == 1
    assert found["rms"] == pytest.approx(math.sqrt(4)) and found["mean_max_softmax"] == 0.5 and found["kilobytes"] == 2
