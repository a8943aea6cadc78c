"""What a stage costs, from shapes alone: FLOPs, memory, seconds; every stage predicts by it."""
