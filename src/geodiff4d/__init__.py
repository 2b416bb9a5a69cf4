"""One portrait image in, one animatable, photorealistic 4D head avatar out (GeoDiff4D, arXiv 2602.24161)."""

__version__ = "0.1.0"
