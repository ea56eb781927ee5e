"""Segmenters: shapes, agreement with torchvision's DeepLabv3 and with a plain PSPNet head, folding, backbone
weights."""
import copy
import math
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import segmentation
from torchvision.ops.misc import SqueezeExcitation
from torchvision.transforms.functional import normalize

import common
import mgu_generate
import pretrain

SMALL, LARGE, V2 = "mobilenet_v3_large", "resnet50", "mobilenet_v2"
MODELS = [(arch, backbone) for arch in ("deeplabv3", "pspnet", "fpn") for backbone in (SMALL, V2, LARGE)]


def lived_in(module, seed=0):
    """Eval mode, with batch-norm statistics and scales that are no longer those of a new module."""
    g = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            n = len(m.weight)
            m.running_mean.copy_(0.3 * torch.randn(n, generator=g))
            m.running_var.copy_(0.5 + torch.rand(n, generator=g))
            m.weight.data.copy_(0.7 + 0.5 * torch.rand(n, generator=g))
            m.bias.data.copy_(0.2 * torch.randn(n, generator=g))
    return module.eval()


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def f(request):
    torch.manual_seed(0)
    return lived_in(common.Segmenter(*request.param, 12))


@torch.inference_mode()
def test_shapes_and_output_stride(f):
    stride = 4 if f.arch == "fpn" else 16 if f.arch == "deeplabv3" and f.backbone_name != LARGE else 8
    sizes = []
    hook = f.classifier.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[-2:])))
    for H, W in ((64, 96), (65, 97), (71, 50)):
        logits = f(torch.rand(2, 3, H, W))
        assert logits.shape == (2, 12, H, W) and logits.dtype == torch.float32 and logits.isfinite().all()
        assert sizes.pop() == (math.ceil(H / stride), math.ceil(W / stride))
    hook.remove()


@torch.inference_mode()
def test_the_last_convolution_sees_the_activated_embedding(f):
    X = torch.rand(1, 3, 33, 47)
    embedding = f.outputs(X)["embedding"]
    assert embedding.min() < 0, "the map is not the one before the ReLU"
    z = torch.einsum("bchw,nc->bnhw", embedding.clamp(min=0), f.classifier.weight[..., 0, 0]) + \
        f.classifier.bias.view(-1, 1, 1)
    assert f.classifier.kernel_size == (1, 1)
    torch.testing.assert_close(nn.functional.interpolate(z, (33, 47), mode="bilinear"), f(X), rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_folded_batch_norm_is_the_same_function(f):
    before = copy.deepcopy(f.state_dict())
    folded = mgu_generate.fold_batch_norm(f)
    X = torch.rand(2, 3, 49, 66)
    torch.testing.assert_close(folded(X), f(X), rtol=1e-3, atol=1e-3 * f(X).abs().max().item())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())   # a copy: f is as it was


@pytest.mark.parametrize("backbone, published", (
    (SMALL, segmentation.DeepLabV3_MobileNet_V3_Large_Weights), (LARGE, segmentation.DeepLabV3_ResNet50_Weights),
    ("resnet101", segmentation.DeepLabV3_ResNet101_Weights)))
def test_deeplab_has_the_published_number_of_parameters(backbone, published):
    """torchvision's number for 21 classes, less that of the auxiliary head, which f does not have."""
    channels, inner = (40, 10) if backbone == SMALL else (1024, 256)
    auxiliary = channels * inner * 9 + 2 * inner + 21 * inner + 21    # 3×3 convolution, norm, 1×1 convolution
    with torch.device("meta"):
        f = common.Segmenter("deeplabv3", backbone, 21)
    assert sum(p.numel() for p in f.parameters()) == published.DEFAULT.meta["num_params"] - auxiliary


def test_pspnet_on_resnet101_is_constructed():
    with torch.device("meta"):
        f = common.Segmenter("pspnet", "resnet101", 12)
    blocks = [m for m in f.backbone.modules() if isinstance(m, torchvision.models.resnet.Bottleneck)]
    assert len(blocks) == 3 + 4 + 23 + 3


