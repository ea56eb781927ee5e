"""The four scripts, run as a user runs them, on tiny toy scenes; numbers against scikit-learn, errors as one line."""
import json
import os
import re
import shutil

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score, roc_curve

import common
from conftest import predict_every_class, with_dropout
from runner import NO_FIGURES, REPO, run, run_ok, run_ranks, start, wait_for

SCRIPTS = ("pretrain.py", "mgu_generate.py", "finetune.py", "evaluate.py")
LABEL_OF_ID = {1: 0, 2: 1, 3: 2, 4: 255, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7, 10: 8, 11: 9, 12: 10, 13: 11, 14: 254}
CAR, SIGN = 9, 11


BARE = dict(PYTHONSAFEPATH="1", PYTHONIOENCODING="ascii")   # the script's folder is not on the path; ASCII output


def python(*args, folder):
    """A plain process in the environment BARE: exit 0, and nothing at all on stderr."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **BARE})
    assert done.returncode == 0 and not done.stderr, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def bounds(every):
    """Ends between which aupr, auroc, fpr95, fpr95_first lie in percent, pooled and as the mean over images: (2, 4),
    (2, 4).
    every: [(positive, score)] of each image, float64.

    Flat borders of an upsampled map hold many scores that differ in the last bit: whether they are tied, and in which
    order they are, differs with the library, and AUPR feels it. So every score is known to ± 3e-5 only."""
    eps = 3e-5

    def metrics(positive, score, sign):
        fpr, recall, _ = roc_curve(positive, score + sign * 2 * eps * positive, drop_intermediate=False)
        below, first = recall[recall < 0.95][-1], recall[recall >= 0.95][0]   # one of them is the nearest
        pos, neg = np.sort(score[positive]), np.sort(score[~positive])
        above = lambda ordered, least: len(ordered) - np.searchsorted(ordered, least)
        tp = above(pos, pos - eps) if sign > 0 else above(pos, pos + eps) + 1
        aupr = np.mean(tp / (tp + above(neg, pos + sign * eps)))   # the precision at every positive
        assert sign * aupr >= sign * average_precision_score(positive, score) - 1e-9
        return 100 * np.array([aupr, roc_auc_score(positive, score + sign * eps * positive),
                               fpr[recall == first].max() if sign < 0 else fpr[recall == below].min(),
                               fpr[recall >= 0.95][0]])
    pooled = [np.concatenate(v) for v in zip(*every)]
    return (np.array([metrics(*pooled, sign) for sign in (-1, 1)]),
            np.array([np.mean([metrics(*v, sign) for v in every if v[0].any()], 0) for sign in (-1, 1)]))


def reference(ckpts, root, score="msp", ignored=()):
    """bounds() and mIoU of checkpoints (one, or an ensemble) on the test split; Eq. 1 and the scores in float64."""
    fs = [common.load_checkpoint(c)[0] for c in ckpts]
    every, labels, predictions = [], [], []
    for path in sorted(Path(root, "test/images").rglob("*.png")):
        ids = np.array(Image.open(str(path).replace("images", "annotations")))
        Z = np.array([LABEL_OF_ID.get(i, 0) for i in range(256)])[ids]
        X = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
        X = X.contiguous(memory_format=torch.channels_last)   # the layout of evaluate.py, and so the same rounding of f
        with torch.no_grad():
            zs = [f(X)[0].double().numpy() for f in fs]
        S = np.mean([np.exp(z - z.max(0)) / np.exp(z - z.max(0)).sum(0) for z in zs], 0)
        z = np.mean(zs, 0)
        rest = np.sort(S, 0)[:-1].sum(0)   # 1 − max S, without cancellation
        value = dict(msp=np.log(rest), entropy=-(S * np.log(S)).sum(0), maxlogit=-z.max(0),
                     energy=-np.log(np.exp(z).sum(0)))[score]
        keep = ~np.isin(Z, ignored)
        every.append((Z[keep] == 254, value[keep]))
        labels.append(Z[Z < 12])
        predictions.append(S.argmax(0)[Z < 12])
    labels, predictions = np.concatenate(labels), np.concatenate(predictions)
    iou = jaccard_score(labels, predictions, labels=np.unique(labels), average=None, zero_division=0)
    return (*bounds(every), 100 * iou.mean())


def agrees(row, pooled, per_image, miou):
    for found, ends in ((row["pooled"], pooled), (row["per_image"], per_image)):
        assert list(found) == ["aupr", "auroc", "fpr95", "fpr95_first"]
        values = np.array(list(found.values()))
        assert (values > ends.min(0) - 1e-4).all() and (values < ends.max(0) + 1e-4).all(), (values, ends)
    np.testing.assert_allclose(row["miou"], miou, atol=0.2, rtol=0)   # pixels between two classes may fall either way


def differs(row, *expected):
    """agrees() can fail."""
    with pytest.raises(AssertionError):
        agrees(row, *expected)


def is_figure(path, least=10_000):
    with Image.open(path) as image:
        levels = np.unique(np.array(image.convert("L")))
    return path.stat().st_size > least and len(levels) > 20


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, small):
    """The four commands in one folder, with their default file names; the two trainings in plain Python processes
    (evaluate.py is started by torchrun in another test), one with loader processes, for which Python waits at its
    end."""
    folder = tmp_path_factory.mktemp("pipeline")
    said = [python(REPO / "pretrain.py", "--root", small / "toy", "--epochs", 2, "--batch-size", 4, "--crop", 64, 96,
                   "--lr", 1e-3, "--workers", 2, folder=folder)]
    predict_every_class(folder / "pretrained.pt")
    said.append(run_ok("mgu_generate.py", "--per-class", 1, "--step-size", 5, "--max-steps", 3, folder=folder).out)
    said.append(python(REPO / "finetune.py", "--epochs", 1, "--batch-size", 4, folder=folder))
    said.append(run_ok("evaluate.py", "--baseline", "pretrained.pt", "--score", "msp", "entropy", "maxlogit", "energy",
                       "crf", "--crf-iterations", 1, "--panels", 2, folder=folder).out)
    return folder, said


def test_pipeline_writes_its_files(pipeline, small):
    folder, said = pipeline
    for name, steps in (("pretrained", 2), ("ft", 2)):   # 6 // 4 steps in 2 epochs; the samples // 4 in 1
        log = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        losses = [v for v in log if "loss" in v]
        assert [v["step"] for v in losses] == list(range(1, len(losses) + 1)) and len(losses) >= steps
        assert all(v["loss"] > 0 and np.isfinite(v["loss"]) for v in losses)
        assert is_figure(folder / f"{name}.png")
        checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
        assert checkpoint["epoch"] == checkpoint["settings"]["epochs"] and len(checkpoint["classes"]) == 12
    assert [v["epoch"] for v in map(json.loads, (folder / "pretrained.jsonl").read_text().splitlines())
            if "miou" in v] == [1, 2]

    manifest = json.loads((folder / "auxiliary/manifest.json").read_text())
    names = sorted(p.name for p in (folder / "auxiliary").glob("*.npz"))
    assert names == sorted(manifest["samples"]) and len(names) >= 8
    for name in names:
        with np.load(folder / "auxiliary" / name, allow_pickle=False) as sample:
            sample = dict(sample)
        X = np.array(Image.open(small / "toy" / str(sample["source"])))
        ids = np.array(Image.open(str(small / "toy" / str(sample["source"])).replace("images", "annotations")))
        I = sample["label"] == sample["y"]
        assert np.array_equal(sample["label"], np.vectorize(LABEL_OF_ID.get)(ids)) and I.sum() >= 64
        assert np.array_equal(sample["image"][~I], X[~I]), "a pixel outside I_ỹ moved"
        assert not sample["unknown"][~I].any() and 1 <= len(sample["history"]) <= 4
    assert all(is_figure(p) for p in (folder / "auxiliary/sheets").glob("*.png"))
    assert len(list((folder / "auxiliary/sheets").glob("*.png"))) == len({n[:2] for n in names}) + 1
    assert all(is_figure(folder / "results" / f"{n}.png") for n in ("panels", "threshold", "curves"))
    assert not [p for p in folder.rglob(".*")], "a temporary file was left"


def test_manifest_is_what_the_files_hold(pipeline):
    """Flip rate and confidence recomputed from the stored 8-bit images."""
    folder, _ = pipeline
    f, _ = common.load_checkpoint(folder / "pretrained.pt")
    correct = flipped = 0
    confidence, left = [], 0
    for path in (folder / "auxiliary").glob("*.npz"):
        with np.load(path, allow_pickle=False) as sample:
            S = f(torch.from_numpy(sample["image"]).permute(2, 0, 1)[None] / 255).detach().softmax(1)[0].numpy()
            correct += int(sample["history"][0])
            left += int(sample["history"].min())
            flipped += int((S.argmax(0) != sample["y"])[sample["unknown"]].sum())
            confidence.append(S.max(0)[sample["unknown"]])
    figures = json.loads((folder / "auxiliary/manifest.json").read_text())["figures"]["all"]
    assert flipped > 100 and left > 0, "the test needs flips, and samples that end at the cap"
    assert figures["correct_pixels"] == correct and figures["unflipped_pixels"] == left
    assert figures["flip_rate"] == pytest.approx(100 * flipped / correct, abs=0.01)
    assert figures["mean_max_softmax"] == pytest.approx(np.concatenate(confidence).mean(), abs=2e-4)


def test_evaluate_agrees_with_sklearn(pipeline, small):
    folder, said = pipeline
    results = json.loads((folder / "results/results.json").read_text())
    rows = {(r["model"], r["score"]): r for r in results["rows"]}
    assert len(rows) == 10
    for model in ("ft", "pretrained"):
        for score in ("msp", "entropy", "maxlogit", "energy"):
            expected = reference([folder / f"{model}.pt"], small / "toy", score)
            agrees(rows[model, score], *expected)
            differs(rows["pretrained" if model == "ft" else "ft", score], *expected)
    assert all(results[k] == rows["ft", "msp"][k] for k in ("pooled", "per_image", "miou", "iou")), \
        "the first row is also at the top"
    assert {"protocol", "pooled", "per_image", "miou", "iou", "pixel_accuracy"} <= results.keys()
    protocol = results["protocol"]
    anomalous = sum((np.array(Image.open(p)) == 14).sum() for p in (small / "toy/test/annotations").rglob("*.png"))
    assert protocol["images"] == 3 and protocol["pixels"] == 3 * 54 * 96 and protocol["ignored_pixels"] == 0
    assert protocol["base_rate"] == pytest.approx(100 * anomalous / (3 * 54 * 96), abs=1e-4)
    assert f"{rows['ft', 'msp']['pooled']['aupr']:.2f}" in said[3] and "3 images that hold both" in said[3]


def test_evaluate_leaves_out_pixels(pipeline, small, tmp_path):
    run_ok("evaluate.py", "--ckpt", pipeline[0] / "ft.pt", "--unlabeled", "ignore", "--ignore-classes", "car",
           "--panels", 0, folder=tmp_path, before=NO_FIGURES)
    results = json.loads((tmp_path / "results/results.json").read_text())
    agrees(results, *reference([pipeline[0] / "ft.pt"], small / "toy", ignored=(0, 255, CAR)))
    differs(results, *reference([pipeline[0] / "ft.pt"], small / "toy", ignored=(0, 255)))
    assert results["protocol"]["ignored_classes"] == ["car"] and not (tmp_path / "results/panels.png").exists()


def test_evaluate_is_the_same_however_it_is_split(small, tmp_path):
    """torchrun with two processes, batches of 1 and of 7, another number of reading threads: the same bytes."""
    args = ("--ckpt", with_dropout(small, tmp_path / "ft.pt"), "--score", "msp", "energy", "dropout", "--passes", 3,
            "--panels", 0)
    found = []
    for size, threads in ((1, 1), (7, 3)):
        run_ok("evaluate.py", *args, "--batch-size", size, "--workers", threads, "--out", f"b{size}", folder=tmp_path,
               before=NO_FIGURES)
        found.append((tmp_path / f"b{size}/results.json").read_bytes())
    done = run(torch.distributed.run.__file__, "--standalone", "--nproc-per-node", 2, REPO / "evaluate.py", *args,
               folder=tmp_path, **BARE)
    assert done.code == 0, done.err
    assert found[0] == found[1] == (tmp_path / "results/results.json").read_bytes()


def test_ensemble_is_the_mean_softmax(pipeline, small, tmp_path):
    folder, _ = pipeline
    run_ok("evaluate.py", "--ckpt", folder / "ft.pt", folder / "pretrained.pt", "--panels", 0, folder=tmp_path,
           before=NO_FIGURES)
    mine = json.loads((tmp_path / "results/results.json").read_text())
    agrees(mine, *reference([folder / "ft.pt", folder / "pretrained.pt"], small / "toy"))
    assert mine["rows"][0]["model"] == "ft+pretrained"


def test_photographs(pipeline, tmp_path):
    """Photographs without labels, larger than --max-side and not a multiple of the stride; a turned one; a folder."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((301, 203))
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos/temple.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6   # turned by 90 degrees
    photo.save(tmp_path / "photos/turned.JPG", exif=exif)
    done = run_ok("evaluate.py", "--ckpt", pipeline[0] / "ft.pt", "--images", "photos", "--max-side", 200,
                  folder=tmp_path)
    assert "301×203" in done.out and "203×301" in done.out
    for name, size in (("temple", (301, 203)), ("turned", (203, 301))):
        for kind in ("anomaly", "classes"):
            assert Image.open(tmp_path / f"results/{name}_{kind}.png").size == size
            assert is_figure(tmp_path / f"results/{name}_{kind}.png")
        score = np.load(tmp_path / f"results/{name}_score.npy", allow_pickle=False)
        assert score.shape == size[::-1] and np.isfinite(score).all() and score.max() <= np.log(1 - 1 / 12) + 1e-6


