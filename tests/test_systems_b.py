"""Dense kNN, PAnS, PGAN, DiCNet and TRADI, each against an independent computation, and through the scripts."""
import argparse
import copy
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import nn

import common
import evaluate
import finetune
import pretrain
from runner import run, run_ok, run_ranks, without_figures

run, run_ok, run_ranks = without_figures(run, run_ok, run_ranks)
CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmenter(arch="fpn", classifier="linear", N=5):
    torch.manual_seed(0)
    return common.Segmenter(arch, "mobilenet_v3_large", N, 16, classifier).eval().requires_grad_(False)


def embedded(f, E):
    """f whose embedding is E (B, C, h, w), whatever the image."""
    f.embed = lambda X: E
    return f


# ──────────────────────────────────────────────── dense kNN ────────────────────────────────────────────────

def sklearn_distance(queries, references, k):
    """Mean distance to the k nearest, in float64."""
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(references.double().numpy())
    return search.kneighbors(queries.double().numpy())[0].mean(1)


@pytest.mark.parametrize("k, chunk", [(1, 7), (3, 1024), (5, 1)])
def test_distances_are_those_of_scikit_learn(k, chunk):
    queries, references = 5 + noise(50, 12), 5 + 2 * noise(200, 12, seed=1)     # far from 0, where |a|² + |b|² cancels
    found = evaluate.knn_distance(queries, references, k, chunk)
    assert np.allclose(found, sklearn_distance(queries, references, k), rtol=1e-6)
    double = evaluate.knn_distance(queries.double(), references.double(), k, chunk)
    assert np.allclose(double, sklearn_distance(queries, references, k), rtol=1e-12)


def test_a_reference_is_at_distance_zero_of_itself():
    references = 100 + noise(60, 8)      # cdist alone says up to 0.01 here
    assert (evaluate.knn_distance(references, references, k=1) == 0).all()


def test_leaving_a_vector_out_of_its_own_neighbours():
    vectors = noise(40, 6).double()
    found = evaluate.knn_distance(vectors, vectors, k=3, chunk=16, skip=1)
    for i, v in enumerate(vectors):
        others = torch.cat([vectors[:i], vectors[i + 1:]])
        assert found[i] == pytest.approx(float((others - v).norm(dim=1).sort().values[:3].mean()), rel=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (27, 48), (7, 5)])
def test_labels_at_the_centres_of_cells(size):
    Z = torch.randint(0, 256, (27, 48), dtype=torch.uint8)
    (H, W), (h, w) = Z.shape, size
    expected = [[int(Z[math.floor((i + 0.5) * H / h), math.floor((j + 0.5) * W / w)]) for j in range(w)]
                for i in range(h)]
    assert common.labels_at(Z, size).tolist() == expected


class Scenes:
    """Training images of which the upper half has no class."""
    root = "somewhere"

    def __len__(self):
        return 4

    def __getitem__(self, i):
        label = torch.full((24, 32), 2, dtype=torch.uint8)
        label[:12] = common.IGNORED
        return dict(image=torch.full((3, 24, 32), 50 * i, dtype=torch.uint8), label=label, index=i)