@torch.inference_mode()
@pytest.mark.parametrize("backbone", (SMALL, LARGE))
def test_deeplab_equals_torchvisions(backbone):
    """torchvision's own model with the same weights, given a normalised image."""
    torch.manual_seed(5)
    f = lived_in(common.Segmenter("deeplabv3", backbone, 12))
    theirs = getattr(segmentation, f"deeplabv3_{backbone}")(weights=None, weights_backbone=None, num_classes=12,
                                                            aux_loss=False).eval()
    theirs.backbone.load_state_dict(f.backbone.state_dict())
    theirs.classifier.load_state_dict({**f.head.state_dict(),
                                       **{f"4.{k}": v for k, v in f.classifier.state_dict().items()}})
    X = torch.rand(1, 3, 65, 80)
    want = theirs(normalize(X, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))["out"]
    torch.testing.assert_close(f(X), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


# PSPNet's pyramid in numpy float64, from its paper (Zhao et al., CVPR 2017, Sec. 3.2)

def normed(x, m):
    """Batch norm in eval mode; x (C, h, w)."""
    mean, var, weight, bias = (v.detach().numpy()[:, None, None]
                               for v in (m.running_mean, m.running_var, m.weight, m.bias))
    return (x - mean) / np.sqrt(var + m.eps) * weight + bias


def resized(x, size):
    """Bilinear with pixel centres at (i + 1/2), one axis after the other: (C, a, b) → (C, *size)."""
    for axis, n in zip((1, 2), size):
        m = x.shape[axis]
        at = (np.arange(n) + 0.5) * m / n - 0.5
        x = np.apply_along_axis(lambda v: np.interp(at, np.arange(m), v), axis, x)
    return x


def pooled(x, bins):
    """Means over bins × bins cells; cell i spans floor(i h / bins) to ceil((i + 1) h / bins)."""
    (h, w), n = x.shape[1:], bins
    return np.stack([np.stack([x[:, i * h // n:-(-(i + 1) * h // n), j * w // n:-(-(j + 1) * w // n)].mean((1, 2))
                               for j in range(n)], 1) for i in range(n)], 1)


def convolved(x, weight):
    """3×3 convolution with padding 1; x (C, h, w), weight (D, C, 3, 3)."""
    h, w = x.shape[1:]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    return sum(np.einsum("chw,dc->dhw", x[:, i:i + h, j:j + w], weight[:, :, i, j]) for i in range(3) for j in range(3))


@torch.inference_mode()
def test_pyramid_pooling():
    torch.manual_seed(1)
    head = lived_in(common.PyramidPooling(16).double())
    x = torch.randn(1, 16, 9, 13, dtype=torch.float64)
    parts = [x[0].numpy()]
    for bins, branch in zip((1, 2, 3, 6), head.branches, strict=True):
        conv, norm = branch[1], branch[2]
        reduced = np.einsum("chw,dc->dhw", pooled(parts[0], bins), conv.weight.numpy()[..., 0, 0])
        assert reduced.shape == (4, bins, bins)     # a quarter of the channels each
        parts.append(resized(normed(reduced, norm).clip(0), (9, 13)))   # ReLU
    want = normed(convolved(np.concatenate(parts), head.fuse[0].weight.numpy()), head.fuse[1])
    assert want.shape == (512, 9, 13)
    np.testing.assert_allclose(head(x)[0].numpy(), want, rtol=1e-9, atol=1e-10)


@torch.inference_mode()
def test_feature_pyramid():
    """Laterals, sums from coarse to fine and the 3×3 convolution, in numpy."""
    torch.manual_seed(1)
    channels, sizes = (6, 5, 4, 3), ((16, 24), (8, 12), (4, 6), (2, 3))
    head = lived_in(common.FeaturePyramid(channels, 7).double())
    maps = {str(n): torch.randn(1, c, *size, dtype=torch.float64) for n, (c, size) in enumerate(zip(channels, sizes))}
    x = 0
    for m, conv, size in reversed(list(zip(maps.values(), head.lateral, sizes))):
        lateral = np.einsum("chw,dc->dhw", m[0].numpy(), conv.weight.numpy()[..., 0, 0])
        lateral += conv.bias.numpy()[:, None, None]
        x = lateral + (resized(x, size) if np.ndim(x) else 0)
    want = normed(convolved(x, head.fuse[0].weight.numpy()), head.fuse[1])
    assert want.shape == (7, 16, 24)
    np.testing.assert_allclose(head(maps)[0].numpy(), want, rtol=1e-9, atol=1e-10)


@torch.inference_mode()
@pytest.mark.parametrize("backbone", common.BACKBONES)
def test_taps_of_the_pyramid(backbone):
    """The four maps are those of the undilated classifier, the last of each stride, with the channels of TAPS."""
    torch.manual_seed(3)
    theirs = lived_in(classifier(backbone, 3))
    f = common.Segmenter("fpn", backbone, 5, 8).eval()
    state = {k.removeprefix("features."): v for k, v in theirs.state_dict().items()
             if not k.startswith(("fc.", "classifier."))}
    f.backbone.load_state_dict(state)
    X, want = torch.randn(1, 3, 64, 96), {}
    if backbone.startswith("resnet"):
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(X))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            x = layer(x)
            want[64 // x.shape[-2]] = x
    else:
        x = X
        for block in theirs.features:
            x = block(x)
            want[64 // x.shape[-2]] = x
    got = f.backbone(X)
    assert (list(got) == ["4", "8", "16", "32"]
            and [m.shape[1] for m in got.values()] == list(common.TAPS[backbone].values()))
    for stride, m in got.items():
        torch.testing.assert_close(m, want[int(stride)], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("backbone", (SMALL, V2))
def test_dilated_mobilenet_is_the_same_network_on_a_finer_grid(monkeypatch, backbone):
    """Dilation in place of a stride computes the same map at every second position (Yu & Koltun, ICLR 2016), but for
    the squeeze-and-excitation, whose mean is over another set of positions: left out of both."""
    monkeypatch.setattr(SqueezeExcitation, "forward", lambda self, x: x)
    torch.manual_seed(2)
    coarse = lived_in(common.Segmenter("deeplabv3", backbone, 12)).backbone
    fine = common.Segmenter("pspnet", backbone, 12).eval().backbone
    fine.load_state_dict(coarse.state_dict())
    X = torch.randn(1, 3, 100, 137)
    want, got = coarse(X)["out"], fine(X)["out"]
    assert want.shape[-2:] == (7, 9) and got.shape[-2:] == (13, 18)
    torch.testing.assert_close(got[..., ::2, ::2], want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_unknown_model():
    with pytest.raises(common.InputError, match="unet on resnet50"):
        common.Segmenter("unet", "resnet50", 12)


# ─────────────────────────────────────────── backbone weights ───────────────────────────────────────────

def classifier(backbone, seed):
    torch.manual_seed(seed)
    return getattr(torchvision.models, backbone)(weights=None)


@torch.inference_mode()
@pytest.mark.parametrize("backbone", (SMALL, LARGE))
def test_weights_of_a_classifier_file(tmp_path, backbone):
    theirs = lived_in(classifier(backbone, 3))
    torch.save(theirs.state_dict(), tmp_path / "classifier.pth")
    f = common.Segmenter("deeplabv3", backbone, 5)
    head = copy.deepcopy({**f.head.state_dict(), **f.classifier.state_dict()})
    pretrain.load_backbone(f, str(tmp_path / "classifier.pth"))
    # The stem, which no dilation touches, is the same function; and no tensor of the backbone is left as it was
    X = torch.randn(1, 3, 40, 56)
    f.eval()
    if backbone == LARGE:
        want = theirs.layer2(theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(X))))))
        b = f.backbone
        got = b.layer2(b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(X))))))
    else:
        want, got = theirs.features[:13](X), nn.Sequential(*(f.backbone[str(i)] for i in range(13)))(X)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    mine, file = list(f.backbone.state_dict().values()), list(theirs.state_dict().values())
    assert len(mine) == len(file) - (2 if backbone == LARGE else 4)
    assert all(torch.equal(a, b) for a, b in zip(mine, file))
    assert all(torch.equal(v, head[k]) for k, v in {**f.head.state_dict(), **f.classifier.state_dict()}.items())


