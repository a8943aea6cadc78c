"""Where the parts of a job run."""
