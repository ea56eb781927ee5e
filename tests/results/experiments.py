"""The experiments behind the tables: plain commands of the four scripts, what each needs, and how to run them all.

    python tests/results/experiments.py main --camvid /data/CamVid_240 --list           # every command as a shell line
    python tests/results/experiments.py main --camvid /data/CamVid_240 --seeds 0 1 2 --jobs 8 --folder runs
    python tests/results/experiments.py choice --camvid /data/CamVid_240 --sets pasted=/data/pasted     # tests/paste.py
    python tests/results/experiments.py real --idd /data/idd20k_lite --camvid /data/CamVid_240 --cutouts /data/cutouts
        --patches /data/patches --roadanomaly /data/RoadAnomaly --weights mobilenet_v2.pt --jobs 13 --deadline 500

    in     a study: `choice` (sets on which recipes are chosen, never test images), `main` (test images), `quick` (the
           README's four commands), `systems` (the related ones, test images; --patches for those that paste), `real`
           and `realchoice` (real unknown objects: in the street scenes of two data sets, and in photographs)
    out    FOLDER/DATA/SEED/: what the scripts write, logs/NAME.txt of every command; STUDY.json here, without paths

What has finished is not run again, so the same command continues. A command that fails does not stop those that do not
need its output. Each command is a process forked from one that has already imported torch. FOLDER/DATA/SEED is shared
by the studies, so that they start from the same pretrained.pt (real and realchoice: FOLDER/real_DATA/SEED; with
--keep the second of them finds the models of the first).
"""
import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import shlex
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
processes = multiprocessing.get_context("forkserver")

# ───────────────────────────────────────────── the experiments ─────────────────────────────────────────────

PER_CLASS = {"toy": 10, "camvid": 20}   # auxiliary images of each class; as the defaults
PASTED_EPOCHS = {"toy": 5, "camvid": 15}   # of the training split: the steps of 10 epochs of the auxiliary set

# name of a set: flags of mgu_generate.py beside --per-class. `default`: whatever the defaults are
SETS = {"default": {}}
SETS.update({f"plain{eta}": {"step-size": eta, "max-steps": 80} for eta in (5, 2, 10, 20)})
SETS["plain5-cap40"] = {"step-size": 5, "max-steps": 40}

# A row: (name, what the tables call it, its set or None for the pretrained model, flags of finetune.py)
MSP = ("msp", "MSP", None, {})
CONTROLS = {"clean": "X, no D_s (L_k alone)", "still": "X unmoved, the same D_s", "noise": "X' − X shuffled over D_s",
            "sign": "random sign of every value of X' − X"}
MAIN = [MSP, *((name, f"control: {label}", "plain5", {"images": name}) for name, label in CONTROLS.items()),
        ("er005", "L_ER, α = 0.05", "plain5", {"loss": "er", "alpha": 0.05}),
        ("kl005", "L_KL, α = 0.05", "plain5", {"loss": "kl", "alpha": 0.05}),
        ("paper", "L_ER, α = 0.05, no known images (half the steps)", "plain5",
         {"loss": "er", "alpha": 0.05, "mix": "none", "bn": "train"}),
        ("recipe", "**the recipe**", "plain5", {})]

# The choice moves one thing at a time from the base, on the set plain5. In the order in which the rows matter for the
# rule: where a --deadline cuts the study off, its end is what is missing
BASE = {"loss": "kl", "alpha": 0.3, "mix": "clean", "bn": "train", "unknown": "flipped", "images": "aux"}
NO_UNKNOWN = dict.fromkeys(("loss", "alpha", "unknown"))      # of the base: without D_s none of them has an effect
CHOICE = [MSP, *((name, label, aux, BASE | changes) for name, label, aux, changes in (
    ("base", "**base**: η = 5, cap 80; L_KL, α = 0.3, clean images mixed in", "plain5", {}),
    ("plain10", "η = 10", "plain10", {}),
    ("mix-train", "training images mixed in", "plain5", {"mix": "train"}),
    ("mix-none", "no known images (half the steps)", "plain5", {"mix": "none"}),
    ("plain20", "η = 20", "plain20", {}),
    ("frozen-clean", "frozen batch norm", "plain5", {"bn": "frozen"}),
    ("kl0.1", "L_KL, α = 0.1", "plain5", {"alpha": 0.1}),
    ("kl0.5", "L_KL, α = 0.5", "plain5", {"alpha": 0.5}),
    ("er0.05", "L_ER, α = 0.05", "plain5", {"loss": "er", "alpha": 0.05}),
    ("plain2", "η = 2", "plain2", {}),
    ("plain5-cap40", "η = 5, cap 40", "plain5-cap40", {}),
    ("kl0.05", "L_KL, α = 0.05", "plain5", {"alpha": 0.05}),
    *((f"{images}-clean", f"control: {label}", "plain5", {"images": images} | (NO_UNKNOWN if images == "clean" else {}))
      for images, label in CONTROLS.items()),
    ("frozen-none", "frozen batch norm, no known images (half the steps)", "plain5", {"bn": "frozen", "mix": "none"}),
    ("er0.5", "L_ER, α = 0.5", "plain5", {"loss": "er", "alpha": 0.5}),
    ("unknown-all", "D_s = all of I_ỹ", "plain5", {"unknown": "all"})))]

# The related systems: (checkpoint to evaluate, the stages that make it, flags of evaluate.py, {score: (row, label)}). A
# stage: (script, what it makes, flags); without --ckpt among them it starts from pretrained.pt. PATCHES, EPOCHS (for as
# many steps as the recipe has, N EPOCHS for N times as many) and ALL (the pretrained models of all seeds) are filled
# in. Where a --deadline cuts the study off, its end is what is missing
PASTE = {"patches": "PATCHES", "epochs": "EPOCHS"}
AUXILIARY = ("mgu_generate.py", "auxiliary", {})
MASKS = ("pretrain.py", "m2f.pt", {"arch": "mask2former"})
MASKS_AUXILIARY = ("mgu_generate.py", "auxiliary_m2f", {"ckpt": "m2f.pt"})
ON_MASKS = {"ckpt": "m2f.pt", "aux": "auxiliary_m2f"}
COSINE = ("pretrain.py", "cosine.pt", {"classifier": "cosine"})
GENERATOR = ("finetune.py", "generator.pt", {"synthesis": ()})


