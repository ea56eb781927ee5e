"""Choosing sets with pasted objects; the graph of the experiments and its running; tables and numbers of READMEs."""
import importlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import paste
import toy
from runner import NO_FIGURES, REPO, run, run_ok

sys.path.insert(0, str(REPO / "tests" / "results"))
import choose
import experiments
import kinds
import plot
import tables


# ──────────────────────────────────────────────── tests/paste.py ────────────────────────────────────────────────

def cut_out(path, size=(60, 90), colour=(25, 25, 25)):
    """An opaque ellipse on nothing, with a transparent margin; size (h, w)."""
    y, x = np.mgrid[:size[0], :size[1]]
    inside = ((y - size[0] / 2) / (0.4 * size[0]))**2 + ((x - size[1] / 2) / (0.4 * size[1]))**2 <= 1
    rgba = np.zeros((*size, 4), np.uint8)
    rgba[inside] = (*colour, 255)
    Image.fromarray(rgba).save(path)


def test_paste_blends_and_labels():
    """A uniform object on a uniform image: grey 25 · (100 / 25)^½ = 50 inside; nothing moves outside of it."""
    image, label = np.full((40, 60, 3), 100, np.uint8), np.full((40, 60), 3, np.uint8)
    piece = Image.fromarray(np.full((10, 20, 4), (25, 25, 25, 255), np.uint8))
    alpha = paste.paste(image, label, piece, (5, 7, 12, 16))
    box = np.zeros((40, 60), bool)
    box[5:17, 7:23] = True
    assert (image[~box] == 100).all() and (label[~box] == 3).all() and (alpha[~box] == 0).all()
    assert (image[7:15, 9:21] == 50).all()
    assert np.array_equal(label == common.ANOMALY, alpha >= 0.5) and set(np.unique(label)) == {3, common.ANOMALY}
    assert (label == common.ANOMALY).sum() >= 10 * 14
    assert np.allclose(image[..., 0], 100 - 50 * alpha, atol=0.51)


@pytest.mark.parametrize("grey,expected", ((1, 2), (200, round(200 * 0.5**0.5)), (255, round(255 * (100 / 255)**0.5))))
def test_paste_light(grey, expected):
    """The factor is the root of the ratio, and at most 2."""
    image, label = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), np.uint8)
    paste.paste(image, label, Image.fromarray(np.full((9, 9, 4), (*[grey] * 3, 255), np.uint8)), (9, 9, 9, 9))
    assert (image[12:15, 12:15] == expected).all()


def test_paste_translucent():
    """Where alpha is below ½ the image shines through, and the label stays."""
    image, label = np.full((40, 60, 3), 100, np.uint8), np.full((40, 60), 3, np.uint8)
    rgba = np.full((10, 20, 4), (100, 100, 100, 255), np.uint8)
    rgba[:, :10, 3] = 102                                                          # 0.4
    alpha = paste.paste(image, label, Image.fromarray(rgba), (5, 7, 10, 20))
    assert np.allclose(alpha[7:13, 9:14], 0.4) and (alpha[7:13, 20:25] == 1).all()
    assert (label[5:15, 7:14] == 3).all() and (label[7:13, 20:25] == common.ANOMALY).all()


def test_paste_at_least_forty_pixels():
    """Objects of a few pixels: more than three of them, if need be."""
    image, label = np.full((24, 32, 3), 100, np.uint8), np.zeros((24, 32), np.uint8)
    for seed in range(30):
        assert (paste.pasted(image, label, None, np.random.default_rng(seed))[1] == common.ANOMALY).sum() >= 40


def test_paste_beyond_the_edges():
    for at in ((-6, -7, 12, 16), (33, 52, 12, 16)):
        image, label = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), np.uint8)
        paste.paste(image, label, Image.fromarray(np.full((12, 16, 4), (25, 25, 25, 255), np.uint8)), at)
        inside = np.zeros((40, 60), bool)
        inside[max(at[0], 0):at[0] + 12, max(at[1], 0):at[1] + 16] = True
        assert ((label == common.ANOMALY) <= inside).all() and 40 <= (label == common.ANOMALY).sum() <= 6 * 9 + 7 * 8
        assert (image[~inside] == 100).all()


def test_paste_script(toy_root, tmp_path):
    """A whole set: as many images, labels of the split but where an object lies, a folder that common.py reads, the
    same bytes in a second run, and image N whatever the other images are."""
    (tmp_path / "objects").mkdir()
    for name in ("dog_1_2.png", "boat_3_1.png", "boat_4_1.png", "cat_1.png", "dog_2_border.png"):
        cut_out(tmp_path / "objects" / name)
    flags = ("--root", toy_root, "--objects", tmp_path / "objects", "--classes", "dog", "boat", "--seed", 5)
    for out in ("a", "b"):
        run_ok("tests/paste.py", *flags, "--out", out, folder=tmp_path)
    before, after = common.Scenes("toy", toy_root, "val"), common.Scenes("folder", tmp_path / "a", "test")
    assert after.classes == before.classes and len(after) == len(before) == 2
    objects = paste.cut_outs(tmp_path / "objects", ["dog", "boat"])
    assert {k: len(v) for k, v in objects.items()} == {"dog": 1, "boat": 2}
    for i in (1, 0):
        image, label = after.decode(i)
        old_image, old_label = before.decode(i)
        moved = label != old_label
        assert moved.sum() >= 40 and (label[moved] == common.ANOMALY).all()
        changed = (image != old_image).any(2)
        assert changed.any() and not changed.all() and (changed & ~moved).sum() < moved.sum() / 2   # rims alone
        expected = paste.pasted(old_image, old_label, objects, np.random.default_rng([5, i]))
        assert np.array_equal(image, expected[0]) and np.array_equal(label, expected[1])
        for kind in ("images", "labels"):
            a, b = (tmp_path / out / kind / f"{i:04d}.png" for out in "ab")
            assert a.read_bytes() == b.read_bytes()
    run_ok("tests/paste.py", *flags, "--known", "--out", "known", folder=tmp_path)   # for other classes
    known = common.Scenes("folder", tmp_path / "known", "test")
    assert known.classes == []
    for i in (0, 1):
        (image, label), (same, named) = known.decode(i), after.decode(i)
        assert np.array_equal(image, same)
        assert np.array_equal(label, np.where(named < len(before.classes), common.KNOWN, named))


