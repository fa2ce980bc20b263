"""Flow as a picture: the colour wheel of Baker et al., A Database and Evaluation Methodology for Optical Flow (ICCV
2007)."""

import math

import torch
from torch import Tensor

# (steps, channel that changes, whether it rises): red to yellow, green, cyan, blue, magenta and back to red
_ARCS = ((15, 1, True), (6, 0, False), (4, 2, True), (11, 1, False), (13, 0, True), (6, 2, False))


def colour_wheel() -> Tensor:
    """The 55 colours of the wheel, float32 (55, 3) 0..255, beginning with red."""
    colours, colour = [], [255.0, 0.0, 0.0]
    for steps, channel, rises in _ARCS:
        for step in range(steps):
            part = math.floor(255 * step / steps)
            colour[channel] = part if rises else 255 - part
            colours.append(list(colour))
        colour[channel] = 255.0 if rises else 0.0
    return torch.tensor(colours)


def flow_to_rgb(flow: Tensor, max_flow: float | None = None) -> Tensor:
    """Colours uint8 (..., 3, H, W) of flow (..., 2, H, W): hue is the direction, white no motion.

    max_flow  pixels of full saturation, > 0; longer vectors are darkened. None: the longest of each picture

    Motion to the right is red, down yellow-green, left cyan, up violet. Pixels that are not finite are black.
    """
    wheel = colour_wheel().to(flow.device)
    known = flow.isfinite().all(-3, keepdim=True)
    flow = torch.where(known, flow, 0).float()
    u, v = flow.unbind(-3)
    length = flow.square().sum(-3).sqrt()
    most = length.amax((-2, -1), keepdim=True) if max_flow is None else length.new_tensor(float(max_flow))
    radius = length / most.clamp(min=torch.finfo(torch.float32).eps)
    place = (torch.atan2(-v, -u) / math.pi + 1) / 2 * (len(wheel) - 1)
    lower = place.floor().long().clamp(0, len(wheel) - 1)
    part = (place - lower)[..., None]
    colour = torch.lerp(wheel[lower], wheel[(lower + 1) % len(wheel)], part) / 255
    radius = radius[..., None]
    # outside of the wheel is darkened; a rounding error above 1 is not outside
    colour = torch.where(radius <= 1 + 1e-6, 1 - radius.clamp(max=1) * (1 - colour), 0.75 * colour)
    return (colour * 255).floor().to(torch.uint8).movedim(-1, -3) * known
