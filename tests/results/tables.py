"""Every table and number of README.md and tests/results/README.md, from the JSON files of experiments.py.

    python tests/results/tables.py            # writes what the files say between the markers, in place
    python tests/results/tables.py --check    # lists what differs; exit 1 if anything does

    <!-- table results toy -->…<!-- /table -->             metrics of every row of a test set, mean ± deviation of seeds
    <!-- table factors toy -->…<!-- /table -->             AUPR over MSP's of the same seed; differences to MSP
    <!-- table mgu toy_b -->…<!-- /table -->               the auxiliary sets that were used for a test set
    <!-- table hardware toy -->…<!-- /table -->            what the rows of a test set were computed with, and when
    <!-- table choice toy -->…<!-- /table -->              what choose.py's rule sees of a data set, and what it takes
    <!-- table remedies camvid -->…<!-- /table -->         the same rule on streets of two kinds
    <!-- table both main -->…<!-- /table -->               toy beside CamVid, pooled
    <!-- table curves camvid -->…<!-- /table -->           validation mIoU of f by epoch (real.json)
    <!-- table layers camvid -->…<!-- /table -->           what layers.py found (layers.json)
    <!-- table kinds pattern -->…<!-- /table -->           the toy by kind of unknown (kinds.json)
    <!-- table alarms camvid -->…<!-- /table -->           what alarms.py found (alarms.json)
    <!-- table photographs pooled -->…<!-- /table -->      models on photographs of real unknowns (photographs.json);
                                                           or objects
    <!-- table real idd_lite per_image -->…<!-- /table --> the study real (or realchoice): AUPR over MSP's with an
                                                           interval, on each test of a training set; or pooled,
                                                           fpr95, objects
    <!-- table real idd_lite per_image recipe -->…         the same over another row's
    <!-- table summary all -->…<!-- /table -->             every system on every test, AUPR per image over MSP's; bold
                                                           where its two intervals are on one side of 1; or short: a
                                                           row or two of each system
    <!--= toy recipe pooled aupr factor-->× 1.61<!--/-->   a number in a sentence

A number is named by its test set, its row, pooled, per_image or miou, the metric, how the seeds are put together (mean,
if nothing is said; sd; by-seed; factor or gain, over MSP of the same seed, mean; factor-by-seed, gain-by-seed; least:
of the factors; `over sign`: over the row sign as in the table real; `against sign`: with the interval, of FPR95 and
mIoU in points) and, if wanted, its decimals. `toy mgu default flip_rate` is of an auxiliary set, `toy base_rate` of the
protocol, `photographs camvid msp roadanomaly pooled aupr` of photographs.json, `alarms camvid recipe roadanomaly known`
(`as sign`: over the seeds of that row) of alarms.json, `crossed camvid sign wrong` of crossed.json. What the files do
not hold is "not run".
"""
import functools
import json
import re
import statistics
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import scipy.stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import choose
import experiments

