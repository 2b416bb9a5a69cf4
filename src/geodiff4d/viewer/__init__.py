"""The live viewer: an avatar is rendered by this machine and controlled in a browser."""
