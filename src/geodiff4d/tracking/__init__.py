"""Perception and fitting: a photograph or video in, a clip with cameras, masks and head parameters out."""