def test_odd_photographs(pipeline, tmp_path):
    """A name too long for its results does not stop the others; this script's own results are no photographs."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((60, 40))
    for name in ("a" * 245, "z"):
        photo.save(tmp_path / f"{name}.png")
    command = "evaluate.py", "--ckpt", pipeline[0] / "ft.pt", "--images"
    done = run(*command, tmp_path / f"{'a' * 245}.png", tmp_path / "z.png", folder=tmp_path)
    assert done.code == 1 and "1 of 2 files were not done" in done.err and "its name is too long" in done.err
    results = {p.name for p in (tmp_path / "results").iterdir()}
    assert results == {"z_anomaly.png", "z_classes.png", "z_score.npy"}
    for out in ("results", "other"):      # as of a shell's results/*
        done = run(*command, tmp_path / "results/z_anomaly.png", "--out", out, folder=tmp_path)
        assert done.code == 1 and "no photographs" in done.err, done.err
    assert {p.name for p in (tmp_path / "results").iterdir()} == results
    assert not list((tmp_path / "other").glob("*.png"))


def test_flags_of_another_architecture_are_refused(small, tmp_path):
    for arch, *flag in (("fpn", "--attention", "global"), ("fpn", "--queries", 7), ("pspnet", "--decoder-layers", 2),
                        ("deeplabv3", "--width", 64)):
        done = run("pretrain.py", "--root", small / "toy", "--arch", arch, *flag, folder=tmp_path)
        assert done.code == 1 and f"{flag[0]}: without effect on --arch {arch}" in done.err, done.err
    assert not (tmp_path / "pretrained.pt").exists()


def test_a_stage_does_not_replace_another(small, pipeline, tmp_path):
    shutil.copy(pipeline[0] / "ft.pt", tmp_path)
    before = (tmp_path / "ft.pt").read_bytes()
    for more in ((), ("--restart",)):
        done = run("pretrain.py", "--root", small / "toy", "--out", "ft.pt", *more, folder=tmp_path)
        assert done.code == 1 and "ft.pt: a checkpoint of stage finetune, and this is pretrain" in done.err, done.err
    assert (tmp_path / "ft.pt").read_bytes() == before


def test_known_unknown(small, tmp_path):
    """The pilot study: D_s from two classes, which evaluate.py then leaves out by itself."""
    ckpt = small / "pretrained.pt"
    run_ok("finetune.py", "--ckpt", ckpt, "--known-unknown", "car", "traffic sign", "--epochs", 1, "--batch-size", 2,
           folder=tmp_path, before=NO_FIGURES)
    run_ok("evaluate.py", "--panels", 0, folder=tmp_path, before=NO_FIGURES)
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert results["protocol"]["ignored_classes"] == ["car", "traffic sign"]
    agrees(results, *reference([tmp_path / "ft.pt"], small / "toy", ignored=(CAR, SIGN)))
    differs(results, *reference([tmp_path / "ft.pt"], small / "toy"))
    first = json.loads((tmp_path / "ft.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0
    assert tuple(torch.load(tmp_path / "ft.pt", weights_only=True)["pretrained"]["crop"]) == (32, 48)


def test_pspnet(small, tmp_path):
    """And a run that is there needs the backbone's file no longer."""
    torch.save(torchvision.models.mobilenet_v3_large(weights=None).state_dict(), tmp_path / "backbone.pth")
    command = ("pretrain.py", "--root", small / "toy", "--arch", "pspnet", "--epochs", 1, "--batch-size", 2,
               "--crop", 32, 48, "--weights", "backbone.pth")
    run_ok(*command, folder=tmp_path, before=NO_FIGURES)
    (tmp_path / "backbone.pth").unlink()
    assert "pretrained.pt is complete" in run_ok(*command, folder=tmp_path, before=NO_FIGURES).out
    one_line(run(*command, "--restart", folder=tmp_path), "backbone.pth")
    run_ok("mgu_generate.py", "--per-class", 1, "--max-steps", 1, folder=tmp_path, before=NO_FIGURES)
    checkpoint = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert checkpoint["arch"] == "pspnet" and any("branches" in k for k in checkpoint["model"])
    assert len(list((tmp_path / "auxiliary").glob("*.npz"))) >= 8


