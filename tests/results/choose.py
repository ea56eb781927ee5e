"""The recipe that choice.json leads to, by a rule that was written before those runs were made.

    python tests/results/choose.py            # prints {"toy": {"mgu": …, "finetune": …}, "camvid": …}

Of the rows that lose at most 1.5 points of mIoU against MSP in the mean of the seeds, the one with the largest factor
of AUPR over MSP of the same seed: the geometric mean of pooled and per-image AUPR, of the seeds, and of the choosing
sets. In three stages, one thing at a time from the same base: the step size and the cap of MGU; the known images and
batch norm; the loss and α. Where no row of a stage is admissible, the one that loses the least mIoU.

Of realchoice.json, whose models see streets of their own kind and streets from elsewhere, the same rule takes what
serves both: the largest geometric mean over the two sets (REMEDIES; this too was written before the second was looked
at).
"""
import json
import math
from pathlib import Path

STAGES = (
    ("mgu", {"base": {}, "plain2": dict(step_size=2.0), "plain10": dict(step_size=10.0),
             "plain20": dict(step_size=20.0), "plain5-cap40": dict(max_steps=40)}),
    ("finetune", {"base": dict(mix="clean", bn="train"), "mix-none": dict(mix="none", bn="train"),
                  "mix-train": dict(mix="train", bn="train"), "frozen-clean": dict(mix="clean", bn="frozen"),
                  "frozen-none": dict(mix="none", bn="frozen")}),
    ("finetune", {"base": dict(loss="kl", alpha=0.3), "kl0.05": dict(loss="kl", alpha=0.05),
                  "kl0.1": dict(loss="kl", alpha=0.1), "kl0.5": dict(loss="kl", alpha=0.5),
                  "er0.05": dict(loss="er", alpha=0.05), "er0.5": dict(loss="er", alpha=0.5)}),
)

REMEDIES = ("recipe", "paper", "mix_train", "images60", "eta2", "eta10", "augmented", "augmented_mix", "kl0.05",
            "kl0.1", "kl1", "frozen")     # MGU + AaFt, one or two things changed


def gains(rows, data, name):
    """(factor of AUPR, change of mIoU in points) of a row over MSP, means over seeds and choosing sets; mIoU of those
    that have one."""
    logs, points = [], []
    for row in rows:
        if (row["data"], row["name"]) == (data, name):
            msp = next(r for r in rows if r["name"] == "msp" and all(r[k] == row[k] for k in ("data", "seed", "test")))
            logs += [math.log(row[kind]["aupr"] / msp[kind]["aupr"]) for kind in ("pooled", "per_image")]
            points += [] if row["miou"] is None else [row["miou"] - msp["miou"]]
    return (math.exp(sum(logs) / len(logs)), sum(points) / len(points) if points else None) if logs else None


def stages(rows, data):
    """Yields (stage, {row: gains}, the row that the rule takes) for each stage, of the rows that have run."""
    for stage, options in STAGES:
        found = {name: gains(rows, data, name) for name in options}
        found = {name: g for name, g in found.items() if g}
        admissible = {name: g for name, g in found.items() if g[1] >= -1.5}
        best = max(admissible, key=lambda n: admissible[n][0]) if admissible else max(found, key=lambda n: found[n][1])
        yield stage, found, best


def remedies(rows, data):
    """({row: (factor of AUPR on known streets, elsewhere, both, change of mIoU)} of those of REMEDIES that have run on
    both sets, the row that the rule takes)."""
    found = {}
    for name in REMEDIES:
        factors = [gains([r for r in rows if r["test"] == f"{data}_{test}"], data, name)
                   for test in ("choosing", "elsewhere")]
        if all(factors):
            (known, points), (elsewhere, _) = factors
            found[name] = known, elsewhere, math.sqrt(known * elsewhere), points
    admissible = [name for name, (*_, points) in found.items() if points >= -1.5]
    return found, max(admissible, key=lambda name: found[name][2], default=None)


def choose(rows, data):
    """{"mgu": settings, "finetune": settings}, and the lines that say why."""
    chosen, told = {"mgu": {}, "finetune": {}}, []
    for (stage, options), (_, found, best) in zip(STAGES, stages(rows, data)):
        chosen[stage].update(options[best])
        told.append(f"{data}: " + ", ".join(f"{n} × {g[0]:.3f} {g[1]:+.2f}" for n, g in found.items()) + f" → {best}")
    return chosen, told


def main():
    rows = json.loads(Path(__file__).with_name("choice.json").read_text())["rows"]
    chosen = {}
    for data in ("toy", "camvid"):
        chosen[data], told = choose(rows, data)
        print("\n".join(told))
    print(json.dumps(chosen))


if __name__ == "__main__":
    main()