class Reader:
    """Its embedding at stride 4 is the image's grey and the position of the cell; its logits are flat: (grey, 0)."""
    num_classes, origin = 5, ("f.pt", {})

    def outputs(self, X):
        h, w = (n // 4 for n in X.shape[-2:])
        grey = X[:, :1, ::4, ::4]
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return dict(embedding=torch.cat([grey, y.expand(len(X), 1, h, w), x.expand(len(X), 1, h, w)], 1),
                    logits=torch.cat([X[:, :1], torch.zeros_like(X[:, :1])], 1))


def options(**given):
    return argparse.Namespace(**{**dict(train_root=None, knn_k=2, knn_images=3, knn_vectors=30, knn_chunk=10,
                                        knn_layer="embedding", seed=5, student=None), **given})


def test_references_are_labelled_cells_of_training_images(monkeypatch):
    monkeypatch.setattr(evaluate, "own_split", lambda c, root, split: Scenes())
    found = evaluate.knn_references(Reader(), None, 3, 30, 2, 10, 5, CPU)
    vectors = found["vectors"]
    greys = sorted({round(255 * float(v)) for v in vectors[:, 0]})
    assert len(greys) == 3 and set(greys) <= {0, 50, 100, 150}
    assert len({tuple(v.tolist()) for v in vectors}) == 30                  # 10 different cells of each of 3 images
    assert [(vectors[:, 0] * 255).round().tolist().count(g) for g in greys] == [10, 10, 10]
    assert (vectors[:, 1] >= 3).all(), "a reference lies where the image has no class"
    # −log(e^grey + 1) over all pixels, those without a class too
    expected = [-math.log(math.exp(g / 255) + 1) for g in (greys[-1], greys[0])]
    assert found["energy"] == pytest.approx(expected)
    assert found["farthest"] == pytest.approx(max(sklearn_distance(vectors[[i]], torch.cat(
        [vectors[:i], vectors[i + 1:]]), 2)[0] for i in range(30)))
    again = evaluate.knn_references(Reader(), None, 3, 30, 2, 10, 5, CPU)["vectors"]
    other = evaluate.knn_references(Reader(), None, 3, 30, 2, 10, 6, CPU)["vectors"]
    assert vectors.equal(again) and not vectors.equal(other)
    with pytest.raises(common.InputError, match="too few for 50 neighbours"):
        evaluate.knn_references(Reader(), None, 3, 30, 50, 10, 5, CPU)


def test_knn_of_a_layer_of_the_backbone(monkeypatch):
    monkeypatch.setattr(evaluate, "own_split", lambda c, root, split: Scenes())
    f = common.Segmenter("fpn", "mobilenet_v2", 5, width=8).eval().requires_grad_(False)
    f.origin, given = ("f.pt", {}), options(knn_layer="8", knn_images=4, knn_vectors=32)
    seen_by_layer = []
    f.backbone["6"].register_forward_hook(lambda module, inputs, out: seen_by_layer.append(out))     # stride 8
    X = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(3))
    score = evaluate.prepare_scores([f], ["knn"], given, CPU)["knn"]
    cells = [E[0].flatten(1).T[4:] for E in seen_by_layer[::2]]       # of (3, 4) those whose centre has a class
    assert len(cells) == 4 and len(seen_by_layer) == 8
    vectors = torch.cat(cells)
    seen_by_layer.clear()
    f(X)
    d = torch.from_numpy(sklearn_distance(seen_by_layer[0][0].flatten(1).T, vectors, 2)).view(1, 1, 6, 8)
    expected = F.interpolate(d, (48, 64), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(score(X, evaluate.forward([f], X), 0).double(), expected, rtol=1e-3)
    for arch, layer in (("deeplabv3", "16"), ("pspnet", "4")):
        other = common.Segmenter(arch, "mobilenet_v2", 5)
        other.origin = "other.pt", {}
        with pytest.raises(common.InputError, match=f"other.pt: --knn-layer {layer}: {arch} has no map"):
            evaluate.prepare_scores([other], ["knn"], options(knn_layer=layer), CPU)


def test_maps_of_knn_and_cknn_by_hand(monkeypatch):
    monkeypatch.setattr(evaluate, "own_split", lambda c, root, split: Scenes())
    f = Reader()
    r = evaluate.knn_references(f, None, 3, 30, 2, 10, 5, CPU)
    X = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(3))
    seen = evaluate.forward([f], X)
    scores = {name: score(X, seen, 0) for name, score in
              evaluate.prepare_scores([f], ["cknn", "knn"], options(), CPU).items()}
    queries = seen["each"][0]["embedding"][0].flatten(1).T
    d = torch.from_numpy(sklearn_distance(queries, r["vectors"], 2)).view(1, 1, 6, 8)
    d = F.interpolate(d, (24, 32), mode="bilinear", align_corners=False)[:, 0]
    energy = -torch.log(X[:, 0].double().exp() + 1)
    low, high = r["energy"]
    assert torch.allclose(scores["knn"].double(), d, atol=1e-5)
    assert torch.allclose(scores["cknn"].double(), (energy - low) / (high - low) + d / r["farthest"], atol=1e-5)

    asked = []
    monkeypatch.setattr(evaluate, "own_split", lambda c, root, split: asked.append(root) or Scenes())
    evaluate.prepare_scores([Reader()], ["knn"], options(train_root="moved"), CPU)
    assert asked == ["moved"]
    few = evaluate.knn_references(Reader(), None, 3, 2, 1, 10, 5, CPU)["vectors"]
    assert len(few) == 2, "never more than are asked for, of as many images"

    # Of an ensemble: the mean over its members, of whom each has its own references
    g = Reader()
    g.outputs = lambda X: dict(embedding=2 * f.outputs(X)["embedding"], logits=f.outputs(X)["logits"])
    seen = evaluate.forward([f, g], X)
    both = evaluate.prepare_scores([f, g], ["knn", "cknn"], options(), CPU)
    assert torch.allclose(both["knn"](X, seen, 0).double(), 1.5 * d, atol=1e-5)
    assert torch.allclose(both["cknn"](X, seen, 0), scores["cknn"], atol=1e-5)


# ─────────────────────────────────────────────────── PAnS ───────────────────────────────────────────────────

def test_cosine_logits_in_float64():
    layer, x = common.CosineClassifier(16, 5), noise(2, 16, 3, 4)
    w = layer.weight.detach()[:, :, 0, 0].double()
    xs = x.double()
    expected = 10 * torch.einsum("bchw,nc->bnhw", xs, w) / (xs.norm(dim=1)[:, None] * w.norm(dim=1).view(1, -1, 1, 1))
    z = layer(x)
    assert torch.allclose(z.double(), expected, atol=1e-5) and z.abs().max() <= 10 + 1e-5
    assert torch.allclose(layer(7.3 * x), z, atol=1e-5)                   # neither length matters
    layer.weight.data *= 7.3
    assert torch.allclose(layer(x), z, atol=1e-5)
    assert (layer(torch.zeros(1, 16, 1, 1)) == 0).all()                   # and none is fine
    layer(torch.zeros(1, 16, 1, 1)).sum().backward()
    assert layer.weight.grad.isfinite().all() and layer.bias is None


