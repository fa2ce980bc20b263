"""The small network of the gradient comparison: five convolutions of width 32 with a context module in their middle."""

from torch import Tensor, nn

from common.errors import UserError


class PlainBackbone(nn.Module):
    """Images (B, 3, H, W) -> [(B, width, H/2, W/2)] by two 3x3 convolutions, the second of stride 2, each with batch
    normalisation and ReLU.

    A backbone of `HamNet`, whose squeeze, align and classifier are the other three convolutions.
    """

    def __init__(self, *, width: int = 32):
        super().__init__()
        if width < 1:
            raise UserError(f"backbone.width must be >= 1, got {width}. Set it to 32.")
        layers = []
        for inside, stride in ((3, 1), (width, 2)):
            conv = nn.Conv2d(inside, width, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.channels, self.strides = (width,), (2,)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layers(x)]