def tuned(name, *, before=(), **flags):
    """The stages that end with NAME.pt, written by finetune.py with these flags."""
    return [*before, ("finetune.py", f"{name}.pt", {k.replace("_", "-"): v for k, v in flags.items()})]


def pasting(name, method, **flags):
    return tuned(name, method=method, **flags, **PASTE)


RECIPE = tuned("recipe", before=[AUXILIARY], aux="auxiliary")
ON_PRETRAINED = {"msp": ("msp", "MSP"), "entropy": ("entropy", "entropy"), "maxlogit": ("maxlogit", "max logit"),
                 "energy": ("energy", "energy")}
ON_RECIPE = {"msp": ("recipe", "**MGU + AaFt**, the recipe"), "entropy": ("recipe_entropy", "MGU + AaFt, entropy")}
KNN = {"knn": ("knn", "dense kNN"), "cknn": ("cknn", "dense kNN with energy")}      # slow, and so on their own
PASTED = [   # the recipe's loss on cut-outs and on pieces of training images in place of MGU's D_s
    ("pasted_kl.pt", tuned("pasted_kl", negatives="paste", **PASTE), {}, {
        "msp": ("pasted_kl", "AaFt on pasted cut-outs")}),
    ("pasted_kl_off.pt", tuned("pasted_kl_off", negatives="paste", paste_control="off", **PASTE), {}, {
        "msp": ("pasted_kl_off", "control of the last: the same paste, no D_s")}),
    ("pasted_kl_inlier.pt", tuned("pasted_kl_inlier", negatives="paste", paste_control="inlier", **PASTE), {}, {
        "msp": ("pasted_kl_inlier", "control: AaFt on pieces of training images")}),
    ("pieces.pt", tuned("pieces", negatives="paste", paste_control="inlier", epochs="EPOCHS"), {}, {
        "msp": ("pieces", "AaFt on pieces of training images in the shapes of labelled segments, no patches")}),
]
OWN = [      # MSP, dense kNN, the recipe and its control
    ("pretrained.pt", [], {}, ON_PRETRAINED),
    ("pretrained.pt", [], {}, KNN),
    ("recipe.pt", RECIPE, {}, ON_RECIPE),
    ("recipe.pt", RECIPE, {}, {"knn": ("recipe_knn", "MGU + AaFt, dense kNN")}),
    ("clean.pt", tuned("clean", before=[AUXILIARY], aux="auxiliary", images="clean"), {}, {
        "msp": ("clean", "control: L_k alone"), "knn": ("clean_knn", "control: L_k alone, dense kNN")}),
]
RELATED = [
    # part one: DenseHybrid, noisy negatives, Real NVP
    ("dh_mgu.pt", tuned("dh_mgu", before=[AUXILIARY], method="densehybrid", negatives="mgu", aux="auxiliary"), {}, {
        "hybrid": ("dh_mgu", "DenseHybrid on MGU's D_s")}),
    ("dh_paste.pt", pasting("dh_paste", "densehybrid"), {}, {
        "hybrid": ("dh_paste", "DenseHybrid, pasted cut-outs"), "msp": ("dh_paste_msp", "the same, MSP")}),
    ("dh_off.pt", pasting("dh_off", "densehybrid", paste_control="off"), {}, {
        "msp": ("dh_off", "control: DenseHybrid's paste without D_s, MSP")}),
    ("dh_inlier.pt", pasting("dh_inlier", "densehybrid", paste_control="inlier"), {}, {
        "hybrid": ("dh_inlier", "control: DenseHybrid on pieces of training images")}),
    ("noisy.pt", pasting("noisy", "noisy"), {}, {
        "outlier": ("noisy", "noisy negatives, outlier head"),
        "outlier_msp": ("noisy_msp", "noisy negatives, times MSP"),
        "msp": ("noisy_plain", "the same, MSP")}),
    ("noisy_inlier.pt", pasting("noisy_inlier", "noisy", paste_control="inlier"), {}, {
        "outlier_msp": ("noisy_inlier", "control: noisy negatives, pieces of training images")}),
    ("rnvp.pt", tuned("rnvp", method="rnvp", epochs="EPOCHS"), {}, {
        "msp": ("rnvp", "Real NVP outliers, MSP"), "entropy": ("rnvp_entropy", "Real NVP outliers, entropy")}),
    ("rnvp_no.pt", tuned("rnvp_no", method="rnvp", flow_border="no", epochs="EPOCHS"), {}, {
        "msp": ("rnvp_no", "control: the loss does not reach the flow"),
        "entropy": ("rnvp_no_entropy", "control: the loss does not reach the flow, entropy")}),

    # part two: PAnS, PGAN, TRADI, DiCNet (dense kNN: above)
    ("cosine.pt", [COSINE], {}, {
        "cosine": ("pans", "PAnS"), "msp": ("pans_msp", "PAnS's network, MSP")}),
    ("prototypes.pt", tuned("prototypes", prototypes=5), {}, {
        "cosine": ("pgan", "PGAN (its abstract), 5 images a class")}),
    ("tradi.pt", [("pretrain.py", "tradi.pt", {"tradi": (0.02, 0.02)})], {"tradi": 10}, {
        "msp": ("tradi", "TRADI, 10 samples")}),
    ("ALL", [], {}, {"msp": ("ensemble", "control of TRADI: Deep Ensemble of the seeds")}),

    # part three: mask classification (Mask2Anomaly, Maskomaly), SynthCP
    ("m2f.pt", [MASKS], {}, {
        "msp": ("m2f_msp", "mask classification, MSP"), "maxlogit": ("m2f", "mask classification, max logit"),
        "maskomaly": ("maskomaly", "Maskomaly, rejection alone")}),
    ("margin.pt", tuned("margin", before=[AUXILIARY], aux="auxiliary", loss="margin"), {}, {
        "maxlogit": ("margin", "Mask2Anomaly's loss on MGU's D_s, per-pixel head, max logit"),
        "msp": ("margin_msp", "the same, MSP")}),
    ("m2f_recipe.pt", tuned("m2f_recipe", before=[MASKS, MASKS_AUXILIARY], **ON_MASKS), {}, {
        "msp": ("m2f_recipe", "mask classification, MGU + AaFt, MSP"),
        "maxlogit": ("m2f_recipe_max", "the same, max logit")}),
    ("m2f_margin.pt", tuned("m2f_margin", before=[MASKS, MASKS_AUXILIARY], loss="margin", **ON_MASKS), {}, {
        "maxlogit": ("m2f_margin", "Mask2Anomaly's loss on MGU's D_s, mask network, max logit")}),
    ("pretrained.pt", [GENERATOR], {"generator": "generator.pt"}, {"synthcp": ("synthcp", "SynthCP, threshold 0.999")}),

    # and what else a reader of those rows asks for
    ("cosine_recipe.pt", tuned("cosine_recipe", before=[COSINE, ("mgu_generate.py", "auxiliary_cosine",
                                                                 {"ckpt": "cosine.pt"})],
                               ckpt="cosine.pt", aux="auxiliary_cosine"), {}, {
        "cosine": ("pans_recipe", "PAnS, MGU + AaFt")}),
    ("prototypes_one.pt", tuned("prototypes_one", prototypes=1), {}, {
        "cosine": ("pgan_one", "PGAN, 1 image a class")}),
    ("m2f.pt", [MASKS, MASKS_AUXILIARY], {"queries-from": "auxiliary_m2f"}, {
        "maskomaly": ("maskomaly_queries", "Maskomaly, anomaly queries found on MGU's D_s")}),
    ("pretrained.pt", [GENERATOR], {"generator": "generator.pt", "synthcp-threshold": 1}, {
        "synthcp": ("synthcp_1", "SynthCP, threshold 1 (the comparison alone)")}),
    ("pretrained.pt", [GENERATOR], {"generator": "generator.pt", "synthcp-threshold": 0.9}, {
        "synthcp": ("synthcp_0.9", "SynthCP, threshold 0.9")}),
    ("pretrained.pt", tuned("student", distill=(), epochs="EPOCHS"), {"student": "student.pt"}, {
        "dicnet": ("dicnet", "DiCNet, as many steps as the recipe")}),
    ("pretrained.pt", tuned("student_fifth", distill=(), epochs="0.2 EPOCHS"), {"student": "student_fifth.pt"}, {
        "dicnet": ("dicnet_fifth", "DiCNet, about a fifth as many steps")}),
    ("pretrained.pt", tuned("student_4", distill=(), epochs="4 EPOCHS"), {"student": "student_4.pt"}, {
        "dicnet": ("dicnet_4", "DiCNet, 4 times as many steps")}),
    ("dh_flow.pt", tuned("dh_flow", method="densehybrid", negatives="flow", paste_range=(0.04, 0.42), epochs="EPOCHS"),
     {}, {"hybrid": ("dh_flow", "DenseHybrid on samples of the flow")}),
    ("dh_decoy.pt", pasting("dh_decoy", "densehybrid", paste_control="decoy"), {}, {
        "hybrid": ("dh_decoy", "DenseHybrid, beside each cut-out a piece that is known")}),
    ("noisy_frozen.pt", pasting("noisy_frozen", "noisy", bn="frozen"), {}, {
        "outlier_msp": ("noisy_frozen", "noisy negatives × MSP, frozen batch norm")}),
    ("rnvp_js.pt", tuned("rnvp_js", method="rnvp", loss="js", epochs="EPOCHS"), {}, {
        "msp": ("rnvp_js", "Real NVP outliers, Jensen-Shannon divergence, MSP")}),
    ("m2f_global.pt", [("pretrain.py", "m2f_global.pt", {"arch": "mask2former", "attention": "global"})], {}, {
        "maxlogit": ("m2f_global", "mask classification with Mask2Anomaly's global attention, max logit")}),
    ("m2f_margin_published.pt", tuned("m2f_margin_published", before=[MASKS, MASKS_AUXILIARY], loss="margin",
                                      margin_published=(), **ON_MASKS), {}, {
        "maxlogit": ("m2f_margin_published", "Mask2Anomaly's loss as published, max logit")}),
    ("pretrained.pt", tuned("student_16", distill=(), epochs="16 EPOCHS"), {"student": "student_16.pt"}, {
        "dicnet": ("dicnet_16", "DiCNet, 16 times as many steps")}),
]
SYSTEMS = OWN + PASTED + RELATED
FIRST_SEED = ("ensemble", "dicnet", "dicnet_fifth", "dicnet_4", "dicnet_16")    # rows of one seed
# The study on real unknowns: f on two data sets, all classes known. Test images are in-domain, with pasted cut-outs of
# the test's half of the outdoor classes of COCO, and photographs from elsewhere. `realchoice` looks at validation
# images with cut-outs of the other half alone: those of the data set that f knows, and those of the other one, streets
# from elsewhere. IDD Lite has no labelled test images: its validation images serve both studies
PHOTOGRAPHS = ("roadanomaly", "roadobstacle21", "fishyscapes_static")
SEEN_AT = (352, 512)       # H, W at which f sees a photograph
HALVES = {"realchoice": ("dog", "elephant", "horse", "cat", "boat", "umbrella", "skateboard"),
          "real": ("giraffe", "bird", "zebra", "bear", "airplane", "bench", "snowboard", "frisbee")}
