"""Files: written whole or not at all, the same bytes for the same content, refused in one line where they are damaged;
and the segmentation metrics against sklearn."""
import inspect
import io
import json
import locale
import os
import pickle
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

import common
import pretrain

CLASSES = ["road", "sky", "car"]


def refused(call, path, *words):
    """The InputError of `call`: one line that names the file and holds every word."""
    with pytest.raises(common.InputError) as e:
        call(path)
    message = str(e.value)
    assert str(path) in message and "\n" not in message, message
    for word in words:
        assert word in message, message


# ────────────────────────────────────────────── written whole ──────────────────────────────────────────────

class Explodes:
    """Neither json, numpy nor torch can write it."""
    def __reduce__(self):
        raise RuntimeError("boom")


@pytest.mark.parametrize("before", (None, b"the old file"))
@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_replacing_leaves_the_old_file(tmp_path, before, error):
    path = tmp_path / "file.bin"
    if before:
        path.write_bytes(before)
    with pytest.raises(error):
        with common.replacing(path) as temporary:
            temporary.write_bytes(b"half of the ne")
            assert temporary.parent == tmp_path and temporary != path
            assert (path.read_bytes() if before else path.exists()) == (before or False)
            raise error
    assert [p.name for p in tmp_path.iterdir()] == (["file.bin"] if before else [])
    assert not before or path.read_bytes() == before


def test_replacing_makes_the_folder_and_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with common.replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("save, name", (
    (lambda path: common.save_checkpoint(path, dict(model=torch.zeros(9), settings=Explodes())), "ft.pt"),
    (lambda path: common.save_npz(path, dict(image=np.zeros(9), more=np.array([Explodes()], object))), "sample.npz"),
    (lambda path: common.save_json(path, dict(figures=Explodes())), "manifest.json")))
def test_a_failed_save_leaves_the_old_file(tmp_path, save, name):
    path = tmp_path / name
    path.write_bytes(b"the old file")
    with pytest.raises((RuntimeError, TypeError)):
        save(path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.read_bytes() == b"the old file"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """The file is flushed to the disk before it gets its name."""
    path = tmp_path / "ft.pt"
    path.write_bytes(b"the old file")

    def full(number):
        assert path.read_bytes() == b"the old file"
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    for save in (lambda: common.save_checkpoint(path, dict(model={})), lambda: common.write_bytes(path, b"new")):
        refused(lambda path: save(), path, "No space left on device")
        assert [p.name for p in tmp_path.iterdir()] == ["ft.pt"] and path.read_bytes() == b"the old file"


def test_a_system_error_without_a_number_is_told(tmp_path):
    def save(path):
        with common.replacing(path):
            raise OSError("encoder error -2")
    refused(save, tmp_path / "panels.png", "encoder error -2")


def test_npz_has_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    arrays = dict(image=np.random.default_rng(0).integers(0, 9, (40, 50, 3), dtype=np.uint8), y=3, source="a/ü.png")
    common.save_npz(tmp_path / "a.npz", arrays)
    now, local = time.time(), time.localtime
    monkeypatch.setattr(time, "time", lambda: now + 4e7)
    monkeypatch.setattr(time, "localtime", lambda *a: local(now + 4e7))
    common.save_npz(tmp_path / "b.npz", {k: np.array(v) for k, v in arrays.items()})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["image", "y", "source"] and (file["image"] == arrays["image"]).all()
        assert file["y"] == 3 and str(file["source"]) == "a/ü.png"
    common.save_npz(tmp_path / "b.npz", dict(arrays, y=4))
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "b.npz").read_bytes()


def test_json_round_trip(tmp_path):
    value = dict(classes=["Fußgänger"], n=3, x=0.1, none=None)
    common.save_json(tmp_path / "a.json", value)
    assert common.load_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text("utf-8"))