# ───────────────────────── the auxiliary set: processes, interruptions, settings ─────────────────────────

MGU = ("--per-class", 2, "--max-steps", 6, "--batch-size", 3)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")
            if p.suffix in (".npz", ".json")}


@pytest.fixture(scope="module")
def aux(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("mgu")
    run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", *MGU, folder=folder, before=NO_FIGURES)
    return folder / "auxiliary"


def test_mgu_is_the_same_for_two_processes(aux, small, tmp_path):
    run_ranks("mgu_generate.py", "--ckpt", small / "pretrained.pt", *MGU, folder=tmp_path, before=NO_FIGURES)
    assert contents(tmp_path / "auxiliary") == contents(aux)


def test_mgu_killed_and_continued(aux, small, tmp_path):
    """SIGKILL a random moment after 0, 2, 2, 4, 4 more samples: the finished set has the same bytes."""
    rng, kills = np.random.default_rng(), 0
    for more in (0, 2, 2, 4, 4):
        made = lambda: len(list((tmp_path / "auxiliary").glob("*.npz")))
        count = made() + more
        p = start("mgu_generate.py", "--ckpt", small / "pretrained.pt", *MGU, folder=tmp_path, before=NO_FIGURES)
        if wait_for(lambda: made() >= count and (tmp_path / "auxiliary/manifest.json").exists(), p):
            p.join(rng.uniform(0, 0.15))
        kills += p.exitcode is None
        p.kill()
        p.join()
        whole = contents(tmp_path / "auxiliary")
        assert all(whole[n] == contents(aux)[n] for n in whole if n.endswith(".npz")), "a half-written sample"
    assert kills >= 4
    done = run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", *MGU, folder=tmp_path, before=NO_FIGURES)
    assert "samples are there; making the rest" in done.out
    assert contents(tmp_path / "auxiliary") == contents(aux)
    assert not list((tmp_path / "auxiliary").glob(".*"))


def test_mgu_refuses_a_set_of_other_settings(aux, small, tmp_path):
    shutil.copytree(aux, tmp_path / "auxiliary")
    before = contents(tmp_path / "auxiliary")
    tried = dict(seed=(1,), step_size=(2,), max_steps=(7,), per_class=(1,), ascent=())
    for name, values in tried.items():
        flag = name.replace("_", "-")
        one_line(run("mgu_generate.py", "--ckpt", small / "pretrained.pt", *MGU, f"--{flag}", *values, folder=tmp_path),
                 f"made with {flag} ", f"this run has {values[0] if values else True}", "--restart")
    assert contents(tmp_path / "auxiliary") == before
    settings = common.load_json(tmp_path / "auxiliary/manifest.json")["settings"]
    assert {*settings} - {*tried} == {"ckpt", "data", "dataset", "precision", "min_pixels"}, "and these, for other data"
    run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", *MGU[:-2], "--max-steps", 1, "--restart",
           folder=tmp_path, before=NO_FIGURES)
    assert max(len(np.load(p)["history"]) for p in (tmp_path / "auxiliary").glob("*.npz")) == 2