INDOOR = (                 # food and indoor things: what --patches may hold
    "banana", "bed", "book", "bottle", "bowl", "broccoli", "cake", "carrot", "cell_phone", "chair", "clock", "couch",
    "cup", "dining_table", "donut", "fork", "hot_dog", "knife", "laptop", "microwave", "orange", "oven", "pizza",
    "potted_plant", "refrigerator", "remote", "sandwich", "scissors", "sink", "spoon", "teddy_bear", "tie", "toilet",
    "toothbrush", "tv", "vase", "wine_glass")
FPN = {"arch": "fpn", "width": 64, "backbone": "mobilenet_v2", "weights": "WEIGHTS", "batch-size": 8, "lr": 5e-4,
       "schedule": "poly"}
# pretrain: flags; epochs: as PASTED_EPOCHS; split: of the in-domain images of a study
REAL_DATA = {
    "idd_lite": dict(pretrain=FPN | {"epochs": 6, "crop": (224, 320)}, epochs=2, anomaly=[],
                     split={"realchoice": "val", "real": "val"}),
    "camvid": dict(pretrain=FPN | {"anomaly": "none", "epochs": 30, "crop": (180, 240), "scale": (0.5, 2)}, epochs=12,
                   anomaly=["--anomaly", "none"], split={"realchoice": "val", "real": "test"})}
