"""The studio: a page on this machine from a dropped portrait to an avatar, for those who type no commands."""