# ─────────────────────────────────────────── flags and mistakes ───────────────────────────────────────────

def one_line(done, *parts):
    """Exit status 1 and one error on stderr that names `parts`; further lines only as its indented continuation."""
    text = done.err.splitlines()
    assert done.code == 1 and text and text[0].startswith("error: ") and all(t.startswith("    ") for t in text[1:]), \
        done.err
    for part in parts:
        assert str(part) in done.err, done.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, tmp_path):
    source = (REPO / script).read_text()
    if script == "finetune.py":
        source += re.search(r"def training_flags.*?\n\n\n", (REPO / "pretrain.py").read_text(), re.S)[0]
    flags = re.findall(r'add_argument\("(--[a-z-]+)"', source)
    done = run_ok(script, "--help", folder=tmp_path, COLUMNS="400")
    assert len(flags) >= 10 and len(flags) == len(set(flags))
    for flag in flags:
        told = re.search(rf"^ +{flag}\b.*$", re.sub(r"\n {6,}", " ", done.out), re.M)
        assert told, f"{flag} is not in the help"
        has_value = re.match(rf" +{flag} [A-Z{{\[η]", told[0])
        assert not has_value or flag in ("--images", "--known-unknown") or re.search(r"default|ours|paper", told[0]), \
            f"no default is told: {told[0]}"
    # wrong flags and values: argparse's status and usage
    for wrong in (("--no-such-flag",), ("--seed", "-1"), ("--batch-size", "0"), ("--batch-size", "many"),
                  ("--seed", "0.5")):
        done = run(script, *wrong, folder=tmp_path)
        assert done.code == 2 and "usage:" in done.err and wrong[0] in done.err and "Traceback" not in done.err