UP = ("mgu_generate.py", "auxiliary_ascent", {"ascent": ()})


def one_row(name, label, before=AUXILIARY, **flags):
    """An entry as those of SYSTEMS, of one fine-tuning on the set that `before` makes."""
    return f"{name}.pt", tuned(name, before=[before], **{"aux": before[1]} | flags), {}, {"msp": (name, label)}


OTHER = ("mgu_generate.py", "auxiliary_other", {"ckpt": "OTHER"})     # the pretrained model of the next seed
AUGMENTED = ("mgu_generate.py", "auxiliary_augmented", {"augment": ()})
CONTROL_SETS = {**{name: dict(images=name) for name in ("still", "sign", "noise")}, "ascent": dict(before=UP),
                "other": dict(before=OTHER, any_model=())}
CONTROL_LABELS = {**CONTROLS, "ascent": "up the gradient, as far", "other": "MGU of another model, with its D_s"}
KNN_LAYER = {"knn-layer": 16}     # the layer that layers.py found best on CamVid's choosing images
EARLY = ("pretrain.py", "early.pt", {"epochs": "EPOCHS"})
DEEPLAB = ("pretrain.py", "deeplab.pt", {"arch": "deeplabv3", "width": None})
REAL_ROWS = [
    ("pretrained.pt", [], {"knn-vectors": 20_000}, ON_PRETRAINED | KNN),
    ("pretrained.pt", [], KNN_LAYER, {
        "knn": ("knn16", "dense kNN on the backbone's map of stride 16"), "cknn": ("cknn16", "the same with energy")}),
    ("recipe.pt", RECIPE, {}, ON_RECIPE),
    ("recipe.pt", RECIPE, KNN_LAYER, {"knn": ("recipe_knn16", "MGU + AaFt, dense kNN on the map of stride 16")}),
    one_row("clean", "control: L_k alone", images="clean"),
    one_row("paper", "L_ER, α = 0.05, no known images (as many steps), batch norm on the batch", loss="er", alpha=0.05,
            mix="none", epochs=20, bn="train"),
    *(one_row(name, f"control: {CONTROL_LABELS[name]}", **flags) for name, flags in CONTROL_SETS.items()),
    # what may take the harm away
    one_row("mix_train", "training images mixed in, augmented", mix="train"),
    one_row("clean_mix", "control of the last: L_k alone, X for X'", images="clean", mix="train"),
    one_row("images60", "up to 60 images a class, 4 passes", ("mgu_generate.py", "auxiliary_60", {"per-class": 60}),
            epochs=4),
    one_row("eta2", "η = 2", ("mgu_generate.py", "auxiliary_eta2", {"step-size": 2})),
    one_row("eta10", "η = 10", ("mgu_generate.py", "auxiliary_eta10", {"step-size": 10})),
    one_row("augmented", "X augmented before MGU", AUGMENTED),
    one_row("augmented_mix", "the same, and training images mixed in", AUGMENTED, mix="train"),
    one_row("kl0.05", "L_KL, α = 0.05", alpha=0.05),
    one_row("kl0.1", "L_KL, α = 0.1", alpha=0.1),
    one_row("frozen", "frozen batch norm", bn="frozen"),
    ("early.pt", [EARLY], {}, {"msp": ("early", "f of 12 epochs, not 30 (IDD Lite: 2, not 6), MSP")}),
    ("early_recipe.pt", tuned("early_recipe", before=[EARLY, ("mgu_generate.py", "auxiliary_early",
                                                              {"ckpt": "early.pt"})],
                              ckpt="early.pt", aux="auxiliary_early"), {}, {
        "msp": ("early_recipe", "the same f, MGU + AaFt")}),
    # the baselines of Table II (the ensemble is among the systems), and the paper's network: `fpn` has no dropout
    ("deeplab.pt", [DEEPLAB], {}, {
        "msp": ("deeplab", "DeepLabv3, MSP"), "dropout": ("deeplab_dropout", "DeepLabv3, MC-dropout, 10 passes")}),
    ("deeplab_recipe.pt", tuned("deeplab_recipe", before=[DEEPLAB, ("mgu_generate.py", "auxiliary_deeplab",
                                                                    {"ckpt": "deeplab.pt"})],
                                ckpt="deeplab.pt", aux="auxiliary_deeplab"), {}, {
        "msp": ("deeplab_recipe", "DeepLabv3, MGU + AaFt")}),
    ("pretrained.pt", [], {}, {"crf": ("crf", "MSP after the dense CRF")})]
# a control of another size of the loss: each is to be compared at its best
REAL_ALPHAS = [one_row("kl1", "L_KL, α = 1", alpha=1)] + [
    one_row(f"{name}_{alpha}", f"control: {CONTROL_LABELS[name]}, α = {alpha}", alpha=alpha, **flags)
    for name, flags in CONTROL_SETS.items() for alpha in (0.1, 1)]

TRACKED = {"tradi": (0.02, 0.02)}    # TRADI only watches a training: that of f itself
TRADI = "pretrained.pt", [], {"tradi": 10}, {"msp": ("tradi", "TRADI, 10 samples")}
REAL_SYSTEMS = [TRADI if "tradi" in flags else (ckpt, stages, flags, scores)
                for ckpt, stages, flags, scores in PASTED + RELATED]

ENTRIES = {"systems": SYSTEMS, "real": REAL_ROWS + REAL_SYSTEMS + REAL_ALPHAS,
           "realchoice": REAL_ROWS + PASTED + REAL_ALPHAS}
STUDIES = {"choice": CHOICE, "main": MAIN,
           "quick": [MSP, ("recipe", "**the recipe**", "default", {})],
           **{study: [(*row, None, {}) for *_, scores in entries for row in scores.values()]
              for study, entries in ENTRIES.items()}}


