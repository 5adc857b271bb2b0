"""DiG-B/2, the published recipe. The argument is the resolution in pixels: dig_b.py:256 or :512."""

from configs import imagenet


def get_config(resolution: str = "256"):
    return imagenet.get_config("DiG-B/2", resolution)