@pytest.mark.skipif(sys.flags.utf8_mode, reason="this Python reads UTF-8 in any locale")
def test_json_does_not_depend_on_the_locale(tmp_path):
    before = locale.setlocale(locale.LC_CTYPE)
    common.save_json(tmp_path / "a.json", ["Fußgänger"])
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        assert common.load_json(tmp_path / "a.json") == ["Fußgänger"]
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.parametrize("content", (None, b"", b"{\"a\": 1", b"\xff\xfe\x00"))
def test_bad_json(tmp_path, content):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    refused(common.load_json, path)


# ────────────────────────────────────────────── checkpoints ──────────────────────────────────────────────

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, f) of a checkpoint."""
    torch.manual_seed(0)
    f = common.Segmenter("deeplabv3", "mobilenet_v3_large", len(CLASSES))
    path = tmp_path_factory.mktemp("ckpt") / "pretrained.pt"
    common.save_checkpoint(path, contents(f))
    return path, f


def contents(f, **other):
    return dict(dict(model=f.state_dict(), arch="deeplabv3", backbone="mobilenet_v3_large", classes=CLASSES, data="toy",
                     root="data/toy", anomaly=None, stage="pretrain", settings=dict(lr=1e-3, crop=(64, 96)),
                     epoch=3, step=2), **other)


def test_checkpoint_round_trip(saved):
    path, f = saved
    g, checkpoint = common.load_checkpoint(path)
    assert not g.training and g.arch == "deeplabv3" and g.backbone_name == "mobilenet_v3_large" and g.num_classes == 3
    assert g.state_dict().keys() == f.state_dict().keys()
    assert all(torch.equal(v, f.state_dict()[k]) for k, v in g.state_dict().items())
    assert (checkpoint["settings"] == dict(lr=1e-3, crop=(64, 96))
            and (checkpoint["epoch"], checkpoint["step"]) == (3, 2))
    X = torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.equal(g(X), copy_eval(f)(X))


def copy_eval(f):
    g = common.Segmenter(f.arch, f.backbone_name, f.num_classes)
    g.load_state_dict(f.state_dict())
    return g.eval().to(memory_format=torch.channels_last)


def test_checkpoint_that_is_not_there(tmp_path):
    refused(common.load_checkpoint, tmp_path / "ft.pt", "no such file")


def test_checkpoint_that_is_a_folder(tmp_path):
    refused(common.load_checkpoint, tmp_path)


@pytest.mark.parametrize("content", (b"", b"just a text\n", b"PK\x03\x04 and then nothing",
                                     b"\x89PNG\r\n\x1a\n", bytes(range(256)) * 9))
def test_checkpoint_that_is_another_file(tmp_path, content):
    path = tmp_path / "ft.pt"
    path.write_bytes(content)
    refused(common.load_checkpoint, path)


@pytest.mark.parametrize("part", (0.001, 0.5, 0.9999))
def test_truncated_checkpoint(saved, tmp_path, part):
    data = saved[0].read_bytes()
    path = tmp_path / "ft.pt"
    path.write_bytes(data[:int(part * len(data))])
    refused(common.load_checkpoint, path)


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("archive", (True, False))
def test_no_code_of_a_checkpoint_runs(saved, tmp_path, archive):
    """os.system in the pickle of a checkpoint, and in a plain pickle; control: unpickling it does run the command."""
    marker, path = tmp_path / "ran", tmp_path / "ft.pt"
    bad = dict(contents(saved[1]), format=common.FORMAT, settings=RunsCode(f"touch '{marker}'"))
    if archive:
        torch.save(bad, path)
    else:
        path.write_bytes(pickle.dumps(bad, 2))
    refused(common.load_checkpoint, path, "refused")
    refused(lambda p: pretrain.load_backbone(saved[1], str(p)), path, "refused")
    assert not marker.exists()
    if archive:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("change, words", (
    (dict(classes=CLASSES + ["bus"]), ("4 classes", "deeplabv3 on mobilenet_v3_large")),
    (dict(arch="pspnet"), ("pspnet on mobilenet_v3_large",)),
    (dict(arch="unet"), ("unet",)),
    (dict(backbone="vgg16"), ("vgg16",)),
    (dict(model=[1, 2]), ()),
    (dict(model={}), ())))
def test_checkpoint_of_another_model(saved, tmp_path, change, words):
    path = tmp_path / "ft.pt"
    common.save_checkpoint(path, contents(saved[1], **change))
    refused(common.load_checkpoint, path, *words)


@pytest.mark.parametrize("change", (dict(classes=5), dict(classes=[1, 2, 3]), dict(data=["toy"]), dict(root=None),
                                    dict(anomaly=5), dict(anomaly=[5]), dict(settings=None), dict(epoch="3"),
                                    dict(step=[2]), dict(arch=["deeplabv3"]), dict(backbone={}), dict(width="64"),
                                    dict(classifier=5), dict(outlier="yes")))
def test_checkpoint_with_values_of_other_types(saved, tmp_path, change):
    path = tmp_path / "ft.pt"
    common.save_checkpoint(path, contents(saved[1], **change))
    refused(common.load_checkpoint, path)


def test_checkpoint_of_another_format(saved, tmp_path):
    path = tmp_path / "ft.pt"
    torch.save(dict(contents(saved[1]), format=99), path)
    refused(common.load_checkpoint, path, "99", str(common.FORMAT))


@pytest.mark.parametrize("value", (torch.zeros(3), [1, 2], {"state_dict": {}}, contents(torch.nn.Linear(1, 1))))
def test_tensors_that_are_no_checkpoint(tmp_path, value):
    path = tmp_path / "ft.pt"
    torch.save(value, path)     # the last lacks the format
    refused(common.load_checkpoint, path, "not a checkpoint")


def test_fingerprint(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert common.fingerprint(path) == "ba7816bf8f01cfea"    # FIPS 180-2, SHA-256 of "abc"


# ───────────────────────────────────────────── auxiliary samples ─────────────────────────────────────────────

def sample(**other):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, (12, 16), dtype=np.uint8)
    return dict(dict(format=common.FORMAT, image=rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), label=label,
                     unknown=label == 2, y=2, correct=9, source="train/images/training/t1-3/0.png",
                     history=np.array([9, 4, 0], np.int32)), **other)


def test_sample_round_trip(tmp_path):
    path = tmp_path / "a.npz"
    common.save_npz(path, sample())
    got = common.load_sample(path)
    assert got.keys() == sample().keys()
    assert all((got[k] == v).all() and got[k].dtype == np.asarray(v).dtype for k, v in sample().items())


@pytest.mark.parametrize("change", (
    dict(format=99), dict(format=np.arange(3)), dict(format="one"), dict(image=sample()["image"][:, 1:]),
    dict(image=sample()["image"].astype(np.float32)), dict(label=sample()["label"].astype(np.int64)),
    dict(unknown=sample()["unknown"].astype(np.uint8)), dict(unknown=sample()["unknown"][1:]),
    dict(y=np.arange(3)), dict(correct=0.5), dict(history=3), dict(history=np.zeros(0, np.int32)), dict(source=3),
    dict(source="/etc/image.png"), dict(source="a/../../image.png"), dict(more=1)))
def test_sample_of_other_arrays(tmp_path, change):
    path = tmp_path / "a.npz"
    common.save_npz(path, sample(**change))
    refused(common.load_sample, path)


@pytest.mark.parametrize("key", common.SAMPLE)
def test_sample_without_a_key(tmp_path, key):
    path = tmp_path / "a.npz"
    common.save_npz(path, {k: v for k, v in sample().items() if k != key})
    refused(common.load_sample, path)


def test_sample_that_is_not_there_or_another_file(tmp_path):
    refused(common.load_sample, tmp_path / "missing.npz")
    refused(common.load_sample, tmp_path)
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 4)))
    for content in (b"", b"a text\n", bytes(range(256)), buffer.getvalue(), pickle.dumps([1])):
        path.write_bytes(content)
        refused(common.load_sample, path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("image.npy", b"not an array")
    refused(common.load_sample, path)


def test_damaged_sample(tmp_path):
    """Cut anywhere, or with any three bytes changed: refused, or (bytes that nobody reads) the same arrays."""
    path = tmp_path / "a.npz"
    common.save_npz(path, sample())
    data, rng, refusals = path.read_bytes(), np.random.default_rng(2), 0
    for k in range(400):
        damaged = bytearray(data)
        if k % 3 == 0:
            damaged = damaged[:rng.integers(len(data))]
        else:
            for at in rng.integers(len(data), size=3):
                damaged[at] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        try:
            got = common.load_sample(path)
        except common.InputError as e:
            assert str(path) in str(e)
            refusals += 1
        else:
            assert all((got[key] == v).all() for key, v in sample().items() if key in got)
    assert refusals > 340


def test_no_code_of_a_sample_runs(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "a.npz"
    evil = np.empty((), object)
    evil[()] = RunsCode(f"touch '{marker}'")
    np.savez(path, **sample(history=evil))
    refused(common.load_sample, path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)["history"]
    assert marker.exists()


@pytest.mark.parametrize("error", (MemoryError("Unable to allocate 2.73 TiB"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate")))
def test_memory_of_a_cpu_is_one_line(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        common.cli(main)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and said.startswith("error: out of memory")


def test_no_compiler_is_one_line(capsys):
    """What --compile raises where there is no C++ compiler, or no Triton on a GPU."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError, InvalidCxxCompiler
    frame = inspect.currentframe()
    for error in (InductorError(InvalidCxxCompiler(), frame),
                  BackendCompilerFailed(lambda: 0, RuntimeError("Cannot find a working triton installation"), frame)):
        def main():
            raise error
        with pytest.raises(SystemExit) as end:
            common.cli(main)
        said = capsys.readouterr().err
        assert end.value.code == 1 and said.count("\n") == 1 and said.startswith("error: --compile: "), said


