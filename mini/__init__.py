"""The miniature: real facts, worlds of thinking traces, tiny models that are built, trained and studied on a CPU."""
