"""Losses (Eq. 3 to 6) and scores (Eq. 2) against numpy float64 written from the equations, and closed forms."""
import math

import numpy as np
import pytest
import torch

import common
import evaluate

LOSSES = ("er", "kl")


# The reference: one pixel at a time, float64, the paper's own terms and order.

def softmax(f):
    """Eq. 1 of one pixel's logits (N,)."""
    e = np.exp(f - f.max())
    return e / e.sum()


def L_k(S, Z):
    return -math.log(S[Z])


def L_KL(S):
    z = 1 / len(S)
    return -sum(z * math.log(S_i / z) for S_i in S)


def L_ER(S, r=None):
    z = 1 / len(S)
    H_max = -sum(z * math.log(z) for _ in S)
    r = 0.01 * H_max if r is None else r
    return (H_max + r) / (-sum(S_i * math.log(S_i) for S_i in S if S_i > 0) + r) - 1


def pixels(logits):
    """[(b, h, w)] of logits (B, N, H, W), and the softmax of each as {(b, h, w): (N,)}."""
    B, _, H, W = logits.shape
    where = [(b, h, w) for b in range(B) for h in range(H) for w in range(W)]
    return where, {(b, h, w): softmax(np.asarray(logits[b, :, h, w], np.float64)) for b, h, w in where}


def eq_5(logits, Z, unknown, alpha, loss):
    where, S = pixels(logits)
    D_k = [L_k(S[p], Z[p]) for p in where if Z[p] < logits.shape[1] and not unknown[p]]
    D_s = [(L_KL if loss == "kl" else L_ER)(S[p]) for p in where if unknown[p]]
    return (np.mean(D_k) if D_k else 0) + alpha * (np.mean(D_s) if D_s else 0)


def batch(seed=0, B=3, N=5, H=4, W=6, spread=4.0):
    """Random float32 logits, labels with 255 and 254 among them, and D_s of very different size in each image."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(spread * rng.standard_normal((B, N, H, W)), dtype=torch.float32)
    Z = torch.tensor(rng.choice([*range(N), 255, 254], (B, H, W)), dtype=torch.uint8)
    unknown = torch.tensor(rng.random((B, H, W)) < np.linspace(0, 0.7, B)[:, None, None])
    return logits, Z, unknown


def per_pixel(value, logits):
    """Reference of a per-pixel loss as an array (B, H, W)."""
    where, S = pixels(logits.numpy())
    out = np.empty((logits.shape[0], *logits.shape[2:]))
    for p in where:
        out[p] = value(S[p], p)
    return out


def test_log_softmax_is_eq_1():
    logits = batch()[0]
    S = common.log_softmax(logits).exp().numpy()
    where, want = pixels(logits.numpy())
    for b, h, w in where:
        np.testing.assert_allclose(S[b, :, h, w], want[b, h, w], rtol=1e-5)


def test_loss_k():
    logits, Z, _ = batch()
    want = per_pixel(lambda S, p: L_k(S, int(Z[p])) if Z[p] < 5 else 0, logits)
    got = common.loss_k(common.log_softmax(logits), Z)
    assert got.shape == Z.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert (got[Z >= 5] == 0).all() and (Z >= 5).any()


def test_loss_mgu_is_eq_3():
    logits, _, P = batch()     # P of image 0 is empty
    y = torch.tensor([1, 4, 2])
    where, S = pixels(logits.numpy())
    want = [np.mean([S[p][y[b]] for p in where if p[0] == b and P[p]]) if P[b].any() else 0 for b in range(3)]
    assert want[0] == 0 and min(want[1:]) > 0
    np.testing.assert_allclose(common.loss_mgu(common.log_softmax(logits), P, y), want, rtol=1e-5)


def test_loss_mgu_keeps_images_apart():
    """The gradient of the sum is, in each image, that of the image alone; an empty P_ỹ has none."""
    logits, _, P = batch()
    y = torch.tensor([1, 4, 2])
    logits = logits.double().requires_grad_(True)
    gradient, = torch.autograd.grad(common.loss_mgu(common.log_softmax(logits), P, y).sum(), logits)
    S = torch.softmax(logits.detach(), 1)
    for b in range(3):   # dS_y/df_i = S_y (1[i = y] − S_i)
        S_y = S[b, y[b]]
        want = -S[b] * S_y
        want[y[b]] += S_y
        torch.testing.assert_close(gradient[b], want * P[b] / max(int(P[b].sum()), 1))
    assert not gradient[0].any()


def test_loss_kl_is_eq_4():
    logits = batch()[0]
    np.testing.assert_allclose(common.loss_kl(common.log_softmax(logits)), per_pixel(lambda S, p: L_KL(S), logits),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("r", (None, 0.3))
def test_loss_er_is_eq_6(r):
    logits = batch()[0]
    got = common.loss_er(common.log_softmax(logits), r)
    np.testing.assert_allclose(got, per_pixel(lambda S, p: L_ER(S, r), logits),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("S, er", ((0.65, 0.75), (0.93, 4.1), (0.996, 21.6), (1 - 1e-6, 0.07)))
def test_how_the_losses_pull_at_the_largest_logit(S, er):
    """The figures of loss_er's docstring, which README repeats: N = 12, the rest spread evenly."""
    z = torch.zeros(1, 12, 1, 1, dtype=torch.float64)
    z[0, 0] = np.log(11 * S / (1 - S))
    z.requires_grad_(True)
    pulls = [torch.autograd.grad(loss(common.log_softmax(z)).sum(), z)[0][0, 0].item()
             for loss in (common.loss_er, common.loss_kl)]
    H, H_max = -S * np.log(S) - (1 - S) * np.log((1 - S) / 11), np.log(12)
    np.testing.assert_allclose(pulls, (1.01 * H_max * S * (np.log(S) + H) / (H + 0.01 * H_max)**2, S - 1 / 12))
    assert pulls[0] == pytest.approx(er, abs=0.05 if er > 1 else 0.005)


