"""Meshes and Gaussians to pixels."""
