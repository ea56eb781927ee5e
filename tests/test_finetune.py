"""Where fine-tuning's images and D_s come from: X', the controls, known images beside them; sets that do not fit."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pretrain
import finetune
from finetune import AuxiliarySet
from runner import NO_FIGURES, run, run_ok

H, W = 40, 56
CONTROLS = ("noise", "sign")


def write_set(folder, n=5, grey=(0, 256), spread=15.0, twins=False):
    """A set of n samples and the images that they were made from: folder/images/i.png, folder/set. X in grey[0] to
    grey[1] − 1; X' − X heavy-tailed as MGU's is, zero on one pixel in ten of I_ỹ; D_s two thirds of I_ỹ; the last
    sample with an empty D_s. `twins`: all samples the same. Returns [(X, X', I_ỹ, D_s, Z)]."""
    samples = []
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        rng = np.random.default_rng(7 if twins else i)
        X = rng.integers(*grey, (H, W, 3), dtype=np.uint8)
        Z = rng.integers(0, 4, (H, W), dtype=np.uint8)
        Z[:, :3] = common.IGNORED
        y = int(rng.integers(4))
        I = Z == y
        moved = rng.standard_t(3, (H, W, 3)) * spread * (rng.random((H, W, 1)) < 0.9)
        X_aux = np.where(I[..., None], (X + moved).round().clip(0, 255), X).astype(np.uint8)
        D_s = I & (rng.random((H, W)) < 0.67) & (i < n - 1 or twins)
        Image.fromarray(X).save(folder / f"images/{i}.png")
        common.save_npz(folder / f"set/{i}.npz", dict(
            format=common.FORMAT, image=X_aux, label=Z, unknown=D_s, y=y, correct=int(D_s.sum()),
            source=f"images/{i}.png", history=np.array([3, 0], np.int32)))
        samples.append((X, X_aux, I, D_s, Z))
    names = [f"{i}.npz" for i in range(n)]
    common.save_json(folder / "set/manifest.json", dict(settings=dict(ckpt="x"), samples=names))
    return samples


def items(folder, unknown="flipped", images="aux", seed=3, epoch=0, order=None, **more):
    """[(image (H, W, 3), D_s (H, W))] of every item of a set, by its index."""
    data = AuxiliarySet(folder / "set", folder, seed, unknown, images, **more)
    found = {i: data[epoch, i] for i in order or range(len(data))}
    assert all(found[i]["index"] == i for i in found)
    return [(found[i]["image"].permute(1, 2, 0).numpy(), found[i]["unknown"].numpy()) for i in range(len(data))]


def rms(a, b, where):
    return np.sqrt(np.mean((a.astype(float) - b)[where]**2))


# ───────────────────────────────────────────────── the controls ─────────────────────────────────────────────────

@pytest.mark.parametrize("unknown", ("flipped", "all"))
def test_images_and_unknown(tmp_path, unknown):
    """X' or X, and D_s or none, as the flags say."""
    samples = write_set(tmp_path)
    for images in ("aux", "clean", "still", *CONTROLS):
        for (X, X_aux, I, D_s, _), (image, found) in zip(samples, items(tmp_path, unknown, images)):
            chosen = I if unknown == "all" else D_s
            assert np.array_equal(found, chosen if images != "clean" else np.zeros_like(I))
            assert image.dtype == np.uint8 and found.dtype == bool
            if images == "aux":
                assert np.array_equal(image, X_aux)
            elif images in ("clean", "still"):
                assert np.array_equal(image, X)
            else:
                assert np.array_equal(image[~chosen], X[~chosen]), "a pixel outside D_s moved"
                assert not chosen.any() or (image != X_aux)[chosen].any()


@pytest.mark.parametrize("unknown", ("flipped", "all"))
@pytest.mark.parametrize("images", CONTROLS)
@pytest.mark.parametrize("grey, spread", (((0, 256), 15), ((0, 256), 60), ((225, 256), 25), ((0, 12), 40)))
def test_controls_have_the_rms_of_the_perturbation(tmp_path, unknown, images, grey, spread):
    """After clipping and rounding, over D_s, to 1 %; also of images that are nearly white or nearly black."""
    samples = write_set(tmp_path, grey=grey, spread=spread)
    clipped = 0
    for (X, X_aux, I, D_s, _), (image, _) in zip(samples, items(tmp_path, unknown, images)):
        where = I if unknown == "all" else D_s
        if where.any():
            assert rms(image, X, where) == pytest.approx(rms(X_aux, X, where), rel=0.01)
            clipped += np.isin(image[where], (0, 255)).sum() - np.isin(X[where], (0, 255)).sum()
    assert clipped > 20, "the test needs values at the limits"


@pytest.mark.parametrize("unknown", ("flipped", "all"))
def test_controls_without_clipping(tmp_path, unknown):
    """Far from the limits nothing is scaled. noise: the same pixels of X' − X, in other places; sign: the same size of
    every value, half of them turned over, each by itself."""
    samples = write_set(tmp_path, grey=(120, 136), spread=4)
    signs = []
    for (X, X_aux, I, D_s, _), (noise, _), (sign, _) in zip(samples, items(tmp_path, unknown, "noise"),
                                                            items(tmp_path, unknown, "sign")):
        where = I if unknown == "all" else D_s
        moved, noise, sign = (v[where].astype(int) - X[where] for v in (X_aux, noise, sign))
        assert np.abs(moved).max(initial=0) < 100, "the test needs a perturbation that nothing clips"
        assert sorted(map(tuple, noise)) == sorted(map(tuple, moved))
        assert np.array_equal(np.abs(sign), np.abs(moved))
        if where.any():
            assert abs(np.corrcoef(noise.ravel(), moved.ravel())[0, 1]) < 0.15
            signs.append(np.sign(sign * moved)[(moved != 0).all(1)])
    signs = np.concatenate(signs)                                          # (pixels, 3), ±1
    n = len(signs)
    assert n > 500 and abs(signs.mean()) < 4 / (3 * n)**0.5
    assert abs((signs == signs[:, :1]).all(1).mean() - 0.25) < 4 * (3 / 16 / n)**0.5, "the channels share a sign"


def test_controls_are_functions_of_seed_and_index(tmp_path):
    """The same bytes in any order and epoch; others for another seed, and for another sample of the same image."""
    write_set(tmp_path, n=4, twins=True)
    for images in CONTROLS:
        found = [image for image, _ in items(tmp_path, images=images)]
        again = [image for image, _ in items(tmp_path, images=images, epoch=5, order=[3, 0, 2, 1])]
        other = [image for image, _ in items(tmp_path, images=images, seed=4)]
        assert all(np.array_equal(a, b) for a, b in zip(found, again))
        assert not any(np.array_equal(a, b) for a, b in zip(found, other))
        assert len({image.tobytes() for image in found}) == 4


def test_rms_where_saturation_decides():
    """X = 255: the half of the values that a sign sends upwards is lost. With X' − X = −50 the other half goes down by
    50 · √2; with −255 there is no more to have."""
    x = np.full((1000, 3), 255.0)
    signs = np.where(np.arange(3000).reshape(-1, 3) % 2, 1.0, -1.0)
    for size, down in ((50, 71), (255, 255)):
        result = common.add_with_rms(x, size * signs)
        assert result.dtype == np.uint8
        assert np.array_equal(result, np.where(signs > 0, 255, 255 - down))
    assert np.array_equal(common.add_with_rms(x, np.zeros_like(x)), x)
    assert common.add_with_rms(x[:0], x[:0]).shape == (0, 3)
    assert (common.add_with_rms(x, np.full_like(x, 9)) == 255).all(), "everything is clipped: nothing moves"


# ──────────────────────────────────────────────── known images ────────────────────────────────────────────────

def test_mix_clean(tmp_path):
    samples = write_set(tmp_path)
    for images in ("aux", "still", "noise"):
        alone, both = items(tmp_path, images=images), items(tmp_path, images=images, clean=True)
        assert len(alone) == 5 and len(both) == 10
        assert all(np.array_equal(a, b) for one, two in zip(alone, both) for a, b in zip(one, two))
        for (X, *_), (image, D_s) in zip(samples, both[5:]):
            assert np.array_equal(image, X) and not D_s.any()


@pytest.mark.parametrize("n", (4, 8))
def test_mix_train(tmp_path, toy_root, n):
    """Item n + k of epoch e is image perm_e[k] of the training split, augmented by (seed, epoch, image); a split of
    fewer images is gone through again, each time in another permutation, with other windows."""
    write_set(tmp_path, n=n)
    seed, scale = 3, (0.5, 2.0)
    train = pretrain.TrainingScenes("toy", toy_root, "train", None, (H, W), scale, seed)
    data = AuxiliarySet(tmp_path / "set", tmp_path, seed, "flipped", "aux", train=train)
    assert len(train) == 6 and len(data) == 2 * n
    whole = common.Scenes("toy", toy_root, "train")
    seen = {}
    for epoch in range(3):
        for k in range(n):
            turn = epoch * (1 if n <= 6 else 2) + k // 6               # how often the split was gone through before
            number = int(np.random.default_rng([seed, turn]).permutation(6)[k % 6])
            rng = np.random.default_rng([seed, turn, number])
            image, label = pretrain.augment(*whole.decode(number), (H, W), scale, rng)
            item = data[epoch, n + k]
            assert np.array_equal(item["image"].permute(1, 2, 0), image) and np.array_equal(item["label"], label)
            assert not item["unknown"].any() and item["unknown"].shape == (H, W) and item["index"] == n + k
            seen[epoch, k] = image.tobytes()
    assert len(set(seen.values())) == 3 * n
    for k in range(n):
        assert torch.equal(data[0, k]["image"], data[1, k]["image"]), "an auxiliary image was augmented"


# ─────────────────────────────────────────── sets that do not fit ───────────────────────────────────────────

def change(path, **other):
    with np.load(path) as file:
        common.save_npz(path, {**file, **other})


@pytest.mark.parametrize("manifest", (
    [], 3, {}, dict(samples=["0.npz"]), dict(settings={}), dict(settings={}, samples=[]),
    dict(settings={}, samples=["../set/0.npz"]), dict(settings={}, samples=[3]), dict(settings={}, samples="0.npz"),
    dict(settings={}, samples=["/etc/hostname"]), dict(settings={}, samples=["0.npz", ""]),
    dict(settings={}, samples=["0.npz", "gone.npz"]), dict(settings=[], samples=["0.npz"])))
def test_manifests_that_are_refused(tmp_path, manifest):
    write_set(tmp_path)
    common.save_json(tmp_path / "set/manifest.json", manifest)
    with pytest.raises(common.InputError) as e:
        AuxiliarySet(tmp_path / "set", tmp_path, 0, "flipped", "aux")
    assert str(tmp_path / "set") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("source", ("../{}/images/0.png", "{}/images/0.png", "images/../images/0.png", "images/9.png",
                                    "images", 3))
def test_sources_that_are_refused(tmp_path, source):
    write_set(tmp_path)
    text = source if source == 3 else source.format(tmp_path if source[0] == "{" else tmp_path.name)
    change(tmp_path / "set/0.npz", source=text)
    for images in ("clean", "still", *CONTROLS):
        with pytest.raises(common.InputError) as e:
            items(tmp_path, images=images)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_other_images_are_refused(tmp_path):
    """One grey level in one value outside I_ỹ, or another size: wherever X is read. Inside I_ỹ X' may be anything."""
    (X, _, I, *_), *_ = write_set(tmp_path)
    (h, w), (h_I, w_I) = np.argwhere(~I)[-1], np.argwhere(I)[0]
    for at, refused in (((h, w, 2), True), ((h_I, w_I, 0), False), (None, True)):
        other = X.copy()
        if at:
            other[at] ^= 1
        Image.fromarray(other if at else X[:-1]).save(tmp_path / "images/0.png")
        for more in (dict(images="clean"), dict(images="still"), dict(images="noise"), dict(images="sign"),
                     dict(clean=True)):
            if refused:
                with pytest.raises(common.InputError, match=r"images/0\.png: not the image .*0\.npz .*--root"):
                    items(tmp_path, **more)
            else:
                items(tmp_path, **more)


def one_line(done, *parts):
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(str(part) in done.err for part in parts), done.err


@pytest.fixture(scope="module")
def aux(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("set")
    run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 1, "--max-steps", 4, folder=folder,
           before=NO_FIGURES)
    return folder / "auxiliary"


def test_another_root(aux, small, tmp_path):
    """Other images under the same names are noticed at the start, whatever is asked for; a folder that is not there
    is named with the flag that mends it, and nothing is written."""
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, root="data/toy"), tmp_path / "moved.pt")
    shutil.copytree(small / "toy", tmp_path / "other")
    for path in (tmp_path / "other").rglob("train/images/**/*.png"):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    tune = ("finetune.py", "--ckpt", small / "pretrained.pt", "--aux", aux, "--epochs", 1, "--batch-size", 4)
    for more in ((), ("--mix", "train"), ("--mix", "none", "--images", "noise")):
        one_line(run(*tune, *more, "--root", "other", folder=tmp_path), "other/train/images", "--root")
    (tmp_path / "empty").mkdir()
    one_line(run(*tune, "--root", "empty", folder=tmp_path), "empty/train/images", "no such file", "--root")
    for script in ("mgu_generate.py", "finetune.py"):
        one_line(run(script, "--ckpt", "moved.pt", folder=tmp_path), "data/toy: no such folder", "--root")
    assert not (tmp_path / "data").exists() and not (tmp_path / "auxiliary").exists() and not list(tmp_path.glob("ft*"))


