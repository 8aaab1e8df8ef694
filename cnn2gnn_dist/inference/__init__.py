"""After training: a model in a folder that classifies images, with the training images its answers are based on.

Light: needs only what ``pip install cnn2gnn-dist`` installs (no Ray, DeepSpeed or DGL).
"""