def log_S(*S):
    return torch.tensor(S, dtype=torch.float64).log().view(1, -1, 1, 1)


@pytest.mark.parametrize("N", (2, 12, 17))
def test_uniform_costs_nothing(N):
    uniform = common.log_softmax(torch.full((1, N, 2, 2), 7.0))
    assert common.loss_kl(uniform).abs().max() < 1e-6
    assert common.loss_er(uniform).abs().max() < 1e-6


@pytest.mark.parametrize("N", (2, 12, 17))
def test_one_hot_costs_100_under_er(N):
    logits = torch.zeros(1, N, 1, 1)
    logits[0, 1] = 200.0
    assert common.loss_er(common.log_softmax(logits)).item() == pytest.approx(100, rel=1e-5)   # 1/0.01


def test_known_distributions():
    # (1/2, 1/4, 1/4): −1/3 (log 3/2 + 2 log 3/4)
    want = -(math.log(3/2) + 2 * math.log(3/4)) / 3
    assert common.loss_kl(log_S(1/2, 1/4, 1/4)).item() == pytest.approx(want, rel=1e-12)
    # Two of four classes share the mass: H = log 2 = H_max / 2, so (1 + 0.01) / (1/2 + 0.01) − 1
    halves = torch.tensor([0.0, 0.0, -1e4, -1e4]).view(1, 4, 1, 1)
    assert common.loss_er(common.log_softmax(halves)).item() == pytest.approx(1.01 / 0.51 - 1, rel=1e-5)
    # H = (1/2 + 2/4 + 2/4) log 2 = 3/2 log 2 and r = log 2: (log 3 + log 2) / (5/2 log 2) − 1
    want = math.log(6) / (2.5 * math.log(2)) - 1
    assert common.loss_er(log_S(1/2, 1/4, 1/4), math.log(2)).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("alpha", (0, 0.05, 2.0))
def test_objective_is_eq_5(loss, alpha):
    logits, Z, unknown = batch()
    got = common.objective(logits, Z, unknown, alpha, loss)
    assert got.shape == ()
    assert got.item() == pytest.approx(eq_5(logits.numpy(), Z.numpy(), unknown.numpy(), alpha, loss), rel=1e-5)


