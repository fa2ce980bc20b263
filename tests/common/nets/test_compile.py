"""torch.compile sees each network as one graph, in training mode, and changes nothing but rounding."""

import pytest
import torch

from common.nets.edm2 import EDM2UNet
from common.nets.mlp import MLPDenoiser
from common.nets.unet import SongUNet

TINY = dict(img_resolution=4, label_dim=4, dropout=0.2)
UNET = dict(TINY, num_blocks=1)
MAKERS = {
    "song": lambda: SongUNet(**UNET, channel_mult=[1, 1], in_channels=3, out_channels=3, model_channels=16),
    "edm2": lambda: EDM2UNet(**UNET, channel_mult=[1], img_channels=3, model_channels=16, channels_per_head=8),
    "mlp": lambda: MLPDenoiser(**TINY, in_channels=3, out_channels=3, width=16, depth=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_compiles_into_one_graph_and_changes_rounding_only(name):
    net = MAKERS[name]()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)  # nothing stays at zero
    x, noise, labels = torch.randn(3, 3, 4, 4), torch.linspace(-1, 1, 3), torch.eye(4)[:3]
    masks = net.draw_dropout(x)
    plain = net(x, noise, labels, dropout_masks=masks)  # EDM2 settles on renormalised weights here
    plain = net(x, noise, labels, dropout_masks=masks)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(x, noise, labels, dropout_masks=masks)
    assert compiled.requires_grad
    assert (plain - compiled).abs().max() <= 1e-5 * plain.abs().max()
