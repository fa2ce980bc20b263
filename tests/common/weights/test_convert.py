import pytest
import torch

from common.errors import UserError
from common.weights.build import build
from common.weights.convert import network_tree
from common.weights.pickle import Snapshot


def snapshot(class_name, /, *args, head=False, **kwargs):
    tensors = {"logvar_linear.weight": torch.zeros(1, 128)} if head else {}
    return Snapshot(class_name=class_name, args=list(args), kwargs=kwargs, tensors=tensors)


def count(tree, part=None):
    with torch.device("meta"):
        net = build(tree)
    return sum(value.numel() for value in (getattr(net, part) if part else net).parameters())


CIFAR = dict(
    img_resolution=32, img_channels=3, label_dim=0, model_type="SongUNet", embedding_type="positional",
    encoder_type="standard", decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1],
    model_channels=128, channel_mult=[2, 2, 2], augment_dim=9, dropout=0.13, use_fp16=False,
)  # fmt: skip


def test_published_parameter_counts():
    """Counts of the official classes: DDPM++ 32px with 9 augmentation labels, ADM 64px, EDM2-S 64px plus head."""
    assert count(network_tree(snapshot("EDMPrecond", **CIFAR))) == 55_733_891
    assert count(network_tree(snapshot("EDMPrecond", 64, 3, 1000, True, model_type="DhariwalUNet"))) == 295_899_267
    edm2 = dict(img_resolution=64, img_channels=3, label_dim=1000, model_channels=192)
    for head in (True, False):  # ECT's branch imgnet leaves it out
        tree = network_tree(snapshot("Precond", **edm2, head=head))
        assert count(tree, "unet") == 280_209_253
        assert count(tree) == 280_209_253 + 128 * head


def test_options_keep_their_values_and_names():
    tree = network_tree(snapshot("iDDPMPrecond", 8, 3, C_1=0.002, C_2=0.009, M=10, use_fp16=True))
    assert (tree["C1"], tree["C2"], tree["M"], tree["dtype"]) == (0.002, 0.009, 10, "float16")
    assert tree["model"]["out_channels"] == 6
    tree = network_tree(snapshot("ECMPrecond", 8, 1, sigma_min=0.01, sigma_max=50, sigma_data=0.7))
    assert (tree["sigma_min"], tree["sigma_max"], tree["sigma_data"]) == (0.01, 50, 0.7)
    tree = network_tree(snapshot("VEPrecond", 8, 1, class_name="training.networks.VEPrecond"))
    assert tree["model"]["_target_"] == "common.nets.unet.SongUNet" and "class_name" not in tree["model"]


def test_what_cannot_be_imported():
    with pytest.raises(UserError, match="without img_channels"):
        network_tree(snapshot("EDMPrecond", 8))
    with pytest.raises(UserError, match="model_type 'Other' is not a network we can import"):
        network_tree(snapshot("EDMPrecond", 8, 3, model_type="Other"))