def graph(study, args):
    """The commands of a study in an order of preference in which what one needs comes before it, as a list of
    dict(name, script, flags, folder, needs, makes, final, about): `makes` is complete when the command has ended well;
    `final` ones are what the study is for, others run where they are needed; `about` goes into the row."""
    nodes, hardware = [], hardware_flags(args)
    places = (real_places if study in HALVES else usual_places)(study, args, nodes)
    pairs = [(place, seed) for seed in args.seeds for place in places]
    for place, seed in pairs:
        add(nodes, f"{place['name']}/{seed}/pretrain", "pretrain.py",
            ["--data", place["data"], "--root", place["root"],
             *as_flags(filled(place["pretrain"] | place["tracked"], place, args)), "--seed", seed,
             *hardware["training"]],
            place["folder"] / str(seed), place["ready"], "pretrained.pt")
    entries = ENTRIES.get(study)
    for row in entries or STUDIES[study]:
        names = [name for name, _ in row[3].values()] if entries else [row[0]]
        if args.rows and not set(names) & set(args.rows):
            continue
        for place, seed in pairs:
            (add_entry if study in ENTRIES else add_row)(nodes, study, row, place, seed, args, hardware)
    return nodes


def add(nodes, name, script, flags, folder, needs, makes, about=None):
    """Append a command, unless it is there; returns its name."""
    node = dict(name=name, script=script, folder=folder, needs=needs, makes=folder / makes,
                flags=[str(v) for v in flags], final=bool(about), about=about)
    same = [n for n in nodes if n["name"] == name]
    if same not in ([], [node]):
        raise ValueError(f"{name}: two commands of this name")
    nodes.extend([] if same else [node])
    return name


def hardware_flags(args):
    """Flags of {mgu: mgu_generate.py, training: pretrain.py and finetune.py, reading: evaluate.py}."""
    device = ["--device", args.device] if args.device else []
    workers = args.workers is not None
    return dict(mgu=device,
                training=[*device, *(["--workers", args.workers] if workers else []),
                          *(["--precision", args.precision] if args.precision else [])],
                reading=[*device, *(["--workers", max(args.workers, 1)] if workers else [])])


# A place is a data set and where its models are made: dict(name, data, root, folder, ready: commands that pretraining
# needs, pretrain, tracked (of f alone), student: flags, epochs: as PASTED_EPOCHS, calls of evaluate.py: [dict(name,
# flags, needs, tests: {data set of results.json, or None where it has one: name of the test})]

def usual_places(study, args, nodes):
    """Toy and CamVid, with the scripts' defaults."""
    runs, places = Path(args.folder).resolve(), []

    def place(data, root, ready, tests):
        calls = [dict(name=test, flags=flags, needs=[], tests={None: test}) for test, flags in tests.items()]
        if study == "systems":
            calls = [dict(name="", flags=["--root", root], needs=[], tests={None: f"systems_{data}"})]
        places.append(dict(name=data, data=data, root=root, folder=runs / data, ready=ready, calls=calls, pretrain={},
                           tracked={}, student={}, epochs=PASTED_EPOCHS[data]))

    if "toy" in args.data:
        root = runs / "toy_data"
        ready = [add(nodes, "toy_data", "tests/toy.py", [root], runs, [], "toy_data")]
        tests = {"quick" if study == "quick" else "toy": ["--root", root]}
        if study == "choice":
            ready += [add(nodes, "toy_b", "tests/toy.py", [runs / "toy_b", "--seed", 1], runs, [], "toy_b")]
            tests = {"toy_b": ["--root", runs / "toy_b"]}
        place("toy", root, ready, tests)
    if "camvid" in args.data and study != "quick":
        root, ready = Path(args.camvid).resolve(), []
        tests = {"camvid": ["--root", root]}
        if study == "choice":
            sets = dict(s.split("=", 1) for s in args.sets) or {"pasted": runs / "pasted"}
            if not args.sets:   # flower pieces, which anybody can paste
                ready = [add(nodes, "pasted", "tests/paste.py", ["--data", "camvid", "--root", root,
                                                                 "--out", runs / "pasted"], runs, [], "pasted")]
            tests = {k: ["--data", "folder", "--root", Path(v).resolve()] for k, v in sets.items()}
        place("camvid", root, ready, tests)
    return places


def real_places(study, args, nodes):
    """The training sets of the study on real unknowns; images with cut-outs, which are made here; the photographs."""
    places, photographs = [], [] if study == "realchoice" else [k for k in PHOTOGRAPHS if getattr(args, k)]
    roots = {data: Path(root).resolve() for data, root in (("idd_lite", args.idd), ("camvid", args.camvid)) if root}

    def pasted(data, folder, out, *flags):
        return add(nodes, f"{folder.name}/{out}", "tests/paste.py",
                   ["--data", data, "--root", roots[data], *REAL_DATA[data]["anomaly"], "--split",
                    REAL_DATA[data]["split"][study], "--objects", Path(args.cutouts).resolve(), "--classes",
                    *HALVES[study], "--seed", list(HALVES).index(study), *flags, "--out", out], folder, [], out)

    for data in args.data:
        folder = Path(args.folder).resolve() / f"real_{data}"
        sets = {f"pasted_{study}": (data, "choosing" if study == "realchoice" else "pasted", [])}
        if study == "realchoice":       # the streets of the other data set, whose classes f does not know by name
            sets |= {"elsewhere": (other, "elsewhere", ["--known"]) for other in roots if other != data}
        calls = [dict(name=out.removesuffix(f"_{study}"), tests={None: f"{data}_{test}"},
                      flags=["--data", "folder", "--root", folder / out, "--per-image"],
                      needs=[pasted(scenes, folder, out, *flags)]) for out, (scenes, test, flags) in sets.items()]
        if photographs:
            tests = {k: f"{data}_{k}" for k in photographs}
            calls.append(dict(name="photographs", needs=[], flags=[
                "--data", *photographs, "--root", *(Path(getattr(args, k)).resolve() for k in photographs),
                "--size", *SEEN_AT, "--per-image", "--components"],
                tests=tests if len(tests) > 1 else {None: tests[photographs[0]]}))
        places.append(dict(name=f"real_{data}", data=data, root=roots[data], folder=folder, ready=[], calls=calls,
                           pretrain=REAL_DATA[data]["pretrain"], tracked=TRACKED, epochs=REAL_DATA[data]["epochs"],
                           student={"student-backbone": "mobilenet_v2", "student-weights": "WEIGHTS"}))
    return places


