"""The two frozen networks behind pMF's perceptual terms: LPIPS over VGG16, and features of ConvNeXt V2.

Each is a distance (image, x) -> (B,) of images (B, 3, H, W) in [-1, 1], made without weights; `load` reads them from
files when training begins, so that a run can be planned without.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.weights.load import load_into, load_tensors

# what torchvision's normalisation of [0, 1] images (mean .485 .456 .406, deviation .229 .224 .225) is for [-1, 1]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# position in torchvision's vgg16().features after which a feature map is taken, and its channels
TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
VGG_SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_SOURCE = "weights/v0.1/vgg.pth in the PyPI package lpips 0.1.4"
CONVNEXT_SOURCE = "https://huggingface.co/timm/convnextv2_base.fcmae_ft_in22k_in1k (model.safetensors)"


class Lpips(nn.Module):
    """LPIPS v0.1 with VGG16 (Zhang et al., arXiv 1801.03924, equation 1; heads "lin").

    d = sum_l mean_hw sum_c w_lc (f_lc(image) - f_lc(x))^2 over relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, every
    feature vector divided by its norm + 1e-10.

    backbone  file of VGG16's weights: torchvision's vgg16-397923af.pth, or the same tensors as safetensors
    heads     file of the weights w, names lin0.model.1.weight ... lin4.model.1.weight
    """

    def __init__(self, *, backbone: str, heads: str):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.files = {"backbone": Path(backbone), "heads": Path(heads)}
        self.features = make_layers(cfgs["D"], batch_norm=False)[: max(TAPS) + 1]
        self.heads = nn.ParameterList(nn.Parameter(torch.full((width,), 1 / width)) for width in TAPS.values())
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def load(self) -> None:
        """Read both files. Raises UserError naming the one that is missing, and where to get it."""
        vgg = _read(self.files["backbone"], "backbone", "LPIPS needs the weights of VGG16", VGG_SOURCE)
        lin = _read(self.files["heads"], "heads", "LPIPS needs its linear heads", HEADS_SOURCE)
        features = {
            name.removeprefix("features."): value for name, value in vgg.items() if name.startswith("features.")
        }
        load_into(self.features, features, name=str(self.files["backbone"]))
        for index, head in enumerate(self.heads):
            name = f"lin{index}.model.1.weight"
            if name not in lin or lin[name].numel() != head.numel():
                raise UserError(f"{self.files['heads']} holds no {name} of {head.numel()} values. Get {HEADS_SOURCE}.")
            head.data.copy_(lin[name].flatten())

    def forward(self, image: Tensor, x: Tensor) -> Tensor:
        both = (torch.cat([image, x]) - self.shift) / self.scale
        heads, total = iter(self.heads), 0
        for index, layer in enumerate(self.features):
            both = layer(both)
            if index in TAPS:
                # the norm's derivative at 0 is 0, where the square root of a sum has none
                unit = both / (torch.linalg.vector_norm(both, dim=1, keepdim=True) + 1e-10)
                first, second = unit.chunk(2)
                total = total + torch.einsum("bchw,c->bhw", (first - second).square(), next(heads)).mean((1, 2))
        return total


class ConvNextDistance(nn.Module):
    """Squared distance of the pooled, normalised features of ConvNeXt V2 (arXiv 2301.00808), 1024 in the base size.

    model    timm's name of the network
    weights  file with timm's tensor names; the official code takes facebook/convnextv2-base-22k-224, which timm has as
             convnextv2_base.fcmae_ft_in22k_in1k
    Images go in as they are, in [-1, 1], not normalised to ImageNet's mean: so does the official code.
    """

    def __init__(self, *, weights: str, model: str = "convnextv2_base"):
        super().__init__()
        from common.nets.timm_model import create

        self.file = Path(weights)
        self.network = create(model, num_classes=0)

    def load(self) -> None:
        """Read the file. Raises UserError naming it, and where to get it, when it is missing."""
        tensors = _read(self.file, "weights", "the perceptual loss needs the weights of ConvNeXt V2", CONVNEXT_SOURCE)
        load_into(self.network, tensors, ignore=["head.fc.*"], name=str(self.file))

    def forward(self, image: Tensor, x: Tensor) -> Tensor:
        first, second = self.network(torch.cat([image, x])).chunk(2)
        return (first - second).square().sum(1)


def _read(path: Path, field: str, why: str, source: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{why}, and there is no file {path}. Get {source} and put it there, set {field} of project.perceptual to "
            "where it is, or train without it: project.perceptual=null."
        )
    return load_tensors(path)