# ─────────────────────────────────────────────── continuing ───────────────────────────────────────────────

SETTINGS = dict(schedule="constant", lr=1e-3, epochs=10, crop=(64, 96), batch_size=8, anomaly=None)


def test_adopt_the_same_run():
    checkpoint = dict(settings=SETTINGS, epoch=4, step=7)
    assert pretrain.adopt(checkpoint, SETTINGS, "ft.pt") == (4, 7)
    assert pretrain.adopt(checkpoint, dict(SETTINGS, crop=[64, 96]), "ft.pt") == (4, 7)      # argparse's list
    assert pretrain.adopt(checkpoint, dict(SETTINGS, epochs=12), "ft.pt") == (4, 7)          # a longer run continues


@pytest.mark.parametrize("change, words", (
    (dict(lr=1e-4), ("lr", "0.001", "0.0001")), (dict(epochs=9), ("epochs", "10", "9")),
    (dict(epochs=12, schedule="poly"), ("epochs", "10", "12")),     # the earlier steps had another learning rate
    (dict(crop=[64, 95]), ("crop", "95")),
    (dict(batch_size=4), ("batch-size 8", "4")),
    (dict(anomaly=["car"]), ("anomaly", "car"))))
def test_adopt_refuses_another_run(change, words):
    settings = dict(SETTINGS, schedule=change.get("schedule", "constant"))
    checkpoint = dict(settings=settings, epoch=4, step=7)
    refused(lambda path: pretrain.adopt(checkpoint, dict(settings, **change), path), "runs/ft.pt", "--restart", *words)