def add_row(nodes, study, row, place, seed, args, hardware):
    """The commands of a row of MAIN or CHOICE: a set, a fine-tuning, an evaluation on every test set."""
    row, _, aux, changes = row
    folder, start, name = place["folder"] / str(seed), f"{place['name']}/{seed}", "pretrained.pt"
    model = f"{start}/pretrain"
    if aux:
        flags = as_flags(({} if study == "quick" else {"per-class": PER_CLASS[place["data"]]}) | SETS[aux])
        mgu = add(nodes, f"{start}/mgu_{aux}", "mgu_generate.py",
                  [*flags, "--seed", seed, "--out", f"auxiliary_{aux}", *hardware["mgu"]],
                  folder, [model], f"auxiliary_{aux}/manifest.json")
        name = f"{study}_{row}.pt"
        model = add(nodes, f"{start}/{study}_{row}", "finetune.py",
                    ["--aux", f"auxiliary_{aux}", *as_flags(changes), "--seed", seed, "--out", name,
                     *hardware["training"]], folder, [mgu], name)
    evaluate(nodes, f"{study}_{row}", place, seed, [name], [], [model], hardware,
             dict(name=row, set=aux, flags=" ".join(as_flags(changes))))


def add_entry(nodes, study, entry, place, seed, args, hardware):
    """The commands of an entry of ENTRIES: its stages, and an evaluation with its scores."""
    ckpt, stages, flags, scores = entry
    first, _ = next(iter(scores.values()))
    folder, start, told = place["folder"] / str(seed), f"{place['name']}/{seed}", []
    others = [s for s in (*args.seeds, *args.seeds) if s > seed] or [s for s in args.seeds if s != seed]
    if first in FIRST_SEED and seed != args.seeds[0] or OTHER in stages and not others:
        return
    own_f = stages and all(script == "pretrain.py" or "ckpt" in changes for script, _, changes in stages)
    needs, ckpts = [] if own_f else [f"{start}/pretrain"], [ckpt]
    if ckpt == "ALL":
        needs = [f"{place['name']}/{s}/pretrain" for s in args.seeds]
        ckpts = [place["folder"] / str(s) / "pretrained.pt" for s in args.seeds]
    for script, makes, changes in stages:
        changes = changes | place["student"] if "distill" in changes else changes
        given, filled_in = [] if "ckpt" in changes else ["--ckpt", "pretrained.pt"], filled(changes, place, args)
        if script == "pretrain.py":
            given = ["--data", place["data"], "--root", place["root"]]
            filled_in = filled(place["pretrain"] | changes, place, args)
        if changes.get("ckpt") == "OTHER":
            needs = [*needs, f"{place['name']}/{others[0]}/pretrain"]
            filled_in["ckpt"] = place["folder"] / str(others[0]) / "pretrained.pt"
        told += as_flags(changes)
        model = add(nodes, f"{start}/systems_{makes}", script,
                    [*given, *as_flags(filled_in), "--seed", seed, "--out", makes,
                     *hardware["mgu" if script == "mgu_generate.py" else "training"]],
                    folder, needs, makes + "/manifest.json" * (script == "mgu_generate.py"))
        needs = [*needs, model]
    evaluate(nodes, f"{study}_{first}", place, seed, ckpts, ["--score", *scores, *as_flags(flags)], needs, hardware,
             dict(set=None, flags=" ".join(told + as_flags(flags)), scores={s: row for s, (row, _) in scores.items()}))


def evaluate(nodes, name, place, seed, ckpts, flags, needs, hardware, about):
    """The evaluations of a model on the test sets of its place."""
    for call in place["calls"]:
        out = f"results_{name}" + f"_{call['name']}" * bool(call["name"])
        add(nodes, f"{place['name']}/{seed}/{out}", "evaluate.py",
            ["--ckpt", *ckpts, *call["flags"], *flags, "--panels", 0, "--out", out, *hardware["reading"]],
            place["folder"] / str(seed), [*call["needs"], *needs], f"{out}/results.json",
            dict(data=place["data"], seed=seed, tests=call["tests"], **about))


def filled(changes, place, args):
    """Flags with their words filled in: PATCHES, WEIGHTS, N EPOCHS."""
    files = {"PATCHES": Path(args.patches or "patches").resolve(),
             "WEIGHTS": Path(args.weights).resolve() if args.weights else "imagenet"}

    def value(v):
        if isinstance(v, str) and v.endswith("EPOCHS"):
            return max(1, round(place["epochs"] * float(v.removesuffix("EPOCHS") or 1)))
        return files.get(v, v) if isinstance(v, str) else v
    return {k: value(v) for k, v in changes.items()}


def as_flags(settings):
    """{"alpha": 0.3} → ["--alpha", "0.3"]; a tuple is several values, or none; None takes a flag away."""
    return [text for name, value in settings.items() if value is not None
            for text in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))]


# ──────────────────────────────────────────────── running ────────────────────────────────────────────────

def log_of(node, end):
    return node["folder"] / "logs" / f"{node['name'].split('/')[-1]}{end}"


def finished(node):
    """Whether the command has ended well with these flags, and what it made is still there."""
    ok = log_of(node, ".ok")
    return ok.exists() and node["makes"].exists() and json.loads(ok.read_text())["flags"] == node["flags"]


def to_run(nodes):
    """{name: node} of the unfinished nodes that are final or needed by one of these."""
    todo = {}
    for node in reversed(nodes):
        if not finished(node) and (node["final"] or any(node["name"] in user["needs"] for user in todo.values())):
            todo[node["name"]] = node
    return todo


