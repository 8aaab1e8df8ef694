"""After training: a model in a folder that answers, with the training images it answers from.

Light: only what ``pip install cnn2gnn-dist`` brings (no Ray, DeepSpeed or DGL).
"""
