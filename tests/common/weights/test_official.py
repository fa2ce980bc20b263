from common.weights.official import RELEASES, by_file


def test_every_release_is_complete_and_found_by_its_file():
    for name, release in RELEASES.items():
        assert release.family in ("edm", "edm2") and name.startswith(release.family + "_")
        assert release.url.startswith("https://") and release.url.endswith("/" + release.file)
        assert release.sha256 is None or len(release.sha256) == 64
        assert release.licence and release.published
        assert by_file(release.file) is release
    assert by_file("other.pkl") is None


def test_ect_starts_from_these():
    used = {experiment for release in RELEASES.values() for experiment in release.used_by}
    assert {"ect_cifar10", "ect_cifar10_1hour"} <= used
    assert {f"ect_imagenet64_{size}" for size in ("s", "m", "l", "xl")} <= used
