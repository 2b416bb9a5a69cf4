"""Geometry, cameras, mesh topology, image and video files, run directories: what every layer stands on."""