def test_resolve_takes_flag_then_recipe_then_paper():
    names = {**common.PAPER["finetune"], **common.OURS["finetune"]}
    args = SimpleNamespace(**dict.fromkeys(names), seed=3)
    args.lr = 3e-4
    told = common.resolve(args, "finetune", "camvid", "pspnet")
    assert told.endswith(" · seed 3")
    assert (args.lr, args.batch_size, args.epochs, args.alpha, args.loss, args.mix) == (3e-4, 8, 30, 0.3, "kl", "clean")
    for part in ("lr 0.0003 (flag)", "batch-size 8 (recipe)", "epochs 30 (paper)", "alpha 0.3 (recipe)",
                 "mix clean (recipe)", "bn train (ours)", "unknown flipped (ours)"):
        assert part in told


def test_the_line_of_settings_names_what_the_architecture_has():
    for arch, names in (("deeplabv3", ()), ("fpn", ("width 64",)),
                        ("mask2former", ("width 64", "attention masked", "queries 32", "decoder-layers 3"))):
        args = SimpleNamespace(**dict.fromkeys({**common.PAPER["pretrain"], **common.OURS["pretrain"]}), seed=0)
        args.arch = arch
        told = common.resolve(args, "pretrain", "toy").split(" · ")
        found = [part.split(" (")[0] for part in told if part.startswith(("width", "attention", "queries", "decoder"))]
        assert tuple(found) == names and (args.width, args.queries) == (64, 32)