def child(script, flags, folder, log):
    """One command, in a process of its own."""
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from tqdm import tqdm
    tqdm.set_lock(threading.RLock())   # the usual one is shared with all processes: a killed one would keep it
    sys.argv = [script, *flags]
    sys.path.insert(0, str(REPO))
    code = 0
    try:
        runpy.run_path(str(REPO / script), run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(nodes, jobs, deadline=None, keep=False):
    """Run what is not finished, `jobs` at a time, the first of the list first; returns {name: why it did not end well}.

    deadline: seconds after which nothing new is started. keep: leave fine-tuned checkpoints, which are otherwise
    deleted after their last use."""
    todo, running, failed, started = to_run(nodes), {}, {}, time.time()
    waiting, total = [n for n in nodes if n["name"] in todo], len(todo)
    while waiting or running:
        late = deadline is not None and time.time() - started > deadline
        for node in list(waiting):
            lost = [need for need in node["needs"] if need in failed]
            if lost or late:
                failed[node["name"]] = f"needs {lost[0]}" if lost else "not started before the deadline"
                waiting.remove(node)
            elif len(running) < jobs and not any(need in todo for need in node["needs"]):
                log_of(node, "").parent.mkdir(parents=True, exist_ok=True)
                log_of(node, ".ok").unlink(missing_ok=True)
                p = processes.Process(target=child, args=(node["script"], node["flags"], str(node["folder"]),
                                                          str(log_of(node, ".txt"))))
                p.start()
                running[p.sentinel] = p, node, time.time()
                waiting.remove(node)
        left = max(0, deadline - time.time() + started) + 0.1 if deadline is not None and waiting else None
        for sentinel in multiprocessing.connection.wait(list(running), left):
            p, node, begun = running.pop(sentinel)
            p.join()
            seconds = round(time.time() - begun, 1)
            if p.exitcode == 0 and node["makes"].exists():
                log_of(node, ".ok").write_text(json.dumps(dict(flags=node["flags"], seconds=seconds)))
                del todo[node["name"]]
            else:
                last = log_of(node, ".txt").read_text(errors="replace").strip().splitlines()[-1:]
                failed[node["name"]] = f"exit {p.exitcode}: {' '.join(last)} ({log_of(node, '.txt')})"
            if not keep:
                delete_used(nodes, todo)
            print(f"{time.time() - started:5.0f} s  {total - len(todo)} of {total} done  {node['name']}  {seconds} s"
                  + "  FAILED" * (node["name"] in failed), flush=True)
    return failed


def delete_used(nodes, todo):
    """Fine-tuned checkpoints that no unfinished command needs."""
    needed = {need for node in nodes if node["name"] in todo for need in node["needs"]}
    for node in nodes:
        if node["script"] == "finetune.py" and node["name"] not in todo and node["name"] not in needed:
            node["makes"].unlink(missing_ok=True)


# ─────────────────────────────────────────────── collecting ───────────────────────────────────────────────

FIGURES = ("images", "flip_rate", "iterations_median", "rms", "mean_max_softmax")
METRICS = ("aupr", "auroc", "fpr95", "fpr95_first")
OBJECTS = ("siou", "ppv", "f1")


def settings_of(node):
    """The settings that a script printed, without where each came from: {"loss": "kl", "alpha": "0.3", …}."""
    for line in log_of(node, ".txt").read_text(errors="replace").splitlines():
        if line.startswith("settings: "):
            parts = line[len("settings: "):].split(" · ")
            return dict(re.sub(r" \((flag|method|recipe|paper|ours)\)$", "", part).split(" ", 1) for part in parts)
    return {}


def collect(study, nodes, out):
    """Gather every finished evaluation into the JSON file `out`: rows that it holds of other seeds and data stay, where
    their flags are still those of the study."""
    by_name = {n["name"]: n for n in nodes}
    found = json.loads(out.read_text()) if out.exists() else {}
    stands = {(n["about"]["data"], test, name, n["about"]["flags"]) for n in nodes if n["final"]
              for test in n["about"]["tests"].values() for name in names_of(n["about"]).values()}
    mgu = {(m["data"], m["seed"], m["set"]): m for m in found.get("mgu", [])}
    rows = {(r["data"], r["seed"], r["test"], r["name"]): r for r in found.get("rows", [])
            if (r["data"], r["test"], r["name"], r["flags"]) in stands or r["data"] not in {s[0] for s in stands}}
    protocol, curves = found.get("protocol", {}), {(c["data"], c["seed"], c["f"]): c for c in found.get("curves", [])}
    for node in nodes:
        if node["script"] == "pretrain.py" and finished(node):
            curve = curve_of(node)
            curves[curve["data"], curve["seed"], curve["f"]] = curve
        if not node["final"] or not finished(node):
            continue
        tuned = by_name[node["needs"][-1]]
        for row in rows_of(node, settings_of(tuned) if tuned["script"] == "finetune.py" else {}):
            rows[tuple(row[k] for k in ("data", "seed", "test", "name"))] = row
        for made_by in (by_name[name] for name in (*node["needs"], *tuned["needs"])):
            if made_by["script"] == "mgu_generate.py":
                figures = json.loads(made_by["makes"].read_text())["figures"]["all"]
                made = dict(data=node["about"]["data"], seed=int(made_by["folder"].name),
                            set=node["about"]["set"] or made_by["makes"].parent.name)
                mgu[tuple(made.values())] = dict(made, settings=settings_of(made_by),
                                                 **{k: figures[k] for k in FIGURES})
        for part, test in node["about"]["tests"].items():
            made = json.loads(node["makes"].read_text())["protocol"]
            made = made[part] if part else made
            protocol[test] = {k: made[k] for k in ("images", "resolution", "base_rate", "unlabeled", "miou")}
    order = [name for name, *_ in STUDIES[study]]
    ordered = sorted(rows.values(), key=lambda r: (r["data"], r["test"], order.index(r["name"]), r["seed"]))
    one = lambda value: json.dumps(value, ensure_ascii=False)     # one line of the file each
    lists = [f' "{key}": [\n  ' + ",\n  ".join(map(one, part)) + "\n ]"
             for key, part in (("mgu", sorted(mgu.values(), key=lambda m: (m["data"], m["set"], m["seed"]))),
                               ("curves", [curves[key] for key in sorted(curves)]), ("rows", ordered))]
    text = ",\n".join([f' "study": "{study}"', f' "protocol": {one(protocol)}', *lists])
    write(out, f"{{\n{text}\n}}\n")
    print(f"wrote {out}: {len(ordered)} rows")


def write(out, text):
    out.with_suffix(".tmp").write_text(text)
    os.replace(out.with_suffix(".tmp"), out)


def rows_in(out, key):
    """{key(row): row} of the file of alarms.py, crossed.py or layers.py, empty where there is none yet."""
    return {key(row): row for row in (json.loads(out.read_text())["rows"] if out.exists() else [])}


def write_rows(out, rows):
    """The file that rows_in() reads: one line a row."""
    write(out, '{\n "rows": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]\n}\n")


def curve_of(node):
    """dict(data, seed, f: its checkpoint, miou: {epoch: mIoU of the validation images in percent}) of a pretraining."""
    log = node["makes"].with_suffix(".jsonl")
    told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return dict(data=node["flags"][node["flags"].index("--data") + 1], seed=int(node["folder"].name),
                f=node["makes"].stem, miou={line["epoch"]: round(line["miou"], 1) for line in told if "miou" in line})


def rows_of(node, settings):
    """The rows of one finished evaluation; `settings`: of the fine-tuning that made the model."""
    results, about = json.loads(node["makes"].read_text()), node["about"]
    date = time.strftime("%Y-%m-%d", time.gmtime(node["makes"].stat().st_mtime))
    for part, test in about["tests"].items():
        of_score = {r["score"]: r for r in results["rows"] if r.get("data") == part}
        for score, name in names_of(about).items():
            numbers = of_score[score] if score else dict(results, score=results["rows"][0]["score"])
            row = dict(data=about["data"], seed=about["seed"], test=test, name=name, set=about["set"],
                       flags=about["flags"], score=numbers["score"], miou=numbers["miou"],
                       device=device_of(results), date=date)
            row.update({g: numbers[g] and {k: numbers[g][k] for k in METRICS if k in numbers[g]}
                        for g in ("pooled", "per_image")})
            if numbers.get("objects"):
                row["objects"] = {k: numbers["objects"][k] for k in OBJECTS}
            if "images" in numbers:   # AUPR of every image, in their order
                row["images"] = [float(f"{m['aupr']:.3g}") for m in numbers["images"].values()]
            if settings:
                row["settings"] = settings
            yield row


def names_of(about):
    """{score: row}; the score None is the first of a results.json."""
    return about.get("scores") or {None: about["name"]}


def device_of(results):
    """What it was computed with, from results.json: "NVIDIA H100 · torch 2.10.0 · …", or "" in an old one."""
    environment = results.get("environment", {})
    if not isinstance(environment, dict):
        return str(environment)
    return " · ".join(str(v) if k == "device" else f"{k} {v}" for k, v in sorted(environment.items()))


# ────────────────────────────────────────────────── main ──────────────────────────────────────────────────

def parse(argv=None):
    p = argparse.ArgumentParser(description="Run the experiments of a study, and collect their numbers.")
    p.add_argument("study", choices=tuple(STUDIES))
    p.add_argument("--list", action="store_true", help="print the commands and run nothing")
    p.add_argument("--collect", action="store_true", help="run nothing, collect what has finished")
    p.add_argument("--folder", default="runs", help="where to work (default: runs)")
    p.add_argument("--out", help="JSON to write (default: STUDY.json beside this file)")
    p.add_argument("--data", nargs="+", choices=("toy", "camvid", "idd_lite"), help="which of the study's data sets "
                   "(default: all: toy camvid, or idd_lite camvid of real and realchoice)")
    p.add_argument("--camvid", metavar="ROOT", help="CamVid at 240×180 (README, Data)")
    p.add_argument("--sets", nargs="+", default=[], metavar="NAME=ROOT",
                   help="choice: data folders for CamVid's models "
                   "(default: pasted, flower pieces in its validation images)")
    p.add_argument("--idd", metavar="ROOT", help="real: IDD Lite")
    for name in PHOTOGRAPHS:
        p.add_argument(f"--{name}", metavar="ROOT", help="real: this test set (default: left out)")
    p.add_argument("--cutouts", metavar="FOLDER", help="real: objects as tests/paste.py takes them; of its halves")
    p.add_argument("--weights", metavar="FILE", help="real: of the backbone (default: ImageNet's, downloaded)")
    p.add_argument("--patches", metavar="FOLDER", help="systems, real: cut-outs of nothing that the tests hold")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="of these alone, and what is read off the same models "
                   "(default: all of the study)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time (default: one a core)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of a command (default: 1)")
    p.add_argument("--deadline", type=float, metavar="SECONDS", help="start nothing new after so long")
    p.add_argument("--keep", action="store_true", help="keep the fine-tuned checkpoints")
    p.add_argument("--device", help="of every command (default: the scripts')")
    p.add_argument("--workers", type=int, help="loader processes of a training run (default: the scripts')")
    p.add_argument("--precision", choices=("float32", "bf16"), help="of training (default: the scripts')")
    args = p.parse_args(argv)
    unknown = set(args.rows or ()) - {name for name, *_ in STUDIES[args.study]}
    if unknown:
        p.error(f"--rows: {', '.join(sorted(unknown))}: not in {args.study}; expected some of "
                f"{', '.join(name for name, *_ in STUDIES[args.study])}")
    real = args.study in HALVES
    args.data = args.data or (["idd_lite", "camvid"] if real else ["toy", "camvid"])
    there = {"toy": not real, "camvid": args.camvid or args.study == "quick", "idd_lite": real and args.idd}
    for data in args.data:
        if not there[data]:
            p.error(f"{data}: not in this study, or no folder; expected --camvid ROOT, --idd ROOT, or others in --data")
    if real and not args.cutouts:
        p.error("expected --cutouts FOLDER")
    for path in sorted(Path(args.patches).glob("*")) if real and args.patches else ():
        if re.split(r"_?\d", path.stem)[0] in (*HALVES["real"], *HALVES["realchoice"]):
            p.error(f"--patches: {path.name} is of a class of the test or choosing images")
    return args


def main():
    args = parse()
    nodes = graph(args.study, args)
    if args.list:
        for n in nodes:
            folder = shlex.quote(str(n["folder"]))
            command = shlex.join(["python", str(REPO / n["script"]), *n["flags"]])
            print(f"mkdir -p {folder} && cd {folder} && {command}")
        return
    failed = {}
    if not args.collect:
        os.environ.update(OMP_NUM_THREADS=str(args.threads), OPENBLAS_NUM_THREADS="1",
                          PYTORCH_NVML_BASED_CUDA_CHECK="1")   # looking for a GPU must not start CUDA before the fork
        processes.set_forkserver_preload(["torch", "torch._dynamo", "torchvision.models.segmentation", "tqdm",
                                          "torch.utils.flop_counter", "matplotlib.pyplot", "scipy.ndimage",
                                          "scipy.optimize", "sklearn.datasets"])
        failed = execute(nodes, args.jobs, args.deadline, args.keep)
    collect(args.study, nodes, Path(args.out) if args.out else HERE / f"{args.study}.json")
    for name, why in failed.items():
        print(f"not done: {name}: {why}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