def test_default_is_the_papers():
    """α = 0.05 and L_ER (Sec. IV-A)."""
    logits, Z, unknown = batch(1)
    want = eq_5(logits.numpy(), Z.numpy(), unknown.numpy(), 0.05, "er")
    assert common.objective(logits, Z, unknown).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("D_k, D_s", ((True, False), (False, True), (False, False)))
def test_empty_sets_count_nothing(loss, D_k, D_s):
    logits, Z, unknown = batch()
    Z = Z if D_k else torch.full_like(Z, 255)
    unknown = unknown if D_s else torch.zeros_like(unknown)
    logits.requires_grad_(True)
    value = common.objective(logits, Z, unknown, 0.5, loss)
    value.backward()
    want = eq_5(logits.detach().numpy(), Z.numpy(), unknown.numpy(), 0.5, loss)
    assert value.item() == pytest.approx(want, rel=1e-5) and (want > 0) == (D_k or D_s)
    assert logits.grad.isfinite().all()
    used = (Z < 5) & ~unknown | unknown
    assert not logits.grad.permute(0, 2, 3, 1)[~used].any()
    assert logits.grad.permute(0, 2, 3, 1)[used].any() == (D_k or D_s)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", (1e4, -1e4, 1e30))
def test_saturated_logits_stay_finite(loss, size):
    """One-hot to the last bit, right and wrong, on pixels of D_k and of D_s; L_KL grows linearly there."""
    N = 12
    logits = torch.zeros(2, N, 3, 4)
    logits[:, 3] = size
    logits.requires_grad_(True)
    Z = torch.tensor([3, 5, 255, 0], dtype=torch.uint8).expand(2, 3, 4)
    unknown = torch.zeros(2, 3, 4, dtype=torch.bool)
    unknown[0] = True
    value = common.objective(logits, Z, unknown, 0.05, loss)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    if size == 1e4 and loss == "kl":
        # Every image row has the classes 3, 5, 0: L_k = 0, size, size; L_KL = size (N − 1) / N − log N
        assert value.item() == pytest.approx(2 / 3 * size + 0.05 * (size * (N - 1) / N - math.log(N)), rel=1e-5)
    if size == 1e4 and loss == "er":
        assert value.item() == pytest.approx(2 / 3 * size + 0.05 * 100, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_sum_to_the_whole(loss):
    """With n_k and n_s of the whole batch, micro-batches of any size add up: value and gradient."""
    logits, Z, unknown = batch(2, B=5)
    assert not unknown[0].any() and unknown[1:].any((1, 2)).all()    # a part without D_s is among them
    logits = logits.double().requires_grad_(True)
    whole = common.objective(logits, Z, unknown, 0.5, loss)
    want, = torch.autograd.grad(whole, logits)
    n_k, n_s = int(((Z < 5) & ~unknown).sum()), int(unknown.sum())
    parts = [common.objective(logits[p], Z[p], unknown[p], 0.5, loss, n_k, n_s)
             for p in (slice(0, 1), slice(1, 3), slice(3, 5))]
    got, = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(got, want)
    # ... which the plain mean of the parts' own objectives is not: the counts matter
    own = [common.objective(logits[p], Z[p], unknown[p], 0.5, loss) for p in (slice(0, 1), slice(1, 3), slice(3, 5))]
    assert abs(sum(own) / 3 - whole) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_logits_are_computed_in_float32(loss):
    """Under autocast the result has the bits of the same logits cast to float32 outside it."""
    logits, Z, unknown = batch(spread=10.0)
    logits = logits.bfloat16()
    want = common.objective(logits.float(), Z, unknown, 0.05, loss)
    with torch.autocast("cpu", torch.bfloat16):
        got = common.objective(logits, Z, unknown, 0.05, loss)
        each = common.loss_mgu(common.log_softmax(logits), unknown, torch.tensor([1, 4, 2]))
    assert got.dtype == each.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(common.objective(logits, Z, unknown, 0.05, loss), want)
    assert got.item() == pytest.approx(eq_5(logits.float().numpy(), Z.numpy(), unknown.numpy(), 0.05, loss), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_the_objective(loss):
    logits, Z, unknown = batch(3, B=2, N=4, H=2, W=3, spread=1.5)
    assert unknown.any() and ((Z < 4) & ~unknown).any()
    f = logits.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda f: common.objective(f, Z, unknown, 0.5, loss), f)


def test_gradient_of_mgu():
    logits, _, P = batch(4, B=2, N=4, H=2, W=3, spread=1.5)
    y = torch.tensor([0, 3])
    f = logits.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda f: common.loss_mgu(common.log_softmax(f), P, y), f)


