"""MASA (arXiv 2510.03259), the second method: settings, problems, rewards, objective, step, run."""