@pytest.mark.parametrize("data", ("streethazards", "bdd"))
def test_the_papers_datasets_have_the_papers_settings(data):
    """Sec. IV-A: Adam with 1e-4, 1000 epochs, batches of 256; 300 images a class; 10 and 30 epochs, α = 0.05, L_ER."""
    expected = dict(pretrain=dict(epochs=1000, batch_size=256, lr=1e-4), mgu=dict(per_class=300),
                    finetune=dict(epochs=10, batch_size=256, lr=1e-4, alpha=0.05, loss="er", mix="none"))
    for stage, values in expected.items():
        for arch, epochs in (("deeplabv3", 10), ("pspnet", 30)):
            args = SimpleNamespace(**dict.fromkeys({**common.PAPER[stage], **common.OURS[stage]}), seed=0)
            common.resolve(args, stage, data, arch)
            if stage == "finetune":
                values["epochs"] = epochs
            assert {k: getattr(args, k) for k in values} == values


# ─────────────────────────────────────────── segmentation metrics ───────────────────────────────────────────

@pytest.mark.parametrize("present", ((0, 1, 2, 3, 4), (0, 2, 3)))
def test_segmentation_metrics_equal_sklearn(present):
    """Also with classes that no label holds, but a prediction does: they are not part of the mean."""
    rng = np.random.default_rng(3)
    Z = torch.tensor(rng.choice([*present, 255, 254], (3, 20, 30)), dtype=torch.uint8)
    prediction = torch.tensor(np.where(rng.random(Z.shape) < 0.6, np.where(Z < 5, Z, 0), rng.integers(0, 5, Z.shape)))
    matrix = sum(common.confusion(p, z, 5) for p, z in zip(prediction, Z))
    known = (Z < 5).numpy()
    y, p = Z.numpy()[known], prediction.numpy()[known]
    np.testing.assert_array_equal(matrix, confusion_matrix(y, p, labels=range(5)))
    classes = ("a", "b", "c", "d", "e")
    got = common.segmentation_metrics(matrix, classes)
    iou = 100 * jaccard_score(y, p, labels=range(5), average=None)
    for c, name in enumerate(classes):
        assert got["iou"][name] == (pytest.approx(iou[c], rel=1e-12) if c in present else None)
    assert got["miou"] == pytest.approx(100 * jaccard_score(y, p, labels=present, average="macro"), rel=1e-12)
    assert got["pixel_accuracy"] == pytest.approx(100 * accuracy_score(y, p), rel=1e-12)


def test_segmentation_metrics_of_nothing():
    got = common.segmentation_metrics(np.zeros((2, 2)), ("a", "b"))
    assert got == dict(miou=None, iou=dict(a=None, b=None), pixel_accuracy=None)
    assert not common.confusion(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255, dtype=torch.uint8),
                                2).any()
