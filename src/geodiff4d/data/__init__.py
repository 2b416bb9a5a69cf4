"""The clip (the one data contract), the open world, readers, pairing and augmentation."""