def test_the_set_of_another_model(aux, small, tmp_path):
    """Refused, unless it is asked for and the classes are the same."""
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, epoch=1), tmp_path / "other.pt")
    tune = ("finetune.py", "--ckpt", "other.pt", "--aux", aux, "--epochs", 1, "--batch-size", 8)
    one_line(run(*tune, folder=tmp_path), "another checkpoint")
    run_ok(*tune, "--any-model", folder=tmp_path)
    settings = torch.load(tmp_path / "ft.pt", weights_only=True)["settings"]
    assert settings["aux"] == common.fingerprint(aux / "manifest.json")
    torch.save(dict(checkpoint, classes=checkpoint["classes"][::-1]), tmp_path / "other.pt")
    one_line(run(*tune, "--any-model", "--restart", folder=tmp_path), "another checkpoint")


def test_an_augmented_set(small, tmp_path):
    """mgu_generate.py --augment: X is an item of pretraining's, the first with enough pixels of the class; the clean
    images and the controls start from it; a set of other settings is not continued."""
    make = ("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 2, "--max-steps", 2)
    run_ok(*make, "--augment", "--seed", 3, folder=tmp_path, before=NO_FIGURES)
    done = run(*make, "--seed", 3, folder=tmp_path, before=NO_FIGURES)
    assert done.code == 1 and "made with augment [[32, 48], [1, 1]]" in done.err, done.err
    scenes = pretrain.TrainingScenes("toy", small / "toy", "train", None, (32, 48), (1, 1), 3)
    data = AuxiliarySet(tmp_path / "auxiliary", small / "toy", 3, "flipped", "aux", clean=True)
    indices, tries = {Path(scenes.name(i)): i for i in range(len(scenes))}, []
    for k in range(len(data) // 2):
        sample, X = common.load_sample(data.name(k)), data[0, len(data) // 2 + k]["image"]
        i, y = indices[small / "toy" / str(sample["source"])], sample["y"]
        enough = [t for t in range(10) if (scenes[t, i]["label"] == y).sum() >= 64]
        expected = scenes[enough[0] if enough else 9, i]
        assert torch.equal(X, expected["image"]) and np.array_equal(sample["label"], expected["label"])
        assert (sample["image"] == sample["original"])[sample["label"] != y].all()
        tries.append(enough[:1])
    assert [0] in tries and tries != [[0]] * len(tries)
    run_ok("finetune.py", "--ckpt", small / "pretrained.pt", "--epochs", 1, "--batch-size", 8, "--images", "sign",
           folder=tmp_path)


def test_flags_that_exclude_each_other(tmp_path):
    for more in (("--images", "noise"), ("--mix", "train"), ("--unknown", "all")):
        done = run("finetune.py", "--known-unknown", "car", *more, folder=tmp_path)
        assert done.code == 2 and "no effect with known-unknown" in done.err and "usage:" in done.err


@pytest.mark.parametrize("flags", (
    ("--images", "clean", "--unknown", "all"), ("--images", "clean", "--mix", "train", "--alpha", "0.1"),
    ("--images", "clean", "--loss", "er"), ("--alpha", "0", "--loss", "er"),
    ("--negatives", "paste", "--paste-control", "inlier", "--pure", "0.5"),
    ("--negatives", "paste", "--patches", ".", "--paste-control", "off", "--alpha", "1")))
def test_flags_without_effect_are_refused(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
    with pytest.raises(SystemExit) as end:
        finetune.parse()
    assert end.value.code == 2
    assert f"argument {flags[-2]}: has no effect with --" in capsys.readouterr().err


# ───────────────────────────── what a stage has from the checkpoint it starts from ─────────────────────────────

def test_other_classes_are_refused(aux, small, tmp_path):
    """Of a dataset.json whose names were reordered, or of another --root: a label is a place in the list of classes."""
    f, checkpoint = common.load_checkpoint(small / "pretrained.pt")
    root, other = str(small / "toy"), dict(checkpoint, classes=checkpoint["classes"][::-1])
    args = SimpleNamespace(seed=0, known_unknown=["car"], train_root=None)
    for make in (lambda c: pretrain.training_scenes(args, c, root), lambda c: common.scenes_of(c, root, "val"),
                 lambda c: finetune.known_unknown_data(args, c, root)):
        make(checkpoint)
        with pytest.raises(common.InputError, match="toy: has the classes background, .* in its order: traffic sign, "):
            make(other)
    torch.save(other, tmp_path / "other.pt")
    for script, *more in (("mgu_generate.py",), ("finetune.py", "--prototypes", 1)):
        one_line(run(script, "--ckpt", "other.pt", *more, folder=tmp_path), "toy: has the classes")
    shutil.copytree(aux, tmp_path / "aux")
    manifest = tmp_path / "aux/manifest.json"
    common.save_json(manifest, dict(common.load_json(manifest), classes=other["classes"]))
    tune = ("finetune.py", "--ckpt", small / "pretrained.pt", "--epochs", 1)
    one_line(run(*tune, "--aux", "aux", folder=tmp_path), "aux/manifest.json", "other classes")
    one_line(run(*tune, "--aux", "nowhere", folder=tmp_path), "nowhere/manifest.json: no such file", "mgu_generate.py")
    assert not list(tmp_path.glob("ft*"))


def test_the_checkpoint_a_run_starts_from_stays(small, tmp_path):
    """Under --restart too: it would be gone before the first step."""
    shutil.copy(small / "pretrained.pt", tmp_path)
    before = (tmp_path / "pretrained.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to("pretrained.pt")
    for out in ("pretrained.pt", "link.pt"):
        one_line(run("finetune.py", "--known-unknown", "car", "--out", out, "--restart", folder=tmp_path),
                 f"{out}: --out is --ckpt")
    assert (tmp_path / "pretrained.pt").read_bytes() == before


def test_what_is_handed_on(small):
    """Crop, scale and weights of pretraining, over any number of stages, and the pilot study's classes."""
    f, checkpoint = common.load_checkpoint(small / "pretrained.pt")
    usual = pretrain.pretrained_with(checkpoint)
    assert tuple(usual["crop"]) == (32, 48) and usual["weights"] == "none"
    facts = finetune.facts_of(f, "finetune", dict(checkpoint, known_unknown=["car"]), "elsewhere")
    later = dict(facts, settings=dict(lr=1))
    assert pretrain.pretrained_with(later) == usual and later["known_unknown"] == ["car"]
    assert finetune.facts_of(f, "prototypes", later, "x")["pretrained"] == usual
    assert finetune.facts_of(f, "prototypes", later, "x")["known_unknown"] == ["car"]
    old = {k: v for k, v in later.items() if k != "pretrained"}                  # of before it was handed on
    assert tuple(pretrain.pretrained_with(old)["crop"]) == common.RECIPES["toy"]["pretrain"]["crop"]


# ─────────────────────────────────────────────── a whole run ───────────────────────────────────────────────

@pytest.mark.parametrize("images, unknown, mix, loss", (
    ("aux", "flipped", "none", "er"), ("sign", "all", "train", "kl"), ("noise", "flipped", "clean", "kl"),
    ("still", "flipped", "none", "kl")))
def test_the_flags_reach_the_loss(aux, small, tmp_path, images, unknown, mix, loss):
    """The first loss, with batch norm frozen and no dropout, against Eq. 5 in float64 over the batch that the flags
    describe; the paper's batch is read from the files here."""
    run_ok("finetune.py", "--ckpt", small / "pretrained.pt", "--aux", aux, "--epochs", 1, "--batch-size", 8, "--bn",
           "frozen", "--alpha", 0.2, "--images", images, "--unknown", unknown, "--mix", mix, "--seed", 5, "--loss",
           loss, folder=tmp_path, before=NO_FIGURES)
    first = json.loads((tmp_path / "ft.jsonl").read_text().splitlines()[0])
    f, checkpoint = common.load_checkpoint(small / "pretrained.pt")
    root = small / "toy"
    size = np.array(Image.open(next(root.rglob("*.png")))).shape[:2]
    train = pretrain.TrainingScenes("toy", root, "train", None, size, checkpoint["settings"]["scale"], 5)
    data = AuxiliarySet(aux, root, 5, unknown, images, clean=mix == "clean", train=train if mix == "train" else None)
    keys = next(pretrain.epoch_batches(len(data), 8, 5, 0, 0, 1))
    batch = [data[key] for key in keys]
    if images == "aux":
        for item, (_, i) in zip(batch, keys):
            with np.load(sorted(aux.glob("*.npz"))[i]) as file:
                item |= dict(image=torch.tensor(file["image"]).permute(2, 0, 1), label=torch.tensor(file["label"]),
                             unknown=torch.tensor(file["unknown"]))
    if mix != "none":
        assert any(i >= len(data) // 2 for _, i in keys) and any(i < len(data) // 2 for _, i in keys)
    with torch.no_grad():
        z = f.double()(torch.stack([item["image"] for item in batch]).double() / 255)
    log_S = z.log_softmax(1)
    Z, D_s = (torch.stack([item[k] for item in batch]) for k in ("label", "unknown"))
    known = (Z < 12) & ~D_s
    loss_k = -log_S.gather(1, Z.clamp(max=11).long()[:, None])[:, 0][known].mean()            # L_k
    if loss == "kl":
        loss_s = -(log_S + np.log(12)).mean(1)[D_s].mean()                                      # Eq. 4
    else:
        H, H_max = -(log_S.exp() * log_S).sum(1)[D_s], np.log(12)
        loss_s = ((1.01 * H_max) / (H + 0.01 * H_max) - 1).mean()                               # Eq. 6
    assert D_s.sum() > 50 and first["loss"] == pytest.approx(float(loss_k + 0.2 * loss_s), rel=2e-3)
    settings = torch.load(tmp_path / "ft.pt", weights_only=True)["settings"]
    assert [settings[k] for k in ("images", "unknown", "mix")] == [images, unknown, mix]
    assert (settings["train"] is not None) == (mix == "train")


def test_a_set_without_unknown_pixels_is_refused(aux, small, tmp_path):
    """It would be L_k alone under the name of MGU + AaFt; where D_s is not asked for, or is I_ỹ, nothing is amiss."""
    shutil.copytree(aux, tmp_path / "aux")
    manifest = common.load_json(tmp_path / "aux/manifest.json")
    found = sum(int(common.load_sample(tmp_path / "aux" / name)["unknown"].sum()) for name in manifest["samples"])
    assert manifest["unknown_pixels"] == found > 0
    common.save_json(tmp_path / "aux/manifest.json", dict(manifest, unknown_pixels=0))
    tune = ("finetune.py", "--ckpt", small / "pretrained.pt", "--aux", "aux", "--epochs", 1)
    one_line(run(*tune, folder=tmp_path), "aux/manifest.json: no sample has a pixel in D_s", "--max-steps")
    for more in (("--images", "clean"), ("--unknown", "all")):
        run_ok(*tune, *more, "--out", f"{more[1]}.pt", folder=tmp_path, before=NO_FIGURES)
