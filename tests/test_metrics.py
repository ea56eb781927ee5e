"""Metrics against scikit-learn (float64 sums over sorted pixels) and the CAOS formula."""
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from evaluate import ScoreHistogram, curve_metrics, image_metrics, sort_by_class

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


KINDS = ["normal", "two normals", "saturated MSP", "MSP", "1 - MSP", "log(1 - MSP)", "saturated sigmoid",
         "steep sigmoid", "log sigmoid", "log odds", "heavy ties", "two values", "constant", "tiny",
         "spread 1e4", "1e4 + normal", "-1e4 + normal", "all magnitudes"]


def pooled(scores, positive, limit=384, batches=1, exact=0):
    """A histogram of bins; with `exact` above the number of pixels, of the scores themselves."""
    histogram = ScoreHistogram(limit, exact)
    for s, p in zip(np.array_split(scores, batches), np.array_split(positive, batches)):
        histogram.add(*sort_by_class(s, p))
    return histogram


@pytest.mark.parametrize("positives", [3_000, 15, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_against_sklearn(kind, positives):
    scores, positive = draw(kind, positives=positives, seed=positives)
    want = reference(scores, positive)
    assert image_metrics(*sort_by_class(scores, positive)) == pytest.approx(want, abs=1e-9)
    histogram = pooled(scores, positive, batches=7)
    exact = histogram.level == 0
    assert histogram.metrics() == pytest.approx(want, abs=1e-9 if exact else TOLERANCE)
    if kind in ("saturated MSP", "MSP", "heavy ties", "1e4 + normal"):
        assert exact
    kept = pooled(scores, positive, batches=7, exact=200_000)
    assert kept.metrics() == pytest.approx(want, abs=1e-9) and not kept.table.any()


def test_small_sets_are_exact():
    """Every tie pattern, including recalls equidistant from 95 % and a last threshold with ties."""
    for seed in range(150):
        rng = RNG(seed)
        n = int(rng.integers(2, 80))
        scores = rng.integers(-3, int(rng.integers(-1, 60)), n).astype(np.float32)
        positive = mask(rng, n, int(rng.integers(1, n)))
        want = pytest.approx(reference(scores, positive), abs=1e-9)
        assert image_metrics(*sort_by_class(scores, positive)) == want, seed
        assert pooled(scores, positive).metrics() == want, seed


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
    histogram = ScoreHistogram(4)
    assert histogram.metrics() is None
    histogram.add(*parts)
    assert histogram.metrics() is None and histogram.total.sum() == 100
    histogram.add(*sort_by_class(np.zeros(3, np.float32), np.full(3, not value)))  # pooled: now defined
    assert histogram.metrics() is not None


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
    assert pooled(scores, positive).metrics() == want


@pytest.mark.parametrize("kind", ["normal", "saturated MSP", "spread 1e4", "all magnitudes"])
@pytest.mark.parametrize("limit", [3, 40])
def test_independent_of_order_batches_and_ranks(kind, limit):
    scores, positive = draw(kind, n=60_000, positives=900)
    whole = pooled(scores, positive, limit)
    want, rows = whole.metrics(), whole.state()
    orders = [np.argsort(scores), np.argsort(-scores), np.argsort(np.abs(scores)), RNG(1).permutation(60_000)]
    for order, batches in zip(orders, (50, 7, 50, 13)):
        s, p = scores[order], positive[order]
        assert pooled(s, p, limit, batches).metrics() == want
        for cut in (100, 40_000):  # the ranks saw different ranges, hence different shifts
            ranks = [pooled(s[:cut], p[:cut], limit, 3), pooled(s[cut:], p[cut:], limit, 3)]
            for first, second in (ranks, ranks[::-1]):
                merged = ScoreHistogram(limit, 0)
                merged.merge(first.state())
                merged.merge(second.state())
                assert merged.metrics() == want
                got = merged.state()
                assert all(np.array_equal(got[k], rows[k]) for k in rows)
            ranks[0].merge(ranks[1].state())  # into a non-empty one
            assert ranks[0].metrics() == want
    # the documented rule: the smallest level at which the rows fit
    bits = (scores + np.float32(0)).view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | 1 << 31).astype(np.int64)
    small = np.abs(scores) < 0.5
    rows = [len(np.unique(keys[small] >> 16 + s)) + len(np.unique(keys[~small] >> 16 + max(0, s - 6)))
            for s in range(22)]
    assert whole.level == [n <= limit for n in rows].index(True)


@pytest.mark.parametrize("exact", [59_999, 60_000])
def test_bins_begin_above_the_exact_size(exact):
    """Whether scores are kept or binned depends on their number alone, not on the order, the batches or the ranks."""
    scores, positive = draw("log(1 - MSP)", n=60_000, positives=900)
    want = pooled(scores, positive, 40, exact=60_000 if exact == 60_000 else 0)
    assert (want.level == 0) == (exact == 60_000)
    cut = 30_000
    halves = [(scores[:cut], positive[:cut]), (scores[cut:], positive[cut:])]
    for batches in (1, 7):
        assert pooled(scores, positive, 40, batches, exact).metrics() == want.metrics()
        for (s, p), (t, q) in (halves, halves[::-1]):
            merged = pooled(s, p, 40, batches, exact)
            merged.merge(pooled(t, q, 40, batches, exact).state())
            assert merged.metrics() == want.metrics() and (merged.kept is None) == (exact < 60_000)
            assert np.array_equal(merged.curve(), want.curve())
    small, large = (pooled(scores[:n], positive[:n], 40, exact=1000) for n in (500, 60_000))   # kept scores into bins, bins into kept ones
    for first, second in ((small, large), (large, small)):
        merged = ScoreHistogram(40, 1000)
        merged.merge(first.state())
        merged.merge(second.state())
        assert merged.metrics() == pooled(np.append(scores, scores[:500]), np.append(positive, positive[:500]), 40).metrics()


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
    for other in (ScoreHistogram(5), ScoreHistogram(4, 7)):
        with pytest.raises(ValueError):
            ScoreHistogram(4).merge(other.state())


def test_memory_is_bounded():
    histogram = ScoreHistogram(8, 0)
    table = histogram.table
    for seed in range(20):
        histogram.add(*sort_by_class(*draw("all magnitudes", n=20_000, positives=300, seed=seed)))
        assert histogram.table is table and table.shape == (8, 2, 65536)
        assert len(histogram.free) + (histogram.row >= 0).sum() == 8
    assert table.sum() == 400_000 == histogram.total.sum()


def test_counts_beyond_uint32():
    """A bin of 6e9 pixels, out of two states whose bins still fit 32 bits."""
    histogram = pooled(np.float32([0, 1, 1, 2]), np.array([0, 0, 1, 1], bool))
    state = histogram.state()
    neg = state["counts"][:, 1]
    neg[neg > 0] = 3_000_000_000
    state["header"][4] = 6_000_000_000
    merged = ScoreHistogram(exact=0)
    merged.merge(state)
    merged.merge(state)
    N = 12 * 10**9  # half at score 0, half tied with the first of 2 x 2 positives
    want = curve_metrics([(np.array([2]), np.array([0]), np.array([0])),
                          (np.array([2]), np.array([0]), np.array([N // 2]))], 4, N)
    assert merged.metrics() == want
    assert want["auroc"] == pytest.approx(100 * (0.5 + 0.5 * 0.75))
    merged.add(*sort_by_class(np.float32([0]), np.array([False])))  # still counts after widening
    assert merged.table.sum() == merged.total.sum() == N + 5


def test_accuracy_survives_saturation():
    """Outliers of all magnitudes below 1 cost precision near 0; that next to -1 or 1 stays complete."""
    for kind, sign in ("saturated MSP", -1), ("saturated sigmoid", 1):
        scores, positive = draw(kind)
        wide = (sign * 10.0 ** RNG(3).uniform(-37, 0, 3000)).astype(np.float32)
        scores, positive = np.append(scores, wide), np.append(positive, np.zeros(3000, bool))
        histogram = pooled(scores, positive)
        assert histogram.level > 0
        assert histogram.metrics() == pytest.approx(reference(scores, positive), abs=TOLERANCE)
