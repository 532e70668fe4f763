"""Everything on disk: checkpoints, run folders, model folders, pictures."""
