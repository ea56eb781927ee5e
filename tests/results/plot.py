"""The picture of the study on real unknowns: what a row gains in known streets, and does to photographs from elsewhere.

    python tests/results/plot.py            # real.json → tests/figures/real_unknowns.png

A point is a row: AUPR per image over MSP's in known streets (pasted objects, to the right) and on RoadAnomaly
(upwards), mean and 95 % interval over the seeds and the images, as the tables have them (tables.compare). The numbers
stand in the file's metadata as well, where a test compares them with real.json.
"""
import json

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

import tables

OUT = tables.HERE.parent / "figures/real_unknowns.png"
PANELS = {"camvid": "f trained on CamVid", "idd_lite": "f trained on IDD Lite"}
KINDS = {   # label of the kind: its colour, {row: short label}
    "scores of f as it is": ("tab:gray", {
        "entropy": "entropy", "energy": "energy", "cknn": "kNN + energy", "cknn16": "kNN + energy, stride 16",
        "tradi": "TRADI"}),
    "MGU + AaFt": ("tab:blue", {
        "recipe": "the recipe", "recipe_entropy": "the recipe, entropy", "paper": "L_ER, α = 0.05",
        "mix_train": "training images mixed in", "augmented": "X augmented"}),
    "controls": ("tab:red", {
        "clean": "L_k alone", "still": "X unmoved", "noise": "shuffled", "sign": "random signs",
        "other": "MGU of another f", "ascent": "up the gradient"}),
    "D_s pasted into training images": ("tab:green", {
        "pasted_kl": "AaFt, cut-outs", "dh_paste": "DenseHybrid, cut-outs", "noisy": "noisy negatives, outlier head",
        "pasted_kl_off": "control: the paste, no D_s",
        "pasted_kl_inlier": "AaFt, pieces of training images", "pieces": "pieces, shapes of segments"}),
    "related systems": ("tab:orange", {
        "dh_mgu": "DenseHybrid, D_s of MGU", "rnvp_entropy": "Real NVP, entropy", "pgan": "PGAN",
        "m2f": "mask classification", "margin": "Mask2Anomaly's loss"}),
}


def numbers(tests):
    """{panel: {row: [[factor, low, high] in known streets, the same on RoadAnomaly]}} of the rows with two seeds on
    both, rounded to 3 digits."""
    found = {}
    for data in PANELS:
        pair = [tests.get(f"{data}_{test}", dict(rows={})) for test in ("pasted", "roadanomaly")]
        seeds = [{name: {s for n, s in test["rows"] if n == name} for name, _ in test["rows"]} for test in pair]
        found[data] = {name: [[round(v, 3) for v in tables.compare(test, name, "msp", "per_image")] for test in pair]
                       for _, rows in KINDS.values() for name in rows if all(len(s.get(name, ())) > 1 for s in seeds)}
    return found


def put_label(ax, text, at, colour, taken):
    """Write beside a point, on the side where it meets no box of `taken` (as few as possible); its box goes there."""
    tries = []
    for offset, sideways in (((5, 3), "left"), ((-5, 3), "right"), ((5, -9), "left"), ((-5, -9), "right"),
                             ((0, 6), "center"), ((0, -12), "center"), ((5, 10), "left"), ((-5, 10), "right"),
                             ((5, -16), "left"), ((-5, -16), "right")):
        label = ax.annotate(text, at, offset, textcoords="offset points", ha=sideways, fontsize=7, color=colour)
        box = label.get_window_extent(ax.figure.canvas.get_renderer())
        inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1
        tries.append((box.count_overlaps(taken) + 10 * (not inside), len(tries), label, box))
    best = min(tries, key=lambda t: t[:2])
    for t in tries:
        if t is not best:
            t[2].remove()
    taken.append(best[3])


def draw(found, out):
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.8), sharex=True, sharey=True)
    fig.subplots_adjust(left=0.07, right=0.99, bottom=0.09, top=0.94, wspace=0.04)
    axes[0].set(xscale="log", yscale="log", xlim=(0.75, 8), ylim=(0.36, 2.9), ylabel="AUPR over MSP: RoadAnomaly")
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_locator(matplotlib.ticker.FixedLocator([0.4, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6]))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_major_formatter(lambda value, _: f"× {value:g}")
    for ax, (data, title) in zip(axes, PANELS.items()):
        ax.set(title=title, xlabel="AUPR over MSP: unknown objects in known streets")
        ax.axhline(1, color="black", lw=0.8)
        ax.axvline(1, color="black", lw=0.8)
        ax.grid(alpha=0.2)
        points = [(found[data][name], label, colour) for colour, rows in KINDS.values()
                  for name, label in rows.items() if name in found[data]]
        for ((x, *x_ends), (y, *y_ends)), _, colour in points:
            ax.plot(x_ends, [y, y], color=colour, lw=1, alpha=0.25)
            ax.plot([x, x], y_ends, color=colour, lw=1, alpha=0.25)
            ax.plot(x, y, "o", color=colour, ms=5)
        here = ax.transData.transform([(x, y) for ((x, *_), (y, *_)), *_ in points]) if points else []
        taken = [matplotlib.transforms.Bbox.from_bounds(*(xy - 4), 8, 8) for xy in here]
        for ((x, *_), (y, *_)), label, colour in points:
            put_label(ax, label, (x, y), colour, taken)
    for kind, (colour, _) in KINDS.items():
        axes[0].plot([], [], "o", color=colour, label=kind)
    axes[0].legend(loc="lower left", fontsize=8)
    fig.savefig(out, dpi=110, metadata={"Description": json.dumps(found)})
    plt.close(fig)


if __name__ == "__main__":
    draw(numbers(tables.load()), OUT)
    print(f"wrote {OUT}")
