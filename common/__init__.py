"""What every other folder stands on: files, errors, settings, processes, checkpoints, templates, tokens, weights."""