FILES = HERE.parents[1] / "README.md", HERE / "README.md"
TABLE = re.compile(r"(<!-- table (.+?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
NUMBER = re.compile(r"(<!--= (.+?)-->)(.*?)(<!--/-->)", re.DOTALL)
ABSENT = "not run"
METRICS = ("aupr", "auroc", "fpr95")


def load(folder=HERE):
    """{test: dict(study, rows {(name, seed): row}, mgu [figures of a set], protocol)} of all JSON files of a folder."""
    tests = {}
    for path in sorted(Path(folder).glob("*.json")):
        found = json.loads(path.read_text())
        for row in found["rows"] if "study" in found else ():    # gpu.json holds times, photographs.json test sets
            test = tests.setdefault(row["test"], dict(study=found["study"], rows={}, data=row["data"]))
            test["rows"][row["name"], row["seed"]] = row
            test["protocol"] = found["protocol"][row["test"]]
            test["mgu"] = [m for m in found["mgu"] if m["data"] == row["data"]]
    for name, test in tests.items():
        for row_name in {n for n, _ in test["rows"]}:
            ran_with = {json.dumps({k: v for k, v in r.get("settings", {}).items() if k != "seed"}, sort_keys=True)
                        for (n, _), r in test["rows"].items() if n == row_name}
            if len(ran_with) > 1:
                raise ValueError(f"{name}, {row_name}: the seeds ran with different settings: {ran_with}")
    others = [Path(folder, f"{name}.json") for name in ("photographs", "layers", "alarms", "crossed", "kinds")]
    real = Path(folder, "real.json")
    curves = json.loads(real.read_text()).get("curves", []) if real.exists() else []
    return tests | {path.stem: json.loads(path.read_text()) for path in others if path.exists()} | \
        {"curves": dict(rows=curves)}


# ───────────────────────────────────────────── numbers of seeds ─────────────────────────────────────────────

def by_seed(test, name, group, metric=None):
    """{seed: number} of one row, in percent; group pooled, per_image or miou."""
    values = {seed: row[group] if group == "miou" else (row[group] or {}).get(metric)
              for (n, seed), row in sorted(test["rows"].items()) if n == name}
    return {seed: v for seed, v in values.items() if v is not None}


def against(test, name, group, metric=None, reference="msp", factor=True):
    """[number over (or, without `factor`, minus) that of the row `reference` of the same seed]."""
    values, base = by_seed(test, name, group, metric), by_seed(test, reference, group, metric)
    return [v / base[s] if factor else v - base[s] for s, v in values.items() if s in base]


def t_margin(values):
    """Half of the 95 % t interval of their mean; None of one value."""
    n = len(values)
    return scipy.stats.t.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None


def compare(test, name, reference, group):
    """(factor, low, high): AUPR of a row over that of `reference`, of the seeds that both have, and a 95 % interval;
    None for the ends where one seed is too few.

    per_image, where the rows hold images: of the mean over seeds and images; the interval tells how other seeds and
    other images of this kind would vary it. Else the geometric mean over the seeds; its t interval is of seeds alone.
    """
    rows = [{seed: row for (n, seed), row in test["rows"].items() if n == which} for which in (name, reference)]
    seeds = sorted(rows[0].keys() & rows[1].keys())
    if group == "per_image" and all("images" in of[s] for of in rows for s in seeds):
        return bootstrap_once(*(tuple(tuple(of[s]["images"]) for s in seeds) for of in rows))
    logs = [np.log(rows[0][s][group]["aupr"] / rows[1][s][group]["aupr"]) for s in seeds]
    margin = t_margin(logs)
    if margin is None:
        return float(np.exp(logs[0])), None, None
    return tuple(float(np.exp(np.mean(logs) + d)) for d in (0, -margin, margin))


@functools.cache
def drawn(shape, draws, seed):
    """How often each of the seeds (draws, shape[0]) and of the images (draws, shape[1]) is in each draw."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.uint16) for n in shape]


def bootstrap(a, b, draws=4000, seed=0):
    """(factor, low, high): mean of a over mean of b, arrays (seeds, images) of the same seeds and images, and the 2.5
    and 97.5 % quantiles of that over draws.

    A draw takes seeds and images with replacement, the same ones for a and b. Every seed sees the same test images, so
    a draw of images holds for all of its seeds."""
    a, b = np.array(a, float), np.array(b, float)
    seeds, images = drawn(a.shape, draws, seed)
    ratios = ((seeds @ a) * images).sum(1) / ((seeds @ b) * images).sum(1)
    return float(a.mean() / b.mean()), *(float(q) for q in np.percentile(ratios, (2.5, 97.5)))


bootstrap_once = functools.cache(bootstrap)     # of tuples: tables and sentences ask for the same again and again


def mean(values, form="{:.2f}"):
    return form.format(statistics.mean(values)).replace("-", "−") if values else ABSENT


def mean_sd(values, digits=2):
    """mean±sample deviation, or the one value there is."""
    values = list(values)
    return mean(values, f"{{:.{digits}f}}") + (f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def number(tests, words):
    """What stands for the words of a <!--= … --> marker. Raises ValueError where they name nothing."""
    *words, last = words.split()
    digits = int(last) if last.isdigit() else None
    words += [] if last.isdigit() else [last]
    test = tests.get(words[0])
    if test is None:
        return ABSENT
    form = f"{{:.{2 if digits is None else digits}f}}"
    if words[0] == "photographs":
        trained_on, score, data, *of = words[1:]
        row, = (r for r in test[trained_on]["evaluation"]["rows"] if (r["data"], r["score"]) == (data, score))
        return mean([row[of[0]][of[1]]], form)
    if words[0] == "alarms":
        like = words[6:] or words[2:3]       # "as ROW": the mean over the seeds that this row has too
        seeds = {r["seed"] for r in test["rows"] if [r["trained_on"], r["row"]] == [words[1], *like]}
        return mean([r[words[4]] for r in test["rows"] if r["seed"] in seeds and
                     [r[k] for k in ("trained_on", "row", "data")] == words[1:4]],
                    f"{{:.{1 if digits is None else digits}f}}")
    if words[0] == "crossed":
        return mean([r[words[3]] for r in test["rows"] if [r[k] for k in ("trained_on", "row")] == words[1:3]],
                    f"{{:.{1 if digits is None else digits}f}}")
    if words[1] == "mgu" and len(words) == 4:
        return mean([m[words[3]] for m in test["mgu"] if m["set"] == words[2]], form)
    if len(words) == 2 and words[1] in test["protocol"]:
        value = test["protocol"][words[1]]
        return form.format(value) if isinstance(value, float) else str(value)
    of = words[1:3] if words[2:3] == ["miou"] else words[1:4]
    how = words[1 + len(of):] or ["mean"]
    pair = how[0] in ("over", "against")
    paired = [["pooled", "aupr"], ["per_image", "aupr"]] + [["pooled", "fpr95"], ["miou"]] * (how[0] == "against")
    if len(how) != 1 + pair or pair and of[1:] not in paired or \
            of[0] not in {name for name, *_ in experiments.STUDIES[test["study"]]} or \
            of[1:] != ["miou"] and (of[1:2] not in (["pooled"], ["per_image"]) or of[2:] not in [[m] for m in METRICS]):
        raise ValueError(f"<!--= {' '.join(words)}-->: names nothing; expected TEST ROW pooled|per_image METRIC [HOW]")
    values = list(by_seed(test, *of).values())
    if not values or pair and not by_seed(test, *of).keys() & by_seed(test, how[1], *of[1:]).keys():
        return ABSENT
    if how[0] == "against":
        return real_cell(test, of[0], how[1], of[1] if of[-1] == "aupr" else of[-1]) or ABSENT
    if pair:
        return "× " + form.format(compare(test, of[0], how[1], of[1])[0])
    factors, gains = against(test, *of), against(test, *of, factor=False)
    signed = f"{{:+.{1 if digits is None else digits}f}}"
    return {"mean": lambda: mean(values, form),
            "sd": lambda: form.format(statistics.stdev(values)) if len(values) > 1 else ABSENT,
            "by-seed": lambda: ", ".join(form.format(v) for v in values),
            "factor": lambda: "× " + mean(factors, form),
            "factor-by-seed": lambda: ", ".join(form.format(v) for v in factors),
            "least": lambda: "× " + form.format(min(factors)),
            "gain": lambda: mean(gains, signed),
            "gain-by-seed": lambda: ", ".join(mean([v], signed) for v in gains)}[how[0]]()


# ─────────────────────────────────────────────────── tables ───────────────────────────────────────────────────

def lines_of(head, rows):
    """A Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def rows_of(test):
    """[(name, label)] of the rows that have numbers, in the order of the study."""
    return [(name, label) for name, label, *_ in experiments.STUDIES[test["study"]] if by_seed(test, name, "miou")]


def results(test):
    rows = []
    for name, label in rows_of(test):
        cells = [" / ".join(mean_sd(by_seed(test, name, group, m).values()) for m in METRICS)
                 for group in ("pooled", "per_image")]
        values = by_seed(test, name, "miou")
        rows.append([label, str(len(values)), *cells, mean_sd(values.values())])
    return lines_of(["AUPR / AUROC / FPR95", "seeds", "pooled", "per image", "mIoU"], rows)


def factors(test):
    rows = []
    for name, label in rows_of(test)[1:]:
        cells = []
        for group in ("pooled", "per_image"):
            values = against(test, name, group, "aupr")
            cells.append(f"× {mean(values)} ({', '.join(f'{v:.2f}' for v in values)})")
        fpr = [mean(against(test, name, group, "fpr95", factor=False), "{:+.1f}")
               for group in ("pooled", "per_image")]
        rows.append([label, *cells, ", ".join(fpr), mean(against(test, name, "miou", factor=False), "{:+.1f}")])
    return lines_of(["against MSP of the same seed", "AUPR pooled: mean (by seed)", "AUPR per image: mean (by seed)",
                     "FPR95 pooled, per image", "mIoU"], rows)


def mgu(test):
    rows = []
    for name in dict.fromkeys([*experiments.SETS, *(m["set"] for m in test["mgu"])]):
        sets = [m for m in test["mgu"] if m["set"] == name]
        if sets:
            s = sets[0]["settings"]
            step = f"η = {s.get('step-size')}, cap {s.get('max-steps')}" + f" ({name})" * (name not in experiments.SETS)
            values = [mean_sd([m[k] for m in sets], d) for k, d in (("flip_rate", 2), ("iterations_median", 0),
                                                                    ("mean_max_softmax", 3), ("rms", 1))]
            rows.append([step, str(len(sets)), str(sets[0]["images"]), *values])
    return lines_of(["step", "seeds", "images", "flipped, %", "iterations", "max S", "RMS"], rows)


def hardware(test):
    used = {}
    for row in test["rows"].values():
        used.setdefault(row["device"], []).append(row["date"])
    return "".join(f"* {device}: {len(dates)} rows, {min(dates)} to {max(dates)}\n" for device, dates in used.items())


def both(tests):
    """Toy beside CamVid: factor of pooled AUPR over MSP of the same seed, points of FPR95 and mIoU against it."""
    lines = []
    for name, label, *_ in experiments.STUDIES["main"][1:]:
        cells = []
        for test in (tests.get("toy"), tests.get("camvid")):
            factors = against(test, name, "pooled", "aupr") if test else []
            gains = [against(test, name, *of, factor=False) if test else []
                     for of in (("pooled", "fpr95"), ("miou",))]
            seeds = ", ".join(f"{v:.2f}" for v in factors)
            cells += [f"× {mean(factors)} ({seeds})", *(mean(g, "{:+.1f}") for g in gains)] if factors else \
                [ABSENT, "", ""]
        lines.append([label, *cells])
    return lines_of(["against MSP of the same seed", "toy: AUPR (by seed)", "FPR95", "mIoU", "CamVid: AUPR (by seed)",
                     "FPR95", "mIoU"], lines)


def choice(tests, data):
    """Per stage of the rule the rows that have run: factor of AUPR, points of mIoU; bold: the one that it takes."""
    rows = [r for test in tests.values() if test.get("study") == "choice" for r in test["rows"].values()]
    if not any(r["data"] == data for r in rows):
        return f"{ABSENT}\n"
    labels, lines = {name: label.replace("**", "") for name, label, *_ in experiments.CHOICE}, []
    for number, (_, found, best) in enumerate(choose.stages(rows, data), 1):
        for name, (factor, points) in found.items():
            cells = [f"{number}", labels[name], f"× {factor:.3f}", f"{points:+.2f}".replace("-", "−")]
            lines.append([f"**{c}**" for c in cells] if name == best else cells)
    return lines_of(["stage", "row", "AUPR against MSP", "mIoU"], lines)


def remedies(tests, data):
    """What choose.py's rule sees of a data set in realchoice.json; bold: the row that it takes."""
    rows = [r for test in tests.values() if test.get("study") == "realchoice" for r in test["rows"].values()]
    labels, lines = {name: label for name, label, *_ in experiments.STUDIES["realchoice"]}, []
    found, best = choose.remedies(rows, data)
    for name, (known, elsewhere, both_sets, points) in found.items():
        cells = [labels[name].replace("**", ""), *(f"× {factor:.2f}" for factor in (known, elsewhere, both_sets)),
                 f"{points:+.1f}".replace("-", "−")]
        lines.append([f"**{c}**" for c in cells] if name == best else cells)
    head = ["AUPR over MSP, pooled and per image", "known streets", "elsewhere", "both", "mIoU"]
    return lines_of(head, lines) if lines else f"{ABSENT}\n"


def real(tests, study, data, group, reference="msp"):
    """Every row on every test of the models of one training set, and its change of mIoU in points. group: per_image or
    pooled, AUPR over that of the row `reference`; fpr95, pooled, points against it; objects, sIoU / PPV / F1 (mean of
    the seeds)."""
    columns = {name: t for name, t in tests.items() if t.get("study") == study and t["data"] == data}
    columns = dict(sorted(columns.items(), key=lambda column: not column[0].endswith(("pasted", "choosing"))))
    shown = {name: t for name, t in columns.items()
             if group != "objects" or any("objects" in row for row in t["rows"].values())}
    if not shown:
        return f"{ABSENT}\n"
    rows = []
    for name, label, *_ in experiments.STUDIES[study]:
        gains = [gain for test in columns.values() for gain in against(test, name, "miou", None, reference, False)]
        seeds = {key: len({s for n, s in t["rows"] if n == name} & {s for n, s in t["rows"] if n == reference})
                 for key, t in columns.items()}
        if any(seeds.values()) and (name != reference or group == "objects"):
            most = max(seeds.values())
            cells = [(real_cell(test, name, reference, group) or ABSENT)
                     + f" ({seeds[key]} seed{'s' * (seeds[key] > 1)})" * (0 < seeds[key] < most)
                     for key, test in shown.items()]
            rows.append([label, str(most), *cells, mean(gains, "{:+.1f}")])
    names = [name.removeprefix(f"{data}_") for name in shown]
    base = next(label for name, label, *_ in experiments.STUDIES[study] if name == reference)
    head = {"objects": "sIoU / PPV / F1", "fpr95": f"FPR95 against {base}"}.get(group, f"AUPR over {base}")
    return lines_of([head, "seeds", *names, "mIoU"], rows)


def settled(test, name, reference="msp"):
    """Whether both intervals of AUPR, per image (seeds and images) and pooled (seeds), are on one side of 1."""
    ends = [compare(test, name, reference, group)[1:] for group in ("per_image", "pooled")]
    return None not in sum(ends, ()) and (min(low for low, _ in ends) > 1 or max(high for _, high in ends) < 1)


# Variations of the recipe and of the systems: on the results page alone
VARIANTS = {"clean_mix", "eta2", "eta10", "augmented", "augmented_mix", "kl0.05", "kl0.1", "frozen",
            "early", "early_recipe", "dh_paste_msp", "dh_decoy", "noisy_plain", "noisy_frozen", "pans_msp", "pgan_one",
            "dicnet_fifth", "synthcp_1", "synthcp_0.9",
            *(name for *_, scores in experiments.REAL_ALPHAS for name, _ in scores.values())}
SHORT = {       # the rows of the main page: what they are called there
    "entropy": "entropy", "maxlogit": "max logit", "ensemble": "Deep Ensemble", "tradi": "TRADI, 10 samples",
    "cknn": "dense kNN with energy", "cknn16": "the same, on the backbone's map of stride 16",
    "recipe": "**MGU + AaFt**, the recipe", "recipe_entropy": "the same, entropy",
    "clean": "control of MGU + AaFt: L_k alone", "sign": "control of MGU + AaFt: random signs",
    "pasted_kl": "AaFt on pasted cut-outs", "pasted_kl_inlier": "the same shapes, pieces of training images",
    "pieces": "pieces of training images in the shapes of segments",
    "dh_mgu": "DenseHybrid on MGU's D_s", "dh_paste": "DenseHybrid, pasted cut-outs",
    "noisy_msp": "noisy negatives, times MSP", "rnvp_entropy": "Real NVP outliers, entropy", "pans": "PAnS",
    "pgan": "PGAN (its abstract)", "m2f": "Mask2Former, max logit", "maskomaly": "Maskomaly, rejection alone",
    "margin": "Mask2Anomaly's loss on MGU's D_s, max logit", "synthcp": "SynthCP", "dicnet": "DiCNet"}
ALL_TESTS = {   # of every system: what the column is called
    "systems_toy": "toy", "systems_camvid": "CamVid: bicyclist", "camvid_pasted": "CamVid: pasted",
    "camvid_roadanomaly": "RoadAnomaly", "camvid_roadobstacle21": "RoadObstacle21",
    "camvid_fishyscapes_static": "Fishyscapes Static", "idd_lite_pasted": "IDD Lite: pasted",
    "idd_lite_roadanomaly": "RoadAnomaly", "idd_lite_roadobstacle21": "RoadObstacle21",
    "idd_lite_fishyscapes_static": "Fishyscapes Static"}


def summary(tests, length):
    """Every system on every test: AUPR per image over MSP's, with the number of seeds where it is not three; bold where
    it is settled. mIoU: points against MSP, of each of the four models f. length: "all", or "short" for SHORT."""
    rows, shown = [], {name: label.replace("**", "") for name, label, *_ in experiments.STUDIES["real"][1:]
                       if name not in VARIANTS}
    for name, label in (SHORT if length == "short" else shown).items():
        cells, points = [], []
        for key in ALL_TESTS:
            test = tests.get(key, dict(rows={}))
            n = len(by_seed(test, name, "per_image", "aupr"))
            mark = "**" * (n > 0 and settled(test, name))
            cells.append(f"{mark}× {compare(test, name, 'msp', 'per_image')[0]:.2f}{mark}" + f" ({n})" * (n != 3)
                         if n else "")
            if key.endswith(("toy", "camvid", "pasted")):
                points.append(mean(against(test, name, "miou", factor=False), "{:+.1f}") if n else "–")
        if any(cells):
            rows.append([label, *cells, ", ".join(points)])
    return lines_of(["AUPR over MSP", *ALL_TESTS.values(), "mIoU"], rows) if rows else f"{ABSENT}\n"


def real_cell(test, name, reference, group):
    """What stands in a column of the table real, or None."""
    found, base = ([row for (n, _), row in sorted(test["rows"].items()) if n == which] for which in (name, reference))
    if group == "objects":
        return " / ".join(mean([row["objects"][k] for row in found]) for k in experiments.OBJECTS) if found else None
    if not {r["seed"] for r in found} & {r["seed"] for r in base}:
        return None
    if group in ("fpr95", "miou"):
        points = against(test, name, "miou" if group == "miou" else "pooled", group, reference, factor=False)
        margin = t_margin(points)
        ends = [] if margin is None else [mean([statistics.mean(points) + d], "{:+.1f}") for d in (-margin, margin)]
        return mean(points, "{:+.1f}") + (f" [{ends[0]}, {ends[1]}]" if ends else "")
    factor, low, high = compare(test, name, reference, group)
    return f"× {factor:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def photographs(found, group):
    """photographs.json: {training set: dict(evaluation=results.json of evaluate.py on several test sets)}; a row a
    score."""
    keys, rows = ("siou", "ppv", "f1") if group == "objects" else METRICS, []
    for name, runs in found.items():
        evaluation = runs["evaluation"]
        for score in dict.fromkeys(row["score"] for row in evaluation["rows"]):
            cells = [" / ".join(mean([row[group][k]]) for k in keys) for row in evaluation["rows"]
                     if row["score"] == score]
            rows.append([name, score, *cells])
    return lines_of(["trained on", "score", *evaluation["protocol"]], rows)


def curves(data, rows):
    """Validation mIoU of f after about every tenth of its epochs, and after the last five; a row a seed."""
    rows = sorted((row for row in rows if row["data"] == data), key=lambda row: (row["f"], row["seed"]))
    epochs = sorted({int(epoch) for row in rows for epoch in row["miou"]})
    shown = [e for e in epochs if e % max(1, len(epochs) // 10) == 0 or e > epochs[-1] - 5]
    return lines_of(["f", "seed", *(f"epoch {e}" for e in shown)], [
        [row["f"], str(row["seed"]), *(f"{row['miou'][str(e)]:.1f}" if str(e) in row["miou"] else "" for e in shown)]
        for row in rows]) if rows else f"{ABSENT}\n"


def layers(data, rows):
    """layers.json: mean ± deviation over the seeds."""
    found = {}
    for row in rows:
        if row["data"] == data:
            found.setdefault((row["layer"], row["upsampling"]), []).append(row["aupr"])
    return lines_of(["map", "upsampling", "seeds", "AUPR pooled", "per image"], [
        [*key, str(len(seeds)), *(mean_sd(s[k] for s in seeds) for k in ("pooled", "per_image"))]
        for key, seeds in found.items()])


def kinds(axis, rows):
    """kinds.json: MSP → the recipe by kind of unknown, means over the seeds that have both; the factor by seed."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if row["axis"] == axis):
        of = [row for row in rows if (row["axis"], row["kind"]) == (axis, kind)]
        msp, recipe = ({row["seed"]: row for row in of if row["row"] == name} for name in ("msp", "recipe"))
        seeds = sorted(msp.keys() & recipe.keys())
        factors = [recipe[s]["aupr"] / msp[s]["aupr"] for s in seeds]
        aupr, auroc = (" → ".join(mean([found[s][metric] for s in seeds]) for found in (msp, recipe))
                       for metric in ("aupr", "auroc"))
        lines.append([kind, str(of[0]["pixels"]), aupr,
                      f"× {statistics.mean(factors):.2f} ({', '.join(f'{v:.2f}' for v in factors)})", auroc])
    return lines_of([axis, "pixels", "AUPR: MSP → the recipe", "factor (by seed)", "AUROC"], lines)


def alarms(trained_on, rows):
    """alarms.json: known / anomalous pixels that are flagged, in %, mean ± deviation over the seeds."""
    rows, lines = [row for row in rows if row["trained_on"] == trained_on], []
    data = [name for name in ("folder", *experiments.PHOTOGRAPHS) if name in {row["data"] for row in rows}]
    for name, label, *_ in experiments.STUDIES["real"]:
        of = [row for row in rows if row["row"] == name]
        if of:
            lines.append([label, str(len({row["seed"] for row in of})), *(
                " / ".join(mean_sd([row[k] for row in of if row["data"] == d], 1) for k in ("known", "anomalous"))
                for d in data)])
    return lines_of(["% of known / of anomalous pixels flagged", "seeds",
                     *(name.replace("folder", "pasted") for name in data)], lines)


def table(tests, words):
    kind, name, *more = words.split()
    if kind == "alarms":
        return alarms(name, tests[kind]["rows"]) if kind in tests else f"{ABSENT}\n"
    if kind == "curves":
        return curves(name, tests[kind]["rows"])
    if kind == "kinds":
        return kinds(name, tests[kind]["rows"]) if kind in tests else f"{ABSENT}\n"
    if kind == "layers":
        return layers(name, tests[kind]["rows"]) if kind in tests else f"{ABSENT}\n"
    if kind == "choice":
        return choice(tests, name)
    if kind == "summary":
        return summary(tests, name)
    if kind == "remedies":
        return remedies(tests, name)
    if kind == "both":
        return both(tests)
    if kind == "photographs":
        return photographs(tests[kind], name) if kind in tests else f"{ABSENT}\n"
    if kind in experiments.HALVES:
        return real(tests, kind, name, *more)
    make = {"results": results, "factors": factors, "mgu": mgu, "hardware": hardware}[kind]
    return make(tests[name]) if name in tests else f"{ABSENT}\n"


def differences(text, tests):
    """(the text with every table and number as the files say, [what differs])."""
    told = []

    def put(make):
        def replace(match):
            begin, words, found, end = match.groups()
            expected = make(tests, words)
            if found != expected:
                line = text[:match.start()].count("\n") + 1
                pairs = zip_longest(found.strip().splitlines(), expected.strip().splitlines(), fillvalue="")
                one, other = next(((a, b) for a, b in pairs if a != b), ("", ""))    # the first line that differs
                told.append(f"line {line}, {words}: found {one!r}, the files say {other!r}")
            return begin + expected + end
        return replace
    return NUMBER.sub(put(number), TABLE.sub(put(table), text)), told


def main(files=FILES, folder=HERE, check=False):
    """Rewrite the files, or list what differs; returns the number of differences."""
    tests, count = load(folder), 0
    for path in map(Path, files):
        new, told = differences(path.read_text(), tests)
        count += len(told)
        for line in told:
            print(f"{path.name}: {line}")
        if told and not check:
            path.write_text(new)
    return count


if __name__ == "__main__":
    checking = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not checking:
        sys.exit(__doc__)
    sys.exit(bool(main(check=checking)) and checking)