def test_values_out_of_range(tmp_path):
    for script, *wrong in (("finetune.py", "--alpha", "-0.1"), ("finetune.py", "--alpha", "nan"),
                           ("finetune.py", "--lr", "0"), ("mgu_generate.py", "--step-size", "inf"),
                           ("mgu_generate.py", "--step-size", "0"), ("pretrain.py", "--data", "kitti"),
                           ("pretrain.py", "--crop", "64"), ("pretrain.py", "--scale", "2", "0.5"),
                           ("evaluate.py", "--score", "magic"),
                           ("evaluate.py", "--images", "a.jpg", "--score", "msp", "entropy"),
                           ("evaluate.py", "--images", "a.jpg", "--tta"),
                           ("evaluate.py", "--size", "1e9", "1e9"), ("evaluate.py", "--tta", "1e308")):
        done = run(script, *wrong, folder=tmp_path)
        assert done.code == 2 and wrong[0] in done.err and "Traceback" not in done.err, done.err


def test_mistakes_are_one_line(aux, small, tmp_path):
    root, ckpt = small / "toy", small / "pretrained.pt"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:100_000])
    checkpoint = torch.load(ckpt, weights_only=True)
    torch.save(dict(checkpoint, format=2), tmp_path / "newer.pt")
    torch.save(dict(checkpoint, classes=checkpoint["classes"][:5]), tmp_path / "fewer.pt")
    torch.save({k: v for k, v in dict(checkpoint, seed=1).items() if k != "optimiser"}, tmp_path / "other.pt")
    torch.save(checkpoint["model"], tmp_path / "model.pt")
    shutil.copytree(aux, tmp_path / "gap")
    next((tmp_path / "gap").glob("*.npz")).unlink()
    shutil.copytree(aux, tmp_path / "torn")
    torn = sorted((tmp_path / "torn").glob("*.npz"))
    for path in torn:
        path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "bad.jpg").write_bytes(b"no photograph")
    tiny = ("--root", root, "--epochs", 1, "--batch-size", 2, "--crop", 32, 48)
    tune = ("finetune.py", "--ckpt", ckpt, "--epochs", 1, "--batch-size", 2)
    for script, *args, part in (
            ("pretrain.py", "--data", "streethazards", "--root", "nowhere", "no such folder"),
            ("pretrain.py", "--data", "bdd", "--root", "empty", "labels/sem_seg/masks"),
            ("pretrain.py", *tiny, "--weights", "nowhere.pth", "nowhere.pth"),
            ("pretrain.py", *tiny, "--weights", ckpt, "mobilenet_v3_large"),
            ("pretrain.py", *tiny, "--anomaly", "car", "--anomaly"),
            ("pretrain.py", *tiny, "--device", "gpu", "--device gpu: expected cuda"),
            ("pretrain.py", *tiny, "--out", "file/p.pt", "file"),
            ("mgu_generate.py", "--ckpt", "nowhere.pt", "nowhere.pt: no such file"),
            ("mgu_generate.py", "--ckpt", ckpt, "--device", "cpu", "--precision", "tf32", "--precision tf32"),
            ("mgu_generate.py", "--ckpt", "text.pt", "text.pt"),
            ("mgu_generate.py", "--ckpt", "cut.pt", "cut.pt"),
            ("mgu_generate.py", "--ckpt", "newer.pt", "format 2"),
            ("mgu_generate.py", "--ckpt", "fewer.pt", "5 classes"),
            ("mgu_generate.py", "--ckpt", "model.pt", "model.pt: not a checkpoint"),
            ("mgu_generate.py", "--ckpt", ckpt, "--root", "empty", "empty"),
            ("mgu_generate.py", "--ckpt", ckpt, "--root", "nowhere", "nowhere: not the layout of toy"),
            ("mgu_generate.py", "--ckpt", ckpt, "--out", "file", "file"),
            (*tune, "--aux", "nowhere", "nowhere/manifest.json"),
            (*tune, "--aux", "gap", "missing"),
            (*tune, "--aux", "torn", "not an auxiliary sample"),
            ("finetune.py", "--ckpt", "other.pt", "--aux", aux, "another checkpoint"),
            (*tune, "--known-unknown", "zebra", "--known-unknown zebra"),
            (*tune, "--known-unknown", "car", "--root", "nowhere", "nowhere: not the layout of toy"),
            (*tune, "--aux", aux, "--out", "file/ft.pt", "file"),
            ("evaluate.py", "ft.pt: no such file"),
            ("evaluate.py", "--ckpt", ckpt, "--baseline", "nowhere.pt", "nowhere.pt"),
            ("evaluate.py", "--ckpt", ckpt, "--baseline", ckpt, "the same file as"),
            ("evaluate.py", "--ckpt", ckpt, "--data", "camvid", "--root", "empty", "empty"),
            ("evaluate.py", "--ckpt", ckpt, "--ignore-classes", "zebra", "--ignore-classes zebra"),
            ("evaluate.py", "--ckpt", ckpt, "--root", "nowhere", "nowhere: not the layout of toy"),
            ("evaluate.py", "--ckpt", ckpt, "--images", "bad.jpg", "error: bad.jpg: cannot be read"),
            ("evaluate.py", "--ckpt", ckpt, "--images", "nowhere.jpg", "error: nowhere.jpg: no such file"),
            ("pretrain.py", *tiny, "--out", "cut.pt", "pass --restart to replace it"),
            ("evaluate.py", "--ckpt", ckpt, "--images", "empty", "empty"),
            ("evaluate.py", "--ckpt", ckpt, "--panels", "nope.png", "nope.png"),
            ("evaluate.py", "--ckpt", ckpt, "--out", "file", "file")):
        one_line(run(script, *args, folder=tmp_path), part)
    assert not (tmp_path / "nowhere").exists(), "toy data was written to a mistyped folder"


def test_a_mistake_of_one_process_is_one_line_in_each(small, tmp_path):
    """Rank 1 does not find the data: it says so, and rank 0, whose connection breaks, ends without a traceback."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a/toy").symlink_to(small / "toy")
    run_ranks("evaluate.py", "--ckpt", small / "pretrained.pt", "--root", "toy", folder=None,
              folders=[tmp_path / "a", tmp_path / "b"], code=1)
    said = [(tmp_path / f / f"stderr{r}").read_text() for f, r in (("a", 0), ("b", 1))]
    assert "toy: not the layout of toy" in said[1] and "process 0 stopped" in said[0]
    assert not any("Traceback" in s for s in said)
