"""Metrics against scikit-learn (float64 sums over sorted pixels) and the CAOS formula."""
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from common import InputError
from evaluate import PLAIN, ScoreHistogram, bin_numbers, curve_metrics, image_metrics, sort_by_class

RNG = np.random.default_rng
TOLERANCE = 1e-3  # percentage points, for binned pooled metrics; per-image ones are exact


def caos_fpr(scores, positive, level=0.95):
    """`fpr_and_fdr_at_recall` of hendrycks/anomaly-seg, restated in float64."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    score, hit = scores[order].astype(np.float64), positive[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    tps = np.cumsum(hit, dtype=np.float64)[last_of_tie]
    fps = 1 + last_of_tie - tps
    tail = slice(tps.searchsorted(tps[-1]), None, -1)
    recall, fps = np.append((tps / tps[-1])[tail], 1), np.append(fps[tail], 0)
    return fps[np.argmin(np.abs(recall - level))] / np.sum(~positive)


def reference(scores, positive):
    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    return dict(aupr=100 * average_precision_score(positive, scores),
                auroc=100 * roc_auc_score(positive, scores),
                fpr95=100 * caos_fpr(scores, positive), fpr95_first=100 * fpr[np.argmax(tpr >= 0.95)])


def mask(rng, n, positives):
    positive = np.zeros(n, bool)
    positive[rng.choice(n, positives, replace=False)] = True
    return positive


def draw(kind, n=200_000, positives=3_000, seed=0):
    """float32 scores and bool labels of one regime that occurs in practice."""
    rng = RNG(seed)
    positive = mask(rng, n, positives)
    z = rng.standard_normal(n) + 1.5 * positive
    # four classes, the first usually confident: max probability from 0.3 to saturated at 1
    logits = 3 * rng.standard_normal((n, 4), np.float32) + [8, 0, 0, 0] - 7 * np.outer(positive, [1, 0, 0, 0])
    msp = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    scores = {
        "normal": lambda: z,
        "two normals": lambda: np.where(rng.random(n) < 0.3, 50 + 20 * z, z),
        "saturated MSP": lambda: -np.where(rng.random(n) < 0.9, 1 - 1e-7 * np.exp(z), msp),
        "MSP": lambda: -msp,
        "heavy ties": lambda: np.round(2 * z),
        "two values": lambda: (z > 1).astype(float),
        "constant": lambda: np.full(n, 0.25),
        "spread 1e4": lambda: 1e4 * z,
        "1e4 + normal": lambda: 1e4 + z,
        "-1e4 + normal": lambda: -1e4 + z,
        "saturated sigmoid": lambda: 1 / (1 + np.exp(-6 * z - 2)),
        "steep sigmoid": lambda: 1 / (1 + np.exp(-10 * z)),
        "log sigmoid": lambda: -np.log1p(np.exp(-6 * z - 2)),
        "1 - MSP": lambda: 1 - msp.astype(np.float32),
        "tiny": lambda: 1e-20 * z,
        "log odds": lambda: np.clip(-10 + 3 * z, -20, 0),
        "log(1 - MSP)": lambda: np.log(np.maximum(1 - msp, 2e-9)),
        "all magnitudes": lambda: np.sign(z) * 10.0 ** rng.uniform(-37, 37, n),
    }[kind]()
    return scores.astype(np.float32), positive


# What a score in the form of logits or of a logarithm looks like: bins are as good as the scores themselves
BINNED = ["normal", "two normals", "1 - MSP", "log(1 - MSP)", "log sigmoid", "log odds", "heavy ties", "two values",
          "constant", "all magnitudes"]
KINDS = [*BINNED, "saturated MSP", "MSP", "saturated sigmoid", "steep sigmoid", "tiny", "spread 1e4", "1e4 + normal",
         "-1e4 + normal"]


def pooled(scores, positive, batches=1, exact=0):
    """A histogram of bins; with `exact` above the number of pixels, of the scores themselves."""
    histogram = ScoreHistogram(exact)
    for s, p in zip(np.array_split(scores, batches), np.array_split(positive, batches)):
        histogram.add(*sort_by_class(s, p))
    return histogram


@pytest.mark.parametrize("positives", [3_000, 15, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_against_sklearn(kind, positives):
    scores, positive = draw(kind, positives=positives, seed=positives)
    want = reference(scores, positive)
    assert image_metrics(*sort_by_class(scores, positive)) == pytest.approx(want, abs=1e-9)
    kept = pooled(scores, positive, batches=7, exact=200_000)
    assert kept.metrics() == pytest.approx(want, abs=1e-9) and kept.table is None
    if kind in BINNED:
        exact = kind in ("heavy ties", "two values", "constant")
        binned = pooled(scores, positive, batches=7)
        assert binned.metrics() == pytest.approx(want, abs=1e-9 if exact else TOLERANCE)
        assert binned.table.sum() == 200_000


@pytest.mark.parametrize("sharpness", [0.5, 1, 4])
def test_bins_hold_the_scores_of_models(sharpness):
    """The four scores of maps as a network upsamples them, from undecided to saturated: the bound that is promised."""
    torch.manual_seed(0)
    size = dict(mode="bilinear", align_corners=False)
    coarse = torch.nn.functional.interpolate(4 * torch.randn(3, 13, 6, 6), 60, **size) + torch.randn(3, 13, 60, 60)
    unknown = torch.zeros(3, 60, 60, dtype=torch.bool)
    unknown[:, 20:26, 10:19] = True
    coarse = sharpness * torch.where(unknown[:, None], 0.6, 1) * coarse
    logits = torch.nn.functional.interpolate(coarse, 240, **size)
    positive = unknown.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    for name, score in PLAIN.items():
        scores = score(logits).numpy()
        want = reference(scores.ravel(), positive.ravel())
        binned = pooled(scores, positive, batches=3)
        assert len(np.unique(bin_numbers(scores.ravel()))) < len(np.unique(scores)), "nothing was tied"
        assert binned.metrics() == pytest.approx(want, abs=TOLERANCE), name


def test_bins_are_as_wide_as_documented():
    """They keep the order of the scores; 2e-6 of their value where most scores of models lie, 8e-6, 1e-3 elsewhere."""
    rng = RNG(0)
    scores = np.sort(rng.choice([-1, 1], 300_000) * 2.0 ** rng.uniform(-149, 128, 300_000)).astype(np.float32)
    scores = scores[np.isfinite(scores)]
    bins = bin_numbers(scores).astype(np.int64)
    assert (np.diff(bins) >= 0).all() and 0 <= bins[0] and bins[-1] < 1 << 24
    for low, high, width in ((-3, 5, 2e-6), (-20, -3, 8e-6), (5, 12, 8e-6), (-126, -20, 1e-3), (12, 127, 1e-3)):
        value = (rng.choice([-1, 1], 10_000) * 2.0 ** rng.uniform(low, high, 10_000)).astype(np.float32)
        assert (bin_numbers(value) != bin_numbers(value * np.float32(1 + width))).all()
        assert (bin_numbers(value) == bin_numbers(value * np.float32(1 + width / 4))).any()


def test_small_sets_are_exact():
    """Every tie pattern, including recalls equidistant from 95 % and a last threshold with ties."""
    for seed in range(150):
        rng = RNG(seed)
        n = int(rng.integers(2, 80))
        scores = rng.integers(-3, int(rng.integers(-1, 60)), n).astype(np.float32)
        positive = mask(rng, n, int(rng.integers(1, n)))
        want = pytest.approx(reference(scores, positive), abs=1e-9)
        assert image_metrics(*sort_by_class(scores, positive)) == want, seed
        assert pooled(scores, positive, exact=100 if seed % 3 else 0).metrics() == want, seed


def test_hand_computed():
    # descending: + - + (tie + -) -
    got = image_metrics(*sort_by_class(np.float32([6, 5, 4, 3, 3, 2]), np.array([1, 0, 1, 1, 0, 0], bool)))
    assert got == pytest.approx(dict(aupr=100 * (1 + 2 / 3 + 3 / 5) / 3, auroc=100 * (9 - 2.5) / 9,
                                     fpr95=200 / 3, fpr95_first=200 / 3))
    # 10 positives over 10 negatives, the last positive below them all: recall 0.9 and 1 are equally near
    # 0.95, but in float64 (as in the CAOS code) 0.9 is nearer: all ten negatives pass either way
    scores, positive = -np.arange(20, dtype=np.float32), np.r_[np.ones(9), np.zeros(10), 1].astype(bool)
    got = image_metrics(*sort_by_class(scores, positive))
    assert got["fpr95"] == got["fpr95_first"] == 100
    # 19 of 20 recalled is 95 %: the textbook reading stops before the negatives, CAOS after them
    got = image_metrics(*sort_by_class(-np.arange(30, dtype=np.float32),
                                       np.r_[np.ones(19), np.zeros(10), 1].astype(bool)))
    assert (got["fpr95"], got["fpr95_first"]) == (100, 0)


@pytest.mark.parametrize("value", [False, True])
def test_one_class_has_no_metrics(value):
    parts = sort_by_class(RNG(0).standard_normal(100, np.float32), np.full(100, value))
    assert image_metrics(*parts) is None
    for histogram in (ScoreHistogram(), ScoreHistogram(exact=0)):
        assert histogram.metrics() is None
        histogram.add(*parts)
        assert histogram.metrics() is None and histogram.total.sum() == 100
        histogram.add(*sort_by_class(np.zeros(3, np.float32), np.full(3, not value)))  # pooled: now defined
        assert histogram.metrics() is not None


@pytest.mark.parametrize("positives", [50, 170, 190, 410])
@pytest.mark.parametrize("spread", [1, 1000])
def test_two_recalls_are_equally_near(positives, spread):
    """47 and 48 of 50 are the same distance from 95 %, to the last bit: the CAOS code takes the larger FPR. With a
    wide `spread`, the two lie in different chunks of `curve_metrics`."""
    rng = RNG(positives)
    near = int(np.floor(0.95 * positives))
    assert abs(near / positives - 0.95) == abs((near + 1) / positives - 0.95)
    score = [np.full(rng.integers(1, 5), -float(i * spread)) for i in range(2 * positives)]   # a positive, negatives, …
    positive = np.concatenate([np.arange(len(s)) == 0 if i % 2 == 0 else np.zeros(len(s), bool)
                               for i, s in enumerate(score)])
    scores = np.concatenate(score).astype(np.float32)
    want = reference(scores, positive)
    neg = np.sort(-scores[~positive])
    by_hand = [np.searchsorted(neg, 2 * spread * k) / len(neg) for k in (near - 1, near, near + 1)]
    assert want["fpr95"] == pytest.approx(100 * by_hand[2]) and by_hand[0] < by_hand[1] < by_hand[2]
    for got in (image_metrics(*sort_by_class(scores, positive)), pooled(scores, positive).metrics(),
                pooled(scores, positive, exact=10_000).metrics()):
        assert got == pytest.approx(want, abs=1e-9)


def test_bad_input():
    for bad in (np.nan, np.inf, -np.inf):
        for label in (False, True):
            scores, positive = np.zeros(9, np.float32), np.zeros(9, bool)
            scores[4], positive[4] = bad, label
            with pytest.raises(ValueError, match="non-finite"):
                sort_by_class(scores, positive)
    with pytest.raises(TypeError):
        sort_by_class(np.zeros(9), np.zeros(9, bool))
    with pytest.raises(TypeError):
        sort_by_class(np.zeros(9, np.float32), np.zeros(9, np.uint8))


def test_signed_zeros_and_extremes():
    scores = np.float32([0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])
    positive = np.array([0, 1, 1, 0, 0, 1], bool)
    want = pytest.approx(reference(scores, positive), abs=1e-9)
    assert image_metrics(*sort_by_class(scores, positive)) == want
    assert pooled(scores, positive, exact=6).metrics() == want
    scores[2:4] = 1e-35, -1e-35     # the smallest float32 are one bin with 0
    assert pooled(scores, positive).metrics() == want


@pytest.mark.parametrize("kind", ["normal", "log odds", "all magnitudes"])
def test_independent_of_order_batches_and_ranks(kind):
    scores, positive = draw(kind, n=60_000, positives=900)
    whole = pooled(scores, positive)
    want, bins = whole.metrics(), whole.state()
    orders = [np.argsort(scores), np.argsort(-scores), np.argsort(np.abs(scores)), RNG(1).permutation(60_000)]
    for order, batches, cut in zip(orders, (50, 7, 50, 13), (100, 40_000, 40_000, 100)):
        s, p = scores[order], positive[order]
        assert pooled(s, p, batches).metrics() == want
        ranks = [pooled(s[:cut], p[:cut], 3), pooled(s[cut:], p[cut:], 3)]   # which saw different ranges
        for first, second in (ranks, ranks[::-1]):
            merged = ScoreHistogram(0)
            merged.merge(first.state())
            merged.merge(second.state())
            assert merged.metrics() == want
            got = merged.state()
            assert all(np.array_equal(got[k], bins[k]) for k in bins)
        ranks[0].merge(ranks[1].state())  # into a non-empty one
        assert ranks[0].metrics() == want


@pytest.mark.parametrize("exact", [59_999, 60_000])
def test_bins_begin_above_the_exact_size(exact):
    """Whether scores are kept or binned depends on their number alone, not on the order, the batches or the ranks."""
    scores, positive = draw("log(1 - MSP)", n=60_000, positives=900)
    want = pooled(scores, positive, exact=60_000 if exact == 60_000 else 0)
    assert (want.table is None) == (exact == 60_000)
    assert (want.metrics() == image_metrics(*sort_by_class(scores, positive))) == (exact == 60_000)
    cut = 30_000
    halves = [(scores[:cut], positive[:cut]), (scores[cut:], positive[cut:])]
    for batches in (1, 7):
        assert pooled(scores, positive, batches, exact).metrics() == want.metrics()
        for (s, p), (t, q) in (halves, halves[::-1]):
            merged = pooled(s, p, batches, exact)
            merged.merge(pooled(t, q, batches, exact).state())
            assert merged.metrics() == want.metrics() and (merged.table is None) == (exact == 60_000)
            assert np.array_equal(merged.curve(), want.curve())
            told = pooled(t, q, batches, exact)   # what ranks do: with their total known, they send bins
            told.make_room(60_000)
            merged = pooled(s, p, batches, exact)
            merged.make_room(60_000)
            merged.merge(told.state())
            assert merged.metrics() == want.metrics()
    # kept scores into bins, bins into kept ones
    small, large = (pooled(scores[:n], positive[:n], exact=1000) for n in (500, 60_000))
    both = pooled(np.append(scores, scores[:500]), np.append(positive, positive[:500]))
    for first, second in ((small, large), (large, small)):
        merged = ScoreHistogram(1000)
        merged.merge(first.state())
        merged.merge(second.state())
        assert merged.metrics() == both.metrics()


def test_nearly_tied_scores():
    """Flat areas whose scores differ in the last bits only: bins tie them, the scores themselves do not."""
    rng = RNG(0)
    bits = rng.integers(0, 40, 100_000)
    flat = np.float32(-7.3) * (1 + np.float32(2**-23) * bits.astype(np.float32))
    scores = np.append(flat, rng.uniform(-30, 0, 20_000)).astype(np.float32)
    positive = np.append(bits < 2, rng.random(20_000) < 0.02)
    want = reference(scores, positive)
    assert pooled(scores, positive).metrics()["auroc"] < want["auroc"] - TOLERANCE
    assert pooled(scores, positive, exact=120_000).metrics() == pytest.approx(want, abs=1e-9)


def test_merge_needs_equal_limits():
    with pytest.raises(ValueError):
        ScoreHistogram(4).merge(ScoreHistogram(7).state())


def test_memory_is_bounded():
    """256 MiB for any number of pixels, kept (half of them positive: the costliest share) or binned; and what is sent
    between ranks is small."""
    rng = RNG(0)
    scores = rng.standard_normal(1 << 20, np.float32)
    drawn = sort_by_class(scores, scores > rng.standard_normal(1 << 20, np.float32))
    tracemalloc.start()
    try:
        peaks = []
        for exact, images in ((1 << 24, 16), (1 << 24, 18), (0, 2), (0, 6)):
            histogram = ScoreHistogram(exact)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for n in range(images):         # each image has other scores, still ascending
                histogram.add(*(part * np.float32(1 + n / 100) for part in drawn))
            assert histogram.total.sum() == images << 20 and (histogram.table is None) == (images == 16)
            histogram.metrics()
            histogram.curve()
            sent = sum(v.nbytes for v in histogram.state().values())
            peaks.append(tracemalloc.get_traced_memory()[1] - before >> 20)
            assert peaks[-1] <= 256 and sent <= 128 << 20, (peaks, sent)
            del histogram
        assert peaks[3] <= peaks[2] + 32    # more bins are touched, that is all
    finally:
        tracemalloc.stop()


def test_as_many_pixels_as_32_bits_count():
    """A bin of 2**32 - 4 pixels; one pixel more than can be counted is an error, not a wrong number."""
    histogram = pooled(np.float32([0, 1, 1]), np.array([0, 0, 1], bool))
    state = histogram.state()
    tied, many = int(np.argmax(state["counts"][0] > 0)), 3_000_000_000
    state["counts"][1, tied] = many
    state["header"][2] = many + 1
    merged = ScoreHistogram(0)
    merged.merge(state)
    assert merged.metrics() == curve_metrics([(np.array([1]), np.array([1]), np.array([0]), np.array([many]))], 1,
                                             many + 1)
    assert merged.metrics()["auroc"] == pytest.approx(50, abs=1e-6)
    with pytest.raises(InputError, match=r"6000000004 pixels: .* count to 4294967295"):
        merged.merge(state)
    rest = 2**32 - 1 - (many + 2)
    state["counts"][1, tied] = rest - 2
    state["header"][2] = rest - 1
    merged = ScoreHistogram(0)
    for s in (dict(state), dict(state, counts=np.where(state["counts"] == rest - 2, many, state["counts"]),
                                header=np.array([0, 1, many + 1]))):
        merged.merge(s)
    assert merged.total.sum() == merged.table.sum(dtype=np.int64) == 2**32 - 1
    with pytest.raises(InputError, match="4294967296 pixels"):
        merged.add(*sort_by_class(np.float32([0]), np.array([False])))