# ──────────────────────────────────────────────── scores ────────────────────────────────────────────────

REFERENCE = dict(
    msp=lambda f: math.log(1 - softmax(f).max()),
    entropy=lambda f: -sum(S_i * math.log(S_i) for S_i in softmax(f)),
    maxlogit=lambda f: -f.max(),
    energy=lambda f: -math.log(np.exp(f).sum()))


def test_every_score_has_a_reference():
    assert REFERENCE.keys() == evaluate.PLAIN.keys()


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_scores(name, dtype):
    logits = batch(5)[0].to(dtype)
    got = evaluate.PLAIN[name](logits)
    assert got.dtype == torch.float32 and got.shape == (3, 4, 6)
    exact = logits.double().numpy()
    want = [REFERENCE[name](exact[b, :, h, w]) for b, h, w in pixels(exact)[0]]
    np.testing.assert_allclose(got.flatten(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFERENCE)
def test_scores_are_finite_on_saturated_logits(name):
    for size in (1e4, -1e4):
        logits = torch.zeros(1, 12, 2, 2)
        logits[:, 3] = size
        assert evaluate.PLAIN[name](logits).isfinite().all()


@pytest.mark.parametrize("name, low, high", (("msp", None, math.log(11 / 12)), ("entropy", 0, math.log(12))))
def test_ends_of_the_range(name, low, high):
    assert evaluate.PLAIN[name](torch.zeros(1, 12, 1, 1)).item() == pytest.approx(high, rel=1e-5)
    logits = torch.zeros(1, 12, 1, 1)
    logits[0, 3] = 500.0
    value = evaluate.PLAIN[name](logits).item()
    want = pytest.approx(math.log(11) - 500, rel=1e-6) if low is None else pytest.approx(low, abs=1e-6)
    assert value == want


def test_msp_has_the_order_of_eq_2():
    rng = np.random.default_rng(6)
    logits = torch.tensor(3 * rng.standard_normal((1, 12, 40, 50)), dtype=torch.float32)
    exact = logits.double().numpy()[0].reshape(12, -1)
    top = np.array([softmax(f).max() for f in exact.T])
    order = np.argsort(-top)
    got = evaluate.score_msp(logits).numpy().ravel().astype(np.float64)[order]
    # ascending, up to float32's rounding of values whose float64 originals differ by less than it
    assert (np.diff(got) > -2e-6 * np.abs(got[1:]).clip(1)).all()
    clear = np.flatnonzero(np.diff(np.log1p(-top[order])) > 1e-4)
    assert len(clear) > 500 and (np.diff(got)[clear] > 0).all()


def test_msp_does_not_tie_where_float32_softmax_does():
    gaps = torch.linspace(18, 30, 49)                 # of the largest logit: 1 − max S from 1e-7 down to 1e-12
    logits = torch.zeros(1, 12, 1, 49)
    logits[0, 4, 0] = gaps
    logits[0, 0, 0, ::2] = -3.0
    assert (torch.softmax(logits, 1).max(1).values.unique()).numel() < 10     # float32: nearly all are the same
    exact = np.array([softmax(f).max() for f in logits.double().numpy()[0, :, 0].T])
    got = evaluate.score_msp(logits)[0, 0].numpy()
    assert len(np.unique(exact)) == len(np.unique(got)) == 49
    assert (np.argsort(got) == np.argsort(-exact)).all()
