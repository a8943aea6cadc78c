"""Cost before it is paid: predictions of every stage, a planner for machines, and advice on formats."""