def test_paste_flowers(toy_root):
    image, label = common.Scenes("toy", toy_root, "val").decode(0)
    once, again, other = (paste.pasted(image, label, None, np.random.default_rng([s, 0])) for s in (0, 0, 1))
    assert np.array_equal(once[0], again[0]) and not np.array_equal(once[0], other[0])
    assert (once[1] == common.ANOMALY).sum() >= 40


def test_paste_refuses(toy_root, tmp_path):
    (tmp_path / "objects").mkdir()
    cut_out(tmp_path / "objects/cat_1.png")
    for flags, text in ((("--objects", "objects", "--classes", "dog"), "no dog_*.png"),
                        (("--split", "test"), "anomalies already"), (("--out", "objects"), "is there already")):
        done = run("tests/paste.py", "--root", toy_root, *(() if "--out" in flags else ("--out", "out")), *flags,
                   folder=tmp_path)
        assert done.code == 1 and text in done.err and done.err.count("\n") == 1, done.err
        assert not (tmp_path / "out").exists()
    clear, half = np.full((9, 9, 4), 9, np.uint8), tmp_path / "objects/cat_2.png"
    clear[..., 3] = 100
    Image.fromarray(clear).save(half)
    (tmp_path / "objects/._dog_1.png").write_bytes(b"a Mac's")
    for damaged, text in ((None, "cat_2.png: no alpha channel, or none of its pixels is opaque"),
                          (half.read_bytes()[:60], "cat_2.png: cannot be read as an image")):
        if damaged:
            half.write_bytes(damaged)
        with pytest.raises(common.InputError, match=text):
            for k in range(20):
                paste.choose(paste.cut_outs(tmp_path / "objects", None), np.random.default_rng(k))
        done = run("tests/paste.py", "--root", toy_root, "--out", "out", "--objects", "objects", folder=tmp_path)
        assert done.code == 1 and text in done.err and sorted(os.listdir(tmp_path)) == ["objects", "stderr", "stdout"]


def test_paste_and_evaluate_with_an_anomaly_of_ones_own(small, tmp_path):
    """dataset.json of a pasted set says by ids what is anomalous: the checkpoint's --anomaly is not its."""
    shutil.copytree(small / "toy", tmp_path / "mine")
    spec = {k: v for k, v in common.DATASETS["toy"].items() if k not in ("anomaly", "counts")}
    ids = [i for v in common.DATASETS["toy"]["anomaly"] for i in ([v] if isinstance(v, int) else v)]
    spec["classes"] = dict(spec["classes"], thing=ids)
    (tmp_path / "mine/dataset.json").write_text(json.dumps(spec))
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, data="folder", root=str(tmp_path / "mine"), anomaly=["thing"]), tmp_path / "f.pt")
    run_ok("tests/paste.py", "--data", "folder", "--root", "mine", "--anomaly", "thing", "--out", "pasted",
           folder=tmp_path)
    for more in ((), ("--root", "pasted")):
        run_ok("evaluate.py", "--ckpt", "f.pt", *("--data", "folder") * bool(more), *more, "--operating-point", 0.9,
               "--panels", 0, "--out", f"of{len(more)}", folder=tmp_path, before=NO_FIGURES)
    own, other = (json.loads((tmp_path / out / "results.json").read_text())["protocol"] for out in ("of0", "of2"))
    assert (own["images"], other["images"]) == (3, 2)
    assert own["thresholds"] == other["thresholds"] and own["dataset"] != other["dataset"]


# ─────────────────────────────────────────────── experiments.py ───────────────────────────────────────────────

REAL = ("--idd", "idd", "--cutouts", "cutouts", "--weights", "weights.pt", "--patches", "patches", "--roadanomaly",
        "ra", "--roadobstacle21", "ro", "--fishyscapes_static", "fs")


def nodes_of(study, folder="runs", *flags):
    real = REAL if study in experiments.HALVES else ()
    return experiments.graph(study, experiments.parse([study, "--camvid", "camvid", "--folder", str(folder), *real,
                                                       *flags]))


@pytest.mark.parametrize("study", experiments.STUDIES)
def test_graph(study, monkeypatch):
    """Whatever a command needs comes before it and makes what the command reads; the scripts know the flags."""
    nodes = nodes_of(study, "runs", "--device", "cpu", "--workers", "1", "--precision", "float32")
    names = [n["name"] for n in nodes]
    assert len(set(names)) == len(names) == len({n["makes"] for n in nodes})
    for k, node in enumerate(nodes):
        assert set(node["needs"]) <= set(names[:k])
        made = [n["makes"] for n in nodes if n["name"] in node["needs"]]
        out = node["flags"][node["flags"].index("--out") + 1] if "--out" in node["flags"] else node["flags"][0]
        if node["script"] != "pretrain.py":                                             # its default is read
            assert node["folder"] / out in (node["makes"], node["makes"].parent)
        for flag in ("--ckpt", "--aux"):
            if flag in node["flags"]:
                path = node["folder"] / node["flags"][node["flags"].index(flag) + 1]
                assert any(path in (m, m.parent) for m in made), node
        assert node["final"] == (node["script"] == "evaluate.py")
        if not node["script"].startswith("tests/"):
            monkeypatch.setattr(sys, "argv", [node["script"], *node["flags"]])
            args = importlib.import_module(node["script"][:-3]).parse()
            if node["script"] == "finetune.py" and study != "choice" and "recipe" in node["name"]:
                assert args.loss is args.alpha is args.mix is args.bn is args.unknown is args.images is None
        if study in experiments.ENTRIES and any(need.endswith("/pretrain") for need in node["needs"]):
            chain = [node, *(n for n in nodes if n["name"] in node["needs"])]     # f is made for what starts from it
            assert any("pretrained.pt" in flag for n in chain for flag in n["flags"]), node
    trained = [n for n in nodes if n["script"] == "finetune.py"]
    rows = len(experiments.STUDIES[study]) - 1
    if study in experiments.ENTRIES:                             # several rows of one model; some of one seed
        made = {s[1]: next(iter(scores.values()))[0] for *_, stages, _, scores in experiments.ENTRIES[study]
                for s in stages if s[0] == "finetune.py"}
        once = [name for name, row in made.items() if row in experiments.FIRST_SEED]
        students = [f"student{end}.pt" for end in ("", "_fifth", "_4", "_16")]
        assert once == ([] if study == "realchoice" else students)
        assert len(trained) == 2 * (3 * (len(made) - len(once)) + len(once))
        return
    assert len(trained) == rows * 3 * (1 if study == "quick" else 2)


