"""Rigged Gaussian avatars: bound to a head, fitted to a clip, driven by parameters."""