def test_cosine_score():
    X = torch.zeros(1, 3, 24, 32)
    f = embedded(segmenter(classifier="cosine"), noise(1, 16, 24, 32))    # as large as X: nothing is upsampled
    score = evaluate.prepare_scores([f], ["cosine"], None, CPU)["cosine"]
    seen = evaluate.forward([f], X)
    full = score(X, seen, 0)
    assert full.shape == (1, 24, 32) and full.min() >= 0 and full.max() <= 1
    assert torch.allclose(full, (1 + evaluate.score_maxlogit(seen["logits"]) / 10) / 2, atol=1e-6)
    assert full.flatten().argsort().equal(evaluate.score_maxlogit(seen["logits"]).flatten().argsort())

    # At stride 4 the maximum is taken first, as published: it is at least the maximum of upsampled logits
    embedded(f, noise(1, 16, 6, 8))
    seen = evaluate.forward([f], X)
    coarse, after = score(X, seen, 0), (1 + evaluate.score_maxlogit(seen["logits"]) / 10) / 2
    assert (coarse <= after + 1e-6).all() and (coarse < after - 1e-3).any()
    z = f.classifier(f.activation(f.embed(X))).max(1, keepdim=True).values
    expected = F.interpolate((1 - z / 10) / 2, (24, 32), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(coarse, expected, atol=1e-6)

    g = embedded(segmenter(classifier="cosine"), noise(1, 16, 6, 8, seed=3))         # an ensemble: the mean of the maps
    pair, seen = evaluate.prepare_scores([f, g], ["cosine"], None, CPU)["cosine"], evaluate.forward([f, g], X)
    other = evaluate.prepare_scores([g], ["cosine"], None, CPU)["cosine"](X, evaluate.forward([g], X), 0)
    assert torch.allclose(pair(X, seen, 0), (coarse + other) / 2, atol=1e-6) and not torch.allclose(coarse, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert f.classifier(noise(1, 16, 6, 8)).dtype == torch.float32


def test_a_cosine_checkpoint_comes_back(tmp_path):
    f = segmenter(classifier="cosine")
    facts = dict(classes=[*"abcde"], data="toy", root="", anomaly=None, settings={}, epoch=0, step=0)
    common.save_checkpoint(tmp_path / "c.pt", dict(common.model_facts(f), model=f.state_dict(), **facts))
    g, _ = common.load_checkpoint(tmp_path / "c.pt")
    X = torch.rand(1, 3, 33, 47)
    assert isinstance(g.classifier, common.CosineClassifier) and g(X).abs().max() <= 10.001
    assert torch.allclose(g(X), f(X), atol=1e-4)
    f = segmenter()                                                       # an older file, without the fact
    older = {k: v for k, v in common.model_facts(f).items() if k not in ("classifier", "outlier")}
    common.save_checkpoint(tmp_path / "l.pt", dict(older, model=f.state_dict(), **facts))
    g, checkpoint = common.load_checkpoint(tmp_path / "l.pt")
    assert type(g.classifier) is nn.Conv2d and torch.allclose(g(X), f(X), atol=1e-4)
    g.origin = "l.pt", checkpoint
    with pytest.raises(common.InputError, match="l.pt: --score cosine expects"):
        evaluate.make_cosine("cosine", [g], None, CPU)


# ─────────────────────────────────────────────────── PGAN ───────────────────────────────────────────────────

CLASSES = tuple("abcdefghijkl")


def labelled(h, w, N, seed):
    """Embedding (1, 16, h, w) and a label at 4 times the size whose cells are constant, some without a class."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, N + 1, (h, w))
    cells[cells == N] = common.IGNORED
    return noise(1, 16, h, w, seed=seed), torch.from_numpy(cells.repeat(4, 0).repeat(4, 1).astype(np.uint8)), cells


def reading(f, maps):
    """f whose embedding of a grey image is maps[grey]."""
    f.embed = lambda X: maps[round(255 * float(X[0, 0, 0, 0]))]
    return f


def test_prototypes_are_masked_means():
    f, N = segmenter(), 5
    made = [labelled(6, 8, N, seed) for seed in (0, 1, 2)]
    reading(f, [E for E, _, _ in made])
    items = [dict(image=torch.full((3, 24, 32), i, dtype=torch.uint8), label=Z) for i, (_, Z, _) in enumerate(made)]
    found = finetune.class_prototypes(f, items, CPU, CLASSES)
    for c in range(N):
        vectors = [E[0, :, y, x].clamp(min=0).double().numpy() for E, _, cells in made
                   for y, x in np.argwhere(cells == c)]
        mean = np.mean([v / np.linalg.norm(v) for v in vectors], 0)
        assert np.allclose(found[c], mean / np.linalg.norm(mean), atol=1e-6)
    assert torch.allclose(finetune.class_prototypes(f, items[::-1], CPU, CLASSES), found, atol=1e-7)   # in any order
    for item in items:
        item["label"][item["label"] == 3] = common.IGNORED
    with pytest.raises(common.InputError, match="^d: smaller than a cell of the embedding"):
        finetune.class_prototypes(f, items, CPU, CLASSES)


def test_prototypes_alone_tell_orthogonal_classes_apart():
    f, N = segmenter(), 5
    _, Z, cells = labelled(6, 8, N, 0)
    E = torch.zeros(1, 16, 6, 8)
    for y, x in np.ndindex(6, 8):
        E[0, min(cells[y, x], N), y, x] = 1 + y                            # a direction for each class, any length
    item = dict(image=torch.zeros(3, 24, 32, dtype=torch.uint8), label=Z)
    weight = finetune.class_prototypes(embedded(f, E), [item], CPU, CLASSES)
    layer = common.CosineClassifier(16, N)
    layer.weight.data.copy_(weight[:, :, None, None])
    predicted = layer(f.activation(E)).argmax(1)[0].numpy()
    assert (predicted == cells)[cells < N].all()


def test_prototypes_script(small):
    done = run_ok("finetune.py", "--prototypes", 2, "--epochs", 2, "--batch-size", 2, "--restart", folder=small)
    f, checkpoint = common.load_checkpoint(small / "prototypes.pt")
    before = torch.load(small / "pretrained.pt", weights_only=True)["model"]
    assert checkpoint["classifier"] == "cosine" and checkpoint["stage"] == "prototypes"
    assert "the 2 with most" in done.out
    same = {k: v.equal(before[k]) for k, v in checkpoint["model"].items() if k in before}
    assert [k for k, ok in same.items() if not ok] == ["classifier.weight"]           # batch norm's averages stay too
    scenes = finetune.chosen_scenes(2, checkpoint, str(small / "toy"))
    start = finetune.class_prototypes(common.load_checkpoint(small / "pretrained.pt")[0],
                                      [scenes[0, i] for i in range(len(scenes))], CPU, CLASSES)
    moved = (f.classifier.weight[:, :, 0, 0] - start).abs().max()
    # Adam moves a weight by at most about lr a step
    assert 1e-3 < moved <= 1.5 * 0.01 * 2 * (len(scenes) // 2)
    run_ok("evaluate.py", "--ckpt", "prototypes.pt", "--score", "cosine", "msp", "--panels", 0, "--out", "r_proto",
           folder=small)
    wrong = run("finetune.py", "--prototypes", 2, "--mix", "clean", folder=small)
    assert wrong.code == 2 and "argument --mix: has no effect with prototypes" in wrong.err


def test_images_of_the_prototypes_have_the_most_pixels(toy_root):
    checkpoint = dict(data="toy", anomaly=None)
    scenes = finetune.chosen_scenes(1, checkpoint, toy_root)
    everything = common.Scenes("toy", toy_root, "train")
    counts = np.stack([np.bincount(everything[i]["label"].flatten(), minlength=256) for i in range(len(everything))])
    best = {everything.name(int(counts[:, c].argmax())) for c in range(len(everything.classes))}
    assert {scenes.name(i) for i in range(len(scenes))} == best and len(best) < len(everything)
    scenes = finetune.chosen_scenes(2, checkpoint, toy_root)
    best = {everything.name(int(i)) for c in range(len(everything.classes))
            for i in np.argsort(-counts[:, c], kind="stable")[:2] if counts[i, c]}
    assert {scenes.name(i) for i in range(len(scenes))} == best


# ────────────────────────────────────────────────── DiCNet ──────────────────────────────────────────────────

@pytest.mark.parametrize("arch", common.ARCHS)
def test_the_students_map_lacks_the_last_batch_norm_alone(arch):
    f = segmenter(arch)
    norm = [m for m in f.head.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    norm.running_mean.copy_(noise(len(norm.bias)))
    norm.running_var += 1
    X = torch.rand(1, 3, 32, 32)
    normed = f.embed(X)
    assert torch.allclose(norm(common.bare(f).embed(X)), normed, atol=1e-5)


def test_a_student_with_the_teachers_weights_scores_zero(tmp_path, monkeypatch):
    teacher = segmenter()
    norm = teacher.head.fuse[-1]
    norm.running_mean.copy_(noise(len(norm.bias)))
    norm.bias.data.copy_(norm.running_mean)                                # γ = √(σ² + ε), β = mean: the identity
    norm.weight.data.copy_((norm.running_var + norm.eps).sqrt())
    facts = dict(classes=[*"abcde"], data="toy", root="", anomaly=None, settings={}, epoch=0, step=0)
    common.save_checkpoint(tmp_path / "t.pt", dict(common.model_facts(teacher), model=teacher.state_dict(), **facts))
    student = common.bare(copy.deepcopy(teacher))
    mark = dict(stage="distill", companion_of=common.fingerprint(tmp_path / "t.pt"))
    common.save_checkpoint(tmp_path / "s.pt", dict(common.model_facts(student), model=student.state_dict(), **facts,
                                                   **mark))
    f, checkpoint = common.load_checkpoint(tmp_path / "t.pt")
    f.origin = str(tmp_path / "t.pt"), checkpoint
    score = evaluate.make_dicnet("dicnet", [f], options(student=str(tmp_path / "s.pt")), CPU)
    X = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        exact = score(X, evaluate.forward([f], X), 0)
        norm.bias.data += 0.5                                              # an offset of every channel: 0.5² everywhere
        f.load_state_dict(teacher.state_dict())
        offset = score(X, evaluate.forward([f], X), 0)
        small = F.avg_pool2d(student.embed(X), 2)                           # a student of a coarser map
        stub = types.SimpleNamespace(embed=lambda X: small, to=lambda d: stub, requires_grad_=lambda flag: stub)
        load = common.load_checkpoint
        monkeypatch.setattr(common, "load_checkpoint", lambda path, companion=None: (stub, load(path, companion)[1]))
        coarser = evaluate.make_dicnet("dicnet", [f], options(student=str(tmp_path / "s.pt")), CPU)
        monkeypatch.setattr(common, "load_checkpoint", load)
        seen = evaluate.forward([f], X)
        d = (seen["each"][0]["embedding"] - F.interpolate(small, (12, 16), mode="bilinear", align_corners=False))**2
        expected = F.interpolate(d.mean(1, keepdim=True), (48, 64), mode="bilinear", align_corners=False)[:, 0]
        assert torch.allclose(coarser(X, seen, 0), expected, atol=1e-6)
    assert exact.shape == (1, 48, 64) and exact.abs().max() < 1e-8
    assert torch.allclose(offset, torch.tensor(0.25), atol=1e-4)
    with pytest.raises(common.InputError, match="distill of another checkpoint, no segmenter"):
        common.load_checkpoint(tmp_path / "s.pt")
    with pytest.raises(common.InputError, match="t.pt: a checkpoint of .*; expected one of finetune.py --distill"):
        common.load_checkpoint(tmp_path / "t.pt", companion="distill")


@pytest.mark.parametrize("stride", [1, 2])
def test_distillation_is_the_mean_square_and_its_parts_add_up(stride):
    image = torch.randint(0, 256, (5, 3, 24, 32), dtype=torch.uint8)
    T, S = (lambda X: X[:, :, ::4, ::4] * 3), (lambda X: X[:, :, ::4 * stride, ::4 * stride].flip(1))
    teacher = argparse.Namespace(embed=T)
    loss = lambda *parts: sum(float(finetune.distillation(teacher, lambda X: dict(embedding=S(X)),
                                                          dict(image=image[p]), [5])) for p in parts)
    X = image.double() / 255
    student = F.interpolate(S(X), (6, 8), mode="bilinear", align_corners=False)
    expected = float(((student - T(X))**2).mean())
    assert loss(slice(0, 5)) == pytest.approx(expected, rel=1e-6)
    assert loss(slice(0, 2), slice(2, 5)) == pytest.approx(expected, rel=1e-6)


def test_distillation_script(small):
    before = common.fingerprint(small / "pretrained.pt")
    flags = "--distill", "--epochs", 2, "--batch-size", 2, "--restart"
    run_ok("finetune.py", *flags, folder=small)
    student, checkpoint = common.load_checkpoint(small / "student.pt", companion="distill")
    assert checkpoint["companion_of"] == before == common.fingerprint(small / "pretrained.pt")
    assert not any(k.startswith("head.fuse.1") for k in checkpoint["model"])           # a bare convolution at the end
    loss = [json.loads(line)["loss"] for line in (small / "student.jsonl").read_text().splitlines()]
    assert loss[-1] < loss[0]
    assert "is complete" in run_ok("finetune.py", *flags[:-1], folder=small).out        # it is resumed as others are
    done = run("finetune.py", "--distill", "--student-weights", "nowhere.pth", "--out", "weights.pt", folder=small)
    assert done.code == 1 and "nowhere.pth" in done.err and done.err.count("\n") == 1, done.err

    score = "--score", "dicnet", "--student", "student.pt", "--panels", 0, "--out", "r_dicnet"
    run_ok("evaluate.py", "--ckpt", "pretrained.pt", *score, folder=small)
    protocol = json.loads((small / "r_dicnet/results.json").read_text())["protocol"]
    assert protocol["student"] == common.fingerprint(small / "student.pt")

    other = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(other, epoch=1), small / "other.pt")
    done = run("evaluate.py", "--ckpt", "other.pt", *score, folder=small)
    assert done.code == 1 and "made for another checkpoint" in done.err and done.err.count("\n") == 1, done.err
    assert run("evaluate.py", "--ckpt", "pretrained.pt", "--score", "dicnet", folder=small).code == 2

    machines = [small / "machine0", small / "machine1"]
    for k, folder in enumerate(machines):
        folder.mkdir()
        shutil.copy(small / "pretrained.pt", folder)
        torch.save(dict(torch.load(small / "student.pt", weights_only=True), step=k), folder / "student.pt")
    run_ranks("evaluate.py", "--ckpt", "pretrained.pt", *score, folder=None, folders=machines, code=1)
    for k, folder in enumerate(machines):
        assert "student.pt: not the same file on every machine" in (folder / f"stderr{k}").read_text()


def test_the_teacher_stays_as_it_is(small, tmp_path, monkeypatch):
    """While the student learns: no statistics of the batch, no averages that move, no gradient."""
    monkeypatch.chdir(tmp_path)
    f, checkpoint = common.load_checkpoint(small / "pretrained.pt")
    args = argparse.Namespace(ckpt=str(small / "pretrained.pt"), student_backbone="mobilenet_v3_large", seed=0, lr=1e-3,
                              student_weights=None, epochs=1, batch_size=2, schedule="constant", bn="train",
                              restart=False, out="student.pt")
    before, losses = {k: v.clone() for k, v in f.state_dict().items()}, []

    def train(student, scenes, *args, objective=None, **more):
        part = {k: v[None] for k, v in scenes[0, 0].items() if k == "image"}
        losses.append(objective(student.train().outputs, part, [1]))
        losses[0].backward()
    monkeypatch.setattr(pretrain, "train", train)
    finetune.distill(args, f, checkpoint, str(small / "toy"), CPU)
    assert losses[0] > 0 and not f.training and not any(p.requires_grad for p in f.parameters())
    assert all(v.equal(before[k]) for k, v in f.state_dict().items())


def test_layers_agree_with_the_score(small, tmp_path):
    script, out = "tests/results/layers.py", tmp_path / "layers.json"
    shared = "--data", "toy", "--root", small / "toy"
    run_ok(script, small / "pretrained.pt", *shared, "--images", 3, "--vectors", 60, "--out", out, folder=tmp_path)
    rows = {(r["layer"], r["upsampling"]): r["aupr"] for r in json.loads(out.read_text())["rows"]}
    assert len(rows) == 12
    for layer, flag in (("embedding", "embedding"), ("backbone, stride 8", 8)):
        run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", *shared, "--score", "knn", "--knn-layer", flag,
               "--knn-images", 3, "--knn-vectors", 60, "--panels", 0, folder=tmp_path)
        found = json.loads((tmp_path / "results/results.json").read_text())
        for group in ("pooled", "per_image"):
            assert rows[layer, "bilinear"][group] == pytest.approx(found[group]["aupr"], abs=2e-3)
    assert len({r["pooled"] for r in rows.values()}) > 6                   # the layers differ
    done = run(script, tmp_path / "none.pt", *shared, "--out", tmp_path / "no.json", folder=tmp_path)
    assert done.code == 1 and "none.pt" in done.err and done.err.count("\n") == 1, done.err


def test_alarms_agree_with_the_operating_point(small, tmp_path):
    script, out, toy = "tests/results/alarms.py", tmp_path / "alarms.json", small / "toy"
    run_ok(script, small / "pretrained.pt", "--data", "toy", "--root", toy, "--size", 54, 96, "--out", out,
           folder=tmp_path)
    row, = json.loads(out.read_text())["rows"]
    run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--root", toy, "--operating-point", 0.95, "--unlabeled",
           "other", "--panels", 0, folder=tmp_path)
    found = json.loads((tmp_path / "results/results.json").read_text())["rows"][0]["operating_point"]
    assert (row["trained_on"], row["row"], row["data"]) == ("toy", "msp", "toy")
    assert row["known"] == pytest.approx(found["fpr"], abs=0.02)
    assert row["anomalous"] == pytest.approx(found["recall"], abs=0.02) and row["anomalous"] > 0
    shutil.copytree(toy, tmp_path / "mine")          # the same images as a folder: seen at their own size
    for path in (tmp_path / "mine/test/annotations").rglob("*.png"):
        ids = np.array(Image.open(path))
        ids[:9] = 4                                    # without a class: in neither share
        Image.fromarray(ids).save(path)
    (tmp_path / "mine/dataset.json").write_text(json.dumps(common.DATASETS["toy"]))
    run_ok(script, small / "pretrained.pt", "--data", "folder", "--root", tmp_path / "mine", "--size", 32, 48, "--out",
           out, folder=tmp_path)
    run_ok("evaluate.py", "--ckpt", small / "pretrained.pt", "--data", "folder", "--root", tmp_path / "mine",
           "--operating-point", 0.95, "--unlabeled", "other", "--panels", 0, folder=tmp_path)
    found = json.loads((tmp_path / "results/results.json").read_text())["rows"][0]["operating_point"]
    row = json.loads(out.read_text())["rows"][0]
    assert row["data"] == "folder" and row["known"] == pytest.approx(found["fpr"], abs=0.02)
    assert row["anomalous"] == pytest.approx(found["recall"], abs=0.02)
    done = run(script, tmp_path / "none.pt", "--data", "toy", "--root", toy, "--out", tmp_path / "no.json",
               folder=tmp_path)
    assert done.code == 1 and "none.pt" in done.err and done.err.count("\n") == 1, done.err


def test_sides_of_the_boundary(small, tmp_path):
    """f has D_s right on X and wrong on X', by its choice; the share with random signs is counted here once more."""
    shutil.copy(small / "pretrained.pt", tmp_path)
    run_ok("mgu_generate.py", "--ckpt", "pretrained.pt", "--per-class", 1, "--max-steps", 8, "--step-size", 20,
           folder=tmp_path)
    shutil.copytree(tmp_path / "auxiliary", tmp_path / "auxiliary_other")
    run_ok("tests/results/crossed.py", tmp_path, "--out", tmp_path / "crossed.json", folder=tmp_path)
    rows = {r["row"]: r for r in json.loads((tmp_path / "crossed.json").read_text())["rows"]}
    assert [(rows[name]["right"], rows[name]["wrong"]) for name in ("recipe", "still", "other")] == [
        (100, 100), (100, 0), (100, 100)]
    f, checkpoint = common.load_checkpoint(tmp_path / "pretrained.pt")
    seed = checkpoint["settings"]["seed"]
    data = finetune.AuxiliarySet(tmp_path / "auxiliary", small / "toy", seed, "flipped", "sign")
    wrong, sure = [], []
    for i, name in enumerate(data.names):
        item, y = data[0, i], int(np.load(tmp_path / "auxiliary" / name)["y"])
        with torch.no_grad():
            S = torch.softmax(f(item["image"][None].float() / 255).double(), 1)[0][:, item["unknown"]]
        wrong += (S.argmax(0) != y).tolist()
        sure += S.amax(0).tolist()
    assert 0 < np.mean(wrong) < 1 and rows["sign"]["wrong"] == pytest.approx(100 * np.mean(wrong), abs=0.01)
    assert rows["sign"]["max_softmax"] == pytest.approx(np.mean(sure), abs=1e-3)
    done = run("tests/results/crossed.py", tmp_path / "none", folder=tmp_path)
    assert done.code == 1 and "none" in done.err and done.err.count("\n") == 1, done.err


# ─────────────────────────────────────────────────── TRADI ───────────────────────────────────────────────────

def test_the_gains_follow_the_recursion_and_settle():
    tracker, P, found = pretrain.Tradi(nn.Linear(2, 2)), np.zeros(2), []
    Q, R = np.array([1e-4, 5e-5]), 10
    for _ in range(6000):
        P = P + Q
        K = P / (P + R)
        P = (1 - K) * P
        found.append(K)
        tracker.step(0.0)
    assert np.allclose(tracker.P, P, rtol=2e-3)                            # R = 10 belongs to the gains, to 3 digits
    assert np.allclose(found[-1], pretrain.TRADI_GAIN, rtol=2e-3)
    assert tracker.first == pytest.approx(np.prod(1 - np.array(found)[:, 0]), rel=2e-2)
    fast, P = pretrain.Tradi(nn.Linear(2, 2), (0.02, 0.05)), [0.0, 0.0]
    for _ in range(3000):
        fast.step(0.0)
    prior = np.array(fast.P) + Q
    assert np.allclose(prior / (prior + fast.R), (0.02, 0.05), rtol=1e-6)


def test_the_filter_of_plain_sgd_has_a_closed_form():
    """μ_t = w_t, and v_t = Σ_j Π_{i ≥ j} (1 − K_i) (lr g_j)²: what the filter adds to nothing with SGD."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    tracker = pretrain.Tradi(f, (0.1, 0.2))
    assert set(tracker.mean) == {"0.weight", "0.bias", "2.weight", "2.bias"}            # none of batch norm's
    optimiser = torch.optim.SGD(f.parameters(), lr=0.1)
    v, P = {name: 0 for name in tracker.mean}, 0.0
    for t in range(50):
        optimiser.zero_grad()
        f(noise(8, 4, seed=t).double()).square().sum().backward()
        optimiser.param_groups[0]["lr"] = 0.01 / (1 + t)
        optimiser.step()
        tracker.step(optimiser.param_groups[0]["lr"])
        P += 5e-5
        K = P / (P + 5e-5 * 0.8 / 0.04)                                    # R = Q (1 − K) / K² at K = 0.2
        P *= 1 - K
        for name, w in f.named_parameters():
            if name in v:
                v[name] = (1 - K) * (v[name] + (0.01 / (1 + t) * w.grad)**2)
    for name, w in f.named_parameters():
        if name in v:
            assert torch.allclose(tracker.mean[name], w, rtol=0, atol=1e-14)
            assert torch.allclose(tracker.var[name], v[name], rtol=1e-10)
            assert v[name].max() > 0


def test_the_filter_of_other_optimisers_is_the_published_recursion():
    f = nn.Linear(3, 2).double()
    tracker, lr = pretrain.Tradi(f, (0.3, 0.4)), 0.05
    optimiser = torch.optim.Adam(f.parameters(), lr=lr)
    mean, var, P = f.weight.detach().numpy().copy(), np.zeros((2, 3)), np.zeros(2)
    Q, R = np.array([1e-4, 5e-5]), np.array([1e-4 * 0.7 / 0.09, 5e-5 * 0.6 / 0.16])
    for t in range(20):
        optimiser.zero_grad()
        f(noise(8, 3, seed=t).double()).square().sum().backward()
        optimiser.step()
        tracker.step(optimiser.param_groups[0]["lr"])
        w, g = f.weight.detach().numpy(), f.weight.grad.numpy()
        P = P + Q
        K = P / (P + R)
        P = (1 - K) * P
        mean = (1 - K[0]) * (mean - lr * g) + K[0] * w
        var = (1 - K[1]) * (var + (lr * g)**2) + K[1] * (w - mean)**2
    assert np.allclose(tracker.mean["weight"], mean, rtol=1e-12) and np.allclose(tracker.var["weight"], var, rtol=1e-10)


def test_samples_have_the_covariance_of_the_kernel():
    """Cov(w̃_i, w̃_j) = √(v_i v_j) exp(−(μ_i − μ_j)²/2); equal weights move together, which one phase each forbids."""
    mean, var = torch.tensor([0.0, 0.0, 0.3, 1.0, 3.0]), torch.tensor([1.0, 1.0, 0.5, 2.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([evaluate.sample_tensor(mean, var, generator) for _ in range(8000)]).double()
    gap = mean[:, None] - mean
    expected = (var[:, None] * var).sqrt() * torch.exp(-gap**2 / 2)
    found = (draws - mean).T @ (draws - mean) / len(draws)
    scale = (var[:4, None] * var[:4]).sqrt()
    assert ((found - expected)[:4, :4].abs() / scale < 0.05).all()      # three standard errors
    assert torch.corrcoef(draws[:, :2].T)[0, 1] > 0.9999 and (draws[:, 4] == 3).all()
    assert evaluate.sample_tensor(mean, 0 * var, generator).equal(mean)    # no variance: the mean, bit for bit


def test_batch_norm_is_estimated_from_the_images():
    f = segmenter("pspnet")
    scenes = [dict(image=torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)) for _ in range(12)]
    norms = [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:                                                        # as after a training
        m.num_batches_tracked += 50
        m.running_mean += 3
    seen = []
    hook = norms[0].register_forward_pre_hook(lambda m, x: seen.append(x[0].double()))
    evaluate.estimate_batch_norm([f], scenes, np.arange(12), CPU, batch=6)
    hook.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    assert len(seen) == 2 and all(len(x) == 6 for x in seen)
    assert torch.allclose(norms[0].running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(norms[0].running_var.double(), var, rtol=1e-4)
    assert not any(m.training for m in norms)


TRADI = ("pretrain.py", "--root", "toy", "--batch-size", 2, "--crop", 32, 48, "--lr", 1e-3, "--classifier", "cosine",
         "--schedule", "constant", "--tradi", 0.3, 0.2)


@pytest.fixture(scope="module")
def once(small):
    run_ok(*TRADI, "--epochs", 2, "--out", "once.pt", folder=small)
    return torch.load(small / "once.pt", weights_only=True)


def test_tradi_and_pans_scripts(small, once):
    assert once["classifier"] == "cosine" and once["settings"]["tradi"] == [0.3, 0.2]
    assert "head.fuse.0.weight" in once["tradi"]["mean"] and "head.fuse.1.weight" not in once["tradi"]["mean"]

    # Interrupted in the middle: the tracked values are part of the state
    run_ok(*TRADI, "--epochs", 1, "--out", "half.pt", folder=small)
    run_ok(*TRADI, "--epochs", 2, "--out", "half.pt", folder=small)
    half, whole = torch.load(small / "half.pt", weights_only=True)["tradi"], once["tradi"]
    assert half["P"] == whole["P"] and half["first"] == whole["first"]
    assert all(half[k][n].equal(whole[k][n]) for k in ("mean", "var") for n in whole[k])
    settings = once["settings"]
    with pytest.raises(common.InputError, match=r"made with tradi \(0.3, 0.2\), this run has None"):
        pretrain.adopt(once, dict(settings, tradi=None), "once.pt")
    older = dict(once, settings={k: v for k, v in settings.items() if k not in ("classifier", "tradi")})
    assert pretrain.adopt(older, dict(settings, classifier="linear", tradi=None), "older.pt") == (2, 0)

    # Without variance every sample is the mean, with batch norm from the training images
    f, checkpoint = common.load_checkpoint(small / "once.pt")
    checkpoint["tradi"]["var"] = {n: 0 * v for n, v in checkpoint["tradi"]["var"].items()}
    args = argparse.Namespace(tradi=2, seed=0, train_root=str(small / "toy"), bn_images=6)
    first, second = evaluate.tradi_samples("once.pt", checkpoint, args, CPU)
    assert all(v.equal(second.state_dict()[k]) for k, v in first.state_dict().items())
    assert all(first.state_dict()[k].equal(v) for k, v in checkpoint["tradi"]["mean"].items())
    assert not first.backbone["0"][1].running_mean.equal(f.backbone["0"][1].running_mean)
    f, checkpoint = common.load_checkpoint(small / "once.pt")
    first, second = evaluate.tradi_samples("once.pt", checkpoint, args, CPU)
    other, _ = evaluate.tradi_samples("once.pt", checkpoint, argparse.Namespace(**{**vars(args), "seed": 1}), CPU)
    for a, b in ((first, second), (first, other)):
        assert not a.classifier.weight.equal(b.classifier.weight), "every sample and seed is another draw"
    with pytest.raises(common.InputError, match="x.pt: no tracked weights"):
        evaluate.tradi_samples("x.pt", {}, args, CPU)


def test_every_rank_count_gives_the_same_numbers(small, once):
    flags = ("--ckpt", "once.pt", "--tradi", 2, "--bn-images", 4, "--score", "msp", "knn", "cknn", "cosine",
             "--knn-images", 4, "--knn-vectors", 100, "--baseline", "once.pt")
    run_ok("evaluate.py", *flags, "--out", "r_one", folder=small)
    run_ranks("evaluate.py", *flags, "--out", "r_two", folder=small)
    one, two = (json.loads((small / name / "results.json").read_text()) for name in ("r_one", "r_two"))
    assert one == two and one["protocol"]["tradi"]["samples"] == 2 and one["protocol"]["knn"]["vectors_at_most"] == 100
    samples, f = ([row["pooled"]["aupr"] for row in one["rows"] if row["model"] == name]
                  for name in ("once TRADI", "once"))
    assert len(set(samples)) == len(set(f)) == 4 and not set(samples) & set(f)
    for more, told in ((("--tradi", 2, "--score", "dicnet", "--student", "s.pt"), "--tradi: --score dicnet"),
                       (("--bn-images", 4), "--bn-images: without effect"),
                       (("--train-root", "toy"), "--train-root: without effect")):
        done = run("evaluate.py", "--ckpt", "once.pt", *more, folder=small)
        assert done.code == 2 and told in done.err
