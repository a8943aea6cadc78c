"""Running the parts of a job: one by one here, in processes of their own, or as tasks on a Ray cluster."""
