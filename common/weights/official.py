"""Released checkpoints: facts about the authors' downloads. Nothing here downloads anything.

Fetch a file yourself, read its licence, then `python -m tools.import_weights <family> <file>`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_HOST = "https://nvlabs-fi-cdn.nvidia.com"
_EDM = f"{_HOST}/edm/pretrained"
_EDM2 = f"{_HOST}/edm2/posthoc-reconstructions"
BY_NC_SA = "CC BY-NC-SA 4.0 (non-commercial)"


@dataclass(frozen=True, kw_only=True)
class Release:
    """One released file.

    file       name of the download;   url  where its authors keep it
    family     first argument of `python -m tools.import_weights`
    sha256     of the file, None where the authors publish none
    used_by    experiments that start from it
    published  the authors' numbers, metric -> value
    key_map    our tensor name -> theirs where they differ; all of these agree name by name
    """

    file: str
    url: str
    family: str
    licence: str = BY_NC_SA
    sha256: str | None = None
    used_by: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    key_map: Mapping[str, str] = field(default_factory=dict)


def _edm(name: str, used_by: tuple[str, ...] = (), **published: float) -> Release:
    return Release(file=f"{name}.pkl", url=f"{_EDM}/{name}.pkl", family="edm", used_by=used_by, published=published)


def _edm2(name: str, used_by: tuple[str, ...] = (), **published: float) -> Release:
    return Release(file=f"{name}.pkl", url=f"{_EDM2}/{name}.pkl", family="edm2", used_by=used_by, published=published)


# EDM: README of NVlabs/edm; FID of 50,000 images, best of three (arXiv 2206.00364, table 2).
# EDM2: presets of NVlabs/edm2 generate_images.py (arXiv 2312.02696, table 3): size, training kimg, relative EMA std.
RELEASES: dict[str, Release] = {
    "edm_cifar10_uncond_vp": _edm("edm-cifar10-32x32-uncond-vp", ("ect_cifar10", "ect_cifar10_1hour"), fid_nfe35=1.97),
    "edm_cifar10_cond_vp": _edm("edm-cifar10-32x32-cond-vp", fid_nfe35=1.79),
    "edm_imagenet64_cond_adm": _edm("edm-imagenet-64x64-cond-adm", fid_nfe511=1.36),
    "edm2_imagenet64_s": _edm2("edm2-img64-s-1073741-0.075", ("ect_imagenet64_s",), fid_nfe63=1.58),
    "edm2_imagenet64_m": _edm2("edm2-img64-m-2147483-0.060", ("ect_imagenet64_m",), fid_nfe63=1.43),
    "edm2_imagenet64_l": _edm2("edm2-img64-l-1073741-0.040", ("ect_imagenet64_l",), fid_nfe63=1.33),
    "edm2_imagenet64_xl": _edm2("edm2-img64-xl-0671088-0.040", ("ect_imagenet64_xl",), fid_nfe63=1.33),
}


def by_file(name: str, releases: Mapping[str, Release] = RELEASES) -> Release | None:
    """The release whose download is called `name`, or None."""
    return next((release for release in releases.values() if release.file == name), None)