def test_choice_never_sees_test_images():
    """It evaluates on toy_b and pasted images alone, whatever the default of evaluate.py is."""
    tests = {tuple(n["flags"][2:6]) for n in nodes_of("choice", "/r") if n["final"]}
    assert tests == {("--root", "/r/toy_b", "--panels", "0"), ("--data", "folder", "--root", "/r/pasted")}


def flag_of(node, flag, n=1):
    at = node["flags"].index(flag) + 1
    return node["flags"][at:at + n]


def test_real_unknowns_never_mix():
    """No class of cut-outs is in two halves or indoors; each study pastes its own half, by a seed of its own, and
    evaluates on that alone; the choice does not look at the photographs."""
    halves = [set(classes) for classes in (*experiments.HALVES.values(), experiments.INDOOR)]
    assert len(set.union(*halves)) == sum(map(len, halves)) and min(map(len, halves)) >= 7
    for study, split in (("real", "test"), ("realchoice", "val")):
        nodes = nodes_of(study, "/r")
        makers = [n for n in nodes if n["script"] == "tests/paste.py"]
        assert [flag_of(n, "--split")[0] for n in makers] == (["val", split] if study == "real" else ["val"] * 4)
        for n in makers:
            assert flag_of(n, "--classes", len(experiments.HALVES[study])) == list(experiments.HALVES[study])
            assert flag_of(n, "--seed") == [str(int(study == "real"))]
        roots = {path for n in nodes if n["final"] for path in flag_of(n, "--root", 3) if path.startswith("/")}
        assert roots == {f"/r/real_{data}/pasted_{study}" for data in ("idd_lite", "camvid")} | (
            {str(Path(k).resolve()) for k in ("ra", "ro", "fs")} if study == "real" else
            {"/r/real_camvid/elsewhere", "/r/real_idd_lite/elsewhere"})
    elsewhere = {n["folder"].name: flag_of(n, "--data") for n in makers if "--known" in n["flags"]}
    assert elsewhere == {"real_camvid": ["idd_lite"], "real_idd_lite": ["camvid"]}      # streets that f does not know


def test_choosing_elsewhere_needs_both_data_sets():
    nodes = experiments.graph("realchoice", experiments.parse(
        ["realchoice", "--camvid", "c", "--cutouts", "o", "--data", "camvid", "--rows", "msp"]))
    assert [n["makes"].name for n in nodes if n["script"] == "tests/paste.py"] == ["pasted_realchoice"]


