"""The commands of `cnn2gnn` other than running stages: predict, checkpoint, plan, doctor."""