@pytest.mark.parametrize("content", (b"", b"<html>404</html>", b"PK\x03\x04 cut"))
def test_damaged_file_in_the_cache_of_weights(tmp_path, monkeypatch, content):
    """torchvision does not check what it finds there; the line names the file to delete."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    enum = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    kept = tmp_path / "hub/checkpoints" / enum.url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    with pytest.raises(common.InputError) as e:
        pretrain.load_backbone(common.Segmenter("fpn", V2, 5, 8), "imagenet")
    assert str(kept) in str(e.value) and "delete the file" in str(e.value) and "\n" not in str(e.value)


def test_no_weights_leave_f_alone():
    f = common.Segmenter("deeplabv3", SMALL, 5)
    before = copy.deepcopy(f.state_dict())
    pretrain.load_backbone(f, "none")
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())


def other_network(path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)


def bare_list(path):
    torch.save([torch.zeros(3)], path)


def whole_module(path):
    torch.save(nn.Linear(2, 2), path)


def text(path):
    path.write_text("weights\n")


def nothing(path):
    pass


@pytest.mark.parametrize("write", (other_network, bare_list, whole_module, text, nothing))
def test_wrong_weights_file(tmp_path, write):
    path = tmp_path / "weights.pth"
    write(path)
    f = common.Segmenter("deeplabv3", SMALL, 5)
    with pytest.raises(common.InputError) as e:
        pretrain.load_backbone(f, str(path))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("error", (urllib.error.URLError("no route to host"), OSError("disk full"),
                                   RuntimeError("invalid hash value")))
def test_imagenet_weights_without_network(monkeypatch, error):
    def fails(*args, **kwargs):
        raise error
    enum = torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(enum), "get_state_dict", fails)
    f = common.Segmenter("deeplabv3", SMALL, 5)
    with pytest.raises(common.InputError) as e:
        pretrain.load_backbone(f, "imagenet")
    message = str(e.value)
    assert "--weights none" in message and enum.url in message and "\n" not in message
    assert str(getattr(error, "reason", error)) in message


def test_imagenet_weights_are_loaded(monkeypatch):
    """What torchvision hands out (here: random tensors) is in the backbone, whatever the checksum option."""
    state = classifier(SMALL, 4).state_dict()
    monkeypatch.setattr(torchvision.models.MobileNet_V3_Large_Weights, "get_state_dict",
                        lambda self, **kwargs: dict(state))
    f = common.Segmenter("pspnet", SMALL, 5)
    pretrain.load_backbone(f, "imagenet")
    assert torch.equal(f.backbone["0"][0].weight, state["features.0.0.weight"])
    assert torch.equal(f.backbone["16"][1].running_var, state["features.16.1.running_var"])


@pytest.mark.parametrize("backbone", (SMALL, "mobilenet_v2"))
def test_batch_norm_momentum(backbone):
    """Also where torchvision has another one."""
    f = common.Segmenter("fpn", backbone, 5, 16)
    assert {m.momentum for m in f.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_heads_beside_the_classifier():
    """An outlier head reads what the classifier reads; without it the weights are drawn as ever; others are refused."""
    torch.manual_seed(3)
    plain = common.Segmenter("fpn", SMALL, 5, 16)
    torch.manual_seed(3)
    f = common.Segmenter("fpn", SMALL, 5, 16, outlier=True).eval()
    state = plain.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in f.state_dict().items() if not k.startswith("outlier."))
    X = torch.rand(2, 3, 40, 52)
    with torch.no_grad():
        found = f.outputs(X)
        d = torch.einsum("bchw,c->bhw", found["embedding"].clamp(min=0), f.outlier.weight[0, :, 0, 0]) + f.outlier.bias
        want = nn.functional.interpolate(d[:, None], (40, 52), mode="bilinear")[:, 0]
        torch.testing.assert_close(found["outlier"], want, rtol=1e-4, atol=1e-5)
        assert "outlier" not in plain.eval().outputs(X)
    with pytest.raises(common.InputError, match="round classifier"):
        common.Segmenter("fpn", SMALL, 5, 16, classifier="round")


def test_a_checkpoint_says_which_heads_it_has(tmp_path):
    facts = dict(classes=["a", "b", "c"], data="toy", root="", anomaly=None, settings={}, epoch=0, step=0)
    X = torch.rand(1, 3, 33, 40)
    for heads in (dict(classifier="cosine"), dict(outlier=True)):
        f = common.Segmenter("fpn", SMALL, 3, 8, **heads).eval()
        common.save_checkpoint(tmp_path / "x.pt", dict(common.model_facts(f), model=f.state_dict(), **facts))
        g = common.load_checkpoint(tmp_path / "x.pt")[0]
        with torch.no_grad():
            torch.testing.assert_close(g.outputs(X), f.outputs(X), rtol=1e-4, atol=1e-5)
    # a file from before there were such heads
    f = common.Segmenter("fpn", SMALL, 3, 8)
    old = {k: v for k, v in common.model_facts(f).items() if k not in ("classifier", "outlier")}
    common.save_checkpoint(tmp_path / "x.pt", dict(old, model=f.state_dict(), **facts))
    g = common.load_checkpoint(tmp_path / "x.pt")[0]
    assert g.classifier_name == "linear" and g.outlier is None


@pytest.mark.parametrize("small,size", [((9, 16), (72, 128)), ((6, 6), (23, 40)), ((27, 48), (108, 192)),
                                        ((1, 1), (7, 9)), ((12, 7), (5, 3))])
def test_gradient_of_upsampling(small, size):
    """Aᵀ g B, which MGU takes on a GPU, is what autograd makes of F.interpolate; float64, and by finite differences."""
    x = torch.randn(2, 3, *small, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, *size, dtype=torch.float64)
    out = common.Bilinear.apply(x, size)
    expected = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    assert torch.equal(out, expected)
    found, other = (torch.autograd.grad((o * g).sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-13)
    if x.numel() < 300:
        assert torch.autograd.gradcheck(lambda x: common.Bilinear.apply(x, size), x)
