"""Folders on disk: runs, model folders, pictures."""
