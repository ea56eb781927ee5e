"""Shared by all tests: the repository on the import path, no trace in the user's cache folder, one small toy set."""
import os
import sys
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"   # looking for a GPU must not start CUDA here
if "PYTEST_XDIST_WORKER" in os.environ:              # a core for each of them
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The tests compare bits, on the CPU even where there is a GPU; test_cuda.py shows this one to the scripts it starts
GPU = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0] if torch.cuda.is_available() else None
os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONG = ("test_scripts", "test_training", "test_faults", "test_systems_c", "test_systems_b", "test_systems_a",
        "test_open")


def pytest_configure(config):
    config.option.loadscopereorder = False      # pytest-xdist would put the files with the most tests first


def pytest_collection_modifyitems(items):
    """Files that take long come first: of two processes none then waits for the other's last one."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """The label-scan cache goes to a temporary folder; scripts that tests start inherit it."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    for path in tmp_path_factory.getbasetemp().rglob("*.pt"):   # 130 MB each, and pytest keeps its last three folders
        path.unlink()


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """Toy scenes: 6 for training, 2 for validation, 3 for testing."""
    import toy
    root = tmp_path_factory.mktemp("toy") / "toy"
    toy.write_toy(str(root), seed=0, counts=(6, 2, 3))
    return str(root)


@pytest.fixture(scope="session")
def small(tmp_path_factory, toy_root):
    """A folder with toy/, the toy scenes at half their size, and pretrained.pt, made from them with pretrain.py."""
    import numpy as np
    from PIL import Image
    from runner import run_ok
    folder = tmp_path_factory.mktemp("small")
    for path in Path(toy_root).rglob("*.png"):
        to = folder / "toy" / path.relative_to(toy_root)
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(Image.open(path))[::2, ::2]).save(to)
    run_ok("pretrain.py", "--root", folder / "toy", "--epochs", 2, "--batch-size", 2, "--crop", 32, 48, "--lr", 1e-3,
           folder=folder)
    predict_every_class(folder / "pretrained.pt")
    return folder


def predict_every_class(path):
    """Two epochs teach nothing: give a checkpoint the batch-norm statistics of the training images, and a random last
    layer that predicts every class, with some doubt."""
    import common
    f, checkpoint = common.load_checkpoint(path)
    scenes = common.Scenes(checkpoint["data"], checkpoint["root"], "train")
    norms = [m for m in f.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    X = common.to_input(torch.stack([scenes[i]["image"] for i in range(len(scenes))]))
    with torch.no_grad():
        for m in norms:
            m.reset_running_stats()
            m.momentum = None   # the plain mean
        f.train()(X)
        x = f.activation(f.eval().embed(X))
        weight = torch.randn(f.num_classes, x.shape[1], generator=torch.Generator().manual_seed(0))
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3)) + 1e-6
        weight *= 3 / (std * x.shape[1]**0.5)
        checkpoint["model"] = dict(f.state_dict())
        checkpoint["model"]["classifier.weight"] = weight[:, :, None, None]
        checkpoint["model"]["classifier.bias"] = -weight @ mean
    torch.save(checkpoint, path)


def with_dropout(small, to):
    """Write a checkpoint of the small toy data whose network has dropout (PSPNet, random weights); returns its path."""
    import common
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.manual_seed(0)
    f = common.Segmenter("pspnet", checkpoint["backbone"], len(checkpoint["classes"]), checkpoint["width"])
    torch.save(dict(checkpoint, arch="pspnet", model=f.state_dict()), to)
    return to