def test_patches_of_the_test_are_refused(tmp_path, capsys):
    for name in ("bowl_1_2.png", "dog_1_2.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        nodes_of("real", "/r", "--patches", str(tmp_path))
    assert "dog_1_2.png" in capsys.readouterr().err
    (tmp_path / "dog_1_2.png").unlink()
    nodes_of("real", "/r", "--patches", str(tmp_path))


def test_real_rows_come_in_the_order_of_the_goal():
    """MSP, the recipe and its controls of all seeds and data come before anything else; the set of another model is
    that of the next seed, and there is none with one seed."""
    final = [n for n in nodes_of("real", "/r") if n["final"]]
    firsts = list(dict.fromkeys(next(iter(n["about"]["scores"].values())) for n in final))
    assert firsts[:11] == ["msp", "knn16", "recipe", "recipe_knn16", "clean", "paper", "still", "sign", "noise",
                           "ascent", "other"]
    for first in firsts:
        where = [k for k, n in enumerate(final) if next(iter(n["about"]["scores"].values())) == first]
        assert where == list(range(where[0], where[-1] + 1)), "all seeds of a row together"
        assert len(where) == 4 * (1 if first in experiments.FIRST_SEED else 3)
    others = [n for n in nodes_of("real", "/r") if "--any-model" in n["flags"]]
    assert len(others) == 6 * 3 and {flag_of(n, "--aux")[0] for n in others} == {"auxiliary_other"}
    made = [n for n in nodes_of("real", "/r") if "auxiliary_other" in n["flags"]
            and n["script"] == "mgu_generate.py"]
    assert [(flag_of(n, "--ckpt")[0], flag_of(n, "--seed")[0]) for n in made] == [
        (f"/r/real_{data}/{other}/pretrained.pt", seed) for other, seed in ((1, "0"), (2, "1"), (0, "2"))
        for data in ("idd_lite", "camvid")]
    assert not any("--any-model" in n["flags"] for n in nodes_of("real", "/r", "--seeds", "4"))


@pytest.fixture
def work(tmp_path):
    """Small commands: f writes its name into a file after `sleep` seconds, and fails where the file `fail` is."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\n_, name, seconds = sys.argv\ntime.sleep(float(seconds))\n"
                      "open('order', 'a').write(name)\nprint('working')\n"
                      "if os.path.exists('fail_' + name): sys.exit('no luck')\nopen(name, 'w')\n")

    def node(name, needs=(), seconds=0, final=False):
        return dict(name=name, script=str(script), flags=[name, str(seconds)], folder=tmp_path, needs=list(needs),
                    makes=tmp_path / name, final=final, about={})
    return node


def test_execute(work, tmp_path):
    """Order, a failure that stops only what needs it, and a second run that does the rest and nothing twice."""
    nodes = [work("a"), work("b", "a"), work("c", "b", final=True), work("d", "a", final=True), work("e")]
    (tmp_path / "fail_b").write_text("")
    failed = experiments.execute(nodes, jobs=1)
    assert (tmp_path / "order").read_text() == "abd" and set(failed) == {"b", "c"}      # nothing final needs e
    assert failed["b"].startswith("exit 1: no luck") and failed["c"] == "needs b"
    (tmp_path / "fail_b").unlink()
    assert experiments.execute(nodes, jobs=2) == {} and (tmp_path / "order").read_text() == "abdbc"
    assert experiments.execute(nodes, jobs=2) == {} and (tmp_path / "order").read_text() == "abdbc"
    nodes[3]["flags"] = ["d", "0.0"]                                                    # other flags: again
    (tmp_path / "a").unlink()                                                           # and what it needs
    assert experiments.execute(nodes, jobs=1) == {} and (tmp_path / "order").read_text() == "abdbcad"


def test_execute_at_once_and_deadline(work, tmp_path):
    nodes = [work(n, seconds=0.7, final=True) for n in "abcd"]
    begun = time.time()
    failed = experiments.execute(nodes, jobs=3, deadline=0.4)
    assert time.time() - begun < 2 and set(failed) == {"d"} and "deadline" in failed["d"]
    assert sorted((tmp_path / "order").read_text()) == ["a", "b", "c"]


def test_used_checkpoints_are_deleted(work, tmp_path):
    nodes = [dict(work("a"), name="a"), work("b", "a", final=True), work("c", "a", final=True)]
    tuned = tmp_path / "finetune.py"
    shutil.copy(tmp_path / "script.py", tuned)
    for node in nodes:
        (tmp_path / node["name"]).write_text("")
    nodes[0]["script"] = "finetune.py"
    experiments.delete_used(nodes, {"c": nodes[2]})
    assert (tmp_path / "a").exists()
    experiments.delete_used(nodes, {})
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_collect(tmp_path):
    """Made-up outputs of two seeds, gathered in two calls, into one file without a path."""
    out = tmp_path / "quick.json"
    for seed in (0, 1):
        nodes = nodes_of("quick", tmp_path / "runs", "--seeds", str(seed))
        for node in nodes:
            node["makes"].parent.mkdir(parents=True, exist_ok=True)
            log = experiments.log_of(node, ".txt")
            log.parent.mkdir(exist_ok=True)
            log.write_text("settings: loss kl (recipe) · alpha 0.3 (flag) · crop (108, 192) (recipe) · seed 0\n")
            experiments.log_of(node, ".ok").write_text(json.dumps(dict(flags=node["flags"], seconds=1)))
            if node["script"] == "pretrain.py":
                told = dict(step=1, loss=2.), dict(epoch=1, miou=40. + seed), dict(epoch=2, miou=50.06)
                node["makes"].with_suffix(".jsonl").write_text("\n".join(map(json.dumps, told)))
            metrics = dict(aupr=10. + seed, auroc=80., fpr95=50., fpr95_first=50.1)
            node["makes"].write_text(json.dumps(dict(
                pooled=metrics, per_image=None, miou=70.5, environment=dict(device="a GPU", torch="2"),
                protocol=dict(images=60, resolution=["192×108"], base_rate=2.5, unlabeled="negative", miou="",
                              checkpoints={str(tmp_path): ""}),
                rows=[dict(model="m", score="msp")],
                figures={"all": dict(images=24, flip_rate=99.8, iterations_median=22., rms=20., mean_max_softmax=.6)})))
        experiments.collect("quick", nodes, out)
    text = out.read_text()
    assert str(tmp_path) not in text and "runs" not in text
    found = json.loads(text)
    assert [(r["name"], r["seed"], r["pooled"]["aupr"]) for r in found["rows"]] == [
        ("msp", 0, 10), ("msp", 1, 11), ("recipe", 0, 10), ("recipe", 1, 11)]
    recipe = found["rows"][2]
    assert recipe["device"] == "a GPU · torch 2" and recipe["set"] == "default" and recipe["miou"] == 70.5
    assert recipe["settings"] == {"loss": "kl", "alpha": "0.3", "crop": "(108, 192)", "seed": "0"}
    assert found["mgu"][0]["flip_rate"] == 99.8 and found["protocol"]["quick"]["base_rate"] == 2.5
    assert tables.number(tables.load(tmp_path), "quick recipe pooled aupr") == "10.50"
    assert found["curves"][1] == dict(data="toy", seed=1, f="pretrained", miou={"1": 41, "2": 50.1})


# ────────────────────────────────────────────────── tables.py ──────────────────────────────────────────────────

@pytest.fixture
def numbers(tmp_path):
    """A JSON file of two seeds whose means, deviations and factors are easy by hand."""
    def row(name, seed, aupr, fpr95, miou):
        metrics = dict(aupr=aupr, auroc=80 + seed, fpr95=fpr95)
        return dict(data="toy", seed=seed, test="toy", name=name, set=None, flags="", miou=miou, device="CPU",
                    date="2026-01-02", pooled=metrics, per_image=dict(metrics, aupr=2 * aupr))
    rows = [row("msp", 0, 4, 60, 80), row("msp", 1, 8, 50, 81),
            row("recipe", 0, 8, 50, 79), row("recipe", 1, 12, 44, 81)]
    settings = {"step-size": "5.0", "max-steps": "80"}
    sets = [dict(data="toy", seed=s, set="default", images=120, flip_rate=99 + s / 2, iterations_median=20, rms=12.25,
                 mean_max_softmax=0.6, settings=settings) for s in (0, 1)]
    (tmp_path / "main.json").write_text(json.dumps(dict(study="main", rows=rows, mgu=sets, protocol={
        "toy": dict(images=60, base_rate=2.4567)})))
    return tmp_path


def test_numbers(numbers):
    tests = tables.load(numbers)
    for words, expected in {
            "toy recipe pooled aupr": "10.00", "toy recipe pooled aupr sd": "2.83",      # √((2² + 2²) / 1)
            "toy recipe pooled aupr factor": "× 1.75", "toy recipe pooled aupr least": "× 1.50",
            "toy recipe pooled aupr factor-by-seed 1": "2.0, 1.5", "toy recipe pooled fpr95 gain": "−8.0",
            "toy recipe per_image aupr by-seed 0": "16, 24", "toy recipe miou gain 2": "−0.50",
            "toy recipe miou gain-by-seed 0": "−1, +0", "toy msp miou 1": "80.5", "toy mgu default flip_rate": "99.25",
            "toy base_rate": "2.46", "toy images": "60", "toy noise pooled aupr": "not run",
            "camvid recipe pooled aupr": "not run"}.items():
        assert tables.number(tests, words) == expected, words
    for words in ("toy recip pooled aupr", "toy recipe pooled aurp", "toy recipe pooled", "toy recipe miou sum 1"):
        with pytest.raises((ValueError, KeyError)):
            tables.number(tests, words)


def test_tables(numbers):
    toy = tables.load(numbers)["toy"]
    assert tables.results(toy).splitlines()[-1] == (
        "| **the recipe** | 2 | 10.00±2.83 / 80.50±0.71 / 47.00±4.24 | 20.00±5.66 / 80.50±0.71 / 47.00±4.24 "
        "| 80.00±1.41 |")
    assert tables.factors(toy).splitlines()[-1] == (
        "| **the recipe** | × 1.75 (2.00, 1.50) | × 1.75 (2.00, 1.50) | −8.0, −8.0 | −0.5 |")
    assert tables.mgu(toy).splitlines()[-1] == (
        "| η = 5.0, cap 80 | 2 | 120 | 99.25±0.35 | 20±0 | 0.600±0.000 | 12.2±0.0 |")
    assert tables.hardware(toy) == "* CPU: 4 rows, 2026-01-02 to 2026-01-02\n"


def test_table_of_real_unknowns(numbers):
    """What evaluate.py wrote for two models: a row for each model and score, a column for each test set."""
    def rows(start):
        return [dict(data=d, score=s, pooled=dict(aupr=start + i, auroc=50., fpr95=9.125),
                     objects=dict(siou=start - i, ppv=1., f1=0.25))
                for i, (d, s) in enumerate((d, s) for d in ("ra", "ro") for s in ("msp", "energy"))]
    (numbers / "photographs.json").write_text(json.dumps({name: dict(evaluation=dict(
        protocol=dict(ra={}, ro={}), rows=rows(start))) for name, start in (("idd", 10), ("camvid", 20))}))
    tests = tables.load(numbers)
    assert tables.table(tests, "photographs pooled").splitlines() == [
        "| trained on | score | ra | ro |", "| --- | --- | --- | --- |",
        "| idd | msp | 10.00 / 50.00 / 9.12 | 12.00 / 50.00 / 9.12 |",
        "| idd | energy | 11.00 / 50.00 / 9.12 | 13.00 / 50.00 / 9.12 |",
        "| camvid | msp | 20.00 / 50.00 / 9.12 | 22.00 / 50.00 / 9.12 |",
        "| camvid | energy | 21.00 / 50.00 / 9.12 | 23.00 / 50.00 / 9.12 |"]
    assert tables.table(tests, "photographs objects").splitlines()[-1] == (
        "| camvid | energy | 19.00 / 1.00 / 0.25 | 17.00 / 1.00 / 0.25 |")
    assert tables.number(tests, "photographs camvid energy ro objects siou 1") == "17.0"
    (numbers / "photographs.json").unlink()
    assert tables.table(tables.load(numbers), "photographs pooled") == "not run\n"
    assert tables.number(tables.load(numbers), "photographs camvid msp ra pooled aupr") == "not run"


def test_table_of_alarms(numbers):
    rows = [dict(trained_on="camvid", row=row, seed=seed, data=data, known=known, anomalous=known + 30)
            for row, data, seed, known in (("recipe", "folder", 0, 8), ("recipe", "folder", 1, 10),
                                           ("msp", "roadanomaly", 0, 11.04), ("msp", "folder", 0, 6))]
    (numbers / "alarms.json").write_text(json.dumps(dict(rows=rows)))
    tests = tables.load(numbers)
    assert tables.table(tests, "alarms camvid").splitlines()[2:] == [
        "| MSP | 1 | 6.0 / 36.0 | 11.0 / 41.0 |",
        "| **MGU + AaFt**, the recipe | 2 | 9.0±1.4 / 39.0±1.4 | not run / not run |"]
    assert tables.number(tests, "alarms camvid recipe folder anomalous") == "39.0"
    assert tables.number(tests, "alarms camvid msp roadanomaly known 2") == "11.04"
    assert tables.number(tests, "alarms camvid recipe roadanomaly known") == "not run"
    assert tables.number(tests, "alarms camvid recipe folder known") == "9.0"
    assert tables.number(tests, "alarms camvid recipe folder known as msp") == "8.0"
    (numbers / "alarms.json").unlink()
    assert tables.table(tables.load(numbers), "alarms camvid") == "not run\n"
    rows = [dict(trained_on="camvid", row=row, seed=seed, right=100, wrong=10 + seed, max_softmax=0.5)
            for row in ("sign", "noise") for seed in (0, 1)]
    (numbers / "crossed.json").write_text(json.dumps(dict(rows=rows)))
    assert tables.number(tables.load(numbers), "crossed camvid sign wrong") == "10.5"
    assert tables.number(tables.load(numbers), "crossed camvid still wrong") == "not run"


def test_bootstrap_against_the_normal_case():
    """One seed, a constant reference: the mean of 400 independent images has its textbook interval."""
    rng = np.random.default_rng(0)
    a = rng.normal(10, 3, (1, 400))
    factor, low, high = tables.bootstrap(a, np.full_like(a, 5))
    half = 1.96 * a.std(ddof=1) / 400**0.5 / 5
    assert factor == pytest.approx(a.mean() / 5)
    assert low == pytest.approx(factor - half, abs=0.1 * half) and high == pytest.approx(factor + half, abs=0.1 * half)
    assert tables.bootstrap(a, np.full_like(a, 5)) == (factor, low, high), "the same draws every time"
    factor, low, high = tables.bootstrap(2.5 * a, a)                    # a constant factor: nothing varies
    assert factor == pytest.approx(2.5) == pytest.approx(low) == pytest.approx(high)


def test_bootstrap_against_a_loop():
    """Three seeds that share images of very different difficulty: draws taken one by one, seeds and images by index."""
    rng = np.random.default_rng(1)
    hard = rng.gamma(0.5, 20, 60)
    a, b = (hard * np.array(factors)[:, None] * rng.uniform(0.8, 1.2, (3, 60))
            for factors in ((1.1, 1.5, 2.2), (1, 1, 1)))
    found = tables.bootstrap(a, b, draws=20_000)
    ratios = []
    for _ in range(20_000):
        seeds, images = rng.integers(3, size=3), rng.integers(60, size=60)
        pick = np.ix_(seeds, images)
        ratios.append(a[pick].sum() / b[pick].sum())
    assert found[0] == pytest.approx(a.sum() / b.sum())
    assert found[1:] == pytest.approx(np.quantile(ratios, (0.025, 0.975)), rel=0.01)


@pytest.fixture
def real_numbers(tmp_path):
    """real.json of two seeds, a test with classes and one without; the recipe has 1.5 times MSP's AUPR per image."""
    rows = [dict(data="idd_lite", seed=s, test=f"idd_lite_{test}", name=name, set=None, flags="", device="", date="",
                 miou=None if test == "roadanomaly" else 60 + s - (name == "recipe"),
                 images=[factor * (4 + s), factor * 8], per_image=dict(aupr=factor * (6 + s / 2)),
                 pooled=dict(aupr=(1 + s) * (1 if name == "msp" else 1.2 + 0.4 * s),
                             fpr95=50 - (name == "recipe") * (4 + 2 * s)),
                 **({"objects": dict(siou=10 * factor, ppv=20, f1=s)} if test == "roadanomaly" else {}))
            for test in ("pasted", "roadanomaly") for name, factor in (("msp", 1), ("recipe", 1.5)) for s in (0, 1)
            if (test, name, s) != ("roadanomaly", "recipe", 1)]
    (tmp_path / "real.json").write_text(json.dumps(dict(study="real", rows=rows, mgu=[], protocol={
        "idd_lite_pasted": {}, "idd_lite_roadanomaly": {}})))
    return tables.load(tmp_path)


def test_table_of_the_study_on_real_unknowns(real_numbers):
    assert tables.table(real_numbers, "real idd_lite per_image").splitlines() == [
        "| AUPR over MSP | seeds | pasted | roadanomaly | mIoU |", "| --- | --- | --- | --- | --- |",
        "| **MGU + AaFt**, the recipe | 2 | × 1.50 [1.50, 1.50] | × 1.50 [1.50, 1.50] (1 seed) | −1.0 |"]
    # by hand: √(1.2 · 1.6) = 1.386; |log 1.2 − log 1.6| / 2 = 0.1438, times t = 12.706 → e^±1.828
    assert tables.table(real_numbers, "real idd_lite pooled").splitlines()[2].endswith(
        "| 2 | × 1.39 [0.22, 8.62] | × 1.20 (1 seed) | −1.0 |")
    assert tables.table(real_numbers, "real idd_lite per_image recipe").splitlines()[2] == (
        "| MSP | 2 | × 0.67 [0.67, 0.67] | × 0.67 [0.67, 0.67] (1 seed) | +1.0 |")
    # −4 and −6: mean −5, deviation √2, over √2 seeds, times t = 12.706
    assert tables.table(real_numbers, "real idd_lite fpr95").splitlines()[2] == (
        "| **MGU + AaFt**, the recipe | 2 | −5.0 [−17.7, +7.7] | −4.0 (1 seed) | −1.0 |")
    assert tables.table(real_numbers, "real idd_lite objects").splitlines()[2:] == [
        "| MSP | 2 | 10.00 / 20.00 / 0.50 | +0.0 |",
        "| **MGU + AaFt**, the recipe | 2 | 15.00 / 20.00 / 0.00 (1 seed) | −1.0 |"]
    assert tables.table(real_numbers, "real camvid pooled") == "not run\n"
    # settled is neither: the pooled interval above holds 1, and one seed has none
    assert tables.table(real_numbers, "summary all").splitlines()[2:] == [
        "| MGU + AaFt, the recipe |  |  |  |  |  |  | × 1.50 (2) | × 1.50 (1) |  |  | –, –, –, −1.0 |"]
    assert tables.table(real_numbers, "summary short").splitlines()[2:] == [
        "| **MGU + AaFt**, the recipe |  |  |  |  |  |  | × 1.50 (2) | × 1.50 (1) |  |  | –, –, –, −1.0 |"]
    assert set(tables.SHORT) <= {name for name, *_ in experiments.STUDIES["real"]}
    for words, expected in {"aupr over msp": "× 1.39", "aupr against msp": "× 1.39 [0.22, 8.62]", "aupr over clean":
                            "not run", "fpr95 against msp": "−5.0 [−17.7, +7.7]"}.items():
        assert tables.number(real_numbers, f"idd_lite_pasted recipe pooled {words}") == expected
    assert tables.number(real_numbers, "idd_lite_pasted recipe miou against msp") == "−1.0 [−1.0, −1.0]"
    with pytest.raises(ValueError):
        tables.number(real_numbers, "idd_lite_pasted recipe miou over msp")
    for (name, seed), row in real_numbers["idd_lite_pasted"]["rows"].items():
        row["pooled"]["aupr"] = (3 - (name == "msp")) * (1 + 0.01 * seed * (name == "msp"))     # × 1.5, nearly as much
    assert "| **× 1.50** (2) | × 1.50 (1) |" in tables.table(real_numbers, "summary all")


def test_table_of_curves(real_numbers):
    assert real_numbers["curves"]["rows"] == [] and tables.table(real_numbers, "curves camvid") == "not run\n"
    rows = [dict(data="camvid", seed=1, f="b", miou={str(e): e + 0.25 for e in range(1, 21)}),
            dict(data="camvid", seed=0, f="b", miou={"2": 5.0}), dict(data="toy", seed=0, f="a", miou={"1": 5.0})]
    head, _, first, second = tables.table({"curves": dict(rows=rows)}, "curves camvid").splitlines()
    shown = [2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19, 20]
    assert head == f"| f | seed | {' | '.join(f'epoch {e}' for e in shown)} |"
    assert first == "| b | 0 | 5.0 |" + "  |" * 11 and second == f"| b | 1 | {' | '.join(f'{e}.2' for e in shown)} |"


def test_seeds_of_one_row_ran_alike(numbers):
    found = json.loads((numbers / "main.json").read_text())
    for row, alpha in zip(found["rows"][2:], ("0.3", "0.1")):
        row["settings"] = dict(alpha=alpha, seed="0")
    (numbers / "main.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="recipe"):
        tables.load(numbers)


def test_one_changed_digit_is_found(numbers):
    page = numbers / "README.md"
    page.write_text("AUPR <!--= toy recipe pooled aupr factor-->?<!--/--> at\n<!-- table results toy -->\n"
                    "<!-- /table -->\n")
    assert tables.main([page], numbers) == 2 and tables.main([page], numbers, check=True) == 0
    good = page.read_text()
    assert "× 1.75<!--/--> at" in good and "10.00±2.83" in good
    digits = [i for i, c in enumerate(good) if c.isdigit()]
    assert len(digits) > 60
    for i in digits:
        page.write_text(good[:i] + str((int(good[i]) + 1) % 10) + good[i + 1:])
        assert tables.main([page], numbers, check=True) == 1, good[i - 10:i + 10]
    assert tables.main([page], numbers) == 1 and page.read_text() == good


@pytest.mark.parametrize("path", tables.FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_readme(path):
    """The two pages say what the JSON files say, and a changed digit between any two markers is found."""
    assert tables.main([path], check=True) == 0
    text, found = path.read_text(), tables.load()
    for pattern in (tables.NUMBER, tables.TABLE):
        for match in pattern.finditer(text):
            digit = next((i for i in range(match.start(3), match.end(3)) if text[i].isdigit()), None)
            if digit:
                changed = text[match.start():digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1:match.end()]
                assert len(tables.differences(changed, found)[1]) == 1


# ────────────────────────────────────────────────── choose.py ──────────────────────────────────────────────────

def test_choice_rows_are_what_the_rule_says():
    """The settings that choose.py would write into a recipe are those of the row that it looks at."""
    rows = {name: (experiments.SETS[aux], changes) for name, _, aux, changes in experiments.CHOICE if aux}
    for stage, options in choose.STAGES:
        for name, settings in options.items():
            ran = rows[name][stage == "finetune"]
            assert {k: ran[k.replace("_", "-")] for k in settings} == settings, name


def test_choose():
    """The largest factor among the rows that lose at most 1.5 points; geometric mean; else the smallest loss."""
    def row(name, aupr, miou, seed=0):
        return dict(data="toy", test="toy_b", seed=seed, name=name, miou=miou, pooled=dict(aupr=aupr),
                    per_image=dict(aupr=aupr))
    rows = [row("msp", 5, 80), row("base", 10, 79), row("plain2", 9, 79.5), row("plain20", 20, 78),
            row("kl0.1", 11, 78.6),
            row("msp", 5, 80, 1), row("base", 10, 79, 1), row("plain2", 20, 79.5, 1), row("plain20", 20, 78, 1)]
    chosen, told = choose.choose(rows, "toy")
    assert chosen == {"mgu": dict(step_size=2.0), "finetune": dict(mix="clean", bn="train", loss="kl", alpha=0.1)}
    assert "plain2 × 2.683 -0.50" in told[0]                                            # (9/5 · 20/5)^½
    assert choose.choose([r for r in rows if r["name"] in ("msp", "plain20")] + [row("base", 30, 70)], "toy")[0] == {
        "mgu": dict(step_size=20.0), "finetune": dict(mix="clean", bn="train", loss="kl", alpha=0.3)}


def test_choice_table(tmp_path):
    """What the rule sees, by hand: 10/5 and 22/5 of AUPR in each of two groups; 2 points are too many to lose."""
    def row(name, aupr, miou):
        return dict(data="toy", test="toy_b", seed=0, name=name, miou=miou, pooled=dict(aupr=aupr),
                    per_image=dict(aupr=aupr))
    rows = [row("msp", 5, 80), row("base", 10, 79), row("plain20", 22, 78)]
    (tmp_path / "choice.json").write_text(json.dumps(dict(study="choice", rows=rows, mgu=[], protocol={"toy_b": {}})))
    (tmp_path / "gpu.json").write_text(json.dumps(dict(rows=[dict(section="mgu")])))       # of another kind
    tests = tables.load(tmp_path)
    lines = tables.table(tests, "choice toy").splitlines()
    assert lines[2].startswith("| **1** | **base: η = 5") and lines[2].endswith("| **× 2.000** | **−1.00** |")
    assert lines[3] == "| 1 | η = 20 | × 4.400 | −2.00 |" and len(lines) == 6
    assert tables.table(tests, "choice camvid") == "not run\n"


def test_remedies():
    """By hand, of two sets, the second without mIoU: √(4 · 1) = 2, √(2 · 3) = 2.45; √(9 · 9) loses too much mIoU."""
    def row(name, test, aupr, miou=None):
        return dict(data="camvid", test=f"camvid_{test}", seed=0, name=name, miou=miou, pooled=dict(aupr=aupr / 2),
                    per_image=dict(aupr=2 * aupr))
    rows = [row("msp", "choosing", 5, 60), row("msp", "elsewhere", 10),
            row("recipe", "choosing", 20, 59), row("recipe", "elsewhere", 10), row("kl0.1", "choosing", 99, 60),
            row("mix_train", "choosing", 10, 58.6), row("mix_train", "elsewhere", 30),
            row("eta2", "choosing", 45, 58), row("eta2", "elsewhere", 90)]
    for name, value in (("recipe", (4, 1, 2, -1)), ("mix_train", (2, 3, 6**0.5, -1.4)), ("eta2", (9, 9, 9, -2))):
        assert choose.remedies(rows, "camvid")[0][name] == pytest.approx(value)
    assert choose.remedies(rows, "camvid")[0].keys() == {"recipe", "mix_train", "eta2"}     # the others: on one set
    assert choose.remedies(rows, "camvid")[1] == "mix_train" and choose.remedies(rows, "idd_lite") == ({}, None)
    tests = {test: dict(study="realchoice", rows={(r["name"], 0): r for r in rows if r["test"] == test})
             for test in ("camvid_choosing", "camvid_elsewhere")}
    assert tables.table(tests, "remedies camvid").splitlines()[2:4] == [
        "| MGU + AaFt, the recipe | × 4.00 | × 1.00 | × 2.00 | −1.0 |",
        "| **training images mixed in, augmented** | **× 2.00** | **× 3.00** | **× 2.45** | **−1.4** |"]
    assert tables.table(tests, "remedies idd_lite") == "not run\n"


def test_plot(real_numbers, tmp_path):
    """A row with two seeds on both tests is a point; the picture holds its numbers."""
    assert plot.numbers(real_numbers) == {"camvid": {}, "idd_lite": {}}                # RoadAnomaly: of one seed
    found = {"camvid": {"entropy": [[1.2, 1.1, 1.3], [1.1, 1, 1.2]], "cknn": [[3, 2, 4], [1.5, 1.4, 1.6]]},
             "idd_lite": {"entropy": [[1, 1, 1], [1, 1, 1]], "recipe": [[1.01, 1, 1.1], [1.01, 1, 1.1]]}}
    plot.draw(found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert json.loads(picture.text["Description"]) == found


def test_the_published_plot_is_of_the_published_numbers():
    found = plot.numbers(tables.load())
    with Image.open(plot.OUT) as picture:
        drawn = json.loads(picture.text["Description"])
    assert {data: list(rows) for data, rows in drawn.items()} == {data: list(rows) for data, rows in found.items()}
    assert len(drawn["camvid"]) > 12
    for data, rows in drawn.items():
        for name, points in rows.items():
            np.testing.assert_allclose(points, found[data][name], rtol=0.01, err_msg=f"{data} {name}: run plot.py")


@pytest.mark.parametrize("page", tables.FILES, ids=("main", "results"))
def test_links_lead_somewhere(page):
    """Every relative link of a page names a file that is there and, behind a #, one of its headings."""
    def anchors(path):
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
             if not link.startswith("http")]
    assert len(links) > 3
    for link in links:
        file, _, anchor = link.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_kinds_of_the_toy_s_unknowns(toy_root, tmp_path):
    """Every anomalous pixel of a scene has a silhouette and a pattern; the table's means and factors."""
    for n in range(6):
        ids, maps = kinds.kinds_of(np.random.default_rng([0, 2, n]))
        assert np.array_equal(ids, toy.toy_scene(np.random.default_rng([0, 2, n]), anomaly=True)[1])
        for axis, kind in maps.items():
            assert np.array_equal(kind >= 0, ids == 14) and kind.max() < len(kinds.KINDS[axis])
    assert toy.toy_anomaly.__module__ == "toy", "put back"
    rows = [dict(row=row, seed=seed, axis="pattern", kind="plain", pixels=50, aupr=aupr, auroc=auroc)
            for row, seed, aupr, auroc in (("msp", 0, 10, 70), ("msp", 1, 20, 72), ("recipe", 0, 30, 80),
                                           ("recipe", 1, 20, 81), ("recipe", 2, 99, 99))]
    (tmp_path / "kinds.json").write_text(json.dumps(dict(rows=rows)))
    table = tables.kinds("pattern", tables.load(tmp_path)["kinds"]["rows"])
    assert "| plain | 50 | 15.00 → 25.00 | × 2.00 (3.00, 1.00) | 71.00 → 80.50 |" in table


def test_lines_fit_the_page():
    """120 columns, everywhere."""
    root = Path(__file__).resolve().parents[1]
    files = [path for folder in (".", "tests", "tests/results") for path in sorted((root / folder).glob("*.py"))]
    long = [f"{path.name}:{number}" for path in files
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert len(files) > 20
    assert not long
