"""What the entry scripts are made of: training, checkpoints, curvature, pictures and the command line."""
