"""What `cnn2gnn` does besides running stages: predict, checkpoint, plan, doctor."""
